"""Speed changes nothing: every faster way gives what the plain one gives, and does the work that it says."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _tiny_wan import condition, inputs, run, tiny_model
from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY, AttentionBackendName
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from idc.errors import UserError
from idc.models import attention, checkpointing
from idc.models.attention import CANDIDATES, UNPLANNED, Choice, attend, check_compiles, choose_backend, set_backend
from idc.models.checkpointing import is_attention
from idc.models.speed import BACKENDS, Speed
from idc.models.subject_cache import JoinedCaches
from idc.models.trainable import set_trainable
from idc.stages import speed as speed_of_stages
from idc.stages.speed import apply_speed, keep_fused, optimizer_settings

CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
PADDED = torch.tensor([[[4, 4], [2, 6]], [[2, 4], [0, 0]]])  # of a batch of two, the second with one reference


def attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flops(work: Any) -> Counter:
    """Operations by kind of operator, attention on the CPU included, which torch does not count."""
    counter = FlopCounterMode(display=False, custom_mapping={CPU_FLASH.overloadpacket: attention_flops})
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return Counter({str(op).split(".")[-1]: count for op, count in counts.items()})


def loss_of(model: Any, given: Any = None) -> Tensor:
    return run(model, condition() if given is None else given).square().mean()


def gradients(model: Any, given: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, given).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Checkpointing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [{}, {"id_joint_references": True}, {"lora": True}], ids=["ours", "joint", "lora"])
def test_gradients_are_the_same_to_the_bit_whatever_is_recomputed(settings: dict[str, Any], padded: bool) -> None:
    settings = dict(settings)
    lora = settings.pop("lora", False)
    model = tiny_model(**settings).train()
    if lora:
        set_trainable(model, "lora", rank=2, alpha=4)
    given = condition()
    if padded:
        given = replace(given, reference_sizes_BN2=PADDED)
    model.run_layers("none")
    plain = gradients(model, given)
    assert plain
    for mode in ("attention", "full"):
        model.run_layers(mode)
        found = gradients(model, given)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain), mode


def test_attention_is_not_computed_again_and_full_checkpointing_costs_a_fourth_forward() -> None:
    """3 forwards a step, 4 with all recomputed; in between what is no attention is computed again, to the operation."""
    model = tiny_model().train()
    with torch.no_grad():
        forward = flops(lambda: loss_of(model))
    steps = {}
    for mode in ("none", "attention", "full"):
        model.run_layers(mode)
        with set_checkpoint_early_stop(False):  # else the last product of a layer, which nothing needs, is left out
            steps[mode] = flops(lambda: loss_of(model).backward())
    kernel = CPU_FLASH.__name__.split(".")[0]
    once = forward[kernel]
    assert once > 0
    assert [steps[mode][kernel] for mode in ("none", "attention", "full")] == [once, once, 2 * once]
    again = {mode: sum(steps[mode].values()) - sum(steps["none"].values()) for mode in ("attention", "full")}
    layers = sum(forward.values()) - _outside_the_layers(model)
    assert again["full"] == layers
    assert again["attention"] == layers - once


def _outside_the_layers(model: Any) -> int:
    """Operations of a forward before and after the layers, by taking the layers out."""
    bare = copy.deepcopy(model)
    bare.run_layers("none")
    bare.blocks, bare.id_blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
    with torch.no_grad():
        return sum(flops(lambda: loss_of(bare)).values())


class Allocations(TorchDispatchMode):
    """Which results of operators are still in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def held_by(model: Any) -> int:
    """Bytes at the end of a forward pass, weights apart."""
    with Allocations() as allocations:
        loss = loss_of(model)
    assert loss.requires_grad
    for parameter in model.parameters():
        allocations.storages.pop(parameter.untyped_storage()._cdata, None)
    return allocations.bytes()


def test_nothing_between_a_layer_and_its_hierarchical_block_is_kept() -> None:
    """One block more keeps no more: what enters its layer is kept without it, too."""
    models = [tiny_model(id_layers=id_layers).train() for id_layers in (2, 3)]
    plain = [held_by(model) for model in models]
    for model in models:
        model.run_layers("full")
    held = [held_by(model) for model in models]
    assert held[0] == held[1]
    assert plain[0] < plain[1]


def test_the_backward_pass_keeps_less_and_the_attention_outputs_are_the_difference() -> None:
    model = tiny_model().train()
    held = {}
    for mode in ("none", "attention", "full"):
        model.run_layers(mode)
        held[mode] = held_by(model)
    assert held["none"] > 2 * held["attention"]
    assert held["full"] < held["attention"] < held["full"] + _attention_bytes(model) * 1.01


