"""Mail: the options, what a message contains, and one attempt to send it with a mail command."""
from __future__ import annotations

import math
import os
import re
import socket
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given
from inbox import write_account
from support import TIMEOUT, find_children, is_alive, read, wait_for, write_script
from table import for_each

from superlance import command, mail
from superlance.notice import Notice, SendFailed, hide
from superlance.options import Given, UsageError, parse_addresses, read_argv

TO = ('bob@example.com',)
NOW = 1795330000.0
WEBHOOK = 'https://chat.example.com:8443/hooks/T0PSECRET/k3yk3yk3y?token=t0kent0ken'


# The options.

@pytest.fixture(autouse=True)
def _no_secrets_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('SUPERLANCE_SMTP_PASSWORD', raising=False)
    monkeypatch.delenv('SUPERLANCE_WEBHOOK', raising=False)


@for_each('url, expected', [
    ('smtp://mail.example.com', ('mail.example.com', 25, False, '', '')),
    ('smtps://mail.example.com', ('mail.example.com', 465, True, '', '')),
    ('SMTP://Mail.Example.com/', ('mail.example.com', 25, False, '', '')),
    ('smtp://localhost:2525', ('localhost', 2525, False, '', '')),
    ('smtp://localhost:', ('localhost', 25, False, '', '')),
    ('smtps://192.0.2.1:1/', ('192.0.2.1', 1, True, '', '')),
    ('smtp://[::1]', ('::1', 25, False, '', '')),
    ('smtps://[2001:db8::1]:587', ('2001:db8::1', 587, True, '', '')),
    ('smtp://b\xfccher.example:25', ('b\xfccher.example', 25, False, '', '')),
    ('smtp://bob@localhost', ('localhost', 25, False, 'bob', '')),
    ('smtp://bob:s3cret@localhost:25', ('localhost', 25, False, 'bob', 's3cret')),
    ('smtps://bob:a:b@c@[::1]:465', ('::1', 465, True, 'bob', 'a:b@c')),
    ('smtp://bob%40example.com:%73%2f%3A%40%25@localhost', ('localhost', 25, False, 'bob@example.com', 's/:@%')),
    ('smtp://bob:s3%0d%0acret@localhost', ('localhost', 25, False, 'bob', 's3\r\ncret')),
])
def test_parse_smtp(url: str, expected: tuple[str, int, bool, str, str]) -> None:
    assert mail.parse_smtp(url) == mail.SmtpServer(*expected)


@for_each('url, shown', [
    ('', ''),
    ('localhost', 'localhost'),
    ('localhost:25', 'localhost:25'),
    ('http://localhost', 'http://localhost'),
    ('smtp:localhost', 'smtp:localhost'),
    ('smtp://', 'smtp://'),
    ('smtp://:25', 'smtp://:25'),
    ('smtp://localhost:0', 'smtp://localhost:0'),
    ('smtp://localhost:65536', 'smtp://localhost:65536'),
    ('smtp://localhost:mail', 'smtp://localhost:***'),
    ('smtp://bob:s3cret', 'smtp://bob:***'),
    ('smtp://local host', 'smtp://local host'),
    ('smtp://local\nhost', 'smtp://local\nhost'),
    ('smtp://localhost\x00', 'smtp://localhost\x00'),
    ('smtp://localhost/inbox', 'smtp://localhost/inbox'),
    ('smtp://localhost?x', 'smtp://localhost?x'),
    ('smtp://localhost#x', 'smtp://localhost#x'),
    ('smtp://[::1', 'smtp://[::1'),
    ('smtp://local\u2100host', 'smtp://local\u2100host'),
    ('smtp://bob:s3cret@', 'smtp://***@'),
    ('smtp://bob:s3cret@localhost:mail', 'smtp://***@localhost:mail'),
    ('smtp://bob:s3/cret@localhost', 'smtp://***@localhost'),
    ('smtp://bob:25/s3cret@localhost', 'smtp://***@localhost'),
    ('smtp://bob:25?s3cret@localhost', 'smtp://***@localhost'),
    ('smtp://bob:s3#cret@localhost', 'smtp://***@localhost'),
    ('smtp://bob:s3[cret@localhost', 'smtp://***@localhost'),
    ('smtp://bob:s3\u2100cret@localhost', 'smtp://***@localhost'),
    ('smtp://bob:s3\ncret@localhost', 'smtp://***@localhost'),
    ('smpt://bob:s3cret@localhost', 'smpt://***@localhost'),
    ('http://bob:s3cret@localhost', 'http://***@localhost'),
    ('bob:s3cret@localhost', '***@localhost'),
    ('bob:s3cret://@localhost', '***@localhost'),
])
def test_invalid_smtp(url: str, shown: str) -> None:
    complaint = f'{shown!r} is not a mail server; write smtp://[user[:password]@]host[:port] or smtps://...'
    with pytest.raises(ValueError, match=f'^{re.escape(complaint)}$'):
        mail.parse_smtp(url)


