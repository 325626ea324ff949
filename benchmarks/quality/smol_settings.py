"""Which settings the yardstick compares: whatever presets and sweeps the registry knows, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from benchmarks.quality.settings import GROUPS
from mminfer import InferenceConfig
from mminfer.bench.sweeps import Sweep, cache_sweeps, token_sweeps
from mminfer.config import PRESETS
from mminfer.errors import InputError, shown

BUDGETS = (50, 30, 20, 10)  # percent of all entries


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    Args:
        name: as among the rows of `needle`, so that both stand beside each other.
        rule: what it belongs to: a sweep, a preset, or a group of `benchmarks.quality.settings`.
        budget: of the sweep's step, such as "50 %"; "": the rule has none.
        config: the techniques.
    """

    name: str
    rule: str
    budget: str
    config: InferenceConfig


def known_settings(budgets: Sequence[int] = BUDGETS) -> dict[str, Setting]:
    """All settings by name; of rules that evict, the budgets asked for."""
    wanted = [f"{budget} %" for budget in budgets]
    found: dict[str, Setting] = {}
    for sweep in (*cache_sweeps(), *token_sweeps()):
        between = _steps(sweep, budgets) if sweep in cache_sweeps() else {}
        for step, config in (between | sweep.steps).items():
            name = f"{sweep.rule} {step}".strip()
            found[name] = Setting(name, sweep.rule, step, config)
    for group, settings in GROUPS.items():
        own = {name: Setting(name, f"{group} group", "", config) for name, config in settings.items()}
        found |= {name: setting for name, setting in own.items() if name not in found}
    found |= {name: Setting(name, name, "", config) for name, config in PRESETS.items() if name != "off"}
    evicting = {sweep.rule for sweep in cache_sweeps()}
    return {n: s for n, s in found.items() if s.rule not in evicting or not s.budget or s.budget in wanted}


def _steps(sweep: Sweep, budgets: Sequence[int]) -> dict[str, InferenceConfig]:
    """A rule at budgets of which its sweep has no step, if settings that differ from step to step follow the budget."""
    shares = {step: step.removesuffix(" %") for step in sweep.steps}
    known: dict[int, Any] = {int(s): sweep.steps[step].cache for step, s in shares.items() if s.isdigit()}
    if len(known) < 2:
        return {}
    (first, one), (second, other), *_ = known.items()
    varying = [name for name, value in vars(one).items() if value != vars(other)[name]]
    rates = {name: vars(one)[name] / first for name in varying if isinstance(vars(one)[name], float)}
    if len(rates) < len(varying) or any(not isclose(vars(other)[n], rate * second) for n, rate in rates.items()):
        return {}
    made = {b: {name: rate * b for name, rate in rates.items()} for b in budgets}
    return {f"{b} %": InferenceConfig(cache=replace(one, **own)) for b, own in made.items()}


def chosen_settings(rules: Sequence[str] | None, budgets: Sequence[int]) -> list[Setting]:
    """The settings of these rules; None: all, each config once.

    Args:
        rules: names of rules, groups, presets or single settings, upper or lower case.
        budgets: percent, of rules that have some.

    Raises:
        InputError: nothing goes by such a name.
    """
    known = known_settings(budgets)
    if rules is None:
        return list({setting.config: setting for setting in reversed(known.values())}.values())[::-1]
    chosen: dict[str, Setting] = {}
    for rule in rules:
        of_rule = {n: s for n, s in known.items() if rule.lower() == s.rule.lower()}
        own = of_rule or {n: s for n, s in known.items() if rule.lower() == n.lower()}
        if not own:
            names = dict.fromkeys(setting.rule for setting in known.values())
            raise InputError(
                f"--rules {shown(rule)}: wanted some of {', '.join(names)}, or a setting such as 'H2O 20 %'"
            )
        chosen |= own
    return list(chosen.values())
