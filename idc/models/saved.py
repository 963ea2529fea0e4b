"""Codec and conditioners in a pipeline's folder: each with its weights and `encoder.json`, which says how to make it.

<folder>/model_index.json      diffusers' own, with this pipeline's settings
<folder>/transformer/, scheduler/
<folder>/codec/, text/, vlm/   in the layout of the library they come from
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from idc.errors import UserError, nearest
from idc.models.conditioning import Encoders
from idc.models.frozen import Frozen

MODEL_INDEX, ENCODER = "model_index.json", "encoder.json"
RECORD = "training.json"  # how an exported model came about
PARTS = ("codec", "text", "vlm")
# The classes that a folder may name: nothing else is imported because a file says so.
CLASSES = {
    "CosineCodec": "idc.models.toy_codec",
    "WanVAECodec": "idc.models.codecs",
    "ToyTextConditioner": "idc.models.conditioners",
    "UMT5Conditioner": "idc.models.conditioners",
    "ToyVLM": "idc.models.vlm",
    "QwenVLConditioner": "idc.models.vlm",
}


def save_encoders(encoders: Encoders, folder: Path) -> None:
    """Write `codec`, `text` and, where there is one, `vlm` under `folder`.

    Raises:
        UserError: for a class that a folder cannot name.
    """
    for name in PARTS:
        part: Frozen | None = getattr(encoders, name)
        if part is None:
            continue
        own = type(part).__name__
        if own not in CLASSES:
            raise UserError(f"{name}: a {own} cannot be saved with the pipeline{nearest(own, CLASSES)}")
        (folder / name).mkdir(parents=True, exist_ok=True)
        record = {"class": own, "arguments": part.save(folder / name)}
        (folder / name / ENCODER).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_encoders(folder: Path) -> Encoders:
    """The inverse of `save_encoders`; weights load at first use.

    Raises:
        UserError: for a folder that lacks one, or names a class that is not ours.
    """
    codec, text = (_read(folder / name) for name in PARTS[:2])
    return Encoders(codec, text, _read(folder / "vlm") if (folder / "vlm").is_dir() else None)


def read_pipeline_folder(folder: Path) -> tuple[Encoders, dict[str, Any]]:
    """The encoders and the settings (`compute_dtype`, `sampling`) of a saved `IDCrafterPipeline`.

    Raises:
        UserError: for a folder of another pipeline, or an incomplete one.
    """
    index = _json(folder / MODEL_INDEX)
    if index.get("_class_name") != "IDCrafterPipeline":
        raise UserError(f"{folder}: the folder of a {index.get('_class_name')}, not of an IDCrafterPipeline")
    if not (folder / "transformer" / "config.json").is_file():
        raise UserError(f"{folder}: the pipeline is incomplete, it has no transformer/config.json")
    return read_encoders(folder), {name: index[name] for name in ("compute_dtype", "sampling")}


def _read(folder: Path) -> Any:
    """What `save_encoders` wrote there, of any of `CLASSES`."""
    record = _json(folder / ENCODER)
    if record.get("class") not in CLASSES:
        raise UserError(f"{folder / ENCODER}: class {record.get('class')!r}{nearest(record.get('class'), CLASSES)}")
    arguments = dict(record.get("arguments", {}))
    if "path" in arguments:
        arguments["path"] = str(folder / arguments["path"])
    return getattr(import_module(CLASSES[record["class"]]), record["class"])(**arguments)


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path.parent}: the pipeline is incomplete, it has no {path.name}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: must be a JSON object")
    return loaded
