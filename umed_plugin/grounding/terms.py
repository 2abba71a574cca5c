"""Which classes a text names: whole words, longest name first, without negated names.

A class that the answer rules out ("no nodule") is not named by it. Negation is detected by a few cue words in the manner of NegEx
(Chapman et al. 2001), not by a parser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

# Class -> its plain name and synonyms.
ClassNames = Mapping[str, Sequence[str]]

# Words that rule classes out, and words at which that scope ends. At each position the first group that matches is used.
_NOT = r"(?:\b(?:can)?not|n['\u2019]t)"
_BE = r"(?:is|are|was|were)"
_CUES = re.compile(
    rf"""
    (?P<pseudo>  # looks like a negation, but rules nothing out
        {_NOT}\s+(?:only|just|without|free\s+of|(?:be\s+|been\s+)?(?:absent|rul\w+\s+out|exclud\w+))\b
        | {_NOT}\s+(?:\w+\s+){{0,2}}normal\b
        | \b(?:no|without(?:\s+a)?)\s+(?:doubt|question)\b
        | \bno\s*,
    )
    | (?P<behind>  # rules out what the clause has named: "a nodule is absent", "nodule: no", "nodule not seen"
        (?:[:?]|\s[-\u2010-\u2015])\s*(?:no|none|absent|negative)\b(?=\s*(?:[.,;!)\n]|$))
        | \bnot\s+(?:seen|present|visible|found|identified|detected|evident)\b
        | \b(?:{_BE}|ha(?:s|ve)\s+been)\s+(?:ruled\s+out|excluded|absent|unlikely)\b
        | \b(?:{_BE}|has|have|can?|could)(?:\s*not|n['\u2019]t)\s+(?:be\s+|been\s+)?
          (?:seen|present|visible|found|identified|detected|evident|likely)\b
    )
    | (?P<ahead>  # rules out what follows, a whole list of names: "no nodule, cyst or mass"
        (?:\bno|{_NOT})\s+\w+\s+(?:that\s+)?(?:it|this|there)\s+{_BE}\b
        | {_NOT}(?:\s+\w+ly)?\b
        | \b(?:no|never|nothing|neither|nor|without|absence\s+of|lack\s+of|free\s+of|negative\s+for)\b
        | \b(?:rather\s+than|instead\s+of|exclud(?:es?|ed|ing)|rul(?:es?|ed|ing)\s+out)\b
    )
    | (?P<verb> \b(?<!to\ )(?:{_BE}|has|have|(?:show|reveal|demonstrate|contain|lie)s?)\b )
    | (?P<end>
        \.(?!\d) | [!?;:)\n]
        | \b(?:but|however|although|though|yet|while|whereas|except|apart\s+from|other\s+than|only|rather|instead)\b
        | \b(?:(?:more|most)\s+likely|there|it|we|they|,\s*I)\b
        | (?:,\s+(?:and\s+)?|\band\s+)  # a new clause: ", a cyst is", but not ", a cyst or a mass is"
          (?=(?:an?|the)\s+(?:(?!(?:or|nor|and)\b)[\w-]+\s+){{1,4}}?(?:is|was|has|shows|lies)\b)
    )
    """,
    re.I | re.X,
)


# A space or a hyphen, as `re.escape` writes it, between two words of a name.
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?:\\[ -])+(?=\w)")
# Full-width letters and digits, one for one, so that places in the text stay.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


@lru_cache(maxsize=256)
def _pattern(terms: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern[str], list[str]]:
    """A pattern that finds the longest term at each position, and the class of each of its groups."""
    words = sorted(((name, cls) for cls, names in terms for name in names), key=lambda word: len(word[0]), reverse=True)
    # A hyphen and a space stand for each other: "pleural-effusion", "COVID 19".
    between = r"(?:\s+|\s?[-\u2010-\u2015]\s?)"
    written = [re.sub(_BETWEEN_WORDS, lambda _: between, re.escape(name)).replace(r"\ ", r"\s+") for name, _ in words]
    alternatives = "|".join(f"({name})" for name in written)
    # Not \b, which needs a letter on one side: a name may end with a parenthesis.
    return re.compile(rf"(?<!\w)(?:{alternatives})(?:s|es)?(?!\w)", re.I), [cls for _, cls in words]


def find_terms(text: str, terms: ClassNames) -> list[tuple[int, int, str]]:
    """Spans where ``text`` names a class: (start, end, class) in characters, in order; whole words, longest term first.

    A name that the text rules out ("no nodule", "a nodule is absent") is left out.
    """
    return [(start, end, cls) for start, end, cls, ruled_out in _mentions(text, terms) if not ruled_out]


def _mentions(text: str, terms: ClassNames) -> list[tuple[int, int, str, bool]]:
    """All spans where ``text`` has a name: (start, end, class, whether the text rules it out)."""
    if not terms:
        return []
    text = text.translate(_FULL_WIDTH)
    pattern, owners = _pattern(tuple((cls, tuple(names)) for cls, names in terms.items()))
    spans = [(match.start(), match.end(), owners[(match.lastindex or 1) - 1]) for match in pattern.finditer(text)]
    if not spans:
        return []
    # Names are masked before the search for cues: "mass without calcification" may be a class.
    masked = list(text)
    for start, end, _ in spans:
        masked[start:end] = "x" * (end - start)
    ruled_out = bytearray(len(text))  # 1 where a name is given only to say that it is absent
    for start, end in _ruled_out("".join(masked)):
        ruled_out[start:end] = b"\1" * (end - start)
    return [(*span, bool(ruled_out[span[0]])) for span in spans]


def replace_terms(text: str, terms: ClassNames, filler: str) -> str:
    """``text`` with ``filler`` in place of every class name, ruled out or not."""
    return _pattern(tuple((cls, tuple(names)) for cls, names in terms.items()))[0].sub(filler, text) if terms else text


def _ruled_out(text: str) -> list[tuple[int, int]]:
    """Spans ``[start, end)`` of the text in which a name is mentioned only to say that it is absent."""
    spans: list[tuple[int, int]] = []
    # Where the current clause begins, and the end of the negation cue whose scope is open (None: no scope is open).
    clause, opened = 0, None
    for cue in _CUES.finditer(text):
        kind = cue.lastgroup
        # A verb right after its negator belongs to it: "does not show", "nor is".
        own_verb = kind == "verb" and opened is not None and not text[opened : cue.start()].strip()
        if kind == "pseudo" or own_verb:
            continue
        if kind == "behind":
            spans.append((clause, cue.start()))
        elif opened is not None:
            spans.append((opened, cue.start()))
        opened = cue.end() if kind == "ahead" else None
        clause = clause if kind == "ahead" else cue.end()
    return spans if opened is None else [*spans, (opened, len(text))]


# "No other nodule" does not rule out the one that was named.
_OTHER = re.compile(r"\b(?:other|further|additional|another|more|second|new)\s+(?:[\w-]+\s+){0,2}$", re.I)


def ruled_out_classes(text: str, terms: ClassNames) -> set[str]:
    """The classes of ``terms`` that ``text`` says are absent; "no other nodule" rules out none.

    Example:
        >>> ruled_out_classes("A nodule, but no cyst.", {"nodule": ["nodule"], "cyst": ["cyst"]})
        {'cyst'}
    """
    return {cls for start, _, cls, out in _mentions(text, terms) if out and not _OTHER.search(text[:start])}


def named_classes(text: str, terms: ClassNames) -> set[str]:
    """The classes of ``terms`` (class -> plain name and synonyms) that ``text`` names."""
    return {cls for _, _, cls in find_terms(text, terms)}
