"""The pipeline, the stage and what was saved and loaded give the same video, bit for bit; other systems fit in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _generate import direct, toy_items, videos
from _sft_worker import TRANSFORMER, Fit, callbacks, merge, one_thread, tiny_overlay
from _tiny_real import TEXT_DIM, save_qwen, save_wan
from _tiny_wan import randomise
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel
from PIL import Image
from torch import Tensor

from idc.data.benchmark import read_items
from idc.data.item_sources import ItemFile
from idc.data.plan import seed_for
from idc.data.video import decode_video, encode_video
from idc.errors import UserError
from idc.models.baselines import VACE
from idc.models.checkpoints import find_checkpoint, merge_lora, read_weights
from idc.models.codecs import WanVAECodec
from idc.models.conditioners import ToyTextConditioner, UMT5Conditioner
from idc.models.conditioning import Encoders
from idc.models.pipeline import IDCrafterPipeline
from idc.models.sampling import Sampling, to_uint8
from idc.models.spec import IDBlocks, TransformerSpec
from idc.models.toy_codec import CosineCodec
from idc.models.vlm import QwenVLConditioner, ToyVLM
from idc.pictures import clip_pixels, fit_reference, read_picture, reference_pixels
from idc.stages.generate import Encoding, SamplingChanges

SIZE = {"frames": 5, "height": 32, "width": 32}


def call(pipe: Any, prompt: Any = "a red cube", references: Any = (), **settings: Any) -> Any:
    with one_thread():
        return pipe(prompt, references, **{**SIZE, "output_type": "uint8", **settings}).frames


def pictures(count: int, seed: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 16, 16 + 16 * (k % 2), generator=g) * 2 - 1 for k in range(count)]


def toy_pipeline(**blocks: Any) -> IDCrafterPipeline:
    """A random model with every path at work."""
    text, vlm = ToyTextConditioner(dim=32), ToyVLM(dim=32)
    spec = TransformerSpec(**TRANSFORMER, id_blocks=IDBlocks(**{"layers": 2, **blocks}))
    model = spec.build(text.dim, vlm.dim if spec.id_blocks.use_vlm else None)
    randomise(model)
    encoders = Encoders(CosineCodec(), text, vlm if spec.id_blocks.use_vlm else None)
    sampling = Sampling(steps=2, scale=2.5, shift=1.0)
    return IDCrafterPipeline(model, FlowMatchEulerDiscreteScheduler(shift=1.0), encoders, sampling)


# One video, three ways ----------------------------------------------------------------------------------------------


LORA = {"trainable": "id_blocks+lora", "lora": {"rank": 4, "alpha": 12}}


@pytest.mark.parametrize("settings", [{}, {"trainable": "id_blocks"}, LORA], ids=["full", "id_blocks", "lora"])
def test_stage_pipeline_and_saved_pipeline_give_the_same_video(
    settings: dict[str, Any], trained: Callable[..., Path], toy_data: Path, tmp_path: Path
) -> None:
    run = trained(**settings)
    out, lossless = tmp_path / "videos", Encoding(crf=0, pixel_format="yuv444p")
    assert direct(out, run, toy_items(toy_data, limit=2), fps=8).exit_status == 0
    item = read_items(out / "items.jsonl")[1]
    recorded = json.loads((out / "records" / f"{item.id}.json").read_text())
    assert recorded["seed"] == seed_for(0, 0, item.id)
    references = [fit_reference(read_picture(path), 1024 * 256) for path in item.references]
    asked = {"prompt": item.prompt, "references": references, "seed": recorded["seed"]}
    pipe = IDCrafterPipeline.from_run(run)
    frames = call(pipe, **asked)
    data = encode_video(frames, 8, crf=lossless.crf, pixel_format=lossless.pixel_format)
    assert (out / f"{item.id}.mp4").read_bytes() == data
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = IDCrafterPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(call(loaded, **asked), frames)
    assert not np.array_equal(call(IDCrafterPipeline.from_run(run, weights="raw"), **asked), frames)
    again = tmp_path / "again"
    assert direct(again, tmp_path / "pipe", toy_items(toy_data, limit=2), fps=8).exit_status == 0
    assert videos(again) == videos(out)


def test_a_run_opened_in_bfloat16_gives_the_video_of_a_run_that_computes_in_it(trained: Callable[..., Path]) -> None:
    run = trained(compute_dtype="bfloat16")
    whole, rounded = IDCrafterPipeline.from_run(run), IDCrafterPipeline.from_run(run, dtype="bfloat16")
    sizes = [sum(weight.nbytes for weight in pipe.transformer.parameters()) for pipe in (whole, rounded)]
    assert sizes[1] < 0.7 * sizes[0]
    assert np.array_equal(call(whole, seed=1), call(rounded, seed=1))
    exact = IDCrafterPipeline.from_run(trained(), dtype="bfloat16")
    assert exact.config["compute_dtype"] == "bfloat16"
    with pytest.raises(UserError, match="dtype='bfloat17': no such dtype; did you mean"):
        IDCrafterPipeline.from_run(run, dtype="bfloat17")


def test_a_merged_lora_is_the_adapted_layer(trained: Callable[..., Path]) -> None:
    """Against peft's own forward pass, on the weights of a run."""
    from idc.models.trainable import set_trainable

    checkpoint = find_checkpoint(trained(**LORA))
    state = torch.load(checkpoint.state, weights_only=True)["state_dict"]
    adapted = TransformerSpec(**TRANSFORMER, id_blocks=IDBlocks(layers=1)).build(32, 32)
    set_trainable(adapted, "id_blocks+lora", rank=4, alpha=12)
    own = {name.removeprefix("transformer."): v for name, v in state.items() if name.startswith("transformer.")}
    adapted.load_state_dict(own)
    assert max(float(v.abs().max()) for name, v in own.items() if "lora_B" in name) > 0
    merged = TransformerSpec(**TRANSFORMER, id_blocks=IDBlocks(layers=1)).build(32, 32)
    merged.load_state_dict(read_weights(checkpoint, "raw", alpha=12))
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = (x, torch.tensor([500.0]), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        expected, found = (model.eval()(*arguments).sample for model in (adapted, merged))
        without = TransformerSpec(**TRANSFORMER, id_blocks=IDBlocks(layers=1)).build(32, 32).eval()(*arguments).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - without).abs().max() > 1e-4
    with pytest.raises(UserError, match=r"has a LoRA and no config\.yaml"):
        merge_lora(own, None)


