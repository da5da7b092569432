"""fetch: URLs, headers and the search of a body as pure functions; connections and responses with real servers."""
from __future__ import annotations

import base64
import errno
import os
import resource
import select
import socket
import ssl
import threading
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Sequence

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TIMEOUT, accept_all, serving
from table import CHARACTERS, for_each
from web import Answer, Site, and_hang, chunked, drip, hang, make_head, make_tls, refusing, reset, response, stream

from superlance import __version__, fetch
from superlance.fetch import FetchFailed, Request, Response, Search, TimedOut
from superlance.rpc import Unknown

SHORT_SECONDS = 0.1


def make_seconds_left(seconds: float = TIMEOUT) -> Callable[[], float]:
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


def get(url: str, statuses: Sequence[int] = (200,), text: str | None = None, seconds: float = TIMEOUT,
        **request: Any) -> str:
    """Request a URL; return 'ok', 'no text', the line of a status that was not expected, or the failure."""
    target = fetch.parse_url(url)
    if target.tls:
        request.setdefault('tls_context', fetch.make_tls_context(False))
    try:
        got = fetch.fetch(Request(target, **request), make_seconds_left(seconds), Search(frozenset(statuses), text))
    except TimedOut:
        return 'timed out'
    except FetchFailed as why:
        return str(why)
    return {True: 'ok', False: 'no text', None: got.status_line}[got.has_text]


def get_site(answer: Answer, tls: ssl.SSLContext | None = None, **options: Any) -> str:
    with Site(answer, tls=tls) as site:
        return get(site.url(), **options)


# URLs.

TEXT_STRATEGY = st.text(CHARACTERS, max_size=40)


@for_each('text, expected', [
    ('http://localhost', (False, 'localhost', 80, '/', 'localhost')),
    ('HTTP://LocalHost/', (False, 'localhost', 80, '/', 'localhost')),
    ('https://example.com/', (True, 'example.com', 443, '/', 'example.com')),
    ('http://localhost:8080/health', (False, 'localhost', 8080, '/health', 'localhost:8080')),
    ('http://localhost:/', (False, 'localhost', 80, '/', 'localhost')),
    ('https://a.example:443/', (True, 'a.example', 443, '/', 'a.example:443')),
    ('http://h/a?b=c&d=%20#fragment', (False, 'h', 80, '/a?b=c&d=%20', 'h')),
    ('http://h?b=c', (False, 'h', 80, '/?b=c', 'h')),
    ('http://h/grün?q=ü', (False, 'h', 80, '/gr%C3%BCn?q=%C3%BC', 'h')),
    ('http://h/%2F;a=1,2/@x:y?a[]={b}|c', (False, 'h', 80, '/%2F;a=1,2/@x:y?a[]={b}|c', 'h')),
    ('http://[::1]:81/', (False, '::1', 81, '/', '[::1]:81')),
    ('http://[fe80::1%25eth0]/', (False, 'fe80::1%eth0', 80, '/', '[fe80::1]')),
    ('http://bücher.example/', (False, 'xn--bcher-kva.example', 80, '/', 'xn--bcher-kva.example')),
])
def test_parse_url(text: str, expected: tuple[Any, ...]) -> None:
    target = fetch.parse_url(text, password='unused')
    assert target[:5] == expected
    assert (target.authorization, target.shown) == (None, text)
    assert fetch.parse_url(text, shown='the webhook').shown == 'the webhook'


@for_each('user, password, pair, shown', [
    ('bob:secret@', None, b'bob:secret', 'bob:***@'),
    ('bob@', None, b'bob:', 'bob@'),
    ('bob@', 's@ü', 'bob:s@ü'.encode(), 'bob@'),
    ('bob@', '\udcff', b'bob:\xff', 'bob@'),
    ('bob:secret@', 'unused', b'bob:secret', 'bob:***@'),
    (':secret@', None, b':secret', ':***@'),
    ('bob:@', 'unused', b'bob:', 'bob:***@'),
    ('b%40b:p%3Aw%20%2Fd@', None, b'b@b:p:w /d', 'b%40b:***@'),
    ('bob:s@cret@', None, b'bob:s@cret', 'bob:***@'),
    ('bob:grün@', None, 'bob:grün'.encode(), 'bob:***@'),
    ('bob:%E9@', None, b'bob:\xe9', 'bob:***@'),
])
def test_parse_url_with_a_user(user: str, password: str | None, pair: bytes, shown: str) -> None:
    target = fetch.parse_url(f'http://{user}localhost:8080/a', password)
    assert target.authorization == 'Basic ' + base64.b64encode(pair).decode()
    assert target.shown == f'http://{shown}localhost:8080/a'
    assert (target.host, target.port, target.host_header) == ('localhost', 8080, 'localhost:8080')


