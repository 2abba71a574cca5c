"""Relevance by a judge, against a real server on loopback: prompts, scores, stored replies, and the key that is never written."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.judge_server import SAYS_DROPPED, Answer, Asked, completion, judge_server, score
from support.judging import KEY, RECORD, call, flags
from support.umed_runs import TESTS, environment

from umed_plugin.errors import UmedError
from umed_plugin.flags.rewards import DEFAULT_PROMPT
from umed_plugin.rewards.judges.question import NotAScoreError, Questionnaire
from umed_plugin.rewards.judges.relevance import JudgedRelevance


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def judge_of(server, folder: Path, **changes) -> JudgedRelevance:
    return JudgedRelevance.of(flags(server, **changes), folder)


def answer_in(asked: Asked) -> str:
    """The candidate's text in the shipped prompt."""
    return asked.text.split("<answer>\n")[1].split("\n</answer>")[0]


def by_length(asked: Asked) -> Answer:
    return score(min(len(answer_in(asked)), 10))


# Prompts and scores ---------------------------------------------------------------------------------------------------------


def test_the_judge_is_told_question_reference_and_answer_and_nothing_else():
    question = Questionnaire.read(DEFAULT_PROMPT, {}, 10).ask(RECORD, "A {reference} at [0.5, 0.5, 0.6, 0.6].")
    assert question.texts == {
        "question": "Is there anything abnormal?",
        "reference": "One abnormal area at [box]. It is a nodule.",
        "answer": "A {reference} at [box].",
    }
    assert all(text in question.text for text in question.texts.values())
    assert question.text.count("It is a nodule.") == 1  # a placeholder inside an answer is not replaced
    assert '{"score": S}' in question.text


def test_the_key_of_a_question_changes_with_all_that_decides_the_reply():
    other = {"conversations": [RECORD["conversations"][0], {"from": "gpt", "value": "Nothing abnormal."}]}
    asked = Questionnaire("{reference}{answer}", {}, 10)
    keys = [
        asked.ask(RECORD, "a").key,
        asked.ask(RECORD, "b").key,
        asked.ask(other, "a").key,
        Questionnaire("{reference} {answer}", {}, 10).ask(RECORD, "a").key,
        Questionnaire("{reference}{answer}", {"temperature": 1}, 10).ask(RECORD, "a").key,
    ]
    assert len(set(keys)) == len(keys)
    assert asked.ask(RECORD, "a [0.1, 0.1, 0.2, 0.2]").key == asked.ask(RECORD, "a [0.3, 0.1, 0.9, 0.2]").key


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score": 10}', 1.0),
        ('{"score": 0}', 0.0),
        (' {"reason": "close", "score": 7.5}\n', 0.75),
        ('```json\n{"score": 4}\n```', 0.4),
        ('```\n{"score": 4}\n```\n', 0.4),
    ],
)
def test_a_score_is_read(reply, expected):
    assert Questionnaire("", {}, 10).score(reply) == pytest.approx(expected)


@pytest.mark.parametrize(
    "reply",
    [
        *("", "8", "[8]", '"8"', "Score: 8", "{score: 8}", '{"score": 8', '{"score": 8} {"score": 8}'),
        *('{"rating": 8}', '{"score": "8"}', '{"score": null}', '{"score": true}', '{"score": [8]}'),
        *('{"score": 11}', '{"score": -1}', '{"score": NaN}', '{"score": Infinity}', '{"score": 1e999}'),
        *('{"score": 1, "score": 9}', '{"score": 8} because it fits', "[" * 100_000),
    ],
)
def test_anything_else_is_no_score(reply):
    with pytest.raises(NotAScoreError):
        Questionnaire("", {}, 10).score(reply)


# With the server -------------------------------------------------------------------------------------------------------------


