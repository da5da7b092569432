"""One HTTP exchange within a bounded time: httpok's check and the webhook's POST.

No redirects, no proxies, no retries except for a refused connection, if asked. The body is
searched as it streams, so memory is bounded too.
"""
from __future__ import annotations

import errno
import io
import os
import socket
import time
from typing import TYPE_CHECKING, Any, Iterable, NamedTuple, Sequence

from superlance import __version__
from superlance.command import SecondsLeft
from superlance.listener import one_line
from superlance.options import without_password
from superlance.rpc import Unknown

if TYPE_CHECKING:
    import ssl
    from http.client import HTTPMessage, HTTPResponse
    from urllib.parse import SplitResult

RETRY_REFUSED_SECONDS = 1
BODY_LIMIT_BYTES = 1024 * 1024
EXCERPT_BYTES = 500
PIECE_BYTES = 64 * 1024
REASON_CHARACTERS = 200
# A day: poll() takes at most 24 days, as 32 bits of milliseconds, and Python does not check for an overflow.
LONGEST_WAIT_SECONDS = 24 * 3600
# The listener has run out of a resource: this says nothing about the server.
OWN_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class FetchFailed(Exception):
    """There was no response, or none that could be read; the message is one line."""


class TimedOut(FetchFailed):
    """There was no complete response in time."""


class Target(NamedTuple):
    """The parts of a URL."""

    tls: bool
    host: str
    port: int
    path: str               # with the query
    host_header: str
    authorization: str | None
    shown: str              # the URL without its password, or what it is called instead


class Request(NamedTuple):
    """A request, and how to connect."""

    target: Target
    method: str = 'GET'
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b''
    unix_socket: str | None = None
    tls_context: ssl.SSLContext | None = None    # required if target.tls
    retry_refused: bool = False     # retry a refused connection every second until the deadline


class Search(NamedTuple):
    """Which body to read, and what to search it for."""

    statuses: frozenset[int]
    text: str | None = None


class Response(NamedTuple):
    """What the server sent."""

    status: int
    reason: str             # one line
    headers: HTTPMessage    # .get() returns the header of a name, in any case
    has_text: bool | None   # with a Search: whether the body contains its text; None: the body was not read
    excerpt: bytes          # without a Search: the first bytes of the body
    seconds: float          # since the request began

    @property
    def status_line(self) -> str:
        return f'{self.status} {self.reason}'.rstrip()


# URL and TLS.

def parse_url(text: str, password: str | None = None, shown: str | None = None) -> Target:
    """Return the Target for an http or https URL. Raises ValueError.

    password is used if the URL has a user name without one; shown is what messages call the URL
    (default: the URL without its password).
    """
    from urllib.parse import urlsplit

    shown = without_password(text) if shown is None else shown

    def wrong(reason: str) -> ValueError:
        return ValueError(f'URL {shown!r} {reason}; write a URL such as http://127.0.0.1:8080/health')

    if not text.isprintable() or ' ' in text:
        raise wrong('contains a space or a control character')
    try:
        url = urlsplit(text)
    except ValueError:
        raise wrong('is invalid') from None  # the reason may contain the password
    if url.scheme not in ('http', 'https'):
        raise wrong('is neither http nor https')
    host = (url.hostname or '').replace('%25', '%')     # the zone of an IPv6 address, RFC 6874
    if not host:
        raise wrong('has no host')
    try:
        port = url.port
    except ValueError:
        port = 0
    if port == 0:
        raise wrong('has a port that is not a number from 1 to 65535')
    try:
        host = host.encode('idna').decode('ascii')
    except UnicodeError as why:
        raise wrong(f'has an invalid host name: {why}') from None
    host_header = '[{}]'.format(host.partition('%')[0]) if ':' in host else host
    if port:
        host_header += f':{port}'
    return Target(tls=url.scheme == 'https', host=host, port=port or (443 if url.scheme == 'https' else 80),
                  path=_encode_path(url), host_header=host_header, authorization=_make_authorization(url, password),
                  shown=shown)


def _encode_path(url: SplitResult) -> str:
    """Return path and query with letters beyond ASCII encoded; what is percent-encoded already stays as it is."""
    from urllib.parse import quote

    path = quote(url.path or '/', safe="%/:@!$&'()*+,;=~")
    return path + ('?' + quote(url.query, safe="%/?:@!$&'()*+,;=~[]{}|^") if url.query else '')


def _make_authorization(url: SplitResult, password: str | None) -> str | None:
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes

    if url.username is None:
        return None
    secret = (unquote_to_bytes(url.password) if url.password is not None
              else (password or '').encode('utf-8', 'surrogateescape'))
    return 'Basic ' + b64encode(unquote_to_bytes(url.username) + b':' + secret).decode('ascii')


