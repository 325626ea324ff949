"""Regions beside what else leaves as many tokens: the lot, films, time of the stage, tables with and without rows."""

import csv

import pytest
import torch
from PIL import Image

from benchmarks import common
from benchmarks.models import merge_stage
from benchmarks.quality import film
from benchmarks.quality.lot import DropByLot
from benchmarks.quality.settings import GROUPS
from benchmarks.quality.smol_settings import REGIONS, chosen_settings
from benchmarks.tables import regions, smol
from mminfer import ConfigError, Engine, RegionMerge


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 1.0])
def test_by_lot_so_many_patches_of_each_picture_stay(ratio):
    features, layout = merge_stage.batch_of(25, 3, merge_stage.TEXT)
    out, merged = DropByLot(ratio).apply(features, layout)
    assert merged.image_lengths == (max(1, round(25 * ratio)),) * 3
    assert len(merged.text_rows) == 6 and torch.equal(out, features[merged.source])
    again, other = DropByLot(ratio).apply(features, layout)[0], DropByLot(ratio, seed=1).apply(features, layout)[0]
    assert torch.equal(out, again) and torch.equal(out, other) is (ratio == 1)


def test_the_lots_settings_are_checked():
    with pytest.raises(ConfigError, match=r"DropByLot\.ratio=0"):
        DropByLot(0)
    with pytest.raises(ConfigError, match=r"DropByLot\.seed"):
        DropByLot(0.5, seed="one")


def test_what_stands_beside_regions_is_chosen_by_one_word():
    assert {s.name: s.config for s in chosen_settings(["Regions"], (50,))} == REGIONS
    features, layout = merge_stage.batch_of(64, 2, merge_stage.TEXT)
    left = {n: c.merge.apply(features, layout)[1].image_lengths for n, c in (REGIONS | GROUPS["regions"]).items()}
    for share, patches in {70: 45, 50: 32, 30: 19, 15: 10, 6: 4}.items():
        assert left[f"AIM merge, {share} %"] == left[f"lot, {share} %"] == (patches, patches)
        assert sum(left[f"regions, {share} %"]) == 2 * patches  # shared out over the pictures of a chat
    assert left["down-sampling, 77 %"] == (49,) * 2 and left["down-sampling, 66 %"] == (42,) * 2


def test_frames_of_a_film_join_over_time():
    """In a row without anything between them, whatever the model's own processor writes there."""
    still = Image.new("RGB", (32, 32), (90, 20, 160))
    content = [{"type": "text", "text": "Image QX:"}, {"type": "image", "image": still}]
    made = film.films(content, 3, 0)
    assert made[0] is content[0] and made[1]["video"].shape == (3, 32, 32, 3)
    plain, tokens = Engine.from_pretrained("nano"), {}
    for merge in (None, RegionMerge(None, None, 1 / 64), RegionMerge(None, None, 1 / 192, across_frames=True)):
        chat = film.film_engine(plain, merge).chat()
        chat.read(made)
        tokens[merge] = sum(chat.cache.layers[0].lengths)
    whole, within, over = tokens.values()
    assert (whole - within, whole - over) == (3 * 64 - 3, 3 * 64 - 1)


def test_rows_of_films():
    chosen = {name: film.settings()[name] for name in ("off", "lot, 50 %")}
    off, half = film.measure(chosen, 1, 2, 1, 3)
    assert off["kl_long"] == pytest.approx(0, abs=1e-4) and off["cache_kept"] == 100
    assert half["frames"] == 2 and 50 < half["cache_kept"] < 75


def test_the_stage_is_timed_beside_aims():
    rows = merge_stage.measure(16, 2, merge_stage.HALF, 2)
    assert [row["setting"] for row in rows] == list(merge_stage.SETTINGS)
    assert rows[0]["of_aim"] == 1 and rows[0]["left"] == 50 and 50 < rows[1]["left"] < 100 and rows[2]["left"] == 50
    assert {row["repeats"] for row in rows} == {2} and all(row["cpu_ms_min"] > 0 for row in rows)


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (common, regions, smol):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def written(path, rows):
    rows = [{"seed": 0, **row, **common.ORIGIN, "threads": 1} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_without_rows_tables_say_so(results):
    for table in (regions.reader, regions.nano, regions.film, regions.stage):
        assert table().startswith("No rows") and "|" not in table()


def test_tables_have_a_line_a_setting(results):
    figures = {"questions": 40, "accuracy": 90.0, "Q1": 1, "Q2": 2, "Q3": 3, "kl_long": 0.5, "cache_kept": 55.55}
    one = {"setting": "lot, 50 %", "protocol": "next-turn", "images": 8, "frames": 4} | figures
    written(results / "regions.csv", [one])
    written(results / "film.csv", [one])
    written(results / "merge_stage.csv", merge_stage.measure(16, 1, merge_stage.TEXT, 1))
    assert "| `lot, 50 %` | next-turn | 55.5 % | 90.0 | 1 | 2 | 3 | 0.5 |" in regions.nano()
    assert "| `lot, 50 %` | 4 | 55.5 % |" in regions.film() and "40 over 8 labelled films" in regions.film()
    assert "| text | 16 | 1 | `regions` | 100 % |" in regions.stage() and "1 rounds" in regions.stage()


def test_the_pages_table_has_kinds_as_columns(results):
    rows = []
    for setting, stayed in (("off", 20), ("regions", 19), ("lot, 70 %", 5)):
        for pages, kind in (("all", "all"), ("dense text", "code"), ("sparse text", "job")):
            counts = {"questions": 30, "right": stayed, "full_right": 20, "stayed": stayed, "cache_kept": 74}
            row = {"model": "pixels", "setting": setting, "protocol": "next-turn", "pages": pages, "kind": kind}
            rows.append(row | counts | {"same": 50, "kl": 1})
    written(results / "smol_regions.csv", rows[:6])
    assert regions.reader().startswith("No rows")  # of the preset alone there is nothing to compare
    written(results / "smol_regions.csv", rows)
    table = regions.reader()
    assert table.splitlines()[0].endswith("| kept, dense text | entries, dense text | kept, sparse text | "
                                          "entries, sparse text |")  # fmt: skip
    assert "| `lot, 70 %` | 25.0 (11 to 47) | 74.0 % | 25.0 | 74 % | 25.0 | 74 % |" in table
