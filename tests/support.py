"""The test rig: a real supervisord, a listener that the test itself drives, servers and proxies.

Everything listens on loopback or on a socket in a temporary folder, and every process ends with the test that
started it: it carries a mark in its environment, as do the processes that it starts.
"""
from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from stat import S_ISSOCK
from typing import Any, Callable, Iterator, NamedTuple, Sequence
from unittest import mock

import supervisord_process
from supervisor import childutils

from superlance.listener import SIGNALS, exit_request

TIMEOUT = 60.0      # long, as it only matters when a test fails
PYTHON = sys.executable
COMMANDS = str(Path(PYTHON).parent)     # the folder of the console scripts
NO_SUPERVISORD = 'unix:///nonexistent/supervisor.sock'
# The environment of a locale that knows ASCII only.
C_LOCALE = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': ''}
# Rules of a Proxy for getProcessInfo: the look before a stop passes, those after it are lost.
ALL_LOST = ['pass'] + ['lose call'] * 3


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str] = '', timeout: float = TIMEOUT) -> Any:
    """Return the first true value of condition; fail with the text of `what` if there is none within timeout."""
    deadline = time.monotonic() + timeout
    pause_seconds = 0.01
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f'not in time: {(what() if callable(what) else what) or condition}'
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, 0.1)


def read(path: Path) -> str:
    return path.read_text('utf-8', 'replace') if path.exists() else ''


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text('utf-8', 'replace').rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def find_children(pid: int) -> list[int]:
    """Return the pids of a process' children, zombies too."""
    children = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = stat.read_text('utf-8', 'replace').rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            children.append(int(stat.parent.name))
    return children


def find_free_port() -> int:
    """Return a port on loopback that is free at the moment."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port: int = server.getsockname()[1]
        return port


READY, RESULT = b'READY\n', b'RESULT 2\nOK'


def make_event(name: str, payload: str, header: str = 'ver:3.0 server:sup serial:1 pool:x poolserial:1') -> bytes:
    """Return an event as supervisord writes it: len counts characters."""
    return f'{header} eventname:{name} len:{len(payload)}\n{payload}'.encode('utf-8', 'surrogateescape')


def make_crash(program: str = 'web', group: str = '', expected: int = 0) -> tuple[str, str]:
    """Return the name and payload of the event for an exit."""
    return ('PROCESS_STATE_EXITED', f'processname:{program} groupname:{group or program} from_state:RUNNING '
                                    f'expected:{expected} pid:123')


def acknowledge(number: int) -> bytes:
    """Return a listener's stdout after this number of events and the end of its input."""
    return (READY + RESULT) * number + READY


class Run(NamedTuple):
    """The result of a listener that has exited."""

    status: int
    output: bytes
    log: str


def run_in_process(run: Callable[[], int], data: bytes = b'', environment: dict[str, str] | None = None,
                   stdout: int | None = None) -> Run:
    """Call run, a script's main or listen, with this data as stdin; return what it writes to stdout and stderr.

    stdout: a file descriptor to use instead of a file. SUPERVISOR_SERVER_URL='' unsets that variable. What a
    listener changes in its process is changed back.
    """
    open_before = set(os.listdir('/dev/fd'))
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    saved = [os.dup(fd) for fd in (0, 1, 2)]
    exit_request.__init__()  # type: ignore[misc]
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        source.write(data)
        source.seek(0)
        try:
            for fd, file in enumerate((source.fileno(), output.fileno() if stdout is None else stdout, log.fileno())):
                os.dup2(file, fd)
            with open(1, 'w', encoding='utf-8', closefd=False) as out, \
                    open(2, 'w', encoding='utf-8', closefd=False) as err, redirect_stdout(out), redirect_stderr(err), \
                    mock.patch.dict(os.environ, {'SUPERVISOR_SERVER_URL': NO_SUPERVISORD,
                                                 'SUPERVISOR_GROUP_NAME': 'listener', **(environment or {})}):
                if not os.environ['SUPERVISOR_SERVER_URL']:
                    del os.environ['SUPERVISOR_SERVER_URL']
                status = run()
        finally:
            signal.set_wakeup_fd(-1)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            for fd, copy in enumerate(saved):
                os.dup2(copy, fd)
            exit_request.__init__()  # type: ignore[misc]
            files = {str(file.fileno()) for file in (source, output, log)}
            for name in set(os.listdir('/dev/fd')) - open_before - files:
                with suppress(OSError):     # that of listdir itself
                    if not S_ISSOCK(os.fstat(int(name)).st_mode):  # a server of the test may be using it
                        os.close(int(name))
        output.seek(0)
        log.seek(0)
        return Run(status, output.read(), log.read().decode('utf-8', 'replace'))


