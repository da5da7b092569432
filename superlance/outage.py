"""What httpok decides: which processes to restart, and when to send mail about an outage.

Nothing here calls supervisord, reads a clock or sends mail. Every `now` is in seconds, by any clock.
"""
from __future__ import annotations

from enum import Enum
from typing import Collection, Iterable, Sequence

from superlance.options import format_duration, join_names
from superlance.restart import COUNTED, Outcome, Result
from superlance.rpc import Process, State


class Kind(Enum):
    """The kinds of outcome. Each one is mailed when it occurs for the first time in an outage."""

    RESTARTED = 'restarted'
    FAILED = 'failed to restart'
    LIMIT_REACHED = 'restart limit reached'
    NOTHING = 'nothing done'


KINDS = {
    Result.RESTARTED: Kind.RESTARTED,
    Result.STILL_STARTING: Kind.RESTARTED,
    Result.STOP_FAILED: Kind.FAILED,
    Result.START_FAILED: Kind.FAILED,
    Result.LIMIT_REACHED: Kind.LIMIT_REACHED,
}


class Outage:
    """The state of the URL. An outage begins with a mail and ends with the next good check."""

    def __init__(self, failures: int, grace_seconds: float, remind_seconds: float, now: float) -> None:
        self._needed_failures = failures
        self._grace_seconds = grace_seconds
        self._remind_seconds = remind_seconds
        self.is_on = False
        self.failures = 0       # failed checks in a row, since the last restart
        self.restarts = 0       # in this outage
        self._good_at = now     # the last good check, or the start of the listener
        self._bad_since: float | None = None
        self._mailed_at = now
        self._mailed: set[Kind] = set()

    def note_good(self, now: float) -> float | None:
        """Note a good check; return the seconds of the outage that it ends, None if there was none."""
        seconds = self.seconds(now) if self.is_on else None
        self.is_on = False
        self.failures = self.restarts = 0
        self._good_at = now
        self._bad_since = None
        self._mailed = set()
        return seconds

    def is_enough(self) -> bool:
        """Return whether another failed check is enough to act."""
        return self.failures + 1 >= self._needed_failures

    def note_bad(self, now: float) -> bool:
        """Count a failed check that is not enough to act; return whether to send mail."""
        self._note_failure(now)
        self.failures += 1
        is_due = self.is_reminder_due(now)
        if is_due:
            self._note_mail((), now)
        return is_due

    def note_bad_in_grace(self, now: float) -> bool:
        """Note a failed check while every watched process is in its grace period; return whether to send mail."""
        self._note_failure(now)
        is_overdue = now - self._good_at > self._grace_seconds
        wants_mail = (is_overdue and Kind.NOTHING not in self._mailed) or self.is_reminder_due(now)
        if wants_mail:
            self._note_mail({Kind.NOTHING}, now)
        return wants_mail

    def note_action(self, kinds: Collection[Kind], restarts: int, now: float) -> bool:
        """Note what was done after enough failed checks; return whether to send mail."""
        self._note_failure(now)
        self.failures = 0
        self.restarts += restarts
        wants_mail = not self.is_on or not self._mailed.issuperset(kinds) or self.is_reminder_due(now)
        if wants_mail:
            self._note_mail(kinds, now)
        return wants_mail

    def is_reminder_due(self, now: float) -> bool:
        return self.is_on and now - self._mailed_at >= self._remind_seconds

    def note_late(self, result: Result) -> bool:
        """Note the outcome of an earlier restart; return whether to send mail: for a failure, and for a new kind."""
        kind = KINDS[result]
        is_new = kind not in self._mailed or kind is Kind.FAILED
        if self.is_on:
            self._mailed.add(kind)
        return is_new

    def seconds(self, now: float) -> float:
        """Return for how long every check has failed."""
        return 0.0 if self._bad_since is None else now - self._bad_since

    def _note_mail(self, kinds: Iterable[Kind], now: float) -> None:
        self.is_on = True
        self._mailed |= set(kinds)
        self._mailed_at = now

    def _note_failure(self, now: float) -> None:
        if self._bad_since is None:
            self._bad_since = now


# Which processes to restart, and what became of them.

UP = (State.STARTING, State.RUNNING, State.BACKOFF)     # or about to be


def is_in_grace(process: Process, grace_seconds: float) -> bool:
    """Return whether a process is starting or up for less than its grace period.

    A start in the future does not count: the clock has been set back.
    """
    return process.state in UP and 0 <= process.now - process.start < grace_seconds


def are_all_in_grace(processes: Sequence[Process], grace_seconds: float) -> bool:
    """Return whether every process that is RUNNING, or about to be, is in its grace period, and there is one."""
    up = [process for process in processes if process.state in UP]
    return bool(up) and all(is_in_grace(process, grace_seconds) for process in up)


def leave_alone(process: Process, grace_seconds: float, check_began: float = 0.0) -> Outcome | None:
    """Return why a process must not be restarted, None if it may; check_began is in seconds since the epoch."""
    if is_in_grace(process, grace_seconds):
        return Outcome(process, Result.LEFT_ALONE, f'left alone: grace period of {format_duration(grace_seconds)}')
    if process.state != State.RUNNING:
        return Outcome(process, Result.LEFT_ALONE, 'left alone: not RUNNING')
    # The start is in whole seconds. If it is in the future, the clock has been set back.
    if check_began and check_began < process.start <= process.now:
        return Outcome(process, Result.LEFT_ALONE, 'left alone: it was started during the check')
    return None


def describe_left_alone(outcomes: Iterable[Outcome]) -> str:
    """Return which processes are left alone and why, in one line."""
    titles: dict[str, list[str]] = {}
    for outcome in outcomes:
        titles.setdefault(outcome.text, []).append(outcome.process.title)
    return '; '.join(text.replace('left', f'left {join_names(names)}', 1) for text, names in titles.items())


def describe_process(process: Process) -> str:
    """Return a process and its state, for a mail and the terminal."""
    state = process.state_name
    if process.pid:
        state += f', pid {process.pid}, up {format_duration(process.uptime_seconds)}'
    return f'{process.title} ({state})'


def find_kinds(outcomes: Iterable[Outcome]) -> set[Kind]:
    """Return the kinds of outcome; processes that were left alone count only if nothing else was done."""
    return {KINDS[outcome.result] for outcome in outcomes if outcome.result in KINDS} or {Kind.NOTHING}


def count_restarts(outcomes: Iterable[Outcome]) -> int:
    return sum(outcome.result in COUNTED and outcome.result is not Result.DRY_RUN for outcome in outcomes)


def summarize(outcomes: Sequence[Outcome], grace_seconds: float) -> str:
    """Return the outcome in a few words for the subject of a mail, '' if there is no watched process.

    Of the processes that were left alone, those that have reached their limit are named, and the others only if
    nothing else was done.
    """
    phrases = {
        Result.RESTARTED: 'restarted {}',
        Result.STILL_STARTING: '{} still STARTING',
        Result.START_FAILED: 'failed to start {}',
        Result.STOP_FAILED: 'failed to stop {}',
        Result.LIMIT_REACHED: '{} left alone',
        Result.DRY_RUN: 'dry run: {} not restarted',
    }
    found = []
    for result, phrase in phrases.items():
        titles = [outcome.process.title for outcome in outcomes if outcome.result is result]
        if titles:
            found.append(phrase.format(join_names(titles)))
    if not found and outcomes:
        reason = ': grace period' if any(is_in_grace(outcome.process, grace_seconds) for outcome in outcomes) else ''
        found.append(f'{join_names([outcome.process.title for outcome in outcomes])} left alone{reason}')
    return '; '.join(found)
