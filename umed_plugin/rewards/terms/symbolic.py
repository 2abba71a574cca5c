"""Whether an answer takes the reference's steps, and steps that go together: ``symbolic:FILE.yaml``.

After Dr-LLaVA (arXiv 2405.19567), whose steps are the answers of a conversation. Departures: the steps are in one answer, words
are matched whole and negations are heeded, a step that the reference does not take is left out, and the sum is scaled to 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.flags.names import SYMBOLIC
from umed_plugin.grounding.answer_types import asks_for_names
from umed_plugin.rewards.contract import register_reward
from umed_plugin.rewards.symbols import SymbolFile, check_against, read_symbols

# c of Dr-LLaVA for a step whose symbol is right, and for one with no symbol at all. A wrong symbol has 0.
RIGHT, NO_SYMBOL = 1.0, -0.5


@register_reward(SYMBOLIC, applies_to=asks_for_names)
class Symbolic:
    """``(sum c + sum a + n/2) / (5n/2 - 1)`` over the n steps that the reference takes, in 0..1.

    c of a step is 1 if the answer names the symbols that the reference names, -0.5 if it names none, else 0. a of two steps that
    follow each other is 1 if the answer's symbols stand together in a case of the file, else 0. ``None`` where the reference
    takes no step.

    Args:
        file: YAML, see `umed_plugin.rewards.symbols`.

    Raises:
        UmedError: the file cannot be read, or has faults.
    """

    __name__ = SYMBOLIC  # in TRL's log
    most_records = None  # a step's words may be rare, and most files are known to fit after a few records

    def __init__(self, file: str | Path) -> None:
        self._path = Path(file)
        self._file: SymbolFile = read_symbols(self._path)

    def for_records(self, records: Sequence[Mapping[str, Any]]) -> Symbolic:
        """The reward itself, if every step of its file is taken by some reference.

        Raises:
            UmedError: names the steps that none takes.
        """
        check_against(self._file, self._path, records)
        return self

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        record: Sequence[Mapping[str, Any]],
        **columns: Any,
    ) -> list[float | None]:
        """The values of the completions."""
        return [self._value(text, study["conversations"][1]["value"]) for text, study in zip(completions, record)]

    def _value(self, text: str, reference: str) -> float | None:
        expected = {step: self._file.symbols(step, reference) for step in self._file.steps}
        steps = [step for step, symbols in expected.items() if symbols]
        if not steps:
            return None
        found = {step: self._file.symbols(step, text) for step in steps}
        right = sum(RIGHT * (found[step] == expected[step]) if found[step] else NO_SYMBOL for step in steps)
        pairs = zip(steps, steps[1:])
        agreeing = sum(self._file.agree(one, found[one], other, found[other]) for one, other in pairs)
        n = len(steps)
        return (right + agreeing + n / 2) / (5 * n / 2 - 1)
