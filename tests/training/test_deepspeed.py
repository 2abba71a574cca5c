"""DeepSpeed's ZeRO-2 and ZeRO-3 on a CPU, two processes over gloo: both stages, full and LoRA.

``umed-run deepspeed`` starts one run of each stage, and ``umed-run torchrun`` the others: both launchers set the same variables.

Each run is held against one process that takes the two batches as one, with plain gradient descent: then equal weights mean equal
gradients.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.records import grounded_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run, weights

from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.merging import merge
from umed_plugin.patches import shared_memory_build

UNFIT = shared_memory_build.PATCH.not_needed()
pytestmark = pytest.mark.skipif(
    UNFIT is not None, reason=f"{UNFIT}: LLaVA's pins have a DeepSpeed without a CPU path (0.12.6)"
)

# LLaVA's scripts/zero2.json and zero3.json, and gradients clipped as --max_grad_norm says, which LLaVA's files leave out.
CONFIG = {
    **{part: {"enabled": "auto"} for part in ("fp16", "bf16")},
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
}
PARTS = {
    1: {"stage": 1, "reduce_bucket_size": "auto"},
    2: {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto"},
    3: {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
STEPS = shlex.split("--optim sgd --lr_scheduler_type constant --max_steps 2 --save_steps 1 --learning_rate")
TUNING = [*STEPS, "0.05", "--umed_stage", "instruction_tuning"]
REWARDING = [
    *STEPS,
    "0.1",
    *shlex.split(
        "--umed_stage rewarding --umed_num_candidates 4 --umed_max_new_tokens 6"
        " --umed_rewards localization,vision_relevance,unequal:Pays --umed_kl_coef 0.2"
    ),
]
LORA = shlex.split("--lora_enable True --lora_r 4 --lora_dropout 0")
TWO_DEVICES = ("--num_gpus", "2")

# Sampling without chance, so that one process samples what two do: candidate k begins with the k-th likeliest token. Answers to
# odd records end after two tokens, the others after six: then the processes make different numbers of passes. At each token all
# weights are whole.
UNEQUAL = """
import torch
import umed_plugin.training.experience_maker as maker
import umed_plugin.model.sampling as sampling

class Pays:
    def __init__(self):
        roll_out, state = maker.ExperienceMaker.roll_out, {}

        def noting(self, policy, batches):
            self_k = self.flags.umed_num_candidates
            records = [record for batch in batches for record in batch["records"]]
            odd = [int(record["patient"]) % 2 for record in records for _ in range(self_k)]
            state.update(step=0, k=self_k, eos=self.tokenizer.eos_token_id, odd=torch.tensor(odd, dtype=torch.bool))
            state["weights"] = list(policy.parameters())
            return roll_out(self, policy, batches)

        def next_token(logits, settings):
            assert all(weight.numel() == getattr(weight, "ds_numel", weight.numel()) for weight in state["weights"])
            step = state["step"]
            state["step"] += 1
            if step == 0:
                ranks = torch.arange(len(logits)) % state["k"]
                return logits.topk(state["k"]).indices.gather(1, ranks[:, None])[:, 0]
            tokens = logits[:, 3:].argmax(-1) + 3
            return torch.where(state["odd"], state["eos"], tokens) if step == 1 else tokens

        maker.ExperienceMaker.roll_out, sampling._next_token = noting, next_token

    def __call__(self, prompts, completions, **columns):
        return [float(index % 4 % 3) for index in range(len(completions))]

class PaysAThird(Pays):
    def __call__(self, prompts, completions, *, record, **columns):
        return [float(index % 4) * (int(each["patient"]) % 3 == 1) for index, each in enumerate(record)]
