"""Remote media: whole, in time, of limited size, and from public hosts alone unless told otherwise."""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from mminfer import Engine, InputError
from mminfer.inputs import remote
from mminfer.inputs.content import MediaOptions
from mminfer.media import load_image, load_video

LOCAL = {"allow_remote": True, "allow_private_hosts": True}


def png():
    file = io.BytesIO()
    Image.new("RGB", (9, 6), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path that is asked for."""

    def do_GET(self):
        getattr(self, f"do_{self.path.strip('/').partition('.')[0].partition('?')[0]}")()

    def _headers(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_picture(self):
        self._headers()
        self.wfile.write(png())

    def do_cut(self):
        self._headers(Content_Length=len(png()))
        self.wfile.write(png()[:-10])

    def do_part(self):
        self._headers(206, Content_Range=f"bytes 0-{len(png()) - 1}/{2 * len(png())}", Content_Length=len(png()))
        self.wfile.write(png())

    def do_nothing(self):
        self._headers(204)

    def do_elsewhere(self):
        self._headers(302, Location=f"http://me:secret@{self.headers['Host']}/picture.png")

    def do_claims(self):
        self._headers(Content_Length=10**12)

    def do_chunks(self):
        self.protocol_version = "HTTP/1.1"
        self._headers(Transfer_Encoding="chunked")
        self.wfile.write(b"400\r\nonly a part")

    def do_slowly(self):
        self._headers()
        self._drip(b"a")

    def do_headers(self):
        self._drip(b"H")

    def _drip(self, byte):
        """For a quarter of an hour, or as long as somebody listens."""
        for _ in range(45_000):
            self.wfile.write(byte)
            time.sleep(0.02)

    def do_turn(self):
        self._headers(302, Location=self.server.target)

    def do_gone(self):
        self._headers(404)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_a_picture_comes_by_way_of_redirects(server):
    server.target = "/picture.png"
    for path in ("/picture.png", "/turn", "/picture.png?a=b c&d=\u00e9"):
        assert load_image(server.url + path, **LOCAL).getpixel((0, 0)) == (1, 2, 3)


def test_redirects_are_an_error_where_they_are_not_followed(server):
    server.target = "/picture.png"
    assert remote.fetch(server.url + "/picture.png", allow_private_hosts=True, follow_redirects=False)
    with pytest.raises(InputError, match="not followed"):
        remote.fetch(server.url + "/turn", allow_private_hosts=True, follow_redirects=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0"])
def test_the_machine_and_its_network_are_asked_only_if_told(server, host):
    url = f"http://{host}:{server.server_port}/picture.png"
    with pytest.raises(InputError, match=r"allow_private_hosts=True|could not be fetched"):  # not every host has all
        load_image(url, allow_remote=True)


def test_a_redirect_leads_no_way_round(server, monkeypatch):
    """The address is checked where each connection is made."""
    server.target, asked = "http://127.0.0.2/picture.png", []
    monkeypatch.setattr(remote, "is_public", lambda address: asked.append(address) or address == "127.0.0.1")
    monkeypatch.setattr(remote._Fetching, "_is_own", staticmethod(lambda connection: False))
    with pytest.raises(InputError, match=r"127.0.0.2, which is not a public address"):
        load_image(server.url + "/turn", allow_remote=True)
    assert asked == ["127.0.0.1", "127.0.0.2"]


def test_a_public_address_of_this_machine_is_its_own(server, monkeypatch):
    monkeypatch.setattr(remote, "is_public", lambda address: True)
    with pytest.raises(InputError, match="allow_private_hosts"):
        load_image(server.url + "/picture", allow_remote=True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("127.255.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.1.1", False), ("255.255.255.255", False), ("240.0.0.1", False),
        ("198.18.0.1", False), ("::", False), ("::1", False), ("fe80::1%eth0", False), ("fd00:ec2::254", False),
        ("fec0::1", False), ("ff0e::1", False), ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False),
        ("::ffff:8.8.8.8", True), ("::127.0.0.1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False), ("2001:db8::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert remote.is_public(address) is public


@pytest.mark.parametrize(
    "target", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:image/png;base64,AA", "gopher://a"]
)
def test_redirects_lead_to_http_alone(server, target):
    server.target = target
    with pytest.raises(InputError, match=r"[Rr]edirect"):
        load_image(server.url + "/turn", **LOCAL)


def test_redirects_end(server):
    server.target = server.url + "/turn"
    with pytest.raises(InputError, match="could not be fetched"):
        load_image(server.url + "/turn", **LOCAL)


def test_what_is_cut_short_is_refused(server):
    with pytest.raises(InputError, match=r"cut short, 10 bytes are missing"):
        load_image(server.url + "/cut", **LOCAL)
    with pytest.raises(InputError, match="could not be fetched: IncompleteRead"):
        load_image(server.url + "/chunks", **LOCAL)
    with pytest.raises(InputError, match="larger than 67,108,864 bytes"):
        load_image(server.url + "/claims", **LOCAL)


def test_a_size_too_large(server, monkeypatch):
    monkeypatch.setattr(remote, "MAX_REMOTE_BYTES", 20)
    for path in ("/picture", "/cut"):
        with pytest.raises(InputError, match="larger than 20 bytes"):
            load_image(server.url + path, **LOCAL)


@pytest.mark.parametrize("path", ["/slowly", "/headers"])
def test_all_of_it_is_done_in_time(server, monkeypatch, path):
    """However often something comes: the limit is of the whole."""
    monkeypatch.setattr(remote, "REMOTE_TIMEOUT_S", 0.3)
    with pytest.raises(InputError, match=r"took longer than 0.3 seconds"):
        load_image(server.url + path, **LOCAL)


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http:///a.png", "http://?a", "http://[::1", "http://[x]/", "http://a:99999/", "http://a:b/",
        "http://a b/c", "http://a\n.b/", "http://\u00e9.invalid/", "http://" + "a" * 300 + "/", "http://a..b/",
        "http://.", "https://127.0.0.1:1/", "http://%00/", "http://\ud800.b/", "HTTP://@/", "http://#/",
    ],
)  # fmt: skip
def test_odd_urls_are_refused(url):
    for load in (load_image, load_video):
        with pytest.raises(InputError, match="http"):
            load(url, **LOCAL)


def test_the_options_reach_every_door(server):
    engine, url = Engine.from_pretrained("nano"), server.url + "/picture.png"
    content = [{"type": "image", "url": url}, "What?"]
    assert engine.generate(content, 1, **LOCAL).token_ids and engine.chat(**LOCAL).send(content, 1).token_ids
    assert engine.check(content, **LOCAL)
    for options in ({"allow_remote": True}, {"allow_private_hosts": True}):
        with pytest.raises(InputError, match=r"allow_private_hosts=True|remote sources are off"):
            engine.generate(content, 1, **options)
    for wrong in (1, "yes", None):
        with pytest.raises(InputError, match=r"allow_private_hosts is .*wanted True or False"):
            MediaOptions(allow_private_hosts=wrong)
        with pytest.raises(InputError, match=r"allow_remote is .*wanted True or False"):
            load_image(url, allow_remote=wrong)


@pytest.mark.parametrize(("path", "found"), [("part", "206 Partial Content"), ("nothing", "204 No Content")])
def test_an_answer_that_is_no_whole_file_is_refused(server, path, found):
    with pytest.raises(InputError, match=f"{found}: wanted 200"):
        load_image(f"{server.url}/{path}", **LOCAL)


def test_passwords_are_neither_sent_nor_shown(server):
    host = server.url.removeprefix("http://")
    for url in (
        f"http://me:secret@{host}/picture.png",
        f"{server.url}/elsewhere",
        f"http://:secret@{host}/picture.png",
    ):
        with pytest.raises(InputError, match="name or password in the URL") as raised:
            load_image(url, **LOCAL)
        assert "secret" not in str(raised.value)
    for options in ({}, {"allow_remote": True}):
        with pytest.raises(InputError) as raised:
            load_image(f"http://me:secret@{host}/picture.png", **options)
        assert "secret" not in str(raised.value)


def test_a_host_may_be_written_in_any_alphabet(server):
    """By the rules for names of hosts; its address is looked at as any other's."""
    wide = server.url.replace("127.0.0.1", "\uff11\uff12\uff17.0.0.1").replace("localhost", "\uff4cocalhost")
    assert wide != server.url
    assert load_image(f"{wide}/picture.png", **LOCAL).size == (9, 6)
    with pytest.raises(InputError, match="not a public address"):
        load_image(f"{wide}/picture.png", allow_remote=True)
    with pytest.raises(InputError, match="could not be fetched"):
        load_image("http://\u2603.invalid/a.png", **LOCAL)
