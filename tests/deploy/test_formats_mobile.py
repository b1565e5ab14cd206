"""Files for telephones: every family is written, and what can run here gives what its network gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effvit.backbones import outline
from effvit.deploy import _formats_mobile as mobile
from effvit.deploy._formats_source import Source
from effvit.deploy.export import export
from effvit.deploy.exported import metadata_of
from effvit.tasks import Classification, Segmentation

FAMILIES = (
    "efficientvit_m0",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "dynamicvit_tiny",
)


class Thinned(nn.Module):
    """Takes every second cell of a map in channels-last memory, as EfficientFormerV2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, images):
        return self.conv(images.contiguous(memory_format=torch.channels_last))[:, :, ::2, ::2] + 1


def test_a_layout_is_a_matter_of_torch_alone():
    images = torch.rand(1, 3, 4, 4)
    with mobile._Contiguous():
        assert images.contiguous(memory_format=torch.channels_last).is_contiguous()
        assert torch.equal(images.to(torch.float64, memory_format=torch.channels_last), images.double())
    assert not images.contiguous(memory_format=torch.channels_last).is_contiguous()


@pytest.mark.slow
def test_every_second_cell_of_a_map_in_channels_last_memory_in_executorch(tmp_path):
    pytest.importorskip("executorch")
    module, images = Thinned().eval(), torch.rand(1, 3, 6, 6)
    mobile.write_executorch(Source(module, (images,), ("images",), ("map",)), tmp_path / "a.pte", "{}")
    (found,) = mobile.open_executorch(tmp_path / "a.pte", None)([images])
    torch.testing.assert_close(found, module(images))


def classifier(backbone):
    return Classification(backbone, {1: "ant", 2: "bee"}).eval().deployable()


def segmenter(backbone):
    """With the head of the family's paper."""
    options = {"head": "deeplabv3"} if backbone.startswith("mobilevit") else {"pyramid_channels": 32}
    return Segmentation(backbone, {1: "ant", 2: "bee", 3: "wasp"}, **options).eval().deployable()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), [(classifier, (64, 64)), (segmenter, (64, 96))])
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_in_executorch(backbone, make, size, tmp_path):
    """Minutes each; at 64 pixels, since what takes long is the same at any size."""
    pytest.importorskip("executorch")
    done = export(make(backbone), "executorch", tmp_path / "a.pte", size=size, batch=1)
    assert done.parity.images == 1
    assert done.parity.error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_in_coreml(backbone, tmp_path):
    pytest.importorskip("coremltools")
    size = outline(backbone).input_spec.size
    path = tmp_path / "a.mlpackage"
    done = export(classifier(backbone), "coreml", path, size=size, batch=1, metadata={"checkpoint": "best.ckpt"})
    found = metadata_of(path)
    assert (found["backbone"], found["size"], found["checkpoint"]) == (backbone, list(size), "best.ckpt")
    assert found["categories"] == {"1": "ant", "2": "bee"}
    assert found["output_names"] == ["probabilities"]
    assert (done.parity is None) == (not mobile.on_macos())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES)
def test_segmenters_of_every_family_in_coreml(backbone, tmp_path):
    coremltools = pytest.importorskip("coremltools")
    done = export(segmenter(backbone), "coreml", tmp_path / "a.mlpackage", size=(64, 96), batch=1)
    spec = coremltools.utils.load_spec(str(tmp_path / "a.mlpackage"))
    assert [tuple(entry.type.multiArrayType.shape) for entry in spec.description.input] == [(1, 3, 64, 96), (1, 2)]
    assert [entry.name for entry in spec.description.output] == ["labels", "logits"]
    assert (done.parity is None) == (not mobile.on_macos())
