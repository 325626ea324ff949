"""Fetching by http(s): in limited time, of limited size, whole or not at all, and from no host that is not public."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from threading import Lock, Timer
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit, urlunsplit

from mminfer.errors import InputError, shortened

MAX_REMOTE_BYTES = 64 * 2**20
REMOTE_TIMEOUT_S = 20.0  # for all of it: names, redirects, headers and body
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # characters of a URL that mean something, or are quoted already
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def fetch(url: str, *, allow_private_hosts: bool = False, follow_redirects: bool = True) -> bytes:
    """What stands under a URL.

    Addresses are checked where a connection is made, so that neither a name nor a redirect leads round it, and proxies
    of the environment are not asked.

    Args:
        url: http(s).
        allow_private_hosts: fetch from this machine and its network too.
        follow_redirects: go on to where a host sends us; else that is an error.

    Raises:
        InputError: it is no such URL, cannot be fetched in time, is cut short or too large, or its host is not public.
    """
    name = url_name(url)
    fetching = _Fetching(allow_private_hosts, follow_redirects)
    try:
        with fetching.in_time():
            content = fetching.content(_quoted(url))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # of sockets, TLS, HTTP, and URLs that are none
        if fetching.is_late:
            raise InputError(f"{name}: took longer than {REMOTE_TIMEOUT_S:g} seconds: download it first") from error
        refused = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise InputError(f"{name}: could not be fetched: {shortened(refused)}: check the URL") from error
    if fetching.is_late:  # a connection that was closed for that may look like the end of the body
        raise InputError(f"{name}: took longer than {REMOTE_TIMEOUT_S:g} seconds: download it first")
    return content


class _Fetching:
    """One fetch, whose connections are closed when its time is over."""

    def __init__(self, allow_private_hosts: bool, follow_redirects: bool) -> None:
        self._allow_private_hosts, self._follow_redirects = allow_private_hosts, follow_redirects
        self._lock, self._sockets, self.is_late = Lock(), list[socket.socket](), False

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """The limit holds within the `with` block."""
        timer = Timer(REMOTE_TIMEOUT_S, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def content(self, url: str) -> bytes:
        """The body.

        Raises:
            InputError: it is cut short or too large, or the URL leads nowhere that may be asked.
        """
        _check_url(url)
        opener = urllib.request.OpenerDirector()
        for handler in (
            _Http(self),
            _Https(self),
            _Redirects(self._follow_redirects),
            urllib.request.HTTPErrorProcessor(),
        ):
            opener.add_handler(handler)
        opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
        request = urllib.request.Request(url, headers={"User-Agent": "mminfer"})
        response: HTTPResponse
        with opener.open(request, timeout=REMOTE_TIMEOUT_S) as response:
            if response.status != HTTPStatus.OK:
                raise InputError(f"the answer is {response.status} {response.reason}: wanted 200 and a whole file")
            content = b"" if (response.length or 0) > MAX_REMOTE_BYTES else response.read(MAX_REMOTE_BYTES + 1)
            missing = response.length or 0  # of what Content-Length said
        if len(content) + missing > MAX_REMOTE_BYTES:
            raise InputError(f"larger than {MAX_REMOTE_BYTES:,} bytes: download it and pass the path")
        if missing and not self.is_late:
            raise InputError(f"cut short, {missing:,} bytes are missing: try again, or download it first")
        return content

    def connected(self, host: str, port: int) -> socket.socket:
        """A connection to the first address of a host that may be asked and answers."""
        failure: Exception | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not self._allow_private_hosts and not is_public(str(address[0])):
                failure = InputError(_private(host, str(address[0])))
                continue
            connection = socket.socket(family, kind, protocol)
            try:
                self.hold(connection)
                connection.settimeout(REMOTE_TIMEOUT_S)
                connection.connect(address)
                if not self._allow_private_hosts and self._is_own(connection):
                    raise InputError(_private(host, str(address[0])))
                return connection
            except (OSError, InputError) as error:
                connection.close()
                failure = error
        raise failure or OSError(f"{host} has no address")

    @staticmethod
    def _is_own(connection: socket.socket) -> bool:
        """Whether it leads to this machine, by whatever address."""
        return bool(connection.getsockname()[0] == connection.getpeername()[0])

    def hold(self, connection: socket.socket) -> None:
        """Closes a connection when the time is over."""
        with self._lock:
            self._sockets.append(connection)
            if self.is_late:
                raise OSError("too late")

    def _end(self) -> None:
        with self._lock:
            self.is_late = True
            for connection in self._sockets:
                with suppress(OSError):  # below TLS, which another thread is reading
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _check_url(url: str) -> None:
    """Raises `InputError` where a URL names no host, or more than that."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise InputError("no host in the URL: wanted http(s)://host/...")
    if parts.username is not None or parts.password is not None:
        raise InputError("a name or password in the URL, which are not sent: download it first")


def _quoted(url: str) -> str:
    """A URL as it goes over the line: its host in the letters of names, all else of it in ASCII."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return quote(urlunsplit(parts._replace(netloc=host)), safe=_SAFE)


def url_name(url: str) -> str:
    """A URL as messages name it: without a password that stands in it."""
    head, at, rest = url.partition("//")
    host, slash, path = rest.partition("/")
    return shortened(f"{head}{at}{host.rpartition('@')[2]}{slash}{path}")


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet; one of version 6 may stand for one of version 4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64 or found in _COMPATIBLE:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def _private(host: str, address: str) -> str:
    return (
        f"{shortened(host)} is {address}, which is not a public address: pass allow_private_hosts=True to fetch from "
        "this machine or its network"
    )


class _PlainConnection(HTTPConnection):
    """To a host that was checked."""

    def __init__(self, host: str, *, fetching: _Fetching, **options: Any) -> None:
        super().__init__(host, **options)
        self._fetching = fetching

    def connect(self) -> None:
        self.sock = self._fetching.connected(self.host, self.port)


class _TlsConnection(HTTPSConnection):
    """To a host that was checked, under TLS."""

    def __init__(self, host: str, *, fetching: _Fetching, tls: ssl.SSLContext, **options: Any) -> None:
        super().__init__(host, context=tls, **options)
        self._fetching, self._tls = fetching, tls

    def connect(self) -> None:
        plain = self._fetching.connected(self.host, self.port)
        under_tls = self._tls.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = under_tls
        self._fetching.hold(under_tls)
        under_tls.do_handshake()


class _Http(urllib.request.HTTPHandler):
    def __init__(self, fetching: _Fetching) -> None:
        super().__init__()
        self._fetching = fetching

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_PlainConnection, request, fetching=self._fetching)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, fetching: _Fetching) -> None:
        super().__init__()
        self._fetching, self._tls = fetching, ssl.create_default_context()

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(
            _TlsConnection,  # type: ignore[arg-type]
            request,
            fetching=self._fetching,
            tls=self._tls,
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http(s) and nothing else, if at all."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed

    def redirect_request(self, request: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not self._allowed:
            raise InputError("it redirects to another place, which is not followed: pass the URL of the file itself")
        if urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise InputError(f"redirected to {shortened(newurl)}: wanted http(s)")
        _check_url(newurl)
        return super().redirect_request(request, fp, code, msg, headers, newurl)
