"""NexusScore's two measures against known scenes and against direct computations with the real classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny_embedders import save_clip, save_gme
from _tiny_grounding import counted, noise, save_all

from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score
from idc.metrics.nexus import Look, NexusScore, benchmark_references, benchmark_score, cut_out
from idc.metrics.total import normalise
from idc.models.embedders import CLIPEmbedder, GMEEmbedder
from idc.models.grounding import Detection, Detector, GroundedMasks, GroundingDino, Owlv2ByPicture, Query, Sam

RED, BLUE, GREY = (220, 20, 20), (20, 20, 220), (90, 90, 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_all(tmp_path_factory.mktemp("grounding"))
    save_clip(root / "clip", width=16)
    return root


class ColourFinder(Detector):
    """Finds the reference's colour: one box around all pixels of exactly that colour, with a scripted confidence."""

    path, threshold, nms, name = "colours", 0.25, 0.7, "colours"

    def __init__(self, confidence: Sequence[float] = (0.9,)) -> None:
        self.confidence = confidence

    def load(self, device: Any = "cpu", dtype: Any = None) -> ColourFinder:
        return self

    def _build(self) -> None: ...

    def detect_each(self, queries: Sequence[Query]) -> list[list[Detection]]:
        found = []
        for k, (picture, _, reference) in enumerate(queries):
            colour = np.median(reference.reshape(-1, 3), 0)
            rows, columns = np.nonzero((picture == colour).all(-1))
            score = self.confidence[k % len(self.confidence)]
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
            found.append([] if box is None else [Detection(*map(float, box), score)])
        return found


class ColourVectors:
    """A picture's unit vector is its mean colour; a text's is the colour that it names. Keeps what it saw."""

    name, device = "mean colour", torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def load(self, device: Any = "cpu") -> None: ...

    def unload(self) -> None: ...

    def embed_images(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        self.seen += pictures
        means = torch.tensor(np.array([picture.reshape(-1, 3).mean(0) for picture in pictures]))
        return torch.nn.functional.normalize(means.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str], instruction: str = "") -> torch.Tensor:
        words = {"red": RED, "blue": BLUE, "human": RED, "odd": (20, 220, 20)}
        assert instruction == "Find an image that matches the given text."
        return torch.nn.functional.normalize(torch.tensor([words[text] for text in texts]).float(), dim=-1)


def scene(present: Sequence[bool], colour: tuple[int, int, int] = RED) -> tuple[np.ndarray, np.ndarray]:
    """Frames `[T, 24, 40, 3]` in which a 6 x 9 patch moves over grey where it is present, and its masks."""
    frames = np.full((len(present), 24, 40, 3), GREY, np.uint8)
    masks = np.zeros(frames.shape[:3], np.bool_)
    for t, there in enumerate(present):
        if there:
            masks[t, 4 + t % 8 : 10 + t % 8, t % 30 : t % 30 + 9] = True
    frames[masks] = colour
    return frames, masks


def plain(colour: tuple[int, int, int], name: str) -> Reference:
    return Reference(np.full((12, 8, 3), colour, np.uint8), name)


def test_the_benchmarks_rule_in_closed_form() -> None:
    looks = [[Look(0.9, 0.4, 0.8)], [], [Look(0.9, 0.4, 0.6), Look(0.7, 0.31, 0.4)], [Look(0.55, 0.9, 0.9)],
             [Look(0.9, 0.30, 0.9)], [Look(0.6, 0.9, 0.9)]]  # fmt: skip
    value, details = benchmark_score(looks)
    assert value == pytest.approx((0.8 + 0.6 + 0.4) / 3 / 5)  # 3 kept boxes; 5 frames with any box
    assert details == {
        "pairs_with_box": 5,
        "kept_boxes": 3,
        "mean_over_pairs": pytest.approx((0.8 + 0.6) / 6),
        "found_share": pytest.approx(2 / 6),
    }
    assert benchmark_score([[], [Look(0.55, 0.9, 0.9)]])[0] is None
    assert benchmark_score([])[0] is None


