"""Detectors and SAM against direct transformers computations, and what is kept of their boxes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny_grounding import noise, save_all, save_grounding_dino, save_owlv2, save_sam

from idc.errors import UserError
from idc.models.boxes import best_boxes
from idc.models.grounding import Detection, GroundingDino, Owlv2ByPicture, Prompt, Query, Sam


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("grounding"))


def test_grounding_dino_is_transformers_own(folder: Path) -> None:
    from PIL import Image
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoProcessor
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    path = folder / "dino"
    images = GroundingDinoImageProcessorPil.from_pretrained(path)
    processor = GroundingDinoProcessor(images, AutoTokenizer.from_pretrained(path))
    model = GroundingDinoForObjectDetection.from_pretrained(path).eval()
    pictures = [noise(40, 64, 3, seed=k) for k in range(2)] + [noise(4, 64, 3)]
    found = GroundingDino(str(path), threshold=0.3, nms=1).detect(pictures, " Red  ball.", noise(8, 8, 3))
    counts = set()
    for picture, boxes in zip(pictures, found, strict=True):
        inputs = processor(images=Image.fromarray(picture), text="red ball.", return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        (expected,) = processor.post_process_grounded_object_detection(
            outputs, inputs.input_ids, threshold=0.3, text_threshold=0.25, target_sizes=[picture.shape[:2]]
        )
        order = expected["scores"].argsort(descending=True)
        limits = torch.tensor([64, picture.shape[0]] * 2)
        wanted = expected["boxes"][order].clamp(torch.zeros(4), limits)
        large = (wanted[:, 2:] - wanted[:, :2]).prod(-1) >= 1
        assert torch.allclose(torch.tensor([box[:4] for box in boxes]), wanted[large], atol=1e-3)
        assert [box.score for box in boxes] == pytest.approx(expected["scores"][order][large].tolist(), abs=1e-5)
        counts.add(len(boxes))
    assert max(counts) > 1


ODD_LABELS = ("", " . ", "...", "!?", "- ,", "\N{PARTY POPPER}", "\N{HEAVY BLACK HEART}\ufe0f", "\x00", "\u0301")


def test_a_label_without_a_word_is_of_nothing_and_changes_no_others_boxes(folder: Path) -> None:
    """And one of a tokenizer's own marks, or of another script, is a label as any."""
    dino = GroundingDino(str(folder / "dino"), threshold=0.05, batch=4)
    picture = noise(40, 64, 3)
    worded = ["red ball", "[SEP]", "[PAD] [UNK]", "\u8bcd", "7", "a. b", "...cat"]
    mixed = [label for pair in zip(ODD_LABELS, worded, strict=False) for label in pair] + list(ODD_LABELS)
    found = dino.detect_each([Query(picture, label, picture) for label in mixed])
    assert [boxes for label, boxes in zip(mixed, found, strict=True) if label in ODD_LABELS] == [[]] * 16
    alone = dino.detect_each([Query(picture, label, picture) for label in worded])
    assert [boxes for label, boxes in zip(mixed, found, strict=True) if label not in ODD_LABELS] == alone
    assert all(alone)
    assert dino.detect([picture] * 2, "...", picture) == [[], []]


def test_owlv2_by_picture_is_transformers_image_guided_detection(folder: Path) -> None:
    from transformers import Owlv2ForObjectDetection
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    path = folder / "owl"
    model = Owlv2ForObjectDetection.from_pretrained(path).eval()
    images = Owlv2ImageProcessorPil.from_pretrained(path)
    reference, pictures = noise(24, 16, 3, seed=9), [noise(40, 64, 3), noise(64, 40, 3)]
    for picture, boxes in zip(
        pictures, Owlv2ByPicture(str(path), threshold=0.2, nms=1).detect(pictures, "", reference), strict=True
    ):
        pixels, query = (images(images=p, return_tensors="pt").pixel_values for p in (picture, reference))
        with torch.no_grad():
            output = model.image_guided_detection(pixel_values=pixels, query_pixel_values=query)
        scores = output.logits[0, :, 0].sigmoid()
        x, y, w, h = (64 * output.target_pred_boxes[0]).unbind(-1)  # of the padded square
        height, width = picture.shape[:2]
        rows = torch.stack([(x - w / 2).clamp(0, width), (y - h / 2).clamp(0, height),
                            (x + w / 2).clamp(0, width), (y + h / 2).clamp(0, height), scores], 1)  # fmt: skip
        area = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1])
        rows = rows[(scores > 0.2) & (area >= 1)]
        assert len(rows) > 1
        assert torch.allclose(torch.tensor(boxes), rows[rows[:, 4].argsort(descending=True)], atol=1e-4)


