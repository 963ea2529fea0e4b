"""The features cache of a run: stores by encoder and by what it was given, so that only what changed is encoded anew.

    root/latents-<hash>/       the codec on clips        for each size of clip (frames, height, width)
    root/references-<hash>/    the codec on pictures     for each number of references
    root/text-<hash>/          the text encoder
    root/vlm-<hash>/           the VLM                   for each number of references

The hash is of the encoder's fingerprint and of that input (`fingerprint.json` in the folder). A run without the VLM,
with other buckets or with another text encoder thus takes from the folder whatever it shares with the runs before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from idc.data.features import FeatureStore
from idc.types import Bucket

FORMAT = 2  # of the stores: another is another store

# The input of each part besides the sample itself (which is in the key), or None where there is nothing to encode.
_INPUTS: dict[str, Callable[[Bucket, int], dict[str, Any] | None]] = {
    "latents": lambda b, area: {"clip": [b.frames, b.height, b.width], "window": "first frames, centre crop"},
    "references": lambda b, area: {"references": b.subjects, "area": area} if b.subjects else None,
    "text": lambda b, area: {},
    "vlm": lambda b, area: {"references": b.subjects, "area": area if b.subjects else 0},
}


class FeatureCache:
    """The stores that one run reads, opened as its buckets ask for them.

    Args:
        root: folder of all stores; runs may share it, also at the same time.
        encoders: part ("latents", "references", "text", "vlm") -> fingerprint of its encoder. Parts that are not named
            are neither looked for nor read.
        reference_area: cap of a reference's area in pixels.

    Raises:
        KeyError: a part of another name.
    """

    def __init__(self, root: str | Path, encoders: Mapping[str, Any], reference_area: int = 0) -> None:
        self.root, self.encoders, self.reference_area = Path(root), dict(encoders), reference_area
        self._inputs = {part: _INPUTS[part] for part in encoders}
        self._opened: dict[tuple[str, str], FeatureStore] = {}  # by part and input: buckets share stores
        self._stores: dict[Bucket, dict[str, FeatureStore]] = {}

    def stores(self, bucket: Bucket) -> dict[str, FeatureStore]:
        """The store of each part for samples of this bucket."""
        if bucket not in self._stores:
            found = {}
            for part, given in self._inputs.items():
                if (inputs := given(bucket, self.reference_area)) is not None:
                    found[part] = self._open(part, inputs)
            self._stores[bucket] = found
        return self._stores[bucket]

    def _open(self, part: str, inputs: dict[str, Any]) -> FeatureStore:
        known = part, json.dumps(inputs)
        if known not in self._opened:
            fingerprint = {"encoder": self.encoders[part], "format": FORMAT, "input": inputs}
            self._opened[known] = FeatureStore(self.root, fingerprint, part)
        return self._opened[known]

    def missing(self, bucket: Bucket, key: str) -> tuple[str, ...]:
        """The parts of a sample that are still to be encoded."""
        return tuple([part for part, store in self.stores(bucket).items() if key not in store])

    def read(self, bucket: Bucket, key: str) -> dict[str, Tensor]:
        """All features of a sample, by name.

        Raises:
            KeyError: a part of it is not there.
        """
        features: dict[str, Tensor] = {}
        for store in self.stores(bucket).values():
            features.update(store.read(key))
        return features

    def write(self, bucket: Bucket, features: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Store key -> part -> name -> tensor, a chunk a part."""
        for part, store in self.stores(bucket).items():
            if chunk := {key: parts[part] for key, parts in features.items() if part in parts}:
                store.write(chunk)

    def refresh(self) -> None:
        """See what others have written since."""
        for store in self._opened.values():
            store.refresh()

    def unused(self) -> dict[Path, int]:
        """The other folders of features under the root (of other encoders, sizes or versions), with their bytes."""
        return dict(self._unused())

    def _unused(self) -> Iterator[tuple[Path, int]]:
        used = {store.path for store in self._opened.values()}
        for record in sorted(self.root.glob("*/fingerprint.json")):
            if record.parent not in used:
                try:
                    yield record.parent, sum(path.stat().st_size for path in record.parent.iterdir())
                except FileNotFoundError:
                    continue  # somebody is deleting it
