"""Score videos with many metrics: each video is decoded once, and one metric's networks are in memory at a time.

A video's frames go to a bounded cache on disk. Metrics that load nothing look at them at once; the others take turns
over all videos in the cache, so that each is loaded once where the cache holds all of them. What is scored is on disk
at once and is not computed again.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from idc.data.benchmark import Item
from idc.data.video import VideoError, probe
from idc.data.videos import DecodedVideo, FrameCache, Ranks, VideoFolder, fingerprint
from idc.errors import UserError
from idc.metrics.base import Score, VideoMetric, checked, reason_of, sample_frames
from idc.metrics.results import Result, append_result, prune_results, read_results, results_file
from idc.models.hub import offline_without_a_network
from idc.stages.judged import clip_of, digest, settings_of

log = logging.getLogger(__name__)


@dataclass
class Work:
    """One video and the metrics, by name, that it still has to see."""

    # By name, as == of two torchmetrics makes a third one, which is true: lists of them find the wrong one.
    item: Item
    path: Path | None
    fingerprint: str
    metrics: dict[str, VideoMetric]
    why_missing: str = ""
    decoded: DecodedVideo | None = None


class Scorer:
    """The metrics of one run, and what they have found so far.

    Args:
        metrics: with names of their own.
        out: the run's folder.
        device: where networks are loaded.
        cache_gb: how much of the disk decoded frames may take, in 1e9 bytes; one video may exceed it by itself.
        retry_failures: whether what failed in an earlier run is tried again.
        folder: of the frames, for this process alone; removed when the scoring ends, however it ends.

    Raises:
        UserError: for two metrics of one name.
    """

    def __init__(
        self,
        metrics: Sequence[VideoMetric],
        out: str | Path,
        device: torch.device | str = "cpu",
        cache_gb: float = 20.0,
        retry_failures: bool = True,
        folder: str | Path | None = None,
    ) -> None:
        names = [metric.name for metric in metrics]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"metrics: two are named {name!r}; results are kept by name")
        if not cache_gb > 0:
            raise UserError(f"cache_gb={cache_gb}: must be above 0")
        self.metrics, self.out, self.device = list(metrics), Path(out), device
        self.limit, self.retry_failures = cache_gb * 1e9, retry_failures
        self.folder = Path(folder or self.out / "frames")
        self.settings = {metric.name: settings_of(metric) for metric in metrics}
        self.configs = {name: digest(settings) for name, settings in self.settings.items()}
        self._broken: dict[str, str] = {}  # metrics that cannot be loaded, and why
        self._loaded: VideoMetric | None = None

    # What is to be done --------------------------------------------------------------------------------------

    def plan(self, items: Sequence[Item], folder: VideoFolder) -> list[Work]:
        """What is still to be scored. Results of videos that have changed since are dropped."""
        works = []
        for item in items:
            path = folder.videos.get(item.id)
            mark = fingerprint(item, path)
            prune_results(self.out, item.id, mark)
            found = {result.metric: result for result in read_results(results_file(self.out, item.id))}
            metrics = {m.name: m for m in self.metrics if self._is_open(m, found.get(m.name))}
            if metrics:
                works.append(Work(item, path, mark, metrics, folder.reasons.get(item.id, "")))
        return works

    def _is_open(self, metric: VideoMetric, result: Result | None) -> bool:
        if result is None or result.config != self.configs[metric.name]:
            return True
        return result.failed and self.retry_failures

    # Scoring -------------------------------------------------------------------------------------------------

    def run(self, works: Sequence[Work]) -> Generator[Result, None, None]:
        """Score, yielding each result when it is on disk: one for each metric of each work."""
        cache, held = FrameCache(self.folder), list[Work]()
        try:
            for work in works:
                yield from self._rule_out(work)
                if not work.metrics:
                    continue
                path = work.path
                assert path is not None
                try:
                    info = probe(path)
                    if held and cache.bytes + cache.size(info, _wanted(work)) > self.limit:
                        yield from self._score_held(held, cache)
                        held = []
                    work.decoded = cache.decode(path, info, _wanted(work))
                except VideoError as error:
                    yield from self._fail(work, f"{path.name}: {error}")
                    continue
                yield from self._score_light(work)
                if work.metrics:
                    work.decoded = cache.shrink(work.decoded, _wanted(work))
                    held.append(work)
                else:
                    cache.drop(work.decoded)
            yield from self._score_held(held, cache)
        finally:
            self._release()
            cache.close()

    def _rule_out(self, work: Work) -> Iterator[Result]:
        """Metrics that do not score such an item, and items without a video."""
        clip = clip_of(work.item)
        for metric in list(work.metrics.values()):
            if not metric.applies(clip):
                del work.metrics[metric.name]
                reason = f"not scored by its protocol ({work.item.category or 'no category'})"
                yield self._write(work, metric, Score.failed(reason), applies=False)
        if work.path is None:
            why = f": {work.why_missing}" if work.why_missing else ""
            yield from self._fail(work, f"no video {work.item.id}.mp4{why}")

    def _fail(self, work: Work, reason: str) -> Iterator[Result]:
        for metric in work.metrics.values():
            yield self._write(work, metric, Score.failed(reason))
        work.metrics = {}

    def _score_light(self, work: Work) -> Iterator[Result]:
        """Metrics that load nothing, straight after the decoding: the frames that only they need are dropped then."""
        light = [metric for metric in work.metrics.values() if not _loads(metric)]
        work.metrics = {name: metric for name, metric in work.metrics.items() if _loads(metric)}
        for metric in light:
            yield self._judge(work, metric)

    def _score_held(self, held: Sequence[Work], cache: FrameCache) -> Iterator[Result]:
        """Each metric over all videos in the cache, which are dropped then."""
        for metric in self.metrics:
            for work in held:
                if metric.name in work.metrics:
                    yield self._judge(work, metric)
        for work in held:
            assert work.decoded is not None
            cache.drop(work.decoded)

    def _judge(self, work: Work, metric: VideoMetric) -> Result:
        reason = self._load(metric)
        if reason:
            return self._write(work, metric, Score.failed(reason))
        assert work.decoded is not None
        began = time.perf_counter()
        try:
            clip = clip_of(work.item, work.decoded.frames(_ranks(metric)), work.decoded.info.fps)
            with torch.no_grad():
                score = checked(metric.score(clip), metric.bounds)
        except Exception as error:  # whatever a metric or its model raises is this score's failure, not the run's
            log.debug("%s on %s", metric.name, work.item.id, exc_info=True)
            score = Score.failed(reason_of(error))
        return self._write(work, metric, score, seconds=round(time.perf_counter() - began, 4))

    def _write(
        self, work: Work, metric: VideoMetric, score: Score, seconds: float = 0.0, applies: bool = True
    ) -> Result:
        result = Result(
            id=work.item.id,
            metric=metric.name,
            value=score.value,
            reason=score.reason,
            applies=applies,
            details=score.details,
            seconds=seconds,
            category=work.item.category,
            prompt=work.item.prompt,
            video=work.path.name if work.path else "",
            fingerprint=work.fingerprint,
            config=self.configs[metric.name],
        )
        append_result(self.out, result)
        return result

    # Networks ------------------------------------------------------------------------------------------------

    def _load(self, metric: VideoMetric) -> str:
        """Make `metric` the one whose networks are in memory. Returns "" or why that is impossible."""
        if _loads(metric) and self._loaded is not metric:
            self._release()
            self._loaded = metric
        if metric.name not in self._broken:
            try:
                with offline_without_a_network(self.settings[metric.name]["settings"]):
                    metric.load(self.device)
                return ""
            except Exception as error:  # other metrics go on without it
                log.debug("%s cannot be loaded", metric.name, exc_info=True)
                self._broken[metric.name] = f"not loaded: {reason_of(error)}"
        return self._broken[metric.name]

    def _release(self) -> None:
        if self._loaded is None:
            return
        with suppress(Exception):  # one that could not be loaded may not be able to unload
            self._loaded.unload()
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _loads(metric: VideoMetric) -> bool:
    return type(metric).load is not VideoMetric.load


def _ranks(metric: VideoMetric) -> Ranks:
    return partial(sample_frames, count=metric.frames)


def _wanted(work: Work) -> list[Ranks]:
    return [_ranks(metric) for metric in work.metrics.values()]
