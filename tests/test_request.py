import inspect
import math
import sys
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from jaxengine.errors import JaxEngineError, RequestError, UnsupportedError
from jaxengine.request import (
    MAX_LOGIT_BIAS,
    BeamSearchParams,
    CompletionOutput,
    Logprob,
    Logprobs,
    RequestMetrics,
    RequestOutput,
    RequestOutputs,
    SamplingParams,
)

NAN, INF = math.nan, math.inf
FLAGS = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")
NOT_A_FLOAT = (NAN, INF, -INF, "1", None, True)
# field: values that are refused
REFUSED = {
    "n": (0, -1, 16385, 1.0, "1", None, True),
    "temperature": (-0.1, *NOT_A_FLOAT),
    "top_p": (0, 0.0, -0.5, 1.01, *NOT_A_FLOAT),
    "top_k": (-2, 2**31, 1.5, "1", None, True),
    "min_p": (-0.1, 1.1, *NOT_A_FLOAT),
    "presence_penalty": (-2.1, 2.1, *NOT_A_FLOAT),
    "frequency_penalty": (-2.1, 2.1, *NOT_A_FLOAT),
    "repetition_penalty": (0, -1.0, 1e7, *NOT_A_FLOAT),
    "seed": (2**64, -(2**63) - 1, 1.5, "1", False),
    "stop": ("", ["a", ""], [1], [None], [b"a"]),
    "stop_token_ids": ([-1], [1.5], ["1"], 3, "12", [True]),
    "include_stop_str_in_output": (1, None, "yes"),
    "ignore_eos": (1, None, "yes"),
    "max_tokens": (0, -5, 1.5, "1", True),  # 0: without prompt_logprobs
    "min_tokens": (-1, 17, 1.5, None),  # max_tokens is 16
    "logprobs": (-2, 1.5, "1", True),
    "prompt_logprobs": (-2, 1.5, "1", True),
    "prompt_logprobs_start": (-1, 3, 1.5, None),  # 3: without prompt_logprobs
    "logit_bias": (
        {-1: 1.0},
        {"a": 1.0},
        {1: INF},
        {1: NAN},
        {1: "x"},
        {1: 1, "1": 2},
        [1],
        dict.fromkeys(range(513), 0),
    ),
    "allowed_token_ids": ([], [-1], [1.5], 3, "12"),
    "bad_words": ("", [""], [3]),
    "detokenize": (0, None),
    "skip_special_tokens": (0, None),
    "spaces_between_special_tokens": (0, None),
    "output_kind": ("Delta", None, 1),
    "structured_outputs": ({"json": {}}, "x"),
    "timeout": (0, -1.0, NAN, INF, "1", True),
}
# field: values that are taken as they are
TAKEN = {
    "n": (1, 5, np.int64(3)),
    "temperature": (0, 0.7, 2, np.float32(0.5)),
    "top_p": (1e-3, 1),
    "top_k": (0, 1, 50),
    "min_p": (0, 1, 0.05),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.1, 1.3),
    "seed": (None, 0, 2**64 - 1, -(2**63)),
    "max_tokens": (None, 1, 100_000),
    "min_tokens": (0, 16),
    "logprobs": (None, -1, 0, 20),
    "prompt_logprobs": (None, -1, 0, 20),
    "allowed_token_ids": (None,),
    "logit_bias": (None, {}, {3: -100.0, 4: -INF}),
    "output_kind": ("cumulative", "delta", "final_only"),
    "timeout": (None, 0.5, 3),
    **dict.fromkeys(FLAGS, (True, False)),
}


def pairs(table):
    return [pytest.param(name, value, id=f"{name}-{value!r:.20}") for name, values in table.items() for value in values]


