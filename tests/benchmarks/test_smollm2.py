"""The benchmark with a real language model, on a small GGUF file of random weights: SmolLM2's own 98 MB are in no test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.umed_runs import ROOT, environment, run_command

gguf = pytest.importorskip("gguf", reason="is installed on the current stack alone")
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.llava, pytest.mark.run]

LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# A byte-pair vocabulary of single bytes, in GPT-2's letters for them.
LETTERS = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [
    chr(256 + number) for number in range(68)
]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "in"]


@pytest.fixture(scope="module")
def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).half().float()  # the checkpoint holds half-precision weights


@pytest.fixture(scope="module")
def gguf_file(language_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in llama.cpp's form: rows of q and k that turn together stand side by side."""
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["i n"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for i in range(2) for theirs, ours in LAYERS.items()}
    for name, value in language_model.state_dict().items():
        if name == "lm_head.weight":
            continue
        place = names[name.removesuffix(".weight")]
        if place.endswith(("attn_q", "attn_k")):
            heads = 4 if place.endswith("attn_q") else 2
            value = value.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{place}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_checkpoint_is_the_language_model_of_the_file(language_model, gguf_file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from smollm2 import write_checkpoint
    from transformers import AutoTokenizer

    from umed_plugin.commands.doctor.examination import examine

    folder = write_checkpoint(gguf_file, tmp_path / "llava-v1-small", seed=0)
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    ids = tokenizer("USER: a finding? ASSISTANT: [0.1]</s>", return_tensors="pt").input_ids
    assert (ids[0, 0], ids[0, -1]) == (1, 2) and len(TOKENS) - 1 in ids  # <s>, </s>, and the one pair that is merged
    model = LlavaLlamaForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, language_model(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert {finding.code for finding in examine(folder) if finding.severity == "error"} == set()


def test_both_stages_train_it(gguf_file, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "smollm2.py"), str(tmp_path), "--gguf", str(gguf_file)]
    command += ["--steps", "1", "--processes", "1"]
    done = run_command(command, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["stage 1, loss", "stage 2, reward"]
    assert all(stage[side]["seconds"] > 0 for stage in stages for side in ("smollm2", "small"))
    assert stages[0]["smollm2"]["first"] > 0 and "| stage 2, reward | " in done.stdout
