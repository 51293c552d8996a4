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
_UNITS = {"macs": "MACs", "params": "parameters", "size_mb": "bytes", "latency": "µs"}


@dataclass(frozen=True)
class Budget:
    """What the smaller network may cost; exactly one of the first four is given.

    Attributes:
        macs: share of the multiply-accumulates that may stay (0.5), at the example inputs.
        params: share of the parameters that may stay.
        size_mb: size of the saved weights in megabytes (10**6 bytes).
        latency: share of the time that may stay, measured on this machine at the example inputs. Measurements
            scatter, so equal seeds need not give equal widths.
        round_to: kept channels come in multiples of this, where a group is wide enough; "auto" takes what suits the
            device: on a CPU the floats in a vector (16 with AVX-512, 8 with AVX2, else 4), elsewhere 8.
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
    round_to: int | str = 1
    min_keep: int = 1
    max_ratio: float = 0.9
    exclude: tuple[str, ...] = ()
    uniform_layers: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in _UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"Budget: give exactly one of macs, params, size_mb and latency (given: {', '.join(given) or 'none'})"
            )
        name, amount = self.limited
        check_number(f"Budget({name}={{}})", amount, above=0, most=None if name == "size_mb" else 1)
        if self.round_to != "auto":
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
        return next((name, getattr(self, name)) for name in _UNITS if getattr(self, name) is not None)

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return _UNITS[self.limited[0]]

    def on(self, device: torch.device) -> Budget:
        """The same with a number in place of "auto": what suits the device."""
        return replace(self, round_to=_suitable(device)) if self.round_to == "auto" else self

    def excludes(self, group: Group) -> bool:
        """Whether a pattern names the group or one of its layers."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (group.name, *group.layers))


def _suitable(device: torch.device) -> int:
    """The multiple of channels that kernels work in: a vector of floats, or a tile of a tensor core."""
    if device.type != "cpu":
        return 8
    capability = torch.backends.cpu.get_cpu_capability()
    return 16 if capability.startswith("AVX512") else 8 if capability in ("AVX2", "SVE256") else 4
