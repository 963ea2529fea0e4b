"""The paper's tables 1, 2, 3, S.5 and S.7: their rows, their columns, and the figures printed there.

A row is filled by the run whose `system` (run.json) is the row's name, one of its other names, or its printed title;
case and punctuation do not matter. The names of ablation rows are those of the files under recipes/ablations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PERCENT, PLAIN = "percent", "plain"
GMESCORE, NEXUSSCORE, NATURALSCORE = "gmescore", "nexusscore", "naturalscore"


@dataclass(frozen=True)
class Column:
    """A column of scores.

    Attributes:
        key: a metric's name, "total", "video_quality", or "subject_mean" / "subject_min" (identity over a video's
            subjects: `idc.report.tracks`).
        title: as printed, without the arrow that says that higher is better.
        unit: PERCENT of a fraction with two decimals, or PLAIN with three.
        protocols: where the column stands; () for all.
    """

    key: str
    title: str
    unit: str = PERCENT
    protocols: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row: `names` fill it, the first of them that a run has; `printed` are the paper's cells, by column key."""

    names: tuple[str, ...]
    title: str
    printed: tuple[str, ...]
    group: str = ""
    parameter: float | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Layout:
    """A table as it is printed.

    Attributes:
        number: "1", "S.5", ...
        caption: what it shows, in our words.
        head: heading of the first column.
        columns: of scores, with those that only other protocols have.
        printed_columns: keys of the columns that the paper prints, in the order of `Row.printed`.
        rows: from the top.
        parameter: the entry of run.json's `columns` that tells the rows apart, instead of their names.
        changes: whether cells below the first row say how much they differ from it, in per cent of it.
        notes: what is known to be wrong in the printed figures: (row's name, column's key, what).
    """

    number: str
    caption: str
    head: str
    columns: tuple[Column, ...]
    printed_columns: tuple[str, ...]
    rows: tuple[Row, ...]
    parameter: str = ""
    changes: bool = False
    notes: tuple[tuple[str, str, str], ...] = ()

    @property
    def slug(self) -> str:
        return "table_" + self.number.lower().replace(".", "")


def normal_name(name: str) -> str:
    """A system's name without case and punctuation: "VACE-1.3B" is "vace_1_3b"."""
    return re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_")


TOTAL = Column("total", "Total Score")
AESTHETICS = Column("aesthetics", "Aesthetics")
FACESIM = Column("facesim", "FaceSim")
NEXUS = Column(NEXUSSCORE, "NexusScore")
QALIGN = Column("qalign", "Q-Align", PLAIN)

PROPRIETARY, OPEN = "Proprietary Models", "Open-source Models"
BASE = ("sft", "base", "ours", "ours_1.3b")
ONLINE = ("grpo", "online", "ours_1.3b_rl")

TABLE_1 = Layout(
    number="1",
    caption="Comparison on the open-domain subject-to-video benchmark. A protocol's total weighs its other columns.",
    head="Method",
    columns=(
        TOTAL,
        AESTHETICS,
        Column("motion_smoothness", "Smoothness", protocols=("opens2v-1.1",)),
        Column("motion_amplitude", "Motion"),
        FACESIM,
        Column(GMESCORE, "GmeScore"),
        NEXUS,
        Column(NATURALSCORE, "NaturalScore"),
    ),
    printed_columns=("total", "aesthetics", "motion_amplitude", "facesim", GMESCORE, NEXUSSCORE, NATURALSCORE),
    rows=tuple(
        Row(names, title, tuple(printed.split()), group)
        for names, title, printed, group in (
            (("vidu_2.0", "vidu"), "Vidu 2.0", "47.59 41.47 13.52 35.11 67.57 43.55 71.44", PROPRIETARY),
            (("pika_2.1", "pika"), "Pika 2.1", "48.88 46.87 24.70 30.80 69.21 45.41 69.79", PROPRIETARY),
            (("kling_1.6", "kling"), "Kling 1.6", "54.46 44.60 41.60 40.10 66.20 45.92 79.06", PROPRIETARY),
            (("vace_1.3b", "vace"), "VACE-1.3B", "45.53 48.24 18.83 20.58 71.26 37.95 71.78", OPEN),
            (("vace_14b",), "VACE-14B", "52.87 47.21 15.02 55.09 73.27 44.20 72.78", OPEN),
            (("phantom_1.3b", "phantom"), "Phantom-1.3B", "50.71 46.67 14.29 48.55 69.43 42.44 70.26", OPEN),
            (("phantom_14b",), "Phantom-14B", "52.32 46.39 33.42 51.48 70.65 37.43 68.66", OPEN),
            (
                ("skyreels_a2", "skyreels"),
                "SkyReels-A2-P14B",
                "49.61 39.40 25.60 45.95 64.54 43.77 67.22",
                OPEN,
            ),
            (BASE, "Ours-1.3B (Base Model)", "54.33 42.50 38.00 58.12 64.06 43.22 71.09", OPEN),
            (ONLINE, "Ours-1.3B (Base Model + online RL)", "55.16 48.85 36.50 66.10 62.20 43.45 69.15", OPEN),
            (
                ("sft_14b", "ours_14b"),
                "Ours-14B (Large-scale Model)",
                "57.05 45.28 40.34 60.71 67.49 45.11 73.23",
                OPEN,
            ),
        )
    ),
    notes=(("vace_14b", GMESCORE, "a misprint for 67.27, with which the printed total follows"),),
)

