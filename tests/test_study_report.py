"""The report: what simulated raters prefer is found again, bad raters are left out, limits are said."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from _study import make_study, plan

from idc.cli import main
from idc.errors import UserError
from idc.study.analysis import Analysis, AnalysisSettings, analyse
from idc.study.figure import draw_figure
from idc.study.questions import CRITERIA, Study
from idc.study.ranking import best_shares
from idc.study.report import markdown
from idc.study.store import Answer, Store

TRUTH = {"s0": 1.0, "s1": 0.2, "s2": -0.3, "s3": -0.9}
FAST = AnalysisSettings(draws=300)


def simulate(study: Study, path: Path, raters: int, careless: int = 0, tie: float = 0.15, seed: int = 0) -> Store:
    """Raters who choose by `TRUTH` (Bradley-Terry); the first `careless` ones always press the left."""
    store, random_ = Store(path, study), random.Random(seed)
    for rater in range(raters):
        token = f"{rater:032x}"
        store.join(token)
        sides = {}
        with store._connect() as db:
            for row in db.execute("SELECT id, kind, left_system, right_system FROM questions"):
                sides[row[0]] = row[1:]
        for question in store.session(token)["questions"]:
            kind, left, right = sides[question["id"]]

            def choose(
                kind: str = kind, left: str = left, right: str = right, careless: bool = rater < careless
            ) -> str:
                if careless:
                    return "left"
                if kind == "catch":
                    return "left" if left else "right"
                if random_.random() < tie:
                    return "tie"
                return "left" if random_.random() < 1 / (1 + math.exp(TRUTH[right] - TRUTH[left])) else "right"

            store.record(token, question["id"], {c["key"]: choose() for c in question["criteria"]}, 1, 8.0)
    return store


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Store]:
    study = plan(items=8, systems=4, pairs=14)
    path = tmp_path_factory.mktemp("simulated") / "answers.sqlite"
    return study, simulate(study, path, raters=16, careless=2)


@pytest.fixture(scope="module")
def analysis(simulated: tuple[Study, Store]) -> Analysis:
    study, store = simulated
    return analyse(study, store.answers(), *store.counts(), FAST)


def test_simulated_preferences_are_found_again(analysis: Analysis) -> None:
    # Half a win for a tie shrinks strengths towards 0; by the known share of ties that is accounted for here.
    def expected(system: str) -> float:
        others = [TRUTH[system] - value for name, value in TRUTH.items() if name != system]
        return sum(0.15 * 0.5 + 0.85 / (1 + math.exp(-d)) for d in others) / len(others)

    for result in analysis.criteria:
        order = sorted(result.systems, key=lambda s: -s.strength)
        assert order[0].system == "s0"
        assert order[-1].system == "s3"
        assert sum(s.best for s in result.systems) == pytest.approx(1)
        for s in result.systems:
            assert s.share == pytest.approx(expected(s.system), abs=0.15)
            assert s.share_interval[0] < s.share < s.share_interval[1]
            assert s.strength_interval[0] < s.strength < s.strength_interval[1]
            assert s.best_interval[0] < s.best < s.best_interval[1]


def test_counts_add_up_and_leave_repeats_and_catches_out(analysis: Analysis) -> None:
    for result in analysis.criteria:
        assert result.answers == 14 * 14
        assert sum(s.comparisons for s in result.systems) == 2 * result.answers
        assert sum(p.wins + p.ties + p.losses for p in result.pairs) == result.answers
        assert sum(s.wins for s in result.systems) == sum(s.losses for s in result.systems)
    assert [result.answers for result in analysis.everyone] == [16 * 14] * 4


def test_careless_raters_are_left_out_by_the_stated_rule(analysis: Analysis) -> None:
    assert set(analysis.raters.excluded) == {0, 1}
    assert (analysis.raters.joined, analysis.raters.answered, analysis.raters.finished) == (16, 16, 16)
    assert analysis.raters.unchecked == 0
    assert analysis.left.interval[0] < 0.5 < analysis.left.interval[1]


def test_a_lower_bar_keeps_them_and_the_left_side_shows(simulated: tuple[Study, Store]) -> None:
    study, store = simulated
    everybody = analyse(study, store.answers(), 16, 16, AnalysisSettings(catch_pass=0.0, draws=100))
    assert everybody.raters.excluded == {}
    careless = [answer for answer in store.answers() if answer.rater < 2]
    alone = analyse(study, careless, 2, 2, AnalysisSettings(catch_pass=0.0, draws=100))
    assert alone.left.value == 1
    assert alone.consistency.reversed.value == 1
    assert alone.clusters == "answers"


def preference(left: str, right: str, choice: str, rater: int = 0, item: str = "i0", place: int = 0) -> Answer:
    return Answer(rater, f"{rater}/{place}", place, "compare", item, left, right, -1, "motion", choice, 1.0)


def test_groups_that_were_never_compared_are_named_and_shares_stay(tmp_path: Path) -> None:
    study = plan(systems=4)
    answers = [preference("s0", "s1", "left"), preference("s3", "s2", "right", place=1)]
    motion = analyse(study, answers, 1, 0, FAST).criteria[3]
    assert "never compared with each other: s0, s1 | s2, s3" in motion.note
    assert all(system.strength is None and system.best is None for system in motion.systems)
    assert [system.share for system in motion.systems] == [1, 0, 1, 0]


def test_a_system_that_always_wins_has_a_finite_strength_and_a_note() -> None:
    study = plan(systems=2)
    answers = [preference("s0", "s1", "left", rater=n) for n in range(8)]
    result = analyse(study, answers, 8, 0, FAST).criteria[3]
    assert "0.5 win each way" in result.note
    assert result.systems[0].strength - result.systems[1].strength == pytest.approx(math.log(8.5 / 0.5))
    assert result.systems[0].share == 1


def test_a_criterion_without_answers_is_blank() -> None:
    analysis = analyse(plan(), [preference("s0", "s1", "tie")], 1, 0, FAST)
    aesthetics, motion = analysis.criteria[0], analysis.criteria[3]
    assert aesthetics.answers == 0
    assert all(system.share is None and system.share_interval is None for system in aesthetics.systems)
    assert [system.share for system in motion.systems] == [0.5, 0.5, None]
    markdown(plan(), analysis, "s0")
    ElementTree.fromstring(draw_figure(analysis, "s0"))


def test_skipped_questions_count_nowhere_but_as_skipped(simulated: tuple[Study, Store]) -> None:
    study, store = simulated
    answers = [answer._replace(choice="skip") if answer.rater == 5 else answer for answer in store.answers()]
    analysis = analyse(study, answers, 16, 16, FAST)
    assert analysis.skipped == len({answer.question for answer in answers if answer.rater == 5})
    assert all(result.answers == 13 * 14 for result in analysis.criteria)
    assert analysis.raters.unchecked == 1


def test_the_figure_draws_what_the_table_says(analysis: Analysis) -> None:
    root = ElementTree.fromstring(draw_figure(analysis, "s2"))
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for result in analysis.criteria:
        assert result.title in texts
        for system in result.systems:
            assert f"{100 * system.best:.0f}" in texts
    assert "Chosen as the best of 4 (Bradley-Terry)" in texts
    heights = [
        float(bar.get("height"))
        for bar in root.iter("{http://www.w3.org/2000/svg}rect")
        if bar.get("rx") is None and bar.get("opacity") is None and bar.get("stroke") is None
    ]
    ours = next(s for s in analysis.criteria[0].systems if s.system == "s2")
    assert heights[1] == pytest.approx(260 * ours.best, abs=0.06)  # after the ground, the first bar is ours


def test_the_command_writes_a_report_that_other_programs_can_count_on(tmp_path: Path, capsys) -> None:
    study = make_study(tmp_path)
    folder = tmp_path / "study"
    assert main(["study", "report", str(folder)]) == 2
    assert "nobody has answered yet" in capsys.readouterr().err
    store = Store(folder / "answers.sqlite", study)
    store.join("0" * 32)
    assert main(["study", "report", str(folder)]) == 2
    assert "1 rater has joined, none has answered yet" in capsys.readouterr().err
    for question in store.session("0" * 32)["questions"]:
        store.record("0" * 32, question["id"], {c["key"]: "tie" for c in question["criteria"]}, 1, 4)
    # The store stays open: a study is reported on while it is served.
    out = tmp_path / "out"
    command = ["study", "report", str(folder), "--out", str(out), "--draws", "100"]
    assert main([*command, "--catch-pass", "0"]) == 0
    text = capsys.readouterr().out
    for criterion in CRITERIA:
        assert f"## {criterion.title}" in text
    assert "zebracrafter against quaggavid" in text
    assert (out / "report.md").read_text() in text
    data = json.loads((out / "report.json").read_text())
    assert data["raters"]["answered"] == 1
    rows = list(csv.DictReader((out / "shares.csv").open()))
    assert {(row["criterion"], row["system"]) for row in rows} == {
        (c.key, system) for c in CRITERIA for system in study.systems
    }
    rows = list(csv.DictReader((out / "answers.csv").open()))
    assert len(rows) == len(store.answers())
    assert "0" * 32 not in (out / "answers.csv").read_text()  # the raters' keys stay secret
    assert "1 rater joined, 1 answered" in text
    assert main(command) == 3  # the only rater got no catch right
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "idc study report: no answer counts, all tables are blank: 1 rater answered, all left out "
        "(fewer than 75% of the catch answers right; --catch-pass sets it)"
    ]
    assert "**no answer counts" in (out / "report.md").read_text()
    assert main([*command, "--ours", "zebracraftr"]) == 2
    assert "did you mean 'zebracrafter'" in capsys.readouterr().err
    assert main(["study", "report", str(folder), "--draws", "100", "--out", str(out / "report.md")]) == 2
    assert "report.md is a file; give the name of a folder" in capsys.readouterr().err
    assert main([*command, "--catch-pass", "75"]) == 2
    assert "--catch-pass 75" in capsys.readouterr().err


def test_everybody_left_out_leaves_a_report_that_says_so(simulated: tuple[Study, Store]) -> None:
    study, store = simulated
    answers = [answer for answer in store.answers() if answer.rater < 2]
    analysis = analyse(study, answers, 2, 2, FAST)
    assert all(result.answers == 0 for result in analysis.criteria)
    text = markdown(study, analysis, "s0")
    assert "2 left out, for less than 75% of their catch answers right" in text
    ElementTree.fromstring(draw_figure(analysis, "s0"))


def test_best_of_all_is_the_share_that_choices_among_all_would_give() -> None:
    """Luce's axiom: choosing one of four at once by strengths gives the shares that pairs imply."""
    import numpy as np

    strengths = np.array(list(TRUTH.values()))
    noise = np.random.default_rng(0).gumbel(size=(200_000, 4))
    chosen = np.bincount((strengths + noise).argmax(1), minlength=4) / 200_000
    assert best_shares(strengths) == pytest.approx(chosen, abs=0.005)


@pytest.mark.parametrize("settings", [replace(FAST, catch_pass=-0.1), replace(FAST, draws=5)])
def test_settings_out_of_range_are_refused(settings: AnalysisSettings) -> None:
    with pytest.raises(UserError, match="--"):
        analyse(plan(), [], 0, 0, settings)
