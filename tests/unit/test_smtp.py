"""One attempt over SMTP, with real servers on loopback: delivery, TLS, login, rejections, and servers that are slow."""
from __future__ import annotations

import asyncio
import math
import os
import re
import smtplib
import socket
import ssl
import threading
import time
from base64 import b64encode
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence

import pytest
import trustme
from aiosmtpd.smtp import AuthResult, LoginPassword
from inbox import SmtpController
from support import read_until, serving, wait_for
from table import for_each
from web import make_tls, reset

from superlance import mail, smtp
from superlance.notice import Notice, SendFailed

TO = ('bob@example.com',)
PASSWORD = 's3cret/pass word'
USER_INFO = 'bob:s3cret%2Fpass%20word@'
HOSTILE_BODY = 'sm\xf6rg\xe5s\n.\nQUIT\n..\n' + 'long \U0001f600 ' * 1000 + '\n'

pytestmark = pytest.mark.filterwarnings('ignore:Requiring AUTH while not requiring TLS')  # it is what is tested


class Server(SmtpController):
    """An SMTP server on loopback; each mail that it accepted is (sender, recipients, message, session)."""

    def __init__(self, rejected: Sequence[str] = (), answers: dict[str, str] | None = None, **options: Any) -> None:
        self.accepted: list[tuple[str, list[str], EmailMessage, Any]] = []
        self.logins: list[tuple[str, bytes, bytes]] = []
        self.farewells = 0
        self._rejected = rejected
        self._answers = answers or {}
        super().__init__(self, hostname='127.0.0.1', port=0, server_hostname='mail.example.com', **options)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def handle_MAIL(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        envelope.mail_from = address
        return self._answers.get('MAIL', '250 fine')

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address in self._rejected:
            return self._answers.get('RCPT', '550 no such user\x1b here')
        envelope.rcpt_tos.append(address)
        return '250 fine'

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.accepted.append((envelope.mail_from, envelope.rcpt_tos, message, session))
        return self._answers.get('DATA', '250 queued as 1')

    async def handle_QUIT(self, server: Any, session: Any, envelope: Any) -> str:
        self.farewells += 1
        return self._answers.get('QUIT', '221 bye')

    def log_in(self, server: Any, session: Any, envelope: Any, mechanism: str, data: LoginPassword) -> AuthResult:
        self.logins.append((mechanism, data.login, data.password))
        return AuthResult(success=data == LoginPassword(b'bob', PASSWORD.encode()), handled=False)

    def url(self, scheme: str = 'smtp', user_info: str = '') -> str:
        return f'{scheme}://{user_info}127.0.0.1:{self.port}'


@pytest.fixture(scope='module')
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope='module')
def tls(authority: trustme.CA) -> ssl.SSLContext:
    return make_tls(authority)


@pytest.fixture(scope='module', autouse=True)
def _no_certificates() -> Iterator[None]:
    """No CA is known here, as reading those of the system for each session would take a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SSL_CERT_FILE', os.devnull)
        yield


@pytest.fixture
def _far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loopback count as a network, because no test leaves this machine."""
    monkeypatch.setattr(smtp, 'ip_address', lambda address: SimpleNamespace(is_loopback=False))


@pytest.fixture
def _trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system trust the CA of the servers' certificate."""
    authority.cert_pem.write_to_path(str(tmp_path / 'ca.pem'))
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'ca.pem'))


def make_server(kind: str, tls: ssl.SSLContext, **options: Any) -> Server:
    contexts: dict[str, dict[str, Any]] = {'plain': {}, 'starttls': {'tls_context': tls}, 'smtps': {'ssl_context': tls}}
    return Server(**contexts[kind], **options)


def make_login_server(kind: str, tls: ssl.SSLContext, **options: Any) -> Server:
    server = make_server(kind, tls, auth_required=True, auth_require_tls=kind == 'starttls', **options)
    server.SMTP_kwargs['authenticator'] = server.log_in
    return server


def scheme(kind: str) -> str:
    return 'smtps' if kind == 'smtps' else 'smtp'


