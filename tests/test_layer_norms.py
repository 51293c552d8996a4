"""Layer norms take their statistics over the channels that stay: cut, check, restoration, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import digits_example, images, settle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lbyl
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.layer_norms import masked_layer_norm
from lbyl.runtime.output_error import outputs_error
from lbyl.selection.criteria.base import resolve_criterion
from lbyl.selection.select import ByCriterion, Choice, Selection, kept_by_ratio, select
from lbyl.surgery.cuts import cut_copy, plan_cuts
from lbyl.surgery.masking import norm_masks
from lbyl.surgery.verification import difference, verify


def norm(width: int, **settings: Any) -> nn.LayerNorm:
    """With weights and biases that tell channels apart, and an eps that is seen."""
    made = nn.LayerNorm(width, eps=0.1, **settings)
    for parameter in made.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return made


class Mlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Before(nn.Module):
    """A residual stream with a norm before each layer. Input 5 x 7."""

    def __init__(self, width: int = 12, **settings: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList([norm(width, **settings) for _ in range(3)])
        self.layers = nn.ModuleList([Mlp(width), Mlp(width)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for before, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(before(x))
        return self.head(self.norms[-1](x))


class Behind(Before):
    """A norm behind each sum, as BERT has it; the first one is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x))
        x = self.norms[1](x + self.layers[0](x))
        return self.head(self.norms[0](self.norms[2](x + self.layers[1](x))))


class Images(nn.Module):
    """Channels last for the norm only, then four pixels in one by concatenation (Swin) and by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.first, self.second, self.third = norm(8), norm(32), norm(8)
        self.mlp, self.merge = Mlp(8), nn.Linear(32, 8)
        self.grouped, self.head = nn.Conv2d(8, 6, 2, groups=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.mlp(self.first(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = self.third(self.merge(self.second(torch.cat(corners, -1)))).permute(0, 3, 1, 2)
        return self.head(self.grouped(x).mean((2, 3)))


class Functional(nn.Module):
    """Two groups of channels side by side under one norm, which is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.weight, self.bias = 12, nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.rand(12))
        self.left, self.right, self.head = nn.Linear(7, 8), nn.Linear(7, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x).relu()], -1)
        return self.head(F.layer_norm(y, (self.dim,), self.weight, self.bias, 0.1))


class Torch(Functional):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x).relu()], -1)
        return self.head(torch.layer_norm(y, [self.dim], self.weight, self.bias, 0.1))


