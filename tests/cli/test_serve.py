"""The command line: mminfer serve, up to where it would listen."""

import importlib.util

import pytest

from mminfer.serving import running
from tests.cli.test_generate import invoke, refused


def test_what_an_operator_cannot_mean_is_refused():
    assert "pass --api-key" in refused("serve", "--host", "0.0.0.0")
    assert "unknown preset 'fastest'" in refused("serve", "--allow-preset", "fastest")
    assert "unknown preset" in refused("serve", "--preset", "a")


def test_missing_packages_are_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert "needs uvicorn: pip install 'mminfer[serve]'" in refused("serve")


def test_options_reach_the_server(monkeypatch):
    seen = []
    monkeypatch.setattr(running, "run_server", lambda *args: seen.append(args))
    monkeypatch.setenv("MMINFER_API_KEY", "from the environment")
    options = [
        "--host",
        "0.0.0.0",
        "--port",
        "81",
        "--preset",
        "replay-20",
        "--allow-preset",
        "off",
        "--store-mib",
        "2",
    ]
    result = invoke("serve", *options, "--running", "3", "--max-images", "4", "--allow-remote-domain", "Example.org")
    assert result.exit_code == 0, result.stderr
    ((engine, server, limits, store_bytes, address),) = seen
    assert list(server.settings) == ["replay-20", "off"] and engine.config == server.settings["replay-20"]
    assert (server.api_key, server.model_id, server.limits.images) == ("from the environment", "nano", 4)
    assert (limits.running, store_bytes, address) == (3, 2 * 2**20, ("0.0.0.0", 81))
    assert server.remote_domains == {"example.org"}


@pytest.mark.parametrize(("given", "name"), [("nano", "nano"), ("org/model", "org/model")])
def test_models_go_by_their_names(given, name, tmp_path):
    assert running.model_id_of(given) == name
    assert running.model_id_of(str(tmp_path)) == tmp_path.name
