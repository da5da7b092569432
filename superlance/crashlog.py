"""Why a process exited, from supervisord's own log.

The event does not carry the exit status. supervisord writes it to its log before it sends the event, but that line
names neither group nor pid, so it takes some care never to report the status of another process.
"""
from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from superlance.listener import ExitRequest, Log, timestamp
from superlance.rpc import HttpError, Refused, Supervisor, Unknown, make_process

if TYPE_CHECKING:
    from superlance.tail import ProcessLogs

# How long an event may wait for answers of supervisord, when an answer is late, and for how long supervisord is then
# not asked.
CALLS_SECONDS = 2.0
LATE_SECONDS = 1.0
PAUSE_SECONDS = 60.0
# In a burst of crashes, one reading of supervisord's log serves all those that it covers.
REUSE_SECONDS = 5.0
PROCESSES_SECONDS = 60.0

# supervisord can't send a text that begins within a UTF-8 character. Each failure appends a traceback to its log, which
# moves the window, so that most texts need about 3 attempts. If a traceback is a multiple of a character, which has 4
# bytes at most, the window begins at a character in one of 4 sizes.
WINDOWS_BYTES = [65536 - number // 8 for number in range(32)]
LEVEL = ' [A-Z]{4} '
STAMP = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}' + LEVEL
CHANNELS = ('stdout', 'stderr')
TOO_QUICKLY = 'Exited too quickly'


class Entry(NamedTuple):
    """What a line of supervisord's log says about a process: its start with a pid, or its exit with a reason."""

    pid: str
    reason: str         # `exit status 3`, `terminated by SIGKILL`
    unexpected: bool


def read_entries(text: str, program: str) -> list[Entry]:
    """Return the starts and exits in supervisord's log of the processes called program, whatever their group."""
    name = re.escape(program)
    pattern = re.compile(STAMP + rf"(?:spawned: '{name}' with pid (\d+)|"
                                 rf'(?:exited|stopped): {name} \((.+?)(; not expected|; expected)?\))')
    found = (pattern.fullmatch(line) for line in text.split('\n') if program in line)
    return [Entry(match[1] or '', match[2] or '', match[3] == '; not expected') for match in found if match]


def cut_at_start(text: str, supervisord_pid: int) -> str | None:
    """Return supervisord's log since its last start, None if text does not go back so far."""
    before, line, after = text.rpartition(f' INFO supervisord started with pid {supervisord_pid}\n')
    return after if line and re.search(STAMP[:-len(LEVEL)] + '$', before) else None


def find_start(entries: Sequence[Entry], pid: str) -> int | None:
    """Return the index of the last start with this pid that is followed by an exit; a pid may occur again."""
    exits = [index for index, entry in enumerate(entries) if not entry.pid]
    starts = [index for index, entry in enumerate(entries) if entry.pid == pid and exits and index < exits[-1]]
    return starts[-1] if starts else None


def find_own_exit(entries: Sequence[Entry], pid: str) -> str | None:
    """Return the reason in the line after the start with this pid, '' if that exit was expected, None if it is no exit.

    It is the reason of this process unless another process of that name was running.
    """
    start = find_start(entries, pid)
    if start is None or entries[start + 1].pid:
        return None
    return entries[start + 1].reason if entries[start + 1].unexpected else ''


def count_others(entries: Sequence[Entry], pid: str) -> int | None:
    """Return how many others of that name ran when the process with this pid was started; None if it is not there.

    The entries must go back to the start of supervisord.
    """
    start = find_start(entries, pid)
    return None if start is None else sum(1 if entry.pid else -1 for entry in entries[:start])


def find_reason(entries: Sequence[Entry], pid: str, is_unique: bool) -> str:
    """Return why the process with this pid exited unexpectedly, '' if that is not certain.

    is_unique: no other process of that name can have exited since the start of this one. The exit must be in the log.
    """
    start = find_start(entries, pid)
    if start is not None:
        own = find_own_exit(entries, pid) if is_unique else None
        return _find_agreed(entries[start:]) if own is None else own
    # It was started before the log begins, or starts are not logged (loglevel=warn). Exits after another start may be
    # those of another process.
    until_start = takewhile(lambda entry: not entry.pid, entries)
    return _find_agreed(entries) if is_unique and any(entry.unexpected for entry in until_start) else ''


