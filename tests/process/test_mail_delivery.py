"""How notices leave a listener's process: sendmail, SMTP and webhook, what is in its log, and what happens at exit."""
from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Iterator

import pytest
from chat import Chat
from inbox import CommandInbox, SmtpInbox
from support import Listener, wait_for, write_script

SECRETS = ('T0PSECRET', 'k3yk3yk3y', 't0kent0ken', 's3cret')


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that refuses connections."""
    with socket.socket() as reserved:
        reserved.bind(('127.0.0.1', 0))
        yield reserved.getsockname()[1]


def crashmail(*arguments: str, **environment: str) -> Listener:
    return Listener(['crashmail', *arguments], environment)


def find_lines(log: str, start: str) -> list[str]:
    """Return the lines of a log that start with a text, without time and program."""
    lines = [line.partition('crashmail: ')[2] for line in log.splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.skipif(not os.path.exists('/usr/sbin/sendmail'), reason='there is no sendmail')
def test_real_sendmail(tmp_path: Path) -> None:
    with SmtpInbox(tmp_path) as inbox, crashmail('-m', 'bob@example.com, J\xfcrgen <j@example.com>',
                                                 HOME=str(tmp_path)) as listener:
        listener.crash('caf\xe9')
        message, = inbox.wait()
        listener.wait_for_log('sent mail "')
    assert message['To'] == 'bob@example.com, J\xfcrgen <j@example.com>'
    assert str(message['Subject']).startswith('caf\xe9 ') and message['From']


def test_night_with_a_dead_mail_server_and_a_live_webhook(dead_port: int) -> None:
    with Chat() as chat, crashmail('-m', 'bob@example.com', f'--smtp=smtp://robot:s3cret@127.0.0.1:{dead_port}',
                                   SUPERLANCE_WEBHOOK=chat.url()) as listener:
        for number in range(3):
            listener.crash(f'web{number}')
        chat.wait(3)
        wait_for(lambda: len(find_lines(listener.log, 'sent webhook')) == 3, lambda: listener.log)
        wait_for(lambda: len(find_lines(listener.log, 'unable to send mail')) == 3, lambda: listener.log)
        assert listener.terminate() == 0
        log = listener.log
    assert [subject.split()[0] for subject in chat.subjects] == ['web0', 'web1', 'web2']
    reason = f'127.0.0.1:{dead_port}: Connection refused'
    failures = find_lines(log, 'unable to send mail "web')
    assert [line.partition('"')[2].partition('"')[2] for line in failures] == (
        [f', queued for retry: {reason}'] * 3 + [f': {reason}'] * 3)   # the last attempt does not promise another
    dropped = find_lines(log, 'dropped mail "web')
    assert len(dropped) == 3 and all(line.endswith('": crashmail is shutting down') for line in dropped)
    assert not any(secret in log for secret in SECRETS) and 'Errno' not in log


def test_last_attempt_at_exit_succeeds(tmp_path: Path) -> None:
    """The mail command failed, and works again when the listener exits."""
    inbox = CommandInbox(tmp_path)
    script = write_script(tmp_path / 'mta', f'[ -e {tmp_path}/up ] || exit 75\n{inbox.command}\n')
    with crashmail('-m', 'bob@example.com', '-s', str(script)) as listener:
        listener.crash('web')
        listener.wait_for_log('queued for retry: the -s command: exit status 75')
        (tmp_path / 'up').touch()
        assert listener.terminate() == 0
        assert 'dropped' not in listener.log and str(script) not in listener.log
    assert len(inbox.mails) == 1
