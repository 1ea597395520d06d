"""Hub names without a network: the cache is used, a hub that does not respond costs seconds, local names are not looked up."""

import os
import socket
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from lora_ft.core.errors import DataError, ModelError
from lora_ft.data.sources import iter_rows
from lora_ft.methods.trained import Trained
from lora_ft.model import hub
from lora_ft.model.files import resolve
from tests.helpers.tiny import write_base

COMMIT = "a" * 40
CACHE = Path(os.environ["HF_HUB_CACHE"])


@pytest.fixture(scope="module")
def cached():
    """A model in the hub's cache, as main and by its commit."""
    repo = CACHE / "models--hubtest--model"
    write_base(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    return "hubtest/model"


@pytest.fixture
def requests(monkeypatch):
    """A hub that accepts connections and never responds; the requests it received about repositories."""
    received, connections = [], []
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connections.append(server.accept()[0])
                request = connections[-1].recv(4096).split(b"\r\n")[0].decode()
            except OSError:
                return
            if "hubtest/" in request:
                received.append(request)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=endpoint))
    monkeypatch.setattr(hub, "HUB_TIMEOUT_SECONDS", 0.3)
    yield received
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for connection in connections:
        connection.close()


def test_a_cached_commit_needs_no_request(cached, requests):
    assert resolve(cached, COMMIT).folder == CACHE / "models--hubtest--model/snapshots" / COMMIT
    assert not requests


def test_an_incomplete_commit_is_requested(cached, requests):
    weights = CACHE / "models--hubtest--model/snapshots" / COMMIT / "model.safetensors"
    aside = weights.rename(weights.with_suffix(".aside"))
    try:
        resolve(cached, COMMIT)
    finally:
        aside.rename(weights)
    assert requests == [f"GET /api/models/hubtest/model/revision/{COMMIT} HTTP/1.1"]


def test_a_hub_that_does_not_respond_is_asked_once_and_the_cache_is_used(cached, requests):
    started = time.monotonic()
    assert resolve(cached).revision == COMMIT
    assert len(requests) == 1 and time.monotonic() - started < 10


def test_a_hub_that_does_not_respond_without_a_cache(requests):
    with pytest.raises(ModelError, match=r"can't be reached \(.*timed out.*HF_HOME.*--base FOLDER"):
        resolve("hubtest/other")
    with pytest.raises(DataError, match=r"cannot be reached \(.*timed out.*HF_HOME.*--set data.train=FILE"):
        list(iter_rows("hubtest/other@train"))


def test_a_local_base_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, requests):
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    record = {"base": {"name": "base", "revision": None}}
    assert Trained(Path("out"), "lora", record, {}).base().folder == Path("base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="trained on a local base .* --base FOLDER"):
        Trained(Path("../out"), "lora", record, {}).base()
    assert not requests
