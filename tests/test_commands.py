"""Each command as a process whose events the test writes."""
from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import pytest
from inbox import CommandInbox
from support import (
    C_LOCALE,
    PYTHON,
    TIMEOUT,
    Listener,
    Supervisord,
    find_children,
    read,
    read_until,
    serving,
    wait_for,
    write_script,
)
from test_listener import BROKEN_HEADERS, count_unread

from superlance import __version__

URL = 'http://127.0.0.1:1/'     # nobody listens there
# Each with options with which it does what it is for.
ARGUMENTS = {
    'httpok': ['httpok', '-t', '0.1', URL],
    'crashmail': ['crashmail'],
    'memmon': ['memmon', '-a', '100TB'],
}
READY, RESULT = b'READY\n', b'RESULT 2\nOK'
TICK = ('TICK_5', 'when:1')
STAMP = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}'

every_command = pytest.mark.parametrize('name', ARGUMENTS)
on_linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')


def make_crash(program: str = 'web', group: str = '', expected: int = 0) -> tuple[str, str]:
    return ('PROCESS_STATE_EXITED', 'processname:%s groupname:%s from_state:RUNNING expected:%d pid:123'
            % (program, group or program, expected))


SERVED = {'httpok': TICK, 'crashmail': make_crash(), 'memmon': TICK}


def make_event(name: str, payload: str, header: str = 'ver:3.0 server:sup serial:1 pool:x poolserial:1') -> bytes:
    return ('%s eventname:%s len:%d\n%s' % (header, name, len(payload), payload)).encode('utf-8', 'surrogateescape')


class Run(NamedTuple):
    """What became of a command."""

    status: int
    output: bytes
    log: str


def run(arguments: Sequence[str], data: bytes = b'', environment: dict[str, str] | None = None,
        **popen: Any) -> Run:
    """Run a command with some input and then its end; the output is no more than a pipe holds."""
    with Listener(arguments, environment, **popen) as command:
        try:
            command.write(data)
        except BrokenPipeError:
            pass  # it has not read all of it
        status = command.close()
        assert command.process.stdout
        output = command.process.stdout.read()
    return Run(status, output, command.log)


def acknowledge(number: int) -> bytes:
    """Return what stdout is to hold after so many events."""
    return (READY + RESULT) * number + READY


# The command line.

@every_command
@pytest.mark.parametrize('flag', ['-h', '--help', '--version'])
def test_help_and_version_go_to_stdout(name: str, flag: str) -> None:
    status, output, log = run([name, flag])
    assert (status, log) == (0, '')
    if flag == '--version':
        assert output.decode() == f'{name} {__version__}\n'
    else:
        assert output.startswith(b'Usage: %s ' % name.encode()) and b'\n  -h, --help' in output


