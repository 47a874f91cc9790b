"""From a batch of the stream to the teacher's signals that the losses take."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rdd_pipeline.losses import TeacherSignals
from rdd_storage import true_prob_table


class SignalDecoder:
    """Decodes stored codes on the training device, by lookup table.

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
            weight=batch.get("weight"),
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
        return self._table[codes.int()]
