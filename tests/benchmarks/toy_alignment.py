"""Alignment on the toy world: tables 3 and S.7 of the paper, DPO and the ways of online alignment, over seeds.

    python tests/benchmarks/toy_alignment.py [--out runs/toy_alignment] [--seeds 3] [--iterations 100]
        [--variants SFT GRPO ...] [--checkpoint toy] [--results]

Each variant is a list of recipes, trained by `idc fit` from one start with a seed of its own, and judged on the toy
world's held-out conditions by the validation of recipes/grpo.yaml: the paper's reward and its four parts, whatever the
variant was trained on, the mean and the minimum of the subjects' identities, the exact scores, and the measures that
nothing optimises. Videos of one seed start from the same noise for all variants, so that each is compared with SFT
seed by seed: the table gives the mean over seeds and, for differences, the 95% interval by Student's t.

Run it again to go on: finished runs are skipped, broken ones resume at their last checkpoint. Several may run at once
on different `--variants`; the last one, on all of them, prints the table. `<out>/<run>/judged.json` has every number.
`--results` samples and judges each run by `idc generate` and `idc evaluate` too, for `idc report <out>/evaluate/*`,
which fills the layout of tables 3 and S.7 by the toy world's exact scores, over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        system: as `idc report` knows its row.
        recipes: in the order of `--config`; none is the start itself.
        steps: optimiser steps in units of the iterations that were asked for; what a variant's cost allows.
        min_weight: the paper's lambda, where it belongs to the sweep of table S.7.
    """

    system: str
    recipes: tuple[str, ...] = ()
    steps: float = 1.0
    min_weight: float | None = None


GRPO = "grpo.yaml"
SAMPLING: dict[str, Any] = {"steps": 10, "scale": 1.0, "shift": 3.0}  # of recipes/grpo.yaml, for all variants
# The ablations of the reward align by one step a rollout: the reward is what they differ by, and it rises fastest so.
ONE = (GRPO, "alignment/one_step.yaml")
VARIANTS = {
    "SFT": Variant("sft"),
    "DPO": Variant("dpo", ("dpo.yaml",), 3.0),
    "GRPO, all steps": Variant("grpo_all_steps", (GRPO,), 1.5),
    "GRPO": Variant("grpo", ONE, min_weight=0.5),
    "GRPO, sliding": Variant("grpo_sliding", (GRPO, "alignment/sliding.yaml")),
    "GRPO, group contrast": Variant("grpo_contrast", (GRPO, "alignment/contrast.yaml")),
    "DiffusionNFT": Variant("nft", (GRPO, "alignment/nft.yaml")),
    "w/o fidelity": Variant("no_fidelity", (*ONE, "rewards/no_fidelity.yaml")),
    "w/o quality": Variant("no_quality", (*ONE, "rewards/no_quality.yaml")),
    "w/o natural": Variant("no_natural", (*ONE, "rewards/no_natural.yaml")),
    "lambda 0": Variant("lambda_0", (*ONE, "rewards/lambda_0.00.yaml"), min_weight=0.0),
    "lambda 0.25": Variant("lambda_0.25", (*ONE, "rewards/lambda_0.25.yaml"), min_weight=0.25),
    "lambda 0.75": Variant("lambda_0.75", (*ONE, "rewards/lambda_0.75.yaml"), min_weight=0.75),
    "lambda 1": Variant("lambda_1", (*ONE, "rewards/lambda_1.00.yaml"), min_weight=1.0),
    "anti-leak": Variant("anti_leak", (*ONE, "rewards/anti_leak.yaml")),
    "normalised": Variant("normalised", (*ONE, "rewards/normalised.yaml")),
}
HELD_OUT = 192  # conditions: three times those of the recipe, for its standard error
COLUMNS = (
    "reward", "face", "subject", "aesthetics", "natural", "identity", "identity_min", "toy",
    "motion", "sharpness", "saturation",
)  # fmt: skip


