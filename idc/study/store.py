"""Answers in SQLite: what is acknowledged is on disk, whatever happens to the process a moment later.

Write-ahead logging with full synchronisation; each call opens its own connection, so any number of threads and
processes may use one file (on a local disk: SQLite's locks do not hold over network file systems).
"""

from __future__ import annotations

import hashlib
import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from idc.errors import UserError
from idc.study.questions import CHOICES, Comparison, Load, Study, questionnaire

TOKEN = re.compile(r"[0-9a-f]{32}")
STALE_SECONDS = 2 * 3600  # a rater silent for so long no longer holds their unanswered questions
DAY_SECONDS = 24 * 3600
SCHEMA = """
CREATE TABLE IF NOT EXISTS raters (
    number INTEGER PRIMARY KEY,
    token TEXT NOT NULL UNIQUE,
    joined REAL NOT NULL,
    seen REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS questions (
    id TEXT PRIMARY KEY,
    rater INTEGER NOT NULL REFERENCES raters(number),
    position INTEGER NOT NULL,
    kind TEXT NOT NULL,
    item TEXT NOT NULL,
    left_system TEXT NOT NULL,
    right_system TEXT NOT NULL,
    left_file TEXT NOT NULL,
    right_file TEXT NOT NULL,
    repeats INTEGER NOT NULL,
    UNIQUE (rater, position)
);
CREATE TABLE IF NOT EXISTS answers (
    question TEXT NOT NULL REFERENCES questions(id),
    criterion TEXT NOT NULL,
    choice TEXT NOT NULL,
    revision INTEGER NOT NULL,
    seconds REAL NOT NULL,
    answered REAL NOT NULL,
    PRIMARY KEY (question, criterion)
);
"""


class BadRequestError(ValueError):
    """What came in breaks a rule; the message names it."""


class UnknownRaterError(LookupError):
    """No rater has this token."""


class FullError(RuntimeError):
    """The study takes no more raters."""


class Answer(NamedTuple):
    """One choice of one rater; `left` and `right` are systems ("" is a catch's corrupted video).

    `question` is unique; `position` and `repeats` count within the rater's questionnaire; `seconds` is the time that
    the page was looked at.
    """

    rater: int
    question: str
    position: int
    kind: str
    item: str
    left: str
    right: str
    repeats: int
    criterion: str
    choice: str
    seconds: float


