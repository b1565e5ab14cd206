"""Pictures: what is drawn, what is left out and named, and that names do not lie on each other."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from effvit.deploy import _picture_pareto, _picture_profile
from effvit.deploy._picture_pareto import pareto_front
from effvit.deploy.pictures import draw_pareto, draw_profile
from effvit.deploy.profiling import WORK, Profile
from effvit.deploy.records import Record, Statistics
from effvit.errors import ConfigError

#: Milliseconds in torch and published top-1 of models that lie close together.
MODELS = {
    "efficientvit_m0": (15, 63.2),
    "efficientvit_m1": (18, 68.4),
    "mobilevit_xxs@256": (17.5, 69.0),
    "efficientvit_m2": (17, 70.8),
    "timm/deit_tiny_patch16_224": (36, 72.2),
    "efficientvit_m4": (24, 74.3),
    "efficientformer_l1": (52, 79.2),
    "dynamicvit_small:keep_ratio=0.7": (70, 79.3),
    "timm/deit_small_patch16_224": (95, 79.8),
}


def record(model, runtime, milliseconds, accuracy, batch=1):
    latency = None
    if milliseconds is not None:
        seconds = milliseconds / 1e3
        latency = Statistics(seconds, seconds, seconds, seconds, (0.9 * seconds, 1.1 * seconds), ())
    return Record(
        model=model,
        runtime=runtime,
        precision="fp32",
        device="cpu",
        threads=1,
        batch=batch,
        asked_batch=batch,
        size=(224, 224),
        latency=latency,
        throughput=None,
        peak_memory=None,
        params=1,
        macs=1,
        error=None,
        agreement=None,
        prepare_seconds=None,
        speedup=None,
        accuracy=accuracy,
        accuracy_name="top-1, published",
    )


@pytest.fixture
def records():
    draw = random.Random(0)
    return [
        record(model, runtime, milliseconds / faster * draw.uniform(0.8, 1.2), accuracy)
        for model, (milliseconds, accuracy) in MODELS.items()
        for runtime, faster in {"eager": 1, "onnx": 3.3, "openvino": 3.0}.items()
    ]


def drawn(records):
    figure = Figure(dpi=110)
    FigureCanvasAgg(figure)
    _picture_pareto.draw(figure, records)
    return figure


def words(figure):
    return " ".join(text.get_text() for text in figure.texts)


def test_front():
    points = [(5, 70), (1, 60), (2, 60), (3, 72), (4, 71), (9, 80), (1, 58)]
    assert pareto_front(points) == [(1, 60), (3, 72), (9, 80)]


def test_names_stand_once_and_on_nothing(records):
    figure = drawn(records)
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    names = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in names) == sorted(MODELS)
    for text in names:
        text.update_positions(renderer)
    boxes = [super(type(text), text).get_window_extent(renderer) for text in names]
    marks = axes.transData.transform([(1e3 * own.latency.median, own.accuracy) for own in records])
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert not any(box.contains(x, y) for x, y in marks)
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1 + 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["eager", "onnx", "openvino"]
    assert axes.get_ylabel() == "top-1, published, %"
    assert axes.get_xscale() == "log"


def test_models_without_accuracy_or_figure_are_named_below(records):
    rest = [record("unrated", "eager", 3.0, None), record("huge", "onnx", None, 80.0)]
    figure = drawn(records + rest)
    assert "Without a known accuracy: unrated" in words(figure)
    assert "Not measured: huge in onnx" in words(figure)
    assert "unrated" not in {text.get_text() for text in figure.axes[0].texts}
    assert not words(drawn(records))


def test_without_any_accuracy_latency_is_drawn_as_bars(records):
    unrated = [replace(own, accuracy=None) for own in records]
    figure = drawn(unrated)
    (axes,) = figure.axes
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx(
        sorted(1e3 * own.latency.median for own in unrated)
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == list(MODELS)
    assert "No accuracy is known" in words(figure)


def test_a_panel_a_batch_and_latency_of_an_image():
    halved = replace(record("b", "eager", 24.0, 72.0, batch=8), asked_batch=16)
    figure = drawn([record("a", "eager", 4.0, 70.0), record("a", "eager", 32.0, 70.0, batch=16), halved])
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 1, cpu, 1 thread", "batch 16, cpu, 1 thread"]
    assert first.containers[0].lines[0].get_xdata() == pytest.approx([4.0])
    assert second.containers[0].lines[0].get_xdata() == pytest.approx([2.0, 3.0])
    low, high = second.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((1.8, 2.2))


def test_pareto_is_written_whole(records, tmp_path):
    path = tmp_path / "new" / "pareto.png"
    draw_pareto(records, path)
    assert [child.name for child in path.parent.iterdir()] == ["pareto.png"]
    with Image.open(path) as image:
        assert image.size == (946, 616)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="no model could be measured"):
        draw_pareto([record("huge", "onnx", None, 80.0)], path)
    assert path.read_bytes() == before


def profile(blocks=5, stages=6):
    work = {kind: 1 / len(WORK) for kind in WORK}
    return Profile(
        model="net$_1",
        device="cpu",
        threads=2,
        batch=4,
        size=(64, 96),
        seconds=0.1,
        work=work,
        blocks={f"Block{number}": {kind: share / blocks for kind, share in work.items()} for number in range(blocks)},
        counts={f"Block{number}": number + 1 for number in range(blocks)},
        memory_bound=1 / 3,
        unknown={},
        stages={f"stages.{number}": 0.1 / stages for number in range(stages)},
    )


@pytest.mark.parametrize(("blocks", "rows"), [(5, 6), (8, 9), (12, 9)])
def test_profile_shows_the_largest_blocks_and_all_time(blocks, rows):
    figure = Figure(dpi=110)
    FigureCanvasAgg(figure)
    _picture_profile.draw(figure, profile(blocks))
    work, stages = figure.axes
    labels = [label.get_text() for label in work.get_yticklabels()]
    assert len(labels) == rows
    assert labels[:3] == ["all", "Block0", "Block1  x2"]
    widths = [bar.get_width() for bar in work.patches if bar.get_y() < 0.5]
    assert sum(widths) == pytest.approx(100)
    assert sum(bar.get_width() for bar in work.patches) == pytest.approx(200)
    assert sum(bar.get_width() for bar in stages.patches) == pytest.approx(100)
    assert words(figure).endswith(r"net\$_1   64x96, batch 4, cpu, 2 threads:  100 ms a pass,  33 % memory-bound")


def test_small_stages_share_a_row():
    shown = _picture_profile._gathered({"a": 0.9, "b": 0.001, "c": 0.097, "d": 0.002}, 1.0)
    assert shown == pytest.approx({"a": 0.9, "c": 0.097, "2 others": 0.003})
    many = {str(number): 0.01 + number / 1e4 for number in range(40)}
    shown = _picture_profile._gathered(many, sum(many.values()))
    assert len(shown) == 23
    assert sum(shown.values()) == pytest.approx(sum(many.values()))


def test_profile_is_written(tmp_path):
    draw_profile(profile(stages=20), tmp_path / "profile.png")
    with Image.open(tmp_path / "profile.png") as image:
        assert image.width == 1430
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
