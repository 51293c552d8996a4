"""Plans of the largest language models are small documents, and what is not such a document is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import images, mlp
from torch import nn

import lbyl
from lbyl.pipeline.layerwise.whole import check_plan_fits
from lbyl.runtime.documents import document_text, parse_json
from lbyl.surgery.cuts import Cut
from lbyl.surgery.packed import SHORT, Unpacking, packed
from lbyl.surgery.plan import GroupPlan, Plan

NETWORK = mlp(6, 8)
PLAN = lbyl.compress(NETWORK, images(2, 6), ratio=0.5, restore="prune").plan


@pytest.mark.parametrize(
    "keep",
    [
        (),
        (0,),
        tuple(range(SHORT)),
        tuple(range(SHORT + 1)),
        tuple(range(7, 2000, 3)),
        (*range(100), 10**6),
        tuple(range(100, 0, -1)),
    ],
    ids=lambda keep: f"{len(keep)} channels",
)
def test_channels_come_back(keep: tuple[int, ...]) -> None:
    text = packed(keep)
    assert isinstance(text, str) == (len(keep) > SHORT and keep == tuple(sorted(keep)))
    assert tuple(Unpacking().channels(text) if isinstance(text, str) else text) == keep
    plan = replace(PLAN, groups=(GroupPlan("0", 2 * 10**6, keep),), cuts=(Cut("0.weight", 0, 2 * 10**6, keep),))
    document = json.loads(json.dumps(plan.to_document()))
    if keep and keep == tuple(sorted(keep)):
        assert Plan.from_dict(document) == plan
    else:
        with pytest.raises(lbyl.ArtifactError, match="keeps"):
            Plan.from_dict(document)


def keeps(size: int, seed: int) -> tuple[int, ...]:
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: size * 4 // 5]
    return tuple(chosen.sort().values.tolist())


def llama(layers: int, width: int, neurons: int) -> Iterator[tuple[GroupPlan, list[Cut]]]:
    """Groups and cuts of a decoder of which every layer loses a fifth."""
    for index in range(layers):
        rows, columns = keeps(neurons, index), keeps(width, index)
        for name, size, keep, out in (("mlp", neurons, rows, "down"), ("attn", width, columns, "o")):
            start = f"model.layers.{index}.{name}"
            cuts = [Cut(f"{start}.{part}_proj.weight", int(part == out), size, keep) for part in ("a", "b", out)]
            yield GroupPlan(start, size, keep), cuts


@pytest.mark.parametrize(
    ("layers", "width", "neurons"), [(32, 4096, 11008), (80, 8192, 28672)], ids=["7 billion", "70 billion"]
)
def test_the_plan_of_a_large_language_model_can_be_saved(layers: int, width: int, neurons: int) -> None:
    made = list(llama(layers, width, neurons))
    plan = replace(PLAN, groups=tuple(g for g, _ in made), cuts=tuple(cut for _, cuts in made for cut in cuts))
    text = document_text(plan.to_document(), "it")
    assert len(text) < 2.5 * 2**20
    assert Plan.from_dict(parse_json(text.encode(), "it")) == plan


def test_layers_whose_plan_could_not_be_saved_are_refused_before_they_take_time() -> None:
    with torch.device("meta"):
        check_plan_fits(nn.ModuleList(nn.Linear(8192, 28672) for _ in range(240)))
        with pytest.raises(lbyl.InputError, match=r"a plan of 28 MiB .* 8 MiB can be read back"):
            check_plan_fits(nn.ModuleList(nn.Linear(8192, 28672) for _ in range(2400)))


def bits(count: int) -> str:
    return base64.b64encode(b"\xff" * (count // 8)).decode()


DAMAGES: dict[str, tuple[Any, str]] = {
    "no base64": ("all", r"no channels .* - at `\$\.groups\[0\]\.keep`"),
    "other letters": ("é" * 8, "no channels"),
    "beyond the group": (bits(4096), "keeps"),
    "nothing": ("", "keeps"),
    "more than fits into memory": (bits(2**25), "no channels .more than 16,777,216"),
    "a number": (5, "damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_stands_for_no_channels(name: str) -> None:
    keep, words = DAMAGES[name]
    data = PLAN.to_document()
    data["groups"][0]["keep"] = keep
    with pytest.raises(lbyl.ArtifactError, match=words):
        Plan.from_dict(data)
    assert data["groups"][0]["keep"] == keep


def test_texts_of_one_document_are_bounded_together() -> None:
    data = PLAN.to_document()
    data["cuts"] = [{**data["cuts"][0], "keep": bits(8 * (2**18 - number))} for number in range(16)]
    with pytest.raises(lbyl.ArtifactError, match=r"more than 16,777,216 channels.*\$\.cuts\[8\]"):
        Plan.from_dict(data)


def test_a_saved_folder_with_many_channels(tmp_path: Any) -> None:
    net = mlp(6, 300, 300)
    result = lbyl.compress(net, images(2, 6), ratio=0.5, restore="prune")
    folder = result.save(tmp_path / "small")
    plan = json.loads((folder / "lbyl.json").read_text())["plan"]
    assert isinstance(plan["groups"][0]["keep"], str)
    assert json.loads((folder / "report.json").read_text())["plan"]["groups"][0]["keep"] == list(
        result.plan.groups[0].keep
    )
    x = images(2, 6)
    assert torch.equal(lbyl.load(folder, net)(x), result.model(x))
