"""The processes that share a mesh: how they find each other, agree, and notice that one is gone."""

import os
import pickle
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxengine.errors import ConfigError, EngineError

HEARTBEAT_SECONDS = 20  # without a sign of life, after which a process counts as dead
CONNECT_SECONDS = 5  # for each address that process 0 may have
GRACE_SECONDS = 1  # in which a lost connection explains why a device failed
CARD_BYTES = 4096  # what process 0 tells of itself, padded
WATCHER = "jaxengine-process-"  # names of threads
Kind = Literal["content", "failure", "end"]


def initialize(**where: Any) -> int:
    """`jax.distributed.initialize`, which finds the processes unless `where` says; the number of this one.

    Raises ConfigError when it cannot.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **where)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"jax.distributed did not find the other processes, told {where}: {error}; on Slurm, Open MPI and "
            "Kubernetes (pip install jax[k8s]) it does without, elsewhere give coordinator_address, num_processes and "
            "process_id"
        ) from error
    return jax.process_index()


def check_mesh(mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError unless the mesh is of this process alone, or has devices of every process."""
    ranks, here, count = {d.process_index for d in mesh.devices.flat}, jax.process_index(), jax.process_count()
    if ranks != {here} and ranks != set(range(count)):
        raise ConfigError(
            f"a mesh of {mesh.size} devices of processes {sorted(ranks)}, in process {here} of {count}: it must have "
            f"devices of every process, as with tensor_parallel_size={jax.device_count()}, or those of one process "
            "alone, as mesh="
        )


