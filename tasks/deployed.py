"""What a task gives for export, for measuring speed and for the callback: its network with all around it.

Normalisation goes in at one end, thresholds and the suppression of duplicates at the other, so that whoever runs an
exported model needs neither our code nor our constants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from effvit import __version__
from effvit.backbones import Backbone
from effvit.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from effvit.categories import Categories
    from effvit.tasks.detectors._contract import Detector
    from effvit.tasks.detectors._deployed import FixedDetector
    from effvit.tasks.detectors.rcnn import FasterRCNN
    from effvit.tasks.detectors.retinanet import RetinaNet
    from effvit.tasks.detectors.ssdlite import SSDLite


class Deployed(nn.Module, ABC):
    """A network from the pixels of images to what a user reads, with shapes that follow from shapes alone.

    It shares the layers of the task that it was made of, weights and mode alike, and changes neither when it is made:
    whoever runs it puts it into eval mode, leaves gradients off (``torch.no_grad()``), and calls the task's ``train()``
    again where that goes on training.

    Args:
        categories: The classes.
        mean: Channel means in ``[0, 1]``.
        std: Channel standard deviations in ``[0, 1]``.
        settings: What else `metadata` is to hold, JSON-able.
        device: Where the network is, and so where it is run.

    Attributes:
        task: ``classification``, ``detection`` or ``segmentation``.
        input_names: Names of what `forward` takes, in order.
        output_names: Names of what `forward` returns, in order.
        parts: Names of submodules by part of a detector; all of them are called as modules. One may lie in another.
        open_sides: Sides in pixels of the images that it takes where it is exported for images of any size; ``None``
            where it can only be exported for one.
    """

    task: ClassVar[Literal["classification", "detection", "segmentation"]]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    open_sides: range | None = None
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        categories: Categories,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.categories = categories
        self._settings = {**settings, "mean": list(mean), "std": list(std)}
        # float32 by name: inside a Trainer in bf16-true or 16-true, the default is another.
        average, deviation = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) for values in (mean, std)
        )
        self.register_buffer("scale", 1 / (255 * deviation), persistent=False)
        self.register_buffer("shift", average / deviation, persistent=False)

    def _normalised(self, images: Tensor) -> Tensor:
        """`_task.normalise` without its padding, which also leaves the given images as they are."""
        return images.to(torch.float32) * self.scale - self.shift

    @abstractmethod
    def unpack(
        self, outputs: Sequence[Tensor], original_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Any]]:
        """What a run of the network says, image by image, as ``predict_step`` words it.

        Args:
            outputs: One array for each of `output_names`, on the CPU.
            original_sizes: ``(height, width)`` of each image as it was before it was resized, for masks.
        """

    @abstractmethod
    def example_inputs(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Noise of the form that `forward` takes, always the same.

        Args:
            batch: Images.
            size: Height and width in pixels.
        """

    def onnx_translations(self) -> dict[Any, Callable[..., Any]]:
        """What operators of ours are in ONNX, for ``torch.onnx.export(custom_translation_table=...)``."""
        return {}

    def metadata(self) -> dict[str, Any]:
        """What a user of the exported file has to know, JSON-able.

        ``categories`` are names by category id, in the order of the labels that the network gives; ids are text, as in
        JSON.
        """
        return {
            "task": self.task,
            "categories": {str(key): name for key, name in self.categories.to_dict().items()},
            **self._settings,
            "input_names": list(self.input_names),
            "output_names": list(self.output_names),
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "effvit_version": __version__,
        }


