"""httpok: its pure functions, its check against real servers, and the listener with a real supervisord."""
from __future__ import annotations

import base64
import errno
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence, Union
from xmlrpc.server import SimpleXMLRPCServer

import pytest
import trustme
from inbox import CommandInbox
from support import (
    C_LOCALE,
    PYTHON,
    TIMEOUT,
    Listener,
    Supervisord,
    accept_all,
    find_children,
    is_alive,
    read,
    read_until,
    run_by_hand,
    serving,
    wait_for,
    write_script,
)

from superlance import __version__, httpok
from superlance.listener import Ended, Event
from superlance.options import Rate, read_argv
from superlance.processes import RESTARTED, RUNNING, STARTING, STOPPED, Name, Outcome, Process

Handler = Callable[[socket.socket], None]
# What a server does with a connection whose request it has read.
Answer = Union[bytes, Handler]

SHORT = '0.4'   # the timeout, in seconds, of a check that is to fail by it


# The rig: servers whose answers a test writes, mail that lands in a file.

def reply(body: bytes = b'ok', *headers: str, status: str = '200 OK') -> bytes:
    """Return an HTTP reply with a Content-Length."""
    return make_head('Content-Length: %d' % len(body), *headers, status=status) + body


def make_head(*headers: str, status: str = '200 OK') -> bytes:
    return '\r\n'.join(['HTTP/1.1 ' + status, *headers, '', '']).encode('latin-1')


def chunked(*chunks: bytes, headers: Sequence[str] = (), end: bytes = b'0\r\n\r\n') -> bytes:
    """Return an HTTP reply in chunks."""
    body = b''.join(b'%x\r\n%s\r\n' % (len(chunk), chunk) for chunk in chunks)
    return make_head('Transfer-Encoding: chunked', *headers) + body + end


def hang(client: socket.socket) -> None:
    """Say nothing until the client goes."""
    while client.recv(65536):
        pass


def and_hang(data: bytes) -> Handler:
    """Send data and leave the connection open."""
    def answer(client: socket.socket) -> None:
        client.sendall(data)
        hang(client)
    return answer


def drip(head: bytes, end: bytes = b'') -> Handler:
    """Send head, then a byte again and again, and only after a long time the end."""
    def answer(client: socket.socket) -> None:
        client.sendall(head)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            client.sendall(b'a')
            # A pause, which what the client has sent ends, and so does its end.
            if select.select([client], [], [], 0.03)[0] and not client.recv(65536):
                return
        client.sendall(end)
    return answer


def stream(head: bytes, piece: bytes, count: int | None = None, end: bytes = b'') -> Handler:
    """Send head, then piece so many times, for a long time where no count is given, then the end."""
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
    """Make the end of the connection a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))


class Site:
    """A server that answers its requests with one answer after another; the last one stays."""

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None,
                 family: int = socket.AF_INET, address: Any = ('127.0.0.1', 0)) -> None:
        self.answers = answers or (reply(),)
        self.requests: list[str] = []
        self._tls = tls
        self._serving = serving(self.serve, family, address)

    def __enter__(self) -> Site:
        self.port = self._serving.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)

    def url(self, path: str = '/', host: str = '127.0.0.1', user: str = '') -> str:
        return '%s://%s%s:%d%s' % ('https' if self._tls else 'http', user, host, self.port, path)

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
    """Yield a socket whose port is taken, but refuses connections until it listens."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        yield server


def build(*argv: str) -> httpok.Options:
    return httpok.build_options(*read_argv(argv, httpok.OPTIONS))


def check(*argv: str, resolver: httpok.Resolver | None = None) -> httpok.Verdict:
    """Check a URL with options, and return the verdict."""
    return httpok.check(build(*argv), resolver or httpok.Resolver())[1]


def check_site(answer: Answer, *argv: str, tls: ssl.SSLContext | None = None) -> httpok.Verdict:
    with Site(answer, tls=tls) as site:
        return check(*argv, site.url())


GOOD = httpok.Verdict('', '')


def mail_to(inbox: CommandInbox) -> list[str]:
    """Return the options that send all mail to an inbox."""
    return ['-m', 'bob@example.com', '-s', inbox.command]


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


def run_once(*arguments: str, folder: Path | None = None, **environment: str) -> tuple[int, str, str]:
    """Run `httpok --once`; return its exit status and what it printed."""
    run = run_by_hand('httpok', '--once', *arguments, folder=folder, **environment)
    return run.returncode, run.stdout, run.stderr


# Options.

