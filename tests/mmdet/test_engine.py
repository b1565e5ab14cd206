"""MMDetection's detectors behind the contract of ours: configurations, backbones, losses, detections, checkpoints."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from effvit.backbones import create_backbone
from effvit.errors import CheckpointError, ConfigError
from effvit.tasks.mmdetection import MMDetector, _build, _config, _requirements, _swap, has_masks

SHIPPED = Path(mmdet.__file__).parent / ".mim" / "configs"
#: A small Mask R-CNN as a user writes it; its weights would be downloaded by MMDetection.
SMALL = f"""
_base_ = "{SHIPPED}/_base_/models/mask-rcnn_r50_fpn.py"
model = dict(
    backbone=dict(depth=18),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1)),
)
"""


@pytest.fixture(scope="module")
def user_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "my_mask_rcnn.py"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(scope="module")
def detector(user_config):
    torch.manual_seed(0)
    return MMDetector(user_config, 3, class_names=("disc", "bar", "ring"))


@pytest.fixture(scope="module")
def batch():
    """uint8 BGR images before padding, their original sizes, and targets at both."""
    random = np.random.default_rng(0)
    images = [torch.from_numpy(random.integers(0, 256, (3, *size), dtype=np.uint8)) for size in [(90, 128), (128, 70)]]
    originals = [(180, 256), (100, 55)]
    masks = [torch.zeros(2, 180, 256, dtype=torch.uint8), torch.zeros(0, 100, 55, dtype=torch.uint8)]
    masks[0][0, 20:100, 30:120] = 1
    masks[0][1, 90:170, 100:250] = 1
    boxes = [torch.tensor([[15.0, 10, 60, 50], [50, 45, 125, 85]]), torch.zeros(0, 4)]
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)]
    targets = [
        {"boxes": box, "labels": label, "masks": mask} for box, label, mask in zip(boxes, labels, masks, strict=True)
    ]
    return images, originals, targets


def as_ours(images, detector):
    """What effvit's task hands to a detector: RGB, normalised by its `mean` and `std`, padded."""
    padded = torch.zeros(len(images), 3, 128, 128)
    for place, image in zip(padded, images, strict=True):
        mean, std = torch.tensor(detector.mean).view(3, 1, 1), torch.tensor(detector.std).view(3, 1, 1)
        place[:, : image.shape[1], : image.shape[2]] = (image.flip(0) / 255 - mean) / std
    return padded, [tuple(image.shape[1:]) for image in images]


def as_theirs(batch, detector, training):
    """The same through MMDetection's own preprocessing."""
    samples = []
    for image, original, target in zip(*batch, strict=True):
        h, w = image.shape[1:]
        scale = (w / original[1], h / original[0])
        sample = DetDataSample(metainfo={"img_shape": (h, w), "ori_shape": original, "scale_factor": scale})
        masks = BitmapMasks(target["masks"].numpy(), *original).resize((h, w))
        sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"], masks=masks)
        samples.append(sample)
    data = detector.model.data_preprocessor({"inputs": batch[0], "data_samples": samples}, training)
    return data["inputs"], data["data_samples"]


# --- losses and detections are MMDetection's


def test_losses_are_those_of_mmdetection(detector, batch):
    detector.train()
    torch.manual_seed(1)  # of the sampling of regions
    _, logs = detector.model.parse_losses(detector.model.loss(*as_theirs(batch, detector, training=True)))
    torch.manual_seed(1)
    losses = detector.loss(*as_ours(batch[0], detector), batch[2])
    assert list(losses) == ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"]
    for name, value in losses.items():
        torch.testing.assert_close(value, logs[name], rtol=1e-5, atol=1e-7)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
    detector.zero_grad()


def test_detections_are_those_of_mmdetection(detector, batch):
    detector.eval()
    with torch.no_grad():
        expected = detector.model.predict(*as_theirs(batch, detector, training=False), rescale=True)
    found = detector.predict(*as_ours(batch[0], detector), batch[1])
    for ours, sample in zip(found, expected, strict=True):
        theirs = sample.pred_instances
        order = theirs.scores.argsort(descending=True, stable=True)
        assert len(order) == 100
        torch.testing.assert_close(ours["boxes"], theirs.bboxes[order], rtol=0, atol=1e-3)
        torch.testing.assert_close(ours["scores"], theirs.scores[order], rtol=0, atol=1e-6)
        assert torch.equal(ours["labels"], theirs.labels[order])
        decoded = coco_mask.decode(ours["rles"]).transpose(2, 0, 1)
        assert ours["rles"][0]["size"] == list(sample.ori_shape)
        assert (decoded != theirs.masks[order].numpy()).mean() < 1e-4


