"""The default works where plain pruning works, whatever the code does that our own probes do not suit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import images
from test_small_networks import PRODUCTS, product_net
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import lbyl


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.h = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.a(x)).mean((2, 3)))


class Viewed(Base):
    """Tells apart how images lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(12 * 144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.a(x)).view(x.size(0), -1))


class NoGrad(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Inference(Base):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class LiteralBatch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, 3, 12, 12))


class Picky(Base):
    """Runs on ones only, as if it were told by its inputs which ones they are."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool((x == 1).all()):
            raise ValueError("ones, please")
        return super().forward(x)


class Log(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.log(x))


class Root(Base):
    """Its gradient is infinite at the bound of the range."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sqrt(x))


class Checkpointed(Base):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(self.b, self.a(x), use_reentrant=self.reentrant)
        assert isinstance(inner, Tensor)
        return self.h(inner.mean((2, 3)))


KINDS = [Viewed, NoGrad, Inference, LiteralBatch, Log, Root, Checkpointed]


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_works_where_plain_pruning_does(kind: type[Base]) -> None:
    net, x = kind().eval(), torch.rand(2, 3, 12, 12) + 0.1
    before = copy.deepcopy(net.state_dict())
    pruned = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False)
    result = lbyl.compress(net, x, ratio=0.5, forecast=False)
    assert result.report.parameters == pruned.report.parameters
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("kind", [Viewed, LiteralBatch])
def test_a_budget_by_default_works_too(kind: type[Base]) -> None:
    result = lbyl.compress(
        kind().eval(), torch.rand(2, 3, 12, 12) + 0.1, budget=lbyl.Budget(params=0.61), forecast=False
    )
    assert result.report.parameters[1] < 0.63 * result.report.parameters[0]


def test_what_stood_in_is_told() -> None:
    result = lbyl.compress(Picky().eval(), torch.ones(2, 3, 12, 12), ratio=0.5, forecast=False)
    assert any("was used instead" in note for note in result.report.notes)
    for kind in (Viewed, Root):
        result = lbyl.compress(kind().eval(), images(1, 3, 12, 12).abs().clamp(0, 1), ratio=0.5, forecast=False)
        assert not any("was used instead" in note for note in result.report.notes)


@pytest.mark.parametrize("kind", [NoGrad, Inference])
def test_code_without_gradients_is_told(kind: type[Base]) -> None:
    notes = lbyl.compress(kind().eval(), images(2, 3, 12, 12), ratio=0.5, forecast=False).report.notes
    assert any(note.startswith("nothing can be dreamed: no gradient reaches") for note in notes)


def test_a_network_that_keeps_nothing_for_gradients_is_dreamed_for() -> None:
    net = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 5)).eval()
    notes = lbyl.compress(net, images(3, 10), ratio=0.5, forecast=False).report.notes
    assert any("dreamed for random classes" in note for note in notes)
    assert not any("was used instead" in note for note in notes)


