"""The guard against reward hacking: an alarm when a reward is bought with what nobody rewarded, or training is unsound.

In the paper's own table 1 alignment lowers motion, and its table 3 shows what a reward left out costs. Whoever looks
at the reward alone sees none of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from idc.errors import UserError, nearest

ON_ALARM = ("warn", "stop")
SURE = 2.0  # standard errors by which windows must differ
LOOKS = ("sharpness", "saturation")
DIVERSITY, WATCHED_DIVERSITY = "diversity", "watch/diversity"
SMOOTHED = ("policy/kl", "train/zero_variance_groups")
MEANINGS = {
    "policy/first_ratio_error": "the policy is not the one that sampled; rollouts and updates must run the same model "
    "in the same precision and sizes, with the latents kept in float32",
    "policy/kl": "the policy has left its reference; lower the learning rate, or raise objective.kl",
    "train/zero_variance_groups": "the rewards of these groups teach nothing; they are saturated, or too coarse",
}


@dataclass
class Trend:
    """A noisy curve: its first `window` values against its last ones.

    Attributes:
        window: values that are averaged at either end.
        first: the start, filled once.
        last: the newest.
    """

    window: int
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Take the next value; one that is not finite is left out."""
        if math.isfinite(value):
            if len(self.first) < self.window:
                self.first.append(value)
            self.last = [*self.last, value][-self.window :]

    @property
    def start(self) -> float:
        """Mean of the first values."""
        return math.fsum(self.first) / len(self.first)

    @property
    def now(self) -> float:
        """Mean of the last values."""
        return math.fsum(self.last) / len(self.last)

    @property
    def full(self) -> bool:
        """Whether there is a whole window to average."""
        return len(self.last) == self.window

    @property
    def change(self) -> float:
        """Now less start; 0 while it is within what the spread in the windows explains, or there is no window yet."""
        if not self.full:
            return 0.0
        change = self.now - self.start
        error = math.sqrt(_square_error(self.first) + _square_error(self.last))
        return change if abs(change) > SURE * error else 0.0


class Cause(NamedTuple):
    """Why there is an alarm: a name to know it by again, and the sentence for the user."""

    name: str
    text: str


