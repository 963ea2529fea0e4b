"""Which of the four scenarios of figure S.9 a subject belongs to: Human, Objects, Environment or Nature.

The kind that curation found decides, except that an object or place that is a living thing or a landscape is Nature; a
subject of no known kind goes by the word that says what it is. The lists are short: what they lack is an object.
"""

from __future__ import annotations

import re

HUMAN, OBJECTS, ENVIRONMENT, NATURE = SCENARIOS = ("Human", "Objects", "Environment", "Nature")
_KINDS = {
    **dict.fromkeys(("person", "human", "face", "people"), HUMAN),
    **dict.fromkeys(("place", "background", "environment", "scene"), ENVIRONMENT),
    **dict.fromkeys(("clothing", "object"), OBJECTS),
}
_WORDS = {
    HUMAN: """actor actress adult artist athlete baby boy bride chef child children couple crowd dancer doctor driver
        face family farmer father female fisherman girl groom guy hand hands hiker human kid lady male man men model
        mother musician nurse officer people performer person player police scientist singer skier soldier speaker
        student surfer swimmer teacher teenager toddler woman women worker""",
    ENVIRONMENT: """alley apartment background bathroom bedroom bridge building city cityscape church corridor farm
        garden gym hall harbor highway hotel house interior kitchen lab laboratory landmark library living-room market
        museum office park pier place playground pool restaurant road roof room room scene school shop skyline stadium
        stage station store street studio temple tower town village wall window workshop""",
    NATURE: """animal bear beach bee bird butterfly canyon cat cattle chicken cliff cloud clouds coast coral cow creek
        deer desert dog dolphin duck eagle elephant field fire fish flower flowers forest fox frog glacier goat goose
        grass hill horse hummingbird iceberg insect island jellyfish jungle kitten lake landscape leaf leaves lion
        meadow monkey moon mountain mountains ocean owl panda parrot penguin plant puppy rabbit rain river rock rocks
        sand sea seal sheep sky snow snake squirrel star stars sun sunset tiger tree trees turtle valley volcano wave
        waves waterfall whale wolf zebra""",
}
_SCENARIO = {word: scenario for scenario, words in _WORDS.items() for word in words.split()}
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# What may follow the word that says what a subject is: "a man with a hat", "the dog on the left".
_ENDS = """
    at behind beside by from holding in near next of on over under wearing who whose with
"""
_STOP_WORDS = """
    a about above across after again against all along also am an and another any are around as at away be
    because been before behind being below beside between both but by can close could did do does down during
    each either few for from further had has have having he her here hers herself him himself his how i if in
    into is it its itself just left many may more most much near next no nor not of off on once one only onto or
    other our out over own right same several she should some such than that the their them then there these
    they this those three through to together too toward towards two under until up upon very video was we were
    what when where which while who whom whose why will with within without would you your
"""
_ENDS_SET, _STOP_SET = frozenset(_ENDS.split()), frozenset(_STOP_WORDS.split())


def head_noun(name: str) -> str:
    """The word that says what a subject is, in lower case: "a man in a red coat" -> "man"; "" where there is none.

    >>> head_noun("the Small brown dog on the left")
    'dog'
    """
    words = [word.lower() for word in _WORD.findall(name)]
    for place, word in enumerate(words):
        if place and word in _ENDS_SET:
            words = words[:place]
            break
    meant = [word for word in words if word not in _STOP_SET] or words
    return meant[-1] if meant else ""


def scenario(name: str, kind: str = "") -> str:
    """Human, Objects, Environment or Nature.

    >>> scenario("a dog", "object"), scenario("the chef"), scenario("a wide beach", "place")
    ('Nature', 'Human', 'Nature')
    """
    by_kind = _KINDS.get(kind.lower())
    by_word = _SCENARIO.get(head_noun(name), OBJECTS)
    if by_kind is None:
        return by_word
    # Beyond telling nature, words do not outdo what was seen: a known object called "a toy man" is no person.
    return NATURE if by_word == NATURE and by_kind != HUMAN and kind.lower() != "clothing" else by_kind


def content_words(text: str) -> list[str]:
    """The words of a text that carry meaning, in lower case."""
    found = (word.lower() for word in _WORD.findall(text))
    return [word for word in found if len(word) > 1 and word not in _STOP_SET]
