"""Pallas kernels of a decoder with a paged KV cache, usable without the engine. One op per file, each with its twin
`*_reference`.

Pools are `[pages, kv_heads, page_size, head_dim]`, one for K and one for V; page 0 is the null page, for padding.
The kernels compile for NVIDIA GPUs of compute capability 8.0 and above, through Triton, or run anywhere with
`interpret=True`; `paged_decode` and `paged_extend` have one each for Hopper in Mosaic GPU, which `tuning` names, and
`decode_layer`, `gated_matmul` and `split_matmul` are for Hopper only.
"""

from pallas_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from pallas_kernels.all_reduce_rms_norm import (
    all_reduce_rms_norm,
    all_reduce_rms_norm_reference,
    workspace_words,
)
from pallas_kernels.decode_layer import LayerWeights, decode_layer, decode_layer_reference
from pallas_kernels.gated_activation import gated_activation, gated_activation_reference
from pallas_kernels.grouped_matmul import (
    grouped_gated_matmul,
    grouped_gated_matmul_reference,
    grouped_matmul,
    grouped_matmul_reference,
)
from pallas_kernels.kv_write import kv_write, kv_write_reference
from pallas_kernels.paged_decode import paged_decode, paged_decode_reference
from pallas_kernels.paged_extend import paged_extend, paged_extend_reference
from pallas_kernels.rope_write import rope_write, rope_write_reference
from pallas_kernels.skinny_matmul import (
    gated_matmul,
    gated_matmul_reference,
    split_matmul,
    split_matmul_reference,
)

__all__ = [
    "LayerWeights",
    "add_rms_norm",
    "add_rms_norm_reference",
    "all_reduce_rms_norm",
    "all_reduce_rms_norm_reference",
    "decode_layer",
    "decode_layer_reference",
    "gated_activation",
    "gated_activation_reference",
    "gated_matmul",
    "gated_matmul_reference",
    "grouped_gated_matmul",
    "grouped_gated_matmul_reference",
    "grouped_matmul",
    "grouped_matmul_reference",
    "kv_write",
    "kv_write_reference",
    "paged_decode",
    "paged_decode_reference",
    "paged_extend",
    "paged_extend_reference",
    "rope_write",
    "rope_write_reference",
    "split_matmul",
    "split_matmul_reference",
    "workspace_words",
]
