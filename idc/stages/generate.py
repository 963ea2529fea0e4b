"""Generation and editing: items in, a folder of videos out (`idc.data.output`), one video at a time.

A video depends on its item, the model, the sampler's settings and the seed. It does not depend on ranks, on the other
items or on interruptions, because every item is sampled by itself. Departure from the paper: none; the paper does not
describe editing (`idc.flow.editing` says what is done).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from idc.data.benchmark import Item
from idc.data.output import Existing, OutputFolder
from idc.data.ranks import data_place, of_all_ranks
from idc.data.requests import GenerationData, Request
from idc.data.video import PIXEL_FORMATS, encode_video
from idc.errors import UserError, counted, nearest
from idc.flow.editing import check_strength
from idc.models.baselines import Baseline
from idc.models.checkpoints import Which
from idc.models.codecs import Codec
from idc.models.conditioners import TextConditioner
from idc.models.sampling import REUSE_SHARDED, Sampler, Sampling, SamplingChanges, Source, to_uint8
from idc.models.spec import Lora, TransformerSpec
from idc.models.speed import Speed
from idc.models.step_reuse import Reuse, Tally, error_of
from idc.models.system import Parts, System, open_system
from idc.models.vlm import VLMConditioner
from idc.stages.speed import apply_speed, computes_in

T = TypeVar("T")


@dataclass
class Encoding:
    """Of the MP4 files, as in `idc.data.video.encode_video`. yuv444p keeps the colours of tiny clips."""

    crf: float = 18
    pixel_format: str = "yuv420p"
    preset: str = "medium"

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise UserError(f"encoding.crf={self.crf}: from 0 (lossless) to 51; 18 is usual")
        if self.pixel_format not in PIXEL_FORMATS:
            raise UserError(f"encoding.pixel_format={self.pixel_format!r}{nearest(self.pixel_format, PIXEL_FORMATS)}")


class Generate(LightningModule):
    """Makes the videos of a `GenerationData`; `trainer.predict` runs it.

    Args:
        out: folder of the videos.
        checkpoint: a run of `idc fit` (its newest checkpoint), one of its checkpoints, a folder of runs, or the folder
            of an `IDCrafterPipeline`, or `toy`, which comes with the package. Model settings come from there. None
            samples from `transformer.pretrained`.
        weights: of a run: its averages (EMA, where it has them) or the weights themselves.
        sampling: what differs from how the run itself samples.
        existing: refuse or replace videos in `out` that were made by another model or with other settings.
        encoding: of the MP4 files.
        baseline: another system in place of ours.
        transformer, codec, text, vlm, lora, speed: in place of the run's own, or for a checkpoint without config.yaml.
        compute_dtype: in place of the run's own. bfloat16 keeps in it what autocast would round in every pass, unless
            weights are sharded (`idc.models.rounding`).

    Raises:
        UserError: where there is no model in all that, or too much of it.
    """

    def __init__(
        self,
        out: str,
        checkpoint: str | None = None,
        weights: Which = "ema",
        sampling: SamplingChanges | None = None,
        existing: Existing = "error",
        encoding: Encoding | None = None,
        baseline: Baseline | None = None,
        transformer: TransformerSpec | None = None,
        codec: Codec | None = None,
        text: TextConditioner | None = None,
        vlm: VLMConditioner | None = None,
        lora: Lora | None = None,
        compute_dtype: Literal["float32", "bfloat16"] | None = None,
        speed: Speed | None = None,
    ) -> None:
        super().__init__()
        changes = sampling or SamplingChanges()
        changes.over(Sampling())  # checked before a model is opened, whose weights may take minutes to read
        self.folder, self.encoding = OutputFolder(out, existing), encoding or Encoding()
        self.baseline = baseline
        self.system: System | None = None
        if baseline is None:
            system = open_system(checkpoint, Parts(transformer, codec, text, vlm, lora=lora, speed=speed), weights)
            self.compute_dtype = getattr(torch, compute_dtype or system.compute_dtype)
            self.system, base = system, system.sampling
        elif checkpoint is not None:
            raise UserError(f"checkpoint={checkpoint!r} and a baseline: one of the two samples; set the other to null")
        else:
            base = baseline.sampling
        self.sampling = changes.over(base)
        if baseline is not None and self.sampling.reuse:
            raise UserError(
                f"sampling.reuse.threshold={self.sampling.reuse.threshold} and a baseline: steps are reused in our own "
                "model; set 0"
            )
        self.transformer: Any = None  # an IDCrafterTransformer from configure_model on, unless a baseline runs
        self.failures: dict[str, str] = {}  # of this rank; of all of them in the end
        self._items: list[Item] = []
        self._tally = Tally()  # of the video that is being made

    @property
    def exit_status(self) -> int:
        """Of the command: 3, done with failures on record, where an item has no video."""
        return 3 if self.failures else 0

    @property
    def settings(self) -> dict[str, Any]:
        """What every video depends on, as plain JSON."""
        if self.baseline is not None:
            model = self.baseline.identity
        else:
            assert self.system is not None
            model = {**self.system.identity, "compute_dtype": str(self.compute_dtype).removeprefix("torch.")}
            if self.system.speed.attention.startswith("sage"):  # of 8 bits: other videos, not other rounding
                model["attention"] = self.system.speed.attention
            if self.system.rewards:  # for whoever judges the videos
                model["rewards"] = list(self.system.rewards)
        return {"model": model, "sampling": self.sampling.identity, "encoding": asdict(self.encoding)}

    # Building -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the transformer with its weights; sharded where the strategy shards. Idempotent."""
        if self.transformer is not None or self.system is None:
            return
        from idc.stages.sharding import build_sharded, is_sharding

        build = self.system.build_transformer
        strategy = self._trainer.strategy if self._trainer is not None else None
        if is_sharding(strategy) and self.sampling.reuse:
            raise UserError(REUSE_SHARDED.format(self.sampling.reuse.threshold))
        dtype = computes_in(self._trainer, self.compute_dtype)
        with torch.device("cpu"):  # not Lightning's default device, which only some strategies set to the GPU
            if is_sharding(strategy):  # ranks hold their shards in float32 and gather in bfloat16
                self.transformer = build_sharded(build, strategy, self.compute_dtype)
            else:
                self.transformer = build("cpu", dtype)
            self.transformer.requires_grad_(False)
            apply_speed(self.transformer, self.system.speed, strategy, dtype, training=False)

    def setup(self, stage: str) -> None:
        from idc.stages.sharding import is_sharding

        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, GenerationData):
            raise UserError(f"data: {type(self).__name__} takes idc.data.requests.GenerationData")
        device = self.trainer.strategy.root_device
        if self.system is not None:
            self.system.encoders.place(device)
        elif self.baseline is not None:
            self.baseline.device = device
        self._items, known, todo, self.folder.settings = self._together(lambda: self._plan(data))
        self.failures = dict(known) if self.trainer.is_global_zero else {}
        chosen = [item for item in self._items if item.id in set(todo)]
        if chosen and self.baseline is not None:
            self.baseline.load(device)  # here, where weights that are missing end the run, and not each item
        place = data_place(self.trainer)
        data.choose(chosen, place.rank, place.ranks, is_sharding(self.trainer.strategy), place.leads)

    def _plan(self, data: GenerationData) -> tuple[list[Item], dict[str, str], list[str], dict[str, Any]]:
        """On rank 0: the items, those known to fail, the ids that have no video yet, and the settings of all."""
        self.folder.open()
        items, failures = data.source.items(self.folder.path, self.folder.existing == "replace")
        todo = self.folder.plan(items, {**self.settings, "data": data.settings})
        if others := self.folder.others(items):
            rank_zero_warn(f"{self.folder.path}: {len(others)} other videos lie there, such as {others[0]}")
        done = len(items) - len(todo)
        rank_zero_info(counted(len(items), "item") + (f", {done} of them done" if done else ""))
        return items, failures, [name for name in todo if name not in failures], self.folder.settings

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on all ranks; what it raises, too."""
        result, problem = None, None
        if self.trainer.is_global_zero:
            try:
                result = work()
            except UserError as error:
                problem = str(error)
        result, problem = of_all_ranks((result, problem))[0]  # the others wait while it reads all files
        if problem is not None:
            self.folder.close()
            raise UserError(problem)
        return result

    # Running --------------------------------------------------------------------------------------------------

    @property
    def sampler(self) -> Sampler:
        """The one that the pipeline has, too."""
        assert self.system is not None
        speed = self.system.speed
        parts = self.transformer, self.system.encoders, self.device, self.compute_dtype
        return Sampler(*parts, speed.batch_guidance, self._tally)

    def predict_step(self, request: Request, batch_idx: int) -> None:
        """Make, encode and write one video. What is wrong with the item is recorded, and the next one comes."""
        if request.problem:
            self._fail(request, request.problem)
            return
        self._tally = Tally()
        try:
            pixels = to_uint8(self.make(request))
            notes = self._notes(request, pixels)
        except UserError as error:
            self._fail(request, str(error))
            return
        if not request.padding:
            data = encode_video(pixels, request.fps, **asdict(self.encoding))
            self.folder.write(request.item, data, request.seed, notes)

    def _notes(self, request: Request, pixels_THWC: np.ndarray) -> dict[str, Any]:
        """What the record says of steps that were taken over."""
        reuse = self.sampling.reuse
        if not reuse:
            return {}
        notes: dict[str, Any] = {"reused": self._tally.share}
        if reuse.report_error:
            exact = to_uint8(self.make(request, replace(self.sampling, reuse=Reuse())))
            notes["error"] = error_of(pixels_THWC, exact)
        return notes

    def make(self, request: Request, sampling: Sampling | None = None) -> Tensor:
        """The video of a request, `[3, T, H, W]` in [-1, 1].

        Args:
            sampling: in place of the stage's own.

        Raises:
            UserError: for an item that this model or stage cannot make.
        """
        assert request.sample is not None
        if request.item.source is not None:
            raise UserError("it has a source clip: idc.stages.generate.Edit edits")
        if self.baseline is not None:
            return self.baseline.video(request.sample, request.bucket, request.seed, sampling or self.sampling)
        return self._sample(request, None, sampling)

    def _sample(self, request: Request, source: Source | None, sampling: Sampling | None) -> Tensor:
        assert request.sample is not None
        seeds_B = torch.tensor([request.seed])
        return self.sampler.videos([request.sample], request.bucket, seeds_B, sampling or self.sampling, source)[0]

    def _fail(self, request: Request, reason: str) -> None:
        if not request.padding:
            self.failures[request.item.id] = reason
            # On any rank: whoever watches need not wait for the end.
            print(f"{request.item.id}: no video: {reason}", flush=True)

    def teardown(self, stage: str) -> None:
        """Gather the failures of all ranks. (A hook of the end of predicting is left out where there is no item.)"""
        self.failures = {name: why for failures in of_all_ranks(self.failures) for name, why in failures.items()}
        if self.trainer.is_global_zero:
            self.folder.write_failures(self.failures, self._items)
        self.folder.close()
        # Fewer than all that did not fail where Trainer(limit_predict_batches) cut it short.
        made = self.folder.made([item for item in self._items if item.id not in self.failures])
        rank_zero_info(f"{made} of {len(self._items)} videos are in {self.folder.path}")
        if self.failures:
            rank_zero_info(f"{len(self.failures)} failed, see {self.folder.path / 'failures.jsonl'}")

    def on_exception(self, exception: BaseException) -> None:
        self.folder.close()


class Edit(Generate):
    """Edits each item's source clip: replaces a subject, inserts one, changes the background. No training.

    Args:
        out: folder of the videos.
        strength: in [0, 1]: how much noise the source gets. 0 gives it back, 1 keeps nothing of it outside the mask.
        invert_mask: masks are white where the source stays, as one of the subject is when the background shall change.
        others: of `Generate`.

    Raises:
        UserError: for a strength outside [0, 1], or a baseline, which does not edit.
    """

    def __init__(self, out: str, strength: float = 0.8, invert_mask: bool = False, **others: Any) -> None:
        check_strength(strength)
        if others.get("baseline") is not None:
            raise UserError("baseline: editing runs on our own model; leave baseline out")
        super().__init__(out, **others)
        self.strength, self.invert_mask = strength, invert_mask

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "edit": {"strength": self.strength, "invert_mask": self.invert_mask}}

    def make(self, request: Request, sampling: Sampling | None = None) -> Tensor:
        if request.sample is None or request.sample.video_CTHW is None:
            raise UserError("it has no source clip to edit")
        mask_BTHW = None if request.mask_THW is None else (request.mask_THW ^ self.invert_mask)[None]
        return self._sample(request, Source(request.sample.video_CTHW[None], self.strength, mask_BTHW), sampling)
