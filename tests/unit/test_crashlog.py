"""crashlog: the exit status in supervisord's own log is found for the right process, or not at all."""
from __future__ import annotations

import os
import random
import time
from typing import Any, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table import for_each

from superlance import crashlog
from superlance.crashlog import (
    Calls,
    DetailsReader,
    Processes,
    count_others,
    cut_at_start,
    find_last_reason,
    find_reason,
    read_entries,
)
from superlance.rpc import HttpError, Refused, Unknown

STAMP = '2026-11-22 05:02:11,123'
TOO_QUICKLY = 'Exited too quickly (process log may have details)'
NO_LOG = ('unable to determine exit statuses, because supervisord cannot read its own log: '
          'set logfile in [supervisord] to a file')
KILLED, THREE, FOUR = 'terminated by SIGKILL', 'exit status 3', 'exit status 4'


def spawned(program: str, pid: object) -> str:
    return f"{STAMP} INFO spawned: '{program}' with pid {pid}\n"


def exited(program: str, reason: str, expected: bool = False, level: str = 'WARN') -> str:
    return f"{STAMP} {level} exited: {program} ({reason}; {'' if expected else 'not '}expected)\n"


# What supervisord's log has, in the order in which a test of `web` with pid 10 reads it; what is found if no other
# group has a web, and if one has.
LOGS: list[tuple[str, str, str, str]] = [
    ('start and exit', spawned('web', 10) + exited('web', THREE), THREE, THREE),
    ('a signal', spawned('web', 10) + exited('web', KILLED), KILLED, KILLED),
    ('a core dump', spawned('web', 10) + exited('web', 'terminated by SIGSEGV (core dumped)'),
     'terminated by SIGSEGV (core dumped)', 'terminated by SIGSEGV (core dumped)'),
    ('supervisor 4.2.0 logs it as INFO', spawned('web', 10) + exited('web', THREE, level='INFO'), THREE, THREE),
    ('other programs between', spawned('web', 10) + spawned('db', 11) + exited('db', FOUR) + exited('web', THREE),
     THREE, THREE),
    ('names that contain this one', spawned('web', 10) + exited('web2', FOUR) + exited('a-web', FOUR)
     + exited('web', THREE), THREE, THREE),
    ('restarted since', spawned('web', 10) + exited('web', THREE) + spawned('web', 11), THREE, THREE),
    ('exited again since', spawned('web', 10) + exited('web', THREE) + spawned('web', 11) + exited('web', FOUR),
     THREE, ''),
    ('exited again since, in the same way',
     spawned('web', 10) + exited('web', THREE) + spawned('web', 11) + exited('web', THREE), THREE, THREE),
    ('an earlier crash', spawned('web', 9) + exited('web', FOUR) + spawned('web', 10) + exited('web', THREE),
     THREE, THREE),
    ('the pid was used before', spawned('web', 10) + exited('web', FOUR) + spawned('web', 10) + exited('web', THREE),
     THREE, THREE),
    ('the pid is used again', spawned('web', 10) + exited('web', THREE) + spawned('web', 10), THREE, THREE),
    ('the pid of another program', spawned('db', 10) + exited('db', FOUR) + spawned('web', 10) + exited('web', THREE),
     THREE, THREE),
    ('two of that name', spawned('web', 9) + spawned('web', 10) + exited('web', FOUR) + exited('web', THREE), FOUR, ''),
    ('expected by one, unexpected by the other',
     spawned('web', 9) + spawned('web', 10) + exited('web', 'exit status 0', True) + exited('web', THREE), '', THREE),
    ('a start between, as printed by a program', spawned('web', 10) + spawned('web', 70) + exited('web', FOUR)
     + exited('web', THREE), '', ''),
    ('a start between, and exits that agree', spawned('web', 10) + spawned('web', 70) + exited('web', THREE) * 2,
     THREE, THREE),
    ('a stop', spawned('web', 10) + f'{STAMP} INFO stopped: web (exit status 0)\n', '', ''),
    ('an exit that was expected', spawned('web', 10) + exited('web', 'exit status 0', True), '', ''),
    ('an exit that supervisord has not logged', spawned('web', 10), '', ''),
    ('no start: loglevel=warn', exited('web', THREE), THREE, ''),
    ('no start, and exits that agree', exited('web', THREE) * 3, THREE, ''),
    ('no start, and exits that differ', exited('web', FOUR) + exited('web', THREE), '', ''),
    ('no start, and an expected exit', exited('web', 'exit status 0', True) + exited('web', THREE), THREE, ''),
    ('started before the log begins', exited('web', THREE) + spawned('web', 11), THREE, ''),
    ('rotated since: the exit of the next process', spawned('web', 11) + exited('web', FOUR), '', ''),
    ('nothing', '', '', ''),
    ('output of a program (loglevel=debug)',
     spawned('web', 10) + f"{STAMP} DEBG 'web' stdout output:\nexited: web (exit status 9; not expected)\n\n"
     + exited('web', THREE), THREE, THREE),
    ('a first line that is cut', exited('web', FOUR)[1:] + spawned('web', 10) + exited('web', THREE), THREE, THREE),
]


