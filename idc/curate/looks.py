"""A few frames over a candidate, and what filters see in them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Box, Candidate, Pixels
from idc.curate.reading import frame_times, inspect, look, span_of

UNEVEN = 0.03  # of the side: how unequal the bars at two opposite edges may be
THIN = 0.02  # of the side: less is no bar but an edge
SOFT_EDGE = 2  # pixels beside a bar, which coding has smeared


def pairs(candidate: Candidate, n: int, seconds: float) -> tuple[Pixels, Pixels, NDArray[np.float64]]:
    """Up to `n` frames evenly over the candidate, and what each has become at least `seconds` later.

    Times are those of the source's frames, so that variable rates and clips of any rate give the same pairs.

    Returns:
        frames and later frames, `[n, H, W, 3]`, and the seconds between, `[n]`. Where the candidate is shorter than
        `seconds`, all later ones are its last frame; for one frame, `[0, H, W, 3]` and `[0]`.

    Raises:
        VideoError: where a frame cannot be read.
    """
    clip = candidate.clip
    first, end = (0, len(clip)) if clip is not None else span_of(candidate)
    if clip is not None:
        times = np.arange(end) / (candidate.fps or 1.0)
    else:
        times = frame_times(inspect(candidate).video)[first:end]
    last = int(np.searchsorted(times, times[-1] - seconds + 1e-6, "right")) - 1
    numbers = np.unique(np.linspace(0, max(last, 0), n).astype(int))
    later = np.minimum(np.searchsorted(times, times[numbers] + seconds - 1e-6), len(times) - 1)
    wanted = np.unique(np.concatenate([numbers, later]))
    pictures = clip[wanted] if clip is not None else look(candidate, (wanted + first).tolist())
    frames = pictures[np.searchsorted(wanted, numbers)]
    apart = times[later] - times[numbers]
    if len(times) < 2 or not apart.all():
        return frames, pictures[:0], apart[:0]
    return frames, pictures[np.searchsorted(wanted, later)], apart


def luma(pictures_THWC: Pixels) -> NDArray[np.uint8]:
    """BT.601 luma in 0 to 255, `[T, H, W]`."""
    import cv2

    lumas = np.empty(pictures_THWC.shape[:-1], np.uint8)
    for number, picture in enumerate(pictures_THWC):
        lumas[number] = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    return lumas


def scaled(pictures_THWC: Pixels, side: int, enlarge: bool = True) -> Pixels:
    """Frames scaled to a shorter side of `side` pixels, so that what is measured compares between sizes; smaller ones
    stay as they are unless `enlarge`."""
    import cv2

    height, width = pictures_THWC.shape[1:3]
    scale = side / min(height, width)
    if scale == 1 or (scale > 1 and not enlarge):
        return pictures_THWC
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.stack([np.asarray(cv2.resize(frame, size, interpolation=method), np.uint8) for frame in pictures_THWC])


def bars_of(lumas_THW: NDArray[np.uint8], black: int) -> Box | None:
    """What black bars (luma up to `black`) leave of the picture, in its pixels; None where there are none.

    Bars lie at two opposite edges or all four, about equally wide, and in all frames that are not black throughout: a
    night sky is at one edge only, and moves.
    """
    brightest = lumas_THW[lumas_THW.max(axis=(1, 2)) > 2 * black]
    if not len(brightest):
        return None
    picture = brightest.max(axis=0)
    # A hundredth of the pixels of a row may be brighter: noise of coding, not subtitles.
    top, bottom = _bars(np.quantile(picture, 0.99, axis=1) > black)
    left, right = _bars(np.quantile(picture[top : len(picture) - bottom], 0.99, axis=0) > black)
    if not any((top, bottom, left, right)):
        return None
    height, width = picture.shape
    return Box(float(left), float(top), float(width - right), float(height - bottom))


def _bars(bright: NDArray[np.bool_]) -> tuple[int, int]:
    """Width of the dark bars before and behind the bright part, the smeared edge among them; (0, 0) for none."""
    inside = np.flatnonzero(bright)
    if not len(inside):
        return 0, 0
    before, behind = int(inside[0]), int(len(bright) - 1 - inside[-1])
    if min(before, behind) < THIN * len(bright) or abs(before - behind) > UNEVEN * len(bright):
        return 0, 0
    if len(bright) - before - behind <= 4 * SOFT_EDGE:
        return 0, 0
    return before + SOFT_EDGE, behind + SOFT_EDGE
