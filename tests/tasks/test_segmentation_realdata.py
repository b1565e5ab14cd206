"""A segmenter learns eight real photographs by heart, and writes down what it has learned."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.realdata]

#: No augmentation, so that it can learn by heart; small, so that it takes minutes.
SETTINGS = """
--model.backbone mobilevit_xxs --model.pyramid_channels 64 --model.head_channels 64 --model.dropout 0
--model.auxiliary_weight 0.4 --model.optimizer.init_args.lr 0.004
--trainer.max_epochs 220 --trainer.check_val_every_n_epoch 110
--data.batch_size 8 --data.val_batch_size 8 --data.num_workers 0 --data.image_size [192,128] --data.resize squash
--data.crop_size [128,192] --data.scale_range [1.0,1.0] --data.class_limit 1.0 --data.flip 0 --data.photometric false
""".split()


@pytest.fixture(scope="module")
def eight(real_data, tmp_path_factory):
    """The first eight training images, to train on and to evaluate."""
    source, root = real_data / "coco_semantic", tmp_path_factory.mktemp("eight")
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
            for file in sorted((source / kind / "train").glob(f"*.{ending}"))[:8]:
                shutil.copy(file, root / kind / split)
    shutil.copy(source / "classes.json", root)
    return root


@pytest.fixture(scope="module")
def learned(eight, cli, tmp_path_factory):
    run = tmp_path_factory.mktemp("learned") / "run"
    done = cli.run("fit", "-c", "segmentation/finetune", *SETTINGS, "--data.root", eight, "--run_dir", run)
    assert done.code == 0, done.err
    return run


def test_it_labels_nine_pixels_in_ten_as_the_truth_does(learned, cli):
    done = cli.run("validate", "--checkpoint", learned / "best.ckpt", "--run_dir", learned / "validate")
    assert done.code == 0, done.err
    metrics = json.loads((learned / "validate" / "metrics.json").read_text())
    assert metrics["val/aAcc"] >= 0.9


def test_what_predict_writes_is_the_truth_in_nine_pixels_of_ten(learned, eight, cli, tmp_path):
    """The masks hold category ids, which have gaps; 0 has no label and is never predicted."""
    done = cli.run(
        "predict", "--checkpoint", learned / "best.ckpt", "--images", eight / "images/val", "--output", tmp_path
    )
    assert done.code == 0, done.err
    right = labelled = 0
    for file in sorted((eight / "masks" / "val").iterdir()):
        truth, found = (np.asarray(Image.open(folder / file.name)) for folder in (file.parent, tmp_path / "masks"))
        assert found.shape == truth.shape
        assert found.min() > 0
        right += int((found == truth)[truth > 0].sum())
        labelled += int((truth > 0).sum())
        assert (tmp_path / f"{file.stem}.jpg.png").is_file()
    assert right / labelled >= 0.9
