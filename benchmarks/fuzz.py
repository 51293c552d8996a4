"""Saved folders and sweeps, damaged at random: every fault gives one clear error, in little time and memory.

    python benchmarks/fuzz.py --documents 5000 --seed 1

A document is a plan with its report, the state of a sweep, a part of its analysis, or weights. Some values of its JSON,
or some of its bytes, become others; then it is read, shown, loaded or gone on with. An error that lbyl did not raise on
purpose, a message that is long or could move a terminal's cursor, or more memory than the bound makes this fail.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peak import PeakMemory
from rich.console import Console
from torch import Tensor, nn

import lbyl
from lbyl.io.artifact import MANIFEST, WEIGHTS, document, read_manifest
from lbyl.io.report.model_card import card
from lbyl.io.report.page import page
from lbyl.pipeline.sweep.state import ANALYSIS, STATE, SweepState
from lbyl.runtime.documents import to_json

LONGEST_MESSAGE = 2000
MOST_MEMORY = 200
"""MiB that one document may take."""
MOST_SECONDS = 20

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**12, 10**400, -(10**18)),
    *(0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *("", "a", "\x1b[2J\x1b[H", "\ud800", "../../x", "/etc/passwd", "{0}", "%s", "[red]", "`|<b>", "a" * 100_000),
    *([], {}, [0], [[]], {"": 0}, {"name": "Data"}, {"name": 5}, [0] * 50_000, [None] * 3),
)
"""Values that no document should hold where it holds another."""


def network(inputs: int = 6, width: int = 12) -> nn.Module:
    """A small network with all that a plan may speak of but averages: folds, grouped convolutions, norms."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(inputs, width, 3, padding=1)),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    ).eval()


def example(inputs: int = 6) -> Tensor:
    """What it is called with."""
    return torch.randn(2, inputs, 6, 6, generator=torch.Generator().manual_seed(0))


RESTORE = lbyl.LeastSquares(moments=lbyl.Noise(images=8))


def go_on(folder: Path, *shares: float) -> lbyl.Sweep:
    """The sweep that is damaged, for these shares of the parameters."""
    budgets = [lbyl.Budget(params=share) for share in shares]
    return lbyl.sweep(network(), example(), budgets, folder, restore=RESTORE, scope="all", forecast=False)


def make_templates(place: Path) -> None:
    """Sound folders, to be copied and damaged."""
    lbyl.compress(
        network(), example(), restore=RESTORE, scope="all", source="net.py:net", ratio=0.5, forecast=False
    ).save(place / "saved")
    assert go_on(place / "swept", 0.7).made


# -- damage ----------------------------------------------------------------------------------------------------


def places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """The items of lists and dictionaries in plain data, some levels deep, as the container and the key of each."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, (dict, list)) and depth < 20:
            yield from places(item, depth + 1)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Some values replaced, removed, renamed, doubled or nested."""
    data = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = list(places(data))
        if not found:
            break
        container, key = rng.choice(found)
        how = rng.randrange(8)
        if how < 4:
            alike = [value for value in ODD if type(value) is type(container[key])] if how < 3 else ODD
            container[key] = rng.choice(alike or ODD)
        elif how == 4:
            del container[key]
        elif how == 5:
            other, name = rng.choice(found)
            container[key] = other[name] if _has(other, name) and other[name] is not container else None
        elif how == 6 and isinstance(container, dict):
            container[rng.choice(("name", "\x1b[2K", "a" * 5000, "x\ny"))] = container.pop(key)
        elif how == 6:
            container.extend(container[:50] * 20)
        else:
            for _ in range(rng.choice((1, 40, 900))):
                container[key] = [container[key]]
    try:
        return json.dumps(data).encode()
    except (ValueError, RecursionError):  # it holds itself, or is deeper than can be written
        return b"[" * 100_000


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, repeated or put in."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(len(changed) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif how == 1:
            del changed[at : at + rng.choice((1, 100, 10**6))]
        elif how == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 8)))
        else:
            changed[at:at] = rng.choice((b"[", b"{", b'"', b"9" * 5000, b"[" * 10**5, b"[]," * 10**6, b"NaN"))
    return bytes(changed)


