"""Image files of every kind that data sets hold."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from effvit.datamodules._decode import read_image
from effvit.errors import DatasetError

ROTATED = 6  # EXIF: stored lying on its side, to be turned by 90 degrees clockwise
UPSIDE_DOWN = 3


@pytest.fixture
def picture():
    """A smooth picture, 40 wide and 24 high."""
    rows, columns = np.mgrid[0:24, 0:40]
    return np.stack([rows * 10, columns * 6, 255 - rows * 10], -1).astype(np.uint8)


def load(path, **options):
    return read_image(path, **options).permute(1, 2, 0).numpy()


def save_with_orientation(path, picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(path, exif=exif, quality=95)


def test_jpeg_has_opencvs_pixels(tmp_path, picture):
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), picture)
    image = read_image(path)
    assert image.shape == (3, 24, 40)
    assert (image.permute(1, 2, 0).numpy() == cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)).all()


@pytest.mark.parametrize("name", ["grey.jpg", "grey.png"])
def test_greyscale_becomes_three_equal_channels(tmp_path, picture, name):
    Image.fromarray(picture[..., 1]).save(tmp_path / name)
    image = load(tmp_path / name)
    assert image.shape == (24, 40, 3)
    assert np.abs(image.astype(int) - picture[..., 1:2]).max() <= 3


@pytest.mark.parametrize("name", ["cmyk.jpg", "cmyk.tif"])
def test_cmyk(tmp_path, picture, name):
    Image.fromarray(picture).convert("CMYK").save(tmp_path / name)
    assert np.abs(load(tmp_path / name).astype(int) - picture).mean() < 4


def test_16_bit_png_keeps_the_high_byte(tmp_path, picture):
    deep = picture[..., 1].astype(np.uint16) * 256 + 200
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    assert (load(tmp_path / "deep.png") == picture[..., 1:2]).all()


def test_16_bit_colour_png(tmp_path, picture):
    cv2.imwrite(str(tmp_path / "deep.png"), picture[..., ::-1].astype(np.uint16) * 257)
    assert np.abs(load(tmp_path / "deep.png").astype(int) - picture).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "F"])
def test_other_modes_of_png_and_tiff(tmp_path, picture, mode):
    path = tmp_path / ("a.tif" if mode == "F" else "a.png")
    source = Image.fromarray(picture).convert(mode if mode != "LA" else "L").convert(mode)
    source.save(path)
    assert load(path).shape == (24, 40, 3)
    assert (load(path) == np.asarray(source.convert("RGB"))).all()


def test_exif_rotation_is_applied_where_the_annotation_is_of_the_displayed_image(tmp_path, picture):
    save_with_orientation(tmp_path / "a.jpg", picture, ROTATED)
    upright = load(tmp_path / "a.jpg", size=(40, 24))
    assert upright.shape == (40, 24, 3)
    assert np.abs(upright.astype(int) - np.rot90(picture, -1)).mean() < 4
    assert (upright == load(tmp_path / "a.jpg")).all()  # without annotation, as displayed


def test_exif_rotation_is_not_applied_where_the_annotation_is_of_the_stored_image(tmp_path, picture):
    save_with_orientation(tmp_path / "a.jpg", picture, ROTATED)
    assert np.abs(load(tmp_path / "a.jpg", size=(24, 40)).astype(int) - picture).mean() < 4


def test_exif_rotation_of_the_same_size_is_applied(tmp_path, picture):
    save_with_orientation(tmp_path / "a.jpg", picture, UPSIDE_DOWN)
    assert np.abs(load(tmp_path / "a.jpg", size=(24, 40)).astype(int) - picture[::-1, ::-1]).mean() < 4


def test_another_size_than_annotated_names_both(tmp_path, picture):
    save_with_orientation(tmp_path / "a.jpg", picture, ROTATED)
    with pytest.raises(DatasetError, match=r"a\.jpg \(image id 7\) has 40x24 .*24x40 after its EXIF.* says 50x24"):
        read_image(tmp_path / "a.jpg", size=(24, 50), where="image id 7")


def test_missing_file(tmp_path):
    with pytest.raises(DatasetError, match=r"gone\.jpg \(image id 7\): there is no such file"):
        read_image(tmp_path / "gone.jpg", where="image id 7")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "progressive.jpg", "exif.jpg"])
def test_truncated_file(tmp_path, picture, name):
    path = tmp_path / name
    big = cv2.resize(picture, (400, 240))
    if name == "exif.jpg":
        save_with_orientation(path, big, ROTATED)
    else:
        Image.fromarray(big).save(path, **({"progressive": True} if "prog" in name else {}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DatasetError, match=rf"{name} \(image id 7\) is truncated or damaged"):
        read_image(path, where="image id 7")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_not_an_image(tmp_path, content):
    (tmp_path / "page.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match=r"page\.jpg \(image id 7\) is not an image"):
        read_image(tmp_path / "page.jpg", where="image id 7")


def test_bytes_after_the_picture_do_no_harm(tmp_path, picture):
    cv2.imwrite(str(tmp_path / "a.jpg"), picture)
    before = load(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"\0" * 100)
    assert (load(tmp_path / "a.jpg") == before).all()
