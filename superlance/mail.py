"""Where notices go: the options, the mail message, and one attempt to send by each transport.

outbox.py queues notices and retries what failed; smtp.py and webhook.py are imported with the first notice that needs
them.
"""
from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Callable, NamedTuple

from superlance.command import CommandFailed, Deadline, SecondsLeft, decode_end, is_command, run_command
from superlance.listener import one_line
from superlance.notice import Notice, SendFailed, find_domain, hide, make_body, make_origin
from superlance.options import Given, Option, UsageError, parse_address, parse_addresses

if TYPE_CHECKING:
    from email.message import EmailMessage

    from superlance.fetch import Target

SENDMAIL = '/usr/sbin/sendmail -t -i'

COMMAND_SECONDS = 11 * 60
FIND_COMMAND_SECONDS = 2
LINE_LIMIT_BYTES = 998  # RFC 5322, 2.1.1


class SmtpServer(NamedTuple):
    """A mail server as --smtp names it."""

    host: str
    port: int
    tls: bool       # from the first byte; otherwise STARTTLS if the server offers it
    user: str
    password: str

    @property
    def shown(self) -> str:
        """The URL without user name and password."""
        host = f'[{self.host}]' if ':' in self.host else self.host
        return f"{'smtps' if self.tls else 'smtp'}://{host}:{self.port}"


class Settings(NamedTuple):
    """Where notices go, and how."""

    recipients: tuple[str, ...] = ()
    sendmail: str = SENDMAIL
    smtp: SmtpServer | None = None
    sender: str | None = None
    webhook: Target | None = None
    without_recipients: bool = False    # run the -s command although there is no -m

    @property
    def sends_mail(self) -> bool:
        return bool(self.recipients) or self.without_recipients

    @property
    def sends_anything(self) -> bool:
        return self.sends_mail or self.webhook is not None

    @property
    def to(self) -> str:
        """The recipients, as they follow the word mail; '' if there are none."""
        return f" to {', '.join(self.recipients)}" if self.recipients else ''

    @property
    def shown_command(self) -> str:
        """What messages call the mail command: the text of -s may contain a password."""
        return self.sendmail if self.sendmail == SENDMAIL else 'the -s command'


# The options.

def parse_smtp(text: str) -> SmtpServer:
    """Return the SmtpServer for smtp://[user[:password]@]host[:port] or smtps://...

    Without a password in it, SUPERLANCE_SMTP_PASSWORD is used. Raises ValueError.
    """
    from urllib.parse import unquote, urlsplit

    # In an invalid URL, anything before the last @ may be the password.
    scheme = text.partition('://')[0]
    shown = (f"{scheme + '://' if scheme.isalpha() else ''}***@{text.rpartition('@')[2]}" if '@' in text
             else re.sub(r'(://[^/:[]*:)(?!\d*/?\Z).*', r'\1***', text))
    wrong = ValueError(f'{shown!r} is not a mail server; write smtp://[user[:password]@]host[:port] or smtps://...')
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise wrong from None
    if url.scheme not in ('smtp', 'smtps') or not url.hostname or port == 0 or not text.isprintable() \
            or ' ' in url.hostname or url.path.strip('/') or url.query or url.fragment:
        raise wrong
    tls = url.scheme == 'smtps'
    user = unquote(url.username or '')
    password = unquote(url.password or '') or os.environ.get('SUPERLANCE_SMTP_PASSWORD', '')
    if user and not (user + password).isascii():
        raise ValueError(f'{shown!r}: user name and password must be ASCII, because smtplib can send no others')
    return SmtpServer(url.hostname, port or (465 if tls else 25), tls, user, password)


def parse_webhook(text: str) -> Target:
    """Return the Target for an https or http URL. Raises ValueError, which contains no part of the URL."""
    from superlance.fetch import parse_url

    try:
        return parse_url(text, shown='webhook')
    except ValueError:
        raise ValueError('not a valid URL (not shown, because it is secret); '
                         'write https://HOST/PATH') from None


