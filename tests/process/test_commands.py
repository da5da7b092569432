"""What needs a process: its streams, its signals, its locale, and what it costs over a long life.

Most of it is code that the three commands share, and is shown with the one that starts fastest or does most of it.
"""
from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import pytest
from inbox import CommandInbox
from support import (
    C_LOCALE,
    PYTHON,
    READY,
    RESULT,
    TIMEOUT,
    Listener,
    find_children,
    make_crash,
    make_event,
    read,
    read_until,
    serving,
    wait_for,
    write_script,
)

# It asks no supervisord at its start; each tick is a line in its log.
IDLE = ['httpok', '-t', '0.1', 'http://127.0.0.1:1/']
TICK = ('TICK_5', 'when:1')

on_linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')


# The protocol.

def count_unread(pipe: Any) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_event_may_arrive_in_pieces() -> None:
    event = make_event('PROCESS_GROUP_ADDED', 'groupname:größe\n')
    inside = event.index('ö'.encode()) + 1
    places = [0, 1, 4, event.index(b'\n'), event.index(b'\n') + 1, inside, inside + 1, len(event) - 1, len(event)]
    with Listener(IDLE) as command:
        command.expect(READY)
        for start, end in zip(places, places[1:]):
            wait_for(lambda: count_unread(command.process.stdin) == 0)
            command.write(event[start:end])
        command.expect(RESULT + READY)
        assert command.close() == 0


# Streams that are closed.