def send(url: str, to: Sequence[str] = TO, subject: str = 'a subject', body: str = '',
         seconds_left: Callable[[], float] = lambda: math.inf) -> str:
    settings = mail.Settings(tuple(to), smtp=mail.parse_smtp(url))
    return mail.send_mail(settings, 'crashmail', Notice(subject, body, 'sup', time.time()), seconds_left)


def send_in_vain(url: str, to: Sequence[str] = TO, seconds_left: Callable[[], float] = lambda: math.inf) -> SendFailed:
    """Return why a mail could not be sent."""
    with pytest.raises(SendFailed) as why:
        send(url, to, seconds_left=seconds_left)
    assert 's3cret' not in str(why.value)
    return why.value


# Delivery.

@pytest.mark.parametrize('kind', ['plain', 'starttls', 'smtps'])
def test_delivery(kind: str, tls: ssl.SSLContext) -> None:
    # The CA is unknown here; on loopback that does not matter.
    with make_server(kind, tls) as server:
        assert send(server.url(scheme(kind)), ('bob@example.com', 'Eve <eve@example.com>', 'J\xfcrgen <j@example.com>'),
                    'caf\xe9', HOSTILE_BODY) == '250 queued as 1'
    (sender, recipients, message, session), = server.accepted
    assert re.fullmatch(r'crashmail@[\w.-]+', sender) and sender == message['From']
    assert recipients == ['bob@example.com', 'eve@example.com', 'j@example.com']
    assert message['To'] == 'bob@example.com, Eve <eve@example.com>, J\xfcrgen <j@example.com>'
    assert message['Subject'] == 'caf\xe9'
    text = str(message.get_content()).replace('\r\n', '\n').partition('\n\n-- \n')[0]
    assert text.splitlines() == [line.rstrip() for line in HOSTILE_BODY.splitlines()]
    assert bool(session.ssl) == (kind == 'starttls')


@pytest.mark.parametrize('answer', ['451 not now', '250 fine', '421 too busy'])
def test_answer_to_quit_does_not_matter(answer: str) -> None:
    with Server(answers={'QUIT': answer}) as server:
        assert send(server.url()) == '250 queued as 1'
        wait_for(lambda: server.farewells == 1)
    assert len(server.accepted) == 1


@pytest.mark.parametrize('host', ['x' * 64, 'a..b', 'h\xf6st', 'two words', ''])
def test_host_name_that_is_not_a_domain(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object) -> None:
        raise AssertionError('the own name must not be looked up')

    monkeypatch.setattr(socket, 'gethostname', lambda: host)
    monkeypatch.setattr(socket, 'getfqdn', look_up)
    monkeypatch.setattr(socket, 'gethostbyname', look_up)
    monkeypatch.setattr(socket, 'gethostbyaddr', look_up)
    with Server() as server:
        send(server.url())
    sender, _, message, session = server.accepted[0]
    assert sender == message['From'] == 'crashmail@localhost'
    assert session.host_name == '[127.0.0.1]'


@pytest.mark.parametrize(('host', 'address', 'name'), [
    ('web.example.com', '192.0.2.1', 'web.example.com'),
    ('web', '192.0.2.1', '[192.0.2.1]'),
    ('web', 'fe80::1%eth0', '[IPv6:fe80::1]'),
])
def test_ehlo_name(host: str, address: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, 'gethostname', lambda: host)
    sock: Any = SimpleNamespace(getsockname=lambda: (address, 25))
    assert smtp._make_ehlo_name(sock) == name


# Login.

@pytest.mark.parametrize('kind', ['plain', 'starttls', 'smtps'])
@pytest.mark.parametrize('mechanism', ['PLAIN', 'LOGIN'])
def test_login_on_loopback(kind: str, mechanism: str, tls: ssl.SSLContext) -> None:
    other = 'LOGIN' if mechanism == 'PLAIN' else 'PLAIN'
    with make_login_server(kind, tls, auth_exclude_mechanism=[other]) as server:
        send(server.url(scheme(kind), USER_INFO))
    assert server.logins == [(mechanism, b'bob', PASSWORD.encode())]
    assert server.accepted[0][1] == list(TO)