def _attention_bytes(model: Any) -> int:
    """Of the outputs of all attentions of a forward, and their log-sum-exps."""
    total = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total
            out = func(*args, **(kwargs or {}))
            total += sum(t.nbytes for t in out) if is_attention(func) else 0
            return out

    with torch.no_grad(), Watch():
        loss_of(model)
    return total


def test_operators_that_are_kept_are_those_that_attend_forwards() -> None:
    def op(name: str) -> Any:
        return type("Op", (), {"_name": name})()

    kept = ("flash_attn::_flash_attn_forward", "flash_attn_3::fwd", "_diffusers_flash_attn_3::_flash_attn_forward")
    kept += ("_flash_attn3_48fe103_dirty::fwd", "flash_attn::_flash_attn_varlen_forward")
    others = ("flash_attn::_flash_attn_backward", "flash_attn_3::bwd", "aten::mm", "flash::rms_norm_forward")
    assert [name for name in (*kept, *others) if is_attention(op(name))] == list(kept)
    assert is_attention(CPU_FLASH)
    assert not is_attention(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
    assert not is_attention(torch.ops.aten.mm.default)


def test_diffusers_own_switch_is_the_same_checkpointing() -> None:
    model = tiny_model().train()
    plain = flops(lambda: loss_of(model).backward())
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert sum(flops(lambda: loss_of(model).backward()).values()) > sum(plain.values())
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    assert flops(lambda: loss_of(model).backward()) == plain


def test_a_copy_of_a_model_runs_its_own_layers_and_the_weights_keep_their_names() -> None:
    model = tiny_model().train()
    names = list(model.state_dict())
    model.run_layers("attention")
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict()) == names
    before = loss_of(model).item()
    with torch.no_grad():
        twin.blocks[0].ffn.net[2].weight.zero_()
    assert loss_of(model).item() == before != loss_of(twin).item()


def one_layer() -> Any:
    """Wan's block and the one after it."""
    model = tiny_model(id_layers=1).train()
    del model.blocks[1:]
    return model


def curve(model: Any, fused: bool | None = None) -> list[float]:
    """Losses of twenty steps on one batch."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain_curve() -> list[float]:
    losses = curve(one_layer())
    assert losses[-1] < 0.9 * losses[0]
    return losses


@pytest.mark.parametrize("mode", ["attention", "full"])
def test_twenty_steps_have_one_loss_curve_to_the_bit_whatever_is_recomputed(plain_curve: Any, mode: Any) -> None:
    model = one_layer()
    model.run_layers(mode)
    assert curve(model) == plain_curve


def test_twenty_steps_have_one_loss_curve_on_another_attention_backend(plain_curve: Any) -> None:
    model = one_layer()
    set_backend(model, "_native_math")
    assert curve(model) == pytest.approx(plain_curve, rel=1e-5)


def test_twenty_steps_have_one_loss_curve_whether_the_optimiser_is_fused_or_not(plain_curve: Any) -> None:
    found = curve(one_layer(), fused=True)
    assert found == pytest.approx(plain_curve, rel=1e-5)
    assert found[0] == plain_curve[0]


# Compilation ----------------------------------------------------------------------------------------------------------


def test_compiled_layers_are_one_graph_each_and_change_no_value_gradient_or_name(
    plain_curve: Any, monkeypatch: Any
) -> None:
    """Wan's block and the one after it, recomputing all but their attention; twenty steps; and back again.

    Traced and run without inductor, whose C++ takes half a minute on a CPU: there values are equal to the bit.
    """
    monkeypatch.setattr(checkpointing.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    checkpointing._runner.cache_clear()
    model = one_layer()
    plain, names = gradients(model), list(model.state_dict())
    graphs = torch._dynamo.utils.counters["stats"]
    model.run_layers("attention", True)
    before = graphs["unique_graphs"]
    compiled = gradients(model)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        gradients(model)
    attended = Counter(event.name for event in profiler.events())[CPU_FLASH.name().split(".")[0]]
    assert attended == 2 + 2 + 2 + 1  # the video's, to itself and to the text; each of two subjects' twice; to them
    assert graphs["unique_graphs"] == before + 1
    assert gradients(model).keys() == compiled.keys() == plain.keys()
    assert graphs["unique_graphs"] == before + 1
    assert all(torch.allclose(compiled[name], plain[name], rtol=1e-5, atol=1e-8) for name in plain)
    assert list(model.state_dict()) == names
    weights = copy.deepcopy(model.state_dict())
    assert curve(model) == pytest.approx(plain_curve, rel=1e-5)
    assert graphs["unique_graphs"] == before + 1
    model.load_state_dict(weights)
    model.run_layers("none", False)
    assert all(torch.equal(ours, plain[name]) for name, ours in gradients(model).items())
    checkpointing._runner.cache_clear()


@pytest.mark.parametrize("mode", ["attention", "full"])
def test_sharded_blocks_are_compiled_within_their_hooks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed, and what again, with a compiler that only tells what it is given."""
    compiled: list[Any] = []
    monkeypatch.setattr(checkpointing.torch, "compile", lambda run, fullgraph: compiled.append(run) or run)
    model = one_layer()
    model.run_layers(mode)
    plain = flops(lambda: gradients(model))
    expected = gradients(model)
    monkeypatch.setattr(checkpointing, "FSDPModule", type(model.blocks[0]))
    checkpointing._runner.cache_clear()
    model.run_layers(mode, True)
    assert flops(lambda: gradients(model)) == plain
    assert len(compiled) == 2  # one of each kind
    assert all(torch.equal(found, expected[name]) for name, found in gradients(model).items())
    checkpointing._runner.cache_clear()


