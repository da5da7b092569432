"""Each command as a process: its streams, its signals, its locale, and what it costs over a long life."""
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
    acknowledge,
    find_children,
    make_crash,
    make_event,
    read,
    read_until,
    serving,
    wait_for,
    write_script,
)

URL = 'http://127.0.0.1:1/'     # refuses connections
# Each with options with which it does its work.
ARGUMENTS = {
    'memmon': ['memmon', '-a', '100TB'],
    'httpok': ['httpok', '-t', '0.1', URL],
    'crashmail': ['crashmail'],
}
TICK = ('TICK_5', 'when:1')

every_command = pytest.mark.parametrize('name', ARGUMENTS)
on_linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')


SERVED = {'memmon': TICK, 'httpok': TICK, 'crashmail': make_crash()}
# What the log has for each event that is served.
LOGGED = {'httpok': f' httpok: {URL}: ', 'crashmail': ' (pid 123) '}


# The protocol.

@every_command
def test_stdout_is_the_protocol_and_nothing_else(name: str) -> None:
    with Listener(ARGUMENTS[name]) as command:
        command.write(make_event(*SERVED[name]) * 3)
        assert command.close() == 0
        assert command.process.stdout and command.process.stdout.read() == acknowledge(3)
    assert name == 'memmon' or command.log.count(LOGGED[name]) == 3, command.log


def count_unread(pipe: Any) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_event_may_arrive_in_pieces() -> None:
    event = make_event(*make_crash('größe'))
    inside = event.index('ö'.encode()) + 1
    places = [0, 1, 4, event.index(b'\n'), event.index(b'\n') + 1, inside, inside + 1, len(event) - 1, len(event)]
    with Listener(['crashmail']) as command:
        command.expect(READY)
        for start, end in zip(places, places[1:]):
            wait_for(lambda: count_unread(command.process.stdin) == 0)
            command.write(event[start:end])
        command.expect(RESULT + READY)
        assert command.close() == 0
    assert command.log.count('größe') == 1


