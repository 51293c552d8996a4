"""Drops whole blocks from the lists of a network, and verifies what is left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.errors import SurgeryError, VerificationError, first_line
from lbyl.graph.blocks import Block, child_path, first_float
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.surgery.verification import allowed_difference, difference


@dataclass(frozen=True)
class BlockCut:
    """The children that one list of the network keeps.

    Attributes:
        stack: path of the list; "" if it is the network itself.
        children: the names of all of its children.
        keep: the positions of those that stay. Children named by numbers are numbered anew.
    """

    stack: str
    children: tuple[str, ...]
    keep: tuple[int, ...]

    @property
    def numbered(self) -> bool:
        """Whether the children are named by their positions."""
        return self.children == tuple(map(str, range(len(self.children))))

    @property
    def rises(self) -> bool:
        """Whether the kept positions rise within the list, and there are some."""
        return bool(self.keep) and all(a < b for a, b in pairwise((-1, *self.keep, len(self.children))))

    @property
    def names(self) -> dict[str, str]:
        """The new name of each child that stays, by its old one."""
        kept = [self.children[index] for index in self.keep]
        return {old: str(new) if self.numbered else old for new, old in enumerate(kept)}

    @property
    def dropped(self) -> tuple[str, ...]:
        """The paths of the blocks that go."""
        return tuple(child_path(self.stack, name) for name in self.children if name not in self.names)


def plan_blocks(model: nn.Module, blocks: Iterable[Block]) -> tuple[BlockCut, ...]:
    """The cuts that drop these blocks: one for each list that loses some."""
    gone: dict[str, set[int]] = {}
    for block in blocks:
        gone.setdefault(block.stack, set()).add(block.index)
    cuts = []
    for stack, those in gone.items():
        children = tuple(name for name, _ in model.get_submodule(stack).named_children())
        cuts.append(BlockCut(stack, children, tuple(i for i in range(len(children)) if i not in those)))
    return tuple(cuts)


def renamed(name: str, cuts: Sequence[BlockCut]) -> str | None:
    """The name of a tensor or module after blocks were dropped; None if it is in a dropped block.

    >>> renamed("layers.3.weight", [BlockCut("layers", ("0", "1", "2", "3"), (0, 3))])
    'layers.1.weight'
    """
    stacks = {cut.stack: cut for cut in cuts}
    parts = name.split(".")
    changed = []
    for place, part in enumerate(parts):
        cut = stacks.get(".".join(parts[:place]))
        if cut is not None and part in cut.children:
            if part not in cut.names:
                return None
            part = cut.names[part]
        changed.append(part)
    return ".".join(changed)


def original_name(name: str, cuts: Sequence[BlockCut]) -> str:
    """The inverse of :func:`renamed`.

    >>> original_name("layers.1.weight", [BlockCut("layers", ("0", "1", "2", "3"), (0, 3))])
    'layers.3.weight'
    """
    stacks = {cut.stack: {new: old for old, new in cut.names.items()} for cut in cuts}
    found: list[str] = []
    for part in name.split("."):
        found.append(stacks.get(".".join(found), {}).get(part, part))
    return ".".join(found)


def composed(first: Sequence[BlockCut], then: Sequence[BlockCut]) -> tuple[BlockCut, ...]:
    """The cuts with the effect of ``first`` followed by ``then``, whose paths are those after ``first``."""
    found = {cut.stack: cut for cut in first}
    for cut in then:
        stack = original_name(cut.stack, first)
        before = found.get(stack)
        if before is not None:
            cut = BlockCut(stack, before.children, tuple(before.keep[index] for index in cut.keep))
        found[stack] = replace(cut, stack=stack)
    return tuple(found.values())


def without_blocks(model: nn.Module, cuts: Sequence[BlockCut]) -> nn.Module:
    """A copy of a model without the blocks that cuts drop, which shares the model's parameters.

    Lists keep their class. Numbers by which modules find their place in a cache (``layer_idx``) are renewed, and a
    configuration of transformers follows. The model is not changed.

    Raises:
        SurgeryError: the model lacks the lists or their children.
    """
    model = sharing_copy(model)
    modules = dict(model.named_modules())
    for cut in cuts:
        _check(cut, modules)
    for cut in cuts:
        stack: Any = modules[cut.stack]
        _follow(model, cut)
        kept = [(cut.names[cut.children[index]], stack._modules[cut.children[index]]) for index in cut.keep]
        for index in cut.keep:
            _renumber(stack._modules[cut.children[index]], index, cut.keep.index(index))
        stack._modules.clear()
        stack._modules.update(kept)
    return model


def _check(cut: BlockCut, modules: Mapping[str, nn.Module]) -> None:
    stack = modules.get(cut.stack)
    if not isinstance(stack, nn.ModuleList | nn.Sequential):
        raise SurgeryError(f"the model has no list {cut.stack!r} of blocks: another architecture?")
    found = tuple(name for name, _ in stack.named_children())
    if found != cut.children:
        raise SurgeryError(
            f"{cut.stack}: the plan drops blocks of {len(cut.children)}, the model has {len(found)}: another "
            "architecture, or blocks dropped already?"
        )
    if not cut.rises:
        raise SurgeryError(f"{cut.stack}: kept positions must rise within 0..{len(found) - 1}, and not be empty")


_PLACE = re.compile(r"layer_?(idx|id|index|num|number)$")


def _renumber(block: nn.Module, old: int, new: int) -> None:
    """Renew the number by which a block's modules know their place."""
    for module in block.modules():
        for name, value in vars(module).items():
            if type(value) is int and value == old and _PLACE.search(name):
                setattr(module, name, new)


