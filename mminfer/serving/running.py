"""A server from its settings to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from mminfer.engine import Engine
from mminfer.scheduling import Limits, Scheduler
from mminfer.serving.app import make_app
from mminfer.serving.connections import WatchedConnection
from mminfer.serving.disk import DiskStore
from mminfer.serving.limits import ServerSettings
from mminfer.serving.prefixes import PrefixStore
from mminfer.serving.service import Service

MOST_CONNECTIONS = 1024
MOST_HEADER_BYTES = 32 * 2**10
GRACE_S = 5  # for answers under way, once the server is told to end


@contextmanager
def app_of(
    engine: Engine, server: ServerSettings, limits: Limits, store_bytes: int, disk: DiskStore | None = None
) -> Iterator[FastAPI]:
    """The app of an engine's model, whose scheduler ends with the `with` block.

    Args:
        engine: the model and its processor.
        server: what the operator allows.
        limits: of the scheduler.
        store_bytes: of prompts that are kept; 0: none.
        disk: where they are kept, too; it is closed at the end.
    """
    with closing(disk) if disk is not None else nullcontext(), Scheduler(engine.adapter, limits) as scheduler:
        yield make_app(Service(engine, scheduler, server, PrefixStore(store_bytes), disk))


def run_server(
    engine: Engine,
    server: ServerSettings,
    limits: Limits,
    store_bytes: int,
    address: tuple[str, int],
    disk: DiskStore | None = None,
) -> None:
    """Serves until it is interrupted; arguments as of `app_of`, and host and port."""
    with app_of(engine, server, limits, store_bytes, disk) as app:
        uvicorn.run(
            app,
            host=address[0],
            port=address[1],
            log_level="warning",
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            http=WatchedConnection,
            ws="none",
            timeout_graceful_shutdown=GRACE_S,
        )


def model_id_of(name: str) -> str:
    """By which requests name a model: its name, but of a folder the last part alone."""
    return Path(name).resolve().name if Path(name).is_dir() else name
