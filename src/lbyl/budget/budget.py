"""The budget that a user gives: what the smaller network may cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from lbyl.errors import InputError
from lbyl.graph import Group
from lbyl.runtime.checks import check_number, check_switch

REACHED_WITHIN = 0.02
_FEWEST_STEPS = 48
"""Groups have so many widths to choose from, for a budget has to be met within 2 %."""
_UNITS = {"macs": "MACs", "params": "parameters", "size_mb": "bytes", "latency": "µs"}
_QUALITIES = ("agreement", "accuracy_drop")
_SHARES = ("macs", "params", "latency")


@dataclass(frozen=True)
class Budget:
    """What the smaller network may cost, or what it has to keep; exactly one of the first six is given.

    Attributes:
        macs: share of the multiply-accumulates that may stay (0.5), at the example inputs.
        params: share of the parameters that may stay.
        size_mb: size of the saved weights in megabytes (10**6 bytes).
        latency: share of the time that may stay, measured on this machine at the example inputs. Measurements
            scatter, so equal seeds need not give equal widths.
        agreement: share of real inputs on which the network has to give its first answer still, as far as that can be
            foretold (:class:`lbyl.Report`, ``forecast``): the smallest network is looked for that keeps it.
        accuracy_drop: the same with a measure of yours: what ``evaluate`` returns may fall by so much.
        minimize: what the smallest network is smallest in, where a quality is asked for: "macs", "params" or "latency".
        round_to: kept channels come in multiples of this, where a group is wide enough; "auto" takes what suits the
            device: on a CPU the floats in a vector (16 with AVX-512, 8 with AVX2, else 4), elsewhere 8. None takes the
            largest of 128, 64, 32, ... that is at most a 48th of the group, in language models of transformers, as
            long as the budget can be met so; and 1 elsewhere.
        min_keep: no group keeps fewer channels.
        max_ratio: no group loses a larger share.
        exclude: globs of groups and layers that stay whole.
        uniform_layers: one width for groups of the same name in all layers ("layers.0.mlp.up", "layers.1.mlp.up"), as
            the configurations of transformers say them. None does so for models that have one; False gives each layer
            its own width, which costs less accuracy, but only ``lbyl.load`` then loads what is saved.
    """

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency: float | None = None
    agreement: float | None = None
    accuracy_drop: float | None = None
    minimize: str = "macs"
    round_to: int | str | None = None
    min_keep: int = 1
    max_ratio: float = 0.9
    exclude: tuple[str, ...] = ()
    uniform_layers: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in (*_UNITS, *_QUALITIES) if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                "Budget: give exactly one of macs, params, size_mb, latency, agreement and accuracy_drop "
                f"(given: {', '.join(given) or 'none'})"
            )
        name, amount = self.limited
        if name == "agreement":
            check_number("Budget(agreement={})", amount, above=0, below=1)
        elif name == "accuracy_drop":
            check_number("Budget(accuracy_drop={})", amount, least=0)
        else:
            check_number(f"Budget({name}={{}})", amount, above=0, most=None if name == "size_mb" else 1)
        if self.minimize not in _SHARES:
            raise InputError(f"Budget(minimize={self.minimize!r}): choose 'macs', 'params' or 'latency'")
        if self.minimize != "macs" and name not in _QUALITIES:
            raise InputError(f"Budget(minimize={self.minimize!r}): {name} is what is limited; leave out minimize")
        if self.round_to not in ("auto", None):
            check_number('Budget(round_to={}) is not "auto"', self.round_to, whole=True, least=1)
        check_number("Budget(min_keep={})", self.min_keep, whole=True, least=1)
        check_number("Budget(max_ratio={}), the largest ratio", self.max_ratio, least=0, below=1)
        check_switch("Budget(uniform_layers={})", self.uniform_layers, optional=True)
        exclude = self.exclude
        if isinstance(exclude, str) or not isinstance(exclude, Iterable):
            raise InputError(f"Budget(exclude={exclude!r}): must be a sequence of globs, such as ['layer4.*']")
        object.__setattr__(self, "exclude", tuple(exclude))
        if not all(isinstance(pattern, str) for pattern in self.exclude):
            raise InputError(f"Budget(exclude={exclude!r}): globs are texts, such as 'layer4.*'")

    @property
    def limited(self) -> tuple[str, float]:
        """What is limited, and to how much."""
        names = (*_UNITS, *_QUALITIES)
        return next((name, getattr(self, name)) for name in names if getattr(self, name) is not None)

    @property
    def of_quality(self) -> bool:
        """Whether it says what has to be kept, not what may be spent."""
        return self.limited[0] in _QUALITIES

    def costing(self, share: float) -> Budget:
        """What limits the cost that a quality is to be had for, to a share."""
        limits: dict[str, float | None] = {name: None for name in _QUALITIES}
        return replace(self, **limits, **{self.minimize: share}, minimize="macs")  # pyright: ignore[reportArgumentType]

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return _UNITS[self.limited[0]]

    def on(self, device: torch.device) -> Budget:
        """The same with a number in place of "auto": what suits the device."""
        return replace(self, round_to=_suitable(device)) if self.round_to == "auto" else self

    def multiple(self, width: int) -> int:
        """What the kept channels of a group of this width are a multiple of; once "auto" is a number."""
        if self.round_to is not None:
            return int(self.round_to)
        return next((multiple for multiple in (128, 64, 32, 16, 8, 4, 2) if multiple * _FEWEST_STEPS <= width), 1)

    def excludes(self, group: Group) -> bool:
        """Whether a pattern names the group or one of its layers."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (group.name, *group.layers))


def _suitable(device: torch.device) -> int:
    """The multiple of channels that kernels work in: a vector of floats, or a tile of a tensor core."""
    if device.type != "cpu":
        return 8
    capability = torch.backends.cpu.get_cpu_capability()
    return 16 if capability.startswith("AVX512") else 8 if capability in ("AVX2", "SVE256") else 4
