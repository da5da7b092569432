"""A supervisord in virtual time: supervisor's own code for processes and calls, over a simulated kernel and clock.

What decides a state (process.py), an answer (rpcinterface.py) and a removal (supervisord.py) is the installed
supervisor itself; only fork, kill, waitpid, the clock and the poll loop are simulated.
"""
from __future__ import annotations

import errno
import heapq
import itertools
import random
import signal
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import supervisor.process
import supervisor.rpcinterface
from supervisor.datatypes import RestartUnconditionally, RestartWhenExitUnexpected
from supervisor.http import NOT_DONE_YET
from supervisor.options import NotFound
from supervisor.process import ProcessGroup, Subprocess
from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.states import ProcessStates, SupervisorStates, getProcessStateDescription
from supervisor.supervisord import Supervisor as Supervisord
from supervisor.xmlrpc import RPCError, getFaultDescription

from superlance.rpc import Refused

AUTORESTART = {'false': False, 'true': RestartUnconditionally, 'unexpected': RestartWhenExitUnexpected}
US, OPERATOR, SUPERVISORD = 'us', 'operator', 'supervisord'


class Child:
    """A process of the simulated kernel."""

    def __init__(self, pid: int, seconds: float | None, status: int, stop_seconds: float | None,
                 kill_seconds: float) -> None:
        self.pid = pid
        self.seconds = seconds              # until it exits by itself; None: never
        self.status = status                # then, as waitpid returns it
        self.stop_seconds = stop_seconds    # after the stop signal; None: it ignores it
        self.kill_seconds = kill_seconds    # after SIGKILL: long, if it is stuck in the kernel
        self.has_exited = False


class SimulatedProcess(Subprocess):     # type: ignore[misc]
    """supervisor's Subprocess, which notes whoever starts and stops it."""

    world: World

    def get_execv_args(self) -> tuple[str, list[str]]:
        if self.world.is_file_missing:
            raise NotFound("can't find command '/bin/web'")
        return '/bin/web', ['/bin/web']

    def spawn(self) -> int | None:
        if not self.pid:    # else supervisor only logs that it is running already
            self.world.note('start', self)
        pid: int | None = super().spawn()
        return pid

    def stop(self) -> str | None:
        self.world.note('stop', self)
        message: str | None = super().stop()
        return message

    def transition(self) -> None:
        with self.world.acting(SUPERVISORD):
            super().transition()

    def change_state(self, new_state: int, expected: bool = True) -> None:
        super().change_state(new_state, expected)
        self.world.note(getProcessStateDescription(new_state), self)


