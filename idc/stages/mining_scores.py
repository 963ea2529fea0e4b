"""Scores for mining: of evaluation runs, or of a reward that is computed here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from idc.data.storage import open_atomic
from idc.data.video import VideoError, decode_video
from idc.data.videos import fingerprint
from idc.errors import UserError, nearest
from idc.metrics.base import Clip, Score
from idc.metrics.results import Result, Run, append_result, read_results, read_run, results_file
from idc.progress import track
from idc.rewards.base import Reward
from idc.rewards.composite import Breakdown, Composite, Term
from idc.rewards.runner import RewardRunner
from idc.stages.judged import clip_of, describe, digest
from idc.stages.mining import Candidate

SCORES = "scores"
_MODELS = "reward.json"


class FromRuns:
    """Scores that `idc evaluate` has computed: a weighted sum of its raw metrics.

    Args:
        runs: evaluation runs (their `out`); each knows the folder of its videos.
        weights: of the metrics by name; below 0 for what should fall.

    Raises:
        UserError: for a folder that is no run, one whose videos are gone, or a metric that a run has not.
    """

    def __init__(self, runs: Sequence[str | Path], weights: Mapping[str, float]) -> None:
        if not weights:
            raise UserError("metrics={}: name at least one metric of the runs")
        for name, weight in weights.items():
            if not math.isfinite(weight) or not weight:
                raise UserError(f"--metric {name}={weight:g}: the weight must be a number other than 0")
        self.weights = dict(weights)
        self.by = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
        self._runs: dict[Path, Run] = {}
        for path in runs:
            run = read_run(path)
            for name in weights:
                if name not in run.info.metrics:
                    raise UserError(f"{path}: was not scored by {name!r}{nearest(name, run.info.metrics)}")
            folder = Path(run.info.videos)
            if not folder.is_dir():
                raise UserError(f"{path}: its videos are gone from {folder}; give their folder and a reward instead")
            other = self._runs.setdefault(folder.resolve(), run)
            if other is not run:
                raise UserError(f"{path}: judges the same videos as {other.path}; give one of the two")
        self.folders = [Path(run.info.videos) for run in self._runs.values()]

    @property
    def record(self) -> dict[str, Any]:
        metrics = {name: [run.info.metrics[name] for run in self._runs.values()] for name in self.weights}
        models = [model for described in metrics.values() for each in described for model in each.get("models", ())]
        return {
            "models": list(dict.fromkeys(models)),
            "metrics": {name: {"weight": weight, **metrics[name][0]} for name, weight in self.weights.items()},
        }

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        return [self._score(candidate, self._runs[candidate.video.parent.resolve()]) for candidate in candidates]

    def _score(self, candidate: Candidate, run: Run) -> Score:
        total, current = 0.0, ""
        for name, weight in self.weights.items():
            result = run.results.get((candidate.item.id, name))
            if result is None or result.value is None:
                why = "not scored yet" if result is None else result.reason or "does not apply"
                return Score.failed(f"{name}: {why}")
            current = current or fingerprint(candidate.item, candidate.video)
            if result.fingerprint and result.fingerprint != current:
                return Score.failed(f"{name}: the video or its item has changed since it was scored")
            total += weight * result.value
        return Score(total)


class FromReward:
    """Scores of a reward, computed once: a call that was interrupted goes on where it stopped.

    Args:
        reward: of one clip. A composite that normalises by group does so over each condition's clips.
        keep: folder in which scores are kept, in the form of evaluation's results.
        where, workers: as in `RewardRunner`.
        device: where networks run; the GPU if there is one by default.
        shown: show how far it is.
    """

    def __init__(
        self,
        reward: Reward,
        keep: str | Path,
        where: str = "process",
        workers: int = 1,
        device: str | None = None,
        shown: bool = True,
    ) -> None:
        self.by, self.keep, self.shown = reward.name, Path(keep), shown
        self.composite = reward if isinstance(reward, Composite) else Composite([Term(reward)])
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # What fails is dropped with its reason; whether enough is left shows in the pairs.
        self.runner = RewardRunner(self.composite, where, workers, max_failure_rate=1.0)
        self._described = describe(reward, 8)
        self._config = digest({"reward": self._described})

    @property
    def record(self) -> dict[str, Any]:
        return {"models": self._models(), "reward": self._described}

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        kept = {c.name: self._kept(c) for c in candidates}
        todo = [c for c in candidates if kept[c.name] is None]
        if todo:
            with self.runner as runner:
                runner.load(self.device)
                size = max(8, 2 * runner.workers)  # clips in memory at once
                starts = range(0, len(todo), size)
                for start in track(starts, f"scoring {len(todo)} clips", len(starts), self.shown):
                    kept |= self._compute(runner, todo[start : start + size])
        found = [kept[c.name] or Breakdown.failed("was not scored") for c in candidates]
        totals = self.composite.combine(found, [c.condition for c in candidates])
        return [
            Score(total, details=breakdown.as_dict()) if total is not None else Score.failed(breakdown.reason)
            for total, breakdown in zip(totals, found, strict=True)
        ]

    def _models(self) -> list[str]:
        """Those of a reward on another machine are known once it was asked, maybe by the call that scored the clips."""
        path, models = self.keep / _MODELS, list(self.composite.models)
        if models:
            self.keep.mkdir(parents=True, exist_ok=True)
            with open_atomic(str(path)) as stream:
                stream.write(json.dumps({"config": self._config, "models": models}).encode())
            return models
        try:
            kept = json.loads(path.read_bytes())
            return [str(model) for model in kept["models"]] if kept["config"] == self._config else []
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _compute(self, runner: RewardRunner, candidates: Sequence[Candidate]) -> dict[str, Breakdown | None]:
        broken: dict[str, Breakdown | None] = {}
        for candidate in candidates:
            try:
                runner.submit(candidate.name, _clip(candidate))
            except VideoError as error:
                broken[candidate.name] = Breakdown.failed(f"broken video: {error}")
        found = runner.collect()
        by_name = {candidate.name: candidate for candidate in candidates}
        for name, breakdown in found.items():
            self._keep(by_name[name], breakdown)
        return {**broken, **found}

    def _keep(self, candidate: Candidate, breakdown: Breakdown) -> None:
        if breakdown.total is None:  # another call may meet no fault
            return
        found = Result(
            id=candidate.item.id,
            metric=self.by,
            value=breakdown.total,
            details=breakdown.as_dict(),
            video=candidate.name,
            fingerprint=fingerprint(candidate.item, candidate.video),
            config=self._config,
        )
        append_result(self._folder(candidate), found)

    def _kept(self, candidate: Candidate) -> Breakdown | None:
        lines = read_results(results_file(self._folder(candidate), candidate.item.id))
        if not lines:
            return None
        key = fingerprint(candidate.item, candidate.video), self._config
        good = [line for line in lines if (line.fingerprint, line.config) == key]
        return Breakdown(**good[-1].details) if good else None

    def _folder(self, candidate: Candidate) -> Path:
        folder = candidate.video.parent.resolve()
        return self.keep / f"{folder.name}-{digest({'folder': str(folder)})[:8]}"


def _clip(candidate: Candidate) -> Clip:
    return clip_of(candidate.item, decode_video(candidate.video), candidate.info.fps)
