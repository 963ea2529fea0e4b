"""A store of encoder outputs: a folder named after a fingerprint, with chunks of samples in safetensors.

    root/<label>-<hash>/fingerprint.json    what the features depend on besides the samples
    root/<label>-<hash>/<chunk>.safetensors tensors "<number in chunk>/<name>", any dtype and shape
    root/<label>-<hash>/<chunk>.json        {"ids": [...], "bytes": size of the tensors' file}: written last

A chunk counts once its .json is there and its tensors' file has the size that the .json says.

A key is made of a sample's id and content (`feature_key`), so data that changed under the same name is encoded anew.
Cached latents are of ONE window of each clip (the first frames, centre crop), so training on a cache sees no other
windows or crops of longer clips.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idc.data.plan import stable_hash
from idc.data.storage import open_atomic
from idc.errors import UserError

OPEN_CHUNKS = 128  # memory maps that a store keeps

_decode = json.JSONDecoder().raw_decode
_ENTRY = re.compile(r'[{,]"(\d+)/')  # the start of a key: a quote within one is escaped

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def feature_key(sample_id: str, sha256: str) -> str:
    """The key of a sample's features; the loader leaves `sha256` in `Sample.meta`."""
    return f"{sample_id}@{sha256[:16]}"


class FeatureStore:
    """Read and write the features of one fingerprint.

    Several processes may write at once, each its own chunks; the same chunk written twice is replaced by its equal.
    Opening the store again sees what others have written since.

    Args:
        root: folder of all stores.
        fingerprint: what the features depend on: encoder, sizes, window; any JSON value. Another value is another
            folder, so features of other encoders are never mixed up.
        label: first part of the folder's name.
    """

    def __init__(self, root: str | Path, fingerprint: Any, label: str = "features") -> None:
        self.fingerprint = fingerprint
        self.path = Path(root) / f"{label}-{stable_hash(fingerprint)}"
        self._place: dict[str, tuple[str, int]] = {}
        self._chunks: set[str] = set()
        self._warned: set[str] = set()
        self._handles: OrderedDict[str, _Chunk] = OrderedDict()
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def refresh(self) -> None:
        """Look for chunks that were completed since. A damaged one does not count; a warning names its file, once."""
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn

        damaged = {}
        for sidecar in sorted(self.path.glob("*.json")):
            if sidecar.name == "fingerprint.json" or sidecar.stem in self._chunks:
                continue
            ids, wrong = _check_chunk(sidecar)
            if wrong:
                damaged[sidecar.stem] = ids, wrong
                continue
            self._place.update({key: (sidecar.stem, number) for number, key in enumerate(ids)})
            self._chunks.add(sidecar.stem)
        for name, (ids, wrong) in damaged.items():
            # The samples of a damaged chunk may have come into others since; then it harms nobody.
            if name not in self._warned and (not ids or self.missing(ids)):
                rank_zero_warn(f"{self.path / name}.safetensors {wrong}: its samples are encoded again")
                self._warned.add(name)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those without features, in order."""
        return [key for key in ids if key not in self._place]

    def write(self, features: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store one chunk: key -> name -> tensor. Complete or absent after a kill. 256 samples a chunk are a good size.

        Raises:
            UserError: an empty chunk, a sample without tensors, or a tensor of an unusual dtype.
        """
        from safetensors.torch import save

        if not features or not all(features.values()):
            raise UserError("a chunk of features must hold at least one sample, and each sample at least one tensor")
        for label, tensor in (pair for tensors in features.values() for pair in tensors.items()):
            if tensor.dtype not in _DTYPES.values():
                raise UserError(f"{label} is {tensor.dtype}: features are {', '.join(map(str, _DTYPES.values()))}")
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "fingerprint.json").exists():
            _write(self.path / "fingerprint.json", json.dumps(self.fingerprint, indent=1, sort_keys=True).encode())
        ids = list(features)
        name = hashlib.blake2b("\n".join(ids).encode(), digest_size=8).hexdigest()
        tensors = {
            f"{number}/{label}": tensor.detach().to("cpu", copy=False).contiguous()
            for number, key in enumerate(ids)
            for label, tensor in features[key].items()
        }
        data = save(_without_aliases(tensors))
        _write(self.path / f"{name}.safetensors", data)
        _write(self.path / f"{name}.json", json.dumps({"ids": ids, "bytes": len(data)}).encode())
        self._handles.pop(name, None)
        self._place.update({key: (name, number) for number, key in enumerate(ids)})
        self._chunks.add(name)

    def read(self, key: str, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The features of a sample (all, or those named) as they were written.

        Raises:
            KeyError: unknown sample or name.
        """
        name, number = self._place[key]
        chunk = self._open(name)
        features = {}
        for start in chunk.entries[number]:
            stored, end = _decode(chunk.header, start)
            label = stored.split("/", 1)[1]
            if names is None or label in names:
                entry, _ = _decode(chunk.header, end + 1)
                first, last = entry["data_offsets"]
                features[label] = chunk.data[first:last].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
        if names is not None and len(features) < len(set(names)):
            raise KeyError(f"{key}: {sorted(set(names) - set(features))}")
        return features

    def _open(self, name: str) -> _Chunk:
        """The chunk, mapped into memory; a forked process goes on with the maps that it inherits."""
        if name in self._handles:
            self._handles.move_to_end(name)
            return self._handles[name]
        self._handles[name] = _Chunk.map(self.path / f"{name}.safetensors")
        if len(self._handles) > OPEN_CHUNKS:
            self._handles.popitem(last=False)
        return self._handles[name]


class _Chunk(NamedTuple):
    """A safetensors file mapped into memory; tensors are views of `data`.

    `safetensors.safe_open` does the same at several times the cost for each tensor, which with nine small ones a sample
    was most of the time that training waited for data. The header is parsed entry by entry, when a sample is read: at
    once it would take longer than the reading, where a run draws from more chunks than it keeps open.

    Attributes:
        data: the bytes after the header; private, so that writing into a tensor leaves the file alone.
        header: JSON, `{"<number>/<name>": {"dtype": ..., "shape": ..., "data_offsets": ...}, ...}`.
        entries: by number, where in the header its entries start.
    """

    data: Tensor
    header: str
    entries: dict[int, list[int]]

    @classmethod
    def map(cls, path: Path) -> _Chunk:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(size).decode()
            length = os.fstat(stream.fileno()).st_size
        entries: dict[int, list[int]] = {}
        for match in _ENTRY.finditer(header):
            entries.setdefault(int(match[1]), []).append(match.start() + 1)
        # Unlike NumPy's, this map keeps no file open: a run has several stores, each with many chunks.
        data = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)
        return cls(data[8 + size :], header, entries)


def _check_chunk(sidecar: Path) -> tuple[list[str], str]:
    """(keys, what is wrong with the chunk or an empty string), from the size alone: opening all would take long."""
    try:
        record = json.loads(sidecar.read_bytes())
        ids, expected = list(record["ids"]), record.get("bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], f"has an unreadable list of samples ({sidecar.name})"
    if expected is None:
        return ids, "is of a version that did not note its size"
    try:
        size = os.stat(sidecar.with_suffix(".safetensors")).st_size
    except OSError as error:
        return ids, f"cannot be read ({error.strerror})"
    return ids, "" if size == expected else f"has {size} bytes, {expected} when written"


def _write(path: Path, data: bytes) -> None:
    with open_atomic(str(path)) as stream:
        stream.write(data)


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies where several tensors share memory, which safetensors refuses."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensors[key] = tensor.clone()
        seen.add(pointer)
    return tensors
