"""The trainer that LLaVA's script makes: which one a stage gets, and the order of its records."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.llava_args import parse
from support.llava_models import load

from umed_plugin import patching
from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.patches import ALL

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Lengths(list):
    """A data set of which the trainer needs the lengths alone; below 0: without an image."""

    @property
    def modality_lengths(self) -> list[int]:
        return self


@pytest.mark.parametrize("grouped", ["--group_by_modality_length", "--group_by_length", "--remove_unused_columns"])
@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["images", "mixed"])
def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(flags, grouped, signs):
    from llava.train.llava_trainer import LLaVATrainer

    patching.apply(ALL)
    lengths = Lengths(sign * (i % 7 + 1) for i in range(20) for sign in signs)
    items = [{"input_ids": [0] * abs(length)} for length in lengths]

    def epochs(moved: int, *more: str) -> list[list[int]]:
        _, _, args = parse([*flags, "--umed_stage", "instruction_tuning", grouped, "True", *more])
        data = lengths if args.group_by_modality_length else items
        trainer = LLaVATrainer.__new__(LLaVATrainer)
        trainer.args, trainer.train_dataset = args, data
        trainer.tokenizer = trainer.processing_class = None
        sampler = trainer._get_train_sampler()
        found = []
        for _ in range(2):
            torch.rand(moved)
            before = torch.random.get_rng_state()
            found.append([int(index) for index in sampler])
            assert torch.equal(torch.random.get_rng_state(), before)
        assert sorted(found[0]) == list(range(len(sampler))) == sorted(found[1])
        return found

    first, second = epochs(0)
    assert first != second
    assert epochs(5) == [first, second]
    assert epochs(0, "--seed", "7") != [first, second]
    assert epochs(0, "--seed", "7", "--data_seed", "42") == [first, second]


class AnyTrainer:
    """Takes what LLaVA hands to its trainer."""

    def __init__(self, *, model, args, train_dataset):
        self.model, self.args, self.callbacks = model, args, []

    def add_callback(self, callback):
        self.callbacks.append(callback)


def test_the_trainer_is_chosen_by_the_stage_and_trains_float32_without_deepspeed(monkeypatch, capsys, tmp_path):
    import torch
    from llava.train import train as llava_train

    monkeypatch.setattr(llava_train, "LLaVATrainer", AnyTrainer)
    ours = type("RewardingTrainer", (AnyTrainer,), {})
    monkeypatch.setitem(sys.modules, "umed_plugin.training.trainer", SimpleNamespace(RewardingTrainer=ours))
    tuning = type("TuningTrainer", (AnyTrainer,), {})
    monkeypatch.setitem(sys.modules, "umed_plugin.training.tuning_trainer", SimpleNamespace(TuningTrainer=tuning))
    from umed_plugin.patches import trainer

    def made(**changes):
        """The trainer for these arguments, and the dtype of its bf16 model then."""
        values = {"umed_stage": None, "bf16": False, "fp16": False, "deepspeed": None, "fsdp": [], "world_size": 1}
        values |= {
            "process_index": 0,
            "bits": 16,
            "device": torch.device("cpu"),
            "umed_tower_lr": None,
            "umed_stop_after": 0,
            "output_dir": str(tmp_path),
        }
        args = SimpleNamespace(**{**values, **changes})
        args.umed = UmedFlags(**{name: value for name, value in changes.items() if name.startswith("umed_")})
        model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
        model.config = SimpleNamespace()
        run = SimpleNamespace(model_args=SimpleNamespace(pretrain_mm_mlp_adapter=None))
        named = {"labelled": np.array([True]), "probe": np.array([False]), "report": np.array([False])}
        records = SimpleNamespace(column=named.get)
        dataset = SimpleNamespace(data_args=SimpleNamespace(umed_run=run), list_data_dict=records)
        chosen = llava_train.LLaVATrainer(model=model, args=args, train_dataset=dataset)
        assert vars(model.config) == ({"umed_label_share": 1} if args.umed_stage == "instruction_tuning" else {})
        return type(chosen), model.weight.dtype, len(chosen.callbacks)

    recorder = patching.Recorder()
    trainer.PATCH.apply(recorder)
    try:
        assert made(bf16=True) == (AnyTrainer, torch.bfloat16, 0)
        assert made(umed_stage="instruction_tuning") == (AnyTrainer, torch.bfloat16, 2)
        assert made(umed_stage="rewarding", bf16=True) == (ours, torch.float32, 2)
        assert made(umed_stage="instruction_tuning", fp16=True) == (AnyTrainer, torch.float32, 2)
        assert made(umed_stage="instruction_tuning", umed_attention_loss=0.03)[0] is tuning
        assert made(umed_stage="instruction_tuning", umed_keep="0.1")[0] is tuning
        assert made(umed_stage="instruction_tuning", umed_replay=0.2)[0] is tuning
        assert made(umed_stage="rewarding", bf16=True, deepspeed="zero2.json") == (ours, torch.bfloat16, 1)
        assert not capsys.readouterr().err
        assert made(umed_stage="instruction_tuning", bf16=True, fsdp=["full_shard"]) == (AnyTrainer, torch.bfloat16, 1)
        assert "--fsdp trains weights of 16 bits" in capsys.readouterr().err
    finally:
        recorder.undo()


def test_a_model_that_deepspeed_will_move_is_on_its_device_before_a_trainer_is_made():
    """Trainers try its attention and copy its weights. The device "meta" stands for a GPU."""
    from umed_plugin.patches.trainer import _move_to_device

    def device_of(deepspeed, bits=16, in_parts=False):
        model = torch.nn.Linear(1, 1)
        if in_parts:
            model.weight.ds_id = 0
        _move_to_device(model, SimpleNamespace(deepspeed=deepspeed, bits=bits, device=torch.device("meta")))
        return model.weight.device.type

    assert device_of("zero2.json") == "meta"
    assert device_of(None) == device_of("zero2.json", bits=4) == device_of("zero3.json", in_parts=True) == "cpu"


@pytest.mark.parametrize("tower", [False, True], ids=["projector", "tower"])
def test_each_weight_keeps_its_rate_where_deepspeed_drops_empty_groups(tower, flags, tiny_mistral):
    """As under LoRA, no weight but the projector's and the tower's is without decay. transformers 4 makes the schedule first."""
    model = load(tiny_mistral)[1]
    patching.apply(ALL)
    from llava.train.llava_trainer import LLaVATrainer

    from umed_plugin.training.tuning_trainer import TuningTrainer

    def rate_of(name: str) -> float:
        return 2e-6 if "vision_tower" in name else 2e-5 if "mm_projector" in name else 2e-4

    trained = ("model.layers.0.self_attn.q_proj", "mm_projector", *(("vision_tower",) if tower else ()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    rates = ["--learning_rate", "2e-4", "--mm_projector_lr", "2e-5"]
    _, _, args = parse([*flags, *rates, "--umed_stage", "instruction_tuning"])
    args.umed_tower_lr = 2e-6 if tower else None
    for deepspeed in ("zero2.json", None):
        trainer = (TuningTrainer if tower else LLaVATrainer).__new__(TuningTrainer if tower else LLaVATrainer)
        trainer.model, trainer.args, trainer.optimizer = model, args, None
        args.deepspeed = deepspeed
        optimizer = trainer.create_optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        groups = [group for group in optimizer.param_groups if group["params"]]  # as DeepSpeed's engine does
        assert (len(groups) < len(optimizer.param_groups)) == (deepspeed is None), "a resumed run needs as many groups"
        if deepspeed is not None:
            found = {names[id(p)]: rate for group, rate in zip(groups, schedule.base_lrs) for p in group["params"]}
            assert found == {name: rate_of(name) for name in names.values()}


@pytest.mark.parametrize("rate", [2e-5, 2e-4], ids=["own rate", "one rate"])
def test_a_schedule_that_had_a_rate_for_the_empty_group_goes_on_with_the_right_rates(
    rate, tmp_path, capsys, monkeypatch
):
    """Such are the checkpoints of earlier releases under DeepSpeed and transformers 4. A torch schedule takes no other number."""
    patching.apply(ALL)
    from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper

    # transformers imports it where DeepSpeed is installed.
    monkeypatch.setattr("transformers.trainer.DeepSpeedSchedulerWrapper", DeepSpeedSchedulerWrapper, raising=False)
    from llava.train.llava_trainer import LLaVATrainer

    def schedule_over(*groups):
        optimizer = torch.optim.SGD([{"params": params, "lr": rate} for params, rate in groups], lr=1.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(lambda step, last: 1 - step / last, last=10))

    def weight():
        return [torch.nn.Parameter(torch.zeros(1))]

    groups = [(weight(), 2e-4), ([], 2e-4), (weight(), rate)]
    before, now = schedule_over(*groups), schedule_over(groups[0], groups[2])
    before.optimizer.step()
    before.step()
    trainer = LLaVATrainer.__new__(LLaVATrainer)
    trainer.args = SimpleNamespace(umed_stage="rewarding", deepspeed="zero2.json", process_index=0)
    trainer.is_deepspeed_enabled, trainer.lr_scheduler = True, now
    for state in (before, now):
        torch.save(state.state_dict(), tmp_path / "scheduler.pt")
        trainer._load_optimizer_and_scheduler(str(tmp_path))
        warned = "learned at the rate of another group" in capsys.readouterr().err
        assert warned == (state is before and rate != 2e-4)
        assert now.last_epoch == 1 and now.base_lrs == [2e-4, rate]
        assert [group["lr"] for group in now.optimizer.param_groups] == now.get_last_lr() == [1.8e-4, 0.9 * rate]


def test_the_entries_of_a_tower_in_parts_are_all_counted(tiny_mistral):
    """Under ZeRO-3 a parameter is empty, and says how many entries it has in all."""
    from umed_plugin.training.trained_tower import unfreeze_tower

    model = load(tiny_mistral)[1]
    entries = unfreeze_tower(model)
    for parameter in model.get_vision_tower().parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert unfreeze_tower(model) == entries > 0


def test_a_tower_whose_rate_deepspeeds_own_optimizer_undoes_is_not_trained():
    """The flags are checked for that; this is the door behind."""
    from accelerate.utils.deepspeed import DummyOptim

    patching.apply(ALL)
    from umed_plugin.training.tuning_trainer import TuningTrainer

    trainer = TuningTrainer.__new__(TuningTrainer)
    trainer.args = SimpleNamespace(umed_tower_lr=1e-6)
    trainer.model = torch.nn.Linear(1, 1)
    trainer.optimizer = DummyOptim(trainer.model.parameters())
    with pytest.raises(UmedError, match="Remove optimizer and scheduler"):
        trainer.create_optimizer()
