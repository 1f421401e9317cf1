"""Several engines answer one batch: who has which line when one dies, on actors that are threads here; then on Ray."""

import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from jaxengine.errors import ConfigError, EngineError, UnsupportedError
from jaxengine.evaluate import replicas
from jaxengine.evaluate.answering import Answer
from jaxengine.evaluate.batch import BatchSummary, Stop, answer_all
from jaxengine.evaluate.tables import Source
from tests.evaluate.test_batch import command, completion, contents, read, run, size, wait_until, write
from tests.tiny_llm import OPTIONS, model_folder

# -- without Ray


class Died(Exception):
    pass


class Actor:
    """As one of Ray's, in a thread: it takes what it has together, and dies of a deadly line with all of that."""

    def __init__(self, load, deadly):
        self.load = SimpleNamespace(remote=partial(self._call, lambda *_: load()))
        self.answer = SimpleNamespace(remote=partial(self._call, lambda line: Answer(record(line.custom_id))))
        self.deadly, self.had, self.killed, self._calls = deadly, [], False, queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def _call(self, do, *arguments):
        future = Future()
        self._calls.put((do, arguments, future))
        return SimpleNamespace(future=lambda: future)

    def _work(self):
        dead = False
        while True:
            group = [self._calls.get()]
            threading.Event().wait(0.005)  # for the caller to send more
            while not self._calls.empty():
                group.append(self._calls.get())
            self.had.append([arguments[0].custom_id for _, arguments, _ in group if arguments])
            dead |= any(name in self.deadly for name in self.had[-1])
            for do, arguments, future in group:
                try:
                    if dead:
                        raise Died("by a signal")
                    future.set_result(do(*arguments))
                except Exception as error:
                    future.set_exception(error)


def record(custom_id):
    return {"custom_id": custom_id, "response": {}, "error": None}


def loaded(limit=4):
    return {"dtype": "float32"}, limit


class Cluster:
    def __init__(self, *loads, deadly=()):
        """loads: of one actor after another, the last one of all that follow."""
        self.loads, self.deadly, self.actors = list(loads or (loaded,)), deadly, []

    def new_actor(self):
        load = self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]
        self.actors.append(Actor(load, self.deadly))
        return self.actors[-1]

    def kill(self, actor):
        actor.killed = True

    def answers(self, names, count=2, most=None, ready=1):
        """Records by custom_id, each there once. ready: how many have loaded before the first line is read."""
        found, them = {}, replicas._Replicas(self.new_actor, self.kill, count, (), None, most)
        while them.made_by is None or them.note < f", replicas: {ready}":
            them.finished()

        def sink(record):
            assert record["custom_id"] not in found
            found[record["custom_id"]] = record

        lines = Source(iter([{"custom_id": name} for name in names]))
        summary = answer_all(them, them.made_by, lines, sink, False, False, Stop())
        assert summary.completed + summary.failed == len(names) == len(found)
        them.close()
        return found


NAMES = [f"id-{i}" for i in range(40)]


def test_each_line_is_answered_once_by_one_of_them():
    cluster = Cluster()
    assert cluster.answers(NAMES, ready=2) == {name: record(name) for name in NAMES}
    had = [[name for group in actor.had for name in group] for actor in cluster.actors]
    assert all(had) and sorted(had[0] + had[1]) == sorted(NAMES)
    assert all(actor.killed for actor in cluster.actors)
    assert max(len(group) for actor in cluster.actors for group in actor.had) <= 4, "they have as many as they like"


@pytest.mark.parametrize("count", [1, 3])
def test_a_line_that_kills_is_an_error_and_takes_no_other_with_it(count):
    deadly = {"id-7", "id-8", "id-30"}
    cluster = Cluster(deadly=deadly)
    found = cluster.answers(NAMES, count)
    for name, said in found.items():
        if name in deadly:
            assert said["error"] == {
                "code": "engine_error", "message": "3 replicas died while they had this line: by a signal",
            }  # fmt: skip
        else:
            assert said["error"] is None
    for name in deadly:
        groups = [group for actor in cluster.actors for group in actor.had if name in group]
        assert len(groups) == 3 and [name] in groups, "the last time it was alone"


