"""One detector twice, of this package and of MMDetection, with the same weights on the same small pyramid."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import cv2
import numpy as np
import torch
from mmdet.evaluation.metrics import CocoMetric, coco_metric
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from pycocotools import mask as coco_masks
from torch import Tensor, nn

from effvit.tasks.detectors.rcnn import FasterRCNN, MaskRCNN
from effvit.tasks.detectors.retinanet import RetinaNet
from effvit.tasks.metrics.coco import CocoEvaluator

CHANNELS = 16
HEAD_CHANNELS = 64

_BASE = Path(importlib.util.find_spec("mmdet").origin).parent / ".mim" / "configs" / "_base_" / "models"
_KINDS = {
    "retinanet": ("retinanet_r50_fpn.py", (8, 16, 32, 64, 128)),
    "faster_rcnn": ("faster-rcnn_r50_fpn.py", (4, 8, 16, 32, 64)),
    "mask_rcnn": ("mask-rcnn_r50_fpn.py", (4, 8, 16, 32, 64)),
}


class ConvPyramid(nn.Module):
    """One strided convolution a level: the cheapest pyramid that looks at an image."""

    def __init__(self, strides: tuple[int, ...], channels: int = CHANNELS) -> None:
        super().__init__()
        self.strides, self.out_channels = strides, channels
        self.levels = tuple(f"p{int(math.log2(stride))}" for stride in strides)
        self.stems = nn.ModuleList(
            nn.Conv2d(3, channels, 2 * stride - 1, stride=stride, padding=stride - 1) for stride in strides
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {level: stem(images).relu() for level, stem in zip(self.levels, self.stems, strict=True)}


class LevelsOnly(nn.Module):
    """The same for MMDetection, which wants a tuple; the modules are shared."""

    def __init__(self, pyramid: ConvPyramid) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.pyramid(images).values())


def make_pair(kind: str, num_classes: int, seed: int = 0, **test_options: float) -> tuple[nn.Module, nn.Module]:
    """This package's detector and MMDetection's, with weights spread enough for every branch of the post-processing.

    Args:
        kind: One of `_KINDS`.
        num_classes: Object classes.
        seed: Of the weights.
        test_options: ``score_threshold``, ``nms_threshold``, ``detections_per_image``.
    """
    torch.manual_seed(seed)
    pyramid = ConvPyramid(_KINDS[kind][1])
    if kind == "retinanet":
        ours: nn.Module = RetinaNet(pyramid, num_classes, head_convs=2, **test_options)
    else:
        make = MaskRCNN if kind == "mask_rcnn" else FasterRCNN
        ours = make(pyramid, num_classes, head_channels=HEAD_CHANNELS, **test_options)
    _spread(ours)
    theirs = _build(kind, num_classes, test_options)
    theirs.backbone = LevelsOnly(pyramid)
    weights = {name: ours.get_parameter(_renamed(name)) for name in theirs.state_dict() if "backbone" not in name}
    theirs.load_state_dict(weights, strict=False)
    return ours, theirs


def _build(kind: str, num_classes: int, test_options: dict[str, float]) -> nn.Module:
    config = Config.fromfile(_BASE / _KINDS[kind][0]).model
    config.data_preprocessor = None
    config.backbone = {"type": "mmdet.ResNet", "depth": 18, "init_cfg": None}  # replaced by the caller
    config.neck = None
    if kind == "retinanet":
        config.bbox_head.update(num_classes=num_classes, in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=2)
        final = config.test_cfg
    else:
        config.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
        heads = config.roi_head
        heads.bbox_roi_extractor.out_channels = CHANNELS
        heads.bbox_head.update(in_channels=CHANNELS, fc_out_channels=HEAD_CHANNELS, num_classes=num_classes)
        if kind == "mask_rcnn":
            heads.mask_roi_extractor.out_channels = CHANNELS
            heads.mask_head.update(in_channels=CHANNELS, conv_out_channels=CHANNELS, num_classes=num_classes)
        final = config.test_cfg.rcnn
    final.score_thr = test_options.get("score_threshold", final.score_thr)
    final.nms.iou_threshold = test_options.get("nms_threshold", final.nms.iou_threshold)
    final.max_per_img = test_options.get("detections_per_image", final.max_per_img)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(config)


@torch.no_grad()
def _spread(detector: nn.Module) -> None:
    for name, parameter in detector.named_parameters():
        if name.endswith("mask_fcn_logits.bias"):
            parameter.fill_(1.0)  # masks that fill most of their boxes, so that some match an object
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        else:
            strength = {"bbox_reg.": 0.3, "bbox_pred.": 0.3, "cls_logits.": 3.0, "cls_score.": 6.0}
            factor = next((value for part, value in strength.items() if part in name), 1.4)
            parameter.normal_(0, factor / math.sqrt(parameter[0].numel()))


def _renamed(name: str) -> str:
    """MMDetection's name of a parameter -> this package's (`reference/detection-engine.md`, section 3c)."""
    for old, new in (
        ("rpn_head.rpn_conv.", "rpn.head.conv.0.0."),
        ("rpn_head.rpn_cls.", "rpn.head.cls_logits."),
        ("rpn_head.rpn_reg.", "rpn.head.bbox_pred."),
        ("roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_head.fc6."),
        ("roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_head.fc7."),
        ("roi_head.bbox_head.fc_cls.", "roi_heads.box_predictor.cls_score."),
        ("roi_head.bbox_head.fc_reg.", "roi_heads.box_predictor.bbox_pred."),
        ("roi_head.mask_head.convs.", "roi_heads.mask_head."),
        ("roi_head.mask_head.upsample.", "roi_heads.mask_predictor.conv5_mask."),
        ("roi_head.mask_head.conv_logits.", "roi_heads.mask_predictor.mask_fcn_logits."),
        ("bbox_head.cls_convs.", "head.classification_head.conv."),
        ("bbox_head.reg_convs.", "head.regression_head.conv."),
        ("bbox_head.retina_cls.", "head.classification_head.cls_logits."),
        ("bbox_head.retina_reg.", "head.regression_head.bbox_reg."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old).replace(".conv.", ".0.")
    raise AssertionError(name)


def samples_of(
    images: Tensor,
    sizes: list[tuple[int, int]],
    targets: list[dict[str, Any]] | None = None,
    original_sizes: list[tuple[int, int]] | None = None,
) -> list[DetDataSample]:
    """A batch as MMDetection's pipeline and preprocessor hand it on, masks resized by OpenCV and padded."""
    samples = []
    for index, ((height, width), (old_height, old_width)) in enumerate(
        zip(sizes, original_sizes or sizes, strict=True)
    ):
        sample = DetDataSample(
            metainfo={
                "img_id": index,
                "img_shape": (height, width),
                "ori_shape": (old_height, old_width),
                "pad_shape": (math.ceil(height / 32) * 32, math.ceil(width / 32) * 32),
                "batch_input_shape": tuple(images.shape[2:]),
                "scale_factor": (width / old_width, height / old_height),
            }
        )
        if targets is not None:
            wanted = targets[index]
            sample.gt_instances = InstanceData(bboxes=wanted["boxes"].clone(), labels=wanted["labels"].clone())
            if "masks" in wanted:
                masks = BitmapMasks(wanted["masks"].numpy(), *wanted["masks"].shape[1:])
                sample.gt_instances.masks = masks.resize((height, width)).pad(tuple(images.shape[2:]))
        samples.append(sample)
    return samples


