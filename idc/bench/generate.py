"""`idc bench generate`: a video's condition, denoising and decoding, 0 to N subjects, the subject cache, WanPipeline.

diffusers' `WanPipeline` runs as its documentation has it: transformer in bfloat16 with Wan's float32 islands, VAE in
float32, PyTorch's SDPA, one forward for each side of guidance. It knows no references, so it is compared with our
sampler on the model without blocks: same weights, steps, times, guidance, text tokens and noise. Text encoder and VLM
are left out on both sides; references are encoded by the VAE.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idc.bench.cases import Case, Clock, Group, Step, stepwise
from idc.bench.context import Bench, apply_speed, relative_difference
from idc.bench.models import (
    RandomSpec,
    cast_as_diffusers,
    plain_wan,
    random_encoders,
    random_sample,
    without_blocks,
)
from idc.bench.results import Aim, Report, Row, at_least, below, ratios
from idc.flow.samplers import sample_euler, shifted_times
from idc.flow.times import noise_like
from idc.models.conditioning import Drop, Encoders
from idc.models.sampling import Sampler
from idc.types import Sample

OURS, PIPELINE, BARE = "ours", "WanPipeline", "ours, blocks left out"
BACKBONE, SUBJECTS, DECODE = "generation, blocks off", "generation with subjects", "decoding"
DENOISE = "denoise"  # the part of a repeat that the aims are of
CHECKED_STEPS = 2  # of the comparison of outputs


def groups(bench: Bench) -> list[Group]:
    """The comparison with WanPipeline, ours by the number of subjects, and the decoding of both."""
    return [
        Group(BACKBONE, partial(_against_pipeline, bench)),
        Group(SUBJECTS, partial(_subjects, bench)),
        Group(DECODE, partial(_decoding, bench)),
    ]


def subjects_name(count: int) -> str:
    """Of the case with so many."""
    return f"{count} subject{'' if count == 1 else 's'}"


def aims(report: Report, bench: Bench) -> list[Aim]:
    """The three of generation; without subjects the last one is left out."""
    most = report.row(subjects_name(bench.setup.subjects), SUBJECTS)
    pipeline = report.row(PIPELINE, BACKBONE)
    steps = f"{bench.setup.sampling.steps} steps"
    share = None
    if most and most.seconds and most.share:
        share = most.share * most.seconds.median / most.parts[DENOISE].median
    found = [
        at_least("denoising with subjects, of the matrix ceiling", share, 0.65, "share", steps),
        at_least(
            "WanPipeline's denoising time over ours, blocks off",
            _of_denoising(pipeline, report.row(OURS, BACKBONE)),
            1.7,
            "times",
            steps,
        ),
    ]
    if bench.setup.subjects:
        extra = f"extra denoising time of {subjects_name(bench.setup.subjects)} over the backbone alone"
        times = _of_denoising(most, report.row(BARE, SUBJECTS))
        found.append(below(extra, None if times is None else times - 1, 0.08, "share", steps))
    return found


def _of_denoising(longer: Row | None, shorter: Row | None) -> float | None:
    """One's time over the other's, the median over rounds, without what conditions take: references through the VAE,
    and text and VLM tokens that are drawn in place of being encoded."""
    values = ratios(longer.rounds, shorter.rounds, (DENOISE,)) if longer and shorter else []
    return statistics.median(values) if values else None


# Building -------------------------------------------------------------------------------------------------------------


def build(bench: Bench, blocks: bool) -> Any:
    """An `IDCrafterTransformer` in eval mode, its weights as `idc generate` has them."""
    setup = bench.setup
    changes = {} if blocks else {"id_blocks": replace(setup.spec.id_blocks, layers=0)}
    spec = RandomSpec.like(setup.spec, bench.device, bench.dtype, setup.seed, **changes)
    return spec.build(setup.text_dim, setup.vlm_dim).eval().requires_grad_(False)


@contextmanager
def _against_pipeline(bench: Bench) -> Iterator[Sequence[Case]]:
    model = build(bench, blocks=False)
    encoders = random_encoders(bench.setup, bench.device)
    wan = plain_wan(model)
    cast_as_diffusers(wan, bench.dtype)
    pipeline = wan_pipeline(bench, wan, vae=None)
    sample = random_sample(bench.setup, subjects=0)
    text = _texts(bench, encoders, sample)
    bench.checks["latents of WanPipeline after 2 steps, relative difference"] = _difference(
        bench, model, encoders, pipeline, text
    )
    flops = 2 * bench.setup.sampling.steps * bench.forward_flops(model)
    yield [
        _case(bench, model, encoders, OURS, 0, flops),
        Case(
            PIPELINE,
            stepwise(partial(_pipeline_step, bench, pipeline, text), bench.device),
            against=OURS,
            flops=flops,
            items=1,
            settings={"attention": "native", "compile": "off"},
            note="diffusers on the same weights, output_type=latent",
        ),
    ]


@contextmanager
def _subjects(bench: Bench) -> Iterator[Sequence[Case]]:
    setup = bench.setup
    model = build(bench, blocks=True)
    bare = without_blocks(model)
    encoders = random_encoders(setup, bench.device)
    most = setup.subjects
    case = partial(_case, bench, model, encoders)
    cases = [_case(bench, bare, encoders, BARE, 0, _flops(bench, bare, 0))]
    cases += [case(subjects_name(n), n, _flops(bench, model, n), against=BARE) for n in range(most + 1)]
    if most:
        name = f"{subjects_name(most)}, no cache"
        cases.append(case(name, most, _flops(bench, model, most, cached=False), against=BARE, cached=False))
    yield cases


def _flops(bench: Bench, model: Any, subjects: int, cached: bool = True) -> int:
    """Of all steps: a forward with the subjects and one without; the caches of both, once."""
    steps = bench.setup.sampling.steps
    both = [(bench.forward_flops(model, n), bench.forward_flops(model, n, cached=True)) for n in (subjects, 0)]
    if not cached:
        return sum(steps * whole for whole, _ in both)
    return sum(steps * light + (whole - light) for whole, light in both)


def wan_pipeline(bench: Bench, wan: Any, vae: Any) -> Any:
    """diffusers' pipeline without text encoder, at the times of our schedule."""
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    euler: Any = FlowMatchEulerDiscreteScheduler

    class SameTimes(euler):
        """The pipeline passes only the number of steps, with which the scheduler shifts the end twice."""

        def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **kwargs: Any) -> None:
            super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)

    scheduler = SameTimes(shift=bench.setup.sampling.shift)
    pipeline: Any = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=wan, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial = 4, 8
    return pipeline


