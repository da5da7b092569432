"""What httpok checks: the request and the expected response, from the command line to the verdict."""
from __future__ import annotations

import os
import re
import select
import sys
import threading
from typing import Any, NamedTuple, Sequence

from superlance import __version__
from superlance.command import Deadline, SecondsLeft
from superlance.fetch import (
    LONGEST_WAIT_SECONDS,
    FetchFailed,
    Request,
    Response,
    Search,
    Target,
    TimedOut,
    describe_failure,
    fetch,
    make_tls_context,
    parse_url,
)
from superlance.listener import ExitRequest
from superlance.options import (
    Given,
    Option,
    UsageError,
    format_duration,
    parse_text,
    parse_timeout,
    without_password,
)
from superlance.rpc import Unknown

TIMEOUT_SECONDS = 10.0
# How long after the deadline a request is abandoned, so that one that times out can say why.
ABANDON_SECONDS = 0.5
# The size of sun_path without its null: 108 bytes on Linux, 104 on the BSDs.
SOCKET_PATH_BYTES = 107 if sys.platform == 'linux' else 103
# RFC 9110, 5.6.2
TOKEN_CHARACTERS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


# Options.

def parse_status(text: str) -> int:
    """Return an HTTP status. Raises ValueError."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 100 <= int(text) <= 999):
        raise ValueError(f'{text!r} is not an HTTP status; write a number from 100 to 999, as in 200')
    return int(text)


def parse_header(text: str) -> tuple[str, str]:
    """Return the name and value of `Name: value`. Raises ValueError without the value, which may be a secret."""
    name, colon, value = text.partition(':')
    if not (colon and name and TOKEN_CHARACTERS.issuperset(name) and value.strip().isprintable()):
        shown = re.sub(r'([:\s]).+', r'\1***', text, flags=re.DOTALL)
        raise ValueError(f"{shown!r} is not a header; write 'NAME: VALUE'")
    return name, value.strip()


def parse_headers(text: str) -> list[tuple[str, str]]:
    """Return the header `Name: value`, or those in a file for `@FILE`. Raises ValueError without the file's text."""
    if not text.startswith('@'):
        return [parse_header(text)]
    try:
        with open(text[1:], encoding='utf-8') as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as why:    # ValueError: it is not UTF-8
        raise ValueError(f"{text[1:]!r}: {getattr(why, 'strerror', None) or 'not a text file in UTF-8'}") from None
    headers = []
    for number, line in enumerate(lines, 1):
        try:
            headers += [parse_header(line)] if line.strip() else []
        except ValueError:
            raise ValueError(f"line {number} of {text[1:]!r} is not a header; write 'NAME: VALUE'") from None
    return headers


def parse_socket_path(text: str) -> str:
    """Return the path of a unix socket. Raises ValueError if it is too long for one."""
    if not 0 < len(os.fsencode(text)) <= SOCKET_PATH_BYTES:
        raise ValueError(f'{text!r} is not the path of a socket; write one of 1 to {SOCKET_PATH_BYTES} bytes')
    return text


OPTIONS = (
    Option('t', 'timeout', parse_timeout),
    Option('c', 'code', parse_status),
    Option('b', 'body', str),
    Option('', 'header', parse_headers),
    Option('', 'unix-socket', parse_socket_path),
    Option('', 'verify'),
    Option('', 'cafile', parse_text),
)


class Check(NamedTuple):
    """A request and the expected response."""

    request: Request
    search: Search
    timeout_seconds: float = TIMEOUT_SECONDS

    @property
    def url(self) -> str:
        """The URL without its password."""
        return self.request.target.shown

    @property
    def statuses(self) -> str:
        """The expected statuses in words."""
        return ' or '.join(map(str, sorted(self.search.statuses)))


def read_check(given: Given, arguments: Sequence[str]) -> Check:
    """Return the Check of a command line, whose only argument is the URL. Raises UsageError."""
    if given.last('body') == '':
        given.ignore_empty('-b')
    search = Search(frozenset(given.all('code') or [200]), given.last('body') or None)
    return Check(build_request(given, read_url(arguments)), search, given.last('timeout', TIMEOUT_SECONDS))


def read_url(arguments: Sequence[str]) -> Target:
    """Return the Target for the URL, which is the only argument. Raises UsageError."""
    example = 'write one, such as http://127.0.0.1:8080/health'
    if not arguments:
        raise UsageError(f'no URL is given; {example}')
    if len(arguments) > 1:
        urls = ' '.join(map(without_password, arguments))
        raise UsageError(f'{len(arguments)} URLs are given: {urls}; {example}; values that contain spaces need quotes')
    try:
        return parse_url(arguments[0], os.environ.get('SUPERLANCE_HTTP_PASSWORD'))
    except ValueError as why:
        raise UsageError(str(why)) from None


