"""`idc bench train`: a step of SFT and its parts, its modes, and a plain diffusers + PyTorch loop on the same weights.

The plain loop is what a user would write: `WanTransformer3DModel` under autocast with float32 weights, PyTorch's SDPA,
diffusers' full gradient checkpointing, clipping and `torch.optim.AdamW`. It knows no references, so it is compared with
our stage on the model without blocks. Ours is `idc.stages.sft.SFT`: its features, its loss, its model. Lightning's loop
around it is measured by tests/benchmarks/bench_overhead.py. A step counts three forwards, without recomputation.

With references, every step of a real size has other numbers of their tokens (`idc.bench.lengths`). The other benchmarks
keep theirs: a video or an iteration is many forwards of one size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idc.bench.cases import Case, Clock, Group, Step, free, stepwise
from idc.bench.context import Bench, apply_speed, relative_difference
from idc.bench.lengths import varied, widest
from idc.bench.models import RandomSpec, plain_wan, random_encoders, random_sample, with_features, without_blocks
from idc.bench.results import Aim, Report, at_least, at_most
from idc.bench.setup import Setup
from idc.flow.path import interpolate, velocity_target
from idc.models.conditioning import Drop
from idc.models.speed import Speed
from idc.stages.speed import optimizer_settings
from idc.types import Sample

OURS, PLAIN, BARE = "ours", "plain loop", "ours, blocks left out"
BACKBONE = "training, blocks off"
CLIP = 1.0  # norm of the gradients
Batches = Callable[[], Sequence[Sample]]  # of one step after the other


def groups(bench: Bench) -> list[Group]:
    """The comparison with the plain loop, and ours with subjects in all its modes."""
    return [
        Group(BACKBONE, partial(_against_plain, bench)),
        Group(with_subjects(bench), partial(_modes, bench)),
    ]


def with_subjects(bench: Bench) -> str:
    """Title of the second group."""
    return f"training, {bench.setup.subjects} subjects"


def aims(report: Report, bench: Bench) -> list[Aim]:
    """The three of training."""
    title = with_subjects(bench)
    ours = report.row(OURS, title)
    plain = report.row(PLAIN)
    return [
        at_least("training step with subjects, of the matrix ceiling", ours.share if ours else None, 0.5, "share"),
        at_least(
            "plain loop's time over ours, blocks off",
            plain.ratio.median if plain and plain.ratio else None,
            1.3,
            "times",
        ),
        at_most(
            "blocks' share of the time (forward and backward) above that of the operations",
            excess_of_blocks(report, title),
            0.02,
            "points",
        ),
    ]


def excess_of_blocks(report: Report, title: str) -> float | None:
    """How much larger the blocks' share of forward and backward is than that of the operations, as a fraction."""
    on, off = report.row(OURS, title), report.row(BARE, title)
    if on is None or off is None:
        return None
    times = [sum(row.parts[part].median for part in ("forward", "backward")) for row in (on, off)]
    return (1 - times[1] / times[0]) - (1 - off.flops / on.flops)


# Building -------------------------------------------------------------------------------------------------------------


def make_stage(bench: Bench, blocks: bool, speed: Speed) -> Any:
    """An `SFT` on the device with random weights, as `idc fit` would train it on cached features."""
    from idc.stages.sft import SFT

    setup = bench.setup
    changes = {} if blocks else {"id_blocks": replace(setup.spec.id_blocks, layers=0)}
    encoders = random_encoders(setup, bench.device)
    stage = SFT(
        transformer=RandomSpec.like(setup.spec, bench.device, torch.float32, setup.seed, **changes),
        codec=encoders.codec,
        text=encoders.text,
        vlm=encoders.vlm,
        optimizer=partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01),
        compute_dtype=str(bench.dtype).removeprefix("torch."),
        speed=replace(speed, attention="auto"),  # every turn sets its own, on the device
    )
    stage.configure_model()
    stage.encoders.place(bench.device)
    return stage.to(bench.device).train()