LONG = '9' * 30
USAGE_ERRORS = {
    'memmon': [
        (['--frobnicate'], '--frobnicate'),
        (['-x'], '-x'),
        ([], '-p, -g or -a'),
        (['-c', '-m', 'bob@example.com'], '-p, -g or -a'),
        (['-a'], '-a'),
        (['-a', 'banana'], "-a: 'banana'"),
        (['-a', '-5'], "-a: '-5'"),
        (['-a', ''], "-a: ''"),
        (['-a', '1.5.5GB'], "-a: '1.5.5GB'"),
        (['-a', LONG], LONG),
        (['-a', '1\n2'], "-a: '1\\n2'"),
        (['-a', '\u0663MB'], '-a'),
        (['-p', 'web'], "-p: 'web'"),
        (['-p', '=1MB'], "-p: '=1MB'"),
        (['-p', 'web=lots'], "-p: 'lots'"),
        (['-p', 'a:b:c=1'], "-p: 'a:b:c'"),
        (['-g', 'all'], "-g: 'all'"),
        (['--groupname', 'all=x'], "--groupname: 'x'"),
        (['-a', '1MB', 'extra'], "'extra'"),
        (['-a', '1MB', '--samples=0'], "--samples: '0'"),
        (['-a', '1MB', '--samples', LONG], LONG),
        (['-a', '1MB', '--max-restarts=3'], "--max-restarts: '3'"),
        (['-a', '1MB', '--max-restarts=0/1h'], "--max-restarts: '0'"),
        (['-a', '1MB', '--max-restarts=3/x'], "--max-restarts: 'x'"),
        (['-a', '1MB', '-u', 'soon'], "-u: 'soon'"),
        (['-a', '1MB', '-m', ''], '-m'),
        (['-a', '1MB', '-s', ''], '-s'),
        (['-a', '1MB', '--smtp=http://host'], "--smtp: 'http://host'"),
        (['-a', '1MB', '--verbose=1'], '--verbose'),
    ],
    'httpok': [
        (['--frobnicate', URL], '--frobnicate'),
        ([], 'no URL'),
        ([URL, 'http://other/'], '2 URLs'),
        (['ftp://localhost/'], "'ftp://localhost/'"),
        (['localhost:8080'], "'localhost:8080'"),
        (['http://'], "'http://'"),
        (['http:///path'], 'host'),
        (['http://localhost:99999/'], '65535'),
        (['http://localhost:0/'], '65535'),
        (['http://localhost:x/'], '65535'),
        (['http://localhost/\x01'], '\\x01'),
        (['http://localhost/\r\nX: y'], '\\r\\nX: y'),
        (['http://local host/'], 'space'),
        (['http://[::1/'], "'http://[::1/'"),
        (['http://bob:secret@localhost:0/'], 'bob:***@localhost'),
        (['-c', 'x', URL], "-c: 'x'"),
        (['-c', '99', URL], "-c: '99'"),
        (['-c', LONG, URL], LONG),
        (['-t', '0', URL], "-t: '0'"),
        (['-t', 'x', URL], "-t: 'x'"),
        (['-E', URL], '-E'),
        (['-b', '', URL], '-b'),
        (['-p', '', URL], "-p: ''"),
        (['-g', '"', URL], '-g'),
        (['-g', '', URL], '-g'),
        (['--failures=0', URL], "--failures: '0'"),
        (['--grace=x', URL], "--grace: 'x'"),
        (['--header=x', URL], "--header: 'x'"),
        (['--header=X: a\r\nY: b', URL], '--header'),
        (['--cafile=/nonexistent', 'https://localhost/'], "--cafile: '/nonexistent'"),
    ],
    'crashmail': [
        (['--frobnicate'], '--frobnicate'),
        (['extra'], "'extra'"),
        (['-p'], '-p'),
        (['-p', 'a:b:c'], "-p: 'a:b:c'"),
        (['-o', ''], '-o'),
        (['--tail=0'], "--tail: '0'"),
        (['--tail=some'], "--tail: 'some'"),
        (['--interval=0'], "--interval: '0'"),
        (['--interval=x'], "--interval: 'x'"),
        (['--from=a@example.com,b@example.com'], '--from'),
        (['--once'], '-m'),
        (['--once', '-m', 'bob@example.com', '--configuration=/nonexistent'], '/nonexistent'),
    ],
}


@pytest.mark.parametrize('name, arguments, expected', [
    (name, arguments, expected) for name, table in USAGE_ERRORS.items() for arguments, expected in table])
def test_a_bad_command_line_is_told_in_one_line(name: str, arguments: list[str], expected: str) -> None:
    status, output, log = run([name, *arguments])
    assert (status, output) == (2, b''), log
    assert log.startswith(name + ': ') and log.endswith(f"; try '{name} --help'\n") and log.count('\n') == 1
    assert expected in log and 'secret' not in log


@pytest.mark.parametrize('name, more', [
    *((name, more) for name in ARGUMENTS for more in ([], ['-m', 'bob@example.com'])), ('crashmail', ['--tail=5'])])
def test_a_listener_is_for_supervisord_only(name: str, more: list[str]) -> None:
    done = subprocess.run([PYTHON, '-m', 'superlance.' + name, *ARGUMENTS[name][1:], *more], stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=TIMEOUT, check=False,
                          env={key: value for key, value in os.environ.items() if 'SUPERVISOR' not in key})
    log = done.stderr.decode()
    assert (done.returncode, done.stdout) == (1, b'')
    assert log.startswith(f'{name} must be run as a supervisor event listener') and log.count('\n') == 1
    assert f"'{name} --once'" in log and 'README' in log


# The protocol.

@every_command
def test_stdout_holds_the_protocol_and_nothing_else(name: str) -> None:
    status, output, log = run(ARGUMENTS[name], make_event(*SERVED[name]) * 3)
    assert (status, output) == (0, acknowledge(3)), log
    assert log.count('\n') == {'httpok': 3, 'crashmail': 3, 'memmon': 0}[name]
    assert all(re.match(f'{STAMP} {name}: ', line) for line in log.splitlines())


