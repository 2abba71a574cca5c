"""Fixtures of the tests of the chat page: a checkpoint that says one sentence, served on loopback, and a client of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.chat_client import Client, chat_server
from support.drawn import scene, write_dicom

if TYPE_CHECKING:
    from umed_plugin.commands.serve.dialogue import Dialogue


@pytest.fixture(scope="module")
def speaking(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint that answers every question with `support.speaking.SENTENCE`."""
    from support.speaking import teach

    return teach(tiny_mistral, tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def dialogue(speaking: Path) -> Dialogue:
    """The loaded checkpoint, which the tests of a module share."""
    from umed_plugin.commands.serve.dialogue import Dialogue

    return Dialogue(speaking, most_tokens=60)


@pytest.fixture
def server(dialogue: Dialogue) -> Any:
    """A server that holds no study yet."""
    with chat_server(dialogue) as running:
        yield running


@pytest.fixture
def client(server: Any) -> Client:
    """Speaks to the server as the page does."""
    return Client(server)


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    """An image of 97 x 61 pixels with a window of its own."""
    return write_dicom(tmp_path / "a.dcm", scene(), WindowCenter=0, WindowWidth=2000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for the files of one study."""
    made = tmp_path / "case"
    made.mkdir()
    return made