@contextmanager
def _against_plain(bench: Bench) -> Iterator[Sequence[Case]]:
    stage = make_stage(bench, blocks=False, speed=bench.speed)
    wan = plain_wan(stage.transformer)
    samples = _samples(bench, bench.setup, stage)
    bench.checks["blocks off against WanTransformer3DModel, relative difference"] = _difference(bench, stage, wan)
    flops = 3 * bench.setup.batch * bench.forward_flops(wan)
    plain = {"attention": "native", "checkpointing": "full", "compile": "off", "optimiser": "AdamW"}
    yield [
        _case(bench, stage, OURS, lambda: samples, bench.speed, Drop.REFERENCES, flops),
        Case(
            PLAIN,
            stepwise(partial(_plain_step, bench, stage, wan, samples), bench.device),
            against=OURS,
            flops=flops,
            items=bench.setup.batch,
            settings=plain,
            note="diffusers' WanTransformer3DModel on the same weights",
        ),
    ]


@contextmanager
def _modes(bench: Bench) -> Iterator[Sequence[Case]]:
    """Ours with subjects as it is set, and what each setting is worth by itself."""
    setup, speed = bench.setup, bench.speed
    stage = make_stage(bench, blocks=True, speed=speed)
    bare = make_bare(stage)
    made = widest(setup) if bench.is_real else setup
    lengths = random.Random(setup.seed)  # one for all cases: none meets sizes that another has met

    def batches(samples: Sequence[Sample]) -> Batches:
        return varied(setup, samples, lengths) if bench.is_real else lambda: samples

    samples = batches(_samples(bench, made, stage))
    flops = 3 * setup.batch * bench.forward_flops(stage.transformer, setup.subjects)
    backbone = 3 * setup.batch * bench.forward_flops(bare.transformer)
    case = partial(_case, bench, stage, drop=Drop.NOTHING, flops=flops)
    cases = [
        case(OURS, samples, speed),
        _case(bench, bare, BARE, samples, speed, Drop.REFERENCES, backbone, against=OURS),
    ]
    for kind in ("none", "attention", "full"):
        if kind != speed.checkpointing:
            cases.append(case(f"checkpointing {kind}", samples, replace(speed, checkpointing=kind), against=OURS))
    if bench.options.get("compile_modes"):
        other = not speed.compile
        cases.append(case(f"compile {'on' if other else 'off'}", samples, replace(speed, compile=other), against=OURS))
    for backend in bench.options.get("attention", ()):
        if backend != speed.attention:
            cases.append(case(f"attention {backend}", samples, replace(speed, attention=backend), against=OURS))
    clips = batches([random_sample(made, number=i, clip=True) for i in range(setup.batch)])
    cases.append(case("features encoded in every step", clips, speed, against=OURS))
    yield cases


def make_bare(stage: Any) -> Any:
    """A stage of the same weights without the blocks."""
    from idc.stages.sft import SFT

    encoders = stage.encoders
    bare = SFT(
        transformer=stage.spec,
        codec=encoders.codec,
        text=encoders.text,
        vlm=encoders.vlm,
        optimizer=stage.optimizer_factory,
        compute_dtype=str(stage.compute_dtype).removeprefix("torch."),
        speed=stage.speed,
    )
    bare.transformer = without_blocks(stage.transformer)
    return bare.to(stage.device).train()


def _samples(bench: Bench, setup: Setup, stage: Any) -> list[Sample]:
    """With their features on the device, as Lightning moves a batch."""
    samples = []
    for number in range(setup.batch):
        sample = with_features(random_sample(setup, number=number, clip=True), stage.encoders)
        features = {name: value.to(bench.device) for name, value in (sample.features or {}).items()}
        samples.append(replace(sample, features=features))
    stage.encoders.codec.unload()
    free(bench.device)
    return samples


# Steps ----------------------------------------------------------------------------------------------------------------