@pytest.mark.parametrize('url', ['smtp://b%C3%B6b:s3cret@localhost', 'smtp://bob:s3cr\xeat@localhost'])
def test_login_beyond_ascii_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match=r"^'smtp://\*\*\*@localhost': user name and password must be ASCII"):
        mail.parse_smtp(url)


def test_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SUPERLANCE_SMTP_PASSWORD', 'as:it/is %41')
    assert mail.parse_smtp('smtp://bob@localhost').password == 'as:it/is %41'
    assert mail.parse_smtp('smtp://bob:@localhost').password == 'as:it/is %41'
    assert mail.parse_smtp('smtp://bob:other@localhost').password == 'other'
    monkeypatch.setenv('SUPERLANCE_SMTP_PASSWORD', 's3cr\xeat')
    with pytest.raises(ValueError, match='must be ASCII'):
        mail.parse_smtp('smtp://bob@localhost')
    mail.parse_smtp('smtp://localhost')  # no login, no error


def read_options(*argv: str, without_recipients: bool = False) -> mail.Settings:
    """Return the settings of a command line that gives no warning."""
    given, _ = read_argv(argv, mail.OPTIONS)
    settings = mail.read_settings(given, without_recipients)
    assert not given.warnings
    return settings


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mail.read_settings(Given()) == mail.Settings((), '/usr/sbin/sendmail -t -i', None, None, None, False)
    assert read_options(
        '-m', 'a@b, "C, D" <c@d>,', '--email=root', '--smtp=smtp://localhost', '--from', 'Eve <e@f>',
    ) == mail.Settings(('a@b', '"C, D" <c@d>', 'root'), mail.SENDMAIL,
                       mail.SmtpServer('localhost', 25, False, '', ''), 'Eve <e@f>')
    assert read_options('-m', 'root', '-s', 'first', '--sendmail_program', 'cat > x').sendmail == 'cat > x'
    webhook = read_options('--webhook', WEBHOOK).webhook
    assert webhook and (webhook.tls, webhook.host, webhook.port) == (True, 'chat.example.com', 8443)
    assert webhook.path == '/hooks/T0PSECRET/k3yk3yk3y?token=t0kent0ken'
    monkeypatch.setenv('SUPERLANCE_WEBHOOK', WEBHOOK)
    assert read_options().webhook == webhook
    monkeypatch.setenv('SUPERLANCE_WEBHOOK', 'https://other.example.com/')
    assert read_options('--webhook', WEBHOOK).webhook == webhook
    monkeypatch.setenv('SUPERLANCE_WEBHOOK', '')
    assert read_options().webhook is None


