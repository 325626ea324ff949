"""Answers that keep to a JSON schema, by llguidance."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import llguidance.hf
import llguidance.torch
from torch import Tensor
from transformers import LogitsProcessor

from mminfer.serving.errors import RequestError

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Grammars:
    """Makes logits processors of JSON schemas.

    Args:
        tokenizer: the model's.
        vocab_size: width of its logits.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)))

    def processor(self, schema: dict[str, Any]) -> SchemaProcessor:
        """Of one answer.

        Raises:
            RequestError: the schema is none, or asks for what cannot be held to.
        """
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
            matcher = llguidance.LLMatcher(self._tokenizer, grammar)
            failed = matcher.is_error()
        except Exception:  # the library raises anything
            failed = True
        if failed:
            raise RequestError(
                400, "response_format: the schema is not supported", param="response_format", code="invalid_schema"
            )
        return SchemaProcessor(matcher, self._vocab_size)


class SchemaProcessor(LogitsProcessor):
    """Leaves the tokens that go on with a text of the schema.

    Args:
        matcher: of the schema, at its beginning.
        vocab_size: width of the logits.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._begun = matcher, False
        self._mask = llguidance.torch.allocate_token_bitmask(1, vocab_size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._begun:
            self._matcher.consume_token(int(input_ids[0, -1]))
        self._begun = True
        if self._matcher.is_error():
            raise RequestError(500, "the answer left its schema", "server_error", code="schema_error")
        llguidance.torch.fill_next_token_bitmask(self._matcher, self._mask)
        masked = scores.clone()
        llguidance.torch.apply_token_bitmask_inplace(masked, self._mask.to(scores.device))
        return masked
