"""Restarts, with answers from a script in virtual time. Combinations are left to test_restart_model.py."""
from __future__ import annotations

import os
import signal
import subprocess
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Iterator

import pytest
from support import TIMEOUT, wait_for, write_script
from table import for_each

from superlance import restart
from superlance.command import find_group_members
from superlance.listener import Event, ExitRequest
from superlance.options import Rate
from superlance.restart import (
    ACCEPTED,
    COUNTED,
    LOST,
    NO_RETRY,
    SPAWN_ERROR,
    SUBJECTS,
    Outcome,
    Restarter,
    Result,
    Step,
    StoppedProcess,
    find_next_step,
)
from superlance.rpc import Process, Refused, State, Supervisor, Unknown, make_process

INFO: dict[str, Any] = {'group': 'g', 'name': 'web', 'pid': 100, 'state': State.RUNNING, 'statename': 'RUNNING',
                        'start': 1000, 'now': 1060, 'spawnerr': ''}
LOST_CALL = Unknown('lost')
RETRY = '; will retry'
IF_IT_STOPS = '; will be started again if it stops'
QUICK = 'Exited too quickly'


def became(state: State, **changes: Any) -> dict[str, Any]:
    return {**INFO, 'state': state, 'statename': state.name, 'pid': 0, **changes}


def refused(fault: str) -> Refused:
    return Refused(fault, f'{fault}: g:web')


STOPPED = became(State.STOPPED)
STARTING = became(State.STARTING, pid=101, start=1060)
RUNNING = became(State.RUNNING, pid=101, start=1060)
STOPPING = became(State.STOPPING, pid=100)
FATAL = became(State.FATAL, start=1060, spawnerr=QUICK)
BACKOFF = became(State.BACKOFF, start=1060, spawnerr=QUICK)


