"""Every command and every Python example in README and docs runs as written, in a folder that has what they name."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Makes a documented training take seconds; everything else about it stays as written.
BRIEF = "--trainer.max_steps 2 --trainer.limit_val_batches 2 --data.num_workers 0".split()
SMALL = "--model.pyramid_channels 16 --model.head_convs 1 --model.head_channels 32 --model.roi_samples 32".split()
BRIEF_DETECTOR = [*BRIEF, *SMALL]
BRIEF_TRAININGS = {
    "detection/digits": [*BRIEF_DETECTOR, "--data.num_train", "16", "--data.num_val", "4"],
    "detection/": [*BRIEF_DETECTOR, "--data.image_size", "[96,64]"],
    "segmentation/digits": [*BRIEF, "--data.num_train", "16", "--data.num_val", "4"],
    "segmentation/": [
        *BRIEF,
        *"--model.pyramid_channels 16 --model.head_channels 16 --data.batch_size 2".split(),
        *"--data.image_size [96,64] --data.crop_size [64,64]".split(),
    ],
    "classification/": (
        "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 1 --data.num_workers 0 "
        "--data.image_size 32 --data.batch_size 4 --data.val_batch_size 4"
    ).split(),
}
#: The same of a measurement; what is written on the command line is parsed all the same.
BRIEF_MEASUREMENT = "--runtimes eager --batch_sizes 1 --rounds 1 --seconds 0.001 --no_memory".split()
#: Recipes of published networks, which are too large to train here.
PUBLISHED = ("detection/coco/", "segmentation/ade20k/")
#: What the commands do outside effvit is tried by `.ci/run` and by running this suite.
OUTSIDE = ("pip install", "pytest")
#: Installing effvit, as a whole or with one of its extras.
INSTALLS = {"pip install -e .", 'pip install -e ".[test]"', 'pip install -e ".[mmdet]"', 'pip install -e ".[openvino]"'}


def blocks(language):
    for page in PAGES:
        for number, text in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        ):
            yield pytest.param(text, id=f"{page.stem}-{number}")


def commands():
    seen = set()
    for block in blocks("bash"):
        for number, line in enumerate(block.values[0].splitlines()):
            command = line.split("  #")[0].strip()
            if command and command not in seen:
                seen.add(command)
                yield pytest.param(command, id=f"{block.id}-{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_coco_run):
    """A working folder with ``my_data/``, ``coco/``, ``my_images/``, ``photos/``, weights and finished runs."""
    from effvit.backbones import create_backbone

    data, run = tiny_coco_run
    where = tmp_path_factory.mktemp("documented")
    for name in ("my_data", "coco"):
        shutil.copytree(data, where / name)
    shutil.copytree(data / "val", where / "my_images")
    shutil.copytree(run, where / "runs" / "finetune")
    torch.save({"model": create_backbone("efficientvit_m4").state_dict()}, where / "efficientvit_m4.pth")
    torch.save(mmdetection_file("efficientvit_m4", num_classes=3), where / "mask_rcnn_efficientvit_m4.pth")
    (where / "my_faster_rcnn.py").write_text(
        f"_base_ = {str(mmdet_config('faster_rcnn/faster-rcnn_r50_fpn_1x_coco'))!r}"
    )
    write_class_folders(where / "photos")
    yield where
    shutil.rmtree(where)


@pytest.fixture(scope="module")
def classified(folder, cli):
    """The same folder with a finished run of classification."""
    words = "fit -c classification/transfer --model.backbone efficientvit_m0".split()
    done = cli.run(
        *words,
        *BRIEF_TRAININGS["classification/"],
        "--data.root",
        folder / "photos",
        "--run_dir",
        folder / "runs" / "transfer",
    )
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def segmented(folder, cli):
    """The same folder with ``my_scenes/`` and a finished run of segmentation."""
    random = np.random.default_rng(0)
    scenes = folder / "my_scenes"
    for split, number in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (scenes / kind / split).mkdir(parents=True)
        for index in range(number):
            cv2.imwrite(str(scenes / f"images/{split}/{index}.jpg"), random.integers(0, 255, (64, 96, 3), np.uint8))
            cv2.imwrite(str(scenes / f"masks/{split}/{index}.png"), random.choice([1, 7, 255], (64, 96)))
    (scenes / "classes.json").write_text('{"1": "road", "7": "car"}')
    words = "fit -c segmentation/finetune --data.root".split()
    brief = BRIEF_TRAININGS["segmentation/"]
    done = cli.run(*words, scenes, *brief, "--run_dir", folder / "runs" / "scenes")
    assert done.code == 0, done.err
    return folder


def mmdetection_file(backbone, num_classes):
    """A checkpoint with the content of MMDetection's of a Mask R-CNN, its weights random."""
    from effvit.backbones import create_backbone
    from effvit.tasks.detectors._mmdet_checkpoint import _counterparts
    from effvit.tasks.detectors.factory import DetectorSettings, make_detector

    detector = make_detector("mask_rcnn", create_backbone(backbone), num_classes, DetectorSettings())
    state = {f"backbone.{name}": value for name, value in detector.pyramid.backbone.state_dict().items()}
    own = detector.state_dict()
    return {"state_dict": state | {key: own[name] for name, key in _counterparts(detector, []).items()}}


def mmdet_config(name):
    """A configuration that MMDetection ships, or only its name where MMDetection is not installed."""
    found = importlib.util.find_spec("mmdet")
    return Path(found.origin if found else "mmdet").parent / ".mim" / "configs" / f"{name}.py"


