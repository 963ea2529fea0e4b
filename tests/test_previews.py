"""Previews: what is written into the event file is read back as the animation that it was."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from idc.callbacks.previews import add_animation, gif, panel, to_uint8


def frames_of(data: bytes) -> list[np.ndarray]:
    picture = Image.open(io.BytesIO(data))
    found = []
    for i in range(getattr(picture, "n_frames", 1)):
        picture.seek(i)
        found.append(np.asarray(picture.convert("RGB")))
    return found


def flat_colours(frames: int, height: int, width: int) -> np.ndarray:
    video = np.zeros((frames, height, width, 3), np.uint8)
    for t in range(frames):
        video[t] = (3 * t, 255 - 3 * t, 128)
    return video


@pytest.mark.parametrize(
    ("frames", "side", "shown", "edge"), [(1, 16, 1, 256), (9, 64, 9, 256), (81, 480, 16, 256), (3, 100, 3, 200)]
)
def test_a_gif_keeps_colours_and_stays_within_its_limits(frames: int, side: int, shown: int, edge: int) -> None:
    video = flat_colours(frames, side, side) // 2
    decoded = frames_of(gif(video, fps=8))
    assert len(decoded) == shown
    assert decoded[0].shape == (edge, edge, 3)
    keep = np.linspace(0, frames - 1, shown).round().astype(int)
    for picture, t in zip(decoded, keep, strict=True):
        assert np.abs(picture.astype(int) - video[t, 0, 0]).max() <= 8  # a palette of 256 colours


def test_the_animation_in_the_event_file_is_the_gif(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="run")
    video = flat_colours(5, 32, 48)
    add_animation(logger, "previews/x", video, fps=8, step=7)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    (event,) = events.Images("previews/x")
    assert event.step == 7
    assert event.encoded_image_string == gif(video, 8)


def test_a_panel_puts_the_references_beside_the_clip_and_the_truth() -> None:
    video, truth = np.full((3, 64, 64, 3), 10, np.uint8), np.full((3, 64, 64, 3), 90, np.uint8)
    references = [np.full((32, 32, 3), 200, np.uint8), np.full((32, 16, 3), 50, np.uint8)]
    shown = panel(video, references, truth)
    assert shown.shape == (3, 64, 32 + 2 + 64 + 2 + 64, 3)
    assert (shown[:, :32, :32] == 200).all()
    assert (shown[:, 32:, :16] == 50).all()
    assert (shown[:, 32:, 16:32] == 255).all()
    assert (shown[:, :, 34:98] == 10).all()
    assert (shown[:, :, 100:] == 90).all()
    assert (shown[:, :, [32, 33, 98, 99]] == 255).all()
    assert panel(video, []).shape == video.shape


def test_pixels_are_clamped_and_rounded() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert to_uint8(pixels).ravel().tolist() == [0, 0, 128, 255, 255]
