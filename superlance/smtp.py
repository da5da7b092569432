"""Mail over SMTP: one attempt on one connection, within bounded time."""
from __future__ import annotations

import re
import smtplib
import socket
from base64 import b64encode
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from superlance.command import Deadline, SecondsLeft
from superlance.fetch import BoundedSocket, FetchFailed, Request, Target, connect, limit_wait, make_tls_context
from superlance.listener import one_line
from superlance.notice import SendFailed, find_domain, hide
from superlance.rpc import Unknown

if TYPE_CHECKING:
    import ssl
    from email.message import EmailMessage

    from superlance.mail import SmtpServer

SEND_SECONDS = 60           # up to the end of DATA
ANSWER_SECONDS = 10 * 60    # RFC 5321, 4.5.3.2.6: after a shorter time, a slow server delivers each attempt
ANSWER_CHARACTERS = 500     # as much as belongs in a log
ANSWERS_LIMIT_BYTES = 1024 * 1024
LOGIN_RETRY_SECONDS = 3600  # each failed login may count towards a lockout


def send(server: SmtpServer, message: EmailMessage, seconds_left: SecondsLeft) -> str:
    """Send a message to its To; return the server's answer, and which recipients it rejected.

    seconds_left is how much time the listener has; a session has deadlines of its own. Raises SendFailed.
    """
    # A server may repeat the command that it rejects.
    secrets = _encode_secrets(server)
    try:
        return hide(_send(server, message, seconds_left), secrets)
    except SendFailed as why:
        raise SendFailed(hide(str(why), secrets), why.permanent, why.pause_seconds) from None


def _encode_secrets(server: SmtpServer) -> list[str]:
    """Return the password in each form in which it is sent."""
    plain = f'\0{server.user}\0{server.password}', server.password
    return [server.password, *(b64encode(text.encode('utf-8', 'surrogateescape')).decode('ascii') for text in plain)]


def _send(server: SmtpServer, message: EmailMessage, seconds_left: SecondsLeft) -> str:
    session = Session(server, seconds_left)
    try:
        return session.send(message)
    except smtplib.SMTPRecipientsRefused as why:
        rejected: dict[str, tuple[int, bytes]] = why.recipients
        raise SendFailed(f'{server.host}: {_describe_rejected(rejected)}',
                         permanent=all(code >= 500 for code, _ in rejected.values())) from why
    except smtplib.SMTPAuthenticationError as why:
        permanent = why.smtp_code >= 500
        raise SendFailed(f'{server.host}: login failed: {_describe_answer(why.smtp_code, why.smtp_error)}',
                         permanent, LOGIN_RETRY_SECONDS if permanent else 0) from why
    except smtplib.SMTPResponseException as why:
        raise SendFailed(f'{server.host}: {_describe_answer(why.smtp_code, why.smtp_error)}',
                         permanent=why.smtp_code >= 500) from why
    except (OSError, ValueError, FetchFailed, Unknown) as why:  # ValueError: smtplib can't put it into its protocol
        # smtplib quotes the OSError of a connection in the text of its own.
        reason = re.sub(r'\[Errno -?\d+\] ', '', one_line(getattr(why, 'strerror', None) or why))
        if session.seconds_left() <= 0:
            reason = 'timed out'
        raise SendFailed(f'{server.host}:{server.port}: {reason or type(why).__name__}') from why


class SmtpSocket(BoundedSocket):
    """A socket for a server whose answers take little memory; smtplib would collect any number of lines."""

    _received_bytes = 0

    def readinto(self, buffer: Any) -> int:
        received_bytes = super().readinto(buffer)
        self._received_bytes += received_bytes
        if self._received_bytes > ANSWERS_LIMIT_BYTES:
            raise FetchFailed('the answer is too long')
        return received_bytes


