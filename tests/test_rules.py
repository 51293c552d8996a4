"""How channels pass through operations: each small network is cut in scope "all" and equals its masked self."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from nets import images, settle
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.graph import Graph
from lbyl.graph.rules import rule


def cut(model: nn.Module, inputs: object, ratio: float = 0.5, **options: object) -> lbyl.Result:
    """Prune in scope "all" and take nothing back: whatever can't be cut is an error."""
    result = lbyl.compress(
        model, inputs, ratio=ratio, scope="all", restore="prune", strict=True, **options, forecast=False
    )  # pyright: ignore
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    return result


def widths(result: lbyl.Result) -> dict[str, tuple[int, int]]:
    return {row.group: (row.before, row.after) for row in result.report.rows}


def reasons(model: nn.Module, inputs: object) -> dict[str, str | None]:
    graph: Graph = lbyl.inspect(model, inputs).graph  # pyright: ignore
    return {group.name: group.reason for group in graph.groups}


class Attention(nn.Module):
    """Multi-head attention in three spellings, behind a layer norm, as vision transformers have it."""

    def __init__(self, how: str, width: int = 12, heads: int = 4, fused: bool = True) -> None:
        super().__init__()
        self.how, self.num_heads, self.head_dim = how, heads, width // heads
        self.attn_dim = width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width) if fused else nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.q_norm = nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, _ = x.shape
        y = self.norm(x)
        if isinstance(self.qkv, nn.ModuleList):
            shape = count, tokens, self.num_heads, self.head_dim
            q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in self.qkv)
        else:
            shape = count, tokens, 3, self.num_heads, self.head_dim
            q, k, v = self.qkv(y).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q_norm(q)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(-1, tokens, tokens))
        elif self.how == "matmul":
            y = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5 + self.bias).softmax(-1) @ v
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.head_dim**-0.5 + self.bias
            y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        return x + self.proj(y.transpose(1, 2).reshape(count, tokens, self.attn_dim))


class OnImage(nn.Sequential):
    """Something on tokens of width 12, with a stem and a head around it. Input 5 x 7."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__(nn.Linear(7, 12), *inside, nn.LayerNorm(12), nn.Linear(12, 3))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", ["fused", "matmul", "einsum"])
def test_attention_loses_whole_heads(how: str, fused: bool) -> None:
    model = settle(OnImage(Attention(how, fused=fused)))
    result = cut(model, images(2, 5, 7))
    name = "1.qkv" if fused else "1.qkv.0"
    assert widths(result) == {"0": (12, 6), name: (4, 2)}
    attention = result.model[1]  # pyright: ignore
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 3, 6)
    assert attention.bias.shape == (2, 1, 1)
    # Another batch and another number of tokens, for nothing of the example's may have got stuck.
    assert result.model(images(3, 9, 7)).shape == (3, 9, 3)


class GroupedQueries(nn.Module):
    """Six query heads share three keys and values, with rotary position tables."""

    def __init__(self, native: bool) -> None:
        super().__init__()
        self.native, self.head_dim, self.num_key_value_groups = native, 4, 2
        self.q, self.k, self.v, self.o = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(24, 12)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * torch.cat([self.frequencies, self.frequencies])  # pyright: ignore
        swapped = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        return x * angle.cos().to(x) + swapped * angle.sin().to(x)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (12,))
        q, k, v = (layer(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.rotated(q), self.rotated(k)
        if not self.native:
            k, v = (t[:, :, None].expand(-1, -1, self.num_key_value_groups, -1, -1).reshape(q.shape) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.native)
        return x + self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("native", [True, False])
def test_grouped_queries_go_with_their_key(native: bool) -> None:
    result = cut(settle(OnImage(GroupedQueries(native))), images(2, 5, 7), 0.4)
    assert widths(result) == {"1.q": (3, 1)}
    inside = result.model[1]  # pyright: ignore
    assert [layer.out_features for layer in (inside.q, inside.k, inside.v)] == [8, 4, 4]
    assert (inside.head_dim, inside.num_key_value_groups) == (4, 2)


class Cross(nn.Module):
    """Cross-covariance attention: channels attend to channels within a head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.temperature = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, _ = x.shape
        y = self.qkv(F.layer_norm(x, (12,))).reshape(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
        q, k, v = y[0], y[1], y[2]
        attention = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature).softmax(-1)
        return x + self.proj((attention @ v).permute(0, 3, 1, 2).flatten(2))


