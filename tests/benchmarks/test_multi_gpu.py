"""Several devices beside one: shares of the floor, log-probabilities, few programs, collectives in a profile."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import multi_gpu
from benchmarks.common import only_buckets, time_workload
from benchmarks.noise import PROMPTS, TOKENS, distance, in_float32
from benchmarks.steps import in_collectives
from benchmarks.workloads import SHAPES, Work
from jaxengine import SamplingParams
from tests.tiny_llm import fresh_llm

COMMAND = """--model tiny --devices 1,2,3 --workloads tiny:4 --rows 2 --tokens 512 --warmup-tokens 4 --max-num-seqs 8
--logprobs --no-check --float32""".split()
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"


@pytest.mark.full
def test_rows_of_two_devices_stand_beside_one_and_a_grid_that_fails_does_not_stop_the_others(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    command = [sys.executable, "-m", "benchmarks.multi_gpu", *COMMAND, str(tmp_path / "float32")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    rows = [json.loads(line) for line in lines]
    assert done.returncode == 1 and "tensor_parallel_size=3" in next(row["error"] for row in rows if "failed" in row)
    one, two = [row for row in rows if "share_of_floor" in row]
    assert one["compilations"] == two["compilations"] == 0 and one["speed_up"] == 1
    assert (one["workload"], one["out_tokens"]) == ("tiny:4", 24)
    assert two["floor_seconds"] == pytest.approx(one["floor_seconds"] / 2, abs=2e-4)
    noise = {(row["tensor_parallel_size"], row["logprobs"]): row for row in rows if "logprobs" in row}
    assert set(noise) == {(1, "all together - one at a time"), (2, "these devices - the first"),
                          (1, "these devices - float32"), (2, "these devices - float32")}  # fmt: skip
    exact = [noise[n, "these devices - float32"]["mean_absolute"] for n in (1, 2)]
    assert 0 < exact[1] < 2 * exact[0] < 0.02
    kept = in_float32("tiny", tmp_path / "float32")
    assert kept.shape == (PROMPTS, TOKENS - 1) and kept.dtype == np.float32
    with pytest.raises(KeyError, match="llama8b"):
        in_float32("llama8b", tmp_path / "float32")


def test_what_float32_is_held_against_must_be_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["multi_gpu", "--float32", "file"])
    with pytest.raises(SystemExit):
        multi_gpu.main()
    assert "--float32 needs --logprobs" in capsys.readouterr().err


@pytest.mark.parametrize("profile, longest", [("3x40+2x90", 91), ("3x40*4", 44), ("1x10", 35)])
def test_profiled_steps_fit(profile, longest, monkeypatch):
    monkeypatch.setattr(multi_gpu, "random_llm", lambda shape, **options: nullcontext(options))
    monkeypatch.setattr(multi_gpu, "only_buckets", lambda *sizes: None)
    args = SimpleNamespace(
        model="tiny", workloads=["tiny"], logprobs=False, dtype="float32", max_num_seqs=8, rows=[], tokens=[],
        profile=multi_gpu.works(profile),
    )  # fmt: skip
    with multi_gpu.opened(args, (1, 1, 1)) as options:
        assert options["max_model_len"] == longest


def test_only_the_named_sizes_are_compiled():
    params = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)] * 3
    prompts = [[5, 6, 7], [8, 9], [10]]
    with fresh_llm() as llm:
        want = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    with fresh_llm() as llm:
        only_buckets(llm, rows=[4, 999], tokens=[])
        assert llm._runner.buckets.rows == llm._loop._engine.buckets.rows == (4, 8)
        assert len(llm._runner.buckets.tokens) > 1
        for row in prompts:
            llm.generate([row], params[:1], use_tqdm=False)
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)] == want
        assert {key[1].rows for key in llm._runner._programs if key[0] == "decode"} == {4}


def test_first_runs_may_be_cut_short():
    with fresh_llm(max_num_seqs=8, enable_prefix_caching=False) as llm:
        asked = []
        generate = llm.generate

        def watched(prompts, params, **options):
            asked.append((max(map(len, prompts)), max(p.max_tokens for p in params)))
            assert {(p.temperature, p.top_p) for p in params} == {(1, 0.9)}
            return generate(prompts, params, **options)

        llm.generate = watched
        only_buckets(llm, [8], [32])
        result = time_workload(
            llm, "tiny", "tiny", repeats=2, warmup_tokens=5, sampling={"temperature": 1, "top_p": 0.9}
        )
        assert asked[0] == (5, 5) and asked[1] == asked[2] and asked[1][0] > 5 and asked[1][1] > 5
        assert result["warmup_seconds"] > 0 and "share_of_floor" not in result


def test_collectives_of_a_profile():
    kernels = [("gemm_fusion_dot", 4.0, 70.0), ("ncclDevKernel_AllReduce_Sum_bf16", 3.0, 20.0),
               ("psum_fusion", 2.0, 10.0), ("add_rms_norm", 5.0, 5.0)]  # fmt: skip
    found = in_collectives(kernels, SHAPES["tiny"], Work(8, 100), devices=2)
    assert (found["kernels_us"], found["collectives_us"], found["collectives"]) == (105, 30, 5)
    assert found["sent_bytes"] == 5 * 8 * 128 * 2  # two layers; of two devices each sends half of the sum twice
    assert found["GB/s"] == pytest.approx(found["sent_bytes"] / 30e-6 / 1e9)
    assert in_collectives(kernels, SHAPES["tiny"], Work(8, 100, steps=4), 2)["sent_bytes"] == 4 * found["sent_bytes"]


def test_distance():
    found = distance(np.array([1.0, 2.0]), np.array([0.0, 4.0]))
    assert found == {"mean": -0.5, "mean_absolute": 1.5, "largest": 2.0}
