"""Collation that takes the features of a batch as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trackastra.data import collate_sequence_padding

from ..batch import Batch


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Do what Trackastra's ``collate_sequence_padding`` does, without copying features.

    The features of samples that were read as a batch (by ``__getitems__``, as a DataLoader reads
    them) lie in one padded tensor already: it is what the batch gets. All else is Trackastra's own.

    Parameters
    ----------
    samples : sequence of dict

    Returns
    -------
    dict
        Of tensors (B, N, ...), equal to those of ``collate_sequence_padding``.
    """
    features = samples.features if isinstance(samples, Batch) else None
    if features is None:
        return dict(collate_sequence_padding(samples))
    others = [{k: v for k, v in sample.items() if k != "pretrained_feats"} for sample in samples]
    return {**collate_sequence_padding(others), "pretrained_feats": features}