# Attention ------------------------------------------------------------------------------------------------------------


def test_the_cpu_is_always_native_and_asks_nothing() -> None:
    assert choose_backend("cpu", torch.bfloat16, 128) == Choice("native")


def test_names_of_backends_are_diffusers_own_and_a_wrong_one_is_told_all_of_them() -> None:
    assert {*BACKENDS, *CANDIDATES, *UNPLANNED} <= {backend.value for backend in AttentionBackendName}
    assert {*CANDIDATES, *UNPLANNED} <= set(BACKENDS)
    with pytest.raises(UserError, match=r"'_flash3': must be one of auto, native.*did you mean '_flash_3'"):
        Speed(attention="_flash3")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_named_backend_is_checked_and_its_error_measured(dtype: torch.dtype, training: bool) -> None:
    choice = choose_backend("cpu", dtype, 64, "_native_math", training)
    assert choice.name == "_native_math"
    assert choice.error is not None
    assert choice.error < attention.TOLERANCE[dtype]
    assert f"_native_math (off by {choice.error:.1e}" in str(choice)
    assert (choice.error > 1e-4) == (dtype is torch.bfloat16)


def test_a_probe_finds_the_same_whatever_the_default_device_is() -> None:
    """Lightning has the GPU for one while it builds a stage; a CPU's generator draws nothing there."""
    given = "cpu", torch.float32, 8, "_native_math", True
    found = choose_backend(*given)
    with torch.device("meta"):
        assert choose_backend(*given) == found


def test_a_backend_that_is_not_here_is_refused_by_name_and_reason() -> None:
    for name, reason in (("sage", "sageattention"), ("_native_cudnn", "")):
        with pytest.raises(UserError, match=rf"speed.attention='{name}': .*{reason}.*auto and native run everywhere"):
            choose_backend("cpu", torch.bfloat16, 64, name)


