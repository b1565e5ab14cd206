"""What the download cache needs of the file system: one process at a time, whole files only, and a record of hashes."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

_log = logging.getLogger(__name__)

_BLOCK = 1 << 20
#: A file system without locks says so with one of these.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a file that others see either as it was or complete."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Holds a lock file; other processes and threads wait until it is free.

    The operating system holds the lock, so that of a killed process is free at once.

    Args:
        path: The lock file; made here and removed at the end.

    Yields:
        Whether there is a lock: some network file systems have none.
    """
    while True:
        with path.open("ab") as file:
            locked = _lock(file, path)
            # Whoever held it before has removed the file that was opened here: there may be a new one by now.
            if locked and not _is_at(file, path):
                continue
            try:
                yield locked
            finally:
                with contextlib.suppress(OSError):  # Windows removes no open file; an empty one may stay
                    path.unlink()
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], path: Path) -> bool:
    """Locks an open file, waiting for it; closing the file frees it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        lock: Any = msvcrt
        lock.locking(file.fileno(), lock.LK_LOCK, 1)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("%s: another process is at it; waiting", path.name.removesuffix(".lock"))
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a file in the cache.

    Attributes:
        file: Its name there.
        sha256: Its hash.
        size: Bytes.
        modified: When it was written last, in nanoseconds; with `size`, the cheap sign that it is still the same.
        date: The day it came, ISO 8601.
        checked: ``"published"``: equal to a hash that its source publishes. ``"first download"``: nobody publishes
            one, so this is what later downloads are compared with. ``"copied by hand"``: found in the cache.
    """

    file: str
    sha256: str
    size: int
    modified: int
    date: str
    checked: str

    @classmethod
    def of(cls, path: Path, sha256: str, checked: str) -> Record:
        """The record of a file as it is now."""
        status = path.stat()
        today = dt.datetime.now(dt.timezone.utc).date().isoformat()
        return cls(
            file=path.name,
            sha256=sha256,
            size=status.st_size,
            modified=status.st_mtime_ns,
            date=today,
            checked=checked,
        )

    def is_untouched(self, path: Path) -> bool:
        """Whether the file looks as it did, without reading it."""
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.modified)


class Ledger:
    """The records of a cache folder by address, in ``weights.lock.json``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "weights.lock.json"

    def read(self, url: str) -> Record | None:
        """The record of an address."""
        entry = self._entries().get(url)
        try:
            return None if entry is None else Record(**entry)
        except TypeError:
            _log.warning("%s has no readable entry for %s; it is taken as none", self.path, url)
            return None

    def write(self, url: str, record: Record) -> None:
        """Adds or replaces a record; in a folder that cannot be written to, nothing is recorded."""
        try:
            with exclusive(self.path.with_name(self.path.name + ".lock")):
                entries = {**self._entries(), url: asdict(record)}
                write_whole(self.path, json.dumps(entries, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            _log.warning("the hash of %s is not recorded: %s (%s)", record.file, self.path, error)

    def _entries(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            _log.warning("%s cannot be read (%s); it is taken as empty", self.path, error)
            return {}
        return entries if isinstance(entries, dict) else {}
