"""supervisord's XML-RPC interface: processes, their names, and calls.

supervisor.childutils is imported when it is first needed: it costs 15 MB and 40 ms.
"""
from __future__ import annotations

import marshal
import os
import re
import sys
import time
from collections import deque
from enum import IntEnum
from typing import Any, Iterable, Mapping, NamedTuple, Sequence, Tuple

from superlance.command import CommandFailed, Deadline, run_command
from superlance.listener import ExitRequest
from superlance.options import Name, UsageError, without_password

CALL_TIMEOUT_SECONDS = 30
# If a listener starts so many helper processes within so many seconds, importing costs less.
HELPERS = 5
HELPERS_SECONDS = 600

CONTROL_CHARACTER = re.compile(rb'[\x00-\x08\x0b\x0c\x0e-\x1f]')

Call = Tuple[Any, ...]     # a method's name and its arguments


class State(IntEnum):
    """The states of a process, from supervisor/states.py."""

    STOPPED = 0
    STARTING = 10
    RUNNING = 20
    BACKOFF = 30
    STOPPING = 40
    EXITED = 100
    FATAL = 200
    UNKNOWN = 1000


class Unknown(Exception):
    """Something could not be found out, which is not the same as bad; the message is one line."""


class HttpError(Unknown):
    """supervisord answered with an HTTP status other than 200 and 401, as it does if it fails to send a text."""


class Refused(Exception):
    """supervisord answered with a fault; `fault` is its name in supervisor.xmlrpc.Faults."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


def is_shutting_down(why: Exception) -> bool:
    """Return whether a call failed because supervisord is shutting down or reloading: it then refuses every call."""
    return isinstance(why, Refused) and why.fault == 'SHUTDOWN_STATE'


def make_title(group: str, program: str) -> str:
    """Return the name of a process that supervisorctl shows to people."""
    return program if group == program else f'{group}:{program}'


class Process(NamedTuple):
    """A process as supervisord describes it; times are supervisord's, in whole seconds since the epoch."""

    group: str
    program: str
    pid: int            # 0: it is not running
    state: int
    state_name: str
    start: int          # 0: it has never been started
    now: int
    spawn_error: str

    @property
    def namespec(self) -> str:
        """The name that identifies this process to supervisord."""
        return f'{self.group}:{self.program}'

    @property
    def title(self) -> str:
        return make_title(self.group, self.program)

    @property
    def uptime_seconds(self) -> int:
        return max(0, self.now - self.start)


# What supervisor documents of an answer, as far as it is used here; [x]: any number of x.
INFO = {'group': str, 'name': str, 'pid': int, 'state': int, 'statename': str, 'start': int, 'now': int}
SHAPES = {'getProcessInfo': INFO, 'getAllProcessInfo': [INFO], 'getAllConfigInfo': [{'group': str, 'name': str}],
          'readLog': str}


def has_shape(answer: Any, shape: Any) -> bool:
    """Return whether an answer has one of the SHAPES."""
    if isinstance(shape, dict):
        return isinstance(answer, dict) and all(has_shape(answer.get(name), shape[name]) for name in shape)
    if isinstance(shape, list):
        return isinstance(answer, list) and all(has_shape(item, shape[0]) for item in answer)
    return isinstance(answer, shape)


def make_process(info: Mapping[str, Any]) -> Process:
    """Return the Process for supervisor's info structure."""
    return Process(info['group'], info['name'], info['pid'], info['state'], info['statename'],
                   info['start'], info['now'], info.get('spawnerr') or '')


def resolve_names(names: Iterable[Name], pairs: Iterable[tuple[str, str]]) -> list[Name]:
    """Return the names in their order, as they apply to the (group, program) pairs of supervisord.

    A bare name that no process has, but a group has, becomes the name of all of that group: a program with
    `numprocs` is such a group.
    """
    programs, groups = set(), set()
    for group, program in pairs:
        programs.add(program)
        groups.add(group)
    return [Name(name.program, None)
            if name.group is None and name.program in groups and name.program not in programs else name
            for name in names]


