"""A stand-in for vLLM on loopback: the endpoints that `umed_plugin.remote.rollout_server` asks, with faults on request.

It is not vLLM. `StandIn` shows how the client takes what a server may say; `sampling` lets a stand-in answer with the plugin's
own loop over a real checkpoint, so that whole trainings run against it. tests/engine/ has the real server.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.judge_server import Answer, served

Complete = Callable[[dict[str, Any], "str | None"], Answer]


class StandIn(ThreadingHTTPServer):
    """One model and the adapters that were loaded.

    Attributes:
        complete: answers a completion's body; its second argument is the folder of the adapter that is asked, or None.
        adapters: name -> folder, of those that are loaded now.
        log: every request's path, with the adapter's name behind those about adapters.
        headers: those of the last request.
        may_load: whether adapters can be loaded.
        models: another answer to a request for the list of models, by its path; None: the list.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, complete: Complete) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.complete, self.may_load = complete, True
        self.models: Callable[[str], Answer | None] = lambda path: None
        self.adapters: dict[str, str] = {}
        self.log: list[str] = []
        self.headers: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no fault of the server's."""

    def die(self) -> None:
        """As ``kill -9``: connections break, and nobody listens any more."""
        self.shutdown()
        self.socket.close()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/load_lora_adapter":
            if not self.may_load:
                return Answer({"detail": "Not Found"}, 404)
            assert (Path(body["lora_path"]) / "adapter_config.json").is_file()
            self.adapters[body["lora_name"]] = body["lora_path"]
            return Answer(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
        if path == "/v1/unload_lora_adapter":
            found = self.adapters.pop(body["lora_name"], None)
            return Answer("Success") if found else Answer({"error": {"message": "cannot be found"}}, 404)
        if body["model"] not in ("the-model", *self.adapters):
            return Answer({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        return self.complete(body, self.adapters.get(body["model"]))


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.server.log.append(self.path)
        listed = {"object": "list", "data": [{"id": "the-model", "object": "model", "parent": None}]}
        self._send(self.server.models(self.path) or Answer(listed))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.log.append(" ".join([self.path, *([body["lora_name"]] if "lora_name" in body else [])]))
        self.server.headers = dict(self.headers)
        self._send(self.server.answer(self.path, body))

    def _send(self, answer: Answer) -> None:
        data = (answer.body if isinstance(answer.body, str) else json.dumps(answer.body)).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *unused: Any) -> None:
        """Tests read the lists instead."""


@contextmanager
def stand_in(complete: Complete) -> Iterator[StandIn]:
    """A running stand-in; it ends with the block."""
    with served(StandIn(complete)) as server:
        yield server


def reply(body: dict[str, Any], token_ids: list[list[int]], log_probs: list[list[float]], **changes: Any) -> Answer:
    """A completion's body with these answers."""
    choices = [
        {"index": index, "text": "", "token_ids": ids, "logprobs": {"token_logprobs": values}, "finish_reason": "stop"}
        for index, (ids, values) in enumerate(zip(token_ids, log_probs))
    ]
    return Answer({"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices, **changes})


def sampling(checkpoint: Path, dtype: str = "float32") -> Complete:
    """Answers of the checkpoint's own language model, by the plugin's loop, with the adapter that is asked."""
    import torch
    from safetensors.torch import load_file

    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.model.forward import PromptBatch, answer_pass
    from umed_plugin.model.output_layer import Scoring
    from umed_plugin.model.sampling import SamplingSettings, generate

    tokenizer, model, _ = load_checkpoint(checkpoint, device="cpu", dtype=getattr(torch, dtype))
    lock = threading.Lock()

    @contextmanager
    def adapted(folder: str | None) -> Iterator[None]:
        """The adapter's change added to the weights, and taken away again."""
        before = {}
        if folder is not None:
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
            for name, down in tensors.items():
                if ".lora_A." in name:
                    up = tensors[name.replace(".lora_A.", ".lora_B.")]
                    weight = model.get_parameter(
                        name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                    )
                    before[weight] = weight.data.clone()
                    change = config["lora_alpha"] / config["r"] * (up.float() @ down.float())
                    weight.data = (weight.data + change).to(weight.dtype)
        yield
        for weight, values in before.items():
            weight.data = values

    @torch.no_grad()
    def complete(body: dict[str, Any], folder: str | None) -> Answer:
        rows = [torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True) for text in body["prompt_embeds"]]
        longest = max(map(len, rows))
        embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
        prompts = PromptBatch(embeds.to(model.dtype), mask, torch.zeros(len(rows), dtype=torch.long), 0)
        eos = tokenizer.eos_token_id
        settings = SamplingSettings(body["max_tokens"], eos, body["temperature"], num_candidates=body["n"])
        with lock, adapted(folder):
            candidates = generate(model, prompts, settings)
            scores = answer_pass(model, prompts, candidates, scoring=Scoring(body["temperature"])).scores
        lengths = candidates.mask.sum(dim=1).tolist()
        values = [row[:length] for row, length in zip(scores.log_probs.tolist(), lengths)]
        return reply(body, candidates.answers(), values)

    return complete
