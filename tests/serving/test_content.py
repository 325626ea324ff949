"""Where images come from: data: URLs, domains that the operator named, and nowhere else."""

from io import BytesIO

import pytest
from PIL import Image

from mminfer.errors import InputError
from mminfer.serving import content
from mminfer.serving.budget import Budget
from mminfer.serving.errors import RequestError
from mminfer.serving.limits import ServerSettings
from mminfer.serving.schema import ImageContent

SERVER = ServerSettings("nano", {}, remote_domains=frozenset({"pictures.example"}))


@pytest.fixture
def fetched(monkeypatch):
    seen = []

    def fetch(url, **options):
        seen.append((url, options))
        raise InputError("gone")

    monkeypatch.setattr(content, "fetch", fetch)
    return seen


def load(url, server=SERVER):
    part = ImageContent.model_validate({"type": "image_url", "image_url": {"url": url}})
    with pytest.raises(RequestError) as error:
        content._load(part, "messages.0.content.0", server, Budget(2**20).share())
    assert not url or url not in error.value.message
    return error.value


@pytest.mark.parametrize("url", ["https://pictures.example/a.png", "HTTP://Pictures.Example:81/a.png"])
def test_named_domains_are_asked_without_redirects(fetched, url):
    assert load(url).message.endswith("cannot be had")
    assert fetched == [(url, {"follow_redirects": False})]


def test_what_is_fetched_is_held(fetched, monkeypatch):
    """Beside the body: a picture may hang as many bytes behind its pixels as may be fetched."""
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    monkeypatch.setattr(content, "fetch", lambda url, **options: file.getvalue() + bytes(2**20))
    assert load("https://pictures.example/a.png").status == 413


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/a.png", "https://pictures.example.evil.org/a.png", "https://a.pictures.example/",
        "https://evil.org\\@pictures.example/", "https://evil.org/pictures.example", "ftp://pictures.example/a.png",
        "//pictures.example/a.png", "/etc/passwd", "", "http://[::1", "file://pictures.example/etc/passwd",
    ],
)  # fmt: skip
def test_nobody_else_is_asked(fetched, url):
    load(url)
    assert fetched == []


def test_without_domains_none_is_asked(fetched):
    load("https://pictures.example/a.png", ServerSettings("nano", {}))
    assert fetched == []