def _follow(model: nn.Module, cut: BlockCut) -> None:
    """Let the configuration of the list's owner follow: the number of layers, and lists with an item for each."""
    parts, size = cut.stack.split("."), len(cut.children)
    for count in range(len(parts) - 1, -1, -1):
        config: Any = getattr(model.get_submodule(".".join(parts[:count])), "config", None)
        if config is None or getattr(config, "num_hidden_layers", None) != size:
            continue
        for name, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == size and "layer" in name:
                setattr(config, name, type(value)(value[index] for index in cut.keep))
        config.num_hidden_layers = len(cut.keep)
        _follow_stages(config, cut)
        return


def _follow_stages(config: Any, cut: BlockCut) -> None:
    """Let the configuration of a backbone follow, which names the stem and the output of each layer."""
    names, size = getattr(config, "stage_names", None), len(cut.children)
    if not isinstance(names, list) or len(names) != size + 1:
        return
    # An output after a dropped layer is that of the last layer before it that stays.
    after = [sum(index < stage for index in cut.keep) for stage in range(size + 1)]
    given = sorted({after[index % (size + 1)] for index in getattr(config, "out_indices", None) or [size]})
    config.stage_names = names[: len(cut.keep) + 1]
    config._out_indices, config._out_features = given, [names[place] for place in given]


@contextmanager
def skipped(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let blocks pass on their first tensor input, unchanged, in place of their first tensor output."""

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, made = first_float((args, kwargs)), first_float(output)
        return pytree.tree_map_only(Tensor, lambda tensor: x if tensor is made else tensor, output)

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(skip, with_kwargs=True))
        yield


def verify_blocks(whole: nn.Module, smaller: nn.Module, inputs: ExampleInputs, dropped: Iterable[str]) -> float:
    """Compare a network without blocks with the whole network in which these blocks are skipped.

    Args:
        whole: the network with all blocks and the restored weights; it is not changed.
        smaller: the network without the blocks.
        inputs: the example inputs.
        dropped: the paths of the blocks in the whole network.

    Returns:
        The largest relative difference of an output.

    Raises:
        VerificationError: the smaller network does not run, or computes something else.
    """
    work = sharing_copy(whole)
    with undisturbed(smaller), torch.no_grad(), skipped(work, dropped):
        expected = output_tensors(inputs.cloned().call(work))
        try:
            found = output_tensors(inputs.cloned().call(smaller))
        except Exception as error:
            raise VerificationError(
                f"without {_named(dropped)} the network does not run: {first_line(error)}"
            ) from error
    worst = 0.0
    for a, b in zip(expected, found, strict=False):
        if a.shape != b.shape:
            raise VerificationError(f"without {_named(dropped)} an output has another shape")
        worst = max(worst, difference([a], [b]))
    if worst > allowed_difference(expected) or len(expected) != len(found):
        raise VerificationError(
            f"without {_named(dropped)} the network computes something else than with these blocks skipped "
            f"(relative difference {worst:.1e})"
        )
    return worst


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
