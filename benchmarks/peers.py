"""Short implementations of other methods that cut neurons and heads of Llama models, for `language.py`.

Each takes a model and calibration tokens, and gives the model with columns of ``down_proj`` and ``o_proj`` zero, which
computes what the cut one does. Heads go as key/value heads with all of their queries.

- Wanda-sp (An et al. 2024, the structured form of Sun et al. 2024): ``|W_:j| |x_j|``, the same share of each layer's
  neurons.
- FLAP (An et al. 2024): the fluctuation ``|W_:j|^2 Var(x_j)``, brought to one scale layer by layer, decides over all
  layers, neurons and heads; what went is made up for by a constant, ``W_:j E[x_j]``.
- GRAIL: neurons as Wanda-sp chooses them, and a ridge regression of all neurons on those that stay, layer after layer
  on what the cut model gives so far.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
def watched(model: Any, tokens: Tokens) -> list[tuple[Seen, Seen]]:
    """What ``down_proj`` and ``o_proj`` of each layer are fed."""
    watches = [(Watch(layer.mlp.down_proj), Watch(layer.self_attn.o_proj)) for layer in model.model.layers]
    for part in tokens.split(8):
        model.model(input_ids=part, use_cache=False)
    return [(mlp.done(), attention.done()) for mlp, attention in watches]


def wanda(model: Any, seen: list[tuple[Seen, Seen]], ratio: float) -> Any:
    """Wanda-sp: ``ratio`` of the neurons of each layer go."""
    model = copy.deepcopy(model)
    for layer, (mlp, _) in zip(model.model.layers, seen, strict=True):
        drop = lowest(layer.mlp.down_proj.weight, mlp, ratio)
        layer.mlp.down_proj.weight.data[:, drop] = 0
    return model


def lowest(weight: Tensor, seen: Seen, ratio: float) -> Tensor:
    """The neurons with the lowest ``|W_:j| |x_j|``."""
    score = weight.double().square().sum(0).sqrt() * seen.power.sqrt()
    return score.argsort()[: round(ratio * len(score))]


def flap(model: Any, seen: list[tuple[Seen, Seen]], share: float) -> Any:
    """FLAP: neurons and heads that hold ``share`` of the layers' parameters go."""
    model, config = copy.deepcopy(model), model.config
    size = config.head_dim * config.num_attention_heads // config.num_key_value_heads
    hidden = config.hidden_size
    scores, costs, places = [], [], []
    for number, (layer, fed) in enumerate(zip(model.model.layers, seen, strict=True)):
        for kind, linear, moments in zip("mh", (layer.mlp.down_proj, layer.self_attn.o_proj), fed, strict=True):
            score = linear.weight.double().square().sum(0) * moments.variance
            width = 1 if kind == "m" else size
            score = score.reshape(-1, width).mean(1)
            scores.append((score - score.mean()) / score.std().clamp_min(1e-30))
            cost = 3 * hidden if kind == "m" else 2 * hidden * (size + config.head_dim)
            costs.append(torch.full((len(score),), float(cost)))
            places += [(number, kind, unit, width) for unit in range(len(score))]
    order = torch.cat(scores).argsort()
    spent = torch.cat(costs)[order].cumsum(0)
    total = sum(p.numel() for p in model.model.layers.parameters())
    gone: dict[tuple[int, str], list[int]] = {}
    for index in order[spent <= share * total].tolist():
        number, kind, unit, width = places[index]
        gone.setdefault((number, kind), []).extend(range(unit * width, (unit + 1) * width))
    for (number, kind), columns in gone.items():
        layer, fed = model.model.layers[number], seen[number]
        linear, moments = (layer.mlp.down_proj, fed[0]) if kind == "m" else (layer.self_attn.o_proj, fed[1])
        constant = linear.weight.double()[:, columns] @ moments.mean[columns]
        linear.bias = torch.nn.Parameter(constant.to(linear.weight.dtype))
        linear.weight.data[:, columns] = 0
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


PEERS: dict[str, Callable[..., Any]] = {"Wanda-sp": wanda, "FLAP": flap, "GRAIL": grail}
