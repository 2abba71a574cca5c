"""``umed doctor --fix``: stock LLaVA, in a process without the plugin, fails or answers wrongly before and correctly after."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.doctor_faults import (
    FAULTS,
    INDEX,
    NAMES,
    TWICE_NAMED,
    change_tower,
    config,
    copied,
    drop,
    edit,
    first_kind,
    five_keys,
    forget,
    put,
    split,
    then,
    with_tower,
)
from support.taught import write_lora
from support.umed_runs import python_of_llavas_pins

from umed_plugin.cli import main
from umed_plugin.commands.doctor.catalogue import KINDS
from umed_plugin.commands.doctor.examination import diagnose, examine, fix

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "stock_loads.py"


def as_it_is(folder: Path) -> None:
    """Change nothing."""


@dataclass(frozen=True)
class Mended:
    """A fault that ``--fix`` repairs.

    Attributes:
        make: introduces the fault.
        clean: prepares the checkpoint before the fault; by default the small checkpoint is used unchanged.
        harmless: stock LLaVA answers the same without the fix; the fault has effects elsewhere.
    """

    code: str
    make: Callable[[Path], object]
    family: str = "mistral"
    clean: Callable[[Path], object] = as_it_is
    harmless: bool = False


MENDED = (
    Mended("index-missing", lambda f: (f / INDEX).unlink(), clean=split),
    Mended("index-wrong", forget, clean=split),
    Mended("mixed-config", put(model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"]), harmless=True),
    Mended("config-of-transformers-5", five_keys, clean=put(rope_theta=300.0)),
    Mended(
        "rope-scaling",
        put(rope_scaling=TWICE_NAMED),
        family="llama",
        clean=put(rope_scaling={"type": "linear", "factor": 2.0}),
    ),
    Mended("head-counts", put(num_key_value_heads=4)),
    Mended("vocabulary-size", put(vocab_size=999), harmless=True),
    Mended("projector-type", drop("mm_projector_type")),
    Mended(
        "generation-config",
        lambda f: edit(f, "generation_config.json", temperature=0.9, top_p=0.6),
        harmless=True,
    ),
    Mended("image-patch-token", drop("mm_use_im_patch_token"), harmless=True),
    # With _from_model_config, transformers at LLaVA's pins takes EOS from config.json.
    Mended(
        "end-token",
        lambda f: edit(f, "generation_config.json", ("_from_model_config",), eos_token_id=list(range(3, 768))),
    ),
    Mended("padding-token", put(pad_token_id=5000)),
    Mended("tower-moved", put(mm_vision_tower="/moved/away/vision_tower")),
    Mended("tower-relative", put(mm_vision_tower="vision_tower")),
    Mended(
        "tower-ignored",
        then(lambda f: with_tower(f, 0.0), lambda f: change_tower(f, -3.0)),
        clean=lambda f: change_tower(f, 3.0),
    ),
    Mended("tower-promised", put(unfreeze_mm_vision_tower=True)),
    Mended("tower-width", put(mm_hidden_size=1024), harmless=True),
)  # fmt: skip


def stock(folders: list[tuple[Path, Path | None]], working: Path) -> list[dict]:
    """The answer or error of stock LLaVA on its pins for each (folder, base)."""
    python = python_of_llavas_pins()
    if python is None:
        pytest.skip("unpatched LLaVA runs only on its pins: set UMED_OTHER_PYTHON to a Python that has them")
    pairs = [[str(path), None if base is None else str(base)] for path, base in folders]
    # -I ignores PYTHONPATH and the working directory, from which the plugin could be imported.
    done = subprocess.run(
        [python, "-I", str(SCRIPT), json.dumps(pairs)], cwd=working, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def told(tiny_mistral: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    """Code -> stock LLaVA's results for the clean, faulty and fixed checkpoint; one process loads them all."""
    good = {"mistral": tiny_mistral, "llama": tiny_llama}
    folder = tmp_path_factory.mktemp("mended")
    asked: list[tuple[str, str, Path, Path | None]] = []
    for one in MENDED:
        shared = one.clean is as_it_is
        clean = folder / (one.family if shared else one.code) / "clean" / NAMES[one.family]
        if not clean.exists():
            copied(good[one.family], clean)
            one.clean(clean)
        faulty = copied(clean, folder / one.code / "faulty" / NAMES[one.family])
        one.make(faulty)
        mended = folder / one.code / "mended" / NAMES[one.family]
        shutil.copytree(faulty, mended)
        relocate(faulty, mended)
        asked += [(one.code, "clean", clean, None), (one.code, "faulty", faulty, None)]
        assert one.code in {found.code for found in examine(mended)}
        fix(lambda mended=mended: examine(mended), lambda text: None)
        asked.append((one.code, "mended", mended, None))
    asked += lora_cases(tiny_llama, folder)
    pairs = list(dict.fromkeys((path, base) for _, _, path, base in asked))
    answers = dict(zip(pairs, stock(pairs, folder)))
    result: dict[str, dict[str, dict]] = {}
    for code, state, path, base in asked:
        result.setdefault(code, {})[state] = answers[path, base]
    return result


