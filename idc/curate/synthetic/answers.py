"""Answers of hosted models on disk, by what was asked: none is paid for twice, a second run gives the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from idc.data.storage import is_url, open_atomic
from idc.errors import UserError


@dataclass(frozen=True)
class Answer:
    """What a model said to a request, once and for all.

    Attributes:
        picture: encoded; empty where there is none.
        reason, detail: why there is none: refused, or no picture in the answer.
        version: of the model, as the answer tells it.
    """

    picture: bytes = b""
    reason: str = ""
    detail: str = ""
    version: str = ""


class Answers:
    """A folder of answers, one file each, written whole or not at all. Processes and threads may share it.

    Raises:
        UserError: for a URL: locks need a folder of this machine or network.
    """

    def __init__(self, folder: str) -> None:
        if not folder or is_url(folder):
            raise UserError(f"store={folder!r}: must be a folder that all workers see, such as 'curated/answers'")
        self.folder = Path(folder).expanduser()

    def get(self, key: str) -> Answer | None:
        """What is kept under `key`; None for nothing, or for a file that is damaged."""
        try:
            head, _, picture = (self.folder / f"{key}.answer").read_bytes().partition(b"\n")
            fields = json.loads(head)
            if fields.pop("sha256") != hashlib.sha256(picture).hexdigest():
                return None
            return Answer(**fields, picture=picture)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        fields: dict[str, Any] = asdict(replace(answer, picture=b""))
        del fields["picture"]
        fields["sha256"] = hashlib.sha256(answer.picture).hexdigest()
        with open_atomic(str(self.folder / f"{key}.answer")) as stream:
            stream.write(json.dumps(fields, sort_keys=True).encode() + b"\n" + answer.picture)

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """No other process or thread asks the same meanwhile. The lock dies with its holder."""
        try:
            folder = self.folder / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            # Few files for any number of requests: two that share one merely wait for each other.
            stream = (folder / key[:3]).open("ab")
        except OSError as error:
            raise UserError(f"store={str(self.folder)!r}: cannot be written ({error.strerror})") from None
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def request_key(settings: dict[str, Any], prompt: str, pictures: Sequence[bytes], seed: int) -> str:
    """40 hex digits over all that an answer depends on; `pictures` are encoded."""
    digests = [hashlib.sha256(picture).hexdigest() for picture in pictures]
    text = json.dumps([settings, prompt, digests, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]
