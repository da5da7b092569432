"""One attempt to post to the webhook, with real HTTP servers on loopback: text, answers, TLS, time and secrets."""
from __future__ import annotations

import math
import re
import socket
import threading
import time
from pathlib import Path
from typing import Callable
from urllib.parse import quote

import hypothesis.strategies as st
import pytest
import trustme
from chat import Chat
from hypothesis import given
from support import TIMEOUT
from table import CHARACTERS, for_each
from web import Answer, drip, hang, make_head, make_tls, response

from superlance import __version__, mail, webhook
from superlance.notice import Notice, SendFailed

SECRETS = ('T0PSECRET', 'k3yk3yk3y', 't0kent0ken')
MAPPING = {'&amp;': '&', '&lt;': '<', '&gt;': '>'}


def make_notice(subject: str = 'memmon: process web:web restarted', body: str = 'a body\n', server: str = '') -> Notice:
    return Notice(subject, body, server, 0.0)


def post(url: str, notice: Notice | None = None, seconds_left: Callable[[], float] = lambda: math.inf) -> str:
    return mail.send_webhook(mail.Settings(webhook=mail.parse_webhook(url)), 'memmon', notice or make_notice(),
                             seconds_left)


def post_in_vain(url: str, seconds_left: Callable[[], float] = lambda: math.inf) -> SendFailed:
    """Return why a message could not be posted; that never contains a part of the URL."""
    with pytest.raises(SendFailed) as why:
        post(url, seconds_left=seconds_left)
    assert not any(secret in str(why.value) for secret in (*SECRETS, '127.0.0.1'))
    assert why.value.__suppress_context__ or not why.value.__context__   # nor does what would be printed with it
    return why.value


# The text.

@pytest.mark.parametrize(('subject', 'body', 'expected'), [
    ('a subject', '', 'a subject\n\nmemmon on HOST'),
    ('a subject', 'one\n\n two\n\n', 'a subject\n\none\n\n two\n\nmemmon on HOST'),
    ('a\nb\x00', 'c\rd\x1b', 'a | b\\x00\n\nc\\rd\\x1b\n\nmemmon on HOST'),
    ('<!channel> & <users/all>', '@everyone @here &amp;',
     '&lt;!channel&gt; &amp; &lt;users/all&gt;\n\n@\u200beveryone @\u200bhere &amp;amp;\n\nmemmon on HOST'),
    ('@\u202eeveryone', '', '@\u200b\\u202eeveryone\n\nmemmon on HOST'),
    ('\udcff \U0001f600', '', '\\udcff \U0001f600\n\nmemmon on HOST'),
    ('s' * 3000, 'b' * 3000, None),
    ('&' * 3000, '@' * 3000, None),
    ('a subject', 'b' * 3000, None),
    ('s' * 1500, '', 's' * 1500 + '\n\nmemmon on HOST'),
])
def test_text(subject: str, body: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, 'gethostname', lambda: 'HOST')
    text = webhook.make_text('memmon', make_notice(subject, body))
    assert expected is None or text == expected
    assert text.endswith('\n\nmemmon on HOST')
    assert len(text) <= 1900
    assert expected is not None or len(text) > 1880, 'the limit is used'


TEXTS = st.lists(st.sampled_from(['&', '<', '>', '@', 'a', 'b', '\n', '\u20ac', 'a' * 300, '&' * 70]),
                 max_size=40).map(''.join)


@given(TEXTS, TEXTS)
def test_escaped_text_is_never_longer_than_the_limit(subject: str, body: str) -> None:
    """Truncation leaves no incomplete entity, no mention, and the beginning of what was there."""
    text = webhook.make_text('memmon', make_notice(subject, body, '<@' * 200))
    assert len(text) <= 1900
    assert not re.search('[<>]', text)
    assert not re.search('&(?!(amp|lt|gt);)', text)
    assert not re.search('@(?!\u200b)', text)
    plain = re.sub('&(amp|lt|gt);', lambda match: MAPPING[match[0]], text).replace('\u200b', '')
    first = plain.partition('\n\n')[0]
    expected = ' | '.join(line.strip() for line in subject.splitlines() if line.strip())
    if expected and first.endswith(webhook.TRUNCATED):
        assert expected.startswith(first[:-len(webhook.TRUNCATED)]) and len(text) >= 1500
    elif expected:
        assert first == expected


