"""Sections that name a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from rdd_pipeline.config._base import Count, Model
from rdd_storage import LocationError
from rdd_storage.location import locate


class _Data(Model):
    """What every data set has. Neither setting changes what is read, and so no result."""

    packed: Literal["auto", "never", "always"] = "auto"
    """Whether images are read from a pack, which ``rdd data pack`` makes, instead of their files.
    ``auto``: where there is one, those that it has as they are now. ``always``: fail where it has
    not all."""
    packed_root: str = "packed"
    """Folder or URL that holds the packs."""


def _root(value: object) -> Path | str:
    """A path, or the text of an object store's URL, which no path can hold."""
    if not isinstance(value, str | Path):
        raise ValueError("expected a folder, or a URL such as s3://bucket/path")
    try:
        url = locate(value).url
    except LocationError as error:  # the message keeps silent about passwords; so does this
        raise ValueError(f"expected a folder or URL: {error}") from None
    return str(value) if "://" in url else Path(url)


_Root = Annotated[Path | str, PlainValidator(_root, json_schema_input_type=str)]


class _Files(_Data):
    """What data sets of files have."""

    read_all: bool = False
    """Whether every file is read to see whether it has changed and is in order. By default those
    are not whose size and times, or in object stores ETag, are those that an earlier run found."""


class SyntheticData(_Data):
    """Street-like scenes drawn by the program: no download, the same for the same seed."""

    type: Literal["synthetic"] = "synthetic"
    train_images: Count = 240
    val_images: Count = 60
    height: Annotated[int, Field(ge=32)] = 128
    width: Annotated[int, Field(ge=32)] = 192
    seed: int = 0
    """Seed of the scenes; independent of the training seed."""


class CamVidData(_Files):
    """CamVid in the SegNet layout: ``train``, ``trainannot``, ``val``, ``valannot`` folders."""

    type: Literal["camvid"] = "camvid"
    root: _Root
    """Folder, or URL in an object store, that holds the four folders."""
    train_split: str = "train"
    val_split: str = "val"


class CityscapesData(_Files):
    """Cityscapes with fine labels: folders ``leftImg8bit`` and ``gtFine``; 19 classes."""

    type: Literal["cityscapes"] = "cityscapes"
    root: _Root
    train_split: str = "train"
    val_split: str = "val"


class VOCData(_Files):
    """Pascal VOC 2012, augmented with the Semantic Boundaries Dataset; 21 classes."""

    type: Literal["voc"] = "voc"
    root: _Root
    """The folder ``VOCdevkit/VOC2012``."""
    train_split: str = "train_aug"
    """A list in ``ImageSets/Segmentation``. Names that end with ``aug`` take their labels from
    ``SegmentationClassAug``, others from ``SegmentationClass``."""
    val_split: str = "val"


class ADE20KData(_Files):
    """ADE20K scene parsing, the folder ``ADEChallengeData2016``; 150 classes."""

    type: Literal["ade20k"] = "ade20k"
    root: _Root
    train_split: str = "training"
    val_split: str = "validation"


class COCOStuffData(_Files):
    """COCO-Stuff 164k: ``images`` and the stuff-and-thing maps; 171 classes."""

    type: Literal["cocostuff"] = "cocostuff"
    root: _Root
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


class _LabelTable(_Data):
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
    """A folder, or a pattern such as ``images/train/**/*.jpg``; relative to ``root``, or a whole
    path or URL."""
    labels: str


class FolderData(_Files, _LabelTable):
    """Any folders of images and labels of the same names."""

    type: Literal["folder"] = "folder"
    name: _Slug = "folder"
    """Part of the names of the map stores."""
    root: _Root = Path()
    """Folder, or URL in an object store, in which relative folders begin."""
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
