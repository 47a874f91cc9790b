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
    Discriminator,
    Field,
    Tag,
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


class CityscapesData(Model):
    """Cityscapes with fine labels: folders ``leftImg8bit`` and ``gtFine``; 19 classes."""

    type: Literal["cityscapes"] = "cityscapes"
    root: Path
    train_split: str = "train"
    val_split: str = "val"


class VOCData(Model):
    """Pascal VOC 2012, augmented with the Semantic Boundaries Dataset; 21 classes."""

    type: Literal["voc"] = "voc"
    root: Path
    """The folder ``VOCdevkit/VOC2012``."""
    train_split: str = "train_aug"
    """A list in ``ImageSets/Segmentation``. Names that end with ``aug`` take their labels from
    ``SegmentationClassAug``, others from ``SegmentationClass``."""
    val_split: str = "val"


class ADE20KData(Model):
    """ADE20K scene parsing, the folder ``ADEChallengeData2016``; 150 classes."""

    type: Literal["ade20k"] = "ade20k"
    root: Path
    train_split: str = "training"
    val_split: str = "validation"


class COCOStuffData(Model):
    """COCO-Stuff 164k: ``images`` and the stuff-and-thing maps; 171 classes."""

    type: Literal["cocostuff"] = "cocostuff"
    root: Path
    labels: str = "annotations"
    """Folder below ``root`` that the maps were unpacked to."""
    train_split: str = "train2017"
    val_split: str = "val2017"


def _class_list(value: object) -> object:
    """Accept the path of a text file, one name a line, in place of the names."""
    if not isinstance(value, str | Path):
        return value
    try:
        lines = Path(value).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a list of names or a text file of them: {error}") from error
    return [line.strip() for line in lines if line.strip()]


_Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_LabelValue = Annotated[int, Field(ge=0, le=65535)]
_Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[_Byte, _Byte, _Byte]


class _LabelTable(Model):
    """Classes, and the numbers in the label files that stand for them."""

    classes: Annotated[
        tuple[str, ...], BeforeValidator(_class_list), Field(min_length=1, max_length=254)
    ]
    """Names in index order, or a text file with one name a line."""
    ids: dict[_LabelValue, str | None] | None = None
    """Number in the label files to name of the class, or to null for ignored; several numbers may
    have one class. None takes 0, 1, 2, ... in the order of ``classes``."""
    ignore: tuple[_LabelValue, ...] = (255,)
    """Further numbers of pixels without a class."""
    palette: tuple[Colour, ...] | None = None
    """RGB colour of each class, for pictures; None takes that of palette images, or makes one."""

    @model_validator(mode="after")
    def _table_is_consistent(self) -> _LabelTable:
        names = set(self.classes)
        if len(names) < len(self.classes):
            twice = sorted(name for name in names if self.classes.count(name) > 1)
            raise ValueError(f"classes: the names {twice} are used twice")
        if self.palette is not None and len(self.palette) != len(self.classes):
            raise ValueError(
                f"palette: expected {len(self.classes)} colours, one for each class, got "
                f"{len(self.palette)}"
            )
        unknown = sorted({name for name in (self.ids or {}).values() if name} - names)
        if unknown:
            raise ValueError(f"ids: {unknown} are not among classes")
        both = sorted(set(self.ignore) & {n for n, c in self._class_of_number().items() if c < 255})
        if both:
            raise ValueError(
                f"ignore: the numbers {both} stand for classes too; take them out of ignore, or "
                "say with ids what each number stands for"
            )
        return self

    def label_values(self) -> dict[int, int]:
        """Class index of every number that may be in a label file, 255 for ignored."""
        return self._class_of_number() | dict.fromkeys(self.ignore, 255)

    def _class_of_number(self) -> dict[int, int]:
        index = {name: number for number, name in enumerate(self.classes)}
        if self.ids is None:
            return {number: number for number in index.values()}
        return {n: 255 if name is None else index[name] for n, name in self.ids.items()}


class FolderSplit(Model):
    """Where the files of one split are."""

    images: str
    """A folder, or a pattern such as ``images/train/**/*.jpg``; relative to ``root``."""
    labels: str


