"""The support table says what the checks say of a loaded model."""

import pytest

from mminfer import InferenceConfig
from mminfer.inspection.support import YES, support_table, technique_variants
from tests.tiny import FAMILIES, refusal

TABLE = support_table()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_agrees_with_the_models(family):
    assert list(TABLE[family]) == list(technique_variants())
    for name, technique in technique_variants().items():
        refused = refusal(family, InferenceConfig(**{technique.stage.value: technique}))
        assert (TABLE[family][name] == YES) == (refused is None), name


def test_a_no_carries_its_reason():
    assert {family for family, row in TABLE.items() if set(row.values()) != {YES}} == {"gemma3"}
    reasons = TABLE["gemma3"]
    assert "both directions" in reasons["AIMPrune"]
    assert "no query" in reasons["OperatorSkip attention"]
    assert "no query" in reasons["OperatorSkip block"]
    assert "sliding window" in reasons["LookM"]
