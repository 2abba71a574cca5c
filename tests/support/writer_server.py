"""A vision model on loopback for the tests of the writer: reads the findings off the request, writes good and bad diagnoses."""

from __future__ import annotations

import base64
import io
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.drawn import write_png, write_recipe
from support.judge_server import Answer, Asked, completion

LINE = re.compile(r"^\d+\. (.+) at (\[[0-9., ]+\])$", re.MULTILINE)
KEY = "sk-test-0123456789"


def is_reflection(asked: Asked) -> bool:
    return isinstance(asked.body["messages"][0]["content"], str)


def is_asked_again(asked: Asked) -> bool:
    return len(asked.body["messages"]) > 1


def text_of(asked: Asked) -> str:
    content = asked.body["messages"][0]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def findings_of(asked: Asked) -> list[tuple[str, str]]:
    return LINE.findall(text_of(asked))


def pictures_of(asked: Asked) -> list[np.ndarray]:
    """The pictures as the server sees them, uint8 RGB."""
    urls = [part["image_url"]["url"] for part in asked.body["messages"][0]["content"][1:]]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))) for url in urls]


def draft(asked: Asked) -> str:
    told = " ".join(f"A {name} with a sharp border is seen at {box}." for name, box in findings_of(asked))
    # No two drafts are alike, as with a real model: reflections on the same one would be shared.
    return f"In this image something is not normal. {told} Noise: {zlib.crc32(asked.request_id.encode())}."


def finished(asked: Asked) -> str:
    told = " ".join(
        f"It lies at {box}, where the tissue is denser than what is around it; this is a {name}."
        for name, box in findings_of(asked)
    )
    return f"There is something abnormal in this image. {told}"


def reply(text: str | None, finish: str = "stop", **keywords: Any) -> Answer:
    body = completion(text, **keywords)
    body["choices"][0]["finish_reason"] = finish
    return Answer(body)


def good(asked: Asked) -> Answer:
    return reply(finished(asked) if is_reflection(asked) else draft(asked))


def write_data(folder: Path, count: int, negatives: int = 0) -> Path:
    """``count`` small images that differ, each with one lesion, and a recipe for them."""
    rows = ["file,x1,y1,x2,y2,lesion"]
    for i in range(count + negatives):
        random = np.random.default_rng(i)
        values = random.uniform(0, 0.3, (24, 32))
        x, y = int(random.integers(2, 18)), int(random.integers(2, 10))
        box = f"{x},{y},{x + 12},{y + 12},{'nod' if i % 3 else 'cy'}" if i < count else ",,,,"
        if i < count:
            values[y : y + 12, x : x + 12] = 0.9
        write_png(folder / f"{i:04}.png", values)
        rows.append(f"{i:04}.png,{box}")
    (folder / "a.csv").write_text("\n".join(rows) + "\n")
    columns = "{file: file, box: [x1, y1, x2, y2], lesion: lesion}"
    return write_recipe(folder, f"{{reader: csv, files: a.csv, columns: {columns}}}")
