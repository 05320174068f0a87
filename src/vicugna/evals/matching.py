"""Whether a reply gives an expected answer: the scoring rule of a user's own items (docs/guide.md).

Both texts are normalised: NFKC, case folding, typographic signs as plain ones, the digits of any
script as 0-9, numbers as their exact values. Then the answer must be found in the reply, not inside
a longer word or number. An answer of one letter needs its case, and the whole reply or a cue.
Every expression is linear in the reply's length. Negation ("not Paris") is not understood.
"""

import re
import unicodedata
from fractions import Fraction

# Thai, Lao, Tibetan, Myanmar, Khmer, kana and Han are written without spaces, and Hangul joins
# particles to words: next to these characters there is no word boundary to check.
UNSPACED = ("\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff"
            "\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af")
WORD, LETTER = rf"[^\W{UNSPACED}]", rf"[^\W\d_{UNSPACED}]"
PLAIN = str.maketrans({
    **dict.fromkeys("‘’‚‛′ʼ´＇", "'"), **dict.fromkeys("“”„‟″«»", '"'), "⁄": "/", "∕": "/",
    **dict.fromkeys("‐‑‒–−﹣－", "-"), **dict.fromkeys("—―", " - "), "٫": ".", "٬": ",", "٪": "%",
    **dict.fromkeys("\u00ad\u200b\u200c\u200e\u200f\u2060\ufeff\ufe0e\ufe0f", None)})
EDGES = " .,;:!?¿¡\"'`*()[]{}。、「」『』"  # punctuation that does not matter around an answer
# Function words: an answer that is one of them but for a capital (US, WHO, May) needs the capital.
FUNCTION_WORDS = frozenset({
    "am", "an", "and", "as", "at", "be", "by", "can", "do", "go", "he", "if", "in", "is", "it",
    "may", "me", "my", "of", "on", "or", "so", "to", "up", "us", "we", "who", "will"})
UNITS = "$€£¥₹₩₽%‰"
UNIT_NAMES = "[kcmnμ]?m|[kmμ]?g|ml|[kmgt]i?b|[kmg]?hz|kwh?|ms|min|mph|am|pm"  # also without a space
OPEN, CLOSE = "\ue000", "\ue001"  # private characters around a number's value and unit

# A number, or what has numbers as parts (a date, a time, a range, 2+2), and the unit beside it.
COMPOUND = re.compile(
    rf"(?<!{WORD})(?<!{WORD}-)(?<!\d[.,:/^'_+*-])((?:(?<![)\]{UNITS}+-])[-+])?(?:[{UNITS}] ?)?-?)"
    rf"((?>\.?\d+(?:[.,:/^'_+*-]\d+|e[+-]?\d+)*))(?!{WORD})((?: ?[{UNITS}](?!\d))?)")
GROUPED = re.compile(r"[1-9]\d?\d?(?:(?:,\d\d\d?)*,\d{3}|(?:'\d{3})+|(?:_\d{3})+)(?:\.\d+)?")
GROUPED_BY_POINTS = re.compile(r"[1-9]\d?\d?(?:(?:\.\d{3}){2,}(?:,\d+)?|\.\d{3},\d+)")
NUMBER = re.compile(r"(?:0|[1-9]\d*)?(?:\.\d+)?(?:e[+-]?\d{1,3})?|\d+/\d+")

CHOICE = (rf"(?!(?i:[aeiouy]) +(?!(?:because|since|as|for|is|which)\b)\w)({LETTER})"
          rf"(?!{WORD}|[+#]|['.-]{WORD})")  # a letter that is no article, and not in C++ or I'm
CUES = re.compile(
    r"(?:\b(?i:answer|choose|chose|pick|select)(?:s|ed)?\b|答案|答え|正解|选择?|選択?|정답)"
    r"(?:[\s:=*_\"'`(\[{$>-]|\\boxed|\\text|(?i:is|was|be|the|letter|option|choice)\b"
    rf"|[是は为為은])*+{CHOICE}|(?:\b(?:is|was|be|es|ist|est)|'s|=|:|\b(?i:so|thus|therefore|say|with),?)"
    rf"[ *_\"'`(\[]*{CHOICE}[*_\"'`)\]]*(?:[.!?](?=\s)|[.!?]?$)"
    rf"|(?<!\w){CHOICE}(?= is (?:the )?(?:correct|right|best|answer))", re.MULTILINE)
MARKED = re.compile(
    rf"[(\[{{*\"'`]{CHOICE}[)\]}}*\"'`.:]|\b(?i:option|choice|letter) {CHOICE}"
    rf"|^[\s>#-]*{CHOICE}[.!]?[ \t]*$|\A[\s>#-]*{CHOICE}(?=[.):]| -|,? (?:because|since|as)\b)",
    re.MULTILINE)


