"""Usage: python -m superlance.demo

Shows memmon, httpok and crashmail at work, in about 15 seconds: starts a real
supervisord in a temporary folder, with a program that leaks memory, one that
hangs and one that crashes, and tells what the three listeners do about them.

Mail goes to a file and is shown; nothing listens beyond this machine. In the
end every process has ended and the folder is gone. Exit status: 0 if each
listener has done its job, 1 if not, 128 + N where signal N ended the demo.
"""
from __future__ import annotations

import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from email import message_from_bytes, policy
from pathlib import Path
from typing import Mapping, Sequence

from superlance.listener import timestamp
from superlance.processes import FATAL, CantTell, Refused, Supervisor

# Together less than a minute.
DEADLINE_SECONDS = 45
CALL_SECONDS = 3
STOP_SECONDS = 9

POLL_SECONDS = 0.2

# The cast.

PROGRAMS = {
    'leaky': '''\
import time

leak = []
while len(leak) < 300:
    leak.append(bytearray(b'x') * 1024 * 1024)
    if len(leak) % 15 == 0:
        print('I have leaked %d MB so far' % len(leak), flush=True)
    time.sleep(0.2)
''',
    'hanging': '''\
import socket
import time

server = socket.create_server(('127.0.0.1', PORT))
client, _ = server.accept()
print('a request: I answer it', flush=True)
time.sleep(0.1)
client.recv(65536)
client.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nall is well\\n')
client.close()
client, _ = server.accept()
print('another request: I hang, and answer nothing any more', flush=True)
time.sleep(300)
''',
    'crashing': '''\
import os
import time

if not os.path.exists('has-crashed'):
    open('has-crashed', 'w').close()
    print('I am going to crash', flush=True)
    time.sleep(3)
    print(1 / 0)
print('I run again, and well this time', flush=True)
time.sleep(300)
'''}

LISTENERS = '''\
[eventlistener:memmon]
command=memmon -p leaky=55MB -m you@example.com
events=TICK_5

[eventlistener:httpok]
command=httpok -v -t 2 -p hanging -m you@example.com http://127.0.0.1:PORT/
events=TICK_5

[eventlistener:crashmail]
command=crashmail -p crashing --tail=5 -m you@example.com
events=PROCESS_STATE_EXITED
'''

# File names are relative to the folder, so that its own name, however odd, needs no escape.
# childlogdir is TMPDIR by default, out of which supervisord would clear logs of others at its start.
CONFIGURATION = '''\
[supervisord]
identifier=superlance-demo
childlogdir=.

[unix_http_server]
file=supervisor.sock

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
'''

HEADER = '''\
Three programs with a fault each run under a real supervisord, and superlance's three event
listeners take care of them. This takes about 15 seconds; Ctrl-C ends it sooner.

  leaky     leaks 5 MB of memory a second     memmon restarts it, and mails
  hanging   answers one HTTP request, then    httpok restarts it, and mails
            hangs, though it is RUNNING
  crashing  crashes after 3 seconds           supervisord restarts it, crashmail mails

The listeners are in supervisord.conf as they might be in yours:

%s
(Only here, "python -m superlance.memmon" stands for "memmon", and so on; -s 'cat >> mails'
puts mail into a file, where sendmail would send it; and stderr_logfile names the logs that
you are about to read. TICK_5 is an event every 5 seconds; TICK_60 is usual.)

Until the end, all files are in %s
'''


# Set the stage.

def make_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder; in /tmp where TMPDIR is nothing for a unix socket or XML-RPC."""
    folder = tempfile.TemporaryDirectory(prefix='superlance-demo-')
    # supervisord binds its socket with .PID at the end first; BSDs take 103 bytes, Linux 107. Its answers
    # name the log files, and XML has no control characters and no undecodable bytes.
    if len(os.fsencode(folder.name + '/supervisor.sock.1234567')) > 103 or not folder.name.isprintable():
        folder.cleanup()
        folder = tempfile.TemporaryDirectory(prefix='superlance-demo-', dir='/tmp')
    return folder


def write_files(folder: Path) -> str:
    """Write the programs and supervisord.conf; return its sections of the listeners as a user would have them."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = str(sock.getsockname()[1])
    python = shlex.quote(sys.executable).replace('%', '%%')
    sections = [CONFIGURATION]
    for name, text in PROGRAMS.items():
        folder.joinpath(name + '.py').write_text(text.replace('PORT', port), 'utf-8')
        sections.append(f'[program:{name}]\ncommand={python} {name}.py\nstdout_logfile={name}.log\n')
    listeners = LISTENERS.replace('PORT', port)
    sections.append(re.sub(
        r'command=(\w+) (.*)', lambda match: f"command={python} -m superlance.{match.group(1)} -s 'cat >> mails' {match.group(2)}\nstderr_logfile={match.group(1)}.log", listeners))
    folder.joinpath('supervisord.conf').write_text('\n'.join(sections), 'utf-8', 'surrogateescape')
    return listeners


