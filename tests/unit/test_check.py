"""What httpok checks: its options, the verdict on a response, and the thread of the request."""
from __future__ import annotations

import errno
import os
import socket
import threading
import time
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TIMEOUT, wait_for
from table import CHARACTERS, for_each
from web import Site, hang, response

from superlance import __version__, check, fetch
from superlance.check import BackgroundFetch, Check, Verdict
from superlance.command import Deadline
from superlance.fetch import FetchFailed, Request, Response, Search, TimedOut
from superlance.listener import ExitRequest
from superlance.options import UsageError, read_argv
from superlance.rpc import Unknown

URL = 'http://127.0.0.1:8080/'


def read(*argv: str) -> Check:
    return check.read_check(*read_argv(argv, check.OPTIONS))


@pytest.mark.parametrize(('text', 'expected'), [('100', 100), ('200', 200), ('999', 999)])
def test_parse_status(text: str, expected: int) -> None:
    assert check.parse_status(text) == expected


@for_each('text', ['', '99', '1000', '2oo', '-200', '200 ', '٢٠٠', '2²0', '2' * 5000])
def test_parse_status_rejects(text: str) -> None:
    with pytest.raises(ValueError, match='is not an HTTP status; write a number from 100 to 999'):
        check.parse_status(text)


@pytest.mark.parametrize(('text', 'expected'), [
    ('X-Probe: httpok', ('X-Probe', 'httpok')),
    ('host:example.com:8080', ('host', 'example.com:8080')),
    ('X-Empty:', ('X-Empty', '')),
    ("!#$%&'*+-.^_`|~09aZ: grün ", ("!#$%&'*+-.^_`|~09aZ", 'grün')),
])
def test_parse_header(text: str, expected: tuple[str, str]) -> None:
    assert check.parse_header(text) == expected
    assert check.parse_headers(text) == [expected]


@for_each('text', [
    '', 'X-Probe', ': value', 'X Probe: a', 'X-Prübe: a', 'X-Probe : a', 'X: a\r\nY: b', 'X: a\nb', 'X\n: a',
    'X: \x00'])
def test_parse_header_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="is not a header; write 'NAME: VALUE'"):
        check.parse_header(text)


@pytest.mark.parametrize('text', [
    'Authorization Bearer s3cret', 'Authorization: s3cret\x00', 'X\ts3cret', 'X Y: s3cret\ns3cret'])
def test_a_wrong_header_does_not_show_its_value(text: str) -> None:
    with pytest.raises(ValueError, match=r'^.(Authorization|X)\W') as raised:
        check.parse_header(text)
    assert 's3cret' not in str(raised.value)


@given(st.text(CHARACTERS))
def test_a_header_of_any_text_adds_no_line(text: str) -> None:
    try:
        name, value = check.parse_header(text)
    except ValueError:
        return
    assert (name + value).isprintable()
    assert ':' not in name


def test_headers_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / 'headers'
    file.write_text('Authorization: Bearer s3cret\n\nX: grün\r\n', 'utf-8')
    assert check.parse_headers(f'@{file}') == [('Authorization', 'Bearer s3cret'), ('X', 'grün')]
    given_headers = read(f'--header=@{file}', '--header=Y: z', URL).request.headers
    assert given_headers == (('User-Agent', f'httpok/{__version__}'), ('Authorization', 'Bearer s3cret'),
                             ('X', 'grün'), ('Y', 'z'))


@pytest.mark.parametrize(('content', 'reason'), [
    (b'A: b\ns3cret\n', "line 2 of '{}' is not a header; write 'NAME: VALUE'"),
    (b'A: s3cret\xff\n', "'{}': not a text file in UTF-8"),
    (None, "'{}': No such file or directory"),
])
def test_a_file_without_headers_does_not_show_its_text(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / 'headers'
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match='headers') as raised:
        check.parse_headers(f'@{file}')
    assert str(raised.value) == reason.format(file)
    assert 's3cret' not in str(raised.value)


def test_defaults() -> None:
    got = read(URL)
    assert (got.search.statuses, got.search.text, got.timeout_seconds) == (frozenset([200]), None, 10)
    assert got.request.headers == (('User-Agent', f'httpok/{__version__}'),)
    assert (got.request.unix_socket, got.request.tls_context, got.request.retry_refused) == (None, None, True)
    assert check.describe_check(got) == f'checks {URL} (timeout 10s, expects status 200)'


