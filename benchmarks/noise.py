"""How far log-probabilities of prompts lie apart: in other batches, on other devices, and from float32.

Rounding may differ with a batch's shape, and does with the order of a sum over devices. So what several devices answer
in bfloat16 is held against float32 with the very same weights, from which one device is about as far.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import random_llm
from benchmarks.workloads import SHAPES

PROMPTS, TOKENS = 8, 192  # one is a small step, all together are a large one, with other tiles and so other sums


def log_probabilities(llm: Any, shape: str, together: bool = True) -> np.ndarray:
    """Of each token of random prompts but the first, given those before it, [PROMPTS, TOKENS - 1]."""
    from jaxengine import SamplingParams

    rng, params = random.Random(0), SamplingParams(max_tokens=0, prompt_logprobs=0, detokenize=False)
    prompts = [[rng.randrange(2, SHAPES[shape].vocab_size) for _ in range(TOKENS)] for _ in range(PROMPTS)]
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    outputs = [output for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]
    return np.stack([output.prompt_logprobs.logprobs for output in outputs])


def in_float32(shape: str, file: Path) -> np.ndarray:
    """`log_probabilities` on one device in float32, with the values that `random_llm`'s weights have in bfloat16.

    From the file where it is there; otherwise they are computed, and kept in it. Raises KeyError for another shape's.
    """
    if file.exists():
        return np.load(file)[shape]
    import jax.numpy as jnp

    from jaxengine.models import param_specs
    from jaxengine.sharding import create_mesh
    from jaxengine.weights.checkpoint import read_config
    from jaxengine.weights.dummy import random_params

    config = SHAPES[shape].hf_config()
    params = random_params(param_specs(read_config(config, "float32", ())), "bfloat16", create_mesh(), seed=0)
    for name in list(params):
        params[name] = params.pop(name).astype(jnp.float32)
    sizes = {"max_model_len": TOKENS + 1, "max_num_seqs": PROMPTS, "max_num_batched_tokens": PROMPTS * TOKENS}
    with random_llm(shape, params=params, dtype="float32", **sizes) as llm:
        found = log_probabilities(llm, shape)
    of_shape: dict[str, Any] = {shape: found}
    with file.open("wb") as kept:  # NumPy would add a suffix to a name
        np.savez(kept, **of_shape)
    return found


def distance(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The mean shows a bias, the mean of absolutes the noise."""
    difference = a - b
    return {
        "mean": float(difference.mean()),
        "mean_absolute": float(np.abs(difference).mean()),
        "largest": float(np.abs(difference).max()),
    }