class FolderData(_LabelTable):
    """Any folders of images and labels of the same names."""

    type: Literal["folder"] = "folder"
    name: _Slug = "folder"
    """Part of the names of the map stores."""
    root: Path = Path()
    train: FolderSplit
    val: FolderSplit
    image_suffix: str = ""
    """What the images' names end with and the labels' do not, such as ``_leftImg8bit``."""
    label_suffix: str = ""
    """What the labels' names end with and the images' do not, such as ``_mask``."""
    label_format: Literal["numbers", "colours"] = "numbers"
    """``numbers``: greyscale of 8 or 16 bits, or palette images, whose indices count.
    ``colours``: each class has the colour that ``palette`` gives it."""
    ignore_colours: tuple[Colour, ...] = ()
    """Colours of pixels without a class, with ``label_format: colours``."""

    @model_validator(mode="after")
    def _colours_are_consistent(self) -> FolderData:
        if self.label_format == "numbers":
            if self.ignore_colours:
                raise ValueError("ignore_colours: goes with label_format: colours")
            return self
        if self.palette is None:
            raise ValueError("palette: label_format: colours needs the colour of each class")
        if self.ids is not None:
            raise ValueError("ids: goes with label_format: numbers; palette says what colours mean")
        colours = self.palette + self.ignore_colours
        twice = sorted({colour for colour in colours if colours.count(colour) > 1})
        if twice:
            raise ValueError(f"palette: the colours {[list(c) for c in twice]} are used twice")
        return self


class HuggingFaceData(_LabelTable):
    """A data set of the package ``datasets``: a name on the hub, or a folder."""

    type: Literal["huggingface"] = "huggingface"
    path: str
    """Name on the hub, a folder written by ``save_to_disk``, or one of Parquet or Arrow files."""
    subset: str | None = None
    """Configuration of the data set, where it has several."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    name: _Slug | None = None
    """Part of the names of the map stores; None takes the last part of ``path``."""
    train_split: str = "train"
    val_split: str = "validation"
    image: str = "image"
    """Column of the images."""
    label: str = "label"
    """Column of the labels, images too."""
    id: str | None = None
    """Column of the images' names, each its own; None takes the number of the row."""


DataConfig = Annotated[
    SyntheticData
    | CamVidData
    | CityscapesData
    | VOCData
    | ADE20KData
    | COCOStuffData
    | FolderData
    | HuggingFaceData,
    Field(discriminator="type"),
]


class AuxiliaryHead(Model):
    """FCN auxiliary head on an encoder stage (PSPNet, arXiv 1612.01105, section 3.3)."""

    stage: int = -2
    """Index into the encoder's feature pyramid; -2 is the second-last stage."""
    channels: Count | None = None
    """Hidden channels; a quarter of the stage's channels when not given."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1


def _head_or_switch(value: object) -> object:
    return ({} if value else None) if isinstance(value, bool) else value


RGB = tuple[float, float, float]
_IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
_IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


class SmpConfig(Model):
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
    auxiliary: Annotated[AuxiliaryHead | None, BeforeValidator(_head_or_switch)] = None
    """``true`` is the head with its defaults."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the architecture's constructor."""
    mean: RGB = _IMAGENET_MEAN
    """RGB mean of the input normalisation, images in [0, 1]."""
    std: RGB = _IMAGENET_STD
    """RGB standard deviation of the input normalisation."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return False


class TorchvisionConfig(Model):
    """A segmentation network of torchvision, with its own auxiliary classifier."""

    type: Literal["torchvision"] = "torchvision"
    architecture: str
    """Name of the builder, such as deeplabv3_resnet101 or lraspp_mobilenet_v3_large."""
    weights: str | None = None
    """Name of pretrained weights, such as COCO_WITH_VOC_LABELS_V1; downloaded on first use."""
    weights_backbone: str | None = None
    """Name of the backbone's pretrained weights, such as IMAGENET1K_V1, where ``weights`` is
    null."""
    auxiliary: bool = False
    """Whether there is torchvision's auxiliary classifier (``aux_loss``)."""
    mean: RGB = _IMAGENET_MEAN
    """RGB mean of the input normalisation, images in [0, 1]."""
    std: RGB = _IMAGENET_STD
    """RGB standard deviation of the input normalisation."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return self.weights is not None

    @model_validator(mode="after")
    def _weights_are_named_once(self) -> TorchvisionConfig:
        if self.weights is not None and self.weights_backbone is not None:
            raise ValueError("weights already hold the backbone; leave out weights_backbone")
        return self


class TransformersConfig(Model):
    """A segmentation network of Hugging Face transformers (extra ``huggingface``)."""

    type: Literal["transformers"] = "transformers"
    model: Annotated[str, Field(min_length=1)]
    """Local folder written by ``save_pretrained``, or a name on the hub."""
    pretrained: bool = True
    """False takes the architecture alone and starts from random weights."""
    auxiliary: bool = False
    """Whether to take the logits of the model's own auxiliary head."""
    ignore_mismatched_head: bool = False
    """Start the last layers from random weights where the model has other classes."""
    mean: RGB | None = None
    """RGB mean of the input normalisation, images in [0, 1]; None takes the model's."""
    std: RGB | None = None
    """RGB standard deviation of the input normalisation; None takes the model's."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return self.pretrained and not self.ignore_mismatched_head


class CustomConfig(Model):
    """A network that a function of the user's builds."""

    type: Literal["custom"] = "custom"
    factory: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
    """``package.module:function``; called with ``num_classes`` and ``options``."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the function."""
    auxiliary: bool = False
    """Whether to take the auxiliary logits that the network returns."""
    pretrained: bool = False
    """Whether the function returns a trained network, which can teach as it is."""
    divisor: Count = 32
    """The network is given images whose sides are multiples of this, in pixels."""
    mean: RGB = _IMAGENET_MEAN
    """RGB mean of the input normalisation, images in [0, 1]."""
    std: RGB = _IMAGENET_STD
    """RGB standard deviation of the input normalisation."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return self.pretrained


def _network_type(value: object) -> object:
    """The type of a network, as it stands in YAML or in a model; smp where none is named."""
    if isinstance(value, dict):
        return value.get("type", "smp")
    return getattr(value, "type", None)


NetworkConfig = Annotated[
    Annotated[SmpConfig, Tag("smp")]
    | Annotated[TorchvisionConfig, Tag("torchvision")]
    | Annotated[TransformersConfig, Tag("transformers")]
    | Annotated[CustomConfig, Tag("custom")],
    Discriminator(
        _network_type,
        custom_error_type="network_type",
        custom_error_message="expected keys and values with type: smp, torchvision, transformers "
        "or custom",
    ),
]


def without_pretrained(network: NetworkConfig) -> NetworkConfig:
    """The same network, its library's pretrained weights left out: for weights of one's own.

    A function of the user's is left as it is.
    """
    match network:
        case SmpConfig():
            return network.model_copy(update={"encoder_weights": None})
        case TorchvisionConfig():
            return network.model_copy(update={"weights": None, "weights_backbone": None})
        case TransformersConfig():
            return network.model_copy(update={"pretrained": False})
        case CustomConfig():
            return network


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


class StudentConfig(Model):
    """One student: its name, its method and what differs from the shared settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
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
    network: NetworkConfig | None = None
    """None takes ``student.network``."""
    training: TrainingConfig | None = None
    """None takes ``student.training``."""
    seed: int | None = None
    """None takes the run's seed; students with equal network and seed start from equal weights."""
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
        """Accept a bare method name as a student of that name."""
        if isinstance(value, str):
            return {"name": value, "method": value}
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
    def _sections_are_used(self) -> StudentConfig:
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


