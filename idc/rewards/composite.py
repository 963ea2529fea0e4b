"""Weighted sums of rewards, with a breakdown by name; the paper's composite; normalisation per reward in a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from idc.errors import UserError, nearest
from idc.metrics.base import Clip, Score
from idc.rewards.base import Reward, call
from idc.rewards.measures import fraction

NORMALISE = ("none", "group")


@dataclass(frozen=True)
class Term:
    """One reward of a composite.

    Attributes:
        reward: what is computed.
        weight: of its value in the sum; below 0 for what should fall. With 0 it is not computed at all, unless
        monitor: it is, and reported, without entering the sum: a measure that is watched and never optimised.
        group: name of the part that it belongs to, such as "fidelity"; where a term does not apply to a clip, the
            others of its part share its weight.
        name: in breakdowns and logs; the reward's own where empty.

    Raises:
        UserError: for a weight that is not finite.
    """

    reward: Reward
    weight: float = 1.0
    group: str = ""
    name: str = ""
    monitor: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"weight={self.weight} of reward {self.key!r}: must be a finite number")

    @property
    def key(self) -> str:
        """Its name in breakdowns."""
        return self.name or self.reward.name


@dataclass(frozen=True)
class Breakdown:
    """What one sample got, by name.

    Attributes:
        total: the weighted sum of the raw values, or None: a sample without a reward, never a zero.
        values: raw value of each reward that was computed; None where it failed or does not apply.
        weights: with which each value entered the total, after terms that do not apply left theirs to others; 0 for
            what is only watched.
        parts: for each named group of terms the weighted mean of its values, such as R_fid; None where one failed or
            none applies.
        reasons: why a value is None, by name; "" has the reason where no reward was computed at all.
        retried: how many calls were made again after a fault.
    """

    total: float | None
    values: Mapping[str, float | None] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float | None] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    retried: int = 0

    @classmethod
    def failed(cls, reason: str, retried: int = 0) -> Breakdown:
        """Nothing could be computed, because of `reason`."""
        return cls(None, reasons={"": reason}, retried=retried)

    @property
    def reason(self) -> str:
        """Why there is no total, in one line; "" where there is one."""
        if self.total is not None:
            return ""
        causes = {name: why for name, why in self.reasons.items() if not name or self.weights.get(name)}
        return "; ".join(f"{name}: {why}" if name else why for name, why in (causes or self.reasons).items())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; `Breakdown(**values)` is the way back."""
        return asdict(self)


class Composite(Reward):
    """A weighted sum of rewards, itself a reward.

    Args:
        terms: the rewards with their weights.
        normalise: what `combine` makes of a batch: "none" is the sum of the raw values as in the paper, "group" takes
            each reward's mean over the group away and divides by its deviation before it is weighted, so that no
            reward rules by its scale.

    Raises:
        UserError: for no weighted term, two terms of one name, or an unknown `normalise`.
    """

    name = "composite"
    bounds = (-math.inf, math.inf)
    thread_safe = True  # each term takes its own turn

    def __init__(self, terms: Sequence[Term], normalise: str = "none") -> None:
        if normalise not in NORMALISE:
            raise UserError(f"normalise={normalise!r}: no such way{nearest(normalise, NORMALISE)}")
        names = [term.key for term in terms]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"terms: two are named {name!r}; give one of them another name")
        if not any(term.weight for term in terms):
            raise UserError(f"terms: none of {len(terms)} has a weight; there is nothing to optimise")
        self.terms = tuple(term for term in terms if term.weight or term.monitor)
        self.normalise = normalise

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]  # its terms tell, where others have a value
        """Of the weighted terms: those are what is optimised."""
        return tuple(dict.fromkeys(model for term in self.terms if term.weight for model in term.reward.models))

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the terms that are computed and do not enter the sum."""
        return tuple(term.key for term in self.terms if not term.weight)

    def load(self, device: torch.device | str = "cpu") -> None:
        for term in self.terms:
            term.reward.load(device)

    def unload(self) -> None:
        for term in self.terms:
            term.reward.unload()

    def facts(self) -> Any:
        return [term.reward.facts() for term in self.terms]

    def learn(self, facts: Any) -> None:
        for term, known in zip(self.terms, facts, strict=True):
            term.reward.learn(known)

    def applies(self, clip: Clip) -> bool:
        return any(term.weight and term.reward.applies(clip) for term in self.terms)

    def score(self, clip: Clip) -> Score:
        found = self.breakdown(clip)
        return Score(found.total, found.reason, found.as_dict())

    def breakdown(self, clip: Clip, score: Callable[[Reward, Clip], Score] = call) -> Breakdown:
        """Every term's value for one clip, and the total; `score` computes one term's."""
        relevant = [term for term in self.terms if term.reward.applies(clip)]
        weights = effective_weights(self.terms, relevant)
        if not weights:
            return Breakdown.failed("no reward says anything about such a clip")
        scores = {term.key: score(term.reward, clip) for term in relevant}
        values = {term.key: scores[term.key].value if term.key in scores else None for term in self.terms}
        reasons = {
            key: scores[key].reason or "no reason given" if key in scores else "does not apply"
            for key, value in values.items()
            if value is None
        }
        groups = dict.fromkeys(term.group for term in self.terms if term.group and term.weight)
        return Breakdown(
            total=_sum({key: values[key] for key in weights}, weights),
            values=values,
            weights={key: weights.get(key, 0.0) for key in values},
            parts={group: self._part(group, values, weights) for group in groups},
            reasons=reasons,
        )

    def _part(self, group: str, values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
        own = {term.key: weights[term.key] for term in self.terms if term.group == group and term.key in weights}
        size = math.fsum(map(abs, own.values()))
        return _sum({key: values[key] for key in own}, {key: weight / size for key, weight in own.items()})

    def combine(self, breakdowns: Sequence[Breakdown], groups: Sequence[Hashable]) -> list[float | None]:
        """`combine` in this composite's own way."""
        return combine(breakdowns, groups, self.normalise)


