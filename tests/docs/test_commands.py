"""Every command in README.md and docs/ is valid, and a test runs it; the recipe commands run here as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import DOCS, blocks, commands, pages
from support.umed_runs import ROOT, environment

from umed_plugin import cli
from umed_plugin.data.recipes.recipe import load_recipe

pytestmark = pytest.mark.one_stack
# The beginning of a command, and the test that runs it or, with device, size and folders swapped, what it calls. The longest
# beginning counts.
RUN_BY = {
    "make demo": "commands/test_demo.py::test_the_demo_runs_from_start_to_end",
    "make test": "docs/test_commands.py::test_every_command_is_valid_and_has_a_test",
    "pip install .": "test_packaging.py::test_a_wheel_installs",
    "pip install 'openai>=1.40'": "docs/test_commands.py::test_the_openai_that_is_asked_for_is_the_extras_and_is_here",
    "umed patches": "patches/test_patches.py::test_the_command_lists_them_all_and_fails_on_a_misfit",
    "umed demo": "commands/test_demo.py::test_the_demo_runs_from_start_to_end",
    "umed status": "commands/test_status.py::test_a_run_that_is_going_on_says_where_it_is",
    "umed report": "commands/test_report.py::test_the_command_writes_report_and_picture",
    "umed report runs/seed0 runs/seed1": "commands/test_report.py::test_several_runs_get_an_index_of_their_reports",
    "umed report runs/seed0 --picture": "commands/test_demo.py::test_the_demo_runs_from_start_to_end",
    "umed upgrade": "commands/test_upgrade_runs.py::test_killed_in_every_step_it_ends_as_the_run_that_was_not",
    "nohup umed upgrade": "commands/test_upgrade_runs.py::test_killed_in_every_step_it_ends_as_the_run_that_was_not",
    "umed upgrade --presets": "commands/test_presets.py::test_all_presets_are_listed_and_set_known_keys",
    "umed upgrade checkpoints/llava-med-v1.5-mistral-7b --recipe ms_cxr": "commands/test_presets.py::"
    "test_the_dry_run_of_pfmvg_names_its_numbers",
    "umed upgrade --config": "commands/test_upgrade.py::test_a_dry_run_prints_commands_and_no_librarys_words",
    "umed-run bash scripts/v1_5/finetune_task_lora.sh": "docs/test_scripts.py::"
    "test_the_scripts_and_commands_lead_from_a_checkpoint_to_its_evaluation",
    "umed-run deepspeed": "training/test_deepspeed.py::test_stage_1_lora_under_zero_2_trains_on_two_nodes_and_is_merged",
    "umed merge": "docs/test_scripts.py::test_the_scripts_and_commands_lead_from_a_checkpoint_to_its_evaluation",
    "umed evaluate": "docs/test_scripts.py::test_the_scripts_and_commands_lead_from_a_checkpoint_to_its_evaluation",
    "umed evaluate checkpoints/llava-mistral-stage1 --benchmark vqa_rad": "evaluation/test_server.py::"
    "test_the_server_writes_the_same_answers",
    "umed evaluate ./checkpoints/llava-mistral-stage1 --benchmark vqa_rad": "evaluation/test_benchmark_files.py::"
    "test_every_benchmark_runs_and_says_the_same_again",
    "umed evaluate ./checkpoints/llava-mistral-stage2 --benchmark vqa_rad": "evaluation/test_benchmark_files.py::"
    "test_every_benchmark_runs_and_says_the_same_again",
    "umed evaluate ./checkpoints/llava-mistral-stage1 --benchmark ms_cxr": "evaluation/test_phrases.py::"
    "test_the_evaluation_of_a_recipe_has_the_figures_of_its_phrases",
    "umed evaluate ./checkpoints/llava-mistral-stage1 --benchmark report:": "evaluation/test_reports.py::"
    "test_the_command_of_the_page",
    "umed evaluate runs/demo/checkpoint/llava-mistral-umed --benchmark probes:demo_studies": "evaluation/test_probes.py::"
    "test_the_command_of_the_page",
    "umed evaluate ./checkpoints/llava-mistral-stage1 --benchmark brain_tumor_coco "
    "--data-root /data/brain_tumor_coco --similar": (
        "training/test_similar_records.py::test_both_stages_train_with_them_and_evaluate_asks_with_them"
    ),
    "torchrun --nproc_per_node 8 --no-python umed evaluate": "evaluation/test_benchmarks.py::"
    "test_two_ranks_end_with_the_files_of_one_process_also_after_a_kill",
    "umed serve": "commands/test_serving_command.py::test_the_command_ends_cleanly_and_tells_nothing_of_patients",
    "umed serve ./checkpoints/llava-mistral-stage2 --compare": "commands/test_serving_command.py::"
    "test_two_checkpoints_are_served_by_one_command",
    "umed rollout-server": "commands/test_rollout_server.py::test_the_command_becomes_the_server",
    "umed convert checkpoints/llava-mistral-stage1 --language-model-only": "checkpoints/test_language_model.py::"
    "test_the_language_model_gives_the_same_logits",
    "umed convert": "checkpoints/test_convert.py::test_back_in_llavas_layout_it_is_the_same_checkpoint",
    "python examples/trl_grpo.py": "rewards/test_trl.py::test_the_example_trains_and_its_model_goes_back_to_llava",
    "umed doctor": "commands/test_doctor.py::test_the_command_prints_and_exits_by_the_worst",
    "umed recipe": "docs/test_commands.py::test_the_recipe_commands_run",
    **dict.fromkeys(
        (
            *("mkdir -p mau/", "cp downloads/", "for part in downloads/", "unzip -qn downloads/"),
            *("umed recipe check mau ", "umed recipe build mau --data-root mau --out mau/built/mau.json"),
        ),
        "data/test_mau_page.py::test_from_five_downloads_to_mau_json",
    ),
    **dict.fromkeys(
        (
            "umed recipe build mau --data-root mau --out mau/built/mau.json --writer",
            "umed recipe review mau/built/mau.json",
        ),
        "data/test_writing.py::test_the_commands_of_the_page_fit",
    ),
    **dict.fromkeys(
        ("umed recipe check frames.yaml", "umed recipe build frames.yaml"),
        "pseudo_boxes/test_recipes.py::test_the_pages_example_runs",
    ),
    "python benchmarks/pseudo_boxes.py": "pseudo_boxes/test_benchmark.py::"
    "test_figures_controls_and_the_choice_of_a_rule_are_printed",
    "python benchmarks/labels_day.py": "pseudo_boxes/test_day.py::"
    "test_from_labels_alone_to_an_evaluation_on_true_boxes_by_one_command",
    "umed recipe build mau_labels": "pseudo_boxes/test_recipes.py::test_the_pages_mixture_is_built",
    **dict.fromkeys(
        ("umed recipe agreement", "umed recipe review mau/built/mau.json --disagreements"),
        "data/test_review.py::test_a_settled_disagreement_counts_instead_of_the_reviewers",
    ),
    "for python in .venv/bin/python": "docs/test_commands.py::test_the_hash_that_the_page_prints_is_the_patchs",
    "UMED_WRITE_DOCS=1": "docs/test_generated.py::test_a_page_that_is_out_of_date_is_named_and_written_anew",
    ".venv/bin/umed patches": "patches/test_patches.py::test_the_command_lists_them_all_and_fails_on_a_misfit",
    "python benchmarks/demo_table.py": "commands/test_demo.py::test_the_demo_runs_from_start_to_end",
    "python benchmarks/stock_template.py": "commands/test_demo.py::test_the_demo_runs_from_start_to_end",
    "python benchmarks/ablation.py": "benchmarks/test_ablation.py::"
    "test_rows_go_on_from_their_start_and_stage_1_continued_gets_the_same_wall_time",
    "UMED_DATA_ROOT=/data/brain_tumor_coco python benchmarks/study.py": "benchmarks/test_study.py::"
    "test_a_study_from_end_to_end",
    "python benchmarks/box_shapes.py": "benchmarks/test_study.py::test_the_shapes_of_a_studys_boxes",
    "python benchmarks/study.py": "benchmarks/test_study.py::test_a_study_from_end_to_end",
    "python benchmarks/keeping.py": "benchmarks/test_keeping.py::test_a_tiny_run_prints_captions_boxes_and_cosine",
    "python benchmarks/rewarding_step.py": "benchmarks/test_rewarding_step.py::test_a_small_step_is_measured_on_both_sides",
    "python benchmarks/trl_step.py": "benchmarks/test_trl_step.py::test_a_small_step_of_both_trainers_is_measured",
    "python benchmarks/smollm2.py": "benchmarks/test_smollm2.py::test_both_stages_train_it",
    "python benchmarks/gpu.py": "benchmarks/test_gpu.py::"
    "test_both_stages_are_measured_under_every_attention_with_torch_and_transformers_alone",
    "python benchmarks/feature_cache.py": "training/test_feature_cache.py::"
    "test_the_benchmark_prints_both_sides_and_what_is_saved",
    "python benchmarks/faults.py": "benchmarks/test_faults.py::test_a_step_that_is_killed_ends_as_the_one_that_was_not",
    "python benchmarks/real_size.py": "benchmarks/test_small_runs.py::"
    "test_every_row_of_the_real_size_runs_on_a_small_checkpoint",
    "python benchmarks/bombs.py": "benchmarks/test_small_runs.py::test_a_bomb_takes_less_memory_than_allowed",
    "python benchmarks/images.py": "benchmarks/test_small_runs.py::test_images_of_every_format_are_read_by_every_side",
    "python benchmarks/augmentation.py": "benchmarks/test_augmentation.py::test_the_command_prints_a_row_for_each_format",
    "python benchmarks/records.py": "benchmarks/test_small_runs.py::test_records_are_the_same_in_memory_and_by_index",
    "python benchmarks/building.py": "benchmarks/test_small_runs.py::test_builds_with_and_without_a_pool_are_compared",
    "python benchmarks/rollout_server.py": "engine/test_benchmark.py::"
    "test_the_benchmark_prints_what_is_equal_and_shared",
    "python benchmarks/shared_evaluation.py": "benchmarks/test_small_runs.py::"
    "test_ranks_and_one_process_write_the_same_evaluation",
    "python benchmarks/probing.py": "benchmarks/test_neighbours.py::"
    "test_probing_trains_with_and_without_probes_and_compares",
    "python benchmarks/phrases.py": "benchmarks/test_phrases.py::test_boxes_are_compared_with_those_to_the_other_phrase",
    "python benchmarks/looks.py": "benchmarks/test_neighbours.py::"
    "test_descriptions_of_unseen_classes_are_compared_with_bare_names",
    "python benchmarks/similar_cases.py": "benchmarks/test_neighbours.py::test_similar_cases_are_compared_with_none",
    "python benchmarks/evaluating.py": "benchmarks/test_small_runs.py::test_answers_with_and_without_sharing_are_compared",
}
COMMANDS = sorted({command for page in pages() for command in commands(page)})


def entry(command: str) -> str:
    """The beginning in `RUN_BY` that counts for a command."""
    fitting = [beginning for beginning in RUN_BY if command.startswith(beginning)]
    assert fitting, f"no test runs {command!r}: name one in RUN_BY"
    return max(fitting, key=len)


@pytest.mark.llava
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_valid_and_has_a_test(command: str) -> None:
    """Valid: `make` has the target, `umed` takes the arguments, the script is there."""
    arguments = shlex.split(command.partition(" > ")[0], comments=True)
    if arguments[0] == "make":
        subprocess.run(["make", "-n", *arguments[1:]], cwd=ROOT, check=True, capture_output=True, timeout=60)
    if arguments[0] == "nohup":
        arguments = arguments[1:]
    if arguments[0] == "umed":
        cli.build_parser().parse_args(arguments[1:])
    if arguments[0] == "python":
        assert (ROOT / arguments[1]).is_file()
    file, _, test = RUN_BY[entry(command)].partition("::")
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file} has no {test}"


def test_every_entry_is_for_a_command_of_the_pages() -> None:
    assert {entry(command) for command in COMMANDS} == set(RUN_BY)


def test_no_page_hides_commands_in_blocks_of_another_kind() -> None:
    languages = {language for page in pages() for language in re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)}
    assert languages <= {"bash", "diff", "yaml", "python", "text", "bibtex"}
    other = [block for page in pages() for language in ("text", "yaml", "python") for block in blocks(page, language)]
    assert not [
        line
        for block in other
        for line in block.splitlines()
        if re.match(r"\$ |(umed|umed-run|pip|make|python) ", line)
    ]


def test_the_openai_that_is_asked_for_is_the_extras_and_is_here() -> None:
    from importlib.metadata import version

    from packaging.requirements import Requirement

    (command,) = [command for command in COMMANDS if command.startswith("pip install 'openai")]
    wanted = Requirement(shlex.split(command)[-1])
    (extra,) = re.findall(r'^judge = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(wanted.specifier) < set(Requirement(extra).specifier) and version("openai") in wanted.specifier


@pytest.mark.llava
def test_the_hash_that_the_page_prints_is_the_patchs() -> None:
    from umed_plugin.patches import zero_3

    (command,) = [command for command in commands(DOCS / "patches-contributing.md") if command.startswith("for python")]
    run = ["bash", "-euc", re.sub(r"in .*?; do", f"in {sys.executable}; do", command, count=1)]
    printed = subprocess.run(run, env=environment(), capture_output=True, text=True, check=True, timeout=300).stdout
    assert printed.split()[-1] in zero_3.PATCH.targets[0].sha256


@pytest.mark.llava
def test_the_recipe_commands_run(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every ``umed recipe`` command as it stands, with the page's own recipe, on the real images."""
    data = real_data / "brain_tumor_coco"
    monkeypatch.chdir(tmp_path)
    recipe, *_ = blocks(DOCS / "data.md", "yaml")
    Path("my_tumors.yaml").write_text(recipe.replace("/data/brain_tumor_coco", str(data)))
    Path("my_tumors").mkdir()
    Path("train.review.decisions.json").write_text('{"decisions": []}')
    ran = [command for command in COMMANDS if entry(command) == "umed recipe"]
    for command in ran:
        command, _, file = command.replace("/data/brain_tumor_coco", str(data)).partition(" > ")
        capsys.readouterr()
        assert cli.main(shlex.split(command)[1:]) == 0, command
        if file:
            Path(file).write_text(capsys.readouterr().out)
    assert len(ran) == 10
    assert Path("my_tumors/train.json").stat().st_size > 1000
    assert load_recipe("my_mau.yaml").size == 5817


