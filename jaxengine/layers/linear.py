"""Matrix products. Every product with a weight goes through here; float32 means float32 on every device."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.sharding import Axis, once, total

FEW_TOKENS = 64  # up to so many, a CPU multiplies [out, in] by [in, tokens] faster than [tokens, in] by [in, out]


def precision(dtype) -> jax.lax.Precision | None:
    """HIGHEST for float32 (a GPU's default would be TF32), the default for narrower types."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Linear(nnx.Module):
    """`x @ kernel + bias`; kernel [in, out], or kernel_t [out, in]; bias [out] where the parameters have one.

    `axis`: the mesh axis over which `in` is split; the devices' products are summed.
    """

    def __init__(self, params: Mapping[str, jax.Array], axis: Axis | None = None):
        self.axis = axis
        self.kernel = nnx.Param(params["kernel"]) if "kernel" in params else None
        self.kernel_t = nnx.Param(params["kernel_t"]) if "kernel_t" in params else None
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None

    @property
    def plain(self) -> jax.Array | None:
        """The kernel [in, out], where the product with it is all."""
        return self.kernel[...] if self.kernel is not None and self.bias is None and self.axis is None else None

    def __call__(self, x: jax.Array, partial: bool = False) -> jax.Array:
        """x [tokens, in] -> [tokens, out] in x's dtype. `partial`: what this device adds to it, for others to sum."""
        y = self._product(x, x.dtype)
        y = y if partial else total(y, self.axis)
        if self.bias is None:
            return y
        bias = self.bias[...]
        return y + (once(bias, self.axis) if partial else bias)

    def logits(self, x: jax.Array) -> jax.Array:
        """x [rows, in] -> float32 [rows, out], never rounded to x's dtype on the way."""
        y = self._product(x, jnp.float32)
        return y if self.bias is None else y + self.bias[...]

    def _product(self, x: jax.Array, dtype) -> jax.Array:
        if self.kernel is not None:
            return jnp.dot(x, self.kernel[...], precision=precision(x.dtype), preferred_element_type=dtype)
        assert self.kernel_t is not None
        if len(x) > FEW_TOKENS:
            contract_last = (((1,), (1,)), ((), ()))
            return jax.lax.dot_general(
                x, self.kernel_t[...], contract_last, precision=precision(x.dtype), preferred_element_type=dtype
            )
        # The barriers keep XLA from turning this back into x @ kernel, which its CPU library does up to twice slower.
        x_t = jax.lax.optimization_barrier(x.T)
        y_t = jnp.dot(self.kernel_t[...], x_t, precision=precision(x.dtype), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y_t).T


class Projections(nnx.Module):
    """Several products of one input: one product when their kernels were fused by `models.prepare`, else one each."""

    def __init__(self, params: Mapping, names: tuple[str, ...], fused: str, widths: tuple[int, ...]):
        self.names, self.fused_name, self.widths = names, fused, widths
        for name in (fused,) if fused in params else names:
            setattr(self, name, Linear(params[name]))

    @property
    def fused(self) -> Linear | None:
        """The product that is all of them; None where they are apart."""
        return getattr(self, self.fused_name, None)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """x [tokens, in] -> one [tokens, width] for each name."""
        if not hasattr(self, self.fused_name):
            with jax.named_scope(self.fused_name):
                return tuple(getattr(self, name)(x) for name in self.names)
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
        return tuple(jnp.split(self.joined(x), ends, axis=-1))

    def joined(self, x: jax.Array) -> jax.Array:
        """x [tokens, in] -> [tokens, sum of widths], side by side; without a fused kernel that is a copy."""
        with jax.named_scope(self.fused_name):
            if hasattr(self, self.fused_name):
                return getattr(self, self.fused_name)(x)
            return jnp.concatenate([getattr(self, name)(x) for name in self.names], axis=-1)
