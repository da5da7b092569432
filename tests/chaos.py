"""Usage: python tests/chaos.py [--minutes N] [--seed N]

Random nights: a real supervisord with the three listeners, programs that leak, hang and crash, an operator, and
faults, all drawn at random. After a quiet period everything must run again and every crash must have been reported.
Not part of the test run. Prints what it did and exits with status 1 if something is not as it should be. The same
seed draws the same actions; when they happen depends on the machine.
"""
from __future__ import annotations

import getopt
import http.server
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

from support import COMMANDS, PYTHON, Supervisord, read, wait_for

QUIET_SECONDS = 30
LISTENERS = ('memmon', 'httpok', 'crashmail')
PROGRAMS = ('leaky', 'web', 'crashing', 'steady', 'slow')

# Leaks fast for a while, then slowly.
LEAKY = '''\
import time
data = []
while True:
    data.append(bytearray(b'x') * 1024 * 1024)
    time.sleep(0.05 if len(data) < 60 else 1)
'''
# Hangs when the file `hang` exists.
WEB = '''\
import http.server, os, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while os.path.exists('hang'):
            time.sleep(1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'ok')
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(('127.0.0.1', PORT), Handler).serve_forever()
'''
CRASHING = '''\
import os, random, signal, time
time.sleep(random.uniform(1.2, 6))
print('about to crash', flush=True)
if random.random() < 0.3:
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(random.randint(1, 99))
'''
# Needs a while to stop.
SLOW = '''\
import signal, sys, time
def stop(*arguments):
    time.sleep(1.5)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
while True:
    time.sleep(1)
'''
STEADY = 'import time\nwhile True:\n    time.sleep(1)\n'

CONFIGURATION = '''\
[program:leaky]
command=PYTHON leaky.py
[program:web]
command=PYTHON web.py
stopasgroup=true
killasgroup=true
[program:crashing]
command=PYTHON crashing.py
[program:steady]
command=PYTHON steady.py
environment=ROUND="0"
[program:slow]
command=PYTHON slow.py
autorestart=true

[eventlistener:memmon]
command=BIN/memmon -p leaky=70MB -p slow=1MB --max-restarts=1000/1h -m ops@example.com -s "%(here)s/mail"
events=TICK_5
autorestart=true
stopwaitsecs=30
stderr_logfile=%(here)s/memmon.log

[eventlistener:httpok]
command=BIN/httpok -p web -t 2 -m ops@example.com -s "%(here)s/mail" http://127.0.0.1:PORT/
events=TICK_5
autorestart=true
stopwaitsecs=30
stderr_logfile=%(here)s/httpok.log
environment=SUPERLANCE_WEBHOOK="CHAT"

[eventlistener:crashmail]
command=BIN/crashmail -m ops@example.com --tail=3 -s "%(here)s/mail"
events=PROCESS_STATE_EXITED,PROCESS_STATE_FATAL
autorestart=true
stopwaitsecs=30
buffer_size=1000
stderr_logfile=%(here)s/crashmail.log
environment=SUPERLANCE_WEBHOOK="CHAT"
'''


