"""Usage: memmon [options]

Restart processes that use too much memory, and send mail about it. memmon is
an event listener of supervisor and subscribes to a TICK event:

    [eventlistener:memmon]
    command=memmon -a 200MB -m bob@example.com
    events=TICK_60
    stopwaitsecs=30

Limits (at least one is required; the most specific one applies):
  -p, --program=NAME=SIZE     Set the limit of NAME: program, group:program or
                              group:*. Repeatable.
  -g, --groupname=GROUP=SIZE  Set the limit of each process of GROUP.
                              Repeatable.
  -a, --any=SIZE              Set the limit of every other process. A SIZE is
                              bytes, or a number with KB, MB, GB or TB, as in
                              1.5GB.

Restarts:
  -c, --cumulative            Add the memory of all descendants of a process.
      --samples=N             Restart only after N ticks in a row over the
                              limit (default: 1).
      --max-restarts=N/TIME   Restart a process at most N times within TIME,
                              then leave it alone (default: no limit). A TIME
                              is seconds, or a number with s, m, h or d.
      --dry-run               Log and mail what would be restarted, but restart
                              nothing.

Mail:
  -m, --email=ADDR            Send mail to ADDR, or to several addresses,
                              separated by commas. Repeatable (default: no
                              mail).
  -u, --uptime=TIME           Send mail about a restart only if the process had
                              been up for at most TIME (default: always).
  -n, --name=NAME             Begin the subject with "memmon [NAME]:"
                              (default: "memmon:").
  -s, --sendmail_program=CMD  Send mail with this shell command
                              (default: /usr/sbin/sendmail -t -i).
      --smtp=URL              Send mail through this server instead:
                              smtp://[user[:password]@]host[:port] or
                              smtps://... The password may also be in
                              SUPERLANCE_SMTP_PASSWORD.
      --webhook=URL           Post each notice to the webhook of a chat, with
                              or without -m. The URL may also be in
                              SUPERLANCE_WEBHOOK.
      --from=ADDR             Set the sender of mail (default: chosen by CMD;
                              with --smtp, memmon@HOST).

Diagnostics:
      --once                  Check now, print a table of all processes, and
                              exit with status 1 if something is wrong.
      --configuration=FILE    Find supervisord with this supervisord.conf
                              (--once only; default: as supervisorctl does).
  -v, --verbose               Log the memory of every process at every tick.
  -h, --help                  Print this text.
      --version               Print the version.
"""
from __future__ import annotations

import os
import time
from typing import Iterable, Mapping, NamedTuple, Sequence

from superlance import __version__, mail
from superlance.listener import Event, ExitRequest, exit_request, listen, make_log
from superlance.memory import MemoryReader, ProcessMemory, measure
from superlance.options import (
    COMMON_OPTIONS,
    EVERY,
    Given,
    Name,
    Option,
    Rate,
    UsageError,
    count,
    format_duration,
    format_size,
    parse_count,
    parse_name,
    parse_rate,
    parse_size,
    parse_time,
    run_script,
)
from superlance.outbox import Outbox
from superlance.restart import SUBJECTS, Outcome, Restarter, Result
from superlance.rpc import Process, Refused, State, Supervisor, Unknown, find_supervisor, resolve_names
from superlance.startcheck import Problem, StartCheck, Wants, check_once, describe_hidden, find_hidden, find_watched

PROCESS_LIST_SECONDS = 30
# After this time, a pid may belong to another process.
FORGET_SECONDS = 3600


# Options.

class Limit(NamedTuple):
    """How much memory each process that matches a name may use."""

    name: Name
    size_bytes: int
    is_fallback: bool = False   # the name matches a group because no process has that name


def _split_limit(flag: str, text: str, placeholder: str) -> tuple[str, int]:
    name, equals, size = text.rpartition('=')
    if not (equals and name):
        missing = 'name' if equals else 'size'
        raise ValueError(f'{text!r} has no {missing}; write {placeholder}=SIZE, as in {placeholder.lower()}=200MB')
    first, comma, _ = name.partition(',')
    if comma and '=' in first:
        parts = text.split(',')
        times = 'twice' if len(parts) == 2 else f'{len(parts)} times'
        raise ValueError(f"{text!r} is more than one limit; write {flag} {times}: {flag} {f' {flag} '.join(parts)}")
    return name, parse_size(size)