class StudentDefaults(Model):
    """What students share unless they say otherwise."""

    network: NetworkConfig
    training: TrainingConfig = TrainingConfig()


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
            stored = student.teacher == "stored"
            if stored and student.distils_logits and not self.maps.soft_labels:
                raise ValueError(
                    f"students: '{student.name}' distils logits, which needs maps.soft_labels: "
                    "true; kd.weight: 0 leaves out that of kd and rdd"
                )
        if self.maps.discrepancy == "heads" and not self.teacher.network.auxiliary:
            raise ValueError(
                "teacher.network.auxiliary: maps.discrepancy: heads compares a main and an "
                "auxiliary head, but this teacher has one head; add 'auxiliary: true' to its "
                "network if it is to be trained with one, or choose maps.discrepancy: flip, "
                "scales, entropy, margin or module:NAME"
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
    keys, _ = _locate(item["loc"])
    path = ".".join(str(part) for part in keys)
    if item["type"] == "extra_forbidden":
        _, models = _locate(item["loc"][:-1])
        valid = sorted({name for model in models for name in model.model_fields})
        near = difflib.get_close_matches(str(keys[-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
        return f"  {path}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        message = "required, but missing"
    elif not message.startswith(("give ", "expected ")) and not isinstance(item["input"], dict):
        message = f"{message}, got {item['input']!r}"
    return f"  {path}: {message}" if path else f"  {message}"


def _locate(
    location: tuple[int | str, ...],
) -> tuple[list[int | str], list[type[BaseModel]]]:
    """Keys of the file that a location of a validation error stands for, and the models there.

    A union's ``type`` stands in the location of an error but is no key of the file.
    """
    keys: list[int | str] = []
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        tagged = [
            model
            for model in models
            if "type" in model.model_fields and model.model_fields["type"].default == part
        ]
        if tagged and not fields:
            models = tagged
            continue
        keys.append(part)
        models = [m for field in fields for m in _models_in(field.annotation)] or models
    return keys, models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, Annotated):
        return [m for part in typing.get_args(annotation) for m in _models_in(part)]
    return []
