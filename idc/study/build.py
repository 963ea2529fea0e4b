"""Make a study: copy all videos under random names, draw up the plan, write the page.

A departure from the paper, whose raters chose the best of five videos at once: here two at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from idc.data.benchmark import Item, check_unique, read_benchmark, read_items
from idc.data.video import VideoError
from idc.errors import UserError, make_folder, nearest
from idc.study.media import Media, anonymise_picture, anonymise_video, corrupt_video
from idc.study.questions import ANSWERS, MEDIA, PLAN, PUBLIC, Catch, Study

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")
SPARE_CATCHES = 3  # corrupted copies for each catch question of a questionnaire, so that raters see different ones
NAME_LETTERS = 24


@dataclass(frozen=True)
class BuildSettings:
    """How a study is made.

    Attributes:
        seed: fixes names, order, sides, repeats and catches.
        pairs: comparisons that count, per rater.
        repeats: of these, how many come again with swapped sides.
        catches: questions per rater with a known answer.
        height: of all videos in pixels; 0 keeps each video's own.
        title: of the page.
        intro: what raters read before they consent, paragraphs divided by empty lines; "" for the usual text.
        workers: videos encoded at a time; 0 for one a core.
    """

    seed: int = 0
    pairs: int = 12
    repeats: int = 2
    catches: int = 2
    height: int = 0
    title: str = "Which video is better?"
    intro: str = ""
    workers: int = 0

    def check(self) -> None:
        """Raise `UserError` naming the value and the rule."""
        for name, least in (("pairs", 1), ("repeats", 0), ("catches", 0), ("height", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if self.repeats > self.pairs // 2:
            raise UserError(
                f"--repeats {self.repeats}: at most half of --pairs {self.pairs}, that is {self.pairs // 2}, so that a "
                "question never comes again at once"
            )
        if self.height % 2:
            raise UserError(f"--height {self.height}: must be even; {self.height - 1} and {self.height + 1} are")
        if not self.title.strip():
            raise UserError("--title: must not be empty")


@dataclass
class BuildReport:
    """What a build made, and what it had to leave out: one line of reason each."""

    study: Study
    faults: list[str] = field(default_factory=list)


Progress = Callable[[int, int], None]


def build_study(
    videos: Mapping[str, Path],
    items_path: Path,
    out: Path,
    settings: BuildSettings | None = None,
    progress: Progress = lambda done, total: None,
) -> BuildReport:
    """Make a study in `out`, which must hold none yet. A build that was cut off is continued.

    Args:
        videos: per system its folder of `<id>.mp4` (or .webm, .mov, .mkv, .avi), in the order of the report.
        items_path: a `.jsonl` of items, or a benchmark's `.json`.
        progress: is told how many files of how many are done.

    Raises:
        UserError: for bad settings, folders or items, or where no two systems have a video of the same item.
    """
    settings = settings or BuildSettings()
    settings.check()
    _check_systems(videos)
    if (out / PLAN).exists() or (out / ANSWERS).exists():
        raise UserError(f"--out {out}: holds a study, and its answers belong to its plan; choose another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    items = read_benchmark(items_path) if items_path.suffix == ".json" else read_items(items_path)
    check_unique(items, str(items_path))
    faults: list[str] = []
    sources = _find_videos(videos, items, faults)
    jobs = _Jobs(out / PUBLIC / MEDIA, settings, progress)
    study = _encode_all(jobs, tuple(videos), items, sources, settings, faults)
    if not study.comparisons():
        reasons = "; ".join(faults[:3]) or "no item has videos of two systems"
        raise UserError(f"nothing to compare: {reasons}")
    jobs.remove_strangers(study.media())
    _write_page(out / PUBLIC, study, settings)
    # The plan comes last: a folder with a plan is a finished study.
    _write(out / PLAN, study.as_json())
    return BuildReport(study, faults)


def _check_systems(videos: Mapping[str, Path]) -> None:
    if len(videos) < 2:
        raise UserError(f"--videos: {len(videos)} given; a comparison needs at least 2, as --videos NAME=DIR")
    for name, folder in videos.items():
        if not folder.is_dir():
            siblings = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
            hint = nearest(folder, siblings) if len(siblings) < 500 else ""
            raise UserError(f"--videos {name}={folder}: no such folder{hint if 'did you mean' in hint else ''}")


def _find_videos(videos: Mapping[str, Path], items: Sequence[Item], faults: list[str]) -> dict[str, dict[str, Path]]:
    """Per item and system the video's file."""
    found: dict[str, dict[str, Path]] = {item.id: {} for item in items}
    for system, folder in videos.items():
        by_id: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                by_id.setdefault(path.stem, []).append(path)
        for extra in by_id.keys() - found.keys():
            faults.append(f"{system}: {by_id[extra][0].name} belongs to no item; left out")
        for item in items:
            paths = by_id.get(item.id, [])
            if len(paths) == 1:
                found[item.id][system] = paths[0]
            else:
                what = f"has {' and '.join(p.name for p in paths)}" if paths else "has no video"
                faults.append(f"{system}: {what} of {item.id!r}; left out")
        if not any(system in systems for systems in found.values()):
            raise UserError(
                f"--videos {system}={folder}: has no video of any of {len(items)} items; they are found by name, such "
                f"as {items[0].id}.mp4"
            )
    return found


