"""Cutting tensors: what follows from a size follows, what is not ours stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import Depthwise, Residual, compress, images, mlp, residual, settle
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.runtime.copying import copy_model, replacements_by_id, sharing_copy
from lbyl.surgery.cuts import Cut, cut, cut_copy


class Mixed(nn.Module):
    """Every kind of layer whose sizes must follow: plain, grouped, depthwise, 1d, linear. Input 3 x 6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv1d(8, 12, 1, groups=2)
        self.fc, self.norm, self.head = nn.Linear(12 * 6, 10), nn.BatchNorm1d(10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.bn(self.conv(x))))
        x = F.relu(self.grouped(x)).flatten(1)
        return self.head(F.relu(self.norm(self.fc(x))))


def test_attributes_follow_the_tensors() -> None:
    small = compress(settle(Mixed()), images(2, 3, 6)).model
    assert (small.conv.in_channels, small.conv.out_channels) == (3, 4)
    assert small.bn.num_features == len(small.bn.running_mean) == 4
    assert (small.depthwise.in_channels, small.depthwise.out_channels, small.depthwise.groups) == (4, 4, 4)
    assert (small.grouped.in_channels, small.grouped.out_channels, small.grouped.groups) == (4, 6, 2)
    assert small.grouped.weight.shape == (6, 2, 1)
    assert (small.fc.in_features, small.fc.out_features) == (36, 5)
    assert small.norm.num_features == 5
    assert (small.head.in_features, small.head.out_features) == (5, 2)
    # What the attributes say is what a fresh instance would be built with.
    rebuilt = nn.Conv1d(small.grouped.in_channels, small.grouped.out_channels, 1, groups=small.grouped.groups)
    rebuilt.load_state_dict(small.grouped.state_dict())


def test_num_batches_tracked_is_left_alone() -> None:
    model = settle(Mixed())
    model.bn.num_batches_tracked.fill_(7)
    assert int(compress(model, images(2, 3, 6)).model.bn.num_batches_tracked) == 7


def test_a_channel_multiplier_survives() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    small = compress(settle(model), images(2, 3, 5, 5)).model
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (2, 4, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(F.relu(self.first(x)))))))


def test_tied_weights_stay_tied() -> None:
    result = compress(settle(Tied()), images(2, 6))
    assert result.model.a.weight is result.model.b.weight
    assert result.model.a.weight.shape == (4, 4)
    assert result.model.a.in_features == result.model.b.in_features == 4


def test_a_shared_module_stays_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.again = self.middle = nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.again(F.relu(self.middle(F.relu(self.first(x)))))))

    small = compress(settle(Shared()), images(2, 6)).model
    assert small.again is small.middle
    assert small.middle.out_features == 4


