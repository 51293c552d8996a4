"""Whether a change of the code changed what comes out: plans, weights, outputs and reports, bit by bit.

    python benchmarks/behavior.py list
    python benchmarks/behavior.py record FILE [--only NAME ...]
    python benchmarks/behavior.py compare FILE [--only NAME ...]

`record` compresses small networks of many families with all kinds of settings and writes what came out into FILE,
which lies outside the checkout: it is true of one machine and one version of torch, and no result. `compare` does the
same again, says case by case what differs, and exits with 1 when anything does. Names may be globs.

Every case is saved as users do, and read back. Left out is what no two runs have in common or what differs on purpose:
seconds (and so a budget of latency, which is measured), and the version of lbyl that a plan and its card name. The
error on purpose of a case that has one is its outcome. `PYTHONPATH=OTHER/src` tries the code of another checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import lbyl

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 3
"""So many differences of a kind are shown, and the others counted."""

Outcome = dict[str, Any]


class UNet(nn.Module):
    """Down twice and up again, with what was seen on the way down beside it. Input 3 x 32 x 32."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second = normed(3, width), normed(width, 2 * width)
        self.middle = normed(2 * width, 4 * width)
        self.wider = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.third, self.last = normed(4 * width, 2 * width), normed(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        y = self.third(torch.cat([self.wider(self.middle(F.max_pool2d(second, 2))), second], 1))
        return self.head(self.last(torch.cat([F.interpolate(y, scale_factor=2.0), first], 1)))


class Residual(nn.Module):
    """A stem, two blocks with a sum, and a classifier. Input 3 x 16 x 16."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = normed(3, width)
        # Without a ReLU behind it, so that the last convolution can make up for what the other operand has lost.
        self.blocks = nn.ModuleList(nn.Sequential(normed(width, 16), normed(16, width)[:2]) for _ in range(2))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.fc(x.mean((2, 3)))


class TwoInputs(nn.Module):
    """An image and a vector are encoded, joined and decoded into a smaller image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.image = nn.Sequential(normed(3, width), nn.Conv2d(width, width, 4, 4), nn.ReLU())
        self.vector = nn.Sequential(nn.Linear(6, 2 * width), nn.GELU(), nn.Linear(2 * width, 8))
        self.decoder = nn.Sequential(nn.ConvTranspose2d(width + 8, width, 2, 2), nn.ReLU(), nn.Conv2d(width, 3, 3))

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        seen = self.image(image)
        known = self.vector(vector)[:, :, None, None].expand(-1, -1, *seen.shape[2:])
        return self.decoder(torch.cat([seen, known], 1))


class InParts(nn.Module):
    """Which way it goes depends on the data, so that only backbone and head can be traced. Input 3 x 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(normed(3, 12), normed(12, 16))
        self.head = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x).mean((2, 3))
        return self.head(y if float(y.sum()) > 0 else -y)


class Stream(nn.Module):
    """A sum that norms are taken over, with and without a mean. Input 5 x 6."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.first, self.second, self.last = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-5), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.gate(self.first(x))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.last(x))


class HardCoded(nn.Module):
    """Knows the width of a layer by heart, which only verification finds out. Input 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.head(y) * (1.0 if y.shape[1] == 8 else 2.0)


class Sums(nn.Module):
    """A sum couples its only group, so that the inner scope has nothing to cut. Input 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x) + self.second(x)))


def normed(inputs: int, outputs: int, **settings: Any) -> nn.Sequential:
    """A 3x3 convolution, a batch norm and a ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **settings)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def grouped() -> nn.Module:
    """Convolutions in groups of channels, and a depthwise one."""
    convolutions = normed(3, 16), normed(16, 16, groups=4), normed(16, 32, groups=2), normed(32, 32, groups=32)
    return nn.Sequential(*convolutions, nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 4))


def group_normed() -> nn.Module:
    """Group norms in place of batch norms."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


