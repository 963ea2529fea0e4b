"""`idc bench grpo`: an iteration of online alignment and its parts: all steps or one, subject cache on or off.

The stage is `idc.stages.grpo.GRPO` in a Lightning trainer, all cases on the same groups of the same conditions: the
paper's rollouts with every step stochastic and trained, and Flash-GRPO's with one. Encoding, rollouts, rewards and
training are the parts that the stage itself logs (`perf/*_seconds`). `trained` counts forward passes with a gradient,
`sampled` those without, in samples per iteration; `caches`, how often the subject side was computed for one of these.
The reward is one of pixels that costs next to nothing, so the part `reward` is the decoding: what networks judge takes
the same time in every case.
"""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from idc.bench.cases import NOTHING, WHOLE, Around, Case, Clock, Group, Repeat, nothing_shared, reset_peak
from idc.bench.context import Bench, told
from idc.bench.models import RandomSpec, random_encoders, random_sample
from idc.bench.results import Aim, Report, at_least
from idc.bench.setup import PAPER
from idc.errors import UserError
from idc.models.codecs import Codec
from idc.models.toy_codec import CosineCodec
from idc.rewards.composite import Composite, Term
from idc.rewards.runner import RewardRunner
from idc.rewards.watch import Saturation
from idc.stages.grpo import GRPO, PARTS
from idc.stages.rollouts import Rollouts
from idc.stages.updates import PolicyGradient
from idc.types import Batch

TITLE = "alignment, an iteration"
# As recipes/alignment/wan1.3b.yaml and recipes/grpo.yaml have them.
REAL = {"steps": 20, "scale": 4.5, "shift": 3.0, "batch": 1, "shared_noise": True}
SMALL = {"steps": 8, "scale": 1.0, "shift": 3.0, "batch": 4, "shared_noise": True}
REAL_SIZE: dict[str, Any] = {"frames": 33, "height": 240, "width": 416}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all steps": ({"window": "all", "noise_level": 1.0}, {}),
    "one step": ({"window": "one", "noise_level": 0.7}, {"step_weight": "rectified"}),
}


@dataclass(frozen=True)
class Plan:
    """How many rollouts of how many conditions an iteration has, and how they are sampled."""

    rollouts: int
    group: int
    settings: Mapping[str, Any]

    def check(self) -> Plan:
        """Raises `UserError` for groups that do not fill an iteration."""
        if self.rollouts % self.group:
            near = max(1, round(self.rollouts / self.group)) * self.group
            raise UserError(f"--rollouts {self.rollouts}: must be whole groups of {self.group}; the nearest is {near}")
        return self


def plan_of(bench: Bench) -> Plan:
    """From the command line, the recipe's stage where it is this one, or what fits the size."""
    settings = dict(REAL if bench.is_real else SMALL)
    group = 8 if bench.is_real else 4
    rollouts = group if bench.is_real else 2 * group
    own = getattr(bench.recipe.stage, "rollouts", None) if bench.recipe else None
    if own is not None:
        names = ("steps", "scale", "image_scale", "shift", "kernel", "batch", "shared_noise")
        settings = {name: getattr(own, name) for name in names}
        group, rollouts = bench.recipe.data.group_size, bench.recipe.data.batch_size
    if bench.options.get("steps"):
        settings["steps"] = bench.options["steps"]
    group = bench.options.get("group") or group
    return Plan(bench.options.get("rollouts") or max(rollouts, group), group, settings).check()


def adapted(bench: Bench) -> Bench:
    """Videos as small as public recipes align such models at, unless a recipe or the user says otherwise."""
    setup = bench.setup
    papers = {name: getattr(setup, name) for name in PAPER} == PAPER
    if bench.recipe or not papers or not bench.is_real or bench.options.get("sized"):
        return bench
    return replace(bench, setup=replace(setup, **REAL_SIZE))


def name_of(way: str, cache: bool) -> str:
    return f"{way}, cache {'on' if cache else 'off'}"


def groups(bench: Bench) -> list[Group]:
    """One group: a turn builds its stage from random weights and runs it in a trainer."""
    bench = adapted(bench)
    plan = plan_of(bench)
    cases = [_case(bench, plan, way, cache) for way in WAYS for cache in (True, False)]
    return [Group(TITLE, partial(nothing_shared, *cases))]


def aims(report: Report, bench: Bench) -> list[Aim]:
    """The one of alignment."""
    row = report.row(name_of("all steps", True))
    plan = plan_of(bench)
    note = f"{plan.rollouts} rollouts in groups of {plan.group}, {plan.settings['steps']} steps"
    measured = row.ratio.median if row and row.ratio else None
    return [at_least("all steps' time over one step's, an iteration", measured, 4.0, "times", note)]


def _case(bench: Bench, plan: Plan, way: str, cache: bool) -> Case:
    counts: dict[str, float] = {}
    settings: dict[str, str] = {}
    against = {"all steps": name_of("one step", cache), "one step": "" if cache else name_of("one step", True)}[way]

    def flops() -> int:
        return iteration_flops(bench, plan, cache, counts)

    return Case(
        name_of(way, cache),
        partial(_turn, bench, plan, way, cache, counts, settings),
        against=against,
        flops=flops,
        items=plan.rollouts,
        settings=settings,
        counts=counts,
    )


def trainable(bench: Bench) -> Literal["lora", "full"]:
    """What is trained: adapters of a published model, all of a toy's."""
    return "lora" if bench.is_real else "full"


