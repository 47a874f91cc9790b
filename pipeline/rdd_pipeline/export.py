"""A trained network to take away: a folder that loads in one line, ONNX, and pictures.

    model = load_trained("runs/quickstart/students/rdd")

Shape suffixes: B batch, C classes, H W image pixels.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from rdd_pipeline.config import NetworkConfig, without_pretrained
from rdd_pipeline.data import SegmentationDataset
from rdd_pipeline.data.reading import read_image
from rdd_pipeline.errors import CheckpointError, DataError
from rdd_pipeline.files import read_json, write_atomically, write_json
from rdd_pipeline.networks import SegmentationNetwork, build_network, load_weights

WEIGHTS_FILE = "weights.safetensors"
DESCRIPTION_FILE = "network.json"
_FORMAT = 1
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A network with its weights and what its classes are called."""

    network: SegmentationNetwork
    """In evaluation mode."""
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB colour of each class."""

    @torch.inference_mode()
    def predict(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class of each pixel of one image.

        Args:
            image: RGB uint8 (H, W, 3), any size.

        Returns:
            uint8 (H, W), indices into ``class_names``.
        """
        device = self.network.mean.device
        batch = torch.from_numpy(np.array(image)).to(device)  # a copy: images may be read-only
        logits_BCHW = _full_size(self.network, batch.permute(2, 0, 1).unsqueeze(0))
        prediction: NDArray[np.uint8] = logits_BCHW[0].argmax(0).to(torch.uint8).cpu().numpy()
        return prediction


def describe_network(directory: Path, network: NetworkConfig, dataset: SegmentationDataset) -> None:
    """Write beside a network's weights what is needed to build it again."""
    write_json(
        directory / DESCRIPTION_FILE,
        {
            "format": _FORMAT,
            # Weights are in the folder: pretrained ones need not be downloaded again.
            "network": without_pretrained(network).model_dump(mode="json"),
            "class_names": list(dataset.class_names),
            "palette": [list(colour) for colour in dataset.palette],
        },
    )


def load_trained(folder: str | Path, device: str | torch.device = "cpu") -> TrainedModel:
    """Load a network from the folder that its training left, or that ``rdd export`` wrote.

    Args:
        folder: Such as ``runs/NAME/students/STUDENT``.
        device: Where the network is put.

    Raises:
        CheckpointError: A file is missing or damaged, or the weights do not fit.
        NetworkError: The network cannot be built with the libraries installed.
    """
    folder = Path(folder)
    description, weights = folder / DESCRIPTION_FILE, folder / WEIGHTS_FILE
    for path in (description, weights):
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing; give the folder of a finished training, such as "
                "runs/NAME/students/STUDENT"
            )
    tree = read_json(description)
    if tree.get("format") != _FORMAT:
        raise CheckpointError(
            f"{description}: expected format {_FORMAT}, got {tree.get('format')!r}; it was "
            "written by another version of rdd-maps"
        )
    try:
        config: NetworkConfig = TypeAdapter(NetworkConfig).validate_python(tree["network"])
        names = tuple(map(str, tree["class_names"]))
        palette = tuple((int(r), int(g), int(b)) for r, g, b in tree["palette"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{description}: damaged ({error}); export it again") from error
    network = build_network(config, len(names))
    load_weights(network, weights)
    return TrainedModel(network=network.to(device).eval(), class_names=names, palette=palette)


def export_folder(source: Path, target: Path) -> Path:
    """Copy a finished network's weights and description; returns the new folder.

    Raises:
        CheckpointError: The source is no finished network.
    """
    load_trained(source)  # nothing is handed on that does not load
    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        write_atomically(target / name, functools.partial(shutil.copyfile, source / name))
    return target


class _Deployed(nn.Module):
    """RGB images in [0, 1] to logits at their size: what leaves as ONNX."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return _full_size(self.network, images)


def export_onnx(model: TrainedModel, path: Path, size: tuple[int, int]) -> float:
    """Write the network as ONNX and check it against torch.

    Input ``images``: float32 (B, 3, H, W), RGB in [0, 1], normalised inside. Output ``logits``:
    float32 (B, C, H, W). The batch is free, H and W are fixed.

    Args:
        model: What to export; on the CPU.
        path: File to write.
        size: H and W.

    Returns:
        Largest difference of a logit from torch's, over two random images.

    Raises:
        CheckpointError: onnx or onnxruntime is not installed, or the network cannot be exported.
    """
    try:
        import onnx  # noqa: F401  torch.onnx needs it and would say so less clearly
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"ONNX needs {error.name}; install it with: pip install 'rdd-maps[onnx]'"
        ) from error
    deployed = _Deployed(model.network).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator)

    def write(temporary: Path) -> None:
        with warnings.catch_warnings():
            # The exporter's own code is not yet free of what torch deprecates.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(
                deployed,
                (images,),
                str(temporary),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )

    try:
        write_atomically(path, write)
    except Exception as error:  # torch's exporter raises many kinds
        raise CheckpointError(f"{path}: the network cannot be exported to ONNX: {error}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    for batch in (images, images[:1]):
        with torch.inference_mode():
            expected = deployed(batch).numpy()
        [found] = session.run(None, {"images": batch.numpy()})
        difference = max(difference, float(np.abs(expected - found).max()))
    return difference


def image_files(source: Path) -> list[Path]:
    """The image files of a folder, subfolders included, in order; or the one file.

    Raises:
        DataError: There are none.
    """
    if source.is_file():
        return [source]
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(
            f"{source}: no images; give an image or a folder with "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    return files


def predict_folder(
    model: TrainedModel,
    source: Path,
    target: Path,
    *,
    opacity: float = 0.5,
    labels: bool = False,
) -> Iterator[Path]:
    """Write the predictions of a folder's images as pictures, one at a time.

    Args:
        model: What predicts.
        source: An image, or a folder that is searched with its subfolders.
        target: Folder of the pictures; subfolders are kept.
        opacity: Of the class colours over the image, 0 to 1.
        labels: Write class indices (palette PNG) instead of overlays.

    Yields:
        Each file written.

    Raises:
        DataError: There are no images, or two would be written under one name.
        ImageReadError: An image cannot be read.
    """
    files = image_files(source)
    base = source.parent if source.is_file() else source
    targets = [target / path.relative_to(base).with_suffix(".png") for path in files]
    twice = [str(path) for path, count in Counter(targets).items() if count > 1]
    if twice:
        raise DataError(
            f"{source}: images that differ in their suffix alone would both become "
            f"{', '.join(sorted(twice)[:5])}; rename them, or predict them one by one"
        )
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(model.palette)] = np.asarray(model.palette, np.uint8)
    for path, written in zip(files, targets, strict=True):
        image = read_image(path)
        prediction = model.predict(image)
        if labels:
            picture = Image.fromarray(prediction)
            picture.putpalette(colours.tobytes())
        else:
            mixed = (1.0 - opacity) * image + opacity * colours[prediction]
            picture = Image.fromarray(np.rint(mixed).astype(np.uint8))
        write_atomically(written, functools.partial(picture.save, format="PNG"))
        yield written


def _full_size(network: SegmentationNetwork, images: Tensor) -> Tensor:
    logits = network(images).main.float()
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)
