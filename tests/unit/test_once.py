"""--once of each command, in this process."""
from __future__ import annotations

import re
import socket
from importlib import import_module
from pathlib import Path
from typing import Any, Iterator

import pytest
from chat import Chat
from inbox import CommandInbox
from support import NO_SUPERVISORD, run_in_process
from web import Answer, Site, hang, response

from superlance import crashmail

SECRETS = ('T0PSECRET', 'k3yk3yk3y', 't0kent0ken', 's3cret')


def call(script: str, *argv: str, **environment: str) -> tuple[int, str, str]:
    """Run a script without a supervisord around it; return its exit status and what it printed on stdout and stderr."""
    run = run_in_process(lambda: import_module(f'superlance.{script}').main(argv),
                         environment={'SUPERVISOR_SERVER_URL': '', **environment})
    return run.status, run.output.decode('utf-8'), run.log


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that refuses connections."""
    with socket.socket() as reserved:
        reserved.bind(('127.0.0.1', 0))
        yield reserved.getsockname()[1]


# supervisord.

@pytest.mark.parametrize('script', ['memmon', 'httpok', 'crashmail'])
def test_once_with_a_configuration_that_is_missing(script: str, inbox: CommandInbox) -> None:
    with Site() as site:
        arguments = {'memmon': ['-a', '1MB'], 'httpok': ['-p', 'web', site.url()],
                     'crashmail': ['-m', 'bob@example.com', '-s', inbox.command]}[script]
        status, out, err = call(script, '--once', *arguments, '--configuration=missing.conf')
        assert not site.requests
    assert (status, out) == (2, '')
    assert err.startswith(f'{script}: option --configuration: ') and 'missing.conf' in err
    assert err.endswith(f"; try '{script} --help'\n") and err.count('\n') == 1
    assert not inbox.mails


def test_once_with_a_supervisord_that_does_not_run(tmp_path: Path) -> None:
    configuration = tmp_path / 'x.conf'
    configuration.write_text('[supervisorctl]\nserverurl=unix://%(here)s/none.sock\n', 'utf-8')
    expected = f'warning: supervisord at unix://{tmp_path}/none.sock does not answer '
    for options, environment in ([f'--configuration={configuration}'], {}), (
            [], {'SUPERVISOR_SERVER_URL': f'unix://{tmp_path}/none.sock'}):
        status, out, err = call('memmon', '--once', '-a', '1MB', *options, **environment)
        assert (status, err) == (1, '')
        assert out.startswith(expected) and out.count('\n') == 1
    with Site() as site:
        status, out, err = call('httpok', '--once', '-p', 'web', site.url(), SUPERVISOR_SERVER_URL=NO_SUPERVISORD)
    assert (status, err) == (1, '')
    assert f'\nverdict  ok\nwarning: supervisord at {NO_SUPERVISORD} does not answer ' in out


# httpok.

def test_once_of_a_good_response() -> None:
    with Site(response(b'fine', status='200 All Right')) as site:
        status, out, err = call('httpok', '--once', '-b', 'fine', site.url('/x'))
    assert (status, err) == (0, '')
    assert re.fullmatch(r"""url      {}
status   200 All Right
time     \d+\.\d{{3}}s
body     contains 'fine'
verdict  ok
""".format(re.escape(site.url('/x'))), out)


@pytest.mark.parametrize(('answer', 'argv', 'verdict'), [
    (response(), ['-b', 'fine'], "the body does not contain 'fine'"),
    (response(status='500 a\x1b\rb'), [], r'status 500 a\x1b | b (expected 200)'),
    (b'', [], 'Remote end closed connection without response'),
    (hang, ['-t', '0.2'], 'no complete response within 0.2s'),
])
def test_once_that_finds_a_fault(answer: Answer, argv: list[str], verdict: str) -> None:
    with Site(answer) as site:
        status, out, err = call('httpok', '--once', *argv, site.url())
    assert (status, err) == (1, '')
    assert out.splitlines()[-1] == f'verdict  {verdict}'


# Mail.

def test_once_sends_a_test_mail_and_says_that_supervisord_does_not_answer(inbox: CommandInbox) -> None:
    status, out, err = call('crashmail', '--once', '-m', 'bob@example.com,al@example.com', '-o', 'db1', '-s',
                            inbox.command + '; echo queued as 42', SUPERVISOR_SERVER_URL=NO_SUPERVISORD)
    assert (status, err) == (1, '')
    first, warning, sent = out.splitlines()
    assert 'reports crashes of every process; mail to bob@example.com, al@example.com through' in first
    assert warning.startswith(f'warning: supervisord at {NO_SUPERVISORD} does not answer ')
    assert sent.startswith('sent mail to bob@example.com, al@example.com') and sent.endswith(': queued as 42')
    assert inbox.subjects[0].startswith('db1: crashmail test at ')
    assert 'nothing has crashed.\n' in inbox.mails[0].get_content()


@pytest.mark.parametrize(('command', 'reason'), [
    ('echo no such user >&2; exit 67', 'exit status 67: no such user'),
    ('/nonexistent/sendmail -t', 'exit status 127'),
])
def test_once_reports_a_refusal(command: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashmail, 'check_once', lambda *_: [])     # all else is well
    status, out, err = call('crashmail', '--once', '-m', 'bob@example.com', '-s', command,
                            SUPERVISOR_SERVER_URL=NO_SUPERVISORD)
    assert (status, err) == (1, '')
    assert 'unable to send mail to bob@example.com' in out and reason in out


def test_once_says_what_mail_server_and_webhook_answered(dead_port: int) -> None:
    with Chat(response(b'no_service', status='404 Not Found')) as chat:
        status, out, err = call('crashmail', '--once', '-m', 'bob@example.com', '--webhook', chat.url(),
                                f'--smtp=smtp://robot:s3cret@127.0.0.1:{dead_port}')
    assert status == 1
    assert f'unable to send mail to bob@example.com: 127.0.0.1:{dead_port}: Connection refused\n' in out
    assert 'unable to send webhook message: 404 Not Found: no_service\n' in out
    assert not any(secret in out + err for secret in SECRETS)


@pytest.mark.parametrize('script', ['memmon', 'httpok', 'crashmail'])
def test_invalid_webhook_is_an_error_without_the_url(script: str) -> None:
    arguments: Any = {'memmon': ['-a', '1GB'], 'httpok': ['http://127.0.0.1/'], 'crashmail': []}[script]
    for status, out, err in (call(script, '--webhook', 'ftp://x/k3yk3yk3y', *arguments),
                             call(script, *arguments, SUPERLANCE_WEBHOOK='https://x:y/k3yk3yk3y')):
        assert (status, out, err.count('\n')) == (2, '', 1)
        assert 'write https://HOST/PATH' in err and 'k3y' not in err
