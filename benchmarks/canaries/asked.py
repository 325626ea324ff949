"""What settings come to on the bundled model: a context of three pictures with a question, read in pieces.

The cache is compressed behind every piece but for settings that want the whole prompt, and the tokens of the answer are
given, so that no choice of one moves those behind it.
"""

import random
from functools import cache
from typing import Any

from benchmarks.canaries.outcome import KERNELS, Outcome
from mminfer import Engine, InferenceConfig
from mminfer.bench.fidelity import forced, logits_of
from mminfer.errors import ConfigError, MminferError
from mminfer.nano import data
from mminfer.output import GenerationOutput

PICTURES, FACTS, PIECE = 3, 2, 128
SEED = 7  # with which no choice is so near that AVX-512, AVX2 and the references in PyTorch make it otherwise
ANSWER = (1168, 773, 837)  # token ids, as good as any
SHOWN = slice(0, None, 150)  # of the vocabulary, whose logits are kept


@cache
def plain() -> Engine:
    """The bundled model."""
    return Engine.from_pretrained("nano")


@cache
def _context() -> tuple[list[dict[str, Any]], str]:
    context = data.sample_context(random.Random(SEED), PICTURES, FACTS)
    return data.to_content(context, data.draw_images(context, "test", SEED)), context.questions[0].text


@cache
def asked(config: InferenceConfig) -> Outcome:
    """What a setting does to the prompt and its cache, and what the model then foretells."""
    try:
        output = _answer(Engine(plain().model, plain().processor, config))
    except MminferError as error:
        return {"refused": type(error).__name__}
    stats = output.stats
    return {
        KERNELS: "native" if "native" in stats.backends.values() else "reference",
        "tokens": stats.prompt_tokens,
        "flops": float(stats.prompt_flops),
        "entries": [float(sum(heads)) for heads in stats.head_entries],
        "bytes": float(stats.cache_bytes),
        "logits": [[round(x, 3) for x in row[SHOWN].tolist()] for row in logits_of(output)],
    }


def worked(config: InferenceConfig) -> Outcome:
    """The work alone: what times follow from."""
    found = asked(config)
    return {name: value for name, value in found.items() if name != "logits"}


def _answer(engine: Engine) -> GenerationOutput:
    content, question = _context()

    def ask(text: str, **kwargs: Any) -> GenerationOutput:
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        try:
            return engine.generate(chat, prefill_chunk_size=PIECE, **kwargs)
        except ConfigError:  # wants the whole prompt
            return engine.generate(chat, **kwargs)

    return forced(ask, question, list(ANSWER))
