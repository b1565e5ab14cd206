"""Writing a network to a file: what is refused, what is left behind, what travels along."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import cv2
import pytest
import torch
from torch import nn

from effvit._cli.subjects import see_things
from effvit.backbones._cvnets_patches import even, resize
from effvit.backbones._windows import AttentionBias, cut, merge
from effvit.deploy import _formats_onnx
from effvit.deploy import export as module_under_test
from effvit.deploy._formats_source import Source
from effvit.deploy.export import check_export, export
from effvit.deploy.exported import metadata_of, open_exported
from effvit.deploy.formats import FORMATS
from effvit.errors import ConfigError, ExportError
from effvit.tasks import Classification, Detection
from effvit.tasks._task import normalise
from effvit.tasks.detectors.roi_pooling import RoIPooling

SIZE = (32, 64)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_written(module, done, batches):
    """A written file gives what its source gives, and says what it takes."""
    opened = open_exported(done.path, threads=1)
    assert (opened.format, opened.size, opened.batch) == (done.format, SIZE, done.metadata["batch"])
    assert opened.metadata["source"] == "best.ckpt"
    assert opened.metadata["categories"] == {"1": "ant", "2": "bee"}
    assert (opened.input_names, opened.output_names) == (module.input_names, module.output_names)
    for batch in batches:
        inputs = module.example_inputs(batch, SIZE)
        with torch.no_grad():
            expected = module(*inputs)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        for found, wanted in zip(opened.run(*inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    return opened


@pytest.mark.parametrize(
    ("name", "kind", "batch"),
    [
        *itertools.product(["torchscript", "onnx"], ["classifier", "detector"], [1, 2]),
        ("openvino", "detector", 2),
        ("openvino", "segmenter", 2),
    ],
)
def test_a_file_for_one_batch_size(name, kind, batch, stand_ins, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    module = getattr(stand_ins, kind)()
    path = tmp_path / "new" / f"model{FORMATS[name].suffix}"
    done = export(module, name, path, size=SIZE, batch=batch, metadata={"source": "best.ckpt"})
    opened = check_written(module, done, [batch])
    assert done.parity.images == batch
    assert opened.metadata["parity"] == done.parity.as_dict()
    assert {file.suffix for file in path.parent.iterdir()} == {path.suffix, *([".bin"] if name == "openvino" else [])}
    with pytest.raises(ConfigError, match="images must have the shape"):
        opened.run(*module.example_inputs(batch + 1, SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "detector", "segmenter"])
@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
def test_a_file_for_any_batch_size(name, kind, stand_ins, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    module = getattr(stand_ins, kind)()
    path = tmp_path / f"model{FORMATS[name].suffix}"
    done = export(module, name, path, size=SIZE, metadata={"source": "best.ckpt"})
    assert done.metadata["batch"] is None
    assert done.parity.images == 4
    check_written(module, done, [1, 2, 5])


def test_a_format_whose_graph_is_of_one_batch_is_written_for_one_image(stand_ins, tmp_path):
    done = export(stand_ins.classifier(), "torchscript", tmp_path / "a.torchscript", size=SIZE)
    assert done.metadata["batch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("onnx", "detector"),
        ("openvino", "detector"),
        ("openvino", "segmenter"),
        ("pt2", "classifier"),
        ("pt2", "segmenter"),
    ],
)
def test_a_file_for_images_of_any_size(name, kind, stand_ins, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    module = getattr(stand_ins, kind)()
    done = export(module, name, tmp_path / f"model{FORMATS[name].suffix}", size=None)
    opened = open_exported(done.path, threads=1)
    assert (opened.size, opened.sides, opened.batch) == (None, range(32, 321, 32), None)
    for batch, size in ((1, (320, 32)), (2, (64, 64)), (3, (32, 96))):
        inputs = module.example_inputs(batch, size)
        expected = module(*inputs)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        for found, wanted in zip(opened.run(*inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for size in ((64, 48), (352, 64)):
        with pytest.raises(ConfigError, match=r"multiples of 32 from 32 to 320 pixels, not .*: pad them"):
            opened.run(*module.example_inputs(1, size))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([(64, 64), (64, 64)], [(64, 64), (96, 128)]),
        ([(128, 96), (128, 96)], [(128, 96), (96, 32)]),
        ([(64, 64), (64, 96)], [(64, 64), (64, 96)]),
    ],
)
def test_images_of_any_size_are_compared_at_two_sizes(images, expected):
    samples = [(torch.ones(1, 3, *size), torch.tensor([list(size)])) for size in images]
    batches = module_under_test._of_sizes(module_under_test._batches(samples, 1), range(32, 129, 32))
    found = [tuple(batch[0].shape[2:]) for batch in batches]
    assert list(dict.fromkeys(found)) == expected
    assert all(len(batch) == 2 for batch in batches)


def test_images_of_several_sizes_are_padded_to_one_batch():
    samples = [(torch.ones(1, 3, *size),) for size in ((64, 32), (32, 96))]
    ((images,),) = module_under_test._batches(samples, 2)
    assert images.shape == (2, 3, 64, 96)
    assert images[0].sum() == 3 * 64 * 32
    assert images[1, :, :32, :96].sum() == images[1].sum() == 3 * 32 * 96


def test_any_size_is_refused_before_any_work(stand_ins, tmp_path):
    module = stand_ins.detector()
    module.forward = None  # whoever ran it would fail
    with pytest.raises(ExportError, match="torchscript for detection takes images of one size; onnx and openvino can"):
        export(module, "torchscript", tmp_path / "a.torchscript", size=None)
    module.open_sides = None
    with pytest.raises(ExportError, match=r"Detector can only be exported for images of one size.* --image_size 256"):
        export(module, "onnx", tmp_path / "a.onnx", size=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_executorch(stand_ins, tmp_path):
    pytest.importorskip("executorch")
    module = stand_ins.classifier()
    done = export(module, "executorch", tmp_path / "a.pte", size=SIZE, metadata={"source": "best.ckpt"})
    check_written(module, done, [1])


@pytest.mark.slow
def test_coreml_is_written_everywhere_and_runs_on_macos(stand_ins, tmp_path):
    pytest.importorskip("coremltools")
    path = tmp_path / "a.mlpackage"
    for source in ("first.ckpt", "best.ckpt"):  # the second replaces a folder
        done = export(stand_ins.classifier(), "coreml", path, size=SIZE, metadata={"source": source})
    assert metadata_of(path)["source"] == "best.ckpt"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mlpackage"]
    if FORMATS["coreml"].runs_here():
        assert done.parity.images == 1
    else:
        assert done.parity is None
        with pytest.raises(ConfigError, match="runs on macOS only"):
            open_exported(path)


def test_the_network_stays_as_it_is(stand_ins, tmp_path):
    module = stand_ins.classifier().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in module.state_dict().items()}
    export(module, "torchscript", tmp_path / "a.torchscript", size=SIZE)
    assert module.training
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == strides[name]


def test_real_images_are_compared_in_batches_of_the_file(stand_ins, tmp_path, monkeypatch):
    seen = []
    compare = module_under_test.parity

    def record(module, exported, batches):
        seen.extend(len(batch[0]) for batch in batches)
        return compare(module, exported, batches)

    monkeypatch.setattr(module_under_test, "parity", record)
    module = stand_ins.classifier()
    samples = [(torch.full((1, 3, *SIZE), shade, dtype=torch.uint8),) for shade in range(0, 250, 50)]
    done = export(module, "torchscript", tmp_path / "a.torchscript", size=SIZE, batch=2, samples=samples)
    assert seen == [2, 2, 2]
    assert done.parity.images == 5  # the one that fills up the last batch is known


@pytest.mark.parametrize(("number", "expected"), [(1, [1, 3]), (4, [1, 3]), (5, [1, 3, 1]), (9, [1, 3, 1, 3, 1])])
def test_any_batch_is_checked_with_others_than_the_traced_one(number, expected):
    samples = [(torch.full((1, 1, 1, 1), index),) for index in range(number)]
    batches = module_under_test._batches(samples, None)
    assert [len(batch[0]) for batch in batches] == expected
    flat = [int(value) for batch in batches for value in batch[0]]
    assert flat == [index for index, _ in zip(itertools.cycle(range(number)), flat, strict=False)]


@pytest.fixture
def replaced(monkeypatch):
    """``replaced(name, **changes)`` changes one row of the table."""

    def change(name, **changes):
        monkeypatch.setitem(FORMATS, name, dataclasses.replace(FORMATS[name], **changes))

    return change


class Other(nn.Module):
    """Another function than its source."""

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, *inputs):
        return self.source(*inputs) * 0.9


def test_a_file_that_disagrees_is_not_kept(stand_ins, tmp_path, replaced):
    path = tmp_path / "a.torchscript"
    export(stand_ins.classifier(), "torchscript", path, size=SIZE)
    before = content(tmp_path)
    write = FORMATS["torchscript"].write

    def wrong(source, path, text):
        write(dataclasses.replace(source, module=Other(source.module)), path, text)

    replaced("torchscript", write=wrong)
    with pytest.raises(ExportError, match="torchscript disagrees with its source: probabilities differs by"):
        export(stand_ins.classifier(), "torchscript", path, size=SIZE)
    assert content(tmp_path) == before  # the older file as it was, and nothing beside it
    with pytest.raises(ExportError):
        export(stand_ins.classifier(), "torchscript", tmp_path / "b.torchscript", size=SIZE)
    assert content(tmp_path) == before


@pytest.mark.parametrize("step", ["write", "open"])
def test_what_a_converter_or_runtime_cannot_do_leaves_nothing(step, stand_ins, tmp_path, replaced):
    def fails(*given):
        (tmp_path / "seen").touch()
        raise RuntimeError("Unsupported operator\nand a long story")

    replaced("torchscript", **{step: fails})
    with pytest.raises(ExportError, match=r"Classifier cannot be converted for torchscript.*Unsupported operator"):
        export(stand_ins.classifier(), "torchscript", tmp_path / "a.torchscript", size=SIZE)
    assert list(content(tmp_path)) == ["seen"]


def test_files_that_belong_together_change_together(tmp_path, monkeypatch):
    for name in ("a.bin", "a.xml"):
        (tmp_path / name).write_text("old")
    rename = Path.rename

    def fails(path, target):
        if path.name == "a.xml" and path.read_text() == "new":
            raise OSError("disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    before = content(tmp_path)

    def write():
        with module_under_test._staged(tmp_path / "a.xml") as staged:
            staged.write_text("new")
            staged.with_suffix(".bin").write_text("new")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert content(tmp_path) == before


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path):
    left, running, other = (tmp_path / name for name in (".a.pt.export-1", ".a.pt.export-2", ".b.pt.export-1"))
    for folder in (left, running, other):
        folder.mkdir()
        (folder / "half").touch()
    for folder in (left, other):
        os.utime(folder, (0, 0))
    with module_under_test._staged(tmp_path / "a.pt") as staged:
        staged.touch()
    assert sorted(content.name for content in tmp_path.iterdir()) == [running.name, other.name, "a.pt"]


@pytest.mark.parametrize(
    ("task", "name", "path", "batch", "error", "words"),
    [
        ("detection", "coreml", None, None, ExportError, "cannot hold a network for detection; .* onnx, openvino"),
        ("detection", "executorch", None, None, ExportError, "cannot hold a network for detection"),
        ("classification", "onxx", None, None, ConfigError, "Did you mean 'onnx'"),
        ("classification", "torchscript", "model.onnx", None, ConfigError, "must end in .torchscript"),
        ("classification", "torchscript", "model.torchscript", 0, ConfigError, "batch must be at least 1"),
    ],
)
def test_refused_before_any_work(task, name, path, batch, error, words):
    with pytest.raises(error, match=words):
        check_export(task, name, path, batch=batch)


def test_export_refuses_before_it_touches_the_network(stand_ins, tmp_path):
    module = stand_ins.detector()
    module.forward = None  # whoever ran it would fail
    with pytest.raises(ExportError, match="cannot hold a network for detection"):
        export(module, "coreml", tmp_path / "a.mlpackage", size=SIZE)
    assert not list(tmp_path.iterdir())


class Rounded(nn.Module):
    """What MobileViT does to a map of odd sides, and EfficientViT to one that windows do not fill."""

    def forward(self, grid):
        resized = resize(grid.permute(0, 3, 1, 2), even(grid.shape[1]), even(grid.shape[2]), align_corners=False)
        return resized, merge(cut(grid, 7), grid, 7)


def test_sides_are_rounded_up_in_a_traced_onnx_file(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    grid = torch.rand(1, 9, 11, 2)
    path = tmp_path / "a.onnx"
    _formats_onnx.write_onnx(Source(Rounded(), (grid,), ("grid",), ("resized", "merged")), path, "{}")
    resized, merged = _formats_onnx.open_onnx(path, 1)([grid])
    assert resized.shape == (1, 2, 10, 12)
    torch.testing.assert_close(merged, grid)


class Pooled(nn.Module):
    """What Faster and Mask R-CNN pool of two levels."""

    def forward(self, boxes, fine, coarse):
        return RoIPooling((4, 8)).by_selection([fine, coarse], boxes, 3)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_regions_are_pooled_from_their_own_level_alone(name, tmp_path):
    """OpenVINO's RoIAlign takes a sample of a region that is a point, where torch's and ONNX Runtime's give zeros."""
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    generator = torch.Generator().manual_seed(0)
    small, large, empty = (2.0, 3.0, 20.0, 31.0), (0.0, 5.0, 120.0, 126.0), (0.0, 0.0, 0.0, 0.0)
    boxes = torch.tensor([[small, large, empty], [large, small, small]])
    maps = [torch.randn(2, 4, side, side, generator=generator) + 5 for side in (32, 16)]
    inputs = (boxes, *maps)
    path = tmp_path / f"a{FORMATS[name].suffix}"
    FORMATS[name].write(Source(Pooled(), inputs, ("boxes", "fine", "coarse"), ("pooled",)), path, "{}")
    (found,) = FORMATS[name].open(path, 1)(inputs)
    solid = [0, 1, 3, 4, 5]  # nothing is read of the empty one
    torch.testing.assert_close(found[solid], Pooled()(*inputs)[solid])


