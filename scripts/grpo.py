"""Reinforcement learning with the engine as the rollout worker, on the model that ships with jaxengine.

    python -m scripts.grpo --steps 60 --seeds 0,1,2

The model completes Python functions. A completion earns 1 when the function parses, reads each of its parameters and
returns something, else 0: neither length nor repetition meets that. Prompts are functions of the standard library; the
hand-written heads of `function_heads.py` are held out. Groups of samples of one prompt are compared with one another
(GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300), one policy-gradient step a batch, with ratios to the very
log-probabilities that the engine sampled with.
"""

import argparse
import ast
import json
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxengine import LLM
from jaxengine.handoff.rollout import Rollout, RolloutConfig, RolloutOutput
from jaxengine.llm import SHIPPED_MODEL
from scripts.function_heads import HEADS, body_end
from scripts.shipped_network import Model, Params, Shape
from scripts.stdlib_corpus import read_corpus

CLIP = 0.2  # of the ratio of new to old probability
HELD_OUT = [head for head in HEADS if head.startswith("def ")]


def reward(head: str, continuation: str) -> float:
    """1 when the function is complete in the sense above, else 0. It ends where its indentation does."""
    end = body_end(head, continuation)
    if end is None:
        return 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is no error
            function = ast.parse(head + continuation[:end]).body[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    assert isinstance(function, ast.FunctionDef)
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    returns = any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))
    return float(returns and set(parameters(function)) <= names)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Its parameters' names, but for the object that a method is called on."""
    arguments = function.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument.arg for argument in found if argument is not None and argument.arg not in ("self", "cls")]


def training_heads(texts: Sequence[str]) -> list[str]:
    """Signature and docstring of the library's functions, brought to the margin; short ones with a parameter."""
    heads = []
    for text in texts:
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not parameters(node) or ast.get_docstring(node) is None:
                continue
            last = node.body[0].end_lineno
            assert last is not None
            if len(node.body) > 1 and last - node.lineno <= 4:
                own = [line[node.col_offset :] for line in lines[node.lineno - 1 : last]]
                heads.append("\n".join(own) + "\n")
    return sorted(set(heads))


def advantages(rewards: np.ndarray, group: int) -> np.ndarray:
    """Of each sample against the others of its prompt, float32 [batch]; zeros where all of them are alike."""
    grouped = rewards.reshape(-1, group)
    spread = grouped.std(axis=1, keepdims=True)
    return ((grouped - grouped.mean(axis=1, keepdims=True)) / (spread + 1e-4)).reshape(-1).astype(np.float32)


class Trainer:
    """Adam over the network's own parameters, which the engine is handed after each step."""

    def __init__(self, rate: float):
        shape = Shape(**_shape_of(json.loads((SHIPPED_MODEL / "config.json").read_text())))
        self.model = Model(shape, "xla", 0.0, seed=0)
        self.params: Params = self.model.load(SHIPPED_MODEL / "model.safetensors")
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))
        self.state = self.optimizer.init(self.params)

    def step(self, rollout: RolloutOutput, advantage: np.ndarray) -> float:
        """One step on a batch of rollouts; the mean ratio of the trainer's probabilities to the engine's."""
        columns = rollout.tokens.shape[1]
        mask = np.arange(columns) < rollout.lengths[:, None]
        tokens = np.concatenate([rollout.left_padded_prompt_tokens, rollout.tokens], axis=1)
        padding = rollout.left_padded_prompt_tokens.shape[1] - rollout.prompt_lengths
        shifted = np.stack([np.roll(row, -count) for row, count in zip(tokens, padding)])  # positions begin at 0
        self.params, self.state, ratio = _update(
            self.model, self.optimizer, columns, self.params, self.state, shifted, rollout.prompt_lengths, mask,
            rollout.logprobs, advantage,
        )  # fmt: skip
        return float(ratio)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _update(
    model: Model, optimizer: Any, columns: int, params: Params, state: Any, tokens: Any, prompts: Any, mask: Any,
    sampled: Any, advantage: Any,
) -> tuple[Params, Any, jax.Array]:  # fmt: skip
    """tokens int32 [batch, length], each row's prompt first, of `prompts` tokens; the rest is of completions."""
    places = prompts[:, None] + jnp.arange(columns)

    def loss_of(params: Params) -> tuple[jax.Array, jax.Array]:
        network = model.network(params)
        logits = network.logits(network(tokens[:, :-1])).astype(jnp.float32)
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]
        own = jnp.take_along_axis(scores, jnp.minimum(places - 1, scores.shape[1] - 1), axis=1)
        ratio = jnp.where(mask, jnp.exp(own - sampled), 0)
        clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
        gain = jnp.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
        return -jnp.where(mask, gain, 0).sum() / mask.sum(), ratio.sum() / mask.sum()

    (_, ratio), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, ratio


