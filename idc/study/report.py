"""The study's report: Markdown to read, CSV and JSON to count on, and the figure."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from idc.errors import UserError, counted, make_folder, nearest
from idc.study.agreement import Agreement, Interval, Share
from idc.study.analysis import Analysis, AnalysisSettings, CriterionResult, analyse
from idc.study.figure import draw_figure
from idc.study.questions import ANSWERS, Study, read_study
from idc.study.store import Answer, Store

# Share of answers that chose the paper's own model, the best of five (figure S.13: 200 questionnaires, 30 people).
PAPER = {"aesthetics": 0.54, "identity": 0.60, "quality": 0.43, "motion": 0.65}


def report_study(
    folder: Path, out: Path, ours: str = "", settings: AnalysisSettings | None = None
) -> tuple[Analysis, str]:
    """Analyse a study and write `report.md`, `report.json`, `shares.csv`, `pairs.csv`, `answers.csv` and `figure.svg`.

    May be called while the study is being served.

    Args:
        ours: the system that the head-to-head table is about; the first of the study where "".

    Returns:
        the analysis, and the report as Markdown.

    Raises:
        UserError: if there is no study, no answer, or no such system.
    """
    study = read_study(folder)
    ours = ours or study.systems[0]
    if ours not in study.systems:
        raise UserError(f"--ours {ours!r}: is no system of this study{nearest(ours, study.systems)}")
    if not (folder / ANSWERS).is_file():
        raise UserError(f"{folder}: nobody has answered yet; idc study serve {folder} collects answers")
    with closing(Store(folder / ANSWERS, study)) as store:
        answers, (joined, finished) = store.answers(), store.counts()
    if not answers:
        have = f"{counted(joined, 'rater')} {'has' if joined == 1 else 'have'} joined"
        raise UserError(f"{folder}: {have}, none has answered yet")
    analysis = analyse(study, answers, joined, finished, settings)
    text = markdown(study, analysis, ours)
    make_folder(out)
    for name, content in (
        ("report.md", text),
        ("report.json", json.dumps(asdict(analysis), indent=1, default=str) + "\n"),
        ("shares.csv", _csv(_share_rows(analysis.criteria))),
        ("pairs.csv", _csv(_pair_rows(analysis.criteria))),
        ("answers.csv", _csv(_answer_rows(answers, set(analysis.raters.excluded)))),
        ("figure.svg", draw_figure(analysis, ours)),
    ):
        aside = out / f".{name}.new"
        aside.write_text(content, encoding="utf-8")
        os.replace(aside, out / name)
    return analysis, text


def markdown(study: Study, analysis: Analysis, ours: str) -> str:
    """The report as Markdown."""
    everyone = {result.criterion: result for result in analysis.everyone}
    nothing = nothing_counts(analysis)
    parts = [
        f"# {study.title}",
        f"**{nothing}.**" if nothing else "",
        *_raters(analysis),
        "![shares of preference](figure.svg)",
    ]
    for result in analysis.criteria:
        parts += [f"## {result.title}", _systems_table(result, everyone[result.criterion], analysis), _note(result)]
        parts += [_head_to_head(result, ours), f"Agreement of raters: {_agreement(result.agreement)}."]
    parts += ["## Beside the paper", _paper_table(study, analysis, ours), "## How to read this", *_method(analysis)]
    return "\n\n".join(part for part in parts if part) + "\n"


def nothing_counts(analysis: Analysis) -> str:
    """Why all tables are blank, or "" where they are not."""
    if any(result.answers for result in analysis.criteria):
        return ""
    left_out, raters = len(analysis.raters.excluded), counted(analysis.raters.answered, "rater")
    if left_out == analysis.raters.answered:
        rule = f"fewer than {analysis.settings.catch_pass:.0%} of the catch answers right"
        return f"no answer counts, all tables are blank: {raters} answered, all left out ({rule}; --catch-pass sets it)"
    skipped = "those who were kept skipped all that they compared, or compared nothing"
    return f"no answer counts, all tables are blank: {raters} answered, {left_out} left out; {skipped}"


def _raters(analysis: Analysis) -> list[str]:
    raters, consistency = analysis.raters, analysis.consistency
    excluded = "; ".join(f"rater {r}: {s.hits} of {s.count} right" for r, s in raters.excluded.items())
    lines = [
        f"{counted(raters.joined, 'rater')} joined, {raters.answered} answered, {raters.finished} finished.",
        f"{len(raters.excluded)} left out, for less than {analysis.settings.catch_pass:.0%} of their catch answers "
        f"right{f' ({excluded})' if excluded else ''}; {raters.unchecked} kept without an answered catch question.",
        f"Catch answers right, of all raters: {_share(analysis.catches)}.",
        f"Repeated questions answered the same: {_share(consistency.same)}; the opposite: "
        f"{_share(consistency.reversed)}.",
        f"Left side preferred: {_share(analysis.left)} of the answers that prefer one.",
        f"Agreement of raters over all criteria: {_agreement(analysis.agreement)}.",
    ]
    if analysis.median_seconds is not None:
        lines.append(f"Median time on a question: {analysis.median_seconds:.0f} s.")
    if analysis.skipped:
        lines.append(f"{counted(analysis.skipped, 'question')} skipped because the videos did not play.")
    return ["\n".join(f"- {line}" for line in lines)]


def _systems_table(result: CriterionResult, everyone: CriterionResult, analysis: Analysis) -> str:
    head = ["system", "comparisons", "won", "undecided", "lost", "preferred", "Bradley-Terry", "best of all"]
    with_all = bool(analysis.raters.excluded)
    rows = []
    for system, of_all in zip(result.systems, everyone.systems, strict=True):
        counts = (system.comparisons, system.wins, system.ties, system.losses)
        row = [system.system, *map(str, counts), _percent(system.share, system.share_interval)]
        row += [_number(system.strength, system.strength_interval), _percent(system.best, system.best_interval)]
        if with_all:
            row += [_percent(of_all.share, None), str(of_all.comparisons)]
        rows.append(row)
    return _table([*head, *(["preferred, all raters", "comparisons, all raters"] if with_all else [])], rows)


def _note(result: CriterionResult) -> str:
    return f"Bradley-Terry: {result.note}." if result.note else ""


def _head_to_head(result: CriterionResult, ours: str) -> str:
    rows = []
    for pair in result.pairs:
        if ours in (pair.a, pair.b):
            other, won, lost = (pair.b, pair.wins, pair.losses) if pair.a == ours else (pair.a, pair.losses, pair.wins)
            total = won + pair.ties + lost
            shares = [f"{100 * n / total:.1f}%" if total else "" for n in (won, pair.ties, lost)]
            rows.append([f"{ours} against {other}", str(total), *shares])
    return _table(["", "comparisons", "preferred", "no difference", "not preferred"], rows)


def _paper_table(study: Study, analysis: Analysis, ours: str) -> str:
    rows = []
    for result in analysis.criteria:
        best = next(system for system in result.systems if system.system == ours)
        here = _percent(best.best, best.best_interval)
        rows.append([result.title, here, f"{PAPER[result.criterion]:.0%}"])
    return _table(["", f"{ours}: best of {len(study.systems)}", "printed in figure S.13: best of 5"], rows)


def _method(analysis: Analysis) -> list[str]:
    clusters = {
        "raters": "over raters, each with all their answers",
        "answers": "over single answers, because there are fewer than five raters: too narrow if raters differ",
    }[analysis.clusters]
    lines = [
        "Repeated and catch questions count nowhere but in the lines on consistency and catches.",
        '"Preferred" is (won + undecided / 2) / comparisons; 50% is even.',
        "Bradley-Terry gives log strengths with mean 0; a difference of 1 is odds of 2.7 to 1. "
        '"No difference" is half a win for each side.',
        '"Best of all" is the share of choices that a system would get if all stood side by side, by Luce\'s axiom '
        "from the strengths. The paper asked that question directly.",
        f"Intervals are 95% percentiles of {analysis.settings.draws} bootstrap samples {clusters}; those of shares "
        "of catches, repeats and sides are Wilson's.",
        "Agreement is Krippendorff's nominal alpha: 1 is full agreement, 0 what chance gives.",
    ]
    return ["\n".join(f"- {line}" for line in lines)]


def _share_rows(criteria: Sequence[CriterionResult]) -> Iterable[Sequence[object]]:
    yield (
        *("criterion", "system", "comparisons", "won", "undecided", "lost", "preferred", "preferred_low"),
        *("preferred_high", "strength", "strength_low", "strength_high", "best", "best_low", "best_high"),
    )
    for result in criteria:
        for s in result.systems:
            yield (
                *(result.criterion, s.system, s.comparisons, s.wins, s.ties, s.losses),
                *(s.share, *(s.share_interval or (None, None))),
                *(s.strength, *(s.strength_interval or (None, None))),
                *(s.best, *(s.best_interval or (None, None))),
            )


def _pair_rows(criteria: Sequence[CriterionResult]) -> Iterable[Sequence[object]]:
    yield "criterion", "a", "b", "a_preferred", "no_difference", "b_preferred"
    for result in criteria:
        for pair in result.pairs:
            yield result.criterion, pair.a, pair.b, pair.wins, pair.ties, pair.losses


def _answer_rows(answers: Sequence[Answer], excluded: set[int]) -> Iterable[Sequence[object]]:
    yield (
        *("rater", "excluded", "position", "kind", "repeats", "item", "left", "right"),
        *("criterion", "choice", "seconds"),
    )
    for a in answers:
        repeats = "" if a.repeats < 0 else a.repeats
        sides = [side or "(corrupted)" for side in (a.left, a.right)]
        yield (
            *(a.rater, int(a.rater in excluded), a.position, a.kind, repeats, a.item, *sides),
            *(a.criterion, a.choice, a.seconds),
        )


def _csv(rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _percent(value: float | None, interval: Interval) -> str:
    if value is None:
        return ""
    ends = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.1f}%{ends}"


def _number(value: float | None, interval: Interval) -> str:
    if value is None:
        return ""
    return f"{value:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def _share(share: Share) -> str:
    text = _percent(share.value, share.interval)
    return f"{text}, {share.hits} of {share.count}" if text else "none answered"


def _agreement(agreement: Agreement) -> str:
    if agreement.alpha is None:
        why = "all answers are the same" if agreement.units else "no comparison was answered by two raters"
        return f"alpha not defined ({why})"
    units = counted(agreement.units, "comparison")
    of = f"{units} answered by two raters or more, {counted(agreement.values, 'answer')}"
    return f"alpha {_number(agreement.alpha, agreement.interval)} ({of})"
