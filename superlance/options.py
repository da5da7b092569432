"""What the three listeners share of their command lines.

Each script lists its options in a table; getopt reads them, and a bad one becomes one
line on stderr that says what would be right.
"""
from __future__ import annotations

import errno
import getopt
import io
import os
import re
import sys
from typing import Any, Callable, NamedTuple, Sequence

from superlance import __version__
from superlance.listener import one_line

SIZE_UNITS = {'': 1, 'K': 1024, 'M': 1024 ** 2, 'G': 1024 ** 3, 'T': 1024 ** 4}
TIME_UNITS = {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86400}
LONGEST_TIME_DAYS = 10000  # threads and sockets can't wait for more than 292 years

# The addresses of RFC 5322, less its rare forms, on some of which email.message fails.
DOMAIN = r'\w[\w-]*(?:\.[\w-]+)*'
ATEXT = r"[\w!#$%&'*+/=?^`{|}~-]"
ADDR_SPEC = rf'{ATEXT}(?:{ATEXT}|\.)*(?:@{DOMAIN})?'
DISPLAY_NAME = rf'(?:"[^"\\]*"\s*|{ATEXT}(?:{ATEXT}|[. ])*(?<!\.))'
MAILBOX = rf'(?:{DISPLAY_NAME}?<{ADDR_SPEC}>|{ADDR_SPEC}(?:\s+\([\w .-]*\))?)'


class UsageError(Exception):
    """A command line that can't be meant; the message is one line."""


class Option(NamedTuple):
    """One option: its letter (or ''), its long name, and how its value is read.

    read turns the value's text into the value, or raises a ValueError that says what
    would be right; without it the option takes no value.
    """

    letter: str
    name: str
    read: Callable[[str], Any] | None = None


