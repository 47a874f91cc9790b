"""The configuration: one YAML file, checked before anything runs.

The same pydantic models are the parameters of the Prefect flows. Unknown keys, wrong types and
contradictions are all collected and reported together, each with the path of its key.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rdd_pipeline.errors import ConfigError


class Model(BaseModel):
    """Base of all configuration sections: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class SyntheticData(Model):
    """Street-like scenes drawn by the program: no download, the same for the same seed."""

    type: Literal["synthetic"] = "synthetic"
    train_images: Count = 240
    val_images: Count = 60
    height: Annotated[int, Field(ge=32)] = 128
    width: Annotated[int, Field(ge=32)] = 192
    seed: int = 0
    """Seed of the scenes; independent of the training seed."""


class CamVidData(Model):
    """CamVid in the SegNet layout: ``train``, ``trainannot``, ``val``, ``valannot`` folders."""

    type: Literal["camvid"] = "camvid"
    root: Path
    """Folder that holds the four folders."""
    train_split: str = "train"
    val_split: str = "val"


DataConfig = Annotated[SyntheticData | CamVidData, Field(discriminator="type")]


class AuxiliaryHead(Model):
    """FCN auxiliary head on an encoder stage (PSPNet, arXiv 1612.01105, section 3.3)."""

    stage: int = -2
    """Index into the encoder's feature pyramid; -2 is the second-last stage."""
    channels: Count | None = None
    """Hidden channels; a quarter of the stage's channels when not given."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1


class NetworkConfig(Model):
    """A segmentation-models-pytorch architecture with an optional auxiliary head of ours."""

    type: Literal["smp"] = "smp"
    architecture: str
    """Class name in segmentation_models_pytorch, such as DeepLabV3, PSPNet or FPN."""
    encoder: str
    """Encoder name, such as resnet18, mobilenet_v2 or tu-<timm name>."""
    encoder_weights: str | None = None
    """Name of pretrained encoder weights, such as imagenet; downloaded on first use."""
    output_stride: Literal[8, 16, 32] | None = None
    """Stride of the dilated encoder; None keeps the architecture's default."""
    auxiliary: AuxiliaryHead | None = None
    options: dict[str, Any] = {}
    """Further keyword arguments of the architecture's constructor."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """RGB mean of the input normalisation, images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """RGB standard deviation of the input normalisation."""


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


class KDConfig(Model):
    """Logit distillation (Hinton et al., arXiv 1503.02531) at the output stride.

    Part of ``kd`` and, as published, of ``rdd``.
    """

    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """0 leaves the term out."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0


Method = Literal["supervised", "kd", "rdd"]


class StudentConfig(Model):
    """One student: its name, its method and what differs from the shared settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    method: Annotated[tuple[Method, ...], BeforeValidator(_method_list)]
    """``supervised``: cross-entropy; ``kd``: plus logit distillation; ``rdd``: the task loss
    weighted by relative difficulty in two stages, plus logit distillation as published
    (``kd.weight: 0`` leaves that out)."""
    network: NetworkConfig | None = None
    """None takes ``student.network``."""
    training: TrainingConfig | None = None
    """None takes ``student.training``."""
    seed: int | None = None
    """None takes the run's seed; students with equal network and seed start from equal weights."""
    rdd: RDDConfig = RDDConfig()
    kd: KDConfig = KDConfig()

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """Accept a bare method name as a student of that name."""
        if isinstance(value, str):
            return {"name": value, "method": value}
        return value

    @property
    def distils_logits(self) -> bool:
        """Whether the loss has the logit distillation term, which needs stored soft labels."""
        return self.method != ("supervised",) and self.kd.weight > 0.0

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


class StudentDefaults(Model):
    """What students share unless they say otherwise."""

    network: NetworkConfig
    training: TrainingConfig = TrainingConfig()


class TeacherConfig(Model):
    """The teacher: a network, and either its weights or how to train it."""

    network: NetworkConfig
    checkpoint: Path | None = None
    """Weights (.safetensors, or .pth without code); None trains the teacher."""
    training: TrainingConfig | None = None
    """Needed when there is no checkpoint."""

    @model_validator(mode="after")
    def _has_weights_or_training(self) -> TeacherConfig:
        if (self.checkpoint is None) == (self.training is None):
            raise ValueError("give either checkpoint (ready weights) or training (to train it)")
        return self


