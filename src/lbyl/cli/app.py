"""The application, its two consoles, and output that all commands share: progress, one-line errors, JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from time import perf_counter
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lbyl.cli.terminal import INTERRUPTED, width
from lbyl.errors import LbylError

app = typer.Typer(
    name="lbyl",
    help="Structured pruning of trained networks with restoration in closed form: without your data or retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

out = Console(width=width(), highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lbyl {version('lbyl')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structured pruning of trained networks with restoration in closed form: without your data or retraining."""


class Stage:
    """The progress line: the name of the stage, and a bar if the amount of work is known.

    Where nobody sees a terminal, as in a log, each stage is a line of its own, with the seconds before it.
    """

    def __init__(self, progress: Progress, stage: str, lines: bool = False) -> None:
        self._progress, self._name, self._lines = progress, stage, lines
        self._task, self._started = progress.add_task(stage, total=None), perf_counter()
        self._say()

    def _say(self) -> None:
        if self._lines:
            err.print(Text(f"{perf_counter() - self._started:5.0f} s  {self._name}"))

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None:
        """Show that ``done`` of ``total`` parts of a stage are done."""
        if stage != self._name:
            # A new task, because stages differ in speed.
            self._progress.remove_task(self._task)
            self._name, self._task = stage, self._progress.add_task(stage, total=total)
            self._say()
        self._progress.update(self._task, completed=done)

    def follow(self, stage: str, done: int, total: int) -> None:
        """The progress callback of `compress`, which is not called after the last layer."""
        if stage in ("restoring", "solving") and done == total:
            self("cutting and verifying")
        else:
            self(stage, done, total)


class TimeLeft(TimeRemainingColumn):
    """The estimated time left, if the amount of work is known and some of it is done."""

    def render(self, task: Task) -> Text:
        """The time left, or nothing."""
        known = task.total is not None and task.time_remaining is not None
        return Text(" ").join((super().render(task), Text("left"))) if known else Text()


@contextmanager
def working(what: str, quiet: bool = False) -> Iterator[Stage]:
    """Show progress on stderr, unless it is to be quiet. An LbylError becomes one line there and exit code 1.

    Stdout is for the result, so output of libraries and factories is redirected to stderr.
    """
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), TimeLeft())
    bar = Progress(
        *columns,
        console=err,
        transient=True,
        disable=quiet or not err.is_terminal,
        # A single step of dreaming may take longer than Rich's default period.
        speed_estimate_period=3600,
    )
    try:
        with redirect_stdout(sys.stderr), bar as progress:
            yield Stage(progress, what, lines=not (quiet or err.is_terminal))
    except KeyboardInterrupt as error:
        err.print("interrupted")
        raise typer.Exit(INTERRUPTED) from error
    except LbylError as error:
        err.print(Text(f"error: {' '.join(str(error).split())}"))
        raise typer.Exit(1) from error


EXAMPLES = {
    "inspect": ("lbyl inspect torchvision:resnet50", "lbyl inspect model.py:build --input 1x3x224x224"),
    "compress": (
        "lbyl compress torchvision:resnet50 -o smaller",
        "lbyl compress timm:resnet50 --budget macs=0.6 --data photos/ -o smaller",
        "lbyl compress model.py:build --weights best.safetensors --input 1x3x224x224 --ratio 0.3 -o smaller",
        "lbyl compress model.onnx --budget latency=0.7 -o smaller",
    ),
    "sweep": ("lbyl sweep timm:resnet50 --budget macs=0.9,0.8,0.7 --eval judge.py:accuracy -o points",),
    "resize": ("lbyl resize smaller --budget macs=0.6 -o smallest",),
    "show": ("lbyl show smaller",),
    "export": ("lbyl export smaller --format onnx", "lbyl export smaller --model model.py:build --format pt2"),
    "bench": ("lbyl bench smaller --against torchvision:resnet50 --batch 16",),
}
"""Calls that work, for whoever calls a command without anything."""


class WithExamples(typer.core.TyperCommand):
    """A command that shows how it is called where nothing is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; without any, examples go to stderr, and the exit code is that of a usage error."""
        if not args and self.name in EXAMPLES:
            lines = "\n".join(f"  {call}" for call in EXAMPLES[self.name])
            typer.echo(
                f"{self.get_short_help_str(200)}\n\n{lines}\n\nlbyl {self.name} --help lists all options.", err=True
            )
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    from lbyl.runtime.documents import to_json

    typer.echo(to_json(document))
