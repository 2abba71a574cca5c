"""Every patch against the installed LLaVA: it fits, it applies once in any order, and it leaves nothing behind."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.canaries import KINDS, hostile
from support.records import write_records
from support.umed_runs import ROOT, train_flags

from umed_plugin import patching
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.files.locks import INSIDE
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.patches import (
    ALL,
    STACK,
    TRIGGERS,
    attention_implementation,
    lora_resume,
    model_class,
    old_flags,
    shared_memory_build,
    torch_load,
    train_arguments,
    vision_tower,
    zero_3,
)
from umed_plugin.patches.attention_implementation import requested_attention
from umed_plugin.patches.training_run import TrainingRun
from umed_plugin.patching import PatchMisfit
from umed_plugin.patching.sources import surely_fits


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """The patches are for training processes: the other tests get LLaVA as it is, but for those that let it run (conftest.py)."""
    yield
    patching.undo_all()
    patching.apply(STACK)


def places() -> dict[str, object]:
    """What stands at every place that a patch can change."""
    import llava.conversation
    import llava.train.llama_xformers_attn_monkey_patch as xformers_patch
    from llava.model.language_model import llava_llama, llava_mistral
    from llava.model.llava_arch import LlavaMetaModel
    from llava.model.multimodal_encoder import clip_encoder
    from llava.train import llava_trainer
    from llava.train import train as llava_train
    from transformers import trainer as transformers_trainer
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    owners = [llava_train, llava_trainer, llava_trainer.LLaVATrainer, LlavaMetaModel, xformers_patch]
    owners += [clip_encoder, clip_encoder.CLIPVisionTower, llava_llama.LlavaLlamaForCausalLM, llava_llama.LlavaConfig]
    owners += [llava_mistral.LlavaMistralForCausalLM, llava_mistral.LlavaMistralConfig]
    owners += [transformers_trainer, transformers_trainer.Trainer, modeling_llama, modeling_mistral]
    owners += [modeling_llama.LlamaAttention, modeling_mistral.MistralAttention]
    found = {f"{owner.__name__}.{name}": value for owner in owners for name, value in vars(owner).items()}
    found.update(llava.conversation.conv_templates)
    if shared_memory_build.PATCH.not_needed() is None:
        found.update(build_shm_op=importlib.import_module("deepspeed.comm.torch").build_shm_op)
        engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
        found.update(cast=engine._cast_module_mixed_precision)
    found.update(load=torch.load, parser=llava_train.transformers.HfArgumentParser)
    return found


def differing(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) is not after.get(name)}


NEEDED = [patch for patch in ALL if patch.not_needed() is None]


@pytest.mark.parametrize("patch", NEEDED, ids=lambda patch: patch.name)
class TestEveryPatch:
    """One contract for all patches that the installed libraries want; both stacks together try them all."""

    @pytest.fixture(autouse=True)
    def nothing_in_place(self):
        places()  # LLaVA can be imported only while the patches for its libraries are in place
        patching.undo_all()

    def test_it_fits_the_installed_libraries(self, patch):
        assert patching.misfit(patch) is None

    def test_it_applies_once_and_is_undone(self, patch):
        before = places()
        patching.apply([patch])
        once = places()
        changed = differing(before, once)
        assert changed
        patching.apply([patch])
        assert differing(once, places()) == set()
        patching.undo(patch)
        assert differing(before, places()) == set()
        patching.undo(patch)
        patching.apply([patch])
        assert differing(before, places()) == changed

    def test_a_changed_source_is_refused(self, patch):
        targets = [dataclasses.replace(target, sha256=("0" * 64,)) for target in patch.targets if target.sha256]
        before = places()
        for target in targets:
            with pytest.raises(PatchMisfit, match=f"patch '{patch.name}' does not fit {target.path}"):
                patching.apply([dataclasses.replace(patch, targets=(target,))])
        assert differing(before, places()) == set()


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_its_file_says_what_it_must(patch):
    text = (ROOT / "patches" / f"{patch.name}.py").read_text()
    for part in ("Target", "Why:", "Versions:", "Delete when:"):
        assert part in text
    assert patch.why
    assert patch.delete_when


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_its_ranges_end_where_nobody_has_looked_further(patch):
    for target in patch.targets:
        assert not patching.version_fits("999", target.versions), "give the range an upper end"
    assert patch.needed is None or patching.version_fits("unknown", patch.needed[1])


@pytest.mark.parametrize("patch", [patch for patch in ALL if patch not in NEEDED], ids=lambda patch: patch.name)
def test_a_patch_for_other_libraries_changes_nothing(patch):
    before = places()
    assert patching.misfit(patch) is None
    patching.apply([patch])
    assert not patching.is_applied(patch)
    assert differing(before, places()) == set()


def test_any_order_of_all_patches_is_undone():
    places()
    patching.undo_all()
    before = places()
    expected = None
    for seed in range(5):
        patches = random.Random(seed).sample(ALL, len(ALL))
        for patch in patches:
            patching.apply([patch])
        changed = differing(before, places())
        assert expected in (None, changed)
        expected = changed
        patching.undo_all()
        assert differing(before, places()) == set()


def test_the_page_about_a_new_patch_shows_one_as_it_is_and_prints_its_hash(capsys):
    page = (ROOT / "docs" / "patches-contributing.md").read_text()
    (shown,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown == (ROOT / "patches" / "zero_3.py").read_text()
    (code,) = re.findall(r'\$python -c "\n(.*?)"; done', page, re.DOTALL)
    patching.apply(ALL)
    exec(code, {})
    assert capsys.readouterr().out.splitlines()[-1] in zero_3.PATCH.targets[0].sha256


def test_every_file_in_patches_is_listed():
    files = {file.stem for file in (ROOT / "patches").glob("*.py")} - {"__init__", "training_run", "main_script"}
    assert files == {patch.name for patch in ALL}
    assert all(patch.trigger in TRIGGERS for patch in ALL)


def test_the_command_lists_them_all_and_fails_on_a_misfit(capsys, monkeypatch):
    from umed_plugin import patches
    from umed_plugin.commands.patches import run

    assert run(argparse.Namespace(verbose=True)) == 0
    shown = capsys.readouterr().out
    assert all(patch.name in shown for patch in ALL)
    idle = len(ALL) - len(NEEDED)
    assert f"{len(NEEDED)} are in force under umed-run, {idle} are not needed" in shown
    assert shown.count("not needed: ") == idle > 0
    assert run(argparse.Namespace(verbose=False)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{len(ALL)} patches: {len(NEEDED)} are in force") and line.endswith("--verbose lists them.")
    patch = model_class.PATCH
    target = dataclasses.replace(patch.targets[0], sha256=("0" * 64,))
    monkeypatch.setattr(patches, "ALL", (ALL[0], dataclasses.replace(patch, targets=(target,))))
    assert run(argparse.Namespace(verbose=False)) == 1
    shown = capsys.readouterr().out
    assert "unknown SHA-256" in shown
    assert "1 do not fit. Training would stop before it starts." in shown


def parse(flags: list[str]):
    """LLaVA's three argument objects, as `train()` gets them under the patches."""
    from llava.train import train as llava_train

    classes = (llava_train.ModelArguments, llava_train.DataArguments, llava_train.TrainingArguments)
    return llava_train.transformers.HfArgumentParser(classes).parse_args_into_dataclasses(flags)


