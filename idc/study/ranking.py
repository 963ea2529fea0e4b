"""Bradley-Terry strengths from pairwise preferences (Bradley and Terry 1952).

P(i preferred to j) = 1 / (1 + exp(-(s_i - s_j))). A "no difference" counts as half a win for each side: with two
systems the model then gives back the share of preferences itself. Davidson's model (1970) has a parameter for ties
instead, and its strengths cannot be turned into shares of "best of all".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PRIOR = 0.5  # half a win each way, the Haldane-Anscombe correction of a log odds ratio
TOLERANCE = 1e-10
MAX_STEPS = 200
LONGEST_STEP = 1.5

Array = NDArray[np.float64]


def bradley_terry(wins_SS: Array, prior_SS: Array | None = None) -> Array:
    """Maximum-likelihood strengths, with mean 0, by Newton's method.

    Args:
        wins_SS: `[..., S, S]`, how often the row's system was preferred to the column's; ties are half a win each.
        prior_SS: `[S, S]`, added to the tables whose maximum would be infinite: those in which some systems were never
            beaten by the rest (Ford 1957). By default half a win each way for each pair compared in any of them.

    Returns:
        `[..., S]` log strengths; differences are log odds.

    Raises:
        ValueError: where the systems fall into groups that were never compared.
    """
    wins: Array = np.asarray(wins_SS, dtype=np.float64)
    compared: Any = ((wins + np.swapaxes(wins, -1, -2)) > 0).reshape(-1, *wins.shape[-2:]).any(axis=0)
    prior: Any = PRIOR * compared if prior_SS is None else prior_SS
    if len(components(compared | (prior > 0))) > 1:
        raise ValueError("strengths of systems that were never compared, even through others, have no common scale")
    wins = np.where(has_finite_maximum(wins)[..., None, None], wins, wins + prior)
    count = wins.shape[-1]
    counts = wins + np.swapaxes(wins, -1, -2)
    diagonal = np.arange(count)
    strengths = np.zeros(wins.shape[:-1])
    for _ in range(MAX_STEPS):
        expected = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
        gradient = (wins - counts * expected).sum(-1)
        if np.abs(gradient).max(initial=0) < TOLERANCE * max(1.0, float(counts.max(initial=0))):
            break
        weight = counts * expected * (1 - expected)
        weight[..., diagonal, diagonal] = 0
        information = -weight
        information[..., diagonal, diagonal] = weight.sum(-1)
        # The information knows no overall level; a constant added everywhere fixes the mean at 0.
        step = np.linalg.solve(information + weight.mean((-1, -2), keepdims=True), gradient[..., None])[..., 0]
        longest = np.abs(step).max(-1, keepdims=True)
        strengths = strengths + step * np.minimum(1, LONGEST_STEP / np.maximum(longest, LONGEST_STEP))
    return strengths - strengths.mean(-1, keepdims=True)


def best_shares(strengths: Array) -> Array:
    """How often each system would be chosen as the best of all, by Luce's choice axiom (1959): `[..., S]`, sum 1.

    This is the quantity of the paper's figure S.13, whose raters chose among five at once.
    """
    power = np.exp(strengths - strengths.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def has_finite_maximum(wins_SS: Array) -> NDArray[np.bool_]:
    """Whether each system can be reached from each other by a chain of wins (Ford's condition), for `[..., S, S]`."""
    return np.asarray(_reach(np.asarray(wins_SS) > 0).all((-1, -2)))


def components(compared_SS: NDArray[np.bool_]) -> list[list[int]]:
    """Groups of systems that are connected by comparisons; a single one where all share a scale."""
    reach = _reach(compared_SS | compared_SS.T)
    return sorted(map(list, {tuple(np.flatnonzero(row).tolist()) for row in reach}))


def _reach(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Transitive and reflexive closure."""
    reach = edges | np.eye(edges.shape[-1], dtype=bool)
    for _ in range(max(1, edges.shape[-1].bit_length())):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    return reach


def resample(clusters: int, draws: int, seed: int = 0) -> Array:
    """`[draws, clusters]`: how often each cluster (a rater with all their answers) is in each bootstrap sample."""
    random_ = np.random.default_rng(seed)
    return random_.multinomial(clusters, np.full(clusters, 1 / clusters), draws).astype(np.float64)


def percentile_interval(draws: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Lower and upper end over the first axis; NaN draws are left out."""
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
    return low, high