def test_password_from_the_environment(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SUPERLANCE_SMTP_PASSWORD', PASSWORD)
    with make_login_server('plain', tls) as server:
        send(server.url('smtp', 'bob@'))
    assert server.logins == [('PLAIN', b'bob', PASSWORD.encode())]


def test_wrong_password_makes_one_failed_login_an_hour(tls: ssl.SSLContext) -> None:
    with make_login_server('plain', tls) as server:
        why = send_in_vain(server.url('smtp', 'bob:other-s3cret@'))
    assert str(why).startswith('127.0.0.1: login failed: 535 ')
    assert 'b3RoZXIt' not in str(why)
    assert (why.permanent, why.pause_seconds) == (True, 3600)
    assert len(server.logins) == 1 and not server.accepted


def test_login_that_fails_for_now() -> None:
    with serving(make_dialogue(b'250-x\r\n250 AUTH PLAIN', b'454 try later')) as port:
        why = send_in_vain(f'smtp://bob:s3cret@127.0.0.1:{port}')
    assert str(why) == '127.0.0.1: login failed: 454 try later'
    assert (why.permanent, why.pause_seconds) == (False, 0)


def test_cram_md5_login() -> None:
    challenge = make_dialogue(b'250-x\r\n250 AUTH CRAM-MD5', b'334 PDEyMz4=', b'535 no')
    with serving(challenge) as port:
        assert str(send_in_vain(f'smtp://bob:s3cret@127.0.0.1:{port}')) == '127.0.0.1: login failed: 535 no'


def test_server_without_login() -> None:
    with Server() as server:
        why = send_in_vain(server.url('smtp', USER_INFO))
    assert str(why) == '127.0.0.1 does not support login with PLAIN, LOGIN, CRAM-MD5'
    assert why.permanent and not server.accepted


@pytest.mark.usefixtures('_far_away')
def test_no_login_over_a_network_without_tls(tls: ssl.SSLContext) -> None:
    with make_login_server('plain', tls) as server:
        why = send_in_vain(server.url('smtp', USER_INFO))
    assert str(why) == '127.0.0.1 does not offer STARTTLS; refusing to send the password unencrypted'
    assert why.permanent and not server.logins and not server.accepted


@pytest.mark.usefixtures('_far_away', '_trusted')
@pytest.mark.parametrize('kind', ['starttls', 'smtps'])
def test_login_over_a_network_through_verified_tls(kind: str, tls: ssl.SSLContext) -> None:
    with make_login_server(kind, tls) as server:
        send(server.url(scheme(kind), USER_INFO))
    assert server.logins == [('PLAIN', b'bob', PASSWORD.encode())]


@pytest.mark.usefixtures('_far_away')
@pytest.mark.parametrize(('kind', 'user_info'), [('starttls', USER_INFO), ('smtps', USER_INFO), ('smtps', '')])
def test_certificate_of_an_unknown_ca(kind: str, user_info: str, tls: ssl.SSLContext) -> None:
    with make_login_server(kind, tls) as server:
        why = send_in_vain(server.url(scheme(kind), user_info))
    assert 'CERTIFICATE_VERIFY_FAILED' in str(why)
    assert not server.logins and not server.accepted


@pytest.mark.usefixtures('_far_away', '_trusted')
def test_certificate_of_another_host(authority: trustme.CA) -> None:
    with make_server('smtps', make_tls(authority, 'mail.example.com')) as server:
        assert 'CERTIFICATE_VERIFY_FAILED' in str(send_in_vain(server.url('smtps')))


@pytest.mark.usefixtures('_far_away')
def test_unverified_tls_if_nothing_secret_is_sent(tls: ssl.SSLContext) -> None:
    with make_server('starttls', tls) as server:
        send(server.url())
    assert server.accepted[0][3].ssl


# Rejections and failures.

def make_dialogue(*answers: bytes, greeting: bytes = b'220 hello') -> Callable[[socket.socket], None]:
    """Return a server that answers one line after another, and then closes the connection."""
    def handle(client: socket.socket) -> None:
        client.sendall(greeting + b'\r\n')
        for answer in answers:
            read_until(client, b'\n')
            client.sendall(answer + b'\r\n')
        read_until(client, b'\n')
    return handle


def test_unusual_positive_answer_is_not_a_reason_to_send_the_mail_again() -> None:
    with Server(answers={'DATA': '251 will forward'}) as server:
        assert send(server.url()) == '251 will forward'


def test_one_of_two_recipients_is_rejected() -> None:
    with Server(rejected=['eve@example.com']) as server:
        assert send(server.url(), ('bob@example.com', 'Eve <eve@example.com>')) == (
            '250 queued as 1, eve@example.com was rejected: 550 no such user\\x1b here')
    assert server.accepted[0][1] == ['bob@example.com']


@pytest.mark.parametrize(('answer', 'permanent'), [('550 no such user\x1b here', True), ('450 greylisted', False)])
def test_all_recipients_are_rejected(answer: str, permanent: bool) -> None:
    with Server(rejected=['bob@example.com', 'eve@example.com'], answers={'RCPT': answer}) as server:
        why = send_in_vain(server.url(), ('bob@example.com', 'eve@example.com', 'bob@example.com'))
    shown = answer.replace('\x1b', '\\x1b')
    assert str(why) == (
        f'127.0.0.1: bob@example.com was rejected: {shown}, eve@example.com was rejected: {shown}')
    assert (why.permanent, why.pause_seconds) == (permanent, 0)
    assert not server.accepted


@pytest.mark.parametrize(('step', 'answer', 'permanent'), [
    ('MAIL', '553 not you', True), ('MAIL', '451 not now', False),
    ('DATA', '554 spam', True), ('DATA', '452 disk full', False),
])
def test_message_is_rejected(step: str, answer: str, permanent: bool) -> None:
    with Server(answers={step: answer}) as server:
        why = send_in_vain(server.url())
    assert (str(why), why.permanent) == (f'127.0.0.1: {answer}', permanent)


@pytest.mark.parametrize(('answers', 'reason', 'permanent'), [
    ((b'250-x\r\n250 STARTTLS', b'454 no TLS now'), '127.0.0.1: 454 no TLS now', False),
    ((b'250 x', b'250 fine', b'250 fine', b'503 no DATA'), '127.0.0.1: 503 no DATA', True),
    ((b'500 what', b'502 what'), '127.0.0.1: 502 what', True),
    ((b'250 x',), '127.0.0.1:PORT: Connection unexpectedly closed', False),
])
def test_dialogue_that_goes_wrong(answers: Sequence[bytes], reason: str, permanent: bool) -> None:
    with serving(make_dialogue(*answers)) as port:
        why = send_in_vain(f'smtp://127.0.0.1:{port}')
    assert str(why) == reason.replace('PORT', str(port))
    assert why.permanent == permanent


@for_each('said, expected', [
    (b'', '127.0.0.1:PORT: Connection unexpectedly closed'),
    (b'554 go\x1b[1m away\r\n', '127.0.0.1: 554 go\\x1b[1m away'),
    (b'554-one\r\n554 two\r\n', '127.0.0.1: 554 one | two'),
    (b'HTTP/1.1 400 Bad Request\r\n\r\n', '127.0.0.1: not an SMTP answer: .../1.1 400 Bad Request'),
    (b'220 ' + b'x' * 100000, '127.0.0.1: 500 Line too long.'),
    ((b'220-' + b'x' * 500 + b'\r\n') * 3000, '127.0.0.1:PORT: the answer is too long'),
    (b'554-x\r\n' * 1000 + b'554 x\r\n', '127.0.0.1: 554 ' + ('x | ' * 125).rstrip()),
])
def test_server_of_another_protocol(said: bytes, expected: str) -> None:
    def handle(client: socket.socket) -> None:
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1000):
            pass

    with serving(handle) as port:
        assert expected.replace('PORT', str(port)) in str(send_in_vain(f'smtp://127.0.0.1:{port}'))


