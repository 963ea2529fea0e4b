"""`idc plan`: memory against real steps, operations against torch's count, recipes, advice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _tiny_wan import VLM_DIM, WAN, inputs, tiny_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from idc.cli import main
from idc.errors import UserError
from idc.models.conditioners import ToyTextConditioner
from idc.models.conditioning import Drop, Encoders
from idc.models.cost import forward_flops, step_flops
from idc.models.sequence_parallel import check_heads, spread_over
from idc.models.toy_codec import CosineCodec
from idc.models.trainable import set_trainable
from idc.models.transformer import IDCrafterTransformer
from idc.models.vlm import ToyVLM
from idc.plan import cuda
from idc.plan import trace as tracing
from idc.plan.devices import DEVICES, device
from idc.plan.encoders import PUBLISHED, cached_bytes
from idc.plan.memory import memory, optimiser_of
from idc.plan.model import Parameters
from idc.plan.recipe import Layout, _layout, read
from idc.plan.start import is_there, stand_in
from idc.plan.trace import Passed, Storages, trace
from idc.plan.work import seconds, sequence_bytes
from idc.stages.dpo import DPO
from idc.stages.sharding import check_sizes
from idc.types import Bucket, Condition

MODES = ("none", "attention", "full")


def make(
    layers: int, id_layers: int, checkpointing: str = "none", on: str = "cpu", apart: bool = False, **settings: Any
) -> nn.Module:
    with torch.device(on):
        model = IDCrafterTransformer(
            **{**WAN, "attention_head_dim": 24, "num_layers": layers, **settings}, id_layers=id_layers, vlm_dim=VLM_DIM
        )
    model.run_layers(checkpointing, apart=apart)
    return model.train()


def loss_of(batch: int, frames: int, grids: tuple[tuple[int, int], ...], bf16: bool = False):
    """A forward pass at latents of `frames` x 8 x 12 and its error."""

    def loss(model: Any) -> Tensor:
        x = torch.randn(batch, 4, frames, 8, 12)
        given = Condition(
            text_BLD=torch.randn(batch, 5, 16),
            references=tuple(torch.randn(batch, 4, 2 * h, 2 * w) for h, w in grids) if len(model.id_blocks) else (),
            vlm_BLD=torch.randn(batch, 7, VLM_DIM),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            velocity = model(x, torch.rand(batch), given.text_BLD, given, return_dict=False)[0]
        return (velocity.float() - x).square().mean()

    return loss


SIZES = [(1, 3, ((2, 2),)), (2, 6, ((2, 2), (3, 1), (4, 4)))]


@cache
def traced(size: int, checkpointing: str = "none", bf16: bool = False) -> Passed:
    """Of three layers with two blocks."""
    loss = loss_of(*SIZES[size], bf16=bf16)
    return trace(lambda layers, ids: make(layers, ids, checkpointing, on="meta"), 3, 2, loss)


@pytest.mark.parametrize(("size", "bf16"), [(1, False), (0, True)], ids=["float32", "bfloat16"])
def test_kept_activations_are_what_autograd_saves(size, bf16):
    loss = loss_of(*SIZES[size], bf16=bf16)
    model = make(3, 2)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = loss(model)
    predicted = traced(size, bf16=bf16)
    assert held.requires_grad
    assert predicted.kept + predicted.kept_copies == pytest.approx(sum(saved.values()), rel=0.01)
    assert (predicted.kept_copies > 0) == bf16


@pytest.mark.parametrize(("checkpointing", "size"), list(zip(MODES, (1, 1, 0), strict=True)))
def test_the_peak_is_that_of_the_allocator(checkpointing, size):
    loss = loss_of(*SIZES[size])
    model = make(3, 2, checkpointing)
    loss(model).backward()  # gradients of an earlier pass, to which the measured one adds
    allocated = allocations(lambda: loss(model).backward())
    predicted = traced(size, checkpointing)
    assert predicted.peak == pytest.approx(allocated, rel=0.1)


def allocations(run) -> int:
    """The most bytes that the CPU's allocator gave out at a time, as torch's profiler saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = most = 0
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(("checkpointing", "bf16", "layers", "ids"), [("attention", True, 4, 2), ("full", False, 4, 0)])
def test_a_few_layers_tell_all(checkpointing, bf16, layers, ids, monkeypatch):
    loss = loss_of(1, 2, ((2, 2), (1, 2)), bf16)

    def build(layers: int, ids: int) -> nn.Module:
        return make(layers, ids, checkpointing, on="meta")

    short = trace(build, layers, ids, loss)
    monkeypatch.setattr(tracing, "_DEPTH", 99)
    whole = trace(build, layers, ids, loss)
    assert (short.kept, short.kept_copies, short.backward) == (whole.kept, whole.kept_copies, whole.backward)
    assert short.forward == pytest.approx(whole.forward, rel=0.01)