_MARK = 'SUPERLANCE_TEST'
_marks = itertools.count()


def make_mark() -> dict[str, str]:
    """Return an environment variable by which a process and its descendants are found again."""
    return {_MARK: f'{os.getpid()}-{next(_marks)}'}


def kill_marked(mark: dict[str, str]) -> None:
    """Kill every process that has the mark, until there is none, not even one started meanwhile."""
    wanted = f'\0{_MARK}={mark[_MARK]}\0'.encode()

    def kill() -> bool:
        found = False
        for path in Path('/proc').glob('[0-9]*/environ'):
            try:
                if wanted in b'\0' + path.read_bytes():    # a zombie's is empty
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True
            except OSError:
                continue    # gone, or another user's
        return not found

    wait_for(kill, 'the end of the processes that the test started')


class Listener:
    """A command as a process; the test plays supervisord's side of the protocol."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str] | None = None,
                 folder: Path | None = None, **popen: Any) -> None:
        self._mark = make_mark()
        env = {**os.environ, 'SUPERVISOR_SERVER_URL': NO_SUPERVISORD, 'SUPERVISOR_GROUP_NAME': 'listener',
               'SUPERVISOR_PROCESS_NAME': 'listener', **(environment or {}), **self._mark}
        # A file, not a pipe: every line that was written before an acknowledgement is in it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        options: dict[str, Any] = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': self._log,
                                   'bufsize': 0, 'env': env, 'cwd': folder, **popen}
        self.process = subprocess.Popen([PYTHON, '-m', f'superlance.{arguments[0]}', *arguments[1:]], **options)
        self.pid = self.process.pid
        self._serial = 0

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        kill_marked(self._mark)
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()

    @property
    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 24, 0).decode('utf-8', 'replace')

    def wait_for_log(self, text: str, timeout: float = TIMEOUT) -> str:
        wait_for(lambda: text in self.log, f'log {text!r}', timeout)
        return self.log

    def expect(self, expected: bytes) -> None:
        """Read exactly these bytes from the listener's stdout."""
        assert self.process.stdout
        got = b''
        while len(got) < len(expected):
            chunk = self.process.stdout.read(len(expected) - len(got))
            assert chunk, f'end of output after {got!r}; log: {self.log}'
            got += chunk
        assert got == expected, self.log

    def write(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)

    def send_event(self, name: str, payload: str) -> None:
        """Write an event as supervisord does: len counts characters."""
        self._serial += 1
        header = (f'ver:3.0 server:supervisor serial:{self._serial} pool:listener poolserial:{self._serial} '
                  f'eventname:{name} len:{len(payload)}\n')
        self.write((header + payload).encode('utf-8'))

    def serve_event(self, name: str, payload: str) -> None:
        """Wait for READY, send an event, and wait for its acknowledgement."""
        self.expect(b'READY\n')
        self.send_event(name, payload)
        self.expect(b'RESULT 2\nOK')

    def tick(self) -> None:
        """Serve a tick that is later than any restart before it, although `when` is in whole seconds."""
        self.serve_event('TICK_5', f'when:{int(time.time() + 1)}')

    def tick_until_log(self, text: str) -> None:
        """Serve ticks until the log has this text."""
        def tick() -> bool:
            self.tick()
            return text in self.log
        wait_for(tick, lambda: f'log {text!r} in {self.log}')

    def crash(self, program: str = 'web', group: str | None = None, pid: int = 123, expected: int = 0) -> None:
        self.serve_event('PROCESS_STATE_EXITED', f'processname:{program} groupname:{group or program} '
                                                 f'from_state:RUNNING expected:{expected} pid:{pid}')

    def close(self) -> int:
        """Close the input and return the exit status."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(TIMEOUT)

    def terminate(self, signum: int = signal.SIGTERM, timeout: float = TIMEOUT) -> int:
        self.process.send_signal(signum)
        return self.process.wait(timeout)


class Supervisord:
    """A real supervisord in a folder, with the programs and listeners of a configuration.

    server: further lines of the section of the HTTP server. own_server=False: the text has that section
    itself, or there is none; interface=False: there is no RPC interface. In the text, %(here)s is the folder,
    PYTHON and BIN/ are the tested Python and the folder of its scripts.
    """

    def __init__(self, folder: Path, sections: str, server: str = '', interface: bool = True, own_server: bool = True,
                 environment: dict[str, str] | None = None) -> None:
        self._mark = make_mark()
        self.folder = folder
        self.socket = folder / ('s.sock' if own_server else 'supervisor.sock')
        self.url = f'unix://{self.socket}'
        self.log_path = folder / 'supervisord.log'
        self.configuration = folder / 'supervisord.conf'
        parts = ['[supervisord]\nlogfile=%(here)s/supervisord.log\npidfile=%(here)s/supervisord.pid\n'
                 'childlogdir=%(here)s\nidentifier=testing\nminfds=256\nloglevel=debug\n']
        if own_server:
            parts += ['[unix_http_server]\nfile=%(here)s/s.sock\n' + server,
                      '[supervisorctl]\nserverurl=unix://%(here)s/s.sock\n']
        if interface and own_server:
            parts.append('[rpcinterface:supervisor]\n'
                         'supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n')
        parts.append(sections.replace('PYTHON', PYTHON).replace('BIN/', COMMANDS + '/'))
        self.configuration.write_text('\n'.join(parts), 'utf-8')
        self._process = supervisord_process.start(self.configuration,
                                                  {**os.environ, **(environment or {}), **self._mark})
        assert self._process.pid
        self.pid = self._process.pid
        try:
            if interface and own_server and not server:
                wait_for(self._answers, lambda: self.log)
            elif own_server:
                wait_for(self._accepts, lambda: self.log)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Supervisord:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill supervisord and all its processes: an orderly shutdown takes a second or two."""
        self._process.kill()
        self.wait()
        kill_marked(self._mark)

    def wait(self) -> int:
        """Wait until supervisord has exited and return its exit status."""
        self._process.join(TIMEOUT)
        assert self._process.exitcode is not None, self.log
        return self._process.exitcode

    def _accepts(self) -> bool:
        """Return whether supervisord accepts connections: a while after the socket's file appears."""
        assert self._process.is_alive(), read(self.log_path)
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.socket)) == 0

    def _answers(self) -> bool:
        assert self._process.is_alive(), read(self.log_path)
        try:
            return bool(self.rpc.getState())
        except OSError:
            return False

    @property
    def rpc(self) -> Any:
        return childutils.getRPCInterface({'SUPERVISOR_SERVER_URL': self.url}).supervisor

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a Listener that uses this supervisord."""
        return {'SUPERVISOR_SERVER_URL': self.url}

    @property
    def log(self) -> str:
        return read(self.log_path)

    def info(self, name: str) -> dict[str, Any]:
        info: dict[str, Any] = self.rpc.getProcessInfo(name)
        return info

    def wait_for_state(self, name: str, state: str = 'RUNNING', timeout: float = TIMEOUT) -> dict[str, Any]:
        """Wait until a process is in a state and return its info."""
        def look() -> dict[str, Any] | None:
            info = self.info(name)
            return info if info['statename'] == state else None
        found: dict[str, Any] = wait_for(look, f'{name} {state}', timeout)
        return found

    def wait_for_restart(self, name: str, pid: int, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Wait until a process is RUNNING with another pid and return its info."""
        def look() -> dict[str, Any] | None:
            info = self.info(name)
            return info if info['statename'] == 'RUNNING' and info['pid'] != pid else None
        found: dict[str, Any] = wait_for(look, f'restart of {name}', timeout)
        return found