def make_tls_context(verify: bool, cafile: str | None = None) -> ssl.SSLContext:
    """Return a context that verifies with the system's CA certificates or those in cafile, or not at all.

    Raises OSError if cafile can't be used (ssl.SSLError is one).
    """
    import ssl

    if verify or cafile:
        return ssl.create_default_context(cafile=cafile)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# The connection.

def limit_wait(seconds_left: SecondsLeft) -> float:
    """Return for how many seconds a socket may wait, more than 0. Raises TimedOut."""
    left = seconds_left()
    if left <= 0:
        raise TimedOut('no complete response in time')
    return min(left, LONGEST_WAIT_SECONDS)


class BoundedSocket(io.RawIOBase):
    """A connected socket with the methods that http.client uses; one deadline bounds the sum of its waits."""

    def __init__(self, sock: socket.socket, seconds_left: SecondsLeft) -> None:
        self._sock = sock
        self._seconds_left = seconds_left
        self._file = io.BufferedReader(self)    # one for all responses, as it may already contain the next one

    def makefile(self, mode: str) -> Any:
        return self._file

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(limit_wait(self._seconds_left))
        self._sock.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(limit_wait(self._seconds_left))
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        """Leave the socket open: http.client closes a connection before it reads the body."""


def connect(request: Request, seconds_left: SecondsLeft) -> socket.socket:
    """Return a connected socket. Raises OSError, TimedOut and Unknown.

    A unix socket whose file does not exist yet, or whose queue is full, counts as a refused connection.
    """
    while True:
        try:
            return _connect_once(request, seconds_left)
        except (ConnectionRefusedError, FileNotFoundError, BlockingIOError):
            left = seconds_left()
            if not request.retry_refused or left <= 0:
                raise
            time.sleep(min(RETRY_REFUSED_SECONDS, left))
            if seconds_left() <= 0:
                raise


def _connect_once(request: Request, seconds_left: SecondsLeft) -> socket.socket:
    addresses = [(socket.AF_UNIX, request.unix_socket)] if request.unix_socket else _look_up(request.target)
    failures: list[OSError] = []
    for position, (family, address) in enumerate(addresses):
        # An address that does not respond must not use up the time of the others.
        seconds = limit_wait(seconds_left) / (len(addresses) - position)
        try:
            return _open_socket(family, address, seconds)
        except OSError as why:
            failures.append(why)
    if request.unix_socket and isinstance(failures[-1], PermissionError):
        raise Unknown(f'unable to connect to {request.unix_socket}: {failures[-1].strerror}')
    raise next((why for why in failures if isinstance(why, ConnectionRefusedError)), failures[-1])