class _Jobs:
    """Files to be made, each under a random name that depends on the seed and on all that goes into it.

    A file that is there under its name is complete (written aside, then renamed), so a build that was cut off goes on.
    """

    def __init__(self, folder: Path, settings: BuildSettings, progress: Progress) -> None:
        make_folder(folder)
        self.folder, self.settings, self.progress = folder, settings, progress

    def name(self, source: Path, *what: object) -> str:
        digest = hashlib.sha256(json.dumps([self.settings.seed, self.settings.height, *map(str, what)]).encode())
        with source.open("rb") as file:
            for chunk in iter(partial(file.read, 1 << 20), b""):
                digest.update(chunk)
        return digest.hexdigest()[:NAME_LETTERS]

    def make(self, job: tuple[str, Path, tuple[object, ...]]) -> Media | str:
        """One file: its `Media`, or the reason why there is none. Jobs are (kind, source, what it is for)."""
        kind, source, what = job
        try:
            name = self.name(source, kind, *what) + (".jpg" if kind == "picture" else ".mp4")
            size = self.folder / f"{name}.size"
            if (self.folder / name).is_file() and size.is_file():
                return Media(name, *json.loads(size.read_text()))
            aside = self.folder / f"aside-{name}"
            if kind == "picture":
                media = anonymise_picture(source, aside)
            elif kind == "video":
                media = anonymise_video(source, aside, self.settings.height)
            else:
                media = corrupt_video(source, aside, self.settings.height, self.settings.seed)
            _write(size, json.dumps([media.width, media.height]))
            os.replace(aside, self.folder / name)
            return Media(name, media.width, media.height)
        except (VideoError, OSError, ValueError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"--out: the disk is full at {self.folder}; the build goes on when run again"
                ) from error
            return f"{source}: {error}"

    def all(self, jobs: Sequence[tuple[str, Path, tuple[object, ...]]]) -> Iterator[Media | str]:
        workers = self.settings.workers or os.cpu_count() or 1
        pool = ThreadPoolExecutor(min(workers, max(1, len(jobs))))
        try:
            for done, media in enumerate(pool.map(self.make, jobs), 1):
                self.progress(done, len(jobs))
                yield media
        finally:
            pool.shutdown(cancel_futures=True)

    def remove_strangers(self, wanted: set[str]) -> None:
        """Delete what an earlier, cut-off build with other settings left, and the notes on sizes."""
        for path in self.folder.iterdir():
            if path.name not in wanted:
                path.unlink()


def _encode_all(
    jobs: _Jobs,
    systems: tuple[str, ...],
    items: Sequence[Item],
    sources: Mapping[str, Mapping[str, Path]],
    settings: BuildSettings,
    faults: list[str],
) -> Study:
    # An item that fewer than two systems have is never shown.
    items = [item for item in items if len(sources[item.id]) > 1]
    pictures = [("picture", path, (item.id, n)) for item in items for n, path in enumerate(item.references)]
    clips = [("video", path, (item.id, s)) for item in items for s, path in sources[item.id].items()]
    random_ = random.Random(f"{settings.seed}/catches")
    spare = random_.sample(clips, min(len(clips), settings.catches * SPARE_CATCHES))
    corrupt = [("corrupt", path, what) for _, path, what in spare]
    work = [*pictures, *clips, *corrupt]
    made: dict[tuple[Any, ...], Media] = {}
    bad_items: set[str] = set()
    for (kind, _, what), media in zip(work, jobs.all(work), strict=True):
        if isinstance(media, Media):
            made[kind, *what] = media
            continue
        if kind == "picture":
            bad_items.add(str(what[0]))
        if kind != "corrupt":
            faults.append(f"{media}; {'the whole item is' if kind == 'picture' else 'it is'} left out")
    videos = {
        item.id: {s: made["video", item.id, s].file for s in systems if ("video", item.id, s) in made}
        for item in items
        if item.id not in bad_items
    }
    videos = {item: files_ for item, files_ in videos.items() if len(files_) > 1}
    catches = [
        Catch(item, system, videos[item][system], made["corrupt", item, system].file)
        for item, system in ((str(what[0]), str(what[1])) for _, _, what in corrupt)
        if system in videos.get(item, {}) and ("corrupt", item, system) in made
    ]
    shown = {file for files_ in videos.values() for file in files_.values()} | {catch.bad for catch in catches}
    return Study(
        title=settings.title.strip(),
        seed=settings.seed,
        systems=systems,
        items={item.id: _item_entry(item, made) for item in items if item.id in videos},
        videos=videos,
        sizes={media.file: (media.width, media.height) for media in made.values() if media.file in shown},
        catches=tuple(catches),
        pairs=settings.pairs,
        repeats=settings.repeats,
        catch_count=settings.catches,
    )


def _item_entry(item: Item, made: Mapping[tuple[Any, ...], Media]) -> dict[str, Any]:
    pictures = [made["picture", item.id, n] for n in range(len(item.references))]
    references = [
        {"file": picture.file, "width": picture.width, "height": picture.height, "label": label}
        for picture, label in zip(pictures, item.labels or [""] * len(pictures), strict=True)
    ]
    return {"prompt": item.prompt, "references": references}


def _write_page(folder: Path, study: Study, settings: BuildSettings) -> None:
    templates = files("idc.study") / "templates"
    questions = min(study.pairs, len(study.comparisons())) + study.repeats + study.catch_count
    intro = settings.intro.strip() or (templates / "intro.txt").read_text(encoding="utf-8")
    intro = Template(intro).safe_substitute(questions=questions, minutes=max(2, round(questions * 0.6)))
    paragraphs = [" ".join(part.split()) for part in intro.split("\n\n") if part.strip()]
    page = Template((templates / "index.html").read_text(encoding="utf-8")).substitute(
        title=escape(study.title),
        study=study.id,
        intro="\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs),
    )
    _write(folder / "index.html", page)
    for name in ("style.css", "app.js"):
        _write(folder / name, (templates / name).read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
