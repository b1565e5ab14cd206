"""Files that a user may give as a run's checkpoint or as a published detector."""

from __future__ import annotations

import pytest
import torch

from effvit.errors import CheckpointError
from effvit.tasks import _checkpoint
from effvit.tasks._checkpoint import read_run
from effvit.tasks.detectors._cvnets_checkpoint import is_cvnets
from effvit.tasks.detectors._mmdet_checkpoint import is_mmdet

ONE = torch.ones(1)


def read_published(path):
    return _checkpoint.read_published(path, lambda state: is_mmdet(state) or is_cvnets(state))


@pytest.mark.parametrize(
    "content",
    [
        {0: ONE},
        {"state_dict": {"bbox_head.x": "text", 3: ONE}},
        {"state_dict": [ONE]},
        {"state_dict": {3: ONE}, "hyper_parameters": {}},
        {"state_dict": {"layer.weight": "text"}, "hyper_parameters": {}},
        {"state_dict": {"layer.weight": ONE}, "hyper_parameters": 3},
        [ONE],
        ONE,
    ],
)
def test_a_file_of_something_else_is_called_no_run(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    assert read_published(tmp_path / "x.pth") is None
    with pytest.raises(CheckpointError, match=r"x\.pth is not a checkpoint of a run"):
        read_run(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["bbox_head.retina_cls.bias", "ssd_heads.0.proj_layer.block.norm.bias"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_only_the_tensors_of_a_published_detector_are_kept(name, wrapped, tmp_path):
    state = {3: ONE, name: ONE, "bbox_head.note": "text"}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "x.pth")
    assert read_published(tmp_path / "x.pth") == {name: ONE}


def test_a_run_is_no_published_detector(tmp_path):
    run = {"state_dict": {"detector.bbox_head.bias": ONE}, "hyper_parameters": {"backbone": "efficientvit_m0"}}
    torch.save(run, tmp_path / "x.ckpt")
    assert read_published(tmp_path / "x.ckpt") is None
    assert read_published(None) is None
    assert read_run(tmp_path / "x.ckpt") == run
