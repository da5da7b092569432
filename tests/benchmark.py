"""Compare the cost of the listeners with superlance 2.0.0 and with the least possible.

    python tests/benchmark.py

takes about five minutes, needs Linux, Python 3.8 or later and a package index, and is not part of the test run. It
installs superlance 2.0.0 and this checkout, with the same supervisor, into two environments in a temporary folder,
measures both in turn (A B A B ...) on the same real supervisord, and prints medians:

- a tick of memmon: from the event to its acknowledgement, with all processes within their limits; the CPU time of the
  listener and the commands that it runs, and that of supervisord, are means. The first tick of this package, at which
  it learns about the machine, is not counted. The floor is a bare `ps` with the arguments that memmon uses. "-c"
  includes descendants; "foreign" is with processes over the limit that are not supervisord's;
- memory: what is resident at rest after the first events, none of which needs supervisord or a mail unless the row says
  so (supervisord is asked about a foreign process once); the floor is a Python that sleeps;
- ready: from the start of the console script to its first READY; the floor is a Python that does nothing;
- crashes acknowledged per second while the mail command takes 50 ms;
- a storm: 120 programs exit within two seconds. Mails, and events that supervisord discarded because crashmail did not
  read them in time; the floor is what supervisord handed to this package's crashmail;
- httpok: from the first tick after a server has begun to hang to the restart of its program, less the timeout. At this
  point, once in its life, this package imports what it needs to call supervisord.

A ratio is printed beside its goal; "!" marks a goal that was missed. Compare ratios: times only compare within one run,
and on a busy machine a ratio near its goal needs a second run.
"""
from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean, median
from typing import IO, Any, Callable, Iterator, NamedTuple, NoReturn, Sequence

CHECKOUT = Path(__file__).resolve().parent.parent
PS = ('ps', '-A', '-o', 'pid=', '-o', 'ppid=', '-o', 'rss=')
TIMEOUT_SECONDS = 180     # 1,000 programs take long to start
TICK = ('TICK_5', 'when:1700000000')
CRASH = ('PROCESS_STATE_EXITED', 'processname:web groupname:web from_state:RUNNING expected:0 pid:123')
EXPECTED_EXIT = ('PROCESS_STATE_EXITED', 'processname:web groupname:web from_state:RUNNING expected:1 pid:123')
STORM_PROGRAMS = 120
STORM_SECONDS = 2.0
FOREIGN_PROCESSES = 5
MAIL = ('-m', 'nobody@localhost', '-s')
READ_MAIL = 'cat >/dev/null'


# The table.

class Goal(NamedTuple):
    """A ratio that should be `<=` or `>=` a figure."""

    sense: str
    figure: float


class Row(NamedTuple):
    what: str
    old: float
    new: float
    floor: float | None = None
    to_old: Goal | None = None
    to_floor: Goal | None = None


def at_most(figure: float) -> Goal:
    return Goal('<=', figure)


def at_least(figure: float) -> Goal:
    return Goal('>=', figure)


def make_row(what: str, found: Sequence[Sequence[float]], to_old: Goal | None = None) -> Row:
    """Return the row of the medians of 2.0.0, of this package and perhaps of the floor, from tuples of these."""
    old, new, *floor = [median(column) for column in zip(*found)]
    return Row(what, old, new, floor[0] if floor else None, to_old)


def format_ratio(value: float, base: float | None, goal: Goal | None) -> str:
    if not base:
        return ''
    ratio = value / base
    if goal is None:
        return f'{ratio:.3f}'
    reached = ratio <= goal.figure if goal.sense == '<=' else ratio >= goal.figure
    return f"{ratio:.3f} ({goal.sense} {goal.figure:g}){'' if reached else ' !'}"


