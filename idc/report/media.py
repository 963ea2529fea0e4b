"""The files of a page: videos copied or linked, posters, thumbnails of references. What is up to date is left alone."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from idc.data.benchmark import ITEMS, Item, read_benchmark, read_items
from idc.errors import UserError
from idc.metrics.results import Run
from idc.webpage import file_name, save_jpeg

POSTER_SIDE = 480  # pixels, the longer one
REFERENCE_SIDE = 240


class Media:
    """Puts the files of a page under `<out>/media` and says how the page names them.

    Args:
        out: the page's folder.
        copy_videos: False links to the videos where they lie; the page is then not to be moved alone.
    """

    def __init__(self, out: Path, copy_videos: bool = True) -> None:
        self.out, self.copy_videos = out, copy_videos
        self.folder = out / "media"

    def video(self, system: str, run: Run, name: str) -> dict[str, str]:
        """{"src", "poster"} of a run's video, or {"missing": why}."""
        if not name or not run.info.videos:
            return {"missing": "no video was kept"}
        source = Path(run.info.videos) / name
        if not source.is_file() or not source.resolve().is_relative_to(Path(run.info.videos).resolve()):
            return {"missing": "the video is not there"}
        target = source
        if self.copy_videos:
            target = self.folder / file_name(system) / (file_name(source.stem) + file_name(source.suffix or ".mp4"))
        poster = self.folder / file_name(system) / f"{file_name(source.stem)}.jpg"
        if _stale(poster, source) and not _write_poster(source, poster):
            return {"missing": "it cannot be opened as a video"}
        if self.copy_videos:
            _copy(source, target)
        return {"src": self._href(target), "poster": self._href(poster)}

    def references(self, item: Item) -> list[dict[str, str]]:
        """For each reference {"name", "kind", "src"}, without "src" where the picture cannot be read."""
        found = []
        for place, path in enumerate(item.references):
            entry = {
                "name": item.labels[place] if item.labels else f"reference {place + 1}",
                "kind": item.kinds[place] if item.kinds else "",
            }
            digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
            target = self.folder / "references" / f"{digest}.jpg"
            if path.is_file() and (not _stale(target, path) or _write_thumbnail(path, target)):
                entry["src"] = self._href(target)
            found.append(entry)
        return found

    def _href(self, path: Path) -> str:
        return quote(Path(os.path.relpath(path.absolute(), self.out.absolute())).as_posix())


def find_items(runs: Sequence[Run], file: Path | None = None) -> dict[str, Item]:
    """The items by id, with their references: from `file`, else from the `items.jsonl` beside the runs' videos, else
    from the benchmark that the runs were judged by.

    Raises:
        UserError: if `file` is missing or holds no items.
    """
    if file is not None:
        read = read_benchmark if file.suffix == ".json" else read_items
        return {item.id: item for item in read(file)}
    items: dict[str, Item] = {}
    for run in runs:
        try:
            found = _items_of(run)
        except (UserError, OSError):
            continue  # the page does without its references; nothing that was scored depends on them
        items = {item.id: item for item in found} | items
    return items


def _items_of(run: Run) -> list[Item]:
    beside = Path(run.info.videos) / ITEMS
    if run.info.videos and beside.is_file():
        return read_items(beside)
    settings: Any = run.info.config
    for name in ("model", "init_args"):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    benchmark = settings.get("benchmark") if isinstance(settings, Mapping) else None
    if not isinstance(benchmark, str) or not Path(benchmark).is_file():
        return []
    return read_benchmark(benchmark, settings.get("benchmark_root"))


def _stale(target: Path, source: Path) -> bool:
    return not target.is_file() or target.stat().st_mtime < source.stat().st_mtime


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    there, wanted = target.stat() if target.is_file() else None, source.stat()
    if there and (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
        return
    part = target.with_name(target.name + ".part")
    shutil.copy2(source, part)
    os.replace(part, target)


def _write_poster(video: Path, target: Path) -> bool:
    """Whether the video could be decoded; the evaluation says why it could not."""
    from PIL import Image

    from idc.data.video import VideoError, decode_video

    try:
        frame = decode_video(video, frames=1)[0]
    except VideoError:
        return False
    save_jpeg(Image.fromarray(frame), target, POSTER_SIDE)
    return True


def _write_thumbnail(path: Path, target: Path) -> bool:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            save_jpeg(ImageOps.exif_transpose(picture), target, REFERENCE_SIDE)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True
