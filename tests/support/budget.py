"""What the tests may cost by folder, and the order in which their files run.

The budgets are for `make test` on two idle cores: seconds of both workers together, 1,440 in twelve minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

# Folder of tests/ -> seconds of test time; "." are the files beside the folders.
BUDGET = {
    "commands": 280,
    "training": 300,
    "evaluation": 60,
    "benchmarks": 60,
    "docs": 80,
    "engine": 5,  # skipped but under `make test-engine`
    "rewards": 90,
    "checkpoints": 70,
    "data": 160,
    "model": 50,
    "patches": 40,
    "flags": 15,
    "grounding": 15,
    "patching": 5,
    "pseudo_boxes": 40,
    "remote": 10,
    "terminal": 5,
    ".": 100,
}
# Files in which one core is busy longest: they start first, so that none is left alone at the end.
SLOWEST = (
    *("test_trainer.py", "test_doctor_fixes.py", "test_upgrade_runs.py", "test_demo.py", "test_small_runs.py"),
    *("test_scripts.py", "test_plan_runs.py", "test_launch.py", "test_feature_cache.py", "test_ablation.py"),
    *("test_deepspeed.py", "test_serving_command.py", "test_judge_runs.py", "test_benchmarks.py", "test_doctor.py"),
    *("test_convert.py", "test_validation.py", "test_tuning_runs.py", "test_neighbours.py", "test_resume.py"),
    *("test_stacks.py", "test_cached_runs.py", "test_ppo_learns.py", "test_mau_page.py", "test_writing_runs.py"),
    *("test_study.py", "test_upgrade_decision.py", "test_builds.py", "test_day.py"),
)


def place(item: pytest.Item) -> int:
    """Sorts tests: the slowest files first, the others in their order."""
    name = item.path.name
    return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)


def table(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Lines with the time and the number of tests of each folder, beside its budget in seconds."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for report in reports:
        parts = report.nodeid.partition("::")[0].split("/")
        folder = parts[1] if len(parts) > 2 else "."
        seconds[folder] += report.duration
        tests[folder] += report.when == "call"
    lines = [f"{'folder':<14}{'tests':>7}{'seconds':>10}{'budget':>9}{'used':>8}"]
    for folder, spent in seconds.most_common():
        lines.append(_line(folder, tests[folder], spent, BUDGET.get(folder, 0)))
    return [*lines, _line("all", sum(tests.values()), sum(seconds.values()), sum(BUDGET.values()))]


def _line(name: str, tests: int, seconds: float, budget: int) -> str:
    used = f"{seconds / budget:>7.0%}" if budget else f"{'-':>7}"
    return f"{name:<14}{tests:>7,}{seconds:>10.0f}{budget:>9,}{used:>8}{'  over' if seconds > budget else ''}"
