"""Writing the keys and values of new tokens to their pages, in place."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile
from pallas_kernels import triton_tile


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed only."""

    num_warps: int = 4

    def __post_init__(self) -> None:
        tile.check_tuning({"num_warps": self.num_warps}, {})


@partial(jax.jit, static_argnames=("tuning", "interpret"))
def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    *,
    tuning: TuningConfig = TuningConfig(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The pools with token t's k[t], v[t] `[KH, D]` at page[t], offset[t]; a token of page 0 is dropped.

    Pools [pages, KH, page_size, D], updated in place where the caller donates them; k, v [T, KH, D], cast to the
    pools' dtypes, of 8 bits as `paged_tile.stored` says; page, offset [T] int32. No two tokens may share a slot.
    ValueError for shapes that do not fit.
    """
    _check(k_pages, v_pages, k, v, page, offset)
    triton_tile.check_offsets(k_pages, v_pages)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return tuple(
        pl.pallas_call(
            _kernel,
            out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (k_pages, v_pages)],
            grid=(k.shape[0],),
            in_specs=[whole] * 6,
            out_specs=[whole] * 2,
            input_output_aliases={4: 0, 5: 1},
            compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=1),
            interpret=interpret,
            name="kv_write",
        )(page, offset, k, v, k_pages, v_pages)
    )


@jax.jit
def kv_write_reference(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, page: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same as `kv_write` in plain jax.numpy."""
    page = jnp.where(page == 0, k_pages.shape[0], page)  # out of range, which mode="drop" skips

    def written(pool, values):
        values = tile.kept(tile.stored(values, pool.dtype))
        return tile.kept(pool).at[page, :, offset].set(values, mode="drop").view(pool.dtype)

    return written(k_pages, k), written(v_pages, v)


def _check(k_pages, v_pages, k, v, page, offset) -> None:
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"pools must share one shape [pages, kv_heads, page_size, head_dim]: "
                         f"{k_pages.shape=} {v_pages.shape=}")  # fmt: skip
    if k.shape != v.shape or k.shape[1:] != (k_pages.shape[1], k_pages.shape[3]):
        raise ValueError(f"{k.shape=} {v.shape=} must be [tokens, kv_heads, head_dim] of pools of {k_pages.shape}")
    if not page.shape == offset.shape == k.shape[:1]:
        raise ValueError(f"{page.shape=} {offset.shape=} must be [{k.shape[0]}], one for each token")


def _kernel(
    page_ref,  # [T]
    offset_ref,  # [T]
    k_ref,  # [T, KH, D]
    v_ref,
    _k,  # the pools, aliased to the outputs
    _v,
    k_out_ref,  # [pages, KH, page_size, D]
    v_out_ref,
):
    token = pl.program_id(0)
    page, offset = page_ref[token], offset_ref[token]

    @pl.when(page != 0)
    def _():
        _, kv_heads, dim = k_ref.shape
        # Rows and columns past the last are out of bounds: interpret mode writes them back to where they point.
        head = jnp.arange(pl.next_power_of_2(kv_heads))[:, None]
        d = jnp.arange(pl.next_power_of_2(dim))[None, :]
        mask = (head < kv_heads) & (d < dim)
        for new_ref, out_ref in ((k_ref, k_out_ref), (v_ref, v_out_ref)):
            new = plt.load(new_ref.at[token, head, d], mask=mask, other=jnp.zeros((), new_ref.dtype))
            plt.store(out_ref.at[page, head, offset, d], tile.stored(new, out_ref.dtype), mask=mask)