def _case(
    bench: Bench, stage: Any, name: str, batches: Batches, speed: Speed, drop: Drop, flops: int,
    against: str = "",
) -> Case:  # fmt: skip
    settings: dict[str, str] = {"optimiser": "AdamW, fused" if bench.cuda else "AdamW"}
    open_step = partial(_our_step, bench, stage, batches, speed, drop, settings)
    turn = stepwise(open_step, bench.device)
    references = bench.setup.subjects if drop.references else 0
    work = bench.setup.batch * bench.step_flops(stage.transformer, references, checkpointing=speed.checkpointing).total
    return Case(name, turn, against, flops, bench.setup.batch, settings, work=work)


@contextmanager
def _our_step(
    bench: Bench, stage: Any, batches: Batches, speed: Speed, drop: Drop, settings: dict[str, str]
) -> Iterator[Step]:
    settings.update(apply_speed(bench, stage.transformer, speed, training=True))
    parameters = [p for p in stage.transformer.parameters() if p.requires_grad]
    optimizer = stage.optimizer_factory(parameters, **optimizer_settings(stage.optimizer_factory, bench.device))
    seeds_B = torch.arange(bench.setup.batch)
    drops = [drop] * bench.setup.batch

    def step(clock: Clock) -> None:
        features = stage.encoders.features(batches(), drops)
        t_B = stage.times(seeds_B).to(bench.device)
        clock.end("data")
        loss = (stage.weight(t_B) * stage.losses(features, seeds_B, t_B, drops)).mean()
        clock.end("forward")
        _descend(clock, loss, optimizer, parameters)

    try:
        yield step
    finally:
        _drop_gradients(parameters)
        stage.encoders.codec.unload()


@contextmanager
def _plain_step(bench: Bench, stage: Any, wan: Any, samples: Sequence[Sample]) -> Iterator[Step]:
    wan.enable_gradient_checkpointing()
    parameters = list(wan.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)
    features = [dict(sample.features or {}) for sample in samples]

    def step(clock: Clock) -> None:
        x0 = torch.stack([f["latents"] for f in features]).float()
        text = stage.encoders.condition(features, Drop.REFERENCES).text_BLD
        clock.end("data")
        noise, t_B = torch.randn_like(x0), torch.rand(len(x0), device=x0.device)
        with _autocast(bench):
            velocity = _plain_velocity(wan, interpolate(x0, noise, t_B), t_B, text)
        loss = torch.nn.functional.mse_loss(velocity.float(), velocity_target(x0, noise))
        clock.end("forward")
        _descend(clock, loss, optimizer, parameters)

    try:
        yield step
    finally:
        wan.disable_gradient_checkpointing()
        _drop_gradients(parameters)


def _descend(
    clock: Clock, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> None:
    """What follows a loss, timed by part."""
    loss.backward()
    clock.end("backward")
    _update(optimizer, parameters)
    clock.end("optimiser")


def _plain_velocity(wan: Any, x_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
    (velocity,) = wan(
        hidden_states=x_BCTHW, timestep=t_B * 1000, encoder_hidden_states=text_BLD.float(), return_dict=False
    )
    return velocity


def _update(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _drop_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _autocast(bench: Bench) -> AbstractContextManager[Any]:
    if bench.dtype is torch.float32:
        return nullcontext()
    return torch.autocast(bench.device.type, dtype=bench.dtype)


@torch.no_grad()
def _difference(bench: Bench, stage: Any, wan: Any) -> float:
    """Of the two velocities for the same input, before any step."""
    sample = random_sample(bench.setup, subjects=0)
    features = stage.encoders.features([sample], [Drop.REFERENCES])
    condition = stage.encoders.condition(features, Drop.REFERENCES).to(bench.device, torch.float32)
    shape = stage.encoders.codec.latent_shape(bench.setup.frames, bench.setup.height, bench.setup.width)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)).to(bench.device)
    t_B = torch.full((1,), 0.5, device=bench.device)
    ours = stage.predict_velocity(x, t_B, condition)
    with _autocast(bench):
        theirs = _plain_velocity(wan, x, t_B, condition.text_BLD)
    return relative_difference(ours, theirs)
