"""What a run finds in its output folder: another stage, other records, a checkpoint that lacks something."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.llava_args import parse

from umed_plugin import patching
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.files.locks import INSIDE
from umed_plugin.patches import ALL, lora_resume
from umed_plugin.patches.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_a_checkpoint_of_the_other_stage_in_the_output_folder_is_refused(flags, tmp_path):
    patching.apply(ALL)
    marker = tmp_path / "out" / "checkpoint-5" / lora_resume.MARKER
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"umed_stage": "instruction_tuning"}))
    (marker.parent / "trainer_state.json").write_text("{}")
    with pytest.raises(UsageError, match="checkpoint-5 belongs to --umed_stage instruction_tuning"):
        parse([*flags, "--umed_stage", "rewarding"])
    parse([*flags, "--umed_stage", "instruction_tuning"])
    for damaged, said in (
        ("{}", "umed.json: has no umed_stage"),
        ("[]", "umed.json: holds a list"),
        ("{", "is not JSON"),
    ):
        marker.write_text(damaged)
        with pytest.raises(UmedError, match=said):
            parse([*flags, "--umed_stage", "instruction_tuning"])


def test_a_checkpoint_without_state_or_optimizer_is_not_resumed_in_silence(flags, tmp_path, capsys):
    patching.apply(ALL)
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="checkpoint-5 has no trainer_state.json"):
        parse([*flags, "--umed_stage", "instruction_tuning"])
    (checkpoint / "trainer_state.json").write_text("{}")
    parse([*flags, "--umed_stage", "instruction_tuning"])
    assert "holds no optimizer" in capsys.readouterr().err
    (checkpoint / "optimizer.pt").write_bytes(b"")
    parse([*flags, "--umed_stage", "instruction_tuning"])
    assert "holds no optimizer" not in capsys.readouterr().err


def test_a_checkpoint_without_deepspeeds_files_is_not_resumed_with_deepspeed(flags, tmp_path):
    """--save_only_model leaves them out, and DeepSpeed then finds no checkpoint at all."""
    patching.apply(ALL)
    model_args, data_args, args = parse([*flags, "--umed_stage", "instruction_tuning"])
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    args.deepspeed = "zero2.json"
    run = TrainingRun(model_args, data_args, args)
    (fault,) = lora_resume.find_faults(run)
    assert "checkpoint-5 has no global_step* folder" in fault and "saved with --save_only_model" in fault
    (checkpoint / "global_step5").mkdir()
    assert lora_resume.find_faults(run) == []


def test_the_finished_other_stage_in_the_output_folder_is_refused(flags, tmp_path):
    """A LoRA run that saved no checkpoint on its way leaves its mark when it saves its state at the end."""
    from llava.train.llava_trainer import LLaVATrainer

    patching.apply(ALL)
    with pytest.raises(UsageError, match="instruction_tunin"):
        parse([*flags, "--umed_stage", "instruction_tunin"])
    assert not (tmp_path / "out").exists(), "a run that is refused leaves no folder"
    _, _, training_args = parse([*flags, "--umed_stage", "instruction_tuning"])
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [INSIDE], "the run holds its folder"
    state = SimpleNamespace(save_to_json=lambda path: None)
    LLaVATrainer.save_state(SimpleNamespace(args=training_args, state=state, is_world_process_zero=lambda: True))
    with pytest.raises(UsageError, match="its content belongs to --umed_stage instruction_tuning"):
        parse([*flags, "--umed_stage", "rewarding"])
    parse([*flags, "--umed_stage", "instruction_tuning"])


def test_other_records_of_a_recipe_are_refused_when_they_are_built(flags, tmp_path):
    patching.apply(ALL)
    _, _, args = parse([*flags, "--umed_stage", "instruction_tuning", "--umed_recipe", "brain_tumor_coco"])
    run = SimpleNamespace(active=True, flags=args.umed, training_args=args, say=print)
    lora_resume.check_records(run, [{"id": 1, "image": "/a/1.png"}])
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    lora_resume._mark(SimpleNamespace(args=args), checkpoint)
    assert json.loads((checkpoint / lora_resume.MARKER).read_text())["settings"]["records"]["path"] == "1 records"
    lora_resume.check_records(run, [{"id": 1, "image": "/b/1.png"}])
    with pytest.raises(
        UsageError, match="the records of --umed_recipe 2 records .*: checkpoint-5 was trained with 1 records"
    ):
        lora_resume.check_records(run, [{"id": 1, "image": "/a/1.png"}, {"id": 2}])
    args.umed_accept_changed = "records"
    run.flags = args.umed
    lora_resume.check_records(run, [{"id": 1, "image": "/a/1.png"}, {"id": 2}])


def test_a_name_that_no_flag_has_cannot_be_accepted(flags):
    patching.apply(ALL)
    stage = ["--umed_stage", "instruction_tuning", "--umed_accept_changed", "seed,--learning_rat"]
    with pytest.raises(UsageError, match="learning_rat: there is no such flag. Did you mean 'learning_rate'"):
        parse([*flags, *stage])


class Adapted(torch.nn.Module):
    """A projector that is trained beside an adapter."""

    def __init__(self):
        super().__init__()
        self.mm_projector = torch.nn.Linear(2, 2)
        self.lora_A = torch.nn.Linear(2, 2)


def test_a_lora_checkpoint_without_all_that_was_trained_is_refused(tmp_path):
    model = Adapted()
    with pytest.raises(UmedError, match=r"has no non_lora_trainables\.bin"):
        lora_resume._load_non_lora(model, tmp_path)
    torch.save({"mm_projector.weight": torch.ones(2, 2)}, tmp_path / lora_resume.NON_LORA)
    with pytest.raises(UmedError, match=r"missing \['mm_projector.bias'\]"):
        lora_resume._load_non_lora(model, tmp_path)
    weights = {f"mm_projector.{name}": torch.full_like(p, 7) for name, p in model.mm_projector.named_parameters()}
    torch.save(weights, tmp_path / lora_resume.NON_LORA)
    lora_resume._load_non_lora(model, tmp_path)
    assert torch.equal(model.mm_projector.weight, torch.full((2, 2), 7.0))