def _texts(bench: Bench, encoders: Encoders, sample: Sample) -> tuple[Tensor, Tensor]:
    """Tokens of the caption and of the empty one, as the pipeline takes them."""
    (features,) = encoders.features([sample], None, ("text",))
    wide = Encoders(encoders.codec, encoders.text)  # without the VLM's tokens, which these features lack
    return tuple(
        wide.condition([features], drop).text_BLD.to(bench.device, bench.dtype) for drop in (Drop.NOTHING, Drop.BOTH)
    )  # type: ignore[return-value]  # there are two


# Steps ----------------------------------------------------------------------------------------------------------------


def _case(
    bench: Bench, model: Any, encoders: Encoders, name: str, subjects: int, flops: int, against: str = "",
    cached: bool = True,
) -> Case:  # fmt: skip
    settings: dict[str, str] = {"cache": "on" if cached else "off"}
    sample = random_sample(bench.setup, subjects)
    open_step = partial(_our_step, bench, model, encoders, sample, cached, settings)
    return Case(name, stepwise(open_step, bench.device), against, flops, 1, settings)


@contextmanager
def _our_step(
    bench: Bench, model: Any, encoders: Encoders, sample: Sample, cached: bool, settings: dict[str, str]
) -> Iterator[Step]:
    settings.update(apply_speed(bench, model, bench.speed, training=False))
    on_device = replace(
        sample, subjects=tuple(replace(s, image_CHW=s.image_CHW.to(bench.device)) for s in sample.subjects)
    )

    def step(clock: Clock) -> None:
        denoise(bench, model, encoders, on_device, bench.setup.sampling.steps, cached, clock)

    try:
        yield step
    finally:
        encoders.codec.unload()


