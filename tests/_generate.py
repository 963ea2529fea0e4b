"""Tiny trained runs, and generation from them through the command line, here or in processes of their own."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _server import free_port, join, launch
from _sft_worker import ROOT, WORLD, Fit, callbacks, fit_here, merge, one_thread, tiny_overlay

from idc.cli import main

GENERATE, EDIT = ROOT / "recipes" / "generate.yaml", ROOT / "recipes" / "edit.yaml"
SIZE = ["--data.init_args.frames=5", "--data.init_args.height=32", "--data.init_args.width=32"]


def tiny_run(data: Path, folder: Path, **model: Any) -> Path:
    """A finished run of six steps: its averages differ from its weights, and O3 is no longer zero."""
    changes = {"trainer": {"max_steps": 6, "limit_val_batches": 0}, "model": {"init_args": model}}
    run = Fit(folder, merge(tiny_overlay(data, folder / "runs"), callbacks(save_every=6), changes))
    assert fit_here(run) == 0
    return run.run


def held_out(data: Path, **settings: Any) -> list[str]:
    """The toy shards of the tests as items."""
    source = f"{{class_path: idc.data.sources.ToyShards, init_args: {_flow(toy_settings(data))}}}"
    extra = "".join(f", {name}: {str(value).lower()}" for name, value in settings.items())
    items = f"{{class_path: idc.data.item_sources.Shards, init_args: {{shards: {source}{extra}}}}}"
    return ["--data.init_args.items", items]


def toy_settings(data: Path) -> dict[str, Any]:
    return {"path": f"{data}/held_out", "count": 8, "seed": 1_000_000, **WORLD}


def _flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"


def command(out: Path, run: Path | str, *args: str, recipe: Path = GENERATE) -> list[str]:
    """The arguments of `idc`, on the CPU."""
    model = [f"--model.init_args.out={out}", f"--model.init_args.checkpoint={run}"]
    return ["predict", "--config", str(recipe), "--trainer.accelerator=cpu", *SIZE, *model, *args]


def here(out: Path, run: Path | str, *args: str, recipe: Path = GENERATE) -> int:
    """Run it in this process; its exit status."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with one_thread():
            return main(command(out, run, *args, recipe=recipe))
    finally:
        os.chdir(before)


def direct(out: Path, checkpoint: Path | str | None, items: Any, edit: bool = False, **settings: Any) -> Any:
    """Run it in this process without the command line, whose parser takes a second; the stage afterwards.

    Args:
        items: of `GenerationData`; `settings` are those of the stage, and of the data those named in `DATA`.
    """
    from lightning.pytorch import Trainer

    from idc.data.requests import GenerationData
    from idc.stages.generate import Edit, Encoding, Generate

    data = {"frames": 5, "height": 32, "width": 32} | {k: settings.pop(k) for k in DATA if k in settings}
    settings.setdefault("encoding", Encoding(crf=0, pixel_format="yuv444p"))
    stage = (Edit if edit else Generate)(str(out), checkpoint=checkpoint and str(checkpoint), **settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with one_thread():
        trainer = Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet)
        trainer.predict(stage, datamodule=GenerationData(items, **data), return_predictions=False)
    return stage


DATA = ("frames", "height", "width", "fps", "seed", "reference_area")


def toy_items(data: Path, **settings: Any) -> Any:
    """The toy shards of the tests, as `held_out` names them."""
    from idc.data.item_sources import Shards
    from idc.data.sources import ToyShards

    return Shards(ToyShards(**toy_settings(data)), **settings)


def apart(arguments: Sequence[str], log: Path, ranks: int = 1, kill_after: int = 0, timeout: float = 90) -> list[Any]:
    """Run it in processes of their own; the exit status of each rank.

    Args:
        kill_after: the process is killed (-9) in the middle of writing its video of that number, from 1.
    """
    port = free_port()
    calls = [(list(arguments), str(log), rank, ranks, port, kill_after) for rank in range(ranks)]
    return join(launch(_rank, calls), timeout)


def _rank(arguments: list[str], log: str, rank: int, ranks: int, port: int, kill_after: int) -> None:
    torch.set_num_threads(1)
    if ranks > 1:  # so told, Lightning takes this process as a rank and starts no others
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        os.environ["WORLD_SIZE"] = str(ranks)
    for number in (1, 2):
        os.dup2(os.open(f"{log}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    if kill_after:
        _place_kill(kill_after)
    code = main(arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.exit(code)


def _place_kill(number: int) -> None:
    """Kill this process when half of its video of that number is on disk, under whatever name."""
    import signal
    from collections.abc import Iterator
    from contextlib import contextmanager

    from idc.data import output, storage

    whole, count = storage.open_atomic, [0]

    @contextmanager
    def half(path: str) -> Iterator[Any]:
        with whole(path) as stream:
            if path.endswith(".mp4") and "sources" not in path:
                count[0] += 1
                if count[0] == number:
                    stream.write(b"half of a video")
                    stream.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            yield stream

    output.storage.open_atomic = half  # type: ignore[attr-defined]


def contents(folder: Path) -> dict[str, str]:
    """Hash by relative path of all files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def videos(folder: Path) -> dict[str, str]:
    """Hash by name of the videos."""
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".mp4") and "/" not in name}