class PaperReward(Composite):
    """R = fidelity R_fid + (1 - fidelity) R_qua, with R_fid = (1 - eta) face + eta subject and
    R_qua = (1 - gamma) aesthetics + gamma natural.

    The ablations of table 3: `fidelity=0` is "w/o fidelity", `fidelity=1` "w/o quality", `gamma=0` "w/o natural".
    Table S.7's lambda is `min_weight` of the face reward. What has no weight is not computed.

    Args:
        face, subject, aesthetics, natural: `FaceReward`, `SubjectReward`, `AestheticReward`, `NaturalReward`, or
            those of the toy world.
        fidelity, eta, gamma: weights in [0, 1]; the paper's are 0.6, 0.5 and 0.4.
        normalise: as in `Composite`; the paper's is "none".
        monitor: compute also what has no weight, to watch it.
        extra: further terms, such as the anti-leak reward.
        watched: measures that are computed without any weight (`idc.rewards.watch`).

    Raises:
        UserError: for a weight out of its range, or two terms of one name.
    """

    def __init__(
        self,
        face: Reward,
        subject: Reward,
        aesthetics: Reward,
        natural: Reward,
        fidelity: float = 0.6,
        eta: float = 0.5,
        gamma: float = 0.4,
        normalise: str = "none",
        monitor: bool = False,
        extra: Sequence[Term] = (),
        watched: Sequence[Reward] = (),
    ) -> None:
        fidelity, eta, gamma = fraction("fidelity", fidelity), fraction("eta", eta), fraction("gamma", gamma)
        quality = 1 - fidelity
        super().__init__(
            [
                Term(face, fidelity * (1 - eta), "fidelity", "face", monitor),
                Term(subject, fidelity * eta, "fidelity", "subject", monitor),
                Term(aesthetics, quality * (1 - gamma), "quality", "aesthetics", monitor),
                Term(natural, quality * gamma, "quality", "natural", monitor),
                *extra,
                *(Term(reward, 0.0, monitor=True) for reward in watched),
            ],
            normalise,
        )


def effective_weights(terms: Sequence[Term], relevant: Sequence[Term]) -> dict[str, float]:
    """Weights of the `relevant` ones among `terms`, by name; terms without weight are left out.

    Within each group the relevant terms share the weight of those that are not, in proportion to their own; a group
    without any leaves its weight to the other groups. All rollouts of one request have the same relevant terms, so
    that no sample gains by it.
    """

    def size(some: Sequence[Term]) -> float:
        return math.fsum(abs(term.weight) for term in some)

    chosen = [term for term in relevant if term.weight]
    alive = {term.group for term in chosen}
    if not alive:
        return {}
    spread = size(terms) / size([term for term in terms if term.group in alive])
    weights = {}
    for term in chosen:
        whole, left = ([t for t in some if t.group == term.group] for some in (terms, chosen))
        weights[term.key] = term.weight * size(whole) / size(left) * spread
    return weights


def combine(
    breakdowns: Sequence[Breakdown], groups: Sequence[Hashable], mode: str = "none", eps: float = 1e-8
) -> list[float | None]:
    """The reward of each sample of a batch, given the group (prompt and references) that each belongs to.

    Args:
        breakdowns: of all samples of the groups, from all ranks: a part of a group has other statistics.
        groups: a key for each breakdown.
        mode: "none": the totals. "group": sum over rewards of weight x (value - mean) / (deviation + eps), mean and
            population deviation over the samples of the group that have a total; a reward that is constant over the
            group adds 0.

    Returns:
        one number per breakdown; None for a sample without a total, which counts in no mean.

    Raises:
        ValueError: for lists of different lengths. UserError: for an unknown mode.
    """
    if mode not in NORMALISE:
        raise UserError(f"normalise={mode!r}: no such way{nearest(mode, NORMALISE)}")
    if len(breakdowns) != len(groups):
        raise ValueError(f"{len(breakdowns)} breakdowns of {len(groups)} groups: must be as many")
    if mode == "none":
        return [breakdown.total for breakdown in breakdowns]
    members: dict[Hashable, list[int]] = {}
    for index, (breakdown, group) in enumerate(zip(breakdowns, groups, strict=True)):
        if breakdown.total is not None:
            members.setdefault(group, []).append(index)
    rewards: list[float | None] = [None] * len(breakdowns)
    for indices in members.values():
        parts: dict[int, list[float]] = {index: [] for index in indices}
        for name in dict.fromkeys(name for index in indices for name, w in breakdowns[index].weights.items() if w):
            having = [index for index in indices if breakdowns[index].weights.get(name)]
            values = [_value(breakdowns[index], name) for index in having]
            mean = math.fsum(values) / len(values)
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
            for index, value in zip(having, values, strict=True):
                parts[index].append(breakdowns[index].weights[name] * (value - mean) / (deviation + eps))
        for index in indices:
            rewards[index] = math.fsum(parts[index])
    return rewards


def _value(breakdown: Breakdown, name: str) -> float:
    value = breakdown.values[name]
    assert value is not None  # there is a total
    return value


def _sum(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Weighted sum, independent of the order; None where a value is missing or there is none."""
    products = [weights[key] * value for key, value in values.items() if value is not None]
    return math.fsum(products) if products and len(products) == len(values) else None
