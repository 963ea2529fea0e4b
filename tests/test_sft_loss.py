"""The SFT stage's loss against a loop over samples, and its samples against three forwards by hand."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from _grpo_worker import QUIET
from _sft_worker import TRANSFORMER
from _tiny_wan import randomise
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from idc.flow.times import LogitNormal
from idc.flow.weights import CosMap
from idc.models.conditioners import ToyTextConditioner
from idc.models.conditioning import ConditionDropout, Drop
from idc.models.sampling import Sampling
from idc.models.spec import IDBlocks, TransformerSpec
from idc.models.toy_codec import CosineCodec
from idc.models.vlm import ToyVLM
from idc.stages.sft import SFT
from idc.types import Batch, Bucket, Condition, Sample, Subject


def make_stage(dropout: ConditionDropout | None = None) -> SFT:
    """A stage outside any trainer, with every parameter of our blocks at work."""
    stage = SFT(
        transformer=TransformerSpec(**TRANSFORMER, id_blocks=IDBlocks(layers=2)),
        codec=CosineCodec(),
        text=ToyTextConditioner(dim=32),
        vlm=ToyVLM(dim=32),
        times=LogitNormal(mean=0.3, std=1.2),
        weight=CosMap(),
        dropout=dropout or ConditionDropout(0.25, 0.25, 0.25),
    )
    stage.configure_model()
    assert stage.transformer is not None
    randomise(stage.transformer)
    return stage


def make_batch(count: int = 12) -> Batch:
    """Clips of noise with one or two references of different sizes: dropped conditions meet kept ones in a batch."""
    g = torch.Generator().manual_seed(5)
    samples = tuple(
        Sample(
            id=f"s{i}",
            caption=" ".join(["a", "red", "cube", "meets", "it"][: 1 + i % 5]),
            video_CTHW=torch.rand(3, 5, 32, 32, generator=g) * 2 - 1,
            subjects=tuple(
                Subject(torch.rand(3, 16 * (1 + (i + k) % 2), 16, generator=g) * 2 - 1) for k in range(1 + i % 2)
            ),
            fps=8.0,
        )
        for i in range(count)
    )
    return Batch(samples, torch.randint(0, 2**62, (count,), generator=g), Bucket(5, 32, 32, 2))


def drawn(seed: int, stream: str) -> torch.Generator:
    """The documented stream: a generator seeded by a hash of "seed/stream"."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def naive_losses(stage: SFT, batch: Batch) -> tuple[list[float], list[float], list[str]]:
    """Unweighted loss, time and dropped condition of each sample by itself, after the paper's formulas."""
    losses, times, dropped = [], [], []
    assert stage.transformer is not None
    for sample, seed in zip(batch.samples, batch.seeds_B.tolist(), strict=True):
        u = torch.rand((), generator=drawn(seed, "condition_dropout"), dtype=torch.float64).item()
        drop = "text" if u < 0.25 else "references" if u < 0.5 else "both" if u < 0.75 else "nothing"
        caption = "" if drop in ("text", "both") else sample.caption
        pictures = [] if drop in ("references", "both") else [subject.image_CHW for subject in sample.subjects]
        codec = CosineCodec()
        z0 = codec.encode(sample.video_CTHW[None])
        condition = Condition(
            text_BLD=ToyTextConditioner(dim=32).encode([caption]).float(),
            vlm_BLD=ToyVLM(dim=32).encode([caption], [pictures])[0].float(),
            references=tuple(codec.encode(picture[None, :, None])[:, :, 0] for picture in pictures),
        )
        eps = torch.randn(z0.shape[1:], generator=drawn(seed, "noise"))[None]
        normal = torch.randn((), generator=drawn(seed, "time")).double()
        t = float(torch.sigmoid(0.3 + 1.2 * normal).float())
        v = stage.transformer(
            (1 - t) * z0 + t * eps, torch.tensor([1000 * t]), condition.text_BLD, condition, return_dict=False
        )[0]
        total = sum(float(d) ** 2 for d in (v - (eps - z0)).double().flatten())
        losses.append(total / v.numel())
        times.append(t)
        dropped.append(drop)
    return losses, times, dropped


@torch.no_grad()
def test_the_loss_equals_a_loop_over_samples() -> None:
    stage, batch = make_stage(), make_batch()
    expected, times, dropped = naive_losses(stage, batch)
    assert set(dropped) == {"text", "references", "both", "nothing"}  # or the batch would prove less than it says
    assert len(set(times)) == len(batch)
    drops = stage.dropout.draw(batch.seeds_B)
    assert [drop.value for drop in drops] == dropped
    t_B = stage.times(batch.seeds_B)
    losses = stage.losses(stage.encoders.features(batch.samples, drops), batch.seeds_B, t_B, drops)
    torch.testing.assert_close(t_B, torch.tensor(times))
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=2e-5, atol=0)
    weights = [2 / (torch.pi * (1 - 2 * t + 2 * t * t)) for t in times]
    mean = sum(w * loss for w, loss in zip(weights, expected, strict=True)) / len(batch)
    assert stage.training_step(batch, 0).item() == pytest.approx(mean, rel=2e-5)


