"""Many mixed requests in one process: memory, threads and open files must stay as they are.

python -m tests.fuzz.soak --requests 1000
"""

import argparse
import contextlib
import ctypes
import gc
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

from mminfer import Engine, InferenceConfig, MminferError, nano, patched
from mminfer.streaming import _running
from tests.fuzz.content import Parts
from tests.fuzz.watching import CONFIGS, engine_of

WARM_UP = 60  # requests of which each kind has met each engine: buffers, kernels and tables are made
MOST_BYTES = 50_000  # a request; a leak of 100 kB breaks it
MANY = 500  # requests, behind which resident memory says something
PATIENCE_S = 5.0  # for threads of streams that were left
QUESTION = "What is the code of owl?"


class Sample(NamedTuple):
    """What the process holds behind so many requests.

    Args:
        requests: so far, the warm-up's not counted.
        rss_bytes: resident memory.
        tensor_bytes: of all tensors that are alive.
        threads: of the process, those of libraries too.
        handles: open files and sockets.
    """

    requests: int
    rss_bytes: int
    tensor_bytes: int
    threads: int
    handles: int


class Soak:
    """Requests of every kind in turn, each with the techniques whose turn it is.

    Args:
        folder: for files of chats.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._names = folder, sorted(CONFIGS)
        self._kinds: list[Callable[[Engine], object]] = [
            self._images, self._clip, self._chunks, self._batch, self._chat, self._saved_chat, self._left_stream,
            self._forgotten_stream, self._errors, self._threads, self._patched,
        ]  # fmt: skip

    def request(self, number: int) -> None:
        """The request of this number: 66 in a row are every kind with every technique."""
        engine = engine_of(self._names[number % len(self._names)])
        self._kinds[number % len(self._kinds)](engine)

    def _pictures(self, count: int, seed: int = 0) -> list[Any]:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return [{"type": "image", "image": Image.fromarray(one)} for one in pixels]

    def _images(self, engine: Engine) -> object:
        return engine.generate(nano.sample_messages(), 3)

    def _clip(self, engine: Engine) -> object:
        clip = {"type": "video", "video": str(nano.samples_path() / "clip.mp4")}
        return engine.generate([{"role": "user", "content": [clip, QUESTION]}], 2, num_frames=4)

    def _chunks(self, engine: Engine) -> object:
        content = Parts([*self._pictures(3), QUESTION])
        return engine.generate([{"role": "user", "content": content}], 2, prefill_chunk_size=80)

    def _batch(self, engine: Engine) -> object:
        return engine.generate([nano.sample_messages(), QUESTION], 3, num_beams=2)

    def _chat(self, engine: Engine) -> object:
        chat = engine.chat(max_new_tokens=2, system="Be brief.")
        chat.read(self._pictures(2))
        return [chat.fork().send(QUESTION), chat.send("And now?")]

    def _saved_chat(self, engine: Engine) -> object:
        chat = engine.chat(max_new_tokens=2)
        chat.send([*self._pictures(1), QUESTION])
        chat.save(self._folder / "chat")
        return engine.load_chat(self._folder / "chat").send("And now?", 2)

    def _left_stream(self, engine: Engine) -> None:
        for _ in engine.stream(QUESTION, 400, min_new_tokens=400):
            break

    def _forgotten_stream(self, engine: Engine) -> None:
        next(engine.stream(Parts([*self._pictures(1), QUESTION]), 400, min_new_tokens=400, prefill_chunk_size=80))

    def _errors(self, engine: Engine) -> None:
        """Before a pass, within the reading of a prompt, and while a chat is loaded."""
        broken = Parts([*self._pictures(3), QUESTION], breaks=True)
        (self._folder / "no chat").write_bytes(b"x" * 100)
        for act in (
            lambda: engine.generate([{"type": "image", "image": b"x"}, QUESTION]),
            lambda: engine.generate(QUESTION, 2, temperature="hot"),
            lambda: engine.chat(prefill_chunk_size=80).read(broken),
            lambda: engine.stream([{"role": "user", "content": broken}], prefill_chunk_size=80).__next__(),
            lambda: engine.load_chat(self._folder / "no chat"),
        ):
            try:
                act()
            except MminferError:
                continue
            raise AssertionError("a wrong request was answered")

    def _threads(self, engine: Engine) -> None:
        threads = [threading.Thread(target=self._images, args=(engine,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _patched(self, engine: Engine) -> object:
        inputs = engine.prepare([nano.sample_messages()])
        with patched(engine.model, InferenceConfig.from_preset("balanced")):
            return engine.model.generate(**inputs, max_new_tokens=2)


def measure(requests: int) -> Sample:
    """What the process holds once threads of streams that were left have ended, and what nobody holds is given back."""
    process, until = psutil.Process(), time.monotonic() + PATIENCE_S
    while any(thread.is_alive() for thread in list(_running)) and time.monotonic() < until:
        time.sleep(0.01)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    handles = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return Sample(requests, process.memory_info().rss, _tensor_bytes(), process.num_threads(), handles)


def _tensor_bytes() -> int:
    """Of all storages that tensors of this process, whose numbers lie in memory, stand on."""
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = [x.untyped_storage() for x in tensors if x.layout is torch.strided and x.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def soak(requests: int, every: int) -> list[Sample]:
    """Samples behind the warm-up and behind each so many requests.

    Args:
        requests: to ask for, the warm-up's not counted.
        every: requests between two samples.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = Soak(Path(folder))
        for number in range(WARM_UP):
            kinds.request(number)
        samples = [measure(0)]
        for number in range(requests):
            kinds.request(WARM_UP + number)
            if (number + 1) % every == 0:
                samples.append(measure(number + 1))
    return samples


def growth(samples: Sequence[Sample], of: str = "rss_bytes") -> float:
    """Bytes that a request leaves behind: the median slope between any two samples.

    Args:
        samples: in order.
        of: which bytes.
    """
    slopes = [
        (getattr(b, of) - getattr(a, of)) / (b.requests - a.requests)
        for i, a in enumerate(samples)
        for b in samples[i + 1 :]
    ]
    return float(np.median(slopes))


def check_flat(samples: Sequence[Sample]) -> None:
    """Raises `AssertionError` if memory, threads or open files grow.

    Resident memory comes and goes by megabytes, which only many requests tell from a leak; tensors are counted exactly.
    """
    for of in ("tensor_bytes", "rss_bytes") if samples[-1].requests >= MANY else ("tensor_bytes",):
        grown = growth(samples, of)
        assert grown < MOST_BYTES, f"{of}: {grown:,.0f} bytes a request are left behind: {samples}"
    middle = samples[len(samples) // 2]
    for name in ("threads", "handles"):
        found = [getattr(sample, name) for sample in (middle, samples[-1])]
        assert found[1] <= found[0], f"{name} grow from {found[0]} to {found[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    began = time.perf_counter()
    samples = soak(arguments.requests, max(1, arguments.requests // 40))
    for sample in (samples[0], samples[len(samples) // 2], samples[-1]):
        mib = sample.rss_bytes / 2**20
        print(f"{sample.requests} requests: {mib:.1f} MiB, {sample.threads} threads, {sample.handles} handles")
    print(f"{growth(samples):,.0f} bytes a request; {time.perf_counter() - began:.0f} s", flush=True)
    check_flat(samples)


if __name__ == "__main__":
    main()
