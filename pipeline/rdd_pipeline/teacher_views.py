"""How a teacher's discrepancy is obtained: from its two heads, or from one head seen several ways.

Shape suffixes: B batch, C classes, H W image pixels, h w the teacher's output grid.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.difficulty import (
    entropy_discrepancy,
    margin_discrepancy,
    prediction_discrepancy,
    scale_discrepancy,
)
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks import SegmentationNetwork
from rdd_pipeline.teacher_windows import AS_IT_IS, ImageView, SlidingWindows

_ONE_HEAD = "flip, scales, entropy, margin or module:NAME"


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherOutputs:
    """What a teacher says about a batch of images."""

    main: Tensor
    """(B, C, h, w) float32, logits of the main head for the images as they are."""
    aux: Tensor | None
    """(B, C, h, w) float32, auxiliary logits; None where the discrepancy has none."""
    discrepancy: Tensor
    """(B, h, w) float32, at least 0, in nats; used as ``exp(-discrepancy)``."""
    views: Mapping[str, Tensor]
    """All logits that the discrepancy was computed from, by what gave them; for checks."""


class TeacherViews:
    """Runs a teacher, and as often as its discrepancy needs it.

    ============== =================================================== ==============
    discrepancy    D                                                   forward passes
    ============== =================================================== ==============
    heads          KL(auxiliary head || main head), arXiv 2407.03719   1
    module:NAME    KL(output of that submodule || main head)           1
    flip           KL(mirrored image, mirrored back || image)          2
    scales         mean over scales of KL(scale || mean of scales)     one a scale
    entropy        entropy of the prediction                           1
    margin         -ln of the lead of the first class over the second  1
    ============== =================================================== ==============

    A scale of 1 is the pass that gives ``main``; where it is not among the scales, that pass comes
    on top.

    With a window, each of these passes is one over the windows of the (mirrored, scaled) image:
    the logits of both heads are blended on the image's own output grid, and whatever follows is
    computed once from the blended logits. So prediction, soft labels, hardness and discrepancy
    belong to the same logits, as they do without windows; a blend of probabilities would need a
    logarithm before the interpolation to full resolution, and a blend of discrepancies would be
    that of no distribution. Images that the window covers are passed whole.

    With averaging, both heads' logits are logarithms of the mean of their probabilities over sizes
    and mirror images, each brought to the image's own output grid (bilinear, corners aligned) and
    mirrored back. It excludes the discrepancies ``flip`` and ``scales``, which measure how far
    these very passes are apart.

    Gradients, autocast, device and train/eval mode are the caller's.

    Args:
        network: The teacher.
        discrepancy: One of the above.
        scales: Sizes for ``scales``, as multiples of the image's own; at least two.
        view: Windows and averaging; by default neither.

    Raises:
        NetworkError: The network cannot give this discrepancy, or there is no such one.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        discrepancy: str = "heads",
        scales: Sequence[float] = (0.75, 1.0, 1.25),
        *,
        view: ImageView = AS_IT_IS,
    ) -> None:
        self.network = network
        self.discrepancy = discrepancy
        self.scales = tuple(scales)
        self.view = view
        self.definition = discrepancy_definition(discrepancy, scales)
        """The discrepancy in words, as stores record it."""
        self._module = discrepancy.partition(":")[2]
        if discrepancy == "heads" and not network.has_aux:
            raise NetworkError(
                "maps.discrepancy: heads compares a main and an auxiliary head, but this teacher "
                "has one head; add 'auxiliary: true' to teacher.network if its weights have one, "
                f"or choose {_ONE_HEAD}"
            )
        if view.averages and discrepancy in ("flip", "scales"):
            raise NetworkError(
                f"maps.averaging: expected none with maps.discrepancy: {discrepancy}, which "
                "measures how far such passes are apart; leave one of the two out"
            )
        if self._module:
            self._require_module()

    def __call__(self, images_B3HW: Tensor) -> TeacherOutputs:
        """Evaluate the teacher on whole images or crops.

        Args:
            images_B3HW: (B, 3, H, W), uint8 in 0..255 or floating point in [0, 1].

        Returns:
            Logits and discrepancy at the teacher's output grid.

        Raises:
            NetworkError: The submodule gave no logits of the classes.
        """
        # The images as they are come first: what hooks see of the first pass is of them.
        main, aux, views = self.heads(images_B3HW)
        if aux is not None:
            discrepancy = prediction_discrepancy(main, aux)
        elif self.discrepancy == "flip":
            mirrored = self._look(images_B3HW.flip(-1))[0].flip(-1)
            views["view of the mirrored image"] = mirrored
            discrepancy = prediction_discrepancy(main, mirrored)
        elif self.discrepancy == "scales":
            scaled = [scale for scale in self.scales if scale != 1.0]
            for scale in scaled:
                views[f"view at scale {scale}"] = self._look(_scaled(images_B3HW, scale))[0]
            chosen = list(views.values())[0 if 1.0 in self.scales else 1 :]
            probs = [_resize(logits.softmax(dim=1), main.shape[-2:]) for logits in chosen]
            discrepancy = scale_discrepancy(probs)
        elif self.discrepancy == "entropy":
            discrepancy = entropy_discrepancy(main)
        else:
            discrepancy = margin_discrepancy(main)
        return TeacherOutputs(main=main, aux=aux, discrepancy=discrepancy, views=views)

    def heads(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Evaluate the heads alone: no discrepancy, and no pass that only that would need.

        Args:
            images_B3HW: As for a call.

        Returns:
            ``main``, ``aux`` and ``views`` of :class:`TeacherOutputs`.
        """
        views: dict[str, Tensor] = {}
        if self.view.averages:
            main, aux = self._averaged(images_B3HW, views)
        else:
            main, aux = self._look(images_B3HW)
            views |= self._named(main, aux)
        return main, aux, views

    def check(self) -> None:
        """Run the teacher once on a blank image, to refuse a wrong submodule before long work.

        Raises:
            NetworkError: The submodule gives no logits of the classes.
        """
        if not self._module:
            return
        side = 2 * self.network.divisor
        blank = torch.zeros(1, 3, side, side, device=self.network.mean.device)
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            with torch.no_grad():
                self(blank)
        finally:
            for module, training in modes.items():
                module.training = training

    def _averaged(
        self, images_B3HW: Tensor, views: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the probabilities' mean; adds the logits of every pass to ``views``."""
        grid = self.network.grid_size(images_B3HW.shape[-2], images_B3HW.shape[-1])
        sums: dict[str, Tensor] = {}
        passes = [
            (s, mirror) for s in self.view.scales for mirror in (False, True)[: 1 + self.view.flip]
        ]
        for scale, mirror in passes:
            images = _scaled(images_B3HW, scale)
            heads = self._named(*self._look(images.flip(-1) if mirror else images))
            for name, logits in heads.items():
                back = logits.flip(-1) if mirror else logits
                views[f"{name} at scale {scale}{', mirrored' * mirror}"] = back
                with torch.autocast(images.device.type, enabled=False):
                    probs = _resize(back.softmax(dim=1), grid)
                sums[name] = sums[name] + probs if name in sums else probs
        # A probability that is 0 in float32 would have an infinite logarithm.
        smallest = torch.finfo(torch.float32).tiny
        averaged = [(total / len(passes)).clamp_min(smallest).log() for total in sums.values()]
        return averaged[0], averaged[1] if len(averaged) > 1 else None

    def _named(self, main: Tensor, aux: Tensor | None) -> dict[str, Tensor]:
        """The heads' logits by what gave them."""
        named = {"main head": main}
        if aux is not None:
            named[f"module '{self._module}'" if self._module else "auxiliary head"] = aux
        return named

    def _look(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Main logits and, where the discrepancy has some, auxiliary ones, by windows or not."""
        window = self.view.window
        height, width = images_B3HW.shape[-2:]
        if window is None or (height <= window[0] and width <= window[1]):
            return self._pass(images_B3HW)
        windows = SlidingWindows(
            (height, width), window, self.view.overlap, self.network.grid_size, images_B3HW.device
        )
        main, *aux = windows.blend(
            [
                head
                for head in self._pass(images_B3HW[..., row.pixels, column.pixels])
                if head is not None
            ]
            for row, column in windows
        )
        return main, aux[0] if aux else None

    def _pass(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """One forward pass."""
        with self._taking() as taken:
            outputs = self.network(images_B3HW)
        main = outputs.main.float()
        if self.discrepancy == "heads":
            return main, outputs.aux.float()
        return main, self._auxiliary(taken, outputs.main) if self._module else None

    @contextmanager
    def _taking(self) -> Iterator[list[Any]]:
        """Gather what the submodule gives within the block."""
        taken: list[Any] = []
        if not self._module:
            yield taken
            return

        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            taken.append(output)

        # Looked up each time: whoever prepares a network for training may replace modules.
        handle = self.network.get_submodule(self._module).register_forward_hook(take)
        try:
            yield taken
        finally:
            handle.remove()

    def _auxiliary(self, taken: Sequence[Any], main: Tensor) -> Tensor:
        """The submodule's output as logits on the grid of ``main``, in float32."""
        where = f"maps.discrepancy: the teacher's module '{self._module}'"
        if not taken:
            raise NetworkError(
                f"{where} took no part in the forward pass; name one that does, or choose "
                "flip, scales, entropy or margin"
            )
        output = taken[0]
        if isinstance(output, tuple | list) and len(output) == 1:
            output = output[0]
        if not isinstance(output, Tensor):
            length = f" of {len(output)}" if isinstance(output, tuple | list) else ""
            raise NetworkError(
                f"{where}: expected one tensor (B, C, h, w) of logits, got "
                f"{type(output).__name__}{length}; name the module that gives the logits"
            )
        batch, classes = main.shape[:2]
        if output.dim() != 4 or output.shape[0] != batch or output.shape[1] != classes:
            raise NetworkError(
                f"{where}: expected logits ({batch}, {classes}, h, w), a channel for each of "
                f"{classes} classes, got shape {tuple(output.shape)}; name the last layer of an "
                "auxiliary head"
            )
        return _resize(output, main.shape[-2:]).float()

    def _require_module(self) -> None:
        names = [name for name, _ in self.network.named_modules() if name]
        if self._module in names:
            return
        near = difflib.get_close_matches(self._module, names, n=3, cutoff=0.4)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"at the top there are {', '.join(name for name in names if '.' not in name)}"
        )
        raise NetworkError(f"maps.discrepancy: the teacher has no module '{self._module}'; {hint}")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of a teacher's passes: ``bf16`` or ``fp16``, or ``no`` for none."""
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=dtypes[precision], enabled=precision != "no")


