"""Reading JSON files of any size record by record: a list of records, a dict of records, or one record a line.

No more than a few records are held at once. What is malformed costs that record alone: reading goes on where the next
one begins, which its first fields tell.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from idc.curate.reaching import reaching
from idc.data import storage
from idc.errors import UserError

BLOCK = 1 << 20  # bytes read at a time
LARGEST = 1 << 26  # characters of one record; more are taken for a record that never ends
_SPACE = re.compile(r"[ \t\r\n]*")
_BEGINNING = 1 << 12  # characters that the beginning of a record takes at most


class Record(NamedTuple):
    """A record, or what stands in the place of one.

    Attributes:
        number: how many came before it in the file.
        key: its key in a dict of records, "" in a list and in lines.
        value: what it holds; None where it is malformed.
        at: byte of the (unpacked) file where the value begins.
        size: bytes of the value.
        crc: CRC-32 of these bytes.
        problem: why it cannot be read, "" where it can: one of a few phrases without numbers.
    """

    number: int
    key: str
    value: Any
    at: int
    size: int = 0
    crc: int = 0
    problem: str = ""


def is_packed(path: str) -> bool:
    """Whether a file is compressed, so that its bytes cannot be addressed."""
    return path.endswith(".gz")


def stream_records(
    path: str, first_fields: Sequence[str], block: int = BLOCK, largest: int = LARGEST
) -> Iterator[Record]:
    """The records of a .json or .jsonl file, or of one packed with gzip (.gz), in order.

    Args:
        path: file or fsspec URL.
        first_fields: names of which one comes first in a record: how the next record is found behind a malformed one.
            Nothing within a record may begin with them.
        block: bytes that are read at a time.
        largest: characters of the largest record; what is longer is malformed.

    Raises:
        UserError: if the file cannot be opened.
        UnreachedError: where it cannot be read any further now.
    """
    try:
        stream = storage.open_read(path)
    except Exception as error:  # every file system behind fsspec has its own
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    with stream:
        unpacked = gzip.GzipFile(fileobj=stream) if is_packed(path) else stream
        reader = _Reader(path, unpacked, block)
        lines = path.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        yield from _lines(reader, largest) if lines else _Document(reader, first_fields, largest).records()


class _Reader:
    """Text of a stream, of which all before `place` is done with, and the byte that the place is at.

    Bytes that are no UTF-8 become lone surrogates, so that text and bytes correspond.
    """

    def __init__(self, path: str, stream: IO[bytes] | gzip.GzipFile, block: int) -> None:
        self._path, self._stream, self._block = path, stream, block
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.place, self.at, self.ended, self.fault = "", 0, 0, False, ""
        self.more()
        if self.text.startswith("\ufeff"):
            self.advance_to(1)

    @property
    def left(self) -> int:
        """Characters that are read and not done with."""
        return len(self.text) - self.place

    def more(self) -> bool:
        """Read on; False at the end, or where the stream is damaged, which `fault` then says. Places change."""
        if self.ended:
            return False
        try:
            # As much again as there is, so that a long record is not parsed once for each of its blocks.
            with reaching(self._path, f"{self._path}: "):
                try:
                    data = self._stream.read(max(self._block, self.left))
                except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                    data, self.fault = b"", f"{type(error).__name__}: {error}"
        except OSError as error:
            data, self.fault = b"", f"{type(error).__name__}: {error}"
        self.ended = not data
        self.text = self.text[self.place :] + self._decode(data, final=self.ended)
        self.place = 0
        return not self.ended

    def advance_to(self, place: int) -> bytes:
        """Go on to a place, and return the bytes up to it."""
        data = self.text[self.place : place].encode("utf-8", "surrogateescape")
        self.place = place
        self.at += len(data)
        return data

    def next_character(self) -> str:
        """Go on to the next character that is no space, and return it; "" at the end."""
        while True:
            self.advance_to(_skip_space(self.text, self.place))
            if self.left or not self.more():
                return self.text[self.place : self.place + 1]


def _skip_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def plain_json(value: Any) -> Any:
    """What was read, with NaN and infinities, which are no JSON, as None.

    Raises:
        ValueError: for what cannot be written again: text that is no Unicode, and what is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except (UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return json.loads(text, parse_constant=lambda _: None) if "NaN" in text or "Infinity" in text else value


def _lines(reader: _Reader, largest: int) -> Iterator[Record]:
    number = 0
    while reader.left or reader.more():
        end = reader.text.find("\n", reader.place)
        if end < 0 and reader.left <= largest and reader.more():
            continue
        at = reader.at
        if end < 0 and not reader.ended:
            _skip_line(reader)
            yield Record(number, "", None, at, problem="record without an end")
        else:
            data = reader.advance_to(len(reader.text) if end < 0 else end + 1).rstrip()
            if not data.strip():
                continue
            value, problem = _parse(data)
            problem = "truncated file" if end < 0 and problem else problem
            yield Record(number, "", value, at, len(data), zlib.crc32(data), problem)
        number += 1
    if reader.fault:
        yield Record(number, "", None, reader.at, problem="damaged file")


def _skip_line(reader: _Reader) -> None:
    while (end := reader.text.find("\n", reader.place)) < 0:
        reader.advance_to(len(reader.text))
        if not reader.more():
            return
    reader.advance_to(end + 1)


def _parse(data: bytes) -> tuple[Any, str]:
    try:
        return json.loads(data), ""
    except (ValueError, RecursionError):
        return None, "malformed record"


class _Document:
    """A list or dict of records as one JSON document."""

    def __init__(self, reader: _Reader, first_fields: Sequence[str], largest: int) -> None:
        self._reader, self._largest = reader, largest
        self._scan = json.JSONDecoder().raw_decode
        self._keyed = reader.next_character() == "{"
        key = r'"(?:[^"\\]|\\.){0,1024}"\s*:\s*' if self._keyed else ""
        self._names = [json.dumps(name) for name in first_fields]
        fields = "|".join(map(re.escape, first_fields))
        self._begins = re.compile(rf'{key}[{{\[]\s*(?:\{{\s*)?"(?:{fields})"\s*:')
        self._number = 0

    def records(self) -> Iterator[Record]:
        reader = self._reader
        opening = reader.next_character()
        if not opening or opening not in "{[":
            yield self._broken("no list or dict of records" if opening else self._end_problem("empty file"))
            return
        reader.advance_to(reader.place + 1)
        closing = "}" if self._keyed else "]"
        problem = ""
        while character := reader.next_character():
            if character == ",":
                reader.advance_to(reader.place + 1)
                continue
            if character != closing:
                record = self._record()
            else:
                reader.advance_to(reader.place + 1)
                if not reader.next_character() and not reader.fault:
                    return
                record = self._skip(self._end_problem("more behind the end"))
            yield record
            problem = record.problem
            self._number += 1
        if not problem:  # else the end is part of what was told already
            yield self._broken(self._end_problem("truncated file"))

    def _record(self) -> Record:
        reader = self._reader
        while True:
            try:
                key, value, begin, end = self._item()
                # A number may go on in what was not read yet.
                if end < len(reader.text) or not reader.more():
                    break
            except (ValueError, RecursionError) as error:
                own = self._begins.match(reader.text, reader.place)
                following = self._begins.search(reader.text, own.end() if own else reader.place + 1)
                if following:
                    return self._broken_until(following.start(), "malformed record")
                if reader.left > self._largest:
                    return self._skip("record without an end", 1)
                if not reader.more():
                    reason = "truncated file" if _is_cut(error, reader.text.rstrip()) else "malformed record"
                    return self._broken_until(len(reader.text), self._end_problem(reason))
        swallowed = self._swallowed(end)
        if swallowed:
            return self._broken_until(swallowed, "malformed record")
        reader.advance_to(begin)
        at = reader.at
        data = reader.advance_to(end)
        if not _is_text(data):
            return Record(self._number, "", None, at, len(data), problem="malformed record")
        return Record(self._number, key, value, at, len(data), zlib.crc32(data))

    def _item(self) -> tuple[str, Any, int, int]:
        """(key, value, where the value begins and ends) of the record at the reader's place. Raises ValueError."""
        text, begin, key = self._reader.text, self._reader.place, ""
        if self._keyed:
            key, begin = self._scan(text, begin)
            begin = _skip_space(text, begin)
            if not isinstance(key, str) or text[begin : begin + 1] != ":":
                raise json.JSONDecodeError("no key with a colon", text, begin)
            begin = _skip_space(text, begin + 1)
        value, end = self._scan(text, begin)
        return key, value, begin, end

    def _swallowed(self, end: int) -> int:
        """Where another record begins within this one, for want of a bracket; 0 where none does."""
        text, place = self._reader.text, self._reader.place
        if sum(text.count(name, place, end) for name in self._names) < 2:  # nearly always, and quick to see
            return 0
        own = self._begins.match(text, place)
        following = self._begins.search(text, own.end(), end) if own else None
        return following.start() if following else 0

    def _broken_until(self, end: int, reason: str) -> Record:
        at, key = self._reader.at, self._own_key()
        self._reader.advance_to(end)
        return Record(self._number, key, None, at, self._reader.at - at, problem=reason)

    def _skip(self, problem: str, least: int = 0) -> Record:
        """Go to where the next record begins, at least so many characters on, or else to the end."""
        reader, at, key = self._reader, self._reader.at, self._own_key()
        while not (following := self._begins.search(reader.text, reader.place + least)):
            reader.advance_to(max(reader.place, len(reader.text) - _BEGINNING))
            if not reader.more():
                break
        reader.advance_to(following.start() if following else len(reader.text))
        return Record(self._number, key, None, at, reader.at - at, problem=problem)

    def _own_key(self) -> str:
        """The key of a malformed record, where that much is well."""
        try:
            key = self._scan(self._reader.text, self._reader.place)[0] if self._keyed else ""
        except (ValueError, RecursionError):
            return ""
        return key if isinstance(key, str) else ""

    def _broken(self, reason: str) -> Record:
        return Record(self._number, "", None, self._reader.at, problem=reason)

    def _end_problem(self, otherwise: str) -> str:
        return "damaged file" if self._reader.fault else otherwise


def _is_cut(error: Exception, text: str) -> bool:
    """Whether a record cannot be read because the text ends within it."""
    place = getattr(error, "pos", 0)
    # An escape, a number or a word that is cut short is an error at its beginning.
    return "Unterminated" in str(error) or place >= len(text) or (place > len(text) - 8 and text[-1] not in "}]")


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
