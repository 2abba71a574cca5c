"""The writer as a process: killed with -9 in the middle of hundreds of images, out of budget, interrupted, estimated."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
from support.judge_server import Answer, Asked, judge_server
from support.writer_runs import build_templates, command, ledger_lines, start
from support.writer_server import KEY, draft, finished, good, is_asked_again, is_reflection, reply, write_data

from umed_plugin import cli
from umed_plugin.data.records import load_records

pytestmark = [pytest.mark.llava, pytest.mark.one_stack]  # images are read through MONAI, which needs torch

COUNT, CONCURRENCY, KILLS = 500, 16, 3


def finish(process: subprocess.Popen, returncode: int) -> str:
    printed = process.communicate(timeout=400)[0]
    assert process.returncode == returncode, printed[-3000:]
    assert KEY not in printed
    return printed


class SlowAndFaulty:
    """Answers slowly; of the requests some meet 429, 500 or broken JSON first, and some answers are cut off or wrong.

    Attributes:
        paid: request id -> completions that were made for it, whether or not the client lived to see them.
    """

    def __init__(self) -> None:
        self.paid: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.tries: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __call__(self, asked: Asked) -> Answer:
        draw = zlib.crc32(asked.request_id.encode())
        time.sleep(0.02 + draw % 7 / 100)
        with self.lock:
            self.tries[asked.request_id] += 1
            first = self.tries[asked.request_id] == 1
        if first and draw % 20 == 0:
            return self.count("429", Answer({"error": {"message": "slow down"}}, 429, {"Retry-After-Ms": "50"}))
        if first and draw % 20 == 1:
            return self.count("500", Answer("oops", 500, {"Retry-After-Ms": "30"}))
        if first and draw % 20 == 2:
            return self.count("broken", Answer('{"id": "x", "choices": [{"mess', 200))
        with self.lock:
            self.paid[asked.request_id] += 1
        return self.answered(asked, draw)

    def answered(self, asked: Asked, draw: int) -> Answer:
        text = finished(asked) if is_reflection(asked) else draft(asked)
        if not is_asked_again(asked) and draw % 20 == 3:
            return self.count("cut off", reply(text[: len(text) // 2], "length"))
        if is_reflection(asked) and not is_asked_again(asked) and draw % 20 == 4:
            return self.count("wrong box", reply(re.sub(r"\[0\.\d\d", "[0.99", text)))
        return reply(text)

    def count(self, kind: str, answer: Answer) -> Answer:
        with self.lock:
            self.kinds[kind] += 1
        return answer


def test_500_images_killed_three_times_are_each_answered_once(tmp_path: Path) -> None:
    """Paid twice is only what was with the server at a kill: completions made for which no line is in the ledger."""
    write_data(tmp_path, COUNT)
    build_templates(tmp_path)
    model = SlowAndFaulty()
    in_flight: list[set[str]] = []
    flags = ("--concurrency", str(CONCURRENCY), "--retries", "4")
    with judge_server(model) as server:
        for kill in range(1, KILLS + 1):
            process = start(tmp_path, server, *flags)
            until = 2 * COUNT * kill // (KILLS + 1)
            while sum(model.paid.values()) < until:
                assert process.poll() is None, process.communicate()[0][-2000:]
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            while server.held:
                time.sleep(0.01)
            kept = {line["key"] for line in ledger_lines(tmp_path) if "lost" not in line}
            in_flight.append(set(model.paid) - kept)
            assert len(in_flight[-1]) <= CONCURRENCY
        finish(start(tmp_path, server, *flags), 0)

        twice = {key: count - 1 for key, count in model.paid.items() if count > 1}
        assert twice == Counter(key for lost in in_flight for key in lost)
        answered = [line["key"] for line in ledger_lines(tmp_path) if "lost" not in line]
        assert len(answered) == len(set(answered)) and set(answered) == set(model.paid)
        records = load_records(tmp_path / "out" / "train.json")
        aside = tmp_path / "out" / "train.aside.json"
        put_aside = load_records(aside) if aside.is_file() else []
        names = [record["id"] for record in [*records, *put_aside]]
        assert len(names) == COUNT == len(set(names))
        paid = sum(model.paid.values())
        finish(start(tmp_path, server, *flags), 0)
        assert sum(model.paid.values()) == paid
    assert min(model.kinds[kind] for kind in ("429", "500", "broken", "cut off", "wrong box")) >= 10, model.kinds
    print(
        f"{paid} completions for {COUNT} images, {sum(twice.values())} paid twice at {KILLS} kills; {dict(model.kinds)}"
    )


@pytest.mark.parametrize("budget", ["60requests", "6000tokens", "0.05usd"])
def test_a_budget_is_kept_and_a_larger_one_goes_on(budget: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Each request takes 100 tokens read and 10 written, 0.001 dollars at these prices."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_data(tmp_path, 60)
    flags = ("--prices", "8,20", "--concurrency", "4")
    with judge_server(good) as server:
        assert cli.main(command(tmp_path, server, *flags, "--budget", budget)) == 1
        printed = capsys.readouterr().out
        allowed = {"60requests": 60, "6000tokens": 54, "0.05usd": 50}[budget]
        assert allowed - 4 <= len(server.asked) <= allowed + 4
        assert "does not allow another request" in printed and "with a larger --budget" in printed
        assert len(load_records(tmp_path / "out" / "train.json")) >= 10

        assert cli.main(command(tmp_path, server, *flags, "--budget", "9usd")) == 0
        assert len(server.asked) == 120 == len({asked.request_id for asked in server.asked})
    assert len(load_records(tmp_path / "out" / "train.json")) == 60


def test_tokens_that_the_server_does_not_count_end_a_budget_in_tokens(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_data(tmp_path, 3)
    with judge_server(lambda asked: reply(draft(asked), usage=False)) as server:
        assert cli.main(command(tmp_path, server, "--budget", "5000tokens", "--concurrency", "1")) == 1
        assert "does not report how many tokens a reply took" in capsys.readouterr().err
        assert len(server.asked) == 1 == len(ledger_lines(tmp_path))


def test_a_dry_run_sends_nothing_and_estimates_what_is_missing(tmp_path: Path, monkeypatch, capsys) -> None:
    write_data(tmp_path, 8, negatives=1)
    prices = ("--prices", "10,100")
    with judge_server(good) as server:
        assert cli.main(command(tmp_path, server, "--dry-run", *prices)) == 0  # without a key
        printed = capsys.readouterr().out
        assert "8 images with lesions, of which 0" in printed and "about 16 requests" in printed
        read, written = (
            int(found.replace(",", "")) for found in re.findall(r"([\d,]+) prompt tokens and ([\d,]+)", printed)[0]
        )
        assert 8 * 765 < read < 20_000 and written == 16 * 200
        assert f"${(read * 10 + written * 100) / 1e6:.2f}" in printed and "at most 32 requests" in printed
        assert server.asked == [] and not (tmp_path / "out" / "train.ledger.jsonl").exists()
        assert not (tmp_path / "out" / "train.json").exists()

        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert cli.main(command(tmp_path, server, *prices, "--budget", "10requests", "--concurrency", "1")) == 1
        before = (tmp_path / "out" / "train.ledger.jsonl").read_bytes()
        capsys.readouterr()
        assert cli.main(command(tmp_path, server, "--dry-run", *prices)) == 0
        printed = capsys.readouterr().out
        assert (
            "of which 5 have all their replies" in printed and "about 6 requests, 600 prompt tokens and 60" in printed
        )
        assert "the mean of the replies in the ledger" in printed
        assert (tmp_path / "out" / "train.ledger.jsonl").read_bytes() == before and len(server.asked) == 10


def test_ctrl_c_waits_for_what_is_on_its_way_and_sends_no_more(tmp_path: Path) -> None:
    let_go = threading.Event()

    def slow(asked: Asked) -> Answer:
        let_go.wait(30)
        return good(asked)

    write_data(tmp_path, 12)
    build_templates(tmp_path)
    with judge_server(slow) as server:
        process = start(tmp_path, server, "--concurrency", "4")
        assert server.hold_until(4, 200)
        process.send_signal(signal.SIGINT)
        # No slot may be free before the requests that were not sent are dropped.
        assert "dropped\n" in iter(process.stdout.readline, ""), "it ended without a word"
        let_go.set()
        assert "KeyboardInterrupt" in process.communicate(timeout=100)[0]  # of which the command makes one line
        assert len(server.asked) == 4 == len(ledger_lines(tmp_path))


def test_the_progress_bar_tells_images_and_cost(tmp_path: Path) -> None:
    write_data(tmp_path, 4)
    build_templates(tmp_path)
    with judge_server(good) as server:
        printed = finish(start(tmp_path, server, "--prices", "100,1000"), 0)
    assert re.search(r"image 4 of 4 \(100 %\), \$0\.16, 0 revised, 0 set aside", printed), printed
