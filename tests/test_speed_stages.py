"""The settings of speed where stages and samplers apply them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from test_editing import make_sample, make_sampler
from test_sft_loss import make_batch, make_stage

from idc.errors import UserError
from idc.models.attention import NATIVE
from idc.models.conditioning import Drop
from idc.models.rounding import round_matrices
from idc.models.sampling import FEW_TOKENS, Sampling
from idc.models.spec import Lora
from idc.models.speed import Speed
from idc.models.system import _parsed
from idc.models.toy_codec import CosineCodec
from idc.stages.speed import apply_speed
from idc.types import Bucket

SAMPLING = Sampling(steps=3, scale=2.5)


def strategy(rank_0: bool = True, told: Any = None) -> Any:
    """What `apply_speed` needs of one: its rank, and what rank 0 broadcasts (`told` to others)."""
    return SimpleNamespace(
        root_device=torch.device("cpu"),
        is_global_zero=rank_0,
        broadcast=lambda mine: mine if rank_0 else told,
    )


# Guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_video_with_its_guidance_in_one_batch_is_the_video(rescale: float) -> None:
    """Two samples of different references; float32's rounding over three steps, below half of one of 255."""
    two = make_sampler(CosineCodec())
    sample, _ = make_sample()
    samples = [sample, replace(sample, id="t", subjects=sample.subjects[:1])]
    bucket, seeds_B = Bucket(5, 32, 32, 2), torch.tensor([3, 4])
    calls: list[int] = []
    two.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(_rows(kwargs)), with_kwargs=True
    )
    sampling = replace(SAMPLING, rescale=rescale)
    plain = two.videos(samples, bucket, seeds_B, sampling)
    assert [rows for rows in calls if rows] == [2] * 6
    calls.clear()
    batched = replace(two, batch_guidance=True).videos(samples, bucket, seeds_B, sampling)
    assert [rows for rows in calls if rows] == [4] * 3
    assert (batched - plain).abs().max() * 127.5 < 0.5
    assert not torch.allclose(plain[0], plain[1], atol=0.1)


def _rows(arguments: dict[str, Any]) -> int:
    latents = arguments.get("hidden_states")
    return 0 if latents is None else latents.shape[0]


def test_auto_batches_guidance_where_a_forward_is_small_on_a_gpu_and_never_on_the_cpu() -> None:
    sampler = replace(make_sampler(CosineCodec()), batch_guidance="auto")
    small, large = (16, 3, 8, 8), (16, 21, 60, 104)
    assert 21 * 30 * 52 > FEW_TOKENS > 3 * 4 * 4
    assert not sampler._batches_guidance(1, small)
    cuda = replace(sampler, device=torch.device("cuda"))
    assert cuda._batches_guidance(1, small)
    assert not cuda._batches_guidance(FEW_TOKENS, small)
    assert not cuda._batches_guidance(1, large)
    assert replace(sampler, batch_guidance=True)._batches_guidance(1, large)


# Stages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["attention", "full"])
def test_a_stage_trains_alike_whatever_it_recomputes(mode: Any) -> None:
    losses, norms = [], []
    for speed in (Speed(), Speed(checkpointing=mode)):
        stage = make_stage()
        stage.speed, stage.transformer, rest = speed, None, stage.transformer.state_dict()
        stage.configure_model()
        assert stage.transformer is not None
        stage.transformer.load_state_dict(rest)
        assert stage.speed_chosen["checkpointing"] == speed.checkpointing
        assert stage.speed_chosen["attention"] == "native"
        batch = make_batch(4)
        features = stage.encoders.features(batch.samples)
        stage.transformer.train()
        loss = stage.losses(features, batch.seeds_B, torch.full((4,), 0.5), Drop.NOTHING).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append([p.grad.norm().item() for p in stage.transformer.parameters() if p.grad is not None])
    assert losses[0] == losses[1]
    assert norms[0] == norms[1]


