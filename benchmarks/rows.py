"""Tables of raw numbers, and sequences: what is left without data, and with a little.

    python benchmarks/rows.py [--seeds 3] [--network NAME] [--fresh]

The columns of scikit-learn's breast-cancer and wine tables, and the pixels of its digits in rows, are as they are: from
thousandths to thousands. Each network standardizes them itself, by a batch norm or by numbers in its code. Recurrent
networks read the digits row by row. All are trained here on 70% of the rows; Prune is plain pruning by L2, Default is
`lbyl.compress` with nothing asked of it and four rows as its example, Data is the same on 64 rows of the training set
(16 more are held out). What lbyl does here was worked out on seeds 0 and 1 of "cancer" and of the recurrent networks
without "rnn"; wine, digits, "rnn" and seed 2 of all confirm it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from normless import METHODS, restorer
from output import Run, Table, known_cells
from rich.console import Console
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional

import lbyl

RATIOS = (0.3, 0.5)
LOAD = {"cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}


def rows(name: str) -> tuple[Tensor, Tensor, int]:
    """Inputs and labels in a fixed random order, and how many of them are for training."""
    table: Any = LOAD[name]()
    order = torch.randperm(len(table.target), generator=torch.Generator().manual_seed(7))
    return torch.tensor(table.data).float()[order], torch.tensor(table.target)[order], round(0.7 * len(order))


class Standard(nn.Module):
    """Standardizes each column by numbers of the training rows."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("deviation", x.std(0).clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")) / self.get_buffer("deviation")


def table(name: str, by: str) -> nn.Module:
    """Two hidden layers."""
    x, labels, train = rows(name)
    first = nn.BatchNorm1d(x.shape[1]) if by == "norm" else Standard(x[:train])
    layers = nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, int(labels.max()) + 1)
    return nn.Sequential(first, *layers)


class Reader(nn.Module):
    """A recurrent network that reads images of 8x8 pixels row by row."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 48), nn.ReLU())
        self.layers = getattr(nn, kind)(48, 32, batch_first=True, **options)
        self.last = nn.Linear(64 if options.get("bidirectional") else 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.embed(x.reshape(-1, 8, 8) / 16))[0].mean(1))


class Convolved(nn.Module):
    """Convolutions with batch norms, and a recurrent layer over the columns, as in networks that read text."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 24)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body, self.layers, self.last = (
            nn.Sequential(*layers),
            nn.LSTM(192, 32, bidirectional=True),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = self.body(x.reshape(-1, 1, 8, 8) / 16).permute(3, 0, 1, 2).flatten(2)
        return self.last(self.layers(seen)[0].mean(0))


class Stepwise(nn.Module):
    """A cell that the code runs step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.last = (
            nn.Sequential(nn.Linear(8, 48), nn.ReLU()),
            nn.GRUCell(48, 32),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 32)
        for row in x.reshape(-1, 8, 8).unbind(1):
            state = self.cell(self.embed(row / 16), state)
        return self.last(state)


NETWORKS: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "cancer_norm": ("cancer, batch norm on the input", "cancer", lambda: table("cancer", "norm")),
    "cancer_code": ("cancer, standardized by code", "cancer", lambda: table("cancer", "code")),
    "wine_norm": ("wine, batch norm on the input", "wine", lambda: table("wine", "norm")),
    "wine_code": ("wine, standardized by code", "wine", lambda: table("wine", "code")),
    "digits_norm": ("digits in rows, batch norm on the input", "digits", lambda: table("digits", "norm")),
    "digits_code": ("digits in rows, standardized by code", "digits", lambda: table("digits", "code")),
    "lstm": ("LSTM", "digits", lambda: Reader("LSTM")),
    "gru": ("GRU", "digits", lambda: Reader("GRU")),
    "rnn": ("RNN", "digits", lambda: Reader("RNN")),
    "bilstm": ("two LSTM layers, both directions", "digits", lambda: Reader("LSTM", num_layers=2, bidirectional=True)),
    "crnn": ("convolutions and LSTM", "digits", Convolved),
    "cell": ("GRU cell", "digits", Stepwise),
}


def trained(make: Callable[[], nn.Module], data: str, seed: int, steps: int = 500) -> nn.Module:
    """A network, trained on the training rows."""
    x, labels, train = rows(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(steps):
            some = torch.randint(train, (128,))
            optimizer.zero_grad()
            functional.cross_entropy(net(x[some]), labels[some]).backward()
            optimizer.step()
    return net.eval()


def tabulate(run: Run) -> None:
    """A row a network, the mean over the seeds; and the seeds one by one."""
    columns = [(ratio, method) for ratio in RATIOS for method in METHODS]
    heads = ["network", "unpruned", *(f"{method}, {ratio:.0%}" for ratio, method in columns)]
    means, single = [], []
    for name, (title, _, _) in NETWORKS.items():
        cells = [cell for cell in run.measurements if cell["network"] == name]
        for seed in sorted({cell["seed"] for cell in cells}):
            at = {(c["ratio"], c["method"]): c["accuracy"] for c in cells if c["seed"] == seed}
            single.append([f"{title}, seed {seed}", at.get((0.0, "Unpruned")), *(at.get(key) for key in columns)])
        found = [
            [c["accuracy"] for c in cells if (c["ratio"], c["method"]) == key] for key in [(0.0, "Unpruned"), *columns]
        ]
        if all(found):
            means.append([title, *map(mean, found)])
    note = "Top-1 on 30% of the rows in percent, the mean over the seeds, and the share of channels that is removed."
    run.tables = [Table("Tables of raw numbers, and sequences", heads, means, note)]
    run.details = [Table("Seed by seed, tables and sequences", heads, single)]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many networks of each kind.")] = 3,
    network: Annotated[list[str] | None, typer.Option(help="One of NETWORKS; may be given again. All without.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks.")] = False,
) -> None:
    """Fill the table network by network."""
    console, names = Console(), network or list(NETWORKS)
    run = Run("rows", "Tables and sequences", "python benchmarks/rows.py", pieced=True)
    run.settings = {"seeds": seeds}
    run.measurements = [cell for cell in known_cells("rows") if not (fresh and cell["network"] in names)]
    for seed in range(seeds):
        for name in names:
            known = {(c["ratio"], c["method"]) for c in run.measurements if (c["network"], c["seed"]) == (name, seed)}
            wanted = [(0.0, "Unpruned"), *((ratio, method) for ratio in RATIOS for method in METHODS)]
            if known >= set(wanted):
                continue
            _, data, make = NETWORKS[name]
            (x, labels, train), net = rows(data), trained(make, data, seed)
            told = []
            for ratio, method in wanted:
                smaller = net
                if ratio:
                    settings = {"restore": restorer(method, seed, x[:train]), "seed": seed, "forecast": False}
                    smaller = lbyl.compress(net, x[:4], ratio=ratio, **settings).model
                with torch.no_grad():
                    right = smaller(x[train:]).argmax(1) == labels[train:]
                cell = {"network": name, "seed": seed, "ratio": ratio, "method": method}
                cell |= {"accuracy": round(100 * float(right.float().mean()), 2), "lbyl": version("lbyl")}
                run.measurements.append(cell)
                told.append(f"{method} {cell['accuracy']:.1f}")
            console.print(f"{name:12} seed {seed}  {', '.join(told)}")
            run.join(names)
            run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
