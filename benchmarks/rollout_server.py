"""Stage 2 with answers of a vLLM server beside stage 2 that samples by itself: exactness, shared prefill, seconds, result.

The server runs on this machine (`umed rollout-server`), in float32, and is asked by this process. Printed are:

- greedy answers to 12 held-out studies: how many are those of this process, and the largest difference of a token's
  log-probability; for the checkpoint, and for an adapter of random values that is loaded at run time;
- prompt tokens that the server computed for K answers to each question, from its counters;
- three trainings of stage 2 (LoRA, GRPO) from the same checkpoint with the same flags and questions: by the server, without it,
  and without it from another seed. Seconds a step, importance ratios, and held-out IoU with paired differences. The third
  training says how far two runs are apart whose answers alone are drawn anew.

It needs a demo's folder (`umed demo`), of which it takes the checkpoint of stage 1 and the studies. It also needs the Python of
an environment with vLLM (`make test-engine` makes .venv-engine).

    python benchmarks/rollout_server.py runs/demo --python .venv-engine/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.engine import Engine, engine  # noqa: E402
from support.umed_runs import environment  # noqa: E402

STUDIES, K, LENGTH = 12, 8, 104
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of `umed demo`")
    parser.add_argument("--python", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--checkpoint", type=Path, help="start of stage 2 (default: the demo's stage 1)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of stage 2 (default: 60; 0: none)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the adapter (default: 2e-4)")
    parser.add_argument("--queries", type=int, default=12, help="questions a step (default: 12)")
    parser.add_argument("--test", type=int, default=200, help="held-out studies (default: 200)")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser.parse_args(argv)


def held_out(demo: Path, count: int) -> list[dict[str, Any]]:
    """Records of the demo's test split."""
    records = json.loads((demo / "data" / "records.json").read_text())
    return [record for record in records if record["split"] == "test"][:count]


