"""parity_report: against a trainer's forward, against log-probabilities at hand, and what it says of a difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import LLM, ConfigError, RequestError, SamplingParams, parity_report
from tests.tiny_llm import OPTIONS, dense_logprobs, model_folder, reference_logits, shared_llm

RANDOM = np.random.default_rng(0)
SEQUENCES = [RANDOM.integers(3, 600, n).tolist() for n in (40, 2, 17)]
DRAWN = SamplingParams(temperature=1, max_tokens=12, logprobs=0, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def exact():
    return [dense_logprobs(ids) for ids in SEQUENCES]


def test_against_a_forward(exact):
    shapes = []

    def forward(tokens):
        shapes.append(tokens.shape)
        return jnp.array([reference_logits("llama", row) for row in tokens.tolist()])

    report = parity_report(shared_llm(), SEQUENCES, forward, batch_size=2)
    assert shapes == [(2, 40)] * 2, "one shape, so that a jitted forward is compiled once"
    assert report.largest < 1e-4 and report.mean <= report.largest and report.first_diverging is None
    assert report.sequence.tolist() == [0] * 39 + [1] + [2] * 16
    assert report.position.tolist() == [*range(1, 40), 1, *range(1, 17)]
    assert report.token_id.tolist() == [token for ids in SEQUENCES for token in ids[1:]]
    np.testing.assert_allclose(report.reference, np.concatenate(exact), atol=1e-4)
    assert report.engine.dtype == report.reference.dtype == report.difference.dtype == np.float32
    assert repr(report).startswith("56 tokens of 3 sequences") and "all within 0.0001" in repr(report)


def test_a_difference_is_found_and_named(exact):
    wrong = [x.copy() for x in exact]
    wrong[0][30] += 0.5
    wrong[2][9] -= 0.25
    report = parity_report(shared_llm(), SEQUENCES, wrong)
    assert report.largest == pytest.approx(0.5, abs=1e-4) and report.mean == pytest.approx(0.75 / 56, abs=1e-4)
    where = report.first_diverging
    assert where[:3] == (2, 10, SEQUENCES[2][10]), "the earliest in its sequence"
    assert where.engine - where.reference == pytest.approx(0.25, abs=1e-4)
    assert "beyond 0.0001 first at Divergence(sequence=2, position=10" in repr(report)
    assert parity_report(shared_llm(), SEQUENCES, wrong, tolerance=0.3).first_diverging[:2] == (0, 31)
    wrong[1][0] = np.nan
    assert parity_report(shared_llm(), SEQUENCES, wrong, tolerance=1).first_diverging[:2] == (1, 1)


def test_what_was_drawn(exact):
    outputs = shared_llm().generate([ids[:10] for ids in SEQUENCES], DRAWN, use_tqdm=False)
    rows = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    report = parity_report(shared_llm(), outputs, [dense_logprobs(row) for row in rows])
    assert report.largest < 1e-4
    assert report.position.tolist() == [*range(10, 22), *range(2, 14), *range(10, 22)]
    assert report.token_id.tolist() == [token for output in outputs for token in output.outputs[0].token_ids]


def test_bfloat16_differs_but_little(exact):
    """Weights of deviation 0.3 round worse than any that were trained."""
    with LLM(model_folder(), dtype="bfloat16", **OPTIONS) as llm:
        report = parity_report(llm, SEQUENCES, exact)
    assert report.tolerance == 0.1 and 1e-3 < report.mean < 0.1


def test_table_and_plot(exact):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    report = parity_report(shared_llm(), SEQUENCES, exact)
    table = report.to_pandas()
    assert list(table) == ["sequence", "position", "token_id", "engine", "reference", "difference"] and len(table) == 56
    assert np.abs(table.difference).max() == report.largest
    axis = report.plot()
    [points] = axis.collections
    assert len(points.get_offsets()) == 56 and axis.get_yscale() == "log"
    assert report.plot(axis) is axis
    pyplot.close(axis.figure)


@pytest.mark.parametrize(
    ("sequences", "reference", "error", "match"),
    [
        (SEQUENCES, lambda tokens: jnp.zeros((*tokens.T.shape, 6)), ConfigError, r"\(40, 8, 6\) for tokens \(8, 40\)"),
        (SEQUENCES, lambda tokens: None, ConfigError, "reference gives NoneType"),
        (SEQUENCES, [np.zeros(39)], ConfigError, r"shapes \[\(39,\)\] where .* need \[\(39,\), \(1,\), "),
        ([[5, 6], [5]], [np.zeros(1), np.zeros(0)], RequestError, "one token"),
        ([], [], RequestError, "no token"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared(sequences, reference, error, match):
    with pytest.raises(error, match=match):
        parity_report(shared_llm(), sequences, reference)


def test_outputs_that_cannot_be_compared():
    outputs = shared_llm().generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)
    with pytest.raises(RequestError, match="has no log-probabilities"):
        parity_report(shared_llm(), outputs, jax.nn.one_hot)
    with LLM(model_folder(), logprobs_mode="processed", **OPTIONS) as llm:
        with pytest.raises(RequestError, match="'processed' are not the model's own"):
            parity_report(llm, llm.generate([[5, 6]], DRAWN, use_tqdm=False), jax.nn.one_hot)