def test_cross_covariance_attention_loses_whole_heads() -> None:
    result = cut(settle(OnImage(Cross())), images(2, 5, 7), 0.3)
    assert widths(result) == {"1.qkv": (3, 2)}
    assert result.model[1].temperature.shape == (2, 1, 1)  # pyright: ignore


class Gated(nn.Module):
    """A gated hidden layer: two layers (SwiGLU), one layer in halves, or `torch.nn.functional.glu`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.hidden = how, 8
        self.up, self.down = nn.Linear(12, 16), nn.Linear(8, 12)
        if how == "two":
            self.up, self.gate = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (12,))
        if self.how == "two":
            y = F.silu(self.gate(y)) * self.up(y)
        elif self.how == "glu":
            y = F.glu(self.up(y))
        elif self.how == "chunk":
            a, b = self.up(y).chunk(2, -1)
            y = F.gelu(a) * b
        else:
            a, b = self.up(y).split(self.hidden, -1)
            y = F.gelu(a) * b
        return x + self.down(y)


@pytest.mark.parametrize("how", ["two", "chunk", "split", "glu"])
def test_gated_hidden_layers(how: str) -> None:
    result = cut(settle(OnImage(Gated(how))), images(2, 5, 7))
    assert list(widths(result).values()) == [(8, 4)]
    inside = result.model[1]  # pyright: ignore
    assert inside.down.in_features == 4
    if how == "split":
        assert inside.hidden == 4


class Tokens(nn.Module):
    """A class token and positions beside patches, without any norm, so that the stream itself can go."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.positions
        return self.head(y.relu()[:, 0])


def test_class_tokens_and_positions_go_with_the_stream() -> None:
    result = cut(settle(Tokens()), images(2, 3, 4, 4))
    assert widths(result) == {"patches": (8, 4)}
    assert result.model.token.shape == (1, 1, 4)  # pyright: ignore
    assert result.model.positions.shape == (1, 5, 4)  # pyright: ignore


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(nn.GroupNorm(4, 8), (4, 2)), (nn.GroupNorm(8, 8), (8, 4)), (nn.InstanceNorm2d(8, affine=True), (8, 4))],
    ids=["four groups", "a group a channel", "instance"],
)
def test_group_and_instance_norms(norm: nn.Module, expected: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten()).eval()
    result = cut(model, images(2, 3, 6, 6))
    assert widths(result) == {"0": expected}
    assert result.model(images(1, 3, 6, 6)).isfinite().all()


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(1, 8, affine=False), nn.LayerNorm([8, 4, 4])], ids=["one group for all", "layer norm"]
)
def test_norms_over_all_channels_are_refused_by_name(norm: nn.Module) -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten()))
    found = reasons(model, images(2, 3, 6, 6))["0"]
    assert "norm '1' takes statistics over them" in str(found)


