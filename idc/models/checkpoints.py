"""From a finished run to weights that sample: which checkpoint, which of its weights, and the run's own model settings.

Reads what `idc.callbacks.checkpoint` writes: a single file, FSDP2's shards, of which only the transformer is read, or
DeepSpeed's folder where it has whole weights (ZeRO-1 and 2); no process group is needed. Averages (EMA) take the place
of the weights they belong to, and LoRA is merged into the backbone, so that whoever loads the result needs neither.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from idc.errors import UserError, nearest
from idc.models.frozen import misfit
from idc.models.manifest import STATE, Manifest, hash_files, read_valid
from idc.models.shipped import resolve_shipped, shipped_names

CONFIG = "config.yaml"
REWARDS = "rewards.json"  # beside it, of an aligned run: the networks that it was rewarded by
STEP_DIRECTORY = re.compile(r"step-\d{8,}")
WHOLE_WEIGHTS = "checkpoint/mp_rank_00_model_states.pt"  # in DeepSpeed's folder; ZeRO-3 writes pieces in its place
_MODEL, _AVERAGES = "transformer.", "ema.transformer/"
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.\w+\.weight")

Which = Literal["ema", "raw"]


def step_directories(directory: Path) -> list[tuple[Manifest, Path]]:
    """The complete checkpoints in `directory` by size (hashes unchecked), the newest last."""
    found = []
    for path in sorted(directory.glob("step-*")):
        if STEP_DIRECTORY.fullmatch(path.name) and path.is_dir():
            try:
                found.append((read_valid(path, hashes=False), path))
            except ValueError:
                continue
    return sorted(found, key=lambda item: item[0].serial)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        state: its single file, or its folder of shards.
        fingerprint: 16 hex digits of its content.
        config: of the run that made it, as Lightning's command line wrote it; None where it does not lie there.
    """

    state: Path
    fingerprint: str
    config: Mapping[str, Any] | None

    @property
    def rewards(self) -> tuple[str, ...]:
        """Networks that its run, or the run that it went on from, was rewarded by."""
        folder = self.state.parent
        for run in (folder.parent, folder.parent.parent):
            if (run / REWARDS).is_file():
                return read_rewards(run / REWARDS)
        return ()


def read_rewards(path: Path) -> tuple[str, ...]:
    """The names under "rewards" in a file of JSON; () where it has none."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["rewards"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def find_checkpoint(value: str | Path) -> Checkpoint:
    """The checkpoint that `value` means.

    Args:
        value: a folder of runs (the newest `version_*` with a checkpoint is taken), a run's folder or its
            `checkpoints` (the newest valid step), a `step-*` folder, the `state.ckpt` in it, or any other checkpoint
            file of Lightning's.

    Raises:
        UserError: where there is none, or it is incomplete or damaged; for a pipeline's folder, which has no training
            state.
    """
    path = resolve_shipped(value)
    if (path / "model_index.json").is_file():
        raise UserError(
            f"checkpoint={str(value)!r}: a pipeline's folder ({path}), not a run of idc fit; it is exported already "
            "and samples as it is, by `checkpoint` in the recipes or IDCrafterPipeline.from_pretrained"
        )
    if not path.exists():
        near = path.parent.glob("[!.]*") if path.parent.is_dir() else []
        siblings = [str(p) for p in near if p.is_dir()]
        hint = nearest(path, [*siblings, *shipped_names()])
        raise UserError(f"checkpoint={str(value)!r}: no such file or folder{hint}; a run of idc fit makes one")
    path = path.resolve()  # `last` is a link that the next save moves on
    if path.name == STATE and (path.parent / "manifest.json").exists():
        path = path.parent
    if path.is_file():
        return Checkpoint(path, _digest(hash_files(path.parent, [path.name])[path.name].sha256), _config(path))
    if STEP_DIRECTORY.fullmatch(path.name):
        return _step(path, str(value))
    for folder in _places(path):
        damaged = []
        for _, step in reversed(step_directories(folder)):
            try:
                return _step(step, str(value))
            except UserError as error:
                damaged.append(str(error))
        if damaged:
            raise UserError(damaged[0])
    raise UserError(
        f"checkpoint={str(value)!r}: no complete checkpoint (checkpoints/step-*/manifest.json) in it; "
        "give a run's folder such as runs/sft/version_0"
    )


def _places(path: Path) -> list[Path]:
    """Where a folder's checkpoints may lie, the first choice first."""
    versions = [run for run in path.glob("version_*") if run.name.removeprefix("version_").isdecimal()]
    versions.sort(key=lambda run: int(run.name.removeprefix("version_")), reverse=True)
    return [path, path / "checkpoints", *(run / "checkpoints" for run in versions)]


