"""`idc shards build | index | lint | show | stats | page`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from idc.curate.looking_cli import PAGE, STATS, add_page, add_stats
from idc.errors import UserError

PAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `idc shards` with the arguments after that word.

    Returns:
        the exit status: 0, 1 where `index` or `lint` found something, 2 for bad input (on stderr, no traceback).
    """
    parser = argparse.ArgumentParser(prog="idc shards", description="Build, index, check and look at shards.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        for root in getattr(arguments, "roots", [arguments.root] if "root" in arguments else []):
            _check_folder(root)
        return arguments.run(arguments)
    except UserError as error:
        print(f"idc shards {arguments.command}: {error}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands to a parser; each sets `run`, a function of the parsed arguments."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|index|lint|show|stats|page")
    _add_build(commands.add_parser("build", help="cut a folder of videos into shards"))
    for name, run, text in (
        ("index", _index, "read the tars of a folder and write index.jsonl; status 1 if any sample is bad"),
        ("lint", _lint, "read and decode every sample; status 1 if any is bad"),
        ("show", _show, "list samples and draw them on a page"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("root", metavar="DIR", help="folder of shards, or an fsspec URL")
        command.set_defaults(run=run)
        if name == "index":
            command.add_argument("--source", help="name of the source in the samples' ids (default: the folder's name)")
        if name == "show":
            command.add_argument("--key", help="only the sample with this key")
            command.add_argument("--limit", type=int, default=16, help="at most this many samples (default: 16)")
            command.add_argument("--out", type=Path, metavar="PAGE.png", help="draw frames and references on this page")
    add_stats(commands.add_parser("stats", help=STATS, description=STATS))
    add_page(commands.add_parser("page", help=PAGE, description=PAGE))


def _add_build(parser: argparse.ArgumentParser) -> None:
    from idc.curate.clips import RESIZE, ClipSettings
    from idc.data.video import PIXEL_FORMATS

    defaults = ClipSettings()
    choices = {"resize": RESIZE, "pixel_format": ("auto", *PIXEL_FORMATS)}
    add = parser.add_argument
    add("--videos", type=Path, required=True, metavar="DIR", help="folder of videos, searched recursively")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of shards; a build begun there is continued")
    add("--samples-per-shard", type=int, default=256, help="default: 256")
    add("--workers", type=int, default=1, help="processes (default: 1)")
    add("--limit", type=int, default=0, help="at most this many videos (default: all)")
    texts = {
        "frames": "frames of a sample, 4n + 1",
        "height": "pixels, a multiple of 16",
        "width": "pixels, a multiple of 16",
        "fps": "rate that videos are resampled to",
        "stride": "frames from one window to the next; 0: as many as frames",
        "resize": "crop: fill and crop the centre; short-side: keep the shape",
        "upscale": "take videos smaller than the sample, too",
        "min_face": "least height of a face as a share of the picture's",
        "face_score": "least median confidence of a person's face",
        "max_subjects": "windows with more people are dropped",
        "reference_gap": "least seconds between a window and the moment of its references",
        "reference_size": "side of the square references; 0: the sample's shorter side",
        "keep_without_subjects": "keep windows in which nobody is seen",
        "captions_required": "drop videos without a side-car .txt (else: a neutral caption)",
        "looks_per_second": "how often faces are searched",
        "crf": "x264's quality, 0 to 51",
        "pixel_format": "of the clips; auto: yuv444p under 256 pixels, else yuv420p",
        "licence": "written into every sample",
    }
    for setting in fields(ClipSettings):
        name, value = setting.name, getattr(defaults, setting.name)
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            add(option, action="store_true", help=texts[name])
        else:
            text = f"{texts[name]} (default: {value or repr(value)})"
            add(option, type=type(value), default=value, choices=choices.get(name), help=text)
    parser.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    from idc.curate.build import DROPS, build_shards
    from idc.curate.clips import ClipSettings

    for name in ("samples_per_shard", "workers"):
        _at_least(name, getattr(arguments, name), 1)
    _at_least("limit", arguments.limit, 0)
    settings = ClipSettings(**{f.name: getattr(arguments, f.name) for f in fields(ClipSettings)})
    report = build_shards(
        arguments.videos, arguments.out, settings, arguments.samples_per_shard, arguments.workers, arguments.limit
    )
    done = f" ({report.skipped} of them before)" if report.skipped else ""
    print(f"{report.videos} videos{done} -> {report.samples} samples in {arguments.out}")
    for name in report.changed:
        print(f"  {name} has changed since it was cut; to cut it again, build into another folder")
    if report.index:
        _print_buckets(report.index.buckets())
    if report.drops:
        print(f"{len(report.drops)} dropped (each in {arguments.out / DROPS}):")
        for reason, count in report.reasons().most_common():
            print(f"  {count:6d}  {reason}")
    if not report.samples:
        raise UserError(f"no sample came of {arguments.videos}; the reasons are above")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from idc.data.index import build_index

    index = build_index(arguments.root, arguments.source)
    print(f"{len(index)} samples in {len(index.shards)} shards -> {index.save()}")
    _print_buckets(index.buckets())
    _print_problems(index.problems)
    return 1 if index.problems else 0


def _lint(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from idc.data.lint import lint_shards

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        report = lint_shards(arguments.root, lambda n, total: progress.update(task, completed=n, total=total))
    print(f"{sum(report.buckets.values())} good samples")
    _print_buckets(report.buckets)
    _print_problems(report.problems)
    return 0 if report.ok else 1


def _show(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from idc.data.index import ShardIndex
    from idc.data.shards import SampleError, read_sample
    from idc.errors import nearest

    _at_least("limit", arguments.limit, 1)
    if arguments.out and arguments.out.suffix.lower() not in PAGE_SUFFIXES:
        raise UserError(f"--out {arguments.out}: the page is a picture; give a name ending in .png")
    index = ShardIndex.load(arguments.root)
    entries = [entry for entry in index.entries if arguments.key in (None, entry.key)]
    if not entries:
        hint = nearest(arguments.key, [entry.key for entry in index.entries[:5000]])
        first = ", ".join(repr(entry.key) for entry in index.entries[:3])
        raise UserError(f"no sample {arguments.key!r}{hint if 'did you mean' in hint else f'; the first are {first}'}")
    table = Table(Column("shard/key", overflow="fold", min_width=24), "frames", "size", "fps", "subjects", "caption")
    samples = []
    for entry in entries[: arguments.limit]:
        frames, height, width, subjects = entry.bucket
        try:
            sample = read_sample(arguments.root, entry, decode_video=arguments.out is not None)
            samples.append(sample)
            caption, who = sample.caption, ", ".join(s.name or "?" for s in sample.subjects)
        except SampleError as error:
            caption, who = f"UNREADABLE: {error}", ""
        people = f"{subjects} ({who})" if who else str(subjects)
        table.add_row(f"{entry.shard}/{entry.key}", str(frames), f"{width}x{height}", f"{entry.fps:g}", people, caption)
    Console().print(table)
    if len(entries) > arguments.limit:
        print(f"{arguments.limit} of {len(entries)} samples; --limit shows more")
    if arguments.out:
        _draw(samples, arguments.out)
    return 0


def _draw(samples: Sequence[Any], path: Path) -> None:
    from PIL import Image

    from idc.curate.sheet import contact_sheet

    if not samples:
        raise UserError("no sample could be read, nothing to draw")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(samples)).save(path)
    print(f"-> {path}")


def _check_folder(root: str) -> None:
    if root.endswith(".tar") and not Path(root).is_dir():
        raise UserError(f"{root}: a single shard; give the folder that holds it: {root.rpartition('/')[0] or '.'}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def _print_buckets(buckets: Any) -> None:
    for bucket, count in sorted(buckets.items()):
        frames, height, width, subjects = bucket
        print(f"  {count:6d}  {frames} frames, {width}x{height}, {subjects} subject{'s' * (subjects != 1)}")


def _print_problems(problems: Sequence[Any]) -> None:
    for problem in problems:
        where = "/".join(part for part in (problem.shard, problem.key) if part)
        print(f"  BAD  {where + ': ' if where else ''}{problem.reason}")
    if problems:
        print(f"{len(problems)} problems")


if __name__ == "__main__":
    sys.exit(main())
