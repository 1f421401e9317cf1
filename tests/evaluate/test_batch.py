"""A batch from its lines to its records: refused lines, bounds, resuming, kills, a full disk."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxengine import LLM
from jaxengine.config import ParamRule
from jaxengine.errors import ConfigError, EngineClosedError, UnsupportedError
from jaxengine.evaluate.batch import BatchSummary, Stop
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from tests.tiny_llm import OPTIONS, fresh_llm, model_folder, shared_llm


def completion(i, **body):
    body = {"prompt": f"def f{i}(x):", "max_tokens": 4 + i % 5, "temperature": 0} | body
    return {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": body}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(records):
    """What a record says, without the time it was made."""
    found = {}
    for record in records:
        assert record["custom_id"] not in found, f"{record['custom_id']} is there twice"
        body = dict((record["response"] or {}).get("body", {}))
        body.pop("created", None)
        found[record["custom_id"]] = body, record["error"]
    return found


def run(lines, sink=None, llm=None, **options):
    records = []
    summary = (llm or shared_llm()).run_batch(lines, sink or records.append, use_tqdm=False, **options)
    return (summary, records) if sink is None else summary


# -- lines


def test_lines_that_cannot_be_served_do_not_end_the_run(tmp_path):
    good = [completion(i) for i in range(3)]
    bad = [
        ({"custom_id": "e", "url": "/v1/responses", "body": {"input": "x"}}, "unsupported", "url='/v1/responses'"),
        (completion(0), "invalid_request", "custom_id='id-0' stands on a line before"),
        ({"url": "/v1/completions", "body": {}}, "invalid_request", "custom_id=None must be a text"),
        (completion(9) | {"method": "GET"}, "invalid_request", "method='GET'"),
        (completion(10) | {"more": 1}, "invalid_request", r"a line has no field ['more']"),
        (completion(11, prompt=[700]), "invalid_request", "token id 700 is out of range"),
        (completion(12, prompt="x", min_tokens=9), "invalid_request", "min_tokens=9"),
        ({"custom_id": "c", "url": "/v1/chat/completions",
          "body": {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 5}}, None, ""),
    ]  # fmt: skip
    lines = [good[0], *(line for line, _, _ in bad), *good[1:]]
    path = write(tmp_path / "in.jsonl", lines)
    path.write_text(path.read_text() + "\nnot json\n[1]\n")
    summary, records = run(path)
    assert (summary.completed, summary.failed, summary.skipped, summary.stopped) == (3, len(bad) + 2, 0, False)
    answered = {r["custom_id"] for r in records if r["error"] is None}
    assert answered == {"id-0", "id-1", "id-2"}
    by_line = {r["line"]: r for r in records if r["error"] is not None}
    for number, (line, code, message) in enumerate(bad, 2):
        record = by_line[number]
        assert record["response"] is None and message in record["error"]["message"]
        assert code is None or record["error"]["code"] == code
        assert record["custom_id"] == (None if "before" in message else line.get("custom_id"))
    assert "not valid JSON" in by_line[13]["error"]["message"] and "is not an object" in by_line[14]["error"]["message"]


def test_texts_that_utf8_cannot_say(tmp_path):
    """JSON can say half of a surrogate pair."""
    lines = [completion(0) | {"custom_id": "\ud800"}, completion(1, prompt="\udfff"), completion(2)]
    out = tmp_path / "out.jsonl"
    assert run(write(tmp_path / "in.jsonl", lines), out) == BatchSummary(completed=2, failed=1)
    assert {r["custom_id"]: r["error"] is None for r in read(out)} == {"\ud800": True, "id-1": False, "id-2": True}
    assert run(lines, out).skipped == 3


def test_answers_are_those_of_the_library():
    lines = [completion(i) for i in range(12)]
    _, records = run(lines)
    from jaxengine import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=4 + i % 5) for i in range(12)]
    outputs = shared_llm().generate([line["body"]["prompt"] for line in lines], params, use_tqdm=False)
    found = contents(records)
    for i, output in enumerate(outputs):
        assert found[f"id-{i}"][0]["choices"][0]["text"] == output.outputs[0].text


def test_lines_are_read_as_requests_finish():
    pulled, ahead, records = 0, [], []

    def lines():
        nonlocal pulled
        for i in range(60):
            pulled += 1
            ahead.append(pulled - len(records))
            yield completion(i)

    shared_llm().run_batch(lines(), records.append, use_tqdm=False, max_in_flight=5)
    assert len(records) == 60 and max(ahead) <= 6


def test_the_bar_counts_tokens_and_knows_the_end(tmp_path):
    bars = []

    class Bar:
        format_dict = {"elapsed": 2.0}  # noqa: RUF012

        def __init__(self, total, **_):
            self.total, self.n, self.shown = total, 0, ""
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def set_postfix_str(self, text, refresh):
            self.shown = text

        def update(self, count):
            self.n += count

    path = write(tmp_path / "in.jsonl", [completion(i, ignore_eos=True) for i in range(6)])
    out = tmp_path / "out.jsonl"
    shared_llm().run_batch(path, out, use_tqdm=Bar)
    prompts = sum(len(shared_llm().encode(f"def f{i}(x):")) for i in range(6))
    assert (bars[0].total, bars[0].n) == (6, 6)
    assert bars[0].shown == f"input: {prompts / 2:.2f} toks/s, output: {(4 + 5 + 6 + 7 + 8 + 4) / 2:.2f} toks/s"
    write(path, [completion(i) for i in range(8)])
    shared_llm().run_batch(path, out, use_tqdm=Bar)
    assert (bars[1].total, bars[1].n) == (2, 2)  # of what is left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"defaults": {"nonsense": 1}}, r"defaults has \['nonsense'\]"),
        ({"max_in_flight": 0}, "max_in_flight=0"),
        ({"retry_errors": True}, "a function remembers nothing"),
        ({"column": "x"}, "are for tables"),
        ({"url": "/v1/score"}, "are for tables"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        run([], **options)


# -- going on


def test_a_second_run_does_what_is_left(tmp_path):
    out, lines = tmp_path / "out.jsonl", [completion(i) for i in range(20)]
    bad = {"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "x", "logprobs": 30}}
    llm = shared_llm()
    assert run(lines[:8] + [bad], out) == BatchSummary(completed=8, failed=1)
    before, asked = out.read_bytes(), llm.get_metrics()["prompt_tokens"]
    assert run(lines[:8] + [bad], out) == BatchSummary(skipped=9)
    assert (out.read_bytes(), llm.get_metrics()["prompt_tokens"]) == (before, asked), "nothing was done again"
    assert run(lines[:10] + [bad] + lines[10:], out) == BatchSummary(completed=12, skipped=9)
    assert out.read_bytes().startswith(before)
    mended = bad | {"body": {"prompt": "x"}}  # log-probabilities differ in their last digits
    assert run(lines + [mended], out, retry_errors=True) == BatchSummary(completed=1, skipped=20)
    _, undisturbed = run(lines + [mended])
    assert contents(read(out)) == contents(undisturbed)


def test_runs_of_other_models_or_parameters_are_not_mixed(tmp_path):
    out, line = tmp_path / "out.jsonl", completion(0)
    run([line], out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"sampling.top_p was None, now 0.5"):
        run([completion(1)], out, defaults={"top_p": 0.5})
    with pytest.raises(ConfigError, match=r"source.model.files was .*; source.model.name was 'llama', now 'windows'"):
        run([completion(1)], out, llm=shared_llm("windows"))
    with fresh_llm(seed=5) as llm, pytest.raises(ConfigError, match=r"engine\.seed was 0, now 5"):
        run([completion(1)], out, llm=llm)
    named = r"source\.config was None, now .ModelConfig.*; source\.param_mapping\.a was None, now .*len"
    with fresh_llm() as llm, pytest.raises(ConfigError, match=named):
        llm.source |= {"config": str(llm.model_config), "param_mapping": {"a": str(ParamRule("b", hook=len))}}
        run([completion(1)], out, llm=llm)
    assert out.read_bytes() == before
    with fresh_llm(max_num_seqs=8, enable_prefix_caching=False) as llm:  # these change no answer
        assert run([completion(1)], out, llm=llm).completed == 1


def test_parameters_in_memory_have_no_name_to_resume_by(tmp_path):
    params = load_params(open_checkpoint(model_folder()), "float32", create_mesh())
    config = json.loads((model_folder() / "config.json").read_text())
    with LLM(params, config=config, tokenizer=model_folder(), **OPTIONS) as llm:
        with pytest.raises(UnsupportedError, match="parameters in memory have no name"):
            run([completion(0)], tmp_path / "out.jsonl", llm)
        summary, [record] = run([completion(0)], llm=llm)
        assert llm.source["config"] == str(llm.model_config)
    assert summary.completed == 1 and record["custom_id"] == "id-0"
    assert not list(tmp_path.iterdir())


def test_a_stop_leaves_the_rest_for_the_next_run(tmp_path):
    out, stop, pulled = tmp_path / "out.jsonl", Stop(), []

    def lines():
        for i in range(40):
            pulled.append(i)
            if i == 20:
                stop.set()
            yield completion(i)

    summary = run(lines(), out, stop=stop, max_in_flight=4)
    assert summary.stopped and 0 < summary.completed < 21 and len(pulled) == 21
    assert len(read(out)) == summary.completed
    assert_idle(shared_llm())
    rest = run([completion(i) for i in range(40)], out)
    assert rest == BatchSummary(completed=40 - summary.completed, skipped=summary.completed)
    assert len(contents(read(out))) == 40


def test_an_interrupt_leaves_file_and_engine_as_they_should_be(tmp_path):
    out = tmp_path / "out.jsonl"

    def lines():
        for i in range(20):
            if i == 10:
                raise KeyboardInterrupt
            yield completion(i)

    with pytest.raises(KeyboardInterrupt):
        run(lines(), out, max_in_flight=3)
    assert_idle(shared_llm())
    done = len(read(out))
    assert 0 < done < 10
    assert run([completion(i) for i in range(20)], out) == BatchSummary(completed=20 - done, skipped=done)
    assert len(contents(read(out))) == 20


def assert_idle(llm):
    """What was running has been ended."""
    llm.get_metrics()  # behind the commands that end it
    assert llm._loop.num_requests == 0


def test_an_engine_that_ends_ends_the_run_and_nothing_is_lost(tmp_path):
    out = tmp_path / "out.jsonl"
    with fresh_llm() as llm:

        def lines():
            for i in range(20):
                if i == 10:
                    llm.close()
                yield completion(i)

        with pytest.raises(EngineClosedError):
            run(lines(), out, llm=llm, max_in_flight=2)
    done = read(out)
    assert 0 < len(done) <= 10 and all(record["error"] is None for record in done)
    assert run([completion(i) for i in range(20)], out).skipped == len(done)
    assert len(contents(read(out))) == 20


# -- from outside


def command(source, out):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    return [sys.executable, "-m", "jaxengine.cli", "run-batch", "-i", str(source), "-o", str(out), "--model",
            str(model_folder()), "--max-in-flight", "4", *options]  # fmt: skip


def start(source, out, **options):
    return subprocess.Popen(command(source, out), stderr=subprocess.PIPE, **options)


def size(path):
    return path.stat().st_size if path.exists() else 0


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)


def killed_and_resumed(tmp_path, count, kills):
    """A run that is killed while it writes, again and again; its records, and those of an undisturbed one."""
    lines = [completion(i) for i in range(count)]
    source, out, chance = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", random.Random(0)
    _, undisturbed = run(lines)
    bytes_in_all = len("".join(json.dumps(record) + "\n" for record in undisturbed))
    for i in range(kills):
        before = size(out)
        target = before + chance.uniform(0, 1) * (bytes_in_all - before) / (kills - i + 1)
        process = start(source, out)
        wait_until(process, lambda target=target: size(out) > target)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        if chance.random() < 0.5 and out.read_bytes().count(b"\n") > 1:  # a crash of the machine may tear a line
            with open(out, "r+b") as file:
                file.truncate(size(out) - chance.randint(1, 200))
    assert 0 < out.read_bytes().count(b"\n") < count, "the kills came before the end"
    done = subprocess.run(command(source, out), capture_output=True, check=True)
    assert "were done before" in done.stderr.decode() and " 0 were done before" not in done.stderr.decode()
    return contents(read(out)), contents(undisturbed)


def test_killed_runs_go_on(tmp_path):
    found, undisturbed = killed_and_resumed(tmp_path, 40, 2)
    assert len(found) == 40 and found == undisturbed


@pytest.mark.full
def test_a_long_run_that_is_killed_twenty_times(tmp_path):
    found, undisturbed = killed_and_resumed(tmp_path, 2000, 20)
    assert len(found) == 2000 and found == undisturbed


def test_sigterm_ends_a_run_cleanly(tmp_path):
    lines = [completion(i, max_tokens=30, ignore_eos=True) for i in range(60)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process = start(source, out)
    wait_until(process, lambda: size(out) > 0)
    process.terminate()
    said = process.communicate()[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    done = len(read(out))
    assert 0 < done < 60 and out.read_bytes().endswith(b"\n")
    assert f"{done} answered, 0 failed, 0 were done before; stopped before the end" in said
    assert run(lines, out) == BatchSummary(completed=60 - done, skipped=done)  # the library goes on with it
    assert len(contents(read(out))) == 60


def full_disk(tmp_path, count, room):
    """A run whose files may hold `room` bytes, and a second one that has more."""
    lines = [completion(i) for i in range(count)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),)); "
    limited += "os.execv(sys.argv[2], sys.argv[2:])"
    done = subprocess.run([sys.executable, "-c", limited, str(room), *command(source, out)], capture_output=True)
    assert done.returncode == 1
    assert "File too large; what was written before is whole: make room" in done.stderr.decode()
    first = read(out)
    assert 0 < len(first) < count and room - 2000 < size(out) <= room
    subprocess.run(command(source, out), capture_output=True, check=True)
    assert read(out)[: len(first)] == first
    return contents(read(out)), contents(run(lines)[1])


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tmp_path):
    found, undisturbed = full_disk(tmp_path, 40, 10_000)
    assert len(found) == 40 and found == undisturbed


@pytest.mark.full
def test_a_long_run_on_a_full_disk(tmp_path):
    found, undisturbed = full_disk(tmp_path, 2000, 400_000)
    assert len(found) == 2000 and found == undisturbed


def test_tables_from_the_command_line(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("id,text\na,def f(x):\nb,import os\n")
    options = ["--column", "text", "--id-column", "id", "--temperature", "0", "--max-tokens", "3"]
    done = subprocess.run([*command(path, tmp_path / "out.jsonl"), *options], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    from jaxengine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=3)
    want = shared_llm().generate(["def f(x):", "import os"], params, use_tqdm=False)
    found = contents(read(tmp_path / "out.jsonl"))
    assert {key: body["choices"][0]["text"] for key, (body, _) in found.items()} == {
        "a": want[0].outputs[0].text, "b": want[1].outputs[0].text,
    }  # fmt: skip