def matches(answer: str, reply: str) -> bool:
    """Whether `reply` gives `answer`."""
    core = unicodedata.normalize("NFKC", answer.translate(PLAIN)).strip(EDGES)
    plain = unicodedata.normalize("NFKC", reply.translate(PLAIN)).strip()
    if re.fullmatch(LETTER, core):
        return core == _chosen_letter(plain)
    if re.fullmatch(r"[!-/:-@\[-`{-~]*", core):  # punctuation alone
        return answer.strip() in (reply.strip(), reply.strip(" \"'`*"))
    word = core.casefold()
    if word in FUNCTION_WORDS and core != word and plain.strip(EDGES).casefold() != word:
        reply = re.sub(rf"(?<!{WORD})(?i:{word})(?!{WORD})",
                       lambda m: m[0] if m[0] in (core, core.upper()) else "", reply)
    given, expected = normalise(reply), normalise(answer).rstrip(EDGES)
    if not re.match(rf"\.{LETTER}", expected):  # .NET
        expected = expected.lstrip(EDGES)
    # A unit that only one of the two states does not matter; another unit does.
    return (_found(expected, given) or _found(_without_units(expected), given)
            or _found(expected, _without_units(given)))


def normalise(text: str) -> str:
    """The form in which answers are sought in replies."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2", text)
    text = re.sub("[²³¹⁰-⁹]+", r"^\g<0>", text)
    text = re.sub(r"(?<=\d)(?:[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))| (?=000(?!\d)))", ",",
                  text)
    text = unicodedata.normalize("NFKC", text.translate(PLAIN)).casefold().replace("⁄", "/")
    text = re.sub(r"(?![0-9])\d", lambda m: str(unicodedata.decimal(m[0])), text)
    text = re.sub(rf"(?<!{WORD})(?:{LETTER}\.(?: (?={LETTER}\.))?)+{LETTER}\b\.?",
                  lambda m: re.sub("[. ]", "", m[0]), text)  # U.S., J. R. R.
    text = re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", "", text)  # emphasis
    text = re.sub(r"(?<=\d) ?[x×*·⋅] ?10\^(?=[+-]?\d)", "e", text)
    text = " ".join(re.sub("--+", " - ", text).split())
    text = re.sub(r"(?<=\d{4}) - (?=\d{4}(?!\d))", "-", text)  # 1914 – 1918
    text = re.sub(rf"(?<!{WORD})v(?=\d+\.\d)", "", text)  # v3.5
    text = re.sub(rf"(?<=\d) ?(?=°|(?:{UNIT_NAMES})(?!{WORD}))", " ", text)
    text = re.sub(r"(?<![\d.,/:])(\d{1,3}) (\d{1,3})/(\d{1,3})(?![\d/])", lambda m:
                  f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text)  # 2 1/2
    return COMPOUND.sub(_number, text)


def _number(match: re.Match[str]) -> str:
    """The exact value of a number and its unit; what is no single number stays as it is."""
    before, digits, after = match.groups()
    if GROUPED.fullmatch(digits):
        digits = re.sub("[,'_]", "", digits)
    elif GROUPED_BY_POINTS.fullmatch(digits):
        digits = digits.replace(".", "")
    digits = digits.replace(",", ".")
    if not NUMBER.fullmatch(digits):
        return match[0]
    try:
        value = Fraction(digits) * (-1 if "-" in before else 1)
        return f"{OPEN}{value}{f'{before}{after}'.strip('+- ')}{CLOSE}"
    except (ValueError, ZeroDivisionError):  # thousands of digits, 1/0
        return match[0]


def _without_units(text: str) -> str:
    return re.sub(rf"({OPEN}[-\d/]+)[{UNITS} ]+", r"\1", text)


def _chosen_letter(reply: str) -> str | None:
    """The letter that the last cue names or, without cues, the only one that is marked."""
    cued = ["".join(filter(None, groups)) for groups in CUES.findall(reply)]
    marked = {"".join(groups) for groups in MARKED.findall(reply)}
    return cued[-1] if cued else marked.pop() if len(marked) == 1 else None


def _found(answer: str, text: str) -> bool:
    """Whether `answer` stands in `text`, not inside a longer word or number."""
    for match in re.finditer(f"(?={re.escape(answer)}(.?.?))", text, re.DOTALL):
        before, after = text[max(match.start() - 2, 0):match.start()][::-1], match[1]
        if not (_continues(answer[0], before) or _continues(answer[-1], after)
                or re.match(rf"-{WORD}", before) or re.match(r"[+#](?!\w)|'t", after)):
            return True
    return False


def _continues(edge: str, outside: str) -> bool:
    """Whether the word or number that ends with `edge` continues in the characters beside it."""
    beside, beyond = outside[:1], outside[1:2]
    return beside == "\u200d" or (_in_word(edge) and _in_word(beside)) or (
        edge.isdigit() and beyond.isdigit() and beside in ".,:/^-")


def _in_word(character: str) -> bool:
    return bool(character) and not re.match(f"[{UNSPACED}]", character) and (
        character == "_" or unicodedata.category(character)[0] in "LNM")
