"""The checks at start: what is found, when it is logged, and when supervisord is asked again."""
from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Callable, Container, Sequence

import pytest
from table import for_each

from superlance.listener import ExitRequest
from superlance.options import EVERY, Name, parse_name
from superlance.rpc import Process, Refused, State, Unknown
from superlance.startcheck import (
    Config,
    StartCheck,
    Wants,
    check_logs,
    check_once,
    check_stop_time,
    find_config_problems,
    find_hidden,
    find_local_problems,
    find_log_problem,
    find_own,
    find_watched,
)

NO_PID = 2 ** 30    # above any kernel's limit


def make_config(namespec: str, **values: Any) -> Config:
    group, _, program = namespec.partition(':')
    return {'group': group, 'name': program, 'stopwaitsecs': 10, 'command': 'sleep 1000', 'redirect_stderr': False,
            'stdout_logfile': '/nonexistent/out.log', 'stdout_syslog': False,
            'stderr_logfile': '/nonexistent/err.log', 'stderr_syslog': False, **values}


CONFIGS = [make_config('listener:listener', command='/opt/bin/memmon -a 1GB'), make_config('web:web'),
           make_config('pool:pool_0'), make_config('pool:pool_1'), make_config('shop:db')]
OWN = 'listener', 'listener'


def make_process(namespec: str, pid: int) -> Process:
    group, _, program = namespec.partition(':')
    return Process(group, program, pid, State.RUNNING, 'RUNNING', 1, 2, '')


def parse_names(*texts: str) -> list[Name]:
    return [EVERY if text == 'EVERY' else parse_name(text) for text in texts]


# Without supervisord.

def test_no_wants_are_no_problem() -> None:
    assert find_local_problems(Wants()) == []


def test_warnings_of_the_command_line_and_the_mail_command() -> None:
    wants = Wants(warnings=['ignored argument'], find_problems=lambda: ['no such mail command', ''])
    assert [problem.line for problem in find_local_problems(wants)] == [
        'warning: ignored argument', 'warning: no such mail command']
    assert not any(problem.fatal for problem in find_local_problems(wants))


# With supervisord's configuration.

@for_each('names, lines', [
    (['EVERY', 'web', 'web:web', 'web:*', 'pool_1'], []),
    (['wbe'], ['warning: no process matches "wbe"']),
    (['wbe', 'wbe'], ['warning: no process matches "wbe"']),
    (['shop:web', 'none:*'], ['warning: no process matches "shop:web"', 'warning: no process matches "none:*"']),
    (['shop:pool', 'web', 'wbe'], ['warning: no process matches "shop:pool"', 'warning: no process matches "wbe"']),
    (['web,db'], ['warning: no process matches "web,db": write -p once for each name']),
    (['pool'], ['no process is named "pool"; using all processes of group "pool"']),
    (['pool:*', 'shop'], ['no process is named "shop"; using all processes of group "shop"']),
])
def test_names(names: list[str], lines: list[str]) -> None:
    problems = find_config_problems('memmon', Wants(parse_names(*names)), CONFIGS, OWN)
    assert [problem.line for problem in problems] == lines
    assert all(problem.fatal == problem.warning for problem in problems)


@pytest.mark.parametrize(('own_seconds', 'others', 'shown'), [
    (10, {'web:web': 10}, None),
    (30, {'web:web': 20}, None),
    (10, {'web:web': 11}, (11, 'web', 31)),
    (10, {'web:web': 60, 'shop:db': 90}, (90, 'shop:db', 110)),
    (10, {}, None),
])
def test_stop_time_shorter_than_that_of_a_program(
        own_seconds: int, others: dict[str, int], shown: tuple[int, str, int] | None) -> None:
    watched = [make_config(name, stopwaitsecs=seconds) for name, seconds in others.items()]
    texts = check_stop_time('memmon', watched, [make_config('listener:listener', stopwaitsecs=own_seconds)], OWN)
    if shown is None:
        assert texts == []
        return
    seconds, title, advice = shown
    assert texts == [
        f'stopwaitsecs=10 of memmon is shorter than stopwaitsecs={seconds} of {title}: if memmon is stopped while it '
        f'restarts {title}, {title} may stay down; set stopwaitsecs={advice} in [eventlistener:listener]']


def test_stop_time_is_not_checked_if_the_own_configuration_is_unknown() -> None:
    assert check_stop_time('memmon', [make_config('web:web', stopwaitsecs=60)], CONFIGS, ('', '')) == []


