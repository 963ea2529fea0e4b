"""The analytic codec: an orthonormal transform on Wan's grid, a projection in pixels, the identity on its latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from idc.data.toy import ToyWorld
from idc.errors import UserError
from idc.models.toy_codec import FIRST, LATER, CosineCodec


@pytest.fixture(scope="module")
def codec() -> CosineCodec:
    return CosineCodec().load()


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    world = ToyWorld()
    return torch.stack([world.sample(seed).video_CTHW for seed in range(48)])


def test_geometry_is_wans(codec):
    for frames, latent_frames in ((1, 1), (5, 2), (9, 3), (13, 4)):
        latents = codec.encode(torch.zeros(2, 3, frames, 32, 48))
        assert latents.shape == (2, 16, latent_frames, 4, 6) == (2, *codec.latent_shape(frames, 32, 48))
        assert codec.decode(latents).shape == (2, 3, frames, 32, 48)


def test_encode_inverts_decode_on_all_latents(codec):
    latents = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    # large latents decode to pixels beyond [-1, 1]; the clamp of the public method is not part of the transform
    torch.testing.assert_close(codec._encode(codec._decode(latents)), latents, rtol=1e-4, atol=1e-4)


def test_encode_inverts_the_public_decode_where_nothing_clamps(codec):
    grey = codec.encode(torch.zeros(1, 3, 9, 16, 16))
    latents = grey + 0.05 * torch.randn(grey.shape, generator=torch.Generator().manual_seed(0))
    assert codec.decode(latents).abs().max() < 1
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, rtol=1e-4, atol=1e-4)


def test_decode_is_the_adjoint_of_encode_up_to_the_normalisation(codec):
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randn(1, 3, 5, 16, 16, generator=generator), torch.randn(1, 16, 2, 2, 2, generator=generator)
    mean, std = codec._statistics(2)
    offset = codec._decode(torch.zeros_like(z))
    left = ((codec._encode(x) * std + mean) * z * std).sum()
    right = (x * (codec._decode(z) - offset)).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)


def test_the_round_trip_is_an_orthogonal_projection(codec, clips):
    once = codec._decode(codec._encode(clips[:4]))
    torch.testing.assert_close(codec._decode(codec._encode(once)), once, rtol=1e-4, atol=1e-4)
    error, kept = clips[:4] - once, once
    assert abs((error * kept).sum()) < 1e-4 * kept.square().sum()


def test_coefficients_are_those_of_scipys_cosine_transform(codec, clips):
    video = clips[:1]
    mean, std = codec._statistics(3)
    latents = (codec.encode(video) * std + mean)[0].numpy()
    colours = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], np.float32)
    opponent = np.einsum("kc,cthw->kthw", colours / np.linalg.norm(colours, axis=1, keepdims=True), video[0].numpy())
    first = dctn(opponent[:, 0, 8:16, 24:32], axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(latents[:, 0, 1, 3], [first[c, y, x] for c, _, y, x in FIRST], atol=1e-4)
    later = dctn(opponent[:, 5:9, 8:16, 24:32], axes=(1, 2, 3), norm="ortho")
    np.testing.assert_allclose(latents[:, 2, 1, 3], [later[key] for key in LATER], atol=1e-4)


def test_the_first_frame_is_coded_alone(codec, clips):
    torch.testing.assert_close(codec.encode(clips[:2])[:, :, :1], codec.encode(clips[:2, :, :1]))


def test_the_kept_coefficients_are_distinct():
    assert len(set(FIRST)) == len(set(LATER)) == 16
    assert all(time == 0 for _, time, _, _ in FIRST)


def test_quality_over_toy_clips_is_the_documented_one(codec, clips):
    error = (codec.decode(codec.encode(clips)) - clips).square().mean((0, 1, 3, 4))
    assert 10 * torch.log10(4 / error.mean()) == pytest.approx(25.0, abs=0.5)
    assert 10 * torch.log10(4 / error[0]) == pytest.approx(28.0, abs=0.7)


def test_latents_of_the_toy_world_are_centred_with_unit_variance_as_a_whole(codec, clips):
    latents = codec.encode(clips)
    assert latents.square().mean().sqrt() == pytest.approx(1.0, abs=0.1)
    for part in (latents[:, :, :1], latents[:, :, 1:]):
        channels = part.transpose(0, 1).flatten(1)
        assert channels.mean(1).abs().max() < 0.5
        assert channels.std(1).min() > 0.3
        assert channels.std(1).max() < 2.6
        assert channels.std(1).argmax() == 0  # brightness


def test_any_float_dtype_encodes_to_float32(codec):
    video = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    half = codec.encode(video.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, codec.encode(video), atol=0.2, rtol=0.05)


def test_the_fingerprint_needs_no_load_and_is_stable():
    assert CosineCodec().fingerprint == CosineCodec().load().fingerprint


@pytest.mark.parametrize(("shape", "word"), [((1, 3, 8, 16, 16), "4n"), ((1, 3, 1, 12, 16), "height=12")])
def test_clips_off_the_grid_are_refused(codec, shape, word):
    with pytest.raises(UserError, match=word):
        codec.encode(torch.zeros(shape))