def test_stray_print_does_not_reach_supervisord(tmp_path: Path) -> None:
    """Each log line calls time.localtime; here that prints, as a library may."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import os, time\nreal = time.localtime\ndef localtime(*arguments):\n'
        "    print('RESULT 4', flush=True)\n    os.system('echo READY')\n    return real(*arguments)\n"
        'time.localtime = localtime\n', 'utf-8')
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get('PYTHONPATH'))))
    with Listener(['crashmail'], {'PYTHONPATH': path}) as command:
        command.write(make_event(*make_crash()) * 2)
        assert command.close() == 0
        assert command.process.stdout and command.process.stdout.read() == acknowledge(2)
    assert 'RESULT 4\nREADY\n' in command.log and ' crashmail: ' in command.log


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
        'facts = [events.readline(), os.read(0, 9), min(events.fileno(), results, report.fileno()) > 2]',
        'facts += [os.fstat(fd).st_rdev == null for fd in (0, 1, 2)]',
        'facts += [os.get_inheritable(events.fileno()), os.get_inheritable(results)]',
        'report.write(repr(facts))',
        "os.write(results, b'result')",
        "print('stray', flush=True)",
        "os.system('cat; echo child')"))
    done = subprocess.run([PYTHON, '-c', script], input=b'event\n', cwd=tmp_path, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    no_log = 2 in closed
    assert read(tmp_path / 'report') == repr([
        '' if 0 in closed else 'event\n', b'', True, True, no_log, no_log, False, False])
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


@on_linux
@pytest.mark.parametrize('closed', [(1,), (2,), (1, 2)], ids=str)
def test_listener_works_with_a_stream_closed_at_its_start(closed: tuple[int, ...], tmp_path: Path) -> None:
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', 'cat > mail.new; mv mail.new mail'], folder=tmp_path,
                  preexec_fn=lambda: close_all(closed)) as command:
        # Its streams show that it listens, even if the results go nowhere.
        wait_for(lambda: get_streams(command.pid)[:1] == ['/dev/null'])
        log = '/dev/null' if 2 in closed else get_streams(command.pid)[2]
        wait_for(lambda: get_streams(command.pid) == ['/dev/null', log, log])
        command.write(make_event(*make_crash()) * 2)
        wait_for(lambda: count_unread(command.process.stdin) == 0)
        wait_for((tmp_path / 'mail').exists)
        assert get_streams(command.pid) == ['/dev/null', log, log]
        assert command.close() == 0
        assert command.process.stdout and command.process.stdout.read() == (b'' if 1 in closed else acknowledge(2))
    assert 'Traceback' not in command.log and (not command.log) == (2 in closed)
    assert {file.name for file in tmp_path.iterdir()} <= {'mail', 'mail.new'}


@pytest.mark.parametrize('closed', [(0,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
def test_listener_without_stdin_exits(closed: tuple[int, ...]) -> None:
    with Listener(['crashmail'], preexec_fn=lambda: close_all(closed)) as command:
        assert command.process.wait(TIMEOUT) == 0
        assert command.process.stdout and command.process.stdout.read() == (b'' if 1 in closed else READY)
    assert 'Traceback' not in command.log


def test_listener_works_after_the_reader_of_its_log_has_exited() -> None:
    reading, writing = os.pipe()
    with Listener(['crashmail'], stderr=writing) as command:
        os.close(writing)
        command.crash()
        os.close(reading)
        for _ in range(3):
            command.crash()
        command.expect(READY)
        assert command.close() == 0


# Signals.

@pytest.mark.parametrize(('name', 'signum'), [
    ('memmon', signal.SIGTERM), ('httpok', signal.SIGTERM), ('crashmail', signal.SIGTERM), ('memmon', signal.SIGINT)])
def test_sigterm_or_sigint_ends_an_idle_listener(name: str, signum: int) -> None:
    with Listener(ARGUMENTS[name]) as command:
        command.serve_event(*SERVED[name])
        command.expect(READY)
        assert command.terminate(signum) == 0
        assert command.process.stdout and command.process.stdout.read() == b''
    assert 'Traceback' not in command.log


def test_other_signal_is_an_unexpected_exit() -> None:
    """It would kill a listener in the middle of a restart; and supervisord has to restart it."""
    with Listener(['memmon', '-a', '100TB']) as command:
        command.expect(READY)
        assert command.terminate(signal.SIGHUP) == 128 + signal.SIGHUP


def get_pending_signals(pid: int) -> int:
    fields = dict(line.split(':\t') for line in read(Path(f'/proc/{pid}/status')).splitlines() if ':\t' in line)
    return int(fields['SigPnd'], 16) | int(fields['ShdPnd'], 16)


@on_linux
@pytest.mark.parametrize('signum', [None, signal.SIGTERM, signal.SIGINT])
def test_queued_mail_is_sent_at_exit(signum: int | None, tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    slow = 'touch begun; while ! [ -e go ]; do sleep 0.02; done; '
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', slow + inbox.command], folder=tmp_path) as command:
        for program in 'abc':
            command.crash(program)
        command.expect(READY)
        wait_for((tmp_path / 'begun').exists)
        if signum:
            # More of them during the exit do no harm.
            for again in (signum, signal.SIGTERM, signal.SIGINT, signum):
                command.process.send_signal(again)
                wait_for(lambda: not get_pending_signals(command.pid))
        else:
            assert command.process.stdin
            command.process.stdin.close()
        (tmp_path / 'go').touch()
        assert command.process.wait(TIMEOUT) == 0
    assert [subject.split()[0] for subject in inbox.subjects] == ['a', 'b', 'c']
    assert 'Traceback' not in command.log


def test_slow_mail_command_delays_no_event_and_loses_none(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    slow = 'while ! [ -e go ]; do sleep 0.02; done; '
    names = [f'web{number}' for number in range(100)]
    with Listener(['crashmail', '-m', 'bob@example.com', '-s', slow + inbox.command], folder=tmp_path) as command:
        for program in names:
            command.crash(program)
        assert not inbox.mails, 'a mail has been sent, so the rest may have waited for it'
        (tmp_path / 'go').touch()
        inbox.wait(100)
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


@pytest.fixture(params=['ascii', 'C', 'utf-8', 'latin-1'])
def locale(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == 'latin-1':
        found: dict[str, str] = request.getfixturevalue('latin_1')
        return found
    return C_LOCALE if request.param == 'ascii' else {'LC_ALL': {'utf-8': 'C.UTF-8'}.get(request.param, request.param)}


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
        for event in (make_crash('größe'), make_crash('日本', 'x'), make_crash('other'), make_crash('größe')):
            command.serve_event(*event)
        inbox.wait(3)
        command.expect(READY)
        assert command.close() == 0
    assert [subject.partition(' at ')[0] for subject in inbox.subjects] == [
        'Größe: größe crashed', 'Größe: 日本 crashed', 'Größe: größe crashed']
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
    with Listener(ARGUMENTS['memmon'], {'PATH': str(tmp_path), 'LC_ALL': 'C.UTF-8', 'CALLS': str(calls)}) as command:
        streams = get_streams(command.pid)
        for number in range(3):
            command.serve_event('PROCESS_GROUP_ADDED', 'groupname:web\n')
            command.tick()
            assert read(calls).count('C -A -o pid= -o ppid= -o rss=\n') == number + 1
        command.expect(READY)
        assert command.close() == 0
    assert read(calls).count('-A') == 3
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
@pytest.mark.parametrize(('arguments', 'events', 'warm_up'), [
    (['memmon', '-a', '100TB'], 150, 50),
    (['memmon', '-c', '-p', 'web=100TB'], 50, 50),
    (['crashmail'], 500, 50),
    (['crashmail', '-m', 'bob@example.com', '-s', ':'], 200, 100),
    (['httpok', '-b', 'ok', 'http://localhost:1/'], 150, 100),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else str(value))
def test_long_life_costs_no_more_than_a_short_one(arguments: list[str], events: int, warm_up: int,
                                                  tmp_path: Path) -> None:
    write_script(tmp_path / 'ps', 'echo 1 0 100\n')
    mails = '-m' in arguments
    path = os.pathsep.join((str(tmp_path), os.environ['PATH']))
    with serving(answer) as port, Listener(
            [argument.replace(':1/', f':{port}/') for argument in arguments], {'PATH': path}) as command:
        served = 0

        def serve(number: int) -> Usage:
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