@pytest.mark.parametrize(('wants', 'number'), [
    (Wants([EVERY], restarts=True), 1),
    (Wants(parse_names('slow'), restarts=True), 1),
    (Wants(parse_names('web'), restarts=True), 0),
    (Wants([EVERY], restarts=False), 0),
])
def test_stop_time_is_that_of_what_may_be_restarted(wants: Wants, number: int) -> None:
    configs = [*CONFIGS, make_config('slow:slow', stopwaitsecs=60), make_config('listener:x', stopwaitsecs=99)]
    problems = find_config_problems('memmon', wants, configs, OWN)
    assert [problem.text.partition(' of memmon ')[0] for problem in problems] == ['stopwaitsecs=10'] * number


@for_each('values, stdout, stderr', [
    ({}, '', ''),
    ({'stdout_logfile': 'auto', 'stderr_logfile': 'auto'}, '', ''),
    ({'stdout_logfile': '/dev/stdout', 'stderr_logfile': '/dev/fd/2'},
     'it goes to /dev/stdout', 'it goes to /dev/fd/2'),
    ({'stdout_logfile': '/proc/self/fd/1', 'stderr_logfile': '/dev/null'},
     'it goes to /proc/self/fd/1', 'it goes to /dev/null'),
    ({'stdout_logfile': '/dev/shm/web.log'}, '', ''),
    ({'stdout_logfile': 'none', 'stderr_logfile': 'none'},
     'there is none (stdout_logfile=NONE)', 'there is none (stderr_logfile=NONE)'),
    ({'stdout_logfile': 'none', 'stdout_syslog': True}, 'it goes to syslog', ''),
    ({'stdout_logfile': 'syslog'}, 'it goes to syslog', ''),
    ({'stdout_syslog': True}, '', ''),
    ({'stderr_logfile': 'none', 'redirect_stderr': True}, '', ''),
])
def test_log_that_cannot_be_read(values: dict[str, Any], stdout: str, stderr: str) -> None:
    config = make_config('web:web', **values)
    assert (find_log_problem(config, 'stdout'), find_log_problem(config, 'stderr')) == (stdout, stderr)


def test_log_that_is_a_pipe_cannot_be_read(tmp_path: Path) -> None:
    pipe, file = tmp_path / 'pipe', tmp_path / 'file'
    os.mkfifo(pipe)
    file.touch()
    config = make_config('web:web', stdout_logfile=str(pipe), stderr_logfile=str(file))
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert (find_log_problem(config, 'stdout'), find_log_problem(config, 'stderr')) == (f'it goes to {pipe}', '')


def test_logs_with_the_same_problem_are_one_line() -> None:
    to_stdout = {'stdout_logfile': '/dev/stdout', 'redirect_stderr': True, 'stderr_logfile': 'none'}
    configs = [make_config(f'web:{number}', **to_stdout) for number in range(5)]
    lines = check_logs([*configs, make_config('x:x', stderr_logfile='none')])
    names = 'web:0, web:1, web:2 and 2 more'
    assert lines == [f'unable to read the stdout log of {names} for --tail: it goes to /dev/stdout',
                     'unable to read the stderr log of x for --tail: there is none (stderr_logfile=NONE)']
    wants = Wants(parse_names('x'), tail=True)
    problems = find_config_problems('crashmail', wants, [make_config('x:x', stderr_logfile='none')], OWN)
    assert [(problem.line, problem.fatal) for problem in problems] == [(f'warning: {lines[1]}', False)]


def test_logs_of_a_group_are_checked_even_if_a_process_has_its_name() -> None:
    """crashmail reports both."""
    configs = [make_config('x:x'), make_config('x:y', stdout_logfile='none'), make_config('z:z', stdout_logfile='none')]
    problem, = find_config_problems('crashmail', Wants(parse_names('x'), tail=True), configs, OWN)
    assert 'the stdout log of x:y for --tail' in problem.line


# Memory.

def test_hidden_processes_run_but_cannot_be_read() -> None:
    """Process 1 belongs to root: a signal to it may not be permitted, which shows that it exists."""
    processes = [make_process('a:stopped', 0), make_process('a:exited', NO_PID), make_process('a:read', os.getpid()),
                 make_process('a:init', 1), make_process('a:parent', os.getppid())]
    hidden = find_hidden(processes, {os.getpid()})
    assert [process.program for process in hidden] == ['init', 'parent']


def test_process_of_another_user_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, signum: int) -> None:
        raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'kill', kill)
    assert len(find_hidden([make_process('a:a', 5)], set())) == 1


def test_watched_processes() -> None:
    processes = [make_process(name, 1) for name in ('web:web', 'pool:pool_0', 'listener:pool')]
    titles = [process.title for process in find_watched(processes, parse_names('web', 'pool'), 'listener')]
    assert titles == ['web']     # a process is named `pool`, though it is not watched
    titles = [process.title for process in find_watched(processes[:2], parse_names('web', 'pool'), None)]
    assert titles == ['web', 'pool:pool_0']