def test_the_recipe_is_valid_and_short(tmp_path: Path) -> None:
    recipe, several_readers, phrases, reports, augment, hold_out = blocks(DOCS / "data.md", "yaml")
    assert len(recipe.splitlines()) <= 10
    (tmp_path / "my_tumors.yaml").write_text(recipe)
    load_recipe(str(tmp_path / "my_tumors.yaml"))
    by_file, _, rest = recipe.partition("annotations: ")
    split = next(line for line in recipe.splitlines(keepends=True) if line.startswith("split:"))
    other = by_file + several_readers + rest.partition("\n")[2].replace(split, "split: {by: patient}\n")
    (tmp_path / "vindr.yaml").write_text(other)
    assert load_recipe(str(tmp_path / "vindr.yaml")).annotations.readers.at_least == 2
    (tmp_path / "phrases.yaml").write_text(other.replace(several_readers, phrases))
    assert load_recipe(str(tmp_path / "phrases.yaml")).phrase == "label_text"
    (tmp_path / "reports.yaml").write_text(
        other.replace(several_readers, reports).replace("split: {by: patient}\n", "")
    )
    assert load_recipe(str(tmp_path / "reports.yaml")).annotations.views == "montage"
    (tmp_path / "augmented.yaml").write_text(recipe + augment)
    assert load_recipe(str(tmp_path / "augmented.yaml")).augment.rotation == 10
    (tmp_path / "held_out.yaml").write_text(recipe + hold_out.replace("effusion", "brain tumor"))
    assert load_recipe(str(tmp_path / "held_out.yaml")).hold_out.classes == ["brain tumor"]