@for_each('argv, sends_mail, sends_anything, description', [
    ([], False, False, 'no mail'),
    (['-m', 'a@b, C <c@d>'], True, True, 'mail to a@b, C <c@d> through /usr/sbin/sendmail -t -i'),
    (['-m', 'a@b', '-s', mail.SENDMAIL], True, True, 'mail to a@b through /usr/sbin/sendmail -t -i'),
    (['-m', 'a@b', '-s', 'mailer --key s3cret'], True, True, 'mail to a@b through the -s command'),
    (['-m', 'a@b', '--smtp', 'smtp://bob:s3cret@[::1]'], True, True, 'mail to a@b through smtp://[::1]:25'),
    (['-m', 'a@b', '--smtp', 'smtps://x.org:99'], True, True, 'mail to a@b through smtps://x.org:99'),
    (['--webhook', WEBHOOK], False, True, 'notices to the webhook'),
    (['-m', 'a@b', '--webhook', WEBHOOK], True, True,
     'mail to a@b through /usr/sbin/sendmail -t -i; notices to the webhook'),
])
def test_where_notices_go_is_described_without_secrets(
        argv: list[str], sends_mail: bool, sends_anything: bool, description: str) -> None:
    settings = read_options(*argv)
    assert (settings.sends_mail, settings.sends_anything) == (sends_mail, sends_anything)
    assert mail.describe(settings) == description


def test_explicit_command_without_recipients() -> None:
    assert not mail.read_settings(read_argv(['-s', 'cat > x'], mail.OPTIONS)[0]).sends_mail
    settings = read_options('-s', 'cat > x', '--from', 'eve@x', without_recipients=True)
    assert settings.sends_mail and settings.sends_anything
    assert mail.describe(settings) == 'mail through the -s command'
    assert not read_options(without_recipients=True).sends_mail     # the default command has no effect then
    assert not read_options('-m', 'a@b', '-s', 'x', without_recipients=True).without_recipients


@for_each('argv, warnings', [
    (['-m', ''], ['ignored option -m: its value is empty']),
    (['-m', '', '-m', ' , '], ['ignored option -m: its value is empty']),
    (['-m', 'a@b,'], []),
    (['-s', 'x'], ['ignored option -s: it has no effect without -m']),
    (['--smtp', 'smtp://x', '--from', 'a@b'], ['ignored option --smtp: it has no effect without -m',
                                              'ignored option --from: it has no effect without -m']),
    (['-m', 'a@b', '-s', 'x', '--smtp', 'smtp://x'], ['ignored option -s: --smtp takes precedence']),
    (['--webhook', 'http://chat.example.com/x'],
     ['the webhook URL, which is secret, is sent unencrypted; use https instead of http']),
    (['--webhook', 'http://192.168.1.1/x'], []),
    (['--webhook', 'http://[::1]:8065/x'], []),
    (['--webhook', 'http://chat:8065/x'], []),
    (['--webhook', 'http://8.8.8.8/x'],
     ['the webhook URL, which is secret, is sent unencrypted; use https instead of http']),
])
def test_options_without_effect_are_warnings(argv: list[str], warnings: list[str]) -> None:
    given, _ = read_argv(argv, mail.OPTIONS)
    mail.read_settings(given)
    assert given.warnings == warnings


def test_explicit_command_without_recipients_takes_precedence_over_smtp() -> None:
    given, _ = read_argv(['-s', 'x', '--smtp', 'smtp://x'], mail.OPTIONS)
    assert mail.read_settings(given, without_recipients=True).smtp is None
    assert given.warnings == ['ignored option --smtp: it has no effect without -m']


@pytest.mark.parametrize(('argv', 'complaint'), [
    (['--email', 'a@b;c@d'], "option --email: 'a@b;c@d' is not a mail address"),
    (['--smtp', 'smtp://bob:s3cret@x:y'], r"option --smtp: 'smtp://\*\*\*@x:y' is not a mail server"),
    (['--from', 'a@b,c@d'], "option --from: 'a@b,c@d' is more than one mail address"),
    (['--from', 'smtp://bob:s3cret@x'], r"option --from: 'smtp://bob:\*\*\*@x' is not a mail address"),
])
def test_invalid_options(argv: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match='^' + complaint):
        read_options(*argv)


