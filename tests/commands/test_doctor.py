"""The doctor identifies every family and reports every fault, and runs no code of the checkpoint."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.doctor_faults import (
    FAULTS,
    NAMES,
    WEIGHTS,
    Fault,
    as_delta,
    as_pickle,
    config,
    copied,
    edit,
    first_kind,
    lose,
    mark_of,
    next_kind,
    split,
    tensors,
    with_tower,
)
from support.taught import write_lora
from support.umed_runs import environment

from umed_plugin.checkpoints.merging import merge
from umed_plugin.checkpoints.pickles import read_pickle
from umed_plugin.checkpoints.stored import BadFile, read_safetensors
from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.cli import main
from umed_plugin.commands.doctor.catalogue import KINDS
from umed_plugin.commands.doctor.examination import diagnose, examine


@pytest.fixture(scope="session")
def good(tiny_mistral: Path, tiny_llama: Path) -> dict[str, Path]:
    return {"mistral": tiny_mistral, "llama": tiny_llama}


# The Llama tokenizer is non-legacy in LLaVA-1.5, and in the small checkpoint.
ALWAYS = {"mistral": set(), "llama": {"questions-masked"}}


def codes(folder: Path, base: Path | None = None) -> set[str]:
    return {finding.code for finding in examine(folder, base)}


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_nothing_is_found_in_a_good_checkpoint(family, good, tmp_path):
    assert codes(copied(good[family], tmp_path / NAMES[family])) == ALWAYS[family]


def test_a_byte_pair_tokenizer_needs_its_own_files(good, tmp_path):
    """SmolLM2 has one: transformers' slow GPT2Tokenizer reads vocab.json and merges.txt, and no tokenizer.model."""
    folder = copied(good["llama"], tmp_path / NAMES["llama"])
    (folder / "tokenizer.model").unlink()
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    (found,) = [finding for finding in examine(folder) if finding.code == "tokenizer-missing"]
    assert found.found.startswith("no vocab.json and no merges.txt")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(rows - 3))]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    assert [finding.found for finding in examine(folder) if finding.code == "tokenizer-missing"] == ["no merges.txt"]
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert codes(folder) == ALWAYS["llama"]


def test_the_folder_above_counts_for_a_checkpoint_of_a_run(good, tmp_path):
    """LLaVA reads the name of a ``checkpoint-N`` folder together with that of its parent folder."""
    assert examine(copied(good["mistral"], tmp_path / "llava-mistral-run" / "checkpoint-20")) == []
    assert codes(copied(good["mistral"], tmp_path / "run" / "checkpoint-20")) == {
        "name-without-llava", "name-of-other-class", "name-template",
    }  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.code)
def test_a_fault_is_named_and_nothing_else(fault: Fault, good, tmp_path):
    folder = copied(good[fault.family], fault.folder(tmp_path))
    fault.make(folder)
    findings = examine(folder)
    assert {finding.code for finding in findings} == {fault.code} | fault.also | ALWAYS[fault.family]
    (named,) = [finding for finding in findings if finding.code == fault.code]
    assert fault.said in named.found
    assert named.where and named.why and named.remedy and "{" not in named.remedy.replace("{k: v", "")
    assert not mark_of(folder).exists(), "the doctor called a function that a pickle names"


@pytest.mark.parametrize("lost", ["vision_model.post_layernorm.bias", "vision_model.pre_layrnorm.bias"])
def test_a_tower_may_lack_what_the_checkpoint_holds_or_nothing_uses(lost, good, tmp_path):
    folder = copied(good["mistral"], tmp_path / "llava-mistral-tiny")
    lose(lost)(folder / "vision_tower")
    assert codes(folder) == ({"tower-incomplete"} if "pre" in lost else set())
    shutil.copytree(good["mistral"] / "vision_tower", folder / "vision_tower", dirs_exist_ok=True)
    with_tower(folder, 0.5)
    lose(lost)(folder / "vision_tower")
    edit(folder, unfreeze_mm_vision_tower=True)
    assert codes(folder) == set()


