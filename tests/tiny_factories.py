"""Functions that configurations of the tests name as the factory of a network."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """Logits at stride 8, auxiliary ones at stride 4, returned in one of several forms."""

    def __init__(self, num_classes: int, form: str, width: int) -> None:
        super().__init__()
        self.form = form
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1)
        )
        self.deep = nn.Conv2d(width, width, 3, 2, 1)
        self.main_head = nn.Conv2d(width, num_classes, 1)
        self.aux_head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Any:
        features = self.encoder(x)
        main, aux = self.main_head(self.deep(features)), self.aux_head(features)
        if self.form == "tensor":
            return main
        if self.form == "tuple":
            return main, aux
        return {"out": main, "aux": aux}


def two_heads(num_classes: int, form: str = "tuple", width: int = 8) -> nn.Module:
    return TwoHeads(num_classes, form, width)


def no_network(num_classes: int) -> str:
    return f"{num_classes} classes"


def one_class_too_many(num_classes: int) -> nn.Module:
    return TwoHeads(num_classes + 1, "tensor", 8)


class Nothing(nn.Module):
    """Gives what no head gives."""

    def forward(self, x: Tensor) -> Any:
        return {"features": x}


def nothing(num_classes: int) -> nn.Module:
    return Nothing()


class NamedOutputs:
    """Logits as attributes, as many libraries return them."""

    def __init__(self, logits: Tensor, aux: Tensor) -> None:
        self.logits = logits
        self.aux = aux


class Named(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        return NamedOutputs(*super().forward(x))


def named(num_classes: int) -> nn.Module:
    return Named(num_classes, "tuple", 8)


class Mortal(TwoHeads):
    """Kills the worker process that trains it, at one of its steps, until that was done enough."""

    def __init__(self, num_classes: int, graves: Path, deaths: int, step: int) -> None:
        super().__init__(num_classes, "tensor", 8)
        self._graves, self._deaths, self._step = graves, deaths, step
        self._steps = 0

    def forward(self, x: Tensor) -> Any:
        if self.training and torch.is_grad_enabled():
            self._steps += 1
            dead = len(list(self._graves.iterdir()))
            if (
                self._steps == self._step
                and dead < self._deaths
                and multiprocessing.parent_process() is not None
            ):
                (self._graves / str(dead)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def mortal(num_classes: int, graves: str, deaths: int, step: int) -> nn.Module:
    return Mortal(num_classes, Path(graves), deaths, step)


class WithoutBatchNorm(nn.Module):
    """Main and auxiliary logits of each image by itself: group norms, no dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.GroupNorm(2, 8), nn.ReLU())
        self.head = nn.Conv2d(8, num_classes, 1)
        self.aux_head = nn.Conv2d(8, num_classes, 3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        features = self.encoder(x)
        return self.head(features), self.aux_head(features)


def without_batch_norm(num_classes: int) -> nn.Module:
    return WithoutBatchNorm(num_classes)
