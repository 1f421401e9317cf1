"""The output file of a run: whole after any crash, and only ever of one run."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.errors import ConfigError
from jaxengine.evaluate import journal as module
from jaxengine.evaluate.journal import Journal, id_key, line_key

MANIFEST = {"model": "a", "sampling": {"stop": ("x",), "seed": None}}


def record(custom_id, error=None, line=1, text="é\n" * 3):
    return {"custom_id": custom_id, "line": line, "response": None if error else {"text": text}, "error": error}


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def test_what_is_appended_is_known_when_it_is_opened_again(path):
    with Journal(path, MANIFEST) as journal:
        assert len(journal) == 0
        journal.append([record("a"), record("b", {"code": "x"})])
        journal.append([record(None, {"code": "y"}, line=7)])
    with Journal(path, MANIFEST) as journal:
        assert len(journal) == 3
        assert id_key("a") in journal and id_key("b") in journal and line_key(7) in journal
        assert id_key("c") not in journal and line_key(1) not in journal
        journal.append([record("c")])
    assert [r["custom_id"] for r in records_of(path)] == ["a", "b", None, "c"]


@given(st.data())
def test_a_file_cut_anywhere_is_mended(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    with Journal(path, MANIFEST) as journal:
        journal.append([record(str(i)) for i in range(3)])
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    tail = data.draw(st.sampled_from([b"", b"\0\0\0"]))  # what a power failure leaves of a page
    path.write_bytes(whole[:cut] + tail)
    kept = whole[:cut].count(b"\n")
    with Journal(path, MANIFEST) as journal:
        assert len(journal) == kept
        assert [id_key(str(i)) in journal for i in range(3)] == [i < kept for i in range(3)]
        journal.append([record(str(i)) for i in range(kept, 3)])
    assert path.read_bytes() == whole


def test_errors_are_taken_out_to_run_again(path):
    with Journal(path, MANIFEST) as journal:
        journal.append([record("a"), record("b", {"code": "x"}), record(None, {"code": "y"}, line=3), record("d")])
    with Journal(path, MANIFEST, retry_errors=True) as journal:
        assert journal.num_retried == 2 and len(journal) == 2
        assert id_key("b") not in journal and line_key(3) not in journal
        with pytest.raises(ConfigError, match="another run is writing"):
            Journal(path, MANIFEST)
        journal.append([record("b")])
    assert [r["custom_id"] for r in records_of(path)] == ["a", "d", "b"]


def test_runs_of_other_settings_are_refused(path):
    with Journal(path, MANIFEST) as journal:
        journal.append([record("a")])
    before = path.read_bytes()
    other = {"model": "b", "sampling": {"stop": ("x",), "seed": 3}}
    with pytest.raises(ConfigError, match=r"model was 'a', now 'b'; sampling.seed was None, now 3"):
        Journal(path, other)
    assert path.read_bytes() == before
    Journal(path, MANIFEST).close()
    path.unlink()
    Journal(path, other).close()  # nothing to be mixed with


def test_files_that_are_not_ours_are_left_alone(path):
    path.write_text("precious\n")
    with pytest.raises(ConfigError, match="does not say what made it"):
        Journal(path, MANIFEST)
    path.with_name("out.jsonl.manifest.json").write_text(json.dumps(MANIFEST))
    with pytest.raises(ConfigError, match="line 1 is not a record of a batch run: b'precious"):
        Journal(path, MANIFEST)
    assert path.read_text() == "precious\n"


def test_two_runs_do_not_write_one_file(path):
    with Journal(path, MANIFEST) as journal:
        with pytest.raises(ConfigError, match="another run is writing it"):
            Journal(path, MANIFEST)
        journal.append([record("a")])
    Journal(path, MANIFEST).close()


class FullDisk:
    """Takes so many more bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, file, data):
        count = min(self.room, len(data), 100)  # in parts, as write(2) may
        if count == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= count
        return os.pwrite(file, bytes(data[:count]), os.fstat(file).st_size)


def test_a_full_disk_loses_nothing(path, monkeypatch):
    full = FullDisk(room=500)
    with Journal(path, MANIFEST) as journal:
        with monkeypatch.context() as patched:
            patched.setattr(module.os, "write", full.write)
            journal.append([record("a")])
            with pytest.raises(OSError, match=r"No space left on device; .* start the same run again") as failed:
                journal.append([record(str(i)) for i in range(10)])
        assert failed.value.errno == errno.ENOSPC and full.room == 0
        assert [r["custom_id"] for r in records_of(path)] == ["a"]
        journal.append([record("b")])  # there is room again
    assert [r["custom_id"] for r in records_of(path)] == ["a", "b"]


def test_a_full_disk_does_not_touch_what_is_being_replaced(path, monkeypatch):
    with Journal(path, MANIFEST) as journal:
        journal.append([record("a"), record("b", {"code": "x"})])
    before = path.read_bytes()

    def no_room(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        Journal(path, MANIFEST, retry_errors=True)
    assert path.read_bytes() == before and sorted(p.name for p in path.parent.iterdir()) == [
        "out.jsonl", "out.jsonl.manifest.json",
    ]  # fmt: skip


def test_records_are_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or fsync(file))
    with Journal(path, MANIFEST) as journal:
        journal.append([record("a")])
        assert synced[-1] == path.stat().st_size > 0
