"""Many requests of clients of all kinds: whether the server stays up, right and small.

    python -m benchmarks.serving.soak
    python -m benchmarks.serving.soak --requests 500

Some ask and wait, some go away in the middle, some send what is no request, too much, or bit by bit, some hardly read.
Every whole answer is compared with the one that was given first, alone. At the end nothing may be under way, and memory
may not have grown beyond what is kept of prompts; it is compared with that after the first quarter.
"""

import argparse
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.serving.clients import HOST, PATH, Server, about, ask, documents, our_server

ANSWER, GROWTH_BYTES, IDLE_S = 6, 64 * 2**20, 60
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
WRONG: Sequence[bytes] = (
    b"{", b"[" * 5000, b"\xff\xfe", b"null", b'{"model": "nano"}', b'{"model": "nano", "messages": []}',
    b'{"model": "other", "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "nano", "messages": [{"role": "user", "content": "<image> <IMG_CONTEXT>"}]}',
    b'{"model": "nano", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}',
)  # fmt: skip


class Soak:
    """The clients of a server, and what came of their requests.

    Attributes:
        outcomes: how many requests ended how.
        faults: what should not have happened.

    Args:
        server: which they ask.
        seed: of what they ask about.
        count: of documents.
    """

    def __init__(self, server: Server, seed: int, count: int = 6) -> None:
        self._server, self.outcomes, self.faults = server, Counter[str](), list[str]()
        made = documents(count, 3, 3, seed)
        self._asked = [(about(d, q), name) for d, questions in made for q in questions for name in ("off", "replay-20")]
        self._bodies = [server.body(content, ANSWER, name) for content, name in self._asked]
        self._wanted = [ask(server, body).text for body in self._bodies]
        self._large = json.dumps({"model": "nano", "messages": [], "user": "a" * (3 * 2**20)}).encode()
        self._kinds: list[tuple[int, Callable[[random.Random], str]]] = [
            (10, self._whole), (3, self._dies), (3, self._is_wrong), (1, self._is_large), (1, self._is_slow),
            (1, self._hardly_reads), (1, self._is_no_image),
        ]  # fmt: skip

    def one(self, number: int) -> None:
        """The request of this number."""
        rng = random.Random(number)
        kinds, weights = [kind for _, kind in self._kinds], [weight for weight, _ in self._kinds]
        (kind,) = rng.choices(kinds, weights)
        try:
            self.outcomes[f"{kind.__name__.strip('_')}: {kind(rng)}"] += 1
        except Exception as error:
            self.faults.append(f"{kind.__name__}: {error!r:.200}")

    def _whole(self, rng: random.Random) -> str:
        place = rng.randrange(len(self._bodies))
        told = ask(self._server, self._bodies[place])
        if told.status == 200 and told.text != self._wanted[place]:
            self.faults.append(f"another answer: {told.text!r:.100} for {self._wanted[place]!r:.100}")
        return str(told.status)

    def _dies(self, rng: random.Random) -> str:
        """Before all is sent, before anything comes, or after some of it."""
        body = rng.choice(self._bodies)
        with self._connected() as there:
            there.sendall(_request(body)[: rng.randrange(len(body)) if rng.random() < 0.3 else None])
            if rng.random() < 0.5:
                there.recv(rng.randrange(1, 2000))
            time.sleep(rng.random() / 10)
        return "gone"

    def _is_wrong(self, rng: random.Random) -> str:
        body = rng.choice(WRONG)
        if rng.random() < 0.5:  # a good one with other bytes in it
            body = bytearray(rng.choice(self._bodies))
            for _ in range(4):
                body[rng.randrange(len(body))] = rng.randrange(256)
        return self._sent(bytes(body))

    def _is_large(self, rng: random.Random) -> str:
        return self._sent(self._large)

    def _is_no_image(self, rng: random.Random) -> str:
        url = rng.choice(["data:image/png;base64,AAAA", "file:///etc/passwd", "http://127.0.0.1/x", "data:;base64,"])
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return self._sent(self._server.body(content, 1, "off"))

    def _is_slow(self, rng: random.Random) -> str:
        with self._connected() as there:
            for piece in (b"POST ", b"/v1/chat/", b"completions HTTP/1.1\r\n", b"Host: localhost\r\n"):
                there.sendall(piece)
                time.sleep(0.05)
        return "gone"

    def _hardly_reads(self, rng: random.Random) -> str:
        with self._connected() as there:
            there.sendall(_request(rng.choice(self._bodies)))
            while there.recv(64):
                time.sleep(0.002)
        return "read"

    def _sent(self, body: bytes) -> str:
        status = b""
        with self._connected() as there:
            try:
                there.sendall(_request(body))
            except OSError:
                return "closed"  # it was told so before all of it was sent
            try:
                while piece := there.recv(4096):
                    status = status or piece[9:12]
            except ConnectionResetError:
                pass
        if status.startswith(b"5"):
            self.faults.append(f"status {status.decode()} for {body[:100]!r}")
        return status.decode() or "closed"

    def _connected(self) -> socket.socket:
        return socket.create_connection((HOST, self._server.port), 120)

    def settle(self) -> None:
        """Waits until nothing is under way."""
        end = time.monotonic() + IDLE_S
        names = ("mminfer_running", "mminfer_waiting", "mminfer_held_bytes")
        while any(left := [self._server.figure(name) for name in names]):
            if time.monotonic() > end:
                self.faults.append(f"still there: {dict(zip(names, left, strict=True))}")
                return
            time.sleep(0.2)


def _request(body: bytes) -> bytes:
    return f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body


def soak(requests: int, clients: int, seed: int, port: int) -> dict[str, Any]:
    """What came of them all; `faults` is empty where nothing was wrong."""
    limits = ("--max-body-mib", "2", "--store-mib", "8", "--running", "16", "--waiting", "64")
    with our_server(port, *limits) as server:
        run, memory = Soak(server, seed), list[int]()
        for quarter in range(4):
            numbers = range(quarter * requests // 4, (quarter + 1) * requests // 4)
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(run.one, numbers))
            run.settle()
            memory.append(server.resident_bytes)
            print(f"{numbers.stop} requests, {memory[-1] / 2**20:,.0f} MiB resident", flush=True)
        if memory[-1] - memory[0] > GROWTH_BYTES:
            run.faults.append(f"memory grew from {memory[0]} to {memory[-1]} bytes")
        if not server.process.is_running():
            run.faults.append("the server has ended")
        threads = server.process.num_threads()
    return {"outcomes": dict(sorted(run.outcomes.items())), "memory": memory, "threads": threads, "faults": run.faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32, help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8741)
    args = parser.parse_args()
    found = soak(args.requests, args.clients, args.seed, args.port)
    for name, value in found.items():
        print(f"{name}: {json.dumps(value[:20] if name == 'faults' else value)}")
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
