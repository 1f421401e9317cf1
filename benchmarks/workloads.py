"""Model shapes, request sets, and what a step computes.

Pure Python: whatever measures another engine can make the very same requests.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, and the RoPE options that its real checkpoint has."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    rope_theta: float
    rope_factor: float | None = None

    def hf_config(self) -> dict[str, Any]:
        """The config.json of a checkpoint of this shape."""
        config: dict[str, Any] = {
            "architectures": ["Qwen3ForCausalLM" if self.model_type == "qwen3" else "LlamaForCausalLM"],
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6 if self.model_type == "qwen3" else 1e-5,
            "max_position_embeddings": 40960 if self.model_type == "qwen3" else 131072,
            "hidden_act": "silu",
            "attention_bias": False,
            "dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        if self.rope_factor is not None:
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": self.rope_factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        return config

    @property
    def parameters_read(self) -> int:
        """Parameters that a decoded token reads: all but an input embedding that is not the head as well."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.model_type == "qwen3" else 0)
        layer = 2 * self.hidden_size * (q + kv) + 3 * self.hidden_size * self.intermediate_size + norms
        return self.num_layers * layer + self.hidden_size + self.vocab_size * self.hidden_size

    def kv_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes of K and V that one token leaves in the cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


SHAPES = {
    "llama70b": Shape("llama", 8192, 28672, 80, 64, 8, 128, 128256, False, 500_000.0, 8.0),
    "llama8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 500_000.0, 8.0),
    "llama3b": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True, 500_000.0, 32.0),
    "llama1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 500_000.0, 32.0),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 1_000_000.0),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False, 1_000_000.0),
    "llama150m": Shape("llama", 768, 3072, 14, 12, 4, 64, 32000, True, 10_000.0),
    "tiny": Shape("llama", 128, 256, 2, 4, 2, 32, 512, True, 10_000.0),
}


@dataclass(frozen=True)
class Workload:
    """How many requests, and the ranges that their prompt and output lengths are drawn from, ends included."""

    count: int
    prompt: tuple[int, int]
    output: tuple[int, int]


WORKLOADS = {
    "bs1": Workload(1, (128, 128), (512, 512)),
    "bs8": Workload(8, (512, 512), (256, 256)),
    "bs64": Workload(64, (512, 512), (256, 256)),
    "fixed256": Workload(256, (512, 512), (256, 256)),
    "decode": Workload(256, (128, 128), (1024, 1024)),
    "prefill": Workload(256, (2048, 2048), (16, 16)),
    "nano": Workload(256, (100, 1024), (100, 1024)),
    "mixed1k": Workload(1024, (32, 1024), (32, 512)),
    "cpu1": Workload(1, (128, 128), (128, 128)),
    "cpu8": Workload(8, (128, 128), (64, 64)),
    "cpumix": Workload(32, (16, 256), (16, 128)),
    "tiny": Workload(6, (8, 24), (4, 12)),
}


def requests(name: str, vocab_size: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts as token ids, and how many tokens each is to give. The order of the draws is part of the contract.

    `bs64:32` is `bs64` with 32 output tokens of each request.
    """
    name, _, output = name.partition(":")
    if output:
        prompts, _ = requests(name, vocab_size, seed)
        return prompts, [int(output)] * len(prompts)
    work, rng = WORKLOADS[name], random.Random(seed)
    if name == "nano":  # the set of nano-vllm's bench.py, request for request
        prompts = [[rng.randint(0, 10_000) % vocab_size for _ in range(rng.randint(*work.prompt))] for _ in range(256)]
        return prompts, [rng.randint(*work.output) for _ in prompts]
    prompt_lengths = [rng.randint(*work.prompt) for _ in range(work.count)]
    output_lengths = [rng.randint(*work.output) for _ in range(work.count)]
    return [[rng.randrange(2, vocab_size) for _ in range(length)] for length in prompt_lengths], output_lengths


def floor_seconds(
    shape: Shape,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[int],
    bandwidth: float,
    flops: float,
    devices: int = 1,
) -> float:
    """The time that no engine can beat in bfloat16: prompts at the rate of matrix products (operations/s), then the
    weights once a step and each KV byte that a decoded token must read, at the read bandwidth (bytes/s).

    Both rates are one device's; of several, each has its part of all that, and their links cost nothing.
    """
    prefill = sum(map(len, prompts)) * 2 * shape.parameters_read / flops
    weights = (max(outputs) - 1) * 2 * shape.parameters_read
    kv = sum(length for prompt, n in zip(prompts, outputs) for length in range(len(prompt) + 1, len(prompt) + n))
    return (prefill + (weights + kv * shape.kv_bytes()) / bandwidth) / devices


@dataclass(frozen=True)
class Work:
    """What a call computes: `steps` tokens of each of `rows` sequences, or one and `prompts` prompts of `tokens`."""

    rows: int
    context: int  # tokens of each of `rows`, the new one included
    prompts: int = 0
    tokens: int = 0
    steps: int = 1

    @classmethod
    def parse(cls, text: str) -> "Work":
        """`ROWSxCONTEXT`, `ROWSxCONTEXT*STEPS` or `ROWSxCONTEXT+PROMPTSxTOKENS`."""
        shape, _, steps = text.partition("*")
        decode, _, prompts = shape.partition("+")
        sizes = (tuple(map(int, part.split("x"))) for part in (decode, prompts or "0x0"))
        (rows, context), (count, tokens) = sizes
        return cls(rows, context, count, tokens, int(steps or 1))

    def floor_ms(self, shape: Shape, bandwidth: float, flops: float) -> float:
        """As `floor_seconds` has it: prompts at the rate of products, then weights and KV read once."""
        prompts = self.prompts * self.tokens * 2 * shape.parameters_read / flops
        read = 2 * shape.parameters_read + self.rows * self.context * shape.kv_bytes() if self.rows else 0
        return (prompts + read / bandwidth) * 1e3


def write_checkpoint_config(shape: Shape, folder: Path) -> Path:
    """A folder that `load_format="dummy"` can serve: config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.hf_config(), indent=1))
    return folder
