"""``effvit tables coco``: published numbers against those of runs, and what the detectors cost."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest
import yaml

from effvit._cli import table_runs
from effvit._cli import tables as module
from effvit._cli.coco_rows import ROWS
from effvit._cli.shipped import merged_config, shipped_configs
from effvit._cli.table_costs import Cost
from effvit.datamodules import CocoDetection

M4 = "retinanet_efficientvit_m4"


@pytest.fixture
def uncounted(monkeypatch):
    """Rows without building their networks, which takes a second each."""
    monkeypatch.setattr(
        module, "_count", lambda table, row: Cost(8_000_000, 18_587_164, 2_000_000_000, 157_513_441_536)
    )


def write_run(
    folder, row, metrics, *, data=None, trainer=None, model=None, images=5000, categories=80, log=True, said=""
):
    """What ``effvit test -c detection/coco/ROW`` leaves; ``said`` goes first into its log."""
    config = merged_config(shipped_configs()[f"detection/coco/{row}"])
    config["model"]["init_args"] |= model or {}
    config["data"]["init_args"] |= data or {}
    config["trainer"] |= trainer or {}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    said += f"2026-01-01 00:00:00 INFO val split: {images} of {images} images, {categories} categories\n"
    (folder / "log.txt").write_text(said if log else "2026-01-01 00:00:00 INFO effvit 0.1.0\n")


def metrics_of(ap, *, stage="test", masks=False):
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1")
    found = {f"{stage}/{name}": ap for name in names}
    return found | ({f"{stage}/mask_{name}": ap - 0.02 for name in names} if masks else {})


def rows_of(cli, *words):
    done = cli.run("tables", "coco", *words, "--format", "json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    return {f"{row['detector']}_{row['backbone']}": row for row in content["rows"]}, content["left_out"]


def test_published_numbers_are_printed_with_who_published_them(cli, uncounted):
    done = cli.run("tables", "coco")
    assert done.code == 0, done.err
    lines = {line.split("|")[1].strip(): line for line in done.out.splitlines() if line.startswith("| ")}
    cells = {name: [cell.strip() for cell in line.split("|")[1:-1]] for name, line in lines.items()}
    assert cells["efficientformer_l1"][1:5] == ["8.00", "18.59", "2.00", "157.5"]
    assert cells["efficientformer_l1"][5:] == (
        ["authors", "37.9", "60.3", "41.0", "-", "-", "-", "35.4", "57.3", "37.3", "folder"]
    )
    assert cells["efficientformer_l7"][5] == "unconfirmed"
    assert cells["efficientvit_m5"][5] == "LSNet paper"
    assert cells["efficientvit_m0"][5:] == ["not published", *["-"] * 9, "none"]
    assert cells["mobilevitv2_100"][5:7] == ["authors", "26.47"]
    assert [cells[name][-1] for name in ("mobilevitv2_100", "efficientformerv2_s2")] == ["file", "none"]
    for title in ("## RetinaNet, 1280x800", "## Mask R-CNN, 1280x800", "## SSDLite, 320x320"):
        assert title in done.out
    assert "one multiply-accumulate is one FLOP" in done.out
    assert "releases/download/v1.0/mask_rcnn_efficientvit_m4_fpn_1x_coco.pth" in done.out
    for table in done.out.split("## ")[1:]:
        assert len({len(line) for line in table.splitlines() if line.startswith("|")}) == 1


def test_numbers_are_consistent():
    for row in ROWS:
        numbers = row.published
        assert row.checkpoint is None or row.checkpoint.startswith("https://")
        if numbers is None:
            continue
        assert len(numbers.box) == 6
        assert len(numbers.mask) == (3 if row.detector == "mask_rcnn" else 0)
        assert numbers.source
        for ap, ap50, ap75 in filter(None, (numbers.box[:3], numbers.mask)):
            assert ap is not None
            assert ap50 is None or ap75 < ap50 > ap


def test_what_runs_reached_stands_under_what_was_published(cli, uncounted, tmp_path):
    write_run(tmp_path / "runs" / "old", M4, metrics_of(0.2, stage="val"))
    write_run(tmp_path / "runs" / "best" / "test", M4, metrics_of(0.33123))
    write_run(tmp_path / "more" / "mask", "mask_rcnn_efficientvit_m4", metrics_of(0.3, masks=True))
    rows, left_out = rows_of(cli, "*_m4", "--results", tmp_path / "runs", tmp_path / "more")
    assert left_out == []
    found = rows[M4]
    assert (found["runs"], found["run"]) == (2, str(tmp_path / "runs" / "best" / "test"))
    assert (found["published_AP"], found["measured_AP"], found["difference_AP"]) == (32.7, 33.123, 0.423)
    assert found["measured_mask_AP"] is None
    masks = rows["mask_rcnn_efficientvit_m4"]
    assert (masks["published_mask_AP"], masks["measured_mask_AP"], masks["difference_mask_AP"]) == (31.0, 28.0, -3.0)
    assert (masks["published_APs"], masks["measured_APs"], masks["difference_APs"]) == (None, 30.0, None)
    text = cli.run("tables", "coco", "*_m4", "--detector", "retinanet", "--results", tmp_path).out
    assert [line.split("|")[6:8] for line in text.splitlines() if line.startswith("|")][2:] == [
        [" authors    ", " 32.7 "],
        [" measured   ", " 33.1 "],
        [" difference ", " +0.4 "],
    ]
    assert f"measured in {tmp_path / 'runs' / 'best' / 'test'}, the best of 2" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": 50}, "other data than COCO's validation images: 50 images, 80 categories"),
        ({"categories": 3}, "other data than COCO's validation images: 5000 images, 3 categories"),
        ({"log": False}, "not known to be COCO"),
        ({"data": {"image_size": [640, 480]}}, "image_size is [640, 480], published [1333, 800]"),
        ({"trainer": {"limit_test_batches": 10}}, "a part of the images only (limit_test_batches: 10)"),
        ({"model": {"pyramid_channels": 64}}, "another network: pyramid_channels is 64, published 256"),
        ({"model": {"backbone_options": {"dense": True}}}, "backbone_options are {'dense': True}, published none"),
        ({"model": {"score_threshold": 0.5}}, "other limits: score_threshold is 0.5, published 0.05"),
        ({"model": {"nms_threshold": 0.7}}, "other limits: nms_threshold is 0.7, published 0.5"),
        ({"model": {"detections_per_image": 3}}, "other limits: detections_per_image is 3, published 100"),
        ({"model": {"backbone": "timm/resnet50"}}, "retinanet on timm/resnet50 is no row of the table"),
    ],
)
def test_an_evaluation_of_something_else_is_not_passed_off_as_coco(cli, uncounted, tmp_path, change, reason):
    write_run(tmp_path / "run", M4, metrics_of(0.9), **change)
    rows, left_out = rows_of(cli, "efficientvit_m4", "--results", tmp_path)
    assert rows[M4]["measured_AP"] is None
    assert [entry["folder"] for entry in left_out] == [str(tmp_path / "run")]
    assert reason in left_out[0]["reason"]
    text = cli.run("tables", "coco", "efficientvit_m4", "--results", tmp_path).out
    assert f"- {tmp_path / 'run'}: {left_out[0]['reason']}" in text
    assert "90.0" not in text


READ = "2026-01-01 00:00:00 INFO backbone options with those of the weights: "


@pytest.mark.parametrize(
    ("row", "model", "said", "counts"),
    [
        ("mask_rcnn_efficientformer_l1", {}, "", True),
        ("mask_rcnn_efficientformer_l1", {"backbone_options": None}, "", False),
        ("mask_rcnn_efficientformer_l1", {"backbone_options": None}, READ + '{"official_grid": 25}\n', True),
        ("mask_rcnn_efficientformer_l1", {"backbone_options": None}, READ + '{"official_grid": 12}\n', False),
        ("mask_rcnn_efficientformer_l1", {"score_threshold": 0.05, "detections_per_image": 100}, "", True),
        ("ssdlite_mobilevit_s", {"backbone_options": None, "score_threshold": 0.01}, "", True),  # dropout only trains
    ],
)
def test_the_published_network_counts_whoever_named_its_options(cli, uncounted, tmp_path, row, model, said, counts):
    write_run(tmp_path / "run", row, metrics_of(0.3), model=model, said=said)
    rows, left_out = rows_of(cli, "--results", tmp_path)
    assert (rows[row]["measured_AP"] is not None) is counts
    assert ["another network: backbone_options are" in entry["reason"] for entry in left_out] == [True] * (not counts)


def test_the_log_says_what_options_the_weights_told(monkeypatch, caplog):
    """The line of a real detector is the one that is looked for."""
    from effvit.tasks import detection

    monkeypatch.setattr(detection, "read_published", lambda *_: {})
    monkeypatch.setattr(detection, "backbone_options_in", lambda state, name: {"dropout": 0.25})
    monkeypatch.setattr(detection.Detection, "_load_published", lambda self, state, path: None)
    with caplog.at_level("INFO", logger="effvit"):
        detection.Detection("mobilevit_xxs", {1: "disc"}, detector="ssdlite", checkpoint="file.pth")
    assert table_runs.OPTIONS_READ.findall("\n".join(caplog.messages)) == ['{"dropout": 0.25}']


def test_the_log_says_what_was_evaluated(coco_root, caplog):
    """The line of a real data module is the one that is looked for."""
    with caplog.at_level("INFO", logger="effvit"):
        CocoDetection(str(coco_root)).setup("validate")
    assert table_runs.SPLIT_READ.findall("\n".join(caplog.messages)) == [("val", "6", "6", "3")]


def test_rows_that_were_not_asked_for_are_no_strangers(cli, uncounted, tmp_path):
    write_run(tmp_path / "run", M4, metrics_of(0.3))
    assert rows_of(cli, "mobilevit_s", "--results", tmp_path)[1] == []


def test_other_runs_are_passed_over(cli, uncounted, tmp_path):
    for name, text in (("digits", '{"val/top1": 0.9}'), ("nothing", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    write_run(tmp_path / "bare", M4, metrics_of(0.3))
    (tmp_path / "bare" / "config.yaml").unlink()
    _, left_out = rows_of(cli, "efficientvit_m4", "--results", tmp_path)
    assert [(entry["folder"], "no config.yaml" in entry["reason"]) for entry in left_out] == [
        (str(tmp_path / "bare"), True)
    ]


def test_csv_has_the_rows_of_json(cli, uncounted, tmp_path):
    write_run(tmp_path / "run", M4, metrics_of(0.3))
    words = ("tables", "coco", "--results", tmp_path, "--format", "csv", "--output", tmp_path / "new" / "coco.csv")
    done = cli.run(*words)
    assert (done.code, done.out) == (0, f"{len(ROWS)} rows in {tmp_path / 'new' / 'coco.csv'}\n")
    table = list(csv.DictReader(io.StringIO((tmp_path / "new" / "coco.csv").read_text())))
    rows, _ = rows_of(cli, "--results", tmp_path)
    assert [{**row, "runs": int(row["runs"])} for row in table] == [
        {name: value if name == "runs" else "" if value is None else str(value) for name, value in row.items()}
        for row in rows.values()
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coc"], "there is no table 'coc'. Did you mean 'coco'?"),
        (["coco", "efficentvit_m4"], "has no backbone 'efficentvit_m4'. Did you mean 'efficientvit_m4'"),
        (
            ["coco", "mobilevit_s", "--detector", "retinanet"],
            "'mobilevit_s' under RetinaNet. Its rows are under --detector ssdlite",
        ),
        (["coco", "efficientformer", "--detector", "retinanet"], "Its rows are under --detector mask_rcnn"),
        (["coco", "efficentvit_m4", "--detector", "retinanet"], "Did you mean 'efficientvit_m4'"),
        (["coco", "--detector", "maskrcnn"], "has no detector 'maskrcnn'. Did you mean 'mask_rcnn'?"),
        (["coco", "--results", "rnus"], "--results rnus: there is no such folder. Did you mean 'runs'?"),
        (["coco", "--results", "runs"], "metrics.json cannot be read as JSON"),
        (["coco", "--results", "listed"], "metrics.json holds no metrics"),
        (["coco", "--results", "torn"], "config.yaml cannot be read as YAML"),
        (["coco", "efficientvit_m4", "--output", "runs"], "--output runs cannot be written"),
    ],
)
def test_mistakes_are_explained(cli, uncounted, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "torn", M4, metrics_of(0.3))
    shutil.copytree("torn", "runs")
    shutil.copytree("torn", "listed")
    (tmp_path / "runs" / "metrics.json").write_text('{"test/AP": 0.3')
    (tmp_path / "listed" / "metrics.json").write_text("[0.3]")
    (tmp_path / "torn" / "config.yaml").write_text("model: {init_args: [")
    done = cli.run("tables", *words)
    assert done.code == 2
    assert message in done.err


def test_a_table_for_programs_says_aloud_what_it_leaves_out(cli, uncounted, tmp_path):
    write_run(tmp_path / "run", M4, metrics_of(0.3), images=50)
    done = cli.run("tables", "coco", "*_m4", "--results", tmp_path, "--format", "csv")
    assert done.code == 0
    assert f"not in the table: {tmp_path / 'run'}: other data than COCO's validation images: 50 images" in done.err
    assert len(done.out.splitlines()) == 3


def test_costs_are_counted_from_the_network(cli):
    """Backbone: 2.3 M parameters with its classifier, which no detector has; head and pyramid add the rest."""
    rows, _ = rows_of(cli, "efficientvit_m0", "--detector", "retinanet")
    found = rows["retinanet_efficientvit_m0"]
    assert (found["image_height"], found["image_width"]) == (800, 1280)
    assert 2.1e6 < found["backbone_params"] < 2.3e6
    assert found["backbone_macs"] < 0.1 * found["macs"]
    # 9 anchors, 80 classes, four 3x3 convolutions of 256 channels in each of two branches, and the cells of all levels.
    cells = sum(-(-800 // stride) * -(-1280 // stride) for stride in (8, 16, 32, 64, 128))
    head = cells * 9 * 256 * (8 * 256 + 9 * (80 + 4))
    assert 0 < found["macs"] - found["backbone_macs"] - head < 0.15 * head


@pytest.mark.slow
def test_the_cost_of_the_published_network_is_known_to_the_digit(cli):
    found = rows_of(cli, "efficientvit_m4", "--detector", "retinanet")[0][M4]
    assert 8.3e6 < found["backbone_params"] < 8.8e6
    assert found["params"] == 18_587_164


#: Parameters as the authors print them, in millions with one decimal; MobileViT's, counted, are known to the digit.
SSDLITE = [
    pytest.param(row.backbone, marks=[] if row.backbone == "mobilevit_xxs" else pytest.mark.slow)
    for row in ROWS
    if row.detector == "ssdlite"
]
COUNTED = {"mobilevit_xxs": 1_755_050, "mobilevit_xs": 2_742_042, "mobilevit_s": 5_738_826}


@pytest.mark.parametrize("backbone", SSDLITE)
def test_ssdlite_has_the_parameters_of_the_published_table(cli, backbone):
    (row,) = (row for row in ROWS if row.backbone == backbone)
    found = rows_of(cli, backbone)[0][f"ssdlite_{backbone}"]
    assert abs(found["params"] / 1e6 - row.params) <= 0.051
    assert found["params"] == COUNTED.get(backbone, found["params"])
