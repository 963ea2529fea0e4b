"""TransNetV2 (Souček and Lokoč, arXiv 2008.04838) as a shot detector, from weights that the user has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from idc.curate.candidate import Pixels
from idc.curate.shots import Transition
from idc.errors import UserError
from idc.models.weight_hashes import content_hash

WINDOW, STEP = 100, 50  # frames the network sees, and of these the middle ones whose prediction counts
EDGE = (WINDOW - STEP) // 2
HEIGHT, WIDTH = 27, 48
KINDS = (".onnx", ".pt", ".pth", ".ts", ".torchscript")


class TransNetV2:
    """Shot transitions, hard and soft, by the published network.

    It takes uint8 RGB `[1, 100, 27, 48, 3]` and gives each frame's score of being in a transition, `[1, 100, 1]`: as a
    probability in the ONNX export, as a logit in the PyTorch port (whose second output is not used). Windows of 100
    frames overlap by half and the middle 50 count; the first frame is repeated 25 times before the video, and the last
    one at its end, as the authors do. At a hard cut the last frame of the old shot is the one that scores.
    """

    heavy = True

    def __init__(self, path: str, threshold: float = 0.5, logits: bool | None = None) -> None:
        """
        Args:
            path: weights: an .onnx file, or TorchScript (.pt, .pth, .ts, .torchscript).
            threshold: of the probability, in (0, 1).
            logits: whether the network gives logits; for None TorchScript does and ONNX does not.

        Raises:
            UserError: for a threshold out of its range, or a file of another kind.
        """
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: must lie between 0 and 1")
        if Path(path).suffix not in KINDS:
            raise UserError(f"path={path!r}: give TransNetV2 as a file ending in {', '.join(KINDS)}")
        self.path, self.threshold = path, threshold
        self.logits = Path(path).suffix != ".onnx" if logits is None else logits
        self._network: Any = None
        self._device = torch.device("cpu")

    @property
    def models(self) -> tuple[str, ...]:
        path = Path(self.path).expanduser()
        return (f"TransNetV2 {path.name}" + (f" {content_hash(path)[:12]}" if path.is_file() else ""),)

    def describe(self) -> dict[str, Any]:
        """Settings that decide what comes out, the weights by what is in them."""
        return {"class": "TransNetV2", "models": list(self.models), "threshold": self.threshold, "logits": self.logits}

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the network; idempotent.

        Raises:
            UserError: for a file that is missing or holds no such network.
        """
        if self._network is not None:
            return
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"TransNetV2 path={self.path!r}: no such file")
        self._device = torch.device(device)
        try:
            self._network = self._onnx(path) if path.suffix == ".onnx" else self._torchscript(path)
            shape = self._predict(np.zeros((WINDOW, HEIGHT, WIDTH, 3), np.uint8)).shape
        except UserError:
            raise
        except Exception as error:  # both runtimes raise kinds of their own
            self._network = None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"TransNetV2 path={self.path!r}: cannot be used: {reason}") from None
        if shape != (WINDOW,):
            self._network = None
            raise UserError(f"TransNetV2 path={self.path!r}: gives {shape} for a window, not ({WINDOW},) scores")

    def unload(self) -> None:
        """Free the network."""
        self._network = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_network": None}

    def transitions(self, frames: Iterable[Pixels]) -> Iterator[Transition]:
        last, inside, since = -1, False, 0
        for number, score in enumerate(self.scores(frames)):
            above = score > self.threshold
            if above and not inside:
                since = number
            elif inside and not above:
                yield Transition(since + 1, number)
            inside, last = above, number
        if inside and since < last:
            yield Transition(since + 1, last)  # a fade that the video ends in

    def scores(self, frames: Iterable[Pixels]) -> Iterator[float]:
        """Each frame's probability of being in a transition, at most 125 frames late."""
        import cv2

        self.load(self._device)
        window: list[NDArray[np.uint8]] = []
        count = given = 0
        for frame in frames:
            small = np.asarray(cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)
            window += [small] * (1 if count else EDGE + 1)
            count += 1
            if len(window) == WINDOW:
                yield from self._middle(window, STEP)
                given += STEP
                del window[:STEP]
        while given < count:
            window += [window[-1]] * (WINDOW - len(window))
            wanted = min(STEP, count - given)
            yield from self._middle(window, wanted)
            given += wanted
            del window[:STEP]

    def _middle(self, window: list[NDArray[np.uint8]], wanted: int) -> list[float]:
        return [float(score) for score in self._predict(np.stack(window))[EDGE : EDGE + wanted]]

    def _predict(self, window_THWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        scores = np.asarray(self._network(window_THWC[None]), np.float64)
        scores = (
            scores.reshape(scores.shape[1:-1])
            if scores.ndim == 3 and scores.shape[0] == scores.shape[2] == 1
            else scores
        )
        return 1 / (1 + np.exp(-scores)) if self.logits else scores

    def _onnx(self, path: Path) -> Any:
        import onnxruntime

        # Cores are shared with other workers, and sums must not depend on how many there are.
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        wanted = ["CUDAExecutionProvider"] if self._device.type == "cuda" else []
        known = onnxruntime.get_available_providers()
        providers = [name for name in wanted if name in known] + ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        taken, given = session.get_inputs()[0], session.get_outputs()[0].name
        kind = np.float32 if "float" in taken.type else np.uint8
        return lambda window: session.run([given], {taken.name: window.astype(kind)})[0]

    def _torchscript(self, path: Path) -> Any:
        network = torch.jit.load(str(path), map_location=self._device).eval()

        def run(window: NDArray[np.uint8]) -> NDArray[np.float32]:
            with torch.no_grad():
                found = network(torch.from_numpy(window).to(self._device))
            first = found[0] if isinstance(found, tuple | list) else found
            return first.float().cpu().numpy()

        return run
