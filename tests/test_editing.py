"""Editing on the path: closed forms for the mathematics, and through codec and transformer what has to stay stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _sft_worker import TRANSFORMER, one_thread
from _tiny_real import save_wan
from _tiny_wan import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idc.errors import UserError
from idc.flow.editing import edit, edit_times, kept, latent_mask
from idc.flow.path import interpolate, velocity_target
from idc.flow.samplers import sample_euler, sample_heun, shifted_times
from idc.models.codecs import Codec, WanVAECodec
from idc.models.conditioners import ToyTextConditioner
from idc.models.conditioning import Encoders
from idc.models.sampling import Sampler, Sampling, Source
from idc.models.spec import IDBlocks, TransformerSpec
from idc.models.toy_codec import CosineCodec
from idc.models.vlm import ToyVLM
from idc.types import Bucket, Sample, Subject

FRAMES, SIDE = 5, 32


def towards(y: Tensor):
    """The field of a flow whose data is the one point y: every path ends there."""
    return lambda x, t: (x - y) / t


def straight(v: Tensor):
    """A field that is v everywhere and at all times."""
    return lambda x, t: v


def latents(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


# On the path --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.floats(0.5, 8), st.floats(0, 1))
def test_an_edit_takes_the_part_of_the_schedule_below_its_strength(steps: int, shift: float, strength: float) -> None:
    times = shifted_times(steps, shift)
    part = edit_times(times, strength)
    assert part[0] == torch.tensor(strength)
    assert part[-1] == 0
    assert (part.diff() < 0).all()
    assert torch.equal(part[1:], times[times < part[0]])
    assert torch.equal(edit_times(times, 1.0), times)


@pytest.mark.parametrize("solve", [sample_euler, sample_heun])
@pytest.mark.parametrize("strength", [0.05, 0.6, 1.0])
def test_inside_the_mask_the_flow_decides_and_outside_the_source_stays_to_the_bit(solve, strength: float) -> None:
    x0, noise, y = latents(0), latents(1), latents(2)
    mask = torch.zeros(2, 9, 32, 48, dtype=torch.bool)
    mask[:, :, :16, 8:24] = True
    cells = latent_mask(mask, x0)
    # Along the constant field noise - y, from (1 - s) x0 + s noise at t = s, the end is (1 - s) x0 + s y.
    expected = (1 - strength) * x0 + strength * y
    found = edit(lambda: straight(noise - y), x0, noise, shifted_times(12, 3.0), strength, mask, solve=solve)
    inside = cells.expand_as(x0)
    assert torch.equal(found[~inside], x0[~inside])
    torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-5)
    whole = edit(lambda: straight(noise - y), x0, noise, shifted_times(12, 3.0), strength, solve=solve)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)


def test_from_any_strength_a_model_of_one_clip_gives_that_clip() -> None:
    x0, noise, y = latents(0), latents(1), latents(2)
    for strength in (0.02, 0.5, 1.0):
        found = edit(lambda: towards(y), x0, noise, shifted_times(9, 3.0), strength)
        torch.testing.assert_close(found, y, rtol=0, atol=1e-5)


def test_the_field_sees_what_is_kept_at_its_place_on_the_path() -> None:
    x0, noise = latents(0), latents(1)
    mask = torch.rand(x0.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    seen = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return torch.ones_like(x)

    for t in (torch.tensor(0.9), torch.tensor(0.4)):
        v = kept(field, x0, noise, mask)(latents(5), t)
        x, at = seen[-1]
        assert torch.equal(x[~mask], interpolate(x0, noise, at)[~mask])
        assert torch.equal(x[mask], latents(5)[mask])
        assert torch.equal(v[~mask], velocity_target(x0, noise)[~mask])
        assert (v[mask] == 1).all()


def test_at_strength_0_nothing_is_computed_and_at_1_it_is_generation() -> None:
    x0, noise, y = latents(0), latents(1), latents(2)
    times = shifted_times(7, 3.0)

    def never():
        raise AssertionError

    assert edit(never, x0, noise, times, 0.0) is x0
    assert torch.equal(
        edit(lambda: towards(y), x0, noise, times, 1.0), sample_euler(towards(y), noise, times)
    )  # the source plays no part


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(UserError, match=r"strength=.*from 0"):
        edit_times(shifted_times(3), strength)


def test_a_latent_cell_may_change_where_any_of_its_pixels_may() -> None:
    g = torch.Generator().manual_seed(0)
    for frames in (1, 5, 9):
        mask = torch.rand(2, frames, 32, 48, generator=g) < 0.003
        z = torch.zeros(2, 16, (frames - 1) // 4 + 1, 4, 6)
        found = latent_mask(mask, z)
        assert found.shape == (2, 1, *z.shape[2:])
        for b, t, y, x in torch.cartesian_prod(*map(torch.arange, (2, z.shape[2], 4, 6))).tolist():
            first, last = (0, 1) if t == 0 else (4 * t - 3, 4 * t + 1)
            cell = mask[b, first:last, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            assert found[b, 0, t, y, x] == cell.any()


# Through codec and transformer --------------------------------------------------------------------------------------


def make_sampler(codec: Codec) -> Sampler:
    """A tiny random transformer with all parts at work."""
    text, vlm = ToyTextConditioner(dim=32), ToyVLM(dim=32)
    spec = TransformerSpec(**TRANSFORMER, id_blocks=IDBlocks(layers=2))
    transformer = spec.build(text.dim, vlm.dim)
    randomise(transformer)
    return Sampler(transformer, Encoders(codec, text, vlm), torch.device("cpu"))


@pytest.fixture(scope="module", params=["cosine", "wan"])
def sampler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    """Over the toy codec, and over Wan's VAE, whose decoder looks far beyond a cell."""
    if request.param == "cosine":
        return make_sampler(CosineCodec())
    folder = tmp_path_factory.mktemp("wan")
    save_wan(folder)
    return make_sampler(WanVAECodec(str(folder)))


