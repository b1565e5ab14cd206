"""Peak memory: what calls add, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from effvit.deploy import memory
from effvit.deploy.memory import peak_memories, peak_memory, peak_of
from effvit.deploy.runtimes import Setting
from effvit.errors import ConfigError

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
IMAGES = (torch.zeros(1, 8, 1000, 500),)  # 16 MB


@pytest.fixture(scope="module")
def answers():
    """One fresh process for all: a network that runs, the same doing more, and a runtime that there is not."""
    network = nn.Sequential(nn.Sigmoid(), nn.Conv2d(8, 16, 1)).eval()
    return peak_memories(network, IMAGES, [("eager", Setting()), ("eager", Setting()), ("nothing", Setting())])


def test_peak_is_what_the_calls_add():
    kept = bytearray(b"x") * 100_000_000  # exists before the calls, and is not counted
    found = peak_of(lambda: (bytearray(b"x") * 50_000_000).count(b"y") + len(kept))
    assert 45e6 < found < 80e6


def test_peak_of_a_network_is_its_activations(answers):
    """16 MB of the sigmoid and 32 MB of the convolution; of a kernel's own memory as much again at most."""
    assert 46e6 < answers[0] < 90e6


def test_variants_do_not_shape_each_others_allocator(answers):
    assert answers[1] == pytest.approx(answers[0], rel=0.1)


def test_what_does_not_run_there_says_why(answers):
    assert isinstance(answers[2], ConfigError)
    assert "There is no runtime 'nothing'" in str(answers[2])
    assert "Sequential could not run in a process of its own" in str(answers[2])


def test_a_network_that_cannot_be_sent_is_refused():
    network = nn.Linear(2, 2).eval()
    network.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ConfigError, match="Linear could not run in a process of its own"):
        peak_memory(network, (torch.zeros(1, 2),), "eager", Setting())


def test_none_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing")
    assert peak_memory(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), "eager", Setting()) is None


def test_a_process_that_the_system_ends_is_told(monkeypatch):
    monkeypatch.setattr(memory, "_run_child", lambda folder, patience: "")
    with pytest.raises(ConfigError, match="was there enough memory"):
        peak_memory(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), "eager", Setting())


@pytest.mark.slow
def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from effvit.deploy.memory import peak_memory\n"
        "from effvit.deploy.runtimes import Setting\n"
        "from effvit.errors import ConfigError\n"
        "print('started')\n"
        "class Own(nn.Linear):\n"
        "    pass\n"
        "print(peak_memory(nn.Linear(9, 9).eval(), (torch.zeros(1, 9),), 'eager', Setting()) >= 0)\n"
        "try:\n"
        "    peak_memory(Own(9, 9).eval(), (torch.zeros(1, 9),), 'eager', Setting())\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    started, sane, refused = done.stdout.splitlines()
    assert (started, sane) == ("started", "True")
    assert "Define the classes of the network in a module" in refused


@pytest.mark.gpu
def test_peak_on_a_gpu_is_the_activations():
    network = nn.Sequential(nn.Sigmoid(), nn.Sigmoid()).eval()
    found = peak_memory(network, IMAGES, "eager", Setting(device="cuda"))
    assert found == pytest.approx(2 * 16e6, rel=0.2)
