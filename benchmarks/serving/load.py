"""What a server gives under load, beside `transformers serve` and `engine.generate` one by one, on nano.

    python -m benchmarks.serving.load
    python -m benchmarks.serving.load --requests 64 --pages 64

Clients of a process of their own ask over sockets. `new`: every request brings pictures that nobody has sent. `known`:
all ask about the same few documents, which have been read before. CPU time is the server's alone, whatever else runs on
the machine; requests a second go by the clock. Every answer is compared with that to one request at a time.

`document`: the time to the first token of a question over a long document that is new, and of a second one. `gap`:
the longest time between two tokens of an answer while such a document is read. `warm`: bytes that are kept of one
and of the chat with the first question.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from threading import Thread
from typing import Any

from benchmarks.common import SEED, show_rows
from benchmarks.serving.clients import PRESETS, Server, Told, about, ask, ask_all, documents, host_server, our_server
from mminfer import Engine

HOST, ONE_BY_ONE = "transformers serve", "generate, one by one"
GIB_4 = 4 * 2**30
NEW_TOKENS, PICTURES, KNOWN, AGAIN = 16, 8, 4, 4
COLUMNS = (
    "measure", "workload", "setting", "in_flight", "pages", "requests", "requests_a_s", "cpu_ms", "ttft_ms_p50",
    "ttft_ms_p95", "tpot_ms_p50", "tpot_ms_p95", "same_answers", "second_ttft_ms", "gap_ms", "document_bytes", "warm",
)  # fmt: skip


def row(**known: Any) -> dict[str, Any]:
    """A row; what is not measured there is empty."""
    return {name: known.get(name, "") for name in COLUMNS}


def contents(workload: str, requests: int, seed: int) -> list[list[dict[str, Any]]]:
    """What the requests of a workload say, in order."""
    if workload == "new":
        return [about(document, questions[0]) for document, questions in documents(requests, PICTURES, 1, seed)]
    known = [[about(document, q) for q in questions] for document, questions in documents(KNOWN, PICTURES, 8, seed)]
    in_turn = [content for of_one in zip(*known, strict=False) for content in of_one]
    return list(islice(cycle(in_turn), requests))


def loaded(
    server: Server, setting: str, workload: str, in_flight: Sequence[int], requests: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each number in flight, the least of which says what the answers should be."""
    wanted: list[str] = []
    warm = [server.body(content, NEW_TOKENS, setting) for content in contents("new", 1, seed + 10**6)]
    for place, flight in enumerate(in_flight):
        count = max(requests // 2, 4) if flight == 1 else requests
        asked = contents(workload, count, seed if workload == "known" else seed + 1000 * place)
        bodies = [server.body(content, NEW_TOKENS, setting) for content in asked]
        ask_all(server, bodies[:KNOWN] if workload == "known" else warm, 1)
        start, cpu_s = time.perf_counter(), server.cpu_s
        told = ask_all(server, bodies, flight)
        seconds, cpu_s = time.perf_counter() - start, server.cpu_s - cpu_s
        texts = [one.text for one in told]
        if workload == "known":
            wanted = wanted or texts
        else:  # asked once more, one at a time
            wanted = texts if flight == 1 else [ask(server, body).text for body in bodies[:AGAIN]]
        same = sum(a == b for a, b in zip(texts, wanted, strict=False)) / min(len(texts), len(wanted))
        times = {"requests_a_s": round(count / seconds, 2), "cpu_ms": round(1e3 * cpu_s / count, 1)}
        facts = {"workload": workload, "setting": setting, "in_flight": flight, "pages": PICTURES, "requests": count}
        yield row(measure="load", **facts, **times, **spans(told), same_answers=round(same, 3))


def spans(told: Sequence[Told]) -> dict[str, float]:
    """TTFT and TPOT, p50 and p95."""
    of = {
        "ttft": [one.ttft_ms for one in told if one.times],
        "tpot": [one.tpot_ms for one in told if one.tpot_ms is not None],
    }
    return {
        f"{name}_ms_{label}": round(value, 2)
        for name, values in of.items()
        for label, value in zip(("p50", "p95"), _quantiles(values), strict=True)
    }


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    return statistics.median(values), statistics.quantiles(values, n=20, method="inclusive")[-1]


def one_by_one(workload: str, requests: int, seed: int) -> dict[str, Any]:
    """`engine.generate` in this process, over messages as they are sent."""
    engine, told = Engine.from_pretrained("nano"), []
    asked = contents(workload, max(requests // 2, 4), seed)
    engine.generate(_messages(asked[0]), NEW_TOKENS)
    start, cpu_s = time.perf_counter(), time.process_time()
    for content in asked:
        output = engine.generate(_messages(content), NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        told.append((output.stats.ttft_ms, output.stats.tpot_ms))
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
    found = {}
    for name, values in zip(("ttft", "tpot"), zip(*told, strict=True), strict=True):
        for label, value in zip(("p50", "p95"), _quantiles(values), strict=True):
            found[f"{name}_ms_{label}"] = round(value, 2)
    times = {"requests_a_s": round(len(asked) / seconds, 2), "cpu_ms": round(1e3 * cpu_s / len(asked), 1)}
    facts = {"workload": workload, "setting": ONE_BY_ONE, "in_flight": 1, "pages": PICTURES, "requests": len(asked)}
    return row(measure="load", **facts, **times, **found)


def _messages(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As an engine takes them."""
    parts = [
        part if part["type"] == "text" else {"type": "image", "image": part["image_url"]["url"]} for part in content
    ]
    return [{"role": "user", "content": parts}]


def long_document(server: Server, setting: str, pages: int, seed: int) -> Iterator[dict[str, Any]]:
    """What a document takes that is new, then known, and while another answer is on its way."""
    (document, questions), (other, _) = documents(2, pages, 4, seed + 2 * 10**6)
    held = server.figure("mminfer_store_bytes")
    first = ask(server, server.body(about(document, questions[0]), NEW_TOKENS, setting))
    kept = server.figure("mminfer_store_bytes") - held
    second = ask(server, server.body(about(document, questions[1]), NEW_TOKENS, setting))
    facts = {"setting": setting, "pages": pages}
    times = {"ttft_ms_p50": round(first.ttft_ms, 1), "second_ttft_ms": round(second.ttft_ms, 1)}
    yield row(measure="document", **facts, **times)
    yield row(measure="warm", **facts, document_bytes=round(kept), warm=int(GIB_4 // kept) if kept else 0)
    streamed: list[Told] = []
    long = server.body("What is it?", 1000, setting)
    waiting = Thread(target=lambda: streamed.append(ask(server, long)))
    waiting.start()
    time.sleep(0.5)
    ask(server, server.body(about(other, questions[0]), 1, setting))
    done = time.perf_counter()
    waiting.join()
    gaps = [gap for gap, at in zip(streamed[0].gaps_ms, streamed[0].times, strict=False) if at < done]
    yield row(measure="gap", **facts, gap_ms=round(max(gaps), 1), requests=len(gaps))


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All of them."""
    for workload in args.workloads:
        yield one_by_one(workload, args.requests, args.seed)
    with our_server(args.port, "--running", str(max(args.in_flight)), "--store-mib", "4096") as server:
        for setting in args.settings:
            for workload in args.workloads:
                yield from loaded(server, setting, workload, args.in_flight, args.requests, args.seed)
            if args.pages:
                yield from long_document(server, setting, args.pages, args.seed)
    if args.host:
        with host_server(args.port + 1) as server:
            for workload in args.workloads:
                yield from loaded(server, HOST, workload, args.in_flight, args.requests // 2, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64, help="of each number in flight")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--settings", nargs="+", default=list(PRESETS))
    parser.add_argument("--workloads", nargs="+", default=["new", "known"])
    parser.add_argument("--pages", type=int, default=64, help="of the long document; 0: none")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--port", type=int, default=8731, help="and the next one")
    parser.add_argument("--host", action=argparse.BooleanOptionalAction, default=True, help=f"also {HOST}")
    parser.add_argument("--out", default="serving", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    for one in rows(args):
        show_rows(args.out, [{**one, "seed": args.seed}], key=("measure", "workload", "setting", "in_flight", "pages"))


if __name__ == "__main__":
    main()
