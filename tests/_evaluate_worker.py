"""What the tests of evaluation share: small metrics that leave traces, folders of videos, runs that can be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _server import free_port, join, launch
from lightning.pytorch import Trainer

from idc.data.benchmark import Item, write_items
from idc.data.video import encode_video
from idc.errors import UserError
from idc.metrics.base import Clip, Score, VideoMetric, sampled
from idc.metrics.results import Run, read_run
from idc.stages.evaluate import Evaluate


class Traced(VideoMetric):
    """A metric that writes a line to `trace` for every score, with what is loaded and how large the frames' cache is.

    `kill_after` scores of a process, it sends itself `kill_signal`.
    """

    loaded: tuple[str, ...] = ()  # names, over all metrics of the process
    scores = 0

    def __init__(
        self, trace: str = "", kill_after: int = 0, frames: int | None = None, kill_signal: int = signal.SIGKILL
    ) -> None:
        super().__init__()
        self._trace, self._kill_after, self._kill_signal, self.frames = trace, kill_after, kill_signal, frames

    def value(self, clip: Clip) -> Score:
        return Score(float(sampled(clip, self.frames).mean() / 255), details={"frames": len(clip.frames_THWC)})

    def score(self, clip: Clip) -> Score:
        if self._trace:
            held = sum(path.stat().st_size for path in Path(self._trace).parent.rglob("*.rgb"))
            line = {"metric": self.name, "id": clip.id, "loaded": Traced.loaded, "held": held}
            with open(self._trace, "a") as file:
                file.write(json.dumps(line) + "\n")
        Traced.scores += 1
        if self._kill_after and Traced.scores > self._kill_after:
            os.kill(os.getpid(), self._kill_signal)
        return self.value(clip)


class Brightness(Traced):
    """Mean of all pixels: loads nothing."""

    name = "brightness"


class Contrast(Traced):
    """Stands for a metric with a network."""

    name = "contrast"
    models = ("a network",)

    def __init__(self, trace: str = "", kill_after: int = 0, frames: int | None = 4, scale: float = 1.0) -> None:
        super().__init__(trace, kill_after, frames)
        self.scale = scale

    def load(self, device: torch.device | str = "cpu") -> None:
        if self.name not in Traced.loaded:
            Traced.loaded = (*Traced.loaded, self.name)

    def unload(self) -> None:
        Traced.loaded = tuple(name for name in Traced.loaded if name != self.name)

    def value(self, clip: Clip) -> Score:
        assert self.name in Traced.loaded
        return Score(self.scale * float(sampled(clip, self.frames).std() / 255))


class Likeness(Contrast):
    """Looks at the references, and writes into its frames."""

    name = "likeness"

    def value(self, clip: Clip) -> Score:
        frames = sampled(clip, self.frames)
        pictures = [reference.image_HWC.mean() / 255 for reference in clip.references]
        value = 1 - abs(float(np.mean(pictures)) - float(frames.mean() / 255))
        frames[:] = 0
        return Score(value, details={"kinds": [r.kind for r in clip.references], "pictures": np.array(pictures)})


class SingleOnly(Brightness):
    """Applies to one category."""

    name = "single_only"

    def applies(self, clip: Clip) -> bool:
        return clip.category == "single"


class Prose(Brightness):
    """A judge that answers prose to one item, raises at another and gives no number for a third."""

    name = "prose"

    def value(self, clip: Clip) -> Score:
        if clip.id == "v1":
            return Score.failed("the judge said 'a lovely video' in place of a score", answers=["a lovely video"])
        if clip.id == "v2":
            raise RuntimeError("out of\nmemory")
        return Score(7.0 if clip.id == "v3" else 0.5)


class NoWeights(Contrast):
    """Its folder of weights lacks a file."""

    name = "no_weights"

    def load(self, device: torch.device | str = "cpu") -> None:
        raise UserError("weights/: lacks model.safetensors")


def clip_of(number: int, frames: int = 5, side: int = 32) -> np.ndarray:
    """A clip `[T, H, W, 3]` whose frames differ."""
    ramp = np.linspace(0, 255, frames * side * side * 3).reshape(frames, side, side, 3)
    return np.roll(ramp, 7 * number, 2).astype(np.uint8) // (1 + number % 3)


def make_folder(folder: Path, count: int = 4, frames: int = 5) -> list[Item]:
    """Videos v0, v1, ... with items.jsonl; one reference each, a category in turn."""
    from PIL import Image

    (folder / "references").mkdir(parents=True)
    items = []
    for number in range(count):
        path = folder / "references" / f"v{number}.png"
        Image.fromarray(clip_of(number)[0]).save(path)
        (folder / f"v{number}.mp4").write_bytes(encode_video(clip_of(number, frames), 8, pixel_format="yuv444p"))
        category = ("single", "two")[number % 2]
        items.append(Item(f"v{number}", f"clip {number}", (path,), ("thing",), ("object",), category))
    write_items(folder, items)
    return items


def evaluate(out: Path, metrics: Sequence[VideoMetric], videos: Path | None = None, **settings: Any) -> tuple[Run, int]:
    """Evaluate in this process; the run and the exit status."""
    settings = {"videos": None if videos is None else str(videos), "out": str(out), **settings}
    stage = Evaluate(list(metrics), **settings)
    trainer_of(1, out).test(stage, verbose=False)
    return read_run(out), stage.exit_status


def trainer_of(ranks: int, folder: Path) -> Trainer:
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def evaluate_apart(
    out: Path, videos: Path, metrics: Sequence[tuple[type[Traced], dict[str, Any]]], ranks: int = 1, kill_rank: int = -1
) -> list[int | None]:
    """Evaluate in `ranks` processes; their exit codes. `kill_after` of a metric holds for `kill_rank` alone."""
    port = free_port()
    calls = [(out, videos, metrics, ranks, rank, port, rank == kill_rank) for rank in range(ranks)]
    return join(launch(_rank, calls), 60)


def _rank(out: Path, videos: Path, metrics: Any, ranks: int, rank: int, port: int, killed: bool) -> None:
    torch.set_num_threads(1)
    if ranks > 1:  # so told, Lightning takes this process as a rank and starts no others
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        os.environ["WORLD_SIZE"] = str(ranks)
    made = [kind(**(settings if killed else {**settings, "kill_after": 0})) for kind, settings in metrics]
    stage = Evaluate(made, videos=str(videos), out=str(out))
    with open(out.parent / f"{out.name}-{rank}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        trainer_of(ranks, out).test(stage, verbose=False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(stage.exit_status)


def traces(trace: Path) -> list[dict[str, Any]]:
    """All scores that were computed, over all processes."""
    return [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
