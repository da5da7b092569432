"""Which process a name means, and how one is stopped and started so that it never stays down.

supervisord is asked through supervisor.childutils, which is imported when it is first
needed: it costs 15 MB and 40 ms.
"""
from __future__ import annotations

import marshal
import os
import signal
import sys
import time
from collections import deque
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from superlance.listener import Event, Log, parse_tokens, uninterrupted
from superlance.options import EVERY, Name, Rate, UsageError, parse_name, without_password  # noqa: F401

# supervisor/states.py, all of them
STOPPED, STARTING, RUNNING, BACKOFF = 0, 10, 20, 30
STOPPING, EXITED, FATAL, UNKNOWN = 40, 100, 200, 1000

# One call; a stop or start that takes longer is followed by looking, see Restarter.
CALL_TIMEOUT_SECONDS = 30
# How long a restart whose answer was lost is followed before it is left to the next tick.
FOLLOW_SECONDS = 60
LOOK_SECONDS = 0.2
MAX_FAILED_CALLS = 3
# For want of an answer the names are not checked, and asked for again later.
NAMES_TIMEOUT_SECONDS = 5
NAMES_RETRY_SECONDS = 60


class CantTell(Exception):
    """Something could not be found out, which is not the same as bad; the message is one line."""


class Refused(Exception):
    """supervisord answered that it won't; `fault` is the name of one of supervisor.xmlrpc.Faults."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class Process(NamedTuple):
    """A process as supervisord describes it; times are supervisord's, in epoch seconds."""

    group: str
    program: str
    pid: int
    state: int
    state_name: str
    start: int
    now: int
    spawn_error: str

    @property
    def namespec(self) -> str:
        """The name that means this process to supervisord."""
        return f'{self.group}:{self.program}'

    @property
    def title(self) -> str:
        """The name that supervisorctl shows to people."""
        return self.program if self.group == self.program else self.namespec

    @property
    def uptime_seconds(self) -> int:
        return max(0, self.now - self.start)


def find_unmatched(names: Iterable[Name], processes: Iterable[Process]) -> list[str]:
    """Return a line for each name that means no process; EVERY may."""
    known = [(p.group, p.program) for p in processes]
    lines = []
    for name in names:
        if name != EVERY and not any(name.means(*pair) for pair in known):
            hint = ''
            if name.group is None and any(group == name.program for group, _ in known):
                hint = f'; there is a group of that name: for all its processes, write {name.program}:*'
            lines.append(f'no process is called {name}{hint}')
    return lines


