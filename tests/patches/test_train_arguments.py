"""Flags of LLaVA's script under the patches: parsed, compared with the checkpoint, refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.llava_args import parse

from umed_plugin import patching
from umed_plugin.errors import UsageError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.patches import ALL, train_arguments

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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


def test_what_a_stage_leaves_out_is_said_before_it_is_loaded(flags, capsys):
    patching.apply(ALL)
    more = ["--umed_val_every", "5", "--umed_val_pictures", "9"]
    for stage in ("instruction_tuning", "rewarding"):
        parse([*flags, "--umed_stage", stage, *more])
        assert "umed: warning: --umed_val_pictures has no effect without --report_to" in capsys.readouterr().err


def test_a_rate_that_deepspeed_undoes_is_refused_only_until_there_is_a_checkpoint(flags, tmp_path):
    patching.apply(ALL)
    (tmp_path / "zero2.json").write_text('{"optimizer": {"type": "AdamW"}}')
    given = parse([*flags, "--learning_rate", "2e-4", "--mm_projector_lr", "2e-5", "--umed_stage", "rewarding"])
    given[2].deepspeed = str(tmp_path / "zero2.json")
    given[2].umed_top_p = 2.0  # a fault ends it before DeepSpeed starts
    with pytest.raises(UsageError, match="(?s)umed_top_p.*--mm_projector_lr 2e-05 has no effect"):
        train_arguments.start_run(*given)
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(UsageError, match="umed_top_p") as caught:
        train_arguments.start_run(*given)
    assert "has no effect" not in str(caught.value)


IN_PART = (("--lora_enable", "True"), ("--tune_mm_mlp_adapter", "True"))


@pytest.mark.parametrize("part", IN_PART)
@pytest.mark.parametrize("name", ["--mm_use_im_patch_token", "--mm_use_im_start_end"])
@pytest.mark.parametrize("stage", ["instruction_tuning", "rewarding"])
def test_added_tokens_whose_rows_would_be_lost_are_refused_before_training(flags, tiny_mistral, stage, name, part):
    patching.apply(ALL)
    with pytest.raises(UsageError, match=f"{name} True.* adds tokens that {tiny_mistral} does not have") as caught:
        parse([*flags, "--umed_stage", stage, *part, name, "True"])
    assert f"Train with {name} False" in str(caught.value)
    parse([*flags, "--umed_stage", stage, *part])
    parse([*flags, "--umed_stage", stage, name, "True"])  # full fine-tuning saves all rows


def test_llavas_default_of_the_patch_token_is_refused_for_lora(flags):
    patching.apply(ALL)
    at = flags.index("--mm_use_im_patch_token")
    left_out = [*flags[:at], *flags[at + 2 :], "--umed_stage", "instruction_tuning", "--lora_enable", "True"]
    with pytest.raises(UsageError, match=r"--mm_use_im_patch_token True \(LLaVA's default if you did not give it\)"):
        parse(left_out)


def test_the_trained_tower_is_not_lost_beside_the_projector(flags):
    """LLaVA has this flag among its model's arguments until training begins."""
    patching.apply(ALL)
    with pytest.raises(UsageError, match="LLaVA then saves the projector alone"):
        parse(
            [*flags, "--umed_stage", "instruction_tuning", "--umed_tower_lr", "1e-5", "--tune_mm_mlp_adapter", "True"]
        )


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


def test_no_stage_lets_ddp_search_for_unused_weights_unless_the_user_does(flags):
    """Also for one GPU, whose torchrun wraps the model in DDP as well."""
    patching.apply(ALL)
    stage = ["--umed_stage", "instruction_tuning", "--lora_enable", "True", "--gradient_checkpointing", "True"]
    assert parse([*flags, *stage])[2].ddp_find_unused_parameters is False
    assert parse([*flags, *stage, "--ddp_find_unused_parameters", "True"])[2].ddp_find_unused_parameters is True
    assert parse(flags)[2].ddp_find_unused_parameters is None


def test_a_share_of_stock_templates_needs_a_template_of_ours(flags):
    patching.apply(ALL)
    stage = ["--umed_stage", "instruction_tuning", "--umed_stock_template_share", "0.2"]
    parse([*flags, *stage])
    with pytest.raises(UsageError, match="--umed_stock_template_share has no effect with --version mistral_instruct"):
        parse([*flags, *stage, "--version", "mistral_instruct"])