class Gated(nn.Module):
    """Numbers in, numbers out, by a gated layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.c, self.d = nn.Linear(10, 32), nn.Linear(32, 96), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.a(x).relu()
        one, other = self.gate(seen).chunk(2, -1)
        return self.d(seen + self.c(nn.functional.silu(one) * other))


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_restoration_that_hurts_on_one_kind_of_probes_is_not_trusted(seed: int) -> None:
    torch.manual_seed(seed)
    net, x, fresh = Gated().eval(), torch.randn(3, 10), torch.randn(500, 10)
    lost = []
    # With the ridge that is best for trained networks, dreams of a random network are fitted too closely to keep any.
    for restore in ("prune", lbyl.LeastSquares(lbyl.ClassDream(), ridge=0.3)):
        result = lbyl.compress(net, x, ratio=0.3, scope="inner", forecast=False, restore=restore)
        with torch.no_grad():
            lost.append(float((result.model(fresh) - net(fresh)).norm()))
    assert lost[1] < lost[0]
    assert any("one kind of held-out probes" in note for note in result.report.notes)


class Normed(nn.Module):
    """Has group norms; one that is picky runs on ones only."""

    def __init__(self, picky: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(3, 12, 3, 1, 1), nn.GroupNorm(3, 12)
        self.b, self.h, self.picky = nn.Conv2d(12, 12, 3, 1, 1), nn.Linear(12, 5), picky

    def forward(self, x: Tensor) -> Tensor:
        if self.picky and not bool((x == 1).all()):
            raise ValueError("ones, please")
        return self.h(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(("picky", "told"), [(False, "OBS"), (True, "L2 norm")])
def test_the_criterion_that_is_told_is_that_of_what_stood_in(picky: bool, told: str) -> None:
    notes = lbyl.compress(Normed(picky).eval(), torch.ones(2, 3, 12, 12), ratio=0.5, forecast=False).report.notes
    assert any("was used instead" in note for note in notes) == picky
    assert [told in note for note in notes if "channels are chosen" in note] == [True]


def test_dreams_run_through_checkpoints() -> None:
    settings: dict[str, Any] = {"restore": lbyl.LeastSquares(lbyl.Dream(images=4, steps=2)), "forecast": False}
    found = list[Tensor]()
    for kind, reentrant in ((Base, False), (Checkpointed, False), (Checkpointed, True)):
        net = kind().eval()
        net.reentrant = reentrant  # pyright: ignore
        before = torch.utils.checkpoint.CheckpointFunction
        found.append(lbyl.compress(net, images(2, 3, 12, 12), ratio=0.5, **settings).model.get_parameter("h.weight"))
        assert torch.utils.checkpoint.CheckpointFunction is before
    for weight in found[1:]:
        torch.testing.assert_close(weight, found[0])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.m, self.o = nn.Linear(6, 12), nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.o(x + self.m(x, x, x, need_weights=False)[0])


def test_layers_that_run_inside_of_one_function_are_not_left_out() -> None:
    result = lbyl.compress(Attending().eval(), images(2, 5, 6), ratio=0.4, scope="all", forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("a", 8), ("m", 2)]


def test_transposed_weights_are_restored_like_those_of_layers() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.a.weight.T + self.a.bias).relu() @ self.b.weight.t()

    net, x = Transposed().eval(), images(32, 6)
    settings: dict[str, Any] = {"restore": lbyl.LeastSquares(lbyl.Data([x])), "forecast": False}
    plain = nn.Sequential(net.a, nn.ReLU(), net.b)
    found = lbyl.compress(net, x, ratio=0.5, **settings).model.b
    wanted = lbyl.compress(plain.eval(), x, ratio=0.5, **settings).model[2]  # pyright: ignore
    torch.testing.assert_close(found.weight, wanted.weight)  # pyright: ignore


def test_a_restorer_that_was_named_is_not_replaced() -> None:
    named = lbyl.LeastSquares(moments=lbyl.Noise(images=8))
    with pytest.raises(lbyl.RestorationError, match=r"LeastSquares can't restore.*restore='lbyl'"):
        lbyl.compress(Picky().eval(), torch.ones(2, 3, 12, 12), restore=named, ratio=0.5, forecast=False)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 10),
    ).eval()


RESTORERS: dict[str, Callable[[Tensor], lbyl.Restorer]] = {
    "data": lambda x: lbyl.LeastSquares(moments=lbyl.Data([x])),
    "mix": lambda x: lbyl.LeastSquares(moments=lbyl.Data([x]), solve="mix"),
    "noise": lambda x: lbyl.LeastSquares(moments=lbyl.Noise(images=16)),
    "gaussian": lambda x: lbyl.LeastSquares(moments=lbyl.Gaussian()),
    "weights": lambda x: lbyl.LeastSquares(moments=lbyl.Weights()),
    "lbyl": lambda x: lbyl.LBYL(),
    "merge": lambda x: lbyl.Merge(),
    "coreset": lambda x: lbyl.Coreset(),
}


@pytest.mark.parametrize("name", RESTORERS)
def test_double_precision_restores_as_well_as_single(name: str) -> None:
    x = images(32, 3, 8, 8)

    def error(dtype: torch.dtype) -> float:
        net, seen = plain().to(dtype), x.to(dtype)
        before = copy.deepcopy(net.state_dict())
        result = lbyl.compress(net, seen[:1], ratio=0.5, restore=RESTORERS[name](seen), forecast=False)
        assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
        with torch.no_grad():
            expected = plain()(x)
            return float((result.model.float()(x) - expected).norm() / expected.norm())

    assert error(torch.float64) == pytest.approx(error(torch.float32), rel=0.02)


class Borrowing(nn.Module):
    """Calls functions with the weights of its layers, as Swin's attention does: the layers themselves never run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.a.weight, self.a.bias).relu()
        return nn.functional.linear(hidden, self.b.weight, self.b.bias)