class Pooling(nn.Module):
    """A stream of images under group norms of one group, as in PoolFormer; `torch.group_norm` at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        self.norms = nn.ModuleList([nn.GroupNorm(1, 8, eps=0.1) for _ in range(3)])
        for parameter in self.norms.parameters():
            nn.init.uniform_(parameter, 0.5, 2)
        self.grow, self.shrink = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.avg_pool2d(self.norms[0](x), 3, 1, 1)
        x = x + self.shrink(self.grow(self.norms[1](x)).relu())
        last = self.norms[2]
        return self.head(torch.group_norm(x, 1, last.weight, last.bias, 0.1).mean((2, 3)))


TOKENS, PIXELS = (2, 5, 7), (2, 3, 16, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "before": (Before, TOKENS),
    "no bias": (lambda: Before(bias=False), TOKENS),
    "behind": (Behind, TOKENS),
    "images": (Images, PIXELS),
    "functional": (Functional, TOKENS),
    "torch": (Torch, TOKENS),
    "one group": (Pooling, PIXELS),
    "no sum": (lambda: nn.Sequential(nn.Linear(7, 12), norm(12), nn.Linear(12, 3)), TOKENS),
}
named = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    return settle(build()), images(*shape)


class ByHand(TorchFunctionMode):
    """Layer norms written a second time: those that stay are taken out, normalized and put back among zeros."""

    def __init__(self, model: nn.Module, keep: dict[str, Sequence[int]]) -> None:
        super().__init__()
        self.keep = {id(tensor): keep[name] for name, tensor in tensors_of(model).items() if name in keep}
        self.met = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        grouped = func in (F.group_norm, torch.group_norm)
        if (not grouped and func not in (F.layer_norm, torch.layer_norm)) or id(weight) not in self.keep:
            return func(*args, **kwargs)
        self.met += 1
        x, keep = args[0], list(self.keep[id(weight)])
        bias, eps = (args[i] if len(args) > i else kwargs.get(key) for i, key in ((3, "bias"), (4, "eps")))
        if grouped:
            part = F.group_norm(x[:, keep], 1, weight[keep], bias[keep], eps)
            return torch.zeros_like(x).index_copy(1, torch.tensor(keep), part)
        part = F.layer_norm(x[..., keep], (len(keep),), weight[keep], None if bias is None else bias[keep], eps)
        return torch.zeros_like(x).index_copy(-1, torch.tensor(keep), part)


def masked(model: nn.Module, result: lbyl.Result, x: Tensor) -> tuple[Tensor, int]:
    """What the masked network computes in float64, and the norms that it met."""
    twin = copy.deepcopy(model).double()
    keep = {(c.parameter, c.dim): c for c in result.plan.cuts}
    state, small = tensors_of(twin), tensors_of(result.model)
    with torch.no_grad():
        for consumer in lbyl.inspect(model, x).graph.consumers:
            cut = keep.get((consumer.weight, consumer.dim))
            if cut is None:
                continue
            rows = keep.get((consumer.weight, 0))
            kept_rows = list(rows.keep) if rows else list(range(len(state[consumer.weight])))
            per_block, rows_per_block = state[consumer.weight].shape[1], len(state[consumer.weight]) // consumer.blocks
            state[consumer.weight].zero_()
            for place, row in enumerate(kept_rows):
                block = row // rows_per_block
                columns = [c - block * per_block for c in cut.keep if c // per_block == block]
                state[consumer.weight][row, columns] = small[consumer.weight][place].double()
        norms = {c.parameter: c.keep for c in result.plan.cuts if c.dim == 0}
        with ByHand(twin, norms) as mode:
            return twin(x.double()), mode.met


@named
def test_the_cut_network_is_the_one_with_statistics_over_what_stays(name: str) -> None:
    model, x = network(name)
    result = lbyl.compress(model, x, ratio=0.25, scope="all", restore="prune", strict=True, forecast=False)
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    expected, met = masked(model, result, x)
    assert met > 0
    with torch.no_grad():
        found = copy.deepcopy(result.model).double()(x.double())
    assert difference([expected], [found]) < 1e-9
    with torch.no_grad():  # and not the one that only has zeros there, or this would not tell them apart
        assert difference([model.double()(x.double())], [found]) > 1e-2
    for module in result.model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == tuple(module.weight.shape)
        if isinstance(module, nn.GroupNorm):
            assert (module.num_groups, module.num_channels) == (1, len(module.weight))


def test_statistics_are_those_of_a_narrower_norm() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 6) + 100, torch.rand(6), torch.rand(6)
    kept = torch.tensor([True, False, True, True, False, True])
    y = masked_layer_norm(x, kept, weight, bias, 0.1)
    torch.testing.assert_close(y[:, kept], F.layer_norm(x[:, kept], (4,), weight[kept], bias[kept], 0.1))
    assert bool((y[:, ~kept] == 0).all())


def cut_by_hand() -> tuple[nn.Module, nn.Module, ExampleInputs, Selection]:
    """A masked network, its cut, and what was cut."""
    model, x = network("before")
    groups = [group for group in lbyl.inspect(model, x).graph.groups if group.prunable]
    selection = Selection(tuple(Choice(group, tuple(range(0, group.width, 2))) for group in groups), ())
    work = copy.deepcopy(model)
    with torch.no_grad():
        for choice in selection.choices:
            for slot in choice.group.consumers:
                weight = work.get_parameter(slot.parameter)
                weight[:, list(choice.drop)] = 0
    return work, cut_copy(work, plan_cuts(selection)), ExampleInputs.of(x), selection


def wrong_eps(model: nn.Module) -> None:
    model.norms[1].eps = 0.2  # pyright: ignore


def wrong_channels(model: nn.Module) -> None:
    weight = model.get_parameter("norms.1.weight").data
    weight.copy_(weight.flip(0))


def wrong_bias(model: nn.Module) -> None:
    model.get_parameter("norms.2.bias").data += 0.01


@pytest.mark.parametrize("spoil", [wrong_eps, wrong_channels, wrong_bias])
def test_a_norm_that_is_cut_wrongly_is_noticed(spoil: Callable[[nn.Module], None]) -> None:
    masked, smaller, inputs, selection = cut_by_hand()
    assert verify(masked, smaller, inputs, selection).difference < 1e-9
    spoil(smaller)
    with pytest.raises(lbyl.VerificationError, match="differ by"):
        verify(masked, smaller, inputs, selection)


class OverZeros(nn.Module):
    """A norm that takes its statistics over zeros in place of the dropped channels, too."""

    def __init__(self, norm: nn.LayerNorm, width: int) -> None:
        super().__init__()
        self.norm, self.width = norm, width

    def forward(self, x: Tensor) -> Tensor:
        kept, norm = x.shape[-1], self.norm
        whole = F.layer_norm(F.pad(x, (0, self.width - kept)), (self.width,), eps=norm.eps)
        return whole[..., :kept] * norm.weight + norm.bias


def test_verification_does_not_take_zeros_for_what_stays() -> None:
    """Neither in the masked network, which is right as it is, nor in one that was cut wrongly."""
    masked, smaller, inputs, selection = cut_by_hand()
    with torch.no_grad():
        over_zeros, expected = (
            copy.deepcopy(net).double()(*inputs.to(torch.device("cpu"), torch.float64).args)
            for net in (masked, smaller)
        )
    assert difference([expected], [over_zeros]) > 1e-3
    assert verify(masked, smaller, inputs, selection).difference < 1e-9
    for number, norm in enumerate(smaller.norms):  # pyright: ignore
        smaller.norms[number] = OverZeros(norm, masked.norms[number].normalized_shape[0])  # pyright: ignore
    with pytest.raises(lbyl.VerificationError, match="differ by"):
        verify(masked, smaller, inputs, selection)


class Insisting(Functional):
    """The second of the two groups under the norm can't be cut."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x).relu().reshape(-1, 5, 4)], -1)
        return self.head(F.layer_norm(y, (self.dim,), self.weight, self.bias, 0.1))


