"""One upgrade from start to end: its steps in child processes, each done once, whatever stopped the starts before this one.

How to run: ``umed upgrade CKPT --recipe R --out DIR``; the same command again goes on where the last one was stopped.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umed_plugin.commands.doctor.examination import ERROR, examine
from umed_plugin.commands.processes import Steps, importable, run_logged
from umed_plugin.commands.upgrade.checks import check_together
from umed_plugin.commands.upgrade.in_place import Swap
from umed_plugin.commands.upgrade.made import MANIFEST, Made, read_json, versions
from umed_plugin.commands.upgrade.plan import EVALUATED, Plan, Step, find_origin, result_name
from umed_plugin.commands.upgrade.settings import RUN_FILE, Settings, filled_in, write_settings
from umed_plugin.errors import UmedError
from umed_plugin.files import write_json

REPORT, LOCK = "report.html", ".lock"
# In the environment of every process of a run, by which those that outlive a killed run are found.
MARK = "UMED_UPGRADE_OF"
# Errors of the doctor about what stock LLaVA would make of the input as it is: an upgrade does not load it by its folder's name,
# trains with the tower inside it, and merges an adapter, so that its result has none of them.
_OF_STOCK_LOADING = ("name-without-llava", "name-of-mpt", "adapter-of-mistral", "adapter-model-type", "tower-ignored")


class Upgrade:
    """One run.

    Args:
        folder: of the run; made if need be.
        settings: as read; what they leave open is filled in.
        console: a rich console.
        redo_changed: make steps anew whose settings or inputs have changed, instead of refusing.

    Attributes:
        steps: in their order.

    Raises:
        UmedError: the input is no checkpoint that can be upgraded, or the settings contradict it.
    """

    def __init__(self, folder: Path, settings: Settings, console: Any, redo_changed: bool = False) -> None:
        self.folder, self.console, self.redo_changed = folder.resolve(), console, redo_changed
        self.made = Made(self.folder)
        checkpoint = Path(settings.checkpoint)
        self.swap = Swap(self.folder, checkpoint)
        taken_away = self.swap.begun() and self.swap.old.exists()
        self.origin = find_origin(self.swap.old if taken_away else checkpoint, settings.base)
        self.settings = filled_in(settings, self.origin.config, result_name(self.origin))
        self.plan = Plan(self.folder, self.settings, self.origin)
        self.steps = self.plan.steps()
        check_together(self.settings, self.origin)

    def run(self) -> dict[str, Any]:
        """Do what is left to do; returns the content of ``summary.json``."""
        self._refuse_foreign_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if self.swap.begun():
                return self._swapped()
            if self.settings.in_place:
                self.swap.check()
            # Before anything runs; inputs are looked at when a step's turn comes.
            self._refuse([(step, self.made.differences(step, inputs=False)) for step in self.steps])
            write_settings(self.settings, self.folder / RUN_FILE)
            if not any(self.made.read(step) for step in self.steps):
                self._examine()
            with Steps(self.console) as shown:
                anew = [step for step in self.steps if self._do(step, shown)]
                summary = self._conclude(bool(anew), shown)
            if self.settings.in_place:
                self.swap.finish(self.plan.result)
            self._tell(summary)
        return summary

    def _refuse_foreign_folder(self) -> None:
        # A start may have been killed before it had written its settings.
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        foreign = {name for name in found if name != LOCK and not name.startswith(RUN_FILE)}
        if RUN_FILE not in found and foreign:
            raise UmedError(
                f"{self.folder}: holds files and no {RUN_FILE}, so it is not the folder of an upgrade. Choose another --out."
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """See that no other start works in the folder, and end what a killed one has left running there."""
        with open(self.folder / LOCK, "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UmedError(
                    f"{self.folder}: another `umed upgrade` is at work in it. Wait for it, or end it."
                ) from None
            left = left_running(self.folder)
            if left:
                self.console.print(f"ended {len(left)} processes that a killed start had left running")
            yield

    def _examine(self) -> None:
        """Let the doctor look at the input, and stop at what an upgrade would go wrong with.

        Raises:
            UmedError: with the remedy for each.
        """
        findings = examine(self.origin.checkpoint, self.origin.full if self.origin.lora else None)
        for one in findings:
            self.console.print(
                f"doctor: {one.severity} {one.code}: {one.found} ({one.where})", soft_wrap=True, markup=False
            )
        passed = {*_OF_STOCK_LOADING, *self.settings.accept_findings}
        errors = [one for one in findings if one.severity == ERROR and one.code not in passed]
        if errors:
            told = [f"  {one.code}: {one.found} ({one.where})\n    {one.remedy}" for one in errors]
            raise UmedError(
                f"{self.origin.checkpoint}: cannot be upgraded as it is:\n"
                + "\n".join(told)
                + f"\n`umed doctor {self.origin.checkpoint}` says more, and --fix mends what is safe. To go on all the same: "
                f"--set accept_findings=[{','.join(one.code for one in errors)}]"
            )

    def _refuse(self, changed: Sequence[tuple[Step, list[str]]]) -> None:
        """Name what has changed since steps began, or make these anew if that was asked for."""
        changed = [(step, differences) for step, differences in changed if differences]
        if self.redo_changed:
            for step, _ in changed:
                self.made.forget(step)
        elif changed:
            told = [f"  {step.title}: {'; '.join(differences)}" for step, differences in changed]
            raise UmedError(
                f"{self.folder}: these steps were made, or begun, from other settings or inputs:\n"
                + "\n".join(told)
                + "\nTake the change back, choose another --out, or make them and what depends on them anew with --redo-changed."
            )

    def _do(self, step: Step, shown: Steps) -> bool:
        """Run a step unless it is done, or nothing that is still to be made needs it; whether it was run."""
        if not self._needed(step):
            return False
        self._refuse([(step, [*self.made.differences(step, inputs=True), *self.made.damage(step)])])
        if self.made.is_done(step):
            return False
        self._tell_other_versions(step)
        self.made.begin(step)
        shown.begin(step.title)
        run_logged(
            step.command,
            self.folder / "logs" / f"{step.name}.log",
            step.title,
            environment={**importable(), MARK: str(self.folder)},
            # Other steps' bars are of files that are loaded.
            progress=shown.update if step.trains else None,
        )
        self.made.end(step)
        shown.end()
        return True

    def _tell_other_versions(self, step: Step) -> None:
        """A step that is gone on with under other libraries may end otherwise than it would have."""
        found = self.made.read(step)
        before, now = found["versions"] if found else {}, versions()
        other = [
            f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if found and other:
            self.console.print(f"note: {step.title} was begun with other libraries: {', '.join(other)}", soft_wrap=True)

    def _needed(self, step: Step) -> bool:
        if step.goal or self.made.read(step) is None:
            return True
        users = [other for other in self.steps if set(step.outputs) & set(other.inputs.values())]
        return any(not self.made.is_done(other) and self._needed(other) for other in users)

    def _conclude(self, anew: bool, shown: Steps) -> dict[str, Any]:
        """Summary, manifest and report, if a step was run or one of them is missing: a later start knows other versions."""
        # Not before: they bring torch and transformers along, whose words would stand among those of a dry run.
        from umed_plugin.commands.report.page import write_report

        summary, files = self.folder / "summary.json", (self.plan.result / MANIFEST, self.folder / REPORT)
        if anew or not all(file.is_file() for file in (summary, *files)):
            self._write_manifest(self._summarise())
            shown.begin("writing the report")
            write_report(self.folder, progress=lambda _what, done, total: shown.update(done, total))
        return read_json(summary)

    def _summarise(self) -> dict[str, Any]:
        from umed_plugin.evaluation.grounded import Evaluation, compare

        found = {stage: Evaluation.load(self.folder / "evaluation" / stage) for stage in EVALUATED}
        base, tuned, rewarded = (found[stage] for stage in EVALUATED)
        summary = {
            **{stage: evaluation.metrics for stage, evaluation in found.items()},
            "comparison": compare(tuned, rewarded),
            "comparison_with_base": compare(base, rewarded),
            "seed": self.settings.seed,
        }
        write_json(self.folder / "summary.json", summary)
        return summary

    def _write_manifest(self, summary: dict[str, Any]) -> None:
        """Say in the result what it was made from."""
        origins = dict.fromkeys((self.origin.checkpoint, self.origin.full))
        records = self.plan.records
        recipe = {key: value for step in self.steps for key, value in step.digests.items()}
        content = {
            "made_by": "umed upgrade",
            "input": {str(path): self.made.hashes(path) for path in origins},
            "recipe": {"name": self.settings.recipe, "sha256": recipe},
            "records": {str(records): self.made.hash_of(records)},
            "seed": self.settings.seed,
            "versions": versions(),
            "settings": self.settings.model_dump(),
            "commands": [step.line() for step in self.steps],
            "evaluation": {
                stage: {name: value for name, value in summary[stage].items() if name != "figures"}
                for stage in EVALUATED
            },
            "files": self.made.hashes(self.plan.result),
        }
        write_json(self.plan.result / MANIFEST, content)

    def _swapped(self) -> dict[str, Any]:
        """A start after the swap has begun: end it."""
        if any(self.made.differences(step, inputs=False) for step in self.steps):
            raise UmedError(
                f"{self.folder}: the result of this run has taken the place of {self.swap.checkpoint}, and the settings are not "
                "those that it was made with any more. Choose another --out."
            )
        self.swap.finish(self.plan.result)
        summary = read_json(self.folder / "summary.json")
        self._tell(summary)
        return summary

    def _tell(self, summary: dict[str, Any]) -> None:
        from umed_plugin.evaluation.stages_table import stages_table

        self.console.print(stages_table({stage: summary[stage] for stage in EVALUATED}, summary["comparison"]))
        place = self.swap.checkpoint if self.settings.in_place else self.plan.result
        written = {"checkpoint": place, "report": self.folder / REPORT, "settings": self.folder / RUN_FILE}
        for name, path in written.items():
            self.console.print(f"{name}: {path}", soft_wrap=True)
        if self.settings.in_place:
            self.console.print(f"the old one: {self.swap.old}", soft_wrap=True)


def left_running(folder: Path) -> Sequence[int]:
    """End the processes of a start in ``folder`` that was killed; returns their ids.

    Torchrun and DeepSpeed start theirs in sessions of their own, where the end of the parents does not reach them; a training
    that goes on unseen would write over the checkpoints of the next start.
    """
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # of another user, or gone
    for process in found:
        process.kill()
    psutil.wait_procs(found, timeout=60)
    return [process.pid for process in found]
