"""The engine: everything is checked before it counts, timed in the same rounds, and told why where it is not."""

from __future__ import annotations

import gc
import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from effvit.backbones import create_classifier
from effvit.deploy import _fit, timing
from effvit.deploy import benchmark as engine
from effvit.deploy._fit import PeakOfTensors, fitting_batch, is_out_of_memory, largest_fitting
from effvit.deploy.benchmark import benchmark
from effvit.deploy.environment import allocator
from effvit.deploy.flops import count_macs
from effvit.deploy.records import Subject
from effvit.deploy.runtimes import RUNTIMES, Prepared, Runtime, Setting
from effvit.deploy.statistics import ratio
from effvit.errors import ConfigError, ExportError

QUICK = {"rounds": 3, "seconds": 0.0, "memory": False}
SIDE = 16


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """What settles when is a test of its own, and so is rubbish: here they would be most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "warm_up", lambda call, device: timing.warm_up(call, device, window=0.0, tolerance=9.0))
        patch.setattr(gc, "collect", lambda: 0)
        yield


def make_subject(name="small", channels=4, **more):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Flatten(), nn.Linear(channels * SIDE**2, 5))
    return Subject(name, network.eval(), (SIDE, SIDE), make_images, **more)


def make_images(batch):
    return (torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture
def add_runtime(monkeypatch):
    """Adds a runtime whose ``prepare`` is the function given, for the time of a test."""

    def add(name, prepare, precisions=("fp32",)):
        runtime = Runtime(name, "of a test", None, (), {"cpu": precisions}, prepare)
        monkeypatch.setitem(RUNTIMES, name, runtime)

    return add


def as_eager(module, inputs, setting):
    """What eager gives, with the numbers of the test's own choice."""

    def run():
        with torch.no_grad():
            return module(*inputs)

    return Prepared(run, lambda: [run()], names=["output"])


@pytest.fixture(scope="module")
def report():
    subjects = [make_subject(accuracy=50.0, accuracy_name="top-1"), make_subject("large", 32)]
    return benchmark(subjects, runtimes=["eager", "channels_last"], batches=[1, 3], **QUICK)


def test_records_are_in_the_order_of_the_networks(report):
    assert [(own.model, own.batch, own.runtime) for own in report.records] == [
        (model, batch, runtime)
        for model in ("small", "large")
        for batch in (1, 3)
        for runtime in ("eager", "channels_last")
    ]


def test_a_record_says_all(report):
    first, second, third, *_ = report.records
    assert (first.precision, first.device, first.threads, first.size) == ("fp32", "cpu", 1, (SIDE, SIDE))
    assert [len(samples) for samples in first.latency.rounds] == [1, 1, 1]
    assert third.batch == third.asked_batch == 3
    assert third.throughput == pytest.approx(3 / third.latency.median)
    assert first.params == 4 * 28 + 5 * (4 * SIDE**2 + 1)
    assert first.macs == third.macs == SIDE**2 * 4 * 27 + 5 * 4 * SIDE**2
    assert (first.error, first.agreement) == (0.0, None)  # too few images for a share to say something
    assert 0 <= second.error < 1e-5
    assert (first.speedup.value, first.speedup.ci95) == (1.0, (1.0, 1.0))
    assert second.speedup == ratio(first.latency.rounds, second.latency.rounds)
    assert second.prepare_seconds > 0
    assert (first.accuracy, first.accuracy_name, first.peak_memory, first.note) == (50.0, "top-1", None, "")
    assert report.environment["threads"] == 1


