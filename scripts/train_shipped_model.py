"""Trains the model that ships with jaxengine on the source of Python's standard library, and writes it with its card.

python -m scripts.train_shipped_model --loops 0 --openings 0 --out .cache/stdlib-5m
python -m scripts.train_shipped_model --start .cache/stdlib-5m --out jaxengine/assets/stdlib-5m

The first learns the text, the second, short, how to leave loops. An Orbax checkpoint of the training state is kept in
--work; `--resume` goes on from it, with the same options.
"""

import argparse
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from scripts.function_heads import LOOP, NEW_TOKENS, Score, score_heads
from scripts.shipped_network import Model, Params, Shape, write_json
from scripts.stdlib_corpus import (
    END_OF_TEXT,
    HELD_OUT_PERCENT,
    Corpus,
    encode,
    end_id,
    line_ends,
    openings,
    read_corpus,
    train_tokenizer,
)

STARTED = time.monotonic()


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the model, of which it takes the name")
    add("--work", type=Path, default=Path(".cache/shipped_model"), help="folder of the tokenizer and the checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--start", type=Path, help="folder of a model of this script to train on, instead of a random one")
    add("--minutes", type=float, default=5.7, help="time for the steps; reading, compiling and the end come on top")
    add("--stdlib", type=Path, help="folder of a standard library; default: this Python's")
    add("--python", default=platform.python_version(), help="the version of that library, for the card")
    add("--attention", choices=("cudnn", "xla"), default="cudnn", help="cudnn needs an NVIDIA GPU")
    add("--batch", type=int, default=64, help="windows a step")
    add("--steps-per-call", type=int, default=50, help="optimizer steps in one call of the device")
    add("--evaluations", type=int, default=20, help="how often held-out bits are measured and a checkpoint is made")
    add("--openings", type=float, default=0.5, help="share of the windows that begin where a function or class does")
    add("--loops", type=float, default=0.5, help="share of the windows that say some of their text several times over")
    add("--learning-rate", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.3)
    add("--dropout", type=float, default=0.15)
    add("--new-tokens", type=int, default=NEW_TOKENS, help="a smaller number is for trying this script only")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


# -- training


WAY_OUT = 8  # tokens behind a loop that weigh more


class Data(NamedTuple):
    """What training reads, on the device."""

    corpus: jax.Array  # int32 [tokens]
    begins: jax.Array  # int32: where functions and classes of the library begin
    ends_line: jax.Array  # bool [vocabulary]


class Loops(NamedTuple):
    """Which place of the window stands where, and which of them are said again or follow a loop; [batch, tokens]."""

    places: jax.Array
    again: jax.Array
    way_out: jax.Array


@dataclass(frozen=True)
class Trainer:
    """The compiled parts: steps on random windows of the corpus, and the loss of the held-out text.

    A share of `openings` begins where a function or class of the library does, as the prompts of the function heads do;
    that also keeps the tests, which repeat themselves and are most of the text, to less of what is seen.
    """

    model: Model
    optimizer: optax.GradientTransformation
    batch: int
    openings: float
    loops: float

    @partial(jax.jit, static_argnums=(0, 6), donate_argnums=(1, 2))
    def steps(
        self, params: Params, state: optax.OptState, data: "Data", key: jax.Array, rate: jax.Array, count: int
    ) -> tuple[Params, optax.OptState, jax.Array]:
        """`count` optimizer steps at one learning rate; the mean loss in nats a token."""
        corpus, begins, ends_line = data
        window = jnp.arange(self.model.shape.context + 1)

        def loss_of(params: Params, tokens: jax.Array, loops: Loops, key: jax.Array) -> jax.Array:
            network = self.model.network(params)
            targets = tokens[:, 1:, None]
            scores = jax.nn.log_softmax(network.logits(network(tokens[:, :-1], key)).astype(jnp.float32))
            said = jnp.take_along_axis(scores, targets, -1)[..., 0]
            others = jnp.where(jnp.arange(scores.shape[-1]) == targets, -jnp.inf, scores)
            unsaid = jax.nn.logsumexp(others, axis=-1)  # log(1 - probability), exact where that is near 1
            surprise = 1 - jnp.exp(jnp.take_along_axis(said, jnp.maximum(loops.places[:, 1:] - 1, 0), axis=1))
            losses = jnp.where(loops.again[:, 1:], -unsaid * jax.lax.stop_gradient(surprise), -said)
            weights = jnp.where(loops.way_out[:, 1:], 3.0, 1.0)
            return (losses * weights).sum() / weights.sum()

        def step(carry: tuple[Params, optax.OptState], key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            where, which, loops, noise = jax.random.split(key, 4)
            anywhere = jax.random.randint(where, (self.batch, 1), 0, corpus.size - window.size + 1)
            opening = begins[jax.random.randint(which, (self.batch, 1), 0, begins.size)]
            starts = jnp.where(jnp.arange(self.batch)[:, None] < round(self.batch * self.openings), opening, anywhere)
            tokens = corpus[starts + window]
            looped = draw_loops(loops, ends_line[tokens], self.loops)
            tokens = jnp.take_along_axis(tokens, looped.places, axis=1)
            loss, gradient = jax.value_and_grad(loss_of)(params, tokens, looped, noise)
            updates, state = self.optimizer.update(gradient, state, params)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), jax.random.split(key, count))
        return params, state, losses.mean()

    @partial(jax.jit, static_argnums=0)
    def held_out_nats(self, params: Params, windows: jax.Array) -> jax.Array:
        """Negative log-likelihood of the windows [batches, batch, context + 1]; -1 stands where there is no token."""
        network = self.model.network(params)

        def nats(tokens: jax.Array) -> jax.Array:
            logits = network.logits(network(jnp.maximum(tokens[:, :-1], 0)))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tokens[:, 1:], 0))
            return jnp.where(tokens[:, 1:] >= 0, losses, 0).sum()

        return jax.lax.map(nats, windows).sum()


