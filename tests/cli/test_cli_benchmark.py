"""``effvit benchmark``: what it prints and leaves, the protocols, and what it refuses."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from effvit._cli.subjects import named_subject, parse_spec
from effvit.backbones import list_backbones
from effvit.deploy.protocols import PROTOCOLS, Claim, Entry, Protocol
from effvit.deploy.records import Ratio, Record, Report
from effvit.deploy.reports import as_csv, as_markdown, protocol_markdown
from effvit.deploy.statistics import ratio, summarise
from effvit.errors import ConfigError

QUICK = "--rounds 2 --seconds 0.001 --no_memory".split()


def record(model, runtime, seconds, **changes):
    latency = summarise([[seconds, seconds, seconds * 1.5], [seconds, seconds]])
    plain = Record(
        model=model,
        runtime=runtime,
        precision="fp32",
        device="cpu",
        threads=1,
        batch=4,
        asked_batch=4,
        size=(64, 96),
        latency=latency,
        throughput=4 / latency.median,
        peak_memory=12_345_678,
        params=2_000_000,
        macs=79_000_000,
        error=3e-7,
        agreement=1.0,
        prepare_seconds=0.5,
        speedup=Ratio(2.0, (1.5, 2.5)),
    )
    return replace(plain, **changes)


def cells(markdown, row):
    """The row of a Markdown table that begins with a word, by column title."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    starts = [number for number, line in enumerate(lines) if set("".join(line)) <= set("-: ")]
    for start, stop in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        for line in lines[start + 1 : stop - 1]:
            if line[0] == row:
                return dict(zip(lines[start - 1], line, strict=True))
    raise AssertionError(row)


def test_the_table_says_what_a_record_holds():
    report = Report((record("net", "eager", 0.010, note="special", accuracy=70.3, accuracy_name="top-1"),), {})
    found = cells(as_markdown(report), "net")
    assert found["latency ms"] == "10"
    assert found["img/s"] == "400"
    assert found["memory MB"] == "12.3"
    assert found["times as fast as eager"] == "2.00 (1.50 to 2.50)"
    assert found["accuracy"] == "70.3"
    assert found["size"] == "64x96"
    assert "special" in as_markdown(report)


def test_what_could_not_be_measured_is_a_dash_with_its_reason():
    missing = record(
        "net", "onnx", 1.0, latency=None, throughput=None, speedup=None, error=None, note="no such operator"
    )
    text = as_markdown(Report((missing,), {}))
    assert cells(text, "net")["latency ms"] == "-"
    assert "no such operator" in text
    rows = list(csv.DictReader(as_csv(Report((missing,), {})).splitlines()))
    assert rows[0]["latency_median"] == ""
    assert rows[0]["note"] == "no such operator"


def test_a_protocol_puts_published_figures_and_ratios_beside_the_measured_ones():
    fast, slow = record("fast", "torchscript", 0.002), record("slow", "torchscript", 0.008)
    other = record("fast", "eager", 0.004)
    protocol = Protocol(
        "p", "cpu", 4, 1, "fp32", "torchscript", ("eager",), "img/s", "a device", (Entry("fast", 228.4), Entry("slow")),
        (Claim("fast", "slow", 3.7, "a paper"), Claim("fast", "unmeasured", 2.0, "a paper")), "a paper",
    )  # fmt: skip
    text = protocol_markdown(protocol, Report((fast, slow, other), {}))
    row = cells(text, "fast")
    assert (row["published img/s"], row["torchscript img/s"], row["eager img/s"]) == ("228", "2000", "1000")
    assert cells(text, "slow")["eager img/s"] == "-"
    claim = cells(text, "fast / slow")
    assert claim["published"] == "3.70"
    assert claim["torchscript"].startswith(f"{ratio(slow.latency.rounds, fast.latency.rounds).value:.2f} (")
    assert claim["torchscript"].startswith("4.00")
    assert claim["eager"] == "-"
    assert "unmeasured" not in text


def test_batches_that_differ_are_not_compared():
    fast, slow = record("fast", "eager", 0.002), record("slow", "eager", 0.008, batch=2)
    claim = Claim("fast", "slow", 3.7, "a paper")
    protocol = replace(PROTOCOLS["efficientvit-cpu"], entries=(), claims=(claim,))
    text = protocol_markdown(protocol, Report((fast, slow), {}))
    assert cells(text, "fast / slow")["eager"] == "-"
    assert cells(text, "slow")["eager img/s"].endswith("(batch 2)")


