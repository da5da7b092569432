"""Inboxes for the tests' mail: the file of a mail command, or an SMTP server on loopback."""
from __future__ import annotations

import asyncio.constants
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from support import TIMEOUT, wait_for

SEPARATOR = b'\n=====\n'
# From Python 3.12 on, a server that is stopped waits 30 s for each TLS connection that the client has just closed.
asyncio.constants.SSL_SHUTDOWN_TIMEOUT = 0.1  # type: ignore[misc,assignment,attr-defined,unused-ignore]


class Inbox:
    """The mails received so far, in their order."""

    def _read(self) -> list[bytes]:
        raise NotImplementedError

    @property
    def mails(self) -> list[EmailMessage]:
        return [message_from_bytes(mail, policy=default) for mail in self._read()]

    @property
    def subjects(self) -> list[str]:
        return [str(mail['Subject']).strip() for mail in self.mails]

    def wait(self, number: int = 1, timeout: float = TIMEOUT) -> list[EmailMessage]:
        """Wait until number mails have been received, and return all."""
        wait_for(lambda: len(self._read()) >= number, f'{number} mails', timeout)
        return self.mails


class CommandInbox(Inbox):
    """A mail command, for -s, that appends each mail to a file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / 'inbox'
        self.command = f"{{ cat; echo; echo =====; }} >> '{self._path}'"

    def _read(self) -> list[bytes]:
        return self._path.read_bytes().split(SEPARATOR)[:-1] if self._path.exists() else []


class SmtpController(Controller):
    """An SMTP server whose port attribute is the real one even if 0 was requested."""

    def _trigger_server(self) -> None:
        server: Any = self.server
        self.port = server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


def write_account(home: Path, port: int) -> None:
    """Let an msmtp with this HOME send to a server on loopback."""
    account = home / '.msmtprc'
    account.write_text(f'account default\nhost 127.0.0.1\nport {port}\nfrom x@example.com\nauto_from off\n', 'utf-8')
    account.chmod(0o600)


class SmtpInbox(Inbox):
    """An SMTP server on loopback, and the msmtp account that sends to it."""

    def __init__(self, home: Path) -> None:
        self._received: list[bytes] = []
        self._controller = SmtpController(self, hostname='127.0.0.1', port=0)
        self._home = home

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self._received.append(envelope.content)
        return '250 accepted'

    def _read(self) -> list[bytes]:
        return self._received

    def __enter__(self) -> SmtpInbox:
        self._controller.start()
        write_account(self._home, self._controller.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()
