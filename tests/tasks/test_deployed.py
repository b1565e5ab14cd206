"""What a task gives for export has the digits of what the task itself says."""

import json

import cv2
import pytest
import torch
from torch import nn

from effvit.errors import ExportError
from effvit.tasks import Classification, Detection
from effvit.tasks.detectors.factory import DETECTORS

CLASSES = {1: "disc", 3: "bar", 90: "ring"}
SIZES, ORIGINALS = [(64, 96), (50, 61)], [(128, 192), (75, 92)]
STRENGTH = {"retinanet": 0.3, "faster_rcnn": 10.0, "mask_rcnn": 10.0, "ssdlite": 100.0}  # of the class logits
SMALL = {"pyramid_channels": 16, "head_convs": 1, "head_channels": 32, "roi_samples": 32}


@torch.no_grad()
def make(detector, **options):
    """A detector that finds much in noise, at scores and places of all kinds."""
    torch.manual_seed(0)
    task = Detection("efficientvit_m0", CLASSES, detector=detector, **SMALL, **options).eval()
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in task.detector.named_parameters():
        if name.startswith((*task.detector.class_parameters, "rpn.head.cls_logits")):
            parameter.normal_(std=STRENGTH[detector]) if parameter.dim() > 1 else parameter.zero_()
        elif any(part in name for part in ("bbox_pred.weight", "bbox_reg.weight", ".boxes.weight")):
            parameter.normal_(std=0.1)
    return task


def batch(sizes=SIZES, originals=ORIGINALS, padding=0):
    images = torch.randint(0, 256, (len(sizes), 3, 64, 96), generator=torch.Generator().manual_seed(1))
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, height:] = padding
        image[:, :, width:] = padding
    return images.to(torch.uint8), torch.tensor(sizes), torch.tensor(originals)


def detect(task, images, sizes, originals):
    targets = [
        {"size": tuple(size), "original_size": tuple(original)}
        for size, original in zip(sizes.tolist(), originals.tolist(), strict=True)
    ]
    with torch.no_grad():
        return task.detect((images, targets))


def run(task, *arrays):
    view = task.deployable()
    with torch.no_grad():
        outputs = view(*arrays)
    return outputs, view.unpack(outputs, arrays[2].tolist())


