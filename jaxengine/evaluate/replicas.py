"""A batch over several engines: Ray actors that hold one each, on a machine or a cluster. This process writes."""

import asyncio
import logging
import os
import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.errors import CheckpointError, ConfigError, EngineError, RequestError, UnsupportedError
from jaxengine.evaluate.answering import Answer, Answering, Line, Started, failure
from jaxengine.evaluate.batch import BatchSummary, Stop, answer_all, check_options, list_names
from jaxengine.evaluate.journal import Record, differences
from jaxengine.evaluate.tables import open_source

logger = logging.getLogger(__name__)
LINE_TRIES = 3  # a line whose replica died goes to another one, the last time to one that has nothing else
REPLICA_TRIES = 5  # deaths in a row, without an answer in between, after which a replica is given up
CONCURRENT = 1 << 16  # calls of an actor, more than there ever are: it is we who bound them
HOPELESS = (ConfigError, CheckpointError, RequestError, UnsupportedError)  # a second start would fail the same way


def run_batch_replicas(
    source: str | os.PathLike | Iterable[Any],
    sink: str | os.PathLike | Callable[[Record], None],
    *,
    replicas: int,
    engine: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    served_model_name: str | Sequence[str] | None = None,
    column: str | None = None,
    id_column: str | None = None,
    url: str | None = None,
    retry_errors: bool = False,
    max_in_flight: int | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    stop: Stop | None = None,
) -> BatchSummary:
    """`LLM.run_batch` by several engines, each in a process of a Ray cluster with a GPU of its own, or a CPU.

    The cluster is the one that ray.init was called for, else that of RAY_ADDRESS, else one that is found on this
    machine, else one that is started here for this run. Each machine has jaxengine, and the model under the same path.
    engine: LLM's arguments, `model` too. max_in_flight: lines that a replica has at a time; None: twice max_num_seqs.
    The rest is as for jaxengine.evaluate.batch.run_batch, and one output may be continued by either.

    What a replica that dies had not answered, others do, and it is started again. A line on which three died becomes
    an error record.

    Raises what `run_batch` raises, what LLM raises, ConfigError without Ray or with too few GPUs, and EngineError when
    every replica died again and again without an answer in between. What was written before stays.
    """
    check_options(sink, defaults, retry_errors, max_in_flight)
    if replicas < 1:
        raise ConfigError(f"{replicas=} must be 1 or more")
    options = dict(engine or {})
    if not isinstance(options.get("model"), str | os.PathLike | None):
        raise UnsupportedError("replicas load a model themselves: write parameters in memory as a checkpoint, and give "
                               "its folder as model")  # fmt: skip
    if options.get("mesh") is not None:
        raise UnsupportedError(
            "mesh= names devices of this process, replicas have their own: use tensor_parallel_size= and "
            "expert_parallel_size=, pipeline_parallel_size= and data_parallel_size="
        )
    lines, stop = open_source(source, column, id_column, url), stop or Stop()
    with _cluster() as ray:
        each = prod(options.get(f"{axis}_parallel_size", 1) for axis in ("tensor", "expert", "pipeline", "data"))
        gpus = _gpus(ray, replicas, each)
        worker = ray.remote(_Worker).options(max_concurrency=CONCURRENT, num_cpus=1, num_gpus=gpus)
        loading = os.getcwd(), options, dict(defaults or {}), list_names(served_model_name)
        # Of a short file, the first one to load leaves the others their share.
        most = None if lines.total is None else ceil(lines.total / replicas) or 1
        with closing(_Replicas(worker.remote, ray.kill, replicas, loading, max_in_flight, most)) as answerers:
            stop.bind(answerers.wake)
            while answerers.made_by is None:
                if stop.is_set:
                    return BatchSummary(stopped=True)
                answerers.finished()
            return answer_all(answerers, answerers.made_by, lines, sink, retry_errors, use_tqdm, stop)


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("replicas need Ray: pip install 'jaxengine[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # which Ray has taken
    try:
        yield ray
    finally:
        ray.shutdown()


def _gpus(ray: Any, count: int, each: int) -> int:
    """Of each replica. Raises ConfigError when the cluster is too small for them."""
    total = ray.cluster_resources()
    kind = "GPU" if total.get("GPU") else "CPU"
    if total.get(kind, 0) < count * each:
        raise ConfigError(f"replicas={count} need {each} {kind} each, and the Ray cluster has {total.get(kind, 0):g}")
    return each if kind == "GPU" else 0


class _Worker:
    """In a process of its own: an engine, and whoever waits for its answers."""

    def load(self, folder: str, engine: Mapping[str, Any], *answering: Any) -> tuple[dict[str, Any], int]:
        """What its answers are made by, and how many lines it likes to have."""
        if Path(folder).is_dir():
            os.chdir(folder)  # relative paths mean what they mean to the caller
        share = engine.get("gpu_memory_utilization", EngineConfig.gpu_memory_utilization)
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(share))
        from jaxengine.llm import LLM

        self._answering = Answering(LLM(**engine), *answering)
        return self._answering.made_by, self._answering.ahead

    async def answer(self, line: Line) -> Answer:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def tell(started: Started, _: Any) -> None:
            if started.ended:
                loop.call_soon_threadsafe(ended.set_result, None)

        started = self._answering.start(line, tell)
        if isinstance(started, Answer):
            return started
        await ended
        return self._answering.answer(started)


