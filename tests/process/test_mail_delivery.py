"""How notices leave a listener's process: sendmail, SMTP and webhook, what is in its log, and what happens at exit."""
from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Iterator

import pytest
from chat import Chat
from inbox import CommandInbox, SmtpController, SmtpInbox
from support import PYTHON, TIMEOUT, Listener, run_command_line, serving, wait_for, write_script
from web import hang, response

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


def test_exit_does_not_wait_for_servers_that_hang() -> None:
    connected = threading.Event()

    def say_nothing(client: socket.socket) -> None:
        connected.set()
        hang(client)

    with Chat(hang) as chat, serving(say_nothing) as port, \
            crashmail('-m', 'bob@example.com', f'--smtp=smtp://127.0.0.1:{port}', '--webhook', chat.url()) as listener:
        listener.crash('web')
        chat.wait()
        assert connected.wait(TIMEOUT)
        started = time.monotonic()
        assert listener.terminate() == 0
        assert time.monotonic() - started < 8   # for both together: 5 s, and the start of a busy machine
        dropped = find_lines(listener.log, 'dropped')
    assert sorted(re.sub('".*"', '"..."', line) for line in dropped) == [
        'dropped mail "...": crashmail is shutting down', 'dropped webhook message "...": crashmail is shutting down']


def test_signal_right_after_a_crash_loses_no_mail(tmp_path: Path) -> None:
    """Whatever the moment of the signal, each acknowledged crash is in the inbox, or in a line of the log."""
    for round_ in range(6):
        folder = tmp_path / str(round_)
        folder.mkdir()
        inbox = CommandInbox(folder)
        with crashmail('-m', 'bob@example.com', '-s', f'sleep 0.1; {inbox.command}') as listener:
            for number in range(2):
                listener.crash(f'web{number}')
            time.sleep(round_ * 0.03)   # the moment is what varies
            started = time.monotonic()
            assert listener.terminate() == 0
            assert time.monotonic() - started < 5
            names = [str(mail['Subject']).split()[0] for mail in inbox.mails]
            names += [line.split('"')[1].split()[0] for line in find_lines(listener.log, 'dropped mail "')]
            assert sorted(names) == ['web0', 'web1'], listener.log


@pytest.mark.parametrize('program', ['memmon', 'httpok', 'crashmail'])
def test_invalid_webhook_is_an_error_without_the_url(program: str) -> None:
    arguments = {'memmon': ['-a', '1GB'], 'httpok': ['http://127.0.0.1/'], 'crashmail': []}[program]
    for done in (run_command_line(program, '--webhook', 'ftp://x/k3yk3yk3y', *arguments),
                 run_command_line(program, *arguments, SUPERLANCE_WEBHOOK='https://x:y/k3yk3yk3y')):
        assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
        assert 'write https://HOST/PATH' in done.stderr and 'k3y' not in done.stderr


def test_once_says_what_mail_server_and_webhook_answered(dead_port: int) -> None:
    with Chat(response(b'no_service', status='404 Not Found')) as chat:
        done = run_command_line('crashmail', '--once', '-m', 'bob@example.com', '--webhook', chat.url(),
                                f'--smtp=smtp://robot:s3cret@127.0.0.1:{dead_port}')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert f'unable to send mail to bob@example.com: 127.0.0.1:{dead_port}: Connection refused\n' in done.stdout
    assert 'unable to send webhook message: 404 Not Found: no_service\n' in done.stdout
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)


class LoopbackServer:
    """Accepts mail, and knows the name with which a client greets."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._controller = SmtpController(self, hostname='127.0.0.1', port=0)

    async def handle_DATA(self, server: object, session: object, envelope: object) -> str:
        self.names.append(getattr(session, 'host_name', ''))
        return '250 accepted'

    def __enter__(self) -> int:
        self._controller.start()
        return self._controller.port

    def __exit__(self, *_: object) -> None:
        self._controller.stop()


# hostname(1) does not accept every name that the kernel does.
SET_HOST_NAME = 'import os, socket, sys; socket.sethostname(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])'


def can_set_host_name() -> bool:
    return shutil.which('unshare') is not None and subprocess.run(
        ['unshare', '-r', '-u', 'true'], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_set_host_name(), reason='unshare -u is not permitted')
@pytest.mark.parametrize('name', ['x' * 64, 'a..b'])
def test_host_name_that_is_not_a_domain(name: str) -> None:
    server = LoopbackServer()
    with server as port:
        done = subprocess.run(
            ['unshare', '-r', '-u', PYTHON, '-c', SET_HOST_NAME, name, PYTHON, '-m', 'superlance.crashmail', '--once',
             '-m', 'bob@example.com', f'--smtp=smtp://127.0.0.1:{port}'],
            capture_output=True, encoding='utf-8', timeout=TIMEOUT, check=False)
    assert 'sent mail to bob@example.com: 250 accepted\n' in done.stdout, done.stdout + done.stderr
    assert server.names == ['[127.0.0.1]'] and 'Traceback' not in done.stderr