def assert_same(found, expected):
    assert len(found) == len(expected)
    for own, wanted in zip(found, expected, strict=True):
        assert own.keys() == wanted.keys()
        assert torch.equal(own["labels"], wanted["labels"])
        torch.testing.assert_close(own["boxes"], wanted["boxes"], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(own["scores"], wanted["scores"], atol=1e-6, rtol=1e-5)
        assert own.get("rles") == wanted.get("rles")


@pytest.mark.parametrize("most", [20, 400])
@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_detections_are_those_of_the_task(detector, most):
    task = make(detector, score_threshold=0.3, detections_per_image=most)
    arrays = batch()
    expected = detect(task, *arrays)
    outputs, found = run(task, *arrays)
    assert_same(found, expected)
    counts = [len(own["boxes"]) for own in expected]
    assert counts == [20, 20] if most == 20 else all(20 < count < 400 for count in counts)
    shapes = [(2, most, 4), (2, most), (2, most)] + [(2, most, 28, 28)] * (detector == "mask_rcnn")
    assert [tuple(values.shape) for values in outputs] == shapes
    assert [values.dtype for values in outputs[:3]] == [torch.float32, torch.float32, torch.int64]
    for values, filler in zip(outputs, (0, 0, -1, 0), strict=False):
        assert all((own[count:] == filler).all() for own, count in zip(values, counts, strict=True))


@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_an_image_without_detections(detector):
    task = make(detector, score_threshold=1.0, detections_per_image=5)
    outputs, found = run(task, *batch())
    assert_same(found, detect(task, *batch()))
    assert [len(own["boxes"]) for own in found] == [0, 0]
    assert (outputs[2] == -1).all()


@pytest.fixture(scope="module")
def retinanet():
    return make("retinanet", score_threshold=0.3)


def test_pixels_may_be_floats_and_the_padding_anything(retinanet):
    images, sizes, originals = batch()
    wanted, _ = run(retinanet, images, sizes, originals)
    floats = images.to(torch.float32)
    kept = floats.clone()
    for given in (floats, batch(padding=255)[0]):
        found, _ = run(retinanet, given, sizes, originals)
        assert all(torch.equal(own, same) for own, same in zip(found, wanted, strict=True))
    assert torch.equal(floats, kept)
    assert wanted[2].max() >= 0


def classifier():
    torch.manual_seed(0)
    return Classification("efficientvit_m0", CLASSES, backbone_options=None).eval()


@pytest.mark.parametrize("make_task", [lambda: make("mask_rcnn"), classifier], ids=["detector", "classifier"])
def test_a_view_shares_the_weights_and_changes_nothing(make_task):
    task = make_task().train()
    modes = [module.training for module in task.modules()]
    names = set(task.state_dict())
    view = task.deployable()
    assert [module.training for module in task.modules()] == modes
    assert set(task.state_dict()) == names
    assert task not in set(view.modules())
    assert {id(parameter) for parameter in view.parameters()} == {
        id(parameter) for name, parameter in task.named_parameters() if not name.startswith(("objective", "evaluator"))
    }
    assert any(parameter.requires_grad for parameter in view.parameters())


@pytest.mark.parametrize("make_task", [lambda: make("retinanet"), classifier], ids=["detector", "classifier"])
def test_constants_lie_with_the_weights_in_float32(make_task):
    task = make_task().to(torch.bfloat16)
    expected = task.deployable()
    torch.set_default_dtype(torch.bfloat16)  # as the Trainer does in bf16-true
    try:
        found = task.deployable()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("scale", "shift"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.equal(getattr(found, name), getattr(expected, name))
    view = task.to("meta").deployable()
    assert {tensor.device.type for tensor in (*view.parameters(), *view.buffers())} == {"meta"}


@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_every_part_is_called(detector):
    view = make(detector).deployable()
    called = set()
    for name, module in view.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: called.add(name))
    with torch.no_grad():
        view(*view.example_inputs(1, (64, 64)))
    assert {"backbone", "pyramid", "heads"} <= view.parts.keys()
    for names in view.parts.values():
        for name in names:
            assert any(own == name or own.startswith(f"{name}.") for own in called), name
            assert view.get_submodule(name) is not None


def test_the_metadata_of_a_detector(retinanet):
    said = json.loads(json.dumps(retinanet.deployable().metadata()))
    assert said["task"] == "detection"
    assert said["detector"] == "retinanet"
    assert said["backbone"] == "efficientvit_m0"
    assert list(said["categories"].items()) == [("1", "disc"), ("3", "bar"), ("90", "ring")]
    assert (said["score_threshold"], said["nms_threshold"], said["detections_per_image"]) == (0.3, 0.5, 100)
    assert said["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert said["parameters"] == sum(parameter.numel() for parameter in retinanet.detector.parameters())
    assert said["input_names"] == ["images", "sizes", "original_sizes"]
    assert said["output_names"] == ["boxes", "scores", "labels"]


def test_example_inputs_are_a_batch_of_whole_images(retinanet):
    images, sizes, originals = retinanet.deployable().example_inputs(2, (64, 96))
    assert images.shape == (2, 3, 64, 96)
    assert images.dtype == torch.uint8
    assert sizes.tolist() == originals.tolist() == [[64, 96]] * 2


def test_masks_need_the_size_of_their_image():
    view = make("mask_rcnn").deployable()
    with torch.no_grad():
        outputs = view(*batch())
    with pytest.raises(ExportError, match="original_sizes"):
        view.unpack(outputs)


def test_mmdetections_detectors_are_left_to_its_tools():
    task = make("retinanet")
    task.hparams["detector"] = "mmdet"
    with pytest.raises(ExportError, match="mmdeploy"):
        task.deployable()


def test_probabilities_are_those_of_the_task():
    task = classifier()
    view = task.deployable()
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    with torch.no_grad():
        expected = task.predict_step((images, {}), 0)
        for given in (images, images.to(torch.float32)):
            found = view(given)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found.shape == (2, 3)
    assert torch.equal(view.unpack([found])[1]["probabilities"], found[1])
    assert view.metadata()["task"] == "classification"
    assert view.example_inputs(3, (64, 32))[0].shape == (3, 3, 64, 32)


@pytest.mark.realdata
@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_detections_in_real_images_are_those_of_the_task(detector, real_data):
    paths = sorted((real_data / "coco_tiny" / "val2017").glob("*.jpg"))[:2]
    assert paths
    task = make(detector, score_threshold=0.3)
    images = torch.zeros(len(paths), 3, 96, 96, dtype=torch.uint8)
    sizes, originals = [], []
    for image, path in zip(images, paths, strict=True):
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        originals.append(pixels.shape[:2])
        scale = 96 / max(originals[-1])
        sizes.append(tuple(max(1, int(side * scale)) for side in originals[-1]))
        resized = torch.from_numpy(cv2.resize(pixels, sizes[-1][::-1]))
        image[:, : sizes[-1][0], : sizes[-1][1]] = resized.permute(2, 0, 1)
    arrays = (images, torch.tensor(sizes), torch.tensor(originals))
    expected = detect(task, *arrays)
    assert sum(len(own["boxes"]) for own in expected) > 0
    assert_same(run(task, *arrays)[1], expected)
