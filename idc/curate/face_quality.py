"""How well a face is seen: how far it is turned away, and how sharp it is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Pixels
from idc.curate.people import Sighting
from idc.metrics.base import Clip
from idc.models.faces import DetectedFace, norm_crop
from idc.rewards.watch import Sharpness

NOSE = 0.5  # how far the nose stands out before the eyes, in distances between the eyes


def yaw(landmarks_52: NDArray[np.floating]) -> float:
    """How far a head is turned, in degrees from -90 to 90; 0 is frontal, positive with the nose to the right.

    From the nose's distance to the middle line between eyes and mouth, which grows with the sine of the angle, and
    the distance of the eyes, which shrinks with its cosine. Good to about 10 degrees up to 45; a profile, whose eyes
    coincide, gives 90.
    """
    left, right, nose, *mouth = np.asarray(landmarks_52, np.float64)
    eyes, chin = (left + right) / 2, np.mean(mouth, 0)
    down = chin - eyes
    length = float(np.hypot(*down))
    if length == 0:
        return 0.0
    across = np.array([down[1], -down[0]]) / length
    aside, apart = float((nose - eyes) @ across), float((right - left) @ across)
    return math.degrees(math.atan2(aside, NOSE * max(apart, 0.0))) if aside else 0.0


def sharpness(picture_HWC: Pixels, face: DetectedFace) -> float:
    """Variance of the Laplacian of the luma in [0, 1] of the face at 112 x 112 pixels, upright; in [0, 16].

    Sharp faces have 0.002 to 0.01, blurred ones and those enlarged from 30 pixels less than 0.001.
    """
    inner = norm_crop(picture_HWC, face.landmarks)[24:104, 20:92]  # without the edge of the picture, black beyond it
    value = Sharpness().score(Clip("face", inner[None])).value
    return 0.0 if value is None else value


def frontal_and_sharp(sighting: Sighting) -> float:
    """How good a reference a sighting makes: sure, large, sharp and frontal; the sharpest and the less sharp differ
    less than a near and a far one."""
    facing = max(0.1, math.cos(math.radians(sighting.yaw)))
    return sighting.face.score * sighting.face.height * facing * (max(sighting.sharpness, 1e-4) ** 0.25)
