from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny_embedders import CHAT, aesthetic_head, save_clip, save_gme, save_siglip

from idc.errors import UserError
from idc.metrics.aesthetics import Aesthetics
from idc.metrics.base import Clip, sample_frames
from idc.metrics.gme import INSTRUCTION, GmeScore
from idc.models.aesthetic import AestheticPredictor
from idc.models.embedders import CLIPEmbedder, GMEEmbedder, ImageTextEmbedder

TEXTS = ["a red ball", "a cat meets another cat on the green floor and the blue cube meets a red ball"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embedders")
    save_clip(root / "clip")
    save_siglip(root / "siglip")
    save_gme(root / "gme")
    torch.save(aesthetic_head().state_dict(), root / "head.pth")
    return root


def gme(saved: Path, **settings) -> GMEEmbedder:
    return GMEEmbedder(str(saved / "gme"), **{"min_tokens": 4, "max_tokens": 16, "dtype": "float32"} | settings)


def frames(count: int = 5, height: int = 40, width: int = 52, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def by_hand(frame: np.ndarray, side: int = 32) -> torch.Tensor:
    """CLIP's preprocessing: short side to `side` (bicubic, PIL), centre crop, mean and deviation of the data."""
    from PIL import Image

    height, width = frame.shape[:2]
    scale = side / min(height, width)
    size = (side, int(height * scale)) if width < height else (int(width * scale), side)
    picture = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)).astype(np.float32) / 255
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    picture = picture[top : top + side, left : left + side]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((picture - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)


def test_clip_vectors_are_transformers_own_projected_and_normalised(saved):
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PreTrainedTokenizerFast

    embedder = CLIPEmbedder(str(saved / "clip"), batch=2)
    vision = CLIPVisionModelWithProjection.from_pretrained(saved / "clip").eval()
    text = CLIPTextModelWithProjection.from_pretrained(saved / "clip").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved / "clip")
    with torch.no_grad():
        pictures = unit(vision(torch.stack([by_hand(frame) for frame in frames()])).image_embeds)
        ids = [tokenizer(text, truncation=True, max_length=12).input_ids for text in TEXTS]
        words = torch.cat([unit(text(torch.tensor([one])).text_embeds) for one in ids])
    torch.testing.assert_close(embedder.embed_images(list(frames())), pictures, rtol=0, atol=2e-5)
    torch.testing.assert_close(embedder.embed_texts(TEXTS), words, rtol=0, atol=2e-5)
    assert embedder.dim == 768


