"""Many ranks compute what one does: sequences spread over ranks, weights sharded and replicated, 14B on 8 devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _four_steps import check_equal, make_run
from _scale_out_worker import CASES, ONE_LAYER, count_14b, curve, curves, gather, loss_of, model_of, spread, told
from _server import free_port, join, launch
from _sft_worker import Fit
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from idc.data.video import decode_video
from idc.errors import UserError
from idc.models.sequence_parallel import check_heads
from idc.stages.sharding import FSDP2, sequence_ranks


@pytest.fixture(scope="module")
def spread_results(tmp_path_factory):
    out, port = tmp_path_factory.mktemp("spread"), free_port()
    assert join(launch(spread, [(rank, 4, port, str(out)) for rank in range(4)])) == [0] * 4
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_sequence_spread_over_ranks_has_the_outputs_and_gradients_of_one_rank(spread_results, name, ranks):
    model = model_of(CASES[name][0])
    groups = 4 // ranks
    outputs = []
    for data_rank in range(groups):
        output, loss = loss_of(model, name, data_rank)
        (loss / groups).backward()
        outputs.append(output.detach())
    for rank, results in enumerate(spread_results):
        output, gradients = results[ranks, name]
        torch.testing.assert_close(output, outputs[rank // ranks], rtol=1e-5, atol=1e-5)
        for parameter_name, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[parameter_name], parameter.grad, rtol=1e-4, atol=1e-6, msg=f"{rank} {parameter_name}"
            )


def test_twenty_steps_over_ranks_have_the_losses_of_one(tmp_path):
    """Sequences of 4 and of 2, shards over 4, and two replicas of two shards; the mean over all that have own data."""
    port = free_port()
    assert join(launch(curves, [(rank, 4, port, str(tmp_path)) for rank in range(4)])) == [0] * 4
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    for name, groups in {"sequences of 4": 1, "sequences of 2": 2, "shard": 4, "replicate shard": 4}.items():
        expected = curve(model_of(ONE_LAYER), [*range(groups)])
        means = [sum(losses) / 4 for losses in zip(*(each[name] for each in found), strict=True)]
        assert means == pytest.approx(expected, rel=1e-5), name
        assert expected[-1] < 0.5 * expected[0]


def test_what_rank_0_cannot_build_ends_all_ranks_and_every_group_waits_as_long_as_the_strategy(tmp_path):
    port = free_port()
    assert join(launch(told, [(rank, 2, port, str(tmp_path)) for rank in range(2)])) == [0] * 2
    for rank in range(2):
        problem, limits = json.loads((tmp_path / f"{rank}.json").read_text())
        assert problem == "pretrained: no such weights"
        assert len(limits) == 7
        assert set(limits.values()) == {3 * 3600}


def test_gathering_in_bfloat16_computes_what_autocast_computes_from_float32(tmp_path):
    """Two ranks, layers recomputed, with the hierarchy on two subjects and without it; and 20 steps, also with each
    block as one graph within FSDP's hooks, and with a fused optimiser."""
    out, port = str(tmp_path / "gathered.pt"), free_port()
    assert join(launch(gather, [(rank, 2, port, out) for rank in range(2)])) == [0] * 2
    results = torch.load(out, weights_only=True)
    assert results[torch.bfloat16] == pytest.approx(results[torch.float32], rel=0.005)
    assert results[torch.float32][-1] < 0.5 * results[torch.float32][0]
    assert results["compiled"] == results[torch.bfloat16]
    assert results["fused"] == pytest.approx(results[torch.bfloat16], rel=0.005)
    assert results["graphs"] == 2  # Wan's block, and the one after it
    for name in ("padded", "even"):
        (expected, gradients, _), (output, found, met) = (
            results[name, gathered] for gathered in (torch.float32, torch.bfloat16)
        )
        assert torch.equal(output, expected)
        several = ("intra_attn.to_out", "inter_attn.to_out")  # used once a subject: their gradients' sum is rounded
        for parameter, gradient in gradients.items():
            if any(part in parameter for part in several):
                assert (found[parameter] - gradient).norm() < 2**-8 * gradient.norm(), parameter
            else:
                assert torch.equal(found[parameter], gradient), parameter
        islands = {key for key, dtype in met.items() if dtype is torch.float32}
        assert {key for key in met if "norm" in key or "scale_shift" in key or "time_embedder" in key} <= islands
        matrices = {key for key in met if "blocks" in key and key.endswith(".weight")} - islands
        assert len(matrices) == 3 * 10 + (2 * 13 if name == "padded" else 0)


@pytest.mark.parametrize(
    ("heads", "ranks", "says"), [(40, 3, "is 2 (of 2, 4, 5, 8, 10, 20, 40)"), (12, 8, "is 6 (of 2, 3, 4, 6, 12)")]
)
def test_heads_that_do_not_divide_over_the_ranks_are_refused(heads, ranks, says):
    with pytest.raises(UserError, match=f"tensor_parallel_size={ranks}: .*{heads} attention heads") as error:
        check_heads(heads, ranks)
    assert says in str(error.value)
    check_heads(heads, 4)


# A whole run --------------------------------------------------------------------------------------------------------


def run(folder: Path, data: Path, strategy: dict[str, Any], args: tuple[str, ...] = ()) -> Fit:
    """On four ranks, to its end."""
    made = make_run(folder, data, 4, strategy, args=args)
    assert made.finish() == [0] * 4, made.errors()
    return made


def previews(run: Fit) -> dict[str, np.ndarray]:
    """Pixels by file, of the last step."""
    return {path.name: decode_video(path).astype(int) for path in run.run.glob("samples/step-000004/*.mp4")}


