"""A judged run on disk: what is written is read back, also when the writer was killed in the middle of a line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from idc.errors import UserError
from idc.metrics.results import (
    Problem,
    Result,
    RunInfo,
    append_result,
    mean_of,
    read_info,
    read_results,
    read_run,
    results_file,
    write_info,
)

INFO = RunInfo(
    system="ours",
    protocol="toy",
    items={"b": "multihuman", "a": "singleface", "c": "singleface"},
    metrics={"face": {"config": "1", "models": ["m"]}, "motion": {"config": "1"}},
    rewards=["m"],
    columns={"scale": 2.5},
    problems=[Problem("x.mp4", "no item x")],
)


def result(id: str, metric: str, value: float | None, **more: object) -> Result:
    return replace(Result(id, metric, value, config="1", fingerprint="f"), **more)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_info(tmp_path, INFO)
    assert read_info(tmp_path) == replace(INFO, problems=(Problem("x.mp4", "no item x"),))
    assert json.loads((tmp_path / "run.json").read_text())["expected"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    odd = result("a", "face", 0.1 + 0.2, reason='"\n\u2028ä', details={"frames": [1, None]}, prompt="x\ny")
    append_result(tmp_path, odd)
    assert read_results(results_file(tmp_path, "a")) == [odd]


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_a_line_torn_anywhere_is_dropped_and_the_next_one_is_whole(whole: int, tmp_path: Path) -> None:
    file = results_file(tmp_path, "a")
    lines = [
        result("a", f"m{number}", number / 7, details={"x": {"y": [{}]}}, prompt="ü") for number in range(whole + 1)
    ]
    for line in lines:
        append_result(tmp_path, line)
    content = file.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start, len(content) - 1):
        file.write_bytes(content[:end])
        assert read_results(file) == lines[:-1]
        append_result(tmp_path, lines[-1])
        assert read_results(file) == lines
    file.write_bytes(content[:-1])  # only the newline is missing: nothing is lost, nothing is glued
    append_result(tmp_path, lines[0])
    assert read_results(file) == [*lines, lines[0]]


def test_the_last_line_counts_and_stale_ones_do_not(tmp_path: Path) -> None:
    write_info(tmp_path, INFO)
    append_result(tmp_path, result("a", "face", None, reason="no face"))
    append_result(tmp_path, result("a", "face", 0.5))
    append_result(tmp_path, result("b", "face", 0.9, config="0"))  # of former settings
    append_result(tmp_path, result("b", "aesthetics", 0.9))  # of a metric that is no longer asked for
    append_result(tmp_path, result("z", "face", 0.9))  # of an item that is no longer asked for
    run = read_run(tmp_path)
    assert {key: found.value for key, found in run.results.items()} == {("a", "face"): 0.5}
    assert run.unscored == 5
    assert run.failures == []


def test_means_stand_beside_how_many_were_expected(tmp_path: Path) -> None:
    write_info(tmp_path, INFO)
    append_result(tmp_path, result("a", "face", 0.5))
    append_result(tmp_path, result("b", "face", None, reason="several people", applies=False))
    append_result(tmp_path, result("a", "motion", 0.2))
    append_result(tmp_path, result("b", "motion", None, reason="broken"))
    run = read_run(tmp_path)
    face, motion = run.mean("face"), run.mean("motion")
    assert (face.value, face.scored, face.expected, str(face)) == (0.5, 1, 2, "0.5000 (1 / 2)")
    assert (motion.value, motion.scored, motion.expected, motion.complete) == (0.2, 1, 3, False)
    singles = run.mean("motion", ["singleface"])
    assert (singles.scored, singles.expected) == (1, 2)
    people = run.mean("face", ["multihuman"])
    assert math.isnan(people.value)
    assert people.complete
    assert str(people) == "- (0 / 0)"
    assert [found.id for found in run.of("face")] == ["a"]
    assert [found.id for found in run.of("motion")] == ["b", "a"]  # in the order of the items
    assert [found.reason for found in run.failures] == ["broken"]


def test_a_mean_does_not_depend_on_the_order() -> None:
    results = [result(str(number), "m", value) for number, value in enumerate([1e16, 1.0, -1e16, 0.1] * 9)]
    assert mean_of(results) == mean_of(results[::-1])
    assert mean_of(results).value == pytest.approx(1.1 / 4, rel=1e-15)


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_result(tmp_path, result("a", "face", math.nan))
    assert not results_file(tmp_path, "a").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no run.json here"),
        ("{", "cannot be read"),
        ("[]", "system, protocol, items missing"),
        ('{"system": "x", "protocol": "y", "items": 3}', "items missing or of another type"),
    ],
)
def test_a_folder_that_is_no_run_is_named(content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        read_run(tmp_path)


def test_a_whole_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    write_info(tmp_path, INFO)
    file = results_file(tmp_path, "a")
    file.parent.mkdir()
    file.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 1: not a result"):
        read_run(tmp_path)
