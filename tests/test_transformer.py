"""The transformer against diffusers' Wan, bit for bit: also saved, checkpointed, built on meta, in WanPipeline."""

from __future__ import annotations

import pytest
import torch
from _tiny_wan import VLM_DIM, WAN, condition, inputs, randomise, run, tiny_model, tiny_wan
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from idc.errors import UserError
from idc.models.hierarchy import SubjectAttention
from idc.models.trainable import set_trainable, trainable_parameters
from idc.models.transformer import IDCrafterTransformer

ABLATIONS = {
    "full": {},
    "no_intra_subject": {"id_intra_subject": False},
    "no_inter_subject": {"id_inter_subject": False},
    "vanilla": {"id_intra_subject": False, "id_inter_subject": False},
    "no_vlm": {"id_use_vlm": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", ABLATIONS.values(), ids=ABLATIONS)
def test_untouched_blocks_leave_wan_as_it_is_bit_for_bit_with_references_present(settings, dtype):
    wan = tiny_wan().to(dtype)
    model = IDCrafterTransformer.from_wan(wan, id_layers=2, vlm_dim=VLM_DIM, **settings)
    with torch.no_grad():
        expected = run(wan)
        assert expected.abs().sum() > 0
        assert torch.equal(run(model), expected)
        assert torch.equal(run(model, condition()), expected)
        assert torch.equal(run(model, subject_cache=model.build_subject_cache(condition())), expected)


def test_disturbed_blocks_change_the_output_only_where_there_is_something_to_attend_to():
    model, wan = tiny_model(), tiny_wan()
    with torch.no_grad():
        assert torch.equal(run(model), run(wan))
        assert not torch.equal(run(model, condition()), run(wan))
        assert not torch.equal(run(model, condition(sizes=())), run(wan)), "VLM tokens alone reach the video"
        assert not torch.equal(run(model, condition(vlm_tokens=0)), run(wan)), "references alone reach the video"


def test_time_per_token_and_image_conditioning_equal_wan():
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**WAN, image_dim=8, added_kv_proj_dim=24).eval()
    model = IDCrafterTransformer.from_wan(wan, id_layers=3)
    latents, _, text = inputs()
    timestep, text = torch.rand(2, 18) * 1000, torch.randn(2, 512, 16)
    kwargs = {"encoder_hidden_states_image": torch.randn(2, 3, 8)}
    with torch.no_grad():
        assert torch.equal(
            model(latents, timestep, text, **kwargs).sample, wan(latents, timestep, text, **kwargs).sample
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_references", [False, True])
def test_gradients_equal_wans_and_gradient_checkpointing_changes_none(with_references, dtype):
    given = condition() if with_references else None
    models = tiny_wan(), tiny_model(disturb=False), tiny_model(disturb=False)
    wan, plain, checkpointed = (model.train().to(dtype) for model in models)
    checkpointed.enable_gradient_checkpointing()
    for model in (wan, plain, checkpointed):
        run(model, None if model is wan else given).square().sum().backward()
    ours = dict(plain.named_parameters())
    for name, parameter in wan.named_parameters():
        assert torch.equal(ours[name].grad, parameter.grad), name
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_checkpointed_gradients_of_disturbed_blocks_equal_plain_ones():
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.enable_gradient_checkpointing()
    for model in (plain, checkpointed):
        run(model, condition()).square().sum().backward()
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
        assert parameter.grad.abs().sum() > 0 or name == "id_subject_embedding", name


def test_from_wan_copies_the_weights():
    wan = tiny_wan()
    model = IDCrafterTransformer.from_wan(wan)
    assert model.config["id_layers"] == WAN["num_layers"], "20 by default, or what a shallower backbone has"
    with torch.no_grad():
        model.blocks[0].attn1.to_q.weight.zero_()
    assert wan.blocks[0].attn1.to_q.weight.abs().sum() > 0


def test_initial_blocks_start_from_their_layers_attention():
    model = tiny_model(disturb=False)
    for block, layer in zip(model.id_blocks, model.blocks, strict=False):
        for name, parameter in layer.attn1.named_parameters():
            assert torch.equal(block.intra_attn.get_parameter(name), parameter)
            assert torch.equal(block.inter_attn.get_parameter(name), parameter)
        assert torch.equal(block.cross_attn.to_q.weight, layer.attn2.to_q.weight)
        assert torch.equal(block.cross_attn.to_v.weight, layer.attn1.to_v.weight)
        assert block.cross_attn.to_out[0].weight.abs().sum() == block.cross_attn.to_out[0].bias.abs().sum() == 0
        assert (block.inter_gate.bias == -2).all()
        assert block.inter_gate.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit_and_the_float32_islands(tmp_path, dtype):
    tiny_wan().save_pretrained(tmp_path / "wan")
    wan = WanTransformer3DModel.from_pretrained(tmp_path / "wan", torch_dtype=dtype).eval()
    loaded = IDCrafterTransformer.from_wan_pretrained(
        str(tmp_path / "wan"), torch_dtype=dtype, id_layers=2, vlm_dim=VLM_DIM
    ).eval()
    with torch.no_grad():
        assert torch.equal(run(loaded, condition()), run(wan))
    randomise(loaded)
    loaded.save_pretrained(tmp_path / "ours")
    again = IDCrafterTransformer.from_pretrained(str(tmp_path / "ours"), torch_dtype=dtype).eval()
    third = IDCrafterTransformer.from_wan_pretrained(str(tmp_path / "ours"), torch_dtype=dtype, id_layers=1).eval()
    assert again.config == third.config
    assert again.config["id_layers"] == 2
    for name, parameter in again.named_parameters():
        island = any(part in name.split(".") for part in ("time_embedder", "scale_shift_table", "norm2"))
        assert parameter.dtype == (torch.float32 if island else dtype), name
    with torch.no_grad():
        assert torch.equal(run(again, condition()), run(loaded, condition()))
        assert torch.equal(run(third, condition()), run(loaded, condition()))


def test_loading_plain_wan_weights_with_from_pretrained_says_what_to_do(tmp_path):
    tiny_wan().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="from_wan_pretrained"):
        IDCrafterTransformer.from_pretrained(tmp_path, id_layers=2)


def test_meta_structure_then_weights_equals_from_wan(tmp_path):
    wan, expected = tiny_wan(), tiny_model(disturb=False)
    wan.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = IDCrafterTransformer.from_wan_pretrained(str(tmp_path), id_layers=2, vlm_dim=VLM_DIM)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(wan.state_dict(), strict=False)
    model.init_id_blocks(seed=0)
    model.eval()
    assert list(model.state_dict()) == list(expected.state_dict())
    with torch.no_grad():
        assert torch.equal(run(model, condition()), run(wan))


def test_from_scratch_is_finite_ignores_references_at_first_and_depends_on_the_seed_alone():
    def scratch(seed, **settings):
        with torch.device("meta"):
            model = IDCrafterTransformer(**WAN, id_layers=3, vlm_dim=VLM_DIM, **settings)
        model.init_weights(seed=seed)  # does nothing on the meta device
        model.to_empty(device="cpu")
        model.init_weights(seed=seed)
        return model

    first, again, other, fewer = scratch(0), scratch(0), scratch(1), scratch(0, id_intra_subject=False)
    states = [model.state_dict() for model in (first, again, other, fewer)]
    assert all(value.isfinite().all() for value in states[0].values())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(torch.equal(value, states[0][name]) for name, value in states[3].items()), "an ablation moves no draw"
    assert not torch.equal(states[0]["blocks.0.ffn.net.2.weight"], states[2]["blocks.0.ffn.net.2.weight"])
    with torch.no_grad():
        assert torch.equal(run(first, condition()), run(first))
    run(first.train(), condition()).sub(1).square().sum().backward()
    assert first.id_blocks[0].cross_attn.to_out[0].weight.grad.abs().sum() > 0


def test_a_model_built_directly_starts_as_its_backbone():
    torch.manual_seed(0)
    model = IDCrafterTransformer(**WAN, id_layers=2, vlm_dim=VLM_DIM).eval()
    with torch.no_grad():
        assert torch.equal(run(model, condition()), run(model))


def test_the_attention_backend_reaches_our_attention():
    model = tiny_model()
    with attention_backend("native"):  # it sets the process's as well, which this puts back
        model.set_attention_backend("_native_math")
        ours = [module for module in model.modules() if isinstance(module, SubjectAttention)]
        assert len(ours) == 6
        assert all(module.processor._attention_backend == AttentionBackendName._NATIVE_MATH for module in ours)
        assert run(model, condition()).isfinite().all()


def test_wan_pipeline_runs_on_our_transformer_as_on_wan():
    def sample(transformer):
        pipe = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=transformer,
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
        text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
        return pipe(
            prompt_embeds=text[:1],
            negative_prompt_embeds=text[1:],
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    assert torch.equal(sample(tiny_model()), sample(tiny_wan()))


# What is trained -----------------------------------------------------------------------------------------------------


def test_trainable_sets_hold_exactly_the_expected_parameters():
    model = tiny_model()
    every = {name for name, _ in model.named_parameters()}
    assert set(set_trainable(model, "full")) == every
    ours = {name for name in every if name.startswith(("id_blocks.", "id_subject_embedding", "id_vlm_projector."))}
    assert set(set_trainable(model, "id_blocks")) == ours
    with_lora = set(set_trainable(model, "id_blocks+lora", rank=4, alpha=8))
    lora = with_lora - ours
    assert with_lora >= ours
    assert len(lora) == WAN["num_layers"] * 2 * 4 * 2, "layers x attentions x projections x (A, B)"
    assert all(name.startswith("blocks.") and ".lora_" in name for name in lora)
    run(model.train(), condition()).square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == with_lora == set(trainable_parameters(model))


def test_lora_round_trips_and_starts_as_no_change(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        before = run(model, condition())
        set_trainable(model, "id_blocks+lora", rank=4, alpha=8, targets=["attn1.to_q", "ffn.net.2"])
        assert torch.equal(run(model, condition()), before)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
        changed = run(model, condition())
        model.save_lora_adapter(tmp_path)
        fresh = tiny_model()
        fresh.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
        assert not torch.equal(changed, before)
        assert torch.equal(run(fresh, condition()), changed)
        fresh.fuse_lora()
        torch.testing.assert_close(run(fresh, condition()), changed)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "id_block"}, "did you mean 'id_blocks'"),
        ({"mode": "id_blocks+lora", "rank": 0}, "rank=0"),
        ({"mode": "id_blocks+lora", "targets": ["to_qq"]}, "did you mean 'to_q'"),
    ],
)
def test_bad_trainable_settings_are_named(kwargs, message):
    with pytest.raises(UserError, match=message):
        set_trainable(tiny_model(), **kwargs)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id_layers": 4}, r"id_layers=4.*num_layers=3.*nearest valid choice is 3"),
        ({"id_layer": 2}, "did you mean 'id_layers'"),
        ({"id_cross_modal": False}, "no path is left"),
        ({"id_max_subjects": 0}, "id_max_subjects=0"),
    ],
)
def test_bad_block_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        IDCrafterTransformer.from_wan(tiny_wan(), **settings)


