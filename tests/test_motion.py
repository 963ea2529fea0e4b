from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from idc.metrics.base import Clip
from idc.metrics.motion import MotionAmplitude, farneback_flow, net_drift, reduce_flow
from idc.metrics.smoothness import MotionSmoothness, artifact_frames, sliding_windows

HEIGHT, WIDTH = 128, 192


def texture(seed: int = 0, height: int = 256, width: int = 320) -> np.ndarray:
    """A smooth random picture, RGB uint8, in which every patch is recognisable."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def warped(steps: list[np.ndarray]) -> np.ndarray:
    """One texture under each of the 2 x 3 affine maps (output pixel -> place in the texture), `[T, 128, 192, 3]`."""
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.stack([cv2.warpAffine(texture(), step, (WIDTH, HEIGHT), flags=flags) for step in steps])


def moving(dx: float, dy: float, frames: int = 5) -> np.ndarray:
    """The picture's content moves by (dx, dy) pixels a frame."""
    return warped([np.array([[1, 0, 60 - dx * t], [0, 1, 60 - dy * t]], np.float64) for t in range(frames)])


def score(frames: np.ndarray, **kwargs):
    return MotionAmplitude().score(Clip("clip", frames, **kwargs))


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (-1.5, 0), (0, 0.75), (0.5, 0.5), (-0.8, -0.4), (1.0, 0.3)])
def test_translation_gives_half_its_sum_and_its_length(dx, dy):
    found = score(moving(dx, dy))
    assert found.value == pytest.approx(abs(dx + dy) / 2, abs=0.03)
    assert found.details["magnitude"] == pytest.approx(np.hypot(dx, dy), abs=0.05)


def test_fast_motion_is_cut_at_one_and_kept_in_the_details():
    found = score(moving(3, 1))
    assert found.value == 1
    assert found.details["drift"] == pytest.approx(2, abs=0.1)


def test_a_still_clip_has_no_motion():
    found = score(np.repeat(texture()[None], 4, axis=0))
    assert found.value < 1e-4  # Farneback's own rounding
    assert found.details["magnitude"] < 1e-3


def test_zoom_and_rotation_and_the_other_diagonal_cancel_in_the_benchmarks_drift_but_not_in_the_magnitude():
    centre = WIDTH / 2 - 0.5, HEIGHT / 2 - 0.5
    away = np.array([[0, 0, 60], [0, 0, 60]])
    # No factor is 1: a first step from the untouched grid would be resampled less than the others.
    zoom = [cv2.getRotationMatrix2D(centre, 0, 0.97**t) + away for t in range(1, 6)]
    turn = [cv2.getRotationMatrix2D(centre, 1.5 * t, 1) + away for t in range(1, 6)]
    radius = np.hypot(*np.meshgrid(np.arange(WIDTH) - centre[0], np.arange(HEIGHT) - centre[1])).mean()
    for frames, magnitude in (
        (warped(zoom), 0.03 * radius),
        (warped(turn), np.radians(1.5) * radius),
        (moving(1, -1), np.sqrt(2)),
    ):
        found = score(frames)
        assert found.value < 0.05
        assert found.details["magnitude"] == pytest.approx(magnitude, rel=0.12)


def test_opposite_motions_side_by_side_cancel():
    frames = np.concatenate([moving(2, 0), moving(-2, 0)], axis=2)
    found = score(frames)
    assert found.value < 0.06
    assert found.details["magnitude"] == pytest.approx(2, abs=0.25)
    back_and_forth = np.concatenate([moving(0.8, 0, 4), moving(0.8, 0, 4)[-2::-1]])
    assert score(back_and_forth).value < 0.03


def test_the_rule_is_the_benchmarks_step_by_step():
    frames = moving(1.2, 0.4, 4)[:, :, :150]
    flows = []
    for before, after in pairwise(frames):
        greys = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (before, after)]
        flow = cv2.calcOpticalFlowFarneback(
            *greys,
            flow=None,
            pyr_scale=0.5,
            levels=3,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.2,
            flags=0,
        )
        flows.append(cv2.resize(flow, (16, int(128 * (16 / 150))), interpolation=cv2.INTER_AREA))
    assert score(frames).value == pytest.approx(abs(np.stack(flows).mean(axis=0).mean()), abs=1e-6)


