"""The features cache of a run: what is encoded again and what is not, by one run, by two at once, and after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _server import context, join, launch
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_loader import write_shards

from idc.data.cache import FeatureCache
from idc.data.features import FeatureStore, feature_key
from idc.data.module import VideoDataModule
from idc.data.sources import ShardSource
from idc.models.conditioners import ToyTextConditioner
from idc.models.conditioning import Encoders
from idc.models.toy_codec import CosineCodec
from idc.models.vlm import ToyVLM
from idc.stages import features as filling
from idc.types import Batch, Bucket

COUNT = 30  # samples, ten of them with two references


class Codec(CosineCodec):
    """Says how many clips and how many pictures it has encoded."""

    clips = pictures = 0

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        if video_BCTHW.shape[2] == 1:
            Codec.pictures += len(video_BCTHW)
        else:
            Codec.clips += len(video_BCTHW)
        return super().encode(video_BCTHW)


class Text(ToyTextConditioner):
    """Says how many captions it has encoded, the empty one apart."""

    captions = 0

    def encode(self, captions: Any) -> torch.Tensor:
        Text.captions += sum(map(bool, captions))
        return super().encode(captions)


class VLM(ToyVLM):
    """Says how many samples it has encoded, each in its four variants."""

    samples = 0

    def encode(self, captions: Any, references: Any) -> tuple[torch.Tensor, torch.Tensor]:
        VLM.samples += len(captions) // 4
        return super().encode(captions, references)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "CHUNK", 8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, COUNT, frames=9)
    return str(root)


def make(**parts: Any) -> Encoders:
    return Encoders(parts.get("codec") or Codec(), parts.get("text") or Text(dim=32), parts.get("vlm", VLM(dim=32)))


def filled(
    shards: str, root: Path, encoders: Encoders, told: list[str] | None = None, **settings: Any
) -> VideoDataModule:
    """A data module after `fill_cache`, as a stage's `setup` calls it."""
    settings = {"buckets": [[5, 32, 32]], "features": str(root), "random_window": False, **settings}
    module = VideoDataModule([ShardSource(shards, name="toy")], batch_size=4, **settings)
    module.setup("fit")
    strategy = SingleDeviceStrategy("cpu")
    trainer = SimpleNamespace(datamodule=module, strategy=strategy, is_global_zero=True)
    filling.fill_cache(trainer, encoders, told.append if told is not None else lambda what: None)  # type: ignore[arg-type]
    return module


def encoded(shards: str, root: Path, encoders: Encoders, **settings: Any) -> dict[str, int]:
    """How much one filling encoded."""
    Codec.clips = Codec.pictures = Text.captions = VLM.samples = 0
    filled(shards, root, encoders, **settings)
    found = {"clips": Codec.clips, "pictures": Codec.pictures, "captions": Text.captions, "vlm": VLM.samples}
    return {what: count for what, count in found.items() if count}


def batches(module: VideoDataModule) -> Iterator[Batch]:
    yield from module.train_dataloader()


def check_against_live(shards: str, cached: VideoDataModule, encoders: Encoders, **settings: Any) -> None:
    """Every cached feature is what the encoders make of the sample now, to the bit."""
    live = VideoDataModule(cached.sources, cached.rule.shapes, 4, random_window=False, **settings)  # type: ignore[arg-type]
    live.setup("fit")
    seen = 0
    for ours, fresh in zip(batches(cached), batches(live), strict=True):
        assert ours.ids == fresh.ids
        for sample, again in zip(ours.samples, encoders.features(fresh.samples), strict=True):
            assert sample.features is not None
            assert sample.features.keys() == again.keys()
            assert all(torch.equal(sample.features[name], again[name]) for name in again)
            seen += 1
    assert seen >= COUNT - 3


ALL = {"clips": 30, "pictures": 40, "captions": 30, "vlm": 30}


def test_what_is_there_is_neither_encoded_nor_are_its_encoders_loaded(shards: str, tmp_path: Path):
    class Unloadable(VLM):
        def load(self, *_: Any) -> Any:
            raise AssertionError("loaded")

    Unloadable.__qualname__ = VLM.__qualname__  # part of the fingerprint
    assert encoded(shards, tmp_path, make()) == ALL
    assert encoded(shards, tmp_path, make(vlm=Unloadable(dim=32))) == {}
    assert encoded(shards, tmp_path, make(vlm=None)) == {}
    assert encoded(shards, tmp_path, make(vlm=Unloadable(dim=32), text=Text(dim=64))) == {"captions": 30}
    assert encoded(shards, tmp_path, make(vlm=VLM(dim=64))) == {"vlm": 30}


def test_every_batch_is_a_sign_of_life(shards: str, tmp_path: Path):
    told: list[str] = []
    filled(shards, tmp_path, make(), told)
    assert len(told) >= 30 / 4
    assert told[0].startswith("encoding ")
    assert told[0].endswith(": batch 1")