def test_conditions_that_do_not_fit_are_named():
    model = tiny_model()
    with pytest.raises(UserError, match="id_max_subjects=4"):
        run(model, condition(sizes=((2, 2),) * 5))
    with pytest.raises(UserError, match=r"3x4.*such as 2x4"):
        run(model, condition(sizes=((3, 4),)))
    with pytest.raises(UserError, match="1 samples for 2 videos"):
        run(model, condition(batch=1))
    with pytest.raises(UserError, match=r"expand\(2\)"):
        run(model, subject_cache=model.build_subject_cache(condition(batch=1)))
    with pytest.raises(UserError, match="vlm_dim=None"):
        run(tiny_model(vlm_dim=None), condition())
    with pytest.raises(UserError, match="no path leads"):
        run(tiny_model(id_layers=0), condition())


def test_autocast_keeps_the_cache_exact_and_small():
    model, given = tiny_model(), condition()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.build_subject_cache(given)
        assert {tensor.dtype for pair in cache.layers for tensor in pair} == {torch.bfloat16}
        assert torch.equal(run(model, subject_cache=cache), run(model, given))


def test_the_time_embedding_is_a_float32_island_under_autocast():
    model, seen = tiny_model(), []
    model.condition_embedder.time_embedder.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        run(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(model)
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])


def test_lora_is_added_to_a_structure_on_meta_under_the_same_names():
    with torch.device("meta"):
        structure = IDCrafterTransformer.from_config(tiny_model().config)
    model = tiny_model()
    for each in (structure, model):
        set_trainable(each, "id_blocks+lora", rank=4)
    assert list(structure.state_dict()) == list(model.state_dict())
    assert set(trainable_parameters(structure)) == set(trainable_parameters(model))
