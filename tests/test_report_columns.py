"""What makes two rows of a report's table comparable: the metric that a column reads, and the items below a mean."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from _runs import write_run

from idc.cli import main
from idc.metrics.results import Result, read_run
from idc.report.html import measures_html
from idc.report.layout import TABLE_1
from idc.report.measure import Measured
from idc.report.render import csv_text, latex, markdown
from idc.report.tables import Table, fill


def measured(path: Path) -> Measured:
    return Measured(read_run(path), resamples=50)


def records(table: Table) -> dict[str, dict[str, str]]:
    return {row["row"]: row for row in csv.DictReader(io.StringIO(csv_text(table)))}


# Which metric ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", ["not asked for", "not of these items", "beside it"])
def test_a_measured_facesim_is_shown_under_protocol_toy(exact, tmp_path):
    results = [Result(id, "facesim", value, category="singleface") for id, value in (("a", 0.6), ("b", 0.8))]
    if exact != "not asked for":
        value = 0.2 if exact == "beside it" else None
        results += [Result(id, "toy_identity", value, applies=value is not None) for id in "ab"]
    run = measured(write_run(tmp_path, "sft", results, protocol="toy"))
    table = fill(TABLE_1, [run])
    (line,) = (line for line in table.lines if line.measured)
    shown = line.cells[[column.key for column in table.columns].index("facesim")].value
    assert shown == pytest.approx(0.2 if exact == "beside it" else 0.7)
    assert ("Column FaceSim reads toy_identity." in table.caption) == (exact == "beside it")
    assert "applies to none" not in markdown(table)
    assert run.measure("facesim").value == pytest.approx(0.7)
    assert "70.00%" in measures_html([("sft", run)], list(run.run.info.metrics))


def test_a_column_that_reads_two_metrics_says_so_at_its_cells(tmp_path):
    rows = [("sft", "toy_identity", 0.7), ("grpo", "facesim", 0.6)]
    runs = [measured(write_run(tmp_path / s, s, [Result("a", m, v)], protocol="toy")) for s, m, v in rows]
    table = fill(TABLE_1, runs)
    place = [column.key for column in table.columns].index("facesim")
    assert "Column FaceSim reads facesim or toy_identity." in table.caption
    assert [line.cells[place].notes for line in table.lines if line.measured] == [
        ("reads toy_identity",),
        ("reads facesim",),
    ]


# Which items ----------------------------------------------------------------------------------------------------------


def of_items(folder: Path, system: str, ids: str, prompts: str = "", scored: int = 99) -> Path:
    """A run with an item a letter, whose prompts are the letters of `prompts`."""
    results = [
        Result(id, "gmescore", 0.1 * n if n < scored else None, "" if n < scored else "torn", prompt=prompts[n : n + 1])
        for n, id in enumerate(ids)
    ]
    return write_run(folder / system, system, results)


def row_notes(*runs: Path) -> list[str]:
    return [" ".join(line.notes) for line in fill(TABLE_1, [measured(run) for run in runs]).lines if line.measured]


def test_a_row_over_other_items_is_marked(tmp_path, capsys):
    ten, five = of_items(tmp_path, "ten", "abcdefghij"), of_items(tmp_path, "five", "ijklm")
    assert row_notes(ten, five) == ["", "other items than ten: 2 shared of 5; not to be compared"]
    assert row_notes(ten) == [""]
    third = of_items(tmp_path, "third", "klmij")  # the items of `five`: they are the usual ones then
    assert row_notes(ten, five, third)[1:] == ["", ""]
    assert "2 shared of 10" in row_notes(ten, five, third)[0]
    runs = [measured(ten), measured(five)]
    table = fill(TABLE_1, runs)
    assert re.search(r"\| five<sup>(\w)</sup> \|[^$]*<sup>\1</sup> other items than ten: 2 shared", markdown(table))
    assert re.search(r"five\\textsuperscript\{\w\}", latex(table))
    assert "2 shared of 5" in records(table)["five"]["row_note"]
    assert "2 shared of 5" in measures_html([("ten", runs[0]), ("five", runs[1])], ["gmescore"])


def test_items_of_one_name_that_ask_for_something_else_are_other_items(tmp_path):
    first, second = of_items(tmp_path, "first", "ab", "xy"), of_items(tmp_path, "second", "ab", "xz")
    unsaid = of_items(tmp_path, "unsaid", "ab")
    assert row_notes(first, second) == ["", "other items than first: 1 shared of 2; not to be compared"]
    assert row_notes(first, unsaid) == ["", ""]


def test_only_common_items_count_where_that_is_asked_for(tmp_path, capsys):
    runs = [str(of_items(tmp_path, name, ids)) for name, ids in (("one", "abcd"), ("two", "cdef"))]
    assert main(["report", *runs, "--table", "1", "--resamples", "50", "--common"]) == 0
    out = capsys.readouterr().out
    assert "other items" not in out
    assert "Over the 2 items that all runs share." in out
    assert re.search(r"\| one \|.* 25.00% .* 2/2", out)  # c, d: 0.2 and 0.3
    assert re.search(r"\| two \|.* 5.00% .* 2/2", out)  # 0.0 and 0.1
    other = str(of_items(tmp_path, "three", "xy"))
    assert main(["report", *runs, other, "--common"]) == 2
    assert "shares none of its 4 items" in capsys.readouterr().err


def test_a_mean_over_fewer_videos_than_expected_has_a_footnote(tmp_path):
    runs = [measured(of_items(tmp_path, name, "abcde", scored=n)) for name, n in (("all", 5), ("three", 3))]
    text = markdown(fill(TABLE_1, runs))
    (three,) = re.findall(r"\| three \|.*", text)
    assert re.search(r"10.00%<sup>(\w)</sup> .* 3/5[^$]*<sup>\1</sup> over fewer videos than expected", text)
    assert "3/5" in three
    (whole,) = re.findall(r"\| all \|.*", text)
    assert "20.00% " in whole
    assert "fewer" in records(fill(TABLE_1, runs))["three"]["gmescore_note"]
