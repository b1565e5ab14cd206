"""What was published on ADE20K and PASCAL VOC for the backbones of this project, with its source.

One row for each published network that the project has a recipe of, and one for every other variant of those families
whose authors released a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from effvit._cli.shipped import merged_config, shipped_configs

#: How the heads are called in print.
HEAD_TITLES = {"semantic_fpn": "Semantic FPN", "deeplabv3": "DeepLabv3"}


@dataclass(frozen=True)
class DataSet:
    """A data set that is told by its validation split.

    Attributes:
        title: How it is called in print.
        data_module: Class name of the data module that reads it.
        images: Images of its validation split.
        classes: Its classes.
    """

    title: str
    data_module: str
    images: int
    classes: int


DATA_SETS = {
    "ade20k": DataSet("ADE20K", "ADE20K", 2000, 150),
    "voc": DataSet("PASCAL VOC 2012", "PascalVOC", 1449, 21),
}

#: Height and width of the image at which the cost is counted, in pixels: the crop of the recipes.
IMAGE_SIZE = (512, 512)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published number of one network.

    Attributes:
        miou: Mean intersection over union, in percent.
        by: Who published it: ``authors`` or another paper.
        source: Where.
    """

    miou: float
    by: str
    source: str


@dataclass(frozen=True, kw_only=True)
class SegmentationRow:
    """A row of the table.

    Attributes:
        head: Name of the head, as ``--model.head`` takes it.
        backbone: Name of the backbone, as ``--model.backbone`` takes it.
        data_set: A key of `DATA_SETS`.
        published: The number, or ``None`` where there is none.
        params: Parameters of the whole network in millions, as printed by the authors.
        checkpoint: Address of the trained network, or ``None`` where there is none.
        remark: What else is known of the number or of the file.
    """

    head: str
    backbone: str
    data_set: str
    published: Published | None = None
    params: float | None = None
    checkpoint: str | None = None
    remark: str = ""

    @property
    def config(self) -> str:
        """Name of the shipped configuration that trains it."""
        return f"segmentation/{self.data_set}/{self.head}_{self.backbone}"


@cache
def config_of(row: SegmentationRow) -> dict[str, Any]:
    """What the configuration of a row says, with those that it builds on; only to be read."""
    return merged_config(shipped_configs()[row.config])


_SNAP_FOLDER = "https://drive.google.com/drive/folders/1sklA_2Q8_2f-RaOYSj4n8rDGAsV-wh5g"
_APPLE_FILES = "https://docs-assets.developer.apple.com/ml-research/models/cvnets/segmentation"
_PAPER = "EfficientFormer paper (arXiv 2206.01191)"
_REPVIT = "EfficientFormerV2 paper (arXiv 2212.08059), as the RepViT paper (arXiv 2307.09283) compares it"


def _efficientformer() -> list[SegmentationRow]:
    compared = f"{_PAPER}; the same in the RepViT and iFormer papers"
    numbers = {
        "efficientformer_l1": (38.9, compared),
        "efficientformer_l3": (43.5, compared),
        "efficientformer_l7": (45.1, f"{_PAPER}; VCMamba's README confirms it by a difference"),
        "efficientformerv2_s0": None,
        "efficientformerv2_s1": None,
        "efficientformerv2_s2": (42.4, _REPVIT),
        "efficientformerv2_l": (45.2, _REPVIT),
    }
    return [
        SegmentationRow(
            head="semantic_fpn",
            backbone=backbone,
            data_set="ade20k",
            published=number and Published(miou=number[0], by="authors", source=number[1]),
            checkpoint=_SNAP_FOLDER if number else None,
            remark=(
                "a folder of the authors, without a list of its files; their README names efficientformer_l1_ade20k.pth"
                if number
                else "the authors released a configuration, and no number"
            ),
        )
        for backbone, number in numbers.items()
    ]


def _mobilevit() -> list[SegmentationRow]:
    rows = (
        ("xxs", 73.6, 1.9, "the first release of ml-cvnets prints 72.8 for its file"),
        ("xs", 77.1, 2.9, ""),
        ("s", 79.1, 6.4, "the first release of ml-cvnets prints 79.3 for its file"),
    )
    return [
        SegmentationRow(
            head="deeplabv3",
            backbone=f"mobilevit_{size}",
            data_set="voc",
            published=Published(miou=miou, by="authors", source="MobileViT paper (arXiv 2110.02178), table 3"),
            params=params,
            checkpoint=f"{_APPLE_FILES}/deeplabv3_mobilevit_{size}.pt",
            remark=remark,
        )
        for size, miou, params, remark in rows
    ]


#: Every row, data set by data set, families in the order of their papers.
ROWS: tuple[SegmentationRow, ...] = (*_efficientformer(), *_mobilevit())
