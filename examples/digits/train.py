"""Train the digits network, write its weights, and show what halving its layers costs.

    python examples/digits/train.py              # train (seconds), write digits.safetensors, print a table
    python examples/digits/train.py --seeds 5    # the table for five trainings; writes nothing

Strong regularization (dropout of whole channels, weight decay) is on purpose: it makes filters redundant, as
they are in large networks. With `--dropout 0 --decay 5e-4` Merge restores this network better than LBYL.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich import print as show
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl

sys.path.insert(0, str(Path(__file__).parent))
from network import WEIGHTS, accuracy, data, network

RESTORERS = {"pruned": lbyl.Prune(), "Merge": lbyl.Merge(), "LBYL": lbyl.LBYL()}


def train(seed: int, dropout: float | None, decay: float, epochs: int) -> nn.Module:
    """Train from scratch; equal arguments give equal weights on one machine."""
    torch.manual_seed(seed)
    net, (images, labels) = network().train(), data(train=True)
    for module in net.modules():
        if isinstance(module, nn.Dropout2d) and dropout is not None:
            module.p = dropout
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(shifted(images[batch])), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def shifted(images: Tensor) -> Tensor:
    """Move a batch by up to one pixel either way."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(images, (dy, dx), (2, 3))


def accuracies(net: nn.Module, ratio: float) -> list[float]:
    """Held-out accuracy of the whole network, then of the pruned one under each restorer."""
    example = data()[0][:1]
    smaller = [lbyl.compress(net, example, ratio=ratio, restore=r).model for r in RESTORERS.values()]
    return [accuracy(item) for item in (net, *smaller)]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="train this often and print the table only")
    parser.add_argument("--dropout", type=float, help="share of the channels dropped in training (0.4)")
    parser.add_argument("--decay", type=float, default=0.02, help="weight decay (%(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training digits (%(default)s)")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the channels to prune (%(default)s)")
    options = parser.parse_args()
    # One thread: sums are then added in one order.
    torch.set_num_threads(1)

    rows: list[list[float]] = []
    for seed in range(options.seeds or 1):
        net = train(seed, options.dropout, options.decay, options.epochs)
        rows.append(accuracies(net, options.ratio))
        if options.seeds is None:
            save_file(net.state_dict(), WEIGHTS)
            print(f"wrote {WEIGHTS}")
    table = Table("seed", "whole", *RESTORERS, title=f"accuracy (%), {options.ratio:.0%} of the channels pruned")
    for seed, row in enumerate(rows):
        table.add_row(str(seed), *(f"{value:.2f}" for value in row))
    if len(rows) > 1:
        table.add_section()
        table.add_row("mean", *(f"{sum(column) / len(rows):.2f}" for column in zip(*rows, strict=True)))
    show(table)


if __name__ == "__main__":
    main()
