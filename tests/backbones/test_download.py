"""Downloads, from a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import threading

import pytest
import torch

from effvit.backbones import _download, _factory, backbone_info, create_backbone
from effvit.errors import CheckpointError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path):
    """Serves a folder; ``requests`` counts what was asked, ``short`` breaks off in the middle."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if server.short else content)

        def log_message(self, *arguments):
            pass

    folder = tmp_path / "published"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.short, server.folder = [], False, folder
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_downloads_once_and_checks_the_hash(server, cache):
    (server.folder / "weights.pth").write_bytes(b"weights")
    url = f"{server.address}/weights.pth"
    digest = hashlib.sha256(b"weights").hexdigest()
    first = _download.fetch(url, sha256=digest)
    assert first.read_bytes() == b"weights"
    assert _download.fetch(url, sha256=digest) == first
    assert server.requests == ["/weights.pth"]
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_wrong_hash_is_not_kept(server, cache):
    (server.folder / "weights.pth").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="SHA-256"):
        _download.fetch(f"{server.address}/weights.pth", sha256="0" * 64)
    assert list(cache.iterdir()) == []


def test_connection_that_ends_early_is_not_kept(server, cache):
    (server.folder / "weights.pth").write_bytes(bytes(1000))
    server.short = True
    with pytest.raises(CheckpointError, match=r"500 of 1000 bytes|cannot be downloaded"):
        _download.fetch(f"{server.address}/weights.pth")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("url", ["{address}/missing.pth", "http://127.0.0.1:9/weights.pth"])
def test_unreachable_file_says_what_to_do(server, cache, url):
    with pytest.raises(CheckpointError, match=r"cannot be downloaded.*pretrained.*EFFVIT_CACHE"):
        _download.fetch(url.format(address=server.address))


def test_other_schemes_are_refused(cache):
    with pytest.raises(CheckpointError, match="only http"):
        _download.fetch("file:///etc/passwd")


def test_pretrained_true_loads_the_published_file(server, cache, monkeypatch, randomise):
    published = randomise(create_backbone("efficientvit_m0"))
    torch.save({"model": published.state_dict()}, server.folder / "efficientvit_m0.pth")
    info = backbone_info("efficientvit_m0")
    monkeypatch.setattr(
        _factory,
        "fetch",
        lambda url, *, sha256: _download.fetch(f"{server.address}/{url.rsplit('/', 1)[1]}", sha256=sha256),
    )
    ours = create_backbone("efficientvit_m0", pretrained=True)
    assert server.requests == [f"/{info.name}.pth"]
    for key, value in published.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
