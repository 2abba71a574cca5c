"""Dynamic sampling: which groups are replaced, by which queries, and real runs in one and two processes, whole and resumed."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil

import pytest
import torch
from support.records import grounded_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run, weights

from umed_plugin.training.dynamic_sampling import Dealing, FurtherQueries, replace_without_signal
from umed_plugin.training.experience import Samples

K = 3


def samples(rewards, tokens, seed, counted=None):
    """Random answers of 1 to ``tokens`` tokens to as many queries as there are rows of rewards."""
    shuffle = torch.Generator().manual_seed(seed)
    count = len(rewards)
    lengths = torch.randint(1, tokens + 1, (count * K,), generator=shuffle)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    numbers = torch.randn(count * K, tokens, generator=shuffle) * mask
    prompts = [torch.tensor([seed, query]) for query in range(count)]
    kept = None if counted is None else torch.tensor(counted).flatten()
    features = torch.randn(count, 4, 5, generator=shuffle)
    ids = torch.randint(0, 50, mask.shape, generator=shuffle)
    return Samples(prompts, features, ids, mask, numbers, numbers + 1, None, torch.tensor(rewards), kept)


SIGNAL, NONE = [0.0, 1.0, 2.0], [0.5, 0.5, 0.5]


def test_groups_without_signal_give_their_places_to_further_ones_with_signal():
    first = samples([NONE, SIGNAL, NONE, NONE], tokens=5, seed=1)
    rounds = [samples([NONE, SIGNAL, NONE], tokens=7, seed=2), samples([SIGNAL, SIGNAL], tokens=3, seed=3)]
    asked = []

    def sample(count):
        asked.append(count)
        return rounds[len(asked) - 1]

    found, origins, done = replace_without_signal(first, sample, lambda own: own, 5)
    assert asked == [3, 2] and done == 2
    assert origins == [(1, 1), (0, 1), (2, 0), (2, 1)]
    assert [ids.tolist() for ids in found.prompt_ids] == [[2, 1], [1, 1], [3, 0], [3, 1]]
    sources = [(rounds[0], 1), (first, 1), (rounds[1], 0), (rounds[1], 1)]
    for query, (source, place) in enumerate(sources):
        ours, theirs = found.part([query]), source.part([place])
        for field in dataclasses.fields(Samples):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "prompt_ids":
                assert torch.equal(one[0], other[0])
            elif field.name == "token_ids":
                assert torch.equal(one * ours.mask, other * theirs.mask)
            else:
                assert one is other is None or torch.equal(one, other), field.name


def test_samplings_are_bounded_and_shared_by_all_ranks():
    first = samples([NONE, SIGNAL], tokens=4, seed=1)
    calls = []

    def nothing_new(count):
        calls.append(count)
        return samples([NONE] * count, tokens=4, seed=9)

    found, origins, done = replace_without_signal(first, nothing_new, lambda own: own, 2)
    assert calls == [1, 1] and origins == [(0, 0), (0, 1)] and done == 2
    assert torch.equal(found.rewards, first.rewards), "what no further query could replace stays"
    # Another rank still needs two: this one samples along, and changes nothing.
    needed = iter([2, 1, 0])
    calls.clear()
    whole = samples([SIGNAL, SIGNAL], tokens=4, seed=1)
    found, origins, done = replace_without_signal(whole, nothing_new, lambda own: next(needed), 9)
    assert calls == [2, 1] and origins == [(0, 0), (0, 1)] and done == 2 and found is whole


def test_answers_that_are_left_out_of_the_loss_make_no_signal():
    left_out = [[True, True, False], [True, True, True]]
    first = samples([[1.0, 1.0, 9.0], SIGNAL], tokens=4, seed=1, counted=left_out)
    more = samples([SIGNAL], tokens=4, seed=2, counted=[[True, True, False]])
    found, origins, _ = replace_without_signal(first, lambda count: more, lambda own: own, 1)
    assert origins == [(1, 0), (0, 1)] and found.counted_by_query.tolist() == [[True, True, False], [True] * 3]


class Numbers(torch.utils.data.Dataset):
    """Ten records; an item is the index that was asked for."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


