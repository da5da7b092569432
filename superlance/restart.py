"""A restart that never leaves a process down."""
from __future__ import annotations

import time
from collections import deque
from enum import Enum
from typing import Callable, NamedTuple

from superlance.command import find_group_members
from superlance.listener import Event, ExitRequest, exit_request, parse_tokens
from superlance.options import Rate, format_duration
from superlance.rpc import Process, Refused, State, Supervisor, Unknown

# How long a process is followed within one tick: while it is STARTING or STOPPING, and while it is in BACKOFF.
FOLLOW_SECONDS = 60
BACKOFF_SECONDS = 10
POLL_SECONDS = 0.1
MAX_LOST_CALLS = 3
# When a failed start is repeated: at once, at the next tick, and then after these times.
RETRY_SECONDS = (0, 0, 60, 120, 240, 480, 600)
# Answers to a start.
ACCEPTED, LOST, SPAWN_ERROR = 'ACCEPTED', 'LOST', 'SPAWN_ERROR'
# Faults after which supervisord will not start the process: it has been removed, or supervisord is shutting down.
FINAL_FAULTS = ('BAD_NAME', 'SHUTDOWN_STATE')
# Child processes that are still there after this time outlived the stop.
SURVIVE_SECONDS = 2
NO_RETRY = 'no further retry, because the listener is shutting down'


class Result(Enum):
    """What became of a restart."""

    RESTARTED = 'restarted'
    STILL_STARTING = 'started, still STARTING'
    STOP_FAILED = 'failed to stop'
    START_FAILED = 'failed to start'
    LEFT_ALONE = 'left alone'       # it is not the process that was checked, or somebody else controls it
    LIMIT_REACHED = 'restart limit reached'
    DRY_RUN = 'dry run'


# What counts as a restart, even if it did not help or was only reported.
COUNTED = (Result.RESTARTED, Result.STILL_STARTING, Result.START_FAILED, Result.DRY_RUN)

# The subjects of mails, with the name of the process. The other results are only logged.
SUBJECTS = {
    Result.RESTARTED: 'process {} restarted',
    Result.STOP_FAILED: 'failed to stop process {}',
    Result.START_FAILED: 'failed to start process {}',
    Result.LIMIT_REACHED: 'process {} left alone',
    Result.DRY_RUN: 'dry run: process {} not restarted',
}


class Outcome(NamedTuple):
    """What became of a process, and a line that says so."""

    process: Process
    result: Result
    text: str


def make_outcome(process: Process, result: Result, reason: str) -> Outcome:
    """Return the Outcome whose text is its result, the process and, unless it is '', the reason."""
    what = f'left {process.title} alone' if result is Result.LEFT_ALONE else f'{result.value} {process.title}'
    return Outcome(process, result, f'{what}: {reason}' if reason else what)


class Step(Enum):
    """What to do next about a process that was stopped here."""

    QUERY = 'query'
    START = 'start'
    WAIT = 'wait'
    DONE = 'done'           # it runs, or has run
    FAILED = 'failed'       # its start failed
    LEAVE = 'leave'         # somebody else has started or stopped it
    UNTOUCHED = 'untouched'  # it was not stopped


class StoppedProcess:
    """A process that this listener has, or may have, stopped, and that may still be down; times are by the clock."""

    def __init__(self, checked: Process) -> None:
        self.checked = checked
        self.is_stopped = False                 # as far as is known
        self.trouble = ''                       # what went wrong since the last start, in words
        self.lost_calls = 0                     # in a row
        self.since = 0.0                        # its last start, or the first query in this tick
        self.start_answer: str | None = None    # to our last start, unless that has failed: ACCEPTED, LOST or a fault
        self.failed_start: int | None = None    # supervisord's start time of our last start that failed
        self.failures = 0
        self.retry_at = 0.0
        self.reported: set[str] = set()
        self.is_counted = False                 # as a restart, for the limit


