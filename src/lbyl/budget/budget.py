"""The budget that a user gives: a limit of the smaller network's cost, or a quality that it has to keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from lbyl.errors import InputError
from lbyl.graph import Group
from lbyl.runtime.checks import check_number, check_switch
from lbyl.runtime.latency import RUNTIMES, TORCH

REACHED_WITHIN = 0.02
"""How far from a budget a network may be, relative to the budget."""
SAVED_WITHIN = 0.05
"""How far below it may be if no widths come closer."""
_FEWEST_STEPS = 48
"""Groups have so many widths to choose from, for a budget has to be met within 2 %."""
_UNITS = {"macs": "MACs", "params": "parameters", "size_mb": "bytes", "latency": "µs"}
_QUALITIES = ("agreement", "accuracy_drop")
_SHARES = ("macs", "params", "latency")
BEYOND_WIDTH = ("depth", "experts", "head_dim")
"""Settings by which something else than the channels of layers is cut; the last one is given alone."""


@dataclass(frozen=True)
class Budget:
    """What the smaller network may cost, or what it has to keep; exactly one of the first six must be given.

    Attributes:
        macs: largest share of the multiply-accumulates to keep, such as 0.5, counted on the example inputs.
        params: largest share of the parameters to keep.
        size_mb: largest size of the saved weights, in megabytes (10**6 bytes).
        latency: largest share of the time to keep, measured on this machine with the example inputs. Measurements
            vary, so equal seeds need not give equal widths.
        agreement: smallest share of real inputs for which the network must give the same top class as the original,
            according to the forecast (:class:`lbyl.Report`, ``forecast``). The smallest such network is searched.
        accuracy_drop: largest decrease of the value that ``evaluate`` returns. The smallest such network is searched.
        minimize: with ``agreement`` or ``accuracy_drop``, the cost to minimize: "macs", "params" or "latency".
        round_to: kept channels are multiples of this number in groups that are wide enough. "auto" chooses what suits
            the device: on a CPU the number of floats in a vector (16 with AVX-512, 8 with AVX2, else 4), elsewhere 8.
            None chooses 1. For ONNX files it chooses the same as "auto", and in language models of transformers the
            largest of 128, 64, 32, ... that is at most a 48th of the group, if the budget can be met with it.
        min_keep: smallest number of channels that a group keeps.
        max_ratio: largest share of its channels that a group loses.
        exclude: globs of groups and layers that are not pruned; with ``depth`` also of blocks that stay. There, "*"
            is for channels only, so that nothing but blocks is dropped.
        uniform_layers: whether groups of the same name in all layers ("layers.0.mlp.up", "layers.1.mlp.up") get one
            width, as configurations of transformers require. None does so for models that have a configuration. With
            False each layer gets its own width, which costs less accuracy, but then only ``lbyl.load`` can load the
            saved network.
        depth: whether whole residual blocks may be dropped as well (a budget of cost, not of quality). What they did is
            left to the layer before them. Of depth alone, width alone and both together, the one is kept that
            changes the outputs on held-out probes least. With ``experts`` as well, so is what experts save.
        experts: whether whole experts of mixtures are dropped (a budget of params or size_mb), and only then, if they
            can't save enough, channels. Each token still gets as many experts. Those that stay take over in closed
            form. ``min_keep``, ``max_ratio`` and ``exclude`` apply to them; all mixtures keep the same share unless
            ``uniform_layers=False``.
        head_dim: whether the heads of attention get fewer channels inside, and nothing else is cut (a budget of macs,
            params or size_mb): all heads of a network the same number. For attention with plain products of queries and
            keys, as in the vision transformers of timm and of transformers.
        runtime: how a latency is measured: "torch", or "onnxruntime", in which many networks are deployed, and in which
            odd widths cost more time (``round_to=8`` avoids them).
        best_effort: with ``agreement`` or ``accuracy_drop``, return the tried network that loses least, with a note, if
            none keeps enough. Otherwise this is an error.
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
    runtime: str = TORCH
    depth: bool = False
    experts: bool = False
    head_dim: bool = False
    best_effort: bool = False

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
        check_switch("Budget(best_effort={})", self.best_effort)
        if self.best_effort and name not in _QUALITIES:
            raise InputError(f"Budget(best_effort=True) is for agreement or accuracy_drop; {name} is a cost")
        if self.minimize not in _SHARES:
            raise InputError(f"Budget(minimize={self.minimize!r}): choose 'macs', 'params' or 'latency'")
        if self.minimize != "macs" and name not in _QUALITIES:
            raise InputError(f"Budget(minimize={self.minimize!r}): {name} is limited, so leave out minimize")
        if self.runtime not in RUNTIMES:
            raise InputError(f"Budget(runtime={self.runtime!r}): choose 'torch' or 'onnxruntime'")
        if self.runtime != TORCH and "latency" not in (name, self.minimize):
            raise InputError(f"Budget(runtime={self.runtime!r}) is for a latency; {name} is measured in none")
        if self.round_to not in ("auto", None):
            check_number('Budget(round_to={}) is not "auto"', self.round_to, whole=True, least=1)
        check_number("Budget(min_keep={})", self.min_keep, whole=True, least=1)
        check_number("Budget(max_ratio={}), the largest ratio", self.max_ratio, least=0, below=1)
        self._check_whole(name)
        check_switch("Budget(uniform_layers={})", self.uniform_layers, optional=True)
        exclude = self.exclude
        if isinstance(exclude, str) or not isinstance(exclude, Iterable):
            raise InputError(f"Budget(exclude={exclude!r}): must be a sequence of globs, such as ['layer4.*']")
        object.__setattr__(self, "exclude", tuple(exclude))
        if not all(isinstance(pattern, str) for pattern in self.exclude):
            raise InputError(f"Budget(exclude={exclude!r}): globs are texts, such as 'layer4.*'")

    def _check_whole(self, name: str) -> None:
        """Raise InputError for settings about blocks, experts and heads that do not go together."""
        for switch in BEYOND_WIDTH:
            check_switch(f"Budget({switch}={{}})", getattr(self, switch))
        if self.depth and name in _QUALITIES:
            raise InputError(f"Budget(depth=True) needs macs, params, size_mb or latency, and not {name}")
        if self.head_dim and name not in ("macs", "params", "size_mb"):
            raise InputError(f"Budget(head_dim=True) needs macs, params or size_mb, and not {name}")
        if self.experts and name not in ("params", "size_mb"):
            why = "each token gets as many experts as before" if name in ("macs", "latency") else "it limits no size"
            raise InputError(f"Budget(experts=True) needs params or size_mb, and not {name}: {why}")
        both = [switch for switch in BEYOND_WIDTH if getattr(self, switch)]
        if self.head_dim and len(both) > 1:
            raise InputError(
                f"Budget: give head_dim or {' and '.join(both[:-1])}, but not both, and compress the result once more"
            )

    @property
    def beyond_width(self) -> str | None:
        """The first of `BEYOND_WIDTH` that is given."""
        return next((switch for switch in BEYOND_WIDTH if getattr(self, switch)), None)

    @property
    def limited(self) -> tuple[str, float]:
        """The name and the amount of what is limited."""
        names = (*_UNITS, *_QUALITIES)
        return next((name, getattr(self, name)) for name in names if getattr(self, name) is not None)

    @property
    def of_quality(self) -> bool:
        """Whether it limits a loss of quality, and not a cost."""
        return self.limited[0] in _QUALITIES

    @property
    def is_timed(self) -> bool:
        """Whether networks are timed for it, which must be done on one machine that does nothing else."""
        return "latency" in (self.limited[0], self.minimize)

    def costing(self, share: float) -> Budget:
        """The budget that limits the cost to minimize to a share, in place of the quality."""
        limits: dict[str, float | None] = {name: None for name in _QUALITIES}
        return replace(self, **limits, **{self.minimize: share}, minimize="macs", best_effort=False)  # pyright: ignore[reportArgumentType]

    @property
    def unit(self) -> str:
        """The unit of costs."""
        return _UNITS[self.limited[0]]

    def on(self, device: torch.device) -> Budget:
        """The budget with a number for a device in place of "auto"."""
        return replace(self, round_to=_suitable(device)) if self.round_to == "auto" else self

    def multiple(self, width: int) -> int:
        """What the kept channels of a group of this width are a multiple of; once "auto" is a number."""
        if self.round_to is not None:
            return int(self.round_to)
        return next((multiple for multiple in (128, 64, 32, 16, 8, 4, 2) if multiple * _FEWEST_STEPS <= width), 1)

    def unmatched(self, names: Iterable[str]) -> tuple[str, ...]:
        """A note for each pattern of ``exclude`` that matches none of these names of groups and layers."""
        names = list(names)
        alone = [pattern for pattern in self.exclude if not any(fnmatchcase(name, pattern) for name in names)]
        return tuple(
            f"exclude: {pattern!r} matches no group or layer; lbyl.inspect lists their names" for pattern in alone
        )

    def excludes(self, group: Group) -> bool:
        """Whether a pattern matches the group or one of its layers."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (group.name, *group.layers))


def _suitable(device: torch.device) -> int:
    """The number of channels that kernels process together: a vector of floats, or a tile of a tensor core."""
    if device.type != "cpu":
        return 8
    capability = torch.backends.cpu.get_cpu_capability()
    return 16 if capability.startswith("AVX512") else 8 if capability in ("AVX2", "SVE256") else 4
