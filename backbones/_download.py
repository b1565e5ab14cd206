"""Published files, downloaded once into a cache folder.

* A download that breaks off goes on where it ended, also in a later run, if the server vouches that the file is still
  the same (``If-Range``); otherwise it starts again. Parts of two files are never joined.
* What arrives is checked against the hash that its source publishes: the one in the variant table, or the SHA-256 that
  the Hugging Face hub sends with its redirect. Where nobody publishes one, the hash of the first download is recorded
  in ``weights.lock.json`` and later downloads are compared with that.
* A file in the cache is used if its size and time of writing are as recorded; if not, it is hashed, and downloaded
  again if the hash is another. So a file that a full disk cut short is found, and nothing is hashed on every use.
* Of several processes that want the same file, one downloads and the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import logging
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from effvit._cache import cache_folder
from effvit.backbones._cache_files import Ledger, Record, exclusive, file_hash, write_whole
from effvit.errors import CheckpointError

_log = logging.getLogger(__name__)

_TIMEOUT = 30.0
#: Seconds to wait before each further attempt; an attempt that brought something new starts the row again.
_DELAYS = (1.0, 2.0, 4.0, 8.0)
_BLOCK = 1 << 18
_FULL = {errno.ENOSPC, errno.EDQUOT}
_PUBLISHED, _RECORDED, _COPIED = "published", "first download", "copied by hand"


def fetch(url: str, *, sha256: str | None = None) -> Path:
    """Downloads a file unless the cache has it.

    Args:
        url: ``http(s)`` address of the file.
        sha256: Its hash in hexadecimal, or the first digits of it, where the source publishes it.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: The file cannot be downloaded or written, or it is not the one that was published or, where no
            hash is, the one that was downloaded first.
    """
    if urlparse(url).scheme not in {"http", "https"}:
        raise CheckpointError(f"{url}: only http and https addresses can be downloaded")
    folder = cache_folder()
    target = folder / cached_name(url)
    ledger = Ledger(folder)
    with _explained_folder(folder):
        if _has_sound(target, url, ledger, sha256):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(target.name + ".lock")) as alone:
            if not _has_sound(target, url, ledger, sha256):  # another process may have brought it meanwhile
                if target.exists():
                    _log.warning("%s is not what was downloaded (cut short or changed); downloading it again", target)
                _Download(url, target, ledger, sha256, alone=alone).run()
    return target


def cached_name(url: str) -> str:
    """Name of an address's file in the cache; a copy that is put there by hand needs it too."""
    # Part of the address's hash, since several sources publish files of the same name.
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}"


def _has_sound(target: Path, url: str, ledger: Ledger, sha256: str | None) -> bool:
    """Whether the cache holds the right file."""
    if not target.is_file():
        return False
    record = ledger.read(url)
    if record is not None and record.is_untouched(target) and _agrees(record.sha256, sha256):
        return True
    found = file_hash(target)
    if not _agrees(found, sha256) or (record is not None and sha256 is None and found != record.sha256):
        return False
    checked = _PUBLISHED if sha256 else _COPIED if record is None else record.checked
    ledger.write(url, Record.of(target, found, checked))
    return True


def _agrees(found: str, published: str | None) -> bool:
    return published is None or found.startswith(published.lower())