_FAMILIES = (
    "efficientvit_m0",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "dynamicvit_tiny",
)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("backbone", _FAMILIES)
@pytest.mark.parametrize("name", ["onnx", "openvino", "torchscript"])
def test_classifiers_of_every_family(name, backbone, real_data, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    module = Classification(backbone, {1: "ant", 2: "bee"}).eval().deployable()
    samples = [(image,) for image, _ in photographs(real_data, (224, 224))]
    done = export(module, name, tmp_path / f"a{FORMATS[name].suffix}", size=(224, 224), batch=1, samples=samples)
    assert done.parity.top1 == 1.0
    assert done.parity.error < 1e-5


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        ("retinanet", "efficientvit_m0"),
        ("retinanet", "efficientformer_l1"),
        ("faster_rcnn", "mobilevitv2_050"),
        ("mask_rcnn", "efficientvit_m0"),
        ("ssdlite", "mobilevit_xxs"),
    ],
)
@pytest.mark.parametrize("name", ["onnx", "openvino", "torchscript"])
def test_detectors(name, detector, backbone, real_data, tmp_path):
    """Of random weights, whose hundred best of many near-equal boxes are harder to agree on than trained ones."""
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    size = (160, 224)
    model = Detection(backbone, {1: "ant", 2: "bee"}, detector=detector, pyramid_channels=32, score_threshold=0.004)
    samples = [
        (image, torch.tensor([[144, size[1]]]), torch.tensor([original]))
        for image, original in photographs(real_data, size)
    ]
    for image, _, _ in samples:
        image[:, :, 144:] = 0
    module = model.eval().deployable()
    done = export(module, name, tmp_path / f"a{FORMATS[name].suffix}", size=size, batch=2, samples=samples)
    assert done.parity.images == 4
    assert done.parity.detections > 100
    assert done.parity.unmatched <= 0.01 * done.parity.detections


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        ("retinanet", "efficientformer_l1"),
        ("faster_rcnn", "efficientformerv2_s0"),
        ("mask_rcnn", "mobilevitv2_050"),
        ("ssdlite", "mobilevit_xxs"),
    ],
)
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_detectors_of_any_number_of_images_of_any_size(name, detector, backbone, real_data, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    torch.manual_seed(0)
    channels = {} if detector == "ssdlite" else {"pyramid_channels": 32}
    model = Detection(backbone, {1: "ant", 2: "bee"}, detector=detector, score_threshold=0.004, **channels)
    # As they start, scores are equal to seven digits, their order chance.
    photos = torch.cat([image for image, _ in photographs(real_data, (160, 224))])
    see_things(model, normalise(photos, model.mean, model.std))
    if detector == "mask_rcnn":  # its scores of photographs lie within 1e-5 of 1, and 1 is what float32 makes of many
        with torch.no_grad():
            model.detector.roi_heads.box_predictor.cls_score.weight.mul_(0.25)
    samples = []
    for number, own in enumerate([(160, 224), (192, 256)]):
        for image, original in photographs(real_data, own)[2 * number : 2 * number + 2]:
            image[:, :, 144:] = 0
            samples.append((image, torch.tensor([[144, own[1]]]), torch.tensor([original])))
    done = export(model.eval().deployable(), name, tmp_path / f"a{FORMATS[name].suffix}", size=None, samples=samples)
    assert (done.metadata["size"], done.metadata["batch"], done.parity.images) == (None, None, 4)
    assert done.parity.detections > 100


class Biased(nn.Module):
    """The bias of the attention in a map of stride 32."""

    def __init__(self, stride, stretched):
        super().__init__()
        self.bias = AttentionBias(stride, stretched=stretched)
        self.table = nn.Parameter(torch.randn(2, 49, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return self.bias(self.table, images.shape[2] // 32, images.shape[3] // 32)


@pytest.mark.slow
@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_biases_of_attention_are_made_for_any_size(stride, stretched, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    module, path = Biased(stride, stretched).eval(), tmp_path / "a.onnx"
    images = torch.zeros(1, 3, 288, 224)
    source = Source(module, (images,), ("images",), ("bias",), open_sides=range(64, 1025, 32))
    _formats_onnx.write_onnx(source, path, "{}")
    run = _formats_onnx.open_onnx(path, 1)
    for size in ((224, 224), (64, 320)):  # the table's own, and another
        images = torch.zeros(1, 3, *size)
        torch.testing.assert_close(run([images])[0], module(images), atol=1e-4, rtol=1e-4)


def photographs(real_data, size):
    """Four photographs ``(1, 3, H, W)``, stretched to `size`, with their original height and width."""
    found = []
    for path in sorted((real_data / "ants_bees").rglob("*.jpg"))[:4]:
        pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        resized = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
        found.append((torch.from_numpy(resized).permute(2, 0, 1)[None].contiguous(), pixels.shape[:2]))
    return found