def test_the_benchmark_rewards_a_subject_that_is_seldom_there_and_the_plain_mean_does_not() -> None:
    scores = {}
    for frames in (32, 16, 1):
        clip = Clip("singleobj_1", scene([t < frames for t in range(32)])[0], references=(plain(RED, "red"),))
        scores[frames] = NexusScore("opens2v-1.0", ColourVectors(), detector=ColourFinder()).score(clip)
    values = [scores[frames].value for frames in (32, 16, 1)]
    assert values == pytest.approx([1 / 32, 1 / 16, 1])
    assert [normalise("nexusscore", value, "opens2v-1.0") for value in values] == pytest.approx([0.625, 1, 1])
    assert [scores[frames].details["mean_over_pairs"] for frames in (32, 16, 1)] == pytest.approx([1, 0.5, 1 / 32])
    assert [scores[frames].details["found_share"] for frames in (32, 16, 1)] == [1, 0.5, 1 / 32]


def test_a_sliver_at_the_frames_edge_is_no_sighting_and_fails_nothing() -> None:
    """Embedders refuse pictures of such an aspect ratio."""

    class AndSlivers(ColourFinder):
        def detect_each(self, queries: Sequence[Query]) -> list[list[Detection]]:
            sliver = Detection(0.0, 3.0, 600.0, 4.0, 0.8)
            return [[*found, sliver] for found in super().detect_each(queries)]

    frames = np.repeat(scene([True] * 8)[0], 20, axis=2)  # 800 pixels wide
    clip = Clip("singleobj_1", frames, references=(plain(RED, "red"),))
    embedder = ColourVectors()
    with_slivers = NexusScore("opens2v-1.0", embedder, detector=AndSlivers()).score(clip)
    assert with_slivers == NexusScore("opens2v-1.0", ColourVectors(), detector=ColourFinder()).score(clip)
    assert with_slivers.value == pytest.approx(1 / 32)
    assert max(max(p.shape[:2]) / min(p.shape[:2]) for p in embedder.seen) < 200


def test_the_benchmark_compares_exactly_the_boxs_pixels_and_sifts() -> None:
    frames, _ = scene([True] * 32)
    vectors = ColourVectors()
    clip = Clip("singleobj_1", frames, references=(plain(RED, "red"),))
    # Of four frames, one is too doubtful to be a box and one to be kept.
    metric = NexusScore("opens2v-1.1", vectors, detector=ColourFinder([0.9, 0.45, 0.58, 0.7]))
    score = metric.score(clip)
    assert score.value == pytest.approx(1 / 24)
    assert (score.details["pairs_with_box"], score.details["kept_boxes"]) == (24, 16)
    assert all((picture == RED).all() and picture.shape in ((12, 8, 3), (6, 9, 3)) for picture in vectors.seen)

    unlike = Clip("a", frames, references=(plain(RED, "odd"),))  # the label does not match what is found
    score = NexusScore("opens2v-1.0", ColourVectors(), detector=ColourFinder()).score(unlike)
    assert (score.value, score.reason) == (None, "no subject is found in any frame")
    assert score.details["pairs_with_box"] == 32
    nowhere = Clip("a", frames, references=(plain(BLUE, "blue"),))
    assert NexusScore("opens2v-1.0", ColourVectors(), detector=ColourFinder()).score(nowhere).value is None

    both = Clip("a", frames, references=(plain(RED, "red"), plain(BLUE, "blue")))
    score = NexusScore("opens2v-1.0", ColourVectors(), detector=ColourFinder()).score(both)
    assert score.value == pytest.approx(1 / 32)
    assert [subject["found_share"] for subject in score.details["subjects"]] == [1, 0]
    assert score.details["found_share"] == 0.5


def test_people_are_looked_for_as_the_benchmark_does() -> None:
    references = tuple(plain(RED, name) for name in ("Man", "Woman", "dog"))

    def labels(**item: str) -> list[str]:
        return [
            label
            for _, label in benchmark_references(Clip(frames_THWC=scene([True])[0], references=references, **item))
        ]

    assert labels(id="multiface_3") == labels(id="x", category="faceobj") == ["dog"]
    assert labels(id="x", category="humanobj") == labels(id="singlehuman_1") == ["human", "human", "dog"]
    assert labels(id="multiobject_1") == ["Man", "Woman", "dog"]
    metric = NexusScore("opens2v-1.0", ColourVectors(), detector=ColourFinder())
    face = Clip("singleface_1", scene([True])[0], references=references[:1])
    assert not metric.applies(face)
    metric.update(face)
    assert int(metric.expected) == 0
    human = Clip("singlehuman_1", scene([True])[0], references=references[:1])
    assert metric.score(human).value == pytest.approx(1 / 32)  # one frame counts 32 times, as in the benchmark


