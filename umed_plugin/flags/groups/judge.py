"""The flags of the relevance reward's judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umed_plugin.flags.names import LOCAL_JUDGE_NAMES, OPENAI, REPLAY
from umed_plugin.flags.needs import MODEL_JUDGE, RELEVANCE, SERVER_JUDGE, flag
from umed_plugin.flags.rules import DEFAULT_JUDGE_OPTIONS, FREE, REWARDING, parse_judge_options
from umed_plugin.remote import settings


@dataclass
class JudgeFlags:
    """The flags of the relevance reward's judge."""

    umed_judge: str = flag(
        "lexical",
        "Who scores relevance. Local: lexical (class names and words) or classes (class names only). Also openai:MODEL (sends "
        "text, no images, to an OpenAI-compatible server) or replay:FILE (replies saved by an earlier run).",
        stage=REWARDING,
        needs=RELEVANCE,
        pattern=rf"{'|'.join(LOCAL_JUDGE_NAMES)}|({OPENAI}|{REPLAY}):.+",
        form="lexical, classes, openai:MODEL or replay:FILE",
    )
    umed_judge_base_url: Optional[str] = flag(
        None,
        "Address of the judge's server, such as http://localhost:8000/v1. Default: OpenAI's.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
    )
    umed_judge_prompt: Optional[str] = flag(
        None,
        "Text file with the judge's prompt, with {reference}, {answer} and {question}. Default: judges/prompt.txt.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
    )
    umed_judge_options: str = flag(
        DEFAULT_JUDGE_OPTIONS,
        "Further fields of the judge's requests, as JSON. Some models take no temperature or max_tokens.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
        parse=parse_judge_options,
    )
    umed_judge_max_score: float = flag(
        10.0,
        "Score that the judge's prompt gives the best answer; the worst gets 0.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
        above=0,
    )
    umed_judge_ledger: Optional[str] = flag(
        None,
        "File that keeps the judge's replies; runs may share one. Default: judge.jsonl in --output_dir.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        on_resume=FREE,
    )
    umed_judge_concurrency: int = flag(
        16,
        "Concurrent requests to the judge per process.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        least=1,
        on_resume=FREE,
    )
    umed_judge_timeout: float = flag(
        60.0,
        "Timeout of one request to the judge, in seconds.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        above=0,
        on_resume=FREE,
    )
    umed_judge_retries: int = flag(
        5,
        "Retries after a failed request to the judge.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        least=0,
        on_resume=FREE,
    )
    umed_judge_budget: Optional[str] = flag(
        None,
        "What all replies in the ledger may cost together: 5000requests or 2000000tokens; 20usd: those of the judge's model. "
        "Once it is spent, the run finishes the step, saves a checkpoint and ends.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        parse=settings.parse_budget,
        on_resume=FREE,
    )
    umed_judge_prices: Optional[str] = flag(
        None,
        "US dollars per million tokens that the judge reads and writes: 0.15,0.60. Logs judge/usd.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        parse=settings.parse_prices,
        on_resume=FREE,
    )
    umed_judge_patience: int = flag(
        3,
        "Stop the run after this many consecutive rollouts in which the judge returned no score. A rollout is all that is "
        "sampled before the next update.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
        least=1,
        on_resume=FREE,
    )
