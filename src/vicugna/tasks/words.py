"""The word bank: key names, made-up names and filler prose for retrieval; words and pseudowords."""

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

_SHORT_WORDS = _words("""
a about after again all also always and any are as ask at away back be because been before began
best better big both but by call came can come could day did do does done down each eat end even
every far few find first five for four from full gave get give go goes good had half hard has have
he hear help her here high him his how if in into is it just keep kind knew know land large last
late left less let life like line little live long look made make man many may men might mile mind
more most much must my name near need never new next night no not now of off often old on once one
only open or other our out over own page part place play put ran read right road room round run said
same saw say sea see seem set seven she show side since six small so some song soon sound stand
start still stop such sure take talk tell ten than that the their them then there these they thing
think this those though three time to today told too took top town tree try turn two under until up
upon us use very walk want was water way we week well went were what when where which while who why
will wind wish with wood word work world would year yes yet you young your""")
COMMON_WORDS = list(dict.fromkeys(
    [*_SHORT_WORDS, *ADJECTIVES, *NOUNS, *_WHO, *_MANNER, *_DID, *_WHAT]))

_ONSETS = _words("""
b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sl sm sn sp st str sw t th
tr tw v w wh z""")
_VOWELS = _words("a e i o u a e i o u ai ea ee ie oa oo ou")
_CODAS = ["", "", "", *_words("""
b ck d ft g l ld lt m mp n nd ng nk nt p r rd rm rt s ss st t th x y""")]

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


def pseudoword(rng: Random, letters: int) -> str:
    """A pronounceable word of so many letters (at least one), such as "brail" or "costrent"."""
    while True:
        word = ""
        while len(word) < letters:
            word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        if len(word) == letters or letters < 2:
            return word[:letters]