def test_shards_of_fsdp2_give_the_weights_of_a_single_file(toy_data: Path, tmp_path: Path) -> None:
    """Read without a process group, and equal to what resuming on one device reads."""
    from idc.callbacks.resume import consolidate

    sharding = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
    }
    changes = {"trainer": {"devices": 2, "strategy": sharding, "max_steps": 3, "limit_val_batches": 0}}
    run = Fit(tmp_path, merge(tiny_overlay(toy_data, tmp_path / "runs"), callbacks(save_every=3), changes), ranks=2)
    assert run.finish() == [0, 0], run.errors()
    checkpoint = find_checkpoint(run.run)
    assert checkpoint.state.is_dir()
    whole = torch.load(consolidate(checkpoint.state.parent), weights_only=True)["state_dict"]
    raw, ema = read_weights(checkpoint, "raw"), read_weights(checkpoint)
    for name, value in raw.items():
        assert torch.equal(value, whole[f"transformer.{name}"]), name
        assert torch.equal(ema[name], whole["ema.transformer/" + name.replace(".", "/")]), name
    assert len(raw) == sum(name.startswith("transformer.") for name in whole)
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)
    call(IDCrafterPipeline.from_run(run.run))


def test_a_folder_of_runs_means_the_newest_with_a_checkpoint(trained: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "sft"
    run = shutil.copytree(trained(), root / "version_0", symlinks=True)
    shutil.copytree(run, root / "version_2", symlinks=True)
    (root / "version_10").mkdir()
    (root / "notes").mkdir()
    for value in (root, root / "version_2", root / "version_2" / "checkpoints"):
        assert find_checkpoint(value).state.parents[2] == root / "version_2"
    step = find_checkpoint(run).state.parent
    expected = find_checkpoint(run)
    assert [find_checkpoint(value) for value in (step, step / "state.ckpt", step.parent / "last")] == [expected] * 3
    shutil.copy(step / "state.ckpt", tmp_path / "bare.ckpt")
    bare = find_checkpoint(tmp_path / "bare.ckpt")
    assert bare.config is None
    assert read_weights(bare).keys() == read_weights(expected).keys()


# The pipeline by itself ---------------------------------------------------------------------------------------------


def test_it_is_diffusers_own_kind_of_pipeline(tmp_path: Path) -> None:
    pipe = toy_pipeline()
    assert isinstance(pipe, DiffusionPipeline)
    assert set(pipe.components) == {"transformer", "scheduler"}
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["idc.models.transformer", "IDCrafterTransformer"]
    assert (tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = IDCrafterPipeline.from_pretrained(str(tmp_path / "pipe"))
    assert loaded.sampling == pipe.sampling
    assert loaded.encoders.codec.fingerprint == pipe.encoders.codec.fingerprint
    assert not any((tmp_path / "pipe").rglob("*.bin"))


@pytest.mark.parametrize("blocks", [{}, {"use_vlm": False}, {"layers": 0, "joint_references": True, "use_vlm": False}])
def test_save_and_load_keep_every_kind_of_conditioning(blocks: dict[str, Any], tmp_path: Path) -> None:
    """The whole block, one without the VLM, and Phantom's concatenation."""
    pipe = toy_pipeline(**blocks)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = IDCrafterPipeline.from_pretrained(tmp_path / "pipe")
    found = call(pipe, references=pictures(2), image_guidance=1.5)
    assert np.array_equal(call(loaded, references=pictures(2), image_guidance=1.5), found)
    assert not np.array_equal(call(pipe, references=pictures(2, seed=4), image_guidance=1.5), found)


def test_the_real_classes_are_saved_with_the_pipeline(tmp_path: Path) -> None:
    """Wan's VAE, UMT5 and Qwen2.5-VL at tiny random sizes; the folder needs none of the places they came from."""
    save_wan(tmp_path / "wan")
    save_qwen(tmp_path / "qwen")
    wan, qwen = str(tmp_path / "wan"), str(tmp_path / "qwen")
    vlm = QwenVLConditioner(qwen, max_pixels=16 * 28 * 28)
    spec = TransformerSpec(pretrained=wan, id_blocks=IDBlocks(layers=2))
    model = spec.build(TEXT_DIM, vlm.dim)
    randomise(model)
    encoders = Encoders(WanVAECodec(wan), UMT5Conditioner(wan, max_length=16), vlm)
    pipe = IDCrafterPipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), encoders, Sampling(steps=2, shift=3.0))
    found = call(pipe, references=pictures(2))
    pipe.save_pretrained(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "wan")
    shutil.rmtree(tmp_path / "qwen")
    shutil.move(tmp_path / "pipe", tmp_path / "moved")
    loaded = IDCrafterPipeline.from_pretrained(tmp_path / "moved")
    assert np.array_equal(call(loaded, references=pictures(2)), found)
    half = IDCrafterPipeline.from_pretrained(tmp_path / "moved", torch_dtype=torch.bfloat16)
    assert half.transformer.blocks[0].attn1.to_q.weight.dtype is torch.bfloat16
    assert half.transformer.scale_shift_table.dtype is torch.float32
    away = np.abs(call(half, references=pictures(2)).astype(int) - found.astype(int)).mean()
    assert 0 < away < 8


