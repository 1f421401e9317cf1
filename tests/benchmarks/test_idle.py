"""The recorder of steps, and what they take when they are queued."""

import pytest

from benchmarks import idle
from jaxengine import SamplingParams
from tests.tiny_llm import fresh_llm


def test_every_step_is_recorded_and_timed_by_interpolation(monkeypatch):
    with fresh_llm(enable_prefix_caching=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        expected = [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7]] * 3, params, use_tqdm=False)]
        with idle.recorded(llm._runner) as run:
            llm.generate([[5, 6, 7]] * 3, params, use_tqdm=False)
        steps = run.steps
        assert [inputs.kind for inputs in steps] == ["mixed"] + ["decode"] * 11
        with idle.recorded(llm._runner) as run:
            for inputs in steps:
                llm._runner.submit(inputs).result()
        assert run.late == len(steps) - 1, "all but the first came to a device that had nothing to do"
        assert idle.queued_seconds(llm._runner, steps, samples=2, repeats=2) > 0
        # Of a program's steps, those between two that are timed take what lies between.
        places = {id(inputs): i for i, inputs in enumerate(steps)}
        timed = []
        monkeypatch.setattr(
            idle, "_queued", lambda _, inputs, n: timed.append(places[id(inputs)]) or places[id(inputs)]
        )
        assert idle.queued_seconds(llm._runner, steps, samples=3) == pytest.approx(sum(range(12)))
        assert timed == [0, 2, 6, 10]
        again = [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7]] * 3, params, use_tqdm=False)]
        assert again == expected
