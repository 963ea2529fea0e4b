"""Face backends that need weights from outside: insightface's packs (ArcFace, `arc`) and CurricularFace (`cur`).

Nothing is downloaded: files are looked for first and their absence is named. `curricular.py` has the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from idc.errors import UserError, nearest
from idc.models.faces import DetectedFace, Embedding, Face, FaceBackend, Picture, check_cosine, norm_crop, unit

# The detector and the recogniser among the files of insightface's packs.
PACKS = {
    "antelopev2": ("scrfd_10g_bnkps.onnx", "glintr100.onnx"),
    "buffalo_l": ("det_10g.onnx", "w600k_r50.onnx"),
    "buffalo_m": ("det_2.5g.onnx", "w600k_r50.onnx"),
    "buffalo_s": ("det_500m.onnx", "w600k_mbf.onnx"),
}


class InsightFacePack(FaceBackend):
    """A local insightface pack: its detector and its ArcFace recogniser (`arc`), run by onnxruntime.

    OpenS2V-Eval takes insightface's default pack, buffalo_l, at `det_size` 320; the weights are for research only.

    Args:
        root: folder that has `models/<name>/*.onnx`.
        name: of the pack.
        det_size: side in pixels that pictures are scaled to for the detector, a multiple of 32.
        min_confidence: of the detector, in (0, 1); insightface's default is 0.5.
        threshold: cosine from which two faces are one person, in (0, 1).
    """

    name = "arc"

    def __init__(
        self,
        root: str = "~/.insightface",
        name: str = "buffalo_l",
        det_size: int = 320,
        min_confidence: float = 0.5,
        threshold: float = 0.3,
    ) -> None:
        if det_size < 32 or det_size % 32:
            raise UserError(
                f"det_size={det_size}: must be a multiple of 32 pixels; the nearest is {_multiple(det_size)}"
            )
        if not 0 < min_confidence < 1:
            raise UserError(f"min_confidence={min_confidence}: must lie between 0 and 1")
        check_cosine(threshold)
        self.root, self.pack, self.det_size = root, name, det_size
        self.min_confidence, self.threshold = min_confidence, threshold
        self.models = (f"insightface-{name}",)
        self._networks: dict[str, Any] | None = None

    def detect(self, picture_HWC: Picture) -> list[DetectedFace]:
        boxes, landmarks = self._loaded["detection"].detect(_bgr(picture_HWC))
        faces = [
            DetectedFace(Face(left, top, right - left, bottom - top, score), np.asarray(points, np.float64))
            for (left, top, right, bottom, score), points in zip(boxes.tolist(), landmarks, strict=True)
        ]
        return sorted(faces, key=lambda face: face.box)

    def embed(self, picture_HWC: Picture, face: DetectedFace) -> Embedding:
        from insightface.app.common import Face as PackFace

        # insightface aligns by itself, so that this is its own embedding to the last bit.
        found = PackFace(kps=face.landmarks.astype(np.float32))
        return unit(self._loaded["recognition"].get(_bgr(picture_HWC), found))

    def load(self, device: torch.device | str = "cpu") -> None:
        if self._networks is not None:
            return
        folder = self.check_files()
        import onnxruntime
        from insightface.app import FaceAnalysis

        gpu = torch.device(device).type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        providers = [*(["CUDAExecutionProvider"] if gpu else []), "CPUExecutionProvider"]
        try:
            # A folder is loaded as it is; insightface downloads only what it is asked for by name and does not find.
            app = FaceAnalysis(
                name=self.pack,
                root=str(Path(self.root).expanduser()),
                allowed_modules=["detection", "recognition"],
                providers=providers,
            )
        except AssertionError:
            raise UserError(f"{folder}: has no face detector among its .onnx files; unpack the pack again") from None
        except Exception as error:  # onnxruntime and onnx raise many kinds, none of them documented
            raise UserError(f"{folder}: insightface cannot load this pack: {error}") from error
        if "recognition" not in app.models:
            raise UserError(f"{folder}: has no face recogniser among its .onnx files; unpack the pack again")
        app.prepare(ctx_id=0 if gpu else -1, det_thresh=self.min_confidence, det_size=(self.det_size, self.det_size))
        self._networks = app.models

    def unload(self) -> None:
        self._networks = None

    def check_files(self) -> Path:
        """The pack's folder.

        Raises:
            UserError: if the folder or one of the pack's files is missing; nothing is loaded or downloaded for that.
        """
        models = Path(self.root).expanduser() / "models"
        folder = models / self.pack
        if not folder.is_dir():
            packs = sorted(path.name for path in models.iterdir() if path.is_dir()) if models.is_dir() else []
            raise UserError(
                f"insightface pack {self.pack!r}: no folder {folder}; unpack {self.pack}.zip there "
                f"(nothing is downloaded){nearest(self.pack, packs)}"
            )
        missing = [name for name in PACKS.get(self.pack, ()) if not (folder / name).is_file()]
        if missing or not any(folder.glob("*.onnx")):
            nested = " (the files lie one folder too deep)" if any(folder.glob("*/*.onnx")) else ""
            raise UserError(f"{folder}: lacks {', '.join(missing) or 'any .onnx file'}{nested}")
        return folder

    @property
    def _loaded(self) -> dict[str, Any]:
        self.load()
        assert self._networks is not None
        return self._networks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_networks": None}


class CurricularFace(FaceBackend):
    """CurricularFace IR-101 on the faces of another backend: `cur`, the embedding that enters OpenS2V-Eval's total.

    A face is aligned at 224 pixels, resized to 112 (bilinear) and fed as RGB in [-1, 1], as the benchmark does.

    Args:
        weights: `glint360k_curricular_face_r101_backbone.bin` or a .safetensors of it.
        detector: finds the faces and their landmarks; the benchmark's is `InsightFacePack(det_size=320)`.
        threshold: cosine from which two faces are one person, in (0, 1).
    """

    name = "cur"
    crops_padding = False

    def __init__(self, weights: str, detector: FaceBackend, threshold: float = 0.3) -> None:
        check_cosine(threshold)
        self.weights, self.detector, self.threshold = weights, detector, threshold
        self.models = ("curricularface-ir101", *detector.models)
        self._network: torch.nn.Module | None = None
        self._device: torch.device | str = "cpu"

    def detect(self, picture_HWC: Picture) -> list[DetectedFace]:
        return self.detector.detect(picture_HWC)

    @torch.no_grad()
    def embed(self, picture_HWC: Picture, face: DetectedFace) -> Embedding:
        if self._network is None:
            self.load()
        assert self._network is not None
        pixels_CHW = torch.from_numpy(self.crop(picture_HWC, face)).permute(2, 0, 1).float() / 127.5 - 1
        return unit(self._network(pixels_CHW[None].to(self._device)).cpu().numpy())

    @staticmethod
    def crop(picture_HWC: Picture, face: DetectedFace) -> Picture:
        """What the network sees of a face, uint8 `[112, 112, 3]`."""
        import cv2

        return np.asarray(cv2.resize(norm_crop(picture_HWC, face.landmarks, 224), (112, 112)), np.uint8)

    def load(self, device: torch.device | str = "cpu") -> None:
        from idc.models.curricular import load_ir101

        self.detector.load(device)
        if self._network is None:
            self._network = load_ir101(self.weights)
        self._network = self._network.to(device)
        self._device = device

    def unload(self) -> None:
        self.detector.unload()
        self._network = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None, "_device": "cpu"}


def _bgr(picture_HWC: Picture) -> Picture:
    return np.ascontiguousarray(picture_HWC[..., ::-1])


def _multiple(side: int) -> int:
    return max(32, round(side / 32) * 32)