OPTIONS = (
    Option('m', 'email', parse_addresses),
    Option('s', 'sendmail_program', str),
    Option('', 'smtp', parse_smtp),
    Option('', 'webhook', parse_webhook),
    Option('', 'from', parse_address),
)


def read_settings(given: Given, without_recipients: bool = False) -> Settings:
    """Return the settings, and add a warning for each option that has no effect. Raises UsageError.

    without_recipients: an explicit -s is used even if there is no -m (crashmail).
    """
    if () in given.all('email'):
        given.ignore_empty('-m')
    command = given.last('sendmail_program')
    if command == '':
        given.ignore_empty('-s')
    recipients = tuple(address for addresses in given.all('email') for address in addresses)
    settings = Settings(
        recipients=recipients, sendmail=command or SENDMAIL, smtp=given.last('smtp'),
        sender=given.last('from'), webhook=_read_webhook(given))
    if without_recipients and not recipients and command:
        settings = settings._replace(without_recipients=True, smtp=None)
        unused = {'--smtp': 'smtp'}
    else:
        unused = {'-s': 'sendmail_program', '--smtp': 'smtp', '--from': 'from'} if not recipients else {}
    given.warnings += [f'ignored option {flag}: it has no effect without -m'
                       for flag, name in unused.items() if given.last(name)]
    if settings.smtp and recipients and command:
        given.warnings.append('ignored option -s: --smtp takes precedence')
    webhook = settings.webhook
    if webhook and not webhook.tls and not _is_private(webhook.host):
        given.warnings.append('the webhook URL, which is secret, is sent unencrypted; use https instead of http')
    return settings


def _read_webhook(given: Given) -> Target | None:
    text = os.environ.get('SUPERLANCE_WEBHOOK')
    if 'webhook' in given or not text:
        webhook: Target | None = given.last('webhook')
        return webhook
    try:
        return parse_webhook(text)
    except ValueError as why:
        raise UsageError(f'environment variable SUPERLANCE_WEBHOOK: {why}') from None


def _is_private(host: str) -> bool:
    """Return whether a host is on this machine or in a private network, as far as its name shows."""
    from ipaddress import ip_address

    try:
        return ip_address(host.partition('%')[0]).is_private
    except ValueError:
        return '.' not in host


def describe(settings: Settings) -> str:
    """Return where notices go, for the first line of the log; no secrets."""
    parts = []
    if settings.sends_mail:
        parts.append(f'mail{settings.to} through {settings.smtp.shown if settings.smtp else settings.shown_command}')
    if settings.webhook:
        parts.append('notices to the webhook')
    return '; '.join(parts) or 'no mail'


def find_command_problem(settings: Settings) -> str:
    """Return a complaint if the first word of the mail command is a path or name that does not exist, otherwise ''."""
    word = settings.sendmail.split()[0] if settings.sendmail.strip() else ''
    if not settings.sends_mail or settings.smtp or not re.fullmatch(r'[\w./+-]+', word) or _is_shell_command(word):
        return ''
    if settings.sendmail == SENDMAIL:
        return f'mail command {word} not found: install a mail server such as Postfix, or use --smtp or -s'
    return 'the -s command was not found or is not executable'


def _is_shell_command(word: str) -> bool:
    if '/' in word or is_command(word):
        return is_command(word)
    try:    # it may be built into the shell
        run_command(['/bin/sh', '-c', f'command -v {word}'], Deadline(FIND_COMMAND_SECONDS).seconds_left)
    except CommandFailed:
        return False
    return True


# The message.