class Session:
    """One connection to a mail server; one deadline bounds the sum of its waits."""

    def __init__(self, server: SmtpServer, seconds_left: SecondsLeft) -> None:
        self._server = server
        self._deadline = Deadline(SEND_SECONDS)
        self._listener_left = seconds_left
        # Without a name, smtplib looks up that of the host, which may hang, and fails if it is not a valid domain.
        self._smtp = smtplib.SMTP(local_hostname='localhost')

    def seconds_left(self) -> float:
        return min(self._deadline.seconds_left(), self._listener_left())

    def send(self, message: EmailMessage) -> str:
        """Send a message. Raises SendFailed, OSError (SMTPException is one), ValueError, FetchFailed and Unknown."""
        server = self._server
        target = Target(server.tls, server.host, server.port, '', '', None, server.shown)
        with connect(Request(target), self.seconds_left) as sock:
            self._open(sock)
            return self._transfer(message)

    def _open(self, sock: socket.socket) -> None:
        """Read the greeting, start TLS if possible, and log in if there is a user name."""
        server, smtp = self._server, self._smtp
        is_loopback = ip_address(sock.getpeername()[0].partition('%')[0]).is_loopback
        # If nothing secret is sent, or not over a network, TLS that can't be verified is better than none.
        verify = not is_loopback and bool(server.tls or server.user)
        smtp.local_hostname = _make_ehlo_name(sock)
        encrypted = server.tls
        self._use(self._wrap(sock, verify) if encrypted else sock)
        code, answer = smtp.getreply()
        if code != 220:
            raise smtplib.SMTPConnectError(code, answer)
        smtp.ehlo_or_helo_if_needed()
        if not encrypted and smtp.has_extn('starttls'):
            code, answer = smtp.docmd('STARTTLS')
            if code != 220:
                raise smtplib.SMTPResponseException(code, answer)
            self._use(self._wrap(sock, verify))
            smtp.ehlo()     # what the server offered before was not protected, RFC 3207, 4.2
            encrypted = True
        if server.user:
            if not (encrypted or is_loopback):
                raise SendFailed(f'{server.host} does not offer STARTTLS; refusing to send the password unencrypted',
                                 permanent=True)
            self._log_in()

    def _use(self, sock: socket.socket) -> None:
        self._smtp.sock = SmtpSocket(sock, self.seconds_left)  # type: ignore[assignment]
        self._smtp.file = None  # smtplib opens another; what this one has buffered was sent before TLS

    def _wrap(self, sock: socket.socket, verify: bool) -> ssl.SSLSocket:
        sock.settimeout(limit_wait(self.seconds_left))
        return make_tls_context(verify).wrap_socket(sock, server_hostname=self._server.host)

    def _log_in(self) -> None:
        """Log in by the first mechanism that both sides support.

        SMTP.login() would try the others after a wrong password, and each attempt may count towards a lockout.
        """
        smtp = self._smtp
        offered = smtp.esmtp_features.get('auth', '').upper().split()
        mechanisms: dict[str, Any] = {
            'PLAIN': smtp.auth_plain, 'LOGIN': smtp.auth_login, 'CRAM-MD5': smtp.auth_cram_md5}
        name = next((name for name in mechanisms if name in offered), None)
        if name is None:
            raise SendFailed(f"{self._server.host} does not support login with {', '.join(mechanisms)}", permanent=True)
        smtp.user, smtp.password = self._server.user, self._server.password
        smtp.auth(name, mechanisms[name], initial_response_ok=name != 'CRAM-MD5')

    def _transfer(self, message: EmailMessage) -> str:
        smtp = self._smtp
        data = message.as_bytes(policy=message.policy.clone(linesep='\r\n'))
        sender = message['From'].addresses[0].addr_spec
        code, answer = smtp.mail(sender, [f'size={len(data)}'] if smtp.has_extn('size') else [])
        if code != 250:
            raise smtplib.SMTPSenderRefused(code, answer, sender)
        recipients = {address.addr_spec: None for address in message['To'].addresses}
        rejected: dict[str, tuple[int, bytes]] = {}
        for recipient in recipients:
            code, answer = smtp.rcpt(recipient)
            if code not in (250, 251):
                rejected[recipient] = code, answer
        if len(rejected) == len(recipients):
            raise smtplib.SMTPRecipientsRefused(rejected)
        code, answer = smtp.docmd('DATA')
        if code != 354:
            raise smtplib.SMTPDataError(code, answer)
        smtp.send(re.sub(br'(?m)^\.', b'..', data) + b'.\r\n')
        self._deadline = Deadline(ANSWER_SECONDS)
        code, answer = smtp.getreply()
        if not 200 <= code < 300:   # the first digit decides (RFC 5321, 4.3.2); a retry would be a second mail
            raise smtplib.SMTPDataError(code, answer)
        with suppress(OSError, FetchFailed):
            smtp.putcmd('QUIT')     # the mail is accepted, whatever the answer to this
        return ', '.join(filter(None, (_describe_answer(code, answer), _describe_rejected(rejected))))


def _make_ehlo_name(sock: socket.socket) -> str:
    """Return the host name if it is fully qualified, otherwise the address of this host (RFC 5321, 4.1.4)."""
    domain = find_domain()
    address = sock.getsockname()[0].partition('%')[0]
    return domain if '.' in domain else f"[{'IPv6:' if ':' in address else ''}{address}]"


def _describe_rejected(rejected: dict[str, tuple[int, bytes]]) -> str:
    return ', '.join(f'{address} was rejected: {_describe_answer(*answer)}' for address, answer in rejected.items())


def _describe_answer(code: int, text: bytes | str) -> str:
    answer = one_line(text.decode('utf-8', 'replace') if isinstance(text, bytes) else text)[:ANSWER_CHARACTERS]
    return f'{code} {answer}'.rstrip() if code >= 0 else f'not an SMTP answer: ...{answer}'
