"""The state table of an outage, row by row, and what is said of the watched processes."""
from __future__ import annotations

from typing import Any, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table import for_each

from superlance import outage
from superlance.outage import Kind, Outage
from superlance.restart import Outcome, Result
from superlance.rpc import Process, State

NOTHING, RESTARTED, FAILED, LIMIT = Kind.NOTHING, Kind.RESTARTED, Kind.FAILED, Kind.LIMIT_REACHED
GOOD, BAD, GRACE = 'good', 'failed, not enough to act', 'failed, every process in its grace period'
Event = Union[str, Kind]    # a Kind: enough failed checks, and the outcome of what was done


def apply(state: Outage, event: Event, now: float) -> bool | float | None:
    """Apply an event; return whether a mail is sent, or for a good check the seconds of the outage that is over."""
    if event == GOOD:
        return state.note_good(now)
    if event == GRACE:
        return state.note_bad_in_grace(now)
    if event == BAD:
        assert not state.is_enough()
        return state.note_bad(now)
    assert isinstance(event, Kind)
    assert state.is_enough()
    return state.note_action({event}, int(event is RESTARTED), now)


def play(events: list[tuple[float, Event]], failures: int = 1, grace: float = 0, remind: float = 3600) -> list[Any]:
    """Play events of (seconds since the start, event); return the times of the mails, and of the recoveries with the
    duration of the outage."""
    state = Outage(failures, grace, remind, now=1000.0)
    mails: list[Any] = []
    for at, event in events:
        result = apply(state, event, 1000.0 + at)
        if result is True:
            mails.append(at)
        elif event == GOOD and result is not None:
            mails.append((at, result))
    return mails


@for_each('events, options, mails', [
    # ok, bad, fewer than --failures in a row
    ([(5, BAD), (10, BAD)], {'failures': 3}, []),
    # ok, bad, --failures reached: act, mail
    ([(5, BAD), (10, BAD), (15, RESTARTED)], {'failures': 3}, [15]),
    ([(5, NOTHING)], {}, [5]),
    # outage, restarted or failed to: mail if this kind of outcome is new, or the reminder is due
    ([(5, RESTARTED), (10, RESTARTED), (15, FAILED), (20, RESTARTED), (25, FAILED)], {}, [5, 15]),
    ([(5, RESTARTED), (3604, RESTARTED), (3605, RESTARTED), (3610, RESTARTED)], {}, [5, 3605]),
    # a mail about a new kind of outcome postpones the reminder
    ([(5, RESTARTED), (3600, FAILED), (3605, FAILED), (7200, FAILED)], {}, [5, 3600, 7200]),
    ([(5, RESTARTED), (10, RESTARTED)], {'remind': 0}, [5, 10]),
    # outage, bad, nothing done
    ([(5, RESTARTED), (10, NOTHING), (15, NOTHING), (20, LIMIT), (25, LIMIT), (30, NOTHING)], {}, [5, 10, 20]),
    # outage, the count starts again: fewer than --failures are not mailed, unless the reminder is due
    ([(5, BAD), (10, RESTARTED), (15, BAD), (20, RESTARTED)], {'failures': 2}, [10]),
    ([(5, BAD), (10, NOTHING), (15, BAD), (20, NOTHING)], {'failures': 2, 'remind': 0}, [10, 15, 20]),
    # outage, good: recovery mail
    ([(5, RESTARTED), (185, GOOD), (190, GOOD)], {}, [5, (185, 180)]),
    # the next outage is mailed again, with all its kinds
    ([(5, RESTARTED), (10, GOOD), (15, RESTARTED), (20, GOOD)], {}, [5, (10, 5), 15, (20, 5)]),
    ([(5, RESTARTED), (10, GOOD), (15, FAILED), (20, RESTARTED)], {}, [5, (10, 5), 15, 20]),
    # the duration begins with the first failed check
    ([(1, GOOD), (5, BAD), (10, BAD), (15, RESTARTED), (20, GOOD)], {'failures': 3}, [15, (20, 15)]),
    # ok, good: the count starts again, and there is no mail
    ([(5, BAD), (10, GOOD), (15, BAD), (20, GOOD)], {'failures': 2}, []),
    # any, every process in its grace period: not counted
    ([(5, BAD), (10, GRACE), (15, GRACE), (20, RESTARTED)], {'failures': 2, 'grace': 60}, [20]),
    # ... one mail if the last good check is longer ago than the grace period
    ([(10, GOOD), (30, GRACE), (70, GRACE), (70.1, GRACE), (80, GRACE)], {'grace': 60}, [70.1]),
    # ... nor a start of the listener
    ([(60, GRACE), (61, GRACE), (70, GRACE), (80, GOOD)], {'grace': 60}, [61, (80, 20)]),
    # ... the reminder of that mail
    ([(61, GRACE), (3660, GRACE), (3661, GRACE)], {'grace': 60}, [61, 3661]),
    # a deployment: its young processes do not answer for a while
    ([(10, GOOD), (15, GRACE), (60, GRACE), (65, GOOD)], {'grace': 60}, []),
    # an outage that flaps between "restarted" and "in its grace period"
    ([(t, RESTARTED if t % 20 == 5 else GRACE) for t in range(5, 600, 5)], {'grace': 15}, [5, 20]),
    # a crash loop below the grace period: one mail, and the recovery
    ([*((t, GRACE) for t in range(5, 600, 5)), (600, GOOD)], {'grace': 60}, [65, (600, 595)]),
])
def test_the_state_table(events: list[tuple[float, Event]], options: dict[str, Any], mails: list[Any]) -> None:
    assert play(events, **options) == mails