def parse_program_limit(text: str) -> Limit:
    """Return the Limit for `program=SIZE`, `group:program=SIZE` or `group:*=SIZE`. Raises ValueError."""
    name, size_bytes = _split_limit('-p', text, 'NAME')
    return Limit(parse_name(name), size_bytes)


def parse_group_limit(text: str) -> Limit:
    """Return the Limit for `group=SIZE`. Raises ValueError."""
    group, size_bytes = _split_limit('-g', text, 'GROUP')
    if ':' in group or not group.strip():
        raise ValueError(f'{group!r} is not a group name; write GROUP=SIZE, as in group=200MB')
    return Limit(Name(group.strip(), None), size_bytes)


OPTIONS = (
    Option('p', 'program', parse_program_limit),
    Option('g', 'groupname', parse_group_limit),
    Option('a', 'any', parse_size),
    Option('c', 'cumulative'),
    Option('u', 'uptime', parse_time),
    Option('n', 'name', str),
    Option('', 'samples', parse_count),
    Option('', 'max-restarts', parse_rate),
    Option('', 'dry-run'),
    Option('v', 'verbose'),
    *mail.OPTIONS,
    *COMMON_OPTIONS,
)


class Options(NamedTuple):
    limits: tuple[Limit, ...]
    cumulative: bool
    uptime_seconds: float | None
    name: str | None
    samples: int
    max_restarts: Rate | None
    dry_run: bool
    verbose: bool
    mail: mail.Settings
    once: bool
    configuration: str | None
    warnings: tuple[str, ...]


def build_options(given: Given, arguments: list[str]) -> Options:
    """Return the Options for a command line. Raises UsageError."""
    limits = given.all('program') + given.all('groupname')
    limits += [Limit(EVERY, size_bytes) for size_bytes in given.all('any')]
    if not limits:
        raise UsageError('nothing to watch; give -p, -g or -a, as in -a 200MB')
    given.ignore_arguments('memmon', arguments)
    if given.last('name') == '':
        given.ignore_empty('-n')
    settings = mail.read_settings(given)    # it may add warnings
    return Options(
        limits=tuple(limits),
        cumulative='cumulative' in given,
        uptime_seconds=given.last('uptime'),
        name=given.last('name') or None,
        samples=given.last('samples', 1),
        max_restarts=given.last('max-restarts'),
        dry_run='dry-run' in given,
        verbose='verbose' in given,
        mail=settings,
        once='once' in given,
        configuration=given.last('configuration'),
        warnings=tuple(given.warnings))


def describe_options(options: Options) -> str:
    """Return what a listener with these options does, for the first line of its log."""
    sizes = {limit.name: limit.size_bytes for limit in options.limits}
    any_bytes = sizes.pop(EVERY, None)
    limits = [f'{name} over {format_size(size_bytes)}' for name, size_bytes in sizes.items()]
    if any_bytes is not None:
        limits.append(f"everything{' else' if limits else ''} over {format_size(any_bytes)}")
    parts = [('dry run, would restart ' if options.dry_run else 'restarts ') + ', '.join(limits)]
    if options.cumulative:
        parts.append('child processes included')
    if options.samples > 1:
        parts.append(f'after {options.samples} ticks in a row')
    if options.max_restarts:
        rate = options.max_restarts
        parts.append(f"at most {count(rate.times, 'restart')} of a process in {format_duration(rate.seconds)}")
    parts.append(mail.describe(options.mail))
    if options.uptime_seconds is not None:
        parts.append(f'mail about a restart only if the uptime was at most {format_duration(options.uptime_seconds)}')
    return f"memmon {__version__}: {'; '.join(parts)}"


def describe_wants(options: Options) -> Wants:
    """Return what is checked at start."""
    return Wants(names=[limit.name for limit in options.limits], restarts=not options.dry_run,
                 find_problems=lambda: [mail.find_command_problem(options.mail)], warnings=options.warnings)


# Decide.

def resolve_limits(limits: Sequence[Limit], processes: Iterable[Process]) -> list[Limit]:
    """Return the limits as they apply to these processes: a name that only a group has matches all of the group."""
    names = resolve_names([limit.name for limit in limits], [(process.group, process.program) for process in processes])
    return [Limit(name, limit.size_bytes, name != limit.name) for limit, name in zip(limits, names)]