def relocate(old: Path, new: Path) -> None:
    """A copy names its own tower, unless the fault is about that."""
    if config(new).get("mm_vision_tower") == str(old / "vision_tower"):
        edit(new, mm_vision_tower=str(new / "vision_tower"))


def lora_cases(tiny_llama: Path, folder: Path) -> list[tuple[str, str, Path, Path | None]]:
    base = copied(tiny_llama, folder / "lora" / "llava-v1-base")
    clean = write_lora(base, folder / "lora" / "clean" / "llava-v1-lora")
    asked: list[tuple[str, str, Path, Path | None]] = []
    faults = {
        # As transformers 4.31 wrote it, which had no attention_bias.
        "adapter-model-type": lambda f: edit(f, remove=("attention_bias", "rope_theta"), model_type="llava"),
        "adapter-fields": lambda f: edit(f, "adapter_config.json", use_sparkle=False),
    }
    for code, make in faults.items():
        for state in ("faulty", "mended"):
            path = folder / "lora" / f"{code}-{state}" / "llava-v1-lora"
            shutil.copytree(clean, path)
            make(path)
            if state == "mended":
                assert code in {found.code for found in examine(path)}
                fix(lambda path=path: examine(path), lambda text: None)
            asked.append((code, state, path, base))
        asked.append((code, "clean", clean, base))
    return asked


def test_every_fix_of_the_catalogue_is_tried():
    tried = {one.code for one in MENDED} | {"adapter-model-type", "adapter-fields"}
    assert tried == {code for code, kind in KINDS.items() if kind.fix}


@pytest.mark.one_stack  # stock LLaVA runs on its pins alone
@pytest.mark.run
@pytest.mark.parametrize("code", [code for code, kind in KINDS.items() if kind.fix])
def test_stock_llava_answers_right_after_the_fix(code, told):
    clean, mended = told[code]["clean"], told[code]["mended"]
    assert "error" not in clean, "the checkpoint without the fault must answer, otherwise this test proves nothing"
    assert mended == clean


@pytest.mark.one_stack  # stock LLaVA runs on its pins alone
@pytest.mark.run
@pytest.mark.parametrize("code", [one.code for one in MENDED if not one.harmless] + ["adapter-model-type"])
def test_stock_llava_fails_or_errs_before_the_fix(code, told):
    assert told[code]["faulty"] != told[code]["clean"]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if KINDS[fault.code].fix], ids=lambda fault: fault.code)
def test_a_second_fix_finds_nothing_to_do(fault, tiny_mistral, tiny_llama, tmp_path, capsys):
    good = {"mistral": tiny_mistral, "llama": tiny_llama}
    folder = copied(good[fault.family], fault.folder(tmp_path))
    fault.make(folder)
    weights = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")}
    small = {file.name: file.read_bytes() for file in folder.glob("*.json")}
    if not any(found.fixable for found in examine(folder)):
        return  # one of the faults that the user must decide about
    main(["doctor", str(folder), "--fix", "--json"])
    first = json.loads(capsys.readouterr().out)
    assert first["changes"]
    assert fault.code not in {found["code"] for found in first["findings"]}
    changed = {name for name, content in small.items() if (folder / name).read_bytes() != content}
    for name in changed:
        assert (folder / f"{name}.before-doctor").read_bytes() == small[name]
        assert name in " ".join(first["changes"])
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name in weights} == weights
    assert not list(folder.glob("*.partial"))
    state = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    main(["doctor", str(folder), "--fix"])
    assert "nothing to fix" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == state