class Clock:
    """A clock whose time passes only in sleep."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Scripted(Supervisor):
    """Answers each method from a list, the last answer for ever; an exception is raised."""

    def __init__(self, info: list[Any] | None = None, stop: list[Any] | None = None,
                 start: list[Any] | None = None) -> None:
        super().__init__({})
        self.calls: list[str] = []
        self.answers = {'getProcessInfo': info or [INFO, RUNNING], 'stopProcess': stop or [True],
                        'startProcess': start or [True]}

    def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        answers = self.answers[method]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def count(self, method: str) -> int:
        return self.calls.count(method)


class Rig:
    """A Restarter with its clock, its supervisord, and what it has reported."""

    def __init__(self, supervisor: Supervisor, **arguments: Any) -> None:
        self.clock = Clock()
        self.outcomes: list[Outcome] = []
        self.request = ExitRequest()
        self.members: Iterator[set[int]] = repeat(set())
        self.restarter = Restarter(
            supervisor, self.outcomes.append, request=self.request, sleep=self.clock.sleep, clock=self.clock,
            wall_clock=self.clock, find_members=lambda pid: set(next(self.members)), **arguments)

    @property
    def results(self) -> list[Result]:
        return [outcome.result for outcome in self.outcomes]

    @property
    def texts(self) -> list[str]:
        return [outcome.text for outcome in self.outcomes]

    def restart(self, **changes: Any) -> None:
        self.restarter.restart(make_process({**INFO, **changes}))


# What to do next about a process that was stopped here.

@for_each('state, pid, start, step', [
    (State.RUNNING, 100, 1000, Step.UNTOUCHED),
    (State.RUNNING, 101, 1005, Step.DONE),
    (State.RUNNING, 101, 1000, Step.DONE),      # restarted within the second in which it had started
    (State.RUNNING, 100, 1005, Step.DONE),      # its pid was given out again
    (State.STARTING, 100, 1000, Step.UNTOUCHED),    # checked while it was STARTING
    (State.STARTING, 101, 1005, Step.WAIT),
    (State.STOPPING, 100, 1000, Step.WAIT),
    (State.STOPPING, 101, 1005, Step.WAIT),
    (State.BACKOFF, 0, 1005, Step.WAIT),        # supervisord will start it
    (State.STOPPED, 0, 1000, Step.START),
    (State.STOPPED, 0, 1005, Step.LEAVE),       # started since, and stopped by somebody
    (State.STOPPED, 0, 1007, Step.LEAVE),       # somebody stopped what had failed
    (State.EXITED, 0, 1000, Step.LEAVE),        # it exited by itself before the stop
    (State.EXITED, 0, 1005, Step.LEAVE),
    (State.EXITED, 0, 1007, Step.START),        # after our start that failed
    (State.FATAL, 0, 1007, Step.START),
    (State.FATAL, 0, 1005, Step.LEAVE),         # somebody else has started it since, and that failed
    (State.UNKNOWN, 0, 1005, Step.LEAVE),
])
def test_next_step_if_no_start_is_open(state: State, pid: int, start: int, step: Step) -> None:
    stopped = StoppedProcess(make_process(INFO))
    stopped.failed_start = 1007
    assert find_next_step(stopped, make_process(became(state, pid=pid, start=start))) is step


@for_each('answer, state, start, step', [
    (ACCEPTED, State.RUNNING, 1000, Step.DONE),     # whatever its pid: the start was accepted
    (LOST, State.RUNNING, 1000, Step.UNTOUCHED),
    (ACCEPTED, State.FATAL, 1005, Step.FAILED),
    (ACCEPTED, State.EXITED, 1005, Step.DONE),
    (ACCEPTED, State.STOPPED, 1000, Step.LEAVE),    # started and stopped in the second in which it was started before
    (LOST, State.FATAL, 1005, Step.FAILED),
    (LOST, State.EXITED, 1005, Step.DONE),
    (LOST, State.STOPPED, 1000, Step.START),
    (SPAWN_ERROR, State.EXITED, 1005, Step.FAILED),     # with startsecs=0
    ('NO_FILE', State.STOPPED, 1000, Step.START),
    ('NO_FILE', State.FATAL, 1007, Step.START),
    ('ALREADY_STARTED', State.FATAL, 1005, Step.LEAVE),
])
def test_next_step_after_a_start(answer: str, state: State, start: int, step: Step) -> None:
    stopped = StoppedProcess(make_process(INFO))
    stopped.failed_start, stopped.start_answer = 1007, answer
    assert find_next_step(stopped, make_process(became(state, pid=100, start=start))) is step


# One restart, and what the next tick does about it.

@pytest.mark.parametrize(('stop', 'start', 'info', 'result', 'text', 'then'), [
    pytest.param([], [], [], Result.RESTARTED, 'restarted g:web', [], id='success'),
    pytest.param([], [], [INFO, STARTING, STARTING, RUNNING], Result.RESTARTED, 'restarted g:web', [],
                 id='success after startsecs'),
    pytest.param([refused('NOT_RUNNING')], [], [], Result.LEFT_ALONE, 'left g:web alone: NOT_RUNNING: g:web', [],
                 id='exited before the stop'),
    pytest.param([refused('SHUTDOWN_STATE')], [], [], Result.LEFT_ALONE, 'left g:web alone: SHUTDOWN_STATE: g:web',
                 [], id='shutdown before the stop'),
    pytest.param([refused('FAILED')], [], [], Result.STOP_FAILED, 'failed to stop g:web: FAILED: g:web', [],
                 id='stop refused'),
    pytest.param([], [], [LOST_CALL], Result.STOP_FAILED, 'failed to stop g:web: lost', [],
                 id='no look before the stop'),
    pytest.param([], [], [refused('BAD_NAME')], Result.LEFT_ALONE, 'left g:web alone: BAD_NAME: g:web', [],
                 id='removed before the stop'),
    pytest.param([], [], [STOPPING], Result.LEFT_ALONE, 'left g:web alone: it is STOPPING', [], id='being stopped'),
    pytest.param([], [], [RUNNING], Result.LEFT_ALONE,
                 'left g:web alone: it is now RUNNING with pid 101; expected pid 100', [], id='another pid'),
    pytest.param([], [], [STOPPED], Result.LEFT_ALONE, 'left g:web alone: it is now STOPPED; expected pid 100', [],
                 id='stopped by its operator'),
    pytest.param([LOST_CALL], [], [INFO, LOST_CALL], Result.STOP_FAILED, f'failed to stop g:web: lost{IF_IT_STOPS}',
                 ['getProcessInfo'], id='stop lost, and no look after it'),
    pytest.param([LOST_CALL], [], [INFO, INFO], Result.STOP_FAILED, f'failed to stop g:web: lost{IF_IT_STOPS}',
                 ['getProcessInfo'], id='stop lost, and it runs on'),
    pytest.param([LOST_CALL], [], [INFO, STOPPING, STOPPED, RUNNING], Result.RESTARTED, 'restarted g:web', [],
                 id='answer to the stop lost'),
    pytest.param([LOST_CALL], [], [INFO, STOPPING], Result.STOP_FAILED,
                 f'failed to stop g:web: it is still STOPPING after 1m{IF_IT_STOPS}', ['getProcessInfo'],
                 id='a stop that takes minutes'),
    pytest.param([LOST_CALL], [], [INFO, became(State.EXITED)], Result.LEFT_ALONE,
                 'left g:web alone: it is now EXITED', [], id='stop lost, and exited by itself'),
    pytest.param([], [refused('SHUTDOWN_STATE')], [], Result.LEFT_ALONE, 'left g:web alone: SHUTDOWN_STATE: g:web',
                 [], id='shutdown before the start'),
    pytest.param([], [refused('BAD_NAME')], [], Result.LEFT_ALONE, 'left g:web alone: BAD_NAME: g:web', [],
                 id='removed before the start'),
    pytest.param([], [LOST_CALL], [INFO, LOST_CALL], Result.START_FAILED, f'failed to start g:web: lost{RETRY}',
                 ['getProcessInfo'], id='start lost, and no look'),
    pytest.param([], [LOST_CALL], [INFO, STOPPED], Result.START_FAILED, f'failed to start g:web: lost{RETRY}',
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='start always lost'),
    pytest.param([], [LOST_CALL, True], [INFO, STOPPED, RUNNING], Result.RESTARTED, 'restarted g:web', [],
                 id='start lost once'),
    pytest.param([], [LOST_CALL], [INFO, became(State.EXITED, start=1060)], Result.RESTARTED,
                 'restarted g:web: it is now EXITED', [], id='answer to the start lost, and exited since'),
    pytest.param([], [], [INFO, BACKOFF], Result.START_FAILED, f'failed to start g:web: {QUICK}{RETRY}',
                 ['getProcessInfo'], id='supervisord itself repeats the start'),
    pytest.param([], [], [INFO, FATAL], Result.START_FAILED, f'failed to start g:web: {QUICK}{RETRY}',
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='start failed'),
    pytest.param([], [], [INFO, FATAL, RUNNING], Result.RESTARTED, 'restarted g:web', [], id='start failed once'),
    pytest.param([], [refused('NO_FILE')], [INFO, STOPPED], Result.START_FAILED,
                 f'failed to start g:web: NO_FILE: g:web{RETRY}', ['getProcessInfo', 'startProcess', 'getProcessInfo'],
                 id='start refused'),
    pytest.param([], [refused('NO_FILE')], [INFO, became(State.STOPPED, spawnerr='old')], Result.START_FAILED,
                 f'failed to start g:web: NO_FILE: g:web{RETRY}', ['getProcessInfo', 'startProcess', 'getProcessInfo'],
                 id='an old spawn error'),
    pytest.param([], [refused('SPAWN_ERROR')], [INFO, became(State.EXITED, start=1060, spawnerr='Bad exit code 3')],
                 Result.START_FAILED, f'failed to start g:web: Bad exit code 3{RETRY}',
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='exited at once with startsecs=0'),
    pytest.param([], [refused('SPAWN_ERROR')], [INFO, {**FATAL, 'spawnerr': ''}],
                 Result.START_FAILED, f'failed to start g:web: SPAWN_ERROR: g:web{RETRY}',
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='no spawn error'),
    pytest.param([], [refused('ALREADY_STARTED')], [INFO, RUNNING], Result.RESTARTED, 'restarted g:web', [],
                 id='started by somebody'),
    pytest.param([], [refused('ALREADY_STARTED')], [INFO, FATAL], Result.LEFT_ALONE,
                 'left g:web alone: somebody else has started it, and it is now FATAL', [],
                 id='started by somebody, and failed'),
    pytest.param([], [], [INFO, became(State.STOPPED, start=1060)], Result.LEFT_ALONE,
                 'left g:web alone: somebody else has stopped it', [], id='stopped by somebody'),
    pytest.param([], [refused('FAILED')], [INFO, refused('FAILED')], Result.START_FAILED,
                 f'failed to start g:web: FAILED: g:web{RETRY}', ['getProcessInfo'], id='everything refused'),
])
def test_restart(stop: list[Any], start: list[Any], info: list[Any], result: Result, text: str,
                 then: list[str]) -> None:
    supervisor = Scripted(list(info), list(stop), list(start))
    rig = Rig(supervisor)
    rig.restart()
    assert list(zip(rig.results, rig.texts)) == [(result, text)]
    assert rig.clock.now < 1000 + 62
    # It is reported once, and looked after if it may be down.
    supervisor.calls = []
    rig.restarter.retry()
    assert len(rig.outcomes) == 1
    assert supervisor.calls == then


def test_lost_calls_are_not_repeated_at_once() -> None:
    rig = Rig(Scripted([INFO, LOST_CALL], start=[LOST_CALL]))
    rig.restart()
    assert rig.clock.now - 1000 == pytest.approx(2 * restart.POLL_SECONDS)


def test_name_with_a_percent_sign_or_braces() -> None:
    rig = Rig(Scripted(start=[Refused('BAD_NAME', 'BAD_NAME: a%b{}')]))
    rig.restart(name='a%b{}')
    assert rig.texts == ['left g:a%b{} alone: BAD_NAME: a%b{}']


def test_every_outcome_for_a_mail_has_a_subject() -> None:
    assert set(Result) - set(SUBJECTS) == {Result.LEFT_ALONE, Result.STILL_STARTING}
    assert SUBJECTS[Result.RESTARTED].format('web') == 'process web restarted'


# prepare, which writes core dumps.

def test_prepare_is_called_only_for_the_process_that_was_checked() -> None:
    supervisor = Scripted([INFO, INFO, RUNNING])
    rig = Rig(supervisor)
    prepared: list[tuple[Process, list[str]]] = []

    def prepare(process: Process) -> None:
        prepared.append((process, list(supervisor.calls)))

    rig.restarter.restart(make_process(INFO), prepare)
    assert prepared == [(make_process(INFO), ['getProcessInfo'])]
    rig.restarter.restart(make_process({**INFO, 'pid': 99}), prepare)
    assert len(prepared) == 1
    assert rig.results == [Result.RESTARTED, Result.LEFT_ALONE]


def test_process_that_changes_while_it_is_prepared_is_not_stopped() -> None:
    supervisor = Scripted([INFO, RUNNING])
    rig = Rig(supervisor)
    rig.restarter.restart(make_process(INFO), lambda process: None)
    assert rig.results == [Result.LEFT_ALONE]
    assert 'stopProcess' not in supervisor.calls


# Failed starts.

def test_failed_start_is_repeated_with_a_back_off() -> None:
    """At once, at the next tick, and then after 1, 2, 4, 8 and every 10 minutes."""
    supervisor = Scripted([INFO, STOPPED], start=[refused('NO_FILE')])
    rig = Rig(supervisor)
    rig.restart()
    assert supervisor.count('startProcess') == 2
    starts = []
    begin = rig.clock.now
    while rig.clock.now < begin + 2600:
        rig.clock.sleep(5)
        supervisor.calls = []
        rig.restarter.retry()
        starts += [rig.clock.now] * supervisor.count('startProcess')
    gaps = [round(later - earlier) for earlier, later in zip(starts, starts[1:])]
    assert starts[0] - begin < 6
    assert [gap // 60 for gap in gaps] == [1, 2, 4, 8, 10, 10]
    assert all(gap % 60 <= 5 for gap in gaps)
    assert rig.results == [Result.START_FAILED]


def test_each_new_reason_of_a_failed_start_is_reported_once() -> None:
    supervisor = Scripted([INFO, FATAL])
    rig = Rig(supervisor)
    rig.restart()
    for start, info in ((True, FATAL), (True, BACKOFF), (True, FATAL), (refused('NO_FILE'), FATAL), (True, FATAL),
                        (refused('NO_FILE'), FATAL), (True, RUNNING), (True, RUNNING)):
        supervisor.answers.update(startProcess=[start], getProcessInfo=[FATAL, info])
        rig.clock.sleep(600)
        rig.restarter.retry()
    assert rig.texts == [f'failed to start g:web: {QUICK}{RETRY}', f'failed to start g:web: NO_FILE: g:web{RETRY}',
                         'restarted g:web']


@for_each('later, text', [
    (became(State.FATAL, start=1070), 'left g:web alone: somebody else has started it, and it is now FATAL'),
    (became(State.EXITED, start=1070), 'left g:web alone: somebody else has started it, and it is now EXITED'),
    (became(State.STOPPED, start=1070), 'left g:web alone: somebody else has stopped it'),
    (became(State.STOPPED, start=1060), 'left g:web alone: somebody else has stopped it'),
    (became(State.RUNNING, start=1070, pid=102), 'restarted g:web'),
    (refused('BAD_NAME'), 'left g:web alone: BAD_NAME: g:web'),
    (refused('SHUTDOWN_STATE'), 'left g:web alone: SHUTDOWN_STATE: g:web'),
])
def test_retries_end_when_somebody_else_took_over_or_it_is_unknown(later: Any, text: str) -> None:
    supervisor = Scripted([INFO, FATAL])
    rig = Rig(supervisor)
    rig.restart()
    supervisor.calls = []
    supervisor.answers['getProcessInfo'] = [later]
    for _ in range(3):
        rig.clock.sleep(600)
        rig.restarter.retry()
    assert rig.texts[1:] == [text]
    assert supervisor.calls == ['getProcessInfo']


def test_process_that_is_still_down_is_left_to_the_retries() -> None:
    supervisor = Scripted([INFO, FATAL])
    rig = Rig(supervisor)
    rig.restart()
    supervisor.calls = []
    assert rig.restarter.restart(make_process(INFO)).text == 'left alone: an earlier restart is not complete'
    assert supervisor.calls == [] and rig.results == [Result.START_FAILED]


def test_lost_queries_are_not_failed_starts() -> None:
    """They do not delay the repetition of one that has failed."""
    supervisor = Scripted([INFO, LOST_CALL])
    rig = Rig(supervisor)
    rig.restart()
    supervisor.answers['getProcessInfo'] = [FATAL, LOST_CALL]
    rig.restarter.retry()
    supervisor.answers['getProcessInfo'] = [FATAL, RUNNING]     # two starts have failed, the third follows at once
    assert rig.restarter.retry()
    assert supervisor.count('startProcess') == 3


def test_process_that_is_left_down_is_not_restarted_again_by_a_check() -> None:
    supervisor = Scripted([INFO, FATAL])
    rig = Rig(supervisor)
    rig.restart()
    supervisor.calls = []
    rig.restart()
    assert supervisor.calls == [] and len(rig.outcomes) == 1


def test_backoff_that_becomes_fatal_is_started_at_that_tick() -> None:
    supervisor = Scripted([INFO, BACKOFF])
    rig = Rig(supervisor)
    rig.restart()
    assert rig.clock.now == pytest.approx(1000 + restart.BACKOFF_SECONDS, abs=1)
    assert not rig.restarter.retry()
    supervisor.answers['getProcessInfo'] = [FATAL, RUNNING]
    assert rig.restarter.retry()
    assert supervisor.count('startProcess') == 2
    assert rig.results == [Result.START_FAILED, Result.RESTARTED]


@pytest.mark.parametrize(('later', 'results', 'starts'), [
    ([STARTING], [], 1),
    ([RUNNING], [Result.RESTARTED], 1),
    ([FATAL, RUNNING], [Result.RESTARTED], 2),
    ([FATAL], [Result.START_FAILED], 2),
])
def test_start_longer_than_a_minute_is_not_reported_as_failed(
        later: list[Any], results: list[Result], starts: int) -> None:
    """startsecs=75, for example."""
    supervisor = Scripted([INFO, STARTING])
    rig = Rig(supervisor)
    rig.restart()
    assert rig.clock.now == pytest.approx(1000 + restart.FOLLOW_SECONDS, abs=1)
    assert rig.texts == ['g:web: started, still STARTING after 1m']
    assert rig.results[0] in COUNTED
    supervisor.answers['getProcessInfo'] = later
    rig.restarter.retry()
    assert rig.results[1:] == results
    assert supervisor.count('startProcess') == starts


@pytest.mark.parametrize(('later', 'texts', 'calls'), [
    (STOPPED, ['restarted g:web'], ['getProcessInfo', 'startProcess', 'getProcessInfo']),
    (INFO, [], ['getProcessInfo']),
])
def test_lost_stop_may_take_effect_later(later: dict[str, Any], texts: list[str], calls: list[str]) -> None:
    supervisor = Scripted([INFO, INFO, later, RUNNING], stop=[LOST_CALL])
    rig = Rig(supervisor)
    rig.restart()
    supervisor.calls = []
    for _ in range(2):
        rig.restarter.retry()
    assert rig.texts == [f'failed to stop g:web: lost{IF_IT_STOPS}', *texts]
    assert supervisor.calls == calls


@pytest.mark.parametrize(('seconds', 'results'), [
    (40, [Result.RESTARTED]), (100, [Result.STOP_FAILED, Result.RESTARTED])])
def test_slow_stop(seconds: int, results: list[Result]) -> None:
    """The answer to the stop does not come in time; the process exits later."""
    class Slow(Scripted):
        stopped_at = started_at = float('inf')

        def call(self, method: str, *arguments: Any) -> Any:
            super().call(method, *arguments)
            now = rig.clock.now
            if method == 'stopProcess':
                self.stopped_at = now + seconds
                rig.clock.now += 30
                raise LOST_CALL
            if method == 'startProcess':
                self.started_at = now
                return True
            if now >= self.started_at:
                return RUNNING
            return STOPPED if now >= self.stopped_at else STOPPING if self.calls.count('stopProcess') else INFO

    supervisor = Slow()
    rig = Rig(supervisor)
    rig.restart()
    rig.clock.sleep(10)
    rig.restarter.retry()
    assert rig.results == results
    assert supervisor.count('stopProcess') == supervisor.count('startProcess') == 1


# The limit and dry runs.

def test_max_restarts() -> None:
    supervisor = Scripted(list(chain.from_iterable(repeat([INFO, RUNNING], 9))))
    rig = Rig(supervisor, limit=Rate(2, 100))
    results: list[list[Result]] = []
    for seconds in (0, 10, 10, 10, 69, 1, 1, 9, 1):
        rig.clock.now += seconds
        rig.outcomes.clear()
        rig.restart()
        results.append(rig.results)
    restarted, limited = [Result.RESTARTED], [Result.LIMIT_REACHED]
    # At 0, 10, 20, 30, 99, 100, 101, 110 and 111 s.
    assert results == [restarted, restarted, limited, [], [], restarted, limited, restarted, limited]
    assert supervisor.count('stopProcess') == 4
    assert rig.texts == ['left g:web alone: restart limit reached (2 in 1m 40s); investigate, or restart it yourself '
                         '(supervisorctl restart g:web); eligible again in 1m 29s']
    rig.outcomes.clear()
    rig.restart(name='db')
    assert rig.results == [Result.RESTARTED]


def test_limit_counts_only_what_was_stopped() -> None:
    supervisor = Scripted([INFO, INFO, INFO, INFO, STOPPED], stop=[refused('FAILED'), refused('NOT_RUNNING'), True],
                          start=[refused('BAD_NAME'), refused('NO_FILE')])
    rig = Rig(supervisor, limit=Rate(1, 100))
    for _ in range(5):
        rig.restart()
    assert rig.results == [Result.STOP_FAILED, Result.LEFT_ALONE, Result.LEFT_ALONE, Result.START_FAILED]


def test_restart_that_is_completed_at_a_later_tick_counts_once() -> None:
    supervisor = Scripted(stop=[LOST_CALL])
    rig = Rig(supervisor, limit=Rate(2, 3600))
    for _ in range(3):
        supervisor.answers['getProcessInfo'] = [INFO, INFO, STOPPED, RUNNING]
        rig.restart()
        rig.restarter.retry()
    assert rig.results == [Result.STOP_FAILED, Result.RESTARTED] * 2 + [Result.LIMIT_REACHED]


def test_failed_start_that_succeeds_later_counts_once() -> None:
    supervisor = Scripted([INFO, STOPPED], start=[refused('NO_FILE')])
    rig = Rig(supervisor, limit=Rate(2, 3600))
    rig.restart()
    supervisor.answers.update(getProcessInfo=[STOPPED, RUNNING, INFO, RUNNING], startProcess=[True])
    rig.restarter.retry()
    rig.restart()
    assert rig.results == [Result.START_FAILED, Result.RESTARTED, Result.RESTARTED]


def test_dry_run_reports_each_pid_once_and_changes_nothing() -> None:
    supervisor = Scripted()
    rig = Rig(supervisor, dry_run=True)
    prepared: list[Process] = []
    for pid in (100, 100, 101):
        rig.restarter.restart(make_process({**INFO, 'pid': pid}), prepared.append)
    rig.restarter.retry()
    assert [(outcome.result, outcome.process.pid) for outcome in rig.outcomes] == [
        (Result.DRY_RUN, 100), (Result.DRY_RUN, 101)]
    assert rig.texts[0] == 'dry run: would have restarted g:web'
    assert supervisor.calls == [] and prepared == []


def test_dry_run_respects_the_limit_and_does_not_report_it_for_the_same_pid() -> None:
    rig = Rig(Scripted(), dry_run=True, limit=Rate(1, 100))
    for pid in (100, 100, 101):
        rig.restart(pid=pid)
    assert rig.results == [Result.DRY_RUN, Result.LIMIT_REACHED]


# Signals.

@pytest.mark.parametrize(('method', 'results'), [
    ('getProcessInfo', []),
    ('stopProcess', [Result.RESTARTED]),
    ('startProcess', [Result.RESTARTED]),
])
def test_signal_during_a_restart_completes_it_and_begins_nothing(method: str, results: list[Result]) -> None:
    class Signalled(Scripted):
        def call(self, name: str, *arguments: Any) -> Any:
            rig.request.requested = rig.request.requested or name == method
            return super().call(name, *arguments)

    supervisor = Signalled([INFO, STARTING])
    rig = Rig(supervisor)
    rig.restart()
    assert rig.results == results
    assert rig.texts == ['restarted g:web: supervisord has accepted the start'] * len(results)
    # It is not followed any further: once its start is accepted, supervisord takes care of it.
    assert supervisor.calls == ['getProcessInfo', 'stopProcess', 'startProcess'][:3 if results else 1]


def test_signal_during_prepare_begins_no_restart() -> None:
    supervisor = Scripted()
    rig = Rig(supervisor)

    def prepare(process: Process) -> None:
        rig.request.requested = True
        supervisor.answers['getProcessInfo'] = [INFO]

    for _ in range(2):
        outcome = rig.restarter.restart(make_process(INFO), prepare)
        assert outcome.text == 'left alone: the listener is shutting down'
    assert supervisor.calls == ['getProcessInfo'] * 2 and rig.outcomes == []


def test_signal_while_a_process_is_starting_ends_the_wait() -> None:
    rig = Rig(Scripted([INFO, LOST_CALL, STARTING]))
    rig.clock.sleep = lambda seconds: setattr(rig.request, 'requested', True)   # type: ignore[method-assign]
    rig.restarter._sleep = rig.clock.sleep
    rig.restart()
    assert rig.texts == ['restarted g:web: supervisord has accepted the start']


@pytest.mark.parametrize(('info', 'start', 'texts', 'starts'), [
    pytest.param([STOPPED], [True], ['restarted g:web: supervisord has accepted the start'], 1, id='start accepted'),
    pytest.param([STOPPED], [refused('NO_FILE')], [f'failed to start g:web: NO_FILE: g:web; {NO_RETRY}'], 1,
                 id='failed'),
    pytest.param([STOPPING] * 20 + [STOPPED], [True], ['restarted g:web: supervisord has accepted the start'], 1,
                 id='still stopping'),
    pytest.param([LOST_CALL, LOST_CALL, STOPPED], [True], ['restarted g:web: supervisord has accepted the start'], 1,
                 id='lost look'),
    pytest.param([LOST_CALL], [True], [f'failed to start g:web: NO_FILE: g:web; {NO_RETRY}'], 0, id='no look'),
    pytest.param([BACKOFF], [True], [f'failed to start g:web: {QUICK}; {NO_RETRY}'], 0, id='supervisord repeats it'),
    pytest.param([RUNNING], [True], ['restarted g:web'], 0, id='runs'),
])
def test_at_exit_what_was_left_down_gets_a_last_try(info: list[Any], start: list[Any], texts: list[str],
                                                    starts: int) -> None:
    """Also if the back-off is not over."""
    supervisor = Scripted([INFO, STOPPED], start=[refused('NO_FILE')])
    rig = Rig(supervisor)
    rig.restart()
    for _ in range(3):
        rig.restarter.retry()
    rig.outcomes.clear()
    supervisor.calls = []
    supervisor.answers.update(getProcessInfo=list(info), startProcess=list(start))
    rig.restarter.finish()
    assert rig.texts == texts
    assert supervisor.count('startProcess') == starts


def test_at_exit_a_stop_that_did_not_come_is_reported() -> None:
    supervisor = Scripted([INFO, STOPPING], stop=[LOST_CALL])
    rig = Rig(supervisor)
    rig.restart()
    rig.restarter.finish()
    assert rig.texts == [f'failed to stop g:web: it is still STOPPING after 1m{IF_IT_STOPS}',
                         f'failed to stop g:web: it is still STOPPING after 1m; {NO_RETRY}']


# Child processes that outlive the stop.

@pytest.mark.parametrize(('name', 'members', 'text'), [
    ('web', [set()], 'restarted g:web'),
    ('web', [{17}, set()], 'restarted g:web'),      # it was just exiting
    ('web', [{17}, {17}], 'restarted g:web, but 1 of its child processes outlived the stop (pid 17): '
                          'set stopasgroup=true and killasgroup=true in [program:web]'),
    ('g_01', [{18, 17, 3}, {17, 18}], 'restarted g:g_01, but 2 of its child processes outlived the stop (pids 17, 18): '
                                      'set stopasgroup=true and killasgroup=true in [program:g]'),
    ('7', [{17}, {17}], 'restarted g:7, but 1 of its child processes outlived the stop (pid 17): '
                        'set stopasgroup=true and killasgroup=true in [program:g]'),
    ('g_api', [{17}, {17}], 'restarted g:g_api, but 1 of its child processes outlived the stop (pid 17): '
                            'set stopasgroup=true and killasgroup=true in [program:g_api]'),
])
def test_child_processes_that_outlive_the_stop_are_reported(name: str, members: list[set[int]], text: str) -> None:
    rig = Rig(Scripted())
    rig.members = iter(members)
    rig.restart(name=name)
    assert rig.texts == [text]
    assert rig.clock.now - 1000 < restart.SURVIVE_SECONDS + 1


def test_child_processes_are_reported_with_a_start_that_fails() -> None:
    """A hung worker keeps the port, so the new master exits."""
    supervisor = Scripted([INFO, FATAL])
    rig = Rig(supervisor)
    rig.members = iter([{17}, {17}])
    rig.restart()
    assert f'failed to start g:web: {QUICK}{RETRY}, but 1 of its child processes' in rig.texts[0]
    for _ in range(3):
        rig.restarter.retry()
    assert len(rig.outcomes) == 1


@pytest.mark.parametrize('arguments', [
    pytest.param({'stop': [refused('FAILED')]}, id='not stopped'),
    pytest.param({'start': [refused('BAD_NAME')]}, id='left alone'),
])
def test_child_processes_are_not_searched_without_a_restart(arguments: dict[str, Any]) -> None:
    rig = Rig(Scripted(**arguments))
    rig.members = iter([])
    rig.restart()
    assert len(rig.outcomes) == 1


def start_group(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(['sh', '-c', script], start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.fixture(params=['ps', 'proc'])
def _ps(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == 'proc':
        write_script(tmp_path / 'ps', 'exit 1\n')
        monkeypatch.setenv('PATH', f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures('_ps')
def test_members_of_a_group_without_zombies() -> None:
    leader = start_group('sleep 1000 & sleep 0 & exec sleep 1000')
    try:
        members = wait_for(lambda: len(found := find_group_members(leader.pid)) == 2 and found)
        assert leader.pid in members
        os.kill(leader.pid, signal.SIGKILL)     # a zombie now, as nobody has waited for it
        wait_for(lambda: find_group_members(leader.pid) == members - {leader.pid})
        os.killpg(leader.pid, signal.SIGKILL)
        wait_for(lambda: find_group_members(leader.pid) == set())
        os.killpg(leader.pid, 0)    # the zombie is still a member
        leader.wait(TIMEOUT)
        assert find_group_members(leader.pid) == set()
    finally:
        leader.kill()
        leader.wait(TIMEOUT)


def test_group_without_members() -> None:
    leader = start_group('exit 0')
    leader.wait(TIMEOUT)
    assert find_group_members(leader.pid) == set()


def test_group_of_another_user_is_found_in_the_process_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(group: int, signum: int) -> None:
        raise PermissionError

    with start_group('exec sleep 1000') as leader:
        with monkeypatch.context() as patch:
            patch.setattr(os, 'killpg', refuse)
            assert find_group_members(leader.pid) == {leader.pid}
        leader.kill()


def test_output_of_ps_that_is_not_a_list_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_group('exec sleep 1000') as leader:
        write_script(tmp_path / 'ps', f'echo warning; printf "\\377 1 2 3\\n"; echo 5 {leader.pid} S; '
                                      f'echo 6 {leader.pid} Z+; echo 7 1 S\n')
        monkeypatch.setenv('PATH', f"{tmp_path}:{os.environ['PATH']}")
        assert find_group_members(leader.pid) == {5}
        leader.kill()


# Ticks that waited.

def tick(when: str) -> Event:
    return Event('TICK_5', when, 'supervisor', 0.0)


def test_ticks_from_before_the_end_of_the_last_restart_are_stale() -> None:
    rig = Rig(Scripted())
    rig.clock.now = 5000.5
    assert not rig.restarter.is_stale(tick('when:4000'))
    rig.restart()
    rig.clock.now = 5010.0
    for when, stale in (('when:4995', True), ('when:4999\n', True), ('when:5000', False), ('when:5001', False),
                        ('', False), ('when:', False), ('when:x', False), ('when:-1', False),
                        (f"when:{'1' * 5000}", False)):
        assert rig.restarter.is_stale(tick(when)) is stale, when
    rig.clock.now = 3000.0     # the clock was set back
    assert not rig.restarter.is_stale(tick('when:3000'))


def test_ticks_from_before_a_late_start_are_stale() -> None:
    supervisor = Scripted([INFO, STOPPED], start=[refused('NO_FILE')])
    rig = Rig(supervisor)
    rig.clock.now = 5000.5
    rig.restart()
    rig.clock.now = 6000.5
    rig.restarter.retry()
    assert not rig.restarter.is_stale(tick('when:5999'))    # nothing was started
    supervisor.answers.update(getProcessInfo=[STOPPED, RUNNING], startProcess=[True])
    rig.clock.now = 7000.5
    assert rig.restarter.retry()
    assert rig.restarter.is_stale(tick('when:6999'))
    assert not rig.restarter.is_stale(tick('when:7000'))
