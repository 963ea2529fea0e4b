"""The DataModule in a real Trainer: resume, ranks, held-out data, features, errors before anything heavy."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _server import free_port, join, launch
from _shards import overwrite, restamp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from test_loader import write_shards

from idc.data.features import feature_key
from idc.data.index import ShardIndex, build_index
from idc.data.module import VideoDataModule, batches_of
from idc.data.sources import ShardSource, ToyShards
from idc.errors import UserError
from idc.models.conditioners import ToyTextConditioner
from idc.models.conditioning import Encoders
from idc.models.toy_codec import CosineCodec
from idc.stages.features import fill_cache
from idc.types import Batch, Bucket

TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
}


class Recorder(LightningModule):
    """One weight, and a list of what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple] = []
        self.validated: list[tuple] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert batch_idx == batch.index
        assert self.trainer.is_last_batch == (batch.index + 1 == self.trainer.num_training_batches)
        video = batch.video_BCTHW
        self.seen.append((batch.epoch, batch.index, batch.ids, tuple(batch.seeds_B.tolist()), video.mean().item()))
        return self.weight * video.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append((batch.ids, tuple(batch.seeds_B.tolist()), batch.padding))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    roots = {name: tmp_path_factory.mktemp(name) for name in ("train", "held_out")}
    write_shards(roots["train"], 32)
    write_shards(roots["held_out"], 5)
    return {name: str(root) for name, root in roots.items()}


def data(shards: dict[str, str], **kwargs: Any) -> VideoDataModule:
    settings: dict[str, Any] = {
        "sources": [ShardSource(shards["train"], name="train")],
        "val_sources": [ShardSource(shards["held_out"], name="held_out")],
        "buckets": [[5, 32, 32]],
        "batch_size": 6,
    }
    return VideoDataModule(**settings | kwargs)


def fit(module: VideoDataModule, steps: int, ckpt: Path | None = None, **kwargs: Any) -> Recorder:
    recorder = Recorder()
    Trainer(**TRAINER | {"max_steps": steps} | kwargs).fit(recorder, datamodule=module, ckpt_path=ckpt)
    return recorder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_stopped_and_resumed_is_the_undisturbed_run(shards: dict, tmp_path: Path, num_workers: int):
    """5 batches an epoch: stopped within one (2, 8) and at its end (5), ids, seeds and pixels go on the same."""
    straight = fit(data(shards), 12).seen
    assert [step[:2] for step in straight] == [(e, i) for e in range(3) for i in range(5)][:12]
    for stop in (2, 5, 8) if num_workers == 0 else (3,):
        path = tmp_path / f"{stop}.ckpt"
        fit(data(shards, num_workers=num_workers), stop, callbacks=[SaveAt(stop, path)])
        resumed = fit(data(shards, num_workers=num_workers), 12 if num_workers == 0 else 7, path).seen
        assert resumed == straight[stop : stop + len(resumed)]
        assert len(resumed) == (12 if num_workers == 0 else 7) - stop


def test_a_checkpoint_of_the_epochs_end_goes_on_with_the_next_epoch(shards: dict, tmp_path: Path):
    class SaveAtEpochEnd(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"epoch{trainer.current_epoch}.ckpt")

    straight = fit(data(shards), 12, callbacks=[SaveAtEpochEnd()]).seen
    assert fit(data(shards), 12, tmp_path / "epoch0.ckpt").seen == straight[5:]


def test_resume_with_validation_in_between_and_a_limited_epoch(shards: dict, tmp_path: Path):
    settings = {"limit_train_batches": 3, "val_check_interval": 2}
    straight = fit(data(shards), 8, **settings)
    assert [step[:2] for step in straight.seen] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    fit(data(shards), 4, callbacks=[SaveAt(4, tmp_path / "c.ckpt")], **settings)
    assert fit(data(shards), 8, tmp_path / "c.ckpt", **settings).seen == straight.seen[4:]


def test_overfitting_sees_the_same_batches_and_validation_is_optional(shards: dict):
    seen = fit(data(shards, val_sources=[]), 6, overfit_batches=2).seen
    assert [step[2:] for step in seen[:2]] == [step[2:] for step in seen[2:4]] == [step[2:] for step in seen[4:]]


def test_held_out_samples_come_once_with_fixed_seeds(shards: dict):
    recorder = fit(data(shards, val_batch_size=3), 10, val_check_interval=5)
    first, second = recorder.validated[:2], recorder.validated[2:]
    assert first == second
    assert sorted(sample_id for step in first for sample_id in step[0]) == [
        f"held_out/shard-000000/{i:04d}" for i in range(5)
    ]


def test_a_changed_mix_is_refused_with_what_changed(shards: dict, tmp_path: Path):
    fit(data(shards), 2, callbacks=[SaveAt(2, tmp_path / "c.ckpt")])
    with pytest.raises(UserError, match="batch_size is 4, was 6"):
        fit(data(shards, batch_size=4), 4, tmp_path / "c.ckpt")
    assert fit(data(shards, batch_size=4, allow_mix_change=True), 4, tmp_path / "c.ckpt").seen[0][:2] == (0, 2)