@for_each('text, reason', [
    ('', 'is neither http nor https'),
    ('localhost:8080', 'is neither http nor https'),
    ('ftp://bob:secret@localhost/', 'is neither http nor https'),
    ('http:', 'has no host'),
    ('http:///health', 'has no host'),
    ('http://:80/', 'has no host'),
    ('http://bob:secret@/', 'has no host'),
    ('http://bob:secret@localhost:0/', 'has a port that is not a number from 1 to 65535'),
    ('http://bob:secret@localhost:65536/', 'has a port that is not a number from 1 to 65535'),
    ('http://bob:secret@localhost:http/', 'has a port that is not a number from 1 to 65535'),
    ('http://bob:secret@localhost/a b', 'contains a space or a control character'),
    ('http://bob:secret@localhost/\n', 'contains a space or a control character'),
    ('http://bob:sec\tret@localhost/', 'contains a space or a control character'),
    ('http://bob:secret@local\udcffhost/', 'contains a space or a control character'),
    ('http://bob:secret@[::1/', 'is invalid'),
    ('http://bob:secret@ho\u2100st/', 'is invalid'),
    ('http://bob:secret@ü..example/', 'has an invalid host name: '),
    ('http://bob:secret@{}.example/'.format('ü' * 64), 'has an invalid host name: '),
])
def test_parse_url_rejects_an_invalid_url_and_hides_its_password(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r'^URL ') as raised:
        fetch.parse_url(text)
    message = str(raised.value)
    assert reason in message
    assert message.endswith('; write a URL such as http://127.0.0.1:8080/health')
    assert message.isprintable()
    assert 'ret' not in message
    with pytest.raises(ValueError, match=r"^URL 'the webhook' "):
        fetch.parse_url(text, shown='the webhook')


@given(TEXT_STRATEGY | st.builds('http://{}@{}:{}/{}'.format, *[TEXT_STRATEGY] * 4))
def test_parse_url_of_any_text(text: str) -> None:
    try:
        target = fetch.parse_url(text)
    except ValueError as why:
        message = str(why)
    else:
        message = ''
        line = target.path + target.host_header + target.host
        assert line.isascii()
        assert line.isprintable()
        assert ' ' not in line
        assert 0 < target.port < 65536
    assert message.isprintable()


# Headers.