def find_last_reason(entries: Sequence[Entry], is_unique: bool) -> str:
    """Return the reason of the last unexpected exit, '' if it may be that of another process of that name."""
    unexpected = [entry for entry in entries if entry.unexpected]
    return _find_agreed(unexpected[-1:] if is_unique else unexpected)


def _find_agreed(entries: Iterable[Entry]) -> str:
    reasons = {entry.reason for entry in entries if entry.unexpected}
    return reasons.pop() if len(reasons) == 1 else ''


class Calls:
    """Calls to supervisord on behalf of a crash: together they take 2 s at most, and after a late answer there are
    none for a minute, because events are waiting.
    """

    def __init__(self, environment: Mapping[str, str], make: Callable[..., Supervisor],
                 clock: Callable[[], float]) -> None:
        self._environment = environment
        self._make = make
        self._clock = clock
        self._end_at: float | None = None   # None: there was no call yet
        self._resume_at = 0.0

    def begin(self) -> None:
        """Start the time limit for another crash, with its first call."""
        self._end_at = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of supervisord. Raises Unknown and Refused."""
        with suppress(ImportError, OSError):    # else the call reports it
            # Not earlier: the log files are read first. Not within the limit: on a busy machine this alone would be a
            # late answer.
            import supervisor.childutils  # noqa: F401
        started = self._clock()
        if self._end_at is None:
            self._end_at = started + CALLS_SECONDS
        if started < self._resume_at:
            raise Unknown('supervisord is not asked for 1m after a late answer')
        if started >= self._end_at:
            raise Unknown(f'supervisord did not answer within {CALLS_SECONDS:g}s')
        try:
            return self._make(self._environment, self._end_at - started).call(method, *arguments)
        finally:
            if self._clock() - started >= LATE_SECONDS:
                self._resume_at = self._clock() + PAUSE_SECONDS

    def call_any(self, method: str, attempts: Iterable[Sequence[Any]]) -> Any:
        """Call a method with the arguments of each attempt until supervisord can send the answer.

        It can't send a text that begins or ends within a UTF-8 character. Raises Unknown and Refused.
        """
        failure = None
        for arguments in attempts:
            try:
                return self.call(method, *arguments)
            except HttpError as why:
                failure = why
        assert failure
        raise failure

    def call_in_helper(self, method: str, seconds: float, interrupt: ExitRequest | None) -> Any:
        """Call a method before the first crash. Raises Unknown and Refused."""
        answer, = self._make(self._environment, seconds).call_in_helper([(method,)], seconds, interrupt)
        return answer


class Processes:
    """The processes of supervisord: which names occur in several groups, and which logs are shared."""

    def __init__(self, calls: Calls, clock: Callable[[], float]) -> None:
        self._calls = calls
        self._clock = clock
        self._infos: dict[str, Mapping[str, Any]] = {}      # by namespec
        self._read_at = float('-inf')

    def learn(self, seconds: float, interrupt: ExitRequest | None) -> None:
        """Read the list of processes before the first crash, if supervisord answers within so many seconds."""
        with suppress(Unknown, Refused):    # else they are read at the first crash
            self._replace(lambda: self._calls.call_in_helper('getAllProcessInfo', seconds, interrupt))

    def refresh(self, since: float) -> None:
        """Read the list of processes again if it is older than since, by the clock. Raises Unknown and Refused."""
        if self._read_at < since:
            self._replace(lambda: self._calls.call('getAllProcessInfo'))

    def refresh_one(self, namespec: str) -> Mapping[str, Any]:
        """Return supervisord's current info about a process. Raises Unknown and Refused."""
        info: Mapping[str, Any] = self._calls.call('getProcessInfo', namespec)
        self._infos[namespec] = info
        return info

    def find_namesakes(self, group: str, program: str) -> list[Mapping[str, Any]]:
        """Return the processes of that name in other groups."""
        return [info for info in self._infos.values() if info['name'] == program and info['group'] != group]

    def find_paths(self, namespec: str) -> dict[str, str] | None:
        """Return the path of each log of a process, '' for one without a file; None if it is not known."""
        info = self._infos.get(namespec)
        return None if info is None else {channel: info.get(f'{channel}_logfile') or '' for channel in CHANNELS}

    def count_sharers(self, namespec: str, path: str) -> int:
        """Return how many other processes write to a log."""
        return sum(1 for other, info in self._infos.items()
                   if other != namespec and path in (info.get('stdout_logfile'), info.get('stderr_logfile')))

    def _replace(self, read: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        started = self._clock()
        self._infos = {make_process(info).namespec: info for info in read()}
        self._read_at = started


class ExitReasons:
    """Finds exit statuses and signals in supervisord's own log."""

    def __init__(self, calls: Calls, processes: Processes, log: Log,
                 clock: Callable[[], float]) -> None:
        self._calls = calls
        self._processes = processes
        self._log = log
        self._supervisord_pid = os.getppid()
        self._clock = clock
        self._text = ''
        self._read_at = float('-inf')
        self._since: float | None = None
        self._first_line = ''   # of the log when the first crash since then was looked into
        self._logged: set[str] = set()

    def find(self, group: str, program: str, pid: str, since: float | None) -> str:
        """Return why a process exited unexpectedly, '' if that is not certain."""
        return self._attempt(lambda: self._find(group, program, pid, since))

    def find_fatal(self, group: str, program: str) -> str:
        """Return why supervisord gave up starting a process, '' if that is not known."""
        reason = self._attempt(lambda: self._find_spawn_error(group, program))
        if reason.startswith(TOO_QUICKLY):
            last = self._attempt(lambda: self._find_last(group, program))
            reason += f': {last}' if last else ''
        return reason

    def _attempt(self, find: Callable[[], str]) -> str:
        try:
            return find()
        except Unknown as why:
            self._log_once(f'unable to determine why a process exited: {why}')
        except Refused as why:
            if why.fault in ('NO_FILE', 'FAILED'):
                self._log_once('unable to determine exit statuses, because supervisord cannot read its own log: '
                               'set logfile in [supervisord] to a file')
            elif why.fault != 'SHUTDOWN_STATE':
                self._log_once(f'unable to determine why a process exited: {why}')
        return ''

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            self._log(line)

    def _find(self, group: str, program: str, pid: str, since: float | None) -> str:
        own = None
        if self._clock() - self._read_at < REUSE_SECONDS:
            own = self._find_own_exit(group, program, pid)
        if own is None:
            is_first = since != self._since
            if is_first:
                self._since, self._first_line = since, ''
            self._read()
            if is_first:
                self._first_line = self._text.partition('\n')[0]
            own = self._find_own_exit(group, program, pid)
        if own is not None:
            return own
        # This needs the line that supervisord has just written, because it may differ from all others.
        entries = read_entries(self._text, program)
        if find_start(entries, pid) is None and not self._goes_back():
            return ''
        is_unique = self._is_unique(group, program, pid)
        reason = find_reason(entries, pid, is_unique)
        if not (reason or is_unique) and self._is_only_candidate(entries, group, program, pid):
            reason = find_reason(entries, pid, True)
        return reason

    def _find_own_exit(self, group: str, program: str, pid: str) -> str | None:
        """Return why a process exited if that is certain whatever has been logged since; None if it is not."""
        own = find_own_exit(read_entries(self._text, program), pid)
        return None if own is None or not self._is_unique(group, program, pid) else own

    def _goes_back(self) -> bool:
        """Return whether what was read of the log has all exits since `since`: it may have been rotated meanwhile."""
        first = re.search(f'^{STAMP}', self._text, re.MULTILINE)
        return self._since is None or self._text.startswith(self._first_line + '\n') or (
            first is not None and first[0][:len(timestamp(0))] <= timestamp(self._since))

    def _count_others(self, program: str, pid: str) -> int | None:
        """Return how many others of that name ran when a process was started, None if the log does not say."""
        since_start = cut_at_start(self._text, self._supervisord_pid)
        return None if since_start is None else count_others(read_entries(since_start, program), pid)

    def _is_unique(self, group: str, program: str, pid: str) -> bool:
        """Return whether no other process of that name ran when this one was started."""
        # If it ran alone, the first crash of a storm does not need the list of processes.
        others = self._count_others(program, pid)
        if others is None:
            self._processes.refresh(self._clock() - PROCESSES_SECONDS)
            return not self._processes.find_namesakes(group, program)
        return others == 0

    def _is_only_candidate(self, entries: Sequence[Entry], group: str, program: str, pid: str) -> bool:
        """Return whether all processes of that name in other groups have been running since before this one's start."""
        start = find_start(entries, pid)
        if start is None:
            return False
        self._processes.refresh(self._read_at)
        namesakes = self._processes.find_namesakes(group, program)
        earlier = {entry.pid for entry in entries[:start]}
        later = {entry.pid for entry in entries[start:]}
        # Of those whose start is not in the log, one may have been started since the log was read.
        recent_seconds = self._clock() - self._read_at + 2

        def has_not_exited_since(info: Mapping[str, Any]) -> bool:
            if not info['pid']:
                return not info['start']
            if str(info['pid']) in later:
                return False
            return str(info['pid']) in earlier or info['now'] - info['start'] > recent_seconds
        # `supervisorctl update` may have removed one that ran then.
        others = self._count_others(program, pid)
        return all(map(has_not_exited_since, namesakes)) and (
            others is None or others == sum(1 for info in namesakes if str(info['pid']) in earlier))

    def _find_spawn_error(self, group: str, program: str) -> str:
        return str(self._processes.refresh_one(f'{group}:{program}').get('spawnerr') or '')

    def _find_last(self, group: str, program: str) -> str:
        self._processes.refresh(self._clock() - PROCESSES_SECONDS)
        self._read()
        is_unique = not self._processes.find_namesakes(group, program)
        return find_last_reason(read_entries(self._text, program), is_unique)

    def _read(self) -> None:
        """Read the end of supervisord's log. Raises Unknown and Refused."""
        started = self._clock()
        self._text = self._calls.call_any('readLog', [(-window_bytes, 0) for window_bytes in WINDOWS_BYTES])
        self._read_at = started


class Details(NamedTuple):
    """What was found out about a crash; texts for a mail, '' if nothing is known."""

    reason: str
    logs: str


class DetailsReader:
    """Finds out all about a crash, before the event is acknowledged; takes a few ms, and 2 s at most."""

    def __init__(self, environment: Mapping[str, str], tail_lines: int | None, log: Log,
                 make: Callable[..., Supervisor] = Supervisor, clock: Callable[[], float] = time.monotonic) -> None:
        self._calls = Calls(environment, make, clock)
        self._processes = Processes(self._calls, clock)
        self._reasons = ExitReasons(self._calls, self._processes, log, clock)
        self._logs: ProcessLogs | None = None
        if tail_lines:
            from superlance.tail import ProcessLogs

            self._logs = ProcessLogs(self._calls, self._processes, tail_lines)

    def prepare(self, seconds: float, interrupt: ExitRequest | None = None) -> None:
        """Read the paths of the logs, so that they can be read at once when a process crashes."""
        if self._logs:
            self._processes.learn(seconds, interrupt)

    def read(self, group: str, program: str, pid: str, with_logs: bool, since: float | None = None) -> Details:
        """Return what can be found out; pid is '' if supervisord gave up starting the process.

        since: the process exited after this, in epoch seconds. It is the same for all events that may have waited
        for each other.
        """
        self._calls.begin()
        # The logs first: the process is being restarted.
        logs = self._logs.read(f'{group}:{program}', pid) if self._logs and with_logs else ''
        reason = self._reasons.find(group, program, pid, since) if pid else self._reasons.find_fatal(group, program)
        return Details(reason, logs)
