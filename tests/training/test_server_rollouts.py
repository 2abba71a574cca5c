"""Stage 2 whose answers a server samples: a stand-in that samples with the plugin's own loop. tests/engine/ has vLLM."""

from __future__ import annotations

import errno
import json
import re
import shlex
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from support.judge_server import Answer
from support.records import grounded_records
from support.rollout_stand_in import StandIn, sampling, stand_in
from support.umed_runs import OWN_REWARD, TWO_PROCESSES, reward, train_flags, umed_run, weights

from umed_plugin.flags.definition import UmedFlags
from umed_plugin.remote.rollout_server import RolloutServerError
from umed_plugin.training import finite_weights
from umed_plugin.training.importance import importance_metrics, importance_weights
from umed_plugin.training.rollout_engine import Ranks, ServerRollouts

LORA = ["--lora_enable", "True", "--lora_r", "4", "--umed_rewards", "half:half", "--umed_reward_weights", "1"]
STEPS = [*LORA, "--max_steps", "4", "--save_steps", "4"]
LONG = shlex.split("--max_steps 12 --save_steps 12 --learning_rate 1e-3 --lora_r 8 --umed_num_candidates 8")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return grounded_records(tmp_path_factory.mktemp("served") / "data")


@pytest.fixture(scope="module")
def complete(tiny_mistral):
    return sampling(tiny_mistral)


def run(checkpoint, records, output, server: StandIn, *more: str):
    return reward(checkpoint, records, output, *STEPS, "--umed_rollout_server", server.url, *more)


def logged(output: Path, name: str) -> list[float]:
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    return [entry[name] for entry in json.loads(state.read_text())["log_history"] if name in entry]


def adapters(server: StandIn, done: str) -> list[str]:
    return [line.split()[1] for line in server.log if line.startswith(f"/v1/{done}_lora_adapter")]


@contextmanager
def dying_server(complete, rollout: int):
    """A stand-in that dies when it is asked for this rollout, counted from 1."""
    asked = []

    def answer(body, folder):
        asked.append(folder)
        if len(asked) == rollout:
            server.socket.close()
            threading.Thread(target=server.shutdown).start()
            raise ConnectionAbortedError
        return complete(body, folder)

    with stand_in(answer) as server:
        yield server


def test_a_run_sends_each_version_of_the_adapter_and_tidies_up(tiny_mistral, records, complete, tmp_path):
    with stand_in(complete) as server:
        done = run(tiny_mistral, records, tmp_path / "out", server)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{server.url} samples the answers, with the model 'the-model'." in done.stdout
    loaded = adapters(server, "load")
    assert [name.rpartition("-")[2] for name in loaded] == ["0", "1", "2", "3"] and len(set(loaded)) == 4
    assert adapters(server, "unload") == loaded and server.adapters == {}
    assert not (tmp_path / "out" / "rollout_adapters").exists()
    # The stand-in computes as we do: adapter, prompt and tokens arrive as they are.
    for name in ("importance_ratio", "importance_ratio_max"):
        assert logged(tmp_path / "out", name) == pytest.approx([1] * 4, abs=1e-4)
    assert logged(tmp_path / "out", "importance_truncated") == [0.0] * 4
    assert max(logged(tmp_path / "out", "server_difference")) < 1e-4
    assert any(tensor.abs().max() > 0 for name, tensor in weights(tmp_path / "out").items() if "lora_B" in name)


def test_a_server_that_dies_leaves_a_checkpoint_to_go_on_from(tiny_mistral, records, complete, tmp_path):
    flags = ["--umed_rollout_retries", "1"]
    with dying_server(complete, rollout=3) as server:
        died = run(tiny_mistral, records, tmp_path / "out", server, *flags)
    assert died.returncode == 1
    (said,) = re.findall(r"umed: error: (.*)", died.stderr)
    assert said.startswith(f"training stopped after step 2: {server.url}: cannot be reached")
    assert said.endswith(f"Saved: {tmp_path / 'out' / 'checkpoint-2'}. The same command goes on from there.")
    assert "Traceback" not in died.stderr

    with stand_in(complete) as server:
        more = run(tiny_mistral, records, tmp_path / "out", server, *flags)
    assert more.returncode == 0, more.stderr[-2000:]
    # The adapter of the run that died is unloaded, although this server does not know it.
    assert [name.rpartition("-")[2] for name in adapters(server, "load")] == ["2", "3"]
    assert len(logged(tmp_path / "out", "importance_ratio")) == 4


def test_a_server_that_dies_between_two_rollouts_leaves_none_of_them(tiny_mistral, records, complete, tmp_path):
    """The checkpoint lies behind the last update of a rollout, although the batch that failed was counted."""
    flags = ["--umed_rollout_retries", "1", "--umed_updates_per_rollout", "2"]
    with dying_server(complete, rollout=2) as server:
        died = run(tiny_mistral, records, tmp_path / "out", server, *flags)
    assert died.returncode == 1 and "training stopped after step 2" in died.stderr
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()
    assert not list((tmp_path / "out" / "checkpoint-2").glob("rollout_*.pt"))