SLIVERS = [(1, 500), (500, 1), (2000, 1)]


def test_thin_pictures_are_looked_at_the_right_way_round(folder: Path) -> None:
    """Heights of 1, 3 and 4 look like channels; what stands upright is found where its mirrored pixels lie."""
    dino, owl = GroundingDino(str(folder / "dino"), threshold=0.05), Owlv2ByPicture(str(folder / "owl"), threshold=0.2)
    sam, whole = Sam(str(folder / "sam")), noise(40, 64, 3)
    for height, width in ((1, 1), (1, 60), (3, 60), (4, 100), (60, 1)):
        picture = noise(height, width, 3, seed=width)
        for detector in (dino, owl):
            ((found,), alone) = detector.detect([picture], "ball", whole), detector.detect([whole], "ball", picture)
            assert alone[0]
            assert all(0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height for box in found)
        assert sam.masks(picture, [Detection(0, 0, width, height, 0.9)]).shape == (1, height, width)


def test_in_a_sliver_and_by_one_nothing_is_found_and_the_others_are_as_alone(folder: Path) -> None:
    dino, owl = GroundingDino(str(folder / "dino"), threshold=0.05), Owlv2ByPicture(str(folder / "owl"), threshold=0.2)
    sam, whole = Sam(str(folder / "sam")), noise(40, 64, 3)
    for size in SLIVERS:
        sliver, box = noise(*size, 3), Detection(0, 0, 1, 1, 0.9)
        for detector in (dino, owl):
            lost, found = detector.detect([sliver, whole], "ball", whole)
            assert lost == []
            assert found == detector.detect([whole], "ball", whole)[0] != []
        assert owl.detect([whole], "ball", sliver) == [[]]
        lost, found = sam.masks_each([Prompt(sliver, [box, box]), Prompt(whole, [box])])
        assert lost.shape == (2, *size)
        assert not lost.any()
        assert np.array_equal(found, sam.masks(whole, [box]))
    for odd in (noise(40, 64), noise(40, 64, 1), noise(40, 64, 4), noise(40, 64, 3) / 255):
        for use in (lambda odd=odd: dino.detect([odd], "ball", whole), lambda odd=odd: owl.detect([whole], "", odd),
                    lambda odd=odd: sam.masks(odd, [Detection(0, 0, 9, 9, 0.9)])):  # fmt: skip
            with pytest.raises(UserError, match=r"must be uint8 \[H, W, 3\]"):
                use()


def test_sams_masks_against_a_computation_by_hand(folder: Path) -> None:
    from PIL import Image
    from transformers import SamModel

    picture = noise(50, 100, 3)  # scaled by 0.64 to 32 x 64, padded at the bottom
    boxes = [Detection(10, 5, 60, 45, 0.9), Detection(0, 0, 20, 20, 0.8)]
    small = np.asarray(Image.fromarray(picture).resize((64, 32), Image.Resampling.BILINEAR), np.float32) / 255
    small = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = torch.nn.functional.pad(torch.tensor(small, dtype=torch.float32).permute(2, 0, 1)[None], (0, 0, 0, 32))
    model = SamModel.from_pretrained(folder / "sam").eval()
    with torch.no_grad():
        prompt = 0.64 * torch.tensor([[box[:4] for box in boxes]])
        logits = model(pixel_values=pixels, input_boxes=prompt, multimask_output=False).pred_masks[0]
    settings = {"mode": "bilinear", "align_corners": False}
    logits = torch.nn.functional.interpolate(logits, (64, 64), **settings)[..., :32, :]
    expected = (torch.nn.functional.interpolate(logits, (50, 100), **settings) > 0)[:, 0].numpy()
    sam = Sam(str(folder / "sam"))
    masks = sam.masks(picture, boxes)
    assert masks.dtype == np.bool_
    assert masks.shape == (2, 50, 100)
    assert 0 < expected.mean() < 1
    assert (masks != expected).mean() < 1e-3  # pixels at a threshold
    assert (sam.masks(picture, boxes[:1]) == masks[:1]).all()
    assert sam.masks(picture, []).shape == (0, 50, 100)