@pytest.fixture
def flags(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data")
    return train_flags(tiny_mistral, records, tmp_path / "out")


def test_flags_parse_and_survive_the_pickle_with_and_without_the_plugin(flags, tmp_path):
    patching.apply(ALL)
    model_args, data_args, training_args = parse([*flags, "--umed_stage", "rewarding", "--umed_num_candidates", "3"])
    assert training_args.umed.umed_num_candidates == 3
    assert data_args.umed_run is model_args.umed_run
    assert training_args.output_dir == str(tmp_path / "out")
    torch.save(training_args, tmp_path / "training_args.bin")
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert again.umed == training_args.umed
    patching.undo_all()
    stock = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(stock).__module__ == "llava.train.train"
    assert not hasattr(stock, "umed")
    assert stock.umed_num_candidates == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--umed_stge", "rewarding"], "unknown flag --umed_stge. Did you mean '--umed_stage'?"),
        (["--lora_enabled=True", "--nonsense", "1"], "unknown flag --lora_enabled. Did you mean '--lora_enable'?"),
        (["--tf32", "True"], "--use_cpu True --bf16 False --fp16 False --tf32 False"),
        (["--version", "umed_mistrall"], "Did you mean 'umed_mistral'"),
        (["--umed_stage", "instruction_tuning", "--version", "plain"], "no place for questions"),
        (["--umed_stage", "instruction_tuning", "--umed_stock_template_share", "2"], "from 0 to 1"),
        (["--umed_num_candidates", "4"], "no effect without --umed_stage"),
        (["--umed_stage", "instruction_tuning", "--model_name_or_path", "/no/checkpoint"], "no readable config.json"),
    ],
)
def test_wrong_flags_stop_before_anything_is_loaded(flags, more, words):
    patching.apply(ALL)
    with pytest.raises(UsageError) as caught:
        parse([*flags, *more])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "version", "fits"),
    [
        ("llava_mistral", "v1", False),
        ("llava_mistral", "umed_v1", False),
        ("llava_mistral", "llava_v1", False),
        ("llava_mistral", "v0", False),
        ("llava_mistral", "llama_2", False),
        ("llava_mistral", "mistral_instruct", True),
        ("llava_mistral", "umed_mistral", True),
        ("llava", "mistral_instruct", False),
        ("llava_llama", "umed_mistral", False),
        ("llava_llama", "v1", True),
        ("llava", "v0", True),
        ("llava", "llava_llama_2", True),
    ],
)
@pytest.mark.parametrize("stage", ["instruction_tuning", "rewarding"])
def test_a_template_of_another_family_than_the_checkpoints_is_refused(
    flags, tmp_path, stage, model_type, version, fits
):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    described = {"mm_vision_tower": "vision_tower", "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}
    (checkpoint / "config.json").write_text(json.dumps({"model_type": model_type, **described}))
    patching.apply(ALL)
    command = [*flags, "--model_name_or_path", str(checkpoint), "--version", version]
    if fits:
        parse([*command, "--umed_stage", stage])
        return
    with pytest.raises(UsageError, match=f"--version {version}: does not fit") as caught:
        parse([*command, "--umed_stage", stage])
    wanted = "umed_mistral" if model_type == "llava_mistral" else "umed_v1"
    assert f"Use --version {wanted}" in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--mm_vision_select_layer", "-1"),
        ("--mm_vision_select_feature", "cls_patch"),
        ("--mm_projector_type", "linear"),
        ("--vision_tower", "openai/clip-vit-large-patch14"),
    ],
)
@pytest.mark.parametrize("stage", ["instruction_tuning", "rewarding"])
def test_a_flag_that_the_checkpoint_contradicts_is_refused(flags, stage, flag, value):
    patching.apply(ALL)
    with pytest.raises(UsageError) as caught:
        parse([*flags, "--umed_stage", stage, flag, value])
    assert str(caught.value).count("\n  - ") == 1
    assert f"{flag} {value} (LLaVA's default" in str(caught.value)