def test_what_a_failing_step_has_moved_is_not_in_the_checkpoint(monkeypatch, tmp_path):
    """Of a trainer without a model: the step that fails takes queries, moves a reward and adapts the KL's weight."""
    from umed_plugin.training.trainer import LLaVATrainer, RewardingTrainer

    class Moving:
        moved = 0

        def state(self):
            return {"moved": self.moved}

    trainer, reward_of_ones_own = RewardingTrainer.__new__(RewardingTrainer), Moving()
    trainer.state, trainer.args = (
        SimpleNamespace(global_step=2),
        SimpleNamespace(output_dir=str(tmp_path), should_save=True, device=torch.device("cpu")),
    )
    trainer.flags, trainer.value_head, trainer.model_wrapped = UmedFlags(), None, None
    trainer.model = torch.nn.Linear(1, 1)
    rewards = {"own": reward_of_ones_own}
    trainer.maker = SimpleNamespace(kl_coef=SimpleNamespace(value=0.5), rewards=rewards, rewards_agreed=nullcontext)
    trainer.rollouts = SimpleNamespace(further=SimpleNamespace(taken=8), save=lambda folder: None)
    trainer._before_step, trainer._stopped_at = (1, None), None

    def fails(*_):
        trainer.rollouts.further.taken, reward_of_ones_own.moved, trainer.maker.kl_coef.value = 16, 1, 0.6
        raise RolloutServerError("gone")

    monkeypatch.setattr(LLaVATrainer, "training_step", fails)
    monkeypatch.setattr(LLaVATrainer, "save_model", lambda *_: None)
    monkeypatch.setattr(finite_weights, "on_any_rank", lambda trainer, condition: condition)
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *_: trainer.save_model(str(tmp_path), _internal_call=True))
    with pytest.raises(RolloutServerError):
        trainer.training_step(None, {})
    assert trainer._save_stopped().startswith(f"Saved: {tmp_path / 'checkpoint-2'}.")
    saved = json.loads((tmp_path / "rewarding_state.json").read_text())
    assert (saved["further_queries"], saved["rewards"], saved["kl_coef"]) == (8, {"own": {"moved": 0}}, 0.5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(trainer, "_save_checkpoint", full)
    assert "could be saved either: model.safetensors: No space left" in trainer._save_stopped()


@pytest.mark.parametrize("first", [True, False], ids=["the process that writes", "the others"])
def test_an_adapter_that_cannot_be_written_ends_all_processes_together(first, monkeypatch, tmp_path):
    """Safetensors has an error of its own for a full disk, which is no OSError."""
    told = []

    def on_any(condition):
        told.append(condition)
        return condition or not first

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    engine = ServerRollouts.__new__(ServerRollouts)
    engine._ranks, engine._published, engine._folder = Ranks(first, on_any, lambda number: number), None, tmp_path
    engine._server = SimpleNamespace(load_adapter=lambda name, folder: None)
    monkeypatch.setattr("umed_plugin.model.server_sampling.save_file", full)
    config = SimpleNamespace(base_model_name_or_path="m", r=4, lora_alpha=8, fan_in_fan_out=False)
    embeddings = SimpleNamespace(weight=torch.zeros(1))
    base = SimpleNamespace(get_input_embeddings=lambda: embeddings)
    policy = SimpleNamespace(peft_config={"default": config}, get_base_model=lambda: base, named_parameters=list)
    monkeypatch.setattr("peft.get_peft_model_state_dict", lambda policy: {})
    words = "cannot be written .*No space left" if first else "failed another process"
    with pytest.raises(RolloutServerError, match=words):
        engine.prepare(policy, 0)
    assert told == [first] and not list(tmp_path.iterdir())


def test_another_model_is_found_before_anything_is_learnt(tiny_mistral, records, tmp_path):
    from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

    other = make_checkpoint(tmp_path / "llava-mistral-other", seed=1)
    with stand_in(sampling(other)) as server:
        done = run(tiny_mistral, records, tmp_path / "out", server, "--umed_rollout_max_difference", "0.01")
    assert done.returncode == 1
    assert "differ from ours by" in done.stderr and "It holds another model or adapter" in done.stderr
    assert "Nothing was learnt yet." in done.stderr


def test_a_server_that_takes_adapters_and_never_applies_them_ends_the_run(tiny_mistral, records, complete, tmp_path):
    """The distance to the model here is far below what is allowed: the server is nearer to the model without the adapter."""
    with stand_in(lambda body, folder: complete(body, None)) as server:
        done = run(tiny_mistral, records, tmp_path / "out", server, *LONG, "--umed_rollout_max_difference", "9")
    assert done.returncode == 1, done.stdout[-2000:]
    (said,) = re.findall(r"umed: error: (.*)", done.stderr)
    assert "accepts the adapter, but answers without it" in said and "Traceback" not in done.stderr
    step = int(re.search(r"training stopped after step (\d+)", said).group(1))
    assert step < 12 and said.endswith(
        f"{tmp_path / 'out' / f'checkpoint-{step}'}. The same command goes on from there."
    )
    assert max(logged(tmp_path / "out", "server_difference_without_adapter")) < 1e-4

    with stand_in(complete) as server:
        more = run(tiny_mistral, records, tmp_path / "out", server, *LONG, "--umed_rollout_max_difference", "9")
    assert more.returncode == 0, more.stderr[-2000:]
    # The adapter goes on from the checkpoint, so the policy is not the one that the server holds.
    without = logged(tmp_path / "out", "server_difference_without_adapter")
    assert max(logged(tmp_path / "out", "server_difference")[step:]) < 1e-4 < 0.01 < without[-1]


def test_a_server_that_rounds_to_16_bits_is_used(tiny_mistral, records, tmp_path):
    with stand_in(sampling(tiny_mistral, "bfloat16")) as server:
        done = run(tiny_mistral, records, tmp_path / "out", server, *LONG)
    assert done.returncode == 0, done.stderr[-2000:]
    rounding, moved = (
        logged(tmp_path / "out", name)[-1] for name in ("server_difference", "server_difference_without_adapter")
    )
    assert 1e-4 < rounding < moved


def test_an_adapter_that_cannot_be_loaded_ends_the_run(tiny_mistral, records, complete, tmp_path):
    with stand_in(complete) as server:
        server.may_load = False
        done = run(tiny_mistral, records, tmp_path / "out", server)
    assert done.returncode == 1 and "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in done.stderr


def test_ppo_with_several_updates_keeps_the_servers_probabilities(tiny_mistral, records, complete, tmp_path):
    more = ["--umed_algorithm", "ppo", "--umed_updates_per_rollout", "2", "--save_steps", "1"]
    with stand_in(complete) as server:
        done = run(tiny_mistral, records, tmp_path / "out", server, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    # One adapter a rollout, which feeds two steps.
    assert [name.rpartition("-")[2] for name in adapters(server, "load")] == ["0", "2"]
    kept = torch.load(tmp_path / "out" / "checkpoint-3" / "rollout_0.pt", weights_only=True)
    assert kept["sampled_log_probs"].shape == kept["mask"].shape
    assert max(logged(tmp_path / "out", "importance_ratio_max")) == pytest.approx(1, abs=1e-4)


def test_further_questions_are_sampled_by_the_server_too(tiny_mistral, records, complete, tmp_path):
    """`--umed_dynamic_sampling`, where a reward that is always 1 leaves no group with signal."""
    more = ["--umed_dynamic_sampling", "1", "--umed_rewards", "even:even", "--max_steps", "2", "--save_steps", "2"]
    (records.parent / "even.py").write_text(
        "def even(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    with stand_in(complete) as server:
        done = run(tiny_mistral, records, tmp_path / "out", server, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert server.log.count("/v1/completions") == 4 and len(adapters(server, "load")) == 2
    assert max(logged(tmp_path / "out", "server_difference")) < 1e-4


def test_two_processes_end_together_when_one_of_them_is_refused(tiny_mistral, records, complete, tmp_path):
    asked = []

    def refuses_the_fourth(body, folder):
        asked.append(body)
        if len(asked) == 4:
            return Answer({"error": {"message": "no more"}}, 400)
        return complete(body, folder)

    (records.parent / "half.py").write_text(OWN_REWARD)
    with stand_in(refuses_the_fourth) as server:
        flags = ["--umed_stage", "rewarding", "--umed_num_candidates", "4", "--umed_max_new_tokens", "8", *STEPS]
        flags += ["--umed_rollout_server", server.url]
        command = [*TWO_PROCESSES, *train_flags(tiny_mistral, records, tmp_path / "out", *flags)]
        done = umed_run(command, pythonpath=records.parent)
    assert done.returncode == 1 and "no more" in done.stderr
    assert len(adapters(server, "load")) == 2, "the first process publishes, once a step"
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").is_file(), done.stderr


def test_weights_are_ratios_up_to_the_cap():
    own = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -9.0, 0.0]])
    server = torch.tensor([[-1.0, -1.5, -4.0], [-2.0, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = importance_weights(own, server, cap=3.0)
    wanted = torch.tensor([[0.0, 0.5, 9.0], [0.0, -8.0, 0.0]]).exp().clamp(max=3)
    torch.testing.assert_close(found, wanted)
    measured = importance_metrics(own, server, mask, cap=3.0, without_adapter=server - 0.25)
    assert measured["importance_ratio_max"] == pytest.approx(2.718281828**3)
    assert measured["importance_truncated"] == pytest.approx(1 / 5)
    assert measured["server_difference"] == pytest.approx((0 + 0.5 + 3 + 0 + 8) / 5)
    assert measured["server_difference_without_adapter"] == pytest.approx(0.25)
    assert "server_difference_without_adapter" not in importance_metrics(own, server, mask, cap=3.0)
