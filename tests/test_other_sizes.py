"""Views that mix channels with positions or rows fit one size of the inputs only: their channels stay whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lbyl
from lbyl.runtime.inputs import ExampleInputs
from lbyl.surgery.other_sizes import of_another_size


class Mixes(nn.Module):
    """Channels, then a view of them as rows of a recurrent layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.conv, self.gru, self.last = (
            nn.Conv1d(3, 16, 3, padding=1),
            nn.GRU(16, 12, batch_first=True),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        rows, channels, steps = x.shape
        x = {
            "view": lambda: x.view(rows, -1, channels),
            "rows": lambda: x.permute(1, 0, 2).reshape(rows, steps, channels),
            "transposed": lambda: x.transpose(1, 2),
        }[self.way]()
        return self.last(self.gru(x)[0].mean(1))


def masked(net: nn.Module, twin: nn.Module, result: lbyl.Result) -> nn.Module:
    """The network in which what reads dropped channels gets nothing from them."""
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        for cut in result.plan.cuts:
            if cut.dim == 1:
                weight = twin.get_parameter(cut.parameter)
                keep = torch.zeros(weight.shape[1], dtype=torch.bool)
                keep[list(cut.keep)] = True
                weight[:, ~keep] = 0
    return twin.eval()


@pytest.mark.parametrize("way", ["view", "rows", "transposed"])
@pytest.mark.parametrize("budget", [False, True])
def test_what_is_cut_is_right_for_all_sizes(way: str, budget: bool) -> None:
    net = Mixes(way).eval()
    how = {"budget": lbyl.Budget(params=0.72)} if budget else {"ratio": 0.5}
    result = lbyl.compress(net, torch.randn(1, 3, 8), restore="prune", forecast=False, **how)  # pyright: ignore
    left = dict(result.report.left)
    if way == "transposed":
        assert result.model.conv.out_channels < 16
    else:
        told = left["conv"] if not budget else " ".join(result.report.notes)
        assert "on inputs of another size (2x3x6) outputs differ" in told
        assert result.model.conv.out_channels == 16
        assert result.model.gru.hidden_size < 12
    other = masked(net, Mixes(way), result)
    for shape in ((1, 3, 8), (3, 3, 8), (1, 3, 6), (2, 3, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(result.model(x), other(x), atol=1e-5, rtol=1e-4)


class Positions(nn.Module):
    """Attention over positions whose result is taken for channels first, as in some networks for segmentation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.top, self.center = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.bottom, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, h, w = x.shape
        top = self.top(x).flatten(2)
        center, bottom = (layer(x).flatten(2).transpose(1, 2) for layer in (self.center, self.bottom))
        seen = (center @ top).view(b, -1).softmax(1).view(b, h * w, h * w)
        return self.last(x + (seen @ bottom).reshape(b, c, h, w))


def test_a_stream_that_a_view_mixes_with_positions_stays() -> None:
    net = Positions().eval()
    ratio = {"*": 0.0, "first": 0.5}
    with pytest.raises(lbyl.VerificationError, match=r"first: on inputs of another size \(2x3x4x4\) outputs differ"):
        lbyl.compress(net, torch.randn(1, 3, 2, 2), ratio=ratio, scope="all", restore="prune", forecast=False)


def test_what_sizes_are_tried() -> None:
    def sizes(taken: object, *shapes: tuple[int, ...], lengths: bool = True) -> list[list[int]] | None:
        inputs = ExampleInputs.of(
            tuple(torch.arange(float(torch.Size(shape).numel())).reshape(shape) for shape in shapes)
        )
        found = of_another_size(inputs, taken, lengths)  # pyright: ignore
        return found and [list(tensor.shape) for tensor in found.tensors()]

    assert sizes(lambda inputs: True, (1, 3, 8)) == [[2, 6, 6]]
    assert sizes(lambda inputs: True, (4, 3, 8), lengths=False) == [[5, 3, 8]]
    assert sizes(lambda inputs: False, (1, 3, 8)) is None
    # Only what the network takes: three channels, and lengths that can be halved.
    halves = sizes(lambda i: i.tensors()[0].shape[1] == 3 and i.tensors()[0].shape[2] % 4 == 0, (2, 3, 8))
    assert halves == [[3, 3, 4]]
    # Tokens and their mask are shortened together.
    pair = sizes(lambda i: i.tensors()[0].shape == i.tensors()[1].shape, (1, 12), (1, 12))
    assert pair == [[2, 9], [2, 9]]


def test_a_network_that_takes_one_size_only_is_cut() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.last = nn.Conv1d(3, 16, 3), nn.Linear(96, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape == (1, 3, 8)
            return self.last(self.conv(x).relu().flatten(1))

    result = lbyl.compress(Fixed().eval(), torch.randn(1, 3, 8), ratio=0.5, restore="prune", forecast=False)
    assert result.model.conv.out_channels == 8
