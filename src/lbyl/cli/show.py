"""`lbyl show`."""

from __future__ import annotations

from rich.text import Text

from lbyl.cli.app import WithExamples, app, out, print_json, working
from lbyl.cli.options import Folder, Json, Quiet
from lbyl.cli.sources import setting


@app.command(cls=WithExamples)
def show(folder: Folder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Print the content of a saved folder: settings, groups, totals, and how to load it."""
    with working(f"reading {folder}", quiet):
        from lbyl.io.artifact import PAGE, document, missing_weights, read_manifest
        from lbyl.io.report.format import shown
        from lbyl.io.report.snippets import load_line
        from lbyl.surgery.plan import is_rebuildable

        manifest = read_manifest(folder)
    plan = manifest.plan
    if as_json:
        print_json(document(folder, plan, manifest.report, trusted=False))
        return
    out.print(shown(f"{plan.source or 'a model of unknown source'} on {plan.inputs}, by lbyl {plan.library}"))
    out.print(shown(", ".join(f"{name}={setting(value)}" for name, value in plan.settings.items())))
    out.print(manifest.report)
    if (folder / PAGE).is_file():
        out.print(shown(f"{folder / PAGE} shows it with pictures"), soft_wrap=True)
    if lost := missing_weights(folder):
        out.print(shown(lost), soft_wrap=True)
        return
    line = load_line(folder, plan.source if is_rebuildable(plan.source or "") else None)
    out.print(Text(f"load it with\n\n    {line}\n"), soft_wrap=True)
