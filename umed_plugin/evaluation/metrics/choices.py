"""Multiple choice: which option an answer stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from umed_plugin.evaluation.metrics.answers import called_answer, in_tags, plain, words

LETTERS = "ABCDEFGHIJ"
_LOOKED_BACK = 120  # characters before a letter in which a negation or a name is looked for
# Plain text that begins with a letter by itself: "B", "(B)", "B: text", "The answer is B", "Option B", "B because A is wrong".
# Not "A nodule" or "B cells": behind the letter must stand a mark, a dash, the end, or a word that no option goes on with.
_LETTER = re.compile(
    r"(?:(?:the )?(?:(?:final|correct|best|right) )?(?:answer|option|choice)(?: is)? ?:? ?)?(?:option |choice )?"
    r"[(\[{]?([A-J])"
    r"(?:[)\]}:.,;!?]|$| [-\u2013\u2014(]| (?:because|since|as|due|which|seems|is(?! (?:not|wrong|false|in|un)))\b)",
    re.IGNORECASE,
)
# "B is correct" anywhere; the last one counts.
_RIGHT = re.compile(r"(?<!\w)\(?([A-J])\)? (?:is|seems|must be|would be) (?:the )?(?:correct|right|best|true)\b")
_CHOSEN = re.compile(r"\b(?:choose|select|pick|go with) (?:option |choice |answer )?(?=[(\[{]?[A-J]\b)")
# A letter and, behind a mark, a text.
_TRUTH = re.compile(r"\s*\(?([A-Za-z])\)?(?:\s*[:.)]\s*|\s*$)(.*)", re.DOTALL)
_ALONE = re.compile(r"(?:^|\. |: )[(\[{]?([A-J])[)\]}]?\.?$")
# A capital that stands alone anywhere, or several with "or" or "and" between: what ends a clause, or goes on with a word that no
# name goes on with. Not "hepatitis B infection", "C. difficile", the article "A" before its noun, or the pronoun "I".
_CAPITAL = r"[(\[{]?\b[A-HJ]\b[)\]}]?"
_CAPITALS = re.compile(
    rf"(?<![\w.-]){_CAPITAL}(?:(?:, {_CAPITAL})*,? (?:or|and|nor) (?:option |choice )?{_CAPITAL})*"
    r"(?=$|\.(?:$| (?![a-z]))|[,;:!?](?: |$)| [-\u2013\u2014(]| (?:because|since|as|due|which|but|rather|instead|over|and not|"
    r"here|for|from|based|with|in (?:this|my)|(?:is|was|seems|looks|appears|would be|must be)"
    r"(?! (?:not|wrong|false|in|un|ex|ruled)))\b)"
)
# A text whose next letter is ruled out, with at most three words or a list of letters in between: "I do not think it is B".
_RULED_OUT = re.compile(
    r"\b(?:not|never|neither|nor|cannot|without|except|exclud(?:es?|ing)|rul(?:es?|ing) out|than|over|instead of|unlike|"
    r"(?:is|was|are|do|does|did|ca|wo|would|could|should)nt)"
    r"(?: (?!(?:but|so|and|because|since|as|yet|hence|thus|then|therefore)\b)[^\W\d_]+){0,3}"
    rf"(?: {_CAPITAL}(?:, {_CAPITAL})*,? (?:or|and|nor)(?: option| choice)?)? [(\[{{]?$",
    re.IGNORECASE,
)
# Words that a letter gives a name to.
_NAMED = re.compile(
    r"\b(?:hepatitis|vitamins?|types?|grades?|stages?|class|groups?|categor(?:y|ies)|levels?|zones?|segments?|regions?|panels?|"
    r"figures?|images?|parts?|phases?|series|arrows?|labels?|points?|influenza|proteins?|factors?|h(?:a?e)mophilia) [(\[{]?$",
    re.IGNORECASE,
)
# Inside a sentence a name before a letter: "Child-Pugh B", "Stanford B".
_NAME_BEFORE = re.compile(r"[^.:;!? ],? (?!(?:Option|Choice|Answer|Letter) )[\w-]*[A-Z][\w-]* [(\[{]?$")


def nearest_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option with the highest ``difflib`` ratio to the answer, the first of equals; None if all are 0.

    The QA score of OmniMedVQA (arXiv 2402.09181) and the choice accuracy of PMC-VQA (arXiv 2305.10415) use it. The ratio is
    not symmetric: as there, it is that of ``SequenceMatcher(None, option, answer)``.
    """
    ratios = [difflib.SequenceMatcher(None, option, answer).ratio() for option in options]
    best = max(ratios, default=0.0)
    return ratios.index(best) if best > 0 else None


