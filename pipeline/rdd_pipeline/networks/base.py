"""What every segmentation network of the project gives: :class:`SegLogits` at its output stride.

Shape suffixes: B batch, C classes, H, W image height and width in pixels, h, w height and width
of the logits, F channels of an encoder stage.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rdd_pipeline.errors import NetworkError


class SegLogits(NamedTuple):
    """Logits of the main and, where the network has one, the auxiliary head."""

    main: Tensor
    """(B, C, h, w)."""
    aux: Tensor | None
    """(B, C, h, w) on the same grid as ``main``, or None."""


class FCNHead(nn.Module):
    """FCN head: 3x3 convolution, batch norm, ReLU, dropout, 1x1 convolution.

    The auxiliary head of PSPNet (arXiv 1612.01105, section 3.3). Maps (B, F, h, w) to
    (B, C, h, w).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, features_BFhw: Tensor) -> Tensor:
        """Logits (B, C, h, w) of one encoder stage."""
        hidden = self.relu(self.norm(self.conv(features_BFhw)))
        logits_BChw: Tensor = self.classifier(self.dropout(hidden))
        return logits_BChw


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm after global pooling that can be trained with one image per process.

    One value per channel has no variance, so torch refuses it. There, and only there, the
    running statistics normalise, as in evaluation.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, F, h, w)."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d) -> PooledBatchNorm2d:
        """A module that shares the parameters and buffers of ``norm``."""
        pooled = cls(
            norm.num_features,
            eps=norm.eps,
            momentum=norm.momentum,
            affine=norm.affine,
            track_running_stats=norm.track_running_stats,
        )
        pooled.weight, pooled.bias = norm.weight, norm.bias
        pooled.running_mean, pooled.running_var = norm.running_mean, norm.running_var
        pooled.num_batches_tracked = norm.num_batches_tracked
        return pooled.train(norm.training)


