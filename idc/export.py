"""`idc export RUN --out DIR`: a trained run as one pipeline folder, with the record of how it was trained beside it.

The folder is what `IDCrafterPipeline.from_pretrained` loads, and what `checkpoint` takes in the recipes for generation,
editing and alignment: safetensors and JSON, nothing that is unpickled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idc.errors import UserError, make_folder
from idc.models.saved import RECORD

if TYPE_CHECKING:
    from idc.models.checkpoints import Checkpoint, Which


def main(argv: Sequence[str] | None = None) -> int:
    """Run `idc export` with the arguments after that word. Returns the exit status: 0, or 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        record = export(
            arguments.run, arguments.out, arguments.weights, arguments.dtype, arguments.replace, arguments.note
        )
    except UserError as error:
        print(f"idc export: {error}", file=sys.stderr)
        return 2
    seen = f", {record['samples_seen']} samples seen" if record["samples_seen"] is not None else ""
    print(f"{arguments.out}: step {record['step']}{seen}, {record['bytes'] / 1e6:.1f} MB of weights")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="idc export", description="A trained run as one pipeline folder.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run of idc fit, one of its checkpoints, or a folder of runs")
    add("--out", type=Path, required=True, metavar="DIR", help="the pipeline's folder")
    add("--weights", choices=("ema", "raw"), default="ema", help="the averages, or the weights (default: ema)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights (default: float32)")
    add("--note", default=None, metavar="TEXT", help="kept in training.json, such as the device")
    add("--replace", action="store_true", help="write over a pipeline that is there")
    return parser


def export(
    run: str | Path,
    out: Path,
    weights: Which = "ema",
    dtype: str = "float32",
    replace: bool = False,
    note: str | None = None,
) -> Any:
    """Write the pipeline of a run and `training.json`.

    Args:
        run: as in `idc.models.checkpoints.find_checkpoint`.
        out: a folder that is empty or does not exist, unless `replace`.
        weights: "ema" or "raw".
        dtype: of the stored transformer; "bfloat16" halves the file and is rounded once, to what sampling in bfloat16
            would round in any case (`idc.models.rounding`).
        replace: write over what an earlier export left at `out`.
        note: kept in the record.

    Returns:
        the record: recipe, step, samples seen, held-out losses, versions, device, bytes.

    Raises:
        UserError: no checkpoint at `run`, or something else at `out`.
    """
    from idc.models.checkpoints import find_checkpoint
    from idc.models.pipeline import IDCrafterPipeline
    from idc.models.rounding import round_matrices

    if out.is_dir() and any(out.iterdir()) and not (replace and (out / RECORD).is_file()):
        rule = "is not a pipeline that idc export wrote" if replace else "is there; --replace writes over it"
        raise UserError(f"--out {out}: {rule}")
    checkpoint = find_checkpoint(run)
    make_folder(out)
    pipeline = IDCrafterPipeline.from_run(run, weights)
    if dtype == "bfloat16":
        round_matrices(pipeline.transformer)
    pipeline.save_pretrained(out)
    record = {**training_record(checkpoint), "weights": weights, "dtype": dtype, "note": note}
    record["bytes"] = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def training_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a checkpoint came about, as far as its run's folder tells; None for what it does not."""
    from idc.models.manifest import Manifest

    state, config = checkpoint.state, checkpoint.config

    try:
        manifest: Manifest | None = Manifest.read(state.parent)
    except ValueError:
        manifest = None
    step = manifest.step if manifest is not None else None
    batch = (((config or {}).get("data") or {}).get("init_args") or {}).get("batch_size")
    return {
        "step": step,
        "samples_seen": step * batch if step is not None and batch is not None else None,
        "seed": (config or {}).get("seed_everything"),
        "held_out_loss": _scalars(state.parent.parent.parent, "val/loss", step),
        "strategy": manifest.strategy if manifest is not None else None,
        "world_size": manifest.world_size if manifest is not None else None,
        "versions": dict(manifest.versions) if manifest is not None else None,
        "rewards": list(checkpoint.rewards),
        "recipe": {name: (config or {}).get(name) for name in ("model", "data")},
    }


def _scalars(run: Path, tag: str, last: int | None) -> dict[str, float] | None:
    """A TensorBoard curve by step, up to the step `last`; None where there is none."""
    if not list(run.glob("events.out.tfevents.*")):
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        return None
    return {str(e.step): round(e.value, 4) for e in events.Scalars(tag) if last is None or e.step <= last}
