"""The report's figures against figures made by hand, its refusals, and its files as other programs read them."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from _runs import even_results, tracking, write_run
from scipy import stats

from idc.cli import main
from idc.errors import UserError
from idc.metrics.results import Result, read_run
from idc.report.bootstrap import interval, resampled_means
from idc.report.layout import LAYOUTS, TABLE_1, TABLE_2, TABLE_3, TABLE_S5, TABLE_S7
from idc.report.measure import Measured
from idc.report.render import csv_text, latex, markdown
from idc.report.tables import Assignment, Table, computed_total, fill

PARTS = ("aesthetics", "motion_amplitude", "facesim", "gmescore", "nexusscore", "naturalscore")
NASTY = r"50%_a & b #1 {x} \textbf ~^ $|<script>alert(1)</script>"


def measured(path: Path, **options) -> Measured:
    return Measured(read_run(path), **{"resamples": 200, **options})


def flat(system: str, folder: Path, value: float = 0.5, **options) -> Measured:
    """A run in which every part of the total has the mean `value`."""
    return measured(write_run(folder, system, even_results(dict.fromkeys(PARTS, value))), **options)


def records(table: Table) -> dict[str, dict[str, str]]:
    return {row["row"]: row for row in csv.DictReader(io.StringIO(csv_text(table)))}


# Means and totals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE_1.rows[:8], ids=lambda row: row.name)
def test_published_columns_give_the_published_total(row, tmp_path):
    printed = dict(zip(TABLE_1.printed_columns, map(float, row.printed), strict=True))
    total = printed.pop("total")
    if row.name == "vace_14b":
        printed["gmescore"] = 67.27  # printed as 73.27
    scores = {key: value / 100 for key, value in printed.items()}
    run = measured(write_run(tmp_path, row.title, even_results(scores, videos=8)))
    line = next(line for line in fill(TABLE_1, [run]).lines if line.measured)
    assert line.title == row.title
    assert 100 * line.cells[0].value == pytest.approx(total, abs=0.0125)
    for column, cell in zip(TABLE_1.printed_columns[1:], line.cells[1:], strict=True):
        assert f"{100 * cell.value:.2f}" == f"{printed[column]:.2f}"


def test_totals_that_do_not_follow_from_their_columns_are_noted_and_no_others():
    table = fill(TABLE_1, [], with_published=True)
    noted = {line.title: note for line in table.lines if (note := line.printed_notes[0])}
    assert [re.search(r"[\d.]+$", note).group() for note in noted.values()] == ["54.68", "56.21", "57.11"]
    assert all(title.startswith("Ours") for title in noted)
    misprint = next(line for line in table.lines if line.title == "VACE-14B")
    assert "67.27" in misprint.printed_notes[4]
    assert computed_total(TABLE_1.rows[0]) == pytest.approx(47.585, abs=5e-4)


def test_scores_are_cut_per_video_before_they_are_averaged(tmp_path):
    results = [Result("a", "aesthetics", 9.0), Result("b", "aesthetics", 4.0)]
    assert measured(write_run(tmp_path, "sft", results)).cell("aesthetics").value == 0.5


def test_a_failed_score_is_expected_and_one_that_does_not_apply_is_not(tmp_path):
    results = [
        Result("a", "facesim", 0.6),
        Result("b", "facesim", None, "no face in the reference"),
        Result("c", "facesim", None, "several people", applies=False),
    ]
    run = measured(write_run(tmp_path, "sft", results, items=dict.fromkeys("abcd", "")))
    cell = run.cell("facesim")
    assert (cell.value, cell.scored, cell.expected) == (0.6, 1, 3)  # d has no line yet: expected
    assert cell.low is None  # one video has no interval


def test_a_missing_metric_leaves_the_total_blank_with_its_reason(tmp_path):
    results = even_results(dict.fromkeys(PARTS[:-1], 0.5))
    table = fill(TABLE_1, [measured(write_run(tmp_path, "sft", results))])
    line = next(line for line in table.lines if line.measured)
    assert line.cells[0].value is None
    assert line.cells[0].reason == "no total without naturalscore (not measured)"
    assert "no total without naturalscore" in markdown(table)


def test_a_total_names_what_failed_in_brief_and_the_metric_itself_at_length(tmp_path):
    results = [r for r in even_results(dict.fromkeys(PARTS, 0.5)) if r.metric not in PARTS[:2]]
    results += [Result(r.id, key, None, f"why: {key} " + "x" * 300) for key in PARTS[:2] for r in results[:1]]
    cells = measured(write_run(tmp_path, "sft", results))
    reason = cells.cell("total").reason
    assert reason.startswith("no total without ")
    assert all(f"{key} (0 of " in reason for key in PARTS[:2])
    assert reason.endswith("; their own notes say why")
    assert "xxx" not in reason
    assert "x" * 300 in cells.cell(PARTS[0]).reason


def test_a_metric_that_failed_everywhere_is_blank_with_the_first_reason(tmp_path):
    results = [Result(id, "facesim", None, "no face is found") for id in "ab"]
    cell = measured(write_run(tmp_path, "sft", results)).cell("facesim")
    assert (cell.value, cell.reason) == (None, "0 of 2 videos have a score: no face is found")


def test_the_human_domain_has_its_own_items_and_weights(tmp_path):
    results = even_results(dict.fromkeys(set(PARTS) - {"nexusscore"}, 0.5), videos=8)
    run = measured(write_run(tmp_path, "sft", results), domain="human")
    assert run.ids == ["singleface_4", "singleface_5", "singlehuman_2", "singlehuman_3"]
    assert run.total.value == pytest.approx(0.5)
    assert (run.total.scored, run.total.expected) == (4, 4)
    with pytest.raises(UserError, match="did you mean 'human'"):
        Measured(run.run, domain="humans")
    with pytest.raises(UserError, match=r"no item of the domain 'human'; its categories are singleobj"):
        measured(write_run(tmp_path / "x", "sft", [Result("a", "facesim", 1.0, category="singleobj")]), domain="human")


def test_a_nexus_score_of_zero_leaves_the_mean_of_the_benchmarks_protocol_only(tmp_path):
    results = [Result("a", "nexusscore", 0.0), Result("b", "nexusscore", 0.025)]
    bench = measured(write_run(tmp_path / "1", "sft", results, protocol="opens2v-1.0")).cell("nexusscore")
    paper = measured(write_run(tmp_path / "2", "sft", results)).cell("nexusscore")
    assert (bench.value, bench.scored, bench.expected) == (0.5, 1, 2)
    assert (paper.value, paper.scored) == (0.0125, 2)


def test_smoothness_stands_in_table_1_of_protocol_1_1_alone(tmp_path):
    scores = dict.fromkeys((*PARTS, "motion_smoothness"), 0.5)
    run = measured(write_run(tmp_path, "sft", even_results(scores, protocol="opens2v-1.1"), protocol="opens2v-1.1"))
    table = fill(TABLE_1, [run], with_published=True)
    assert "Smoothness" in [column.title for column in table.columns]
    assert run.total.value == pytest.approx(0.5)
    assert "do not compare with opens2v-1.1" in table.caption
    assert "Smoothness (paper, printed)" not in markdown(table)
    assert "Smoothness" not in markdown(fill(TABLE_1, []))


def test_the_toy_worlds_exact_scores_fill_tables_of_their_own(tmp_path):
    details = tracking([[0.9, 0.9], [0.5, 0.5]], ["a", "b"])
    results = [r for id in "ab" for r in (Result(id, "toy", 0.8), Result(id, "toy_identity", 0.7, details=details))]
    run = write_run(tmp_path, "grpo", results, protocol="toy", columns={"lambda": 0.5})
    sweep, row = fill(TABLE_S7, [measured(run)]), next(iter(fill(TABLE_3, [measured(run)]).lines[2:]))
    line = next(line for line in sweep.lines if line.measured)
    assert [cell.value for cell in line.cells] == pytest.approx([0.7, 0.5, 0.8])
    assert [cell.value for cell in row.cells] == [pytest.approx(0.7), None, None, pytest.approx(0.8)]
    assert "Protocol toy" in sweep.caption
    assert "Column Total Score reads toy." in sweep.caption


# Bootstrap ------------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_share_is_the_binomials():
    hits = (np.arange(200) < 60).astype(float)[:, None]
    low, high = interval(resampled_means(hits, 20_000, seed=3)[:, 0])
    assert (200 * low, 200 * high) == pytest.approx(stats.binom.ppf([0.025, 0.975], 200, 0.3), abs=1)


def test_the_interval_of_a_mean_is_the_normals():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = interval(resampled_means(values[:, None], 20_000)[:, 0], level=0.9)
    half = stats.norm.ppf(0.95) * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


def test_metrics_of_a_video_are_resampled_together(tmp_path):
    """Two metrics that always sum to the same: their mean has no spread, which independent draws would give it."""
    x = np.random.default_rng(0).random(50)
    means = resampled_means(np.stack([x, 1 - x], axis=1), 500)
    assert np.ptp(means[:, 0]) > 0.05
    assert means.sum(axis=1) == pytest.approx(np.ones(500))


def test_resampled_means_skip_what_has_no_score():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, 5.0]])
    means = resampled_means(values, 300)
    assert set(np.unique(means[~np.isnan(means[:, 1]), 1])) == {5.0}
    assert np.isnan(means[:, 0]).any()  # all three draws were of the last video
    assert set(np.round(np.unique(means[~np.isnan(means[:, 0]), 0]), 6)) <= {1, 1.666667, 2, 2.333333, 3}
    assert resampled_means(np.empty((0, 2)), 10).shape == (0, 2)


def test_intervals_follow_the_seed_and_not_the_order_of_the_items(tmp_path):
    results = [Result(f"v{n}", "facesim", value) for n, value in enumerate(np.linspace(0, 1, 30) ** 2)]
    runs = [write_run(tmp_path / name, "sft", order) for name, order in (("a", results), ("b", results[::-1]))]
    first, second = (measured(run).cell("facesim") for run in runs)
    assert (first.low, first.high) == (second.low, second.high)
    assert measured(runs[0], seed=1).cell("facesim").low != first.low
    assert measured(runs[0], level=0.5).cell("facesim").low > first.low


# Rows -----------------------------------------------------------------------------------------------------------------


def test_each_ablation_of_tables_2_and_s5_has_a_recipe_of_its_rows_name():
    recipes = {path.stem for path in (Path(__file__).parents[1] / "recipes" / "ablations").glob("*.yaml")}
    for layout in (TABLE_2, TABLE_S5):
        assert {row.name for row in layout.rows[1:]} <= recipes


def test_systems_find_their_rows_whatever_their_spelling(tmp_path):
    runs = [flat(name, tmp_path / str(n)) for n, name in enumerate(["SkyReels A2", "phantom-14b", "SFT", "Mine"])]
    found = {line.measured.run.info.system: line for line in fill(TABLE_1, runs).lines if line.measured}
    assert {system: line.title for system, line in found.items()} == {
        "SkyReels A2": "SkyReels-A2-P14B",
        "phantom-14b": "Phantom-14B",
        "SFT": "Ours-1.3B (Base Model)",
        "Mine": "Mine",
    }
    assert found["Mine"].group == "Further Systems"
    assert not any(line.title == "Mine" for line in fill(TABLE_2, runs).lines)


def test_table_3_shows_the_online_run_in_both_of_its_rows(tmp_path):
    table = fill(TABLE_3, [flat("grpo", tmp_path)])
    assert [line.measured is not None for line in table.lines] == [False, False, True, False, False, False, True]


def test_table_2_says_how_far_each_row_is_from_the_first(tmp_path):
    runs = [flat("sft", tmp_path / "a", 0.5), flat("no_vlm_encoder", tmp_path / "b", 0.4)]
    lines = fill(TABLE_2, runs).lines
    assert lines[0].changes == (None,) * 4
    assert lines[2].changes[0] == pytest.approx(-0.2)
    assert "(↓20.0%)" in markdown(fill(TABLE_2, runs))


def test_table_s7_goes_by_lambda_and_shows_the_least_subject(tmp_path):
    def run(name: str, system: str, value: float) -> Measured:
        details = tracking([[0.8, 0.8], [0.4, None]], ["Ada", "Bob"])
        identity = [Result(id, "identity", 0.5, details=details) for id in "ab"]
        results = [*even_results(dict.fromkeys(PARTS, 0.5)), *identity]
        return measured(write_run(tmp_path / name, system, results, columns={"lambda": value}))

    runs = [run("a", "grpo", 0.5), run("b", "lambda_0.25", 0.25), run("c", "no_natural", 0.5), run("d", "mine", 0.4)]
    table = fill(TABLE_S7, runs)
    shown = {line.title: line for line in table.lines if line.measured}
    assert list(shown) == ["0.25", "0.5", "0.4"]  # no_natural is of another ablation
    assert shown["0.5"].measured.run.info.system == "grpo"
    average, least, total = shown["0.5"].cells
    assert (average.value, least.value, total.value) == pytest.approx((0.5, 0.2, 0.5))


def test_two_runs_of_one_row_are_refused_and_told_apart_by_hand(tmp_path):
    first, second = flat("sft", tmp_path / "a"), flat("sft", tmp_path / "b")
    with pytest.raises(UserError, match=r"2 runs fill it .*--row sft=RUN"):
        fill(TABLE_1, [first, second])
    results = even_results(dict.fromkeys(PARTS, 0.5))
    other = measured(write_run(tmp_path / "c", "grpo", results, protocol="opens2v-1.0"))
    with pytest.raises(UserError, match="different protocols never stand in one column"):
        fill(TABLE_1, [first, other])
    table = fill(TABLE_S5, [first, second], Assignment({"S.5:full": first, "vanilla": second}))
    assert [line.measured for line in table.lines] == [first, None, None, None, second]


def test_a_judge_that_was_a_reward_is_flagged_in_its_columns_and_in_the_total(tmp_path):
    run = write_run(
        tmp_path,
        "grpo",
        even_results(dict.fromkeys(PARTS, 0.5)),
        models={"facesim": ["curricularface"], "aesthetics": ["clip"]},
        rewards=["curricularface"],
    )
    table = fill(TABLE_1, [measured(run)])
    line = next(line for line in table.lines if line.measured)
    flagged = [column.key for column, cell in zip(table.columns, line.cells, strict=True) if cell.shared]
    assert flagged == ["total", "facesim"]
    assert "<sup>†</sup> grpo was rewarded in training by a model that judges here: curricularface" in markdown(table)
    assert r"\textsuperscript{$\dagger$}" in latex(table)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> Measured:
    folder = tmp_path_factory.mktemp("nasty")
    results = [*even_results(dict.fromkeys(PARTS[:-1], 0.5)), Result("x", "naturalscore", None, NASTY)]
    return measured(write_run(folder, NASTY, results, rewards=["m_1&2"], models={"facesim": ["m_1&2"]}))


@pytest.mark.parametrize("number", LAYOUTS)
@pytest.mark.parametrize("published", [False, True])
def test_latex_is_balanced_and_every_row_has_all_columns(number, published, nasty):
    text = latex(fill(LAYOUTS[number], [nasty], with_published=published))
    bare = re.sub(r"\\[\\{}$&#%_]", lambda m: r"\\" if m.group() == r"\\" else "", text)
    depth = 0
    for letter in bare:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{([\w*]+)\}", bare):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    flat_text = re.sub(r"\\begin\{tabular\}\[c\].*?\\end\{tabular\}", "cell", bare)
    columns = len(re.search(r"\\begin\{tabular\}\{(l?c+)\}", flat_text).group(1))
    body = flat_text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [re.sub(r"\\(midrule|cmidrule\S*)", "", row).strip() for row in body.split(r"\\")]
    for row in filter(None, rows):
        spans = [int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", row)]
        assert row.count("&") + 1 + sum(spans) == columns
    outside = text.split(r"\usepackage{booktabs,graphicx}")[1]
    assert not re.search(r"(?<!\\)[#_^~]", outside.replace(r"\label{tab:table-", ""))
    assert [line for line in outside.splitlines() if re.search(r"(?<!\\)%", line)] == [r"\resizebox{\textwidth}{!}{%"]


def test_names_cannot_break_a_markdown_row(nasty):
    lines = [line for line in markdown(fill(TABLE_1, [nasty])).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<script" not in markdown(fill(TABLE_1, [nasty]))


def test_csv_has_the_figures_in_full(tmp_path):
    run = measured(write_run(tmp_path, "sft", even_results(dict.fromkeys(PARTS, 1 / 3), spread=0.0)))
    table = records(fill(TABLE_1, [run], with_published=True))
    row = table["Ours-1.3B (Base Model)"]
    assert float(row["aesthetics_percent"]) == pytest.approx(33.3333)
    assert (row["aesthetics_scored"], row["facesim_expected"], row["protocol"]) == ("4", "2", "paper")
    assert row["total_percent_printed"] == "54.33"
    assert row["commit"] == "0123456789abcdef"
    assert table["Vidu 2.0"]["total_percent"] == ""
    assert all(None not in line and None not in line.values() for line in table.values())


# Command --------------------------------------------------------------------------------------------------------------


def test_the_command_prints_or_writes_tables(tmp_path, capsys):
    run = write_run(tmp_path / "run", "sft", even_results(dict.fromkeys(PARTS, 0.5)))
    assert main(["report", str(run), "--table", "1", "--resamples", "50"]) == 0
    printed = capsys.readouterr().out
    assert "Protocol paper, open domain" in printed
    assert "| Ours-1.3B (Base Model) | 50.00%" in printed
    assert main(["report", str(run), "--out", str(tmp_path / "out"), "--no-page", "--resamples", "50"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{layout.slug}.{suffix}" for layout in LAYOUTS.values() for suffix in ("md", "csv", "tex")
    )
    assert (tmp_path / "out" / "table_1.md").read_text(encoding="utf-8").startswith("**Table 1.**")


def test_protocol_chooses_among_runs(tmp_path, capsys):
    scores = even_results(dict.fromkeys(PARTS, 0.5))
    old = write_run(tmp_path / "old", "sft", scores)
    new = write_run(tmp_path / "new", "sft", scores, protocol="opens2v-1.0")
    assert main(["report", str(old), str(new)]) == 2
    assert "different protocols never stand in one column" in capsys.readouterr().err
    assert main(["report", str(old), str(new), "--protocol", "opens2v-1.0", "--resamples", "50"]) == 0
    out, err = capsys.readouterr()
    assert "Protocol opens2v-1.0" in out
    assert "old left out: protocol paper" in err


def test_rows_and_metrics_can_be_said_by_hand(tmp_path, capsys):
    results = [*even_results(dict.fromkeys(PARTS, 0.5)), Result("x", "sharpness", 0.25), Result("y", "sharpness", 0.75)]
    run = write_run(tmp_path / "run", "whatever", results)
    arguments = ["--row", f"2:no_vlm_encoder={run}", "--metric", "video_quality=sharpness", "--resamples", "50"]
    assert main(["report", "--table", "2", *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"w/o VLM Encoder \| 50.00%.*\| 50.00%<sup>\w</sup> \\\[", out)
    assert "Column Video Quality reads sharpness." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run: name the folders"),
        (["nowhere"], "no run.json here"),
        (["--with-published", "--table", "4"], "no such table; choose from"),
        (["--with-published", "--row", "no_vlm=x"], "did you mean 'no_vlm_encoder'"),
        (["--with-published", "--row", "sft"], "must be two things with a '=' between them"),
        (["--with-published", "--metric", "face=x"], "did you mean 'facesim'"),
        (["--with-published", "--level", "95"], "--level 95: must lie between 0 and 1"),
        (["--with-published", "--resamples", "0"], "must be at least 1"),
        (["--with-published", "--seed", "-1"], "must be 0 or more"),
        (["--with-published", "--out", "{tmp}", "--link", "a=javascript:alert(1)"], "begins with http"),
        (["--with-published", "--out", "{tmp}", "--items", "none.json"], "no such file"),
        (["--with-published", "--out", "{tmp}", "--items", "none.jsonl"], "no such file"),
        (["--with-published", "--out", "{tmp}/file"], "file is a file; give the name of a folder"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(arguments, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["report", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
