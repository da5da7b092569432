"""Command lines: option tables for getopt, the values that options take, and how these are written for people.

Each script lists its options in a table. An invalid command line becomes one line on stderr that names the option and
its value, and says what would be right.
"""
from __future__ import annotations

import errno
import getopt
import io
import os
import re
import sys
from contextlib import suppress
from typing import Any, Callable, NamedTuple, Sequence

from superlance import __version__
from superlance.listener import one_line, printable

NUMBER = r'(\d+\.?\d*|\.\d+)\s*'
SIZE = NUMBER + r'(?:([kmgt])(?:i?b)?|b)?'
TIME = NUMBER + r'([smhd]?)'
SIZE_UNITS = {'': 1, 'k': 1024, 'm': 1024 ** 2, 'g': 1024 ** 3, 't': 1024 ** 4}
TIME_UNITS = {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86400}
# Whatever exceeds these means the same. Threads and sockets can't wait for more than 292 years.
LARGEST_SIZE_BYTES = 10 ** 30
LONGEST_TIME_SECONDS = 10000 * 86400.0

# The addresses of RFC 5322, less its rare forms, on some of which email.message fails. In display names and comments,
# a letter beyond ASCII is allowed too.
DOMAIN = r'\w[\w-]*(?:\.[\w-]+)*'
ATEXT = r"[\w!#$%&'*+/=?^`{|}~-]"
ADDR_SPEC = rf'{ATEXT}(?:{ATEXT}|\.)*(?:@{DOMAIN})?'
LETTER = r'[^\x00-\x7f]'
QUOTED = r'"[^"\\]*"'
DISPLAY_NAME = rf'(?:{QUOTED}\s*|(?:{ATEXT}|{LETTER})(?:{ATEXT}|{LETTER}|[. ])*(?<!\.))'
MAILBOX = rf'(?:{DISPLAY_NAME}?<{ADDR_SPEC}>|{ADDR_SPEC}(?:\s+\((?:[\w .-]|{LETTER})*\))?)'


# The reader has exited; the disk is full, or its quota or the largest file; the terminal hung up; not open for writing.
OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class UsageError(Exception):
    """An invalid command line; the message is one line."""


class Option(NamedTuple):
    """One option: its letter (or ''), its long name, and how its value is read.

    read converts the text of the value, or raises a ValueError that says what would be right. If read is None, the
    option takes no value.
    """

    letter: str
    name: str
    read: Callable[[str], Any] | None = None