@pytest.mark.parametrize(('text', 'alone', 'among_others'), [case[1:] for case in LOGS], ids=[case[0] for case in LOGS])
def test_reason_of_an_exit(text: str, alone: str, among_others: str) -> None:
    entries = read_entries(text, 'web')
    assert find_reason(entries, '10', True) == alone
    assert find_reason(entries, '10', False) == among_others


@for_each('name', ["we'b(x)", 'w.b', 'größe', 'a+b[c]', 'web\\d', '$', '日本'])
def test_reason_of_an_exit_of_a_process_with_an_odd_name(name: str) -> None:
    text = spawned('web', 10) + spawned(name, 11) + exited('web', FOUR) + exited(name, THREE)
    assert find_reason(read_entries(text, name), '11', True) == THREE


@pytest.mark.parametrize(('text', 'alone', 'among_others'), [
    (exited('web', THREE) * 4, THREE, THREE),
    (exited('web', FOUR) + exited('web', THREE), THREE, ''),
    (exited('web', THREE) + exited('web', 'exit status 0', True), THREE, THREE),
    (exited('db', THREE), '', ''),
])
def test_reason_of_the_last_exit(text: str, alone: str, among_others: str) -> None:
    entries = read_entries(text, 'web')
    assert (find_last_reason(entries, True), find_last_reason(entries, False)) == (alone, among_others)


STARTED = f'{STAMP} INFO supervisord started with pid 7\n'


@pytest.mark.parametrize(('text', 'since'), [
    (STARTED + spawned('web', 10), spawned('web', 10)),
    (STARTED + spawned('web', 9) + STARTED + spawned('web', 10), spawned('web', 10)),
    (spawned('web', 10), None),
    (STARTED.replace('7', '77') + spawned('web', 10), None),
    ('said: INFO supervisord started with pid 7\n' + spawned('web', 10), None),
    (STARTED[5:] + spawned('web', 10), None),
])
def test_log_since_the_start_of_supervisord(text: str, since: str | None) -> None:
    assert cut_at_start(text, 7) == since


@pytest.mark.parametrize(('text', 'others'), [
    (spawned('web', 10) + exited('web', THREE), 0),
    (spawned('web', 9) + exited('web', FOUR) + spawned('web', 10) + exited('web', THREE), 0),
    (spawned('web', 9) + spawned('web', 10) + exited('web', THREE), 1),
    (spawned('web', 10), None),
    ('', None),
])
def test_other_processes_that_ran_when_one_was_started(text: str, others: int | None) -> None:
    assert count_others(read_entries(text, 'web'), '10') == others


# With a supervisord.

class FakeSupervisord:
    """A supervisord whose log, processes and answers the test decides, in virtual time."""

    def __init__(self) -> None:
        self.log = ''
        self.infos: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[str, list[Exception]] = {}      # by method, for its next calls
        self.delay_seconds = 0.001
        self.now = 1000.0
        self.lines: list[str] = []

    def add(self, group: str, program: str, pid: int = 0, start: int = 900, **info: object) -> None:
        self.infos[f'{group}:{program}'] = dict(
            group=group, name=program, pid=pid, start=start, now=int(self.now), state=20, statename='RUNNING',
            stdout_logfile='', stderr_logfile='', **info)

    def __call__(self, environment: object, timeout_seconds: float) -> FakeSupervisord:
        return self

    def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
        self.now += self.delay_seconds
        if self.failures.get(method):
            raise self.failures[method].pop(0)
        if method == 'getAllProcessInfo':
            return list(self.infos.values())
        if method == 'getProcessInfo':
            if arguments[0] not in self.infos:
                raise Refused('BAD_NAME', 'BAD_NAME')
            return self.infos[arguments[0]]
        assert method == 'readLog'
        return self.log.encode()[arguments[0]:].decode()

    def call_in_helper(self, calls: Sequence[Any], seconds: float, interrupt: object) -> list[Any]:
        return [self.call(*call) for call in calls]

    def count(self, method: str) -> int:
        return sum(1 for call in self.calls if call[0] == method)

    def make_reader(self, tail_lines: int | None = None) -> DetailsReader:
        return DetailsReader({}, tail_lines, self.lines.append, self, lambda: self.now)  # type: ignore[arg-type]

    def find(self, group: str = 'web', program: str = 'web', pid: object = 10) -> str:
        return self.make_reader().read(group, program, str(pid), False).reason


