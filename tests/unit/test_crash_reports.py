"""crashmail as a whole, in this process: which crashes are logged, which are mailed, and what the mail says."""
from __future__ import annotations

import re
import socket
import threading
from pathlib import Path

import pytest
from inbox import CommandInbox
from support import NO_SUPERVISORD, Run, acknowledge, make_crash, make_event, read_until, run_in_process, serving

from superlance import crashlog, crashmail

STAMP = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}'
FATAL = ('PROCESS_STATE_FATAL', 'processname:web groupname:site from_state:BACKOFF')


def serve(*events: tuple[str, str], options: list[str], url: str = NO_SUPERVISORD) -> Run:
    run = run_in_process(lambda: crashmail.main(options), b''.join(make_event(*event) for event in events),
                         {'SUPERVISOR_SERVER_URL': url})
    assert (run.status, run.output) == (0, acknowledge(len(events))), run.log
    return run


def find_crashes(text: str) -> list[str]:
    return re.findall(r'(\S+) \(pid 123\) exited unexpectedly', text)


CRASHES = [
    ('web', 'web', 0), ('web', 'site', 0), ('db', 'site', 0), ('db', 'db', 0), ('web', 'web', 1), ('db', 'site', 1)]
UNEXPECTED = ['web', 'site:web', 'site:db', 'db']


