"""Opening exported files, and what is said of those that cannot be."""

from __future__ import annotations

import pytest
import torch

from effvit.deploy import _installed
from effvit.deploy.export import export
from effvit.deploy.exported import metadata_of, open_exported
from effvit.deploy.formats import FORMATS
from effvit.errors import ConfigError, ExportError

SIZE = (32, 64)


@pytest.fixture
def torchscript(stand_ins, tmp_path):
    return export(stand_ins.detector(), "torchscript", tmp_path / "a.torchscript", size=SIZE).path


def written(name, stand_ins, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    return export(stand_ins.classifier(), name, tmp_path / f"a{FORMATS[name].suffix}", size=SIZE, batch=1).path


def test_torchscript_under_its_usual_suffix(torchscript, stand_ins):
    path = torchscript.rename(torchscript.with_suffix(".pt"))
    module = stand_ins.detector()
    inputs = module.example_inputs(1, SIZE)
    opened = open_exported(path)
    assert opened.format == "torchscript"
    for found, expected in zip(opened.run(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_metadata_is_read_without_loading(torchscript):
    found = metadata_of(torchscript)
    assert (found["task"], found["size"], found["batch"]) == ("detection", [32, 64], 1)
    assert found["inputs"][1] == {"name": "sizes", "dtype": "int64", "shape": [1, 2]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images, sizes: (images, sizes), r"takes 3 inputs \('images', 'sizes', 'original_sizes'\), not 2"),
        (
            lambda images, sizes: (images[..., :32], sizes, sizes),
            r"images must have the shape \(1, 3, 32, 64\), not \(1, 3, 32, 32\)",
        ),
        (lambda images, sizes: (images.float(), sizes, sizes), "images must be uint8, not torch.float32"),
        (lambda images, sizes: (images, sizes[0], sizes), r"sizes must have the shape \(1, 2\), not \(2,\)"),
    ],
)
def test_other_inputs_than_a_file_takes(torchscript, stand_ins, change, words):
    images, sizes, _ = stand_ins.detector().example_inputs(1, SIZE)
    with pytest.raises(ConfigError, match=words):
        open_exported(torchscript).run(*change(images, sizes))


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no exported model at .*a.onnx: make one with `effvit export"):
        open_exported(tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["notes.txt", "best.ckpt"])
def test_a_file_of_another_kind(tmp_path, name):
    torch.save({"weights": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ExportError, match=f"{name} is not an exported model: expected .onnx, .xml"):
        open_exported(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_model_that_is_not_of_effvit(tmp_path):
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(tmp_path / "a.torchscript")
    with pytest.raises(ExportError, match="a file of torchscript but not one of effvit's"):
        open_exported(tmp_path / "a.torchscript")


def test_an_onnx_file_that_is_not_of_effvit(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    made = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", made[:1], made[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="a file of onnx but not one of effvit's"):
        open_exported(tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_a_damaged_file(name, stand_ins, tmp_path):
    path = written(name, stand_ins, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=f"cannot be opened as {name}, it is damaged or cut off"):
        open_exported(path)


def test_a_damaged_file_of_openvino(stand_ins, tmp_path):
    path = written("openvino", stand_ins, tmp_path)
    weights = path.with_suffix(".bin").rename(tmp_path / "b.bin")
    with pytest.raises(ExportError, match=r"a\.xml has its weights in a\.bin, which is not beside it"):
        open_exported(path)
    weights.rename(path.with_suffix(".bin"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match="cannot be opened as openvino, it is damaged or cut off"):
        open_exported(path)


def test_a_runtime_that_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"")
    monkeypatch.setattr(_installed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs onnxruntime, not installed here: pip install "effvit\[onnx\]"'):
        open_exported(tmp_path / "a.onnx")


def test_threads_of_torch(torchscript):
    before = torch.get_num_threads()
    try:
        open_exported(torchscript, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
