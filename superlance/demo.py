"""Usage: python -m superlance.demo [--keep]

Show memmon, httpok and crashmail at work, in about 20 seconds. The demo starts
its own supervisord in a temporary directory, with a program that leaks memory,
one that hangs and one that crashes, and prints what the three listeners do.
Mail is not sent, but written to a file and printed.

      --keep  Keep the directory with all its files (default: remove it).
  -h, --help  Print this text.

The exit status is 0 if each listener has done its job.
"""
from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Sequence

from superlance.options import Given, Option, UsageError, format_size, run_script

OPTIONS = (Option('', 'keep'), Option('h', 'help'))
DEADLINE_SECONDS = 45
STOP_SECONDS = 9

PROGRAMS = {
    'leaky': '''\
import time
leak = []
for _ in range(300):
    leak.append(bytearray(b'x') * 1024 * 1024)
    time.sleep(0.2)
''',
    'hanging': '''\
import socket, time
server = socket.create_server(('127.0.0.1', PORT))
client, _ = server.accept()
client.recv(65536)
client.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nall is well\\n')
client.close()
time.sleep(300)
''',
    'crashing': '''\
import os, time
if not os.path.exists('crashed-under-%d' % os.getppid()):
    open('crashed-under-%d' % os.getppid(), 'w').close()
    time.sleep(3)
    print(1 / 0)
time.sleep(300)
'''}

LISTENERS = '''\
[eventlistener:memmon]
command=memmon -p leaky=55MB -m you@example.com
events=TICK_5
stopwaitsecs=30

[eventlistener:httpok]
command=httpok -p hanging -t 2 -m you@example.com http://127.0.0.1:PORT/
events=TICK_5
stopwaitsecs=30

[eventlistener:crashmail]
command=crashmail --tail=5 -m you@example.com
events=PROCESS_STATE_EXITED,PROCESS_STATE_FATAL
buffer_size=1000
'''

# Relative names need no escapes. In the default childlogdir, TMPDIR, supervisord removes logs of other instances.
CONFIGURATION = '''\
[supervisord]
childlogdir=.
[unix_http_server]
file=supervisor.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://supervisor.sock
'''

HEADER = '''\
A real supervisord runs three faulty programs, and superlance's three event listeners take
care of them. This takes about 20 seconds; Ctrl-C stops it.

  leaky     leaks 5 MB of memory per second         memmon restarts it
  hanging   answers one HTTP request, then hangs    httpok restarts it
  crashing  crashes after 3 seconds                 crashmail reports it

The listeners' sections are like those in the README, with TICK_5 instead of TICK_60:

{}
The demo adds stderr_logfile=, and -s 'cat >> mail.log', which writes mail to a file.
All files are in {}
'''

# What each listener has to do, and the output that proves it.
TASKS = {
    'memmon': {'restarted leaky': "(spawned: 'leaky'(?s:.*)){2}", 'sent mail': 'Subject: memmon: process leaky'},
    'httpok': {'restarted hanging': "(spawned: 'hanging'(?s:.*)){2}",
               'sent mail': r'Subject: httpok: \S+ bad status', 'saw it recover': r'Subject: httpok: \S+ recovered'},
    'crashmail': {'reported that crashing crashed': 'Subject: crashing crashed'}}
TIMESTAMP = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \w+:? ')
SHOWN_LINES = {'supervisord': 'spawned|exited|stopped|killing|gave up|spawnerr',
               'mail': '(?!Date|Message-ID|Auto-Submitted|Content-|MIME-)'}


