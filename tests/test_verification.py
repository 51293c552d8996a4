"""The cut network computes what the masked one computes, and where it can't, the group is named."""

from __future__ import annotations

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from nets import HardCoded, compress, images, mlp, residual, settle
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_macs
from lbyl.selection.select import Choice, Selection
from lbyl.surgery.cuts import cut, plan_cuts
from lbyl.surgery.masking import masks_of
from lbyl.surgery.verification import TOLERANCE, difference, verify

RESTORERS = [lbyl.Prune(), lbyl.LBYL(bn=0.1), lbyl.LBYL(bn=0.0, center=True), lbyl.Merge(), lbyl.Coreset()]


class Stage(nn.Module):
    """conv-BN-ReLU in one of several kinds, perhaps added to its own input."""

    def __init__(self, inputs: int, outputs: int, kind: str, stride: int) -> None:
        super().__init__()
        if kind == "depthwise":
            first = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
            self.convs = nn.Sequential(first, nn.BatchNorm2d(inputs), nn.ReLU6(), nn.Conv2d(inputs, outputs, 1))
        elif kind == "pointwise-depthwise":
            last = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs)
            self.convs = nn.Sequential(nn.Conv2d(inputs, outputs, 1), last)
        else:
            groups = 2 if kind == "grouped" else 1
            self.convs = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=kind == "bias"))
        self.norm = nn.BatchNorm2d(outputs)
        self.add = kind == "residual" and stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.convs(x))
        return F.relu(y + x if self.add else y)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    stages: list[nn.Module] = []
    width, size = 3, 8
    for _ in range(draw(st.integers(1, 3))):
        kinds = ["plain", "bias", "residual", "depthwise", "pointwise-depthwise"]
        kind = draw(st.sampled_from(kinds + ["grouped"] * (width % 2 == 0)))
        outputs = 2 * draw(st.integers(1, 5))
        if kind == "residual" and draw(st.booleans()):
            outputs = width
        stride = draw(st.sampled_from([1, 2]))
        stages.append(Stage(width, outputs, kind, stride))
        width, size = outputs, -(-size // stride)
    pool = draw(st.sampled_from(["none", "max", "average", "global"]))
    if pool == "max" and size > 1:
        stages.append(nn.MaxPool2d(2))
        size //= 2
    elif pool == "average":
        stages.append(nn.AvgPool2d(3, 1, 1))
    elif pool == "global":
        stages.append(nn.AdaptiveAvgPool2d(1))
        size = 1
    stages.append(nn.Flatten())
    width *= size * size
    if draw(st.booleans()):
        stages += [nn.Linear(width, 7), nn.ReLU()]
        width = 7
    return settle(nn.Sequential(*stages, nn.Linear(width, 4)), draw(st.integers(0, 2**20)))


class Sized(nn.Module):
    """A network for images of any size; ``sized`` and ``narrow`` insist on something.

    Where it is ``told``, it knows one width by heart; ``room`` is how wide images in float64 may be.
    """

    def __init__(self, sized: bool = False, narrow: bool = False, told: bool = False, room: int = 1000) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 8, 3, 4)
        self.head = nn.Linear(8, 4)
        self.sized, self.narrow, self.told, self.room = sized, narrow, told, room

    def forward(self, x: Tensor) -> Tensor:
        if self.sized and x.shape[-1] != 160:
            raise ValueError("made for 160 pixels")
        if x.dtype is torch.float64 and x.shape[-1] > self.room:
            raise RuntimeError("not enough memory")
        y = self.first(x).relu()
        if self.narrow and x.shape[-1] == 160:
            y = y.reshape(len(y), 8, *y.shape[2:])
        scale = 2.0 if self.told and y.shape[1] != 8 else 1.0
        return self.head(scale * self.second(y).relu().mean((2, 3)))


def found_by_verification(report: lbyl.Report, *names: str) -> list[str]:
    """What verification says of the groups that it leaves whole, which are these."""
    found = {name: why for name, why in report.left if why.startswith("found by verification")}
    assert list(found) == list(names)
    return list(found.values())