class Places(nn.Module):
    """What a small MLP makes of a table of places is added to each position; the table may serve twice."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(4, 6))
        self.first, self.second, self.shared = nn.Linear(6, 8), nn.Linear(8, 6), shared
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.second(self.first(self.places).relu())
        return self.head(x + self.places if self.shared else x)


def test_layers_read_a_table_as_they_read_inputs() -> None:
    result = cut(settle(Places(shared=False)), images(2, 4, 3))
    assert widths(result) == {"first": (8, 4), "stem": (6, 3)}
    assert result.model.places.shape == (4, 6)  # pyright: ignore


def test_a_table_that_is_read_keeps_its_columns() -> None:
    model, x = settle(Places(shared=True)), images(2, 4, 3)
    assert widths(cut(model, x)) == {"first": (8, 4)}
    assert reasons(model, x)["stem"] == "places is a parameter that 'first' takes as its input"


class Split(nn.Module):
    """Radix attention (ResNeSt): two halves of a grouped convolution are weighed against each other and added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, groups=2)
        self.fc1, self.fc2 = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 12, 1)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        count, channels, height, width = y.shape
        y = y.reshape(count, 2, channels // 2, height, width)
        gate = self.fc2(self.fc1(y.sum(1).mean((2, 3), keepdim=True)).relu())
        gate = gate.view(count, 1, 2, -1).transpose(1, 2).softmax(1).reshape(count, -1)
        return self.out((y * gate.view(count, 2, -1, 1, 1)).sum(1)).flatten(1)


def test_radix_splits_go_together() -> None:
    result = cut(settle(Split()), images(2, 4, 6, 6))
    assert widths(result) == {"conv": (6, 3), "fc1": (4, 2)}


class Pieces(nn.Module):
    """Res2Net's split by a width that the module knows, with the pieces convolved one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 3, 1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.first(x).relu(), self.width, 1)
        b = self.convs[0](b).relu()
        c = self.convs[1](c + b).relu()
        return self.last(torch.cat([a, b, c], 1)).flatten(1)


def test_equal_pieces_stay_equal_and_the_known_width_follows() -> None:
    result = cut(settle(Pieces()), images(2, 3, 6, 6))
    assert widths(result)["first"] == (12, 6)
    assert result.model.width == 2  # pyright: ignore


def test_unequal_pieces_follow_a_list_of_sizes() -> None:
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = (4, 8)
            self.up, self.a, self.b = nn.Linear(5, 12), nn.Linear(4, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.up(x).relu().split(self.sizes, -1)
            return self.a(a) + self.b(b)

    result = cut(settle(Unequal()), images(2, 5))
    assert result.model.sizes == (result.model.a.in_features, result.model.b.in_features)  # pyright: ignore
    assert sum(result.model.sizes) == 6  # pyright: ignore


class Upsampling(nn.Module):
    """Transposed convolutions, depthwise ones among them, and pixel shuffle."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        self.down, self.up = conv(3, 8, 1), up(8, 6, 2, 2)
        self.depthwise = up(6, 6, 2, 2, groups=6)
        self.out = conv(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.depthwise(self.up(self.down(x).relu()).relu())).flatten(1)


@pytest.mark.parametrize("dims", [2, 3])
def test_transposed_convolutions(dims: int) -> None:
    result = cut(settle(Upsampling(dims)), images(2, 3, *[3] * dims))
    assert widths(result) == {"down": (8, 4), "up": (6, 3)}
    assert (result.model.up.in_channels, result.model.up.out_channels) == (4, 3)  # pyright: ignore
    assert result.model.depthwise.groups == 3  # pyright: ignore


class Unpooling(nn.Module):
    """Values go back to the places that a pooling layer has found, as in SegNet."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a, self.b, self.c = conv(3, 8, 3, padding=1), conv(8, 8, 3, padding=1), conv(8, 2, 3, padding=1)
        self.pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](2, return_indices=True)
        self.unpool = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)[dims - 1](2)

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.pool(self.a(x).relu())
        return self.c(self.unpool(self.b(x).relu(), places))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_and_the_places_that_they_go_back_to_are_cut_together(dims: int) -> None:
    result = cut(settle(Unpooling(dims)), images(2, 3, *[8] * dims))
    assert widths(result) == {"a": (8, 4)}
    assert (result.model.a.out_channels, result.model.b.out_channels) == (4, 4)  # pyright: ignore


def test_channels_that_become_space_go_together() -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten()))
    result = cut(model, images(2, 3, 3, 3))
    assert widths(result) == {"0": (4, 2)}
    assert result.model[0].out_channels == 8  # pyright: ignore


class InputFirst(nn.Module):
    """GPT-2's linear layer: the weight is stored input first, and the output width is an attribute."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize("restore", ["prune", "merge", "lbyl"])
def test_weights_stored_input_first(restore: str) -> None:
    model = nn.Sequential(InputFirst(10, 5), nn.ReLU(), InputFirst(6, 10), nn.ReLU(), InputFirst(3, 6))
    result = lbyl.compress(model.eval(), images(2, 4, 5), restore=restore, strict=True, ratio=0.5, forecast=False)
    assert widths(result) == {"0": (10, 5), "2": (6, 3)}
    assert result.model[2].weight.shape == (5, 3)  # pyright: ignore
    assert result.model[2].nf == 3  # pyright: ignore


class Embedded(nn.Module):
    """Token embeddings, summed and read without a norm."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids).sum(1)).relu())


def test_embeddings_lose_columns() -> None:
    result = cut(settle(Embedded()), torch.arange(6).reshape(2, 3))
    assert widths(result) == {"table": (8, 4), "hidden": (8, 4)}
    assert result.model.table.embedding_dim == 4  # pyright: ignore


class Bag(nn.Module):
    """Sums of embeddings, and products of two values in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.EmbeddingBag(11, 8, mode="sum"), nn.Linear(8, 6)
        self.pairs, self.out = nn.Bilinear(8, 6, 10), nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        bag = self.table(ids)
        return self.out(self.pairs(bag, self.other(bag)).relu())


def test_bags_of_embeddings_and_bilinear_layers_are_cut() -> None:
    result = cut(settle(Bag()), torch.arange(6).reshape(2, 3))
    assert widths(result) == {"table": (8, 4), "other": (6, 3), "pairs": (10, 5)}
    table, pairs = result.model.table, result.model.pairs
    assert table.embedding_dim == 4  # pyright: ignore
    assert (pairs.in1_features, pairs.in2_features, pairs.out_features) == (4, 3, 5)  # pyright: ignore


@pytest.mark.parametrize("restore", ["prune", "lbyl", lbyl.LeastSquares(lbyl.Noise(images=32))])
def test_a_tied_table_loses_columns_and_stays_tied(restore: str | lbyl.LeastSquares) -> None:
    """Verification compares with the network whose columns are zero; the tied layer is told apart in the report."""
    x = torch.arange(6).reshape(2, 3)
    result = lbyl.compress(settle(Embedded(tied=True)), x, ratio=0.5, scope="all", restore=restore, forecast=False)
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    assert widths(result) == {"table": (8, 4)}
    assert result.model.head.weight is result.model.table.weight
    assert result.model.head.weight.shape == (11, 4)
    (row,) = result.report.rows
    assert ("both makes and reads these channels" in row.note) == (restore != "prune")


class Recurrent(nn.Module):
    def __init__(self, layer: Any, **settings: Any) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(5, 6), layer(6, 8, batch_first=True, **settings)
        width = settings.get("proj_size", 8) * (2 if settings.get("bidirectional") else 1)
        self.after, self.head = nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.layer(self.before(x))[0]).relu())


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_lose_what_they_read_and_units(layer: Any, settings: dict[str, Any]) -> None:
    result = cut(settle(Recurrent(layer, **settings)), images(2, 4, 5))
    assert widths(result) == {"before": (6, 3), "layer": (8, 4), "after": (8, 4)}
    inside = result.model.layer
    assert (inside.input_size, inside.hidden_size) == (3, 4)
    assert result.model(images(3, 7, 5)).shape == (3, 7, 3)  # another batch, another length


