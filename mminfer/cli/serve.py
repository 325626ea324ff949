"""The command line: mminfer serve."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from mminfer.cli import options
from mminfer.cli.console import ERR, reports_errors
from mminfer.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@reports_errors
def serve(
    model: options.Model = "nano",
    preset: Annotated[
        str, typer.Option(help="Apply this preset where a request names none; 'mminfer doctor' lists all presets.")
    ] = "off",
    allow_preset: Annotated[
        list[str] | None, typer.Option(help="Let requests choose this preset, too; repeat the option for more.")
    ] = None,
    host: Annotated[str, typer.Option(help="Listen at this address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Listen at this port.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MMINFER_API_KEY", help="Answer only those who bring this key; needed for other hosts."),
    ] = None,
    allow_remote_domain: Annotated[
        list[str] | None,
        typer.Option(help="Fetch images by http(s) from this domain; repeat the option for more."),
    ] = None,
    running: Annotated[int, typer.Option(min=1, max=1024, help="Decode this many answers together at most.")] = 16,
    waiting: Annotated[int, typer.Option(min=1, max=10**6, help="Let this many requests wait at most.")] = 64,
    store_mib: Annotated[
        int, typer.Option(min=0, max=2**31, help="Keep prompts that were read, in this much memory at most.")
    ] = 1024,
    encoder_cache_mib: Annotated[
        int, typer.Option(min=0, max=2**31, help="Keep encoded pictures, in this much memory at most.")
    ] = 256,
    disk_dir: Annotated[
        Path | None, typer.Option(help="Keep them in this folder, too, for servers to come; it is theirs alone.")
    ] = None,
    disk_mib: Annotated[int, typer.Option(min=1, max=2**31, help="Of that folder at most.")] = 16_384,
    max_new_tokens: options.MaxNewTokens = 1024,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, max=options.MOST_TOKENS, help="Refuse prompts of more tokens than these.")
    ] = 131_072,
    max_images: Annotated[int, typer.Option(min=0, max=options.MOST_PICTURES, help="Images of one request.")] = 64,
    max_body_mib: Annotated[int, typer.Option(min=1, max=2**20, help="Of the body of one request.")] = 64,
    max_held_mib: Annotated[
        int, typer.Option(min=1, max=2**31, help="Bodies and decoded images of all requests together.")
    ] = 2048,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    prefill_chunk_size: Annotated[
        int, typer.Option(min=1, max=options.MOST_TOKENS, help="Send this many tokens of a prompt through at a time.")
    ] = 1024,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Answer chat completions over HTTP, as OpenAI's API has them, many at a time."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"mminfer serve needs {', '.join(missing)}: pip install 'mminfer[serve]'")
    if host not in LOOPBACK and not api_key:
        raise InputError(f"--host {host}: others than this machine may ask there: pass --api-key, or 127.0.0.1")
    from mminfer.config import InferenceConfig

    settings = {name: InferenceConfig.from_preset(name) for name in (preset, *(allow_preset or []))}
    from mminfer.engine import Engine
    from mminfer.scheduling import Limits
    from mminfer.serving.disk import DiskStore
    from mminfer.serving.limits import ServerLimits, ServerSettings
    from mminfer.serving.running import model_id_of, run_server

    room = encoder_cache_mib * 2**20
    engine = Engine.from_pretrained(model, settings[preset], device, dtype, encoder_cache_bytes=room)
    for config in settings.values():
        config.check(engine.adapter.spec)
    of_requests = ServerLimits(
        max_body_mib * 2**20,
        max_images,
        new_tokens=max_new_tokens,
        request_s=timeout,
        held_bytes=max_held_mib * 2**20,
        text_tokens=max_prompt_tokens,
    )
    server = ServerSettings(
        model_id_of(model),
        settings,
        of_requests,
        api_key or None,
        frozenset(domain.lower() for domain in allow_remote_domain or []),
    )
    limits = Limits(running, waiting, prefill_chunk_size, max_prompt_tokens)
    ERR.print(f"{server.model_id} at http://{host}:{port}/v1", markup=False, highlight=False)
    disk = None if disk_dir is None else DiskStore(disk_dir, disk_mib * 2**20)
    run_server(engine, server, limits, store_mib * 2**20, (host, port), *([] if disk is None else [disk]))