OTHER_EVENTS = [
    ('SUPERVISOR_STATE_CHANGE_RUNNING', ''),
    ('PROCESS_STATE_STARTING', 'processname:web groupname:web from_state:STOPPED tries:0'),
    ('PROCESS_STATE_STOPPED', 'processname:web groupname:web from_state:STOPPING pid:1'),
    ('PROCESS_STATE_UNKNOWN', 'processname:web groupname:web from_state:RUNNING'),
    ('PROCESS_LOG_STDOUT', 'processname:web groupname:web pid:1 channel:stdout\nREADY\n'
                           'ver:3.0 eventname:TICK_5 len:99\nRESULT 2\nOK größe\r\n\n'),
    ('PROCESS_COMMUNICATION_STDERR', 'processname:web groupname:web pid:1\nexpected:0'),
    ('REMOTE_COMMUNICATION', 'type:PROCESS_STATE_EXITED\nprocessname:web groupname:web expected:0 pid:1\n'),
    ('PROCESS_GROUP_ADDED', 'groupname:web\n'),
    ('TICKLE', ''),
    ('', 'nameless'),
    ('EVENT_OF_THE_FUTURE', '{"with": "json"}'),
]


@every_command
def test_an_event_that_is_not_served_is_acknowledged(name: str) -> None:
    other = OTHER_EVENTS + [SERVED['memmon' if name == 'crashmail' else 'crashmail']]
    if name != 'crashmail':
        other.remove(('TICKLE', ''))
    data = b''.join(make_event(*event) + make_event(*SERVED[name]) for event in other)
    status, output, log = run(ARGUMENTS[name], data)
    assert (status, output) == (0, acknowledge(2 * len(other))), log
    # Those between them are served.
    assert log.count('\n') == (0 if name == 'memmon' else len(other)), log


@every_command
@pytest.mark.parametrize('payload', ['', '\n', ' ', ':', ':::', 'garbage', 'when:', 'when:x', 'when:-1', 'when:\u0663',
                                     'when:' + '9' * 400, 'processname', 'processname:web', 'processname:web expected:',
                                     'expected:0', 'processname: expected:2', '\0\x1b[2J', '\udcff\udcfe'])
def test_a_bad_payload_is_acknowledged(name: str, payload: str) -> None:
    data = make_event(SERVED[name][0], payload) + make_event(*SERVED[name])
    status, output, log = run(ARGUMENTS[name], data)
    assert (status, output) == (0, acknowledge(2)), log
    assert 'Traceback' not in log
    if name == 'crashmail':
        told, crash = log.splitlines()
        assert 'unable to read a PROCESS_STATE_EXITED event: ' in told and 'program web' in crash


@every_command
def test_a_header_may_hold_what_is_not_known_yet(name: str) -> None:
    header = 'ver:9 server:a:b:c serial:1 pool:x:y flag new: http://example.com:80/ poolserial:10 größe:ß'
    status, output, log = run(ARGUMENTS[name], make_event(*SERVED[name], header=header) * 2)
    assert (status, output) == (0, acknowledge(2)), log


@every_command
def test_events_may_come_in_pieces(name: str) -> None:
    event = make_event(SERVED[name][0], 'processname:größe groupname:größe expected:0 pid:1 when:1')
    with Listener(ARGUMENTS[name]) as command:
        command.expect(READY)
        for byte in event:
            command.write(bytes([byte]))
        command.expect(RESULT + READY)
        # Each piece is waited for; that in the middle of a letter as well.
        inside = event.index('ö'.encode()) + 1
        places = [0, 1, 4, event.index(b'\n'), event.index(b'\n') + 1, inside, inside + 1, len(event) - 1, len(event)]
        for start, end in zip(places, places[1:]):
            wait_for(lambda: count_unread(command.process.stdin) == 0)
            command.write(event[start:end])
        command.expect(RESULT + READY)
        assert command.close() == 0
    assert command.log.count('program größe of') == (2 if name == 'crashmail' else 0)


@every_command
@pytest.mark.parametrize('part', [b'', b'v', b'ver:3.0 len:5', b'ver:3.0 eventname:TICK_5 len:5\n',
                                  b'ver:3.0 eventname:TICK_5 len:5\nwhen', b'ver:3.0 len:3\nx\xc3',
                                  b'eventname:PROCESS_STATE_EXITED len:999999999\nprocessname:web expected:0'])
def test_the_end_of_input_is_the_end(name: str, part: bytes) -> None:
    status, output, log = run(ARGUMENTS[name], make_event(*OTHER_EVENTS[0]) + part)
    assert (status, output, log) == (0, acknowledge(1), '')


@every_command
@pytest.mark.parametrize('header', BROKEN_HEADERS, ids=lambda data: repr(data[:20]))
def test_a_broken_header_ends_the_listener_with_one_line(name: str, header: bytes) -> None:
    status, output, log = run(ARGUMENTS[name], make_event(*OTHER_EVENTS[0]) + header)
    assert (status, output) == (1, acknowledge(1))
    assert re.match(f"{STAMP} {name}: not an event's header, .*\n$", log), log


