"""From a batch of the stream to the teacher's signals that the losses take."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rdd_pipeline.losses import TeacherSignals
from rdd_storage import true_prob_table


class SignalDecoder:
    """Decodes what the stream gives on the training device: codes by table, weights by sampling.

    Args:
        hardness_bits: Width of the store's hardness codes, 8 or 16; None when no store is read.
    """

    def __init__(self, hardness_bits: int | None) -> None:
        self._table = (
            None if hardness_bits is None else torch.tensor(true_prob_table(hardness_bits))
        )

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> TeacherSignals:
        """Decode what the batch holds of the teacher; see :class:`rdd_pipeline.stream.MapStream`.

        Returns:
            Signals on the batch's device; absent ones are None.
        """
        return TeacherSignals(
            weight=expand_weight(batch) if "weight_field" in batch else None,
            true_prob=self._true_prob(batch.get("true_prob_code")),
            aux_true_prob=self._true_prob(batch.get("aux_true_prob_code")),
            logits=batch.get("logits"),
            logits_valid=batch.get("logits_valid"),
        )

    def _true_prob(self, codes: torch.Tensor | None) -> torch.Tensor | None:
        if codes is None or self._table is None:
            return None
        if self._table.device != codes.device:
            self._table = self._table.to(codes.device)
        # Several times faster than indexing on the CPU.
        return self._table.index_select(0, codes.flatten().int()).view(codes.shape)


def expand_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight at each pixel: its field, sampled bilinearly at the crop's rows and columns.

    The same numbers as :func:`rdd_pipeline.data.geometry.resample_field`, made where they are
    used: the field is a hundredth of their size.

    Args:
        batch: ``weight_field``, ``weight_rows`` and ``weight_columns`` of
            :class:`rdd_pipeline.stream.MapStream`.

    Returns:
        float32 (B, H, W); 1 in the padding.
    """
    rows_BH, columns_BW = batch["weight_rows"], batch["weight_columns"]
    mixed_BHw = _sample(batch["weight_field"], rows_BH.clamp(min=0)[:, :, None], dim=1)
    weight_BHW = _sample(mixed_BHw, columns_BW.clamp(min=0)[:, None, :], dim=2)
    padding_BHW = (rows_BH < 0)[:, :, None] | (columns_BW < 0)[:, None, :]
    return weight_BHW.masked_fill_(padding_BHW, 1.0)


def _sample(field: torch.Tensor, places: torch.Tensor, dim: int) -> torch.Tensor:
    """Mix the neighbours of each place along one dimension; ``places`` has size 1 in the other."""
    size = [-1, -1, -1]
    size[3 - dim] = field.shape[3 - dim]
    lower = places.long()
    share = (places - lower).float()
    # Past the last value only where its share is 0.
    upper = (lower + 1).clamp_(max=field.shape[dim] - 1)
    low = field.gather(dim, lower.expand(size))
    high = field.gather(dim, upper.expand(size))
    return low.add_(high.sub_(low).mul_(share))