def test_the_input_model_is_untouched() -> None:
    model = Residual()
    settle(model).train()
    model.a.bn1.eval()
    tensors = {name: (id(t), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    modes = {name: module.training for name, module in model.named_modules()}
    sizes = [(c.in_channels, c.out_channels) for c in model.modules() if isinstance(c, nn.Conv2d)]
    result = compress(model, images(2, 3, 8, 8), scope="all")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert id(tensor) == tensors[name][0], name
        assert torch.equal(tensor, tensors[name][1]), name
        assert tensor.grad is None
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert sizes == [(c.in_channels, c.out_channels) for c in model.modules() if isinstance(c, nn.Conv2d)]
    assert not {id(p) for p in result.model.parameters()} & {id(p) for p in model.parameters()}
    assert {name: module.training for name, module in result.model.named_modules()} == modes


def test_memory_is_not_shared_with_the_input_model() -> None:
    model = mlp(6, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = compress(model, images(2, 6)).model
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_empty_containers_are_copied_not_shared() -> None:
    model: Any = mlp(6, 8)
    model.notes = model.other = []
    small = compress(model, images(2, 6)).model
    small.notes.append("mine")
    small.register_forward_hook(lambda *_: None)
    assert small.other is small.notes
    assert model.notes == []
    assert not model._forward_hooks


def test_requires_grad_and_dtype_are_kept_and_the_cut_model_trains() -> None:
    model = residual().double()
    model.a.conv1.weight.requires_grad_(False)
    small = compress(model, images(2, 3, 8, 8).double()).model
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    small(images(2, 3, 8, 8).double()).sum().backward()
    assert small.a.conv1.weight.grad is None
    assert small.a.conv2.weight.grad.shape == small.a.conv2.weight.shape


def test_cut_tensors_are_contiguous() -> None:
    small = compress(residual(), images(2, 3, 8, 8), scope="all").model
    assert all(parameter.is_contiguous() for parameter in small.parameters())


@pytest.mark.parametrize(
    "bad",
    [
        Cut("2.weight", 1, 10, (0, 10)),
        Cut("2.weight", 1, 10, (-1, 3)),
        Cut("2.weight", 1, 10, (3, 3)),
        Cut("2.weight", 1, 10, (4, 3)),
        Cut("2.weight", 1, 10, ()),
        Cut("2.weight", 1, 12, (0, 1)),
        Cut("2.weight", 2, 10, (0, 1)),
        Cut("2.weight", -1, 10, (0, 1)),
        Cut("9.weight", 1, 10, (0, 1)),
        Cut("2.weight", 1, 10, (0, 1), blocks=0),
        Cut("2.weight", 1, 20, (0, 1, 2), blocks=2),
    ],
    ids=lambda bad: f"{bad.parameter}-{bad.dim}-{bad.size}-{bad.keep}-{bad.blocks}",
)
def test_a_cut_that_does_not_fit_changes_nothing(bad: Cut) -> None:
    model = mlp(6, 10, 8)
    before = copy.deepcopy(model.state_dict())
    good = Cut("0.weight", 0, 10, (0, 1))
    with pytest.raises(lbyl.SurgeryError, match=bad.parameter):
        cut(model, [good, bad])
    assert model[0].weight.shape == (10, 6)
    assert model[0].out_features == 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_value_that_does_not_fit_is_refused() -> None:
    model = mlp(6, 10)
    for name, value in (("2.weight", torch.zeros(3, 9)), ("7.weight", torch.zeros(3, 10))):
        with pytest.raises(lbyl.SurgeryError, match=name):
            replacements_by_id(model, {"0.weight": torch.zeros(10, 6), name: value})


def test_a_borrowing_copy_holds_no_weights_of_its_own() -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))).train()
    new = torch.zeros(2, 4, 1, 1)
    twin = sharing_copy(model, {"2.weight": new})
    assert twin[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert twin[2].weight.data_ptr() == new.data_ptr()
    assert twin[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    # What is done to the copy's parameters as objects does not reach the model's.
    twin[0].weight.requires_grad_(False)
    assert model[0].weight.requires_grad
    assert model.training
    assert not twin.training


def test_rows_that_a_forward_pass_shortens_are_not_the_borrowed_ones() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    twin = sharing_copy(model)
    twin(torch.arange(5))
    assert twin[0].weight.norm(dim=1).max() < 0.11 < before.norm(dim=1).max()
    assert torch.equal(model[0].weight, before)
    assert twin[1].weight.data_ptr() == model[1].weight.data_ptr()


def test_depthwise_networks_shrink_all_the_way() -> None:
    small = compress(settle(Depthwise(6)), images(2, 3, 6, 6), ratio=0.5).model
    assert small.depthwise.weight.shape == (3, 1, 3, 3)
    assert small.depthwise.groups == small.bn0.num_features == small.bn1.num_features == 3
    assert small.project.in_channels == 3


def test_what_stands_for_a_tensor_takes_its_place_everywhere() -> None:
    model = settle(Tied())
    model.a.weight.requires_grad_(False)
    new = torch.ones(8, 8)
    twin = copy_model(model, replacements_by_id(model, {"a.weight": new}))
    assert twin.a.weight is twin.b.weight
    assert torch.equal(twin.b.weight, new)
    assert not twin.a.weight.requires_grad
    assert not torch.equal(model.a.weight, new)


class Hoarder(nn.Module):
    """Keeps things in every way that a module can, some of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.LSTM(4, 4)])
        self.again = self.layers[0]
        self.register_buffer("mask", torch.ones(4), persistent=False)
        self.sizes, self.nested, self.seen = (1, 2), {"a": [self.layers[1], (3, torch.zeros(2))]}, {1, 2}
        self.listed = [self.mask]
        self.listed_again = self.listed
        self.own = Own()
        self.count = 0
        self.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, args: Any) -> None:
        self.count += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.again(x))


class Own(nn.Module):
    """Has a way of its own to be copied."""

    made = "by its class"

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        twin = Own()
        twin.made = "by itself"
        return twin


def test_a_duplicate_is_a_deep_copy() -> None:
    model = Hoarder()
    twin = copy_model(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in twin.state_dict().items())
    assert {n: vars(m).keys() for n, m in twin.named_modules() if n != "own"} == {
        n: vars(m).keys() for n, m in model.named_modules() if n != "own"
    }
    assert twin.again is twin.layers[0]
    assert twin.nested["a"][0] is twin.layers[1]
    assert twin.listed is twin.listed_again
    assert twin.listed[0] is twin.mask
    assert twin.own.made == "by itself"
    twin(torch.zeros(1, 3, 2, 2))
    assert (twin.count, model.count) == (1, 0)
    twin.layers[2](torch.zeros(2, 4))
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers(), twin.nested["a"][1][1]):
            tensor.fill_(7)
    twin.seen.add(3)
    twin.register_forward_pre_hook(twin.note)
    assert not any(bool((tensor == 7).any()) for tensor in (*model.parameters(), *model.buffers()))
    assert (model.seen, float(model.nested["a"][1][1].sum())) == ({1, 2}, 0)
    assert len(model._forward_pre_hooks) == 1


def test_a_cut_copy_replaces_every_reference_and_shares_nothing() -> None:
    model = settle(Tied())
    model.remembered = [model.a.weight, model.head.bias]  # not registered, as an RNN's flat weights
    before = copy.deepcopy(model.state_dict())
    cuts = [Cut("a.weight", 1, 8, (0, 1, 2)), Cut("first.weight", 0, 8, (0, 1, 2)), Cut("first.bias", 0, 8, (0, 1, 2))]
    twin = cut_copy(model, cuts)
    assert twin.a.weight is twin.b.weight is twin.remembered[0]
    assert twin.remembered[1] is twin.head.bias
    assert (twin.a.in_features, twin.first.out_features) == (3, 3)
    assert torch.equal(twin.a.weight, model.a.weight[:, :3])
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.a.in_features == 8
    with pytest.raises(lbyl.SurgeryError, match=r"9\.weight"):
        cut_copy(model, [*cuts, Cut("9.weight", 0, 8, (0,))])
