"""`lbyl inspect`."""

from __future__ import annotations

from lbyl.cli.app import WithExamples, app, out, print_json, working
from lbyl.cli.options import Builder, Inputs, Json, NoPretrained, Quiet, Seed, Source, Strict, Submodule, Weights
from lbyl.cli.sources import example_inputs, load_model


@app.command(cls=WithExamples)
def inspect(
    source: Source,
    weights: Weights = None,
    builder: Builder = None,
    input: Inputs = None,
    seed: Seed = 0,
    no_pretrained: NoPretrained = False,
    submodule: Submodule = None,
    strict: Strict = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the channel groups of a model: names, widths, consumers, and whether each can be pruned, or why not."""
    with working(f"loading {source}", quiet) as stage:
        import lbyl

        model = load_model(source, weights, not no_pretrained, builder=builder)
        inputs = example_inputs(source, model, input, seed)
        stage("tracing")
        inspection = lbyl.inspect(model, inputs, strict=strict, submodule=submodule)
    if as_json:
        print_json({"source": source, **inspection.to_dict()})
    else:
        out.print(inspection)