# Answers.

def test_accepted() -> None:
    with Chat(response(status='200 OK')) as chat:
        assert post(chat.url(), make_notice('caf\xe9', 'body', 'sup')) == '200 OK'
        message, = chat.messages
        head, = chat.requests
    assert message == {'text': f'caf\xe9\n\nbody\n\nmemmon on {socket.gethostname()}, supervisor sup'}
    lines = head.split('\r\n')
    assert lines[0] == 'POST /hooks/T0PSECRET/k3yk3yk3y?token=t0kent0ken HTTP/1.1'
    assert 'Content-Type: application/json; charset=UTF-8' in lines
    assert f'User-Agent: superlance/{__version__}' in lines     # Discord rejects some defaults


@for_each('answer, reason, permanent, pause_seconds', [
    (response(status='500 Internal Server Error'), '500 Internal Server Error', False, 0),
    (response(b'', 'Retry-After: 9', status='503 Slow'), '503 Slow', False, 0),
    (response(b'no_service', status='404 Not Found'), '404 Not Found: no_service', True, 0),
    (response(b'T0PSECRET is wrong', status='403 Forbidden'), '403 Forbidden', True, 0),
    (response(b'hooks', status='403 Forbidden'), '403 Forbidden', True, 0),
    (response(status='403 No k3yk3yk3y'), '403 No ***', True, 0),
    (response(status='410'), '410', True, 0),
    (response(b'', 'Location: http://127.0.0.1/k3yk3yk3y', status='302 Found'), '302 Found', True, 0),
    (response(b'', 'Location: /k3yk3yk3y', status='307 Moved'), '307 Moved', True, 0),
    (response(b'', 'Retry-After: 30', status='429 Too Many Requests'), '429 Too Many Requests', False, 30),
    (response(b'', 'retry-after: 0.2', status='429 Too Many Requests'), '429 Too Many Requests', False, 1),
    (response(b'', 'Retry-After: 999999', status='429 Too Many Requests'), '429 Too Many Requests', False, 3600),
    (response(b'', status='429 Too Many Requests'), '429 Too Many Requests', False, 0),
    (b'220 mail.example.com k3yk3yk3y\r\n', "not an HTTP response: '220 mail.example.com ***", False, 0),
    (b'', 'Remote end closed connection without response', False, 0),
])
def test_not_accepted(answer: Answer, reason: str, permanent: bool, pause_seconds: float) -> None:
    with Chat(answer) as chat:
        why = post_in_vain(chat.url())
        assert len(chat.bodies) == 1
    assert str(why).startswith(reason) and (not reason[:3].isdigit() or str(why) == reason)
    assert (why.permanent, why.pause_seconds) == (permanent, pause_seconds)


@for_each('text, seconds', [
    ('', 0), ('0', 1), ('1.5', 1.5), (' 10 ', 10), ('3600', 3600), ('3601', 3600), ('soon', 0), ('-5', 0), ('1e3', 0),
    ('\u0663', 0), ('9' * 400, 0), ('Thu, 01 Jan 1970 00:17:40 GMT', 60), ('Thu, 01 Jan 1970 00:00:00 GMT', 1),
    ('Fri, 01 Jan 2100 00:00:00 GMT', 3600), ('Fri, 99 Jan 2100 00:00:00 GMT', 0), ('Fri, 01 Jan 99999 00:00:00', 0),
])
def test_retry_after(text: str, seconds: float) -> None:
    assert webhook.parse_retry_after(text, 1000.0) == seconds


