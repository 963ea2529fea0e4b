"""Finding a subject in a picture: boxes from words (GroundingDINO) or a picture (OWLv2), masks from boxes (SAM).

YOLO-World, whose image-prompt adapter OpenS2V-Eval uses, has no class in transformers. Any other detector is a
`Detector` of one method. Confidences of different detectors are not on one scale.

In a sliver (`idc.models.pretrained`) nothing is found, nor by one.

Networks take several pictures at once, `batch` of them at most; what does not fit into the device's memory goes by
halves. Company changes how sums are rounded: the same pictures in the same order give the same bits each time; alone,
boxes are the same to 1e-3 pixels in float32, unless a near tie tips (of GroundingDINO's proposals, for one).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idc.errors import UserError
from idc.models.batches import each_picture_once, for_the_fit, in_batches, same_pictures
from idc.models.boxes import Detection, best_boxes, corners
from idc.models.frozen import load_model, torch_dtype
from idc.models.pretrained import Picture, Pretrained, sliver

Mask = NDArray[np.bool_]


class Query(NamedTuple):
    """What a detector is asked.

    Attributes:
        picture: to look at, RGB uint8 `[H, W, 3]`.
        label: the subject in a word or two.
        reference: a picture of it, RGB uint8 `[H, W, 3]`.
    """

    picture: Picture
    label: str
    reference: Picture


class Prompt(NamedTuple):
    """What a segmenter is asked: what the boxes are around in a picture, RGB uint8 `[H, W, 3]`."""

    picture: Picture
    boxes: Sequence[Detection]


class Detector(Pretrained):
    """Boxes of subjects in pictures."""

    threshold: float
    nms: float
    batch: int

    @abstractmethod
    def detect_each(self, queries: Sequence[Query]) -> list[list[Detection]]:
        """The boxes for each query, best first, at most 100. Each is looked for by itself, whatever comes with it; what
        is computed of a picture alone is computed once where queries share it."""

    def detect(self, pictures: Sequence[Picture], label: str, reference: Picture) -> list[list[Detection]]:
        """The boxes of one subject in each picture, as `detect_each`."""
        return self.detect_each([Query(picture, label, reference) for picture in pictures])

    def __init__(self, path: str, threshold: float, nms: float, dtype: str | torch.dtype, batch: int = 1) -> None:
        self.path, self.threshold, self.nms, self.dtype = path, threshold, nms, torch_dtype(dtype)
        self.batch = check_batch(batch)
        for key in ("threshold", "nms"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise UserError(f"{key}={value}: must lie between 0 and 1")

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"threshold": self.threshold, "nms": self.nms}


class GroundingDino(Detector):
    """GroundingDINO, which looks for the label; a box's confidence is that of its best word. A label without a word
    (`has_word`), such as "..." or an emoji, is of nothing: there are no boxes for it.

    Queries go together whose pictures the image processor makes of one size: padding would change what Swin's windows
    and the group norms behind it see, and boxes by whole pixels. Shorter labels are padded, which is masked everywhere
    and changes rounding alone. Queries of one picture share a pass through Swin, which is 49% of the base model's
    operations for one query, and 22% of the tiny one's.

    Args:
        path: a folder saved with save_pretrained, or a hub id.
        threshold: least confidence; 0.25 is Grounded-SAM's.
        nms: of boxes that overlap by more (intersection over union), the best one stays; 1 keeps all.
        dtype: of weights and activations.
        batch: queries that go through the network at once.
    """

    weights = "GroundingDINO: config.json, model*.safetensors, the image processor and the tokenizer"

    def __init__(
        self,
        path: str = "IDEA-Research/grounding-dino-base",
        threshold: float = 0.25,
        nms: float = 0.7,
        dtype: str | torch.dtype = "float32",
        batch: int = 8,
    ) -> None:
        super().__init__(path, threshold, nms, dtype, batch)

    def _build(self) -> None:
        self._needs("the tokenizer", "tokenizer_config.json")
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection
        from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
            GroundingDinoImageProcessorPil,
        )

        self._images = self._saved(GroundingDinoImageProcessorPil)
        self._tokenizer = self._saved(AutoTokenizer)
        self._model = load_model(GroundingDinoForObjectDetection, self.path, self.weights, self.dtype)

    def detect_each(self, queries: Sequence[Query]) -> list[list[Detection]]:
        return for_the_fit(
            queries, lambda query: has_word(query.label) and not sliver(query.picture), self._each, _none
        )

    def _each(self, queries: Sequence[Query]) -> list[list[Detection]]:
        found: dict[int, list[Detection]] = {}
        with self.inference():
            for rows in self._batches(queries):
                boxes = in_batches(rows, self.batch, lambda rows: self._detect(rows, queries))
                found.update(zip((place for place, _ in rows), boxes, strict=True))
        return [found[place] for place in range(len(queries))]

    def _batches(self, queries: Sequence[Query]) -> Iterator[list[tuple[int, Any]]]:
        """(place of a query, inputs of its picture) of those that go through the network at once: of one size, those of
        a picture together."""
        waiting: dict[Any, list[tuple[int, Any]]] = {}
        for places in same_pictures(query.picture for query in queries):
            inputs = self._pixels([queries[places[0]].picture])
            size = inputs["pixel_values"].shape
            for start in range(0, len(places), self.batch):
                rows = [(place, inputs) for place in places[start : start + self.batch]]
                if size in waiting and len(waiting[size]) + len(rows) > self.batch:
                    yield waiting.pop(size)
                waiting.setdefault(size, []).extend(rows)
        yield from waiting.values()

    def _detect(self, rows: Sequence[tuple[int, Any]], queries: Sequence[Query]) -> list[list[Detection]]:
        different = {id(inputs): inputs for _, inputs in rows}
        numbers = [list(different).index(id(inputs)) for _, inputs in rows]
        pixels = torch.cat([inputs["pixel_values"] for inputs in different.values()]).to(self.device, self.dtype)
        mask = torch.cat([inputs["pixel_mask"] for inputs in different.values()]).to(self.device)
        cut = {"truncation": True, "max_length": self._model.config.max_text_len, "return_token_type_ids": True}
        # As it was trained on labels: in lower case, with a full stop.
        phrases = [" ".join(queries[place].label.lower().split()).rstrip(". ") + "." for place, _ in rows]
        text = self._tokenizer(phrases, padding=True, return_tensors="pt", **cut)
        with each_picture_once(self._model.model.backbone, numbers):
            output = self._model(pixel_values=pixels[numbers], pixel_mask=mask[numbers], **text.to(self.device))
        found = []
        for (place, _), logits, boxes in zip(rows, output.logits, corners(output.pred_boxes), strict=True):
            scores = logits.float().sigmoid().amax(-1)
            height, width = queries[place].picture.shape[:2]
            boxes = boxes * scores.new_tensor([width, height, width, height])
            found.append(best_boxes(boxes, scores, (height, width), self.threshold, self.nms))
        return found


class Owlv2ByPicture(Detector):
    """OWLv2 guided by the reference: what looks like the reference's most object-like part.

    Args:
        path: a folder saved with save_pretrained, or a hub id.
        threshold: least confidence.
        nms: of boxes that overlap by more (intersection over union), the best one stays; 1 keeps all.
        dtype: of weights and activations.
        batch: pictures that go through the network at once.
    """

    weights = "OWLv2: config.json, model*.safetensors and the image processor"

    def __init__(
        self,
        path: str = "google/owlv2-base-patch16-ensemble",
        threshold: float = 0.25,
        nms: float = 0.7,
        dtype: str | torch.dtype = "float32",
        batch: int = 8,
    ) -> None:
        super().__init__(path, threshold, nms, dtype, batch)

    def _build(self) -> None:
        from transformers import Owlv2ForObjectDetection
        from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

        self._images = self._saved(Owlv2ImageProcessorPil)
        self._model = load_model(Owlv2ForObjectDetection, self.path, self.weights, self.dtype)

    def detect_each(self, queries: Sequence[Query]) -> list[list[Detection]]:
        return for_the_fit(queries, lambda q: not (sliver(q.picture) or sliver(q.reference)), self._each, _none)

    def _each(self, queries: Sequence[Query]) -> list[list[Detection]]:
        wanted: dict[int, Tensor] = {}  # the reference's vector, by the query's place
        found: dict[int, list[Detection]] = {}

        def describe(groups: Sequence[list[int]]) -> list[Tensor]:
            maps = self._features([queries[places[0]].reference for places in groups])
            return [self._model.embed_image_query(map_BHWD.flatten(1, 2), map_BHWD)[0] for map_BHWD in maps]

        def search(groups: Sequence[list[int]]) -> list[list[list[Detection]]]:
            pictures = [queries[places[0]].picture for places in groups]
            looks = zip(groups, pictures, self._features(pictures), strict=True)
            return [self._detect(picture, map_BHWD, [wanted[p] for p in places]) for places, picture, map_BHWD in looks]

        with self.inference():
            groups = same_pictures(query.reference for query in queries)
            for places, vector_B1D in zip(groups, in_batches(groups, self.batch, describe), strict=True):
                wanted.update(dict.fromkeys(places, vector_B1D))
            groups = same_pictures(query.picture for query in queries)
            for places, boxes in zip(groups, in_batches(groups, self.batch, search), strict=True):
                found.update(zip(places, boxes, strict=True))
        return [found[place] for place in range(len(queries))]

    def _features(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """`[1, H, W, D]` of each picture."""
        pixels = torch.cat([self._pixels([picture])["pixel_values"] for picture in pictures])
        return list(self._model.image_embedder(pixel_values=pixels.to(self.device, self.dtype))[0].split(1))

    def _detect(self, picture_HWC: Picture, map_BHWD: Tensor, queries: Sequence[Tensor]) -> list[list[Detection]]:
        """For each reference's vector `[1, 1, D]` its boxes in the picture of these features."""
        tokens_BLD, size = map_BHWD.flatten(1, 2), picture_HWC.shape[:2]
        # Pictures are padded at the right and the bottom to a square, which the boxes are fractions of.
        boxes = corners(self._model.box_predictor(tokens_BLD, map_BHWD)[0]) * max(size)
        found = []
        for query_B1D in queries:
            logits, _ = self._model.class_predictor(image_feats=tokens_BLD, query_embeds=query_B1D)
            scores = logits[0].float().amax(-1).sigmoid()
            found.append(best_boxes(boxes, scores, size, self.threshold, self.nms))
        return found


