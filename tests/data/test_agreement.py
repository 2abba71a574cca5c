"""How far reviewers agree: kappa against published examples, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umed_plugin import cli
from umed_plugin.data.writing.agreement import KINDS, cohen_kappa, fleiss_kappa, measure
from umed_plugin.data.writing.decisions import Decision
from umed_plugin.errors import UmedError


def made(reviewer: str, kinds: str, texts: dict[int, str] | None = None) -> list[Decision]:
    """Decisions on records 0, 1, ...: a letter each, a for accept, e for edit, r for reject, a blank for none."""
    names = {kind[0]: kind for kind in KINDS}
    return [
        Decision(f"d/{n}", "digest", names[letter], (texts or {}).get(n, ""), reviewer, "", f"{reviewer}.json")
        for n, letter in enumerate(kinds)
        if letter != " "
    ]


def test_cohens_kappa_is_sklearns() -> None:
    from sklearn.metrics import cohen_kappa_score

    pairs = list(zip("aaarrreeaaarerar", "aarrrreeaeararaa"))
    first, second = zip(*pairs)
    assert cohen_kappa(pairs) == pytest.approx(cohen_kappa_score(first, second))
    assert cohen_kappa([("a", "a")] * 5) is None and cohen_kappa([]) is None
    assert cohen_kappa([("a", "r"), ("r", "a")]) == -1


def test_fleiss_kappa_is_that_of_the_textbook_example() -> None:
    """Ten subjects, fourteen raters, five categories: 0.210 (Fleiss 1971 as worked in many textbooks)."""
    rows = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(rows) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[3, 0]] * 4) is None and fleiss_kappa([]) is None


def test_pairs_texts_of_all_and_disagreements() -> None:
    found = measure([*made("A", "aarr"), *made("B", "aaar"), *made("C", "a rr")])
    assert [(pair.first, pair.second, pair.texts, pair.same) for pair in found.pairs] == [
        ("A", "B", 4, 3), ("A", "C", 3, 3), ("B", "C", 3, 2),
    ]  # fmt: skip
    assert found.pairs[0].kappa == pytest.approx(0.5) and found.texts == 3
    assert found.fleiss == pytest.approx(fleiss_kappa([[3, 0, 0], [1, 0, 2], [0, 0, 3]]))
    assert [[one.kind for one in group] for group in found.disagreements] == [["reject", "accept", "reject"]]
    assert found.counts["A"] == {"accept": 2, "reject": 2}


def test_two_edits_agree_in_kind_and_are_listed_if_their_texts_differ() -> None:
    found = measure([*made("A", "ea", {0: "One."}), *made("B", "ea", {0: "Two."})])
    assert found.pairs[0].same == 2 and len(found.disagreements) == 1


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(UmedError, match="at least two reviewers are needed, and only A"):
        measure(made("A", "ar"))
    with pytest.raises(UmedError, match="A decided twice on record 'd/1'"):
        measure([*made("A", "aa"), *made("A", " r"), *made("B", "aa")])


def test_the_command_prints_kappas_and_each_disagreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for reviewer, kinds in (
        ("Dr. A", "accept accept reject"),
        ("Dr. B", "accept reject reject"),
        ("", "accept accept reject"),
    ):
        decisions = [
            {"id": f"d/{n}", "shown": "x", "decision": kind, "text": "", "note": "too large\x1b[31m" if n == 1 else ""}
            for n, kind in enumerate(kinds.split())
        ]
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps({"reviewer": reviewer, "decisions": decisions}))
    assert cli.main(["recipe", "agreement", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    assert "0.40 (n = 3)" in printed and "1.00 (n = 3)" in printed
    assert "Fleiss' kappa of all 3 reviewers: 0.55 (n = 3)" in printed and "too few" in printed
    line = next(line for line in printed.splitlines() if line.startswith("  d/1: "))
    assert "Dr. A accept" in line and "Dr. B reject" in line and "2.json accept" in line and "\x1b" not in line
    assert cli.main(["recipe", "agreement", str(files[0]), str(files[1])]) == 0
    assert "Fleiss" not in capsys.readouterr().out
