"""Two processes under torchrun give what one gives: the commands of docs/scaling.md on the CPU, over gloo."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

#: The embedded digits, small enough for two processes on two cores.
SMALL = (
    "--trainer.accelerator cpu --trainer.devices 2 --trainer.max_epochs 1 --trainer.limit_train_batches 4 "
    "--data.batch_size 16 --data.num_workers 0"
).split()
SHARDED = (
    "--trainer.strategy lightning.pytorch.strategies.ModelParallelStrategy --trainer.strategy.data_parallel_size 2 "
    "--trainer.strategy.tensor_parallel_size 1 --model.channels_last false --ema_decay null"
).split()
SEEN = '''
from pathlib import Path

from lightning.pytorch import Callback


class Seen(Callback):
    """Writes which images each process trains on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with (Path(trainer.default_root_dir) / f"seen_{trainer.global_rank}.txt").open("a") as file:
            file.write(" ".join(map(str, batch[1]["image_ids"].tolist())) + "\\n")
'''


def torchrun(*words, cwd):
    """``torchrun`` with two processes, as a user types it, without a GPU and with modules of the folder."""
    # A command that ran in this process has left its run folder there for processes of its own.
    environment = {name: value for name, value in os.environ.items() if name != "EFFVIT_RUN_DIR"} | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(cwd), os.environ.get("PYTHONPATH")])),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "effvit"]
    done = subprocess.run(
        [*launcher, *map(str, words)],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def validated(folder):
    with (folder / "logs" / "metrics.csv").open() as file:
        row = [row for row in csv.DictReader(file) if row.get("val/top1")][-1]
    return {name: float(row[name]) for name in ("val/top1", "val/top5", "val/loss", "val/ece")}


def in_one_process(cli, checkpoint, folder):
    done = cli.run("validate", "--checkpoint", checkpoint, "--run_dir", folder, "--trainer.accelerator", "cpu")
    assert done.code == 0, done.err
    return json.loads((folder / "metrics.json").read_text())


def test_two_processes_train_on_disjoint_images_and_measure_what_one_measures(cli, tmp_path):
    (tmp_path / "seen.py").write_text(SEEN)
    run = tmp_path / "run"
    said = torchrun(
        "fit", "-c", "classification/digits", "--run_dir", run, *SMALL, "--trainer.strategy", "ddp",
        "--trainer.callbacks+=seen.Seen", "--model.lr_batch_size", 64, cwd=tmp_path,
    )  # fmt: skip
    assert "global batch 32 = 16 images x 2 processes x 1 accumulated; learning rate 0.002" in said
    first, second = ({int(word) for word in (run / f"seen_{rank}.txt").read_text().split()} for rank in (0, 1))
    assert (len(first), len(second)) == (64, 64)
    assert not first & second
    assert in_one_process(cli, run / "last.ckpt", tmp_path / "one") == pytest.approx(validated(run), rel=1e-5)


@pytest.mark.slow
def test_sharded_checkpoints_are_consolidated_and_evaluated_in_one_process(cli, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole.ckpt"
    torchrun("fit", "-c", "classification/digits", "--run_dir", run, *SMALL, *SHARDED, cwd=tmp_path)
    shards = sorted(path.name for path in (run / "last.ckpt").glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]

    command = ["lightning.fabric.utilities.consolidate_checkpoint", run / "last.ckpt", "--output_file", whole]
    done = subprocess.run([sys.executable, "-m", *map(str, command)], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.load(whole, weights_only=True)["state_dict"]
    assert in_one_process(cli, whole, tmp_path / "one") == pytest.approx(validated(run), rel=1e-5)


@pytest.mark.slow
def test_a_sharded_distillation_gathers_what_both_heads_and_the_tokens_need(tmp_path):
    """Objectives call more than ``forward``: parameters must be whole there too."""
    distilled = ["--model.teacher", "efficientvit_m0", "--model.teacher_pretrained", "false"]
    torchrun(
        "fit", "-c", "classification/digits", "--run_dir", tmp_path / "heads", *SMALL, *SHARDED, *distilled,
        "--trainer.limit_val_batches", 0, cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "heads" / "last.ckpt" / "meta.pt").is_file()


def test_weights_in_channels_last_memory_are_not_sharded():
    from effvit.errors import ConfigError
    from effvit.tasks._distributed import shard

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    with pytest.raises(ConfigError, match=r"--model\.channels_last false"):
        shard(network, mesh=None)
