"""Each runtime gives eager's outputs, says what it lacks, and leaves the network alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from effvit.backbones import create_classifier
from effvit.backbones._windows import ShapeCache
from effvit.deploy import _installed, _runtimes_compiled, _runtimes_onnx, _runtimes_openvino
from effvit.deploy._detections import Matched
from effvit.deploy._runtimes_contract import converting, copied, flatten
from effvit.deploy._runtimes_files import fingerprint
from effvit.deploy.runtimes import (
    RUNTIMES,
    TOLERANCES,
    Agreement,
    Setting,
    check,
    compare,
    is_installed,
    prepare,
    require,
)
from effvit.errors import ConfigError, ExportError

PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
COMPILED = ("compile", "pt2")


class Block(nn.Module):
    """A convolution with BatchNorm that can be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, images):
        return self.bn(self.conv(images)).relu_()

    def fuse(self):
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()
        return self


class Tiny(nn.Module):
    """Convolution and attention; bytes and integers in, a dict with a tuple in it out."""

    def __init__(self, *, fusible: bool = True) -> None:
        super().__init__()
        self.stem = Block() if fusible else nn.Conv2d(3, 8, 3, 2, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, images, sizes):
        maps = self.stem(images.to(torch.float32) / 255)
        tokens = maps.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return {"maps": maps, "inner": (self.head(tokens.mean(1)), sizes * 2)}


def seeded(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 1.5)
    return module.eval()


@pytest.fixture(scope="module")
def tiny():
    return seeded(Tiny())


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.tensor([[32, 32], [20, 31]])


@pytest.fixture(scope="module")
def expected(tiny, inputs):
    return list(flatten(tiny(*inputs)).values())


def needs(runtime: str) -> None:
    for package in PACKAGES.get(runtime, ()):
        pytest.importorskip(package)