def test_detections_without_original_sizes(detector, batch):
    detector.eval()
    images, sizes = as_ours(batch[0], detector)
    first, second = detector.predict(images, sizes)
    assert first["rles"][0]["size"] == [90, 128]
    assert second["boxes"][:, 2].max() <= 70


def test_forward_gives_raw_outputs(detector):
    (scores, deltas), (classes, boxes, masks) = detector(torch.zeros(1, 3, 64, 64))
    assert [level.shape[1] for level in scores] == [3] * 5
    assert [level.shape[1] for level in deltas] == [12] * 5
    assert classes.shape == (1000, 4)
    assert boxes.shape == (1000, 12)
    assert masks.shape == (100, 3, 28, 28)


# --- configurations


def test_a_users_configuration(detector, user_config, caplog):
    assert detector.iou_types == ("bbox", "segm")
    assert has_masks(user_config)
    assert not has_masks("retinanet_r50_fpn_1x_coco")
    assert detector.mean == pytest.approx((0.485, 0.456, 0.406))
    assert detector.std == pytest.approx((0.229, 0.224, 0.225))
    with caplog.at_level(logging.INFO, logger="effvit"):
        _config.read_model(user_config)
    assert "not loaded: torchvision://resnet50" in caplog.text


def test_class_parameters_are_found_by_shape(detector):
    heads = ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
    names = {f"model.roi_head.{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert set(detector.class_parameters) == names


def test_a_checkpoint_rebuilds_without_the_file(detector, batch):
    again = MMDetector(detector.config_text, 3)
    assert again.config_text == detector.config_text
    again.load_state_dict(detector.state_dict())
    images, sizes = as_ours(batch[0], detector)
    found, expected = again.eval().predict(images, sizes), detector.eval().predict(images, sizes)
    for own, other in zip(found, expected, strict=True):
        assert own.pop("rles") == other.pop("rles")
        assert len(own["boxes"]) == 100
        assert all(torch.equal(own[name], other[name]) for name in ("boxes", "scores", "labels"))


def test_the_step_of_batch_augmentations_is_in_the_checkpoint(detector):
    assert detector.state_dict()["steps"].dtype == torch.int64
    again = MMDetector(detector.config_text, 3)
    again.load_state_dict(detector.state_dict() | {"steps": torch.tensor(41)})
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]
    targets[0]["masks"] = torch.zeros(0, 32, 32, dtype=torch.uint8)
    again.train().loss(torch.zeros(1, 3, 32, 32), [(32, 32)], targets)
    assert MessageHub.get_current_instance().get_info("iter") == 41
    assert again.state_dict()["steps"] == 42
    assert "steps" not in again.model.state_dict()


def test_a_file_is_read_again_only_where_it_has_changed(tmp_path):
    path = tmp_path / "config.py"
    path.write_text('model = dict(type="RetinaNet", backbone=dict(type="ResNet", depth=50))\n')
    first = _config.read_model(str(path))
    first["backbone"]["depth"] = 18  # a copy of the caller's own
    before = _config._from_file.cache_info()
    assert _config.read_model(str(path))["backbone"]["depth"] == 50
    assert _config._from_file.cache_info().hits == before.hits + 1
    path.write_text('model = dict(type="RetinaNet", backbone=dict(type="ResNet", depth=101))\n')
    assert _config.read_model(str(path))["backbone"]["depth"] == 101


def test_tuples_survive_the_text():
    model = {"type": "FasterRCNN", "backbone": {"type": "ResNet", "depth": 50, "stages": ((1, 2.5), [None, True])}}
    assert _config.read_model(_config.to_text(model)) == model
    with pytest.raises(ConfigError, match="no plain value"):
        _config.to_text({"backbone": {"type": object}})


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"backbone": {"type": "subprocess.Popen", "args": "true"}}, "subprocess.Popen"),
        ({"backbone": {"type": "ResNet"}, "neck": {"type": "mmengine.load", "file": "x.pkl"}}, "mmengine.load"),
        ({"backbone": {"type": "ResNet"}, "test_cfg": {"nms": {"type": "exit()", "iou": 0.5}}}, r"exit\(\)"),
    ],
)
def test_a_text_cannot_run_code(part, name):
    words = rf"names the type '{name}', which is not registered here\. (Did you mean .*\? )?Import the module"
    with pytest.raises(ConfigError, match=words):
        _config.read_model(json.dumps({"model": {"type": "FasterRCNN", **part}}))


