"""Previews: sampled clips with their reference images beside them, in TensorBoard (animated) and as MP4 files.

TensorBoard's own `add_video` needs a moviepy that no longer exists, so the animation is a GIF inside an image
summary; it is kept to 256 x 640 pixels and 16 frames, and the true clip lies beside it as
`<log dir>/samples/step-<number>/<prompt hash>.mp4` (`<log dir>/predict/samples/` from `idc predict`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from idc.callbacks.preemption import requested
from idc.callbacks.progress import show
from idc.data.ranks import data_place
from idc.models.sampling import to_uint8
from idc.types import Batch, Bucket, Sample

GIF_HEIGHT, GIF_WIDTH, GIF_FRAMES = 256, 640, 16
GAP = 2  # pixels between the parts of a panel


def panel(video_THWC: np.ndarray, references: list[np.ndarray], truth_THWC: np.ndarray | None = None) -> np.ndarray:
    """One animated panel `T H W C`: the references stacked at the left, the clip, and the true clip if given."""
    from PIL import Image

    frames, height = video_THWC.shape[:2]
    column: list[np.ndarray] = []
    cell = height // max(2, len(references))
    if references:
        strip = Image.new("RGB", (cell, height), "white")
        for k, reference in enumerate(references):
            picture = Image.fromarray(reference)
            picture.thumbnail((cell, cell))
            strip.paste(picture, (0, k * cell))
        column.append(np.broadcast_to(np.asarray(strip), (frames, height, cell, 3)))
    parts = [*column, video_THWC] + ([truth_THWC] if truth_THWC is not None else [])
    gap = np.full((frames, height, GAP, 3), 255, np.uint8)
    return np.concatenate([part for each in parts for part in (each, gap)][:-1], axis=2)


def gif(video_THWC: np.ndarray, fps: float) -> bytes:
    """An endless GIF of at most 16 frames and 256 x 640 pixels; small clips are enlarged with hard pixels."""
    from PIL import Image

    keep = np.linspace(0, len(video_THWC) - 1, min(len(video_THWC), GIF_FRAMES)).round().astype(int)
    height, width = video_THWC.shape[1:3]
    fit = min(GIF_HEIGHT / height, GIF_WIDTH / width)
    zoom = int(fit) if fit >= 1 else fit
    size = (round(width * zoom), round(height * zoom))
    how = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS
    pictures = [Image.fromarray(video_THWC[i]).resize(size, how) for i in keep]
    out = io.BytesIO()
    duration = round(1000 * len(video_THWC) / max(fps, 1e-6) / len(keep))
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return out.getvalue()


def add_animation(logger: Any, tag: str, video_THWC: np.ndarray, fps: float, step: int) -> None:
    """Write an animated panel into a TensorBoard logger's event file."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    data = gif(video_THWC, fps)
    image = Summary.Image(
        height=video_THWC.shape[1], width=video_THWC.shape[2], colorspace=3, encoded_image_string=data
    )
    logger.experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


class Previews(Callback):
    """Samples the first held-out conditions of every bucket after each validation, always from the same noise.

    Every rank writes the MP4 files of its share; the event file shows rank 0's.

    Args:
        count: how many conditions, over all buckets and ranks.
        every_n_steps: not more often than this, whatever the validation interval; 0 is after every validation.
        truth: put the held-out clip itself at the right of the panel.
        seed: of the noise.
    """

    def __init__(self, count: int = 8, every_n_steps: int = 0, truth: bool = True, seed: int = 0) -> None:
        self.count, self.every_n_steps, self.truth, self.seed = count, every_n_steps, truth, seed
        self._batches: dict[Bucket, list[Batch]] = {}
        self._last_step: int | None = None
        self._folder = Path()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Ranks go through the same buckets, so the sampling below runs the same forwards on all of them.
        kept = self._batches.setdefault(batch.bucket, [])
        if sum(map(len, kept)) < -(-self.count // data_place(trainer).ranks):
            kept.append(batch)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for sample, video_CTHW in zip(batch.samples[: len(batch) - batch.padding], outputs, strict=False):
            self._write(trainer, pl_module, sample, to_uint8(video_CTHW))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"Samples are in {self._folder}")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if trainer.sanity_checking or step == self._last_step or requested(trainer):
            return
        if self._last_step is not None and step - self._last_step < self.every_n_steps:
            return
        self._last_step = step
        self._enter(trainer)
        chosen = list(self._chosen(-(-self.count // data_place(trainer).ranks)))
        done, total = 0, sum(count for _, count in chosen)
        for batch, count in chosen:
            show(trainer, "sampling previews", done, total)
            self._preview(trainer, pl_module, batch, count)
            done += count
        self._batches = {}

    def _chosen(self, left: int) -> Iterator[tuple[Batch, int]]:
        """(batch, how many of its conditions), `left` in all: as many of each bucket as there are."""
        # The smallest bucket first, so that what it lacks goes to the others.
        for done, batches in enumerate(sorted(self._batches.values(), key=lambda kept: sum(map(len, kept)))):
            share = -(-left // (len(self._batches) - done))
            for batch in batches:
                if now := min(share, len(batch)):
                    yield batch, now
                share, left = share - now, left - now

    def _enter(self, trainer: Trainer) -> None:
        """Choose the folder. Asking for log_dir is a collective: all ranks, once."""
        run_dir = Path(trainer.log_dir or trainer.default_root_dir)
        # Outside of fit the run's folder is the command's own, and Lightning does not know the checkpoint's step.
        fitting = trainer.state.fn in (None, TrainerFn.FITTING)
        self._folder = run_dir / "samples" / (f"step-{trainer.global_step:06d}" if fitting else "")

    def _preview(self, trainer: Trainer, stage: Any, batch: Batch, count: int) -> None:
        real = min(count, len(batch) - batch.padding)
        samples = batch.samples[:count]
        videos = stage.sample_videos(samples, batch.bucket, batch.seeds_B[:count] + self.seed)
        for sample, video_CTHW in zip(samples[:real], videos[:real], strict=True):
            self._write(trainer, stage, sample, to_uint8(video_CTHW))

    def _write(self, trainer: Trainer, stage: Any, sample: Sample, video_THWC: np.ndarray) -> None:
        if not data_place(trainer).leads:
            return
        from idc.data.video import encode_video

        name = hashlib.sha256(f"{sample.id}\n{sample.caption}".encode()).hexdigest()[:12]
        first_time = not any(self._folder.parent.glob(f"*/{name}.mp4"))
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{name}.mp4").write_bytes(encode_video(video_THWC, fps=sample.fps))
        (self._folder / f"{name}.txt").write_text(sample.caption + "\n")
        if not trainer.is_global_zero:
            return
        truth = stage.decoded_truth(sample) if self.truth else None
        references = [to_uint8(subject.image_CHW) for subject in sample.subjects]
        shown = panel(video_THWC, references, None if truth is None else to_uint8(truth))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                add_animation(logger, f"previews/{name}", shown, sample.fps, trainer.global_step)
                if first_time:
                    logger.experiment.add_text(f"captions/{name}", sample.caption, trainer.global_step)