def write_class_folders(root):
    """Two classes of small noisy photographs, 6 for training and 3 for validation each."""
    random = np.random.default_rng(0)
    for split, number in (("train", 6), ("val", 3)):
        for name, channel in (("ants", 0), ("bees", 2)):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 200, (48, 64, 3), dtype=np.uint8)
                pixels[..., channel] = 255
                cv2.imwrite(str(root / split / name / f"{index}.jpg"), pixels)


@pytest.fixture(scope="module")
def exported(folder, cli):
    """The same folder with a detector's run exported to ONNX."""
    pytest.importorskip("onnxruntime")
    run = folder / "runs" / "finetune"
    done = cli.run("export", "--checkpoint", run / "best.ckpt", "--format", "onnx", "--batch_size", 1)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def exported_scenes(segmented, cli):
    """The same folder with a segmenter's run exported to ONNX."""
    done = cli.run("export", "--checkpoint", segmented / "runs/scenes/best.ckpt", "--format", "onnx", "--batch_size", 1)
    assert done.code == 0, done.err
    return segmented


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_runs(command, folder, cli, monkeypatch, request):
    if command.startswith(OUTSIDE):
        assert command in (ROOT / ".ci" / "run").read_text() or command in INSTALLS
        return
    monkeypatch.chdir(folder)
    request.addfinalizer(functools.partial(remove_repeated_runs, folder))
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = launched_by_torchrun(words[1:])
        done = cli.run(*words, "--print_config")
        assert done.code == 0, done.err
        return
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), words[2]
        return
    assert words[0] == "effvit", command
    words = words[1:]
    if "detection/mmdet" in words:
        pytest.importorskip("mmdet", reason="needs the extra mmdet")
    if "runs/transfer/best.ckpt" in words:
        request.getfixturevalue("classified")
    if {"runs/scenes/best.ckpt", "runs/scenes/best.onnx", "my_scenes/"} & set(words):
        request.getfixturevalue("segmented")
    if words[0] == "export" or any(word.endswith(".onnx") for word in words):
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
        request.getfixturevalue("exported")
    if "runs/scenes/best.onnx" in words:
        request.getfixturevalue("exported_scenes")
    if words[0] == "benchmark" and "--list" not in words:
        words = brief_measurement(words)
    if any(
        word.startswith(("detection/coco/", "segmentation/ade20k/")) or word.endswith("_coco.pth") for word in words
    ):
        words.append("--print_config")  # a published network at full size: tests/test_configs.py builds them
    elif words[0] == "tables" and all(word.startswith("--") for word in words[2:3]):
        words.insert(2, "mobilevit_xxs")  # the whole table takes a minute
    elif words[0] == "fit" and "--resume" not in words:
        config = words[words.index("-c") + 1]
        words += next(brief for start, brief in BRIEF_TRAININGS.items() if config.startswith(start))
    if words[0] == "test" and "-c" in words:
        words += ["--data.image_size", "[96,64]", "--data.num_workers", "0"]
    if "ddp" in words:
        process = cli.start(*words, cwd=folder)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        return
    done = cli.run(*words)
    assert done.code == 0, done.err


def remove_repeated_runs(folder):
    """Removes what stands in a numbered folder, which no page names: a gigabyte or two of checkpoints otherwise."""
    for run in (folder / "runs").glob("*-[0-9]*"):
        shutil.rmtree(run)


def brief_measurement(words):
    """The words of ``effvit benchmark`` for small images, and for one of the networks of a protocol."""
    if "--profile" in words:
        return [*words, "--image_size", "64"]
    if "--kind" in words:
        words = [*words, "--image_size", "64"]
    if "--protocol" in words:
        words = [words[0], "efficientvit_m0@64", *words[1:]]
    return [*words, *BRIEF_MEASUREMENT]


def launched_by_torchrun(words):
    """The words of ``effvit`` behind torchrun's own, which its parser accepts; tests/cli/test_scaling.py runs them."""
    from torch.distributed.run import get_args_parser

    launcher = get_args_parser().parse_args(words)
    assert (launcher.module, launcher.training_script) == (True, "effvit")
    effvit = launcher.training_script_args
    assert effvit[effvit.index("--trainer.devices") + 1] == str(launcher.nproc_per_node)
    nodes = effvit[effvit.index("--trainer.num_nodes") + 1] if "--trainer.num_nodes" in effvit else "1"
    assert nodes == launcher.nnodes.split(":")[-1]
    return effvit


@pytest.mark.parametrize("script", blocks("slurm"))
def test_a_documented_slurm_script_starts_what_it_asks_for(script, folder, cli, monkeypatch, tmp_path):
    """Bash reads it, tasks and nodes are those of the Trainer (Lightning demands it), effvit knows the options."""
    monkeypatch.chdir(folder)
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("srun ")))
    assert words[:2] == ["srun", "effvit"]
    assert words[words.index("--trainer.devices") + 1] == asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert words[words.index("--trainer.num_nodes") + 1] == asked["nodes"]
    done = cli.run(*words[2:], "--print_config")
    assert done.code == 0, done.err


@pytest.mark.parametrize("source", blocks("python"))
def test_a_documented_example_runs(source, classified, segmented, monkeypatch):
    assert classified == segmented
    monkeypatch.chdir(classified)
    exec(compile(source, "example", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_to_exists(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    for target in targets:
        assert (page.parent / target).is_file(), target