# When a listener checks.

class FakeSupervisor:
    """Answers as supervisord would, or raises what is in errors first."""

    def __init__(self, configs: Sequence[Config] = CONFIGS, pids: dict[str, int] | None = None) -> None:
        self.configs = configs
        self.pids = pids or {}
        self.errors: list[Exception] = []
        self.calls: list[list[str]] = []
        self.interrupt: ExitRequest | None = None

    def call_in_helper(self, calls: Sequence[tuple[str]], seconds: float, interrupt: ExitRequest) -> list[Any]:
        assert seconds <= 5
        self.interrupt = interrupt
        self.calls.append([method for method, in calls])
        if self.errors:
            raise self.errors.pop(0)
        infos = [dict(zip(('group', 'name'), name.split(':')), pid=pid, state=20, statename='RUNNING', start=1, now=2)
                 for name, pid in self.pids.items()]
        return [self.configs if method == 'getAllConfigInfo' else infos for method, in calls]

    def call(self, method: str) -> Any:
        return self.call_in_helper([(method,)], 0, ExitRequest())[0]


class World:
    """A StartCheck with a fake supervisord, a fake clock and a log."""

    def __init__(self) -> None:
        self.supervisor = FakeSupervisor()
        self.now = 1000.0
        self.lines: list[str] = []
        self.request = ExitRequest()

    def make(self, wants: Wants) -> StartCheck:
        supervisor: Any = self.supervisor
        return StartCheck('memmon', wants, {'SUPERVISOR_GROUP_NAME': 'listener', 'SUPERVISOR_PROCESS_NAME': 'listener'},
                          self.lines.append, self.request, lambda: self.now, supervisor)


@pytest.fixture
def world() -> World:
    return World()


def test_problems_are_logged_once(world: World) -> None:
    check = world.make(Wants(parse_names('wbe'), warnings=['ignored argument']))
    check.run()
    for _ in range(3):
        world.now += 4000
        check.run_again()
    assert world.lines == ['warning: ignored argument', 'warning: no process matches "wbe"']
    assert world.supervisor.calls == [['getAllConfigInfo']]
    assert world.supervisor.interrupt is world.request


def test_supervisord_is_not_asked_by_a_listener_that_does_not_need_it(world: World) -> None:
    check = world.make(Wants())
    check.run()
    check.run_again()
    assert world.supervisor.calls == []


def test_supervisord_that_does_not_answer_is_logged_once_and_asked_again_later(world: World) -> None:
    world.supervisor.errors = [Unknown('supervisord requires a user name and password (401)')] * 3
    check = world.make(Wants(parse_names('wbe')))
    check.run()
    asked_at = []
    for _ in range(40):
        world.now += 30
        before = len(world.supervisor.calls)
        check.run_again()
        if len(world.supervisor.calls) > before:
            asked_at.append(world.now - 1000)
    assert asked_at == [60, 180, 420]
    assert world.lines == ['warning: supervisord requires a user name and password (401)',
                           'warning: no process matches "wbe"']


def test_retries_are_at_most_an_hour_apart(world: World) -> None:
    world.supervisor.errors = [Unknown('no answer')] * 99
    check = world.make(Wants([EVERY]))
    check.run()
    for _ in range(1200):
        world.now += 60
        check.run_again()
    assert 20 < len(world.supervisor.calls) < 30
    assert world.lines == ['warning: no answer']


@pytest.mark.parametrize(('error', 'requested'), [
    (Refused('SHUTDOWN_STATE', 'SHUTDOWN_STATE'), False),
    (Unknown('interrupted'), True),
])
def test_shutdown_is_not_a_problem(world: World, error: Exception, requested: bool) -> None:
    world.supervisor.errors = [error]
    world.request.requested = requested
    world.make(Wants([EVERY])).run()
    assert world.lines == []


def read_pids(*pids: int) -> Callable[[float], Container[int]]:
    return lambda seconds: pids


HIDDEN = ("warning: unable to read the memory of {}: other users' processes are hidden, probably by the mount option "
          'hidepid of /proc; run memmon as root or as the user of these processes')


