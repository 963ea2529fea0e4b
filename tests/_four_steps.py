"""A whole run of SFT of four steps, which tests of ranks, replicas, sequences and restarts compare with one rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _sft_worker import Fit, callbacks, merge, tiny_overlay

from idc.callbacks.resume import consolidate

STEPS = 4
CHANGES: dict[str, Any] = {"trainer": {"max_steps": STEPS, "val_check_interval": STEPS, "gradient_clip_val": 0.05}}


def make_run(
    folder: Path,
    data: Path,
    ranks: int = 1,
    strategy: dict[str, Any] | None = None,
    extra: tuple[dict[str, Any], ...] = (),
    args: tuple[str, ...] = (),
) -> Fit:
    """Saved at steps 2 and 4; with arguments of FSDP2 in `strategy`, ranks keep their shards of the averages in host
    memory. `extra` are further callbacks."""
    overlay = merge(tiny_overlay(data, folder / "runs"), callbacks(save_every=2, count=2), CHANGES)
    overlay["trainer"]["callbacks"] += extra
    if strategy is not None:
        entry = {"class_path": "idc.stages.sharding.FSDP2", "init_args": strategy}
        overlay = merge(overlay, {"trainer": {"devices": ranks, "strategy": entry}})
        overlay["trainer"]["callbacks"][0]["init_args"]["offload"] = True
    return Fit(folder, overlay, args, ranks=ranks)


def weights(run: Fit, step: int) -> dict[str, torch.Tensor]:
    """All weights, the averaged ones among them."""
    checkpoint = run.run / "checkpoints" / f"step-{step:08d}"
    path = checkpoint / "state.ckpt"
    path = consolidate(checkpoint) if path.is_dir() else path
    return torch.load(path, weights_only=True)["state_dict"]


def check_equal(run: Fit, alone: Fit) -> None:
    """The last weights and averages of `run` are those of one rank, up to the order of sums."""
    expected, found = weights(alone, STEPS), weights(run, STEPS)
    assert found.keys() == expected.keys()
    assert any(name.startswith("ema.") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