def test_replicas_of_shards_with_sequences_over_ranks_train_and_sample_as_one_rank(one_rank, toy_data, tmp_path):
    """2 replicas x 2 shards of the weights, 2 batches x 2 ranks of a sequence; then resumed as 4 batches."""
    both = run(tmp_path / "both", toy_data, {"replicas": 2, "tensor_parallel_size": 2})
    assert both.losses() == pytest.approx(one_rank.losses(), rel=1e-5)
    assert len(set(one_rank.losses())) == 4
    assert both.validation()[4] == pytest.approx(one_rank.validation()[4], rel=1e-5)
    assert both.steps(0) == both.steps(1)
    assert not set(both.steps(0)[1]["ids"]) & set(both.steps(2)[1]["ids"])

    pictures, expected_pictures = (previews(run) for run in (both, one_rank))
    shared = pictures.keys() & expected_pictures.keys()
    assert len(pictures) == 2
    assert shared
    for name in shared:
        assert abs(pictures[name] - expected_pictures[name]).max() <= 3

    checkpoint = str(both.run / "checkpoints" / "step-00000002")
    resumed = run(tmp_path / "resumed", toy_data, {"replicas": 2}, ("--ckpt_path", checkpoint))
    assert resumed.losses() == pytest.approx(one_rank.losses()[2:], rel=1e-5)
    for other in (both, resumed):
        check_equal(other, one_rank)


# Sizes --------------------------------------------------------------------------------------------------------------


def strategy_of(nodes: int, devices: int, **settings: Any) -> FSDP2:
    """As Lightning connects it, up to where processes would start."""
    strategy = FSDP2(**settings)
    strategy.num_nodes, strategy.parallel_devices = nodes, [torch.device("cpu")] * devices
    strategy.cluster_environment = TorchElasticEnvironment()
    strategy._configure_launcher()
    return strategy


@pytest.mark.parametrize(
    ("nodes", "devices", "settings", "sizes"),
    [
        (1, 8, {}, (8, 1, 1)),
        (4, 8, {"replicas": "nodes"}, (32, 1, 4)),
        (2, 8, {"replicas": 4, "tensor_parallel_size": 8, "data_parallel_size": 2}, (2, 8, 4)),
        (1, 1, {"replicas": "nodes"}, (1, 1, 1)),
    ],
)
def test_sizes_follow_from_nodes_and_devices(nodes, devices, settings, sizes):
    strategy = strategy_of(nodes, devices, **settings)
    assert (strategy._data_parallel_size, sequence_ranks(strategy), strategy.replicas) == sizes


@pytest.mark.parametrize(
    ("nodes", "devices", "settings", "says"),
    [
        (1, 8, {"tensor_parallel_size": 3}, r"tensor_parallel_size=3: must divide the 8 ranks.*choice is 2"),
        (2, 8, {"replicas": 3}, r"replicas=3: must divide the 16 ranks \(2 nodes of 8 devices\).*choice is 2"),
        (1, 4, {"data_parallel_size": 8}, r"data_parallel_size=8: 4 ranks \(1 node of 4 devices\).*make 4"),
        (1, 4, {"replicas": 0}, r"replicas=0: must be 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_the_ranks_are_refused_before_any_process_starts(nodes, devices, settings, says):
    with pytest.raises(UserError, match=says):
        strategy_of(nodes, devices, **settings)


def test_14b_with_its_blocks_fits_eight_devices_of_80_gb(tmp_path):
    """On meta devices over a fake process group: the bytes that rank 0, which holds the most, would allocate."""
    assert join(launch(count_14b, [(str(tmp_path / "14b.json"),)])) == [0]
    found = json.loads((tmp_path / "14b.json").read_text())
    dim, hidden, text, vlm, patch, frequencies = 5120, 13824, 4096, 3584, 16 * 4, 256

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    attention = 4 * linear(dim, dim)
    layer = 2 * attention + linear(dim, hidden) + linear(hidden, dim)
    block = 3 * attention + linear(dim, dim)  # stages, gate
    embedder = linear(text, dim) + linear(dim, dim) + linear(dim, 6 * dim)  # text, times' modulations
    assert found["gathered"] == {"embedder": embedder, "layer": layer, "id_block": block}
    root = linear(patch, dim) + linear(frequencies, dim) + linear(dim, dim)  # patches, times
    root += 2 * dim + linear(dim, patch) + 4 * dim  # head, subjects
    root += 2 * vlm + linear(vlm, dim) + linear(dim, dim)
    root += 40 * (4 * dim + 2 * dim + 6 * dim) + 20 * (6 * dim + 4 * 2 * dim)  # norms of queries, keys, videos; tables
    assert found["parameters"] == embedder + 40 * layer + 20 * block + root == 21_151_602_752

    # Rank 0 has the whole of what is a single row (modulations), and an eighth of the rest.
    share = found["local"]
    assert found["parameters"] / 8 <= share < 1.001 * found["parameters"] / 8
    assert found["bytes"] == {"weights": 4 * share, "gradients": 4 * share, "adamw": 8 * share, "ema": 4 * share}
    state = sum(found["bytes"].values())
    assert 52.8e9 < state < 53e9
    # With the averages in host memory. Gathered are the root and its gradients, a layer with its block, and the layer
    # before it; a layer's gradients, and those of one that are being scattered in float32.
    gathered = 2 * 4 * root + 2 * (2 * layer + block) + 2 * layer + 4 * layer
    assert state - found["bytes"]["ema"] + gathered < 0.59 * 80e9, "less than 33 GB are left for activations"