@contextlib.contextmanager
def _explained_folder(folder: Path) -> Iterator[None]:
    """Turns what the file system refuses into a message to act on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(
                f"the disk of {folder} is full ({error}). Free some space there, or set EFFVIT_CACHE to a folder on "
                "another disk."
            ) from error
        raise CheckpointError(
            f"the cache folder {folder} cannot be used ({error}). Set EFFVIT_CACHE to a folder that you can write to."
        ) from error


class _Broken(Exception):  # noqa: N818 - a state of affairs, caught here
    """The connection ended too early; another attempt may help."""


@dataclass
class _Source:
    """What a server says of the file; kept beside a part of it, to go on with the same file only.

    Attributes:
        url: The address.
        validator: Strong ETag or time of change, empty where the server sends none.
        size: Bytes of the whole file, where the server says so.
        sha256: The hash that the hub publishes.
    """

    url: str
    validator: str = ""
    size: int | None = None
    sha256: str | None = None


@dataclass
class _Download:
    """One file on its way into the cache."""

    url: str
    target: Path
    ledger: Ledger
    sha256: str | None
    alone: bool
    part: Path = field(init=False)
    notes: Path = field(init=False)
    source: _Source = field(init=False)
    reached: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        # Without a lock, two processes must not write into one part.
        own = ".part" if self.alone else f".{time.time_ns()}.part"
        self.part = self.target.with_name(self.target.name + own)
        self.notes = self.part.with_name(self.part.name + ".json")
        self.source = self._read_notes()

    def run(self) -> None:
        """Downloads in as many attempts as it takes, checks, and gives the file its name."""
        _log.info("downloading %s to %s", self.url, self.target)
        try:
            with _progress(self.target.name) as show:
                self._attempt_all(show)
        except OSError as error:
            if error.errno in _FULL:
                self._forget()  # rather than leave the disk full
            raise
        found = file_hash(self.part)
        self._check(found)
        self.part.replace(self.target)
        self.notes.unlink(missing_ok=True)
        checked = _PUBLISHED if self.sha256 or self.source.sha256 else _RECORDED
        self.ledger.write(self.url, Record.of(self.target, found, checked))

    def _attempt_all(self, show: Callable[[int, int | None], None]) -> None:
        best, failures = self._received(), 0
        while (broken := self._attempt(show)) is not None:
            received = self._received()
            if received > best:
                best, failures = received, 0
            if failures == len(_DELAYS):
                raise CheckpointError(
                    f"{self.url} cannot be downloaded: {broken}, {failures + 1} times in a row. What arrived is kept, "
                    f"and the next try goes on from there if the server can. {self._by_hand()}"
                ) from broken
            _log.warning("%s: %s; trying again in %g s", self.url, broken, _DELAYS[failures])
            time.sleep(_DELAYS[failures])
            failures += 1

    def _attempt(self, show: Callable[[int, int | None], None]) -> _Broken | None:
        """One request for what is still missing; what broke it off, if something did."""
        try:
            self._request_rest(show)
        except _Broken as broken:
            return broken
        return None

    def _request_rest(self, show: Callable[[int, int | None], None]) -> None:
        offset = self._received() if self.source.validator else 0
        if offset and offset == self.source.size:
            return
        first = _FirstAnswer()
        with self._open(offset, first) as response:
            offset = self._start(offset, response, first.headers or response.headers)
            with self.part.open("r+b" if self.part.exists() else "wb") as file:
                file.truncate(offset)
                file.seek(offset)
                self._copy(response, file, show)

    def _open(self, offset: int, redirects: _FirstAnswer) -> Any:
        """The server's answer."""
        try:
            return urllib.request.build_opener(redirects).open(self._request(offset), timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except urllib.error.URLError as error:
            if not self.reached:  # most likely no network at all: waiting does not help
                raise CheckpointError(f"{self.url} cannot be downloaded ({error.reason}). {self._by_hand()}") from error
            raise _Broken(str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            self.reached = True
            raise _Broken(str(error) or type(error).__name__) from error

    def _request(self, offset: int) -> urllib.request.Request:
        headers = {"User-Agent": "effvit", "Accept-Encoding": "identity"}
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": self.source.validator}
        return urllib.request.Request(self.url, headers=headers)  # noqa: S310 - the scheme is checked by fetch

    def _start(self, offset: int, response: Any, first: http.client.HTTPMessage) -> int:
        """Reads an answer's head; the place in the file where its body belongs."""
        self.reached = True
        headers = response.headers
        if headers.get_content_type() == "text/html":
            raise CheckpointError(
                f"{self.url} answers with a web page instead of a file, as the login page of a network does. "
                f"{self._by_hand()}"
            )
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            found = re.match(r"bytes (\d+)-\d+/(\d+)$", headers.get("Content-Range", ""))
            same = found is not None and (int(found[1]), int(found[2])) == (offset, self.source.size or int(found[2]))
            if not same or _validator(headers) not in {"", self.source.validator}:
                self._forget()
                raise _Broken("the server sent another part than it was asked for")
            return offset
        linked = (first.get("X-Linked-ETag") or "").strip('"')
        size = headers.get("Content-Length") or first.get("X-Linked-Size")
        self.source = _Source(
            url=self.url,
            validator=_validator(headers),
            size=None if size is None else int(size),
            sha256=linked if re.fullmatch(r"[0-9a-f]{64}", linked) else None,  # other files carry a hash of git's
        )
        write_whole(self.notes, json.dumps(asdict(self.source)))
        self._check_space()
        return 0

    def _copy(self, response: Any, file: IO[bytes], show: Callable[[int, int | None], None]) -> None:
        received, size = file.tell(), self.source.size
        while True:
            try:
                block = response.read1(_BLOCK)
            except (OSError, http.client.HTTPException) as error:  # what writing raises is not the server's fault
                raise _Broken(f"the connection ended after {received} bytes ({error})") from error
            if not block:
                break
            file.write(block)
            received += len(block)
            show(received, size)
        file.flush()
        if size is not None and received != size:
            raise _Broken(f"the connection ended after {received} of {size} bytes")

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        self.reached = True
        answer = f"the server answers {error.code} {error.reason}"
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._forget()
            return _Broken("the server's file is shorter than the part that is here")
        again = {http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS}
        if error.code in again or error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return _Broken(answer)
        return CheckpointError(f"{self.url} cannot be downloaded: {answer}. {self._by_hand()}")

    def _check(self, found: str) -> None:
        """Refuses a file that is not the one that was published or recorded."""
        for published, publisher in ((self.sha256, "was published"), (self.source.sha256, "the hub publishes")):
            if not _agrees(found, published):
                self._forget()
                raise CheckpointError(
                    f"{self.url}: the file's SHA-256 is {found}, {published} {publisher}; it was not kept"
                )
        record = self.ledger.read(self.url)
        if record is None or record.checked == _COPIED or record.sha256 == found:
            return
        if self.sha256 or self.source.sha256:
            _log.warning("%s is another file than on %s; its publisher's hash fits", self.url, record.date)
            return
        self._forget()
        raise CheckpointError(
            f"{self.url}: the file's SHA-256 is {found}, but on {record.date} it was {record.sha256}, and no hash is "
            f"published to tell which is right; it was not kept. If the file was replaced on purpose, remove its entry "
            f"from {self.ledger.path} and try again."
        )

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if self.source.size is not None and self.source.size > free:
            raise OSError(errno.ENOSPC, f"{self.source.size} bytes are needed, {free} are free")

    def _read_notes(self) -> _Source:
        try:
            source = _Source(**json.loads(self.notes.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return _Source(self.url)
        return source if source.url == self.url else _Source(self.url)

    def _received(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _forget(self) -> None:
        """Drops what was received."""
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.source = _Source(self.url)

    def _by_hand(self) -> str:
        return (
            "Without a network, download it elsewhere and pass the file's path as `pretrained`, or put it into the "
            f"cache as {self.target} (EFFVIT_CACHE names the cache folder)."
        )


class _FirstAnswer(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the headers of the one that has the hub's hash: the last answer lacks them."""

    headers: http.client.HTTPMessage | None = None

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if self.headers is None and headers.get("X-Linked-ETag"):
            self.headers = headers
        scheme = urlparse(newurl).scheme
        if scheme != "https" and scheme != urlparse(req.full_url).scheme:
            raise CheckpointError(f"{req.full_url} leads to {newurl}, which is less safe; it is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _validator(headers: http.client.HTTPMessage) -> str:
    """What tells this content of an address from another: a strong ETag, or else the time of the last change."""
    etag = headers.get("ETag") or ""
    return etag if etag.startswith('"') else headers.get("Last-Modified") or ""


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields what is told of (received, size) in bytes."""
    if not sys.stderr.isatty():
        yield lambda _received, _size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda received, size: bar.update(task, completed=received, total=size)
