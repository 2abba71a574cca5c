"""The estimate of a stage's memory against torch's own count of saved tensors, and what is said where a plan does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from umed_plugin import cli
from umed_plugin.checkpoints.tower_config import tower_sizes
from umed_plugin.commands import memory_extras
from umed_plugin.commands.machine import Machine
from umed_plugin.commands.memory import ModelSize, Work, activations, has_fused_tower, has_older_sdpa, stage_memory
from umed_plugin.commands.memory_advice import (
    DEFAULT_PLAN,
    EVALUATED_ANSWER,
    EVALUATED_TOGETHER,
    fits,
    memory_lines,
    remedies,
)
from umed_plugin.commands.memory_extras import Extras, ImageEncoder, Tower
from umed_plugin.commands.upgrade.run import Upgrade
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.commands.upgrade.training import work_of
from umed_plugin.errors import UmedError

GB = 2**30
LLAVA_MED = ModelSize(hidden=4096, layers=32, heads=32, keys=1024, ffn=14336, vocabulary=32000)


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes of all storages that autograd saves, weights apart, as the one item of a list."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}
    total = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = tensor
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


def language_model(size: ModelSize, work: Work) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.keys * size.heads // size.hidden,
        vocab_size=size.vocabulary,
        sliding_window=None,
        use_cache=False,
    )
    config._attn_implementation = "sdpa" if work.fused else "eager"
    model = MistralForCausalLM(config).to(torch.bfloat16 if work.half else torch.float32)
    if work.rank:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=work.rank, target_modules=names, lora_dropout=0.05, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    if work.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "sdpa"])
@pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rank", [16, 0], ids=["lora", "full"])
def test_activations_are_what_torch_saves(rank: int, half: bool, fused: bool, checkpointing: bool) -> None:
    from transformers import MistralForCausalLM

    if fused and not getattr(MistralForCausalLM, "_supports_sdpa", False):
        pytest.skip("this stack has no sdpa attention")
    for shape, rows, length in (((128, 3, 4, 64, 352), 2, 96), ((192, 2, 6, 96, 256), 3, 160)):
        size = ModelSize(*shape, vocabulary=400)
        work = Work(rank, half, checkpointing, fused, rows, older=has_older_sdpa())
        model = language_model(size, work)
        embeddings = torch.randn(rows, length, size.hidden, dtype=torch.bfloat16 if half else torch.float32)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
        with autocast, saved_bytes(model) as total:
            loss = model(
                inputs_embeds=embeddings.requires_grad_(), labels=torch.zeros(rows, length, dtype=torch.long)
            ).loss
        assert loss.requires_grad
        logits = 4 * rows * length * size.vocabulary
        estimate = activations(size, work, length)
        if half and not rank:
            # autocast's copies of the weights, which `stage_memory` counts as weights; within a checkpoint they are not kept
            head = size.vocabulary * size.hidden
            total[0] -= 2 * (head if checkpointing else size.language - head)
        if checkpointing:  # the layer that is computed again is not there yet
            one = replace(work, checkpointing=False)
            layers = [activations(ModelSize(size.hidden, n, *shape[2:], vocabulary=400), one, length) for n in (1, 2)]
            estimate -= layers[1] - layers[0]
        assert estimate + logits == pytest.approx(total[0], rel=0.15)


def test_weights_are_those_of_the_model() -> None:
    size = ModelSize(128, 3, 4, 64, 352, vocabulary=400)
    model = language_model(size, Work(16, False, False, False, 1))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert trained == size.adapter(16)
    assert frozen == pytest.approx(size.language, rel=0.01)
    assert round(LLAVA_MED.language / 1e9, 2) == 7.24 and round(LLAVA_MED.adapter(128) / 1e6) == 336


def test_the_default_plan_is_what_an_upgrade_starts(tiny_mistral: Path, tmp_path: Path) -> None:
    from support.records import grounded_records

    records = grounded_records(tmp_path / "data")
    settings = read_settings(None, {"checkpoint": str(tiny_mistral), "recipe": str(records)})
    upgrade = Upgrade(tmp_path / "run", settings, Console(quiet=True), machine=Machine(1, 80 * GB))
    fused = {"fused": True, "fused_tower": True, "older": False}  # each stack has its own
    for name, work in DEFAULT_PLAN.items():
        assert {**vars(work_of(name, upgrade.settings, upgrade.machine)), **fused} == vars(work)
    evaluation = upgrade.settings.evaluation
    assert (evaluation.batch_size, evaluation.max_new_tokens) == (EVALUATED_TOGETHER, EVALUATED_ANSWER)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "sdpa"])
@pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])
def test_activations_of_a_trained_tower_are_what_torch_saves(half: bool, fused: bool, checkpointing: bool) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if fused and not getattr(CLIPVisionModel, "_supports_sdpa", False):
        pytest.skip("this stack's CLIP has no sdpa attention")
    for shape, images, side in (((64, 3, 3, 4, 256), 2, 48), ((96, 5, 5, 6, 384), 3, 80)):
        tower = Tower(*shape, tokens=(side // 8) ** 2 + 1)
        config = CLIPVisionConfig(
            hidden_size=tower.hidden,
            intermediate_size=tower.ffn,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=side,
            patch_size=8,
        )
        config._attn_implementation = "sdpa" if fused else "eager"
        model = CLIPVisionModel(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
        pixels = torch.randn(images, 3, side, side)
        with autocast, saved_bytes(model) as total:
            assert model(pixels, output_hidden_states=True).hidden_states[-1].requires_grad
        total[0] -= 4 * pixels.numel()
        if half:  # autocast's copies of the weights, which `stage_memory` counts as weights
            total[0] -= 2 * (3 * 8 * 8 * tower.hidden + (0 if checkpointing else tower.weights))
        if half and not fused and not checkpointing and not has_fused_tower():
            # a CLIP without sdpa leaves the type of the softmax to autocast: bf16 on a CPU
            total[0] += 4 * tower.used * images * tower.heads * tower.tokens**2
        sizes = {"half": half, "fused": fused}
        estimate = memory_extras.tower_activations(tower, images, checkpointing=checkpointing, **sizes)
        if checkpointing:  # the layer that is computed again is not there yet
            estimate -= memory_extras.tower_activations(
                replace(tower, used=2), images, checkpointing=False, **sizes
            ) - memory_extras.tower_activations(replace(tower, used=1), images, checkpointing=False, **sizes)
        assert estimate == pytest.approx(total[0], rel=0.15)


def test_the_kl_to_a_teacher_saves_two_distributions() -> None:
    from umed_plugin.model.distillation import Head, answer_kl

    layer = torch.nn.Linear(16, 500, bias=False)
    states = torch.randn(40, 16, requires_grad=True)
    total = {}
    for rows in (0, 10):
        with saved_bytes(layer) as saved:
            answer_kl(states, Head(layer.weight), torch.randn(40, 16), Head(torch.randn(500, 16)), rows=rows)
        total[rows] = saved[0]
    assert total[0] == pytest.approx(memory_extras.saved_by_kl(40, 500), rel=0.15)
    assert total[10] <= 2 * 4 * 40 * 16, "in parts, nothing is kept but the states of both"


def test_the_loss_of_a_towers_teacher_saves_features() -> None:
    from umed_plugin.model.tower_teacher import new_map, patch_cosine

    tower, encoder = Tower(hidden=64, tokens=101), ImageEncoder(channels=24)
    onto = new_map(tower.hidden, encoder.channels, 0)
    features = torch.randn(3, 100, tower.hidden, dtype=torch.bfloat16, requires_grad=True)
    with saved_bytes(onto) as total:
        (1 - patch_cosine(features, torch.randn(3, 100, encoder.channels), onto)).mean()
    assert memory_extras.feature_loss(tower, 3, encoder) == pytest.approx(total[0], rel=0.15)


def test_the_pass_of_an_image_encoder_peaks_in_a_global_layer() -> None:
    from torch.profiler import profile
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=256,
        patch_size=8,
        mlp_dim=64,
        window_size=4,
        global_attn_indexes=[1],
    )
    module = SamVisionEncoder(config).eval().requires_grad_(False)
    encoder = ImageEncoder(heads=4, cells=32**2, channels=16)
    for half in (True, False):
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
        with torch.no_grad(), autocast, profile(profile_memory=True) as profiled:
            module(torch.randn(1, 3, 256, 256))
        now = peak = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        assert memory_extras.encoder_pass(encoder, 1, half=half, fused=has_fused_tower()) == pytest.approx(
            peak, rel=0.15
        )


def test_a_plan_counts_what_further_losses_add(tiny_mistral: Path, tmp_path: Path) -> None:
    from support.sam_files import sam_encoder, write_sam_file

    work = DEFAULT_PLAN["instruction_tuning"]
    plain = stage_memory(LLAVA_MED, work)
    tower, projector = LLAVA_MED.tower, LLAVA_MED.projector
    keeping = stage_memory(LLAVA_MED, replace(work, extras=Extras(keeps=True)))
    assert keeping["copy of the start"] == 4 * projector and keeping["KL"] == 16 * 1024 * 32000
    full = stage_memory(LLAVA_MED, replace(work, rank=0, extras=Extras(keeps=True)))
    assert full["copy of the start"] == 4 * (LLAVA_MED.language + projector)
    taught = stage_memory(LLAVA_MED, replace(work, extras=Extras(keeps=True, teacher=LLAVA_MED.weights)))
    assert taught["teacher"] == 2 * LLAVA_MED.weights and "copy of the start" not in taught
    trained = stage_memory(LLAVA_MED, replace(work, extras=Extras(tower=True)))
    assert trained["gradients and Adam"] - plain["gradients and Adam"] == 16 * tower.trained, "DDP's copy too"
    assert trained["weights"] - plain["weights"] == 4 * tower.trained, (
        "float32 and a copy in half precision, not half alone"
    )
    assert trained["activations of the tower"] > 5e8
    both = stage_memory(LLAVA_MED, replace(work, extras=Extras(tower=True, encoder=ImageEncoder())))
    assert both["tower's teacher"] == 4 * 89_700_000
    crowded = stage_memory(
        LLAVA_MED, replace(work, rows=64, checkpointing=True, extras=Extras(True, 0, True, ImageEncoder()))
    )
    assert sum(crowded.values()) > sum(both.values())

    flags = {"umed_keep": "clinkd", "umed_teacher": str(tiny_mistral), "umed_tower_lr": 1e-6, "umed_logit_rows": 0}
    flags["umed_tower_teacher"] = str(write_sam_file(tmp_path / "sam.pth", "image_encoder."))
    changes = {"checkpoint": str(tmp_path), "recipe": str(tmp_path / "r.json"), "instruction_tuning.flags": flags}
    first, second = (work_of(name, read_settings(None, changes), Machine()) for name in DEFAULT_PLAN)
    assert first.logit_rows == 0 and first.extras.keeps and first.extras.tower and first.extras.teacher > 0
    assert first.extras.encoder is not None
    assert first.extras.encoder.weights == sum(p.numel() for p in sam_encoder().parameters())
    assert second.extras == Extras()


def test_a_plan_that_does_not_fit_says_what_to_change_until_it_does() -> None:
    large, small = 80 * GB, 28 * GB
    for work in DEFAULT_PLAN.values():
        assert fits(stage_memory(LLAVA_MED, work), large)
        assert not fits(stage_memory(LLAVA_MED, work), small)
        changes = remedies(LLAVA_MED, work, small)
        assert fits(stage_memory(LLAVA_MED, changes[-1][1]), small)
        assert not any(fits(stage_memory(LLAVA_MED, changed), small) for _, changed in changes[:-1])
        words = [words for words, _ in remedies(LLAVA_MED, work, 16 * GB)]
        assert words[0] == "bits: 4" and not any(word.startswith("lora.r") for word in words)
        assert remedies(LLAVA_MED, work, 6 * GB) == []
    full = Work(rank=0, half=True, checkpointing=True, fused=True, rows=8)
    assert [words for words, _ in remedies(LLAVA_MED, full, large)][-1] == "method: lora"
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config |= {"intermediate_size": 14336, "vocab_size": 32000, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    said = "\n".join(memory_lines(config, DEFAULT_PLAN, Machine(1, small)))
    assert "576 image tokens" in said and said.count("does NOT fit the GPU's 30.1 GB. Set batch_size: ") == 2
    assert said.count(" Or set bits: 4 alone: about ") == 2
    assert (
        memory_lines(config, DEFAULT_PLAN, Machine(1, 6 * GB))[2]
        .strip()
        .startswith("does NOT fit the GPU's 6.4 GB, whatever")
    )
    assert len(memory_lines(config, DEFAULT_PLAN, Machine())) == 4, "without a GPU there is nothing to compare with"


def test_all_questions_of_a_step_are_sampled_at_once() -> None:
    """A model without grouped heads keeps four times the keys; half the batch keeps the step, and what is sampled."""
    llama = ModelSize(hidden=4096, layers=32, heads=32, keys=4096, ffn=11008, vocabulary=32000)
    work = replace(DEFAULT_PLAN["rewarding"], bits=4, rows=2)
    parts = stage_memory(llama, work)
    assert parts["KV cache of sampling"] == 2 * 32 * 4096 * 2 * 8 * (576 + 192 + 8 * 128)
    changes = remedies(llama, work, 16 * GB)
    assert changes[0][0] == "flags.umed_sampling_batch_size: 4"
    assert fits(stage_memory(llama, changes[-1][1]), 16 * GB)
    over_float32 = stage_memory(llama, replace(work, half=False, bits=16))
    assert over_float32["weights with the adapter"] == 4 * llama.language


def test_gradients_are_there_twice_under_ddp() -> None:
    work = DEFAULT_PLAN["instruction_tuning"]
    alone, with_ddp = (stage_memory(LLAVA_MED, replace(work, ddp=ddp)) for ddp in (False, True))
    trained = LLAVA_MED.projector + LLAVA_MED.adapter(128)
    assert with_ddp["gradients and Adam"] - alone["gradients and Adam"] == 4 * trained


def test_the_evaluations_of_a_plan_must_fit_too() -> None:
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    config |= {"vocab_size": 32000}  # Llama: no grouped heads
    lines = {
        gpu: memory_lines(config, DEFAULT_PLAN, Machine(1, gpu * GB), evaluated_together=16)[-1] for gpu in (12, 22, 80)
    }
    assert "a checkpoint answers with weights of 16 bits, also where bits: 4 trains" in lines[12]
    assert "Set evaluation.batch_size: 8." in lines[22] and "fits the GPU" in lines[80]
    # 512 KiB a token: 16 answers of 4,096 tokens need 34 GB more than those of 128.
    of_4096 = memory_lines(config, DEFAULT_PLAN, Machine(1, 48 * GB), evaluated_together=16, answer=4096)
    assert "40.8 KV cache" in of_4096[-2] and "Set evaluation.batch_size: 8." in of_4096[-1]
    assert "fits the GPU" in memory_lines(config, DEFAULT_PLAN, Machine(1, 48 * GB), evaluated_together=16)[-1]


def test_the_length_of_evaluated_answers_is_the_settings(tiny_mistral: Path, tmp_path: Path) -> None:
    from support.records import grounded_records

    def evaluation_of(name: str, tokens: int) -> str:
        changes = {"checkpoint": str(tiny_mistral), "recipe": records, "evaluation.max_new_tokens": tokens}
        changes["evaluation.batch_size"] = 1000
        upgrade = Upgrade(tmp_path / name, read_settings(None, changes), Console(quiet=True), machine=Machine())
        return upgrade.memory()[-1]

    records = str(grounded_records(tmp_path / "data"))
    short, long = (evaluation_of(name, tokens) for name, tokens in (("short", 8), ("long", 100_000)))
    assert short.startswith("evaluation: about ") and short != long


def test_a_base_of_4_bits_needs_a_quarter_of_the_frozen_weights() -> None:
    """7.24 billion weights: 0.52 bytes each in place of 2, but for the input embeddings."""
    for work in DEFAULT_PLAN.values():
        whole, quantized = (stage_memory(LLAVA_MED, replace(work, bits=bits)) for bits in (16, 4))
        saved = (2 - 0.52) * (LLAVA_MED.language - LLAVA_MED.vocabulary * LLAVA_MED.hidden)
        assert whole["weights"] - quantized["weights"] == pytest.approx(saved)
        assert whole["gradients and Adam"] == quantized["gradients and Adam"]
        assert sum(quantized.values()) < 24 * GB


def test_the_setting_bits_is_counted_and_needs_an_adapter(tmp_path: Path) -> None:
    changes = {"checkpoint": str(tmp_path), "recipe": str(tmp_path / "records.json"), "bits": 4}
    settings = read_settings(None, changes)
    assert [work_of(name, settings, Machine()).bits for name in DEFAULT_PLAN] == [4, 4]
    with pytest.raises(UmedError, match="bits.*4 needs method: lora"):
        read_settings(None, {**changes, "method": "full"})


def test_a_tower_whose_sizes_nothing_says_is_named_as_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.towers import cache_tower

    config = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    config |= {"vocab_size": 32000}
    known = partial(tower_sizes, cache_dir=str(tmp_path))
    monkeypatch.setattr("umed_plugin.commands.memory_advice.tower_sizes", known)

    def first_line(**tower: str) -> str:
        return memory_lines({**config, **tower}, DEFAULT_PLAN, Machine())[0]

    small = "openai/clip-vit-large-patch14"
    for tower in ({"mm_vision_tower": small}, {"mm_vision_tower": "/moved/tower"}, {}):
        assert "for 576 image tokens (assumed: CLIP ViT-L/14-336) and 192 tokens" in first_line(**tower)
    assert "for 576 image tokens and 192 tokens" in first_line(mm_vision_tower=f"{small}-336"), "its name says it"
    cache_tower(tmp_path, small)
    assert "for 256 image tokens and 192 tokens" in first_line(mm_vision_tower=small)
    assert "for 256 image tokens and 192 tokens" in first_line(vision_tower=small)


def test_upgrade_and_doctor_print_the_need(
    tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.records import grounded_records

    records = str(grounded_records(tmp_path / "data"))
    assert (
        cli.main(["upgrade", str(tiny_mistral), "--recipe", records, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    )
    printed = capsys.readouterr().out
    assert "# stage 2, rewarding: about " in printed and "64 image tokens" in printed
    assert not (tmp_path / "run").exists()
    cli.main(["doctor", str(tiny_mistral), "--recipe", records])
    assert "stage 1, instruction tuning: about " in capsys.readouterr().out
    assert cli.main(["doctor", str(tiny_mistral), "--recipe", "no_such_recipe"]) == 2
    assert "unknown recipe" in capsys.readouterr().err
    assert json.loads(Path(records).read_text())
