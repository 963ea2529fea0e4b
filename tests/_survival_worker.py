"""A small training run in a process of its own, to be killed, preempted and resumed by the tests.

`start` forks runs from the server of `_server`, so that each costs about a second.
Faults are real signals that the run sends to itself at a given place, which makes them repeatable.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _server import free_port, join, launch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from idc.callbacks import resume, writing
from idc.callbacks.checkpoint import Checkpoint
from idc.callbacks.ema import EMA, ema_state_dict
from idc.callbacks.hang import HangWatchdog
from idc.callbacks.preemption import Preemption
from idc.callbacks.resume import prepare_resume, resolve_together
from idc.errors import UserError
from idc.models.manifest import Manifest

SAMPLES, GLOBAL_BATCH, WIDTH = 48, 4, 6
STEPS = 20  # of 12 in an epoch
SAVE_EVERY = 4
HANG = 4.0  # seconds
PLACES = ("step", "state", "seal", "manifest", "publish", "prune")
_IN_WRITING = {"seal": "_seal_own_files", "publish": "_publish", "prune": "_prune"}


@dataclass(frozen=True)
class Run:
    """One run: `folder` for its checkpoints, `log` for its record, and the fault that it meets, if any."""

    folder: str
    log: str
    ranks: int = 1
    sharded: bool = False
    steps: int = STEPS
    min_steps: int | None = None
    ckpt_path: str | None = "last"
    kill_place: str | None = None  # one of PLACES, or "full"
    kill_step: int = 0
    signal_step: int | None = None  # the last rank sends itself SIGTERM while computing this step
    signal_batch: int | None = None  # ... or in this batch of a validation
    accumulate: int = 1
    ema: bool = True
    dtype: str = "32-true"
    asynchronous: bool = False
    hang_step: int = 0  # the last rank stops answering in this step; a watchdog of HANG seconds


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    """Blocks, and a head and a frozen bias that belong to the root's shard group."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[1].requires_grad_(False)
        self.head = nn.Linear(WIDTH, 1)
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stop_answering() -> None:
    threading.Event().wait()