def iteration_flops(bench: Bench, plan: Plan, cache: bool, counts: Mapping[str, float]) -> int:
    """Of the transformer in one iteration, by what was counted while it ran, without recomputation."""
    setup = bench.setup
    spec = RandomSpec.like(setup.spec, bench.device, torch.float32, setup.seed)
    model = spec.build(setup.text_dim, setup.vlm_dim, "meta")
    # Under guidance every other forward (and every other cache) is that of the condition without subjects.
    branches = (setup.subjects,) if plan.settings.get("scale") == 1 else (setup.subjects, 0)
    total = 0.0
    for n in branches:
        whole, light = (bench.step_flops(model, n, trainable(bench), cached=cached) for cached in (False, True))
        run = light if cache else whole
        total += counts.get("trained", 0) * run.useful + counts.get("sampled", 0) * run.forward
        total += counts.get("caches trained", 0) * (whole.useful - light.useful)
        total += counts.get("caches sampled", 0) * (whole.forward - light.forward)
    return int(total / len(branches))


# A turn ---------------------------------------------------------------------------------------------------------------


class Conditions(LightningDataModule):
    """The same groups of the same conditions in every iteration, with fresh seeds."""

    features = None

    def __init__(self, bench: Bench, plan: Plan, iterations: int) -> None:
        super().__init__()
        self.batch_size, self.group_size, self.iterations = plan.rollouts, plan.group, iterations
        self.bench, self.rule = bench, _Rule(bench.setup.subjects)

    def train_dataloader(self) -> DataLoader:
        setup = self.bench.setup
        conditions = [random_sample(setup, number=number) for number in range(self.batch_size // self.group_size)]
        samples = tuple(sample for sample in conditions for _ in range(self.group_size))
        first = torch.arange(self.batch_size)
        batches = [
            Batch(samples, first + 1000 * number, setup.bucket, index=number) for number in range(self.iterations)
        ]
        return DataLoader(batches, batch_size=None, collate_fn=_same)  # type: ignore[arg-type]  # a list is a data set


def _same(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class _Rule:
    max_subjects: int


class Meter(Callback):
    """Per iteration: the stage's parts, the whole, and samples through the transformer.

    Used as a context around the trainer, which leaves `around` also where the trainer fails.
    """

    def __init__(self, device: torch.device, warm_up: int, repeats: int, around: Around = NOTHING) -> None:
        self.device, self.warm_up, self.iterations = device, warm_up, warm_up + repeats
        self.around, self._entered = around, ExitStack()
        self.repeats: list[Repeat] = []
        self.passes: list[dict[str, int]] = []

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def count(module: Any, arguments: Any, keywords: Any) -> None:
            latents = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
            cache = "caches " if latents is None else ""
            kind = "trained" if torch.is_grad_enabled() else "sampled"
            self.passes[-1][cache + kind] += 1 if latents is None else len(latents)

        pl_module.transformer.register_forward_pre_hook(count, with_kwargs=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up:
            reset_peak(self.device)
            self._entered.enter_context(self.around)
        self.passes.append(dict.fromkeys(("trained", "sampled", "caches trained", "caches sampled"), 0))
        self.clock = Clock(self.device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        parts = {part: float(trainer.callback_metrics[f"perf/{part}_seconds"]) for part in PARTS}
        self.repeats.append({WHOLE: self.clock.read()[WHOLE], **parts})
        if batch_idx == self.iterations - 1:  # what the trainer does at its end is no part of an iteration
            self._entered.close()


def _codec(bench: Bench) -> Codec | None:
    """The recipe's own codec, where it has no weights to read."""
    own = bench.recipe.stage.encoders.codec if bench.recipe else None
    return own if isinstance(own, CosineCodec) else None


def make_stage(bench: Bench, plan: Plan, way: str, cache: bool) -> GRPO:
    """The stage as recipes/grpo.yaml describes it, on random weights."""
    setup = bench.setup
    encoders = random_encoders(setup, bench.device)
    rollouts, objective = WAYS[way]
    return GRPO(
        reward=RewardRunner(Composite([Term(Saturation())]), where="process"),
        rollouts=Rollouts(**{**plan.settings, **rollouts}, cache=cache),
        objective=PolicyGradient(**objective),
        transformer=RandomSpec.like(setup.spec, bench.device, torch.float32, setup.seed),
        codec=_codec(bench) or encoders.codec,
        text=encoders.text,
        vlm=encoders.vlm,
        trainable=trainable(bench),
        optimizer=partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        compute_dtype=str(bench.dtype).removeprefix("torch."),
        speed=replace(bench.speed, compile=False),  # the stage takes no other
    )


def _turn(
    bench: Bench, plan: Plan, way: str, cache: bool, counts: dict[str, float], settings: dict[str, str], warm_up: int,
    repeats: int, around: Around = NOTHING,
) -> list[Repeat]:  # fmt: skip
    with _silent(), Meter(bench.device, warm_up, repeats, around) as meter:
        trainer = Trainer(
            max_steps=warm_up + repeats,
            accelerator="gpu" if bench.cuda else "cpu",
            devices=1,
            logger=False,
            callbacks=[meter],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        stage = make_stage(bench, plan, way, cache)
        _fit(trainer, stage, Conditions(bench, plan, warm_up + repeats))
    counts.update(meter.passes[-1])
    settings.update(told(stage.speed_chosen))
    return meter.repeats[warm_up:]


def _fit(trainer: Trainer, stage: GRPO, data: Conditions) -> None:
    """`trainer.fit`, from which Ctrl-C comes out as itself: Lightning makes an exit of it and ignores further ones."""
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(stage, datamodule=data)
    except SystemExit:
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt from None


@contextmanager
def _silent() -> Iterator[None]:
    """Lightning tells of devices and of what is not logged."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
