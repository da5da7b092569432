"""Usage: memmon [options]

Restarts processes that hold too much memory, and mails about it. It runs as
an event listener of supervisor, subscribed to a TICK event:

    [eventlistener:memmon]
    command=memmon -a 200MB -m bob@example.com
    events=TICK_60

What to watch, at least one of these:
  -p, --program=NAME=SIZE     restart NAME (program, group:program or group:*)
                              when it exceeds SIZE; may be repeated
  -g, --groupname=GROUP=SIZE  the same for every process of a group
  -a, --any=SIZE              the same for every process of supervisord
                              The most specific limit holds. SIZE is bytes, or
                              a number with KB, MB, GB or TB, as in 1.5GB.

When and how to restart:
  -c, --cumulative            count a process' descendants in
      --samples=N             only after N ticks in a row over the limit
                              (default: 1)
      --max-restarts=N/TIME   at most N restarts of one process within TIME:
                              seconds, or a number with s, m, h or d; then
                              leave it alone, and tell that once
      --dry-run               say what would be restarted, and leave it running

Mail:
  -m, --email=ADDR            to whom; may be repeated or hold several with
                              commas; without it there is the log only
  -u, --uptime=TIME           mail of a restart only where the process had run
                              for no longer than TIME
  -n, --name=NAME             the subject begins with "memmon [NAME]"
  -s, --sendmail_program=CMD  the command that sends a mail
                              (default: /usr/sbin/sendmail -t -i)
      --smtp=URL              send by smtp://[user[:password]@]host[:port] or
                              smtps://... instead; the password may also be in
                              SUPERLANCE_SMTP_PASSWORD
      --from=ADDR             the sender

By hand, and in the log:
      --once                  print a table of all processes and do nothing
                              else; exit status 0 if all is well, else 1
      --configuration=FILE    for --once: the supervisord.conf to find
                              supervisord by
  -v, --verbose               log the memory of every process at every tick
  -h, --help                  print this text
      --version               print the version
"""
from __future__ import annotations

import os
import time
from typing import Iterable, Mapping, NamedTuple, Sequence

from superlance import mail
from superlance.listener import CommandFailed, Event, Log, listen, make_log, run_command
from superlance.options import (
    COMMON_OPTIONS,
    Given,
    Option,
    Rate,
    UsageError,
    format_size,
    parse_count,
    parse_rate,
    parse_size,
    parse_time,
    run_script,
    without_password,
)
from superlance.processes import (
    CALL_TIMEOUT_SECONDS,
    DRY_RUN,
    EVERY,
    RESTARTED,
    STOPPING,
    SUBJECTS,
    CantTell,
    Name,
    NameCheck,
    Outcome,
    Process,
    Refused,
    Restarter,
    Supervisor,
    find_supervisor,
    find_unmatched,
    parse_name,
)

PS = ('ps', '-A', '-o', 'pid=', '-o', 'ppid=', '-o', 'rss=')
PS_TIMEOUT_SECONDS = 10


# Options.

class Limit(NamedTuple):
    """How much memory the processes that a name means may hold."""

    name: Name
    size_bytes: int


def _split_size(text: str, meaning: str) -> tuple[str, int]:
    name, equals, size = text.rpartition('=')
    if not (equals and name):
        raise ValueError('{!r} has no {}; write {}=SIZE, as in {}=200MB'.format(text, 'name' if equals else 'size', meaning, meaning.lower()))
    return name, parse_size(size)


def parse_program_limit(text: str) -> Limit:
    """Return the Limit for `program=SIZE`, `group:program=SIZE` or `group:*=SIZE`."""
    name, size_bytes = _split_size(text, 'NAME')
    return Limit(parse_name(name), size_bytes)


def parse_group_limit(text: str) -> Limit:
    """Return the Limit for `group=SIZE`."""
    group, size_bytes = _split_size(text, 'GROUP')
    if ':' in group or not group.strip():
        raise ValueError(f"{group!r} is not a group's name; write GROUP=SIZE, as in group=200MB")
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
) + mail.OPTIONS + COMMON_OPTIONS


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


