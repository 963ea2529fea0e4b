"""The model that an alignment starts from, where its run is not there yet: sizes of the recipe that trains it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from idc.errors import UserError
from idc.models.frozen import HUB_ID
from idc.models.shipped import resolve_shipped
from idc.recipes import merged

USUAL = "recipes/scale/wan1.3b.yaml"
_PARTS = ("transformer", "codec", "text", "vlm", "speed", "compute_dtype")
_MODELS = ("model_index.json", "manifest.json", "step-*", "checkpoints/*", "*/checkpoints/*")
_TO_COME = "to/come"  # weights of a recipe that trains from scratch: a hub's, which nothing is asked of


def is_there(checkpoint: str) -> bool:
    """Whether anything lies there; a run's folder without a checkpoint counts as nothing."""
    path = resolve_shipped(checkpoint)
    return path.is_file() or any(any(path.glob(mark)) for mark in _MODELS)


def stand_in(args: Sequence[str], given: Any, sizes_of: Path | None) -> tuple[list[str], str]:
    """Settings that stand in for a checkpoint, as they are typed behind the others, and the recipe that they are of.

    Args:
        args: the command line. given: its `model.init_args`, parsed; what they hold stays.
        sizes_of: a recipe, or an overlay of `recipes/sft.yaml` as those in recipes/scale; None takes that of 1.3B.

    Raises:
        UserError: where the recipe is not there, or has no transformer.
    """
    file = sizes_of or _usual(args)
    if not file.is_file():
        raise UserError(
            f"model.init_args.checkpoint={given.get('checkpoint')}: not there yet, and neither is {file}; say whose "
            "sizes it will have by --sizes-of RECIPE, such as recipes/scale/wan1.3b.yaml"
        )
    base = file.parent.parent / "sft.yaml"
    files = [str(path) for path in (base, file) if path.is_file()]
    own = (merged([word for path in files for word in ("--config", path)]).get("model") or {}).get("init_args") or {}
    if not own.get("transformer"):
        raise UserError(f"--sizes-of {file}: has no model.init_args.transformer; recipes/scale/ has some that do")
    own["transformer"]["pretrained"] = _hub(own["transformer"].get("pretrained"))
    words: list[str] = []
    for name in _PARTS:
        if given.get(name) is None and own.get(name) is not None:
            value = own[name]
            words += [f"--model.init_args.{name}", value if isinstance(value, str) else json.dumps(value)]
    return words, str(file)


def _usual(args: Sequence[str]) -> Path:
    """Among the recipes that the command line names, or below the present folder."""
    files = [Path(value) for arg, value in pairwise(args) if arg == "--config"]
    files += [Path(arg.removeprefix("--config=")) for arg in args if arg.startswith("--config=")]
    found = (folder / "scale" / Path(USUAL).name for file in files for folder in file.parents)
    return next((path for path in found if path.is_file()), Path(USUAL))


def _hub(pretrained: str | None) -> str:
    folder = Path(pretrained or "").expanduser()
    return pretrained if pretrained and (folder.exists() or HUB_ID.fullmatch(pretrained)) else _TO_COME
