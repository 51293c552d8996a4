"""The options that `compress` and `sweep` share: each is declared once, as a field of :class:`Settings`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lbyl.cli.names import check_name, is_factory, name_option
from lbyl.cli.options import (
    Builder,
    Inputs,
    NoPretrained,
    Runtime,
    Seed,
    Strict,
    Submodule,
    Task,
    Timed,
    Weights,
)
from lbyl.cli.texts import check_multiple, parse_divisors, parse_numbers

if TYPE_CHECKING:
    from torch import nn

    from lbyl.budget.budget import Budget
    from lbyl.restore.least_squares.restorer import LeastSquares

BUDGET = "Budget"
FITTING = "Least squares"


class Scope(str, Enum):
    """Which groups lose channels."""

    inner = "inner"
    all = "all"


class Effort(str, Enum):
    """How much time the library's choice of a restorer may take."""

    low = "low"
    default = "default"
    high = "high"


class Solve(str, Enum):
    """What least squares solves for."""

    mix = "mix"
    patch = "patch"


@dataclass(frozen=True)
class Settings:
    """The options of a compression, as given by the user. Their order is that of the help."""

    round_to: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            callback=check_multiple,
            help="Each group keeps a multiple of this number of channels. Default: up to 128 in language models of "
            "transformers, the more the wider a group is, and 1 elsewhere.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None
    min_keep: Annotated[
        int, typer.Option(min=1, help="Each group keeps at least this many channels.", rich_help_panel=BUDGET)
    ] = 1
    max_ratio: Annotated[
        float,
        typer.Option(min=0, max=0.999, help="No group loses a larger share of its channels.", rich_help_panel=BUDGET),
    ] = 0.9
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Groups and layers that are not pruned.", rich_help_panel=BUDGET),
    ] = None
    uniform_layers: Annotated[
        bool | None,
        typer.Option(
            "--uniform-layers/--own-widths",
            help="One width for all layers, or one for each layer. Default: one for all layers in models of "
            "transformers, because their configurations can't express others.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None
    runtime: Timed = Runtime.torch
    scope: Annotated[
        Scope,
        typer.Option(help="inner: groups outside of residual connections and layer norms; all: every prunable group."),
    ] = Scope.inner
    criterion: Annotated[str, name_option("criterion", "How channels are scored. The lowest scores go first.")] = "auto"
    restore: Annotated[
        str,
        name_option("restorer", "How kept channels compensate for dropped ones. auto: the best method for this model."),
    ] = "auto"
    effort: Annotated[
        Effort,
        typer.Option(
            help="Time that --restore auto may take. low: a few seconds, nothing dreamed; high: more probes and more "
            "steps of dreaming."
        ),
    ] = Effort.default
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE|FILE.py",
            help="Import this module first. Names that it registers with lbyl.register can then be used. "
            "Repeat it for several modules. A module is code, which is run.",
        ),
    ] = None
    moments: Annotated[
        str | None,
        name_option(
            "moments",
            "Where second moments come from: the weights, Gaussian theory, noise images, photographs, dreamed images, "
            "or your own images (--data).",
            FITTING,
        ),
    ] = None
    solve: Annotated[
        Solve | None,
        typer.Option(
            help="mix: one number for each pair of channels; patch: the consumer's whole kernel.",
            rich_help_panel=FITTING,
        ),
    ] = None
    ridge: Annotated[
        float | None,
        typer.Option(min=0, help="Penalty, relative to the moments' mean diagonal.", rich_help_panel=FITTING),
    ] = None
    no_renorm: Annotated[
        bool,
        typer.Option("--no-renorm", help="Do not recalibrate batch-norm statistics.", rich_help_panel=FITTING),
    ] = False
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--no-sequential",
            help="Solve consumers in turn, so that they also compensate for errors in residual connections. "
            "Default: the way with the lowest error on held-out probes.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None
    no_photographs: Annotated[
        bool,
        typer.Option(
            "--no-photographs",
            help="Do not add crops of the photographs that come with lbyl to dreamed images.",
            rich_help_panel=FITTING,
        ),
    ] = False
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            min=0.001,
            max=2**20,
            help="GiB that activations may take during dreaming and solving. Default: 2.5.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure moments on the images, or for language models on the texts (.txt, .jsonl), in this folder "
            "and its subfolders. They are preprocessed as the model expects. No labels are needed.",
            rich_help_panel=FITTING,
        ),
    ] = None
    mean: Annotated[
        Any,
        typer.Option(
            metavar="M[,M,M]",
            parser=parse_numbers,
            help="Subtracted from the pixels of --data, which have values from 0 to 1. "
            "Default: the numbers of timm or torchvision for this model, else ImageNet's.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None
    std: Annotated[
        Any,
        typer.Option(
            metavar="S[,S,S]",
            parser=parse_divisors,
            help="The pixels are then divided by these numbers.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None
    weights: Weights = None
    builder: Builder = None
    task: Task = None
    input: Inputs = None
    seed: Seed = 0
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Do not compare the cut network with the masked one (for huge models)."),
    ] = False
    no_pretrained: NoPretrained = False
    submodule: Submodule = None
    strict: Strict = False

    def check(self, source: str) -> None:
        """Raise a usage error for unknown names and for options that contradict each other."""
        # Names are checked later if a plugin or the module of a factory may register some.
        if not self.plugin and not is_factory(source):
            self.check_names()
        if self.task is not None and not source.startswith("hf:"):
            raise typer.BadParameter(f"--task is only for hf:DIR, and not for {source}; leave it out")
        given = self._of_least_squares()
        if self.effort is not Effort.default and (self.restore != "auto" or self.data or self.moments):
            raise typer.BadParameter("--effort is for --restore auto without --data or --moments; leave out either")
        if given and self.restore != "auto":
            raise typer.BadParameter(
                f"{given[0]} is for least squares; leave out either it or --restore {self.restore}"
            )
        self._check_data(given)
        self._check_moments()

    def check_names(self) -> None:
        """Raise a usage error for an unknown name."""
        check_name("--criterion", "criterion", self.criterion)
        check_name("--restore", "restorer", self.restore)
        if self.moments is not None:
            check_name("--moments", "moments", self.moments)

    def _of_least_squares(self) -> list[str]:
        """The options of least squares that were given."""
        values = {
            "--moments": self.moments,
            "--solve": self.solve,
            "--ridge": self.ridge,
            "--no-renorm": self.no_renorm or None,
            "--data": self.data,
            "--mean": self.mean,
            "--std": self.std,
            "--sequential" if self.sequential else "--no-sequential": self.sequential,
            "--no-photographs": self.no_photographs or None,
            "--memory": self.memory,
        }
        return [option for option, value in values.items() if value is not None]

    def _check_data(self, given: list[str]) -> None:
        if self.data is None:
            for option in ("--mean", "--std"):
                if option in given:
                    raise typer.BadParameter(f"{option} is for images; pass them with --data FOLDER")
            if self.moments == "data":
                raise typer.BadParameter("--moments data needs images; pass them with --data FOLDER")
        elif self.moments not in (None, "data"):
            raise typer.BadParameter(f"leave out either --data or --moments {self.moments}")

    def _check_moments(self) -> None:
        if self.no_photographs and (self.data or self.moments not in (None, "dream")):
            raise typer.BadParameter("--no-photographs is for dreams; leave out --data, or pass --moments dream")
        if self.moments in ("weights", "gaussian"):
            if self.solve is Solve.patch:
                raise typer.BadParameter(f"--moments {self.moments} can't be used for patches; pass --solve mix")
            if self.sequential:
                raise typer.BadParameter(f"--moments {self.moments} has no probes; leave out --sequential")

    def budget(
        self,
        name: str,
        amount: float,
        minimize: str = "macs",
        *,
        best_effort: bool = False,
        depth: bool = False,
        experts: bool = False,
        head_dim: bool = False,
    ) -> Budget:
        """The budget that limits a cost to an amount, or minimizes a cost for a quality."""
        from lbyl.budget.budget import Budget
        from lbyl.errors import InputError

        try:
            return Budget(
                **{name: amount},  # pyright: ignore[reportArgumentType]
                minimize=minimize,
                best_effort=best_effort,
                depth=depth,
                experts=experts,
                head_dim=head_dim,
                round_to=self.round_to if self.round_to in ("auto", None) else int(self.round_to),
                min_keep=self.min_keep,
                max_ratio=self.max_ratio,
                exclude=tuple(self.exclude or ()),
                uniform_layers=self.uniform_layers,
                runtime=self.runtime.value if "latency" in (name, minimize) else Runtime.torch.value,
            )
        except InputError as error:
            raise typer.BadParameter(str(error)) from None

    def restorer(self, batches: Sequence[Any] | None, model: nn.Module, inputs: Any) -> str | LeastSquares | None:
        """The restorer for the options; None if the library shall choose one.

        Options of least squares change the settings of the restorer that the library chooses for this model.
        """
        if self.restore != "auto":
            return self.restore
        from lbyl.moments import Data, Dream
        from lbyl.restore.registry import choose_restorer
        from lbyl.runtime.inputs import ExampleInputs
        from lbyl.runtime.registry import make

        changes: dict[str, Any] = {}
        if batches:
            changes["moments"] = Data(batches, batches=len(batches))
        elif self.no_photographs:
            changes["moments"] = Dream(photographs=False)
        elif self.moments:
            changes["moments"] = make("moments", self.moments)
        if self.solve:
            changes["solve"] = self.solve.value
        if self.ridge is not None:
            changes["ridge"] = self.ridge
        if self.no_renorm:
            changes["renorm"] = False
        if self.sequential is not None:
            changes["sequential"] = self.sequential
        if self.memory is not None:
            changes["memory"] = round(self.memory * 2**30)
        if not changes:
            return None
        restorer = replace(choose_restorer(model, ExampleInputs.of(inputs), self.effort.value)[0], **changes)
        if isinstance(restorer.moments, Dream):
            return replace(restorer, moments=replace(restorer.moments, memory=restorer.memory))
        return restorer


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :class:`Settings`, in place of its parameter of that type."""
    own = get_type_hints(command, include_extras=True)
    shared = get_type_hints(Settings, include_extras=True)
    shared_names = [field.name for field in fields(Settings)]
    parameters: list[inspect.Parameter] = []
    (place,) = (name for name, hint in own.items() if hint is Settings)
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == place:
            parameters += [_parameter(field.name, field.default, shared[field.name]) for field in fields(Settings)]
        else:
            parameters.append(_parameter(parameter.name, parameter.default, own[parameter.name]))

    @wraps(command)
    def with_options(**options: Any) -> None:
        settings = Settings(**{name: options.pop(name) for name in shared_names})
        command(**options, **{place: settings})

    # Typer reads these two.
    with_options.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