class Exactness:
    """Compares answers of the server with those of a checkpoint in this process."""

    def __init__(self, checkpoint: Path, demo: Path, server: Engine) -> None:
        from umed_plugin.model.answerer import Answerer, AnswererSettings
        from umed_plugin.model.forward import embed_prompts
        from umed_plugin.remote.rollout_server import RolloutServer

        self.answerer = Answerer(checkpoint, AnswererSettings(device="cpu", template="umed_mistral"))
        self.server, self.client = server, RolloutServer(server.url)
        records = held_out(demo, STUDIES)
        features = self.answerer.features(
            [str(demo / "data" / record["image"]) for record in records],
            [record["provenance"].get("reading") for record in records],
        )
        questions = [r["conversations"][0]["value"].replace("<image>", "").strip() for r in records]
        with torch.no_grad():
            self.prompts = embed_prompts(
                self.answerer.model, [self.answerer.prompt_ids(text) for text in questions], features
            )

    def _settings(self, temperature: float, k: int) -> Any:
        from umed_plugin.model.sampling import SamplingSettings

        return SamplingSettings(LENGTH, self.answerer.tokenizer.eos_token_id, temperature, num_candidates=k)

    def greedy(self, name: str, model: Any) -> dict[str, Any]:
        """Equal answers, and the largest difference of a log-probability."""
        from umed_plugin.model.forward import answer_pass
        from umed_plugin.model.output_layer import Scoring
        from umed_plugin.model.sampling import generate
        from umed_plugin.model.server_sampling import sample_on_server, vocabulary_of

        ours = generate(model, self.prompts, self._settings(0.0, 1)).answers()
        theirs = sample_on_server(self.client, name, self.prompts, self._settings(0.0, 1), vocabulary_of(model))
        with torch.no_grad():
            own = answer_pass(model, self.prompts, theirs.candidates, scoring=Scoring()).scores.log_probs
        equal = sum(a == b for a, b in zip(ours, theirs.candidates.answers()))
        return {"equal": equal, "of": STUDIES, "largest_difference": (own - theirs.log_probs).abs().max().item()}

    def with_adapter(self) -> dict[str, Any]:
        """`greedy` with an adapter of random values, which is loaded at run time and forgotten."""
        from peft import LoraConfig, get_peft_model

        from umed_plugin.model.server_sampling import write_adapter

        model = self.answerer.model
        names = [n for n, _ in model.named_modules() if n.startswith("model.layers.") and n.split(".")[-1] in TARGETS]
        torch.manual_seed(0)
        policy = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names)).eval()
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        with tempfile.TemporaryDirectory() as folder:
            self.client.load_adapter("random", write_adapter(policy, Path(folder) / "random"))
            found = self.greedy("random", policy)
            self.client.unload_adapter("random")
        policy.unload()
        return found

    def prefill(self) -> dict[str, Any]:
        """Prompt tokens that K answers to each of the questions asked for, and how many of them were computed already."""
        from umed_plugin.model.server_sampling import sample_on_server, vocabulary_of

        fresh = type(self.prompts)(self.prompts.embeds * 1.001, self.prompts.mask, self.prompts.image_start, 64)
        names = ("prefix_cache_queries", "prefix_cache_hits")
        before = [self.server.counter(name) for name in names]
        began = time.monotonic()
        size = vocabulary_of(self.answerer.model)
        sample_on_server(self.client, self.client.base_model(), fresh, self._settings(1.0, K), size)
        asked, hits = (self.server.counter(name) - old for name, old in zip(names, before))
        lengths = self.prompts.mask.sum(dim=1).tolist()
        blocks = (K - 1) * sum((length - 1) // 32 * 32 for length in lengths)
        return {"asked": asked, "hits": hits, "full_blocks": blocks, "seconds": time.monotonic() - began}


def stage_2(options: argparse.Namespace, start: Path, output: Path, *more: str) -> dict[str, Any]:
    """One training; its seconds a step and what it logged."""
    demo = options.demo
    flags = f"""
        --model_name_or_path {start} --data_path {demo}/data/rewarding.json --image_folder {demo}/data --version umed_mistral
        --vision_tower {demo}/runs/untrained-llava-mistral/vision_tower --mm_projector_type mlp2x_gelu
        --mm_vision_select_layer -2 --image_aspect_ratio pad --mm_use_im_start_end False --mm_use_im_patch_token False
        --model_max_length 512 --lr_scheduler_type constant --weight_decay 0 --use_cpu True --lazy_preprocess True
        --logging_steps 1 --save_steps {options.steps} --report_to none --disable_tqdm True --output_dir {output}
        --seed 0 --data_seed 0
        --umed_stage rewarding --umed_num_candidates {K} --umed_max_new_tokens {LENGTH} --umed_temperature 0.5
        --umed_kl_coef 0.015 --umed_advantage_scale batch --umed_judge classes --umed_reward_weights 4,2,1
        --lora_enable True --lora_r 32 --lora_alpha 64 --learning_rate {options.learning_rate} --mm_projector_lr 1e-4
        --max_steps {options.steps} --per_device_train_batch_size {options.queries}
    """.split()
    command = [sys.executable, "-m", "umed_plugin.launch", sys.executable, "-m", "llava.train.train_mem", *flags, *more]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    state = json.loads((output / f"checkpoint-{options.steps}" / "trainer_state.json").read_text())
    history = state["log_history"]
    ended = json.loads((output / "trainer_state.json").read_text())["log_history"][-1]
    names = ("importance_ratio", "importance_ratio_max", "importance_truncated")
    names += ("server_difference", "server_difference_without_adapter")
    logged = {name: [entry[name] for entry in history if name in entry] for name in names}
    rewards = [entry["reward/total"] for entry in history if "reward/total" in entry]
    return {
        "seconds_a_step": ended["train_runtime"] / options.steps,
        "reward_first_10": sum(rewards[:10]) / len(rewards[:10]),
        "reward_last_10": sum(rewards[-10:]) / len(rewards[-10:]),
        **{f"{name}_mean": sum(v) / len(v) for name, v in logged.items() if v},
        **{f"{name}_max": max(v) for name, v in logged.items() if v},
    }


def evaluated(options: argparse.Namespace, checkpoint: Path, base: Path | None) -> Any:
    """The evaluation of a checkpoint, or of a LoRA folder over its base, on the held-out studies."""
    from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
    from umed_plugin.evaluation.evaluation_run import EvaluationSettings
    from umed_plugin.evaluation.evaluator import evaluate_questions

    questions = record_questions(held_out(options.demo, options.test), options.demo / "data")
    settings = EvaluationSettings(base=base, batch_size=50, max_new_tokens=LENGTH, device="cpu")
    return evaluate_questions(checkpoint, RECIPE, questions, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print what was found as lines of JSON."""
    options = parse(argv)
    from umed_plugin.evaluation.results import compare
    from umed_plugin.patches import prepare_llava

    prepare_llava()
    torch.set_num_threads(1)
    start = options.checkpoint or options.demo / "runs" / "tuned-llava-mistral"
    results: dict[str, Any] = {}

    def say(name: str, value: Any) -> None:
        results[name] = value
        print(json.dumps({name: value}), flush=True)

    with tempfile.TemporaryDirectory(prefix="umed-rollout-server-") as folder:
        work = Path(folder)
        runs = {
            name: work / f"{name.replace(' ', '-')}-llava-mistral-lora" for name in ("server", "itself", "other seed")
        }
        with engine(start, options.python, work, "--lora-rank", "32") as server:
            exactness = Exactness(start, options.demo, server)
            say("greedy", exactness.greedy(exactness.client.base_model(), exactness.answerer.model))
            say("greedy with adapter", exactness.with_adapter())
            say("prefill of K answers", exactness.prefill())
            del exactness
            if options.steps:
                address = ("--umed_rollout_server", server.url, "--umed_rollout_adapters", "/dev/shm")
                say("stage 2 by server", stage_2(options, start, runs["server"], *address))
        if options.steps:
            say("stage 2 by itself", stage_2(options, start, runs["itself"]))
            say("stage 2 by other seed", stage_2(options, start, runs["other seed"], "--seed", "1"))
            evaluations = {"start": evaluated(options, start, None)}
            evaluations |= {name: evaluated(options, output, start) for name, output in runs.items()}
            for name, evaluation in evaluations.items():
                say(f"IoU {name}", evaluation.metrics["mean_iou"])
            for before, after in (
                ("start", "itself"),
                ("start", "server"),
                ("itself", "server"),
                ("itself", "other seed"),
            ):
                found = compare(evaluations[before], evaluations[after])["mean_iou"]
                say(f"IoU {after} minus {before}", {key: found[key] for key in ("difference", "ci95", "n")})
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
