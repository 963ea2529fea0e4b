"""Finding a subject in a picture: boxes from words (GroundingDINO) or a picture (OWLv2), masks from boxes (SAM).

YOLO-World, whose image-prompt adapter OpenS2V-Eval uses, has no class in transformers. Any other detector is a
`Detector` of one method. Confidences of different detectors are not on one scale.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idc.errors import UserError
from idc.models.frozen import load_model, torch_dtype
from idc.models.pretrained import Pretrained

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]

MOST_BOXES = 100  # of one picture


class Detection(NamedTuple):
    """A box in pixels of the picture, within it and with an area, and the detector's confidence in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float
    score: float

    def crop(self, picture_HWC: Picture) -> Picture:
        """The pixels of the box, its sides rounded outwards where rounding would leave nothing."""
        height, width = picture_HWC.shape[:2]
        left, top = min(round(self.left), width - 1), min(round(self.top), height - 1)
        return picture_HWC[top : max(top + 1, round(self.bottom)), left : max(left + 1, round(self.right))]


class Detector(Pretrained):
    """Boxes of a subject in pictures."""

    threshold: float
    nms: float

    @abstractmethod
    def detect(self, pictures: Sequence[Picture], label: str, reference: Picture) -> list[list[Detection]]:
        """The boxes in each picture, best first, at most 100.

        Args:
            pictures: RGB uint8 `[H, W, 3]`; each is looked at by itself.
            label: the subject in a word or two.
            reference: a picture of it, RGB uint8 `[H, W, 3]`.
        """

    def __init__(self, path: str, threshold: float, nms: float, dtype: str | torch.dtype) -> None:
        self.path, self.threshold, self.nms, self.dtype = path, threshold, nms, torch_dtype(dtype)
        for key in ("threshold", "nms"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise UserError(f"{key}={value}: must lie between 0 and 1")

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"threshold": self.threshold, "nms": self.nms}


class GroundingDino(Detector):
    """GroundingDINO, which looks for the label; a box's confidence is that of its best word.

    Args:
        path: a folder saved with save_pretrained, or a hub id.
        threshold: least confidence; 0.25 is Grounded-SAM's.
        nms: of boxes that overlap by more (intersection over union), the best one stays; 1 keeps all.
        dtype: of weights and activations.
    """

    weights = "GroundingDINO: config.json, model*.safetensors, the image processor and the tokenizer"

    def __init__(
        self,
        path: str = "IDEA-Research/grounding-dino-base",
        threshold: float = 0.25,
        nms: float = 0.7,
        dtype: str | torch.dtype = "float32",
    ) -> None:
        super().__init__(path, threshold, nms, dtype)

    def _build(self) -> None:
        self._needs("the tokenizer", "tokenizer_config.json")
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection
        from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
            GroundingDinoImageProcessorPil,
        )

        self._images = self._saved(GroundingDinoImageProcessorPil)
        self._tokenizer = self._saved(AutoTokenizer)
        self._model = load_model(GroundingDinoForObjectDetection, self.path, self.weights, self.dtype)

    def detect(self, pictures: Sequence[Picture], label: str, reference: Picture) -> list[list[Detection]]:
        phrase = " ".join(label.lower().split()).rstrip(". ")
        if not phrase:
            raise UserError(f"label={label!r}: GroundingDINO needs a word to look for")
        with self.inference():
            text = self._tokenizer(f"{phrase}.", return_tensors="pt", return_token_type_ids=True).to(self.device)
            return [self._detect(picture, text) for picture in pictures]

    def _detect(self, picture_HWC: Picture, text: Any) -> list[Detection]:
        inputs = self._images(images=[picture_HWC], return_tensors="pt").to(self.device)
        output = self._model(
            pixel_values=inputs["pixel_values"].to(self.dtype), pixel_mask=inputs["pixel_mask"], **text
        )
        scores = output.logits[0].float().sigmoid().amax(-1)
        height, width = picture_HWC.shape[:2]
        boxes = corners(output.pred_boxes[0]) * scores.new_tensor([width, height, width, height])
        return best_boxes(boxes, scores, (height, width), self.threshold, self.nms)


class Owlv2ByPicture(Detector):
    """OWLv2 guided by the reference: what looks like the reference's most object-like part.

    Args:
        path: a folder saved with save_pretrained, or a hub id.
        threshold: least confidence.
        nms: of boxes that overlap by more (intersection over union), the best one stays; 1 keeps all.
        dtype: of weights and activations.
    """

    weights = "OWLv2: config.json, model*.safetensors and the image processor"

    def __init__(
        self,
        path: str = "google/owlv2-base-patch16-ensemble",
        threshold: float = 0.25,
        nms: float = 0.7,
        dtype: str | torch.dtype = "float32",
    ) -> None:
        super().__init__(path, threshold, nms, dtype)

    def _build(self) -> None:
        from transformers import Owlv2ForObjectDetection
        from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

        self._images = self._saved(Owlv2ImageProcessorPil)
        self._model = load_model(Owlv2ForObjectDetection, self.path, self.weights, self.dtype)

    def detect(self, pictures: Sequence[Picture], label: str, reference: Picture) -> list[list[Detection]]:
        with self.inference():
            map_BHWD = self._features(reference)
            query_B1D, _, _ = self._model.embed_image_query(map_BHWD.flatten(1, 2), map_BHWD)
            return [self._detect(picture, query_B1D) for picture in pictures]

    def _features(self, picture_HWC: Picture) -> Tensor:
        pixels = self._images(images=[picture_HWC], return_tensors="pt")["pixel_values"]
        return self._model.image_embedder(pixel_values=pixels.to(self.device, self.dtype))[0]

    def _detect(self, picture_HWC: Picture, query_B1D: Tensor) -> list[Detection]:
        map_BHWD = self._features(picture_HWC)
        tokens_BLD = map_BHWD.flatten(1, 2)
        logits, _ = self._model.class_predictor(image_feats=tokens_BLD, query_embeds=query_B1D)
        scores = logits[0].float().amax(-1).sigmoid()
        # Pictures are padded at the right and the bottom to a square, which the boxes are fractions of.
        boxes = corners(self._model.box_predictor(tokens_BLD, map_BHWD)[0]) * max(picture_HWC.shape[:2])
        return best_boxes(boxes, scores, picture_HWC.shape[:2], self.threshold, self.nms)


