"""Restarter against random schedules on a simulated supervisord: what must be true of every restart.

A failure shows the seed of its schedule and what happened in it. To look at one schedule, or at more of them:

    PYTHONPATH=tests python tests/unit/test_restart_model.py 1234
    PYTHONPATH=tests python tests/unit/test_restart_model.py 10000 60000
"""
from __future__ import annotations

import random
import sys
from typing import Any

import pytest
from simulation import OPERATOR, SUPERVISORD, US, Child, SimulatedProcess, World
from supervisor.http import NOT_DONE_YET

from superlance import restart
from superlance.listener import Event, ExitRequest
from superlance.options import Rate
from superlance.restart import NO_RETRY, Outcome, Restarter, Result
from superlance.rpc import Process, Refused, State, Supervisor, Unknown

SCHEDULES = 2000
PARTS = 10
TIMEOUT_SECONDS = 30.0
# At least so much time is between the starts of a process that stays down: the second is made at once, the third at a
# later tick.
GAPS = (0, 0, 60, 120, 240, 480, 600)
LONGEST_FOLLOW_SECONDS = 160    # of one start within a tick: lost calls, and 60 seconds twice
LONGEST_TICK_CALLS = 4000
DOWN = (State.STOPPED, State.EXITED, State.FATAL)
# What is reported without a call of stopProcess.
BEFORE_STOP = (Result.LEFT_ALONE, Result.LIMIT_REACHED, Result.STOP_FAILED)
COUNTED = (Result.RESTARTED, Result.STILL_STARTING, Result.START_FAILED)
FINAL = (Result.RESTARTED, Result.LEFT_ALONE)


class Incident:
    """One restart: from the call of stopProcess to its last report."""

    def __init__(self, checked: Process) -> None:
        self.checked = checked
        self.is_stopped = False             # supervisord has carried out the stop
        self.is_stop_uncertain = False      # it has not, and nobody has said so
        self.is_start_open = False          # we don't know the outcome of our last start,
        self.is_start_unclear = False       # and its operator has started it since
        self.reports: list[Outcome] = []
        self.starts: list[tuple[float, int]] = []   # when startProcess was called, and in which tick
        self.is_start_accepted = False      # the last of them

    @property
    def is_final(self) -> bool:
        return bool(self.reports) and self.reports[-1].result in FINAL


class Ledger:
    """What became of one program, whoever did it."""

    def __init__(self) -> None:
        self.down_by: str | None = None     # who stopped it last; None: it has been started since
        self.down_since = 0.0
        self.pid_since = 0.0
        self.looked_at = 0.0                # supervisord's last answer to us about it
        self.incident: Incident | None = None
        self.counted: list[float] = []
        self.restarted_at = 0.0
        self.starter: str | None = None
        self.ran_after: str | None = None


