"""Runs that differ by their seed alone share a row with an interval over seeds; the toy scorers fill columns."""

from __future__ import annotations

import math
import statistics

import pytest
from _runs import write_run
from scipy.stats import t as student

from idc.cli import main
from idc.metrics.results import Result, read_run
from idc.report.layout import TABLE_1, TABLE_3
from idc.report.measure import Measured
from idc.report.render import csv_text, markdown
from idc.report.replicates import Replicates, half_width, together
from idc.report.tables import fill


def run(folder, system, value, seed=None, ids="ab", more=None, **kwargs):
    columns = ({} if seed is None else {"seed": seed}) | (more or {})
    results = [Result(id, "facesim", value) for id in ids]
    return Measured(read_run(write_run(folder, system, results, columns=columns, **kwargs)), resamples=20)


def facesim(table, measured):
    place = [column.key for column in table.columns].index("facesim")
    return next(line.cells[place] for line in table.lines if line.measured is measured)


def test_the_cell_of_seeds_is_their_mean_with_students_interval(tmp_path):
    values = [0.5, 0.7, 0.9]
    runs = [run(tmp_path / str(seed), "sft", value, seed) for seed, value in enumerate(values)]
    (row,) = together(runs)
    cell = facesim(fill(TABLE_1, [row]), row)
    half = student.ppf(0.975, 2) * statistics.stdev(values) / math.sqrt(3)
    assert 0.7 + half > 1  # beyond the scale, and cut there
    assert (cell.value, cell.low, cell.high) == pytest.approx((0.7, 0.7 - half, 1.0))
    assert (cell.scored, cell.expected) == (6, 6)
    assert "3 runs (seeds 0, 1, 2)" in markdown(fill(TABLE_1, [row]))


def test_students_interval_covers_the_mean_as_often_as_it_says():
    import numpy as np

    draws = np.random.default_rng(0).normal(size=(2000, 3))
    covered = np.mean([abs(three.mean()) <= half_width(list(three), 0.95) for three in draws])
    assert covered == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("other", "rows"),
    [
        ({"seed": 1}, 1),
        ({"seed": 0}, 2),  # the same seed twice is no replicate
        ({}, 2),  # nobody says which seed it is
        ({"seed": 1, "more": {"lambda": 0.5}}, 2),
        ({"seed": 1, "ids": "abc"}, 2),
    ],
)
def test_only_runs_that_differ_by_their_seed_alone_are_one(other, rows, tmp_path):
    runs = [run(tmp_path / "a", "sft", 0.5, 0), run(tmp_path / "b", "sft", 0.6, **other)]
    found = together(runs)
    assert len(found) == rows
    assert [isinstance(measured, Replicates) for measured in found] == ([True] if rows == 1 else [False, False])


def test_a_seed_without_a_score_blanks_the_row_and_names_the_run(tmp_path):
    whole = run(tmp_path / "whole", "sft", 0.5, 0)
    broken = run(tmp_path / "broken", "sft", None, 1)
    (row,) = together([whole, broken])
    cell = facesim(fill(TABLE_1, [row]), row)
    assert cell.value is None
    assert cell.reason.startswith("broken: ")


def test_every_run_is_named_below_the_table_and_in_csv(tmp_path):
    (row,) = together([run(tmp_path / name, "sft", 0.5, seed) for seed, name in enumerate(("one", "two"))])
    table = fill(TABLE_1, [row])
    for text in (markdown(table), csv_text(table)):
        assert "one" in text
        assert "two" in text


def test_the_toy_worlds_exact_scores_fill_table_3_under_their_own_names(tmp_path, capsys):
    details = {"background": 0.25, "motion": 0.5, "presence": 0.75}
    for seed in (0, 1):
        results = [Result(id, "toy", 0.8, details=details) for id in "ab"] + [
            Result(id, "toy_identity", 0.6) for id in "ab"
        ]
        write_run(tmp_path / f"sft{seed}", "sft", results, protocol="toy", columns={"seed": seed})
    assert main(["report", *(str(tmp_path / f"sft{seed}") for seed in (0, 1)), "--table", "3"]) == 0
    text = capsys.readouterr().out
    for value in ("25.00%", "0.500", "60.00%", "80.00%"):
        assert value in text
    for name in ("Aesthetics reads toy_background", "Q-Align reads toy_motion", "FaceSim reads toy_identity"):
        assert name in text.replace("\\", "")
    assert "Protocol toy" in text
    assert "sft (toy)" in text  # and never a model of the paper
    assert "SFT Baseline" not in text


@pytest.mark.parametrize("detail", [None, True, "much", math.nan])
def test_a_detail_that_is_no_number_is_no_score(detail, tmp_path):
    results = [
        Result("a", "toy", 0.8, details={"background": detail}),
        Result("b", "toy", 0.8, details={"background": 1}),
    ]
    measured = Measured(read_run(write_run(tmp_path, "sft", results, protocol="toy")), resamples=20)
    table = fill(TABLE_3, [measured])
    cell = table.lines[0].cells[[column.key for column in table.columns].index("aesthetics")]
    assert (cell.value, cell.scored, cell.expected) == (1.0, 1, 2)
