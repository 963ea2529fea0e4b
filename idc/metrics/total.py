"""Totals of the benchmark, and the one place that knows each metric's raw scale.

Protocols (never mixed in one column):
    opens2v-1.0, opens2v-1.1: OpenS2V-Eval before and after smoothness was added; a video's raw score is cut to the
        metric's range, mapped to [0, 1], averaged over the videos, and the averages are summed with weights.
    paper: table 1 of the paper. Its weights are those of 1.0 (they reproduce every row of other systems from its
        columns), and its NexusScore is a cosine (appendix C), where the benchmark's ends at 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from idc.errors import UserError, nearest

METRICS = ("aesthetics", "motion_smoothness", "motion_amplitude", "facesim", "gmescore", "nexusscore", "naturalscore")
DOMAINS = ("open", "single", "human")

# Raw values that become 0 and 1.
_SCALES: dict[str, tuple[float, float]] = {
    "aesthetics": (4, 7),
    "motion_smoothness": (0, 1),
    "motion_amplitude": (0, 1),
    "facesim": (0, 1),
    "gmescore": (0, 1),
    "nexusscore": (0, 0.05),
    "naturalscore": (1, 5),
}
_PAPER_SCALES = _SCALES | {"nexusscore": (0, 1)}

_V10 = {
    "aesthetics": 0.12,
    "motion_amplitude": 0.12,
    "facesim": 0.20,
    "gmescore": 0.12,
    "nexusscore": 0.20,
    "naturalscore": 0.24,
}
_V10_HUMAN = {
    "aesthetics": 0.15,
    "motion_amplitude": 0.15,
    "facesim": 0.25,
    "gmescore": 0.15,
    "naturalscore": 0.30,
}
_V11 = {
    "aesthetics": 0.16,
    "motion_smoothness": 0.06,
    "motion_amplitude": 0.02,
    "facesim": 0.20,
    "gmescore": 0.12,
    "nexusscore": 0.20,
    "naturalscore": 0.24,
}
_V11_HUMAN = {
    "aesthetics": 0.18,
    "motion_smoothness": 0.09,
    "motion_amplitude": 0.03,
    "facesim": 0.25,
    "gmescore": 0.15,
    "naturalscore": 0.30,
}
_WEIGHTS = {
    "paper": {"open": _V10, "single": _V10, "human": _V10_HUMAN},
    "opens2v-1.0": {"open": _V10, "single": _V10, "human": _V10_HUMAN},
    "opens2v-1.1": {"open": _V11, "single": _V11, "human": _V11_HUMAN},
}
PROTOCOLS = tuple(_WEIGHTS)

_ROUNDING = 1e-6  # a mean of fractions may leave [0, 1] by as much


def weights(protocol: str, domain: str = "open") -> dict[str, float]:
    """The total's weight of each metric, in the order of the benchmark's table; they sum to 1.

    Raises:
        UserError: for an unknown protocol or domain.
    """
    if protocol not in _WEIGHTS:
        raise UserError(f"protocol={protocol!r}: no such protocol{nearest(protocol, _WEIGHTS)}")
    if domain not in DOMAINS:
        raise UserError(f"domain={domain!r}: no such domain{nearest(domain, DOMAINS)}")
    return dict(_WEIGHTS[protocol][domain])


def required(protocol: str, domain: str = "open") -> tuple[str, ...]:
    """The metrics that a total is made of."""
    return tuple(weights(protocol, domain))


def scale(name: str, protocol: str) -> tuple[float, float]:
    """The raw values of metric `name` that count as 0 and as 1.

    Raises:
        UserError: for an unknown metric or protocol.
    """
    weights(protocol)
    _check_name(name)
    return (_PAPER_SCALES if protocol == "paper" else _SCALES)[name]


def normalise(name: str, raw: float, protocol: str) -> float:
    """One video's raw score as a fraction in [0, 1]: (raw - lo) / (hi - lo), cut to the range as the benchmark does.

    This comes before any averaging: of two videos with raw 9 and 4, aesthetics is 0.5 and not 0.83. The
    benchmark leaves videos with a NexusScore of exactly 0 out of its mean; that is the mean's business, not this
    function's.

    Raises:
        UserError: for an unknown metric or protocol, or a value that is not finite.
    """
    lo, hi = scale(name, protocol)
    if not math.isfinite(raw):
        raise UserError(f"{name}={raw}: a raw score is a finite number; a failed one has no fraction")
    return min(max((raw - lo) / (hi - lo), 0.0), 1.0)


def total_score(scores: Mapping[str, float | None], *, protocol: str, domain: str = "open") -> float:
    """The benchmark's total in [0, 1].

    Args:
        scores: means over the videos, as fractions in [0, 1] (`normalise`), keyed by metric. Those that this
            protocol and domain give no weight are ignored: smoothness in 1.0, NexusScore in the human domain.
        protocol: "paper", "opens2v-1.0" or "opens2v-1.1".
        domain: "open" (180 items), "single" (90) or "human" (60).

    Raises:
        UserError: for an unknown metric, protocol or domain, a weighted score that is missing, None or NaN (a total
            of part of the metrics would look like a low total), or one outside [0, 1] (percent?).

    >>> vidu = {"aesthetics": 0.4147, "motion_amplitude": 0.1352, "facesim": 0.3511}
    >>> vidu |= {"gmescore": 0.6757, "nexusscore": 0.4355, "naturalscore": 0.7144}
    >>> round(total_score(vidu, protocol="paper"), 5)
    0.47585
    """
    weighted = weights(protocol, domain)
    for name in scores:
        _check_name(name)
    values = {name: scores.get(name) for name in weighted}
    missing = [name for name, value in values.items() if value is None]
    failed = [name for name, value in values.items() if value is not None and math.isnan(value)]
    if missing or failed:
        faults = [f"{', '.join(missing)} missing"] if missing else []
        faults += [f"{', '.join(failed)} {'is' if len(failed) == 1 else 'are'} NaN, not a score"] if failed else []
        rule = f"protocol {protocol!r}, domain {domain!r} needs {', '.join(weighted)}"
        raise UserError(f"no total: {'; '.join(faults)}; {rule}")
    total = 0.0
    for name, weight in weighted.items():
        value = values[name]
        assert value is not None
        if not -_ROUNDING <= value <= 1 + _ROUNDING:
            hint = "; percent? divide by 100" if 1 < value <= 100 else "; see idc.metrics.total.normalise"
            raise UserError(f"{name}={value:g}: a score is a fraction in [0, 1]{hint}")
        total += weight * value
    return total


def _check_name(name: str) -> None:
    if name not in METRICS:
        raise UserError(f"{name!r}: no metric of the totals{nearest(name, METRICS)}")
