"""Conditioners: parity with diffusers' and transformers' own code on tiny random models, and the toy stand-ins."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from _tiny_real import save_qwen, save_umt5

from idc.errors import UserError
from idc.models.conditioners import ToyTextConditioner, UMT5Conditioner, clean_caption
from idc.models.vlm import QwenVLConditioner, ToyVLM, qwen_prompt

CAPTIONS = [
    "a red ball",
    "",
    "a blue cube and the red cat meets another ball on a green floor",
    "café &amp;amp;  x\n y",
]


# --- UMT5 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    save_umt5(root)
    return root


@pytest.mark.parametrize("max_length", [12, 64])
def test_umt5_equals_wan_pipelines_encode_prompt(wan_root, max_length):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(wan_root, subfolder="tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(wan_root, subfolder="text_encoder"),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    with torch.no_grad():
        expected, null = pipeline.encode_prompt(CAPTIONS, max_sequence_length=max_length)
    conditioner = UMT5Conditioner(str(wan_root), max_length=max_length, dtype="float32")
    text_BLD = conditioner.encode(CAPTIONS)
    assert torch.equal(text_BLD, expected)
    assert torch.equal(conditioner.encode([""]), null[:1])
    assert text_BLD.shape == (4, max_length, conditioner.dim)
    assert not text_BLD.requires_grad


def test_umt5_pads_with_zeros_and_a_caption_does_not_depend_on_its_batch(wan_root):
    conditioner = UMT5Conditioner(str(wan_root), max_length=24, dtype="float32")
    text_BLD = conditioner.encode(CAPTIONS)
    lengths = (text_BLD != 0).any(-1).sum(1).tolist()
    assert lengths[:3] == [4, 1, 15]
    for text_LD, length, caption in zip(text_BLD, lengths, CAPTIONS, strict=True):
        assert (text_LD[length:] == 0).all()
        torch.testing.assert_close(conditioner.encode([caption])[0], text_LD)


def test_umt5_keeps_its_own_precision(wan_root):
    conditioner = UMT5Conditioner(str(wan_root), max_length=8).load("cpu", torch.float32)
    assert conditioner.encode(["a cat"]).dtype == torch.bfloat16


def test_mixed_precision_around_the_encoders_changes_nothing(wan_root, vlm):
    text = UMT5Conditioner(str(wan_root), max_length=8, dtype="float32")
    expected, tokens_BLD = text.encode(CAPTIONS), vlm.encode(SAMPLE_CAPTIONS, SAMPLE_REFERENCES)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(text.encode(CAPTIONS), expected)
        assert torch.equal(vlm.encode(SAMPLE_CAPTIONS, SAMPLE_REFERENCES)[0], tokens_BLD)


def test_captions_are_cleaned_as_wan_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for caption in [
        "  a\t b\n\nc ",
        "&amp;lt;b&amp;gt;",
        "1 &amp;amp;amp;lt; 2",
        "x &amp;amp;lt; y <b>",
        "cafÃ©",
        "“quoted” ﬁne",
        "",
    ]:
        assert clean_caption(caption) == prompt_clean(caption)


@pytest.mark.parametrize("make", [UMT5Conditioner, QwenVLConditioner])
def test_missing_weights_name_the_path_and_what_it_should_hold(make, tmp_path):
    conditioner = make(str(tmp_path / "absent"))
    for action in (conditioner.load, lambda: conditioner.dim):
        with pytest.raises(UserError, match=r"absent.* does not exist; it should contain .*safetensors"):
            action()


def test_widths_are_known_without_a_network_and_checked_on_loading(wan_root, qwen_root):
    assert (UMT5Conditioner().dim, QwenVLConditioner().dim) == (4096, 3584)
    assert (UMT5Conditioner(str(wan_root)).dim, QwenVLConditioner(str(qwen_root)).dim) == (16, 32)
    for conditioner in (UMT5Conditioner(str(wan_root), dim=64), QwenVLConditioner(str(qwen_root), dim=64)):
        assert conditioner.dim == 64
        with pytest.raises(UserError, match=r"dim=64: .* are (16|32) wide"):
            conditioner.load()


def test_a_missing_tokenizer_is_named(tmp_path, wan_root):
    (tmp_path / "text_encoder").symlink_to(wan_root / "text_encoder")
    with pytest.raises(UserError, match=r"tokenizer does not exist; .*UMT5's tokenizer"):
        UMT5Conditioner(str(tmp_path)).load()


# --- Qwen2.5-VL -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen")
    save_qwen(root)
    return root


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]


SAMPLES = [
    ("a red ball meets the cat", images((60, 90), (64, 64))),
    ("", []),
    ("a cat", []),
    ("", images((100, 60))),
    ("a blue cube on a green floor", images((64, 64), (30, 200), (128, 128))),
]
SAMPLE_CAPTIONS, SAMPLE_REFERENCES = [caption for caption, _ in SAMPLES], [references for _, references in SAMPLES]


@pytest.fixture(scope="module")
def qwen(qwen_root):
    return QwenVLConditioner(str(qwen_root), max_pixels=16 * 28 * 28, dtype="float32")


def test_qwen_equals_transformers_own_processor_and_model(qwen, qwen_root):
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen2_5_VLProcessor):
        """Without the video processor, which wants torchvision."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = map(
                tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
            )
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    image_processor = Qwen2VLImageProcessorPil(max_pixels=16 * 28 * 28, min_pixels=4 * 28 * 28)
    processor = Processor(image_processor, AutoTokenizer.from_pretrained(qwen_root))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_root).eval()
    tokens_BLD, mask_BL = qwen.encode(SAMPLE_CAPTIONS, SAMPLE_REFERENCES)
    assert tokens_BLD.shape[2] == qwen.dim == 32
    for (caption, references), tokens_LD, mask_L in zip(SAMPLES, tokens_BLD, mask_BL, strict=True):
        head, body = qwen_prompt(caption, len(references))
        pictures = [
            Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for image in references
        ]
        inputs = processor(images=pictures or None, text=[head + body], return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        skipped = len(processor.tokenizer(head).input_ids)
        torch.testing.assert_close(tokens_LD[mask_L], states[skipped:])


def test_qwen_image_tokens_have_two_dimensional_positions(qwen):
    """The same pixels in another arrangement must not look the same to the model."""
    qwen.load()
    inputs, _ = qwen.inputs("a cat", images((56, 112)))
    assert inputs["mm_token_type_ids"].sum() == 2 * 4
    positions, _ = qwen._model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    image = positions[:, 0, inputs["mm_token_type_ids"][0].bool()]
    assert (image[1].unique().numel(), image[2].unique().numel()) == (2, 4)


@pytest.mark.parametrize("area", [4, 9])
def test_qwen_caps_the_tokens_of_a_reference(qwen_root, area):
    conditioner = QwenVLConditioner(str(qwen_root), max_pixels=area * 28 * 28, dtype="float32").load()
    inputs, _ = conditioner.inputs("", images((500, 400)))
    assert 1 <= inputs["mm_token_type_ids"].sum() <= area


def test_qwen_takes_slivers_too(qwen):
    """What training may meet: its processor refuses more than 200 to 1."""
    tokens_BLD, mask_BL = qwen.encode(["a rope"] * 3, [images((16, 3216)), images((3216, 16)), images((1, 200))])
    assert mask_BL.any(1).all()
    assert tokens_BLD.isfinite().all()


def test_qwen_references_matter_and_so_does_their_order(qwen):
    first, second = images((64, 64), (64, 64))
    pairs = [[first, second], [second, first], [first, first]]
    tokens_BLD, mask_BL = qwen.encode(["a cat"] * 3, pairs)
    assert mask_BL.all()
    assert not torch.allclose(tokens_BLD[0], tokens_BLD[1], atol=1e-4)
    assert not torch.allclose(tokens_BLD[0, -1], tokens_BLD[2, -1], atol=1e-6)


def test_qwen_reads_checkpoints_in_the_hubs_older_layout(qwen, qwen_root, tmp_path):
    """The published weights name the towers `visual.` and `model.layers.`, from before transformers renamed them."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(qwen_root, tmp_path, dirs_exist_ok=True)
    weights = load_file(qwen_root / "model.safetensors")
    older = {k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v.clone()
             for k, v in weights.items()}  # fmt: skip
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old = QwenVLConditioner(str(tmp_path), max_pixels=16 * 28 * 28, dtype="float32")
    for ours, theirs in zip(
        old.encode(*zip(SAMPLES[0], strict=True)), qwen.encode(*zip(SAMPLES[0], strict=True)), strict=True
    ):
        assert torch.equal(ours, theirs)


# --- what every VLM conditioner holds to ------------------------------------------------------------------------------


@pytest.fixture(params=["qwen", "toy"])
def vlm(request):
    return ToyVLM(dim=32) if request.param == "toy" else request.getfixturevalue("qwen")


def test_vlm_samples_do_not_depend_on_their_batch(vlm):
    tokens_BLD, mask_BL = vlm.encode(SAMPLE_CAPTIONS, SAMPLE_REFERENCES)
    assert mask_BL.dtype == torch.bool
    assert mask_BL.any(1).all(), "the null variants have tokens too"
    assert (mask_BL.int().diff(dim=1) <= 0).all(), "padding is on the right"
    assert (tokens_BLD[~mask_BL] == 0).all()
    assert not tokens_BLD.requires_grad
    for (caption, references), tokens_LD, mask_L in zip(SAMPLES, tokens_BLD, mask_BL, strict=True):
        alone_BLD, alone_BL = vlm.encode([caption], [references])
        assert alone_BL.all()
        assert torch.equal(alone_BLD[0], tokens_LD[mask_L])


def test_vlm_refuses_what_does_not_fit(vlm):
    with pytest.raises(UserError, match="2 captions but 1 lists"):
        vlm.encode(["a", "b"], [[]])
    with pytest.raises(UserError, match=r"must be \[3, H, W\]"):
        vlm.encode(["a"], [[torch.zeros(1, 3, 8, 8)]])


# --- toys -----------------------------------------------------------------------------------------------------------


def test_toy_text_is_zero_padded_batch_independent_and_takes_any_word():
    text = ToyTextConditioner(dim=32, max_length=12)
    captions = ["a red ball", "", "zyzzyva Ωmega, 3 blåbær!", "a red ball " * 20]
    text_BLD = text.encode(captions)
    assert text_BLD.shape == (4, 12, 32)
    assert [(row != 0).any(-1).sum().item() for row in text_BLD] == [4, 1, 7, 12]
    for row, caption in zip(text_BLD, captions, strict=True):
        assert torch.equal(text.encode([caption])[0], row)


def test_toy_text_binds_adjectives_to_their_nouns():
    text = ToyTextConditioner()
    one, other = text.encode(["a red ball and a blue cube", "a blue ball and a red cube"])
    # The nouns stand at the same places and differ only in what stands before them.
    for place in (2, 6):
        assert (one[place] - other[place]).square().mean() > 0.1


def test_toy_text_tokens_have_about_unit_variance():
    tokens = ToyTextConditioner(max_length=64).tokens(" ".join(f"word{i}" for i in range(60)))
    assert tokens.square().mean().item() == pytest.approx(1, abs=0.1)


def test_toy_encoders_are_the_same_in_another_process():
    code = (
        "import torch; from idc.models.conditioners import ToyTextConditioner as T;"
        "from idc.models.vlm import ToyVLM as V;"
        "image = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8);"
        "print(T().encode(['a red ball']).double().sum().item(), T().fingerprint, V().fingerprint,"
        "V().encode(['a cat'], [[image]])[0].double().sum().item())"
    )
    image = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8)
    here = (
        f"{ToyTextConditioner().encode(['a red ball']).double().sum().item()} {ToyTextConditioner().fingerprint} "
        f"{ToyVLM().fingerprint} {ToyVLM().encode(['a cat'], [[image]])[0].double().sum().item()}"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == here


def test_toy_vlm_tells_colours_and_subjects_apart():
    red, blue = (torch.tensor(c).view(3, 1, 1).expand(3, 40, 56) for c in ([1.0, -1, -1], [-1.0, -1, 1]))
    tokens_BLD, mask_BL = ToyVLM().encode(["a cat"] * 3, [[red, blue], [blue, red], [red]])
    assert mask_BL.sum(1).tolist() == [11, 11, 7]
    assert torch.equal(tokens_BLD[0, :4], tokens_BLD[2, :4]), "a reference's tokens do not depend on later ones"
    assert torch.equal(tokens_BLD[0, 8:], tokens_BLD[2, 4:7]), "words follow"
    assert (tokens_BLD[0, :4] - tokens_BLD[1, :4]).square().mean() > 0.1, "colour"
    assert (tokens_BLD[0, :4] - tokens_BLD[1, 4:8]).square().mean() > 0.1, "index of the subject"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ToyTextConditioner(dim=33),
        lambda: ToyTextConditioner(max_length=0),
        lambda: ToyVLM(grid=0),
        lambda: UMT5Conditioner(max_length=0),
        lambda: QwenVLConditioner(min_pixels=10, max_pixels=5),
        lambda: QwenVLConditioner(dtype="half"),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(UserError, match=r"=\S+: "):
        make()


def test_fingerprints_follow_every_setting(wan_root, qwen_root):
    toys = [ToyTextConditioner(**kwargs) for kwargs in ({}, {"dim": 64}, {"context": 1}, {"max_length": 9})]
    toy_vlms = [ToyVLM(**kwargs) for kwargs in ({}, {"dim": 64}, {"grid": 3}, {"max_words": 9})]
    umt5 = [
        UMT5Conditioner(**kwargs) for kwargs in ({}, {"path": str(wan_root)}, {"max_length": 226}, {"dtype": "float32"})
    ]
    qwen = [QwenVLConditioner(**kwargs) for kwargs in ({}, {"path": str(qwen_root)}, {"max_pixels": 9 * 28 * 28})]
    conditioners = [*toys, *toy_vlms, *umt5, *qwen]
    assert len({conditioner.fingerprint for conditioner in conditioners}) == len(conditioners)
    loaded = UMT5Conditioner(str(wan_root))
    before = loaded.fingerprint
    assert loaded.load("cpu", torch.float32).fingerprint == before
