"""What a resumed run compares with its checkpoint, and what it does about each change."""

from __future__ import annotations

import dataclasses
import json

import pytest

from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.rules import ACCEPTED, FIXED, RESTORED, SAID
from umed_plugin.training.run_settings import (
    RECORDS,
    SYMBOLS,
    WORLD_SIZE,
    find_changes,
    kind_of,
    last_checkpoint,
    records_digest,
    refusals,
    settings_of,
    stored_settings,
)

BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


@dataclasses.dataclass
class Arguments:
    learning_rate: float = 1e-3
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    data_path: str = ""
    model_name_or_path: str = ""
    image_folder: str = ""
    deepspeed: str | None = None
    logging_steps: int = 1
    max_steps: int = 4
    seed: int = 0
    lora_r: int = 4
    umed_top_p: float = 1.0
    umed_judge_base_url: str | None = None


def changes(before, now, **keywords):
    return {change.name: change.kind for change in find_changes(before, now, **keywords)}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"learning_rate": 1.0}, RESTORED),
        ({"lora_r": 8}, FIXED),
        ({"seed": 1}, ACCEPTED),
        ({"data_path": "other.json"}, ACCEPTED),
        ({"model_name_or_path": "other/model"}, FIXED),
        ({"deepspeed": "zero2.json"}, FIXED),
        ({"max_steps": 8}, SAID),
        ({"umed_top_p": 0.9}, SAID),
        ({"umed_judge_base_url": "http://localhost:8000/v1"}, ACCEPTED),  # another judge, as far as anyone knows
        ({"logging_steps": 5}, None),
        ({BATCH: 4}, ACCEPTED),
    ],
)
def test_each_kind_of_flag(change, kind):
    found = changes(settings_of(Arguments()), settings_of(Arguments(**change)))
    assert found == ({} if kind is None else {next(iter(change)): kind})


@pytest.mark.parametrize(("stop_after", "found"), [(0, {}), (3, {"umed_val_records": ACCEPTED})])
def test_other_held_out_records_count_where_scores_are_compared(stop_after, found):
    flags = UmedFlags(umed_stage="rewarding", umed_val_every=5, umed_stop_after=stop_after)
    before, now = settings_of(flags), settings_of(dataclasses.replace(flags, umed_val_records=8))
    assert changes(before, now) == found


def test_a_judge_that_has_moved_can_be_accepted_in_the_middle_of_a_rollout():
    before, now = (settings_of(Arguments(umed_judge_base_url=f"http://{host}/v1")) for host in ("a", "b"))
    found = find_changes(before, now, between_updates=True)
    assert [change.kind for change in found] == [ACCEPTED]
    (fault,) = refusals(found, "checkpoint-3", set(), between_updates=True)
    assert fault.endswith("accept the change: --umed_accept_changed umed_judge_base_url.")
    assert refusals(found, "checkpoint-3", {"umed_judge_base_url"}, between_updates=True) == []


def test_the_projector_that_the_reference_begins_with_is_compared(tmp_path):
    @dataclasses.dataclass
    class OfTheModel:
        pretrain_mm_mlp_adapter: str | None = None

    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").write_text(name)
    before, now = (settings_of(OfTheModel(str(tmp_path / f"{name}.bin"))) for name in ("a", "b"))
    assert changes(before, now) == {"pretrain_mm_mlp_adapter": ACCEPTED}
    assert changes(before, settings_of(OfTheModel())) == {"pretrain_mm_mlp_adapter": ACCEPTED}
    assert changes(settings_of(OfTheModel()), settings_of(OfTheModel())) == {}