TEACHER = {"type": "KnowledgeDistillationSingleStageDetector", "backbone": {"type": "ResNet", "depth": 50}}
WEIGHTS = {"type": "Pretrained", "checkpoint": "http://host/x.pth"}


@pytest.mark.parametrize("kind", ["KnowledgeDistillationSingleStageDetector", "mmdet.LAD"])
def test_a_text_cannot_name_a_file_to_execute(kind, tmp_path):
    attack = tmp_path / "attack.py"
    attack.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nmodel = dict(type='ResNet', depth=18)\n")
    text = json.dumps({"model": {**TEACHER, "type": kind, "teacher_config": str(attack)}})
    for use in (has_masks, lambda text: MMDetector(text, 3)):
        with pytest.raises(ConfigError, match=r"in the checkpoint has teacher_config='.*attack.py', for which MMDet"):
            use(text)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"teacher_ckpt": "x.pth"}, "has teacher_ckpt='x.pth'"),
        ({"backbone": {"type": "ResNet", "init_cfg": [WEIGHTS]}}, "a file of weights to open, 'http://host/x.pth'"),
        ({"backbone": {"type": "ResNet", "pretrained": "x.pth"}}, "a file of weights to open, 'x.pth'"),
        ({"backbone": {"type": "effvit.Backbone", "pretrained": True}}, "a file of weights to open, True"),
        ({"neck": {"type": "FPN", "_scope_": "os"}}, "the scope 'os'"),
        ({"language_model": {"type": "BertModel", "name": "x"}}, "has type='BertModel'"),
    ],
)
def test_a_text_names_no_other_files(part, message):
    with pytest.raises(ConfigError, match=f"in the checkpoint .*{message}"):
        _config.read_model(json.dumps({"model": TEACHER | part}))


def test_layers_that_mmdetection_finds_in_mmcv_may_stand_in_a_text():
    model = {
        "backbone": {"type": "ResNet"},
        "roi_head": {"roi_layer": {"type": "RoIAlign"}, "x": {"type": "PrRoIPool"}},
    }
    assert _config.read_model(_config.to_text(model)) == model


def test_weights_that_mmdetection_would_fetch_are_left_out_everywhere(caplog):
    normal = {"type": "Normal", "std": 0.01}
    model = {
        "init_cfg": [normal, WEIGHTS],
        "backbone": {"type": "ResNet", "init_cfg": WEIGHTS | {"type": "mmengine.model.PretrainedInit"}},
        "neck": ({"init_cfg": {**normal, "override": WEIGHTS}}, {"pretrained": "torchvision://resnet50"}),
        "twin": {"type": "effvit.Backbone", "pretrained": "own.pth"},
    }
    with caplog.at_level(logging.INFO, logger="effvit"):
        assert _config.without_downloads(model) == {
            "init_cfg": [normal],
            "backbone": {"type": "ResNet", "init_cfg": None},
            "neck": ({"init_cfg": {**normal, "override": None}}, {"pretrained": None}),
            "twin": {"type": "effvit.Backbone", "pretrained": "own.pth"},
        }
    assert caplog.text.count("not loaded: http://host/x.pth") == 3


def test_a_file_that_fetches_more_is_refused(tmp_path):
    path = tmp_path / "student.py"
    path.write_text(f"model = {TEACHER | {'teacher_ckpt': 'http://host/x.pth'}!r}\n")
    with pytest.raises(
        ConfigError, match=r"student.py has teacher_ckpt='http://host/x.pth', .* MMDetection's own Runner"
    ):
        MMDetector(str(path), 3)


