from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idc.errors import UserError
from idc.metrics.total import DOMAINS, METRICS, PROTOCOLS, normalise, required, scale, total_score, weights

# Percent: total, aesthetics, motion, FaceSim, Gme, Nexus, Natural, as printed in the paper's table 1.
TABLE_1 = {
    "Vidu 2.0": (47.59, 41.47, 13.52, 35.11, 67.57, 43.55, 71.44),
    "Pika 2.1": (48.88, 46.87, 24.70, 30.80, 69.21, 45.41, 69.79),
    "Kling 1.6": (54.46, 44.60, 41.60, 40.10, 66.20, 45.92, 79.06),
    "VACE-1.3B": (45.53, 48.24, 18.83, 20.58, 71.26, 37.95, 71.78),
    "Phantom-1.3B": (50.71, 46.67, 14.29, 48.55, 69.43, 42.44, 70.26),
    "Phantom-14B": (52.32, 46.39, 33.42, 51.48, 70.65, 37.43, 68.66),
    "SkyReels-A2-P14B": (49.61, 39.40, 25.60, 45.95, 64.54, 43.77, 67.22),
}
VACE_14B = (52.87, 47.21, 15.02, 55.09, 73.27, 44.20, 72.78)  # Gme is misprinted for 67.27
OWN = {  # do not follow from their columns: the computed total is what we print
    "base 1.3B": ((54.33, 42.50, 38.00, 58.12, 64.06, 43.22, 71.09), 54.677),
    "base 1.3B + online RL": ((55.16, 48.85, 36.50, 66.10, 62.20, 43.45, 69.15), 56.212),
    "14B": ((57.05, 45.28, 40.34, 60.71, 67.49, 45.11, 73.23), 57.112),
}
COLUMNS = ("aesthetics", "motion_amplitude", "facesim", "gmescore", "nexusscore", "naturalscore")


def row(figures: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(COLUMNS, (figure / 100 for figure in figures[1:]), strict=True))


@pytest.mark.parametrize("protocol", ["paper", "opens2v-1.0"])
@pytest.mark.parametrize("figures", TABLE_1.values(), ids=TABLE_1)
def test_published_rows_follow_from_their_columns(figures, protocol):
    total = 100 * total_score(row(figures), protocol=protocol, domain="open")
    assert total == pytest.approx(figures[0], abs=0.012)


def test_the_one_misprinted_row_follows_from_the_corrected_column():
    assert abs(100 * total_score(row(VACE_14B), protocol="paper") - VACE_14B[0]) > 0.7
    corrected = row(VACE_14B) | {"gmescore": 0.6727}
    assert 100 * total_score(corrected, protocol="paper") == pytest.approx(VACE_14B[0], abs=0.012)


@pytest.mark.parametrize(("figures", "computed"), OWN.values(), ids=OWN)
def test_the_papers_own_rows_do_not_follow_from_their_columns(figures, computed):
    total = 100 * total_score(row(figures), protocol="paper")
    assert total == pytest.approx(computed, abs=0.0006)
    assert abs(total - figures[0]) > 0.05


def test_the_published_row_of_1_1_follows_from_its_columns():
    columns = (46.84, 97.61, 22.48, 55.23, 68.32, 48.52, 73.63)
    scores = dict(zip(METRICS, (column / 100 for column in columns), strict=True))
    assert 100 * total_score(scores, protocol="opens2v-1.1") == pytest.approx(60.42, abs=0.012)
    assert 100 * total_score(scores, protocol="opens2v-1.0") < 60.42 - 1.8


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_weights_sum_to_one_and_name_known_metrics(protocol, domain):
    assert math.fsum(weights(protocol, domain).values()) == pytest.approx(1, abs=1e-12)
    assert set(required(protocol, domain)) <= set(METRICS)
    assert ("nexusscore" in required(protocol, domain)) == (domain != "human")
    assert ("motion_smoothness" in required(protocol, domain)) == (protocol == "opens2v-1.1")
    for value in (0.0, 0.3, 1.0):
        scores = dict.fromkeys(METRICS, value)
        assert total_score(scores, protocol=protocol, domain=domain) == pytest.approx(value)


