"""The studies that the chat page's server holds: whose they are, when they are removed, and how many there may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chat_client import Client, until

from umed_plugin.commands.serve import shelf, uploads


def test_images_are_removed_when_the_page_says_so_and_the_oldest_give_way(
    server: Any, client: Client, dicom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "MOST_STUDIES_OF_ONE", 2)
    studies = [client.upload(dicom)[0] for _ in range(3)]
    assert sorted(folder.name for folder in server.shelf.folder.iterdir()) == sorted(studies[1:])
    assert client.picture(studies[0])[0] == 404
    assert client.ask("POST", f"/studies/{studies[1]}/forget", b"")[0] == 200
    assert [folder.name for folder in server.shelf.folder.iterdir()] == [studies[2]]
    client.question(studies[2])
    assert client.ask("POST", f"/studies/{studies[2]}/forget", b"")[0] == 200
    until(lambda: not [key for key in list(server.dialogues[0]._features) if key[0] == studies[2]])
    assert server.shelf.folder.stat().st_mode & 0o077 == 0, "readable by this user only"


def cookie_of(client: Client) -> str:
    headers = client.ask("GET", "/")[2]
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
    return headers["Set-Cookie"].partition(";")[0]


def test_browsers_do_not_reach_each_others_studies(client: Client, dicom: Path) -> None:
    first, second = cookie_of(client), cookie_of(client)
    assert first != second and "Set-Cookie" not in client.ask("GET", "/", Cookie=first)[2]
    study = client.ask("POST", "/studies", b"", Cookie=first)[1]["study"]
    for other in (second, "umed-serve=guessed", "umed-serve=" + "a" * 30, None):
        headers = {"Cookie": other} if other else {}
        for method, path in (("PUT", "files?name=a"), ("POST", "open"), ("POST", "questions"), ("POST", "forget")):
            assert client.ask(method, f"/studies/{study}/{path}", b"{}", **headers)[0] == 404
    path = f"/studies/{study}/files?name=a.dcm"
    assert client.ask("PUT", path, dicom.read_bytes(), Cookie=f"other=1; {first}")[0] == 200
    assert client.ask("POST", f"/studies/{study}/open", b"", Cookie=first)[0] == 200


def test_nobodys_uploads_evict_another_persons(client: Client, dicom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MOST_STUDIES_OF_ONE", 2)
    monkeypatch.setattr(shelf, "MOST_STUDIES", 3)
    mine, theirs = cookie_of(client), cookie_of(client)

    def begin(cookie: str) -> tuple[int, Any]:
        return client.ask("POST", "/studies", b"", Cookie=cookie)[:2]

    def complete(cookie: str, study: str) -> None:
        assert client.ask("PUT", f"/studies/{study}/files?name=a.dcm", dicom.read_bytes(), Cookie=cookie)[0] == 200
        assert client.ask("POST", f"/studies/{study}/open", b"", Cookie=cookie)[0] == 200

    their = begin(theirs)[1]["study"]
    first, second = begin(mine)[1]["study"], begin(mine)[1]["study"]
    status, said = begin(mine)
    assert status == 503 and "uploading 2 studies already" in said["error"], "an upload is never evicted"
    complete(mine, second)
    assert begin(mine)[0] == 200
    assert client.ask("POST", f"/studies/{second}/open", b"", Cookie=mine)[0] == 404, "one's own complete one gives way"
    complete(mine, first)
    complete(theirs, their)
    status, said = begin(theirs)
    assert status == 503 and "holds 3 studies of all its users" in said["error"]
    assert client.ask("POST", f"/studies/{first}/open", b"", Cookie=mine)[0] == 200, "another person's does not"


def test_a_study_that_nobody_uses_makes_room(server: Any, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MOST_STUDIES", 1)
    study = client.begin()
    assert client.ask("POST", "/studies", b"")[0] == 503
    server.shelf._cases[study].touched -= shelf.IDLE_SECONDS + 1
    assert client.ask("POST", "/studies", b"")[0] == 200 and not (server.shelf.folder / study).exists()


def test_the_sizes_of_all_uploads_are_bounded_together(
    server: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "MOST_UPLOADS", 1)
    server.shelf._cases[client.begin()].uploads.size = 50_000_000
    status, said, _ = client.ask("POST", "/studies", b"")
    assert status == 503 and "50 MB. Allowed: 64 studies, 50 MB" in said["error"]


def test_a_full_disk_is_said(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    study = client.begin()
    monkeypatch.setattr(uploads.Uploads, "_stored", full)
    status, said = client.put(study, "a.png", b"\x89PNG\r\n\x1a\n")
    assert status == 507 and "disk is full" in said["error"]