def test_two_ranks_share_the_global_batch_of_one(shards: dict):
    """The place comes from the strategy, as under DDP, FSDP2 and tensor parallelism."""

    class Strategy:
        def __init__(self, rank: int, ranks: int) -> None:
            self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": ranks}

    class FakeTrainer:
        limit_train_batches, overfit_batches = 1.0, 0

        def __init__(self, rank: int, ranks: int) -> None:
            self.strategy = Strategy(rank, ranks)

    def loaders(ranks: int, **kwargs: Any) -> list[tuple]:
        made = []
        for rank in range(ranks):
            module = data(shards, **kwargs)
            module.trainer = FakeTrainer(rank, ranks)
            module.setup("fit")
            made.append((module.train_dataloader(), module.val_dataloader()))
        return made

    ((alone, _),) = loaders(1)
    pair = loaders(2)
    for whole, *parts in zip(alone, *(train for train, _ in pair), strict=True):
        assert whole.ids == parts[0].ids + parts[1].ids
        assert whole.seeds_B.tolist() == parts[0].seeds_B.tolist() + parts[1].seeds_B.tolist()
    assert len({len(val) for _, val in pair}) == 1
    with pytest.raises(UserError, match=r"batch_size=6.*4 ranks.*4 and 8"):
        loaders(4)


