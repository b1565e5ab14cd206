"""PASCAL VOC 2012, the segmentation task: 20 classes and background."""

from __future__ import annotations

from pathlib import Path

from effvit.datamodules._archives import Archive
from effvit.datamodules._mask_classes import MaskClasses
from effvit.datamodules._mask_files import MaskPair
from effvit.datamodules._mask_layout import Listing, existing_pairs
from effvit.datamodules.segmentation import Faults, MaskFilesData, Resize, Unknown
from effvit.errors import DatasetError

_FOLDERS = (Path("VOCdevkit", "VOC2012"), Path("VOC2012"), Path())
_LISTS = Path("ImageSets", "Segmentation")
_MASKS, _MORE_MASKS = "SegmentationClass", "SegmentationClassAug"
_MORE = ("trainaug.txt", "train_aug.txt")
#: The organisers' archive, with the address and the hash that torchvision has.
_ARCHIVE = Archive(
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "6cd6e144f989b92b3379bac3b3de84fd",
    "VOCdevkit",
)
#: In the order of the devkit; 0 is the background.
_NAMES = """
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
person, pottedplant, sheep, sofa, train, tvmonitor
"""
CATEGORIES = dict(enumerate(_NAMES.replace("\n", " ").strip().split(", ")))
#: Pixels at the borders of objects.
_BORDER = 255


class PascalVOC(MaskFilesData):
    """PASCAL VOC 2012: 1,464 training and 1,449 validation images, 20 classes and background.

    The published segmentation networks were trained on ``aug``, 10,582 images: those of the Semantic Boundaries Dataset
    beside VOC's own. Category ids are the indices 0 to 20 of the PNG files, background included; 255, the borders of
    objects, has no label. The labels of the test images are not public: the validation split is tested on.

    Batches, order and augmentation are as in ``SegmentationData``.

    Args:
        root: Folder with ``VOCdevkit/VOC2012/``, or with ``VOC2012/``, or that folder itself.
        aug: Train on the images of ``ImageSets/Segmentation/trainaug.txt``, with the masks of ``SegmentationClassAug/``
            for those that VOC has none of.
        download: Fetch VOC where it is missing (1.9 GB); nobody publishes the augmented masks with a hash.
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
        unknown: What to do about pixel values of 21 to 254: "error", or "ignore" to leave them without a label.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        aug: bool = False,
        download: bool = False,
        batch_size: int = 16,
        val_batch_size: int = 1,
        num_workers: int = 4,
        image_size: tuple[int, int] = (2048, 512),
        resize: Resize = "keep_ratio",
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
        self.aug = aug
        self.download = download

    @property
    def home(self) -> Path:
        """``VOC2012/``."""
        return voc_folder(self.root) or self.root

    def prepare_data(self) -> None:
        """Downloads VOC where that is asked for and it is missing."""
        if self.download and voc_folder(self.root) is None:
            _ARCHIVE.fetch(self.root)

    def _declare(self) -> MaskClasses:
        return MaskClasses(CATEGORIES, ignored={_BORDER})

    def _has(self, split: str) -> bool:
        return split != "test"

    @property
    def splits(self) -> list[str]:
        """The splits that there is a list of."""
        return [split for split in ("train", "val") if (self.home / _LISTS / f"{split}.txt").is_file()]

    def list_pairs(self, split: str) -> Listing:
        """The pairs that the list of a split names, and what is not there."""
        names = self._names(split)
        own = {path.name for path in (self.home / _MASKS).glob("*.png")}
        more = split == "train" and self.aug
        pairs = [
            MaskPair(f"JPEGImages/{name}.jpg", f"{_MORE_MASKS if more and file not in own else _MASKS}/{file}")
            for name in names
            for file in (f"{name}.png",)
        ]
        return existing_pairs(self.home, pairs)

    def _names(self, split: str) -> list[str]:
        """The images of a split, from its list."""
        if voc_folder(self.root) is None:
            raise DatasetError(
                f"{self.root} has no VOCdevkit/VOC2012/{_LISTS.as_posix()}; `--data.root` must be the folder with "
                f"VOCdevkit/. Pass `--data.download true` to fetch it from {_ARCHIVE.url}"
            )
        files = _MORE if split == "train" and self.aug else (f"{split}.txt",)
        found = next((path for name in files if (path := self.home / _LISTS / name).is_file()), None)
        if found is None:
            where = _WHERE_AUG if files is _MORE else ""
            raise DatasetError(f"there is no list {self.home / _LISTS / files[0]}{where}")
        # Some lists name the files of image and mask: the stem of the first is the name.
        lines = (line.split() for line in found.read_text(encoding="utf-8").splitlines())
        return [Path(line[0]).stem for line in lines if line]


_WHERE_AUG = (
    f". The augmented set is not part of VOC: take the masks that others made from the Semantic Boundaries Dataset "
    f"(home.bharathh.info/pubs/codes/SBD) into {_MORE_MASKS}/, and the list of its 10,582 images as trainaug.txt; "
    "without `--data.aug true`, the 1,464 images of train.txt are trained on"
)


def voc_folder(root: Path) -> Path | None:
    """``VOC2012/`` in or below a folder, if it is there."""
    return next((root / name for name in _FOLDERS if (root / name / _LISTS).is_dir()), None)