def build_request(given: Given, target: Target) -> Request:
    headers = [header for several in given.all('header') for header in several]
    if not any(name.lower() == 'user-agent' for name, _ in headers):
        headers.insert(0, ('User-Agent', f'httpok/{__version__}'))
    cafile = given.last('cafile')
    try:
        tls_context = make_tls_context('verify' in given, cafile) if target.tls else None
    except OSError as why:
        raise UsageError(f'option --cafile: unable to use {cafile!r}: {why.strerror or why}; '
                         'name a file of CA certificates in PEM format') from why
    return Request(target, headers=tuple(headers), unix_socket=given.last('unix-socket'), tls_context=tls_context,
                   retry_refused=True)


def describe_check(check: Check) -> str:
    """Return what is checked, for the first line of the log."""
    expected = f'status {check.statuses}'
    if check.search.text:
        expected += f' and {check.search.text!r} in the body'
    through = f' through {check.request.unix_socket}' if check.request.unix_socket else ''
    return f'checks {check.url}{through} (timeout {format_duration(check.timeout_seconds)}, expects {expected})'


# A thread that can be abandoned.

def _import_http() -> None:
    """Import what a request needs. Raises Unknown."""
    try:
        import http.client  # noqa: F401  on the thread it would cost 0.7 MB more: malloc has an arena per thread
    except OSError as why:
        raise Unknown(str(why)) from why


class BackgroundFetch:
    """Runs fetch on a daemon thread, which a signal or the deadline abandons; there is never more than one."""

    def __init__(self, interrupt: ExitRequest) -> None:
        self._interrupt = interrupt
        self._finished: int | None = None   # a pipe that the thread closes at its end; None: there is no thread
        self._result: Response | BaseException | None = None

    def fetch(self, request: Request, seconds: float, search: Search) -> Response | None:
        """Return what fetch does, None if interrupted. Raises what fetch does.

        If an earlier request still hangs in its DNS lookup, this waits for that first.
        """
        _import_http()  # before the deadline: on a busy machine, the first import may take a second
        deadline = Deadline(seconds)
        if self._finished is None or self._has_finished(deadline.seconds_left()):
            self._start(request, deadline.seconds_left, search)
            if self._has_finished(deadline.seconds_left() + ABANDON_SECONDS):
                if isinstance(self._result, BaseException):
                    raise self._result
                return self._result
        if self._interrupt.requested:
            return None
        # Everything but a DNS lookup observes the deadline by itself.
        raise Unknown(f'DNS lookup of {request.target.host} timed out')

    def _start(self, request: Request, seconds_left: SecondsLeft, search: Search) -> None:
        """Start the thread. Raises Unknown."""
        try:
            finished, writable = os.pipe()
        except OSError as why:
            raise Unknown(describe_failure(why)) from why
        thread = threading.Thread(target=self._run, args=(writable, request, seconds_left, search), daemon=True)
        try:
            thread.start()
        except RuntimeError as why:
            os.close(finished)
            os.close(writable)
            raise Unknown(str(why)) from why
        self._finished = finished

    def _run(self, writable: int, request: Request, seconds_left: SecondsLeft, search: Search) -> None:
        try:
            self._result = fetch(request, seconds_left, search)
        except BaseException as why:    # raised again on the main thread
            self._result = why
        finally:
            os.close(writable)

    def _has_finished(self, seconds: float) -> bool:
        """Wait for the thread; return False after so many seconds, or if interrupted."""
        assert self._finished is not None
        wait_seconds = 0 if self._interrupt.requested else min(max(seconds, 0), LONGEST_WAIT_SECONDS)
        wanted: list[Any] = [self._finished, self._interrupt]
        ready, _, _ = select.select(wanted, [], [], wait_seconds)
        if self._interrupt.requested or self._finished not in ready:
            return False
        os.close(self._finished)
        self._finished = None
        return True


# Probe and decide.

BAD_STATUS = 'bad status returned'
BAD_BODY = 'bad body returned'


class Verdict(NamedTuple):
    """What is wrong with a response, for a subject and in words; both are '' for a good one."""

    subject: str
    text: str


def probe(check: Check, background: BackgroundFetch) -> Response | FetchFailed | None:
    """Request the URL; return the response or why there is none, or None if interrupted. Raises Unknown."""
    try:
        return background.fetch(check.request, check.timeout_seconds, check.search)
    except FetchFailed as why:
        return why


def decide(response: Response | FetchFailed, check: Check) -> Verdict:
    """Return what is wrong with a response, or that there is none."""
    if isinstance(response, TimedOut):
        return Verdict(BAD_STATUS, f'no complete response within {format_duration(check.timeout_seconds)}')
    if isinstance(response, FetchFailed):
        return Verdict(BAD_STATUS, str(response))
    if response.status not in check.search.statuses:
        return Verdict(BAD_STATUS, f'status {response.status_line} (expected {check.statuses})')
    if not response.has_text:
        return Verdict(BAD_BODY, f'the body does not contain {check.search.text!r}')
    return Verdict('', '')
