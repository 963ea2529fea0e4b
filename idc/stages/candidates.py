"""Several videos of each condition, by one model in this process: a folder of videos for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from idc.data.benchmark import Item
from idc.data.output import OutputFolder
from idc.data.requests import GenerationData
from idc.progress import track
from idc.stages.generate import Generate


@dataclass
class _Seed:
    """One seed's folder, what is asked for there, and why an item has no video, by id."""

    folder: OutputFolder
    data: GenerationData
    items: list[Item]
    failures: dict[str, str]
    todo: list[Item]


def make_candidates(stage: Generate, data: Sequence[GenerationData], root: Path) -> list[Path]:
    """Make what is missing of the videos of all `data`, which differ in their seeds; the folders, in that order.

    The folders are those that `idc generate` would make: so an interrupted call goes on where it stopped, videos of
    another model are replaced, and an item that fails is named in its folder's `failures.jsonl`.

    Raises:
        UserError: where nothing can be made of the items, or another process writes there.
    """
    with ExitStack() as stack:
        seeds = [_open(stack, stage, each, root / f"seed-{each.seed}") for each in data]
        todo = [(seed, item) for seed in seeds for item in seed.todo]
        if todo:
            _load(stage)
        for seed, item in track(todo, "candidates of pairs", len(todo)):
            stage.folder = seed.folder
            stage.predict_step(seed.data.read(item), 0)
            if item.id in stage.failures:
                seed.failures[item.id] = stage.failures.pop(item.id)
        for seed in seeds:
            seed.folder.write_failures(seed.failures, seed.items)
    return [seed.folder.path for seed in seeds]


def _open(stack: ExitStack, stage: Generate, data: GenerationData, path: Path) -> _Seed:
    folder = OutputFolder(path, "replace")
    folder.open()
    stack.callback(folder.close)
    items, failures = data.source.items(path, replace=True)
    left = set(folder.plan(items, {**stage.settings, "data": data.settings})) - failures.keys()
    return _Seed(folder, data, items, dict(failures), [item for item in items if item.id in left])


def _load(stage: Generate) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage.configure_model()
    stage.to(device)
    if stage.system is not None:
        stage.system.encoders.place(device)