def test_a_video_does_not_depend_on_the_prompts_beside_it() -> None:
    pipe = toy_pipeline()
    prompts, references = ["a red cube", "a cat meets another"], [pictures(1), pictures(3)]
    both = call(pipe, prompts, references, seed=[5, 6])
    for k in (0, 1):
        assert np.array_equal(both[k], call(pipe, prompts[k], references[k], seed=5 + k))
    assert np.array_equal(call(pipe, seed=5), call(pipe, seed=[5]))
    assert not np.array_equal(call(pipe, seed=5), call(pipe, seed=6))
    generators = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    one, same, other = (call(pipe, generator=g) for g in generators)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_all_forms_of_a_picture_and_of_the_output_mean_the_same() -> None:
    pipe = toy_pipeline()
    array = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    expected = call(pipe, references=[tensor])
    for form in (array, Image.fromarray(array)):
        assert np.array_equal(call(pipe, references=[form]), expected)
    pixels = call(pipe, references=[tensor], output_type="pt")
    assert pixels.shape == (3, 5, 32, 32)
    assert np.array_equal(to_uint8(pixels), expected)
    floats = call(pipe, references=[tensor], output_type="np")
    np.testing.assert_allclose(floats, (pixels.movedim(0, -1).numpy() + 1) / 2, atol=1e-7)
    assert np.array_equal(np.stack(list(map(np.asarray, call(pipe, references=[tensor], output_type="pil")))), expected)
    latent = call(pipe, references=[tensor], output_type="latent")
    assert torch.equal(pipe.encoders.codec.decode(latent[None])[0], pixels)


