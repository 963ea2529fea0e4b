"""`idc study build | serve | report`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from idc.errors import UserError, counted

INCOMPLETE = 3  # exit status: done, with something on record as left out
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `idc study` with the arguments after that word.

    Returns:
        the exit status: 0, 2 for bad input (on stderr, no traceback), 3 where it is done but `build` had to leave
        something out or `report` had nobody's answers to count.
    """
    parser = argparse.ArgumentParser(prog="idc study", description="Ask people which videos are better.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"idc study {arguments.command}: {error}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three commands to a parser; each sets `run`, a function of the parsed arguments."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|serve|report")
    _add_build(commands.add_parser("build", help="make a blind questionnaire from folders of videos"))
    serve = commands.add_parser("serve", help="show the questionnaire and collect answers in DIR/answers.sqlite")
    serve.add_argument("study", type=Path, metavar="DIR", help="what idc study build made")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for phones in the same network"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 picks a free one (default: 8000)")
    serve.add_argument("--max-raters", type=int, default=10_000, help="how many may take part (default: 10000)")
    serve.set_defaults(run=_serve)
    report = commands.add_parser("report", help="preference shares, Bradley-Terry strengths, agreement, figure S.13")
    report.add_argument("study", type=Path, metavar="DIR", help="the study, which may still be served")
    report.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: DIR/report)")
    report.add_argument(
        "--ours", default="", metavar="NAME", help="system compared with each other one (default: the first)"
    )
    report.add_argument(
        "--catch-pass",
        type=float,
        default=0.75,
        help="raters with a smaller share of right catch answers are left out (default: 0.75)",
    )
    report.add_argument("--draws", type=int, default=2000, help="bootstrap samples (default: 2000)")
    report.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    report.set_defaults(run=_report)


def _add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--videos",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a system and its folder of <id>.mp4; once for each system, ours first",
    )
    add("--items", type=Path, required=True, metavar="FILE", help="items.jsonl, or a benchmark's .json")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    add("--seed", type=int, default=0, help="fixes names, order, sides and what is repeated (default: 0)")
    add("--pairs", type=int, default=12, help="comparisons for each rater (default: 12)")
    add("--repeats", type=int, default=2, help="of these, how many come again with their sides swapped (default: 2)")
    add("--catches", type=int, default=2, help="questions for each rater with a known answer (default: 2)")
    add("--height", type=int, default=0, help="of all videos, where systems differ in size; 0: as they are (default)")
    add("--title", default="Which video is better?", help="of the page")
    add("--intro", type=Path, metavar="FILE", help="text that raters read and consent to, instead of the usual one")
    add("--workers", type=int, default=0, help="videos encoded at a time; 0: one for each core (default)")
    parser.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from idc.study.build import BuildSettings, build_study

    names = ("seed", "pairs", "repeats", "catches", "height", "title", "workers")
    settings = BuildSettings(intro=_read_intro(arguments.intro), **{name: getattr(arguments, name) for name in names})
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("copying", total=None)
        report = build_study(
            _parse_videos(arguments.videos),
            arguments.items,
            arguments.out,
            settings,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    study = report.study
    comparisons = len(study.comparisons())
    sizes = (len(study.items), "item"), (len(study.systems), "system"), (comparisons, "comparison")
    print(f"{', '.join(counted(*size) for size in sizes)} -> {arguments.out}")
    each = min(study.pairs, comparisons)
    raters = -(-comparisons // each)
    print(f"{each} for each rater; {counted(raters, 'rater')} answer{'s' * (raters == 1)} each comparison once")
    for fault in report.faults:
        print(f"  LEFT OUT  {fault}", file=sys.stderr)
    print(f"next: idc study serve {arguments.out}")
    return INCOMPLETE if report.faults else 0


def _parse_videos(values: Sequence[str]) -> dict[str, Path]:
    videos: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or not name.strip() or not folder:
            raise UserError(f"--videos {value}: must be NAME=DIR, such as ours={value or 'runs/ours/videos'}")
        if name.strip() in videos:
            raise UserError(f"--videos {value}: the name {name.strip()!r} is there twice; each system has its own")
        videos[name.strip()] = Path(folder)
    return videos


def _read_intro(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--intro {path}: cannot be read as text ({error})") from error
    if not text:
        raise UserError(f"--intro {path}: is empty; raters must read what they consent to")
    return text


def _serve(arguments: argparse.Namespace) -> int:
    from idc.study.serve import StudyServer

    if arguments.max_raters < 1:
        raise UserError(f"--max-raters {arguments.max_raters}: must be at least 1")
    with StudyServer(arguments.study, arguments.host, arguments.port, arguments.max_raters) as server:
        port = server.server_address[1]
        print(f"http://{arguments.host}:{port}/  (Ctrl-C ends; answers are kept in {server.store.path})", flush=True)
        if arguments.host not in LOOPBACK:
            print("others can reach it, without encryption: on the open internet, put a proxy with TLS before it")
        # A supervisor's polite end is the same as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            joined, finished = server.store.counts()
            have = f"{counted(joined, 'rater')} {'has' if joined == 1 else 'have'} joined"
            print(f"\n{have}, {finished} finished; idc study report {arguments.study} tells more")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from idc.study.analysis import AnalysisSettings
    from idc.study.report import nothing_counts, report_study

    settings = AnalysisSettings(arguments.catch_pass, arguments.draws, arguments.seed)
    out = arguments.out or arguments.study / "report"
    analysis, text = report_study(arguments.study, out, arguments.ours, settings)
    print(text)
    print(f"-> {out}")
    if why := nothing_counts(analysis):
        print(f"idc study report: {why}", file=sys.stderr)
        return INCOMPLETE
    return 0