def test_recurrent_layers_with_projections_are_barriers_by_name() -> None:
    model = settle(Recurrent(nn.LSTM, proj_size=2))
    assert "lstm" in str(reasons(model, images(2, 4, 5))["before"])
    assert widths(cut(model, images(2, 4, 5))) == {"after": (8, 4)}


def attentive() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 16, batch_first=True, dropout=0.0)
    return settle(nn.Sequential(nn.Linear(7, 24), layer, nn.Linear(24, 3)))


@pytest.mark.parametrize(("ratio", "heads"), [(0.5, 2), (0.3, 3), (0.25, 3), (0.7, 2)])
@pytest.mark.parametrize("verify", [True, False])
def test_heads_and_stream_of_torchs_attention_lose_the_same_share_and_no_more_than_asked(
    ratio: float, heads: int, verify: bool
) -> None:
    model, x = attentive(), images(2, 5, 7)
    result = lbyl.compress(
        model, x, ratio=ratio, scope="all", restore="prune", strict=verify, verify=verify, forecast=False
    )
    found = widths(result)
    assert found["0"] == (24, 6 * heads)
    assert found["1.self_attn"] == (4, heads)
    attention = result.model[1].self_attn  # pyright: ignore[reportIndexIssue]
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (6 * heads, heads, 6)
    assert result.model(images(3, 9, 7)).shape == (3, 9, 3)


