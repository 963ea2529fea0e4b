"""Figure S.13 as SVG: for each criterion how often each system is the best of all, and how its comparisons ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from idc.errors import counted
from idc.study.analysis import Analysis, CriterionResult, SystemResult

WIDTH = 900
LEFT, RIGHT, TOP = 56, 66, 92
PANEL = 260
GAP = 84
# Okabe and Ito's palette: told apart by the colour-blind, in print and on dark and light ground.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#B8A800")
STYLE = (
    "text{font-family:system-ui,-apple-system,'Liberation Sans',Arial,sans-serif;font-size:13px;fill:#222}"
    ".t{font-size:16px;font-weight:600}.s{fill:#666;font-size:12px}.g{stroke:#ddd}.w{stroke:#222;stroke-width:1.4}"
    ".c{stroke:#b3261e;stroke-dasharray:5 4}.v{font-size:11px;paint-order:stroke;stroke:#fff;stroke-width:3px}"
)


def draw_figure(analysis: Analysis, ours: str) -> str:
    """The figure, `ours` first: above, shares of "best of all" (or of pairwise preference where strengths cannot be
    had) with 95% intervals; below, won, undecided and lost comparisons."""
    results = analysis.criteria
    names = [system.system for system in results[0].systems]
    order = [ours, *(name for name in names if name != ours)]
    has_best = any(system.best is not None for result in results for system in result.systems)
    legend_rows = -(-len(order) // 5)
    top = TOP + 22 * legend_rows
    second = top + PANEL + GAP
    height = second + PANEL + 64
    raters = counted(analysis.raters.answered - len(analysis.raters.excluded), "rater")
    who = f"{raters}, {counted(sum(r.answers for r in results), 'answer')}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Human preference study">',
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(LEFT, 30, "Human preference study", "t"),
        _text(LEFT, 50, f"{who}; whiskers: 95% intervals", "s"),
        *_legend(order),
        *_panel(results, order, top, best=has_best),
        *_outcomes(results, order, second),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend(order: Sequence[str]) -> Iterator[str]:
    step = (WIDTH - LEFT - RIGHT) / 5
    for n, name in enumerate(order):
        x, y = LEFT + step * (n % 5), 64 + 22 * (n // 5)
        yield f'<rect x="{x:.0f}" y="{y}" width="13" height="13" rx="2" fill="{COLOURS[n % len(COLOURS)]}"/>'
        yield _text(x + 19, y + 11, name if len(name) < 22 else name[:20] + "…")


def _panel(results: Sequence[CriterionResult], order: Sequence[str], top: float, best: bool) -> Iterator[str]:
    title = f"Chosen as the best of {len(order)} (Bradley-Terry)" if best else "Preferred in a comparison (ties half)"
    chance = 1 / len(order) if best else 0.5
    yield _text(LEFT, top - 12, title, "t")
    yield from _axis(top)
    y = top + PANEL * (1 - chance)
    yield f'<path class="c" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    yield _text(WIDTH - RIGHT + 6, y + 4, "chance", "s")
    for slot, result in enumerate(results):
        for n, system, x, width in _bars(result, order, slot):
            share, interval = (system.best, system.best_interval) if best else (system.share, system.share_interval)
            if share is None:
                yield _text(x + width / 2, top + PANEL - 4, "?", "v", "middle")
                continue
            y = top + PANEL * (1 - share)
            colour = COLOURS[n % len(COLOURS)]
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{PANEL * share:.1f}" fill="{colour}"/>'
            label = y
            if interval:
                low, high = (top + PANEL * (1 - end) for end in interval)
                label, middle = high, x + width / 2
                cap = min(4.0, width / 3)
                ends = "".join(f"M{middle - cap:.1f} {end:.1f}h{2 * cap:.1f}" for end in (low, high))
                yield f'<path class="w" fill="none" d="M{middle:.1f} {low:.1f}V{high:.1f}{ends}"/>'
            yield _text(x + width / 2, label - 4, f"{100 * share:.0f}", "v", "middle")
    yield from _names(results, top)


def _outcomes(results: Sequence[CriterionResult], order: Sequence[str], top: float) -> Iterator[str]:
    yield _text(LEFT, top - 12, "Comparisons won (solid), undecided (light), lost (white)", "t")
    yield from _axis(top)
    for slot, result in enumerate(results):
        for n, system, x, width in _bars(result, order, slot):
            total = max(1, system.comparisons)
            won, undecided = PANEL * system.wins / total, PANEL * system.ties / total
            colour, base = COLOURS[n % len(COLOURS)], top + PANEL
            rectangle = f'<rect x="{x:.1f}" width="{width:.1f}" '
            yield f'{rectangle}y="{base - won:.1f}" height="{won:.1f}" fill="{colour}"/>'
            light = f'fill="{colour}" opacity=".35"/>'
            yield f'{rectangle}y="{base - won - undecided:.1f}" height="{undecided:.1f}" {light}'
            if system.comparisons:
                yield f'{rectangle}y="{top}" height="{PANEL}" fill="none" stroke="{colour}"/>'
    yield from _names(results, top)


def _bars(result: CriterionResult, order: Sequence[str], slot: int) -> Iterator[tuple[int, SystemResult, float, float]]:
    """(place in the order, system, left edge, width) of each bar of a criterion."""
    by_name = {system.system: system for system in result.systems}
    room = (WIDTH - LEFT - RIGHT) / 4
    pitch = room * 0.84 / len(order)
    for n, name in enumerate(order):
        yield n, by_name[name], LEFT + room * (slot + 0.08) + pitch * n, min(pitch * 0.82, 60)


def _axis(top: float) -> Iterator[str]:
    for percent in range(0, 101, 20):
        y = top + PANEL * (1 - percent / 100)
        yield f'<path class="g" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield _text(LEFT - 8, y + 4, f"{percent}%", "s", "end")


def _names(results: Sequence[CriterionResult], top: float) -> Iterator[str]:
    room = (WIDTH - LEFT - RIGHT) / 4
    for slot, result in enumerate(results):
        x = LEFT + room * (slot + 0.5)
        yield _text(x, top + PANEL + 22, result.title, "", "middle")
        yield _text(x, top + PANEL + 38, counted(result.answers, "answer"), "s", "middle")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
