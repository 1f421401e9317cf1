"""What borrowing a trainer's parameters costs and saves, beside an engine that copies and fuses them.

    python -m benchmarks.borrowed --model llama1b --dtype bfloat16 --requests 1,64

Without --model: the shipped one. `extra_bytes` is what the weights take on the device beside the trainer's.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import claim_memory, report
from benchmarks.workloads import SHAPES, write_checkpoint_config


def trainer_params(shape: str | None, dtype: str) -> tuple[Any, dict[str, Any]]:
    """A config, and canonical parameters as a trainer holds them."""
    from jaxengine.llm import SHIPPED_MODEL
    from jaxengine.sharding import create_mesh
    from jaxengine.weights import load_params, open_checkpoint

    if shape is None:
        checkpoint = open_checkpoint(SHIPPED_MODEL)
        return checkpoint.config, load_params(checkpoint, dtype, create_mesh())
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint_config(SHAPES[shape], Path(folder))
        checkpoint = open_checkpoint(folder, load_format="dummy")
        return checkpoint.config, load_params(checkpoint, dtype, create_mesh())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", default="1,16")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    claim_memory()
    import jax

    from jaxengine import LLM
    from jaxengine.benchmark.serving import fixed_length

    def live_bytes() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    config, params = trainer_params(args.model, args.dtype)
    for count in map(int, args.requests.split(",")):
        prompts, length = [[i + 5] * 8 for i in range(count)], fixed_length(args.tokens)
        for fuse in (False, True):
            before = live_bytes()
            options = {"max_num_seqs": count, "max_model_len": args.tokens + 16, "enable_prefix_caching": False}
            with LLM(params, config=config, fuse_weights=fuse, **options) as llm:
                runner, seconds = llm._runner, []
                state = sum(x.nbytes for x in jax.tree.leaves((runner._cache, runner._slots, runner._rules)))
                extra = live_bytes() - before - state
                for _ in range(args.repeats + 1):  # the first compiles
                    begin = time.perf_counter()
                    llm.generate(prompts, length, use_tqdm=False)
                    seconds.append(time.perf_counter() - begin)
            report({
                "model": args.model or "shipped", "device": jax.devices()[0].device_kind, "fuse_weights": fuse,
                "requests": count, "trainer_bytes": sum(x.nbytes for x in params.values()), "extra_bytes": extra,
                "out_tok_s": count * args.tokens / min(seconds[1:]),
            })  # fmt: skip


if __name__ == "__main__":
    main()
