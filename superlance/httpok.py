"""Usage: httpok [options] URL

Restarts processes that run but no longer answer their URL, and mails about
it. It runs as an event listener of supervisor, subscribed to a TICK event:

    [eventlistener:httpok]
    command=httpok -p web -m bob@example.com http://localhost:8080/health
    events=TICK_60

What to restart when the URL fails; neither: check and mail only:
  -p, --program=NAME          NAME (program, group:program or group:*); may be
                              repeated
  -a, --any                   every RUNNING process of supervisord

What a good reply is:
  -t, --timeout=SECONDS       how long the whole check may take, the body and
                              retries of a refused connection included
                              (default: 10)
  -c, --code=STATUS           an expected status; may be repeated
                              (default: 200)
  -b, --body=TEXT             a text that must occur in the body
      --header='NAME: VALUE'  a header to send, Host too; may be repeated
      --unix-socket=PATH      connect to this socket; the URL gives host, path
      --verify                verify the certificate of https
      --cafile=FILE           verify it with the authorities in FILE

When and how to restart:
  -e, --eager                 check even if no watched process is RUNNING
                              (default)
  -E, --not-eager             check only if a watched process is RUNNING
      --failures=N            only after N failed checks in a row (default: 1)
      --grace=TIME            not a process that has run for less than TIME:
                              seconds, or a number with s, m, h or d; where
                              that holds for all, the URL is not asked
      --max-restarts=N/TIME   at most N restarts of one process within TIME;
                              then leave it alone, and tell that once
      --dry-run               say what would be restarted, and leave it running
  -d, --coredir=DIR           put a core of each process into DIR before its
                              restart
  -g, --gcore=CMD             the command for that, run as CMD DIR/NAME PID
                              (default: /usr/bin/gcore -o)

Mail:
  -m, --email=ADDR            to whom; may be repeated or hold several with
                              commas; without it there is the log only
  -n, --name=NAME             the subject begins with "httpok [NAME]"
  -s, --sendmail_program=CMD  the command that sends a mail
                              (default: /usr/sbin/sendmail -t -i)
      --smtp=URL              send by smtp://[user[:password]@]host[:port] or
                              smtps://... instead; the password may also be in
                              SUPERLANCE_SMTP_PASSWORD
      --from=ADDR             the sender

By hand, and in the log:
      --once                  check now, print the reply and do nothing else;
                              exit status 0 if all is well, else 1
      --configuration=FILE    for --once: the supervisord.conf to find
                              supervisord by
  -v, --verbose               log every check
  -h, --help                  print this text
      --version               print the version
"""
from __future__ import annotations

import io
import os
import shlex
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Mapping, NamedTuple, Sequence