def loss_of(theirs: nn.Module, images: Tensor, samples: list[DetDataSample]) -> dict[str, Tensor]:
    """MMDetection's losses by name, those of the levels summed."""
    losses = theirs.loss(images, samples)
    return {
        name: sum(part.sum() for part in value) if isinstance(value, list) else value.sum()
        for name, value in losses.items()
        if "loss" in name
    }


def make_batch(
    sizes: list[tuple[int, int]],
    counts: list[int],
    originals: list[tuple[int, int]],
    num_classes: int,
    *,
    masks: bool,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Padded noise, and objects with elliptic masks at the original size."""
    generator = torch.Generator().manual_seed(3)
    height, width = (math.ceil(max(size[axis] for size in sizes) / 32) * 32 for axis in (0, 1))
    images = torch.zeros(len(sizes), 3, height, width)
    targets = []
    for image, size, count, original in zip(images, sizes, counts, originals, strict=True):
        image[:, : size[0], : size[1]] = torch.randn(3, *size, generator=generator)
        limits = torch.tensor([size[1], size[0]])
        sides = torch.rand(count, 2, generator=generator) ** 2 * limits * 0.7 + 1
        corners = torch.rand(count, 2, generator=generator) * (limits - sides).clamp(min=0)
        boxes = torch.cat([corners, corners + sides], dim=1)
        target = {"boxes": boxes, "labels": torch.randint(0, num_classes, (count,), generator=generator)}
        if masks:
            scale = torch.tensor([original[1] / size[1], original[0] / size[0]])
            target["masks"] = _ellipses(boxes * scale.repeat(2), original)
        targets.append(target)
    return images, targets


def _ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    y, x = (torch.arange(side) + 0.5 for side in size)
    centres, radii = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    across = ((x - centres[:, 0:1]) / radii[:, 0:1]) ** 2
    down = ((y - centres[:, 1:2]) / radii[:, 1:2]) ** 2
    return (across[:, None, :] + down[:, :, None] < 1).to(torch.uint8)


def seeded_step(
    detector: nn.Module, loss: Callable[[], dict[str, Tensor]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients, by this package's names, of a step that draws its samples from one seed."""
    detector.train().zero_grad(set_to_none=True)
    torch.manual_seed(11)
    losses = loss()
    sum(losses.values()).backward()
    gradients = {
        _our_name(name, detector): parameter.grad.clone()
        for name, parameter in detector.named_parameters()
        if parameter.grad is not None
    }
    return {name: value.item() for name, value in losses.items()}, gradients


def _our_name(name: str, detector: nn.Module) -> str:
    if isinstance(detector, RetinaNet | FasterRCNN):
        return name
    return name.removeprefix("backbone.") if name.startswith("backbone.") else _renamed(name)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, atol=2e-6 * scale + 1e-12, rtol=0, msg=name)


