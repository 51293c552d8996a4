"""The command line: `inspect`, `compress`, `show` and `export`, on top of the same functions that users call.

Torch is imported inside the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lbyl.plan import Plan
    from lbyl.report import Report
    from lbyl.restorers import LeastSquares

app = typer.Typer(
    name="lbyl",
    help="Structured pruning of trained networks, restored in closed form: no data, no retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What is piped must not be cut short at a terminal width that nobody sees.
_out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)


class Scope(str, Enum):
    """Which groups lose channels."""

    inner = "inner"
    all = "all"


class CriterionName(str, Enum):
    """How channels are scored."""

    l1 = "l1"
    l2 = "l2"
    gm = "gm"
    random = "random"


class RestorerName(str, Enum):
    """How dropped channels are made up for."""

    auto = "auto"
    lbyl = "lbyl"
    prune = "prune"
    merge = "merge"
    coreset = "coreset"


class MomentsName(str, Enum):
    """Where least squares takes its second moments from."""

    weights = "weights"
    gaussian = "gaussian"
    noise = "noise"
    dream = "dream"
    data = "data"


class Solve(str, Enum):
    """What least squares solves for."""

    mix = "mix"
    patch = "patch"


class FormatName(str, Enum):
    """What a saved network is exported as."""

    onnx = "onnx"
    pt2 = "pt2"


# -- options ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one positional input, as ``--input`` spells them.

    >>> InputSpec.parse("1x3x224x224")
    InputSpec(shape=(1, 3, 224, 224), dtype='float32')
    >>> InputSpec.parse("int64:1x128")
    InputSpec(shape=(1, 128), dtype='int64')
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    @staticmethod
    def parse(text: str) -> InputSpec:
        """Read ``1x3x224x224`` or ``int64:1x128``; anything else is a usage error."""
        dtype, separator, sizes = text.rpartition(":")
        dtype = dtype if separator else "float32"
        if dtype not in _DTYPES:
            raise typer.BadParameter(f"{text!r}: {dtype!r} is no dtype; write one of {', '.join(_DTYPES)}")
        try:
            shape = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            shape = (0,)
        if min(shape) < 1:
            raise typer.BadParameter(f"{text!r} is no shape; write sizes such as 1x3x224x224 or int64:1x128")
        return InputSpec(shape, dtype)


_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def parse_ratio(texts: list[str]) -> float | dict[str, float]:
    """One number for every group, or ``GLOB=R`` as often as needed; a number among globs stands for ``*``.

    >>> parse_ratio(["0.3"])
    0.3
    >>> parse_ratio(["0.3", "layer4.*=0.5", "fc=0"])
    {'*': 0.3, 'layer4.*': 0.5, 'fc': 0.0}
    """
    ratios: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        pattern = pattern or "*"
        try:
            share = float(number)
        except ValueError:
            raise typer.BadParameter(f"{text!r}: {number!r} is no number; write 0.3 or 'layer4.*=0.3'") from None
        if not 0 <= share < 1:
            raise typer.BadParameter(f"{text!r}: the share of channels to drop must be at least 0 and below 1")
        if pattern in ratios:
            raise typer.BadParameter(f"two ratios for {pattern!r}")
        ratios[pattern] = share
    return ratios["*"] if list(ratios) == ["*"] else ratios


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, one for all color channels or one each.

    >>> parse_numbers("0.485,0.456,0.406")
    (0.485, 0.456, 0.406)
    """
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise typer.BadParameter(f"{text!r}: write numbers such as 0.5 or 0.485,0.456,0.406")
    return numbers


def _parse_divisors(text: str) -> tuple[float, ...]:
    numbers = parse_numbers(text)
    if min(numbers) <= 0:
        raise typer.BadParameter(f"{text!r}: pixels are divided by these numbers; they must be above 0")
    return numbers