@torch.no_grad()
def denoise(
    bench: Bench, model: Any, encoders: Encoders, sample: Sample, steps: int, cached: bool, clock: Clock
) -> Tensor:
    """Latents of one video as `idc.models.sampling.Sampler` makes them; the subject cache counts as denoising."""
    setup, sampling = bench.setup, replace(bench.setup.sampling, steps=steps)
    sampler = Sampler(model, encoders, bench.device, bench.dtype, bench.speed.batch_guidance)
    for drop in sampling.drops:
        (features,) = encoders.features([sample], [drop], ("text", "vlm", "references"))
        sample = replace(sample, features=features)
    clock.end("condition")
    shape = encoders.codec.latent_shape(setup.frames, setup.height, setup.width)
    seeds_B = torch.tensor([setup.seed])
    if cached:
        latents = sampler.latents([features], seeds_B, shape, sampling)
    else:
        velocity = sampler.guided_velocity([features], sampling, cached=False)
        noise = noise_like(seeds_B, shape, device=bench.device)
        latents = sample_euler(velocity, noise, shifted_times(steps, sampling.shift))
    clock.end(DENOISE)
    return latents


@contextmanager
def _pipeline_step(bench: Bench, pipeline: Any, text: tuple[Tensor, Tensor]) -> Iterator[Step]:
    def step(clock: Clock) -> None:
        run_pipeline(bench, pipeline, text, bench.setup.sampling.steps)
        clock.end(DENOISE)

    yield step


def run_pipeline(bench: Bench, pipeline: Any, text: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """Latents of one video by diffusers' pipeline."""
    setup = bench.setup
    shape = (setup.spec.in_channels, (setup.frames - 1) // 4 + 1, setup.height // 8, setup.width // 8)
    noise = noise_like(torch.tensor([setup.seed]), shape, device=bench.device)
    return pipeline(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        latents=noise,
        height=setup.height,
        width=setup.width,
        num_frames=setup.frames,
        num_inference_steps=steps,
        guidance_scale=setup.sampling.scale,
        output_type="latent",
    ).frames


def _difference(bench: Bench, model: Any, encoders: Encoders, pipeline: Any, text: tuple[Tensor, Tensor]) -> float:
    sample = random_sample(bench.setup, subjects=0)
    ours = denoise(bench, model, encoders, sample, CHECKED_STEPS, True, Clock(bench.device))
    return relative_difference(ours, run_pipeline(bench, pipeline, text, CHECKED_STEPS))


# Decoding -------------------------------------------------------------------------------------------------------------


@contextmanager
def _decoding(bench: Bench) -> Iterator[Sequence[Case]]:
    """Latents to pixels on the device: our codec, in bfloat16 on a GPU; WanPipeline's lines with its VAE in float32."""
    setup = bench.setup
    codec = random_encoders(setup, bench.device, decode_dtype=bench.dtype).codec
    theirs: Any = random_encoders(setup, bench.device, dtype="float32").codec
    latents = torch.randn(
        1, *codec.latent_shape(setup.frames, setup.height, setup.width), generator=torch.Generator().manual_seed(2)
    ).to(bench.device)

    @contextmanager
    def our_step() -> Iterator[Step]:
        def step(clock: Clock) -> None:
            codec.decode(latents)
            clock.end("decode")

        try:
            yield step
        finally:
            codec.unload()

    @contextmanager
    def pipeline_step() -> Iterator[Step]:
        vae = theirs.load(bench.device)._model
        processor: Any = wan_pipeline(bench, None, vae).video_processor

        @torch.no_grad()
        def step(clock: Clock) -> None:
            mean, std = (
                torch.tensor(values, device=bench.device).view(1, -1, 1, 1, 1)
                for values in (vae.config.latents_mean, vae.config.latents_std)
            )
            video = vae.decode(latents * std + mean, return_dict=False)[0]
            processor.postprocess_video(video, output_type="pt")
            clock.end("decode")

        try:
            yield step
        finally:
            theirs.unload()

    dtype = str(bench.dtype).removeprefix("torch.")
    yield [
        Case(OURS, stepwise(our_step, bench.device), items=1, settings={"dtype": dtype}),
        Case(PIPELINE, stepwise(pipeline_step, bench.device), OURS, items=1, settings={"dtype": "float32"}),
    ]