def find_next_step(stopped: StoppedProcess, current: Process) -> Step:
    """Return what to do about a process that was stopped here, from what supervisord says of it now.

    supervisord changes the start time at each start. If it is neither that of the checked process nor that of our
    failed start, it was changed by a start of ours whose outcome is not known yet, or by somebody else.
    """
    checked, state = stopped.checked, current.state
    is_checked = (current.pid, current.start) == (checked.pid, checked.start)
    if state in (State.RUNNING, State.STARTING) and is_checked and stopped.start_answer != ACCEPTED:
        return Step.UNTOUCHED
    if state == State.RUNNING:
        return Step.DONE
    if state in (State.STARTING, State.STOPPING, State.BACKOFF):
        return Step.WAIT
    if state == State.STOPPED:
        is_ours = current.start == checked.start and stopped.start_answer != ACCEPTED
        return Step.START if is_ours else Step.LEAVE
    # supervisord answers with faults other than SPAWN_ERROR before it starts a process (supervisor/rpcinterface.py).
    if stopped.start_answer in (ACCEPTED, LOST, SPAWN_ERROR):
        # If startsecs is 0, a process may be EXITED after SPAWN_ERROR.
        return Step.FAILED if state == State.FATAL or stopped.start_answer == SPAWN_ERROR else Step.DONE
    return Step.START if current.start == stopped.failed_start else Step.LEAVE


