"""What a step's ops must do, by formula, and what a profile says of them."""

from types import SimpleNamespace

import jax
import pytest

from benchmarks.common import random_llm
from benchmarks.profiles import Kernel, keep_names, kernels_of_steps, launches, median_step, name_of, span
from benchmarks.roofline import OTHER, WHOLE, Cost, costs, op_of, reached, table
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
    two, (first, second) = costs(shape, Work.parse("3x100*2")), [costs(shape, Work.parse(f"3x{n}")) for n in (100, 101)]
    assert two["decode attention"].bytes == first["decode attention"].bytes + second["decode attention"].bytes


def test_the_slower_of_reading_and_multiplying_is_the_limit():
    kernels = [
        Kernel("a", "jit(f)/down_proj/dot", 0, 3e6), Kernel("b", "jit(f)/head/norm/mul", 4e6, 2e6),
        Kernel("c", "jit(f)/mul", 6e6, 1e6), Kernel("a", "jit(f)/down_proj/dot", 8e6, 3e6),
    ]  # fmt: skip
    down, norms, other = reached(kernels, {"down": Cost(12, 2), "norms": Cost(1, 1)}, bandwidth=1, flops=4)
    assert (down.op, down.kernels, down.us, down.share) == ("down", 2, 6e6, 0.5)
    assert (norms.op, norms.share) == ("norms", 0.5)
    assert (other.op, other.cost) == (OTHER, None)
    (whole,) = reached(
        [Kernel("d", "jit(f)/decode_layer/jit(decode_layer)/k", 0, 26e6)], {"down": Cost(12, 2), "o": Cost(1, 11)}, 1, 4
    )
    assert (whole.op, whole.cost, whole.share) == (WHOLE, Cost(13, 13), 0.5)
    assert span(kernels) == 11e6
    assert "4 kernels, busy 9000000 us of 11000000" in table([down, norms, other], kernels)


PROGRAM = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%fused (x: f32[8]) -> f32[8] {
  ROOT %dot.9 = f32[8] dot(%x, %x), metadata={op_name="jit(f)/o_proj/dot_general"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %pallas_call.1 = (f32[8]{0}, f32[]) custom-call(%x), metadata={op_name="jit(f)/add_rms_norm/pallas_call"}
  %get-tuple-element = f32[8]{0} get-tuple-element(%pallas_call.1), index=0
  %custom-call.2 = f32[8]{0} custom-call(%get-tuple-element), metadata={op_name="jit(f)/qkv_proj/dot_general"}
  %gemm_fusion.3 = f32[8]{0} fusion(%custom-call.2), calls=%fused, metadata={op_name="jit(f)/o_proj/dot_general"}
  %pallas_call.4 = f32[8]{0} custom-call(%gemm_fusion.3), metadata={op_name="jit(f)/add_rms_norm/pallas_call"}
  %gemm_fusion.5 = f32[8]{0} fusion(%pallas_call.4), calls=%fused.1, metadata={op_name="jit(f)/down_proj/dot_general"}
  ROOT %reduce.6 = f32[] reduce(%gemm_fusion.5), to_apply=%sum
}
"""


def trace_of(plane, *kernels):
    """A profile: (name, hlo_op) one after another, a microsecond each."""
    events = [
        SimpleNamespace(name=name, start_ns=2000 * i, duration_ns=1000, stats=[("hlo_module", "jit_f"), ("hlo_op", op)])
        for i, (name, op) in enumerate(kernels)
    ]
    copies = [SimpleNamespace(name="MemcpyH2D", start_ns=0, duration_ns=1, stats=[])]
    lines = [SimpleNamespace(events=events), SimpleNamespace(events=copies)]
    return SimpleNamespace(planes=[SimpleNamespace(name=plane, lines=lines)])


def test_kernels_of_a_graph_are_told_apart_by_their_order():
    assert name_of("paged_extend_mosaic_mosaic_gpu_kernel") == "paged_extend_mosaic"
    graph = [("add_rms_norm", ""), ("nvjet_tst", ""), ("splitKreduce", ""), ("gemm_fusion_3", ""),
             ("add_rms_norm__1", ""), ("gemm_fusion_3", ""), ("reduce_6", "")]  # fmt: skip
    for step in kernels_of_steps(trace_of("/device:GPU:0", *graph, *graph), [PROGRAM], 2):
        assert [op_of(kernel) for kernel in step] == ["norms", "q k v", "q k v", "o", "norms", "down", OTHER]
        assert [kernel.start for kernel in step] == [0, 2, 4, 6, 8, 10, 12]
    [step] = kernels_of_steps(trace_of("/device:GPU:0", *graph, ("memset", "")), [PROGRAM], 1)
    assert op_of(step[-1]) == OTHER, "of the last instruction, not of the first again"
    with pytest.raises(RuntimeError, match="15 kernels"):
        kernels_of_steps(trace_of("/device:GPU:0", *graph, *graph, ("add_rms_norm", "")), [PROGRAM], 2)


def test_a_profile_names_the_instruction_where_kernels_are_launched_singly():
    ((first, second),) = kernels_of_steps(
        trace_of("/host:CPU", ("x", "gemm_fusion.5"), ("y", "while.7"), ("z", "custom-call.2")), [PROGRAM], 1
    )
    assert (op_of(first), op_of(second), second.name) == ("down", "q k v", "z")


def test_instructions_inside_of_others_launch_nothing():
    assert [instruction.op for instruction in launches(PROGRAM)] == [
        "pallas_call.1", "custom-call.2", "gemm_fusion.3", "pallas_call.4", "gemm_fusion.5", "reduce.6",
    ]  # fmt: skip


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
