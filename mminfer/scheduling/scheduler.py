"""The scheduler: one thread that reads prompts in turn and decodes all answers together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Condition, Thread
from typing import Any, NamedTuple

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.native_build import prepare_kernels
from mminfer.models.adapter import ModelAdapter
from mminfer.models.structure import running_device
from mminfer.patching import StandIn
from mminfer.running import lock_of
from mminfer.scheduling.answer import Answer, AnswerRequest, HostRules
from mminfer.scheduling.batch import Batch, Kind, kind_of, pass_of, take_tokens
from mminfer.scheduling.prompt import Prompt, Prompting, read_pieces
from mminfer.scheduling.ticket import Busy, Cancelled, Closed, Limits, Ticket
from mminfer.scheduling.waiting import WaitingLine

MOST_HANDLES = 32  # passes with different settings that are kept between requests


class _Begun(NamedTuple):
    """A request whose prompt is being read."""

    ticket: Ticket
    prompting: Prompting


class Scheduler:
    """Answers many requests at a time on one model, by a thread of its own.

    Requests join and leave between decoding steps. Prompts are read one after the other, as they came; those of which
    only a little text is left go through together, between two pieces of a long one. Decoding steps go on meanwhile,
    between pieces and layers. What an answer is does not depend on the others: each draws from a seed of its own, and
    only those share a pass or a step whose rotary frequencies are the same.

    Other calls of the model, by engines or by patches, may come in between.

    Args:
        adapter: the host model.
        limits: what is taken on.
        compile: decode by the host's modules under torch.compile; see `mminfer.patch`.
        verify: whether to compare our pass with the host's own; see `mminfer.patch`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        limits: Limits | None = None,
        compile: bool = False,
        verify: bool = True,
    ) -> None:
        self._adapter, self.limits = adapter, limits or Limits()
        self._compile, self._verify = compile, verify
        self._lock = lock_of(adapter.model)
        self._changed = Condition()
        self._waiting = WaitingLine()
        self._alive: list[Ticket] = []  # all that wait, are read or answered
        self._reading: list[_Begun] = []
        self._batches: dict[Kind, Batch] = {}
        self._handles: dict[str, StandIn] = {}
        self._rules = HostRules(adapter)
        self._stepped_at = 0.0
        self._closing = False
        self._thread = Thread(target=self._work, name="mminfer-scheduler", daemon=True)
        self._process = os.getpid()
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests whose prompts nobody has begun to read."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return sum(len(batch.answers) for batch in list(self._batches.values()))

    def submit(self, prompt: Prompt, config: InferenceConfig, requests: Sequence[AnswerRequest]) -> Ticket:
        """Takes a request on; the listeners are told of its answers.

        Args:
            prompt: what is read, once for all answers.
            config: the techniques.
            requests: one for each answer.

        Raises:
            Busy: too many wait.
            Closed: the scheduler has ended.
            InputError: there are more answers than are decoded together.
            ConfigError: the settings do not fit the model.
        """
        if not 0 < len(requests) <= self.limits.running:
            raise InputError(f"{len(requests)} answers: wanted 1 to {self.limits.running}")
        config.check(self._adapter.spec)
        ticket = Ticket(prompt, config, requests)
        with self._changed:
            if self._closing or not self._thread.is_alive() or os.getpid() != self._process:
                raise Closed("the scheduler has ended: make another one")
            self._waiting.forget_cancelled()
            if len(self._waiting) >= self.limits.waiting:
                raise Busy(f"{len(self._waiting)} requests wait already: ask again later")
            self._waiting.add(ticket)
            self._alive.append(ticket)
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Ends within a step; whatever was not answered fails with `Closed`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _work(self) -> None:
        """What the thread does."""
        while True:
            with self._changed:
                while not (self._closing or self._alive):
                    self._changed.wait()
                if self._closing:
                    break
            try:
                with self._lock.turn():
                    self._turns()
            except Exception as error:  # of the model's lock, or a defect: nobody is left to wait for ever
                self._drop(error)
        self._drop(Closed("the scheduler has ended: make another one"))

    def _drop(self, error: BaseException) -> None:
        with self._changed:
            dropped, self._alive, self._reading, self._batches = self._alive, [], [], {}
            self._waiting.clear()
        for ticket in dropped:
            ticket.fail(error)

    def _turns(self) -> None:
        """As many as others can wait for, since taking the model costs about as much as a small step."""
        until = time.monotonic() + self.limits.gap_s
        self._turn()
        while self._alive and not self._closing and time.monotonic() < until:
            self._turn()

    def _turn(self) -> None:
        """Reads until the next step is due, then takes it."""
        while not self._closing and self._read_next():
            if self._step_is_due:
                break
        self._step()

    @property
    def _step_is_due(self) -> bool:
        return bool(self._batches) and time.monotonic() - self._stepped_at >= self.limits.gap_s

    def _read_next(self) -> bool:
        """Reads short rests together, then the next piece of a prompt that takes longer; gives whether there was any.

        A prompt is begun once its answers have room.
        """
        with self._changed:
            self._waiting.forget_cancelled()
            brief = self._waiting.brief(self._room)
        self._read([begun for ticket in brief for begun in self._begin(ticket)])
        if not self._reading:
            with self._changed:
                ticket = self._waiting.first(self._room)
            if ticket is None:
                return bool(brief)
            self._reading = self._begin(ticket)
        first, self._reading = self._reading[:1], self._reading[1:]
        self._read(first)
        return True

    @property
    def _room(self) -> int:
        """How many answers more may begin."""
        return self.limits.running - self.running - sum(len(begun.ticket.requests) for begun in self._reading)

    @contextmanager
    def _failing(self, ticket: Ticket) -> Iterator[None]:
        """What is raised within it, by media, templates, processors or the model, is this request's alone."""
        try:
            yield
        except Exception as error:
            ticket.fail(error)

    def _begin(self, ticket: Ticket) -> list[_Begun]:
        """The prompt with its first piece; nothing if that fails."""
        with self._failing(ticket):
            ticket.check()
            prepare_kernels(running_device(self._adapter.model.get_input_embeddings()))
            headroom = max(request.settings.headroom for request in ticket.requests)
            handle, most = self._handle(ticket.config), self.limits.prompt_tokens
            return [_Begun(ticket, Prompting(ticket.prompt, handle, headroom, most))]
        return []

    def _handle(self, config: InferenceConfig) -> StandIn:
        """The pass with these settings; those used last are kept."""
        key = config.to_json()
        handle = self._handles.pop(key, None) or StandIn(
            self._adapter.model, config, verify=self._verify, encoder_cache=self._adapter.encoder_cache
        )
        self._handles[key] = handle
        if len(self._handles) > MOST_HANDLES:
            del self._handles[next(iter(self._handles))]
        return handle

    def _read(self, begun: Sequence[_Begun]) -> None:
        """Takes a piece of each in, those that fit each other by one pass."""
        groups: dict[Any, list[_Begun]] = {}
        for one in begun:
            kind = pass_of(self._adapter, one.ticket.config, one.prompting)
            groups.setdefault(id(one) if kind is None else kind, []).append(one)
        for group in groups.values():
            self._read_pieces(group)

    def _read_pieces(self, group: Sequence[_Begun]) -> None:
        try:
            if any(one.prompting.piece is not None for one in group):
                size = chunk_size_for(group[0].ticket.config, self.limits.chunk_size)
                read_pieces([one.prompting for one in group], size, lambda: self._between_layers(group))
        except Exception as error:
            if len(group) == 1:
                group[0].ticket.fail(error)
            for one in group if len(group) > 1 else ():
                self._read_pieces([one])
            return
        for one in group:
            self._go_on(one)

    def _go_on(self, one: _Begun) -> None:
        """With the next piece, or with the answers."""
        with self._failing(one.ticket):
            one.ticket.check()
            if one.prompting.piece is not None:
                one.prompting.go_on()
            if one.prompting.piece is None:
                self._start_answers(one.ticket, one.prompting)
            else:
                self._reading.append(one)

    def _between_layers(self, group: Sequence[_Begun]) -> None:
        if all(one.ticket.is_cancelled for one in group):
            raise Cancelled("the request was cancelled")
        if self._closing:
            raise Closed("the scheduler has ended: make another one")
        if self._step_is_due:
            self._step()

    def _start_answers(self, ticket: Ticket, prompting: Prompting) -> None:
        """The first token of each answer; the others come by steps."""
        if prompting.logits is None:
            raise InputError("the prompt is empty: wanted text, an image or a video")
        ids, cache, row, logits = ticket.prompt.ids, prompting.cache, prompting.row, prompting.logits
        ticket.answers = [Answer(request, self._rules, ids) for request in ticket.requests]
        take_tokens(ticket.answers, logits.expand(len(ticket.answers), -1))
        if not self._batches:
            self._stepped_at = time.monotonic()
        for answer in ticket.answers:
            if answer.is_done:
                self._left(cache, row, answer)
                continue
            kind = kind_of(self._adapter, ticket.config, cache, answer)
            self._batch_of(kind).join(cache, row, answer)

    def _batch_of(self, kind: Kind) -> Batch:
        if kind not in self._batches:
            self._batches[kind] = Batch(self._adapter, kind.positions, self._compile)
        return self._batches[kind]

    def _left(self, cache: CompressedCache, row: int, answer: Answer) -> None:
        """An answer is done: whole, or failed."""
        if answer.failed:
            return
        try:
            answer.listener.end(cache, row)
        except Exception as error:
            with suppress(Exception):
                answer.listener.fail(error)

    def _step(self) -> None:
        """One more token of every answer."""
        for ticket in self._alive:
            if ticket.is_cancelled and ticket.answers:
                ticket.fail(Cancelled("the request was cancelled"))
        for kind, batch in list(self._batches.items()):
            try:
                batch.step(self._left)
            except Exception as error:  # out of memory, for instance; whoever shared the step has no next token
                for answer in batch.answers:
                    answer.fail(error)
            if not batch.answers:
                del self._batches[kind]
        with self._changed:
            self._alive = [ticket for ticket in self._alive if not ticket.is_over]
        self._stepped_at = time.monotonic()


def chunk_size_for(config: InferenceConfig, size: int | None) -> int | None:
    """Tokens of a prompt that go through the layers at a time: this many, or all where a technique needs them."""
    return None if any(technique.needs_whole_prompt for technique in config.techniques) else size
