"""Stock LLaVA loads folders and answers, in a process that cannot import the plugin. Uses nothing of this project.

    python -I tests/support/stock_loads.py '[["/path/llava-mistral", null], ["/path/llava-lora", "/path/base"]]'

Prints one JSON line a folder: ``{"tokens": [...], "logits": [...]}`` of a greedy answer about a fixed image, or
``{"error": "..."}``. The number format is float32, because a CPU computes no other with LLaVA's pins.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys


def answer(path: str, base: str | None) -> dict:
    """What LLaVA's own loader makes of a folder, asked as `llava.eval.run_llava` asks."""
    import torch
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)  # a load that fails leaves half precision behind
    name = get_model_name_from_path(path)
    tokenizer, model, processor, _ = load_pretrained_model(path, base, name, device="cpu")
    model = model.float()
    rows = [[(x * 5 + y) % 256 for x in range(80)] for y in range(48)]
    image = Image.new("L", (80, 48))
    image.putdata([value for row in rows for value in row])
    pixels = process_images([image.convert("RGB")], processor, model.config).float()
    marked = "<im_start><image><im_end>" if model.config.mm_use_im_start_end else "<image>"
    ids = tokenizer_image_token(f"[INST] {marked}\nWhere is it? [/INST]", tokenizer, return_tensors="pt")[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, images=pixels).logits[0, -1]
        tokens = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=8)[0].tolist()
    return {"tokens": tokens, "logits": [round(float(value), 3) for value in logits[:16]]}


def main() -> None:
    sys.modules["umed_plugin"] = None  # type: ignore[assignment]
    try:
        import umed_plugin  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("the plugin can be imported: this process does not show what stock LLaVA does")
    with contextlib.redirect_stdout(sys.stderr):
        import llava.model.builder  # noqa: F401

    gc.freeze()  # transformers collects garbage for each model that it loads, which would search all imported libraries
    for path, base in json.loads(sys.argv[1]):
        with contextlib.redirect_stdout(sys.stderr):
            try:
                told = answer(path, base)
            except Exception as error:  # noqa: BLE001
                told = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
