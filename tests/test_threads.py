"""Several threads at once: each with its own network, or all with the same."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nets import images, mlp, residual, settle
from torch import nn

import lbyl


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()


NETS = {
    "perceptron": (lambda: settle(mlp()), (2, 6)),
    "residual": (lambda: settle(residual()), (2, 3, 6, 6)),
    "attention": (transformer, (2, 5, 8)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shared", [False, True])
def test_four_threads_give_what_one_gives(name: str, shared: bool) -> None:
    build, shape = NETS[name]
    x, nets = images(*shape), [build() for _ in range(4)]
    nets = nets[:1] * 4 if shared else nets
    nets[0].train()
    expected = lbyl.compress(build(), x, ratio=0.5, restore="lbyl").model.state_dict()
    before = torch.backends.mha.get_fastpath_enabled(), gc.isenabled(), torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda net: lbyl.compress(net, x, ratio=0.5, restore="lbyl"), nets * 2))
    for result in found:
        assert all(torch.equal(tensor, expected[key]) for key, tensor in result.model.state_dict().items())
        assert result.report.verified is not None
    assert (torch.backends.mha.get_fastpath_enabled(), gc.isenabled()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert nets[0].training
    assert found[0].model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for net in nets for module in net.modules())
