"""LLM inference native to JAX.

>>> from jaxengine import LLM, SamplingParams
>>> with LLM() as llm:  # the small model that ships with the package
...     outputs = llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
>>> len(outputs[0].outputs[0].token_ids) <= 8
True
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxengine.async_llm import AsyncLLM as AsyncLLM
    from jaxengine.config import EngineConfig as EngineConfig
    from jaxengine.config import ParamRule as ParamRule
    from jaxengine.errors import (
        CheckpointError as CheckpointError,
    )
    from jaxengine.errors import (
        ConfigError as ConfigError,
    )
    from jaxengine.errors import (
        EngineClosedError as EngineClosedError,
    )
    from jaxengine.errors import (
        EngineError as EngineError,
    )
    from jaxengine.errors import (
        JaxEngineError as JaxEngineError,
    )
    from jaxengine.errors import (
        MemoryPlanError as MemoryPlanError,
    )
    from jaxengine.errors import (
        ModelNotFoundError as ModelNotFoundError,
    )
    from jaxengine.errors import (
        RequestError as RequestError,
    )
    from jaxengine.errors import (
        UnsupportedError as UnsupportedError,
    )
    from jaxengine.errors import (
        UnsupportedModelError as UnsupportedModelError,
    )
    from jaxengine.errors import (
        WeightsDeletedError as WeightsDeletedError,
    )
    from jaxengine.handoff.parity import ParityReport as ParityReport
    from jaxengine.handoff.parity import parity_report as parity_report
    from jaxengine.llm import LLM as LLM
    from jaxengine.request import (
        BeamSearchParams as BeamSearchParams,
    )
    from jaxengine.request import (
        CompletionOutput as CompletionOutput,
    )
    from jaxengine.request import (
        Logprob as Logprob,
    )
    from jaxengine.request import (
        RequestOutput as RequestOutput,
    )
    from jaxengine.request import (
        SamplingParams as SamplingParams,
    )

__version__ = "0.1.0"

# Imported when first used: `import jaxengine` is instant, and a script can still set up jax.
_HOME = {
    "jaxengine.async_llm": ("AsyncLLM",),
    "jaxengine.config": ("EngineConfig", "ParamRule"),
    "jaxengine.errors": (
        "CheckpointError", "ConfigError", "EngineClosedError", "EngineError", "JaxEngineError", "MemoryPlanError",
        "ModelNotFoundError", "RequestError", "UnsupportedError", "UnsupportedModelError",
        "WeightsDeletedError",
    ),
    "jaxengine.handoff.parity": ("ParityReport", "parity_report"),
    "jaxengine.llm": ("LLM",),
    "jaxengine.request": ("BeamSearchParams", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