class Stage(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"root": Path("relative/path"), "rate": 1e-2})
        self.transformer: Tower | None = None
        self.validation: list[float] = []

    def configure_model(self) -> None:
        if self.transformer is not None:
            return
        torch.manual_seed(0)
        self.transformer = Tower()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for block in self.transformer.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.transformer, mesh=mesh)

    def configure_optimizers(self) -> Any:
        # Two groups, in another order than the module's: the states must still find their parameters.
        trainable = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trainable if name.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for name, p in trainable if not name.endswith("bias")], "weight_decay": 0.1},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["rate"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loss(self, ids: list[int]) -> Tensor:
        assert self.transformer is not None
        x = torch.stack([torch.sin(torch.arange(WIDTH) * (i + 1.0)) for i in ids])
        target = torch.tensor([[(i % 7) / 7.0] for i in ids])
        x, target = x.to(self.dtype), target.to(self.dtype)
        return (self.transformer(x) - target).square().mean()

    def training_step(self, ids: list[int], batch_idx: int) -> Tensor:
        return self.loss(ids)

    def validation_step(self, ids: list[int], batch_idx: int) -> None:
        self.validation.append(float(self.loss(ids)))


class Stream(IterableDataset):
    """Global batches of sample ids in an order given by the epoch; each rank takes its slice."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return SAMPLES // GLOBAL_BATCH

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < len(self):
            batch = order[self.position * GLOBAL_BATCH : (self.position + 1) * GLOBAL_BATCH]
            self.position += 1
            yield batch[self.rank :: self.ranks]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Recorder(Callback):
    """Appends a line per optimiser step: losses and samples of this rank since the last one."""

    def __init__(self, path: Path, run: Run) -> None:
        self.path, self.run, self.pending, self.seen = path, run, [], None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        if self.run.kill_place == "step" and step == self.run.kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.run.hang_step and trainer.global_rank == self.run.ranks - 1:
            stop_answering()
        if step == self.run.signal_step and trainer.global_rank == self.run.ranks - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pending.append([float(outputs["loss"]) * self.run.accumulate, batch])
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            with self.path.open("a") as log:
                log.write(json.dumps({"step": self.seen, "batches": self.pending}) + "\n")
            self.pending = []

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        Path(f"{self.path}.error").write_text(f"{type(exception).__name__}: {exception}")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ours = not trainer.sanity_checking and trainer.global_rank == self.run.ranks - 1
        if ours and batch_idx == self.run.signal_batch:
            os.kill(os.getpid(), signal.SIGTERM)


def train(run: Run, rank: int, port: int) -> None:
    """Run to the end, and write the state it reached to `<log>-<rank>.end`."""
    torch.set_num_threads(1)
    if run.ranks > 1 and port:  # this process is one rank; otherwise Lightning starts the others
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        os.environ["WORLD_SIZE"] = str(run.ranks)
    place_kill(run)
    log = Path(f"{run.log}-{rank}")
    trainer = make_trainer(run, [Recorder(log, run)])
    stage = Stage()
    ckpt_path = prepare_resume(run.ckpt_path, run.folder, trainer)
    before = signal.getsignal(signal.SIGTERM)
    trainer.fit(stage, Stream(rank, run.ranks), validation_batches(rank, run.ranks), ckpt_path=ckpt_path)
    end = {
        "step": trainer.global_step,
        "validation": stage.validation,
        "weights": {k: v.tolist() for k, v in whole(stage).items()},
        "ema": {k: v.tolist() for k, v in ema_state_dict(stage, "transformer").items()},
        "handler_restored": signal.getsignal(signal.SIGTERM) == before,
    }
    Path(f"{run.log}-{rank}.end").write_text(json.dumps(end))
    if run.ranks > 1:
        torch.distributed.destroy_process_group()


def make_trainer(run: Run, extra: list[Callback]) -> Trainer:
    strategy = ModelParallelStrategy(run.ranks, 1) if run.sharded else "auto" if run.ranks == 1 else "ddp"
    return Trainer(
        default_root_dir=run.folder,
        accelerator="cpu",
        devices=run.ranks,
        strategy=strategy,
        precision=run.dtype,  # type: ignore[arg-type]
        max_steps=run.steps,
        min_steps=run.min_steps,
        max_epochs=-1,
        val_check_interval=6 * run.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=1.0,
        callbacks=[
            Checkpoint(every_n_steps=SAVE_EVERY, keep_last=2, asynchronous=run.asynchronous),
            *([EMA(decay=0.9)] if run.ema else []),
            *([HangWatchdog(HANG, 10 * HANG)] if run.hang_step else []),
            Preemption(),
            *extra,
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def validation_batches(rank: int, ranks: int) -> DataLoader:
    return DataLoader([list(range(100 + 4 * i, 104 + 4 * i))[rank::ranks] for i in range(3)], batch_size=None)


def whole(stage: Stage) -> dict[str, Tensor]:
    state = stage.transformer.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def place_kill(run: Run) -> None:
    """SIGKILL this process at a place within the save of `kill_step`: what is on disk is what such a kill leaves.

    "full" raises the error of a full disk instead.
    """
    owners: dict[str | None, tuple[Any, str]] = {"manifest": (Manifest, "write")}
    owners |= {place: (writing, name) for place, name in _IN_WRITING.items()}
    name_of_step = f"step-{run.kill_step:08d}"
    if run.kill_place in owners:
        owner, name = owners[run.kill_place]
        original = getattr(owner, name)

        def deadly(*args: Any, **kwargs: Any) -> Any:
            if any(Path(run.folder, "checkpoints").glob(f"{name_of_step}*")):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, deadly)
    elif run.kill_place in ("state", "full"):
        save = torch.save

        def half(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if name_of_step in str(path):
                save(obj, path, *args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)
                if run.kill_place == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.kill(os.getpid(), signal.SIGKILL)
            save(obj, path, *args, **kwargs)

        torch.save = half


def choose(case: str, folder: str, value: str, rank: int, port: int) -> None:
    """Choose a checkpoint with another rank, and write the choice to `<folder>/<rank>`.

    The last word of `case` is a rank that does not see step 2 in its listing, or nobody's number.
    """
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if case.endswith(str(rank)):
        listed, read = resume.step_directories, resume.read_valid

        def partly_read(path: Path, **how: Any) -> Manifest:
            if path.name == "step-00000002":
                raise ValueError("it has no manifest")
            return read(path, **how)

        resume.read_valid = partly_read
        resume.step_directories = lambda directory: [pair for pair in listed(directory) if pair[0].step != 2]
    try:
        chosen = resolve_together(value, folder, ModelParallelStrategy(2, 1))
    except UserError as error:
        chosen = f"refused: {error}"
    Path(folder, str(rank)).write_text(str(chosen))
    torch.distributed.destroy_process_group()


def start(run: Run) -> list[multiprocessing.Process]:
    """Start all ranks of a run."""
    port = free_port()
    return launch(train, [(run, rank, port) for rank in range(run.ranks)])


def finish(run: Run, timeout: float = 60) -> list[int | None]:
    """Run to the end; the exit codes of all ranks (-9 for a killed one, None for one that hung and was killed)."""
    return join(start(run), timeout)


def records(run: Run, rank: int = 0) -> dict[int, Any]:
    """The record of one rank by step, over all starts of a run; a step that was repeated must be repeated exactly."""
    found: dict[int, Any] = {}
    for line in Path(f"{run.log}-{rank}").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        assert found.setdefault(step, record) == record, f"step {step} was not repeated exactly"
    return found


def mean_losses(run: Run) -> dict[int, float]:
    """The loss of the global batch by step."""
    ranks = [records(run, rank) for rank in range(run.ranks)]
    return {step: sum(rank[step]["batches"][0][0] for rank in ranks) / run.ranks for step in ranks[0]}


def mean_validation(run: Run) -> list[float]:
    """The losses of the global validation batches in the order in which they were computed."""
    ranks = [end(run, rank)["validation"] for rank in range(run.ranks)]
    return [sum(losses) / run.ranks for losses in zip(*ranks, strict=True)]


def end(run: Run, rank: int = 0) -> dict[str, Any]:
    return json.loads(Path(f"{run.log}-{rank}.end").read_text())


def command(run: Run, port: int, errors: str) -> None:
    """What `python _survival_worker.py` does in a process that has its imports: rank 0, which launches the others as
    commands. Its stderr, and theirs, go to the file `errors`."""
    with Path(errors).open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    sys.argv = [__file__, json.dumps(asdict(run))]
    runpy.run_path(__file__, run_name="__main__")


if __name__ == "__main__":  # for Lightning's launcher, which starts this script once more for each further rank
    settings = json.loads(sys.argv[1])
    train(Run(**settings), int(os.environ.get("LOCAL_RANK", 0)), port=0)
