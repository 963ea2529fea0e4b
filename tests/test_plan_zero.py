"""`idc plan` under DeepSpeed against the allocator over real steps of two processes, and what its settings change."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _plan_worker import (
    BUCKET,
    LAYERS,
    LAYOUTS,
    LIVE,
    PREFETCH,
    RANKS,
    WIDTH,
    measure_fsdp,
    measure_zero,
    small_loss,
    wide_model,
)
from _server import free_port, join, launch
from torch import Tensor, nn

from idc.plan.devices import DEVICES
from idc.plan.estimate import Plan
from idc.plan.measure import measured_parts
from idc.plan.memory import Memory, memory, optimiser_of
from idc.plan.model import Parameters
from idc.plan.recipe import Layout, _layout, read
from idc.plan.tables import as_json, notes
from idc.plan.trace import Passed, trace
from idc.plan.zero import ZeRO
from idc.stages.sharding import units_of

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="DeepSpeed (extra deepspeed) is not installed")
ONE = 4 * WIDTH**2  # bytes of a layer's weight
NAMES = ["-".join([f"stage{n}", *["optimizer"] * o, *["parameters"] * p]) for n, o, p in LAYOUTS]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, int]]]:
    """By layout, of each rank."""
    path, port = tmp_path_factory.mktemp("measured") / "rank", free_port()
    assert join(launch(measure_zero, [(rank, port, str(path)) for rank in range(RANKS)]), 120) == [0] * RANKS
    ranks = [json.loads(Path(f"{path}-{rank}").read_text()) for rank in range(RANKS)]
    return [list(pair) for pair in zip(*ranks, strict=True)]


def planned(zero: ZeRO, accumulate: int = 2) -> Memory:
    count = LAYERS * WIDTH**2
    parameters = Parameters({"all": (count, count)}, WIDTH**2, 0)
    layout = Layout(ranks=RANKS, accumulate=accumulate).with_zero(zero)
    return memory(parameters, Passed(0, 0, 0, 0), optimiser_of(torch.optim.AdamW), layout, on_gpu=False)


@needs_deepspeed
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=NAMES)
def test_what_stays_is_what_deepspeed_holds(number: int, measured: list[list[dict[str, int]]]) -> None:
    """Weights, their float32 copy, states, and where they lie."""
    found = planned(ZeRO(*LAYOUTS[number], bucket=BUCKET, live=LIVE, prefetch=PREFETCH))
    _, offloads, offloads_weights = LAYOUTS[number]
    for rank in measured[number]:
        assert (found.host if offloads_weights else found.parts)["weights"] == rank["weights"]
        if not offloads:
            assert found.parts["DeepSpeed's master copy"] == rank["master copy"]
            assert found.parts["optimiser states"] == rank["optimiser states"]
            assert found.host == {}
            continue
        assert not {"DeepSpeed's master copy", "optimiser states", "gradients"} & {*found.parts}
        for name in ("master copy", "optimiser states", "gradients"):
            assert found.host[name] == rank[name]
        assert found.host.get("stepped weights, on their way to the device", 0) == rank["way back"]


@needs_deepspeed
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=NAMES)
def test_what_comes_and_goes_is_what_the_allocator_saw(number: int, measured: list[list[dict[str, int]]]) -> None:
    stage, offloads, _ = LAYOUTS[number]
    found = planned(ZeRO(*LAYOUTS[number], bucket=BUCKET, live=LIVE, prefetch=PREFETCH))
    buckets, gradients = found.parts["DeepSpeed's buckets of gradients"], found.parts.get("gradients", 0)
    # And a gradient before it is in a bucket, which the tracer counts with the pass.
    coming = found.parts.get("gathered layers", 0) + buckets + ONE
    if stage == 3:  # its bucket and its gradients stay from step to step
        assert coming - 4 * BUCKET == pytest.approx(min(rank["least pass"] for rank in measured[number]), rel=0.05)
    elif offloads:
        assert coming == pytest.approx(min(rank["least pass"] for rank in measured[number]), rel=0.05)
    else:
        assert coming + gradients == pytest.approx(max(rank["passes"] for rank in measured[number]), rel=0.05)
    if not offloads:
        static = sum(found.parts.get(name, 0) for name in ("weights", "DeepSpeed's master copy", "optimiser states"))
        own, bucket = LAYERS * ONE // RANKS, 4 * BUCKET if stage == 3 else 0
        step = max(rank["step"] for rank in measured[number])
        assert found.optimiser_step - static - own - bucket == pytest.approx(step, rel=0.02)


@needs_deepspeed
def test_settings_that_lightning_leaves_to_deepspeed_are_its_own() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig()
    assert (ZeRO.live, ZeRO.prefetch) == (theirs.max_live_parameters, theirs.prefetch_bucket_size)
    assert theirs.max_reuse_distance == ZeRO.live


def test_buckets_are_those_that_the_strategy_passes() -> None:
    """Two of 200 million gradients, whole however small the model, and one while a smaller model's are exchanged."""
    count = 4 * LAYERS * WIDTH**2
    assert planned(ZeRO(2)).parts["DeepSpeed's buckets of gradients"] == 2 * 800_000_000 + count
    assert planned(ZeRO(2, overlap=False)).parts["DeepSpeed's buckets of gradients"] == 800_000_000 + count
    assert planned(ZeRO(2)).parts["gradients"] == count // RANKS * 2
    assert planned(ZeRO(2), accumulate=1).parts["gradients"] == count // RANKS
    assert planned(ZeRO(1)).parts["gradients"] == count


