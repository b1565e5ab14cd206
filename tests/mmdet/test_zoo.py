"""Detectors as MMDetection ships them, each on backbones of ours: they build, learn and predict."""

from __future__ import annotations

import pytest
import torch

from effvit.tasks.mmdetection import MMDetector, has_masks

#: Configuration, backbone and image side. DINO asks for 900 places, which smaller images do not have.
FAST = [
    ("retinanet_r50_fpn_1x_coco", "efficientvit_m0", 64),
    ("atss_r50_fpn_1x_coco", "mobilevit_xxs", 64),
]
SLOW = [
    ("faster-rcnn_r50_fpn_1x_coco", "dynamicvit_tiny", 64),
    ("mask-rcnn_r50_fpn_1x_coco", "mobilevit_xxs", 64),
    ("cascade-mask-rcnn_r50_fpn_1x_coco", "efficientformerv2_s0", 64),
    ("fcos_r50-caffe_fpn_gn-head_1x_coco", "dynamicvit_tiny", 64),
    ("detr_r50_8xb2-150e_coco", "mobilevit_xxs", 64),
    ("deformable-detr_r50_16xb2-50e_coco", "efficientvit_m0", 64),
    ("dino-4scale_r50_8xb2-12e_coco", "efficientformerv2_s0", 256),
    ("dino-4scale_r50_8xb2-12e_coco", "dynamicvit_tiny", 256),
    # Each with a trap of its own: it augments whole batches, which asks for the step; its neck reads one map; its
    # backbone has deformable convolutions; it finds masks without boxes.
    ("yolox_tiny_8xb8-300e_coco", "mobilevit_xxs", 64),
    ("yolof_r50-c5_8xb8-1x_coco", "efficientformerv2_s0", 64),
    ("faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco", None, 64),
    ("solov2_r50_fpn_1x_coco", "mobilevit_xxs", 64),
]
CASES = [pytest.param(*case, id="-".join(map(str, case[:2]))) for case in FAST] + [
    pytest.param(*case, id="-".join(map(str, case[:2])), marks=pytest.mark.slow) for case in SLOW
]


@pytest.mark.parametrize(("config", "backbone", "side"), CASES)
def test_it_learns_and_predicts(config, backbone, side):
    torch.manual_seed(0)
    detector = MMDetector(config, 5, backbone=backbone)
    # The layout that the task trains in.
    detector.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    sizes, originals = [(side, side - 8), (side - 16, side)], [(2 * side, 2 * side - 16), (2 * side - 32, 2 * side)]
    masks = [torch.zeros(2, *originals[0], dtype=torch.uint8), torch.zeros(0, *originals[1], dtype=torch.uint8)]
    masks[0][0, 8:60, 10:50], masks[0][1, 30:110, 20:100] = 1, 1
    targets = [
        {
            "boxes": torch.tensor([[5.0, 4, 25, 30], [10, 15, 50, 55]]),
            "labels": torch.tensor([1, 4]),
            "masks": masks[0],
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": masks[1]},
    ]
    losses = detector.train().loss(images, sizes, targets)
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    assert all("loss" in name for name in losses)
    total.backward()
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())

    found = detector.eval().predict(images, sizes, originals)
    for entry, (height, width) in zip(found, originals, strict=True):
        assert entry["boxes"].shape == (len(entry["scores"]), 4)
        assert entry["scores"].tolist() == sorted(entry["scores"].tolist(), reverse=True)
        assert entry["labels"].shape == entry["scores"].shape
        assert all(0 <= label < 5 for label in entry["labels"].tolist())
        assert all(rle["size"] == [height, width] for rle in entry.get("rles", []))
    assert ("rles" in found[0]) == ("segm" in detector.iou_types) == has_masks(config)