def test_a_stage_starts_alike_whatever_the_default_device_is() -> None:
    """Lightning has the GPU for one under some strategies and not under others: what adapters draw must not differ."""
    starts = []
    for device in ("cpu", "meta"):
        stage = make_stage()
        stage.transformer, stage.trainable_set, stage.lora = None, "lora", Lora(rank=2, alpha=4)
        torch.manual_seed(0)
        with torch.device(device):
            stage.configure_model()
        assert stage.transformer is not None
        starts.append(stage.transformer.state_dict())
    assert starts[0].keys() == starts[1].keys()
    assert any("lora_A" in name for name in starts[0])
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_all_ranks_take_the_choice_of_rank_0_and_its_refusal() -> None:
    model = make_sampler(CosineCodec()).transformer
    assert apply_speed(model, Speed(), None, torch.float32, training=True)["attention"] == "native"
    assert model.blocks[0].attn1.processor._attention_backend is NATIVE
    speed = Speed(checkpointing="full")
    both = "_native_math", "_native_flash"
    told = apply_speed(model, speed, strategy(False, (both, None)), torch.float32, training=True)
    assert told["attention"] == "_native_math" == model.blocks[0].attn1.processor._attention_backend.value
    assert told["attention_of_subjects"] == "_native_flash"
    assert model.id_blocks[0].cross_attn.processor._attention_backend.value == "_native_flash"
    assert model.gradient_checkpointing
    assert apply_speed(model, speed, strategy(), torch.float32, training=False)["checkpointing"] == "none"
    assert not model.gradient_checkpointing
    with pytest.raises(UserError, match="rank 0 said so"):
        apply_speed(model, Speed(), strategy(False, (both, "rank 0 said so")), torch.float32, training=True)
    with pytest.raises(UserError, match="auto and native run everywhere"):
        apply_speed(model, Speed(attention="sage"), strategy(), torch.bfloat16, training=True)


def test_the_precision_of_float32_products_is_set_and_named() -> None:
    model, before = make_sampler(CosineCodec()).transformer, torch.get_float32_matmul_precision()
    try:
        chosen = apply_speed(model, Speed(matmul_precision="high"), None, torch.float32, training=False)
        assert chosen["matmul_precision"] == torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_run_from_before_these_settings_is_understood() -> None:
    old = {"transformer": {"gradient_checkpointing": True, "attention_backend": None, "num_layers": 40}}
    parts = _parsed(old)
    assert parts.speed == Speed(checkpointing="full")
    assert parts.transformer is not None
    assert parts.transformer.num_layers == 40
    old["transformer"] |= {"gradient_checkpointing": False, "attention_backend": "_native_math"}
    assert _parsed(old).speed == Speed(attention="_native_math")
    assert _parsed({"transformer": {"num_layers": 40}}).speed is None


def test_recipes_write_these_settings() -> None:
    recipes = Path(__file__).parent.parent / "recipes"
    found = {}
    for layer in ("scale", "hardware"):
        for path in (recipes / layer).glob("*.yaml"):
            written = yaml.safe_load(path.read_text()).get("model", {}).get("init_args", {}).get("speed")
            if written is not None:
                found[path.stem] = Speed(**written)
    hardware = {"one_gpu", "fsdp", "hsdp", "sequence_parallel", "deepspeed", "deepspeed_zero3"}
    assert found.keys() == {"wan1.3b", "wan14b"} | hardware
    assert [name for name, speed in found.items() if not speed.compile] == ["wan1.3b", "wan14b"]


# Weights that are rounded once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_a_video_of_weights_that_are_rounded_once_is_that_of_autocast_to_the_bit(batched: bool) -> None:
    """References of two sizes, VLM tokens and guidance; what stays in float32 is no linear layer's."""
    sampler = replace(make_sampler(CosineCodec()), dtype=torch.bfloat16, batch_guidance=batched)
    model, (sample, _) = sampler.transformer, make_sample()
    samples = [sample, replace(sample, id="t", subjects=sample.subjects[:1])]
    given = samples, Bucket(5, 32, 32, 2), torch.tensor([3, 4]), SAMPLING
    before, bytes_before = sampler.videos(*given), weight_bytes(model)
    assert not torch.equal(replace(sampler, dtype=torch.float32).videos(*given), before)
    round_matrices(model, torch.float32)
    assert weight_bytes(model) == bytes_before
    round_matrices(model)
    assert weight_bytes(model) < 0.65 * bytes_before  # the embeddings are a large part of so small a model
    assert torch.equal(sampler.videos(*given), before)


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