@given(st.text(CHARACTERS))
def test_any_retry_after(text: str) -> None:
    assert 0 <= webhook.parse_retry_after(text, time.time()) <= 3600


# Failures.

@pytest.mark.parametrize('path', ['', '/hooks/k3yk3yk3y'])
def test_server_that_is_down(path: str) -> None:
    with socket.socket() as reserved:
        reserved.bind(('127.0.0.1', 0))
        why = post_in_vain(f'http://127.0.0.1:{reserved.getsockname()[1]}{path}')
    assert (str(why), why.permanent) == ('Connection refused', False)


@pytest.mark.parametrize('error', [socket.EAI_NONAME, socket.EAI_AGAIN])
def test_name_lookup_that_fails(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> None:
        raise socket.gaierror(error, 'unknown')

    monkeypatch.setattr(socket, 'getaddrinfo', look_up)
    with pytest.raises(SendFailed, match=r'^DNS lookup of \*\*\* failed: unknown$'):
        post('https://k3yk3yk3y.example.com/hooks')


@pytest.mark.parametrize('answer', [hang, drip(b'HTTP/1.1 200 OK\r\nX: ')])
@pytest.mark.parametrize('own_limit', [True, False])
def test_server_that_hangs(answer: Answer, own_limit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert webhook.POST_SECONDS == 30
    monkeypatch.setattr(webhook, 'POST_SECONDS', 0.2 if own_limit else 600)
    end = math.inf if own_limit else time.monotonic() + 0.2
    with Chat(answer) as chat:
        why = post_in_vain(chat.url(), seconds_left=lambda: end - time.monotonic())
    assert (str(why), why.permanent) == ('no complete response in time', False)


def test_body_that_hangs_does_not_matter() -> None:
    is_answering = threading.Event()

    def answer(client: socket.socket) -> None:
        is_answering.set()
        client.sendall(make_head('Content-Length: 100') + b'ok')
        hang(client)

    with Chat(answer) as chat:
        assert post(chat.url(), seconds_left=lambda: 0.2 if is_answering.is_set() else TIMEOUT) == '200 OK'


def test_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'ALL_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    with Chat() as chat:
        assert post(chat.url()) == '200 OK'


def test_user_name_and_password_in_the_url() -> None:
    with Chat() as chat:
        post(chat.url().replace('//', f"//bob:{quote('s3cret/', safe='')}@"))
    assert 'Authorization: Basic Ym9iOnMzY3JldC8=' in chat.requests[0]


# TLS.

def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    with Chat(tls=make_tls(authority, '127.0.0.1')) as chat:
        # Even on loopback: the CA is unknown.
        why = post_in_vain(chat.url())
        assert 'CERTIFICATE_VERIFY_FAILED' in str(why) and not why.permanent
        authority.cert_pem.write_to_path(str(tmp_path / 'ca.pem'))
        monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'ca.pem'))
        assert post(chat.url()) == '200 OK'
        assert len(chat.bodies) == 1
    with Chat(tls=make_tls(authority, 'other.example.com')) as chat:
        assert 'CERTIFICATE_VERIFY_FAILED' in str(post_in_vain(chat.url()))
        assert not chat.bodies


def test_a_test_notice() -> None:
    with Chat(response(), response(b'no_service', status='404 Not Found')) as chat:
        settings = mail.Settings(('bob@example.com',), 'cat >/dev/null', webhook=mail.parse_webhook(chat.url()))
        by_mail = 'sent mail to bob@example.com'
        assert mail.send_test(settings, 'crashmail', 'a test', 'body') == (
            [by_mail, 'sent webhook message: 200 OK'], True)
        assert mail.send_test(settings, 'crashmail', 'a test', 'body') == (
            [by_mail, 'unable to send webhook message: 404 Not Found: no_service'], False)
