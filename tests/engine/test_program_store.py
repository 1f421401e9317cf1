"""Compiled programs on disk: found again, told apart, and made anew where a file is damaged or cannot be written."""

import logging
import pickle
import secrets
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.engine import program_store
from jaxengine.engine.program_store import ProgramStore

DEVICES = np.array(jax.devices()[:1])
ARGUMENTS = (jnp.arange(4.0), np.ones(4, np.float32))


class Pair(NamedTuple):
    total: jax.Array
    product: jax.Array


class Source:
    """A program, and how often it was lowered. Another each time: what a CPU has from jax's cache it writes badly."""

    def __init__(self):
        self.lowered, self.number = 0, float(secrets.randbelow(2**23))

    def __call__(self) -> jax.stages.Lowered:
        self.lowered += 1
        return jax.jit(lambda x, y: Pair(x + self.number, x * y), donate_argnums=0).lower(*ARGUMENTS)

    def check(self, program) -> None:
        x, y = jnp.arange(4.0), np.full(4, 2, np.float32)
        found = program(x, y)
        assert isinstance(found, Pair) and x.is_deleted()  # donated
        np.testing.assert_array_equal(found.total, self.number + np.arange(4, dtype=np.float32))
        np.testing.assert_array_equal(found.product, [0, 2, 4, 6])


@pytest.fixture
def store(tmp_path):
    return ProgramStore(tmp_path, DEVICES, "model")


def test_a_program_is_lowered_once(store, tmp_path, caplog):
    source, place = Source(), store.place("add", (3,), ARGUMENTS)
    source.check(store.get(place, source))
    other = ProgramStore(tmp_path, DEVICES, "model")
    source.check(other.get(other.place("add", (3,), ARGUMENTS), source))
    assert source.lowered == 1 and not caplog.records
    assert [path.name for path in place.parent.iterdir()] == [place.name]  # nothing half written


def test_what_differs_lies_elsewhere(store, tmp_path, monkeypatch):
    place = store.place("add", (3,), ARGUMENTS)
    longer = jnp.arange(5.0), np.ones(5, np.float32)
    others = [
        store.place("add", (4,), ARGUMENTS),
        store.place("add", (3,), longer),
        store.place("add", (3,), (ARGUMENTS[0].astype(jnp.bfloat16), ARGUMENTS[1])),
        store.place("sub", (3,), ARGUMENTS),
        ProgramStore(tmp_path, DEVICES, "another model").place("add", (3,), ARGUMENTS),
    ]
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    others.append(ProgramStore(tmp_path, DEVICES, "model").place("add", (3,), ARGUMENTS))
    monkeypatch.undo()
    monkeypatch.setattr(program_store, "_sources", lambda: "another version")
    others.append(ProgramStore(tmp_path, DEVICES, "model").place("add", (3,), ARGUMENTS))
    monkeypatch.undo()
    precision = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        others.append(ProgramStore(tmp_path, DEVICES, "model").place("add", (3,), ARGUMENTS))
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    assert len({place, *others}) == len(others) + 1
    assert ProgramStore(tmp_path, DEVICES, "model").place("add", (3,), ARGUMENTS) == place


@pytest.mark.parametrize("damage", [b"", b"nonsense", pickle.dumps((b"no program", None, None))])
def test_a_damaged_file_is_made_anew(store, damage, caplog):
    source, place = Source(), store.place("add", (3,), ARGUMENTS)
    place.parent.mkdir()
    place.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        source.check(store.get(place, source))
    assert str(place) in caplog.text
    source.check(store.get(place, source))
    assert source.lowered == 1


def test_a_folder_that_cannot_be_written_costs_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    store, source = ProgramStore(tmp_path / "file" / "programs", DEVICES, "model"), Source()
    with caplog.at_level(logging.WARNING):
        source.check(store.get(store.place("add", (3,), ARGUMENTS), source))
    assert "cannot be kept" in caplog.text