def test_every_kind_is_made_by_a_fault_or_a_family():
    elsewhere = {
        "transformers-form", "adapter-of-transformers", "adapter-missing", "adapter-not-plain", "adapter-tensors",
        "projector-not-saved", "base-missing", "base-mismatch", "adapter-of-mistral", "adapter-not-merged",
        "adapter-model-type", "adapter-fields", "adapter-fields-needed", "questions-masked",
    }  # fmt: skip
    made = {fault.code for fault in FAULTS}
    assert made.isdisjoint(elsewhere)
    assert made | elsewhere == set(KINDS)


FAMILIES = {
    "LLaVA 1.5": ("llama", "llava-v1.5-7b", lambda folder: None, "llava_v1", ALWAYS["llama"]),
    "LLaVA-Med 1.5 Mistral": ("mistral", "llava-med-v1.5-mistral-7b", lambda folder: None, "mistral_instruct", set()),
    "LLaVA-NeXT": ("mistral", "llava-v1.6-mistral-7b", next_kind, "mistral_instruct", {"image-mode-anyres"}),
    "LLaVA 1.0 or LLaVA-Med 1.0": ("llama", "llava-med-7b", first_kind, "llava_v0", set()),
    "LLaVA-Med 1.0 delta": (
        "llama", "llava-med-7b-delta", lambda f: (first_kind(f), as_delta(f)), "llava_v0", {"delta"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_is_named_with_its_template(family, good, tmp_path):
    source, name, make, template, expected = FAMILIES[family]
    folder = copied(good[source], tmp_path / name)
    make(folder)
    diagnosis = diagnose(folder)
    assert (diagnosis.identity.family, diagnosis.identity.kind) == (family, "full")
    assert diagnosis.identity.template == template
    assert diagnosis.identity.image_mode == config(folder)["image_aspect_ratio"]
    assert {finding.code for finding in diagnosis.findings} == expected
    assert diagnosis.identity.parameters == sum(tensor.numel() for tensor in tensors(folder).values())


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("family", "template"), [("llama", "llava_v1"), ("mistral", "mistral_instruct")])
def test_what_llavas_training_masks_is_what_the_finding_says(family, template, legacy, good, tmp_path):
    """LLaVA's own preprocessing of one question and of two, with the checkpoint's tokenizer."""
    from llava.train import train as llava_train
    from transformers import AutoTokenizer

    from umed_plugin.training.supervision_check import supervision_fault
    from umed_plugin.training.tuning_data import using_template

    folder = copied(good[family], tmp_path / NAMES[family])
    edit(folder, "tokenizer_config.json", legacy=legacy)
    reported = "questions-masked" in codes(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False, model_max_length=1024, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token
    for rounds in (1, 2):
        turns = [("human", "<image>\nWhere is it?"), ("gpt", "At [0.12, 0.30]."), ("human", "And?"), ("gpt", "A cyst.")]
        spoken = [{"from": who, "value": text} for who, text in turns[: 2 * rounds]]
        with using_template(template):
            item = llava_train.preprocess([[dict(turn) for turn in spoken]], tokenizer, has_image=True)
        record = {"id": rounds, "conversations": spoken}
        fault = supervision_fault(record, template, tokenizer, item["input_ids"][0], item["labels"][0])
        assert ("masked whole" in (fault or "")) == (reported and rounds == 2), fault


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_transformers_form_is_named(family, good, tmp_path):
    folder = to_transformers(good[family], tmp_path / "hf")
    diagnosis = diagnose(folder)
    assert diagnosis.identity.family == "transformers' LlavaForConditionalGeneration"
    (found,) = diagnosis.findings
    assert found.code == "transformers-form"
    assert f"umed convert {folder} --out DIR/llava" in found.remedy


@pytest.fixture(scope="module")
def lora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(LoRA folder, its base)."""
    folder = tmp_path_factory.mktemp("lora")
    base = copied(tiny_llama, folder / "llava-v1-base")
    return write_lora(base, folder / "llava-v1-lora"), base


def test_a_lora_folder_is_named(lora):
    folder, base = lora
    diagnosis = diagnose(folder)
    assert (diagnosis.identity.kind, diagnosis.identity.family) == ("LoRA", "LLaVA 1.5")
    assert diagnosis.identity.base == str(base)
    assert diagnosis.findings == []


def lora_copy(lora: tuple[Path, Path], folder: Path) -> Path:
    return Path(shutil.copytree(lora[0], folder / "llava-v1-lora"))


def test_what_a_lora_folder_lacks(lora, good, tmp_path):
    folder = lora_copy(lora, tmp_path)
    (folder / "non_lora_trainables.bin").unlink()
    assert codes(folder) == {"projector-not-saved"}
    edit(folder, "adapter_config.json", base_model_name_or_path="/not/here")
    assert codes(folder) == {"projector-not-saved", "base-missing"}
    assert codes(folder, lora[1]) == {"projector-not-saved"}
    for file in folder.glob("adapter_model.*"):
        file.unlink()
    assert codes(folder, lora[1]) == {"projector-not-saved", "adapter-missing"}


def test_a_lora_folder_over_another_base_does_not_fit(lora, tmp_path):
    from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

    narrow = make_checkpoint(tmp_path / "narrow-llava-v1", family="llama", hidden_size=64)
    (found,) = examine(lora[0], narrow)
    assert found.code == "base-mismatch" and ", and in the base" in found.found
    (found,) = examine(lora[0], lora[0])
    assert found.code == "base-mismatch" and "no full model" in found.found


def test_fields_that_peft_does_not_know(lora, tmp_path):
    folder = lora_copy(lora, tmp_path)
    edit(folder, "adapter_config.json", use_sparkle=False, sparkle_config={}, peft_version_of="")
    (found,) = examine(folder)
    assert found.code == "adapter-fields" and found.fixable and "use_sparkle" in found.found
    edit(folder, "adapter_config.json", use_sparkle=True)
    assert codes(folder) == {"adapter-fields", "adapter-fields-needed"}


def test_a_lora_folder_that_stock_llava_cannot_load(lora, tiny_mistral, tmp_path):
    old = lora_copy(lora, tmp_path)
    edit(old, model_type="llava")
    assert codes(old) == {"adapter-model-type"}
    base = copied(tiny_mistral, tmp_path / "llava-mistral-base")
    over = write_lora(base, tmp_path / "llava-mistral-lora")
    assert codes(over) == {"adapter-of-mistral"}
    assert examine(merge(over, base, tmp_path / "llava-mistral-merged")) == []


def test_the_folder_that_a_training_left_is_an_intermediate_and_not_a_broken_checkpoint(tiny_mistral, tmp_path, capsys):
    """README's own `stage1-lora`: no 'llava' in its name, a Mistral base, and that base's path as it was typed elsewhere."""
    base = copied(tiny_mistral, tmp_path / "checkpoints" / "llava-med-mistral")
    over = write_lora(base, tmp_path / "checkpoints" / "stage1-lora")
    edit(over, "adapter_config.json", base_model_name_or_path="./checkpoints/llava-med-mistral")
    assert codes(over) >= {"name-without-llava", "adapter-of-mistral"}
    (over / "umed.json").write_text('{"umed_stage": "instruction_tuning"}')
    (found,) = examine(over)
    assert (found.code, found.severity) == ("adapter-not-merged", "note") and f"umed merge {over}" in found.remedy
    assert main(["doctor", str(over)]) == 0
    assert str(base) in capsys.readouterr().out.replace("\n", "")
    assert examine(merge(over, None, tmp_path / "llava-mistral-merged")) == []


def test_a_projector_is_named(tiny_llama, tmp_path):
    """A projector folder as LLaVA's pretraining saves it."""
    base = copied(tiny_llama, tmp_path / "llava-v1-base")
    folder = tmp_path / "llava-v1-pretrain"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    torch.save({k: v for k, v in tensors(base).items() if "mm_projector" in k}, folder / "mm_projector.bin")
    diagnosis = diagnose(folder, base)
    assert (diagnosis.identity.kind, diagnosis.findings) == ("projector only", [])
    assert codes(folder) == {"base-missing"}
    edit(folder, remove=("mm_projector_type",))
    assert codes(folder, base) == {"projector-type"}


def test_pickles_are_read_as_torch_reads_them(tiny_mistral, tmp_path):
    """Both formats: offsets, dtypes and strides, also of views into one storage."""
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    content = {
        "whole": whole, "turned": whole.T, "row": whole[2], "every other": whole[::2, 1::2], "half": whole.half(),
        "brain": whole.bfloat16(), "count": torch.tensor(7), "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(whole.double()),
    }  # fmt: skip
    for zipped in (True, False):
        file = tmp_path / f"{zipped}.bin"
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        pickled = read_pickle(file)
        assert pickled.foreign == ()
        assert set(pickled.tensors) == set(content)
        for name, tensor in content.items():
            read = pickled.tensors[name].read()
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


def test_safetensors_are_read_as_the_library_reads_them(tiny_mistral):
    stored, loaded = read_safetensors(tiny_mistral / WEIGHTS), tensors(tiny_mistral)
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize("form", ["zip", "sequence", "safetensors"])
def test_a_damaged_file_is_a_bad_file_and_nothing_worse(form, tmp_path):
    """The file is cut anywhere, or some bytes are changed."""
    file, content = tmp_path / "weights", {"a": torch.randn(4, 5), "b": torch.randn(3).half()}
    if form == "safetensors":
        save_file(content, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    whole, chance, bad = file.read_bytes(), random.Random(0), 0
    for number in range(400):
        data = bytearray(whole)
        if number % 2:
            data = data[: chance.randrange(len(data))]
        for _ in range(0 if number % 2 else chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(data)
        try:
            read = read_safetensors(file) if form == "safetensors" else read_pickle(file).tensors
            for tensor in read.values():
                tensor.read()
        except BadFile:
            bad += 1
    assert bad >= 200, "at least every truncated file"


@pytest.mark.parametrize("value", [None, "x", -1, {"a": 1}], ids=str)
def test_an_odd_value_in_config_json_is_no_crash(value, tiny_mistral, tmp_path):
    folder = copied(tiny_mistral, tmp_path / NAMES["mistral"])
    whole = config(folder)
    for key in [*whole, "rope_parameters", "head_dim", "quantization_config", "vision_tower", "image_grid_pinpoints"]:
        (folder / "config.json").write_text(json.dumps({**whole, key: value}))
        assert all(finding.found for finding in examine(folder))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_in_pickles_is_as_good_as_one_in_safetensors(zipped, tiny_mistral, tmp_path):
    folder = copied(tiny_mistral, tmp_path / "tiny-llava-mistral")
    as_pickle(folder, zipped)
    assert examine(folder) == []


def test_what_llavas_train_makes_of_a_mistral_checkpoint_is_a_mixed_config(tiny_mistral, tmp_path):
    """Its Llama class loads the checkpoint and saves it again: model_type changes, the Mistral keys stay."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    folder = tmp_path / "llava-v1-trained"
    LlavaLlamaForCausalLM.from_pretrained(tiny_mistral).half().save_pretrained(folder)
    for file in tiny_mistral.glob("*token*"):
        shutil.copy2(file, folder)
    assert config(folder)["model_type"] == "llava_llama"
    (mixed,) = [finding for finding in examine(folder) if finding.code == "mixed-config"]
    assert mixed.fixable and "sliding_window" in mixed.found


def test_what_training_leaves_beside_the_weights_is_no_finding(tiny_mistral, tmp_path):
    from transformers import TrainingArguments

    folder = copied(tiny_mistral, tmp_path / "tiny-llava-mistral")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(TrainingArguments(str(tmp_path), report_to=[]), folder / "training_args.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    assert examine(folder) == []


def test_memory_does_not_grow_with_the_weights(tiny_mistral, tmp_path):
    """With an extra tensor of 120 MB, the peak memory of the process grows by a fraction of that."""
    folder = copied(tiny_mistral, tmp_path / "tiny-llava-mistral")
    script = (
        "import sys; from pathlib import Path; from umed_plugin.commands.doctor.examination import examine;"
        "found = [one.code for one in examine(sys.argv[1])];"
        "(most,) = [l.split()[1] for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')];"
        "print(most, *found)"
    )

    def look() -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        most, *found = done.stdout.split()
        return int(most), found

    small, found = look()
    assert found == []
    split(folder)
    torch.save(
        {"model.vision_resampler.big": torch.ones(6_000, 10_000).half()}, folder / "pytorch_model-00003-of-00003.bin"
    )
    content = json.loads((folder / "model.safetensors.index.json").read_text())
    content["weight_map"]["model.vision_resampler.big"] = "pytorch_model-00003-of-00003.bin"
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    large, found = look()
    assert found == ["tensors-unknown"]
    assert large - small < 80_000, f"{large - small} KiB more for 120 MB"


def test_the_command_prints_and_exits_by_the_worst(tiny_mistral, tmp_path, capsys):
    folder = copied(tiny_mistral, tmp_path / "tiny-llava-mistral")
    assert main(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "LLaVA-Med 1.5 Mistral" in shown and "nothing found" in shown and "mistral_instruct" in shown
    with_tower(folder, 0.5)
    assert main(["doctor", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "error tower-ignored: 1 of 39 tensors differ" in shown and f"umed doctor {folder} --fix" in shown
    assert main(["doctor", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["identity"]["family"] == "LLaVA-Med 1.5 Mistral" and report["identity"]["tower_inside"] == 39
    assert [(finding["code"], finding["fixable"]) for finding in report["findings"]] == [("tower-ignored", True)]
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert main(["doctor", "--fix"]) == 2


def test_the_environment(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["environment"]
    assert "llava-torch 1.2.2" in facts["llava"]
    assert facts["patches"].endswith(" 0 do not fit")
    assert facts["torch"] == torch.__version__.partition("+")[0] or facts["torch"]
    assert main(["doctor"]) == 0
    assert "in force under umed-run" in capsys.readouterr().out


def test_nothing_but_the_object_is_printed_for_programs():
    """In a separate process, where libraries are imported for the first time and may print anything."""
    command = [sys.executable, "-m", "umed_plugin.cli", "doctor", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["environment"]["python"]


def test_the_words_of_transformers_about_every_llava_are_held_back(tiny_mistral):
    """It knows no llava_mistral, and calls rope_scaling old."""
    command = [sys.executable, "-m", "umed_plugin", "doctor", str(tiny_mistral), "--quiet"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize("content", [None, "[1]", "{}"])
def test_records_that_cannot_be_read_are_refused_as_a_recipe_is(content, tiny_mistral, tmp_path, capsys):
    file = tmp_path / "records.json"
    if content is not None:
        file.write_text(content)
    assert main(["doctor", str(tiny_mistral), "--recipe", str(file)]) == 1
    assert f"umed: {file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"llava/__init__.py": "", "llava/train/train.py": "", "llava/model/llava.py": ""}, "llava-other"),
        (
            {"llava/__init__.py": "raise ImportError('torchvision is broken')", "llava/train/train.py": ""},
            "llava-broken",
        ),
    ],
)
def test_another_llava_is_named(files, code, tmp_path):
    """A folder named llava in the working directory, as in a checkout of LLaVA-Med."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "umed_plugin.cli", "doctor", "--json"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert code in [finding["code"] for finding in report["findings"]]
    assert str(tmp_path) in report["environment"]["llava"]


def test_llava_meds_own_package_is_named_and_not_its_misfits(tmp_path):
    """It has LLaVA's layout without training code, so importing it applies patches, and none fits."""
    for name in ("__init__", "model/__init__", "model/language_model/__init__", "model/multimodal_encoder/__init__"):
        (tmp_path / "llava" / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "llava" / f"{name}.py").write_text("")
    for name in ("language_model/llava_mistral", "language_model/llava_llama", "multimodal_encoder/clip_encoder"):
        (tmp_path / "llava" / "model" / f"{name}.py").write_text("class CLIPVisionTower: pass\n")

    def run(*words):
        command = [sys.executable, "-m", "umed_plugin.cli", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)

    report = json.loads(run("doctor", "--json").stdout)
    assert "looks like LLaVA-Med" in str(next(one for one in report["findings"] if one["code"] == "llava-other"))
    told = run("patches")
    assert told.returncode == 1 and "looks like LLaVA-Med 1.5" in told.stderr and "does not fit" not in told.stderr
    assert "Use an environment with llava-torch" in told.stderr