def named_letter(answer: str, options: int) -> int | None:
    """Index of the option whose letter the answer states (``B``, ``B: ..``, ``(B)``, ``**B**``, ``The answer is B.``), or None.

    The final answer counts: what stands in answer tags, else behind the last "answer is", else "B is correct", else a letter at
    the start, else one alone at the end.

    Args:
        answer: of the model.
        options: how many there are; a letter beyond them does not count.
    """
    text = plain(in_tags(answer))
    chosen = [match.end() for match in _CHOSEN.finditer(text) if not _is_ruled_out(text, match.start())]
    right = [match for match in _RIGHT.finditer(text) if not _is_ruled_out(text, match.start())]
    behind = [called_answer(text), text[chosen[-1] :] if chosen else None]
    found = [match for part in behind if part is not None and (match := _LETTER.match(part))]
    found += [*right[-1:], *(match for match in (_LETTER.match(text), _ALONE.search(text)) if match)]
    indices = [LETTERS.index(match[1].upper()) for match in found]
    return next((index for index in indices if index < options), None)


def stated_letters(answer: str, options: Sequence[str]) -> list[int]:
    """Indices of the options whose letters the answer states: one, several that it leaves open, or none.

    A `named_letter` counts alone. Else all capitals count that stand alone, behind the last "answer is" or else anywhere. Those
    that are ruled out ("not B"), belong to a name ("hepatitis B") or to the text of an option do not count.

    Example:
        >>> stated_letters("Neither A nor C, so B", ["left lung", "right lung", "both lungs", "none"])
        [1]
    """
    named = named_letter(answer, len(options))
    if named is not None:
        return [named]
    of_options = {letter for option in options for letter in _letters_within(option)}
    text = plain(in_tags(answer))
    for part in (called_answer(text), text):
        letters = _lone_letters(part or "") - of_options
        indices = sorted(index for letter in letters if (index := LETTERS.index(letter)) < len(options))
        if indices:
            return indices
    return []


def _lone_letters(text: str) -> set[str]:
    """The capitals of a plain text that stand alone, without those that are ruled out or part of a name."""
    found: set[str] = set()
    for match in _CAPITALS.finditer(text):
        before = _before(text, match.start())
        if not any(pattern.search(before) for pattern in (_RULED_OUT, _NAMED, _NAME_BEFORE)):
            found.update(re.findall(r"\b[A-HJ]\b", match[0]))
    return found


def _is_ruled_out(text: str, place: int) -> bool:
    return _RULED_OUT.search(_before(text, place)) is not None


def _before(text: str, place: int) -> str:
    """What stands before a place, as far as a pattern looks back."""
    return text[max(place - _LOOKED_BACK, 0) : place]


def _letters_within(option: str) -> list[str]:
    """The capitals that stand alone in an option's text, such as that of "hepatitis B"; not an article at its start."""
    return re.findall(r"\b[A-J]\b", re.sub(r"^\s*A\s+(?=\w)", "", option))


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer stands for: by its letter if it states one, else by the nearest text.

    None for an answer that states several letters, or resembles no option.
    """
    letters = stated_letters(answer, options)
    if letters:
        return letters[0] if len(letters) == 1 else None
    return nearest_option(in_tags(answer), options)


def right_option(truth: str, options: Sequence[str]) -> int | None:
    """Index of the option that a benchmark's own answer names (``C``, ``C: text``, ``text``), or None if it fits none.

    A letter is never trusted over a text behind it: "a: cyst" is the option "cyst", whichever letter that has. If no option has
    this very text, the letter counts only if its option begins with the text, or is the one that is most like it.
    """
    match = _TRUTH.match(truth)
    if not match:
        return _with_text(truth, options)
    letter, text = LETTERS.find(match[1].upper()), match[2].strip()
    letter_fits = 0 <= letter < len(options)
    if not words(text):
        return letter if letter_fits else _with_text(truth, options)
    same = [index for index, option in enumerate(options) if words(option) == words(text)]
    if len(same) == 1:
        return same[0]
    begins = letter_fits and words(options[letter])[: len(words(text))] == words(text)
    return letter if letter_fits and (letter in same or begins or nearest_option(text, options) == letter) else None


def _with_text(text: str, options: Sequence[str]) -> int | None:
    same = [index for index, option in enumerate(options) if option.strip() == text.strip()]
    same = same or [index for index, option in enumerate(options) if words(text) and words(option) == words(text)]
    return same[0] if same else None


def lowest(losses: Sequence[float]) -> int:
    """Index of the lowest loss, the first of equals: the option that is most likely (OmniMedVQA's prefix score)."""
    return min(range(len(losses)), key=losses.__getitem__)