def find_examples(page: Path) -> list[str]:
    """Return the examples of supervisor's configuration in a reStructuredText file, without their indentation."""
    blocks = re.findall(r'(?:::|code-block:: ini)\n\n((?:    .*\n|\n)+)', page.read_text('utf-8'))
    return [textwrap.dedent(block) for block in blocks if re.match(r' +\[\w+(:\w+)?\]\n', block)]


def read_until(client: socket.socket, end: bytes) -> bytes:
    """Return what a client sends, up to and including end. Raises ConnectionError if it closes before that."""
    request = b''
    while end not in request:
        received = client.recv(65536)
        if not received:
            raise ConnectionError(f'{request!r} and no more')
        request += received
    return request


class Proxy:
    """A unix socket in front of supervisord's that can lose a call or its answer.

    rules maps a method name to what happens to its next calls, one word each: 'pass', 'lose call' (it
    never reaches supervisord), 'lose answer' (it does, but the answer is cut off). Further calls pass.
    """

    def __init__(self, path: Path, target: Path, rules: dict[str, list[str]]) -> None:
        self.url = f'unix://{path}'
        self.rules = rules
        self.calls: list[str] = []
        self._target = str(target)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(50)
        accept_all(self._server, self._serve)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.settimeout(TIMEOUT)
            request = read_until(client, b'</methodCall>')
            method = request.partition(b'<methodName>supervisor.')[2].partition(b'<')[0].decode()
            self.calls.append(method)
            rule = self.rules[method].pop(0) if self.rules.get(method) else 'pass'
            if rule == 'lose call':
                return
            upstream.connect(self._target)
            upstream.sendall(request)
            while True:
                answer = upstream.recv(65536)
                if not answer or rule == 'lose answer':
                    return
                client.sendall(answer)
                if b'</methodResponse>' in answer:
                    return