@pytest.mark.parametrize("restore", ["prune", lbyl.LeastSquares(moments=lbyl.Noise(images=8))])
def test_a_norm_over_a_group_that_can_and_one_that_cannot_be_cut(restore: Any) -> None:
    torch.manual_seed(0)
    model, x = settle(Insisting()), images(*TOKENS)
    result = lbyl.compress(model, x, ratio=0.25, scope="all", restore=restore, forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("left", 6)]
    assert [why[:21] for name, why in result.report.left if name == "right"] == ["found by verification"]
    assert result.model.get_parameter("weight").shape == (10,)
    assert result.report.verified is not None
    assert result.report.verified < 1e-9


@named
def test_the_inner_scope_leaves_such_groups_whole(name: str) -> None:
    model, x = network(name)
    graph = lbyl.inspect(model, x).graph
    outside = {group.name for group in graph.groups if group.layer_norms}
    assert outside
    selection = select(
        graph, tensors_of(model), kept_by_ratio(graph, 0.5), "inner", ByCriterion(resolve_criterion("l2")), 0
    )
    left = dict(selection.left)
    assert outside <= left.keys()
    assert all('scope="all" includes it' in left[group] for group in outside)
    assert not any(choice.group.layer_norms for choice in selection.choices)


def test_inspect_says_which_scope_a_norm_asks_for() -> None:
    model, x = network("no sum")
    row = lbyl.inspect(model, x).to_dict()["groups"][0]
    assert (row["prunable"], row["coupled"]) == (True, False)
    assert row["outside"] == "layer_norm '1' takes statistics over it"