def test_one_that_never_starts_is_given_up_and_the_others_go_on():
    def fails():
        raise MemoryError("none left")

    cluster = Cluster(fails, loaded, *[fails] * (replicas.REPLICA_TRIES - 1), loaded)
    assert cluster.answers(NAMES) == {name: record(name) for name in NAMES}
    assert len(cluster.actors) <= 1 + replicas.REPLICA_TRIES


def test_when_none_starts_the_run_ends():
    def fails():
        raise MemoryError("none left")

    cluster = Cluster(fails)
    with pytest.raises(EngineError, match="every replica died 5 times without an answer; the last time: none left"):
        cluster.answers(NAMES)
    assert len(cluster.actors) == 2 * replicas.REPLICA_TRIES


def test_what_would_fail_again_is_not_tried_again():
    def fails():
        raise ConfigError("page_size=7")

    cluster = Cluster(fails)
    with pytest.raises(ConfigError, match="page_size=7"):
        cluster.answers(NAMES)
    assert len(cluster.actors) == 2


def test_replicas_that_would_answer_differently_are_refused():
    with pytest.raises(ConfigError, match=r"not have the same: dtype was 'b?float"):
        Cluster(loaded, lambda: ({"dtype": "bfloat16"}, 4)).answers([f"id-{i}" for i in range(4000)])


def test_of_a_short_file_the_first_leaves_the_others_their_share():
    def late():
        threading.Event().wait(0.1)
        return loaded(100)

    cluster = Cluster(partial(loaded, 100), late)
    cluster.answers(NAMES, most=20)
    assert max(len(group) for actor in cluster.actors for group in actor.had) <= 20


