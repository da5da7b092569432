"""HTTP servers on loopback whose responses a test writes."""
from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence, Union

from support import TIMEOUT, read_until, serving

if TYPE_CHECKING:
    import trustme  # not otherwise: most tests need no certificates

Handler = Callable[[socket.socket], None]
# What a server does with a connection whose request it has read.
Answer = Union[bytes, Handler]


def make_tls(authority: trustme.CA, *names: str, not_after: datetime | None = None) -> ssl.SSLContext:
    """Return the context of a server with a certificate for these names, by default those of loopback."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or ('127.0.0.1', 'localhost')), not_after=not_after).configure_cert(context)
    return context


def response(body: bytes = b'ok', *headers: str, status: str = '200 OK') -> bytes:
    """Return an HTTP response with a Content-Length."""
    return make_head(f'Content-Length: {len(body)}', *headers, status=status) + body


def make_head(*headers: str, status: str = '200 OK') -> bytes:
    return '\r\n'.join(['HTTP/1.1 ' + status, *headers, '', '']).encode('latin-1')


def chunked(*chunks: bytes, headers: Sequence[str] = (), end: bytes = b'0\r\n\r\n') -> bytes:
    """Return an HTTP response in chunks."""
    body = b''.join(b'%x\r\n%s\r\n' % (len(chunk), chunk) for chunk in chunks)
    return make_head('Transfer-Encoding: chunked', *headers) + body + end


def hang(client: socket.socket) -> None:
    """Send nothing until the client closes the connection."""
    while client.recv(65536):
        pass


def and_hang(data: bytes) -> Handler:
    """Send data and leave the connection open."""
    def answer(client: socket.socket) -> None:
        client.sendall(data)
        hang(client)
    return answer


def drip(head: bytes, end: bytes = b'') -> Handler:
    """Send head, then one byte every 30 ms, and the end only after a long time."""
    def answer(client: socket.socket) -> None:
        client.sendall(head)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            client.sendall(b'a')
            # A pause that ends early if the client sends something or closes the connection.
            if select.select([client], [], [], 0.03)[0] and not client.recv(65536):
                return
        client.sendall(end)
    return answer


def stream(head: bytes, piece: bytes, count: int | None = None, end: bytes = b'') -> Handler:
    """Send head, then piece count times (without a count: for a long time), then the end."""
    def answer(client: socket.socket) -> None:
        client.sendall(head)
        deadline = time.monotonic() + TIMEOUT
        sent = 0
        while sent < count if count is not None else time.monotonic() < deadline:
            client.sendall(piece)
            sent += 1
        client.sendall(end)
    return answer


def reset(client: socket.socket) -> None:
    """Close the connection with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))


class Site:
    """A server that sends its answers one after another, a request each; the last one is repeated."""

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None,
                 family: int = socket.AF_INET, address: Any = ('127.0.0.1', 0)) -> None:
        self.answers = answers or (response(),)
        self.requests: list[str] = []
        self._tls = tls
        self._serving = serving(self.serve, family, address)

    def __enter__(self) -> Site:
        self.port = self._serving.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)

    def url(self, path: str = '/', host: str = '127.0.0.1', user: str = '') -> str:
        scheme = 'https' if self._tls else 'http'
        return f'{scheme}://{user}{host}:{self.port}{path}'

    def serve(self, client: socket.socket) -> None:
        client.settimeout(TIMEOUT)
        if self._tls:
            client = self._tls.wrap_socket(client, server_side=True)
        with client:
            request = read_until(client, b'\r\n\r\n')
            answer = self.answers[min(len(self.requests), len(self.answers) - 1)]
            self.requests.append(request.decode('latin-1'))
            if isinstance(answer, bytes):
                client.sendall(answer)
            else:
                answer(client)


@contextmanager
def refusing() -> Iterator[socket.socket]:
    """Yield a socket that is bound to a port, but refuses connections until it listens."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        yield server
