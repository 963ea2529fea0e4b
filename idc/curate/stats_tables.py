"""The statistics of shards as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from idc.curate.scenarios import SCENARIOS
from idc.curate.statistics import UNSAID, Statistics
from idc.curate.tallies import Spread, Tally
from idc.errors import counted

SHOWN = 12  # rows of a list of names


def tables(statistics: Statistics) -> Iterator[Table | str]:
    """Tables and lines in their order; those without content are left out."""
    yield _folders(statistics)
    if statistics.samples:
        yield _table_s8(statistics)
        yield from _contents(statistics)
        yield from _numbers(statistics)
        yield _sizes(statistics)
        assignment = statistics.buckets()
        if assignment is not None:
            yield assignment.table(statistics.batch_size)
    yield from _drops(statistics)
    yield from _warnings(statistics)


def _table(title: str, *columns: str, rows: Iterable[Sequence[Any]] = ()) -> Table:
    """A table whose cells are no markup; a column named ">x" is right-aligned."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    return table


def _folders(statistics: Statistics) -> Table:
    rows = [
        (folder["root"], folder["split"] or "–", folder["samples"], folder["shards"], _size(folder["bytes"]))
        for folder in statistics.folders
    ]
    return _table("Shards", "folder", "split", ">samples", ">shards", ">size", rows=rows)


def _table_s8(statistics: Statistics) -> Table:
    rows = []
    last = None
    for row in statistics.table_s8():
        source = row["source"] if row["source"] != last else ""
        last = row["source"]
        rows.append((source, row["content"], row["quantity"], row["published"] or "–", row["purpose"]))
    columns = ("dataset source", "content type", ">quantity", ">the paper's", "primary purpose")
    return _table("Composition (table S.8)", *columns, rows=rows)


def _contents(statistics: Statistics) -> Iterator[Table]:
    rows = []
    for name in SCENARIOS:
        tally = statistics.scenarios[name]
        if tally.total:
            most = ", ".join(f"{word} {count:,}" for word, count in tally.top(8))
            rows.append(
                (name, tally.total, _share(tally.total, sum(t.total for t in statistics.scenarios.values())), most)
            )
    if rows:
        yield _table("Subjects by scenario (figure S.9)", "scenario", ">subjects", ">share", "most frequent", rows=rows)
    for title, noun, tally in (
        ("Categories", "category", statistics.categories),
        ("Kinds of subjects", "kind", statistics.kinds),
        ("References by origin", "origin", statistics.origins),
        ("Licences", "licence", statistics.licences),
    ):
        if set(tally.counts) - {UNSAID} or noun == "licence":
            yield _table(title, noun, ">count", ">share", rows=_top(tally))
    numbers = [
        (counted(n, "subject"), count, _share(count, statistics.samples))
        for n, count in sorted(statistics.subjects.items())
    ]
    yield _table("Pictured subjects of a clip", "subjects", ">samples", ">share", rows=numbers)
    parts = [(name or "all", *statistics.split(part).values()) for name, part in sorted(statistics.parts.items())]
    lengths = [(name, samples, f"{hours:.2f}", videos or "–") for name, samples, hours, videos in parts]
    yield _table("Splits", "split", ">samples", ">hours", ">source videos", rows=lengths)


def _numbers(statistics: Statistics) -> Iterator[Table]:
    columns = ("", ">count", ">mean", ">min", ">5%", ">25%", ">median", ">75%", ">95%", ">max")
    spreads: dict[str, Spread] = {"seconds a clip": statistics.seconds}
    if len(statistics.sources) > 1:
        spreads |= {f"  {name}": counts.seconds for name, counts in sorted(statistics.sources.items())}
    spreads["words a caption"] = statistics.caption_words
    spreads |= {f"similarity, {name}": spread for name, spread in sorted(statistics.similarity.items())}
    yield _table("Lengths", *columns, rows=_spread_rows(spreads))
    if statistics.scores:
        yield _table("Scores", *columns, rows=_spread_rows(dict(sorted(statistics.scores.items()))))


def _spread_rows(spreads: Mapping[str, Spread]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for name, spread in spreads.items():
        told = spread.to_json()
        if told.pop("count"):
            rows.append((name, spread.count, *(f"{value:.4g}" for value in told.values())))
    return rows


def _sizes(statistics: Statistics) -> Table:
    sizes: Counter[tuple[int, int, int]] = Counter()
    for counts in statistics.sizes.values():
        for bucket, count in counts.items():
            sizes[bucket.frames, bucket.height, bucket.width] += count
    rows = [
        (f"{frames} x {height} x {width}", count, _share(count, statistics.samples))
        for (frames, height, width), count in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]
    if len(rows) > SHOWN:
        rest = sum(sizes.values()) - sum(row[1] for row in rows[:SHOWN])
        rows = [*rows[:SHOWN], (f"{len(rows) - SHOWN} others", rest, _share(rest, statistics.samples))]
    return _table("Sizes (frames x height x width)", "size", ">samples", ">share", rows=rows)


def _drops(statistics: Statistics) -> Iterator[Table | str]:
    if not statistics.dropped:
        return
    rows = [
        (row["step"], row["reason"], row["count"], _share(row["count"], statistics.dropped))
        for row in statistics.drop_rows()
    ]
    yield _table("Dropped", "step", "reason", ">count", ">share", rows=rows)
    read = statistics.samples + statistics.dropped
    yield f"read {read:,} = kept {statistics.samples:,} + dropped {statistics.dropped:,}"


def _warnings(statistics: Statistics) -> Iterator[str]:
    for folder in statistics.folders:
        for problem in folder["problems"]:
            where = "/".join(part for part in (folder["root"], problem["shard"], problem["key"]) if part)
            yield f"NOT IN THE INDEX  {where}: {problem['reason']}"
    for reason, count in statistics.problems.top():
        yield f"{counted(count, 'sample')}: {reason}"
    for (one, two), shared in statistics.shared_videos().items():
        if shared:
            yield f"LEAK  {one} and {two} have {counted(shared, 'source video')} in common"
    for told in statistics.told:
        read, kept, dropped = told.get("read"), told.get("kept"), told.get("dropped")
        if not isinstance(dropped, dict):
            continue
        lost = sum(sum(reasons.values()) for reasons in dropped.values() if isinstance(reasons, dict))
        if (kept, lost) != (statistics.samples, statistics.dropped):
            yield f"counts.json says: read {read} = kept {kept} + dropped {lost}; not all of it lies in these folders"


def _top(tally: Tally) -> list[Sequence[Any]]:
    top = tally.top(SHOWN)
    rows: list[Sequence[Any]] = [(name, count, _share(count, tally.total)) for name, count in top]
    if rest := tally.total - sum(count for _, count in top):
        rows.append(("others", rest, _share(rest, tally.total)))
    return rows


def _size(size: int) -> str:
    place = min(max(len(str(size)) - 1, 0) // 3, 4)
    return f"{size / 1000**place:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[place]}"


def _share(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.1f}%"
