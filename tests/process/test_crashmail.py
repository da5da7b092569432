"""crashmail as a process; the test plays supervisord."""
from __future__ import annotations

import re
import socket
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import pytest
from inbox import CommandInbox
from support import NO_SUPERVISORD, PYTHON, Listener, read_until, run_command_line, serving, wait_for

EXITED, FATAL = 'PROCESS_STATE_EXITED', 'PROCESS_STATE_FATAL'

Start = Callable[..., Listener]


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


@pytest.fixture
def start(inbox: CommandInbox, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a crashmail whose mail goes to the inbox."""
    started: list[Listener] = []

    def start(*arguments: str, url: str = NO_SUPERVISORD, recipient: bool = True) -> Listener:
        to = ['-m', 'bob@example.com'] if recipient else []
        started.append(Listener(['crashmail', *to, '-s', inbox.command, *arguments], {'SUPERVISOR_SERVER_URL': url},
                                tmp_path))
        return started[-1]
    yield start
    for listener in started:
        with listener:
            assert listener.close() == 0


def test_crash_is_logged_and_mailed(start: Start, inbox: CommandInbox) -> None:
    listener = start('-o', 'db1', '-p', 'bar')
    listener.crash('x', 'bar', 77)
    listener.crash('y', 'other')
    listener.crash('x', 'bar', expected=1)
    listener.serve_event(FATAL, 'processname:x groupname:bar from_state:BACKOFF')
    assert re.search(r'crashmail: bar:x \(pid 77\) exited unexpectedly\n', listener.log)
    assert re.search(r'crashmail: other:y \(pid 123\) exited unexpectedly\n', listener.log)
    crash, fatal = inbox.wait(2)
    assert re.fullmatch(r'db1: x crashed at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}', crash['Subject'])
    assert 'bar:x (pid 77) exited unexpectedly\n' in crash.get_content()
    assert crash.get_content().endswith('supervisor supervisor\n')
    assert fatal['Subject'].startswith('db1: x is FATAL: supervisord gave up starting it at ')
    assert listener.close() == 0
    assert len(inbox.mails) == 2


def test_first_lines_of_the_log(start: Start) -> None:
    listener = start('-p', 'web', 'surplus', '-o', '')
    listener.expect(b'READY\n')
    log = listener.wait_for_log(NO_SUPERVISORD)
    lines = [line.partition(' crashmail: ')[2] for line in log.splitlines()]
    assert re.fullmatch(r'crashmail [\d.]+: reports crashes of web; mail to bob@example.com through the -s command',
                        lines[0])
    assert lines[1:3] == [
        "warning: ignored argument 'surplus': crashmail takes options only; a value that contains spaces needs quotes",
        'warning: ignored option -o: its value is empty']
    assert lines[3].startswith(f'warning: supervisord at {NO_SUPERVISORD} does not answer')


def test_explicit_mail_command_is_run_without_recipients(start: Start, inbox: CommandInbox) -> None:
    """As superlance 2.0.0: the command knows where the mail goes."""
    start(recipient=False).crash()
    mail, = inbox.wait()
    assert mail['To'] is None
    assert mail['Subject'].startswith('web crashed at ')


def test_event_that_cannot_be_parsed_is_logged_and_acknowledged(start: Start) -> None:
    listener = start()
    listener.serve_event(EXITED, 'processname:web expec')
    assert "crashmail: unable to parse a PROCESS_STATE_EXITED event: 'processname:web expec'\n" in listener.log


def test_interval(start: Start, inbox: CommandInbox) -> None:
    listener = start('--interval=1h', '-o', 'db1')
    listener.crash('web')
    inbox.wait()
    for program in ('web', 'x', 'y'):
        listener.crash(program)
    assert listener.terminate() == 0
    assert inbox.subjects[0].startswith('db1: web crashed at ')
    assert re.fullmatch(r'db1: 3 crashes since \d\d:\d\d:\d\d: web, x, y', inbox.subjects[1])
    assert len(inbox.mails) == 2


def test_interval_ends(start: Start, inbox: CommandInbox) -> None:
    listener = start('--interval=0.3s')
    for pid in range(1, 6):
        listener.crash('web', pid=pid)
    wait_for(lambda: sorted(re.findall(r'\(pid (\d)\)', ''.join(mail.get_content() for mail in inbox.mails)))
             == list('12345'), 'all crashes')
    assert 'pid 1' in inbox.mails[0].get_content()


# supervisord does not answer.

def read_method(client: socket.socket) -> str:
    """Return the method of supervisor's interface that a client calls."""
    request = read_until(client, b'</methodCall>')
    return request.partition(b'<methodName>supervisor.')[2].partition(b'<')[0].decode()


@contextmanager
def silent_server() -> Iterator[tuple[str, list[str]]]:
    """Yield the URL of a supervisord that does not answer, and a list that grows with each call.

    It closes the connection at the calls that are made at start, so that no test waits for them.
    """
    end = threading.Event()
    calls: list[str] = []

    def handle(client: socket.socket) -> None:
        calls.append(read_method(client))
        if not (calls[-1] == 'getAllConfigInfo' or calls == ['getAllConfigInfo', 'getAllProcessInfo']):
            end.wait()
    with serving(handle) as port:
        try:
            yield f'http://127.0.0.1:{port}', calls
        finally:
            end.set()


def test_supervisord_that_does_not_answer_is_not_asked_for_a_minute(start: Start, inbox: CommandInbox) -> None:
    with silent_server() as (url, calls):
        listener = start('--tail=5', url=url)
        listener.crash()
        before = len(calls)
        for pid in range(20):
            listener.crash(pid=pid)
        assert len(calls) == before
        bodies = [mail.get_content() for mail in inbox.wait(21)]
    assert 'did not answer' in bodies[0] or 'does not answer' in bodies[0]
    for pid, body in enumerate(bodies[1:]):
        assert f'web (pid {pid}) exited unexpectedly\n' in body
        assert 'Unable to read more of its logs through supervisord: supervisord is not asked for 1m' in body


def test_signal_while_a_crash_is_handled_loses_no_mail(start: Start, inbox: CommandInbox) -> None:
    with silent_server() as (url, calls):
        listener = start(url=url)
        listener.expect(b'READY\n')
        listener.wait_for_log('warning: ')      # the start check has given up
        before = len(calls)
        listener.send_event(EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:1')
        wait_for(lambda: len(calls) > before, 'the call')
        assert listener.terminate() == 0
        listener.expect(b'RESULT 2\nOK')
    assert len(inbox.mails) == 1


def test_shutdown_is_retried_although_there_is_no_further_event(start: Start, tmp_path: Path) -> None:
    methods: list[str] = []

    def handle(client: socket.socket) -> None:
        method = read_method(client)
        methods.append(method)
        if method == 'shutdown' and methods.count('shutdown') > 1:
            body = (b'<?xml version="1.0"?><methodResponse><params><param><value><boolean>1</boolean></value></param>'
                    b'</params></methodResponse>')
            client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b' % (len(body), body))
    with serving(handle) as port:
        listener = start('--shutdown', url=f'http://127.0.0.1:{port}')
        listener.crash()
        log = listener.wait_for_log('asked supervisord to shut down')
    assert log.index('web (pid 123) exited') < log.index('unable to shut down supervisord, will retry: ')


# Cost.

def test_nothing_is_imported_before_the_first_crash_that_it_does_not_need() -> None:
    heavy = ('supervisor.childutils', 'xmlrpc.client', 'http.client', 'email.message', 'subprocess', 'ssl', 'smtplib',
             'superlance.crashlog', 'superlance.tail')
    printed = subprocess.run(
        [PYTHON, '-c', 'import sys, superlance.crashmail as c\n'
         'from superlance.listener import Event\n'
         'from superlance.options import read_argv\n'
         "argv = ['-p', 'web', '-m', 'a@b.c', '--interval=1m', '--shutdown']\n"
         'options = c.build_options(*read_argv(argv, c.OPTIONS))\n'
         'crashmail = c.Crashmail(options, {})\n'
         'crashmail.handle = crashmail.handle\n'
         "c.find_crash(Event('PROCESS_STATE_EXITED', 'processname:web groupname:web expected:1 pid:1', 'sup', 0))\n"
         f'print([name for name in {heavy} if name in sys.modules])'],
        check=True, capture_output=True, encoding='utf-8')
    assert printed.stdout == '[]\n'


# --once.

look = partial(run_command_line, 'crashmail', '--once')


def test_once_sends_a_test_mail_and_says_that_supervisord_does_not_answer(
        tmp_path: Path, inbox: CommandInbox) -> None:
    printed = look('-m', 'bob@example.com,al@example.com', '-o', 'db1', '-s', inbox.command + '; echo queued as 42',
                   folder=tmp_path, SUPERVISOR_SERVER_URL=NO_SUPERVISORD)
    assert (printed.returncode, printed.stderr) == (1, '')
    first, warning, sent = printed.stdout.splitlines()
    assert 'reports crashes of every process; mail to bob@example.com, al@example.com through' in first
    assert warning.startswith(f'warning: supervisord at {NO_SUPERVISORD} does not answer ')
    assert sent.startswith('sent mail to bob@example.com, al@example.com') and sent.endswith(': queued as 42')
    assert inbox.subjects[0].startswith('db1: crashmail test at ')
    assert 'nothing has crashed.\n' in inbox.mails[0].get_content()


@pytest.mark.parametrize(('command', 'reason'), [
    ('echo no such user >&2; exit 67', 'exit status 67: no such user'),
    ('/nonexistent/sendmail -t', 'exit status 127'),
])
def test_once_reports_a_refusal(tmp_path: Path, command: str, reason: str) -> None:
    printed = look('-m', 'bob@example.com', '-s', command, folder=tmp_path, SUPERVISOR_SERVER_URL=NO_SUPERVISORD)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert 'unable to send mail to bob@example.com' in printed.stdout
    assert reason in printed.stdout


def test_once_with_a_configuration_that_is_missing(tmp_path: Path, inbox: CommandInbox) -> None:
    printed = look('-m', 'bob@example.com', '-s', inbox.command, '--configuration=missing.conf', folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (2, '')
    assert 'option --configuration: ' in printed.stderr and 'missing.conf' in printed.stderr
    assert printed.stderr.count('\n') == 1
    assert not inbox.mails


def test_outside_of_supervisord(tmp_path: Path) -> None:
    printed = run_command_line('crashmail', '--tail=5', '-m', 'bob@example.com', folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (1, '')
    assert printed.stderr.startswith('crashmail must be started by supervisord')
    assert printed.stderr.count('\n') == 1
