"""Drops whole experts from mixtures, masks them in the whole network, and verifies what is left."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import VerificationError, first_line
from lbyl.graph.mixtures import Mixture
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy, tensors_of
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.intercept import FunctionInterceptor, module_hooks
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.cuts import Cut
from lbyl.surgery.verification import allowed_difference, difference

Kept = Mapping[str, tuple[int, ...]]
"""The experts that stay, in ascending order, by the path of the experts."""

_COUNTS = re.compile(r"^(num|n|moe_num)_(routed_|local_)?experts$")
"""Attributes that hold the number of a mixture's experts."""


def plan_experts(mixtures: Sequence[Mixture], kept: Kept) -> tuple[Cut, ...]:
    """The cuts that leave these experts: one for each tensor with a slice for each expert."""
    return tuple(
        Cut(name, dim, each.count, kept[each.experts], experts=True)
        for each in mixtures
        if len(kept[each.experts]) < each.count
        for name, dim in each.tensors
    )


def expert_attributes(model: nn.Module, mixtures: Sequence[Mixture], kept: Kept) -> tuple[Attribute, ...]:
    """The numbers of experts that modules hold: of each mixture, and of the modules around them where all agree."""
    holders: dict[str, int] = {}
    for each in mixtures:
        holders |= {path: len(kept[each.experts]) for path in (each.experts, each.router, each.block)}
    before, after = {each.count for each in mixtures}, {*holders.values()}
    if len(after) == 1:
        above = {
            "",
            *(each.block[:end] for each in mixtures for end in range(len(each.block)) if each.block[end] == "."),
        }
        holders |= {path: min(after) for path in sorted(above - holders.keys())}
    found = []
    for path, new in holders.items():
        for name, value in vars(model.get_submodule(path)).items():
            if _COUNTS.search(name) and type(value) is int and value in before and value != new:
                found.append(Attribute(path, name, None, value, new))
    return tuple(found)


class _Without(FunctionInterceptor):
    """Gives some experts scores that are never chosen, in what the linear layer of a router computes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[Tensor] = []
        self.count = 0

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if self.dropped and func is nn.functional.linear and out.shape[-1] == self.count:
            return out.index_fill(-1, self.dropped[-1].to(out.device), _never(out))
        return out


def _never(scores: Tensor) -> float:
    """A score that is never chosen, whose softmax is 0, and which leads to no NaN, as an infinite one may."""
    return torch.finfo(scores.dtype).min / 4


@contextmanager
def without_experts(model: nn.Module, mixtures: Sequence[Mixture], kept: Kept) -> Iterator[nn.Module]:
    """A copy of the whole network in which routers never choose experts that do not stay."""
    gone = {
        each.router: torch.tensor([e for e in range(each.count) if e not in kept[each.experts]]) for each in mixtures
    }
    counts = {each.router: each.count for each in mixtures}
    state, values = tensors_of(model), {}
    for each in mixtures:  # constants that are added to scores afterwards
        for name, dim in each.tensors:
            tensor = state[name].detach()
            if tensor.numel() == each.count and tensor.is_floating_point() and not name.startswith(f"{each.experts}."):
                values[name] = tensor.index_fill(dim, gone[each.router].to(tensor.device), _never(tensor))
    work, watch = sharing_copy(model, values), _Without()

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.dropped.append(gone[path])
        watch.count = counts[path]

    def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch.dropped.pop()

    routers = {path: work.get_submodule(path) for path in gone if len(gone[path])}
    with module_hooks(routers, enter, leave), watch:
        yield work


def verify_experts(
    whole: nn.Module, smaller: nn.Module, inputs: ExampleInputs, mixtures: Sequence[Mixture], kept: Kept
) -> float:
    """Compare a network without some experts with the whole network whose routers do not choose these.

    Args:
        whole: the network with all experts, before restoration; it is not changed.
        smaller: the network with fewer, before restoration.
        inputs: the example inputs.
        mixtures: the mixtures.
        kept: the experts that stay.

    Returns:
        The largest relative difference of an output.

    Raises:
        VerificationError: the smaller network does not run, or computes something else.
    """
    dropped = sum(each.count - len(kept[each.experts]) for each in mixtures)
    with undisturbed(whole), torch.no_grad(), without_experts(whole, mixtures, kept) as work, undisturbed(work):
        expected = output_tensors(inputs.cloned().call(work))
    with undisturbed(smaller), torch.no_grad():
        try:
            found = output_tensors(inputs.cloned().call(smaller))
        except Exception as error:
            raise VerificationError(
                f"without {dropped} experts the network does not run: {first_line(error)}; leave out experts"
            ) from error
    worst = difference(expected, found)
    if not worst <= allowed_difference(expected):
        raise VerificationError(
            f"without {dropped} experts the network computes something else than with routers that do not choose them "
            f"(relative difference {worst:.1e}); leave out experts"
        )
    return worst