@pytest.mark.parametrize(
    ("change", "words", "near"),
    [
        ('type="MaskRCNNN"', "'?MaskRCNNN is not in the mmdet::model registry", "Did you mean 'MaskRCNN'"),
        ("roi_head=dict(mask_head=dict(numclasses=3))", "unexpected keyword argument 'numclasses'", "'num_classes'"),
        ('neck=dict(type="FPNN")', "FPNN is not in", "Did you mean 'FPN'"),
        ('backbone=dict(depth="50")', "KeyError: invalid depth 50", ""),
    ],
)
def test_what_mmdetection_refuses_names_the_file_and_close_matches(change, words, near, tmp_path):
    path = tmp_path / "typo.py"
    path.write_text(SMALL.replace("backbone=dict(depth=18),", f"{change},") if "backbone" in change else SMALL)
    if "backbone" not in change:
        path.write_text(SMALL + f"\nfor name, entry in dict({change}).items():\n    model[name] = entry\n")
    with pytest.raises(ConfigError, match=rf"cannot build the model of {path}: .*{words}(.|\n)*{near}"):
        MMDetector(str(path), 3)


@pytest.mark.parametrize("backbone", ["mobilevit_xxs", None])
def test_a_wrong_neck_is_explained_with_any_backbone(backbone, tmp_path):
    path = tmp_path / "typo.py"
    path.write_text(SMALL.replace("neck=dict(", 'neck=dict(type="FPNN", '))
    with pytest.raises(ConfigError, match=r"typo.py: .* Did you mean 'FPN'"):
        MMDetector(str(path), 3, backbone=backbone)


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("retinanet_r50_fpn_1x_coco", False),
        ("mask-rcnn_r50_fpn_1x_coco", True),
        pytest.param("cascade-mask-rcnn_r50_fpn_1x_coco", True, marks=pytest.mark.slow),
        pytest.param("detr_r50_8xb2-150e_coco", False, marks=pytest.mark.slow),
        pytest.param("yolox_tiny_8xb8-300e_coco", False, marks=pytest.mark.slow),
        ("solov2_r50_fpn_1x_coco", True),
        pytest.param("mask2former_r50_8xb2-lsj-50e_coco", True, marks=pytest.mark.slow),
    ],
)
def test_masks_are_foreseen_without_building(name, masks, monkeypatch):
    model = _config.read_model(name)
    assert _build.predicts_masks(_build.outline(model)) is masks
    monkeypatch.delattr(_build, "outline")
    assert has_masks(name) is masks


def test_masks_of_a_users_own_detector_are_those_of_the_built_one(user_config):
    @MODELS.register_module(name="OwnMaskRCNN", force=True)
    class _Own(MODELS.get("MaskRCNN")):
        with_mask = False

    model = _config.read_model(user_config)
    assert not has_masks(_config.to_text(model | {"type": "OwnMaskRCNN"}))