def test_threads_are_as_before_afterwards():
    torch.set_num_threads(2)
    try:
        report = benchmark([make_subject()], threads=1, **QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert report.records[0].threads == 1


def test_everything_of_a_batch_is_timed_in_the_same_rounds(add_runtime):
    """Networks and runtimes take turns, and a batch is over before the next is made ready."""
    events = []

    def prepare(module, inputs, setting):
        events.append("prepare")
        found = as_eager(module, inputs, setting)
        return replace(found, run=lambda: events.append(f"{module[0].out_channels}x{len(inputs[0])}"))

    add_runtime("noted", prepare)
    benchmark([make_subject(), make_subject("large", 8)], runtimes=["noted"], batches=[1, 2], **QUICK)
    text = " ".join(events)
    assert re.fullmatch(
        r"prepare prepare (4x1 )+(8x1 )+(4x1 )+8x1 8x1 8x1 4x1 4x1 8x1 prepare prepare (4x2 )+(8x2 )+.*4x2 8x2", text
    ), text


def test_a_runtime_that_disagrees_is_refused_with_its_worst_tensor(add_runtime):
    def prepare(module, inputs, setting):
        found = as_eager(module, inputs, setting)
        return replace(found, outputs=lambda: [2 * tensor for tensor in found.outputs()])

    add_runtime("twice", prepare)
    with pytest.raises(ExportError, match=r"small in twice .*fp32.* differs from eager: output by 1"):
        benchmark([make_subject()], runtimes=["eager", "twice"], **QUICK)


def test_a_network_that_a_runtime_cannot_take_has_a_record_that_says_so():
    found, other = benchmark([make_subject()], runtimes=["fused", "eager"], **QUICK).records
    assert found.latency is found.throughput is found.speedup is found.error is None
    assert "nothing to fuse" in found.note
    assert other.latency is not None
    assert (other.speedup, other.note) == (None, "")  # or "times as fast" would be against what nobody asked for


def test_a_precision_that_one_runtime_lacks_is_noted(add_runtime):
    add_runtime("rough", as_eager, ("fp32", "bf16"))
    add_runtime("exact", as_eager, ("fp32",))
    records = benchmark([make_subject()], runtimes=["rough", "exact"], precisions=["fp32", "bf16"], **QUICK).records
    assert [(own.runtime, own.precision, own.latency is not None) for own in records] == [
        ("rough", "fp32", True),
        ("exact", "fp32", True),
        ("rough", "bf16", True),
        ("exact", "bf16", False),
    ]
    assert records[3].note == "exact has no bf16 on cpu, only fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": ["eagre"]}, r"no runtime 'eagre'.*Did you mean 'eager'"),
        ({"runtimes": ["eager", "eager"]}, "runtimes, each once"),
        ({"runtimes": []}, "runtimes, each once"),
        ({"precisions": ["fp64"]}, "no precision 'fp64'"),
        ({"precisions": ["fp64"], "runtimes": ["eager", "fused"]}, "None of the runtimes eager, fused .*'fp64'"),
        ({"batches": [0]}, "batches are numbers from 1 on"),
        ({"batches": [2, 2]}, "each once"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "tpu"}, "does not run on 'tpu'"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message):
    subject = replace(make_subject(), make_inputs=lambda batch: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match=message):
        benchmark([subject], **{**QUICK, **options})


def test_two_networks_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="networks, each once"):
        benchmark([make_subject(), make_subject()], **QUICK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(ConfigError, match="There is no CUDA device here"):
        benchmark([make_subject()], device="cuda", **QUICK)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "python", "torch"])
def test_the_largest_batch_that_fits_is_measured(add_runtime, error):
    def prepare(module, inputs, setting):
        if len(inputs[0]) > 5:
            raise ExportError("cannot be run") from error
        return as_eager(module, inputs, setting)

    add_runtime("narrow", prepare)
    lines = []
    records = benchmark(
        [make_subject()], runtimes=["eager", "narrow"], batches=[13], progress=lines.append, **QUICK
    ).records
    assert [(own.batch, own.asked_batch, own.latency is not None) for own in records] == [(5, 13, True)] * 2
    assert {own.note for own in records} == {"batch 13 does not fit into memory, 5 does"}
    assert [line for line in lines if "fit" in line] == [
        "small: batch 13 does not fit into memory",
        "small: batch 6 does not fit into memory",
    ]


@pytest.mark.parametrize(
    ("holds", "tries", "found"),
    [
        (64, [64], 64),
        (40, [64, 32, 48, 40, 44, 40], 40),
        (63, [64, 32, 48, 56, 60], 60),
        (1, [64, 32, 16, 8, 4, 2, 1], 1),
    ],
)
def test_a_batch_is_halved_and_then_sought_between(holds, tries, found):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= holds

    assert largest_fitting(64, fits) == found
    assert tried == tries


def test_what_fitted_once_and_does_not_again_is_halved():
    answers = iter([False, True, False, False, False, False])
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch < 16 or next(answers)

    assert largest_fitting(32, fits) == 8
    assert tried == [32, 16, 24, 20, 18, 16, 8]


def test_a_network_that_does_not_fit_at_all(add_runtime):
    def prepare(module, inputs, setting):
        raise OUT_OF_MEMORY[0]

    add_runtime("none", prepare)
    with pytest.raises(ConfigError, match="not even a batch of 1"):
        benchmark([make_subject()], runtimes=["none"], batches=[4], **QUICK)


@pytest.mark.parametrize(("fails_at", "doing"), [(2, "warming up"), (20, "timing")])
def test_memory_that_runs_out_later_is_a_note(add_runtime, fails_at, doing):
    """The others go on."""

    def prepare(module, inputs, setting):
        found = as_eager(module, inputs, setting)
        passes = iter(range(fails_at))

        def run():
            if next(passes, None) is None:
                raise OUT_OF_MEMORY[0]
            return found.run()

        return replace(found, run=run)

    add_runtime("leaking", prepare)
    options = {**QUICK, "rounds": 20}
    first, second = benchmark([make_subject()], runtimes=["eager", "leaking"], **options).records
    assert (first.note, len(first.latency.rounds)) == ("", 20)
    assert (second.note, second.latency, second.speedup) == (f"memory ran out while {doing}", None, None)


