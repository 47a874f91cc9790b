"""How a network is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rdd_pipeline.config._base import Count, Model


class TrainingConfig(Model):
    """How a network is trained; the defaults follow the published Cityscapes set-up."""

    iterations: Count = 40_000
    batch_size: Count = 16
    """Images per optimiser step and process."""
    crop_size: tuple[Count, Count] = (512, 1024)
    """Height and width of the training crop in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale."""
    flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Probability of a horizontal flip."""
    lr: Annotated[float, Field(gt=0.0)] = 0.02
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    poly_power: Annotated[float, Field(gt=0.0)] = 0.9
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    """Iterations over which the learning rate rises linearly to ``lr``."""
    head_lr_factor: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate of everything but the encoder, as a multiple of ``lr``."""
    gradient_clip: Annotated[float, Field(gt=0.0)] | None = None
    """Largest gradient norm; None does not clip."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    aux_weight: Annotated[float, Field(ge=0.0)] = 0.4
    """Weight of the auxiliary head's loss."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes; 0 loads in the training process."""
    checkpoint_every: Count = 1_000
    """Iterations between checkpoints from which training resumes."""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Iterations between evaluations; 0 evaluates at the end alone."""
    log_every: Count = 10

    @field_validator("scale")
    @classmethod
    def _scale_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError(f"expected 0 < low <= high, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainingConfig:
        if self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"warmup_iterations ({self.warmup_iterations}) must be below iterations "
                f"({self.iterations})"
            )
        return self