@dataclass(frozen=True)
class Fitting:
    """The options of least squares as they were given; None where the library decides."""

    moments: MomentsName | None
    solve: Solve | None
    ridge: float | None
    renorm: bool | None
    data: Path | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def check(self, restore: RestorerName) -> None:
        """Options that contradict each other are usage errors."""
        names = {"moments": "--moments", "solve": "--solve", "ridge": "--ridge"}
        names |= {"renorm": "--no-renorm", "data": "--data", "mean": "--mean", "std": "--std"}
        given = [option for name, option in names.items() if getattr(self, name) is not None]
        if given and restore is not RestorerName.auto:
            raise typer.BadParameter(
                f"{given[0]} is for least squares; leave out either it or --restore {restore.value}"
            )
        if self.data is None:
            for option in ("--mean", "--std"):
                if option in given:
                    raise typer.BadParameter(f"{option} is for images; pass them with --data FOLDER")
            if self.moments is MomentsName.data:
                raise typer.BadParameter("--moments data needs images; pass them with --data FOLDER")
        elif self.moments not in (None, MomentsName.data):
            raise typer.BadParameter(f"leave out either --data or --moments {self.moments.value}")
        for closed_form in (MomentsName.weights, MomentsName.gaussian):
            if self.moments is closed_form and self.solve is Solve.patch:
                raise typer.BadParameter(f"--moments {closed_form.value} says nothing about patches; pass --solve mix")

    def restorer(self, batches: list[Tensor] | None) -> LeastSquares | None:
        """Least squares with what was given, or None where nothing was."""
        from lbyl.moments import MOMENTS, Data
        from lbyl.restorers import LeastSquares

        settings: dict[str, Any] = {}
        if batches:
            settings["moments"] = Data(batches, batches=len(batches))
        elif self.moments:
            settings["moments"] = MOMENTS[self.moments.value]()
        if self.solve:
            settings["solve"] = self.solve.value
        if self.ridge is not None:
            settings["ridge"] = self.ridge
        if self.renorm is not None:
            settings["renorm"] = self.renorm
        return LeastSquares(**settings) if settings else None


def _check_inputs(texts: list[str] | None) -> list[str] | None:
    for text in texts or []:
        InputSpec.parse(text)
    return texts


def _check_ratios(texts: list[str] | None) -> list[str] | None:
    if texts:
        parse_ratio(texts)
    return texts


def parse_budget(text: str) -> tuple[str, float]:
    """What is limited, and to how much.

    >>> parse_budget("macs=0.5")
    ('macs', 0.5)
    """
    name, _, number = text.partition("=")
    try:
        if name not in ("macs", "params", "size_mb"):
            raise ValueError
        return name, float(number)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write macs=0.5, params=0.5 or size_mb=10") from None


def _check_budget(text: str | None) -> str | None:
    if text is not None:
        parse_budget(text)
    return text


def _check_multiple(text: str) -> str:
    if text != "auto" and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise typer.BadParameter(f"{text!r}: write a whole number from 1, or auto")
    return text


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lbyl {version('lbyl')}")
        raise typer.Exit


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="timm:NAME, torchvision:NAME, package.module:factory or file.py:factory. A factory is code: it is run.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="State dict to load into the model: .safetensors, or .pth (read with weights_only=True)."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        callback=_check_inputs,
        help="Shape of an example input: 1x3x224x224, or int64:1x128. "
        "Repeat it for several positional inputs. timm and torchvision models have a default.",
    ),
]
Seed = Annotated[int, typer.Option(help="For whatever is drawn at random.")]
NoPretrained = Annotated[
    bool,
    typer.Option("--no-pretrained", help="Random weights instead of the published ones (timm, torchvision)."),
]
Submodule = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Only this submodule (backbone), on what the model calls it with."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail where something would be left whole because tracing or cutting it fails."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compress wrote.", show_default=False)]


FITTING = "Least squares"
BUDGET = "Budget"