def test_a_probe_on_a_gpu_takes_the_fastest_of_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it decides, from what it would measure there."""
    errors = dict.fromkeys((*CANDIDATES, *UNPLANNED), 0.003) | {"flash": 0.5, "native": float("nan")}
    times = dict.fromkeys((*CANDIDATES, *UNPLANNED), 3.0) | {
        "flash": 0.1,
        "native": 0.1,
        "_flash_3": 1.0,
        "_native_cudnn": 1.02,
    }

    def error(name: str, *_: Any) -> float:
        if name == "_native_flash":
            raise ImportError("no kernels\nsecond line")
        return errors[name]

    def compiles(name: str, *_: Any) -> None:
        if name == "_native_cudnn":
            raise RuntimeError("breaks the graph")

    monkeypatch.setattr(attention, "_error", error)
    monkeypatch.setattr(attention, "_time", lambda name, *_: times[name])
    monkeypatch.setattr(attention, "check_compiles", compiles)
    choice = choose_backend("cuda", torch.bfloat16, 128)
    assert choice.name == "_native_cudnn"  # as fast, and no package of its own
    assert choice.varying == "_flash_3"  # cuDNN would plan anew for each of their sizes
    assert str(choice).startswith("attention backend: _native_cudnn, of subjects _flash_3 (_native_cudnn 1.02 ms")
    assert choice.everywhere().name == choice.everywhere().varying == "_flash_3"
    assert choice.skipped.keys() == {"flash", "native", "_native_flash"}
    assert choice.skipped["_native_flash"] == "no kernels"
    assert "0.5" in choice.skipped["flash"]
    choice = choose_backend("cuda", torch.bfloat16, 128, compiled=True)
    assert choice.name == choice.varying == "_flash_3"
    assert choice.skipped["_native_cudnn"] == "breaks the graph"
    with pytest.raises(UserError, match=r"speed.attention='_native_cudnn': breaks the graph"):
        choose_backend("cuda", torch.bfloat16, 128, "_native_cudnn", compiled=True)
    choice = choose_backend("cuda", torch.bfloat16, 128, "_native_cudnn")
    assert (choice.name, choice.varying) == ("_native_cudnn", "_native_efficient")  # of PyTorch's, the one that runs
    times["_native_cudnn"] = 1.2
    assert choose_backend("cuda", torch.bfloat16, 128).name == "_flash_3"
    monkeypatch.setattr(attention, "_error", lambda name, *_: 1.0)
    choice = choose_backend("cuda", torch.bfloat16, 128)
    assert choice.name == choice.varying == "native"
    assert "_flash_3: off by 1" in str(choice)  # that nothing could be taken, and why


def test_auto_runs_nothing_that_a_hub_would_send() -> None:
    fetched = {name for name in BACKENDS if AttentionBackendName(name) in _HUB_KERNELS_REGISTRY}
    assert {"flash_hub", "_flash_3_hub"} <= fetched
    assert not fetched & set(CANDIDATES)


def test_a_backend_that_breaks_a_graph_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.device("cpu"), torch.float32, 8, True
    check_compiles("_native_math", *given, compiler="eager")
    native = attention.dispatch_attention_fn

    def breaks(*args: Any, **named: Any) -> Tensor:
        torch._dynamo.graph_break()
        return native(*args, **named)

    monkeypatch.setattr(attention, "dispatch_attention_fn", breaks)
    with pytest.raises(RuntimeError, match=r"does not compile, and speed.compile is on: .*graph_break"):
        check_compiles("_native_math", *given, compiler="eager")


def test_a_compiler_that_loses_gradients_is_noticed_before_training() -> None:
    """As that of torch 2.11 does, of functions that write into what they return."""
    given = torch.device("cpu"), torch.float32, 8

    def forgets(graph: Any, inputs: Any) -> Any:
        return lambda *args: [out.detach() + 0 * sum(arg.sum() for arg in args) for out in graph(*args)]

    check_compiles("_native_math", *given, False, compiler=forgets)
    with pytest.raises(RuntimeError, match=r"compiled, as speed.compile asks for, its results are off by 1 of"):
        check_compiles("_native_math", *given, True, compiler=forgets)


def test_a_backend_that_one_rank_lacks_ends_all_ranks_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank makes of what all ranks say."""
    problems: list[Any] = []
    monkeypatch.setattr(speed_of_stages, "of_all_ranks", lambda mine: [mine, *problems])
    strategy = SimpleNamespace(root_device=torch.device("cpu"), is_global_zero=True, broadcast=lambda value: value)
    model = tiny_model()
    assert apply_speed(model, Speed(), strategy, torch.float32, training=True)["attention"] == "native"
    problems += [None, "speed.attention='flash': no package", "another"]
    with pytest.raises(UserError, match=r"^rank 2: speed.attention='flash': no package \(and on 1 rank more\)$"):
        apply_speed(model, Speed(), strategy, torch.float32, training=True)
    # Outside of a trainer a process works by itself, and others may be waiting for it.
    assert apply_speed(model, Speed(), None, torch.float32, training=True)["attention"] == "native"


def test_a_backend_without_gradients_is_none_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    native = attention.dispatch_attention_fn
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *args, **named: native(*args, **named).detach())
    assert choose_backend("cpu", torch.float32, 8, "_native_math").name == "_native_math"
    with pytest.raises(UserError, match="grad"):
        choose_backend("cpu", torch.float32, 8, "_native_math", training=True)


