"""Compiled programs on disk: found again, told apart, and made anew where a file is damaged or cannot be written."""

import hashlib
import logging
import pickle
import secrets
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.engine import program_store
from jaxengine.engine.compilations import Compiler
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
    def place(made_from="model", name="add", key=(3,), arguments=ARGUMENTS):
        return ProgramStore(tmp_path, DEVICES, made_from).place(name, key, arguments)

    x, y = ARGUMENTS
    anywhere = jax.ShapeDtypeStruct(x.shape, x.dtype)
    arguments = [(jnp.arange(5.0), y), (x.astype(jnp.bfloat16), y), (anywhere, y), ((x, y),)]
    different = [{"made_from": "another model"}, {"name": "sub"}, {"key": (4,)}, *({"arguments": a} for a in arguments)]
    places = [place(), *(place(**change) for change in different)]
    for name, value in (("SOURCES", "changed"), ("version", lambda name: "9"), ("_processor", lambda: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(program_store, name, value)
            places.append(place())
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        places.append(store.place("add", (3,), ARGUMENTS))
    with jax.default_matmul_precision("highest"):  # also after the store was made
        places.append(store.place("add", (3,), ARGUMENTS))
    assert len(set(places)) == len(places)
    assert place() == store.place("add", (3,), ARGUMENTS) == places[0]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_compiler_asks_the_store_before_it_lowers(store, wanted):
    source = Source()
    for _ in range(2):
        compiler = Compiler(store)
        compiler.start("add", (3,), lambda arguments: source(), ARGUMENTS, wanted, "buckets")
        source.check(compiler.take("add", (3,)))
        compiler.close()
    assert source.lowered == 1
    compiler = Compiler(store)
    compiler.start("add", (3,), lambda arguments: source(), ARGUMENTS, wanted, "other buckets")
    source.check(compiler.take("add", (3,)))
    compiler.close()
    assert source.lowered == 2


NO_PROGRAM = pickle.dumps((b"no program", None, None))


@pytest.mark.parametrize("damage", [b"", b"nonsense", hashlib.sha256(NO_PROGRAM).digest() + NO_PROGRAM])
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


def test_nothing_half_written_stays(store, caplog, monkeypatch):
    def full(path, data):
        path.touch()
        raise OSError("no space left")

    source, place = Source(), store.place("add", (3,), ARGUMENTS)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("pathlib.Path.write_bytes", full)
        source.check(store.get(place, source))
    assert "no space left" in caplog.text and not list(place.parent.iterdir())
