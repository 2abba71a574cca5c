"""The flags of paid servers: budgets, prices, options, addresses and keys."""

from __future__ import annotations

import pytest

from umed_plugin.remote import settings
from umed_plugin.remote.client import ModelClient


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("20usd", (20.0, "usd")),
        (" 2.5 USD", (2.5, "usd")),
        ("5000requests", (5000.0, "requests")),
        ("7tokens", (7.0, "tokens")),
    ],
)
def test_a_budget_is_an_amount_and_a_unit(text: str, budget: tuple[float, str]) -> None:
    assert settings.parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "20", "usd", "0usd", "-5usd", "5euros", "5 usd now", "infusd", "nantokens"])
def test_anything_else_is_not_a_budget(text: str) -> None:
    with pytest.raises(ValueError, match="a number above 0 and a unit, such as 5000requests"):
        settings.parse_budget(text)


def test_prices_are_for_prompt_and_completion_tokens() -> None:
    assert settings.parse_prices("0.15,0.60") == (0.15, 0.6)
    assert settings.parse_prices("0,1") == (0.0, 1.0)
    for text in ("", "1", "1,2,3", "0,0", "-1,2", "inf,1", "a,b"):
        with pytest.raises(ValueError, match="per million prompt tokens and per million completion tokens"):
            settings.parse_prices(text)


def test_options_are_a_json_object() -> None:
    assert settings.parse_options('{"temperature": 0}') == {"temperature": 0}
    for text in ("7", "[]", "{", "null"):
        with pytest.raises(ValueError):
            settings.parse_options(text)


def test_a_budget_is_spent_in_its_own_unit() -> None:
    counts = {"requests": 3, "prompt_tokens": 2_000_000, "completion_tokens": 500_000}
    assert settings.spent(counts, "requests", None) == 3
    assert settings.spent(counts, "tokens", None) == 2_500_000
    assert (
        settings.spent(counts, "usd", (2.5, 10.0))
        == pytest.approx(2 * 2.5 + 0.5 * 10)
        == settings.cost(counts, (2.5, 10.0))
    )


@pytest.mark.parametrize(
    ("url", "key", "fault"),
    [
        (None, "sk-1", None),
        (None, "", "OPENAI_API_KEY is not set. It is the only place for the API key"),
        ("http://localhost:8000/v1", "", None),
        ("https://example.org/v1", "", None),
        ("localhost:8000", "sk-1", "must be an address such as http://localhost:8000/v1"),
        ("http://host/v1?key=1", "sk-1", "must be an address"),
        ("http://me:pw@host/v1", "sk-1", "contains a user name or password"),
        ("http://[::1", "sk-1", "must be an address"),
        ("http://me:pw@[::1", "sk-1", "contains a user name or password"),
        ("http://host:99999/v1", "sk-1", "a number from 1 to 65535"),
        ("http://host:80a0/v1", "", "a number from 1 to 65535"),
        ("http://host:0/v1", "", "a number from 1 to 65535"),
        ("http://host/v1#x", "", "a ? or #"),
        ("http://host/v1?", "", "a ? or #"),
        ("http://host/v1\r", "", "white space or a control character"),
        ("http://host/v 1", "", "white space or a control character"),
        (None, " sk-1\r\n", None),
        (None, " \n", "OPENAI_API_KEY is not set"),
        (None, "sk-\rsecret", "OPENAI_API_KEY holds a key whose character 4 of 10"),
        ("http://localhost:8000/v1", "sk-s\u00e9cret", "OPENAI_API_KEY holds a key whose character 5 of 9"),
    ],
)
def test_the_address_and_the_key_of_a_server(url: str | None, key: str, fault: str | None) -> None:
    faults = settings.server_faults("--judge", "--url", url, {"OPENAI_API_KEY": key})
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]
    assert "ecret" not in str(faults) and "key=1" not in str(faults)


@pytest.mark.parametrize("url", ["http://host:99999/v1", "host", "http://me:pw@host:80a0/v1"])
def test_the_address_of_the_environment_is_checked_too(url: str) -> None:
    given = {"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": url}
    (fault,) = settings.server_faults("--judge", "--url", None, given)
    assert "OPENAI_BASE_URL must be an address" in fault and "pw" not in fault
    for fine in ("", " ", "https://me:pw@host/v1 ", "http://host/v1\n"):
        assert settings.server_faults("--judge", "--url", None, {**given, "OPENAI_BASE_URL": fine}) == []


@pytest.mark.parametrize(
    ("written", "used"),
    [
        ("http://host:1/v1\n", "http://host:1/v1/"),
        (" http://host:1/v1", "http://host:1/v1/"),
        ("", "https://api.openai.com/v1/"),
        (None, "https://api.openai.com/v1/"),
    ],
)
def test_requests_go_to_the_address_that_was_checked(
    written: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    if written is None:
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    else:
        monkeypatch.setenv("OPENAI_BASE_URL", written)
    client = ModelClient(settings.ServerSettings("m"), lambda *unused: None)
    try:
        assert str(client._client.base_url) == used
    finally:
        client.close()


def test_an_at_sign_in_a_path_is_no_password() -> None:
    assert settings.server_faults("--judge", "--url", "http://gateway:8000/v1/@team") == []
    (fault,) = settings.server_faults("--judge", "--url", "me:pw@host/v1")
    assert "contains a user name or password" in fault


def test_settings_have_defaults_and_stay_as_they_are() -> None:
    server = settings.ServerSettings("m")
    assert (server.base_url, dict(server.options), server.timeout, server.retries) == (None, {}, 120.0, 5)
    with pytest.raises(AttributeError):
        server.model = "other"  # type: ignore[misc]
