"""LLM on a tiny random model: prompts of every form, streams, sampling fields."""

import gc
import itertools
import time

import numpy as np
import pytest

from jaxengine import RequestError, SamplingParams
from jaxengine.engine.sequence import Request
from tests.tiny_llm import EOS, VOCAB, count_ties, fresh_llm, shared_llm

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = "def hello(world):"


@pytest.fixture(scope="module")
def llm():
    return shared_llm()


def generate(llm, prompts, params=None, /, **options):
    return llm.generate(prompts, SamplingParams(**({"temperature": 0, "max_tokens": 6} | (params or {}))),
                        **({"use_tqdm": False} | options))  # fmt: skip


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


# -- prompts


def test_every_form_of_a_prompt(llm):
    ids = llm.encode(PROMPT)
    [want] = tokens_of(generate(llm, PROMPT))
    assert count_ties("llama", ids, want) == 0
    one = [ids, tuple(ids), np.array(ids), np.array(ids, np.uint16), {"prompt": PROMPT}, {"prompt_token_ids": ids},
           {"prompt": "another text", "prompt_token_ids": np.array(ids)}]  # fmt: skip
    for prompt in one:
        assert tokens_of(generate(llm, prompt)) == [want]
    several = [[PROMPT, ids], (PROMPT, ids), np.array([ids, ids]), np.array([PROMPT, PROMPT]), one[:2],
               iter([PROMPT, ids]), (p for p in one)]  # fmt: skip
    for prompts in several:
        found = tokens_of(generate(llm, prompts))
        assert len(found) >= 2 and all(row == want for row in found)
    assert generate(llm, []) == []


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = [[i + 10, i + 20] for i in range(20)]
    lengths = [1 + i * 7 % 5 for i in range(20)]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [len(row) for row in tokens_of(outputs)] == lengths
    assert len({output.request_id for output in outputs}) == 20


def test_an_iterator_is_pulled_as_requests_finish(llm):
    pulled, finished, ahead = 0, 0, []

    def prompts():
        nonlocal pulled
        for i in range(60):
            pulled += 1
            ahead.append(pulled - finished)
            yield [i + 5, 7]

    def bar(*_, **options):
        return Bar()

    class Bar:
        format_dict = {"elapsed": 1.0}  # noqa: RUF012

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def set_postfix_str(self, *_, **__):
            pass

        def update(self, count):
            nonlocal finished
            finished += count

    outputs = generate(llm, prompts(), use_tqdm=bar)
    assert [output.prompt_token_ids[0] for output in outputs] == list(range(5, 65))
    assert finished == 60 and 8 < max(ahead) <= 2 * 8 + 1  # max_num_seqs twice


