"""`idc report RUN... [--out DIR]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from idc.errors import UserError, counted, make_folder, nearest

if TYPE_CHECKING:
    from idc.report.measure import Measured
    from idc.report.tables import Table

EPILOG = """\
A run folder is the `out` of idc evaluate. Its `system` says which rows it fills; case and punctuation do not matter:
{names}
Table S.7 goes by "lambda" in run.json's columns. --row "NAME=RUN", or --row "S.5:full=RUN" for one table only, says it
by hand; such a run need not be named twice. Runs that differ by the "seed" in run.json's columns alone share a row,
with an interval over seeds. Rows without a run stay blank. Systems that no table knows stand at the end
of table 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `idc report` with the arguments after that word.

    Returns:
        the exit status: 0, or 2 for bad input (on stderr, no traceback).
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return _report(arguments)
    except UserError as error:
        print(f"idc report: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from idc.report.bootstrap import RESAMPLES
    from idc.report.layout import LAYOUTS

    names = {f"  table {layout.number}: " + ", ".join(row.name for row in layout.rows) for layout in LAYOUTS.values()}
    parser = argparse.ArgumentParser(
        prog="idc report",
        description="The paper's tables and a page of videos from the results of idc evaluate.",
        epilog=EPILOG.format(names="\n".join(sorted(names))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders")
    add("--out", type=Path, metavar="DIR", help="write tables and page here (default: Markdown on the screen)")
    add("--table", action="append", metavar="|".join(LAYOUTS), help="may be repeated (default: all)")
    add("--protocol", help="take the runs of this protocol only")
    add("--domain", default="open", help="open: all items; single: one reference; human: one person (default: open)")
    add("--row", action="append", default=[], metavar="NAME=RUN", help="which run fills a row; may be repeated")
    add("--common", action="store_true", help="count only the items that all runs have")
    add("--metric", action="append", default=[], metavar="COLUMN=METRIC", help="read a column from another metric")
    add("--with-published", action="store_true", help="the paper's printed figures beside ours, labelled")
    add("--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap (default: {RESAMPLES})")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add("--no-page", action="store_true", help="tables only")
    add(
        "--videos", choices=("copy", "link"), default="copy", help="the page's videos: in its folder, or where they lie"
    )
    add("--items", type=Path, metavar="FILE", help="items.jsonl or benchmark JSON that names the references")
    add("--title", default="Evaluation", help="of the page")
    add("--link", action="append", default=[], metavar="TEXT=HREF", help="a link at the page's head, e.g. to a study")
    return parser


def _report(arguments: argparse.Namespace) -> int:
    from idc.report.render import FORMATS
    from idc.report.replicates import together
    from idc.report.tables import Assignment, check_one_protocol, fill

    layouts = _layouts(arguments.table)
    _check_numbers(arguments)
    links = _pairs("--link", arguments.link)
    renamed = _columns(_pairs("--metric", arguments.metric))
    rows = _rows(_pairs("--row", arguments.row))
    by_path: dict[Path, Measured] = {}
    for path in [*arguments.runs, *rows.values()]:
        _open_run(Path(path), by_path, arguments, renamed)
    if not by_path and not arguments.with_published:
        raise UserError("no run: name the folders of idc evaluate, or ask for the paper's figures by --with-published")
    kept = check_one_protocol(list(by_path.values()), arguments.protocol)
    for measured in by_path.values():
        if measured not in kept:
            info = measured.run.info
            print(f"idc report: {measured.run.path} left out: protocol {info.protocol}", file=sys.stderr)
    if arguments.common:
        _keep_common(kept)
    named = {name: by_path[Path(path).resolve()] for name, path in rows.items()}
    assignment = Assignment({name: measured for name, measured in named.items() if measured in kept})
    by_hand = [measured for measured in kept if measured in assignment.by_name.values()]
    standing = [*together([measured for measured in kept if measured not in by_hand]), *by_hand]
    tables = [fill(layout, standing, assignment, arguments.domain, arguments.with_published) for layout in layouts]
    if arguments.out is None:
        print("\n".join(FORMATS["md"](table) for table in tables), end="")
        return 0
    _write(arguments, tables, kept, links)
    return 0


def _write(
    arguments: argparse.Namespace, tables: Sequence[Table], kept: Sequence[Measured], links: dict[str, str]
) -> None:
    """The tables in every format, and the page, into `--out`."""
    from idc.report.render import FORMATS

    if not arguments.no_page:
        from idc.report.page import check_page

        check_page(arguments.items, links)
    make_folder(arguments.out)
    for table in tables:
        for suffix, render in FORMATS.items():
            (arguments.out / f"{table.layout.slug}.{suffix}").write_text(render(table), encoding="utf-8")
    print(f"{counted(len(tables), 'table')} -> {arguments.out}")
    if not arguments.no_page:
        from idc.report.page import write_page

        page = write_page(
            arguments.out,
            kept,
            tables,
            title=arguments.title,
            copy_videos=arguments.videos == "copy",
            items=arguments.items,
            links=links,
        )
        print(f"page -> {page}")


def _keep_common(runs: Sequence[Measured]) -> None:
    common = set.intersection(*(set(first.shared_items(other)) for first in runs[:1] for other in runs)) if runs else ()
    for measured in runs:
        measured.keep(common)


def _open_run(path: Path, by_path: dict, arguments: argparse.Namespace, renamed: dict[str, str]) -> None:
    from idc.metrics.results import read_run
    from idc.report.measure import Measured

    key = path.resolve()
    if key not in by_path:
        by_path[key] = Measured(
            read_run(path), arguments.domain, arguments.resamples, arguments.seed, arguments.level, renamed
        )


def _layouts(numbers: list[str] | None):
    from idc.report.layout import LAYOUTS

    if not numbers or "all" in numbers:
        return list(LAYOUTS.values())
    for number in numbers:
        if number not in LAYOUTS:
            raise UserError(f"--table {number}: no such table{nearest(number, [*LAYOUTS, 'all'])}")
    return [layout for number, layout in LAYOUTS.items() if number in numbers]


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.resamples < 1:
        raise UserError(f"--resamples {arguments.resamples}: must be at least 1")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: must be 0 or more")
    if not 0 < arguments.level < 1:
        raise UserError(f"--level {arguments.level:g}: must lie between 0 and 1, such as 0.95")


def _pairs(option: str, values: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not (equals and name.strip() and rest.strip()):
            raise UserError(f"{option} {value}: must be two things with a '=' between them")
        if name.strip() in pairs:
            raise UserError(f"{option} {value}: {name.strip()!r} is given twice")
        pairs[name.strip()] = rest.strip()
    return pairs


def _columns(pairs: dict[str, str]) -> dict[str, str]:
    from idc.report.layout import LAYOUTS

    known = {column.key for layout in LAYOUTS.values() for column in layout.columns} - {"total"}
    for key in pairs:
        if key not in known:
            raise UserError(f"--metric {key}={pairs[key]}: no column {key!r}{nearest(key, known)}")
    return pairs


def _rows(pairs: dict[str, str]) -> dict[str, str]:
    """`--row` with names as `Assignment` keeps them."""
    from idc.report.layout import LAYOUTS, normal_name

    rows = {}
    for name, path in pairs.items():
        number, colon, rest = name.partition(":")
        layouts = [LAYOUTS[number]] if colon and number in LAYOUTS else list(LAYOUTS.values())
        wanted = rest if colon and number in LAYOUTS else name
        known = [title for layout in layouts for row in layout.rows for title in (*row.names, row.title)]
        if normal_name(wanted) not in map(normal_name, known):
            raise UserError(f"--row {name}={path}: no row {wanted!r}{nearest(wanted, known)}")
        rows[(f"{number}:" if wanted is rest else "") + normal_name(wanted)] = path
    return rows


if __name__ == "__main__":
    sys.exit(main())