def start_supervisord(folder: Path) -> subprocess.Popen[bytes]:
    """Start supervisord, in a session of its own: Ctrl-C is for the demo alone, which then ends it."""
    with open(folder / 'supervisord.out', 'wb') as output:
        return subprocess.Popen(
            [sys.executable, '-m', 'supervisor.supervisord', '-n', '-c', str(folder / 'supervisord.conf')],
            cwd=folder, env=dict(os.environ, PYTHONPATH=os.pathsep.join(map(os.path.abspath, sys.path))),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


# Tell what happens.

# The rest of supervisord's log is about supervisord itself.
SUPERVISORD_TELLS = ('spawned:', 'exited:', 'stopped:', 'killing', 'gave up:', 'spawnerr:')
LOG_LINE = re.compile(r'(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \w+:? (.*)')
WHOLE_MAIL = re.compile(rb'^To: .*?^-- \n[^\n]+\n', re.DOTALL | re.MULTILINE)


class Narrator:
    """Prints what is added to the logs and to the file of mails, and keeps it."""

    def __init__(self, folder: Path, started: float) -> None:
        self._folder = folder
        self._started = started
        self.logs: dict[str, list[str]] = {
            who: [] for who in (*PROGRAMS, 'supervisord', 'memmon', 'httpok', 'crashmail')}
        self.mails: list[str] = []

    def say(self, who: str, what: str) -> None:
        print('%3d s  %-11s  %s' % (time.monotonic() - self._started, who, what), flush=True)

    def tell_news(self) -> None:
        """Print what is new, the lines of several logs in the order of their time stamps."""
        news = []
        for who, known in self.logs.items():
            data, written = self._read(who + '.log')
            for line in data.decode('utf-8', 'replace').split('\n')[len(known):-1]:
                match = LOG_LINE.match(line)
                when, what = match.groups() if match else (timestamp(written), line)
                known.append(what)
                if who != 'supervisord' or what.startswith(SUPERVISORD_TELLS):
                    news.append((when, who, what))
        for _, who, what in sorted(news, key=lambda line: line[0]):
            self.say(who, what)
        for data in WHOLE_MAIL.findall(self._read('mails')[0])[len(self.mails):]:
            message = message_from_bytes(data, policy=policy.default)
            mail = 'To: {}\nSubject: {}\n\n{}'.format(message['To'], message['Subject'], message.get_content().rstrip())
            self.mails.append(mail)
            self.say('a mail', '(some of its headers are left out here)')
            print(re.sub('(?m)^', '           | ', mail), flush=True)

    def _read(self, name: str) -> tuple[bytes, float]:
        """Return what is in a file, and when it was written last."""
        path = self._folder / name
        return (path.read_bytes(), path.stat().st_mtime) if path.exists() else (b'', 0.0)


def judge(first: Mapping[str, int], current: Mapping[str, int], narrator: Narrator) -> dict[str, dict[str, bool]]:
    """Return, for each listener, what it had to bring about and whether that is so.

    first and current are supervisord's pids by program, as they were at first and are now.
    """
    def is_new(name: str) -> bool:
        return current.get(name, 0) not in (0, first.get(name))

    def is_mailed(subject: str, text: str) -> bool:
        return any('\nSubject: ' + subject in mail and text in mail for mail in narrator.mails)

    since_restart = '\n'.join(narrator.logs['httpok']).partition('restarted hanging')[2]
    return {
        'memmon': {'restarted leaky': is_new('leaky'),
                   'mailed about it': is_mailed('memmon: process leaky restarted', 'over its limit')},
        'httpok': {'restarted hanging': is_new('hanging'),
                   'mailed about it': is_mailed('httpok: http://', 'restarted hanging'),
                   'saw it answer again': ': status 200 ' in since_restart},
        'crashmail': {'mailed about crashing': is_mailed('crashing crashed', '(pid %d)' % first.get('crashing', 0))},
    }


# From the start to the end.

_signals: list[int] = []


def _note_signal(signum: int, frame: object) -> None:
    _signals.append(signum)


def watch(supervisord: subprocess.Popen[bytes], folder: Path, narrator: Narrator, deadline: float) -> tuple[
        dict[str, dict[str, bool]], str]:
    """Tell what happens until all is done or can't be; return what was done, and what went wrong or ''."""
    supervisor = Supervisor({'SUPERVISOR_SERVER_URL': 'unix://%s' % (folder / 'supervisor.sock')}, CALL_SECONDS)
    first: dict[str, int] = {}
    current: dict[str, int] = {}
    fatal: list[str] = []
    while True:
        status = supervisord.poll()
        try:
            processes = supervisor.get_processes()
            current = {process.program: process.pid for process in processes}
            for name, pid in current.items():
                if pid:
                    first.setdefault(name, pid)
            fatal = [process.program for process in processes if process.state == FATAL]
        except (CantTell, Refused):
            pass  # supervisord is not up yet, or no more
        narrator.tell_news()
        done = judge(first, current, narrator)
        if all(all(facts.values()) for facts in done.values()):
            return done, ''
        if _signals:
            return done, f'ended by {signal.Signals(_signals[0]).name}'
        if status is not None:
            said = (folder / 'supervisord.out').read_text('utf-8', 'replace').rstrip()
            return done, 'supervisord has ended (status %d). It said:\n\n%s' % (status, said)
        if fatal:
            return done, 'supervisord is unable to start {}'.format(', '.join(fatal))
        if time.monotonic() > deadline:
            return done, 'that was not all, but %d s are over' % DEADLINE_SECONDS
        time.sleep(POLL_SECONDS)


def find_session(leader_pid: int) -> list[int]:
    """Return the pids of the processes in a session; supervisord's programs stay in supervisord's."""
    if os.path.exists('/proc/self/stat'):
        pids = [int(name) for name in os.listdir('/proc') if name.isdecimal()]
    else:  # pragma: no cover  Linux has /proc
        pids = list(map(int, subprocess.check_output(['ps', '-A', '-o', 'pid=']).split()))
    found = []
    for pid in pids:
        try:
            if os.getsid(pid) == leader_pid:
                found.append(pid)
        except OSError:  # pragma: no cover  a race
            pass  # it has ended since
    return found


def end_supervisord(supervisord: subprocess.Popen[bytes]) -> list[int]:
    """End supervisord and all that it started; return the pids of what could not be ended."""
    supervisord.terminate()
    try:
        supervisord.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # it is killed below
    deadline = time.monotonic() + 1
    while True:
        left = find_session(supervisord.pid)
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # pragma: no cover  a race
                pass  # it has ended since
        time.sleep(0.05)
        supervisord.poll()


def run() -> int:
    """Run the demo from start to end; return the exit status. Raises OSError."""
    started = time.monotonic()
    with make_folder() as name:
        folder = Path(name)
        listeners = write_files(folder)
        print(HEADER % (re.sub('(?m)^(?=.)', '  ', listeners), folder), flush=True)
        narrator = Narrator(folder, started)
        supervisord = start_supervisord(folder)
        try:
            done, trouble = watch(supervisord, folder, narrator, started + DEADLINE_SECONDS)
            narrator.say('the demo', trouble or 'all three have done their jobs')
        finally:
            left = end_supervisord(supervisord)
    ended = f'unable to end processes {left}' if left else 'all its processes have ended'
    ended = 'After %d s: %s, and its folder is removed.' % (time.monotonic() - started, ended)
    if _signals and trouble:
        print(ended)
        return 128 + _signals[0]
    print()
    for who, facts in done.items():
        missing = ['never ' + fact for fact in facts if not facts[fact]]
        print('%-9s  %s: %s' % (who, 'NOT done' if missing else 'done', ', '.join(missing or facts)))
    print('\n' + ended)
    return 1 if trouble or left else 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        asked = arguments[0] in ('-h', '--help')
        print((__doc__ or '').strip() if asked else 'the demo takes no arguments: python -m superlance.demo',
              file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # pragma: no branch  only a test's own stdout is none
        sys.stdout.reconfigure(errors='backslashreplace')
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _note_signal)
    try:
        return run()
    except OSError as why:
        # What stdout could not take, it must not try to write once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(why, BrokenPipeError):
            print(f'the demo ended early: {why}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    raise SystemExit(main())