def test_llavas_defaults_are_those_of_another_model(flags):
    """Whoever leaves layer and projector out trains one model and saves the description of another."""
    patching.apply(ALL)
    left_out = list(flags)
    for name in ("--mm_vision_select_layer", "--mm_projector_type"):
        at = left_out.index(name)
        del left_out[at : at + 2]
    with pytest.raises(UsageError) as caught:
        parse([*left_out, "--umed_stage", "rewarding"])
    assert "Use --mm_vision_select_layer -2." in str(caught.value)
    assert "Use --mm_projector_type mlp2x_gelu." in str(caught.value)


def test_flags_that_depart_from_the_checkpoint_are_said_before_it_is_loaded(flags, capsys):
    patching.apply(ALL)
    parse([*flags, "--umed_stage", "rewarding"])
    assert "warning" not in capsys.readouterr().err
    more = ["--mm_use_im_start_end", "True", "--mm_use_im_patch_token", "True", "--image_aspect_ratio", "square"]
    parse([*flags, *more, "--umed_stage", "rewarding", "--pretrain_mm_mlp_adapter", "p.bin"])
    said = capsys.readouterr().err
    for name in ("mm_use_im_start_end is True", "mm_use_im_patch_token is True", "image_aspect_ratio is square"):
        assert f"umed: warning: --{name}" in said
    assert "replaces the checkpoint's trained projector" in said


@pytest.mark.parametrize(
    ("file", "words"), [("adapter_config.json", "is a LoRA adapter"), ("mm_projector.bin", "a trained projector alone")]
)
def test_what_a_training_added_is_not_a_checkpoint_to_start_from(flags, tmp_path, file, words):
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_mistral", "mm_vision_tower": "x"}))
    (folder / file).write_text("{}")
    patching.apply(ALL)
    with pytest.raises(UsageError, match=words):
        parse([*flags, "--model_name_or_path", str(folder), "--umed_stage", "rewarding"])


