"""Networks that a function of the user's builds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rdd_pipeline.config import CustomConfig
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks.base import SegLogits, SegmentationNetwork, first_line, suggest

_MAIN = ("main", "out", "logits")
_AUX = ("aux", "auxiliary")


class CustomNetwork(SegmentationNetwork):
    """A user's module, called with normalised images (B, 3, H, W).

    It gives logits (B, C, h, w); or main and auxiliary ones as a tuple, or as ``main``, ``out``
    or ``logits`` and ``aux`` or ``auxiliary`` of a dictionary or an object. In the state dict its
    names follow ``network.``.
    """

    name_prefix = "network."

    def __init__(self, network: nn.Module, config: CustomConfig, num_classes: int) -> None:
        super().__init__(
            num_classes=num_classes, divisor=config.divisor, mean=config.mean, std=config.std
        )
        self.network = network
        self._auxiliary = config.auxiliary
        self._check_outputs(2 * config.divisor)
        self.measure()
        self.pretrained_whole = config.pretrained

    @property
    def has_aux(self) -> bool:
        """Whether the auxiliary logits are taken."""
        return self._auxiliary

    @property
    def encoder_module(self) -> nn.Module:
        """The module's ``encoder`` or ``backbone``, or all of it where it has neither."""
        for name in ("encoder", "backbone"):
            module = getattr(self.network, name, None)
            if isinstance(module, nn.Module):
                return module
        return self.network

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Unknown, and so empty."""
        return ()

    def raw_logits(self, x: Tensor) -> SegLogits:
        """What the module gives, adapted."""
        main, aux = _heads(self.network(x))
        return SegLogits(main, aux if self._auxiliary else None)

    def _check_outputs(self, side: int) -> None:
        """Run once, for errors that say more than :meth:`measure` can."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                main, aux = _heads(self.network(torch.zeros(2, 3, side, side)))
        except NetworkError:
            raise
        except Exception as error:
            raise NetworkError(
                f"the network does not run on images (2, 3, {side}, {side}): {first_line(error)}; "
                "network.divisor sets the multiples its images have"
            ) from error
        finally:
            self.train(training)
        if self._auxiliary and aux is None:
            raise NetworkError(
                "network.auxiliary: the network returns no auxiliary logits; return (main, aux), "
                "or leave auxiliary out"
            )
        for name, logits in (("main", main), ("auxiliary", aux if self._auxiliary else None)):
            if logits is not None and (logits.dim() != 4 or logits.shape[1] != self.num_classes):
                raise NetworkError(
                    f"expected {name} logits (B, {self.num_classes}, h, w), a channel for each "
                    f"class of the data set, got shape {tuple(logits.shape)}; build the head with "
                    "the num_classes that the function is given"
                )


def build_custom(config: CustomConfig, num_classes: int) -> CustomNetwork:
    """Build a network with a function of the user's.

    Raises:
        NetworkError: The function cannot be found or called, or what it returns is no network as
            described in :class:`CustomNetwork`.
    """
    where = f"network.factory '{config.factory}'"
    function = _find(config.factory, where)
    try:
        network = function(num_classes=num_classes, **config.options)
    except Exception as error:
        raise NetworkError(
            f"{where}: failed with num_classes={num_classes} and options "
            f"{sorted(config.options)} ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(network, nn.Module):
        raise NetworkError(
            f"{where}: expected a torch.nn.Module, got {type(network).__name__}; return the network"
        )
    try:
        return CustomNetwork(network.train(), config, num_classes)
    except NetworkError as error:
        raise NetworkError(f"{where}: {error}") from error.__cause__


def _find(factory: str, where: str) -> Any:
    module_name, _, path = factory.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        parents = [module_name[:i] for i, char in enumerate(module_name) if char == "."]
        if error.name not in (module_name, *parents):  # something that the module imports
            raise NetworkError(f"{where}: cannot be imported, {first_line(error)}") from error
        raise NetworkError(
            f"{where}: there is no module '{error.name}'; install it, or add its folder to "
            "PYTHONPATH"
        ) from error
    # The module's own code runs on import.
    except Exception as error:
        raise NetworkError(
            f"{where}: cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            names = [n for n, value in vars(found).items() if callable(value) and n[0] != "_"]
            raise NetworkError(f"{where}: there is no '{name}'; {suggest(name, names)}")
        found = getattr(found, name)
    if not callable(found):
        raise NetworkError(f"{where}: expected a function, got {type(found).__name__}")
    return found


def _heads(output: Any) -> tuple[Tensor, Tensor | None]:
    """Main and auxiliary logits in what a network returned."""
    main, aux = None, None
    if isinstance(output, Tensor):
        main = output
    elif isinstance(output, Mapping):
        main, aux = (_first(output.get(name) for name in names) for names in (_MAIN, _AUX))
    elif isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        main, aux = (*output, None, None)[:2]
    else:
        main, aux = (
            _first(getattr(output, name, None) for name in names) for names in (_MAIN, _AUX)
        )
    if not isinstance(main, Tensor) or not isinstance(aux, Tensor | None):
        content = f" with {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise NetworkError(
            "expected a tensor of logits, (main, aux), or one of "
            f"{', '.join(_MAIN)} and possibly aux in a dictionary or an object, got "
            f"{type(output).__name__}{content}"
        )
    return main, aux


def _first(values: Any) -> Any:
    return next((value for value in values if value is not None), None)