# -- commands -----------------------------------------------------------------------------------------------


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structured pruning of trained networks, restored in closed form: no data, no retraining."""


@app.command()
def inspect(
    source: Source,
    weights: Weights = None,
    input: Inputs = None,
    seed: Seed = 0,
    no_pretrained: NoPretrained = False,
    submodule: Submodule = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """List the channel groups of a model: names, widths, who reads them, prunable or why not."""
    with _working(f"loading {source}") as stage:
        import lbyl

        model = _model(source, weights, not no_pretrained)
        inputs = _example_inputs(source, model, input, seed)
        stage("tracing")
        inspection = lbyl.inspect(model, inputs, strict=strict, submodule=submodule)
    if as_json:
        _print_json({"source": source, **inspection.to_dict()})
    else:
        _out.print(inspection)


@app.command()
def compress(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New folder to write.")],
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R|GLOB=R",
            callback=_check_ratios,
            help="Share of the channels that each group loses. "
            "Repeat it as GLOB=R for single groups or layers; "
            "the last match counts, and without a plain R the others stay whole. Default: 0.5.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="macs=R|params=R|size_mb=X",
            callback=_check_budget,
            help="What may stay, in place of a ratio; each group's width is then chosen for the least predicted error.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    round_to: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            callback=_check_multiple,
            help="Kept channels come in multiples of this.",
            rich_help_panel=BUDGET,
        ),
    ] = "1",
    min_keep: Annotated[int, typer.Option(min=1, help="No group keeps fewer.", rich_help_panel=BUDGET)] = 1,
    max_ratio: Annotated[
        float, typer.Option(min=0, max=0.999, help="No group loses a larger share.", rich_help_panel=BUDGET)
    ] = 0.9,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Groups and layers that stay whole.", rich_help_panel=BUDGET),
    ] = None,
    scope: Annotated[
        Scope, typer.Option(help="inner: groups that no residual sum couples; all: every prunable one.")
    ] = Scope.inner,
    criterion: Annotated[CriterionName, typer.Option(help="How channels are scored.")] = CriterionName.l2,
    restore: Annotated[
        RestorerName,
        typer.Option(help="How dropped channels are made up for. auto: the best that this network allows."),
    ] = RestorerName.auto,
    moments: Annotated[
        MomentsName | None,
        typer.Option(
            help="Where second moments come from: the weights, Gaussian theory, noise images, dreamed images "
            "or your own (--data).",
            rich_help_panel=FITTING,
        ),
    ] = None,
    solve: Annotated[
        Solve | None,
        typer.Option(help="mix: one number a channel pair; patch: the reader's whole kernel.", rich_help_panel=FITTING),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(min=0, help="Penalty, relative to the moments' mean diagonal.", rich_help_panel=FITTING),
    ] = None,
    no_renorm: Annotated[
        bool,
        typer.Option("--no-renorm", help="Leave batch-norm statistics alone.", rich_help_panel=FITTING),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Take moments from images in a folder and those in it, preprocessed as the model expects; "
            "no labels are needed.",
            rich_help_panel=FITTING,
        ),
    ] = None,
    mean: Annotated[
        Any,
        typer.Option(
            metavar="M[,M,M]",
            parser=parse_numbers,
            help="Subtracted from the pixels of --data, which are 0 to 1. "
            "Default: as timm or torchvision say, else ImageNet's.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None,
    std: Annotated[
        Any,
        typer.Option(
            metavar="S[,S,S]",
            parser=_parse_divisors,
            help="What the pixels are then divided by.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None,
    weights: Weights = None,
    input: Inputs = None,
    seed: Seed = 0,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Don't compare the cut network with the masked one (huge models)."),
    ] = False,
    no_pretrained: NoPretrained = False,
    submodule: Submodule = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Drop channels, let the kept ones make up for them, and save the smaller network."""
    fitting = Fitting(moments, solve, ridge, False if no_renorm else None, data, mean, std)
    fitting.check(restore)
    if budget is not None and ratio:
        raise typer.BadParameter("--ratio and --budget: give one of them; a budget chooses each group's ratio")
    if budget is None and (round_to != "1" or min_keep != 1 or max_ratio != 0.9 or exclude):
        raise typer.BadParameter("--round-to, --min-keep, --max-ratio and --exclude need --budget")
    with _working(f"loading {source}") as stage:
        _check_output(output)
        import lbyl

        if data is not None:
            from lbyl.images import find_images

            find_images(data)  # before any time is spent
        limit = None
        if budget is not None:
            name, amount = parse_budget(budget)
            multiple = round_to if round_to == "auto" else int(round_to)
            limit = lbyl.Budget(
                **{name: amount},  # pyright: ignore[reportArgumentType]
                round_to=multiple,
                min_keep=min_keep,
                max_ratio=max_ratio,
                exclude=tuple(exclude or ()),
            )
        model = _model(source, weights, not no_pretrained)
        inputs = _example_inputs(source, model, input, seed)
        batches = None
        if data is not None:
            stage(f"reading images from {data}")
            batches = _images(data, source, model, inputs[0], bool(input), fitting, seed)
        chosen = restore.value if restore is not RestorerName.auto else fitting.restorer(batches)
        stage("tracing")
        result = lbyl.compress(
            model,
            inputs,
            ratio=parse_ratio(ratio) if ratio else None,
            budget=limit,
            scope=scope.value,
            criterion=criterion.value,
            seed=seed,
            verify=not no_verify,
            strict=strict,
            submodule=submodule,
            source=source,
            progress=stage.follow,
            # Left out, not repeated: "auto" is whatever the library does by itself.
            **({"restore": chosen} if chosen is not None else {}),
        )
        stage(f"writing {output}")
        result.save(output)
    if as_json:
        _print_json(_document(output, result.plan, result.report))
        return
    _out.print(result.report)
    _out.print(Text(f"saved to {output}"), Text(f"load it with\n\n    {_loading(output, source)}\n"), sep="\n")


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """Print what a saved folder holds: settings, groups, totals, and how to load it."""
    with _working(f"reading {folder}"):
        from lbyl.artifact import read_manifest

        manifest = read_manifest(folder)
    plan = manifest.plan
    if as_json:
        _print_json(_document(folder, plan, manifest.report))
        return
    _out.print(Text(f"{plan.source or 'a model of unknown source'} on {plan.inputs}, by lbyl {plan.library}"))
    _out.print(Text(", ".join(f"{name}={_setting(value)}" for name, value in plan.settings.items())))
    _out.print(manifest.report)
    _out.print(Text(f"load it with\n\n    {_loading(folder, plan.source)}\n"))


