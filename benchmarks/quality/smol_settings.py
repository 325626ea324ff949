"""Which settings the yardstick compares: whatever presets and sweeps the registry knows, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from benchmarks.quality.lot import DropByLot
from benchmarks.quality.settings import GROUPS
from mminfer import AIMMerge, InferenceConfig, LayerRange, OperatorSkip, RegionMerge
from mminfer.bench.sweeps import Sweep, cache_sweeps, token_sweeps
from mminfer.config import PRESETS
from mminfer.errors import InputError, shown
from mminfer.tokens.downsample import Downsample

BUDGETS = (50, 30, 20, 10)  # percent of all entries
PRESETS_OF_ALL = "presets"  # `--rules presets`: every preset that can do something to a book
COLLECTIONS: dict[str, tuple[str, ...]] = {  # `--rules papers`: what papers set, and what stands beside it
    "papers": (
        *("AIM merge", "AIM prune", "AIM", "AIM merge, random prune", "random prune", "FastV"),
        *("skip FFN", "skip attention", "v2pe-4", "v2pe-16", "LOOK-M pivot", "LOOK-M average", "lookm-5"),
        *("down-sampling", "regions"),
    ),
}

# `--rules regions`: the preset, and what else leaves as many tokens of the yardstick's pages.
REGIONS: dict[str, InferenceConfig] = {
    "regions": InferenceConfig.from_preset("regions"),
    "regions, 70 %": InferenceConfig(merge=RegionMerge(threshold=None, largest=None, ratio=45 / 64)),
    "AIM merge, 70 %": InferenceConfig(merge=AIMMerge(45 / 64)),
    "down-sampling, 77 %": InferenceConfig(merge=Downsample(49 / 64)),
    "down-sampling, 66 %": InferenceConfig(merge=Downsample(42 / 64)),
    "lot, 70 %": InferenceConfig(merge=DropByLot(45 / 64)),
}


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
    for sweep in (*cache_sweeps(), *token_sweeps(), *skip_sweeps()):
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


def skip_sweeps() -> tuple[Sweep, ...]:
    """Which layers spare pictures an operator: the preset's, and layers where papers find them to matter less."""
    layers: dict[str, LayerRange] = {
        "of every other layer": LayerRange(start=0.125, interval=2),
        "of the upper half": LayerRange(start=0.5),
        "of the last quarter": LayerRange(start=0.75),
    }
    ffn = {step: InferenceConfig(skip=OperatorSkip(ffn=own)) for step, own in layers.items()}
    attention = {step: InferenceConfig(skip=OperatorSkip(attention=own)) for step, own in layers.items()}
    return Sweep("skip FFN", ffn, False), Sweep("skip attention", attention, False)


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
        rules: names of rules, groups, collections, presets or single settings, upper or lower case.
        budgets: percent, of rules that have some.

    Raises:
        InputError: nothing goes by such a name.
    """
    known = known_settings(budgets)
    if rules is None:
        return list(_by_config(known).values())
    chosen: dict[str, Setting] = {}
    for rule in rules:
        if rule.lower() == "regions":
            own = {name: known.get(name, Setting(name, "regions", "", config)) for name, config in REGIONS.items()}
        elif rule.lower() == PRESETS_OF_ALL:
            own = {setting.name: setting for setting in preset_settings().values()}
        elif rule.lower() in COLLECTIONS:
            every = {n: s for name in COLLECTIONS[rule.lower()] for n, s in _named(name, known).items()}
            own = {setting.name: setting for setting in _by_config(every).values()}
        else:
            own = _named(rule, known)
        chosen |= own
    return list(chosen.values())


def _named(rule: str, known: Mapping[str, Setting]) -> dict[str, Setting]:
    of_rule = {n: s for n, s in known.items() if rule.lower() == s.rule.lower()}
    own = of_rule or {n: s for n, s in known.items() if rule.lower() == n.lower()}
    if not own:
        names = dict.fromkeys([*(setting.rule for setting in known.values()), PRESETS_OF_ALL, *COLLECTIONS])
        raise InputError(f"--rules {shown(rule)}: wanted some of {', '.join(names)}, or a setting such as 'H2O 20 %'")
    return own


def preset_settings() -> dict[str, Setting]:
    """The setting that each preset is, by the preset's name: what has a name among the sweeps goes by that one.

    Those are left out that a book is too short for: budgets in entries, and what is set by the length of the prompt.
    """
    known = _by_config(known_settings())
    return {name: known[config] for name, config in PRESETS.items() if config.techniques and not _is_idle(config)}


def _is_idle(config: InferenceConfig) -> bool:
    return any(own.needs_whole_prompt or getattr(own, "budget", None) is not None for own in config.techniques)


def _by_config(known: Mapping[str, Setting]) -> dict[InferenceConfig, Setting]:
    """Each config once, under its first name."""
    found: dict[InferenceConfig, Setting] = {}
    for setting in known.values():
        found.setdefault(setting.config, setting)
    return found
