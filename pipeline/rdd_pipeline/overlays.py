"""A network's predictions as pictures, to look at while it is trained.

Shape suffixes: B batch, C classes, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from rdd_pipeline.data import IGNORE_INDEX, SegmentationDataset
from rdd_pipeline.difficulty import true_class_probability
from rdd_pipeline.evaluate import stack_images
from rdd_pipeline.networks import SegmentationNetwork

_WIDTH = 320  # pixels of each picture of a row
_GAP = 4


@torch.no_grad()
def overlay_pictures(
    network: SegmentationNetwork, dataset: SegmentationDataset, count: int, device: torch.device
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Rows of image, label, prediction and the network's own hardness ``sqrt(1 - p_true)``.

    Always the same images, spread evenly over the data set, each at full resolution and shrunk
    afterwards. The network's train/eval mode is restored.

    Args:
        network: On ``device``.
        dataset: Images and labels; its palette colours classes.
        count: Images, or all where there are fewer.
        device: Where the network is.

    Yields:
        The image's id, and an RGB picture (H, W, 3).
    """
    # matplotlib takes a second to import, and the processes of a loader need none.
    from rdd_pipeline.inspection.pictures import class_picture, scale_picture

    palette = np.array(dataset.palette, np.uint8)
    training = network.training
    network.eval()
    try:
        for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
            sample = dataset[int(index)]
            images_B3HW = stack_images([sample], device)
            label_BHW = torch.from_numpy(np.array(sample.label))[None].to(device)
            logits_BChw = network(images_B3HW).main.float()
            logits_BCHW = F.interpolate(
                logits_BChw, images_B3HW.shape[-2:], mode="bilinear", align_corners=True
            )
            hardness_HW = (1 - true_class_probability(logits_BChw, label_BHW)[0]).sqrt()
            hardness_HW[label_BHW[0] == IGNORE_INDEX] = float("nan")
            prediction_HW = logits_BCHW[0].argmax(0).to(torch.uint8).cpu().numpy()
            parts = [
                _shrunk(sample.image, Image.Resampling.LANCZOS),
                _shrunk(class_picture(sample.label, palette), Image.Resampling.NEAREST),
                _shrunk(class_picture(prediction_HW, palette), Image.Resampling.NEAREST),
                _shrunk(scale_picture(hardness_HW.cpu().numpy()), Image.Resampling.NEAREST),
            ]
            yield sample.image_id, _row(parts)
    finally:
        network.train(training)


def _shrunk(picture: NDArray[np.uint8], how: Image.Resampling) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    scale = min(1.0, _WIDTH / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, how))


def _row(parts: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    gap = np.full((parts[0].shape[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis=1)