def test_a_crash_while_a_file_is_written_leaves_the_old_one(tiny_mistral, tmp_path, monkeypatch):
    folder = copied(tiny_mistral, tmp_path / NAMES["mistral"])
    edit(folder, vocab_size=999)
    before, stock_replace = (folder / "config.json").read_bytes(), os.replace

    def full_disk(source, target):
        if Path(target).name == "config.json":
            raise OSError("no space left")
        stock_replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        fix(lambda: examine(folder), lambda text: None)
    assert (folder / "config.json").read_bytes() == before
    monkeypatch.setattr(os, "replace", stock_replace)
    fix(lambda: examine(folder), lambda text: None)
    assert examine(folder) == []
    # Both attempts made a backup, and the second did not overwrite the first.
    kept = sorted(folder.glob("config.json.before-doctor*"))
    assert [file.read_bytes() for file in kept] == [before, before]


def test_what_is_kept_can_be_put_back(tiny_mistral, tmp_path):
    folder = copied(tiny_mistral, tmp_path / NAMES["mistral"])
    edit(folder, vocab_size=999)
    before = (folder / "config.json").read_bytes()
    fix(lambda: examine(folder), lambda text: None)
    shutil.move(folder / "config.json.before-doctor", folder / "config.json")
    assert (folder / "config.json").read_bytes() == before
    assert [one.code for one in examine(folder)] == ["vocabulary-size"]


