"""A page to look at: tables, videos of all systems side by side, identity over time, what failed. No network is used.

The page is a folder: index.html, page.css, page.js, theme.js, data.js and media/. All that is read from runs reaches
the page as escaped text or as JSON whose strings are only ever set as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from idc.errors import UserError
from idc.metrics.results import Result
from idc.report.html import blank_tables_html, failures_html, measures_html, table_html
from idc.report.layout import metric_title
from idc.report.measure import Measured
from idc.report.media import Media, find_items
from idc.report.tables import Table, short_commit
from idc.report.tracks import identity
from idc.webpage import script_json, write_base

NO_TABLE = '<p class="empty">No table of the paper has figures of these runs; they stand under All measures.</p>'


@dataclass(frozen=True)
class System:
    """A run on the page, by a name that no other run has there."""

    name: str
    measured: Measured


def write_page(
    out: Path,
    runs: Sequence[Measured],
    tables: Sequence[Table],
    title: str = "Evaluation",
    copy_videos: bool = True,
    items: Path | None = None,
    links: dict[str, str] | None = None,
) -> Path:
    """Write the page into the folder `out`; videos that lie there already are not copied again.

    Args:
        runs: a column each.
        tables: in this order; those without a figure of any run are folded up, below the videos.
        title: of the page.
        copy_videos: False links to the videos where they lie.
        items: items.jsonl or a benchmark's JSON, for the references.
        links: text -> address, at the page's head.

    Returns:
        the path of index.html.

    Raises:
        UserError: for an `items` file that cannot be read, or a link that is neither relative nor http(s).
    """
    head = _links(links or {})
    systems = name_systems(runs)
    media = Media(out, copy_videos)
    data = collect(systems, media, items)
    out.mkdir(parents=True, exist_ok=True)
    templates = resources.files("idc.report") / "templates"
    write_base(out, templates)
    (out / "data.js").write_text(f"window.IDC_DATA = {script_json(data)};\n", encoding="utf-8")
    # Without any run all tables stand at the top: they are then asked for because of the printed figures.
    filled = [table for table in tables if table.filled or not runs]
    blank = [table for table in tables if table not in filled]
    shell = Template((templates / "page.html").read_text(encoding="utf-8"))
    index = out / "index.html"
    index.write_text(
        shell.substitute(
            title=escape(title),
            links=head,
            facts=_facts(systems, data),
            tables="\n".join(map(table_html, filled)) or NO_TABLE,
            blank=blank_tables_html(blank),
            measures=measures_html([(s.name, s.measured) for s in systems], [m["key"] for m in data["metrics"]]),
            failures=failures_html([(s.name, s.measured) for s in systems]),
        ),
        encoding="utf-8",
    )
    return index


def check_page(items: Path | None, links: dict[str, str]) -> None:
    """Raise what `write_page` would of these two arguments, before anything is written."""
    _links(links)
    find_items([], items)


def name_systems(runs: Sequence[Measured]) -> list[System]:
    """Runs by their system, with the folder's name, and if need be a number, where two share it."""
    names: list[str] = []
    for measured in runs:
        name = measured.run.info.system
        if sum(m.run.info.system == name for m in runs) > 1:
            name = f"{name} ({measured.run.path.resolve().name})"
        base, count = name, 1
        while name in names:
            count += 1
            name = f"{base} {count}"
        names.append(name)
    return [System(name, measured) for name, measured in zip(names, runs, strict=True)]


def collect(systems: Sequence[System], media: Media, items_file: Path | None = None) -> dict[str, Any]:
    """All that the page shows below its tables, as plain JSON; copies the files on the way."""
    from rich.console import Console
    from rich.progress import track

    items = find_items([system.measured.run for system in systems], items_file)
    metrics = list(dict.fromkeys(name for s in systems for name in s.measured.run.info.metrics))
    ids = list(dict.fromkeys(id for s in systems for id in s.measured.run.info.items if id in set(s.measured.ids)))
    by_id = [_by_id(system.measured) for system in systems]
    console = Console(stderr=True)
    shown = []
    for id in track(ids, "page", console=console, transient=True, disable=not console.is_terminal):
        found = [lines.get(id, {}) for lines in by_id]
        first = next((r for results in found for r in results.values()), None)
        item = items.get(id)
        shown.append(
            {
                "id": id,
                "category": next(
                    (c for s in systems if (c := s.measured.run.info.items.get(id))), item.category if item else ""
                ),
                "prompt": (first.prompt if first else "") or (item.prompt if item else ""),
                "references": media.references(item) if item else [],
                "videos": [_video(s, media, id, results) for s, results in zip(systems, found, strict=True)],
            }
        )
    return {
        "systems": [{"name": s.name, "shared": _shared(s, metrics)} for s in systems],
        "metrics": [{"key": name, "title": metric_title(name)} for name in metrics],
        "items": shown,
    }


def _by_id(measured: Measured) -> dict[str, dict[str, Result]]:
    found: dict[str, dict[str, Result]] = {}
    for (id, metric), result in measured.run.results.items():
        found.setdefault(id, {})[metric] = result
    return found


def _video(system: System, media: Media, id: str, results: dict[str, Result]) -> dict[str, Any]:
    """One system's video of one item: where it is, its scores, the identity of its subjects."""
    measured = system.measured
    if id not in measured.run.info.items:
        return {"missing": "not among this run's items"}
    name = next((result.video for result in results.values() if result.video), f"{id}.mp4")
    entry: dict[str, Any] = media.video(system.name, measured.run, name)
    entry["scores"] = {metric: _score(measured, result, metric) for metric, result in results.items() if result.applies}
    missing = [metric for metric in measured.run.info.metrics if metric not in results]
    entry["scores"] |= {metric: {"reason": "not scored yet"} for metric in missing}
    tracked = results.get(measured.tracker or "")
    if tracked is not None and (found := identity(tracked.details)) is not None:
        entry["identity"] = {
            "tracks": [
                {
                    "name": t.name,
                    "identity": _short(t.identity),
                    "values": [_short(value) for value in t.similarity],
                    "states": list(t.states),
                }
                for t in found.tracks
            ],
            "confusion": [[_short(value) for value in row] for row in found.confusion],
            "rates": {name: _short(rate) for name, rate in found.rates.items()},
        }
    return entry


def _score(measured: Measured, result: Result, metric: str) -> dict[str, Any]:
    value = measured.value(result, metric)
    if value is None or not math.isfinite(value):
        return {"reason": result.reason or f"left out of the mean (raw {result.value})"}
    return {"value": round(value, 5)}


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)


def _shared(system: System, metrics: Sequence[str]) -> dict[str, list[str]]:
    return {name: list(models) for name in metrics if (models := system.measured.shared_models(name))}


def _facts(systems: Sequence[System], data: dict[str, Any]) -> str:
    infos = [system.measured.run.info for system in systems]
    facts = [
        ("Protocol", ", ".join(sorted({info.protocol for info in infos})) or "no runs"),
        ("Domain", ", ".join(sorted({system.measured.domain for system in systems})) or "–"),
        ("Items", str(len(data["items"]))),
        ("Systems", str(len(systems))),
        ("Commit", ", ".join(sorted({short_commit(info.commit) for info in infos})) or "–"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)


def _links(links: dict[str, str]) -> str:
    for text, address in links.items():
        scheme = address.partition(":")[0].lower() if ":" in address.partition("/")[0] else ""
        if scheme not in ("", "http", "https"):
            raise UserError(f"--link {text}={address}: an address is relative, or begins with http:// or https://")
    return "".join(f'<a href="{escape(address)}">{escape(text)}</a>' for text, address in links.items())