class Sliced(nn.Module):
    """A norm over a part of the channels, of which one at least stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head, self.sizes = nn.Linear(7, 8), norm(3), nn.Linear(8, 3), [3, 5]

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).split(self.sizes, -1)
        return self.head(torch.cat([self.norm(left), right], -1))


class Computed(Functional):
    """A norm whose weight is no parameter but made of one."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x).relu()], -1)
        return self.head(F.layer_norm(y, (12,), 1 + self.weight, self.bias))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(7, 12), nn.LayerNorm(12, elementwise_affine=False), nn.Linear(12, 3)), TOKENS),
        (nn.Sequential(nn.Linear(7, 12), nn.LayerNorm((5, 12)), nn.Linear(12, 3)), TOKENS),
        (nn.Sequential(nn.Linear(7, 12), nn.Flatten(), nn.LayerNorm(60), nn.Linear(60, 3)), TOKENS),
        (Sliced(), TOKENS),
        (Computed(), TOKENS),
    ],
    ids=["no weight", "two axes", "flattened", "a part", "computed weight"],
)
def test_other_layer_norms_are_refused_by_name(model: nn.Module, shape: tuple[int, ...]) -> None:
    group = lbyl.inspect(settle(model), images(*shape)).graph.groups[0]
    if group.prunable:  # whole channels can go where tokens and channels are flattened, and those of a part
        result = lbyl.compress(
            model, images(*shape), ratio=0.25, scope="all", restore="prune", strict=True, forecast=False
        )
        assert result.report.verified is not None
        assert result.report.verified < 1e-9
    else:
        assert "takes statistics over" in str(group.reason)


class Encoder(nn.Module):
    """torch's own attention, whose heads are as wide together as what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, 12), nn.Linear(12, 3)
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)))


def test_the_stream_of_torchs_attention_is_solved_for_in_its_projections_too() -> None:
    noise = lbyl.LeastSquares(lbyl.Noise(images=64))
    result = lbyl.compress(
        settle(Encoder()), images(*TOKENS), scope="all", restore=noise, strict=True, ratio=0.5, forecast=False
    )
    assert [(row.group, row.after) for row in result.report.rows] == [
        ("stem", 6),
        ("layer.self_attn", 1),
        ("layer.linear1", 8),
    ]
    for row in result.report.rows:
        assert not row.note
        assert row.errors
        assert row.errors[1] < row.errors[0]


# -- restoration ---------------------------------------------------------------------------------------


class Kernel(nn.Module):
    """A norm with channels last before a convolution; in two blocks perhaps. Input 3 x 6 x 6."""

    def __init__(self, groups: int, kernel: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), norm(8)
        self.head = nn.Conv2d(8, 4, kernel, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (NETWORKS["no sum"][0], (64, 5, 7)),
        (lambda: Kernel(1, 1), (64, 3, 6, 6)),
        (lambda: Kernel(1, 2), (64, 3, 6, 6)),
        (lambda: Kernel(2, 2), (64, 3, 6, 6)),
    ],
    ids=["linear", "1x1", "2x2", "grouped"],
)
def test_readers_are_solved_on_what_the_cut_norm_feeds_them(build: Callable[[], nn.Module], shape: Any) -> None:
    """The error that a solve reports is the one that the cut network has: the statistics are in it."""
    torch.manual_seed(0)
    model, x = settle(build()), images(*shape)
    settings = lbyl.LeastSquares(moments=lbyl.Data([x]), ridge=1e-3, prior=0, positions=10**6)
    result = lbyl.compress(model, x[:1], ratio=0.25, scope="all", restore=settings, strict=True, forecast=False)
    row = result.report.rows[0]
    assert row.errors is not None
    # Data keeps a part of the batch for the assessment.
    errors = []
    for part in lbyl.Data([x]).probes(model, ExampleInputs.of(x[:1]), torch.Generator(), None).batches:
        with torch.no_grad():
            before, after = (net.double()(part.args[0].double()) for net in (model, result.model))
        channels = 1 if before.dim() == 4 else -1
        spread = before - before.mean([d for d in range(before.dim()) if d != channels % before.dim()], keepdim=True)
        errors.append(float((after - before).square().sum().sqrt() / spread.square().sum().sqrt()))
    assert row.errors[1] == pytest.approx(sum(errors) / len(errors), rel=0.02)
    assert row.errors[1] < row.errors[0]


class Block(nn.Module):
    """As ConvNeXt has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Head(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mean((2, 3)))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    """A small ConvNeXt, trained on digits for a second or two."""
    source = digits_example()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 24, 2, 2), Block(24), Block(24), Head(nn.LayerNorm(24), nn.Linear(24, 10)))
    x, y = source.data(train=True)
    steps = 120
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        chosen = torch.randperm(len(x))[:100]
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), source