def make_sample() -> tuple[Sample, Tensor]:
    """What is asked for, and the clip that is edited."""
    g = torch.Generator().manual_seed(4)
    pictures = tuple(Subject(torch.rand(3, 16, 16, generator=g) * 2 - 1) for _ in range(2))
    clip = torch.nn.functional.interpolate(torch.rand(3, FRAMES, 4, 4, generator=g) * 2 - 1, size=(SIDE, SIDE))
    return Sample("s", "a red cube meets it", None, pictures, 8.0), clip[None]


def run(sampler: Sampler, source: Source | None, **changes) -> Tensor:
    sample, _ = make_sample()
    sampling = replace(Sampling(steps=4, scale=2.5, shift=1.0), **changes)
    with one_thread():
        return sampler.videos([sample], Bucket(FRAMES, SIDE, SIDE, 2), torch.tensor([11]), sampling, source)


def test_strength_0_is_the_source_after_one_trip_through_the_codec(sampler: Sampler) -> None:
    _, clip = make_sample()
    codec = sampler.encoders.codec
    with one_thread():
        expected = codec.decode(codec.encode(clip))
    mask = torch.zeros(1, FRAMES, SIDE, SIDE, dtype=torch.bool)
    mask[:, :, 10:20, 10:20] = True
    assert torch.equal(run(sampler, Source(clip, 0.0)), expected)
    assert torch.equal(run(sampler, Source(clip, 0.0, mask)), expected)


@pytest.mark.parametrize("changes", [{}, {"solver": "heun"}, {"image_scale": 1.5}])
def test_strength_1_is_generation_from_the_same_noise(sampler: Sampler, changes: dict) -> None:
    _, clip = make_sample()
    generated = run(sampler, None, **changes)
    assert torch.equal(run(sampler, Source(clip, 1.0), **changes), generated)
    assert not torch.equal(run(sampler, Source(clip, 0.5), **changes), generated)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_outside_the_mask_nothing_changes_beyond_the_codecs_error(sampler: Sampler, strength: float) -> None:
    """A mask that cuts through cells and moves: a kept pixel differs from the source by what the codec loses."""
    _, clip = make_sample()
    codec = sampler.encoders.codec
    mask = torch.zeros(1, FRAMES, SIDE, SIDE, dtype=torch.bool)
    for t in range(FRAMES):
        mask[:, t, 5 + t : 15 + t, 3 : 12 + t] = True
    video = run(sampler, Source(clip, strength, mask))
    with one_thread():
        lossy = codec.decode(codec.encode(clip))
    outside = ~mask[:, None].expand_as(video)
    assert torch.equal(video[outside], lossy[outside])
    assert (video - clip).abs()[outside].max() <= (lossy - clip).abs()[outside].max()
    assert (video - lossy).abs()[~outside].mean() > 0.005


def test_more_strength_leaves_less_of_the_source(sampler: Sampler) -> None:
    _, clip = make_sample()
    whole = run(sampler, Source(clip, 0.0))
    away = [float((run(sampler, Source(clip, s)) - whole).square().mean()) for s in (0.05, 0.3, 0.9)]
    assert 0 < away[0] < away[1] < away[2]