@dataclass(eq=False)
class _Replica:
    """An actor, from its start to its death."""

    actor: Any
    deaths: int  # before it, since a line was answered
    limit: int = 0  # lines at a time; none before the engine is there
    lines: dict[int, Line] = field(default_factory=dict)  # that it has, by number


class _Replicas:
    """Lines in, answers out, whoever dies: a line is with one replica, or waits for one.

    new_actor() starts one, kill(actor) makes sure that it is gone. A replica has up to max_in_flight lines at a time
    (None: as many as it likes), and never more than `most`.
    """

    def __init__(
        self,
        new_actor: Callable[[], Any],
        kill: Callable[[Any], None],
        count: int,
        loading: Sequence[Any],
        max_in_flight: int | None,
        most: int | None,
    ):
        self._new_actor, self._kill, self._loading = new_actor, kill, loading
        self._max_in_flight, self._most = max_in_flight, most
        self.made_by: dict[str, Any] | None = None  # known when the first one has loaded
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # (replica, its line or None: loaded, future), or None
        self._waiting: deque[Line] = deque()  # lines whose replica died
        self._died: Counter[int] = Counter()  # replicas that had the line with this number
        self._replicas: set[_Replica] = set()
        for _ in range(count):
            self._begin(0)

    @property
    def has_room(self) -> bool:
        return not self._waiting and self._free(alone=False) is not None

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(replica.lines for replica in self._replicas)

    @property
    def note(self) -> str:
        return f", replicas: {sum(replica.limit > 0 for replica in self._replicas)}"

    def wake(self) -> None:
        self._inbox.put(None)

    def start(self, line: Line) -> Answer | None:
        try:
            self._give(line)
        except TypeError as error:  # something that no process can be sent
            return Answer(failure(line.custom_id, line.number, error))
        return None

    def finished(self) -> list[Answer]:
        answers: list[Answer] = []
        item = self._inbox.get()
        while True:
            if item is not None:
                answers += self._told(*item)
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                break
        while self._waiting and self._give(self._waiting[0]):
            self._waiting.popleft()
        return answers

    def close(self) -> None:
        for replica in self._replicas:
            self._kill(replica.actor)

    def _begin(self, deaths: int) -> None:
        replica = _Replica(self._new_actor(), deaths)
        self._replicas.add(replica)
        self._watch(replica, None, replica.actor.load.remote(*self._loading))

    def _watch(self, replica: _Replica, line: Line | None, call: Any) -> None:
        call.future().add_done_callback(lambda future: self._inbox.put((replica, line, future)))

    def _free(self, alone: bool) -> _Replica | None:
        """The one with the fewest lines, if it may have one more; alone: one that has none."""
        free = [
            replica
            for replica in self._replicas
            if len(replica.lines) < (min(1, replica.limit) if alone else replica.limit)
            and not self._is_last_try(next(iter(replica.lines), 0))
        ]
        return min(free, key=lambda replica: len(replica.lines), default=None)

    def _is_last_try(self, number: int) -> bool:
        return self._died[number] == LINE_TRIES - 1

    def _give(self, line: Line) -> bool:
        replica = self._free(self._is_last_try(line.number))
        if replica is None:
            return False
        self._watch(replica, line, replica.actor.answer.remote(line))
        replica.lines[line.number] = line
        return True

    def _told(self, replica: _Replica, line: Line | None, future: Any) -> list[Answer]:
        if replica not in self._replicas:  # it died, and its lines are elsewhere
            return []
        if error := future.exception():
            return self._lost(replica, error)
        if line is None:
            made_by, ahead = future.result()
            if changed := list(differences(self.made_by or made_by, made_by)):
                raise ConfigError(f"the machines of the cluster do not have the same: {'; '.join(changed)}")
            self.made_by, limit = made_by, self._max_in_flight or ahead
            replica.limit = min(limit, self._most or limit)
            return []
        del replica.lines[line.number], self._died[line.number]
        replica.deaths = 0
        return [future.result()]

    def _lost(self, replica: _Replica, error: Exception) -> list[Answer]:
        """Its lines are for others, but for one that has had its tries; a new replica begins."""
        cause = getattr(error, "cause", error)  # what was raised there
        if isinstance(cause, HOPELESS):
            raise cause from error
        self._replicas.discard(replica)
        self._kill(replica.actor)
        logger.warning("a replica died while it had %d lines: %s", len(replica.lines), error)
        refused = []
        for line in replica.lines.values():
            self._died[line.number] += 1
            if self._died[line.number] < LINE_TRIES:
                self._waiting.append(line)
            else:
                said = EngineError(f"{LINE_TRIES} replicas died while they had this line: {error}")
                refused.append(Answer(failure(line.custom_id, line.number, said)))
        if replica.deaths + 1 < REPLICA_TRIES:
            self._begin(replica.deaths + 1)
        elif self._replicas:
            logger.warning("it is not started again: it died %d times without an answer", REPLICA_TRIES)
        else:
            raise EngineError(f"every replica died {REPLICA_TRIES} times without an answer; the last time: {error}")
        return refused
