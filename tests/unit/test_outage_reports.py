"""httpok as a whole, in this process, with real servers: what is in the log and the mail of failed checks."""
from __future__ import annotations

import base64
from pathlib import Path

import pytest
from inbox import CommandInbox
from support import NO_SUPERVISORD, acknowledge, make_event, read, run_in_process
from web import Site, response

from superlance import __version__, httpok

BAD_LINE = 'status 500 No (expected 200)'


def serve(ticks: int, *argv: str, environment: dict[str, str] | None = None) -> tuple[list[str], str]:
    """Run httpok for some ticks; return the messages of its log, and the log."""
    run = run_in_process(lambda: httpok.main(argv), make_event('TICK_5', 'when:9999999999') * ticks, environment)
    assert (run.status, run.output) == (0, acknowledge(ticks)), run.log
    return [line.partition(' httpok: ')[2] for line in run.log.splitlines()], run.log


def mail_to(inbox: CommandInbox) -> list[str]:
    """Return the options that send all mail to an inbox."""
    return ['-m', 'bob@example.com', '-s', inbox.command]


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


def test_the_first_lines_of_the_log() -> None:
    with Site() as site:
        lines, _ = serve(1, '-p', 'web', '-b', '', site.url())
    assert lines[0] == (f'httpok {__version__}: checks {site.url()} (timeout 10s, expects status 200); restarts web; '
                        'no mail')
    assert lines[1] == 'warning: ignored option -b: its value is empty'
    assert lines[2].startswith(f'warning: supervisord at {NO_SUPERVISORD} does not answer ')
    assert len(lines) == 3


def test_failed_checks_are_only_logged_without_an_address() -> None:
    with Site(response(status='500 No')) as site:
        lines, _ = serve(4, '--failures=2', site.url())
    assert lines[1:] == [f'{site.url()}: {BAD_LINE} (failed check 1 of 2)', f'{site.url()}: {BAD_LINE}'] * 2


def test_a_hostile_reason_phrase_stays_one_line_of_log_and_mail(inbox: CommandInbox) -> None:
    with Site(response(status='500 a\x1b[2J\x07\rBcc: eve@example.com\x85\x0b' + 'x' * 3000)) as site:
        _, log = serve(1, *mail_to(inbox), site.url())
    lines = log.splitlines()[1:]
    assert len(lines) == 2 and 'status 500 a' in lines[0]
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    mail, = inbox.mails
    assert mail['Bcc'] is None
    assert all(line.isprintable() and len(line) < 500 for line in mail.get_content().split('\n'))


PASSWORD = 's3cr#t!'
PAIR = base64.b64encode(f'bob:{PASSWORD}'.encode()).decode()


@pytest.mark.parametrize(('way', 'answer'), [
    ('URL', response(status='401 Unauthorized')), ('environment', b''), ('file', response())])
def test_a_password_is_never_logged_or_mailed(way: str, answer: bytes, tmp_path: Path, inbox: CommandInbox) -> None:
    argv = ['-b', 'fine', '-p', 'web']
    environment: dict[str, str] = {}
    user = {'URL': 'bob:s3cr%23t%21@', 'environment': 'bob@', 'file': ''}[way]
    if way == 'environment':
        environment['SUPERLANCE_HTTP_PASSWORD'] = PASSWORD
    elif way == 'file':
        (tmp_path / 'headers').write_text(f'Authorization: Basic {PAIR}\n', 'utf-8')
        argv.append(f'--header=@{tmp_path}/headers')
    with Site(answer) as site:
        url = site.url(user=user)
        _, log = serve(1, '-v', *argv, *mail_to(inbox), url, environment=environment)
        once = run_in_process(lambda: httpok.main(['--once', *argv, url]), environment=environment)
        assert all(f'Authorization: Basic {PAIR}\r\n' in request for request in site.requests)
        assert len(site.requests) == 2
    assert (once.status, once.log) == (1, '')
    mail, = inbox.mails
    for text in (log, read(tmp_path / 'inbox'), str(mail['Subject']), once.output.decode('utf-8')):
        assert site.url(user={'URL': 'bob:***@'}.get(way, user)) in text
        assert not any(secret in text for secret in ('s3cr', PAIR))
