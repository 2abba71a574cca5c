"""What a free-text answer says in the end: its words without markup, and the part that it calls its answer.

LLaVA-Med's own figures do not use this: they keep LLaVA-Med's normalisation (`umed_plugin.evaluation.metrics.llava_med`).
"""

from __future__ import annotations

import re
import unicodedata

# Thinking ends at its last tag. What stands in answer tags or a LaTeX box is the answer, the last one of several.
_THOUGHT = re.compile(r"</think(?:ing)?>", re.I)
_TAGGED = re.compile(r"<answer>|</answer>", re.I)
_BOXED = re.compile(r"\\boxed\s?\{([^{}]*)\}")
_CALLED = re.compile(
    r"\b(?:answer|choice|conclusion|verdict)(?:\s(?:is|would be|should be|must be)\b\s?:?|\s?[:=])\s?(?:that\s)?", re.I
)
_TAG = re.compile(r"<[^<>]*>")
_MARKUP = re.compile("[*_#>\"'`$\\\\\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb~|]")
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+\d*")
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_ARTICLES = {"a", "an", "the"}
# Words that "A" gives a name to, in any spelling: "type a dissection".
_LETTERED = {"class", "grade", "group", "hepatitis", "influenza", "stage", "type", "vitamin"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}


def plain(text: str) -> str:
    r"""A text in one line without tags, Markdown, LaTeX commands and quotation marks; a new line becomes a full stop.

    Example:
        >>> plain("**B**\nbecause <b>A</b> is wrong")
        'B. because A is wrong'
    """
    text = unicodedata.normalize("NFKC", text)
    text = _MARKUP.sub("", _TAG.sub(" ", re.sub(r"\\[a-zA-Z]+", " ", text)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return ". ".join(line for line in lines if line)


def in_tags(text: str) -> str:
    r"""The part of a text behind its thinking, in its last ``<answer>`` or ``\boxed{}``; without them, the text."""
    text = text[[0, *(match.end() for match in _THOUGHT.finditer(text))][-1] :]
    parts = _TAGGED.split(text)
    if len(parts) > 1:
        tagged = [part for part in parts[1:] if part.strip()]
        opens = _TAGGED.findall(text)
        inside = [part for tag, part in zip(opens, parts[1:]) if tag.lower() == "<answer>" and part.strip()]
        text = (inside or tagged or parts)[-1]
    boxed = _BOXED.findall(text)
    return boxed[-1] if boxed else text


def called_answer(text: str) -> str | None:
    """What follows the last "answer is", "answer:", "conclusion:" in a plain text; None if it calls nothing its answer.

    Example:
        >>> called_answer("It is not A, so the answer is B.")
        'B.'
    """
    ends = [match.end() for match in _CALLED.finditer(text)]
    return text[ends[-1] :] if ends and text[ends[-1] :].strip(" .") else None


def words(text: str) -> list[str]:
    """The words of a text in lower case, of any script, numbers as digits, without articles, markup and punctuation.

    Example:
        >>> words("\u201cYes\u201d\u2026 the **two** lungs: 1,000 mm")
        ['yes', '2', 'lungs', '1000', 'mm']
        >>> words("A case of hepatitis A")
        ['case', 'of', 'hepatitis', 'a']
    """
    joined = _DIGIT_COMMA.sub("", _APOSTROPHE.sub("", unicodedata.normalize("NFKC", text)))
    cleaned = _TAG.sub(" ", re.sub(r"\\[a-zA-Z]+", " ", joined))
    found = list(_WORD.finditer(cleaned))
    said = [match[0].lower() for match in found]
    return [
        _NUMBERS.get(word, word)
        for index, word in enumerate(said)
        if word not in _ARTICLES or not _is_article(cleaned, found, index)
    ]


def _is_article(text: str, found: list[re.Match[str]], index: int) -> bool:
    """Whether "a", "an" or "the" stands before a word of its own, and "A" is not the letter of "hepatitis A" or "type A".

    Where a text has no small letters, a capital inside a sentence says nothing.
    """
    if index + 1 == len(found) or re.match(r"\s*[.,;:!?)\]}-]", text[found[index].end() :]):
        return False
    if found[index][0].lower() != "a" or not index:
        return True
    before = text[found[index - 1].end() : found[index].start()]
    inside_sentence = re.fullmatch(r"[ \t,-]+", before) is not None
    is_capital = found[index][0] == "A" and any(char.islower() for char in text)
    return not (inside_sentence and (is_capital or found[index - 1][0].lower() in _LETTERED))