class Met(TorchFunctionMode):
    """Functions that CUDA's autocast and the CPU's treat otherwise, called with other than one float32."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        floats = {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()}
        if torch.is_autocast_enabled("cpu") and floats != {torch.float32} and _is_told_apart(name):
            self.found.setdefault(name, set()).update(floats)
        return func(*args, **(kwargs or {}))


@cache
def _autocast(key: str) -> frozenset[str]:
    every = torch._C._dispatch_get_all_op_names()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name[6:].partition(".")[0] for name in every if name.startswith("aten::") and has(name, key))


def _is_told_apart(name: str) -> bool:
    return (name in _autocast("AutocastCUDA")) != (name in _autocast("AutocastCPU"))


@pytest.mark.parametrize("settings", [{}, {"id_joint_references": True}])
def test_of_what_the_two_autocasts_treat_otherwise_the_model_meets_rms_norm_alone(settings):
    assert _is_told_apart("layer_norm")  # which is given float32
    with Met() as met:
        loss_of(*SIZES[1], bf16=True)(make(3, 2, **settings))
    met.found.pop("cat")  # on CUDA it takes two types without making them one first: a moment's bytes, of references
    rms_norm = {"rms_norm": {torch.bfloat16, torch.float32}}  # tokens and weights
    assert met.found == (rms_norm if cuda.IN_FLOAT32 else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_on_cuda_keeps_its_input_in_float32_and_a_number_a_row(dtype, monkeypatch):
    rows, width = 5, 16

    def held() -> int:
        with tracing._without_content(), Storages() as storages:
            norm, x = nn.RMSNorm(width), torch.empty(rows, width, dtype=dtype, requires_grad=True)
            before = storages.live
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                out = norm(x)
            result = storages.live - before - out.nbytes
            out.sum().backward()
            assert x.grad.dtype == dtype
            assert norm.weight.grad.shape == (width,)
            return result

    composed = held()
    with cuda.as_on_cuda():
        monkeypatch.setattr(cuda, "IN_FLOAT32", True)
        fused = held()
        monkeypatch.setattr(cuda, "IN_FLOAT32", False)
        before_2_12 = held()
    # The input itself where it is float32, else a copy.
    assert fused == rows * 4 + (0 if dtype is torch.float32 else rows * width * 4)
    assert before_2_12 == (fused if dtype is torch.float32 else composed)
    assert fused < composed == held()  # as before


@pytest.mark.parametrize("checkpointing", MODES)
def test_a_gpu_keeps_less_of_norms_than_this_cpu(checkpointing, monkeypatch):
    monkeypatch.setattr(cuda, "IN_FLOAT32", True)

    def passed(on_gpu: bool) -> Passed:
        build = partial(make, checkpointing=checkpointing, on="meta")
        return trace(build, 3, 2, loss_of(*SIZES[1], bf16=True), on_gpu)

    cpu, gpu = passed(False), passed(True)
    assert 0.7 * cpu.peak < gpu.peak < cpu.peak
    assert (gpu.kept < cpu.kept) == (checkpointing == "none")
    assert gpu.kept_copies == cpu.kept_copies


def test_checkpointing_keeps_less_and_attention_outputs_are_what_it_may_keep():
    none, attention, full = (traced(1, kind) for kind in MODES)
    assert none.kept > attention.kept > full.kept
    video, width = 6 * 4 * 6, 48
    # Two attentions a layer and stage 3's over the video, and one number a query and head beside them.
    at_least = 2 * video * (3 * 2 + 2) * width * 4
    assert at_least < attention.kept - full.kept < 1.5 * at_least


def test_blocks_that_are_compiled_and_sharded_keep_what_goes_from_one_to_the_next():
    loss = loss_of(*SIZES[1])

    def kept(checkpointing: str, apart: bool) -> int:
        return trace(lambda layers, ids: make(layers, ids, checkpointing, "meta", apart), 3, 2, loss).kept

    video, width = 6 * 4 * 6, 48
    more = kept("attention", True) - kept("attention", False)
    assert more == pytest.approx(2 * (2 * video * width * 4), rel=0.1)  # of two layers
    assert kept("full", True) == kept("full", False)


@pytest.mark.parametrize("settings", [{}, {"id_joint_references": True}, {"id_inter_subject": False}])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_operations_of_a_step_are_those_that_torch_counts(settings, checkpointing):
    model: Any = tiny_model(**settings).train()
    model.run_layers(checkpointing)
    latents, timestep, text = inputs(1)
    grids = ((2, 2), (1, 3))
    given = Condition(
        text_BLD=text,
        references=tuple(torch.randn(1, 4, 2 * h, 2 * w) for h, w in grids),
        vlm_BLD=torch.randn(1, 7, VLM_DIM),
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, timestep, text, given).sample.square().sum().backward()
    sizes = (9, 32, 48, 5, tuple(math.prod(grid) for grid in grids), 7)
    planned = step_flops(model.config, *sizes, checkpointing=checkpointing)
    assert planned.forward == forward_flops(model.config, *sizes)
    # Recomputation stops where nothing more is needed: up to one product short of a layer.
    assert counter.get_total_flops() == pytest.approx(planned.total, rel=0 if checkpointing == "none" else 0.05)


@pytest.mark.parametrize("trainable", ["id_blocks", "lora", "id_blocks+lora"])
def test_operations_with_frozen_weights_are_near_torchs_count(trainable):
    model: Any = tiny_model().train()
    set_trainable(model, trainable, rank=1)
    latents, timestep, text = inputs(1)
    given = Condition(text_BLD=text, references=(torch.randn(1, 4, 4, 4),), vlm_BLD=torch.randn(1, 7, VLM_DIM))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, timestep, text, given).sample.square().sum().backward()
    planned = step_flops(model.config, 9, 32, 48, 5, (4,), 7, trainable=trainable)
    # Adapters themselves are not counted, and are large beside a width of 24.
    assert counter.get_total_flops() == pytest.approx(planned.total, rel=0.02 if trainable == "id_blocks" else 0.25)


@pytest.mark.parametrize(("kind", "ratio"), [("none", 3), ("full", 4), ("attention", 3.3)])
def test_a_step_of_1_3b_costs_what_the_facts_say(kind, ratio):
    config = {
        **{"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960},
        **{"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256},
        **{"id_layers": 20, "id_intra_subject": True, "id_inter_subject": True, "id_cross_modal": True},
        **{"id_use_vlm": True, "vlm_dim": 3584},
    }
    step = step_flops(config, 81, 480, 832, subject_tokens=(1560,) * 3, vlm_tokens=512, checkpointing=kind)
    assert step.total / step.forward == pytest.approx(ratio, rel=0.01)


# Sums ---------------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_states_are_those_of_a_real_step():
    model = make(3, 2)
    factory = torch.optim.AdamW
    optimizer = factory(model.parameters())
    loss_of(*SIZES[0])(model).backward()
    optimizer.step()
    numel = sum(p.numel() for p in model.parameters())
    found = memory(Parameters({"all": (numel, numel)}, 1, 1), Passed(0, 0, 0, 0), optimiser_of(factory), Layout())
    states = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert found.parts == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimiser states": sum(v.nbytes for v in states),
    }


def test_optimisers_are_told_apart_by_their_states():
    assert optimiser_of(torch.optim.AdamW).states == 8
    assert optimiser_of(lambda p: torch.optim.SGD(p, lr=0.1)).states == 0
    assert optimiser_of(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)).states == 4
    assert optimiser_of(torch.optim.AdamW).step == 0  # fused, as fit makes it on a GPU
    assert optimiser_of(lambda p: torch.optim.AdamW(p, foreach=True)).step == 4
    assert optimiser_of(lambda p: torch.optim.AdamW(p, fused=True)).step == 0
    assert optimiser_of(torch.optim.AdamW, on_gpu=False).step == 0


def test_sharding_divides_what_it_shards_and_nothing_else():
    parameters = Parameters({"all": (8_000, 8_000)}, 1_000, 500)
    passed = Passed(kept=1_000, kept_copies=0, forward=1_500, backward=2_000)
    optimiser = optimiser_of(torch.optim.AdamW)

    def parts(**layout: Any) -> dict[str, int]:
        return memory(parameters, passed, optimiser, Layout(**layout), average="device", on_gpu=False).parts

    one, eight = parts(), parts(strategy="fsdp", ranks=8, shards=8)
    for name in ("weights", "gradients", "optimiser states", "averages (EMA)"):
        assert eight[name] == one[name] / 8
    assert eight["activations kept"] == one["activations kept"] == 1_000
    # How much is gathered is compared with FSDP2's own in test_plan_zero.py.
    assert parts(strategy="fsdp", ranks=16, shards=16)["gathered layers"] == eight["gathered layers"]
    half = parts(strategy="fsdp", ranks=8, shards=8, gathered=torch.bfloat16)
    # Two layers' weights and one's gradients at half the bytes; gradients that are being averaged are float32.
    assert eight["gathered layers"] - half["gathered layers"] == 3 * (4 - 2) * 1_000
    spread = parts(strategy="fsdp", ranks=8, shards=8, sequence=4)
    assert spread["activations kept"] == 250
    assert spread["weights"] == eight["weights"]
    assert parts(strategy="ddp", ranks=8)["DDP's buckets of gradients"] == one["gradients"]


# Encoders, cache, devices -------------------------------------------------------------------------------------------


def test_published_encoders_have_the_parameters_of_their_structures():
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        vae = AutoencoderKLWan()
        config = UMT5Config(
            vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        text = UMT5EncoderModel(config)
    for part, model in (("codec", vae), ("text", text)):
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[part]


def test_the_cache_takes_the_bytes_of_real_features():
    encoders = Encoders(CosineCodec(), ToyTextConditioner(), ToyVLM())
    from idc.types import Sample, Subject

    caption = " ".join(["word"] * 12)
    subjects = tuple(Subject(torch.zeros(3, 32, 32), "a") for _ in range(2))
    sample = Sample("a", caption, torch.zeros(3, 9, 64, 64), subjects, 8.0)
    (features,) = encoders.features([sample])
    real = sum(tensor.nbytes for tensor in features.values())
    assert cached_bytes(encoders, Bucket(9, 64, 64, 2), reference_tokens=4, words=12) == pytest.approx(real, rel=0.02)
    assert {drop.vlm for drop in Drop} <= set(features)


def test_devices_are_known_by_name():
    assert device("H100") is DEVICES["h100"]
    assert device("nvidia-a100-80gb") is DEVICES["a100"]
    assert device("cpu").memory > 0
    with pytest.raises(UserError, match="did you mean 'h100'"):
        device("h10")


# The command --------------------------------------------------------------------------------------------------------

SHALLOW = ("--model.init_args.transformer.num_layers", "2", "--model.init_args.transformer.id_blocks.layers", "1")
WAN14B = ("--config", "recipes/sft.yaml", "--config", "recipes/scale/wan14b.yaml")


def plan(tmp_path, capsys, *args: str) -> tuple[int, dict[str, Any], str]:
    status = main(["plan", *args, "--json", str(tmp_path / "plan.json")])
    return status, json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().err


def test_14b_fits_eight_h100_as_its_recipe_stands(tmp_path, capsys):
    """With four subjects, weights gathered in bfloat16 and averages in host memory."""
    args = (*WAN14B, "--config", "recipes/hardware/fsdp.yaml", "--device", "h100", "--strict")
    status, found, warned = plan(tmp_path, capsys, *args)
    assert found["parameters"]["parts"]["backbone"]["all"] == 14_288_491_584
    trained = sum(part["trained"] for part in found["parameters"]["parts"].values())
    parts, shards = found["memory"]["parts"], found["layout"]["shards"]
    assert parts["optimiser states"] == trained * 8 // shards
    assert "averages (EMA)" not in parts
    assert found["host_memory"]["averages (EMA)"] == trained * 4 // shards
    total = sum(part["all"] for part in found["parameters"]["parts"].values())
    assert found["save_copy_of_a_node"] == total * 4 + trained * (8 + 4)  # its eight ranks have all there is
    assert any(f"averages takes {found['save_copy_of_a_node'] / 2**30:.2f} GiB" in note for note in found["notes"])
    assert found["layout"]["gathered"] == "bfloat16"
    assert found["pass"]["bucket"] == [81, 480, 832, 4]
    (h100,) = found["devices"].values()
    assert found["memory"]["peak"] == pytest.approx(72.1 * 2**30, rel=0.03)  # 74.1 before torch 2.12
    assert found["memory"]["peak"] < 0.95 * h100["memory"]
    assert (status, warned, h100["fits"]) == (0, "", True)


def test_what_does_not_fit_is_told_what_makes_it_fit(tmp_path, capsys, monkeypatch):
    small = replace(DEVICES["h100"], memory=0.661)  # a few MiB less than the recipe takes
    monkeypatch.setitem(DEVICES, "h100", small)
    args = ("--config", "recipes/sft.yaml", *SHALLOW, "--data.init_args.max_subjects", "1", "--strict")
    status, found, warned = plan(tmp_path, capsys, *args)
    (only,) = found["devices"].values()
    assert (status, only["fits"]) == (1, False)
    assert only["memory"] < found["memory"]["peak"] < only["memory"] + 12 * 2**20
    first, *changes = warned.splitlines()
    assert "out of memory" in first
    assert changes
    assert all(change.endswith("GiB, fits") for change in changes)
    for setting in ("speed.checkpointing=attention", "EMA callback's init_args.offload=true"):
        assert any(setting in change for change in changes)


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_toy_recipes_can_be_planned_for_this_machine(recipe, tmp_path, capsys):
    _, found, warned = plan(tmp_path, capsys, "--config", f"recipes/{recipe}.yaml", "--device", "cpu")
    assert warned == ""
    assert sum(part["all"] for part in found["parameters"]["parts"].values()) == 3_871_552
    assert found["samples"]["kept"] == pytest.approx(4096, abs=4)
    assert found["samples"]["dropped"] == 0


def test_layouts_that_fit_refuses_are_not_planned(capsys):
    files = ("recipes/sft.yaml", "recipes/hardware/sequence_parallel.yaml")
    words = [word for file in files for word in ("--config", file)]
    # The toy model has 4 heads.
    words += ["--trainer.strategy.init_args.tensor_parallel_size", "8", "--data.init_args.batch_size", "1"]
    assert main(["plan", *words]) == 2
    assert "tensor_parallel_size=8: the ranks of a sequence share out the transformer's 4" in capsys.readouterr().err
    strategy = SimpleNamespace(class_path="idc.stages.sharding.FSDP2", init_args={"replicas": 3})
    with pytest.raises(UserError, match="replicas=3: must divide the 8 ranks"):
        _layout(SimpleNamespace(devices=8, num_nodes=1, strategy=strategy))


@pytest.mark.parametrize(("heads", "sizes"), [(40, [2, 4, 8]), (12, [2, 4])], ids=["14b", "1.3b"])
def test_ranks_of_a_sequence_divide_gpus_and_heads_as_the_recipe_says(heads, sizes):
    def fits(size: int) -> bool:
        try:
            check_sizes(1, 8, tensor_parallel_size=size)
            check_heads(heads, size)
        except UserError:
            return False
        return True

    assert [size for size in range(2, 41) if fits(size)] == sizes


def test_an_alignment_is_planned_before_its_start_is_trained(tmp_path):
    missing = str(tmp_path / "sft")
    recipe = read(["--config", "recipes/dpo.yaml", "--model.init_args.checkpoint", missing])
    assert recipe.stage.spec.num_layers == 30
    assert recipe.stage.encoders.vlm.dim == 3584
    assert recipe.stage.speed.checkpointing == "attention"
    assert recipe.stage.compute_dtype is torch.bfloat16
    (note,) = recipe.notes
    assert missing in note
    assert "recipes/scale/wan1.3b.yaml" in note


def test_what_stands_in_for_a_start_leaves_what_the_recipe_says(tmp_path):
    given = {"checkpoint": "runs/sft", "compute_dtype": "float32"}
    words, file = stand_in([], given, Path("recipes/scale/wan14b.yaml"))
    settings = dict(zip(words[::2], words[1::2], strict=True))
    assert json.loads(settings["--model.init_args.transformer"])["num_attention_heads"] == 40
    assert "--model.init_args.compute_dtype" not in settings
    assert file == "recipes/scale/wan14b.yaml"
    with pytest.raises(UserError, match=r"neither is nowhere\.yaml"):
        stand_in([], given, Path("nowhere.yaml"))
    assert is_there("toy")
    assert not is_there(str(tmp_path))
    (tmp_path / "version_0" / "checkpoints" / "step-1").mkdir(parents=True)
    assert is_there(str(tmp_path))


def test_ranks_exchange_weights_in_the_type_in_which_they_gather_them():
    parameters = Parameters({"all": (1_000_000, 1_000_000)}, 1_000, 200_000)
    h100 = DEVICES["h100"]

    def sent(dtype: torch.dtype) -> float:
        layout = Layout(strategy="fsdp", ranks=8, shards=8, gathered=dtype)
        took = seconds(
            1, parameters, optimiser_of(torch.optim.AdamW), layout, h100,
            dtype="bfloat16", matmul_precision="highest", average=False, passes=1,
        )  # fmt: skip
        return took.communication * 1e9 * h100.link

    assert sent(torch.float32) == pytest.approx(7 / 8 * (2 * 4 + 4) * 1_000_000)
    assert sent(torch.bfloat16) == pytest.approx(7 / 8 * (2 * (2 * 800_000 + 4 * 200_000) + 4 * 1_000_000))


class Sent(TorchDispatchMode):
    """Bytes that this rank gives to the others of its sequence."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes = ranks, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.idc.exchange.default:
            self.bytes += args[0].nbytes * (self.ranks - 1) // self.ranks
        return func(*args, **(kwargs or {}))


