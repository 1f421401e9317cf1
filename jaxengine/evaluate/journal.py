"""The output of a batch run: records appended to a file that a crash at any moment leaves whole or mendable."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from jaxengine.errors import ConfigError

Record = dict[str, Any]


class KeySet:
    """A set of texts that keeps 16 bytes of each: those of a long file would not fit into memory."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key: str) -> bool:
        return _digest(key) in self._digests

    def add(self, key: str) -> None:
        self._digests.add(_digest(key))

    def discard(self, key: str) -> None:
        self._digests.discard(_digest(key))


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Journal:
    """An open output file, one JSON object a line, and what is finished in it already.

    The manifest beside it (`<output>.manifest.json`) says what made the records; a run with another one is refused.
    Opening mends a torn last line. Raises ConfigError for a file that is not ours or in use, OSError when the disk
    will not have it.
    """

    def __init__(self, path: str | os.PathLike, manifest: Mapping[str, Any], retry_errors: bool = False):
        self.path = Path(path)
        self._manifest = self.path.with_name(self.path.name + ".manifest.json")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.num_retried = 0
        self._finished = KeySet()
        try:
            self._lock()
            self._check_manifest(manifest)
            self._end = self._read()
            os.ftruncate(self._file, self._end)  # what a crash left of a record
            if retry_errors and self._errors:
                self._drop_errors()
            _sync_folder(self.path)
        except BaseException:
            os.close(self._file)
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._finished

    def __len__(self) -> int:
        return len(self._finished)

    def append(self, records: Iterable[Record]) -> None:
        """Writes records and waits until they are on the disk. Raises OSError, and then none of them is there."""
        data = b"".join(_encoded(record) for record in records)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except BaseException as error:
            os.ftruncate(self._file, self._end)
            if isinstance(error, OSError):
                raise OSError(error.errno, f"{error.strerror}; what was written before is whole: make room and "
                              "start the same run again", str(self.path)) from error  # fmt: skip
            raise
        self._end += len(data)

    def close(self) -> None:
        """A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- opening

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path}: another run is writing it; wait for its end, or write elsewhere") from None
        if not os.path.exists(self.path) or not os.path.samestat(os.fstat(self._file), os.stat(self.path)):
            raise ConfigError(f"{self.path}: another run has just replaced it; start again")

    def _check_manifest(self, manifest: Mapping[str, Any]) -> None:
        manifest = json.loads(json.dumps(manifest))
        if os.fstat(self._file).st_size:
            try:
                before = json.loads(self._manifest.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                raise ConfigError(
                    f"{self.path} holds something, and {self._manifest.name} beside it does not say what made it; "
                    "write to another file"
                ) from None
            if changed := list(differences(before, manifest)):
                raise ConfigError(
                    f"{self.path} was begun with other settings ({'; '.join(changed)}); take those, or another file"
                )
            return
        text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
        _replace(self._manifest, lambda file: file.write(text.encode()))

    def _read(self) -> int:
        """Notes what is finished; returns where the last whole record ends."""
        end, self._errors = 0, False
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                key, failed = _key_of(line, self.path, number)
                end += len(line)
                self._errors |= failed
                self._finished.add(key)
        return end

    def _drop_errors(self) -> None:
        """Takes the records of errors out: those lines run again."""

        def copy(target: Any) -> None:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    key, failed = _key_of(line, self.path, number)
                    if failed:
                        self._finished.discard(key)
                        self.num_retried += 1
                    else:
                        target.write(line)

        _replace(self.path, copy)
        before, self._file = self._file, os.open(self.path, os.O_RDWR | os.O_APPEND)
        os.close(before)
        self._lock()
        self._end = os.fstat(self._file).st_size


def _encoded(record: Record) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        return json.dumps(record).encode() + b"\n"


def line_key(number: int) -> str:
    """What a record is known by when its line has no custom_id of its own."""
    return f"line {number}"


def id_key(custom_id: str) -> str:
    return f"id {custom_id}"


def _key_of(line: bytes, path: Path, number: int) -> tuple[str, bool]:
    """A record's key, and whether it tells of an error."""
    try:
        record = json.loads(line)
        custom_id = record["custom_id"]
        return line_key(record["line"]) if custom_id is None else id_key(custom_id), record["error"] is not None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: line {number} is not a record of a batch run: {line[:80]!r}") from None


def differences(before: Any, now: Any, name: str = "") -> Iterable[str]:
    """In words, one a field."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {before!r}, now {now!r}"


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Puts a new file in the place of `path` at once, or leaves that as it was."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
