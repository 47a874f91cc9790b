"""Functions that configurations of the tests name as the factory of a network."""

from __future__ import annotations

from typing import Any

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