def signal() -> nn.Module:
    """An encoder and a decoder of signals: 1-D convolutions with other activations."""
    down = nn.Conv1d(2, 12, 5, 2, 2), nn.BatchNorm1d(12), nn.ELU(), nn.Conv1d(12, 20, 5, 2, 2), nn.Tanh()
    up = nn.ConvTranspose1d(20, 12, 4, 2, 1), nn.LeakyReLU(0.1), nn.ConvTranspose1d(12, 2, 4, 2, 1)
    return nn.Sequential(*down, *up)


def computed() -> nn.Module:
    """Convolutions that compute their weight on the fly."""
    from timm.layers.std_conv import StdConv2d

    layers = StdConv2d(3, 16, 3, padding=1), nn.ReLU(), StdConv2d(16, 24, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def broken() -> nn.Module:
    """A weight that nothing can be restored from."""
    net = perceptron()
    net.get_parameter("2.weight").data[3, 4] = float("nan")
    return net


def densenet() -> nn.Module:
    import torchvision

    return torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)


def swin() -> nn.Module:
    import torchvision

    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [3, 3], [4, 4], num_classes=10)


def detector() -> nn.Module:
    """A Faster R-CNN with a small backbone."""
    import torchvision
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone: Any = torchvision.models.mobilenet_v3_small(weights=None).features[:4]
    backbone.out_channels = 24
    return torchvision.models.detection.FasterRCNN(
        backbone,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 1),
        min_size=64,
        max_size=64,
    )


def of_torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def of_timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)


def of_transformers(kind: str, config: str, **sizes: Any) -> nn.Module:
    """A model of transformers from a configuration, with random weights."""
    import transformers

    tokens = {"vocab_size": 60, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, kind)(getattr(transformers, config)(**tokens, **sizes))


def digits() -> nn.Module:
    """The trained network of the examples."""
    return digits_example().load()


def digits_example() -> Any:
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return import_module("digits.network")


def seen_digits() -> lbyl.Data:
    """Real inputs for the network of the examples."""
    return lbyl.Data(digits_example().data(train=True)[0][:192].split(48), batches=4)


def some(*shape: int) -> Callable[[], Tensor]:
    """Inputs of this shape."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def one_digit() -> Tensor:
    return digits_example().data()[0][:1]


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": tokens()["input_ids"], "decoder_input_ids": tokens()["input_ids"][:, :4]}


def image_and_vector() -> dict[str, Tensor]:
    return {"image": some(1, 3, 16, 16)(), "vector": some(1, 6)()}


def one_photograph() -> tuple[list[Tensor]]:
    return ([some(3, 64, 64)().sigmoid()],)


@dataclass(frozen=True)
class LargestWeight:
    """A criterion of the user's own."""

    power: float

    def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
        return filters.abs().amax(1) ** self.power


@dataclass(frozen=True)
class Case:
    """A network, what it is called with, and the arguments of `lbyl.compress`, or with budgets of `lbyl.sweep`.

    All three are made when the case's turn comes, after the seed is set.
    """

    network: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    settings: Callable[[], dict[str, Any]]


def least_squares(moments: Any, **settings: Any) -> lbyl.LeastSquares:
    """Least squares on few positions, which is what takes the time."""
    return lbyl.LeastSquares(moments=moments, **{"positions": 2000, **settings})


BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
LLAMA = {**BERT, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4}
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_heads": 4, "num_layers": 1, "decoder_start_token_id": 0}
DIGITS = "examples/digits/network.py:load"
PART = {"criterion": "l1", "scope": "all", "submodule": "backbone"}

