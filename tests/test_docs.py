"""Every command and every Python example in README and docs runs as written, in a folder that has what they name."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Makes a documented training take seconds; everything else about it stays as written.
BRIEF = (
    "--trainer.max_steps 2 --trainer.limit_val_batches 2 --model.pyramid_channels 16 --model.head_convs 1 "
    "--data.num_workers 0"
).split()
BRIEF_IMAGES = {"digits": ["--data.num_train", "16", "--data.num_val", "4"], None: ["--data.image_size", "[96,64]"]}
#: What the commands do outside effvit is tried by `.ci/run` and by running this suite.
OUTSIDE = ("pip install", "pytest")


def blocks(language):
    for page in PAGES:
        for number, text in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        ):
            yield pytest.param(text, id=f"{page.stem}-{number}")


def commands():
    for block in blocks("bash"):
        for number, line in enumerate(block.values[0].splitlines()):
            if line.strip():
                yield pytest.param(line.split("  #")[0].strip(), id=f"{block.id}-{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_coco_run):
    """A working folder with ``my_data/``, ``coco/``, ``my_images/``, pretrained weights and a finished run."""
    from effvit.backbones import create_backbone

    data, run = tiny_coco_run
    where = tmp_path_factory.mktemp("documented")
    for name in ("my_data", "coco"):
        shutil.copytree(data, where / name)
    shutil.copytree(data / "val", where / "my_images")
    shutil.copytree(run, where / "runs" / "finetune")
    torch.save({"model": create_backbone("efficientvit_m4").state_dict()}, where / "efficientvit_m4.pth")
    return where


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_runs(command, folder, cli, monkeypatch):
    if command.startswith(OUTSIDE):
        assert command in (ROOT / ".ci" / "run").read_text() or command in {
            "pip install -e .",
            'pip install -e ".[test]"',
        }
        return
    monkeypatch.chdir(folder)
    words = shlex.split(command)
    assert words[0] == "effvit", command
    words = words[1:]
    if words[0] == "fit" and "--resume" not in words:
        words += BRIEF + BRIEF_IMAGES["digits" if "detection/digits" in words else None]
    if "ddp" in words:
        process = cli.start(*words, cwd=folder)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        return
    done = cli.run(*words)
    assert done.code == 0, done.err


@pytest.mark.parametrize("source", blocks("python"))
def test_a_documented_example_runs(source, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(source, "example", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_to_exists(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    for target in targets:
        assert (page.parent / target).is_file(), target
