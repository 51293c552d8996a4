"""What the experts of a mixture do on probes: their scores, and the tokens on which the kept ones are solved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.graph.mixtures import Mixture
from lbyl.runtime.attended import at_attended, attended_positions
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import give_back
from lbyl.runtime.routed import Routed, one_expert
from lbyl.selection.experts import routed_norms


def expert_scores(
    model: nn.Module, mixtures: Sequence[Mixture], batches: Sequence[ExampleInputs]
) -> dict[str, Float[Tensor, " experts"]]:
    """The mean norm of each expert's output, times the router's weight, over the tokens that it gets on the probes.

    Args:
        model: the network; it is not changed.
        mixtures: the mixtures whose experts are scored.
        batches: the probes.

    Returns:
        The scores in float64, by the path of the experts; see `lbyl.selection.experts.routed_norms`.
    """
    sums = {each.experts: torch.zeros(2, each.count, dtype=torch.float64) for each in mixtures}
    for batch in batches:
        for path, routed, _ in _calls(model, list(sums), batch):
            module = model.get_submodule(path)
            for expert in range(sums[path].shape[1]):
                tokens, factors = routed.of_expert(expert)
                if len(tokens):
                    made = one_expert(module, routed, expert, routed.states[tokens]).output
                    norms = made.double().norm(dim=1) * factors.double().abs()
                    sums[path][:, expert] += torch.tensor([float(norms.sum()), len(tokens)]).double()
        give_back()
    return {path: routed_norms(total, tokens) for path, (total, tokens) in sums.items()}


@dataclass(frozen=True)
class Tokens:
    """The tokens that reach a mixture of a smaller network, and what the original's mixture gives there.

    Attributes:
        routed: the calls of the smaller network's experts.
        wanted: the outputs of the original's experts at the same positions.
    """

    routed: Routed
    wanted: Float[Tensor, "tokens channels"]


def tokens_of(
    original: nn.Module,
    current: nn.Module,
    path: str,
    batches: Sequence[ExampleInputs],
    most: int,
    generator: torch.Generator,
) -> Tokens:
    """Run both networks up to one mixture, and keep what goes in and what should come out.

    Args:
        original: the network with all experts; it is not changed.
        current: the network with fewer of them, in which earlier mixtures are restored already.
        path: path of the experts.
        batches: the probes.
        most: largest number of tokens to keep.
        generator: draws the tokens if there are more.
    """
    calls: list[Routed] = []
    wanted: list[Tensor] = []
    share = -(-most // len(batches))
    for batch in batches:
        (_, routed, _), *_ = _calls(current, [path], batch, stop=True)
        (_, _, made), *_ = _calls(original, [path], batch, stop=True)
        if len(routed.states) > share:
            rows = torch.randperm(len(routed.states), generator=generator)[:share].to(made.device)
            routed, made = routed.at(rows), made[rows]
        calls.append(routed)
        wanted.append(made)
        give_back()
    parts = zip(*[(each.states, each.chosen, each.weights) for each in calls], strict=True)
    states, chosen, weights = (torch.cat(each) for each in parts)
    return Tokens(Routed(states, chosen, weights, calls[0].order), torch.cat(wanted))


class _Enough(Exception):
    """Raised to end a forward pass early."""


def _calls(
    model: nn.Module, paths: Sequence[str], batch: ExampleInputs, stop: bool = False
) -> Iterator[tuple[str, Routed, Float[Tensor, "tokens channels"]]]:
    """The calls of these experts during one run, with their outputs, at the positions that count."""
    found: list[tuple[str, Routed, Tensor]] = []
    attended = attended_positions(model, batch)

    def watch(path: str) -> Any:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            routed = Routed.of(module, args, kwargs)
            assert routed is not None
            parts = (at_attended(attended, each.detach()) for each in (routed.states, routed.chosen, routed.weights))
            states, chosen, weights = (each.clone() for each in parts)
            found.append((path, Routed(states, chosen, weights, routed.order), at_attended(attended, output).clone()))
            if stop:
                raise _Enough

        return leave

    with undisturbed(model), torch.no_grad():
        hooks = [model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in paths]
        try:
            batch.cloned().call(model)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        yield from found