def test_all_options() -> None:
    got = read('-t', '1.5', '-c', '204', '--code=200', '-b', 'fine', '--unix-socket=/s', '--header=user-agent: me', URL)
    assert (got.search.statuses, got.search.text, got.timeout_seconds) == (frozenset([200, 204]), 'fine', 1.5)
    assert (got.request.headers, got.request.unix_socket) == ((('user-agent', 'me'),), '/s')
    assert check.describe_check(got) == \
        f"checks {URL} through /s (timeout 1.5s, expects status 200 or 204 and 'fine' in the body)"


def test_an_empty_body_text_is_ignored_as_in_2_0_0() -> None:
    given_options, arguments = read_argv(['-b', '', URL], check.OPTIONS)
    assert check.read_check(given_options, arguments).search.text is None
    assert given_options.warnings == ['ignored option -b: its value is empty']


@pytest.mark.parametrize(('argv', 'verified'), [([], False), (['--verify'], True)])
def test_tls(argv: list[str], verified: bool) -> None:
    context = read(*argv, 'https://a.example/').request.tls_context
    assert context
    assert context.check_hostname == verified


@for_each('argv, reason', [
    ([], 'no URL is given; write one, such as http://127.0.0.1:8080/health'),
    (['http://a/', 'http://bob:secret@b/'],
     '2 URLs are given: http://a/ http://bob:***@b/; write one, such as http://127.0.0.1:8080/health; values '
     'that contain spaces need quotes'),
    (['http://bob:secret@a:b/'], "URL 'http://bob:***@a:b/' has a port that is not a number from 1 to 65535"),
    (['http://'], "URL 'http://' has no host"),
    (['-t', '0', URL], "option -t: '0' must be greater than 0"),
    (['--timeout=soon', URL], "option --timeout: 'soon' is not a time"),
    (['-c', 'OK', URL], "option -c: 'OK' is not an HTTP status"),
    (['--header', 'X', URL], "option --header: 'X' is not a header"),
    (['--unix-socket=', URL], "option --unix-socket: '' is not the path of a socket"),
    (['--unix-socket', '/' + 'x' * 107, URL], "option --unix-socket: '/xxx"),
    (['--cafile=/nonexistent', 'https://a/'],
     "option --cafile: unable to use '/nonexistent': No such file or directory; name a file of CA certificates in PEM"),
    ([f'--cafile={__file__}', 'https://a/'], f"option --cafile: unable to use '{__file__}': "),
])
def test_usage_errors(argv: list[str], reason: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(*argv)
    assert str(raised.value).startswith(reason)
    assert 'secret' not in str(raised.value)


def test_the_password_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, 'SUPERLANCE_HTTP_PASSWORD', 'secret')
    got = {user: read(f'http://{user}a/').request.target for user in ('bob@', 'bob:other@', '')}
    assert got['bob@'].authorization == 'Basic Ym9iOnNlY3JldA=='
    assert got['bob:other@'].authorization == 'Basic Ym9iOm90aGVy'
    assert got[''].authorization is None
    assert [target.shown for target in got.values()] == ['http://bob@a/', 'http://bob:***@a/', 'http://a/']


def respond(status: int = 200, reason: str = 'OK', has_text: bool | None = True) -> Response:
    headers: Any = Message()
    return Response(status, reason, headers, has_text, b'', 0.1)


@for_each('got, argv, expected', [
    (respond(), [], ('', '')),
    (respond(204, 'No Content'), ['-c', '200', '-c', '204', '-b', 'x'], ('', '')),
    (respond(500, 'Oh no', None), ['-c', '204', '-c', '200'],
     ('bad status returned', 'status 500 Oh no (expected 200 or 204)')),
    (respond(500, '', None), ['-b', 'x'], ('bad status returned', 'status 500 (expected 200)')),
    (respond(has_text=False), ['-b', 'gr\nün'], ('bad body returned', "the body does not contain 'gr\\nün'")),
    (FetchFailed('Connection refused'), ['-b', 'x'], ('bad status returned', 'Connection refused')),
    (TimedOut('...'), ['-t', '90'], ('bad status returned', 'no complete response within 1m 30s')),
])
def test_decide(got: Response | FetchFailed, argv: list[str], expected: tuple[str, str]) -> None:
    assert check.decide(got, read(*argv, URL)) == Verdict(*expected)


# A request on a thread that can be abandoned.