def test_widths_per_second_counts_in_pictures_and_seconds():
    frames = moving(1, 0.2)
    whole, faster, half = score(frames, fps=8), score(frames, fps=16), score(frames[:, :, : WIDTH // 2], fps=8)
    assert whole.details["widths_per_second"] == pytest.approx(np.hypot(1, 0.2) * 8 / WIDTH, rel=0.05)
    assert faster.details["widths_per_second"] == pytest.approx(2 * whole.details["widths_per_second"])
    assert half.details["widths_per_second"] == pytest.approx(2 * whole.details["widths_per_second"], rel=0.05)


@pytest.mark.parametrize("shape", [(8, 400), (200, 8), (1, 1), (3, 64)])
def test_extreme_shapes_have_a_score(shape):
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    assert 0 <= score(frames).value <= 1
    flow = next(farneback_flow(frames))
    assert reduce_flow(flow).shape == (max(1, 16 * shape[0] // shape[1]), 16, 2)
    assert net_drift([flow, -flow]) == 0


def test_one_frame_has_no_motion_to_score():
    assert "one frame" in score(texture()[None]).reason
    assert score(texture()[None]).value is None


def test_windows_are_padded_as_the_benchmark_pads_them():
    assert sliding_windows(5).tolist() == [[0, 0, 0], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 3, 4]]
    assert sliding_windows(2).tolist() == [[0, 0, 0], [0, 1, 1]]
    assert sliding_windows(1).tolist() == [[0, 0, 0]]
    assert sliding_windows(4, 5).tolist() == [[0] * 5, [0] * 5, [0, 1, 2, 3, 3], [1, 1, 1, 2, 3]]


def test_both_sides_of_a_jump_are_artifacts():
    assert artifact_frames([0.5, 0.5, 0.5]) == []
    assert artifact_frames([0.5, 0.5, 0.6, 0.6]) == [1, 2]
    assert artifact_frames([0.5, 0.6, 0.5]) == [0, 1, 2]
    assert artifact_frames([0.0, 0.025, 0.05, 0.0751]) == [2, 3]  # the limit itself is no jump
    assert artifact_frames([0.4]) == []


class Brightness:
    """Rates a window by the mean of its pixels, and keeps what it was shown."""

    name = "brightness"

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def load(self, device="cpu"):
        return self

    def unload(self):
        pass

    def rate(self, frames_THWC):
        self.shown.append(frames_THWC[:, 0, 0, 0].tolist())
        return float(frames_THWC.mean()) / 255


def constant(levels: list[int]) -> Clip:
    frames = np.ones((len(levels), 4, 4, 3), np.uint8) * np.array(levels, np.uint8)[:, None, None, None]
    return Clip("clip", frames)


def test_smoothness_is_the_share_of_frames_without_a_jump_in_their_windows():
    rater = Brightness()
    found = MotionSmoothness(rater).score(constant([0, 0, 0, 0, 0, 255, 255, 255, 255, 255]))
    assert rater.shown[0] == [0, 0, 0]
    assert rater.shown[4] == [0, 0, 255]
    assert rater.shown[-1] == [255, 255, 255]
    # Windows 3 to 6 rate 0, 1/3, 2/3 and 1: three jumps between four frames.
    assert found.details["artifacts"] == [3, 4, 5, 6]
    assert found.value == pytest.approx(0.6)
    assert len(found.details["quality"]) == 10


def test_the_first_window_knows_only_the_first_frame():
    found = MotionSmoothness(Brightness()).score(constant([0, 30, 30, 30]))
    # 0, 20, 30, 30 of 255: the padding of the first window makes a jump of its own.
    assert found.details["artifacts"] == [0, 1, 2]
    assert MotionSmoothness(Brightness()).score(constant([9] * 6)).value == 1


def test_one_frame_is_not_called_smooth():
    found = MotionSmoothness(Brightness()).score(constant([7]))
    assert found.value is None
    assert "one frame" in found.reason
