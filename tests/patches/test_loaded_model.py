"""The class and the attention with which the model is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from umed_plugin import patching
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.rules import TUNING
from umed_plugin.patches import ALL, attention_implementation, model_class, old_flags, train_arguments
from umed_plugin.patches.attention_implementation import requested_attention
from umed_plugin.patches.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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
        model_args=SimpleNamespace(model_name_or_path=str(folder), pretrain_mm_mlp_adapter=None, vision_tower=None),
        training_args=SimpleNamespace(cache_dir=None, fsdp=[]),
        flags=SimpleNamespace(umed_stage=TUNING),
    )
    faults = model_class.find_faults(run)
    assert len(faults) == (words is not None)
    assert words is None or words in faults[0]


@pytest.mark.parametrize(
    ("base", "fsdp", "words"),
    [
        ("llava_mistral", "full_shard auto_wrap", "from a checkpoint with a vision tower"),
        ("mistral", True, "as the installed transformers passes it on"),
        ("mistral", "full_shard", None),
    ],
)
def test_fsdp_is_refused_where_llava_cannot_start_under_it(base, fsdp, words, tiny_mistral, tmp_path):
    """The flag as transformers reads it, but for True, which only transformers 5 makes of each value."""
    config = json.loads((tiny_mistral / "config.json").read_text())
    if base == "mistral":
        config = {name: value for name, value in config.items() if not name.startswith("mm_")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": base}))
    run = SimpleNamespace(
        active=True,
        model_args=SimpleNamespace(
            model_name_or_path=str(tmp_path), pretrain_mm_mlp_adapter="m.bin", vision_tower=None
        ),
        training_args=SimpleNamespace(cache_dir=None, fsdp=fsdp),
        flags=SimpleNamespace(umed_stage=TUNING),
    )
    faults = [fault for fault in model_class.find_faults(run) if fault.startswith("--fsdp")]
    assert len(faults) == (words is not None)
    assert words is None or (words in faults[0] and "--deepspeed with ZeRO-3" in faults[0])


def test_a_checkpoint_that_lacks_a_weight_is_not_trained(tiny_mistral, tmp_path):
    (tmp_path / "config.json").write_text((tiny_mistral / "config.json").read_text())
    tensors = load_file(tiny_mistral / "model.safetensors")
    del tensors["model.mm_projector.2.weight"], tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    given = SimpleNamespace(model_name_or_path=str(tmp_path), pretrain_mm_mlp_adapter=None, vision_tower=None)
    run, config = SimpleNamespace(model_args=given), json.loads((tmp_path / "config.json").read_text())
    fault = model_class._missing_tensors(run, config)
    assert "lack 'model.norm.weight' (2 such in all)" in fault[0]
    given.pretrain_mm_mlp_adapter = "mm_projector.bin"
    fault = model_class._missing_tensors(run, config)
    assert "lack 'model.norm.weight' (1 such in all)" in fault[0]


def test_nothing_is_trained_with_a_tower_that_lacks_a_weight(tiny_mistral, tmp_path):
    tower = shutil.copytree(tiny_mistral / "vision_tower", tmp_path / "vision_tower")
    given = SimpleNamespace(model_name_or_path=str(tiny_mistral), pretrain_mm_mlp_adapter=None, vision_tower=str(tower))
    run, config = tuning(given), json.loads((tiny_mistral / "config.json").read_text())
    assert model_class._missing_tensors(run, config) == []
    tensors = load_file(tower / "model.safetensors")
    del tensors["vision_model.post_layernorm.bias"]  # LLaVA does not use it
    save_file(tensors, tower / "model.safetensors")
    assert model_class._missing_tensors(run, config) == []
    del tensors[min(tensors)]
    save_file(tensors, tower / "model.safetensors")
    (fault,) = model_class._missing_tensors(run, config)
    assert fault.startswith(
        f"--vision_tower {tower}: its weight files, or their index, lack 'embeddings.class_embedding'"
    )
    (tower / "model.safetensors").unlink()
    (fault,) = model_class._missing_tensors(run, config)
    assert fault.startswith(f"--vision_tower {tower}: contains no weights")


def test_a_whole_tower_in_the_checkpoint_stands_for_what_the_folder_lacks(tiny_mistral, tmp_path):
    checkpoint = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral")
    tower = load_file(checkpoint / "vision_tower" / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    del tower["vision_model.pre_layrnorm.bias"]
    save_file(tower, checkpoint / "vision_tower" / "model.safetensors")
    language = load_file(checkpoint / "model.safetensors")

    def faults(inside: dict, weights: str = "checkpoint") -> list[str]:
        save_file({**language, **inside}, checkpoint / "model.safetensors")
        given = {"model_name_or_path": str(checkpoint), "vision_tower": str(checkpoint / "vision_tower")}
        run = tuning(SimpleNamespace(**given, pretrain_mm_mlp_adapter=None), weights)
        return model_class._missing_tensors(run, json.loads((checkpoint / "config.json").read_text()))

    assert faults(inside) == []
    (fault,) = faults(inside, "original")
    assert "lack 'pre_layrnorm.bias' (1 such in all)" in fault
    assert faults({}) == [fault]
    assert faults(dict([*inside.items()][1:])) == [fault]


def tuning(model_args: SimpleNamespace, tower_weights: str = "checkpoint") -> SimpleNamespace:
    flags, training_args = SimpleNamespace(umed_tower_weights=tower_weights), SimpleNamespace(cache_dir=None)
    return SimpleNamespace(model_args=model_args, flags=flags, training_args=training_args)


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
    on_gpu, on_cpu = options(monkeypatch, "--use_cpu", "False", "--bf16"), options(monkeypatch, "--use_cpu")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert requested_attention("flash_attention_2", on_gpu) == "flash_attention_2"
    assert requested_attention("eager", on_cpu) == "eager"
    assert requested_attention(None, on_gpu) is None
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert requested_attention("flash_attention_2", on_gpu) is None
    assert "flash-attn 2 or CUDA is missing" in capsys.readouterr().out


def test_flash_attention_that_is_installed_falls_back_where_it_cannot_compute(monkeypatch, capsys):
    """transformers asks for package and CUDA alone; the kernel would refuse at the first step. The GPUs are made up."""
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    for capability, flags, said in (
        (7, ["--fp16"], "it needs a GPU of Ampere or later"),
        (8, [], "it computes in 16 bits alone, and neither --bf16 nor --fp16 is given"),
        (8, ["--bf16"], None),
        (8, ["--bits", "4"], None),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        properties = [SimpleNamespace(major=9), SimpleNamespace(major=capability)]
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        chosen = requested_attention("flash_attention_2", options(monkeypatch, "--use_cpu", "False", *flags))
        assert (chosen is None) == (said is not None)
        assert said is None or said in capsys.readouterr().out


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
    given = options(monkeypatch, *spelling)
    capsys.readouterr()  # LLaVA is imported here, if no test did so before, and its libraries print
    assert requested_attention("eager", given) == expected
    assert capsys.readouterr().out == ""


def test_a_short_form_of_the_flag_could_be_the_attention_loss_too(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        requested_attention("eager", options(monkeypatch, "--umed_atten", "flash"))
    assert "could match --umed_attention, --umed_attention_loss" in capsys.readouterr().err


def refused(chosen, checkpoint, *, use_cpu=True, stage="rewarding"):
    flags = UmedFlags(umed_stage=stage, umed_attention=chosen)
    model_args = SimpleNamespace(model_name_or_path=str(checkpoint))
    training_args = SimpleNamespace(
        umed=flags, umed_stage=stage, use_cpu=use_cpu, cache_dir=None, bf16=True, fp16=False, bits=16
    )
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