def build_options(given: Given, arguments: list[str]) -> Options:
    """Return the Options for what was given. Raises UsageError."""
    if arguments:
        raise UsageError(f'unexpected argument {without_password(arguments[0])!r}; memmon takes options only')
    limits = given.all('program') + given.all('groupname')
    limits += [Limit(EVERY, size_bytes) for size_bytes in given.all('any')]
    if not limits:
        raise UsageError('nothing to watch; give -p, -g or -a, as in -a 200MB')
    return Options(
        limits=tuple(limits),
        cumulative='cumulative' in given,
        uptime_seconds=given.last('uptime'),
        name=given.last('name'),
        samples=given.last('samples', 1),
        max_restarts=given.last('max-restarts'),
        dry_run='dry-run' in given,
        verbose='verbose' in given,
        mail=mail.read_settings(given),
        once='once' in given,
        configuration=given.last('configuration'))


# Probe: how much memory every process of the machine holds.

class Usage(NamedTuple):
    """A process of the machine."""

    parent_pid: int
    rss_bytes: int


def parse_ps(output: str) -> dict[int, Usage]:
    """Return the Usage by pid from lines of pid, parent pid and RSS in KiB. Raises CantTell."""
    usages = {}
    for line in output.splitlines():
        numbers = line.split()
        if not numbers:
            continue
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise CantTell(f'ps printed {line[:80]!r} where pid, parent pid and RSS were asked for')
        usages[int(numbers[0])] = Usage(int(numbers[1]), int(numbers[2]) * 1024)
    if not usages:
        raise CantTell('ps printed no process')
    return usages


def run_ps() -> dict[int, Usage]:
    """Ask ps. Three -o, since on the BSDs a header's text runs to the end of its argument."""
    deadline = time.monotonic() + PS_TIMEOUT_SECONDS
    try:
        output = run_command(PS, lambda: deadline - time.monotonic(), environment=dict(os.environ, LC_ALL='C'))
    except CommandFailed as why:
        raise CantTell(str(why))
    return parse_ps(output.decode('ascii', 'replace'))


def read_proc() -> dict[int, Usage]:
    """Read Linux's /proc: the 4th and 24th field of each stat (proc(5)). Raises CantTell."""
    page_bytes = os.sysconf('SC_PAGE_SIZE')
    usages = {}
    try:
        pids = [int(name) for name in os.listdir('/proc') if name.isdecimal()]
    except OSError as why:
        raise CantTell(f'/proc: {why.strerror}')
    for pid in pids:
        try:
            with open('/proc/%d/stat' % pid, 'rb') as file:
                fields = file.read().rpartition(b')')[2].split()
            usages[pid] = Usage(int(fields[1]), int(fields[21]) * page_bytes)
        except OSError:
            pass  # it has ended since
    if not usages:
        raise CantTell('/proc has no processes')
    return usages


