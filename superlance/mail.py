"""Mail: a message is composed, and an outbox sends it by sendmail or SMTP until it has gone.

The outbox works on a thread of its own, so that no event ever waits for a mail.
"""
from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Callable, Mapping, NamedTuple

from superlance.listener import CommandFailed, Log, decode_end, one_line, printable, run_command
from superlance.options import DOMAIN, Given, Option, parse_address, parse_addresses, parse_text

if TYPE_CHECKING:
    import smtplib
    import ssl
    from email.message import EmailMessage

SENDMAIL = '/usr/sbin/sendmail -t -i'

SEND_TIMEOUT_SECONDS = 60
FIRST_RETRY_SECONDS = 10
LAST_RETRY_SECONDS = 600
KEEP_SECONDS = 24 * 3600
KEEP_MAILS = 1000
CLOSE_SECONDS = 5
LINE_LIMIT_BYTES = 998  # RFC 5322, 2.1.1


class SmtpServer(NamedTuple):
    """A mail server as --smtp names it."""

    host: str
    port: int
    tls: bool       # from the first byte; else STARTTLS where it is offered
    user: str
    password: str


class Settings(NamedTuple):
    """To whom mail goes, and how; no recipients: no mail."""

    recipients: tuple[str, ...]
    sendmail: str
    smtp: SmtpServer | None
    sender: str | None


class SendFailed(Exception):
    """A mail could not be sent; the message is one line."""


class Mail(NamedTuple):
    """A mail that waits."""

    subject: str
    body: str
    server: str     # supervisord's identifier, or ''
    written: float  # epoch seconds
    queued: float   # by the outbox' clock


def parse_smtp(text: str) -> SmtpServer:
    """Return the SmtpServer for smtp://[user[:password]@]host[:port] or smtps://...

    Without a password there, it is that of SUPERLANCE_SMTP_PASSWORD. Raises ValueError.
    """
    from urllib.parse import unquote, urlsplit

    # In a wrong URL anything before the last @ may be the password.
    scheme = text.partition('://')[0]
    shown = '{}***@{}'.format(scheme + '://' if scheme.isalpha() else '', text.rpartition('@')[2]) if '@' in text else text
    wrong = ValueError(f'{shown!r} is not a mail server; write smtp://[user[:password]@]host[:port] or smtps://...')
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise wrong
    if url.scheme not in ('smtp', 'smtps') or not url.hostname or port == 0 or not text.isprintable() \
            or ' ' in url.hostname or url.path.strip('/') or url.query or url.fragment:
        raise wrong
    tls = url.scheme == 'smtps'
    user = unquote(url.username or '')
    password = unquote(url.password or '') or os.environ.get('SUPERLANCE_SMTP_PASSWORD', '')
    if user and not (user + password).isascii():
        raise ValueError(f'{shown!r}: user and password may hold ASCII only, as smtplib can send no more')
    return SmtpServer(url.hostname, port or (465 if tls else 25), tls, user, password)


OPTIONS = (
    Option('m', 'email', parse_addresses),
    Option('s', 'sendmail_program', parse_text),
    Option('', 'smtp', parse_smtp),
    Option('', 'from', parse_address),
)


def read_settings(given: Given) -> Settings:
    """Return the mail settings among the options that were given."""
    recipients = tuple(address for addresses in given.all('email') for address in addresses)
    return Settings(recipients, given.last('sendmail_program', SENDMAIL), given.last('smtp'), given.last('from'))


def compose(settings: Settings, program: str, mail: Mail) -> EmailMessage:
    """Return the message for a mail."""
    from email.message import EmailMessage
    from email.policy import default
    from email.utils import formatdate
    from socket import gethostname

    host = printable(gethostname())
    domain = host if re.fullmatch(DOMAIN, host, re.ASCII) else 'localhost'
    # A long subject stays on its line, where a filter finds it; only encoded words have to be short.
    plain = mail.subject.isascii()
    message = EmailMessage(default.clone(max_line_length=LINE_LIMIT_BYTES) if plain else default)
    message['To'] = ', '.join(settings.recipients)
    sender = settings.sender or (f'{program}@{domain}' if settings.smtp else None)
    if sender:
        message['From'] = sender
    # email.message would decode an encoded word (RFC 2047), and write a line end in it as such.
    message['Subject'] = one_line(mail.subject).replace('=?', '= ?')
    message['Date'] = formatdate(mail.written, localtime=True)
    # The same at every try, so that what was taken twice is known for one.
    message['Message-ID'] = '<%d.%d.%s@%s>' % (mail.written * 1000000, os.getpid(), program, domain)
    message['Auto-Submitted'] = 'auto-generated'
    lines = [printable(line.expandtabs().rstrip()) for line in mail.body.split('\n')]
    origin = f'{program} on {host}'
    if mail.server:
        origin += f', supervisor {one_line(mail.server)}'
    text = '\n'.join(lines).rstrip('\n') + '\n\n-- \n' + origin + '\n'
    readable = all(len(line.encode('utf-8')) <= LINE_LIMIT_BYTES for line in text.split('\n'))
    if text.isascii():
        encoding = '7bit'
    else:
        encoding = '8bit' if not settings.smtp else 'quoted-printable'  # a server need not take 8bit, RFC 6152
    message.set_content(text, cte=encoding if readable else 'quoted-printable')
    return message