def find_limit(limits: Iterable[Limit], group: str, program: str) -> int | None:
    """Return how many bytes a process may use: the most specific limit; of several equally specific, the last one."""
    matching = [limit for limit in limits if limit.name.matches(group, program)]
    if not matching:
        return None
    return max(enumerate(matching), key=lambda pair: (
        pair[1].name.program is not None, pair[1].name.group is not None, not pair[1].is_fallback, pair[0]),
    )[1].size_bytes


# The verdict on a process that is to be restarted.
OVER = 'over its limit: would be restarted'


def decide(process: Process, used_bytes: int | None, limit_bytes: int | None) -> str:
    """Return the verdict on a process: OVER, or why it is not restarted."""
    if not process.pid:
        return f'not running ({process.state_name})'
    if used_bytes is None:
        return 'unable to read its memory'
    if limit_bytes is None:
        return 'not watched'
    if used_bytes <= limit_bytes:
        return 'ok'
    return 'over its limit: left alone (STOPPING)' if process.state == State.STOPPING else OVER


def describe(used_bytes: int, limit_bytes: int | None) -> str:
    """Return a process' memory and its limit in words."""
    if limit_bytes is None:
        return f'{format_size(used_bytes)}, no limit'
    relation = 'over' if used_bytes > limit_bytes else 'within'
    return f'{format_size(used_bytes)}, {relation} its limit of {format_size(limit_bytes)}'


# Act and report.

class Memmon:
    """The listener: at every tick, restarts the processes that are over their limits."""

    def __init__(self, options: Options, environment: Mapping[str, str], request: ExitRequest = exit_request) -> None:
        self._options = options
        self._request = request
        self._log = make_log('memmon')
        self._read_memory = MemoryReader(self._log, request)
        self._own_group = environment.get('SUPERVISOR_GROUP_NAME')
        self._supervisor = Supervisor(environment)
        self._restarter = Restarter(self._supervisor, self._report, options.max_restarts, options.dry_run, request)
        self._outbox = Outbox(options.mail, 'memmon', self._log)
        wants = describe_wants(options)._replace(read_pids=self._read_memory)
        self._start_check = StartCheck('memmon', wants, environment, self._log, request)
        self._smallest_bytes = min(limit.size_bytes for limit in options.limits)
        # How many bytes (pid, parent pid) may use before supervisord has to be asked again. None stands for any
        # number: the process is not one of supervisord's, or has no limit.
        self._known: dict[tuple[int, int], int | None] = {}
        self._known_since = time.monotonic()
        self._samples: dict[tuple[str, int], int] = {}
        self._reasons: dict[str, str] = {}
        self._was_parent_visible = False
        self._server = ''

    def start(self) -> None:
        self._log(describe_options(self._options))
        self._start_check.run()

    def handle(self, event: Event) -> None:
        if not event.name.startswith('TICK'):
            return
        self._server = event.server
        if self._restarter.retry() or self._restarter.is_stale(event):
            return
        self._start_check.run_again()
        try:
            self._check()
        except (Unknown, Refused) as why:
            if not self._request.requested:
                self._log(f'unable to check memory: {why}')

    def finish(self) -> None:
        self._restarter.finish()
        self._outbox.close()

    def _check(self) -> None:
        memory = self._read_memory()
        self._look_for_parent(memory)
        used = measure(memory, self._options.cumulative)
        needs_list = self._options.verbose or self._may_be_over(memory, used)
        over = self._find_over(memory, used) if needs_list else []
        before, self._samples = self._samples, {}
        for process in over:
            key = process.namespec, process.pid
            self._samples[key] = before.get(key, 0) + 1
            if self._samples[key] >= self._options.samples:
                self._samples[key] = 0
                self._restarter.restart(process)

    def _look_for_parent(self, memory: Mapping[int, ProcessMemory]) -> None:
        """If supervisord disappears from the output of ps, check whether its processes have as well."""
        is_visible = os.getppid() in memory
        if self._was_parent_visible and not is_visible:
            self._start_check.check_memory_again()
        self._was_parent_visible = is_visible

    def _may_be_over(self, memory: Mapping[int, ProcessMemory], used: Mapping[int, int]) -> bool:
        """Return whether a process is over a limit that may apply to it."""
        if time.monotonic() - self._known_since > FORGET_SECONDS:
            self._known.clear()
        for pid, used_bytes in used.items():
            if used_bytes > self._smallest_bytes:
                limit_bytes = self._known.get((pid, memory[pid].parent_pid), self._smallest_bytes)
                if limit_bytes is not None and used_bytes > limit_bytes:
                    return True
        return False

    def _find_over(self, memory: Mapping[int, ProcessMemory], used: Mapping[int, int]) -> list[Process]:
        """Get supervisord's processes; return those that are over their limits."""
        # Typically, a process over the limit is not supervisord's, and supervisord is not asked again for an hour.
        processes = (self._supervisor.get_processes() if self._options.verbose
                     else self._supervisor.get_processes_in_helper(PROCESS_LIST_SECONDS, self._request))
        self._start_check.report_hidden(processes, memory)
        limits = resolve_limits(self._options.limits, processes)
        self._known_since = time.monotonic()
        self._known = {(pid, memory[pid].parent_pid): None
                       for pid, used_bytes in used.items() if used_bytes > self._smallest_bytes}
        over = []
        for process in processes:
            # A stopped process has pid 0, and so has a BSD's kernel.
            if not process.pid or process.pid not in used:
                continue
            used_bytes = used[process.pid]
            limit_bytes = find_limit(limits, process.group, process.program)
            words = f'pid {process.pid}: {describe(used_bytes, limit_bytes)}'
            if self._options.verbose:
                self._log(f'{process.title} ({words})')
            if process.group == self._own_group:
                continue
            self._known[process.pid, memory[process.pid].parent_pid] = limit_bytes
            if decide(process, used_bytes, limit_bytes) == OVER:
                self._reasons[process.namespec] = words
                over.append(process)
        return over

    def _report(self, outcome: Outcome) -> None:
        process = outcome.process
        line = f'{outcome.text} ({self._reasons[process.namespec]})'
        self._log(line)
        if outcome.result not in SUBJECTS:
            return
        uptime_seconds = self._options.uptime_seconds
        if outcome.result in (Result.RESTARTED, Result.DRY_RUN) and uptime_seconds is not None \
                and process.uptime_seconds > uptime_seconds:
            return
        listener = f'memmon [{self._options.name}]' if self._options.name else 'memmon'
        self._outbox.put(
            f'{listener}: {SUBJECTS[outcome.result].format(process.namespec)}',
            f'{line}\n\nProgram: {process.program}\nGroup: {process.group}\n'
            f'Uptime: {format_duration(process.uptime_seconds)}\n', self._server)


