"""Attention over a report: the rows of keys that an index found, and their values.

Weights are ReLU(scale * score - b)^power, or exp(scale * score), normalised in each row. A report
holds the scores, rounded to float32; where scores lie within a few roundings of the threshold, as
on keys that differ little, give the queries and keys, and the pairs are scored again in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hsr_attention import arguments
from hsr_attention.report import Report


def relu_rows(
    report: Report,
    values: ArrayLike,
    *,
    threshold: ArrayLike,
    power: int = 1,
    scale: float = 1.0,
    queries: ArrayLike | None = None,
    keys: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """ReLU^power attention from a report (paper, Definition 1.2); a row without weight is zero.

    out_i = sum_j w_ij v_j / sum_j w_ij with w_ij = max(scale * score_ij - b_i, 0)^power. Equal to
    dense attention when the report holds every key with scale * score > b.

    Parameters
    ----------
    report : Report
        m rows; scores are <q, k>, without ``scale``.
    values : [n, value_dim]
        By key id.
    threshold : number or [m]
        b, in logit units.
    power : int >= 1
        alpha of the paper.
    scale : float
        Of the scores. Not 1 / sqrt(head_dim) by default: a report does not know head_dim.
    queries, keys : [m, head_dim], [n, head_dim], optional
        Score the reported pairs again, in float64.
    """
    power = arguments.positive_integer("power", power)
    limits = arguments.thresholds(threshold, len(report))
    logits = scale * _scores(report, queries, keys)
    weights = np.maximum(logits - np.repeat(limits, report.counts), 0.0) ** power
    return _average(report, weights, values)


def softmax_rows(
    report: Report,
    values: ArrayLike,
    *,
    scale: float = 1.0,
    queries: ArrayLike | None = None,
    keys: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """Softmax attention restricted to a report's keys (paper, section 1); an empty row is zero.

    out_i = sum_j w_ij v_j / sum_j w_ij with w_ij = exp(scale * score_ij) over the reported j.
    Arguments as in ``relu_rows``.
    """
    logits = scale * _scores(report, queries, keys)
    filled = report.counts > 0
    largest = np.zeros(len(report))
    if len(logits):
        largest[filled] = np.maximum.reduceat(logits, report.indptr[:-1][filled])
    return _average(report, np.exp(logits - np.repeat(largest, report.counts)), values)


def _scores(
    report: Report, queries: ArrayLike | None, keys: ArrayLike | None
) -> NDArray[np.float64]:
    """Return the score of each reported pair, float64 [nnz]."""
    if queries is None or keys is None:
        return report.scores.astype(np.float64)
    q = arguments.matrix("queries", queries).to_float32().astype(np.float64)
    k = arguments.matrix("keys", keys, q.shape[1]).to_float32()
    rows = np.repeat(np.arange(len(report)), report.counts)
    return np.einsum("nd,nd->n", q[rows], k[report.indices])


def _average(
    report: Report, weights: NDArray[np.float64], values: ArrayLike
) -> NDArray[np.float32]:
    """Return sum_j w_ij v_j / sum_j w_ij, [m, value_dim]; the sums are taken in float64."""
    rows = arguments.matrix("values", values).to_float32()
    if len(report.indices) and report.indices.max() >= len(rows):
        raise ValueError(f"values must have a row for key {report.indices.max()}, got {len(rows)}")
    out = np.zeros((len(report), rows.shape[1]), np.float32)
    for i, (indices, _) in enumerate(report):
        part = weights[report.indptr[i] : report.indptr[i + 1]]
        total = part.sum()
        if total > 0:
            out[i] = (part @ rows[indices]) / total
    return out