def print_table(rows: Sequence[Row]) -> None:
    table = [('', '2.0.0', 'this', 'floor', 'this / 2.0.0', 'this / floor')]
    table += [(row.what, f'{row.old:.1f}', f'{row.new:.1f}', '' if row.floor is None else f'{row.floor:.1f}',
               format_ratio(row.new, row.old, row.to_old), format_ratio(row.new, row.floor, row.to_floor))
              for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for what, old, new, floor, to_old, to_floor in table:
        print('  '.join((what.ljust(widths[0]), old.rjust(widths[1]), new.rjust(widths[2]), floor.rjust(widths[3]),
                         to_old.ljust(widths[4]), to_floor)).rstrip())


# What is measured: two environments, listeners that the benchmark itself drives, a real supervisord.

def run(*command: str) -> None:
    """Run a command; if the benchmark is interrupted, the command and its children are killed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {' '.join(command)}")


def install(folder: Path, *requirements: str) -> Path:
    """Make an environment with these requirements and return the folder of its commands."""
    commands = folder / 'bin'
    run(sys.executable, '-m', 'venv', str(folder))
    run(str(commands / 'python'), '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *requirements)
    return commands


def install_both(folder: Path) -> tuple[Path, Path]:
    """Return the commands' folders of superlance 2.0.0 and of this checkout."""
    old = install(folder / 'old', 'superlance==2.0.0', 'supervisor')
    version = subprocess.run([str(old / 'supervisord'), '--version'], check=True, stdout=subprocess.PIPE).stdout
    source = folder / 'source'  # a build leaves files where it works
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns('.*', 'build', 'dist', '*.egg-info', 'tests'))
    # An old pip would not make a wheel, and its console scripts import much more than those of one.
    new = install(folder / 'new', '--use-pep517', str(source), 'supervisor==' + version.decode().strip())
    return old, new


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that is killed at the end of the block."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f'something did not happen within {TIMEOUT_SECONDS} s')
        time.sleep(0.01)


class Supervisord:
    """A real supervisord, as its configuration and its log show it."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.folder = folder
        self.url = f"unix://{folder / 's.sock'}"

    def count(self, text: str) -> int:
        """Return how often the log has a text."""
        log = self.folder / 'log'
        return log.read_text('utf-8').count(text) if log.exists() else 0

    def program_pids(self) -> list[int]:
        """Return the pids of the programs, in the order of their starts."""
        log = (self.folder / 'log').read_text('utf-8')
        return [int(pid) for pid in re.findall(r"spawned: 'p\d+' with pid (\d+)", log)]


@contextmanager
def supervising(commands: Path, programs: int, listener: str = '') -> Iterator[Supervisord]:
    """Run a supervisord with so many programs that sleep, and perhaps a listener's section."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'conf').write_text(f'''