@every_command
def test_whatever_comes_the_end_is_orderly(name: str) -> None:
    chance = random.Random(name)
    whole = b''.join(make_event(*event) for event in OTHER_EVENTS[:5] + [SERVED[name]] + OTHER_EVENTS[5:])
    statuses = set()
    for _ in range(20):
        data = bytearray(whole[:chance.choice([len(whole), chance.randrange(len(whole) + 1)])])
        for _ in range(chance.randrange(6)):
            place = chance.randrange(len(data) + 1)
            data[place:place + chance.randrange(3)] = bytes(chance.choices(range(256), k=chance.randrange(4)))
        status, output, log = run(ARGUMENTS[name], bytes(data))
        assert acknowledge(len(OTHER_EVENTS) + 9).startswith(output) and output.endswith(READY), (data, output)
        assert 'Traceback' not in log, (data, log)
        assert status in (0, 1) and ("not an event's header" in log) == (status == 1), (data, log)
        statuses.add(status)
    assert statuses == {0, 1}


# Locales and bytes.

@pytest.fixture(scope='module')
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a Latin-1 locale."""
    known = subprocess.run(['locale', '-a'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    for line in known.decode('ascii', 'replace').splitlines():
        if re.search(r'iso-?8859-?1$', line, re.I):
            return {'LC_ALL': line}
    folder = tmp_path_factory.mktemp('locales')
    if shutil.which('localedef'):
        subprocess.run(['localedef', '-f', 'ISO-8859-1', '-i', 'en_US', str(folder / 'en_US.ISO-8859-1')],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if not list(folder.iterdir()):
        pytest.skip('there is no Latin-1 locale')
    return {'LC_ALL': 'en_US.ISO-8859-1', 'LOCPATH': str(folder)}


@pytest.fixture(params=['ascii', 'C', 'POSIX', 'utf-8', 'latin-1'])
def locale(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == 'latin-1':
        found: dict[str, str] = request.getfixturevalue('latin_1')
        return found
    return C_LOCALE if request.param == 'ascii' else {
        'LC_ALL': {'utf-8': 'C.UTF-8'}.get(request.param, request.param)}


def test_names_are_utf_8_in_any_locale(locale: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / 'größe'
    folder.mkdir()
    inbox = CommandInbox(folder)
    with Listener(['crashmail', '-p', 'größe', '-p', 'x:日本', '-o', 'Größe', '-m', 'bob@example.com', '-s',
                   inbox.command], dict(locale, TMPDIR=str(tmp_path))) as command:
        for event in (make_crash('größe'), make_crash('日本', 'x'), make_crash('other'), make_crash('größe')):
            command.serve_event(*event)
        inbox.wait(3)
        command.expect(READY)
        assert command.close() == 0
    assert [subject.partition(' at ')[0] for subject in inbox.subjects] == [
        'Größe: größe crashed', 'Größe: 日本 crashed', 'Größe: größe crashed']
    assert 'program größe of group größe' in command.log and 'program 日本 of group x' in command.log
    assert 'program größe of group größe' in inbox.mails[0].get_content()
    assert 'Größe: größe' in command.log.partition('sent mail ')[2]


def test_bytes_that_are_no_utf_8_end_nothing(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', inbox.command]) as command:
        for program in ('\udcff\udcfe', '\udcc3', 'ok'):
            command.expect(READY)
            command.write(make_event(*make_crash(program)))
            command.expect(RESULT)
        inbox.wait(3)
    assert [subject.partition(' ')[0] for subject in inbox.subjects] == ['\\udcff\\udcfe', '\\udcc3', 'ok']


def test_a_payload_may_end_its_lines_as_windows_does(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', inbox.command]) as command:
        name, payload = make_crash()
        command.serve_event(name, payload + '\r\nexpected:1\r\n')
        command.serve_event(*make_crash('next'))
        assert [mail['Subject'].split()[0] for mail in inbox.wait(2)] == ['web', 'next']
    assert '(pid 123) was RUNNING and exited unexpectedly\n' in command.log


# What others print.

NOISE = "echo READY; echo RESULT 4; printf FAIL; echo RESULT 4 >&2; "


@pytest.fixture(scope='module')
def supervisord(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisord]:
    with Supervisord(tmp_path_factory.mktemp('s'), '[program:web]\ncommand=/bin/sleep 1000\nstartsecs=0\n') as daemon:
        daemon.wait_for_state('web')
        yield daemon


@pytest.mark.parametrize('arguments', [
    ['httpok', '-t', '0.1', URL],
    ['httpok', '-t', '0.1', '-p', 'web', '-d', 'cores', '-g', './gcore -o', URL],
    ['crashmail'],
    ['memmon', '-a', '1', '--dry-run'],
], ids=' '.join)
def test_commands_can_not_speak_to_supervisord(arguments: list[str], supervisord: Supervisord, tmp_path: Path) -> None:
    supervisord.wait_for_state('web')
    noisy = NOISE + 'readlink /proc/self/fd/0 >> stdin; cat >/dev/null; touch mailed'
    write_script(tmp_path / 'gcore', NOISE + 'readlink /proc/self/fd/0 >> stdin; cat; touch dumped\n')
    with Listener([arguments[0], '-m', 'bob@example.com', '-s', noisy] + arguments[1:], supervisord.environment,
                  tmp_path) as command:
        protocol = os.readlink('/proc/%d/fd/0' % command.pid)
        command.expect(READY)
        command.write(make_event(*SERVED[arguments[0]]) + make_event(*OTHER_EVENTS[0]))
        command.expect((RESULT + READY) * 2)
        command.wait_for_log('sent mail')
        assert command.close() == 0
        assert command.process.stdout and command.process.stdout.read() == b''
    assert (tmp_path / 'mailed').exists() and (tmp_path / 'dumped').exists() == ('-g' in arguments)
    assert read(tmp_path / 'stdin') and protocol not in read(tmp_path / 'stdin')
    assert 'READY | RESULT 4 | FAILRESULT 4' in command.log


@every_command
def test_a_stray_print_can_not_speak_to_supervisord(name: str, tmp_path: Path) -> None:
    """Every line of the log calls time.localtime; here that prints, as a library may."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import os, time\nreal = time.localtime\ndef localtime(*arguments):\n'
        "    print('RESULT 4', flush=True)\n    os.system('echo READY')\n    return real(*arguments)\n"
        'time.localtime = localtime\n', 'utf-8')
    status, output, log = run(ARGUMENTS[name], make_event(*SERVED[name]) * 2, {
        'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep),
        'PATH': str(tmp_path)})     # memmon complains of the lack of a ps
    assert (status, output) == (0, acknowledge(2))
    assert 'RESULT 4\nREADY\n' in log and f'{name}: ' in log