def test_every_field_has_values_that_are_refused():
    assert set(REFUSED) == {f.name for f in fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
def test_refused(name, value):
    with pytest.raises(JaxEngineError) as error:
        SamplingParams(**{name: value})
    assert isinstance(error.value, UnsupportedError if name == "structured_outputs" else RequestError)
    assert name in str(error.value)
    if not isinstance(value, list | dict | str | bytes):
        assert str(value) in str(error.value)


@pytest.mark.parametrize(("name", "value"), pairs(TAKEN))
def test_taken(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_defaults_are_vllms():
    expected = {
        "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": None, "max_tokens": 16, "min_tokens": 0,
        "logprobs": None, "prompt_logprobs": None,
        "ignore_eos": False, "include_stop_str_in_output": False, "detokenize": True, "skip_special_tokens": True,
        "spaces_between_special_tokens": True, "logit_bias": None, "allowed_token_ids": None,
    }  # fmt: skip
    params = SamplingParams()
    assert {name: getattr(params, name) for name in expected} == expected
    assert not params.stop and not params.stop_token_ids and not params.bad_words


def test_one_way_to_say_each_thing():
    params = SamplingParams(
        temperature=1e-6, top_k=-1, seed=-1, stop="end", stop_token_ids=None, bad_words="x", logit_bias={"7": 1}
    )
    assert (params.temperature, params.top_k, params.seed) == (0, 0, None)
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("end",), (), ("x",))
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(stop=None, bad_words=None).stop == ()
    assert type(SamplingParams(n=np.int64(2)).n) is int and type(SamplingParams(top_p=1).top_p) is float
    assert replace(params, n=2).logit_bias == {7: 1.0}  # what was made canonical is still accepted


def test_combinations():
    with pytest.raises(RequestError, match=r"stop=\['a'\] needs detokenize=True"):
        SamplingParams(stop="a", detokenize=False)
    with pytest.raises(RequestError, match="min_tokens=9 must be at most max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=900, max_tokens=None).min_tokens == 900
    assert SamplingParams(prompt_logprobs=1, prompt_logprobs_start=5).prompt_logprobs_start == 5
    with pytest.raises(FrozenInstanceError):
        SamplingParams().n = 2
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


@pytest.mark.parametrize(
    "wrong",
    [{"stop_token_ids": [5, 100]}, {"allowed_token_ids": [100]}, {"logit_bias": {100: 1}}, {"logprobs": 21},
     {"prompt_logprobs": 21}],
    ids=str,
)  # fmt: skip
def test_against_the_model(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))}.*(100|21)"):
        SamplingParams(**wrong).validate_for(vocab_size=100, max_logprobs=20)


def test_fits_the_model():
    SamplingParams(
        stop_token_ids=[99], allowed_token_ids=[0, 99], logit_bias={99: -INF}, logprobs=-1, prompt_logprobs=20
    ).validate_for(vocab_size=100, max_logprobs=20)
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1)).logit_bias) == MAX_LOGIT_BIAS


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 1.1}, {"logit_bias": {1: 1}},
     {"allowed_token_ids": [1]}, {"bad_words": ["x"]}, {"min_tokens": 1}],
    ids=str,
)  # fmt: skip
def test_what_edits_the_logits(params):
    assert SamplingParams(**params).edits_logits and SamplingParams(**params).needs_everything


def test_what_the_engine_asks():
    plain = SamplingParams(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop="x", prompt_logprobs=2)
    assert not plain.edits_logits and not plain.needs_everything and not plain.greedy
    logprobs = SamplingParams(logprobs=0, temperature=0)
    assert logprobs.needs_everything and not logprobs.edits_logits and logprobs.greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [("beam_width", 0), ("max_tokens", 0), ("temperature", -1), ("length_penalty", NAN), ("ignore_eos", 1)],
)
def test_beam_search_refused(name, value):
    with pytest.raises(RequestError, match=f"{name}={value}"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 8, name: value})


def test_beam_search_taken():
    params = BeamSearchParams(4, 16)
    assert (params.beam_width, params.max_tokens, params.temperature, params.length_penalty) == (4, 16, 0.0, 1.0)


def rows():
    return [
        (-1.0, 2, np.array([1, 4]), np.array([-0.5, -1.0], np.float32)),
        (-2.0, 3, np.array([7, 8]), np.array([-0.5, -0.5], np.float32)),
    ]


