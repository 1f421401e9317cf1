"""Two and four processes with one mesh: the same tokens, and what becomes of the others when one ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxengine import LLM, SamplingParams
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint, save_checkpoint
from tests.sharding.member import all_at_once, answers
from tests.tiny_llm import OPTIONS, model_folder, shared_llm, write_model

ROOT = Path(__file__).parents[2]
SECONDS = 30  # in which the others have ended
PATIENCE = 400
GREEDY = {"temperature": 0, "max_tokens": 20}
full = pytest.mark.full


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Job:
    """Processes that end with the test, if not before."""

    def __init__(self, commands, folder, devices=1):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        self.errors = [folder / f"errors-{rank}" for rank in range(len(commands))]
        self.processes = []
        for command, errors in zip(commands, self.errors, strict=True):
            with errors.open("w") as file:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
                )
        self.timer = threading.Timer(PATIENCE, self.kill)  # processes that wait for one another wait for ever
        self.timer.start()

    def __enter__(self):
        return self

    def kill(self):
        for process in self.processes:
            process.kill()

    def __exit__(self, *_):
        self.timer.cancel()
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()

    def told(self):
        """What process 0 says next."""
        line = next((line for line in self.processes[0].stdout if line[0] == "{"), None)  # Gloo speaks too
        assert line, [errors.read_text()[-3000:] for errors in self.errors]
        return json.loads(line)

    def ends(self, seconds=SECONDS):
        """Exit status and errors of each."""
        limit = time.monotonic() + seconds
        statuses = [process.wait(max(0, limit - time.monotonic())) for process in self.processes]
        return list(zip(statuses, (errors.read_text() for errors in self.errors), strict=True))


def members(count, task, folder, other="-", kind="llama", devices=1, **sizes):
    """`devices` of each process; `sizes` of the mesh, of which tensor is the axis unless they say otherwise."""
    sizes = json.dumps(sizes or {"tensor_parallel_size": count})
    common = [f"localhost:{free_port()}", task, str(model_folder(kind)), str(other), sizes]
    ranks = [[sys.executable, "-m", "tests.sharding.member", str(rank), str(count), *common] for rank in range(count)]
    return Job(ranks, folder, devices)


def flipped(folder, kind="llama"):
    """The model with other weights."""
    file = write_model(folder, kind) / "model.safetensors"
    save_file({name: x[..., ::-1].copy() for name, x in load_file(file).items()}, file)
    return folder


def check_same_tokens(job, count):
    told = job.told()
    assert told["answers"] == answers(shared_llm())
    assert told["pages"] == [count - 7 for count in shared_llm()._runner.num_pages], "the least of all processes"
    mine, all_ = told["held"]
    assert all_ / count <= mine < all_ / count * 1.1, "each has its share, and norms"


def check_stage(job):
    """The same of the first of two stages: half of the layers and of their pages, and what both have."""
    told = job.told()
    assert told["answers"] == answers(shared_llm())
    mine, all_ = told["held"]
    both = sum(leaf.nbytes for leaf in shared_llm()._runner.weights.leaves[:1]) * 2 + 64 * 4  # embedding, head, norm
    assert mine == (all_ - both) / 2 + both


def check_killed(job, victim):
    """Every other process says who is gone, and fails."""
    job.processes[victim].kill()
    for rank, (status, errors) in enumerate(job.ends()):
        if rank == victim:
            assert status == -signal.SIGKILL
        else:
            assert status not in (0, -signal.SIGKILL), errors
            count = len(job.processes)
            assert f"process {rank} of {count} ends: process {victim} of {count} is gone" in errors


@pytest.mark.parametrize(
    ("count", "victim"), [(2, 1), *(pytest.param(*case, marks=full) for case in ((2, 0), (4, 0), (4, 2)))]
)
def test_the_same_tokens_until_one_is_killed(count, victim, tmp_path):
    with members(count, "forever", tmp_path) as job:
        check_same_tokens(job, count)
        check_killed(job, victim)


@full
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_other_weights_and_sleep(axis, tmp_path):
    other = flipped(tmp_path / "other")
    with members(2, "weights", tmp_path, other, **{f"{axis}_parallel_size": 2}) as job:
        check_stage(job) if axis == "pipeline" else check_same_tokens(job, 2)
        with LLM(other, **OPTIONS) as llm:
            wanted = answers(llm)
        told = [job.told() for _ in range(3)]
        assert [each["answers"] for each in told] == [wanted] * 3 and wanted != answers(shared_llm())
        assert told[-1]["versions"] == 3
        assert [status for status, _ in job.ends()] == [0, 0]


@full
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"data_parallel_size": 2, "tensor_parallel_size": 2}),
        ("experts", {"expert_parallel_size": 2, "tensor_parallel_size": 2}),
        ("experts", {"data_parallel_size": 2, "expert_parallel_size": 2}),
    ],
)
def test_everything_on_each_mesh(kind, sizes, tmp_path):
    """Two devices of each process: an axis lies across the processes, the other within; weights of each format."""
    checkpoint = open_checkpoint(flipped(tmp_path / "other", kind))
    params = load_params(checkpoint, "float32", create_mesh())
    save_checkpoint(checkpoint, params, tmp_path / "orbax", "orbax")
    paths = [str(tmp_path / name) for name in ("other", "orbax")]
    with members(2, "all at once", tmp_path, json.dumps(paths), kind, devices=2, **sizes) as job:
        told = [job.told() for _ in range(4)][1:]
        assert [status for status, _ in job.ends()] == [0, 0]
    with LLM(model_folder(kind), **OPTIONS) as llm:
        wanted = [all_at_once(llm)]
        llm.update_weights(paths[0])
        wanted += [all_at_once(llm)] * 2
    assert wanted[0][0] != wanted[1][0]
    for found, (tokens, numbers) in zip(told, wanted, strict=True):
        assert found["tokens"] == tokens
        assert min(found["hits"]) > 0 and len(found["hits"]) == sizes.get("data_parallel_size", 1)
        np.testing.assert_allclose(found["numbers"], numbers, atol=1e-4)


@full
@pytest.mark.parametrize(
    ("task", "leader", "follower"),
    [
        (
            "bug of the leader",
            "KeyError: 'a bug of the leader'",
            "process 0 of 2 ended: KeyError: 'a bug of the leader'",
        ),
        ("bug of a follower", "process 1 of 2 failed: IndexError: a bug of a follower", "IndexError: a bug of a foll"),
        (
            "a follower leaves",
            "process 1 of 2 failed: ZeroDivisionError: ",
            "ZeroDivisionError: ",
        ),
        ("another config", *["page_size is 8 in process 0, 16 in 1"] * 2),
    ],
)
def test_errors_end_all(task, leader, follower, tmp_path):
    with members(2, task, tmp_path) as job:
        started = time.monotonic()
        for (status, errors), wanted in zip(job.ends(PATIENCE), (leader, follower), strict=True):
            assert status != 0 and wanted in errors
        assert time.monotonic() - started < PATIENCE / 4, "nobody waits for jax's heartbeat"


@full
@pytest.mark.parametrize("victim", [0, 1, None])
def test_a_batch_goes_on_after_a_kill_or_sigterm(victim, tmp_path):
    lines = [
        {"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": [5, 6, i + 3], **GREEDY}} for i in range(60)
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    batch = [sys.executable, "-m", "jaxengine.cli", "run-batch", "-i", str(source), "-o", str(out), "--model",
             str(model_folder()), "--max-in-flight", "4", "--tensor-parallel-size", "2", *options]  # fmt: skip

    def start():
        where = ["--coordinator-address", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
        return Job([[*batch, *where, str(rank)] for rank in range(2)], tmp_path)

    with start() as job:
        while not (out.exists() and out.read_bytes().count(b"\n") > 5):
            assert job.processes[0].poll() is None, job.errors[0].read_text()
            time.sleep(0.01)
        if victim is None:
            job.processes[1].send_signal(signal.SIGINT)  # process 0 may want to go on
            count = out.read_bytes().count(b"\n")
            while out.read_bytes().count(b"\n") == count:
                assert job.processes[0].poll() is None, job.errors[0].read_text()
            for process in job.processes:
                process.terminate()
            assert [status for status, _ in job.ends()] == [128 + signal.SIGTERM, 0]
        else:
            check_killed(job, victim)
    before = out.read_bytes().count(b"\n")
    assert before < len(lines), "the kill came before the end"
    with start() as job:
        (status, errors), (other, _) = job.ends(PATIENCE)
        assert (status, other) == (0, 0), errors
        assert f"{before} were done before" in errors
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(map(_number, records)) == list(range(60))
    texts = [record["response"]["body"]["choices"][0]["text"] for record in sorted(records, key=_number)]
    alone = shared_llm().generate([line["body"]["prompt"] for line in lines], SamplingParams(**GREEDY), use_tqdm=False)
    assert texts == [output.outputs[0].text for output in alone]


def _number(record):
    return int(record["custom_id"])
