"""What httpok checks: its options, and the verdict on a response."""
from __future__ import annotations

import os
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superlance import __version__, check
from superlance.check import Check, Verdict
from superlance.fetch import FetchFailed, Response, TimedOut
from superlance.options import UsageError, read_argv

URL = 'http://127.0.0.1:8080/'


def read(*argv: str) -> Check:
    return check.read_check(*read_argv(argv, check.OPTIONS))


@pytest.mark.parametrize(('text', 'expected'), [('100', 100), ('200', 200), ('599', 599)])
def test_parse_status(text: str, expected: int) -> None:
    assert check.parse_status(text) == expected


@pytest.mark.parametrize('text', ['', '99', '600', '2oo', '-200', '200 ', '٢٠٠', '2²0'])
def test_parse_status_rejects(text: str) -> None:
    with pytest.raises(ValueError, match='is not an HTTP status; write a number from 100 to 599'):
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


@pytest.mark.parametrize('text', [
    '', 'X-Probe', ': value', 'X Probe: a', 'X-Prübe: a', 'X-Probe : a', 'X: a\r\nY: b', 'X: a\nb', 'X\n: a',
    'X: \x00'])
def test_parse_header_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="is not a header; write 'NAME: VALUE'"):
        check.parse_header(text)


@given(st.text())
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


@pytest.mark.parametrize(('argv', 'reason'), [
    ([], 'no URL is given; write one, such as http://127.0.0.1:8080/health'),
    (['http://a/', 'http://bob:secret@b/'],
     '2 URLs are given: http://a/ http://bob:***@b/; write one, such as http://127.0.0.1:8080/health, and put values '
     'that contain spaces in quotes'),
    (['http://bob:secret@a:b/'], "URL 'http://bob:***@a:b/' has a port that is not a number from 1 to 65535"),
    (['http://'], "URL 'http://' has no host"),
    (['-t', '0', URL], "option -t: '0' must be greater than 0"),
    (['--timeout=soon', URL], "option --timeout: 'soon' is not a time"),
    (['-c', 'OK', URL], "option -c: 'OK' is not an HTTP status"),
    (['--header', 'X', URL], "option --header: 'X' is not a header"),
    (['--unix-socket=', URL], "option --unix-socket: '' is not the path of a socket"),
    (['--unix-socket', '/' + 'x' * 107, URL], "option --unix-socket: '/xxx"),
    (['--cafile=/nonexistent', 'https://a/'],
     "option --cafile: cannot use '/nonexistent': No such file or directory; name a file of CA certificates in PEM"),
    ([f'--cafile={__file__}', 'https://a/'], f"option --cafile: cannot use '{__file__}': "),
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


@pytest.mark.parametrize(('response', 'argv', 'expected'), [
    (respond(), [], ('', '')),
    (respond(204, 'No Content'), ['-c', '200', '-c', '204', '-b', 'x'], ('', '')),
    (respond(500, 'Oh no', None), ['-c', '204', '-c', '200'],
     ('bad status returned', 'status 500 Oh no (expected 200 or 204)')),
    (respond(500, '', None), ['-b', 'x'], ('bad status returned', 'status 500 (expected 200)')),
    (respond(has_text=False), ['-b', 'gr\nün'], ('bad body returned', "the body does not contain 'gr\\nün'")),
    (FetchFailed('Connection refused'), ['-b', 'x'], ('bad status returned', 'Connection refused')),
    (TimedOut('...'), ['-t', '90'], ('bad status returned', 'no complete response within 1m 30s')),
])
def test_judge(response: Response | FetchFailed, argv: list[str], expected: tuple[str, str]) -> None:
    assert check.judge(response, read(*argv, URL)) == Verdict(*expected)
