"""`umed upgrade` without training: settings, the plan's commands, which steps count as done, the swap, processes left running."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from support.umed_runs import environment, train_flags

from umed_plugin import cli
from umed_plugin.commands.machine import this_machine
from umed_plugin.commands.upgrade.checkpoint_swap import CheckpointSwap
from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.commands.upgrade.provenance import Provenance
from umed_plugin.commands.upgrade.run import MARK, Upgrade, end_left_running
from umed_plugin.commands.upgrade.settings import Settings, as_yaml, write_settings
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.commands.upgrade.training import what_is_trained
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.files import write_json


def settings_of(checkpoint: Path, **changes: object) -> Settings:
    return read_settings(None, {"checkpoint": str(checkpoint), "recipe": "demo_studies", **changes})


def upgrade_of(checkpoint: Path, folder: Path, redo: bool = False, **changes: object) -> Upgrade:
    return Upgrade(folder, settings_of(checkpoint, **changes), Console(quiet=True), redo)


def flags_of(step: Step) -> dict[str, str]:
    words = [*step.command]
    return {word[2:]: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}


@pytest.mark.llava
@pytest.mark.parametrize("said", [None, False, True])
def test_a_plan_asks_for_no_token_whose_row_lora_would_lose(said, tiny_mistral, tmp_path):
    """Where config.json says nothing, LLaVA's default adds <im_patch>. Full fine-tuning saves its row."""
    checkpoint = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-own")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["mm_use_im_patch_token"]
    told = {} if said is None else {"mm_use_im_patch_token": said}
    (checkpoint / "config.json").write_text(json.dumps({**config, **told}))

    def asked(method: str) -> set[str]:
        steps = upgrade_of(checkpoint, tmp_path / method, method=method).steps
        found = (flags_of(step) for step in steps)
        return {flags["mm_use_im_patch_token"] for flags in found if "mm_use_im_patch_token" in flags}

    if said:
        with pytest.raises(UmedError, match="config.json says mm_use_im_patch_token, whose tokens its tokenizer lacks"):
            asked("lora")
    else:
        assert asked("lora") == {"False"}
    assert asked("full") == {str(said is not False)}


@pytest.mark.llava
def test_the_run_file_says_all_settings_and_is_read_back_the_same(tiny_mistral, tmp_path):
    settings = upgrade_of(tiny_mistral, tmp_path / "run").settings
    write_settings(settings, tmp_path / "run.yaml")
    assert read_settings(tmp_path / "run.yaml", {}) == settings
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert set(written) == set(Settings.model_fields)
    # What depends on machine and checkpoint is written down, not left open.
    open_keys = {key for key, value in settings.flat().items() if value is None}
    assert open_keys == {
        *("base", "data_root", "deepspeed", "instruction_tuning.steps", "rewarding.epochs", "rewarding.reward_weights"),
        *("evaluation.limit", "evaluation.recipe", "evaluation.data_root", "label_share", "lora.targets"),
    }
    assert settings.device == "cpu" and settings.precision == "fp32"
    # Each key stands under a line that says what it is.
    lines = as_yaml(settings).splitlines()
    keys = [i for i, line in enumerate(lines) if line and not line.lstrip().startswith("#")]
    assert all(lines[i - 1].lstrip().startswith("#") for i in keys)


@pytest.mark.llava
def test_bad_images_are_left_out_of_the_evaluations_too(tiny_mistral, tmp_path):
    for on_bad_image in ("stop", "skip"):
        steps = upgrade_of(tiny_mistral, tmp_path / "run", on_bad_image=on_bad_image).steps
        commands = [" ".join(step.command) for step in steps if step.name.startswith("evaluation_")]
        assert commands and all(("--on-bad-image skip" in each) == (on_bad_image == "skip") for each in commands)


