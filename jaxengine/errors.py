"""Every exception that jaxengine raises on purpose.

    JaxEngineError
    ├── ConfigError (ValueError)             an engine or model option is out of range or contradicts another
    ├── CheckpointError (ValueError)         the files are corrupt, incomplete, or disagree with their config
    │   ├── ModelNotFoundError               no such folder, file or hub repository
    │   └── UnsupportedModelError            an architecture, option or tensor format that no converter handles
    ├── RequestError (ValueError)            a prompt or a sampling field that cannot be served
    ├── UnsupportedError (NotImplementedError)   a feature that is named on the surface but not built yet
    ├── MemoryPlanError (MemoryError)        too little memory for the weights or for one page
    └── EngineError (RuntimeError)           the device failed, or the engine cannot go on
        ├── EngineClosedError                the engine was closed
        └── WeightsDeletedError              parameters that the engine borrowed are gone; update_weights brings others

Messages carry the value that was refused and, where there is one, the remedy.
"""


class JaxEngineError(Exception):
    """Root of the tree: `except JaxEngineError` catches all of ours and nothing else."""


class ConfigError(JaxEngineError, ValueError):
    """An engine or model option is out of range or contradicts another."""


class CheckpointError(JaxEngineError, ValueError):
    """The checkpoint's files are corrupt, incomplete, or disagree with their config."""


class ModelNotFoundError(CheckpointError):
    """There is no such folder, file or hub repository."""


class UnsupportedModelError(CheckpointError):
    """An architecture, an option of it, or a tensor format that no converter handles."""


class RequestError(JaxEngineError, ValueError):
    """A prompt or a sampling field that cannot be served."""


class UnsupportedError(JaxEngineError, NotImplementedError):
    """A feature that is named on the public surface but not built yet; the message says what to use."""


class MemoryPlanError(JaxEngineError, MemoryError):
    """Too little device memory for the weights, or for one page of KV cache."""


class EngineError(JaxEngineError, RuntimeError):
    """The device failed, or the engine cannot go on."""


class EngineClosedError(EngineError):
    """The engine was closed."""


class WeightsDeletedError(EngineError):
    """Parameters that the engine borrowed are gone: their owner donated or deleted them."""