class Supervisor:
    """supervisord's XML-RPC interface, as far as the listeners need it.

    Every call uses a fresh connection: one that is kept open may be closed by the time of the next call.
    All calls raise Unknown if there is no answer, and Refused if the answer is a fault.
    """

    def __init__(self, environment: Mapping[str, str], timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> None:
        self._environment = environment
        self._timeout_seconds = timeout_seconds
        self._helpers: deque[float] = deque(maxlen=HELPERS)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of supervisor's interface and return its answer."""
        from http.client import HTTPException
        from xml.parsers.expat import ExpatError
        from xmlrpc.client import Error, Fault, ProtocolError

        from supervisor.xmlrpc import Faults, getFaultDescription

        url = self._environment.get('SUPERVISOR_SERVER_URL', '')
        shown = without_password(url)
        try:
            answer = self._call(url, method, arguments)
        except Fault as why:
            if why.faultCode == Faults.UNKNOWN_METHOD:
                raise Unknown(f'supervisord at {shown} does not offer this interface: supervisord.conf needs an '
                              '[rpcinterface:supervisor] section') from why
            raise Refused(getFaultDescription(why.faultCode), why.faultString) from why
        except ProtocolError as why:
            if why.errcode == 401:
                raise Unknown(self._describe_401()) from None
            raise HttpError(f'supervisord at {shown} answered {method} with {why.errcode} {why.errmsg}') from None
        except PermissionError as why:
            raise Unknown(f"uid {os.getuid()} is not allowed to open supervisord's socket {shown}: see chmod and chown "
                          "in [unix_http_server], or user in the listener's section") from why
        except (OSError, HTTPException, ExpatError, Error, ValueError) as why:
            # If the URL has a password, the text may contain a part of it.
            reason = getattr(why, 'strerror', None) or (str(why) if shown == url else '') or type(why).__name__
            raise Unknown(f'supervisord at {shown} does not answer {method}: {reason}') from None
        if not has_shape(answer, SHAPES.get(method, object)):
            raise Unknown(f'supervisord at {shown} sent an unexpected answer to {method}: {str(answer)[:80]!r}')
        return answer

    def _call(self, url: str, method: str, arguments: tuple[Any, ...]) -> Any:
        import socket
        from urllib.parse import urlsplit

        from supervisor.childutils import getRPCInterface

        # supervisor's connections over TCP and over a unix socket use this as their timeout.
        socket.setdefaulttimeout(self._timeout_seconds)
        parts = urlsplit(url)
        if parts.scheme == 'http' and not parts.hostname:
            raise ValueError('the URL has no host')
        proxy = getRPCInterface(dict(self._environment, SUPERVISOR_SERVER_URL=url))
        _accept_control_characters(proxy('transport'))
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        finally:
            proxy('close')()

    def _describe_401(self) -> str:
        complaint = ('rejects the user name and password (401): check' if self._environment.get('SUPERVISOR_USERNAME')
                     else 'requires a user name and password (401): set')
        return (f"supervisord {complaint} SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD with environment= in the "
                "listener's section (with --once: username and password in [supervisorctl])")

    def get_processes(self) -> list[Process]:
        return [make_process(info) for info in self.call('getAllProcessInfo')]

    def get_process(self, namespec: str) -> Process:
        return make_process(self.call('getProcessInfo', namespec))

    def get_processes_in_helper(self, seconds: float, interrupt: ExitRequest | None = None) -> list[Process]:
        """Return what get_processes does, through call_in_helper."""
        answer, = self.call_in_helper([('getAllProcessInfo',)], seconds, interrupt)
        return [make_process(info) for info in answer]

    def call_in_helper(self, calls: Sequence[Call], seconds: float, interrupt: ExitRequest | None = None) -> list[Any]:
        """Make the calls in a helper process and return their answers, so that this one is spared the import.

        A helper costs 90 ms. If one can't be started, or is needed often, the calls are made in this process.
        Also raises Unknown after so many seconds, and when interrupt is requested.
        """
        now = time.monotonic()
        is_often = len(self._helpers) == HELPERS and now - self._helpers[0] < HELPERS_SECONDS
        if is_often or 'supervisor.childutils' in sys.modules:
            return [self.call(*call) for call in calls]
        self._helpers.append(now)
        deadline = Deadline(seconds)
        request = marshal.dumps((self._timeout_seconds, list(calls))).hex()
        try:
            # Not `python -m`, which would import from the working directory.
            output = run_command(
                [sys.executable, '-c', f'import sys; sys.path[:] = {sys.path!r}\n'
                 f'from superlance.rpc import answer_calls; answer_calls({request!r})'],
                deadline.seconds_left, environment={**os.environ, **self._environment}, interrupt=interrupt)
            # Before and after the answer, there may be warnings of imported modules.
            answer = re.search(rb'^superlance: ([0-9a-f]+)$', output, re.MULTILINE)
            if not answer:
                raise CommandFailed('no answer')
            answers, fault, reason = marshal.loads(bytes.fromhex(answer[1].decode('ascii')))
        except CommandFailed as why:
            if interrupt and interrupt.requested:
                raise Unknown('interrupted, because the listener is shutting down') from why
            if deadline.seconds_left() <= 0:
                raise Unknown(f'supervisord did not answer within {seconds:g}s') from why
            return [self.call(*call) for call in calls]     # for example, there is no process left for a helper
        if fault:
            raise Refused(fault, reason)
        if reason:
            raise Unknown(reason)
        return list(answers)


def _accept_control_characters(transport: Any) -> None:
    """Let a transport read answers with control characters, which are not valid XML.

    supervisord sends them as they are in a log. Each becomes a visible character, such as "\u241b" for an escape.
    """
    get_parser = transport.getparser

    def getparser() -> Any:
        parser, target = get_parser()
        feed = parser.feed
        parser.feed = lambda data: feed(CONTROL_CHARACTER.sub(lambda found: b'&#%d;' % (0x2400 + ord(found[0])), data))
        return parser, target
    transport.getparser = getparser


def answer_calls(request: str) -> None:
    """Make the calls that call_in_helper was asked for, and print their answers as one line."""
    timeout_seconds, calls = marshal.loads(bytes.fromhex(request))
    answers: list[Any] = []
    fault = reason = ''
    try:
        supervisor = Supervisor(os.environ, timeout_seconds)
        answers = [supervisor.call(*call) for call in calls]
    except Refused as why:
        fault, reason = why.fault, str(why)
    except Unknown as why:
        reason = str(why)
    print('\nsuperlance: ' + marshal.dumps((answers, fault, reason)).hex(), flush=True)


def find_supervisor(configuration: str | None, environment: Mapping[str, str]) -> Supervisor:
    """Return the Supervisor for --once: that of the named configuration file; if none is named, that of
    SUPERVISOR_SERVER_URL; if that is not set, the one that supervisorctl would use.

    Raises UsageError if the configuration can't be read.
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
        printed = client.stderr.getvalue().partition('\n')[0].replace('Error: ', '', 1)
        reason = str(why) if isinstance(why, Error) else printed
        if configuration:
            raise UsageError(f'option --configuration: {reason}') from why
        raise UsageError(f'{client.configfile}: {reason}; name another file with --configuration=FILE') from why
    section = client.configroot.supervisorctl
    url = section.serverurl or 'http://localhost:9001'
    if not client.configfile:
        sys.stderr.write(f"no supervisord.conf found (looked for {', '.join(client.searchpaths)}): "
                         f'using {without_password(url)}; name a file with --configuration=FILE\n')
    return Supervisor({'SUPERVISOR_SERVER_URL': url, 'SUPERVISOR_USERNAME': section.username or '',
                       'SUPERVISOR_PASSWORD': section.password or ''})