class Sam(Pretrained):
    """SAM: the mask of what a box is around.

    Args:
        path: a folder saved with save_pretrained, or a hub id.
        dtype: of weights and activations.
    """

    weights = "SAM: config.json, model*.safetensors and the image processor"

    def __init__(self, path: str = "facebook/sam-vit-huge", dtype: str | torch.dtype = "float32") -> None:
        self.path, self.dtype = path, torch_dtype(dtype)

    def _build(self) -> None:
        from transformers import SamModel, SamProcessor
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        self._images = SamProcessor(self._saved(SamImageProcessorPil))
        self._model = load_model(SamModel, self.path, self.weights, self.dtype)

    def masks(self, picture_HWC: Picture, boxes: Sequence[Detection]) -> Mask:
        """bool `[N, H, W]`, one mask per box, of an RGB uint8 picture `[H, W, 3]`."""
        if not boxes:
            return np.zeros((0, *picture_HWC.shape[:2]), np.bool_)
        with self.inference():
            corners = [[list(map(float, box[:4])) for box in boxes]]
            inputs = self._images(images=[picture_HWC], input_boxes=corners, return_tensors="pt")
            output = self._model(
                pixel_values=inputs["pixel_values"].to(self.device, self.dtype),
                input_boxes=inputs["input_boxes"].to(self.device, self.dtype),
                multimask_output=False,
            )
            (masks,) = self._images.post_process_masks(
                output.pred_masks.float().cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )
            return masks[:, 0].numpy()


class GroundedMasks:
    """Grounded-SAM: the mask of the detector's best box.

    Args:
        detector: finds the subject.
        segmenter: cuts it out.
    """

    def __init__(self, detector: Detector | None = None, segmenter: Sam | None = None) -> None:
        self.detector, self.segmenter = detector or GroundingDino(), segmenter or Sam()
        self.names = (self.detector.name, self.segmenter.name)

    @property
    def device(self) -> torch.device:
        """Where both are, or are loaded next."""
        return self.detector.device

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load both; idempotent."""
        self.detector.load(device)
        self.segmenter.load(device)

    def unload(self) -> None:
        """Free both."""
        self.detector.unload()
        self.segmenter.unload()

    def masks(self, pictures: Sequence[Picture], label: str, reference: Picture) -> list[Mask | None]:
        """The subject's mask in each picture, bool `[H, W]`; None where the detector finds nothing, or SAM cuts
        out nothing."""
        found = self.detector.detect(pictures, label, reference)
        masks = [self.segmenter.masks(picture, boxes[:1]) for picture, boxes in zip(pictures, found, strict=True)]
        return [mask[0] if mask.any() else None for mask in masks]


def corners(boxes_N4: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom), float32."""
    x, y, width, height = boxes_N4.float().unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)


def best_boxes(
    boxes_N4: Tensor, scores_N: Tensor, size: tuple[int, ...], threshold: float, nms: float
) -> list[Detection]:
    """Boxes of a confidence above `threshold`, cut to the picture, without lesser ones that overlap a better one by
    more than `nms` (intersection over union); best first, at most 100. Those of less than a pixel are dropped.

    Args:
        boxes_N4: left, top, right, bottom in pixels.
        size: the picture's (height, width).
    """
    height, width = size
    kept_N = scores_N > threshold
    limits = boxes_N4.new_tensor([width, height, width, height])
    boxes_N4 = boxes_N4[kept_N].clamp(boxes_N4.new_zeros(4), limits).cpu()
    order = scores_N[kept_N].cpu().argsort(descending=True, stable=True)
    boxes_N4, scores = boxes_N4[order], scores_N[kept_N].cpu()[order]
    area_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(-1)
    best: list[int] = []
    alive_N = area_N >= 1
    while alive_N.any() and len(best) < MOST_BOXES:
        first = int(alive_N.int().argmax())
        best.append(first)
        overlap_N = (
            torch.minimum(boxes_N4[:, 2:], boxes_N4[first, 2:]) - torch.maximum(boxes_N4[:, :2], boxes_N4[first, :2])
        ).clamp(min=0)
        shared_N = overlap_N.prod(-1)
        alive_N = alive_N & (shared_N / (area_N + area_N[first] - shared_N) <= nms)
        alive_N[first] = False
    rows = torch.cat([boxes_N4, scores[:, None]], 1)[best].tolist()
    return [Detection(left, top, right, bottom, score) for left, top, right, bottom, score in rows]
