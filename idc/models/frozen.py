"""What codecs and conditioners share: they are frozen, loaded late, and known by a fingerprint that keys caches."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from idc.errors import UserError, counted, nearest
from idc.models.hub import offline_without_a_network
from idc.models.weight_hashes import content_hash

_T = TypeVar("_T")
_ADVICE = re.compile(r"\. If you (?:were .*?\. Otherwise, |.*)")  # what transformers and diffusers go on with
_LITTLE = 256 << 20  # bytes that are loaded at once
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Frozen(ABC):
    """A frozen encoder. Making one is light; `load` builds what is heavy, once.

    It is no `nn.Module` on purpose: held by a LightningModule it stays out of the state dict, of the optimiser and
    of FSDP's wrapping.
    """

    device: torch.device = torch.device("cpu")
    _model: Any = None  # what is heavy

    @abstractmethod
    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Build on the first call, move on later ones; return self.

        `dtype` is for encoders that have no dtype setting of their own: a setting wins, so that the fingerprint
        does not depend on where the encoder runs.
        """

    def unload(self) -> None:
        """Free what `load` built; the next use builds it again."""
        self._model = None

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what is heavy into `folder`; the arguments that make this encoder again, as plain JSON.

        Where there are weights, the argument `path` is relative to `folder`.
        """
        raise UserError(f"{type(self).__name__} cannot be saved: it has no save(folder)")

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Loaded, without gradients, and outside any autocast: in a training step under mixed precision the output
        must be that which was cached."""
        self.load(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the output for the same input may change. Needs no `load`."""
        text = json.dumps([type(self).__qualname__, self._identity()], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Every setting that the output depends on, as plain JSON."""


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating-point dtype of that name, as recipes write it: "float32", "bfloat16" or "float16"."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(name, torch.dtype):
        return name
    if name not in names:
        raise UserError(f"dtype={name!r}: no such dtype{nearest(name, names)}")
    return names[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The inverse of `torch_dtype`."""
    return str(dtype).removeprefix("torch.")


def aligned(model: torch.nn.Module) -> None:
    """Copy weights that lie at odd addresses, as safetensors maps them: there the CPU's kernels round differently, and
    the same weights from another file would give other bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def resolve(
    path: str, subfolder: str, expected: str, marker: str = "config.json", setting: str = "path"
) -> Path | None:
    """The folder `path/subfolder` where it exists and holds the file `marker`, or None for a hub id (`owner/name`).

    Args:
        expected: what the folder should contain, for the message.
        setting: where `path` was set, for the message.

    Raises:
        UserError: for what looks like a local path and is not there or lacks the marker; no network is tried.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(path):
        return None
    folder = folder / subfolder if subfolder else folder
    if not (folder / marker).is_file():
        found = f"has no {marker}" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{setting}={path!r}: {folder} {found}; it should contain {expected}. "
            "Give a folder saved with save_pretrained, or a hub id such as 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'"
        )
    return folder


def first_line(error: Exception) -> str:
    """Of what a library says, for a message of one line; the error's type where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return _ADVICE.sub("; ", line).rstrip(";. ")


def load_weights(path: str, expected: str, load: Callable[[], _T], setting: str = "path") -> _T:
    """`load()`, with what libraries say of missing or broken files made a `UserError` that names the folder.

    Where the model hub does not answer, what its cache lacks is told at once.
    """
    from safetensors import SafetensorError

    with offline_without_a_network(path) as unreachable:
        try:
            return load()
        except UserError:
            raise
        except (ImportError, OSError, ValueError, KeyError, SafetensorError) as error:
            reason = first_line(error)
            if unreachable:  # libraries advise on files that a folder may lack
                reason = f"{reason.partition('; make sure')[0]}; the model hub is out of reach: give a local folder"
    raise UserError(f"{setting}={path!r}: cannot load {expected}: {reason}")


def load_diffusers(cls: Any, path: str, subfolder: str, expected: str, dtype: torch.dtype) -> Any:
    """`cls.from_pretrained(path)` for a model of diffusers, frozen; tensors that the files lack are refused, which
    diffusers would leave without content."""
    settings: dict[str, Any] = {
        "torch_dtype": dtype,
        "use_safetensors": True,
        **({"subfolder": subfolder} if subfolder else {}),
    }
    model = load_weights(path, expected, lambda: cls.from_pretrained(path, **settings))
    check_complete(model, path, f"it should contain {expected}")
    return model.eval().requires_grad_(False)


def check_complete(model: torch.nn.Module, path: object, hint: str) -> None:
    """Raise `UserError` where a model of diffusers lacks parameters, which it leaves on the meta device."""
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise UserError(f"{path}: holds no {lacking[0]}, {counted(len(lacking), 'parameter')} missing in all; {hint}")


def load_model(
    cls: Any, path: str, expected: str, dtype: torch.dtype, unused: tuple[str, ...] = (), subfolder: str = ""
) -> Any:
    """`cls.from_pretrained(path)`, frozen; tensors that the files lack are refused, transformers would draw them.

    Args:
        unused: beginnings of the names of tensors that may be missing.
    """
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    settings |= {"subfolder": subfolder} if subfolder else {}
    settings["ignore_mismatched_sizes"] = True  # so that they are told below, by name
    with _no_bar_for_little(path):
        model, info = load_weights(path, expected, lambda: cls.from_pretrained(path, **settings))
    drawn = {key[0] if isinstance(key, tuple) else key for key in [*info["missing_keys"], *info["mismatched_keys"]]}
    lacking = sorted(key for key in drawn if not key.startswith(unused))
    if lacking:
        raise UserError(
            f"path={path!r}: {len(lacking)} tensors are missing from the weights or of another size than config.json "
            f"says, such as {lacking[0]!r}; it should contain {expected}"
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _no_bar_for_little(path: str) -> Iterator[None]:
    """transformers shows a bar for the shortest of loadings, too."""
    from transformers.utils import logging

    folder = Path(path).expanduser()
    little = folder.is_dir() and sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < _LITTLE
    if not little or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How the tensors `given` do not fit a model's `own` by name and shape: the first fault, and how many more there
    are; "" where they fit."""
    faults = [f"{name} is missing" for name in own if name not in given]
    faults += [f"{name} has no place in the model" for name in given if name not in own]
    faults += [
        f"{name} is {list(given[name].shape)}, the model's is {list(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    return faults[0] + (f" and {len(faults) - 1} more" if len(faults) > 1 else "") if faults else ""


def model_name(path: str) -> str:
    """How a report names a model: its hub id, or the last part of a folder's path."""
    return Path(path).name if Path(path).expanduser().exists() else path


def token_width(path: str, subfolder: str, expected: str, key: str, published: int) -> int:
    """The width that a local folder's config.json states under `key`; for a hub id, the one `published` of the paper's
    weights, so that a model can be laid out with no network."""
    folder = resolve(path, subfolder, expected)
    if folder is None:
        return published
    config = json.loads((folder / "config.json").read_text())
    return config.get("text_config", config)[key]


def check_width(path: str, dim: int, found: int) -> None:
    """Raise `UserError` where loaded weights are not as wide as the model was laid out for."""
    if dim != found:
        raise UserError(f"dim={dim}: the weights of {path!r} are {found} wide; set dim to {found}")


def weights_config(path: str, subfolder: str = "") -> dict[str, Any] | None:
    """The config.json of a local folder without what says where it was saved from; None for a hub id."""
    file = Path(path).expanduser() / subfolder / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text())
    config.pop("_name_or_path", None)
    return config


def weights_identity(path: str, subfolder: str = "") -> dict[str, Any]:
    """What tells two sets of weights apart: config, and names and hashes of the weight files. Where they lie is no part
    of it, so a folder may move. For a hub id, or a path that is not there yet, the path alone."""
    config = weights_config(path, subfolder)
    if config is None:
        return {"path": path, "subfolder": subfolder}
    files = sorted((Path(path).expanduser() / subfolder).glob("*.safetensors"))
    return {"config": config, "files": [[file.name, content_hash(file)] for file in files]}