from superlance import __version__, mail
from superlance.listener import CommandFailed, Event, decode_end, listen, make_log, one_line, run_command
from superlance.options import (
    COMMON_OPTIONS,
    Given,
    Option,
    Rate,
    UsageError,
    parse_count,
    parse_rate,
    parse_text,
    parse_time,
    parse_timeout,
    run_script,
    without_password,
)
from superlance.processes import (
    COUNTED,
    EVERY,
    RUNNING,
    STARTING,
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

if TYPE_CHECKING:
    import ssl
    from http.client import HTTPResponse

GCORE = '/usr/bin/gcore -o'
GCORE_TIMEOUT_SECONDS = 300
RETRY_REFUSED_SECONDS = 1
BODY_LIMIT_BYTES = 1024 * 1024
PIECE_BYTES = 64 * 1024
# A day: poll() takes 32 bits of milliseconds, 24 days, and Python does not check that they fit.
LONGEST_WAIT_SECONDS = 24 * 3600
# What sun_path holds, less its null: 108 bytes on Linux, 104 on the BSDs.
SOCKET_PATH_BYTES = 107 if sys.platform == 'linux' else 103
# RFC 9110, 5.6.2
TOKEN_CHARACTERS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


# Options.

class Target(NamedTuple):
    """A URL, taken apart."""

    tls: bool
    host: str
    port: int
    path: str               # with the query
    host_header: str
    authorization: str | None
    shown: str              # the URL without its password


def parse_url(text: str) -> Target:
    """Return the Target for an http or https URL. Raises ValueError."""
    from base64 import b64encode
    from urllib.parse import quote, unquote_to_bytes, urlsplit

    shown = without_password(text)

    def wrong(reason: str) -> ValueError:
        return ValueError(f'URL {shown!r} {reason}; write one as in http://localhost:8080/health')

    if not text.isprintable() or ' ' in text:
        raise wrong('has a space or a control character')
    try:
        url = urlsplit(text)
    except ValueError:
        raise wrong('can not be read')  # the reason may hold the password
    if url.scheme not in ('http', 'https'):
        raise wrong('is neither http nor https')
    host = (url.hostname or '').replace('%25', '%')     # the zone of an IPv6 address, RFC 6874
    if not host:
        raise wrong('has no host')
    try:
        port = url.port
    except ValueError:
        port = 0
    if port == 0:
        raise wrong('has a port that is no number from 1 to 65535')
    try:
        host = host.encode('idna').decode('ascii')
    except UnicodeError as why:
        raise wrong(f'has a host that can not be: {why}')
    authorization = None
    if url.username is not None:
        pair = b'%s:%s' % (unquote_to_bytes(url.username), unquote_to_bytes(url.password or ''))
        authorization = 'Basic ' + b64encode(pair).decode('ascii')
    # Letters beyond ASCII are encoded; what is percent-encoded already stays as it is.
    path = quote(url.path or '/', safe="%/:@!$&'()*+,;=~")
    if url.query:
        path += '?' + quote(url.query, safe="%/?:@!$&'()*+,;=~[]{}|^")
    host_header = '[{}]'.format(host.partition('%')[0]) if ':' in host else host
    if port:
        host_header += ':%d' % port
    return Target(tls=url.scheme == 'https', host=host, port=port or (443 if url.scheme == 'https' else 80),
                  path=path, host_header=host_header, authorization=authorization, shown=shown)


def parse_status(text: str) -> int:
    """Return an HTTP status. Raises ValueError."""
    if not (text.isascii() and text.isdigit() and 100 <= int(text) <= 599):
        raise ValueError(f'{text!r} is not an HTTP status; write a number from 100 to 599, as in 200')
    return int(text)


def parse_header(text: str) -> tuple[str, str]:
    """Return the name and value of `Name: value`. Raises ValueError."""
    name, colon, value = text.partition(':')
    if not (colon and name and TOKEN_CHARACTERS.issuperset(name) and value.strip().isprintable()):
        raise ValueError(f"{text!r} is not a header; write one as in 'X-Probe: httpok'")
    return name, value.strip()


def parse_socket_path(text: str) -> str:
    """Return the path of a unix socket. Raises ValueError where none can have it."""
    if not 0 < len(os.fsencode(text)) <= SOCKET_PATH_BYTES:
        raise ValueError('%r is not the path of a socket, which has from 1 to %d bytes' % (text, SOCKET_PATH_BYTES))
    return text


def parse_command(text: str) -> list[str]:
    """Return the words of a command, as a shell splits it. Raises ValueError."""
    try:
        words = shlex.split(text)
    except ValueError as why:
        raise ValueError(f'{text!r} is not a command: {why}')
    if not words:
        raise ValueError('an empty command; write one as in /usr/bin/gcore -o')
    return words


OPTIONS = (
    Option('p', 'program', parse_name),
    Option('a', 'any'),
    Option('t', 'timeout', parse_timeout),
    Option('c', 'code', parse_status),
    Option('b', 'body', parse_text),
    Option('', 'header', parse_header),
    Option('', 'unix-socket', parse_socket_path),
    Option('', 'verify'),
    Option('', 'cafile', parse_text),
    Option('e', 'eager'),
    Option('E', 'not-eager'),
    Option('', 'failures', parse_count),
    Option('', 'grace', parse_time),
    Option('', 'max-restarts', parse_rate),
    Option('', 'dry-run'),
    Option('d', 'coredir', parse_text),
    Option('g', 'gcore', parse_command),
    Option('n', 'name', str),
    Option('v', 'verbose'),
) + mail.OPTIONS + COMMON_OPTIONS


class Options(NamedTuple):
    target: Target
    names: tuple[Name, ...]     # whom to restart
    timeout_seconds: float
    statuses: frozenset[int]
    body: str | None
    headers: tuple[tuple[str, str], ...]
    unix_socket: str | None
    tls_context: ssl.SSLContext | None
    eager: bool
    failures: int
    grace_seconds: float
    max_restarts: Rate | None
    dry_run: bool
    core_directory: str | None
    gcore: Sequence[str]
    name: str | None
    verbose: bool
    mail: mail.Settings
    once: bool
    configuration: str | None


def build_options(given: Given, arguments: list[str]) -> Options:
    """Return the Options for what was given. Raises UsageError."""
    if len(arguments) != 1:
        raise UsageError('%s; write one, as in http://localhost:8080/health'
                         % ('%d URLs are given: %s' % (len(arguments), ' '.join(map(without_password, arguments)))
                            if arguments else 'no URL is given'))
    try:
        target = parse_url(arguments[0])
    except ValueError as why:
        raise UsageError(str(why))
    names = (EVERY,) if 'any' in given else tuple(given.all('program'))
    eager = given.latest('eager', 'not-eager') != 'not-eager'
    if not (eager or names):
        raise UsageError('option -E: no process is watched; give -p or -a with it')
    return Options(
        target=target,
        names=names,
        timeout_seconds=given.last('timeout', 10.0),
        statuses=frozenset(given.all('code') or [200]),
        body=given.last('body'),
        headers=tuple(given.all('header')),
        unix_socket=given.last('unix-socket'),
        tls_context=make_tls_context('verify' in given, given.last('cafile')) if target.tls else None,
        eager=eager,
        failures=given.last('failures', 1),
        grace_seconds=given.last('grace', 0.0),
        max_restarts=given.last('max-restarts'),
        dry_run='dry-run' in given,
        core_directory=given.last('coredir'),
        gcore=given.last('gcore', shlex.split(GCORE)),
        name=given.last('name'),
        verbose='verbose' in given,
        mail=mail.read_settings(given),
        once='once' in given,
        configuration=given.last('configuration'))


def make_tls_context(verify: bool, authorities: str | None) -> ssl.SSLContext:
    """Return how to speak TLS: with the system's authorities, those in a file, or any certificate."""
    import ssl

    if verify or authorities:
        try:
            return ssl.create_default_context(cafile=authorities)
        except OSError as why:
            raise UsageError(f'option --cafile: {authorities!r} can not be used: {why.strerror or why}; name a file of certificates in PEM format')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# Probe.

class CheckFailed(Exception):
    """The URL gave no reply that could be judged; the message is one line."""


class Reply(NamedTuple):
    """What the URL answered."""

    status: int
    reason: str
    has_text: bool | None    # whether the body contains the text of -b; None: the status is bad, and it was not read
    seconds: float

    @property
    def status_line(self) -> str:
        return ('%d %s' % (self.status, self.reason)).rstrip()


class Deadline:
    """The end of a check."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def seconds_left(self) -> float:
        """Return seconds, more than none. Raises CheckFailed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise CheckFailed(f'no complete reply within {self._seconds:g} s')
        return min(left, LONGEST_WAIT_SECONDS)

    def seconds_taken(self) -> float:
        return time.monotonic() - self._end + self._seconds


class BoundedSocket(io.RawIOBase):
    """A connected socket as http.client uses one; a deadline bounds all that it waits for together."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        self._file = io.BufferedReader(self)    # one for all responses, as it may hold some of the next

    def makefile(self, mode: str) -> Any:
        return self._file

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.seconds_left())
        self._sock.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.seconds_left())
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        """Leave the socket open: http.client closes a connection before it reads the body."""


class Resolver:
    """Finds a host's addresses within bounded time.

    getaddrinfo can't be interrupted, so it has a thread; one that is late is waited for again by the
    next check, so that there is never more than one.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._answer: list[Any] | OSError = []

    def resolve(self, host: str, port: int, deadline: Deadline) -> list[Any]:
        """Return what getaddrinfo does. Raises OSError, CheckFailed and CantTell."""
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            pass  # it is a name
        while True:
            is_earlier = self._thread is not None
            if self._thread is None:
                thread = threading.Thread(target=self._look_up, args=(host, port), daemon=True)
                try:
                    thread.start()
                except RuntimeError as why:
                    raise CantTell(f'unable to look up {host}: {why}')
                self._thread = thread
            self._thread.join(deadline.seconds_left())
            if self._thread.is_alive():
                raise CheckFailed(f'the address of {host} was not found in time')
            self._thread = None
            if not isinstance(self._answer, OSError):
                return self._answer
            if not is_earlier:
                raise self._answer
            # What made an earlier check's lookup fail may be over.

    def _look_up(self, host: str, port: int) -> None:
        try:
            self._answer = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as why:
            self._answer = why


def connect(options: Options, resolver: Resolver, deadline: Deadline) -> socket.socket:
    """Return a connected socket; a refused connection is tried again until the deadline.

    A unix socket also refuses where its file is not there yet, or its queue is full for a moment.
    """
    while True:
        try:
            return _connect_once(options, resolver, deadline)
        except (ConnectionRefusedError, FileNotFoundError, BlockingIOError) as why:
            refused = why
        try:
            time.sleep(min(RETRY_REFUSED_SECONDS, deadline.seconds_left()))
            deadline.seconds_left()
        except CheckFailed:
            raise refused


def _connect_once(options: Options, resolver: Resolver, deadline: Deadline) -> socket.socket:
    if options.unix_socket:
        addresses = [(socket.AF_UNIX, options.unix_socket)]
    else:
        found = resolver.resolve(options.target.host, options.target.port, deadline)
        addresses = [(family, address) for family, _, _, _, address in found]
    failures: list[OSError] = []
    for position, (family, address) in enumerate(addresses):
        # One address that swallows packets must not use up the time of the others.
        seconds = deadline.seconds_left() / (len(addresses) - position)
        try:
            return _open_socket(family, address, seconds)
        except OSError as why:
            failures.append(why)
    raise next((why for why in failures if isinstance(why, ConnectionRefusedError)), failures[-1])


def _open_socket(family: int, address: Any, timeout_seconds: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_seconds)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def fetch(options: Options, resolver: Resolver) -> Reply:
    """Ask the URL. Raises CheckFailed, and CantTell where its host can't be looked up for want of a thread."""
    from http.client import HTTPException

    deadline = Deadline(options.timeout_seconds)
    try:
        with connect(options, resolver, deadline) as sock:
            if options.tls_context:
                sock.settimeout(deadline.seconds_left())
                sock = options.tls_context.wrap_socket(sock, server_hostname=options.target.host)
            with sock:
                return exchange(options, sock, deadline)
    except socket.timeout:
        raise CheckFailed(f'no complete reply within {options.timeout_seconds:g} s')
    except (OSError, HTTPException, ValueError) as why:  # ValueError: a chunk's length that http.client can't read
        raise CheckFailed(f'no reply: {describe_failure(why)}')


def exchange(options: Options, sock: socket.socket, deadline: Deadline) -> Reply:
    """Send the request and read the reply. Raises CheckFailed, OSError, HTTPException and ValueError."""
    from http.client import HTTPConnection, HTTPResponse

    # Without a port, http.client would look for one in an IPv6 address.
    connection = HTTPConnection(options.target.host, options.target.port)
    bounded = connection.sock = BoundedSocket(sock, deadline)
    connection.putrequest('GET', options.target.path, skip_host=True, skip_accept_encoding=True)
    for name, value in make_headers(options):
        connection.putheader(name, value.encode('utf-8'))
    connection.endheaders()
    reply = connection.getresponse()
    while 101 < reply.status < 200 and reply.status not in options.statuses:
        # As 103, Early Hints: the final one follows (RFC 9110, 15.2). http.client knows 100 only.
        setattr(reply, 'fp', None)  # or its end would close the file for the next
        reply = HTTPResponse(bounded, method='GET')  # type: ignore[arg-type]
        reply.begin()
    has_text = read_body(reply, options.body) if reply.status in options.statuses else None
    return Reply(reply.status, one_line(reply.reason[:200]), has_text, deadline.seconds_taken())


def describe_failure(why: Exception) -> str:
    """Return in a line why there is no reply; what came in its place may be long, or anything."""
    from http.client import BadStatusLine, IncompleteRead, UnknownProtocol

    if isinstance(why, IncompleteRead):
        return 'the body ended early'
    if isinstance(why, (BadStatusLine, UnknownProtocol)) and not isinstance(why, OSError):
        return f'what came is not HTTP: {str(why)[:200]!r}'
    return one_line(getattr(why, 'strerror', None) or str(why) or type(why).__name__)


def make_headers(options: Options) -> list[tuple[str, str]]:
    """Return the headers of the request: those of --header, and ours where they do not say otherwise."""
    own = [('Host', options.target.host_header), ('User-Agent', f'httpok/{__version__}'), ('Accept', '*/*'),
           ('Accept-Encoding', 'identity'), ('Connection', 'close')]
    if options.target.authorization:
        own.append(('Authorization', options.target.authorization))
    given = {name.lower() for name, _ in options.headers}
    return [(name, value) for name, value in own if name.lower() not in given] + list(options.headers)


def read_body(reply: HTTPResponse, text: str | None) -> bool:
    """Read a body as far as is needed, and return whether text, if any, occurs in it.

    Raises CheckFailed for a body that ends before its Content-Length, and HTTPException for bad chunks.
    """
    wanted = encode_text(text, reply.headers.get_content_charset()) if text else ()
    kept = max(map(len, wanted), default=1) - 1
    seen_bytes = 0
    tail = b''
    while reply.length != 0 and (wanted or seen_bytes < BODY_LIMIT_BYTES):
        piece = reply.read1(PIECE_BYTES)    # read() would wait for as much as it is asked for
        if reply.chunked and (reply.chunk_left or 0) < 0:
            raise CheckFailed('no reply: a chunk of negative length')
        if not piece:
            if reply.length:
                raise CheckFailed('no reply: the body ended early')
            break
        seen_bytes += len(piece)
        tail += piece
        if any(encoded in tail for encoded in wanted):
            return True
        tail = tail[max(0, len(tail) - kept):]
    return not wanted


def encode_text(text: str, charset: str | None) -> tuple[bytes, ...]:
    """Return text as UTF-8 and, where that can be, as the reply's charset has it."""
    encoded = [text.encode('utf-8', 'surrogateescape')]
    for ending in ('', '-le', '-be'):   # of UTF-16 and UTF-32; no other has such a name
        try:
            encoded.append(text.encode((charset or 'utf-8') + ending))
        except (LookupError, ValueError):   # ValueError: a null character in the name
            pass
    return tuple(filter(None, encoded))


# Judge.

BAD_STATUS = 'bad status returned'
BAD_BODY = 'bad body returned'


class Verdict(NamedTuple):
    """What is wrong with a reply, for a subject and in words; '' twice for a good one."""

    subject: str
    text: str


def judge(reply: Reply | CheckFailed, statuses: frozenset[int], body: str | None) -> Verdict:
    """Return what is wrong with a reply, or with there being none."""
    if isinstance(reply, CheckFailed):
        return Verdict(BAD_STATUS, str(reply))
    if reply.status not in statuses:
        return Verdict(BAD_STATUS, 'status {} where {} was expected'.format(
            reply.status_line, ' or '.join(map(str, sorted(statuses)))))
    if not reply.has_text:
        return Verdict(BAD_BODY, f'the body does not contain {body!r}')
    return Verdict('', '')


def is_younger(process: Process, seconds: float) -> bool:
    """Return whether a process has run for less than seconds; no, where the clock was set back to before its start."""
    return 0 <= process.now - process.start < seconds


def check(options: Options, resolver: Resolver) -> tuple[Reply | CheckFailed, Verdict]:
    """Ask the URL and judge what it answered. Raises CantTell."""
    try:
        reply: Reply | CheckFailed = fetch(options, resolver)
    except CheckFailed as why:
        reply = why
    return reply, judge(reply, options.statuses, options.body)


# Act and tell.

class Httpok:
    """The listener: at every tick, checks the URL and restarts those behind it when that fails."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._log = make_log('httpok')
        self._resolver = Resolver()
        self._own_group = environment.get('SUPERVISOR_GROUP_NAME')
        self._supervisor = Supervisor(environment)
        self._restarter = Restarter(self._supervisor, self._note, options.max_restarts, options.dry_run)
        self._outbox = mail.Outbox(options.mail, 'httpok', self._log)
        self._names = NameCheck(options.names, self._supervisor, self._log)
        self._failures = 0
        self._outcomes: list[Outcome] = []
        self._lines: list[str] = []     # for the mail
        self._server = ''

    def handle(self, event: Event) -> None:
        if not event.name.startswith('TICK'):
            return
        self._server = event.server
        if self._retry() or self._restarter.is_stale(event):
            return
        self._names.ask_and_tell()
        try:
            reason = self._find_reason_to_wait()
        except (CantTell, Refused) as why:
            self._log(f'unable to ask which processes run, so {self._options.target.shown} is not checked: {why}')
            return
        if reason:
            if self._options.verbose:
                self._log(f'{self._options.target.shown} is not checked: {reason}')
            return
        began = time.time()
        try:
            reply, verdict = check(self._options, self._resolver)
        except CantTell as why:
            self._log(f'unable to check {self._options.target.shown}: {why}')
            return
        if verdict.text:
            self._failures += 1
            self._log('{}: {}{}'.format(
                self._options.target.shown, verdict.text,
                ' (failed check %d of %d)' % (self._failures, self._options.failures)
                if self._failures < self._options.failures else ''))
            if self._failures >= self._options.failures:
                self._act(verdict, began)
        else:
            self._failures = 0
            if self._options.verbose and isinstance(reply, Reply):
                self._log('%s: status %d in %.3f s' % (self._options.target.shown, reply.status, reply.seconds))

    def finish(self) -> None:
        self._retry()
        self._outbox.close()

    def _find_watched(self) -> list[Process]:
        processes = self._supervisor.get_processes()
        self._names.tell_unmatched(processes)
        return [process for process in processes if process.group != self._own_group
                and any(name.means(process.group, process.program) for name in self._options.names)]

    def _find_reason_to_wait(self) -> str:
        """Return why the URL need not be asked now, or ''. Raises CantTell and Refused."""
        if not self._options.names or (self._options.eager and not self._options.grace_seconds):
            return ''
        up = [process for process in self._find_watched() if process.state in (STARTING, RUNNING)]
        if not (self._options.eager or any(process.state == RUNNING for process in up)):
            return 'no watched process is RUNNING'
        if up and all(is_younger(process, self._options.grace_seconds) for process in up):
            return f'the watched processes have run for less than {self._options.grace_seconds:g} s'
        return ''

    def _act(self, verdict: Verdict, began: float) -> None:
        """Restart what is watched, and mail what was wrong and what was done; began is when the check did."""
        self._outcomes = []
        self._lines = [verdict.text]
        found = False
        try:
            if self._options.names:
                found = self._restart_watched(began)
        finally:
            if any(outcome.result in COUNTED for outcome in self._outcomes):
                self._failures = 0
            # What is found and comes to nothing is in its grace, or was told before: in dry run, or held back.
            if self._outcomes or not found:
                self._mail(verdict.subject, self._lines)

    def _restart_watched(self, began: float) -> bool:
        """Restart what is watched and was RUNNING when the check began; return whether there is any."""
        try:
            running = [process for process in self._find_watched() if process.state == RUNNING]
        except (CantTell, Refused) as why:
            self._say(f'nothing is restarted: {why}')
            return False
        if not running:
            self._say('nothing is restarted: no watched process is RUNNING')
        found = False
        for process in running:
            # In whole seconds; a start in the future is that of a clock that was set back since.
            if began < process.start <= process.now:
                self._say(f'left {process.title} alone: it was started while the URL was checked')
                continue
            found = True
            if is_younger(process, self._options.grace_seconds):
                self._say('left %s alone: it has run for %d s, and its grace is %g s'
                          % (process.title, process.uptime_seconds, self._options.grace_seconds))
            else:
                self._restarter.restart(process, self._dump_core if self._options.core_directory else None)
        return found

    def _dump_core(self, process: Process) -> None:
        assert self._options.core_directory
        path = os.path.join(self._options.core_directory, make_file_name(process.title))
        deadline = time.monotonic() + GCORE_TIMEOUT_SECONDS
        try:
            output = run_command([*self._options.gcore, path, str(process.pid)], lambda: deadline - time.monotonic())
        except CommandFailed as why:
            self._say(f'unable to write a core of {process.title}: {why}')
        else:
            said = decode_end(output)
            self._log(f'wrote a core of {process.title}: {one_line(said)}')
            self._lines += [f'wrote a core of {process.title}:', *said.splitlines()]

    def _retry(self) -> bool:
        self._outcomes = []
        try:
            return self._restarter.retry()
        finally:
            for outcome in self._outcomes:
                if outcome.result in SUBJECTS:
                    self._mail(SUBJECTS[outcome.result] % outcome.process.title, [outcome.text])

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._say(outcome.text)

    def _say(self, line: str) -> None:
        self._log(line)
        self._lines.append(line)

    def _mail(self, subject: str, lines: Sequence[str]) -> None:
        program = f'httpok [{self._options.name}]' if self._options.name else 'httpok'
        shown = self._options.target.shown
        self._outbox.put(f'{program}: {shown}: {subject}',
                         '{}\n\n{}\n'.format(shown, '\n'.join(map(one_line, lines))), self._server)


def make_file_name(title: str) -> str:
    """Return a process' title as the name of a file in whatever directory."""
    name = ''.join(c if c.isalnum() or c in '-_.:@+' else '_' for c in title)
    return '_' + name[1:] if name.startswith('.') else name


# One look by hand.

def look_once(options: Options, environment: Mapping[str, str]) -> int:
    """Print the reply and what would be restarted; return 0 if all is well, else 1."""
    supervisor = find_supervisor(options.configuration, environment) if options.names else None
    print(f'url      {options.target.shown}')
    try:
        reply, verdict = check(options, Resolver())
    except CantTell as why:
        print(f'verdict  unable to check: {one_line(why)}')
        return 1
    if isinstance(reply, Reply):
        print(f'status   {reply.status_line}')
        print(f'time     {reply.seconds:.3f} s')
        if options.body and reply.has_text is not None:
            print('body     {} {!r}'.format('contains' if reply.has_text else 'does not contain', options.body))
    print('verdict  {}'.format(one_line(verdict.text or 'ok')))
    if not supervisor:
        return 1 if verdict.text else 0
    try:
        processes = supervisor.get_processes()
    except (CantTell, Refused) as why:
        print(f'watched  unable to tell: {one_line(why)}')
        return 1
    for process in processes:
        if any(name.means(process.group, process.program) for name in options.names):
            print(f'watched  {describe_watched(process, options, bool(verdict.text))}')
    unmatched = find_unmatched(options.names, processes)
    for line in unmatched:
        print(f'watched  {line}')
    return 1 if verdict.text or unmatched else 0


def describe_watched(process: Process, options: Options, failed: bool) -> str:
    """Return what a watched process is, and what becomes of it where the check has failed."""
    if process.state != RUNNING:
        return f'{process.title} is {process.state_name}: not restarted'
    line = '%s is RUNNING (pid %d, for %d s)' % (process.title, process.pid, process.uptime_seconds)
    if not failed:
        return line
    if is_younger(process, options.grace_seconds):
        return f'{line}: in its grace, not restarted'
    return f'{line}: would be restarted'


def run(options: Options) -> int:
    if options.once:
        return look_once(options, os.environ)
    httpok = Httpok(options, os.environ)
    return listen('httpok', httpok.handle, httpok.finish)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('httpok', __doc__, OPTIONS, build_options, run, argv)


if __name__ == '__main__':
    raise SystemExit(main())
