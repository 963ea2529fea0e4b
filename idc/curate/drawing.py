"""Parts of figures as SVG, drawn by hand: texts, bars and histograms, told apart by the colour-blind and in print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#B0578D", "#56B4E9", "#8C8C8C"
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',Arial,sans-serif"
STYLE = (
    f"text{{font-family:{FONT};font-size:13px;fill:#222}}"
    ".t{font-size:17px;font-weight:600}.h{font-size:14px;font-weight:600}.s{fill:#5c626c;font-size:12px}"
    ".n{fill:#5c626c;font-size:12px;font-variant-numeric:tabular-nums}.g{stroke:#e6e4e0}.a{stroke:#8a8f98}"
    ".w{fill:#fff;font-weight:600}.m{stroke:#222;stroke-dasharray:4 3}.big{font-size:26px;font-weight:600}"
)
MOST_BINS = 30
FEWEST_BINS = 6


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """An SVG picture on white; `title` is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{xml(title)}">'
    )
    ground = f'<style>{STYLE}</style><rect width="{width:g}" height="{height:g}" fill="#fff"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def xml(words: str) -> str:
    """Words as XML: escaped, without the control characters that it cannot hold."""
    return escape("".join(c for c in words if c.isprintable()))


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", extra: str = "") -> str:
    """Words at a place; `kind` is a class of the style."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{extra}>{xml(words)}</text>'


def bar(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    """A rectangle that says its `title` where the mouse rests on it."""
    inner = f"<title>{xml(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}" fill="{colour}">'
        f"{inner}</rect>"
    )


def shortened(words: str, most: int) -> str:
    """The words, cut to `most` characters."""
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def tint(colour: str, share: float) -> str:
    """A colour mixed with white: 0 leaves it, 1 is white."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and 0.1, 0.2, ...) by which `span` has at most `most` steps."""
    if span <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(span / most))
    return next(scale * factor for factor in (1, 2, 5, 10, 20) if span / (scale * factor) <= most + 1e-9)


def bins(
    values: Mapping[float, int], most: int = MOST_BINS, whole: bool = False
) -> tuple[list[int], float, float, int]:
    """(counts, start, width, beyond): values in equal bins of a round width; those beyond the 99.5% point, where that
    is far from the end, are only counted. `whole`: bins no narrower than 1."""
    ordered = sorted(values.items())
    total = sum(values.values())
    low, high = ordered[0][0], ordered[-1][0]
    passed, end = 0, high
    for value, count in ordered:
        passed += count
        if passed >= 0.995 * total:
            end = value
            break
    if high - low <= 1.5 * (end - low):
        end = high
    width = nice_step(end - low, most)
    width = max(width, 1.0) if whole else width
    start = math.floor(low / width + 1e-9) * width
    counts = [0] * (math.floor((end - start) / width + 1e-9) + 1)
    beyond = 0
    for value, count in ordered:
        place = math.floor((value - start) / width + 1e-9)
        if place < len(counts):
            counts[place] += count
        else:
            beyond += count
    return counts, start, width, beyond


def histogram(
    x: float,
    y: float,
    width: float,
    height: float,
    values: Mapping[float, int],
    title: str,
    unit: str,
    colour: str,
    middle: float | None = None,
    whole: bool = False,
) -> Iterator[str]:
    """A histogram with its axes in the given rectangle, the title above it; a dashed line at the `middle`."""
    counts, start, step, beyond = bins(values, whole=whole)
    counts += [0] * (FEWEST_BINS - len(counts))  # few bins do not become planks
    top, bottom, left = y + 44, y + height - 38, x + 46
    room = x + width - left
    total = sum(values.values())
    yield text(x, y + 14, title, "h")
    note = f"n = {total:,}" + (f", median {middle:g} {unit}" if middle is not None else "")
    yield text(x, y + 31, note + (f"; {beyond:,} beyond the axis" if beyond else ""), "s")
    most = max(counts)
    line = max(1.0, nice_step(most, 4))
    for number in range(math.floor(most / line) + 1):
        level = bottom - (bottom - top) * number * line / most
        yield f'<path class="g" d="M{left:.1f} {level:.1f}H{x + width:.1f}"/>'
        yield text(left - 7, level + 4, f"{number * line:,.0f}", "n", "end")
    pitch = room / len(counts)
    for place, count in enumerate(counts):
        tall = (bottom - top) * count / most
        low = start + place * step
        yield bar(
            left + pitch * place + 0.5, bottom - tall, pitch - 1, tall, colour, f"{low:g}–{low + step:g}: {count:,}"
        )
    ticks = max(step, nice_step(step * len(counts), 7))
    for number in range(math.ceil(start / ticks - 1e-9), math.floor((start + step * len(counts)) / ticks + 1e-9) + 1):
        yield text(left + pitch * (number * ticks - start) / step, bottom + 16, f"{number * ticks:g}", "n", "middle")
    yield f'<path class="a" d="M{left:.1f} {bottom:.1f}H{x + width:.1f}"/>'
    if middle is not None:
        at = left + pitch * min(max((middle - start) / step, 0), len(counts))
        yield f'<path class="m" d="M{at:.1f} {top - 4:.1f}V{bottom:.1f}"/>'
    yield text(left + room / 2, bottom + 32, unit, "s", "middle")


def bars(
    x: float,
    y: float,
    width: float,
    rows: Sequence[tuple[str, int, str]],
    title: str,
    note: str = "",
    label: float = 0.42,
) -> Iterator[str]:
    """Lying bars with their names and counts, 24 pixels a row; (name, count, colour) each.

    Args:
        label: share of the width that the names have.
    """
    yield text(x, y + 14, title, "h")
    if note:
        yield text(x, y + 31, note, "s")
    total, most = sum(count for _, count, _ in rows), max((count for _, count, _ in rows), default=1)
    left = x + width * label
    room = width * (1 - label) - 96
    for number, (name, count, colour) in enumerate(rows):
        top = y + 44 + 24 * number
        yield text(left - 8, top + 13, shortened(name, int(width * label / 6.6)), "", "end")
        yield bar(left, top, max(room * count / most, 1), 17, colour, f"{name}: {count:,}")
        share = f"{count:,}  ({100 * count / max(total, 1):.1f}%)"
        yield text(left + room * count / most + 6, top + 13, share, "n")
