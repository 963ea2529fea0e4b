"""Text that no file can hold costs what it stands in, and never the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from idc.curate.candidate import Candidate, Dropped
from idc.curate.parts import Outcomes, Part, write_part
from idc.curate.records import drop_record, dumps, settle
from idc.models.judge_server import answer_text


@pytest.mark.parametrize("half", ["\ud83d", "a \udc80 b"])
def test_half_of_a_character_is_said_where_it_is_made_and_spelt_out_in_drops(half: str, tmp_path: Path) -> None:
    good = Candidate("k", "s", "v", "p", caption="A \U0001f600.")
    assert settle(good).caption == "A \U0001f600."
    for change in ({"caption": half}, {"meta": {half: 1}}, {"meta": {"a": [{"b": half}]}}, {"licence": half}):
        with pytest.raises(ValueError, match="half of a character"):
            settle(good.changed(**change))
    drop = Dropped("s", half, "k", "words", "no list", f"in the answer: {half}")
    path = tmp_path / "part.tar"
    with path.open("wb") as stream:
        write_part(stream, Outcomes([("s", "v")], drops=[drop]))
    (again,) = Part(str(path)).drops()
    assert again.detail == f"in the answer: {half}".encode("utf-8", "backslashreplace").decode()
    assert dumps(drop_record(again)) == dumps(drop_record(drop))


def test_an_answer_that_ends_within_an_emoji_is_an_answer() -> None:
    reply = {"choices": [{"finish_reason": "stop", "message": {"content": "A dog \U0001f600 runs \ud83d"}}]}
    with pytest.raises(UnicodeEncodeError):
        reply["choices"][0]["message"]["content"].encode()  # type: ignore[index]
    assert answer_text(reply, 99) == "A dog \U0001f600 runs ?"
