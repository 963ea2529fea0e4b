"""What every stage shares: encoders, transformer, optimiser and sampling. It has no loss.

Departure from the paper: none. The transformer is built in `configure_model`, because the command line instantiates
a stage before the strategy has started; frozen encoders stay outside the module tree (see `Encoders`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from idc.data.ranks import of_all_ranks, several_ranks
from idc.errors import UserError
from idc.models.codecs import Codec
from idc.models.conditioners import TextConditioner
from idc.models.conditioning import Encoders
from idc.models.sampling import Sampler, Sampling
from idc.models.spec import Lora, Trainable, TransformerSpec
from idc.models.speed import Speed
from idc.models.vlm import VLMConditioner
from idc.stages.speed import apply_speed, computes_in, keep_fused, optimizer_settings
from idc.types import Batch, Bucket, Condition, Sample

PRECISIONS = ("32-true", "bf16-mixed")  # of the trainer; batches and float32 islands survive these alone
_NAMED = 8  # samples of a batch that a message lists


def check_precision(precision: Any) -> None:
    """Raises `UserError` for a precision, as it was given to the trainer, which stages do not take; None is unset."""
    if precision is not None and str(precision) not in (*PRECISIONS, "32", "bf16"):
        raise UserError(
            f"trainer.precision={str(precision)!r}: converts what the stages keep exact; take "
            f"{' or '.join(map(repr, PRECISIONS))}, and model.init_args.compute_dtype=bfloat16 for a network in it"
        )


@dataclass
class Schedule:
    """Learning rate over steps: a linear warm-up from 0, then constant or a cosine down to `final` of the peak."""

    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final <= 1:
            raise UserError(
                f"schedule: warmup_steps={self.warmup_steps}, final={self.final}: "
                "warm-up takes 0 steps or more, and final is a share of the peak between 0 and 1"
            )

    def factor(self, step: int, total: int) -> float:
        """Multiplier of the peak learning rate at `step` of `total`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class Stage(LightningModule):
    """Encoders, transformer and optimiser of one recipe.

    Args:
        transformer: sizes or weights of the transformer.
        codec: pixels <-> latents.
        text: the backbone's text conditioner.
        vlm: tokens for stage 3 of the hierarchical attention; None trains without a VLM.
        trainable: `full`, `id_blocks`, `id_blocks+lora` or `lora`.
        compute_dtype: `bfloat16` runs the transformer under autocast with float32 weights; its float32 islands stay.
        sampling: how previews (and generation) sample.
        speed: how fast and in how much memory the transformer runs.

    Attributes:
        groups: it takes every sample several times, as `data.init_args.group_size` says.

    Raises:
        UserError: for settings that the optimiser does not take.
    """

    groups: ClassVar[bool] = False

    def __init__(
        self,
        transformer: TransformerSpec,
        codec: Codec,
        text: TextConditioner,
        vlm: VLMConditioner | None = None,
        trainable: Trainable = "full",
        lora: Lora | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        sampling: Sampling | None = None,
        speed: Speed | None = None,
    ) -> None:
        super().__init__()
        self.spec = transformer
        self.encoders = Encoders(codec, text, vlm if transformer.id_blocks.use_vlm else None)
        self.trainable_set, self.lora = trainable, lora or Lora()
        _check_optimizer(optimizer)
        self.optimizer_factory = optimizer
        self.schedule = schedule or Schedule()
        self.compute_dtype = getattr(torch, compute_dtype)
        self.sampling = sampling or Sampling()
        self.speed = speed or Speed()
        self.speed_chosen: dict[str, str] = {}  # what it came to, from configure_model on
        self.transformer: Any = None  # an IDCrafterTransformer from configure_model on
        # Of a callback: whether the optimiser may step at this gradient norm. It raises to end the run, on all ranks.
        self.guard: Callable[[float], bool] | None = None
        self.on_progress: Callable[[str], None] = lambda what: None  # of a callback: what has ended within a step
        self.took_step: bool | None = None  # in this batch; None before its optimiser has been asked to
        self._changed = False  # by a step that is judged when it has been taken
        self._training_on: tuple[int, list[str]] = 0, []
        self._logged: list[Tensor] = []  # of the micro-batches of this step

    # Building -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the transformer, choose what is trained, shard it where the strategy shards. Idempotent."""
        if self.transformer is not None:
            return
        from idc.models.trainable import set_trainable
        from idc.stages.sharding import build_sharded, is_sharding

        def build(device: str) -> Any:
            model = self.build_transformer(device)
            set_trainable(model, self.trainable_set, **vars(self.lora))
            return model

        strategy = self._trainer.strategy if self._trainer is not None else None
        dtype = computes_in(self._trainer, self.compute_dtype)
        with torch.device("cpu"):  # not Lightning's default device, which only some strategies set to the GPU
            if is_sharding(strategy):
                self.transformer = build_sharded(build, strategy, self.compute_dtype)
            else:
                self.transformer = build("cpu")
            self.speed_chosen = apply_speed(self.transformer, self.speed, strategy, dtype, training=True)

    def on_fit_start(self) -> None:
        self._training_on, self._logged = (0, []), []  # of an earlier fit of this stage

    def on_train_start(self) -> None:
        """What `auto` came to stands beside the other hyperparameters."""
        for logger in self.trainer.loggers:
            logger.log_hyperparams({f"speed/{name}": value for name, value in self.speed_chosen.items()})

    @property
    def has_weights(self) -> bool:
        """Whether there is something to judge before any training."""
        return self.spec.pretrained is not None

    def build_transformer(self, device: str) -> Any:
        """The transformer as training starts with it; "meta" gives the structure alone."""
        vlm_dim = self.encoders.vlm.dim if self.encoders.vlm is not None else None
        return self.spec.build(self.encoders.text.dim, vlm_dim, device)

    def setup(self, stage: str) -> None:
        check_precision(self.trainer.precision)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            self.check_run(self.trainer, datamodule)
        self.encoders.place(self.trainer.strategy.root_device)
        self._check(datamodule)
        if getattr(datamodule, "features", None) is not None:
            from idc.stages.features import fill_cache

            fill_cache(self.trainer, self.encoders, self.on_progress)

    def check_run(self, trainer: Any, datamodule: Any) -> None:
        """Name settings that training cannot work with, before any data is read; `datamodule` may be None.

        Raises:
            UserError: for such a setting.
        """
        size = getattr(datamodule, "group_size", 1)
        if size > 1 and not self.groups:
            raise UserError(
                f"data.init_args.group_size={size}: {type(self).__name__} would train on every sample {size} times in "
                "a row; groups are GRPO's, and 1 is right here"
            )
        if (passes := trainer.accumulate_grad_batches) < 1:
            raise UserError(
                f"trainer.accumulate_grad_batches={passes}: a step takes 1 pass or more; the nearest valid choice is 1"
            )
        if (algorithm := trainer.gradient_clip_algorithm) not in (None, "norm"):
            raise UserError(
                f"trainer.gradient_clip_algorithm={str(getattr(algorithm, 'value', algorithm))!r}: only 'norm' is "
                "supported; set that, or leave it out"
            )

    def _check(self, datamodule: Any) -> None:
        """Name what does not fit together before the features cache is filled: the structure costs nothing on meta."""
        from idc.stages.sharding import check_sequence

        blocks = self.spec.id_blocks
        structure = self.build_transformer("meta").config
        check_sequence(structure["num_attention_heads"], self.trainer.strategy)
        channels = structure["in_channels"]
        if channels != self.encoders.codec.channels:
            raise UserError(
                f"transformer.in_channels={channels}: the codec's latents have {self.encoders.codec.channels} channels"
            )
        subjects = datamodule.rule.max_subjects if datamodule is not None else 0
        most = blocks.max_subjects if blocks.layers or blocks.joint_references else 0
        if subjects > most:
            raise UserError(
                f"data.init_args.max_subjects={subjects}: the transformer takes {most} "
                f"(id_blocks.max_subjects={blocks.max_subjects}, layers={blocks.layers}, joint_references="
                f"{str(blocks.joint_references).lower()}); set data.init_args.max_subjects to {most}"
            )

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        settings = optimizer_settings(self.optimizer_factory, self.trainer.strategy.root_device)
        optimizer = self.optimizer_factory(parameters, **settings)
        keep_fused(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") and self.schedule.decay != "constant":
            raise UserError("trainer.max_steps=-1: a cosine schedule needs to know its end; set max_steps")
        total = int(steps) if steps != float("inf") else 0
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm and log the norm before clipping, in one pass over the gradients."""
        if not hasattr(self.trainer.model, "get_global_grad_norm"):  # DeepSpeed's clips in its step: `judge_step`
            self.clip_to_norm(optimizer, gradient_clip_val)

    def clip_to_norm(self, optimizer: Any, max_norm: float | None) -> None:
        """Clip by the global norm, and log the norm before clipping at the steps that are logged. Where `guard` refuses
        the step, the gradients are dropped, and the optimiser, which is called all the same, changes nothing.

        Raises:
            UserError: on all ranks alike where the norm is not finite, before the optimiser makes every weight NaN,
                unless `guard` knows better.
        """
        # The optimiser's own list: to walk the module's tree for it takes as long as the clipping of a small model.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        if hasattr(norm, "full_tensor"):  # a DTensor under FSDP2: an exchange between the ranks
            norm = norm.full_tensor()
        self._check_gradient(optimizer, float(norm))
        self._log_norm(norm.detach())

    def judge_step(self, norm: float, taken: bool) -> None:
        """What `clip_to_norm` does but for clipping, for an engine (DeepSpeed's) that clips and steps in one.

        Args:
            norm: of the gradient over all parameters, before clipping; the same on all ranks.
            taken: whether the engine has changed the weights: it leaves them where the norm is not finite.

        Raises:
            UserError: as `clip_to_norm`.
        """
        self._changed = taken
        takes = self._allows(norm)
        self.took_step = taken and takes
        self._log_norm(torch.tensor(norm, device=self.device))

    def _log_norm(self, norm: Tensor) -> None:
        trainer: Any = self.trainer
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:  # Lightning writes at these steps alone
            self.log("train/grad_norm", norm)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.took_step = None
        step, ids = self._training_on
        if step != self.trainer.global_step + 1:  # else another micro-batch of the same step
            ids, self._logged = [], []
        self._training_on = self.trainer.global_step + 1, list(dict.fromkeys([*ids, *getattr(batch, "ids", ())]))

    def mean_of_step(self, values: Tensor) -> Tensor:
        """Mean of `values` (any shape), which a micro-batch logs, and of what those before it in its step logged."""
        self._logged.append(values.detach())
        return torch.stack(self._logged).mean(0)

    def samples_of_step(self) -> list[list[str]]:
        """Ids of the samples that this optimiser step is on, by rank. All ranks call it together."""
        return of_all_ranks(self._training_on[1])

    def _check_gradient(self, optimizer: Any, norm: float) -> None:
        """The global norm is equal on all ranks, so all of them raise, or drop their gradients, or none."""
        takes = self._allows(norm)
        self.took_step = bool(self.took_step) or takes
        if not takes:
            optimizer.zero_grad(set_to_none=True)  # optimisers pass over parameters without a gradient

    def _allows(self, norm: float) -> bool:
        if self.guard is None and not math.isfinite(norm):
            self.end_run(f"the gradient's norm is {norm:g}")
        return self.guard is None or self.guard(norm)

    def end_run(self, reason: str) -> NoReturn:
        """End this step and the run on all ranks, which call it together, and name its samples.

        Raises:
            UserError: always.
        """
        ids = [id for own in self.samples_of_step() for id in own]
        changed = "its step was taken" if self._changed else "no weight was changed"
        samples = ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if ids[_NAMED:] else "")
        raise UserError(
            f"step {self.trainer.global_step + 1}: {reason}, and {changed}; its last batch holds "
            f"{samples or 'no samples with ids'}; go on from the last checkpoint, if there is one, with a lower rate "
            "or lower loss weights, or look at these samples"
        )

    def drop_seeds(self, seeds_B: Tensor) -> Tensor:
        """Seeds by which a batch's conditions are dropped: its own, or rank 0's where the strategy has `same_layers`:
        a rank whose samples all lose their references passes over layers that the others run. All ranks call it with
        as many seeds.
        """
        strategy: Any = self._trainer.strategy if self._trainer is not None else None
        if not getattr(strategy, "same_layers", False) or not several_ranks():
            return seeds_B
        # Not Lightning's `broadcast`, which pickles: on GPUs two exchanges in every micro-batch, and the host waits for
        # each. Here it waits once, to read what it decides by. A copy, for noise is drawn by the batch's own seeds.
        shared_B = seeds_B.to(strategy.root_device, copy=True)
        dist.broadcast(shared_B, src=0)
        return shared_B.to(seeds_B.device)

    # Running the transformer --------------------------------------------------------------------------------

    @property
    def sampler(self) -> Sampler:
        """How this stage's transformer samples, where it now is."""
        assert self.transformer is not None
        return Sampler(self.transformer, self.encoders, self.device, self.compute_dtype, self.speed.batch_guidance)

    def predict_velocity(self, x_BCTHW: Tensor, t_B: Tensor, condition: Condition, cache: Any = None) -> Tensor:
        """v(z_t, t, C) in float32; `t_B` in [0, 1]. With `cache`, the subject side is not computed again."""
        return self.sampler.predict_velocity(x_BCTHW, t_B, condition, cache)

    def sample_videos(
        self, samples: Sequence[Sample], bucket: Bucket, seeds_B: Tensor, sampling: Sampling | None = None
    ) -> Tensor:
        """Videos `[B, 3, T, H, W]` in [-1, 1] of the bucket's size for the samples' captions and references."""
        return self.sampler.videos(samples, bucket, seeds_B, sampling or self.sampling)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Videos for a held-out batch, from noise seeded per sample; the `Previews` callback writes them."""
        return self.sample_videos(batch.samples, batch.bucket, batch.seeds_B)

    def decoded_truth(self, sample: Sample) -> Tensor | None:
        """The sample's own clip `[3, T, H, W]`: as it was decoded, or from its cached latents."""
        if sample.video_CTHW is not None:
            return sample.video_CTHW
        latents_CTHW = (sample.features or {}).get("latents")
        return None if latents_CTHW is None else self.encoders.codec.decode(latents_CTHW[None])[0]


def _check_optimizer(factory: OptimizerCallable) -> None:
    """Its settings, on a parameter of no matter, before anything is read or built."""
    try:
        optimizer = factory([torch.nn.Parameter(torch.zeros(1, 1))])
    except ValueError as error:  # torch's: "Invalid learning rate: -1"
        raise UserError(f"model.init_args.optimizer: {' '.join(str(error).split())}") from None
    for name in ("lr", "weight_decay"):
        value = optimizer.defaults.get(name, 0.0)
        if not math.isfinite(float(value)):
            raise UserError(f"model.init_args.optimizer.init_args.{name}={float(value)}: must be finite")