def test_server_that_is_down() -> None:
    with socket.socket() as reserved:   # bound, so that nobody else gets this port, but not listening
        reserved.bind(('127.0.0.1', 0))
        port = reserved.getsockname()[1]
        why = send_in_vain(f'smtp://127.0.0.1:{port}')
    assert str(why) == f'127.0.0.1:{port}: Connection refused'
    assert not why.permanent


def test_connection_that_is_reset() -> None:
    def handle(client: socket.socket) -> None:
        client.sendall(b'220 hello\r\n')
        client.recv(1)
        reset(client)

    with serving(handle) as port:
        why = str(send_in_vain(f'smtp://127.0.0.1:{port}'))
    assert why == f'127.0.0.1:{port}: Connection unexpectedly closed: Connection reset by peer'


@pytest.mark.parametrize('host', ['x' * 300, 'a..b'])
def test_host_that_does_not_exist(host: str) -> None:
    assert str(send_in_vain(f'smtp://{host}:25')).startswith(f'{host}:25: ')


def test_name_lookup_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution')

    monkeypatch.setattr(socket, 'getaddrinfo', look_up)
    assert str(send_in_vain('smtp://mail.example.com')) == (
        'mail.example.com:25: DNS lookup of mail.example.com failed: Temporary failure in name resolution')