def test_the_same_records_a_step_dealt_otherwise_go_on(monkeypatch):
    before = settings_of(Arguments())
    assert changes(before, settings_of(Arguments(**{BATCH: 1, ACCUMULATION: 2}))) == {BATCH: SAID, ACCUMULATION: SAID}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert changes(before, settings_of(Arguments())) == {WORLD_SIZE: ACCEPTED}
    assert changes(before, settings_of(Arguments(**{BATCH: 1}))) == {BATCH: SAID, WORLD_SIZE: SAID}
    # DeepSpeed's processes each have a part of the optimizer's state.
    before["deepspeed"] = "zero2.json"
    now = settings_of(Arguments(**{BATCH: 1, "deepspeed": "zero2.json"}))
    assert changes(before, now) == {BATCH: SAID, WORLD_SIZE: FIXED}


def test_another_zero_stage_or_optimizer_in_deepspeeds_file_is_refused(tmp_path):
    """DeepSpeed lays out the files of a checkpoint by them, and asserts without a word."""

    def under(**config):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps(config))
        return settings_of(Arguments(deepspeed=str(file)))

    zero = {stage: {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)}
    before = under(**zero[2])
    assert changes(before, under(**zero[2], gradient_clipping=1.0)) == {"deepspeed": SAID}
    assert changes(before, under(**zero[3])) == {"deepspeed": SAID, "zero_stage": FIXED}
    assert changes(before, under(**zero[1])) == {"deepspeed": SAID, "zero_stage": SAID}
    in_turns, in_turns_1 = (under(zero_optimization={"stage": n, "round_robin_gradients": True}) for n in (2, 1))
    assert changes(before, in_turns) == {"deepspeed": SAID, "deepspeed_layout": FIXED}
    assert changes(in_turns_1, in_turns) == {"deepspeed": SAID, "zero_stage": FIXED}
    of_old_run = {name: value for name, value in before.items() if name != "deepspeed_layout"}
    assert changes(of_old_run, under(**zero[1])) == {"deepspeed": SAID, "zero_stage": FIXED}
    in_fp32 = under(**zero[1], data_types={"grad_accum_dtype": "fp32"})
    assert changes(before, in_fp32) == {"deepspeed": SAID, "zero_stage": FIXED, "deepspeed_layout": FIXED}
    own = under(**zero[2], optimizer={"type": "AdamW"}, scheduler={"type": "WarmupLR"})
    found = find_changes(before, own)
    faults = refusals(found, "checkpoint-3", {"zero_stage"})
    assert [fault.partition(":")[0] for fault in faults] == [
        "optimizer in the file of --deepspeed AdamW",
        "scheduler in the file of --deepspeed WarmupLR",
    ]
    assert all("was trained with none, which its weights or its optimizer need." in fault for fault in faults)
    earlier = {name: value for name, value in before.items() if name != "zero_stage"}
    assert changes(earlier, under(**zero[3])) == {"deepspeed": SAID}, "an earlier release did not store it"


def test_between_updates_nothing_that_shapes_the_rollout_may_change():
    before, now = UmedFlags(umed_stage="rewarding"), UmedFlags(umed_stage="rewarding", umed_num_candidates=4)
    now.umed_log_candidates, now.umed_packed = 3, False
    before, now = settings_of(before, Arguments()), settings_of(now, Arguments(**{BATCH: 1, ACCUMULATION: 2}))
    assert changes(before, now) == {
        "umed_num_candidates": ACCEPTED,
        "umed_packed": SAID,
        BATCH: SAID,
        ACCUMULATION: SAID,
    }
    assert changes(before, now, between_updates=True) == {
        "umed_num_candidates": FIXED,
        "umed_packed": SAID,
        BATCH: FIXED,
        ACCUMULATION: FIXED,
    }
    found = find_changes(before, now, between_updates=True)
    faults = refusals(found, "checkpoint-3", {"umed_num_candidates"}, between_updates=True)
    assert len(faults) == 3 and all("is in the middle of a rollout" in fault for fault in faults)


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("seed", 0, 1),
        ("data_seed", None, 1),
        ("data_path", "a.json", "b.json"),
        (RECORDS, {"path": "9 records", "sha256": "a"}, {"path": "9 records", "sha256": "b"}),
        (SYMBOLS, {"path": "a.yaml", "sha256": "a"}, {"path": "a.yaml", "sha256": "b"}),
        ("umed_augment", False, True),
        ("umed_vrr_heads", "8-31", "0-31"),
    ],
)
def test_between_updates_the_queries_and_their_order_stay(name, before, now):
    """The seed also says which answers of a rollout are in which minibatch: with another, some would be learnt from twice."""
    before, now = {name: before, "lr_scheduler_type": "cosine"}, {name: now, "lr_scheduler_type": "linear"}
    assert changes(before, now) == {name: ACCEPTED, "lr_scheduler_type": ACCEPTED}
    assert changes(before, now, between_updates=True) == {name: FIXED, "lr_scheduler_type": ACCEPTED}
    found = find_changes(before, now, between_updates=True)
    (fault,) = refusals(found, "checkpoint-3", {name, "lr_scheduler_type"}, between_updates=True)
    assert "is in the middle of a rollout that was made with it" in fault