# From the command line.

def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def print_memory(processes: Sequence[Process], used: Mapping[int, int], limits: Sequence[Limit]) -> bool:
    """Print every process, its memory and its limit; return whether one would be restarted."""
    rows = [('GROUP', 'PROCESS', 'PID', 'MEMORY', 'LIMIT', 'VERDICT')]
    for process in processes:
        limit_bytes = find_limit(limits, process.group, process.program)
        used_bytes = used.get(process.pid) if process.pid else None
        rows.append((process.group, process.program, str(process.pid or '-'),
                     '-' if used_bytes is None else format_size(used_bytes),
                     '-' if limit_bytes is None else format_size(limit_bytes),
                     decide(process, used_bytes, limit_bytes)))
    print_table(rows)
    return any(row[-1] == OVER for row in rows)


def run_once(options: Options, environment: Mapping[str, str]) -> int:
    """Print all processes and what is wrong; return the exit status."""
    supervisor = find_supervisor(options.configuration, environment)
    wants = describe_wants(options)
    problems = check_once('memmon', wants, supervisor, environment)
    is_over = False
    try:
        if not any(problem.is_unreachable for problem in problems):
            processes = supervisor.get_processes()
            used = measure(MemoryReader(make_log('memmon'))(), options.cumulative)
            is_over = print_memory(processes, used, resolve_limits(options.limits, processes))
            hidden = find_hidden(find_watched(processes, wants.names, environment.get('SUPERVISOR_GROUP_NAME')), used)
            if hidden:
                problems.append(Problem(describe_hidden('memmon', hidden), fatal=True))
    except (Unknown, Refused) as why:
        problems.append(Problem(f'unable to check memory: {why}', fatal=True))
    for problem in problems:
        print(problem.line)
    return 1 if is_over or any(problem.fatal for problem in problems) else 0


def run(options: Options) -> int:
    if options.once:
        return run_once(options, os.environ)
    memmon = Memmon(options, os.environ)
    return listen('memmon', memmon.handle, memmon.finish, memmon.start)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('memmon', __doc__, OPTIONS, build_options, run, argv, ignores_arguments=True)


if __name__ == '__main__':
    raise SystemExit(main())
