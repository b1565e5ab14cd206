"""What a segmentation task gives for export: from pixels to labels, with the digits of `Segmentation.segment`."""

from __future__ import annotations

import json

import pytest
import torch

from effvit.errors import ExportError
from effvit.tasks import Segmentation
from effvit.tasks.deployed_segmenter import DeployedSegmenter, unpack_masks

SIZES = [(96, 128), (80, 100)]
FILES = [(96, 128), (61, 75)]


@pytest.fixture(scope="module", params=["semantic_fpn", "deeplabv3"])
def task(request):
    torch.manual_seed(0)
    categories = {number: f"class {number}" for number in (0, 3, 4, 9)}
    found = Segmentation("efficientvit_m0", categories, head=request.param, pyramid_channels=16, head_channels=16)
    return found.eval()


@pytest.fixture(scope="module")
def view(task):
    return DeployedSegmenter(
        task.segmenter, task.categories, task.mean, task.std, {"backbone": "efficientvit_m0"}
    ).eval()


@pytest.fixture(scope="module")
def images(view):
    """Two images, the second of which is padded with what must not matter."""
    return view.example_inputs(2, SIZES[0])[0]


@torch.no_grad()
def test_labels_are_those_of_the_task(task, view, images):
    outputs = view(images, torch.tensor(SIZES))
    targets = [{"size": size, "original_size": file} for size, file in zip(SIZES, FILES, strict=True)]
    wanted = task.segment((images, targets))
    found = view.unpack(outputs, FILES, SIZES)
    assert [one["mask"].shape for one in found] == [torch.Size(file) for file in FILES]
    assert len(wanted[0].unique()) > 1
    assert all(torch.equal(one["mask"], other) for one, other in zip(found, wanted, strict=True))
    labels, logits = outputs
    assert torch.equal(labels[0], wanted[0].long())  # as large as its file
    assert labels.shape == (2, *SIZES[0])
    assert logits.shape[:2] == (2, 4)


@torch.no_grad()
def test_what_lies_in_the_padding_does_not_matter(view, images):
    other = images.clone()
    other[1, :, 80:] = 255
    other[1, :, :, 100:] = 7
    for found, same in zip(view(images, torch.tensor(SIZES)), view(other, torch.tensor(SIZES)), strict=True):
        assert torch.equal(found, same)
    whole = view(images, torch.tensor([SIZES[0]] * 2))
    assert not torch.equal(whole[1][1], view(images, torch.tensor(SIZES))[1][1])


@torch.no_grad()
def test_images_without_padding_need_no_sizes(view, images):
    outputs = view(images, torch.tensor([SIZES[0]] * 2))
    found = view.unpack(outputs, FILES)
    align = view.metadata()["align_corners"]
    same = unpack_masks(outputs, [SIZES[0]] * 2, FILES, align_corners=align)
    assert all(torch.equal(one["mask"], other["mask"]) for one, other in zip(found, same, strict=True))
    with pytest.raises(ExportError, match="pass original_sizes"):
        view.unpack(outputs)


def test_metadata_says_what_the_network_is(view, task):
    metadata = json.loads(json.dumps(view.metadata()))
    assert metadata["task"] == "segmentation"
    assert metadata["backbone"] == "efficientvit_m0"
    assert metadata["categories"] == {"0": "class 0", "3": "class 3", "4": "class 4", "9": "class 9"}
    assert metadata["parameters"] == sum(parameter.numel() for parameter in task.segmenter.parameters())
    assert (metadata["input_names"], metadata["output_names"]) == (["images", "sizes"], ["labels", "logits"])
    modules = dict(view.named_modules())
    assert set(view.parts) >= {"backbone", "heads"}
    assert all(name in modules for names in view.parts.values() for name in names)


@pytest.mark.slow
def test_the_graph_is_of_any_batch(view):
    """The same labels for a batch of another size than the recorded one."""
    inputs = view.example_inputs(2, (64, 64))
    with torch.no_grad():
        view(*inputs)
        batch = torch.export.Dim("batch")
        graph = torch.export.export(view, inputs, dynamic_shapes=({0: batch}, {0: batch}), strict=False).module()
        others = view.example_inputs(3, (64, 64))
        for found, wanted in zip(graph(*others), view(*others), strict=True):
            torch.testing.assert_close(found, wanted)
