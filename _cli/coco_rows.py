"""What was published on COCO for detectors on the backbones of this project, with its source.

One row for each published network, and one for every other variant of the families in their published detector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from effvit._cli.shipped import merged_config, shipped_configs

#: What the columns of `Published.box` and of `Published.mask` are.
BOX_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MASK_COLUMNS = ("AP", "AP50", "AP75")

#: How the detectors are called in print, and the image (height, width) at which their cost is counted.
DETECTOR_TITLES = {"retinanet": "RetinaNet", "mask_rcnn": "Mask R-CNN", "ssdlite": "SSDLite"}
IMAGE_SIZES = {"retinanet": (800, 1280), "mask_rcnn": (800, 1280), "ssdlite": (320, 320)}


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published numbers of one network, in percent.

    Attributes:
        box: AP, AP50, AP75, APs, APm, APl of the boxes; ``None`` where unpublished.
        mask: AP, AP50, AP75 of the masks, or nothing for a detector without masks.
        by: Who published them: ``authors``, another paper, or ``unconfirmed`` for figures that could not be checked.
        source: Where.
    """

    box: tuple[float | None, ...]
    mask: tuple[float | None, ...] = ()
    by: str
    source: str


@dataclass(frozen=True, kw_only=True)
class CocoRow:
    """A row of the table.

    Attributes:
        detector: Name of the detector, as ``--model.detector`` takes it.
        backbone: Name of the backbone, as ``--model.backbone`` takes it.
        published: The numbers, or ``None`` where there are none.
        params: Parameters of the whole detector in millions, as printed by the authors.
        checkpoint: Address of the trained detector, or ``None`` where there is none.
        remark: What else is known of the numbers or of the file.
    """

    detector: str
    backbone: str
    published: Published | None = None
    params: float | None = None
    checkpoint: str | None = None
    remark: str = ""

    @property
    def config(self) -> str:
        """Name of the shipped configuration that trains it."""
        return f"detection/coco/{self.detector}_{self.backbone}"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image at which its cost is counted, in pixels."""
        return IMAGE_SIZES[self.detector]


@cache
def config_of(row: CocoRow) -> dict[str, Any]:
    """What the configuration of a row says, with those that it builds on; only to be read."""
    return merged_config(shipped_configs()[row.config])


_M4_FILES = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0"
_SNAP_FOLDER = "https://drive.google.com/drive/folders/1eajQgA39bkPpyonzl8UnpiEwngVGaMdm"
_APPLE_FILES = "https://docs-assets.developer.apple.com/ml-research/models"
_CREAM = "github.com/microsoft/Cream, EfficientViT/downstream/README.md"
_LSNET = "LSNet paper (arXiv 2503.23135), trained by its authors and not by those of EfficientViT"
_REPVIT = "EfficientFormerV2 paper (arXiv 2212.08059), as the RepViT paper (arXiv 2307.09283) compares it"
_NO_CONFIG = "the authors released configurations and files of M4 only"


def _efficientvit() -> list[CocoRow]:
    numbers = {
        ("retinanet", "m4"): Published(
            box=(32.7, 52.2, 34.1, 17.6, 35.3, 46.0),
            by="authors",
            source=f"{_CREAM}; APs, APm, APl as compared in the LSNet and EfficientVMamba papers",
        ),
        ("mask_rcnn", "m4"): Published(
            box=(32.8, 54.4, 34.5, None, None, None),
            mask=(31.0, 51.2, 32.2),
            by="authors",
            source=f"{_CREAM} (masks); boxes as compared in later papers",
        ),
        ("retinanet", "m5"): Published(box=(34.3, 54.2, 36.1, 18.0, 36.9, 48.2), by="LSNet paper", source=_LSNET),
        ("mask_rcnn", "m5"): Published(
            box=(34.9, 57.0, 37.0, None, None, None), mask=(32.8, 53.7, 34.6), by="LSNet paper", source=_LSNET
        ),
    }
    return [
        CocoRow(
            detector=detector,
            backbone=f"efficientvit_m{number}",
            published=numbers.get((detector, f"m{number}")),
            checkpoint=f"{_M4_FILES}/{detector}_efficientvit_m4_fpn_1x_coco.pth" if number == 4 else None,
            remark="" if number == 4 else _NO_CONFIG,
        )
        for detector in ("retinanet", "mask_rcnn")
        for number in range(6)
    ]


def _efficientformer() -> list[CocoRow]:
    paper = "EfficientFormer paper (arXiv 2206.01191); the same in the RepViT and iFormer papers"
    folder = "a folder of the authors, without a list of its files; their README names efficientformer_l1_coco.pth"
    return [
        CocoRow(
            detector="mask_rcnn",
            backbone="efficientformer_l1",
            published=Published(
                box=(37.9, 60.3, 41.0, None, None, None), mask=(35.4, 57.3, 37.3), by="authors", source=paper
            ),
            checkpoint=_SNAP_FOLDER,
            remark=folder,
        ),
        CocoRow(
            detector="mask_rcnn",
            backbone="efficientformer_l3",
            published=Published(
                box=(41.4, 63.9, 44.7, None, None, None), mask=(38.1, 61.0, 40.4), by="authors", source=paper
            ),
            checkpoint=_SNAP_FOLDER,
            remark=folder,
        ),
        CocoRow(
            detector="mask_rcnn",
            backbone="efficientformer_l7",
            published=Published(
                box=(42.6, 65.1, 46.1, None, None, None),
                mask=(39.0, 62.2, 41.7),
                by="unconfirmed",
                source="EfficientFormer paper (arXiv 2206.01191), not read again; the abstract of Next-ViT (arXiv "
                "2207.05501) confirms the box AP of 42.6",
            ),
            checkpoint=_SNAP_FOLDER,
            remark=folder,
        ),
    ]


def _efficientformerv2() -> list[CocoRow]:
    numbers = {
        "s2": ((43.4, 65.4, 47.5, None, None, None), (39.5, 62.4, 42.2)),
        "l": ((44.7, 66.3, 48.8, None, None, None), (40.4, 63.5, 43.2)),
    }
    return [
        CocoRow(
            detector="mask_rcnn",
            backbone=f"efficientformerv2_{size}",
            published=Published(box=numbers[size][0], mask=numbers[size][1], by="authors", source=_REPVIT)
            if size in numbers
            else None,
            remark="" if size in numbers else "the authors released a configuration, and no numbers (issue 54)",
        )
        for size in ("s0", "s1", "s2", "l")
    ]


def _mobilevit() -> list[CocoRow]:
    zoo = "github.com/apple/ml-cvnets, first release, docs (MobileViT on MS-COCO)"
    rows = [("xxs", 19.9, 1.8, ""), ("xs", 24.8, 2.7, ""), ("s", 27.9, 5.7, "the paper (arXiv 2110.02178) prints 27.7")]
    return [
        CocoRow(
            detector="ssdlite",
            backbone=f"mobilevit_{size}",
            published=Published(box=(ap, None, None, None, None, None), by="authors", source=zoo),
            params=params,
            checkpoint=f"{_APPLE_FILES}/cvnets/detection/ssd_mobilevit_{size}_320.pt",
            remark=remark,
        )
        for size, ap, params, remark in rows
    ]


def _mobilevitv2() -> list[CocoRow]:
    zoo = "github.com/apple/ml-cvnets, README-model-zoo.md"
    rows = [
        ("0.5", 21.24, 2.0),
        ("0.75", 24.57, 3.6),
        ("1.0", 26.47, 5.6),
        ("1.25", 27.85, 8.2),
        ("1.5", 28.83, 11.3),
        ("1.75", 29.52, 14.9),
        ("2.0", 30.21, 19.1),
    ]
    return [
        CocoRow(
            detector="ssdlite",
            backbone=f"mobilevitv2_{round(100 * float(width)):03d}",
            published=Published(box=(ap, None, None, None, None, None), by="authors", source=zoo),
            params=params,
            checkpoint=f"{_APPLE_FILES}/cvnets-v2/detection/mobilevitv2/coco-ssd-mobilevitv2-{width}.pt",
        )
        for width, ap, params in rows
    ]


def _dynamicvit() -> list[CocoRow]:
    return [
        CocoRow(
            detector="mask_rcnn",
            backbone=f"dynamicvit_{size}",
            remark="the authors' code for dense tasks was not released (issue 34)",
        )
        for size in ("tiny", "small", "base")
    ]


#: Every row, detector by detector, families in the order of their papers.
ROWS: tuple[CocoRow, ...] = tuple(
    sorted(
        [*_efficientvit(), *_efficientformer(), *_efficientformerv2(), *_dynamicvit(), *_mobilevit(), *_mobilevitv2()],
        key=lambda row: list(DETECTOR_TITLES).index(row.detector),
    )
)
