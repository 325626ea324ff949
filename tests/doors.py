"""The same request through both doors: the engine's runner, and the patched model's own `generate`."""

from types import SimpleNamespace

from mminfer import Engine, InferenceConfig, patched
from mminfer.output import GenerationOutput


def same_by_both_doors(model, inputs, config: InferenceConfig, max_new_tokens: int) -> list[GenerationOutput]:
    """What the runner answers, greedily, once the patched model has said the same tokens."""
    decoder = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
    runner = Engine(model, SimpleNamespace(tokenizer=decoder), config).runner
    outputs = runner.run(inputs, 0.0, runner.settings({"max_new_tokens": max_new_tokens}))
    with patched(model, config):
        whole = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    tokens = whole[:, inputs["input_ids"].shape[1] :]
    assert [out.token_ids for out in outputs] == [
        row.tolist()[: len(out.token_ids)] for row, out in zip(tokens, outputs, strict=True)
    ]
    return outputs
