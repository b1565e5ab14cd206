"""The table of formats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from effvit.deploy import _installed
from effvit.deploy.formats import FORMATS, check_installed, check_writable, format_of
from effvit.errors import ConfigError


def test_every_extra_is_one_of_the_package():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1], re.MULTILINE))
    assert {entry.extra for entry in FORMATS.values() if entry.extra} <= extras
    assert list(FORMATS) == ["onnx", "openvino", "torchscript", "pt2", "coreml", "executorch"]


def test_a_file_tells_its_format_by_its_suffix():
    assert len({entry.suffix for entry in FORMATS.values()}) == len(FORMATS)


def test_what_needs_packages_says_which_extra_brings_them(monkeypatch):
    monkeypatch.setattr(_installed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs coremltools, not installed here: pip install "effvit\[coreml\]"'):
        check_writable(format_of("coreml"))
    with pytest.raises(ConfigError, match="needs onnxruntime,"):
        check_installed(FORMATS["onnx"], FORMATS["onnx"].readers)
    check_writable(FORMATS["torchscript"])


def test_pt2_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(_installed.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"install g\+\+"):
        check_writable(FORMATS["pt2"])


def test_an_unknown_format_is_answered_with_a_close_one():
    with pytest.raises(ConfigError, match="Did you mean 'onnx'"):
        format_of("onx")
