"""What ranks compute in the tests of scale-out, each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from _tiny_wan import VLM_DIM, WAN, condition, randomise
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing._internal.distributed.fake_pg import FakeStore

from idc.callbacks.ema import EMAWeights
from idc.errors import UserError
from idc.models.rounding import islands
from idc.models.sequence_parallel import exchange, spread_over
from idc.models.transformer import IDCrafterTransformer
from idc.models.weight_copy import local
from idc.stages.sharding import build_sharded, shard, weights_mesh
from idc.types import Condition

HEADS = 4
ONE_LAYER = {"num_layers": 1, "id_layers": 1}
# Name -> (settings of the model, latent frames of 4x6, time per token). Over 4 ranks: 18 tokens leave the last rank 3
# of 5, 6 tokens leave it none at all.
CASES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "padded": ({}, 3, False),
    "a rank of padding alone": ({}, 1, False),
    "a time per token": ({}, 3, True),
    "joint references": ({"id_joint_references": True}, 3, False),
    "even": ({"id_layers": 0}, 4, False),
}


def model_of(settings: dict[str, Any]) -> IDCrafterTransformer:
    """Of three layers with four heads; every parameter counts."""
    torch.manual_seed(0)
    arguments = {**WAN, "num_attention_heads": HEADS, "id_layers": 2, "vlm_dim": VLM_DIM, **settings}
    model = IDCrafterTransformer(**arguments)
    model.init_weights(0)
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    randomise(model)
    return model.train()


def case(name: str, data_rank: int) -> tuple[list[Tensor], Condition | None, Tensor]:
    """(latents, timestep and text; condition; target) of two samples, others for each data-parallel rank."""
    settings, frames, per_token = CASES[name]
    g = torch.Generator().manual_seed(10 + data_rank)
    latents = torch.randn(2, 4, frames, 4, 6, generator=g)
    times = (2, frames * 6) if per_token else (2,)
    arguments = [latents, torch.rand(times, generator=g) * 1000, torch.randn(2, 5, 16, generator=g)]
    given = None
    if settings.get("id_layers") != 0:
        given = condition(seed=data_rank)
        sizes = torch.tensor([[[4, 4], [2, 6]], [[2, 4], [2, 2]]])  # the second sample's are padded
        given = Condition(**{**vars(given), "reference_sizes_BN2": sizes})
    return arguments, given, torch.randn(latents.shape, generator=g)


def loss_of(model: IDCrafterTransformer, name: str, data_rank: int) -> tuple[Tensor, Tensor]:
    """(output, loss)."""
    arguments, given, target = case(name, data_rank)
    output = model(*arguments, condition=given).sample
    return output, (output - target).square().mean()


def spread(rank: int, world: int, port: int, out: str) -> None:
    """Every case on sequences of 4 ranks, and of 2 with different data: outputs, and gradients averaged over ranks.

    One rank of two cases compiles its layers, without inductor: its exchanges are those of its plain neighbour.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    results = {}
    for ranks, group, data_rank in _groups(rank, world):
        x = torch.randn(ranks, 3, 2).transpose(1, 2).requires_grad_()
        torch.library.opcheck(exchange, (x, group.group_name))
        for name, (settings, _, _) in CASES.items():
            model = model_of(settings)
            spread_over(model, group)
            if name == "padded":
                model.enable_gradient_checkpointing()
            if (rank, ranks) == (0, 2) and name in ("even", "joint references"):
                with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
                    model.run_layers("none", True)
                    output, loss = loss_of(model, name, data_rank)
            else:
                output, loss = loss_of(model, name, data_rank)
            loss.backward()
            gradients = {}
            for parameter_name, parameter in model.named_parameters():
                assert parameter.grad is not None, parameter_name
                dist.all_reduce(parameter.grad)
                gradients[parameter_name] = parameter.grad / world
            results[ranks, name] = (output.detach(), gradients)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def _groups(rank: int, world: int) -> Iterator[tuple[int, dist.ProcessGroup, int]]:
    """(ranks of a sequence, this rank's group, its data-parallel rank)."""
    yield world, dist.group.WORLD, 0
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    yield 2, pairs[rank // 2], rank // 2


def curve(model: IDCrafterTransformer, data_ranks: list[int], average: bool = False) -> list[float]:
    """Losses of 20 steps on the mean over the data of `data_ranks`; `average` takes the ranks' mean of gradients."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.stack([loss_of(model, "padded", data_rank)[1] for data_rank in data_ranks]).mean()
        loss.backward()
        if average:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            dist.all_reduce(every := parameters_to_vector(gradients))
            vector_to_parameters(every / dist.get_world_size(), gradients)
        optimizer.step()
        losses.append(loss.item())
    return losses


def curves(rank: int, world: int, port: int, out: str) -> None:
    """Those of sequences over 4 and 2 ranks, of weights sharded over 4, and of two replicas of two shards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    results = {}
    for ranks, group, data_rank in _groups(rank, world):
        spread_over(model := model_of(ONE_LAYER), group)
        results[f"sequences of {ranks}"] = curve(model, [data_rank], average=True)
    for name, sizes in {"shard": (world,), "replicate shard": (2, world // 2)}.items():
        names = tuple(name.split())
        shard(model := model_of(ONE_LAYER), init_device_mesh("cpu", sizes, mesh_dim_names=names))
        results[name] = curve(model, [rank])
    Path(out, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def told(rank: int, world: int, port: int, out: str) -> None:
    """What ranks raise where rank 0 cannot build, and how long the groups of all meshes wait."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    lightnings = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    limits: dict[str, float] = {}
    for replicas in (1, world):
        strategy: Any = SimpleNamespace(
            device_mesh=lightnings, root_device=torch.device("cpu"), replicas=replicas, _timeout=timedelta(hours=3)
        )
        for mesh in (weights_mesh(strategy), lightnings):
            for name in mesh.mesh_dim_names or ():
                options = mesh.get_group(name)._get_backend(torch.device("cpu")).options
                limits[f"{replicas} {name}"] = options._timeout.total_seconds()

    def build(device: str) -> IDCrafterTransformer:
        if device == "cpu":
            raise UserError("pretrained: no such weights")
        with torch.device(device):
            return model_of(ONE_LAYER)

    try:
        build_sharded(build, strategy)
        problem = ""
    except UserError as error:
        problem = str(error)
    Path(out, f"{rank}.json").write_text(json.dumps([problem, limits]))
    dist.destroy_process_group()


def count_14b(out: str) -> None:
    """Numbers and bytes of Wan2.1-14B with 20 blocks on rank 0 of 8, as JSON; no tensor has memory."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with torch.device("meta"):
        model = IDCrafterTransformer(vlm_dim=3584)  # the default sizes are the 14B model's
    units = {"embedder": model.condition_embedder, "layer": model.blocks[0], "id_block": model.id_blocks[0]}
    gathered = {
        name: sum(p.numel() for p in unit.parameters()) - sum(p.numel() for p in islands(unit))
        for name, unit in units.items()
    }
    shard(model, init_device_mesh("cpu", (8,), mesh_dim_names=("shard",)), torch.bfloat16)
    weights = [local(parameter.detach()) for parameter in model.parameters()]
    for weight in weights:
        weight.requires_grad_().grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(weights)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    averages = [local(average) for _, average in EMAWeights(model).named_buffers()]
    parts = {"weights": weights, "gradients": [w.grad for w in weights], "adamw": moments, "ema": averages}
    assert all(tensor.is_meta for part in parts.values() for tensor in part)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {
        "parameters": parameters,
        "gathered": gathered,  # numbers in bfloat16, of each of a kind; the root gathers the rest in float32
        "local": sum(weight.numel() for weight in weights),
        "bytes": {name: sum(tensor.nbytes for tensor in part) for name, part in parts.items()},
    }
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def _note_types(met: dict[str, torch.dtype], name: str, module: torch.nn.Module, _: Any) -> None:
    met.update({f"{name}.{key}": value.dtype for key, value in module.named_parameters(recurse=False)})


def losses_of(
    mesh: DeviceMesh, gathered: torch.dtype, rank: int, compiled: bool = False, fused: bool | None = None
) -> list[float]:
    """Of 20 steps of one layer with its block on one batch, under bfloat16 autocast; traced as one graph each, and
    recomputed, where `compiled`."""
    model, losses = model_of(ONE_LAYER), []
    shard(model, mesh, gathered)
    if compiled:
        model.run_layers("full", compiled=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            _, loss = loss_of(model, "padded", rank)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gather(rank: int, world: int, port: int, out: str) -> None:
    """One pass under bfloat16 autocast, its layers recomputed, with weights gathered in either type: rank 0's output,
    all gradients, and the types of the parameters that modules compute with. And the losses of 20 steps in either type,
    with compiled layers (without inductor), and with a fused optimiser."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    results: dict[Any, Any] = {g: losses_of(mesh, g, rank) for g in (torch.float32, torch.bfloat16)}
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        results["compiled"] = losses_of(mesh, torch.bfloat16, rank, compiled=True)
    results["fused"] = losses_of(mesh, torch.bfloat16, rank, fused=True)
    results["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in ("padded", "even"):
        for gathered in (torch.float32, torch.bfloat16):
            model = model_of(CASES[name][0])
            model.enable_gradient_checkpointing()
            shard(model, mesh, gathered)
            met: dict[str, torch.dtype] = {}
            for module_name, module in model.named_modules():
                module.register_forward_pre_hook(partial(_note_types, met, module_name))
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                output, loss = loss_of(model, name, rank)
            loss.backward()
            gradients = {key: value.grad.full_tensor() for key, value in model.named_parameters()}
            assert all(value.grad.dtype is value.dtype is torch.float32 for value in model.parameters())
            assert not [key for key in model.state_dict() if key.startswith("islands")]
            results[name, gathered] = (output.detach(), gradients, met)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()