def test_parts_that_run_out_of_memory_leave_the_latency(monkeypatch):
    def time_parts(*_, **__):
        raise OUT_OF_MEMORY[2]

    monkeypatch.setattr(engine, "time_parts", time_parts)
    (record,) = benchmark([make_subject(parts={"backbone": ("0",)})], **QUICK).records
    assert (record.note, record.parts) == ("memory ran out while timing parts", {})
    assert record.latency is not None


@pytest.mark.parametrize(
    ("runtimes", "held"),
    [(["eager", "fused", "compile"], 1), (["onnx", "openvino"], 2), (["eager", "onnx", "openvino", "compile"], 3)],
)
def test_only_runtimes_with_memory_of_their_own_hold_it(runtimes, held):
    assert engine._held_at_once([(runtime, Setting()) for runtime in runtimes]) == held


def test_what_a_runtime_says_of_itself_is_noted(add_runtime):
    add_runtime("odd", lambda *given: replace(as_eager(*given), note="emulated"))
    first, second = benchmark([make_subject()], runtimes=["eager", "odd"], **QUICK).records
    assert (first.note, second.note) == ("", "emulated")


def test_a_precision_that_is_too_coarse_is_not_timed_but_the_others_are(add_runtime):
    def prepare(module, inputs, setting):
        found = as_eager(module, inputs, setting)
        return replace(
            found, outputs=lambda: [2 * (setting.precision != "fp32") * found.outputs()[0] + found.outputs()[0]]
        )

    add_runtime("coarse", prepare, ("fp32", "int8"))
    fine, coarse = benchmark([make_subject()], runtimes=["coarse"], precisions=["fp32", "int8"], **QUICK).records
    assert fine.latency is not None
    assert (coarse.latency, coarse.speedup) == (None, None)
    assert "(int8) differs from eager" in coarse.note


def test_outputs_of_another_shape_name_network_and_runtime(add_runtime):
    def prepare(module, inputs, setting):
        found = as_eager(module, inputs, setting)
        return replace(found, outputs=lambda: [tensor[:, 1:] for tensor in found.outputs()])

    add_runtime("cut", prepare)
    with pytest.raises(ExportError, match=r"small in cut \(fp32\) differs from eager: output has shape"):
        benchmark([make_subject()], runtimes=["cut"], **QUICK)


def test_float32_is_float32_while_it_is_measured(add_runtime):
    seen = []

    def prepare(module, inputs, setting):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return as_eager(module, inputs, setting)

    add_runtime("looking", prepare)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        benchmark([make_subject()], runtimes=["looking"], **QUICK)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert seen == [(False, False)]