@pytest.mark.parametrize(('request_', 'expected'), [
    (dict(), [('Host', 'a:81'), ('User-Agent', 'superlance/' + __version__), ('Accept', '*/*'),
              ('Accept-Encoding', 'identity'), ('Connection', 'close'), ('Authorization', 'Basic Yjpw')]),
    (dict(headers=(('host', 'b'), ('USER-AGENT', 'me'), ('Accept', 'a/b'), ('Accept', 'c/d'),
                   ('accept-encoding', 'gzip'), ('Connection', 'keep-alive'), ('authorization', 'Bearer x'))),
     [('host', 'b'), ('USER-AGENT', 'me'), ('Accept', 'a/b'), ('Accept', 'c/d'),
      ('accept-encoding', 'gzip'), ('Connection', 'keep-alive'), ('authorization', 'Bearer x')]),
])
def test_make_headers(request_: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert fetch.make_headers(Request(fetch.parse_url('http://b:p@a:81/'), **request_)) == expected


def request_lines(path: str = '/', user: str = '', **options: Any) -> list[str]:
    """Request a good server and return the lines of the request."""
    with Site() as site:
        assert get(site.url(path, user=user), **options) == 'ok'
        assert len(site.requests) == 1
        return site.requests[0].replace(f':{site.port}\r', ':PORT\r').split('\r\n')[:-2]


def test_the_request() -> None:
    assert request_lines(path='/health?a=b&c=%20d#e') == [
        'GET /health?a=b&c=%20d HTTP/1.1', 'Host: 127.0.0.1:PORT', 'User-Agent: superlance/' + __version__,
        'Accept: */*', 'Accept-Encoding: identity', 'Connection: close']


def test_the_request_has_basic_authentication_and_headers_in_utf_8() -> None:
    lines = request_lines(user='b%40b:p%3Aw%20d@', headers=(('Host', 'a.example'), ('X', 'grün')))
    assert 'Authorization: Basic ' + base64.b64encode(b'b@b:p:w d').decode() in lines
    assert [line for line in lines if line.startswith('Host')] == ['Host: a.example']
    assert lines[-1] == 'X: ' + 'grün'.encode().decode('latin-1')


# A POST, and what a webhook needs of its response.

def post(answer: Answer, seconds: float = TIMEOUT) -> tuple[Response, str]:
    """Post to a server; wait for each part of its response so many seconds, counted from when it begins to answer."""
    body = b'{"text": "hello"}'
    is_answering = threading.Event()

    def serve(client: socket.socket) -> None:
        while not site.requests[0].encode().endswith(body):
            site.requests[0] += client.recv(65536).decode()
        is_answering.set()
        client.sendall(answer) if isinstance(answer, bytes) else answer(client)

    with Site(serve) as site:
        request = Request(fetch.parse_url(site.url('/hook')), 'POST', (('Content-Type', 'application/json'),), body)
        return fetch.fetch(request, lambda: seconds if is_answering.is_set() else TIMEOUT), site.requests[0]


def test_post_sends_a_body_and_returns_status_headers_and_an_excerpt() -> None:
    got, sent = post(response(b'too fast ' + b'x' * 5000, 'Retry-After: 7', status='429 Too\x07Many Requests'))
    head, _, body = sent.partition('\r\n\r\n')
    assert head.startswith('POST /hook HTTP/1.1\r\n')
    assert '\r\nContent-Length: 17\r\n' in head
    assert head.endswith('\r\nContent-Type: application/json')
    assert body == '{"text": "hello"}'
    assert (got.status, got.reason, got.headers.get('retry-after')) == (429, r'Too\x07Many Requests', '7')
    assert got.excerpt == (b'too fast ' + b'x' * 5000)[:500]
    assert got.has_text is None


@pytest.mark.parametrize(('answer', 'excerpt'), [
    (response(b'', status='204 No Content'), b''),
    (make_head(status='500 No') + b'why', b'why'),
    (chunked(b'why ', b'not'), b'why not'),
    (chunked(b'why', end=b'zz'), b'why'),
    (and_hang(make_head('Content-Length: 99') + b'why'), b'why'),
    (make_head('Content-Length: 99') + b'why', b'why'),
])
def test_a_status_counts_even_if_the_body_does_not_arrive(answer: Answer, excerpt: bytes) -> None:
    assert post(answer, seconds=0.3)[0].excerpt == excerpt


def test_an_empty_post_has_a_length() -> None:
    assert ('Content-Length', '0') in fetch.make_headers(Request(fetch.parse_url('http://a/'), 'POST'))


def test_a_refused_connection_fails_at_once_unless_a_retry_is_wanted() -> None:
    started = time.monotonic()
    with refusing() as server, pytest.raises(FetchFailed, match=r'^Connection refused$'):
        fetch.fetch(Request(fetch.parse_url(f'http://127.0.0.1:{server.getsockname()[1]}/'), 'POST'),
                    make_seconds_left())
    assert time.monotonic() - started < TIMEOUT / 2


# The body.

@for_each('text, charset, expected', [
    ('ok', None, {b'ok'}),
    ('grün', 'latin-1', {b'gr\xc3\xbcn', b'gr\xfcn'}),
    ('grün', 'utf-16', {b'gr\xc3\xbcn', 'grün'.encode('utf-16'), b'g\0r\0\xfc\0n\0', b'\0g\0r\0\xfc\0n'}),
    ('日本', 'latin-1', {'日本'.encode()}),
    ('grün', 'nonsense', {b'gr\xc3\xbcn'}),
    ('grün', 'hex', {b'gr\xc3\xbcn'}),
    ('grün', 'utf-8\0', {b'gr\xc3\xbcn'}),
    ('gr\udcfcn', 'utf-8', {b'gr\xfcn'}),
    ('\xad', 'idna', {b'\xc2\xad'}),
])
def test_encode_text(text: str, charset: str | None, expected: set[bytes]) -> None:
    assert set(fetch.encode_text(text, charset)) == expected


@pytest.mark.parametrize(('texts', 'stream_'), [
    ([b'fine'], b'all is fine.'), ([b'fine'], b'fine'), ([b'x'], b'abx'), ([b'fine', b'longer text'], b'it is fine'),
    ([b'fine', b'longer text'], b'a longer text'), ([b'aab'], b'aaaab')])
def test_a_text_is_found_however_the_stream_is_split(texts: list[bytes], stream_: bytes) -> None:
    # Every way to split the stream in up to three pieces, then byte by byte.
    splits = [[stream_[:i], stream_[i:j], stream_[j:]] for i in range(len(stream_)) for j in range(i, len(stream_))]
    for pieces in [*splits, [stream_[i:i + 1] for i in range(len(stream_))]]:
        find = fetch.TextSearch(texts)
        assert any(find.is_found_with(piece) for piece in pieces), pieces


@settings(max_examples=150)
@given(st.lists(st.text('ab', min_size=1, max_size=5), min_size=1, max_size=3), st.lists(st.text('ab', max_size=6)))
def test_a_text_is_found_in_pieces_if_and_only_if_in_the_whole(texts: list[str], pieces: list[str]) -> None:
    find = fetch.TextSearch([text.encode() for text in texts])
    for number, piece in enumerate(pieces, 1):
        found = find.is_found_with(piece.encode())
        assert found == any(text in ''.join(pieces[:number]) for text in texts)
        if found:
            break
        assert len(find.tail) < max(map(len, texts))   # so memory does not grow with the body


# Responses, good and bad.

TEXT: dict[str, Any] = dict(text='fine')
GREEN: dict[str, Any] = dict(text='grün')
SHORT: dict[str, Any] = dict(seconds=SHORT_SECONDS)
UTF_8, LATIN_1 = ('Content-Type: text/html; charset=' + name for name in ('utf-8', 'ISO-8859-1'))

GOOD: dict[str, tuple[Answer, dict[str, Any]]] = {
    'plain': (response(), {}),
    'body': (response(b'all is fine.'), TEXT),
    'empty body': (response(b''), {}),
    'no reason phrase': (response(status='200'), {}),
    'HTTP/1.0': (b'HTTP/1.0 200 OK\r\n\r\nfine', TEXT),
    'until the connection ends': (make_head() + b'fine', TEXT),
    'left open after the body': (and_hang(response()), {}),
    'left open in the body, after the text': (and_hang(make_head('Content-Length: 99') + b'fine'), TEXT),
    'left open after 204': (and_hang(make_head(status='204 No Content')), dict(statuses=[204])),
    'another status': (response(status='503 Busy'), dict(statuses=[503])),
    'one of several statuses': (response(status='503 Busy'), dict(statuses=[200, 503, 204])),
    'a redirect that is expected': (response(b'', 'Location: /x', status='302 Found'), dict(statuses=[302])),
    'after 100 Continue': (make_head(status='100 Continue') + response(b'fine'), TEXT),
    'after early hints': (make_head(status='103 Early Hints') * 2 + response(b'fine'), TEXT),
    'early hints that are expected': (make_head(status='103 Early Hints') + response(b'fine'), dict(statuses=[103])),
    'chunks': (chunked(b'a', b'bc'), {}),
    'chunks, left open': (and_hang(chunked(b'a', b'bc')), {}),
    'no chunk at all': (chunked(), {}),
    'text in a chunk': (chunked(b'a', b'all is fine', b'b'), TEXT),
    'text across chunks': (chunked(b'all is f', b'i', b'ne'), TEXT),
    'chunks with extensions and a trailer': (chunked(end=b'4;x=y\r\nfine\r\n0\r\nX: y\r\n\r\n'), TEXT),
    'text across pieces': (response(b'x' * (64 * 1024 - 2) + b'fine'), TEXT),
    'text at the end of much': (response(b'x' * 3000000 + b'fine'), TEXT),
    'non-ASCII in UTF-8': (response('grün'.encode(), UTF_8), GREEN),
    'non-ASCII in UTF-8, no charset given': (response('grün'.encode()), GREEN),
    'non-ASCII in UTF-8, another charset given': (response('grün'.encode(), LATIN_1), GREEN),
    'non-ASCII in the charset': (response('grün'.encode('latin-1'), LATIN_1), GREEN),
    'the charset in quotes': (response('日本'.encode('euc-jp'), 'content-type: text/x; charset="EUC-JP"'),
                              dict(text='日本')),
    'UTF-16': (response('ist grün'.encode('utf-16-be'), 'Content-Type: text/html; charset=UTF-16'), GREEN),
    'non-ASCII across chunks': (chunked(b'gr\xc3', b'\xbcn'), GREEN),
    'an invalid charset': (response(b'fine', 'Content-Type: text/html; charset=\0'), TEXT),
    'a length that is not a number': (make_head('Content-Length: many') + b'fine', TEXT),
    'endless, without a text': (stream(make_head(), b'x' * 65536), {}),
    'endless chunks, without a text': (stream(chunked(end=b''), b'ffff\r\n%s\r\n' % (b'x' * 65535)), {}),
}


@pytest.mark.parametrize('name', GOOD)
def test_good_response(name: str) -> None:
    answer, options = GOOD[name]
    assert get_site(answer, **options) == 'ok'


INCOMPLETE = 'the response body is incomplete'
NEGATIVE = 'a chunk of the response body has a negative length'

BAD: dict[str, tuple[Answer, dict[str, Any], str]] = {
    'status': (response(status='404 Not Here'), {}, '404 Not Here'),
    'no reason phrase': (response(status='404'), {}, '404'),
    'a redirect is not followed': (response(b'', 'Location: /', status='302 Found'), {}, '302 Found'),
    'switching protocols': (make_head(status='101 Switching Protocols'), {}, '101 Switching Protocols'),
    'not one of several': (response(), dict(statuses=[201, 204]), '200 OK'),
    'status before body': (response(b'fine', status='500 No'), TEXT, '500 No'),
    'a bad status whose body stops': (and_hang(make_head('Content-Length: 9', status='500 No')), {}, '500 No'),
    'no body': (response(b''), TEXT, 'no text'),
    'other body': (response(b'fin'), TEXT, 'no text'),
    'other chunks': (chunked(b'fi', b'-', b'ne'), TEXT, 'no text'),
    'text in a header': (response(b'bad', 'X: fine'), TEXT, 'no text'),
    'text in a trailer': (chunked(end=b'0\r\nX: fine\r\n\r\n'), TEXT, 'no text'),
    'text after the end': (response(b'bad') + b'fine', TEXT, 'no text'),
    'text after 204': (make_head(status='204 No Content') + b'fine', dict(statuses=[204], **TEXT), 'no text'),
    'another charset': (response('grün'.encode('latin-1'), UTF_8), GREEN, 'no text'),
    'sends nothing': (hang, SHORT, 'timed out'),
    'drips a status line': (drip(b'HTTP/1.1 200 ', b'\r\n\r\n'), SHORT, 'timed out'),
    'drips a header': (drip(make_head()[:-2] + b'X: ', b'\r\n\r\n'), SHORT, 'timed out'),
    'drips a body': (drip(make_head()), SHORT, 'timed out'),
    'drips a body without the text': (drip(make_head(), b'fine'), dict(SHORT, **TEXT), 'timed out'),
    'drips a chunk': (drip(chunked(end=b'ffff\r\n')), SHORT, 'timed out'),
    'a body that stops': (and_hang(make_head('Content-Length: 9') + b'fin'), SHORT, 'timed out'),
    'endless without the text': (stream(make_head(), b'x' * 65536, end=b'fine'), dict(SHORT, **TEXT), 'timed out'),
    'endless 103 Early Hints': (stream(b'', 500 * make_head(status='103 Early Hints'), end=response()), SHORT,
                                'timed out'),
    'endless 100 Continue': (stream(b'', 500 * make_head(status='100 Continue'), end=response()), SHORT, 'timed out'),
    'closed without an answer': (b'', {}, 'Remote end closed connection without response'),
    'reset': (reset, {}, 'Connection reset by peer'),
    'another protocol': (b'SSH-2.0-x\r\n', {}, "not an HTTP response: 'SSH-2.0-x\\r\\n'"),
    'garbage': (b'\0\xff\x1b' * 20000 + b'\n', {}, r"not an HTTP response: '\x00ÿ\x1b\x00"),
    'HTTP/2': (b'HTTP/2.0 200 OK\r\n\r\n', {}, "not an HTTP response: 'HTTP/2.0'"),
    'no status': (b'HTTP/1.1 OK\r\n\r\n', {}, 'not an HTTP response: '),
    'short': (make_head('Content-Length: 10') + b'ok', {}, INCOMPLETE),
    'short, without the text': (make_head('Content-Length: 9') + b'ok', TEXT, INCOMPLETE),
    'short, of an absurd length': (make_head('Content-Length: ' + '9' * 4000) + b'ok', {}, INCOMPLETE),
    'a chunk whose length is not a number': (chunked(b'a', end=b'zz\r\nok\r\n0\r\n\r\n'), {}, INCOMPLETE),
    'a first chunk whose length is not a number': (chunked(end=b'zz\r\nok\r\n0\r\n\r\n'), {}, INCOMPLETE),
    'cut off before a chunk': (chunked(b'ok', end=b''), {}, INCOMPLETE),
    'cut off in a chunk': (chunked(end=b'5\r\nok'), {}, INCOMPLETE),
    'cut off in a chunk of absurd length': (chunked(end=b'f' * 40 + b'\r\nok'), {}, INCOMPLETE),
    'a chunk of negative length': (and_hang(chunked(end=b'-5\r\nok\r\n0\r\n\r\n')), {}, NEGATIVE),
    'a negative length, with the text': (chunked(end=b'-1\r\nfine'), TEXT, NEGATIVE),
    '500 headers': (make_head(*['X: y'] * 500) + b'ok', {}, 'got more than 100 headers'),
    'endless header': (stream(make_head()[:-2] + b'X: ', b'y' * 65536), {},
                       'got more than 65536 bytes when reading header line'),
    'endless status line': (stream(b'HTTP/1.1 200 ', b'y' * 65536), {},
                            'got more than 65536 bytes when reading status line'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_response(name: str) -> None:
    answer, options, expected = BAD[name]
    got = get_site(answer, **options)
    assert got.startswith(expected)
    assert got.isprintable()
    assert len(got) < 900


def test_a_reason_phrase_is_cut_and_made_one_printable_line() -> None:
    got = get_site(response(status='500 bad\x1b[2J\x07\rSubject: hacked\x85' + 'x' * 3000))
    assert got.startswith(r'500 bad\x1b[2J\x07 | Subject: hacked | xxx')
    assert got.isprintable()
    assert len(got) < 300


def test_no_more_than_a_mebibyte_is_read_without_a_text() -> None:
    sent_bytes = 0

    def answer(client: socket.socket) -> None:
        nonlocal sent_bytes
        client.sendall(make_head())
        with suppress(OSError):
            while sent_bytes < 1 << 28:
                sent_bytes += client.send(b'x' * 65536)

    assert get_site(answer) == 'ok'
    assert sent_bytes < 1 << 26     # the kernel's buffers come on top of what is read


def test_the_seconds_of_a_response_include_the_connection() -> None:
    def answer(client: socket.socket) -> None:
        select.select([client], [], [], 0.2)
        client.sendall(response())
    with Site(answer) as site:
        got = fetch.fetch(Request(fetch.parse_url(site.url())), make_seconds_left(), Search(frozenset([200])))
    assert 0.2 <= got.seconds < TIMEOUT


def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Site() as proxy, Site() as site:
        for name in ('http_proxy', 'HTTP_PROXY', 'https_proxy', 'all_proxy', 'ALL_PROXY'):
            monkeypatch.setenv(name, proxy.url())
        monkeypatch.delenv('no_proxy', raising=False)
        assert get(site.url()) == 'ok'
        assert (len(site.requests), proxy.requests) == (1, [])


# Addresses and connections.

@pytest.mark.parametrize(('family', 'bound', 'host'), [
    (socket.AF_INET6, '::1', '[::1]'),
    (socket.AF_INET, '127.0.0.1', '[::ffff:127.0.0.1]'),    # an address that does not end in a number
    (socket.AF_INET, '127.0.0.1', 'localhost'),
])
def test_hosts(family: int, bound: str, host: str) -> None:
    with ExitStack() as stack:
        try:
            site = stack.enter_context(Site(family=family, address=(bound, 0)))
        except OSError:
            pytest.skip('this machine has no IPv6')
        if host.startswith('['):
            try:
                socket.create_connection((host.strip('[]'), site.port), TIMEOUT).close()
            except OSError:
                pytest.skip('this machine has no IPv6')
        assert get(site.url(host=host)) == 'ok'
        assert f'Host: {host}:{site.port}\r\n' in site.requests[-1]


def resolve_with(monkeypatch: pytest.MonkeyPatch, look_up: Callable[[], list[tuple[int, Any]]]) -> None:
    """Let look_up find the addresses of every host."""
    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        return [(family, socket.SOCK_STREAM, 6, '', address) for family, address in look_up()]
    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing() as dead, Site() as site:
        # The first is of a family that this machine does not have, as IPv6 may be.
        resolve_with(monkeypatch, lambda: [(999, ()), (socket.AF_INET, dead.getsockname()),
                                           (socket.AF_INET, ('127.0.0.1', site.port))])
        assert get('http://a.example/') == 'ok'


def test_an_address_that_discards_packets_leaves_time_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as full, Site() as site:
        full.bind(('127.0.0.1', 0))
        full.listen(0)
        clients = [socket.socket() for _ in range(3)]
        try:
            for client in clients:
                client.settimeout(0.2)
                try:
                    client.connect(full.getsockname())
                except socket.timeout:
                    break
            else:
                pytest.skip('a full queue does not discard packets here')
            given: list[float] = []
            really_open = fetch._open_socket

            def open_socket(family: int, address: Any, timeout_seconds: float) -> socket.socket:
                given.append(timeout_seconds)
                return really_open(family, address, timeout_seconds)
            monkeypatch.setattr(fetch, '_open_socket', open_socket)
            resolve_with(monkeypatch, lambda: [(socket.AF_INET, full.getsockname()),
                                               (socket.AF_INET, ('127.0.0.1', site.port))])
            seconds_left = iter([0.4])  # for both of them, and then for the rest
            got = fetch.fetch(Request(fetch.parse_url('http://a.example/')), lambda: next(seconds_left, TIMEOUT))
            assert got.status == 200 and given[0] == 0.2
            resolve_with(monkeypatch, lambda: [(socket.AF_INET, full.getsockname())])
            assert get('http://a.example/', **SHORT) == 'timed out'
        finally:
            for client in clients:
                client.close()


@pytest.mark.parametrize(('error', 'expected'), [
    (socket.gaierror(socket.EAI_NONAME, 'Name or service not known'), FetchFailed),
    (socket.gaierror(socket.EAI_FAIL, 'Non-recoverable failure'), FetchFailed),
    (socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution'), Unknown),
    (socket.gaierror(socket.EAI_MEMORY, 'Memory allocation failure'), Unknown),
])
def test_a_missing_name_is_a_failure_and_a_temporary_dns_failure_is_unknown(
        error: socket.gaierror, expected: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up() -> list[tuple[int, Any]]:
        raise error
    resolve_with(monkeypatch, look_up)
    with pytest.raises(expected) as raised:
        get('http://a.example/') if expected is Unknown else fetch.fetch(
            Request(fetch.parse_url('http://a.example/')), make_seconds_left())
    assert str(raised.value) == f'DNS lookup of a.example failed: {error.strerror}'


def test_a_name_that_cannot_be_looked_up_for_lack_of_file_descriptors_is_unknown(
        monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def look_up() -> list[tuple[int, Any]]:     # as the first look-up of a process with glibc
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
    resolve_with(monkeypatch, look_up)
    try:
        with pytest.raises(Unknown, match='Too many open files'):
            get('http://localhost/')
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def fail_to_connect(monkeypatch: pytest.MonkeyPatch, *failures: OSError) -> None:
    """Make the first attempts to connect fail."""
    really_open, left = fetch._open_socket, list(failures)

    def open_socket(family: int, address: Any, timeout_seconds: float) -> socket.socket:
        if left:
            raise left.pop(0)
        return really_open(family, address, timeout_seconds)
    monkeypatch.setattr(fetch, '_open_socket', open_socket)


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize('number', [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_exhausted_resources_of_the_listener_are_unknown(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_connect(monkeypatch, os_error(number))
    with pytest.raises(Unknown) as raised:
        get('http://127.0.0.1:1/')
    assert str(raised.value) == os.strerror(number)


@pytest.mark.parametrize('number', [errno.EACCES, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT])
def test_network_errors_are_failures(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_connect(monkeypatch, os_error(number))
    assert get('http://127.0.0.1:1/') == os.strerror(number)


@pytest.mark.parametrize('number', [errno.EACCES, errno.EPERM])
def test_a_unix_socket_that_may_not_be_opened_is_unknown(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_connect(monkeypatch, os_error(number))
    with pytest.raises(Unknown) as raised:
        get('http://localhost/', unix_socket='/run/web.sock')
    assert str(raised.value) == f'unable to connect to /run/web.sock: {os.strerror(number)}'


def on_pause(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object] = lambda: None) -> list[float]:
    """Call action in place of the first pause; return the seconds of the pauses."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        if not pauses:
            action()
        pauses.append(seconds)
    monkeypatch.setattr(fetch, 'time', SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    return pauses


@pytest.mark.parametrize('others', [[], [os_error(errno.EHOSTUNREACH)]])
def test_a_refused_connection_is_retried(others: list[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site()
    refused = os_error(errno.ECONNREFUSED)
    with refusing() as server:
        resolve_with(monkeypatch, lambda: [(socket.AF_INET, server.getsockname())] * (1 + len(others)))
        fail_to_connect(monkeypatch, refused, *others)

        def start() -> None:
            server.listen(5)
            accept_all(server, site.serve)
        pauses = on_pause(monkeypatch, start)
        assert get('http://web.example/', retry_refused=True) == 'ok'
        server.shutdown(socket.SHUT_RDWR)
    assert pauses == [1]


def test_a_refused_connection_fails_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = on_pause(monkeypatch)
    with refusing() as server, pytest.raises(FetchFailed, match=r'^Connection refused$'):
        fetch.fetch(Request(fetch.parse_url(f'http://127.0.0.1:{server.getsockname()[1]}/'), retry_refused=True),
                    lambda: 2.5 - sum(pauses))
    assert pauses == [1, 1, 0.5]


def test_a_unix_socket_that_does_not_exist_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / 'web.sock')
    site = Site(family=socket.AF_UNIX, address=path)
    options: dict[str, Any] = dict(unix_socket=path, retry_refused=True)
    assert get('http://localhost/', **SHORT, **options) == 'No such file or directory'
    on_pause(monkeypatch, site.__enter__)
    assert get('http://localhost/', **options) == 'ok'
    site.__exit__()


def test_a_unix_socket_whose_queue_is_full_for_a_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / 'web.sock')
    clients = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(1)
        try:
            for client in clients:
                client.setblocking(False)
                client.connect(path)
            pytest.skip('the queue of a unix socket does not get full here')
        except BlockingIOError:
            pass
        finally:
            for client in clients:
                client.close()
        pauses = on_pause(monkeypatch, lambda: accept_all(server, Site().serve))
        assert get('http://localhost/', unix_socket=path, retry_refused=True) == 'ok'
        assert pauses
        server.shutdown(socket.SHUT_RDWR)


def test_a_unix_socket_gets_the_host_of_the_url(tmp_path: Path) -> None:
    path = str(tmp_path / 'web.sock')
    with Site(family=socket.AF_UNIX, address=path) as site:
        # http.client must not take the last group of the address for a port.
        for host in ('a.example', 'a.example:81', '[fd00::a]', '[::1]:8080'):
            assert get(f'http://{host}/x', unix_socket=path) == 'ok'
            assert site.requests[-1].startswith(f'GET /x HTTP/1.1\r\nHost: {host}\r\n')


def test_a_deadline_that_is_further_away_than_a_socket_can_wait() -> None:
    def answer(client: socket.socket) -> None:
        select.select([client], [], [], 0.5)
        client.sendall(response())
    # A little more than 2 ** 32 ms, of which poll() would see only the little.
    assert get_site(answer, seconds=4294967.4) == 'ok'


def test_nothing_is_connected_after_the_deadline() -> None:
    with Site() as site:
        assert get(site.url(), seconds=-1) == 'timed out'
        assert site.requests == []


# TLS.

@pytest.fixture(scope='module')
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope='module')
def cafile(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('ca') / 'ca.pem'
    ca.cert_pem.write_to_path(str(path))
    return str(path)


def make_site_tls(kind: str, ca: trustme.CA) -> ssl.SSLContext:
    """Return the context of a server whose certificate is good, or has the fault that kind names."""
    if kind == 'unknown':
        return make_tls(trustme.CA())
    if kind == 'expired':
        return make_tls(ca, not_after=datetime(2020, 1, 1))
    return make_tls(ca, *(['a.example'] if kind == 'other name' else []))


@pytest.mark.parametrize('kind', ['good', 'other name', 'expired', 'unknown'])
def test_no_certificate_is_verified_by_default(kind: str, ca: trustme.CA) -> None:
    context = make_site_tls(kind, ca)
    assert get_site(response(b'fine'), tls=context, **TEXT) == 'ok'
    assert get_site(chunked(b'fi', b'ne'), tls=context, **TEXT) == 'ok'


def test_a_certificate_from_the_ca_is_accepted(ca: trustme.CA, cafile: str) -> None:
    with Site(tls=make_tls(ca)) as site:
        for host in ('127.0.0.1', 'localhost'):
            assert get(site.url(host=host), tls_context=fetch.make_tls_context(False, cafile)) == 'ok'


def test_the_ca_certificates_of_the_system(ca: trustme.CA, cafile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Site(tls=make_tls(ca)) as site:
        assert 'certificate verify failed' in get(site.url(), tls_context=fetch.make_tls_context(True))
        monkeypatch.setenv('SSL_CERT_FILE', cafile)     # where OpenSSL then finds the system's
        assert get(site.url(), tls_context=fetch.make_tls_context(True)) == 'ok'


@pytest.mark.parametrize('path', ['/nonexistent', __file__])
def test_a_ca_file_that_cannot_be_used(path: str) -> None:
    with pytest.raises(OSError, match=r'.'):
        fetch.make_tls_context(False, path)


@pytest.mark.parametrize(('kind', 'reason'), [
    ('other name', "certificate is not valid for '127.0.0.1'"),
    ('expired', 'certificate has expired'),
    ('unknown', 'unable to get local issuer certificate'),
])
def test_a_bad_certificate(kind: str, reason: str, ca: trustme.CA, cafile: str) -> None:
    with Site(tls=make_site_tls(kind, ca)) as site:
        got = get(site.url(), tls_context=fetch.make_tls_context(True, cafile))
        assert 'certificate verify failed: ' in got
        assert reason in got
        assert site.requests == []


def test_a_certificate_over_a_unix_socket(ca: trustme.CA, cafile: str, tmp_path: Path) -> None:
    path = str(tmp_path / 'web.sock')
    with Site(tls=make_tls(ca, 'a.example'), family=socket.AF_UNIX, address=path):
        options: dict[str, Any] = dict(unix_socket=path, tls_context=fetch.make_tls_context(True, cafile))
        assert get('https://a.example/', **options) == 'ok'
        assert "not valid for 'b.example'" in get('https://b.example/', **options)


@pytest.mark.parametrize('name', ['sends nothing', 'drips a body', 'drips a header', 'short',
                                  'closed without an answer', 'endless without the text'])
def test_a_bad_response_over_tls(name: str, ca: trustme.CA) -> None:
    answer, options, text = BAD[name]
    assert get_site(answer, tls=make_tls(ca), **options) == text


@pytest.mark.parametrize(('handle', 'expected'), [
    (hang, 'timed out'),
    (drip(b'\x16\x03\x03\x40\x00\x02\x00\x3f\xfc'), 'timed out'),     # a TLS record of 16 KiB, never complete
    (and_hang(response()), 'SSL'),
])
def test_a_server_that_does_not_complete_the_handshake(handle: Any, expected: str) -> None:
    with serving(handle) as port:
        got = get(f'https://127.0.0.1:{port}/', seconds=SHORT_SECONDS if expected == 'timed out' else TIMEOUT)
        assert expected in got
        assert got.isprintable()


def test_fetch_is_thread_safe() -> None:
    # httpok's check runs on a thread, and a webhook's POST on another.
    with Site() as site:
        results: list[str] = []
        threads = [threading.Thread(target=lambda: results.append(get(site.url()))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
    assert results == ['ok'] * 8


def test_no_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError
    monkeypatch.setattr(fetch, 'exchange', fail)
    with Site() as site, pytest.raises(Unknown, match='Cannot allocate memory'):
        get(site.url())