@pytest.fixture
def supervisord() -> FakeSupervisord:
    fake = FakeSupervisord()
    fake.add('web', 'web')
    return fake


def test_log_is_read_once_for_a_burst_of_crashes(supervisord: FakeSupervisord) -> None:
    supervisord.log = ''.join(spawned(f'p{n}', n) + exited(f'p{n}', f'exit status {n}') for n in range(1, 20))
    reader = supervisord.make_reader()
    for number in range(1, 20):
        found = reader.read('p', f'p{number}', str(number), False)
        assert found.reason == f'exit status {number}'
    assert (supervisord.count('readLog'), supervisord.count('getAllProcessInfo')) == (1, 1)
    supervisord.log += spawned('p1', 31) + exited('p1', FOUR)
    assert reader.read('p', 'p1', '31', False).reason == FOUR    # not in what was read
    supervisord.log += spawned('p1', 31) + exited('p1', THREE)
    supervisord.now += 10
    assert reader.read('p', 'p1', '31', False).reason == THREE   # a pid that occurs again
    assert (supervisord.count('readLog'), supervisord.count('getAllProcessInfo')) == (3, 1)
    supervisord.now += 60
    assert reader.read('p', 'p1', '31', False).reason == THREE
    assert supervisord.count('getAllProcessInfo') == 2


def test_log_that_goes_back_to_the_start_of_supervisord_needs_no_list_of_processes(
        supervisord: FakeSupervisord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'getppid', lambda: 7)
    supervisord.log = exited('web', FOUR) + STARTED + spawned('web', 10) + exited('web', THREE)
    assert supervisord.find() == THREE
    assert supervisord.count('getAllProcessInfo') == 0
    supervisord.add('other', 'web', 9)
    supervisord.log = STARTED + spawned('web', 9) + spawned('web', 10) + exited('web', THREE)
    assert supervisord.find() == THREE      # no other exit
    assert supervisord.count('getAllProcessInfo') == 0


def test_process_of_the_same_name_that_has_been_removed(
        supervisord: FakeSupervisord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'getppid', lambda: 7)
    supervisord.log = STARTED + spawned('web', 9) + spawned('web', 10) + exited('web', FOUR) + exited('web', THREE)
    assert supervisord.find() == ''


def test_log_that_was_rotated_while_the_event_waited(supervisord: FakeSupervisord) -> None:
    logged = time.mktime(time.strptime(STAMP[:19], '%Y-%m-%d %H:%M:%S'))
    reader = supervisord.make_reader()

    def find(program: str, since: float) -> str:
        return reader.read(program, program, '10', False, since).reason

    supervisord.log = exited('db', FOUR)
    assert find('db', logged - 9) == FOUR       # has not waited
    supervisord.log += exited('web', THREE)
    assert find('web', logged - 9) == THREE
    supervisord.log = exited('web', FOUR)
    assert find('web', logged - 9) == ''        # perhaps that of the process after it
    assert find('web', logged + 9) == FOUR      # the log goes back to when none waited
    supervisord.failures['readLog'] = [Unknown('no answer')]
    assert find('web', logged - 1) == ''
    supervisord.failures.clear()
    assert find('web', logged - 1) == ''


def test_log_is_read_again_for_a_name_that_is_in_several_groups(supervisord: FakeSupervisord) -> None:
    supervisord.add('other', 'web', 9)
    supervisord.log = spawned('web', 9) + spawned('web', 10) + exited('web', THREE)
    reader = supervisord.make_reader()
    assert reader.read('web', 'web', '10', False).reason == THREE
    supervisord.infos['other:web']['pid'] = 0
    supervisord.log += exited('web', FOUR)
    assert reader.read('web', 'web', '10', False).reason == ''
    assert supervisord.count('readLog') == 2


# The other process with that name, as supervisord describes it; the log before and after the start of the one that
# crashed with status 3, while another has exited with status 4.
OTHERS: list[tuple[str, dict[str, Any], str, str]] = [
    ('has been running since before', {'pid': 9}, spawned('web', 9), THREE),
    ('was started before the log begins', {'pid': 9, 'start': 100}, '', THREE),
    ('has never been started', {'pid': 0, 'start': 0}, '', THREE),
    ('has exited', {'pid': 0}, spawned('web', 9), ''),
    ('was started afterwards', {'pid': 12}, spawned('web', 9), ''),
    ('was started since the log was read', {'pid': 77, 'start': 999}, spawned('web', 9), ''),
]