TABLE_2 = Layout(
    number="2",
    caption="Ablation of the key components. Changes are relative to the first row.",
    head="Method",
    columns=(FACESIM, QALIGN, Column("video_quality", "Video Quality"), TOTAL),
    printed_columns=("facesim", "qalign", "video_quality", "total"),
    rows=(
        Row(BASE, "Ours-1.3B (Base Model)", ("58.12", "0.351", "48.91", "54.33")),
        Row(("no_hierarchical_attention",), "w/o Hierarchical Attention", ("51.34", "0.348", "47.52", "50.11")),
        Row(("no_vlm_encoder",), "w/o VLM Encoder", ("56.98", "0.287", "46.88", "49.89")),
        Row(("no_curated_data",), "w/o Curated Data", ("54.55", "0.321", "45.13", "48.78")),
    ),
    changes=True,
    notes=(("sft", "video_quality", "the paper does not define this measure"),),
)

ALGORITHMS, COMPONENTS = "Comparison of RL Algorithms", "Ablation on Reward Components"

TABLE_3 = Layout(
    number="3",
    caption="Online RL against offline DPO and the SFT baseline, and the parts of the composite reward.",
    head="Method",
    columns=(FACESIM, AESTHETICS, QALIGN, TOTAL),
    printed_columns=("facesim", "aesthetics", "qalign", "total"),
    rows=(
        Row(BASE, "SFT Baseline", ("58.12", "42.50", "0.351", "54.33")),
        Row(("dpo",), "DPO (Offline)", ("62.35", "45.15", "0.382", "54.80"), ALGORITHMS),
        Row(ONLINE, "Ours (Online)", ("66.10", "48.85", "0.410", "55.16"), ALGORITHMS),
        Row(
            ("no_fidelity", "no_fidelity_reward"),
            "Ours w/o Fidelity (R_fid)",
            ("45.32", "47.10", "0.391", "53.50"),
            COMPONENTS,
        ),
        Row(
            ("no_quality", "no_quality_reward"),
            "Ours w/o Quality (R_qua)",
            ("63.50", "43.81", "0.379", "54.82"),
            COMPONENTS,
        ),
        Row(
            ("no_natural", "no_natural_reward"),
            "Ours w/o Natural (R_nat)",
            ("69.30", "50.83", "0.361", "53.01"),
            COMPONENTS,
        ),
        Row(ONLINE, "Ours (Online)", ("66.10", "48.85", "0.410", "55.16"), COMPONENTS),
    ),
)

TABLE_S5 = Layout(
    number="S.5",
    caption="Ablation of the hierarchical attention, stage by stage.",
    head="Method",
    columns=(FACESIM, NEXUS, TOTAL),
    printed_columns=("facesim", NEXUSSCORE, "total"),
    rows=(
        Row(("full", *ONLINE, *BASE), "Full Model (3 Stages)", ("66.10", "45.1", "55.16")),
        Row(("no_intra_subject",), "w/o Stage 1 (Intra-Subject)", ("63.2", "44.2", "54.1")),
        Row(("no_inter_subject",), "w/o Stage 2 (Inter-Subject)", ("64.5", "44.5", "54.5")),
        Row(("no_cross_modal",), "w/o Stage 3 (Cross-Modal)", ("58.9", "38.7", "50.8")),
        Row(("vanilla",), "Vanilla Attention (Stage 3 only)", ("55.1", "39.1", "49.7")),
    ),
    notes=(
        ("full", NEXUSSCORE, "table 1 prints 43.45 for the model with the same FaceSim and total, and 45.11 for 14B"),
    ),
)

TABLE_S7 = Layout(
    number="S.7",
    caption="The balance of average and least identity in the fidelity reward.",
    head="λ",
    columns=(Column("subject_mean", "Avg FaceSim"), Column("subject_min", "Min FaceSim"), TOTAL),
    printed_columns=("subject_mean", "subject_min", "total"),
    rows=(
        Row(("lambda_0",), "0.0 (Average only)", ("67.2", "45.1", "54.8"), parameter=0.0),
        Row(("lambda_0.25",), "0.25", ("66.8", "50.3", "55.0"), parameter=0.25),
        Row(("lambda_0.5",), "0.5", ("66.1", "53.5", "55.2"), parameter=0.5),
        Row(("lambda_0.75",), "0.75", ("65.2", "52.1", "54.9"), parameter=0.75),
        Row(("lambda_1",), "1.0 (Minimum only)", ("63.9", "51.5", "54.5"), parameter=1.0),
    ),
    parameter="lambda",
)

LAYOUTS = {layout.number: layout for layout in (TABLE_1, TABLE_2, TABLE_3, TABLE_S5, TABLE_S7)}


def metric_title(name: str) -> str:
    """A metric's name as the tables head it."""
    titles = {column.key: column.title for layout in LAYOUTS.values() for column in layout.columns}
    base = next((key for key in titles if name.startswith(f"{key}_")), "")
    if name not in titles and base:  # a variant, such as "facesim_arc"
        return f"{titles[base]} ({name.removeprefix(base + '_').replace('_', ' ')})"
    return titles.get(name, name.replace("_", " ").capitalize())
