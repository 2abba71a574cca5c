"""Words of side in a text, and the text after its image is mirrored: "left upper" becomes "right upper".

In an image that is mirrored left-right, the patient's right lung looks like a left lung. So words for the patient's side change
as those for the image's do. A text that holds a side in a form that cannot be turned with certainty ("RML", "at 3 o'clock") has
no mirrored form: such a study must not be mirrored. Nor may one with words in a script whose words of side are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Optional

# Not \b: an underscore separates words here, as in "upper_left".
_BEGIN, _END = r"(?<![^\W_])", r"(?![^\W_])"
_SUFFIX = r"(?P<suffix>(?:-?(?:handed|hand|sided|side|most|wards?))?)"

_LEFT_RIGHT = {"left": "right", "\u5de6": "\u53f3"}
_UP_DOWN = {"upper": "lower", "uppermost": "lowermost", "top": "bottom", "above": "below"}
_UP_DOWN |= {"upward": "downward", "upwards": "downwards", "\u4e0a": "\u4e0b"}


def _both_ways(pairs: dict[str, str]) -> dict[str, str]:
    return {**pairs, **{second: first for first, second in pairs.items()}}


def _words(*words: str) -> str:
    return rf"{_BEGIN}(?:{'|'.join(words)}){_END}"


_SWAPS = {
    "left_right": (
        _both_ways(_LEFT_RIGHT),
        re.compile(rf"{_BEGIN}(?P<word>left|right){_SUFFIX}{_END}|(?P<sign>[\u5de6\u53f3])", re.I),
    ),
    "up_down": (
        _both_ways(_UP_DOWN),
        re.compile(
            rf"{_BEGIN}(?P<word>upper(?:most)?|lower(?:most)?|top|bottom|above|below|upwards?|downwards?)(?P<suffix>){_END}"
            "|(?P<sign>[\u4e0a\u4e0b])",
            re.I,
        ),
    ),
}
# What follows a verb, and no side: "has left the hilum", but "has left pleural effusion".
_OBJECT = r"(?:an?|the|this|that|these|those|its|his|her|their|no|some|any|only|it|them|him|nothing|little|much|behind)"
_HAS_LEFT = r"(?:has|have|had|having)(?:n['\u2019]t)?\s+(?:(?:not|never|already|also|since|now|just|only)\s+)?left"
_UNTOUCHED = (
    r"un(?!(?:treated|disturbed|repaired|resected)\b)\w+ed"  # of "left unopacified lung", or of "left unchanged"
)
_BE = r"(?:is|are|was|were|be|been|being)"
# "left" and "right" that are no sides.
_IDIOMS = {
    "left_right": re.compile(
        _words(
            *(r"all\s+right", r"right\s+(?:away|now|after|before|angles?)", r"right-angled", "\u5de6\u53f3"),
            r"left\s+(?:over|out|behind|alone|untreated|as\s+is|in\s+(?:place|situ))",
            rf"{_HAS_LEFT}\s+{_OBJECT}",
            rf"{_BE}\s+left\s+(?:open|intact|empty|un(?:treated|disturbed|repaired|resected))",
        ),
        re.I,
    ),
    "up_down": re.compile(
        _words(
            *(r"above\s+all", r"(?:the\s+)?above-?mentioned", r"(?:upper|lower)\s+limits?\s+of\s+normal"),
            r"lower\s+(?:density|densities|attenuation|signal|intensity|echogenicity|uptake|grade|dose|resolution)",
        ),
        re.I,
    ),
}
# Words before a "left" that is a side. Those of `_HAS_LEFT` make it a verb for certain.
_NO_VERB = (
    r"(?:the|upper|lower|far|mid|middle|cent(?:re|er)|more|and|or|on|to|at|in|from|towards?|his|her|its|their|has|have|had|having|not|never"
    r"|already|also|since|now|just|only)"
)
# "3 o'clock", "nine-o'clock", "oclock", "clockwise". A time of day or a ratio ("2:30 p.m.", "1:10", "24 h") is no position.
_HOUR = r"(?<![:.])(?:1[0-2]|[1-9])(?![:.]\d)"
_CLOCK = (
    r"(?:o|counter|anti)?clock\w*"
    r"|(?:1[0-2]|[1-9])(?::\d\d|\s?h|\s?hours?)[\s-]+(?:position|direction)"
    r"|(?:position|direction)\s+(?:at\s+|of\s+)?(?:1[0-2]|[1-9])(?::\d\d(?!\s*[ap]\.?m)|\s?h)"
    rf"|(?:the|at)\s+{_HOUR}[\s-]+(?:position|direction)"
    # With "at" before "10 h" it may be a position: better a study too few than a false side.
    rf"|(?:at|\u00e0)\s+{_HOUR}\s?h"
    # German, Dutch, French, Italian, Spanish, Portuguese, Scandinavian. "KL 3" is a grade.
    rf"|(?<!\bum\s){_HOUR}[\s-]?Uhr|op\s+{_HOUR}\s?uur|{_HOUR}[\s-]?uurs?[\s-]?(?:positie|richting)"
    rf"|[\u00e0a]\s+{_HOUR}\s?heures?|rayon\s+(?:de\s+)?{_HOUR}\s?h(?:eures?)?|ore\s+{_HOUR}|a\s+las?\s+{_HOUR}"
    rf"|[\u00e0a]s\s+{_HOUR}\s?h(?:oras?)?|kl\.\s?{_HOUR}"
)
# Not between borders of words: Chinese and Japanese have none. And scripts whose words of side are not known here. A number and
# the sign of a clock are a position, unless a word of time or a colon is beside them ("9:30", "before 9", "these 3 points:").
_NUMERAL = "0-9\uff10-\uff19\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341"
_OTHER_SCRIPT = re.compile(
    "[\u70b9\u9ede][\u949f\u9418]"
    f"|[{_NUMERAL}][\u70b9\u9ede\u65f6\u6642]\u534a?\u306e?(?:\u65b9\u5411|\u4f4d|\u5904|\u8655)"
    "|(?<![0-9.:\u5348\u65e5\u665a\u6668])(?:1[0-2]|[1-9])[\u70b9\u9ede\u65f6\u6642]"
    "(?![0-9:\uff1a\u4ee5\u524d\u540e\u5f8c\u95f4\u9593\u534a\u5206\u523b\u9803\u671f\u591a]|\u5de6\u53f3)"
    "|[\u0370-\u1dff\ua000-\ud7ff\ufb1d-\ufdff\ufe70-\ufefc]{2}"
)
# Points of the compass, and "up" or "high" as a place. "Follow this up", "gone down in size" and "suspicion is high" are none.
_NO_COMPASS = r"(?!\s+(?:syndrome|nile|blot|respiratory))"
_ACROSS = rf"(?:(?:north|south)[\s-]?)?(?:east|west)(?:ern|erly|wards?)?{_NO_COMPASS}"
_NO_PLACE = (
    r"(?!\s+(?:the\s+|its\s+)?(?:\w+\s+)?"
    r"(?:signal|density|attenuation|intensity|contrast|protein|fat|grade|risk|size|number|volume))"
)
_LIES = r"(?:l(?:ie|y|ay)(?:s|ing)?|located|situated|positioned|placed|sits?|sitting)"
_DOWN = (
    r"(?:north|south)(?:ern|erly|wards?)?",
    rf"(?:north|south)[\s-]?(?:east|west)(?:ern|erly|wards?)?{_NO_COMPASS}",
    rf"(?<!-)(?<!follow\s)(?:up|down)\s+(?:in|on|near|there|here){_NO_PLACE}|(?:far|further|high|higher|low|lower|way)\s+(?:up|down)",
    rf"(?:high|low)\s+(?:in|on|within){_NO_PLACE}",
    rf"{_LIES}\s+(?:\w+\s+)?(?:high|low|up|down)(?!\s+(?:\w+\s+)?(?:signal|density|attenuation|intensity))",
    r"(?:up|high)\s+or\s+(?:down|low)|(?:down|low)\s+or\s+(?:up|high)",
    # Alone: "A cyst, high, at", or as an answer.
    r"(?:(?<=, )|(?<=: )|(?<![\s\S]))(?:very\s+)?(?:up|down|high|low)(?=\s*(?:[.,;:!?)]|$))",
    r"atop|overhead|ceiling|(?:head|foot|feet)wards?",
)
_GRID = r"(?:first|second|third|fourth|last|[1-4](?:st|nd|rd|th))\s+(?:{0}|quadrant)|{0}\s+(?:[a-z]|\d+)"  # of "row", "column"
# Sides in a form that is not turned: abbreviations, positions on a clock, other languages. And words that may be no side: "left"
# as a verb ("the stent was left.", "surgery left a scar", but "on the left a scar"), "right" for emphasis ("right next to it"),
# "lower" as a verb, "below" a number.
_UNSURE = {
    "left_right": (
        re.compile(
            _words(
                *("L", "R", "[LlRr][Tt]", "[LlRr]g?h?t", "[Ll]ft", "O[DS]", "LC[Xx]", "li"),
                # Not alone: "LMS" is a sarcoma too, and "dx" a diagnosis.
                *(r"LMS\s+(?:stenosis|occlusion|bronchus|coronary|ostium)", r"a\s+[ds]x(?!\s+(?:of|is|was|for))"),
                r"(?:\w+(?:[aio]|[clnrt]e)|(?:sup|inf|med|ant|post|lat)\.?)\s+[ds]x",
                r"\([ds]x\)",
                *("(?i:[lr](?:ul|ll|ml|uq|lq|uz|lz|mz))", "[LR][UL][OI]Q", "[LR](?:IF|HS|UE|LE|K|LD)"),
                # Views, the heart, vessels, airways.
                *("[LR](?:CC|MLO|[AP]O)", "[LR]A[ADEP]?", "[LR]V(?:A|H|OT|EF|SP|EDD|ESD|AD)?", "[LR]BBB"),
                "[LR](?:IMA|CA|PA|ICA|ECA|CCA|MCA|ACA|PCA|SCA|CFA|SFA|CIA|EIA|IIA|HA|GA|RA|IJV?|RV|HV|[SILU]?PV|HD|MS?B)",
            )
        ),
        re.compile(
            _words(
                *(_CLOCK, r"dext(?:er|r\w*)", r"levo\w*", r"sinist\w*", r"situs"),
                # German and Dutch, French, Spanish, Italian, Portuguese, Polish, Scandinavian.
                *(r"link", r"(?:links|rechts|linker|rechter)\w*", r"(?:link|recht)e[snm]?", r"(?:li|re)\.", "lks"),
                *(r"gauches?", r"droite?s?", r"gche", r"drte", r"izq\w*", r"izd[oa]s?", r"derech[oa]s?", r"dch[oa]s?"),
                *(r"der\.", r"destr[oaei]", r"esq(?:uerd\w*)?", r"direit[oa]s?", r"dir\."),
                *(
                    r"lew[ae]\w*",
                    r"lewy(?!\s+(?:bod(?:y|ies)|disease|dementia|neurites?))",
                    r"praw(?:y|[ae]\w*)",
                    r"v[\u00e4a]nst(?:er|ra)\w*",
                    r"h[\u00f6o]g(?:er|ra)\w*",
                ),
                *(r"venstre\w*", r"h[\u00f8o][jy]re\w*"),
                *(r"(?:patients?|he|she|they|who)\s+(?:ha[sd]\s+)?left", r"what\s+(?:is|was|remains)\s+left"),
                r"(?:nothing|none|little|much|anything|something)\s+left",
                rf"{_BE}\s+left\s+(?:in(?!\s+(?:place|situ))|on|to|for|by|there|inside|within|with|without|{_UNTOUCHED})",
                _ACROSS,
                _GRID.format("column"),
                rf"(?!{_NO_VERB}\s)[a-z]+\s+left\s+(?:an?|the|its|no)",
                rf"{_BE}\s+(?:left|right)(?=\s*(?:[.,;:!?)]|$))",
                r"(?<!the\s)right\s+(?:next|below|above|behind|beneath|beside|under|at|in|on|here|there|where|through|into)",
            ),
            re.I,
        ),
        _OTHER_SCRIPT,
    ),
    "up_down": (
        re.compile(_words("[LR](?:UL|LL|ML|UQ|LQ|UZ|LZ|MZ)")),
        re.compile(
            _words(
                *(_CLOCK, r"(?:antero|postero|supero|infero)?(?:superior|inferior|anterior|posterior)(?:ly)?"),
                *(
                    r"crani(?:al|ad)(?:ly)?",
                    r"cauda[ld](?:ly)?",
                    r"cephal(?:ad|ic)",
                    r"rostral(?:ly)?",
                    r"ventral(?:ly)?",
                ),
                *(
                    r"dorsal(?:ly)?",
                    r"apex",
                    r"apices",
                    r"apical(?:ly)?",
                    r"bas(?:e|es|al|ally|ilar)",
                    r"under(?:neath)?",
                ),
                *(
                    r"beneath",
                    r"upside",
                    r"upright",
                    r"(?:supero|infero)\w+",
                    r"(?:top|bottom)most",
                    r"high(?:er|est)",
                    r"lowest",
                    r"on\s+top\s+of",
                    r"(?:upper|lower)\s+limits?(?!\s+of\s+normal)",
                    rf"(?:to|will|may|can|could|would|should)\s+lower\s+{_OBJECT}",
                    r"(?:above|below)\s+(?:\d+|normal|average|(?:the\s+)?(?:threshold|limits?|average))",
                    *_DOWN,
                    _GRID.format("row"),
                    # Other languages.
                    r"(?:obe|unte)(?:n|re[nrsm]?)",
                    r"arriba|abajo|(?:superior|inferior)(?:es|e)?",
                    r"(?:sup|inf)[e\u00e9]rieure?s?|haute?s?|bas(?:se)?s?",
                    r"(?:supra|infra|sub)(?:hilar|carinal|phrenic|diaphragmatic|clavicular)",
                ),
                r"(?:upper|lower|middle|mid)[\s-]+(?:lobes?|lung|zones?|quadrants?|poles?|limbs?|extremit(?:y|ies)|jaw|lips?"
                r"|eyelids?|gi|abdom\w+|thora\w+|chest|back|spine|airways?|oesoph\w+|esoph\w+|teeth|molars?)",
            ),
            re.I,
        ),
        _OTHER_SCRIPT,
    ),
}
# Words of place of which a mirroring changes none, or turns them with certainty.
_ANY_SIDE = re.compile(
    rf"{_BEGIN}(?:left|right|upper(?:most)?|lower(?:most)?|top|bottom|above|below|upwards?|downwards?|(?:cent(?:re|er)|middle|corner|edge"
    r"|border|margin|quadrant|quarter|third|side)s?|cent(?:red|ered|ral|rally)|mid(?:line|way|point)?|half(?:way)?|halves|peripher(?:y|al(?:ly)?)"
    r"|(?:out|inn)er(?:most)?|rows?|(?<!spinal\s)(?<!vertebral\s)columns?"
    # German, Dutch, French, Spanish, Italian, Portuguese.
    r"|mitt(?:e|ig\w*)|zentral\w*|rand|r\u00e4nder\w*|ecken?|midden|hoek|milieu|le\s+coin|bords?|central[eo]s?|centro|medio|esquina|bordes?"
    r"|angolo|bordo|mezzo|canto|meio|nord\w*|s[\u00fcu]d(?:en|lich\w*|ouest|est|oeste|este)?|o[uv]?est|oeste|osten|westen"
    rf")(?:-?(?:handed|hand|sided|side|most|wards?))?{_END}"
    "|[\u5de6\u53f3\u4e0a\u4e0b\u4e2d\u9876\u9802\u5e95\u89d2\u7f18\u7de3\u8fb9\u908a\u9685\u7aef]",
    re.I,
)


def mirrored_text(text: str, flips: Iterable[str]) -> Optional[str]:
    """The text for the mirrored image, or None if it holds a side in a form that cannot be turned with certainty.

    Args:
        text: a question or an answer, without class names.
        flips: ``left_right``, ``up_down``, or both.

    Example:
        >>> from umed_plugin.grounding.side_words import mirrored_text
        >>> mirrored_text("Left upper: the right-sided effusion.", ["left_right"])
        'Right upper: the left-sided effusion.'
        >>> mirrored_text("A nodule in the RML.", ["left_right"]) is None
        True
    """
    for flip in flips:
        if any(pattern.search(text) for pattern in _UNSURE[flip]):
            return None
        text = _swapped(text, flip)
    return text


def names_side(text: str, flip: str) -> bool:
    """Whether a mirroring would change the text, or cannot turn it: the name of a class must hold no side."""
    return mirrored_text(text, [flip]) != text


def names_place(text: str) -> bool:
    """Whether the text says where in the image something lies, in words, or may do so in a form or script that is not known here.

    Every side that `mirrored_text` turns or is unsure of is such a word: "RUL", "links oben", "at 3 o'clock".
    """
    unsure = (pattern for patterns in _UNSURE.values() for pattern in patterns)
    return any(pattern.search(text) for pattern in (_ANY_SIDE, *unsure))


def _swapped(text: str, flip: str) -> str:
    swaps, pattern = _SWAPS[flip]
    kept = [found.span() for found in _IDIOMS[flip].finditer(text)]

    def other(found: re.Match[str]) -> str:
        if any(start <= found.start() < end for start, end in kept):
            return found[0]
        if found["sign"]:
            return swaps[found["sign"]]
        return _cased_as(swaps[found["word"].lower()], found["word"]) + found["suffix"]

    return pattern.sub(other, text)


def _cased_as(word: str, example: str) -> str:
    if example.isupper():
        return word.upper()
    return word.capitalize() if example[0].isupper() else word
