"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lbyl.budget.budget import Budget
    from lbyl.restore.least_squares.restorer import LeastSquares


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
    photographs = "photographs"
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


def parse_divisors(text: str) -> tuple[float, ...]:
    """Numbers that something is divided by."""
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
    sequential: bool | None
    data: Path | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    photographs: bool | None
    memory: float | None

    def check(self, restore: RestorerName) -> None:
        """Options that contradict each other are usage errors."""
        names = {"moments": "--moments", "solve": "--solve", "ridge": "--ridge"}
        names |= {"renorm": "--no-renorm", "data": "--data", "mean": "--mean", "std": "--std"}
        names["sequential"] = "--sequential" if self.sequential else "--no-sequential"
        names |= {"photographs": "--no-photographs", "memory": "--memory"}
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
        if self.photographs is not None and (self.data or self.moments not in (None, MomentsName.dream)):
            raise typer.BadParameter("--no-photographs is for dreams; leave out --data, or pass --moments dream")
        for closed_form in (MomentsName.weights, MomentsName.gaussian):
            if self.moments is closed_form and self.solve is Solve.patch:
                raise typer.BadParameter(f"--moments {closed_form.value} says nothing about patches; pass --solve mix")
            if self.moments is closed_form and self.sequential:
                raise typer.BadParameter(f"--moments {closed_form.value} runs no network; leave out --sequential")

    def restorer(self, batches: list[Tensor] | None, model: nn.Module) -> LeastSquares | None:
        """What the library chooses for this model with what was given, or None where nothing was."""
        from lbyl.moments import Data, Dream
        from lbyl.restore.registry import choose_restorer
        from lbyl.runtime.registry import find

        settings: dict[str, Any] = {}
        if batches:
            settings["moments"] = Data(batches, batches=len(batches))
        elif self.photographs is not None:
            settings["moments"] = Dream(photographs=self.photographs)
        elif self.moments:
            settings["moments"] = find("moments", self.moments.value)()
        if self.solve:
            settings["solve"] = self.solve.value
        if self.ridge is not None:
            settings["ridge"] = self.ridge
        if self.renorm is not None:
            settings["renorm"] = self.renorm
        if self.sequential is not None:
            settings["sequential"] = self.sequential
        if self.memory is not None:
            settings["memory"] = round(self.memory * 2**30)
        if not settings:
            return None
        restorer = replace(choose_restorer(model)[0], **settings)
        if isinstance(restorer.moments, Dream):
            return replace(restorer, moments=replace(restorer.moments, memory=restorer.memory))
        return restorer


def check_inputs(texts: list[str] | None) -> list[str] | None:
    """A usage error where a text is no input."""
    for text in texts or []:
        InputSpec.parse(text)
    return texts


def check_ratios(texts: list[str] | None) -> list[str] | None:
    """A usage error where a text is no ratio."""
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
        if name not in ("macs", "params", "size_mb", "latency"):
            raise ValueError
        return name, float(number)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write macs=0.5, params=0.5, latency=0.5 or size_mb=10") from None


def parse_budgets(texts: list[str]) -> list[tuple[str, float]]:
    """What is limited, and to how much, amount by amount.

    >>> parse_budgets(["macs=0.9,0.8", "params=0.5"])
    [('macs', 0.9), ('macs', 0.8), ('params', 0.5)]
    """
    found: list[tuple[str, float]] = []
    for text in texts:
        name, _, amounts = text.partition("=")
        for amount in amounts.split(","):
            budget = parse_budget(f"{name}={amount}")
            if budget in found:
                raise typer.BadParameter(f"{name}={amount} is given twice")
            found.append(budget)
    return found


def check_budgets(texts: list[str]) -> list[str]:
    """A usage error where a text is no budget."""
    parse_budgets(texts)
    return texts


def make_budget(
    name: str, amount: float, round_to: str, min_keep: int, max_ratio: float, exclude: list[str] | None
) -> Budget:
    """The budget that the options say."""
    from lbyl.budget.budget import Budget

    return Budget(
        **{name: amount},  # pyright: ignore[reportArgumentType]
        round_to=round_to if round_to == "auto" else int(round_to),
        min_keep=min_keep,
        max_ratio=max_ratio,
        exclude=tuple(exclude or ()),
    )