def _shape_of(config: dict[str, Any]) -> dict[str, Any]:
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
             "context": "max_position_embeddings", "eps": "rms_norm_eps"}  # fmt: skip
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "context",
        "eps",
    )
    return {name: config[names.get(name, name)] for name in fields}


def mean_reward(rollout: Rollout, heads: Sequence[str], samples: int, config: RolloutConfig) -> tuple[float, float]:
    """Of samples of these heads, and its standard error over the heads."""
    found = rollout.generate([head for head in heads for _ in range(samples)], config)
    each = np.array([reward(heads[i // samples], text) for i, text in enumerate(found.text)]).reshape(
        len(heads), samples
    )
    return float(each.mean()), float(each.mean(axis=1).std(ddof=1) / len(heads) ** 0.5)


def run(seed: int, options: argparse.Namespace, heads: list[str]) -> dict[str, Any]:
    """One training from the shipped parameters: reward of held-out heads before and after, and of each batch."""
    rng, trainer = np.random.default_rng(seed), Trainer(options.rate)
    judged = RolloutConfig(options.new_tokens, temperature=1.0, seed=10**6 + seed)
    curve, ratios, began = [], [], time.perf_counter()
    config = json.loads((SHIPPED_MODEL / "config.json").read_text())
    with LLM(
        trainer.params, config=config, tokenizer=SHIPPED_MODEL, fuse_weights=True, dtype=options.dtype,
        max_num_seqs=options.prompts * options.group, kv_cache_memory_bytes=2**30,
    ) as llm:  # fmt: skip
        rollout, width = Rollout(llm), max(len(llm.encode(head)) for head in heads)  # one width: one program
        before = mean_reward(rollout, HELD_OUT, options.samples, judged)
        for _ in tqdm(range(options.steps), desc=f"seed {seed}"):
            chosen = [heads[i] for i in rng.integers(len(heads), size=options.prompts)]
            prompts = [head for head in chosen for _ in range(options.group)]
            drawn = rollout.generate(
                prompts,
                RolloutConfig(options.new_tokens, 1.0, seed=int(rng.integers(2**40)), max_prompt_length=width),
            )
            rewards = np.array([reward(head, text) for head, text in zip(prompts, drawn.text, strict=True)])
            ratios.append(trainer.step(drawn, advantages(rewards, options.group)))
            rollout.update_params(trainer.params)
            curve.append(float(rewards.mean()))
        after = mean_reward(rollout, HELD_OUT, options.samples, judged)
    return {"seed": seed, "before": before, "after": after, "curve": curve, "ratio": [min(ratios), max(ratios)],
            "seconds": time.perf_counter() - began}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--prompts", type=int, default=32, help="in a batch")
    parser.add_argument("--group", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--samples", type=int, default=4, help="of each held-out head, before and after")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-5)
    parser.add_argument("--dtype", default="bfloat16", help="of the engine; the trainer's parameters are float32")
    options = parser.parse_args(arguments)
    heads = training_heads(read_corpus().train)
    print(f"{len(heads)} heads to train on, {len(HELD_OUT)} held out", flush=True)
    for seed in map(int, options.seeds.split(",")):
        result = run(seed, options, heads)
        (before, error), (after, error_after) = result["before"], result["after"]
        print(f"seed {seed}: held-out reward {before:.3f} +- {error:.3f} -> {after:.3f} +- {error_after:.3f} "
              f"in {result['seconds']:.0f} s")  # fmt: skip
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