@pytest.fixture(scope="module")
def by_name(tiny_mistral: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Stock LLaVA's results for good checkpoints under misleading names."""
    folder = tmp_path_factory.mktemp("names")
    cases = {
        "good mistral": (tiny_mistral, "tiny-llava-mistral", None),
        "without llava": (tiny_mistral, "my-mistral", None),
        "mistral without its name": (tiny_mistral, "llava-umed", None),
        "a temporary folder": (tiny_mistral, "llava-mistral-tmptgj", None),
        "lora in a full checkpoint's name": (tiny_mistral, "llava-mistral-lora-merged", None),
        "mistral with lora over a base": (tiny_mistral, "llava-mistral-lora", "base-llava-mistral"),
    }
    pairs: list[tuple[Path, Path | None]] = []
    for number, (source, name, base) in enumerate(cases.values()):
        if base is None:
            pairs.append((copied(source, folder / str(number) / name), None))
        else:
            below = copied(source, folder / str(number) / base)
            pairs.append((write_lora(below, folder / str(number) / name), below))
    for case in ("without llava", "a temporary folder"):
        (told,) = [one for one in examine(pairs[list(cases).index(case)][0]) if one.severity == "error"]
        command = shlex.split(told.remedy.partition("another name: ")[2])
        subprocess.run(command, check=True)
        assert examine(Path(command[-1])) == []
        pairs.append((Path(command[-1]), None))
    return dict(zip([*cases, "without llava, by a link", "a temporary folder, by a link"], stock(pairs, folder)))


@pytest.mark.one_stack  # stock LLaVA runs on its pins alone
@pytest.mark.run
def test_what_the_findings_about_names_say_is_so(by_name):
    good = by_name.pop("good mistral")
    assert "error" not in good
    assert by_name.pop("lora in a full checkpoint's name") == good  # a warning, not an error
    assert by_name.pop("mistral without its name") == good  # its class computes the same, its template does not
    for case in ("without llava, by a link", "a temporary folder, by a link"):  # the remedies that the doctor printed
        assert by_name.pop(case) == good
    for case, answer in by_name.items():
        assert answer != good, case
    assert "error" in by_name["a temporary folder"]
    assert "error" in by_name["mistral with lora over a base"]


@pytest.mark.parametrize("values", [{"vocab_size": 999}, {"mm_hidden_size": 1024}, {"intermediate_size": 128}], ids=str)
def test_shapes_that_stock_llava_lets_pass_are_refused_by_training(values, tiny_mistral, tmp_path):
    """LLaVA's loader uses ``low_cpu_mem_usage``, which on its pins does not check shapes; its train() does not use it."""
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    folder = copied(tiny_mistral, tmp_path / NAMES["mistral"])
    edit(folder, **values)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        LlavaMistralForCausalLM.from_pretrained(folder)
    if any(found.fixable for found in examine(folder)):
        fix(lambda: examine(folder), lambda text: None)
        LlavaMistralForCausalLM.from_pretrained(folder)


# What stock LLaVA does with faults that --fix does not repair: it stops, answers differently, or answers as without the fault.
STOPS, ERRS, PASSES = "stops", "errs", "passes"
CLAIMS = {
    "config-missing": STOPS, "shard-missing": STOPS, "file-truncated": STOPS, "second-weights": PASSES,
    "layers-dropped": ERRS, "tensors-missing": ERRS, "tensors-unknown": PASSES, "projector-missing": ERRS,
    "tokenizer-missing": STOPS, "tokenizer-unreadable": STOPS, "tokens-without-rows": ERRS, "rows-without-tokens": PASSES,
    "image-mode-unset": ERRS, "image-mode-unknown": ERRS, "tower-unset": STOPS, "tower-misfit": PASSES,
    "tower-copy": PASSES, "tower-image-size": STOPS, "not-finite": ERRS, "empty-tensors": STOPS, "mixed-dtypes": PASSES,
}  # fmt: skip


@pytest.fixture(scope="module")
def untouched(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Stock LLaVA's results for the good checkpoint, and for the first checkpoint with each fault."""
    folder = tmp_path_factory.mktemp("untouched")
    pairs: list[tuple[Path, Path | None]] = [(copied(tiny_mistral, folder / "good" / NAMES["mistral"]), None)]
    for code in CLAIMS:
        fault = next(one for one in FAULTS if one.code == code)
        faulty = copied(tiny_mistral, folder / code / NAMES["mistral"])
        fault.make(faulty)
        pairs.append((faulty, None))
    return dict(zip(["good", *CLAIMS], stock(pairs, folder)))


@pytest.mark.one_stack  # stock LLaVA runs on its pins alone
@pytest.mark.run
@pytest.mark.parametrize("code", list(CLAIMS))
def test_what_stock_llava_does_with_what_a_person_must_mend(code, untouched):
    good, answer = untouched["good"], untouched[code]
    assert "error" not in good
    does = STOPS if "error" in answer else PASSES if answer == good else ERRS
    assert does == CLAIMS[code], answer


@pytest.mark.one_stack  # stock LLaVA runs on its pins alone
@pytest.mark.run
def test_a_delta_that_llava_made_is_named_and_its_remedy_restores_the_model(tiny_llama, tmp_path):
    """LLaVA-Med 1.0 was published as the output of LLaVA's make_delta."""
    python = python_of_llavas_pins()
    if python is None:
        pytest.skip("make_delta runs only on LLaVA's pins: set UMED_OTHER_PYTHON to a Python that has them")
    target = copied(tiny_llama, tmp_path / "llava-med-7b")
    first_kind(target)
    edit(target, model_type="llava_llama")
    base, delta, out = tmp_path / "llama-7b", tmp_path / "llava-med-7b-delta", tmp_path / "applied"
    write_base(target, base)
    paths = ["--base-model-path", base, "--target-model-path", target, "--delta-path", delta]
    run(python, "-m", "llava.model.make_delta", *paths)

    diagnosis = diagnose(delta)
    assert diagnosis.identity.family == "LLaVA-Med 1.0 delta"
    (told,) = [one for one in diagnosis.findings if one.severity == "error"]
    assert told.code == "delta"
    out.mkdir()
    words = {"LLAMA-7B": str(base), "DIR/llava-med-7b": str(out / "llava-med-7b")}
    run(python, *[words.get(word, word) for word in shlex.split(told.remedy)[1:]])

    restored = out / "llava-med-7b"
    assert diagnose(restored).identity.family == "LLaVA 1.0 or LLaVA-Med 1.0"
    assert not [one for one in examine(restored) if one.severity == "error"]
    right, garbage, again = stock([(target, None), (delta, None), (restored, None)], tmp_path)
    assert again["logits"] == pytest.approx(right["logits"], abs=0.02)
    assert garbage["logits"] != pytest.approx(right["logits"], abs=0.2)


def run(python: str, *words: str | Path) -> None:
    done = subprocess.run([python, "-I", *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def write_base(target: Path, folder: Path) -> None:
    """Write the language model that the target was trained from, as far as LLaVA's script reads it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config(target)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{key: shape[key] for key in keys}, vocab_size=shape["vocab_size"] - 3))
    model.half().save_pretrained(folder)
    for file in target.glob("*token*"):
        shutil.copy2(file, folder)


@pytest.mark.one_stack  # stock LLaVA runs on its pins alone
@pytest.mark.run
def test_forgotten_in_the_index_means_random(told):
    assert "error" not in told["index-wrong"]["faulty"], "LLaVA reports nothing, which is why this is an error"