@pytest.mark.parametrize(('options', 'expected'), [
    ([], UNEXPECTED),
    (['-a'], UNEXPECTED),
    (['-a', '-p', 'web'], UNEXPECTED),
    (['-p', 'web'], ['web', 'site:web']),
    (['-p', 'site:db'], ['site:db']),
    (['--program=site:*'], ['site:web', 'site:db']),
    (['-p', 'db:db', '-p', 'site:web'], ['site:web', 'db']),
    (['-p', 'site'], ['site:web', 'site:db']),
    (['-p', 'we'], []),
])
def test_unexpected_exits_are_logged_and_those_of_watched_processes_mailed(
        options: list[str], expected: list[str], tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    run = serve(*(make_crash(*crash) for crash in CRASHES),
                options=[*options, '-m', 'bob@example.com', '-s', inbox.command])
    assert find_crashes(run.log) == UNEXPECTED
    assert [found for mail in inbox.mails for found in find_crashes(mail.get_content())] == expected


@pytest.mark.parametrize(('options', 'event', 'subject'), [
    ([], make_crash(), 'web crashed at STAMP'),
    (['-o', 'TEXT'], make_crash(), 'TEXT: web crashed at STAMP'),
    (['--optionalheader=a: b'], make_crash('größe'), 'a: b: größe crashed at STAMP'),
    ([], FATAL, 'web is FATAL: supervisord gave up starting it at STAMP'),
    (['-o', 'TEXT'], FATAL, 'TEXT: web is FATAL: supervisord gave up starting it at STAMP'),
    (['-o', 'x\nBcc: eve@example.com'], make_crash(), 'x | Bcc: eve@example.com: web crashed at STAMP'),
    (['-o', 'x\r\n\r\nhello'], make_crash(), 'x | hello: web crashed at STAMP'),
    (['-o', 'y' * 1000], make_crash(), 'y' * 1000 + ': web crashed at STAMP'),
    ([], make_crash('web\rBcc:eve@example.com'), 'web | Bcc:eve@example.com crashed at STAMP'),
    ([], make_crash('web\x0bBcc:eve@example.com'), 'web | Bcc:eve@example.com crashed at STAMP'),
    ([], make_crash('\x1b[2J\0'), '\\x1b[2J\\x00 crashed at STAMP'),
    ([], make_crash('=?utf-8?q?hi?='), None),
], ids=lambda value: repr(value)[:40])
def test_subject_of_a_crash_is_one_line(options: list[str], event: tuple[str, str], subject: str | None,
                                        tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    run = serve(event, options=[*options, '-m', 'bob@example.com', '-s', inbox.command])
    mail, = inbox.mails
    found = str(mail['Subject'])
    assert subject is None or re.fullmatch(re.escape(subject).replace('STAMP', STAMP), found), found
    assert sorted(mail.keys()) == sorted(set(mail.keys())) and 'Bcc' not in mail
    assert mail['To'] == 'bob@example.com' and 'hello' not in mail.get_content()
    assert re.search(STAMP, found) and re.search(STAMP, mail.get_content())
    assert all(re.match(f'{STAMP} crashmail: ', line) for line in run.log.splitlines())


def test_crashes_are_only_logged_without_a_recipient() -> None:
    run = serve(make_crash(), FATAL, make_crash('expected', expected=1), options=[])
    assert run.log.count(' crashmail: web (pid 123) exited unexpectedly') == 1
    assert run.log.count(' crashmail: site:web is FATAL: supervisord gave up starting it') == 1
    assert 'expected (pid' not in run.log and 'sent' not in run.log


def test_bytes_that_are_not_utf_8_are_mailed_with_escapes(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    serve(*map(make_crash, ('\udcff\udcfe', '\udcc3', 'ok')),
          options=['-m', 'bob@example.com', '-s', inbox.command])
    assert [subject.partition(' ')[0] for subject in inbox.subjects] == ['\\udcff\\udcfe', '\\udcc3', 'ok']


def test_explicit_mail_command_is_run_without_recipients(tmp_path: Path) -> None:
    """As superlance 2.0.0: the command knows where the mail goes."""
    inbox = CommandInbox(tmp_path)
    serve(make_crash(), options=['-s', inbox.command])
    mail, = inbox.mails
    assert mail['To'] is None and str(mail['Subject']).startswith('web crashed at ')


def test_crashes_of_an_interval_are_one_mail_at_exit(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    serve(*map(make_crash, ('web', 'web', 'x', 'y')),
          options=['--interval=1h', '-o', 'db1', '-m', 'bob@example.com', '-s', inbox.command])
    first, rest = inbox.subjects
    assert first.startswith('db1: web crashed at ')
    assert re.fullmatch(r'db1: 3 crashes since \d\d:\d\d:\d\d: web, x, y', rest)


def test_first_lines_of_the_log() -> None:
    run = serve(options=['-m', 'bob@example.com', '-s', 'true', '-p', 'web', 'surplus', '-o', ''])
    lines = [line.partition(' crashmail: ')[2] for line in run.log.splitlines()]
    assert re.fullmatch(r'crashmail [\d.]+: reports crashes of web; mail to bob@example.com through the -s command',
                        lines[0])
    assert lines[1:3] == [
        "warning: ignored argument 'surplus': crashmail takes options only; a value that contains spaces needs quotes",
        'warning: ignored option -o: its value is empty']
    assert lines[3].startswith(f'warning: supervisord at {NO_SUPERVISORD} does not answer')


def test_supervisord_that_does_not_answer_is_not_asked_for_a_minute(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashlog, 'CALLS_SECONDS', 0.2)
    monkeypatch.setattr(crashlog, 'LATE_SECONDS', 0.1)
    inbox = CommandInbox(tmp_path)
    end = threading.Event()
    calls: list[str] = []

    def handle(client: socket.socket) -> None:
        request = read_until(client, b'</methodCall>')
        calls.append(request.partition(b'<methodName>supervisor.')[2].partition(b'<')[0].decode())
        # The calls at the start fail at once, so that the test does not wait for them.
        if not (calls[-1] == 'getAllConfigInfo' or calls == ['getAllConfigInfo', 'getAllProcessInfo']):
            end.wait()

    with serving(handle) as port:
        serve(*[make_crash()] * 4, options=['--tail=5', '-m', 'bob@example.com', '-s', inbox.command],
              url=f'http://127.0.0.1:{port}')
        end.set()
    first, *others = (mail.get_content() for mail in inbox.mails)
    assert len(others) == 3 and ('did not answer' in first or 'does not answer' in first)
    for body in others:
        assert 'web (pid 123) exited unexpectedly\n' in body
        assert 'Unable to read more of its logs through supervisord: supervisord is not asked for 1m' in body
