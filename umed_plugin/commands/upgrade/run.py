"""Run an upgrade: each step in a child process, each exactly once, however often the run was stopped and started again.

How to run: ``umed upgrade CKPT --recipe R --out DIR``. The same command continues a stopped run.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umed_plugin.commands.doctor.examination import ERROR, examine
from umed_plugin.commands.machine import Machine, this_machine
from umed_plugin.commands.memory_advice import memory_lines
from umed_plugin.commands.processes import importable, marked_processes, run_logged
from umed_plugin.commands.run_logs import read_from
from umed_plugin.commands.upgrade.checkpoint_swap import CheckpointSwap
from umed_plugin.commands.upgrade.checks import check_stages, check_together
from umed_plugin.commands.upgrade.decision import Decision
from umed_plugin.commands.upgrade.origin import find_origin, result_name
from umed_plugin.commands.upgrade.plan import Plan, Step
from umed_plugin.commands.upgrade.provenance import MANIFEST, Provenance, read_json, versions
from umed_plugin.commands.upgrade.resuming import stages_going_on, what_is_kept
from umed_plugin.commands.upgrade.run_folder import check_folder
from umed_plugin.commands.upgrade.settings import RUN_FILE, Settings, filled_in, write_settings
from umed_plugin.commands.upgrade.summary import REPORT, SUMMARY, decision_of, print_summary, summarise, write_manifest
from umed_plugin.commands.upgrade.training import work_of
from umed_plugin.errors import UmedError
from umed_plugin.files.locks import locked
from umed_plugin.flags.rules import REWARDING
from umed_plugin.terminal.progress import Steps
from umed_plugin.terminal.text import one_line

# Environment variable of every process of a run; identifies processes that outlive a killed run.
MARK = "UMED_UPGRADE_OF"
# Beginnings of lines in a step's log that are shown.
_PASSED_ON = ("umed: warning:", "umed: the merge keeps")
_MOST_PASSED_ON = 8
# Doctor errors that concern only stock LLaVA loading the input. An upgrade does not choose the loader by the folder's name,
# trains with the tower inside the input, and merges an adapter, so its result has none of these faults.
_STOCK_LOADING_ERRORS = (
    "name-without-llava",
    "name-of-mpt",
    "adapter-of-mistral",
    "adapter-model-type",
    "tower-ignored",
)
# Doctor errors that stage 1 refuses too, so that accept_findings is not offered. The first is refused where records have boxes.
_REFUSED_BY_TRAINING = ("tower-image-size", "tower-incomplete", "tower-promised")


class Upgrade:
    """One run.

    Args:
        folder: of the run; created if missing.
        settings: as read; unset values are filled in.
        console: a rich console.
        redo_changed: redo steps whose settings or inputs have changed, instead of refusing to run.
        machine: that the run is for; None: this one.

    Attributes:
        steps: in their order.

    Raises:
        UmedError: the input cannot be upgraded, or the settings contradict it.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        console: Any,
        redo_changed: bool = False,
        machine: Machine | None = None,
    ) -> None:
        self.folder, self.console, self.redo_changed = folder.resolve(), console, redo_changed
        self.provenance = Provenance(self.folder)
        checkpoint = Path(settings.checkpoint)
        self.swap = CheckpointSwap(self.folder, checkpoint)
        moved = self.swap.begun() and self.swap.backup.exists()
        self.origin = find_origin(self.swap.backup if moved else checkpoint, settings.base)
        self.machine = machine or this_machine()
        self.settings = filled_in(settings, self.origin.config, result_name(self.origin), self.machine)
        self.plan = Plan(self.folder, self.settings, self.origin)
        self.decision: Decision | None = None
        self._plan_again(told=False)
        has_val, going_on = self.plan.held_out.has_val_if_built(), stages_going_on(self.steps, self.provenance)
        check_together(self.settings, self.origin, self.machine, has_val, going_on)

    def memory(self) -> list[str]:
        """Lines that say which memory each stage needs, and whether the GPU has it."""
        lines = memory_lines(
            self.origin.config,
            {name: work_of(name, self.settings, self.machine) for name in self.settings.stages},
            self.machine,
            evaluated_together=self.settings.evaluation.batch_size,
            answer=self.settings.evaluation.max_new_tokens,
        )
        less = "With DeepSpeed less: ZeRO-2 shares gradients and Adam among the GPUs, ZeRO-3 the weights too."
        return lines + ([less] if self.settings.deepspeed is not None else [])

    def check(self) -> None:
        """Refuse a folder in which the run cannot be, and a swap that could not be done at its end. Nothing is written.

        Raises:
            UmedError: what is in the way.
        """
        check_folder(self.folder, self.steps, self.origin)
        if self.settings.in_place and not self.swap.begun():
            self.swap.check()

    def run(self) -> dict[str, Any]:
        """Run the steps that are left; return the content of ``summary.json``."""
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self.swap.begun():
                return self._finish_swap()
            # All settings are compared before anything runs; the inputs of a step when its turn comes.
            self._handle_changes([(step, self.provenance.differences(step, inputs=False)) for step in self.steps])
            write_settings(self.settings, self.folder / RUN_FILE)
            if not any(self.provenance.read(step) for step in self.steps):
                self._examine()
            with Steps(self.console) as bars:
                ran = self._run_steps(bars)
                summary = self._conclude(ran, bars)
            if self.settings.in_place:
                self.swap.finish(self.plan.result)
            print_summary(summary, self.plan, self.swap, self.console)
        return summary

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against a second start, and end processes that a killed start left running in it."""
        with locked(self.folder, inside=True, busy="another `umed upgrade` is running in this folder"):
            ended = end_left_running(self.folder)
            if ended:
                self.console.print(f"ended {len(ended)} processes that a killed start had left running")
            yield

    def _examine(self) -> None:
        """Run the doctor on the input, and refuse an input on which an upgrade would fail.

        Raises:
            UmedError: each error with its remedy.
        """
        findings = examine(self.origin.checkpoint, self.origin.full if self.origin.lora else None)
        for finding in findings:
            self.console.print(
                f"doctor: {finding.severity} {finding.code}: {finding.found} ({finding.where})",
                soft_wrap=True,
            )
        accepted = {*_STOCK_LOADING_ERRORS, *self.settings.accept_findings}
        errors = [finding for finding in findings if finding.severity == ERROR and finding.code not in accepted]
        if errors:
            lines = [f"  {error.code}: {error.found} ({error.where})\n    {error.remedy}" for error in errors]
            codes = [error.code for error in errors]
            anyway = f" To upgrade anyway: --set accept_findings=[{','.join(codes)}]"
            raise UmedError(
                f"{self.origin.checkpoint}: cannot be upgraded as it is:\n"
                + "\n".join(lines)
                + f"\nDetails: `umed doctor {shlex.quote(str(self.origin.checkpoint))}`; with --fix it fixes what is safe."
                + ("" if {*codes} & {*_REFUSED_BY_TRAINING} else anyway)
            )

    def _handle_changes(self, changes: Sequence[tuple[Step, list[str]]]) -> None:
        """Refuse to run if steps have changed since they began; with ``redo_changed``, forget them and what depends on them."""
        changes = [(step, differences) for step, differences in changes if differences]
        if self.redo_changed:
            for step, _ in changes:
                self._forget(step)
            if changes:
                self._plan_again(told=False)  # a trial that is to be redone has decided nothing
        elif changes:
            lines = [f"  {step.title}: {'; '.join(differences)}" for step, differences in changes]
            raise UmedError(
                f"{self.folder}: these steps were made, or begun, from other settings or inputs:\n"
                + "\n".join(lines)
                + "\nUndo the change, choose another --out, or redo them and the steps that depend on them with --redo-changed."
            )

    def _forget(self, step: Step) -> None:
        """Forget a step, and all that was made from what it has made.

        Equal outputs do not spare those: records do not hold the pixels that they name.
        """
        self.provenance.forget(step)
        for other in self._users(step):
            if self.provenance.read(other):
                self._forget(other)

    def _users(self, step: Step) -> list[Step]:
        """The steps that take what this one makes."""
        return [other for other in self.steps if set(step.outputs) & set(other.inputs.values())]

    def _run_steps(self, bars: Steps) -> bool:
        """Run all steps that are left to run; returns whether one of them ran. What a step has made may decide on later ones."""
        if kept := what_is_kept(self.steps, self.provenance, self._is_left):
            self.console.print(one_line(kept), soft_wrap=True, markup=False)
        ran, number = False, 0
        while number < len(self.steps):
            ran |= self._run_step(self.steps[number], bars)
            if self.steps[number].name == "records":  # they say whether there are held-out studies
                going_on = stages_going_on(self.steps, self.provenance)
                check_stages(self.settings, self.origin, self.plan.held_out.has_val_if_built(), going_on)
            number += 1
            self._plan_again(told=number < len(self.steps))
        return ran

    def _plan_again(self, *, told: bool) -> None:
        """Plan the steps by what the records hold and what a trial has said.

        Args:
            told: say what the trial has said, when it is new.

        Raises:
            UmedError: a trial is asked for, and the records have no held-out studies to judge it by.
        """
        auto, before = self.settings.rewarding.run == "auto", self.plan.goes_on
        tried = auto and all(self.provenance.is_done(step) for step in self.plan.trial() if step.goal)
        if auto and not tried:
            self.plan.held_out.check()
            self.decision = self.plan.goes_on = None
        if tried:
            self.decision = decision_of(self.plan)
            self.plan.goes_on = self.decision.starts
            if told and before is None:
                follows = "stage 2 follows" if self.plan.goes_on else "the run ends with stage 1"
                words = one_line(f"rewarding: auto: {follows}: {' '.join(self.decision.reasons)}")
                self.console.print(words, soft_wrap=True, markup=False)
        self.steps = self.plan.steps()

    def _run_step(self, step: Step, bars: Steps) -> bool:
        """Run a step, unless it is done or no step that is left to run needs it; return whether it ran."""
        if not self._needed(step):
            return False
        self._handle_changes([(step, [*self.provenance.differences(step, inputs=True), *self.provenance.damage(step)])])
        if self.provenance.is_done(step):
            return False
        self._note_other_versions(step)
        for name in (SUMMARY, REPORT):  # of an earlier end; this start has not come to its own yet
            (self.folder / name).unlink(missing_ok=True)
        self.provenance.begin(step)
        log = self.folder / "logs" / f"{step.name}.log"
        began = log.stat().st_size if log.is_file() else 0
        bars.begin(step.title, note=f"log: {log}")
        run_logged(
            step.command, log, step.title, environment=self._environment(), progress=bars.update, bars=step.trains
        )
        self.provenance.end(step)
        bars.end()
        self._pass_on(step, read_from(log, began))
        if step.name == "evaluation_instruction_tuning" and REWARDING in self.settings.stages:
            self._warn_of_no_boxes()
        return True

    def _warn_of_no_boxes(self) -> None:
        """Say before stage 2 that stage 1's answers hold no box: stage 2 only reinforces boxes that are sampled."""
        from umed_plugin.evaluation.benchmarks.recipe_cases import cases_of
        from umed_plugin.evaluation.results import Evaluation

        cases = cases_of(Evaluation.load(self.folder / "evaluation" / "instruction_tuning"))
        with_lesion = [case for case in cases if case.true_boxes]
        if with_lesion and not any(case.boxes for case in with_lesion):
            self.console.print(
                f"umed: warning: after stage 1 no answer has a box ({len(with_lesion)} studies with a lesion). Stage 2 has "
                "nothing to reinforce then. Stage 1 is too short, or its data has no boxes: raise "
                "instruction_tuning.epochs or steps.",
                soft_wrap=True,
            )

    def _pass_on(self, step: Step, printed: str) -> None:
        """Show a step's warnings, and what its merge keeps, which otherwise stand in its log alone."""
        lines = dict.fromkeys(line for line in printed.splitlines() if line.startswith(_PASSED_ON))
        for line in [*lines][:_MOST_PASSED_ON]:
            self.console.print(f"{step.title}: {one_line(line)}", soft_wrap=True, markup=False)
        if len(lines) > _MOST_PASSED_ON:
            self.console.print(f"{step.title}: {len(lines) - _MOST_PASSED_ON} more warnings in its log", soft_wrap=True)

    def _environment(self) -> dict[str, str]:
        return {**importable(), MARK: str(self.folder)}

    def _note_other_versions(self, step: Step) -> None:
        """Resuming a step under other library versions may change its result."""
        record = self.provenance.read(step)
        before, now = record["versions"] if record else {}, versions()
        changed = [
            f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if record and changed:
            self.console.print(
                f"note: {step.title} was begun with other library versions: {', '.join(changed)}", soft_wrap=True
            )

    def _is_left(self, step: Step) -> bool:
        """Whether a step has to run."""
        return self._needed(step) and not self.provenance.is_done(step)

    def _needed(self, step: Step) -> bool:
        if step.goal or self.provenance.read(step) is None:
            return True
        return any(self._is_left(other) for other in self._users(step))

    def _conclude(self, any_ran: bool, bars: Steps) -> dict[str, Any]:
        """Write summary, manifest and report if a step ran or a file is missing.

        Otherwise they stay as they are: a later start would record other library versions than the steps ran with.
        """
        # A late import: it loads torch and transformers, whose messages would mix with the output of a dry run.
        from umed_plugin.commands.report.page import write_report

        summary, files = self.folder / SUMMARY, (self.plan.result / MANIFEST, self.folder / REPORT)
        if any_ran or not all(file.is_file() for file in (summary, *files)):
            write_manifest(summarise(self.plan, self.decision), self.plan, self.steps, self.provenance)
            bars.begin("writing the report")
            write_report(self.folder, progress=lambda _what, done, total: bars.update(done, total))
            bars.end()
        return read_json(summary)

    def _finish_swap(self) -> dict[str, Any]:
        """Complete a swap that an earlier start began."""
        trial = {step.name for step in self.plan.trial()}  # once there is a result, nothing rests on it
        steps = [step for step in self.steps if step.name not in trial]
        # A file that a setting names may lie in the checkpoint that was swapped, and changes nothing any more.
        changed = [
            line for step in steps for line in self.provenance.differences(step, inputs=False, named_files=False)
        ]
        if changed:
            raise UmedError(
                f"{self.folder}: the result of this run has replaced {self.swap.checkpoint}, and settings or data have changed "
                f"since it was made: {changed[0]}. Choose another --out."
            )
        if self.swap.done() and not self.swap.checkpoint.is_dir():
            raise UmedError(
                f"{self.swap.checkpoint}: the result of this run was put there, and is not there now. A copy of it is "
                f"{self.plan.result}."
            )
        self.swap.finish(self.plan.result)
        summary = read_json(self.folder / SUMMARY)
        print_summary(summary, self.plan, self.swap, self.console)
        return summary


def end_left_running(folder: Path) -> Sequence[int]:
    """Kill processes that a killed start in ``folder`` left running; return their ids.

    torchrun and DeepSpeed start their workers in sessions of their own, so killing the parent does not end them. A training that
    continued unnoticed would overwrite the checkpoints of the next start.
    """
    import psutil

    processes = marked_processes(MARK, str(folder))
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=60)
    return [process.pid for process in processes]