@pytest.mark.parametrize('url', [
    '', 'k3yk3yk3y', 'ftp://k3yk3yk3y/x', 'https:///k3yk3yk3y', 'https://k3yk3yk3y:port/', 'https://k3yk3yk3y:0/',
    'https://chat.example.com/k3y k3yk3y', 'https://[k3yk3yk3y', 'https://k3yk3yk3y\u2100/',
    'chat.example.com/k3yk3yk3y', f"https://{'k3yk3yk3y' * 10}.com/"])
def test_invalid_webhook_is_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = 'not a valid URL (not shown, because it is secret); write https://HOST/PATH'
    with pytest.raises(UsageError) as why:
        read_options('--webhook', url)
    assert str(why.value) == f'option --webhook: {complaint}'
    if url:
        monkeypatch.setenv('SUPERLANCE_WEBHOOK', url)
        with pytest.raises(UsageError, match=f'^environment variable SUPERLANCE_WEBHOOK: {re.escape(complaint)}$'):
            read_options()


@pytest.mark.parametrize(('text', 'expected'), [
    ('/bin/sh -c true', ''),
    ('sh -c true', ''),
    ('cd /tmp; cat > x', ''),
    ('{ cat; } > x', ''),
    ('"/nonexistent/my mailer" x', ''),
    ('FOO=1 /nonexistent/mailer', ''),
    (' ', ''),
    ('/nonexistent/s3cret-mailer -t', 'the -s command was not found or is not executable'),
    ('/etc/passwd', 'the -s command was not found or is not executable'),
    ('/bin', 'the -s command was not found or is not executable'),
    ('nonexistent-s3cret', 'the -s command was not found or is not executable'),
])
def test_missing_mail_command(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = mail.Settings(TO, text)
    assert mail.find_command_problem(settings) == expected
    assert mail.find_command_problem(settings._replace(recipients=())) == ''
    assert mail.find_command_problem(settings._replace(smtp=SERVER)) == ''
    monkeypatch.setattr(mail, 'SENDMAIL', text)
    assert expected == '' or mail.find_command_problem(settings) == (
        f'mail command {text.split()[0]} not found: install a mail server such as Postfix, or use --smtp or -s')


# The message.

SERVER = mail.SmtpServer('localhost', 25, False, '', '')
HEADERS = ['To', 'Subject', 'Date', 'Message-ID', 'Auto-Submitted', 'Content-Type', 'Content-Transfer-Encoding',
           'MIME-Version']


def compose(subject: str = 'hello', body: str = 'a body\n', server: str = '', to: Sequence[str] = TO,
            smtp: mail.SmtpServer | None = None, sender: str | None = None) -> bytes:
    """Return the bytes of a message, after checking what applies to all."""
    settings = mail.Settings(tuple(to), '', smtp, sender)
    data = mail.compose(settings, 'memmon', Notice(subject, body, server, NOW)).as_bytes()
    assert max(map(len, data.split(b'\n'))) <= 998
    assert b'\r' not in data and b'\0' not in data
    names = [line.split(':')[0] for line in data.decode().split('\n\n')[0].split('\n') if line[:1] not in ' \t']
    assert names == HEADERS[:1] * bool(to) + ['From'] * bool(smtp or sender) + HEADERS[1:]
    return data


def parse(data: bytes) -> EmailMessage:
    message = message_from_bytes(data, policy=policy.default)
    assert isinstance(message, EmailMessage)
    return message


def split_body(message: EmailMessage) -> tuple[str, str]:
    """Return the text and the last line."""
    text, separator, origin = str(message.get_content()).replace('\r\n', '\n').rpartition('\n\n-- \n')
    assert separator
    return text, origin


def test_message() -> None:
    data = compose('memmon: process web restarted', 'line 1\n\n  line 3\n', 'my supervisor',
                   ('a@b.c', '"D, E" <d@e.f>'))
    message = parse(data)
    assert message['To'] == 'a@b.c, "D, E" <d@e.f>'
    assert message['Subject'] == 'memmon: process web restarted'
    assert parsedate_to_datetime(message['Date']).timestamp() == NOW
    assert re.match(r'<[^@<> ]+@[\w.-]+>$', message['Message-ID'])
    assert message['Auto-Submitted'] == 'auto-generated'
    assert message.get_content_type() == 'text/plain' and message.get_content_charset() == 'utf-8'
    assert split_body(message) == ('line 1\n\n  line 3',
                                   f'memmon on {socket.gethostname()}, supervisor my supervisor\n')
    assert parse(compose())['Message-ID'] == parse(compose())['Message-ID']     # the same at each attempt


@pytest.mark.parametrize(('smtp', 'sender', 'expected'), [
    (None, None, None),                     # sendmail adds its own
    (None, 'Eve <eve@example.com>', 'Eve <eve@example.com>'),
    (SERVER, None, 'memmon@here.example.com'),
    (SERVER, 'eve@example.com', 'eve@example.com'),
])
def test_from(smtp: mail.SmtpServer | None, sender: str | None, expected: str | None,
              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, 'gethostname', lambda: 'here.example.com')
    assert parse(compose(smtp=smtp, sender=sender))['From'] == expected


@pytest.mark.parametrize(('name', 'domain', 'shown'), [
    ('web-1', 'web-1', 'web-1'),
    ('web_1.example.com', 'web_1.example.com', 'web_1.example.com'),
    ('', 'localhost', ''),
    ('web.', 'localhost', 'web.'),
    ('two words', 'localhost', 'two words'),
    ('h\xf6st', 'localhost', 'h\xf6st'),
    ('h\udcffst', 'localhost', r'h\udcffst'),
    ('a\nBcc: eve@example.com', 'localhost', r'a\nBcc: eve@example.com'),
    ('[a>,', 'localhost', '[a>,'),
    ('a..b', 'localhost', 'a..b'),
    ('x' * 63, 'x' * 63, 'x' * 63),
    ('x' * 64, 'localhost', 'x' * 64),
    ('x.' * 127 + 'x', 'localhost', 'x.' * 127 + 'x'),
])
def test_host(name: str, domain: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, 'gethostname', lambda: name)
    message = parse(compose(smtp=SERVER))
    assert message['From'] == 'memmon@' + domain
    assert str(message['Message-ID']).endswith(f'@{domain}>')
    assert split_body(message)[1] == f'memmon on {shown}\n'


@for_each('subject, expected', [
    ('', ''),
    ('plain', 'plain'),
    ('sm\xf6rg\xe5s \u65e5\u672c \U0001f600', 'sm\xf6rg\xe5s \u65e5\u672c \U0001f600'),
    ('x' * 2000, 'x' * 2000),
    ('\xe9' * 2000, '\xe9' * 2000),
    ('x ' * 1500, ' '.join('x' * 1500)),
    ('"quoted" <a@b> (c); d=e, \\', '"quoted" <a@b> (c); d=e, \\'),
    ('a\nBcc: eve@example.com', 'a | Bcc: eve@example.com'),
    ('a\r\nBcc: eve@example.com\r\n\r\nbody', 'a | Bcc: eve@example.com | body'),
    ('a\rBcc: eve@example.com', 'a | Bcc: eve@example.com'),
    ('a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g', 'a | b | c | d | e | f | g'),
    ('a\x00b\x1b[1mc\x7f\x9b', r'a\x00b\x1b[1mc\x7f\x9b'),
    ('a\tb', r'a\tb'),
    ('\ud800a\udfff\udc80', r'\ud800a\udfff\udc80'),
    # Encoded words (RFC 2047), of which email.message makes headers.
    ('=?utf-8?q?a=0aBcc:_eve@example.com?=', '= ?utf-8?q?a=0aBcc:_eve@example.com?='),
    ('=?utf-8?q?a=0a=0abody?=', '= ?utf-8?q?a=0a=0abody?='),
    ('=?utf-8?b?Cgpib2R5?=', '= ?utf-8?b?Cgpib2R5?='),
    ('=?utf-7?q?+AAo-Bcc:?=', '= ?utf-7?q?+AAo-Bcc:?='),
    ('x=?utf-8?q?=0d?= =?utf-8?q?=ff?=', 'x= ?utf-8?q?=0d?= = ?utf-8?q?=ff?='),
    ('==?utf-8?q?=0a?=', '== ?utf-8?q?=0a?='),
    ('=\n?utf-8?q?=0a?=', '= | ?utf-8?q?=0a?='),
])
def test_subject(subject: str, expected: str) -> None:
    assert parse(compose(subject))['Subject'] == expected


@for_each('body, expected', [
    ('', ''),
    ('\n\n', ''),
    ('one\n\n\n', 'one'),
    ('one\r\ntwo\r\n', 'one\ntwo'),
    ('a\tb', 'a       b'),
    ('trailing   \nspace', 'trailing\nspace'),
    ('From here\n.\n..\n-- \nFrom there', 'From here\n.\n..\n--\nFrom there'),
    ('Bcc: eve@example.com\n\nsm\xf6rg\xe5s \U0001f600', 'Bcc: eve@example.com\n\nsm\xf6rg\xe5s \U0001f600'),
    ('a\rb\x0bc\x0cd\x85e\u2028f', r'a\rb\x0bc\x0cd\x85e\u2028f'),
    ('a\x00b\x1b[1mc\x7f', r'a\x00b\x1b[1mc\x7f'),
    ('\ud800\udfff\udc80', r'\ud800\udfff\udc80'),
    ('=?utf-8?q?a=0ab?= =0a=\n=3D', '=?utf-8?q?a=0ab?= =0a=\n=3D'),
    ('x' * 998, 'x' * 998),
    ('x' * 999, 'x' * 999),
    ('x' * 100000, 'x' * 100000),
    ('\xe9' * 499, '\xe9' * 499),
    ('\xe9' * 500, '\xe9' * 500),
    ('\U0001f600' * 5000 + '\n.\n', '\U0001f600' * 5000 + '\n.'),
])
def test_body(body: str, expected: str) -> None:
    for smtp in (None, SERVER):
        data = compose(body=body, smtp=smtp)
        assert split_body(parse(data))[0] == expected
        assert smtp is None or data.isascii(), 'a server need not take anything else'


@pytest.mark.parametrize(('server', 'shown'), [
    ('a\nBcc: eve@example.com\n.\n', 'a | Bcc: eve@example.com | .'),
    ('sup\xe9rviseur\x1b\udcff', 'sup\xe9rviseur\\x1b\\udcff'),
    ('x' * 2000, 'x' * 2000),
])
def test_identifier(server: str, shown: str) -> None:
    assert split_body(parse(compose(server=server)))[1].endswith(f', supervisor {shown}\n')


@for_each('to, expected', [
    (['Bob <bob@example.com>', 'root'], ['bob@example.com', 'root']),
    (['bob@example.com (Bob B.)', 'eve@example.com'], ['bob@example.com', 'eve@example.com']),
    (['"x, y, z"<x@example.com>', '<a..b@example.com>'], ['x@example.com', 'a..b@example.com']),
    (['"Doe; J: (=) [\'" <j@example.com>', "J. O'Hara Jr. <o@example.com>"], ['j@example.com', 'o@example.com']),
    ([f'user{number}@example.com' for number in range(300)], [f'user{number}@example.com' for number in range(300)]),
    (['J\xfcrgen M\xfcller <j@example.com>', 'eve@example.com'], ['j@example.com', 'eve@example.com']),
    (['"M\xfcller, Bob; x: eve@example.com" <b@example.com>', 'b@example.com (B\xf6b)'], ['b@example.com'] * 2),
])
def test_recipients(to: list[str], expected: list[str]) -> None:
    data = compose(to=read_options(*('-m' + address for address in to)).recipients, sender='root')
    assert [address.addr_spec for address in parse(data)['To'].addresses] == expected


@given(st.lists(st.text(st.sampled_from('ab.@<>()"\\,:;[]= ?\xe9\u65e5\n\x85'), max_size=12), min_size=1, max_size=3),
       st.sampled_from(['a subject', 'caf\xe9']))
def test_any_accepted_address_arrives_as_it_is(names: list[str], subject: str) -> None:
    """A display name of any characters is rejected, or changes neither the addresses nor the headers."""
    text = ', '.join(f'{name}<user{number}@example.com>' for number, name in enumerate(names))
    try:
        recipients = parse_addresses(text)
    except ValueError:
        return
    data = compose(subject, to=recipients, sender=recipients[0])
    expected = re.findall(r'<(user\d@example\.com)>', ''.join(re.sub('"[^"]*"', '', text)))
    assert [address.addr_spec for address in parse(data)['To'].addresses] == expected


def test_long_subject_is_one_line() -> None:
    subject = f"httpok: http://localhost:8080/{'x' * 200}: bad status returned"
    assert f'Subject: {subject}\n'.encode() in compose(subject)


# One attempt with a mail command.

NOTICE = Notice('a subject', 'a body', 'sup', NOW)


def send(command: object, notice: Notice = NOTICE, seconds_left: Callable[[], float] = lambda: math.inf) -> str:
    return mail.send_mail(mail.Settings(TO, str(command)), 'crashmail', notice, seconds_left)


def wait_for_pids(path: Path, number: int) -> list[int]:
    """Return the pids in a file once there are so many."""
    wait_for(lambda: len(read(path).split()) >= number and read(path).endswith('\n'), f'pids in {path}')
    return list(map(int, read(path).split()))


def test_command_reads_the_message(tmp_path: Path) -> None:
    assert send(f'cat > {tmp_path}/mail; echo queued as 1') == 'queued as 1'
    message = parse((tmp_path / 'mail').read_bytes())
    assert message['To'] == 'bob@example.com'
    assert split_body(message) == ('a body', f'crashmail on {socket.gethostname()}, supervisor sup\n')


def test_command_without_recipients_gets_no_to(tmp_path: Path) -> None:
    settings = read_options('-s', f'cat > {tmp_path}/mail', without_recipients=True)
    mail.send_mail(settings, 'crashmail', NOTICE, lambda: math.inf)
    message = parse((tmp_path / 'mail').read_bytes())
    assert 'To' not in message and message['Subject'] == 'a subject'


@pytest.mark.parametrize(('text', 'reason'), [
    ('exit 3', 'the -s command: exit status 3'),
    ('kill -9 $$', 'the -s command: terminated by signal 9'),
    ('s3cret\0b', 'the -s command: embedded null byte'),
    ('exec 0<&-; echo full; exit 1', 'the -s command: exit status 1: full'),
    ('printf "a\\377\\n\\n\\033b" >&2; exit 1', 'the -s command: exit status 1: a\ufffd | \\x1bb'),
])
def test_failing_command(text: str, reason: str) -> None:
    with pytest.raises(SendFailed) as why:
        send(text, NOTICE._replace(body='x\n' * 50000))
    assert str(why.value) == reason
    assert not why.value.permanent and not why.value.pause_seconds


@for_each('text, visible', [
    ('/nonexistent/s3cret-mailer -t', 'not found'),
    ('s3cret-mailer', 'not found'),
    ('KEY=s3cret-key; echo "no $KEY"; exit 1', 'exit status 1: no ***'),
    ('echo rejected by s3cret-key >&2; exit 1', 'rejected by ***'),
    ('echo rejected --key=secretkey user:secretkey; exit 1', 'rejected --key=*** ***'),
    ("echo 's3cret-key is wrong'; exit 1; 'unterminated", ''),
    ('cat < /nonexistent/s3cret-key', '***'),
])
def test_text_of_the_command_is_never_shown(text: str, visible: str) -> None:
    with pytest.raises(SendFailed) as why:
        send(text)
    assert 's3cret' not in str(why.value)
    assert visible in str(why.value)


def test_text_of_a_command_is_not_shown_after_success() -> None:
    assert send('cat > /dev/null; echo sent with s3cret-key') == 'sent with ***'


def test_default_command_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, 'SENDMAIL', '/nonexistent/sendmail -t -i')
    with pytest.raises(SendFailed, match=r'^/nonexistent/sendmail -t -i: exit status 127: .*nonexistent/sendmail'):
        send(mail.SENDMAIL)