def compose(settings: Settings, program: str, notice: Notice) -> EmailMessage:
    """Return the mail for a notice."""
    from email.message import EmailMessage
    from email.policy import default
    from email.utils import formatdate

    domain = find_domain()
    # A long subject stays on one line, so that filters find it; only encoded words must be short.
    policy = default.clone(max_line_length=LINE_LIMIT_BYTES) if notice.subject.isascii() else default
    message = EmailMessage(policy)
    if settings.recipients:
        message['To'] = ', '.join(settings.recipients)
    sender = settings.sender or (f'{program}@{domain}' if settings.smtp else None)
    if sender:
        message['From'] = sender
    # email.message would decode an encoded word (RFC 2047), even to a line end.
    message['Subject'] = one_line(notice.subject).replace('=?', '= ?')
    message['Date'] = formatdate(notice.written, localtime=True)
    # The same at each attempt, so that duplicates can be recognised.
    message['Message-ID'] = f'<{int(notice.written * 1000000)}.{os.getpid()}.{program}@{domain}>'
    message['Auto-Submitted'] = 'auto-generated'
    text = f'{make_body(notice)}\n\n-- \n{make_origin(program, notice)}\n'
    fits = all(len(line.encode('utf-8')) <= LINE_LIMIT_BYTES for line in text.split('\n'))
    encoding = '7bit' if text.isascii() else '8bit'
    if not fits or (settings.smtp and encoding == '8bit'):  # a server need not accept 8bit, RFC 6152
        encoding = 'quoted-printable'
    message.set_content(text, cte=encoding)
    return message


# One attempt by each transport.

def send_mail(settings: Settings, program: str, notice: Notice, seconds_left: SecondsLeft) -> str:
    """Send a notice as mail; return the answer of the mail server, or the output of the mail command.

    seconds_left is how much time the listener has; each transport has deadlines of its own. Raises SendFailed.
    """
    message = compose(settings, program, notice)
    if settings.smtp:
        from superlance import smtp

        return smtp.send(settings.smtp, message, seconds_left)
    deadline = Deadline(COMMAND_SECONDS)
    try:
        output = run_command(settings.sendmail, lambda: min(deadline.seconds_left(), seconds_left()),
                             message.as_bytes(), shown=settings.shown_command)
    except CommandFailed as why:
        raise SendFailed(_hide_command(settings, str(why))) from None
    return _hide_command(settings, one_line(decode_end(output)))


def _hide_command(settings: Settings, text: str) -> str:
    """Return text without the words of -s, which a shell repeats if it does not understand them.

    Plain lower-case words that are no value of an option remain, so that the output of `echo rejected; exit 1` says
    something.
    """
    if settings.sendmail == SENDMAIL:
        return text
    words = re.split(r'[\s\'"`=;&|<>(){}$]+', settings.sendmail)
    values = re.findall(r'[=:]([^\s\'"`;&|<>(){}$]+)', settings.sendmail)   # as in --password=VALUE
    return hide(text, [one_line(settings.sendmail), *values,
                       *(word for word in words if not re.fullmatch('[a-z]*', word))])


def send_webhook(settings: Settings, program: str, notice: Notice, seconds_left: SecondsLeft) -> str:
    """Post a notice to the webhook; return the status line of the response. Raises SendFailed."""
    from superlance import webhook

    assert settings.webhook
    return webhook.post(settings.webhook, program, notice, seconds_left)


class Transport(NamedTuple):
    """One of the two ways to send a notice."""

    what: str       # how log lines call a notice that it sends
    to: str         # what they add after its subject
    send: Callable[[Settings, str, Notice, SecondsLeft], str]


def find_transports(settings: Settings) -> list[Transport]:
    transports = [Transport('mail', settings.to, send_mail)] if settings.sends_mail else []
    return transports + ([Transport('webhook message', '', send_webhook)] if settings.webhook else [])


def send_test(settings: Settings, program: str, subject: str, body: str, server: str = '') -> tuple[list[str], bool]:
    """Send a notice by mail and to the webhook; return one line for each, with the answer, and whether both succeeded.

    May take 11 minutes, like any mail.
    """
    notice = Notice(subject, body, server, time.time())
    lines, succeeded = [], True
    for what, to, send in find_transports(settings):
        try:
            answer = send(settings, program, notice, lambda: float('inf'))
        except SendFailed as why:
            lines.append(f'unable to send {what}{to}: {why}')
            succeeded = False
        else:
            lines.append(f'sent {what}{to}{": " if answer else ""}{answer}')
    return lines, succeeded
