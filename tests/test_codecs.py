"""WanVAECodec on a tiny random AutoencoderKLWan, saved and loaded as the real one."""

from __future__ import annotations

import contextlib
import copy
import shutil

import pytest
import torch
from _tiny_real import tiny_vae

from idc.errors import UserError
from idc.models.codecs import WanVAECodec


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def root(vae, tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    vae.save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def codec(root):
    return WanVAECodec(str(root))


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (9, 3)])
def test_shapes_and_dtypes(codec, frames, latent_frames):
    latents = codec.encode(torch.rand(2, 3, frames, 16, 32) * 2 - 1)
    assert latents.shape == (2, 16, latent_frames, 2, 4)
    assert latents.shape[1:] == codec.latent_shape(frames, 16, 32)
    video = codec.decode(latents)
    assert video.shape == (2, 3, frames, 16, 32)
    assert latents.dtype == video.dtype == torch.float32
    assert not latents.requires_grad
    assert video.abs().max() <= 1


def test_latents_are_the_posterior_mean_normalised_as_the_pipeline_undoes_it(codec, vae):
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = codec.encode(video)
    # WanPipeline's way back: latents / (1 / std) + mean.
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        raw = vae.encode(video).latent_dist.mode()
        torch.testing.assert_close(latents / (1 / std) + mean, raw)
        decoded = vae.decode(latents / (1 / std) + mean).sample
    torch.testing.assert_close(codec.decode(latents), decoded.clamp(-1, 1))
    assert not torch.allclose(latents, raw, atol=1e-2)


def test_sampling_follows_its_generator_and_the_posterior(codec, vae):
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    draws = [codec.sample(video, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
    std = posterior.std / torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    standardised = torch.cat(
        [(codec.sample(video, torch.Generator().manual_seed(i)) - codec.encode(video)) / std for i in range(20)]
    )
    assert standardised.mean().item() == pytest.approx(0, abs=0.06)
    assert standardised.std().item() == pytest.approx(1, abs=0.06)


def test_a_clip_does_not_depend_on_its_batch(codec):
    video = torch.rand(3, 3, 5, 16, 16) * 2 - 1
    whole = codec.encode(video)
    torch.testing.assert_close(torch.cat([codec.encode(clip[None]) for clip in video]), whole)


def test_precision_is_a_setting_and_latents_stay_float32(root):
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    codec = WanVAECodec(str(root), dtype="bfloat16").load("cpu", torch.float32)
    latents = codec.encode(video)
    assert latents.dtype == torch.float32
    reference = WanVAECodec(str(root)).encode(video)
    assert not torch.equal(latents, reference)
    torch.testing.assert_close(latents, reference, atol=0.05, rtol=0.05)


def test_mixed_precision_around_the_codec_changes_nothing(codec):
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = codec.encode(video)
    decoded = codec.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(video), latents)
        assert torch.equal(codec.decode(latents), decoded)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), r"frames=4: .* 1 and 5"),
        ((1, 3, 5, 20, 16), r"height=20: .* 16 and 24"),
        ((1, 3, 5, 16, 4), r"width=4: .* 8 and 16"),
        ((1, 4, 5, 16, 16), r"\[B, 3, T, H, W\]"),
        ((3, 5, 16, 16), r"\[B, 3, T, H, W\]"),
    ],
)
def test_bad_clips_are_refused_before_anything_loads(shape, message):
    with pytest.raises(UserError, match=message):
        WanVAECodec("/nowhere").encode(torch.zeros(shape))


def test_latents_of_another_codec_are_refused(codec):
    with pytest.raises(UserError, match=r"\[B, 16, T, H, W\]"):
        codec.decode(torch.zeros(1, 4, 1, 2, 2))


@pytest.mark.parametrize("path", ["/nowhere/wan", "./wan", "../a/b/c", "wan"])
def test_a_missing_path_names_itself_and_what_it_should_hold(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codec = WanVAECodec(path)
    with pytest.raises(UserError, match=r"does not exist; .*diffusion_pytorch_model\.safetensors") as error:
        codec.load()
    assert repr(path) in str(error.value)


def test_an_empty_folder_and_another_vae_are_refused(tmp_path, vae):
    from diffusers import AutoencoderKLWan

    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        WanVAECodec(str(tmp_path)).load()
    small = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    small.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"4 latent channels; Wan2\.1's has 16"):
        WanVAECodec(str(tmp_path), subfolder="other").load()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match=r"'bfloat61'.*'bfloat16'"):
        WanVAECodec(dtype="bfloat61")