def test_siglip_vectors_are_transformers_own_with_padded_texts(saved):
    from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil, SiglipModel

    embedder = CLIPEmbedder(str(saved / "siglip"), batch=3)
    model = SiglipModel.from_pretrained(saved / "siglip").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved / "siglip")
    processor = SiglipImageProcessorPil.from_pretrained(saved / "siglip")
    with torch.no_grad():
        pixels = processor(images=list(frames()), return_tensors="pt").pixel_values
        inputs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        output = model(input_ids=inputs.input_ids, pixel_values=pixels, attention_mask=inputs.attention_mask)
    torch.testing.assert_close(embedder.embed_images(list(frames())), output.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.embed_texts(TEXTS), output.text_embeds, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def qwen(saved):
    """GME's published forward pass over a padded batch: embeddings with pictures put in, one-dimensional positions,
    the state at the last real token."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(saved / "gme").eval().model
    tokenizer = AutoTokenizer.from_pretrained(saved / "gme")
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 784, "longest_edge": 16 * 784})

    def embed(inputs: list[tuple[str, str, np.ndarray | None]]) -> torch.Tensor:
        rows, pixels = [], []
        for instruction, text, picture in inputs:
            body = text
            if picture is not None:
                pixels.append(processor(images=[picture], return_tensors="pt"))
                count = int(pixels[-1].image_grid_thw.prod()) // 4
                body = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" + text
            user = f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
            rows.append(tokenizer(f"<|im_start|>system\n{instruction}<|im_end|>\n{user}").input_ids)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        embedded = model.get_input_embeddings()(ids)
        if pixels:
            states = [model.visual(one.pixel_values, one.image_grid_thw).pooler_output for one in pixels]
            embedded[ids == model.config.image_token_id] = torch.cat(states)
        output = model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
        return unit(output.last_hidden_state[torch.arange(len(rows)), mask.sum(1) - 1])

    return torch.no_grad()(embed)


def test_gme_vectors_are_those_of_its_published_forward_pass(saved, qwen):
    pictures = [frames(1, 56, 84)[0], frames(1, 84, 56, seed=1)[0], frames(1, 112, 112, seed=2)[0]]
    embedder = gme(saved)
    expected = qwen([("You are a helpful assistant.", "", picture) for picture in pictures])
    torch.testing.assert_close(embedder.embed_images(pictures), expected, rtol=0, atol=1e-5)
    expected = qwen([("the cat", text, None) for text in TEXTS])
    torch.testing.assert_close(embedder.embed_texts(TEXTS, "the cat"), expected, rtol=0, atol=1e-5)
    expected = qwen([("You are a helpful assistant.", text, None) for text in TEXTS])
    torch.testing.assert_close(embedder.embed_texts(TEXTS), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(embedder.embed_texts(TEXTS[:1], "red"), embedder.embed_texts(TEXTS[:1], "blue"))


def test_gme_resizes_to_its_grid_first_and_into_its_limits_then(saved, qwen):
    from PIL import Image

    large = frames(1, 300, 410)[0]
    first = np.asarray(Image.fromarray(large).resize((420, 308), Image.Resampling.BICUBIC))
    expected = qwen([("You are a helpful assistant.", "", first)])
    torch.testing.assert_close(gme(saved).embed_images([large]), expected, rtol=0, atol=1e-5)
    tiny = gme(saved).embed_images([frames(1, 3, 5)[0]])
    assert tiny.norm() == pytest.approx(1, abs=1e-5)


def test_gme_cuts_a_text_that_is_too_long_for_it(saved):
    embedder = gme(saved, max_length=6)
    long = embedder.embed_texts(["red ball cat cube"])
    assert torch.equal(long, embedder.embed_texts(["red ball cat cube and the floor"]))


def test_vectors_do_not_depend_on_their_neighbours(saved):
    pictures = list(frames(4))
    for embedder in (gme(saved), CLIPEmbedder(str(saved / "clip"))):
        alone = torch.cat([embedder.embed_images([picture]) for picture in pictures])
        torch.testing.assert_close(embedder.embed_images(pictures), alone, rtol=0, atol=1e-6)
        alone = torch.cat([embedder.embed_texts([text]) for text in TEXTS])
        torch.testing.assert_close(embedder.embed_texts(TEXTS), alone, rtol=0, atol=1e-6)
        assert embedder.embed_images([]).shape == embedder.embed_texts([]).shape == (0, embedder.dim)


def test_unloading_copying_and_pickling_leave_the_weights_behind_and_change_nothing(saved):
    for embedder in (gme(saved), CLIPEmbedder(str(saved / "clip"))):
        before = embedder.embed_texts(TEXTS)
        assert len(pickle.dumps(embedder)) < 1000
        for other in (copy.deepcopy(embedder), pickle.loads(pickle.dumps(embedder))):
            assert other.fingerprint == embedder.fingerprint
            assert torch.equal(other.embed_texts(TEXTS), before)
        embedder.unload()
        assert embedder._model is None
        assert torch.equal(embedder.embed_texts(TEXTS), before)


def test_fingerprints_follow_the_settings(saved):
    prints = {gme(saved).fingerprint, gme(saved, max_tokens=32).fingerprint, gme(saved, dtype="bfloat16").fingerprint}
    prints |= {CLIPEmbedder(str(saved / name)).fingerprint for name in ("clip", "siglip")}
    assert len(prints) == 5


def test_aesthetics_is_the_mean_of_the_head_over_clips_vectors(saved):
    from transformers import CLIPVisionModelWithProjection

    clip = Clip("clip", frames(5))
    metric = Aesthetics(AestheticPredictor(str(saved / "head.pth"), CLIPEmbedder(str(saved / "clip"))))
    vision = CLIPVisionModelWithProjection.from_pretrained(saved / "clip").eval()
    head = aesthetic_head()["layers"]
    with torch.no_grad():
        pixels = torch.stack([by_hand(clip.frames_THWC[i]) for i in sample_frames(5, 32)])
        ratings = head(unit(vision(pixels).image_embeds))[:, 0]
    found = metric.score(clip)
    assert found.value == pytest.approx(ratings.mean().item(), abs=1e-5)
    np.testing.assert_allclose(found.details["ratings"], ratings.numpy(), atol=1e-5)
    assert len(set(found.details["ratings"])) == 5
    assert metric.models == ("LAION aesthetic head", "clip")


def test_the_head_may_be_safetensors_and_a_high_rating_stays_on_the_raters_scale(saved, tmp_path):
    from safetensors.torch import save_file

    head = aesthetic_head()
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    clip = CLIPEmbedder(str(saved / "clip"))
    pictures = list(frames(2))
    published = AestheticPredictor(str(saved / "head.pth"), clip).predict(pictures)
    assert torch.equal(AestheticPredictor(str(tmp_path / "head.safetensors"), clip).predict(pictures), published)
    head["layers"][-1].bias.data += 20
    torch.save(head.state_dict(), tmp_path / "high.pth")
    found = Aesthetics(AestheticPredictor(str(tmp_path / "high.pth"), clip)).score(Clip("clip", frames(2)))
    assert found.value == 10
    assert min(found.details["ratings"]) > 20


def test_gme_score_is_the_mean_cosine_of_32_frames_to_the_instructed_prompt(saved, qwen):
    clip = Clip("clip", frames(6, 56, 84), prompt=TEXTS[0])
    found = GmeScore(gme(saved)).score(clip)
    neutral = "You are a helpful assistant."
    vectors = qwen([(neutral, "", clip.frames_THWC[i]) for i in sample_frames(6, 32)])
    prompt = qwen([(INSTRUCTION, clip.prompt, None)])
    cosines = (vectors @ prompt.T)[:, 0]
    assert found.value == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert len(found.details["cosines"]) == 32
    assert INSTRUCTION == "Find an image that matches the given text."


def test_a_clip_that_cannot_be_compared_fails_with_its_reason(saved):
    metric = GmeScore(gme(saved), frames=2)
    assert "no prompt" in metric.score(Clip("clip", frames(2), prompt=" ")).reason
    found = metric.score(Clip("clip", frames(2, 1, 300), prompt="a cat"))
    assert found.value is None
    assert "300 x 1" in found.reason


def test_missing_files_are_named_before_anything_is_loaded(saved, tmp_path):
    clip = CLIPEmbedder(str(saved / "clip"))
    with pytest.raises(UserError, match=r"nowhere.*does not exist; it should contain GME-Qwen2-VL"):
        GmeScore(GMEEmbedder(str(tmp_path / "nowhere"))).load()
    with pytest.raises(UserError, match=r"no such file; give LAION's"):
        Aesthetics(AestheticPredictor(str(tmp_path / "no.pth"), clip)).load()
    assert clip._model is None
    missing = {
        "config.json": "config.json",
        "model.safetensors": "model.safetensors",
        "tokenizer_config.json": "tokenizer",
        "preprocessor_config.json": "preprocessor_config.json",
    }
    for file, named in missing.items():
        folder = tmp_path / file.split(".")[0]
        folder.mkdir()
        for other in (saved / "clip").iterdir():
            if other.name != file:
                (folder / other.name).symlink_to(other)
        with pytest.raises(UserError, match=named):
            CLIPEmbedder(str(folder)).load()


def test_weights_that_lack_a_tensor_or_are_cut_off_are_refused_and_not_filled_in(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("tensor", "size", "cut"):
        (tmp_path / name).mkdir()
        for file in (saved / "gme").iterdir():
            if file.name != "model.safetensors":
                (tmp_path / name / file.name).symlink_to(file)
    state = load_file(saved / "gme" / "model.safetensors")
    lost = next(key for key in state if key.endswith("layers.1.mlp.up_proj.weight"))
    del state[lost]
    save_file(state, tmp_path / "tensor" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing .*layers\.1\.mlp\.up_proj"):
        GMEEmbedder(str(tmp_path / "tensor")).load()
    save_file(state | {lost: torch.zeros(7, 32)}, tmp_path / "size" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"of another size .*, such as .*layers\.1\.mlp\.up_proj"):
        GMEEmbedder(str(tmp_path / "size")).load()
    whole = (saved / "gme" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot load GME-Qwen2-VL"):
        GMEEmbedder(str(tmp_path / "cut")).load()


def test_gme_loads_weights_named_as_the_published_ones_are(saved, tmp_path):
    """The hub's files are of the time when the language model was `model.*` and the pictures' one `visual.*`."""
    from safetensors.torch import load_file, save_file

    state = load_file(saved / "gme" / "model.safetensors")
    renamed = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in state.items()
        if not key.startswith("lm_head")
    }
    for file in (saved / "gme").iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old = GMEEmbedder(str(tmp_path), 4, 16, dtype="float32")
    assert torch.equal(old.embed_texts(TEXTS), gme(saved).embed_texts(TEXTS))
    assert torch.equal(old.embed_images(list(frames(1))), gme(saved).embed_images(list(frames(1))))


def test_a_wrong_head_is_named(saved, tmp_path):
    clip = CLIPEmbedder(str(saved / "clip"))

    def load(state: object) -> None:
        torch.save(state, tmp_path / "head.pth")
        AestheticPredictor(str(tmp_path / "head.pth"), clip).load()

    state = dict(aesthetic_head().state_dict())
    with pytest.raises(UserError, match=r"not LAION's aesthetic head.*weight"):
        load({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"not LAION's aesthetic head.*layers\.7\.bias"):
        load({key: value for key, value in state.items() if key != "layers.7.bias"})
    with pytest.raises(UserError, match="do not lead to one score"):
        load({key: value for key, value in state.items() if not key.startswith("layers.7")})
    with pytest.raises(UserError, match="takes vectors of 512, 'clip' gives 768"):
        load({"layers.0.weight": torch.zeros(1, 512), "layers.0.bias": torch.zeros(1)})
    with pytest.raises(UserError, match="cannot be read"):
        load(Path("something that is not a tensor"))  # the unpickler takes tensors only
    (tmp_path / "head.pth").write_bytes(b"<html>")
    with pytest.raises(UserError, match="cannot be read"):
        AestheticPredictor(str(tmp_path / "head.pth"), clip).load()


def test_a_head_that_the_hub_does_not_give_is_named(saved, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"head='owner/name/head\.pth': no such file here, and the hub does not give it"
    ):
        AestheticPredictor("owner/name/head.pth", CLIPEmbedder(str(saved / "clip"))).load()


@pytest.mark.parametrize(
    ("height", "width", "fits"), [(1, 300, False), (300, 1, False), (30, 5990, False), (1, 9, True)]
)
def test_a_sliver_has_no_vector_by_gme_and_says_so_before(saved, height, width, fits):
    """5990 x 30 is within the limit of 200, and past it once it is rounded to whole tokens, 5992 x 28."""
    embedder, picture = gme(saved), np.zeros((height, width, 3), np.uint8)
    assert (embedder.unfit(picture) == "") == fits
    if fits:
        assert embedder.embed_images([picture]).isfinite().all()
    else:
        assert f"{width} x {height} pixels" in embedder.unfit(picture)
        with pytest.raises(UserError, match=f"{width} x {height} pixels: .*aspect ratio"):
            embedder.embed_images([picture])


THIN = [(1, 1), (1, 90), (90, 1), (3, 60), (4, 100), (2, 400)]  # heights of 1, 3 and 4 look like channels
SLIVERS = [(1, 500), (500, 1), (2000, 1), (2, 401)]


def made(saved: Path, model: str) -> ImageTextEmbedder:
    return gme(saved) if model == "gme" else CLIPEmbedder(str(saved / model))


@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_thin_pictures_are_seen_the_right_way_round(saved, model):
    from PIL import Image
    from transformers import CLIPModel, SiglipModel

    def squashed(picture: np.ndarray) -> torch.Tensor:
        pixels = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC), np.float32)
        return torch.tensor(pixels / 127.5 - 1).permute(2, 0, 1)

    prepare, cls = {"clip": (by_hand, CLIPModel), "siglip": (squashed, SiglipModel)}[model]
    pictures = [frames(1, *size, seed=size[1])[0] for size in THIN]
    with torch.no_grad():
        network = cls.from_pretrained(saved / model).eval()
        wanted = network.get_image_features(torch.stack([prepare(picture) for picture in pictures])).pooler_output
    torch.testing.assert_close(made(saved, model).embed_images(pictures), unit(wanted), rtol=0, atol=2e-5)


def test_gme_sees_thin_pictures_as_the_enlarged_ones_that_it_makes_of_them(saved):
    """A picture of one colour has the vector of a larger one that takes as many tokens."""
    colour = np.array([200, 40, 90], np.uint8)
    for thin, full in (((1, 1), (56, 56)), ((1, 4), (28, 112)), ((3, 12), (28, 112)), ((4, 1), (112, 28))):
        pictures = [np.broadcast_to(colour, (*size, 3)).copy() for size in (thin, full)]
        first, second = gme(saved).embed_images(pictures)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["clip", "siglip", "gme"])
def test_slivers_have_no_vector_nor_have_grey_pictures_and_those_with_alpha(saved, model):
    embedder = made(saved, model)
    for size in SLIVERS:
        picture = frames(1, *size)[0]
        assert f"{size[1]} x {size[0]} pixels: its aspect ratio is more than 200" in embedder.unfit(picture)
        with pytest.raises(UserError, match="aspect ratio"):
            embedder.embed_images([frames(1)[0], picture])
    for odd in (frames(1)[0, ..., 0], frames(1)[0, ..., :1], np.concatenate([frames(1)[0]] * 2, -1)[..., :4]):
        assert embedder.unfit(odd) == f"picture: uint8 of shape {odd.shape}; must be uint8 [H, W, 3]"
        with pytest.raises(UserError, match=r"must be uint8 \[H, W, 3\]"):
            embedder.embed_images([odd])
    assert embedder.embed_images([frames(1, *size)[0] for size in THIN[:5]]).isfinite().all()


def test_a_clip_of_slivers_fails_with_the_reason(saved):
    sliver = Clip("a", frames(2, 2, 500), "a red ball")
    predictor = AestheticPredictor(str(saved / "head.pth"), CLIPEmbedder(str(saved / "clip")))
    for metric in (Aesthetics(predictor), GmeScore(gme(saved))):
        assert metric.score(sliver).reason == "picture of 500 x 2 pixels: its aspect ratio is more than 200"


def test_a_model_that_does_not_embed_both_and_wrong_settings_are_named(saved, tmp_path):
    for file in (saved / "clip").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((saved / "clip" / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config["vision_config"] | {"model_type": "clip_vision_model"}))
    with pytest.raises(UserError):
        CLIPEmbedder(str(tmp_path)).load()
    with pytest.raises(UserError, match="batch=0"):
        CLIPEmbedder(batch=0)
    with pytest.raises(UserError, match="min_tokens=9"):
        GMEEmbedder(min_tokens=9, max_tokens=4)
    with pytest.raises(UserError, match="max_length=0"):
        GMEEmbedder(max_length=0)
    with pytest.raises(UserError, match=r"float8.*did you mean"):
        GMEEmbedder(dtype="float8")
    for picture in (frames(1)[0].astype(np.float32), frames(1)[0, :, :, 0], frames(1)[0, :0]):
        with pytest.raises(UserError, match=r"must be uint8 \[H, W, 3\]"):
            CLIPEmbedder(str(saved / "clip")).embed_images([picture])


def test_recipes_can_name_the_models(saved):
    from jsonargparse import ArgumentParser

    from idc.metrics.base import VideoMetric
    from idc.metrics.qalign import QAlignRater

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=list[VideoMetric])
    clip = {"class_path": "idc.models.embedders.CLIPEmbedder", "init_args": {"path": str(saved / "clip")}}
    predictor = {"class_path": "idc.models.aesthetic.AestheticPredictor", "init_args": {"head": "a.pth", "clip": clip}}
    metrics = [
        {"class_path": "idc.metrics.Aesthetics", "init_args": {"predictor": predictor}},
        {"class_path": "idc.metrics.GmeScore", "init_args": {"embedder": clip, "frames": 8}},
        {"class_path": "idc.metrics.MotionAmplitude"},
        {
            "class_path": "idc.metrics.MotionSmoothness",
            "init_args": {"rater": {"class_path": "idc.metrics.qalign.QAlignRater", "init_args": {"task": "quality"}}},
        },
    ]
    made = parser.instantiate_classes(parser.parse_object({"metrics": metrics})).metrics
    assert [metric.name for metric in made] == ["aesthetics", "gmescore", "motion_amplitude", "motion_smoothness"]
    assert made[0].predictor.clip.path == made[1].embedder.path == str(saved / "clip")
    assert made[1].frames == 8
    assert isinstance(made[3].rater, QAlignRater)


def test_nothing_here_needs_torchvision_and_special_tokens_are_single(saved):
    embedder = gme(saved).load()
    assert all(len(embedder._ids(token)) == 1 for token in CHAT)
    assert not any(name.split(".")[0] == "torchvision" for name in sys.modules)
