"""Peak memory: what calls add, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from effvit.deploy import memory
from effvit.deploy._runtimes_contract import run_once
from effvit.deploy.memory import measure_here, peak_memories, peak_of, peak_on_gpu
from effvit.deploy.runtimes import Setting, prepare
from effvit.errors import ConfigError

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
IMAGES = (torch.zeros(1, 8, 1100, 1000),)  # 35 MB: blocks above 32 MiB never stay in the heap of glibc


@pytest.fixture(scope="module")
def answers():
    """One fresh process for all: a network that runs, the same doing more, and a runtime that there is not."""
    network = nn.Sequential(nn.Sigmoid(), nn.Conv2d(8, 16, 1)).eval()
    return peak_memories(network, IMAGES, [("eager", Setting()), ("eager", Setting()), ("nothing", Setting())])


def test_peak_is_what_the_calls_add():
    kept = bytearray(b"x") * 100_000_000  # exists before the calls, and is not counted
    found = peak_of(lambda: (bytearray(b"x") * 50_000_000).count(b"y") + len(kept))
    assert 45e6 < found < 80e6


def test_what_a_first_run_has_freed_again_is_not_kept():
    """Blocks that lie below one that is kept stay in the heap, as pages that nobody uses."""
    kept = []

    def run():
        blocks = [torch.ones(16_000) for _ in range(1000)]  # 64 kB each
        kept.append(blocks.pop())

    assert run_once(run) < 20e6


def test_peak_of_a_network_is_its_activations(answers):
    """35 MB of the sigmoid and 70 MB of the convolution; of a kernel's own memory as much again at most."""
    assert 104e6 < answers[0] < 215e6


def test_variants_do_not_shape_each_others_allocator(answers):
    assert answers[1] == pytest.approx(answers[0], rel=0.1)


def test_what_does_not_run_there_says_why(answers):
    assert isinstance(answers[2], ConfigError)
    assert "There is no runtime 'nothing'" in str(answers[2])
    assert "Sequential could not run in a process of its own" in str(answers[2])


def peak_memory(network):
    (found,) = peak_memories(network, (torch.zeros(1, 2),), [("eager", Setting())])
    return found


def test_a_network_that_cannot_be_sent_is_refused():
    network = nn.Linear(2, 2).eval()
    network.register_forward_hook(lambda module, inputs, output: output)
    assert "Linear could not run in a process of its own" in str(peak_memory(network))


def test_none_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing")
    assert peak_memory(nn.Linear(2, 2).eval()) is None


def test_a_process_that_the_system_ends_is_told(monkeypatch):
    monkeypatch.setattr(memory, "_run_child", lambda folder, patience: "")
    assert "was there enough memory" in str(peak_memory(nn.Linear(2, 2).eval()))


class Choosy(nn.Module):
    """Raises what no list of expected errors has."""

    def forward(self, x):
        raise KeyError("c5")


def test_any_error_of_a_network_is_written_down(tmp_path):
    torch.save((Choosy().eval(), IMAGES), tmp_path / "network.pt")
    torch.save([("eager", Setting())], tmp_path / "variants.pt")
    measure_here(tmp_path, 0)
    assert json.loads((tmp_path / "0.json").read_text()) == {"error": "KeyError: 'c5'"}


class Keeping(nn.Module):
    """Keeps 48 MB of its first pass, as attention with a bias for each shape does, and frees as much."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(24_000_000).to(torch.float16)
        return x + 1


def test_what_a_first_pass_keeps_is_counted(tmp_path):
    inputs = (torch.zeros(1, 2),)
    assert prepare(Keeping().eval(), inputs, "eager", Setting()).kept == 48_000_000
    assert prepare(nn.Sigmoid().eval(), inputs, "eager", Setting()).kept == 0
    torch.save((Keeping().eval(), inputs), tmp_path / "network.pt")
    torch.save([("eager", Setting())], tmp_path / "variants.pt")
    measure_here(tmp_path, 0)
    assert 48e6 <= json.loads((tmp_path / "0.json").read_text())["bytes"] < 60e6


def test_what_a_process_has_forked_ends_with_it(monkeypatch, tmp_path):
    """The fork does the work, and would go on for as long as that takes."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/fork\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(program))
    assert memory._run_child(tmp_path, 0.5) == "no answer in 0 s"
    state = Path(f"/proc/{(tmp_path / 'fork').read_text().strip()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("it still runs")


@pytest.mark.slow
def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from effvit.deploy.memory import peak_memories\n"
        "from effvit.deploy.runtimes import Setting\n"
        "print('started')\n"
        "class Own(nn.Linear):\n"
        "    pass\n"
        "variants = [('eager', Setting())]\n"
        "print(peak_memories(nn.Linear(9, 9).eval(), (torch.zeros(1, 9),), variants)[0] >= 0)\n"
        "print(peak_memories(Own(9, 9).eval(), (torch.zeros(1, 9),), variants)[0])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    started, sane, refused = done.stdout.splitlines()
    assert (started, sane) == ("started", "True")
    assert "Define the classes of the network in a module" in refused


@pytest.mark.gpu
def test_peak_on_a_gpu_is_the_activations():
    network = nn.Sequential(nn.Sigmoid(), nn.Sigmoid()).eval()
    found = peak_on_gpu(prepare(network, IMAGES, "eager", Setting(device="cuda")), "eager")
    assert found == pytest.approx(2 * 35.2e6, rel=0.2)