def test_a_hub_id_is_passed_through(monkeypatch):
    from diffusers import AutoencoderKLWan

    asked = []

    def from_pretrained(path, **kwargs):
        asked.append((path, kwargs["subfolder"]))
        raise OSError("offline")

    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", from_pretrained)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline; the model hub is out of reach"):
        WanVAECodec("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").load()
    assert asked == [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae")]


def test_fingerprint_follows_settings_and_weights_not_loading(root, tmp_path, vae):
    codec = WanVAECodec(str(root))
    before = codec.fingerprint
    codec.load("cpu", torch.bfloat16)
    assert codec.fingerprint == before == WanVAECodec(str(root)).fingerprint
    shutil.copytree(root / "vae", tmp_path / "moved" / "vae")
    assert WanVAECodec(str(tmp_path / "moved")).fingerprint == before
    changed = copy.deepcopy(vae)
    with torch.no_grad():
        next(changed.parameters()).mul_(0.5)
    changed.save_pretrained(tmp_path / "vae")  # files of the same names and sizes
    others = [WanVAECodec(str(root), dtype="bfloat16"), WanVAECodec(str(root), tiling=True), WanVAECodec(str(tmp_path))]
    assert len({before, *(other.fingerprint for other in others)}) == 4


def test_weights_are_frozen_and_loading_twice_loads_once(root):
    codec = WanVAECodec(str(root)).load()
    weights = codec._model
    assert codec.load()._model is weights
    assert not weights.training
    assert not any(parameter.requires_grad for parameter in weights.parameters())


def _decoded_in_tiles_of_32(codec, latents):
    model = codec.load()._model
    kept = model.tile_sample_min_height, model.tile_sample_stride_height
    model.tile_sample_min_height = model.tile_sample_min_width = 32
    model.tile_sample_stride_height = model.tile_sample_stride_width = 24
    try:
        return codec.decode(latents)
    finally:
        model.tile_sample_min_height, model.tile_sample_stride_height = kept
        model.tile_sample_min_width, model.tile_sample_stride_width = kept


@pytest.mark.parametrize("cause", ["estimate", "error"])
def test_what_does_not_fit_the_free_memory_is_decoded_in_tiles_and_said_so(root, monkeypatch, cause):
    """Tiles of tiny clips differ from the whole by their seams: about 2 of 255 here, on noise, random weights and an
    overlap of 8 pixels."""
    latents = torch.randn(1, 16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    whole = WanVAECodec(str(root), tiling=False).decode(latents)
    codec = WanVAECodec(str(root)).load()
    assert codec.fingerprint == WanVAECodec(str(root), tiling=False).fingerprint
    assert torch.equal(codec.decode(latents), whole)
    need = codec.decode_bytes(tuple(latents.shape))
    monkeypatch.setattr("idc.models.codecs.free_memory", lambda device: need - (cause == "estimate"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    real = codec._model._decode

    def full(z, return_dict=True):
        if cause == "error" and not codec._model.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(z, return_dict)

    monkeypatch.setattr(codec._model, "_decode", full)
    with pytest.warns(UserWarning, match="too little memory to decode latents"):
        tiled = _decoded_in_tiles_of_32(codec, latents)
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() * 127.5 < 4
    assert torch.equal(tiled, _decoded_in_tiles_of_32(WanVAECodec(str(root), tiling=True), latents))
    with pytest.raises(torch.OutOfMemoryError) if cause == "error" else contextlib.nullcontext():
        codec.tiling = False
        assert torch.equal(codec.decode(latents), whole)


def test_encoding_stays_whole_after_a_decoding_in_tiles(root):
    video = torch.rand(1, 3, 1, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = WanVAECodec(str(root)).load()
    before = codec.encode(video)
    codec._model.tile_sample_min_height = codec._model.tile_sample_min_width = 32
    codec._model.tile_sample_stride_height = codec._model.tile_sample_stride_width = 24
    codec._decoded(before.clone(), True)
    assert torch.equal(codec.encode(video), before)


def test_a_bfloat16_decode_stays_near_and_changes_no_latents(root):
    """Off by 0.20 of 255 on average and by 1.2 at most; latents, which are cached, are those of the weights' type."""
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact, quick = WanVAECodec(str(root)), WanVAECodec(str(root), decode_dtype="bfloat16")
    latents = exact.encode(video)
    assert torch.equal(quick.encode(video), latents)
    error = (quick.decode(latents) - exact.decode(latents)).abs() * 127.5
    assert 0 < error.mean() < 0.3
    assert error.max() < 2
    assert torch.equal(quick.encode(video), latents)
    assert quick.fingerprint != exact.fingerprint == WanVAECodec(str(root), decode_dtype="float32").fingerprint
    shape = tuple(latents.shape)
    assert exact.decode_bytes(shape) / 2 < quick.decode_bytes(shape) < exact.decode_bytes(shape)  # pixels are float32


def test_a_bfloat16_decode_computes_in_bfloat16_throughout_and_is_freed(root):
    codec = WanVAECodec(str(root), decode_dtype="bfloat16").load()
    assert codec._decoder is None
    model, latents = codec._decoding(), torch.zeros(1, 16, 2, 2, 2)
    met = set()
    for module in model.modules():
        module.register_forward_hook(lambda _, given, out: met.update((given[0].dtype, out.dtype)))
    codec.decode(latents)
    assert met == {torch.bfloat16}
    assert {weight.dtype for weight in codec._model.parameters()} == {torch.float32}
    assert codec._decoding() is model
    codec.unload()
    assert codec._decoder is codec._model is None
    assert codec.decode(latents).shape == (1, 3, 5, 16, 16)
    assert codec._decoding() is not model
