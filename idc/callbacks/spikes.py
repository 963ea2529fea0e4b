"""What to do about a loss or a gradient that is NaN or far above what is usual: go on, take no step, roll back, stop.

Decided before the optimiser steps, by all ranks alike, from values that are averaged over them. A step that is not
taken counts as one all the same: `global_step`, the learning rate's schedule and the data go on; weights, the
optimiser's state and averaged weights (`idc.callbacks.ema`) stay. A roll-back is in `idc.callbacks.rollback`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from idc.callbacks.checkpoint import is_dry_run
from idc.callbacks.rollback import no_checkpoint, roll_back
from idc.errors import UserError, nearest

INCIDENTS = "incidents.jsonl"
SIGNALS = {"loss": "the loss", "gradient_norm": "the gradient's norm"}
ON_NAN = ("stop", "skip", "roll_back")
ON_SPIKE = ("ignore", *ON_NAN)
_NORMAL = 1.4826  # standard deviations in a median absolute deviation, of a normal distribution
_LEAST = 0.01  # of the median: the least spread, for curves that hardly vary


@dataclass
class Usual:
    """What a curve's last values were, robustly: outliers among them do not widen the limit.

    Attributes:
        window: how many values count.
        values: they, the newest last.
    """

    window: int
    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Take the next value."""
        self.values = [*self.values, value][-self.window :]

    @property
    def centre(self) -> float:
        """The median."""
        return median(self.values)

    @property
    def spread(self) -> float:
        """1.4826 times the median absolute deviation, at least 1% of the median."""
        centre = self.centre
        return max(_NORMAL * median(abs(value - centre) for value in self.values), _LEAST * abs(centre))


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step.

    Attributes:
        kind: "nan" (or infinity) or "spike".
        signal: of `SIGNALS`.
        value: the signal's.
        limit: above which it is a spike; None for NaN.
        usual: the median it was compared with; None for NaN.
    """

    kind: Literal["nan", "spike"]
    signal: str
    value: float
    limit: float | None = None
    usual: float | None = None

    def __str__(self) -> str:
        text = f"{SIGNALS[self.signal]} is {self.value:.6g}"
        return text if self.limit is None else f"{text}, above {self.limit:.6g} (its median is {self.usual:.6g})"


class LossGuard(Callback):
    """Watches loss and gradient norm of every optimiser step; a run without one stops at NaN.

    Each finding is printed with the samples of its step, of all ranks, written to `incidents.jsonl` in the run's
    folder, and counted in TensorBoard (`incidents/*`). Its state is in checkpoints: a run that is resumed meets what
    follows as the undisturbed run did. With manual optimisation (GRPO) there are several losses a step, whose mean is
    0 by design: the gradient's norm alone is watched.

    Args:
        on_nan: of a loss or norm that is NaN or infinite: `stop` the run, `skip` the step, or `roll_back` to the newest
            valid checkpoint and go on with the data after this batch.
        on_spike: of a loss or norm above median + threshold * spread of the last `window` steps: those, or `ignore`.
        threshold: in robust standard deviations.
        window: steps that count as usual; spikes are not among them, unless they are ignored.
        warm_up: steps before the first spike can be found.
        watch: which of `loss` and `gradient_norm` can spike.
        max_skips: so many steps in a row may be skipped; one more stops the run.
        max_roll_backs: so many in the whole run; one more stops it.

    Raises:
        UserError: for a value that breaks its rule; for skip or roll_back with DeepSpeed, which steps itself.
    """

    def __init__(
        self,
        on_nan: Literal["stop", "skip", "roll_back"] = "stop",
        on_spike: Literal["ignore", "skip", "roll_back", "stop"] = "ignore",
        threshold: float = 10.0,
        window: int = 200,
        warm_up: int = 50,
        watch: Sequence[str] = tuple(SIGNALS),
        max_skips: int = 5,
        max_roll_backs: int = 3,
    ) -> None:
        for name, value, choices in (("on_nan", on_nan, ON_NAN), ("on_spike", on_spike, ON_SPIKE)):
            if value not in choices:
                raise UserError(f"{name}={value!r}{nearest(value, choices)}")
        rules = {
            "threshold": (0 < threshold < math.inf, "positive and finite; 10 is usual"),
            "window": (window >= 10, "10 steps or more, for a median to mean something"),
            "warm_up": (10 <= warm_up <= window, f"at least 10 and at most the window, {window}"),
            "max_skips": (max_skips >= 1, "1 or more"),
            "max_roll_backs": (max_roll_backs >= 1, "1 or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"{name}={locals()[name]}: must be {rule}")
        if unknown := [name for name in watch if name not in SIGNALS]:
            raise UserError(f"watch={unknown[0]!r}{nearest(unknown[0], SIGNALS)}")
        self.on_nan, self.on_spike, self.threshold, self.warm_up = on_nan, on_spike, threshold, warm_up
        self.max_skips, self.max_roll_backs = max_skips, max_roll_backs
        self.usual = {name: Usual(window) for name in watch}
        self.in_a_row = 0  # steps skipped since the last one that was taken
        self.counts = {"nan": 0, "spike": 0, "skip": 0, "roll_back": 0}
        self._losses: list[Tensor] = []  # of this optimiser step's micro-batches, each by its share
        self._rolls_back = False
        self._file: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        usual = {name: list(usual.values) for name, usual in self.usual.items()}
        return {"usual": usual, "in_a_row": self.in_a_row, "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, usual in self.usual.items():
            usual.values = list(state_dict["usual"].get(name, ()))[-usual.window :]
        self.in_a_row, self.counts = state_dict["in_a_row"], dict(state_dict["counts"])

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        acts = {"on_nan": self.on_nan, "on_spike": self.on_spike}
        changing = [f"{name}={act}" for name, act in acts.items() if act in ("skip", "roll_back")]
        if changing and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(f"{changing[0]}: DeepSpeed steps inside its engine; with it, stop is the one that works")
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: all ranks ask
        self._file = None if is_dry_run(trainer) else Path(folder, INCIDENTS)
        stage_module: Any = pl_module
        stage_module.guard = lambda norm: self.allows(trainer, stage_module, norm)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            stage_module: Any = pl_module
            stage_module.guard = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._rolls_back = [], False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if pl_module.automatic_optimization:
            self._losses.append(loss.detach())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._rolls_back:
            return
        self._rolls_back = False
        counts, step = dict(self.counts), trainer.global_step
        path = roll_back(trainer, pl_module)
        self.in_a_row, self.counts = 0, counts  # the checkpoint's were before this
        count = f"{counts['roll_back']} of at most {self.max_roll_backs}"  # Python drops a warning of the same words
        rank_zero_warn(f"Rolled back from step {step} to {path} ({count}); going on with the data after this batch")

    # Judging --------------------------------------------------------------------------------------------------------

    def allows(self, trainer: Trainer, stage: Any, norm: float) -> bool:
        """Whether the optimiser may step, the same on all ranks, which ask together.

        Args:
            stage: the module; it names the samples (`samples_of_step`) and can `end_run`.
            norm: of the gradient over all parameters, before clipping.

        Raises:
            UserError: where the run is to stop.
        """
        values = self._over_ranks(trainer, norm)
        if self._rolls_back:  # a further step of a batch (GRPO makes several) on weights that go anyway
            return False
        finding = self.judge(values)
        act: str = "take" if finding is None else self.on_nan if finding.kind == "nan" else self.on_spike
        if finding is not None:
            self.counts[finding.kind] += 1
            act, reason = self._within_limits(trainer, act, str(finding))
            if act in self.counts:
                self.counts[act] += 1
            self._record(trainer, stage, finding, act, reason)
            if act == "stop":
                stage.end_run(reason)
        taken = act in ("take", "ignore")
        self.in_a_row = 0 if taken else self.in_a_row + 1
        self._rolls_back = act == "roll_back"
        if taken:
            for name, usual in self.usual.items():
                if name in values:
                    usual.add(values[name])
        return taken

    def judge(self, values: dict[str, float]) -> Finding | None:
        """What is wrong with a step of these values by signal; None if nothing is."""
        for name, value in values.items():
            if not math.isfinite(value):
                return Finding("nan", name, value)
        for name, usual in self.usual.items():
            if name in values and len(usual.values) >= self.warm_up:
                limit = usual.centre + self.threshold * usual.spread
                if values[name] > limit:
                    return Finding("spike", name, values[name], limit, usual.centre)
        return None

    def _over_ranks(self, trainer: Trainer, norm: float) -> dict[str, float]:
        """Means over the ranks: one exchange, of which each gets the same bits."""
        device = trainer.strategy.root_device
        # Lightning has divided each by the number of micro-batches.
        loss = torch.stack([loss.to(device, torch.float32) for loss in self._losses]).sum() if self._losses else None
        self._losses = []
        both = torch.stack(
            [torch.tensor(norm, device=device), torch.zeros((), device=device) if loss is None else loss]
        )
        mean: Any = trainer.strategy.reduce(both, reduce_op="mean")
        norm, reduced = mean.tolist()
        return {"gradient_norm": norm} if loss is None else {"loss": reduced, "gradient_norm": norm}

    def _within_limits(self, trainer: Trainer, act: str, reason: str) -> tuple[str, str]:
        if act == "skip" and self.in_a_row >= self.max_skips:
            return "stop", f"{reason}, after {self.in_a_row} skipped steps in a row (max_skips={self.max_skips})"
        if act == "roll_back" and self.counts["roll_back"] >= self.max_roll_backs:
            return "stop", f"{reason}, after {self.max_roll_backs} roll-backs (max_roll_backs)"
        if act == "roll_back" and (problem := no_checkpoint(trainer)):
            return "stop", f"{reason}, and {problem}"
        return act, reason

    def _record(self, trainer: Trainer, stage: Any, finding: Finding, act: str, reason: str) -> None:
        step, samples = trainer.global_step + 1, stage.samples_of_step()  # a collective
        for logger in trainer.loggers:
            logger.log_metrics({f"incidents/{name}": float(n) for name, n in self.counts.items()}, step=step)
        if act != "stop":  # whose message says it all
            ids = [id for own in samples for id in own]
            rank_zero_warn(f"step {step}: {reason}: {_WORDS[act]}; its batch holds {', '.join(ids) or 'no ids'}")
        if self._file is None or not trainer.is_global_zero:
            return
        numbers = {"value": finding.value, "limit": finding.limit, "median": finding.usual}
        record = {
            "step": step,
            "epoch": trainer.current_epoch,
            "batch": trainer.fit_loop.epoch_loop.batch_idx,
            "kind": finding.kind,
            "signal": finding.signal,
            **{
                name: number if number is None or math.isfinite(number) else str(number)
                for name, number in numbers.items()
            },
            "action": act,
            "reason": reason,
            "samples": samples,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


_WORDS = {
    "ignore": "the step is taken",
    "skip": "the step is skipped",
    "roll_back": "the step is skipped, and the run goes back to its newest checkpoint",
}