def encoded(masks: Tensor) -> list[dict[str, Any]]:
    """Full masks ``(N, h, w)`` as pycocotools encodes them."""
    return [coco_masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]


Batches = list[tuple[Tensor, list[tuple[int, int]], list[tuple[int, int]], list[int]]]


def real_batches(real_data: Path, count: int, side: int) -> tuple[dict[str, Any], Batches]:
    """COCO's annotations with all categories merged into one, and images in batches of two, their long side `side`."""
    folder = real_data / "coco_tiny"
    truth = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    with_objects = {entry["image_id"] for entry in truth["annotations"]}
    truth["images"] = sorted(truth["images"], key=lambda entry: entry["id"] not in with_objects)[:count]
    kept = {entry["id"] for entry in truth["images"]}
    truth["annotations"] = [{**a, "category_id": 1} for a in truth["annotations"] if a["image_id"] in kept]
    truth["categories"] = [{"id": 1, "name": "thing"}]
    batches = []
    for start in range(0, len(truth["images"]), 2):
        entries = truth["images"][start : start + 2]
        originals = [(entry["height"], entry["width"]) for entry in entries]
        sizes = [tuple(int(length * side / max(size) + 0.5) for length in size) for size in originals]
        height, width = (math.ceil(max(size[axis] for size in sizes) / 32) * 32 for axis in (0, 1))
        images = torch.zeros(len(entries), 3, height, width)
        for image, entry, (rows, columns) in zip(images, entries, sizes, strict=True):
            pixels = cv2.resize(cv2.imread(str(folder / "val2017" / entry["file_name"])), (columns, rows))
            image[:, :rows, :columns] = torch.from_numpy(pixels).permute(2, 0, 1) / 64 - 2
        batches.append((images, sizes, originals, [entry["id"] for entry in entries]))
    return truth, batches