def picture_files(folder: Path) -> list[Path]:
    """One above the area cap, one with soft transparency, one that EXIF turns, one of odd sides."""
    g = np.random.default_rng(0)

    def noise(height: int, width: int, channels: int = 3) -> Image.Image:
        coarse = Image.fromarray(g.integers(0, 256, (7, 9, channels), dtype=np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC)

    turned = Image.Exif()
    turned[0x0112] = 6  # 90 degrees clockwise
    noise(900, 1200).save(folder / "large.png")
    noise(48, 64, channels=4).save(folder / "alpha.png")
    noise(48, 64).save(folder / "turned.jpg", exif=turned, quality=95)
    noise(333, 500).save(folder / "odd.png")
    return [folder / name for name in ("large.png", "alpha.png", "turned.jpg", "odd.png")]


def test_a_picture_is_the_same_to_the_stage_and_in_every_form_to_the_pipeline(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Bit for bit: file by the stage; path, PIL image, array and tensor by the pipeline."""
    run, files, out = trained(), picture_files(tmp_path), tmp_path / "videos"
    rows = [{"id": file.stem, "prompt": "a red cube", "references": [file.name]} for file in files]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert direct(out, run, ItemFile(f"{tmp_path}/items.jsonl"), fps=8).exit_status == 0
    pipe = IDCrafterPipeline.from_run(run)
    for file in files:
        frames = call(pipe, references=[Image.open(file)], seed=seed_for(0, 0, file.stem))
        assert (out / f"{file.stem}.mp4").read_bytes() == encode_video(frames, 8, crf=0, pixel_format="yuv444p")
        whole = read_picture(file)
        forms = [file, str(file), Image.open(file), whole, ((whole + 1) * 127.5).round().byte()]
        if file.stem != "turned":  # arrays know no EXIF
            forms.append(np.array(Image.open(file)))
        assert all(torch.equal(reference_pixels(form), whole) for form in forms)
        floats = to_uint8(whole).astype(np.float64) / 255
        torch.testing.assert_close(reference_pixels(floats), whole, rtol=0, atol=1e-6)
    by_stem = {file.stem: fit_reference(read_picture(file), 1024 * 256) for file in files}
    assert by_stem["large"].shape == (3, 432, 592)
    assert by_stem["turned"].shape == (3, 64, 48)
    assert by_stem["odd"].shape == (3, 336, 496)
    rgba = np.array(Image.open(files[1])).astype(np.float64)
    on_white = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    assert np.abs(to_uint8(by_stem["alpha"]) - on_white).max() <= 1
    small = call(pipe, references=[files[0]], reference_area=64 * 64)
    assert not np.array_equal(small, call(pipe, references=[files[0]]))


def test_a_clip_is_the_same_in_every_form() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    whole = torch.from_numpy(clip).movedim(-1, 0)
    for form in (clip, whole, clip[::-1][::-1], clip_pixels(clip)):
        assert torch.equal(clip_pixels(form), whole.float().mul(2 / 255).sub(1))
    own, sizes = toy_pipeline(), {"frames": None, "height": None, "width": None}
    expected = call(own, source=clip, strength=0.8)
    assert expected.shape == clip.shape
    assert np.array_equal(call(own, source=whole, **sizes), expected)  # 0.8 is the default, the size is the source's
    assert call(own, "", source=clip, strength=0.0).shape == clip.shape
    half = np.zeros(clip.shape[:3], bool)
    half[:, :16] = True
    assert np.array_equal(call(own, source=clip, mask=half), call(own, source=clip, mask=torch.from_numpy(half)))


def test_it_edits_as_the_stage_does(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained()
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_video(clip, 8, crf=0, pixel_format="yuv444p"))
    mask = np.zeros((32, 32), np.uint8)
    mask[4:20, 8:25] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    row = {"id": "edit", "prompt": "a red cube", "source": "clip.mp4", "mask": "mask.png"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(row))
    items, changed = ItemFile(f"{tmp_path}/edits.jsonl"), {}
    for invert in (False, True):
        out = tmp_path / f"invert_{invert}"
        direct(out, run, items, edit=True, strength=0.7, invert_mask=invert)
        where = torch.from_numpy(mask > 0).expand(5, 32, 32) ^ invert
        frames = call(
            IDCrafterPipeline.from_run(run),
            source=decode_video(tmp_path / "clip.mp4"),
            mask=where,
            strength=0.7,
            seed=seed_for(0, 0, "edit"),
        )
        assert (out / "edit.mp4").read_bytes() == encode_video(frames, 8, crf=0, pixel_format="yuv444p")
        changed[invert] = frames
    assert not np.array_equal(changed[False], changed[True])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"frames": 6}, "frames=6.*5 and 9"),
        ({"width": 40}, "width=40.*32 and 48"),
        ({"steps": 0}, "^sampling: steps=0: at least 1; the paper's is 50$"),
        ({"output_type": "mp4"}, "output_type='mp4'"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"references": pictures(5)}, "5 subjects"),
        ({"references": [torch.zeros(4, 16, 16)]}, "reference of shape"),
        ({"prompt": ["a", "b"], "references": [pictures(1)]}, "1 lists of references for 2 prompts"),
        ({"source": torch.zeros(3, 6, 32, 32), "frames": None}, "frames=6"),
        ({"source": torch.zeros(3, 5, 32, 32), "strength": 1.2}, r"strength=1\.2"),
        ({"source": torch.zeros(3, 5, 32, 32), "mask": torch.zeros(5, 32, 16) > 0}, "mask of shape"),
        ({"strength": 0.5}, "strength is of an edit.*give source"),
        ({"mask": torch.zeros(5, 32, 32) > 0}, "mask is of an edit.*give source"),
        ({"source": torch.zeros(3, 9, 32, 32)}, "frames=5: the source has 9"),
        ({"source": torch.zeros(3, 5, 32, 48)}, "width=32: the source has 48"),
        ({"source": "clip.mp4"}, "source of type str"),
        ({"source": torch.full((3, 5, 32, 32), 2.0)}, "source with values from 2 to 2"),
        ({"references": Image.new("RGB", (16, 16))}, r"one picture; give a list.*references=\[picture\]"),
        ({"references": np.zeros((16, 16, 3), np.uint8)}, "one picture; give a list"),
        ({"references": torch.zeros(3, 16, 16)}, "one picture; give a list"),
        ({"references": "cat.png"}, "one picture; give a list"),
        ({"references": 3}, "of type int; give a list"),
        ({"references": ["nowhere.png"]}, "nowhere.png: no such file"),
        ({"references": [np.full((16, 16, 3), 255.0)]}, r"values from 255 to 255: a float array is in \[0, 1\]"),
        ({"references": [np.full((16, 16, 3), -1.0)]}, r"values from -1 to -1: a float array is in \[0, 1\]"),
        ({"references": [np.full((16, 16, 3), np.nan)]}, "values from nan to nan"),
        ({"references": [torch.full((3, 16, 16), 255.0)]}, r"a float tensor is in \[-1, 1\]"),
        ({"references": [torch.zeros(3, 16, 16, dtype=torch.int64)]}, r"torch\.int64"),
        ({"references": [np.zeros((16, 16), np.uint8)]}, "reference of shape"),
        ({"references": [None]}, "reference of type NoneType"),
        ({"reference_area": 100}, "reference_area=100"),
        ({"prompt": 3}, "prompt=3: must be text, or a list of texts"),
        ({"prompt": ["a", None]}, r"prompt=\['a', None\]: must be text"),
        ({"prompt": None}, "prompt=None: must be text"),
        ({"prompt": " "}, "nothing says what to show"),
        ({"prompt": ["a", ""]}, "nothing says what to show"),
    ],
)
def test_a_wrong_argument_names_its_rule(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        call(toy_pipeline(), **settings)


def test_an_incomplete_or_foreign_folder_is_named(tmp_path: Path) -> None:
    toy_pipeline().save_pretrained(tmp_path / "pipe")

    def broken(name: str, change: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "pipe", folder)
        change(folder)
        return folder

    cases = {
        "no_codec": (lambda f: shutil.rmtree(f / "codec"), "incomplete, it has no encoder.json"),
        "no_config": (lambda f: (f / "transformer" / "config.json").unlink(), r"no transformer/config\.json"),
        "no_index": (lambda f: (f / "model_index.json").unlink(), r"no model_index\.json"),
        "class": (lambda f: (f / "text" / "encoder.json").write_text('{"class": "os.system"}'), r"os\.system"),
        "foreign": (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "WanPipeline"}'),
            "of a WanPipeline",
        ),
    }
    for name, (change, expected) in cases.items():
        with pytest.raises(UserError, match=expected):
            IDCrafterPipeline.from_pretrained(broken(name, change))
    with pytest.raises(UserError, match="no such folder"):
        IDCrafterPipeline.from_pretrained(tmp_path / "nowhere")


# Other systems ------------------------------------------------------------------------------------------------------


def save_vace(root: Path) -> None:
    """Wan2.1-VACE as published, at a tiny random size."""
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    save_wan(root / "parts")
    torch.manual_seed(1)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "freq_dim": 32}
    transformer = WanVACETransformer3DModel(**sizes, text_dim=TEXT_DIM, vace_layers=[0, 1], vace_in_channels=96)
    WanVACEPipeline(
        tokenizer=AutoTokenizer.from_pretrained(root / "parts" / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(root / "parts" / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(root / "parts" / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    ).save_pretrained(root / "vace")


def test_vace_runs_through_the_same_stage(toy_data: Path, tmp_path: Path) -> None:
    """Its videos are those of diffusers' pipeline called by hand, and depend on the references."""
    save_vace(tmp_path)
    vace = VACE(str(tmp_path / "vace"), dtype="float32", max_length=16)
    steps, out = SamplingChanges(steps=2), tmp_path / "videos"
    assert direct(out, None, toy_items(toy_data, limit=2), baseline=vace, sampling=steps, fps=8).exit_status == 0
    item = read_items(out / "items.jsonl")[0]
    pipe = WanVACEPipeline.from_pretrained(tmp_path / "vace", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    from idc.flow.times import generator

    def by_hand(references: list[Any]) -> np.ndarray:
        with one_thread(), torch.no_grad():
            frames = pipe(
                prompt=item.prompt,
                negative_prompt="",
                reference_images=references,
                num_frames=5,
                height=32,
                width=32,
                num_inference_steps=2,
                guidance_scale=5.0,
                generator=generator(seed_for(0, 0, item.id), "noise"),
                max_sequence_length=16,
                output_type="pt",
            ).frames[0]
        return to_uint8((frames * 2 - 1).movedim(1, 0))

    images = [Image.open(path).convert("RGB") for path in item.references]
    expected = by_hand(images)
    assert (out / f"{item.id}.mp4").read_bytes() == encode_video(expected, 8, crf=0, pixel_format="yuv444p")
    assert not np.array_equal(by_hand([Image.new("RGB", (16, 16), "red")]), expected)
    with pytest.raises(UserError, match=r"no_vace"):
        VACE(str(tmp_path / "no_vace")).load()
    wrong = direct(
        tmp_path / "w", None, toy_items(toy_data, limit=1), baseline=vace, sampling=SamplingChanges(rescale=0.5)
    )
    assert "VACE knows steps and scale" in next(iter(wrong.failures.values()))


def test_phantoms_concatenation_runs_on_the_same_backbone_from_plain_wan_weights(
    toy_data: Path, tmp_path: Path
) -> None:
    """As recipes/baselines/phantom.yaml says it; the references reach the video, and there is nothing of ours in it."""
    save_wan(tmp_path / "wan")
    wan = str(tmp_path / "wan")
    spec = TransformerSpec(pretrained=wan, id_blocks=IDBlocks(layers=0, joint_references=True, use_vlm=False))
    out = tmp_path / "videos"
    settings = {
        "transformer": spec,
        "codec": WanVAECodec(wan),
        "text": UMT5Conditioner(wan, max_length=16),
        "sampling": SamplingChanges(steps=2, scale=7.5, image_scale=5.0),
    }
    stage = direct(out, None, toy_items(toy_data, limit=1), **settings)
    assert stage.exit_status == 0
    item = read_items(out / "items.jsonl")[0]
    blank = [Image.new("RGB", (16, 16)).save(tmp_path / f"{k}.png") or f"{k}.png" for k in range(len(item.references))]
    row = {"id": item.id, "prompt": item.prompt, "references": blank}
    (tmp_path / "other.jsonl").write_text(json.dumps(row))
    direct(tmp_path / "other", None, ItemFile(f"{tmp_path}/other.jsonl"), **settings)
    assert videos(tmp_path / "other").keys() == videos(out).keys()
    assert videos(tmp_path / "other") != videos(out)
    ours = [name for name, _ in stage.transformer.named_parameters() if name.startswith("id_")]
    assert ours == ["id_subject_embedding"]
