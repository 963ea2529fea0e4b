"""`idc shards stats` and `idc shards page`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from idc.errors import UserError, make_folder, nearest

STATS, PAGE = "what shards hold: table S.8, lengths, scores, buckets, drops", "write a page to leaf through samples"


def add_stats(parser: argparse.ArgumentParser) -> None:
    """The arguments of `idc shards stats`."""
    from idc.curate.statistics import ROLES

    add = parser.add_argument
    _add_roots(parser)
    add("--out", type=Path, metavar="FOLDER", help="write stats.json and the figures S.9 and S.10 (SVG) there")
    add(
        "--buckets",
        action="append",
        default=[],
        metavar="RECIPE.yaml",
        help="what each bucket of this recipe (training or curation) keeps and drops and why; overlays by repeating it",
    )
    add(
        "--role",
        action="append",
        default=[],
        metavar="SOURCE=ROLE",
        help=f"which videos of table S.8 a source gives: {', '.join(ROLES)} (default: as the manifest says)",
    )
    add("--json", action="store_true", help="print JSON in place of tables")
    parser.set_defaults(run=_stats)


def add_page(parser: argparse.ArgumentParser) -> None:
    """The arguments of `idc shards page`."""
    add = parser.add_argument
    _add_roots(parser)
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the page; open its index.html")
    add("--limit", type=int, default=500, help="samples on it, evenly from all (default: 500; 0: all)")
    add("--with-drops", action="store_true", help="show what was dropped and why, too")
    add("--title", default="Shards", help="of the page")
    parser.set_defaults(run=_page)


def _add_roots(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "roots", nargs="+", metavar="DIR", help="folders of shards, or of train/ and held_out/; fsspec URLs"
    )


def _stats(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from idc.curate.looking import Collection
    from idc.curate.statistics import count
    from idc.curate.stats_tables import tables

    rule, batch_size = _buckets(arguments.buckets)
    roles = dict(_role(text) for text in arguments.role)
    if arguments.out:
        make_folder(arguments.out)
    collection = Collection(arguments.roots)
    with _progress("counting", len(collection)) as progress:
        statistics = count(collection, rule, batch_size, roles, progress)
    unknown = sorted(set(roles) - set(statistics.sources))
    if unknown:
        raise UserError(f"--role {unknown[0]}: no such source{nearest(unknown[0], statistics.sources)}")
    if arguments.json:
        print(json.dumps(statistics.to_json(), indent=1, ensure_ascii=False))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 140
        for table in tables(statistics):
            console.print(table, markup=not isinstance(table, str), highlight=False)
    if arguments.out:
        from idc.curate.figures import write_figures

        written = write_figures(statistics, arguments.out)
        if not arguments.json:
            print("\n".join(f"-> {path}" for path in written))
    return 0


def _page(arguments: argparse.Namespace) -> int:
    from idc.curate.looking import Collection
    from idc.curate.page import write_page

    if arguments.limit < 0:
        raise UserError(f"--limit {arguments.limit}: must be at least 0; 0 shows all")
    make_folder(arguments.out)
    collection = Collection(arguments.roots)
    total = min(arguments.limit or len(collection), len(collection))
    with _progress("page", total) as progress:
        index = write_page(arguments.out, collection, arguments.limit, arguments.with_drops, arguments.title, progress)
    print(f"{total} of {len(collection)} samples -> {index}")
    return 0


def _buckets(recipes: Sequence[str]) -> tuple[Any, int]:
    """The rule and the batch size of a recipe: its data module's, or of a recipe of curation its buckets with a batch
    size of 1; (None, 1) without a recipe."""
    from idc.data.buckets import BucketRule
    from idc.recipes import merged

    if not recipes:
        return None, 1
    settings = merged([part for path in recipes for part in ("--config", path)])
    data = settings.get("data")
    data = data.get("init_args", data) if isinstance(data, dict) else {}
    buckets = isinstance(data, dict) and data.get("buckets")
    if not buckets:
        buckets, data = _of_curation(settings), {}
    if not buckets:
        raise UserError(
            f"--buckets {' '.join(recipes)}: names no data.init_args.buckets, as a recipe of training does, and no "
            "common.buckets, as one of curation does; a list of [frames, height, width], such as [[81, 480, 832]]"
        )
    limits = {name: data[name] for name in ("max_subjects", "max_upscale", "max_crop") if name in data}
    try:
        return BucketRule(buckets, **limits), int(data.get("batch_size", 1))
    except TypeError as error:
        raise UserError(f"--buckets {' '.join(recipes)}: {error}") from None


def _of_curation(settings: Mapping[str, Any]) -> Any:
    """The buckets that a recipe of curation cuts clips to, or that an overlay over one gives; None without any."""
    steps, common = settings.get("steps"), settings.get("common")
    for step in steps if isinstance(steps, list) else []:
        own = step.get("init_args") if isinstance(step, dict) else None
        buckets = own.get("buckets") if isinstance(own, dict) else None
        if buckets and not isinstance(buckets, str):  # a string stands for what is in common
            return buckets
    return common.get("buckets") if isinstance(common, dict) else None


def _role(text: str) -> tuple[str, str]:
    from idc.curate.statistics import ROLES

    source, _, role = text.rpartition("=")
    if not source or role not in ROLES:
        raise UserError(f"--role {text}: must be SOURCE=ROLE{nearest(role, ROLES)}")
    return source, role


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