def real_targets(
    truth: dict[str, Any], ids: list[int], sizes: list[tuple[int, int]], originals: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Boxes, labels and masks of real images, without crowds."""
    targets = []
    for image_id, (height, width), (old_height, old_width) in zip(ids, sizes, originals, strict=True):
        own = [a for a in truth["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in own])
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        outlines = [coco_masks.merge(coco_masks.frPyObjects(a["segmentation"], old_height, old_width)) for a in own]
        targets.append(
            {
                "boxes": boxes * torch.tensor([width / old_width, height / old_height]).repeat(2),
                "labels": torch.zeros(len(own), dtype=torch.int64),
                "masks": torch.stack([torch.from_numpy(coco_masks.decode(outline)) for outline in outlines]),
            }
        )
    return targets


class _Recorded(coco_metric.COCOeval):
    """MMDetection's evaluator, which keeps its numbers with all their digits."""

    all_stats: ClassVar[list[list[float]]] = []

    def summarize(self) -> None:
        super().summarize()
        self.all_stats.append(self.stats.tolist())


def evaluators(
    truth: dict[str, Any], folder: Path, iou_types: tuple[str, ...]
) -> tuple[Callable[..., None], Callable[[], tuple[dict[str, list[float]], dict[str, list[float]]]]]:
    """A function that takes detections of both, and one that gives the twelve numbers of both by IoU type."""
    path = folder / "truth.json"
    path.write_text(json.dumps(truth))
    own = CocoEvaluator(iou_types)
    metric = CocoMetric(ann_file=str(path), metric=list(iou_types), proposal_nums=(1, 10, 100))
    metric.dataset_meta = {"classes": ("thing",)}

    def update(ids: list[int], found: list[dict[str, Any]], expected: list[DetDataSample]) -> None:
        own.update(ids, [{**one, "category_ids": one["labels"] + 1} for one in found])
        for image_id, sample in zip(ids, expected, strict=True):
            sample.set_metainfo({"img_id": image_id})
        metric.process({}, [sample.to_dict() for sample in expected])

    def numbers() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        result = own.compute(truth)
        with mock.patch.object(coco_metric, "COCOeval", _Recorded):  # itself it says three digits only
            _Recorded.all_stats.clear()
            metric.compute_metrics(metric.results)
        return (
            {kind: list(result.metrics[kind].values()) for kind in iou_types},
            dict(zip(iou_types, _Recorded.all_stats, strict=True)),
        )

    return update, numbers


def assert_same_detections(ours: Any, theirs: Any, images: Any, sizes: Any, originals: Any, *, rescale: bool) -> None:
    """To the last bit: boxes, scores, labels, and masks where there are any."""
    with torch.no_grad():
        expected = theirs.eval().predict(images, samples_of(images, sizes, None, originals), rescale=rescale)
        found = ours.eval().predict(images, sizes, originals if rescale else None)
    for own, sample in zip(found, expected, strict=True):
        reference = sample.pred_instances
        assert len(own["scores"]) > 20
        assert torch.equal(own["boxes"], reference.bboxes)
        assert torch.equal(own["scores"], reference.scores)
        assert torch.equal(own["labels"], reference.labels)
        if "segm" in ours.iou_types:
            assert own["rles"] == encoded(reference.masks)
            assert len({rle["counts"] for rle in own["rles"]}) > 10


def check_real(kind: str, real_data: Path, count: int, side: int, folder: Path, least: float = 0.01) -> None:
    """Detections of real images, objects of one class, and the numbers of both evaluators over them.

    One number of each evaluator exceeds `least`: otherwise nothing matched, and the comparison would say nothing.
    """
    ours, theirs = make_pair(kind, 1, score_threshold=0.001)
    truth, batches = real_batches(real_data, count, side)
    update, theirs_metric = evaluators(truth, folder, ours.iou_types)
    for images, sizes, originals, ids in batches:
        with torch.no_grad():
            expected = theirs.eval().predict(images, samples_of(images, sizes, None, originals))
            found = ours.eval().predict(images, sizes, originals)
        for own, sample in zip(found, expected, strict=True):
            torch.testing.assert_close(own["boxes"], sample.pred_instances.bboxes, atol=1e-3, rtol=0)
            torch.testing.assert_close(own["scores"], sample.pred_instances.scores, atol=1e-5, rtol=0)
            assert torch.equal(own["labels"], sample.pred_instances.labels)
            if kind == "mask_rcnn":
                assert own["rles"] == encoded(sample.pred_instances.masks)
        update(ids, found, expected)
    numbers, reference = theirs_metric()
    for iou_type in ours.iou_types:
        assert numbers[iou_type] == reference[iou_type]
        assert len(numbers[iou_type]) == 12
        assert max(numbers[iou_type]) > least, "nothing matched: the comparison says nothing"
