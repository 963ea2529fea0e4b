"""What is asked together is answered as alone: real classes, pictures of several sizes, labels of several lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny_grounding import counted, noise, save_all

from idc.errors import UserError
from idc.models.batches import each_picture_once, in_batches, same_pictures
from idc.models.grounding import Detection, Detector, GroundedMasks, GroundingDino, Owlv2ByPicture, Prompt, Query, Sam

PIXELS, CONFIDENCE = 1e-3, 1e-5  # float32: what rounding may do
LONG = "the cat meets another ball on the green floor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("grounding"))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """The first and the last are of one size for GroundingDINO, the others of two more."""
    shapes = ((40, 64), (48, 64), (64, 40), (80, 128))
    return [noise(*shape, 3, seed=k) for k, shape in enumerate(shapes)]


def agree(some: Sequence[Sequence[Detection]], others: Sequence[Sequence[Detection]]) -> None:
    assert [len(boxes) for boxes in some] == [len(boxes) for boxes in others]
    rows, wanted = (np.array([box for boxes in found for box in boxes]) for found in (some, others))
    assert len(rows)
    assert np.abs(rows - wanted)[:, :4].max() < PIXELS
    assert np.abs(rows - wanted)[:, 4].max() < CONFIDENCE


@contextmanager
def memory_for(most: int, module: torch.nn.Module) -> Iterator[list[int]]:
    """A device on which `module` has room for a batch of `most`; all sizes that were tried."""
    tried: list[int] = []

    def refuse(_: Any, inputs: Sequence[Any], named: dict[str, Any]) -> None:
        tried.append(next(iter([*inputs, *named.values()])).shape[0])
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = module.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield tried
    finally:
        hook.remove()


# GroundingDINO


def dino(folder: Path, **settings: Any) -> GroundingDino:
    return GroundingDino(str(folder / "dino"), **{"threshold": 0.05, **settings}).load()


def test_grounding_dinos_boxes_are_those_of_each_query_alone_in_its_order(
    folder: Path, pictures: list[np.ndarray]
) -> None:
    detector = dino(folder, batch=1)
    queries = [Query(picture, label, picture) for label in ("red cube", LONG, "ball") for picture in pictures]
    alone = detector.detect_each(queries)
    agree(alone, [detector.detect_each([query])[0] for query in queries])
    for batch in (3, 8):
        detector.batch = batch
        found = detector.detect_each(queries)
        agree(found, alone)
        agree(detector.detect_each(queries[::-1])[::-1], alone)
    assert detector.detect_each(queries) == found  # to the bit
    assert len({tuple(boxes) for boxes in found}) == len(queries)  # no two are alike, so that order shows
    agree(detector.detect(pictures, LONG, pictures[0]), alone[4:8])
    assert detector.detect_each([]) == detector.detect([], "ball", pictures[0]) == []


def test_swin_sees_a_picture_once_for_all_its_labels(folder: Path, pictures: list[np.ndarray]) -> None:
    detector = dino(folder, batch=6)
    labels = ("red cube", LONG, "ball")
    views = [picture[:] for picture in pictures]
    queries = [
        Query(p, label, p) for label, some in zip(labels, (pictures, views, pictures), strict=True) for p in some
    ]
    with counted(detector._model.model.backbone.conv_encoder) as seen:
        detector.detect_each(queries)
    assert sorted(seen) == [1, 1, 2]  # three sizes
    with counted(detector._model.model.backbone.conv_encoder) as seen:
        for query in queries:
            detector.detect_each([query])
    assert seen == [1] * 12
    copies = [Query(pictures[0].copy(), label, pictures[0]) for label in labels]
    with counted(detector._model.model.backbone.conv_encoder) as seen:
        agree(detector.detect_each(copies), detector.detect_each([q._replace(picture=pictures[0]) for q in copies]))
    assert seen == [3, 1]
    many = dino(folder, batch=2)  # fewer than the labels of one picture
    with counted(many._model.model.backbone.conv_encoder) as seen:
        many.detect_each([Query(pictures[1], label, pictures[1]) for label in labels])
    assert seen == [1, 1]


def test_pictures_of_several_sizes_would_not_go_together(folder: Path, pictures: list[np.ndarray]) -> None:
    """Why they are kept apart: with its mask, a padded picture has boxes that are not those of the picture."""
    model = dino(folder)
    images, text = model._images, model._tokenizer(["ball."], return_tensors="pt")
    alone = images(images=[pictures[1]], return_tensors="pt")
    padded = images(images=[pictures[1], pictures[0]], return_tensors="pt")
    assert padded["pixel_mask"][0].float().mean() < 1
    (height, width), shape = alone["pixel_mask"].shape[1:], padded["pixel_mask"].shape[1:]
    scale = torch.tensor([shape[1] / width, shape[0] / height] * 2)
    with torch.no_grad():
        boxes = model._model(**alone, **text).pred_boxes[0]
        both = model._model(**padded, **text.__class__({k: v.expand(2, -1) for k, v in text.items()})).pred_boxes[0]
    moved = ((both * scale - boxes) * torch.tensor([64, 48, 64, 48])).abs().amax(-1)
    assert moved.median() > 100 * PIXELS


def test_a_label_longer_than_the_model_reads_is_cut(folder: Path, pictures: list[np.ndarray]) -> None:
    detector = dino(folder)
    longer = Query(pictures[0], " ".join(["red ball and blue cube"] * 20), pictures[0])
    short = longer._replace(label="ball")
    agree(detector.detect_each([longer, short]), [detector.detect_each([q])[0] for q in (longer, short)])


# OWLv2


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_owlv2s_boxes_are_those_of_each_query_alone_and_a_picture_is_seen_once(
    folder: Path, pictures: list[np.ndarray], batch: int
) -> None:
    detector = Owlv2ByPicture(str(folder / "owl"), threshold=0.2, batch=batch).load()
    references = [noise(24, 16, 3, seed=7), pictures[0], noise(16, 24, 3, seed=8)]
    queries = [Query(picture, "", reference) for reference in references for picture in pictures]
    alone = [detector.detect_each([query])[0] for query in queries]
    with counted(detector._model.owlv2.vision_model) as seen:
        found = detector.detect_each(queries)
    agree(found, alone)
    assert seen == {1: [1] * 7, 3: [3, 3, 1], 8: [3, 4]}[batch]  # the references, then the pictures
    agree(detector.detect_each(queries[::-1])[::-1], alone)
    assert detector.detect_each([]) == []


# SAM


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_sams_masks_are_those_of_each_prompt_alone_and_a_picture_is_encoded_once(
    folder: Path, pictures: list[np.ndarray], batch: int
) -> None:
    sam = Sam(str(folder / "sam"), batch=batch).load()
    boxes = [Detection(2, 3, 30, 35, 0.9), Detection(10, 0, 40, 20, 0.8), Detection(0, 0, 8, 8, 0.7)]
    prompts = [
        Prompt(pictures[0], boxes[:2]), Prompt(pictures[1], []), Prompt(pictures[2], boxes),
        Prompt(pictures[0], boxes[2:]), Prompt(pictures[3], boxes[1:2]), Prompt(pictures[0][:], []),
    ]  # fmt: skip
    with counted(sam._model.vision_encoder) as seen:
        masks = sam.masks_each(prompts)
    assert seen == {1: [1, 1, 1], 3: [3], 8: [3]}[batch]
    for (picture, few), mask in zip(prompts, masks, strict=True):
        assert mask.shape == (len(few), *picture.shape[:2])
        assert mask.dtype == np.bool_
        for box, own in zip(few, mask, strict=True):
            assert np.array_equal(own, sam.masks(picture, [box])[0])
    assert 0 < np.mean([mask.mean() for mask in masks if mask.size]) < 1
    assert len({mask.tobytes() for mask in masks if mask.size}) == 4


def test_what_is_not_asked_loads_nothing(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    sam = Sam(str(tmp_path / "no such folder"))
    assert sam.masks_each([]) == []
    assert [mask.shape for mask in sam.masks_each([Prompt(p, []) for p in pictures[:2]])] == [(0, 40, 64), (0, 48, 64)]


def test_grounded_masks_are_those_of_each_query_and_each_encoder_sees_a_picture_once(
    folder: Path, pictures: list[np.ndarray]
) -> None:
    grounded = GroundedMasks(dino(folder, threshold=0.25), Sam(str(folder / "sam")).load())
    queries = [Query(picture, label, pictures[0]) for label in ("ball", "red cube", "...") for picture in pictures]
    swin, sam = grounded.detector._model.model.backbone, grounded.segmenter._model.vision_encoder
    with counted(swin.conv_encoder) as boxed, counted(sam) as encoded:
        masks = grounded.masks_each(queries)
    assert (sum(boxed), sum(encoded)) == (4, 4)
    for query, mask in zip(queries, masks, strict=True):
        (own,) = grounded.masks_each([query])
        assert (mask is None) == (own is None)
        assert mask is None or (mask.shape == query.picture.shape[:2] and np.array_equal(mask, own))
    assert [mask is not None for mask in masks] == [True] * 8 + [False] * 4
    assert grounded.masks_each([]) == []


# Memory


@pytest.mark.parametrize("most", [1, 3])
def test_what_does_not_fit_into_memory_goes_by_halves(folder: Path, pictures: list[np.ndarray], most: int) -> None:
    detector, sam = dino(folder), Sam(str(folder / "sam"), batch=4).load()
    queries = [Query(pictures[0], label, pictures[0]) for label in ("red", "blue", LONG, "ball", "cat", "green cube")]
    wanted = detector.detect_each(queries)
    with memory_for(most, detector._model) as tried:
        agree(detector.detect_each(queries), wanted)
    assert tried == {1: [6, 3, 1, 2, 1, 1, 3, 1, 2, 1, 1], 3: [6, 3, 3]}[most]
    prompts = [Prompt(picture, [Detection(2, 3, 30, 35, 0.9)]) for picture in pictures]
    masks = sam.masks_each(prompts)
    with memory_for(most, sam._model.vision_encoder) as tried:
        assert all(map(np.array_equal, sam.masks_each(prompts), masks))
    assert tried == {1: [4, 2, 1, 1, 2, 1, 1], 3: [4, 2, 2]}[most]
    owl = Owlv2ByPicture(str(folder / "owl"), threshold=0.2).load()
    wanted = owl.detect(pictures, "", pictures[1])
    with memory_for(most, owl._model.owlv2.vision_model):
        agree(owl.detect(pictures, "", pictures[1]), wanted)


def test_what_does_not_fit_alone_is_an_error_and_leaves_the_model_as_it_was(
    folder: Path, pictures: list[np.ndarray]
) -> None:
    detector = dino(folder)
    queries = [Query(pictures[0], label, pictures[0]) for label in ("red", "blue")]
    wanted = detector.detect_each(queries)
    with memory_for(0, detector._model.model.encoder), pytest.raises(torch.OutOfMemoryError):
        detector.detect_each(queries)
    assert detector.detect_each(queries) == wanted
    assert not detector._model.model.backbone._forward_hooks
    assert not detector._model.model.backbone._forward_pre_hooks


def test_batches_halve_only_what_fails_and_keep_the_order() -> None:
    calls: list[int] = []

    def squares(some: Sequence[int]) -> list[int]:
        calls.append(len(some))
        if len(some) > 1 and 5 in some:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [n * n for n in some]

    assert in_batches(range(10), 4, squares) == [n * n for n in range(10)]
    assert calls == [4, 4, 2, 1, 1, 2, 2]
    assert in_batches([], 4, squares) == []


def test_pictures_are_the_same_by_their_memory() -> None:
    clip = noise(2, 8, 8, 3)
    assert same_pictures([clip[0], clip[1], clip[0], clip[0].copy(), clip[0][:4], clip[0][::-1]]) == [
        [0, 2], [1], [3], [4], [5]
    ]  # fmt: skip
    assert same_pictures([]) == []


def test_rows_of_the_same_picture_are_computed_once_and_given_to_each() -> None:
    class Nested(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return [(x + y, [x - y])], y

    model, x = Nested(), torch.arange(4.0)
    rows = [0, 1, 0, 2]
    batch = x[rows]
    plain = model(batch, 2 * batch)
    with counted(model) as seen, each_picture_once(model, rows):
        ((total, (difference,)),), second = model(batch, 2 * batch)
    assert seen == [3]
    assert torch.equal(total, plain[0][0][0])
    assert torch.equal(difference, plain[0][0][1][0])
    assert torch.equal(second, plain[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, x: model(x=x), r"\[\] rows by position and \['x'\] by name; known is 4 rows"),
        (lambda model, x: model(x, y=x), r"\[4\] rows by position and \['y'\] by name"),
        (lambda model, x: model(x[:3]), r"\[3\] rows by position"),
        (lambda model, x: model(x, x[0]), r"\[4, 0\] rows"),
        (lambda model, x: model(x, None), "known is 4 rows in each"),
        (lambda model, x: model(x, torch.ones(4), torch.tensor(0.0)), r"\[4, 4, 0\] rows"),
        (lambda model, x: model(), r"\[\] rows"),
        (lambda model, x: model(x, torch.arange(4)), "dict came back; known are tensors of 3 rows"),
        (lambda model, x: model(x, torch.arange(4.0)), r"a tensor \[1\] came back"),
    ],
)
def test_an_encoder_that_is_called_otherwise_is_no_silent_mixing_of_pictures(call: Any, words: str) -> None:
    class Encoder(torch.nn.Module):
        def forward(self, x: Any = None, y: Any = None, z: Any = None) -> Any:
            if y is not None:
                return {"x": x} if y.dtype == torch.int64 else (x, [x.sum().reshape(1)])
            return x

    model, x = Encoder(), torch.arange(4.0)
    with each_picture_once(model, [0, 1, 0, 2]), pytest.raises(RuntimeError, match=words):
        call(model, x)
    assert torch.equal(model(x=x), x)  # and nothing of it is left
    with each_picture_once(model, [0, 1, 2, 3]):
        assert torch.equal(model(x=x), x)


@pytest.mark.parametrize("make", [GroundingDino, Owlv2ByPicture, Sam])
def test_a_batch_has_at_least_one_and_is_no_part_of_the_identity(make: Callable[..., Detector | Sam]) -> None:
    """It is a matter of the device's memory: a collection goes on elsewhere with another."""
    with pytest.raises(UserError, match="batch=0"):
        make(batch=0)
    assert make(batch=1).fingerprint == make(batch=16).fingerprint