class HackingMonitor(Callback):
    """Raises an alarm when the reward has risen and a watched measure has fallen, or training on it is unsound.

    Smoothed over `window` iterations (`val_window` validations), the reward (`train/reward`, `val/reward`) is compared
    with its start, and so is every measure: the composite's terms without weight (`<split>/reward/<name>`) and the
    diversity within groups (`watch/diversity`). A change within two standard errors of the windows is none. Besides:
    the ratio of the policy to itself on the first update is not 1 (log-probabilities are not replayed exactly), the KL
    to the reference is large, or groups have no variance, from which nothing can be learned.

    A cause is reported once a run: a warning on rank 0, and a text in TensorBoard. `watch/alarm` is the number of
    causes present in each iteration. State is in the checkpoint, so that a resumed run alarms as an undisturbed one,
    and one that was stopped goes on when it is resumed.

    Args:
        rise: of the reward that counts, in its own unit.
        fall: of a measure that counts, as a share of its start.
        falls: shares by name, for measures with one of their own.
        both_ways: measures whose rise by as much counts as well: rewards of looks often oversharpen and oversaturate.
            By default sharpness and saturation, where the run watches them.
        window: iterations at either end.
        val_window: validations at either end. They sample the same conditions from the same noise, so 1 is enough.
        max_ratio_error: of |ratio - 1| on the first update; 0 in float32. None for no bound, as all below.
        max_kl: of `policy/kl`, smoothed.
        max_zero_variance: of the share of groups without variance, smoothed.
        on_alarm: "warn", or "stop": the run ends after this iteration, with a checkpoint.

    Raises:
        UserError: for a setting out of its range, a name in `falls` or `both_ways` that the run does not watch, or a
            stage without rewards.
    """

    def __init__(
        self,
        rise: float = 0.02,
        fall: float = 0.2,
        falls: Mapping[str, float] | None = None,
        both_ways: Sequence[str] | None = None,
        window: int = 10,
        val_window: int = 1,
        max_ratio_error: float | None = 0.0,
        max_kl: float | None = 0.1,
        max_zero_variance: float | None = 0.5,
        on_alarm: Literal["warn", "stop"] = "warn",
    ) -> None:
        falls = dict(falls or {})
        for name, share in (("fall", fall), *((f"falls.{name}", share) for name, share in falls.items())):
            if not 0 < share < 1:
                raise UserError(f"HackingMonitor: {name}={share}: must be a share of the start, between 0 and 1")
        if not rise >= 0:
            raise UserError(f"HackingMonitor: rise={rise}: must be 0 or more, in the reward's unit")
        for name, value in (("window", window), ("val_window", val_window)):
            if value < 1:
                raise UserError(f"HackingMonitor: {name}={value}: must be 1 or more")
        self.bounds = dict(zip(MEANINGS, (max_ratio_error, max_kl, max_zero_variance), strict=True))
        for name, bound in self.bounds.items():
            if bound is not None and not bound >= 0:
                raise UserError(f"HackingMonitor: the bound of {name} is {bound}: must be 0 or more, or null for none")
        if on_alarm not in ON_ALARM:
            raise UserError(f"HackingMonitor: on_alarm={on_alarm!r}{nearest(on_alarm, ON_ALARM)}")
        self.rise, self.fall, self.falls = rise, fall, falls
        self.both_ways = LOOKS if both_ways is None else tuple(both_ways)
        self._named = {f"falls.{name}": name for name in falls}
        self._named |= {f"both_ways: {name}": name for name in both_ways or ()}
        self.windows = {"train": window, "val": val_window}
        self.on_alarm = on_alarm
        self.watched: tuple[str, ...] = ()
        self.trends: dict[str, Trend] = {}
        self.reported: list[str] = []

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        runner: Any = getattr(pl_module, "runner", None)
        if not hasattr(runner, "composite"):
            raise UserError(
                f"HackingMonitor: {type(pl_module).__name__} has no rewards to watch; give DPO "
                "model.init_args.reward, train with recipes/grpo.yaml, or leave the callback out"
            )
        self.watched = tuple(runner.composite.watched)
        known = (*self.watched, DIVERSITY)
        for setting, name in self._named.items():
            if name not in known:
                raise UserError(
                    f"HackingMonitor: {setting}: the run does not watch it; it watches {', '.join(known)}"
                    f"{nearest(name, known)}"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # What held-out rewards were bought with stays true until the next validation, and is all that DPO has.
        present = [*self._look(trainer, "train"), *self._bought("val")]
        pl_module.log("watch/alarm", float(len(present)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation that a signal cuts short logs nothing, and the last one's numbers would be taken again.
        for tag in self._tags("val"):
            trainer.callback_metrics.pop(tag, None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training too (`num_sanity_val_steps: -1`): that is the start itself."""
        self._look(trainer, "val")

    def state_dict(self) -> dict[str, Any]:
        return {"trends": {tag: asdict(trend) for tag, trend in self.trends.items()}, "reported": list(self.reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trends = {tag: Trend(**values) for tag, values in state_dict["trends"].items()}
        self.reported = list(state_dict["reported"])

    # Judging --------------------------------------------------------------------------------------------------------

    def _look(self, trainer: Trainer, split: str) -> list[Cause]:
        """Take in what a split has logged; report what is new and return all causes that are present.

        The logged numbers are means over all ranks, so that all of them come to the same end.
        """
        logged = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
        for tag in self._tags(split):
            if tag in logged:
                self.trends.setdefault(tag, Trend(self.windows[split])).add(logged[tag])
        present = [*self._bought(split), *(self._unsound(logged) if split == "train" else ())]
        new = [cause for cause in present if cause.name not in self.reported]
        for cause in new:
            self.reported.append(cause.name)
            self._report(trainer, cause.text)
        if new and self.on_alarm == "stop":
            trainer.should_stop = True
        return present

    def _tags(self, split: str) -> list[str]:
        own = [f"{split}/reward", *(f"{split}/reward/{name}" for name in self.watched)]
        return [*own, *SMOOTHED, WATCHED_DIVERSITY] if split == "train" else own

    def _bought(self, split: str) -> Iterator[Cause]:
        """Measures that were given up, or overdone, while the reward of this split rose."""
        reward = self.trends.get(f"{split}/reward")
        if reward is None or not reward.change > self.rise:
            return
        for tag in self._tags(split):
            name = DIVERSITY if tag == WATCHED_DIVERSITY else tag.removeprefix(f"{split}/reward/")
            trend = self.trends.get(tag)
            if tag == f"{split}/reward" or tag in SMOOTHED or trend is None or not trend.first or not trend.start:
                continue
            share = trend.change / abs(trend.start)
            if -share > self.falls.get(name, self.fall) or (
                name in self.both_ways and share > self.falls.get(name, self.fall)
            ):
                yield Cause(
                    f"{split}/{name}",
                    f"reward hacking? {split}/reward has risen from {reward.start:.4g} to {reward.now:.4g}, while "
                    f"{tag}, which is not rewarded, has {'fallen' if share < 0 else 'risen'} from {trend.start:.4g} to "
                    f"{trend.now:.4g} ({share:+.0%})",
                )

    def _unsound(self, logged: Mapping[str, float]) -> Iterator[Cause]:
        """Bounds that training itself breaks."""
        for tag, bound in self.bounds.items():
            if bound is None or tag not in logged:
                continue
            value, trend = logged[tag], self.trends.get(tag)
            if math.isfinite(value) and tag in SMOOTHED:
                if trend is None or not trend.full:
                    continue
                value = trend.now
            if not value <= bound:
                yield Cause(tag, f"{tag} is {value:.4g}, above {bound:g}: {MEANINGS[tag]}")

    def _report(self, trainer: Trainer, text: str) -> None:
        ending = "; the run stops here" if self.on_alarm == "stop" else ""
        rank_zero_warn(f"ALARM at step {trainer.global_step}: {text}{ending}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("watch/alarm", text, trainer.global_step)


def _square_error(values: Sequence[float]) -> float:
    """Squared standard error of the mean; 0 for a single value, whose spread is not known."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