def write_script(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.write_text('#!/bin/sh\n' + text, 'utf-8')
    path.chmod(0o755)
    return path


def make_patient(folder: Path) -> dict[str, str]:
    """Return an environment in which listeners wait longer for supervisord, where a busy machine is not the subject.

    Every Python that has it runs a sitecustomize.py in this folder at its start.
    """
    (folder / 'sitecustomize.py').write_text(
        'import superlance.crashlog, superlance.startcheck\n'
        'superlance.crashlog.CALLS_SECONDS = superlance.crashlog.LATE_SECONDS = 50\n'
        'superlance.startcheck.CHECK_SECONDS = 50\n', 'utf-8')
    return {'PYTHONPATH': os.pathsep.join(filter(None, (str(folder), os.environ.get('PYTHONPATH'))))}


def run_command_line(script: str, *arguments: str, folder: Path | None = None,
                     **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end as from a shell, without the variables that supervisord sets."""
    env = {name: value for name, value in os.environ.items() if not name.startswith('SUPERVISOR_')}
    return subprocess.run([PYTHON, '-m', f'superlance.{script}', *arguments], cwd=folder, env={**env, **environment},
                          stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8', timeout=2 * TIMEOUT)


def accept_all(server: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Serve each connection to a listening socket with handle, on its own thread, until the socket is shut down."""
    def serve(client: socket.socket) -> None:
        with client, suppress(OSError):     # the client has closed
            handle(client)

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


@contextmanager
def serving(handle: Callable[[socket.socket], None], family: int = socket.AF_INET,
            address: Any = ('127.0.0.1', 0)) -> Iterator[Any]:
    """Serve each connection with handle; yield the port, or the path of a unix socket."""
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(50)
        accept_all(server, handle)
        try:
            yield address if family == socket.AF_UNIX else server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
