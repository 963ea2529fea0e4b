"""From samples to conditions: cached and fresh features agree, drops drop what they say, padding is marked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from idc.errors import UserError
from idc.models.codecs import WanVAECodec
from idc.models.conditioners import ToyTextConditioner
from idc.models.conditioning import ConditionDropout, Drop, Encoders, feature_names
from idc.models.toy_codec import CosineCodec
from idc.models.vlm import ToyVLM
from idc.types import Sample, Subject


def make_sample(i: int, subjects: int, side: int = 32) -> Sample:
    g = torch.Generator().manual_seed(i)
    return Sample(
        id=f"s{i}",
        caption=f"a red circle number {i}",
        video_CTHW=torch.rand(3, 5, 32, 32, generator=g) * 2 - 1,
        subjects=tuple(Subject(torch.rand(3, side, side, generator=g) * 2 - 1, f"thing {k}") for k in range(subjects)),
        fps=8.0,
    )


@pytest.fixture
def encoders() -> Encoders:
    return Encoders(CosineCodec(), ToyTextConditioner(), ToyVLM())


def test_features_from_the_cache_give_the_condition_of_fresh_ones(encoders: Encoders) -> None:
    samples = [make_sample(0, 2), make_sample(1, 2)]
    cached = encoders.features(samples)
    for sample, features in zip(samples, cached, strict=True):
        assert set(features) == set(feature_names(len(sample.subjects), vlm=True))
    for drop in Drop:
        fresh = encoders.features(samples, [drop] * 2)
        assert len(fresh[0]) < len(cached[0])  # only what the drop needs was encoded
        a, b = encoders.condition(fresh, drop), encoders.condition(cached, drop)
        assert torch.equal(a.text_BLD, b.text_BLD)
        assert torch.equal(a.vlm_BLD, b.vlm_BLD)
        assert len(a.references) == len(b.references) == (2 if drop.references else 0)
        assert all(torch.equal(x, y) for x, y in zip(a.references, b.references, strict=True))


def test_text_is_padded_back_to_what_the_conditioner_gave(encoders: Encoders) -> None:
    samples = [make_sample(0, 1), make_sample(1, 1)]
    condition = encoders.condition(encoders.features(samples))
    assert torch.equal(condition.text_BLD, encoders.text.encode([s.caption for s in samples]))


def test_a_dropped_condition_is_the_empty_caption_and_absent_references(encoders: Encoders) -> None:
    samples = [make_sample(0, 2)] * 4
    drops = list(Drop)
    condition = encoders.condition(encoders.features(samples), drops)
    null = encoders.text.encode([""])[0]
    for b, drop in enumerate(drops):
        assert torch.equal(condition.text_BLD[b], null) == (drop in (Drop.TEXT, Drop.BOTH))
        assert bool(condition.reference_sizes_BN2[b].any()) == drop.references


def test_ragged_references_are_padded_and_their_sizes_kept(encoders: Encoders) -> None:
    samples = [make_sample(0, 1, side=32), make_sample(1, 2, side=48)]
    features = encoders.features(samples)
    condition = encoders.condition(features)
    assert condition.reference_sizes_BN2.tolist() == [[[4, 4], [0, 0]], [[6, 6], [6, 6]]]
    assert torch.equal(condition.references[0][0, :, :4, :4], features[0]["reference_0"])
    assert condition.references[0][0, :, 4:].abs().sum() == 0
    uniform = encoders.condition(features[1:])
    assert uniform.reference_sizes_BN2 is None  # nothing padded: attention gets no mask
    assert uniform.vlm_mask_BL is None


def test_dropout_frequencies_follow_the_probabilities_and_the_seed_alone() -> None:
    dropout = ConditionDropout(text=0.2, references=0.1, both=0.3)
    seeds = torch.arange(4000)
    drops = dropout.draw(seeds)
    for drop, p in ((Drop.TEXT, 0.2), (Drop.REFERENCES, 0.1), (Drop.BOTH, 0.3), (Drop.NOTHING, 0.4)):
        share = sum(d is drop for d in drops) / len(drops)
        assert abs(share - p) < 4 * (p * (1 - p) / len(drops)) ** 0.5
    assert dropout.draw(seeds.flip(0)) == drops[::-1]


@pytest.mark.parametrize("bad", [{"text": -0.1}, {"text": 0.6, "both": 0.6}])
def test_impossible_probabilities_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="condition dropout"):
        ConditionDropout(**bad)


def test_fingerprints_change_with_their_own_encoder_alone(encoders: Encoders) -> None:
    def changed(*other: Any) -> set[str]:
        found = Encoders(*other).fingerprints
        return {part for part, value in encoders.fingerprints.items() if found.get(part) != value}

    assert changed(CosineCodec(), ToyTextConditioner(), ToyVLM()) == set()
    assert changed(CosineCodec(), ToyTextConditioner(), None) == {"vlm"}
    assert changed(CosineCodec(), ToyTextConditioner(dim=64), ToyVLM()) == {"text"}
    assert changed(CosineCodec(), ToyTextConditioner(), ToyVLM(dim=64)) == {"vlm"}
    assert changed(WanVAECodec(), ToyTextConditioner(), ToyVLM()) == {"latents", "references"}


def test_a_part_is_encoded_by_itself_as_with_the_others(encoders: Encoders) -> None:
    samples = [make_sample(0, 2), make_sample(1, 1)]
    together = encoders.features(samples)
    apart: list[dict[str, torch.Tensor]] = [{}, {}]
    for part in encoders.fingerprints:
        for found, features in zip(apart, encoders.features(samples, parts=[part]), strict=True):
            assert not found.keys() & features.keys()
            found.update(features)
    for found, features in zip(apart, together, strict=True):
        assert found.keys() == features.keys()
        assert all(torch.equal(found[name], features[name]) for name in features)