@app.command()
def export(
    folder: Folder,
    format: Annotated[
        FormatName, typer.Option(help="onnx: for most runtimes; pt2: for torch.export.load.")
    ] = FormatName.onnx,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What builds the unpruned model (module:factory), where it is of neither timm nor torchvision.",
        ),
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            callback=_check_inputs,
            help="Shape of an example input, as for compress. Default: what the network was compressed on.",
        ),
    ] = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Take the example's batch size only, instead of any.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write a saved network into its folder as one file for other runtimes, and check it by running it."""
    with _working(f"reading {folder}") as stage:
        from lbyl.artifact import read_manifest

        read_manifest(folder)  # before any code of the user's runs
        import lbyl
        from lbyl.sources import load_source

        fresh = load_source(model, pretrained=False) if model else None
        inputs = _example_inputs(model or "", fresh, input, seed) if input else None
        stage(f"exporting and checking {format.value}")
        exported = lbyl.export(folder, fresh, format=format.value, inputs=inputs, dynamic=not fixed_batch, seed=seed)
    if as_json:
        _print_json(exported.to_dict())
    else:
        _out.print(*map(Text, exported.summary()), sep="\n", soft_wrap=True)


def main() -> None:
    """Run the command line."""
    # A console script does not search the working directory, where package.module:factory often lives.
    # Last, so that nothing there can shadow an installed package.
    sys.path.append(os.getcwd())
    app()


# -- helpers ------------------------------------------------------------------------------------------------


class _Stage:
    """The line that moves: a spinner with what is going on, a bar where the amount of work is known."""

    def __init__(self, progress: Progress, stage: str) -> None:
        self._progress, self._name = progress, stage
        self._task = progress.add_task(stage, total=None)

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None:
        if stage != self._name:
            # A new line, for the speed of one stage says nothing about the next.
            self._progress.remove_task(self._task)
            self._name, self._task = stage, self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done)

    def follow(self, stage: str, done: int, total: int) -> None:
        """The callback of `compress`, which is silent about what comes after the last layer."""
        if stage in ("restoring", "solving") and done == total:
            self("cutting and verifying")
        else:
            self(stage, done, total)


class _TimeLeft(TimeRemainingColumn):
    """An estimate, where the amount of work is known and some of it is done."""

    def render(self, task: Task) -> Text:
        known = task.total is not None and task.time_remaining is not None
        return Text(" ").join((super().render(task), Text("left"))) if known else Text()


