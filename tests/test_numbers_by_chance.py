"""Numbers that equal a width by chance stay as they are, also where verification could not tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lbyl


class Attention(nn.Module):
    """Self-attention; heads and their size are known."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.heads, self.size = width, heads, width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 5)

    def attend(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = (
            layer(x).view(batch, count, self.heads, self.width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(batch, count, self.width))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class Longest(Attention):
    """Takes so many steps and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.longest = nn.Linear(8, 32), 32

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            x = x[:, -self.longest :]
        return self.attend(self.first(x))


class Asserts(Attention):
    """A language model that refuses longer texts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block_size = nn.Embedding(50, 32), 32

    def forward(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= self.block_size
        return self.attend(self.table(ids))


class Folded(Attention):
    """Heads and batch are one axis, as in fairseq: two inputs with four heads are as many as a head is wide."""

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape

        def apart(y: Tensor) -> Tensor:
            y = y.view(batch, count, self.heads, self.size).transpose(1, 2)
            return y.reshape(batch * self.heads, count, self.size)

        q, k, v = (apart(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = (torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v).view(batch, self.heads, count, self.size)
        return self.out(mixed.transpose(1, 2).reshape(batch, count, self.heads * self.size))


class Windows(nn.Module):
    """As many positions in a window as heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.h = 4, 4
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        parts = self.qkv(x.reshape(-1, self.w, width)).view(-1, self.w, 3, self.h, 8)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(batch, count, -1))


class Repeats(nn.Module):
    """As many rounds as channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.rounds = 16, 16
        self.enter, self.again, self.out = nn.Linear(8, 32), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, rounds: int | None = None) -> Tensor:
        h, c = self.enter(x).split(self.hidden, -1)
        for _ in range(rounds or self.rounds):
            h = torch.tanh(self.again(h) + c)
        return self.out(h)


class Nearest(nn.Module):
    """The nearest k points, or all if there are fewer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.k = 16, 16
        self.enter, self.out = nn.Linear(4, 32), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.enter(x).split(self.width, -1)
        near = torch.cdist(x, x).topk(min(self.k, x.shape[1]), -1, largest=False)[1]
        return self.out((a * b)[torch.arange(len(x))[:, None, None], near].amax(2))


CASES: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...], str, set[str]]] = {
    "longest": (Longest, (1, 16, 8), (1, 40, 8), "inner", {"longest"}),
    "longest that matters": (Longest, (1, 40, 8), (1, 16, 8), "inner", {"longest"}),
    "assertion": (Asserts, (1, 8), (1, 32), "all", {"block_size"}),
    "two inputs": (Folded, (2, 6, 32), (3, 6, 32), "inner", {"size"}),
    "window": (Windows, (2, 16, 32), (1, 8, 32), "inner", {"w"}),
    "rounds": (Repeats, (2, 8), (3, 8), "all", {"rounds"}),
    "few points": (Nearest, (2, 8, 4), (1, 40, 4), "inner", {"k"}),
    "many points": (Nearest, (2, 40, 4), (1, 8, 4), "inner", {"k"}),
}


def some(kind: type[nn.Module], shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(50, shape, generator=generator) if kind is Asserts else torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_numbers_by_chance_stay(name: str) -> None:
    """The smaller network is the masked original on inputs of another size, too."""
    kind, example, other, scope, fixed = CASES[name]
    net = kind().eval()
    result = lbyl.compress(
        net, some(kind, example), ratio=0.5, scope=scope, restore="prune", strict=True, forecast=False
    )
    assert result.report.parameters[1] < result.report.parameters[0]
    for number in fixed:
        assert getattr(result.model, number) == getattr(net, number)
    masked = kind().eval()
    masked.load_state_dict(net.state_dict())
    with torch.no_grad():
        for choice in result.plan.cuts:
            if choice.dim == 1:  # what reads dropped channels gets nothing from them
                weight = masked.get_parameter(choice.parameter)
                keep = torch.zeros(weight.shape[1], dtype=torch.bool)
                keep[list(choice.keep)] = True
                weight[:, ~keep] = 0
    x = some(kind, other)
    torch.testing.assert_close(result.model(x), masked(x), atol=1e-5, rtol=1e-4)
