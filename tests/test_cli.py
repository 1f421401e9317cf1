"""Options come from the library's classes and reach it; each command does what it says."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from jaxengine import cli
from jaxengine.config import EngineConfig
from jaxengine.errors import CheckpointError, RequestError
from jaxengine.request import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from tests.references import tiny

NOT_ON_THE_COMMAND_LINE = {"mesh"}


class FakeLLM:
    """Notes what it is asked; answers a prompt with its length in words, one word a step."""

    vocab_size = 50

    def __init__(self):
        self.engine, self.asked = {}, []

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.25, top_k=7)

    def generate(self, prompts, params, stream=False, use_tqdm=True):
        self.asked.append((prompts, params))
        many = prompts if isinstance(prompts, list) else [prompts]
        every = params if isinstance(params, list) else [params] * len(many)
        if stream:
            return self._stream(many, every)
        return [self._output(i, p, s, range(s.max_tokens), True) for i, (p, s) in enumerate(zip(many, every))]

    def chat(self, messages, params, stream=False):
        if "boom" in messages[-1]["content"]:
            raise RequestError("no template for boom")
        return self.generate(" ".join(m["content"] for m in messages), params, stream)

    def _stream(self, prompts, every):
        for step in range(3):
            for i, (prompt, params) in enumerate(zip(prompts, every)):
                yield self._output(i, prompt, params, [step], step == 2)

    def _output(self, i, prompt, params, ids, finished):
        text = "".join(f"<{token}>" for token in ids)
        completion = CompletionOutput(0, text, list(ids), finish_reason="length" if finished else None)
        times = RequestMetrics(0.0, 0.25, 0.5, 1.0, 3.0)
        return RequestOutput(str(i), None, list(prompt), None, [completion], finished, times)


@pytest.fixture
def llm(monkeypatch):
    fake = FakeLLM()

    @contextmanager
    def open_llm(engine, processes):
        fake.engine, fake.processes = engine, processes
        yield fake

    monkeypatch.setattr(cli, "open_llm", open_llm)
    return fake


def invoke(*arguments, **more):
    result = CliRunner().invoke(cli.app, list(arguments), **more)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", sorted({f.name for f in fields(EngineConfig)} - NOT_ON_THE_COMMAND_LINE))
def test_every_engine_field_is_an_option_with_its_default(name):
    help_text = " ".join(invoke("generate", "--help").split())
    shown = re.search(rf"--{name.replace('_', '-')} .*?\[default: (.*?)\]", help_text)
    assert shown and shown[1] == str(getattr(EngineConfig, name))


def test_an_answer_may_be_long_by_default():
    shown = " ".join(invoke("chat", "--help").split())
    meaning = "None: as many as max_model_len allows; 0: only the log-probabilities of the prompt"
    assert f"--max-tokens <int> {meaning} [default: None]" in shown


def test_every_sampling_option_is_a_field():
    assert set(cli.SAMPLING) == set(cli.SAMPLED)


def test_only_what_was_given_is_passed(llm):
    invoke(
        "generate",
        "one",
        "--page-size",
        "32",
        "--no-enable-prefix-caching",
        "--top-p",
        "0.5",
        "--stop",
        "a",
        "--stop",
        "b",
    )
    assert llm.engine == {"page_size": 32, "enable_prefix_caching": False}
    [(prompts, params)] = llm.asked
    assert prompts == "one"
    assert (params.temperature, params.top_k, params.top_p) == (0.25, 7, 0.5)  # the model's own, and ours
    assert list(params.stop) == ["a", "b"]


def test_one_prompt_streams_and_several_do_not(llm):
    assert invoke("generate", "one") == "one<0><1><2>\n"
    assert invoke("generate", "one", "two", "--max-tokens", "2") == "one<0><1>\n\ntwo<0><1>\n\n"
    assert invoke("generate", "-", input="three") == "three<0><1><2>\n"


def test_chat_answers_one_message(llm):
    assert invoke("chat", "--message", "hello", "--system", "be brief") == "<0><1><2>\n"
    [(text, params)] = llm.asked
    assert text == "be brief hello"
    assert params.max_tokens is None


def test_chat_remembers_and_forgets(llm):
    invoke("chat", input="a\n\nb\nboom\nc\n/reset\nd\n/exit\nnever\n")
    answer = "<0><1><2>"
    assert [text for text, _ in llm.asked] == ["a", f"a {answer} b", f"a {answer} b {answer} c", "d"]


def test_chat_ends_with_its_input(llm):
    invoke("chat", input="a\n")
    assert [text for text, _ in llm.asked] == ["a"]


@pytest.mark.parametrize("arguments", [["latency", "--num-iters", "2"], ["throughput", "--num-prompts", "8"]])
def test_bench_writes_the_keys_of_vllm(llm, tmp_path, arguments):
    path = tmp_path / "result.json"
    shown = invoke("bench", *arguments, "--input-len", "4", "--output-len", "3", "--output-json", str(path))
    result = json.loads(path.read_text())
    requests = 16 if arguments[0] == "latency" else 8
    assert (result["completed"], result["failed"]) == (requests, 0)
    assert result["max_concurrent_requests"] == requests
    assert result["total_output_tokens"] == 3 * requests
    assert result["ttfts"] == [1.0] * requests
    assert result["latencies"] == [3.0] * requests
    assert [len(gaps) for gaps in result["itls"]] == ([2] * requests if arguments[0] == "latency" else [])
    assert result["errors"] == [""] * requests
    assert result["duration"] * result["output_throughput"] == pytest.approx(3 * requests)
    assert result["request_throughput"] * 3 == pytest.approx(result["output_throughput"])
    assert result["total_token_throughput"] * result["duration"] == pytest.approx(7 * requests)
    assert "output throughput" in shown
    prompts = [tuple(map(tuple, asked)) for asked, _ in llm.asked]
    assert len(set(prompts)) == len(prompts)  # each batch has prompts of its own


def test_bench_kernels_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxengine", "bench", "kernels"])
    with pytest.raises(SystemExit, match="the kernels run on an NVIDIA GPU, jax found a cpu") as failed:
        cli.main()
    assert failed.value.code not in (0, None)


@pytest.mark.parametrize(("void", "status"), [(None, 0), (False, 0), (True, 1)])
def test_bench_kernels_writes_and_fails_when_void(tmp_path, monkeypatch, void, status):
    monkeypatch.setattr("jaxengine.benchmark.kernels.run", lambda progress: {"void": void})
    monkeypatch.setattr("jaxengine.benchmark.kernels.table", lambda result: "the table")
    path = tmp_path / "kernels.json"
    result = CliRunner().invoke(cli.app, ["bench", "kernels", "--output-json", str(path)])
    assert (result.exit_code, result.stdout, json.loads(path.read_text())) == (status, "the table\n", {"void": void})


def test_bench_startup_hands_its_options_to_the_processes(tmp_path, monkeypatch):
    asked = []

    def start(options, input_len):
        asked.append((options, input_len))
        assert options.pop("compilation_cache")
        return {"all": 1.5}

    monkeypatch.setattr("jaxengine.benchmark.startup.start", start)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")  # noted, so that what the command sets does not stay
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    path = tmp_path / "startup.json"
    options = ["--model", "x", "--load-format", "dummy", "--gpu-memory-utilization", "0.5", "--runs", "2"]
    shown = invoke("bench", "startup", *options, "--input-len", "3", "--output-json", str(path))
    want = {"model": "x", "load_format": "dummy", "gpu_memory_utilization": 0.5}
    assert asked == [(want, 3)] * 3
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert "1.50" in shown and json.loads(path.read_text())["warm"] == {"all": 1.5}
    assert "--compilation-cache" not in invoke("bench", "startup", "--help")  # a fresh one is the measurement


def test_bench_load_measures_a_folder(tmp_path):
    path = tmp_path / "load.json"
    shown = invoke("bench", "load", str(tiny.write_checkpoint("qwen3", tmp_path, 2)), "--output-json", str(path))
    assert "load from memory" in shown and json.loads(path.read_text())["files"] == 2


def test_collect_env_names_versions_and_devices():
    shown = invoke("collect-env")
    assert "jaxlib" in shown
    assert "device" in shown


def test_convert_writes_what_the_engine_loads(tmp_path):
    source, saved = tiny.write_checkpoint("qwen3", tmp_path / "source"), tmp_path / "saved"
    shown = invoke("convert", str(source), str(saved))
    assert shown == f"{saved}: 146,048 parameters of 36 tensors in float32\n"
    before, after = open_checkpoint(source), open_checkpoint(saved)
    assert (after.format, after.config) == ("orbax", before.config)
    params, again = (load_params(checkpoint, "float32", create_mesh()) for checkpoint in (before, after))
    assert all((params[path] == again[path]).all() for path in params)
    with pytest.raises(CheckpointError, match="is there already"):
        CliRunner().invoke(cli.app, ["convert", str(source), str(saved)], catch_exceptions=False)
    invoke("convert", str(saved), str(tmp_path / "back"), "--to", "safetensors")
    first, last = (folder / "model.safetensors" for folder in (source, tmp_path / "back"))
    assert load_file(first).keys() == load_file(last).keys()
    assert all((tensor == load_file(last)[name]).all() for name, tensor in load_file(first).items())


def test_errors_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxengine", "generate", "x", "--page-size", "17"])
    with pytest.raises(SystemExit, match="page_size=17 must be a power of two"):
        cli.main()


@pytest.mark.parametrize("command", ["serve", "complete"])
def test_what_is_not_there_is_said(command):
    result = CliRunner().invoke(cli.app, [command])
    assert result.exit_code == 2
    assert f"No such command '{command}'" in result.output


def test_the_shipped_model_answers(shipped_model):
    command = [
        sys.executable,
        "-m",
        "jaxengine.cli",
        "generate",
        "def add(a, b):",
        "--temperature",
        "0",
        "--max-tokens",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("def add(a, b):")
    assert len(done.stdout) > len("def add(a, b):\n")