def test_restoration_on_a_trained_network(trained: tuple[nn.Module, Any]) -> None:
    model, source = trained
    x, _ = source.data(train=True)
    assert source.accuracy(model) > 90
    settings = lbyl.LeastSquares(moments=lbyl.Data([x[:256]]))
    pruned, fitted = (
        lbyl.compress(model, x[:1], ratio=0.25, scope="all", restore=restore, forecast=False)
        for restore in ("prune", settings)
    )
    assert any(row.group == "0" for row in fitted.report.rows)
    assert fitted.report.assessment is not None
    assert fitted.report.assessment.restored < 0.8 * fitted.report.assessment.pruned
    assert source.accuracy(fitted.model) > source.accuracy(pruned.model) + 5


def test_the_assessment_is_of_the_network_that_comes_out(trained: tuple[nn.Module, Any]) -> None:
    """What is called the error of plain pruning and of restoration is that of the cut networks."""
    model, source = trained
    x, _ = source.data(train=True)
    settings = lbyl.LeastSquares(moments=lbyl.Data([x[:64], x[64:128]]))
    result = lbyl.compress(model, x[:1], ratio=0.25, scope="all", restore=settings, criterion="l2", forecast=False)
    pruned = lbyl.compress(model, x[:1], ratio=0.25, scope="all", restore="prune", criterion="l2", forecast=False)
    probes = lbyl.Data([x[:64], x[64:128]]).probes(model, ExampleInputs.of(x[:1]), torch.Generator(), None)
    with torch.no_grad():
        expected = probes.held_out.call(model)
        errors = [outputs_error(expected, probes.held_out.call(net)) for net in (pruned.model, result.model)]
    found = result.report.assessment
    assert found is not None
    assert [found.pruned, found.restored] == pytest.approx(errors, rel=1e-3)


# -- what comes after ----------------------------------------------------------------------------------


def test_it_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    model, x = network("images")
    result = lbyl.compress(model, x, ratio=0.25, scope="all", restore="prune", strict=True, forecast=False)
    result.save(tmp_path / "out")
    loaded = lbyl.load(tmp_path / "out", network("images")[0])
    assert torch.equal(loaded(x), result.model(x))
    assert lbyl.export(tmp_path / "out", network("images")[0]).relative < 1e-4


@pytest.mark.parametrize("restore", ["prune", lbyl.LeastSquares(moments=lbyl.Noise(images=32))])
def test_a_budget_takes_from_the_stream(restore: Any) -> None:
    model, x = settle(Before(32)), images(*TOKENS)
    result = lbyl.compress(model, x, budget=lbyl.Budget(params=0.5), scope="all", restore=restore, forecast=False)
    before, after = result.report.parameters
    assert after / before == pytest.approx(0.5, abs=0.02)
    assert any(row.group == "stem" for row in result.report.rows)


def test_masks_of_norms_follow_the_selection() -> None:
    model, x = network("functional")
    graph = lbyl.inspect(model, x).graph
    left, right = graph.group("left"), graph.group("right")
    both = norm_masks(Selection((Choice(left, (0, 1, 2, 3, 4, 5, 6)), Choice(right, (1, 2, 3))), ()))
    assert both["weight"].tolist() == [True] * 7 + [False, False] + [True] * 3
    assert norm_masks(Selection((), ())) == {}


def test_a_sweep_makes_what_compress_makes(tmp_path: Path) -> None:
    model, x = settle(Before(32)), images(*TOKENS)
    settings = lbyl.LeastSquares(moments=lbyl.Noise(images=32))
    budgets = [lbyl.Budget(params=0.6), lbyl.Budget(params=0.5)]
    swept = lbyl.sweep(model, x, budgets, tmp_path / "out", scope="all", restore=settings)
    for budget, point in zip(budgets, swept.points, strict=True):
        alone = lbyl.compress(model, x, budget=budget, scope="all", restore=settings, forecast=False)
        assert torch.equal(lbyl.load(tmp_path / "out" / point.name, model)(x), alone.model(x))
    assert any(row.group == "stem" for row in alone.report.rows)  # pyright: ignore[reportPossiblyUnboundVariable]


class Dividing(nn.Module):
    """Attention that divides the width of what it reads by the number of heads, as Swin has it.

    As in the second version of Swin, a layer may make what is added to each head's scores.
    """

    def __init__(self, width: int, heads: int, biased: bool) -> None:
        super().__init__()
        self.num_heads, self.norm = heads, norm(width)
        self.bias = nn.Linear(2, heads, bias=False) if biased else None
        self.register_buffer("places", torch.randn(5, 5, 2))
        self.qkv, self.proj, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(count, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1)
        if self.bias is not None:
            scores = scores + self.bias(self.places).permute(2, 0, 1)
        mixed = scores.softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))
        return x + self.mlp(x)