def test_answer_that_repeats_the_password() -> None:
    plain = b64encode(f'\0bob\0{PASSWORD}'.encode())
    rejection = b'535 no: AUTH PLAIN %s, %s' % (plain, PASSWORD.encode())
    with serving(make_dialogue(b'250-x\r\n250 AUTH PLAIN', rejection)) as port:
        why = send_in_vain(f'smtp://{USER_INFO}127.0.0.1:{port}')
    assert str(why) == '127.0.0.1: login failed: 535 no: AUTH PLAIN ***, ***'


# Time.

def test_deadlines() -> None:
    assert (smtp.SEND_SECONDS, smtp.ANSWER_SECONDS) == (60, 600)


@pytest.mark.parametrize('said', [b'', b'220 hello\r\n'])
def test_server_that_does_not_respond(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, 'SEND_SECONDS', 0.3)

    def handle(client: socket.socket) -> None:
        client.sendall(said)
        while client.recv(1000):
            pass

    with serving(handle) as port:
        assert str(send_in_vain(f'smtp://127.0.0.1:{port}')) == f'127.0.0.1:{port}: timed out'


@pytest.mark.parametrize('own_limit', [True, False])
def test_deadline_is_that_of_the_whole_session(own_limit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says something now and then does not extend it; nor does it at exit."""
    if own_limit:
        monkeypatch.setattr(smtp, 'SEND_SECONDS', 0.5)
    stop = threading.Event()

    def handle(client: socket.socket) -> None:
        while not stop.wait(0.05):
            client.sendall(b'220-more\r\n')

    end = math.inf if own_limit else time.monotonic() + 0.5
    with serving(handle) as port:
        why = send_in_vain(f'smtp://127.0.0.1:{port}', seconds_left=lambda: end - time.monotonic())
        stop.set()
    assert str(why) == f'127.0.0.1:{port}: timed out'


class SlowFilter(Server):
    """A server that takes its time after the end of DATA, as one with a spam filter does."""

    def __init__(self, seconds: float, at_data: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.seconds = seconds
        self.at_data = at_data

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.at_data()
        await asyncio.sleep(self.seconds)
        return await super().handle_DATA(server, session, envelope)


def test_slow_answer_after_data_gets_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[SimpleNamespace] = []

    def make_deadline(seconds: float) -> SimpleNamespace:
        left = SimpleNamespace(seconds=seconds)
        left.seconds_left = lambda: left.seconds
        deadlines.append(left)
        return left
    monkeypatch.setattr(smtp, 'Deadline', make_deadline)
    # The first deadline passes after the end of DATA, before the answer.
    with SlowFilter(0.1, lambda: setattr(deadlines[0], 'seconds', 0)) as server:
        assert send(server.url()) == '250 queued as 1'
        assert len(server.accepted) == 1


def test_answer_after_data_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, 'ANSWER_SECONDS', 0.3)
    with SlowFilter(1) as server:
        assert str(send_in_vain(server.url())) == f'127.0.0.1:{server.port}: timed out'


def test_mail_with_an_exotic_failure_of_smtplib(monkeypatch: pytest.MonkeyPatch) -> None:
    """smtplib raises ValueError for what it can't send."""
    def fail(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(smtplib.SMTP, 'mail', fail)
    with Server() as server:
        assert str(send_in_vain(server.url())) == f'127.0.0.1:{server.port}: ValueError'