class Store:
    """The answers of one study.

    Args:
        path: the database; made if it is not there.
        max_raters: how many may join.
        clock: seconds since the epoch.

    Raises:
        UserError: if the file is no database or cannot be written.
    """

    def __init__(
        self, path: Path, study: Study, max_raters: int = 10_000, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.study, self.max_raters, self.clock = path, study, max_raters, clock
        # Held open and idle: whenever the last connection closes, SQLite moves the whole log into the database.
        try:
            self._held = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._held.execute("PRAGMA journal_mode=WAL")
            self._held.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used as the database of answers ({error})") from error

    def close(self) -> None:
        """Close the database; the answers are in one file then, if no other process has it open."""
        self._held.close()

    def join(self, token: str) -> None:
        """Give a new rater a questionnaire; nothing happens if the token has one.

        Args:
            token: 32 hexadecimal letters that the rater's browser drew at random.

        Raises:
            BadRequestError: for another token.
            FullError: if `max_raters` have joined.
        """
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise BadRequestError("rater: must be 32 hexadecimal letters")
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM raters WHERE token = ?", (token,)).fetchone():
                return
            number = db.execute("SELECT count(*) FROM raters").fetchone()[0]
            if number >= self.max_raters:
                raise FullError(f"the study has its {self.max_raters} raters")
            now = self.clock()
            questions = questionnaire(self.study, self._load(db, now), number)
            db.execute("INSERT INTO raters VALUES (?, ?, ?, ?)", (number, token, now, now))
            rows = [(_question_id(token, place), number, place, *q) for place, q in enumerate(questions)]
            db.executemany("INSERT INTO questions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def session(self, token: str) -> dict[str, Any]:
        """All that the rater's page shows, without a word on systems: questions in order, and the answers so far.

        Raises:
            UnknownRaterError: if nobody joined with this token.
        """
        with self._connect() as db:
            number = self._rater(db, token)
            rows = db.execute(
                "SELECT id, item, left_file, right_file FROM questions WHERE rater = ? ORDER BY position", (number,)
            ).fetchall()
            given = db.execute(
                "SELECT question, criterion, choice, revision FROM answers JOIN questions ON id = question"
                " WHERE rater = ?",
                (number,),
            ).fetchall()
        answers: dict[str, dict[str, Any]] = {}
        for question, criterion, choice, revision in given:
            entry = answers.setdefault(question, {"choices": {}, "revision": revision})
            entry["choices"][criterion] = choice
        return {"title": self.study.title, "questions": [self._shown(*row) for row in rows], "answers": answers}

    def record(
        self, token: str, question: str, choices: Mapping[str, str], revision: int = 1, seconds: float = 0.0
    ) -> None:
        """Store the answers to one question, all criteria or none.

        The same post again changes nothing; a later revision (the rater went back) replaces; an earlier one that
        arrives late is ignored.

        Raises:
            UnknownRaterError: if nobody joined with this token.
            BadRequestError: for a question that is not this rater's, or choices that do not fit it.
        """
        _check_numbers(revision, seconds)
        with self._transaction() as db:
            number = self._rater(db, token)
            row = db.execute(
                "SELECT item FROM questions WHERE id = ? AND rater = ?", (_text(question, "question"), number)
            ).fetchone()
            if row is None:
                raise BadRequestError("question: is not one of this rater's")
            self._check_choices(row[0], choices)
            now = self.clock()
            db.executemany(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (question, criterion) DO UPDATE SET"
                " choice = excluded.choice, revision = excluded.revision, seconds = excluded.seconds,"
                " answered = excluded.answered WHERE excluded.revision > revision",
                [(question, key, choice, revision, seconds, now) for key, choice in choices.items()],
            )
            db.execute("UPDATE raters SET seen = ? WHERE number = ?", (now, number))

    def answers(self) -> list[Answer]:
        """Every answer, by rater and position."""
        with self._connect() as db:
            rows = db.execute(
                "SELECT rater, id, position, kind, item, left_system, right_system, repeats, criterion, choice, seconds"
                " FROM answers JOIN questions ON id = question ORDER BY rater, position, criterion"
            ).fetchall()
        return [Answer(*row) for row in rows]

    def counts(self) -> tuple[int, int]:
        """How many joined, and how many of them answered every question."""
        with self._connect() as db:
            joined = db.execute("SELECT count(*) FROM raters").fetchone()[0]
            unfinished = db.execute(
                "SELECT count(DISTINCT rater) FROM questions"
                " WHERE NOT EXISTS (SELECT 1 FROM answers WHERE question = id)"
            ).fetchone()[0]
        return joined, joined - unfinished

    def _shown(self, question: str, item: str, left: str, right: str) -> dict[str, Any]:
        entry = self.study.items[item]
        return {
            "id": question,
            "prompt": entry["prompt"],
            "references": entry["references"],
            "videos": [
                dict(zip(("file", "width", "height"), (f, *self.study.sizes[f]), strict=True)) for f in (left, right)
            ],
            "criteria": [criterion._asdict() for criterion in self.study.criteria(item)],
        }

    def _check_choices(self, item: str, choices: Mapping[str, str]) -> None:
        wanted = [criterion.key for criterion in self.study.criteria(item)]
        if not isinstance(choices, Mapping) or set(choices) != set(wanted):
            raise BadRequestError(f"choices: must be an object with {', '.join(wanted)}")
        for choice in choices.values():
            if choice not in CHOICES:
                raise BadRequestError(f"choices: each must be one of {', '.join(CHOICES)}")

    def _load(self, db: sqlite3.Connection, now: float) -> Load:
        """What is answered, or held by raters who are still at it."""
        load = Load(Counter(), Counter())
        rows = db.execute(
            "SELECT item, left_system, right_system, count(*) FROM questions JOIN raters ON number = rater"
            " WHERE kind = 'compare' AND (seen > ? OR EXISTS (SELECT 1 FROM answers WHERE question = id))"
            " GROUP BY item, left_system, right_system",
            (now - STALE_SECONDS,),
        )
        order = {system: n for n, system in enumerate(self.study.systems)}
        for item, left, right, count in rows:
            comparison = Comparison(item, *sorted((left, right), key=order.__getitem__))
            load.asked[comparison] += count
            load.left[comparison, left] += count
        return load

    @staticmethod
    def _rater(db: sqlite3.Connection, token: Any) -> int:
        row = db.execute("SELECT number FROM raters WHERE token = ?", (_text(token, "rater"),)).fetchone()
        if row is None:
            raise UnknownRaterError("rater: nobody joined with this key")
        return row[0]

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        # Autocommit: transactions are begun by hand, so that their kind is ours.
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous=FULL")
            yield db
        finally:
            db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: it takes the lock at once, and commits unless something is raised."""
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _question_id(token: str, position: int) -> str:
    return hashlib.sha256(f"{token}/{position}".encode()).hexdigest()[:16]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRequestError(f"{name}: must be a string")
    if not value.isascii():  # no key holds any, and SQLite takes no half of a surrogate pair
        raise BadRequestError(f"{name}: must be plain letters")
    return value


def _check_numbers(revision: Any, seconds: Any) -> None:
    if type(revision) is not int or not 1 <= revision <= 1_000_000:
        raise BadRequestError("revision: must be an integer from 1 to 1000000")
    if type(seconds) not in (int, float) or not math.isfinite(seconds) or not 0 <= seconds <= DAY_SECONDS:
        raise BadRequestError(f"seconds: must be a number from 0 to {DAY_SECONDS}")
