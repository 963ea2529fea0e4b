"""Run folders with chosen scores, as an evaluation writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idc.metrics.results import Result, RunInfo, results_file, write_info
from idc.metrics.total import METRICS, scale

CATEGORIES = ("singleobj", "singlehuman", "singleface", "multihuman")
FACES = ("singlehuman", "singleface", "faceobj", "humanobj")


def raw(metric: str, fraction: float, protocol: str = "paper") -> float:
    """The raw score that counts as `fraction`."""
    low, high = scale(metric, protocol)
    return low + fraction * (high - low)


def write_run(
    folder: Path,
    system: str,
    results: Sequence[Result],
    items: Mapping[str, str] | None = None,
    protocol: str = "paper",
    models: Mapping[str, Sequence[str]] | None = None,
    **info: Any,
) -> Path:
    """A run folder of these results; its items are theirs where none are given."""
    items = items if items is not None else {result.id: result.category for result in results}
    metrics = dict.fromkeys(result.metric for result in results)
    described = {
        name: {"models": list((models or {}).get(name, ())), "bounds": [0.0, 1.0], "frames": 32} for name in metrics
    }
    write_info(folder, RunInfo(system, protocol, items, metrics=described, **({"commit": "0123456789abcdef"} | info)))
    lines: dict[str, list[str]] = {}
    for result in results:
        lines.setdefault(result.id, []).append(json.dumps(vars(result)) + "\n")
    for id, written in lines.items():
        file = results_file(folder, id)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(written), encoding="utf-8")
    return folder


def even_results(fractions: Mapping[str, float], videos: int = 4, protocol: str = "paper", spread: float = 0.05):
    """Results whose means are `fractions`: half of the videos lie `spread` above, half below; FaceSim on people."""
    results = []
    for n in range(videos):
        category = CATEGORIES[(n // 2) % len(CATEGORIES)]
        for metric, mean in fractions.items():
            value = mean + (spread if n % 2 else -spread)
            applies = metric != "facesim" or category in FACES
            number = raw(metric, value, protocol) if metric in METRICS else value
            reason = "" if applies else "not an item with one person"
            results.append(
                Result(f"{category}_{n}", metric, number if applies else None, reason, applies, category=category)
            )
    return results


def tracking(similarity: Sequence[Sequence[float | None]], names: Sequence[str]) -> dict[str, Any]:
    """Details as `IdentityTracking` gives them, of subjects that are nobody but themselves."""
    count = len(names)
    means = [sum(v or 0 for v in row) / len(row) for row in similarity]
    missing = [sum(v is None for v in row) / len(row) for row in similarity]
    return {
        "subjects": [
            {"name": name, "reference": n, "kind": "human", "identity": means[n], "missing": missing[n]}
            for n, name in enumerate(names)
        ],
        "average": sum(means) / count,
        "minimum": min(means),
        **{"missing": sum(missing) / count, "swapped": 0.0, "unsure": 0.0, "doubled": 0.0},
        "similarity": [list(row) for row in similarity],
        "states": [["missing" if v is None else "seen" for v in row] for row in similarity],
        "confusion": [[float(n == m) for m in range(count + 1)] for n in range(count)],
    }
