"""What makes a model's answer a caption: markdown and small talk off, and rules for what is no caption.

Pure functions over text. The rules are made for models that answer badly: they loop, refuse, answer in another
language or never stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from idc.errors import UserError, nearest

LANGUAGES = ("en", "any")
NGRAM = 4  # words: shorter ones come back in good prose
MOST_REPEATED = 0.35  # share of a text's runs of `NGRAM` words that have come before; good captions stay below 0.1
MOST_IN_A_ROW = 4  # times the same word
FEWEST_ENGLISH = 0.12  # share of function words; English prose has 0.3 to 0.5, other languages hardly any of these
FEWEST_LATIN = 0.9  # share of Latin letters

# Scripts that write no spaces: a sign is a word.
_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:['’\-][^\W_{_HAN}]+)*")
_SIGN = re.compile(f"[{_HAN}]")
_SENTENCE_END = re.compile(r"[.!?](?=[\"'”’)\]]*(?:\s|$))[\"'”’)\]]*|[。！？]")
_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "with",
        "and",
        "or",
        "by",
        "for",
        "from",
        "as",
        "is",
        "are",
        "was",
        "be",
        "his",
        "her",
        "their",
        "its",
        "he",
        "she",
        "they",
        "it",
        "that",
        "this",
        "which",
        "while",
        "who",
        "into",
        "over",
        "under",
        "near",
        "then",
        "there",
        "has",
        "have",
        "two",
        "one",
    ]
)

_FENCE = re.compile(r"```[\w-]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_LINK = re.compile(r"!?\[([^\[\]]{0,300})\]\([^()]{0,600}\)")
_LINE_START = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]*|[-*+•][ \t]+|\d{1,2}[.)][ \t]+|[-*_=]{3,}[ \t]*$)", re.MULTILINE
)
_MARKS = re.compile(r"\*{1,3}|_{2,3}|`+|~~")  # of emphasis
_PREAMBLE = re.compile(
    r"""^(?:(?:sure|certainly|of\ course|okay|ok|absolutely)(?:\ thing)?[!,.]\s*)?
        (?:(?:here(?:'s|’s|\ is)|below\ is|this\ is)\b[^\n.:]{0,80}\b(?:caption|description|text)\b[^\n.:]{0,60}:\s*)?
        (?:(?:(?:video|image|clip|detailed|final)\s+)?(?:caption|description|answer)\s*:\s*)?""",
    re.IGNORECASE | re.VERBOSE,
)
_REFUSAL = re.compile(
    r"""^(?:(?:i(?:'|’)?m|i\ am|we\ are)\s+(?:so\s+|very\s+|really\s+)?(?:sorry|afraid|unable|not\ able|not\ allowed)\b
        |sorry\b|apologies\b|my\ apologies\b|unfortunately,?\s+i\b
        |i\s+(?:can(?:not|\s?n?(?:'|’)?t)|could\s?n(?:o|'|’)t|do\ not|don(?:'|’)t|must\ decline|won(?:'|’)t|will\ not)\b
        |as\ an?\ (?:ai|artificial|large\ language|language|vision)\b
        |there\ (?:is|are)\ no\ (?:video|image|picture|frame)s?\b
        |(?:no|the)\ (?:video|image|picture|frame)s?\ (?:was|were|is|are|has|have)\ (?:not\ )?(?:been\ )?provided\b)""",
    re.IGNORECASE | re.VERBOSE,
)


class CaptionError(Exception):
    """A text that breaks a rule.

    Attributes:
        reason: without numbers, to be counted.
        detail: the value and the rule.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def check_language(language: str) -> None:
    """Raise `UserError` for a language that has no rule."""
    if language not in LANGUAGES:
        raise UserError(f"language={language!r}: there is no rule for it{nearest(language, LANGUAGES)}")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; of scripts without spaces each sign is one.

    >>> words_of("A well-lit room. 猫が")
    ['a', 'well-lit', 'room', '猫', 'が']
    """
    return [word.lower() for word in _WORD.findall(text)]


def whole_words(phrase: str) -> re.Pattern[str]:
    """Finds a phrase in a text, in either case, over any white space, and never as a part of a longer word.

    >>> bool(whole_words("red  coat").search("A Red\ncoat.")), bool(whole_words("red").search("A redhead."))
    (True, False)
    """
    inner = r"\s+".join(map(re.escape, phrase.split()))
    left = "" if _SIGN.match(phrase.strip()[:1]) else r"(?<!\w)"
    right = "" if _SIGN.match(phrase.strip()[-1:]) else r"(?!\w)"
    return re.compile(f"{left}{inner}{right}", re.IGNORECASE)


def plain_text(answer: str) -> str:
    """A model's answer as one paragraph of plain text: without markdown, code fences, a preamble ("Sure! Here is the
    caption:"), quotation marks around the whole, control characters and runs of white space.

    >>> plain_text('Sure! Here is the caption:\\n\\n**A man** walks.\\n- He carries `a cup`.')
    'A man walks. He carries a cup.'
    """
    text = unicodedata.normalize("NFC", answer).replace("\r\n", "\n")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn"))
    text = _FENCE.sub(r"\1", text)
    text = _LINK.sub(r"\1", text)
    text = _LINE_START.sub("", text)
    for _ in range(2):  # emphasis within emphasis
        text = without_emphasis(text)
    text = _PREAMBLE.sub("", text.strip(), count=1)
    text = " ".join(text.split())
    for left, right in ('""', "''", "“”", "‘’"):
        if len(text) > 1 and text[0] == left and text[-1] == right and not {left, right} & set(text[1:-1]):
            text = text[1:-1].strip()
    return text


def without_emphasis(text: str) -> str:
    """The text without pairs of equal marks that stand close to the words between them, such as ** and **; of a longer
    row of marks, as many as there is a partner for.

    One pass: a mark that has no partner behind it is not looked for again, so that time grows as the text does.
    """
    parts: list[str] = []
    alone: set[str] = set()
    done = place = 0
    while found := _MARKS.search(text, place):
        place = found.start() + 1
        shortest = 1 if found[0][0] in "*`" else 2
        for size in range(len(found[0]), shortest - 1, -1):
            mark, inner = found[0][:size], found.start() + size
            if mark in alone or not text[inner : inner + 1].strip():
                continue
            end = _partner(text, mark, inner + 1)
            if end < 0:
                alone.add(mark)
                continue
            parts += [text[done : found.start()], text[inner:end]]
            done = place = end + size
            break
    return "".join([*parts, text[done:]])


def _partner(text: str, mark: str, start: int) -> int:
    """Where a mark comes again from `start` on, right behind a word; -1 where it does not."""
    while (start := text.find(mark, start)) >= 0 and text[start - 1].isspace():
        start += 1
    return start


def repeated_share(words: Sequence[str]) -> float:
    """Which share of the runs of four words has come before, in [0, 1]; 0 for fewer than 8 words.

    >>> repeated_share("a b c d a b c d a b c d a b c d".split())  # 13 runs, 4 different ones
    0.6923076923076923
    """
    runs = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if len(words) >= 2 * NGRAM else 0.0


def longest_row(words: Sequence[str]) -> int:
    """How often a word follows itself, at most.

    >>> longest_row("no no no way".split())
    3
    """
    longest = row = 0
    before = None
    for word in words:
        row = row + 1 if word == before else 1
        longest, before = max(longest, row), word
    return longest


def cut_at_sentence(text: str, most_words: int, most_characters: int) -> str:
    """The longest beginning of whole sentences within both limits; "" where the first sentence is longer already."""
    end = 0
    for found in _SENTENCE_END.finditer(text):
        if found.end() > most_characters or len(words_of(text[: found.end()])) > most_words:
            break
        end = found.end()
    return text[:end]


def check_caption(text: str, least_words: int, language: str) -> None:
    """Raise `CaptionError` unless the plain text is a caption.

    Args:
        text: as `plain_text` gives it.
        language: "en": nearly all letters are Latin and, from 8 words on, some words are English function words;
            "any": no rule.
    """
    words = words_of(text)
    if not words:
        raise CaptionError("no caption", "the answer is empty" if not text else "the answer has no words")
    if _REFUSAL.match(text):
        raise CaptionError("caption refused", text[:120])
    row, share = longest_row(words), repeated_share(words)
    if row > MOST_IN_A_ROW or share > MOST_REPEATED:
        detail = f"a word {row} times in a row, {share:.2f} of the text said before (at most {MOST_REPEATED})"
        raise CaptionError("caption repeats itself", detail)
    if language == "en":
        _check_english(text, words)
    if len(words) < least_words:
        raise CaptionError("caption too short", f"{len(words)} words, at least {least_words}")


def _check_english(text: str, words: Sequence[str]) -> None:
    letters = [c for c in text if c.isalpha()]
    latin = sum("LATIN" in unicodedata.name(c, "") for c in letters) / max(1, len(letters))
    if latin < FEWEST_LATIN:
        raise CaptionError("caption in another language", f"{latin:.2f} of the letters are Latin, not {FEWEST_LATIN}")
    english = sum(word in _FUNCTION_WORDS for word in words) / len(words)
    if len(words) >= 8 and english < FEWEST_ENGLISH:
        detail = f"{english:.2f} of the words are English function words, not {FEWEST_ENGLISH}"
        raise CaptionError("caption in another language", detail)