# crashmail.

CRASHES = [
    # a process, its group, whether that was expected
    ('web', 'web', 0), ('web', 'site', 0), ('db', 'site', 0), ('db', 'db', 0), ('web', 'web', 1), ('db', 'site', 1)]


UNEXPECTED = ['web:web', 'site:web', 'site:db', 'db:db']


@pytest.mark.parametrize('options, expected', [
    ([], UNEXPECTED),
    (['-a'], UNEXPECTED),
    (['-a', '-p', 'web'], UNEXPECTED),
    (['-p', 'web'], ['web:web', 'site:web']),
    (['-p', 'site:db'], ['site:db']),
    (['--program=site:*'], ['site:web', 'site:db']),
    (['-p', 'db:db', '-p', 'site:web'], ['site:web', 'db:db']),
    (['-p', 'site'], []),
    (['-p', 'we'], []),
])
def test_crashes_are_logged_and_those_of_watched_processes_mailed(
        options: list[str], expected: list[str], tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    with Listener(['crashmail', *options, '-m', 'bob@example.com', '-s', inbox.command]) as command:
        for crash in CRASHES:
            command.serve_event(*make_crash(*crash))
        inbox.wait(len(expected))
        assert command.close() == 0
    logged = [f'{group}:{program}' for program, group in re.findall(
        r'crashmail: program (\S+) of group (\S+) \(pid 123\)', command.log)]
    told = [re.findall(r'program (\S+) of group (\S+) \(pid 123\)', mail.get_content())[0] for mail in inbox.mails]
    assert logged == UNEXPECTED
    assert [f'{group}:{program}' for program, group in told] == expected


FATAL = ('PROCESS_STATE_FATAL', 'processname:web groupname:site from_state:BACKOFF')


@pytest.mark.parametrize('options, event, subject', [
    ([], make_crash(), 'web crashed at STAMP'),
    (['-o', 'TEXT'], make_crash(), 'TEXT: web crashed at STAMP'),
    (['--optionalheader=a: b'], make_crash('größe'), 'a: b: größe crashed at STAMP'),
    ([], FATAL, 'web is FATAL, supervisord has given up starting it, at STAMP'),
    (['-o', 'TEXT'], FATAL, 'TEXT: web is FATAL, supervisord has given up starting it, at STAMP'),
    (['-o', 'x\nBcc: eve@example.com'], make_crash(), 'x | Bcc: eve@example.com: web crashed at STAMP'),
    (['-o', 'x\r\n\r\nhello'], make_crash(), 'x | hello: web crashed at STAMP'),
    (['-o', 'y' * 1000], make_crash(), 'y' * 1000 + ': web crashed at STAMP'),
    ([], make_crash('web\rBcc:eve@example.com'), 'web | Bcc:eve@example.com crashed at STAMP'),
    ([], make_crash('web\x0bBcc:eve@example.com'), 'web | Bcc:eve@example.com crashed at STAMP'),
    ([], make_crash('\x1b[2J\0'), '\\x1b[2J\\x00 crashed at STAMP'),
    ([], make_crash('=?utf-8?q?hi?='), None),
], ids=lambda value: repr(value)[:40])
def test_the_subject_of_a_crash(options: list[str], event: tuple[str, str], subject: str | None,
                                tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    with Listener(['crashmail', *options, '-m', 'bob@example.com', '-s', inbox.command]) as command:
        command.serve_event(*event)
        mail, = inbox.wait()
        assert command.close() == 0
    found = str(mail['Subject'])
    assert subject is None or re.fullmatch(re.escape(subject).replace('STAMP', STAMP), found), found
    assert sorted(mail.keys()) == sorted(set(mail.keys())) and 'Bcc' not in mail
    assert mail['To'] == 'bob@example.com' and 'hello' not in mail.get_content()
    assert command.log.count('\n') == 2
    assert re.search(STAMP, found) and re.search(STAMP, mail.get_content())


def test_without_a_recipient_a_crash_is_logged_and_nobody_gets_mail(tmp_path: Path) -> None:
    with Listener(['crashmail', '-s', 'cat > mailed'], folder=tmp_path) as command:
        command.crash()
        command.serve_event(*FATAL)
        command.crash('expected', expected=1)
        assert command.close() == 0
    crash, fatal = command.log.splitlines()
    assert crash.endswith(
        ' crashmail: program web of group web (pid 123) was RUNNING and exited unexpectedly')
    assert fatal.endswith(' crashmail: supervisord has given up starting program web of group site, '
                          'which was BACKOFF and is FATAL now')
    assert not list(tmp_path.iterdir())


def test_a_slow_mail_command_holds_up_no_event_and_loses_none(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    slow = 'while ! [ -e go ]; do sleep 0.05; done; '
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', slow + inbox.command], folder=tmp_path) as command:
        for number in range(200):
            command.crash('web%d' % number)
        assert not inbox.mails, 'a mail has gone, so the rest may have waited for it'
        (tmp_path / 'go').touch()
        inbox.wait(200)
        command.wait_for_log('sent mail "web199 ')
        command.expect(READY)
        assert command.close() == 0
    names = ['web%d' % number for number in range(200)]
    assert [subject.split()[0] for subject in inbox.subjects] == names
    assert re.findall(r'crashmail: program (\S+) of', command.log) == names


# The end.

@on_linux
@pytest.mark.parametrize('signum', [None, signal.SIGTERM, signal.SIGINT])
def test_waiting_mail_is_sent_at_the_end(signum: int | None, tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    slow = 'touch begun; while ! [ -e go ]; do sleep 0.05; done; '
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', slow + inbox.command], folder=tmp_path) as command:
        for program in 'abc':
            command.crash(program)
        command.expect(READY)
        wait_for((tmp_path / 'begun').exists)
        if signum:
            # More of them during the end do no harm.
            for again in (signum, signal.SIGTERM, signal.SIGINT, signum):
                command.process.send_signal(again)
                wait_for(lambda: not pending_signals(command.pid))
        else:
            assert command.process.stdin
            command.process.stdin.close()
        (tmp_path / 'go').touch()
        assert command.process.wait(TIMEOUT) == 0
    assert [subject.split()[0] for subject in inbox.subjects] == ['a', 'b', 'c']
    assert 'dropped' not in command.log and 'Traceback' not in command.log


def pending_signals(pid: int) -> int:
    fields = dict(line.split(':\t') for line in read(Path('/proc/%d/status' % pid)).splitlines() if ':\t' in line)
    return int(fields['SigPnd'], 16) | int(fields['ShdPnd'], 16)


@every_command
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('served', [0, 1])
def test_a_signal_ends_an_idle_listener(name: str, signum: int, served: int) -> None:
    with Listener(ARGUMENTS[name]) as command:
        for _ in range(served):
            command.serve_event(*SERVED[name])
        command.expect(READY)
        assert command.terminate(signum) == 0
        assert command.process.stdout and command.process.stdout.read() == b''
    assert 'Traceback' not in command.log and command.log.count('\n') <= 1


@every_command
@pytest.mark.parametrize('signum', [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_is_not_meant_to_end_it_is_no_expected_exit(name: str, signum: int) -> None:
    """It would kill a listener in the middle of a restart; and supervisord shall start it anew."""
    with Listener(ARGUMENTS[name]) as command:
        command.expect(READY)
        assert command.terminate(signum) == 128 + signum


# Streams that are closed.

def get_streams(pid: int) -> list[str]:
    try:
        return [os.readlink('/proc/%d/fd/%d' % (pid, fd)) for fd in (0, 1, 2)]
    except OSError:
        return []


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@on_linux
@pytest.mark.parametrize('closed', [(1,), (2,), (1, 2)], ids=str)
@every_command
def test_a_stream_closed_at_the_start_is_nothing(name: str, closed: tuple[int, ...], tmp_path: Path) -> None:
    mail = [] if name == 'memmon' else ['-m', 'bob@example.com', '-s', 'cat > mail.new; mv mail.new mail']
    with Listener([name, *mail, *ARGUMENTS[name][1:]], folder=tmp_path,
                  preexec_fn=lambda: close_all(closed)) as command:
        # Where the results go nowhere, the streams tell that it listens.
        wait_for(lambda: get_streams(command.pid)[:1] == ['/dev/null'])
        log = '/dev/null' if 2 in closed else get_streams(command.pid)[2]
        wait_for(lambda: get_streams(command.pid) == ['/dev/null', log, log])
        command.write(make_event(*SERVED[name]) * 2)
        wait_for(lambda: count_unread(command.process.stdin) == 0)
        if mail:
            wait_for((tmp_path / 'mail').exists)
        assert get_streams(command.pid) == ['/dev/null', log, log]
        assert command.close() == 0
        assert command.process.stdout and command.process.stdout.read() == (b'' if 1 in closed else acknowledge(2))
    assert 'Traceback' not in command.log and (not command.log) == (2 in closed or name == 'memmon')
    assert {file.name for file in tmp_path.iterdir()} <= {'mail', 'mail.new'}


@pytest.mark.parametrize('closed', [(0,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
@every_command
def test_without_stdin_there_is_nothing_to_do(name: str, closed: tuple[int, ...]) -> None:
    with Listener(ARGUMENTS[name], preexec_fn=lambda: close_all(closed)) as command:
        assert command.process.wait(TIMEOUT) == 0
        assert command.process.stdout and command.process.stdout.read() == (b'' if 1 in closed else READY)
    assert command.log == ''


@every_command
def test_a_log_that_nobody_reads_any_more_ends_nothing(name: str) -> None:
    reading, writing = os.pipe()
    with Listener(ARGUMENTS[name], stderr=writing) as command:
        os.close(writing)
        command.serve_event(*SERVED[name])
        os.close(reading)
        for _ in range(3):
            command.serve_event(*SERVED[name])
        command.expect(READY)
        assert command.close() == 0


# memmon's ps.

BUSYBOX = "echo \"ps: unrecognized option: p\" >&2; echo 'BusyBox v1.36.1 () multi-call binary.' >&2; exit 1"


@on_linux
@pytest.mark.parametrize('ps, reason', [
    (None, 'ps -A -o pid= -o ppid= -o rss=: No such file or directory'),
    (BUSYBOX, 'rss=: exit status 1: ps: unrecognized option: p | BusyBox v1.36.1 () multi-call binary.'),
    ('exit 3', 'rss=: exit status 3'),
    ('kill -9 $$', 'rss=: killed by signal 9'),
    ('echo PID PPID RSS; echo 1 0 100', "ps printed 'PID PPID RSS' where pid, parent pid and RSS were asked for"),
    ('echo 1 0', "ps printed '1 0' where"),
    ('echo 1 0 -5', "ps printed '1 0 -5' where"),
    ('echo 1 0 1.5', "ps printed '1 0 1.5' where"),
    ("printf '\\377\\n'", 'ps printed'),
    (':', 'ps printed no process'),
    ('echo; echo', 'ps printed no process'),
    ("echo starting; exec /bin/sleep 99", 'rss=: did not end in time: starting'),    # PS_TIMEOUT_SECONDS, 10 s
], ids=lambda value: repr(value)[:30])
def test_where_ps_is_of_no_use_proc_serves(ps: str | None, reason: str, supervisord: Supervisord,
                                           tmp_path: Path) -> None:
    if ps:
        write_script(tmp_path / 'ps', ps + '\n')
    pid = supervisord.wait_for_state('web')['pid']
    with Listener(['memmon', '-v', '-a', '1', '--dry-run'], dict(supervisord.environment, PATH=str(tmp_path))
                  ) as command:
        for _ in range(3):
            command.tick()
        command.expect(READY)
        assert command.close() == 0
    told = '; memory is read from /proc from now on\n'
    assert reason in command.log.splitlines()[0] and command.log.partition('\n')[0].endswith(told.strip())
    assert command.log.count(told) == 1
    # The three numbers are there: it is over the limit of a byte.
    assert len(re.findall(r'memmon: web \(pid %d\): [\d.]+[KM]B, over its limit of 1B' % pid, command.log)) == 3
    assert command.log.count('would have restarted web (pid %d: ' % pid) == 1


def test_ps_is_asked_once_a_tick_as_it_should_be(tmp_path: Path) -> None:
    write_script(tmp_path / 'ps', 'exec 3>>"$CALLS"\n{ echo "$LC_ALL $*"; /bin/cat; /bin/readlink /proc/self/fd/0; '
                                  '/bin/readlink /proc/self/fd/1 /proc/self/fd/2; } >&3\necho 1 0 100\n')
    calls = tmp_path / 'calls'
    with Listener(ARGUMENTS['memmon'], {'PATH': str(tmp_path), 'LC_ALL': 'C.UTF-8', 'CALLS': str(calls)}) as command:
        streams = get_streams(command.pid)
        for number in range(3):
            command.serve_event(*OTHER_EVENTS[0])
            command.tick()
            assert read(calls).count('C -A -o pid= -o ppid= -o rss=\n') == number + 1
        command.expect(READY)
        assert command.close() == 0
    assert read(calls).count('-A') == 3 and command.log == ''
    assert streams[0] not in read(calls).split() and streams[1] not in read(calls).split()


@pytest.mark.parametrize('limit, asked', [('100TB', False), ('1', True)])
def test_supervisord_is_asked_only_where_something_is_over_the_limit(limit: str, asked: bool, tmp_path: Path) -> None:
    calls = []

    def count(client: socket.socket) -> None:
        calls.append(client.recv(65536))

    with serving(count, socket.AF_UNIX, str(tmp_path / 's')), Listener(
            ['memmon', '-a', limit], {'SUPERVISOR_SERVER_URL': f'unix://{tmp_path}/s'}) as command:
        for _ in range(3):
            command.tick()
        command.expect(READY)
        assert command.close() == 0
    assert bool(calls) == asked and ('unable to check memory' in command.log) == asked


# A long life.

class Holdings(NamedTuple):
    """What a process holds of the machine."""

    descriptors: int
    threads: int
    children: int
    rss_kb: int


def measure(pid: int) -> Holdings:
    status = read(Path('/proc/%d/status' % pid))
    threads, rss = (int(re.findall(rf'^{key}:\s+(\d+)', status, re.M)[0]) for key in ('Threads', 'VmRSS'))
    return Holdings(len(os.listdir('/proc/%d/fd' % pid)), threads, len(find_children(pid)), rss)


def answer(client: socket.socket) -> None:
    read_until(client, b'\r\n\r\n')
    client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok')


@on_linux
@pytest.mark.parametrize('arguments, events, warm_up', [
    (['memmon', '-a', '100TB'], 1000, 50),
    (['memmon', '-c', '-p', 'web=100TB'], 200, 50),
    (['crashmail'], 1000, 50),
    (['crashmail', '-m', 'bob@example.com', '-s', ':'], 1000, 200),
    (['httpok', URL], 400, 100),
    (['httpok', '-b', 'ok', 'http://localhost:1/'], 400, 100),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else str(value))
def test_a_long_life_costs_no_more_than_a_short_one(arguments: list[str], events: int, warm_up: int,
                                                    tmp_path: Path) -> None:
    write_script(tmp_path / 'ps', 'echo 1 0 100\n')
    mails = '-m' in arguments
    with serving(answer) as port, Listener(
            [argument.replace(':1/', ':%d/' % port) for argument in arguments],
            {'PATH': str(tmp_path) + os.pathsep + os.environ['PATH']}) as command:
        served = 0

        def serve(number: int) -> Holdings:
            nonlocal served
            for _ in range(number):
                command.serve_event(*SERVED[arguments[0]])
                served += 1
                if mails and served % 20 == 0:
                    wait_for(lambda: command.log.count('sent mail') == served)
            wait_for(lambda: not find_children(command.pid))
            return measure(command.pid)

        before = serve(warm_up)
        after = serve(events)
        assert after[:3] == before[:3], (before, after)
        assert after.rss_kb <= before.rss_kb + 1024, (before, after)
        command.expect(READY)
        assert command.close() == 0
    assert command.log.count('\n') == (served * (1 + mails) if arguments[0] == 'crashmail' else 0), command.log
