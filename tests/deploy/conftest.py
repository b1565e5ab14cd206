"""Networks of a few layers that look like what a task gives for export, and a clock that layers turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from effvit.deploy import parts, timing


class _StandIn(nn.Module):
    open_sides = range(32, 321, 32)

    def onnx_translations(self):
        return {}

    def metadata(self):
        return {"task": self.task, "categories": {"1": "ant", "2": "bee"}, "parameters": 1}

    def _noise(self, batch, size):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)


class Classifier(_StandIn):
    """Two classes; its BatchNorm and its dropout would show training mode."""

    task = "classification"
    input_names = ("images",)
    output_names = ("probabilities",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stem(images.float() / 127.5 - 1).mean((2, 3))).softmax(-1)

    def example_inputs(self, batch, size):
        return (self._noise(batch, size),)


class Detector(_StandIn):
    """Four boxes where a map is largest, scaled to the original image; the last one is empty."""

    task = "detection"
    input_names = ("images", "sizes", "original_sizes")
    output_names = ("boxes", "scores", "labels")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 1, 8, 8)

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        scores, places = self.stem(images.float() / 255).sigmoid().flatten(1).topk(4)
        corner = (places * 8)[..., None].expand(-1, -1, 2)
        scale = (original_sizes / sizes).flip(1).repeat(1, 2)[:, None]
        present = (torch.arange(4) < 3).expand(len(images), 4)
        boxes = torch.cat([corner, corner + 8], -1) * scale * present[..., None]
        return boxes, scores * present, torch.where(present, places % 2, -1)

    def example_inputs(self, batch, size):
        sizes = torch.tensor([size] * batch)
        return self._noise(batch, size), sizes, sizes * 2


class Segmenter(_StandIn):
    """Two classes on a map of stride 8, enlarged."""

    task = "segmentation"
    input_names = ("images", "sizes")
    output_names = ("labels", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 8, 8)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(images.shape[2])[:, None] < sizes[:, 0, None, None]
        columns = torch.arange(images.shape[3]) < sizes[:, 1, None, None]
        logits = self.stem(images.float().masked_fill(~(rows & columns)[:, None], 0) / 255)
        enlarged = nn.functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return enlarged.argmax(1), logits

    def example_inputs(self, batch, size):
        return self._noise(batch, size), torch.tensor([size] * batch)


@pytest.fixture
def stand_ins() -> SimpleNamespace:
    """``classifier()``, ``detector()`` and ``segmenter()``: small, the same at each call, in eval mode."""

    def made(kind):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return kind().eval()

    return SimpleNamespace(
        classifier=lambda: made(Classifier), detector=lambda: made(Detector), segmenter=lambda: made(Segmenter)
    )


class Clock:
    """A clock that only runs while a layer says so: what is measured with it is known to the last digit."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (parts, timing):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def layer(self, seconds):
        return _Taking(self, seconds)


class _Taking(nn.Module):
    """Returns its input after some time."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock = clock
        self.seconds = seconds

    def forward(self, x):
        self.clock.now += self.seconds
        return x


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the clock of `effvit.deploy.parts` and `effvit.deploy.timing`; its layers take time."""
    return Clock(monkeypatch)