def draw_loops(key: jax.Array, ends_line: jax.Array, share: float) -> Loops:
    """A `share` of the windows says some of its text several times over before it goes on.

    Half of those say one to three lines two to four times, half a few tokens up to ten times. Greedy text of small
    models repeats itself without end, and nothing that they read shows a way out. Here what is said again is learned
    against ("unlikelihood", Welleck et al. 2019, arXiv:1908.04319), as far as it was a surprise when it was said first:
    indentation and brackets are no loop.
    """
    batch, size = ends_line.shape
    window = jnp.arange(size)
    keys = jax.random.split(key, 7)
    order = jax.random.uniform(keys[0], ends_line.shape)
    draw = partial(jax.random.randint, shape=(batch, 1))
    begin = jnp.argmax(jnp.where(ends_line & (window < size - 256), order, -1.0), axis=1)[:, None]
    lines = draw(keys[1], minval=1, maxval=4)
    behind = jnp.cumsum(ends_line & (window > begin), axis=1) >= lines
    length = jnp.argmax(behind, axis=1)[:, None] - begin
    short = jax.random.bernoulli(keys[4], 0.5, (batch, 1))
    begin = jnp.where(short, draw(keys[5], minval=0, maxval=size - 256), begin)
    length = jnp.where(short, draw(keys[6], minval=1, maxval=13), length)
    chosen = jax.random.bernoulli(keys[2], share, (batch, 1)) & (short | ((length > 2) & (length <= 60)))
    repeats = jnp.where(chosen, draw(keys[3], minval=1, maxval=jnp.where(short, 10, 4)), 0)
    length = jnp.maximum(length, 1)
    first, last = begin + length, begin + length * (1 + repeats)  # of what is said again
    again = (window >= first) & (window < last)
    places = jnp.where(again, begin + (window - begin) % length, window - jnp.where(window < last, 0, last - first))
    return Loops(places, again, (window >= last) & (window < last + WAY_OUT) & (repeats > 0))


def held_out_windows(tokens: np.ndarray, context: int, batch: int) -> np.ndarray:
    """Consecutive windows that share one token, so that each token but the first is predicted once."""
    count = math.ceil((len(tokens) - 1) / context)
    rows = math.ceil(count / batch) * batch
    padded = np.full(rows * context + 1, -1, np.int32)
    padded[: len(tokens)] = tokens
    places = np.arange(rows)[:, None] * context + np.arange(context + 1)
    return padded[places].reshape(-1, batch, context + 1)