def test_every_flag_is_in_the_help_of_llavas_script(capsys):
    patching.apply(ALL)
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert [flag.name for flag in dataclasses.fields(UmedFlags) if f"--{flag.name} " not in shown] == []


def test_without_a_stage_the_data_is_llavas_own(flags):
    from llava.train import train as llava_train

    patching.apply(ALL)
    _, data_args, training_args = parse(flags)
    assert training_args.umed == UmedFlags()
    module = llava_train.make_supervised_data_module(tokenizer=None, data_args=data_args)
    assert type(module["train_dataset"]) is llava_train.LazySupervisedDataset


def test_all_faults_of_all_patches_come_at_once(flags):
    patching.apply(ALL)
    wrong = [
        "--umed_stage",
        "rewarding",
        "--version",
        "nothing",
        "--umed_top_p",
        "2",
        "--model_name_or_path",
        "/no/where",
    ]
    with pytest.raises(UsageError) as caught:
        parse([*flags, *wrong])
    assert str(caught.value).count("\n  - ") == 3


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


def test_no_stage_lets_ddp_search_for_unused_weights_unless_the_user_does(flags):
    """Also for one GPU, whose torchrun wraps the model in DDP as well."""
    patching.apply(ALL)
    stage = ["--umed_stage", "instruction_tuning", "--lora_enable", "True", "--gradient_checkpointing", "True"]
    assert parse([*flags, *stage])[2].ddp_find_unused_parameters is False
    assert parse([*flags, *stage, "--ddp_find_unused_parameters", "True"])[2].ddp_find_unused_parameters is True
    assert parse(flags)[2].ddp_find_unused_parameters is None


def test_a_name_that_no_flag_has_cannot_be_accepted(flags):
    patching.apply(ALL)
    stage = ["--umed_stage", "instruction_tuning", "--umed_accept_changed", "seed,--learning_rat"]
    with pytest.raises(UsageError, match="learning_rat: there is no such flag. Did you mean 'learning_rate'"):
        parse([*flags, *stage])


def test_a_share_of_stock_templates_needs_a_template_of_ours(flags):
    patching.apply(ALL)
    stage = ["--umed_stage", "instruction_tuning", "--umed_stock_template_share", "0.2"]
    parse([*flags, *stage])
    with pytest.raises(UsageError, match="--umed_stock_template_share has no effect with --version mistral_instruct"):
        parse([*flags, *stage, "--version", "mistral_instruct"])


class Lengths(list):
    """A data set of which the trainer needs the lengths alone; below 0: without an image."""

    @property
    def modality_lengths(self) -> list[int]:
        return self


@pytest.mark.parametrize("grouped", ["--group_by_modality_length", "--group_by_length", "--remove_unused_columns"])
@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["images", "mixed"])
def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(flags, grouped, signs):
    from llava.train.llava_trainer import LLaVATrainer

    patching.apply(ALL)
    lengths = Lengths(sign * (i % 7 + 1) for i in range(20) for sign in signs)
    items = [{"input_ids": [0] * abs(length)} for length in lengths]

    def epochs(moved: int, *more: str) -> list[list[int]]:
        _, _, args = parse([*flags, "--umed_stage", "instruction_tuning", grouped, "True", *more])
        data = lengths if args.group_by_modality_length else items
        trainer = LLaVATrainer.__new__(LLaVATrainer)
        trainer.args, trainer.train_dataset = args, data
        trainer.tokenizer = trainer.processing_class = None
        sampler = trainer._get_train_sampler()
        found = []
        for _ in range(2):
            torch.rand(moved)
            before = torch.random.get_rng_state()
            found.append([int(index) for index in sampler])
            assert torch.equal(torch.random.get_rng_state(), before)
        assert sorted(found[0]) == list(range(len(sampler))) == sorted(found[1])
        return found

    first, second = epochs(0)
    assert first != second
    assert epochs(5) == [first, second]
    assert epochs(0, "--seed", "7") != [first, second]
    assert epochs(0, "--seed", "7", "--data_seed", "42") == [first, second]