def encode_on_a_rank(rank: int, shards: dict, root: Path, port: int) -> None:
    """The cache looks different to each: rank 0 misses all but sample 0, rank 1 all but samples 1 to 30."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    environment = LightningEnvironment()
    environment.set_global_rank(rank)
    module = data(shards, val_sources=[], features=str(root / str(rank)))
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2, cluster_environment=environment)
    module.trainer = SimpleNamespace(strategy=strategy)
    module.setup("fit")
    entries = module.sources[0].index().entries
    keys = {entry.id: feature_key(entry.id, entry.sha256) for entry in entries}
    cache = module.feature_cache({"latents": "mean"})
    known = {key: {"latents": {"latents": torch.zeros(1)}} for key in list(keys.values())[rank : 30 * rank + 1]}
    cache.write(Bucket(5, 32, 32, 1), known)
    ((_, loader),) = module.encode_dataloaders(cache)
    ids = [sample.id for batch in loader for sample in batch.samples[: len(batch) - batch.padding]]
    (root / f"{rank}.json").write_text(json.dumps([len(loader), ids, list(keys)]))
    torch.distributed.destroy_process_group()


def test_ranks_that_see_other_files_encode_the_same_list(shards: dict, tmp_path: Path):
    port = free_port()
    assert join(launch(encode_on_a_rank, [(rank, shards, tmp_path, port) for rank in range(2)])) == [0, 0]
    (batches, ids, keys), (others, other_ids, _) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert batches == others
    assert sorted(ids + other_ids) == sorted(keys[1:])


class Encoding(Recorder):
    """Fills the features cache first, as a stage does."""

    def setup(self, stage: str) -> None:
        fill_cache(self.trainer, Encoders(CosineCodec(), ToyTextConditioner(dim=32)), lambda what: None)


def meet_corrupt_samples(rank: int, shards: dict, root: Path, features: bool, port: int) -> None:
    """Rank 1 reads a copy of the shards in which every second clip is broken."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
    os.environ["WORLD_SIZE"] = "2"
    torch.set_num_threads(1)
    source = Path(shards["train"])
    if rank == 1:
        source = Path(shutil.copytree(source, root / "copy"))
        for entry in ShardIndex.load(source).entries[::2]:
            video = next(member for member in entry.members if member.ext == "mp4")
            overwrite(source / entry.shard, video.offset, bytes(video.size))
        restamp(source)
    module = data(
        shards,
        sources=[ShardSource(str(source), name="train")],
        features=str(root / "features") if features else None,
        max_corrupt_rate=0.1,
    )
    trainer = Trainer(**TRAINER | {"max_steps": 40, "strategy": "ddp", "devices": 2})
    try:
        trainer.fit(Encoding() if features else Recorder(), datamodule=module)
    except UserError as error:
        (root / f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("features", [False, True])
def test_what_stops_one_rank_stops_all_with_its_words(features: bool, shards: dict, tmp_path: Path):
    """Rank 0 reads nothing corrupt, and would wait for rank 1 at the next exchange of gradients for ever."""
    port = free_port()
    calls = [(rank, shards, tmp_path, features, port) for rank in range(2)]
    assert join(launch(meet_corrupt_samples, calls)) == [0, 0]
    one, other = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert one == other
    assert re.match(r"\d+ of \d+ samples could not be read .*max_corrupt_rate=10.0%", one)


def test_what_does_not_fit_is_dropped_and_shown(shards: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_shards(tmp_path / "short", 3, frames=4)
    sources = [ShardSource(shards["train"], name="train"), ShardSource(str(tmp_path / "short"))]
    module = data(shards, sources=sources)
    module.setup("validate")
    with pytest.raises(UserError, match="no usable samples in short"):
        module.setup("fit") or module.train_dataloader()
    table = capsys.readouterr().err
    assert "dropped" in table
    assert "4 frames" in table


def test_too_little_data_is_refused_before_the_stage_sets_up(shards: dict):
    class Expensive(Recorder):
        def setup(self, stage: str) -> None:
            raise AssertionError("the stage would fill the features cache now")

    with pytest.raises(UserError, match="an epoch of 32 samples does not fill one global batch of 40"):
        Trainer(**TRAINER | {"max_steps": 1}).fit(Expensive(), datamodule=data(shards, batch_size=40))


def test_training_from_a_feature_store_reads_no_video(shards: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = data(shards, random_window=False, features=str(tmp_path))
    module.setup("fit")
    cache = module.feature_cache({"latents": "mean"})
    assert module.missing(cache) == 37
    with pytest.raises(UserError, match="37 samples"):
        module.attach_features(cache)
    for parts, loader in module.encode_dataloaders(cache):
        assert parts == ("latents",)
        for batch in loader:
            for s in batch.samples[: len(batch) - batch.padding]:
                means = {"latents": {"latents": s.video_CTHW.mean((2, 3)).bfloat16()}}
                cache.write(batch.bucket, {feature_key(s.id, s.meta["sha256"]): means})
    assert module.encode_dataloaders(cache) == []
    plain = list(module.train_dataloader())
    module.attach_features(module.feature_cache({"latents": "mean"}))

    def no_video(*_: Any) -> None:
        raise AssertionError("a clip was decoded")

    monkeypatch.setattr("idc.data.video.decode_video", no_video)
    for with_video, cached in zip(plain, module.train_dataloader(), strict=True):
        assert with_video.ids == cached.ids
        assert cached.video_BCTHW is None
        for a, b in zip(with_video.samples, cached.samples, strict=True):
            assert torch.equal(b.features["latents"], a.video_CTHW.mean((2, 3)).bfloat16())
            assert (a.caption, len(a.subjects)) == (b.caption, len(b.subjects))
            assert torch.equal(a.subjects[0].image_CHW, b.subjects[0].image_CHW)
    module.decode_references = False
    batch = next(iter(module.train_dataloader()))
    assert batch.samples[0].subjects == ()
    assert batch.captions == plain[0].captions or batch.epoch == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buckets": [[16, 64, 64]]}, "13 and 17"),
        ({"buckets": [[17, 64, 60]]}, "48 and 64"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_corrupt_rate": 2.0}, "max_corrupt_rate=2.0"),
        ({"sources": []}, "sources"),
        ({"sources": [ShardSource("a/x"), ShardSource("b/x")]}, "two sources are called 'x'"),
        ({"val_sources": [ShardSource("elsewhere", name="train")]}, "give one of them another name"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_are_refused_by_the_constructor(shards: dict, wrong: dict, message: str):
    with pytest.raises(UserError, match=message):
        data(shards, **wrong)


def test_limits_are_counted_as_lightning_does():
    assert [batches_of(limit, 10) for limit in (None, 1.0, 0.25, 3, 30)] == [None, 10, 2, 3, 10]


def test_shards_behind_a_url_are_read_by_byte_ranges(shards: dict):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in Path(shards["train"]).iterdir():
        memory.pipe(f"/bucket/train/{path.name}", path.read_bytes())
    url = "memory://bucket/train"
    build_index(url, "train").save()
    remote = data(shards, sources=[ShardSource(url)], val_sources=[])
    local = data(shards, val_sources=[])
    for module in (remote, local):
        module.setup("fit")
    for a, b in zip(remote.train_dataloader(), local.train_dataloader(), strict=True):
        assert a.ids == b.ids
        assert torch.equal(a.video_BCTHW, b.video_BCTHW)


def test_toy_shards_are_made_once_and_anew_for_other_settings(tmp_path: Path):
    def toy(**kwargs: Any) -> ToyShards:
        settings = {"path": str(tmp_path / "toy"), "count": 3, "frames": 5, "height": 32, "width": 32}
        return ToyShards(**settings | {"reference_size": 16} | kwargs)

    toy().prepare()
    first = toy().index()
    assert len(first) == 3
    assert first.entries[0].bucket[:3] == (5, 32, 32)
    stamp = (tmp_path / "toy" / "index.jsonl").stat().st_mtime_ns
    toy().prepare()
    assert (tmp_path / "toy" / "index.jsonl").stat().st_mtime_ns == stamp
    toy(seed=7).prepare()
    other = toy().index()
    assert other.hash != first.hash
    (tmp_path / "toy" / "toy.json").unlink()  # what an interruption leaves behind
    toy(seed=7).prepare()
    assert toy().index().hash == other.hash
    assert json.loads((tmp_path / "toy" / "toy.json").read_text())["seed"] == 7


def test_toy_shards_touch_no_other_shards(shards: dict):
    with pytest.raises(UserError, match="folder of their own"):
        ToyShards(shards["train"], count=2).prepare()
