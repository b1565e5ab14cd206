"""Exclusive time of the parts of a network, with a clock that layers turn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effvit.deploy.parts import time_parts
from effvit.errors import ConfigError

IMAGE = (torch.zeros(1),)


class Pyramid(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.backbone = nn.Sequential(clock.layer(1.0), clock.layer(3.0))
        self.laterals = nn.ModuleDict({"p3": clock.layer(0.5), "p4": clock.layer(1.5)})

    def forward(self, x):
        x = self.backbone(x)
        for lateral in self.laterals.values():
            x = lateral(x)
        return x


class Detector(nn.Module):
    """Normalises for 0.25 s, has a head that is called on two levels, and decodes for 7 s."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.pyramid = Pyramid(clock)
        self.head = clock.layer(5.0)
        self.unused = nn.Identity()

    def forward(self, x):
        self.clock.now += 0.25
        x = self.pyramid(x)
        x = self.head(self.head(x))
        self.clock.now += 7.0
        return x


@pytest.fixture
def detector(clock):
    return Detector(clock).eval()


def hooks(module):
    return [hook for own in module.modules() for hook in (*own._forward_hooks, *own._forward_pre_hooks)]


def test_a_part_inside_another_counts_once_and_the_rest_is_before_and_after(detector):
    parts = {"backbone": ("pyramid.backbone",), "pyramid": ("pyramid",), "heads": ("head",)}
    found = time_parts(detector, IMAGE, parts)
    assert found == {"pre-processing": 0.25, "backbone": 4.0, "pyramid": 2.0, "heads": 10.0, "post-processing": 7.0}
    assert list(found) == ["pre-processing", *parts, "post-processing"]
    assert not hooks(detector)


def test_a_container_that_is_never_called_stands_for_what_it_holds(detector):
    found = time_parts(detector, IMAGE, {"laterals": ("pyramid.laterals",), "first": ("pyramid.backbone.0",)})
    assert found == {"pre-processing": 0.25, "laterals": 2.0, "first": 1.0, "post-processing": 20.0}


def test_without_parts_all_is_in_front_of_the_first(detector):
    assert time_parts(detector, IMAGE, {}) == {"pre-processing": 23.25, "post-processing": 0.0}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"backbone": ("pyramid.backbon",)},
            "Detector has no submodule 'pyramid.backbon'. Did you mean 'pyramid.backbone'",
        ),
        ({"heads": ("unused",)}, "never calls the submodule 'unused'"),
        ({"heads": ("head",), "more": ("head",)}, "'head' is in two parts, 'heads' and 'more'"),
        ({"post-processing": ("head",)}, "give the part another name"),
    ],
)
def test_parts_that_cannot_be_told_apart_are_refused(detector, parts, message):
    with pytest.raises(ConfigError, match=message):
        time_parts(detector, IMAGE, parts)
    assert not hooks(detector)


def test_an_error_leaves_no_hooks(detector):
    class Late(nn.Module):
        """Fails in the second pass: when the hooks of the measurement are there, after the pass that looks around."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                assert hooks(detector)
                raise RuntimeError("late")
            return x

    detector.head = Late()
    with pytest.raises(RuntimeError, match="late"):
        time_parts(detector, IMAGE, {"heads": ("head",)})
    assert not hooks(detector)
