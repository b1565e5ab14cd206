"""Downloads, from a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effvit.backbones import _download, _factory, backbone_info, create_backbone
from effvit.backbones._cache_files import exclusive
from effvit.errors import CheckpointError

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()
FETCH = "import sys; from effvit.backbones._download import fetch; fetch(sys.argv[1])"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_download, "_DELAYS", (0.0,) * 4)
    return tmp_path / "cache"


class Handler(http.server.BaseHTTPRequestHandler):
    """A file server whose faults a test chooses; `Range` is answered as RFC 9110 asks."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if self.path in server.redirects:
            target, headers = server.redirects[self.path]
            self.send_response(302)
            self.answer({"Location": target, "Content-Length": "0", **headers})
            return
        if server.answers:
            self.send_error(server.answers.pop(0))
            return
        if self.path not in server.files:
            self.send_error(404)
            return
        content, etag = server.files[self.path]
        start = 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.answer({"Content-Length": str(len(content) - start), **({"ETag": etag} if etag else {}), **server.headers})
        breaks_after = server.breaks.pop(0) if server.breaks else None
        self.wfile.write(content[start:] if breaks_after is None else content[start:][:breaks_after])
        if server.changes:
            server.files[self.path] = server.changes.pop(0)

    def answer(self, headers):
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    """Serves ``files`` (content and ETag by path), which become one of ``changes`` after each answer.

    ``requests`` is what was asked. Answers end after so many bytes as ``breaks`` says, the first of ``answers`` is an
    error's status, ``redirects`` are a target and headers by path.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.breaks, server.answers, server.changes = [], [], [], []
    server.files = {"/weights.pth": (CONTENT, '"one"')}
    server.redirects, server.headers, server.ranges = {}, {}, True
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.address}/weights.pth"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def names(cache):
    return sorted(path.name.split("-")[-1] for path in cache.iterdir()) if cache.is_dir() else []


def ledger(cache):
    return json.loads((cache / "weights.lock.json").read_text())


def ranges(server):
    return [wanted for _, wanted, _ in server.requests]


@pytest.mark.parametrize("digest", [None, DIGEST, DIGEST[:8].upper()])
def test_downloads_once_and_records_what_came(server, cache, digest):
    first = _download.fetch(server.url, sha256=digest)
    assert first.read_bytes() == CONTENT
    assert _download.fetch(server.url, sha256=digest) == first
    assert server.requests == [("/weights.pth", None, None)]
    assert names(cache) == ["weights.lock.json", "weights.pth"]
    record = ledger(cache)[server.url]
    assert (record["sha256"], record["size"], record["file"]) == (DIGEST, len(CONTENT), first.name)
    assert record["checked"] == ("published" if digest else "first download")


def test_a_wrong_hash_is_not_kept(server, cache):
    with pytest.raises(CheckpointError, match=rf"SHA-256 is {DIGEST}, 0000 was published; it was not kept"):
        _download.fetch(server.url, sha256="0000")
    assert names(cache) == []


def test_a_server_that_drops_goes_on_where_it_ended(server, cache):
    server.breaks = [1000, 2000]
    assert _download.fetch(server.url, sha256=DIGEST).read_bytes() == CONTENT
    assert server.requests == [
        ("/weights.pth", None, None),
        ("/weights.pth", "bytes=1000-", '"one"'),
        ("/weights.pth", "bytes=3000-", '"one"'),
    ]
    assert names(cache) == ["weights.lock.json", "weights.pth"]


def test_a_truncated_body_is_given_up_and_continued_by_the_next_run(server, cache):
    server.breaks = [1000, *[0] * 4]
    with pytest.raises(CheckpointError, match=r"ended after 1000 of 10240 bytes, 5 times in a row.*pretrained"):
        _download.fetch(server.url)
    assert names(cache) == ["weights.pth.part", "weights.pth.part.json"]
    server.requests.clear()
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert ranges(server) == ["bytes=1000-"]


def test_a_download_that_keeps_advancing_is_not_given_up(server, cache):
    server.breaks = [400] * 20
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert len(server.requests) == 21


@pytest.mark.parametrize("etag", ['"one"', None, 'W/"one"'])
def test_without_ranges_or_a_strong_etag_it_starts_again(server, cache, etag):
    server.files["/weights.pth"] = (CONTENT, etag)
    server.ranges = etag != '"one"'
    server.breaks = [1000]
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert len(server.requests) == 2
    assert ranges(server) == [None, "bytes=1000-" if etag == '"one"' else None]


@pytest.mark.parametrize("changed", [bytes(reversed(CONTENT)) + b"more", b"short"])
def test_a_file_that_changes_between_attempts_is_never_spliced(server, cache, changed):
    server.breaks, server.changes = [1000], [(changed, '"two"')]
    assert _download.fetch(server.url).read_bytes() == changed


def test_a_part_that_was_not_asked_for_is_not_taken(server, cache, monkeypatch):
    """A server may answer 206 for another file, against the standard."""
    server.breaks, server.changes = [1000], [(CONTENT[:5000], '"one"')]
    assert _download.fetch(server.url).read_bytes() == CONTENT[:5000]


def test_a_part_longer_than_the_file_is_dropped(server, cache):
    server.breaks = [1000, *[0] * 4]
    with pytest.raises(CheckpointError):
        _download.fetch(server.url)
    server.answers = [416]
    assert _download.fetch(server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_server_is_asked_again(server, cache, status):
    server.answers = [status, status]
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_attempts_wait_longer_and_longer(server, cache, monkeypatch):
    waits = []
    monkeypatch.setattr(_download, "_DELAYS", (1.0, 2.0, 4.0))
    monkeypatch.setattr(_download.time, "sleep", waits.append)
    server.answers = [503] * 4
    with pytest.raises(CheckpointError, match=r"answers 503 .*, 4 times in a row"):
        _download.fetch(server.url)
    assert waits == [1.0, 2.0, 4.0]


def test_the_hub_publishes_the_hash_in_its_redirect(server, cache):
    server.redirects["/resolve/model.bin"] = (
        "/weights.pth",
        {"X-Linked-ETag": f'"{DIGEST}"', "X-Linked-Size": "10240"},
    )
    server.breaks = [1000]
    path = _download.fetch(f"{server.address}/resolve/model.bin")
    assert path.read_bytes() == CONTENT
    assert ledger(cache)[f"{server.address}/resolve/model.bin"]["checked"] == "published"


def test_a_file_that_is_not_what_the_hub_publishes_is_not_kept(server, cache):
    server.redirects["/model.bin"] = ("/weights.pth", {"X-Linked-ETag": f'"{"0" * 64}"'})
    with pytest.raises(CheckpointError, match=r"0{64} the hub publishes; it was not kept"):
        _download.fetch(f"{server.address}/model.bin")
    assert names(cache) == []


def test_git_hashes_of_small_files_are_no_hash_of_the_content(server, cache):
    server.redirects["/config.json"] = ("/weights.pth", {"X-Linked-ETag": f'"{"0" * 40}"'})
    assert _download.fetch(f"{server.address}/config.json").read_bytes() == CONTENT


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/weights.pth"])
def test_a_redirect_to_something_else_is_not_followed(server, cache, target):
    server.redirects["/model.bin"] = (target, {})
    with pytest.raises(CheckpointError):
        _download.fetch(f"{server.address}/model.bin")
    assert names(cache) == []


def test_a_login_page_is_not_taken_for_weights(server, cache):
    server.headers["Content-Type"] = "text/html; charset=utf-8"
    with pytest.raises(CheckpointError, match="web page"):
        _download.fetch(server.url)
    assert names(cache) == []


@pytest.mark.parametrize("url", ["{address}/missing.pth", "http://127.0.0.1:9/weights.pth"])
def test_what_cannot_be_had_says_what_to_do_at_once(server, cache, monkeypatch, url):
    waits = []
    monkeypatch.setattr(_download.time, "sleep", waits.append)
    url = url.format(address=server.address)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded.*pretrained.*EFFVIT_CACHE") as caught:
        _download.fetch(url)
    assert str(cache / _download.cached_name(url)) in str(caught.value)
    assert waits == []  # nothing was tried again


def test_a_server_that_hangs_is_given_up(server, cache, monkeypatch):
    monkeypatch.setattr(_download, "_TIMEOUT", 0.1)
    monkeypatch.setattr(_download, "_DELAYS", (0.0,))
    release = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda handler: release.wait(5))
    with pytest.raises(CheckpointError, match="timed out"):
        _download.fetch(server.url)
    release.set()


def test_other_schemes_are_refused(cache):
    with pytest.raises(CheckpointError, match="only http"):
        _download.fetch("file:///etc/passwd")


def test_a_copy_made_by_hand_is_used(server, cache):
    cache.mkdir()
    (cache / _download.cached_name(server.url)).write_bytes(CONTENT)
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert server.requests == []
    assert ledger(cache)[server.url]["checked"] == "copied by hand"


def test_a_wrong_copy_is_replaced_where_a_hash_is_published(server, cache):
    cache.mkdir()
    (cache / _download.cached_name(server.url)).write_bytes(b"something else")
    assert _download.fetch(server.url, sha256=DIGEST).read_bytes() == CONTENT


def test_a_file_cut_short_in_the_cache_is_downloaded_again(server, cache, caplog):
    path = _download.fetch(server.url)
    path.write_bytes(CONTENT[:100])
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert "cut short or changed" in caplog.text
    assert len(server.requests) == 2


def test_a_file_that_was_only_moved_is_hashed_and_kept(server, cache):
    path = _download.fetch(server.url)
    os.utime(path, (1, 1))
    assert _download.fetch(server.url) == path
    assert len(server.requests) == 1
    assert ledger(cache)[server.url]["modified"] == path.stat().st_mtime_ns


def test_a_file_that_changed_upstream_is_told_from_the_recorded_one(server, cache):
    _download.fetch(server.url).unlink()
    server.files["/weights.pth"] = (b"changed", '"two"')
    with pytest.raises(CheckpointError, match=rf"on \d+-\d+-\d+ it was {DIGEST}.*not kept.*weights.lock.json"):
        _download.fetch(server.url)
    assert names(cache) == ["weights.lock.json"]
    digest = hashlib.sha256(b"changed").hexdigest()
    assert _download.fetch(server.url, sha256=digest).read_bytes() == b"changed"  # the published hash decides
    assert ledger(cache)[server.url]["sha256"] == digest


def test_a_damaged_ledger_stops_nothing(server, cache, caplog):
    path = _download.fetch(server.url)
    (cache / "weights.lock.json").write_text('{"http')
    assert _download.fetch(server.url) == path
    assert "taken as empty" in caplog.text
    assert ledger(cache)[server.url]["sha256"] == DIGEST


def test_a_full_disk_is_named_before_the_download(server, cache, monkeypatch):
    monkeypatch.setattr(_download.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match=r"disk of .*cache is full.*10240 bytes are needed, 100.*EFFVIT_CACHE"):
        _download.fetch(server.url)
    assert names(cache) == []


def test_a_disk_that_fills_up_is_not_left_full(server, cache, monkeypatch):
    def fill_up(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_download._Download, "_copy", fill_up)
    with pytest.raises(CheckpointError, match=r"disk of .*cache is full"):
        _download.fetch(server.url)
    assert names(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFVIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cache folder .*file cannot be used.*EFFVIT_CACHE"):
        _download.fetch(server.url)


def test_threads_that_want_the_same_file_download_it_once(server, cache):
    barrier, paths = threading.Barrier(4), []

    def work():
        barrier.wait()
        paths.append(_download.fetch(server.url))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(server.requests) == 1
    assert names(cache) == ["weights.lock.json", "weights.pth"]


def test_processes_wait_for_one_another_but_not_for_a_killed_one(server, cache, monkeypatch):
    """The first process is killed while it holds the lock and half a file; two more then want the file at once."""
    halfway, release = threading.Event(), threading.Event()
    served = Handler.do_GET

    def hang_once(handler):
        if not halfway.is_set():
            server.breaks = [1000]
            served(handler)
            handler.wfile.flush()
            halfway.set()
            release.wait(60)
        else:
            served(handler)

    monkeypatch.setattr(Handler, "do_GET", hang_once)
    first = subprocess.Popen([sys.executable, "-c", FETCH, server.url], env=os.environ)
    assert halfway.wait(60)
    others = [subprocess.Popen([sys.executable, "-c", FETCH, server.url], env=os.environ) for _ in range(2)]
    lock = cache / f"{_download.cached_name(server.url)}.lock"
    assert lock.exists()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [other.wait(60) for other in others] == [0, 0]
    release.set()
    assert (cache / _download.cached_name(server.url)).read_bytes() == CONTENT
    assert len(server.requests) == 2
    assert names(cache) == ["weights.lock.json", "weights.pth"]


def test_a_lock_that_is_removed_and_made_again_still_holds_one_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(60):
            with exclusive(tmp_path / "file.lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) == 360


def test_a_lock_file_left_behind_blocks_nobody(server, cache):
    cache.mkdir()
    (cache / f"{_download.cached_name(server.url)}.lock").touch()
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert names(cache) == ["weights.lock.json", "weights.pth"]


def test_a_file_system_without_locks_still_gets_the_file(server, cache, monkeypatch):
    import fcntl

    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert _download.fetch(server.url).read_bytes() == CONTENT
    assert names(cache) == ["weights.lock.json", "weights.pth"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_and_a_log_file_does_not(server, cache, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for kind in (Terminal, io.StringIO):
        shutil.rmtree(cache, ignore_errors=True)
        monkeypatch.setattr(sys, "stderr", kind())
        _download.fetch(server.url)
        shown = sys.stderr.getvalue()
        assert ("10.2/10.2 kB" in shown) == (kind is Terminal)
        assert ("weights.pth" in shown) == (kind is Terminal)


def test_pretrained_true_loads_the_published_file(server, cache, monkeypatch, randomise):
    published = randomise(create_backbone("efficientvit_m0"))
    file = io.BytesIO()
    torch.save({"model": published.state_dict()}, file)
    server.files["/efficientvit_m0.pth"] = (file.getvalue(), '"m0"')
    info = backbone_info("efficientvit_m0")
    monkeypatch.setattr(
        _factory,
        "fetch",
        lambda url, *, sha256: _download.fetch(f"{server.address}/{Path(url).name}", sha256=sha256),
    )
    ours = create_backbone("efficientvit_m0", pretrained=True)
    assert [path for path, _, _ in server.requests] == [f"/{info.name}.pth"]
    for key, value in published.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
