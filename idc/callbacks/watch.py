"""A thread that sees whether its process makes progress, and ends all ranks, with their stacks on file, if it does not.

Ranks speak through files in a folder that all of them see, because a rank that hangs answers no collective. Whoever is
silent for too long asks all others, which look for such a request as often as at themselves. A process whose
interpreter does not even run this thread (native code that holds the lock) is dumped and ended by a timer in C.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
SLOWER = 5  # times as long as the longest interval yet is still no hang
_GRACE = 30.0  # seconds for other ranks to write their stacks, and for a save to end
_MARGIN = 60.0  # seconds that the timer in C leaves to this thread


class Watch:
    """Watches this process from `start` to `stop`.

    Args:
        folder: for `rank-N.txt`, the stacks of each rank; appended to.
        place: this rank and the number of ranks.
        run: a word that this start of the run has and no earlier one: older requests in the folder are not heeded.
        timeout: seconds without a `beat` that are a hang; more where this run has been seen to take longer.
        first_timeout: the same after a beat that says that the next one may take long.
        before_end: called before the process ends, with the seconds that it may take.
    """

    def __init__(
        self,
        folder: Path,
        place: tuple[int, int],
        run: str,
        timeout: float,
        first_timeout: float,
        before_end: Callable[[float], object] | None = None,
    ) -> None:
        self.folder, self.run = folder, run
        self.rank, self.world = place
        self.timeout, self.first_timeout = timeout, first_timeout
        self._before_end = before_end
        self._poll = min(10.0, max(0.05, timeout / 20))
        self._longest = 0.0
        self._last = time.monotonic(), "the start", True  # when, what, and whether the next beat may take long
        self._stopped = threading.Event()
        self._enabled = False
        self._stream: TextIO | None = None
        with contextlib.suppress(OSError):  # without a folder, stacks go to the log alone
            self._stream = self._path(self.rank).open("a")
        self._thread = threading.Thread(target=self._look, name="hang watchdog", daemon=True)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.txt"

    @property
    def request(self) -> Path:
        """The file by which a rank asks all others to dump and end."""
        return self.folder / f"request-{self.run}.json"

    @property
    def allowed(self) -> float:
        """Seconds that the present silence may last."""
        long = self._last[2]
        return max(self.first_timeout if long else self.timeout, SLOWER * self._longest)

    def start(self) -> Watch:
        """Begin to watch; the first beat may take long."""
        with contextlib.suppress(OSError):  # they have another run's name, and are heeded by nobody
            for old in (path for pattern in ("request-*", "dumped-*") for path in self.folder.glob(pattern)):
                if self.run not in old.name:
                    old.unlink(missing_ok=True)
        self._last = time.monotonic(), "the start", True
        self._thread.start()
        # torch's own timeout of a collective ends in SIGABRT. Whoever has asked for stacks elsewhere gets them there.
        if self._stream is not None and not faulthandler.is_enabled():
            faulthandler.enable(file=self._stream, all_threads=True)
            self._enabled = True
        return self

    def beat(self, what: str, long: bool = False) -> None:
        """There is progress.

        Args:
            what: ended just now; it is named if nothing else follows.
            long: the next beat may take long: compilation, loading, a last save.
        """
        now = time.monotonic()
        before, _, was_long = self._last
        if not was_long:
            self._longest = max(self._longest, now - before)
        self._last = now, what, long

    def stop(self) -> None:
        """Stop watching; to be called in another thread than this one."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._enabled:
            faulthandler.disable()
            self._enabled = False
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with contextlib.suppress(OSError):
                stream.close()
                if not self._path(self.rank).stat().st_size:
                    self._path(self.rank).unlink()
                self.folder.rmdir()  # unless there are stacks in it

    # The thread -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        try:
            while not self._stopped.wait(self._poll):
                if self._stream is not None:
                    faulthandler.dump_traceback_later(self.allowed + _MARGIN, exit=True, file=self._stream)
                silence = time.monotonic() - self._last[0]
                if silence > self.allowed:
                    self._ask(silence)
                    self._end()
                elif self._is_asked():
                    self._end()
        finally:  # the timer that nobody renews any more would end a healthy run
            faulthandler.cancel_dump_traceback_later()

    def _is_asked(self) -> bool:
        """Whether there is a request. Of a file system that does not answer now (ESTALE, EIO), the next look asks."""
        try:
            return self.request.exists()
        except OSError:
            return False

    def _ask(self, silence: float) -> None:
        own = self.folder / f"request-{self.run}.json.{self.rank}"
        with contextlib.suppress(OSError):  # without a folder, each rank ends by itself
            asked = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "after": self._last[1]}
            own.write_text(json.dumps({**asked, "seconds": round(silence)}))
            with contextlib.suppress(FileExistsError):  # the first to ask is the one that is named
                os.link(own, self.request)
            own.unlink()

    def _end(self) -> None:
        """Dump, wait for the others' dumps, and end the process, whatever its other threads wait for."""
        try:
            for step in (self._dump, self._wait_for_others, self._finish, self._say):
                with contextlib.suppress(Exception):  # where one fails, the saves are finished all the same
                    step()
        finally:
            os._exit(EXIT_STATUS)

    def _finish(self) -> None:
        if self._before_end is not None:
            self._before_end(_GRACE)

    def _say(self) -> None:
        print(f"idc: error: {self._message()}", file=sys.stderr, flush=True)
        sys.stdout.flush()

    def _message(self) -> str:
        try:
            asked = json.loads(self.request.read_text())
            who = f"rank {asked['rank']} ({asked['host']}, process {asked['pid']})"
            what = f"has ended nothing for {asked['seconds']} s, since {asked['after']}"
        except (OSError, ValueError, KeyError, TypeError):
            who, what = f"rank {self.rank}", f"has ended nothing for more than {self.allowed:.0f} s"
        return (
            f"a hang: {who} {what}; the stacks of all ranks are in {self.folder}. Rank {self.rank} ends with status "
            f"{EXIT_STATUS}; --ckpt_path auto goes on from the last checkpoint"
        )

    def _dump(self) -> None:
        now, silence = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic() - self._last[0]
        header = (
            f"\n{now} rank {self.rank} of {self.world} on {socket.gethostname()}, process {os.getpid()}: "
            f"{silence:.0f} s since {self._last[1]}\n"
        )
        for stream in (self._stream, sys.__stderr__):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.write(header)
                    stream.flush()
                    faulthandler.dump_traceback(file=stream, all_threads=True)
                    stream.flush()
        dump = threading.Thread(target=self._dump_collectives, daemon=True)
        dump.start()
        dump.join(10)  # it may wait for the very lock that NCCL hangs in
        with contextlib.suppress(OSError):
            (self.folder / f"dumped-{self.run}-{self.rank}").touch()

    def _dump_collectives(self) -> None:
        """The record of NCCL's last collectives, where there is one; torch's own analyser reads it."""
        c10d = getattr(torch._C, "_distributed_c10d", None)
        record = getattr(c10d, "_dump_nccl_trace", None)
        if record is not None and torch.cuda.is_initialized():
            with contextlib.suppress(Exception):
                (self.folder / f"nccl_trace_rank_{self.rank}").write_bytes(record())

    def _wait_for_others(self) -> None:
        """Until all have dumped: a launcher kills the others as soon as the first has ended."""
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                if len(list(self.folder.glob(f"dumped-{self.run}-*"))) >= self.world or not self.folder.is_dir():
                    return
            time.sleep(self._poll)