def test_every_network_of_a_protocol_exists():
    timm = pytest.importorskip("timm")
    for protocol in PROTOCOLS.values():
        models = {entry.model for entry in protocol.entries}
        for claim in protocol.claims:
            assert {claim.model, claim.baseline} <= models
        for name in {parse_spec(model).name for model in models}:
            assert name in list_backbones() or timm.is_model(name.removeprefix("timm/"))


@pytest.mark.parametrize(
    ("text", "name", "size", "options"),
    [
        ("efficientvit_m0", "efficientvit_m0", None, {}),
        ("mobilevit_xxs@256", "mobilevit_xxs", (256, 256), {}),
        ("a@64x96:keep_ratio=0.5,x=true", "a", (64, 96), {"keep_ratio": 0.5, "x": True}),
    ],
)
def test_a_network_is_written_with_size_and_options(text, name, size, options):
    spec = parse_spec(text)
    assert (spec.name, spec.size, spec.options) == (name, size, options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a@16", "at least 32"),
        ("a@64x", "HEIGHTxWIDTH"),
        ("a@64x64x64", "height and width"),
        ("a:keep_ratio", "name=value"),
    ],
)
def test_a_network_that_is_written_badly_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_spec(text)


def test_options_of_the_command_line_reach_the_network():
    dense, sparse = (
        named_subject(parse_spec(f"dynamicvit_tiny@64:keep_ratio={ratio}"), "classifier", None) for ratio in (1.0, 0.5)
    )
    assert dense.module.backbone is not None
    assert len(list(sparse.module.parameters())) > len(list(dense.module.parameters()))
    assert sparse.make_inputs(3)[0].shape == (3, 3, 64, 64)


def test_accuracy_belongs_to_the_published_size_only():
    assert named_subject(parse_spec("efficientvit_m0"), "classifier", None).accuracy == 63.2
    assert named_subject(parse_spec("efficientvit_m0@64"), "classifier", None).accuracy is None
    assert named_subject(parse_spec("efficientvit_m0"), "backbone", None).accuracy is None


def test_networks_are_measured_and_written_down(cli, tmp_path):
    models, runtimes = ("efficientvit_m0@64", "mobilevit_xxs@64"), ("eager", "fused")
    done = cli.run("benchmark", *models, "--runtimes", *runtimes, *QUICK, "--output", tmp_path)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "benchmark.json").read_text())
    found = [(entry["model"], entry["runtime"]) for entry in report["records"]]
    assert found == [
        (model, runtime) for model in ("efficientvit_m0@64", "mobilevit_xxs@64") for runtime in ("eager", "fused")
    ]
    for entry in report["records"]:
        assert len(entry["latency"]["rounds"]) == 2
        assert entry["latency"]["median"] > 0
        assert entry["threads"] == 1
    assert report["command"].startswith("effvit benchmark efficientvit_m0@64")
    assert report["environment"]["processor"]
    assert "efficientvit_m0@64" in done.out
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "benchmark.csv").read_text().splitlines()) == 5


def test_a_run_is_measured_with_its_parts(cli, tiny_run, tmp_path):
    done = cli.run("benchmark", "--checkpoint", tiny_run, "--runtimes", "eager", *QUICK, "--output", tmp_path)
    assert done.code == 0, done.err
    [entry] = json.loads((tmp_path / "benchmark.json").read_text())["records"]
    assert entry["model"] == "tiny/best"
    assert 0 <= entry["accuracy"] <= 100
    assert set(entry["parts"]) == {"pre-processing", "backbone", "pyramid", "heads", "post-processing"}
    assert all(seconds > 0 for seconds in entry["parts"].values())