def test_scores_come_from_the_server_and_are_measured(tmp_path):
    with judge_server(by_length) as server:
        judge = judge_of(server, tmp_path, umed_judge_prices="10,100")
        assert call(judge, "12345", "", "1234567890") == [0.5, 0.0, 1.0]
    assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}
    assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    assert all(
        asked.body.keys() == {"model", "messages", "temperature", "max_tokens"} and asked.body["model"] == "the-model"
        for asked in server.asked
    )
    metrics = judge.metrics()
    assert metrics.pop("judge/wait_seconds") >= 0
    assert metrics == {
        "judge/failed": 0.0,
        "judge/requests": 3,
        "judge/cached": 0,
        "judge/tokens": 330,
        "judge/usd": pytest.approx(3 * (100 * 10 + 10 * 100) / 1e6),
    }
    assert set(metrics) < set(judge.metric_names)


def test_a_prompt_scale_and_options_of_ones_own_are_used(tmp_path):
    (tmp_path / "prompt.txt").write_text("0 to 1, please: {answer} for {reference}")
    changes = {"umed_judge_prompt": str(tmp_path / "prompt.txt"), "umed_judge_max_score": 1.0}
    with judge_server(lambda asked: score(0.25)) as server:
        assert call(judge_of(server, tmp_path, umed_judge_options='{"top_k": 1}', **changes), "a") == [0.25]
    (asked,) = server.asked
    assert asked.text == "0 to 1, please: a for One abnormal area at [box]. It is a nodule."
    assert asked.body["top_k"] == 1 and "temperature" not in asked.body


def test_the_same_text_is_asked_once_and_boxes_make_no_other_text(tmp_path):
    with judge_server(by_length) as server:
        judge = judge_of(server, tmp_path)
        scores = call(judge, "a nodule [0.1, 0.1, 0.2, 0.2]", "a nodule [0.1, 0.1, 0.3, 0.3]", "cyst", "cyst")
        assert scores == [1.0, 1.0, 0.4, 0.4]
        assert (len(server.asked), judge.metrics()["judge/requests"], judge.metrics()["judge/cached"]) == (2, 2, 2)
        assert call(judge, "cyst") == [0.4]
        assert (len(server.asked), judge.metrics()["judge/requests"], judge.metrics()["judge/cached"]) == (2, 0, 1)