def test_memory_that_cannot_be_read_is_logged_when_this_begins(world: World) -> None:
    world.supervisor.pids = {'web:web': os.getppid(), 'shop:db': os.getpid(), 'listener:listener': 1}
    check = world.make(Wants(parse_names('web', 'listener'), read_pids=read_pids(os.getpid())))
    check.run()
    assert world.supervisor.calls == [['getAllConfigInfo', 'getAllProcessInfo']]
    assert world.lines == [HIDDEN.format('web')]
    check.run_again()
    processes = [make_process('web:web', os.getppid())]
    for readable in ([], [], [os.getppid()], [os.getppid()], []):
        check.report_hidden(processes, readable)
    assert world.lines == [HIDDEN.format('web')] * 2
    assert len(world.supervisor.calls) == 1


def test_memory_is_checked_at_the_first_event_if_nothing_runs_at_start(world: World) -> None:
    check = world.make(Wants([EVERY], read_pids=read_pids()))
    check.run()
    assert world.lines == []
    world.supervisor.pids = {'web:web': os.getpid()}
    check.run_again()
    assert world.supervisor.calls == [['getAllConfigInfo', 'getAllProcessInfo'], ['getAllProcessInfo']]
    assert world.lines == [HIDDEN.format('web')]
    world.now += 4000
    check.run_again()
    assert len(world.supervisor.calls) == 2


def test_memory_is_checked_again_on_request(world: World) -> None:
    world.supervisor.pids = {'web:web': os.getpid()}
    readable = [os.getpid()]
    check = world.make(Wants([EVERY], read_pids=lambda seconds: readable))
    check.run()
    assert world.lines == []
    readable.clear()
    check.check_memory_again()
    check.run_again()
    assert world.lines == [HIDDEN.format('web')]


def test_memory_of_programs_that_never_run_is_checked_less_and_less_often(world: World) -> None:
    check = world.make(Wants([EVERY], read_pids=read_pids()))
    check.run()
    for _ in range(24 * 60):
        check.run_again()
        world.now += 60
    assert len(world.supervisor.calls) < 35


def test_memory_reader_that_fails_is_a_warning(world: World) -> None:
    def fail(seconds: float) -> Container[int]:
        assert 0 < seconds <= 5
        raise Unknown('ps printed no process')

    world.supervisor.pids = {'web:web': os.getpid()}
    world.make(Wants(parse_names('wbe'), read_pids=fail)).run()
    assert world.lines == ['warning: no process matches "wbe"', 'warning: unable to read memory: ps printed no process']


def test_check_without_a_fake_asks_the_supervisord_of_the_environment(capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    check = StartCheck('memmon', Wants([EVERY]), {'SUPERVISOR_SERVER_URL': 'unix:///nonexistent.sock'}, lines.append,
                       ExitRequest())
    check.run()
    assert len(lines) == 1
    assert lines[0].startswith('warning: supervisord at unix:///nonexistent.sock does not answer getAllConfigInfo')


# --once.

def run_check_once(wants: Wants, supervisor: FakeSupervisor, **environment: str) -> list[tuple[str, bool]]:
    fake: Any = supervisor
    return [(problem.line, problem.fatal) for problem in check_once('memmon', wants, fake, environment)]


def test_once_returns_the_same_problems() -> None:
    wants = Wants(parse_names('wbe', 'web'), restarts=True, warnings=['ignored argument'])
    supervisor = FakeSupervisor([CONFIGS[0], make_config('web:web', stopwaitsecs=60)])
    problems = run_check_once(wants, supervisor)
    assert [fatal for _, fatal in problems] == [False, True, False]
    assert [line[:30] for line, _ in problems] == [
        'warning: ignored argument', 'warning: no process matches "w', 'warning: stopwaitsecs=10 of me']
    assert run_check_once(Wants(), supervisor) == []


def test_once_without_supervisord() -> None:
    supervisor = FakeSupervisor()
    supervisor.errors = [Unknown('no answer')]
    wants = Wants([EVERY], warnings=['x'])
    assert run_check_once(wants, supervisor) == [('warning: x', False), ('warning: no answer', True)]


@pytest.mark.parametrize(('command', 'environment', 'own'), [
    ('/opt/bin/memmon -a 1GB', {}, ('listener', 'listener')),
    ('python3 -m superlance.memmon -a 1GB', {}, ('listener', 'listener')),
    ('memmonitor', {}, ('', '')),
    ('', {}, ('', '')),
    ('memmon', {'SUPERVISOR_GROUP_NAME': 'a', 'SUPERVISOR_PROCESS_NAME': 'b'}, ('a', 'b')),
    ('memmon', {'SUPERVISOR_GROUP_NAME': 'a'}, ('a', '')),
])
def test_own_configuration(command: str, environment: dict[str, str], own: tuple[str, str]) -> None:
    configs = [make_config('web:web'), make_config('listener:listener', command=command)]
    assert find_own('memmon', configs, environment) == own
