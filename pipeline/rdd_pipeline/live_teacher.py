"""The teacher in memory beside the student: evaluated on every augmented crop.

The published code trains so throughout. Here it is the reference against which stored maps are
judged (``teacher: online``), and what methods that compare features need.

Shape suffixes: B batch, C classes, H W the crop's pixels, h w the student's output grid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.difficulty import tfe_weight, true_class_probability
from rdd_pipeline.features import FeatureTaps
from rdd_pipeline.losses import TeacherSignals
from rdd_pipeline.networks import SegmentationNetwork
from rdd_pipeline.signals import SignalDecoder
from rdd_pipeline.stream import Need
from rdd_pipeline.teacher_views import TeacherViews, autocast


class LiveTeacher:
    """Turns a batch of crops into the teacher's signals by running the teacher on it.

    What ``needs`` does not name is decoded from the stored maps in the batch, where there are any.

    Args:
        views: The teacher, and how its discrepancy is obtained.
        needs: Signals to compute on the crop; empty where features alone are asked for.
        grid_size: The student's output grid for a crop; logits are brought to it.
        taps: Names of the features to take, see :class:`rdd_pipeline.features.FeatureTaps`.
        precision: ``no``, ``bf16`` or ``fp16``: autocast of the teacher's forward pass.
        decoder: Decodes stored signals; None where no store is read.

    Raises:
        NetworkError: A tap is no module of the teacher.
    """

    def __init__(
        self,
        views: TeacherViews,
        *,
        needs: Collection[Need],
        grid_size: tuple[int, int],
        taps: Sequence[str] = (),
        precision: str = "no",
        decoder: SignalDecoder | None = None,
    ) -> None:
        self.views = views
        self.network: SegmentationNetwork = views.network.eval().requires_grad_(False)
        self.needs = frozenset(needs)
        self.grid_size = grid_size
        self.precision = precision
        self.decoder = decoder or SignalDecoder(None)
        self._taps = FeatureTaps(self.network, taps)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignals:
        """Run the teacher on ``batch["image"]``; see :class:`rdd_pipeline.stream.MapStream`.

        Returns:
            Signals on the batch's device. The teacher's crop is the student's; its padding is
            marked in ``logits_valid`` and ignored in ``true_prob`` as in stored maps.
        """
        images_B3HW, labels_BHW = batch["image"], batch["label"]
        if self.network.mean.device != images_B3HW.device:
            self.network.to(images_B3HW.device)
        signals = self.decoder(batch)
        with self._taps.recording() as found, autocast(images_B3HW.device, self.precision):
            if "weight" in self.needs:
                outputs = self.views(images_B3HW)
                main, aux = outputs.main, outputs.aux
                size = (labels_BHW.shape[1], labels_BHW.shape[2])
                signals = replace(signals, weight=tfe_weight(outputs.discrepancy, size))
            else:
                main, aux = self.network(images_B3HW)
        if "true_prob" in self.needs:
            signals = replace(signals, true_prob=true_class_probability(main, labels_BHW))
        if "aux_true_prob" in self.needs and aux is not None:
            signals = replace(signals, aux_true_prob=true_class_probability(aux, labels_BHW))
        if "logits" in self.needs:
            logits = F.interpolate(
                main.float(), self.grid_size, mode="bilinear", align_corners=True
            )
            signals = replace(signals, logits=logits, logits_valid=batch.get("logits_valid"))
        return replace(signals, features=self._taps.in_order(found))
