"""idc.flow: closed forms, orders of convergence, independence from the batch, and parity with diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import expit

from idc.errors import UserError
from idc.flow import guidance, path, times, weights
from idc.flow.samplers import sample_euler, sample_heun, shifted_times

# --- path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 5, 5)])
def test_path_runs_from_data_to_noise_and_its_velocity_is_its_derivative(shape):
    x0, noise = torch.randn(2, *shape, dtype=torch.float64)
    assert torch.equal(path.interpolate(x0, noise, 0.0), x0)
    assert torch.equal(path.interpolate(x0, noise, 1.0), noise)
    t_B = torch.rand(4, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: path.interpolate(x0, noise, t), (t_B,), (torch.ones_like(t_B),))
    torch.testing.assert_close(slope, path.velocity_target(x0, noise))


def test_time_may_be_a_number_one_a_sample_or_broadcastable():
    x0, noise, t_B = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.rand(4)
    per_sample = path.interpolate(x0, noise, t_B)
    assert torch.equal(per_sample, path.interpolate(x0, noise, t_B.view(4, 1, 1)))
    for i in range(4):
        assert torch.equal(per_sample[i], path.interpolate(x0, noise, t_B[i])[i])
        torch.testing.assert_close(per_sample[i], path.interpolate(x0, noise, t_B[i].item())[i])


def test_denoised_undoes_the_path():
    x0, noise, t_B = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.rand(4)
    x = path.interpolate(x0, noise, t_B)
    torch.testing.assert_close(path.denoised(x, path.velocity_target(x0, noise), t_B), x0)


# --- samplers -----------------------------------------------------------------------------------------------------

MEAN, VARIANCE = 0.7, 0.3


def gaussian_velocity(x, t):
    """E[eps - z_0 | z_t = x] for z_0 ~ N(MEAN, VARIANCE): the exact field of Gaussian data."""
    variance = (1 - t) ** 2 * VARIANCE + t**2
    return -MEAN + (t - (1 - t) * VARIANCE) / variance * (x - (1 - t) * MEAN)


def gaussian_solution(x, t):
    """Where the exact flow takes x from t = 1: both marginals are Gaussian and the flow between them is affine."""
    return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * VARIANCE + t**2) * x


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samplers_converge_at_their_order(sampler, order, shift):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    steps = [160, 320, 640]
    errors = []
    for n in steps:
        schedule = times.shift(torch.linspace(1, 0, n + 1, dtype=torch.float64), shift)
        errors.append((sampler(gaussian_velocity, x, schedule) - gaussian_solution(x, 0.0)).abs().max().item())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.07)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_straight_paths_take_one_step(sampler):
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    out = sampler(lambda x, t: noise - x0, noise, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(out, x0)


def test_rising_times_invert_the_ode():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    schedule = torch.linspace(1, 0, 201, dtype=torch.float64)
    data = sample_heun(gaussian_velocity, x, schedule)
    torch.testing.assert_close(sample_heun(gaussian_velocity, data, schedule.flip(0)), x, atol=1e-5, rtol=0)


def test_samplers_report_each_step_and_keep_the_states_dtype():
    states = []
    out = sample_euler(
        lambda x, t: torch.ones_like(x, dtype=torch.bfloat16),
        torch.zeros(2),
        shifted_times(4),
        on_step=lambda i, x: states.append((i, x)),
    )
    assert [i for i, _ in states] == [0, 1, 2, 3]
    assert torch.equal(states[-1][1], out)
    assert out.dtype == torch.float32


def test_velocity_gets_a_scalar_time():
    seen = []

    def velocity(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    sample_heun(velocity, torch.zeros(2, 3), shifted_times(2))
    assert [t.ndim for t in seen] == [0, 0, 0, 0]
    assert [t.item() for t in seen] == [1, 0.5, 0.5, 0]


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.tensor([1.0]), torch.ones(2, 2)])
def test_samplers_refuse_times_that_are_no_schedule(bad):
    with pytest.raises(UserError, match="times of shape"):
        sample_euler(gaussian_velocity, torch.zeros(1), bad)


@given(steps=st.integers(1, 200), shift=st.sampled_from([1, 1.0, 3, 3.0, 5.0, 7.3, 0.5]))
@settings(max_examples=60, deadline=None)
def test_schedule_is_the_schedulers_bit_for_bit(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    schedule = shifted_times(steps, shift)
    assert torch.equal(schedule, scheduler.sigmas)
    assert torch.equal(schedule[:-1] * 1000, scheduler.timesteps)
    assert schedule[0] == 1
    assert schedule[-1] == 0
    assert (schedule.diff() < 0).all()


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 5, "shift": 0.0}, {"steps": 5, "shift": -1.0}])
def test_schedule_refuses_bad_settings(bad):
    with pytest.raises(UserError, match=r"(steps|shift)="):
        shifted_times(**bad)


# --- times, weights and seeds --------------------------------------------------------------------------------------


@given(factor=st.floats(0.1, 20), t=st.lists(st.floats(0, 1), min_size=2, max_size=20, unique=True))
@settings(deadline=None)
def test_shift_is_monotone_keeps_the_ends_and_has_an_inverse(factor, t):
    t = torch.tensor(sorted(t), dtype=torch.float64)
    shifted = times.shift(t, factor)
    assert (shifted.diff() >= 0).all()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(times.shift(ends, factor), ends, atol=0, rtol=1e-14)
    torch.testing.assert_close(times.shift(shifted, 1 / factor), t, atol=1e-12, rtol=1e-9)


SEEDS = torch.arange(4000)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 0.8, 3.0)])
def test_logit_normal_times_have_that_distribution(mean, std, shift):
    t_B = times.LogitNormal(mean, std, shift)(SEEDS)
    assert t_B.dtype == torch.float32
    # A shift by s adds log s in logit space.
    normal = stats.norm(mean + math.log(shift), std)
    assert stats.kstest(torch.logit(t_B.double()), normal.cdf).pvalue > 0.01
    expected = normal.expect(expit)
    assert t_B.mean().item() == pytest.approx(expected, abs=4 * t_B.std().item() / math.sqrt(len(SEEDS)))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_times_are_uniform_before_the_shift(shift):
    t_B = times.Uniform(shift)(SEEDS)
    assert stats.kstest(times.shift(t_B.double(), 1 / shift), "uniform").pvalue > 0.01


@pytest.mark.parametrize("sampler", [times.LogitNormal(shift=3.0), times.Uniform()])
def test_draws_do_not_depend_on_the_batch(sampler):
    seeds_B = torch.tensor([7, -3, 2**62, 11, 7])
    order = torch.tensor([3, 0, 4, 1, 2])
    t_B, noise = sampler(seeds_B), times.noise_like(seeds_B, (3, 4))
    assert torch.equal(sampler(seeds_B[order]), t_B[order])
    assert torch.equal(times.noise_like(seeds_B[order], (3, 4)), noise[order])
    for i, seed in enumerate(seeds_B.tolist()):
        assert torch.equal(sampler([seed])[0], t_B[i])
        assert torch.equal(times.noise_like([seed], (3, 4))[0], noise[i])
    assert torch.equal(noise[0], noise[4])
    assert not torch.equal(noise[0], noise[1])


def test_draws_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    times.noise_like([1, 2], (5,))
    times.LogitNormal()([1, 2])
    assert torch.equal(torch.rand(3), expected)


def test_streams_of_one_seed_are_independent():
    names = ["noise", "time", "dropout"]
    draws = np.stack([[times.noise_like([seed], (), stream=n).item() for seed in range(1500)] for n in names])
    correlation = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=1)]))
    assert np.abs(correlation - np.eye(6)).max() < 4.5 / math.sqrt(1500)


def test_noise_is_standard_normal_and_its_dtype_only_rounds_it():
    noise = times.noise_like(range(50), (16, 5))
    assert stats.kstest(noise.flatten(), "norm").pvalue > 0.01
    assert torch.equal(times.noise_like(range(50), (16, 5), dtype=torch.bfloat16), noise.bfloat16())


@pytest.mark.parametrize("make", [lambda: times.LogitNormal(std=0), lambda: times.Uniform(shift=-1)])
def test_time_samplers_refuse_bad_settings(make):
    with pytest.raises(UserError, match="must be positive"):
        make()


@pytest.mark.parametrize(
    "weight", [weights.Uniform(), weights.Gaussian(), weights.Gaussian(0.8, 0.1), weights.CosMap()]
)
def test_weights_are_positive_with_mean_one(weight):
    mean, _ = integrate.quad(lambda t: weight(torch.tensor([t], dtype=torch.float64)).item(), 0, 1)
    assert mean == pytest.approx(1, abs=1e-9)
    t_B = torch.linspace(0, 1, 11)
    assert weight(t_B).shape == t_B.shape
    assert (weight(t_B) > 0).all()


# --- guidance -----------------------------------------------------------------------------------------------------


class Field:
    """A velocity function that counts its evaluations."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.value * torch.sin(x) + t


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_linear_in_the_scale_and_free_at_one(scale):
    cond, uncond, x, t = Field(2.0), Field(0.5), torch.randn(2, 3), torch.tensor(0.3)
    v = guidance.guided(cond, uncond, scale)(x, t)
    torch.testing.assert_close(v, (1 - scale) * uncond(x, t) + scale * cond(x, t))
    assert (cond.calls, uncond.calls) == (2, 1 if scale == 1 else 2)