@pytest.mark.parametrize("restore", ["prune", "lbyl"])
def test_weights_that_another_module_uses_are_masked_too(restore: str) -> None:
    result = lbyl.compress(Borrowing().eval(), images(3, 8), ratio=0.5, restore=restore, forecast=False)
    assert result.report.rows[0].after == 8
    assert result.report.verified is not None
    assert result.report.verified < 1e-9


def test_windows_of_attention_are_cut_with_scope_all() -> None:
    from torchvision.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5).eval()
    result = lbyl.compress(net, images(1, 3, 32, 32), ratio=0.25, scope="all", restore="prune", forecast=False)
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    assert len(result.report.rows) >= 4


@pytest.mark.parametrize("name", PRODUCTS)
def test_sums_of_products_are_restored_like_linear_layers(name: str) -> None:
    product, shape = PRODUCTS[name]
    torch.manual_seed(0)
    net = product_net(product, shape).eval()
    data = lbyl.Data([torch.randn(64, 6) for _ in range(4)], 4)
    result = lbyl.compress(net, torch.randn(4, 6), ratio=0.3, restore=lbyl.LeastSquares(moments=data), forecast=False)
    assert all("not restored" not in row.note for row in result.report.rows)
    seen = result.report.assessment
    assert seen is not None
    assert seen.restored < 0.8 * seen.pruned


