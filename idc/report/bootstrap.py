"""Percentile bootstrap over videos, for the means of metrics and for weighted sums of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
# Draws are made in pieces of about this many counts, so that a hundred thousand videos fit in memory, too.
COUNTS_AT_ONCE = 4_000_000


def resampled_means(values_VM: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means over videos drawn with replacement, all metrics of a video together.

    Args:
        values_VM: `[V, M]`, a row a video and a column a metric; NaN where a video has no score.
        resamples: how many times V videos are drawn.
        seed: the draws depend on it and on V alone, so two metrics of a run are always drawn alike.

    Returns:
        `[resamples, M]`, each the mean over the drawn videos that have a score; NaN where none of them has.
    """
    there = ~np.isnan(values_VM)
    filled = np.where(there, values_VM, 0.0)
    pieces = []
    for counts in _draws(len(values_VM), resamples, seed):
        weights = counts @ there.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            pieces.append(np.where(weights > 0, (counts @ filled) / weights, np.nan))
    return np.concatenate(pieces) if pieces else np.empty((0, values_VM.shape[1]))


def interval(means: Floats, level: float = LEVEL) -> tuple[float, float] | None:
    """The percentile interval of resampled means `[resamples]`; draws without a score are left out (None: all)."""
    means = means[~np.isnan(means)]
    if not len(means):
        return None
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _draws(videos: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each video is drawn, `[some resamples, V]` at a time."""
    generator = np.random.default_rng(seed)
    step = max(1, COUNTS_AT_ONCE // max(videos, 1))
    for start in range(0, resamples if videos else 0, step):
        size = min(step, resamples - start)
        yield generator.multinomial(videos, np.full(videos, 1 / videos), size=size).astype(np.float64)
