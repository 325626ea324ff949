"""Published counts follow from geometry: AIM's, FastV's by its own estimate, LOOK-M's cache."""

import pytest

from benchmarks.paper import aim, fastv, lookm
from benchmarks.paper.counts import figures, table_of
from benchmarks.paper.geometries import QWEN2_7B, record_of
from mminfer.metrics.flops import full_prompt_flops, prompt_flops

FIGURES = figures()


def of(paper, **facts):
    found = [x for x in FIGURES if x.paper.startswith(paper) and all(getattr(x, k) == v for k, v in facts.items())]
    assert found, facts
    return found


def test_a_record_of_rows_is_the_full_model_where_nothing_leaves():
    rows = [1000] * QWEN2_7B.num_layers
    for dense in (False, True):
        ours = prompt_flops(QWEN2_7B, record_of(rows), dense)
        assert ours == full_prompt_flops(QWEN2_7B, [1000], [0], dense=dense)


def test_aims_two():
    for setting, published in (
        ("32 frames, merged to 100 %", 99.63),
        ("32 frames, merged to 25 %, pruned from 14 to 22", 14.76),
    ):
        dense, causal = (of("AIM", setting=setting, quantity=x) for x in (aim.DENSE, aim.CAUSAL))
        assert dense[0].published == published and abs(dense[0].deviation_percent) < 0.5
        assert causal[0].ours < dense[0].ours


def test_every_row_of_aim_that_is_counted_as_published():
    dense = of("AIM", quantity=aim.DENSE)
    apart = {x.setting for x in dense if abs(x.deviation_percent) > 0.5}
    assert len(dense) == 13 and apart == {"one image, merged to 12.5 %, pruned from 13 to 21"}
    assert all("not reproduced" in x.how for x in dense if x.setting in apart)


def test_aims_rows_of_a_layer():
    theirs, ours = (aim.pruned_rows(28, 1568, 100, 14, 22, behind=x) for x in (False, True))
    assert theirs[13:16] == [1668, 1472, 1276] and theirs[21:] == [100] * 7
    assert ours[1:] == theirs[:-1] and ours[0] == 1668


def test_fastv_by_its_own_estimate():
    estimates = of("FastV", quantity=fastv.ESTIMATE, table="Table 1")
    assert len(estimates) == 23
    assert [x.setting for x in estimates if abs(x.deviation_percent) > 1.5] == ["K=0, R=90 %"]
    shares = of("FastV", quantity="FLOPs kept, the paper's estimate")
    apart = [x for x in shares if abs(x.ours - x.published) > 0.5]  # they are published in whole percent
    assert [x.setting for x in apart] == ["K=0, R=90 %"] and "not reproduced" in apart[0].how


def test_lookms_cache():
    full, fifth, least = of("LOOK-M")
    assert lookm.tokens() == 3113 and abs(full.deviation_percent) < 0.05
    assert abs(fifth.deviation_percent) < 6
    assert least.ours < least.published and "text always stays" in least.how


def test_every_figure_says_how():
    assert len({(x.paper, x.table, x.model, x.setting, x.quantity) for x in FIGURES}) == len(FIGURES)
    for figure in FIGURES:
        row = figure.row()
        assert row["how"] and row["published"] > 0 and row["ours"] == pytest.approx(figure.ours, rel=1e-3)
    assert table_of(FIGURES).row_count == len(FIGURES)