[supervisord]
nodaemon=true
logfile=%(here)s/log
pidfile=%(here)s/pid
childlogdir=%(here)s
minfds=4000
[unix_http_server]
file=%(here)s/s.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:p]
command=sleep 600
process_name=p%(process_num)d
numprocs={programs}
startsecs=0
autorestart=false
stopsignal=KILL
stdout_logfile=NONE
stderr_logfile=NONE
''' + listener, 'utf-8')
        process = subprocess.Popen([str(commands / 'supervisord'), '-c', str(folder / 'conf')],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            supervisord = Supervisord(process.pid, folder)
            wait_for(lambda: supervisord.count('entered RUNNING state') >= programs + bool(listener))
            yield supervisord
        finally:
            process.terminate()  # it stops everything that it runs
            process.wait()


class Listener:
    """A listener that waits for its next event; the benchmark plays supervisord's part."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.pid = process.pid
        self._process = process
        self._log = log
        self._expect(b'READY\n')

    def serve(self, name: str, payload: str) -> float:
        """Send an event and return the seconds until it was acknowledged."""
        assert self._process.stdin
        header = f'ver:3.0 server:supervisor serial:1 pool:listener poolserial:1 eventname:{name} len:{len(payload)}\n'
        start = time.perf_counter()
        self._process.stdin.write((header + payload).encode('utf-8'))
        self._expect(b'RESULT 2\nOK')
        seconds = time.perf_counter() - start
        self._expect(b'READY\n')
        return seconds

    def _expect(self, expected: bytes) -> None:
        assert self._process.stdout
        got = b''
        while len(got) < len(expected):
            chunk = self._process.stdout.read(len(expected) - len(got))
            if not chunk:
                break
            got += chunk
        if got != expected:
            self._log.seek(0)
            raise RuntimeError(f"{got!r}, expected {expected!r}; log: {self._log.read().decode('utf-8', 'replace')}")


@contextmanager
def listening(url: str, commands: Path, program: str, *options: str) -> Iterator[Listener]:
    """Start a listener by its console script and wait until it is ready."""
    environment = dict(os.environ, SUPERVISOR_SERVER_URL=url, SUPERVISOR_ENABLED='1',
                       SUPERVISOR_PROCESS_NAME='listener', SUPERVISOR_GROUP_NAME='listener')
    with tempfile.TemporaryFile() as log, running(
            [str(commands / program), *options], env=environment, bufsize=0, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log) as process:
        yield Listener(process, log)


def read_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended: 14th to 17th field of proc(5)'s stat."""
    fields = Path(f'/proc/{pid}/stat').read_text('utf-8').rpartition(')')[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf('SC_CLK_TCK')


def read_resident_mb(pid: int) -> float:
    for line in Path(f'/proc/{pid}/status').read_text('utf-8').splitlines():
        if line.startswith('VmRSS:'):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f'process {pid} has no VmRSS')


# memmon's tick.

class Ticks:
    """What the ticks of one listener took, in ms."""

    def __init__(self, listener: Listener, supervisord: Supervisord) -> None:
        self._listener = listener
        self._supervisord = supervisord
        self._walls: list[float] = []
        self._cpu_start = read_cpu_seconds(listener.pid)
        self._supervisord_cpu = 0.0

    def tick(self) -> None:
        before = read_cpu_seconds(self._supervisord.pid)
        self._walls.append(1000 * self._listener.serve(*TICK))
        self._supervisord_cpu += read_cpu_seconds(self._supervisord.pid) - before

    @property
    def wall(self) -> float:
        return median(self._walls)

    @property
    def cpu(self) -> float:
        return 1000 * (read_cpu_seconds(self._listener.pid) - self._cpu_start) / len(self._walls)

    @property
    def supervisord_cpu(self) -> float:
        return 1000 * self._supervisord_cpu / len(self._walls)


def own_cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_ps() -> tuple[float, float]:
    """Run the bare ps and return the ms that it took, by the clock and of CPU time."""
    cpu_start, start = own_cpu_seconds(), time.perf_counter()
    subprocess.run(PS, env=dict(os.environ, LC_ALL='C'), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    return 1000 * (time.perf_counter() - start), 1000 * (own_cpu_seconds() - cpu_start)


def measure_ticks(old: Path, new: Path, supervisord: Supervisord, what: str, options: Sequence[str],
                  repetitions: int, old_repetitions: int, goals: bool) -> list[Row]:
    """Return the rows of the time, of the listener's CPU time and of supervisord's."""
    with listening(supervisord.url, old, 'memmon', *options) as old_listener, \
            listening(supervisord.url, new, 'memmon', *options) as new_listener:
        new_listener.serve(*TICK)
        old_ticks, new_ticks = Ticks(old_listener, supervisord), Ticks(new_listener, supervisord)
        floor = []
        for repetition in range(repetitions):
            new_ticks.tick()
            floor.append(run_ps())
            if repetition % (repetitions // old_repetitions) == 0:
                old_ticks.tick()
        floor_walls, floor_cpus = zip(*floor)
        return [
            Row(f'tick, {what}: ms', old_ticks.wall, new_ticks.wall, median(floor_walls),
                at_most(1 / 40) if goals else None, at_most(1.6) if goals else None),
            Row('  CPU', old_ticks.cpu, new_ticks.cpu, mean(floor_cpus)),
            Row("  supervisord's CPU", old_ticks.supervisord_cpu, new_ticks.supervisord_cpu)]


@contextmanager
def foreign_processes() -> Iterator[None]:
    """Run some processes of 60 MB that are not supervisord's."""
    with ExitStack() as stack:
        for _ in range(FOREIGN_PROCESSES):
            process = stack.enter_context(running(
                [sys.executable, '-c', "held = b'x' * (60 << 20); print(flush=True); input()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert process.stdout
            process.stdout.readline()
        yield


def measure_memmon(old: Path, new: Path) -> list[Row]:
    rows = []
    walls: dict[int, Row] = {}
    for programs, repetitions, old_repetitions in ((10, 40, 4), (50, 60, 3), (100, 60, 3), (400, 60, 1), (1000, 20, 1)):
        with supervising(old, programs) as supervisord:
            def measure(what: str, *options: str) -> list[Row]:
                return measure_ticks(old, new, supervisord, f'{programs:,} processes{what}', options,
                                     repetitions, old_repetitions, goals=programs == 100)
            found = measure('', '-a', '1GB')
            walls[programs] = found[0]
            rows += found
            if programs not in (50, 1000):
                rows += measure(', -c', '-c', '-a', '1GB')
            if programs == 1000:
                found_mb = [[measure_resident(supervisord.url, [TICK], commands, 'memmon', '-a', '1GB')
                             for commands in (old, new)]]
                rows.append(make_row('memory, 1,000 processes: MB', found_mb))
            if programs == 100:
                with foreign_processes():
                    rows += measure(', foreign', '-a', '50MB')
                    rows += measure(', -c, foreign', '-c', '-a', '50MB')
    few, many = walls[50], walls[400]
    assert few.floor and many.floor
    rows.append(Row('tick, 400 processes to 50: times', many.old / few.old, many.new / few.new,
                    many.floor / few.floor, to_floor=at_most(1.1)))   # as that of ps, up to the noise
    return rows


# Memory and start.

class Handler(BaseHTTPRequestHandler):
    """Answers every GET with a short text."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header('Content-Length', '3')
        self.end_headers()
        self.wfile.write(b'ok\n')

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve HTTP on loopback; yield the URL, and a function that makes the server accept connections and not answer."""
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_address[1]}/', server.shutdown
        finally:
            server.shutdown()
            thread.join()


def measure_resident(url: str, events: Sequence[tuple[str, str]], commands: Path, program: str,
                     *options: str) -> float:
    """Return the MB that a listener uses after these events."""
    with listening(url, commands, program, *options) as listener:
        for event in events:
            listener.serve(*event)
        time.sleep(0.5)  # a mail may be being sent
        return read_resident_mb(listener.pid)


def measure_sleeping_python(python: Path) -> float:
    with running([str(python), '-c', 'import time; print(flush=True); time.sleep(600)'],
                 stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        return read_resident_mb(process.pid)


def measure_memory(old: Path, new: Path, supervisord: Supervisord, web: str) -> list[Row]:
    def measure(what: str, figure: float | None, events: Sequence[tuple[str, str]], *command: str) -> Row:
        found = [(measure_resident(supervisord.url, events, old, *command),
                  measure_resident(supervisord.url, events, new, *command),
                  measure_sleeping_python(new / 'python')) for _ in range(3)]
        return make_row(f'memory, {what}: MB', found, at_most(figure) if figure else None)

    mail = (*MAIL, READ_MAIL)
    rows = [
        measure('memmon', 0.55, [TICK] * 3, 'memmon', '-a', '200MB', *mail),
        measure('crashmail', 0.55, [EXPECTED_EXIT] * 3, 'crashmail', '-a', *mail),
        measure('httpok', 0.8, [TICK] * 3, 'httpok', '-p', 'p:p0', *mail, web),
        measure('crashmail after a mail', None, [CRASH], 'crashmail', '-a', *mail)]
    with foreign_processes():
        rows.append(measure('memmon, foreign', 0.55, [TICK] * 3, 'memmon', '-a', '50MB', *mail))
    return rows


def measure_start(url: str, commands: Path, program: str, *options: str) -> float:
    """Return the ms until a listener is ready."""
    start = time.perf_counter()
    with listening(url, commands, program, *options):
        return 1000 * (time.perf_counter() - start)


def measure_idle_python(python: Path) -> float:
    start = time.perf_counter()
    subprocess.run([str(python), '-c', 'pass'], check=True)
    return 1000 * (time.perf_counter() - start)


def measure_starts(old: Path, new: Path, supervisord: Supervisord, web: str) -> list[Row]:
    cases = ((0.65, ('memmon', '-a', '200MB', *MAIL, READ_MAIL)), (0.65, ('crashmail', '-a', *MAIL, READ_MAIL)),
             (0.9, ('httpok', '-p', 'p:p0', *MAIL, READ_MAIL, web)))
    rows = []
    for figure, command in cases:
        found = [(measure_start(supervisord.url, old, *command), measure_start(supervisord.url, new, *command),
                  measure_idle_python(new / 'python')) for _ in range(12)]
        rows.append(make_row(f'ready, {command[0]}: ms', found, at_most(figure)))
    return rows


# Crashes.

def measure_crash_rate(url: str, commands: Path) -> float:
    """Return how many crashes in a row a listener acknowledges per second."""
    with listening(url, commands, 'crashmail', '-a', *MAIL, READ_MAIL + '; sleep 0.05') as listener:
        start = time.perf_counter()
        for _ in range(STORM_PROGRAMS):
            listener.serve(*CRASH)
        return STORM_PROGRAMS / (time.perf_counter() - start)


def measure_crash_rates(old: Path, new: Path, supervisord: Supervisord) -> list[Row]:
    found = [(measure_crash_rate(supervisord.url, old), measure_crash_rate(supervisord.url, new)) for _ in range(2)]
    return [make_row('crashes acknowledged per second', found, at_least(10))]


def raise_storm(commands: Path, buffer_size: int) -> tuple[int, int]:
    """Kill the programs of a supervisord; return the crashes mailed and the events discarded."""
    listener = f'''
