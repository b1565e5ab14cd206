"""Any network of timm that has feature maps, as ``timm/<name>``: the peer to compare with.

timm (github.com/huggingface/pytorch-image-models) is an extra, ``pip install "effvit[timm]"``, and only imported for
these names. What a network is, is found out by building it without weights (torch's meta device) and looking at it:

* Of several maps at one stride, the last is kept; a plain ViT so has one map, ``"c4"``. With the option
  ``output_stride``, where a network has it, all are kept: a dilated stage has the key that it has without.
* Where the network rounds map sizes down or only takes multiples of its patch, images are padded with zeros at the
  bottom and the right, and the maps cut. A network that only takes the size that it was built for says so.
* Parameters and MACs are counted with a head of 1000 classes. Accuracies are timm's to publish, not ours.
* The weights are those of timm's hub, fetched as ours are. The head is a linear layer, or whatever timm's own is.
* `fuse` merges what timm knows to merge (``timm.utils.reparameterize_model``: EfficientViT, RepVGG, MobileOne, ...) and
  freezes the network. BatchNorm elsewhere stays: timm has no general way to fold it.
* Gradient checkpointing is timm's own, stage by stage or block by block, and only where the network has it.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effvit.backbones._contract import Backbone, FeatureMap, InputSpec, VariantInfo
from effvit.errors import ConfigError, did_you_mean

PREFIX = "timm/"
_OURS_TO_SET = {"pretrained", "num_classes", "in_chans", "features_only", "global_pool"}
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
_HEADS = ("head", "head_dist")
_DILATION = "output_stride"
#: Names that timm's networks give to their linear classifier.
_CLASSIFIER = re.compile(r"^(?:fc|classifier|last_linear|head|head\.fc|head\.l)\.(weight|bias)$")
#: timm's BatchNorm before the linear layer, and the second head of distilled networks.
_OTHER_HEADS = re.compile(r"^(?:head|head_dist)\.(?:bn|linear)\.|^head_dist\.(?:weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What was found out about one network.

    Attributes:
        options: What timm's constructor is called with, the class count aside.
        info: Its row of the list.
        input_spec: What its weights expect.
        feature_maps: Its maps.
        indices: Their places among all intermediates that timm offers.
        num_features: Length of what the classifier reads.
        multiple: Images are padded to multiples of this; 0 where only `input_spec.size` is taken.
        unread: Parameters that the maps do not depend on.
        layers: Depth of each parameter.
        distilled: Whether the published classifier has two heads.
        separable: Whether all of the published classifier is in this network or in the heads that go on top.
    """

    options: dict[str, Any]
    info: VariantInfo
    input_spec: InputSpec
    feature_maps: tuple[FeatureMap, ...]
    indices: list[int]
    num_features: int
    multiple: int
    unread: tuple[str, ...]
    layers: dict[str, int]
    distilled: bool
    separable: bool


