"""Makes rope.json: frequencies that transformers computes for rotary options of real models; `--check` compares."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FILE = Path(__file__).parent / "rope.json"
DIM = 64
SHORT = [1 + i / 50 for i in range(DIM // 2)]
LONG = [1 + i for i in range(DIM // 2)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
# max_position_embeddings, length of the sequence, rope_parameters
CASES: list[tuple[int, int, dict[str, Any]]] = [
    (4096, 4096, {"rope_type": "linear", "factor": 2.5}),
    (4096, 1000, {"rope_type": "dynamic", "factor": 2.0}),
    (4096, 16384, {"rope_type": "dynamic", "factor": 2.0}),
    (131072, 131072, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192}),
    (16384, 16384, YARN),
    (16384, 16384, YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    (16384, 16384, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}),
    (16384, 16384, YARN | {"factor": 0.5}),
    (16384, 16384, YARN | {"factor": None}),
    (16384, 16384, YARN | {"attention_factor": 0.9, "mscale": 1.0, "mscale_all_dim": 0.7}),
    (131072, 131072, LONGROPE | {"original_max_position_embeddings": 4096}),
    (131072, 4096, LONGROPE | {"original_max_position_embeddings": 4096}),
    (131072, 4097, LONGROPE | {"original_max_position_embeddings": 4096, "factor": 2.0}),
    (131072, 4096, LONGROPE | {"original_max_position_embeddings": 4096, "attention_factor": 1.1}),
    (4096, 4096, LONGROPE | {"original_max_position_embeddings": 4096}),
]  # fmt: skip


def make() -> list[dict[str, Any]]:
    made = []
    for max_position_embeddings, length, parameters in CASES:
        theta = 500000.0 if parameters["rope_type"] == "llama3" else 10000.0
        config = transformers.LlamaConfig(head_dim=DIM, max_position_embeddings=max_position_embeddings)
        config.rope_parameters = {"rope_theta": theta, **parameters}
        function = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        inv_freq, factor = function(config, torch.device("cpu"), seq_len=length)
        made.append({
            "max_position_embeddings": max_position_embeddings,
            "length": length,
            "theta": theta,
            "parameters": parameters,
            "inv_freq": [float(f"{x:.8g}") for x in inv_freq.tolist()],
            "factor": float(factor),
        })  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the fixture instead of writing it")
    check, made = parser.parse_args().check, make()
    if not check:
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in made)
        FILE.write_text(f'{{"transformers":"{transformers.__version__}","dim":{DIM},"cases":[\n{lines}\n]}}\n')
        return
    for old, new in zip(json.loads(FILE.read_text())["cases"], made, strict=True):
        numbers = [np.array([*case.pop("inv_freq"), case.pop("factor")]) for case in (old, new)]
        assert old == new, f"{new}: other options"
        assert np.allclose(*numbers, rtol=1e-6, atol=0), f"{new}: other numbers"
    print(f"{FILE.name} agrees")


if __name__ == "__main__":
    main()
