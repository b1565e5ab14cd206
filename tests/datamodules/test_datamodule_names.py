"""The room's public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import effvit.datamodules


@pytest.mark.parametrize("name", effvit.datamodules.__all__)
def test_names_load(name):
    assert getattr(effvit.datamodules, name).__name__ == name


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'CocoDetections'"):
        effvit.datamodules.CocoDetections  # noqa: B018


def test_the_room_itself_costs_nothing():
    code = "import sys, effvit.datamodules; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
