"""The ledger of replies: nothing that was paid for is lost, counted twice or mixed up, whoever writes to the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.umed_runs import TESTS, environment

from umed_plugin.data.writing.account import Account
from umed_plugin.errors import UmedError
from umed_plugin.remote import ledger as ledger_module
from umed_plugin.remote.ledger import Ledger, LedgerUser


def test_a_lost_reply_counts_and_is_not_returned(tmp_path: Path) -> None:
    """The server may have charged for it, so a budget must see it, and the request is sent again."""
    ledger = Ledger(tmp_path / "ledger.jsonl", "m")
    ledger.append("k", None, {"prompt_tokens": 5}, lost="not JSON")
    assert ledger.get("k") is None and list(ledger.entries()) == []
    assert ledger.counts == {"requests": 1, "prompt_tokens": 5}
    ledger.append("k", "the reply", {"prompt_tokens": 5})
    assert ledger.get("k").reply == "the reply" and ledger.counts["requests"] == 2


def test_dollars_are_those_of_the_replies_of_the_model_with_the_prices(tmp_path: Path) -> None:
    """Requests and tokens of all models count, as a budget for the file says."""
    Ledger(tmp_path / "ledger.jsonl", "small").append("a", "r", {"prompt_tokens": 60_000_000, "completion_tokens": 1})
    account = Account(Ledger(tmp_path / "ledger.jsonl", "large"), (100, "usd"), (2.5, 10.0))
    assert account.spent_usd == 0 and account.unpriced == 1
    assert account.over_budget({"requests": 1, "prompt_tokens": 1000, "completion_tokens": 200}) is None
    account.ledger.append("b", None, {"prompt_tokens": 60_000_000}, lost="not JSON")
    assert account.spent_usd == 150 and account.over_budget({"requests": 1}) is not None
    assert account.ledger.counts_in("tokens")["prompt_tokens"] == 120_000_000
    assert account.ledger.counts_in("requests")["requests"] == 2


def test_the_first_reply_to_a_request_stays(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", "m")
    for reply in ("first", "second"):
        ledger.append("k", reply, {})
    for reader in (ledger, Ledger(ledger.path, None, read_only=True)):
        assert reader.get("k").reply == "first" and reader.model == "m"


def test_errors_name_the_user_of_the_ledger_and_its_flag(tmp_path: Path) -> None:
    user = LedgerUser("the judge", "Training stops", "--umed_judge_ledger")
    with pytest.raises(
        UmedError, match=r"the judge's ledger cannot be opened.*can be read\. --umed_judge_ledger chooses"
    ):
        Ledger(tmp_path / "gone.jsonl", "m", read_only=True, user=user)
    (tmp_path / "file").write_text("")
    with pytest.raises(UmedError, match=r"the judge's ledger cannot be opened.*can be written"):
        Ledger(tmp_path / "file" / "ledger.jsonl", "m", user=user)
    assert not (tmp_path / "gone.jsonl").exists()


def test_a_ledger_without_a_model_must_have_exactly_one(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.jsonl", "m")
    with pytest.raises(UmedError, match=r"holds replies of no model\. A replay needs the replies of exactly one"):
        Ledger(tmp_path / "ledger.jsonl", None)


def test_a_torn_line_is_skipped_and_closed_by_the_next_writer(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file, "m")
    for key in ("k1", "k2"):
        ledger.append(key, "{}", {"prompt_tokens": 3, "completion_tokens": 1})
    file.write_bytes(file.read_bytes()[:-9])

    ledger = Ledger(file, "m")
    assert ledger.get("k1") and not ledger.get("k2")
    ledger.append("k3", "\ud800 \u2028", {})
    for reader in (ledger, Ledger(file, "m")):
        assert reader.get("k1") and not reader.get("k2") and reader.get("k3").reply == "\ud800 \u2028"
        assert reader.counts == {"requests": 2, "prompt_tokens": 3, "completion_tokens": 1}


@pytest.mark.parametrize("piece", [1, 50, 2**20])
def test_replies_are_read_from_the_file_and_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(ledger_module, "_PIECE", piece)
    writer = Ledger(tmp_path / "ledger.jsonl", "m")
    for number in range(5):
        writer.append(f"k{number}", "größer " * 20 + str(number), {"prompt_tokens": number})
    for reader in (writer, Ledger(writer.path, "m", read_only=True)):
        assert [entry.reply for entry in reader.entries()] == ["größer " * 20 + str(number) for number in range(5)]
        assert reader.get("k3").line["prompt_tokens"] == 3 and reader.counts["prompt_tokens"] == 10
        assert "größer" not in repr(vars(reader))
    writer.path.write_bytes(b"x" * writer.path.stat().st_size)
    with pytest.raises(UmedError, match="was changed while it was in use"):
        writer.get("k3")


def test_lines_that_are_no_replies_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text('7\n\n[]\n{"key": 1}\n{"key": "k", "model": ["m"]}\n{"key": "k", "model": "m", "reply": "r"}\n')
    ledger = Ledger(file, "m")
    assert ledger.get("k").reply == "r" and ledger.counts["requests"] == 1


@pytest.mark.parametrize("count", ["-1000000000", "1" + "0" * 400, "true", "1.5"])
def test_numbers_of_tokens_that_cannot_be_are_not_counted(tmp_path: Path, count: str) -> None:
    file = tmp_path / "ledger.jsonl"
    line = '{"key": "k", "model": "m", "reply": "r", "prompt_tokens": 5, "completion_tokens": COUNT}\n'
    file.write_text(line.replace("COUNT", count))
    assert Ledger(file, "m").counts == {"requests": 1, "prompt_tokens": 5}


WRITER = """
import sys
from umed_plugin.remote.ledger import Ledger
ledger = Ledger(sys.argv[1], "m")
for i in range(int(sys.argv[3])):
    ledger.append(f"{sys.argv[2]}-{i}", "x" * 5000, {"prompt_tokens": 1})
    print(i, flush=True)
"""


def python(code: str, *arguments: object, **keywords: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(TESTS), stdout=subprocess.PIPE, text=True, **keywords)


def test_several_processes_write_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    writers = [python(WRITER, file, name, 60) for name in "abc"]
    assert [writer.communicate(timeout=120) and writer.returncode for writer in writers] == [0, 0, 0]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"{name}-{i}" for name in "abc" for i in range(60))


def test_what_was_written_is_there_after_kill_9(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    writer = python(WRITER, file, "a", 100_000)
    for last, _ in zip(writer.stdout, range(40)):
        written = int(last)
    writer.kill()
    written = max([written, *map(int, writer.stdout.read().split())])
    writer.wait(timeout=30)
    ledger = Ledger(file, "m")
    assert all(ledger.get(f"a-{i}") for i in range(written + 1))
    ledger.append("b", "r", {})
    assert Ledger(file, "m").get("b") and Ledger(file, "m").get(f"a-{written}")
