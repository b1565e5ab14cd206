"""``effvit backbones``: what a person reads, and what a program does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from effvit.backbones import backbone_info, create_backbone, list_backbones


def line_of(out, name):
    return next(line for line in out.splitlines() if line.split() and line.split()[0] == name)


@pytest.fixture(scope="module")
def listed(cli):
    done = cli.run("backbones")
    assert done.code == 0, done.err
    return done.out


def test_every_backbone_is_listed_once_with_its_figures(listed):
    head = ""
    seen = []
    for line in listed.splitlines()[1:]:
        if not line.strip():
            continue
        if "Weights: " in line:
            head = line
            continue
        info = backbone_info(line.split()[0])
        seen.append(info.name)
        assert f" {info.params / 1e6:.2f} M " in line
        assert f" {info.macs / 1e9:.3f} G " in line
        assert (f" {info.top1} % " if info.top1 is not None else "  -  ") in line
        assert head.startswith(f"{info.family}, arXiv:{info.paper}. ")
        assert head.endswith(f"Weights: {info.licence}; {info.origin}")
    assert sorted(seen) == list_backbones()


def test_feature_maps_and_input_size_are_those_of_the_network(listed):
    for name in ("efficientvit_m0", list_backbones()[0], list_backbones()[-1]):
        network = create_backbone(name)
        channels, strides = (
            [str(getattr(spec, what)) for spec in network.feature_maps] for what in ("channels", "stride")
        )
        assert f"{', '.join(channels)} at {', '.join(strides)}" in line_of(listed, name)
        assert f" G  {network.input_spec.size[0]} " in line_of(listed, name)


def test_columns_align_and_fit(listed):
    rows = [line for line in listed.splitlines() if re.search(r"\d [MG] ", line)]
    for sign in (r" M ", r" G "):
        assert len({re.search(sign, line).end() for line in rows}) == 1
    assert max(map(len, listed.splitlines())) <= 140


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("efficientvit_m4", ["efficientvit_m4"]),
        ("efficientvit_m[12]", ["efficientvit_m1", "efficientvit_m2"]),
        ("vit_m", list_backbones("*vit_m*")),
        ("ViT_M4", ["efficientvit_m4"]),
        ("timm/efficientvit_m0", ["timm/efficientvit_m0"]),
        ("timm/resnet10*t", ["timm/resnet10t"]),
    ],
)
def test_a_pattern_filters(cli, pattern, expected):
    rows = json.loads(cli.run("backbones", pattern, "--json").out)
    assert sorted(row["name"] for row in rows) == expected
    assert len(expected) > 0


def test_programs_get_every_field(cli):
    (row,) = json.loads(cli.run("backbones", "efficientvit_m4", "--json").out)
    info = backbone_info("efficientvit_m4")
    assert set(row) == {
        "name", "family", "params", "macs", "top1", "top5", "paper", "source", "licence", "origin", "url", "page",
        "instead", "sha256", "feature_maps", "input",
    }  # fmt: skip
    assert {field: row[field] for field in ("params", "macs", "top1", "url", "licence")} == {
        "params": info.params, "macs": info.macs, "top1": info.top1, "url": info.url, "licence": info.licence,
    }  # fmt: skip
    assert row["feature_maps"][0] == {"level": "c4", "channels": 128, "stride": 16}
    assert row["input"]["size"] == [224, 224]


def test_many_networks_of_timm_are_only_named(cli):
    done = cli.run("backbones", "timm/resnet")
    assert "timm/resnet50" in done.out.splitlines()
    assert re.search(r"\d+ networks; .* 30 at most", done.err)
    assert {"name": "timm/resnet50"} in json.loads(cli.run("backbones", "timm/resnet", "--json").out)


def test_a_network_of_timm_that_is_no_backbone_says_why(cli):
    done = cli.run("backbones", "timm/vit_small_patch14_dinov2")
    assert done.code == 0
    assert "has maps of stride 14" in done.out


@pytest.mark.parametrize(
    ("typed", "meant"), [("efficentvit_m4", "'efficientvit_m4'"), ("timm/resnt50", "'timm/resnet50'"), ("*xyz*", "")]
)
def test_a_name_that_matches_nothing_offers_what_comes_close(cli, typed, meant):
    done = cli.run("backbones", typed)
    assert done.code == 2
    assert f"no backbone matches {typed!r}" in done.err
    assert meant in done.err
    assert len(done.err) < 1000


def test_listing_loads_nothing_that_makes_it_slow():
    code = (
        "import sys\nfrom effvit.cli import main\n"
        "try:\n    main(['backbones'])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'timm', 'lightning', 'torchvision', 'jsonargparse', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
