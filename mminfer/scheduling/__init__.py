"""Many requests at a time on one model: they join and leave between decoding steps, and prompts are read meanwhile."""

from mminfer.scheduling.answer import Answer, AnswerRequest, Listener
from mminfer.scheduling.prompt import Prompt, WholePrompt
from mminfer.scheduling.scheduler import Scheduler
from mminfer.scheduling.ticket import Busy, Cancelled, Closed, Limits, Ticket

__all__ = [
    "Answer",
    "AnswerRequest",
    "Busy",
    "Cancelled",
    "Closed",
    "Limits",
    "Listener",
    "Prompt",
    "Scheduler",
    "Ticket",
    "WholePrompt",
]