def _step(path: Path, value: str) -> Checkpoint:
    try:
        manifest = read_valid(path)
    except ValueError as reason:
        raise UserError(f"checkpoint={value!r}: {path.name} is not a valid checkpoint, {reason}") from None
    if manifest.kind == "deepspeed" and not (path / STATE / WHOLE_WEIGHTS).is_file():
        state, whole = path / STATE, path.parent.parent / "whole"  # beside config.yaml
        raise UserError(
            f"checkpoint={value!r}: pieces of weights, by DeepSpeed's ZeRO-3; make them whole where DeepSpeed is "
            f"installed, by `python {state / 'zero_to_fp32.py'} --max_shard_size 1TB {state} {whole}`, and give "
            f"{whole / 'pytorch_model.bin'}"
        )
    text = json.dumps(sorted((name, record.sha256) for name, record in manifest.files.items()))
    return Checkpoint(path / STATE, _digest(text), _config(path.parent))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config(inside: Path) -> Mapping[str, Any] | None:
    """The run's config.yaml, from the folder of a checkpoint or of the checkpoints."""
    for folder in (inside.parent, inside.parent.parent):
        if (folder / CONFIG).is_file():
            loaded = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
            return loaded if isinstance(loaded, dict) else None
    return None


def read_weights(checkpoint: Checkpoint, which: Which = "ema", alpha: float | None = None) -> dict[str, Tensor]:
    """The transformer's weights by name, on the CPU, LoRA merged.

    Args:
        which: "ema" takes the averages where the run kept them, "raw" the weights themselves.
        alpha: of the run's LoRA; needed where the checkpoint has one.

    Raises:
        UserError: a checkpoint that holds no transformer, or a LoRA without `alpha`.
    """
    state = _read(checkpoint.state)
    weights = {name.removeprefix(_MODEL): value for name, value in state.items() if name.startswith(_MODEL)}
    if not weights:
        raise UserError(f"checkpoint={str(checkpoint.state)!r}: holds no transformer; is it a checkpoint of idc fit?")
    if which == "ema":
        for name, value in state.items():
            if name.startswith(_AVERAGES):
                own = name.removeprefix(_AVERAGES).replace("/", ".")
                if own in weights:
                    weights[own] = value.to(weights[own].dtype)
    return merge_lora(weights, alpha)


def _read(path: Path) -> dict[str, Tensor]:
    if (whole := path / WHOLE_WEIGHTS).is_file():
        return _read_file(whole)
    return _read_shards(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint={str(path)!r}: cannot be read: {reason}") from None
    state: Any = loaded if isinstance(loaded, dict) else {}
    state = state.get("state_dict", state.get("module", state))  # "module" is DeepSpeed's
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _read_shards(path: Path) -> dict[str, Tensor]:
    """The model's part of FSDP2's shards, whole; optimiser states stay on the disk."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(path)
    prefix = "state_dict."
    wanted = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and name.startswith((prefix + _MODEL, prefix + _AVERAGES))
    }
    if wanted:
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in wanted.items()}


def merge_lora(weights: Mapping[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
    """Plain weights: W + alpha / rank * B A for each adapted layer, and the others as they are."""
    merged: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if found := _LORA.fullmatch(name):
            adapters.setdefault(found["layer"], {})[found["part"]] = value
        else:
            merged[name.replace(".base_layer.", ".")] = value
    if adapters and alpha is None:
        raise UserError(
            "the checkpoint has a LoRA and no config.yaml beside it: set model.init_args.lora as in its run"
        )
    for layer, parts in adapters.items():
        assert alpha is not None
        down, up = parts["A"].float(), parts["B"].float()
        base = merged[f"{layer}.weight"]
        merged[f"{layer}.weight"] = (base.float() + alpha / down.shape[0] * (up @ down)).to(base.dtype)
    return merged


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> None:
    """Fill the transformer.

    Raises:
        UserError: where names or shapes are not the model's, naming the first and, from `config` (the run's own), what
            the recipe should say.
    """
    if fault := misfit(model.state_dict(), weights):
        settings = ((config or {}).get("model") or {}).get("init_args", {}).get("transformer")
        hint = f"; the run was made with transformer={json.dumps(settings)}" if settings else ""
        raise UserError(
            f"the checkpoint does not fit the transformer that the recipe describes: {fault}; leave "
            f"model.init_args.transformer out to take the run's own{hint}"
        )
    model.load_state_dict(weights)