class Restarter:
    """Restarts processes one after another, and starts again those that it left down.

    report is called with every Outcome. clock is monotonic, wall_clock counts seconds since the epoch.
    """

    def __init__(self, supervisor: Supervisor, report: Callable[[Outcome], None],
                 limit: Rate | None = None, dry_run: bool = False, request: ExitRequest = exit_request,
                 sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic,
                 wall_clock: Callable[[], float] = time.time,
                 find_members: Callable[[int], set[int]] = find_group_members) -> None:
        self._supervisor = supervisor
        self._report = report
        self._limit = limit
        self._dry_run = dry_run
        self._request = request
        self._sleep = sleep
        self._clock = clock
        self._wall_clock = wall_clock
        self._find_members = find_members
        self._stopped: dict[str, StoppedProcess] = {}
        self._restarts: dict[str, deque[float]] = {}
        self._limited: set[str] = set()
        self._dry_runs: set[tuple[str, int]] = set()
        self._last_end = 0.0
        self._is_finishing = False

    def is_stale(self, tick: Event) -> bool:
        """Return whether a tick was sent before the second in which the last restart ended.

        A clock that was set back must not make every tick look stale.
        """
        when = parse_tokens(tick.payload).get('when', '').strip()
        return when.isdecimal() and len(when) < 20 and int(when) < int(self._last_end) <= self._wall_clock()

    def restart(self, checked: Process, prepare: Callable[[Process], None] | None = None) -> Outcome:
        """Stop the process and start it again; return the outcome, which is reported unless it repeats an earlier one.

        prepare is called if the process is really going to be stopped.
        """
        exiting = Outcome(checked, Result.LEFT_ALONE, 'left alone: the listener is shutting down')
        if self._request.requested:
            return exiting
        if checked.namespec in self._stopped:
            return Outcome(checked, Result.LEFT_ALONE, 'left alone: an earlier restart is not complete')
        dry_run = Outcome(checked, Result.DRY_RUN, f'dry run: would have restarted {checked.title}')
        if (checked.namespec, checked.pid) in self._dry_runs:
            return dry_run
        limit_reached = self._find_limit_reached(checked)
        if limit_reached:
            return limit_reached
        if self._dry_run:
            self._dry_runs.add((checked.namespec, checked.pid))
            self._count(checked)
            self._report(dry_run)
            return dry_run
        change = self._find_change(checked)
        if prepare and not change:
            prepare(checked)
            change = self._find_change(checked)    # prepare may take minutes
        if not change and self._request.requested:
            return exiting
        outcome = change or self._restart(checked)
        self._report(outcome)
        self._last_end = self._wall_clock()
        return outcome

    def retry(self) -> bool:
        """Start again what was left down, and return whether a process runs again; new outcomes are reported."""
        is_restarted = False
        for stopped in list(self._stopped.values()):
            outcome = self._retry_start(stopped)
            if outcome and outcome.result is Result.RESTARTED:
                is_restarted = True
                self._last_end = self._wall_clock()
            if outcome and self._note(stopped, outcome):
                self._report(outcome)
        return is_restarted

    def finish(self) -> None:
        """At exit, try for the last time to start what was left down."""
        self._is_finishing = True
        self.retry()

    # The limit.

    def _find_limit_reached(self, checked: Process) -> Outcome | None:
        """Return the outcome if a process must not be restarted again now; it is reported once."""
        if self._limit is None:
            return None
        times = self._restarts.get(checked.namespec) or deque()
        if len(times) < self._limit.times or times[0] <= self._clock() - self._limit.seconds:
            self._limited.discard(checked.namespec)
            return None
        if checked.namespec in self._limited:
            return Outcome(checked, Result.LIMIT_REACHED, 'left alone: restart limit reached')
        self._limited.add(checked.namespec)
        seconds = times[0] + self._limit.seconds - self._clock()
        outcome = Outcome(checked, Result.LIMIT_REACHED, (
            f'left {checked.title} alone: restart limit reached ({self._limit.times} in '
            f'{format_duration(self._limit.seconds)}); investigate, or restart it yourself '
            f'(supervisorctl restart {checked.title}); eligible again in {format_duration(seconds)}'))
        self._report(outcome)
        return outcome

    def _count(self, process: Process) -> None:
        if self._limit:
            self._restarts.setdefault(process.namespec, deque(maxlen=self._limit.times)).append(self._clock())

    def _note(self, stopped: StoppedProcess, outcome: Outcome) -> bool:
        """Count the restart, once, and return whether the outcome is new."""
        if outcome.result in COUNTED and not stopped.is_counted:
            stopped.is_counted = True
            self._count(stopped.checked)
        is_new = outcome.text not in stopped.reported
        stopped.reported.add(outcome.text)
        return is_new

    # The stop.

    def _find_change(self, checked: Process) -> Outcome | None:
        """Return why a process must not be stopped, None if it still is the one that was checked."""
        try:
            current = self._supervisor.get_process(checked.namespec)
        except (Refused, Unknown) as why:
            return self._fail_to_stop(checked, why)
        if current.state == State.STOPPING:
            return make_outcome(checked, Result.LEFT_ALONE, 'it is STOPPING')
        if current.pid != checked.pid:
            now = f'{current.state_name} with pid {current.pid}' if current.pid else current.state_name
            return make_outcome(checked, Result.LEFT_ALONE, f'it is now {now}; expected pid {checked.pid}')
        return None

    @staticmethod
    def _fail_to_stop(checked: Process, why: Exception) -> Outcome:
        is_left_alone = isinstance(why, Refused) and why.fault in (*FINAL_FAULTS, 'NOT_RUNNING')
        return make_outcome(checked, Result.LEFT_ALONE if is_left_alone else Result.STOP_FAILED, str(why))

    def _restart(self, checked: Process) -> Outcome:
        stopped = StoppedProcess(checked)
        try:
            self._supervisor.call('stopProcess', checked.namespec)
            stopped.is_stopped = True
        except Refused as why:
            return self._fail_to_stop(checked, why)
        except Unknown as why:
            stopped.trouble = str(why)
        self._stopped[checked.namespec] = stopped
        outcome = self._follow(stopped, Step.START if stopped.is_stopped else Step.QUERY)
        self._note(stopped, outcome)
        return self._add_survivors(stopped, outcome)

    def _add_survivors(self, stopped: StoppedProcess, outcome: Outcome) -> Outcome:
        """Return the outcome with the child processes that outlived the stop, if there are any."""
        if not stopped.is_stopped or outcome.result not in COUNTED or self._request.requested:
            return outcome
        checked = stopped.checked
        survivors = self._find_members(checked.pid)
        if survivors:
            self._sleep(SURVIVE_SECONDS)    # they may be just exiting
            survivors &= self._find_members(checked.pid)
        if not survivors:
            return outcome
        # The processes of a program with numprocs are called web_00, web_01 and so on, their group web.
        is_numbered = checked.program.rstrip('0123456789').rstrip('-_.:') in ('', checked.group)
        section = checked.group if is_numbered else checked.program
        pids = ', '.join(map(str, sorted(survivors)))
        return outcome._replace(text=(
            f"{outcome.text}, but {len(survivors)} of its child processes outlived the stop "
            f"({'pid' if len(survivors) == 1 else 'pids'} {pids}): set stopasgroup=true and killasgroup=true "
            f'in [program:{section}]'))

    # The start.

    def _retry_start(self, stopped: StoppedProcess) -> Outcome | None:
        """Query a process that was left down at an earlier tick, and start it if a retry is due.

        Return its outcome, None if there is no new one.
        """
        try:
            current = self._supervisor.get_process(stopped.checked.namespec)
            step = find_next_step(stopped, current)
        except Refused as why:
            return self._note_trouble(stopped, why)
        except Unknown:
            step = Step.QUERY
        if step in (Step.QUERY, Step.WAIT):
            return self._follow(stopped, Step.QUERY) if self._is_finishing else None
        if step is Step.UNTOUCHED:
            self._forget(stopped, Result.STOP_FAILED)
            return None     # it has been reported already
        if step in (Step.DONE, Step.LEAVE):
            return self._conclude(stopped, step, current)
        stopped.is_stopped = True
        outcome = self._note_failed_start(stopped, step, current) if stopped.start_answer else None
        if self._clock() < stopped.retry_at and not self._is_finishing:
            return outcome
        return self._follow(stopped, Step.START)

    def _follow(self, stopped: StoppedProcess, step: Step) -> Outcome:
        """Start a process, or query it first, and follow it until it runs or can't be started now."""
        stopped.since = self._clock()
        stopped.lost_calls = 0
        is_tried = False
        while True:
            try:
                if step in (Step.START, Step.FAILED):
                    is_tried = True
                    self._start(stopped)
                    if self._is_exiting():
                        return self._forget(stopped, Result.RESTARTED, 'supervisord has accepted the start')
                current = self._supervisor.get_process(stopped.checked.namespec)
            except (Refused, Unknown) as why:
                step, outcome = Step.QUERY, self._note_trouble(stopped, why)
            else:
                stopped.lost_calls = 0
                step = find_next_step(stopped, current)
                outcome = self._evaluate(stopped, step, current, is_tried)
            if outcome:
                return outcome
            self._sleep(POLL_SECONDS)

    def _start(self, stopped: StoppedProcess) -> None:
        """Ask supervisord for a start, which answers as soon as it is accepted. Raises Refused and Unknown."""
        stopped.since, stopped.trouble, stopped.start_answer = self._clock(), '', LOST
        try:
            self._supervisor.call('startProcess', stopped.checked.namespec, False)
        except Refused as why:
            stopped.start_answer = why.fault
            raise
        stopped.start_answer = ACCEPTED

    def _note_trouble(self, stopped: StoppedProcess, why: Exception) -> Outcome | None:
        """Return the outcome if it is known; otherwise the next query shows it."""
        if isinstance(why, Refused) and why.fault in FINAL_FAULTS:
            return self._forget(stopped, Result.LEFT_ALONE, str(why))
        stopped.trouble = stopped.trouble or str(why)
        stopped.lost_calls += 1
        return self._give_up(stopped) if stopped.lost_calls == MAX_LOST_CALLS else None

    def _evaluate(self, stopped: StoppedProcess, step: Step, current: Process, is_tried: bool) -> Outcome | None:
        """Return the outcome, None if the process has to be started or followed further."""
        if step is Step.UNTOUCHED:
            return self._give_up(stopped)
        stopped.is_stopped = stopped.is_stopped or current.state != State.STOPPING
        if step in (Step.DONE, Step.LEAVE):
            return self._conclude(stopped, step, current)
        if step is Step.WAIT:
            return self._wait(stopped, current)
        outcome = self._note_failed_start(stopped, step, current) if stopped.start_answer else None
        return outcome if is_tried and stopped.failures > 1 else None

    def _wait(self, stopped: StoppedProcess, current: Process) -> Outcome | None:
        """Return the outcome of a process that is STARTING, STOPPING or in BACKOFF, None to wait for it."""
        seconds = self._clock() - stopped.since
        if current.state == State.BACKOFF:
            stopped.failures = max(stopped.failures, 1)     # supervisord itself repeats the start
            is_over = seconds >= BACKOFF_SECONDS or self._is_exiting()
            return self._make_failure(stopped, current.spawn_error) if is_over else None
        if current.state == State.STARTING and self._is_exiting():
            return self._forget(stopped, Result.RESTARTED, 'supervisord has accepted the start')
        if seconds < FOLLOW_SECONDS:
            return None
        duration = format_duration(FOLLOW_SECONDS)
        if current.state == State.STARTING:
            return Outcome(stopped.checked, Result.STILL_STARTING,
                           f'{stopped.checked.title}: started, still STARTING after {duration}')
        stopped.trouble = f'it is still STOPPING after {duration}'
        stopped.is_stopped = False
        return self._give_up(stopped)

    def _note_failed_start(self, stopped: StoppedProcess, step: Step, current: Process) -> Outcome:
        """Return the outcome of a start that failed, and decide when it is repeated."""
        stopped.start_answer = None
        reason = ''     # of a start that was refused or lost
        if step is Step.FAILED:
            stopped.failed_start, reason = current.start, current.spawn_error
        stopped.retry_at = self._clock() + RETRY_SECONDS[min(stopped.failures, len(RETRY_SECONDS) - 1)]
        stopped.failures += 1
        return self._make_failure(stopped, reason)

    def _make_failure(self, stopped: StoppedProcess, reason: str) -> Outcome:
        return make_outcome(stopped.checked, Result.START_FAILED,
                            f"{reason or stopped.trouble}; {NO_RETRY if self._is_finishing else 'will retry'}")

    def _give_up(self, stopped: StoppedProcess) -> Outcome:
        """Leave a process to the next tick."""
        if stopped.is_stopped:
            return self._make_failure(stopped, stopped.trouble)
        promise = NO_RETRY if self._is_finishing else 'will be started again if it stops'
        return make_outcome(stopped.checked, Result.STOP_FAILED, f'{stopped.trouble}; {promise}')

    def _conclude(self, stopped: StoppedProcess, step: Step, current: Process) -> Outcome:
        reason = '' if current.state == State.RUNNING else f'it is now {current.state_name}'
        if step is Step.DONE:
            return self._forget(stopped, Result.RESTARTED, reason)
        if current.state == State.STOPPED:
            reason = 'somebody else has stopped it'
        elif current.start != stopped.checked.start:
            reason = f'somebody else has started it, and {reason}'
        return self._forget(stopped, Result.LEFT_ALONE, reason)

    def _forget(self, stopped: StoppedProcess, result: Result, reason: str = '') -> Outcome:
        del self._stopped[stopped.checked.namespec]
        return make_outcome(stopped.checked, result, reason)

    def _is_exiting(self) -> bool:
        return self._is_finishing or self._request.requested
