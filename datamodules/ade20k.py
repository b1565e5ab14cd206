"""ADE20K's scene parsing benchmark (ADEChallengeData2016): 150 classes."""

from __future__ import annotations

from pathlib import Path

from effvit.datamodules._archives import Archive
from effvit.datamodules._mask_classes import MaskClasses
from effvit.datamodules._mask_layout import Folders, Listing, pair_up
from effvit.datamodules.segmentation import Faults, MaskFilesData, Resize, Unknown
from effvit.errors import DatasetError

_FOLDER = "ADEChallengeData2016"
_SPLITS = {"train": "training", "val": "validation"}
#: Published by the authors (sceneparsing.csail.mit.edu).
_ARCHIVE = Archive(
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    "7328b3957e407ddae1d3cbf487f149ef",
    _FOLDER,
)
#: In the order of ``objectInfo150.txt``, the first of each entry's words as mmsegmentation names them; ids from 1.
_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
CATEGORIES = dict(enumerate(_NAMES.replace("\n", " ").strip().split(", "), start=1))


class ADE20K(MaskFilesData):
    """ADE20K as the published numbers use it: 20,210 training and 2,000 validation images, 150 classes.

    Category ids are 1 to 150, the pixel values; 0, which is everything else, has no label and is never predicted
    (mmsegmentation's ``reduce_zero_label``). The labels of the test images are not public: the validation split is
    tested on.

    Batches, order and augmentation are as in ``SegmentationData``; the defaults are those of the published recipes.

    Args:
        root: Folder with ``ADEChallengeData2016/``, or that folder itself.
        download: Fetch it where it is missing (0.9 GB).
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Limits of the long and the short side in pixels, or width and height where ``resize`` is "squash".
        resize: "keep_ratio"; "align" to bring both sides up to a multiple of ``pad_divisor`` in evaluation; or "squash"
            to give images exactly ``image_size``.
        crop_size: Height and width of training images in pixels.
        scale_range: Range of a random factor on ``image_size`` in training.
        short_side: Range of a random short side in training, in place of ``image_size`` and ``scale_range``.
        class_limit: Largest share of one class in a crop, which is drawn again up to ten times; 1 for any.
        flip: Probability of a horizontal flip in training.
        photometric: Distort brightness, contrast, saturation and hue in training.
        pad_divisor: Height and width of a batch are multiples of this.
        faults: "error" stops at missing masks, masks of another size and unreadable files; "skip" leaves them out.
        unknown: What to do about pixel values above 150: "error", or "ignore" to leave them without a label.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        download: bool = False,
        batch_size: int = 16,
        val_batch_size: int = 1,
        num_workers: int = 4,
        image_size: tuple[int, int] = (2048, 512),
        resize: Resize = "align",
        crop_size: tuple[int, int] = (512, 512),
        scale_range: tuple[float, float] = (0.5, 2.0),
        short_side: tuple[int, int] | None = None,
        class_limit: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        pad_divisor: int = 32,
        faults: Faults = "error",
        unknown: Unknown = "error",
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size,
            resize=resize,
            crop_size=crop_size,
            scale_range=scale_range,
            short_side=short_side,
            class_limit=class_limit,
            flip=flip,
            photometric=photometric,
            pad_divisor=pad_divisor,
            faults=faults,
            unknown=unknown,
            seed=seed,
        )
        self.download = download

    @property
    def home(self) -> Path:
        """``ADEChallengeData2016/``."""
        return self.root / _FOLDER if (self.root / _FOLDER).is_dir() else self.root

    def prepare_data(self) -> None:
        """Downloads the set where that is asked for and it is missing."""
        if self.download and not is_ade20k(self.home):
            _ARCHIVE.fetch(self.root)

    def _declare(self) -> MaskClasses:
        return MaskClasses(CATEGORIES, ignored={0})

    def _has(self, split: str) -> bool:
        return split in _SPLITS

    @property
    def splits(self) -> list[str]:
        """The splits that are there."""
        return [split for split, name in _SPLITS.items() if (self.home / "images" / name).is_dir()]

    def list_pairs(self, split: str) -> Listing:
        """The pairs of a split, and what lacks a partner."""
        folders = Folders(self.home / "images" / _SPLITS[split], self.home / "annotations" / _SPLITS[split])
        for folder in folders:
            if not folder.is_dir():
                raise DatasetError(
                    f"there is no folder {folder}; `--data.root` must be the folder with {_FOLDER}/. Pass "
                    f"`--data.download true` to fetch it from {_ARCHIVE.url}"
                )
        return pair_up(self.home, folders)


def is_ade20k(folder: Path) -> bool:
    """Whether a folder has the layout of ``ADEChallengeData2016``."""
    return any(
        (folder / "images" / name).is_dir() and (folder / "annotations" / name).is_dir() for name in _SPLITS.values()
    )