class MemoryReader:
    """Reads memory by ps, and by /proc from the first time that ps fails where there is one."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._read = run_ps

    def __call__(self) -> dict[int, Usage]:
        """Return the Usage by pid. Raises CantTell."""
        try:
            return self._read()
        except CantTell as why:
            if self._read is read_proc or not os.path.exists('/proc/self/stat'):
                raise
            self._log(f'{why}; memory is read from /proc from now on')
            self._read = read_proc
            return self._read()


def sum_descendants(usages: Mapping[int, Usage]) -> dict[int, int]:
    """Return by pid the bytes that a process and all its descendants hold.

    From the leaves upwards, each process once. A ps that ran while pids were reused can show a
    circle; its members keep what they have.
    """
    totals = {pid: usage.rss_bytes for pid, usage in usages.items()}
    children_left = dict.fromkeys(usages, 0)
    for usage in usages.values():
        if usage.parent_pid in children_left:
            children_left[usage.parent_pid] += 1
    leaves = [pid for pid, count in children_left.items() if count == 0]
    for pid in leaves:
        parent = usages[pid].parent_pid
        if parent in totals:
            totals[parent] += totals[pid]
            children_left[parent] -= 1
            if children_left[parent] == 0:
                leaves.append(parent)
    return totals


def measure(usages: Mapping[int, Usage], cumulative: bool) -> dict[int, int]:
    """Return by pid the bytes that count against a limit."""
    return sum_descendants(usages) if cumulative else {pid: usage.rss_bytes for pid, usage in usages.items()}


# Judge.

def find_limit(limits: Iterable[Limit], group: str, program: str) -> int | None:
    """Return the bytes that a process may hold: the most specific limit, the last of equals."""
    matching = [limit for limit in limits if limit.name.means(group, program)]
    if not matching:
        return None
    return max(enumerate(matching), key=lambda pair: (
        pair[1].name.program is not None, pair[1].name.group is not None, pair[0]))[1].size_bytes


# The verdict on what is to be restarted.
OVER = 'over its limit: would be restarted'


def judge(process: Process, held_bytes: int | None, limit_bytes: int | None) -> str:
    """Return the verdict on a process: OVER, or in words why it is left alone."""
    if not process.pid:
        return f'not running ({process.state_name})'
    if held_bytes is None:
        return 'unable to see its memory'   # /proc may be mounted with hidepid
    if limit_bytes is None:
        return 'not watched'
    if held_bytes <= limit_bytes:
        return 'ok'
    return 'over its limit: left alone (STOPPING)' if process.state == STOPPING else OVER


def describe(held_bytes: int, limit_bytes: int | None) -> str:
    """Return what a process holds beside its limit, in words."""
    if limit_bytes is None:
        return f'{format_size(held_bytes)}, and no limit'
    return '{}, {} its limit of {}'.format(
        format_size(held_bytes), 'over' if held_bytes > limit_bytes else 'within', format_size(limit_bytes))


# Act and tell.

class Memmon:
    """The listener: at every tick, restarts the processes that are over their limits."""

    FORGET_SECONDS = 3600

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._log = make_log('memmon')
        self._read_memory = MemoryReader(self._log)
        self._own_group = environment.get('SUPERVISOR_GROUP_NAME')
        self._supervisor = Supervisor(environment)
        self._restarter = Restarter(self._supervisor, self._tell, options.max_restarts, options.dry_run)
        self._outbox = mail.Outbox(options.mail, 'memmon', self._log)
        self._names = NameCheck([limit.name for limit in options.limits], self._supervisor, self._log)
        self._smallest_bytes = min(limit.size_bytes for limit in options.limits)
        # What (pid, parent pid) may hold before supervisord has to be asked about it; None: it's not
        # supervisord's, or nothing limits it.
        self._known: dict[tuple[int, int], int | None] = {}
        self._known_since = time.monotonic()
        self._samples: dict[tuple[str, int], int] = {}
        self._reasons: dict[Process, str] = {}
        self._server = ''

    def handle(self, event: Event) -> None:
        if not event.name.startswith('TICK'):
            return
        self._server = event.server
        if self._restarter.retry() or self._restarter.is_stale(event):
            return
        self._names.ask_and_tell()
        try:
            self._check()
        except (CantTell, Refused) as why:
            self._log(f'unable to check memory: {why}')

    def finish(self) -> None:
        self._restarter.retry()
        self._outbox.close()

    def _check(self) -> None:
        usages = self._read_memory()
        held = measure(usages, self._options.cumulative)
        must_look = self._options.verbose or self._must_ask(usages, held)
        self._reasons = self._find_over(usages, held) if must_look else {}
        before, self._samples = self._samples, {}
        for process in self._reasons:
            key = process.namespec, process.pid
            self._samples[key] = before.get(key, 0) + 1
            if self._samples[key] >= self._options.samples:
                self._samples[key] = 0
                self._restarter.restart(process)

    def _must_ask(self, usages: Mapping[int, Usage], held: Mapping[int, int]) -> bool:
        """Return whether a process is over a limit that may be its own."""
        if time.monotonic() - self._known_since > self.FORGET_SECONDS:
            self._known.clear()  # a pid may come to mean another process
        for pid, held_bytes in held.items():
            if held_bytes > self._smallest_bytes:
                limit_bytes = self._known.get((pid, usages[pid].parent_pid), self._smallest_bytes)
                if limit_bytes is not None and held_bytes > limit_bytes:
                    return True
        return False

    def _find_over(self, usages: Mapping[int, Usage], held: Mapping[int, int]) -> dict[Process, str]:
        """Ask supervisord; return which of its processes are over their limits, and why."""
        # Mostly what is over the limit is foreign, and supervisord is not asked again for an hour.
        processes = (self._supervisor.get_processes() if self._options.verbose
                     else self._supervisor.get_processes_in_child(CALL_TIMEOUT_SECONDS))
        self._names.tell_unmatched(processes)
        self._known_since = time.monotonic()
        self._known = {(pid, usages[pid].parent_pid): None
                       for pid, held_bytes in held.items() if held_bytes > self._smallest_bytes}
        over = {}
        for process in processes:
            # A stopped process has pid 0, and so has a BSD's kernel.
            if not process.pid or process.pid not in held:
                continue
            held_bytes = held[process.pid]
            limit_bytes = find_limit(self._options.limits, process.group, process.program)
            words = describe(held_bytes, limit_bytes)
            if self._options.verbose:
                self._log('%s (pid %d): %s' % (process.title, process.pid, words))
            if process.group == self._own_group:
                continue
            self._known[process.pid, usages[process.pid].parent_pid] = limit_bytes
            if judge(process, held_bytes, limit_bytes) == OVER:
                over[process] = 'pid %d: %s' % (process.pid, words)
        return over

    def _tell(self, outcome: Outcome) -> None:
        reason = self._reasons.get(outcome.process)
        line = f'{outcome.text} ({reason})' if reason else outcome.text
        self._log(line)
        process, uptime_seconds = outcome.process, self._options.uptime_seconds
        if outcome.result not in SUBJECTS:
            return
        if outcome.result in (RESTARTED, DRY_RUN) and uptime_seconds is not None \
                and process.uptime_seconds > uptime_seconds:
            return
        program = f'memmon [{self._options.name}]' if self._options.name else 'memmon'
        self._outbox.put(
            f'{program}: {SUBJECTS[outcome.result] % process.title}',
            '%s\n\nIt is program %s of group %s and had run for %d s.\n'
            % (line, process.program, process.group, process.uptime_seconds), self._server)


# One look by hand.

def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def look_once(options: Options, environment: Mapping[str, str]) -> int:
    """Print every process, its memory and its limit; return 1 if one is over, else 0."""
    supervisor = find_supervisor(options.configuration, environment)
    log = make_log('memmon')
    try:
        processes = supervisor.get_processes()
        held = measure(MemoryReader(log)(), options.cumulative)
    except (CantTell, Refused) as why:
        log(f'unable to check memory: {why}')
        return 1
    rows = [('GROUP', 'PROCESS', 'PID', 'MEMORY', 'LIMIT', 'VERDICT')]
    for process in processes:
        limit_bytes = find_limit(options.limits, process.group, process.program)
        held_bytes = held.get(process.pid) if process.pid else None
        rows.append((process.group, process.program, str(process.pid or '-'),
                     '-' if held_bytes is None else format_size(held_bytes),
                     '-' if limit_bytes is None else format_size(limit_bytes),
                     judge(process, held_bytes, limit_bytes)))
    print_table(rows)
    unmatched = find_unmatched([limit.name for limit in options.limits], processes)
    for line in unmatched:
        print(line)
    return 1 if unmatched or any(row[-1] == OVER for row in rows) else 0


def run(options: Options) -> int:
    if options.once:
        return look_once(options, os.environ)
    memmon = Memmon(options, os.environ)
    return listen('memmon', memmon.handle, memmon.finish)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('memmon', __doc__, OPTIONS, build_options, run, argv)


if __name__ == '__main__':
    raise SystemExit(main())
