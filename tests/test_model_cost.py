"""Parameter and operation counts: by formula, as torch counts them on real runs, and as in the table of Wan's facts."""

from __future__ import annotations

import math

import pytest
import torch
from _tiny_wan import VLM_DIM, WAN, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from idc.errors import UserError
from idc.models.cost import forward_flops, step_flops
from idc.models.transformer import IDCrafterTransformer
from idc.types import Condition

SCALES = {
    "1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
CASES = {
    "full": {},
    "no_intra": {"id_intra_subject": False},
    "no_inter": {"id_inter_subject": False},
    "vanilla": {"id_intra_subject": False, "id_inter_subject": False},
    "no_vlm": {"id_use_vlm": False},
    "joint": {"id_joint_references": True},
    "no_cross_modal": {"id_cross_modal": False, "id_joint_references": True},
    "phantom": {"id_layers": 0, "id_joint_references": True},
}


def structure(scale: str) -> IDCrafterTransformer:
    with torch.device("meta"):
        return IDCrafterTransformer(**SCALES[scale], vlm_dim=3584)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("scale", "backbone", "blocks", "projector"),
    [("1.3b", 1_418_996_800, 614_246_400, 7_874_560), ("14b", 14_288_491_584, 6_818_508_800, 44_581_888)],
)
def test_parameters_at_the_papers_scales(scale, backbone, blocks, projector):
    model = structure(scale)
    embedding = 4 * model.config["num_attention_heads"] * 128
    assert count(model.id_blocks) == blocks
    assert count(model.id_vlm_projector) == projector
    assert count(model) == backbone + blocks + projector + embedding


@pytest.mark.parametrize(("scale", "plain", "with_blocks"), [("1.3b", 283, 318), ("14b", 1678, 1881)])
def test_operations_at_480p_are_those_of_the_table(scale, plain, with_blocks):
    config = structure(scale).config
    assert round(forward_flops(config, 81, 480, 832) / 1e12) == plain
    full = forward_flops(config, 81, 480, 832, subject_tokens=(1560,) * 3, vlm_tokens=512)
    assert round(full / 1e12) == with_blocks


@pytest.mark.parametrize(
    ("tokens", "cached", "joint", "overhead"),
    [(1560, False, False, 0.123), (1024, False, False, 0.089), (1024, True, False, 0.073), (1560, False, True, 0.257)],
)
def test_overheads_at_1_3b_are_those_of_the_table(tokens, cached, joint, overhead):
    config = {**structure("1.3b").config}
    if joint:
        config.update(id_layers=0, id_joint_references=True)
    plain = forward_flops(config, 81, 480, 832)
    full = forward_flops(config, 81, 480, 832, subject_tokens=(tokens,) * 3, vlm_tokens=512, cached=cached)
    assert round(full / plain - 1, 3) == overhead


def counted(model: IDCrafterTransformer, grids, vlm_tokens: int, cached: bool) -> int:
    """Operations of one forward for 9 frames of 48x32 pixels and 5 text tokens, as torch counts them."""
    given = Condition(
        text_BLD=torch.randn(1, 5, 16),
        references=tuple(torch.randn(1, 4, 2 * h, 2 * w) for h, w in grids),
        vlm_BLD=torch.randn(1, vlm_tokens, VLM_DIM) if vlm_tokens else None,
    )
    # The fused CPU kernel of attention is not counted by torch; its plain form is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        kwargs = {"subject_cache": model.build_subject_cache(given)} if cached else {"condition": given}
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 4, 3, 4, 6), torch.tensor([500.0]), given.text_BLD, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("grids", "vlm_tokens"), [((), 0), ((), 7), (((2, 2),), 0), (((2, 2), (1, 3)), 7), (((2, 2), (1, 3), (3, 1)), 7)]
)
def test_the_formula_equals_torchs_count_exactly(settings, grids, vlm_tokens):
    model = tiny_model(**settings)
    arguments = {
        "frames": 9,
        "height": 32,
        "width": 48,
        "text_tokens": 5,
        "subject_tokens": tuple(math.prod(grid) for grid in grids),
        "vlm_tokens": vlm_tokens,
    }
    assert counted(model, grids, vlm_tokens, False) == forward_flops(model.config, **arguments)
    if not model.config["id_joint_references"]:
        assert counted(model, grids, vlm_tokens, True) == forward_flops(model.config, **arguments, cached=True)


def test_the_formula_takes_a_plain_wan_config_and_checks_sizes():
    wan = {**WAN, "patch_size": (1, 2, 2)}
    assert forward_flops(wan, 9, 32, 48) == forward_flops(tiny_model().config, 9, 32, 48)
    with pytest.raises(UserError, match="frames=8"):
        forward_flops(wan, 8, 32, 48)
    with pytest.raises(UserError, match="width=40"):
        forward_flops(wan, 9, 32, 40)


def test_what_is_computed_again_holds_the_blocks_reading_of_the_vlm_and_not_its_projector():
    model = tiny_model().train()
    tokens, video, dim = 400, 4, WAN["num_attention_heads"] * WAN["attention_head_dim"]  # the rest is small beside them
    latents, text = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 5, WAN["text_dim"])
    given = Condition(text, references=(torch.randn(1, 4, 4, 6),), vlm_BLD=torch.randn(1, tokens, VLM_DIM))

    def counted_with(kind):
        model.run_layers(kind)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(latents, torch.tensor([500.0]), text, given).sample.square().sum().backward()
        return counter.get_total_flops()

    def planned(kind, vlm_tokens):
        return step_flops(model.config, 1, 32, 32, 5, (6,), vlm_tokens, checkpointing=kind).recomputed

    assert counted_with("full") - counted_with("none") == pytest.approx(planned("full", tokens), rel=0.05)
    layers = model.config["id_layers"]
    keys_values, attention = layers * 4 * tokens * dim**2, layers * 4 * video * tokens * dim
    assert planned("full", tokens) - planned("full", 0) == keys_values + attention
    assert planned("attention", tokens) - planned("attention", 0) == keys_values
