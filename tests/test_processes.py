"""What processes tell each other over their connections: here two ends in one process."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Listener

import jax
import pytest

from jaxengine.config import ParamRule
from jaxengine.engine.lockstep import Leader
from jaxengine.errors import ConfigError, EngineError, UnsupportedError
from jaxengine.live_weights import LiveWeights
from jaxengine.processes import Processes, check_mesh, initialize
from jaxengine.sharding import create_mesh
from tests.tiny_llm import model_folder, shared_llm


class Ended(Processes):
    """Notes why it would exit."""

    def __init__(self, *arguments):
        self.reason, self.ends = None, threading.Event()
        super().__init__(*arguments)

    def _exit(self, reason):
        self.reason = reason
        self.ends.set()


@pytest.fixture
def three():
    """Process 0, and the two that it is connected with."""
    with Listener(("localhost", 0), authkey=b"key") as listener, ThreadPoolExecutor() as pool:
        found = [(pool.submit(Client, listener.address, authkey=b"key"), listener.accept()) for _ in range(2)]
        ends = {rank: (theirs.result(), ours) for rank, (theirs, ours) in enumerate(found, 1)}
        yield [
            Ended(0, 3, {rank: ours for rank, (_, ours) in ends.items()}),
            *(Ended(rank, 3, {0: theirs}) for rank, (theirs, _) in ends.items()),
        ]
        for pair in ends.values():
            for connection in pair:
                connection.close()


def everywhere(processes, method, arguments):
    """The results of a method that every process calls, or its errors."""
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(getattr(p, method), *given) for p, given in zip(processes, arguments, strict=True)]
        return [call.exception() or call.result() for call in calls]


def test_they_agree_on_the_least_and_end_together(three):
    assert everywhere(three, "least", [([7, 5],), ([6, 9],), ([8, 8],)]) == [(6, 5)] * 3
    assert everywhere(three, "check_same", [({"dtype": "float32", "sizes": (1, 2)},)] * 3) == [None] * 3
    assert everywhere(three, "end", [()] * 3) == [None] * 3
    assert [process.reason for process in three] == [None] * 3
    with pytest.raises(EngineError, match="no longer in lock-step"):
        three[0].send("more")


def test_a_difference_is_refused_everywhere_with_both_values(three):
    same, other = {"dtype": "float32", "jax": "1"}, {"dtype": "bfloat16", "jax": "1"}
    for error in everywhere(three, "check_same", [(same,), (same,), (other,)]):
        assert isinstance(error, ConfigError)
        assert str(error) == ("process 2 must be started as process 0 is: dtype is float32 in process 0, bfloat16 in 2")
    assert [process.reason for process in three] == [None] * 3


class Unreadable:
    def __reduce__(self):
        return int, ("what another process cannot make",)


def test_what_cannot_be_read_ends_all(three):
    three[0].send(Unreadable())
    assert all(process.ends.wait(10) for process in three[1:])
    assert three[1].reason.startswith("what process 0 sent cannot be read: ValueError: invalid literal")


def test_who_dies_while_the_others_end_ends_them_at_once(three):
    with ThreadPoolExecutor() as pool:
        ending = [pool.submit(process.end) for process in three[:2]]
        three[2].fail("its last step failed")
        assert [end.exception() for end in ending] == [None] * 2
    assert three[0].reason == "process 2 of 3 failed: its last step failed"


def test_content_comes_in_order_and_once_to_each(three):
    for number in range(100):
        three[0].send(("submit", number))
    for follower in three[1:]:
        assert [follower.receive() for _ in range(100)] == [("submit", number) for number in range(100)]


def test_a_failure_is_told_on_and_the_sender_goes_on(three):
    three[1].fail("OSError: the disk is gone")
    assert three[0].ends.wait(10) and three[0].reason == "process 1 of 3 failed: OSError: the disk is gone"
    assert three[1].reason is None and three[2].reason is None


def test_a_lost_connection_is_noticed(three):
    connection = three[2]._connections[0]
    with socket.socket(fileno=connection.fileno()) as end:
        end.shutdown(socket.SHUT_RDWR)
        end.detach()
    assert three[0].ends.wait(10) and three[0].reason.startswith("process 2 of 3 is gone")


def test_a_mesh_is_of_all_processes_or_of_one(monkeypatch):
    check_mesh(create_mesh())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"1 devices of processes \[0\], in process 1 of 2: .* those of one process"):
        check_mesh(create_mesh())


def test_a_hook_that_cannot_be_sent_is_refused_before_anything_is_touched():
    llm = shared_llm()
    weights = LiveWeights(llm.config, llm.model_config, create_mesh(), None, Leader(llm._runner, None))
    mapping = {"(.*)": ParamRule(r"\1", hook=lambda x: x)}
    with pytest.raises(UnsupportedError, match="hooks must be functions of a module"):
        weights.update(llm._loop, model_folder(), None, "wait", True, mapping)


def test_there_is_nobody_to_follow():
    with pytest.raises(EngineError, match="processes other than the first"):
        shared_llm().follow()


def test_nobody_to_join(monkeypatch):
    for name in ("SLURM_JOB_ID", "JAX_COORDINATOR_ADDRESS", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"did not find the other processes.*coordinator_address, num_processes"):
        initialize()
