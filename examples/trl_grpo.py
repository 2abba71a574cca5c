"""TRL's ``GRPOTrainer`` with this plugin's rewards, on a checkpoint in transformers' format.

    umed convert checkpoints/llava-mistral-stage1 --template umed_mistral --out checkpoints/stage1-hf
    python examples/trl_grpo.py checkpoints/stage1-hf train.json --image-folder images --out checkpoints/trl-hf
    umed convert checkpoints/trl-hf --out checkpoints/llava-mistral-trl

Needs TRL 1.x and transformers 5. The plugin's own stage 2 (``umed-run``) does the same on LLaVA's layout, and computes less.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

from umed_plugin.data.records import load_records
from umed_plugin.rewards import REWARDS
from umed_plugin.rewards.trl import CombinedReward, LesionAttention, trl_dataset


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="written by umed convert")
    parser.add_argument("records", type=Path, help="written by umed recipe build")
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=8, help="K answers per question")
    parser.add_argument("--questions", type=int, default=4, help="questions per step")
    parser.add_argument("--answer-tokens", type=int, default=104)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args()

    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    reward = CombinedReward(
        {name: REWARDS.get(name) for name in ("relevance", "localization", "vision_relevance")},
        args.candidates,
        attention=LesionAttention(model, processor),
    )
    config = GRPOConfig(
        output_dir=str(args.out / "trainer"),
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        num_generations=args.candidates,
        per_device_train_batch_size=args.candidates * args.questions,
        max_completion_length=args.answer_tokens,
        beta=0.03,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    dataset = trl_dataset(load_records(args.records), args.image_folder, model)
    trainer = GRPOTrainer(model, reward, config, dataset, processing_class=processor)
    trainer.train()
    trainer.save_model(str(args.out))
    processor.save_pretrained(args.out)
    shutil.copy2(args.checkpoint / "tokenizer.model", args.out)  # transformers 5 does not save it, but LLaVA reads it


if __name__ == "__main__":
    main()