def test_under_a_mask_attention_is_native_and_without_one_as_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash backends refuse masks; and the model next door is left alone."""
    model, other = tiny_model(), tiny_model()
    set_backend(model, "_native_math")
    used: set[tuple[str, bool]] = set()
    real = attention.dispatch_attention_fn

    def watched(*args: Any, **named: Any) -> Tensor:
        used.add((getattr(named["backend"], "value", "default"), named["attn_mask"] is not None))
        return real(*args, **named)

    monkeypatch.setattr(attention, "dispatch_attention_fn", watched)
    with torch.no_grad():
        masked = run(model, replace(condition(), reference_sizes_BN2=PADDED))
        assert used == {("_native_math", False), ("native", True)}
        plain = run(other, replace(condition(), reference_sizes_BN2=PADDED))
    assert ("default", False) in used
    assert torch.allclose(masked, plain, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_attentions_whose_lengths_vary_with_the_sample_have_a_backend_of_their_own(
    joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subjects'; with their tokens in the video's self-attention all of them. Set again, all are alike."""
    model = tiny_model(id_joint_references=joint)
    used: set[tuple[str, int, int]] = set()
    real = attention.dispatch_attention_fn

    def watched(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Tensor:
        used.add((named["backend"].value, query.shape[1], key.shape[1]))
        return real(query, key, *rest, **named)

    monkeypatch.setattr(attention, "dispatch_attention_fn", watched)
    monkeypatch.setattr(attention, "choose_backend", lambda *_: Choice("_native_math", "_native_flash"))
    chosen = apply_speed(model, Speed(), None, torch.float32, training=False)
    with torch.no_grad():
        run(model, condition())
    names = {(queries, keys): name for name, queries, keys in used}
    subjects = {(4, 4), (3, 3), (4, 3), (3, 4), (18, 14)}  # two of 4 and 3 tokens; 18 of the video, 7 of the VLM
    video = {(25, 25), (25, 5)} if joint else {(18, 18), (18, 5)}  # and 5 of the text
    assert names.keys() == subjects | video
    assert {names[sizes] for sizes in subjects} == {"_native_flash"} == {chosen["attention_of_subjects"]}
    assert {names[sizes] for sizes in video} == {chosen["attention"]}
    assert chosen["attention"] == ("_native_flash" if joint else "_native_math")
    set_backend(model, "native")
    used.clear()
    with torch.no_grad():
        run(model, condition())
    assert {name for name, _, _ in used} == {"native"}


def test_all_values_of_an_attention_have_the_type_that_it_computes_in() -> None:
    """Autocast's norms return float32, which flash kernels would refuse."""
    query, key, value = torch.randn(1, 5, 2, 8), torch.randn(1, 7, 2, 8), torch.randn(1, 7, 2, 8).bfloat16()
    assert attend(query, key, value, None, None).dtype is torch.bfloat16


# Guidance in one batch ------------------------------------------------------------------------------------------------


def test_conditions_joined_in_a_batch_give_what_each_gives_alone() -> None:
    """References or none, masks or none: each row reads its own."""
    model = tiny_model().eval()
    given = [condition(), condition(sizes=(), vlm_tokens=0), replace(condition(), reference_sizes_BN2=PADDED)]
    with torch.no_grad():
        caches = [model.build_subject_cache(each) for each in given]
        alone = [run(model, subject_cache=cache.expand(2)) for cache in caches]
        latents, timestep, text = (torch.cat([x] * 3) for x in inputs())
        both = model(latents, timestep, text, subject_cache=JoinedCaches(tuple(caches)).expand(6)).sample
    assert torch.allclose(both, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], rtol=1e-2)
    with pytest.raises(UserError, match="multiple of the 3 conditions"):
        JoinedCaches(tuple(caches)).expand(4)


# Optimisers -----------------------------------------------------------------------------------------------------------


def test_on_cuda_an_optimiser_is_fused_where_it_can_be_and_the_recipe_has_no_say() -> None:
    cuda = torch.device("cuda")
    adam = torch.optim.AdamW
    assert optimizer_settings(adam, cuda) == {"fused": True}
    assert optimizer_settings(adam, torch.device("cpu")) == {}
    assert optimizer_settings(torch.optim.RMSprop, cuda) == {}
    for named in ({"fused": False}, {"foreach": True}, {"differentiable": True}, {"fused": True}):
        assert optimizer_settings(lambda p, named=named: adam(p, **named), cuda) == {}


def test_a_fused_optimiser_steps_as_a_plain_one_and_goes_on_from_its_state() -> None:
    def trained(first: bool | None, second: bool | None) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        weight, state = torch.nn.Parameter(torch.randn(4, 3)), None
        for fused in (first, second):
            optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
            keep_fused(optimizer)
            if state is not None:
                optimizer.load_state_dict(state)
            for _ in range(3):
                weight.grad = weight.detach().square()
                optimizer.step()
            state = optimizer.state_dict()
        return weight.detach(), optimizer.param_groups[0]["fused"]

    plain, _ = trained(None, None)
    for first, second in ((True, True), (None, True), (True, None)):
        weight, fused = trained(first, second)
        assert torch.allclose(weight, plain, rtol=1e-6)
        assert fused is second