# A run --------------------------------------------------------------------------------------------------------------


def train(variant: Variant, folder: Path, seed: int, arguments: argparse.Namespace) -> str:
    """Train where that is not done; what its start is to `Aligned.checkpoint`."""
    from idc.cli import main

    if not variant.recipes:
        return arguments.checkpoint
    steps = max(1, round(variant.steps * arguments.iterations))
    runs = folder / "train" / "run"  # several versions where the first was killed before it saved anything
    complete = f"version_*/checkpoints/step-{steps:08d}/manifest.json"
    if not any(runs.glob(complete)):
        files = [pairs_of_seed(name, folder, seed) for name in variant.recipes]
        paths = [value for file in files for value in ("--config", str(file))]
        settings = {
            "seed_everything": seed,
            "data.init_args.seed": seed,
            "trainer.accelerator": arguments.accelerator,
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 0,
            "trainer.logger.init_args.save_dir": folder / "train",
            "trainer.logger.init_args.name": "run",
            "model.init_args.checkpoint": arguments.checkpoint,
            "ckpt_path": "auto",
        }
        status = main(["fit", *paths, *(f"--{key}={value}" for key, value in settings.items())])
        if status:
            raise SystemExit(f"idc fit ended with status {status}: {folder}")
        if not any(runs.glob(complete)):  # a signal ends a run politely, with status 0
            raise SystemExit(f"idc fit was stopped before step {steps}: {folder}")
    return str(runs)


def pairs_of_seed(recipe: str, folder: Path, seed: int) -> Path:
    """The recipe; the one of DPO with pairs of the seed's own, other conditions and other candidates."""
    path = ROOT / "recipes" / recipe
    if recipe != "dpo.yaml":
        return path
    recipe_text = path.read_text()
    for old, new in (
        ("data_shards/toy/pairs/", f"data_shards/toy/pairs/seed{seed}/"),
        ("seed: 500000000", f"seed: {500_000_000 + 100_000 * seed}"),
        ("candidates: 6", f"candidates: 6\n          seed: {seed}"),
    ):
        if old not in recipe_text:
            raise SystemExit(f"{path} has no {old!r}: mend {Path(__file__).name}")
        recipe_text = recipe_text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / recipe).write_text(recipe_text)
    return folder / recipe


