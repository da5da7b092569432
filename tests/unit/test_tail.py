"""tail: the last lines that a process wrote to its logs, and why there are none."""
from __future__ import annotations

import builtins
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superlance import tail
from superlance.crashlog import Calls, Processes
from superlance.rpc import HttpError, Refused, Unknown
from superlance.tail import ProcessLogs, is_device, strip_escapes

RESTARTED = 'supervisord has restarted it: the last lines above may be from the new process.'
EMPTY = 'Its logs are empty.'
NOTHING_NEW = 'Its logs have no new lines since its last crash.'


class FakeSupervisord:
    """A supervisord with processes and their logs, as bytes by channel."""

    def __init__(self) -> None:
        self.infos: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, bytes] = {}
        self.failures: dict[str, Exception] = {}

    def add(self, namespec: str = 'web:web', stdout: object = '', stderr: object = '', pid: int = 0) -> None:
        group, program = namespec.split(':')
        self.infos[namespec] = dict(group=group, name=program, pid=pid, start=1, now=2, state=20, statename='RUNNING',
                                    stdout_logfile=str(stdout), stderr_logfile=str(stderr))

    def __call__(self, environment: object, timeout_seconds: float) -> FakeSupervisord:
        return self

    def call(self, method: str, *arguments: Any) -> Any:
        if method in self.failures:
            raise self.failures[method]
        if method == 'getAllProcessInfo':
            return list(self.infos.values())
        if method == 'getProcessInfo':
            if arguments[0] not in self.infos:
                raise Refused('BAD_NAME', 'BAD_NAME')
            return dict(self.infos[arguments[0]])
        log = self.logs.get(method[11:17].lower(), b'')
        if method.startswith('tail'):
            return ['', len(log), False]
        try:
            return log[arguments[1]:arguments[1] + arguments[2]].decode()
        except UnicodeDecodeError as why:
            raise HttpError(f'answered {method} with 500 Internal Server Error') from why

    def call_in_helper(self, calls: Any, seconds: float, interrupt: object) -> list[Any]:
        return [self.call(*call) for call in calls]


@pytest.fixture
def supervisord() -> FakeSupervisord:
    return FakeSupervisord()


Read = Callable[..., str]


@pytest.fixture
def read(supervisord: FakeSupervisord) -> Read:
    """Return the function that reads the logs of web after a crash; it knows its logs from the start."""
    calls = Calls({}, supervisord, time.monotonic)  # type: ignore[arg-type]
    processes = Processes(calls, time.monotonic)
    readers: dict[int, ProcessLogs] = {}

    def read(lines: int = 5, namespec: str = 'web:web', pid: object = 10) -> str:
        calls.begin()
        if lines not in readers:
            processes.learn(5, None)
            readers[lines] = ProcessLogs(calls, processes, lines)
        return readers[lines].read(namespec, str(pid))
    return read


@pytest.fixture
def log(tmp_path: Path, supervisord: FakeSupervisord) -> Path:
    """Return the path of the stdout log of web."""
    path = tmp_path / 'web.out'
    supervisord.add(stdout=path, stderr=tmp_path / 'web.err')
    path.write_bytes(b'')
    (tmp_path / 'web.err').write_bytes(b'')
    return path


def append(path: Path, data: str) -> None:
    with open(path, 'a', encoding='utf-8') as file:
        file.write(data)


