"""PPO on a toy whose answers are known: what pays is learnt, and what an answer will pay is foreseen where it can be.

The model answers with one letter, once to five times. Its policy is paid for answers that are short but not empty, so it has to
end them behind the first token and no sooner. Its value network is to foresee a reward for certain letters: before the first
letter nobody can, behind it anybody can.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from support.records import grounded_records
from support.umed_runs import train_flags, umed_run

LETTERS, LONGEST = "bcdfgh", 6
REWARDS = """
def short(prompts, completions, **columns):
    return [1 / len(text) if text else 0.0 for text in completions]

def b_or_c(prompts, completions, **columns):
    return [float(text[:1] in ("b", "c")) for text in completions]
"""
FLAGS = shlex.split(
    "--umed_stage rewarding --umed_algorithm ppo --umed_reward_norm none --umed_kl_coef 0"
    " --umed_num_candidates 16 --umed_updates_per_rollout 2 --umed_minibatches_per_rollout 2"
    " --umed_gae_lambda 1 --umed_value_clip_range 10 --lr_scheduler_type constant"
    " --save_strategy no --umed_cut_off keep"
)
POLICY_MOVES = shlex.split(
    f"--umed_rewards toy:short --umed_max_new_tokens {LONGEST} --learning_rate 1e-3 --umed_value_learning_rate 3e-3"
    " --max_steps 20"
)
POLICY_STAYS = shlex.split(
    "--umed_rewards toy:b_or_c --umed_max_new_tokens 3 --learning_rate 1e-7 --umed_value_learning_rate 1e-2 --max_steps 24"
    " --umed_updates_per_rollout 4 --umed_minibatches_per_rollout 1 --per_device_train_batch_size 4"
)


def teach_babbling(checkpoint: Path, out: Path) -> None:
    """Make of a checkpoint a model that answers with 1 to 5 times one of six letters, all as likely."""
    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.model.forward import IMAGE_TOKEN_INDEX, Candidates, answer_log_probs, answer_pass, embed_prompts

    tokenizer, model, _ = load_checkpoint(checkpoint, device="cpu")
    letters = torch.tensor([tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS])
    assert tokenizer.unk_token_id not in letters.tolist()
    shuffle = torch.Generator().manual_seed(0)
    prompt = torch.tensor([tokenizer.bos_token_id, IMAGE_TOKEN_INDEX, *range(10, 20)])
    features = torch.randn(4, model.get_vision_tower().num_patches, model.config.mm_hidden_size, generator=shuffle)
    trained = [parameter for name, parameter in model.named_parameters() if "vision_tower" not in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    for _ in range(40):
        lengths = torch.randint(1, LONGEST, (32,), generator=shuffle)
        ids = letters[torch.randint(len(letters), (32, 1), generator=shuffle)].expand(-1, LONGEST)
        places = torch.arange(LONGEST)
        ids = torch.where(places < lengths[:, None], ids, tokenizer.eos_token_id)
        answers = Candidates(ids, (places <= lengths[:, None]).long())
        logits = answer_pass(model, embed_prompts(model, [prompt] * 4, features), answers).logits
        optimizer.zero_grad()
        (-answer_log_probs(logits, answers).log_probs.sum() / answers.mask.sum()).backward()
        optimizer.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@pytest.fixture(scope="module")
def babbler(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("babbler") / "babbling-llava-llama"
    teach_babbling(tiny_llama, out)
    return out


@pytest.fixture
def rollouts(babbler, tiny_llama, tmp_path):
    """Runs PPO with some more flags; returns what it logs of each rollout."""

    def run_ppo(more):
        records = grounded_records(tmp_path / "data")
        (records.parent / "toy.py").write_text(REWARDS)
        flags = train_flags(babbler, records, tmp_path / "out", *FLAGS, *more)
        flags[flags.index("--vision_tower") + 1] = str(tiny_llama / "vision_tower")
        run = umed_run(["python", "-m", "llava.train.train_mem", *flags], pythonpath=records.parent)
        assert run.returncode == 0, run.stderr[-3000:]
        history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        return [line for line in history if "explained_variance" in line]

    return run_ppo


def test_the_policy_finds_how_long_an_answer_pays(rollouts):
    lines = rollouts(POLICY_MOVES)
    paid = [line["reward/toy:short"] for line in lines]
    assert 0.1 < paid[0] < 0.6
    assert lines[0]["answer_tokens"] < LONGEST - 1, "answers of one length would not show a wrong mask"
    assert paid[-1] > 0.85


def test_the_value_network_finds_what_an_answer_will_pay_once_its_letter_is_there(rollouts):
    lines = rollouts(POLICY_STAYS)
    explained = [line["explained_variance"] for line in lines]
    assert explained[0] == pytest.approx(0, abs=1e-6)  # the value network begins at a constant
    # Returns are 0 or 1 and values the answers' mean reward; the padding behind the answers would change the mean over tokens.
    returns, begin = lines[0]["returns_mean"], lines[0]["reward/total"]
    assert lines[0]["value_loss"] == pytest.approx((returns * (1 - 2 * begin) + begin**2) / 2, rel=1e-3)
    assert 0.35 < sum(explained[-3:]) / 3 < 0.65
