"""Files made to change the program that opens them, by pickle's own instructions."""

from __future__ import annotations

import io
import pickle
import zipfile

import pytest
import torch
from torch import nn

from effvit.backbones import _stand_ins as stand_ins
from effvit.backbones import open_checkpoint
from effvit.errors import CheckpointError

FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"
STAND_IN = b"cnumpy\nfoo\n"


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def attributes(name, value):
    """The state that has BUILD set an attribute, whether or not there is a ``__dict__``."""
    return b"(N}" + text(name) + value + b"st"


DEFAULTS = attributes("__defaults__", b"(}" + text("neg") + b"\x88st")
ATTACKS = {
    "defaults of a function": FUNCTION + DEFAULTS + b"b",
    "dictionary of a function": FUNCTION + b"}" + text("mark") + b"K\x01sb",
    "a function kept in the memo": FUNCTION + b"q\x010h\x01" + DEFAULTS + b"b",
    "a function out of a tuple": b"(" + FUNCTION + b"q\x02t0h\x02" + DEFAULTS + b"b",
    "another function": b"ctorch._utils\n_rebuild_parameter\n" + DEFAULTS + b"b",
    "what a function is kept in": FUNCTION + attributes("_make", b"N") + b"b",
    "a class": ORDERED + attributes("get", b"N") + b"b",
    "a class of torch": b"ctorch\nSize\n" + attributes("numel", b"N") + b"b",
    "the device": b"ctorch\ndevice\n" + attributes("type", b"N") + b"b",
    "a type of numbers": b"ctorch\nfloat32\n" + attributes("itemsize", b"K\x01") + b"b",
    "dictionary of a type of numbers": b"ctorch\nfloat32\n}" + text("itemsize") + b"K\x01sb",
    "the stand-in": STAND_IN + attributes("append", b"N") + b"b",
    "the stand-in's dictionary": STAND_IN + b"}" + text("append") + b"Nsb",
    "an item of a function": FUNCTION + text("a") + b"K\x01s",
    "an item of a class": ORDERED + text("a") + b"K\x01s",
    "items of a type of numbers": b"ctorch\nfloat32\n(" + text("a") + b"K\x01u",
    "an element of a function": FUNCTION + b"K\x01a",
    "elements of a class": ORDERED + b"(K\x01e",
    "an element of the stand-in": STAND_IN + b"K\x01a",
    "a member of a function": FUNCTION + b"(K\x01\x90",
    "an object of a function's": FUNCTION + b")\x81",
    "a storage of nothing": b"(" + text("storage") + STAND_IN + text("0") + text("cpu") + b"K\x01tQ",
}


def write(path, instructions, extra=None):
    """An archive of torch.save's whose pickle runs instructions first; with an object that asks for stand-ins."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(3)}}, buffer)
    code = b"\x80\x02" + STAND_IN + b"0" + instructions + b"0}" + text("state_dict") + b"}s."
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, code if name.endswith("data.pkl") else source.read(name))
            if name.endswith("data.pkl") and extra is not None:
                target.writestr(name.replace("data.pkl", extra), code)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_cannot_change_how_others_are_read(attack, tmp_path):
    state = {"a": torch.arange(3.0), "b": nn.Parameter(torch.ones(2))}
    torch.save({"state_dict": state, "meta": torch.float32, "shape": torch.Size([2])}, tmp_path / "good.pt")
    shared = (torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter, stand_ins._StandIn)
    before = [(part.__dict__.copy(), getattr(part, "__defaults__", None)) for part in shared]
    expected = [stand_ins.load_without_objects(tmp_path / "good.pt"), open_checkpoint(tmp_path / "good.pt")]
    write(tmp_path / "hostile.pt", ATTACKS[attack])
    try:
        with pytest.raises(CheckpointError, match=r"hostile\.pt .*refused and nothing of it was executed"):
            open_checkpoint(tmp_path / "hostile.pt")
        assert [(part.__dict__.copy(), getattr(part, "__defaults__", None)) for part in shared] == before
    finally:
        for part, (_, defaults) in zip(shared[:2], before, strict=False):
            part.__defaults__ = defaults
    found = [stand_ins.load_without_objects(tmp_path / "good.pt"), open_checkpoint(tmp_path / "good.pt")]
    for own, other in zip(found, expected, strict=True):
        assert own.keys() == other.keys()
        assert (own["meta"], own["shape"]) == (other["meta"], other["shape"])
        assert all(torch.equal(own["state_dict"][name], state[name]) for name in state)


def test_what_is_done_to_objects_of_a_file_stays_in_it(tmp_path):
    done = b"ctorch\nFloatStorage\n" + attributes("_dtype", b"N") + b"b0"  # torch makes a new object for each name
    done += ORDERED + b")R" + attributes("mark", b"K\x01") + b"b0"
    done += STAND_IN + b")R" + attributes("append", b"N") + b"b"
    write(tmp_path / "x.pt", done)
    assert open_checkpoint(tmp_path / "x.pt") == {"state_dict": {}}
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "good.pt")
    found = stand_ins.load_without_objects(tmp_path / "good.pt")["state_dict"]
    assert found["a"].dtype == torch.float32
    assert callable(stand_ins._StandIn().append)


def test_a_program_of_torchscript_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    write(tmp_path / "x.pt", b"N", extra="constants.pkl")
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        stand_ins.load_without_objects(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(tmp_path / "x.pt")
