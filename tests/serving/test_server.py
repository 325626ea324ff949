"""The server as its clients see it: over sockets, by OpenAI's own client and by what none of them would send."""

import base64
import io
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
import uvicorn
from PIL import Image

from mminfer import Engine, InferenceConfig, nano
from mminfer.scheduling import Limits
from mminfer.serving import connections
from mminfer.serving.budget import Budget
from mminfer.serving.connections import WatchedConnection
from mminfer.serving.errors import RequestError
from mminfer.serving.limits import ServerLimits, ServerSettings
from mminfer.serving.running import app_of

QUESTION = "What is the code of owl?"
PRESETS = {name: InferenceConfig.from_preset(name) for name in ("off", "replay-20")}
SMALL = ServerLimits(body_bytes=2**20, images=20, pixels=10_000, new_tokens=3000, answers=4, request_s=60, body_s=0.5)


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@contextmanager
def serving(engine, server=None, limits=None, store_bytes=2**28, disk=None):
    """A server on a port of its own: its address."""
    server = server or ServerSettings("nano", PRESETS, SMALL)
    with app_of(engine, server, limits or Limits(running=8, chunk_size=256), store_bytes, disk) as app:
        config = uvicorn.Config(
            app, port=0, log_level="critical", http=WatchedConnection, ws="none", timeout_graceful_shutdown=1
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        running.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def url_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def openai_messages():
    """The bundled images and their question as OpenAI's clients send them, and as the engine takes them."""
    content = []
    for part in nano.sample_messages()[0]["content"]:
        if part["type"] == "text":
            content.append(part)
        else:
            with Image.open(next(value for key, value in part.items() if key != "type")) as image:
                content.append({"type": "image_url", "image_url": {"url": url_of(image)}})
    return [{"role": "user", "content": content}]


def chat_answer(engine, question=None, config=None, **kwargs):
    """What a chat answers that reads the images first: a server's stretches end there."""
    *read, asked = nano.sample_messages()[0]["content"]
    engine = Engine(engine.model, engine.processor, config)
    chat = engine.chat(prefill_chunk_size=256)
    last = max(k for k, part in enumerate(read) if part["type"] == "image") + 1
    chat.read(read[:last])
    return chat.send([*read[last:], question or asked], **kwargs)


def ask(client, messages, **kwargs):
    return client.chat.completions.create(model="nano", messages=messages, **{"max_tokens": 12, **kwargs})


def text(question=QUESTION):
    return [{"role": "user", "content": question}]


def value(address, name):
    """A figure of /metrics."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waits for ever"
        time.sleep(0.02)


def test_openais_client_gets_the_engines_answer(engine, client):
    found = ask(client, text(), temperature=0)
    wanted = engine.generate(QUESTION, max_new_tokens=12)
    assert found.choices[0].message.content == wanted.text and found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.prompt_tokens == wanted.stats.prompt_tokens
    assert found.usage.completion_tokens == len(wanted.token_ids)
    assert [model.id for model in client.models.list()] == ["nano"]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_pictures_are_read_once_and_answered_as_by_a_chat(engine, client, preset):
    own = {"extra_body": {"mminfer": {"preset": preset}}}
    wanted = chat_answer(engine, config=PRESETS[preset], max_new_tokens=12)
    first, again = (ask(client, openai_messages(), **own) for _ in range(2))
    assert first.choices[0].message.content == again.choices[0].message.content == wanted.text
    assert first.usage.prompt_tokens == again.usage.prompt_tokens
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens > 0.9 * again.usage.prompt_tokens
    assert first.usage.mminfer["visual_tokens"] == again.usage.mminfer["visual_tokens"] == 512
    assert first.usage.mminfer["kept_tokens"] == again.usage.mminfer["kept_tokens"]
    assert (first.usage.mminfer["kept_tokens"] < 300) == (preset != "off")


def test_a_conversation_goes_on_from_what_was_kept(engine):
    """With everything off, a later turn over kept turns is answered as one over turns that are read again."""
    messages = openai_messages()
    with serving(engine, store_bytes=0) as plain, serving(engine) as keeping:
        texts = []
        for address in (plain, keeping):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            said, answers = list(messages), []
            for question in ("What digit is in image BD?", QUESTION, "Which image shows a blue 1?"):
                found = ask(client, said)
                answers.append(found.choices[0].message.content)
                said += [{"role": "assistant", "content": answers[-1]}, *text(question)]
            texts.append(answers)
            left = found.usage.prompt_tokens - found.usage.prompt_tokens_details.cached_tokens
        assert texts[0] == texts[1]
        assert left < 40  # the last question, and not the answers before it
        assert value(plain, "mminfer_store_entries") == 0 < value(keeping, "mminfer_store_bytes")


def test_streams_tell_the_same(client):
    chunks = list(
        ask(client, text(), stream=True, stream_options={"include_usage": True}, n=2, seed=3, temperature=1.5)
    )
    whole = ask(client, text(), n=2, seed=3, temperature=1.5)
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices
    other = ask(client, text(), n=2, seed=4, temperature=1.5)
    assert texts != [choice.message.content for choice in other.choices]


def test_an_answer_ends_before_a_stop_word(client):
    plain = ask(client, text(), temperature=1.5, seed=5, max_tokens=40).choices[0].message.content
    stop = plain[len(plain) // 2 :][:3]
    found = ask(client, text(), temperature=1.5, seed=5, max_tokens=40, stop=[stop, "never said"])
    assert found.choices[0].message.content == plain[: plain.index(stop)].rstrip()
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens < 40


def test_log_probabilities(engine, client):
    found = ask(client, text(), logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs.content
    wanted = engine.generate(QUESTION, max_new_tokens=4, output_logits=True)
    best = wanted.logits.log_softmax(-1).max(-1).values
    assert [one.logprob for one in found] == pytest.approx(best.tolist(), abs=1e-4)
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token for one in found)


def test_answers_keep_to_a_schema(client):
    schema = {
        "type": "object", "properties": {"digit": {"type": "integer"}, "blue": {"type": "boolean"}},
        "required": ["digit", "blue"], "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    found = ask(client, text(), response_format=wanted, max_tokens=60, n=2, temperature=1.0, seed=1)
    for choice in found.choices:
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content)) == {"digit", "blue"}
        assert choice.message.content.startswith("{")
    with pytest.raises(openai.BadRequestError, match="schema is not supported"):
        ask(
            client, text(), response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}}
        )


SECRET = "a5ecret"
PIXEL = url_of(Image.new("RGB", (8, 8)))
BODY = {"model": "nano", "messages": text(), "max_tokens": 2}


def image_message(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


WRONG = {
    "no JSON": (b'{"a5ecret', 400, "invalid_json"),
    "nested": (b"[" * 10_000, 400, "invalid_json"),
    "field": ({**BODY, "a5ecret_": 1}, 400, None),
    "model": ({**BODY, "model": SECRET}, 404, "model_not_found"),
    "role": ({**BODY, "messages": [{"role": SECRET, "content": "a"}]}, 400, None),
    "order": ({**BODY, "messages": [*text(), {"role": "assistant", "content": SECRET}]}, 400, None),
    "nothing": ({**BODY, "messages": []}, 400, None),
    "empty": ({**BODY, "messages": text(" ")}, 400, None),
    "placeholder": ({**BODY, "messages": text(f"{SECRET} <IMG_CONTEXT> <image>")}, 400, "prompt_refused"),
    "surrogate": (b'{"model": "nano", "messages": [{"role": "user", "content": "a5ecret \\ud800"}]}', 400, None),
    "temperature": ({**BODY, "temperature": -1}, 400, None),
    "temperature of nothing": ({**BODY, "temperature": 1e-40}, 400, "temperature"),
    "length of a schema": (
        {**BODY, "response_format": {"type": "json_object"}, "mminfer": {"min_tokens": 2}},
        400,
        "schema_and_min_tokens",
    ),
    "tools": ({**BODY, "tools": [{"a": SECRET}]}, 400, None),
    "answers": ({**BODY, "n": 5}, 400, None),
    "tokens": ({**BODY, "max_tokens": 3001}, 400, None),
    "preset": ({**BODY, "mminfer": {"preset": "aim"}}, 400, "preset_not_allowed"),
    "path": ({**BODY, "messages": image_message("/etc/a5ecret")}, 400, "invalid_image_url"),
    "file": ({**BODY, "messages": image_message("file:///etc/a5ecret")}, 400, "invalid_image_url"),
    "remote": ({**BODY, "messages": image_message("http://127.0.0.1/a5ecret")}, 400, "invalid_image_url"),
    "no image": ({**BODY, "messages": image_message("data:image/png;base64,YTVlY3JldA==")}, 400, "invalid_image"),
    "pixels": ({**BODY, "messages": image_message(url_of(Image.new("RGB", (101, 100))))}, 400, "invalid_image"),
    "images": ({**BODY, "messages": image_message(PIXEL) * 21}, 400, "too_many_images"),
    "size": ({**BODY, "messages": text(SECRET * 2**18)}, 413, "body_too_large"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_has_a_status_and_quotes_nothing(address, name):
    body, status, code = WRONG[name]
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = httpx.post(f"{address}/v1/chat/completions", content=sent, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and code in (None, error["code"])
    if name != "field":  # which is named
        assert SECRET not in found.text and "/etc" not in found.text
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_bodies_that_do_not_come_and_other_types(address):
    plain = httpx.post(
        f"{address}/v1/chat/completions", content=json.dumps(BODY), headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 415
    assert httpx.get(f"{address}/docs").status_code == 404 == httpx.get(f"{address}/v1/nothing").status_code
    assert httpx.get(f"{address}/health", headers={"Host": "evil.example"}).status_code == 400
    origin = httpx.options(f"{address}/v1/chat/completions", headers={"Origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in origin.headers)
    port = int(address.rpartition(":")[2])
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), 20) as slow:
        slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(4096).partition(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", port), 20) as chunked:
        chunked.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        for _ in range(33):
            chunked.sendall(piece)
        assert b" 413 " in chunked.recv(4096).partition(b"\r\n")[0]


def test_the_key_is_asked_for(engine):
    server = ServerSettings("nano", PRESETS, SMALL, api_key="right")
    with serving(engine, server) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for path in ("v1/models", "metrics"):
            assert httpx.get(f"{address}/{path}").status_code == 401
        wrong, right = (openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) for key in ("no", "right"))
        with pytest.raises(openai.AuthenticationError):
            ask(wrong, text())
        assert ask(right, text()).choices


def test_all_requests_together_hold_so_much(engine):
    """A picture of few bytes may be large once it is decoded; what is given back can be had again."""
    budget = Budget(100)
    first, second = budget.share(), budget.share()
    first.take(60)
    for count, status in ((50, 429), (101, 413)):
        with pytest.raises(RequestError) as refused:
            second.take(count)
        assert refused.value.status == status
    first.release()
    first.release()
    second.take(100)
    assert budget.nbytes == 100
    bomb = image_message(url_of(Image.new("RGB", (900, 900))))
    limits = ServerLimits(held_bytes=3 * 900 * 900, text_tokens=100)
    with serving(engine, ServerSettings("nano", PRESETS, limits)) as address:
        for messages, status in ((bomb, 413), (text("owl " * 200), 400), (text("o" * 4000), 400), (text(), 200)):
            found = httpx.post(f"{address}/v1/chat/completions", json={**BODY, "messages": messages})
            assert found.status_code == status, found.text
        assert httpx.get(f"{address}/health", headers={"Host": "[::1]:80"}).status_code == 200


def test_connections_on_which_nothing_moves_are_closed(engine, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE_S", 0.2)
    with serving(engine) as address:
        port, head = int(address.rpartition(":")[2]), b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        for sent in (b"", head, head + b"\r\n" + head):  # nothing, half a request, and half a second one
            with socket.create_connection(("127.0.0.1", port), 20) as idle:
                idle.sendall(sent)
                idle.settimeout(20)
                with suppress(ConnectionResetError):
                    while idle.recv(4096):
                        pass
        assert httpx.get(f"{address}/health").status_code == 200


def test_who_does_not_read_is_let_go(engine, monkeypatch):
    """Its answer does not stay in memory."""
    made = WatchedConnection.connection_made

    def narrow(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(WatchedConnection, "connection_made", narrow)
    monkeypatch.setattr(connections, "PATIENCE_S", 0.3)
    limits = ServerLimits(new_tokens=3000)
    with serving(engine, ServerSettings("nano", PRESETS, limits)) as address:
        body = json.dumps({**endless(True), "logprobs": True, "top_logprobs": 20}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect(("127.0.0.1", int(address.rpartition(":")[2])))
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: value(address, 'mminfer_requests_total{status="499"}') == 1)
        until(lambda: value(address, "mminfer_running") == 0 == value(address, "mminfer_held_bytes"))


def endless(stream):
    """A request that would be answered for long: the schema of a text without an end."""
    schema = {"type": "string", "minLength": 100_000}
    wanted = {"type": "json_schema", "json_schema": {"name": "text", "schema": schema}}
    return {"model": "nano", "messages": text(), "max_tokens": 3000, "response_format": wanted, "stream": stream}


def test_a_client_that_goes_away_stops_its_request(engine):
    with serving(engine, limits=Limits(running=1, waiting=1, chunk_size=256)) as address:
        port = int(address.rpartition(":")[2])
        for stream in (True, False):
            body = json.dumps(endless(stream)).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection = socket.create_connection(("127.0.0.1", port), 20)
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                assert b" 200 " in connection.recv(4096)
            until(lambda: value(address, "mminfer_running") == 1)
            generated = value(address, 'mminfer_tokens_total{kind="generated"}')
            connection.close()
            until(lambda: value(address, "mminfer_running") == 0)
            assert value(address, 'mminfer_tokens_total{kind="generated"}') == generated  # it was not answered
        until(lambda: value(address, 'mminfer_requests_total{status="499"}') == 2)


def test_a_full_queue_says_so_and_a_late_answer_ends(engine):
    server = ServerSettings("nano", PRESETS, ServerLimits(new_tokens=3000, request_s=1.5))
    with serving(engine, server, Limits(running=1, waiting=1, chunk_size=256)) as address:
        found = []

        def post():
            found.append(httpx.post(f"{address}/v1/chat/completions", json=endless(False), timeout=60).status_code)

        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {429, 504}
        assert httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=60).status_code == 200


def test_many_clients_at_once(engine, client):
    """Each gets its own answer, while others send what is wrong or go away."""
    questions = [f"What is the code of {word}?" for word in ("owl", "nest", "a", "the sea", "image BD")]
    wanted = [ask(client, text(question)).choices[0].message.content for question in questions]
    wrong = []

    def work(number):
        for turn in range(3):
            question = (number + turn) % len(questions)
            try:
                if number % 4 == 3:
                    with pytest.raises(openai.BadRequestError):
                        ask(client, image_message("/nowhere"))
                elif number % 4 == 2:
                    assert next(iter(ask(client, text(questions[question]), stream=True))).choices
                elif ask(client, text(questions[question])).choices[0].message.content != wanted[question]:
                    wrong.append("another answer")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
