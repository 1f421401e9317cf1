import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.config import RopeConfig
from jaxengine.layers.rope import apply_rope, rope_angles, rope_frequencies

FIXTURE = json.loads((Path(__file__).parents[1] / "references" / "rope.json").read_text())


def case_id(case):
    options = [key for key in case["parameters"] if "factor" not in key or key == "attention_factor"]
    return "-".join([case["parameters"]["rope_type"], str(case["length"]), *options[1:]])


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=case_id)
def test_frequencies_equal_transformers(case):
    options = {key: value for key, value in case["parameters"].items() if key != "rope_type"}
    rope = RopeConfig(case["parameters"]["rope_type"], case["theta"], FIXTURE["dim"], options)
    inv_freq, factor = rope_frequencies(rope, case["length"], case["max_position_embeddings"])
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, case["inv_freq"], rtol=1e-6)
    assert factor == pytest.approx(case["factor"], rel=1e-6)


def test_longrope_refuses_another_number_of_factors():
    rope = RopeConfig("longrope", 10_000.0, 8, {"short_factor": [1.0] * 3, "long_factor": [1.0] * 3})
    with pytest.raises(ValueError, match="3 factors for 4 pairs"):
        rope_frequencies(rope, 16, 16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_as_complex_numbers(dtype):
    """Dimensions i and i + pairs are a complex number, turned by position * inv_freq[i]; the rest is left as it was."""
    rng, tokens, heads, dim, rotary_dim = np.random.default_rng(0), 5, 3, 12, 8
    x = jnp.asarray(rng.standard_normal((tokens, heads, dim)), dtype)
    positions = np.array([0, 1, 7, 100, 8191], np.int32)
    inv_freq, _ = rope_frequencies(RopeConfig(rotary_dim=rotary_dim), 8192, 8192)
    out = apply_rope(x, *rope_angles(positions, jnp.asarray(inv_freq), 1.5))
    assert out.dtype == dtype
    exact = np.asarray(x, np.float64)
    turned = (exact[..., :4] + 1j * exact[..., 4:8]) * 1.5
    turned = turned * np.exp(1j * (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64))[:, None]
    expected = np.concatenate([turned.real, turned.imag, exact[..., 8:]], axis=-1)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-5 if dtype == jnp.float32 else 0.02)
    np.testing.assert_array_equal(np.asarray(out[..., 8:]), np.asarray(x[..., 8:]))
