"""From a recipe's settings to a model: weights are taken over, contradictions are named before a run starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from idc.errors import UserError
from idc.models.spec import IDBlocks, TransformerSpec
from idc.models.transformer import IDCrafterTransformer

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    WanTransformer3DModel(**WAN).bfloat16().save_pretrained(tmp_path / "transformer")
    return tmp_path


def test_plain_wan_weights_are_taken_over_in_float32_and_blocks_attached(wan: Path) -> None:
    spec = TransformerSpec(pretrained=str(wan), id_blocks=IDBlocks(layers=1))
    model = spec.build(text_dim=8, vlm_dim=6)
    plain = WanTransformer3DModel.from_pretrained(wan / "transformer").state_dict()
    ours = model.state_dict()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(ours[name], value.float()) for name, value in plain.items())
    assert len(model.id_blocks) == 1
    again = spec.build(text_dim=8, vlm_dim=6).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in ours.items()), "the same on every rank"


def test_a_saved_model_loads_as_it_is_and_its_blocks_cannot_be_changed(wan: Path, tmp_path: Path) -> None:
    saved = TransformerSpec(pretrained=str(wan), id_blocks=IDBlocks(layers=1)).build(text_dim=8, vlm_dim=6)
    with torch.no_grad():
        saved.id_blocks[0].cross_attn.to_out[0].weight.fill_(0.5)
    folder = tmp_path / "ours"
    saved.save_pretrained(folder)
    loaded = TransformerSpec(pretrained=str(folder), subfolder="", id_blocks=IDBlocks(layers=1)).build(8, 6)
    assert isinstance(loaded, IDCrafterTransformer)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())
    with pytest.raises(UserError, match=r"id_layers=2: .* was saved with id_layers=1"):
        TransformerSpec(pretrained=str(folder), subfolder="", id_blocks=IDBlocks(layers=2)).build(8, 6)


def test_another_text_encoders_width_is_named(wan: Path) -> None:
    with pytest.raises(UserError, match=r"text_dim=128: .* was saved with text_dim=8"):
        TransformerSpec(pretrained=str(wan), id_blocks=IDBlocks(layers=1)).build(text_dim=128, vlm_dim=None)


def drop_weights(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def cut_short(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    drop_weights(folder)
    WanTransformer3DModel(**WAN).save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def lose_a_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["blocks.0.attn1.to_q.weight"]
    save_file(tensors, file)


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{,")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_weights, r"^transformer.pretrained=.*transformer has no .safetensors"),
        (cut_short, r"^transformer.pretrained=.*cannot load a Wan transformer.*diffusion_pytorch_model.safetensors"),
        (lose_a_shard, r"^transformer.pretrained=.*00002-of-0.*required according to the checkpoint index"),
        (lose_a_tensor, r"holds no blocks.0.attn1.to_q.weight, 1 parameter missing in all"),
        (empty_config, r"its config.json has no num_layers"),
        (broken_config, r"^transformer.pretrained=.*not a valid JSON file"),
    ],
)
def test_weights_that_are_incomplete_or_broken_are_told_in_a_line(
    wan: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(wan / "transformer")
    spec = TransformerSpec(pretrained=str(wan), id_blocks=IDBlocks(layers=1))
    with pytest.raises(UserError, match=message) as error:
        spec.build(text_dim=8, vlm_dim=6)
    assert len(str(error.value).splitlines()) == 1
    if "config" in message or "JSON" in message:
        with pytest.raises(UserError, match=message):
            spec.build(text_dim=8, vlm_dim=6, device="meta")
    else:
        assert spec.build(text_dim=8, vlm_dim=6, device="meta") is not None  # the structure needs no weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 3, "id_blocks": IDBlocks(layers=4)}, r"id_blocks.layers=4: .* nearest valid choice is 3"),
        ({"id_blocks": IDBlocks(cross_modal=False)}, "joint_references=true"),
        ({"attention_head_dim": 7, "id_blocks": IDBlocks(layers=1)}, "attention_head_dim=7: must be even"),
        ({"pretrained": "./nowhere"}, "nowhere.*does not exist"),
    ],
)
def test_contradictions_are_named_before_anything_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransformerSpec(**settings)


def test_phantom_is_no_blocks_and_joint_references() -> None:
    spec = TransformerSpec(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        freq_dim=16,
        id_blocks=IDBlocks(layers=0, joint_references=True, use_vlm=False),
    )
    model = spec.build(text_dim=8, vlm_dim=6)
    assert len(model.id_blocks) == 0
    assert model.config.id_joint_references
