"""Options that several commands share.

Options that only `compress` and `sweep` share are in `lbyl.cli.settings`.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lbyl.cli.texts import check_inputs, check_source

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        callback=check_source,
        help="timm:NAME, torchvision:NAME, hf:DIR (a folder that save_pretrained wrote), model.onnx, model.pt2, "
        "package.module:factory or file.py:factory. A factory is code, which is run. "
        "Or a folder that compress or lbyl.save wrote, to go on from there.",
        show_default=False,
    ),
]
Builder = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SOURCE",
        callback=check_source,
        help="What builds the unpruned model that a saved folder is loaded into. "
        "Default: the source that it was compressed from, unless that is a factory of yours or a .pt2.",
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
        "Repeat it for several positional inputs, or for the images of a detector of torchvision's (3x160x160). "
        "timm and torchvision models and ONNX files have a default."
    ),
]
SameInputs = Annotated[
    list[str] | None,
    _shapes("Shape of an example input, as for compress. Default: the inputs that the network was compressed with."),
]
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of all random numbers.")]
NoPretrained = Annotated[
    bool,
    typer.Option("--no-pretrained", help="Random weights instead of the published ones (timm, torchvision)."),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help="Task of the model in hf:DIR, such as causal-lm, masked-lm or sequence-classification. "
        "Default: the architecture that its configuration names.",
        show_default=False,
    ),
]
Submodule = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Only this submodule (such as backbone), on the inputs that it gets."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail if a part of the model can't be traced or cut, in place of leaving it whole."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]


class Runtime(str, Enum):
    """What networks are timed in."""

    torch = "torch"
    onnxruntime = "onnxruntime"


Timed = Annotated[
    Runtime,
    typer.Option(
        "--runtime", help="What networks are timed in. onnxruntime takes the extra 'export' of lbyl, and the CPU."
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress: of stderr, only what goes wrong and what others print.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compress wrote.", show_default=False)]
Evaluate = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="MODULE:FUNCTION",
        help="A function that is called with each network and returns a number, such as an accuracy: "
        "package.module:function or file.py:function. It is code, which is run.",
    ),
]
NoForecast = Annotated[
    bool, typer.Option("--no-forecast", help="Do not forecast the agreement on real inputs, which saves time.")
]
