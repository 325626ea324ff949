"""What Prometheus may ask of a server."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mminfer.scheduling import Scheduler
from mminfer.serving.budget import Budget
from mminfer.serving.prefixes import PrefixStore

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Figures:
    """The figures of one server.

    Args:
        scheduler: whose queue is told.
        store: whose bytes are told.
        budget: likewise, of what requests hold.
    """

    def __init__(self, scheduler: Scheduler, store: PrefixStore, budget: Budget) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("mminfer_requests", "Requests for answers by status.", ["status"], registry=registry)
        self._tokens = Counter("mminfer_tokens", "Tokens by kind.", ["kind"], registry=registry)
        self._ttft = Histogram("mminfer_ttft_seconds", "Time to the first token.", buckets=_SECONDS, registry=registry)
        self._tpot = Histogram("mminfer_tpot_seconds", "Time of each later token.", buckets=_SECONDS, registry=registry)
        gauges = {
            "waiting": ("Requests that wait for their prompt to be read.", lambda: scheduler.waiting),
            "running": ("Answers that are being decoded.", lambda: scheduler.running),
            "store_bytes": ("Bytes of the prompts that are kept.", lambda: store.nbytes),
            "held_bytes": ("Bytes of bodies and decoded images of requests under way.", lambda: budget.nbytes),
            "store_entries": ("Prompts that are kept.", lambda: len(store)),
        }
        for name, (told, ask) in gauges.items():
            Gauge(f"mminfer_{name}", told, registry=registry).set_function(ask)

    def note(self, status: int) -> None:
        """A request ended with this status."""
        self._requests.labels(str(status)).inc()

    def note_usage(self, usage: dict[str, Any]) -> None:
        """What an answered request took."""
        own = usage["mminfer"]
        kinds = {
            "prompt": usage["prompt_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            "generated": usage["completion_tokens"],
        }
        for kind, count in kinds.items():
            self._tokens.labels(kind).inc(count)
        self._ttft.observe(own["ttft_ms"] / 1e3)
        if own["tpot_ms"] is not None:
            self._tpot.observe(own["tpot_ms"] / 1e3)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)