@pytest.fixture
def pretended_ranks() -> Iterator[int]:
    """A group whose other ranks send nothing that matters."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=5)
    yield 5  # which do not divide the tokens
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("checkpointing", "bf16", "trainable", "joins"),
    [("none", False, "full", False), ("attention", True, "full", False), ("full", True, "full", True),
     ("none", False, "id_blocks", False), ("full", False, "id_blocks", False), ("none", False, "lora", True)],
)  # fmt: skip
def test_a_spread_sequence_sends_what_its_exchanges_take(checkpointing, bf16, trainable, joins, pretended_ranks):
    size, subject = (1, 3, ((2, 2), (2, 2))), 4
    settings = {"num_attention_heads": 5, "id_joint_references": joins}
    model: Any = make(3, 2, checkpointing, **settings)
    set_trainable(model, trainable, rank=1)
    spread_over(model, dist.group.WORLD)

    def forward() -> Tensor:
        return loss_of(*size, bf16=bf16)(model)

    with torch.no_grad(), Sent(pretended_ranks) as reference:
        forward()
    with Sent(pretended_ranks) as trained:
        forward().backward()

    codec = SimpleNamespace(latent_shape=lambda *_: (4, 3, 8, 12))
    dtype = torch.bfloat16 if bf16 else torch.float32
    stage: Any = SimpleNamespace(encoders=SimpleNamespace(codec=codec), compute_dtype=dtype)
    structure: Any = SimpleNamespace(config=model.config, stage=stage, checkpointing=checkpointing, trainable=trainable)
    bucket = Bucket(9, 64, 96, 2)
    assert trained.bytes == sequence_bytes(structure, bucket, subject, pretended_ranks)
    assert sequence_bytes(structure, bucket, subject, 1) == 0
    structure.stage = DPO.__new__(DPO)
    vars(structure.stage).update(vars(stage))
    assert 2 * (trained.bytes + reference.bytes) == sequence_bytes(structure, bucket, subject, pretended_ranks)


def test_a_spread_sequence_adds_its_exchange_to_a_step_and_to_no_other(tmp_path, capsys):
    spread = ("--config", "recipes/sft.yaml", *SHALLOW, "--config", "recipes/hardware/sequence_parallel.yaml")
    _, found, _ = plan(tmp_path, capsys, *spread, "--device", "h100")
    (h100,) = found["devices"].values()
    took = h100["seconds_by_part"]
    assert took["sequence"] > 0
    assert h100["seconds_a_step"] == max(took["compute"], took["communication"]) + took["sequence"] + took["optimiser"]
    assert any("waits for them" in note for note in found["notes"])
    (hours,) = (note for note in found["notes"] if note.startswith("hours"))
    assert "encoding the features, validation, previews and saves are not in them" in hours

    alone = ("--config", "recipes/sft.yaml", *SHALLOW, "--config", "recipes/hardware/fsdp.yaml")
    _, found, _ = plan(tmp_path, capsys, *alone, "--device", "h100")
    (h100,) = found["devices"].values()
    assert h100["seconds_by_part"]["sequence"] == 0
    assert not any("waits for them" in note for note in found["notes"])


def test_a_sequence_over_nodes_is_exchanged_through_the_network():
    parameters, h100 = Parameters({"all": (1, 1)}, 1, 1), DEVICES["h100"]

    def took(nodes: int) -> float:
        layout = Layout(strategy="fsdp", ranks=8, nodes=nodes, shards=8, sequence=4)
        return seconds(
            1, parameters, optimiser_of(torch.optim.AdamW), layout, h100,
            dtype="bfloat16", matmul_precision="highest", average=False, passes=1, sent=1e9,
        ).sequence  # fmt: skip

    assert took(1) == took(2) == 1 / h100.link
    assert took(4) == 1 / h100.network


def test_wrong_settings_are_told_as_fit_tells_them(capsys):
    assert main(["plan", "--config", "recipes/sft.yaml", "--model.init_args.trainabel", "full"]) == 2
    assert "trainable" in capsys.readouterr().err
    assert main(["plan", "--config", "recipes/generate.yaml"]) == 2
    assert "idc generate" in capsys.readouterr().err
    assert main(["plan", "--config", "recipes/sft.yaml", "--device", "h1000"]) == 2
    assert "h100" in capsys.readouterr().err
    assert main(["plan", "--config", "recipes/sft.yaml", "--json", "nowhere/at/all.json"]) == 2
    assert "nowhere/at is no folder" in capsys.readouterr().err
    assert main(["plan", "--config", "recipes/sft.yaml", "--trainer.accumulate_grad_batches", "0"]) == 2
    assert "accumulate_grad_batches=0: a step takes 1 pass or more" in capsys.readouterr().err
    assert main(["plan", "--config", "recipes/grpo.yaml", "--trainer.accumulate_grad_batches", "2"]) == 2
    assert "set model.init_args.updates" in capsys.readouterr().err
    spread = ("--config", "recipes/hardware/fsdp_grpo.yaml", "--trainer.strategy.init_args.tensor_parallel_size", "2")
    assert main(["plan", "--config", "recipes/grpo.yaml", *spread]) == 2
    assert "a rank makes GRPO's rollouts alone" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "no recipe" in capsys.readouterr().err