class SegmentationNetwork(nn.Module, ABC):
    """A network from RGB images to logits at its output stride.

    The input normalisation is part of the network (and not of its weights), so that every
    caller hands over plain images. An image whose sides are not multiples of ``divisor`` is
    resized to the next multiples (bilinear, corners aligned), so that the grid of logits spans
    exactly the image.

    A subclass sets up its modules, then calls :meth:`measure`.
    """

    mean: Tensor
    std: Tensor
    name_prefix = ""
    """What stands before a library's own names of tensors in the state dict."""

    def __init__(
        self, *, num_classes: int, divisor: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0.0:
            raise NetworkError(
                "network.mean and network.std: expected three values each and std above 0, "
                f"got {list(mean)} and {list(std)}"
            )
        self.num_classes = num_classes
        self.divisor = divisor
        """The sides of the image that the encoder sees are multiples of this, in pixels."""
        self.output_stride = 0
        """Pixels per position of the logits; set by :meth:`measure`."""
        self.unused_parameters: frozenset[str] = frozenset()
        """Names of the parameters that influence no logits, such as those of encoder stages
        beyond the depth used; frozen, so that distributed training does not wait for them."""
        self.auxiliary_parameters: frozenset[str] = frozenset()
        """Names of the parameters that influence the auxiliary logits alone: that head."""
        self._head_alone = False
        self.pretrained_whole = False
        """Whether every layer was loaded from pretrained weights of these very classes."""
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    @abstractmethod
    def has_aux(self) -> bool:
        """Whether there is an auxiliary head."""

    @property
    @abstractmethod
    def encoder_module(self) -> nn.Module:
        """The part that may be pretrained; see :func:`parameter_groups`."""

    @property
    @abstractmethod
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the tensors in the state dict whose first dimension counts classes."""

    @abstractmethod
    def raw_logits(self, x: Tensor) -> SegLogits:
        """Logits of a normalised float image (B, 3, H, W) with sides divisible by ``divisor``.

        The two heads may be at different strides.
        """

    def forward(self, images: Tensor) -> SegLogits:
        """Logits of RGB images.

        Args:
            images: (B, 3, H, W), uint8 in 0..255 or floating point in [0, 1].

        Returns:
            Main and auxiliary logits, both (B, C, h, w) with ``(h, w) = grid_size(H, W)``; the
            auxiliary ones are resized (bilinear, corners aligned) where the strides differ.

        Raises:
            NetworkError: The shape or dtype is wrong, or in training the images are so small
                that a batch norm sees a single value per channel.
        """
        x = self._normalise(images)
        height, width = self._padded_size(*x.shape[-2:])
        if (height, width) != x.shape[-2:]:
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=True)
        try:
            main, aux = self.raw_logits(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise NetworkError(
                f"a batch norm sees one value per channel in training with {images.shape[0]} "
                f"image of {images.shape[-2]}x{images.shape[-1]} pixels; use a larger crop "
                f"(more than {self.divisor} pixels a side) or a larger batch"
            ) from error
        if aux is not None and aux.shape[-2:] != main.shape[-2:]:
            aux = F.interpolate(aux, main.shape[-2:], mode="bilinear", align_corners=True)
        return SegLogits(main, aux)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (h, w) of the logits of an image of ``height`` x ``width`` pixels."""
        padded_height, padded_width = self._padded_size(height, width)
        return padded_height // self.output_stride, padded_width // self.output_stride

    def auxiliary_tensors(self) -> frozenset[str]:
        """Names in the state dict that belong to the auxiliary head, its statistics included."""
        modules = self._auxiliary_modules()
        return frozenset(
            name for name in self.state_dict() if any(name.startswith(f"{m}.") for m in modules)
        )

    def train_auxiliary_head_alone(self) -> None:
        """Freeze everything else, for good: weights, and statistics of batch norms.

        Raises:
            NetworkError: There is no auxiliary head.
        """
        if not self.auxiliary_parameters:
            raise NetworkError("the network has no auxiliary head that could be trained alone")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.auxiliary_parameters)
        self._head_alone = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As torch's; where the auxiliary head is trained alone, the rest stays in evaluation."""
        super().train(mode)
        if mode and self._head_alone:
            modules = self._auxiliary_modules()
            for name, module in self.named_modules():
                if not any(name == m or name.startswith(f"{m}.") for m in modules):
                    module.training = False
            self.training = True
        return self

    def _auxiliary_modules(self) -> list[str]:
        """Names of the modules that hold parameters of the auxiliary head and no others."""
        return [
            name
            for name, module in self.named_modules()
            if name
            and (inside := [f"{name}.{p}" for p, _ in module.named_parameters()])
            and self.auxiliary_parameters.issuperset(inside)
        ]

    def measure(self) -> None:
        """Run the network once to find its output stride, and prepare it for training.

        Doubles ``divisor``, up to eightfold, where the network needs larger multiples than its
        encoder. Freezes the parameters that no logits depend on (:attr:`unused_parameters`), and
        lets batch norms behind a global pooling accept a single image.

        Raises:
            NetworkError: The network does not run, or its logits are not at an integer stride
                with ``num_classes`` channels.
        """
        named = dict(self.named_parameters())
        training = self.training
        self.eval()
        try:
            main, gradients, main_gradients, pooled = self._probe(list(named.values()))
        finally:
            self.train(training)
        self._set_output_stride(main)
        self.unused_parameters = frozenset(
            name for name, gradient in zip(named, gradients, strict=True) if gradient is None
        )
        self.auxiliary_parameters = frozenset(
            name
            for name, gradient in zip(named, main_gradients, strict=True)
            if gradient is None and name not in self.unused_parameters
        )
        for name in self.unused_parameters:
            named[name].requires_grad_(False)
        for name in pooled:
            norm = self.get_submodule(name)
            if type(norm) is nn.BatchNorm2d:
                self.set_submodule(name, PooledBatchNorm2d.from_batch_norm(norm))

    def _probe(
        self, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None], list[str]]:
        """Main logits; the parameters' gradients of all logits, and of the main ones; names of
        batch norms behind a pooling.
        """
        first_error: Exception | None = None
        for divisor in [self.divisor * factor for factor in (1, 2, 4, 8)]:
            try:
                with torch.no_grad():  # the smallest image that forward() hands on
                    self.raw_logits(torch.zeros(1, 3, divisor, divisor))
                with torch.enable_grad(), self._noting_pooled() as pooled:
                    main, aux = self.raw_logits(torch.zeros(1, 3, *_probe_size(divisor)))
                    of_main = torch.autograd.grad(
                        main.sum(), parameters, allow_unused=True, retain_graph=True
                    )
                    gradients = of_main
                    if aux is not None:
                        total = main.sum() + aux.sum()
                        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            except Exception as error:
                first_error = first_error or error
                continue
            self.divisor = divisor
            return main.detach(), gradients, of_main, pooled
        raise NetworkError(
            f"does not run on images of multiples of {self.divisor} pixels: "
            f"{first_line(first_error)}"
        ) from first_error

    @contextmanager
    def _noting_pooled(self) -> Iterator[list[str]]:
        """Gather the names of the batch norms that are given one position a channel."""
        pooled: list[str] = []

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
            def note(module: nn.Module, args: tuple[Tensor]) -> None:
                if args[0].shape[-2:] == (1, 1):
                    pooled.append(name)

            return note

        hooks = [
            module.register_forward_pre_hook(hook(name))
            for name, module in self.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        ]
        try:
            yield pooled
        finally:
            for handle in hooks:
                handle.remove()

    def _set_output_stride(self, main: Tensor) -> None:
        height, width = _probe_size(self.divisor)
        channels, h, w = main.shape[1:]
        stride = height // h
        if (
            channels != self.num_classes
            or (stride * h, stride * w) != (height, width)
            or self.divisor % stride
        ):
            raise NetworkError(
                f"expected logits of {self.num_classes} classes at an output stride that divides "
                f"{self.divisor}, got {channels} channels of {h}x{w} from an image of "
                f"{height}x{width} pixels"
            )
        self.output_stride = stride

    def _normalise(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise NetworkError(
                f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}; "
                "add the batch dimension, or move the channels to the second place"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise NetworkError(
                f"images: expected uint8 in 0..255 or floating point in [0, 1], got {images.dtype}"
            )
        x = images.to(self.mean.dtype)
        if images.dtype == torch.uint8:
            x = x / 255.0
        return (x - self.mean) / self.std

    def _padded_size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor


def remove_upsampling(head: nn.Module) -> None:
    """Replace the upsampling layers of a head, so that its logits stay at their own stride."""
    for name, module in list(head.named_modules()):
        if isinstance(module, nn.Upsample | nn.UpsamplingBilinear2d):
            head.set_submodule(name, nn.Identity())


def suggest(name: str, valid: Iterable[str]) -> str:
    """The nearest valid names, or some of them where none is near."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(valid)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(by_lower[candidate] for candidate in near)}?"
    return f"valid names: {', '.join(list(by_lower.values())[:20])}"


def _probe_size(divisor: int) -> tuple[int, int]:
    """Odd multiples, to show that every multiple will do, and more than one position each way."""
    return 3 * divisor, 5 * divisor


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
