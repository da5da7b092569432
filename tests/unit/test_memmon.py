"""memmon in-process: its options, which limit applies, what it decides and reports."""
from __future__ import annotations

import os
import re
from typing import Any, Callable, Sequence

import pytest
from support import NO_SUPERVISORD, acknowledge, make_event, run_in_process
from table import for_each

from superlance import __version__, mail, memmon
from superlance.listener import Event, ExitRequest
from superlance.memmon import Limit
from superlance.memory import ProcessMemory
from superlance.options import EVERY, Name, Rate, read_argv
from superlance.restart import Outcome, Result
from superlance.rpc import Process, Refused, State, Unknown

KB, MB, GB = 1024, 1024 ** 2, 1024 ** 3
TICK = Event('TICK_60', 'when:1', 'testing', 0.0)
SIZE_HELP = 'is not a size; write bytes, or a number with KB, MB, GB or TB, as in 200MB'
NAME_HELP = 'is not a process name; write program, group:program or group:*'


def make_process(namespec: str = 'web:web', pid: int = 7, state: State = State.RUNNING, uptime: int = 1) -> Process:
    group, _, program = namespec.partition(':')
    return Process(group, program, pid, state, state.name, 1000, 1000 + uptime, '')


# Options.

@for_each('text, limit', [
    ('foo=200MB', Limit(Name(None, 'foo'), 200 * MB)),
    ('foo=4096', Limit(Name(None, 'foo'), 4096)),
    ('foo=1.5g', Limit(Name(None, 'foo'), 3 * GB // 2)),
    ('foo=64KiB', Limit(Name(None, 'foo'), 64 * KB)),
    (' foo = 1 KB ', Limit(Name(None, 'foo'), KB)),
    ('foo:bar=1kb', Limit(Name('foo', 'bar'), KB)),
    ('foo:*=1TB', Limit(Name('foo', None), 1024 * GB)),
    ('foo:=1m', Limit(Name('foo', None), MB)),
    ('a=b=1MB', Limit(Name(None, 'a=b'), MB)),
    ('a,b=1MB', Limit(Name(None, 'a,b'), MB)),
    ('größe=1MB', Limit(Name(None, 'größe'), MB)),
])
def test_program_limit(text: str, limit: Limit) -> None:
    assert memmon.parse_program_limit(text) == limit


@pytest.mark.parametrize(('text', 'limit'), [
    ('bar=200MB', Limit(Name('bar', None), 200 * MB)),
    (' bar = 1 KB ', Limit(Name('bar', None), KB)),
    ('größe=0', Limit(Name('größe', None), 0)),
])
def test_group_limit(text: str, limit: Limit) -> None:
    assert memmon.parse_group_limit(text) == limit


@pytest.mark.parametrize(('argv', 'error'), [
    (['-p', 'foo'], "option -p: 'foo' has no size; write NAME=SIZE, as in name=200MB"),
    (['--program', '=1MB'], "option --program: '=1MB' has no name; write NAME=SIZE, as in name=200MB"),
    (['-p', 'foo='], f"option -p: '' {SIZE_HELP}"),
    (['-p', 'foo=-1'], f"option -p: '-1' {SIZE_HELP}"),
    (['-p', 'foo=1PB'], f"option -p: '1PB' {SIZE_HELP}"),
    (['-p', '*=1MB'], f"option -p: '*' {NAME_HELP}"),
    (['-p', ':bar=1MB'], f"option -p: ':bar' {NAME_HELP}"),
    (['-p', 'a:b:c=1MB'], f"option -p: 'a:b:c' {NAME_HELP}"),
    (['-p', 'a=200MB,b=100MB'],
     "option -p: 'a=200MB,b=100MB' is more than one limit; write -p twice: -p a=200MB -p b=100MB"),
    (['-p', 'a=1,b=2,c=3'], "option -p: 'a=1,b=2,c=3' is more than one limit; write -p 3 times: -p a=1 -p b=2 -p c=3"),
    (['-g', 'a=1MB,b=2MB'], "option -g: 'a=1MB,b=2MB' is more than one limit; write -g twice: -g a=1MB -g b=2MB"),
    (['-g', 'bar'], "option -g: 'bar' has no size; write GROUP=SIZE, as in group=200MB"),
    (['-g', '=1MB'], "option -g: '=1MB' has no name; write GROUP=SIZE, as in group=200MB"),
    (['-g', ' =1MB'], "option -g: ' ' is not a group name; write GROUP=SIZE, as in group=200MB"),
    (['-g', 'bar:*=1MB'], "option -g: 'bar:*' is not a group name; write GROUP=SIZE, as in group=200MB"),
    (['-g', 'bar=x'], f"option -g: 'x' {SIZE_HELP}"),
    (['-a', 'foo=1MB'], f"option -a: 'foo=1MB' {SIZE_HELP}"),
    (['-a', '-1'], f"option -a: '-1' {SIZE_HELP}"),
    (['-a', '1MB', '--samples=0'], "option --samples: '0' is not a count; write a whole number, at least 1"),
    (['-a', '1MB', '--max-restarts=3'], "option --max-restarts: '3' is not a rate; write N/TIME, as in 3/1h"),
    (['-a', '1MB', '-u', 'soon'],
     "option -u: 'soon' is not a time; write seconds, or a number with s, m, h or d, as in 10m"),
    ([], 'nothing to watch; give -p, -g or -a, as in -a 200MB'),
    (['stray'], 'nothing to watch; give -p, -g or -a, as in -a 200MB'),
    (['-m', 'bob@example.com'], 'nothing to watch; give -p, -g or -a, as in -a 200MB'),
    (['--once'], 'nothing to watch; give -p, -g or -a, as in -a 200MB'),
])
def test_bad_options_are_one_line_and_exit_status_2(
        argv: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert memmon.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err == f"memmon: {error}; try 'memmon --help'\n"
    assert printed.out == ''


def build(*argv: str) -> memmon.Options:
    return memmon.build_options(*read_argv(argv, memmon.OPTIONS))


def test_options_by_default() -> None:
    options = build('-a', '1MB')
    assert options == memmon.Options(
        limits=(Limit(EVERY, MB),), cumulative=False, uptime_seconds=None, name=None, samples=1, max_restarts=None,
        dry_run=False, verbose=False, mail=options.mail, once=False, configuration=None, warnings=())
    assert options.mail.recipients == ()


@for_each('argv, field, value', [
    (['-c'], 'cumulative', True),
    (['--cumulative'], 'cumulative', True),
    (['-u', '90'], 'uptime_seconds', 90),
    (['--uptime=2h'], 'uptime_seconds', 7200),
    (['-n', 'db1'], 'name', 'db1'),
    (['--name=db1'], 'name', 'db1'),
    (['-n', ''], 'name', None),
    (['--samples=3'], 'samples', 3),
    (['--max-restarts=3/1h'], 'max_restarts', Rate(3, 3600)),
    (['--dry-run'], 'dry_run', True),
    (['-v'], 'verbose', True),
    (['--verbose'], 'verbose', True),
    (['--once'], 'once', True),
    (['--configuration=x.conf'], 'configuration', 'x.conf'),
    (['-p', 'a=1', '--program=b=2', '-g', 'c=3', '--groupname=d=4', '--group=e=5', '--any=6'], 'limits',
     (Limit(Name(None, 'a'), 1), Limit(Name(None, 'b'), 2), Limit(Name('c', None), 3), Limit(Name('d', None), 4),
      Limit(Name('e', None), 5), Limit(EVERY, MB), Limit(EVERY, 6))),
    (['-n', ''], 'warnings', ('ignored option -n: its value is empty',)),
    (['web', 'smtp://robot:secret@host'], 'warnings', tuple(
        f'ignored argument {word!r}: memmon takes options only; a value that contains spaces needs quotes'
        for word in ('web', 'smtp://robot:***@host'))),
])
def test_each_option_has_its_field(argv: list[str], field: str, value: Any) -> None:
    assert getattr(build('-a', '1MB', *argv), field) == value


def test_mail_options() -> None:
    settings = build('-a', '1MB', '-m', 'a@b.c, d@e.f', '--email=g@h.i', '-s', 'true', '--from=x@y.z').mail
    assert settings.recipients == ('a@b.c', 'd@e.f', 'g@h.i')


@pytest.mark.parametrize(('argv', 'text'), [
    (['-a', '200MB'], 'restarts everything over 200.0MB'),
    (['-a', '1', '-a', '1GB', '-p', 'web=200MB'], 'restarts web over 200.0MB, everything else over 1.0GB'),
    (['-p', 'web=1KB', '-p', 'shop:web=2KB', '-g', 'db=3KB', '-p', 'web=4KB'],
     'restarts web over 4.0KB, shop:web over 2.0KB, db:* over 3.0KB'),
    (['-a', '1KB', '-c', '--samples=3', '--max-restarts=1/90', '--dry-run'],
     'dry run, would restart everything over 1.0KB; child processes included; after 3 ticks in a row; '
     'at most 1 restart of a process in 1m 30s'),
])
def test_first_line_of_the_log(argv: list[str], text: str) -> None:
    options = build(*argv)
    assert memmon.describe_options(options) == f'memmon {__version__}: {text}; {mail.describe(options.mail)}'


def test_first_line_of_the_log_names_the_uptime_for_mail() -> None:
    assert memmon.describe_options(build('-a', '1KB', '-u', '5m')).endswith(
        '; mail about a restart only if the uptime was at most 5m')


# Decide.

# Groups `bar` and `foo` both have a process `foo`; `pool` has numprocs=2; `x` is a process in group `y`.
PROCESSES = [make_process(name) for name in (
    'bar:foo', 'bar:db', 'foo:foo', 'pool:pool_0', 'pool:pool_1', 'y:x', 'x:other')]


@for_each('argv, namespec, limit_bytes', [
    (['-a', '1'], 'bar:foo', 1),
    (['-a', '1', '-a', '2'], 'bar:foo', 2),
    (['-g', 'bar=3', '-a', '1'], 'bar:foo', 3),
    (['-p', 'bar:*=4', '-a', '1'], 'bar:foo', 4),
    (['-g', 'bar=3', '-g', 'bar=5', '-a', '9'], 'bar:foo', 5),
    (['-g', 'bar=3', '-p', 'bar:*=4'], 'bar:foo', 3),           # groups come after programs
    (['-p', 'foo=6', '-g', 'bar=3', '-a', '1'], 'bar:foo', 6),
    (['-p', 'foo=6', '-p', 'bar:*=4'], 'bar:foo', 6),
    (['-p', 'foo=6', '-p', 'foo=7'], 'bar:foo', 7),
    (['-p', 'bar:foo=8', '-p', 'foo=6', '-g', 'bar=3', '-a', '1'], 'bar:foo', 8),
    (['-p', 'bar:foo=8', '-p', 'bar:foo=0', '-p', 'foo=6'], 'bar:foo', 0),
    (['-p', 'foo=999', '-p', 'bar:foo=8'], 'bar:foo', 8),
    (['-p', 'foo:bar=1', '-g', 'foo=1', '-p', 'foo:*=1', '-p', 'foo:foo=1'], 'bar:foo', None),
    (['-p', 'Foo=1', '-p', 'fo=1', '-g', 'ba=1'], 'bar:foo', None),
    # A name that only a group has.
    (['-p', 'pool=1'], 'pool:pool_1', 1),
    (['-p', 'pool=1', '-a', '2'], 'pool:pool_1', 1),
    (['-p', 'pool=1', '-p', 'pool=2'], 'pool:pool_1', 2),
    (['-p', 'pool=1', '-p', 'pool_1=2'], 'pool:pool_1', 2),
    (['-p', 'pool_1=2', '-p', 'pool=1'], 'pool:pool_1', 2),
    (['-p', 'pool:pool_1=2', '-p', 'pool=1'], 'pool:pool_1', 2),
    (['-p', 'pool=1', '-g', 'pool=2'], 'pool:pool_1', 2),
    (['-p', 'pool:*=2', '-p', 'pool=1'], 'pool:pool_1', 2),     # the explicit one, though it is not the last
    (['-p', 'bar=1'], 'bar:foo', 1),
    (['-p', 'bar=1', '-p', 'foo=2'], 'bar:foo', 2),
    (['-p', 'x=1'], 'y:x', 1),
    (['-p', 'x=1'], 'x:other', None),                           # a process has that name
])
def test_the_most_specific_limit_applies(argv: list[str], namespec: str, limit_bytes: int | None) -> None:
    limits = memmon.resolve_limits(build(*argv).limits, PROCESSES)
    group, _, program = namespec.partition(':')
    assert memmon.find_limit(limits, group, program) == limit_bytes


@for_each('process, used_bytes, limit_bytes, verdict', [
    (make_process(), 2, 1, memmon.OVER),
    (make_process(), 1, 1, 'ok'),
    (make_process(), 2, None, 'not watched'),
    (make_process(), None, 1, 'unable to read its memory'),
    (make_process(state=State.STOPPING), 2, 1, 'over its limit: left alone (STOPPING)'),
    (make_process(state=State.STOPPING), 1, 1, 'ok'),
    (make_process(pid=0, state=State.EXITED), None, 1, 'not running (EXITED)'),
])
def test_verdict(process: Process, used_bytes: int | None, limit_bytes: int | None, verdict: str) -> None:
    assert memmon.decide(process, used_bytes, limit_bytes) == verdict


@pytest.mark.parametrize(('used', 'limit', 'text'), [
    (5 * MB, None, '5.0MB, no limit'),
    (5 * MB, 4 * MB, '5.0MB, over its limit of 4.0MB'),
    (5 * MB, 5 * MB, '5.0MB, within its limit of 5.0MB'),
    (5 * MB, 6 * MB, '5.0MB, within its limit of 6.0MB'),
])
def test_memory_in_words(used: int, limit: int | None, text: str) -> None:
    assert memmon.describe(used, limit) == text


# Act and report, with doubles for supervisord, ps and the mail.

class Doubles:
    """A supervisord with some processes, the memory that ps would report, and what a listener did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processes = [make_process(f'{name}:{name}', pid) for pid, name in enumerate(('web', 'db', 'own'), 5)]
        self.used_bytes = {5: 2 * KB, 6: 2 * KB, 7: 2 * KB}
        self.lists = 0
        self.error: Exception | None = None
        self.restarted: list[str] = []
        self.mails: list[tuple[str, str]] = []
        self.request = ExitRequest()
        self._monkeypatch = monkeypatch

    def make(self, *argv: str, restarts: bool = False) -> memmon.Memmon:
        """Return a listener; restarts: its restarter is the real one."""
        listener = memmon.Memmon(build(*argv), {'SUPERVISOR_GROUP_NAME': 'own'}, self.request)
        for attribute, double in (('_supervisor', self), ('_read_memory', self._read_memory), ('_outbox', self)):
            self._monkeypatch.setattr(listener, attribute, double)
        if not restarts:
            self._monkeypatch.setattr(listener._restarter, 'restart', self._restart)
        self._monkeypatch.setattr(listener._start_check, 'run_again', lambda: None)
        return listener

    def get_processes(self) -> list[Process]:
        self.lists += 1
        if self.error:
            raise self.error
        return self.processes

    def get_processes_in_helper(self, seconds: float, interrupt: ExitRequest) -> list[Process]:
        assert interrupt is self.request
        return self.get_processes()

    def _read_memory(self) -> dict[int, ProcessMemory]:
        return {pid: ProcessMemory(1, used_bytes) for pid, used_bytes in self.used_bytes.items()}

    def _restart(self, process: Process) -> None:
        self.restarted.append(process.program)

    def use_for_once(self, monkeypatch: pytest.MonkeyPatch,
                     read_memory: Callable[[], dict[int, ProcessMemory]] | None = None) -> None:
        """Let memmon --once find this supervisord and its memory."""
        configs = [{'group': process.group, 'name': process.program} for process in self.processes]
        monkeypatch.setattr(self, 'call', lambda method: configs, raising=False)
        monkeypatch.setattr(memmon, 'find_supervisor', lambda configuration, environment: self)
        monkeypatch.setattr(memmon, 'MemoryReader', lambda log: read_memory or self._read_memory)

    def put(self, subject: str, body: str, server: str) -> None:
        self.mails.append((subject, body))

    def close(self) -> None:
        self.mails.append(('closed', ''))


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Doubles:
    return Doubles(monkeypatch)


@pytest.mark.parametrize(('argv', 'restarted'), [
    (['-a', '1KB'], ['web', 'db']),
    (['-a', '2KB'], []),
    (['-a', '2047'], ['web', 'db']),
    (['-g', 'db=1KB'], ['db']),
    (['-p', 'own=1KB'], []),
])
def test_processes_over_their_limit_are_restarted_but_not_the_own_pool(
        doubles: Doubles, argv: list[str], restarted: list[str]) -> None:
    doubles.make(*argv).handle(TICK)
    assert doubles.restarted == restarted


def test_events_other_than_ticks_are_ignored(doubles: Doubles) -> None:
    doubles.make('-a', '1KB').handle(Event('PROCESS_STATE_EXITED', '', '', 0.0))
    assert doubles.lists == 0


@pytest.mark.parametrize('error', [Unknown('no answer'), Refused('SHUTDOWN_STATE', 'SHUTDOWN_STATE')])
@pytest.mark.parametrize('requested', [False, True])
def test_process_list_that_cannot_be_read_is_logged_unless_the_listener_exits(
        doubles: Doubles, error: Exception, requested: bool, capfd: pytest.CaptureFixture[str]) -> None:
    doubles.error = error
    doubles.request.requested = requested
    doubles.make('-a', '1KB').handle(TICK)
    assert doubles.restarted == []
    assert capfd.readouterr().err.count(f'memmon: unable to check memory: {error}\n') == (not requested)


def test_samples_are_counted_in_a_row_per_process_and_pid(doubles: Doubles) -> None:
    listener = doubles.make('-a', '1KB', '--samples=2')
    restarted = []
    for web, db in [(2, 2), (2, 1), (1, 2), (2, 2), (2, 1)]:
        doubles.used_bytes.update({5: web * KB, 6: db * KB})
        listener.handle(TICK)
        restarted.append(list(doubles.restarted))
    assert restarted == [[], ['web'], ['web'], ['web', 'db'], ['web', 'db', 'web']]
    doubles.used_bytes[5] = 2 * KB
    listener.handle(TICK)
    doubles.processes[0] = make_process('web:web', 8)   # a new process has a count of its own
    doubles.used_bytes = {8: 2 * KB}
    listener.handle(TICK)
    assert doubles.restarted == ['web', 'db', 'web']


def test_verbose_logs_every_process_also_of_the_own_pool(
        doubles: Doubles, capfd: pytest.CaptureFixture[str]) -> None:
    doubles.processes += [make_process('shop:off', 0, State.STOPPED), make_process('shop:gone', 2 ** 30)]
    doubles.make('-p', 'web=4KB', '-v').handle(TICK)
    lines = [line.partition('memmon: ')[2] for line in capfd.readouterr().err.splitlines()]
    assert lines == ['web (pid 5: 2.0KB, within its limit of 4.0KB)', 'db (pid 6: 2.0KB, no limit)',
                     'own (pid 7: 2.0KB, no limit)']


def test_supervisord_is_asked_once_about_a_process_over_the_smallest_limit(doubles: Doubles) -> None:
    listener = doubles.make('-p', 'db=1KB', '-p', 'web=3KB', '-g', 'none=1')
    doubles.used_bytes = {5: 2 * KB, 99: 5 * KB, 6: 1}
    for _ in range(3):
        listener.handle(TICK)
    assert (doubles.lists, doubles.restarted) == (1, [])
    doubles.used_bytes[98] = 5 * KB         # another process
    listener.handle(TICK)
    assert (doubles.lists, doubles.restarted) == (2, [])
    doubles.used_bytes[5] = 4 * KB          # beyond its own limit
    listener.handle(TICK)
    assert (doubles.lists, doubles.restarted) == (3, ['web'])


def test_supervisord_is_asked_again_about_a_pid_with_another_parent_and_after_an_hour(doubles: Doubles) -> None:
    listener = doubles.make('-a', '1KB')
    listener._known = {(5, 1): None}
    used = {5: 2 * KB}
    assert not listener._may_be_over({5: ProcessMemory(1, 2 * KB)}, used)
    assert listener._may_be_over({5: ProcessMemory(2, 2 * KB)}, used)
    listener._known_since -= memmon.FORGET_SECONDS + 1
    assert listener._may_be_over({5: ProcessMemory(1, 2 * KB)}, used)


def test_pid_0_of_ps_is_not_a_stopped_process(doubles: Doubles) -> None:
    """A stopped process has pid 0, and so has the kernel on a BSD."""
    doubles.processes = [make_process(pid=0, state=State.STOPPED)]
    doubles.used_bytes = {0: GB}
    doubles.make('-a', '1KB').handle(TICK)
    assert doubles.restarted == []


def test_memory_is_checked_again_when_supervisord_disappears_from_ps(
        doubles: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a remount of /proc with hidepid."""
    listener = doubles.make('-a', '1GB')
    checks: list[bool] = []
    monkeypatch.setattr(listener._start_check, 'check_memory_again', lambda: checks.append(True))
    for visible, expected in [(False, 0), (True, 0), (False, 1), (False, 1), (True, 1), (False, 2)]:
        doubles.used_bytes = {os.getppid(): KB} if visible else {}
        listener.handle(TICK)
        assert len(checks) == expected


def test_first_lines_of_the_log_and_the_protocol() -> None:
    ticks = make_event('TICK_5', 'when:1') * 2 + make_event('PROCESS_STATE_EXITED', '')
    run = run_in_process(lambda: memmon.main(['-p', 'web=2TB', '-a', '1TB', 'stray', '-n', '']), ticks)
    assert (run.status, run.output) == (0, acknowledge(3))
    lines = [line.partition(' memmon: ')[2] for line in run.log.splitlines()]
    assert lines[:3] == [
        f'memmon {__version__}: restarts web over 2048.0GB, everything else over 1024.0GB; no mail',
        "warning: ignored argument 'stray': memmon takes options only; a value that contains spaces needs quotes",
        'warning: ignored option -n: its value is empty']
    assert lines[3].startswith(f'warning: supervisord at {NO_SUPERVISORD} does not answer getAllConfigInfo: ')
    assert len(lines) == 4


def test_stale_tick_and_tick_after_a_retry_check_nothing(doubles: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = doubles.make('-a', '1KB')
    for method in ('is_stale', 'retry'):
        with monkeypatch.context() as patch:
            patch.setattr(listener._restarter, method, lambda *event: True)
            listener.handle(TICK)
    assert doubles.lists == 0


def test_dry_run_and_restart_limit_are_reported_with_the_memory_of_each_process(doubles: Doubles) -> None:
    listener = doubles.make('-p', 'web=1KB', '-p', 'db=2KB', '--dry-run', '--max-restarts=1/1h', restarts=True)
    doubles.used_bytes = {5: 2 * KB, 6: 3 * KB, 8: 4 * KB}
    for _ in range(2):
        listener.handle(TICK)
    doubles.processes[0] = make_process('web:web', 8)
    for _ in range(2):
        listener.handle(TICK)
    lines = [(subject, re.sub(r'; .* in [^(]*', ' ', body.partition('\n')[0])) for subject, body in doubles.mails]
    assert lines == [
        ('memmon: dry run: process web:web not restarted',
         'dry run: would have restarted web (pid 5: 2.0KB, over its limit of 1.0KB)'),
        ('memmon: dry run: process db:db not restarted',
         'dry run: would have restarted db (pid 6: 3.0KB, over its limit of 2.0KB)'),
        ('memmon: process web:web left alone',
         'left web alone: restart limit reached (1 in 1h) (pid 8: 4.0KB, over its limit of 1.0KB)')]


def test_at_exit_what_was_left_down_is_started_before_the_mail_is_sent(
        doubles: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = doubles.make('-a', '1KB')
    monkeypatch.setattr(listener._restarter, 'finish', lambda: doubles.put('restarted', '', ''))
    listener.finish()
    assert [subject for subject, _ in doubles.mails] == ['restarted', 'closed']


def report(doubles: Doubles, result: Result, *argv: str, uptime: int = 10) -> list[tuple[str, str]]:
    listener = doubles.make('-a', '1KB', *argv)
    process = make_process('shop:leaky', uptime=uptime)
    listener._reasons['shop:leaky'] = 'pid 7: 2.0KB, over its limit of 1.0KB'
    listener._report(Outcome(process, result, 'some outcome'))
    return doubles.mails


@pytest.mark.parametrize(('result', 'argv', 'subject'), [
    (Result.RESTARTED, [], 'memmon: process shop:leaky restarted'),
    (Result.RESTARTED, ['-n', 'db1'], 'memmon [db1]: process shop:leaky restarted'),
    (Result.RESTARTED, ['-n', ''], 'memmon: process shop:leaky restarted'),
    (Result.STOP_FAILED, [], 'memmon: failed to stop process shop:leaky'),
    (Result.START_FAILED, [], 'memmon: failed to start process shop:leaky'),
    (Result.LEFT_ALONE, [], None),
])
def test_log_and_mail_of_an_outcome(doubles: Doubles, result: Result, argv: list[str], subject: str | None,
                                    capfd: pytest.CaptureFixture[str]) -> None:
    line = 'some outcome (pid 7: 2.0KB, over its limit of 1.0KB)'
    body = f'{line}\n\nProgram: leaky\nGroup: shop\nUptime: 10s\n'
    assert report(doubles, result, *argv) == ([(subject, body)] if subject else [])
    assert capfd.readouterr().err.endswith(f' memmon: {line}\n')


@pytest.mark.parametrize(('uptime', 'mails'), [(59, 1), (60, 1), (61, 0)])
@pytest.mark.parametrize(('result', 'is_limited'), [
    (Result.RESTARTED, True), (Result.DRY_RUN, True), (Result.STOP_FAILED, False), (Result.LIMIT_REACHED, False)])
def test_mail_of_a_restart_only_up_to_an_uptime(
        doubles: Doubles, uptime: int, mails: int, result: Result, is_limited: bool) -> None:
    assert len(report(doubles, result, '-u', '60', uptime=uptime)) == (mails if is_limited else 1)


# From the command line.

def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows: Sequence[Sequence[str]] = [('name', 'size', 'what'), ('a', '200MB', ''), ('group:program', '1', 'too much')]
    memmon.print_table(rows)
    assert capsys.readouterr().out == (
        'name           size   what\n'
        'a              200MB\n'
        'group:program  1      too much\n')


@pytest.mark.parametrize(('argv', 'status', 'last_line'), [
    (['-p', 'web=2KB', '-p', 'db=1GB'], 0, None),
    (['-p', 'web=1KB'], 1, None),
    (['-p', 'wbe=1KB'], 1, 'warning: no process matches "wbe"'),
    (['-p', 'web=1GB', '-p', 'hidden=1KB'], 1, 'warning: unable to read the memory of hidden: '),
    (['-p', 'web=1GB', 'stray'], 0, "warning: ignored argument 'stray': "),
])
def test_once_prints_a_table_and_warnings(
        doubles: Doubles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str],
        status: int, last_line: str | None) -> None:
    doubles.processes += [make_process('off:off', 0, State.STOPPED), make_process('hidden:hidden', os.getpid())]
    doubles.use_for_once(monkeypatch)
    assert memmon.main(['--once', *argv]) == status
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split(None, 5)) for line in lines[:6]] == [6] * 6
    assert [line.split()[0] for line in lines[:6]] == ['GROUP', 'web', 'db', 'own', 'off', 'hidden']
    assert lines[6:] == [] if last_line is None else lines[6].startswith(last_line)


@pytest.mark.parametrize(('error', 'line'), [
    ('processes', 'warning: unable to check memory: no answer'),
    ('memory', 'warning: unable to check memory: no ps'),
])
def test_once_that_cannot_read_the_process_list_or_memory_has_status_1(
        doubles: Doubles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        error: str, line: str) -> None:
    def read_memory() -> dict[int, ProcessMemory]:
        raise Unknown('no ps')

    doubles.error = Unknown('no answer') if error == 'processes' else None
    doubles.use_for_once(monkeypatch, read_memory)
    assert memmon.main(['--once', '-a', '1MB']) == 1
    assert capsys.readouterr().out == line + '\n'
