"""Differences, integrals, quantiles, bins and regions along other axes let channels be cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import lbyl

EDGES = torch.linspace(0, 1, 5)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "difference": lambda x: torch.diff(x, dim=2),
    "difference with a beginning": lambda x: torch.diff(x, dim=-1, prepend=x[..., :1]),
    "gradient": lambda x: torch.gradient(x, dim=2)[0],
    "integral": lambda x: x * torch.trapezoid(x, dim=2)[..., None],
    "running integral": lambda x: torch.cumulative_trapezoid(x, torch.arange(12.0), dim=2),
    "quantile": lambda x: x - torch.quantile(x, 0.5, dim=2, keepdim=True),
    "quantiles": lambda x: torch.quantile(x, torch.tensor([0.1, 0.9], dtype=x.dtype), dim=2).permute(1, 2, 0),
    "bins": lambda x: x + torch.bucketize(x, EDGES.to(x.dtype)),
    "sorted edges": lambda x: x * torch.searchsorted(EDGES.to(x.dtype), x),
    "members": lambda x: x * torch.isin(x.round(), EDGES),
    "classes": lambda x: x * functional.one_hot(x.argmax(2), 12),
    "along indices": lambda x: torch.take_along_dim(x, x.argsort(2), 2),
    "sorted": lambda x: torch.msort(x.permute(2, 0, 1)).permute(1, 2, 0),
    "norm of each channel": lambda x: torch.renorm(x, 2, 1, 1.0),
    "split by name": lambda x: torch.cat(torch.dsplit(x, 2)[::-1], 2),
    "diagonal": lambda x: x[..., :4].unflatten(2, (2, 2)).diagonal(dim1=2, dim2=3),
    "special": lambda x: torch.special.expit(x) + torch.lgamma(x + 1) + torch.logaddexp2(x, x),
    "one by one": lambda x: torch.stack([step * 0.5 for step in x.unbind(2)], 2),
    "regions": lambda x: torchvision.ops.roi_align(
        x[..., None].expand(-1, -1, -1, 6), torch.tensor([[0, 0, 0, 5, 5.0], [1, 0, 0, 5, 5]], dtype=x.dtype), 3
    ).mean(3),
}


class Network(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operation = operation
        self.a, self.b, self.leave = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.b(self.operation(torch.relu(self.a(x)))))).mean(-1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_channels_pass_through(name: str) -> None:
    x = torch.randn(2, 3, 12)
    result = lbyl.compress(Network(OPERATIONS[name]).eval(), x, ratio=0.5, restore="prune", forecast=False)
    assert [row.after for row in result.report.rows] == [4, 4]
    zeroed = Network(OPERATIONS[name]).eval()
    with torch.no_grad():
        for cut in (cut for cut in result.plan.cuts if cut.dim == 1):
            gone = [index for index in range(cut.size) if index not in cut.keep]
            zeroed.get_parameter(cut.parameter).index_fill_(1, torch.tensor(gone), 0)
        torch.testing.assert_close(result.model(x), zeroed(x))


OVER_CHANNELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "difference": (lambda x: functional.pad(torch.diff(x, dim=1), (0, 0, 1, 0)), "diff over channels"),
    "neighbors": (lambda x: functional.local_response_norm(x, 3), "slides over channels"),
    "random numbers": (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), "random numbers are drawn"),
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_what_mixes_channels_is_told_and_the_rest_is_cut(name: str) -> None:
    operation, why = OVER_CHANNELS[name]
    net = Network(operation).eval()
    result = lbyl.compress(net, torch.randn(2, 3, 12), ratio=0.5, restore="prune", forecast=False)
    assert [row.group for row in result.report.rows] == ["b"]
    assert why in dict(result.report.left)["a"]
