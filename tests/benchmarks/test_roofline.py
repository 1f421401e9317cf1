"""What a step's ops must do, by formula, and what a profile says of them."""

import re

import jax
import pytest

from benchmarks.common import random_llm
from benchmarks.profiles import Kernel, instruction_paths, keep_names, median_step, span
from benchmarks.roofline import OTHER, Cost, costs, op_of, reached, table
from benchmarks.steps import profile_step
from benchmarks.workloads import SHAPES, Work

PRODUCTS = ("q k v", "o", "gate and up", "down", "head")


def test_products_read_what_a_token_reads_and_compute_two_operations_a_parameter():
    shape = SHAPES["llama8b"]
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    of_one = costs(shape, Work.parse("1x1"))
    assert sum(of_one[op].flops for op in PRODUCTS) == 2 * (shape.parameters_read - norms)
    assert sum(of_one[op].bytes for op in PRODUCTS) == pytest.approx(2 * shape.parameters_read, rel=1e-3)
    of_many = costs(shape, Work.parse("256x640"))
    assert of_many["down"].flops == 256 * of_one["down"].flops
    assert of_many["down"].bytes < 1.2 * of_one["down"].bytes


def test_attention_reads_keys_and_values_once_and_sees_no_future():
    shape = SHAPES["llama8b"]
    found = costs(shape, Work.parse("3x100+2x4"))
    q, layers = shape.num_heads * shape.head_dim, shape.num_layers
    assert found["decode attention"] == (layers * 300 * 4 * q, 300 * shape.kv_bytes() + layers * 3 * 4 * q)
    pairs = 2 * (1 + 2 + 3 + 4)
    assert found["extend attention"] == (layers * pairs * 4 * q, 8 * shape.kv_bytes() + layers * 8 * 4 * q)
    assert "extend attention" not in costs(shape, Work.parse("3x100"))
    with pytest.raises(ValueError, match="steps=4"):
        costs(shape, Work.parse("3x100*4"))


def test_the_slower_of_reading_and_multiplying_is_the_limit():
    kernels = [
        Kernel("a", "jit(f)/down_proj/dot", 0, 3e6), Kernel("b", "jit(f)/head/norm/mul", 4e6, 2e6),
        Kernel("c", "jit(f)/mul", 6e6, 1e6), Kernel("a", "jit(f)/down_proj/dot", 8e6, 3e6),
    ]  # fmt: skip
    down, norms, other = reached(kernels, {"down": Cost(12, 2), "norms": Cost(1, 1)}, bandwidth=1, flops=4)
    assert (down.op, down.kernels, down.us, down.share) == ("down", 2, 6e6, 0.5)
    assert (norms.op, norms.share) == ("norms", 0.5)
    assert (other.op, other.cost) == (OTHER, None)
    assert span(kernels) == 11e6
    assert "4 kernels, busy 9000000 us of 11000000" in table([down, norms, other], kernels)


def test_instructions_are_found_under_the_names_they_were_traced_under():
    def f(x):
        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, 3, lambda _, y: jax.named_call(lambda z: z @ z, name="inner")(y), x)

    text = jax.jit(f).lower(jax.numpy.ones((8, 8))).compile().as_text()
    paths = instruction_paths(text)
    assert {module for module, _ in paths} == {"jit_f"}
    assert any("outer" in path and "inner" in path for path in paths.values())
    (loop,) = re.findall(r"%(\S+) = .* while\(", text)
    assert ("jit_f", loop) not in paths


@pytest.fixture
def names_kept():
    before = jax.config.jax_compilation_cache_include_metadata_in_key
    keep_names()
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", before)


def test_a_profile_has_each_op_of_a_step(names_kept):
    with random_llm("tiny", max_model_len=64, max_num_seqs=4) as llm:
        for shape in ("3x40", "1x40+2x20"):
            work = Work.parse(shape)
            steps = profile_step(llm._runner, work, steps=3)
            assert len({len(step) for step in steps}) == 1 and all(step[0].start == 0 for step in steps)
            limits = costs(SHAPES["tiny"], work)
            assert limits.keys() - {op_of(kernel) for kernel in median_step(steps)} <= {"activation"}  # fused with up