class MapsConfig(Model):
    """What the teacher pass writes, and how."""

    root: str | None = None
    """Folder or URL (``s3://bucket/maps``) of the map stores; None takes the run's folder."""
    soft_labels: bool = True
    """Store the teacher's logits at the output stride, for logit distillation."""
    aux_hardness: bool = True
    """Store the hardness under the auxiliary head, for the second stage's auxiliary term."""
    shard_images: Count = 16
    """Images per shard: one shard is one unit of work and one file per array."""
    batch_size: Count = 4
    """Images per forward pass of the teacher."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: Annotated[int, Field(ge=0)] = 1
    """Dask worker processes on this machine; 0 runs the teacher in the main process."""


class RunConfig(Model):
    """The whole way: teacher, maps, students, report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: Path = Path("runs")
    """The run's folder is ``output/name``."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig
    teacher: TeacherConfig
    maps: MapsConfig = MapsConfig()
    student: StudentDefaults
    students: tuple[StudentConfig, ...]

    @model_validator(mode="after")
    def _students_are_consistent(self) -> RunConfig:
        names = [student.name for student in self.students]
        if not names:
            raise ValueError("students: expected at least one")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"students: the names {twice} are used twice")
        for student in self.students:
            if student.distils_logits and not self.maps.soft_labels:
                raise ValueError(
                    f"students: '{student.name}' distils logits, which needs maps.soft_labels: "
                    "true; kd.weight: 0 leaves the term out"
                )
        if self.teacher.network.auxiliary is None and any(
            "rdd" in student.method for student in self.students
        ):
            raise ValueError(
                "teacher.network.auxiliary: the prediction discrepancy needs an auxiliary head; "
                "add 'auxiliary: {}' to the teacher's network"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run writes."""
        return self.output / self.name

    @property
    def maps_root(self) -> str:
        """Folder or URL of the map stores."""
        return self.maps.root if self.maps.root is not None else str(self.run_dir / "maps")

    def student_network(self, student: StudentConfig) -> NetworkConfig:
        """The student's network, its own or the shared one."""
        return student.network or self.student.network

    def student_training(self, student: StudentConfig) -> TrainingConfig:
        """The student's training settings, its own or the shared ones."""
        return student.training or self.student.training

    def student_seed(self, student: StudentConfig) -> int:
        """The student's seed, its own or the run's."""
        return self.seed if student.seed is None else student.seed


def load_config(path: Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``key.path=value`` overrides (values are YAML) and check it.

    Raises:
        ConfigError: The file is missing or no YAML, or keys or values are wrong; all are listed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str = "configuration") -> RunConfig:
    """Check a configuration that was read from YAML or JSON.

    Raises:
        ConfigError: Keys or values are wrong; all of them are listed.
    """
    try:
        return RunConfig.model_validate(_expand_paths(tree))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError("\n".join([f"{source}: {len(lines)} problem(s)", *lines])) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    *parents, last = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _child(node, part, override, ".".join(parents[:depth]), create=True)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override}: {'.'.join(parents)} holds a value, not keys")


def _child(node: Any, part: str, override: str, path: str, *, create: bool) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: {path} holds a value, not keys")
    if create and node.get(part) is None:
        node[part] = {}
    return node[part]


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"--set {override}: expected an index from 0 to {len(node) - 1}, got {part!r}"
        )
    return int(part)


def _expand_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Expand ``~`` and ``$VARIABLES`` in strings, so that configurations can be shared."""

    def expand(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: expand(item) for key, item in value.items()}
        if isinstance(value, list):
            return [expand(item) for item in value]
        if isinstance(value, str) and value.startswith("~"):
            value = str(Path(value).expanduser())
        return os.path.expandvars(value) if isinstance(value, str) else value

    return {str(key): expand(item) for key, item in tree.items()}


def _explain(item: Any) -> str:
    location = item["loc"]
    # Tags of the discriminated unions stand in the location but are no keys of the file.
    keys = [part for part in location if part not in ("synthetic", "camvid")]
    path = ".".join(str(part) for part in keys)
    if item["type"] == "extra_forbidden":
        valid = _valid_names(RunConfig, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
        return f"  {path}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        message = "required, but missing"
    elif not message.startswith(("give ", "expected ")) and not isinstance(item["input"], dict):
        message = f"{message}, got {item['input']!r}"
    return f"  {path}: {message}" if path else f"  {message}"


def _valid_names(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names valid at a location of a validation error."""
    models = [model]
    for part in location:
        if isinstance(part, int):
            continue
        children: list[type[BaseModel]] = []
        for candidate in models:
            if part in candidate.model_fields:
                children += _models_in(candidate.model_fields[part].annotation)
        tagged = [
            m for m in models if "type" in m.model_fields and m.model_fields["type"].default == part
        ]
        models = children or tagged or models
    return sorted({name for candidate in models for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, Annotated):
        return [m for part in typing.get_args(annotation) for m in _models_in(part)]
    return []
