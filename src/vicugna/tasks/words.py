"""The word bank: key names, made-up names and plain filler prose for the retrieval tasks."""

from itertools import accumulate, product
from random import Random

_words = str.split

ADJECTIVES = _words("""
amber ancient arctic azure bitter blank bold brass brave brick bright broken bronze calm carved
cedar civil clear clever coral cosmic crimson crystal curly daring dark deep desert dusty early
eager ebony elder empty fancy fierce final flat foggy frozen gentle giant gilded glass golden grand
gray green hidden hollow humble icy indigo iron ivory jade jolly keen lively lone lost lucky lunar
marble mellow misty modest narrow noble northern oaken olive opal pale patient pearl plain polar
proud purple quick quiet rapid rare royal ruby rustic sable scarlet secret silent silver solar
sturdy swift tawny velvet vivid warm wild""")
NOUNS = _words("""
acorn anchor anvil arrow badger banner barrel basin beacon beetle bison boulder bridge bucket
buffalo canyon castle cobra comet compass condor copper cricket dagger dolphin dragon drum eagle
ember engine falcon feather ferret fiddle finch flute forge fossil fountain gecko glacier goblet
hammer harbor harp hawk helmet heron hornet island jackal jaguar kettle kite ladder lantern leopard
lizard locket magnet mallet maple meadow meteor mirror monkey needle orchid otter owl panther
parrot pebble pelican pepper pigeon pillar piston planet prism python rabbit raven ribbon rocket
saddle salmon shield spider spruce temple thistle tiger trumpet tulip tunnel turtle valley violin
walrus""")
_WHO = _words("""
baker farmer teacher sailor doctor painter child neighbor singer driver tailor miller student guard
clerk cook nurse hunter judge pilot poet miner monk writer visitor stranger cousin uncle sister
brother""")
_MANNER = _words("""
old young tired happy busy lazy hungry careful tall kind shy cheerful sleepy polite""")
_DID = _words("""
carried found painted sold cleaned dropped wanted mended bought moved watched lifted forgot
borrowed washed opened noticed kept measured drew lost packed sketched covered""")
_WHAT = _words("""
basket table chair letter blanket window wagon ticket coat garden cup bottle picture book door lamp
rope boat clock shirt box plate pillow fence stove bread cake map bell hat""")
_WHERE = """by the river|near the mill|in the evening|after lunch|before the rain|at the market
|on the hill|behind the barn|in the morning|on a cold day|beside the road|under the tree
|during the fair|at the station|in the village|along the shore|after the storm|on the porch
|in the kitchen|near the school|at noon|last week|last winter|in early spring
""".replace("\n", "").split("|")
_SHORT = ("It rained.", "Dogs bark.", "Birds sang.", "Snow fell.", "The wind blew.",
          "We went home.")

_SYLLABLES = [c + v for c, v in product("bdfghjklmnprstvz", "aeiou")]
_PAIRS = [a + b for a, b in product(_SYLLABLES, _SYLLABLES)]


def filler(rng: Random, characters: int) -> list[str]:
    """Sentences which, joined by single spaces, come within about ten characters of a length.

    They hold no digit and no word of the needles' forms ("code", "Let", "=").
    """
    sentences: list[str] = []
    total = 0
    while total < characters:
        n = 1 + (characters - total) // 45
        banks = (_MANNER, _WHO, _DID, _WHAT, _WHERE)
        words = zip(*(rng.choices(bank, k=n) for bank in banks), strict=True)
        sentences += [f"The {a} {b} {c} the {d} {e}." for a, b, c, d, e in words]
        total = sum(map(len, sentences)) + len(sentences)
    ends = accumulate(len(sentence) + 1 for sentence in sentences)
    del sentences[sum(end <= characters for end in ends):]
    left = characters - sum(map(len, sentences)) - len(sentences)
    while fitting := [short for short in _SHORT if len(short) + 1 <= left]:
        short = rng.choice(fitting)
        sentences.insert(rng.randint(0, len(sentences)), short)
        left -= len(short) + 1
    return sentences


def name_syllables(wanted: int) -> int:
    """How many syllables made-up names need so that `wanted` of them leave half the space free."""
    return next(s for s in (2, 3, 4) if 80**s >= 2 * wanted or s == 4)


def made_up_names(rng: Random, n: int, syllables: int) -> list[str]:
    """`n` distinct names of 2, 3 or 4 syllables, such as "kora", "mipute"."""
    ends = {2: [""], 3: _SYLLABLES, 4: _PAIRS}[syllables]
    numbers = rng.sample(range(80**syllables), n)
    return [_PAIRS[i // len(ends)] + ends[i % len(ends)] for i in numbers]
