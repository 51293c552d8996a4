"""Runs functions on the machines of a Ray cluster. Ray is imported when a cluster is asked for, and not before."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import Any
from uuid import uuid4

from lbyl.errors import ClusterError, InputError, LbylError, first_line, shortened
from lbyl.runtime.checks import named_kind
from lbyl.runtime.version import library_version

AUTO = "auto"
RETRIES = 3
"""How often Ray begins a task again whose machine or process was lost."""
OWN_FILES = "lbyl_source_"
"""Prefix of the modules that `lbyl.io.sources` makes of a user's files, which no other process can import."""


@dataclass(frozen=True)
class Cluster:
    """A connection to a Ray cluster.

    Attributes:
        ray: the module.
    """

    ray: Any

    def each(
        self, function: Callable[[Any, Any], Any], shared: bytes, items: Iterable[Any], gpus: int = 0
    ) -> Iterator[tuple[int, Any]]:
        """Call ``function(shared, item)`` for every item somewhere in the cluster, with one CPU each.

        Yields the index of each item with its result, in the order in which they are done. A task that is lost with its
        machine is begun again by Ray. Tasks that are left when the caller stops are canceled.

        Args:
            function: a function of a module of lbyl, which the machines of the cluster import by name.
            shared: the result of :func:`packed`. It is put into the object store once, and unpacked once a process.
            items: what differs from task to task. At most twice as many as the cluster has cores are taken at once.
            gpus: number of GPUs that a task needs.

        Raises:
            ClusterError: a task was lost too often, the machines have no GPU or another lbyl, or they can't unpack
                ``shared``.
        """
        ray = self.ray
        if gpus and ray.cluster_resources().get("GPU", 0) < gpus:
            raise ClusterError(
                f"the network is on {gpus} GPUs, but no machine of the cluster has them; move it to the CPU "
                "(model.cpu()), or start Ray where there are some"
            )
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_called)
        # In a list, so that a process that has unpacked it before does not fetch it again.
        place, key = [ray.put(shared)], uuid4().hex
        version = library_version()
        numbered, waiting = enumerate(items), dict[Any, int]()
        try:
            while True:
                room = max(2, 2 * int(ray.cluster_resources().get("CPU", 0))) - len(waiting)
                for index, item in islice(numbered, max(0, room)):
                    waiting[task.remote(version, function, key, place, item)] = index
                if not waiting:
                    break
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done), self._result(done)
        finally:
            for left in waiting:
                ray.cancel(left)

    def _result(self, done: Any) -> Any:
        """What a task returned.

        Raises:
            LbylError: the error that it returned.
            ClusterError: it was lost too often, or could not be called.
        """
        try:
            found = self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise ClusterError(
                    f"a machine of the cluster can't import what it needs ({first_line(error.cause)}); install "
                    f"lbyl {library_version()} and the model's package on all of them"
                ) from error
            raise
        except self.ray.exceptions.RayError as error:
            raise ClusterError(
                f"a task was lost {RETRIES + 1} times ({first_line(error)}); what is done is kept, and the same call "
                "goes on from there, perhaps with more memory for each task"
            ) from error
        if isinstance(found, LbylError):
            raise found
        return found


def fetched(item: Any) -> Any:
    """What a reference of Ray's object store stands for; anything else as it is."""
    ray = sys.modules.get("ray")
    return ray.get(item) if ray is not None and isinstance(item, ray.ObjectRef) else item


_unpacked: dict[str, Any] = {}
"""What this process has unpacked last, by its key."""


def _called(version: str, function: Callable[[Any, Any], Any], key: str, place: list[Any], item: Any) -> Any:
    """Runs in a process of the cluster: the function's result, or the LbylError that it raised."""
    ray = _ray()
    try:
        if version != library_version():
            raise ClusterError(
                f"a machine of the cluster has lbyl {library_version()}, and this one {version}; install the same"
            )
        if key not in _unpacked:
            _unpacked.clear()
            _unpacked[key] = _read(ray.get(place[0]))
        return function(_unpacked[key], item)
    except LbylError as error:
        return error


def _read(content: bytes) -> Any:
    try:
        return pickle.loads(content)
    except Exception as error:  # a user's classes may raise anything
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ClusterError(
            f"a machine of the cluster can't read the network and its settings ({why}); the modules that define them "
            "must be installed there"
        ) from error


def packed(parts: Mapping[str, Any]) -> bytes:
    """Objects in a form that other processes can read; classes of a user's script go along.

    Args:
        parts: the objects by name, such as "the network". Names are used in the error.

    Raises:
        InputError: one of them can't be pickled.
    """
    cloudpickle = import_module("ray.cloudpickle")
    own = [module for name, module in sys.modules.items() if name.startswith(OWN_FILES)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(dict(parts))
    except Exception as error:  # `__reduce__` and `__getstate__` of a user's classes may raise anything
        name, why = next(
            ((name, told) for name, part in parts.items() if (told := _refusal(cloudpickle, part))),
            ("the work", first_line(error)),
        )
        raise InputError(
            f"{name} can't be sent to other machines, because it can't be pickled ({why}); leave out what can't be, "
            "such as open files, locks and generators, or leave out ray"
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _refusal(cloudpickle: Any, part: Any) -> str:
    try:
        cloudpickle.dumps(part)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def check_address(address: object) -> None:
    """Raise InputError for an address that is no text, and ClusterError without Ray; before any time is spent."""
    if not isinstance(address, str) or not address:
        raise InputError(f"ray is {named_kind(address)}; write 'auto' or an address, such as '10.0.0.1:6379'")
    port = address.rpartition(":")[2]
    named = "://" in address or address in (AUTO, "local")
    if not named and not (port != address and port.isdecimal() and int(port) < 2**16):
        told = shortened(repr(address))
        raise InputError(f"ray={told} is no address; write 'auto' or a machine and its port, such as '10.0.0.1:6379'")
    _ray()


def check_reachable(address: str) -> None:
    """Raise ClusterError if nothing listens at an address, for which Ray itself would wait for minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not separator or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last one for names that can't be of a machine
        raise ClusterError(
            f"the Ray cluster {address} can't be reached ({first_line(error)}); 'ray start --head' starts one"
        ) from error


_PATIENCE = 10.0
"""Seconds to wait for an answer of a cluster."""


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """A connection to a cluster. A connection that this process has already is used and left open.

    Args:
        address: the address of a cluster, such as ``10.0.0.1:6379``. "auto" is the cluster that runs on this machine
            or that ``RAY_ADDRESS`` names, and without one, a new one of this machine's cores for as long as it takes.

    Raises:
        ClusterError: Ray is not installed, there is no cluster at this address, or this process is connected to
            another one.
    """
    ray = _ray()
    if ray.is_initialized():
        known = ray.get_runtime_context().gcs_address
        if address not in (AUTO, known):
            raise ClusterError(f"this process uses the Ray cluster at {known} already; pass ray='auto' to use that one")
        yield Cluster(ray)
        return
    check_reachable(address)
    # Output of tasks must not get into the documents that the command line prints.
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=address, **quiet)
    except (Exception, SystemExit) as error:  # gRPC, sockets, versions: Ray raises many kinds
        if address != AUTO or not isinstance(error, ConnectionError) or os.environ.get("RAY_ADDRESS"):
            raise ClusterError(
                f"the Ray cluster {address} can't be reached ({first_line(error)}); 'ray start --head' starts one"
            ) from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent over the network
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise ClusterError(f"Ray can't be imported ({error}); install lbyl[ray]") from error