def test_what_is_cut_out_is_the_masked_pixels_on_black() -> None:
    picture, mask = noise(20, 30, 3), np.zeros((20, 30), np.bool_)
    mask[5:9, 10:22] = True
    mask[6, 12] = False
    found = cut_out(picture, mask)
    assert found.shape == (12, 12, 3)
    inner = picture[5:9, 10:22].copy()
    inner[1, 2] = 0
    assert (found[4:8] == inner).all()
    assert not found[:4].any()
    assert not found[8:].any()
    whole = cut_out(picture, mask, crop=False)
    assert (whole[mask] == picture[mask]).all()
    assert not whole[~mask].any()
    assert cut_out(picture, None).shape == (30, 30, 3)
    assert (cut_out(picture, None)[5:25] == picture).all()
    assert cut_out(picture, None, crop=False) is picture


def test_the_papers_score_is_a_mean_over_all_frames_with_known_masks() -> None:
    present = [t % 4 != 3 for t in range(32)]
    frames, masks = scene(present)
    half = np.zeros((12, 8), np.bool_)
    half[:, :4] = True
    halved = np.full((12, 8, 3), BLUE, np.uint8)
    halved[:, :4] = RED
    references = (Reference(halved, "red", mask_HW=half), plain(BLUE, "blue"))
    clip = Clip("a", frames, references=references, masks_TNHW=np.stack([masks, np.zeros_like(masks)], 1))
    vectors = ColourVectors()
    score = NexusScore("paper", vectors, grounding=False).score(clip)
    assert score.value == pytest.approx(0.75 / 2)  # the first subject in 3 of 4 frames, the second in none
    first, second = score.details["subjects"]
    assert [value is not None for value in first["similarity"]] == present
    assert (first["found_share"], second["found_share"], second["mean"]) == (0.75, 0, 0)
    crops = [picture for picture in vectors.seen if picture.shape == (9, 9, 3)]
    assert len(crops) == 24
    assert all((crop[1:7] == RED).all() and not crop[[0, 7, 8]].any() for crop in crops)
    letter = NexusScore("paper", ColourVectors(), grounding=False, crop=False)
    assert letter.score(clip).value == pytest.approx(0.75 / 2)
    short = Clip("a", frames[:3], references=references[:1], masks_TNHW=masks[:3, None])
    once = ColourVectors()
    assert NexusScore("paper", once, grounding=False).score(short).value == pytest.approx(1)
    assert len(once.seen) == 4  # three frames that count 32 times, and the reference