def send(settings: Settings, message: EmailMessage, seconds_left: Callable[[], float]) -> str:
    """Send a message; return what the mail command or server said. Raises SendFailed."""
    if settings.smtp:
        return _send_by_smtp(settings.smtp, message, seconds_left)
    try:
        output = run_command(settings.sendmail, seconds_left, message.as_bytes())
    except CommandFailed as why:
        raise SendFailed(str(why))
    return one_line(decode_end(output))


def _send_by_smtp(server: SmtpServer, message: EmailMessage, seconds_left: Callable[[], float]) -> str:
    import smtplib
    import socket
    from contextlib import closing, suppress

    context = _make_tls_context(server)
    timeout = max(0.1, seconds_left())
    smtp = smtplib.SMTP_SSL(timeout=timeout, context=context) if server.tls else smtplib.SMTP(timeout=timeout)
    setattr(smtp, '_host', server.host)  # the name that TLS verifies, which only the constructor sets else

    late = threading.Event()

    def cut() -> None:
        late.set()
        with suppress(OSError):     # it is closed by now
            if smtp.sock:  # pragma: no branch  else it has not connected yet
                smtp.sock.shutdown(socket.SHUT_RDWR)

    watch = threading.Timer(timeout, cut)  # smtplib's own timeout is that of each read
    watch.daemon = True
    try:
        watch.start()
        with closing(smtp):
            _open_session(smtp, server, context)
            refused = smtp.send_message(message)
            with suppress(OSError):
                smtp.putcmd('QUIT')  # the mail is taken, whatever is answered to this
    except smtplib.SMTPRecipientsRefused as why:
        raise SendFailed(f'{server.host}: {_describe_refused(why.recipients)}')
    except smtplib.SMTPResponseException as why:
        raise SendFailed(f'{server.host}: {_describe_answer(why.smtp_code, why.smtp_error)}')
    except (OSError, ValueError) as why:  # ValueError: what smtplib can't put into its protocol
        reason = (one_line(why) or type(why).__name__) if not late.is_set() else 'timed out'
        raise SendFailed('%s:%d: %s' % (server.host, server.port, reason))
    finally:
        watch.cancel()
    return _describe_refused(refused)


def _make_tls_context(server: SmtpServer) -> ssl.SSLContext:
    import ssl

    context = ssl.create_default_context()
    if _is_loopback(server.host) or not (server.tls or server.user):
        # Nothing secret is sent, or not over a network: TLS that can't be verified beats none.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _open_session(smtp: smtplib.SMTP, server: SmtpServer, context: ssl.SSLContext) -> None:
    """Connect, encrypt where that is offered, and log in where there is a user; SendFailed where that is not safe."""
    import smtplib
    import ssl

    code, greeting = smtp.connect(server.host, server.port)
    if code != 220:
        raise smtplib.SMTPConnectError(code, greeting)
    smtp.ehlo_or_helo_if_needed()
    encrypted = server.tls
    if not encrypted and smtp.has_extn('starttls'):
        smtp.starttls(context=context)
        encrypted = True
    if server.user:
        # The name was looked up anew to connect, so it is the peer that counts.
        verified = encrypted and context.verify_mode == ssl.CERT_REQUIRED
        if not (verified or (smtp.sock and _is_loopback_address(smtp.sock.getpeername()[0]))):
            raise SendFailed(f'{server.host} offers no STARTTLS, and the password is not sent without')
        smtp.login(server.user, server.password)


def _describe_refused(refused: Mapping[str, tuple[int, bytes]]) -> str:
    return ', '.join(f'{address} was refused: {_describe_answer(*answer)}'
                     for address, answer in refused.items())


def _describe_answer(code: int, text: bytes | str) -> str:
    return '%d %s' % (code, one_line(text.decode('utf-8', 'replace') if isinstance(text, bytes) else text))


