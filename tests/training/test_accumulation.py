"""Gradient accumulation in stage 2: answers to a whole optimizer step are sampled together, and teach what one batch would."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from support.records import grounded_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run, weights

from umed_plugin.errors import UmedError
from umed_plugin.training.query_reader import QueryReader, rank_batches
from umed_plugin.training.sampler import EpochSampler

# Sampling without chance, so that every split of the batch samples the same: candidate k begins with the k-th likeliest token,
# and answers of odd records end early. Each sampling is written down: the records, and the step that it belongs to.
REWARD = """
import json, os
import torch
import umed_plugin.training.experience_maker as maker
import umed_plugin.model.sampling as sampling
import umed_plugin.training.rollout_engine as engine

class Pays:
    def __init__(self):
        roll_out, generate, state = maker.ExperienceMaker.roll_out, engine.generate, {}

        def noting(self, policy, batches):
            state.update(self=self, records=[record for batch in batches for record in batch["records"]])
            return roll_out(self, policy, batches)

        def counting(model, prompts, settings):
            k, eos, records = settings.num_candidates, settings.eos_token_id, state["records"]
            some, state["records"] = records[: len(prompts.mask)], records[len(prompts.mask) :]
            odd = [int(record["patient"]) % 2 for record in some for _ in range(k)]
            state.update(drawn=0, k=k, eos=eos, odd=torch.tensor(odd, dtype=torch.bool))
            made = state["self"]
            line = {"step": made.metrics._trainer.state.global_step, "ids": [record["id"] for record in some]}
            with open(os.path.join(made.args.output_dir, f"sampled_{made.args.process_index}.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\\n")
            return generate(model, prompts, settings)

        def next_token(logits, settings):
            drawn, state["drawn"] = state["drawn"], state["drawn"] + 1
            if drawn == 0:
                ranks = torch.arange(len(logits)) % state["k"]
                return logits[:, 3:].topk(state["k"]).indices.gather(1, ranks[:, None])[:, 0] + 3
            tokens = logits[:, 3:].argmax(-1) + 3
            return torch.where(state["odd"], state["eos"], tokens) if drawn == 1 else tokens

        maker.ExperienceMaker.roll_out, engine.generate, sampling._next_token = noting, counting, next_token

    def __call__(self, prompts, completions, *, record, **columns):
        return [float(index % 4 % 3) + int(each["patient"]) / 10 for index, each in enumerate(record)]
"""
# Plain gradient descent shows the gradient; Adam makes whole steps of rounding errors.
FLAGS = shlex.split(
    "--umed_stage rewarding --umed_rewards pays:Pays --umed_reward_norm none --umed_num_candidates 4 --umed_max_new_tokens 6"
    " --optim sgd --learning_rate 0.05 --lr_scheduler_type constant --max_grad_norm 0 --umed_entropy_coef 0.01"
)
PPO = shlex.split("--umed_algorithm ppo --umed_value_learning_rate 0.05")
TWICE = shlex.split("--umed_updates_per_rollout 2 --umed_minibatches_per_rollout 2")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = grounded_records(tmp_path_factory.mktemp("data"))
    (file.parent / "pays.py").write_text(REWARD)
    return file


def train(checkpoint: Path, records: Path, out: Path, *flags: str, processes: int = 1) -> None:
    command = ["python", "-m", "llava.train.train_mem"] if processes == 1 else TWO_PROCESSES
    run = umed_run([*command, *train_flags(checkpoint, records, out, *FLAGS, *flags)], pythonpath=records.parent)
    assert run.returncode == 0, run.stderr[-3000:]


def batches(size: int, accumulation: int, steps: int) -> list[str]:
    return shlex.split(
        f"--per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation} --max_steps {steps}"
    )


def sampled(out: Path, rank: int = 0) -> list[tuple[int, list[str]]]:
    """Each call of `generate`: optimizer steps done, and ids of the records."""
    lines = (out / f"sampled_{rank}.jsonl").read_text().splitlines()
    return [(line["step"], line["ids"]) for line in map(json.loads, lines)]


def check_equal(found: Path, expected: Path, start: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs, before = weights(found), weights(expected), load_file(start / "model.safetensors")
    moved = 0.0
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        distance = tensor - before.get(name.removeprefix("base_model.model."), torch.zeros(()))
        moved = max(moved, float(distance.abs().max()))
    assert moved > 1e-3


DAPO = shlex.split("--umed_loss_aggregation dapo --umed_cut_off mask --umed_kl_coef 0.5")


@pytest.mark.parametrize("flags", [[], DAPO, PPO, [*PPO, *TWICE]], ids=["grpo", "dapo", "ppo", "ppo-minibatches"])
def test_accumulation_and_processes_teach_what_one_batch_does_and_sample_once_a_step(
    flags, tiny_llama, records, tmp_path
):
    """Answers are of different lengths, so the token counts of micro-batches differ."""
    steps = 4 if TWICE[0] in flags else 2
    one, four = tmp_path / "one", tmp_path / "four"
    train(tiny_llama, records, one, *flags, *batches(4 if steps == 2 else 2, 1, steps))
    train(tiny_llama, records, four, *flags, *batches(1, 4 if steps == 2 else 2, steps))
    assert sampled(four) == sampled(one)
    assert len(sampled(four)) == 2
    if steps == 2:  # minibatches are drawn from a shuffled rollout: their micro-batches are the same queries
        check_equal(four, one, tiny_llama)
        first, again = (json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (one, four))
        for a, b in zip(first[:2], again[:2]):
            assert {"policy_loss", "kl", "reward/total", "answers_cut_off"} <= a.keys()
            for name in ("loss", "policy_loss", "kl", "entropy", "reward/total", "answers_cut_off", "kl_per_answer"):
                assert b[name] == pytest.approx(a[name], abs=2e-4 if name == "loss" else 1e-5), name
    if flags in ([], DAPO):
        two = tmp_path / "two"
        train(tiny_llama, records, two, *flags, *batches(1, 2, steps), processes=2)
        check_equal(two, one, tiny_llama)
        asked = [sampled(two, rank) for rank in (0, 1)]
        assert all(len(calls) == 2 for calls in asked)
        for (_, whole), *parts in zip(sampled(one), *asked):
            assert sorted(whole) == sorted(name for _, ids in parts for name in ids)


def test_the_end_of_an_epoch_a_bound_and_a_resumed_run_keep_the_order_of_the_data(tiny_llama, records, tmp_path):
    names = [record["id"] for record in json.loads(records.read_text())]
    order = [names[index] for epoch in (0, 1) for index in EpochSampler(len(names), 42).order(epoch)]

    # Five batches an epoch do not fill three steps of two.
    ends = tmp_path / "ends"
    train(tiny_llama, records, ends, *batches(2, 2, 4), "--dataloader_num_workers", "1")
    calls = sampled(ends)
    assert [name for _, ids in calls for name in ids] == order[: sum(len(ids) for _, ids in calls)]
    assert [len(ids) for _, ids in calls][:3] == [4, 4, 1]
    assert {step for step, _ in calls} == {0, 1, 2, 3}

    # Three steps an epoch: the run is stopped in the second one. At most two questions are sampled together.
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*batches(1, 3, 6), "--save_steps", "4", "--umed_sampling_batch_size", "2"]
    train(tiny_llama, records, whole, *flags)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    train(tiny_llama, records, resumed, *flags)
    assert [name for _, ids in sampled(whole) for name in ids] == order
    assert [len(ids) for _, ids in sampled(whole)] == [2, 1] * 6
    assert sampled(resumed) == sampled(whole)[8:]
    check_equal(resumed, whole, tiny_llama)


@pytest.mark.parametrize(("size", "accumulation", "steps", "at"), [(2, 2, 7, 4), (1, 4, 6, 3)])
def test_a_run_resumed_in_an_epoch_that_does_not_fill_whole_steps_passes_over_no_record(
    size, accumulation, steps, at, tiny_llama, records, tmp_path
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*batches(size, accumulation, steps), "--save_steps", str(at)]
    train(tiny_llama, records, whole, *flags)
    resumed.mkdir()
    shutil.copytree(whole / f"checkpoint-{at}", resumed / f"checkpoint-{at}")
    train(tiny_llama, records, resumed, *flags)
    assert sampled(resumed) == [(step, ids) for step, ids in sampled(whole) if step >= at]
    check_equal(resumed, whole, tiny_llama)
    last = [json.loads((out / "trainer_state.json").read_text())["epoch"] for out in (whole, resumed)]
    assert last[1] == pytest.approx(last[0])


def test_the_reader_reads_each_batch_once_ahead_and_from_anywhere():
    read = []

    class Noting(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> int:
            read.append(index)
            return index

    reader = QueryReader(
        Noting(), list, 0, lambda epoch: [[10 * epoch + 2 * i, 10 * epoch + 2 * i + 1] for i in range(5)]
    )
    assert reader.read(0, 0, 2) == [[0, 1], [2, 3]]
    assert reader.read(0, 2, 2) == [[4, 5], [6, 7]]
    assert reader.read(0, 4, 2) == [[8, 9]], "an epoch ends"
    assert reader.read(1, 3, 1) == [[16, 17]]
    assert read == [*range(10), 16, 17]
    assert reader.position(1, [18, 19]) == 4 and reader.position(1, [10, 11]) == 0
    with pytest.raises(UmedError, match="not a batch of epoch 0"):
        reader.position(0, [10, 11])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_rank_reads_what_accelerate_deals_it(processes, drop_last):
    """As in the trainer: the batches of a data loader that accelerate has prepared."""
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader

    Accelerator(cpu=True)  # its state is asked for the device

    def dealt(rank: int) -> list[list[int]]:
        loader = torch.utils.data.DataLoader(range(11), 2, sampler=range(10, -1, -1), drop_last=drop_last)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)
        return list(loader.batch_sampler)

    for rank in range(processes):
        assert rank_batches(range(10, -1, -1), 2, processes, rank, drop_last) == dealt(rank)