@pytest.mark.parametrize(
    ("strategy", "settings", "expected"),
    [
        ("deepspeed", {}, ZeRO(2)),
        ("deepspeed_stage_1", {}, ZeRO(1)),
        ("deepspeed_stage_2_offload", {}, ZeRO(2, True)),
        ("deepspeed_stage_3_offload", {}, ZeRO(3, True, True)),
        ("idc.stages.zero.DeepSpeedZeRO", {"stage": 1}, ZeRO(1)),
        ("idc.stages.zero.DeepSpeedZeRO", {"stage": 3, "offload_optimizer": True}, ZeRO(3, True)),
        ("lightning.pytorch.strategies.DeepSpeedStrategy", {"reduce_bucket_size": 7, "overlap_comm": False},
         ZeRO(2, bucket=7, overlap=False)),
    ],
)  # fmt: skip
def test_a_strategys_settings_are_read(strategy: str, settings: dict[str, Any], expected: ZeRO) -> None:
    given = SimpleNamespace(class_path=strategy, init_args=settings) if "." in strategy else strategy
    layout, notes = _layout(SimpleNamespace(devices=4, num_nodes=2, strategy=given, accumulate_grad_batches=1))
    assert (layout.zero, layout.strategy, layout.shards, notes) == (expected, f"zero{expected.stage}", 8, [])
    assert layout.weights_over == (8 if expected.stage == 3 else 1)


# FSDP2 --------------------------------------------------------------------------------------------------------------


def test_layers_that_fsdp2_gathers_are_what_the_allocator_saw(tmp_path: Path) -> None:
    path, port = tmp_path / "rank", free_port()
    assert join(launch(measure_fsdp, [(rank, port, str(path)) for rank in range(RANKS)])) == [0] * RANKS
    measured = min(json.loads(Path(f"{path}-{rank}").read_text()) for rank in range(RANKS))

    def build(layers: int, ids: int) -> nn.Module:
        with torch.device("meta"):
            return wide_model(layers, ids)

    model: Any = build(3, 2)
    count = [sum(p.numel() for p in unit.parameters()) for unit in (model, *units_of(model))]
    parameters = Parameters({"all": (count[0], count[0])}, max(count[1:]), count[0] - sum(count[1:]))
    layout = Layout("fsdp", RANKS, shards=RANKS)
    passed = trace(build, 3, 2, small_loss)
    found = memory(parameters, passed, optimiser_of(torch.optim.AdamW), layout, on_gpu=False)
    # Somewhat more, as a gradient that is being made counts in the pass, too.
    assert measured <= found.parts["gathered layers"] + passed.peak < 1.2 * measured


# --measure ----------------------------------------------------------------------------------------------------------

SHALLOW = ("--model.init_args.transformer.num_layers", "2", "--model.init_args.transformer.id_blocks.layers", "1")


