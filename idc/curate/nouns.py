"""Things that a caption names, found without a model: noun phrases around a few hundred common nouns.

This is the plain fallback of `idc.curate.words`: it has no grammar. It knows what captions mostly talk of, takes the
modifiers before a noun ("a tall young woman") and what tells people apart behind it ("in a green coat", "with grey
hair"), and of nouns that it does not know only those that "a" or "an" introduces. What names several ("two dogs", "a
crowd") is left out, since a reference shows one. English only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NOUNS = {
    "person": """actor actress artist athlete ballerina baker barista bartender biker boxer boy boyfriend bride butcher
        chef child clown cook cowboy cyclist dancer doctor driver drummer elder farmer father female firefighter
        fisherman gardener gentleman girl girlfriend groom guitarist guy hiker host human infant baby jogger judge kid
        lady magician male man mechanic mother musician nurse officer painter performer person photographer pianist
        pilot player policeman policewoman presenter priest rider runner sailor scientist singer skateboarder skier
        snowboarder soldier speaker student surfer swimmer teacher teenager toddler violinist waiter waitress woman
        worker""",
    "animal": """alligator bear bee bird bull bunny butterfly calf camel cat cheetah chicken cow crab crocodile crow
        deer dog dolphin donkey duck eagle elephant fish flamingo fox frog giraffe goat goose gorilla hamster hawk hen
        hippo horse kangaroo kitten koala lamb leopard lion lizard monkey moose mouse ostrich otter owl panda parrot
        peacock penguin pig pigeon polar-bear pony puppy rabbit raccoon rat rhino rooster seal shark sheep sloth snail
        snake spider squirrel swan tiger toad turtle tortoise whale wolf zebra""",
    "clothing": """apron beanie blazer blouse boots cape cap cardigan cloak coat costume dress glasses gloves gown hat
        headscarf helmet hoodie jacket jeans jersey jumpsuit kimono necktie outfit pants poncho pullover robe sandals
        sari scarf shirt shoes shorts skirt sneakers socks suit sunglasses sweater sweatshirt swimsuit t-shirt tie
        top-hat trousers tunic turban tuxedo uniform vest""",
    "object": """accordion airplane apple armchair astronaut-suit axe backpack bag ball balloon banana banjo barrel
        basket basketball bed bench bicycle bike blanket boat book bottle bouquet bowl box bracelet bread broom bucket
        burger bus cabinet cake camera candle canoe car carriage cart cello chair chessboard clarinet clock coffin coin
        computer couch cradle crown cup curtain desk doll donut drone drum earring excavator fan fence flag flower
        flute football fork fountain frisbee guitar hammer handbag harp helicopter ice-cream kayak kettle keyboard kite
        knife ladder lamp lantern laptop lemon locomotive mask microphone microscope mirror monitor motorbike
        motorcycle mug necklace notebook orange oven pan paintbrush paddle parachute pear pen pencil phone piano pillow
        pipe pizza plane plant plate pot printer puppet pumpkin racket radio raft ribbon ring robot rocket rocking-chair
        rope rose rug sail sailboat sandwich saw saxophone scooter screen shell shelf shield ship skateboard sled
        smartphone snowboard snowman sofa spatula spear spoon statue stool stove stroller suitcase sunflower surfboard
        sword table tablet tank teacup teapot teddy-bear telescope television tent tomato toy tractor train tram tray
        tree trophy truck trumpet tuba turntable typewriter umbrella van vase vehicle violin wagon wheelbarrow
        wheelchair yacht""",
    "place": """airport alley arena auditorium backyard balcony bar bathroom beach bedroom bridge cafe canyon castle
        cathedral cave church city classroom cliff corridor courtyard desert factory farm field forest garage garden
        gym hall hallway harbor highway hill hospital hotel house jungle kitchen laboratory lake library living-room
        market meadow mountain museum ocean office park parking-lot pier playground plaza pool porch restaurant river
        road rooftop room school sea shop sidewalk square stadium stage station store street studio swamp temple
        theater town tunnel valley village warehouse waterfall workshop yard""",
}
KIND = {word: kind for kind, words in _NOUNS.items() for word in words.split()}
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "wolves": "wolf",
              "knives": "knife", "shelves": "shelf", "policemen": "policeman", "calves": "calf"}  # fmt: skip

_ONE = _words("a an one another this that each every the his her its their my our your")
_SEVERAL = _words("two three four five six seven eight nine ten several many few some both all various")
# What no noun phrase reaches over, in either direction.
_STOP = _SEVERAL | _words(
    """about above across after against along alongside amid among and around as at away back be because been before
    behind being below beneath beside besides between beyond both but by can could did do does down during for from
    front had has have having he her here hers him i if in inside into is it itself like near next no not now of off
    on onto or out outside over own past she so soon still such than that's their them themselves then there these
    they those through throughout to together toward towards under underneath until up upon very was we were what
    when where which while who whom whose why will with within without would you"""
)
_VERBS = _words(
    """adjusts approaches begins bites blows bounces breaks brings builds carries catches checks chases chews chops
    claps cleans climbs closes comes continues cooks covers crosses cuts dances digs dips dives draws drinks drives
    drops eats enters examines faces falls feeds fills flies flips floats follows gallops gazes gets gives glides goes
    grabs grazes greets hangs helps hits holds hops hugs hunts jumps keeps kicks kneels knits lands laughs lays leads
    leans leaps leaves lies lifts lights listens looks lowers makes measures moves nods observes opens paddles paints
    passes peels pets picks places plays points pours prepares presses pulls pushes puts raises reaches reads rests
    rides rises rolls rows rotates rubs runs sails says sees sets shakes shows sings sits skates sleeps slides smiles
    sniffs speaks spins splashes stands stares starts stays steps stirs stops strums stretches surfs sweeps swims
    swings takes talks tastes throws tosses touches travels tries turns types uses waits walks washes watches waters
    waves wears wipes works wraps writes"""
)
# Nouns that are no things to show a picture of.
_NO_THINGS = _words(
    """air angle area arm atmosphere background beard beam blur bit body bottom breeze breeze calm camera-angle center
    centre clip close-up cloud color colour conversation corner crowd couple day depth detail direction distance edge
    effect eye face few finger focus foreground frame glance glow gesture group hair hand haze head hint horizon hue
    image instant kind layer leg light line look lot manner middle mix moment mood mouth movement number one outdoor
    pace pair part pattern pause perspective picture piece portion pose position row scene sense series set shade
    shadow shot side silhouette sky slice smile soft sort sound space spot stack stretch style surface team texture
    time tone touch trail variety video view voice wall way while wide-angle wind"""
)
_DOERS = _words("people they we you i who to men women children")  # behind them, "park" and "fish" are no things
_NOT_BEFORE = _SEVERAL | _DOERS
_BARRIER = _ONE | _STOP | _VERBS | _DOERS
_BEHIND = frozenset(("in", "with", "wearing"))
_LOOKS = _words("hair beard mustache moustache ponytail braids tattoo freckles")
_TOKEN = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s]")
_LONGEST = 5  # words of a phrase before its noun, the noun included


class NounPhrase(NamedTuple):
    """Words of a caption that name one thing: `caption[start:end]` without article; `kind` is "person", "animal",
    "clothing", "object" or "place"."""

    text: str
    start: int
    end: int
    kind: str


class _Token(NamedTuple):
    word: str  # in lower case
    start: int
    end: int


def find_phrases(caption: str) -> list[NounPhrase]:
    """The things that an English caption names, in its order, none within another.

    >>> [tuple(p)[::3] for p in find_phrases("A man in a red coat walks two dogs past an astrolabe.")]
    [('man in a red coat', 'person'), ('astrolabe', 'object')]
    """
    tokens = [_Token(m[0].lower(), m.start(), m.end()) for m in _TOKEN.finditer(caption)]
    found: list[NounPhrase] = []
    covered = 0
    for first, last, kind in _spans(tokens):
        start, end = tokens[first].start, tokens[last].end
        if start >= covered:
            found.append(NounPhrase(caption[start:end], start, end, kind))
            covered = end
    return found


def _spans(tokens: Sequence[_Token]) -> Iterator[tuple[int, int, str]]:
    """(first token, last token, kind) of each phrase, by its noun's place."""
    for place, (word, *_) in enumerate(tokens):
        if (kind := KIND.get(word)) and not _goes_on(tokens, place):
            first = _first_modifier(tokens, place)
            if first > 0 and tokens[first - 1].word in _NOT_BEFORE:
                continue
            yield first, _last_of(tokens, place) if kind == "person" else place, kind
        elif word in ("a", "an") and (last := _unknown_noun(tokens, place)):
            yield place + 1, last, "object"


