"""A tiny study for tests: three systems, a few items, videos of 32x32 with a square that moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from idc.data.video import encode_video
from idc.study.build import BuildSettings, build_study
from idc.study.questions import Study, read_study

SYSTEMS = ("zebracrafter", "quaggavid", "okapimotion")


def moving_square(system: int, item: int, frames: int = 6, side: int = 32) -> np.ndarray:
    video = np.full((frames, side, side, 3), 40 + 60 * system, np.uint8)
    for t in range(frames):
        left = 2 * t + item
        video[t, 8:20, left : left + 10] = (220, 40 * item, 90)
    return video


def make_sources(root: Path, items: int = 4, systems: Sequence[str] = SYSTEMS) -> tuple[dict[str, Path], Path]:
    """Folders of videos by system, and the items' file. The last item has no reference."""
    lines = []
    root.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (200, 30, 90)).save(root / "subject.png")
    for item in range(items):
        references = ["subject.png"] * (item < items - 1)
        lines.append({"id": f"clip_{item}", "prompt": f"a square on ground {item}", "references": references})
        if references:
            lines[-1]["labels"] = ["square"]
        for number, system in enumerate(systems):
            (root / system).mkdir(exist_ok=True)
            (root / system / f"clip_{item}.mp4").write_bytes(encode_video(moving_square(number, item), 8))
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return {system: root / system for system in systems}, root / "items.jsonl"


def make_study(root: Path, **settings: int) -> Study:
    """Build a study in `root/study`, of 12 comparisons."""
    videos, items = make_sources(root / "sources")
    build_study(videos, items, root / "study", BuildSettings(**{"pairs": 4, "repeats": 1, "catches": 1, **settings}))
    return read_study(root / "study")


def plan(items: int = 6, systems: int = 3, pairs: int = 6, repeats: int = 2, catches: int = 2, seed: int = 0) -> Study:
    """A study's plan without its files."""
    from idc.study.questions import Catch

    names = [f"s{n}" for n in range(systems)]
    files = iter(range(10**6))
    videos = {f"i{n}": {name: f"{next(files):024x}.mp4" for name in names} for n in range(items)}
    all_catches = [Catch(item, "s0", own["s0"], f"{next(files):024x}.mp4") for item, own in list(videos.items())[:6]]
    shown = [file for own in videos.values() for file in own.values()] + [catch.bad for catch in all_catches]
    picture = {"file": f"{next(files):024x}.jpg", "width": 4, "height": 4, "label": ""}
    return Study(
        title="t",
        seed=seed,
        systems=tuple(names),
        items={item: {"prompt": "p", "references": [picture]} for item in videos},
        videos=videos,
        sizes=dict.fromkeys(shown, (4, 4)),
        catches=tuple(all_catches),
        pairs=pairs,
        repeats=repeats,
        catch_count=catches,
    )
