"""What hosted models cost: a ledger that processes share, and a limit that none of them crosses.

Each request is first reserved at its expected price and settled when its answer is there. What is never settled (the
process was killed, the server fell silent) stays counted: it may have been billed. So the total is an upper bound.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from idc.data.storage import open_atomic
from idc.errors import UserError


@dataclass
class Spending:
    """What was asked and paid for so far, over all processes and runs that share the ledger.

    Attributes:
        requests: sent, tries that failed among them.
        pictures: that came back.
        unsettled: requests whose outcome is not known; they count at the price that was expected.
        input_tokens, output_tokens: as the server reports them.
        cost: in the currency of the prices.
    """

    requests: int = 0
    pictures: int = 0
    unsettled: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def __str__(self) -> str:
        open_ends = f", {self.unsettled} of them with no known outcome" if self.unsettled else ""
        return f"{self.requests} requests{open_ends}, {self.pictures} pictures, cost {self.cost:.2f}"


@dataclass
class Ledger:
    """The file `spent.jsonl` in `folder`, one line a reservation or settlement, under a lock that dies with its holder.

    Beside it `spending.json` holds the sum for whoever wants to report it.
    """

    folder: Path
    _offset: int = 0
    _open: dict[str, float] = field(default_factory=dict)
    _sum: Spending = field(default_factory=Spending)
    _dearest: float = 0.0

    def reserve(self, price: float, most: float | None) -> str:
        """Note a request before it is sent; what `settle` wants. Where dearer ones were seen they are expected.

        Raises:
            UserError: where with it more than `most` might have been spent.
        """
        with self._locked() as stream:
            price = max(price, self._dearest)
            spent = self._sum.cost
            if most is not None and spent + price > most:
                raise UserError(
                    f"max_cost={most:g}: {self.spending()}; another request at up to {price:.4g} might exceed it. "
                    f"Raise max_cost to go on: what is paid for lies in {self.folder} and is not asked for again"
                )
            entry = secrets.token_hex(8)
            self._append(stream, {"id": entry, "reserved": price})
        return entry

    def settle(self, entry: str, cost: float, tokens: tuple[int, int] = (0, 0), pictures: int = 0) -> None:
        """What a reserved request did cost, its (input, output) tokens, and how many pictures it gave."""
        with self._locked() as stream:
            self._append(stream, {"id": entry, "cost": cost, "tokens": list(tokens), "pictures": pictures})
            with open_atomic(str(self.folder / "spending.json")) as summary:
                summary.write(json.dumps(asdict(self.spending()), indent=1).encode())

    def spending(self) -> Spending:
        """The sum over the ledger as far as this process has read it."""
        return Spending(**{**asdict(self._sum), "unsettled": len(self._open)})

    def read(self) -> Spending:
        """The sum over all of the ledger; of an empty one where there is none."""
        if (self.folder / "spent.jsonl").exists():
            with self._locked():
                pass
        return self.spending()

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The ledger alone to this thread, all that others wrote read."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = (self.folder / "spent.jsonl").open("a+b")
        except OSError as error:
            raise UserError(f"store={str(self.folder)!r}: cannot be written ({error.strerror})") from None
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(self._offset)
            self._take(stream.read())
            yield stream

    def _append(self, stream: IO[bytes], line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        # A machine that fell over in the middle of a line has left no end to it.
        if self._offset and os.pread(stream.fileno(), 1, self._offset - 1) != b"\n":
            data = b"\n" + data
        stream.write(data)
        stream.flush()
        self._take(data)

    def _take(self, data: bytes) -> None:
        self._offset += len(data)
        for text in data.splitlines():
            try:
                line = json.loads(text)
                entry, known = str(line["id"]), line.get("reserved")
            except (ValueError, KeyError, TypeError):  # half a line: the request was never sent
                continue
            if known is not None:
                self._open[entry] = known
                self._sum.requests += 1
                self._sum.cost += known
                continue
            self._sum.cost += line["cost"] - self._open.pop(entry, 0.0)
            self._sum.pictures += line["pictures"]
            self._sum.input_tokens += line["tokens"][0]
            self._sum.output_tokens += line["tokens"][1]
            self._dearest = max(self._dearest, line["cost"])