def test_heads_and_stream_of_torchs_attention_stay_whole_together_and_the_report_says_why() -> None:
    x = images(2, 5, 7)
    for ratio, scope, why in (
        (0.2, "all", "can't lose the same share at this ratio"),
        ({"*": 0.5, "0": 0}, "all", "has to lose the same share as '0', which is not pruned"),
        ({"*": 0.5, "1.self_attn": 0}, "all", "has to lose the same share as '1.self_attn', which is not pruned"),
        (0.5, "inner", "'0' has to lose the same share"),
    ):
        result = lbyl.compress(
            attentive(), x, ratio=ratio, scope=scope, restore="prune", strict=True, verify=False, forecast=False
        )
        assert list(widths(result)) == ["1.linear1"]
        assert any(why in reason for _, reason in result.report.left)
    budget = lbyl.Budget(params=0.9)
    result = lbyl.compress(attentive(), x, budget=budget, scope="all", restore="prune", strict=True, forecast=False)
    assert list(widths(result)) == ["1.linear1"]
    assert any("0 is not pruned: its heads and its residual connection" in note for note in result.report.notes)


class Crossing(nn.Module):
    """torch's own attention from one stream to another: its packed weight is cut into parts on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(7, 24), nn.Linear(6, 24), nn.Linear(24, 3)
        self.inner, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(24, 4, batch_first=True)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(x[..., :6])
        return self.last(self.inner(self.out(self.attention(self.one(x), y, y)[0])).relu())


def test_torchs_attention_between_two_streams_stays_whole_by_name() -> None:
    result = lbyl.compress(
        settle(Crossing()), images(2, 5, 7), scope="all", restore="prune", strict=True, ratio=0.5, forecast=False
    )
    assert widths(result) == {"attention.out_proj": (24, 12), "out": (3, 1), "inner": (8, 4)}
    assert "attention" in dict(result.report.left)["one"]


class Standardized(nn.Conv2d):
    """A convolution whose filters are standardized on the fly."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


@pytest.mark.parametrize("how", ["standardized", "weight_norm"])
def test_computed_weights_become_plain_ones(how: str, tmp_path) -> None:
    def make() -> nn.Sequential:
        if how == "standardized":
            inside: nn.Module = Standardized(8, 8, 3, padding=1)
        else:
            inside = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), inside, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))

    model, x = make().eval(), images(2, 3, 4, 4)
    names = set(model.state_dict())
    result = cut(model, x)
    assert widths(result) == {"0": (8, 4), "2": (8, 4)}
    assert type(result.model[2]) is nn.Conv2d  # pyright: ignore
    assert any("is a plain layer now" in note for note in result.report.notes)
    assert set(model.state_dict()) == names  # the user's own stays what it was
    result.save(tmp_path / "out")
    assert torch.equal(lbyl.load(tmp_path / "out", make())(x), result.model(x))


