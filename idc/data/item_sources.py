"""Where items to generate or edit come from: a benchmark, a file, one prompt, or the samples of shards."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from idc.data import storage
from idc.data.benchmark import KINDS, Item, check_unique, file_name, read_benchmark, read_items
from idc.data.index import Entry
from idc.data.scan import VIDEO_EXTS
from idc.data.sources import Source
from idc.errors import UserError, nearest

Failures = dict[str, str]  # reason by the item's id


class ItemSource(ABC):
    """Names the items of a run."""

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to make
        """Make what is missing on disk; called once a node."""

    @abstractmethod
    def items(self, folder: Path, replace: bool = False) -> tuple[list[Item], Failures]:
        """The items in order, and those among them that are known to fail, with the reason.

        Args:
            folder: of the videos; pictures that are no files yet are written under it.
            replace: write them over others of the same name.

        Raises:
            UserError: where nothing can be made of the source, or other pictures are in the way.
        """


@dataclass
class Benchmark(ItemSource):
    """OpenS2V-Eval's JSON file.

    Attributes:
        path: the file. root: what its pictures are relative to; the file's folder by default.
        categories: only these, such as [singlehuman, singleface]; all by default.
        limit: only the first so many.
    """

    path: str
    root: str | None = None
    categories: list[str] | None = None
    limit: int | None = None

    def items(self, folder: Path, replace: bool = False) -> tuple[list[Item], Failures]:
        items = read_benchmark(self.path, self.root)
        known = {item.category for item in items}
        for category in self.categories or ():
            if category not in known:
                raise UserError(f"{self.path}: no item of category {category!r}{nearest(category, known)}")
        if self.categories is not None:
            items = [item for item in items if item.category in self.categories]
        check_unique(items, self.path)
        return _limited(items, self.limit), {}


@dataclass
class ItemFile(ItemSource):
    """A file of JSON lines, one {"id", "prompt", "references", ...} each (`idc.data.benchmark.read_items`)."""

    path: str
    limit: int | None = None

    def items(self, folder: Path, replace: bool = False) -> tuple[list[Item], Failures]:
        return _limited(read_items(self.path), self.limit), {}


@dataclass
class Prompt(ItemSource):
    """One video, given in words and picture files (and, for an edit, a clip and perhaps a mask)."""

    prompt: str
    references: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    id: str = "video"
    source: str | None = None
    mask: str | None = None

    def items(self, folder: Path, replace: bool = False) -> tuple[list[Item], Failures]:
        item = Item(
            id=self.id,
            prompt=self.prompt,
            references=tuple(map(Path, self.references)),
            labels=tuple(self.labels),
            kinds=tuple(self.kinds),
            source=None if self.source is None else Path(self.source),
            mask=None if self.mask is None else Path(self.mask),
        )
        return [item], {}


@dataclass
class Shards(ItemSource):
    """The samples of shards: caption and references of each; the references become PNG files beside the videos.

    Attributes:
        shards: for example `idc.data.sources.ToyShards`, or `ShardSource` with part: held_out.
        limit: only the first so many.
        edit: make an edit of each sample's clip, towards the caption and the references of the next sample.
    """

    shards: Source
    limit: int | None = None
    edit: bool = False

    def prepare(self) -> None:
        self.shards.prepare()

    def items(self, folder: Path, replace: bool = False) -> tuple[list[Item], Failures]:
        index = self.shards.index()
        entries = _limited(list(index.entries), self.limit)
        names = [entry.key for entry in entries]
        if len({name.lower() for name in names}) < len(names):  # keys are unique within a shard alone
            names = [f"{entry.shard.removesuffix('.tar')}_{entry.key}" for entry in entries]
        items, failures = [], {}
        for number, (name, entry) in enumerate(zip(map(file_name, names), entries, strict=True)):
            shown = entries[(number + 1) % len(entries)] if self.edit else entry
            item, problem = self._item(index.root, name, shown, entry, folder, replace)
            items.append(item)
            if problem:
                failures[name] = problem
        check_unique(items, str(self.shards.path))
        return items, failures

    def _item(self, root: str, name: str, shown: Entry, own: Entry, folder: Path, replace: bool) -> tuple[Item, str]:
        """The item, and why it fails if it does."""
        from idc.data.shards import SampleError, read_members, read_sample

        clip, suffix = b"", ""
        try:
            sample = read_sample(root, shown, decode_video=False)
            if self.edit:
                files = read_members(root, own)
                suffix = next((ext for ext in VIDEO_EXTS if ext in files), "")
                clip = files.get(suffix, b"")
        except SampleError as error:
            return Item(id=name, prompt=""), str(error)
        pictures = tuple(
            _write(_png(subject.image_CHW), folder / "references" / f"{name}_{k}.png", replace)
            for k, subject in enumerate(sample.subjects)
        )
        source = _write(clip, folder / "sources" / f"{name}.{suffix}", replace) if clip else None
        toy = "toy" in sample.meta
        known = sample.meta.get("kinds")
        told = [known.get(subject.name) if isinstance(known, dict) else None for subject in sample.subjects]
        kinds = tuple(kind if kind in KINDS else "object" for kind in told) if any(told) else ()
        item = Item(
            id=name,
            prompt=sample.caption,
            references=pictures,
            labels=tuple(subject.name for subject in sample.subjects),
            kinds=("object",) * len(pictures) if toy else kinds,
            category={1: "single", 2: "two", 3: "three"}.get(len(pictures), "")
            if toy
            else str(sample.meta.get("category", "")),
            meta={"toy": sample.meta["toy"]} if toy else {},
            source=source,
        )
        return item, "missing member: no clip to edit" if self.edit and source is None else ""


def _limited(items: list[Any], limit: int | None) -> list[Any]:
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: must be 1 or more, or null for all")
    return items[:limit]


def _png(image_CHW: Tensor) -> bytes:
    from PIL import Image

    pixels = ((image_CHW + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _write(data: bytes, path: Path, replace: bool) -> Path:
    """Write a file that videos are made from; it must not change under videos that are there."""
    if path.is_file():
        if path.read_bytes() == data:
            return path
        if not replace:
            raise UserError(
                f"{path}: another file of that name is there, from an earlier run with other items; give another "
                "folder, or set model.init_args.existing=replace"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.open_atomic(str(path)) as stream:
        stream.write(data)
    return path
