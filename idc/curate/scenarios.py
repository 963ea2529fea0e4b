"""Which of the four scenarios of figure S.9 a subject belongs to: Human, Objects, Environment or Nature.

The kind that curation found decides, except that an object or place that is a living thing or a landscape is Nature; a
subject of no known kind goes by the word that says what it is. What the lists of words lack is an object.
"""

from __future__ import annotations

import re

from idc.curate.nouns import KIND

HUMAN, OBJECTS, ENVIRONMENT, NATURE = SCENARIOS = ("Human", "Objects", "Environment", "Nature")
_KINDS = {
    **dict.fromkeys(("person", "human", "face"), HUMAN),
    **dict.fromkeys(("clothing", "object"), OBJECTS),
    **dict.fromkeys(("place", "background"), ENVIRONMENT),
    "animal": NATURE,
}
# Landscapes and plants, which the lists of nouns count as places and objects.
_GROWN = """beach blossom bush canyon cliff cloud clouds coast coral creek desert field fire flower flowers forest
    glacier grass hill iceberg island jungle lake leaf leaves meadow moon mountain mountains ocean plant rain river rock
    rocks rose sand sea sky snow star stars sun sunflower sunset swamp tree trees valley volcano water waterfall wave
    waves"""
_SCENARIO = {word: _KINDS[kind] for word, kind in KIND.items()} | dict.fromkeys(_GROWN.split(), NATURE)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# What may follow the word that says what a subject is: "a man with a hat", "the dog on the left".
_BEHIND = "at behind beside by from holding in near next of on over under wearing who whose with"
_EMPTY = """a about above across after again against all along also am an and another any are around as at away be
    because been before behind being below beside between both but by can close could did do does down during each
    either few for from further had has have having he her here hers herself him himself his how i if in into is it its
    itself just left many may more most much near next no nor not of off on once one only onto or other our out over own
    right same several she should some such than that the their them then there these they this those three through to
    together too toward towards two under until up upon very video was we were what when where which while who whom
    whose why will with within without would you your"""
_ENDS, _STOP = frozenset(_BEHIND.split()), frozenset(_EMPTY.split())


def head_noun(name: str) -> str:
    """The word that says what a subject is, in lower case: "a man in a red coat" -> "man"; "" where there is none.

    >>> head_noun("the Small brown dog on the left")
    'dog'
    """
    words = [word.lower() for word in _WORD.findall(name)]
    end = next((place for place, word in enumerate(words) if place and word in _ENDS), len(words))
    meant = [word for word in words[:end] if word not in _STOP] or words[:end]
    return meant[-1] if meant else ""


def scenario(name: str, kind: str = "") -> str:
    """Human, Objects, Environment or Nature, of a subject of this name and kind ("" or a strange one: not known).

    >>> scenario("a dog", "object"), scenario("the chef"), scenario("a wide beach", "place")
    ('Nature', 'Human', 'Nature')
    """
    by_kind = _KINDS.get(kind.lower())
    by_word = scenario_of_word(head_noun(name)) or OBJECTS
    if by_kind is None:
        return by_word
    # Beyond telling nature, words do not outdo what was seen: a known object called "a toy man" is no person.
    return NATURE if by_word == NATURE and by_kind != HUMAN and kind.lower() != "clothing" else by_kind


def scenario_of_word(word: str) -> str | None:
    """The scenario of a noun in lower case; None for a word that the lists lack, such as "young"."""
    return _SCENARIO.get(word)


def content_words(text: str) -> list[str]:
    """The words of a text that carry meaning, in lower case."""
    found = (word.lower() for word in _WORD.findall(text))
    return [word for word in found if len(word) > 1 and word not in _STOP]