def test_logprobs_as_dicts():
    logprobs = Logprobs([4, 5], rows(), decode=lambda token: f"<{token}>")
    assert list(logprobs) == [
        {4: Logprob(-1.0, 2, "<4>"), 1: Logprob(-0.5, 1, "<1>")},
        {5: Logprob(-2.0, 3, "<5>"), 7: Logprob(-0.5, 1, "<7>"), 8: Logprob(-0.5, 1, "<8>")},
    ]
    assert next(iter(logprobs[1])) == 5  # a position's own token comes first
    assert logprobs[-1] == logprobs[1] and logprobs[:1] == [logprobs[0]]
    with pytest.raises(IndexError):
        logprobs[2]
    assert Logprobs([4, 5], rows())[0][4].decoded_token is None


def test_logprobs_of_a_prompt_start_with_none():
    logprobs = Logprobs([4, 5], rows(), skipped=3)
    assert len(logprobs) == 5 and list(logprobs)[:3] == [None] * 3 and 4 in logprobs[3]
    assert len(logprobs.token_ids) == 2


def test_logprobs_as_arrays_make_no_dict(monkeypatch):
    monkeypatch.setattr("jaxengine.request.Logprob", None)
    logprobs = Logprobs([4, 5], rows())
    assert logprobs.token_ids.tolist() == [4, 5] and logprobs.ranks.tolist() == [2, 3]
    assert logprobs.logprobs.dtype == np.float32 and logprobs.logprobs.tolist() == [-1, -2]
    assert logprobs.top_token_ids.tolist() == [[1, 4], [7, 8]]
    assert logprobs.top_logprobs.tolist() == [[-0.5, -1.0], [-0.5, -0.5]]
    empty, none = Logprobs([], []), Logprobs([3], [(-1.0, 1, [], [])])
    assert empty.top_logprobs.shape == (0, 0) and none.top_logprobs.shape == (1, 0)


def test_logprobs_without_any_best():
    assert Logprobs([3], [(-1.0, 6, [], [])])[0] == {3: Logprob(-1.0, 6)}


def test_logprobs_do_not_follow_growing_rows():
    growing, ids = rows(), [4, 5]
    logprobs = Logprobs(ids, growing)
    growing.append(growing[0])
    ids.append(6)
    assert len(logprobs) == 2 and len(logprobs.ranks) == 2 and len(logprobs.token_ids) == 2


def test_metrics():
    metrics = RequestMetrics(100.0, 100.1, 101.0, 101.5, 103.0, num_output_tokens=10)
    assert metrics.get("tokens_per_sec") == 5.0
    assert metrics.get("time_in_queue") == 1.0 and metrics.get("time_to_first_token") == 1.5
    assert metrics.get("e2e_latency") == 3.0 and metrics.get("first_token_time") == 101.5
    assert metrics.get("nonsense") is None and metrics.get("nonsense", 7) == 7 and metrics.get("__class__") is None
    waiting = RequestMetrics(100.0)
    assert waiting.get("tokens_per_sec") is None and waiting.get("time_in_queue", 0.0) == 0.0


def output(request_id="0", texts=("a", "b"), **kwargs):
    completions = [CompletionOutput(i, text, [1, 2][: i + 1], finish_reason="stop") for i, text in enumerate(texts)]
    metrics = RequestMetrics(100.0, 100.0, 100.0, 100.5, 101.0, num_output_tokens=3)
    return RequestOutput(request_id, "hello", [5, 6, 7], None, completions, True, metrics, **kwargs)


def test_outputs():
    assert output() == output() and output().outputs[1].finished and not CompletionOutput(0, "", []).finished
    assert list(inspect.signature(RequestOutput).parameters)[:7] == [
        "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics"
    ]  # fmt: skip


def test_to_pandas():
    frame = RequestOutputs([output("0"), output("1", ("c",), error=RequestError("why"))]).to_pandas()
    assert frame["request_id"].tolist() == ["0", "0", "1"] and frame["text"].tolist() == ["a", "b", "c"]
    assert frame["num_output_tokens"].tolist() == [1, 2, 1] and frame["num_prompt_tokens"].tolist() == [3, 3, 3]
    assert frame["tokens_per_sec"].tolist() == [3.0] * 3 and frame["error"].tolist()[2] == "why"
    assert len(RequestOutputs().to_pandas()) == 0


def test_to_pandas_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        RequestOutputs([output()]).to_pandas()