def _look_up(target: Target) -> list[tuple[int, Any]]:
    """Return the addresses of a host. It may hang: call it on a thread that can be abandoned."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except socket.gaierror as why:
        failure = f'DNS lookup of {target.host} failed: {why.strerror}'
        if why.errno in (socket.EAI_AGAIN, socket.EAI_MEMORY):
            raise Unknown(failure) from why
        socket.socket().close()     # raises OSError if there was no file descriptor for /etc/hosts
        raise FetchFailed(failure) from why
    return [(family, address) for family, _, _, _, address in found]


def _open_socket(family: int, address: Any, timeout_seconds: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_seconds)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


# The exchange.

def fetch(request: Request, seconds_left: SecondsLeft, search: Search | None = None) -> Response:
    """Send a request and return the response.

    seconds_left bounds everything but a DNS lookup. With a search, the body of an expected status is
    read until its text is found; without one, only an excerpt is read. Raises FetchFailed, TimedOut, and
    Unknown if the failure says nothing about the server (no file descriptor or memory left, a unix socket that
    this process is not allowed to open, a temporary failure of the DNS lookup).
    """
    from http.client import HTTPException

    started = time.monotonic()
    try:
        with connect(request, seconds_left) as sock:
            if request.target.tls:
                assert request.tls_context
                sock.settimeout(limit_wait(seconds_left))
                sock = request.tls_context.wrap_socket(sock, server_hostname=request.target.host)
            with sock:
                return exchange(request, sock, seconds_left, search)._replace(seconds=time.monotonic() - started)
    except OSError as why:
        if isinstance(why, socket.timeout) and why.errno is None:   # with an errno it is the kernel's ETIMEDOUT
            raise TimedOut('no complete response in time') from why
        if why.errno in OWN_ERRORS:
            raise Unknown(describe_failure(why)) from why
        raise FetchFailed(describe_failure(why)) from why
    except (HTTPException, ValueError) as why:  # ValueError: a chunk length that http.client can't parse
        raise FetchFailed(describe_failure(why)) from why
    except MemoryError as why:
        raise Unknown(os.strerror(errno.ENOMEM)) from why


def exchange(request: Request, sock: socket.socket, seconds_left: SecondsLeft, search: Search | None) -> Response:
    """Send the request and read the response. Raises FetchFailed, OSError, HTTPException and ValueError."""
    from http.client import HTTPConnection, HTTPResponse

    # Without a port, http.client would look for one in an IPv6 address.
    connection = HTTPConnection(request.target.host, request.target.port)
    bounded = connection.sock = BoundedSocket(sock, seconds_left)
    connection.putrequest(request.method, request.target.path, skip_host=True, skip_accept_encoding=True)
    for name, value in make_headers(request):
        connection.putheader(name, value.encode('utf-8'))
    connection.endheaders(request.body or None)
    response = connection.getresponse()
    while 101 < response.status < 200 and not (search and response.status in search.statuses):
        # For example 103, Early Hints: the final one follows (RFC 9110, 15.2). http.client knows only 100.
        setattr(response, 'fp', None)  # noqa: B010  its destructor would close the file, which the next one reads
        response = HTTPResponse(bounded, method=request.method)  # type: ignore[arg-type]
        response.begin()
    has_text, excerpt = None, b''
    if search is None:
        excerpt = read_excerpt(response)
    elif response.status in search.statuses:
        has_text = read_body(response, search.text)
    return Response(response.status, one_line(response.reason[:REASON_CHARACTERS]), response.headers, has_text,
                    excerpt, 0.0)


def make_headers(request: Request) -> list[tuple[str, str]]:
    """Return the headers of a request: its own, and the default of every other."""
    defaults = [('Host', request.target.host_header), ('User-Agent', f'superlance/{__version__}'), ('Accept', '*/*'),
                ('Accept-Encoding', 'identity'), ('Connection', 'close')]
    if request.target.authorization:
        defaults.append(('Authorization', request.target.authorization))
    if request.body or request.method != 'GET':
        defaults.append(('Content-Length', str(len(request.body))))
    given = {name.lower() for name, _ in request.headers}
    return [(name, value) for name, value in defaults if name.lower() not in given] + list(request.headers)


def describe_failure(why: Exception) -> str:
    """Return one line that says why there is no response; what the server sent may be long and contain anything."""
    from http.client import BadStatusLine, IncompleteRead, UnknownProtocol

    if isinstance(why, IncompleteRead):
        return 'the response body is incomplete'
    if isinstance(why, (BadStatusLine, UnknownProtocol)) and not isinstance(why, OSError):
        return f'not an HTTP response: {str(why)[:REASON_CHARACTERS]!r}'
    return one_line(getattr(why, 'strerror', None) or str(why) or type(why).__name__)


# The body.

def read_body(response: HTTPResponse, text: str | None) -> bool:
    """Read a body as far as needed, and return whether it contains text; without a text, True.

    Raises FetchFailed if it ends before its Content-Length, and HTTPException for bad chunks.
    """
    find = TextSearch(encode_text(text, response.headers.get_content_charset())) if text else None
    seen_bytes = 0
    while response.length != 0 and (find or seen_bytes < BODY_LIMIT_BYTES):
        piece = response.read1(PIECE_BYTES)    # read() would wait for as much as it is asked for
        if response.chunked and (response.chunk_left or 0) < 0:
            raise FetchFailed('a chunk of the response body has a negative length')
        if not piece:
            if response.length:
                raise FetchFailed('the response body is incomplete')
            break
        seen_bytes += len(piece)
        if find and find.is_found_with(piece):
            return True
    return find is None


def read_excerpt(response: HTTPResponse) -> bytes:
    """Return the first bytes of a body, as many as arrive in time: the status is the answer, with or without them."""
    from http.client import HTTPException

    excerpt = b''
    try:
        while len(excerpt) < EXCERPT_BYTES:
            piece = response.read1(EXCERPT_BYTES - len(excerpt))
            if not piece:
                break
            excerpt += piece
    except (OSError, HTTPException, ValueError, FetchFailed):
        pass
    return excerpt[:EXCERPT_BYTES]


class TextSearch:
    """Searches a stream for several texts; keeps only as much of it as the next piece may complete."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        self._texts = tuple(texts)
        self._kept_bytes = max(map(len, self._texts)) - 1
        self.tail = b''

    def is_found_with(self, piece: bytes) -> bool:
        """Return whether one of the texts ends in piece, which is the next part of the stream."""
        self.tail += piece
        if any(text in self.tail for text in self._texts):
            return True
        self.tail = self.tail[max(0, len(self.tail) - self._kept_bytes):]
        return False


def encode_text(text: str, charset: str | None) -> Sequence[bytes]:
    """Return text as UTF-8 and, if possible, in the response's charset."""
    encoded = [text.encode('utf-8', 'surrogateescape')]
    for ending in ('', '-le', '-be'):   # of UTF-16 and UTF-32; no other charset has such a name
        try:
            encoded.append(text.encode((charset or 'utf-8') + ending))
        except (LookupError, ValueError):   # ValueError: a null character in the name
            continue
    return tuple(filter(None, encoded))