def fill_json(content: bytes, rng: random.Random) -> bytes:
    """As much as a document may hold, in a place where anything may stand."""
    data = json.loads(content)
    filler: Any = rng.choice(
        (
            {f"{number:06}": 0 for number in range(450_000)},
            [f"{number:06}" for number in range(750_000)],
            [[] for _ in range(450_000)],
            [{"a": 0} for _ in range(300_000)],
            [-(number % 90_000) - 6 for number in range(950_000)],
        )
    )
    place = data["fingerprint"] if "fingerprint" in data else data["plan"]["settings"]
    place[rng.choice(sorted(place))] = filler
    return json.dumps(data, separators=(",", ":")).encode()


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """Damage to the JSON at the beginning of a safetensors file, and to the note in it."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    data = json.loads(header)
    note = data.get("__metadata__", {}).get("lbyl")
    if note is not None and rng.random() < 0.6:
        data["__metadata__"]["lbyl"] = damage_json(note.encode(), rng).decode()
        header = json.dumps(data).encode()
    else:
        header = damage_json(header, rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


# -- what is done with damaged files ---------------------------------------------------------------------------


def use_saved(place: Path) -> None:
    """Show and load a saved folder, as far as that goes."""
    manifest = read_manifest(place / "saved")
    shown = io.StringIO()
    Console(file=shown, width=100).print(manifest.report)
    texts = [shown.getvalue(), card(manifest.plan, manifest.report), page(manifest.plan, manifest.report)]
    for text in texts:
        assert "\x1b" not in text, "an escape sequence is shown"
        text.encode()
    json.loads(to_json(document("saved", manifest.plan, manifest.report)), parse_constant=_refuse)
    lbyl.load(place / "saved", network())


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in JSON for programs")


def use_weights(place: Path) -> None:
    """Load weights whose digest is right."""
    manifest = json.loads((place / "saved" / MANIFEST).read_text())
    manifest["sha256"] = hashlib.sha256((place / "saved" / WEIGHTS).read_bytes()).hexdigest()
    (place / "saved" / MANIFEST).write_text(json.dumps(manifest))
    lbyl.load(place / "saved", network())


def use_state(place: Path) -> None:
    """Go on with a sweep that is done."""
    shown = io.StringIO()
    Console(file=shown, width=100).print(go_on(place / "swept", 0.7))
    assert "\x1b" not in shown.getvalue(), "an escape sequence is shown"


def use_point(place: Path) -> None:
    """Go on with a sweep that was killed after it had made a point."""
    state = json.loads((place / "swept" / STATE).read_text())
    state["points"][0]["made"] = False
    (place / "swept" / STATE).write_text(json.dumps(state))
    use_state(place)


def use_analysis(place: Path) -> None:
    """Go on with a sweep for another budget, which needs what all points share."""
    SweepState.read(place / "swept")
    go_on(place / "swept", 0.7, 0.6)


Damage = Callable[[bytes, random.Random], bytes]
ANALYSES = ("groups.json", "probes.safetensors", "curves.safetensors", "consumer_moments.safetensors")
KINDS: dict[str, tuple[str, Damage, Callable[[Path], None], float]] = {
    "plan and report": (f"saved/{MANIFEST}", damage_json, use_saved, 10),
    "plan and report, bytes": (f"saved/{MANIFEST}", damage_bytes, use_saved, 3),
    "plan and report, filled": (f"saved/{MANIFEST}", fill_json, use_saved, 0.15),
    "sweep, filled": (f"swept/{STATE}", fill_json, use_state, 0.1),
    "weights": (f"saved/{WEIGHTS}", damage_header, use_weights, 3),
    "weights, bytes": (f"saved/{WEIGHTS}", damage_bytes, use_weights, 2),
    "sweep": (f"swept/{STATE}", damage_json, use_state, 6),
    "sweep, bytes": (f"swept/{STATE}", damage_bytes, use_state, 2),
    "point of a sweep": (f"swept/params-0.7/{MANIFEST}", damage_json, use_point, 2),
    **{
        f"analysis, {name}": (
            f"swept/{ANALYSIS}/0/{name}",
            damage_json if name.endswith(".json") else damage_header,
            use_analysis,
            1,
        )
        for name in ANALYSES
    },
}
"""The file, what is done to it, what is done with it, and how often it is drawn."""


@dataclass(frozen=True)
class Found:
    """What came of one document: "" as a fault where all is well."""

    kind: str
    number: int
    outcome: str
    fault: str = ""
    memory: float = 0.0


@contextlib.contextmanager
def limited_time(seconds: int) -> Iterator[None]:
    """AssertionError where the processor works longer on it, which does not depend on what else the machine does."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(documents: int, seed: int, templates: Path) -> Iterator[Found]:
    """Damage so many documents, use each, and say what came of it."""
    kinds, weights = list(KINDS), [kind[3] for kind in KINDS.values()]
    for number in range(documents):
        rng = random.Random(f"{seed} {number}")
        name = rng.choices(kinds, weights)[0]
        file, damage, use, _ = KINDS[name]
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "here"
            shutil.copytree(templates, place)
            (place / file).write_bytes(damage((place / file).read_bytes(), rng))
            yield used(name, number, use, place)


def used(name: str, number: int, use: Callable[[Path], None], place: Path) -> Found:
    """What comes of using a damaged folder."""
    memory, outcome, fault = PeakMemory(), "fine", ""
    memory.start()
    try:
        with limited_time(MOST_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(place)
    except lbyl.LbylError as error:
        said, outcome = str(error), type(error).__name__
        if len(said) > LONGEST_MESSAGE or not said.replace("\n", "").replace("\t", "").isprintable():
            fault = f"message of {len(said)} characters: {said[:200]!r}"
    except Exception as error:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        outcome, fault = type(error).__name__, "".join(lines)[-3000:]
    taken = memory.mebibytes() or 0.0
    return Found(name, number, outcome, fault or (f"took {taken:.0f} MiB" if taken > MOST_MEMORY else ""), taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        templates = Path(folder)
        make_templates(templates)
        use_saved(templates)  # libraries are loaded before memory is looked at
        outcomes, faults, memory = Counter[str](), 0, 0.0
        for found in run(options.documents, options.seed, templates):
            outcomes[f"{found.kind}: {found.outcome}"] += 1
            memory = max(memory, found.memory)
            if found.fault:
                faults += 1
                print(f"-- {found.kind}, document {found.number}: {found.outcome}\n{found.fault}")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6}  {outcome}")
    print(f"{options.documents} documents, {faults} faults, at most {memory:.0f} MiB for one")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
