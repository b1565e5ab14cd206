"""``effvit tables segmentation``: published numbers against those of runs, and what the networks cost."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml

from effvit._cli import tables as module
from effvit._cli.segmentation_rows import DATA_SETS, ROWS
from effvit._cli.shipped import merged_config, shipped_configs
from effvit._cli.table_costs import Cost

L1, XXS = "efficientformer_l1", "mobilevit_xxs"


@pytest.fixture
def uncounted(monkeypatch):
    """Rows without building their networks, which takes a second each."""
    cost = Cost(11_000_000, 15_470_000, 6_500_000_000, 30_100_000_000)
    monkeypatch.setattr(module, "_count", lambda table, row: cost)


def write_run(folder, backbone, metrics, *, data=None, trainer=None, model=None, images=None, classes=None, log=True):
    """What ``effvit test -c segmentation/...`` of a row leaves."""
    (row,) = (row for row in ROWS if row.backbone == backbone)
    config = merged_config(shipped_configs()[row.config])
    config["model"]["init_args"] |= model or {}
    config["data"]["init_args"] |= data or {}
    config["trainer"] |= trainer or {}
    found = DATA_SETS[row.data_set]
    images, classes = images or found.images, classes or found.classes
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    said = f"2026-01-01 00:00:00 INFO val split: {images} of {images} images, {classes} categories\n"
    (folder / "log.txt").write_text(said if log else "2026-01-01 00:00:00 INFO effvit 0.1.0\n")


def metrics_of(miou, stage="test"):
    return {f"{stage}/mIoU": miou, f"{stage}/mAcc": miou + 0.1, f"{stage}/aAcc": miou + 0.3}


def rows_of(cli, *words):
    done = cli.run("tables", "segmentation", *words, "--format", "json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    return {row["backbone"]: row for row in content["rows"]}, content["left_out"]


def test_published_numbers_are_printed_with_who_published_them(cli, uncounted):
    done = cli.run("tables", "segmentation")
    assert done.code == 0, done.err
    lines = {line.split("|")[1].strip(): line for line in done.out.splitlines() if line.startswith("| ")}
    cells = {name: [cell.strip() for cell in line.split("|")[1:-1]] for name, line in lines.items()}
    assert cells[L1] == [L1, "11.00", "15.47", "6.50", "30.1", "authors", "38.9", "-", "-", "folder"]
    assert cells["efficientformerv2_s0"][5:] == ["not published", "-", "-", "-", "none"]
    assert cells[XXS][5:] == ["authors", "73.6", "-", "-", "file"]
    for title in ("## Semantic FPN on ADE20K, 512x512", "## DeepLabv3 on PASCAL VOC 2012, 512x512"):
        assert title in done.out
    assert f"- {XXS}: 1.9 M parameters published" in done.out
    assert "one multiply-accumulate is one FLOP" in done.out


def test_what_runs_reached_stands_under_what_was_published(cli, uncounted, tmp_path):
    write_run(tmp_path / "old", L1, metrics_of(0.2, "val"))
    write_run(tmp_path / "best" / "test", L1, metrics_of(0.39123))
    write_run(tmp_path / "unpublished", "efficientformerv2_s1", metrics_of(0.4))
    rows, left_out = rows_of(cli, "--results", tmp_path)
    assert left_out == []
    found = rows[L1]
    assert (found["runs"], found["run"]) == (2, str(tmp_path / "best" / "test"))
    assert (found["published_mIoU"], found["measured_mIoU"], found["difference_mIoU"]) == (38.9, 39.123, 0.223)
    assert (found["published_aAcc"], found["measured_aAcc"], found["difference_aAcc"]) == (None, 69.123, None)
    assert rows["efficientformerv2_s1"]["measured_mIoU"] == 40
    text = cli.run("tables", "segmentation", "efficientformer", "--results", tmp_path).out
    table = [[cell.strip() for cell in line.split("|")[6:10]] for line in text.splitlines() if line.startswith("|")]
    assert table[2:5] == [
        ["authors", "38.9", "-", "-"],
        ["measured", "39.1", "49.1", "69.1"],
        ["difference", "+0.2", "-", "-"],
    ]
    assert f"measured in {tmp_path / 'best' / 'test'}, the best of 2" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": 50}, "other data than ADE20K's validation images: 50 images, 150 categories"),
        ({"classes": 133}, "other data than ADE20K's validation images: 2000 images, 133 categories"),
        ({"log": False}, "not known to be ADE20K"),
        ({"data": {"image_size": [640, 480]}}, "image_size is [640, 480], published [2048, 512]"),
        ({"data": {"resize": "squash"}}, "resize is squash, published align"),
        ({"trainer": {"limit_test_batches": 10}}, "a part of the images only (limit_test_batches: 10)"),
        ({"model": {"pyramid_channels": 64}}, "another network: pyramid_channels is 64"),
        ({"model": {"head_channels": 64}}, "another network: head_channels is 64"),
        ({"model": {"backbone_options": None}}, "backbone_options are none, published {'official_grid': 16}"),
        ({"model": {"flip_test": True}}, "another inference: flip_test is True, published False"),
        ({"model": {"test_scales": [0.5, 1.0]}}, "another inference: test_scales is [0.5, 1.0], published [1.0]"),
        ({"model": {"head": "deeplabv3"}}, "deeplabv3 on efficientformer_l1 is no row of the table"),
    ],
)
def test_an_evaluation_of_something_else_is_not_passed_off_as_the_published(cli, uncounted, tmp_path, change, reason):
    write_run(tmp_path / "run", L1, metrics_of(0.9), **change)
    rows, left_out = rows_of(cli, L1, "--results", tmp_path)
    assert rows[L1]["measured_mIoU"] is None
    assert [entry["folder"] for entry in left_out] == [str(tmp_path / "run")]
    assert reason in left_out[0]["reason"]


def test_csv_has_the_rows_of_json(cli, uncounted, tmp_path):
    write_run(tmp_path / "run", XXS, metrics_of(0.7))
    done = cli.run("tables", "segmentation", "--results", tmp_path, "--format", "csv")
    assert done.code == 0, done.err
    table = {row["backbone"]: row for row in csv.DictReader(io.StringIO(done.out))}
    rows, _ = rows_of(cli, "--results", tmp_path)
    assert len(table) == len(ROWS)
    assert float(table[XXS]["measured_mIoU"]) == rows[XXS]["measured_mIoU"] == 70
    assert set(table[XXS]) == set(rows[XXS])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segmentatoin"], "Did you mean 'segmentation'?"),
        (["segmentation", "efficientformer_l2"], "has no backbone 'efficientformer_l2'. Did you mean"),
        (["segmentation", "mobilevit", "--head", "semantic_fpn"], "Its rows are under --head deeplabv3"),
        (["segmentation", "--head", "deeplab"], "has no head 'deeplab'. Did you mean 'deeplabv3'?"),
        (["segmentation", "--detector", "retinanet"], "that of segmentation is chosen from with --head"),
        (["coco", "--head", "deeplabv3"], "that of coco is chosen from with --detector"),
    ],
)
def test_mistakes_are_explained(cli, uncounted, words, message):
    done = cli.run("tables", *words)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(row.backbone, marks=[] if row.backbone == XXS else pytest.mark.slow)
        for row in ROWS
        if row.data_set == "voc"
    ],
)
def test_deeplabv3_has_the_parameters_of_the_published_table(cli, backbone):
    (row,) = (row for row in ROWS if row.backbone == backbone)
    found = rows_of(cli, backbone)[0][backbone]
    assert abs(found["params"] / 1e6 - row.params) <= 0.051
    if backbone == "mobilevit_s":
        assert found["params"] == 6_357_941
    assert 0 < found["backbone_macs"] < found["macs"]