class SimulatedSupervisor(Supervisor):
    """A connection to a World that loses calls and answers."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__({})
        self._schedule = schedule

    def call(self, method: str, *arguments: Any) -> Any:
        return self._schedule.call(method, *arguments)


class Schedule:
    """A random course of events, and a listener in it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(rng)
        self.world.on_note = self.note
        self.world.make_child = self.make_child
        self.tick_seconds = rng.choice((5, 5, 60))
        self.is_bad = False             # a program that is started now exits again
        self.loses = 0.0                # how probably a call is lost
        self.is_late_call = False
        self.programs: dict[str, dict[str, Any]] = {}
        self.ledgers: dict[str, Ledger] = {}
        self.stop_seconds = rng.choices((0.1, 2.0, 8.0, 40.0, None), (6, 4, 2, 1, 1))[0]
        self.kill_seconds = rng.choices((0.01, 90.0), (9, 1))[0]
        for name in ('web', 'worker')[:rng.choice((1, 1, 2))]:
            self.programs[name] = {
                'startsecs': rng.choice((0, 1, 1, 5, 75)), 'startretries': rng.choice((0, 1, 3)),
                'stopwaitsecs': rng.choice((2, 10, 10, 50)), 'autorestart': rng.choice(('false', 'true', 'unexpected'))}
            self.ledgers[name] = Ledger()
        self.has_no_startsecs = all(options['startsecs'] == 0 for options in self.programs.values())
        self.limit = rng.choice((None, None, Rate(1, 300), Rate(2, 600), Rate(3, 3600)))
        self.request = ExitRequest()
        self.restarter = Restarter(
            SimulatedSupervisor(self), self.report, self.limit, request=self.request, sleep=self.world.sleep,
            clock=lambda: self.world.now, wall_clock=lambda: self.world.now, find_members=lambda pid: set())
        self.ticks = 0
        self.tick_when = 0
        self.calls = 0
        self.is_shut_down = False
        self.is_broken_for_good = rng.random() < 0.15
        begin = self.world.now
        self.quiet_at = begin + self.tick_seconds * rng.choice((12, 25))
        self.ends_at = self.quiet_at + rng.choice((900, 1500, 4000) if self.is_broken_for_good else (900, 1500))
        self.signal_at = begin + rng.random() * 1.3 * (self.quiet_at - begin) if rng.random() < 0.5 else float('inf')
        self.plan()

    # What happens to supervisord, its programs and its operator.

    def make_child(self, pid: int) -> Child:
        rng = self.rng
        if self.is_bad and rng.random() < 0.8:
            seconds = rng.choice((0.0, 0.0, 3.0) if self.has_no_startsecs else (0.05, 0.3, 0.9, 3.0, 30.0))
            return Child(pid, seconds, rng.choice((0, 3 << 8)), self.stop_seconds, self.kill_seconds)
        return Child(pid, None, 0, self.stop_seconds, self.kill_seconds)

    def plan(self) -> None:
        world, rng = self.world, self.rng
        begin = world.now
        actions = [self.operator_stops, self.operator_starts, self.operator_restarts, self.crash, self.lose_file,
                   self.refuse_forks, self.be_bad, self.hang, self.lose_calls, self.lose_calls]
        for _ in range(rng.randrange(1, 9)):
            world.at(begin + 3 + rng.random() * (self.quiet_at - begin - 3), rng.choice(actions))
        rare = rng.random()
        if rare < 0.05:
            world.at(begin + rng.random() * (self.quiet_at - begin), self.operator_removes)
        elif rare < 0.10:
            world.at(begin + rng.random() * (self.ends_at - begin), self.shut_down)
        if self.is_broken_for_good:
            world.at(self.quiet_at - rng.random() * 60, self.break_for_good)
        world.at(self.quiet_at, self.be_quiet)
        world.at(self.signal_at, self.signal)

    def signal(self) -> None:
        self.world.log('SIGTERM')
        self.request.requested = True

    def window(self, name: str, value: Any, quiet: Any, target: Any = None) -> None:
        target = target or self
        self.world.log(f'{name} = {value}')
        setattr(target, name, value)
        until = self.world.now + self.rng.choice((0.5, 5, 30, 120))

        def close() -> None:
            self.world.log(f'{name} = {quiet}')
            setattr(target, name, quiet)
        self.world.at(min(until, self.quiet_at), close)

    def lose_file(self) -> None:
        self.window('is_file_missing', True, False, self.world)

    def refuse_forks(self) -> None:
        self.window('is_fork_refused', True, False, self.world)

    def be_bad(self) -> None:
        self.window('is_bad', True, False)

    def lose_calls(self) -> None:
        self.window('loses', self.rng.choice((0.2, 0.5, 1.0)), 0.0)

    def hang(self) -> None:
        seconds = min(self.rng.choice((1, 10, 40, 100)), self.quiet_at - self.world.now)
        self.world.log(f'supervisord hangs for {seconds:.1f} s')
        self.world.hang(seconds)

    def crash(self) -> None:
        process = self.world.find_process(self.rng.choice(list(self.programs)))
        if process:
            self.world.log('crash')
            self.world.kill_process(process)

    def break_for_good(self) -> None:
        self.world.log('the file is missing for good')
        self.world.is_file_missing = True
        self.quiet_file = True

    def be_quiet(self) -> None:
        self.world.log('from here on it is quiet')
        self.is_bad, self.loses = False, 0.0
        self.world.is_fork_refused = False
        self.world.is_file_missing = self.is_broken_for_good

    def shut_down(self) -> None:
        if self.world.hung_until <= self.world.now:
            self.world.log('supervisord shuts down')
            self.is_shut_down = True
            self.world.shut_down()

    def operate(self, method: str, name: str) -> bool:
        """Make a call for the operator, who is not so fast as to start a process twice in one second."""
        world = self.world
        process = world.find_process(name)
        if world.hung_until > world.now or process is None:
            return False
        if method == 'startProcess' and int(process.laststart) >= int(world.now):
            world.at(int(world.now) + 1.01, lambda: self.operate(method, name))
            return False
        world.log(f'operator: {method} {name}')
        try:
            world.execute(OPERATOR, method, name, *([False] if method != 'removeProcessGroup' else []))
        except Refused as why:
            world.log(f'  {why}')
            return False
        return True

    def operator_stops(self) -> None:
        self.operate('stopProcess', self.rng.choice(list(self.programs)))

    def operator_starts(self) -> None:
        self.operate('startProcess', self.rng.choice(list(self.programs)))

    def operator_restarts(self) -> None:
        name = self.rng.choice(list(self.programs))
        if self.operate('stopProcess', name):
            self.world.at(self.world.now + self.rng.choice((0.2, 3, 12)),
                          lambda: self.operate('startProcess', name))

    def operator_removes(self) -> None:
        name = self.rng.choice(list(self.programs))
        self.operate('stopProcess', name)
        self.world.at(self.world.now + self.rng.choice((0.2, 3, 12)),
                      lambda: self.operate('removeProcessGroup', name))

    # What supervisord did, and for whom.

    def note(self, what: str, process: SimulatedProcess, actor: str) -> None:
        ledger = self.ledgers[process.config.name]
        if what == 'RUNNING':
            ledger.ran_after, ledger.down_by = ledger.down_by, None
        elif what == 'EXITED' and process.exitstatus and self.world.now < process.laststart + 0.01:
            ledger.down_by = ledger.ran_after   # it was RUNNING for no time at all
        elif what == 'stop':
            if actor == US:
                self.check_stop(ledger, process)
            ledger.down_by, ledger.down_since = actor, self.world.now
        elif what == 'start':
            if actor == US:
                self.check_start(ledger)
            ledger.starter = actor if actor != SUPERVISORD else ledger.starter
            if actor == OPERATOR:
                if ledger.incident and ledger.incident.is_start_open:
                    ledger.incident.is_start_unclear = True
                ledger.down_by, ledger.down_since = None, self.world.now
            ledger.pid_since = self.world.now

    def check_stop(self, ledger: Ledger, process: SimulatedProcess) -> None:
        incident = ledger.incident
        assert incident
        incident.is_stopped, incident.is_stop_uncertain = True, False
        has_changed_since = ledger.pid_since >= ledger.looked_at or self.is_late_call
        assert process.pid == incident.checked.pid or has_changed_since, 'another process was stopped'

    def check_start(self, ledger: Ledger) -> None:
        incident = ledger.incident
        assert incident
        is_ours = ledger.down_by == US or (ledger.down_by is None and ledger.starter == US)
        if is_ours or self.is_late_call or ledger.down_since >= ledger.looked_at:
            return
        # From outside, a lost stop or start of ours cannot be distinguished from the operator's.
        if ledger.down_by == OPERATOR:
            assert incident.is_stop_uncertain, "the operator's stop was undone"
        else:
            assert incident.is_stop_uncertain or incident.is_start_unclear, 'a process was started that we did not stop'

    # The listener's calls and reports.

    def call(self, method: str, *arguments: Any) -> Any:
        world, ledger = self.world, self.ledgers[arguments[0].partition(':')[2]]
        self.calls += 1
        assert self.calls < LONGEST_TICK_CALLS, 'a tick without end'
        if method == 'stopProcess':
            self.begin_incident(ledger)
        elif method == 'startProcess':
            self.begin_start(ledger)
        world.sleep(self.rng.random() * 0.02)
        fault = 'pass'
        if self.rng.random() < self.loses:
            fault = self.rng.choice(('lose call', 'lose answer'))
        world.log(f'we: {method} {arguments[0]} {fault}')
        if fault == 'lose call':
            self.note_lost(ledger, method)
            raise Unknown(f'{method}: lost')
        waited_until = world.now + TIMEOUT_SECONDS
        while world.hung_until > world.now:
            if world.hung_until > waited_until:
                self.note_lost(ledger, method)
                world.queue(lambda: self.execute_late(method, *arguments))
                world.run_until(waited_until)
                raise Unknown(f'{method}: timed out')
            world.run_until(world.hung_until)
        try:
            answer = self.world.execute(US, method, *arguments)
        except Refused as why:
            world.log(f'  {why}')
            if fault == 'pass':
                ledger.looked_at = world.now
                raise
            raise Unknown(f'{method}: lost') from None
        looked_at = world.now
        if method == 'startProcess' and ledger.incident:
            ledger.incident.is_start_accepted = True
        answer = world.wait_for_answer(answer, waited_until - world.now)
        if answer is NOT_DONE_YET or fault == 'lose answer':
            raise Unknown(f'{method}: lost')
        ledger.looked_at = looked_at if method == 'getProcessInfo' else world.now
        if method == 'getProcessInfo' and answer['state'] in DOWN and ledger.incident:
            ledger.incident.is_start_open = False
        return answer

    def execute_late(self, method: str, *arguments: Any) -> None:
        """A call that was waiting in the socket of a supervisord that hung."""
        self.is_late_call = True
        try:
            self.world.execute(US, method, *arguments)
        except Refused as why:
            self.world.log(f'  late {method}: {why}')
        finally:
            self.is_late_call = False


    def begin_incident(self, ledger: Ledger) -> None:
        assert not self.request.requested, 'a stop after the signal'
        assert self.tick_when >= int(ledger.restarted_at), 'a restart for a tick from before the last one'
        if self.limit:
            recent = [when for when in ledger.counted if when > self.world.now - self.limit.seconds]
            assert len(recent) < self.limit.times, 'more restarts than --max-restarts'
        if ledger.incident:
            assert ledger.incident.is_final or not ledger.incident.is_stopped, 'a restart that was never reported'
        ledger.incident = Incident(self.checked)

    def begin_start(self, ledger: Ledger) -> None:
        incident, now = ledger.incident, self.world.now
        assert incident and not incident.is_final, 'a start after the last report'
        incident.is_start_accepted, incident.is_start_open = False, True
        incident.starts.append((now, self.ticks))
        number = len(incident.starts) - 1
        if number and not self.request.requested:
            before, tick = incident.starts[-2]
            gap = GAPS[min(number - 1, len(GAPS) - 1)]
            assert now - before >= gap - 0.1, f'start {number + 1} after {now - before:.0f} s'
            assert number < 2 or tick < self.ticks, f'start {number + 1} in the same tick'

    def note_lost(self, ledger: Ledger, method: str) -> None:
        assert ledger.incident or method == 'getProcessInfo'
        if ledger.incident and method == 'stopProcess':
            ledger.incident.is_stop_uncertain = True

    def report(self, outcome: Outcome) -> None:
        self.world.log(f'REPORT {outcome.result.name}: {outcome.text}')
        ledger = self.ledgers[outcome.process.program]
        incident, now = ledger.incident, self.world.now
        if outcome.result is Result.LIMIT_REACHED:
            assert self.limit
            recent = [when for when in ledger.counted if when > now - self.limit.seconds]
            assert len(recent) >= self.limit.times, 'the limit was reported too early'
            return
        if incident is None or incident.checked is not outcome.process or incident.is_final:
            assert outcome.result in BEFORE_STOP, 'a restart without a stop'
            return
        if outcome.result in COUNTED and not any(report.result in COUNTED for report in incident.reports):
            ledger.counted.append(now)
        assert outcome.text not in [report.text for report in incident.reports], 'reported twice'
        assert outcome.result is not Result.STILL_STARTING or all(
            report.result is not Result.STILL_STARTING for report in incident.reports), 'reported twice'
        incident.reports.append(outcome)
        if outcome.result is Result.RESTARTED:
            ledger.restarted_at = now

    # The listener.

    def handle(self) -> None:
        if self.restarter.retry() or self.restarter.is_stale(Event('TICK', f'when:{self.tick_when}', '', 0.0)):
            return
        for name in self.programs:
            if self.request.requested:
                return
            if self.rng.random() < 0.35 and self.world.now < self.quiet_at:
                self.check(name)

    def check(self, name: str) -> None:
        try:
            self.checked = SimulatedSupervisor(self).get_process(f'{name}:{name}')
        except (Refused, Unknown):
            return
        if not self.checked.pid or self.checked.state == State.STOPPING:
            return
        if self.rng.random() < 0.05:    # something happens while, for example, a URL is requested
            self.rng.choice((self.crash, self.operator_stops, self.operator_restarts))()
        self.world.sleep(self.rng.choice((0.0, 0.1, 3.0)))
        prepare = self.rng.random() < 0.2
        self.restarter.restart(
            self.checked, (lambda process: self.world.sleep(self.rng.random() * 15)) if prepare else None)

    def run(self) -> None:
        with self.world.as_clock():
            for name, options in self.programs.items():
                self.world.log(f'{name}: {options}')
                self.world.add_program(name, **options)
            when = (int(self.world.now) // self.tick_seconds + 1) * self.tick_seconds
            while when < self.ends_at:
                self.world.run_until(min(max(when, self.world.now), max(self.signal_at, self.world.now)))
                if self.request.requested:
                    break
                self.tick_when = when
                self.ticks += 1
                self.calls = 0
                self.handle()
                # supervisord discards the oldest events of a full buffer.
                when += self.tick_seconds
                when = max(when, (int(self.world.now) // self.tick_seconds - 9) * self.tick_seconds)
            self.calls = 0
            if self.request.requested or self.is_shut_down:
                self.restarter.finish()
            self.world.run_until(max(self.world.now, self.quiet_at) + 200)
            self.check_end()

    # What must be true at the end.

    def check_end(self) -> None:
        for name, ledger in self.ledgers.items():
            incident, process = ledger.incident, self.world.find_process(name)
            if self.is_shut_down or process is None or incident is None:
                continue
            is_down = ledger.down_by == US and process.state in DOWN
            if self.request.requested:
                self.check_exit(incident, is_down)
            elif self.is_broken_for_good:
                self.check_back_off(incident, is_down)
            else:
                assert not is_down, 'it is down, and we stopped it'
                assert incident.is_final or not incident.is_stopped, 'a restart that was never reported'
                assert not self.restarter._stopped

    def check_exit(self, incident: Incident, is_down: bool) -> None:
        if not is_down or incident.is_start_accepted:
            return
        assert incident.reports and NO_RETRY in incident.reports[-1].text, 'left down without a word'
        assert self.signal_at < self.quiet_at or self.is_broken_for_good, 'left down'

    def check_back_off(self, incident: Incident, is_down: bool) -> None:
        if not is_down:
            return
        times = [when for when, _ in incident.starts]
        assert times, 'it was never started'
        first = next((number for number, when in enumerate(times) if when > self.quiet_at - 60), len(times))
        for number in range(max(first, 1), len(times) + 1):
            when = times[number] if number < len(times) else self.world.now - 200
            # If supervisord itself repeated the first start (BACKOFF), that was the one at once.
            gap = GAPS[min(number, len(GAPS) - 1)] + 2 * self.tick_seconds + LONGEST_FOLLOW_SECONDS
            assert when - times[number - 1] <= gap, f'start {number + 1} only after {when - times[number - 1]:.0f} s'


def run_schedule(seed: int) -> Schedule:
    schedule = Schedule(seed)
    try:
        schedule.run()
    except Exception as why:
        lines = '\n'.join(schedule.world.trace[-400:])
        raise AssertionError(f'seed {seed}: {why or type(why).__name__}\n{lines}') from why
    return schedule


@pytest.mark.once
@pytest.mark.parametrize('part', range(PARTS))
def test_restarts_in_random_schedules(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, 'POLL_SECONDS', 0.5)
    for seed in range(part, SCHEDULES, PARTS):
        run_schedule(seed)


if __name__ == '__main__':
    restart.POLL_SECONDS = 0.5
    if len(sys.argv) == 2:
        print('\n'.join(run_schedule(int(sys.argv[1])).world.trace))
    for seed in range(*map(int, sys.argv[1:3])) if len(sys.argv) == 3 else ():
        try:
            run_schedule(seed)
        except AssertionError as why:
            print(str(why).partition('\n')[0])
