"""A page to leaf through samples: clip, references, masks, caption, scores, where it comes from, and what was dropped.

The page is a folder: index.html, page.css, page.js, theme.js, data.js (what is filtered and sorted by), parts/ (all
else that is known, in files of some samples each, read as one comes to them) and media/. No network is used, also from
a file:// address. All that shards say reaches the page as JSON whose strings are only ever set as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html import escape
from importlib import resources
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

from idc.curate.looking import Collection, Seen, SeenDrop, SeenReference
from idc.curate.page_media import Media, annotated_frame, mask_runs
from idc.webpage import script_json, write_base

PARTS = "parts"
PART_SIZE = 50  # samples of a file of details
DROPS_SHOWN = 5000  # beyond, evenly chosen; the table of reasons counts all


def write_page(
    out: Path,
    collection: Collection,
    limit: int = 500,
    with_drops: bool = False,
    title: str = "Shards",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the page into the folder `out`; files that lie there already are not written again.

    Args:
        limit: samples on it, evenly chosen from all; 0 for all.
        with_drops: show what was dropped, too, up to 5,000 of them.
        title: of the page.
        progress: called with the samples done.

    Returns:
        the path of index.html.

    Raises:
        UserError: for an index that is damaged.
    """
    media = Media(out)
    (out / PARTS).mkdir(exist_ok=True)
    samples: list[dict[str, Any]] = []
    parts = 0
    shown = _shown(collection, media, limit, samples, progress)
    while details := list(islice(shown, PART_SIZE)):
        text = f"window.IDC_PART({parts}, {script_json(details)});\n"
        (out / PARTS / f"{parts:05d}.js").write_text(text, encoding="utf-8")
        parts += 1
    for path in (out / PARTS).glob("*.js"):
        if path.stem.isdigit() and int(path.stem) >= parts:
            path.unlink()
    media.clean()
    data = {
        "total": len(collection),
        "part": PART_SIZE,
        "samples": samples,
        "drops": list(_some_drops(collection)) if with_drops else [],
        "reasons": _reasons(collection.drops()) if with_drops else [],
    }
    (out / "data.js").write_text(f"window.IDC_DATA = {script_json(data)};\n", encoding="utf-8")
    templates = resources.files("idc.curate") / "templates"
    write_base(out, templates)
    shell = Template((templates / "page.html").read_text(encoding="utf-8"))
    index = out / "index.html"
    index.write_text(shell.substitute(title=escape(title)), encoding="utf-8")
    return index


def _shown(
    collection: Collection,
    media: Media,
    limit: int,
    samples: list[dict[str, Any]],
    progress: Callable[[int], None] | None,
) -> Iterator[dict[str, Any]]:
    """The details of each sample; what is filtered by goes into `samples`."""
    for number, seen in enumerate(collection.some(limit), 1):
        files = media.add(seen)
        samples.append(summary(seen, files))
        yield details(seen, files)
        if progress:
            progress(number)


def summary(seen: Seen, files: dict[str, Any]) -> dict[str, Any]:
    """What the page filters, sorts and shows of all samples at once."""
    frames, height, width, pictured = seen.entry.bucket  # what the statistics count as subjects, too
    return {
        "key": seen.entry.key,
        "id": seen.entry.id,
        "split": seen.split,
        "source": seen.source,
        "video": seen.video,
        "licence": seen.licence,
        "category": seen.category,
        "caption": seen.caption,
        "subjects": [subject.name for subject in seen.subjects],
        "pictured": pictured,
        "kinds": sorted({subject.kind for subject in seen.subjects if subject.kind}),
        "origins": sorted({r.origin for s in seen.subjects for r in s.references if r.origin}),
        "frames": frames,
        "size": f"{width}x{height}",
        "seconds": round(seen.seconds, 3),
        "words": seen.entry.caption_words,
        "scores": {name: _short(value) for name, value in sorted(seen.scores.items())},
        "frame": files.get("frame", ""),
        "missing": files.get("missing", "") or seen.problem,
    }


def details(seen: Seen, files: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of the one sample that is looked at."""
    _, height, width, _ = seen.entry.bucket
    return {
        "clip": files.get("clip", ""),
        "worse": files.get("worse", ""),
        "fps": seen.entry.fps,
        "width": width,
        "height": height,
        "shown": annotated_frame(seen),
        "subjects": [
            {
                "name": subject.name,
                "kind": subject.kind,
                "box": subject.box,
                "mask": mask_runs(subject),
                "frame": subject.frame,
                "score": _short(subject.score),
                "references": [_reference(reference, files["references"]) for reference in subject.references],
                "details": dict(subject.details),
            }
            for subject in seen.subjects
        ],
        "models": dict(seen.models),
        "safety": dict(seen.safety),
        "meta": dict(seen.meta),
        "shard": f"{seen.root.rstrip('/').rsplit('/', 1)[-1]}/{seen.entry.shard}",
        "sha256": seen.entry.sha256,
    }


def _reference(reference: SeenReference, files: dict[str, str]) -> dict[str, Any]:
    return {
        "src": files.get(reference.ext, ""),
        "pictured": bool(reference.ext),
        "origin": reference.origin,
        "video": reference.video,
        "seconds": reference.seconds,
        "similarity": _short(reference.similarity),
        "details": dict(reference.details),
    }


def _some_drops(collection: Collection) -> Iterator[dict[str, str]]:
    total = sum(1 for _ in collection.drops())
    step = max(1.0, total / DROPS_SHOWN)
    place = 0.0
    for number, drop in enumerate(collection.drops()):
        if number >= place:
            place += step
            yield {name: getattr(drop, name) for name in ("source", "video", "key", "step", "reason", "detail")}


def _reasons(drops: Iterable[SeenDrop]) -> list[dict[str, Any]]:
    counts = Counter((drop.step, drop.reason) for drop in drops)
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"step": step, "reason": reason, "count": count} for (step, reason), count in order]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