def old(norm: Any) -> Any:
    """A norm of an earlier PyTorch, which computes the weight in a hook."""

    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return apply


NORMS: dict[str, Any] = {
    "weight": nn.utils.parametrizations.weight_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
    "old weight": old(nn.utils.weight_norm),
    "old spectral": old(nn.utils.spectral_norm),
}


class Causal(nn.Conv1d):
    """Pads by itself, as convolutions of networks for sequences do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (2, 0)))


@pytest.mark.parametrize("norm", NORMS)
def test_layers_whose_weight_pytorch_computes_keep_their_own_forward(norm: str, tmp_path) -> None:
    def make() -> nn.Module:
        up = NORMS[norm](nn.ConvTranspose1d(8, 6, 4, 2, 1))
        layers = (NORMS[norm](Causal(3, 8, 3)), nn.ReLU(), up, nn.ReLU(), NORMS[norm](Causal(6, 8, 3)), nn.ReLU())
        return settle(nn.Sequential(*layers, nn.Conv1d(8, 3, 1)))

    model, x = make(), images(2, 3, 8)
    expected = model(x)
    result = cut(model, x)
    assert widths(result) == {"0": (8, 4), "2": (6, 3), "4": (8, 4)}
    assert type(result.model[0]) is Causal  # pyright: ignore
    assert (result.model[2].in_channels, result.model[2].out_channels) == (4, 3)  # pyright: ignore
    assert torch.equal(model(x), expected)  # the user's own still computes its weights
    result.save(tmp_path / "out")
    assert torch.equal(lbyl.load(tmp_path / "out", make())(x), result.model(x))
    with pytest.raises(lbyl.ArtifactError):
        lbyl.load(tmp_path / "out", settle(nn.Sequential(*(nn.Conv1d(3, 3, 1) for _ in range(7)))))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_that_compute_their_weight_become_plain_ones(dims: int) -> None:
    conv, up = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[
        dims - 1
    ]

    class Scaled(up):
        def forward(self, input: Tensor) -> Tensor:  # pyright: ignore
            function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            weight = self.weight / self.weight.norm()
            return function(input, weight, self.bias, self.stride, self.padding, self.output_padding, dilation=2)

    net = nn.Sequential(conv(3, 8, 1), nn.ReLU(), Scaled(8, 6, 3, 2, 1, 1), nn.ReLU(), conv(6, 2, 1))
    x = images(2, 3, *[5] * dims)
    result = lbyl.compress(settle(net), x, ratio=0.5, restore="prune", forecast=False)
    assert widths(result) == {"0": (8, 4), "2": (6, 3)}
    assert type(result.model[2]) is up  # pyright: ignore
    assert result.model(x).shape == net(x).shape


def test_layers_whose_weight_stays_computed_are_named_with_the_reason() -> None:
    class Padded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight / self.weight.norm(), self.bias)

    net = settle(nn.Sequential(Padded(3, 8, 3), nn.ReLU(), Padded(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    found = reasons(net, images(2, 3, 6, 6))
    assert {name: found[name] for name in ("0", "2")} == {
        name: f"conv2d in '{name}' with a weight that the model computes" for name in ("0", "2")
    }


def test_folding_alone_changes_nothing() -> None:
    from lbyl.graph.computed_weights import fold_computed
    from lbyl.runtime.inputs import ExampleInputs

    model = nn.Sequential(Standardized(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()).eval()
    x = images(2, 3, 6, 6)
    plain, folds = fold_computed(model, ExampleInputs.of(x), ["0"])
    assert [fold.module for fold in folds] == ["0"]
    assert torch.equal(plain(x), model(x))


class Caching(nn.Module):
    """Keeps what it computes from its weights, as LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Caching:
        self.kept.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.kept:
            self.kept["scale"] = self.scale * 2
        return self.b(self.a(x).relu() * self.kept["scale"])