class Processes:
    """Connections of process 0 with each other one. A thread for each ends this process when the other is gone."""

    def __init__(self, rank: int, count: int, connections: Mapping[int, Connection]):
        self.rank, self.count, self._connections = rank, count, dict(connections)
        self._inboxes: dict[int, queue.SimpleQueue] = {peer: queue.SimpleQueue() for peer in connections}
        self._sending, self._ended, self._failed = threading.Lock(), threading.Event(), threading.Event()
        self._watchers = [
            threading.Thread(target=self._watch, args=item, name=f"{WATCHER}{item[0]}", daemon=True)
            for item in connections.items()
        ]
        for connection in connections.values():
            _keep_alive(connection)
        for watcher in self._watchers:
            watcher.start()

    # -- what they tell each other

    def send(self, content: Any) -> None:
        """To every other process that this one is connected with. Raises EngineError after an end."""
        if self._ended.is_set():
            raise EngineError(f"process {self.rank} of {self.count} is no longer in lock-step with the others")
        self._send("content", content)

    def receive(self, peer: int = 0) -> Any:
        """Waits for what a process sends next."""
        return self._inboxes[peer].get()

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, by its number. Every process must call it."""
        if self.rank:
            self.send(value)
            return self.receive()
        values = [value, *(self.receive(peer) for peer in range(1, self.count))]
        self.send(values)
        return values

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises ConfigError in every process when one has other facts than process 0."""
        own, *others = self.gather({name: str(value) for name, value in facts.items()})
        for rank, theirs in enumerate(others, 1):
            names = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            if names:
                self.end()
                values = (f"{name} is {own.get(name)} in process 0, {theirs.get(name)} in {rank}" for name in names)
                raise ConfigError(f"process {rank} must be started as process 0 is: {'; '.join(values)}")

    def least(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Of each count the smallest that a process has."""
        return tuple(map(min, zip(*self.gather(tuple(counts)), strict=True)))

    # -- ends

    def end(self) -> None:
        """Returns when every other process has said the same; one that fails instead ends this one too."""
        if not self._ended.is_set():
            self._ended.set()
            self._send("end", None)
            for watcher in self._watchers:
                watcher.join()

    def fail(self, reason: str) -> None:
        """Ends the other processes, with what went wrong in this one."""
        if not self._ended.is_set():
            self._failed.set()
            self._ended.set()
            self._send("failure", f"process {self.rank} of {self.count} failed: {reason}")

    def die(self, error: BaseException) -> NoReturn:
        """The same, and ends this one: its device may wait for the others', and nothing can stop it from waiting."""
        time.sleep(GRACE_SECONDS)
        traceback.print_exception(error)
        self._exit(f"process {self.rank} of {self.count} failed: {type(error).__name__}: {error}")

    def _exit(self, reason: str) -> NoReturn:
        os.write(2, f"jaxengine: process {self.rank} of {self.count} ends: {reason}\n".encode())
        watchdog = threading.Timer(GRACE_SECONDS, os._exit, (1,))  # telling others may block
        watchdog.daemon = True
        with suppress(RuntimeError):  # the interpreter ends already
            watchdog.start()
        self._send("failure", reason)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(1)

    def _send(self, kind: Kind, content: Any) -> None:
        message = pickle.dumps((kind, content), protocol=5)
        with self._sending:
            for connection in self._connections.values():
                with suppress(OSError):  # it is gone: its watcher says so
                    connection.send_bytes(message)

    def _watch(self, peer: int, connection: Connection) -> None:
        kind: Kind = "content"
        content: Any = None
        try:
            while kind == "content":
                kind, content = pickle.loads(connection.recv_bytes())
                if kind == "content":
                    self._inboxes[peer].put(content)
        except (EOFError, OSError) as error:
            kind, content = (
                "failure",
                f"process {peer} of {self.count} is gone: {str(error) or 'its connection was closed'}",
            )
        except Exception as error:  # of unpickling, which may need what this process has not
            kind, content = "failure", f"what process {peer} sent cannot be read: {type(error).__name__}: {error}"
        if kind == "failure" and not self._failed.is_set():
            self._exit(content)


def connect() -> Processes:
    """Connects the processes of `jax.distributed` with the first one. Every process must call it.

    Raises EngineError while they are connected already, or where the first one cannot be reached.
    """
    rank, count = jax.process_index(), jax.process_count()
    if any(thread.name.startswith(WATCHER) for thread in threading.enumerate()):
        raise EngineError("these processes have an engine already: close() it before another is made")
    card = np.zeros(CARD_BYTES, np.uint8)
    if rank == 0:
        key = os.urandom(32)
        listener = Listener(("", 0), backlog=count, authkey=key)
        told = pickle.dumps((_own_addresses(), listener.address[1], key))
        card[: len(told)] = np.frombuffer(told, np.uint8)
    card = multihost_utils.broadcast_one_to_all(card)
    if rank == 0:
        with listener:
            return Processes(rank, count, _accept(listener, count))
    connection = _reach(*pickle.loads(card.tobytes()))
    connection.send(rank)
    return Processes(rank, count, {0: connection})


def _accept(listener: Listener, count: int) -> dict[int, Connection]:
    found: dict[int, Connection] = {}
    while len(found) < count - 1:
        with suppress(OSError, EOFError, AuthenticationError):  # somebody else, or one who looked whether we are there
            connection: Any = listener.accept()
            found[connection.recv()] = connection
    return found


def _reach(addresses: Iterable[str], port: int, key: bytes) -> Connection:
    for address in addresses:
        with suppress(OSError, EOFError, AuthenticationError):
            socket.create_connection((address, port), CONNECT_SECONDS).close()  # Client would wait for minutes
            return Client((address, port), authkey=key)
    raise EngineError(f"process 0 cannot be reached at port {port} of any of {', '.join(addresses)}")


def _own_addresses() -> list[str]:
    """Where other hosts may reach this one, and last what only this one understands."""
    found = ["127.0.0.1"]
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but takes the address of the default route
        found.append(probe.getsockname()[0])
    return sorted(set(found), key=lambda address: address.startswith("127."))


def _keep_alive(connection: Connection) -> None:
    """Sends small messages at once, and notices a host that is gone without a word."""
    third = HEARTBEAT_SECONDS // 4
    options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": third, "TCP_KEEPINTVL": third, "TCP_KEEPCNT": 3,
               "TCP_USER_TIMEOUT": 1000 * HEARTBEAT_SECONDS}  # fmt: skip
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # not every system has them all
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