class Webhook(http.server.ThreadingHTTPServer):
    """A webhook that can be out of order."""

    is_broken = False

    def __init__(self) -> None:
        server = self
        self.posts: list[bytes] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers['Content-Length']))
                self.send_response(503 if server.is_broken else 200)
                self.end_headers()
                if not server.is_broken:
                    server.posts.append(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Night:
    """A supervisord, and everything that can happen to it."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder = folder
        self.draw = draw
        self.webhook = Webhook()
        self.counts: Counter[str] = Counter()
        self.crashmail_was_killed = False
        self._round = 0
        self._later: list[tuple[float, Callable[[], object]]] = []
        port = str(draw.randrange(20000, 30000))
        for name, text in (('leaky', LEAKY), ('web', WEB), ('crashing', CRASHING), ('slow', SLOW), ('steady', STEADY)):
            (folder / f'{name}.py').write_text(text.replace('PORT', port), 'utf-8')
        (folder / 'mail').write_text('#!/bin/sh\ncd "$(dirname "$0")"\n[ ! -e broken ] || { echo down; exit 75; }\n'
                                     'cat > "mails/$$" && echo >> "mails/$$"\n', 'utf-8')
        (folder / 'mail').chmod(0o755)
        (folder / 'mails').mkdir()
        hook = f'http://127.0.0.1:{self.webhook.server_port}/hook'
        self.supervisord = Supervisord(folder, CONFIGURATION.replace('PORT', port).replace('CHAT', hook))

    def act(self) -> None:
        """Do one of the things that happen at night."""
        actions = (
            (self.hang_web, 3), (self.operate, 5), (self.kill_listener, 4), (self.kill_program, 4),
            (self.hide_socket, 1), (self.stop_supervisord, 1), (self.break_mail, 1), (self.break_webhook, 1),
            (self.update, 1))
        action = self.draw.choices([a for a, _ in actions], [weight for _, weight in actions])[0]
        self.counts[action.__name__] += 1
        with suppress(Exception):   # for example, supervisord refuses what the operator asks for
            action()

    def run_due(self, everything: bool = False) -> None:
        """End the faults whose time is over."""
        due = [entry for entry in self._later if everything or entry[0] <= time.monotonic()]
        self._later = [entry for entry in self._later if entry not in due]
        for _, repair in due:
            repair()

    def _repair_later(self, repair: Callable[[], object]) -> None:
        self._later.append((time.monotonic() + self.draw.uniform(1, 15), repair))

    def hang_web(self) -> None:
        hang = self.folder / 'hang'
        hang.touch()
        self._repair_later(lambda: hang.unlink() if hang.exists() else None)

    def operate(self) -> None:
        name = self.draw.choice(PROGRAMS)
        what = self.draw.choice(('stop', 'start', 'restart'))
        rpc = self.supervisord.rpc
        if what != 'start':
            rpc.stopProcess(name, self.draw.random() < 0.5)
        if what != 'stop':
            rpc.startProcess(name, self.draw.random() < 0.5)

    def kill_listener(self) -> None:
        name = self.draw.choice(LISTENERS)
        signum = self.draw.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL))
        info = self.supervisord.info(name)
        if info['statename'] == 'RUNNING':  # a signal while Python itself starts is not the listener's
            self.crashmail_was_killed |= (name, signum) == ('crashmail', signal.SIGKILL)
            os.kill(info['pid'], signum)

    def kill_program(self) -> None:
        pid = self.supervisord.info(self.draw.choice(PROGRAMS))['pid']
        if pid:
            os.kill(pid, self.draw.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)))

    def hide_socket(self) -> None:
        path, hidden = self.supervisord.socket, self.folder / 'hidden.sock'
        if path.exists():
            path.rename(hidden)
            self._repair_later(lambda: hidden.rename(path))

    def stop_supervisord(self) -> None:
        os.kill(self.supervisord.pid, signal.SIGSTOP)
        time.sleep(self.draw.uniform(1, 5))
        os.kill(self.supervisord.pid, signal.SIGCONT)

    def break_mail(self) -> None:
        broken = self.folder / 'broken'
        broken.touch()
        self._repair_later(lambda: broken.unlink() if broken.exists() else None)

    def break_webhook(self) -> None:
        self.webhook.is_broken = True
        self._repair_later(lambda: setattr(self.webhook, 'is_broken', False))

    def update(self) -> None:
        self._round += 1
        text = read(self.supervisord.configuration)
        text = re.sub('ROUND="[0-9]+"', f'ROUND="{self._round}"', text)
        self.supervisord.configuration.write_text(text, 'utf-8')
        subprocess.run([f'{COMMANDS}/supervisorctl', '-c', self.supervisord.configuration, 'update'],
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60,
                       check=False)

    # Afterwards.

    def start_all(self) -> None:
        """Let the operator start what he has stopped, and no program crash any more."""
        (self.folder / 'crashing.py').write_text(STEADY, 'utf-8')
        for name in PROGRAMS:
            with suppress(Exception):
                self.supervisord.rpc.startProcess(name)

    def find_problems(self) -> list[str]:
        problems = []
        for name in (*PROGRAMS, *LISTENERS):
            state = self.supervisord.info(name)['statename']
            # memmon goes on restarting these two.
            if state != 'RUNNING' and (name not in ('slow', 'leaky') or state not in ('STOPPING', 'STARTING')):
                problems.append(f'{name} is {state}')
        log = self.supervisord.log
        problems += [f'supervisord: {line}' for line in log.splitlines() if 'entered the UNKNOWN state' in line]
        problems += self._compare_crashes(log, read(self.folder / 'crashmail.log'))
        problems += [f'a traceback in {name}.log' for name in LISTENERS
                     if 'Traceback' in read(self.folder / f'{name}.log')]
        return problems

    def _compare_crashes(self, supervisord_log: str, crashmail_log: str) -> list[str]:
        """Return how the crashes in supervisord's log and those in crashmail's differ, by program and pid."""
        pids: dict[str, str] = {}
        crashed: Counter[tuple[str, str]] = Counter()
        for line in supervisord_log.splitlines():
            spawned = re.search(r"spawned: '(\w+)' with pid (\d+)", line)
            exited = re.search(r'exited: (\w+) \(.*; not expected\)', line)
            if spawned:
                pids[spawned[1]] = spawned[2]
            elif exited and exited[1] != 'crashmail':
                crashed[exited[1], pids[exited[1]]] += 1
        reported = Counter(re.findall(r'crashmail: (\w+) \(pid (\d+)\) exited unexpectedly', crashmail_log))
        for key in [key for key in reported if key[0] == 'crashmail']:
            del reported[key]
        self.counts['crashes'] = sum(crashed.values())
        # After a SIGKILL the event that crashmail was handling is sent again.
        extra = {} if self.crashmail_was_killed else reported - crashed
        # An exit within startsecs is not an event: supervisord retries the start.
        missing = [key for key in crashed if not reported[key] and self._was_an_event(supervisord_log, *key)]
        return ([f'{name} (pid {pid}) crashed and was not reported' for name, pid in missing]
                + [f'{name} (pid {pid}) was reported {reported[name, pid]} times' for name, pid in extra])

    @staticmethod
    def _was_an_event(log: str, name: str, pid: str) -> bool:
        """Return whether the process reached RUNNING, without which supervisord sends no EXITED event."""
        later = log.partition(f"spawned: '{name}' with pid {pid}")[2]
        return 'entered RUNNING' in later.partition(f'exited: {name} ')[0].partition(f'success: {name} ')[2]

    def end(self) -> list[str]:
        """Shut supervisord down, and return what is left behind."""
        os.kill(self.supervisord.pid, signal.SIGTERM)
        self.supervisord.wait()
        wait_for(lambda: not self._find_processes(), self._describe_left, 10)
        known = {'hang', 'broken', 'mail', 'mails', 'supervisord.conf', 'supervisord.log', 'supervisord.pid'}
        return [f'left behind: {path.name}' for path in sorted(self.folder.iterdir())
                if path.name not in known and path.suffix not in ('.py', '.log')
                and not re.search(r'\.log\.\d+$|---', path.name)]

    def _describe_left(self) -> str:
        return f'left behind: processes {self._find_processes()}'

    def _find_processes(self) -> list[str]:
        wanted = str(self.folder).encode()
        found = []
        for path in Path('/proc').glob('[0-9]*/cmdline'):
            with suppress(OSError):
                if int(path.parent.name) != os.getpid() and wanted in os.readlink(path.parent / 'cwd').encode():
                    found.append(path.parent.name)
        return found


def run(minutes: float, seed: int) -> int:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix='superlance-chaos-') as name:
        night = Night(Path(name), draw)
        try:
            end = time.monotonic() + minutes * 60
            while time.monotonic() < end:
                night.act()
                pause = time.monotonic() + draw.uniform(0.1, 3)
                while time.monotonic() < pause:
                    night.run_due()
                    time.sleep(0.1)
            night.run_due(everything=True)
            time.sleep(2)
            night.start_all()
            time.sleep(QUIET_SECONDS)
            problems = night.find_problems()
            mails = len(list((night.folder / 'mails').iterdir()))
            night.counts.update(mails=mails, webhook=len(night.webhook.posts))
            problems += night.end()
            for listener in LISTENERS:
                if problems:
                    print(f'--- {listener}.log\n{read(night.folder / (listener + ".log"))}')
            if problems:
                print(f'--- supervisord.log\n{night.supervisord.log}')
        finally:
            night.supervisord.stop()
            night.webhook.shutdown()
    print(f'seed {seed}, {minutes:g} minutes:', ', '.join(f'{what} {n}' for what, n in sorted(night.counts.items())))
    print('\n'.join(problems) or 'everything as it should be')
    return 1 if problems else 0


def main() -> int:
    minutes, seed = 10.0, random.randrange(10**6)
    try:
        options, arguments = getopt.getopt(sys.argv[1:], 'h', ['minutes=', 'seed=', 'help'])
        if arguments:
            raise getopt.error(f'unexpected argument {arguments[0]!r}')
        for name, value in options:
            if name == '--minutes':
                minutes = float(value)
            elif name == '--seed':
                seed = int(value)
            else:
                print(__doc__)
                return 0
    except (getopt.error, ValueError) as why:
        print(f'{why}; see --help', file=sys.stderr)
        return 2
    print(f'{PYTHON}, seed {seed}', flush=True)
    return run(minutes, seed)


if __name__ == '__main__':
    raise SystemExit(main())