@pytest.mark.parametrize('closed', [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_descriptors_0_to_2_are_not_used_for_the_protocol(closed: Sequence[int], tmp_path: Path) -> None:
    script = '\n'.join((
        'import os',
        'from superlance.listener import ExitRequest, take_streams',
        f'for fd in {closed!r}: os.close(fd)',
        'events, results = take_streams(ExitRequest())',
        "report = open('report', 'w')",
        'null = os.stat(os.devnull).st_rdev',
        'facts = [events.readline(), os.read(0, 9), min(results, report.fileno()) > 2]',
        'facts += [os.fstat(fd).st_rdev == null for fd in (0, 1, 2)]',
        'facts += [os.get_inheritable(results)]',
        'report.write(repr(facts))',
        "os.write(results, b'result')",
        "print('stray', flush=True)",
        "os.system('cat; echo child')"))
    done = subprocess.run([PYTHON, '-c', script], input=b'event\n', cwd=tmp_path, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    no_log = 2 in closed
    assert read(tmp_path / 'report') == repr([
        '' if 0 in closed else 'event\n', b'', True, True, no_log, no_log, False])
    assert done.stdout == (b'' if 1 in closed else b'result')
    assert done.stderr == (b'' if no_log else b'stray\nchild\n')


def get_streams(pid: int) -> list[str]:
    try:
        return [os.readlink(f'/proc/{pid}/fd/{fd}') for fd in (0, 1, 2)]
    except OSError:
        return []


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.mark.usefixtures('measured')
@on_linux
def test_listener_works_with_a_stream_closed_at_its_start(tmp_path: Path) -> None:
    """Both: its results and its log go nowhere, and neither goes into a file that it opens."""
    null = ['/dev/null'] * 3
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', 'cat > mail.new; mv mail.new mail'], folder=tmp_path,
                  preexec_fn=lambda: close_all((1, 2))) as command:
        wait_for(lambda: get_streams(command.pid) == null)
        command.write(make_event(*make_crash()) * 2)
        wait_for(lambda: count_unread(command.process.stdin) == 0)
        wait_for((tmp_path / 'mail').exists)
        assert get_streams(command.pid) == null
        assert command.close() == 0
        assert command.process.stdout and command.process.stdout.read() == b''
    assert not command.log
    assert {file.name for file in tmp_path.iterdir()} <= {'mail', 'mail.new'}


def test_listener_without_stdin_exits() -> None:
    with Listener(IDLE, preexec_fn=lambda: close_all([0])) as command:
        assert command.process.wait(TIMEOUT) == 0
        assert command.process.stdout and command.process.stdout.read() == READY
    assert 'Traceback' not in command.log


def test_listener_works_after_the_reader_of_its_log_has_exited() -> None:
    reading, writing = os.pipe()
    with Listener(IDLE, stderr=writing) as command:
        os.close(writing)
        command.tick()
        os.close(reading)
        for _ in range(2):
            command.tick()
        command.expect(READY)
        assert command.close() == 0


# Signals.

@pytest.mark.parametrize(('signum', 'status'), [
    (signal.SIGTERM, 0), (signal.SIGINT, 0),
    # It would kill a listener in the middle of a restart; and supervisord has to restart it.
    (signal.SIGHUP, 128 + signal.SIGHUP),
])
def test_signal_ends_an_idle_listener(signum: int, status: int) -> None:
    with Listener(IDLE) as command:
        command.serve_event('PROCESS_GROUP_ADDED', 'groupname:web\n')
        command.expect(READY)
        assert command.terminate(signum) == status
        assert command.process.stdout and command.process.stdout.read() == b''
    assert 'Traceback' not in command.log


def get_pending_signals(pid: int) -> int:
    fields = dict(line.split(':\t') for line in read(Path(f'/proc/{pid}/status')).splitlines() if ':\t' in line)
    return int(fields['SigPnd'], 16) | int(fields['ShdPnd'], 16)


@on_linux
def test_queued_mail_is_sent_at_exit(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    slow = 'touch begun; while ! [ -e go ]; do sleep 0.02; done; '
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', slow + inbox.command], folder=tmp_path) as command:
        for program in 'abc':
            command.crash(program)
        command.expect(READY)
        wait_for((tmp_path / 'begun').exists)
        # Those after the first come during the exit, and do no harm.
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            command.process.send_signal(signum)
            wait_for(lambda: not get_pending_signals(command.pid))
        (tmp_path / 'go').touch()
        assert command.process.wait(TIMEOUT) == 0
    assert [subject.split()[0] for subject in inbox.subjects] == ['a', 'b', 'c']
    assert 'Traceback' not in command.log


def test_slow_mail_command_delays_no_event_and_loses_none(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    slow = 'while ! [ -e go ]; do sleep 0.02; done; '
    names = [f'web{number}' for number in range(20)]
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', slow + inbox.command], folder=tmp_path) as command:
        for program in names:
            command.crash(program)
        assert not inbox.mails, 'a mail has been sent, so the rest may have waited for it'
        (tmp_path / 'go').touch()
        inbox.wait(20)
        command.expect(READY)
        assert command.close() == 0
    assert [subject.split()[0] for subject in inbox.subjects] == names


# Locales.

@pytest.fixture(scope='module')
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Latin-1 locale."""
    if not (shutil.which('localedef') and Path('/usr/share/i18n/charmaps').exists()):
        pytest.skip('there are no localedef and character maps, which Debian has in the package locales')
    folder = tmp_path_factory.mktemp('locales')
    # Its exit status is 1, as the POSIX locale lacks some categories.
    subprocess.run(['localedef', '-c', '-f', 'ISO-8859-1', '-i', 'POSIX', str(folder / 'latin-1')],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {'LC_ALL': 'latin-1', 'LOCPATH': str(folder), 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}


@pytest.fixture(params=['ascii', 'latin-1'])    # any other is UTF-8: for Python, C is, too
def locale(request: pytest.FixtureRequest) -> dict[str, str]:
    found: dict[str, str] = request.getfixturevalue('latin_1') if request.param == 'latin-1' else C_LOCALE
    return found


def test_latin_1_is_a_working_locale(latin_1: dict[str, str]) -> None:
    done = subprocess.run([PYTHON, '-c', 'import sys; print(sys.getfilesystemencoding())'],
                          env={**os.environ, **latin_1}, capture_output=True, text=True)
    assert done.stdout == 'iso8859-1\n'


def test_names_are_utf_8_in_any_locale(locale: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / 'größe'
    folder.mkdir()
    inbox = CommandInbox(folder)
    with Listener(['crashmail', '-p', 'größe', '-p', 'x:日本', '-o', 'Größe', '-m', 'bob@example.com', '-s',
                   inbox.command], {**locale, 'TMPDIR': str(tmp_path)}) as command:
        for event in (make_crash('größe'), make_crash('日本', 'x'), make_crash('other')):
            command.serve_event(*event)
        inbox.wait(2)
        command.expect(READY)
        assert command.close() == 0
    assert [subject.partition(' at ')[0] for subject in inbox.subjects] == [
        'Größe: größe crashed', 'Größe: 日本 crashed']
    assert 'größe' in command.log and '日本' in command.log
    assert 'größe' in inbox.mails[0].get_content()


def test_command_is_utf_8_in_any_locale(locale: dict[str, str]) -> None:
    script = ("from superlance.command import run_command\nfor command in ['printf', 'gr\\u00f6\\u00dfe'], "
              "'printf gr\\u00f6\\u00dfe':\n    print(ascii(run_command(command, lambda: 9).decode('utf-8')))")
    done = subprocess.run([PYTHON, '-c', script], env={**os.environ, **locale}, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=TIMEOUT)
    assert done.stdout == rb"'gr\xf6\xdfe'" + b'\n' + rb"'gr\xf6\xdfe'" + b'\n', done.stderr


# memmon's ps.

def test_ps_runs_once_per_tick_in_the_c_locale_and_without_the_protocol_streams(tmp_path: Path) -> None:
    write_script(tmp_path / 'ps', 'exec 3>>"$CALLS"\n{ echo "$LC_ALL $*"; /bin/cat; /bin/readlink /proc/self/fd/0; '
                                  '/bin/readlink /proc/self/fd/1 /proc/self/fd/2; } >&3\necho 1 0 100\n')
    calls = tmp_path / 'calls'
    environment = {'PATH': str(tmp_path), 'LC_ALL': 'C.UTF-8', 'CALLS': str(calls)}
    with Listener(['memmon', '-a', '100TB'], environment) as command:
        streams = get_streams(command.pid)
        for number in range(2):
            command.serve_event('PROCESS_GROUP_ADDED', 'groupname:web\n')
            command.tick()
            assert read(calls).count('C -A -o pid= -o ppid= -o rss=\n') == number + 1
        command.expect(READY)
        assert command.close() == 0
    assert read(calls).count('-A') == 2
    assert streams[0] not in read(calls).split() and streams[1] not in read(calls).split()


# A long life.

class Usage(NamedTuple):
    """What a process uses of the machine."""

    descriptors: int
    threads: int
    children: int
    rss_kb: int


def measure(pid: int) -> Usage:
    status = read(Path(f'/proc/{pid}/status'))
    threads, rss = (int(re.findall(rf'^{key}:\s+(\d+)', status, re.M)[0]) for key in ('Threads', 'VmRSS'))
    return Usage(len(os.listdir(f'/proc/{pid}/fd')), threads, len(find_children(pid)), rss)


def answer(client: Any) -> None:
    read_until(client, b'\r\n\r\n')
    client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok')


@on_linux
@pytest.mark.parametrize(('arguments', 'event', 'events'), [
    (['memmon', '-c', '-a', '100TB'], TICK, 40),
    (['crashmail'], make_crash(), 150),
    (['crashmail', '-m', 'bob@example.com', '-s', ':'], make_crash(), 20),
    (['httpok', '-b', 'ok', 'http://localhost:1/'], TICK, 60),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_long_life_costs_no_more_than_a_short_one(arguments: list[str], event: tuple[str, str], events: int,
                                                  tmp_path: Path) -> None:
    write_script(tmp_path / 'ps', 'echo 1 0 100\n')
    path = os.pathsep.join((str(tmp_path), os.environ['PATH']))
    with serving(answer) as port, Listener(
            [argument.replace(':1/', f':{port}/') for argument in arguments], {'PATH': path}) as command:
        served = 0

        def serve() -> Usage:
            nonlocal served
            for _ in range(events):
                command.serve_event(*event)
            served += events
            wait_for(lambda: '-m' not in arguments or command.log.count('sent mail') == served)
            # A thread or a child that has done its work may take a while to end.
            wait_for(lambda: measure(command.pid)[1:3] == (2 if '-m' in arguments else 1, 0))
            return measure(command.pid)

        serve()     # caches are filled
        before, after = serve(), serve()
        assert after.descriptors == before.descriptors, (before, after)
        assert after.rss_kb <= before.rss_kb + 1024, (before, after)
        command.expect(READY)
        assert command.close() == 0
