"""The file of the reward `symbolic`: steps of a diagnosis, the words of their symbols, and the cases that occur.

```yaml
steps:                            # in the order in which an answer goes
  finding: {nodule: [nodule, nodular], none: [normal, nothing abnormal]}
  side: {left: [left], right: [right]}
  diagnosis: {cancer: [cancer, carcinoma], benign: [benign, hamartoma], healthy: [healthy]}
cases:                            # a step that is left out, or is `any`, may be anything
  - {finding: nodule, side: any, diagnosis: cancer}
  - {finding: nodule, diagnosis: benign}
  - {finding: none, diagnosis: healthy}
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import Field

from umed_plugin.data.texts import read_yaml
from umed_plugin.errors import UmedError, unknown_name
from umed_plugin.faults import Faults, StrictModel, validated
from umed_plugin.grounding.terms import named_classes
from umed_plugin.terminal.text import one_line

ANY = "any"
_EXAMPLES = 3


class SymbolFile(StrictModel):
    """Steps and cases of a file that `read_symbols` has read."""

    steps: dict[str, dict[str, list[str]]] = Field(
        min_length=1, description="Step -> symbol -> the words that stand for it in an answer."
    )
    cases: list[dict[str, str]] = Field(
        min_length=1, description="Combinations of symbols that occur, each as step -> symbol."
    )

    def symbols(self, step: str, text: str) -> set[str]:
        """The symbols of a step that a text names: by whole words, without those that it rules out."""
        return named_classes(text, self.steps[step])

    def agree(self, step: str, symbols: set[str], other_step: str, other_symbols: set[str]) -> bool:
        """Whether each symbol of one step occurs in some case with one of the other step, and the other way round."""

        def together(symbol: str, other: str) -> bool:
            return any(
                case.get(step, ANY) in (ANY, symbol) and case.get(other_step, ANY) in (ANY, other)
                for case in self.cases
            )

        return (
            bool(symbols and other_symbols)
            and all(any(together(symbol, other) for other in other_symbols) for symbol in symbols)
            and all(any(together(symbol, other) for symbol in symbols) for other in other_symbols)
        )


def read_symbols(path: Path) -> SymbolFile:
    """Read and check a file.

    Raises:
        UmedError: with all its faults: unknown keys, a case with a step or symbol that does not exist, two symbols of a step that
            share a word, two equal cases.
    """
    faults = Faults()
    content = faults.read(read_yaml, path)
    found = None
    if not faults.messages:
        found = validated(SymbolFile, content, "", faults)
    if found is not None:
        _check_words(found, faults)
        _check_cases(found, faults)
    faults.raise_if_any(f"{one_line(path)} (--umed_rewards symbolic)")
    assert found is not None
    return found


def _check_words(file: SymbolFile, faults: Faults) -> None:
    for step, symbols in file.steps.items():
        for symbol, words in symbols.items():
            if symbol == ANY:
                faults.add(f"steps.{step}.{ANY}", f"`{ANY}` stands for every symbol in a case. Name it otherwise.")
            if not words or not all(word.strip() for word in words):
                faults.add(f"steps.{step}.{symbol}", "needs one word or more, none of them empty.")
        for (first, words), (second, others) in combinations(symbols.items(), 2):
            shared = {word.lower() for word in words} & {word.lower() for word in others}
            for word in sorted(shared):
                faults.add(
                    f"steps.{step}", f"{word!r} stands for both {first} and {second}. A word stands for one symbol."
                )


def _check_cases(file: SymbolFile, faults: Faults) -> None:
    for number, case in enumerate(file.cases):
        for step, symbol in case.items():
            if step not in file.steps:
                faults.add(f"cases[{number}]", unknown_name("step", step, file.steps))
            elif symbol != ANY and symbol not in file.steps[step]:
                faults.add(f"cases[{number}].{step}", unknown_name("symbol", symbol, [*file.steps[step], ANY]))
    full = [{step: case.get(step, ANY) for step in file.steps} for case in file.cases]
    for number, case in enumerate(full):
        if case in full[:number]:
            faults.add(f"cases[{number}]", f"equals cases[{full.index(case)}]. Remove one of them.")
        if all(
            symbol == ANY for symbol in file.cases[number].values()
        ):  # as written: an unknown step has its own fault
            faults.add(
                f"cases[{number}]", "allows every combination, so that nothing could disagree. Name a symbol in it."
            )


def check_against(file: SymbolFile, path: object, records: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a file with a step that none of the records' references takes: it would score nothing.

    It reads until each step is found. So all records are read only if one is missing, or is rare.

    Raises:
        UmedError: names each such step, with three references.
    """
    missing, first, count = list(file.steps), [], 0
    for count, record in enumerate(records, 1):
        text = str(record["conversations"][1]["value"])
        first += [text] if count <= _EXAMPLES else []
        missing = [step for step in missing if not file.symbols(step, text)]
        if not missing:
            return
    faults = Faults()
    for step in missing:
        words = [word for names in file.steps[step].values() for word in names]
        shown = "; ".join(repr(one_line(text)[:160]) for text in first)
        faults.add(
            f"steps.{step}",
            f"no reference of the {count} training records has one of its words ({', '.join(words[:8])}). The first are: {shown}",
        )
    faults.raise_if_any(f"{one_line(path)} (--umed_rewards symbolic)")


def find_symbol_faults(reward_names: Sequence[str]) -> list[str]:
    """What is wrong in the files of ``symbolic:FILE`` among the names of ``--umed_rewards``; a missing file is left out."""
    faults = []
    for name in reward_names:
        file = Path(name.partition(":")[2])
        if name.startswith("symbolic:") and file.is_file():
            try:
                read_symbols(file)
            except UmedError as error:
                faults.append(str(error))
    return faults