def test_what_a_module_keeps_for_itself_is_neither_left_behind_nor_spoiled() -> None:
    model = settle(Caching())
    wanted = model(images(2, 5)).detach()
    before = model.kept["scale"]
    result = cut(model, images(2, 5))
    assert model.kept["scale"] is before
    assert torch.equal(model(images(2, 5)), wanted)
    assert result.model(images(4, 5)).dtype is torch.float32


def test_several_inputs_and_outputs() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.joint = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(12, 8)
            self.first, self.second = nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            z = self.joint(torch.cat([self.a(x), self.b(y)], -1).relu()).relu()
            return {"first": self.first(z), "second": self.second(z)}

    result = cut(settle(Both()), {"x": images(2, 4), "y": images(2, 5)})
    assert widths(result) == {"a": (6, 3), "b": (6, 3), "joint": (8, 4)}


class Undecided(nn.Module):
    """Which way it goes depends on the data, so that the whole can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
        self.gate = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x).mean((2, 3))
        return self.head(y[self.gate(y)[:, 0] > -1e9])


def test_what_can_not_be_traced_whole_is_compressed_in_parts(tmp_path) -> None:
    model, x = settle(Undecided()), images(2, 3, 6, 6)
    with pytest.raises(lbyl.TraceError):
        lbyl.compress(model, x, restore="prune", strict=True, ratio=0.5, forecast=False)
    with pytest.raises(lbyl.TraceError):
        lbyl.inspect(model, x, strict=True)
    result = lbyl.compress(model, x, ratio={"*": 0.5, "head.*": 0.2}, restore="prune", forecast=False)
    assert widths(result) == {"backbone.0": (8, 4), "head.0": (10, 8)}
    assert ("gate", "not traced: the model's output") in result.report.left
    assert any("depends on the data" in note for note in result.report.notes)
    assert {group.name for group in lbyl.inspect(model, x).graph.groups} >= {"backbone.0", "head.0"}
    result.save(tmp_path / "out")
    assert torch.equal(lbyl.load(tmp_path / "out", Undecided())(x), result.model(x))


def test_one_submodule_alone() -> None:
    model, x = settle(Undecided()), images(2, 3, 6, 6)
    result = lbyl.compress(model, x, restore="prune", submodule="backbone", ratio=0.5, forecast=False)
    assert widths(result) == {"backbone.0": (8, 4)}
    assert result.model.head[0].out_features == 10  # pyright: ignore
    assert lbyl.inspect(model, x, submodule="head").graph.groups[0].name == "head.0"
    with pytest.raises(lbyl.InputError, match="backbone, head, gate"):
        lbyl.compress(model, x, submodule="neck", ratio=0.5, forecast=False)
    twice = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(lbyl.InputError, match="called 2 times"):
        lbyl.compress(nn.Sequential(twice, twice), images(2, 4), submodule="0", ratio=0.5, forecast=False)


@pytest.mark.parametrize("spelled", [False, True])
def test_shuffled_channels_that_a_chunk_splits_again(spelled: bool) -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.stem(x).chunk(2, 1)
            y = torch.cat([a, self.back(self.inner(b).relu())], 1)
            y = y.view(len(y), 2, 4 if spelled else y.shape[1] // 2, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
            return self.head(y).flatten(1)

    result = lbyl.compress(
        settle(Shuffled()),
        images(2, 3, 4, 4),
        scope="all",
        restore="prune",
        strict=not spelled,
        ratio=0.5,
        forecast=False,
    )
    # Rows are cut together: the first half of the stem's channels with those of `back`.
    assert widths(result) == {"inner": (6, 3)} if spelled else {"stem": (8, 4), "inner": (6, 3)}
    assert not spelled or any("invalid for input" in why for _, why in result.report.left)


class Odd(nn.Module):
    """Calls an operation of the tests' own, whose rule fails."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.lbyl_tests, self.name)(x)


def raising(builder: Any, node: Any, args: Any, kwargs: Any) -> Any:
    raise KeyError("no such thing")