class DeployedClassifier(Deployed):
    """A classifier that takes pixels and gives probabilities.

    Args:
        network: From normalised images ``(B, 3, H, W)`` to logits ``(B, K)``.
        categories: The classes.
        mean: Channel means in ``[0, 1]``.
        std: Channel standard deviations in ``[0, 1]``.
        settings: What else `metadata` is to hold, JSON-able.
    """

    task = "classification"
    input_names = ("images",)
    output_names = ("probabilities",)
    parts: Mapping[str, tuple[str, ...]] = {}

    def __init__(
        self,
        network: nn.Module,
        categories: Categories,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(categories, mean, std, settings, of_weights(network).device)
        self.network = network
        self.open_sides = open_sides_of(network)

    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities ``(B, K)``, float32.

        Args:
            images: uint8 or float32 from 0 to 255 ``(B, 3, H, W)``, RGB.
        """
        logits: Tensor = self.network(self._normalised(images).to(of_weights(self.network).dtype))
        return logits.float().softmax(-1)

    def unpack(
        self,
        outputs: Sequence[Tensor],
        original_sizes: Sequence[tuple[int, int]] | None = None,  # noqa: ARG002 - for detectors
    ) -> list[dict[str, Any]]:
        """``probabilities`` ``(K,)`` of each image."""
        return [{"probabilities": own} for own in outputs[0]]

    def example_inputs(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `Deployed.example_inputs`."""
        return (noise(batch, size),)


class DeployedDetector(Deployed):
    """A detector that takes pixels and gives a fixed number of detections, with the digits of `Detector.predict`.

    Args:
        detector: RetinaNet, Faster R-CNN, Mask R-CNN or SSDLite.
        categories: The classes.
        mean: Channel means in ``[0, 1]``.
        std: Channel standard deviations in ``[0, 1]``.
        settings: What else `metadata` is to hold, JSON-able.
    """

    task = "detection"
    input_names = ("images", "sizes", "original_sizes")

    def __init__(
        self,
        detector: Detector,
        categories: Categories,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(categories, mean, std, {**settings, **_limits(detector)}, of_weights(detector).device)
        self.detector = _fixed(detector)
        self.open_sides = open_sides_of(detector)
        self.output_names = self.detector.outputs
        self.parts = {part: tuple(f"detector.{name}" for name in names) for part, names in self.detector.parts.items()}

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """Detections of each image, D (``detections_per_image``) at most, best first.

        Args:
            images: uint8 or float32 from 0 to 255 ``(B, 3, H, W)``, RGB, padded at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding ``(B, 2)``, int64.
            original_sizes: The same before it was resized ``(B, 2)``, int64.

        Returns:
            ``boxes`` ``(B, D, 4)``, float32 xyxy in pixels of the original image, 0 where there are fewer; ``scores``
            ``(B, D)``, float32, 0 there; ``labels`` ``(B, D)``, int64, -1 there; and of Mask R-CNN ``masks``
            ``(B, D, 28, 28)``, probabilities inside the boxes.
        """
        images = self._normalised(images)
        images = images.masked_fill(~inside(images, sizes), 0).to(of_weights(self.detector).dtype)
        found: tuple[Tensor, ...] = self.detector(images, sizes, original_sizes)
        return found

    def onnx_translations(self) -> dict[Any, Callable[..., Any]]:
        """See `Deployed.onnx_translations`: the suppression of duplicates over a batch."""
        from effvit.tasks.detectors._suppression_operator import onnx_translations

        return onnx_translations()

    def unpack(
        self, outputs: Sequence[Tensor], original_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Any]]:
        """See `unpack_detections`."""
        return unpack_detections(self.output_names, outputs, original_sizes)

    def example_inputs(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `Deployed.example_inputs`; the images are neither padded nor resized."""
        sizes = torch.tensor([size] * batch)
        return noise(batch, size), sizes, sizes.clone()


def open_sides_of(network: nn.Module) -> range | None:
    """`Backbone.open_sides` of the backbone inside a network; ``None`` where there is none of ours."""
    return next((module.open_sides for module in network.modules() if isinstance(module, Backbone)), None)


def unpack_detections(
    names: Sequence[str],
    outputs: Sequence[Tensor],
    original_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:
    """What a run of a `DeployedDetector`, or of a file that was made of one, found in each image.

    Args:
        names: What the outputs are called.
        outputs: One array for each of them, on the CPU.
        original_sizes: ``(height, width)`` of each image as it was before it was resized, for masks.

    Returns:
        ``boxes`` ``(N, 4)``, ``scores`` ``(N,)``, ``labels`` ``(N,)`` and of masks ``rles`` of each image.

    Raises:
        ExportError: There are masks, and no sizes.
    """
    found = []
    for number, arrays in enumerate(zip(*outputs, strict=True)):
        own = dict(zip(names, arrays, strict=True))
        present = own["labels"] >= 0
        one: dict[str, Any] = {name: values[present] for name, values in own.items()}
        if "masks" in one:
            from effvit.tasks.detectors.masks import paste

            if original_sizes is None:
                raise ExportError("masks are pasted into their images: pass original_sizes")
            one["rles"] = paste(one.pop("masks"), one["boxes"], original_sizes[number])
        found.append(one)
    return found


def of_weights(module: nn.Module) -> Tensor:
    """One of a network's weights, for their type (float32 unless it was cast) and for where they are."""
    return next(module.parameters())


def noise(batch: int, size: tuple[int, int]) -> Tensor:
    """Images uint8 ``(B, 3, *size)``, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)


def inside(images: Tensor, sizes: Tensor) -> Tensor:
    """Which pixels of a batch ``(B, C, H, W)`` are no padding ``(B, 1, H, W)``."""
    rows = torch.arange(images.shape[2], device=images.device)[:, None] < sizes[:, 0, None, None]
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1, None, None]
    return torch.logical_and(rows, columns)[:, None]  # CoreML has no bitwise one


def _limits(detector: Detector) -> dict[str, Any]:
    """Thresholds of a detector, for its metadata."""
    owner = getattr(detector, "roi_heads", detector)
    names = ("score_threshold", "nms_threshold", "detections_per_image")
    return {name: getattr(owner, name) for name in names}


def _fixed(detector: Detector) -> FixedDetector:
    """The view of a detector with fixed shapes; its module is imported when it is asked for, as the detector's is."""
    name = type(detector).__name__
    if name == "RetinaNet":
        from effvit.tasks.detectors._deployed_retinanet import FixedRetinaNet

        return FixedRetinaNet(cast("RetinaNet", detector))
    if name in {"FasterRCNN", "MaskRCNN"}:
        from effvit.tasks.detectors._deployed_rcnn import FixedRCNN

        return FixedRCNN(cast("FasterRCNN", detector))
    if name == "SSDLite":
        from effvit.tasks.detectors._deployed_ssdlite import FixedSSDLite

        return FixedSSDLite(cast("SSDLite", detector))
    raise ExportError(f"there is no export of a {name}: RetinaNet, Faster R-CNN, Mask R-CNN and SSDLite have one")