@pytest.mark.llava
def test_both_stages_augment_and_take_complementary_shares_of_the_labels(tiny_mistral, tmp_path):
    plain = {step.name: step for step in upgrade_of(tiny_mistral, tmp_path / "run").steps}
    changed = {
        step.name: step for step in upgrade_of(tiny_mistral, tmp_path / "run", augment=True, label_share=0.4).steps
    }
    for name in ("stage_1_instruction_tuning", "stage_2_rewarding"):
        flags = flags_of(changed[name])
        assert (flags["umed_augment"], flags["umed_label_share"]) == ("True", "0.4")
        assert {"umed_augment", "umed_label_share"}.isdisjoint(flags_of(plain[name]))
        newer = {"augment": True, "label_share": 0.4}
        assert changed[name].settings == {**plain[name].settings, **newer}, "a run begun before them goes on"
    assert all(changed[name].settings == plain[name].settings for name in plain if not plain[name].trains)
    with pytest.raises(UmedError, match="label_share"):
        upgrade_of(tiny_mistral, tmp_path / "run", label_share=1)
    # One stage alone is augmented by its own flags.
    one = upgrade_of(tiny_mistral, tmp_path / "run", **{"instruction_tuning.flags": {"umed_augment": True}}).steps
    assert [flags_of(step).get("umed_augment") for step in one if step.trains] == ["True", None]


