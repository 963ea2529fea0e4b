"""Speed changes nothing: every faster way gives what the plain one gives, and does the work that it says."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from _tiny_wan import condition, inputs, run, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from idc.errors import UserError
from idc.models import attention
from idc.models.attention import CANDIDATES, Choice, attend, choose_backend, set_backend
from idc.models.checkpointing import is_attention, run_layers
from idc.models.speed import BACKENDS, Speed
from idc.models.subject_cache import JoinedCaches
from idc.models.trainable import set_trainable
from idc.stages.speed import keep_fused, optimizer_settings

CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
PADDED = torch.tensor([[[4, 4], [2, 6]], [[2, 4], [0, 0]]])  # of a batch of two, the second with one reference


def attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flops(work: Any) -> Counter:
    """Operations by kind of operator, attention on the CPU included, which torch does not count."""
    counter = FlopCounterMode(display=False, custom_mapping={CPU_FLASH: attention_flops})
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


def test_what_is_kept_for_the_backward_pass_shrinks_and_the_attention_outputs_are_the_difference() -> None:
    model = tiny_model(id_layers=3).train()
    held = {}
    for mode in ("none", "attention", "full"):
        model.run_layers(mode)
        held[mode] = _held_bytes(model)
    assert held["none"] > 2 * held["attention"]
    assert held["attention"] > held["full"] > 0


def _held_bytes(model: Any) -> int:
    """Memory that lives between forward and backward because of the graph."""
    import gc

    def live() -> dict[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = KeptByPolicy()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), kept:
        loss = loss_of(model)
    before = live()
    del loss
    return sum(before.values()) and sum(size for at, size in storages.items() if at not in own)