def test_large_images_are_compared_with_fewer_pixels() -> None:
    """A third of them on each side: there is no room for all of them in float64, and no need for it."""
    x = images(1, 3, 160, 192)
    model = settle(Sized(room=64))
    result = lbyl.compress(model, x, ratio=0.5, restore="prune", forecast=False)
    assert [row.group for row in result.report.rows] == ["first", "second"]
    assert not found_by_verification(result.report)
    assert result.report.verified is not None
    assert result.report.verified < TOLERANCE
    assert result.report.macs == tuple(count_macs(m, ExampleInputs.of(x)) for m in (model, result.model))
    # With fewer pixels they are compared all the same.
    report = lbyl.compress(settle(Sized(room=64, told=True)), x, ratio=0.5, restore="prune", forecast=False).report
    assert [row.group for row in report.rows] == ["second"]
    assert "differ by" in found_by_verification(report, "first")[0]


def test_a_network_for_one_size_is_compared_on_that() -> None:
    x = images(1, 3, 160, 160)
    report = lbyl.compress(settle(Sized(sized=True)), x, ratio=0.5, restore="prune", forecast=False).report
    assert report.verified is not None
    assert report.verified < TOLERANCE
    assert not found_by_verification(report)
    report = lbyl.compress(settle(Sized(sized=True, told=True)), x, ratio=0.5, restore="prune", forecast=False).report
    assert [row.group for row in report.rows] == ["second"]
    assert "differ by" in found_by_verification(report, "first")[0]
    # It can't be compared on anything else, but in another precision.
    report = lbyl.compress(settle(Sized(sized=True, room=64)), x, ratio=0.5, restore="prune", forecast=False).report
    assert report.verified is not None
    assert any("verified in float32" in note and "not enough memory" in note for note in report.notes)


def test_what_fails_only_at_full_size_is_found() -> None:
    model = settle(Sized(narrow=True))
    report = lbyl.compress(model, images(1, 3, 160, 160), ratio=0.5, restore="prune", forecast=False).report
    assert [row.group for row in report.rows] == ["second"]
    assert found_by_verification(report, "first")