def _is_loopback(host: str) -> bool:
    """Return whether every address of host is this machine's own."""
    from socket import getaddrinfo

    try:
        found = {str(address[0]) for *_, address in getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(map(_is_loopback_address, found))


def _is_loopback_address(address: str) -> bool:
    from ipaddress import ip_address

    return ip_address(address.partition('%')[0]).is_loopback


class Outbox:
    """Sends mails one at a time on a thread of its own, and tries again what could not be sent.

    A new mail is tried at once. When one has gone, those that failed before are tried
    too; when none goes, one of them is tried after 10 s, then 20 s, and so on to 10 minutes.
    """

    def __init__(self, settings: Settings, program: str, log: Log,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._program = program
        self._log = log
        self._clock = clock
        self._thread: threading.Thread | None = None
        # All that follows is guarded by this.
        self._changed = threading.Condition()
        self._fresh: deque[Mail] = deque()
        self._failed: deque[Mail] = deque()
        self._sending: Mail | None = None
        self._retry_at = math.inf
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._end_at = math.inf
        self._last_tries = 0

    def put(self, subject: str, body: str, server: str = '') -> None:
        """Send a mail as soon as may be, none without recipients; server is supervisord's identifier. Never waits."""
        if not self._settings.recipients:
            return
        with self._changed:
            self._fresh.append(Mail(subject, body, server, time.time(), self._clock()))
            if len(self._fresh) + len(self._failed) > KEEP_MAILS:
                oldest = min((*self._failed, self._fresh[0]), key=lambda mail: mail.queued)
                (self._failed if oldest in self._failed else self._fresh).remove(oldest)
                self._drop(oldest, 'more than %d mails wait' % KEEP_MAILS)
            self._changed.notify()
            if self._thread is None:
                thread = threading.Thread(target=self._work, name='outbox', daemon=True)
                try:
                    thread.start()
                except RuntimeError as why:
                    self._log(f'unable to send mail "{subject}" before the next one, or the end: {why}')
                else:
                    self._thread = thread  # not before, since a signal may end the listener in start()

    def close(self) -> None:
        """Give all that waits one last try, for 5 s at most, and tell what is left."""
        with self._changed:
            self._end_at = self._clock() + CLOSE_SECONDS
            self._last_tries = len(self._failed)
            self._changed.notify()
        if self._thread:
            self._thread.join(CLOSE_SECONDS + 1)
        else:
            self._work()
        with self._changed:
            for mail in filter(None, (self._sending, *self._failed, *self._fresh)):
                self._drop(mail, f'{self._program} ends')

    def _work(self) -> None:
        while True:
            with self._changed:
                retried = self._wait_for_next()
                if self._sending is None:
                    return
                mail = self._sending
            failure = self._try(mail)
            with self._changed:
                self._sending = None
                if not failure:
                    self._retry_seconds = FIRST_RETRY_SECONDS
                    self._retry_at = self._clock() if self._failed else math.inf
                    continue
                self._failed.append(mail)
                if retried:
                    self._retry_seconds = min(2 * self._retry_seconds, LAST_RETRY_SECONDS)
                    self._retry_at = math.inf
                self._retry_at = min(self._retry_at, self._clock() + self._retry_seconds)

    def _wait_for_next(self) -> bool:
        """Make the next mail the one that is being sent, none at the end; return whether it's a retry."""
        while True:
            now = self._clock()
            for mail in [m for m in self._failed if now - m.queued > KEEP_SECONDS]:
                self._failed.remove(mail)
                self._drop(mail, 'it could not be sent for %d hours' % (KEEP_SECONDS // 3600))
            ending = self._end_at < math.inf
            if now >= self._end_at:
                return False
            if self._fresh:
                self._sending = self._fresh.popleft()
                return False
            if self._failed and (self._last_tries > 0 if ending else now >= self._retry_at):
                self._last_tries -= 1
                self._sending = self._failed.popleft()
                return True
            if ending:
                return False
            self._changed.wait(max(0.0, self._retry_at - now) if self._failed else None)

    def _try(self, mail: Mail) -> str:
        """Send a mail; return why that failed, or ''."""
        started = self._clock()
        try:
            said = send(self._settings, compose(self._settings, self._program, mail),
                        lambda: min(started + SEND_TIMEOUT_SECONDS, self._end_at) - self._clock())
        except Exception as why:  # whatever it is, the mails behind this one must not wait for ever
            self._log(f'unable to send mail "{mail.subject}", which is kept and tried again: {why}')
            return str(why) or type(why).__name__
        self._log('sent mail "{}" to {}{}'.format(mail.subject, ', '.join(self._settings.recipients),
                                              ': ' + said if said else ''))
        return ''

    def _drop(self, mail: Mail, reason: str) -> None:
        self._log(f'dropped mail "{mail.subject}": {reason}')
