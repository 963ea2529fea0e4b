"""Figures of shards: S.9 and S.10 of the paper, and what its text tells of besides, as SVG.

Equal counts give equal files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from idc.curate.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    bar,
    bars,
    document,
    histogram,
    shortened,
    text,
    tint,
    xml,
)
from idc.curate.scenarios import ENVIRONMENT, HUMAN, NATURE, OBJECTS, SCENARIOS, scenario_of_word
from idc.curate.statistics import Statistics
from idc.curate.tallies import Tally
from idc.curate.wordcloud import place_words
from idc.errors import counted

COLOURS = {HUMAN: BLUE, OBJECTS: ORANGE, ENVIRONMENT: PURPLE, NATURE: GREEN}
OTHER = "#5c626c"  # of words that are no nouns that the lists know
NAMED = 9  # subcategories of a scenario that are named; the rest are one slice
SOURCES = 6  # that have a histogram of their own
WORDS = 130
STATS, S9, S10, COUNTS = "stats.json", "figure_s9.svg", "figure_s10.svg", "figure_counts.svg"


def write_figures(statistics: Statistics, out: Path) -> list[Path]:
    """Write stats.json, figure_s9.svg, figure_s10.svg and figure_counts.svg into a folder that is there."""
    told = json.dumps(statistics.to_json(), indent=1, ensure_ascii=False) + "\n"
    drawn = {STATS: told, S9: figure_s9(statistics), S10: figure_s10(statistics), COUNTS: figure_counts(statistics)}
    for name, content in drawn.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in drawn]


# Figure S.9 ---------------------------------------------------------------------------------------------------------


def figure_s9(statistics: Statistics) -> str:
    """Subjects by scenario and by what they are: two rings, and the same as lists."""
    total = sum(tally.total for tally in statistics.scenarios.values())
    parts = [
        text(40, 40, "Subjects by scenario", "t"),
        text(40, 60, f"{total:,} subjects in {statistics.samples:,} samples", "s"),
    ]
    if total:
        parts += _rings(statistics, 300, 350, total)
        parts += _lists(statistics, total)
    else:
        parts.append(text(40, 110, "No subject is named in these shards."))
    return document(980, 650, f"Subjects by scenario, {total:,} in all", parts)


def _rings(statistics: Statistics, x: float, y: float, total: int) -> Iterator[str]:
    turn = 0.0
    for name in SCENARIOS:
        tally, colour = statistics.scenarios[name], COLOURS[name]
        if not tally.total:
            continue
        share = tally.total / total
        yield _slice(x, y, 78, 160, turn, turn + share, colour, f"{name}: {tally.total:,} ({100 * share:.1f}%)")
        if share > 0.05:
            yield _along(x, y, 119, turn + share / 2, name, "w", upright=True)
        inner = turn
        for number, (word, count) in enumerate(_slices(tally)):
            part = count / total
            shade = tint(colour, 0.25 + 0.5 * number / (NAMED + 1)) if word != "others" else tint(colour, 0.82)
            yield _slice(x, y, 162, 250, inner, inner + part, shade, f"{word}: {count:,} ({100 * part:.1f}%)")
            if part > 0.013:
                yield _along(x, y, 206, inner + part / 2, shortened(word, 13), "", upright=False)
            inner += part
        turn += share
    yield text(x, y + 4, f"{total:,}", "big", "middle")
    yield text(x, y + 26, "subjects" if total > 1 else "subject", "s", "middle")


def _slices(tally: Tally) -> list[tuple[str, int]]:
    top = tally.top(NAMED)
    rest = tally.total - sum(count for _, count in top)
    return [*top, ("others", rest)] if rest else top


def _slice(x: float, y: float, inner: float, outer: float, start: float, end: float, colour: str, title: str) -> str:
    """A piece of a ring between two shares of the turn, from the top clockwise."""
    if end - start > 0.9999:  # an arc from a point to itself is none
        ring = "".join(
            f"M{x:.1f} {y - r:.1f}A{r} {r} 0 1 {way} {x:.1f} {y + r:.1f}A{r} {r} 0 1 {way} {x:.1f} {y - r:.1f}Z"
            for r, way in ((outer, 1), (inner, 0))
        )
        return f'<path d="{ring}" fill="{colour}"><title>{xml(title)}</title></path>'
    points = [_point(x, y, r, share) for r, share in ((outer, start), (outer, end), (inner, end), (inner, start))]
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = points
    large = int(end - start > 0.5)
    path = (
        f"M{ax:.2f} {ay:.2f}A{outer} {outer} 0 {large} 1 {bx:.2f} {by:.2f}"
        f"L{cx:.2f} {cy:.2f}A{inner} {inner} 0 {large} 0 {dx:.2f} {dy:.2f}Z"
    )
    return f'<path d="{path}" fill="{colour}" stroke="#fff" stroke-width="1.5"><title>{xml(title)}</title></path>'


def _along(x: float, y: float, radius: float, share: float, words: str, kind: str, upright: bool) -> str:
    """Words in the middle of a slice: level, or along the radius."""
    px, py = _point(x, y, radius, share)
    if upright:
        return text(px, py + 4, words, kind, "middle")
    angle = 360 * share - 90
    angle += 180 if 90 < angle % 360 < 270 else 0
    return text(px, py + 4, words, kind, "middle", f' transform="rotate({angle:.1f} {px:.1f} {py:.1f})"')


def _point(x: float, y: float, radius: float, share: float) -> tuple[float, float]:
    angle = 2 * math.pi * share
    return x + radius * math.sin(angle), y - radius * math.cos(angle)


def _lists(statistics: Statistics, total: int) -> Iterator[str]:
    y = 96.0
    for name in SCENARIOS:
        tally = statistics.scenarios[name]
        if not tally.total:
            continue
        yield bar(610, y - 11, 13, 13, COLOURS[name])
        yield text(631, y, f"{name}  {tally.total:,}  ({100 * tally.total / total:.1f}%)", "h")
        words = ", ".join(f"{shortened(word, 24)} {count:,}" for word, count in tally.top(NAMED))
        for line in _lines(words, 50)[:4]:
            y += 19
            yield text(631, y, line)
        kinds = counted(len(tally.counts), "subcategory").replace("subcategorys", "subcategories")
        yield text(631, y + 19, kinds, "s")
        y += 52


def _lines(words: str, most: int) -> list[str]:
    lines = [""]
    for part in words.split(", "):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part + ", "
    return [*(line.rstrip() for line in lines[:-1]), lines[-1].rstrip(", ")]


# Figure S.10 --------------------------------------------------------------------------------------------------------


def figure_s10(statistics: Statistics) -> str:
    """(a) A word cloud of the references' names, of the captions where there are none; then durations by source."""
    tally, of = (statistics.names, "references") if statistics.names.total else (statistics.words, "captions")
    width, cloud = 980, 330
    parts = [text(40, 36, f"(a) Words of the {of}", "t")]
    placed = place_words(tally.top(WORDS), width - 80, cloud)
    for word in placed:
        fit = (
            f' style="font-size:{word.size:.1f}px;font-weight:600;fill:{_word_colour(word.word)}"'
            f' textLength="{word.width:.1f}" lengthAdjust="spacingAndGlyphs"'
        )
        parts.append(text(40 + word.x, 56 + word.y, word.word, "", "start", fit))
    if not placed:
        parts.append(text(40, 80, "No words."))
    top = 56 + cloud + 40
    x = 40.0
    for name, colour in [*COLOURS.items(), ("other words", OTHER)] if placed else ():
        parts += [bar(x, top - 31, 11, 11, colour), text(x + 17, top - 21, name, "s")]
        x += 40 + 7 * len(name)
    sources = [(name, counts.seconds) for name, counts in statistics.sources.items() if counts.seconds.count]
    sources.sort(key=lambda item: (-item[1].count, item[0]))
    for number, (name, spread) in enumerate(sources[:SOURCES]):
        place = 40 + 470 * (number % 2), top + 12 + 250 * (number // 2)
        title = f"({chr(ord('b') + number)}) Durations, {shortened(name, 36)}"
        parts += histogram(*place, 430, 232, spread.values, title, "s", BLUE, spread.quantile(0.5))
    rows = -(-min(len(sources), SOURCES) // 2)
    if len(sources) > SOURCES:
        parts.append(
            text(40, top + 250 * rows + 8, f"and {counted(len(sources) - SOURCES, 'source')} of fewer clips", "s")
        )
    return document(width, top + 250 * rows + 30, "Words and durations", parts)


def _word_colour(word: str) -> str:
    return COLOURS.get(scenario_of_word(word) or "", OTHER)


# What the text tells of ---------------------------------------------------------------------------------------------


def figure_counts(statistics: Statistics) -> str:
    """Words a caption, subjects a clip, sizes or buckets, origins, and what was dropped and why."""
    parts = [text(40, 36, "What the shards hold", "t")]
    if statistics.samples:
        words = statistics.caption_words
        parts += histogram(
            40, 60, 430, 232, words.values, "Words a caption", "words", BLUE, words.quantile(0.5), whole=True
        )
        numbers = [(counted(n, "subject"), count, BLUE) for n, count in sorted(statistics.subjects.items())[:8]]
        parts += bars(510, 60, 430, numbers, "Pictured subjects of a clip", label=0.25)
    left = right = 320.0
    kept, why = _bucket_rows(statistics)
    origins = [
        (name, count, GREEN if name.startswith("generated") else BLUE) for name, count in statistics.origins.top(8)
    ]
    dropped = [(f"{row['step']}: {row['reason']}", row["count"], ORANGE) for row in statistics.drop_rows()[:12]]
    if kept:
        parts += bars(
            40, left, 430, kept, "Buckets of training" if statistics.rule else "Sizes", "frames x height x width"
        )
        left += 24 * len(kept) + 84
    if origins:
        parts += bars(510, right, 430, origins, "References by origin")
        right += 24 * len(origins) + 84
    y = max(left, right)
    if why:
        parts += bars(40, y, 900, why, "Samples that no bucket takes", label=0.55)
        y += 24 * len(why) + 84
    if dropped:
        read = statistics.samples + statistics.dropped
        note = f"read {read:,} = kept {statistics.samples:,} + dropped {statistics.dropped:,}"
        parts += bars(40, y, 900, dropped, "Dropped by curation", note, label=0.45)
        y += 24 * len(dropped) + 84
    return document(980, y, "Captions, subjects, buckets and drops", parts)


def _bucket_rows(statistics: Statistics) -> tuple[list[tuple[str, int, str]], list[tuple[str, int, str]]]:
    """(bars of buckets or sizes, bars of the reasons of samples that have no bucket)."""
    sizes: dict[str, int] = {}
    reasons: dict[str, int] = {}
    assignment = statistics.buckets()
    counts = assignment.kept if assignment else statistics.sizes
    for found in counts.values():
        for bucket, count in found.items():
            name = f"{bucket.frames} x {bucket.height} x {bucket.width}"
            sizes[name] = sizes.get(name, 0) + count
    for dropped in assignment.dropped.values() if assignment else ():
        for reason, count in dropped.items():
            reasons[reason] = reasons.get(reason, 0) + count
    ordered = [sorted(rows.items(), key=lambda item: (-item[1], item[0])) for rows in (sizes, reasons)]
    colours = (SKY if statistics.rule is None else BLUE, GREY)
    kept, why = (
        [(name, count, colour) for name, count in rows[:10]] for rows, colour in zip(ordered, colours, strict=True)
    )
    return kept, why
