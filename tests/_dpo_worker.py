"""DPO runs for tests: through the recipe and the command line, in processes of their own, on tiny pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _sft_worker import BUCKET, ROOT, Fit, callbacks, merge, shards

RECIPE = ROOT / "recipes" / "dpo.yaml"


@dataclass(frozen=True)
class DPOFit(Fit):
    """A run of `recipes/dpo.yaml`."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "dpo" / "version_0"

    def command(self) -> list[str]:
        command = super().command()
        assert command[1] == "--config"
        return [*command[:2], str(RECIPE), *command[3:]]


def overlay(data: Path, start: Path, runs: Path, steps: int = 5, **model: Any) -> dict[str, Any]:
    """What makes the recipe tiny: pairs under `data`, where `again` has the conditions of `held_out`, from the model
    `start`, a checkpoint every other step."""
    changes = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "val_check_interval": 2,
            "log_every_n_steps": 1,
            "logger": {"init_args": {"save_dir": str(runs)}},
        },
        "model": {
            "init_args": {
                "checkpoint": str(start),
                "optimizer": {"init_args": {"lr": 1.0e-3}},
                "schedule": {"warmup_steps": 0},
                "sampling": {"steps": 2},
                **model,
            }
        },
        "data": {
            "init_args": {
                "sources": [shards(str(data / "train"))],
                "val_sources": [shards(str(data / name)) for name in ("held_out", "again")],
                "buckets": [BUCKET],
                "batch_size": 4,
                "val_batch_size": 4,
                "features": str(data / "features"),
                "quarantine": str(runs / "quarantine.jsonl"),
            }
        },
    }
    own = callbacks(save_every=2, count=1)
    own["trainer"]["callbacks"].append(
        {"class_path": "idc.callbacks.hacking.HackingMonitor", "init_args": {"rise": 10.0}}
    )
    return merge(changes, own)
