"""Shapes as plain numbers while a network is traced."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effvit.backbones import create_backbone
from effvit.deploy._static_shapes import StaticShapes


class Halves(nn.Module):
    """Computes with shapes in all the ways that there are."""

    def forward(self, x):
        assert x.shape[2] > 0
        half = round(x.shape[2] / 2)
        y = F.interpolate(x, size=(half, int(x.size(3) * 1.5)), mode="bilinear")
        return y.reshape(y.shape[0], -1) / x.numel()


def test_a_trace_has_the_shapes_of_its_inputs_as_constants():
    x = torch.randn(2, 3, 9, 11)
    with StaticShapes():
        traced = torch.jit.trace(Halves(), (x,))
    torch.testing.assert_close(traced(x), Halves()(x))
    assert "aten::size" not in str(traced.graph)
    assert "aten::numel" not in str(traced.graph)
    assert x.shape == torch.Size([2, 3, 9, 11])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientvit_m0", "mobilevit_xxs", "mobilevitv2_050"])
@pytest.mark.parametrize("size", [(96, 128), (70, 90)])
def test_an_exported_backbone_has_the_same_digits_at_any_size(name, size, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    backbone = create_backbone(name).eval()
    backbone.prepare_for_dense()
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = backbone(x)
        with StaticShapes():
            torch.onnx.export(backbone, (x,), tmp_path / "a.onnx", dynamo=False, opset_version=17)
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for own, wanted in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(own), wanted, atol=1e-4, rtol=1e-4)