BAD = {
    "a 500": Answer({"error": {"message": "broken"}}, 500),
    "a 429": Answer({"error": {"message": "slow down"}}, 429),
    "a 401": Answer({"error": {"message": "who are you"}}, 401),
    "html": Answer("<html>gateway</html>", 200, {"Content-Type": "text/html"}),
    "broken json": Answer('{"choices": [', 200),
    "other json": Answer({"choices": None}),
    "no choices": Answer({"choices": []}),
    "no message": Answer({"choices": [{"index": 0}]}),
    "a refusal": Answer(completion(None, refusal="I cannot help with that.")),
    "prose": Answer(completion("An 8, I would say.")),
    "out of range": score(11),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_what_is_no_score_is_none_and_counted_while_the_others_keep_theirs(bad, tmp_path, capsys):
    with judge_server(lambda asked: bad if answer_in(asked) == "bad" else by_length(asked)) as server:
        judge = judge_of(server, tmp_path)
        assert call(judge, "bad", "good", "bad") == [None, 0.4, None]
        assert judge.metrics()["judge/failed"] == pytest.approx(2 / 3)
    assert "umed: judge: 2 of 3 without a score" in capsys.readouterr().out


def test_a_reply_that_does_not_come_in_time_is_none(tmp_path):
    let_go = threading.Event()

    def slow(asked: Asked) -> Answer:
        if answer_in(asked) == "slow":
            let_go.wait(20)
        return score(5)

    with judge_server(slow) as server:
        assert call(judge_of(server, tmp_path, umed_judge_timeout=3), "slow", "fast") == [None, 0.5]
        let_go.set()


def test_errors_of_the_server_are_tried_again_and_count_once(tmp_path):
    failing = [Answer("oops", 500), Answer("{}", 503), Answer("", 429, {"Retry-After": "0"})]
    with judge_server(lambda asked: failing.pop(0) if failing else score(5)) as server:
        judge = judge_of(server, tmp_path, umed_judge_retries=3)
        assert call(judge, "a") == [0.5]
    assert len(server.asked) == 4
    assert judge.metrics()["judge/failed"] == 0
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 1


def test_a_retry_after_holds_for_all_questions(tmp_path):
    told: list[float] = []

    def limited(asked: Asked) -> Answer:
        if not told:
            told.append(asked.at)
            return Answer({"error": {"message": "rate limit"}}, 429, {"Retry-After": "1"})
        return score(5)

    with judge_server(limited) as server:
        judge = judge_of(server, tmp_path, umed_judge_retries=1, umed_judge_concurrency=1)
        assert call(judge, "a", "b") == [0.5, 0.5]
    assert all(asked.at - told[0] >= 1.0 for asked in server.asked[1:])
    assert len(server.asked) == 3


@pytest.mark.parametrize("limit", [{"Retry-After-Ms": "700"}, {"X-RateLimit-Reset-Requests": "0m0.7s"}])
def test_what_one_reply_says_of_the_limit_holds_the_others_back(limit, tmp_path):
    """The second question was not refused itself: only the shared gate can delay it."""
    told: list[float] = []

    def limited(asked: Asked) -> Answer:
        if told:
            return score(5)
        told.append(asked.at)
        if "Retry-After-Ms" in limit:
            return Answer({"error": {"message": "rate limit"}}, 429, limit)
        return Answer(score(5).body, 200, {"X-RateLimit-Remaining-Requests": "0", **limit})

    with judge_server(limited) as server:
        call(judge_of(server, tmp_path, umed_judge_concurrency=1), "a", "b")
    assert len(server.asked) == 2 and server.asked[1].at - told[0] >= 0.7


def test_as_many_questions_as_allowed_are_with_the_server_at_once(tmp_path):
    with judge_server(lambda asked: score(5 if server.hold_until(4) else 0)) as server:
        scores = call(judge_of(server, tmp_path, umed_judge_concurrency=4), *(f"answer {i}" for i in range(9)))
    assert scores == [0.5] * 9
    assert server.most_held == 4


def test_starting_early_asks_while_the_caller_goes_on(tmp_path):
    let_go = threading.Event()

    def when_told(asked: Asked) -> Answer:
        let_go.wait(20)
        return score(5)

    with judge_server(when_told) as server:
        judge = judge_of(server, tmp_path)
        judge.start(["q"] * 2, ["a", "b"], record=[RECORD] * 2)
        assert server.hold_until(2)
        let_go.set()
        assert call(judge, "a", "b") == [0.5, 0.5]
    assert len(server.asked) == 2


# What is kept ----------------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing_and_replaying_gives_the_same(tmp_path):
    answers = ["a", "four", "bad", "seven!!"]
    with judge_server(lambda asked: score(99) if answer_in(asked) == "bad" else by_length(asked)) as server:
        first = call(judge_of(server, tmp_path), *answers)
        assert len(server.asked) == 4
        again = judge_of(server, tmp_path)
        assert call(again, *answers) == first == [0.1, 0.4, None, 0.7]
        assert len(server.asked) == 4 and again.metrics()["judge/cached"] == 4

    replayed = JudgedRelevance.of(flags(umed_judge=f"replay:{tmp_path / 'judge.jsonl'}"), tmp_path / "elsewhere")
    before = (tmp_path / "judge.jsonl").read_bytes()
    assert call(replayed, *answers) == first
    assert call(replayed, "never asked", "a") == [None, 0.1]
    assert replayed.metrics()["judge/failed"] == 0.5
    assert (tmp_path / "judge.jsonl").read_bytes() == before and not (tmp_path / "elsewhere").exists()


def test_runs_may_share_a_ledger_and_each_model_has_its_own_replies(tmp_path):
    shared = {"umed_judge_ledger": str(tmp_path / "shared" / "all.jsonl")}
    with judge_server(by_length) as server:
        call(judge_of(server, tmp_path / "one", **shared), "a")
        call(judge_of(server, tmp_path / "two", **shared), "a")
        assert len(server.asked) == 1
        call(judge_of(server, tmp_path / "two", umed_judge="openai:other", **shared), "a")
        assert len(server.asked) == 2
    with pytest.raises(UmedError, match="other, the-model. A replay needs the replies of exactly one model"):
        JudgedRelevance.of(flags(umed_judge=f"replay:{tmp_path / 'shared' / 'all.jsonl'}"), tmp_path)


def test_two_judges_that_run_see_each_others_replies(tmp_path):
    """As two ranks of one run do."""
    with judge_server(by_length) as server:
        one, two = judge_of(server, tmp_path), judge_of(server, tmp_path)
        call(one, "a", "b")
        assert call(two, "b", "c") == [0.1, 0.1]
        assert call(one, "c") == [0.1]
    assert len(server.asked) == 3


def python(code: str, *arguments: object, **keywords: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(TESTS), stdout=subprocess.PIPE, text=True, **keywords)


JUDGING = """
import sys
from pathlib import Path
from support.judging import RECORD, call, flags
from umed_plugin.rewards.judges.relevance import JudgedRelevance

class At:
    url = sys.argv[1]

judge = JudgedRelevance.of(flags(At, umed_judge_concurrency=4), Path(sys.argv[2]))
judge.start(["q"] * 8, [f"answer {i}" for i in range(8)], record=[RECORD] * 8)
input()
raise SystemExit("a step failed")
"""


@pytest.mark.parametrize("killed", [True, False], ids=["kill-9", "an error"])
def test_replies_are_kept_when_the_process_ends_in_between(killed, tmp_path):
    """Two replies have arrived, four are pending: kill -9 keeps two, an error keeps all six, and none is requested again."""
    let_go = threading.Event()

    def two_at_once(asked: Asked) -> Answer:
        if int(answer_in(asked).split()[1]) >= 2:
            let_go.wait(20)
        return score(5)

    with judge_server(two_at_once) as server:
        process = python(SAYS_DROPPED + JUDGING, server.url, tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        file = tmp_path / "judge.jsonl"
        ended = time.monotonic() + 60
        while len(server.asked) < 6 or not file.is_file() or file.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < ended and process.poll() is None, process.communicate()
            time.sleep(0.02)
        if killed:
            process.kill()
        else:
            process.stdin.write("\n")
            process.stdin.flush()
            # Queued questions must be dropped before a slot is free.
            assert process.stdout.readline() == "dropped\n", process.communicate(timeout=60)
            let_go.set()
        process.communicate(timeout=60)
        let_go.set()
        kept = {json.loads(line)["answer"] for line in file.read_text().splitlines()}
        assert kept == {f"answer {i}" for i in range(2 if killed else 6)}

        before = len(server.asked)
        assert call(judge_of(server, tmp_path), *(f"answer {i}" for i in range(8))) == [0.5] * 8
        assert sorted(answer_in(asked) for asked in server.asked[before:]) == [
            f"answer {i}" for i in range(len(kept), 8)
        ]


# What ends a run -------------------------------------------------------------------------------------------------------------


def test_a_judge_that_never_answers_ends_the_run_and_says_why(tmp_path):
    with judge_server(lambda asked: Answer({"error": {"message": "no such model"}}, 404)) as server:
        judge = judge_of(server, tmp_path, umed_judge_patience=2)
        assert call(judge, "a") == [None]
        judge.end_rollout()
        assert call(judge, "b") == [None]
        with pytest.raises(UmedError, match="no score in 2 consecutive rollouts.*HTTP 404.*no such model"):
            judge.end_rollout()


def test_patience_counts_rollouts_and_not_the_samplings_in_them(tmp_path):
    """``--umed_dynamic_sampling`` samples further questions in a rollout, above all where no answer has a score."""
    with judge_server(lambda asked: by_length(asked) if answer_in(asked) == "good" else Answer("", 404)) as server:
        judge = judge_of(server, tmp_path, umed_judge_patience=2)
        for answers in (["bad", "bad", "bad"], ["good", "bad"], ["bad", "bad", "good"], ["bad"]):
            for answer in answers:
                call(judge, answer)
            judge.end_rollout()
        call(judge, "bad")
        with pytest.raises(UmedError, match="no score in 2 consecutive rollouts"):
            judge.end_rollout()


def test_one_score_is_enough_to_go_on(tmp_path):
    with judge_server(lambda asked: by_length(asked) if answer_in(asked) == "good" else Answer("", 404)) as server:
        judge = judge_of(server, tmp_path, umed_judge_patience=2)
        for answers in (["bad"], ["bad", "good"], ["bad"], ["good"], ["bad"]):
            call(judge, *answers)
            judge.end_rollout()


@pytest.mark.parametrize(
    ("budget", "spent"), [("2requests", "2 requests"), ("220 tokens", "220 tokens"), ("0.004usd", "0.004 usd")]
)
def test_a_spent_budget_asks_to_stop_after_a_whole_step(budget, spent, tmp_path):
    limit = {"umed_judge_budget": budget, "umed_judge_prices": "10,100"}
    with judge_server(by_length) as server:
        judge = judge_of(server, tmp_path, **limit)
        assert call(judge, "a") == [0.1] and judge.stop is None
        assert call(judge, "ab", "abc") == [0.2, 0.3]
        assert f"budget of {spent} is spent" in judge.stop and "larger --umed_judge_budget" in judge.stop

        again = judge_of(server, tmp_path, **limit)
        assert call(again, "ab") == [0.2]  # a reply that is already paid for may be used
        with pytest.raises(UmedError, match="is spent"):
            call(again, "new")
        assert len(server.asked) == 3
        assert call(judge_of(server, tmp_path, **{**limit, "umed_judge_budget": "5000requests"}), "new") == [0.3]


def test_a_budget_in_dollars_counts_the_judge_that_has_the_prices(tmp_path):
    with judge_server(by_length) as server:
        call(judge_of(server, tmp_path, umed_judge="openai:dear"), "a", "b", "c")
        judge = judge_of(server, tmp_path, umed_judge_budget="0.005usd", umed_judge_prices="10,100")
        assert call(judge, "a", "b") == [0.1, 0.1] and judge.stop is None
        assert call(judge, "c") == [0.1]
        assert "budget of 0.005 usd is spent: the replies of the-model in" in judge.stop


def test_a_budget_that_cannot_be_counted_is_an_error_and_the_reply_is_kept(tmp_path):
    with judge_server(lambda asked: Answer(completion('{"score": 3}', usage=False))) as server:
        with pytest.raises(UmedError, match="does not report how many tokens"):
            call(judge_of(server, tmp_path, umed_judge_budget="1000tokens"), "a")
        assert call(judge_of(server, tmp_path, umed_judge_budget="5requests"), "a") == [0.3]
    assert len(server.asked) == 1


def test_a_ledger_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with judge_server(by_length) as server:
        with pytest.raises(UmedError, match="ledger cannot be opened"):
            judge_of(server, tmp_path, umed_judge_ledger=str(tmp_path / "file" / "judge.jsonl"))
        with pytest.raises(UmedError, match="cannot be written .No space left"):
            call(judge_of(server, tmp_path, umed_judge_ledger="/dev/full"), "a")


# The key ---------------------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_message_and_no_file_even_when_the_server_sends_it_back(tmp_path, capfd):
    def telling(asked: Asked) -> Answer:
        if answer_in(asked) == "error":
            return Answer({"error": {"message": f"Incorrect API key provided: {asked.authorization}"}}, 401)
        if answer_in(asked) == "other":
            return Answer({"choices": [], "headers": asked.authorization})
        return Answer(completion(f'{{"score": 5, "key": "{asked.authorization}"}}'))

    with judge_server(telling) as server:
        judge = judge_of(server, tmp_path, umed_judge_patience=1)
        assert call(judge, "error", "other", "reply") == [None, None, 0.5]
        judge.end_rollout()
        call(judge, "error")
        with pytest.raises(UmedError, match=r"Incorrect API key provided: Bearer \*\*\*") as caught:
            judge.end_rollout()
    printed = capfd.readouterr()
    assert "Bearer ***" in printed.out
    for text in (printed.out, printed.err, str(caught.value), (tmp_path / "judge.jsonl").read_text()):
        assert KEY not in text