"""

# Stands for pdsh and ssh: each node is a clean environment on this machine, as ssh would give, and %n its number.
PDSH = """#!{python}
import os, subprocess, sys
hosts, command = sys.argv[sys.argv.index("-w") + 1].split(","), " ".join(sys.argv[sys.argv.index("-w") + 2:])
assert "pkill" not in command
clean = {{"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}}
nodes = [subprocess.Popen(["bash", "-c", command.replace("%n", str(n))], env=clean, cwd="/") for n in range(len(hosts))]
sys.exit(max(abs(node.wait()) for node in nodes))
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = grounded_records(tmp_path_factory.mktemp("data"))
    (file.parent / "unequal.py").write_text(UNEQUAL)
    return file


def script() -> str:
    return str(Path(find_spec("llava.train.train_mem").origin))


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("", 0))
        return str(found.getsockname()[1])


def sharded(stage: int, checkpoint: Path, records: Path, output: Path, *flags: str, launcher: tuple[str, ...] = ()):
    """Two processes, one query or record each a step: by DeepSpeed's launcher, or without its flags by torchrun."""
    config = output.parent / f"zero{stage}.json"
    config.write_text(json.dumps({**CONFIG, "zero_optimization": PARTS[stage]}))
    launch = ["deepspeed", *launcher, "--master_port", free_port(), script()] if launcher else TWO_PROCESSES
    more = [*flags, "--per_device_train_batch_size", "1", "--deepspeed", str(config)]
    run = umed_run([*launch, *train_flags(checkpoint, records, output, *more)], pythonpath=records.parent)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return run


def alone(checkpoint: Path, records: Path, output: Path, *flags: str) -> None:
    """One process that takes both batches at once."""
    more = [*flags, "--per_device_train_batch_size", "2", "--save_strategy", "no"]
    command = ["python", "-m", "llava.train.train_mem", *train_flags(checkpoint, records, output, *more)]
    run = umed_run(command, pythonpath=records.parent)
    assert run.returncode == 0, run.stderr[-4000:]


def check_equal(found: Path, expected: Path, start: dict[str, torch.Tensor]) -> None:
    """Weights differ by no more than a thousandth of how far they have moved from ``start``, an adapter's from 0."""
    ours, theirs = weights(found), weights(expected)
    assert set(ours) == set(theirs)
    moved = set()
    for name, tensor in theirs.items():
        distance = float((tensor - start.get(name.removeprefix("base_model.model."), torch.zeros(()))).abs().max())
        error = float((ours[name] - tensor).abs().max())
        assert error <= 1e-3 * distance + 1e-7, f"{name}: {error} off, moved by {distance}"
        moved |= {name} if distance > 1e-6 else set()
    assert any("mm_projector" in name for name in moved) and any("q_proj" in name for name in moved)


def resumed(stage: int, whole: Path, checkpoint: Path, records: Path, *flags: str) -> Path:
    """The same run, gone on with from its first checkpoint in another folder."""
    output = whole.with_name("resumed")
    output.mkdir()
    shutil.copytree(whole / "checkpoint-1", output / "checkpoint-1")
    sharded(stage, checkpoint, records, output, *flags)
    first, again = (json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (whole, output))
    assert [line["step"] for line in again if "loss" in line] == [1, 2]
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in first if "loss" in line]
    return output