def test_the_one_with_the_fewest_lines_gets_the_next():
    cluster = Cluster(partial(loaded, 100))
    cluster.answers(NAMES, ready=2)
    assert [sum(map(len, actor.had)) for actor in cluster.actors] == [20, 20]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"replicas": 0}, ConfigError, "replicas=0"),
        ({"engine": {"model": {}}}, UnsupportedError, "write parameters in memory as a checkpoint"),
        ({"max_in_flight": 0}, ConfigError, "max_in_flight=0"),
        ({"column": "x"}, ConfigError, "are for tables"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        replicas.run_batch_replicas([], print, **{"replicas": 2, **options})


def test_without_ray_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxengine\[ray\]'"):
        replicas.run_batch_replicas([], print, replicas=2)


def test_each_has_the_gpus_of_its_mesh(monkeypatch):
    def cluster(**resources):
        return SimpleNamespace(cluster_resources=lambda: resources)

    assert replicas._gpus(cluster(CPU=8.0, GPU=4.0), 2, 2) == 2
    assert replicas._gpus(cluster(CPU=8.0), 2, 2) == 0
    with pytest.raises(ConfigError, match="replicas=3 need 2 GPU each, and the Ray cluster has 4"):
        replicas._gpus(cluster(CPU=8.0, GPU=4.0), 3, 2)
    monkeypatch.setattr(replicas, "_cluster", lambda: nullcontext(cluster(CPU=8.0, GPU=4.0)))
    with pytest.raises(ConfigError, match="replicas=1 need 6 GPU each"):
        mesh = {"tensor_parallel_size": 2, "data_parallel_size": 3}
        replicas.run_batch_replicas([], print, replicas=1, engine=mesh)


# -- with Ray

# Ray forks to start its processes, of which jax warns where it runs already; they are others before they do anything.
starts_processes = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


@pytest.fixture(scope="module")
def ray():
    """A cluster of two processors on this machine."""
    if not find_spec("ray"):
        pytest.skip("pip install 'jaxengine[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def run_replicas(lines, sink, **options):
    options = {"engine": {"model": str(model_folder()), **OPTIONS}, "max_in_flight": 4, "use_tqdm": False} | options
    return replicas.run_batch_replicas(lines, sink, replicas=2, **options)


def workers():
    """Process ids of the engines of this test's cluster."""
    import psutil

    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Worker" in " ".join(process.cmdline()):
                found[process.pid] = process
        except psutil.Error:  # it has just ended
            pass
    return list(found)


@pytest.mark.full
@starts_processes
def test_a_killed_one_loses_nothing(ray, tmp_path, caplog):
    lines = [completion(i, max_tokens=20, ignore_eos=True) for i in range(40)]
    lines.insert(25, {"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": [700]}})
    out = tmp_path / "out.jsonl"
    run(lines[:6], out)  # what one engine has begun, several continue

    def killing():
        for i, line in enumerate(lines):
            if i == 22:
                os.kill(workers()[0], signal.SIGKILL)
            yield line

    assert run_replicas(killing(), out) == BatchSummary(completed=34, failed=1, skipped=6)
    assert "a replica died while it had" in caplog.text and "had 0 lines" not in caplog.text
    found = contents(read(out))
    assert found == contents(run(lines)[1]) and found["bad"][1]["code"] == "invalid_request"


@pytest.mark.full
@starts_processes
def test_more_replicas_than_processors(ray):
    with pytest.raises(ConfigError, match="replicas=3 need 1 CPU each, and the Ray cluster has 2"):
        replicas.run_batch_replicas([], print, replicas=3)


@pytest.mark.full
@starts_processes
def test_what_an_engine_refuses_is_said_here(ray, tmp_path):
    with pytest.raises(ConfigError, match="max_num_seqs=0"):
        run_replicas([], tmp_path / "out.jsonl", engine={"model": str(model_folder()), "max_num_seqs": 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@starts_processes
def test_a_run_that_is_stopped_goes_on(ray, tmp_path):
    lines, stop, out = [completion(i) for i in range(40)], Stop(), tmp_path / "out.jsonl"

    def stopping():
        for i, line in enumerate(lines):
            if i == 20:
                stop.set()
            yield line

    first = run_replicas(stopping(), out, stop=stop)
    assert first.stopped and 10 < first.completed == len(read(out)) < 21
    assert run_replicas(lines, out) == BatchSummary(completed=40 - first.completed, skipped=first.completed)
    assert contents(read(out)) == contents(run(lines)[1])


@pytest.mark.full
@starts_processes
def test_the_command_is_killed_stopped_and_goes_on(ray, tmp_path):
    lines = [completion(i, max_tokens=30, ignore_eos=True) for i in range(120)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def start():
        return subprocess.Popen([*command(source, out), "--replicas", "2"], stderr=subprocess.PIPE, env=environment)

    for end, status in (signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM):
        before, process = size(out), start()
        wait_until(process, lambda before=before: size(out) > before)
        process.send_signal(end)
        said = process.communicate()[1].decode()
        assert process.returncode == status, said
    assert "0 failed" in said and "stopped before the end" in said
    assert 0 < len(read(out)) < 120
    last = start()
    said = last.communicate()[1].decode()
    assert last.returncode == 0 and "Batch: 100%" in said and "replicas: 2" in said, said
    assert contents(read(out)) == contents(run(lines)[1])


@pytest.mark.full
def test_the_command_starts_a_cluster_where_there_is_none(tmp_path):
    pytest.importorskip("ray", reason="pip install 'jaxengine[ray]'")
    lines = [completion(i, max_tokens=30, ignore_eos=True) for i in range(60)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    process = subprocess.Popen([*command(source, out), "--replicas", "1"], stderr=subprocess.PIPE, env=environment)
    wait_until(process, lambda: size(out) > 0)
    process.terminate()  # Ray would take it otherwise
    said = process.communicate()[1].decode()
    assert process.returncode == 128 + signal.SIGTERM and "stopped before the end" in said, said
    done = len(read(out))
    assert 0 < done < 60 and run(lines, out) == BatchSummary(completed=60 - done, skipped=done)
    assert contents(read(out)) == contents(run(lines)[1])
