"""What several test files share, made once a session: toy shards with their features, and runs trained on them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_finish() -> None:
    """Set aside from garbage collection what the imports have left: some million objects, which each full collection
    would walk through. With them, collections take a quarter of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards `train` (48 clips) and `held_out` (8) of 5 frames of 32x32, one cache of features, and
    nothing that a run adds to (see `_sft_worker.tiny_overlay`)."""
    from _sft_worker import WORLD

    from idc.data.sources import ToyShards

    folder = tmp_path_factory.mktemp("toy")
    ToyShards(str(folder / "train"), 48, 0, **WORLD).prepare()
    ToyShards(str(folder / "held_out"), 8, 1_000_000, **WORLD).prepare()
    return folder


@pytest.fixture(scope="session")
def one_rank(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of `_four_steps` that several ranks must equal, finished: one process, nothing in its way."""
    from _four_steps import make_run

    run = make_run(tmp_path_factory.mktemp("one_rank"), toy_data)
    assert run.finish() == [0], run.errors()
    return run


@pytest.fixture(scope="session")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(**settings of the stage)` is a finished run of `_generate.tiny_run`, made once; nobody writes there."""
    from _generate import tiny_run

    made: dict[str, Path] = {}

    def run(**model: Any) -> Path:
        key = json.dumps(model, sort_keys=True)
        if key not in made:
            made[key] = tiny_run(toy_data, tmp_path_factory.mktemp("trained"), **model)
        return made[key]

    return run