def test_what_is_measured_on_a_cpu_is_the_allocators_and_near_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Plan(read(["--config", "recipes/sft.yaml", *SHALLOW, "--data.init_args.batch_size", "2"]))
    predicted = found.memory(on_gpu=False, averages="none")
    cpu = torch.device("cpu")
    measured = measured_parts(found, cpu)
    kept = predicted.parts["activations kept"]
    for name in ("weights", "gradients", "optimiser states"):
        assert measured[name] == pytest.approx(predicted.parts[name], rel=0.1)
    assert measured["kept for the backward pass"] == pytest.approx(kept, rel=0.1)
    assert measured["peak"] == pytest.approx(predicted.allocated, rel=0.1)
    assert measured["peak"] != predicted.allocated

    # What no operator of PyTorch tells of is seen: an extension's own buffer.
    extra, whole = 64 * 2**20, found.structure.loss(found.work)
    held: list[Any] = []

    def hungry(model: nn.Module) -> Tensor:
        held[:] = [torch.UntypedStorage(extra)]
        return whole(model)

    monkeypatch.setattr(found.structure, "loss", lambda work: hungry)
    more = measured_parts(found, cpu)
    assert more["gradients"] - measured["gradients"] == pytest.approx(extra, rel=0.01)


# 14B ----------------------------------------------------------------------------------------------------------------

ZERO3 = [
    word
    for file in ("sft", "scale/wan14b", "hardware/deepspeed_zero3")
    for word in ("--config", f"recipes/{file}.yaml")
]


def test_14b_fits_eight_h100_under_zero3_with_its_optimiser_in_host_memory() -> None:
    """As the recipe's header says."""
    recipe = read(ZERO3)
    found, room = Plan(recipe), DEVICES["h100"].memory * 2**30
    whole, trained = found.memory(), found.structure.parameters.trained
    assert whole.total > room
    assert whole.parts["DeepSpeed's master copy"] == trained * 4 // 8
    change = next(found.changes(room))
    assert change.setting == "trainer.strategy.init_args.offload_optimizer=true"

    offloaded = Plan(replace(recipe, layout=recipe.layout.with_zero(ZeRO(3, offload_optimizer=True))))
    assert change.memory == offloaded.memory()
    less = whole.total - change.memory.total
    assert less == pytest.approx(trained * (4 + 4 + 8) / 8, rel=0.01)  # master copy, gradients, states
    node = trained * (4 + 2 * 4 + 8)  # gradients once more, where the step reads them
    assert 8 * sum(change.memory.host.values()) == pytest.approx(node, rel=1e-6)
    assert any(f"{node / 2**30:.2f} GiB of a node's host memory" in note for note in notes(offloaded))
    assert not any("asynchronous" in note for note in notes(offloaded))  # DeepSpeed's saves are not
    json.dumps(as_json(offloaded, []))


def test_fsdp2_is_suggested_over_the_same_gpus_first_and_over_more_with_how_to_get_them() -> None:
    def of(file: str) -> Plan:
        full = ("--model.init_args.speed.checkpointing", "full")
        return Plan(
            read(["--config", "recipes/sft.yaml", "--config", f"recipes/hardware/{file}.yaml", *SHALLOW, *full])
        )

    def suggested(plan: Plan, room: int) -> tuple[str, Memory]:
        """Changes of kinds that come later are not tried."""
        change = next(change for change in plan.changes(room) if change.setting.startswith("FSDP2"))
        return change.setting, change.memory

    sharded, copies, one = of("fsdp"), of("hsdp"), of("one_gpu")
    more = "trainer.num_nodes=2, data.init_args.batch_size=16, trainer.accumulate_grad_batches=1: 2 nodes of 8"
    for zero in (of("deepspeed"), of("deepspeed_zero3")):
        found = sharded.memory(averages=zero.averages)
        assert suggested(zero, found.total) == ("FSDP2 over 8 ranks (recipes/hardware/fsdp.yaml)", found)
        setting, _ = suggested(zero, found.total - 1)
        assert setting == f"FSDP2 over 16 ranks (recipes/hardware/fsdp.yaml with {more})"
    assert suggested(sharded, sharded.memory().total - 1)[0] == f"FSDP2 over 16 ranks ({more})"
    setting, _ = suggested(copies, copies.memory().total - 1)  # of two copies, one on each node
    assert setting == f"FSDP2 over 16 ranks (trainer.strategy.init_args.replicas=1, {more})"
    setting, _ = suggested(one, 80 * 2**30)
    assert setting.startswith("FSDP2 over 2 ranks (recipes/hardware/fsdp.yaml with trainer.devices=2, data")