def judge(checkpoint: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The held-out reward and all that stands beside it, by `GRPO.validation_step`."""
    from lightning.pytorch import Trainer

    from idc.data.module import VideoDataModule
    from idc.data.sources import ToyShards
    from idc.metrics.toy import ToyIdentity, ToyScores
    from idc.models.sampling import SamplingChanges
    from idc.rewards import (
        MetricReward,
        Motion,
        PaperReward,
        RewardRunner,
        Saturation,
        Sharpness,
        ToyAesthetics,
        ToyFace,
        ToyNatural,
        ToySubject,
    )
    from idc.stages.grpo import GRPO

    lowest = ToyFace(min_weight=1.0)
    lowest.name = "identity_min"
    exact = [MetricReward(ToyIdentity(), "identity"), lowest, MetricReward(ToyScores(), "toy")]
    watched = [*exact, Motion(), Sharpness(), Saturation()]
    composite = PaperReward(ToyFace(), ToySubject(), ToyAesthetics(), ToyNatural(), watched=watched)
    stage = GRPO(
        checkpoint=checkpoint,
        reward=RewardRunner(composite, where="process"),
        sampling=SamplingChanges(**SAMPLING),
    )
    held_out = ToyShards(str(ROOT / "data_shards/toy/held_out_192"), HELD_OUT, 1_000_000_000)
    data = VideoDataModule(
        [held_out], [[9, 64, 64]], val_sources=[held_out], batch_size=32, val_batch_size=32, seed=seed
    )
    trainer = Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    (found,) = trainer.validate(stage, datamodule=data, verbose=False)
    return {name: found["val/reward" if name == "reward" else f"val/reward/{name}"] for name in COLUMNS}


def keep_results(slug: str, variant: Variant, folder: Path, seed: int, arguments: argparse.Namespace) -> None:
    """Videos and their scores in the form that `idc report` reads, by the commands that users have."""
    from idc.cli import main

    videos = folder / "videos"
    generate = ["generate", "--config", str(ROOT / "recipes/generate.yaml"), f"--model.init_args.out={videos}"]
    evaluate = ["evaluate", "--config", str(ROOT / "recipes/evaluate.yaml"), f"--model.init_args.videos={videos}"]
    # Of its own a run samples as it was validated, and the start with guidance.
    sampling = [f"--model.init_args.sampling={json.dumps(SAMPLING)}", f"--data.init_args.seed={seed}"]
    checkpoint = train(variant, folder, seed, arguments)
    columns = {"seed": seed} | ({} if variant.min_weight is None else {"lambda": variant.min_weight})
    label = f"--model.init_args.system={variant.system}"
    label_columns = f"--model.init_args.columns={json.dumps(columns)}"
    place = f"--model.init_args.out={arguments.out / 'evaluate' / slug}"
    for command in (
        [*generate, *sampling, f"--model.init_args.checkpoint={checkpoint}"],
        [*evaluate, label, label_columns, place],
    ):
        if (status := main(command)) not in (0, 3):  # 3: some clips failed, which the report tells
            raise SystemExit(f"idc {' '.join(command)} ended with status {status}")


# The table ----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95% interval by Student's t; NaN of a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Mean by variant, and below it the mean difference to SFT of the same seed with its interval."""
    start = results.get("SFT", {})
    lines = [f"{'':22}" + "".join(f"{name:>14}" for name in COLUMNS)]
    for variant, seeds in results.items():
        means = [statistics.fmean(found[name] for found in seeds.values()) for name in COLUMNS]
        lines.append(f"{f'{variant} (n={len(seeds)})':22}" + "".join(f"{mean:14.4f}" for mean in means))
        common = [seed for seed in seeds if seed in start and variant != "SFT"]
        if common:
            cells = []
            for name in COLUMNS:
                differences = [seeds[seed][name] - start[seed][name] for seed in common]
                half = interval(differences)
                cells.append(f"{statistics.fmean(differences):+.3f}" + ("" if math.isnan(half) else f"±{half:.3f}"))
            lines.append(f"{'  less SFT':22}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_alignment"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--checkpoint", default="toy", help="the start: a name, a run, or a pipeline's folder")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--results", action="store_true", help="also idc generate and idc evaluate, for idc report")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    if Path(arguments.checkpoint).exists():
        arguments.checkpoint = str(Path(arguments.checkpoint).resolve())
    os.chdir(ROOT)  # recipes name their data from there
    warnings.filterwarnings("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = f"{arguments.iterations} iterations from {arguments.checkpoint}"
    results: dict[str, dict[str, dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.variants:
            slug = "".join(c if c.isalnum() else "_" for c in f"{name}-{arguments.iterations}-seed{seed}")
            folder = arguments.out / slug
            judged = folder / "judged.json"
            if not judged.is_file():
                found = judge(train(VARIANTS[name], folder, seed, arguments), seed, arguments)
                folder.mkdir(parents=True, exist_ok=True)
                temporary = judged.with_suffix(".tmp")
                temporary.write_text(json.dumps({"settings": settings, **found}, indent=1))
                temporary.replace(judged)
            found = json.loads(judged.read_text())
            if (before := found.pop("settings")) != settings:
                raise SystemExit(f"{judged} is of {before} and not of {settings}: give another --out")
            results.setdefault(name, {})[str(seed)] = found
            if arguments.results and not (folder / "kept").is_file():
                keep_results(slug, VARIANTS[name], folder, seed, arguments)
                (folder / "kept").touch()
    print(f"\n{settings}, {HELD_OUT} held-out conditions a seed\n{table(results)}")


if __name__ == "__main__":
    main()