def test_weights_cannot_be_changed_through_what_is_handed_out():
    weights("paper")["facesim"] = 9.0
    assert weights("paper")["facesim"] == 0.2


@given(st.floats(-1e6, 1e6), st.sampled_from(METRICS), st.sampled_from(PROTOCOLS))
def test_a_raw_score_is_cut_to_its_range_and_mapped_linearly(raw, name, protocol):
    lo, hi = scale(name, protocol)
    fraction = normalise(name, raw, protocol)
    assert 0 <= fraction <= 1
    if lo <= raw <= hi:
        assert lo + fraction * (hi - lo) == pytest.approx(raw, abs=1e-9)
    else:
        assert fraction == float(raw > hi)


def test_scales_are_the_benchmarks_and_the_papers_nexus_is_a_cosine():
    assert normalise("aesthetics", 5.5, "opens2v-1.1") == 0.5
    assert normalise("naturalscore", 4, "paper") == 0.75
    assert normalise("nexusscore", 0.02, "opens2v-1.0") == pytest.approx(0.4)
    assert normalise("nexusscore", 0.6, "paper") == 0.6
    assert normalise("motion_amplitude", 1.7, "opens2v-1.0") == 1
    assert normalise("gmescore", -0.1, "opens2v-1.1") == 0


def test_bad_input_is_named_with_the_rule():
    scores: dict[str, float | None] = dict.fromkeys(METRICS, 0.5)
    with pytest.raises(UserError, match=r"'opens2v': no such protocol.*opens2v-1"):
        total_score(scores, protocol="opens2v")
    with pytest.raises(UserError, match=r"'humans': no such domain; did you mean 'human'"):
        total_score(scores, protocol="paper", domain="humans")
    with pytest.raises(UserError, match=r"'face_sim': no metric of the totals; did you mean 'facesim'"):
        total_score(scores | {"face_sim": 0.5}, protocol="paper")
    with pytest.raises(UserError, match=r"facesim=58.12: .*percent"):
        total_score(scores | {"facesim": 58.12}, protocol="paper")
    with pytest.raises(UserError, match=r"naturalscore=-0.2: .*normalise"):
        total_score(scores | {"naturalscore": -0.2}, protocol="paper")
    with pytest.raises(UserError, match=r"no total: facesim missing; .*needs aesthetics"):
        total_score(scores | {"facesim": None}, protocol="paper")
    with pytest.raises(UserError, match=r"no total: facesim is NaN, not a score; .*needs aesthetics"):
        total_score(scores | {"facesim": math.nan}, protocol="paper")
    with pytest.raises(UserError, match=r"no total: facesim missing; aesthetics, gmescore are NaN, not a score; "):
        total_score(scores | {"facesim": None, "gmescore": math.nan, "aesthetics": math.nan}, protocol="paper")
    with pytest.raises(UserError, match="aesthetics, motion_amplitude, facesim"):
        total_score({}, protocol="paper")
    with pytest.raises(UserError, match="aesthetics=nan"):
        normalise("aesthetics", math.nan, "paper")
    with pytest.raises(UserError, match="'qalign'"):
        normalise("qalign", 0.4, "paper")


def test_scores_without_a_weight_are_ignored_even_when_they_are_missing():
    scores: dict[str, float | None] = dict.fromkeys(METRICS, 0.5)
    total = total_score(scores | {"motion_smoothness": None}, protocol="opens2v-1.0")
    assert total == pytest.approx(0.5)
    assert total_score(scores | {"nexusscore": None}, protocol="opens2v-1.1", domain="human") == pytest.approx(0.5)
    assert total_score(scores | {"facesim": 1 + 1e-9}, protocol="paper") == pytest.approx(0.6)
