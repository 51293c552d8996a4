"""Arguments of a wrong type or size: one clear error that names the argument, before anything is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import images, mlp
from torch import nn

import lbyl

X = images(2, 6)
NAN, INF = math.nan, math.inf


class Needy:
    def __init__(self, needed: int) -> None:
        self.needed = needed

    def score(self, filters: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return filters.sum(1)


def compress(**settings: Any) -> Callable[[], Any]:
    x = settings.pop("x", X)
    model = settings.pop("model", None) or mlp()
    return lambda: lbyl.compress(
        model, x, **{"restore": "prune", "ratio": None if "budget" in settings else 0.5, **settings}
    )


def data(*batches: Any) -> Callable[[], Any]:
    return compress(restore=lbyl.LeastSquares(moments=lbyl.Data(batches)))


def sweep(**settings: Any) -> Callable[[], Any]:
    given = {"budgets": [lbyl.Budget(params=0.5)], "path": "never-made", "restore": "prune", **settings}
    return lambda: lbyl.sweep(mlp(), X, **given)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "budget of a number": (
        compress(budget=0.5),
        r"budget=0.5 does not say of what: pass lbyl.Budget\(macs=0.5\).*ratio=0.5",
    ),
    "class of a budget": (compress(budget=lbyl.Budget), "budget is the class Budget"),
    "no seed": (compress(seed=None), "seed=None: must be a whole number"),
    "half a seed": (compress(seed=0.5), "seed=0.5"),
    "a seed too large": (compress(seed=10**400), "whole number of 64 bits"),
    "a ratio for a number": (compress(ratio={0: 0.5}), "the key 0; keys are globs"),
    "scope": (compress(scope=["all"]), "scope="),
    "class of a criterion": (compress(criterion=lbyl.L2), r"pass an object, L2\(\)"),
    "class of a restorer": (compress(restore=lbyl.LBYL), r"restore=LBYL is a class; pass an object, LBYL\(\)"),
    "moments for a restorer": (compress(restore=lbyl.Noise()), r"pass lbyl.LeastSquares\(Noise\(\.\.\.\)\)"),
    "verify": (compress(verify="no"), "verify='no': must be True or False"),
    "source": (compress(source=nn.Linear), "source is the class Linear"),
    "progress": (compress(progress=3), "progress is an int"),
    "no examples": (compress(x=X[:0]), "an input of 0x6 is empty"),
    "no width": (compress(x=X[:, :0]), "an input of 2x0 is empty"),
    "inputs on meta": (compress(x=X.to("meta")), "meta device"),
    "sparse inputs": (compress(x=X.to_sparse()), "sparse"),
    "nested inputs": (lambda: compress(x=torch.nested.nested_tensor([X[0], X[1]]))(), "a nested tensor; pass a padded"),
    "NumPy data": (data(X.numpy()), "Data: batch 0 is a ndarray"),
    "a list of moments": (lambda: lbyl.LeastSquares([X] * 1000), r"is a list: choose Weights"),  # pyright: ignore
    "NumPy inputs": (compress(x=X.numpy()), "example_inputs is a"),
    "a width of zero": (compress(model=nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 2))), "0.weight is 0x6"),
    "a width of zero to inspect": (
        lambda: lbyl.inspect(nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 2)), X),
        "0.weight is 0x6",
    ),
    "data of no batches": (lambda: lbyl.Data([X], batches=0), r"Data\(batches=0\)"),
    "data that is no source": (lambda: lbyl.Data(3), "source is an int"),  # pyright: ignore[reportArgumentType]
    "class of a loader": (lambda: lbyl.Data(list), "source is the class list"),
    "data without batches": (data(), "no batch"),
    "data of empty batches": (data(X, X[:0]), "an input of 0x6 is empty"),
    "data on meta": (data(X.to("meta")), "meta device"),
    "sparse data": (data(X.to_sparse()), "sparse"),
    "positions": (lambda: lbyl.LeastSquares(positions=0), r"positions=0\): must be a whole number of at least 1"),
    "class of moments": (lambda: lbyl.LeastSquares(moments=lbyl.Dream), r"is a class; pass an object, Dream\(\)"),
    "renorm": (lambda: lbyl.LeastSquares(renorm="no"), "renorm='no'"),
    "ridge of NaN": (lambda: lbyl.LBYL(ridge=NAN), r"LBYL\(ridge=nan\): must be at least 0 and finite"),
    "ridge without end": (lambda: lbyl.LeastSquares(ridge=INF), "ridge=inf"),
    "ridge in words": (lambda: lbyl.LeastSquares(ridge="much"), "ridge='much'"),
    "both bounds": (lambda: lbyl.Merge(blend=2), "must lie between 0 and 1"),
    "bn": (lambda: lbyl.Weights(bn=-1.0), "Weights"),
    "blend": (lambda: lbyl.Merge(blend="x"), "blend='x'"),
    "threshold": (lambda: lbyl.Merge(threshold=NAN), "threshold=nan"),
    "learning rate": (lambda: lbyl.Dream(lr=NAN), r"Dream\(lr=nan\): must lie above 0"),
    "half an image": (lambda: lbyl.Dream(images=2.5), "images=2.5"),
    "one image": (lambda: lbyl.Noise(images=1), "images=1"),
    "half a photograph": (lambda: lbyl.Photographs(images=2.5), "images=2.5"),
    "spectrum": (lambda: lbyl.Noise(spectrum=NAN), "spectrum=nan"),
    "samples": (lambda: lbyl.Gaussian(samples=0), "samples=0"),
    "decay": (lambda: lbyl.Gaussian(decay=2.0), "decay=2.0"),
    "a budget in words": (lambda: lbyl.Budget(macs=".5"), "macs='.5'"),
    "a text of globs": (lambda: lbyl.Budget(macs=0.5, exclude="a.*"), "exclude='a"),
    "one budget to sweep": (sweep(budgets=lbyl.Budget(macs=0.5)), "budgets is a Budget; pass a list"),
    "a number of budgets": (sweep(budgets=3), "budgets is an int"),
    "a number for a path": (sweep(path=3), "path is 3"),
    "no function to evaluate": (sweep(evaluate=3), "evaluate is an int"),
    "load a number": (lambda: lbyl.load(3), "path is 3"),
    "load a zero byte": (lambda: lbyl.load("a\0b"), "zero byte"),
    "load into a text": (lambda: lbyl.load("tests/saved_0_1_0/own", "net"), "model is a str"),
    "load into meta": (lambda: lbyl.load("tests/saved_0_1_0/own", mlp().to("meta")), "meta device"),
    "bench of a number": (lambda: lbyl.bench(3, X, against=mlp()), "model is an int"),
    "bench against nothing": (lambda: lbyl.bench(mlp(), X, against=None), "against is a NoneType"),
    "runs in words": (
        lambda: lbyl.bench(mlp(), X, against=mlp(), runs="many"),
        "a spread needs at least 3 runs",
    ),
    "a source of no text": (lambda: lbyl.load_source(3), "3 names no model"),
    "a family that is none": (lambda: lbyl.register(["criterion"], "x", Needy), "unknown family"),
    "a name that is none": (lambda: lbyl.register("criterion", 3, Needy), "pass a name"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(lbyl.InputError, match=message):
        call()


def test_a_registered_class_that_needs_arguments_is_one_clear_error() -> None:
    lbyl.register("criterion", "needy", Needy)
    with pytest.raises(lbyl.InputError, match=r"criterion 'needy' can't be made without arguments .*'needed'"):
        compress(criterion="needy")()


def test_numbers_of_numpy_are_numbers() -> None:
    for share in (np.float64(0.5), np.float32(0.5), {"*": np.float32(0.5)}):
        result = compress(ratio=share, seed=np.int64(3))()
        assert result.report.rows[0].after == result.report.rows[0].before // 2
        assert lbyl.Plan.from_json(result.plan.to_json()).settings["seed"] == 3


def test_as_many_channels_as_fit_into_a_layer_can_be_pruned() -> None:
    wide = nn.Sequential(nn.Linear(2, 90_000), nn.ReLU(), nn.Linear(90_000, 2))
    x = images(2, 2)
    assert (
        lbyl.compress(wide, x, restore="prune", verify=False, forecast=False, ratio=0.5).model[0].out_features == 45_000
    )
    with pytest.raises(lbyl.InputError, match=r"matrix of 15 GiB; leave this group whole .* restore='prune'"):
        lbyl.compress(wide, x, restore="merge", verify=False, ratio=0.5)


def test_modules_within_modules_within_modules(tmp_path: Any) -> None:
    nested: nn.Module = mlp()
    for _ in range(200):
        nested = nn.Sequential(nested)
    result = lbyl.compress(nested, X, restore="lbyl", ratio=0.5)
    loaded = lbyl.load(result.save(tmp_path / "deep"), nested)
    torch.testing.assert_close(loaded(X), result.model(X))