@pytest.mark.parametrize("name", ["faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "faster-rcnn_r50_fpn_1x_coco"])
def test_shipped_configurations_by_name(name):
    assert _config.read_model(name)["type"] == "FasterRCNN"


def test_every_shipped_type_may_stand_in_a_text():
    """The check of texts refuses nothing that MMDetection ships in the issue's families."""
    for folder in ("retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "fcos", "atss", "detr", "dino", "yolox"):
        path = min((SHIPPED / folder).glob("*_coco.py"))
        model = _config.read_model(str(path))
        assert _config.read_model(_config.to_text(model)) == model


def test_unknown_configurations(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no file faster-rcnn_r50_fpn_1x_coc.*Did you mean 'faster-rcnn_r50_fpn_1x_coco"
    ):
        MMDetector("faster-rcnn_r50_fpn_1x_coc", 3)
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(ConfigError, match=r"broken.py cannot be read"):
        MMDetector(str(tmp_path / "broken.py"), 3)
    (tmp_path / "empty.py").write_text("optim = dict(lr=1)")
    with pytest.raises(ConfigError, match=r"no `model` with a `backbone`"):
        MMDetector(str(tmp_path / "empty.py"), 3)


# --- classes


def test_classes_go_everywhere_but_into_the_proposals():
    model = {
        "rpn_head": {"num_classes": 1},
        "roi_head": {"bbox_head": [{"num_classes": 80}, {"num_classes": 80}]},
        "panoptic_head": {"num_things_classes": 80, "loss_cls": {"class_weight": [1.0] * 80 + [0.1]}},
    }
    changed = _swap.set_num_classes(model, 3)
    assert changed["rpn_head"]["num_classes"] == 1
    assert [head["num_classes"] for head in changed["roi_head"]["bbox_head"]] == [3, 3]
    assert changed["panoptic_head"] == {"num_things_classes": 3, "loss_cls": {"class_weight": [1.0] * 3 + [0.1]}}
    assert model["roi_head"]["bbox_head"][0]["num_classes"] == 80


# --- other backbones


def swapped(config, backbone, options=None):
    model = _swap.swap_backbone(_config.read_model(config), backbone, options, {})
    return model["backbone"]["levels"], model["neck"]


@pytest.mark.parametrize(
    ("config", "backbone", "levels", "neck"),
    [
        # It has strides 4 to 32: the neck stays.
        (
            "faster-rcnn_r50_fpn_1x_coco",
            "mobilevit_xxs",
            "c2 c3 c4 c5",
            {"type": "FPN", "start_level": 0, "num_outs": 5},
        ),
        # RetinaNet's FPN leaves stride 4 out.
        ("retinanet_r50_fpn_1x_coco", "mobilevit_xxs", "c3 c4 c5", {"type": "FPN", "start_level": 0}),
        pytest.param(
            "faster-rcnn_r50_pafpn_1x_coco",
            "efficientformerv2_s0",
            "c2 c3 c4 c5",
            {"type": "PAFPN"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "yolox_s_8xb8-300e_coco",
            "mobilevit_xxs",
            "c3 c4 c5",
            {"type": "YOLOXPAFPN", "out_channels": 128},
            marks=pytest.mark.slow,
        ),
        # It starts at stride 16: our pyramid, with the levels that the heads know.
        (
            "retinanet_r50_fpn_1x_coco",
            "efficientvit_m0",
            "c4 c5 c6",
            {"type": "effvit.FeaturePyramid", "levels": ["p3", "p4", "p5", "p6", "p7"], "extra": "on_input"},
        ),
        (
            "faster-rcnn_r50_fpn_1x_coco",
            "dynamicvit_tiny",
            "c4",
            {"type": "effvit.FeaturePyramid", "levels": ["p2", "p3", "p4", "p5", "p6"], "extra": "pool"},
        ),
        pytest.param(
            "fcos_r50-caffe_fpn_gn-head_1x_coco",
            "dynamicvit_tiny",
            "c4",
            {"type": "effvit.FeaturePyramid", "extra": "on_output", "relu": True, "out_channels": 256},
            marks=pytest.mark.slow,
        ),
        # Transformers take the coarsest maps that there are.
        pytest.param(
            "detr_r50_8xb2-150e_coco",
            "dynamicvit_tiny",
            "c4",
            {"type": "ChannelMapper", "num_outs": 1},
            marks=pytest.mark.slow,
        ),
        ("deformable-detr_r50_16xb2-50e_coco", "efficientvit_m0", "c4 c5 c6", {"type": "ChannelMapper", "num_outs": 4}),
        pytest.param(
            "dino-4scale_r50_8xb2-12e_coco",
            "dynamicvit_tiny",
            "c4",
            {"type": "effvit.FeaturePyramid", "levels": ["p3", "p4", "p5", "p6"], "extra": "on_input"},
            marks=pytest.mark.slow,
        ),
        ("yolof_r50-c5_8xb8-1x_coco", "mobilevit_xxs", "c5", {"type": "DilatedEncoder", "in_channels": 80}),
    ],
)
def test_which_neck_a_backbone_gets(config, backbone, levels, neck):
    chosen, built = swapped(config, backbone)
    assert chosen == levels.split()
    assert {name: built.get(name) for name in neck} == neck
    if isinstance(built.get("in_channels"), list):
        specs = {spec.level: spec.channels for spec in create_backbone(backbone).feature_maps}
        assert built["in_channels"] == [specs[level] for level in chosen]


def test_a_list_of_necks_keeps_the_later_ones():
    _, necks = swapped("atss_r50_fpn_dyhead_1x_coco", "mobilevit_xxs")
    assert [neck["type"] for neck in necks] == ["FPN", "DyHead"]


def test_our_own_neck_in_a_configuration_follows_the_backbone():
    model = {
        "type": "RetinaNet",
        "backbone": {"type": "effvit.Backbone", "name": "efficientvit_m0"},
        "neck": {"type": "effvit.FeaturePyramid", "backbone": "efficientvit_m0", "out_channels": 8},
    }
    model = _swap.swap_backbone(model, "mobilevit_xxs", None, {})
    assert model["neck"]["backbone"] == "mobilevit_xxs"
    assert model["neck"]["in_levels"] == model["backbone"]["levels"] == ["c3", "c4", "c5"]


def test_colours(user_config):
    model = _config.read_model(user_config)
    model["data_preprocessor"] = {"type": "DetDataPreprocessor", "mean": [10, 20, 30], "std": [1, 2, 5], "pad_value": 7}
    own = MMDetector(_config.to_text(model), 2)  # it wants BGR
    assert own.mean == pytest.approx((30 / 255, 20 / 255, 10 / 255))
    assert own.std == pytest.approx((5 / 255, 2 / 255, 1 / 255))
    image = torch.rand(1, 3, 32, 32)
    expected = image.flip(1)
    expected[:, :, 20:], expected[:, :, :, 30:] = 7, 7
    assert torch.equal(own._inputs(image, [(20, 30)]), expected)
    plain = MMDetector(_config.to_text({**model, "data_preprocessor": {"type": "DetDataPreprocessor"}}), 2)
    assert plain.std == pytest.approx((1 / 255,) * 3)  # YOLOX takes pixels as they are
    other = MMDetector(_config.to_text(model), 2, backbone="mobilevit_xxs")
    spec = create_backbone("mobilevit_xxs").input_spec
    assert other.mean == pytest.approx(spec.mean)
    assert other.std == pytest.approx(spec.std)
    assert torch.equal(other._inputs(image, [(32, 32)]), image)


def test_what_cannot_be_swapped():
    with pytest.raises(ConfigError, match="has no neck"):
        swapped("faster-rcnn_r50-caffe_c4-1x_coco", "mobilevit_xxs")
    with pytest.raises(ConfigError, match=r"neck SSDNeck .* cannot be rebuilt"):
        swapped("ssd300_coco", "mobilevit_xxs")
    with pytest.raises(ConfigError, match=r"one map of stride 32, .* of stride 16"):
        swapped("yolof_r50-c5_8xb8-1x_coco", "dynamicvit_tiny")
    with pytest.raises(ConfigError, match="Did you mean 'mobilevit_xxs'"):
        swapped("faster-rcnn_r50_fpn_1x_coco", "mobilevit_xxx")


def test_what_the_configurations_own_backbone_takes(user_config, tmp_path):
    with pytest.raises(ConfigError, match="backbone_options need a backbone"):
        MMDetector(user_config, 3, backbone_options={"a": 1})
    with pytest.raises(ConfigError, match="ResNet has no published weights here"):
        MMDetector(user_config, 3, pretrained=True)
    assert MMDetector(user_config, 3, gradient_checkpointing=True).model.backbone.with_cp
    weights = MMDetector(user_config, 3).model.backbone.state_dict()
    torch.save({"state_dict": weights | {"fc.weight": torch.zeros(1)}}, tmp_path / "resnet18.pth")
    started = MMDetector(user_config, 3, pretrained=str(tmp_path / "resnet18.pth"))
    assert torch.equal(started.model.backbone.conv1.weight, weights["conv1.weight"])
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not fill MMDetection's ResNet"):
        MMDetector(user_config, 3, pretrained=str(tmp_path / "other.pth"))


def test_weights_of_a_swapped_backbone(user_config, tmp_path):
    network = create_backbone("efficientvit_m0")
    torch.save(network.state_dict(), tmp_path / "m0.pth")
    swap = MMDetector(user_config, 3, backbone="efficientvit_m0", pretrained=str(tmp_path / "m0.pth"))
    network.prepare_for_dense()  # as every detector does
    loaded, given = swap.model.backbone.network.state_dict(), network.state_dict()
    assert loaded.keys() == given.keys()
    assert all(torch.equal(loaded[name], given[name]) for name in given)
    assert str(tmp_path) not in swap.config_text


# --- checkpoints


def test_load_fills_the_whole_detector_or_fails(detector, user_config):
    state = {name: value + 1 for name, value in detector.model.state_dict().items() if "tracked" not in name}
    other = MMDetector(user_config, 3)
    report = other.load(state | {"extra.weight": torch.zeros(1)}, "file.pth")
    assert report.unexpected == ("extra.weight",)
    assert torch.equal(other.model.roi_head.mask_head.conv_logits.bias, state["roi_head.mask_head.conv_logits.bias"])
    with pytest.raises(CheckpointError, match=r"file.pth does not fill the MaskRCNN .* with 2 classes"):
        MMDetector(user_config, 2).load(state, "file.pth")
    del state["backbone.conv1.weight"]
    with pytest.raises(CheckpointError, match="1 missing"):
        other.load(state, "file.pth")


@pytest.fixture(scope="module")
def swapped_detector(user_config):
    return MMDetector(user_config, 3, backbone="mobilevit_xxs")


def test_load_takes_the_names_of_a_backbones_authors(swapped_detector, user_config):
    own = {
        name: value + 1 if value.is_floating_point() else value
        for name, value in swapped_detector.model.state_dict().items()
    }
    state = {name.replace("backbone.network.", "backbone."): value for name, value in own.items()}
    other = MMDetector(user_config, 3, backbone="mobilevit_xxs")
    report = other.load(state, "published.pth")
    assert report.missing == report.mismatched == ()
    loaded = other.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in own.items())
    foreign = {name.replace("neck.", "neck.official."): value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=r"published.pth does not fill the MaskRCNN .*--model.detector mask_rcnn"):
        other.load(foreign, "published.pth")


# --- what is registered


def test_registered_backbone():
    backbone = MODELS.build({"type": "effvit.Backbone", "name": "mobilevit_xxs", "levels": ["c3", "c5"]})
    maps = backbone.train()(torch.zeros(2, 3, 64, 64))
    assert [tuple(level.shape[-2:]) for level in maps] == [(8, 8), (2, 2)]
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    trained = MODELS.build({"type": "effvit.Backbone", "name": "mobilevit_xxs", "norm_eval": False}).train()
    assert all(norm.training for norm in trained.modules() if isinstance(norm, torch.nn.BatchNorm2d))
    for wrong in (["c5", "c3"], ["c9"], []):
        with pytest.raises(ConfigError, match="levels of mobilevit_xxs must be some of"):
            MODELS.build({"type": "effvit.Backbone", "name": "mobilevit_xxs", "levels": wrong})
    with pytest.raises(ConfigError, match="no init_cfg"):
        MODELS.build({"type": "effvit.Backbone", "name": "mobilevit_xxs", "init_cfg": {"type": "Pretrained"}})


@pytest.mark.parametrize("extra", ["on_input", "on_output", "pool"])
@pytest.mark.parametrize(
    "backbone",
    ["mobilevit_xxs", *(pytest.param(b, marks=pytest.mark.slow) for b in ("efficientvit_m0", "dynamicvit_tiny"))],
)
def test_registered_pyramid(backbone, extra):
    maps = create_backbone(backbone)(torch.rand(1, 3, 128, 192))
    settings = {"backbone": backbone, "out_channels": 8, "extra": extra, "levels": ["p3", "p4", "p5", "p6", "p7"]}
    neck = MODELS.build({"type": "effvit.FeaturePyramid", **settings})
    levels = neck(tuple(maps.values()))
    assert [tuple(level.shape) for level in levels] == [(1, 8, 128 // s, 192 // s) for s in (8, 16, 32, 64)] + [
        (1, 8, 1, 2)
    ]
    coarser = {"efficientvit_m0": 1, "mobilevit_xxs": 2, "dynamicvit_tiny": 2}[backbone]
    if extra == "pool":
        assert torch.equal(levels[-1], levels[-2][..., ::2, ::2])
        assert not neck.extra
    else:
        source = list(maps.values())[-1] if extra == "on_input" and len(maps) > 1 else levels[-1 - coarser]
        assert torch.equal(neck.extra[0](source), levels[-coarser])
        assert len(neck.extra) == coarser


def test_registered_pyramid_checks_its_words():
    with pytest.raises(ConfigError, match="extra must be"):
        MODELS.build({"type": "effvit.FeaturePyramid", "backbone": "mobilevit_xxs", "extra": "on_lateral"})


# --- without MMDetection


def test_what_is_not_installed_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mmcv" else find_spec(name))
    with pytest.raises(ConfigError, match=r'needs mmcv-lite, not installed here: pip install "effvit\[mmdet\]"'):
        _requirements.require()


def test_versions_that_do_not_go_together(monkeypatch):
    def refuse(name):
        raise AssertionError("MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.")

    monkeypatch.setattr(_requirements.importlib, "import_module", refuse)
    with pytest.raises(ConfigError, match=r"do not go together: MMCV==2.2.0 .*effvit\[mmdet\]"):
        _requirements.require()
