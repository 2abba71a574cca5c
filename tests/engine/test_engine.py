"""Stage 2 and evaluation with answers from a real vLLM server on the CPU: ``make test-engine``.

One server holds a tiny checkpoint in float32 for all tests but the last, which kills it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from support.engine import Engine, engine
from support.records import evaluated_records, grounded_records
from support.umed_runs import reward, weights

from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.cli import main
from umed_plugin.model.answerer import prompt_ids
from umed_plugin.model.forward import answer_pass, embed_prompts, encode_images
from umed_plugin.model.output_layer import Scoring
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.model.server_sampling import mean_difference, sample_on_server, vocabulary_of, write_adapter
from umed_plugin.remote.rollout_server import RolloutServer, RolloutServerError

PYTHON = os.environ.get("UMED_ENGINE_PYTHON")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.run,
    pytest.mark.skipif(PYTHON is None, reason="UMED_ENGINE_PYTHON names no environment with vLLM: make test-engine"),
]
QUESTIONS = 12
LENGTH = 24


@pytest.fixture(scope="module")
def running(tiny_mistral, tmp_path_factory):
    with engine(tiny_mistral, PYTHON, tmp_path_factory.mktemp("engine"), "--lora-rank", "8") as server:
        yield server


@pytest.fixture(scope="module")
def loaded(tiny_mistral):
    return load_checkpoint(tiny_mistral, device="cpu")


@pytest.fixture
def client(running) -> RolloutServer:
    return RolloutServer(running.url, timeout=300.0)


@pytest.fixture(scope="module")
def prompts(loaded):
    """Twelve questions of several lengths about twelve images of noise."""
    tokenizer, model, _ = loaded
    images = torch.randn(QUESTIONS, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = [
        prompt_ids(f"Where is it{' exactly' * (row % 4)}?", "umed_mistral", tokenizer, model.config)
        for row in range(QUESTIONS)
    ]
    with torch.no_grad():
        return embed_prompts(model, ids, encode_images(model, images))


def settings_of(tokenizer, temperature: float, k: int = 1) -> SamplingSettings:
    return SamplingSettings(LENGTH, tokenizer.eos_token_id, temperature, num_candidates=k)


def own_log_probs(model, prompts, candidates, temperature: float = 1.0):
    with torch.no_grad():
        return answer_pass(model, prompts, candidates, scoring=Scoring(temperature)).scores.log_probs


def compare_greedy(client, name, tokenizer, model, prompts) -> None:
    """The same greedy answers, and log-probabilities within 1e-5."""
    ours = generate(model, prompts, settings_of(tokenizer, 0.0))
    theirs = sample_on_server(client, name, prompts, settings_of(tokenizer, 0.0), vocabulary_of(model))
    assert theirs.candidates.answers() == ours.answers()
    difference = (own_log_probs(model, prompts, theirs.candidates) - theirs.log_probs).abs().max().item()
    assert difference < 1e-5


def test_greedy_answers_are_ours(client, loaded, prompts):
    tokenizer, model, _ = loaded
    compare_greedy(client, client.base_model(), tokenizer, model, prompts)


def test_an_adapter_that_is_loaded_at_run_time_answers_as_ours(client, tiny_mistral, prompts, tmp_path):
    from peft import LoraConfig, get_peft_model

    tokenizer, model, _ = load_checkpoint(tiny_mistral, device="cpu")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names = [n for n, m in model.named_modules() if n.split(".")[-1] in targets and n.startswith("model.layers.")]
    policy = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names)).eval()
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    before = sample_on_server(client, client.base_model(), prompts, settings_of(tokenizer, 0.0), vocabulary_of(policy))
    client.load_adapter("random", write_adapter(policy, tmp_path / "random"))
    compare_greedy(client, "random", tokenizer, policy, prompts)
    after = own_log_probs(policy, prompts, before.candidates)
    assert mean_difference(after, before.log_probs, before.candidates.mask) > 0.01, "the adapter changes something"
    client.unload_adapter("random")
    with pytest.raises(RolloutServerError, match="'random' is not loaded there"):
        sample_on_server(client, "random", prompts, settings_of(tokenizer, 0.0), vocabulary_of(policy))


def test_sampled_answers_carry_the_probabilities_of_their_temperature(client, loaded, prompts):
    tokenizer, model, _ = loaded
    answers = sample_on_server(
        client, client.base_model(), prompts, settings_of(tokenizer, 0.5, k=4), vocabulary_of(model)
    )
    assert answers.candidates.mask.shape[0] == 4 * QUESTIONS
    assert len({tuple(ids) for ids in answers.candidates.answers()}) > QUESTIONS
    own = own_log_probs(model, prompts, answers.candidates, temperature=0.5)
    assert ((own - answers.log_probs) * answers.candidates.mask).abs().max().item() < 1e-4


def test_the_answers_to_a_question_share_its_prefill(client, running, loaded, prompts):
    """Of K prompts that are asked for, one is computed. For the others all full blocks of 32 tokens are hits.

    The question before may have computed the block of the template's words already: that is one hit more for each.
    """
    tokenizer, model, _ = loaded
    fresh = type(prompts)(prompts.embeds * 1.01, prompts.mask, prompts.image_start, prompts.n_patches)
    before = [running.counter(f"prefix_cache_{name}") for name in ("queries", "hits")]
    sample_on_server(client, client.base_model(), fresh, settings_of(tokenizer, 1.0, k=8), vocabulary_of(model))
    asked, hits = (running.counter(f"prefix_cache_{n}") - b for n, b in zip(("queries", "hits"), before))
    lengths = prompts.mask.sum(dim=1).tolist()
    assert asked == 8 * sum(lengths)
    full_blocks = 7 * sum((length - 1) // 32 * 32 for length in lengths)
    assert full_blocks <= hits <= full_blocks + 32 * QUESTIONS


def flags_of(running: Engine) -> list[str]:
    more = "--lora_enable True --lora_r 4 --umed_rewards half:half --umed_reward_weights 1 --max_steps 4 --save_steps 4"
    return [*more.split(), "--umed_rollout_server", running.url, "--umed_rollout_timeout", "300"]


def history(output: Path, name: str) -> list[float]:
    (state,) = output.glob("checkpoint-4/trainer_state.json")
    return [entry[name] for entry in json.loads(state.read_text())["log_history"] if name in entry]


def test_stage_2_learns_from_its_answers(running, client, tiny_mistral, tmp_path):
    records = grounded_records(tmp_path / "data")
    done = reward(tiny_mistral, records, tmp_path / "out", *flags_of(running))
    assert done.returncode == 0, done.stderr[-3000:]
    assert history(tmp_path / "out", "importance_ratio") == pytest.approx([1.0] * 4, abs=1e-3)
    assert max(history(tmp_path / "out", "importance_ratio_max")) < 1.01
    assert any(tensor.abs().max() > 0 for name, tensor in weights(tmp_path / "out").items() if "lora_B" in name)
    assert '"umed-' not in running.get("/v1/models")[1], "no adapter is left"


def test_an_evaluation_by_the_server_says_the_same(running, tiny_mistral, tmp_path, capsys):
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{**record, "split": "test"} for record in evaluated_records(tmp_path)]))
    common = ["evaluate", str(tiny_mistral), "--benchmark", str(records), "--device", "cpu", "--max-new-tokens", "16"]
    for name, more in (("own", []), ("server", ["--server", running.url])):
        assert main([*common, "--out", str(tmp_path / name), *more]) == 0, capsys.readouterr()
    own, served = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("own", "server"))
    assert [json.loads(a)["answer"] for a in own.splitlines()] == [json.loads(b)["answer"] for b in served.splitlines()]


def test_a_server_that_is_killed_in_a_rollout_leaves_a_checkpoint(running, tiny_mistral, tmp_path):
    """Last: the server is gone after it."""
    records = grounded_records(tmp_path / "data")

    def kill_in_a_rollout():
        while not list((tmp_path / "out").glob("rollout_adapters/umed-*-step-2")):
            time.sleep(0.005)
        running.kill()

    threading.Thread(target=kill_in_a_rollout, daemon=True).start()
    done = reward(tiny_mistral, records, tmp_path / "out", *flags_of(running), "--umed_rollout_retries", "1")
    assert done.returncode == 1, done.stdout[-2000:]
    assert "training stopped after step 2:" in done.stderr and "cannot be reached" in done.stderr
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").is_file() or (
        tmp_path / "out" / "checkpoint-2" / "adapter_model.bin"
    ).is_file()
