"""The rewards inside TRL's own ``GRPOTrainer``, on a tiny LLaVA in transformers' format."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.conversion import variant
from support.records import grounded_records
from support.umed_runs import ROOT, environment

from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.cli import main
from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.data.build import build_records
from umed_plugin.data.images import load_image
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import load_records, true_boxes
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.model.token_spans import naming_tokens
from umed_plugin.rewards import REWARDS, combine_rewards, localization_diou
from umed_plugin.rewards.trl import CombinedReward, LesionAttention, trl_dataset

trl = pytest.importorskip("trl", minversion="1.0", reason="needs TRL 1.x, which runs on the current stack alone")
prepare_multimodal_messages = pytest.importorskip("trl.data_utils").prepare_multimodal_messages
Dataset = pytest.importorskip("datasets").Dataset
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def converted(tiny_mistral, tmp_path_factory) -> Path:
    return to_transformers(tiny_mistral, tmp_path_factory.mktemp("trl") / "hf", template="umed_mistral")


def test_the_example_trains_and_its_model_goes_back_to_llava(converted, tmp_path):
    records = grounded_records(tmp_path / "data")
    flags = [
        "--steps",
        "2",
        "--candidates",
        "2",
        "--questions",
        "3",
        "--answer-tokens",
        "12",
        "--learning-rate",
        "1e-3",
    ]
    command = [sys.executable, ROOT / "examples" / "trl_grpo.py", converted, records, "--image-folder", records.parent]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "trained"), *flags],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line for line in done.stdout.splitlines() if "reward/localization" in line]
    assert len(steps) == 2, done.stdout
    back = tmp_path / "llava-mistral-trl"
    assert main(["convert", str(tmp_path / "trained"), "--out", str(back)]) == 0


@pytest.fixture(scope="module")
def model(converted):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def processor(converted):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(converted)


@pytest.fixture(scope="module")
def examples(model, tmp_path_factory) -> list[dict]:
    """Two studies with lesions and one without, as the trainer passes them to rewards."""
    file = grounded_records(tmp_path_factory.mktemp("data"))
    records = load_records(file)
    records[1]["conversations"][0]["value"] += (
        " Mark all of it."  # prompts of different lengths, so that padding is needed
    )
    return list(trl_dataset(records, file.parent, model).select([1, 2, 0]))


def test_dicom_and_nifti_that_were_not_rendered_are_opened_as_their_records_say(model, tmp_path):
    make_studies(tmp_path / "studies", train=4, val=0, test=0)
    records = build_records(load_recipe("demo_studies"), out_dir=tmp_path, data_root=tmp_path / "studies", render=False)
    assert {Path(record["image"]).suffix for record in records} == {".dcm", ".png", ".gz"}
    for example, record in zip(trl_dataset(records, tmp_path, model), records):
        expected = load_image(record["image"], **record.get("reading", {}))[0]
        np.testing.assert_array_equal(np.asarray(example["image"]), expected)


def columns_of(examples: list[dict], k: int) -> dict:
    """Columns as TRL repeats them, K in a row for each question."""
    repeated = [example for example in examples for _ in range(k)]
    conversations = [prepare_multimodal_messages(one["prompt"], images=[one["image"]]) for one in repeated]
    return {"prompts": conversations, **{name: [one[name] for one in repeated] for name in ("record", "geometry")}}


ANSWERS = (
    "There is a nodule at [0.10, 0.20, 0.40, 0.50].",
    "No nodule, but two cysts and nodules.",
    "A cyst.",
    "Nothing here.",
    "One nodule and one cyst",
    "The nodule is a nodule.",
)


def from_output_attentions(
    model, processor, columns: dict, answers: list[list[int]], layers: list[int], heads=slice(None)
) -> list[float]:
    """Vision relevance the slow way: one candidate at a time, weights of all layers, renormalised over the image patches."""
    values = []
    for prompt, record, geometry, answer in zip(*(columns[n] for n in ("prompts", "record", "geometry")), answers):
        inputs = processor.apply_chat_template(
            [prompt], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        with torch.no_grad():
            found = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True).attentions
        named = naming_tokens(processor.tokenizer, answer, record["terms"], set(record["objects"]["ref"]))
        patches = (
            (ids[0] == model.config.image_token_id).nonzero().flatten()[-64:]
        )  # the class token stands before them
        cover = torch.from_numpy(geometry.patch_cover(true_boxes(record))).float()
        rows = [
            found[layer][0, heads, inputs["input_ids"].shape[1] + token][:, patches]
            for layer in layers
            for token in named
        ]
        shares = [((row / row.sum(-1, keepdim=True)) * cover).sum(-1).mean() for row in rows]
        values.append(float(torch.stack(shares).mean()) if shares else 0.0)
    return values


def test_lesion_attention_is_what_output_attentions_gives(model, processor, examples):
    columns = columns_of(examples, 2)
    answers = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in ANSWERS]
    layers = [1, 3]
    wanted = from_output_attentions(model, processor, columns, answers, layers)
    model.train()
    found = LesionAttention(model, processor, layers=layers)(
        columns["prompts"], answers, columns["record"], columns["geometry"], 2
    )
    assert model.training
    model.eval()
    assert found == pytest.approx(wanted, abs=1e-4)
    assert [value > 0 for value in found] == [True, True, True, False, False, False]
    assert len({round(value, 4) for value in found[:3]}) == 3, "different values, or nothing was compared"


@pytest.mark.parametrize("case", ["adapter", "class token", "one head", "cached prompt"])
def test_lesion_attention_of_other_models(case, model, processor, examples, tiny_mistral, tmp_path, monkeypatch):
    heads, looked_at = None, model
    if case == "adapter":
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
        looked_at = peft.get_peft_model(copy.deepcopy(model), config)
    if case == "class token":
        checkpoint = variant(tiny_mistral, tmp_path / "llava-mistral", {"mm_vision_select_feature": "cls_patch"}, dict)
        there = to_transformers(checkpoint, tmp_path / "hf", template="umed_mistral")
        looked_at = type(model).from_pretrained(there, dtype=torch.float32, attn_implementation="eager")
        processor = type(processor).from_pretrained(there)
    if case == "one head":
        heads = [2]
    if case == "cached prompt":  # for a model that takes no block mask, as with flash attention
        monkeypatch.setattr("umed_plugin.rewards.trl.packing_fault", lambda language: "takes no block mask")
    columns = columns_of(examples, 2)
    answers = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in ANSWERS]
    wanted = from_output_attentions(looked_at, processor, columns, answers, [2, 3], heads or slice(None))
    attention = LesionAttention(looked_at, processor, heads=heads)
    assert attention.layers == [2, 3]
    found = attention(columns["prompts"], answers, columns["record"], columns["geometry"], 2)
    assert found == pytest.approx(wanted, abs=1e-4)
    usual = LesionAttention(model, processor) if case == "adapter" else None
    if usual is not None:
        other = usual(columns["prompts"], answers, columns["record"], columns["geometry"], 2)
        assert other != pytest.approx(found, abs=1e-3), "the adapter changes the attention, or it was not looked at"


def test_a_combined_reward_is_what_stage_2_makes_of_the_rewards(examples):
    columns, logged = columns_of(examples, 2), {}
    chats = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ANSWERS]
    rewards = {name: REWARDS.get(name) for name in ("relevance", "localization_diou")}
    combined = CombinedReward(rewards, 2, weights={"relevance": 3.0})
    found = combined(
        completions=chats, completion_ids=[[5]] * 6, log_metric=logged.__setitem__, trainer_state=None, **columns
    )
    values = {name: reward(completions=list(ANSWERS), **columns) for name, reward in rewards.items()}
    least = {"localization_diou": localization_diou.least_maximum}
    wanted = combine_rewards(
        values,
        2,
        weights={"relevance": 3.0, "localization_diou": 1.0},
        max_normalised=["localization_diou"],
        least_maxima=least,
    )
    assert found == pytest.approx(wanted.flatten().tolist())
    assert logged["reward/relevance"] == pytest.approx(sum(values["relevance"]) / 6)


def test_a_weight_may_change_over_trls_run(examples):
    columns, logged = columns_of(examples, 2), {}
    rewards = {name: REWARDS.get(name) for name in ("relevance", "localization_diou")}

    def found(weight, state):
        combined = CombinedReward(rewards, 2, weights={"relevance": weight})
        keywords = {"completion_ids": [[5]] * 6, "log_metric": logged.__setitem__, "trainer_state": state}
        return combined(completions=list(ANSWERS), **keywords, **columns)

    half = SimpleNamespace(global_step=5, max_steps=11)
    assert found("0..2", half) == pytest.approx(found(1.0, None))
    assert logged["weight/relevance"] == 1
    with pytest.raises(UmedError, match="the weight of 'relevance' changes over the run"):
        found("0..2", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weights": {"localisation": 5.0}},
            "localisation.* unknown reward 'localisation'. Did you mean 'localization'",
        ),
        ({"weights": {"relevance": -1}}, r"CombinedReward\(weights={'relevance': -1}\): all must be 0 or more"),
        ({"weights": {"relevance": float("nan")}}, "all must be 0 or more"),
        ({"weights": {"relevance": 0, "localization": "0..1"}}, "At 0% of the run all are 0"),
        ({"weights": {"relevance": "0..1@2"}}, "a share of the run"),
        ({"weights": {"relevance": "much"}}, "must be numbers such as"),
        ({"norm": "zscores"}, "unknown norm 'zscores'. Did you mean 'zscore'"),
        ({"floor": -0.1}, r"CombinedReward\(floor=-0.1\): must be a number of 0 to 1"),
    ],
)
def test_arguments_of_a_combined_reward_are_checked_as_the_flags_are(arguments, message):
    rewards = {name: REWARDS.get(name) for name in ("relevance", "localization")}
    with pytest.raises(UsageError, match=message):
        CombinedReward(rewards, 2, **arguments)


def test_a_reward_of_whole_numbers_is_combined_and_one_without_values_is_named(examples):
    columns, keywords = columns_of(examples, 2), {"completion_ids": [[5]] * 6, "log_metric": print}
    whole = CombinedReward({"mine": lambda completions, **columns: [0, 1] * 3}, 2, norm="none")
    assert whole(completions=["text"] * 6, **keywords, **columns) == [0.0, 1.0] * 3
    with pytest.raises(UmedError, match="reward 'mine' returned None, as a function without `return` does"):
        CombinedReward({"mine": lambda completions, **columns: None}, 2)(completions=["t"] * 6, **keywords, **columns)


def test_groups_that_are_cut_are_refused(examples):
    columns = columns_of(examples, 3)
    combined = CombinedReward({"localization": REWARDS.get("localization")}, 2)
    with pytest.raises(UmedError, match="not 2 in a row"):
        combined(completions=["text"] * 9, completion_ids=[[5]] * 9, log_metric=print, **columns)
    with pytest.raises(UsageError, match="LesionAttention"):
        CombinedReward({"vision_relevance": REWARDS.get("vision_relevance")}, 2)


def test_a_reward_is_a_reward_function_of_trl_as_it_stands(model, processor, examples, tmp_path):
    """With text prompts: TRL's completions are then strings, and the rewards ignore its further columns."""
    texts = [{"prompt": "[INST] Where is it? [/INST]", "line": index} for index in range(3)]

    def with_columns(batch: dict) -> dict:
        found = [examples[index] for index in batch["line"]]
        return {"prompt": batch["prompt"], **{name: [one[name] for one in found] for name in ("record", "geometry")}}

    config = trl.GRPOConfig(
        str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=6, max_completion_length=4, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    functions = [REWARDS.get("localization"), REWARDS.get("relevance")]
    data = Dataset.from_list(texts).with_transform(with_columns)
    trainer = trl.GRPOTrainer(copy.deepcopy(model), functions, config, data, processing_class=processor)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "reward" in line]
    # No answer of four tokens has a box, which is correct for one of the three studies.
    assert line["rewards/localization/mean"] == pytest.approx(1 / 3)
    assert 0 <= line["rewards/lexical_relevance/mean"] < 1