class Given:
    """The options that were given, by their long names."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}

    def add(self, name: str, value: Any) -> None:
        self._values[name] = self._values.pop(name, []) + [value]  # the last given is the last in the dictionary

    def all(self, name: str) -> list[Any]:
        return self._values.get(name, [])

    def last(self, name: str, default: Any = None) -> Any:
        return self.all(name)[-1] if name in self else default

    def latest(self, *names: str) -> str | None:
        """Return which of these options stands last, None if there is none of them."""
        return next((name for name in reversed(self._values) if name in names), None)

    def __contains__(self, name: str) -> bool:
        return name in self._values


def read_argv(argv: Sequence[str], table: Sequence[Option]) -> tuple[Given, list[str]]:
    """Return the options in argv and the arguments that are none. Raises UsageError."""
    letters = ''.join(o.letter + (':' if o.read else '') for o in table if o.letter)
    names = [o.name + ('=' if o.read else '') for o in table]
    try:
        pairs, arguments = getopt.gnu_getopt(list(argv), letters, names)
    except getopt.error as why:
        raise UsageError(str(why))
    given = Given()
    for flag, text in pairs:
        option = next(o for o in table if flag in ('-' + o.letter, '--' + o.name))
        if option.read is None:
            given.add(option.name, True)
            continue
        try:
            given.add(option.name, option.read(text))
        except ValueError as why:
            raise UsageError(f'option {flag}: {why}')
    return given, arguments


def run_script(program: str, usage: str, table: Sequence[Option],
               build: Callable[[Given, list[str]], Any], run: Callable[[Any], int],
               argv: Sequence[str] | None) -> int:
    """Read a command line, run what it asks for and return the exit status.

    build makes the script's own options of those given; it and run may raise UsageError.
    """
    # Where a stream was closed at the start, Python has none; a real file would take its number.
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    if argv is None:
        # supervisord passes UTF-8, and the locale here may be another.
        argv = [os.fsencode(text).decode('utf-8', 'surrogateescape') for text in sys.argv[1:]]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # a name may hold what the locale can't show
    try:
        given, arguments = read_argv(argv, table)
        status = 0
        if 'help' in given:
            sys.stdout.write(usage)
        elif 'version' in given:
            print(program, __version__)
        else:
            status = run(build(given, arguments))
        sys.stdout.flush()
        return status
    except UsageError as why:
        sys.stderr.write(f"{program}: {one_line(why)}; try '{program} --help'\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as why:
        if why.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if why.errno == errno.ENOSPC:
            sys.stderr.write(f'{program}: unable to write to stdout: {why.strerror}\n')
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what was printed can't be, at the exit neither
        return 1


def parse_size(text: str) -> int:
    """Return bytes for `200MB`, `1.5g` or `4096`; units are of 1024. Raises ValueError."""
    number = text.strip().upper()
    if number.endswith('B'):
        number = number[:-1]
    unit = number[-1:] if number[-1:] in SIZE_UNITS else ''
    return int(_parse_number(
        text, number[:len(number) - len(unit)], 'is not a size; write bytes, or a number with '
        'KB, MB, GB or TB, as in 200MB') * SIZE_UNITS[unit])


def parse_time(text: str) -> float:
    """Return seconds for `90`, `90s`, `1.5m`, `2h` or `1d`. Raises ValueError."""
    number = text.strip().lower()
    unit = number[-1:] if number[-1:] in TIME_UNITS else ''
    seconds = _parse_number(
        text, number[:len(number) - len(unit)], 'is not a time; write seconds, or a number with '
        's, m, h or d, as in 10m') * TIME_UNITS[unit]
    if seconds > LONGEST_TIME_DAYS * 86400:
        raise ValueError('%r is too long; write at most %dd' % (text, LONGEST_TIME_DAYS))
    return seconds


def _parse_number(text: str, number: str, complaint: str) -> float:
    number = number.strip()
    digits = number.replace('.', '', 1)
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 15:
        raise ValueError(f'{text!r} {complaint}')
    return float(number)


def parse_count(text: str) -> int:
    """Return a whole number from 1. Raises ValueError."""
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise ValueError(f'{text!r} is not a count; write a whole number from 1')
    return int(text)


def parse_timeout(text: str) -> float:
    """Return seconds, more than none. Raises ValueError."""
    seconds = parse_time(text)
    if seconds <= 0:
        raise ValueError(f'{text!r} is no time to wait; write more than 0 seconds')
    return seconds


class Rate(NamedTuple):
    """So many times within so many seconds."""

    times: int
    seconds: float


def parse_rate(text: str) -> Rate:
    """Return the Rate for `3/1h`. Raises ValueError."""
    times, slash, period = text.partition('/')
    if not slash:
        raise ValueError(f'{text!r} is not a number within a time; write N/TIME, as in 3/1h')
    return Rate(parse_count(times), parse_timeout(period))


def parse_addresses(text: str) -> tuple[str, ...]:
    """Return the mail addresses in a text that may hold several with commas. Raises ValueError."""
    # A comma parts two addresses where an even number of quotes follows it.
    addresses = tuple(part.strip() for part in re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*\Z)', text))
    for address in addresses:
        # email.message would decode an encoded word (RFC 2047), to a line end even.
        if not (address.isprintable() and re.fullmatch(MAILBOX, address, re.ASCII)) or '=?' in address:
            raise ValueError(f'{text!r} is not a mail address; write one, as in bob@example.com, '
                             'or several with commas')
    return addresses


def parse_address(text: str) -> str:
    """Return the one mail address in text. Raises ValueError."""
    addresses = parse_addresses(text)
    if len(addresses) != 1:
        raise ValueError(f'{text!r} is more than one mail address')
    return addresses[0]


def without_password(url: str) -> str:
    """Return url with *** for its password, if it has one; url need not be a valid one."""
    scheme, separator, rest = url.partition('://')
    if not separator:
        scheme, rest = '', url
    authority = re.split('[/?#]', rest, maxsplit=1)[0]
    _, colon, port = authority.rpartition(']')[2].partition(':')  # ] ends an IPv6 address
    well_formed = separator and authority and (not colon or port.isascii() and port.isdigit())
    if '@' not in authority and not well_formed:
        authority = rest[:rest.rfind('@') + 1]  # a / ? or # in the password, which should have been encoded
    user, at, host = authority.rpartition('@')
    name, colon, _ = user.partition(':')
    if not colon:
        return url
    return scheme + separator + name + ':***@' + host + rest[len(authority):]


def parse_text(text: str) -> str:
    """Return text that is not empty. Raises ValueError."""
    if not text:
        raise ValueError('an empty text; write at least a character')
    return text


COMMON_OPTIONS = (
    Option('', 'once'),
    Option('', 'configuration', parse_text),
    Option('h', 'help'),
    Option('', 'version'),
)