class Sam(Pretrained):
    """SAM: the mask of what a box is around.

    Args:
        path: a folder saved with save_pretrained, or a hub id.
        dtype: of weights and activations.
        batch: pictures that go through the image encoder at once.
    """

    weights = "SAM: config.json, model*.safetensors and the image processor"

    def __init__(
        self, path: str = "facebook/sam-vit-huge", dtype: str | torch.dtype = "float32", batch: int = 4
    ) -> None:
        self.path, self.dtype, self.batch = path, torch_dtype(dtype), check_batch(batch)

    def _build(self) -> None:
        from transformers import SamModel, SamProcessor
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        self._images = SamProcessor(self._saved(SamImageProcessorPil))
        self._model = load_model(SamModel, self.path, self.weights, self.dtype)

    def masks(self, picture_HWC: Picture, boxes: Sequence[Detection]) -> Mask:
        """bool `[N, H, W]`, one mask per box, of an RGB uint8 picture `[H, W, 3]`."""
        return self.masks_each([Prompt(picture_HWC, boxes)])[0]

    def masks_each(self, prompts: Sequence[Prompt]) -> list[Mask]:
        """For each prompt bool `[N, H, W]`, one mask per box. A picture goes through the image encoder once, whatever
        the number of prompts that are of it, and not at all without a box; the small decoder takes one at a time."""
        return for_the_fit(
            prompts,
            lambda prompt: bool(prompt.boxes) and not sliver(prompt.picture),
            self._each,
            lambda prompt: np.zeros((len(prompt.boxes), *prompt.picture.shape[:2]), np.bool_),
        )

    def _each(self, prompts: Sequence[Prompt]) -> list[Mask]:
        groups = same_pictures(prompt.picture for prompt in prompts)
        asked = [
            Prompt(prompts[places[0]].picture, [box for place in places for box in prompts[place].boxes])
            for places in groups
        ]
        with self.inference():
            found = in_batches(asked, self.batch, self._masks)
        masks: dict[int, Mask] = {}
        for places, whole in zip(groups, found, strict=True):
            ends = np.cumsum([len(prompts[place].boxes) for place in places])
            masks.update(zip(places, np.split(whole, ends[:-1]), strict=True))
        return [masks[place] for place in range(len(prompts))]

    def _masks(self, prompts: Sequence[Prompt]) -> list[Mask]:
        inputs = [
            self._pixels([picture], input_boxes=[[[*map(float, box[:4])] for box in boxes]])
            for picture, boxes in prompts
        ]
        pixels = torch.cat([each["pixel_values"] for each in inputs]).to(self.device, self.dtype)
        embeddings = self._model.get_image_embeddings(pixels).split(1)
        return [self._decode(embedding, each) for embedding, each in zip(embeddings, inputs, strict=True)]

    def _decode(self, embedding_BDHW: Tensor, inputs: Any) -> Mask:
        boxes = inputs["input_boxes"].to(self.device, self.dtype)
        output = self._model(image_embeddings=embedding_BDHW, input_boxes=boxes, multimask_output=False)
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

    def masks_each(self, queries: Sequence[Query]) -> list[Mask | None]:
        """The subject's mask for each query, bool `[H, W]`; None where the detector finds nothing, or SAM cuts out
        nothing. A picture goes through each image encoder once, whatever is looked for in it."""
        found = self.detector.detect_each(queries)
        prompts = [Prompt(query.picture, boxes[:1]) for query, boxes in zip(queries, found, strict=True)]
        return [mask[0] if mask.any() else None for mask in self.segmenter.masks_each(prompts)]


def check_batch(batch: int) -> int:
    """`batch`, or `UserError` where it is less than 1."""
    if batch < 1:
        raise UserError(f"batch={batch}: must be at least 1")
    return batch


def _none(query: Query) -> list[Detection]:
    return []


def has_word(label: str) -> bool:
    """Whether there is a letter or a digit in a label, of any script: something that can be looked for."""
    return any(character.isalnum() for character in label)
