"""Features of a network, taken from its modules by name, and projected where that is learned.

Shape suffixes: B batch, F channels of the features, h w their grid.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks import SegmentationNetwork

_TAP = re.compile(r"(?P<module>[^\[\]]+)(?P<items>(\[(-?\d+|\w+)\])*)")


class FeatureTaps:
    """Takes the outputs of named modules whenever the network runs.

    Args:
        network: Its modules are found by name, as :meth:`torch.nn.Module.get_submodule` does.
        names: ``NAME`` takes the output of a module, ``NAME[i]`` its item ``i``, ``NAME[key]``
            that of a dictionary; what is taken has to be a tensor (B, F, h, w).

    Raises:
        NetworkError: A name is no module, or not written as above.
    """

    def __init__(self, network: SegmentationNetwork, names: Sequence[str]) -> None:
        self.network = network
        self.names = tuple(names)
        self._places: dict[str, tuple[str, tuple[str, ...]]] = {}
        modules = dict(network.named_modules())
        for name in self.names:
            match = _TAP.fullmatch(name)
            if match is None:
                raise NetworkError(
                    f"features: expected NAME, NAME[index] or NAME[key], got '{name}'"
                )
            if match["module"] not in modules:
                near = difflib.get_close_matches(match["module"], modules, n=3, cutoff=0.3)
                hint = ", ".join(near or [n for n in modules if n and "." not in n])
                raise NetworkError(
                    f"features: the network has no module '{match['module']}'; there is {hint}"
                )
            items = re.findall(r"\[([^\]]+)\]", match["items"])
            self._places[name] = (match["module"], tuple(items))

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Gather the features of the first forward pass within the block, by tap.

        Raises:
            NetworkError: An output is not (B, F, h, w), or has no such item.
        """
        found: dict[str, Tensor] = {}

        def hook(name: str, items: tuple[str, ...]) -> Callable[[nn.Module, Any, Any], None]:
            def take(module: nn.Module, args: Any, output: Any) -> None:
                if name not in found:
                    found[name] = _pick(output, items, name)

            return take

        # Looked up again each time: distributed training replaces batch norms.
        handles = [
            self.network.get_submodule(module).register_forward_hook(hook(name, items))
            for name, (module, items) in self._places.items()
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def in_order(self, found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The features in the order of the names.

        Raises:
            NetworkError: A module was not run in the network's forward pass.
        """
        missing = [name for name in self.names if name not in found]
        if missing:
            raise NetworkError(f"features: {missing} took no part in the forward pass")
        return tuple(found[name] for name in self.names)

    def channels(self) -> tuple[int, ...]:
        """Number of channels of each feature, found by running the network on an empty image."""
        if not self.names:
            return ()
        training = self.network.training
        side = 2 * self.network.divisor
        device = next(self.network.parameters()).device
        self.network.eval()
        try:
            with torch.no_grad(), self.recording() as found:
                self.network(torch.zeros(1, 3, side, side, device=device))
        finally:
            self.network.train(training)
        return tuple(feature.shape[1] for feature in self.in_order(found))


class StudentOutputs(NamedTuple):
    """Logits and features of a student."""

    main: Tensor
    """(B, C, h, w) logits of the main head."""
    aux: Tensor | None
    """(B, C, h, w) logits of the auxiliary head, or None."""
    features: tuple[Tensor, ...]
    """(B, F, h', w') for each tap."""
    projected: dict[str, Tensor]
    """The last feature with the teacher's number of channels, for each method that needs it."""


class TappedStudent(nn.Module):
    """A student that hands out features with its logits.

    Projections are part of the trained module, so that the optimiser, checkpoints and
    distributed training see them; the student's own weights are those of ``network``.

    Args:
        network: The student.
        taps: See :class:`FeatureTaps`.
        project: Number of channels to bring the last feature to, by the name of the method: a
            learned 1x1 convolution where the number differs, nothing where it does not.
        seed: Of the projections' initial weights.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        taps: Sequence[str],
        project: Mapping[str, int],
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.network = network
        self._taps = FeatureTaps(network, taps)
        last = self._taps.channels()[-1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projections = nn.ModuleDict(
                {
                    method: nn.Identity() if last == channels else nn.Conv2d(last, channels, 1)
                    for method, channels in project.items()
                }
            )

    def forward(self, images: Tensor) -> StudentOutputs:
        """Logits and features of (B, 3, H, W) images."""
        with self._taps.recording() as found:
            logits = self.network(images)
        features = self._taps.in_order(found)
        projected = {name: module(features[-1]) for name, module in self.projections.items()}
        return StudentOutputs(logits.main, logits.aux, features, projected)


def _pick(output: Any, items: tuple[str, ...], name: str) -> Tensor:
    for item in items:
        try:
            if isinstance(output, Mapping):
                output = output[item] if item in output else list(output.values())[int(item)]
            else:
                output = output[int(item)]
        except (IndexError, TypeError, KeyError, ValueError) as error:
            raise NetworkError(
                f"features: '{name}' asks for an item that is not there; {_items(output, name)}"
            ) from error
    if not isinstance(output, Tensor):
        raise NetworkError(
            f"features: '{name}' gives a {type(output).__name__}, expected a tensor; "
            f"{_items(output, name)}"
        )
    if output.dim() != 4 or output.shape[1] == 0:
        raise NetworkError(
            f"features: '{name}' gives shape {tuple(output.shape)}, expected (B, F, h, w)"
        )
    return output


def _items(output: Any, name: str) -> str:
    """What one could ask for instead, for a message."""
    module = name.partition("[")[0]
    if isinstance(output, Mapping):
        return f"there is {', '.join(f'{module}[{key}]' for key in output)}"
    if isinstance(output, list | tuple):
        return f"there are {len(output)}, the last one is {module}[-1]"
    return "name another module"
