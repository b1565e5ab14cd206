"""Box offsets: torchvision's coder with both bounds."""

import math

import torch

from effvit.tasks.detectors.coder import SymmetricBoxCoder

CODER = SymmetricBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


def test_decode_inverts_encode():
    anchors = torch.tensor([[0.0, 0, 32, 64], [10, 20, 50, 40]])
    boxes = torch.tensor([[5.0, 6, 40, 50], [0, 0, 100, 10]])
    torch.testing.assert_close(CODER.decode_single(CODER.encode_single(boxes, anchors), anchors), boxes)


def test_sizes_are_bounded_on_both_sides_and_offsets_are_not_changed():
    anchors = torch.tensor([[0.0, 0, 32, 32]] * 2)
    deltas = torch.tensor([[0.0, 0, -9, 9], [0, 0, -math.log(1000 / 16), math.log(1000 / 16)]])
    before = deltas.clone()
    wild, edge = CODER.decode_single(deltas, anchors)
    torch.testing.assert_close(wild, edge)
    torch.testing.assert_close(wild[2] - wild[0], torch.tensor(32 * 16 / 1000))
    torch.testing.assert_close(wild[3] - wild[1], torch.tensor(32 * 1000 / 16))
    assert torch.equal(deltas, before)


def test_no_boxes():
    assert CODER.decode_single(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