def check_budget(text: str | None) -> str | None:
    """A usage error where a text is no budget."""
    if text is not None:
        parse_budget(text)
    return text


def check_multiple(text: str) -> str:
    """A usage error where a text is neither a positive whole number nor auto."""
    if text != "auto" and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise typer.BadParameter(f"{text!r}: write a whole number from 1, or auto")
    return text


FITTING = "Least squares"
BUDGET = "Budget"

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


def _shapes(help: str) -> Any:
    return typer.Option("--input", metavar="SHAPE", callback=check_inputs, help=help)


Inputs = Annotated[
    list[str] | None,
    _shapes(
        "Shape of an example input: 1x3x224x224, or int64:1x128. "
        "Repeat it for several positional inputs. timm and torchvision models have a default."
    ),
]
SameInputs = Annotated[
    list[str] | None,
    _shapes("Shape of an example input, as for compress. Default: what the network was compressed on."),
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
RoundTo = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        callback=check_multiple,
        help="Kept channels come in multiples of this.",
        rich_help_panel=BUDGET,
    ),
]
MinKeep = Annotated[int, typer.Option(min=1, help="No group keeps fewer.", rich_help_panel=BUDGET)]
MaxRatio = Annotated[
    float, typer.Option(min=0, max=0.999, help="No group loses a larger share.", rich_help_panel=BUDGET)
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Groups and layers that stay whole.", rich_help_panel=BUDGET),
]
InScope = Annotated[
    Scope, typer.Option(help="inner: groups that no residual sum or layer norm couples; all: every prunable one.")
]
Criterion = Annotated[CriterionName, typer.Option(help="How channels are scored.")]
Restore = Annotated[
    RestorerName,
    typer.Option(help="How dropped channels are made up for. auto: the best that this network allows."),
]
Moments = Annotated[
    MomentsName | None,
    typer.Option(
        help="Where second moments come from: the weights, Gaussian theory, noise images, dreamed images "
        "or your own (--data).",
        rich_help_panel=FITTING,
    ),
]
SolveFor = Annotated[
    Solve | None,
    typer.Option(help="mix: one number a channel pair; patch: the consumer's whole kernel.", rich_help_panel=FITTING),
]
Ridge = Annotated[
    float | None,
    typer.Option(min=0, help="Penalty, relative to the moments' mean diagonal.", rich_help_panel=FITTING),
]
NoRenorm = Annotated[
    bool, typer.Option("--no-renorm", help="Leave batch-norm statistics alone.", rich_help_panel=FITTING)
]
Sequential = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="Solve consumers in turn, to make up for what residual sums lose. Default: where the error on held-out "
        "probes is lower for it.",
        show_default=False,
        rich_help_panel=FITTING,
    ),
]
NoPhotographs = Annotated[
    bool,
    typer.Option(
        "--no-photographs",
        help="Dream without crops of the photographs that come with lbyl.",
        rich_help_panel=FITTING,
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        min=0.001,
        help="Gibibytes that activations may take while dreaming and solving. Default: 2.5.",
        show_default=False,
        rich_help_panel=FITTING,
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Take moments from images in a folder and those in it, preprocessed as the model expects; "
        "no labels are needed.",
        rich_help_panel=FITTING,
    ),
]
Mean = Annotated[
    Any,
    typer.Option(
        metavar="M[,M,M]",
        parser=parse_numbers,
        help="Subtracted from the pixels of --data, which are 0 to 1. "
        "Default: as timm or torchvision say, else ImageNet's.",
        show_default=False,
        rich_help_panel=FITTING,
    ),
]
Std = Annotated[
    Any,
    typer.Option(
        metavar="S[,S,S]",
        parser=parse_divisors,
        help="What the pixels are then divided by.",
        show_default=False,
        rich_help_panel=FITTING,
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Don't compare the cut network with the masked one (huge models)."),
]