CASES: dict[str, Case] = {
    # The network that has been trained, with what users are most likely to ask for.
    "digits-auto": Case(digits, one_digit, lambda: {"seed": 3, "source": DIGITS}),
    "digits-data": Case(
        digits,
        one_digit,
        lambda: {"restore": least_squares(seen_digits()), "criterion": "l1", "ratio": {"*": 0.25, "9": 0.6}},
    ),
    "digits-lbyl": Case(
        digits, one_digit, lambda: {"restore": lbyl.LBYL(bn=0.01, center=True), "criterion": "gm", "ratio": 0.6}
    ),
    "digits-coreset": Case(digits, one_digit, lambda: {"restore": "coreset", "seed": 5, "verify": False}),
    "digits-sweep": Case(
        digits,
        one_digit,
        lambda: {
            "budgets": [lbyl.Budget(macs=0.6), lbyl.Budget(params=0.4, round_to=4), lbyl.Budget(size_mb=0.05)],
            "restore": least_squares(lbyl.Noise(images=32)),
            "source": DIGITS,
        },
    ),
    # The families of the coverage tests.
    "resnet": Case(
        partial(of_torchvision, "resnet18"),
        some(1, 3, 64, 64),
        lambda: {"ratio": 0.25, "scope": "all", "restore": "prune", "source": "torchvision:resnet18"},
    ),
    "densenet": Case(densenet, some(1, 3, 64, 64), lambda: {"ratio": 0.25, "scope": "all", "restore": "lbyl"}),
    "mobilenet": Case(
        partial(of_torchvision, "mobilenet_v3_small"),
        some(1, 3, 64, 64),
        lambda: {"budget": lbyl.Budget(macs=0.8), "restore": least_squares(lbyl.Dream(images=4, steps=3))},
    ),
    "regnet": Case(
        partial(of_timm, "regnety_002"),
        some(1, 3, 64, 64),
        lambda: {"ratio": 0.25, "scope": "all", "restore": "merge", "criterion": "random", "seed": 7},
    ),
    "shufflenet": Case(
        partial(of_torchvision, "shufflenet_v2_x0_5"),
        some(1, 3, 64, 64),
        lambda: {"ratio": 0.25, "scope": "all", "restore": least_squares(lbyl.Noise(images=8))},
    ),
    "resnest": Case(
        partial(of_timm, "resnest14d", stem_width=8),
        some(1, 3, 64, 64),
        lambda: {"ratio": {"*": 0.25, "layer4*": 0.5}, "scope": "all", "restore": "prune", "criterion": "l1"},
    ),
    "res2net": Case(
        partial(of_timm, "res2net50_26w_4s", base_width=8),
        some(1, 3, 32, 32),
        lambda: {"ratio": 0.25, "scope": "all", "restore": "lbyl"},
    ),
    "vit": Case(
        partial(of_timm, "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=96),
        some(1, 3, 64, 64),
        lambda: {"ratio": 0.25, "scope": "all", "restore": least_squares(lbyl.Noise(images=16))},
    ),
    "swin": Case(
        swin,
        some(1, 3, 32, 32),
        lambda: {"ratio": {"*": 0.25}, "scope": "all", "restore": least_squares(lbyl.Photographs(images=8))},
    ),
    "bert": Case(
        partial(of_transformers, "BertForSequenceClassification", "BertConfig", **BERT),
        tokens,
        lambda: {"ratio": 0.25, "scope": "all", "restore": least_squares(lbyl.Noise(images=32))},
    ),
    "gpt2": Case(
        partial(of_transformers, "GPT2LMHeadModel", "GPT2Config", **GPT2),
        tokens,
        lambda: {
            "budget": lbyl.Budget(params=0.7, exclude=("*c_attn",)),
            "scope": "all",
            "restore": least_squares(lbyl.Noise(images=32)),
        },
    ),
    "llama": Case(
        partial(of_transformers, "LlamaForCausalLM", "LlamaConfig", **LLAMA),
        tokens,
        lambda: {"ratio": 0.25, "scope": "all", "restore": "prune", "criterion": "gm"},
    ),
    # Two inputs, what has two halves, and what can't be traced whole.
    "t5": Case(
        partial(of_transformers, "T5ForConditionalGeneration", "T5Config", **T5),
        two_texts,
        lambda: {"ratio": 0.25, "scope": "all", "restore": least_squares(lbyl.Noise(images=16), sequential=False)},
    ),
    "two-inputs": Case(
        TwoInputs,
        image_and_vector,
        lambda: {"ratio": 0.4, "restore": least_squares(lbyl.Noise(images=16), solve="mix")},
    ),
    "unet": Case(
        UNet,
        some(1, 3, 32, 32),
        lambda: {
            "budget": lbyl.Budget(params=0.6, round_to=2, min_keep=4, max_ratio=0.7),
            "restore": least_squares(lbyl.Dream(images=8, steps=4, photographs=False)),
            "seed": 2,
        },
    ),
    "signal": Case(
        signal, some(1, 2, 32), lambda: {"restore": least_squares(lbyl.Dream(images=8, steps=4)), "ratio": 0.3}
    ),
    "detector": Case(detector, one_photograph, lambda: {"ratio": 0.25, "scope": "all", "restore": "prune"}),
    "detector-backbone": Case(
        detector,
        one_photograph,
        lambda: {**PART, "ratio": 0.25, "restore": least_squares(lbyl.Noise(images=4), sequential=False)},
    ),
    "in-parts": Case(
        InParts,
        some(2, 3, 16, 16),
        lambda: {"ratio": {"*": 0.25, "head.*": 0.5}, "restore": least_squares(lbyl.Noise(images=16))},
    ),
    # Norms, groups of channels, sums; where moments come from and how they are solved.
    "group-norm": Case(group_normed, some(1, 3, 16, 16), lambda: {"ratio": 0.25}),
    "stream": Case(
        Stream,
        some(2, 5, 6),
        lambda: {"ratio": {"*": 0.5, "stem": 0.25}, "scope": "all", "restore": least_squares(lbyl.Noise(images=32))},
    ),
    "grouped": Case(grouped, some(1, 3, 16, 16), lambda: {"ratio": 0.5, "restore": least_squares(lbyl.Gaussian())}),
    "weights": Case(
        UNet, some(1, 3, 32, 32), lambda: {"restore": least_squares(lbyl.Weights(), solve="mix"), "criterion": "l1"}
    ),
    "computed-weights": Case(computed, some(1, 3, 16, 16), lambda: {"restore": least_squares(lbyl.Weights())}),
    "in-turn": Case(
        Residual,
        some(1, 3, 16, 16),
        lambda: {
            "scope": "all",
            "restore": least_squares(lbyl.Noise(images=16), sequential=True, prior=0.2, ridge=0.01),
        },
    ),
    "dreamed": Case(
        Residual,
        some(1, 3, 16, 16),
        lambda: {"scope": "all", "restore": least_squares(lbyl.Dream(images=8, steps=3), renorm=False), "seed": 11},
    ),
    "little-memory": Case(
        Residual,
        some(1, 3, 16, 16),
        lambda: {"restore": least_squares(lbyl.Noise(images=16), memory=2**18, budget=2**14), "seed": 4},
    ),
    "own-criterion": Case(
        UNet, some(1, 3, 32, 32), lambda: {"ratio": 0.3, "criterion": LargestWeight(2.0), "restore": "lbyl"}
    ),
    "merge": Case(perceptron, some(1, 6), lambda: {"restore": lbyl.Merge(threshold=None), "criterion": lbyl.L2()}),
    "hard-coded": Case(
        HardCoded, some(2, 6), lambda: {"restore": least_squares(lbyl.Noise(images=64)), "scope": "all"}
    ),
    # Errors on purpose.
    "error-coupled": Case(Sums, some(1, 8), dict),
    "error-name": Case(perceptron, some(1, 6), lambda: {"ratio": {"nobody.*": 0.5}, "restore": "lbyl"}),
    "error-weights": Case(broken, some(1, 6), dict),
    "error-strict": Case(InParts, some(2, 3, 16, 16), lambda: {"strict": True, "restore": "prune"}),
    "error-hard-coded": Case(HardCoded, some(2, 6), lambda: {"strict": True, "restore": "lbyl"}),
    "error-budget": Case(perceptron, some(1, 6), lambda: {"budget": lbyl.Budget(params=0.001)}),
    "error-dream": Case(group_normed, some(1, 3, 16, 16), lambda: {"restore": least_squares(lbyl.Dream(images=4))}),
}


def lively(net: nn.Module) -> nn.Module:
    """Batch norms with statistics, for what is multiplied by one and added to zero hides mistakes."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                if module.running_var is not None:
                    module.running_var.uniform_(0.6, 1.4)
                module.weight.uniform_(0.6, 1.4)
                module.bias.normal_(0, 0.2)
    return net


def outcome(case: Case, place: Path) -> Outcome:
    """What comes of one case, as plain data."""
    torch.manual_seed(0)
    net = case.network().eval()
    net, x, settings = (net if case.network is digits else lively(net)), case.inputs(), case.settings()
    try:
        if "budgets" in settings:
            return swept(net, x, settings, place)
        asked: dict[str, Any] = settings if "budget" in settings else {"ratio": 0.5, **settings}
        result = lbyl.compress(net, x, **asked)
        found = saved(result.save(place), net, x)
        found["output"] = outputs(result.model, x)
        found["weights"] = {name: described(tensor) for name, tensor in result.model.state_dict().items()}
        found["modules"] = str(result.model).splitlines()
    except lbyl.LbylError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return plain(found)


def swept(net: nn.Module, x: Any, settings: dict[str, Any], place: Path) -> Outcome:
    """What a sweep makes: its own table, and the folder of every point."""
    found = lbyl.sweep(net, x, path=place, **settings).to_dict()
    points = {point["name"]: saved(place / point["name"], net, x) for point in found["points"] if point["made"]}
    return plain({"sweep": {**without_seconds(found), "path": "."}, **points})


def saved(folder: Path, fresh: nn.Module, x: Any) -> Outcome:
    """What a saved folder holds for people and machines, and what is loaded from it."""
    plan = json.loads((folder / "lbyl.json").read_text(encoding="utf-8"))["plan"]
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    version = plan.pop("library")
    card = (folder / "README.md").read_text(encoding="utf-8").replace(f"by lbyl {version}", "by lbyl")
    loaded = lbyl.load(folder, fresh)
    return {
        "plan": plan,
        "report": without_seconds(document["report"]),
        "load": document["load"],
        "card": card.splitlines(),
        "loaded": {
            "output": outputs(loaded, x),
            **{name: described(tensor) for name, tensor in loaded.state_dict().items()},
        },
    }


def without_seconds(data: Any) -> Any:
    """The same without what was timed, at any depth."""
    if isinstance(data, dict):
        return {key: without_seconds(value) for key, value in data.items() if key != "seconds"}
    return [without_seconds(item) for item in data] if isinstance(data, (list, tuple)) else data


def plain(data: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(data))


@torch.no_grad()
def outputs(net: nn.Module, x: Any) -> list[dict[str, Any]]:
    """What a network makes of an input."""
    torch.manual_seed(1)
    found = net(**x) if isinstance(x, dict) else net(*x) if isinstance(x, tuple) else net(x)
    return [described(leaf) for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def described(tensor: Tensor) -> dict[str, Any]:
    """All bits of a tensor as a hash, and a few numbers to see how far two of them are apart."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return {
        "sha256": hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest(),
        "dtype": str(values.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "norm": float(values.double().norm()),
        "first": values[:3].tolist(),
    }


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where two outcomes differ, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        if "sha256" in before and "sha256" in after:
            if before != after:
                yield f"{path}: {tensor_in_words(before)} → {tensor_in_words(after)}"
            return
        for key in [*before, *(key for key in after if key not in before)]:
            here = f"{path}.{key}".lstrip(".")
            if key not in after or key not in before:
                yield f"{here}: {'gone' if key in before else 'new'}"
            else:
                yield from differences(before[key], after[key], here)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{path}: {len(before)} → {len(after)} items"
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences(one, other, f"{path}[{number}]")
    elif json.dumps(before) != json.dumps(after):  # nan equals nan there, and 1 is not 1.0
        yield f"{path}: {json.dumps(before, ensure_ascii=False)} → {json.dumps(after, ensure_ascii=False)}"


def tensor_in_words(tensor: dict[str, Any]) -> str:
    sizes = "x".join(map(str, tensor["shape"])) or "scalar"
    return f"{tensor['dtype']} {sizes}, norm {tensor['norm']!r}, first {tensor['first']}"


def report(name: str, before: Outcome | None, after: Outcome, seconds: float) -> bool:
    """Say what differs in one case; whether nothing does."""
    parts = {key: list(differences((before or {}).get(key), after.get(key))) for key in {**(before or {}), **after}}
    differing = {key: found for key, found in parts.items() if found}
    verdict = "not recorded" if before is None else "DIFFERS" if differing else "same"
    print(f"{name:20} {seconds:5.1f} s  {verdict}", flush=True)
    for key, found in differing.items() if before is not None else ():
        print(f"    {key}: {len(found)} {'difference' if len(found) == 1 else 'differences'}")
        for line in found[:SHOWN]:
            print(f"        {line.lstrip(': ')}"[:400])
    return verdict == "same"


def environment() -> dict[str, str]:
    """What outcomes may differ by besides the code."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "python": sys.version.split()[0], "processor": capability}


def chosen(patterns: Sequence[str]) -> list[str]:
    """The cases that the patterns name, in order; all without patterns."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            sys.exit(f"error: no case {pattern!r}; `list` lists them")
    return [name for name in CASES if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def timed(name: str) -> tuple[Outcome, float]:
    """What comes of a case, and how long it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        found = outcome(CASES[name], Path(place) / "saved")
    return found, time.perf_counter() - started


def record(file: Path, names: list[str]) -> int:
    """Write what comes out now."""
    if file.resolve().is_relative_to(ROOT):
        sys.exit(f"error: {file} lies in the checkout {ROOT}; a recording is no part of it, choose another place")
    if not file.resolve().parent.is_dir():
        sys.exit(f"error: {file.resolve().parent} is not a folder; create it first")
    cases: dict[str, Outcome] = {}
    for name in names:
        cases[name], seconds = timed(name)
        print(f"{name:20} {seconds:5.1f} s  {cases[name].get('error', 'recorded')[:200]}", flush=True)
    file.write_text(json.dumps({"environment": environment(), "cases": cases}) + "\n", encoding="utf-8")
    print(f"{len(cases)} cases in {file}")
    return 0


def compare(file: Path, names: list[str]) -> int:
    """Say what comes out otherwise than it did; 1 where something does."""
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        before, elsewhere = recorded["cases"], recorded["environment"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {file} holds no recording: {error}")
    for line in differences(elsewhere, environment()):
        print(f"note: recorded elsewhere, so differences may not be the code's: {line}")
    same = [report(name, before.get(name), *timed(name)) for name in names]
    gone = [name for name in before if name not in CASES]
    for name in gone:
        print(f"{name:20} recorded, but no case any more")
    print(f"{sum(same)} of {len(same)} cases are the same")
    return 0 if all(same) and not gone else 1


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the names of the cases")
    for name, what in (("record", "write what comes out"), ("compare", "say what differs from a recording")):
        command = commands.add_parser(name, help=what)
        command.add_argument("file", type=Path, help="the recording, outside the checkout")
        command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these cases, or globs")
    asked = parser.parse_args()
    if asked.command == "list":
        print("\n".join(CASES))
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"lbyl of {Path(lbyl.__file__).parent}")
    return {"record": record, "compare": compare}[asked.command](asked.file, chosen(asked.only))


if __name__ == "__main__":
    sys.exit(main())
