"""A model over the paged cache without the engine: rows grow by the tokens they are given, logits come back.

Pages are in random order and full of large numbers until they are written, and so is the page that a window's table
names for what lies behind the window: whatever reads a slot it should not read shows.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxengine.config import ModelConfig
from jaxengine.kv_cache import KVCache, cache_groups, create_cache
from jaxengine.layers.attention import AttentionInputs, Implementation
from jaxengine.models import build, prepare
from jaxengine.sharding import create_mesh

BLOCK_Q = 4


class PagedModel:
    """Two programs: `extend` for up to `tokens` tokens of any rows, `decode` for one token of each row."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, jax.Array],
        max_model_len: int,
        *,
        implementation: Implementation = "xla",
        fuse: bool = True,
        transpose: bool = False,
        rows: int = 3,
        tokens: int = 64,
        page_size: int = 8,
        cache_dtype: str = "float32",
    ):
        self.config, self.implementation = config, implementation
        self.rows, self.tokens, self.page_size, self.cache_dtype = rows, tokens, page_size, cache_dtype
        self.groups = cache_groups(config.windows, config.num_kv_heads, config.head_dim)
        self.layer_group = tuple(
            next(g for g, group in enumerate(self.groups) if i in group.layers) for i in range(config.num_layers)
        )
        self.columns = -(-max_model_len // page_size)
        prepared = prepare(config, dict(params), fuse, transpose)
        self.graph, self.state = nnx.split(build(config, prepared, max_model_len))
        # Compiling is what these tests spend their time on; the least effort halves it.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self._run = jax.jit(self._step, donate_argnums=1, compiler_options=options)
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Forgets all rows."""
        rng, pages = np.random.default_rng(seed), self.rows * self.columns
        self.lengths = np.zeros(self.rows, np.int32)
        self.tables = [1 + rng.permutation(pages).reshape(self.rows, -1).astype(np.int32) for _ in self.groups]
        self.behind = pages + 1
        cache = create_cache(
            self.groups, [pages + 2] * len(self.groups), self.page_size, self.cache_dtype, create_mesh()
        )
        self.cache: KVCache = jax.tree.map(lambda pool: jnp.full_like(pool, 1e4), cache)

    def extend(self, chunks: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """row -> its new tokens; answers row -> logits [its new tokens, vocab]. Rows of one token go first."""
        order = sorted(chunks, key=lambda row: len(chunks[row]) > 1)
        order += [row for row in range(self.rows) if row not in chunks]
        count = np.array([len(chunks.get(row, ())) for row in order], np.int32)
        start = (np.cumsum(count) - count).astype(np.int32)
        assert count.sum() <= self.tokens
        tokens, positions = (np.zeros(self.tokens, np.int32) for _ in range(2))
        token_row = np.full(self.tokens, -1, np.int32)
        blocks = []
        for i, row in enumerate(order):
            span = slice(start[i], start[i] + count[i])
            tokens[span] = chunks.get(row, ())
            positions[span], token_row[span] = self.lengths[row] + np.arange(count[i]), i
            if count[i] > 1:
                blocks += [(i, first) for first in range(span.start, span.stop, BLOCK_Q)]
        self.lengths[order] += count
        blocks += [(-1, 0)] * (self.tokens // BLOCK_Q + self.rows - len(blocks))
        block_row, block_start = np.array(blocks, np.int32).T
        lengths = np.where(count > 0, self.lengths[order], 0)
        logits = self._call(tokens, positions, token_row, order, lengths, count, start, block_row, block_start)
        return {row: logits[start[i] : start[i] + count[i]] for i, row in enumerate(order) if count[i]}

    def decode(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        """row -> its one new token; answers row -> logits [vocab]."""
        order = list(range(self.rows))
        count = np.array([row in tokens for row in order], np.int32)
        ids = np.array([tokens.get(row, 0) for row in order], np.int32)
        self.lengths += count
        lengths = np.where(count > 0, self.lengths, 0)
        positions = np.maximum(lengths - 1, 0)
        logits = self._call(ids, positions, np.where(count > 0, order, -1), order, lengths, count, None, None, None)
        return {row: logits[row] for row in tokens}

    def _call(self, tokens, positions, token_row, order, lengths, count, start, block_row, block_start) -> np.ndarray:
        tables, pages = [], []
        for group, table in zip(self.groups, self.tables):
            table = table[order]
            pages.append(np.where(token_row < 0, 0, table[token_row, positions // self.page_size]))
            if group.window is not None:
                passed = np.maximum(lengths - count + 1 - group.window, 0) // self.page_size
                table = np.where(np.arange(table.shape[1]) < passed[:, None], self.behind, table)
            tables.append(table)
        inputs = AttentionInputs(
            positions, tuple(pages), positions % self.page_size, tuple(tables), lengths, start,
            None if start is None else count, block_row, block_start, self.layer_group, self.implementation, BLOCK_Q,
        )  # fmt: skip
        logits, self.cache = self._run(self.state, self.cache, tokens, jax.tree.map(np.int32, inputs))
        return np.asarray(logits)

    def _step(self, state, cache: KVCache, tokens: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, KVCache]:
        model = nnx.merge(self.graph, state)
        x, cache = model.run_layers(model.embed(tokens, inputs.positions), inputs, cache)
        return model.head(x), cache
