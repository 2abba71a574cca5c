"""A backtracking matcher that counts its steps: the work of a regular expression, measured without a clock.

It walks the tree into which Python's own parser turns a pattern, tries alternatives in the order in which `re` does, and checks
that it finds what `re` finds. `re` skips some of these steps, so the count is an upper bound. The constructs that the plugin's
patterns use are known; any other raises `KeyError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

try:
    from re import _parser as sre_parse  # Python 3.11 and later
except ImportError:
    import sre_parse


class CountingPattern:
    """Stands in for a compiled pattern: `finditer` gives what the pattern gives, and `steps` grows by what that took."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.steps = pattern, 0
        self._tree = list(sre_parse.parse(pattern.pattern, pattern.flags))
        self._text = ""

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        self._text = text
        position = 0
        for match in self.pattern.finditer(text):
            assert self._search(position) == match.span(), (self.pattern, text)
            position = match.end()
            yield match
        assert self._search(position) is None

    def _search(self, position: int) -> tuple[int, int] | None:
        for start in range(position, len(self._text) + 1):
            end = next(self._ends(self._tree, start), None)
            if end is not None:
                return start, end
        return None

    def _ends(self, tree: Any, at: int) -> Iterator[int]:
        """Where a match of the tree that begins at a position can end, the preferred end first."""
        if not tree:
            yield at
            return
        (kind, argument), rest = tree[0], tree[1:]
        for end in getattr(self, f"_{str(kind).lower()}")(argument, at):
            yield from self._ends(rest, end)

    def _one(self, at: int, matches: Any) -> Iterator[int]:
        self.steps += 1
        if at < len(self._text) and matches(self._text[at]):
            yield at + 1

    def _literal(self, code: int, at: int) -> Iterator[int]:
        return self._one(at, lambda character: character.lower() == chr(code).lower())

    def _in(self, members: Any, at: int) -> Iterator[int]:
        negated = str(members[0][0]) == "NEGATE"
        return self._one(at, lambda character: negated != any(_holds(member, character) for member in members))

    def _branch(self, argument: Any, at: int) -> Iterator[int]:
        for branch in argument[1]:
            yield from self._ends(list(branch), at)

    def _subpattern(self, argument: Any, at: int) -> Iterator[int]:
        return self._ends(list(argument[-1]), at)

    def _max_repeat(self, argument: Any, at: int, count: int = 0) -> Iterator[int]:
        least, most, tree = argument
        if most == sre_parse.MAXREPEAT or count < most:
            for end in self._ends(list(tree), at):
                if end > at:
                    yield from self._max_repeat(argument, end, count + 1)
        if count >= least:
            yield at

    def _min_repeat(self, argument: Any, at: int, count: int = 0) -> Iterator[int]:
        least, most, tree = argument
        if count >= least:
            yield at
        if most == sre_parse.MAXREPEAT or count < most:
            for end in self._ends(list(tree), at):
                if end > at:
                    yield from self._min_repeat(argument, end, count + 1)

    def _at(self, where: Any, at: int) -> Iterator[int]:
        assert str(where) == "AT_BOUNDARY"
        self.steps += 1
        before, behind = self._text[max(at - 1, 0) : at], self._text[at : at + 1]
        if _is_word(before) != _is_word(behind):
            yield at

    def _assert(self, argument: Any, at: int) -> Iterator[int]:
        if self._looks(argument, at):
            yield at

    def _assert_not(self, argument: Any, at: int) -> Iterator[int]:
        if not self._looks(argument, at):
            yield at

    def _looks(self, argument: Any, at: int) -> bool:
        """Whether the tree matches ahead of a position, or (direction -1) right before it."""
        direction, tree = argument
        start = at if direction > 0 else at - tree.getwidth()[0]
        return start >= 0 and any(True for _ in self._ends(list(tree), start))


def _is_word(character: str) -> bool:
    return character == "_" or character.isalnum()


def _holds(member: Any, character: str) -> bool:
    kind, argument = str(member[0]), member[1]
    if kind == "LITERAL":
        return character.lower() == chr(argument).lower()
    if kind == "RANGE":
        return any(
            argument[0] <= ord(form) <= argument[1] for form in (character, character.lower(), character.upper())
        )
    if kind == "CATEGORY":
        return _CATEGORIES[str(argument)](character)
    return {"NEGATE": False}[kind]


_CATEGORIES = {"CATEGORY_WORD": _is_word, "CATEGORY_DIGIT": str.isdecimal, "CATEGORY_SPACE": str.isspace}