[eventlistener:crashmail]
command={commands / 'crashmail'} -a -m nobody@localhost -s "grep ^Subject >>%(here)s/mails; sleep 0.05"
events=PROCESS_STATE_EXITED
buffer_size={buffer_size}
stopsignal=KILL
'''
    with supervising(commands, STORM_PROGRAMS, listener) as supervisord:
        mails = supervisord.folder / 'mails'

        def count_discarded() -> int:
            return supervisord.count('event buffer overflowed, discarding event')

        def count_mailed() -> int:
            return len(mails.read_text('utf-8').splitlines()) if mails.exists() else 0

        time.sleep(1)  # until crashmail is ready
        for pid in supervisord.program_pids():
            os.kill(pid, signal.SIGKILL)
            time.sleep(STORM_SECONDS / STORM_PROGRAMS)
        wait_for(lambda: supervisord.count('; not expected') == STORM_PROGRAMS)
        deadline = time.monotonic() + 20
        while count_mailed() + count_discarded() < STORM_PROGRAMS and time.monotonic() < deadline:
            time.sleep(0.1)
        return count_mailed(), count_discarded()


def measure_storms(old: Path, new: Path) -> list[Row]:
    rows = []
    for buffer_size in (10, 1000):
        old_mailed, old_discarded = raise_storm(old, buffer_size)
        new_mailed, new_discarded = raise_storm(new, buffer_size)
        # With the larger buffer supervisord has to hand over all of them.
        handed_over = STORM_PROGRAMS - (new_discarded if buffer_size == 10 else 0)
        rows += [Row(f'storm, buffer_size={buffer_size}: mailed of {STORM_PROGRAMS}', old_mailed, new_mailed,
                     handed_over, to_floor=at_least(1)),
                 Row('  discarded by supervisord', old_discarded, new_discarded)]
    return rows


# httpok.

def measure_restart(commands: Path, supervisord: Supervisord) -> float:
    """Return the ms from the first failing tick to the start of a new process, less the timeout of 1 s."""
    with serving() as (web, hang), \
            listening(supervisord.url, commands, 'httpok', '-t', '1', '-p', 'p:p0', web) as listener:
        listener.serve(*TICK)
        hang()
        programs = len(supervisord.program_pids())
        start = time.perf_counter()
        thread = threading.Thread(target=listener.serve, args=TICK)
        thread.start()
        wait_for(lambda: len(supervisord.program_pids()) > programs)
        seconds = time.perf_counter() - start - 1
        thread.join()
        return 1000 * seconds


def measure_restarts(old: Path, new: Path, supervisord: Supervisord) -> list[Row]:
    found = [(measure_restart(old, supervisord), measure_restart(new, supervisord)) for _ in range(3)]
    return [make_row('httpok, restart beyond the timeout: ms', found)]


def measure_all(folder: Path) -> list[Row]:
    def say(what: str) -> None:
        sys.stderr.write(f'{time.monotonic() - start:3.0f} s: {what}\n')

    start = time.monotonic()
    os.environ['TMPDIR'] = str(folder)  # a pip that is killed leaves files there
    say('installing superlance 2.0.0 and this checkout')
    old, new = install_both(folder)
    say("memmon's ticks")
    rows = measure_memmon(old, new)
    say('memory, starts, crashes and restarts')
    with supervising(old, 10) as supervisord, serving() as (web, _):
        rows += measure_memory(old, new, supervisord, web)
        rows += measure_starts(old, new, supervisord, web)
        rows += measure_crash_rates(old, new, supervisord)
        rows += measure_restarts(old, new, supervisord)
    say('storms')
    rows += measure_storms(old, new)
    say('done')
    return rows


def end(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, end)
    try:
        with tempfile.TemporaryDirectory() as folder:
            print_table(measure_all(Path(folder)))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
