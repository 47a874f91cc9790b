"""The teacher, and the maps that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rdd_pipeline.config._base import Count, Model
from rdd_pipeline.config.networks import NetworkConfig
from rdd_pipeline.config.training import TrainingConfig


class TeacherConfig(Model):
    """The teacher: a network, and either its weights or how to train it."""

    network: NetworkConfig
    checkpoint: Path | None = None
    """Weights (.safetensors, .pth without code, or a folder written by ``save_pretrained``)."""
    checkpoint_layout: Literal["native", "cirkd"] = "native"
    """Names in the checkpoint: the network's own, or those of the CIRKD code base."""
    strict: bool = True
    """False loads what fits of a checkpoint and says what was left out."""
    training: TrainingConfig | None = None
    """How to train the teacher: from the checkpoint's weights where one is given (its auxiliary
    head may be missing there), else from the network's initial ones."""
    heads_only: bool = False
    """Train the auxiliary head alone and leave everything else as it is."""

    @model_validator(mode="after")
    def _has_weights_or_training(self) -> TeacherConfig:
        ready = self.network.pretrained_whole
        if self.checkpoint is None and self.training is None and not ready:
            raise ValueError(
                "give checkpoint (ready weights), training (to train it) or both (to train it "
                "further), or a network with pretrained weights of all its layers"
            )
        if self.heads_only and (self.training is None or (self.checkpoint is None and not ready)):
            raise ValueError(
                "give both checkpoint and training for heads_only, which trains an auxiliary head "
                "on a finished network"
            )
        if self.checkpoint is None and (not self.strict or self.checkpoint_layout != "native"):
            raise ValueError("give checkpoint too, which strict and checkpoint_layout are about")
        return self


_DISCREPANCIES = ("heads", "flip", "scales", "entropy", "margin")


def _count_or_auto(value: Any) -> Any:
    # Checked here, because the message of a union names its parts as if they were keys.
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("expected auto or a number of images from 1")


class AveragingConfig(Model):
    """Passes of the teacher whose probabilities are averaged, in both heads."""

    flip: bool = False
    """Over each image and its mirror image."""
    scales: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...] = (1.0,)
    """Over these sizes of the image, as multiples of its own."""

    @field_validator("scales")
    @classmethod
    def _scales_differ(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"expected at least one scale and none twice, got {list(value)}")
        return value


class MapsConfig(Model):
    """What the teacher pass writes, and how."""

    root: str | None = None
    """Folder or URL (``s3://bucket/maps``) of the map stores; None takes the run's folder."""
    soft_labels: bool = True
    """Store the teacher's logits at the output stride, for logit distillation."""
    discrepancy: str = "heads"
    """How the teacher's discrepancy is obtained: ``heads``, its auxiliary against its main head as
    published; ``module:NAME``, a submodule's output in the auxiliary head's place; of teachers
    with one head ``flip``, the mirrored image; ``scales``, several sizes of the image;
    ``entropy`` or ``margin``, the prediction's own."""
    scales: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...] = (0.75, 1.0, 1.25)
    """Sizes of the image for ``discrepancy: scales``, as multiples of its own."""
    view: Literal["whole", "sliding"] = "whole"
    """Whether the teacher sees an image whole, or through a window that slides over images larger
    than it and whose logits are blended."""
    window: tuple[Count, Count] = (512, 1024)
    """Height and width in pixels of the window of ``view: sliding``; best multiples of 32."""
    overlap: Annotated[float, Field(ge=0.0, le=0.9)] = 0.25
    """Least share of a window that its neighbour sees too, with ``view: sliding``."""
    averaging: AveragingConfig = AveragingConfig()
    """Test-time averaging of all maps over several passes; not to be confused with
    ``discrepancy: flip`` and ``scales``, which measure how far such passes are apart."""
    aux_hardness: bool | None = None
    """Store the hardness under the auxiliary logits, for the second stage's auxiliary term; None
    does where there are auxiliary logits (``discrepancy`` of ``heads`` or ``module:NAME``)."""
    shard_images: Count = 16
    """Images per shard: one shard is one unit of work and one file per array."""
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = 4
    """Images of equal size per forward pass of the teacher; halved where memory is not enough.
    ``auto`` begins with a whole shard on an accelerator and with 4 on the CPU."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: Annotated[int, Field(ge=0)] = 1
    """Dask worker processes on this machine; 0 runs the teacher in the main process."""

    @field_validator("discrepancy")
    @classmethod
    def _discrepancy_is_known(cls, value: str) -> str:
        kind, _, name = value.partition(":")
        if value not in _DISCREPANCIES and not (kind == "module" and name):
            raise ValueError(
                f"expected {', '.join(_DISCREPANCIES)} or module:NAME with the name of a "
                f"submodule of the teacher, got '{value}'"
            )
        return value

    @field_validator("scales")
    @classmethod
    def _scales_differ(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) < 2 or len(set(value)) != len(value):
            raise ValueError(f"expected at least two different scales, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _auxiliary_logits_exist(self) -> MapsConfig:
        if self.aux_hardness and not self._has_auxiliary_logits:
            raise ValueError(
                f"aux_hardness: there are no auxiliary logits with discrepancy: "
                f"{self.discrepancy}; leave it out, or use discrepancy: heads or module:NAME"
            )
        return self

    @model_validator(mode="after")
    def _averaging_leaves_passes_apart(self) -> MapsConfig:
        if self.averaging != AveragingConfig() and self.discrepancy in ("flip", "scales"):
            raise ValueError(
                f"averaging: expected none with discrepancy: {self.discrepancy}, which measures "
                "how far such passes are apart; leave averaging out, or choose discrepancy: "
                "heads, entropy, margin or module:NAME"
            )
        return self

    @property
    def _has_auxiliary_logits(self) -> bool:
        return self.discrepancy == "heads" or self.discrepancy.startswith("module:")

    @property
    def stores_aux_hardness(self) -> bool:
        """``aux_hardness`` as it is meant with this ``discrepancy``."""
        if self.aux_hardness is None:
            return self._has_auxiliary_logits
        return self.aux_hardness
