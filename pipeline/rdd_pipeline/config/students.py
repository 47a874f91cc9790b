"""Students, and the methods that distil them."""

from __future__ import annotations

import typing
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rdd_pipeline.config._base import Count, Fraction, Model
from rdd_pipeline.config.networks import NetworkConfig
from rdd_pipeline.config.training import TrainingConfig

StudentName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


def _method_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class RDDConfig(Model):
    """Relative Difficulty Distillation (arXiv 2407.03719)."""

    switch: Annotated[int, Field(ge=0)] | Fraction = 0.1
    """End of the first stage (TFE-RDD): iterations, or a fraction of them."""
    blend: Literal["hard", "linear"] = "hard"
    """``linear`` lets the first stage's loss fade out from the switch to the end."""
    threshold: Fraction = 0.7
    """A pixel is hard when its true-class probability is at most this."""
    min_kept: Annotated[int, Field(ge=0)] | Fraction = 100_000
    """Least number of hard pixels in a batch: a count, or a fraction of its pixels."""
    relation: Literal["xor", "or", "and", "student"] = "xor"
    """Which of the teacher's and the student's hard pixels are trained on."""
    class_weights: bool = False
    """Weight the second stage's mean by the class weights that the data set gives."""


class KDConfig(Model):
    """Logit distillation (Hinton et al., arXiv 1503.02531) at the output stride.

    Part of ``kd`` and, as published, of ``rdd``.
    """

    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """0 leaves the term out."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0


Weight = Annotated[float, Field(gt=0.0)]
Temperature = Annotated[float, Field(gt=0.0)]


class CWDConfig(Model):
    """Channel-wise distillation of the logits (arXiv 2011.13256)."""

    weight: Weight = 3.0
    temperature: Temperature = 4.0


class DISTConfig(Model):
    """Correlation of the class probabilities, DIST (arXiv 2205.10536)."""

    weight: Weight = 1.0
    temperature: Temperature = 1.0
    inter: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the relation between classes at each position."""
    intra: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the relation between positions in each class."""


class SKDConfig(Model):
    """Pair-wise similarity of the logits at all positions, SKD (arXiv 1903.04197)."""

    weight: Weight = 10.0
    patch: Count = 2
    """Side of the patch that makes one node, in grid positions."""


class FeatureCWDConfig(CWDConfig):
    """Channel-wise distillation of features (arXiv 2011.13256)."""

    weight: Weight = 50.0


class FeatureSKDConfig(SKDConfig):
    """Pair-wise similarity of features at all positions, SKD (arXiv 1903.04197)."""


class ATConfig(Model):
    """Attention transfer (arXiv 1612.03928)."""

    weight: Weight = 1000.0


class IFVDConfig(Model):
    """Intra-class feature variation distillation (Wang et al., ECCV 2020)."""

    weight: Weight = 50.0


class DSDConfig(Model):
    """Double similarity distillation (arXiv 2107.08591)."""

    pixel_weight: Weight = 1000.0
    """Weight of the similarity of residual attention maps."""
    category_weight: Weight = 10.0
    """Weight of the similarity of category correlations."""
    temperature: Temperature = 4.0
    """Of the category correlations."""


class CIRKDConfig(Model):
    """Cross-image relational distillation (arXiv 2204.06986)."""

    minibatch_weight: Weight = 1.0
    """Weight of the relations between the positions of a batch."""
    pixel_weight: Weight = 0.1
    """Weight of the relations to remembered positions."""
    region_weight: Weight = 0.1
    """Weight of the relations to remembered class means."""
    temperature: Temperature = 0.1
    patch: Count = 4
    """Side of the patch averaged to one position within the batch, in grid positions."""
    pixel_memory: Count = 2000
    """Positions remembered for each class; published: 20,000."""
    region_memory: Count = 2000
    """Class means remembered for each class."""
    pixel_contrast: Count = 4096
    """Remembered positions drawn for a step, over all classes."""
    region_contrast: Count = 1024
    """Remembered class means drawn for a step, over all classes."""


class FeatureTap(Model):
    """Where the features of student and teacher are taken: the output of a module in each.

    ``decoder`` is the module of that name; ``encoder[-1]`` the last item of a module's output.
    """

    student: str
    teacher: str


_TAPS = tuple(
    FeatureTap(student=name, teacher=name) for name in ("encoder[-2]", "encoder[-1]", "decoder")
)

Method = Literal[
    "supervised", "rdd", "kd", "cwd", "dist", "skd",
    "cwd_features", "skd_features", "at", "ifvd", "dsd", "cirkd",
]  # fmt: skip
FEATURE_METHODS = frozenset({"cwd_features", "skd_features", "at", "ifvd", "dsd", "cirkd"})
"""Methods that compare features, and so need the teacher itself on every batch."""


class MethodConfig(Model):
    """A method under a name, with its settings."""

    name: StudentName
    method: Annotated[tuple[Method, ...], BeforeValidator(_method_list)]
    """``supervised``: cross-entropy alone. ``rdd``: cross-entropy weighted by relative difficulty
    in two stages, plus logit distillation as published (``kd.weight: 0`` leaves that out). All
    others add their loss to the cross-entropy, or to that of ``rdd`` where both are named:
    ``kd``, ``cwd``, ``dist``, ``skd`` work on logits; ``cwd_features``, ``skd_features``, ``at``,
    ``ifvd``, ``dsd``, ``cirkd`` on features, for which the teacher is loaded beside the student.
    Each has a section of its own name."""
    teacher: Literal["stored", "online"] = "stored"
    """Where the teacher's signals come from: the maps, or the teacher evaluated on every crop."""
    features: Annotated[tuple[FeatureTap, ...], Field(min_length=1)] = _TAPS
    """Pairs of features, in order of depth: ``at`` and ``dsd`` compare all, others the last."""
    training: TrainingConfig | None = None
    """None takes ``student.training``."""
    rdd: RDDConfig = RDDConfig()
    kd: KDConfig = KDConfig()
    cwd: CWDConfig = CWDConfig()
    dist: DISTConfig = DISTConfig()
    skd: SKDConfig = SKDConfig()
    cwd_features: FeatureCWDConfig = FeatureCWDConfig()
    skd_features: FeatureSKDConfig = FeatureSKDConfig()
    at: ATConfig = ATConfig()
    ifvd: IFVDConfig = IFVDConfig()
    dsd: DSDConfig = DSDConfig()
    cirkd: CIRKDConfig = CIRKDConfig()

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """Accept bare methods, such as ``rdd+cwd``; they are the name unless one is given."""
        if isinstance(value, str):
            value = {"method": value.split("+")}
        elif isinstance(value, list):
            value = {"method": value}
        if isinstance(value, dict) and "method" in value and "name" not in value:
            method = _method_list(value["method"])
            if isinstance(method, list) and all(isinstance(part, str) for part in method):
                value = value | {"name": "+".join(method)}
        return value

    @property
    def distils_logits(self) -> bool:
        """Whether the loss has a term on the teacher's logits."""
        kd = ("kd" in self.method or "rdd" in self.method) and self.kd.weight > 0.0
        return kd or not {"cwd", "dist", "skd", "dsd"}.isdisjoint(self.method)

    @property
    def needs_maps(self) -> bool:
        """Whether the student reads a map store."""
        return self.teacher == "stored" and (self.distils_logits or "rdd" in self.method)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to be in memory beside the student."""
        online = self.teacher == "online" and self.method != ("supervised",)
        return online or not FEATURE_METHODS.isdisjoint(self.method)

    @property
    def sections(self) -> dict[str, Model]:
        """The settings of the methods in use, by name."""
        names = set(self.method) - {"supervised"}
        if "rdd" in names:
            names.add("kd")
        return {name: getattr(self, name) for name in sorted(names)}

    @field_validator("method")
    @classmethod
    def _method_makes_sense(cls, value: tuple[Method, ...]) -> tuple[Method, ...]:
        if not value:
            raise ValueError("expected at least one method")
        if "supervised" in value and len(value) > 1:
            raise ValueError("supervised cannot be combined with another method")
        if len(set(value)) != len(value):
            raise ValueError(f"a method is named twice in {list(value)}")
        return value

    @model_validator(mode="after")
    def _sections_are_used(self) -> Self:
        methods = set(typing.get_args(Method)) - {"supervised"} - self.sections.keys()
        fields = type(self).model_fields
        # A configuration that was written out again holds all sections, at their defaults.
        unused = sorted(name for name in methods if getattr(self, name) != fields[name].default)
        if unused:
            raise ValueError(
                f"expected settings of {list(self.method)} alone, got {unused} too; name the "
                "method or leave its settings out"
            )
        if "dsd" in self.method and len(self.features) < 2:
            raise ValueError("features: expected at least two taps, which dsd compares, got one")
        return self


class StudentConfig(MethodConfig):
    """One student: its name, its method and what differs from the shared settings."""

    network: NetworkConfig | None = None
    """None takes ``student.network``."""
    seed: int | None = None
    """None takes the run's seed; students with equal network and seed start from equal weights."""


class StudentDefaults(Model):
    """What students share unless they say otherwise."""

    network: NetworkConfig
    training: TrainingConfig = TrainingConfig()
    allow_missing: bool = False
    """Leave images that the store has no maps of out of the training of students that read it,
    instead of refusing the store."""
