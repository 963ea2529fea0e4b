"""Judge videos: any system's, from a folder of `<id>.mp4`, or a model's, which are made first.

    python -m idc evaluate --config recipes/evaluate.yaml --model.init_args.videos DIR

The results lie in a run folder (idc.metrics.results) and are kept: a second run computes what is missing, what has
changed since and, unless `retry_failures` is false, what failed. Ranks share the videos. Exit status: 0 all scored,
3 scored with failures that are named in the results (a video that nobody asked for among them), 2 bad settings,
143 stopped by SIGTERM; 1 is a crash.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from idc.data.benchmark import ITEMS, Item, read_benchmark, read_items
from idc.data.output import rewards_of
from idc.data.videos import VideoFolder, find_videos
from idc.errors import UserError, make_folder
from idc.metrics.base import VideoMetric
from idc.metrics.results import RUN_FILE, Problem, Run, RunInfo, read_info, read_run, write_info
from idc.progress import track
from idc.stages.judged import describe
from idc.stages.provenance import commit, versions
from idc.stages.scoring import Scorer
from idc.stages.summary import show

FRAMES = "frames"  # decoded frames, within the run folder, while it runs
PATIENCE = timedelta(days=7)  # ranks wait for the slowest, whose last video may be long
INCOMPLETE = 3  # exit status


class VideoSource(Protocol):
    """What makes the videos that are then judged. Each rank makes some; what is there already is not made again."""

    system: str

    def items(self, folder: str | Path) -> list[Item]:
        """What is asked for, with its references; called on rank 0 alone, which writes `items.jsonl`."""

    def make(self, folder: str | Path, ids: list[str]) -> None:
        """Write `<id>.mp4` for these items."""


class Evaluate(LightningModule):
    """Scores of videos by a list of metrics.

    Args:
        metrics: with names of their own.
        videos: folder of `<id>.mp4`; None has them made by `source` in `<out>/videos`.
        source: makes videos where no folder is named.
        benchmark: OpenS2V-Eval's JSON; None takes the folder's own `items.jsonl`.
        benchmark_root: what the JSON's picture paths are relative to; the JSON's folder by default.
        out: run folder; `runs/evaluate/<system>` by default.
        system: name of what made the videos, as tables print it; the folder's name by default.
        protocol: whose rules the metrics follow; results of different ones never stand in one column.
        rewards: names of models that the system was rewarded by in training, so that a report can flag them; what
            `idc generate` wrote beside the videos where None.
        columns: free numbers and words for tables.
        cache_gb: how much of the disk each rank's decoded frames may take, in 1e9 bytes.
        retry_failures: whether a later run tries again what failed.
    """

    exit_status = 0

    def __init__(
        self,
        metrics: list[VideoMetric],
        videos: str | None = None,
        source: VideoSource | None = None,
        benchmark: str | None = None,
        benchmark_root: str | None = None,
        out: str | None = None,
        system: str | None = None,
        protocol: Literal["paper", "opens2v-1.0", "opens2v-1.1", "toy"] = "toy",
        rewards: list[str] | None = None,
        columns: dict[str, Any] | None = None,
        cache_gb: float = 20.0,
        retry_failures: bool = True,
    ) -> None:
        super().__init__()
        if not metrics:
            raise UserError("metrics=[]: nothing to score with; recipes/evaluate.yaml lists some")
        if videos is None and source is None:
            raise UserError("videos: name a folder of <id>.mp4, or a source that makes them")
        self.source = source if videos is None else None
        self.system = system or (Path(videos).resolve().name if videos else self.source.system)  # type: ignore[union-attr]
        self.out = Path(out) if out else Path("runs/evaluate") / self.system.replace("/", "_")
        self.videos = Path(videos) if videos else self.out / "videos"
        self.benchmark, self.benchmark_root = benchmark, benchmark_root
        self.protocol, self.rewards, self.columns = protocol, rewards, columns or {}
        # A list, not modules of this one: their networks belong to no strategy and no checkpoint.
        self.metrics = list(metrics)
        self.cache_gb, self.retry_failures = cache_gb, retry_failures
        self.scorer = Scorer(self.metrics, self.out, cache_gb=cache_gb, retry_failures=retry_failures)
        self.items: list[Item] = []
        self._lock: IO[bytes] | None = None
        self._ranks: Any = None  # a process group

    # What is judged ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Nothing is trained or sharded; strategies that shard ask for this method."""

    def setup(self, stage: str) -> None:
        with self._ended_by_an_error():
            self._setup()

    def _setup(self) -> None:
        first = self.trainer.is_global_zero
        if dist.is_available() and dist.is_initialized():
            # Not the strategy's own, which gives up after minutes. Made while all ranks live, it notices one that dies.
            self._ranks = dist.new_group(backend="gloo", timeout=PATIENCE)
        if first:
            self._lock = lock(self.out)
            before = self._earlier_metrics()
            shutil.rmtree(self.out / FRAMES, ignore_errors=True)  # of a run that was killed
            if self.source is not None:
                self.source.items(self.videos)
        self._wait()
        self.items = self._read_items()
        if self.source is not None:
            self.source.make(self.videos, [item.id for item in self._share()])
            self._wait()
        self.folder = find_videos(self.videos, [item.id for item in self.items])
        if first:
            write_info(self.out, self._info(self.folder, before))
        self._wait()

    def _read_items(self) -> list[Item]:
        if self.benchmark is not None:
            return read_benchmark(self.benchmark, self.benchmark_root)
        if not self.videos.is_dir():
            raise UserError(f"videos={self.videos}: no such folder")
        if not (self.videos / ITEMS).is_file():
            seen = "" if any(self.videos.glob("*.mp4")) else "no video and "
            raise UserError(
                f"videos={self.videos}: has {seen}no {ITEMS} that says what was asked for; "
                "name the benchmark's JSON by model.init_args.benchmark"
            )
        return read_items(self.videos / ITEMS)

    def _share(self) -> list[Item]:
        return self.items[self.trainer.global_rank :: self.trainer.world_size]

    def _earlier_metrics(self) -> Mapping[str, Any]:
        """Those that an earlier evaluation of the same videos had: they stay in `run.json`."""
        if not (self.out / RUN_FILE).exists():
            return {}
        earlier = read_info(self.out)
        if earlier.videos != str(self.videos.resolve()) or earlier.protocol != self.protocol:
            raise UserError(
                f"out={self.out}: holds the scores of {earlier.videos} under protocol {earlier.protocol!r}; "
                "set model.init_args.out to another folder"
            )
        return earlier.metrics

    def _info(self, folder: VideoFolder, before: Mapping[str, Any]) -> RunInfo:
        settings = {
            name: {**settings, "config": self.scorer.configs[name]} for name, settings in self.scorer.settings.items()
        }
        return RunInfo(
            system=self.system,
            protocol=self.protocol,
            items={item.id: item.category for item in self.items},
            commit=commit(),
            versions=versions(),
            config=self._config(),
            metrics={**before, **settings},
            rewards=rewards_of(self.videos) if self.rewards is None else tuple(self.rewards),
            columns=self.columns,
            videos=str(self.videos.resolve()),
            problems=tuple(Problem(name, reason) for name, reason in folder.extra.items()),
        )

    def _config(self) -> dict[str, Any]:
        """The recipe, where the command line made this run."""
        configs = [getattr(callback, "config", None) for callback in getattr(self.trainer, "callbacks", ())]
        found = next((config for config in configs if hasattr(config, "as_dict")), None)
        return {} if found is None else describe(found.as_dict(), depth=20)

    # Scoring -------------------------------------------------------------------------------------------------

    def test_dataloader(self) -> DataLoader:
        """One step, which is all of this rank's share: metrics take turns over videos, not videos over metrics."""
        return DataLoader([0])  # type: ignore[arg-type]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        with self._ended_by_an_error():
            self._score()

    def _score(self) -> None:
        rank = self.trainer.global_rank
        self.scorer.device = self.trainer.strategy.root_device
        self.scorer.folder = self.out / FRAMES / f"rank{rank}"
        works = self.scorer.plan(self._share(), self.folder)
        total = sum(len(work.metrics) for work in works)
        what = "scores" if self.trainer.world_size == 1 else "scores of rank 0's videos"
        with closing(self.scorer.run(works)) as scores:
            for _ in track(scores, what, total, shown=self.trainer.is_global_zero and total > 0):
                # Lightning only makes a note of the signal, and this step is the whole run.
                if self.trainer.received_sigterm:
                    raise SystemExit(128 + signal.SIGTERM)
        self._wait()

    def on_test_end(self) -> None:
        run = read_run(self.out)
        self._log(run)
        if self.trainer.is_global_zero:
            show(run)
            # Other ranks end with 0: a launcher would take anything else for a crash and kill this one.
            self.exit_status = INCOMPLETE if run.failures or run.unscored or run.info.problems else 0
            shutil.rmtree(self.out / FRAMES, ignore_errors=True)

    def teardown(self, stage: str) -> None:
        if self._lock is not None:
            with suppress(OSError):  # another rank's frames, if it still runs
                (self.out / FRAMES).rmdir()
            self._lock.close()
            self._lock = None

    @contextmanager
    def _ended_by_an_error(self) -> Iterator[None]:
        """Lightning tears a module down only after what went well."""
        try:
            yield
        except BaseException:
            self.teardown("test")
            raise

    def _log(self, run: Run) -> None:
        scalars: dict[str, float] = {}
        for name in run.info.metrics:
            mean = run.mean(name)
            if mean.scored:
                scalars[f"mean/{name}"] = mean.value
            scalars[f"scored/{name}"], scalars[f"expected/{name}"] = float(mean.scored), float(mean.expected)
        for logger in self.loggers:
            logger.log_metrics(scalars, step=0)

    def _wait(self) -> None:
        """Until all ranks are here."""
        if self._ranks is not None:
            dist.barrier(self._ranks)


def lock(folder: Path) -> IO[bytes]:
    """Hold a run folder for this process until the file is closed or the process dies.

    Raises:
        UserError: if another process holds it, or it cannot be made.
    """
    import fcntl

    make_folder(folder, "model.init_args.out")
    file = (folder / ".lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"out={folder}: another evaluation is writing here; wait for it, or set another out") from None
    except OSError:
        pass  # a file system without locks
    return file
