"""Servers in processes of their own, and clients that ask them and note when tokens come."""

import base64
import http.client
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
from PIL import Image

from mminfer import nano
from mminfer.bench.contexts import made_contexts

HOST, PATH, START_S, ANSWER_S = "127.0.0.1", "/v1/chat/completions", 120, 600
PRESETS = ("off", "aim", "replay-20")


@dataclass
class Server:
    """A server that runs.

    Args:
        port: on this machine.
        process: of it.
        model: what requests call the model.
        is_ours: whether it is `mminfer serve`.
    """

    port: int
    process: psutil.Process
    model: str
    is_ours: bool

    @property
    def cpu_s(self) -> float:
        """What it has computed so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    @property
    def resident_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def figure(self, name: str) -> float:
        """A figure of our `/metrics`: the sum over its labels."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def body(self, content: Any, new_tokens: int, setting: str) -> bytes:
        """A request for a streamed greedy answer of just so many tokens."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}], "stream": True}
        if self.is_ours:
            own = {"preset": setting, "min_tokens": new_tokens}
            body |= {"max_tokens": new_tokens, "temperature": 0, "mminfer": own}
        else:
            config = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            body["generation_config"] = json.dumps(config)
        return json.dumps(body).encode()


@contextmanager
def our_server(port: int, *options: str) -> Iterator[Server]:
    """`mminfer serve` on nano, the presets of these benchmarks allowed."""
    presets = [word for name in PRESETS for word in ("--allow-preset", name)]
    command = [sys.executable, "-m", "mminfer", "serve", "--port", str(port), *presets, *options]
    with _running(command, port, "nano", True) as server:
        yield server


@contextmanager
def host_server(port: int) -> Iterator[Server]:
    """`transformers serve` on the same weights."""
    model = str(nano.checkpoint_path())
    run = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", run, "serve", model, "--port", str(port), "--device", "cpu", "--host", HOST]
    with _running(command, port, model, False) as server:
        yield server


@contextmanager
def _running(command: Sequence[str], port: int, model: str, is_ours: bool) -> Iterator[Server]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process, port)
        yield Server(port, psutil.Process(process.pid), model, is_ours)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: Any, port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args[:4]} ended with {process.returncode}")
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{process.args[:4]} did not come up within {START_S} s")


@dataclass
class Told:
    """What came of one request.

    Args:
        start: `time.perf_counter()` when it was sent.
        status: of HTTP.
        text: of the answer.
        times: when its pieces came.
    """

    start: float
    status: int = 0
    text: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.times[0] - self.start)

    @property
    def gaps_ms(self) -> list[float]:
        """Between pieces."""
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def tpot_ms(self) -> float | None:
        gaps = self.gaps_ms
        return sum(gaps) / len(gaps) if gaps else None


def ask(server: Server, body: bytes) -> Told:
    """Sends a request and reads its stream to the end."""
    told = Told(time.perf_counter())
    connection = http.client.HTTPConnection(HOST, server.port, timeout=ANSWER_S)
    try:
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        told.status = response.status
        while line := response.readline():
            if line.startswith(b"data: {") and (piece := _content(line[6:])):
                told.times.append(time.perf_counter())
                told.text += piece
    finally:
        connection.close()
    return told


def _content(line: bytes) -> str:
    choices = json.loads(line).get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def ask_all(server: Server, bodies: Sequence[bytes], in_flight: int) -> list[Told]:
    """Asks them all, so many at a time, each client its next as soon as it has its answer."""
    with ThreadPoolExecutor(in_flight) as clients:
        return list(clients.map(lambda body: ask(server, body), bodies))


def documents(count: int, pages: int, questions: int, seed: int) -> list[tuple[list[dict[str, Any]], list[str]]]:
    """Made-up documents of pictures and facts: content as OpenAI's clients send it, and questions about each."""
    made = []
    for context in made_contexts(pages, count, questions, seed, None):
        made.append(([_sent(part) for part in context.content], list(context.questions)))
    return made


def _sent(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    image, file = part["image"], io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def about(document: list[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """The content of a message that asks it."""
    return [*document, {"type": "text", "text": question}]