def test_other_errors_are_no_lack_of_memory(add_runtime):
    def prepare(module, inputs, setting):
        raise RuntimeError("a bug")

    add_runtime("broken", prepare)
    assert not is_out_of_memory(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        benchmark([make_subject()], runtimes=["broken"], batches=[4], **QUICK)


def test_on_a_cpu_a_batch_is_judged_before_it_runs(monkeypatch):
    """Linux would end the process: 16 images of 3 kB and what the convolution makes of them are too much for 100 kB."""
    monkeypatch.setattr(_fit, "available_memory", lambda: 100_000)
    ran = []

    def make_inputs(batch):
        ran.append(batch)
        return make_images(batch)

    (record,) = benchmark([replace(make_subject(), make_inputs=make_inputs)], batches=[16], **QUICK).records
    assert (record.batch, record.asked_batch) == (9, 16)
    assert max(ran) == 9
    assert "batch 16 does not fit" in record.note


def test_fitting_batch_counts_what_is_alive_at_one_time(monkeypatch):
    network = nn.Sequential(*[nn.Sigmoid() for _ in range(10)]).eval()
    images = torch.zeros(2, 3, 100, 100)
    with PeakOfTensors() as found:
        network(images)
    assert found.peak == 2 * images.numel() * 4  # each output beside its input, not all ten
    bytes_of_image = 3 * 100 * 100 * 4
    monkeypatch.setattr(_fit, "available_memory", lambda: 4.6 * 40 * bytes_of_image)
    make_inputs = lambda batch: (torch.zeros(batch, 3, 100, 100),)  # noqa: E731
    assert fitting_batch(network, make_inputs, 40, 1) == 40  # 1.5 times input and two activations
    assert fitting_batch(network, make_inputs, 99, 1) == 40
    assert fitting_batch(network, make_inputs, 40, 2) == 20
    monkeypatch.setattr(_fit, "available_memory", lambda: None)
    assert fitting_batch(network, make_inputs, 40, 2) == 40


def test_parts_of_a_detector_are_timed_in_eager():
    subject = make_subject(parts={"backbone": ("0",), "heads": ("2",)})
    eager, other = benchmark([subject], runtimes=["eager", "channels_last"], **QUICK).records
    assert {"backbone", "heads", "post-processing"} <= set(eager.parts)
    assert all(seconds >= 0 for seconds in eager.parts.values())
    assert other.parts == {}


def test_a_time_that_never_settles_is_noted(monkeypatch):
    monkeypatch.setattr(engine, "warm_up", lambda call, device: timing.WarmUp(stable=False, seconds=5.0))
    (record,) = benchmark([make_subject()], **QUICK).records
    assert record.note == "its time had not settled after 5 s of warming up"
    assert record.latency is not None


def test_memory_is_measured_of_each_variant_or_noted(monkeypatch):
    asked = []

    def peak_memories(module, inputs, variants):
        asked.extend(variants)
        return [1234, ConfigError("no process")]

    monkeypatch.setattr(engine, "peak_memories", peak_memories)
    options = {**QUICK, "memory": True}
    report = benchmark([make_subject()], runtimes=["eager", "fused", "channels_last"], **options)
    first, second, third = report.records
    assert [runtime for runtime, _ in asked] == ["eager", "channels_last"]  # not of what could not be run
    assert first.peak_memory == 1234
    assert "nothing to fuse" in second.note
    assert (third.peak_memory, third.note) == (None, "no process")
    assert report.environment["allocator_of_memory"] == allocator()


def test_converted_files_stay_where_they_are_wanted(add_runtime, tmp_path):
    folders = []

    def prepare(module, inputs, setting):
        folders.append(setting.folder)
        (setting.folder / "kept").touch()
        return as_eager(module, inputs, setting)

    add_runtime("kept", prepare)
    benchmark([make_subject("a/b@2")], runtimes=["kept"], folder=tmp_path, **QUICK)
    benchmark([make_subject()], runtimes=["kept"], **QUICK)
    assert (folders[0] / "kept").exists()
    assert tmp_path in folders[0].parents
    assert not folders[1].exists()


FAMILIES = [
    "efficientvit_m0",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "dynamicvit_tiny",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_on_the_cpu_are_those_of_the_tables(name):
    """Attention counted, and of DynamicViT what is left when tokens are gone."""
    network = create_classifier(name).eval()
    images = torch.zeros(1, 3, *network.backbone.input_spec.size)
    assert count_macs(network, images) == network.backbone.info.macs


def installed(module):
    from importlib.util import find_spec

    return find_spec(module) is not None


def classifier(name, side):
    network = create_classifier(name).eval()
    return Subject(name, network, (side, side), lambda batch: (torch.randn(batch, 3, side, side),))


@pytest.mark.slow
def test_networks_of_ours_in_runtimes_that_are_installed(tmp_path):
    runtimes = ["eager", *(name for name in ("onnx", "openvino") if all(map(installed, RUNTIMES[name].modules)))]
    records = benchmark([classifier("efficientvit_m0", 224)], runtimes=runtimes, folder=tmp_path).records
    assert [record.runtime for record in records] == runtimes
    for record in records:
        assert record.latency.ci95[0] <= record.latency.median <= record.latency.ci95[1]
        assert record.peak_memory > 1_000_000
        assert record.error < 1e-3
        assert record.note == ""
        assert record.speedup == ratio(records[0].latency.rounds, record.latency.rounds)


def overlap(one, other):
    return one[0] <= other[1] and other[0] <= one[1]


@pytest.mark.slow
def test_repeated_runs_agree_within_their_interval(monkeypatch):
    """Ten times the same measurement, and once more: each agrees with the one before, nine times of ten at least."""
    monkeypatch.setattr(engine, "warm_up", timing.warm_up)
    subjects = [classifier("efficientvit_m0", 64), classifier("mobilevit_xxs", 64)]
    latencies, ratios = {subject.name: [] for subject in subjects}, []
    for _ in range(11):
        first, second = benchmark(subjects, memory=False).records
        for record in (first, second):
            latencies[record.model].append(record.latency.ci95)
        ratios.append(ratio(first.latency.rounds, second.latency.rounds).ci95)
    for intervals in (*latencies.values(), ratios):
        agree = [overlap(one, other) for one, other in itertools.pairwise(intervals)]
        assert sum(agree) >= 9, intervals
    narrow = [high / low for low, high in ratios]
    assert sorted(narrow)[5] < 1.5  # not so wide that they say nothing