class TimmBackbone(Backbone):
    """A network of timm under our contract.

    Args:
        facts: From `_study`.
    """

    def __init__(self, facts: _Facts) -> None:
        super().__init__()
        self.facts = facts
        self.info = facts.info
        self.feature_maps = facts.feature_maps
        self.num_features = facts.num_features
        self.num_layers = 1 + max(facts.layers.values())
        # One class stands for many networks here, so what a family declares once is set for each.
        self.input_spec = facts.input_spec
        self.embed_only = facts.unread
        self.distilled = facts.distilled
        self.model = _make(facts.info.name, {**facts.options, "num_classes": 0})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps of normalised images ``(B, 3, H, W)``; see ``Backbone.forward``.

        Raises:
            ConfigError: The network only takes another size.
        """
        height, width = images.shape[-2:]
        found = _intermediates(self.model, self._fit(images), self.facts.indices)
        return {
            spec.level: feature[..., : math.ceil(height / spec.stride), : math.ceil(width / spec.stride)]
            for spec, feature in zip(self.feature_maps, found, strict=True)
        }

    def embed(self, images: Tensor) -> Tensor:
        """What timm's classifier reads, ``(B, num_features)``."""
        features: Tensor = self.model.forward_head(self.model.forward_features(self._fit(images)), pre_logits=True)
        return features

    def _fit(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        multiple = self.facts.multiple
        if multiple == 0:
            if (height, width) != self.input_spec.size:
                raise ConfigError(
                    f"{self.info.name} only takes images of {_by(self.input_spec.size)} pixels (height x width), not "
                    f"{_by((height, width))}"
                )
            return images
        bottom, right = -height % multiple, -width % multiple
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def make_classifier(self, num_classes: int) -> nn.Module:
        """The head that timm gives the network: a linear layer, but for the few networks that have more.

        Raises:
            ConfigError: The head cannot be told from the network, or there are two that read different tokens.
        """
        if not self.facts.separable or hasattr(self.model, "dist_token"):
            raise ConfigError(f"{self.info.name} has a head of its own kind here, and can only be a backbone")
        with torch.device("meta"):
            published = _head(_make(self.info.name, {**self.facts.options, "num_classes": num_classes}))
        if isinstance(published, nn.Linear):
            return nn.Linear(published.in_features, published.out_features, bias=published.bias is not None)
        return _head(_make(self.info.name, {**self.facts.options, "num_classes": num_classes}))

    def no_weight_decay(self) -> set[str]:
        """What timm leaves without weight decay."""
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        return {f"model.{name}" for name in names} & self.facts.layers.keys()

    def layer_of(self, parameter_name: str) -> int:
        """Depth in timm's own grouping; see ``Backbone.layer_of``."""
        return self.facts.layers.get(parameter_name, self.num_layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades computation for memory as timm does it; see ``Backbone.set_grad_checkpointing``.

        Raises:
            ConfigError: The network has no checkpointing.
        """
        if enable:
            try:
                self.model.set_grad_checkpointing(enable)
            except AssertionError as error:
                raise ConfigError(f"{self.info.name} has no gradient checkpointing") from error
        elif self.grad_checkpointing:
            self.model.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def fuse(self) -> TimmBackbone:
        """Merges what timm knows to merge, and freezes the network; see the module's docstring."""
        _timm().utils.reparameterize_model(self.model, inplace=True)
        self.requires_grad_(requires_grad=False)
        return self

    @classmethod
    def convert_key(cls, key: str) -> str | None:
        """Ours for a name of timm's: the trunk is under ``model.``, the heads are as in any ``Classifier``."""
        if key.startswith("model.") or _OTHER_HEADS.match(key):
            return key
        return _CLASSIFIER.sub(r"head.\1", key) if _CLASSIFIER.match(key) else f"model.{key}"


def build(name: str, overrides: Mapping[str, Any]) -> TimmBackbone:
    """Builds ``timm/<name>`` with fresh weights.

    Args:
        name: The name with its prefix; a tag that picks one of several weights may follow, as in
            ``timm/resnet50.a1_in1k``.
        overrides: Options of timm's constructor.

    Raises:
        ConfigError: timm is not installed, it has no such network or option, or the network has no usable maps.
    """
    return TimmBackbone(_study(name, overrides))


def info(name: str) -> VariantInfo:
    """What timm says of ``timm/<name>``, and what was counted.

    Raises:
        ConfigError: As `build`.
    """
    return _study(name, {}).info


def feature_maps(name: str) -> tuple[FeatureMap, ...]:
    """The maps of ``timm/<name>``; raises as `build`."""
    return _study(name, {}).feature_maps


def names(pattern: str) -> list[str]:
    """Names of timm's networks, with the prefix, that match a wildcard; with their tags if the pattern has a dot.

    Raises:
        ConfigError: timm is not installed.
    """
    timm = _timm()
    wanted = pattern.removeprefix(PREFIX)
    return sorted(PREFIX + name for name in timm.list_models(wanted, pretrained="." in wanted))


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError('names that start with timm/ need timm: pip install "effvit[timm]"') from error
    return timm


def _make(name: str, options: Mapping[str, Any]) -> Any:
    """The network as timm builds it, weights fresh."""
    timm = _timm()
    bare = name.removeprefix(PREFIX)
    if not timm.is_model(bare):
        near = did_you_mean(name, names(PREFIX + "*"))
        raise ConfigError(f"timm has no network {bare!r}. {near} `effvit backbones 'timm/*'` lists them.")
    try:
        return timm.create_model(bare, pretrained=False, **options)
    except TypeError as error:
        found = re.search(r"unexpected keyword argument(?:\(s\): \[| )'(\w+)'", str(error))
        if found is None:
            raise
        raise ConfigError(f"{name} has no option {found[1]!r}") from error
    except AssertionError as error:  # how timm refuses a stride
        if _DILATION not in options:
            raise
        raise ConfigError(f"{name} cannot be built with {_DILATION}={options[_DILATION]}") from error
    except RuntimeError as error:
        if "tag" not in str(error):
            raise
        tags = ", ".join(names(f"{name.partition('.')[0]}.*"))
        raise ConfigError(f"there are no weights {name!r}. Choose from: {tags or '(none)'}.") from error


def _study(name: str, overrides: Mapping[str, Any]) -> _Facts:
    for option in overrides:
        if option in _OURS_TO_SET:
            raise ConfigError(f"{name}: {option!r} cannot be set here")
    facts: _Facts = _study_once(name, tuple(sorted(overrides.items(), key=lambda pair: pair[0])))
    return facts


def _memo(function: Any) -> Any:
    """Remembers results; options that cannot be keys are studied anew."""
    cached = functools.lru_cache(maxsize=None)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            hash(arguments)
        except TypeError:
            return function(*arguments)
        return cached(*arguments)

    return call


@_memo
def _study_once(name: str, overrides: tuple[tuple[str, Any], ...]) -> _Facts:
    with torch.device("meta"):
        options = dict(overrides)
        model = _make(name, {**options, "num_classes": 0}).eval()
        more = {option: value for option, value in _size_options(model).items() if option not in options}
        if more:
            options |= more
            model = _make(name, {**options, "num_classes": 0}).eval()
        whole = _make(name, {**options, "num_classes": 1000}).eval()
        cfg: dict[str, Any] = model.pretrained_cfg
        size = _input_size(options, cfg)
        indices, maps = _find_maps(name, model, size, dilated=_DILATION in options)
        images = torch.zeros(1, 3, *size)
        with torch.no_grad():
            features = model.forward_head(model.forward_features(images), pre_logits=True)
        spec = InputSpec(
            size=size,
            crop=float(cfg["crop_pct"]),
            interpolation=cfg["interpolation"],
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
        )
        return _Facts(
            options=options,
            info=_row(name, whole, cfg, images),
            input_spec=spec,
            feature_maps=maps,
            indices=indices,
            num_features=features.shape[-1],
            multiple=_multiple(model, indices, maps),
            unread=_unread(model, indices, images),
            layers=_layers(model),
            distilled=isinstance(cfg.get("classifier"), (tuple, list)),
            separable=_is_separable(whole, model),
        )


def _size_options(model: Any) -> dict[str, Any]:
    """What makes a network take images of any size, as far as its constructor knows it."""
    known = {option for kind in type(model).__mro__ for option in inspect.signature(kind).parameters}
    return {option: value for option, value in _ANY_SIZE.items() if option in known}


def _input_size(options: Mapping[str, Any], cfg: Mapping[str, Any]) -> tuple[int, int]:
    size = options.get("img_size") or cfg["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _head(model: Any) -> nn.Module:
    """What stands between a network and its logits; the first of two, which are alike."""
    name = model.pretrained_cfg["classifier"]
    first = name if isinstance(name, str) else name[0]
    # A BatchNorm and the linear layer are one module, of which timm only names the second half.
    head: nn.Module = model.get_submodule(first.removesuffix(".linear"))
    return head


def _is_separable(whole: Any, model: Any) -> bool:
    """Whether every entry of the whole classifier has a place in the network or in the heads on top of it."""
    names = {TimmBackbone.convert_key(key) for key in whole.state_dict()}
    on_top = names - {f"model.{key}" for key in model.state_dict()}
    try:
        head = _head(whole).state_dict()
    except (AttributeError, TypeError, KeyError):  # no name, or one that is not there
        return False
    return on_top in ({f"head.{key}" for key in head}, {f"{prefix}.{key}" for key in head for prefix in _HEADS})


def _intermediates(model: Any, images: Tensor, indices: Sequence[int] | None) -> list[Tensor]:
    found: list[Tensor] = model.forward_intermediates(
        images,
        indices=None if indices is None else list(indices),
        intermediates_only=True,
        output_fmt="NCHW",
        stop_early=True,
    )
    return found


def _find_maps(
    name: str, model: Any, size: tuple[int, int], *, dilated: bool
) -> tuple[list[int], tuple[FeatureMap, ...]]:
    """The last map of each stride, or of a dilated network every map: its place among timm's, and what it is."""
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{name} gives no feature maps, so it cannot be a backbone")
    with torch.no_grad():
        found = _intermediates(model, torch.zeros(1, 3, *size), None)
    kept: dict[int, tuple[int, FeatureMap]] = {}
    before = FeatureMap("c0", 3, 1)
    for index, (feature, known) in enumerate(zip(found, model.feature_info, strict=True)):
        stride = int(known["reduction"])
        if feature.ndim != 4 or stride & (stride - 1):
            raise ConfigError(f"{name} has maps of stride {stride}; a pyramid needs powers of two")
        again = dilated and stride == before.stride
        level = int(before.level[1:]) + 1 if again else stride.bit_length() - 1
        before = FeatureMap(f"c{level}", feature.shape[1], stride)
        kept[level] = (index, before)
    levels = sorted(kept)
    return [kept[level][0] for level in levels], tuple(kept[level][1] for level in levels)


def _multiple(model: Any, indices: list[int], maps: tuple[FeatureMap, ...]) -> int:
    """What image sides must be a multiple of for every map to have its size: 1 if nothing, 0 if only one size works."""
    coarsest = maps[-1].stride
    if all(_fits(model, indices, maps, size) for size in ((97, 130), (33, 47))):
        return 1
    for multiple in (coarsest, coarsest * 2):
        if all(_fits(model, indices, maps, (multiple * tall, multiple * 2)) for tall in (2, 3)):
            return multiple
    return 0


def _fits(model: Any, indices: list[int], maps: tuple[FeatureMap, ...], size: tuple[int, int]) -> bool:
    try:
        with torch.no_grad():
            found = _intermediates(model, torch.zeros(1, 3, *size), indices)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):
        return False
    return all(
        tuple(feature.shape[-2:]) == tuple(math.ceil(side / spec.stride) for side in size)
        for spec, feature in zip(maps, found, strict=True)
    )


def _unread(model: Any, indices: list[int], images: Tensor) -> tuple[str, ...]:
    """Names of the parameters that get no gradient from the maps."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()  # in evaluation some networks keep what they made of a parameter
    total = torch.stack([feature.sum() for feature in _intermediates(model, images.repeat(2, 1, 1, 1), indices)]).sum()
    model.eval()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return tuple(f"model.{name}" for name, gradient in zip(named, gradients, strict=True) if gradient is None)


def _layers(model: Any) -> dict[str, int]:
    """Depth of each parameter in timm's grouping, without gaps; all are of one layer where it has none."""
    found: dict[str, int] = {name: 0 for name, _ in model.named_parameters()}
    if hasattr(model, "group_matcher"):
        found |= _timm().models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    order = {depth: place for place, depth in enumerate(sorted(set(found.values())))}
    return {f"model.{name}": order[depth] for name, depth in found.items()}


def _row(name: str, model: Any, cfg: Mapping[str, Any], images: Tensor) -> VariantInfo:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    url, page, origin = _weights(cfg)
    papers = cfg.get("paper_ids") or ""
    return VariantInfo(
        name=name,
        family=f"{type(model).__name__} (timm)",
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        top1=None,
        top5=None,
        paper=(papers if isinstance(papers, str) else papers[0]).removeprefix("arXiv:"),
        source="parameters and MACs counted, with a head of 1000 classes",
        licence=cfg.get("license") or "not stated",
        origin=origin,
        url=url,
        page=page,
    )


def _weights(cfg: Mapping[str, Any]) -> tuple[str | None, str | None, str]:
    """Address of the weights, page about them, and who has them."""
    hub, page = cfg.get("hf_hub_id"), cfg.get("origin_url")
    if hub:
        file = cfg.get("hf_hub_filename") or "model.safetensors"
        address = f"https://huggingface.co/{hub}"
        return f"{address}/resolve/main/{file}", page or address, "timm's copy on the Hugging Face hub"
    if cfg.get("url"):
        return cfg["url"], page, "the address that timm names"
    return None, None, "no weights are published"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
