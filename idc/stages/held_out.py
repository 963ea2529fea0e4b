"""Held-out rewards: what the present model's videos for conditions that it never trains on are worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from idc.data.ranks import DataPlace, data_place, of_all_ranks
from idc.models.sampling import to_uint8
from idc.rewards.runner import RewardRunner
from idc.stages.base import Stage
from idc.stages.rewarded import clip_of_sample, means
from idc.types import Batch, Sample


class HeldOutRewards:
    """Samples held-out conditions without noise in the steps, has the videos judged, and logs what was found.

    A video starts from the noise of its sample's seed, which is the same at every validation, so that the curve is
    that of the weights alone, and stages with the same held-out data can be compared. All ranks call both methods
    together, with batches of the same size.

    Args:
        runner: what judges the videos, and where.
        once: judge a condition (caption and references) once where several samples share it, as the pairs of a
            condition do: with the seed of the first of them.
    """

    def __init__(self, runner: RewardRunner, once: bool = False) -> None:
        self.runner, self.once = runner, once
        self._seen: set[str] = set()

    @torch.no_grad()
    def judge(self, stage: Stage, batch: Batch) -> None:
        """Sample a batch's conditions as the stage samples, and submit the videos; padding is left out."""
        where = data_place(stage.trainer)
        judged = list(range(len(batch) - batch.padding))
        if self.once:
            own, of_all = self._new([batch.samples[place] for place in judged], where)
            if not of_all:
                return
            judged = own
        places = judged or [0]  # a rank without any makes the same passes, as sharded weights need
        samples = [batch.samples[place] for place in places]
        videos = stage.sample_videos(samples, batch.bucket, batch.seeds_B[places])
        for sample, video in list(zip(samples, videos, strict=True))[: len(judged) if where.leads else 0]:
            self.runner.submit(sample.id, clip_of_sample(sample, video, sample.id))

    def end(self, stage: Stage, split: str, complete: bool) -> None:
        """Wait for the rewards, and log their means over all ranks and the share of videos without a reward.

        Args:
            split: what the names begin with, "val" or "test".
            complete: False after a validation that was cut short, of which nothing is logged: it would be the mean of
                some buckets.

        Raises:
            UserError: on all ranks, where more videos have no reward than the runner allows.
        """
        self._seen = set()
        found = [b for part in of_all_ranks(self.runner.collect(check=False)) for b in part.values()]
        failures = [breakdown for breakdown in found if breakdown.total is None]
        self.runner.check(len(failures), len(found), failures[0].reason if failures else "")
        if not complete or not found:
            return
        values = {f"{split}/reward/{name}" if name else f"{split}/reward": mean for name, mean in means(found).items()}
        values[f"{split}/without_reward"] = len(failures) / len(found)
        if stage.trainer.sanity_checking:  # of the start: Lightning logs nothing then, and the curve begins there
            for logger in stage.trainer.loggers:
                logger.log_metrics(values, step=0)
        for key, value in values.items():
            stage.log(key, value, prog_bar=key == f"{split}/reward", rank_zero_only=False)

    def _new(self, samples: Sequence[Sample], where: DataPlace) -> tuple[list[int], int]:
        """Places of this rank's samples whose condition no earlier sample has, and how many all ranks have."""
        keys_of_all = of_all_ranks([condition_key(sample) for sample in samples])
        found: list[list[int]] = []
        for keys in keys_of_all[:: len(keys_of_all) // where.ranks]:  # neighbours have the same samples
            found.append([])
            for place, key in enumerate(keys):
                if key not in self._seen:
                    self._seen.add(key)
                    found[-1].append(place)
        return found[where.rank], sum(map(len, found))


def condition_key(sample: Sample) -> str:
    """The same for samples with the same caption and references."""
    digest = hashlib.sha256(json.dumps([sample.caption, [subject.name for subject in sample.subjects]]).encode())
    for subject in sample.subjects:
        pixels = to_uint8(subject.image_CHW)
        digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
    return digest.hexdigest()