def test_hide() -> None:
    assert hide('curl: s3cret-key and -x', ['s3cret', 's3cret-key', '-x', '']) == 'curl: *** and -x'


@pytest.mark.parametrize('text', ['true', 'exec 0<&-; sleep 0.1', 'head -c 10 > /dev/null'])
def test_command_need_not_read_all(text: str) -> None:
    assert send(text, NOTICE._replace(body='a line\n' * 30000)) == ''


def test_output_of_a_command_is_returned_in_part(capfd: pytest.CaptureFixture[str]) -> None:
    said = send('cat >/dev/null; echo READY; seq 1 100000; echo the end >&2')
    assert said.endswith('the end') and len(said) < 8000
    assert capfd.readouterr() == ('', '')


def test_command_that_prints_endlessly(tmp_path: Path) -> None:
    with pytest.raises(SendFailed, match=f'printed more than {command.OUTPUT_LIMIT_BYTES} bytes: ') as why:
        send(f'echo $$ > {tmp_path}/pid; exec yes "relay is down" >&2')
    assert 'relay is down' in str(why.value)
    assert len(str(why.value)) < 4000


@pytest.mark.parametrize('own_limit', [True, False])
def test_hung_command_is_killed_with_its_children(
        own_limit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mail.COMMAND_SECONDS == 11 * 60
    pids = tmp_path / 'pids'

    def left() -> float:
        return 0 if len(read(pids).split()) == 2 else TIMEOUT
    if own_limit:
        monkeypatch.setattr(mail, 'Deadline', lambda seconds: SimpleNamespace(seconds_left=left))
    script = write_script(tmp_path / 'mta', f"trap '' TERM\nsleep 1000 &\necho $$ $! >> {pids}\nwait\nsleep 1000\n")
    with pytest.raises(SendFailed, match=r'^the -s command: timed out$'):
        send(script, seconds_left=(lambda: math.inf) if own_limit else left)    # the listener's own time, when it exits
    for pid in wait_for_pids(pids, 2):
        wait_for(partial(lambda pid: not is_alive(pid), pid), f'the end of {pid}')
        assert pid not in find_children(os.getpid())


def test_background_child_does_not_delay(tmp_path: Path) -> None:
    assert send(write_script(tmp_path / 'mta', f'sleep 1000 &\necho $! > {tmp_path}/pid\ncat > /dev/null\n')) == ''
    child, = wait_for_pids(tmp_path / 'pid', 1)
    assert is_alive(child)
    os.kill(child, 9)


@pytest.mark.skipif(not os.path.exists('/usr/sbin/sendmail'), reason='there is no sendmail')
def test_real_sendmail_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/process/test_mail_delivery.py has the success."""
    monkeypatch.setenv('HOME', str(tmp_path))
    with socket.socket() as reserved:
        reserved.bind(('127.0.0.1', 0))
        write_account(tmp_path, reserved.getsockname()[1])
        with pytest.raises(SendFailed, match=r'^/usr/sbin/sendmail -t -i: exit status \d+: .*127\.0\.0\.1'):
            send(mail.SENDMAIL)


# crashmail --once.

def test_a_test_notice_without_any_way_to_send_it() -> None:
    assert mail.send_test(mail.Settings(), 'crashmail', 'a test', '') == ([], True)


@pytest.mark.parametrize(('text', 'line', 'accepted'), [
    ('cat > /dev/null; echo queued', 'sent mail to bob@example.com: queued', True),
    ('cat > /dev/null', 'sent mail to bob@example.com', True),
    ('exit 75', 'unable to send mail to bob@example.com: the -s command: exit status 75',
     False),
])
def test_a_test_notice(text: str, line: str, accepted: bool) -> None:
    assert mail.send_test(mail.Settings(TO, text), 'crashmail', 'a test', 'body', 'sup') == ([line], accepted)