def test_the_papers_score_against_a_direct_computation(folder: Path) -> None:
    """Grounded-SAM and CLIP of the real classes, tiny and random, against transformers used by hand."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPModel,
        GroundingDinoForObjectDetection,
        GroundingDinoProcessor,
        SamModel,
        SamProcessor,
    )
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    frames, reference = noise(2, 40, 64, 3, seed=5), noise(30, 20, 3, seed=6)
    dino = GroundingDinoForObjectDetection.from_pretrained(folder / "dino").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "dino")
    dino_inputs = GroundingDinoProcessor(GroundingDinoImageProcessorPil.from_pretrained(folder / "dino"), tokenizer)
    sam = SamModel.from_pretrained(folder / "sam").eval()
    sam_inputs = SamProcessor(SamImageProcessorPil.from_pretrained(folder / "sam"))
    clip = CLIPModel.from_pretrained(folder / "clip").eval()
    clip_inputs = CLIPImageProcessorPil.from_pretrained(folder / "clip")

    def embed(picture: np.ndarray) -> torch.Tensor:
        features = clip.get_image_features(**clip_inputs(images=[picture], return_tensors="pt"))
        return torch.nn.functional.normalize(features.pooler_output[0].double(), dim=0)

    def square(picture: np.ndarray) -> np.ndarray:
        side = max(picture.shape[:2])
        canvas = np.zeros((side, side, 3), np.uint8)
        top, left = (side - picture.shape[0]) // 2, (side - picture.shape[1]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        return canvas

    cosines = []
    with torch.no_grad():
        for frame in frames:
            inputs = dino_inputs(images=frame, text="ball.", return_tensors="pt")
            (found,) = dino_inputs.post_process_grounded_object_detection(
                dino(**inputs), inputs.input_ids, threshold=0.25, target_sizes=[(40, 64)]
            )
            box = found["boxes"][found["scores"].argmax()].clamp(torch.zeros(4), torch.tensor([64, 40, 64, 40]))
            inputs = sam_inputs(images=frame, input_boxes=[[box.tolist()]], return_tensors="pt")
            output = sam(**{k: inputs[k].float() for k in ("pixel_values", "input_boxes")}, multimask_output=False)
            sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
            mask = sam_inputs.post_process_masks(output.pred_masks, *sizes)[0][0, 0].numpy()
            assert mask.any()
            rows, columns = np.nonzero(mask)
            cut = (frame * mask[..., None])[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            cosines.append(float(embed(square(cut)) @ embed(square(reference))))

    grounding = GroundedMasks(GroundingDino(str(folder / "dino")), Sam(str(folder / "sam")))
    metric = NexusScore("paper", CLIPEmbedder(str(folder / "clip")), grounding=grounding)
    assert metric.models == ("dino", "sam", "clip")
    score = metric.score(Clip("a", frames, references=(Reference(reference, "Ball"),)))
    # Of two frames, linspace(0, 1, 32) cut to integers takes the first 31 times.
    assert score.value == pytest.approx((31 * cosines[0] + cosines[1]) / 32, abs=1e-4)
    assert abs(cosines[0] - cosines[1]) > 1e-3
    metric.unload()
    assert grounding.detector._model is grounding.segmenter._model is metric.embedder._model is None  # type: ignore[attr-defined]


def test_the_benchmarks_score_with_owlv2_and_gme_against_their_parts(folder: Path, tmp_path: Path) -> None:
    save_gme(tmp_path)
    owl = Owlv2ByPicture(str(folder / "owl"), threshold=0.2)
    gme = GMEEmbedder(str(tmp_path), min_tokens=1, max_tokens=16, dtype="float32")
    frames, reference = noise(2, 40, 64, 3, seed=3), noise(30, 20, 3, seed=4)
    score = NexusScore("opens2v-1.0", gme, detector=owl).score(
        Clip("singleobj_1", frames, references=(Reference(reference, "ball"),))
    )
    boxes = [[box for box in found if box.score > 0.5] for found in owl.detect(frames, "ball", reference)]
    words = gme.embed_texts(["ball"], "Find an image that matches the given text.")[0]
    times = (31, 1)  # linspace(0, 1, 32) cut to integers
    kept: list[float] = []
    for frame, found, count in zip(frames, boxes, times, strict=True):
        for left, top, right, bottom, confidence in found:
            vector = gme.embed_images([frame[round(top) : round(bottom), round(left) : round(right)]])[0]
            if confidence > 0.6 and float(vector @ words) > 0.3:
                kept += [float(vector @ gme.embed_images([reference])[0])] * count
    with_box = sum(count for found, count in zip(boxes, times, strict=True) if found)
    assert kept
    assert (score.details["kept_boxes"], score.details["pairs_with_box"]) == (len(kept), with_box)
    assert score.value == pytest.approx(np.mean(kept) / with_box, abs=1e-6)


@pytest.fixture
def three() -> Clip:
    """Three subjects in four frames."""
    pictures = [noise(30 + k, 20 + 5 * k, 3, seed=10 + k) for k in range(3)]
    references = tuple(map(Reference, pictures, ("ball", "red cube", "cat")))
    return Clip("multiobject_1", noise(4, 40, 64, 3, seed=3), references=references)


def each_alone(metric: NexusScore, clip: Clip) -> list[Score]:
    return [metric.score(replace(clip, references=(reference,))) for reference in clip.references]


def test_references_together_score_as_each_alone_and_the_networks_see_a_frame_once(folder: Path, three: Clip) -> None:
    detector, sam = GroundingDino(str(folder / "dino")).load(), Sam(str(folder / "sam")).load()
    clip = CLIPEmbedder(str(folder / "clip")).load()
    metric = NexusScore("paper", clip, grounding=GroundedMasks(detector, sam))
    metric.frames = 4
    alone = each_alone(metric, three)
    swin, encoder, vision = detector._model.model.backbone, sam._model.vision_encoder, clip._model.vision_model
    with counted(swin.conv_encoder) as boxed, counted(encoder) as encoded, counted(vision) as embedded:
        score = metric.score(three)
    assert (sum(boxed), encoded, embedded) == (4, [4], [15])  # three references and their twelve cut-outs in one pass
    for subject, one in zip(score.details["subjects"], alone, strict=True):
        (own,) = one.details["subjects"]
        assert subject["similarity"] == pytest.approx(own["similarity"], abs=1e-6)
        assert None not in own["similarity"]
    assert score.value == pytest.approx(np.mean([one.value for one in alone]), abs=1e-6)


def test_the_benchmarks_references_together_score_as_each_alone_and_what_two_look_at_is_embedded_once(
    folder: Path, three: Clip, tmp_path: Path
) -> None:
    owl = Owlv2ByPicture(str(folder / "owl"), threshold=0.2).load()
    gme = GMEEmbedder(str(save_gme(tmp_path)), min_tokens=1, max_tokens=16, dtype="float32").load()
    metric = NexusScore("opens2v-1.1", gme, detector=owl)
    metric.frames = 4
    with counted(gme._model) as embedded:
        alone = each_alone(metric, three)
        one_by_one = len(embedded)
        with counted(owl._model.owlv2.vision_model) as seen:
            score = metric.score(three)
    assert seen == [3, 4]  # the references, the frames
    boxes = sum(one.details["kept_boxes"] for one in alone)
    assert one_by_one >= boxes + 6
    assert len(embedded) - one_by_one < one_by_one / 2  # the noise's boxes are the best ones for each reference
    for subject, one in zip(score.details["subjects"], alone, strict=True):
        (own,) = one.details["subjects"]
        assert subject == pytest.approx(own, abs=1e-6)
    pairs = [one.details["pairs_with_box"] for one in alone]
    total = sum(one.value * n * one.details["kept_boxes"] for one, n in zip(alone, pairs, strict=True))
    assert score.details["kept_boxes"] == boxes > 0
    assert score.value == pytest.approx(total / boxes / sum(pairs), abs=1e-6)


def test_what_cannot_be_scored_is_a_failure_with_its_reason() -> None:
    frames, masks = scene([True] * 4)
    nobody = Clip("a", frames)
    nameless = Clip("a", frames, references=(plain(RED, "red"), plain(RED, " ")))
    benchmark = NexusScore("opens2v-1.0", ColourVectors(), detector=ColourFinder())
    known = NexusScore("paper", ColourVectors(), grounding=False)
    assert benchmark.score(nobody).reason == "no reference to look for"
    assert benchmark.score(nameless).reason == "reference 2 has no name to look for"
    pointless = Clip("a", frames, references=(plain(RED, "..."),))
    assert benchmark.score(pointless).reason == "reference 1 has no name to look for"
    assert known.score(nameless).reason == "the clip has no masks, and there is no grounding to find any"

    class Broken(ColourVectors):
        def embed_images(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
            return super().embed_images(pictures) * torch.nan

    clip = Clip("a", frames, references=(plain(RED, "red"),), masks_TNHW=masks[:, None])
    for metric in (
        NexusScore("paper", Broken(), grounding=False),
        NexusScore("opens2v-1.0", Broken(), detector=ColourFinder()),
    ):
        assert metric.score(clip).reason == "the model gave a vector that is not finite"
    with pytest.raises(UserError, match=r"did you mean 'opens2v-1\.0'|choose from"):
        NexusScore("opens2v-2.0")
    with pytest.raises(UserError, match="detector: belongs to the benchmark"):
        NexusScore("paper", detector=ColourFinder())
    with pytest.raises(UserError, match="grounding: belongs to protocol 'paper'"):
        NexusScore("opens2v-1.1", grounding=False)


def test_weights_that_are_missing_are_no_fault_of_the_clip(tmp_path: Path) -> None:
    frames, _ = scene([True])
    metric = NexusScore("opens2v-1.0", ColourVectors(), detector=Owlv2ByPicture(str(tmp_path)))
    with pytest.raises(UserError, match=r"has no config\.json"):
        metric.score(Clip("a", frames, references=(plain(RED, "red"),)))
