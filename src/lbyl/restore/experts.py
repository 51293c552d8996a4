"""Restores mixtures that lost experts: the last products of the others are solved for what the original gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lbyl.graph.mixtures import Mixture
from lbyl.moments.mixtures import Tokens, tokens_of
from lbyl.restore.depth.effect import Effect
from lbyl.restore.ridge import solve_ridge
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress, counted
from lbyl.runtime.routed import Routed, one_expert
from lbyl.runtime.seeding import generator_for

RIDGES = (0.03, 0.1, 0.3)
"""Relative ridges to try where the user names none; held-out probes choose."""
_ROUNDS = 2
"""So many times the experts of a mixture are solved in turn."""
_SAME = 1e-3
"""Largest relative difference between what experts give and the sum of what each gives; 100 times more in half
precision."""


def weight_change(
    z: Float[Tensor, "tokens neurons"], missing: Float[Tensor, "tokens channels"], ridge: float
) -> Float[Tensor, "neurons channels"]:
    """The B with the least ``|missing - z B|^2 + ridge sum_c |z_c|^2 |B_c|^2``, where c are the neurons.

    The ridge is in proportion to each neuron's power, so that it suits large and small ones. An infinite one gives 0.
    With fewer tokens than neurons, the equal system with a row for each token is solved.

    >>> weight_change(torch.tensor([[2.0]]), torch.tensor([[2.0]]), ridge=1.0)
    tensor([[0.5000]], dtype=torch.float64)
    """
    z, missing = z.double(), missing.double()
    power = z.square().sum(0)
    scale = power.clamp_min(1e-12 * power.max().clamp_min(1e-300)).sqrt()
    z = z / scale
    if len(z) < z.shape[1]:
        return z.T @ solve_ridge(z @ z.T, missing, ridge)[0] / scale[:, None]
    return solve_ridge(z.T @ z, z.T @ missing, ridge)[0] / scale[:, None]


@dataclass(frozen=True)
class Products:
    """The last products of a mixture's experts, ``g (D h + b)`` with the router's weight g.

    Attributes:
        weight: name of the stacked weight.
        bias: name of the stacked bias; "" if there is none.
        transposed: whether the weight is stored input first.
    """

    weight: str
    bias: str
    transposed: bool

    def matrix(self, module: nn.Module, expert: int) -> Float[Tensor, "neurons channels"]:
        """An expert's matrix in float64, with the bias as its last row if there is one."""
        weight = module.get_parameter(self.weight)[expert].detach().double()
        weight = weight if self.transposed else weight.T
        bias = [module.get_parameter(self.bias)[expert].detach().double()[None]] if self.bias else []
        return torch.cat([weight, *bias])

    def values(self, module: nn.Module, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        """The stacked tensors of these matrices, by name."""
        weight = module.get_parameter(self.weight)
        rows = weight.shape[1 if self.transposed else 2]
        parts = [matrix[:rows] if self.transposed else matrix[:rows].T for matrix in matrices]
        values = {self.weight: torch.stack([part.to(weight.dtype) for part in parts])}
        if self.bias:
            bias = module.get_parameter(self.bias)
            values[self.bias] = torch.stack([matrix[rows].to(bias.dtype) for matrix in matrices])
        return values

    def inputs(
        self, module: nn.Module, routed: Routed, expert: int
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows neurons"]]:
        """An expert's tokens, and what its matrix is multiplied with there, times the router's weights."""
        tokens, factors = routed.of_expert(expert)
        with undisturbed(module):
            hidden = one_expert(module, routed, expert, routed.states[tokens]).hidden
        assert hidden is not None
        z = hidden.double()
        z = torch.cat([z, torch.ones_like(z[:, :1])], 1) if self.bias else z
        return tokens, z * factors.double()[:, None]


def find_products(module: nn.Module, routed: Routed) -> Products | str:
    """Find the last products of a mixture's experts, or say why they can't be solved.

    That each expert ends with one, and that a mixture's output is the sum of the experts' outputs times the router's
    weights, is checked with these calls.
    """
    busiest = int(torch.bincount(routed.chosen.flatten()).argmax())
    tokens, _ = routed.of_expert(busiest)
    with undisturbed(module), torch.no_grad():
        alone = one_expert(module, routed, busiest, routed.states[tokens])
        whole = module.forward(*routed.arguments).double()
    if alone.hidden is None:
        return "its experts do not end in a product with a stacked weight"
    weight = module.get_parameter(alone.weight)[busiest].detach().double()
    hidden, made = alone.hidden.double(), alone.output.double()
    close = _SAME * (100 if alone.output.dtype in (torch.float16, torch.bfloat16) else 1)
    biases = [n for n, p in module.named_parameters(recurse=False) if p.shape[1:] == made.shape[1:]]
    for transposed in (False, True):
        if weight.shape != ((hidden.shape[1], made.shape[1]) if transposed else (made.shape[1], hidden.shape[1])):
            continue
        rest = made - hidden @ (weight if transposed else weight.T)
        for bias in ("", *biases):
            constant = module.get_parameter(bias)[busiest].detach().double() if bias else torch.zeros_like(rest[0])
            if float((rest - constant).norm()) <= close * float(made.norm()):
                found = Products(alone.weight, bias, transposed)
                gap = float((_sum(module, found, routed) - whole).norm())
                return found if gap <= close * float(whole.norm()) else "its output is no sum of its experts' outputs"
    return "its experts do not end in a product with a stacked weight"


def _sum(module: nn.Module, products: Products, routed: Routed) -> Float[Tensor, "tokens channels"]:
    """What the experts give together, in float64."""
    count = len(module.get_parameter(products.weight))
    matrices = [products.matrix(module, expert) for expert in range(count)]
    total = routed.states.new_zeros(len(routed.states), matrices[0].shape[1], dtype=torch.float64)
    for expert, matrix in enumerate(matrices):
        tokens, z = products.inputs(module, routed, expert)
        total.index_add_(0, tokens, z @ matrix)
    return total


def solve_experts(
    module: nn.Module, products: Products, tokens: Tokens, ridge: float
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """New last products of the experts, one after the other, each for what all others leave missing.

    The experts' matrices ``D_j`` together minimize, by rounds over the experts j,

        ``sum_x |f(x) - sum_j g_j(x) D_j h_j(x)|^2 + ridge sum_j sum_c |g_j h_jc|^2 |D_jc - D0_jc|^2``

    with f(x) the output of the original mixture, g_j the router's weight as tokens are routed now, h_j the hidden
    neurons of expert j, c one of them, and D0 the original matrix.

    Returns:
        The stacked weight and bias by name, and the relative error of the mixture's output on these tokens before and
        after.
    """
    routed, wanted = tokens.routed, tokens.wanted.double()
    first = [products.matrix(module, expert) for expert in range(len(module.get_parameter(products.weight)))]
    now = list(first)
    missing = wanted - _sum(module, products, routed)
    size = float(wanted.norm().clamp_min(1e-300))
    before = float(missing.norm()) / size
    for _ in range(_ROUNDS):
        for expert, original in enumerate(first):
            rows, z = products.inputs(module, routed, expert)
            if len(rows):
                target = missing[rows] + z @ (now[expert] - original)
                new = original + weight_change(z, target, ridge)
                missing.index_add_(0, rows, z @ (now[expert] - new))
                now[expert] = new
    return products.values(module, now), (before, float(missing.norm()) / size)


@dataclass(frozen=True)
class MixtureProblem:
    """What is needed to restore mixtures that lost experts.

    Attributes:
        original: the network with all experts; it is not changed.
        smaller: the network without some of them; it is not changed.
        mixtures: the mixtures in execution order.
        batches: the probes for solving.
        effect: the effect on held-out probes.
        ridges: the relative ridges to try.
        tokens: largest number of tokens for each mixture.
        seed: seed of the choice of tokens.
        progress: called as ``progress(stage, done, total)``.
    """

    original: nn.Module
    smaller: nn.Module
    mixtures: Sequence[Mixture]
    batches: Sequence[ExampleInputs]
    effect: Effect
    ridges: tuple[float, ...] = RIDGES
    tokens: int = 20_000
    seed: int = 0
    progress: Progress | None = None


@dataclass(frozen=True)
class RestoredMixture:
    """How one mixture was restored.

    Attributes:
        experts: path of the experts.
        values: new values of its stacked tensors; {} if it is left as it is.
        ridge: the relative ridge.
        errors: the relative error of the mixture's output on the tokens that were solved on, before and after.
        effect: the effect on held-out probes, with this mixture and all earlier ones restored.
        idle: how many kept experts got no token.
        why: why it was not restored; "" if it was.
    """

    experts: str
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    ridge: float = 0.0
    errors: tuple[float, float] | None = None
    effect: float = float("nan")
    idle: int = 0
    why: str = ""


@dataclass(frozen=True)
class RestoredMixtures:
    """The outcome for all mixtures.

    Attributes:
        mixtures: one entry for each.
        values: new values of the smaller network's parameters, by name.
        plain: the effect on held-out probes without restoration.
        restored: the effect with it, which is never larger.
    """

    mixtures: tuple[RestoredMixture, ...]
    values: Mapping[str, Tensor] = field(repr=False)
    plain: float
    restored: float


def restore_mixtures(problem: MixtureProblem) -> RestoredMixtures:
    """Restore the mixtures from input to output, each in the network in which the earlier ones are restored already.

    Each one takes the ridge that has the least effect on held-out probes, and stays as it is if that is less still.
    """
    values: dict[str, Tensor] = {}
    plain = now = problem.effect(problem.smaller)
    found: list[RestoredMixture] = []
    for mixture in counted(problem.mixtures, problem.progress, "restoring experts"):
        restored = _restored(problem, mixture, values, now)
        values |= restored.values
        now = restored.effect
        found.append(restored)
    return RestoredMixtures(tuple(found), values, plain, now)


def _restored(problem: MixtureProblem, mixture: Mixture, values: Mapping[str, Tensor], now: float) -> RestoredMixture:
    path = mixture.experts
    best = RestoredMixture(path, effect=now, why="restoration did not lower the error on held-out probes")
    if not problem.ridges:
        return replace(best, why="dropped plainly")
    current = sharing_copy(problem.smaller, values)
    generator = generator_for(problem.seed, f"{path}#tokens")
    tokens = tokens_of(problem.original, current, path, problem.batches, problem.tokens, generator)
    module = current.get_submodule(path)
    products = find_products(module, tokens.routed)
    if isinstance(products, str):
        return replace(best, why=products)
    count = len(module.get_parameter(products.weight))
    best = replace(best, idle=count - len(tokens.routed.chosen.unique()))
    for tried in _each_ridge(problem, path, module, products, tokens):
        effect = problem.effect(sharing_copy(problem.smaller, {**values, **tried.values}))
        if best.errors is None:
            best = replace(best, errors=(tried.errors[0],) * 2 if tried.errors else None)
        if effect < best.effect:
            best = replace(tried, effect=effect, idle=best.idle)
    return best


def _each_ridge(
    problem: MixtureProblem, path: str, module: nn.Module, products: Products, tokens: Tokens
) -> Iterator[RestoredMixture]:
    for ridge in problem.ridges:
        own, errors = solve_experts(module, products, tokens, ridge)
        yield RestoredMixture(path, {f"{path}.{name}": value for name, value in own.items()}, ridge, errors)
