"""Published files, downloaded once into a cache folder."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

from effvit._cache import cache_folder
from effvit.errors import CheckpointError

_TIMEOUT = 30.0


def fetch(url: str, *, sha256: str | None = None) -> Path:
    """Downloads a file unless the cache has it.

    The file is written under a temporary name and renamed once it is whole, so what the cache holds is complete.

    Args:
        url: ``http(s)`` address of the file.
        sha256: Its hash in hexadecimal, checked after the download where given.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: The file cannot be downloaded, or its hash is another.
    """
    if urlparse(url).scheme not in {"http", "https"}:
        raise CheckpointError(f"{url}: only http and https addresses can be downloaded")
    # Part of the address's hash, since several sources publish files of the same name.
    target = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _copy(url, file)
        _check_hash(url, part, sha256)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _copy(url: str, file: BinaryIO) -> None:
    """Streams `url` into an open file."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:  # noqa: S310 - the scheme is checked by fetch
            expected = response.headers.get("Content-Length")
            shutil.copyfileobj(response, file)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise CheckpointError(
            f"{url} cannot be downloaded ({error}). Without a network, download it elsewhere and pass its path as "
            f"`pretrained`, or set EFFVIT_CACHE to a cache folder (now {cache_folder()}) that already holds it."
        ) from error
    received = file.tell()
    if expected is not None and received != int(expected):
        raise CheckpointError(f"{url}: the connection ended after {received} of {expected} bytes; try again")


def _check_hash(url: str, file: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{url}: the file's SHA-256 is {digest.hexdigest()}, {sha256} was published; it was not kept"
        )
