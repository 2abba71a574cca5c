"""Every patch against the installed LLaVA: it fits, it applies once in any order, and it leaves nothing behind."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import random
import re
import subprocess
import sys

import pytest
import torch
from support.umed_runs import ROOT

from umed_plugin import patching
from umed_plugin.patches import ALL, TRIGGERS, model_class, shared_memory_build, zero_3
from umed_plugin.patching import PatchMisfit
from umed_plugin.patching.sources import surely_fits

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def places() -> dict[str, object]:
    """What stands at every place that a patch can change."""
    import llava.conversation
    import llava.train.llama_xformers_attn_monkey_patch as xformers_patch
    from llava.model.language_model import llava_llama, llava_mistral
    from llava.model.llava_arch import LlavaMetaModel
    from llava.model.multimodal_encoder import clip_encoder
    from llava.train import llava_trainer
    from llava.train import train as llava_train
    from transformers import dynamic_module_utils
    from transformers import trainer as transformers_trainer
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    owners = [llava_train, llava_trainer, llava_trainer.LLaVATrainer, LlavaMetaModel, xformers_patch]
    owners += [clip_encoder, clip_encoder.CLIPVisionTower, llava_llama.LlavaLlamaForCausalLM, llava_llama.LlavaConfig]
    owners += [llava_mistral.LlavaMistralForCausalLM, llava_mistral.LlavaMistralConfig]
    owners += [
        dynamic_module_utils,
        transformers_trainer,
        transformers_trainer.Trainer,
        modeling_llama,
        modeling_mistral,
    ]
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
