"""crashmail as a process; the test plays supervisord."""
from __future__ import annotations

import re
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import pytest
from inbox import CommandInbox
from support import NO_SUPERVISORD, PYTHON, Listener, read_until, serving, wait_for

EXITED, FATAL = 'PROCESS_STATE_EXITED', 'PROCESS_STATE_FATAL'

Start = Callable[..., Listener]


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


@pytest.fixture
def start(inbox: CommandInbox, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a crashmail whose mail goes to the inbox."""
    started: list[Listener] = []

    def start(*arguments: str, url: str = NO_SUPERVISORD) -> Listener:
        started.append(Listener(['crashmail', '-m', 'bob@example.com', '-s', inbox.command, *arguments],
                                {'SUPERVISOR_SERVER_URL': url}, tmp_path))
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


def test_interval_ends_and_shutdown_is_retried_although_there_is_no_further_event(
        start: Start, inbox: CommandInbox) -> None:
    methods: list[str] = []

    def handle(client: socket.socket) -> None:
        method = read_method(client)
        methods.append(method)
        if method == 'shutdown' and methods.count('shutdown') > 1:
            body = (b'<?xml version="1.0"?><methodResponse><params><param><value><boolean>1</boolean></value></param>'
                    b'</params></methodResponse>')
            client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b' % (len(body), body))
    with serving(handle) as port:
        listener = start('--interval=0.3s', '--shutdown', url=f'http://127.0.0.1:{port}')
        for pid in range(1, 4):
            listener.crash(pid=pid)
        log = listener.wait_for_log('asked supervisord to shut down')
    assert log.index('web (pid 1) exited') < log.index('unable to shut down supervisord, will retry: ')
    wait_for(lambda: sorted(re.findall(r'\(pid (\d)\)', ''.join(mail.get_content() for mail in inbox.mails)))
             == list('123'), 'all crashes')
    assert 'pid 1' in inbox.mails[0].get_content()


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