def test_a_restart_resets_the_count_of_failed_checks() -> None:
    state = Outage(3, 0, 3600, now=0.0)
    for expected in (1, 2):
        assert not state.is_enough()
        state.note_bad(1.0)
        assert state.failures == expected
    assert state.is_enough()
    state.note_action({RESTARTED}, 2, 2.0)
    assert (state.failures, state.restarts, state.is_enough()) == (0, 2, False)
    state.note_good(3.0)
    assert state.restarts == 0


def test_seconds_of_an_outage() -> None:
    state = Outage(1, 0, 3600, now=0.0)
    assert state.seconds(5.0) == 0
    state.note_action({NOTHING}, 0, 6.0)
    assert state.seconds(10.0) == 4


@pytest.mark.parametrize(('before', 'late', 'mailed'), [
    ([FAILED], [Result.RESTARTED, Result.RESTARTED], [True, False]),
    ([RESTARTED], [Result.RESTARTED], [False]),
    ([FAILED], [Result.START_FAILED, Result.START_FAILED], [True, True]),   # each is a new reason
    ([RESTARTED], [Result.START_FAILED], [True]),
    ([], [Result.RESTARTED, Result.RESTARTED], [True, True]),   # there is no outage
])
def test_the_outcome_of_an_earlier_restart(before: list[Kind], late: list[Result], mailed: list[bool]) -> None:
    state = Outage(1, 0, 3600, now=0.0)
    for kind in before:
        state.note_action({kind}, 1, 1.0)
    assert [state.note_late(result) for result in late] == mailed
    assert state.is_on == bool(before)


@given(st.lists(st.tuples(st.integers(1, 100), st.sampled_from([GOOD, GRACE, NOTHING, RESTARTED, FAILED, LIMIT]))))
def test_each_outage_is_mailed_once_and_its_end_once(steps: list[tuple[int, Event]]) -> None:
    state = Outage(1, 50, 1e9, now=0.0)
    now = 0.0
    mailed: list[Event] = []
    for seconds, event in steps:
        now += seconds
        was_on = state.is_on
        result = apply(state, event, now)
        if event == GOOD:
            assert (result is not None) == was_on == bool(mailed)
            mailed = []
        elif result:
            kind = NOTHING if event == GRACE else event
            assert kind not in mailed
            mailed.append(kind)
        assert state.is_on == bool(mailed)


# What is said of the watched processes.

def make_process(name: str = 'web', state: State = State.RUNNING, uptime: int = 100, pid: int = 7,
                 group: str = '') -> Process:
    return Process(group or name, name, pid, state, state.name, 1000, 1000 + uptime, '')


def make_outcome(name: str, result: Result) -> Outcome:
    return Outcome(make_process(name), result, '')


@for_each('process, expected', [
    (make_process(uptime=59), True),
    (make_process(uptime=60), False),
    (make_process(uptime=0), True),
    (make_process(uptime=-1), False),       # the clock was set back since its start
    (make_process(state=State.STARTING, uptime=5), True),
    (make_process(state=State.BACKOFF, uptime=5), True),
    (make_process(state=State.STOPPED, uptime=5), False),
    (make_process(state=State.EXITED, uptime=5), False),
])
def test_is_in_grace(process: Process, expected: bool) -> None:
    assert outage.is_in_grace(process, 60) == expected


YOUNG, OLD, STOPPED = make_process(uptime=5), make_process(uptime=500), make_process(state=State.STOPPED)


