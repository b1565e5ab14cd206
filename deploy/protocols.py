"""How the papers of the backbones measured speed, and what they published, as data.

An absolute figure holds for the authors' device; what can be compared across machines is the ratio between two networks
in the same protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

from effvit.errors import ConfigError, close_matches

#: Visits of each network and runtime, and seconds of a visit, unless something else is asked for.
ROUNDS = 9
SECONDS = 0.2

_EFFICIENTVIT = "Liu et al., EfficientViT, arXiv 2305.07027"
_CREAM = "github.com/microsoft/Cream, EfficientViT/README.md and classification/speed_test.py"


@dataclass(frozen=True)
class Entry:
    """A network of a protocol.

    Attributes:
        model: As `effvit benchmark` takes it, ``name``, ``name@size`` or ``name:option=value``.
        published: Images a second of the authors, or milliseconds in a protocol whose ``unit`` is ``ms``.
    """

    model: str
    published: float | None = None


@dataclass(frozen=True)
class Claim:
    """What a paper says about the speed of one network against another's.

    Attributes:
        model: The one that is said to be faster.
        baseline: The other one.
        published: Throughput of `model` divided by that of `baseline`.
        source: Where that was published.
    """

    model: str
    baseline: str
    published: float
    source: str


@dataclass(frozen=True)
class Protocol:
    """A way of measuring, by name.

    Attributes:
        name: What ``--protocol`` takes.
        device: ``cpu`` or ``cuda``.
        batch: Images in a batch; where they do not fit, the largest power of two that does.
        threads: Threads on a CPU.
        precision: ``fp32``, ``fp16`` or ``bf16``; the lower ones are autocast, as in the authors' script.
        runtime: The authors' own; it is measured first.
        beside: Runtimes that are measured for comparison.
        unit: Of `Entry.published`: ``img/s`` or ``ms``.
        hardware: What the authors measured on.
        entries: Networks, and what was published about them.
        claims: Published ratios.
        source: Where protocol and figures were published.
    """

    name: str
    device: str
    batch: int
    threads: int
    precision: str
    runtime: str
    beside: tuple[str, ...]
    unit: str
    hardware: str
    entries: tuple[Entry, ...]
    claims: tuple[Claim, ...]
    source: str


_FASTER_THAN_MOBILEVIT = ("efficientvit_m2", "mobilevit_xxs@256")
_FASTER_THAN_MOBILENET = ("efficientvit_m5", "timm/mobilenetv3_large_100")
_EFFICIENTVIT_PEERS = (Entry("mobilevit_xxs@256"), Entry("timm/mobilenetv3_large_100"))
_ABSTRACT = f"{_EFFICIENTVIT}, abstract"
_INDEPENDENT = "Yun and Ro, SHViT, CVPR 2024, who measured it too, on an Intel Xeon Gold 5218R"

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="efficientvit-gpu",
            device="cuda",
            batch=2048,
            threads=1,
            precision="fp16",
            runtime="torchscript",
            beside=("eager", "compile"),
            unit="img/s",
            hardware="one Nvidia V100",
            entries=(
                Entry("efficientvit_m0", 27_644),
                Entry("efficientvit_m1", 20_093),
                Entry("efficientvit_m2", 18_218),
                Entry("efficientvit_m3", 16_644),
                Entry("efficientvit_m4", 15_914),
                Entry("efficientvit_m5", 10_621),
                *_EFFICIENTVIT_PEERS,
            ),
            claims=(
                Claim(*_FASTER_THAN_MOBILEVIT, 5.8, _ABSTRACT),
                Claim(*_FASTER_THAN_MOBILENET, 1.404, _ABSTRACT),
            ),
            source=_CREAM,
        ),
        Protocol(
            name="efficientvit-cpu",
            device="cpu",
            batch=16,
            threads=1,
            precision="fp32",
            runtime="torchscript",
            beside=("eager", "fused", "onnx"),
            unit="img/s",
            hardware="Intel Xeon E5-2690 v4, one thread",
            entries=(
                Entry("efficientvit_m0", 228.4),
                *(Entry(f"efficientvit_m{number}") for number in range(1, 6)),
                *_EFFICIENTVIT_PEERS,
            ),
            claims=(
                Claim(*_FASTER_THAN_MOBILEVIT, 3.7, _ABSTRACT),
                Claim(*_FASTER_THAN_MOBILENET, 1.452, _ABSTRACT),
                Claim(*_FASTER_THAN_MOBILEVIT, 147 / 21, _INDEPENDENT),
                Claim(*_FASTER_THAN_MOBILENET, 64 / 43, _INDEPENDENT),
            ),
            source=_CREAM,
        ),
        Protocol(
            name="efficientvit-onnx",
            device="cpu",
            batch=16,
            threads=1,
            precision="fp32",
            runtime="onnx",
            beside=("torchscript",),
            unit="img/s",
            hardware="Intel Xeon E5-2690 v4, one thread",
            entries=(
                Entry("efficientvit_m0", 340.1),
                *(Entry(f"efficientvit_m{number}") for number in range(1, 6)),
                *_EFFICIENTVIT_PEERS,
            ),
            claims=(
                Claim(*_FASTER_THAN_MOBILEVIT, 7.4, _ABSTRACT),
                Claim(*_FASTER_THAN_MOBILEVIT, 781 / 170, _INDEPENDENT),
                Claim(*_FASTER_THAN_MOBILENET, 456 / 613, _INDEPENDENT),
            ),
            source=_CREAM,
        ),
        Protocol(
            name="efficientformer-a100",
            device="cuda",
            batch=64,
            threads=1,
            precision="fp32",
            runtime="eager",
            beside=("fused", "compile"),
            unit="ms",
            hardware="one Nvidia A100",
            entries=(Entry("efficientformer_l1"), Entry("efficientformer_l3"), Entry("efficientformer_l7")),
            claims=(),
            source="Li et al., EfficientFormer, arXiv 2206.01191, Table 1",
        ),
        Protocol(
            name="dynamicvit-3090",
            device="cuda",
            batch=32,
            threads=1,
            precision="fp32",
            runtime="eager",
            beside=("fused", "compile"),
            unit="img/s",
            hardware="one Nvidia RTX 3090",
            entries=(
                Entry("dynamicvit_small:keep_ratio=1.0", 1337.7),
                Entry("dynamicvit_small:keep_ratio=0.9", 1524.8),
                Entry("dynamicvit_small:keep_ratio=0.8", 1774.6),
                Entry("dynamicvit_small:keep_ratio=0.7", 2062.1),
            ),
            claims=(
                Claim(
                    "dynamicvit_small:keep_ratio=0.7",
                    "dynamicvit_small:keep_ratio=1.0",
                    2062.1 / 1337.7,
                    "Rao et al., DynamicViT, arXiv 2106.02034, Table 1",
                ),
            ),
            source="Rao et al., DynamicViT, arXiv 2106.02034, Table 1",
        ),
        Protocol(
            name="mobile",
            device="cpu",
            batch=1,
            threads=1,
            precision="fp32",
            runtime="coreml",
            beside=("executorch",),
            unit="ms",
            hardware="iPhone 12, CoreML",
            entries=(
                Entry("efficientformer_l1", 1.6),
                Entry("efficientformer_l3", 3.0),
                Entry("efficientformer_l7", 7.0),
                Entry("efficientformerv2_s0", 0.9),
                Entry("efficientformerv2_s1", 1.1),
                Entry("efficientformerv2_s2", 1.6),
                Entry("efficientformerv2_l", 2.7),
                Entry("mobilevit_xs@256", 7.28),
                Entry("mobilevit_s@256", 9.85),
            ),
            claims=(),
            source=(
                "arXiv 2206.01191 Table 1, arXiv 2212.08059 Table 1, arXiv 2110.02178 section 4.3; the two "
                "EfficientFormer papers measured with different tools of Apple's"
            ),
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {name!r}. {close_matches(name, PROTOCOLS)}")
    return PROTOCOLS[name]