def test_further_queries_are_dealt_once_in_an_order_that_goes_on_where_a_checkpoint_says():
    ranks = [FurtherQueries(Numbers(), list, Dealing(seed=5, rank=rank, ranks=2)) for rank in (0, 1)]
    taken = [[query for count in (2, 1, 2, 3) for batch in rank.take(count, 2) for query in batch] for rank in ranks]
    assert sorted(taken[0][:5] + taken[1][:5]) == list(range(10)), "an epoch has each record once"
    assert {rank.taken for rank in ranks} == {16}
    assert [len(batch) for batch in ranks[0].take(5, 2)] == [2, 2, 1]
    again = FurtherQueries(Numbers(), list, Dealing(seed=5, rank=1, ranks=2))
    again.taken = 10
    assert again.take(3, 3) == [taken[1][5:]]
    other = FurtherQueries(Numbers(), list, Dealing(seed=6, rank=1, ranks=2))
    assert other.take(5, 5) != FurtherQueries(Numbers(), list, Dealing(5, 1, 2)).take(5, 5)
    numbered = FurtherQueries(Numbers(), list, Dealing(5, 0, 1), numbered=True)
    assert [query // 10 for (query,) in numbered.take(21, 1)] == [0] * 10 + [1] * 10 + [2]


# Only every third record teaches. Each sampling is written down: the records of its questions.
REWARD = """
import json, os

def teaches(prompts, completions, *, record, **columns):
    with open(os.environ["SEEN"] + os.environ.get("RANK", "0"), "a") as file:
        file.write(json.dumps([each["id"] for each in record[::4]]) + "\\n")
    return [float(index % 4) * (int(each["patient"]) % 3 == 1) for index, each in enumerate(record)]
"""
FLAGS = shlex.split(
    "--umed_stage rewarding --umed_rewards every_third:teaches --umed_reward_norm none --umed_num_candidates 4"
    " --umed_max_new_tokens 4 --umed_cut_off keep --umed_dynamic_sampling 3 --per_device_train_batch_size 3"
)
TWICE = shlex.split("--umed_updates_per_rollout 2 --umed_minibatches_per_rollout 1")


def run(checkpoint, records, out, monkeypatch, *flags, processes=1):
    """A run; returns what each rank sampled, and the log."""
    (records.parent / "every_third.py").write_text(REWARD)
    seen = out.parent / f"{out.name}-seen"
    monkeypatch.setenv("SEEN", str(seen))
    command = ["python", "-m", "llava.train.train_mem"] if processes == 1 else TWO_PROCESSES
    done = umed_run([*command, *train_flags(checkpoint, records, out, *FLAGS, *flags)], pythonpath=records.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [seen.with_name(f"{seen.name}{rank}").read_text().splitlines() for rank in range(processes)]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [[json.loads(line) for line in rank] for rank in lines], [row for row in log if "extra_samplings" in row]


@pytest.mark.parametrize(("flags", "steps", "at"), [([], 4, 2), (TWICE, 6, 3)], ids=["grpo", "two-updates"])
def test_a_resumed_run_takes_the_same_further_queries(flags, steps, at, tiny_llama, tmp_path, monkeypatch):
    records = grounded_records(tmp_path / "data")
    flags = [*flags, "--max_steps", str(steps), "--save_steps", str(at), "--umed_log_candidates", "1"]
    (whole,), log = run(tiny_llama, records, tmp_path / "whole", monkeypatch, *flags)
    rollouts = steps if steps == 4 else steps // 2
    assert [len(ids) for ids in whole].count(3) >= rollouts
    assert len(log) >= rollouts and all(0 <= row["extra_samplings"] <= 3 for row in log)
    assert sum(row["extra_samplings"] for row in log) == len(whole) - rollouts > 0
    replaced = sum(row["groups_replaced"] for row in log)
    teaching = sum(int(name.split("-")[1]) % 3 == 1 for ids in whole for name in ids)
    assert 0 < replaced <= teaching

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{at}", resumed / f"checkpoint-{at}")
    shutil.copy2(
        tmp_path / "whole" / "candidates.jsonl", resumed
    )  # with the steps behind the checkpoint, which are taken again
    (again,), _ = run(tiny_llama, records, resumed, monkeypatch, *flags)
    assert again == whole[-len(again) :] and len(again) < len(whole)
    logged, logged_again = (out / "candidates.jsonl" for out in (tmp_path / "whole", resumed))
    assert logged_again.read_text() == logged.read_text()
    lines = [json.loads(line) for line in logged.read_text().splitlines()]
    assert sum("extra_sampling" in line for line in lines) == len(whole) - rollouts
    teaches = [int(str(line["id"]).split("-")[1]) % 3 == 1 for line in lines]
    assert all(
        told for told, line in zip(teaches, lines) if line.get("extra_sampling") and line.get("learnt_from", True)
    )
    assert all("learnt_from" not in line for told, line in zip(teaches, lines) if told and "extra_sampling" not in line)
    expected, found = weights(tmp_path / "whole"), weights(resumed)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_two_processes_sample_equally_often_and_as_many(tiny_llama, tmp_path, monkeypatch):
    records = grounded_records(tmp_path / "data")
    (first, second), log = run(tiny_llama, records, tmp_path / "out", monkeypatch, "--max_steps", "2", processes=2)
    assert [len(ids) for ids in first] == [len(ids) for ids in second] and len(first) > 2
    assert sum(row["extra_samplings"] for row in log) == len(first) - 2
    assert sum(row["groups_replaced"] for row in log) > 0
    assert all(not set(one) & set(other) for one, other in zip(first, second))
