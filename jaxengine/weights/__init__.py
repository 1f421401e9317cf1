"""Weights in: files -> canonical parameters on the mesh, every name and shape checked; and out, as Orbax.

checkpoint = open_checkpoint("some/folder")            # reads the configs and the headers, no weights
params = load_params(checkpoint, "bfloat16", mesh)     # canonical path -> array on its devices
save_checkpoint(checkpoint, params, Path("elsewhere"))
"""

from jaxengine.weights.checkpoint import Checkpoint, open_checkpoint
from jaxengine.weights.loading import load_params
from jaxengine.weights.saving import check_destination, save_checkpoint

__all__ = ["Checkpoint", "check_destination", "load_params", "open_checkpoint", "save_checkpoint"]