@contextmanager
def _working(what: str) -> Iterator[_Stage]:
    """Show what is going on, on stderr; an LbylError becomes one line there and exit code 1.

    Stdout belongs to the outcome: whatever libraries and factories print meanwhile goes to stderr.
    """
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), _TimeLeft())
    bar = Progress(
        *columns,
        console=_err,
        transient=True,
        disable=not _err.is_terminal,
        # A single step of dreaming may take longer than Rich looks back by default.
        speed_estimate_period=3600,
    )
    try:
        with redirect_stdout(sys.stderr), bar as progress:
            yield _Stage(progress, what)
    except Exception as error:
        from lbyl.errors import LbylError

        if not isinstance(error, LbylError):
            raise
        _err.print(Text(f"error: {' '.join(str(error).split())}"))
        raise typer.Exit(1) from error


def _check_output(path: Path) -> None:
    """What `save` would refuse is refused before any time is spent."""
    from lbyl.errors import InputError

    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; choose another folder or remove it first")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; create it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} is not writable; choose another place for {path.name}")


def _model(source: str, weights: Path | None, pretrained: bool) -> nn.Module:
    from lbyl.errors import InputError
    from lbyl.sources import load_source, load_weights

    if weights is not None and not weights.is_file():
        raise InputError(f"no weights at {weights}")
    model = load_source(source, pretrained and weights is None)
    return model if weights is None else load_weights(model, weights)


def _example_inputs(source: str, model: nn.Module | None, texts: list[str] | None, seed: int) -> tuple[Tensor, ...]:
    import torch

    from lbyl.errors import InputError

    specs = [InputSpec.parse(text) for text in texts or []]
    if not specs:
        shape = _default_shape(source, model)
        if shape is None:
            raise InputError(f"{source} doesn't say what it is called with; pass --input, such as --input 1x3x224x224")
        specs = [InputSpec(shape)]
    generator = torch.Generator().manual_seed(seed)

    def make(spec: InputSpec) -> Tensor:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            return torch.randn(spec.shape, generator=generator).to(dtype)
        # Zero is a valid token, index and mask in every vocabulary; a random number is not.
        return torch.zeros(spec.shape, dtype=dtype)

    return tuple(make(spec) for spec in specs)


def _images(
    folder: Path,
    source: str,
    model: nn.Module,
    example: Tensor,
    sized: bool,
    fitting: Fitting,
    seed: int,
) -> list[Tensor]:
    from lbyl.images import preprocessing, read_images

    preprocess, mode = preprocessing(source, model, example.shape, sized=sized, mean=fitting.mean, std=fitting.std)
    return [batch.to(example.dtype) for batch in read_images(folder, preprocess, mode, seed)]


def _default_shape(source: str, model: nn.Module | None) -> tuple[int, ...] | None:
    if source.startswith("torchvision:"):
        return (1, 3, 224, 224)
    if source.startswith("timm:"):
        config = getattr(model, "pretrained_cfg", None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        return (1, *size) if size else None
    return None


def _document(path: Path, plan: Plan, report: Report) -> dict[str, Any]:
    """The outcome for machines. Cuts of single tensors are left to ``lbyl.json``: the groups imply them."""
    described = {name: value for name, value in plan.to_dict().items() if name not in ("cuts", "architecture")}
    return {
        "path": str(path),
        "load": _loading(path, plan.source),
        "plan": described,
        "report": report.to_dict(),
    }


def _loading(path: Path, source: str | None) -> str:
    """The Python that loads a saved folder."""
    from lbyl.sources import is_rebuildable

    folder = repr(str(path))
    if source is None:
        return f"import lbyl; net = lbyl.load({folder}, model)  # model: a fresh, unpruned instance"
    if is_rebuildable(source):
        return f"import lbyl; net = lbyl.load({folder})"
    return f"import lbyl, lbyl.sources; net = lbyl.load({folder}, lbyl.sources.load_source({source!r}))"


def _setting(value: Any) -> str:
    """A settings object the way Python would print it."""
    if isinstance(value, Mapping) and "name" in value:
        fields = ", ".join(f"{key}={_setting(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({fields})"
    return shlex.quote(value) if isinstance(value, str) else repr(value)


def _print_json(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(document))


if __name__ == "__main__":
    main()