def test_a_profile_is_written(cli, tmp_path):
    done = cli.run("benchmark", "efficientvit_m0@64", "--profile", "--output", tmp_path)
    assert done.code == 0, done.err
    [path] = tmp_path.glob("profile_*.json")
    profile = json.loads(path.read_text())
    assert sum(profile["work"].values()) == pytest.approx(1)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "Memory-bound work" in done.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name networks"),
        (["efficientvit_m00"], "efficientvit_m0"),
        (["efficientvit_m0", "efficientvit_m0"], "twice"),
        (["efficientvit_m0", "--runtimes", "eagre"], "eager"),
        (["efficientvit_m0", "--precisions", "fp8"], "fp8"),
        (["efficientvit_m0", "--kind", "retina"], "retinanet"),
        (["--protocol", "efficientvit"], "efficientvit-cpu"),
        (["dynamicvit_tiny:keep=1"], "keep_ratio"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
        (["efficientvit_m0", "--image_size", "big"], "--image_size"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, says, cli):
    done = cli.run("benchmark", *words, *QUICK)
    assert done.code in (1, 2)
    assert says in done.err


def test_a_gpu_that_is_not_there_is_named(cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli.run("benchmark", "--protocol", "efficientvit-gpu", "efficientvit_m0@64", *QUICK)
    assert done.code == 2
    assert "CUDA" in done.err


def test_a_protocol_with_other_options_says_that_it_departs(cli, tmp_path):
    words = "--protocol efficientvit-cpu efficientvit_m0@64 --runtimes eager --batch_sizes 2".split()
    done = cli.run("benchmark", *words, *QUICK, "--output", tmp_path)
    assert done.code == 0, done.err
    assert "departs from the protocol: --batch_sizes 2 for 16" in done.err
    assert "Protocol efficientvit-cpu" in (tmp_path / "benchmark.md").read_text()


def test_options_that_would_be_ignored_are_refused(cli):
    for words in (
        "efficientvit_m0 --profile --runtimes eager",
        "efficientvit_m0 --profile --protocol efficientvit-cpu",
        "--protocol mobile --batch_sizes 2",
        "--protocol efficientvit-cpu --batch_sizes 1 2",
        "--protocol efficientvit-cpu --kind backbone",
    ):
        done = cli.run("benchmark", *words.split())
        assert done.code == 2, words
        assert "--" in done.err


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "ssdlite"])
def test_a_detector_of_random_weights_finds_objects(kind):
    """Else there would be nothing to suppress, and nothing to compare runtimes by."""
    backbone = "mobilevit_xxs" if kind == "ssdlite" else "efficientvit_m0"
    subject = named_subject(parse_spec(f"{backbone}@64"), kind, None)
    with torch.no_grad():
        labels = subject.module(*subject.make_inputs(1))[2]
    assert (labels >= 0).sum() > 10
    assert len(labels.unique()) > 2


def test_an_interrupted_command_says_so_in_one_line(cli, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("effvit.deploy.benchmark.benchmark", interrupt)
    done = cli.run("benchmark", "efficientvit_m0@64", "--runtimes", "eager")
    assert (done.code, done.err.strip().splitlines()[-1]) == (130, "effvit: interrupted")


def test_the_lists_name_every_runtime_and_protocol(cli):
    from effvit.deploy.runtimes import RUNTIMES

    done = cli.run("benchmark", "--list")
    assert done.code == 0
    for name in (*RUNTIMES, *PROTOCOLS):
        assert name in done.out


def test_mobile_writes_files_and_runs_those_that_run(monkeypatch, tmp_path):
    """With formats that stand in for CoreML and ExecuTorch: real ones take minutes."""
    from effvit._cli import mobile
    from effvit.deploy.formats import FORMATS

    traced = FORMATS["torchscript"]
    elsewhere = replace(traced, name="coreml", runs_here=lambda: False)
    monkeypatch.setitem(FORMATS, "coreml", elsewhere)
    monkeypatch.setattr(mobile, "_installed", lambda: [traced, elsewhere])
    report = mobile.measure_mobile([parse_spec("efficientvit_m0@64")], tmp_path, rounds=2, seconds=0.001)
    here, there = report.records
    assert here.latency is not None
    assert here.error is not None
    assert there.latency is None
    assert "macOS" in there.note
    assert list(tmp_path.glob("efficientvit_m0_64.*"))


def test_neither_format_for_telephones_installed_names_both_extras(monkeypatch, tmp_path):
    from effvit._cli import mobile

    def refuse(entry):
        raise ConfigError(f'pip install "effvit[{entry.extra}]"')

    monkeypatch.setattr("effvit.deploy.formats.check_writable", refuse)
    with pytest.raises(ConfigError, match=r"coreml.*executorch"):
        mobile.measure_mobile([SimpleNamespace()], tmp_path, rounds=1, seconds=0.001)
