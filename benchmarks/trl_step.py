"""An optimizer step of stage 2 compared with one of TRL's own ``GRPOTrainer`` (TRL 1.x, transformers 5), in one run.

Both train the same random weights: ours with the trainer that LLaVA's ``train()`` creates under ``umed-run``, TRL's with
``LlavaForConditionalGeneration`` from ``umed convert``. Both get the same images and questions, and sample K answers of exactly T
tokens for each at temperature 1. Both score them with the plugin's rewards ``relevance`` and ``localization``, keep a KL to the
reference, and make one AdamW step. Both use float32, the same attention, threads, LoRA layers and gradient checkpointing. A step
runs from fetching its batch to the new weights, and the two sides run in turns.

Differences: ours encodes each image once and computes each prompt once, TRL once per answer. With LoRA, ours also trains the
projector, as LLaVA does. TRL samples with ``generate``, not with vLLM, which needs a GPU. For the policy's log-probabilities both
use the update's own pass. Vision relevance, which TRL does not have, would be one more pass of a few tokens.

    python benchmarks/trl_step.py
    python benchmarks/trl_step.py --tuning full --gradient-checkpointing 0 --json trl.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import Seconds, now, ratios, since, stack

REWARDS = ("relevance", "localization")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KL, LEARNING_RATE, LORA_RANK = 0.04, 1e-6, 16


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. The project's target is stated for the default sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default, text in (
        ("layers", 8, "of the language model"),
        ("width", 512, "of the language model, a multiple of 64"),
        ("image-size", 336, "pixels; patches have 14"),
        ("prompt-tokens", 64, "of text, including template and BOS"),
        ("answer-tokens", 100, "T"),
        ("candidates", 8, "K answers per question"),
        ("questions", 2, "per step"),
        ("repetitions", 3, "turns per side"),
        ("threads", 2, "of both sides"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--gradient-checkpointing", type=int, choices=(0, 1), default=1)
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser.parse_args(argv)


def make_checkpoint(folder: Path, options: argparse.Namespace) -> Path:
    """A checkpoint in LLaVA's layout with random weights: 30 million with the default sizes, 25 of them in the layers."""
    import torch
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor, CLIPVisionModel
    from transformers import CLIPVisionConfig

    from umed_plugin.commands.demo import tiny_checkpoint

    torch.manual_seed(0)
    checkpoint = tiny_checkpoint.make_checkpoint(folder, hidden_size=options.width, layers=options.layers)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=options.image_size, patch_size=14))
    tower.save_pretrained(checkpoint / "vision_tower")
    square = {"height": options.image_size, "width": options.image_size}
    processor = CLIPImageProcessor(size={"shortest_edge": options.image_size}, crop_size=square)
    processor.save_pretrained(checkpoint / "vision_tower")
    config = LlavaMistralConfig.from_pretrained(checkpoint)
    heads = options.width // 64
    config.update({"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64, "mm_hidden_size": 256})
    config.update({"intermediate_size": options.width * 43 // 16, "max_position_embeddings": 4096})
    with contextlib.redirect_stdout(sys.stderr):
        LlavaMistralForCausalLM(config).save_pretrained(checkpoint)
    return checkpoint


def make_records(folder: Path, checkpoint: Path, options: argparse.Namespace) -> Path:
    """Questions about noise images whose prompts have exactly ``--prompt-tokens`` tokens; returns the records' JSON file."""
    import numpy as np
    from PIL import Image
    from transformers import LlamaTokenizer

    from umed_plugin.model.answerer import prompt_ids

    tokenizer = LlamaTokenizer.from_pretrained(checkpoint)
    question = "abnormality"  # one token of the checkpoint's tokenizer
    for _ in range(options.prompt_tokens):
        if len(prompt_ids(question, "mistral_instruct", tokenizer, None)) - 1 < options.prompt_tokens:
            question += " abnormality"
    length = len(prompt_ids(question, "mistral_instruct", tokenizer, None)) - 1
    if length != options.prompt_tokens:
        raise SystemExit(f"the shortest prompt has {length} tokens; --prompt-tokens must be at least that")
    records = []
    for index in range(2 * options.questions):
        pixels = np.random.default_rng(index).integers(0, 255, (options.image_size, options.image_size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        turns = ("human", f"<image>\n{question}"), ("gpt", "It is a nodule at [0.12, 0.34, 0.56, 0.78].")
        records.append(
            {
                "id": str(index),
                "image": f"{index}.png",
                "image_size": [options.image_size] * 2,
                "conversations": [{"from": who, "value": text} for who, text in turns],
                "objects": {"ref": ["nodule"], "bbox": [[5, 5, 20, 20]], "bbox_type": "real"},
                "terms": {"nodule": ["nodule"]},
                "split": "train",
                "answer_type": "grounded",
                "provenance": {"image_aspect_ratio": "pad"},
            }
        )
    file = folder / "records.json"
    file.write_text(json.dumps(records))
    return file


def our_trainer(checkpoint: Path, records: Path, options: argparse.Namespace) -> Any:
    """The trainer that LLaVA's ``train()`` creates for stage 2, before it trains."""
    from llava.train import train as llava_train

    from umed_plugin.training.trainer import RewardingTrainer

    flags = f"""
        --model_name_or_path {checkpoint} --vision_tower {checkpoint}/vision_tower --version mistral_instruct
        --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --mm_use_im_patch_token False
        --data_path {records} --image_folder {records.parent} --image_aspect_ratio pad --model_max_length 2048
        --output_dir {records.parent}/ours --umed_stage rewarding --umed_algorithm grpo --umed_rewards {",".join(REWARDS)}
        --umed_num_candidates {options.candidates} --umed_max_new_tokens {options.answer_tokens} --umed_temperature 1
        --umed_kl_coef {KL} --learning_rate {LEARNING_RATE} --max_steps 1 --optim adamw_torch
        --per_device_train_batch_size {options.questions} --gradient_checkpointing {bool(options.gradient_checkpointing)}
        --lora_enable {options.tuning == "lora"} --lora_r {LORA_RANK} --use_cpu True --dataloader_num_workers 0
        --report_to none --logging_steps 1 --save_strategy no --disable_tqdm True
    """
    created: list[Any] = []
    stock, RewardingTrainer.train = RewardingTrainer.train, lambda self, **_: created.append(self)
    sys.argv = ["train_mem.py", *flags.split()]
    try:
        llava_train.train()
    finally:
        RewardingTrainer.train = stock
    return created[0]


def trl_trainer(checkpoint: Path, records: Path, attention: str, options: argparse.Namespace) -> Any:
    """TRL's trainer on the same checkpoint, converted."""
    import torch
    from peft import LoraConfig
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    from umed_plugin.checkpoints.to_transformers import to_transformers
    from umed_plugin.data.records import load_records
    from umed_plugin.rewards import REWARDS as REGISTRY
    from umed_plugin.rewards.trl import CombinedReward, trl_dataset

    folder = to_transformers(checkpoint, records.parent / "hf", template="mistral_instruct")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    config = GRPOConfig(
        str(records.parent / "trl"),
        max_steps=1,
        learning_rate=LEARNING_RATE,
        optim="adamw_torch",
        num_generations=options.candidates,
        per_device_train_batch_size=options.candidates * options.questions,
        max_completion_length=options.answer_tokens,
        temperature=1.0,
        beta=KL,
        gradient_checkpointing=bool(options.gradient_checkpointing),
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=16, target_modules=rf".*language_model.*({'|'.join(LAYERS)})", task_type="CAUSAL_LM"
    )
    return GRPOTrainer(
        model,
        CombinedReward({name: REGISTRY.get(name) for name in REWARDS}, options.candidates),
        config,
        trl_dataset(load_records(records), records.parent, model),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=lora if options.tuning == "lora" else None,
    )


def never_end(model: Any, eos_token_id: int) -> None:
    """No answer may end before its T tokens."""
    import torch

    layer = model.get_output_embeddings()
    stock = layer.forward

    def without_eos(hidden: Any) -> Any:
        return stock(hidden).index_fill(-1, torch.tensor([eos_token_id], device=hidden.device), -1e4)

    # No hook: what leaves the layer in our passes are log-probabilities of the answers' tokens.
    layer.forward = without_eos


def timed(trainer: Any) -> list[Seconds]:
    """A list to which each step of this trainer will append its time."""
    from transformers import TrainerCallback

    durations: list[Seconds] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_unused: Any, **_more: Any) -> None:
            self.start = now()

        def on_step_end(self, *_unused: Any, **_more: Any) -> None:
            durations.append(since(self.start))

    trainer.add_callback(Clock())
    return durations


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All results."""
    import torch

    from umed_plugin.model.forward import base_llava

    checkpoint = make_checkpoint(folder / "umed-llava-mistral", options)
    records = make_records(folder, checkpoint, options)
    ours = our_trainer(checkpoint, records, options)
    attention = ours.model.config._attn_implementation
    theirs = trl_trainer(checkpoint, records, attention, options)
    for trainer in (ours, theirs):
        never_end(base_llava(trainer.model), 2)
    ours_s, trl_s = timed(ours), timed(theirs)
    for _ in range(1 + options.repetitions):
        ours.train()
        theirs.train()
    (our_log, *_), (trl_log, *_) = ours.state.log_history, theirs.state.log_history
    patches = (options.image_size // 14) ** 2
    tokens = options.questions * options.candidates * (patches + options.prompt_tokens + options.answer_tokens)
    counted = our_log["answer_tokens"], trl_log["completions/mean_length"], trl_log["num_tokens"]
    if counted != (options.answer_tokens, options.answer_tokens, tokens):
        raise SystemExit(
            f"answers have {counted[0]} and {counted[1]} tokens, and TRL's step has {counted[2]}; expected: answers of "
            f"{options.answer_tokens} and a step of {tokens}"
        )
    return {
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "stack": stack("trl"),
        "threads": torch.get_num_threads(),
        "attention": attention,
        "parameters": base_llava(ours.model).num_parameters(),
        "prompt_tokens": patches + options.prompt_tokens,
        "entropy": {"ours": our_log["entropy"], "trl": trl_log["entropy"]},
        **ratios(trl_s[1:], ours_s[1:]),  # the first step allocates
    }


def show(results: dict[str, Any]) -> None:
    """Print the results."""
    options = results["options"]
    k, tokens = options["candidates"], options["answer_tokens"]
    print(
        f"{results['stack']}; {results['parameters'] / 1e6:.1f} M parameters, {options['tuning']} tuning, {results['attention']} "
        f"attention, float32, {results['threads']} threads, gradient checkpointing {options['gradient_checkpointing']}\n"
        f"a step: {options['questions']} questions, K = {k} answers of {tokens} tokens to each, prompts of "
        f"{results['prompt_tokens']} tokens\n"
        f"TRL's GRPOTrainer {results['slow_s']:.2f} s, ours {results['fast_s']:.2f} s: {results['ratio']:.2f} times faster "
        f"(of {options['repetitions']} turns {results['ratio_range'][0]:.2f} - {results['ratio_range'][1]:.2f}; in processor "
        f"time {results['processor_ratio']:.2f})"
    )


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """LLaVA as it is under ``umed-run``; what training prints goes to stderr."""
    from umed_plugin.patches import TRIGGERS, after_import
    from umed_plugin.patching.import_hook import install

    install(TRIGGERS, after_import)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(argv)
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="umed-") as temporary, _patched():
        results = measure(Path(temporary), options)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
