"""Which canaries the rows of each file have: by setting, and of what they were asked about."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.canaries import counted
from benchmarks.canaries.asked import asked, worked
from benchmarks.canaries.outcome import Outcome
from benchmarks.models import answers, long_context, merge_stage, prompt_pass, replay_cost, tower, turns
from benchmarks.peers import kvpress, openvino, replay
from benchmarks.quality import film, length, streamed
from benchmarks.quality.settings import GROUPS, OFF
from benchmarks.quality.smol_settings import BUDGETS, REGIONS, known_settings
from benchmarks.serving import load
from mminfer import InferenceConfig
from mminfer.technique import CACHE_SHARES

Row = Mapping[str, str]
Configs = Mapping[str, InferenceConfig]
IMAGES, TOKENS = 1024, 231  # where positions leave the window; of the context that is asked about


@dataclass(frozen=True)
class Canaries:
    """Those of one file.

    Args:
        of: the canary of a row, by name; "": it has none, since nothing in it is ours.
        run: what canaries of these names come to now; a name that nothing goes by any more is left out.
        data: of all rows, by name.
    """

    of: Callable[[Row], str]
    run: Callable[[Iterable[str]], dict[str, Outcome]]
    data: Mapping[str, Callable[[], Outcome]] = field(default_factory=dict)

    def names(self, rows: Iterable[Row]) -> dict[str, set[str]]:
        """The commits of the rows of each canary, by its name."""
        found: dict[str, set[str]] = {}
        for row in rows:
            for name in (self.of(row), *self.data):
                if name:
                    found.setdefault(name, set()).add(row["commit"])
        return found

    def outcomes(self, names: Iterable[str]) -> dict[str, Outcome]:
        """What these come to now."""
        wanted = list(names)
        found = {name: run() for name, run in self.data.items() if name in wanted}
        return found | self.run(name for name in wanted if name not in self.data)


def canaries_of(file: str) -> Canaries:
    """Those of a file of rows.

    Raises:
        KeyError: it has none.
    """
    return FILES[file]()


def _setting(row: Row) -> str:
    return row["setting"]


def _ours(row: Row) -> str:
    """The setting, unless it is the host."""
    setting = row.get("setting", "off")  # the only one, in rows of before there was the column
    return "" if setting.startswith("host") else setting


def _by_setting(
    configs: Configs,
    run: Callable[[InferenceConfig], Outcome] = asked,
    of: Callable[[Row], str] = _setting,
    data: Mapping[str, Callable[[], Outcome]] | None = None,
) -> Canaries:
    return Canaries(of, counted.one_by_one(lambda name: run(configs[name]), configs), data or {})


def _needle() -> Canaries:
    configs = OFF | {name: config for settings in GROUPS.values() for name, config in settings.items()}
    return _by_setting(configs, data={"contexts and questions": counted.needle_data})


def _smol() -> Canaries:
    known = known_settings((*BUDGETS, *CACHE_SHARES))
    configs = OFF | REGIONS | {name: setting.config for name, setting in known.items()}
    return _by_setting(configs, data={"the reader": counted.reader_data})


def _length() -> Canaries:
    window = counted.plain().adapter.spec.max_position_embeddings
    pairs = [(name, cache) for name in length.POSITIONS for cache in length.CACHES]
    configs = {", ".join(pair): length.config_of(*pair, IMAGES, window) for pair in pairs}
    data = {"contexts and questions": counted.label_data}
    return _by_setting(configs, of=lambda row: f"{row['positions']}, {row['cache']}", data=data)


def _streamed() -> Canaries:
    configs = {str(share): streamed.config_of(share) for share in (1.0, *streamed.SHARES)}
    return _by_setting(configs, of=lambda row: row["share"], data={"contexts and questions": counted.label_data})


def _scores() -> Canaries:
    names = [f"{budget}, {text_prior}" for budget in (0.2, 0.5) for text_prior in (True, False)]
    return Canaries(lambda row: f"{row['budget']}, {row['text_prior']}", counted.one_by_one(counted.overlap, names))


def _presets(names: Iterable[str]) -> Canaries:
    return _by_setting({name: InferenceConfig.from_preset(name) for name in names}, worked, _ours)


def _serving() -> Canaries:
    configs = {name: InferenceConfig.from_preset(name) for name in load.PRESETS}
    return _by_setting(
        configs, worked, lambda row: {load.HOST: "", load.ONE_BY_ONE: "off"}.get(row["setting"], row["setting"])
    )


def _long_context() -> Canaries:
    configs = {model: long_context.config_of(model) for model in long_context.SETTINGS}
    return _by_setting(configs, worked, lambda row: row["model"])


def _replay_cost() -> Canaries:
    configs = {name: InferenceConfig(cache=cache) for name, cache in replay_cost.SETTINGS.items()}
    return _by_setting(configs, worked)


def _calibrated() -> Canaries:
    """Of the settings that were found for the bundled model, and of presets on any."""

    def of(row: Row) -> str:
        return row["config"] if row["model"] == "nano" or not row["target"] else ""

    def run(names: Iterable[str]) -> dict[str, Outcome]:
        return {name: asked(InferenceConfig.from_json(name)) for name in names}

    return Canaries(of, run, {"contexts and questions": counted.label_data, "bounds": counted.bounds})


def _film() -> Canaries:
    return _by_setting({name: InferenceConfig(merge=merge) for name, merge in film.settings().items()})


def _merge_stage() -> Canaries:
    return _by_setting({name: InferenceConfig(merge=merge) for name, merge in merge_stage.SETTINGS.items()}, worked)


def _peers() -> Canaries:
    configs = {name: setting(TOKENS) for name, setting in kvpress.our_settings().items()}
    configs |= {name: InferenceConfig.from_preset(name) for name in openvino.OURS}
    configs |= replay.our_settings(replay.BUDGETS)
    return _by_setting(configs, of=lambda row: row["setting"] if row["system"] == "mminfer" else "")


def _one(name: str, run: Callable[[], Outcome]) -> Canaries:
    """One for all rows of ours."""
    return Canaries(lambda row: name if _ours(row) else "", counted.one_by_one(lambda _: run(), [name]))


FILES: Mapping[str, Callable[[], Canaries]] = {
    "answers": lambda: _presets(answers.PRESETS),
    "batch_decode": lambda: _one("a batch", counted.batch),
    "calibrated": _calibrated,
    "decode": lambda: _one("a step", counted.step),
    "film": _film,
    "kernels": lambda: Canaries(lambda row: row["op"], counted.ops),
    "length": _length,
    "long_context": _long_context,
    "merge_stage": _merge_stage,
    "lost": _smol,
    "needle": _needle,
    "paper": lambda: Canaries(counted.figure_name, counted.one_by_one(counted.published, counted.figure_names())),
    "peers": _peers,
    "prompt_pass": lambda: _presets(prompt_pass.PRESETS),
    "regions": _needle,
    "replay": _needle,
    "replay_cost": _replay_cost,
    "scores": _scores,
    "serving": _serving,
    "smol": _smol,
    "smol_regions": _smol,
    "streamed": _streamed,
    "tower": lambda: _by_setting(tower.SETTINGS, worked),
    "turns": lambda: Canaries(_setting, counted.one_by_one(counted.chat, turns.SETTINGS)),
}
