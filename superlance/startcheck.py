"""Checks at start: what would keep a listener from doing its job.

A typo in -p, a missing password or a mail command that is not installed would otherwise be noticed only when the
listener is needed.
"""
from __future__ import annotations

import os
import time
from typing import Any, Callable, Container, Iterable, Mapping, NamedTuple, Sequence

from superlance.listener import ExitRequest, Log
from superlance.options import EVERY, Name, join_names
from superlance.rpc import (
    Process,
    Refused,
    Supervisor,
    Unknown,
    is_shutting_down,
    make_process,
    make_title,
    resolve_names,
)

CHECK_SECONDS = 5
# When supervisord is asked again: at the first event, unless it did not answer, and then after these times.
RETRY_SECONDS = (0, 60, 120, 240, 480, 960, 1920, 3600)
# How much longer than a program's own stop its restart may take.
RESTART_SECONDS = 20

Config = Mapping[str, Any]  # of one process, from supervisor's getAllConfigInfo


class Problem(NamedTuple):
    """Something that an operator should know at start; the text is one line."""

    text: str
    fatal: bool = False         # --once exits with status 1
    warning: bool = True        # False: only a note
    is_unreachable: bool = False    # supervisord does not answer

    @property
    def line(self) -> str:
        """The line for the log or the terminal."""
        return f'warning: {self.text}' if self.warning else self.text


class Wants(NamedTuple):
    """What a listener needs to do its job, as far as this can be checked."""

    names: Sequence[Name] = ()      # the processes that it watches; none: it makes no calls to supervisord
    restarts: bool = False          # it may restart the processes that it watches
    tail: bool = False              # it reads their logs through supervisord
    # Returns what is wrong with the commands and directories that it uses, one line each, or ''.
    find_problems: Callable[[], Iterable[str]] = tuple
    # Returns within so many seconds the pids whose memory can be read, or raises Unknown.
    read_pids: Callable[[float], Container[int]] | None = None
    warnings: Sequence[str] = ()    # of the command line, see options.Given


def find_local_problems(wants: Wants) -> list[Problem]:
    """Return what is wrong, as far as it can be found without supervisord."""
    return [Problem(text) for text in (*wants.warnings, *wants.find_problems()) if text]


# What supervisord knows. A process of the listener's own group is never watched.

def find_config_problems(program: str, wants: Wants, configs: Sequence[Config], own: tuple[str, str]) -> list[Problem]:
    """Check names, stopwaitsecs and logs against the configuration of all processes.

    own is the listener's own group and process.
    """
    pairs = [(config['group'], config['name']) for config in configs]
    problems = []
    names = resolve_names(wants.names, pairs)
    for name, resolved in dict(zip(wants.names, names)).items():
        if name != EVERY and not any(resolved.matches(*pair) for pair in pairs):
            hint = ': write -p once for each name' if ',' in str(name) else ''
            problems.append(Problem(f'no process matches "{name}"{hint}', fatal=True))
        elif resolved != name:
            problems.append(Problem(f'no process is named "{name}"; using all processes of group "{name}"',
                                    warning=False))
    if wants.tail:      # for crashmail, a bare name is also that of a group
        names += [Name(name.program, None) for name in wants.names if name.group is None]
    watched = [config for config in configs if config['group'] != own[0]
               and any(name.matches(config['group'], config['name']) for name in names)]
    if wants.restarts:
        problems += [Problem(text) for text in check_stop_time(program, watched, configs, own)]
    if wants.tail:
        problems += [Problem(text) for text in check_logs(watched)]
    return problems


def check_stop_time(program: str, watched: Iterable[Config], configs: Iterable[Config],
                    own: tuple[str, str]) -> list[str]:
    """Check that supervisord does not kill the listener in the middle of the longest restart."""
    slowest = max(watched, key=lambda config: int(config.get('stopwaitsecs', 0)), default=None)
    own_config = next((config for config in configs if (config['group'], config['name']) == own), None)
    if slowest is None or own_config is None:
        return []
    own_seconds, seconds = int(own_config.get('stopwaitsecs', 0)), int(slowest.get('stopwaitsecs', 0))
    if own_seconds >= seconds:
        return []
    title = make_title(slowest['group'], slowest['name'])
    return [f'stopwaitsecs={own_seconds} of {program} is shorter than stopwaitsecs={seconds} of {title}: '
            f'if {program} is stopped while it restarts {title}, {title} may stay down; '
            f'set stopwaitsecs={seconds + RESTART_SECONDS} in [eventlistener:{own[0]}]']


def check_logs(watched: Iterable[Config]) -> list[str]:
    """Check that supervisord can read back the logs of processes."""
    titles: dict[tuple[str, str], list[str]] = {}
    for config in watched:
        for stream in ('stdout', 'stderr'):
            reason = find_log_problem(config, stream)
            if reason:
                titles.setdefault((stream, reason), []).append(make_title(config['group'], config['name']))
    return [f'unable to read the {stream} log of {join_names(names)} for --tail: {reason}'
            for (stream, reason), names in titles.items()]


def find_log_problem(config: Config, stream: str) -> str:
    """Return why the log of a stream ('stdout' or 'stderr') can't be read through supervisord, '' if it can."""
    path = str(config.get(stream + '_logfile', ''))
    if path == 'syslog' or (path == 'none' and config.get(stream + '_syslog')):     # 'syslog': supervisor 4.2.0
        return 'it goes to syslog'
    if path == 'none':
        redirected = stream == 'stderr' and config.get('redirect_stderr')
        return '' if redirected else f'there is none ({stream}_logfile=NONE)'
    from superlance.tail import is_device

    return f'it goes to {path}' if is_device(path) else ''