@pytest.mark.parametrize(
    ("text", "image", "calls"),
    [(7.5, 5.0, (1, 1, 1)), (2.5, 2.5, (1, 0, 1)), (4.0, 1.0, (1, 1, 0)), (1.0, 1.0, (1, 0, 0))],
)
def test_separate_scales_evaluate_only_what_does_not_cancel(text, image, calls):
    fields = both, refs, none = Field(2.0), Field(1.0), Field(0.5)
    x, t = torch.randn(2, 3), torch.tensor(0.3)
    v = guidance.guided_text_image(both, refs, none, text_scale=text, image_scale=image)(x, t)
    assert tuple(field.calls for field in fields) == calls
    expected = none(x, t) + image * (refs(x, t) - none(x, t)) + text * (both(x, t) - refs(x, t))
    torch.testing.assert_close(v, expected)


def test_full_rescale_restores_the_conditional_spread():
    cond, uncond, x, t = Field(2.0), Field(0.5), torch.randn(2, 3, 8), torch.tensor(0.3)
    v = guidance.guided(cond, uncond, 5.0, rescale=1.0)(x, t)
    torch.testing.assert_close(v.std((1, 2)), cond(x, t).std((1, 2)))
    plain = guidance.guided(cond, uncond, 5.0)(x, t)
    half = guidance.guided(cond, uncond, 5.0, rescale=0.5)(x, t)
    torch.testing.assert_close(half, (plain + v) / 2)


# --- parity with diffusers' pipeline --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_euler_with_guidance_equals_wan_pipeline_bit_for_bit(scale):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    class Scheduler(FlowMatchEulerDiscreteScheduler):
        """The pipeline passes only the number of steps, with which the scheduler shifts the end twice."""

        def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):
            super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    transformer.eval()
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=Scheduler(shift=3.0)
    )
    pipeline.set_progress_bar_config(disable=True)
    text_BLD, null_BLD = torch.randn(2, 2, 7, 16)
    noise = torch.randn(2, 16, 2, 4, 4)
    expected = pipeline(
        prompt_embeds=text_BLD, negative_prompt_embeds=null_BLD, latents=noise, height=32, width=32, num_frames=5,
        num_inference_steps=6, guidance_scale=scale, output_type="latent",
    ).frames  # fmt: skip

    def given(text_BLD):
        def velocity(x, t):
            return transformer(x, 1000 * t.expand(len(x)), text_BLD, return_dict=False)[0]

        return velocity

    velocity = guidance.guided(given(text_BLD), given(null_BLD), scale)
    with torch.no_grad():
        ours = sample_euler(velocity, noise, shifted_times(6, shift=3.0))
    assert not torch.equal(ours, noise)
    assert torch.equal(ours, expected)
