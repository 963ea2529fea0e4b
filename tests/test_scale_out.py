"""Many ranks compute what one does: sequences spread over ranks, weights sharded and replicated, 14B on 8 devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _scale_out_worker import CASES, loss_of, model_of, spread
from _server import free_port, join, launch
from _sft_worker import Fit, callbacks, merge, tiny_overlay

from idc.callbacks.resume import consolidate
from idc.errors import UserError
from idc.models.sequence_parallel import check_heads


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


@pytest.mark.parametrize(
    ("heads", "ranks", "says"), [(40, 3, "is 2 (of 2, 4, 5, 8, 10, 20, 40)"), (12, 8, "is 6 (of 2, 3, 4, 6, 12)")]
)
def test_heads_that_do_not_divide_over_the_ranks_are_refused(heads, ranks, says):
    with pytest.raises(UserError, match=f"tensor_parallel_size={ranks}: .*{heads} attention heads") as error:
        check_heads(heads, ranks)
    assert says in str(error.value)
    check_heads(heads, 4)


# A whole run --------------------------------------------------------------------------------------------------------


def run(
    folder: Path, data: Path, steps: int, strategy: dict[str, Any] | None = None, args: tuple[str, ...] = ()
) -> Fit:
    """SFT of a tiny transformer to its end; on four ranks with a `strategy`, on one without."""
    changes: dict[str, Any] = {"trainer": {"max_steps": steps, "val_check_interval": 4, "gradient_clip_val": 0.5}}
    if strategy is not None:
        entry = {"class_path": "idc.stages.sharding.FSDP2", "init_args": strategy}
        changes["trainer"] |= {"devices": 4, "strategy": entry}
    overlay = merge(tiny_overlay(data, folder / "runs"), callbacks(save_every=2, count=2), changes)
    made = Fit(folder, overlay, args, ranks=1 if strategy is None else 4)
    assert made.finish() == [0] * made.ranks, made.errors()
    return made


def weights(run: Fit, step: int) -> dict[str, torch.Tensor]:
    """All weights, the averaged ones among them."""
    checkpoint = run.run / "checkpoints" / f"step-{step:08d}"
    path = checkpoint / "state.ckpt"
    path = consolidate(checkpoint) if path.is_dir() else path
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def alone(toy_data, tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), toy_data, steps=4)


def test_replicas_of_shards_with_sequences_over_ranks_train_and_sample_as_one_rank(alone, toy_data, tmp_path):
    """2 replicas x 2 shards of the weights, 2 batches x 2 ranks of a sequence; then resumed as 4 batches."""
    both = run(tmp_path / "both", toy_data, 4, {"replicas": 2, "tensor_parallel_size": 2})
    assert both.losses() == pytest.approx(alone.losses(), rel=1e-5)
    assert len(set(alone.losses())) == 4
    assert both.validation()[4] == pytest.approx(alone.validation()[4], rel=1e-5)
    assert both.steps(0) == both.steps(1)
    assert not set(both.steps(0)[1]["ids"]) & set(both.steps(2)[1]["ids"])

    checkpoint = str(both.run / "checkpoints" / "step-00000002")
    resumed = run(tmp_path / "resumed", toy_data, 4, {"replicas": 2}, ("--ckpt_path", checkpoint))
    assert resumed.losses() == pytest.approx(alone.losses()[2:], rel=1e-5)
    expected = weights(alone, 4)
    for other in (both, resumed):
        found = weights(other, 4)
        assert found.keys() == expected.keys()
        assert any(name.startswith("ema.") for name in found)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