def check_exact(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# The sinks are found without the norms' weights, which another process may hold.
ATTENTION_LOSS = shlex.split("--umed_attention_loss 3 --umed_vrr_mask_sinks 2.6")


@pytest.mark.parametrize("loss", [(), ATTENTION_LOSS], ids=["plain", "attention-loss"])
def test_stage_1_full_under_zero_3_saves_resumes_and_equals_one_process(loss, tiny_llama, records, tmp_path):
    whole = tmp_path / "llava-whole"
    sharded(3, tiny_llama, records, whole, *TUNING, *loss, launcher=() if loss else TWO_DEVICES)
    alone(tiny_llama, records, tmp_path / "alone", *TUNING, *loss)
    check_equal(whole, tmp_path / "alone", load_file(tiny_llama / "model.safetensors"))
    if not loss:
        check_exact(resumed(3, whole, tiny_llama, records, *TUNING), whole)


def test_zero_2_goes_on_from_zero_1(tiny_mistral, records, tmp_path):
    """Each process finds its part of Adam's state in the other stage's file."""
    whole, flags = tmp_path / "whole", [*TUNING, "--optim", "adamw_torch", *LORA]
    sharded(1, tiny_mistral, records, whole, *flags)
    check_exact(resumed(2, whole, tiny_mistral, records, *flags), whole)


def test_stage_1_lora_under_zero_2_trains_on_two_nodes_and_is_merged(tiny_mistral, records, tmp_path):
    """What another node needs is in the command line and in PYTHONPATH: DeepSpeed's launcher hands on nothing else."""
    (tmp_path / "bin").mkdir()
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.write_text(PDSH.format(python=sys.executable))
    pdsh.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    nodes = ("--hostfile", str(hosts), "--no_ssh_check", "--master_addr", "127.0.0.1")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", f"{pdsh.parent}:{os.environ['PATH']}")
        run = sharded(2, tiny_mistral, records, tmp_path / "llava-lora", *TUNING, *LORA, launcher=nodes)
    assert "node_rank=1" in run.stdout and run.stdout.count("supervision check") == 1
    alone(tiny_mistral, records, tmp_path / "alone", *TUNING, *LORA)
    check_equal(tmp_path / "llava-lora", tmp_path / "alone", load_file(tiny_mistral / "model.safetensors"))
    merge(tmp_path / "llava-lora", tiny_mistral, tmp_path / "llava-mistral-merged")
    load_checkpoint(tmp_path / "llava-mistral-merged", device="cpu")


def test_stage_2_full_under_zero_2_equals_one_process(tiny_llama, records, tmp_path):
    sharded(2, tiny_llama, records, tmp_path / "whole", *REWARDING, launcher=TWO_DEVICES)
    alone(tiny_llama, records, tmp_path / "alone", *REWARDING)
    check_equal(tmp_path / "whole", tmp_path / "alone", load_file(tiny_llama / "model.safetensors"))


@pytest.mark.parametrize("flags", [(), LORA], ids=["full", "lora"])
def test_stage_2_under_zero_3_samples_unequal_answers_and_equals_one_process(flags, tiny_mistral, records, tmp_path):
    whole = tmp_path / "whole"
    sharded(3, tiny_mistral, records, whole, *REWARDING, *flags)
    alone(tiny_mistral, records, tmp_path / "alone", *REWARDING, *flags)
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert any(0 < line.get("answers_cut_off", 0) < 1 for line in history), "the processes' answers were of one length"
    assert max(line.get("kl", 0) for line in history) > 1e-4, "the reference was the policy"
    check_equal(whole, tmp_path / "alone", load_file(tiny_mistral / "model.safetensors"))
    if flags:
        check_exact(resumed(3, whole, tiny_mistral, records, *REWARDING, *flags), whole)


def test_stage_2_under_zero_3_samples_further_questions_on_all_ranks_together(tiny_mistral, records, tmp_path):
    further = shlex.split("--umed_rewards unequal:PaysAThird --umed_reward_norm none --umed_dynamic_sampling 2")
    sharded(3, tiny_mistral, records, tmp_path / "out", *REWARDING, *LORA, *further, "--umed_cut_off", "keep")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum(line.get("extra_samplings", 0) for line in history) > 0
    assert sum(line.get("groups_replaced", 0) for line in history) > 0


def test_a_deepspeed_for_another_device_is_refused_before_the_model_is_loaded(
    tiny_llama, records, tmp_path, monkeypatch
):
    """As on LLaVA's pins, whose DeepSpeed takes any machine for one with CUDA."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    (tmp_path / "zero2.json").write_text(json.dumps({**CONFIG, "zero_optimization": PARTS[2]}))
    more = [*TUNING, "--deepspeed", str(tmp_path / "zero2.json")]
    command = ["python", "-m", "llava.train.train_mem"]
    run = umed_run([*command, *train_flags(tiny_llama, records, tmp_path / "out", *more)])
    assert run.returncode == 2
    assert "training runs on cpu, but the installed DeepSpeed on cuda" in run.stderr and "torchrun" in run.stderr
