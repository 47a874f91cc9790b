"""Segmentation networks of Hugging Face transformers, as logits per pixel.

Shape suffixes: B batch, Q queries, C classes, h w the grid of the logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before anything that needs torchvision
from rdd_pipeline.config import RGB, TransformersConfig
from rdd_pipeline.errors import CheckpointError, NetworkError
from rdd_pipeline.networks.base import SegLogits, SegmentationNetwork, first_line, remove_upsampling

_IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PLAIN: tuple[RGB, RGB] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# What of a folder's config.json does not decide the logits of given weights.
_NO_PART_OF_THE_NETWORK = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
     "id2label", "label2id", "num_labels"}
)  # fmt: skip

# Ends of the names of what counts classes, over the supported families; networks of masks keep
# the weights of their own loss's classes beside it.
_CLASSIFIERS = (
    "classifier.weight", "classifier.bias",
    "classifier.convolution.weight", "classifier.convolution.bias",
    "head.head.4.weight", "head.head.4.bias",
    "class_predictor.weight", "class_predictor.bias", "class_embed.weight", "class_embed.bias",
    "criterion.empty_weight",
)  # fmt: skip

_MINIMUM = 1e-6
"""Smallest class probability of a network of masks, so that its logarithm is finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How a model wants its images, besides their size."""

    mean: RGB
    std: RGB
    bgr: bool
    """Whether the channels come in the order blue, green, red."""


class TransformersNetwork(SegmentationNetwork):
    """A segmentation model of transformers, its final upsampling left out.

    Networks that predict masks (MaskFormer, Mask2Former, OneFormer) give each pixel the sum over
    queries of class probability times mask probability (arXiv 2107.06278, section 3.4), the class
    for no object left out; its logarithm, at least ln 1e-6, is taken as logits. Their softmax is
    that sum, normalised over the classes.

    In the state dict the model's own names follow ``network.``.
    """

    name_prefix = "network."
    task_tokens: Tensor

    def __init__(
        self,
        model: Any,
        config: TransformersConfig,
        num_classes: int,
        preprocessing: Preprocessing,
        task_tokens: Tensor | None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            divisor=_divisor(model.config),
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
        self.network = model
        self._bgr = preprocessing.bgr
        self._auxiliary = config.auxiliary
        if isinstance(getattr(model, "head", None), nn.Module):  # DPT
            remove_upsampling(model.head)
        self._has_task = task_tokens is not None
        tokens = torch.zeros(0) if task_tokens is None else task_tokens
        self.register_buffer("task_tokens", tokens, persistent=False)
        self._any_size = model.config.model_type in ("beit", "data2vec-vision")
        self.measure()

    @property
    def has_aux(self) -> bool:
        """Whether the logits of the model's auxiliary head are taken."""
        return self._auxiliary

    @property
    def encoder_module(self) -> nn.Module:
        """The backbone, or the base model where that has no decoder in it."""
        for name in ("backbone", "model.pixel_level_module.encoder"):
            try:
                module: nn.Module = self.network.get_submodule(name)
            except AttributeError:
                continue
            return module
        base: nn.Module = self.network.base_model
        return base

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """What counts classes, of which a network of masks has one more."""
        counts = (self.num_classes, self.num_classes + 1)
        return tuple(
            name
            for name, tensor in self.state_dict().items()
            if name.endswith(_CLASSIFIERS) and tensor.shape[0] in counts
        )

    def raw_logits(self, x: Tensor) -> SegLogits:
        """Logits of both heads at the strides they work at."""
        if self._bgr:
            x = x.flip(1)
        if self.network.config.model_type == "upernet":  # whose forward resizes to the image
            features = self.network.backbone(x).feature_maps
            main: Tensor = self.network.decode_head(features)
            aux = self.network.auxiliary_head(features) if self._auxiliary else None
            return SegLogits(main, aux)
        arguments: dict[str, Any] = {}
        if self._has_task:
            arguments["task_inputs"] = self.task_tokens.expand(len(x), -1)
        if self._any_size:
            arguments["interpolate_pos_encoding"] = True
        with self._hooked(x) as taken:
            output = self.network(pixel_values=x, return_dict=True, **arguments)
        main = (
            _masks_to_logits(output.class_queries_logits, output.masks_queries_logits)
            if hasattr(output, "class_queries_logits")
            else output.logits
        )
        return SegLogits(main, taken[0] if self._auxiliary else None)

    def read_folder(self, folder: Path) -> dict[str, Tensor]:
        """The weights in a folder written by ``save_pretrained``, as the library reads it.

        Raises:
            CheckpointError: The folder is no model of this kind, or damaged.
        """
        kind = type(self.network)
        try:
            library_config = kind.config_class.from_pretrained(folder)
            model, info = _from_pretrained(kind, str(folder), library_config, lenient=False)
        # The library raises many types for damaged or incomplete folders.
        except Exception as error:
            raise CheckpointError(
                f"{folder}: expected a folder of {kind.__name__} written by save_pretrained "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        missing = set(info["missing_keys"])
        return {
            self.name_prefix + name: tensor
            for name, tensor in model.state_dict().items()
            if name not in missing
        }

    @contextmanager
    def _hooked(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Gather what the auxiliary head gives within the block; the model keeps it to itself.

        DPT's neck is told the grid of patches, without which it takes images for square.
        """
        taken: list[Tensor] = []
        handles = []

        def take(module: nn.Module, inputs: Any, output: Tensor) -> None:
            taken.append(output)

        def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            height, width = (side // self.network.config.patch_size for side in x.shape[-2:])
            return args, kwargs | {"patch_height": height, "patch_width": width}

        if self._auxiliary:
            handles.append(self.network.auxiliary_head.register_forward_hook(take))
        if self.network.config.model_type == "dpt":
            neck = self.network.neck
            handles.append(neck.register_forward_pre_hook(tell, with_kwargs=True))
        try:
            yield taken
        finally:
            for handle in handles:
                handle.remove()


def build_transformers(config: TransformersConfig, num_classes: int) -> TransformersNetwork:
    """Build a segmentation model of transformers from a local folder or the hub.

    Raises:
        NetworkError: transformers is not installed; the folder or name cannot be read, is no
            semantic segmentation, has another number of classes, or has no auxiliary head.
    """
    where = f"network.model '{config.model}'"
    library_config = _library_config(config, where)
    kind = _model_class(library_config, where)
    if config.auxiliary and not getattr(library_config, "use_auxiliary_head", False):
        raise NetworkError(
            f"network.auxiliary: {kind.__name__} of {config.model} has one head; UPerNet, BEiT, "
            "Data2Vec and DPT have a second one where their use_auxiliary_head says so. Leave "
            "auxiliary out, and choose maps.discrepancy: flip, scales, entropy, margin or "
            "module:NAME for a teacher"
        )
    found = library_config.num_labels
    if config.pretrained and found != num_classes and not config.ignore_mismatched_head:
        raise NetworkError(
            f"{where}: has {found} classes, the data set has {num_classes}; use a model trained "
            "on these classes, or set ignore_mismatched_head: true to start its last layers from "
            "random weights and train it"
        )
    if found != num_classes:
        library_config.num_labels = num_classes
    library_config.is_training = False  # OneFormer's text branch, which only its own loss needs
    preprocessing = preprocessing_of(config)
    tokens = _task_tokens(config, where) if library_config.model_type == "oneformer" else None
    try:
        if config.pretrained:
            model, info = _from_pretrained(
                kind, config.model, library_config, lenient=config.ignore_mismatched_head
            )
            whole = not info["missing_keys"] and not info["mismatched_keys"]
        else:
            model, whole = kind(library_config), False
    # The library and the hub raise many types for what is missing, damaged or contradictory.
    except Exception as error:
        raise NetworkError(
            f"{where}: {kind.__name__} cannot be built ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    try:
        network = TransformersNetwork(model.train(), config, num_classes, preprocessing, tokens)
    except NetworkError as error:
        raise NetworkError(f"{where}: {error}") from error.__cause__
    network.pretrained_whole = whole
    return network


def transformers_identity(config: TransformersConfig) -> dict[str, Any]:
    """What decides the logits of given weights, wherever the model's folder is.

    Raises:
        NetworkError: The folder or name cannot be read.
    """
    described = _read_json(config, "config.json")
    if described is None:
        raise NetworkError(f"network.model '{config.model}': there is no config.json")
    kept = {key: value for key, value in described.items() if key not in _NO_PART_OF_THE_NETWORK}
    preprocessing = preprocessing_of(config)
    return {
        "type": config.type,
        "config": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
        "auxiliary": config.auxiliary,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "bgr": preprocessing.bgr,
    }


def preprocessing_of(config: TransformersConfig) -> Preprocessing:
    """The input normalisation: the configuration's, else the model's own, else ImageNet's.

    Raises:
        NetworkError: The model's preprocessing is none that images in [0, 1] can be given.
    """
    described = _read_json(config, "preprocessor_config.json")
    if described is None:
        described = (_read_json(config, "processor_config.json") or {}).get("image_processor", {})
    bgr = bool(described.get("do_flip_channel_order", False))
    # MobileViT's processor, the one that flips channels, does not normalise.
    plain = described.get("do_normalize", not bgr) is False
    mean, std = _PLAIN if plain else _IMAGENET
    if not plain:
        mean = _rgb(described.get("image_mean", mean))
        std = _rgb(described.get("image_std", std))
    scale = described.get("rescale_factor", 1 / 255)
    unusual = described.get("do_rescale", True) is False or abs(255 * scale - 1) > 1e-3
    if unusual and (config.mean is None or config.std is None):
        raise NetworkError(
            f"network.model '{config.model}': expected a preprocessor that divides by 255, got "
            f"rescale_factor {scale}; give network.mean and network.std for images in [0, 1]"
        )
    return Preprocessing(mean=config.mean or mean, std=config.std or std, bgr=bgr)


def _masks_to_logits(classes_BQC: Tensor, masks_BQhw: Tensor) -> Tensor:
    """(B, C, h, w) logits; ``classes_BQC`` has one class more, for no object."""
    with torch.autocast(masks_BQhw.device.type, enabled=False):
        of_class = classes_BQC.float().softmax(dim=-1)[..., :-1]
        of_mask = masks_BQhw.float().sigmoid()
        summed = torch.einsum("bqc,bqhw->bchw", of_class, of_mask)
        return summed.clamp_min(_MINIMUM).log()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NetworkError(
            "network.type: transformers needs the package transformers, which is not installed; "
            "pip install 'rdd-maps[huggingface]'"
        ) from error
    return transformers


def _library_config(config: TransformersConfig, where: str) -> Any:
    library = _library()
    looks_local = config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    if looks_local and not Path(config.model).is_dir():
        raise NetworkError(f"{where}: there is no such folder")
    try:
        return library.AutoConfig.from_pretrained(config.model)
    except Exception as error:  # of many types: no file, no connection, no such model
        raise NetworkError(
            f"{where}: its config.json cannot be read ({type(error).__name__}: "
            f"{first_line(error)}); give a folder written by save_pretrained, or a name on the "
            "hub, which is downloaded on first use"
        ) from error


def _model_class(library_config: Any, where: str) -> Any:
    library = _library()
    for mapping in (
        library.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
        library.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    ):
        if type(library_config) in mapping:
            return mapping[type(library_config)]
    raise NetworkError(
        f"{where}: '{library_config.model_type}' is no architecture for semantic segmentation; "
        "SegFormer, UPerNet, Mask2Former, MaskFormer, OneFormer, BEiT, DPT, MobileViT and "
        "MobileNetV2 are some"
    )


def _from_pretrained(
    kind: Any, name: str, library_config: Any, *, lenient: bool
) -> tuple[Any, dict[str, Any]]:
    """The model, in float32, and what the library says of its loading."""
    with _quiet():
        model, info = kind.from_pretrained(
            name,
            config=library_config,
            dtype=torch.float32,
            ignore_mismatched_sizes=lenient,
            output_loading_info=True,
        )
    return model, info


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own report and progress bar of loading to itself: we say what matters."""
    logs = _library().utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _task_tokens(config: TransformersConfig, where: str) -> Tensor:
    """The words that ask OneFormer for semantic segmentation, as token ids (1, length)."""
    # Without its files the library makes up a tokenizer that knows no words.
    if _read_json(config, "tokenizer.json") is None and _read_json(config, "vocab.json") is None:
        raise NetworkError(
            f"{where}: OneFormer is told its task in words, but there is no tokenizer (tokenizer."
            "json or vocab.json); save the model's processor beside it"
        )
    try:
        tokenizer = _library().AutoTokenizer.from_pretrained(config.model)
        length = (_read_json(config, "processor_config.json") or {}).get("task_seq_length", 77)
        tokens = tokenizer(
            ["the task is semantic"], padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
    except Exception as error:  # of many types
        raise NetworkError(
            f"{where}: OneFormer is told its task in words, but the tokenizer cannot be read "
            f"({type(error).__name__}: {first_line(error)}); save the model's processor beside it"
        ) from error
    ids: Tensor = tokens["input_ids"] * tokens["attention_mask"]
    return ids


def _read_json(config: TransformersConfig, name: str) -> dict[str, Any] | None:
    """A file of the model; None where it has no such file."""
    where = f"network.model '{config.model}'"
    try:
        path = _library().utils.cached_file(
            config.model, name, _raise_exceptions_for_missing_entries=False
        )
        content = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NetworkError(f"{where}: {name} cannot be read ({first_line(error)})") from error
    if content is not None and not isinstance(content, dict):
        raise NetworkError(f"{where}: {name}: expected keys and values")
    return content


def _divisor(library_config: Any) -> int:
    """Multiples to begin with; :meth:`SegmentationNetwork.measure` finds whether they suffice."""
    patch = getattr(library_config, "patch_size", None)
    # Vision transformers need whole patches, and their coarsest features pairs of them. MobileViT's
    # patch is one of features.
    return 2 * patch if isinstance(patch, int) and patch >= 8 else 32


def _rgb(values: Any) -> RGB:
    first, second, third = (float(value) for value in values)
    return first, second, third
