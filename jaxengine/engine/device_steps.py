"""What the device computes: decode steps, mixed steps, the head, what is told of prompts. The runner jits it.

Arguments before `leaves` or the first array are static: a program's key. `packed`: a step's integers as `step.unpack`
reads them. Arrays of slots have as many rows as there are slots, their fields stand in `step`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from jaxengine.config import EngineConfig
from jaxengine.engine.batch import Buckets
from jaxengine.engine.device_slots import sampling_fields, update_tables
from jaxengine.engine.device_weights import DeviceWeights
from jaxengine.layers import pipeline
from jaxengine.layers.attention import AttentionInputs, Implementation
from jaxengine.layers.peers import own
from jaxengine.layers.pooling import pooled_sums
from jaxengine.sampling import count_tokens, log_softmax, sample, token_logprobs
from jaxengine.sharding import DATA, gather
from jaxengine.step import unpack


@dataclass(frozen=True, eq=False)
class DeviceSteps:
    """Pure functions over device arrays, and what they close over."""

    weights: DeviceWeights
    config: EngineConfig
    buckets: Buckets
    layer_group: tuple[int, ...]  # the cache group of each layer
    vocab_size: int
    attention: Implementation
    float8: str | None  # what the cache's bytes are, where it is kept as bytes
    shards: int
    stages: int
    peer_rows: int  # up to so many rows are summed over peers' memory
    gathers: bool  # each shard's results to all processes

    def decode(self, bucket, mode, leaves, cache, last_token, tables, ints, floats, peers, packed) -> tuple[Any, ...]:
        """`bucket.steps` new tokens for each row, head and sampler included.

        Returns cache, last_token and tables as they are then, and the tokens [rows, steps].
        """
        step = unpack("decode", bucket, packed)
        tables = update_tables(tables, step["page_updates"])
        slots = step["slots"]
        rows = tuple(table[slots] for table in tables), ints[slots], floats[slots], step["lengths"], step["counts"]
        tokens = jnp.where(step["tokens"] < 0, last_token[slots], step["tokens"])
        model = self.weights.module(leaves)
        peers = own(peers) if peers and bucket.rows <= self.peer_rows else None

        def lengths_in(rows, number):
            *_, lengths, counts = rows
            return jnp.where(number < counts, lengths + number, 0)

        def inputs(rows, number):
            row_tables, lengths = rows[0], lengths_in(rows, number)
            positions = jnp.maximum(lengths - 1, 0)
            page, offset = self._places(row_tables, jnp.where(lengths > 0, jnp.arange(len(lengths)), -1), positions)
            return AttentionInputs(positions, page, offset, row_tables, lengths, None, None, None, None,
                                   self.layer_group, self.attention, self.buckets.block_q, self.float8,
                                   peers)  # fmt: skip

        def draw(rows, x, number):
            _, ints, floats, *_ = rows
            fields = sampling_fields(ints, floats, lengths_in(rows, number))
            return self._known(sample(model.head(x, share=True), fields, mode, axis=self.weights.axis).tokens)

        def next_tokens(carry, number):
            cache, tokens = carry
            at = inputs(rows, number)
            x = model.embed(tokens, at.positions) if peers is None else model.embed(tokens, at.positions, partial=True)
            x, cache = model.run_layers(x, at, cache)
            drawn = draw(rows, x, number)
            return (cache, drawn), drawn

        if self.stages == 1:
            (cache, last), drawn = jax.lax.scan(next_tokens, (cache, tokens), jnp.arange(bucket.steps))
        else:
            least = self.buckets.rows[0]
            cache, drawn = pipeline.decode(model, inputs, draw, rows, tokens, cache, bucket.steps, least)
            last = drawn[-1]
        return cache, last_token.at[slots].set(last), tables, self._told(drawn.T)

    def mixed(self, bucket, leaves, cache, last_token, tables, packed) -> tuple[Any, ...]:
        """Rows of one token and chunks of prompts in one flat batch; the head comes in a program of its own.

        Returns cache and tables as they are then, hidden states [tokens, E], and those of the rows that the head is
        asked for, padded to [max_num_seqs, E].
        """
        step = unpack("mixed", bucket, packed)
        tables = update_tables(tables, step["page_updates"])
        row, positions, slots = step["token_row"], step["positions"], step["slots"]
        tokens = jnp.where(step["tokens"] < 0, last_token[slots[row]], step["tokens"])
        row_tables = tuple(table[slots] for table in tables)
        page, offset = self._places(row_tables, row, positions)
        inputs = AttentionInputs(positions, page, offset, row_tables, step["lengths"], step["q_start"], step["q_len"],
                                 step["block_row"], step["block_start"],
                                 self.layer_group, self.attention, self.buckets.block_q, self.float8)  # fmt: skip
        model = self.weights.module(leaves)
        x = model.embed(tokens, positions)
        if self.stages == 1:
            x, cache = model.run_layers(x, inputs, cache)
        else:
            x, cache = pipeline.run_layers(model, x, inputs, cache, min(len(x), self.buckets.microbatch))
        rows = x[step["logit_index"]]
        return cache, tables, x, jnp.pad(rows, ((0, self.buckets.max_num_seqs - len(rows)), (0, 0)))

    def _places(self, tables, row, positions):
        """Page (0 for padding) and offset in it where each token's K and V go, per cache group."""
        size = self.config.page_size
        page = tuple(jnp.where(row < 0, 0, table[row, positions // size]) for table in tables)
        return page, positions % size

    def head(
        self, bucket, mode, whole_vocab, leaves, rows, last_token, tables, ints, floats, rules, packed
    ) -> tuple[Any, ...]:
        """Logits and sampling for the first `bucket.rows` of `rows` [max_num_seqs, E].

        Returns last_token and rules as they are then, and what was drawn, by name.
        """
        step = unpack("head", bucket, packed)
        slots = step["slots"]
        split = mode != "everything"  # what edits and what ranks logits wants them whole
        logits = self.weights.module(leaves).head(rows[: bucket.rows], share=split)
        fields = sampling_fields(ints[slots], floats[slots], step["positions"], slots, rules)
        top = self.config.max_logprobs if mode == "everything" else 0
        shown = cast(Literal["raw", "processed"], self.config.logprobs_mode)
        drawn = sample(logits, fields, mode, top, shown, whole_vocab, self.weights.axis if split else None)
        drawn = drawn._replace(tokens=self._known(drawn.tokens))
        last_token = last_token.at[slots].set(drawn.tokens)
        if mode != "everything":
            return last_token, (), self._told({"tokens": drawn.tokens})
        rules = rules._replace(counts=count_tokens(rules.counts, slots, drawn.tokens))
        return last_token, rules, self._told(drawn._asdict())

    def _known(self, tokens):
        """Of several devices padding may be drawn where all logits are NaN."""
        return tokens if self.weights.axis is None else jnp.minimum(tokens, self.vocab_size - 1)

    def _told(self, results):
        """Results for the host, which has those of all shards in any case."""
        return jax.tree.map(partial(gather, axis=DATA, dimension=0), results) if self.gathers else results

    def prompt_rows(self, tokens, chunk, hidden, places) -> jax.Array:
        """hidden [tokens, E] at places [chunk]."""
        return hidden[places]

    def prompt(self, chunk, best, leaves, rows, targets) -> Any:
        """Log-probability and rank of each target after hidden states rows [chunk, E], and the best tokens if asked."""
        logits = self.weights.module(leaves).head(rows)
        return self._told(token_logprobs(logits, targets, self.config.max_logprobs if best else 0))

    def prompt_vocab(self, chunk, leaves, rows, shard) -> jax.Array:
        """All log-probabilities [chunk, vocab]: each shard computes what this one was asked for."""
        if self.shards > 1:
            rows = jax.lax.all_gather(rows, DATA)[shard]
        return log_softmax(self.weights.module(leaves).head(rows))

    def pool(self, bucket, leaves, hidden, rows) -> Any:
        """Sums of normed hidden states by the row that each token belongs to, [rows, E]."""
        return self._told(pooled_sums(self.weights.module(leaves).norm(hidden), rows, bucket.rows))