def test_an_endless_iterator_gives_its_first_outputs(llm):
    outputs = llm.generate(([i % 50 + 3] for i in itertools.count()), GREEDY, stream=True)
    finished = 0
    for output in outputs:
        finished += output.finished
        if finished == 30:
            break
    outputs.close()
    deadline = time.monotonic() + 5
    while llm.get_metrics()["num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.get_metrics()["num_requests_running"] == 0


def test_a_bad_prompt_in_an_iterator_fails_alone(llm):
    outputs = generate(llm, iter([PROMPT, [VOCAB], "", 5, PROMPT]))
    errors = [output.error for output in outputs]
    assert errors[0] is errors[4] is None and tokens_of(outputs)[0] == tokens_of(outputs)[4] != []
    assert all(isinstance(error, RequestError) for error in errors[1:4])
    assert f"token id {VOCAB}" in str(errors[1]) and "no tokens" in str(errors[2]) and "int" in str(errors[3])
    assert [output.outputs[0].finish_reason for output in outputs[1:4]] == ["error"] * 3
    assert all(output.finished for output in outputs)


def test_a_bad_prompt_in_a_list_refuses_all(llm):
    before = llm.get_metrics()["prompt_tokens"]
    with pytest.raises(RequestError, match="token id 600"):
        generate(llm, [PROMPT, [VOCAB]])
    assert llm.get_metrics()["prompt_tokens"] == before


def test_parameters_and_priorities_one_or_each(llm):
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(RequestError, match="1 priority for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, priority=[1], use_tqdm=False)
    with pytest.raises(RequestError, match="fewer sampling_params"):
        llm.generate(iter(["a", "b", "c"]), [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(RequestError, match="sampling_params=5"):
        llm.generate("a", 5, use_tqdm=False)
    with pytest.raises(RequestError, match="must be SamplingParams"):
        llm.generate("a", {"temperature": 0}, use_tqdm=False)
    with pytest.raises(RequestError, match=r"priority=1\.5"):
        llm.generate("a", GREEDY, priority=1.5, use_tqdm=False)
    outputs = llm.generate(iter(["a", "b"]), iter([GREEDY, GREEDY]), priority=np.int64(3), use_tqdm=False)
    assert [len(row) for row in tokens_of(outputs)] == [6, 6]


def test_a_smaller_priority_goes_first():
    with fresh_llm() as llm:
        done = [
            output.prompt_token_ids[0]
            for output in llm.generate(
                [[i] for i in range(3, 43)], GREEDY, priority=[-i for i in range(40)], stream=True
            )
            if output.finished
        ]
        # Those that had started when the others came are done first too: no more than the rows.
        assert sorted(done[:16]) != sorted(done)[:16] and np.mean(done[8:20]) > np.mean(done[-12:])


# -- streams


@pytest.mark.parametrize("stop", [(), ("ic", " t")])
def test_deltas_join_to_the_final_text(llm, stop):
    params = {"max_tokens": 40, "stop": stop, "logprobs": 1}
    prompts = [PROMPT, "import os", [5, 6, 7], "é漢字🙂"]
    finals = generate(llm, prompts, params)
    if not stop:  # random tokens are full of halves of characters
        assert any("\ufffd" in output.outputs[0].text for output in finals)
        assert any(not char.isascii() for output in finals for char in output.outputs[0].text.replace("\ufffd", ""))
    for kind in ("delta", "cumulative", "final_only"):
        texts, ids, updates = {}, {}, {}
        for output in generate(llm, prompts, params | {"output_kind": kind}, stream=True):
            [completion] = output.outputs
            key = tuple(output.prompt_token_ids)
            updates[key] = updates.get(key, 0) + 1
            assert len(completion.logprobs) == len(completion.token_ids)
            if kind == "delta":
                texts[key] = texts.get(key, "") + completion.text
                ids[key] = ids.get(key, []) + completion.token_ids
            else:
                assert completion.text.startswith(texts.get(key, ""))
                texts[key], ids[key] = completion.text, completion.token_ids
        for final in finals:
            key = tuple(final.prompt_token_ids)
            assert texts[key] == final.outputs[0].text
            assert ids[key] == final.outputs[0].token_ids
            assert updates[key] == (1 if kind == "final_only" else len(ids[key]))


def test_a_stop_string_that_spans_tokens(llm):
    [output] = generate(llm, PROMPT, {"max_tokens": 20})
    text, ids = output.outputs[0].text, output.outputs[0].token_ids
    pieces = [llm.get_tokenizer().decode([token]) for token in ids]
    i = next(i for i in range(2, 19) if all(p.isascii() and len(p) > 1 for p in pieces[i : i + 2]))
    stop = pieces[i][-1] + pieces[i + 1][0]
    assert stop not in "".join(pieces[: i + 1])
    for include in (False, True):
        params = {"max_tokens": 20, "stop": stop, "include_stop_str_in_output": include}
        [stopped] = generate(llm, PROMPT, params)
        completion = stopped.outputs[0]
        assert completion.text == text[: text.index(stop) + len(stop) * include]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == ids[: i + 2]


def test_several_completions_share_the_prompt(llm):
    prompt = list(range(50, 100))
    queries = llm.get_metrics()
    [output] = generate(llm, prompt, {"n": 5, "temperature": 1.5, "seed": 3})
    rows = [completion.token_ids for completion in output.outputs]
    assert [completion.index for completion in output.outputs] == list(range(5))
    assert len({tuple(row) for row in rows}) == 5
    hits = llm.get_metrics()["prefix_cache_hits"] - queries["prefix_cache_hits"]
    assert hits == 4 * 48  # all but the last, unfinished page of 8
    assert output.metrics.num_output_tokens == 30
    [delta] = [o for o in generate(llm, prompt, {"n": 2, "output_kind": "delta"}, stream=True) if o.finished]
    assert delta.outputs


# -- what is drawn


def test_a_seed_gives_the_same_tokens_in_any_company(llm):
    params = {"temperature": 1.0, "seed": 11, "max_tokens": 10}
    [alone] = tokens_of(generate(llm, PROMPT, params))
    company = [SamplingParams(temperature=1.3, max_tokens=i + 2, logprobs=i % 2 or None) for i in range(6)]
    prompts = [[9 + i] * (i * 9 + 1) for i in range(6)]
    outputs = llm.generate([*prompts, PROMPT], [*company, SamplingParams(**params)], use_tqdm=False)
    assert tokens_of(outputs)[-1] == alone
    [with_logprobs] = tokens_of(generate(llm, PROMPT, params | {"logprobs": 2, "top_p": 1.0}))
    assert with_logprobs == alone
    for flights in (0, 2):
        with fresh_llm(steps_in_flight=flights) as other:
            assert tokens_of(generate(other, PROMPT, params)) == [alone]
    assert tokens_of(generate(llm, PROMPT, params | {"seed": 12})) != [alone]
    assert tokens_of(generate(llm, PROMPT, params | {"seed": -(2**63)})) != [alone]


def test_without_seeds_requests_differ_and_engines_repeat():
    found = []
    for seed in (0, 0, 1):
        with fresh_llm(seed=seed) as llm:
            found.append(tokens_of(generate(llm, [PROMPT, PROMPT], {"temperature": 1.0})))
    assert found[0][0] != found[0][1]
    assert found[0] == found[1] != found[2]


def drawn(llm, count=60, **params):
    """First tokens of `count` draws."""
    params = SamplingParams(**({"temperature": 1.0, "max_tokens": 1, "n": count, "seed": 5} | params))
    [output] = llm.generate(PROMPT, params, use_tqdm=False)
    return [completion.token_ids[0] for completion in output.outputs]


@pytest.fixture(scope="module")
def ranking(llm):
    """Tokens after PROMPT from the most probable on, and their probabilities."""
    [output] = generate(llm, PROMPT, {"logprobs": -1, "max_tokens": 1})
    logprobs = output.outputs[0].logprobs
    return logprobs.top_token_ids[0], np.exp(logprobs.top_logprobs[0].astype(np.float64))


def test_temperature_top_k_top_p_min_p(llm, ranking):
    ids, probabilities = ranking
    wide = drawn(llm)
    assert len(set(wide)) > 10
    assert set(drawn(llm, temperature=0.0)) == {ids[0]}
    assert len(set(drawn(llm, temperature=0.3))) < len(set(wide)) < len(set(drawn(llm, temperature=3.0)))
    assert set(drawn(llm, temperature=3.0, top_k=3)) == set(ids[:3])
    assert set(drawn(llm, top_k=-1)) == set(wide)
    count = int(np.searchsorted(np.cumsum(probabilities), 0.5)) + 1
    nucleus = drawn(llm, 200, top_p=0.5)
    assert set(nucleus) <= set(ids[:count]) and len(set(nucleus)) > count // 2
    ratio = float(np.sqrt(probabilities[2] * probabilities[3]) / probabilities[0])  # between the third and the fourth
    assert set(drawn(llm, 200, min_p=ratio)) == set(ids[:3])


def test_bias_allowed_tokens_and_bad_words(llm, ranking):
    ids, _ = ranking
    assert set(drawn(llm, 5, logit_bias={100: 1e4})) == {100}
    assert ids[0] not in drawn(llm, logit_bias={int(ids[0]): -np.inf})
    assert set(drawn(llm, 60, temperature=50.0, allowed_token_ids=[7, 300, 599])) == {7, 300, 599}
    [plain] = generate(llm, PROMPT, {"max_tokens": 8})
    pieces = [llm.get_tokenizer().decode([token]) for token in plain.outputs[0].token_ids]
    i = next(i for i in range(1, 8) if pieces[i].isascii() and len(pieces[i]) > 1)
    for word in (pieces[i], pieces[i].strip() or pieces[i]):  # white space too
        [changed] = generate(llm, PROMPT, {"max_tokens": 8, "bad_words": [word]})
        assert changed.outputs[0].token_ids[:i] == plain.outputs[0].token_ids[:i]
        assert changed.outputs[0].token_ids[i] != plain.outputs[0].token_ids[i]


def test_a_bad_word_of_several_tokens_is_never_completed(llm):
    word = "xq"
    ids = llm.encode(word, add_special_tokens=False)
    assert len(ids) == 2
    push = {"allowed_token_ids": ids, "max_tokens": 30, "temperature": 100.0, "seed": 1}
    [free] = generate(llm, PROMPT, push)
    [held] = generate(llm, PROMPT, push | {"bad_words": [word]})

    def holds(row):
        return any(row[i : i + len(ids)] == ids for i in range(len(row)))

    assert holds(free.outputs[0].token_ids) and not holds(held.outputs[0].token_ids)


def test_penalties(llm):
    push = {"logit_bias": {77: 30.0}, "max_tokens": 6}
    assert tokens_of(generate(llm, PROMPT, push)) == [[77] * 6]
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        [row] = tokens_of(generate(llm, PROMPT, {"logit_bias": {77: 12.0, 78: 11.0}, "max_tokens": 3}))
        [changed] = tokens_of(generate(llm, PROMPT, {"logit_bias": {77: 12.0, 78: 11.0}, "max_tokens": 3} | penalty))
        assert row[0] == changed[0] and row != changed
    ids = llm.encode(PROMPT)
    only = {"allowed_token_ids": [ids[0], 400], "logit_bias": {ids[0]: 1000.0, 400: 990.0}, "max_tokens": 1}
    assert tokens_of(generate(llm, PROMPT, only)) == [[ids[0]]]
    assert tokens_of(generate(llm, PROMPT, only | {"repetition_penalty": 2.0})) == [[400]]  # the prompt counts


# -- when it ends


def test_ends(llm):
    force = {"logit_bias": {EOS: 1e4}, "max_tokens": 5}
    [output] = generate(llm, PROMPT, force)
    completion = output.outputs[0]
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([EOS], "", "stop")
    assert completion.stop_reason is None
    [output] = generate(llm, PROMPT, force | {"ignore_eos": True})
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([EOS] * 5, "length")
    [output] = generate(llm, PROMPT, force | {"min_tokens": 3})
    assert EOS not in output.outputs[0].token_ids[:3] and output.outputs[0].token_ids[3:] == [EOS]
    [output] = generate(llm, PROMPT, {"logit_bias": {77: 1e4}, "stop_token_ids": [77]})
    assert (output.outputs[0].token_ids, output.outputs[0].stop_reason) == ([77], 77)
    assert output.outputs[0].text == ""
    params = {"logit_bias": {77: 1e4}, "stop_token_ids": [77], "include_stop_str_in_output": True}
    assert generate(llm, PROMPT, params)[0].outputs[0].text == llm.get_tokenizer().decode([77])
    [output] = generate(llm, [5] * 250, {"max_tokens": None})
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (6, "length")


def test_text_fields(llm):
    force = {"allowed_token_ids": [EOS], "ignore_eos": True, "max_tokens": 2}
    assert generate(llm, PROMPT, force)[0].outputs[0].text == ""
    marked = generate(llm, PROMPT, force | {"skip_special_tokens": False})[0].outputs[0].text
    name = llm.get_tokenizer().decode([EOS], skip_special_tokens=False)
    assert name and marked.count(name) == 2
    [silent] = generate(llm, PROMPT, {"detokenize": False})
    assert silent.outputs[0].text == "" and len(silent.outputs[0].token_ids) == 6


def test_timeout(llm):
    [output] = generate(llm, PROMPT, {"max_tokens": None, "timeout": 1e-4, "ignore_eos": True})
    assert output.outputs[0].finish_reason == "timeout" and len(output.outputs[0].token_ids) < 200
    [output] = generate(llm, PROMPT, {"timeout": 100.0})
    assert output.outputs[0].finish_reason == "length"


# -- what is reported


def test_progress_bars(llm, capsys):
    generate(llm, ["a", "b"], use_tqdm=True)
    shown = capsys.readouterr().err
    assert "Processed prompts" in shown and "2/2" in shown and "output: " in shown
    generate(llm, ["a", "b"], use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_metrics_and_tables(llm):
    llm.reset_prefix_cache()
    before = llm.get_metrics()
    prompt = list(range(100, 140))
    outputs = generate(llm, [prompt, prompt[:3]], {"logprobs": 0})
    [again] = generate(llm, [prompt])
    assert outputs[0].num_cached_tokens == 0 and again.num_cached_tokens == 32
    moments = outputs[0].metrics
    assert (moments.arrival_time <= moments.queued_time <= moments.scheduled_time <= moments.first_token_time
            <= moments.last_token_time)  # fmt: skip
    assert moments.get("tokens_per_sec") > 0 and moments.get("nonsense", 7) == 7
    after = llm.get_metrics()
    assert after["prompt_tokens"] - before["prompt_tokens"] == 83
    assert after["generation_tokens"] - before["generation_tokens"] == 18
    assert after["request_success"]["length"] - before["request_success"].get("length", 0) == 3
    assert after["kv_cache_usage_perc"] == after["num_requests_running"] == after["num_requests_waiting"] == 0
    table = outputs.to_pandas()
    assert list(table["num_prompt_tokens"]) == [40, 3]
    assert list(table["text"]) == [output.outputs[0].text for output in outputs]
    assert (table["cumulative_logprob"] < 0).all()


def test_chat_and_encode(llm):
    chat = [{"role": "user", "content": "hi"}]
    text = llm.get_tokenizer().apply_chat_template(chat)
    assert text == "user: hi\nassistant:"
    outputs = llm.chat([chat, chat], GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(generate(llm, [text, text]))
    assert outputs[0].prompt == text
    [delta] = [o for o in llm.chat(chat, GREEDY, stream=True) if o.finished]
    assert delta.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert llm.encode(["a", "b"]) == [llm.encode("a"), llm.encode("b")]


def test_a_salt_keeps_pages_apart(llm):
    prompt = list(range(200, 240))
    salts = ["one", "one", "two", None]
    cached = [generate(llm, {"prompt_token_ids": prompt, "cache_salt": salt})[0].num_cached_tokens for salt in salts]
    assert cached == [0, 32, 0, 0]


def test_what_ended_is_freed_without_the_collector():
    llm = shared_llm()
    gc.collect()
    gc.disable()
    try:
        known = {id(thing) for thing in gc.get_objects() if isinstance(thing, Request)}
        outputs = llm.generate([[5, 6, 7]] * 20, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        left = [thing for thing in gc.get_objects() if isinstance(thing, Request) and id(thing) not in known]
        assert len(outputs) == 20 and len(left) <= 1, "but for the last, which the engine's thread may still look at"
    finally:
        gc.enable()


def test_a_long_list_is_taken_in_between_steps(monkeypatch):
    monkeypatch.setattr("jaxengine.engine.loop.COMMANDS", 4)
    with fresh_llm() as llm:
        submit, taken = llm._runner.submit, []
        llm._runner.submit = lambda inputs: taken.append(llm._loop._engine.prompt_tokens // 2) or submit(inputs)
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        outputs = llm.generate([[i + 3, 6] for i in range(80)], params, use_tqdm=False)
        assert [output.prompt_token_ids[0] for output in outputs] == [*range(3, 83)]
        assert max(np.diff(taken)) <= 4 and taken[-1] == 80
