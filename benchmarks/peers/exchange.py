"""What every comparison with a peer shares: its environment and process, the prompts, the scores, the rows."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.workers.wire import Prompt
from benchmarks.quality.needle import contexts
from mminfer.metrics.fidelity import kl_divergence
from mminfer.nano import build
from training.nano.evaluate import TASKS, chat_inputs

WORKERS = Path(__file__).parent / "workers"
KEY = ("against", "model", "measure", "system", "setting", "images", "protocol")  # what tells rows apart
COLUMNS = (
    *KEY, "versions", "tokens", "questions", "seed", "accuracy", *TASKS, "kl", "entries",
    "cache_kept", "attended", "full_right", "stayed", "kept", "kept_low", "kept_high", "compress", "logits_differ",
    "read_ms", "ttft_ms", "p20_ms", "median_ms", "p80_ms", "turns", "note", "status",
)  # fmt: skip
MEASURED = "measured"


class PeerError(Exception):
    """A peer cannot do its part; the message says which part and why, and is its row's status."""


def row(**figures: Any) -> dict[str, Any]:
    """A row of the results: what it does not have is empty.

    Raises:
        ValueError: a figure has no column.
    """
    unknown = set(figures) - set(COLUMNS)
    if unknown:
        raise ValueError(f"no column for {', '.join(sorted(unknown))}: add it to COLUMNS")
    return {**dict.fromkeys(COLUMNS, ""), **figures}


def peer_python(folder: Path, packages: Sequence[str], install: bool) -> Path:
    """The Python of a peer's own environment.

    Args:
        folder: of the environment.
        packages: what pip installs there.
        install: make the environment, or complete it.

    Raises:
        PeerError: it is not there, or cannot be made.
    """
    python = folder / "bin" / "python"
    commands = [[sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", *packages]]
    for command in commands if install else []:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise PeerError(f"not installed: {' '.join(command)}: {_last_line(run.stderr)}")
    if not python.exists():
        by_hand = f"python3 -m venv {folder} && {' '.join(commands[1])}"
        raise PeerError(f"not installed: --install makes its environment, or: {by_hand}")
    return python


class Worker:
    """A peer's process, which waits while it is not asked, so that its turns and ours can alternate.

    Args:
        python: of the peer's environment.
        script: the worker's file.
        threads: of the libraries it loads.
    """

    def __init__(self, python: Path, script: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)  # the peer's environment is its own
        self._stack = ExitStack()
        self._log = self._stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115, the stack closes it
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        command = [str(python), str(script)]
        self._process = self._stack.enter_context(subprocess.Popen(command, env=environment, text=True, **streams))

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What the worker replies to a command.

        Raises:
            PeerError: it raised, or died.
        """
        try:
            print(json.dumps({"command": command, **arguments}), file=self._process.stdin, flush=True)
            text = self._process.stdout.readline()
        except BrokenPipeError:
            text = ""
        reply: dict[str, Any] = json.loads(text) if text else {"error": self._end()}
        if "error" in reply:
            raise PeerError(f"{command}: {reply['error']}")
        return reply

    def _end(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        return f"ended with {code}: {_last_line(self._log.read())}"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(BrokenPipeError):  # of one that has died with a command in its pipe
            self._stack.close()  # there are no more commands, so the process ends


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def sample_prompts(processor: Any, num_images: int, questions: int, seed: int) -> list[Prompt]:
    """Contexts over pictures of unseen handwriting, until there are so many questions."""
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(build.END)
    prompts = []
    for content, asked in contexts(num_images, questions, seed):
        inputs = chat_inputs(processor, content, generation_prompt=False)
        prompts.append(
            Prompt(
                input_ids=inputs["input_ids"][0, :-1].tolist(),  # without the end of the turn: the question follows
                pixel_values=inputs["pixel_values"],
                questions=[tokenizer(q.text + build.END + build.ASSISTANT).input_ids for q in asked],
                answers=[[*tokenizer(q.answer).input_ids, end] for q in asked],
                kinds=[q.task for q in asked],
            )
        )
    return prompts


def score(prompts: Sequence[Prompt], logits: Sequence[Tensor], full: Sequence[Tensor]) -> dict[str, Any]:
    """Accuracy and the divergence of the first token, by the same rule for everybody.

    An answer is right if each of its tokens, the end of the turn included, is the likeliest where those before it
    stand: then greedy decoding gives it and nothing else.

    Args:
        prompts: what was asked.
        logits: [questions, answer tokens, vocabulary] of each prompt.
        full: the same of the whole cache.
    """
    right = torch.cat([(x.argmax(-1) == torch.tensor(p.answers)).all(-1) for x, p in zip(logits, prompts, strict=True)])
    divergence = torch.cat([kl_divergence(f[:, 0], x[:, 0]) for f, x in zip(full, logits, strict=True)])
    kinds = [kind for p in prompts for kind in p.kinds]
    figures: dict[str, Any] = {"questions": len(kinds), "accuracy": _percent(right)}
    for task, of_task in TASKS.items():
        figures[task] = _percent(right[torch.tensor([kind in of_task for kind in kinds])])
    figures["kl"] = round(divergence.mean().item(), 4)
    return figures


def _percent(hits: Tensor) -> float:
    return round(100 * hits.float().mean().item(), 1)