def agrees(tiny, inputs, expected, runtime, setting):
    before = copy.deepcopy(tiny.state_dict())
    ready = prepare(tiny, inputs, runtime, setting)
    agreement = compare(ready.outputs(), expected, ready.names)
    check(agreement, runtime, setting.precision)
    assert ready.names == ["maps", "inner.0", "inner.1"]
    assert ready.seconds > 0
    first = ready.outputs()
    kept = [tensor.clone() for tensor in first]
    ready.run()
    assert all(torch.equal(left, right) for left, right in zip(first, kept, strict=True)), "a later run overwrote them"
    assert first[2].dtype == torch.int64
    assert first[2].tolist() == [[64, 64], [40, 62]]
    after = tiny.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not tiny.training
    return agreement


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [
        *((name, "fp32") for name in RUNTIMES if name not in COMPILED),
        *((name, "bf16") for name in ("eager", "channels_last", "fused", "torchscript")),
        ("onnx", "int8"),
        ("openvino", "int8"),
    ],
)
def test_outputs_are_eagers(tiny, inputs, expected, runtime, precision):
    needs(runtime)
    agreement = agrees(tiny, inputs, expected, runtime, Setting(precision=precision))
    # Fewer bits show: a precision that was silently ignored would be exact.
    assert (agreement.error > 1e-5) == (precision != "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("runtime", COMPILED)
def test_outputs_of_compiled_networks_are_eagers(tiny, inputs, expected, runtime, precision, tmp_path):
    agrees(tiny, inputs, expected, runtime, Setting(precision=precision, folder=tmp_path))
    assert (tmp_path / "inductor").is_dir()
    if runtime == "pt2":
        again = prepare(tiny, inputs, runtime, Setting(precision=precision, folder=tmp_path))
        check(compare(again.outputs(), expected), runtime, precision)
        assert len(list(tmp_path.glob("*.pt2"))) == 1


@pytest.mark.slow
def test_many_networks_of_one_class_are_all_compiled(monkeypatch):
    """Frozen weights are one network's own, and torch silently gives up on a class after eight networks."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_network = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compile_network(network, backend=count, dynamic=False))
    images = torch.zeros(1, 3, 8, 8)
    for _ in range(10):
        prepare(seeded(Block()), (images,), "compile", Setting())
    assert len(graphs) == 10


@pytest.mark.parametrize("runtime", ["eager", "channels_last", "torchscript"])
def test_lower_precision_is_autocast_whatever_the_inputs(runtime):
    class Both(Block):
        def forward(self, images):
            images = images.float() / 255
            return super().forward(images), images * 3

    network, images = seeded(Both()), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = [prepare(network, (own,), runtime, Setting(precision="bf16")).outputs() for own in (images, images.float())]
    for maps, scaled in found:
        assert torch.equal(maps, maps.bfloat16().float())
        assert torch.equal(scaled, images.float() / 255 * 3), "what autocast leaves in float32 is exact"
        check(compare([maps], [network(images)[0]]), runtime, "bf16")
    assert torch.equal(found[0][0], found[1][0])
    assert network.conv.weight.dtype == torch.float32


def test_inputs_are_shared_by_what_is_prepared_on_them(monkeypatch):
    seen = []

    class Seeing(Block):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    network, images = seeded(Seeing()), torch.rand(2, 3, 8, 8)
    first, second = (prepare(network, (images,), "channels_last", Setting(precision=name)) for name in ("fp32", "bf16"))
    one, two = seen
    assert one is two
    assert one.is_contiguous(memory_format=torch.channels_last)
    images.zero_()
    third = prepare(network, (images,), "channels_last", Setting())
    assert seen[-1] is not one, "a copy of what the input was before"
    assert not seen[-1].any()
    prepare(network, (images,), "eager", Setting())
    assert seen[-1].data_ptr() == images.data_ptr()
    assert all(ready.outputs() for ready in (first, second, third))


def test_fp32_on_a_gpu_is_no_tf32(monkeypatch):
    from effvit.deploy._runtimes_torch import _exact

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for device, precision, allowed in (("cuda", "fp32", False), ("cuda", "fp16", True), ("cpu", "fp32", True)):
        with _exact(Setting(device, precision)):
            assert torch.backends.cudnn.allow_tf32 == allowed
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "runtime",
    ["fused", pytest.param("torchscript", marks=pytest.mark.slow), pytest.param("onnx", marks=pytest.mark.slow)],
)
def test_a_networks_deploy_form_and_caches_are_its_copys(runtime):
    needs(runtime)
    network, images = create_classifier("efficientvit_m0").eval(), torch.rand(2, 3, 64, 64)
    expected = prepare(network, (images,), "eager", Setting()).outputs()
    caches = [part for module in network.modules() for part in vars(module).values() if isinstance(part, ShapeCache)]
    kept = [dict(cache._kept) for cache in caches]
    assert any(kept)
    names = [name for name, _ in network.named_parameters()]
    ready = prepare(network, (images,), runtime, Setting())
    check(compare(ready.outputs(), expected), runtime, "fp32")
    assert [name for name, _ in network.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert [dict(cache._kept) for cache in caches] == kept


def test_copies_fuse_the_topmost_parts_alone():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = Block(), 0

        def fuse(self):
            self.calls += 1

    network = nn.Sequential(Outer(), Block())
    own = copied(network, fused=True)
    assert own[0].calls == 1
    assert isinstance(own[0].inner.bn, nn.BatchNorm2d)
    assert isinstance(own[1].bn, nn.Identity)
    assert isinstance(network[1].bn, nn.BatchNorm2d)


def test_what_has_no_deploy_form_says_so(inputs):
    with pytest.raises(ConfigError, match="Tiny has nothing to fuse"):
        prepare(seeded(Tiny(fusible=False)), inputs, "fused", Setting())


def test_the_networks_own_names_of_outputs():
    class Named(nn.Module):
        output_names = ("double", "half")

        def forward(self, x):
            return x * 2, x / 2

    ready = prepare(Named().eval(), (torch.ones(1),), "eager", Setting())
    assert [tensor.item() for tensor in ready.outputs()] == [2, 0.5]
    assert ready.names == ["double", "half"]
    Named.output_names = ("too few",)
    ready = prepare(Named().eval(), (torch.ones(1),), "eager", Setting())
    ready.outputs()
    assert ready.names == ["0", "1"]


def test_numbered_outputs_and_inputs_that_nothing_reads(tmp_path):
    needs("openvino")

    class Numbered(nn.Module):
        def forward(self, unread, images):
            return images * 2, images + 1

    images = torch.rand(1, 3, 4, 4)
    expected = [images * 2, images + 1]
    for runtime in ("onnx", "openvino"):
        ready = prepare(Numbered().eval(), (torch.zeros(1), images), runtime, Setting(folder=tmp_path))
        check(compare(ready.outputs(), expected), runtime, "fp32")
        assert ready.names == ["0", "1"]


def test_files_are_found_again(tiny, inputs, expected, tmp_path, monkeypatch):
    needs("openvino")
    setting = Setting(folder=tmp_path / "new")
    prepare(tiny, inputs, "onnx", setting)
    (path,) = setting.folder.iterdir()
    monkeypatch.setattr(_runtimes_onnx, "_export", None)  # nothing is converted again
    for runtime in ("onnx", "openvino"):
        ready = prepare(tiny, inputs, runtime, setting)
        check(compare(ready.outputs(), expected), runtime, "fp32")
        assert ready.names == ["maps", "inner.0", "inner.1"]
    assert list(setting.folder.iterdir()) == [path]


def test_files_are_of_one_network_and_shape(tiny, inputs):
    first = fingerprint(tiny, inputs)
    assert fingerprint(copy.deepcopy(tiny), tuple(tensor.clone() for tensor in inputs)) == first
    assert fingerprint(tiny, (inputs[0][:1], inputs[1])) != first
    assert fingerprint(tiny, inputs, "pt2") != first
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    assert fingerprint(other, inputs) != first
    other = copy.deepcopy(tiny)
    other.threshold = 0.5
    assert fingerprint(other, inputs) != first


def test_a_failed_conversion_names_the_network_and_leaves_nothing(tmp_path, capfd):
    needs("onnx")

    class Unknown(nn.Module):
        def forward(self, images):
            return torch.linalg.eigvals(images)

    with pytest.raises(ExportError, match=r"Unknown cannot be converted for ONNX: .*eigvals"):
        prepare(Unknown().eval(), (torch.rand(1, 3, 4, 4),), "onnx", Setting(folder=tmp_path))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_no_chatter(tiny, inputs, capfd):
    needs("openvino")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for runtime in ("torchscript", "onnx", "openvino"):
            prepare(tiny, inputs, runtime, Setting())
    assert capfd.readouterr() == ("", "")


def test_a_network_of_one_type_alone_says_so_in_another():
    class Stubborn(Block):
        def forward(self, images):
            maps = super().forward(images)
            return torch.zeros(maps.shape).scatter(1, torch.zeros(maps.shape, dtype=torch.long), maps)

    network, images = seeded(Stubborn()), torch.rand(1, 3, 8, 8)
    with pytest.raises(ExportError, match="Stubborn cannot be converted for eager in bf16"):
        prepare(network, (images,), "eager", Setting(precision="bf16"))
    with pytest.raises(RuntimeError, match="channels"):
        prepare(network, (images[:, :1],), "eager", Setting())


def test_memory_that_ran_out_is_no_failed_conversion(tiny):
    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)) as raised, converting(tiny, "ONNX"):
            raise error
        assert raised.value is error


def test_prepared_inside_inference_mode(tiny, inputs, expected):
    needs("onnx")
    with torch.inference_mode():
        for runtime in ("eager", "fused", "torchscript", "onnx"):
            check(compare(prepare(tiny, inputs, runtime, Setting()).outputs(), expected), runtime, "fp32")
    assert not any(parameter.is_inference() for parameter in tiny.parameters())


def test_threads_are_pinned(tiny, inputs):
    before = torch.get_num_threads()
    try:
        prepare(tiny, inputs, "eager", Setting(threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        prepare(tiny, inputs, "eager", Setting(threads=0))


def test_unknown_runtimes_and_precisions(tiny, inputs):
    with pytest.raises(ConfigError, match=r"no runtime 'onxx'. Did you mean 'onnx'\?"):
        prepare(tiny, inputs, "onxx", Setting())
    with pytest.raises(ConfigError, match=r"'eager' has no precision 'int8' on cpu\. It has: fp32, bf16"):
        prepare(tiny, inputs, "eager", Setting(precision="int8"))
    with pytest.raises(ConfigError, match=r"does not run on 'tpu'\. It runs on: cpu, cuda"):
        prepare(tiny, inputs, "eager", Setting(device="tpu"))
    with pytest.raises(ConfigError, match="Tiny is in training mode"):
        prepare(Tiny(), inputs, "eager", Setting())


@pytest.mark.parametrize(("runtime", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_names_the_extra(runtime, package, monkeypatch):
    assert is_installed("eager")
    monkeypatch.setattr(_installed, "find_spec", lambda name: None if name == package else object())
    assert not is_installed(runtime)
    with pytest.raises(ConfigError, match=rf"needs {package}, .* pip install \"effvit\[{runtime}\]\""):
        require(runtime, Setting())


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for runtime in ("eager", "compile"):
        with pytest.raises(ConfigError, match="no CUDA device here"):
            require(runtime, Setting(device="cuda"))


def test_onnx_runtime_without_cuda(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError, match="pip install onnxruntime-gpu"):
        require("onnx", Setting(device="cuda"))


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : avx512f avx512_vnni", False),
    ],
)
def test_bf16_without_its_instructions_is_noted(tiny, inputs, flags, has, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(flags, encoding="utf-8")
    monkeypatch.setattr(_installed, "_CPUINFO", tmp_path / "cpuinfo")
    note = prepare(tiny, inputs, "eager", Setting(precision="bf16")).note
    assert note == ("" if has else "this processor has no bf16 instructions: emulated")
    assert prepare(tiny, inputs, "eager", Setting()).note == ""


def test_what_no_system_tells_about_bf16_is_not_noted(tiny, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(_installed, "_CPUINFO", tmp_path / "none")
    assert prepare(tiny, inputs, "eager", Setting(precision="bf16")).note == ""


def test_openvino_without_bf16_instructions(tiny, inputs, monkeypatch):
    needs("openvino")
    monkeypatch.setattr(_runtimes_openvino, "has_bf16", lambda: False)
    require("openvino", Setting(precision="bf16"))  # no reason to end everything else that is to be measured
    with pytest.raises(ConfigError, match="OpenVINO has no bf16 on this processor"):
        prepare(tiny, inputs, "openvino", Setting(precision="bf16"))


@pytest.mark.parametrize("runtime", COMPILED)
def test_no_compiler(runtime, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and there is no 'no-such-compiler'"):
        require(runtime, Setting())


def test_compiled_files_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "shared")
    import os

    with _runtimes_compiled._cache(tmp_path):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "shared"
    with _runtimes_compiled._cache(None):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "shared"


def test_flatten():
    one, two, three = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    assert flatten({"a": one, "b": [two, {"c": three}], "d": None, "e": "text"}) == {
        "a": one,
        "b.0": two,
        "b.1.c": three,
    }
    assert flatten(one) == {"output": one}
    assert flatten(None) == {}


def test_a_network_without_tensors_has_nothing_to_compare():
    class Silent(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ExportError, match="returns no tensors"):
        prepare(Silent().eval(), (torch.zeros(1),), "eager", Setting()).outputs()


def test_compare_finds_the_worst_tensor():
    expected = [torch.tensor([1.0, -10.0]), torch.tensor([100.0, 0.0]), torch.zeros(0)]
    found = [torch.tensor([1.0, -10.5]), torch.tensor([101.0, 0.0]), torch.zeros(0)]
    assert compare(found, expected, ["small", "large", "empty"]) == Agreement(pytest.approx(0.05), "small")
    assert compare(expected, expected).error == 0
    assert compare(found, expected).worst == "output 0"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_agree(bad):
    good, other = torch.ones(2, 3), torch.ones(2, 3)
    other[1, 2] = bad
    for found, expected in ((good, other), (other, good), (other, other)):
        agreement = compare([good, found], [good, expected], ["fine", "broken"])
        assert agreement.worst == "broken"
        with pytest.raises(ExportError, match="broken by inf"):
            check(agreement, "onnx", "int8")


def test_counts_and_shapes_must_match():
    with pytest.raises(ExportError, match="1 output tensors where 2"):
        compare([torch.ones(1)], [torch.ones(1)] * 2)
    with pytest.raises(ExportError, match=r"boxes has shape \(1, 4\) where \(4,\)"):
        compare([torch.ones(1, 4)], [torch.ones(4)], ["boxes"])


def test_first_choices():
    expected = torch.tensor([[1.0, 0.99, 0.0]] + [[0.0, 1.0, 0.5], [0.2, 0.0, 1.0]] * 4)
    found = expected.clone()
    found[0, 1] = 1.01  # a lead of 1 % is none
    agreement = compare([found], [expected])
    assert agreement.top1 == 1
    check(agreement, "onnx", "bf16")
    found[2::2, 0] = 1.05
    agreement = compare([found], [expected])
    assert agreement.top1 == 0.5
    with pytest.raises(ExportError, match=r"50\.0% of the images"):
        check(Agreement(0.0, "output", agreement.top1), "onnx", "int8")
    assert compare([expected, expected], [expected, expected]).top1 is None
    assert compare([expected.long()], [expected.long()]).top1 is None


def test_few_clear_first_choices_say_nothing():
    expected = torch.tensor([[0.0, 1.0]] * 7 + [[1.0, 0.99]] * 9)
    assert compare([expected], [expected]).top1 is None
    expected[7] = torch.tensor([1.0, 0.0])
    assert compare([expected], [expected]).top1 == 1


def test_detections_are_compared_with_their_partners():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 0, 0]]])
    scores, labels = torch.tensor([[0.9, 0.9, 0.0]]), torch.tensor([[1, 2, -1]])
    names = ["boxes", "scores", "labels"]
    turned = [tensor[:, [1, 0, 2]] for tensor in (boxes, scores, labels)]
    agreement = compare(turned, [boxes, scores, labels], names)
    assert (agreement.error, agreement.matched) == (0.0, Matched(2, 2, 0))
    check(agreement, "onnx", "fp32")
    other = labels.clone()
    other[0, 0] = 3
    agreement = compare([boxes, scores, other], [boxes, scores, labels], names)
    assert agreement.matched == Matched(2, 1, 2)
    check(agreement, "onnx", "fp32")  # one turned suppression is no other network
    other[0, 1] = 3
    with pytest.raises(ExportError, match=r"beside 2 detections of eager's, 4 of either have no partner .* 1 may"):
        check(compare([boxes, scores, other], [boxes, scores, labels], names), "onnx", "fp32")
    moved = compare([boxes + 1, scores, labels], [boxes, scores, labels], names, "bf16")
    assert (moved.worst, moved.error, moved.matched) == ("boxes", pytest.approx(1 / 40), Matched(2, 2, 0))
    assert compare([boxes + 1, scores, labels], [boxes, scores, labels], names).matched == Matched(2, 0, 4)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_check_refuses_what_differs_too_much(precision):
    allowed = TOLERANCES[precision].error
    check(Agreement(allowed, "c4"), "onnx", precision)
    with pytest.raises(ExportError, match=rf"onnx \({precision}\) differs from eager: c4 by"):
        check(Agreement(allowed * 1.1, "c4"), "onnx", precision)


def test_a_network_that_differs_is_refused(tiny, inputs, expected):
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.head.weight *= 1.01
    ready = prepare(other, inputs, "channels_last", Setting())
    with pytest.raises(ExportError, match=r"inner\.0"):
        check(compare(ready.outputs(), expected, ["maps", "inner.0", "inner.1"]), "channels_last", "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("runtime", "precision"),
    [
        *((name, "fp32") for name in RUNTIMES if "cuda" in RUNTIMES[name].devices),
        ("eager", "fp16"),
        ("channels_last", "bf16"),
        ("fused", "fp16"),
        ("compile", "bf16"),
    ],
)
def test_outputs_on_a_gpu_are_eagers(tiny, inputs, expected, runtime, precision):
    needs(runtime)
    setting = Setting(device="cuda", precision=precision)
    try:
        require(runtime, setting)
    except ConfigError as error:
        pytest.skip(str(error))  # such as ONNX Runtime for CPUs
    ready = prepare(tiny, inputs, runtime, setting)
    ready.run()
    found = ready.outputs()
    assert all(tensor.device.type == "cpu" for tensor in found)
    check(compare(found, expected, ready.names), runtime, precision)
    assert all(parameter.device.type == "cpu" for parameter in tiny.parameters())