def _goes_on(tokens: Sequence[_Token], place: int) -> bool:
    """Whether the noun is but the beginning of another one: "coffee cup", "horse carts"."""
    if place + 1 >= len(tokens):
        return False
    following = tokens[place + 1].word
    return following in KIND or (singular(following) in KIND and following not in _VERBS)


def _first_modifier(tokens: Sequence[_Token], place: int) -> int:
    """Where the words before a noun that belong to it begin; the article is none of them."""
    first = place
    while first > 0 and place - first + 1 < _LONGEST:
        word = tokens[first - 1].word
        if word in _BARRIER or not word[0].isalnum():
            break
        if KIND.get(word) == "person" or (singular(word) in KIND and word not in KIND):
            break
        # "a smiling woman", but not "wearing hats" or "a man holding cups"; no adverbs
        if word.endswith("ing") and word not in KIND and not (first > 1 and tokens[first - 2].word in _ONE):
            break
        if word.endswith("ly"):
            break
        first -= 1
    return first


def _last_of(tokens: Sequence[_Token], place: int) -> int:
    """The last token of what tells a person apart behind the noun, or the noun's own place."""
    if place + 2 >= len(tokens) or tokens[place + 1].word not in _BEHIND:
        return place
    for last in range(place + 2, min(place + 2 + _LONGEST, len(tokens))):
        word = tokens[last].word
        if (KIND.get(word) == "clothing" or word in _LOOKS) and not _goes_on(tokens, last):
            return last
        if (word in _STOP and word not in _ONE) or word in _VERBS or not word[0].isalnum():
            return place
    return place


def _unknown_noun(tokens: Sequence[_Token], article: int) -> int:
    """Place of the noun that "a" or "an" introduces where no word up to it is known; 0 where there is none."""
    last = article
    for place in range(article + 1, min(article + _LONGEST, len(tokens))):
        word = tokens[place].word
        if word in KIND or word in _NO_THINGS:
            return 0
        verb = word in _VERBS or (word.endswith("s") and not word.endswith("ss"))  # behind "a", no plural
        ended = place > article + 1 and word.endswith(("ing", "ed", "ly"))
        if word in _STOP or word in _ONE or not word[0].isalpha() or verb or ended:
            break
        last = place
    return last if last > article and not tokens[last].word.endswith(("ing", "ed", "ly")) else 0


def singular(word: str) -> str:
    """The singular that a plural's spelling suggests, for looking it up."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("xes", "x"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + instead
    return word