class Stages(nn.Module):
    """Two streams: a quarter can be cut of the second with its heads; of the first, whose heads are three, it can't."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.stem, self.first, self.between = nn.Linear(7, 12), Dividing(12, 3, biased), nn.Linear(12, 24)
        self.second, self.grouped, self.head = Dividing(24, 4, biased), nn.Conv1d(24, 24, 1, groups=2), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.between(self.first(self.stem(x))))
        return self.head(self.grouped(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("biased", [False, True])
def test_a_stream_is_cut_with_the_heads_that_its_width_is_divided_into(biased: bool) -> None:
    runs: list[Tensor] = []
    model, x = settle(Stages(biased)), images(2, 5, 7)
    model.stem.register_forward_pre_hook(lambda module, args: runs.extend(args))
    report = lbyl.compress(model, x, ratio=0.25, scope="all", restore="prune", forecast=False).report
    widths = {row.group: (row.before, row.after) for row in report.rows}
    assert widths["between"] == (24, 18)
    assert widths["second.qkv"] == (4, 3)
    assert {"first.mlp.0", "second.mlp.0", "grouped"} <= widths.keys()
    left = dict(report.left)
    assert {"stem", "first.qkv"} <= left.keys()
    said = "'stem' and its 3 heads can't lose the same share at this ratio"
    assert (left["stem"], left["first.qkv"]) == (said, said)
    assert report.verified is not None
    assert report.verified < 1e-9
    computed = [x for x in runs if x.dtype is torch.float64 and not x.is_meta]
    assert 0 < len(computed) < 10  # shapes find them, and few networks are compared: without them it takes 36 runs


class Modulated(nn.Module):
    """A stream under a norm without a weight, as in diffusion transformers: shift and scale are computed."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.condition, self.norm = nn.Linear(6, 12), nn.Linear(6, 24), norm
        self.inner, self.last = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = self.condition(x).chunk(2, -1)
        x = self.first(x)
        return self.last(x + self.inner(self.norm(x) * (1 + scale) + shift).tanh())


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(12, elementwise_affine=False),
        nn.RMSNorm(12, elementwise_affine=False),
    ],
    ids=["layer norm", "RMS norm"],
)
def test_norms_without_a_weight_are_taken_over_the_kept(norm: Any) -> None:
    net, x = Modulated(norm).eval(), torch.randn(2, 5, 6)
    result = lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", strict=True, forecast=False)
    assert result.model.first.out_features == result.model.last.in_features == 6
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    kept = list(next(group.keep for group in result.plan.groups if group.name == "condition"))
    with torch.no_grad():
        stream, (shift, scale) = net.first(x)[..., kept], net.condition(x).chunk(2, -1)
        normed = F.rms_norm(stream, (6,)) if isinstance(norm, nn.RMSNorm) else F.layer_norm(stream, (6,), eps=1e-5)
        seen = normed * (1 + scale[..., kept]) + shift[..., kept]
        inner = torch.tanh(seen @ net.inner.weight[kept][:, kept].T + net.inner.bias[kept])
        expected = (stream + inner) @ net.last.weight[:, kept].T + net.last.bias
    torch.testing.assert_close(result.model(x), expected, rtol=1e-4, atol=1e-4)
    assert lbyl.inspect(net, x).graph.groups[0].excluded_from_inner is not None


WIDTH = 12
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "from the value": (lambda x: F.layer_norm(x, x.shape[-1:]), True),
    "spelled out": (lambda x: F.layer_norm(x, (12,)), False),
    "in a global": (lambda x: F.layer_norm(x, [WIDTH]), False),
}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_width_of_a_function_without_a_weight_must_follow(name: str, keeps: bool) -> None:
    function, follows = FUNCTIONS[name]
    net, x = Modulated(function).eval(), torch.randn(2, 5, 6)
    if keeps:
        net.width = 12
    group = lbyl.inspect(net, x).graph.groups[0]
    assert group.prunable == (keeps or follows)
    if follows:
        lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", strict=True, forecast=False)
    elif not keeps:
        assert "takes statistics over" in str(group.reason)
