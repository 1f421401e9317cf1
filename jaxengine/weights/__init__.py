"""Weights in: files, or a trainer's arrays -> canonical parameters on the mesh, every name and shape checked; and out.

checkpoint = open_checkpoint("some/folder")            # reads the configs and the headers, no weights
checkpoint = checkpoint_in_memory(nnx_module, config)  # or what a trainer has
params = load_params(checkpoint, "bfloat16", mesh)     # canonical path -> array on its devices
save_checkpoint(checkpoint, params, Path("elsewhere"))
"""

from jaxengine.weights.checkpoint import Checkpoint, open_checkpoint
from jaxengine.weights.in_memory import checkpoint_in_memory
from jaxengine.weights.loading import check_params, load_params
from jaxengine.weights.saving import check_destination, save_checkpoint

__all__ = [
    "Checkpoint",
    "check_destination",
    "check_params",
    "checkpoint_in_memory",
    "load_params",
    "open_checkpoint",
    "save_checkpoint",
]