def test_copies_leave_weights_behind_and_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    owl = Owlv2ByPicture(str(folder / "owl"), threshold=0.2).load()
    copy = pickle.loads(pickle.dumps(owl))
    assert copy._model is None
    picture = noise(40, 64, 3)
    assert copy.detect([picture], "", picture) == owl.detect([picture], "", picture)
    assert copy.fingerprint == owl.fingerprint != Owlv2ByPicture(str(folder / "owl"), threshold=0.3).fingerprint
    for model, save in ((GroundingDino, save_grounding_dino), (Owlv2ByPicture, save_owlv2), (Sam, save_sam)):
        path = tmp_path / model.__name__
        with pytest.raises(UserError, match="does not exist"):
            model(str(path)).load()
        save(path)
        (path / "preprocessor_config.json").unlink()
        with pytest.raises(UserError, match="preprocessor_config"):
            model(str(path)).load()
    (tmp_path / "Sam" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=str(tmp_path / "Sam")):
        Sam(str(tmp_path / "Sam")).load()
    for settings in ({"threshold": 1.5}, {"nms": -0.1}):
        with pytest.raises(UserError, match="between 0 and 1"):
            GroundingDino("x/y", **settings)


def test_overlapping_boxes_yield_to_the_best() -> None:
    boxes = torch.tensor(
        [[0, 0, 10, 10], [1, 0, 11, 10], [5, 0, 15, 10], [-5, -5, 200, 5], [30, 30, 30.2, 40], [50, 5, 60, 9]]
    )
    scores = torch.tensor([0.8, 0.9, 0.7, 0.6, 0.95, 0.5])
    found = best_boxes(boxes, scores, (20, 40), threshold=0.5, nms=0.7)
    # 0 overlaps 1 by 9 / 11; 2 overlaps it by 6 / 14; 3 is cut to the picture; 4 is a sliver; 5 is at the threshold.
    assert [box[:4] for box in found] == [(1, 0, 11, 10), (5, 0, 15, 10), (0, 0, 40, 5)]
    assert [box.score for box in found] == pytest.approx([0.9, 0.7, 0.6])
    assert len(best_boxes(boxes, scores, (20, 40), threshold=0.5, nms=1)) == 4
    outside = best_boxes(boxes + 1000, scores, (20, 40), threshold=0, nms=1)
    assert outside == best_boxes(boxes, torch.full((6,), torch.nan), (20, 40), threshold=0, nms=1) == []
    assert best_boxes(torch.zeros(0, 4), torch.zeros(0), (20, 40), threshold=0, nms=1) == []
    many = torch.arange(150.0)[:, None] * torch.tensor([0, 2, 0, 2]) + torch.tensor([0, 0, 2, 2])
    assert len(best_boxes(many, torch.rand(150), (400, 2), threshold=0, nms=0.7)) == 100


def test_a_crop_is_the_boxs_pixels_and_never_empty() -> None:
    picture = noise(20, 30, 3)
    assert (Detection(2.4, 3.6, 10.2, 8.7, 1).crop(picture) == picture[4:9, 2:10]).all()
    assert Detection(29.8, 19.8, 30, 20, 1).crop(picture).shape == (1, 1, 3)
    assert Detection(5.4, 0, 5.45, 20, 1).crop(picture).shape == (20, 1, 3)
