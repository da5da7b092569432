"""Mail: what a message holds, and an outbox with real commands, a real sendmail and real SMTP servers."""
from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import threading
import time
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence

import pytest
import trustme
from aiosmtpd.smtp import AuthResult, LoginPassword
from inbox import SmtpController, write_account
from support import TIMEOUT, find_children, is_alive, read, serving, wait_for, write_script

from superlance import listener, mail
from superlance.options import Given, UsageError, read_argv

TO = ('bob@example.com',)
NOW = 1795330000.0
PASSWORD = 's3cret/pass word'
USER_INFO = 'bob:s3cret%2Fpass%20word@'


# Settings.

@pytest.fixture(autouse=True)
def no_password_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('SUPERLANCE_SMTP_PASSWORD', raising=False)


@pytest.mark.parametrize('url, expected', [
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


@pytest.mark.parametrize('url, shown', [
    ('', ''),
    ('localhost', 'localhost'),
    ('localhost:25', 'localhost:25'),
    ('http://localhost', 'http://localhost'),
    ('smtp:localhost', 'smtp:localhost'),
    ('smtp://', 'smtp://'),
    ('smtp://:25', 'smtp://:25'),
    ('smtp://localhost:0', 'smtp://localhost:0'),
    ('smtp://localhost:65536', 'smtp://localhost:65536'),
    ('smtp://localhost:mail', 'smtp://localhost:mail'),
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
def test_parse_smtp_refuses(url: str, shown: str) -> None:
    with pytest.raises(ValueError) as why:
        mail.parse_smtp(url)
    assert str(why.value) == (f'{shown!r} is not a mail server; write smtp://[user[:password]@]host[:port] or smtps://...')


@pytest.mark.parametrize('url', ['smtp://b%C3%B6b:s3cret@localhost', 'smtp://bob:s3cr\xeat@localhost'])
def test_login_that_can_not_be_sent_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^'smtp://\*\*\*@localhost': user and password may hold ASCII only"):
        mail.parse_smtp(url)


def test_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SUPERLANCE_SMTP_PASSWORD', 'as:it/is %41')
    assert mail.parse_smtp('smtp://bob@localhost').password == 'as:it/is %41'
    assert mail.parse_smtp('smtp://bob:@localhost').password == 'as:it/is %41'
    assert mail.parse_smtp('smtp://bob:other@localhost').password == 'other'
    monkeypatch.setenv('SUPERLANCE_SMTP_PASSWORD', 's3cr\xeat')
    with pytest.raises(ValueError, match='ASCII only'):
        mail.parse_smtp('smtp://bob@localhost')
    mail.parse_smtp('smtp://localhost')  # there is no login


def read_options(*argv: str) -> mail.Settings:
    given, _ = read_argv(argv, mail.OPTIONS)
    return mail.read_settings(given)


def test_settings() -> None:
    assert mail.read_settings(Given()) == mail.Settings((), '/usr/sbin/sendmail -t -i', None, None)
    assert read_options(
        '-m', 'a@b, "C, D" <c@d>', '--email=root', '-s', 'first', '--sendmail_program', 'cat > x',
        '--smtp=smtp://localhost', '--from', 'Eve <e@f>'
    ) == mail.Settings(('a@b', '"C, D" <c@d>', 'root'), 'cat > x',
                       mail.SmtpServer('localhost', 25, False, '', ''), 'Eve <e@f>')


@pytest.mark.parametrize('argv, complaint', [
    (['--email', 'a@b,'], "option --email: 'a@b,' is not a mail address"),
    (['-s', ''], 'option -s: an empty text'),
    (['--smtp', 'smtp://bob:s3cret@x:y'], r"option --smtp: 'smtp://\*\*\*@x:y' is not a mail server"),
    (['--from', 'a@b,c@d'], "option --from: 'a@b,c@d' is more than one mail address"),
])
def test_wrong_settings(argv: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match='^' + complaint):
        read_options(*argv)


# Composing.

SERVER = mail.SmtpServer('localhost', 25, False, '', '')
HEADERS = ['To', 'Subject', 'Date', 'Message-ID', 'Auto-Submitted', 'Content-Type', 'Content-Transfer-Encoding',
           'MIME-Version']


def compose(subject: str = 'hello', body: str = 'a body\n', server: str = '', to: Sequence[str] = TO,
            smtp: mail.SmtpServer | None = None, sender: str | None = None) -> bytes:
    """Return the bytes of a mail, after a look at what holds for all of them."""
    settings = mail.Settings(tuple(to), '', smtp, sender)
    data = mail.compose(settings, 'memmon', mail.Mail(subject, body, server, NOW, 0.0)).as_bytes()
    assert max(map(len, data.split(b'\n'))) <= 998
    assert b'\r' not in data and b'\0' not in data
    names = [line.split(':')[0] for line in data.decode().split('\n\n')[0].split('\n') if line[:1] not in ' \t']
    assert names == HEADERS[:1] + ['From'] * bool(smtp or sender) + HEADERS[1:]
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
    assert parse(compose())['Message-ID'] == parse(compose())['Message-ID']     # of one mail, at every try


@pytest.mark.parametrize('smtp, sender, expected', [
    (None, None, None),                     # sendmail adds its own
    (None, 'Eve <eve@example.com>', 'Eve <eve@example.com>'),
    (SERVER, None, 'memmon@here.example.com'),
    (SERVER, 'eve@example.com', 'eve@example.com'),
])
def test_from(smtp: mail.SmtpServer | None, sender: str | None, expected: str | None,
              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, 'gethostname', lambda: 'here.example.com')
    assert parse(compose(smtp=smtp, sender=sender))['From'] == expected


@pytest.mark.parametrize('name, domain, shown', [
    ('web-1', 'web-1', 'web-1'),
    ('web_1.example.com', 'web_1.example.com', 'web_1.example.com'),
    ('', 'localhost', ''),
    ('web.', 'localhost', 'web.'),
    ('two words', 'localhost', 'two words'),
    ('h\xf6st', 'localhost', 'h\xf6st'),
    ('h\udcffst', 'localhost', r'h\udcffst'),
    ('a\nBcc: eve@example.com', 'localhost', r'a\nBcc: eve@example.com'),
    ('[a>,', 'localhost', '[a>,'),
])
def test_host(name: str, domain: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, 'gethostname', lambda: name)
    message = parse(compose(smtp=SERVER))
    assert message['From'] == 'memmon@' + domain
    assert str(message['Message-ID']).endswith(f'@{domain}>')
    assert split_body(message)[1] == f'memmon on {shown}\n'


@pytest.mark.parametrize('subject, expected', [
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


@pytest.mark.parametrize('body, expected', [
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
@pytest.mark.parametrize('smtp', [None, SERVER])
def test_body(body: str, expected: str, smtp: mail.SmtpServer | None) -> None:
    data = compose(body=body, smtp=smtp)
    assert split_body(parse(data))[0] == expected
    assert smtp is None or data.isascii(), 'a server need not take anything else'


@pytest.mark.parametrize('server, shown', [
    ('a\nBcc: eve@example.com\n.\n', 'a | Bcc: eve@example.com | .'),
    ('sup\xe9rviseur\x1b\udcff', 'sup\xe9rviseur\\x1b\\udcff'),
    ('x' * 2000, 'x' * 2000),
])
def test_identifier(server: str, shown: str) -> None:
    assert split_body(parse(compose(server=server)))[1].endswith(f', supervisor {shown}\n')


@pytest.mark.parametrize('to, expected', [
    (['Bob <bob@example.com>', 'root'], ['bob@example.com', 'root']),
    (['bob@example.com (Bob B.)', 'eve@example.com'], ['bob@example.com', 'eve@example.com']),
    (['"x, y, z"<x@example.com>', '<a..b@example.com>'], ['x@example.com', 'a..b@example.com']),
    (['"Doe; J: (=) [\'" <j@example.com>', "J. O'Hara Jr. <o@example.com>"], ['j@example.com', 'o@example.com']),
    (['user%d@example.com' % number for number in range(300)], ['user%d@example.com' % n for n in range(300)]),
])
def test_recipients(to: list[str], expected: list[str]) -> None:
    data = compose(to=read_options(*('-m' + address for address in to)).recipients, sender='root')
    assert [address.addr_spec for address in parse(data)['To'].addresses] == expected


# The outbox.

class Lines(List[str]):
    """A log."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def wait(self, text: str, number: int = 1) -> str:
        """Wait until so many lines hold a text; return the last of them."""
        return wait_for(lambda: [line for line in self if text in line][number - 1:],  # type: ignore[no-any-return]
                        '%d lines with %r' % (number, text))[0]


class Clock:
    """A clock that a test sets."""

    now = 5000.0

    def __call__(self) -> float:
        return self.now


class Outbox(mail.Outbox):
    """An outbox and its log."""

    def __init__(self, settings: mail.Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.lines = Lines()
        super().__init__(settings, 'crashmail', self.lines, clock)

    def advance(self, seconds: float) -> None:
        """Set the clock forward."""
        assert isinstance(self._clock, Clock)
        self._clock.now += seconds
        with self._changed:
            self._changed.notify()


class QuickCondition(threading.Condition):
    """It does not wait for a time to come: it sets the clock forward to it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            return super().wait()
        self._clock.now += timeout
        return True


Make = Callable[..., Outbox]


def find_timers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)}


def find_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == 'outbox']


@pytest.fixture
def make_outbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return a function that makes an outbox, with a mail command or an SMTP server, which ends with the test."""
    outboxes: list[Outbox] = []

    def make(command: object = 'false', to: Sequence[str] = TO, smtp: str | None = None,
             clock: Callable[[], float] = time.monotonic) -> Outbox:
        settings = mail.Settings(tuple(to), str(command), mail.parse_smtp(smtp) if smtp else None, None)
        outboxes.append(Outbox(settings, clock))
        return outboxes[-1]

    yield make
    monkeypatch.setattr(mail, 'CLOSE_SECONDS', 0.1)
    for outbox in outboxes:
        if isinstance(outbox._clock, Clock):
            outbox._clock = time.monotonic
        outbox.close()
    wait_for(lambda: not find_threads(), 'the end of all outboxes')


class Inbox:
    """A folder, and the shell text of a mail command that puts each mail into it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.command = f"cat > '{folder}'/$$.part && mv '{folder}'/$$.part '{folder}'/$$.mail"

    @property
    def mails(self) -> list[EmailMessage]:
        files = sorted(self._folder.glob('*.mail'), key=lambda path: path.stat().st_mtime_ns)
        return [parse(path.read_bytes()) for path in files]

    def wait(self, number: int) -> list[str]:
        """Wait until so many mails are there; return their subjects."""
        wait_for(lambda: len(self.mails) >= number, '%d mails' % number)
        return [str(message['Subject']) for message in self.mails]


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path / 'inbox')


def wait_for_pids(path: Path, number: int) -> list[int]:
    """Return the pids in a file once there are so many."""
    wait_for(lambda: len(read(path).split()) >= number and read(path).endswith('\n'), f'pids in {path}')
    return list(map(int, read(path).split()))


def write_hanging(path: Path, pids: Path) -> Path:
    """Write a command that never ends, nor does its child, and neither heeds SIGTERM."""
    return write_script(path, f"trap '' TERM\nsleep 1000 &\necho $$ $! >> {pids}\nwait\nsleep 1000\n")


def assert_gone(pids: Sequence[int]) -> None:
    """See that no process lives on, and that none is left as a zombie of ours."""
    for pid in pids:
        wait_for(lambda: not is_alive(pid), 'the end of %d' % pid)
    assert not set(pids) & set(find_children(os.getpid()))


def test_mail_is_delivered(make_outbox: Make, inbox: Inbox) -> None:
    outbox = make_outbox(inbox.command, to=('bob@example.com', 'Eve <eve@example.com>'))
    outbox.put('first', 'body\nof it', 'sup')
    outbox.put('second', '')
    assert inbox.wait(2) == ['first', 'second']
    message = inbox.mails[0]
    assert message['To'] == 'bob@example.com, Eve <eve@example.com>'
    assert abs(parsedate_to_datetime(message['Date']).timestamp() - time.time()) < 600
    assert split_body(message) == ('body\nof it', f'crashmail on {socket.gethostname()}, supervisor sup\n')
    outbox.lines.wait('sent mail "second"')
    assert outbox.lines == [f'sent mail "{subject}" to bob@example.com, Eve <eve@example.com>'
                            for subject in ('first', 'second')]
    outbox.close()
    assert len(outbox.lines) == 2 and not find_threads()


def test_no_recipients(make_outbox: Make, inbox: Inbox) -> None:
    outbox = make_outbox(inbox.command, to=())
    outbox.put('a subject', 'a body')
    assert not find_threads()
    outbox.close()
    assert outbox.lines == [] and inbox.mails == []


def test_failure_is_told_and_the_mail_tried_again(
        make_outbox: Make, inbox: Inbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, 'FIRST_RETRY_SECONDS', 0.1)
    script = write_script(tmp_path / 'mta', (
        f'[ -e {{0}}/up ] || {{{{ echo "relay is down" >&2; echo "on stdout"; exit 75; }}}}\n{inbox.command}\n'
    ).format(tmp_path))
    outbox = make_outbox(script)
    outbox.put('a "subject"', 'a body')
    outbox.lines.wait('unable', 2)
    assert outbox.lines[0] == ('unable to send mail "a "subject"", which is kept and tried again: '
                               f'{script}: exit status 75: relay is down | on stdout')
    (tmp_path / 'up').touch()
    assert inbox.wait(1) == ['a "subject"']
    outbox.lines.wait('sent mail "a "subject"" to bob@example.com')
    outbox.close()
    assert len(inbox.mails) == 1


@pytest.mark.parametrize('command, reason', [
    ('/nonexistent/sendmail -t', r': exit status 127: .*(not found|[Nn]o such file)'),
    ('exit 3', r'exit 3: exit status 3$'),
    ('kill -9 $$', r': killed by signal 9$'),
    ('a\0b', r'null byte'),
    ('exec 0<&-; echo full; exit 1', r': exit status 1: full$'),
    ('printf "a\\377\\n\\n\\033b" >&2; exit 1', 'exit status 1: a\ufffd | \\x1bb'),
])
def test_failing_command(command: str, reason: str, make_outbox: Make) -> None:
    outbox = make_outbox(command)
    outbox.put('a subject', 'x\n' * 200000)
    line = outbox.lines.wait('unable to send mail "a subject", which is kept')
    assert re.search(reason, line) or reason in line


@pytest.mark.parametrize('command', [
    'cat > /dev/null; echo "RESULT 4"; printf "FAIL"; echo READY',
    'echo "RESULT 4"; printf "FAIL"; echo READY >&2',
])
def test_output_of_a_command_goes_to_the_log(command: str, make_outbox: Make,
                                             capfd: pytest.CaptureFixture[str]) -> None:
    outbox = make_outbox(command)
    outbox.put('a subject', 'a body')
    outbox.lines.wait('sent')
    assert outbox.lines == ['sent mail "a subject" to bob@example.com: RESULT 4 | FAILREADY']
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('command', ['true', 'exec 0<&-; sleep 0.3', 'head -c 10 > /dev/null'])
def test_command_that_does_not_read_it_all(command: str, make_outbox: Make) -> None:
    outbox = make_outbox(command)
    outbox.put('a subject', 'a line\n' * 200000)
    outbox.lines.wait('sent mail "a subject"')
    assert len(outbox.lines) == 1


def test_command_that_prints_endlessly(make_outbox: Make, tmp_path: Path) -> None:
    outbox = make_outbox(f'echo $$ > {tmp_path}/pid; exec yes "relay is down" >&2')
    outbox.put('a subject', 'a body')
    line = outbox.lines.wait('unable')
    assert 'printed more than %d bytes: ' % listener.OUTPUT_LIMIT_BYTES in line and 'relay is down' in line
    assert len(line) < 4000
    assert_gone(wait_for_pids(tmp_path / 'pid', 1))


def test_hung_command_is_killed_with_its_children(make_outbox: Make, tmp_path: Path) -> None:
    pids = tmp_path / 'pids'
    outbox = make_outbox(write_hanging(tmp_path / 'mta', pids), clock=Clock())
    outbox.put('a subject', 'a body')
    found = wait_for_pids(pids, 2)
    assert all(map(is_alive, found))
    outbox.advance(59)
    outbox.put('second', '')
    assert all(map(is_alive, found)) and not outbox.lines
    outbox.advance(1)
    assert outbox.lines.wait('unable').endswith('mta: did not end in time')
    assert_gone(found)
    wait_for_pids(pids, 4)  # the next mail has its turn


def test_background_child_holds_up_nothing(make_outbox: Make, tmp_path: Path, inbox: Inbox) -> None:
    script = write_script(tmp_path / 'mta', f'sleep 1000 &\necho $! >> {tmp_path}/pids\n{inbox.command}\n')
    outbox = make_outbox(script, clock=Clock())
    try:
        outbox.put('first', '')
        outbox.put('second', '')
        outbox.lines.wait('sent mail "second"')
        assert inbox.wait(2) == ['first', 'second']
        outbox.close()
    finally:
        children = wait_for_pids(tmp_path / 'pids', 2)
        alive = [is_alive(pid) for pid in children]
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    assert alive == [True, True]


def test_put_never_waits_and_there_is_one_thread(make_outbox: Make, inbox: Inbox, tmp_path: Path) -> None:
    outbox = make_outbox(f'until [ -e {tmp_path}/go ]; do sleep 0.02; done; {inbox.command}')
    for number in range(5):
        outbox.put('mail %d' % number, '')
    assert outbox.lines == [], 'put has waited until a mail was sent, or given up'
    assert len(find_threads()) == 1 and all(thread.daemon for thread in find_threads())
    (tmp_path / 'go').touch()
    assert inbox.wait(5) == ['mail %d' % number for number in range(5)]


def test_never_two_commands_at_once(make_outbox: Make, inbox: Inbox, tmp_path: Path) -> None:
    script = write_script(tmp_path / 'mta', (
        f'mkdir {{0}}/lock || echo overlap >> {{0}}/overlaps\nsleep 0.05\n{inbox.command}\nrmdir {{0}}/lock\n[ -e {{0}}/twice ] || '
        '{{ touch {0}/twice; exit 1; }}\n').format(tmp_path))
    outbox = make_outbox(script)
    for number in range(6):
        outbox.put('mail %d' % number, '')
    wait_for(lambda: len(inbox.mails) >= 2)
    outbox.close()
    assert not (tmp_path / 'overlaps').exists()
    assert len([line for line in outbox.lines if line.startswith('sent')]) == 6


def write_choosy(path: Path, command: str) -> Path:
    """Write a mail command that refuses what has `bad` in its subject, and all where there is no file `up`."""
    return write_script(path / 'mta', (
        'cat > {0}/mail\n! grep -q "^Subject:.*bad" {0}/mail || exit 67\n[ -e {0}/up ] || exit 75\n'
        f'exec < {{0}}/mail\n{command}\n').format(path))


def test_failed_mails_go_as_soon_as_another_has_gone(make_outbox: Make, inbox: Inbox, tmp_path: Path) -> None:
    outbox = make_outbox(write_choosy(tmp_path, inbox.command), clock=Clock())  # whose clock stands still
    for number, subject in enumerate(['first', 'second', 'bad', 'fourth'], 1):
        outbox.put(subject, '')
        outbox.lines.wait('unable', number)
    (tmp_path / 'up').touch()
    outbox.put('fresh', '')
    assert inbox.wait(3) == ['fresh', 'first', 'second']
    # The bad one was tried, in vain; what is behind it is not lost but has to wait.
    outbox.lines.wait('unable', 5)
    assert 'unable to send mail "bad"' in outbox.lines[-1]
    outbox.put('another', '')
    assert inbox.wait(5)[3:] == ['another', 'fourth']
    outbox.lines.wait('unable', 6)
    assert len(inbox.mails) == 5


class Timed(Lines):
    """A log that notes the time of each line by a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.times: list[float] = []
        self._started = clock.now
        self._clock = clock

    def __call__(self, line: str) -> None:
        self.times.append(self._clock.now - self._started)
        super().__call__(line)


def make_quick(outbox: Outbox) -> Timed:
    """Let an outbox' clock run as fast as it can, and note the time of each line of its log."""
    clock = outbox._clock
    assert isinstance(clock, Clock)
    outbox._changed = QuickCondition(clock)
    outbox._log = outbox.lines = timed = Timed(clock)
    return timed


def test_delay_doubles_to_ten_minutes_and_a_mail_is_kept_for_a_day(make_outbox: Make) -> None:
    outbox = make_outbox('exit 75', clock=Clock())
    lines = make_quick(outbox)
    with outbox._changed:  # the clock runs only when both are there
        outbox.put('a subject', '')
        outbox.put('a later one', '')
    wait_for(lambda: len([line for line in list(lines) if line.startswith('dropped')]) == 2, 'two dropped')
    assert [line for line in lines if not line.startswith('unable')] == [
        f'dropped mail "{subject}": it could not be sent for 24 hours' for subject in ('a subject', 'a later one')]
    tries = [when for when, line in zip(lines.times, lines) if line.startswith('unable')]
    assert tries[:11] == [0, 0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430]
    assert {later - sooner for sooner, later in zip(tries[8:], tries[9:])} == {600}
    assert 86400 - 600 <= tries[-1] <= 86400 < lines.times[-1] <= 86400 + 600


def test_delay_begins_anew_after_a_success(make_outbox: Make, tmp_path: Path) -> None:
    # Tries 1 to 3 fail, and then 5.
    script = write_script(tmp_path / 'mta', (
        f'echo >> {tmp_path}/tries\ncase $(wc -l < {tmp_path}/tries) in *[1235]) exit 75;; esac\n'))
    outbox = make_outbox(script, clock=Clock())
    lines = make_quick(outbox)
    outbox.put('first', '')
    lines.wait('sent mail "first"')
    outbox.put('second', '')
    lines.wait('sent mail "second"')
    assert lines.times == [0, 10, 30, 70, 70, 80]


def test_delay_is_not_put_off_by_a_new_mail_that_fails(make_outbox: Make) -> None:
    outbox = make_outbox('exit 75', clock=Clock())
    outbox.put('first', '')
    outbox.lines.wait('mail "first"')
    outbox.advance(9)
    outbox.put('second', '')
    outbox.lines.wait('mail "second"')
    outbox.advance(1)
    outbox.lines.wait('mail "first"', 2)


def test_the_oldest_is_dropped_beyond_a_thousand(
        make_outbox: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = make_outbox(write_hanging(tmp_path / 'mta', tmp_path / 'pids'), clock=Clock())
    outbox.put('sent now', '')
    wait_for_pids(tmp_path / 'pids', 2)
    for number in range(1000):
        outbox.put('mail %d' % number, '')
    assert outbox.lines == []
    outbox.put('another', '')
    outbox.put('another', '')
    assert outbox.lines == ['dropped mail "mail %d": more than 1000 mails wait' % number for number in (0, 1)]


def test_the_oldest_is_dropped_whatever_was_tried_last(
        make_outbox: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, 'KEEP_MAILS', 2)
    outbox = make_outbox('exit 75', clock=Clock())
    outbox.put('oldest', '')
    outbox.lines.wait('unable', 1)
    outbox.advance(1)
    outbox.put('older', '')
    outbox.lines.wait('unable', 2)
    outbox.advance(10)
    assert 'mail "oldest"' in outbox.lines.wait('unable', 3)
    wait_for(lambda: outbox._sending is None)
    outbox.put('new', '')
    assert outbox.lines.wait('dropped') == 'dropped mail "oldest": more than 2 mails wait'


# Its end.

def test_close_gives_all_one_last_try(make_outbox: Make, inbox: Inbox, tmp_path: Path) -> None:
    outbox = make_outbox(write_choosy(tmp_path, inbox.command), clock=Clock())
    for number, subject in enumerate(['first', 'bad one', 'third'], 1):
        outbox.put(subject, '')
        outbox.lines.wait('unable', number)
    (tmp_path / 'up').touch()
    outbox.put('bad too', '')
    outbox.lines.wait('unable', 4)
    outbox.close()
    assert inbox.wait(2) == ['first', 'third']
    assert [line for line in outbox.lines if line.startswith('dropped')] == [
        'dropped mail "bad one": crashmail ends', 'dropped mail "bad too": crashmail ends']
    assert len([line for line in outbox.lines if line.startswith('unable')]) == 6, 'one last try each'
    assert not find_threads()


def test_close_sends_what_is_new(make_outbox: Make, inbox: Inbox) -> None:
    outbox = make_outbox('sleep 0.1; ' + inbox.command)
    for number in range(3):
        outbox.put('mail %d' % number, '')
    outbox.close()
    assert inbox.wait(3) == ['mail 0', 'mail 1', 'mail 2']
    assert len(outbox.lines) == 3 and not find_threads()


def test_close_tells_what_is_left(make_outbox: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mail.CLOSE_SECONDS == 5
    monkeypatch.setattr(mail, 'CLOSE_SECONDS', 1)
    pids = tmp_path / 'pids'
    outbox = make_outbox(write_hanging(tmp_path / 'mta', pids))
    outbox.put('hung', '')
    wait_for_pids(pids, 2)
    outbox.put('new', '')
    outbox.put('and another', '')
    outbox.close()
    assert [line for line in outbox.lines if line.startswith('dropped')] == [
        f'dropped mail "{subject}": crashmail ends' for subject in ('hung', 'new', 'and another')]
    wait_for(lambda: not find_threads(), 'the end of the thread')
    assert 'did not end in time' in outbox.lines.wait('unable to send mail "hung"')
    assert_gone(wait_for_pids(pids, 2))
    assert len(read(pids).split()) == 2, 'no other command was started'


def test_close_does_not_wait_for_a_mute_server(make_outbox: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, 'CLOSE_SECONDS', 0.2)
    connected, ended = threading.Event(), threading.Event()

    def say_nothing(client: socket.socket) -> None:
        connected.set()
        ended.wait(2 * TIMEOUT)

    with serving(say_nothing) as port:
        outbox = make_outbox(smtp='smtp://127.0.0.1:%d' % port)
        outbox.put('a subject', '')
        assert connected.wait(TIMEOUT)
        outbox.close()  # the connection's own timeout is 60 s
        dropped = list(outbox.lines)
        ended.set()
    assert dropped == ['dropped mail "a subject": crashmail ends']


# Real servers, and the real sendmail.

class Server(SmtpController):
    """An SMTP server on loopback; each mail it took is (sender, recipients, message, connection)."""

    def __init__(self, port: int = 0, refused: Sequence[str] = (), quit_status: str = '221 bye',
                 **options: Any) -> None:
        self.taken: list[tuple[str, list[str], EmailMessage, Any]] = []
        self.logins: list[tuple[str, bytes, bytes]] = []
        self.farewells = 0
        self._refused = refused
        self._quit_status = quit_status
        super().__init__(self, hostname='127.0.0.1', port=port, **options)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address in self._refused:
            return '550 no such user\x1b here'
        envelope.rcpt_tos.append(address)
        return '250 fine'

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.taken.append((envelope.mail_from, envelope.rcpt_tos, parse(envelope.content), session))
        return '250 taken'

    async def handle_QUIT(self, server: Any, session: Any, envelope: Any) -> str:
        self.farewells += 1
        return self._quit_status

    def log_in(self, server: Any, session: Any, envelope: Any, mechanism: str, data: LoginPassword) -> AuthResult:
        self.logins.append((mechanism, data.login, data.password))
        return AuthResult(success=data == LoginPassword(b'bob', PASSWORD.encode()), handled=False)

    def url(self, scheme: str = 'smtp', user_info: str = '') -> str:
        return '%s://%s127.0.0.1:%d' % (scheme, user_info, self.port)

    def wait(self, number: int = 1) -> tuple[str, list[str], EmailMessage, Any]:
        """Wait until so many mails were taken; return the last of them."""
        wait_for(lambda: len(self.taken) >= number, '%d mails' % number)
        return self.taken[number - 1]


HOSTILE_BODY = 'sm\xf6rg\xe5s\n.\nQUIT\n' + 'long \U0001f600 ' * 1000 + '\n'


@pytest.mark.skipif(not os.path.exists('/usr/sbin/sendmail'), reason='there is no sendmail')
def test_real_sendmail(make_outbox: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    with Server() as server:
        write_account(tmp_path, server.port)
        outbox = make_outbox(mail.SENDMAIL, to=('bob@example.com', '"Doe, J" <j@example.com>'))
        outbox.put('caf\xe9', HOSTILE_BODY)
        sender, recipients, message, _ = server.wait()
        outbox.lines.wait('sent mail "caf\xe9" to bob@example.com, "Doe, J" <j@example.com>')
    assert (sender, recipients) == ('x@example.com', ['bob@example.com', 'j@example.com'])
    assert message['Subject'] == 'caf\xe9' and message['From'] and message['Auto-Submitted'] == 'auto-generated'
    assert split_body(message)[0].splitlines() == [line.rstrip() for line in HOSTILE_BODY.splitlines()]
    # Now the server is gone.
    outbox.put('another', '')
    line = outbox.lines.wait('unable to send mail "another"')
    assert re.search(r'sendmail -t -i: exit status \d+: .*127\.0\.0\.1', line)


# SMTP.

pytestmark = pytest.mark.filterwarnings('ignore:Requiring AUTH while not requiring TLS')  # it's what is tested


@pytest.fixture(scope='module')
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope='module')
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert('127.0.0.1', 'localhost').configure_cert(context)
    return context


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loopback be a host of the network, as no test leaves this machine."""
    monkeypatch.setattr(mail, '_is_loopback', lambda host: False)
    monkeypatch.setattr(mail, '_is_loopback_address', lambda address: False)


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system know the authority of the servers' certificate."""
    authority.cert_pem.write_to_path(str(tmp_path / 'authority.pem'))
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'authority.pem'))


def make_server(kind: str, tls: ssl.SSLContext, **options: Any) -> Server:
    if kind == 'smtps':
        return Server(ssl_context=tls, **options)
    if kind == 'starttls':
        return Server(tls_context=tls, **options)
    return Server(**options)


def make_login_server(kind: str, tls: ssl.SSLContext, **options: Any) -> Server:
    server = make_server(kind, tls, auth_required=True, auth_require_tls=kind == 'starttls', **options)
    server.SMTP_kwargs['authenticator'] = server.log_in
    return server


def scheme(kind: str) -> str:
    return 'smtps' if kind == 'smtps' else 'smtp'


def is_encrypted(session: Any) -> bool:
    return bool(session.ssl)


@pytest.mark.parametrize('kind', ['plain', 'starttls', 'smtps'])
def test_smtp(kind: str, make_outbox: Make, tls: ssl.SSLContext) -> None:
    # The certificate's authority is unknown here: on loopback that does not matter.
    with make_server(kind, tls) as server:
        outbox = make_outbox(smtp=server.url(scheme(kind)), to=('bob@example.com', 'Eve <eve@example.com>'))
        outbox.put('caf\xe9', HOSTILE_BODY, 'sup')
        sender, recipients, message, session = server.wait()
        outbox.lines.wait('sent mail')
    assert re.match(r'crashmail@[\w.-]+$', sender) and sender == message['From']
    assert recipients == ['bob@example.com', 'eve@example.com']
    assert message['To'] == 'bob@example.com, Eve <eve@example.com>' and message['Subject'] == 'caf\xe9'
    assert split_body(message)[0].splitlines() == [line.rstrip() for line in HOSTILE_BODY.splitlines()]
    assert outbox.lines == ['sent mail "caf\xe9" to bob@example.com, Eve <eve@example.com>']
    if kind == 'starttls':
        assert is_encrypted(session)


@pytest.mark.parametrize('answer', ['451 not now', '250 fine', '421 too busy'])
def test_mail_goes_once_whatever_is_answered_to_quit(answer: str, make_outbox: Make, tls: ssl.SSLContext) -> None:
    timers = find_timers()
    with Server(quit_status=answer) as server:
        outbox = make_outbox(smtp=server.url())
        outbox.put('first', '')
        outbox.put('second', '')
        outbox.lines.wait('mail "second"')
        outbox.close()
        assert [str(message['Subject']) for _, _, message, _ in server.taken] == ['first', 'second']
        wait_for(lambda: server.farewells == 2)
    assert outbox.lines == [f'sent mail "{subject}" to bob@example.com' for subject in ('first', 'second')]
    wait_for(lambda: find_timers() <= timers, 'the end of what watches the time')


@pytest.mark.parametrize('kind', ['plain', 'starttls', 'smtps'])
@pytest.mark.parametrize('mechanism', ['PLAIN', 'LOGIN'])
def test_login_on_loopback(kind: str, mechanism: str, make_outbox: Make, tls: ssl.SSLContext) -> None:
    other = 'LOGIN' if mechanism == 'PLAIN' else 'PLAIN'
    with make_login_server(kind, tls, auth_exclude_mechanism=[other]) as server:
        outbox = make_outbox(smtp=server.url(scheme(kind), USER_INFO))
        outbox.put('a subject', '')
        _, recipients, _, session = server.wait()
        assert recipients == list(TO)
        assert server.logins == [(mechanism, b'bob', PASSWORD.encode())]
        if kind == 'starttls':
            assert is_encrypted(session)
        outbox.lines.wait('sent')
    assert 's3cret' not in str(outbox.lines)


def test_login_with_the_password_of_the_environment(
        make_outbox: Make, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SUPERLANCE_SMTP_PASSWORD', PASSWORD)
    with make_login_server('plain', tls) as server:
        make_outbox(smtp=server.url('smtp', 'bob@')).put('a subject', '')
        server.wait()
        assert server.logins == [('PLAIN', b'bob', PASSWORD.encode())]


def test_wrong_password(make_outbox: Make, tls: ssl.SSLContext) -> None:
    with make_login_server('plain', tls) as server:
        outbox = make_outbox(smtp=server.url('smtp', 'bob:other-s3cret@'))
        outbox.put('a subject', '')
        line = outbox.lines.wait('unable to send mail "a subject", which is kept and tried again: 127.0.0.1: 535 ')
        assert 'credentials' in line.lower()
        outbox.close()
        assert server.logins and not server.taken
    assert 's3cret' not in str(outbox.lines) and 'b3RoZXIt' not in str(outbox.lines)


def test_server_that_has_no_login(make_outbox: Make, tls: ssl.SSLContext) -> None:
    with Server() as server:
        outbox = make_outbox(smtp=server.url('smtp', USER_INFO))
        outbox.put('a subject', '')
        assert 'AUTH' in outbox.lines.wait('unable')
        assert not server.taken


@pytest.mark.usefixtures('far_away')
def test_no_login_over_the_network_without_tls(make_outbox: Make, tls: ssl.SSLContext) -> None:
    with make_login_server('plain', tls) as server:
        outbox = make_outbox(smtp=server.url('smtp', USER_INFO))
        outbox.put('a subject', '')
        line = outbox.lines.wait('unable')
        assert line.endswith(': 127.0.0.1 offers no STARTTLS, and the password is not sent without')
        assert not server.logins and not server.taken
    assert 's3cret' not in str(outbox.lines)


@pytest.mark.usefixtures('far_away', 'trusted')
@pytest.mark.parametrize('kind', ['starttls', 'smtps'])
def test_login_over_the_network_by_verified_tls(kind: str, make_outbox: Make, tls: ssl.SSLContext) -> None:
    with make_login_server(kind, tls) as server:
        outbox = make_outbox(smtp=server.url(scheme(kind), USER_INFO))
        outbox.put('a subject', '')
        server.wait()
        outbox.lines.wait('sent')
        assert server.logins == [('PLAIN', b'bob', PASSWORD.encode())]


@pytest.mark.usefixtures('far_away')
@pytest.mark.parametrize('kind, user_info', [('starttls', USER_INFO), ('smtps', USER_INFO), ('smtps', '')])
def test_certificate_of_an_unknown_authority(
        kind: str, user_info: str, make_outbox: Make, tls: ssl.SSLContext) -> None:
    with make_login_server(kind, tls) as server:
        outbox = make_outbox(smtp=server.url(scheme(kind), user_info))
        outbox.put('a subject', '')
        assert 'CERTIFICATE_VERIFY_FAILED' in outbox.lines.wait('unable')
        assert not server.logins and not server.taken


@pytest.mark.usefixtures('far_away', 'trusted')
def test_certificate_of_another_host(
        authority: trustme.CA, make_outbox: Make) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert('mail.example.com').configure_cert(context)
    with make_server('smtps', context) as server:
        outbox = make_outbox(smtp=server.url('smtps'))
        outbox.put('a subject', '')
        assert 'CERTIFICATE_VERIFY_FAILED' in outbox.lines.wait('unable')


@pytest.mark.usefixtures('far_away')
def test_unverified_tls_where_nothing_secret_is_sent(make_outbox: Make, tls: ssl.SSLContext) -> None:
    with make_server('starttls', tls) as server:
        make_outbox(smtp=server.url()).put('a subject', '')
        assert is_encrypted(server.wait()[3])


def test_refused_recipient(make_outbox: Make) -> None:
    with Server(refused=['eve@example.com']) as server:
        outbox = make_outbox(smtp=server.url(), to=('bob@example.com', 'Eve <eve@example.com>'))
        outbox.put('a subject', '')
        assert server.wait()[1] == ['bob@example.com']
        outbox.lines.wait('sent')
        outbox.close()
        assert len(server.taken) == 1
    assert outbox.lines == ['sent mail "a subject" to bob@example.com, Eve <eve@example.com>: '
                            'eve@example.com was refused: 550 no such user\\x1b here']


def test_all_recipients_refused(make_outbox: Make) -> None:
    with Server(refused=['bob@example.com', 'eve@example.com']) as server:
        outbox = make_outbox(smtp=server.url(), to=('bob@example.com', 'eve@example.com'))
        outbox.put('a subject', '')
        assert outbox.lines.wait('unable') == (
            'unable to send mail "a subject", which is kept and tried again: 127.0.0.1: bob@example.com was refused: '
            '550 no such user\\x1b here, eve@example.com was refused: 550 no such user\\x1b here')
        assert not server.taken


def test_server_that_is_down_and_comes_back(make_outbox: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, 'FIRST_RETRY_SECONDS', 0.1)
    with socket.socket() as reserved:  # nobody else gets this port, and nobody listens there
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(('127.0.0.1', 0))
        port = reserved.getsockname()[1]
        outbox = make_outbox(smtp='smtp://127.0.0.1:%d' % port)
        outbox.put('a subject', '')
        outbox.lines.wait('unable', 2)
        assert re.search(r': 127\.0\.0\.1:%d: .*refused' % port, outbox.lines[0])
        with Server(port=port) as server:
            assert server.wait()[2]['Subject'] == 'a subject'
            outbox.lines.wait('sent mail "a subject"')


@pytest.mark.parametrize('greeting, expected', [
    (b'', 'timed out'),
    (b'220 hello\r\n', 'timed out'),
])
def test_server_that_says_nothing(
        greeting: bytes, expected: str, make_outbox: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, 'SEND_TIMEOUT_SECONDS', 0.5)

    def handle(client: socket.socket) -> None:
        client.sendall(greeting)
        while client.recv(1000):
            pass

    with serving(handle) as port:
        outbox = make_outbox(smtp='smtp://127.0.0.1:%d' % port)
        outbox.put('a subject', '')
        assert expected in outbox.lines.wait('unable')


@pytest.mark.parametrize('said, expected', [
    (b'', '127.0.0.1:PORT: Connection unexpectedly closed'),
    (b'554 go\x1b[1m away\r\n', '127.0.0.1: 554 go\\x1b[1m away'),
    (b'554-one\r\n554 two\r\n', '127.0.0.1: 554 one | two'),
    (b'HTTP/1.1 400 Bad Request\r\n\r\n', '127.0.0.1: -1 '),
    (b'220 ' + b'x' * 100000, '127.0.0.1: 500 Line too long.'),
])
def test_server_that_is_none(said: bytes, expected: str, make_outbox: Make) -> None:
    def handle(client: socket.socket) -> None:
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1000):
            pass

    with serving(handle) as port:
        outbox = make_outbox(smtp='smtp://127.0.0.1:%d' % port)
        outbox.put('a subject', '')
        assert expected.replace('PORT', str(port)) in outbox.lines.wait('unable')


def test_host_that_can_not_be(make_outbox: Make) -> None:
    outbox = make_outbox(smtp='smtp://%s:25' % ('x' * 300))
    outbox.put('a subject', '')
    assert ': %s:25: ' % ('x' * 300) in outbox.lines.wait('unable')


@pytest.mark.parametrize('host, expected', [
    ('127.0.0.1', True),
    ('127.9.9.9', True),
    ('localhost', True),
    ('192.0.2.1', False),
    ('0.0.0.0', False),
    ('', False),
    ('x' * 300, False),
])
def test_loopback(host: str, expected: bool) -> None:
    assert mail._is_loopback(host) is expected


@pytest.mark.parametrize('addresses, expected', [
    (['127.0.0.1', '::1'], True),
    (['fe80::1%lo'], False),
    (['127.0.0.1', '192.0.2.1'], False),
    ([], False),
])
def test_loopback_by_every_address(addresses: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: None) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, '', (address, 0, 0, 0)) for address in addresses]
    monkeypatch.setattr(socket, 'getaddrinfo', look_up)
    assert mail._is_loopback('mail.example.com') is expected


def test_mail_that_can_not_be_composed_does_not_stop_the_others(
        make_outbox: Make, inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mail.compose

    def compose_or_fail(settings: mail.Settings, program: str, message: mail.Mail) -> EmailMessage:
        if message.subject == 'bad':
            raise LookupError
        return real(settings, program, message)

    monkeypatch.setattr(mail, 'compose', compose_or_fail)
    outbox = make_outbox(inbox.command)
    outbox.put('bad', '')
    outbox.lines.wait('unable to send mail "bad"')
    outbox.put('good', '')
    assert inbox.wait(1) == ['good']


def test_close_tells_what_a_thread_that_never_began_left(make_outbox: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, 'start', interrupted)
    outbox = make_outbox()
    with pytest.raises(KeyboardInterrupt):
        outbox.put('a subject', '')
    outbox.close()
    assert 'unable to send mail "a subject"' in outbox.lines[0]     # it is tried all the same
    assert outbox.lines[1:] == ['dropped mail "a subject": crashmail ends']


def test_long_subject_stays_on_its_line() -> None:
    subject = 'httpok: http://localhost:8080/%s: bad status returned' % ('x' * 200)
    data = compose(subject)
    assert (f'Subject: {subject}\n').encode() in data


def test_server_that_drips(make_outbox: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is that of the whole mail, not of each read."""
    monkeypatch.setattr(mail, 'SEND_TIMEOUT_SECONDS', 1.0)
    pause = threading.Event()

    def handle(client: socket.socket) -> None:
        while not pause.wait(0.05):
            client.sendall(b'220-more\r\n')

    with serving(handle) as port:
        outbox = make_outbox(smtp='smtp://127.0.0.1:%d' % port)
        outbox.put('a subject', '')
        assert outbox.lines.wait('unable').endswith(': timed out')
        pause.set()


def test_no_login_where_the_peer_is_another_than_the_name_said(
        make_outbox: Make, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, '_is_loopback_address', lambda address: False)
    monkeypatch.setattr(mail, '_is_loopback', lambda host: True)
    with make_login_server('starttls', tls) as server:
        outbox = make_outbox(smtp='smtp://robot:secret@127.0.0.1:%d' % server.port)
        outbox.put('a subject', '')
        assert 'the password is not sent without' in outbox.lines.wait('unable')


def test_what_a_command_prints_is_told_in_part(make_outbox: Make) -> None:
    outbox = make_outbox('cat >/dev/null; seq 1 100000; echo the end')
    outbox.put('a subject', '')
    line = outbox.lines.wait('sent mail')
    assert line.endswith('the end') and len(line) < 8000


def test_mail_waits_while_there_is_no_thread_to_be_had(
        make_outbox: Make, inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    outbox = make_outbox(inbox.command)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', fail)
        outbox.put('first', '')
    assert outbox.lines == ['unable to send mail "first" before the next one, or the end: can\'t start new thread']
    outbox.put('second', '')
    assert inbox.wait(2) == ['first', 'second']


def test_mail_is_sent_at_the_end_without_a_thread(
        make_outbox: Make, inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', fail)
    outbox = make_outbox(inbox.command)
    outbox.put('a subject', '')
    outbox.close()
    assert inbox.wait(1) == ['a subject']
