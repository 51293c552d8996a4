"""Short implementations of other methods that cut neurons of Llama models, for `language.py`.

Each takes a model and calibration tokens, and gives the model with columns of ``down_proj`` zero, which
computes what the cut one does.

- Wanda-sp (An et al. 2024, the structured form of Sun et al. 2024): ``|W_:j| |x_j|``, the same share of each layer's
  neurons.
- FLAP (An et al. 2024): the fluctuation ``|W_:j|^2 Var(x_j)``, brought to one scale layer by layer, decides over the
  neurons of all layers; what went is made up for by a constant, ``W_:j E[x_j]``. Its scale is made for many heads: on
  the three key/value heads of a small model with grouped queries it takes heads first, so they are left whole.
- GRAIL: neurons as Wanda-sp chooses them, and a ridge regression of all neurons on those that stay, layer after layer
  on what the cut model gives so far.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Tokens = Int[Tensor, "sequences tokens"]


@dataclass(frozen=True)
class Seen:
    """What a layer is fed: mean and mean products of its inputs."""

    mean: Tensor
    products: Tensor

    @property
    def power(self) -> Tensor:
        """Mean squares."""
        return self.products.diagonal()

    @property
    def variance(self) -> Tensor:
        """Variances."""
        return (self.power - self.mean.square()).clamp_min(0)


class Watch:
    """Sums over what a linear layer is fed, while it is on."""

    def __init__(self, layer: Any) -> None:
        self.count, self.first, self.second = 0, 0.0, 0.0
        self.hook = layer.register_forward_hook(self._add)

    def _add(self, layer: Any, inputs: Any, output: Any) -> None:
        x = inputs[0].flatten(0, -2).float()
        self.count += len(x)
        self.first, self.second = self.first + x.sum(0).double(), self.second + (x.T @ x).double()

    def done(self) -> Seen:
        """What was seen; the watch is off."""
        self.hook.remove()
        return Seen(self.first / self.count, self.second / self.count)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def watched(model: Any, tokens: Tokens) -> list[Seen]:
    """What ``down_proj`` of each layer is fed."""
    watches = [Watch(layer.mlp.down_proj) for layer in model.model.layers]
    for part in tokens.split(8):
        model.model(input_ids=part, use_cache=False)
    return [watch.done() for watch in watches]


def wanda(model: Any, seen: list[Seen], ratio: float) -> Any:
    """Wanda-sp: ``ratio`` of the neurons of each layer go."""
    model = copy.deepcopy(model)
    for layer, fed in zip(model.model.layers, seen, strict=True):
        drop = lowest(layer.mlp.down_proj.weight, fed, ratio)
        layer.mlp.down_proj.weight.data[:, drop] = 0
    return model


def lowest(weight: Tensor, seen: Seen, ratio: float) -> Tensor:
    """The neurons with the lowest ``|W_:j| |x_j|``."""
    score = weight.double().square().sum(0).sqrt() * seen.power.sqrt()
    return score.argsort()[: round(ratio * len(score))]


def flap(model: Any, seen: list[Seen], ratio: float) -> Any:
    """FLAP: ``ratio`` of all neurons go, more in some layers than in others."""
    model = copy.deepcopy(model)
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    scores = [linear.weight.double().square().sum(0) * fed.variance for linear, fed in zip(layers, seen, strict=True)]
    scores = torch.stack([(score - score.mean()) / score.std() for score in scores])
    gone = torch.zeros(scores.numel(), dtype=torch.bool)
    gone[scores.flatten().argsort()[: round(ratio * scores.numel())]] = True
    for linear, fed, drop in zip(layers, seen, gone.reshape(scores.shape), strict=True):
        constant = linear.weight.double()[:, drop] @ fed.mean[drop]
        linear.bias = torch.nn.Parameter(constant.to(linear.weight.dtype))
        linear.weight.data[:, drop] = 0
    return model


@torch.no_grad()
def grail(model: Any, tokens: Tokens, ratio: float, ridge: float = 1e-3) -> Any:
    """GRAIL: neurons by Wanda-sp, and a ridge regression layer after layer."""
    model = copy.deepcopy(model)
    body = model.model
    places = torch.arange(tokens.shape[1])[None]
    hidden = [body.embed_tokens(part) for part in tokens.split(8)]
    angles = body.rotary_emb(hidden[0], places)

    def through(layer: Any) -> list[Tensor]:
        outs = [layer(h, position_embeddings=angles, position_ids=places, attention_mask=None) for h in hidden]
        return [out[0] if isinstance(out, tuple) else out for out in outs]

    for layer in body.layers:
        watch = Watch(layer.mlp.down_proj)
        through(layer)
        weight, moments = layer.mlp.down_proj.weight, watch.done()
        drop = lowest(weight, moments, ratio)
        stays = torch.ones(weight.shape[1], dtype=torch.bool)
        stays[drop] = False
        keep = stays.nonzero().flatten()
        gram = moments.products[keep][:, keep].clone()
        gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
        share = torch.linalg.solve(gram, moments.products[keep][:, drop])
        weight.data[:, keep] += (weight[:, drop].double() @ share.T).to(weight.dtype)
        weight.data[:, drop] = 0
        hidden = through(layer)
    return model