@pytest.mark.parametrize(
    ("config", "path", "words"),
    [
        ({"model_type": "gpt2"}, "checkpoint", "'gpt2', which is not a LLaVA checkpoint"),
        ({"model_type": "mistral"}, "checkpoint", "without a projector"),
        ({"model_type": "llava"}, "attempt", "'mpt' in it"),
        ({"model_type": "llava"}, "checkpoint", None),
        ({"model_type": "llava_mistral"}, "checkpoint", None),
        ({"model_type": "mistral", "mm_vision_tower": "x"}, "checkpoint", None),
    ],
)
def test_what_is_no_llava_checkpoint_is_named(tmp_path_factory, config, path, words):
    folder = tmp_path_factory.getbasetemp() / "types" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    run = SimpleNamespace(
        active=True,
        model_args=SimpleNamespace(model_name_or_path=str(folder), pretrain_mm_mlp_adapter=None),
        training_args=SimpleNamespace(cache_dir=None),
    )
    faults = model_class.find_faults(run)
    assert len(faults) == (words is not None)
    assert words is None or words in faults[0]


@pytest.mark.parametrize(
    ("family", "model_type"), [("llama", "llava_llama"), ("llama", "llava"), ("mistral", "llava_mistral")]
)
def test_the_class_follows_the_model_type(family, model_type, request, tmp_path):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
    from llava.train import train as llava_train

    source = request.getfixturevalue(f"tiny_{family}")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in (file for file in source.iterdir() if file.is_file()):
        (checkpoint / file.name).write_bytes(file.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    patching.apply(ALL)
    # The keyword is new in transformers 4.36: None must pass through, as train() always gives it.
    model = llava_train.LlavaLlamaForCausalLM.from_pretrained(str(checkpoint), attn_implementation=None)
    assert type(model) is (LlavaMistralForCausalLM if family == "mistral" else LlavaLlamaForCausalLM)


def options(monkeypatch, *argv):
    """The flags as the wrapper of `train()` reads them."""
    from llava.train import train as llava_train

    patching.apply([patch for patch in (old_flags.PATCH, train_arguments.PATCH) if not patch.not_needed()])
    monkeypatch.setattr(sys, "argv", ["train_mem.py", "--output_dir", "x", *argv])
    return attention_implementation._options(llava_train)


@pytest.mark.parametrize("flag", [["--use_cpu", "True"], ["--use_cpu"], ["--use_cp", "yes"], ["--no_cuda", "True"]])
def test_flash_attention_falls_back_on_a_cpu_and_says_so(capsys, monkeypatch, flag):
    assert requested_attention("flash_attention_2", options(monkeypatch, *flag)) is None
    said = capsys.readouterr().out
    assert "--use_cpu was given" in said
    assert ("sdpa if the model supports it" in said) == attention_implementation._has_sdpa()


def test_flash_attention_is_kept_where_it_runs_and_other_requests_always(monkeypatch, capsys):
    on_gpu, on_cpu = options(monkeypatch, "--use_cpu", "False"), options(monkeypatch, "--use_cpu")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert requested_attention("flash_attention_2", on_gpu) == "flash_attention_2"
    assert requested_attention("eager", on_cpu) == "eager"
    assert requested_attention(None, on_gpu) is None
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert requested_attention("flash_attention_2", on_gpu) is None
    assert "flash-attn 2 or CUDA is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        (["--umed_attention", "eager"], "eager"),
        (["--umed_attention=sdpa"], "sdpa"),
        (["--umed_attention", "flash"], "flash_attention_2"),
        (["--umed_attention", "auto"], "eager"),
        ([], "eager"),
    ],
)
def test_the_flag_overrides_the_scripts_request(monkeypatch, capsys, spelling, expected):
    assert requested_attention("eager", options(monkeypatch, *spelling)) == expected
    assert capsys.readouterr().out == ""


