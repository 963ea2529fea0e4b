"""What the stages of alignment share: they start from a trained model, and measure themselves against it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from idc.data.storage import open_atomic
from idc.errors import UserError
from idc.models.checkpoints import REWARDS, Which
from idc.models.codecs import Codec
from idc.models.conditioners import TextConditioner
from idc.models.sampling import SamplingChanges
from idc.models.spec import Lora, Trainable, TransformerSpec
from idc.models.speed import Speed
from idc.models.system import Parts, open_system
from idc.models.vlm import VLMConditioner
from idc.models.weight_copy import WeightCopy
from idc.stages.base import Schedule, Stage

_START = "alignment_start"


class Aligned(Stage):
    """A stage that goes on from a trained model, which is also its reference.

    The reference is a copy of the trained weights alone: of the adapters with `lora`, where it equals the model with
    its adapters off. It is made from the start again at a resume, so the start must still be what it was.

    Args:
        checkpoint: a run of `idc fit` (its newest checkpoint), one of its checkpoints, a folder of runs, the folder of
            an `IDCrafterPipeline`, or the name of one that comes with the package. Model settings come from there.
        weights: of a run: its averages (EMA, where it has them) or the weights themselves.
        trainable: `full`, `id_blocks`, `id_blocks+lora` or `lora`.
        lora: of the adapters that are added.
        gradient_norm: gradients are clipped to this global norm.
        compute_dtype: in place of the run's own.
        sampling: what differs from how the run itself samples, for validation and previews.
        transformer, codec, text, vlm, speed: in place of the run's own, or for a checkpoint without config.yaml.

    Raises:
        UserError: where there is no model in all that, or a value breaks its rule.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        weights: Which = "ema",
        trainable: Trainable = "full",
        lora: Lora | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
        gradient_norm: float = 1.0,
        compute_dtype: Literal["float32", "bfloat16"] | None = None,
        sampling: SamplingChanges | None = None,
        transformer: TransformerSpec | None = None,
        codec: Codec | None = None,
        text: TextConditioner | None = None,
        vlm: VLMConditioner | None = None,
        speed: Speed | None = None,
    ) -> None:
        if not 0 < gradient_norm < math.inf:
            raise UserError(f"gradient_norm={gradient_norm}: must be positive and finite; the paper's is 1")
        self.system = system = open_system(checkpoint, Parts(transformer, codec, text, vlm, speed=speed), weights)
        super().__init__(
            transformer=system.spec,
            codec=system.encoders.codec,
            text=system.encoders.text,
            vlm=system.encoders.vlm,
            trainable=trainable,
            lora=lora,
            optimizer=optimizer,
            schedule=schedule,
            compute_dtype=compute_dtype or system.compute_dtype,  # type: ignore[arg-type]  # a run's own is one of the two
            sampling=(sampling or SamplingChanges()).over(system.sampling),
            speed=system.speed,
        )
        self.gradient_norm = gradient_norm
        self.reference: WeightCopy | None = None

    @property
    def has_weights(self) -> bool:
        return True

    def build_transformer(self, device: str) -> Any:
        return self.system.build_transformer(device)

    def configure_model(self) -> None:
        """As in `Stage`, and the reference is copied, before a checkpoint of this run comes in."""
        if self.transformer is None:
            super().configure_model()
            self._built().train()  # as loaded, it is in eval mode
            if self.needs_reference:
                self.reference = WeightCopy(self._built())

    def _built(self) -> torch.nn.Module:
        assert self.transformer is not None
        return self.transformer

    @property
    def rewards_used(self) -> list[str]:
        """Networks that this run or its start was rewarded by: a report flags metrics that stand on the same."""
        return list(dict.fromkeys((*self.system.rewards, *self.own_rewards)))

    @property
    def own_rewards(self) -> tuple[str, ...]:
        """Those of this run."""
        return ()

    def on_train_start(self) -> None:
        """They go beside config.yaml, from where `idc generate` takes them, and `idc evaluate` from its videos."""
        super().on_train_start()
        folder = self.trainer.log_dir  # the same call on all ranks
        if folder and self.trainer.logger is not None and self.rewards_used and self.trainer.is_global_zero:
            with open_atomic(str(Path(folder) / REWARDS)) as stream:
                stream.write(json.dumps({"rewards": self.rewards_used}).encode())

    @property
    def needs_reference(self) -> bool:
        """Whether anything is measured against the start."""
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_START] = json.dumps({**self.system.identity, "path": self._start_path}, sort_keys=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises `UserError` where the run did not start from the present `checkpoint`."""
        if _START not in checkpoint:
            return
        started, weights = json.loads(checkpoint[_START]), self.system.identity["weights"]
        if started["weights"] != weights:
            raise UserError(
                "model.init_args.checkpoint: other weights than those that the resumed run started from, which are "
                f"its reference: {_short(weights)} ({self._start_path}) and not {_short(started['weights'])} "
                f"({started.get('path', 'of an unknown place')}); give the very checkpoint (a step-* folder) of the "
                "start, or begin a new run"
            )

    @property
    def _start_path(self) -> str:
        return str(self.system.checkpoint.state if self.system.checkpoint else self.spec.pretrained)


def _short(weights: Any) -> str:
    """A hash of what identifies weights, of which files and their config are a part, in 16 hex digits."""
    if isinstance(weights, str):
        return weights
    return hashlib.blake2b(json.dumps(weights, sort_keys=True).encode(), digest_size=8).hexdigest()
