"""A processor for the tiny models, which have none: its tokenizer names ids."""

from types import SimpleNamespace

from mminfer.inspection.collecting import inspect_inputs
from tests.tiny import tiny_inputs, tiny_model


class Names:
    """Decodes id 12 as " w12"."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f" w{i}" for i in ids)

    def convert_ids_to_tokens(self, token):
        return f"w{token}"


PROCESSOR = SimpleNamespace(tokenizer=Names())


def inspect_tiny(family, config, prompt, **kwargs):
    """The inspection of one prompt of a tiny model."""
    return inspect_inputs(tiny_model(family), PROCESSOR, config, tiny_inputs(family, [prompt]), 3, **kwargs)
