"""Rollouts: what they give, that their log-probabilities are the model's, new parameters; scripts.grpo's reward."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxengine import LLM, ConfigError, UnsupportedError
from jaxengine.handoff.rollout import Rollout, RolloutConfig
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from scripts.grpo import advantages, reward
from tests.tiny_llm import CONFIGS, EOS, OPTIONS, model_folder

PROMPTS = [[5, 6, 7], [5, 6, 7], list(range(40, 60))]
CONFIG = RolloutConfig(max_tokens_to_generate=12, temperature=1.0, seed=7, max_prompt_length=8)


@pytest.fixture(scope="module")
def params():
    return load_params(open_checkpoint(model_folder()), "float32", create_mesh())


@pytest.fixture(scope="module")
def rollout(params):
    with LLM(params, config=CONFIGS["llama"], **OPTIONS) as llm:
        yield Rollout(llm)


def test_shapes_padding_and_ends(rollout):
    output = rollout.generate(PROMPTS, CONFIG)
    assert output.tokens.shape == output.logprobs.shape == (3, 12) and output.logits is None
    assert output.left_padded_prompt_tokens.shape == (3, 20) and output.prompt_lengths.tolist() == [3, 3, 20]
    assert output.left_padded_prompt_tokens[0].tolist() == [rollout.pad_id()] * 17 + [5, 6, 7]
    assert output.tokens[0].tolist() != output.tokens[1].tolist(), "samples of one prompt"
    for row, logprobs, count in zip(output.tokens, output.logprobs, output.lengths, strict=True):
        assert (
            (row[count:] == rollout.pad_id()).all() and (logprobs[count:] == 0).all() and (logprobs[:count] < 0).all()
        )
    # A token that was drawn is made the end: the same samples stop there, and keep it.
    end = int(output.tokens[0, 4])
    ended = rollout.generate(PROMPTS, RolloutConfig(12, 1.0, seed=7, eos_tokens=[end]))
    first = output.tokens[0].tolist().index(end)
    assert ended.lengths[0] == first + 1 and ended.tokens[0, first] == end


def test_seeds(rollout):
    one, same = (rollout.generate(PROMPTS, CONFIG).tokens for _ in range(2))
    assert one.tolist() == same.tolist()
    keys = [RolloutConfig(12, 1.0, seed=key) for key in (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(4))]
    typed, raw, other = (rollout.generate(PROMPTS, config).tokens.tolist() for config in keys)
    assert typed == raw != other
    assert rollout.generate(PROMPTS, CONFIG, logit_bias={9: 100.0}).tokens.max() == 9


def test_teacher_forced_log_probabilities_are_those_that_were_sampled_with(rollout):
    output = rollout.generate(PROMPTS, RolloutConfig(12, 1.0, seed=5, eos_tokens=[599]))
    tokens = output.left_padded_prompt_tokens, output.tokens
    mask = np.arange(12) < output.lengths[:, None]
    np.testing.assert_allclose(rollout.get_per_token_logps(*tokens, mask), output.logprobs, atol=1e-4)
    shorter = rollout.get_per_token_logps(*tokens, np.arange(12) < np.array([[3], [0], [12]]))
    np.testing.assert_allclose(shorter[0, :3], output.logprobs[0, :3], atol=1e-4)
    assert not np.any(shorter[0, 3:]) and not np.any(shorter[1])
    completions = np.array([[8, EOS, 9, 9]])
    found = rollout.get_per_token_logps(np.array([[rollout.pad_id(), 5, 6]]), completions)
    assert (np.asarray(found) < 0).tolist() == [[True, True, False, False]]
    with pytest.raises(ConfigError, match="gaps"):
        rollout.get_per_token_logps(*tokens, mask[:, ::-1] & (np.arange(12) != 5))


def test_new_parameters_are_served(rollout, params):
    fixed = np.array([[5, 6, 7]]), np.array([[8, 9, 10]])
    before = np.asarray(rollout.get_per_token_logps(*fixed))
    doubled = params | {"lm_head.kernel": params["lm_head.kernel"] * 2}
    rollout.update_params(doubled, (nnx.Param,))
    assert np.abs(np.asarray(rollout.get_per_token_logps(*fixed)) - before).max() > 1e-3
    assert rollout.generate(PROMPTS, CONFIG).weight_versions == [((0, 1),)] * 3
    module = rollout.model()
    assert isinstance(module, nnx.Module)
    rollout.update_params(params)
    np.testing.assert_array_equal(rollout.get_per_token_logps(*fixed), before)
    with pytest.raises(UnsupportedError, match=r"filter_types=\['LoRAParam'\]"):
        rollout.update_params(params, (nnx.LoRAParam,))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("    return a + b\n\n", 1.0),
        ("    return a\n\n", 0.0),  # b is not read
        ("    return a + b", 0.0),  # no end
        ("    return a +\n\n\nx", 0.0),  # does not parse
        ("    print(a, b)\n\nx", 0.0),  # returns nothing
        ("    a = b = 1\n    return None\n\nx", 0.0),  # written only
    ],
)
def test_the_reward_is_for_a_function_that_uses_its_parameters(body, found):
    assert reward("def f(a, b=2):\n", body + "x = 1\n" * (not body.endswith("b"))) == found


def test_advantages_compare_within_a_group():
    found = advantages(np.array([1.0, 0, 0, 0, 1, 1, 1, 1]), 4)
    assert found[0] > 0 > found[1] == found[2] and not found[4:].any()
