"""The page needs nothing beside itself, runs nothing but its own script, and says what the facts say."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mminfer import InferenceConfig, LookM
from mminfer.inspection import page_html
from mminfer.inspection.words import image_sentence, layer_list, percent, sentences
from tests.inspection.stub import inspect_tiny
from tests.tiny import FAMILIES, IMAGE

VOID = {"meta", "img", "input", "br"}
EVIL = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>&amp;'


class Page(HTMLParser):
    """Every element with its attributes and the text directly in it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []  # every element was closed in turn

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append((tag, self.elements[-1]))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][1][2].append(data)

    def all(self, tag, **wanted):
        return [x for x in self.elements if x[0] == tag and all(x[1].get(k) == v for k, v in wanted.items())]

    def text(self, tag, **wanted):
        return ["".join(x[2]) for x in self.all(tag, **wanted)]


def asks_outside(page):
    """What a browser would fetch."""
    found = []
    for tag, attributes, text in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "poster", "background", "style", "xlink:href"):
                found += [value] if not value.startswith(("data:image/", "#")) and "url(" in value else []
                found += [value] if name != "style" and not value.startswith(("data:image/", "#")) else []
        if tag in ("link", "iframe", "object", "embed", "base"):
            found.append(tag)
        if tag == "style" and re.search(r"url\(|@import", "".join(text)):
            found.append("style")
        if tag == "script" and re.search(r"fetch|XMLHttp|import|https?:", "".join(text)):
            found.append("script")
    return found


@pytest.mark.parametrize("preset", ["balanced", "lookm-20", "digest-20", "off"])
def test_the_page_is_self_contained(nano_inspection, preset):
    page = Page(page_html(nano_inspection(preset), preset))
    assert asks_outside(page) == []
    pictures = page.all("img")
    assert len(pictures) == 2 * 8 and all(x[1]["loading"] == "lazy" and x[1]["alt"] for x in pictures)
    assert all(base64.b64decode(x[1]["src"].partition(",")[2])[:2] == b"\xff\xd8" for x in pictures)


def test_what_asks_outside_is_seen():
    page = Page('<img src="http://a/b"><a href="x.html"></a><style>a { background: url(x) }</style>')
    assert asks_outside(page) == ["http://a/b", "x.html", "style"]


def test_prompts_and_answers_are_text(nano_inspection):
    found = nano_inspection("balanced")
    texts = tuple(EVIL if text else "" for text in found.texts)
    evil = dataclasses.replace(found, model=EVIL, texts=texts, answer=EVIL, full_answer=EVIL)
    evil = dataclasses.replace(evil, settings=found.settings | {"cache": {"technique": EVIL}}, evicted=EVIL)
    text = page_html(evil, EVIL)
    page = Page(text)
    assert len(page.all("script")) == 2 and asks_outside(page) == []
    assert not any(name.startswith("on") for _, attributes, _ in page.elements for name in attributes)
    assert any(EVIL in shown for shown in page.text("div"))


def test_the_policy_lets_the_pages_own_script_run_alone(nano_inspection):
    text = page_html(nano_inspection("off"))
    page = Page(text)
    (script,) = [x for x in page.all("script") if "type" not in x[1]]
    digest = base64.b64encode(hashlib.sha256("".join(script[2]).encode()).digest()).decode()
    ((_, policy, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert f"script-src 'sha256-{digest}'" in policy["content"] and "default-src 'none'" in policy["content"]


def test_the_views_data_are_the_facts(nano_inspection):
    found = nano_inspection("lookm-20")
    page = Page(page_html(found))
    facts = json.loads(page.text("script", id="facts")[0])
    assert len(facts["grids"]) == len(page.all("canvas")) == 8 and len(facts["layers"]) == 6
    for image, grid in zip(found.images, facts["grids"], strict=True):
        cells = image.grids[0].ravel()
        assert (grid["rows"], grid["columns"]) == (8, 8) and grid["entered"] == [6] * 64
        gone = np.frombuffer(base64.b64decode(grid["gone"]), np.uint8).reshape(6, 64)
        assert (gone == found.tokens.gone[:, cells]).all() and gone.max() <= facts["heads"]
    pruned = json.loads(Page(page_html(nano_inspection("balanced"))).text("script", id="facts")[0])
    assert all(grid["gone"] is None and set(grid["entered"]) <= {4, 5} for grid in pruned["grids"])


def test_chips_lead_to_their_pictures(nano_inspection):
    page = Page(page_html(nano_inspection("balanced")))
    places = [x[1]["id"] for x in page.all("figure")]
    assert [x[1]["href"] for x in page.all("a")] == [f"#{place}" for place in places]
    words = "".join(page.text("div", **{"class": "strip"}))
    assert "Which image shows a blue 1?" in words


def test_the_table_has_the_layers(nano_inspection):
    found = nano_inspection("balanced")
    page = Page(page_html(found))
    cells = page.text("td")
    rows = [cells[6 * i : 6 * i + 6] for i in range(6)]
    for i, (row, layer) in enumerate(zip(rows, found.layers, strict=True)):
        assert row[0] == str(i) and row[1] == f"{layer.rows} of {layer.full_rows}"
        assert row[2] == f"{layer.entries} of {layer.full_entries}"
        assert row[4] == (str(layer.left) if layer.left else "") and row[5] == ", ".join(layer.skipped)
    settings = InferenceConfig.from_dict(json.loads(page.text("pre")[0]))
    assert settings == InferenceConfig.from_preset("balanced")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_without_pictures_is_a_page_of_grids(family):
    page = Page(page_html(inspect_tiny(family, InferenceConfig(), [3, IMAGE, 2])))
    assert len(page.all("canvas")) == len(page.all("img")) / 2 > 0


def test_struck_text_is_told():
    config = InferenceConfig(cache=LookM(budget=30, recent=4))
    with pytest.warns(UserWarning, match="text alone"):
        page = Page(page_html(inspect_tiny("llava", config, [60, IMAGE])))
    assert page.all("s") and page.text("sub")[0].endswith("%")


def test_a_page_of_text_alone():
    page = Page(page_html(inspect_tiny("llava", InferenceConfig(), [5])))
    assert page.all("img") == page.all("script") == [] and "There is no image in this prompt." in page.text("p")


def test_sentences_count(nano_inspection):
    found = nano_inspection("balanced")
    assert sentences(found) == [
        "AIMMerge: patches of a picture were averaged into fewer tokens before the language model; 512 visual tokens "
        "became 168.",
        "AIMPrune: visual tokens left inside the language model: 84 behind layer 3, 84 behind layer 4. They exist in "
        "no later layer or cache.",
        "OperatorSkip: visual tokens skip the FFN in layers 3 to 5.",
    ]
    told = [image_sentence(found, image) for image in found.images]
    assert all(text.startswith("64 patches as 21 tokens, ") for text in told)
    assert sum(int(n) for text in told for n in re.findall(r"(\d+) left", text)) == 168
    assert sentences(nano_inspection("off")) == ["Nothing: every technique is off."]
    assert "20\u00a0% of the cache entries stayed" in sentences(nano_inspection("lookm-20"))[0]


def test_numbers_in_words():
    shown = ["0", "0.4", "10", "99.4", "99.9", "100"]
    assert [percent(x, 1000) for x in (0, 4, 100, 994, 999, 1000)] == [f"{n}\u00a0%" for n in shown]
    assert layer_list([0, 2, 4, 5, 6, 8, 9]) == "0, 2, 4 to 6, 8, 9"