class World:
    """supervisord, its processes and their kernel. Times are seconds since the epoch, and pass only in run_until.

    note is called as on_note(what, process, actor): a start, a stop or a new state.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 1_000_000_000.0 + rng.random() * 1000
        self.is_file_missing = False
        self.is_fork_refused = False
        self.hung_until = 0.0
        self.actor = SUPERVISORD
        self.on_note: Callable[[str, SimulatedProcess, str], None] = lambda what, process, actor: None
        self.make_child: Callable[[int], Child] = lambda pid: Child(pid, None, 0, 0.1, 0.01)
        self.trace: list[str] = []
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._serial = itertools.count()
        self._pids = itertools.count(100)
        self._children: dict[int, Child] = {}
        self._zombies: list[Child] = []
        self._queued: list[Callable[[], object]] = []
        self._poll_at = float('inf')
        self.options = SimpleNamespace(
            logger=_Logger(), pidhistory={}, mood=SupervisorStates.RUNNING, fork=self._fork, kill=self._kill,
            waitpid=self._waitpid, close_parent_pipes=lambda pipes: None, close_child_pipes=lambda pipes: None)
        self.supervisord = Supervisord(self.options)
        self.rpc = _Interface(self.supervisord)

    @contextmanager
    def as_clock(self) -> Iterator[None]:
        """Let supervisor's modules use this world's clock."""
        before = supervisor.process.time
        clock = SimpleNamespace(time=lambda: self.now)
        supervisor.process.time = supervisor.rpcinterface.time = clock
        try:
            yield
        finally:
            supervisor.process.time = supervisor.rpcinterface.time = before

    def add_program(self, name: str, startsecs: int = 1, startretries: int = 3, stopwaitsecs: int = 10,
                    autorestart: str = 'unexpected', autostart: bool = True) -> None:
        """Add a program that is a group of its own."""
        process_config = SimpleNamespace(
            name=name, options=self.options, startsecs=startsecs, startretries=startretries, exitcodes=[0],
            stopwaitsecs=stopwaitsecs, stopsignal=signal.SIGTERM, stopasgroup=False, killasgroup=False, priority=999,
            autorestart=AUTORESTART[autorestart], autostart=autostart, stdout_logfile=None, stderr_logfile=None,
            make_dispatchers=lambda process: ({}, {}))

        def make_process(group: ProcessGroup) -> SimulatedProcess:
            process = SimulatedProcess(process_config)
            process.group, process.world = group, self
            return process

        process_config.make_process = make_process
        config = SimpleNamespace(name=name, priority=999, process_configs=[process_config])
        config.after_setuid = lambda: None
        config.make_group = lambda: ProcessGroup(config)
        self.supervisord.add_process_group(config)
        self._poll()

    def find_process(self, name: str) -> SimulatedProcess | None:
        group = self.supervisord.process_groups.get(name)
        process: SimulatedProcess | None = group.processes[name] if group else None
        return process

    def log(self, line: str) -> None:
        self.trace.append(f'{self.now - 1_000_000_000:10.2f} {line}')

    def note(self, what: str, process: SimulatedProcess) -> None:
        self.log(f'  {process.config.name}: {what} ({self.actor}) pid {process.pid} start {int(process.laststart)}')
        self.on_note(what, process, self.actor)

    @contextmanager
    def acting(self, actor: str) -> Iterator[None]:
        before, self.actor = self.actor, actor
        try:
            yield
        finally:
            self.actor = before

    # Time.

    def at(self, when: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._events, (when, next(self._serial), action))

    def run_until(self, when: float) -> None:
        while self._events and self._events[0][0] <= when:
            self._run_event()
        self.now = max(self.now, when)

    def sleep(self, seconds: float) -> None:
        self.run_until(self.now + seconds)

    def _run_event(self) -> None:
        when, _, action = heapq.heappop(self._events)
        self.now = max(self.now, when)
        action()

    # The kernel.

    def _fork(self) -> int:
        if self.is_fork_refused:
            raise OSError(errno.EAGAIN, 'Resource temporarily unavailable')
        child = self.make_child(next(self._pids))
        self._children[child.pid] = child
        if child.seconds is not None:
            self._exit_at(child, child.seconds, child.status)
        return child.pid

    def _kill(self, pid: int, signum: int) -> None:
        child = self._children[pid]
        if signum == signal.SIGKILL:
            self._exit_at(child, child.kill_seconds, signum)
        elif child.stop_seconds is not None:
            self._exit_at(child, child.stop_seconds, 0)

    def kill_process(self, process: SimulatedProcess) -> None:
        """Let a process crash."""
        if process.pid:
            self._exit_at(self._children[process.pid], 0, signal.SIGSEGV)

    def _exit_at(self, child: Child, seconds: float, status: int) -> None:
        def end() -> None:
            if not child.has_exited:
                child.has_exited, child.status = True, status
                self._zombies.append(child)
                self._poll()
        if seconds:
            self.at(self.now + seconds, end)
        elif not child.has_exited:      # at once: the caller's own poll sees it
            child.has_exited, child.status = True, status
            self._zombies.append(child)
            self._poll_soon(0.0)

    def _waitpid(self) -> tuple[int, int]:
        if not self._zombies:
            return 0, 0
        child = self._zombies.pop(0)
        del self._children[child.pid]
        return child.pid, child.status

    # supervisord's loop: transitions, then the children that have exited (supervisord.runforever).

    def _poll(self) -> None:
        if self.hung_until > self.now:
            return
        with self.acting(SUPERVISORD):
            for group in list(self.supervisord.process_groups.values()):
                group.transition()
            self.supervisord.reap()
        for group in self.supervisord.process_groups.values():
            for process in group.processes.values():
                self._poll_for(process)

    def _poll_for(self, process: SimulatedProcess) -> None:
        """supervisord polls for at most a second: let it do so when there will be something to do."""
        if process.state in (ProcessStates.STARTING, ProcessStates.BACKOFF, ProcessStates.STOPPING):
            self._poll_soon(max(0.0, process.delay - self.now) + self.rng.random() + 0.001)
        elif process.state == ProcessStates.EXITED and process.config.autorestart:
            self._poll_soon(self.rng.random() + 0.001)

    def _poll_soon(self, seconds: float) -> None:
        when = self.now + seconds
        if self.now < self._poll_at <= when:
            return

        def poll() -> None:
            if self._poll_at == when:
                self._poll_at = float('inf')
                self._poll()
        self._poll_at = when
        self.at(when, poll)

    def hang(self, seconds: float) -> None:
        """supervisord does nothing for so long; the calls that arrive meanwhile wait."""
        self.hung_until = max(self.hung_until, self.now + seconds)
        self.at(self.hung_until, self._resume)

    def _resume(self) -> None:
        if self.now < self.hung_until:
            return
        queued, self._queued = self._queued, []
        for call in queued:
            call()
        self._poll()

    def shut_down(self) -> None:
        self.options.mood = SupervisorStates.SHUTDOWN
        for group in self.supervisord.process_groups.values():
            group.stop_all()
        self._poll()

    # Calls.

    def execute(self, actor: str, method: str, *arguments: Any) -> Any:
        """Make a call at once; return its answer, which may be deferred. Raises Refused."""
        try:
            with self.acting(actor):
                return getattr(self.rpc, method)(*arguments)
        except RPCError as why:
            raise Refused(getFaultDescription(why.code), why.text) from None
        finally:
            self._poll()

    def queue(self, call: Callable[[], object]) -> None:
        """Make a call when supervisord no longer hangs."""
        self._queued.append(call)

    def wait_for_answer(self, answer: Any, seconds: float) -> Any:
        """Return the answer of a call that may be deferred, NOT_DONE_YET if it takes longer."""
        end = self.now + seconds
        while callable(answer):
            result = answer() if self.hung_until <= self.now else NOT_DONE_YET
            if result is not NOT_DONE_YET:
                return result
            if not self._events or self._events[0][0] > end:
                self.now = end
                return NOT_DONE_YET
            self._run_event()
        return answer


class _Interface(SupervisorNamespaceRPCInterface):  # type: ignore[misc]
    def _interpretProcessInfo(self, info: object) -> str:
        return ''   # a text for people, which costs more than all the rest


class _Logger:
    def debug(self, *_: object) -> None:
        pass

    info = warn = critical = blather = debug
