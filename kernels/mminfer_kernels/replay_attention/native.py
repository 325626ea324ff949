"""Attention of rows that go by again in C++ (`csrc/cpu/attention.cpp`), group by group: one keeps all cores busy."""

from functools import partial

from mminfer_kernels.prompt_attention.native import prompt_attention_peak
from mminfer_kernels.replay_attention.reference import by_groups

replay_attention = partial(by_groups, prompt_attention_peak)