def write_files(folder: Path) -> str:
    """Write the programs and supervisord.conf; return the listeners' sections as a user would write them."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = str(sock.getsockname()[1])
    python = shlex.quote(sys.executable).replace('%', '%%')
    sections = [CONFIGURATION]
    for name, text in PROGRAMS.items():
        folder.joinpath(f'{name}.py').write_text(text.replace('PORT', port), 'utf-8')
        sections.append(f'[program:{name}]\ncommand={python} {name}.py\nstdout_logfile={name}.log\nstopwaitsecs=5\n')
    listeners = LISTENERS.replace('PORT', port)
    sections.append(re.sub(r'command=(\w+) (.*)', lambda match: (
        f"command={python} -m superlance.{match[1]} -s 'cat >> mail.log' {match[2]}\n"
        f'stderr_logfile={match[1]}.log'), listeners))
    folder.joinpath('supervisord.conf').write_text('\n'.join(sections), 'utf-8', 'surrogateescape')
    return listeners


class Transcript:
    """Prints what is added to the logs and to the file of mails, and keeps it."""

    def __init__(self, folder: Path) -> None:
        self.started = time.monotonic()
        self.text = self.memory = ''
        self.signals: list[int] = []
        self._has_colour = sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'
        # The number of lines printed so far; in this order, causes are printed before their effects.
        self._known = {folder / f'{who}.log': 0 for who in (*PROGRAMS, 'supervisord', *TASKS, 'mail')}

    def print(self, line: str, is_bold: bool = False) -> None:
        print(f'\033[1m{line}\033[0m' if is_bold and self._has_colour else line, flush=True)

    def print_news(self) -> None:
        for path, known in self._known.items():
            lines = path.read_text('utf-8', 'replace').split('\n')[known:-1] if path.exists() else []
            self._known[path] += len(lines)
            for line in lines:
                what = TIMESTAMP.sub('', line.rstrip(), count=1)
                if re.match(SHOWN_LINES.get(path.stem, ''), what):
                    self.text += what + '\n'
                    self.print(f'{time.monotonic() - self.started:3.0f}s  {path.stem:<11}  {what}', path.stem in TASKS)
        for before in re.findall(r'restarted leaky \(pid \d+: ([\d.]+\w+)', '' if self.memory else self.text):
            with suppress(OSError, ValueError):     # no ps, or the new process has exited
                ps = subprocess.run(['ps', '-o', 'rss=', '-p', self.find_pids('leaky')[-1]], stdout=subprocess.PIPE)
                self.memory = f'{before} -> {format_size(1024 * int(ps.stdout))}'

    def find_missing(self, who: str) -> list[str]:
        return [task for task, proof in TASKS[who].items() if not re.search(proof, self.text)]

    def find_pids(self, name: str) -> list[str]:
        return re.findall(f"spawned: '{name}' with pid (\\d+)", self.text)

    def print_summary(self) -> None:
        for who, name, numbers in zip(TASKS, PROGRAMS, (self.memory or 'no ps', 'hung for 2s', 'exit status 1')):
            missing = self.find_missing(who)
            pids = ' -> '.join(self.find_pids(name)[:2])
            verdict = (f"NOT done: never {', never '.join(missing)}" if missing else
                       f"done: {', '.join(TASKS[who])} (pid {pids}; {numbers})")
            self.print(f'{who:<9}  {verdict}', is_bold=True)


def watch(supervisord: subprocess.Popen[bytes], transcript: Transcript) -> str:
    """Print what happens until everything is done or cannot be done; return what went wrong, or ''."""
    while True:
        status = supervisord.poll()
        transcript.print_news()
        if not any(map(transcript.find_missing, TASKS)):
            return ''
        if transcript.signals:
            return f'stopped by {signal.Signals(transcript.signals[0]).name}'
        if status is not None:
            return f'supervisord has exited (status {status})'
        if 'gave up: ' in transcript.text:
            return 'supervisord gave up starting a process'
        if time.monotonic() > transcript.started + DEADLINE_SECONDS:
            return f'not everything was done within {DEADLINE_SECONDS}s'
        time.sleep(0.2)


def stop(supervisord: subprocess.Popen[bytes], folder: Path) -> None:
    """Stop supervisord and the processes that it has started."""
    supervisord.terminate()
    with suppress(subprocess.TimeoutExpired):
        supervisord.wait(STOP_SECONDS)
    supervisord.kill()
    supervisord.wait()
    log = folder / 'supervisord.log'
    for pid in map(int, re.findall(rb"spawned: '.*' with pid (\d+)", log.read_bytes() if log.exists() else b'')):
        with suppress(OSError):     # it has exited
            if os.getsid(pid) == supervisord.pid:   # else the pid has been reused
                os.kill(pid, signal.SIGKILL)


def run(command_line: tuple[Given, list[str]]) -> int:
    """Run the demo from start to end; return the exit status. Raises UsageError."""
    given, arguments = command_line
    if arguments:
        raise UsageError(f'unexpected argument {arguments[0]!r}; the only option is --keep')
    # The path of a unix socket has at most 103 bytes on BSDs, and supervisord first appends its pid.
    folder = Path(tempfile.mkdtemp('', 'superlance-demo-', '/tmp' if len(tempfile.gettempdir()) > 50 else None))
    transcript = Transcript(folder)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: transcript.signals.append(number))
    try:
        sections = write_files(folder)
        print(HEADER.format(re.sub('(?m)^(?=.)', '  ', sections), folder), flush=True)
        # In its own session: Ctrl-C reaches only the demo, which then stops supervisord.
        supervisord = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-m', 'supervisor.supervisord', '-n', '-s', '-c', 'supervisord.conf'],
            cwd=folder, env={**os.environ, 'PYTHONPATH': os.pathsep.join(map(os.path.abspath, sys.path))},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            trouble = watch(supervisord, transcript)
            print(f"\n{trouble or 'All three have done their jobs'}; supervisord is shutting down ...\n", flush=True)
            if not transcript.signals:
                transcript.print_summary()
        finally:
            stop(supervisord, folder)
    finally:
        if 'keep' not in given:
            shutil.rmtree(folder, ignore_errors=True)
    print(f'\nAll processes have exited, after {time.monotonic() - transcript.started:.0f}s.')
    if 'keep' in given:
        python = shlex.quote(sys.executable)
        print(f'To run it again: cd {shlex.quote(str(folder))} && {python} -m supervisor.supervisord -n')
    return 128 + transcript.signals[0] if transcript.signals else 1 if trouble else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('superlance.demo', __doc__, OPTIONS, lambda *command_line: command_line, run, argv)


if __name__ == '__main__':
    raise SystemExit(main())