@pytest.mark.llava
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewarding.candidate": 4}, "rewarding.*candidate.*Did you mean 'candidates'"),
        ({"rewarding.candidates": 1}, "umed_num_candidates 1: must be 2 or more"),
        ({"method": "qlora"}, "method.*lora"),
        ({"instruction_tuning.flags": {"umed_algorithm": "ppo"}}, "instruction_tuning.*no effect in"),
        ({"rewarding.flags": {"umed_kl_cof": 0.1}}, "rewarding: unknown flag 'umed_kl_cof'.*umed_kl_coef"),
        ({"rewarding.flags": {"learning_rate": 1}}, "rewarding.flags: learning_rate cannot be set there"),
        ({"rewarding.rewards": ["localisation"]}, "unknown reward 'localisation'"),
        ({"deepspeed": "/nowhere.json"}, "deepspeed: /nowhere.json: no such file"),
        ({"data_root": "/nowhere"}, "data_root: /nowhere: no such folder"),
        ({"precision": "fp16"}, "precision: fp16 needs a GPU"),
        ({"device": "cuda"}, "device: cuda, but torch sees no GPU"),
        ({"base": "/tmp"}, "base has no effect"),
        ({"recipe": "demo_studis"}, "unknown recipe 'demo_studis'"),
        (
            {"name": "my-lora"},
            "name: stock LLaVA chooses its loader by the folder's name.*should contain llava and mistral",
        ),
        ({"accept_findings": ["tower-mooved"]}, "unknown finding 'tower-mooved'.*'tower-moved'"),
        ({"method": "full", "lora.r": 4}, "lora: has no effect"),
        ({"rewarding.steps": None}, "set one of epochs and steps, and the other to null"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_runs(changes, words, tiny_mistral, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UmedError, match=f"(?s){words}"):
        upgrade_of(tiny_mistral, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.llava
def test_a_length_in_epochs_takes_the_one_in_steps_away_and_the_other_way_round(tiny_mistral):
    settings = settings_of(tiny_mistral, **{"instruction_tuning.steps": 5, "rewarding.epochs": 2})
    assert (settings.instruction_tuning.steps, settings.instruction_tuning.epochs) == (5, None)
    assert (settings.rewarding.steps, settings.rewarding.epochs) == (None, 2)


@pytest.mark.parametrize("run", ["auto", "never"])
def test_the_short_form_of_a_stage_keeps_its_other_settings(tiny_mistral, tmp_path, run):
    """In every order, and over a file."""
    both = {"rewarding.candidates": 16, "rewarding": run}
    for given in (both, dict(reversed(both.items()))):
        settings = settings_of(tiny_mistral, **given)
        assert (settings.rewarding.run, settings.rewarding.candidates) == (run, 16)
    file = tmp_path / "my.yaml"
    file.write_text(f"checkpoint: {tiny_mistral}\nrecipe: demo_studies\nrewarding: {{candidates: 16, steps: 300}}\n")
    settings = read_settings(file, {"rewarding": run})
    assert (settings.rewarding.run, settings.rewarding.candidates, settings.rewarding.steps) == (run, 16, 300)


def test_a_number_that_yaml_reads_as_text_is_a_number(tiny_mistral, tmp_path):
    """As the page has it: without a point, YAML 1.1 knows no exponent."""
    file = tmp_path / "my.yaml"
    flags = "{umed_tower_lr: 2e-6, run_name: e6, umed_reward_weights: '4,2,1'}"
    file.write_text(f"checkpoint: {tiny_mistral}\nrecipe: demo_studies\ninstruction_tuning: {{flags: {flags}}}\n")
    read = read_settings(file, {})
    assert read.instruction_tuning.flags == {"umed_tower_lr": 2e-6, "run_name": "e6", "umed_reward_weights": "4,2,1"}
    assert "the vision tower is trained at 2e-06" in what_is_trained("instruction_tuning", read)


@pytest.mark.parametrize("seed", [-1, 2**31, 20261129101112])
def test_a_seed_that_no_generator_takes_is_refused_before_anything_runs(tiny_mistral, seed, capsys):
    with pytest.raises(UmedError, match="seed"):
        settings_of(tiny_mistral, seed=seed)
    for command in (
        ["demo", "--seed", str(seed)],
        ["upgrade", str(tiny_mistral), "--recipe", "r", "--seed", str(seed)],
    ):
        assert cli.main(command) == 2
        assert "must be a whole number from 0 to 2147483647" in capsys.readouterr().err


@pytest.mark.llava
def test_the_command_line_is_written_into_the_run_file_and_wins_over_it(tiny_mistral, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(
        f"checkpoint: {tiny_mistral}\nrecipe: demo_studies\nrewarding: {{candidates: 5}}\n"
    )
    call = ["upgrade", "--config", "my.yaml", "--out", "run", "--dry-run"]
    assert cli.main(call) == 0
    out = capsys.readouterr().out
    assert "--umed_num_candidates 5 " in out and "--umed_val_every" not in out.partition("# The records")[0]
    added = "--umed_val_every 50 to instruction tuning and --umed_val_every 20 to rewarding"
    assert f"# The records are not built yet. If they have a split val, the run adds {added}.\n" in out
    assert "# rewarding trains a LoRA adapter of rank 128, alpha 256, dropout 0 on" in out
    more = ["--candidates", "6", "--set", "rewarding.learning_rate=1e-3", "--rewards", "relevance,localization"]
    assert cli.main([*call, *more, "--method", "full"]) == 0
    out = capsys.readouterr().out
    assert "--umed_num_candidates 6 " in out and "--learning_rate 0.001 " in out and "--lora_enable True" not in out
    assert "--umed_rewards relevance,localization " in out
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"], "a dry run writes nothing"
    assert cli.main(["upgrade", str(tiny_mistral)]) == cli.main(["upgrade"]) == 2
    assert "--recipe missing" in capsys.readouterr().err


@pytest.mark.llava
def test_a_reward_with_a_file_and_a_weight_that_changes(tiny_mistral, tmp_path, monkeypatch, capsys):
    """Training runs in another folder, so the file's path becomes absolute; its faults are said at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.yaml").write_text("steps: {side: {left: [left]}}\ncases: [{side: left}]\n")
    (tmp_path / "bad.yaml").write_text("steps: {side: {left: [left]}}\ncases: [{side: right}]\n")
    call = ["upgrade", str(tiny_mistral), "--recipe", "demo_studies", "--dry-run", "--rewards"]
    assert cli.main([*call, "relevance,symbolic:steps.yaml", "--set", "rewarding.reward_weights=[1, 0..0.5]"]) == 0
    out = capsys.readouterr().out
    assert f"--umed_rewards relevance,symbolic:{tmp_path}/steps.yaml " in out
    assert "--umed_reward_weights 1,0..0.5 " in out
    assert cli.main([*call, "symbolic:bad.yaml"]) == 1
    assert "cases[0].side: unknown symbol 'right'" in capsys.readouterr().err


@pytest.mark.llava
def test_a_dry_run_prints_commands_and_no_librarys_words(tiny_mistral, tmp_path):
    command = [sys.executable, "-m", "umed_plugin.cli", "upgrade", str(tiny_mistral), "--recipe", "demo_studies"]
    run = subprocess.run([*command, "--dry-run"], env=environment(), cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line]
    programs = str(Path(sys.executable).parent)
    assert run.returncode == 0 and len(lines) >= 16
    assert all(line.startswith(("# ", "export PYTHONPATH=", programs)) for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.llava
def test_relative_paths_of_a_run_file_begin_at_its_folder(tiny_mistral, tmp_path):
    (tmp_path / "checkpoint").symlink_to(tiny_mistral)
    (tmp_path / "run.yaml").write_text("checkpoint: checkpoint\nrecipe: mine.yaml\n")
    settings = read_settings(tmp_path / "run.yaml", {})
    assert settings.checkpoint == str(tmp_path / "checkpoint") and settings.recipe == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_every_command_is_one_that_its_program_takes(family, method, request, tmp_path):
    """`umed`'s parser takes its own; LLaVA's script is given what the tests of training give it, from the checkpoint's config."""
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    steps = upgrade_of(checkpoint, tmp_path / "run", method=method).steps
    assert [step.name for step in steps] == [
        *("records", "evaluation_base", "stage_1_instruction_tuning", "checkpoint_instruction_tuning"),
        *("evaluation_instruction_tuning", "stage_2_rewarding", "checkpoint_rewarding", "evaluation_rewarding"),
    ]
    for step in steps:
        if "llava.train.train_mem" not in step.command:
            at = next(i for i, word in enumerate(step.command) if word in ("recipe", "evaluate", "merge"))
            cli.build_parser().parse_args(step.command[at:])
            continue
        given = flags_of(step)
        records = tmp_path / "run" / "data" / "records.json"
        expected = train_flags(checkpoint, records, Path(given["output_dir"]))
        known = {expected[i][2:]: expected[i + 1] for i in range(0, len(expected), 2)}
        for flag in ("version", "vision_tower", "mm_vision_select_layer", "mm_projector_type", "image_aspect_ratio"):
            assert given[flag] == known[flag], flag
        assert given["use_cpu"] == "True" and given["data_path"] == str(records)
        assert given["lora_enable"] == str(method == "lora")
    first, second = steps[2], steps[5]
    assert flags_of(first)["model_name_or_path"] == str(checkpoint)
    assert flags_of(second)["model_name_or_path"] == str(steps[3].outputs[0])
    assert flags_of(second)["learning_rate"] == {"lora": "3e-05", "full": "1e-06"}[method]


@pytest.mark.llava
def test_several_processes_are_started_by_torchrun_with_a_configuration_of_deepspeed_too(tiny_llama, tmp_path):
    """DeepSpeed's launcher ignores CUDA_VISIBLE_DEVICES where it is told a number of GPUs, and has one port for all runs."""
    config = tmp_path / "zero2.json"
    config.write_text("{}")
    two = upgrade_of(tiny_llama, tmp_path / "run", processes=2).steps[2]
    assert "--nproc_per_node 2 -m llava.train.train_mem" in two.line() and "torch" in two.line().split(" --")[0]
    deep = upgrade_of(tiny_llama, tmp_path / "run", processes=2, deepspeed=str(config)).steps[2]
    assert "--rdzv_endpoint localhost:0 --nproc_per_node 2 -m llava.train.train_mem" in deep.line()
    chosen = upgrade_of(tiny_llama, tmp_path / "run", processes=2, deepspeed=str(config), master_port=29511).steps[2]
    assert "--rdzv_endpoint localhost:29511 " in chosen.line()
    assert f"--deepspeed {config}" in deep.line()
    assert config in deep.files.values(), "another configuration is another training"
    config.write_text('{"optimizer": {"type": "AdamW"}}')


@pytest.mark.llava
def test_deepspeeds_own_optimizer_is_refused_until_a_training_has_begun(tiny_llama, tmp_path):
    """The default rate of the projector has no effect under it. A run that began so before that was refused goes on."""
    config = tmp_path / "zero3.json"
    config.write_text('{"optimizer": {"type": "AdamW"}}')
    given = {"method": "lora", "deepspeed": str(config)}
    stages = ("instruction_tuning", "rewarding")
    without = dict.fromkeys((f"{stage}.projector_learning_rate" for stage in stages), None)
    plan = {step.name: step for step in upgrade_of(tiny_llama, tmp_path / "run", **given, **without).steps}
    begun = [plan["stage_1_instruction_tuning"], plan["stage_2_rewarding"]]
    for number, step in enumerate(begun):
        with pytest.raises(UmedError, match="--mm_projector_lr .* has no effect") as caught:
            upgrade_of(tiny_llama, tmp_path / "run", **given)
        hints = [f"Here: --set {stage}.projector_learning_rate=null." in str(caught.value) for stage in stages]
        assert hints == [number == 0, True]
        (step.outputs[0] / "checkpoint-2").mkdir(parents=True)
    plan = {step.name: step for step in upgrade_of(tiny_llama, tmp_path / "run", **given).steps}
    (tmp_path / "run" / "made").mkdir()
    for step in (plan[step.name] for step in begun):  # a finished run whose trainings were removed to save space
        shutil.rmtree(step.outputs[0])
        about = {"outputs": {}, "settings": {**step.settings, **step.digests}}
        write_json(tmp_path / "run" / "made" / f"{step.name}.json", about)
    upgrade_of(tiny_llama, tmp_path / "run", **given)
    with pytest.raises(UmedError, match="(?s)instruction_tuning: --mm_projector_lr.*rewarding: --mm_projector_lr"):
        upgrade_of(tiny_llama, tmp_path / "run", **given, **{"instruction_tuning.steps": 7})


def test_gpus_before_ampere_train_in_fp16(tiny_llama, tmp_path, monkeypatch):
    """torch 2.13 says that a T4 supports bf16: it counts emulation, which transformers refuses with tf32. Made-up GPUs."""
    for majors, precision in (((8, 9), "bf16"), ((9, 7), "fp16")):
        properties = [SimpleNamespace(major=major, total_memory=16 * 2**30) for major in majors]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        assert this_machine().precision == precision
    with pytest.raises(
        UmedError, match="precision: bf16 needs GPUs of Ampere or later, all of them. Use precision: fp16"
    ):
        Upgrade(tmp_path / "run", settings_of(tiny_llama, precision="bf16"), Console(quiet=True)).run()


def small_step(folder: Path, run: Path, **settings: object) -> Step:
    source, out = folder / "input.txt", run / "out.txt"
    copy = f"open({str(out)!r}, 'w').write(open({str(source)!r}).read() + {settings.get('word', '')!r})"
    return Step("copy", "copying", (sys.executable, "-c", copy), settings, {"text": source}, (out,), goal=True)


def run_step(provenance: Provenance, step: Step) -> None:
    provenance.begin(step)
    subprocess.run(step.command, check=True)
    provenance.end(step)


def test_a_step_is_done_by_what_lies_on_disk_alone(tmp_path):
    (tmp_path / "input.txt").write_text("a")
    step, provenance = small_step(tmp_path, tmp_path, word="b"), Provenance(tmp_path)
    provenance.begin(step)
    assert not provenance.is_done(step), "it has only begun"
    run_step(provenance, step)
    assert Provenance(tmp_path).is_done(step) and (tmp_path / "out.txt").read_text() == "ab"
    assert Provenance(tmp_path).differences(step, inputs=True) == []

    changed = Provenance(tmp_path).differences(small_step(tmp_path, tmp_path, word="c"), inputs=True)
    assert changed == ['word was "b" and is "c"']
    os.utime(tmp_path / "input.txt", (1, 1))
    assert Provenance(tmp_path).differences(step, inputs=True) == [], "a copy is the same file"
    (tmp_path / "input.txt").write_text("x")
    assert (
        f"text ({tmp_path / 'input.txt'}) is not the file that it was"
        in Provenance(tmp_path).differences(step, inputs=True)[0]
    )
    (tmp_path / "out.txt").write_text("edited")
    assert (
        not Provenance(tmp_path).is_done(step)
        and "was changed after it was made" in Provenance(tmp_path).damage(step)[0]
    )
    (tmp_path / "out.txt").unlink()
    assert not Provenance(tmp_path).is_done(step) and Provenance(tmp_path).damage(step) == []


def test_what_nobody_knows_the_origin_of_is_not_used_and_not_removed(tmp_path):
    (tmp_path / "input.txt").write_text("a")
    (tmp_path / "out.txt").write_text("mine")
    with pytest.raises(UmedError, match=r"out.txt: exists already, but .*copy.json"):
        Provenance(tmp_path).begin(small_step(tmp_path, tmp_path))
    assert (tmp_path / "out.txt").read_text() == "mine"


def test_a_command_that_makes_nothing_is_an_error(tmp_path):
    (tmp_path / "input.txt").write_text("a")
    step, provenance = small_step(tmp_path, tmp_path), Provenance(tmp_path)
    provenance.begin(step)
    with pytest.raises(UmedError, match="ended with status 0, but .*out.txt does not exist"):
        provenance.end(step)


@pytest.mark.llava
def test_a_folder_that_is_no_run_is_left_alone(tiny_mistral, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UmedError, match=r"contains files but no run.yaml"):
        upgrade_of(tiny_mistral, tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.llava
def test_a_run_inside_its_checkpoint_is_refused_before_it_writes(tiny_mistral, tmp_path, monkeypatch, capsys):
    """All files of the checkpoint count as input: those of the run would change it with each step, and no start would go on."""
    checkpoint = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-own")
    monkeypatch.chdir(checkpoint)
    before = sorted(checkpoint.rglob("*"))
    for more in ([], ["--dry-run"], ["--out", "."]):
        assert cli.main(["upgrade", ".", "--recipe", "demo_studies", *more]) == cli.WRONG_USAGE
        said = capsys.readouterr().err
        assert f"the checkpoint {checkpoint}, which the run reads" in said and "another --out" in said
    assert sorted(checkpoint.rglob("*")) == before
    assert cli.main(["upgrade", ".", "--recipe", "demo_studies", "--out", "../run", "--dry-run"]) == 0


@pytest.mark.llava
def test_a_checkpoint_that_the_run_would_replace_is_refused(tiny_mistral, tmp_path):
    """As the result of an earlier run there: --redo-changed would remove it."""
    checkpoint = shutil.copytree(tiny_mistral, tmp_path / "run" / "checkpoint" / "llava-mistral-own")
    (tmp_path / "run" / "run.yaml").touch()
    with pytest.raises(UsageError, match="reads it as its checkpoint, and would replace it"):
        upgrade_of(checkpoint, tmp_path / "run", redo=True, name=checkpoint.name).check()


@pytest.mark.llava
def test_a_dry_run_refuses_what_the_run_refuses(tiny_mistral, tmp_path, capsys):
    checkpoint = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-own")
    call = ["upgrade", str(checkpoint), "--recipe", "demo_studies", "--dry-run"]
    (tmp_path / "file").touch()
    assert cli.main([*call, "--out", str(tmp_path)]) == 1
    assert "contains files but no run.yaml" in capsys.readouterr().err
    assert cli.main([*call, "--out", str(tmp_path / "file")]) == cli.WRONG_USAGE
    assert "file: is a file, where a folder is needed. Choose another --out." in capsys.readouterr().err
    (tmp_path / "llava-mistral-own.before-umed").mkdir()
    assert cli.main([*call, "--out", str(tmp_path / "run"), "--in-place"]) == 1
    assert "before-umed exists, perhaps from an earlier upgrade" in capsys.readouterr().err


@pytest.mark.llava
def test_a_start_that_was_killed_before_it_wrote_its_settings_is_gone_on_with(tiny_mistral, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", "run.yaml.partial"):
        (tmp_path / "run" / name).write_text("")
    with pytest.raises(UmedError, match="records by recipe demo_studies ended with status 1"):
        upgrade_of(tiny_mistral, tmp_path / "run").run()  # there is no data


@pytest.mark.llava
def test_a_start_that_does_not_come_to_its_end_leaves_no_end_of_an_earlier_one(tiny_mistral, tmp_path, capsys):
    """`umed status` would call it done, and the next start would show the old figures as its own."""
    folder = tmp_path / "run"
    again = upgrade_of(tiny_mistral, folder)
    write_settings(again.settings, folder / "run.yaml")
    (folder / "logs").mkdir()
    for name in ("summary.json", "report.html"):
        (folder / name).write_text("{}")
    with pytest.raises(UmedError, match="records by recipe demo_studies ended with status 1"):
        again.run()  # there is no data
    assert not (folder / "summary.json").exists() and not (folder / "report.html").exists()
    assert cli.main(["status", str(folder)]) == 1
    assert "stopped before its end" in capsys.readouterr().out


@pytest.mark.llava
def test_changed_settings_of_a_begun_step_are_named_and_nothing_runs(tiny_mistral, tmp_path):
    first = upgrade_of(tiny_mistral, tmp_path / "run")
    write_settings(first.settings, tmp_path / "run" / "run.yaml")
    training = first.steps[2]
    provenance = Provenance(tmp_path / "run")
    # As a killed start leaves it; its inputs are there.
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "records.json").write_text("[]")
    provenance.begin(training)
    (training.outputs[0] / "checkpoint-2").mkdir(parents=True)
    again = upgrade_of(tiny_mistral, tmp_path / "run", **{"instruction_tuning.learning_rate": 0.5, "seed": 3})
    with pytest.raises(UmedError) as refused:
        again.run()
    told = str(refused.value)
    assert (
        "stage 1: instruction tuning: instruction_tuning.learning_rate was 0.0002 and is 0.5; seed was 0 and is 3"
        in told
    )
    assert "--redo-changed" in told and (training.outputs[0] / "checkpoint-2").is_dir()
    kept = read_settings(tmp_path / "run" / "run.yaml", {})
    assert kept == first.settings, "the run file still says what the run was made with"
    again.redo_changed = True
    again._handle_changes([(training, ["seed was 0 and is 3"])])
    assert not training.outputs[0].exists() and Provenance(tmp_path / "run").read(training) is None


@pytest.mark.llava
def test_two_starts_in_one_folder_do_not_meet(tiny_mistral, tmp_path):
    first, second = (upgrade_of(tiny_mistral, tmp_path / "run") for _ in range(2))
    first.folder.mkdir()
    with first._locked(), pytest.raises(UmedError, match="another `umed upgrade` is running"), second._locked():
        pass


@pytest.mark.llava
def test_what_a_killed_start_left_running_is_ended_and_nothing_else(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    marks = (str(tmp_path), str(tmp_path / "other"))
    # As torchrun starts them: in sessions of their own.
    ours, others = (subprocess.Popen(sleep, env={**os.environ, MARK: mark}, start_new_session=True) for mark in marks)
    try:
        assert end_left_running(tmp_path) == [ours.pid]
        assert ours.poll() is not None and others.poll() is None
    finally:
        others.kill()
        others.wait()


@pytest.mark.parametrize("stopped_after", ["nothing", "copy", "state", "backup", "staged", "done"])
def test_the_swap_ends_the_same_wherever_it_was_stopped(stopped_after, tmp_path):
    checkpoint, result = tmp_path / "llava", tmp_path / "run" / "checkpoint" / "llava-umed"
    for folder, text in ((checkpoint, "old"), (result, "new")):
        (folder / "vision_tower").mkdir(parents=True)
        (folder / "weights").write_text(text)
        (folder / "config.json").write_text(json.dumps({"mm_vision_tower": str(folder / "vision_tower")}))
    swap, stops = CheckpointSwap(tmp_path / "run", checkpoint), ["nothing", "copy", "state", "backup", "staged", "done"]
    reached = stops.index(stopped_after)
    swap.check()
    if reached >= 1:
        swap._stage(result)
    if reached >= 2:
        swap.state_file.parent.mkdir()
        swap.state_file.write_text("{}")
    if reached >= 3:
        checkpoint.rename(swap.backup)
    if reached >= 4:
        swap.staged.rename(checkpoint)
    assert swap.begun() == (reached >= 2)
    again = CheckpointSwap(tmp_path / "run", checkpoint)
    again.finish(result)
    again.finish(result)
    assert (checkpoint / "weights").read_text() == "new" and (swap.backup / "weights").read_text() == "old"
    assert json.loads((checkpoint / "config.json").read_text())["mm_vision_tower"] == str(checkpoint / "vision_tower")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "llava.before-umed", "run"]
    with pytest.raises(UmedError, match="from an earlier upgrade"):
        CheckpointSwap(tmp_path / "another", checkpoint).check()


@pytest.mark.llava
def test_a_lora_folder_is_not_upgraded_in_place(tiny_mistral, tmp_path):
    adapter = tmp_path / "llava-mistral-lora"
    adapter.mkdir()
    (adapter / "config.json").write_text((tiny_mistral / "config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_mistral)}))
    steps = upgrade_of(adapter, tmp_path / "run").steps
    assert steps[0].name == "start" and shlex.split(steps[0].line())[-6:-2] == [
        str(adapter),
        "--base",
        str(tiny_mistral),
        "--out",
    ]
    with pytest.raises(UmedError, match="in_place: the result is a full checkpoint"):
        upgrade_of(adapter, tmp_path / "run", in_place=True)


@pytest.mark.llava
def test_the_doctor_stops_an_upgrade_that_would_go_wrong_and_says_the_remedy(tiny_mistral, tmp_path):
    sick = shutil.copytree(tiny_mistral, tmp_path / "sick-llava-mistral")
    (sick / "tokenizer.model").unlink()
    with pytest.raises(
        UmedError, match=r"(?s)cannot be upgraded.*tokenizer-missing.*accept_findings=\[tokenizer-missing\]"
    ):
        upgrade_of(sick, tmp_path / "run").run()
    assert not (tmp_path / "run" / "logs").exists()
    with pytest.raises(UmedError, match=r"(?s)evaluation: base|records by recipe"):
        upgrade_of(sick, tmp_path / "run", accept_findings=["tokenizer-missing"]).run()
    assert list((tmp_path / "run" / "logs").iterdir()), "it has gone on"


@pytest.mark.llava
def test_nothing_is_offered_to_be_accepted_that_training_refuses(tiny_mistral, tmp_path):
    sick = shutil.copytree(tiny_mistral, tmp_path / "sick-llava-mistral")
    config = json.loads((sick / "config.json").read_text())
    tower = shutil.copytree(config["mm_vision_tower"], tmp_path / "tower", dirs_exist_ok=True)
    write_json(sick / "config.json", {**config, "mm_vision_tower": str(tower)})
    processor = json.loads((tower / "preprocessor_config.json").read_text())
    write_json(tower / "preprocessor_config.json", {**processor, "do_resize": False})
    with pytest.raises(UmedError, match="(?s)cannot be upgraded.*tower-image-size: do_resize is false") as caught:
        upgrade_of(sick, tmp_path / "run").run()
    assert "accept_findings" not in str(caught.value)
    (tower / "model.safetensors").unlink()
    write_json(tower / "preprocessor_config.json", processor)
    with pytest.raises(UmedError, match="(?s)cannot be upgraded.*tower-incomplete: contains no weights") as caught:
        upgrade_of(sick, tmp_path / "run").run()
    assert "accept_findings" not in str(caught.value)


@pytest.mark.llava
def test_what_only_stock_loading_stumbles_over_does_not_stop_an_upgrade(tiny_mistral, tmp_path):
    named = shutil.copytree(tiny_mistral, tmp_path / "medical-model")
    run = upgrade_of(named, tmp_path / "run")
    run._examine()
    assert run.settings.name == "llava-mistral-umed"


@pytest.mark.llava
def test_a_checkpoint_that_cuts_images_into_tiles_is_refused(tiny_mistral, tmp_path):
    tiles = shutil.copytree(tiny_mistral, tmp_path / "tiles-llava-mistral")
    config = json.loads((tiles / "config.json").read_text())
    (tiles / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "anyres"}))
    with pytest.raises(UmedError, match="image_aspect_ratio anyres: boxes are defined for pad and square"):
        upgrade_of(tiles, tmp_path / "run")


def test_a_missing_run_file_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_settings(tmp_path / "run.yaml", {})


def swapped(tmp_path: Path) -> tuple[CheckpointSwap, Path]:
    """A swap that is about to begin, and its result."""
    checkpoint, result = tmp_path / "llava", tmp_path / "run" / "checkpoint" / "llava-umed"
    for folder, text in ((checkpoint, "old"), (result, "new")):
        (folder / "vision_tower").mkdir(parents=True)
        (folder / "weights").write_text(text)
        (folder / "config.json").write_text(json.dumps({"mm_vision_tower": str(folder / "vision_tower")}))
    return CheckpointSwap(tmp_path / "run", checkpoint), result


@pytest.mark.parametrize("recorded", [True, False])
def test_a_complete_swap_is_left_alone_when_its_backup_is_removed(recorded, tmp_path):
    """Also if the run was killed after the last rename, before it wrote that the swap was done."""
    swap, result = swapped(tmp_path)
    swap.finish(result)
    shutil.rmtree(swap.backup)
    if not recorded:
        swap.state_file.write_text("{}")
    for _ in range(2):
        swap.finish(result)
        assert (swap.checkpoint / "weights").read_text() == "new"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "run"]
    assert swap.done()


def test_a_swap_whose_folders_were_moved_loses_none_of_them(tmp_path):
    swap, result = swapped(tmp_path)
    swap._stage(result)
    swap.state_file.parent.mkdir()
    swap.state_file.write_text("{}")
    shutil.copytree(swap.checkpoint, swap.backup)
    with pytest.raises(UmedError, match="both exist, and neither is the result"):
        swap.finish(result)
    assert (swap.checkpoint / "weights").read_text() == (swap.backup / "weights").read_text() == "old"
    shutil.rmtree(swap.staged)  # and the copy is made again
    shutil.rmtree(swap.checkpoint)
    swap.finish(result)
    assert (swap.checkpoint / "weights").read_text() == "new" and (swap.backup / "weights").read_text() == "old"


def test_a_folder_of_the_users_is_not_taken_for_the_copy(tmp_path):
    swap, result = swapped(tmp_path)
    swap.staged.mkdir()
    (swap.staged / "notes.txt").write_text("mine")
    with pytest.raises(UmedError, match=r"umed-new: is left as it is.*no config\.json"):
        swap.finish(result)
    assert (swap.staged / "notes.txt").read_text() == "mine" and (swap.checkpoint / "weights").read_text() == "old"
