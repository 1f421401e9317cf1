"""Weights in: files, or a trainer's arrays -> canonical parameters on the mesh, every name and shape checked; and out.

checkpoint = open_checkpoint("some/folder")            # reads the configs and the headers, no weights
params = load_params(checkpoint, "bfloat16", mesh)     # canonical path -> array on its devices
save_checkpoint(checkpoint, params, Path("elsewhere"))
"""

from jaxengine.weights.checkpoint import Checkpoint, open_checkpoint
from jaxengine.weights.loading import check_params, load_params
from jaxengine.weights.parameters import open_parameters
from jaxengine.weights.saving import check_destination, save_checkpoint

__all__ = [
    "Checkpoint",
    "check_destination",
    "check_params",
    "load_params",
    "open_checkpoint",
    "open_parameters",
    "save_checkpoint",
]
