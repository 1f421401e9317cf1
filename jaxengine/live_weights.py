"""Other weights for an engine that runs: checked, then staged beside the old ones or loaded in their place."""

import os
import threading
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import jax

from jaxengine.config import EngineConfig, ModelConfig, ParamRule
from jaxengine.engine.loop import EngineLoop
from jaxengine.engine.runner import Runner
from jaxengine.engine.updates import PendingUpdate, UpdateMode
from jaxengine.errors import CheckpointError, ConfigError, EngineError
from jaxengine.request import WeightUpdate
from jaxengine.weights import Checkpoint, check_params, open_checkpoint, open_parameters
from jaxengine.weights.prepared import Prepared, load_prepared

NOT_OF_THE_WEIGHTS = {"dtype", "bos_token_id", "eos_token_ids"}
LATEST_VERSION = 2**63 - 1


class LiveWeights:
    """The weights of one engine. One update at a time; for any thread."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        mapping: Mapping[str, ParamRule] | None,
        runner: Runner,
    ):
        self._config, self._model, self._mesh, self._mapping = config, model, mesh, mapping
        self._runner = runner
        self._turn = threading.Lock()

    def update(
        self,
        loop: EngineLoop,
        source: Any,
        version: int | None,
        mode: UpdateMode,
        in_place: bool,
        mapping: Mapping[str, ParamRule] | None,
    ) -> WeightUpdate:
        """See LLM.update_weights."""
        if mode not in get_args(UpdateMode):
            raise ConfigError(f"{mode=} is not one of {', '.join(get_args(UpdateMode))}")
        if version is not None and not (type(version) is int and 0 <= version <= LATEST_VERSION):
            raise ConfigError(f"{version=} must be an integer from 0 to 2**63 - 1, or None for the next one")
        with self._turn:
            loop.raise_if_ended()
            checkpoint = self._open(source, self._mapping if mapping is None else mapping)
            install = self._in_place(checkpoint) if in_place else self._staged(checkpoint)
            update = PendingUpdate(version, mode, install, destructive=in_place)
            loop.call(lambda engine: engine.update_weights(update))
            return update.done.result()

    def _open(self, source: Any, mapping: Mapping[str, ParamRule] | None) -> Checkpoint:
        """Everything checked that can be without reading weights."""
        if not isinstance(source, str | os.PathLike):
            return open_parameters(source, self._model, mapping=mapping)
        checkpoint = open_checkpoint(source, use_generation_config=False)
        other = [
            f"{f.name}={getattr(checkpoint.config, f.name)!r}, the engine's has {getattr(self._model, f.name)!r}"
            for f in fields(ModelConfig)
            if f.name not in NOT_OF_THE_WEIGHTS and getattr(checkpoint.config, f.name) != getattr(self._model, f.name)
        ]
        if other:
            raise CheckpointError(f"{checkpoint.path} is of another model: {'; '.join(other)}")
        check_params(checkpoint)
        return checkpoint

    def _load(self, checkpoint: Checkpoint, remedy: str) -> Prepared:
        return load_prepared(checkpoint, self._config, self._mesh, remedy=remedy)

    def _staged(self, checkpoint: Checkpoint) -> Any:
        remedy = "the old ones go on serving; in_place=True needs no second copy, gpu_memory_utilization may leave room"
        prepared = self._load(checkpoint, remedy)
        leaves = self._runner.flatten(prepared.params)
        return lambda: self._runner.take_weights(leaves, prepared.borrowed)

    def _in_place(self, checkpoint: Checkpoint) -> Any:
        def install() -> None:
            self._runner.take_weights([], borrowed=False)
            try:
                params, borrowed = self._load(checkpoint, "the old ones are gone")
                self._runner.take_weights(self._runner.flatten(params), borrowed)
            except Exception as error:
                raise EngineError(
                    f"update_weights(in_place=True) failed when the old weights were given up already: {error}; "
                    "close() this engine and make a new one"
                ) from error

        return install
