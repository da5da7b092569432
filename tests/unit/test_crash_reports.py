"""crashmail as a whole, in this process: which crashes are logged, which are mailed, and what the mail says."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from inbox import CommandInbox
from support import Run, acknowledge, make_crash, make_event, run_in_process

from superlance import crashmail

STAMP = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}'
FATAL = ('PROCESS_STATE_FATAL', 'processname:web groupname:site from_state:BACKOFF')


def serve(*events: tuple[str, str], options: list[str]) -> Run:
    run = run_in_process(lambda: crashmail.main(options), b''.join(make_event(*event) for event in events))
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