class Given:
    """The options of a command line, by their long names.

    warnings are what the listener logs at start as `warning: ...`: what superlance 2.0.0 accepted and ignored.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self.warnings: list[str] = []

    def ignore_arguments(self, program: str, arguments: Sequence[str]) -> None:
        """Add a warning about arguments that are no options, as superlance 2.0.0 ignored them."""
        for argument in arguments:
            self.warnings.append(f'ignored argument {without_password(argument)!r}: {program} takes options only; '
                                 'a value that contains spaces needs quotes')

    def ignore_empty(self, flag: str) -> None:
        """Add a warning about an option whose value is empty, as superlance 2.0.0 ignored it."""
        self.warnings.append(f'ignored option {flag}: its value is empty')

    def add(self, name: str, value: Any) -> None:
        self._values[name] = [*self._values.pop(name, []), value]  # the dictionary's order is that of `latest`

    def all(self, name: str) -> list[Any]:
        return self._values.get(name, [])

    def last(self, name: str, default: Any = None) -> Any:
        return self.all(name)[-1] if name in self else default

    def latest(self, *names: str) -> str | None:
        """Return which of these options is the last on the command line, None if none of them is given."""
        return next((name for name in reversed(self._values) if name in names), None)

    def __contains__(self, name: str) -> bool:
        return name in self._values


def read_argv(argv: Sequence[str], table: Sequence[Option], ignores_arguments: bool = False) -> tuple[Given, list[str]]:
    """Return the options in argv, and the arguments that are not options. Raises UsageError.

    superlance 2.0.0 ignored the first argument and all that followed it. If the script ignores arguments, an error
    there is ignored, too.
    """
    try:
        return _read_argv(argv, table, getopt.gnu_getopt)
    except UsageError:
        if ignores_arguments:
            with suppress(UsageError):
                return _read_argv(argv, table, getopt.getopt)   # stops at the first argument
        raise


def _read_argv(argv: Sequence[str], table: Sequence[Option], parse: Callable[..., Any]) -> tuple[Given, list[str]]:
    letters = ''.join(o.letter + (':' if o.read else '') for o in table if o.letter)
    names = [o.name + ('=' if o.read else '') for o in table]
    # superlance 2.0.0 accepted --s for --sendmail_program, --o for --optionalheader and so on; now they are ambiguous.
    names += [o.letter + ('=' if o.read else '') for o in table if o.letter and o.name.startswith(o.letter)]
    try:
        pairs, arguments = parse(list(argv), letters, names)
    except getopt.error as why:
        raise UsageError(str(why)) from why
    given = Given()
    for flag, text in pairs:
        option = next(o for o in table if flag in ('-' + o.letter, '--' + o.name, '--' + o.letter))
        if option.read is None:
            given.add(option.name, True)
            continue
        try:
            given.add(option.name, option.read(text))
        except ValueError as why:
            # An option without its value takes the URL that follows it.
            shown = without_password(text) if '://' in text else text
            raise UsageError(f'option {flag}: {why}'.replace(repr(text), repr(shown))) from why
    return given, arguments


def run_script(program: str, usage: str, table: Sequence[Option],
               build: Callable[[Given, list[str]], Any], run: Callable[[Any], int],
               argv: Sequence[str] | None, ignores_arguments: bool = False) -> int:
    """Read a command line, do what it says and return the exit status.

    build converts the given options to the script's own; build and run may raise UsageError.
    """
    # Python has no stream for a descriptor that was closed at start; a real file would get its number.
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    if argv is None:
        # supervisord passes UTF-8, and the locale here may be another.
        argv = [os.fsencode(text).decode('utf-8', 'surrogateescape') for text in sys.argv[1:]]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # the locale may lack characters of a name
    try:
        given, arguments = read_argv(argv, table, ignores_arguments)
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
        _complain(f"{program}: {one_line(why)}; try '{program} --help'")
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as why:
        if why.errno not in OUTPUT_ERRORS:
            raise
        if why.errno != errno.EPIPE:
            _complain(f'{program}: unable to write to stdout: {why.strerror}')
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own flush at exit succeeds
        return 1


def _complain(line: str) -> None:
    try:
        sys.stderr.write(line + '\n')
        sys.stderr.flush()
    except OSError:     # there is nobody to read it; the exit status says enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # so that Python's own flush at exit succeeds


def parse_size(text: str) -> int:
    """Return bytes for `200MB`, `1.5g`, `64KiB` or `4096`; all units are 1024-based. Raises ValueError."""
    number, unit = _parse_number(
        text, SIZE, 'is not a size; write bytes, or a number with KB, MB, GB or TB, as in 200MB')
    return int(min(number * SIZE_UNITS[unit], LARGEST_SIZE_BYTES))


def parse_time(text: str) -> float:
    """Return seconds for `90`, `90s`, `1.5m`, `2h` or `1d`. Raises ValueError."""
    number, unit = _parse_number(text, TIME, 'is not a time; write seconds, or a number with s, m, h or d, as in 10m')
    return min(number * TIME_UNITS[unit], LONGEST_TIME_SECONDS)


def _parse_number(text: str, pattern: str, complaint: str) -> tuple[float, str]:
    match = re.fullmatch(pattern, text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError(f'{text!r} {complaint}')
    return float(match[1]), (match[2] or '').lower()


def format_size(size_bytes: int) -> str:
    """Return bytes as people read them: 200.0MB."""
    for unit, factor in (('GB', 1024 ** 3), ('MB', 1024 ** 2), ('KB', 1024)):
        if size_bytes >= factor:
            return f'{size_bytes / factor:.1f}{unit}'
    return f'{size_bytes}B'


def format_duration(seconds: float) -> str:
    """Return seconds as people read them, in at most two units: 10s, 3m 5s, 59m, 1h 5m, 2d."""
    if seconds < 9.95:
        return f'{max(round(seconds, 1), 0):g}s'
    total = round(seconds)
    if total >= 600:
        total -= total % 60  # seconds no longer matter
    if total >= 86400:
        total -= total % 3600
    parts = []
    for unit in 'dhms':
        number, total = divmod(total, TIME_UNITS[unit])
        if number:
            parts.append(f'{number}{unit}')
    return ' '.join(parts)


def count(number: int, noun: str, plural: str = '') -> str:
    """Return `1 restart`, `2 restarts` or, with a plural of its own, `2 processes`."""
    return f'{number} {noun}' if number == 1 else f'{number} {plural or noun + "s"}'


def parse_count(text: str) -> int:
    """Return a whole number, at least 1. Raises ValueError."""
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise ValueError(f'{text!r} is not a count; write a whole number, at least 1')
    return int(text)


def parse_timeout(text: str) -> float:
    """Return seconds, more than 0. Raises ValueError."""
    seconds = parse_time(text)
    if seconds <= 0:
        raise ValueError(f'{text!r} must be greater than 0')
    return seconds


class Rate(NamedTuple):
    """At most so many times within so many seconds."""

    times: int
    seconds: float


def parse_rate(text: str) -> Rate:
    """Return the Rate for `3/1h`. Raises ValueError."""
    times, slash, period = text.partition('/')
    if not slash:
        raise ValueError(f'{text!r} is not a rate; write N/TIME, as in 3/1h')
    return Rate(parse_count(times), parse_timeout(period))


def parse_addresses(text: str) -> tuple[str, ...]:
    """Return the mail addresses in a comma-separated text; one without any is accepted. Raises ValueError."""
    # A comma separates two addresses if an even number of quotes follows it.
    parts = [part.strip() for part in re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*\Z)', text)]
    addresses = tuple(filter(None, parts))
    shown = without_password(text) if '://' in text else text
    for address in addresses:
        # email.message would decode an encoded word (RFC 2047), even to a line end.
        if not (address.isprintable() and re.fullmatch(MAILBOX, address, re.ASCII)) or '=?' in address:
            raise ValueError(f'{shown!r} is not a mail address; write one, as in bob@example.com, '
                             'or several, separated by commas')
    return tuple(map(_simplify_name, addresses))


def _simplify_name(address: str) -> str:
    """Return the address without special characters in a quoted display name that is beyond ASCII.

    email.message encodes the words that need it, and writes the others without the quotes.
    """
    quoted = re.match(QUOTED, address)
    if not quoted or quoted[0].isascii():
        return address
    return ' '.join(re.sub(r'[][()<>@,:;".]', ' ', quoted[0]).split()) + ' ' + address[quoted.end():].strip()


def parse_address(text: str) -> str:
    """Return the one mail address in text. Raises ValueError."""
    addresses = parse_addresses(text)
    if not addresses:
        raise ValueError('must not be empty')
    if len(addresses) > 1:
        raise ValueError(f'{text!r} is more than one mail address')
    return addresses[0]


def without_password(url: str) -> str:
    """Return url with its password, if it has one, replaced by ***; url need not be valid."""
    scheme, separator, rest = url.partition('://')
    if not separator:
        scheme, rest = '', url
    authority = re.split('[/?#]', rest, maxsplit=1)[0]
    _, colon, port = authority.rpartition(']')[2].partition(':')  # ] ends an IPv6 address
    well_formed = separator and authority and (not colon or (port.isascii() and port.isdigit()))
    if '@' not in authority and not well_formed:
        authority = rest[:rest.rfind('@') + 1]  # a / ? or # in the password, which should have been encoded
    user, _, host = authority.rpartition('@')
    name, colon, _ = user.partition(':')
    if not colon:
        return url
    return scheme + separator + name + ':***@' + host + rest[len(authority):]


def parse_text(text: str) -> str:
    """Return text that is not empty. Raises ValueError."""
    if not text:
        raise ValueError('must not be empty')
    return text


def join_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are: `a, b, c and 2 more`."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


class Name(NamedTuple):
    """A name that -p accepts: a program in any group, in one group, or all programs of a group."""

    group: str | None
    program: str | None

    def matches(self, group: str, program: str) -> bool:
        return self.group in (None, group) and self.program in (None, program)

    def __str__(self) -> str:
        return printable(':'.join(filter(None, (self.group, self.program or '*'))))


EVERY = Name(None, None)


def parse_name(text: str) -> Name:
    """Return the Name for `program`, `group:program` or `group:*`. Raises ValueError."""
    parts = text.strip().split(':')
    if len(parts) == 1 and parts[0] and parts[0] != '*':
        return Name(None, parts[0])
    if len(parts) == 2 and parts[0]:
        return Name(parts[0], None if parts[1] in ('', '*') else parts[1])
    raise ValueError(f'{text!r} is not a process name; write program, group:program or group:*')


COMMON_OPTIONS = (
    Option('', 'once'),
    Option('', 'configuration', parse_text),
    Option('h', 'help'),
    Option('', 'version'),
)
