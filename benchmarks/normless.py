"""Digits networks without batch norms: what is left at half of the channels without data, and with a little.

    python benchmarks/normless.py [--seeds 3] [--network NAME] [--fresh]

Networks of a few layers with group, instance and layer norms or none at all, ReLU, GELU and PReLU, in one, two and
three dimensions, and a small ViT, trained here on scikit-learn's digits but those that the examples hold out. Prune is
plain pruning by L2, Default is `lbyl.compress` with nothing asked of it, Data is the same on 64 images of the training
set (16 more are held out). Choices in lbyl were made on seeds 0 and 1 of plain_gn, plain_in, plain_none, plain_prelu
and res_none; the other networks, and seed 2 of all, confirm them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from networks import digits, held_out_digits
from output import Run, Table, known_cells
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import lbyl

RATIO = 0.5
METHODS = ("Prune", "Default", "Data")
WIDTH = 32
Make = Callable[[int], nn.Module]


class LayerNorm2d(nn.Module):
    """A layer norm over channels at each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, norm: Make, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), norm(WIDTH)
        self.conv2, self.norm2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), norm(WIDTH)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


class Attention(nn.Module):
    """One layer of a transformer, norms first."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.out(seen)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Three layers on patches of two by two pixels."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(1, width, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Attention(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.layers(x)).mean(1))


class Reshaped(nn.Module):
    """A network in one or three dimensions that is given images."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, pool = (nn.Conv1d, nn.AdaptiveAvgPool1d) if dims == 1 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
        layers: list[nn.Module] = []
        for inputs in (1, WIDTH, WIDTH):
            layers += [conv(inputs, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.ReLU()]
        self.body = nn.Sequential(*layers, pool(4 if dims == 1 else 2))
        self.shape = (64,) if dims == 1 else (4, 4, 4)
        self.head = nn.Linear(WIDTH * (4 if dims == 1 else 8), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(len(x), 1, *self.shape)).flatten(1))


def residual(norm: Make, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Three residual blocks."""
    stem = nn.Conv2d(1, WIDTH, 3, padding=1), norm(WIDTH), act()
    blocks = Block(norm, act), nn.MaxPool2d(2), Block(norm, act), Block(norm, act)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def plain(norm: Make, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Five convolutions in a row."""
    layers: list[nn.Module] = []
    for number, inputs in enumerate((1, WIDTH, WIDTH, WIDTH, WIDTH)):
        layers += [nn.Conv2d(inputs, WIDTH, 3, padding=1), norm(WIDTH), act()]
        if number == 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def group(channels: int) -> nn.Module:
    """Eight groups."""
    return nn.GroupNorm(8, channels)


def instance(channels: int) -> nn.Module:
    """With weights."""
    return nn.InstanceNorm2d(channels, affine=True)


def none(channels: int) -> nn.Module:
    """No norm."""
    return nn.Identity()


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "res_gn": ("residual, group norm", lambda: residual(group), "inner"),
    "plain_gn": ("plain, group norm", lambda: plain(group), "inner"),
    "plain_in": ("plain, instance norm", lambda: plain(instance), "inner"),
    "res_ln": ("residual, LayerNorm2d, scope all", lambda: residual(LayerNorm2d), "all"),
    "plain_none": ("plain, ReLU", lambda: plain(none), "inner"),
    "res_none": ("residual, ReLU", lambda: residual(none), "inner"),
    "plain_gelu": ("plain, GELU", lambda: plain(none, nn.GELU), "inner"),
    "res_gelu": ("residual, GELU", lambda: residual(none, nn.GELU), "inner"),
    "plain_prelu": ("plain, PReLU", lambda: plain(none, nn.PReLU), "inner"),
    "one": ("1-D, group norm", lambda: Reshaped(1), "inner"),
    "three": ("3-D, group norm", lambda: Reshaped(3), "inner"),
    "vit": ("ViT", ViT, "inner"),
    "vit_all": ("ViT, scope all", ViT, "all"),
}


def trained(make: Callable[[], nn.Module], seed: int, epochs: int = 25) -> nn.Module:
    """A network, trained on the digits that are not held out."""
    images = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
        steps = epochs * -(-len(images.labels) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images.labels)).split(64):
                down, right = torch.randint(-1, 2, (2,)).tolist()
                x = torch.roll(images.pixels[chosen], (down, right), (2, 3))
                optimizer.zero_grad()
                functional.cross_entropy(net(x), images.labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return net.eval()


def restorer(method: str, seed: int, pixels: Tensor | None = None) -> Any:
    """What goes into ``restore``; data are some of ``pixels``, by default of the digits."""
    if method != "Data":
        return {"Prune": "prune", "Default": "auto"}[method]
    pixels = digits().pixels if pixels is None else pixels
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:80]
    return lbyl.LeastSquares(moments=lbyl.Data(list(pixels[chosen].split([32, 32, 16])), batches=3))


def tabulate(run: Run) -> None:
    """A row a network, the mean over the seeds; and the seeds one by one."""
    rows, single = [], []
    for name, (title, _, _) in NETWORKS.items():
        cells = [cell for cell in run.measurements if cell["network"] == name]
        whole = [cell["accuracy"] for cell in cells if cell["method"] == "Unpruned"]
        found = {method: [c["accuracy"] for c in cells if c["method"] == method] for method in METHODS}
        if all(found.values()):
            rows.append([title, mean(whole), *(mean(found[method]) for method in METHODS)])
        for seed in sorted({cell["seed"] for cell in cells}):
            at = {cell["method"]: cell["accuracy"] for cell in cells if cell["seed"] == seed}
            single.append([f"{title}, seed {seed}", *(at.get(method) for method in ("Unpruned", *METHODS))])
    note = "Top-1 on 597 digits in percent at half of the channels, the mean over the seeds."
    run.tables = [Table("Digits networks without batch norms", ["network", "unpruned", *METHODS], rows, note)]
    run.details = [Table("Seed by seed", ["network", "unpruned", *METHODS], single)]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many networks of each kind.")] = 3,
    network: Annotated[list[str] | None, typer.Option(help="One of NETWORKS; may be given again. All without.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks.")] = False,
) -> None:
    """Fill the table network by network."""
    console, names, test = Console(), network or list(NETWORKS), held_out_digits()
    run = Run("normless", "Networks without batch norms", "python benchmarks/normless.py", pieced=True)
    run.settings = {"seeds": seeds, "ratio": RATIO}
    run.measurements = [cell for cell in known_cells("normless") if not (fresh and cell["network"] in names)]
    for seed in range(seeds):
        for name in names:
            known = {cell["method"] for cell in run.measurements if (cell["network"], cell["seed"]) == (name, seed)}
            if known >= {"Unpruned", *METHODS}:
                continue
            _, make, scope = NETWORKS[name]
            net = trained(make, seed)
            told = []
            for method in ("Unpruned", *METHODS):
                if method == "Unpruned":
                    smaller = net
                else:
                    smaller = lbyl.compress(
                        net,
                        test.pixels[:1],
                        ratio=RATIO,
                        scope=scope,
                        restore=restorer(method, seed),
                        seed=seed,
                        forecast=False,
                    ).model
                found = test.accuracy(smaller)
                cell = {"network": name, "seed": seed, "method": method, "accuracy": found, "lbyl": version("lbyl")}
                run.measurements.append(cell)
                told.append(f"{method} {found:.2f}")
            console.print(f"{name:12} seed {seed}  {', '.join(told)}")
            run.join(names)
            run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
