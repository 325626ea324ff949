"""A server among clients that ask, die, send rubbish, send slowly or hardly read: it stays up, right and empty."""

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from benchmarks.serving.clients import Server, documents
from benchmarks.serving.soak import Soak
from mminfer import Engine, InferenceConfig
from mminfer.scheduling import Limits
from mminfer.serving.limits import ServerLimits, ServerSettings
from tests.serving.test_server import serving

REQUESTS, CLIENTS = 200, 12


@pytest.fixture(scope="module")
def found():
    """What came of a few hundred requests: the clients' notes, and figures of the server behind them."""
    presets = {name: InferenceConfig.from_preset(name) for name in ("off", "replay-20")}
    settings = ServerSettings("nano", presets, ServerLimits(body_bytes=2**21))
    with serving(Engine.from_pretrained("nano"), settings, Limits(running=8, waiting=4), 2**22) as address:
        run = Soak(Server(int(address.rpartition(":")[2]), psutil.Process(), "nano", True), 0, 1)
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(run.one, range(REQUESTS)))
        run.settle()
        yield run, run._server.figure("mminfer_store_bytes")


def test_no_answer_was_wrong_and_nothing_is_left_behind(found):
    run, kept = found
    assert run.faults == []
    assert sum(run.outcomes.values()) == REQUESTS and 0 < kept <= 2**22


def test_all_kinds_of_clients_came_and_the_wrong_ones_were_told_so(found):
    outcomes = found[0].outcomes
    assert outcomes["whole: 200"] > 20 and outcomes["dies: gone"] > 10
    assert outcomes["is_wrong: 400"] > 10 and outcomes["is_no_image: 400"] > 2
    assert {name for name in outcomes if name.startswith("is_large")} <= {"is_large: 413", "is_large: closed"}


def test_documents_are_as_clients_send_them():
    ((content, questions),) = documents(1, 2, 2, 0)
    assert [part["type"] for part in content].count("image_url") == 2 and len(questions) == 2
    assert all(part["image_url"]["url"].startswith("data:image/png") for part in content if part["type"] != "text")