@for_each('processes, expected', [
    ([YOUNG], True), ([YOUNG, YOUNG], True), ([YOUNG, OLD], False), ([OLD], False), ([], False), ([STOPPED], False),
    ([YOUNG, STOPPED], True), ([make_process(state=State.STARTING, uptime=5)], True),
    ([make_process(state=State.STARTING, uptime=500)], False), ([make_process(state=State.STARTING), YOUNG], False),
])
def test_are_all_in_grace(processes: list[Process], expected: bool) -> None:
    assert outage.are_all_in_grace(processes, 60) == expected


@for_each('process, grace, check_began, expected', [
    (OLD, 60, 0, None),
    (YOUNG, 0, 0, None),
    (YOUNG, 60, 0, 'left alone: grace period of 1m'),
    (STOPPED, 60, 0, 'left alone: not RUNNING'),
    (make_process(state=State.STOPPING), 0, 0, 'left alone: not RUNNING'),
    # Processes that started at 1000; supervisord's times are in whole seconds.
    (make_process(), 0, 999.5, 'left alone: it was started during the check'),
    (make_process(), 0, 1000.0, None),
    (make_process(), 0, 1000.5, None),
    (make_process(uptime=-1), 0, 999.5, None),      # the clock was set back since its start
])
def test_leave_alone(process: Process, grace: float, check_began: float, expected: str | None) -> None:
    outcome = outage.leave_alone(process, grace, check_began)
    assert (outcome and outcome.text) == expected
    assert outcome is None or outcome.result is Result.LEFT_ALONE


@pytest.mark.parametrize(('process', 'expected'), [
    (make_process(), 'web (RUNNING, pid 7, up 1m 40s)'),
    (make_process('web_00', group='web'), 'web:web_00 (RUNNING, pid 7, up 1m 40s)'),
    (make_process(state=State.FATAL, pid=0), 'web (FATAL)'),
])
def test_describe_process(process: Process, expected: str) -> None:
    assert outage.describe_process(process) == expected


def test_describe_left_alone() -> None:
    outcomes = [Outcome(make_process(name), Result.LEFT_ALONE, text) for name, text in (
        ('web', 'left alone: A'), ('api', 'left alone: B'), ('db', 'left alone: A'))]
    assert outage.describe_left_alone(outcomes) == 'left web, db alone: A; left api alone: B'
    assert outage.describe_left_alone([]) == ''


@for_each('outcomes, summary, kinds, restarts', [
    ([], '', {NOTHING}, 0),
    ([('web', Result.RESTARTED)], 'restarted web', {RESTARTED}, 1),
    ([(name, Result.RESTARTED) for name in 'abc'], 'restarted a, b, c', {RESTARTED}, 3),
    ([(name, Result.RESTARTED) for name in 'abcde'], 'restarted a, b, c and 2 more', {RESTARTED}, 5),
    ([('web', Result.START_FAILED)], 'failed to start web', {FAILED}, 1),
    ([('web', Result.STOP_FAILED)], 'failed to stop web', {FAILED}, 0),
    ([('web', Result.STILL_STARTING)], 'web still STARTING', {RESTARTED}, 1),
    ([('web', Result.LIMIT_REACHED)], 'web left alone', {LIMIT}, 0),
    ([('web', Result.DRY_RUN)], 'dry run: web not restarted', {NOTHING}, 0),
    ([('web', Result.LEFT_ALONE)], 'web left alone', {NOTHING}, 0),
    ([('web', Result.LEFT_ALONE), ('api', Result.RESTARTED)], 'restarted api', {RESTARTED}, 1),
    ([('web', Result.LIMIT_REACHED), ('api', Result.START_FAILED), ('db', Result.RESTARTED)],
     'restarted db; failed to start api; web left alone', {LIMIT, FAILED, RESTARTED}, 2),
])
def test_the_outcome_in_a_subject(outcomes: list[tuple[str, Result]], summary: str, kinds: set[Kind],
                                  restarts: int) -> None:
    made = [make_outcome(*outcome) for outcome in outcomes]
    assert outage.summarize(made, 60) == summary
    assert outage.find_kinds(made) == kinds
    assert outage.count_restarts(made) == restarts


def test_the_subject_names_the_grace_period() -> None:
    outcomes = [outage.leave_alone(process, 60) for process in (YOUNG, STOPPED)]
    assert outage.summarize([outcome for outcome in outcomes if outcome], 60) == 'web, web left alone: grace period'
