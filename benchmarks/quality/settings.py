"""The settings that the tables compare: presets, the papers' other variants, and random baselines at equal budgets."""

from mminfer import AIMMerge, InferenceConfig, LookM
from mminfer.baselines import RandomEvict, RandomPrune

SETTINGS: dict[str, InferenceConfig] = {
    "off": InferenceConfig(),
    "v2pe-16": InferenceConfig.from_preset("v2pe-16"),
    "v2pe-64": InferenceConfig.from_preset("v2pe-64"),
    "aim-merge": InferenceConfig.from_preset("aim-merge"),
    "aim-prune": InferenceConfig.from_preset("aim-prune"),
    "random-prune": InferenceConfig(prune=RandomPrune()),
    "aim": InferenceConfig.from_preset("aim"),
    "aim-random": InferenceConfig(merge=AIMMerge(0.25), prune=RandomPrune()),
    "lookm-20": InferenceConfig.from_preset("lookm-20"),
    "lookm-20-average": InferenceConfig(cache=LookM(0.1, 0.1, merge="average")),
    "lookm-20-weighted": InferenceConfig(cache=LookM(0.1, 0.1, merge="weighted")),
    "lookm-20-no-text-prior": InferenceConfig(cache=LookM(0.1, 0.1, text_prior=False)),
    "random-evict-20": InferenceConfig(cache=RandomEvict(0.1, 0.1)),
    "random-evict-20-no-text-prior": InferenceConfig(cache=RandomEvict(0.1, 0.1, text_prior=False)),
    "lookm-5": InferenceConfig.from_preset("lookm-5"),
    "random-evict-5": InferenceConfig(cache=RandomEvict(0.025, 0.025)),
    "skip-ffn": InferenceConfig.from_preset("skip-ffn"),
    "balanced": InferenceConfig.from_preset("balanced"),
    "fast": InferenceConfig.from_preset("fast"),
}