def test_files_and_checkpoints_count_by_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(2**20))
        (tmp_path / f"{name}.json").write_text("[]")

    def of(name):
        return settings_of(Arguments(data_path=str(tmp_path / f"{name}.json"), model_name_or_path=str(tmp_path / name)))

    before = of("a")
    assert changes(before, of("b")) == {}
    weights = bytearray(2**20)
    weights[-1] = 1
    (tmp_path / "b" / "model.safetensors").write_bytes(weights)
    (tmp_path / "b.json").write_text("[1]")
    assert changes(before, of("b")) == {"data_path": ACCEPTED, "model_name_or_path": FIXED}


def test_records_count_wherever_their_images_are():
    first = [{"id": 1, "image": "/here/1.png"}, {"id": 2}]
    moved = [{"id": 1, "image": "/there/1.png", "provenance": {"recipe_sha256": "other"}}, {"id": 2}]
    assert records_digest(first) == records_digest(moved) != records_digest(first[:1])
    found = find_changes({RECORDS: records_digest(first)}, {RECORDS: records_digest(first[:1])})
    (fault,) = refusals(found, "checkpoint-3", set())
    assert "the records of --umed_recipe 1 records" in fault and "--umed_accept_changed records" in fault


def test_refusals_name_the_flag_and_both_values_and_what_can_be_accepted():
    found = find_changes(settings_of(Arguments()), settings_of(Arguments(learning_rate=0.5, seed=7, lora_r=8)))
    rate, rank, seed = sorted(refusals(found, "checkpoint-4", set()))
    assert rate.startswith("--learning_rate 0.5: checkpoint-4 was trained with 0.001, and its optimizer")
    assert rank.startswith("--lora_r 8: checkpoint-4 was trained with 4, which")
    assert "--umed_accept_changed seed" in seed
    assert len(refusals(found, "checkpoint-4", {"seed", "lora_r"})) == 2


def test_every_flag_of_the_plugin_has_a_kind_and_what_samples_is_compared():
    kinds = {flag.name: kind_of(flag.name) for flag in dataclasses.fields(UmedFlags)}
    assert kinds["umed_algorithm"] == FIXED and kinds["umed_value_learning_rate"] == RESTORED
    compared = ("umed_rewards", "umed_temperature", "umed_kl_coef", "umed_on_bad_image", "umed_stock_template_share")
    assert {kinds[name] for name in compared} == {ACCEPTED}


def test_the_last_checkpoint_and_one_without_settings(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.partial"):
        (tmp_path / name).mkdir()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-10" and stored_settings(checkpoint) is None
    (checkpoint / "umed.json").write_text(json.dumps({"umed_stage": "rewarding"}))
    assert stored_settings(checkpoint) is None
    for damaged, said in (
        ('{"settings": [1]}', "its settings are a list"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
    ):
        (checkpoint / "umed.json").write_text(damaged)
        with pytest.raises(UmedError, match=said):
            stored_settings(checkpoint)
    # A flag that only one of the two knows, as after an update of a library, is not compared.
    assert find_changes({"old": 1}, {"new": 1}) == []