class Supervisor:
    """supervisord's XML-RPC interface, as far as the listeners need it.

    Every call is a fresh connection: one that was kept may be gone after an hour.
    Raises CantTell where there is no answer, Refused where the answer is no.
    """

    def __init__(self, environment: Mapping[str, str], timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> None:
        self._environment = environment
        self._timeout_seconds = timeout_seconds

    def call(self, method: str, *arguments: Any) -> Any:
        import socket
        from http.client import HTTPException
        from urllib.parse import urlsplit
        from xml.parsers.expat import ExpatError
        from xmlrpc.client import Error, Fault, ProtocolError

        from supervisor.childutils import getRPCInterface
        from supervisor.xmlrpc import Faults, getFaultDescription

        url = self._environment.get('SUPERVISOR_SERVER_URL', '')
        shown = without_password(url)
        # Both kinds of supervisor's connections take their timeout from here.
        socket.setdefaulttimeout(self._timeout_seconds)
        try:
            parts = urlsplit(url)
            if parts.scheme == 'http' and not parts.hostname:
                raise ValueError('the URL has no host')
            proxy = getRPCInterface(dict(self._environment, SUPERVISOR_SERVER_URL=url))
            try:
                return getattr(proxy.supervisor, method)(*arguments)
            finally:
                proxy('close')()
        except Fault as why:
            if why.faultCode == Faults.UNKNOWN_METHOD:
                raise CantTell(f'supervisord at {shown} has no interface for this: supervisord.conf needs an '
                               '[rpcinterface:supervisor] section')
            raise Refused(getFaultDescription(why.faultCode), why.faultString)
        except ProtocolError as why:
            if why.errcode == 401:
                raise CantTell(f'supervisord at {shown} asks for a user name and password (401): set '
                               'SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD by environment= in the '
                               "listener's section, or for --once username and password in [supervisorctl]")
            raise CantTell(f'supervisord at {shown} answers {why.errcode} to {method}: {why.errmsg}')
        except PermissionError:
            raise CantTell("supervisord's socket %s may not be opened by user %d: see chmod and chown in "
                           '[unix_http_server], or user in the listener\'s section' % (shown, os.getuid()))
        except (OSError, HTTPException, ExpatError, Error, ValueError) as why:
            # Where the URL has a password, the text may hold a piece of it.
            reason = getattr(why, 'strerror', None) or (str(why) if shown == url else '') or type(why).__name__
            raise CantTell(f'supervisord at {shown} does not answer {method}: {reason}')

    def get_processes(self) -> list[Process]:
        return [make_process(info) for info in self.call('getAllProcessInfo')]

    def get_processes_in_child(self, timeout_seconds: int) -> list[Process]:
        """Return what get_processes does; its imports cost 15 MB, which a child takes with it when it ends.

        This is for a listener that may never need supervisord again.
        """
        if 'supervisor.childutils' in sys.modules:
            return self.get_processes()  # they are paid for
        pipe_ends: tuple[int, ...] = ()
        try:
            reader, writer = pipe_ends = os.pipe()
            child = os.fork()
        except OSError as why:
            for fd in pipe_ends:
                os.close(fd)
            raise CantTell(f'unable to start a process that asks supervisord: {why.strerror}')
        if not child:
            self._answer_in_child(writer, timeout_seconds)  # pragma: no cover  coverage loses this frame at the fork
        os.close(writer)
        with os.fdopen(reader, 'rb') as pipe:
            answer = pipe.read()
        status = os.waitpid(child, 0)[1]
        if status == signal.SIGALRM:
            raise CantTell('supervisord did not answer within %d s' % timeout_seconds)
        if status:
            raise CantTell('the process that asks supervisord has failed (wait status %d)' % status)
        processes, reason = marshal.loads(answer)
        if reason:
            raise CantTell(reason)
        return [Process(*fields) for fields in processes]

    def _answer_in_child(self, writer: int, timeout_seconds: int) -> None:
        status = 1
        try:
            signal.alarm(timeout_seconds)
            try:
                answer: tuple[list[tuple[Any, ...]], str] = [tuple(process) for process in self.get_processes()], ''
            except (CantTell, Refused) as why:
                answer = [], str(why)
            with os.fdopen(writer, 'wb') as pipe:
                pipe.write(marshal.dumps(answer))
            status = 0
        except Exception:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def get_process(self, namespec: str) -> Process:
        return make_process(self.call('getProcessInfo', namespec))


def find_supervisor(configuration: str | None, environment: Mapping[str, str]) -> Supervisor:
    """Return the Supervisor for a look by hand: that of a configuration file if one is named,
    that whose environment this is, or the one that supervisorctl would talk to.

    Raises UsageError where the configuration can't be read.
    """
    if configuration is None and 'SUPERVISOR_SERVER_URL' in environment:
        return Supervisor(environment)
    import io
    from configparser import Error

    from supervisor.options import ClientOptions

    client = ClientOptions()
    client.stderr = io.StringIO()
    try:
        client.realize(['-c', configuration] if configuration else [], doc='', progname='supervisorctl')
    except (SystemExit, Error) as why:
        reason = str(why) if isinstance(why, Error) else client.stderr.getvalue().partition('\n')[0]
        if configuration:
            raise UsageError(f'option --configuration: {reason}')
        raise UsageError(f'{client.configfile}: {reason}; name another file by --configuration')
    section = client.configroot.supervisorctl
    return Supervisor({'SUPERVISOR_SERVER_URL': section.serverurl or 'http://localhost:9001',
                       'SUPERVISOR_USERNAME': section.username or '',
                       'SUPERVISOR_PASSWORD': section.password or ''})


def make_process(info: Mapping[str, Any]) -> Process:
    """Return the Process for supervisor's info structure."""
    return Process(info['group'], info['name'], info['pid'], info['state'], info['statename'],
                   info['start'], info['now'], info.get('spawnerr') or '')


class NameCheck:
    """Tells once of each name that means no process."""

    def __init__(self, names: Iterable[Name], supervisor: Supervisor, log: Log) -> None:
        self._names = [name for name in names if name != EVERY]  # which needs no check
        self._supervisor = supervisor
        self._log = log
        self._next_try = 0.0

    def tell_unmatched(self, processes: Iterable[Process]) -> None:
        for line in find_unmatched(self._names, processes):
            self._log(line)
        self._names = []

    def ask_and_tell(self) -> None:
        """Ask supervisord without the 15 MB that this needs; where it can't tell, a minute later again."""
        if not self._names or time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + NAMES_RETRY_SECONDS
        try:
            self.tell_unmatched(self._supervisor.get_processes_in_child(NAMES_TIMEOUT_SECONDS))
        except (CantTell, Refused):
            pass  # it is asked again; where that goes on, what needs supervisord tells why


# What became of a restart.

RESTARTED = 'restarted'
STOP_FAILED = 'failed to stop'
START_FAILED = 'failed to start'
LEFT_ALONE = 'left alone'       # it is not the process that was judged, or it is somebody else's
HELD_BACK = 'held back'         # it has been restarted too often
DRY_RUN = 'dry run'

# What counts as a restart, though it did not help or was only told.
COUNTED = (RESTARTED, START_FAILED, DRY_RUN)

# What the subject of a mail says of them. LEFT_ALONE is logged only.
SUBJECTS = {
    RESTARTED: 'process %s restarted',
    STOP_FAILED: 'failed to stop process %s',
    START_FAILED: 'failed to start process %s',
    HELD_BACK: 'process %s left alone',
    DRY_RUN: 'dry run: process %s not restarted',
}


class Outcome(NamedTuple):
    """What became of a process, and a line that says so."""

    process: Process
    result: str
    text: str


def make_outcome(process: Process, result: str, reason: str = '') -> Outcome:
    """Return the Outcome whose text is its result, the process and, if there is one, the reason."""
    what = 'left %s alone' if result == LEFT_ALONE else result + ' %s'
    return Outcome(process, result, what % process.title + (': ' + reason if reason else ''))


# What to do next about a process that was stopped here.

LOOK = 'look'
START = 'start'
WAIT = 'wait'
RUNS = 'runs'
FAILED = 'failed'
LEAVE = 'leave'
UNTOUCHED = 'untouched'


def judge_stopped(judged: Process, current: Process, failed_start: int | None = None) -> str:
    """Return what to do about a process that was stopped here, from what it is now.

    A start time other than the judged one means that it has been started since, by a
    call of ours whose answer was lost or by somebody: where it is stopped all the same,
    somebody stopped it. failed_start is that of a start of ours that supervisord called
    failed. supervisord gives up a process (FATAL) only after a start.
    """
    if current.state == RUNNING:
        return UNTOUCHED if current.pid == judged.pid else RUNS
    if current.state in (STARTING, STOPPING):
        return WAIT
    if current.state == BACKOFF:
        return FAILED
    # Down since our stop, or since a start of ours that failed; else somebody stopped it, or it ended by itself.
    if current.state == FATAL or (current.state, current.start) in ((STOPPED, judged.start), (EXITED, failed_start)):
        return START
    return LEAVE


class Down:
    """A process that was stopped here, and is not yet known to run."""

    def __init__(self, judged: Process) -> None:
        self.judged = judged
        self.failed_start: int | None = None
        self.told: set[str] = set()
        self.counted = False    # among the restarts that --max-restarts limits


class Restarter:
    """Restarts processes one after another, and remembers those that it left down.

    tell is called with every Outcome; that of a restart before a signal can end the listener.
    """

    def __init__(self, supervisor: Supervisor, tell: Callable[[Outcome], None],
                 limit: Rate | None = None, dry_run: bool = False,
                 sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._supervisor = supervisor
        self._tell = tell
        self._limit = limit
        self._dry_run = dry_run
        self._sleep = sleep
        self._clock = clock
        self._down: dict[str, Down] = {}
        self._restarts: dict[str, deque[float]] = {}
        self._held_back: set[str] = set()
        self._dry_runs: set[tuple[str, int]] = set()
        self._last_end = 0.0

    def is_stale(self, tick: Event) -> bool:
        """Return whether a tick was sent before the second in which the last restart ended.

        A clock that was set back must not make every tick look stale.
        """
        when = parse_tokens(tick.payload).get('when', '').strip()
        return when.isdecimal() and len(when) < 20 and int(when) < int(self._last_end) <= time.time()

    def restart(self, judged: Process, prepare: Callable[[Process], None] | None = None) -> None:
        """Stop the process and start it again; in a dry run, say so once for each process and pid.

        prepare is called where the process is really going to be stopped, and may be interrupted.
        """
        if (judged.namespec, judged.pid) in self._dry_runs or self._is_held_back(judged):
            return
        if self._dry_run:
            self._dry_runs.add((judged.namespec, judged.pid))
            self._finish(Outcome(judged, DRY_RUN, f'dry run: would have restarted {judged.title}'))
            return
        if prepare:
            changed = self._find_change(judged)
            if changed:
                self._tell(changed)
                return
            prepare(judged)
        with uninterrupted():
            outcome = self._restart(judged)
            if judged.namespec in self._down:
                self._down[judged.namespec].told.add(outcome.text)
                self._down[judged.namespec].counted = outcome.result == START_FAILED
            self._finish(outcome)
            self._last_end = time.time()

    def _finish(self, outcome: Outcome) -> None:
        if outcome.result in COUNTED:
            self._count(outcome.process)
        self._tell(outcome)

    def _count(self, process: Process) -> None:
        if self._limit:
            self._restarts.setdefault(process.namespec, deque(maxlen=self._limit.times)).append(self._clock())

    def retry(self) -> bool:
        """Start again what was left down, and return whether something was; a new reason why not is told."""
        restarted = False
        for down in list(self._down.values()):
            with uninterrupted():
                outcome = self._bring_back(down, False)
                if outcome.result == RESTARTED:
                    restarted = True
                    self._last_end = time.time()
                    if not down.counted:
                        self._count(down.judged)
                # STOP_FAILED is nothing new: it could not be looked at, or the failed stop has been told.
                if outcome.result != STOP_FAILED and outcome.text not in down.told:
                    down.told.add(outcome.text)
                    self._tell(outcome)
        return restarted

    def _is_held_back(self, judged: Process) -> bool:
        if self._limit is None:
            return False
        times: Sequence[float] = self._restarts.get(judged.namespec, ())
        if len(times) < self._limit.times or times[0] <= self._clock() - self._limit.seconds:
            self._held_back.discard(judged.namespec)
            return False
        if judged.namespec not in self._held_back:
            self._held_back.add(judged.namespec)
            self._tell(Outcome(judged, HELD_BACK, (
                'left %s alone: %d restarts within %g s have not helped; find out why, or restart it by '
                'hand (supervisorctl restart %s); it is watched again in %d s'
                % (judged.title, self._limit.times, self._limit.seconds, judged.title,
                   times[0] + self._limit.seconds - self._clock() + 1))))
        return True

    def _find_change(self, judged: Process) -> Outcome | None:
        """Return why a process must not be stopped, None if it still is the one that was judged."""
        try:
            current = self._supervisor.get_process(judged.namespec)
        except (Refused, CantTell) as why:
            return self._fail_to_stop(judged, why)
        if current.state == STOPPING:
            return make_outcome(judged, LEFT_ALONE, 'it is STOPPING')
        if current.pid != judged.pid:
            return make_outcome(judged, STOP_FAILED, 'it is %s with pid %d now, and pid %d was judged'
                                % (current.state_name, current.pid, judged.pid))
        return None

    @staticmethod
    def _fail_to_stop(judged: Process, why: Exception) -> Outcome:
        shuts_down = isinstance(why, Refused) and why.fault == 'SHUTDOWN_STATE'
        return make_outcome(judged, LEFT_ALONE if shuts_down else STOP_FAILED, str(why))

    def _restart(self, judged: Process) -> Outcome:
        changed = self._find_change(judged)
        if changed:
            return changed
        down = self._down[judged.namespec] = Down(judged)
        try:
            self._supervisor.call('stopProcess', judged.namespec)
        except Refused as why:
            del self._down[judged.namespec]
            return self._fail_to_stop(judged, why)
        except CantTell as why:
            return self._bring_back(down, False, str(why))
        return self._bring_back(down, True)

    def _bring_back(self, down: Down, stopped: bool, trouble: str = '') -> Outcome:
        """Start a process that was stopped here, unless somebody else has it in hand.

        stopped: whether it is known to be; trouble: what went wrong so far. Where it can't be
        started now, it is kept for retry.
        """
        judged = down.judged
        todo = START if stopped else LOOK
        fault = ''
        failed_calls = 0
        deadline = self._clock() + FOLLOW_SECONDS
        while failed_calls < MAX_FAILED_CALLS:
            try:
                if todo == START:
                    self._supervisor.call('startProcess', judged.namespec)
                    return self._settle(down, RESTARTED)
                current = self._supervisor.get_process(judged.namespec)
            except Refused as why:
                if why.fault in ('BAD_NAME', 'SHUTDOWN_STATE'):
                    return self._settle(down, LEFT_ALONE, str(why))
                if why.fault != 'ALREADY_STARTED':
                    fault = why.fault
                failed_calls, todo, trouble = failed_calls + 1, LOOK, str(why)
                continue
            except CantTell as why:
                failed_calls, todo, trouble = failed_calls + 1, LOOK, trouble or str(why)
                self._sleep(LOOK_SECONDS)
                continue
            if fault in ('SPAWN_ERROR', 'ABNORMAL_TERMINATION'):
                down.failed_start = current.start
            todo = judge_stopped(judged, current, down.failed_start)
            stopped = stopped or (todo != UNTOUCHED and current.state != STOPPING)
            if fault and todo in (START, WAIT):
                todo = FAILED  # once a tick is enough
            if todo == RUNS:
                return self._settle(down, RESTARTED)
            if todo == LEAVE:
                return self._settle(down, LEFT_ALONE, f'it is {current.state_name} by now')
            if todo == UNTOUCHED:
                if not trouble:
                    return self._settle(down, STOP_FAILED)
                break  # it is kept, since the stop may yet be on its way
            if todo == FAILED:
                if fault in ('', 'SPAWN_ERROR'):  # after any other the spawn error is an earlier start's
                    trouble = current.spawn_error or trouble
                break
            if todo == WAIT:
                if self._clock() >= deadline:
                    trouble = 'it is still %s after %d s' % (current.state_name, FOLLOW_SECONDS)
                    break
                self._sleep(LOOK_SECONDS)
        if stopped:
            return make_outcome(judged, START_FAILED, trouble + '; this is tried again at every event')
        return make_outcome(judged, STOP_FAILED, trouble + '; if it stops all the same, it is started again')

    def _settle(self, down: Down, result: str, reason: str = '') -> Outcome:
        del self._down[down.judged.namespec]
        return make_outcome(down.judged, result, reason)