def narrowing(builder: Any, node: Any, args: Any, kwargs: Any) -> Any:
    return args[0][..., :2]


@pytest.mark.parametrize("fault", [raising, narrowing])
def test_a_rule_that_fails_is_a_barrier_by_name(fault: Any) -> None:
    name = f"odd_{fault.__name__}"  # rules are there to stay

    def copied(x: Tensor) -> Tensor:
        return x.clone()

    operation = torch.library.custom_op(f"lbyl_tests::{name}", copied, mutates_args=())
    operation.register_fake(torch.empty_like)
    rule(name)(fault)
    model = settle(nn.Sequential(nn.Linear(6, 8), Odd(name), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)))
    assert f"{name} in '1' is called in a way that its rule does not handle" in str(reasons(model, images(2, 6))["0"])
    assert widths(cut(model, images(2, 6))) == {"2": (5, 2)}


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.InstanceNorm2d(8), "num_features"),
        (nn.InstanceNorm2d(8, affine=True), "num_features"),
        (nn.BatchNorm2d(8, affine=False, track_running_stats=False), "num_features"),
        (nn.PReLU(8), "num_parameters"),
        (nn.GroupNorm(2, 8, affine=False), "num_channels"),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else item,
)
def test_what_a_layer_remembers_of_its_width_follows(layer: nn.Module, name: str) -> None:
    result = cut(settle(nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.ReLU(), nn.Conv2d(8, 4, 3))), images(2, 3, 8, 8))
    assert getattr(result.model[1], name) == 4  # pyright: ignore


@pytest.mark.parametrize("compare", [F.pairwise_distance, F.cosine_similarity, torch.cdist])
def test_what_distances_are_taken_of_is_cut_on_request_only(compare: Any) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return compare(self.b(self.a(x).relu()), self.b(self.a(y).relu()))

    net, x = settle(Twins()), (images(3, 6), images(3, 6) + 1)
    inner = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False)
    assert widths(inner) == {"a": (12, 6)}
    assert any(name == "b" and "is taken over it" in why for name, why in inner.report.left)
    assert widths(cut(net, x)) == {"a": (12, 6), "b": (8, 4)}


class Pooled(nn.Module):
    """Products of all pairs of channels (bilinear pooling)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2)
        return self.b((y @ y.transpose(1, 2)).flatten(1))


def test_a_product_goes_with_either_of_its_channels() -> None:
    result = cut(settle(Pooled()), images(2, 3, 4, 4))
    assert widths(result) == {"a": (8, 4)}
    keep = next(group.keep for group in result.plan.groups if group.name == "a")
    columns = next(item.keep for item in result.plan.cuts if item.parameter == "b.weight")
    assert columns == tuple(8 * i + j for i in keep for j in keep)


def test_the_cost_of_products_falls_with_the_square() -> None:
    x, net = images(2, 3, 4, 4), settle(Pooled())
    result = lbyl.compress(net, x, budget=lbyl.Budget(params=0.3), restore="prune", forecast=False)
    share = sum(p.numel() for p in result.model.parameters()) / sum(p.numel() for p in net.parameters())
    assert 0.2 <= share <= 0.3


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d((None, 1)),
        nn.AdaptiveMaxPool2d((None, 1)),
        nn.MaxPool2d((1, 2)),
        nn.AvgPool2d((1, 2)),
    ],
)
def test_pooling_that_leaves_the_axis_of_channels_alone(pool: nn.Module) -> None:
    class Sequence(nn.Module):
        """The columns of an image as a sequence, as in networks that read text."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.pool, self.last = nn.Conv2d(3, 16, 3), pool, nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.pool(self.first(x).permute(0, 3, 1, 2)).mean(3))

    result = lbyl.compress(Sequence().eval(), torch.randn(1, 3, 8, 8), ratio=0.5, restore="prune", forecast=False)
    assert result.model.first.out_channels == 8