def train(options: argparse.Namespace, model: Model, data: Data,
          bits_of: Callable[[Params], float], trainer: Trainer) -> tuple[Params, dict[str, float]]:  # fmt: skip
    """Steps until the time is up; the learning rate follows the share of the time that has passed."""
    manager = ocp.CheckpointManager(
        (options.work / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    params = model.load(options.start / "model.safetensors") if options.start else model.initial
    progress = {"step": 0, "seconds": 0.0}
    state = {"params": params, "optimizer": trainer.optimizer.init(params), "progress": progress}
    if options.resume:
        if (latest := manager.latest_step()) is None:
            raise SystemExit(f"--resume: {options.work} holds no checkpoint; start without --resume")
        state = manager.restore(latest, args=ocp.args.StandardRestore(state))
        progress = state["progress"]
        say(f"going on after {progress['step']} steps, {progress['seconds']:.0f} s")
    elif manager.all_steps():
        raise SystemExit(f"{options.work} holds checkpoints of a former run; add --resume, or delete the folder")
    params, optimizer_state = state["params"], state["optimizer"]

    root, budget, count = jax.random.key(options.seed, impl="rbg"), options.minutes * 60, options.steps_per_call
    step, seconds = int(progress["step"]), float(progress["seconds"])
    run = trainer.steps.lower(trainer, params, optimizer_state, data, root, jnp.float32(0), count).compile()
    say(f"compiled; held out {bits_of(params):.4f} bits a byte")
    evaluated, first, losses = int(seconds / budget * options.evaluations), step, []
    started = time.monotonic() - seconds
    while seconds < budget:
        share = seconds / budget
        rate = options.learning_rate * min(1, (step + 1) / 300) * (1 - share)
        key = jax.random.fold_in(root, step)
        params, optimizer_state, loss = run(params, optimizer_state, data, key, jnp.float32(rate))
        losses.append(float(loss))
        step, seconds = step + count, time.monotonic() - started
        if seconds / budget * options.evaluations < evaluated + 1 and seconds < budget:
            continue
        evaluated = int(seconds / budget * options.evaluations)
        bits = bits_of(params)
        say(f"step {step}: train {np.mean(losses):.3f} nats a token, held out {bits:.4f} bits a byte, lr {rate:.1e}")
        losses = []
        tree = {"params": params, "optimizer": optimizer_state, "progress": {"step": step, "seconds": seconds}}
        manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    manager.close()
    speed = (step - first) * options.batch * model.shape.context / max(seconds - float(state["progress"]["seconds"]), 1)
    return params, {"steps": step, "minutes": seconds / 60, "tokens_per_second": speed}


# -- evaluation and export


def greedy(
    model: Model, params: Params, tokenizer: Tokenizer, new_tokens: int
) -> Callable[[list[str]], list[list[int]]]:
    """Greedy continuation of prompts, each step over the whole text: slow, short, and without any cache."""

    @jax.jit
    def continue_all(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        network, rows = model.network(params), jnp.arange(len(tokens))

        def step(i: int, tokens: jax.Array) -> jax.Array:
            hidden = network(tokens)[rows, lengths + i - 1]  # padding lies behind, where causal attention cannot look
            return tokens.at[rows, lengths + i].set(network.logits(hidden).argmax(-1).astype(jnp.int32))

        return jax.lax.fori_loop(0, new_tokens, step, tokens)

    def generate(prompts: list[str]) -> list[list[int]]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
        lengths = np.array([len(row) for row in ids])
        width = math.ceil((lengths.max() + new_tokens) / 64) * 64
        tokens = np.zeros((len(ids), width), np.int32)
        for row, prompt in zip(tokens, ids):
            row[: len(prompt)] = prompt
        done = np.asarray(continue_all(params, tokens, lengths))
        end = end_id(tokenizer)
        rows = [row[length : length + new_tokens].tolist() for row, length in zip(done, lengths)]
        return [row[: row.index(end)] if end in row else row for row in rows]

    return generate


def export(out: Path, model: Model, params: Params, tokenizer: Tokenizer) -> None:
    """The checkpoint in HuggingFace's format, without its card."""
    out.mkdir(parents=True, exist_ok=True)
    end = end_id(tokenizer)
    model.save(params, out / "model.safetensors")
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", model.shape.config(end))
    write_json(out / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    write_json(
        out / "tokenizer_config.json",
        {
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": model.shape.context,
            # The class that takes tokenizer.json as it is; Qwen3's own would cut words in its own way.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def card(
    options: argparse.Namespace, shape: Shape, corpus: Corpus, run: dict[str, Any], bits: float, score: Score
) -> str:
    """The model card."""
    names = ("minutes", "batch", "openings", "loops", "learning_rate", "weight_decay", "dropout")
    chosen = shlex.join(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names)
    start = f"--start=.cache/{options.out.name} --out=jaxengine/assets" if options.start else "--out=.cache"
    command = f"python -m scripts.train_shipped_model {chosen} \\\n    {start}/{options.out.name}"
    trained = (
        f"{run['steps']} steps of {options.batch} x {shape.context} tokens in {run['minutes']:.1f} minutes on "
        f"{run['device']}, {run['wall']:.1f} minutes in all, jax {jax.__version__}"
    )
    if options.start:  # what its card says of the first part comes first
        first = (options.start / "README.md").read_text()
        trained = first.split("| training | ")[1].split(" |")[0] + "; then " + trained
        command = first.split("```\n")[1] + command
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {options.out.name}

A language model of {run["parameters"]:,} parameters that completes Python code. It ships with jaxengine, for tests and
first steps; it knows nothing but the source of Python's standard library, and what it writes is rarely right.

| | |
| --- | --- |
| shape | Qwen3: {shape.layers} layers, hidden {shape.hidden_size}, MLP {shape.intermediate_size}, {shape.heads} heads \
and {shape.kv_heads} for keys and values of {shape.head_dim}, tied embeddings, {shape.context} positions |
| tokenizer | byte-level BPE, {shape.vocab_size} tokens, of the training files; `{END_OF_TEXT}` ends a file |
| data | standard library of CPython {options.python}: {len(corpus.train)} files to train on \
({corpus.library} of them no tests; {run["tokens"]:,} tokens), {len(corpus.held_out)} held out by a hash of their name \
({HELD_OUT_PERCENT}%) |
| hash of the data | sha256 {corpus.sha256} |
| licence | of the data: PSF License Version 2; of the model: Apache-2.0 |
| held-out bits per byte | {bits:.3f}, over {corpus.held_out_bytes:,} bytes in windows of {shape.context} tokens |
| function heads | {score.complete} of {score.total} completed, {score.ended} of these ended within \
{options.new_tokens} tokens; see below |
| training | {trained} |

**Function heads.** Each of the {score.total} heads in `scripts/function_heads.py` is continued greedily, for at most
{options.new_tokens} tokens, and the function cut out. It counts if `ast.parse` accepts it, if its body says something,
and if it holds no run of {LOOP} or more tokens that only repeat those right before them. A function that has not ended
by then is cut after its last full line. A share of {options.loops} of the windows of the last training said some lines,
or pieces of one, several times over, and what was said again was learned against, so that greedy text finds its
way out of loops.

Made again, by the Python named above, with:
```
{command}
```
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    device = jax.devices()[0]
    say(f"jax {jax.__version__} on {device.device_kind}, {sys.version.split()[0]}")
    corpus = read_corpus(options.stdlib)
    say(f"{len(corpus.train)} files, {len(corpus.held_out)} held out ({corpus.held_out_bytes} bytes), {corpus.sha256}")
    shape = Shape()
    options.work.mkdir(parents=True, exist_ok=True)
    vocabulary = options.work / "tokenizer.json"
    if options.start:
        shutil.copy(options.start / "tokenizer.json", vocabulary)
    elif not options.resume:
        train_tokenizer(corpus.train, shape.vocab_size).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    library = encode(tokenizer, corpus.train[: corpus.library])
    tests = encode(tokenizer, corpus.train[corpus.library :])
    tokens, held_out = np.concatenate([library, tests]), encode(tokenizer, corpus.held_out)
    begins = openings(tokenizer, library)
    begins = begins[begins < len(tokens) - shape.context]
    say(
        f"{len(tokens)} tokens, {len(library)} of them no tests, {len(begins)} functions and classes, "
        f"{corpus.held_out_bytes / len(held_out):.2f} held-out bytes a token"
    )

    model = Model(shape, options.attention, options.dropout, options.seed)
    matrices = {name: leaf.ndim > 1 for name, leaf in model.initial.items()}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(options.weight_decay, matrices),
    )
    trainer = Trainer(model, optimizer, options.batch, options.openings, options.loops)
    windows = jnp.asarray(held_out_windows(held_out, shape.context, min(options.batch, 32)))

    def bits_of(params: Params) -> float:
        return float(trainer.held_out_nats(params, windows)) / math.log(2) / corpus.held_out_bytes

    data = Data(jnp.asarray(tokens), jnp.asarray(begins), jnp.asarray(line_ends(tokenizer)))
    params, run = train(options, model, data, bits_of, trainer)
    say(f"{run['steps']} steps, {run['tokens_per_second'] / 1e6:.3f} million tokens/s")

    export(options.out, model, params, tokenizer)
    params = model.load(options.out / "model.safetensors")  # what was written is what is measured
    bits = bits_of(params)
    generate = greedy(model, params, tokenizer, options.new_tokens)
    score = score_heads(generate, tokenizer.decode, new_tokens=options.new_tokens)
    say(f"written: {bits:.4f} held-out bits a byte; {score}")
    samples = ['def is_even(number):\n    """Return True if the number is even."""\n', "import os\n\n\nclass "]
    for prompt, ids in zip(samples, generate(samples)):
        print(prompt + tokenizer.decode(ids), "\n" + "-" * 40, flush=True)
    run |= {
        "parameters": sum(leaf.size for leaf in params.values()),
        "tokens": len(tokens),
        "device": device.device_kind,
        "wall": (time.monotonic() - STARTED) / 60,
    }
    (options.out / "README.md").write_text(card(options, shape, corpus, run, bits, score))
    say(f"{run['parameters']} parameters, {sum(file.stat().st_size for file in options.out.iterdir())} bytes in all")


if __name__ == "__main__":
    main()