def masked_twin(model: nn.Module, result: lbyl.Result, inputs: Tensor) -> nn.Module:
    """The uncut network, by hand from the plan: dropped columns zero, kept ones as in the cut model."""
    twin = copy.deepcopy(model)
    state, small = tensors_of(twin), tensors_of(result.model)
    graph = lbyl.inspect(model, inputs).graph
    cuts = {(c.parameter, c.dim): c for c in result.plan.cuts}
    with torch.no_grad():
        for consumer in graph.consumers:
            column_cut = cuts.get((consumer.weight, 1))
            if column_cut is None:
                continue
            row_cut = cuts.get((consumer.weight, 0))
            weight = state[consumer.weight]
            rows = list(row_cut.keep) if row_cut else list(range(len(weight)))
            per_block, rows_per_block = weight.shape[1], len(weight) // consumer.blocks
            kept = sorted(column_cut.keep)
            weight.zero_()  # rows that are gone have no consumer left: whatever they compute is masked
            for place, row in enumerate(rows):
                block = row // rows_per_block
                columns = [c - block * per_block for c in kept if c // per_block == block]
                weight[row, columns] = small[consumer.weight][place]
    return twin


@given(
    networks(),
    st.sampled_from(RESTORERS),
    st.sampled_from(["inner", "all"]),
    st.sampled_from([0.3, 0.5, 0.8]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_networks_equal_their_masked_selves(
    model: nn.Module, restore: lbyl.Restorer, scope: str, ratio: float
) -> None:
    x = images(2, 3, 8, 8)
    try:
        result = compress(model, x, ratio=ratio, scope=scope, restore=restore)
    except lbyl.InputError as error:
        assume("no group can be pruned" not in str(error))
        raise
    assert result.report.verified is not None
    assert result.report.verified < TOLERANCE
    # lbyl's own verification is not asked here: the mask is written from the plan alone.
    with torch.no_grad():
        expected = masked_twin(model, result, x).double()(x.double())
        found = copy.deepcopy(result.model).double()(x.double())
    assert difference([expected], [found]) < 1e-6
    assert result.report.parameters[1] < result.report.parameters[0]


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("restore", RESTORERS, ids=repr)
def test_every_restorer_in_every_scope(restore: lbyl.Restorer, scope: str) -> None:
    result = compress(residual(), images(2, 3, 8, 8), restore=restore, scope=scope)
    assert result.report.verified is not None
    assert result.report.verified < TOLERANCE


def test_a_width_known_by_heart_names_the_group() -> None:
    with pytest.raises(lbyl.VerificationError, match=r"group 'second'.*'second': 0"):
        compress(settle(HardCoded()), images(2, 6), strict=True)


@pytest.mark.parametrize("restore", ["prune", lbyl.LeastSquares(moments=lbyl.Noise(images=8))])
def test_without_strict_a_width_known_by_heart_stays_whole_and_is_named(restore: str | lbyl.LeastSquares) -> None:
    model, x = settle(HardCoded()), images(2, 6)
    result = compress(model, x, restore=restore)
    assert [group.name for group in result.plan.groups] == ["first"]
    assert any(name == "second" and why.startswith("found by verification") for name, why in result.report.left)
    assert result.report.verified is not None
    # What stays whole keeps its weights, but for what restoration adds to the columns of "first".
    assert torch.equal(result.model.get_parameter("head.weight"), model.get_parameter("head.weight"))


def test_the_way_out_that_the_error_names_works() -> None:
    result = compress(settle(HardCoded()), images(2, 6), ratio={"*": 0.5, "second": 0})
    assert [group.name for group in result.plan.groups] == ["first"]


def test_each_of_several_layers_of_a_kind_is_tried_by_itself() -> None:
    class Layer(nn.Module):
        def __init__(self, size: int | None) -> None:
            super().__init__()
            # By this name it is no width, and stays.
            self.up, self.down, self.grid = nn.Linear(6, 8), nn.Linear(8, 6), size

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).relu()
            return self.down(y if self.grid is None else y.view(-1, self.grid))

    known = [None, 8, None, 8, None, None]
    net = settle(nn.Sequential(*(Layer(size) for size in known)))
    result = compress(net, images(2, 6), restore="prune")
    whole = {f"{number}.up" for number, size in enumerate(known) if size}
    assert {name for name, why in result.report.left if why.startswith("found by verification")} == whole
    assert {row.group for row in result.report.rows if row.group.endswith("up")} == {"0.up", "2.up", "4.up", "5.up"}


def test_a_view_of_a_fixed_size_names_the_group() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8 * 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu().reshape(-1, 32))

    with pytest.raises(lbyl.VerificationError, match="group 'b'"):
        compress(settle(Viewing()), images(2, 3, 2, 2), strict=True)


def test_verification_can_be_switched_off() -> None:
    result = compress(settle(HardCoded()), images(2, 6), verify=False)
    assert result.report.verified is None
    assert any("not verified" in line for line in result.report.summary())


def test_a_wrong_cut_is_noticed() -> None:
    """Verification must be able to fail on weights, not only on shapes."""
    model, x = mlp(6, 8, 8), images(64, 6)
    graph = lbyl.inspect(model, x).graph
    selection = Selection((Choice(graph.group("0"), (0, 2, 4)), Choice(graph.group("2"), (1, 3, 5, 7))), ())
    masked = copy.deepcopy(model)
    with torch.no_grad():
        columns = torch.ones(8)
        columns[[0, 2, 4]] = 0
        masked[2].weight *= 1 - columns
        mask = torch.ones(8)
        mask[[1, 3, 5, 7]] = 0
        masked[4].weight *= 1 - mask
    smaller = cut(copy.deepcopy(masked), plan_cuts(selection))
    assert verify(copy.deepcopy(masked), smaller, ExampleInputs.of(x), selection).difference < TOLERANCE
    with torch.no_grad():
        smaller[4].weight += 0.01
    with pytest.raises(lbyl.VerificationError, match="differ by"):
        verify(copy.deepcopy(masked), smaller, ExampleInputs.of(x), selection)
    with torch.no_grad():
        masked[2].weight[:, 1] = 1.0  # a dropped column that is not masked
    with pytest.raises(lbyl.VerificationError, match="group '0'"):
        verify(masked, cut(copy.deepcopy(masked), plan_cuts(selection)), ExampleInputs.of(x), selection)


def test_difference_is_relative_and_infinite_where_shapes_differ() -> None:
    one = torch.tensor([100.0, 1.0])
    assert difference([one], [torch.tensor([101.0, 1.0])]) == pytest.approx(0.01)
    assert difference([one], [torch.zeros(3)]) == float("inf")
    assert difference([one], [torch.tensor([100.0, float("nan")])]) == float("inf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, name: str) -> None:
    model = mlp(6, 8)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    with pytest.raises(lbyl.InputError, match=name):
        compress(model, images(2, 6))


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Dividing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) / (x.sum() - x.sum())

    with pytest.raises(lbyl.InputError, match="not finite"):
        compress(Dividing().eval(), images(2, 6))


class Borrowing(nn.Module):
    """Uses a layer's tensors without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.first.weight, self.first.bias))
        return self.head(F.relu(self.second(x)))


def test_a_layer_whose_tensors_are_used_from_outside_is_verified_too() -> None:
    result = compress(settle(Borrowing()), images(2, 6))
    assert len(result.plan.groups) == 2
    assert result.report.verified is not None
    assert result.report.verified < TOLERANCE


@pytest.mark.parametrize("model", [settle(Borrowing()), settle(HardCoded()), mlp(6, 8, 8)], ids=["a", "b", "c"])
def test_verification_leaves_both_models_as_they_were(model: nn.Module) -> None:
    x = images(2, 6)
    graph = lbyl.inspect(model, x).graph
    selection = Selection(tuple(Choice(group, (0, 1)) for group in graph.groups if group.prunable), ())
    masked = copy.deepcopy(model)
    smaller = cut(copy.deepcopy(model), plan_cuts(selection))
    before = [(id(t), t.clone()) for net in (masked, smaller) for t in tensors_of(net).values()]
    with pytest.raises(lbyl.VerificationError):  # nothing was masked
        verify(masked, smaller, ExampleInputs.of(x), selection)
    after = [t for net in (masked, smaller) for t in tensors_of(net).values()]
    assert [id(t) for t in after] == [name for name, _ in before]
    assert all(torch.equal(a, b) for a, (_, b) in zip(after, before, strict=True))
    assert {t.dtype for t in after} == {torch.float32}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in masked.modules())


def test_macs_of_torchs_attention_are_the_same_with_and_without_verification() -> None:
    # Its output layer is used from outside, so that here a whole copy runs in float64.
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    plain, verified = (
        lbyl.compress(net, x, ratio=0.5, restore="prune", verify=v, forecast=False).report.macs for v in (False, True)
    )
    assert plain is not None
    assert verified == plain
    assert plain[0] > 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) - 1  # projections and MLP


def test_without_verification_a_network_that_does_not_run_says_what_to_do() -> None:
    model, x = settle(Sized(narrow=True)), images(1, 3, 160, 160)
    with pytest.raises(lbyl.VerificationError, match=r"does not run: .*verify=True"):
        lbyl.compress(model, x, ratio=0.5, restore="prune", verify=False, forecast=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [settle(Borrowing()), mlp(6, 8, 8)], ids=["sharing_copy", "mlp"])
def test_zeros_are_laid_on_while_it_runs_and_no_weight_is_changed(model: nn.Module, dtype: torch.dtype) -> None:
    model, x = copy.deepcopy(model).to(dtype), images(8, 6).to(dtype)
    graph = lbyl.inspect(model, x).graph
    selection = Selection(tuple(Choice(group, (0, 3)) for group in graph.groups if group.prunable), ())
    smaller, inputs, silent = cut(copy.deepcopy(model), plan_cuts(selection)), ExampleInputs.of(x), masks_of(selection)
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    assert verify(model, smaller, inputs, selection, silent=silent).difference < TOLERANCE
    last = list(tensors_of(smaller).values())[-1]
    with torch.no_grad():
        last += 0.01
    with pytest.raises(lbyl.VerificationError, match=r"group '.*': the cut network does not"):
        verify(model, smaller, inputs, selection, silent=silent)
    with pytest.raises(lbyl.VerificationError, match=r"^the cut network does not compute what the masked one"):
        verify(model, smaller, inputs, selection, silent=silent, blame=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


class _LiteralScale(nn.Module):
    """Attention whose scale and width of heads come from the width of the stream, which is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        rows, steps, width = x.shape
        parts = self.qkv(x).reshape(rows, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = parts[0] @ parts[1].transpose(-1, -2) / math.sqrt(width // self.heads)
        return x + self.out((scores.softmax(-1) @ parts[2]).transpose(1, 2).reshape(rows, steps, -1))


def test_the_tolerance_in_float64_is_that_of_float64() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    notes = lbyl.compress(plain, torch.randn(2, 3, 16, 16), ratio=0.5, restore="prune", forecast=False).report.notes
    assert not any("float32 inside" in note for note in notes)
    net = nn.Sequential(nn.Linear(8, 24), _LiteralScale(), nn.Linear(24, 4)).eval()
    nn.init.trunc_normal_(net[1].qkv.weight, std=0.05)  # so that the wrong scale changes little
    with pytest.raises(lbyl.VerificationError, match="outputs differ"):
        lbyl.compress(net, torch.randn(2, 6, 8), ratio=0.4, scope="all", restore="prune", forecast=False)
