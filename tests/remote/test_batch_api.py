"""What a batch's files hold reaches the ledger whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace as Named

import pytest
from support.batch_server import batch_server
from support.judge_server import Answer, completion

from umed_plugin.errors import UmedError
from umed_plugin.remote.batch_api import BatchClient
from umed_plugin.remote.settings import ServerSettings


def output_line(key: str, text: str) -> str:
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }
    return json.dumps({"custom_id": key, "response": {"status_code": 200, "body": body}}, ensure_ascii=False)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_reply_may_hold_what_python_takes_for_the_end_of_a_line(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paid reply whose line is broken there would be asked, and paid for, again."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    texts = {"a": "plain", "b": "a nodule\u2028second line", "c": "next\x85line", "d": "\x1c\u2029"}
    replies: dict[str, str] = {}
    client = BatchClient(
        ServerSettings("m", "http://127.0.0.1:1/v1"),
        tmp_path / "notes.jsonl",
        lambda key, result: replies.update({key: result.text}),  # type: ignore[union-attr]
    )
    ended = Named(request_counts=None, status="completed", output_file_id="f", error_file_id=None, errors=None)
    content = Named(text="".join(output_line(*pair) + end for pair in texts.items()))
    files = Named(content=lambda name: content)
    client._client = Named(batches=Named(retrieve=lambda name: ended), files=files)  # type: ignore[assignment]
    client._collect("batch1")
    assert replies == texts
    assert json.loads((tmp_path / "notes.jsonl").read_text()) == {"ended": "batch1"}


@pytest.mark.parametrize(("total", "read"), [(0, True), (-1, True), (1, False), (None, True)])
def test_a_long_file_is_read_whatever_the_server_counts(
    total: int | None, read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one counted request, 9 MB are too many; where this run sent more, or nothing is counted, they are not."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    replies: dict[str, str] = {}
    with batch_server(lambda request: Answer(completion("x" * 9_000_000))) as server:
        client = BatchClient(
            ServerSettings("m", server.url),
            tmp_path / "notes.jsonl",
            lambda key, result: replies.update({key: result.text}),  # type: ignore[union-attr]
        )
        batch = server.make_batch("f")
        server.files["f"] = json.dumps({"custom_id": "a", "url": "", "body": {}})
        batch["looked_at"] = 1
        if total is not None:
            batch["request_counts"] = {"total": total, "completed": total, "failed": 0}
        if read:
            client._collect(batch["id"])
        else:
            with pytest.raises(UmedError, match="a file of more than .* bytes, the most that is read"):
                client._collect(batch["id"])
            assert not (tmp_path / "notes.jsonl").exists(), "it is not noted as collected"
            client._collect(batch["id"], sent=100)
    assert len(replies["a"]) == 9_000_000