@torch.no_grad()
def test_a_samples_loss_depends_neither_on_its_batch_nor_on_its_place() -> None:
    stage, batch = make_stage(), make_batch()

    def losses(order: list[int]) -> torch.Tensor:
        part = replace(batch, samples=tuple(batch.samples[i] for i in order), seeds_B=batch.seeds_B[order])
        drops = stage.dropout.draw(part.seeds_B)
        return stage.losses(
            stage.encoders.features(part.samples, drops), part.seeds_B, stage.times(part.seeds_B), drops
        )

    whole = losses(list(range(12)))
    torch.testing.assert_close(losses([7, 0, 3]), whole[[7, 0, 3]], rtol=2e-5, atol=0)
    torch.testing.assert_close(losses([5]), whole[[5]], rtol=2e-5, atol=0)


@torch.no_grad()
def test_the_true_velocity_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """v = eps - z_0, and z_t = z_0 + t v: whoever knows z_0 reads v off z_t."""
    stage, batch = make_stage(), make_batch()
    z0 = CosineCodec().encode(batch.video_BCTHW)
    monkeypatch.setattr(stage, "predict_velocity", lambda x, t_B, condition: (x - z0) / t_B.view(-1, 1, 1, 1, 1))
    features = stage.encoders.features(batch.samples)
    losses = stage.losses(features, batch.seeds_B, torch.full((12,), 0.5), Drop.NOTHING)
    assert losses.max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("text", [4.0, 1.0])
def test_separate_scales_sample_as_three_forwards_a_step_by_hand(text: float) -> None:
    """v_none + s_image (v_references - v_none) + s_text (v_both - v_references), each sample by itself, in one Euler
    loop; the batch has references of different numbers and sizes."""
    stage, batch = make_stage().eval(), make_batch(2)
    assert stage.transformer is not None
    sampling = Sampling(steps=3, scale=text, image_scale=2.0, shift=3.0)
    videos = stage.sample_videos(batch.samples, batch.bucket, batch.seeds_B, sampling)
    codec, vlm, encoder = CosineCodec(), ToyVLM(dim=32), ToyTextConditioner(dim=32)

    def velocity(z: torch.Tensor, t: float, caption: str, pictures: list[torch.Tensor]) -> torch.Tensor:
        condition = Condition(
            text_BLD=encoder.encode([caption]).float(),
            vlm_BLD=vlm.encode([caption], [pictures])[0].float(),
            references=tuple(codec.encode(picture[None, :, None])[:, :, 0] for picture in pictures),
        )
        return stage.transformer(z, torch.tensor([1000 * t]), condition.text_BLD, condition, return_dict=False)[0]

    for sample, seed, video in zip(batch.samples, batch.seeds_B.tolist(), videos, strict=True):
        pictures = [subject.image_CHW for subject in sample.subjects]
        z = torch.randn(codec.latent_shape(5, 32, 32), generator=drawn(seed, "noise"))[None]
        times = [3 * u / (1 + 2 * u) for u in (1, 2 / 3, 1 / 3, 0)]
        for now, then in pairwise(times):
            both, none = velocity(z, now, sample.caption, pictures), velocity(z, now, "", [])
            references = velocity(z, now, "", pictures)
            z = z + (then - now) * (none + 2.0 * (references - none) + text * (both - references))
        torch.testing.assert_close(video, codec.decode(z)[0], rtol=0, atol=2e-4)
    one_scale = stage.sample_videos(batch.samples, batch.bucket, batch.seeds_B, replace(sampling, image_scale=None))
    assert (one_scale - videos).abs().max() > 0.05


class Logged(Callback):
    """Of every micro-batch: the optimiser's steps so far, its own loss, and what is logged."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] * trainer.accumulate_grad_batches
        self.rows.append((trainer.global_step, loss.item(), trainer.callback_metrics["train/loss"].item()))


def test_what_is_logged_at_a_step_is_the_mean_of_all_its_micro_batches(tmp_path: Path):
    logged = Logged()
    batches = [replace(make_batch(2), index=i, seeds_B=torch.tensor([2 * i, 2 * i + 1])) for i in range(7)]
    trainer = Trainer(
        **{**QUIET, "max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": 3, "default_root_dir": tmp_path},
        callbacks=[logged],
    )
    trainer.fit(make_stage(), DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    steps, losses, seen = zip(*logged.rows, strict=True)
    assert steps == (0, 0, 1, 1, 1, 2, 3)
    assert len(set(losses)) == 7
    parts = [(0, 1), (0, 2), (0, 3), (3, 4), (3, 5), (3, 6), (6, 7)]
    means = [fmean(losses[first:end]) for first, end in parts]
    assert seen == pytest.approx(means, rel=1e-6)


def test_what_is_logged_is_of_this_fit_alone(tmp_path: Path):
    stage, logged = make_stage(), Logged()
    for seed in (1, 2):  # the second begins at the step number that the first has ended with
        batch = replace(make_batch(2), seeds_B=torch.tensor([seed, 10 + seed]))
        trainer = Trainer(**{**QUIET, "max_steps": 1, "default_root_dir": tmp_path}, callbacks=[logged])
        trainer.fit(stage, DataLoader([batch], batch_size=None, collate_fn=lambda batch: batch))
    (_, first, seen), (_, second, again) = logged.rows
    assert first != second
    assert (seen, again) == (pytest.approx(first), pytest.approx(second))