def discrepancy_definition(discrepancy: str, scales: Sequence[float]) -> str:
    """The discrepancy in words: part of a store's identity, and stored with the array.

    Raises:
        NetworkError: There is no such discrepancy, or fewer than two scales.
    """
    kind, _, module = discrepancy.partition(":")
    if kind == "module" and module:
        return f"KL(module:{module} || main)"  # a module may be called aux
    if discrepancy == "scales" and len(scales) < 2:
        raise NetworkError(f"maps.scales: expected at least two scales, got {list(scales)}")
    definitions = {
        "heads": "KL(aux || main)",
        "flip": "KL(mirrored back || main)",
        "scales": f"mean KL(scale || mean), scales {', '.join(map(str, map(float, scales)))}",
        "entropy": "entropy(main)",
        "margin": "-ln(p1 - p2)",
    }
    if discrepancy not in definitions:
        raise NetworkError(f"maps.discrepancy: expected heads, {_ONE_HEAD}, got '{discrepancy}'")
    return definitions[discrepancy]


def _scaled(images_B3HW: Tensor, scale: float) -> Tensor:
    """The images at another size, in [0, 1]; untouched at their own."""
    if scale == 1.0:
        return images_B3HW
    if not images_B3HW.is_floating_point():
        images_B3HW = images_B3HW / 255.0
    return _resize(images_B3HW, [max(1, round(side * scale)) for side in images_B3HW.shape[-2:]])


def _resize(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, tuple(size), mode="bilinear", align_corners=True)