def test_the_parts_of_a_later_run_with_a_vlm_join_those_of_one_without(shards: str, tmp_path: Path):
    assert encoded(shards, tmp_path, make(vlm=None)) == {what: n for what, n in ALL.items() if what != "vlm"}
    assert encoded(shards, tmp_path, make()) == {"vlm": 30}
    check_against_live(shards, filled(shards, tmp_path, make()), make())
    without = filled(shards, tmp_path, make(vlm=None))
    names = {name for batch in batches(without) for sample in batch.samples for name in sample.features or {}}
    assert names == {"latents", "text", "text_null", "reference_0", "reference_1"}


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({"buckets": [[5, 32, 32], [5, 32, 64]]}, {}),  # a bucket that no clip falls into
        ({"buckets": [[9, 32, 32]]}, {"clips": 30}),
        ({"buckets": [[5, 16, 32]]}, {"clips": 30}),
        ({"max_crop": 0.4, "max_upscale": 1.05}, {}),
        ({"max_subjects": 1}, {"pictures": 10, "vlm": 10}),  # of the samples with two
        ({"max_subjects": 3}, {}),
        ({"reference_area": 512}, {"pictures": 40, "vlm": 30}),
    ],
)
def test_another_setting_encodes_what_it_changes(settings: dict, again: dict, shards: str, tmp_path: Path):
    filled(shards, tmp_path, make())
    assert encoded(shards, tmp_path, make(), **settings) == again
    assert encoded(shards, tmp_path, make()) == {}, "the first setting's features are still there"
    check_against_live(shards, filled(shards, tmp_path, make(), **settings), make(), **without_buckets(settings))


def without_buckets(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "buckets"}


def test_a_damaged_chunk_costs_its_own_part_of_its_own_samples(shards: str, tmp_path: Path):
    filled(shards, tmp_path, make())
    (folder,) = tmp_path.glob("text-*")
    chunk = sorted(folder.glob("*.safetensors"))[0]
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"text-\w+/\w+\.safetensors has .* encoded again"):
        assert encoded(shards, tmp_path, make()) == {"captions": 8}
    check_against_live(shards, filled(shards, tmp_path, make()), make())


def test_samples_without_references_have_no_entry_for_them(tmp_path: Path):
    cache = FeatureCache(tmp_path, make().fingerprints, 256)
    assert set(cache.stores(Bucket(5, 32, 32, 0))) == {"latents", "text", "vlm"}
    one, two = (cache.stores(Bucket(5, 32, 32, n)) for n in (1, 2))
    assert one["latents"] is two["latents"] is cache.stores(Bucket(5, 32, 32, 0))["latents"]
    assert one["references"] is not two["references"]
    with pytest.raises(KeyError):
        FeatureCache(tmp_path, {"sound": "f"})


def test_other_runs_folders_are_named_once_with_their_size(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    filled(shards, tmp_path, make(text=Text(dim=64)))
    old = tmp_path / "0123456789abcdef"  # of an earlier version of the kit
    old.mkdir()
    (old / "fingerprint.json").write_text("{}" + " " * 1_999_998)
    (stale,) = tmp_path.glob("text-*")
    size = sum(path.stat().st_size for path in stale.iterdir())
    assert "does not read" not in capsys.readouterr().err
    module = filled(shards, tmp_path, make())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "does not read" in line]
    assert f"{stale.name} ({size / 1e6:.1f} MB)" in line
    assert f"{old.name} (2.0 MB)" in line
    assert "vlm-" not in line
    cache = module.feature_cache(make().fingerprints)
    module.missing(cache)
    assert cache.unused() == {old: 2_000_000, stale: size}


def fill_elsewhere(shards: str, root: Path, log: Path, kill_at: int = -1, barrier: Any = None) -> None:
    """A run in a process of its own. It waits for the other before its first chunk, or kills itself before chunk
    `kill_at` of all its stores."""
    torch.set_num_threads(1)
    filling.CHUNK = 8
    write, written = FeatureStore.write, 0

    def disturbed(store: FeatureStore, features: Any) -> None:
        nonlocal written
        if written == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if barrier is not None and not written:
            barrier.wait(30)
        written += 1
        write(store, features)

    FeatureStore.write = disturbed  # type: ignore[method-assign]
    log.write_text(json.dumps(encoded(shards, root, make())))


@pytest.mark.parametrize("kill_at", [1, 6])
def test_a_kill_in_the_middle_costs_what_was_not_written(kill_at: int, shards: str, tmp_path: Path):
    """Also between the parts of a chunk: 1 is after the latents of the first eight samples, before their references."""
    assert join(launch(fill_elsewhere, [(shards, tmp_path, tmp_path / "log", kill_at)])) == [-signal.SIGKILL]
    assert not (tmp_path / "log").exists()
    there = FeatureCache(tmp_path, make().fingerprints, 1024 * 256)
    module = VideoDataModule([ShardSource(shards, name="toy")], [[5, 32, 32]], 4)
    module.setup("fit")
    entries = [(e.bucket._replace(frames=5), feature_key(e.id, e.sha256)) for e in module.sources[0].index().entries]
    lacking = [part for bucket, key in entries for part in there.missing(bucket, key)]
    assert 0 < len(lacking) < 4 * COUNT
    left = encoded(shards, tmp_path, make())
    assert left["clips"] == lacking.count("latents")
    assert left["captions"] == lacking.count("text")
    assert left["vlm"] == lacking.count("vlm")
    check_against_live(shards, filled(shards, tmp_path, make()), make())


def test_two_runs_at_once_fill_one_cache(shards: str, tmp_path: Path):
    """Both start from nothing, so that each writes what the other writes; both end with all of it, whole."""
    cache, logs = tmp_path / "cache", [tmp_path / f"{i}.log" for i in range(2)]
    barrier = context.Barrier(2)
    assert join(launch(fill_elsewhere, [(shards, cache, log, -1, barrier) for log in logs])) == [0, 0]
    assert [json.loads(log.read_text()) for log in logs] == [ALL, ALL]
    assert encoded(shards, cache, make()) == {}
    assert not list(cache.rglob("*.tmp"))
    check_against_live(shards, filled(shards, cache, make()), make())