def find_hidden(processes: Iterable[Process], readable_pids: Container[int]) -> list[Process]:
    """Return the processes that run, but whose memory can't be read."""
    return [process for process in processes
            if process.pid and process.pid not in readable_pids and _exists(process.pid)]


def _exists(pid: int) -> bool:
    """Return whether a process exists; the hidepid option of /proc does not hide it from kill(2)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False    # it has exited since the list was made
    except PermissionError:
        pass
    return True


def describe_hidden(program: str, hidden: Sequence[Process]) -> str:
    return (f"unable to read the memory of {join_names([process.title for process in hidden])}: other users' processes "
            'are hidden, probably by the mount option hidepid of /proc; '
            f'run {program} as root or as the user of these processes')


def find_watched(processes: Iterable[Process], names: Iterable[Name], own_group: str | None) -> list[Process]:
    """Return the processes that match one of the names and are not of the listener's own group."""
    processes = list(processes)
    names = resolve_names(names, [(process.group, process.program) for process in processes])
    return [process for process in processes if process.group != own_group
            and any(name.matches(process.group, process.program) for name in names)]


# The check of a listener.

class StartCheck:
    """Logs at start what would keep a listener from doing its job.

    What supervisord could not answer then is asked again at later events, at growing intervals.
    """

    def __init__(self, program: str, wants: Wants, environment: Mapping[str, str], log: Log,
                 interrupt: ExitRequest, clock: Callable[[], float] = time.monotonic,
                 supervisor: Supervisor | None = None) -> None:
        self._program = program
        self._wants = wants
        self._own = environment.get('SUPERVISOR_GROUP_NAME', ''), environment.get('SUPERVISOR_PROCESS_NAME', '')
        self._supervisor = supervisor or Supervisor(environment, CHECK_SECONDS)
        self._log = log
        self._interrupt = interrupt
        self._clock = clock
        self._logged: set[str] = set()
        self._config_pending = bool(wants.names)
        self._memory_pending = wants.read_pids is not None
        self._next_try = 0.0
        self._tries = 0
        self._has_hidden = False

    def run(self) -> None:
        """Check everything, for 5 seconds at most; a signal interrupts this."""
        self._report(find_local_problems(self._wants))
        self._ask()

    def run_again(self) -> None:
        """Repeat the checks that failed before, if a retry is due."""
        if (self._config_pending or self._memory_pending) and self._clock() >= self._next_try:
            self._ask()

    def check_memory_again(self) -> None:
        """Check at the next run_again whether memory can be read."""
        self._memory_pending = True
        self._next_try = self._clock()

    def report_hidden(self, processes: Iterable[Process], readable_pids: Container[int]) -> None:
        """Log when the memory of watched processes begins to be unreadable."""
        running = [process for process in find_watched(processes, self._wants.names, self._own[0]) if process.pid]
        if not running:
            return
        self._memory_pending = False
        hidden = find_hidden(running, readable_pids)
        if hidden and not self._has_hidden:
            self._log(Problem(describe_hidden(self._program, hidden)).line)
        self._has_hidden = bool(hidden)

    def _report(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            if problem.line not in self._logged:
                self._logged.add(problem.line)
                self._log(problem.line)

    def _ask(self) -> None:
        deadline = self._clock() + CHECK_SECONDS
        calls = [('getAllConfigInfo',)] if self._config_pending else []
        calls += [('getAllProcessInfo',)] if self._memory_pending else []
        try:
            if calls:
                answers = self._supervisor.call_in_helper(calls, CHECK_SECONDS, self._interrupt)
                self._check(dict(zip(calls, answers)), deadline)
        except (Unknown, Refused) as why:
            if not (is_shutting_down(why) or self._interrupt.requested):
                self._report([Problem(str(why))])
            self._tries = max(self._tries, 1)
        self._next_try = self._clock() + RETRY_SECONDS[min(self._tries, len(RETRY_SECONDS) - 1)]
        self._tries += 1

    def _check(self, answers: Mapping[tuple[str], Any], deadline: float) -> None:
        if self._config_pending:
            configs = answers['getAllConfigInfo',]
            self._config_pending = False
            self._report(find_config_problems(self._program, self._wants, configs, self._own))
        if self._memory_pending and self._wants.read_pids:
            processes = [make_process(info) for info in answers['getAllProcessInfo',]]
            try:
                readable_pids = self._wants.read_pids(max(0.1, deadline - self._clock()))
            except Unknown as why:
                raise Unknown(f'unable to read memory: {why}') from why
            self.report_hidden(processes, readable_pids)


# The check for --once.

def check_once(program: str, wants: Wants, supervisor: Supervisor, environment: Mapping[str, str]) -> list[Problem]:
    """Return what StartCheck would log, except about memory."""
    problems = find_local_problems(wants)
    if wants.names:
        try:
            configs = supervisor.call('getAllConfigInfo')
        except (Unknown, Refused) as why:
            return [*problems, Problem(str(why), fatal=True, is_unreachable=True)]
        problems += find_config_problems(program, wants, configs, find_own(program, configs, environment))
    return problems


def find_own(program: str, configs: Iterable[Config], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the group and process of this listener; outside supervisord, of a process with the same command."""
    if 'SUPERVISOR_GROUP_NAME' in environment:
        return environment['SUPERVISOR_GROUP_NAME'], environment.get('SUPERVISOR_PROCESS_NAME', '')
    for config in configs:
        words = str(config.get('command', '')).split()
        if program in map(os.path.basename, words[:1]) or f'superlance.{program}' in words:
            return config['group'], config['name']
    return '', ''