def test_log_is_read_before_the_slow_import_that_calls_need(
        read: Read, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """supervisord has restarted the process, which soon writes its first lines."""
    class Finder:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> None:
            if name == 'supervisor.childutils':
                append(log, 'line of the new process\n')

    append(log, 'last line\n')
    monkeypatch.delitem(sys.modules, 'supervisor.childutils', raising=False)
    monkeypatch.setattr(sys, 'meta_path', [Finder, *sys.meta_path])
    assert read() == 'The last lines of its stdout log:\n  last line'
    assert 'line of the new process' in log.read_text()


def test_last_lines_of_both_logs(read: Read, log: Path, tmp_path: Path) -> None:
    log.write_text('out 1\nout 2\nout 3\n')
    (tmp_path / 'web.err').write_text('err 1\nerr 2\nerr 3')
    assert read(2) == ('The last lines of its stdout log:\n  out 2\n  out 3\n\n'
                       'The last lines of its stderr log:\n  err 2\n  err 3')


@pytest.mark.parametrize(('data', 'lines', 'shown'), [
    (b'a\n', 5, ['a']),
    (b'a\n\nb\n\n\n', 3, ['a', '', 'b']),
    (b'caf\xe9\xff\n\x80\n', 5, ['caf\ufffd\ufffd', '\ufffd']),
    ('größe 日本\n'.encode(), 5, ['größe 日本']),
    (b'\x1b[1;31mred\x1b[0m \x1b]0;title\x07text\x1b(B\n', 5, ['red text']),
])
def test_any_text(read: Read, log: Path, data: bytes, lines: int, shown: list[str]) -> None:
    log.write_bytes(data)
    assert read(lines).partition(':\n')[2].split('\n') == ['  ' + line for line in shown]


@pytest.mark.parametrize(('text', 'stripped'), [
    ('\x1b[0m\x1b[38;5;208mx\x1b[K', 'x'),
    ('a\x1bM\x1b=\x1b7b', 'ab'),
    ('\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\', 'link'),
    ('\u241b[31mred\u241b[0m\u241b]0;t\u2407', 'red'),
    ('\x1b', '\x1b'),
    ('[31m', '[31m'),
])
def test_escape_sequences_are_removed(text: str, stripped: str) -> None:
    assert strip_escapes(text) == stripped


@given(st.text(alphabet='\x1b[]()0123456789;mKab\x07\\\n \u241b\u2407'))
def test_text_that_has_no_escape_character_stays_as_it_is(text: str) -> None:
    plain = text.replace('\x1b', '').replace('\u241b', '')
    assert strip_escapes(plain) == plain
    assert len(strip_escapes(text)) <= len(text)


@pytest.mark.parametrize('more', ['', 'x', 'xx'])
@pytest.mark.parametrize('relative', [False, True])
def test_what_is_read_is_bounded_and_may_begin_within_a_character(
        read: Read, log: Path, supervisord: FakeSupervisord, relative: bool, more: str) -> None:
    data = ('first\n' + '日' * 40000 + more + '\nlast\n').encode()
    log.write_bytes(data)
    if relative:
        supervisord.add(stdout='web.out')
        supervisord.logs['stdout'] = data
    text = read()
    assert text.endswith('  last')
    assert 'first' not in text
    assert 21800 < text.count('日') <= tail.TAIL_BYTES / 3


@pytest.mark.parametrize('relative', [False, True])
def test_lines_from_before_the_last_crash_are_not_shown(read: Read, log: Path, supervisord: FakeSupervisord,
                                                        relative: bool) -> None:
    if relative:
        supervisord.add(stdout='web.out')

    def write(text: str) -> None:
        append(log, text)
        supervisord.logs['stdout'] = log.read_bytes()
    write('run 1\n')
    assert 'run 1' in read()
    write('run 2\n')
    assert read() == 'The last lines of its stdout log:\n  run 2'
    assert read() == NOTHING_NEW
    log.write_bytes(b'')    # cleared
    write('3\n')
    assert read() == 'The last lines of its stdout log:\n  3'


def test_empty_logs(read: Read, log: Path) -> None:
    assert read() == EMPTY
    append(log, 'words\n')
    assert read().endswith('words')


def test_log_that_was_deleted_is_named(read: Read, log: Path, supervisord: FakeSupervisord, tmp_path: Path) -> None:
    """supervisord goes on writing to the deleted file."""
    log.unlink()
    assert read() == f'Unable to read its stdout log: {log} does not exist.'
    assert read(4, pid='') == EMPTY     # it was never started
    for lines, unknown in enumerate(('relative', str(tmp_path / 'web.err' / 'not in a directory')), 1):
        supervisord.infos['web:web']['stdout_logfile'] = unknown
        assert read(lines) == EMPTY


def test_note_about_a_process_that_has_been_restarted(read: Read, log: Path, supervisord: FakeSupervisord) -> None:
    append(log, 'words\n')
    supervisord.infos['web:web']['pid'] = 11
    assert read() == f'The last lines of its stdout log:\n  words\n\n{RESTARTED}'
    assert read() == NOTHING_NEW
    append(log, 'words\n')
    assert RESTARTED not in read(pid=11)
    append(log, 'words\n')
    assert RESTARTED not in read(pid='')


# Rotation: supervisord renames the log and writes to a new one.

def rotate(log: Path) -> None:
    """Rotate a log as supervisord does, with one file kept."""
    os.replace(log, f'{log}.1')
    log.write_bytes(b'')


def test_rotation_between_the_write_and_the_read(read: Read, log: Path) -> None:
    append(log, 'a\nb\n')
    rotate(log)
    assert read() == 'The last lines of its stdout log:\n  a\n  b'
    append(log, 'c\n')
    rotate(log)
    append(log, 'd\n')
    assert read() == 'The last lines of its stdout log:\n  c\n  d'


def test_rotation_in_the_middle_of_a_line(read: Read, log: Path) -> None:
    append(log, 'old\n')
    read()
    append(log, 'first\nsec')
    rotate(log)
    append(log, 'ond\n')
    assert read() == 'The last lines of its stdout log:\n  first\n  second'


def test_rotation_twice_since_the_last_crash(read: Read, log: Path) -> None:
    append(log, 'old\n')
    read()
    append(log, 'lost\n')
    rotate(log)
    append(log, 'b\n')
    rotate(log)
    append(log, 'c\n')
    assert read() == 'The last lines of its stdout log:\n  b\n  c'


def test_rotated_log_is_bounded_too(read: Read, log: Path) -> None:
    append(log, 'x' * 100000)
    rotate(log)
    append(log, 'y\n')
    text = read()
    assert text.endswith('xy')
    assert text.count('x') == tail.TAIL_BYTES - 2


@pytest.mark.parametrize('crashed_before', [False, True])
def test_log_that_was_rotated_long_ago_is_not_shown(read: Read, log: Path, crashed_before: bool) -> None:
    append(log, 'old\n')
    if crashed_before:
        read()
    rotate(log)
    then = time.time() - 3600
    os.utime(f'{log}.1', (then, then))
    assert read() == (NOTHING_NEW if crashed_before else EMPTY)


def test_log_that_was_cleared_after_a_rotation(read: Read, log: Path) -> None:
    append(log, 'old\n')
    rotate(log)
    append(log, 'run 1\n')
    read()
    log.unlink()    # supervisorctl clear
    log.write_text('run 2\n')
    assert read() == 'The last lines of its stdout log:\n  run 2'


def test_rotation_while_the_log_is_read(read: Read, log: Path) -> None:
    append(log, 'words\n')
    os.link(log, f'{log}.1')    # the file that was opened has just been renamed
    assert read() == 'The last lines of its stdout log:\n  words'


def test_rotated_log_that_is_not_a_file(read: Read, log: Path) -> None:
    append(log, 'words\n')
    Path(f'{log}.1').mkdir()
    assert read() == 'The last lines of its stdout log:\n  words'


# Logs that can't be read back, or that several processes write to.

@pytest.mark.parametrize(('path', 'link', 'device'), [
    ('/dev/stdout', None, True),
    ('/dev/fd/1', None, True),
    ('/proc/self/fd/1', None, True),
    ('{}/link', '/dev/stdout', True),
    ('{}/link', '../../../../../../../../../../dev/stderr', True),
    ('{}', None, True),     # a directory
    ('{}/link', '{}/link', False),
    ('{}/file', None, False),
    ('{}/link', 'file', False),
    ('{}/missing', None, False),
    ('/dev/shm/missing', None, False),
    ('web.out', None, False),
    ('', None, False),
])
def test_device(tmp_path: Path, path: str, link: str | None, device: bool) -> None:
    (tmp_path / 'file').write_bytes(b'')
    if link:
        (tmp_path / 'link').symlink_to(link.format(tmp_path))
    assert is_device(path.format(tmp_path)) == device


def test_pipe_is_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')
    assert is_device(str(tmp_path / 'pipe'))


@pytest.mark.parametrize(('stdout', 'stderr', 'text'), [
    ('/dev/stdout', '/dev/stderr', 'Unable to read its stdout log: /dev/stdout is not a file.\n\n'
                                   'Unable to read its stderr log: /dev/stderr is not a file.'),
    ('/dev/stdout', '/dev/stdout', 'Unable to read its stdout and stderr log: /dev/stdout is not a file.'),
    ('', '', 'Unable to read its stdout log: stdout_logfile is NONE or syslog.'),
    ('{}', '', 'The last lines of its stdout log:\n  words'),
    ('', '{}', 'Unable to read its stdout log: stdout_logfile is NONE or syslog.\n\n'
               'The last lines of its stderr log:\n  words'),
    ('{}', '{}', 'The last lines of its stdout and stderr log:\n  words'),
])
def test_log_that_cannot_be_read_is_named(
        read: Read, log: Path, supervisord: FakeSupervisord, stdout: str, stderr: str, text: str) -> None:
    append(log, 'words\n')
    supervisord.logs = {'stdout': b'of another\n', 'stderr': b'of another\n'}
    supervisord.add(stdout=stdout.format(log), stderr=stderr.format(log), pid=11)
    assert read().replace('\n\n' + RESTARTED, '') == text


def test_log_that_several_processes_write_to(read: Read, log: Path, supervisord: FakeSupervisord) -> None:
    append(log, 'words\n')
    for program in ('a', 'b'):
        supervisord.add(f'workers:{program}', stdout=log)
    heading = 'The last lines of its stdout log (shared with 2 other processes, whose lines may be here too):\n'
    assert read() == heading + '  words'
    assert read(namespec='workers:a') == heading + '  words'    # a crash of one does not hide the lines of another
    del supervisord.infos['workers:b'], supervisord.infos['workers:a']
    assert read(4) == 'The last lines of its stdout log:\n  words'


# What supervisord says.

def test_process_that_supervisord_does_not_know(read: Read, log: Path) -> None:
    append(log, 'words\n')
    assert read(namespec='gone:gone') == 'Unable to read more of its logs through supervisord: BAD_NAME'
    assert read().endswith('words')


def test_process_that_was_added_since(read: Read, log: Path, supervisord: FakeSupervisord, tmp_path: Path) -> None:
    read()
    (tmp_path / 'new.out').write_text('words\n')
    supervisord.add('new:new', stdout=tmp_path / 'new.out')
    assert read(namespec='new:new') == 'The last lines of its stdout log:\n  words'


def test_update_that_has_changed_the_log(read: Read, log: Path, supervisord: FakeSupervisord, tmp_path: Path) -> None:
    append(log, 'old\n')
    assert 'old' in read()
    (tmp_path / 'new.out').write_text('new\n')
    supervisord.add(stdout=tmp_path / 'new.out')
    assert read() == 'The last lines of its stdout log:\n  new'


@pytest.mark.parametrize(('failure', 'reason'), [
    (Unknown('no answer'), 'no answer'),
    (Refused('SHUTDOWN_STATE', 'SHUTDOWN_STATE'), 'it is shutting down'),
])
def test_supervisord_that_does_not_answer(
        read: Read, log: Path, supervisord: FakeSupervisord, failure: Exception, reason: str) -> None:
    append(log, 'words\n')
    read()
    append(log, 'more\n')
    supervisord.failures['getProcessInfo'] = failure
    assert read() == ('The last lines of its stdout log:\n  more\n\n'
                      f'Unable to read more of its logs through supervisord: {reason}')


def test_logs_that_supervisord_cannot_send(read: Read, supervisord: FakeSupervisord) -> None:
    supervisord.add(stdout='web.out', stderr='web.err')
    supervisord.logs = {'stdout': b'\xff' * 10 + b'\n', 'stderr': b'words\n'}
    assert read() == (
        'The last lines of its stderr log:\n  words\n\n'
        'Unable to read more of its logs through supervisord: '
        'answered readProcessStdoutLog with 500 Internal Server Error')
    supervisord.logs = {'stdout': b'\xff' * 10 + b'\n' + b'\xff', 'stderr': b'words\n' + b'\xff'}
    assert read().count('500') == 1
    supervisord.logs['stdout'] += b'more\n'
    assert read().startswith('The last lines of its stdout log:\n  more')


@pytest.mark.parametrize('cut', [1, 2, 3])
def test_log_of_a_process_that_was_killed_within_a_character(
        read: Read, supervisord: FakeSupervisord, cut: int) -> None:
    """Programs that write to a file write blocks of 4 KB, which may end anywhere."""
    supervisord.add(stdout='web.out')
    supervisord.logs = {'stdout': 'words \U0001d11e'.encode()[:-cut]}
    assert read() == 'The last lines of its stdout log:\n  words '


def test_relative_path_is_read_by_supervisord(
        read: Read, supervisord: FakeSupervisord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'web.out').write_text('a file of another\n')
    supervisord.add(stdout='web.out')
    supervisord.logs['stdout'] = b'its own\n'
    assert read() == 'The last lines of its stdout log:\n  its own'


@pytest.fixture
def protect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that lets open() fail for a path, for root too."""
    def protect(protected: str) -> None:
        real_open = open

        def open_others(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) == protected:
                raise PermissionError(13, 'Permission denied')
            return real_open(path, *arguments, **options)
        monkeypatch.setattr(builtins, 'open', open_others)
    return protect


def test_file_that_the_listener_may_not_open_is_read_by_supervisord(
        read: Read, log: Path, supervisord: FakeSupervisord, protect: Callable[[str], None]) -> None:
    protect(str(log))
    supervisord.logs['stdout'] = b'words\n'
    assert read() == 'The last lines of its stdout log:\n  words'


def test_rotated_log_that_the_listener_may_not_open(read: Read, log: Path, protect: Callable[[str], None]) -> None:
    append(log, 'old\n')
    rotate(log)
    append(log, 'words\n')
    protect(f'{log}.1')
    assert read() == 'The last lines of its stdout log:\n  words'
