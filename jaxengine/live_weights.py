"""Other weights for an engine that runs: checked, then staged beside the old ones or loaded in their place."""

import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, get_args

import jax

from jaxengine.config import EngineConfig, ModelConfig, ParamRule
from jaxengine.engine.engine import Engine
from jaxengine.engine.lockstep import Follower, Leader
from jaxengine.engine.loop import EngineLoop
from jaxengine.engine.runner import Runner
from jaxengine.engine.updates import PendingUpdate, UpdateMode
from jaxengine.errors import CheckpointError, ConfigError, EngineError, MemoryPlanError, UnsupportedError
from jaxengine.request import WeightUpdate
from jaxengine.weights import Checkpoint, check_params, checkpoint_in_memory, open_checkpoint
from jaxengine.weights.prepared import Prepared, load_prepared

NOT_OF_THE_WEIGHTS = {"dtype", "bos_token_id", "eos_token_ids"}
STAGED = "the old ones go on serving; in_place=True needs no second copy, gpu_memory_utilization may leave room"
LATEST_VERSION = 2**63 - 1


class LiveWeights:
    """The weights of one engine. One update at a time; for any thread."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        mapping: Mapping[str, ParamRule] | None,
        runner: Runner | Leader,
    ):
        self._config, self._model, self._mesh, self._mapping = config, model, mesh, mapping
        self._runner = runner
        self._turn = threading.Lock()

    def update(
        self,
        loop: EngineLoop | Follower,
        source: Any,
        version: int | None,
        mode: UpdateMode,
        in_place: bool,
        mapping: Mapping[str, ParamRule] | None,
    ) -> WeightUpdate:
        """See LLM.update_weights."""
        if mode not in get_args(UpdateMode):
            raise ConfigError(f"{mode=} is not one of {', '.join(get_args(UpdateMode))}")
        _check_version(version)
        with self._turn:
            loop.call(lambda engine: engine.check_awake())
            install = self._install(source, mapping, in_place, STAGED)
            update = PendingUpdate(version, mode, install, destructive=in_place)
            loop.call(lambda engine: engine.update_weights(update))
            try:
                return update.done.result()
            finally:
                if not update.done.done():  # the caller was interrupted
                    loop.call(lambda engine: engine.drop_update(EngineError("the update was withdrawn")))

    def sleep(self, loop: EngineLoop | Follower, level: int) -> None:
        """See LLM.sleep."""
        if level not in (1, 2):
            raise ConfigError(f"{level=} must be 1 (gives up the KV cache) or 2 (the weights too)")

        def fall_asleep(engine: Engine) -> None:
            engine.sleep(level)
            self._runner.sleep(level)

        with self._turn:
            loop.call(fall_asleep)

    def wake_up(self, loop: EngineLoop | Follower, source: Any, version: int | None) -> None:
        """See LLM.wake_up."""

        def wake(engine: Engine) -> None:
            try:
                self._runner.reset()
            except Exception:
                self._runner.sleep(level)  # gives back what there was room for
                raise
            engine.wake_up(update)

        _check_version(version)
        with self._turn:
            level = loop.call(lambda engine: engine.asleep)
            if level < 2 and (source, version) != (None, None):
                raise ConfigError(f"the weights are still there (sleep level {level}): wake_up(), then update_weights")
            if level == 2 and source is None:
                raise ConfigError("sleep(level=2) gave up the weights: wake_up(params_or_path) brings others")
            update = None
            if level == 2:
                install = self._install(source, None, False, "the engine still sleeps: free memory first")
                update = PendingUpdate(version, "continue", install, destructive=False)
            try:
                if level:
                    loop.call(wake)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise MemoryPlanError(
                    f"there is no room for the KV cache yet ({error}); the engine still sleeps: free memory, then "
                    "wake_up() again"
                ) from error

    def load(self, source: str | os.PathLike, mapping: Mapping[str, ParamRule] | None, in_place: bool) -> None:
        """What every process does, between two steps, when there are several."""
        checkpoint = self._open(source, mapping)
        (self._in_place(checkpoint) if in_place else self._staged(checkpoint, STAGED))()

    def _install(self, source: Any, mapping: Mapping[str, ParamRule] | None, in_place: bool, remedy: str) -> Any:
        """Checks, and returns what is to be called when no step is in flight."""
        if isinstance(self._runner, Leader) and not isinstance(source, str | os.PathLike):
            raise UnsupportedError(
                f"weights of type {type(source).__name__} for an engine of several processes: write them as a "
                "checkpoint, in a folder that every process can read, and give its path"
            )
        if isinstance(self._runner, Leader):
            _check_sendable(mapping)
        checkpoint = self._open(source, mapping)
        if isinstance(self._runner, Leader):
            return partial(self._runner.everywhere, "load", source, mapping, in_place)
        return self._in_place(checkpoint) if in_place else self._staged(checkpoint, remedy)

    def _open(self, source: Any, mapping: Mapping[str, ParamRule] | None) -> Checkpoint:
        """Everything checked that can be without reading weights."""
        if not isinstance(source, str | os.PathLike):
            return checkpoint_in_memory(source, self._model, self._mapping if mapping is None else mapping)
        checkpoint = open_checkpoint(
            source, use_generation_config=False, mapping=mapping,
            default_config=self._model, default_mapping=self._mapping,
        )  # fmt: skip
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

    def _staged(self, checkpoint: Checkpoint, remedy: str) -> Any:
        prepared = self._load(checkpoint, remedy)
        leaves = self._runner.weights.flatten(prepared.params)
        return lambda: self._runner.weights.take(leaves, prepared.borrowed)

    def _in_place(self, checkpoint: Checkpoint) -> Any:
        def install() -> None:
            weights = self._runner.weights
            weights.drop()
            try:
                params, borrowed = self._load(checkpoint, "the old ones are gone")
                weights.take(weights.flatten(params), borrowed)
            except Exception as error:
                raise EngineError(
                    f"update_weights(in_place=True) failed when the old weights were given up already: {error}; "
                    "close() this engine and make a new one"
                ) from error

        return install


def _check_sendable(mapping: Mapping[str, ParamRule] | None) -> None:
    try:
        pickle.dumps(mapping)
    except Exception as error:  # pickle raises many kinds
        raise UnsupportedError(
            f"param_mapping= cannot be sent to the other processes ({error}): its hooks must be functions of a module"
        ) from error


def _check_version(version: int | None) -> None:
    if version is not None and not (type(version) is int and 0 <= version <= LATEST_VERSION):
        raise ConfigError(f"{version=} must be an integer from 0 to 2**63 - 1, or None for the next one")
