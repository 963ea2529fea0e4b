"""The transformer sharded over two CPU ranks with FSDP2, where the ranks' samples have different conditions."""

from __future__ import annotations

import torch
import torch.distributed as dist
from _server import free_port, join, launch
from _tiny_wan import WAN, condition, inputs, tiny_model
from torch import Tensor

from idc.models.transformer import IDCrafterTransformer
from idc.types import Condition


def conditions() -> list[Condition]:
    """Rank 0's sample has two subjects and VLM tokens; rank 1's has lost both."""
    return [condition(batch=1), condition(sizes=(), batch=1, vlm_tokens=0)]


def loss(model: IDCrafterTransformer, rank: int) -> Tensor:
    latents, timestep, text = (part[rank : rank + 1] for part in inputs())
    return model(latents, timestep, text, condition=conditions()[rank]).sample.square().mean()


def count_gathers() -> list[None]:
    """A list that grows by one whenever FSDP gathers the weights of a unit."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    gather, calls = fsdp.foreach_all_gather, []

    def counted(*args, **named):
        calls.append(None)
        return gather(*args, **named)

    fsdp.foreach_all_gather = counted
    return calls


def train_sharded(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    full = tiny_model(id_layers=WAN["num_layers"])
    with torch.device("meta"):
        model = IDCrafterTransformer.from_config(full.config)
    for layer in [*model.blocks, *model.id_blocks]:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full.state_dict() if rank == 0 else {}, options=options)
    model.refresh_rotary_tables()
    model.enable_gradient_checkpointing()
    # Before any forward, after which the root's parameters are whole ones until the next backward.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        cache = model.eval().build_subject_cache(conditions()[0])
        arguments = [part[:1] for part in inputs()]
        cached = model(*arguments, subject_cache=cache).sample
        assert torch.equal(cached, model(*arguments, condition=conditions()[0]).sample)
    model.train()
    losses = []
    gathers = count_gathers()
    for _ in range(2):
        gathers.clear()
        value = loss(model, rank)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(value := value.detach())
        losses.append(value.item() / 2)
    model.init_id_blocks(seed=0)  # writes into the shards
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save({"losses": losses, "state": state, "gathers": len(gathers)}, out)
    dist.destroy_process_group()


def test_two_sharded_ranks_with_unlike_conditions_train_as_one_process(tmp_path):
    out, port = str(tmp_path / "sharded.pt"), free_port()
    assert join(launch(train_sharded, [(rank, port, out) for rank in range(2)])) == [0, 0]
    sharded = torch.load(out, weights_only=True)

    model = tiny_model(id_layers=WAN["num_layers"]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        value = (loss(model, 0) + loss(model, 1)) / 2
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[0] != losses[1]
    # Every unit forwards and backwards, the root once: a layer that is recomputed as a whole gathers nothing again.
    assert sharded["gathers"] == 2 * 2 * WAN["num_layers"] + 1
    torch.testing.assert_close(torch.tensor(sharded["losses"]), torch.tensor(losses), rtol=1e-5, atol=0)
    model.init_id_blocks(seed=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(sharded["state"][name], value, rtol=1e-4, atol=1e-6, msg=name)
