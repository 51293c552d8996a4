"""Sweeps on a cluster: machines and drivers die, and nothing is lost or done twice."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images, mlp
from torch import nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.sources import load_function, load_source
from lbyl.moments import Probes
from lbyl.runtime.inputs import ExampleInputs

FACTORY = """
    import pathlib, time, torch
    from torch import nn

    here = pathlib.Path(__file__).parent

    class Tiny(nn.Sequential):
        '''A class that only this file defines.'''

    def net():
        torch.manual_seed(0)
        return Tiny(
            nn.Conv2d(3, 48, 3, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )

    def note(*words):
        with (here / "log").open("a") as file:
            file.write(" ".join(map(str, words)) + "\\n")

    def judge(model):
        import ray

        size = sum(p.numel() for p in model.parameters())
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        note("begun", size, node)
        while node == (here / "stuck").read_text():
            time.sleep(0.1)
        note("done", size, node)
        return size
"""
BUDGETS = "macs=0.8,0.5,0.01"
OPTIONS = ("--input", "1x3x6x6", "--moments", "noise", "--scope", "all", "--json")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, in processes of their own, which this process is connected to."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        # Tasks usually give way to everything else on a machine, and hardly run where tests keep its cores busy.
        patch.setenv("RAY_worker_niceness", "0")
        made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        made.add_node(**small)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(textwrap.dedent(FACTORY))
    (tmp_path / "stuck").write_text("nobody")
    return f"{tmp_path / 'tiny.py'}:net"


def log(tmp_path: Path, word: str) -> list[list[str]]:
    """Lines of the judge that begin with a word, without it."""
    file = tmp_path / "log"
    found = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [line[1:] for line in found if line[0] == word]


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def command(source: str, out: Path, *args: str) -> list[str]:
    judge = source.replace(":net", ":judge")
    return ["sweep", source, "-o", str(out), *OPTIONS, "--eval", judge, "--budget", BUDGETS, *args]


def run(*call: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, list(call))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def timeless(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**point, "seconds": None} for point in document["points"]]


def weights(folder: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in folder.rglob("model.safetensors")}


def test_a_lost_machine_and_a_killed_driver_lose_nothing_and_nothing_is_done_twice(
    cluster: Any, source: str, tmp_path: Path
) -> None:
    """The second node is killed while it judges. Its point is judged elsewhere; everything else happens once."""
    here = run(*command(source, tmp_path / "here"))
    (tmp_path / "log").unlink()
    second = next(iter(cluster.worker_nodes))
    (tmp_path / "stuck").write_text(second.node_id)

    def kill() -> None:
        try:
            wait_for(lambda: any(node == second.node_id for _, node in log(tmp_path, "begun")))
        finally:  # so that a judge that is stuck there does not wait forever
            cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    there = run(*command(source, tmp_path / "there", "--ray", cluster.address))
    killer.join()

    assert timeless(there) == timeless(here)
    assert [point["made"] for point in there["points"]] == [True, True, False]
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    begun, done = log(tmp_path, "begun"), log(tmp_path, "done")
    stuck = [size for size, node in begun if node == second.node_id]
    assert len(stuck) == 1
    assert Counter(size for size, _ in begun) == {size: 1 + (size in stuck) for size, _ in done}
    assert len(done) == 3
    assert not [entry for entry in (tmp_path / "there").glob(".*") if entry.name != ".lock"]

    # A second sweep, whose driver is killed while its second point is judged, is continued by the same command.
    (tmp_path / "log").unlink()
    again, head = tmp_path / "again", cluster.head_node.node_id
    call = command(source, again, "--ray", cluster.address)
    with subprocess.Popen([sys.executable, "-m", "lbyl", *call], stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: (again / "macs-0.8").exists())
        (tmp_path / "stuck").write_text(head)
        wait_for(lambda: len(log(tmp_path, "begun")) > len(log(tmp_path, "done")))
        process.kill()
    judged = [size for size, _ in log(tmp_path, "done")]
    written = {folder: (again / folder).stat().st_mtime_ns for folder in weights(again)}
    (tmp_path / "stuck").write_text("nobody")
    assert timeless(run(*call)) == timeless(here)
    assert {folder: (again / folder).stat().st_mtime_ns for folder in written} == written
    after = Counter(size for size, _ in log(tmp_path, "done"))
    assert {after[size] for size in judged[: 1 + len(written)]} == {1}
    assert weights(again) == weights(tmp_path / "here")


def test_an_error_of_the_judge_is_told_after_the_point_is_written(cluster: Any, tmp_path: Path) -> None:
    model, x = mlp(6, 32, 32), images(2, 6)
    whole = sum(p.numel() for p in model.parameters())
    code = (
        f"def judge(model):\n    assert sum(p.numel() for p in model.parameters()) == {whole}, 'no data'\n    return 1"
    )
    (tmp_path / "judge.py").write_text(code)
    judge = load_function(f"{tmp_path / 'judge.py'}:judge")
    with pytest.raises(lbyl.InputError, match="no data"):
        lbyl.sweep(
            model, x, [lbyl.Budget(params=0.6)], tmp_path / "out", restore="lbyl", evaluate=judge, ray=cluster.address
        )
    assert lbyl.load(tmp_path / "out" / "params-0.6", model)(x).shape == model(x).shape


@dataclass(frozen=True)
class Given:
    """These probes."""

    made: Probes

    def probes(self, model: nn.Module, inputs: Any, generator: torch.Generator, progress: Any) -> Probes:
        return self.made


def test_sums_over_data_in_a_cluster_are_those_of_one_machine(cluster: Any) -> None:
    """Of 45 batches four are kept, one of these is held out, and tasks sum over the others, by reference or not."""
    import ray

    model, batches = mlp(6, 32, 32), [images(4 + number % 3, 6) + number / 45 for number in range(45)]
    inputs, graph = ExampleInputs.of(batches[0]), lbyl.inspect(model, batches[0]).graph
    groups = [number for number, group in enumerate(graph.groups) if group.prunable]
    few = lbyl.LeastSquares(moments=lbyl.Data(batches, batches=4), sequential=False, attach_norms=False)
    many = replace(few, moments=lbyl.Data((ray.put(b) if i % 2 else b for i, b in enumerate(batches)), ray="auto"))
    probes = many.make_probes(model, inputs, 0, None)
    whole = replace(probes, batches=(*probes.batches, *map(ExampleInputs.of, batches[4:])), beyond=None)
    assert "4 batches" in probes.note
    ours, theirs = (many.measure(model, graph, groups, each, 0, 2**30, None) for each in (probes, whole))
    assert ours.keys() == theirs.keys() != set()
    for name, found in ours.items():
        for a, b in zip(found.blocks, theirs[name].blocks, strict=True):
            assert a.count == b.count == sum(map(len, batches)) - len(batches[3])
            torch.testing.assert_close((a.p, a.pp), (b.p, b.pp), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.output, theirs[name].output, rtol=1e-6, atol=1e-6)

    def weights(restore: lbyl.LeastSquares, **limit: Any) -> dict[str, torch.Tensor]:
        settings = {"restore": restore, "criterion": "l2", "forecast": False, **limit}
        return dict(lbyl.compress(model, batches[0], **settings).model.state_dict())

    for limit in ({"ratio": 0.5}, {"budget": lbyl.Budget(params=0.5)}):
        sent = weights(replace(many, moments=lbyl.Data(batches, ray="auto")), **limit)
        torch.testing.assert_close(sent, weights(replace(many, moments=Given(whole)), **limit), rtol=1e-6, atol=1e-6)
        kept_only = weights(few, **limit)
        assert any(t.shape != sent[n].shape or not torch.allclose(t, sent[n]) for n, t in kept_only.items())
    broken = [*batches[:20], torch.full((4, 6), torch.nan)]
    with pytest.raises(lbyl.InputError, match="batch 20 holds NaN"):
        weights(replace(many, moments=lbyl.Data(broken, ray="auto")), ratio=0.5)
    result = lbyl.compress(model, batches[0], ratio=0.5, restore=replace(many, moments=lbyl.Data(batches, ray="auto")))
    assert "2 of 2 layers are solved with sums over all batches" in result.report.notes
    limited = replace(many, moments=lbyl.Data(broken, batches=20, ray="auto"))
    assert weights(limited, ratio=0.5)


def test_what_can_not_be_sent_is_named_before_anything_is_done(tmp_path: Path) -> None:
    pytest.importorskip("ray")

    def sweep(model: nn.Module, evaluate: Any = None) -> None:
        lbyl.sweep(model, images(2, 6), [lbyl.Budget(macs=0.5)], tmp_path / "out", evaluate=evaluate, ray="auto")

    lock, model = threading.Lock(), mlp(6, 32, 32)
    with pytest.raises(lbyl.InputError, match=r"^evaluate can't be sent .*can't be pickled.*lock"):
        sweep(model, lambda net: 1.0 if lock else 0.0)
    model.lock = lock  # pyright: ignore[reportArgumentType]
    with pytest.raises(lbyl.InputError, match=r"^the network can't be sent"):
        sweep(model)
    assert not (tmp_path / "out").exists()


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(lbyl.ClusterError, match=r"^Ray can't be imported .*; install lbyl\[ray\]$"):
        lbyl.sweep(mlp(), torch.zeros(1, 6), [lbyl.Budget(macs=0.5)], tmp_path / "out", ray="auto")
    with pytest.raises(lbyl.InputError, match="ray is an int"):
        lbyl.sweep(mlp(), torch.zeros(1, 6), [lbyl.Budget(macs=0.5)], tmp_path / "out", ray=1)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there_is_told_before_anything_is_done(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(lbyl.ClusterError, match=f"^the Ray cluster {address} can't be reached"):
            lbyl.sweep(mlp(), torch.zeros(1, 6), [lbyl.Budget(macs=0.5)], tmp_path / "out", ray=address)
    assert not (tmp_path / "out").exists()


def test_lbyl_does_not_import_ray() -> None:
    code = "import sys, lbyl, lbyl.cli; lbyl.sweep, lbyl.Data; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sources_in_files_are_sent_with_their_classes(source: str) -> None:
    pytest.importorskip("ray")
    import pickle

    from lbyl.runtime.cluster import packed

    content = packed({"the network": load_source(source)})
    read = "import pickle, sys; print(type(pickle.loads(sys.stdin.buffer.read())['the network']).__name__)"
    done = subprocess.run([sys.executable, "-c", read], input=content, capture_output=True, check=True)
    assert done.stdout.split() == [b"Tiny"]
    assert isinstance(pickle.loads(content)["the network"], nn.Module)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:abc", "127.0.0.1:999999", ":", "127.0.0.1"])
def test_what_is_no_address_is_told_before_any_time_is_spent(address: str, tmp_path: Path) -> None:
    budgets = [lbyl.Budget(macs=0.8)]
    with pytest.raises(lbyl.InputError, match="is no address; write 'auto'"):
        lbyl.sweep(mlp(6, 8), images(2, 6), budgets, tmp_path / "points", ray=address, restore="prune")
    with pytest.raises(lbyl.InputError, match="is no address; write 'auto'"):
        lbyl.Data([images(2, 6)], ray=address)
    assert not (tmp_path / "points").exists()


def test_a_name_that_no_machine_has(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(lbyl.ClusterError, match="can't be reached"):
        lbyl.sweep(mlp(6, 8), images(2, 6), [lbyl.Budget(macs=0.8)], tmp_path / "points", ray=f"{'x' * 300}:1")
