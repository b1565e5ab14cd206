"""What pixel values mean, and mask files of every sort."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from effvit.datamodules._mask_classes import MaskClasses
from effvit.datamodules._mask_files import MaskFiles, MaskPair, read_values
from effvit.errors import DatasetError

VALUES = np.array([[1, 3, 7], [7, 255, 1]], dtype=np.uint8)
NAMES = {1: "road", 3: "car", 7: "sky"}


def save(path, image, **options):
    image.save(path, **options)
    return path


def palette(values):
    image = Image.fromarray(values, mode="P") if values.ndim == 2 else values
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(VALUES),
        palette(VALUES.copy()),
        Image.fromarray(VALUES.astype(np.uint16)),
        Image.fromarray(VALUES.astype(np.int32)),
        Image.merge("LA", [Image.fromarray(VALUES), Image.fromarray(255 - VALUES)]),
    ],
    ids=["grey", "palette", "16 bit", "32 bit", "alpha"],
)
def test_indices_are_read_as_they_are(image, tmp_path):
    """Indices of a palette too, whatever its colours."""
    path = save(tmp_path / "mask.tif" if image.mode == "I" else tmp_path / "mask.png", image)
    assert (read_values(path) == VALUES).all()


def test_16_bit_ids_above_255_are_classes(tmp_path):
    values = np.array([[300, 65535, 2]], dtype=np.uint16)
    read = read_values(save(tmp_path / "mask.png", Image.fromarray(values)))
    labels, unknown = MaskClasses({2: "a", 300: "b"}, ignored=[65535]).labels(read)
    assert labels.tolist() == [[1, -1, 0]]
    assert labels.dtype == np.int16
    assert not unknown


def test_colours_are_read_as_colours(tmp_path):
    colours = {1: (255, 0, 0), 3: (0, 0, 255), 7: (0, 255, 9)}
    pixels = np.array([[colours[1], colours[7]], [colours[3], (1, 2, 3)]], dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("RGBA")):
        classes = MaskClasses(NAMES, ignored=[3], colours=colours)
        labels, unknown = classes.labels(read_values(save(tmp_path / "mask.png", image)))
        assert labels.tolist() == [[0, 1], [-1, -1]]
        assert unknown == {"#010203": 1}
    assert "#010203 (1 px)" in classes.explain_unknown(unknown)
    assert "declared colours: #ff0000, #0000ff, #00ff09" in classes.explain_unknown(unknown)


def test_more_than_255_classes():
    classes = MaskClasses({value: str(value) for value in range(1000)})
    labels, _ = classes.labels(np.arange(1000).reshape(10, 100))
    assert (labels == np.arange(1000).reshape(10, 100)).all()


def test_labels_follow_ascending_ids_and_remapping():
    classes = MaskClasses({9: "z", 2: "a", 5: "b"}, ignored=[255, 0], merge={5: 9, 40: 2, 2: 2})
    assert classes.categories.to_dict() == {2: "a", 9: "z"}
    assert len(classes) == 2
    labels, unknown = classes.labels(np.array([[2, 5, 9, 40], [255, 0, 77, 77]], dtype=np.uint8))
    assert labels.tolist() == [[0, 1, 1, 0], [-1, -1, -1, -1]]
    assert unknown == {"77": 2}
    assert classes.explain_unknown(unknown).endswith("77 (2 px); known values: 0, 2, 5, 9, 40, 255")


def test_known_values_are_named_as_ranges():
    text = MaskClasses(dict.fromkeys(range(1, 151), "x"), ignored=[0]).explain_unknown({"200": 3})
    assert text.endswith("known values: 0 … 150")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": {4: 8}}, "the pixel value 4 is merged into 8, which is no class; classes: 1, 3, 7"),
        ({"merge": {4: 7}, "ignored": [7]}, "merged into 7, which is no class; classes: 1, 3"),
        ({"merge": {1: 3, 3: 7}}, "merged into 3, which is no class; classes: 7"),
        ({"merge": {1: 3}, "ignored": [1]}, "1 is both ignored and merged into 3"),
        ({"ignored": [-1]}, "ignored pixel value -1 is no pixel value"),
        ({"ignored": [70000]}, "must be an integer in 0 … 65535"),
        ({"colours": {1: (1, 1, 1), 3: (2, 2, 2), 7: (1, 1, 1)}}, "two classes have the colour #010101"),
        ({"ignored": [1, 3, 7]}, "needs at least one category"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(DatasetError, match=message):
        MaskClasses(NAMES, **options)


@pytest.fixture
def files(tmp_path):
    """A pair whose mask is to be replaced."""
    save(tmp_path / "image.png", Image.fromarray(np.zeros((2, 3, 3), np.uint8)))
    save(tmp_path / "mask.png", Image.fromarray(VALUES))

    def make(unknown="error", **options):
        classes = MaskClasses(NAMES, **{"ignored": [255]} | options)
        return MaskFiles(tmp_path, [MaskPair("image.png", "mask.png")], classes, unknown)

    return make


def test_a_pair(files):
    image, labels = files().read(0)
    assert image.shape == (2, 3, 3)
    assert labels.tolist() == [[0, 1, 2], [2, -1, 0]]


def test_unknown_values_are_refused_or_ignored(files):
    with pytest.raises(DatasetError, match=r"mask.png has pixel values that are no class: 255 \(1 px\)"):
        files(ignored=[]).read(0)
    assert files("ignore", ignored=[]).read(0)[1].tolist() == [[0, 1, 2], [2, -1, 0]]


def test_grey_saved_as_rgb_is_indices_and_colours_need_a_declaration(files, tmp_path):
    save(tmp_path / "mask.png", Image.fromarray(VALUES).convert("RGB"))
    assert files().read(0)[1].tolist() == [[0, 1, 2], [2, -1, 0]]
    pixels = np.repeat(VALUES[..., None], 3, axis=-1)
    pixels[0, 0] = (1, 0, 0)
    save(tmp_path / "mask.png", Image.fromarray(pixels))
    with pytest.raises(DatasetError, match=r"holds RGB colours, and the classes declare none: give each class its"):
        files().read(0)


def test_another_size_is_refused_with_both(files, tmp_path):
    save(tmp_path / "mask.png", Image.fromarray(VALUES[:, :2].copy()))
    with pytest.raises(DatasetError, match=r"the image has 3x2 pixels \(width x height\), its mask 2x2"):
        files().read(0)


@pytest.mark.parametrize(("stored", "turned"), [((2, 3), True), ((3, 2), False)])
def test_the_mask_decides_whether_exif_rotation_counts(files, tmp_path, stored, turned):
    """A mask may have been drawn on the image as displayed, or as stored."""
    pixels = np.zeros((3, 2, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "image.png", Image.fromarray(pixels), exif=exif)
    mask = np.ones(stored, np.uint8)
    save(tmp_path / "mask.png", Image.fromarray(mask))
    image, labels = files().read(0)
    assert image.shape[:2] == labels.shape == stored
    assert tuple(np.argwhere(image[..., 0] == 255)[0]) == ((0, 2) if turned else (0, 0))
    assert (files().read_image(0) == image).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot read mask .*mask.png: there is no such file"),
        (lambda path: path.write_bytes(b"no picture"), "mask .*mask.png cannot be opened"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "mask .*mask.png is truncated or damaged"),
        (lambda path: Image.new("CMYK", (3, 2)).save(path, format="tiff"), "has pixels of the sort 'CMYK'"),
        (lambda path: Image.new("F", (3, 2)).save(path, format="tiff"), "has pixels of the sort 'F'"),
    ],
)
def test_what_is_no_mask_is_refused(files, tmp_path, damage, message):
    damage(tmp_path / "mask.png")
    with pytest.raises(DatasetError, match=message):
        files().read(0)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("indexed", [False, True])
def test_values_of_few_bits_are_not_stretched(tmp_path, bits, indexed):
    """PNG optimisers store few classes in few bits, which Pillow and OpenCV stretch to 0 … 255 where they are grey."""
    values = np.resize(np.arange(2**bits), (3, 16)).astype(np.uint8)
    rows = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(3, -1)
    data = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 3, bits, 3 if indexed else 0, 0, 0, 0))]
    parts += [chunk(b"PLTE", bytes(range(3 * 2**bits)))] if indexed else []
    parts += [chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert (read_values(tmp_path / "mask.png") == values).all()