@pytest.mark.parametrize(('info', 'before', 'reason'), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_process_of_the_same_name_in_another_group(
        supervisord: FakeSupervisord, info: dict[str, Any], before: str, reason: str) -> None:
    supervisord.add('other', 'web', **info)
    supervisord.log = before + spawned('web', 10) + exited('web', THREE) + spawned('web', 12) + exited('web', FOUR)
    assert supervisord.find() == reason


def test_process_of_the_same_name_and_no_start_in_the_log(supervisord: FakeSupervisord) -> None:
    supervisord.add('other', 'web', 9)
    supervisord.log = exited('web', THREE)
    assert supervisord.find() == ''


@given(st.integers(0, 10 ** 9))
def test_no_process_is_given_the_exit_of_another(seed: int) -> None:
    """Random histories of up to three processes of one name; each crash is looked into a little later."""
    dice = random.Random(seed)
    supervisord = FakeSupervisord()
    groups = ['a', 'b', 'c'][:dice.choice([1, 1, 2, 3])]
    for group in groups:
        supervisord.add(group, 'web', 0, 0)
    logs_starts = dice.random() < 0.7
    if dice.random() < 0.5:
        supervisord.log = f'{STAMP} INFO supervisord started with pid {os.getppid()}\n' if logs_starts else ''
    crashes: list[tuple[str, int, str, int]] = []
    pid = 100
    found = 0
    reader = supervisord.make_reader()
    for step in range(60):
        supervisord.now += dice.choice([0, 0.01, 1, 20])
        info = supervisord.infos[f'{dice.choice(groups)}:web']
        if not info['pid']:
            pid += 1
            info.update(pid=pid, start=int(supervisord.now))
            supervisord.log += spawned('web', pid) if logs_starts else ''
        else:
            reason = f'exit status {dice.randrange(4)}'
            how = dice.choice(['crash', 'crash', 'expected', 'too quickly', 'stopped'])
            if how == 'stopped':
                supervisord.log += f'{STAMP} WARN stopped: web ({reason})\n'
            elif how != 'expected' or logs_starts:
                supervisord.log += exited('web', reason, how == 'expected')
            if how == 'crash':
                crashes.append((info['group'], info['pid'], reason, step + dice.choice([0, 0, 0, 2])))
            info['pid'] = 0
        for other in supervisord.infos.values():
            other['now'] = int(supervisord.now)
        while crashes and crashes[0][3] <= step:
            group, crashed, reason, _ = crashes.pop(0)
            answer = reader.read(group, 'web', str(crashed), False).reason
            assert answer in ('', reason), supervisord.log
            found += answer == reason
            if len(groups) == 1 and logs_starts:
                assert answer == reason, supervisord.log


@pytest.mark.parametrize(('spawn_error', 'reason'), [
    ("can't find command '/opt/x'", "can't find command '/opt/x'"),
    (TOO_QUICKLY, f'{TOO_QUICKLY}: {THREE}'),
    ('', ''),
])
def test_reason_why_supervisord_gave_up(supervisord: FakeSupervisord, spawn_error: str, reason: str) -> None:
    supervisord.add('web', 'web', spawnerr=spawn_error)
    supervisord.log = exited('web', FOUR) + exited('web', THREE)
    assert supervisord.find(pid='') == reason


def test_reason_why_supervisord_gave_up_without_its_log(supervisord: FakeSupervisord) -> None:
    supervisord.add('web', 'web', spawnerr=TOO_QUICKLY)
    assert supervisord.find(pid='') == TOO_QUICKLY
    supervisord.failures['readLog'] = [Refused('NO_FILE', 'NO_FILE')]
    assert supervisord.find(pid='') == TOO_QUICKLY


@pytest.mark.parametrize('traceback_bytes', range(1200, 1212))
@pytest.mark.parametrize('letter', ['é', '日', '😀'])
def test_log_that_begins_within_a_character(supervisord: FakeSupervisord, monkeypatch: pytest.MonkeyPatch, letter: str,
                                            traceback_bytes: int) -> None:
    def call(method: str, *arguments: Any) -> Any:
        try:
            return FakeSupervisord.call(supervisord, method, *arguments)
        except UnicodeDecodeError as why:
            supervisord.log += 'x' * (traceback_bytes - 1) + '\n'
            raise HttpError('answered readLog with 500 Internal Server Error') from why
    monkeypatch.setattr(supervisord, 'call', call)
    for cut_bytes in range(4):
        supervisord.log = letter * 30000 + '\n' + 'x' * cut_bytes + '\n' + spawned('web', 10) + exited('web', THREE)
        assert supervisord.find() == THREE


@pytest.mark.parametrize(('failure', 'line'), [
    (Refused('NO_FILE', 'NO_FILE'), NO_LOG),
    (Refused('FAILED', 'FAILED'), NO_LOG),
    (Refused('BAD_ARGUMENTS', 'BAD_ARGUMENTS'), 'unable to determine why a process exited: BAD_ARGUMENTS'),
    (Unknown('supervisord does not answer'), 'unable to determine why a process exited: supervisord does not answer'),
    (HttpError('answered with 500'), 'unable to determine why a process exited: answered with 500'),
    (Refused('SHUTDOWN_STATE', 'SHUTDOWN_STATE'), ''),
])
def test_log_that_cannot_be_read_is_reported_once(supervisord: FakeSupervisord, failure: Exception, line: str) -> None:
    supervisord.failures['readLog'] = [failure] * 100
    reader = supervisord.make_reader()
    for _ in range(3):
        assert reader.read('web', 'web', '10', False).reason == ''
    assert supervisord.lines == [line] * bool(line)
    assert supervisord.count('readLog') == 3 * (len(crashlog.WINDOWS_BYTES) if isinstance(failure, HttpError) else 1)


# How long an event may wait.

def test_late_answer_is_used_and_followed_by_a_pause(supervisord: FakeSupervisord) -> None:
    supervisord.log = spawned('web', 10) + exited('web', THREE)
    reader = supervisord.make_reader()
    reader.read('web', 'web', '10', False)
    supervisord.log += spawned('web', 11) + exited('web', FOUR)
    supervisord.delay_seconds = 1.5
    assert reader.read('web', 'web', '11', False).reason == FOUR
    supervisord.log += spawned('web', 12) + exited('web', KILLED)
    calls = len(supervisord.calls)
    supervisord.now += 50
    assert reader.read('web', 'web', '12', False).reason == ''
    assert len(supervisord.calls) == calls
    assert supervisord.lines == [
        'unable to determine why a process exited: supervisord is not asked for 1m after a late answer']
    supervisord.now += 10
    supervisord.delay_seconds = 0.001
    assert reader.read('web', 'web', '12', False).reason == KILLED


def test_crash_waits_two_seconds_for_all_calls_together(supervisord: FakeSupervisord) -> None:
    supervisord.delay_seconds = 0.9
    calls = Calls({}, supervisord, lambda: supervisord.now)  # type: ignore[arg-type]
    calls.begin()
    for _ in range(3):
        calls.call('readLog', -10, 0)
    with pytest.raises(Unknown, match=r'^supervisord did not answer within 2s$'):
        calls.call('readLog', -10, 0)
    calls.begin()
    calls.call('readLog', -10, 0)


def test_each_call_has_the_time_that_is_left() -> None:
    timeouts: list[float] = []
    supervisord = FakeSupervisord()
    supervisord.delay_seconds = 0.5

    def make(environment: object, timeout_seconds: float) -> FakeSupervisord:
        timeouts.append(timeout_seconds)
        return supervisord
    calls = Calls({}, make, lambda: supervisord.now)  # type: ignore[arg-type]
    calls.begin()
    for _ in range(3):
        calls.call('readLog', -10, 0)
    assert timeouts == [2.0, 1.5, 1.0]


def test_processes_that_could_not_be_read_at_start_are_read_later() -> None:
    supervisord = FakeSupervisord()
    supervisord.add('web', 'web')
    supervisord.failures['getAllProcessInfo'] = [Unknown('no answer')]
    calls = Calls({}, supervisord, lambda: supervisord.now)  # type: ignore[arg-type]
    calls.begin()
    processes = Processes(calls, lambda: supervisord.now)
    processes.learn(5, None)
    assert processes.find_paths('web:web') is None
    processes.refresh(supervisord.now)
    assert processes.find_paths('web:web') == {'stdout': '', 'stderr': ''}


def test_prepare_reads_the_processes_only_for_tail(supervisord: FakeSupervisord) -> None:
    supervisord.make_reader().prepare(5)
    assert supervisord.calls == []
    supervisord.make_reader(5).prepare(5)
    assert supervisord.calls == [('getAllProcessInfo',)]


def test_windows_are_within_a_log_of_64_kilobytes() -> None:
    assert max(crashlog.WINDOWS_BYTES) == 65536
