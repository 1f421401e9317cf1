"""What sleep gives back, by the device's own count."""

import jax
import pytest

from jaxengine import LLM, SamplingParams
from tests import tiny_llm

pytestmark = pytest.mark.gpu
CACHE_BYTES = 2**28
PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
SLACK = 2**20  # of what jax itself holds


def in_use():
    return jax.devices()[0].memory_stats()["bytes_in_use"]


def test_sleep_gives_memory_back_and_wakes_without_compiling():
    options = {"max_num_seqs": 256, "max_num_batched_tokens": 512, "page_size": 16}
    nothing = in_use()
    with LLM(tiny_llm.model_folder(), kv_cache_memory_bytes=CACHE_BYTES, **options) as llm:
        prompt = list(range(40, 60))
        [before] = llm.generate([prompt], PARAMS, use_tqdm=False)
        cache = sum(array.nbytes for array in jax.tree.leaves(llm._runner._cache))
        weights = sum(array.nbytes for array in llm._runner.weights.leaves)
        assert cache <= CACHE_BYTES
        awake = in_use()
        llm._runner.compilations.mark_warm()
        for level, given in ((1, cache), (2, cache + weights)):
            llm.sleep(level)
            assert awake - in_use() >= given - SLACK
            llm.wake_up(*([tiny_llm.model_folder()] if level == 2 else []))
            assert abs(in_use() - awake) <= SLACK
            [after] = llm.generate([prompt], PARAMS, use_tqdm=False)
            assert after.outputs[0].token_ids == before.outputs[0].token_ids
        assert llm.get_metrics()["compilations_after_warmup"] == 0
        llm.sleep(2)
        assert in_use() - nothing <= SLACK