class Counting(nn.Module):
    """It counts its calls in all ways that modules do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1  # pyright: ignore
        return self.inner(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.norm(self.a(x)).relu())


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("budget", [{}, {"macs": 0.8}, {"params": 0.8, "depth": True}], ids=["ratio", "width", "depth"])
def test_a_network_in_training_mode_stays_as_it_is(budget: dict[str, Any], rows: int) -> None:
    torch.manual_seed(0)
    net = Counting(nn.Sequential(*(Block() for _ in range(4)), nn.Linear(8, 3))).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    how: Any = {"budget": lbyl.Budget(**budget)} if budget else {"ratio": 0.25}
    result = lbyl.compress(net, torch.randn(rows, 8), forecast=False, effort="low", **how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.calls == 0
    assert all(module.training for module in net.modules())
    assert int(result.model.inner[0].norm.num_batches_tracked) == 0  # pyright: ignore


class LastSteps(nn.Module):
    """Takes as many steps of a sequence, as many of the best, and so on, as its layers have channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.memory, self.best, self.till = 16, 16, 16, 16
        self.a, self.o = nn.Conv1d(4, 32, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = torch.split(self.a(x[..., -self.memory :]), [self.width, self.width], 1)
        made = self.o((value.tanh() * gate.sigmoid())[..., : self.till].transpose(1, 2))
        return made.topk(min(self.best, made.shape[1]), 1).values + torch.arange(self.best)[: made.shape[1], None]


@pytest.mark.parametrize("steps", [6, 16, 40])
def test_a_number_of_steps_that_equals_a_width_stays(steps: int) -> None:
    net = LastSteps().eval()
    smaller = lbyl.compress(net, torch.randn(2, 4, steps), ratio=0.5, restore="prune", forecast=False).model
    assert (smaller.width, smaller.memory, smaller.best, smaller.till) == (8, 16, 16, 16)
    assert [type(value) for value in (net.memory, smaller.memory)] == [int, int]
    assert smaller(torch.randn(2, 4, 30)).shape == net(torch.randn(2, 4, 30)).shape


class Parts(nn.Module):
    """A gate that is the second half of a layer's channels, told apart by a number that the module keeps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.n = how, 16
        self.a, self.b = nn.Linear(8, 2 * self.n), nn.Linear(self.n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, n = self.a(x), self.n
        if self.how == "ellipsis":
            return self.b(x[..., :n] * x[..., n:].sigmoid())
        if self.how == "axes":
            return self.b(x[:, :, :n] * x[:, None, :, -n:].sigmoid().squeeze(1))
        if self.how == "first axis":
            x = x.movedim(-1, 0)
            return self.b((x[:n] * x[n:].sigmoid()).movedim(0, -1))
        return self.b(x.narrow(-1, 0, n) * torch.narrow(x, dim=2, start=n, length=n).sigmoid())


@pytest.mark.parametrize("how", ["ellipsis", "axes", "first axis", "narrow"])
def test_a_range_of_channels_is_as_wide_as_what_is_left_of_them(how: str) -> None:
    result = lbyl.compress(Parts(how).eval(), images(2, 5, 8), ratio=0.25, restore="prune", forecast=False)
    assert [row.group for row in result.report.rows] == ["a"]
    assert (result.model.n, result.model.b.in_features) == (12, 12)


class Directions(nn.Module):
    """A recurrent layer whose two directions the code adds, as a speech recognizer does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.n, self.rnn = 16, nn.RNN(8, 16, bidirectional=True, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        return self.out(x[:, :, : self.n] + x[:, :, self.n :])


def test_two_directions_that_the_code_adds_are_cut() -> None:
    result = lbyl.compress(Directions().eval(), images(2, 5, 8), ratio=0.25, restore="prune", forecast=False)
    assert (result.model.n, result.model.rnn.hidden_size) == (12, 12)


class Padded(nn.Module):
    """PyTorch's own encoder, on texts with pads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embed, self.encoder, self.o = nn.Embedding(30, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 5)

    def forward(self, x: Tensor, pads: Tensor) -> Tensor:
        return self.o(self.encoder(self.embed(x), src_key_padding_mask=pads)[:, 0])


def test_an_encoder_with_an_odd_number_of_heads_runs_on_pads() -> None:
    net = Padded().eval()
    x, pads = torch.randint(0, 30, (3, 7)), torch.arange(7) > torch.tensor([6, 3, 6])[:, None]
    smaller = lbyl.compress(net, (x, pads), ratio=0.4, scope="all", restore="prune", forecast=False).model
    assert smaller.encoder.layers[0].self_attn.num_heads == 3
    with torch.no_grad():
        torch.testing.assert_close(smaller(x, pads)[1], smaller(x[1:2, :4], pads[1:2, :4])[0], rtol=1e-4, atol=1e-5)


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(self.a(x), self.b(x)[:1])
        return self.o(torch.relu(a * b))


def test_values_that_are_brought_to_one_shape_are_cut_together() -> None:
    result = lbyl.compress(Broadcast().eval(), torch.randn(4, 8), ratio=0.5, restore="prune", forecast=False)
    assert [result.model.a.out_features, result.model.b.out_features] == [8, 8]
    assert not result.report.barriers


def test_masks_that_are_combined_by_operators_follow() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x * ((x > -1) & (x < 1) | (x > 2) ^ (x < -3)))

    x = torch.randn(4, 8)
    result = lbyl.compress(Between().eval(), x, ratio=0.5, restore="prune", strict=True, forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("first", 8)]


def test_the_line_that_spells_out_a_width_is_named() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16 * 6 * 6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).relu().view(-1, 16 * 6 * 6))

    with pytest.raises(
        lbyl.VerificationError, match=r"conv: without them the code fails \(.*, in test_ordinary_code.py:\d+\)"
    ):
        lbyl.compress(Flat().eval(), torch.randn(2, 3, 8, 8), ratio=0.5, restore="prune", forecast=False)


@pytest.mark.parametrize("norm", ["rms", "layer", "by hand"])
def test_norms_that_take_their_width_from_the_value_let_it_be_cut(norm: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

        def norm(self, x: Tensor) -> Tensor:
            if norm == "rms":
                return functional.rms_norm(x, (x.size(-1),))
            if norm == "layer":
                return functional.layer_norm(x, x.shape[-1:])
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(self.norm(x)).relu())

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), Block(), Block(), nn.Linear(16, 5)).eval()
    result = lbyl.compress(net, torch.randn(2, 6), ratio=0.5, scope="all", restore="prune", forecast=False)
    assert result.model[0].out_features == 8
    assert [name for name, _ in result.report.left] == ["3"]
    assert result.model(torch.randn(3, 4, 6)).shape == (3, 4, 5)


def test_a_network_of_nested_tensors_is_refused_and_leaves_nothing_behind() -> None:
    class Jagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, rows: list[Tensor]) -> Tensor:
            x = self.norm(self.first(torch.nested.nested_tensor(rows, layout=torch.jagged)))
            return self.last(torch.stack([row.mean(0) for row in x.unbind()]))

    net, rows = Jagged().eval(), [torch.randn(3, 8), torch.randn(5, 8)]
    before = net(rows)
    with pytest.raises(lbyl.InputError, match="works on nested tensors, which can't be followed"):
        lbyl.compress(net, (rows,), ratio=0.5, restore="prune", forecast=False)
    assert not _get_current_dispatch_mode_stack()
    torch.testing.assert_close(net(rows), before)
