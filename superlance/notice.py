"""What a listener reports, and why it could not be sent: the parts that mail, SMTP and the webhook share."""
from __future__ import annotations

import re
from typing import Iterable, NamedTuple

from superlance.listener import one_line, printable
from superlance.options import DOMAIN

HIDDEN_WORD_LENGTH = 6          # shorter words of a secret also occur in ordinary messages


class Notice(NamedTuple):
    """What a listener reports."""

    subject: str
    body: str
    server: str     # supervisord's identifier, or ''
    written: float  # epoch seconds


class SendFailed(Exception):
    """A notice could not be sent; the message is one line.

    permanent: the server rejected it for good, so it is retried rarely. pause_seconds: nothing else may be sent for
    that long either.
    """

    def __init__(self, reason: str, permanent: bool = False, pause_seconds: float = 0) -> None:
        super().__init__(reason)
        self.permanent = permanent
        self.pause_seconds = pause_seconds


def make_body(notice: Notice) -> str:
    """Return the body as printable lines."""
    lines = [printable(line.expandtabs().rstrip()) for line in notice.body.split('\n')]
    return '\n'.join(lines).rstrip('\n')


def make_origin(program: str, notice: Notice) -> str:
    """Return the line that names the listener and where it runs."""
    from socket import gethostname

    origin = f'{program} on {printable(gethostname())}'
    return origin + (f', supervisor {one_line(notice.server)}' if notice.server else '')


def find_domain() -> str:
    """Return the host name, or localhost if it is not a valid domain: some containers have a name of 64 characters."""
    from socket import gethostname

    host = gethostname()
    is_valid = re.fullmatch(DOMAIN, host, re.ASCII) and len(host) < 254 and max(map(len, host.split('.'))) < 64
    return host if is_valid else 'localhost'


def hide(text: str, secrets: Iterable[str]) -> str:
    """Return text with *** for each of the secrets, except those that are as short as an ordinary word."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= HIDDEN_WORD_LENGTH:
            text = text.replace(secret, '***')
    return text