def test_a_short_form_of_the_flag_could_be_the_attention_loss_too(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        requested_attention("eager", options(monkeypatch, "--umed_atten", "flash"))
    assert "could match --umed_attention, --umed_attention_loss" in capsys.readouterr().err


def refused(chosen, checkpoint, *, use_cpu=True, stage="rewarding"):
    flags = UmedFlags(umed_stage=stage, umed_attention=chosen)
    model_args = SimpleNamespace(model_name_or_path=str(checkpoint))
    training_args = SimpleNamespace(umed=flags, umed_stage=stage, use_cpu=use_cpu, cache_dir=None)
    return attention_implementation.find_faults(TrainingRun(model_args, None, training_args))


@pytest.mark.parametrize("stage", ["instruction_tuning", "rewarding"])
def test_an_attention_that_cannot_run_is_refused_with_the_reason(tiny_mistral, monkeypatch, stage):
    assert refused("flash", tiny_mistral, stage=stage) == [
        "--umed_attention flash: --use_cpu was given. Use another one, or auto."
    ]
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    (fault,) = refused("flash", tiny_mistral, use_cpu=False, stage=stage)
    assert "flash-attn 2 or CUDA is missing" in fault
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert refused("flash", tiny_mistral, use_cpu=False, stage=stage) == []
    assert refused("eager", tiny_mistral, stage=stage) == refused("auto", tiny_mistral, stage=stage) == []


def test_sdpa_is_refused_where_transformers_has_none_for_torch_or_model(tiny_mistral, tiny_llama, monkeypatch):
    monkeypatch.setattr(attention_implementation, "_has_sdpa", lambda: False)
    assert "no sdpa for this torch" in refused("sdpa", tiny_llama)[0]
    monkeypatch.setattr(attention_implementation, "_has_sdpa", lambda: True)
    assert refused("sdpa", tiny_llama) == []
    from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel

    mistral = refused("sdpa", tiny_mistral)
    if getattr(MistralPreTrainedModel, "_supports_sdpa", False):
        assert mistral == []
    else:
        assert "no sdpa for llava_mistral models" in mistral[0]


def load_as(caller: str, file: Path):
    """`torch.load` called from a module of that name."""
    namespace = {"__name__": caller, "torch": torch, "file": str(file)}
    exec("result = torch.load(file, map_location='cpu', weights_only=False)", namespace)
    return namespace["result"]


CALLERS = (
    "llava.model.builder",
    "transformers.trainer",
    "peft.peft_model",
    "accelerate.utils",
    "deepspeed.runtime.engine",
)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_of_a_checkpoint_run_no_code(kind, tmp_path):
    """Also where the caller switches the check off, as DeepSpeed does."""
    patching.apply([torch_load.PATCH])
    for name in ("mm_projector.bin", "rng_state.pth"):
        file = hostile(kind, tmp_path / name, tmp_path / "canary")
        for caller in CALLERS:
            with pytest.raises(UmedError, match=f"{name}: .*It was not loaded") as told:
                load_as(caller, file)
            assert "weights_only" not in str(told.value)
    assert not (tmp_path / "canary").exists()


def test_other_callers_load_as_they_please(tmp_path):
    patching.apply([torch_load.PATCH])
    load_as("somebody.else", hostile("reduce", tmp_path / "own.bin", tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def test_states_of_a_real_run_load(tmp_path):
    patching.apply([torch_load.PATCH])
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 10)
    states = {
        "optimizer.pt": optimizer.state_dict(),
        "scheduler.pt": scheduler.state_dict(),
        "non_lora_trainables.bin": {"w": torch.ones(2, dtype=torch.bfloat16)},
    }
    for name, state in states.items():
        torch.save(state, tmp_path / name)
        assert str(load_as("transformers.trainer", tmp_path / name)) == str(state)
    random_states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(random_states, tmp_path / "rng_state_0.pth")
    loaded = load_as("transformers.trainer", tmp_path / "rng_state_0.pth")
    np.random.set_state(loaded["numpy"])
    random.setstate(loaded["python"])
    assert torch.equal(loaded["cpu"], random_states["cpu"])
    assert np.array_equal(loaded["numpy"][1], random_states["numpy"][1])


def towered(source: Path, target: Path, *, shift=0.0, drop=0, shards=False, dtype=torch.float32) -> Path:
    """A copy of a tiny checkpoint that carries tower weights, ``shift`` away from the original ones."""
    target.mkdir()
    for file in (file for file in source.iterdir() if file.is_file()):
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    tower = load_file(source / "vision_tower" / "model.safetensors")
    tower = {
        f"model.vision_tower.vision_tower.{n}": (t + shift).to(dtype)
        for n, t in list(tower.items())[drop:]
        if "position_ids" not in n
    }
    if shards:
        (target / "model.safetensors").unlink()
        parts = {"pytorch_model-1.bin": weights, "pytorch_model-2.bin": tower}
        for name, part in parts.items():
            torch.save(part, target / name)
        places = {tensor: name for name, part in parts.items() for tensor in part}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        save_file({**weights, **tower}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def loaded_tower(checkpoint: Path, tiny: Path, flags: list[str], *more: str):
    """The model and its tower as `train()` has them before the first step."""
    from llava.train import train as llava_train

    tower = ["--vision_tower", str(tiny / "vision_tower"), "--umed_stage", "instruction_tuning"]
    model_args, data_args, training_args = parse([*flags, "--model_name_or_path", str(checkpoint), *tower, *more])
    model = llava_train.LlavaLlamaForCausalLM.from_pretrained(str(checkpoint))
    model.get_model().initialize_vision_modules(model_args=model_args, fsdp=training_args.fsdp)
    loaded = model.get_vision_tower()
    loaded.to(dtype=torch.float16, device=training_args.device)
    assert (data_args.umed_patch_size, data_args.umed_num_patches) == (8, 64)
    return model, loaded


@pytest.mark.parametrize("shards", [False, True], ids=["safetensors", "bin-shards"])
def test_the_checkpoints_own_tower_is_loaded_and_stock_is_told(tiny_mistral, flags, tmp_path, capsys, shards):
    checkpoint = towered(tiny_mistral, tmp_path / "towered", shift=0.5, shards=shards)
    original = load_file(tiny_mistral / "vision_tower" / "model.safetensors")
    patching.apply(ALL)
    model, tower = loaded_tower(checkpoint, tiny_mistral, flags)
    assert tower.dtype == torch.float32
    name = "vision_model.post_layernorm.weight"
    assert torch.allclose(tower.vision_tower.state_dict()[name], original[name].float() + 0.5)
    assert model.config.unfreeze_mm_vision_tower is True
    assert "by 0.5 at most" in capsys.readouterr().out
    model, tower = loaded_tower(checkpoint, tiny_mistral, flags, "--umed_tower_weights", "original")
    assert torch.equal(tower.vision_tower.state_dict()[name], original[name].float())
    assert not hasattr(model.config, "unfreeze_mm_vision_tower")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_equal_tower_is_said_to_be_equal_rounded_or_not(tiny_mistral, flags, tmp_path, capsys, dtype):
    patching.apply(ALL)
    model, _ = loaded_tower(towered(tiny_mistral, tmp_path / "towered", dtype=dtype), tiny_mistral, flags)
    assert "equal those of" in capsys.readouterr().out
    assert not hasattr(model.config, "unfreeze_mm_vision_tower")


@pytest.fixture
def said_by_transformers(monkeypatch) -> Iterator[list[str]]:
    """What it warns of while it loads."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_tower_tensors_are_not_listed_as_unused_where_they_are_loaded(
    tiny_mistral, flags, tmp_path, said_by_transformers, capsys
):
    """Another tensor that nothing uses still is, and so are the tower's where its weights are not asked for."""

    def listed(*more: str) -> set[str]:
        said_by_transformers.clear()
        loaded_tower(checkpoint, tiny_mistral, flags, *more)
        lists = [text for text in said_by_transformers if "were not used when" in text or "UNEXPECTED" in text]
        return {name for name in ("vision_tower", "model.stray") if name in "".join(lists)}

    checkpoint = towered(tiny_mistral, tmp_path / "towered")
    patching.apply(ALL)
    assert listed() == set() and "equal those of" in capsys.readouterr().out
    assert listed("--umed_tower_weights", "original") == {"vision_tower"}
    file = checkpoint / "model.safetensors"
    save_file({**load_file(file), "model.stray": torch.zeros(1)}, file, metadata={"format": "pt"})
    assert listed() == {"model.stray"}


def test_a_tower_that_does_not_fit_is_refused(tiny_mistral, flags, tmp_path):
    patching.apply(ALL)
    with pytest.raises(UmedError, match="2 tensors are missing"):
        loaded_tower(towered(tiny_mistral, tmp_path / "towered", drop=2), tiny_mistral, flags)


def test_lora_stays_out_of_a_tower_that_is_loaded_early(tiny_mistral, flags, tmp_path):
    from llava.train import train as llava_train
    from peft import LoraConfig, get_peft_model

    patching.apply(ALL)
    model, _ = loaded_tower(tiny_mistral, tiny_mistral, flags)
    names = llava_train.find_all_linear_names(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    places = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert places
    assert not [name for name in places if "vision_tower" in name or "mm_projector" in name]
    assert vision_tower._outside_the_tower(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(1, 1)}), ["q_proj"]) == [
        "q_proj"
    ]


def test_without_a_stage_the_tower_is_only_made_computable(tiny_mistral, flags, tmp_path, capsys):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    patching.apply(ALL)
    args = SimpleNamespace(mm_vision_select_layer=-2)
    tower = CLIPVisionTower(str(tiny_mistral / "vision_tower"), args)
    assert tower.to(dtype=torch.float16, device="cpu").dtype == torch.float32
    assert tower.to(dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    assert vision_tower._computable(tower, {"dtype": torch.float16, "device": "cuda:0"})["dtype"] == torch.float16
    tower.umed_keep_fp32 = True
    assert vision_tower._computable(tower, {"dtype": torch.float16, "device": "cuda:0"})["dtype"] == torch.float32


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


class AnyTrainer:
    """Takes what LLaVA hands to its trainer."""

    def __init__(self, *, model, args):
        self.model, self.args, self.callbacks = model, args, []

    def add_callback(self, callback):
        self.callbacks.append(callback)


def test_the_trainer_is_chosen_by_the_stage_and_trains_float32_without_deepspeed(monkeypatch, capsys):
    import torch
    from llava.train import train as llava_train

    monkeypatch.setattr(llava_train, "LLaVATrainer", AnyTrainer)
    ours = type("RewardingTrainer", (AnyTrainer,), {})
    monkeypatch.setitem(sys.modules, "umed_plugin.training.trainer", SimpleNamespace(RewardingTrainer=ours))
    tuning = type("TuningTrainer", (AnyTrainer,), {})
    monkeypatch.setitem(sys.modules, "umed_plugin.training.tuning_trainer", SimpleNamespace(TuningTrainer=tuning))
    from umed_plugin.patches import trainer

    def made(**changes):
        """The trainer for these arguments, and the dtype of its bf16 model then."""
        values = {"umed_stage": None, "bf16": False, "fp16": False, "deepspeed": None, "fsdp": [], "world_size": 1}
        values |= {"process_index": 0, "umed_tower_lr": None, "umed_stop_after": 0}
        args = SimpleNamespace(**{**values, **changes})
        args.umed = UmedFlags(**{name: value for name, value in changes.items() if name.startswith("umed_")})
        model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
        chosen = llava_train.LLaVATrainer(model=model, args=args)
        return type(chosen), model.weight.dtype, len(chosen.callbacks)

    recorder = patching.Recorder()
    trainer.PATCH.apply(recorder)
    try:
        assert made(bf16=True) == (AnyTrainer, torch.bfloat16, 0)
        assert made(umed_stage="instruction_tuning") == (AnyTrainer, torch.bfloat16, 1)
        assert made(umed_stage="rewarding", bf16=True) == (ours, torch.float32, 1)
        assert made(umed_stage="instruction_tuning", fp16=True) == (AnyTrainer, torch.float32, 1)
        assert made(umed_stage="instruction_tuning", umed_attention_loss=0.03)[0] is tuning
        assert made(umed_stage="instruction_tuning", umed_keep="0.1")[0] is tuning
        assert made(umed_stage="instruction_tuning", umed_replay=0.2)[0] is tuning
        assert made(umed_stage="rewarding", bf16=True, deepspeed="zero2.json") == (ours, torch.bfloat16, 0)
        assert not capsys.readouterr().err
        assert made(umed_stage="instruction_tuning", bf16=True, fsdp=["full_shard"]) == (AnyTrainer, torch.bfloat16, 0)
        assert "--fsdp trains weights of 16 bits" in capsys.readouterr().err
    finally:
        recorder.undo()


@pytest.mark.parametrize("patch", NEEDED, ids=lambda patch: patch.name)
def test_the_files_alone_show_that_a_patch_fits(patch):
    """`umed patches` imports neither torch nor LLaVA for it; whether the hash is the imported object's, the tests above show."""
    assert surely_fits(patch)
    for target in patch.targets:
        if target.module == "transformers":
            continue  # a name that it lacks is looked for in all its models
        other = dataclasses.replace(target, path=f"{target.path}_2")
        assert not surely_fits(dataclasses.replace(patch, targets=(other,)))
        if target.sha256:
            other = dataclasses.replace(target, sha256=("0" * 64,))
            assert not surely_fits(dataclasses.replace(patch, targets=(other,)))


def test_the_command_imports_no_library_and_is_silent(tmp_path):
    code = (
        "import sys; from umed_plugin import cli; status = cli.main(['patches']);"
        "print(status, sorted({'torch', 'transformers', 'llava', 'monai', 'bitsandbytes'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "0 []\n"