@pytest.mark.parametrize('text, expected', [
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
    target = httpok.parse_url(text)
    assert target[:5] == expected
    assert (target.authorization, target.shown) == (None, text)


@pytest.mark.parametrize('user, pair, shown', [
    ('bob:secret@', b'bob:secret', 'bob:***@'),
    ('bob@', b'bob:', 'bob@'),
    (':secret@', b':secret', ':***@'),
    ('bob:@', b'bob:', 'bob:***@'),
    ('b%40b:p%3Aw%20%2Fd@', b'b@b:p:w /d', 'b%40b:***@'),
    ('bob:s@cret@', b'bob:s@cret', 'bob:***@'),
    ('bob:grün@', 'bob:grün'.encode(), 'bob:***@'),
    ('bob:%E9@', b'bob:\xe9', 'bob:***@'),
])
def test_parse_url_with_a_user(user: str, pair: bytes, shown: str) -> None:
    target = httpok.parse_url(f'http://{user}localhost:8080/a')
    assert target.authorization == 'Basic ' + base64.b64encode(pair).decode()
    assert target.shown == f'http://{shown}localhost:8080/a'
    assert (target.host, target.port, target.host_header) == ('localhost', 8080, 'localhost:8080')


BAD_URLS = [
    ('', 'is neither http nor https'),
    ('localhost:8080', 'is neither http nor https'),
    ('ftp://bob:secret@localhost/', 'is neither http nor https'),
    ('http:', 'has no host'),
    ('http:///health', 'has no host'),
    ('http://:80/', 'has no host'),
    ('http://bob:secret@/', 'has no host'),
    ('http://bob:secret@localhost:0/', 'has a port that is no number from 1 to 65535'),
    ('http://bob:secret@localhost:65536/', 'has a port that is no number from 1 to 65535'),
    ('http://bob:secret@localhost:http/', 'has a port that is no number from 1 to 65535'),
    ('http://bob:secret@localhost/a b', 'has a space or a control character'),
    ('http://bob:secret@localhost/\n', 'has a space or a control character'),
    ('http://bob:sec\tret@localhost/', 'has a space or a control character'),
    ('http://bob:secret@local\udcffhost/', 'has a space or a control character'),
    ('http://bob:secret@[::1/', 'can not be read'),
    ('http://bob:secret@ho\u2100st/', 'can not be read'),
    ('http://bob:secret@ü..example/', 'has a host that can not be: '),
    ('http://bob:secret@%s.example/' % ('ü' * 64), 'has a host that can not be: '),
]


@pytest.mark.parametrize('text, reason', BAD_URLS)
def test_parse_url_of_a_bad_one(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as raised:
        httpok.parse_url(text)
    message = str(raised.value)
    assert message.startswith('URL ') and reason in message
    assert message.endswith('; write one as in http://localhost:8080/health')
    assert message.isprintable() and 'ret' not in message


@pytest.mark.parametrize('text, expected', [('100', 100), ('200', 200), ('599', 599)])
def test_parse_status(text: str, expected: int) -> None:
    assert httpok.parse_status(text) == expected


@pytest.mark.parametrize('text', ['', '99', '600', '2oo', '-200', '200 ', '٢٠٠', '2²0'])
def test_parse_status_of_a_bad_one(text: str) -> None:
    with pytest.raises(ValueError, match='is not an HTTP status; write a number from 100 to 599'):
        httpok.parse_status(text)


@pytest.mark.parametrize('text, expected', [
    ('X-Probe: httpok', ('X-Probe', 'httpok')),
    ('host:example.com:8080', ('host', 'example.com:8080')),
    ('X-Empty:', ('X-Empty', '')),
    ("!#$%&'*+-.^_`|~09aZ: grün ", ("!#$%&'*+-.^_`|~09aZ", 'grün')),
])
def test_parse_header(text: str, expected: tuple[str, str]) -> None:
    assert httpok.parse_header(text) == expected


@pytest.mark.parametrize('text', [
    '', 'X-Probe', ': value', 'X Probe: a', 'X-Prübe: a', 'X-Probe : a', 'X: a\r\nY: b', 'X: a\nb', 'X\n: a',
    'X: \x00'])
def test_parse_header_of_a_bad_one(text: str) -> None:
    with pytest.raises(ValueError, match="is not a header; write one as in 'X-Probe: httpok'"):
        httpok.parse_header(text)


def test_parse_command() -> None:
    assert httpok.parse_command('''/usr/bin/gcore -o "a b" 'c $d' ''') == ['/usr/bin/gcore', '-o', 'a b', 'c $d']


@pytest.mark.parametrize('text, reason', [
    ('', 'an empty command; write one as in /usr/bin/gcore -o'),
    ('  ', 'an empty command; write one as in /usr/bin/gcore -o'),
    ('gcore "-o', "'gcore \"-o' is not a command: No closing quotation"),
])
def test_parse_command_of_a_bad_one(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as raised:
        httpok.parse_command(text)
    assert str(raised.value) == reason


def test_the_options_and_what_they_are_without() -> None:
    plain = build('http://localhost/')
    assert plain[1:17] == ((), 10.0, frozenset([200]), None, (), None, None, True, 1, 0.0, None, False, None,
                           ['/usr/bin/gcore', '-o'], None, False)
    assert plain[18:] == (False, None)
    full = build(
        '-p', 'web', '--program=site:*', '-t', '1.5', '-c', '200', '--code=204', '-b', 'fine', '--header=A: b',
        '--header', 'C: d', '--unix-socket=/s', '-E', '--failures=3', '--grace=2m', '--max-restarts=3/1h', '--dry-run',
        '-d', '/cores', '-g', 'dump it', '-n', 'me', '-v', '--once', '--configuration=/c', 'http://localhost/')
    assert full.names == (Name(None, 'web'), Name('site', None))
    assert (full.timeout_seconds, full.statuses, full.body) == (1.5, frozenset([200, 204]), 'fine')
    assert (full.headers, full.unix_socket, full.eager) == ((('A', 'b'), ('C', 'd')), '/s', False)
    assert (full.failures, full.grace_seconds, full.max_restarts, full.dry_run) == (3, 120.0, Rate(3, 3600.0), True)
    assert (full.core_directory, full.gcore, full.name, full.verbose) == ('/cores', ['dump', 'it'], 'me', True)
    assert (full.once, full.configuration) == (True, '/c')


def test_any_watches_all_whatever_else_is_named() -> None:
    assert build('-a', '-p', 'web', 'http://localhost/').names == (Name(None, None),)


USAGE_ERRORS = [
    ([], 'no URL is given; write one, as in http://localhost:8080/health'),
    (['http://a/', 'http://bob:secret@b/'],
     '2 URLs are given: http://a/ http://bob:***@b/; write one, as in http://localhost:8080/health'),
    (['http://bob:secret@a:b/'], "URL 'http://bob:***@a:b/' has a port that is no number from 1 to 65535"),
    (['-E', 'http://a/'], 'option -E: no process is watched; give -p or -a with it'),
    (['-p', ':', 'http://a/'], "option -p: ':' is not a process name"),
    (['-t', '0', 'http://a/'], "option -t: '0' is no time to wait"),
    (['--timeout=soon', 'http://a/'], "option --timeout: 'soon' is not a time"),
    (['-c', 'OK', 'http://a/'], "option -c: 'OK' is not an HTTP status"),
    (['-b', '', 'http://a/'], 'option -b: an empty text'),
    (['--header', 'X', 'http://a/'], "option --header: 'X' is not a header"),
    (['--unix-socket=', 'http://a/'], "option --unix-socket: '' is not the path of a socket"),
    (['--unix-socket', '/' + 'x' * 107, 'http://a/'], "option --unix-socket: '/xxx"),
    (['--failures=0', 'http://a/'], "option --failures: '0' is not a count"),
    (['--grace=x', 'http://a/'], "option --grace: 'x' is not a time"),
    (['--max-restarts=3', 'http://a/'], "option --max-restarts: '3' is not a number within a time"),
    (['-d', '', 'http://a/'], 'option -d: an empty text'),
    (['-g', '"', 'http://a/'], "option -g: '\"' is not a command"),
    (['-m', 'bob smith', 'http://a/'], "option -m: 'bob smith' is not a mail address"),
    (['--cafile=/nonexistent', 'https://a/'],
     "option --cafile: '/nonexistent' can not be used: No such file or directory; name a file of certificates in PEM"),
    ([f'--cafile={__file__}', 'https://a/'], f"option --cafile: '{__file__}' can not be used: "),
    (['--nonsense', 'http://a/'], 'option --nonsense not recognized'),
    (['http://a/', '-p'], 'option -p requires argument'),
]


@pytest.mark.parametrize('argv, reason', USAGE_ERRORS)
def test_usage_errors(argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert httpok.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('httpok: ' + reason)
    assert err.endswith("; try 'httpok --help'\n") and err.count('\n') == 1
    assert 'secret' not in err


@pytest.mark.parametrize('argv, expected', [
    (['--help'], httpok.__doc__), (['-h', '--bad'][:1], httpok.__doc__), (['--version'], f'httpok {__version__}\n')])
def test_help_and_version(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert httpok.main(argv) == 0
    assert capsys.readouterr() == (expected, '')


def test_httpok_by_hand_is_told_what_it_wants(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv('SUPERVISOR_SERVER_URL', raising=False)
    assert httpok.main(['http://localhost/']) == 1
    assert capsys.readouterr().err.startswith('httpok must be run as a supervisor event listener')


# Other pure functions.

def make_reply(status: int = 200, reason: str = 'OK', has_text: bool = True) -> httpok.Reply:
    return httpok.Reply(status, reason, has_text, 0.1)


@pytest.mark.parametrize('got, statuses, body, expected', [
    (make_reply(), [200], None, GOOD),
    (make_reply(204, 'No Content'), [200, 204], 'x', GOOD),
    (make_reply(500, 'Oh no', False), [204, 200], None,
     ('bad status returned', 'status 500 Oh no where 200 or 204 was expected')),
    (make_reply(500, '', False), [200], 'x', ('bad status returned', 'status 500 where 200 was expected')),
    (make_reply(has_text=False), [200], 'gr\nün', ('bad body returned', "the body does not contain 'gr\\nün'")),
    (httpok.CheckFailed('no reply: nobody there'), [200], 'x', ('bad status returned', 'no reply: nobody there')),
])
def test_judge(got: httpok.Reply | httpok.CheckFailed, statuses: list[int], body: str | None,
               expected: tuple[str, str]) -> None:
    assert httpok.judge(got, frozenset(statuses), body) == expected


@pytest.mark.parametrize('title, expected', [
    ('web', 'web'),
    ('site:web_00', 'site:web_00'),
    ('grün-1.2@a+b', 'grün-1.2@a+b'),
    ('../../etc/passwd', '_._.._etc_passwd'),
    ('..', '_.'),
    ('.hidden', '_hidden'),
    ('$(touch x)', '__touch_x_'),
    ('a"b\'c`d;e|f&g*h\n\x00', 'a_b_c_d_e_f_g_h__'),
])
def test_make_file_name(title: str, expected: str) -> None:
    assert httpok.make_file_name(title) == expected


@pytest.mark.parametrize('text, charset, expected', [
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
    assert set(httpok.encode_text(text, charset)) == expected


@pytest.mark.parametrize('argv, expected', [
    ([], [('Host', 'a:81'), ('User-Agent', 'httpok/' + __version__), ('Accept', '*/*'),
          ('Accept-Encoding', 'identity'), ('Connection', 'close'), ('Authorization', 'Basic Yjpw')]),
    (['--header=host: b', '--header=USER-AGENT: me', '--header=Accept: text/html', '--header=Accept: text/plain',
      '--header=accept-encoding: gzip', '--header=Connection: keep-alive', '--header=authorization: Bearer x'],
     [('host', 'b'), ('USER-AGENT', 'me'), ('Accept', 'text/html'), ('Accept', 'text/plain'),
      ('accept-encoding', 'gzip'), ('Connection', 'keep-alive'), ('authorization', 'Bearer x')]),
])
def test_make_headers(argv: list[str], expected: list[tuple[str, str]]) -> None:
    assert httpok.make_headers(build(*argv, 'http://b:p@a:81/')) == expected


def make_process(state: int = RUNNING, uptime: int = 100) -> Process:
    names = {STOPPED: 'STOPPED', STARTING: 'STARTING', RUNNING: 'RUNNING'}
    return Process('site', 'web', 7, state, names[state], 1000, 1000 + uptime, '')


@pytest.mark.parametrize('process, failed, expected', [
    (make_process(), False, 'site:web is RUNNING (pid 7, for 100 s)'),
    (make_process(), True, 'site:web is RUNNING (pid 7, for 100 s): would be restarted'),
    (make_process(uptime=60), True, 'site:web is RUNNING (pid 7, for 60 s): would be restarted'),
    (make_process(uptime=59), True, 'site:web is RUNNING (pid 7, for 59 s): in its grace, not restarted'),
    (make_process(STOPPED), True, 'site:web is STOPPED: not restarted'),
    (make_process(STARTING), False, 'site:web is STARTING: not restarted'),
])
def test_describe_watched(process: Process, failed: bool, expected: str) -> None:
    assert httpok.describe_watched(process, build('-a', '--grace=1m', 'http://a/'), failed) == expected


# The check: good replies and bad ones.

TEXT = ['-b', 'fine']
UTF_8, LATIN_1 = ('Content-Type: text/html; charset=' + name for name in ('utf-8', 'ISO-8859-1'))

GOOD_REPLIES: dict[str, tuple[Answer, list[str]]] = {
    'plain': (reply(), []),
    'body': (reply(b'all is fine.'), TEXT),
    'empty body': (reply(b''), []),
    'no reason phrase': (reply(status='200'), []),
    'HTTP/1.0': (b'HTTP/1.0 200 OK\r\n\r\nfine', TEXT),
    'until the connection ends': (make_head() + b'fine', TEXT),
    'left open after the body': (and_hang(reply()), []),
    'left open in the body, after the text': (and_hang(make_head('Content-Length: 99') + b'fine'), TEXT),
    'left open after 204': (and_hang(make_head(status='204 No Content')), ['-c', '204']),
    'another status': (reply(status='503 Busy'), ['-c', '503']),
    'one of several statuses': (reply(status='503 Busy'), ['-c', '200', '-c', '503', '-c', '204']),
    'a redirect that is expected': (reply(b'', 'Location: /x', status='302 Found'), ['-c', '302']),
    'after 100 Continue': (make_head(status='100 Continue') + reply(b'fine'), TEXT),
    'after early hints': (make_head(status='103 Early Hints') * 2 + reply(b'fine'), TEXT),
    'early hints that are expected': (make_head(status='103 Early Hints') + reply(b'fine'), ['-c', '103']),
    'chunks': (chunked(b'a', b'bc'), []),
    'chunks, left open': (and_hang(chunked(b'a', b'bc')), []),
    'no chunk at all': (chunked(), []),
    'text in a chunk': (chunked(b'a', b'all is fine', b'b'), TEXT),
    'text across chunks': (chunked(b'all is f', b'i', b'ne'), TEXT),
    'chunks with extensions and a trailer': (chunked(end=b'4;x=y\r\nfine\r\n0\r\nX: y\r\n\r\n'), TEXT),
    'text across pieces': (reply(b'x' * (64 * 1024 - 2) + b'fine'), TEXT),
    'text at the end of much': (reply(b'x' * 3000000 + b'fine'), TEXT),
    'non-ASCII in UTF-8': (reply('grün'.encode(), UTF_8), ['-b', 'grün']),
    'non-ASCII in UTF-8, not told': (reply('grün'.encode()), ['-b', 'grün']),
    'non-ASCII in UTF-8, told otherwise': (reply('grün'.encode(), LATIN_1), ['-b', 'grün']),
    'non-ASCII in the charset': (reply('grün'.encode('latin-1'), LATIN_1), ['-b', 'grün']),
    'the charset in quotes': (reply('日本'.encode('euc-jp'), 'content-type: text/x; charset="EUC-JP"'), ['-b', '日本']),
    'UTF-16': (reply('ist grün'.encode('utf-16-be'), 'Content-Type: text/html; charset=UTF-16'), ['-b', 'grün']),
    'non-ASCII across chunks': (chunked(b'gr\xc3', b'\xbcn'), ['-b', 'grün']),
    'a charset that there is not': (reply(b'fine', 'Content-Type: text/html; charset=\0'), TEXT),
    'a length that is no number': (make_head('Content-Length: many') + b'fine', TEXT),
    'endless, without -b': (stream(make_head(), b'x' * 65536), []),
    'endless chunks, without -b': (stream(chunked(end=b''), b'ffff\r\n%s\r\n' % (b'x' * 65535)), []),
}


def test_no_more_than_a_mebibyte_is_read_without_a_text() -> None:
    sent_bytes = 0

    def answer(client: socket.socket) -> None:
        nonlocal sent_bytes
        client.sendall(make_head())
        with suppress(OSError):
            while sent_bytes < 1 << 28:
                sent_bytes += client.send(b'x' * 65536)

    assert check_site(answer) == GOOD
    assert sent_bytes < 1 << 26     # what the kernel holds on the way comes on top


@pytest.mark.parametrize('name', GOOD_REPLIES)
def test_good_reply(name: str) -> None:
    answer, argv = GOOD_REPLIES[name]
    assert check_site(answer, *argv) == GOOD


BAD_REPLIES: dict[str, tuple[Answer, list[str], str]] = {
    'status': (reply(status='404 Not Here'), [], 'status 404 Not Here where 200 was expected'),
    'switching protocols': (make_head(status='101 Switching Protocols'), [],
                            'status 101 Switching Protocols where 200 was expected'),
    'not one of several': (reply(), ['-c', '201', '-c', '204'], 'status 200 OK where 201 or 204 was expected'),
    'status before body': (reply(b'fine', status='500 No'), TEXT, 'status 500 No where 200 was expected'),
    'no body': (reply(b''), TEXT, "the body does not contain 'fine'"),
    'other body': (reply(b'fin'), TEXT, "the body does not contain 'fine'"),
    'other chunks': (chunked(b'fi', b'-', b'ne'), TEXT, "the body does not contain 'fine'"),
    'text in a header': (reply(b'bad', 'X: fine'), TEXT, "the body does not contain 'fine'"),
    'text in a trailer': (chunked(end=b'0\r\nX: fine\r\n\r\n'), TEXT, "the body does not contain 'fine'"),
    'text after the end': (reply(b'bad') + b'fine', TEXT, "the body does not contain 'fine'"),
    'text after 204': (make_head(status='204 No Content') + b'fine', [*TEXT, '-c', '204'],
                       "the body does not contain 'fine'"),
    'another charset': (reply('grün'.encode('latin-1'), UTF_8), ['-b', 'grün'], "the body does not contain 'grün'"),
    'says nothing': (hang, ['-t', SHORT], 'no complete reply within 0.4 s'),
    'drips a status line': (drip(b'HTTP/1.1 200 ', b'\r\n\r\n'), ['-t', SHORT], 'no complete reply within 0.4 s'),
    'drips a header': (drip(make_head()[:-2] + b'X: ', b'\r\n\r\n'), ['-t', SHORT], 'no complete reply within 0.4 s'),
    'drips a body': (drip(make_head()), ['-t', SHORT], 'no complete reply within 0.4 s'),
    'drips a body without the text': (drip(make_head(), b'fine'), ['-t', SHORT, *TEXT],
                                      'no complete reply within 0.4 s'),
    'drips a chunk': (drip(chunked(end=b'ffff\r\n')), ['-t', SHORT], 'no complete reply within 0.4 s'),
    'a body that stops': (and_hang(make_head('Content-Length: 9') + b'fin'), ['-t', SHORT],
                          'no complete reply within 0.4 s'),
    'endless without the text': (stream(make_head(), b'x' * 65536, end=b'fine'), ['-t', SHORT, *TEXT],
                                 'no complete reply within 0.4 s'),
    'endless 103 Early Hints': (stream(b'', 500 * make_head(status='103 Early Hints'), end=reply()), ['-t', SHORT],
                                'no complete reply within 0.4 s'),
    'endless 100 Continue': (stream(b'', 500 * make_head(status='100 Continue'), end=reply()), ['-t', SHORT],
                             'no complete reply within 0.4 s'),
    'empty answer': (b'', [], 'no reply: Remote end closed connection without response'),
    'reset': (reset, [], 'no reply: Connection reset by peer'),
    'another protocol': (b'SSH-2.0-x\r\n', [], "no reply: what came is not HTTP: 'SSH-2.0-x\\r\\n'"),
    'garbage': (b'\0\xff\x1b' * 20000 + b'\n', [], r"no reply: what came is not HTTP: '\x00ÿ\x1b\x00"),
    'HTTP/2': (b'HTTP/2.0 200 OK\r\n\r\n', [], "no reply: what came is not HTTP: 'HTTP/2.0'"),
    'no status': (b'HTTP/1.1 OK\r\n\r\n', [], 'no reply: what came is not HTTP: '),
    'short': (make_head('Content-Length: 10') + b'ok', [], 'no reply: the body ended early'),
    'short, without the text': (make_head('Content-Length: 9') + b'ok', TEXT, 'no reply: the body ended early'),
    'short, of an absurd length': (make_head('Content-Length: ' + '9' * 4000) + b'ok', [],
                                   'no reply: the body ended early'),
    'a chunk whose length is no number': (chunked(b'a', end=b'zz\r\nok\r\n0\r\n\r\n'), [],
                                          'no reply: the body ended early'),
    'a first chunk whose length is no number': (chunked(end=b'zz\r\nok\r\n0\r\n\r\n'), [],
                                                'no reply: the body ended early'),
    'cut before a chunk': (chunked(b'ok', end=b''), [], 'no reply: the body ended early'),
    'cut in a chunk': (chunked(end=b'5\r\nok'), [], 'no reply: the body ended early'),
    'cut in a chunk of absurd length': (chunked(end=b'f' * 40 + b'\r\nok'), [], 'no reply: the body ended early'),
    'a chunk of negative length': (and_hang(chunked(end=b'-5\r\nok\r\n0\r\n\r\n')), [],
                                   'no reply: a chunk of negative length'),
    'a negative length, with the text': (chunked(end=b'-1\r\nfine'), TEXT, 'no reply: a chunk of negative length'),
    '500 headers': (make_head(*['X: y'] * 500) + b'ok', [], 'no reply: got more than 100 headers'),
    'endless header': (stream(make_head()[:-2] + b'X: ', b'y' * 65536), [],
                       'no reply: got more than 65536 bytes when reading header line'),
    'endless status line': (stream(b'HTTP/1.1 200 ', b'y' * 65536), [],
                            'no reply: got more than 65536 bytes when reading status line'),
}


@pytest.mark.parametrize('name', BAD_REPLIES)
def test_bad_reply(name: str) -> None:
    answer, argv, text = BAD_REPLIES[name]
    verdict = check_site(answer, *argv)
    assert verdict.text.startswith(text)
    assert verdict.subject == ('bad body returned' if text.startswith('the body') else 'bad status returned')
    assert verdict.text.isprintable() and len(verdict.text) < 900


def test_the_status_line_of_a_reply_is_cut_and_made_printable() -> None:
    reason = 'bad\x1b[2J\x07\rSubject: hacked\x85' + 'x' * 3000
    text = check_site(reply(status='500 ' + reason)).text
    assert text.startswith(r'status 500 bad\x1b[2J\x07 | Subject: hacked | xxx')
    assert text.isprintable() and len(text) < 300


# The check: the request.

def ask(*argv: str, path: str = '/', user: str = '') -> list[str]:
    """Check a good server and return the lines of the request."""
    with Site() as site:
        assert check(*argv, site.url(path, user=user)) == GOOD
        assert len(site.requests) == 1
        return site.requests[0].replace(':%d\r' % site.port, ':PORT\r').split('\r\n')[:-2]


def test_the_request() -> None:
    assert ask(path='/health?a=b&c=%20d#e') == [
        'GET /health?a=b&c=%20d HTTP/1.1', 'Host: 127.0.0.1:PORT', 'User-Agent: httpok/' + __version__, 'Accept: */*',
        'Accept-Encoding: identity', 'Connection: close']


def test_the_request_has_basic_authentication() -> None:
    assert 'Authorization: Basic ' + base64.b64encode(b'b@b:p:w d').decode() in ask(user='b%40b:p%3Aw%20d@')


def test_the_request_has_the_headers_of_the_options() -> None:
    lines = ask('--header=Host: a.example', '--header=X-Grün: x'.replace('ü', 'u'), '--header=X: grün')
    assert [line for line in lines if line.startswith('Host')] == ['Host: a.example']
    assert lines[-2:] == ['X-Grun: x', 'X: ' + 'grün'.encode().decode('latin-1')]


def test_the_unix_socket_gets_the_host_of_the_url(tmp_path: Path) -> None:
    path = str(tmp_path / 'web.sock')
    with Site(family=socket.AF_UNIX, address=path) as site:
        # http.client must not take the last of the address' groups for a port.
        for host in ('a.example', 'a.example:81', '[fd00::a]', '[::1]:8080'):
            assert check('--unix-socket', path, f'http://{host}/x') == GOOD
            assert site.requests[-1].startswith(f'GET /x HTTP/1.1\r\nHost: {host}\r\n')


def test_gunicorn_on_a_unix_socket(tmp_path: Path) -> None:
    pytest.importorskip('gunicorn')
    (tmp_path / 'app.py').write_text(
        'def app(environ, start_response):\n'
        '    start_response("200 OK", [("Content-Type", "text/plain")])\n'
        '    return [b"host ", environ["HTTP_HOST"].encode(), b" path ", environ["PATH_INFO"].encode()]\n', 'utf-8')
    path = tmp_path / 'g.sock'
    argv = ['--unix-socket', str(path), 'http://a.example/health']
    gunicorn = subprocess.Popen(
        [PYTHON, '-m', 'gunicorn', '--bind', f'unix:{path}', '--worker-tmp-dir', str(tmp_path), 'app:app'],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers: list[int] = []
    try:
        # It is not there yet, and waited for.
        assert check('-t', '30', '-b', 'host a.example path /health', *argv) == GOOD
        workers = find_children(gunicorn.pid)
        assert check('-t', '30', '-b', 'else', *argv).subject == 'bad body returned'
    finally:
        gunicorn.terminate()
        gunicorn.wait(TIMEOUT)
        for pid in workers:
            wait_for(lambda: not is_alive(pid), 'end of gunicorn')
    assert check('-t', SHORT, *argv).subject == 'bad status returned'


def test_no_redirect_is_followed() -> None:
    with Site() as other, Site(reply(b'', 'Location: ' + other.url(), status='302 Found')) as site:
        assert check(site.url()).text == 'status 302 Found where 200 was expected'
        assert (len(site.requests), other.requests) == (1, [])


def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Site() as proxy, Site() as site:
        for name in ('http_proxy', 'HTTP_PROXY', 'https_proxy', 'all_proxy', 'ALL_PROXY'):
            monkeypatch.setenv(name, proxy.url())
        monkeypatch.delenv('no_proxy', raising=False)
        assert check(site.url()) == GOOD
        assert (len(site.requests), proxy.requests) == (1, [])


# The check: addresses and connections.

def test_ipv6() -> None:
    try:
        site = Site(family=socket.AF_INET6, address=('::1', 0)).__enter__()
    except OSError:
        pytest.skip('this machine has no IPv6')
    try:
        assert check(site.url(host='[::1]')) == GOOD
        assert 'Host: [::1]:%d\r\n' % site.port in site.requests[0]
    finally:
        site.__exit__()


def test_an_ipv6_address_that_does_not_end_in_a_number() -> None:
    with Site() as site:
        try:
            socket.create_connection(('::ffff:127.0.0.1', site.port), TIMEOUT).close()
        except OSError:
            pytest.skip('this machine has no IPv6')
        assert check(site.url(host='[::ffff:127.0.0.1]')) == GOOD


def test_localhost() -> None:
    with Site() as site:
        assert check(site.url(host='localhost')) == GOOD


def resolve_by(monkeypatch: pytest.MonkeyPatch, look_up: Callable[[], list[tuple[int, Any]]]) -> None:
    """Let look_up find the addresses of all names; addresses are their own."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        if options.get('flags', 0) & socket.AI_NUMERICHOST:
            return list(real(host, port, *args, **options))
        return [(family, socket.SOCK_STREAM, 6, '', address) for family, address in look_up()]
    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing() as dead, Site() as site:
        # The first is of a family that this machine does not have, as IPv6 may be.
        resolve_by(monkeypatch, lambda: [(999, ()), (socket.AF_INET, dead.getsockname()),
                                         (socket.AF_INET, ('127.0.0.1', site.port))])
        assert check('http://a.example/') == GOOD


def test_an_address_that_swallows_packets_leaves_time_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
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
                pytest.skip('a full queue does not swallow packets here')
            resolve_by(monkeypatch, lambda: [(socket.AF_INET, full.getsockname()),
                                             (socket.AF_INET, ('127.0.0.1', site.port))])
            assert check('-t', '4', 'http://a.example/') == GOOD
            resolve_by(monkeypatch, lambda: [(socket.AF_INET, full.getsockname())])
            assert check('-t', SHORT, 'http://a.example/').text == 'no complete reply within 0.4 s'
        finally:
            for client in clients:
                client.close()


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up() -> list[tuple[int, Any]]:
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
    resolve_by(monkeypatch, look_up)
    assert check('http://a.example/') == ('bad status returned', 'no reply: Name or service not known')


class SlowResolver:
    """Looks a name up only when it may; fails with the failures first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int, *failures: OSError) -> None:
        self.may = threading.Event()
        self.calls = 0
        self._failures = list(failures)
        self._port = port
        resolve_by(monkeypatch, self._look_up)

    def _look_up(self) -> list[tuple[int, Any]]:
        self.calls += 1
        self.may.wait(TIMEOUT)
        if self._failures:
            raise self._failures.pop(0)
        return [(socket.AF_INET, ('127.0.0.1', self._port))]


def test_a_slow_resolver_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = httpok.Resolver()
    with Site() as site:
        slow = SlowResolver(monkeypatch, site.port)
        for _ in range(3):
            assert check('-t', '0.2', 'http://a.example/', resolver=resolver) == (
                'bad status returned', 'the address of a.example was not found in time')
        assert slow.calls == 1
        slow.may.set()
        assert check('http://a.example/', resolver=resolver) == GOOD    # by the lookup that was late
        assert slow.calls == 1
        assert check('http://a.example/', resolver=resolver) == GOOD    # by one of its own
        assert slow.calls == 2


def test_a_failure_of_an_earlier_lookup_does_not_fail_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = httpok.Resolver()
    with Site() as site:
        slow = SlowResolver(monkeypatch, site.port, socket.gaierror(socket.EAI_AGAIN, 'Try again'))
        assert check('-t', '0.2', 'http://a.example/', resolver=resolver).subject == 'bad status returned'
        slow.may.set()
        assert check('http://a.example/', resolver=resolver) == GOOD
        assert slow.calls == 2


def on_pause(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[float]:
    """Do something where the check pauses, in place of the first pause; return the seconds of the pauses."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        if not pauses:
            action()
        pauses.append(seconds)
    monkeypatch.setattr(httpok, 'time', SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    return pauses


def test_a_refused_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site()
    with refusing() as server:
        def start() -> None:
            server.listen(5)
            accept_all(server, site.serve)
        pauses = on_pause(monkeypatch, start)
        assert check('http://127.0.0.1:%d/' % server.getsockname()[1]) == GOOD
        server.shutdown(socket.SHUT_RDWR)
    assert pauses == [1]


def test_a_refused_connection_is_not_waited_for_beyond_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = on_pause(monkeypatch, lambda: None)
    with refusing() as server:
        check('-t', SHORT, 'http://127.0.0.1:%d/' % server.getsockname()[1])
    assert pauses and max(pauses) <= float(SHORT)


def test_an_address_that_refuses_is_tried_again_though_another_fails_otherwise(
        monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site()
    really_open, nowhere = httpok._open_socket, ('192.0.2.1', 80)

    def open_socket(family: int, address: Any, timeout_seconds: float) -> socket.socket:
        if address == nowhere:
            raise OSError(errno.EHOSTUNREACH, 'No route to host')
        return really_open(family, address, timeout_seconds)

    monkeypatch.setattr(httpok, '_open_socket', open_socket)
    with refusing() as server:
        resolve_by(monkeypatch, lambda: [(socket.AF_INET, server.getsockname()), (socket.AF_INET, nowhere)])

        def start() -> None:
            server.listen(5)
            accept_all(server, site.serve)
        pauses = on_pause(monkeypatch, start)
        assert check('http://web.example/') == GOOD
        server.shutdown(socket.SHUT_RDWR)
    assert pauses == [1]


def test_a_refused_connection_fails_at_the_timeout() -> None:
    with refusing() as server:
        url = 'http://127.0.0.1:%d/' % server.getsockname()[1]
        started = time.monotonic()
        assert check('-t', '1.2', url) == ('bad status returned', 'no reply: Connection refused')
        assert time.monotonic() - started >= 1.2


def test_a_unix_socket_that_is_not_there_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / 'web.sock')
    site = Site(family=socket.AF_UNIX, address=path)
    argv = ['--unix-socket', path, 'http://localhost/']
    assert check('-t', SHORT, *argv) == ('bad status returned', 'no reply: No such file or directory')
    on_pause(monkeypatch, site.__enter__)
    assert check(*argv) == GOOD
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
        assert check('--unix-socket', path, 'http://localhost/') == GOOD
        assert pauses
        server.shutdown(socket.SHUT_RDWR)


def test_a_timeout_that_is_longer_than_a_socket_can_wait() -> None:
    def answer(client: socket.socket) -> None:
        select.select([client], [], [], 0.5)
        client.sendall(reply())
    # A little more than 2 ** 32 ms, which poll() would take for that little.
    assert check_site(answer, '-t', '4294967.4') == GOOD


def test_a_check_whose_time_is_over_does_not_connect() -> None:
    with Site() as site:
        assert check('-t', '0.0000001', site.url()).text == 'no complete reply within 1e-07 s'
        assert site.requests == []


# The check: TLS.

@pytest.fixture(scope='module')
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope='module')
def cafile(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('authority') / 'ca.pem'
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def make_tls(authority: trustme.CA, *names: str, not_after: datetime | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = authority.issue_cert(*(names or ('127.0.0.1', 'localhost')), not_after=not_after)
    certificate.configure_cert(context)
    return context


def make_site_tls(kind: str, authority: trustme.CA) -> ssl.SSLContext:
    """Return how a server speaks TLS whose certificate is good, or bad in the way that kind says."""
    if kind == 'unknown':
        return make_tls(trustme.CA())
    if kind == 'expired':
        return make_tls(authority, not_after=datetime(2020, 1, 1))
    return make_tls(authority, *(['a.example'] if kind == 'other name' else []))


@pytest.mark.parametrize('kind', ['good', 'other name', 'expired', 'unknown'])
def test_no_certificate_is_verified_unless_asked(kind: str, authority: trustme.CA) -> None:
    context = make_site_tls(kind, authority)
    assert check_site(reply(b'fine'), *TEXT, tls=context) == GOOD
    assert check_site(chunked(b'fi', b'ne'), *TEXT, tls=context) == GOOD


def test_a_certificate_of_the_authority_is_good(authority: trustme.CA, cafile: str) -> None:
    with Site(tls=make_tls(authority)) as site:
        for host in ('127.0.0.1', 'localhost'):
            assert check('--cafile', cafile, site.url(host=host)) == GOOD


def test_the_authorities_of_the_system(authority: trustme.CA, cafile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Site(tls=make_tls(authority)) as site:
        assert 'certificate verify failed' in check('--verify', site.url()).text
        monkeypatch.setenv('SSL_CERT_FILE', cafile)     # where OpenSSL then finds the system's
        assert check('--verify', site.url()) == GOOD


@pytest.mark.parametrize('kind, reason', [
    ('other name', "certificate is not valid for '127.0.0.1'"),
    ('expired', 'certificate has expired'),
    ('unknown', 'unable to get local issuer certificate'),
])
def test_a_bad_certificate(kind: str, reason: str, authority: trustme.CA, cafile: str) -> None:
    with Site(tls=make_site_tls(kind, authority)) as site:
        verdict = check('--cafile', cafile, site.url())
        assert verdict.subject == 'bad status returned'
        assert 'certificate verify failed: ' in verdict.text and reason in verdict.text
        assert site.requests == []


def test_a_certificate_by_the_unix_socket(authority: trustme.CA, cafile: str, tmp_path: Path) -> None:
    path = str(tmp_path / 'web.sock')
    with Site(tls=make_tls(authority, 'a.example'), family=socket.AF_UNIX, address=path):
        argv = ['--unix-socket', path, '--cafile', cafile]
        assert check(*argv, 'https://a.example/') == GOOD
        assert "not valid for 'b.example'" in check(*argv, 'https://b.example/').text


@pytest.mark.parametrize('name', ['says nothing', 'drips a body', 'drips a header', 'short', 'empty answer',
                                  'endless without the text'])
def test_a_bad_reply_over_tls(name: str, authority: trustme.CA) -> None:
    answer, argv, text = BAD_REPLIES[name]
    assert check_site(answer, *argv, tls=make_tls(authority)).text == text


def test_a_server_that_never_ends_the_handshake() -> None:
    with serving(hang) as port:
        assert check('-t', SHORT, 'https://127.0.0.1:%d/' % port).text == 'no complete reply within 0.4 s'


def test_a_server_that_drips_the_handshake() -> None:
    # A TLS record of 16 KiB that never gets complete.
    with serving(drip(b'\x16\x03\x03\x40\x00\x02\x00\x3f\xfc')) as port:
        assert check('-t', SHORT, 'https://127.0.0.1:%d/' % port).text == 'no complete reply within 0.4 s'


def test_a_server_that_does_not_speak_tls() -> None:
    with serving(and_hang(reply())) as port:
        verdict = check('https://127.0.0.1:%d/' % port)
        assert verdict.subject == 'bad status returned' and 'SSL' in verdict.text and verdict.text.isprintable()


# Memory.

def find_peak_kib(*argv: str) -> int:
    """Run a check as a process of its own, which must find all well, and return the peak of its RSS."""
    run = subprocess.run(
        [PYTHON, '-c', 'import sys\nfrom superlance import httpok\nstatus = httpok.main(sys.argv[1:])\n'
         'print(open("/proc/self/status").read())\nsys.exit(status)', '--once', '-t', '60', *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=90)
    assert run.returncode == 0, run.stdout
    found = re.search(rb'VmHWM:\s*(\d+) kB', run.stdout)
    assert found
    return int(found.group(1))


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='RSS is read from /proc')
@pytest.mark.parametrize('head, piece, end, argv', [
    (make_head(), b'x' * 2 ** 20, b'fine', TEXT),
    (chunked(end=b''), b'100000\r\n%s\r\n' % (b'x' * 2 ** 20), b'4\r\nfine\r\n0\r\n\r\n', TEXT),
    (chunked(end=b'fffffff\r\n'), b'x' * 2 ** 20, b'fine', TEXT),
    (make_head(), b'x' * 2 ** 20, b'', []),
], ids=['until the end', 'in chunks', 'in one chunk', 'without -b'])
def test_memory_does_not_grow_with_the_body(head: bytes, piece: bytes, end: bytes, argv: list[str]) -> None:
    with Site(stream(head, piece, 1, end), stream(head, piece, 64, end)) as site:
        small, large = (find_peak_kib(*argv, site.url()) for _ in range(2))
        assert len(site.requests) == 2
    assert large - small < 16 * 1024


# The listener, on its own.

def test_good_checks_are_silent(inbox: CommandInbox) -> None:
    with Site() as site, Listener(['httpok', *mail_to(inbox), site.url()]) as listener:
        for _ in range(2):
            listener.tick()
        assert len(site.requests) == 2
        assert listener.close() == 0
    assert (listener.log, inbox.mails) == ('', [])


def test_good_checks_are_told_on_demand() -> None:
    with Site() as site, Listener(['httpok', '-v', site.url('/x')]) as listener:
        listener.tick()
        assert re.search(r' httpok: {}: status 200 in \d+\.\d{{3}} s\n'.format(re.escape(site.url('/x'))),
                         listener.wait_for_log('status 200'))
        assert listener.close() == 0


def test_only_ticks_are_served() -> None:
    with Site(reply(status='500 No')) as site, Listener(['httpok', site.url()]) as listener:
        listener.serve_event('PROCESS_STATE_EXITED', 'processname:web groupname:web from_state:RUNNING pid:1')
        listener.serve_event('REMOTE_COMMUNICATION', 'type:x\nTICK')
        assert site.requests == []
        listener.serve_event('TICK_3600', 'when:%d' % time.time())
        assert len(site.requests) == 1
        listener.wait_for_log('status 500 No where 200 was expected')
        assert listener.close() == 0


@pytest.mark.parametrize('argv, answer, subject, text', [
    ([], reply(status='500 No'), 'httpok: URL: bad status returned', 'status 500 No where 200 was expected'),
    (TEXT, reply(), 'httpok: URL: bad body returned', "the body does not contain 'fine'"),
    (['-n', 'web'], b'', 'httpok [web]: URL: bad status returned', 'Remote end closed connection'),
    (['--name', 'w\nBcc: eve', *TEXT], reply(), 'httpok [w | Bcc: eve]: URL: bad body returned', 'does not contain'),
    (['-t', SHORT], hang, 'httpok: URL: bad status returned', 'no complete reply within 0.4 s'),
])
def test_mail_only(argv: list[str], answer: Answer, subject: str, text: str, inbox: CommandInbox) -> None:
    with Site(answer) as site, Listener(['httpok', *argv, *mail_to(inbox), site.url()]) as listener:
        listener.tick()
        listener.tick()
        assert listener.close() == 0
        assert text in listener.log
    mails = inbox.mails
    assert inbox.subjects == [subject.replace('URL', site.url())] * 2
    for mail in mails:
        assert (mail['To'], mail['Bcc']) == ('bob@example.com', None)
        body = mail.get_content()
        assert body.startswith(site.url() + '\n\n') and text in body and 'supervisor supervisor\n' in body


def test_without_an_address_there_is_the_log_only() -> None:
    with Site(reply(status='500 No')) as site, Listener(['httpok', site.url()]) as listener:
        listener.tick()
        assert listener.close() == 0
        assert listener.log.count('\n') == 1


def test_a_hostile_reason_phrase_stays_one_line_of_log_and_mail(inbox: CommandInbox) -> None:
    answer = reply(status='500 a\x1b[2J\x07\rBcc: eve@example.com\x85\x0b' + 'x' * 3000)
    with Site(answer) as site, Listener(['httpok', *mail_to(inbox), site.url()]) as listener:
        listener.tick()
        assert listener.close() == 0
    lines = listener.log.split('\n')[:-1]
    assert len(lines) == 2 and 'status 500 a' in lines[0] and 'sent mail' in lines[1]
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    mail, = inbox.mails
    assert mail['Bcc'] is None
    assert all(line.isprintable() and len(line) < 500 for line in mail.get_content().split('\n'))


@pytest.mark.parametrize('answers, checks, mails', [
    ([500, 500, 500], 3, 1),
    ([500, 500, 200, 500, 500], 5, 0),
    ([500, 500, 200, 500, 500, 500], 6, 1),
    ([500, 500, 500, 500], 4, 2),   # nothing was restarted, so the count goes on
])
def test_failures_in_a_row(answers: list[int], checks: int, mails: int, inbox: CommandInbox) -> None:
    argv = ['httpok', '--failures=3', *mail_to(inbox)]
    with Site(*[reply(status='%d x' % status) for status in answers]) as site, \
            Listener([*argv, site.url()]) as listener:
        for _ in range(checks):
            listener.tick()
        assert len(site.requests) == checks
        assert listener.close() == 0
        assert '(failed check 1 of 3)' in listener.log and '(failed check 2 of 3)' in listener.log
        assert 'of 3' not in [line for line in listener.log.splitlines() if 'status' in line][-1] or not mails
    assert len(inbox.mails) == mails


SECRET = 's3cr%23t%21'


def assert_no_secret(text: str) -> None:
    pair = base64.b64encode(b'bob:s3cr#t!').decode()
    assert text
    assert not any(secret in text for secret in (SECRET, 's3cr#t!', 's3cr', pair))


@pytest.mark.parametrize('answer', [reply(status='401 Unauthorized'), b'', reply()])
def test_the_password_of_the_url_is_never_told(answer: bytes, tmp_path: Path, inbox: CommandInbox) -> None:
    argv = ['-b', 'fine', '-p', 'web']
    with Site(answer) as site:
        url = site.url(user=f'bob:{SECRET}@')
        with Listener(['httpok', '-v', *argv, *mail_to(inbox), url]) as listener:
            listener.tick()
            assert listener.close() == 0
        status, out, err = run_once(*argv, url, SUPERVISOR_SERVER_URL='unix:///nonexistent/s.sock')
        assert 'Authorization: Basic ' + base64.b64encode(b'bob:s3cr#t!').decode() in site.requests[0]
    mail, = inbox.mails
    assert (status, err) == (1, '')
    for text in (listener.log, read(tmp_path / 'inbox'), mail['Subject'], out):
        assert_no_secret(text)
        assert 'http://bob:***@127.0.0.1:%d/' % site.port in text


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_check_at_once(signum: int) -> None:
    with Site(hang) as site, Listener(['httpok', '-t', '600', site.url()]) as listener:
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', 'when:%d' % time.time())
        wait_for(lambda: site.requests, 'the check')
        assert listener.terminate(signum) == 0
        assert listener.log == ''


def test_nothing_is_restarted_where_supervisord_does_not_answer(inbox: CommandInbox) -> None:
    with Site(reply(status='500 No')) as site, \
            Listener(['httpok', '-p', 'web', *mail_to(inbox), site.url()]) as listener:
        listener.tick()
        assert listener.close() == 0
        assert 'nothing is restarted: supervisord at unix:///nonexistent/supervisor.sock' in listener.log
    mail, = inbox.mails
    assert mail['Subject'] == f'httpok: {site.url()}: bad status returned'
    assert 'nothing is restarted: supervisord at ' in mail.get_content()


@pytest.mark.parametrize('option', ['-E', '--grace=5m'])
def test_where_it_can_not_tell_who_runs_it_does_not_check(option: str) -> None:
    with Site() as site, Listener(['httpok', '-p', 'web', option, site.url()]) as listener:
        listener.tick()
        listener.wait_for_log(f'unable to ask which processes run, so {site.url()} is not checked: ')
        assert site.requests == []
        assert listener.close() == 0


# The listener, with a real supervisord.

PROGRAM = '[program:%s]\ncommand=sleep 10000\nstartsecs=0\nautorestart=false\nstdout_logfile=NONE\n' \
    'stderr_logfile=NONE\n'

RUNNING_NAMES = {'web:web', 'lone:lone', 'site:front', 'site:back'}
FAILING = reply(status='500 No')


@pytest.fixture(scope='module')
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisord]:
    """A supervisord for all the tests that leave its processes running."""
    sections = ''.join(PROGRAM % name for name in ('web', 'lone', 'front', 'back'))
    sections += PROGRAM % 'idle' + 'autostart=false\n' + '[group:site]\nprograms=front,back,idle\n'
    with Supervisord(tmp_path_factory.mktemp('shared'), sections) as supervisord:
        for name in RUNNING_NAMES:
            supervisord.wait_for_state(name)
        yield supervisord


def find_pids(supervisord: Supervisord) -> dict[str, int]:
    """Return the pids of all processes that are RUNNING."""
    return {'{}:{}'.format(info['group'], info['name']): info['pid'] for info in supervisord.rpc.getAllProcessInfo()
            if info['statename'] == 'RUNNING'}


class Watch:
    """A httpok that watches a supervisord's processes, and knows what it has restarted."""

    def __init__(self, supervisord: Supervisord, folder: Path, *argv: str, group: str = 'listener') -> None:
        self._supervisord = supervisord
        self._pids = find_pids(supervisord)
        self._inbox = CommandInbox(folder)
        self.listener = Listener(['httpok', *mail_to(self._inbox), *argv], folder=folder,
                                 environment=dict(supervisord.environment, SUPERVISOR_GROUP_NAME=group))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.__exit__()

    @property
    def log(self) -> str:
        return self.listener.log

    def tick(self) -> set[str]:
        """Serve a tick and return what has another pid since the last one."""
        self.listener.tick()
        return self.find_restarted()

    def find_restarted(self) -> set[str]:
        before, self._pids = self._pids, find_pids(self._supervisord)
        return {name for name in {*before, *self._pids} if before.get(name) != self._pids.get(name)}

    def close(self) -> list[tuple[str, str]]:
        """End it and return the subjects and texts of its mails."""
        assert self.listener.close() == 0
        return [(mail['Subject'], mail.get_content()) for mail in self._inbox.mails]


def test_a_process_that_hangs_is_restarted(shared: Supervisord, tmp_path: Path) -> None:
    with Site(hang) as site, Watch(shared, tmp_path, '-p', 'web', '-t', SHORT, site.url()) as watch:
        assert watch.tick() == {'web:web'}
        (subject, text), = watch.close()
    assert subject == f'httpok: {site.url()}: bad status returned'
    assert text.startswith(f'{site.url()}\n\nno complete reply within 0.4 s\nrestarted web\n')
    assert ' httpok: restarted web\n' in watch.log


@pytest.mark.parametrize('argv, group, restarted', [
    (['-a'], 'listener', RUNNING_NAMES),
    (['-a'], 'site', {'web:web', 'lone:lone'}),     # never its own pool
    (['-p', 'site:*'], 'site', set()),
    (['-p', 'site:*'], 'listener', {'site:front', 'site:back'}),
    (['-p', 'site:'], 'listener', {'site:front', 'site:back'}),
    (['-p', 'site:front'], 'listener', {'site:front'}),
    (['-p', 'front'], 'listener', {'site:front'}),
    (['-p', 'web', '-p', 'back'], 'listener', {'web:web', 'site:back'}),
    (['-p', 'web:front'], 'listener', set()),
    (['-p', 'idle'], 'listener', set()),            # only what is RUNNING
])
def test_which_processes_are_restarted(argv: list[str], group: str, restarted: set[str], shared: Supervisord,
                                       tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, *argv, site.url(), group=group) as watch:
        assert watch.tick() == restarted
        (subject, text), = watch.close()
    assert subject == f'httpok: {site.url()}: bad status returned'
    assert ('nothing is restarted: no watched process is RUNNING' in text) == (not restarted)
    for name in restarted:
        program, _, process = name.partition(':')
        assert '\nrestarted %s\n' % (process if program == process else name) in text
    assert shared.info('site:idle')['statename'] == 'STOPPED'


def test_a_good_reply_restarts_nothing(shared: Supervisord, tmp_path: Path) -> None:
    with Site() as site, Watch(shared, tmp_path, '-a', site.url()) as watch:
        assert watch.tick() == set()
        assert len(site.requests) == 1
        assert watch.close() == []


def test_not_eager(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site:
        with Watch(shared, tmp_path, '-E', '-v', '-p', 'idle', site.url()) as watch:
            watch.tick()
            watch.listener.wait_for_log(f'{site.url()} is not checked: no watched process is RUNNING')
            assert (site.requests, watch.close()) == ([], [])
        for flags in (['-E'], ['-e', '-E']):    # the last one holds
            with Watch(shared, tmp_path, *flags, '-p', 'idle', site.url()) as watch:
                watch.tick()
                assert (site.requests, watch.close(), watch.log) == ([], [], '')
        for number, flags in enumerate((['-e'], ['-E', '-e']), 1):
            with Watch(shared, tmp_path, *flags, '-p', 'idle', site.url()) as watch:
                watch.tick()
                assert (len(site.requests), len(watch.close())) == (number, number)
        with Watch(shared, tmp_path, '-E', '-p', 'idle', '-p', 'web', site.url()) as watch:
            assert watch.tick() == {'web:web'}
            watch.close()


def test_a_process_that_was_started_during_the_check_is_left_alone(shared: Supervisord, tmp_path: Path) -> None:
    def restart(client: socket.socket) -> None:
        began = int(time.time())
        wait_for(lambda: time.time() > began + 1)   # supervisord tells whole seconds
        shared.rpc.stopProcess('web:web')
        shared.rpc.startProcess('web:web')
        hang(client)

    with Site(restart) as site, Watch(shared, tmp_path, '-p', 'web', '-t', '4', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        pid = shared.info('web:web')['pid']
        watch.listener.wait_for_log('left web alone: it was started while the URL was checked')
        (_, text), = watch.close()
    assert 'restarted web' not in text and shared.info('web:web')['pid'] == pid


def test_a_dry_run_starts_the_count_again(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(
            shared, tmp_path, '-p', 'web', '--failures=2', '--dry-run', site.url()) as watch:
        for _ in range(3):
            assert watch.tick() == set()
        assert len(watch.close()) == 1
        assert watch.log.count('(failed check 1 of 2)') == 2


def test_a_restart_starts_the_count_again(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, '--failures=2', '-p', 'web', site.url()) as watch:
        assert [watch.tick() for _ in range(5)] == [set(), {'web:web'}, set(), {'web:web'}, set()]
        assert len(watch.close()) == 2
    assert watch.log.count('(failed check 1 of 2)') == 3


def test_too_many_restarts(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, '--max-restarts=1/1h', '-p', 'web', site.url()) as watch:
        assert [watch.tick() for _ in range(4)] == [{'web:web'}, set(), set(), set()]
        first, second = watch.close()   # told once
        assert len(site.requests) == 4
    assert 'left web alone' in second[1] and 'left web alone' not in first[1]
    assert watch.log.count('left web alone') == 1


def test_restarts_are_possible_again_later(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, '--max-restarts=1/0.5', '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        wait_for(watch.tick, 'another restart')
        watch.close()


def test_a_tick_from_before_a_restart_is_skipped(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        watch.listener.serve_event('TICK_5', 'when:%d' % (time.time() - 5))
        assert len(site.requests) == 1
        assert watch.tick() == {'web:web'}
        watch.close()


def test_dry_run(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, '--dry-run', '--failures=2', '-p', 'web', site.url()) as watch:
        assert [watch.tick() for _ in range(6)] == [set()] * 6
        (subject, text), = watch.close()    # told once
    assert subject == f'httpok: {site.url()}: bad status returned'
    assert 'dry run: would have restarted web\n' in text
    assert watch.log.count('dry run: would have restarted web\n') == 1


def test_an_unknown_name_is_told_once(shared: Supervisord, tmp_path: Path) -> None:
    with Site() as site, Watch(shared, tmp_path, '-p', 'site', '-p', 'web', '-p', 'nobody', site.url()) as watch:
        for _ in range(3):
            watch.tick()
        watch.close()
    assert sorted(line.partition('httpok: ')[2] for line in watch.log.splitlines()) == [
        'no process is called nobody',
        'no process is called site; there is a group of that name: for all its processes, write site:*']


def test_a_process_that_can_not_be_started_is_started_later(tmp_path: Path) -> None:
    program = write_script(tmp_path / 'program', 'echo up > up\nexec sleep 10000\n')
    backup = tmp_path / 'backup'
    shutil.copy(str(program), str(backup))
    section = f'[program:web]\ncommand={program}\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\n'
    with Supervisord(tmp_path, section) as supervisord, Site(FAILING, reply()) as site:
        pid = supervisord.wait_for_state('web')['pid']
        with Watch(supervisord, tmp_path, '-p', 'web', site.url()) as watch:
            wait_for(lambda: read(tmp_path / 'up'), 'the program')   # has been read
            program.unlink()
            watch.tick()
            watch.listener.wait_for_log('failed to start web')
            watch.tick()
            assert supervisord.info('web')['pid'] != pid
            backup.rename(program)
            watch.tick()
            supervisord.wait_for_restart('web', pid)
            subjects = [subject for subject, _ in watch.close()]
    assert subjects[0] == f'httpok: {site.url()}: bad status returned'
    assert subjects[-1] == f'httpok: {site.url()}: process web restarted'


def test_a_process_that_somebody_removed_is_not_mailed(tmp_path: Path) -> None:
    program = write_script(tmp_path / 'program', 'echo up > up\nexec sleep 10000\n')
    section = f'[program:web]\ncommand={program}\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\n'
    with Supervisord(tmp_path, section) as supervisord, Site(FAILING, reply()) as site:
        supervisord.wait_for_state('web')
        with Watch(supervisord, tmp_path, '-p', 'web', site.url()) as watch:
            wait_for(lambda: read(tmp_path / 'up'), 'the program')   # has been read
            program.unlink()
            watch.tick()
            watch.listener.wait_for_log('failed to start web')
            supervisord.rpc.removeProcessGroup('web')
            watch.tick()
            watch.listener.wait_for_log('left web alone')
            assert len(watch.close()) == 1


# Grace: a supervisord whose processes have run for as long as the test says.

class Pretender:
    """The part of supervisord's XML-RPC interface that tells uptimes, and restarts in no time."""

    def __init__(self, **uptimes: int) -> None:
        self.calls: list[str] = []
        self._infos = {name: self._make_info(name, uptime) for name, uptime in uptimes.items()}
        self._server = SimpleXMLRPCServer(('127.0.0.1', 0), logRequests=False)
        self._server.register_function(lambda: list(self._infos.values()), 'supervisor.getAllProcessInfo')
        self._server.register_function(lambda spec: self._infos[spec.split(':')[1]], 'supervisor.getProcessInfo')
        self._server.register_function(lambda spec: self._note('stop ' + spec), 'supervisor.stopProcess')
        self._server.register_function(lambda spec: self._note('start ' + spec), 'supervisor.startProcess')
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> dict[str, str]:
        self._thread.start()
        return {'SUPERVISOR_SERVER_URL': 'http://127.0.0.1:%d' % self._server.server_address[1]}

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(TIMEOUT)

    def _make_info(self, name: str, uptime: int) -> dict[str, Any]:
        return dict(group=name, name=name, pid=100, state=RUNNING, statename='RUNNING', start=1000, now=1000 + uptime,
                    spawnerr='')

    def _note(self, call: str) -> bool:
        self.calls.append(call)
        return True


@pytest.mark.parametrize('argv, uptimes, asked, calls', [
    (['-a'], dict(web=59, api=0), False, []),
    (['-p', 'web'], dict(web=59, api=99), False, []),
    (['-E', '-p', 'web'], dict(web=59, api=99), False, []),
    (['-p', 'web'], dict(web=60, api=0), True, ['stop web:web', 'start web:web']),
    (['-a'], dict(web=99, api=59), True, ['stop web:web', 'start web:web']),
    (['-E', '-a'], dict(web=99), True, ['stop web:web', 'start web:web']),
    (['-p', 'nobody'], dict(web=1), True, []),
    ([], dict(web=1), True, []),
])
def test_grace(argv: list[str], uptimes: dict[str, int], asked: bool, calls: list[str]) -> None:
    pretender = Pretender(**uptimes)
    with pretender as environment, Site(FAILING) as site, \
            Listener(['httpok', '-v', '--grace=1m', *argv, site.url()], environment) as listener:
        listener.tick()
        assert listener.close() == 0
        assert (len(site.requests), pretender.calls) == (int(asked), calls)
        assert (f'{site.url()} is not checked: the watched processes have run for less than 60 s'
                in listener.log) == (not asked)
        assert ('left api alone: it has run for 59 s, and its grace is 60 s' in listener.log) == (
            uptimes.get('api') == 59 and asked)


# Cores.

def test_the_core_of_a_process(shared: Supervisord, tmp_path: Path) -> None:
    if not os.access('/usr/bin/gcore', os.X_OK):
        pytest.skip('there is no gcore')
    pid = shared.info('web')['pid']
    with Site(FAILING) as site, Watch(shared, tmp_path, '-d', str(tmp_path), '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        mail, = watch.close()
    if 'ptrace' in watch.log:
        pytest.skip('gcore may not trace processes here')
    assert (tmp_path / ('web.%d' % pid)).stat().st_size > 0
    assert ' httpok: wrote a core of web: ' in watch.log
    assert 'wrote a core of web:\n' in mail[1] and 'Saved corefile %s' % (tmp_path / 'web') in mail[1]


def test_the_command_for_cores(shared: Supervisord, tmp_path: Path) -> None:
    script = write_script(tmp_path / 'my gcore', 'printf "%s|" "$@"\necho\necho done >&2\n')
    pid = shared.info('site:front')['pid']
    with Site(FAILING) as site, Watch(
            shared, tmp_path, '-p', 'front', '-d', '/the cores', '-g', f'"{script}" -x "a  b" \'$HOME\'',
            site.url()) as watch:
        assert watch.tick() == {'site:front'}
        (_, text), = watch.close()
    expected = '-x|a  b|$HOME|/the cores/site:front|%d|' % pid
    assert f' httpok: wrote a core of site:front: {expected} | done\n' in watch.log
    assert f'\nwrote a core of site:front:\n{expected}\ndone\nrestarted site:front\n' in text


def test_a_core_that_can_not_be_written_does_not_keep_from_the_restart(shared: Supervisord, tmp_path: Path) -> None:
    script = write_script(tmp_path / 'gcore', 'echo disk full\nexit 3\n')
    with Site(FAILING) as site, Watch(
            shared, tmp_path, '-p', 'web', '-d', str(tmp_path), '-g', str(script), site.url()) as watch:
        assert watch.tick() == {'web:web'}
        (_, text), = watch.close()
    for told in (watch.log, text):
        assert re.search('unable to write a core of web: .*: exit status 3: disk full\n', told)


def test_a_command_for_cores_that_hangs_does_not_keep_from_the_restart(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(httpok, 'GCORE_TIMEOUT_SECONDS', 0.2)
    listener = make_listener('-d', str(tmp_path), '-g', str(write_script(tmp_path / 'gcore', 'exec sleep 600\n')))
    listener._dump_core(make_running(1, 2))
    assert capfd.readouterr().err.endswith(f'{tmp_path}/web 7: did not end in time\n')


def test_a_signal_ends_the_command_for_cores(shared: Supervisord, tmp_path: Path, inbox: CommandInbox) -> None:
    # Its stdin ends once the listener waits for it.
    script = write_script(tmp_path / 'gcore', 'cat\necho $$ > pid.new\nmv pid.new pid\nexec sleep 600\n')
    with Site(FAILING) as site, Watch(
            shared, tmp_path, '-p', 'web', '-d', str(tmp_path), '-g', str(script), site.url()) as watch:
        watch.listener.expect(b'READY\n')
        watch.listener.send_event('TICK_5', 'when:%d' % time.time())
        pid = int(wait_for(lambda: read(tmp_path / 'pid'), 'the command'))
        assert is_alive(pid)
        assert watch.listener.terminate() == 0
        assert not is_alive(pid)
        assert watch.find_restarted() == set()
    mail, = inbox.mails
    assert mail['Subject'] == f'httpok: {site.url()}: bad status returned'


def test_no_cores_in_a_dry_run(shared: Supervisord, tmp_path: Path) -> None:
    script = write_script(tmp_path / 'gcore', 'touch "$1"\n')
    with Site(FAILING) as site, Watch(
            shared, tmp_path, '--dry-run', '-p', 'web', '-d', str(tmp_path), '-g', str(script), site.url()) as watch:
        assert watch.tick() == set()
        watch.close()
    assert not (tmp_path / 'web').exists()


def test_odd_process_names_reach_no_shell_and_stay_in_the_directory(tmp_path: Path) -> None:
    names = ['$(touch${IFS}x)', '`touch${IFS}x`', 'a"b\'c', '..', '.hidden', '-o', 'a&touch${IFS}x&', 'a\\b']
    cores = tmp_path / 'here' / 'cores'
    cores.mkdir(parents=True)
    script = write_script(tmp_path / 'gcore', 'touch "$1" && printf "%%s\\n" "$1" >> %s\n' % (tmp_path / 'written'))
    with Supervisord(tmp_path, ''.join(PROGRAM % name for name in names)) as supervisord, Site(FAILING) as site:
        for name in names:
            supervisord.wait_for_state(f'{name}:{name}')
        before = set(os.listdir(str(tmp_path)))
        with Watch(supervisord, tmp_path, '-a', '-d', str(cores), '-g', str(script), site.url()) as watch:
            assert watch.tick() == {f'{name}:{name}' for name in names}
            watch.close()
    written = read(tmp_path / 'written').splitlines()
    assert len(written) == len(names) and {os.path.dirname(path) for path in written} == {str(cores)}
    assert sorted(map(os.path.basename, written)) == sorted(os.listdir(str(cores)))
    assert os.listdir(str(cores.parent)) == ['cores']
    assert set(os.listdir(str(tmp_path))) - before <= {'written', 'inbox', 'supervisord.log', 'supervisord.pid'}


# One look by hand.

def test_once() -> None:
    with Site(reply(b'fine', status='200 All Right')) as site:
        status, out, err = run_once('-b', 'fine', site.url('/x'))
    assert (status, err) == (0, '')
    assert re.fullmatch(r"""url      {}
status   200 All Right
time     0\.\d{{3}} s
body     contains 'fine'
verdict  ok
""".format(re.escape(site.url('/x'))), re.sub(r'\d+(\.\d+ s)', r'0\1', out))


@pytest.mark.parametrize('answer, argv, lines', [
    (reply(), TEXT, [
        'status   200 OK', "body     does not contain 'fine'", "verdict  the body does not contain 'fine'"]),
    (reply(status='500'), [], ['status   500', 'verdict  status 500 where 200 was expected']),
    # A body that was not read is not told of.
    (reply(b'fine', status='500'), TEXT, ['status   500', 'verdict  status 500 where 200 was expected']),
    (reply(status='500 a\x1b\rb'), [], [
        r'status   500 a\x1b | b', r'verdict  status 500 a\x1b | b where 200 was expected']),
    (b'', TEXT, ['verdict  no reply: Remote end closed connection without response']),
    (hang, ['-t', SHORT], ['verdict  no complete reply within 0.4 s']),
])
def test_once_that_finds_a_fault(answer: Answer, argv: list[str], lines: list[str]) -> None:
    with Site(answer) as site:
        status, out, err = run_once(*argv, site.url())
    assert (status, err) == (1, '')
    assert [line for line in out.splitlines() if not line.startswith('time ')] == ['url      ' + site.url(), *lines]


def test_once_in_the_c_locale(tmp_path: Path) -> None:
    with Site(reply('grün'.encode())) as site:
        status, out, err = run_once('-b', 'grün', site.url(), folder=tmp_path, **C_LOCALE)
    assert (status, err) == (0, '')
    assert r"contains 'gr\xfcn'" in out


def find_watched(text: str) -> list[str]:
    return [re.sub(r'\(.*?\)', '()', line[9:]) for line in text.splitlines() if line.startswith('watched  ')]


@pytest.mark.parametrize('argv, answer, status, watched', [
    (['-p', 'web'], reply(), 0, ['web is RUNNING ()']),
    (['-p', 'web'], FAILING, 1, ['web is RUNNING (): would be restarted']),
    (['-p', 'web', '--grace=30d'], FAILING, 1, ['web is RUNNING (): in its grace, not restarted']),
    (['-p', 'idle'], reply(), 0, ['site:idle is STOPPED: not restarted']),
    (['-p', 'web', '-p', 'nobody'], reply(), 1, ['web is RUNNING ()', 'no process is called nobody']),
    (['-p', 'site'], reply(), 1, [
        'no process is called site; there is a group of that name: for all its processes, write site:*']),
])
def test_once_names_what_is_watched(argv: list[str], answer: Answer, status: int, watched: list[str],
                                    shared: Supervisord) -> None:
    pids = find_pids(shared)
    with Site(answer) as site:
        got, out, err = run_once(*argv, site.url(), SUPERVISOR_SERVER_URL=shared.url)
    assert (got, err, find_watched(out)) == (status, '', watched)
    assert find_pids(shared) == pids


def test_once_finds_supervisord_as_supervisorctl_does(shared: Supervisord, tmp_path: Path) -> None:
    with Site() as site:
        by_option = run_once('--configuration', str(shared.configuration), '-a', site.url(), folder=tmp_path)
        by_folder = run_once('-a', site.url(), folder=shared.folder)
    assert by_option[0] == by_folder[0] == 0
    assert len(find_watched(by_option[1])) == len(find_watched(by_folder[1])) == len(RUNNING_NAMES) + 1


def test_once_without_a_supervisord() -> None:
    with Site() as site:
        status, out, err = run_once('-p', 'web', site.url(), SUPERVISOR_SERVER_URL='unix:///nonexistent/s.sock')
    assert (status, err) == (1, '')
    assert 'verdict  ok\nwatched  unable to tell: supervisord at unix:///nonexistent/s.sock does not answer' in out


def test_once_with_a_configuration_that_is_not_there() -> None:
    with Site() as site:
        status, out, err = run_once('--configuration=/nonexistent', '-p', 'web', site.url())
    assert (status, out, site.requests) == (2, '', [])
    assert err.startswith('httpok: option --configuration: ') and err.count('\n') == 1


# Beyond the usual.

def make_listener(*argv: str) -> httpok.Httpok:
    return httpok.Httpok(httpok.build_options(*read_argv([*argv, 'http://127.0.0.1:1/'], httpok.OPTIONS)), {})


def test_a_late_restart_ends_the_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    with Site() as site:
        listener = httpok.Httpok(httpok.build_options(*read_argv([site.url()], httpok.OPTIONS)), {})
        for restarted in (True, False):
            monkeypatch.setattr(listener._restarter, 'retry', lambda: restarted)
            listener.handle(Event('TICK_5', 'when:1', '', 0.0))
            assert len(site.requests) == (0 if restarted else 1)


def test_a_start_in_the_future_is_not_one_during_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = make_listener('-a')
    restarted: list[int] = []
    monkeypatch.setattr(listener._restarter, 'restart', lambda process, prepare: restarted.append(process.start))
    running = [make_running(start, 1000) for start in (998, 999, 1000, 1001, 5000)]
    monkeypatch.setattr(listener, '_find_watched', lambda: running)
    assert listener._restart_watched(998.5)
    assert restarted == [998, 1001, 5000]   # the clock was set back since the last two


def test_what_is_starting_is_waited_for_in_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    starting = make_running(990, 1000)._replace(state=STARTING)
    listener = make_listener('-a', '--grace=60')
    monkeypatch.setattr(listener, '_find_watched', lambda: [starting])
    assert listener._find_reason_to_wait() == 'the watched processes have run for less than 60 s'
    listener = make_listener('-a', '-E')
    monkeypatch.setattr(listener, '_find_watched', lambda: [starting])
    assert listener._find_reason_to_wait() == 'no watched process is RUNNING'


def make_running(start: int, now: int) -> Process:
    return Process('web', 'web', 7, 20, 'RUNNING', start, now, '')


def test_grace_does_not_wait_for_a_clock_that_was_set_back() -> None:
    assert [httpok.is_younger(make_running(start, 1000), 60) for start in (900, 941, 1000, 5000)] == [
        False, True, True, False]
    options = httpok.build_options(*read_argv(['-a', '--grace=60', 'http://a/'], httpok.OPTIONS))
    assert httpok.describe_watched(make_running(5000, 1000), options, True).endswith('would be restarted')


def test_late_restart_is_mailed_though_a_signal_ends_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = make_listener('-a', '-m', 'bob@example.com')
    mails: list[str] = []
    monkeypatch.setattr(listener._outbox, 'put', lambda subject, body, server: mails.append(subject))

    def retry() -> bool:
        listener._note(Outcome(make_running(1, 2), RESTARTED, 'restarted web'))
        raise Ended

    monkeypatch.setattr(listener._restarter, 'retry', retry)
    with pytest.raises(Ended):
        listener.handle(Event('TICK_5', 'when:1', '', 0.0))
    assert mails == ['httpok: http://127.0.0.1:1/: process web restarted']


def test_no_thread_to_be_had_for_a_lookup_is_no_failed_check(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', fail)
    listener = httpok.Httpok(httpok.build_options(*read_argv(['http://localhost:1/'], httpok.OPTIONS)), {})
    listener.handle(Event('TICK_5', 'when:1', '', 0.0))
    listener.handle(Event('TICK_5', 'when:1', '', 0.0))
    assert listener._failures == 0
    assert capfd.readouterr().err.count('unable to check http://localhost:1/: unable to look up localhost: ') == 2
    assert httpok.main(['--once', 'http://localhost:1/']) == 1
    assert capfd.readouterr().out == (
        "url      http://localhost:1/\nverdict  unable to check: unable to look up localhost: can't start new thread\n")