class HangingLookUp:
    """Makes every DNS lookup wait until it may continue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
        self.may_continue = threading.Event()
        self.calls = 0
        self._port = port
        monkeypatch.setattr(socket, 'getaddrinfo', self._look_up)

    def _look_up(self, host: str, port: int, **options: Any) -> list[Any]:
        self.calls += 1
        self.may_continue.wait(TIMEOUT)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', self._port))]


def make_background() -> BackgroundFetch:
    return BackgroundFetch(ExitRequest())


def get_in_background(background: BackgroundFetch, url: str, seconds: float = TIMEOUT) -> Response | None:
    return background.fetch(Request(fetch.parse_url(url)), seconds, Search(frozenset([200])))


def test_a_request_in_the_background() -> None:
    background = make_background()
    descriptors = len(os.listdir('/dev/fd'))
    with Site(response(), response(status='500 No'), hang) as site:
        for status in (200, 500):
            got = get_in_background(background, site.url())
            assert got is not None and got.status == status
        with pytest.raises(TimedOut):
            get_in_background(background, site.url(), 0.3)
    wait_for(lambda: len(os.listdir('/dev/fd')) <= descriptors + 2)     # those of the ExitRequest


def test_a_slow_first_import_does_not_use_up_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def make_deadline(seconds: float) -> Deadline:
        steps.append('deadline')
        return Deadline(seconds)
    monkeypatch.setattr(check, '_import_http', lambda: steps.append('import'))
    monkeypatch.setattr(check, 'Deadline', make_deadline)
    with Site() as site:
        assert get_in_background(make_background(), site.url())
    assert steps == ['import', 'deadline']


def test_import_without_a_file_descriptor_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with monkeypatch.context() as patch:
        patch.setattr('builtins.__import__', refuse)
        with pytest.raises(Unknown, match='Too many open files'):
            check._import_http()


def test_a_hanging_dns_lookup_is_abandoned_at_the_deadline_and_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, 'ABANDON_SECONDS', 0)
    background = make_background()
    with Site() as site:
        hanging = HangingLookUp(monkeypatch, site.port)
        threads = set(threading.enumerate())
        for _ in range(3):
            with pytest.raises(Unknown, match=r'^DNS lookup of a\.example timed out$'):
                get_in_background(background, 'http://a.example/', 0.1)
        wait_for(lambda: hanging.calls, 'the lookup')
        assert hanging.calls == 1 and len(set(threading.enumerate()) - threads) == 1
        hanging.may_continue.set()
        got = get_in_background(background, 'http://a.example/')    # a DNS lookup of its own
        assert got is not None and got.status == 200
        assert hanging.calls == 2


@pytest.mark.parametrize('is_earlier', [False, True])
def test_a_signal_abandons_a_request(is_earlier: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ExitRequest()
    background = BackgroundFetch(request)
    with Site() as site:
        hanging = HangingLookUp(monkeypatch, site.port)
        if is_earlier:
            with pytest.raises(Unknown):
                get_in_background(background, 'http://a.example/', -1)

        def signal() -> None:
            request.requested = True
            os.write(request._open_pipe()[1], b'\0')    # as Python does for set_wakeup_fd
        threading.Timer(0.1, signal).start()
        started = time.monotonic()
        assert get_in_background(background, 'http://a.example/') is None
        assert get_in_background(background, 'http://a.example/') is None
        assert time.monotonic() - started < TIMEOUT / 2
        hanging.may_continue.set()


def test_no_descriptor_or_no_thread_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made: list[int] = []
    closed: list[int] = []
    real_pipe, real_close = os.pipe, os.close

    def make_pipe() -> tuple[int, int]:
        made.extend(real_pipe())
        return made[-2], made[-1]

    def close(fd: int) -> None:
        closed.append(fd)
        real_close(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'pipe', make_pipe)
        patch.setattr(os, 'close', close)
        patch.setattr(threading.Thread, 'start', fail)
        with pytest.raises(Unknown, match="can't start new thread"):
            get_in_background(make_background(), 'http://127.0.0.1:1/')
    assert len(made) == 2 and set(made) <= set(closed)

    def no_pipe() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(os, 'pipe', no_pipe)
    with pytest.raises(Unknown, match='Too many open files'):
        get_in_background(make_background(), 'http://127.0.0.1:1/')


def test_a_bug_in_the_thread_is_raised_on_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError('bug')
    monkeypatch.setattr(fetch, 'exchange', fail)
    with Site() as site, pytest.raises(KeyError):
        get_in_background(make_background(), site.url())
