"""The webhook: one attempt to post a notice as a chat message, in the JSON that Slack has made common.

Sources, by which the text is escaped and limited:
- Slack: &, < and >, and nothing else, are written as HTML entities (https://api.slack.com/docs/message-formatting);
  <!channel> would notify everybody. More than 4,000 characters are split. Status 429 comes with Retry-After.
- Mattermost: https://developers.mattermost.com/integrate/webhooks/incoming/, and its app/slack.go: <!channel> as in
  Slack, and @channel, @all and @NAME in the text notify. 16,383 characters.
- Google Chat: https://developers.google.com/chat/format-messages: <users/all> notifies everybody. 32,000 bytes.
- Rocket.Chat: accepts Slack's format (its pull request 1613); @all in the text notifies. 5,000 characters by default.
- Discord, URL/slack: https://discord.com/developers/docs/resources/webhook#execute-slackcompatible-webhook. @everyone
  notifies, unless a zero-width space follows the @ (its pull request 1248). 2,000 characters.
"""
from __future__ import annotations

import json
import re
import time

from superlance.command import Deadline, SecondsLeft
from superlance.fetch import FetchFailed, Request, Target, fetch, make_tls_context
from superlance.listener import one_line
from superlance.notice import Notice, SendFailed, hide, make_body, make_origin
from superlance.rpc import Unknown

POST_SECONDS = 30
TEXT_LIMIT = 1900       # characters
SUBJECT_LIMIT = 1500
ORIGIN_LIMIT = 200
TRUNCATED = ' [truncated]'
LONGEST_RETRY_AFTER_SECONDS = 3600


def make_text(program: str, notice: Notice) -> str:
    """Return the text of a message: the subject, the body and the origin. If it is too long, the body is truncated."""
    subject = _truncate(_escape(one_line(notice.subject)), SUBJECT_LIMIT)
    origin = _truncate(_escape(make_origin(program, notice)), ORIGIN_LIMIT)
    body = _truncate(_escape(make_body(notice)), TEXT_LIMIT - len(subject) - len(origin) - 2 * len('\n\n'))
    return '\n\n'.join(filter(None, (subject, body, origin)))


def _escape(text: str) -> str:
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;').replace('@', '@\u200b')


def _truncate(escaped: str, limit: int) -> str:
    """Return at most limit characters of an escaped text, with no incomplete entity at the end."""
    if len(escaped) <= limit:
        return escaped
    return re.sub(r'(?:&[a-z]*|@)\Z', '', escaped[:limit - len(TRUNCATED)]) + TRUNCATED


def post(target: Target, program: str, notice: Notice, seconds_left: SecondsLeft) -> str:
    """Post a notice; return the status line. A redirect is a rejection.

    seconds_left is how much time the listener has; an attempt has a deadline of its own. Raises SendFailed, which
    contains no part of the URL.
    """
    deadline = Deadline(POST_SECONDS)
    secrets = {target.host, target.path, *re.split(r'[/?&=]', target.path)}
    try:
        request = Request(target, 'POST', (('Content-Type', 'application/json; charset=UTF-8'),),
                          json.dumps({'text': make_text(program, notice)}).encode('ascii'),
                          tls_context=make_tls_context(verify=True) if target.tls else None)
        response = fetch(request, lambda: min(deadline.seconds_left(), seconds_left()))
    except (FetchFailed, Unknown, OSError) as why:  # OSError: the CA certificates can't be read
        raise SendFailed(hide(one_line(why), secrets)) from None
    answer = hide(response.status_line, secrets)
    if 200 <= response.status < 300:
        return answer
    # Slack says why in one word, such as no_service. Other bodies may repeat the URL.
    word = response.excerpt.decode('ascii', 'replace').strip()
    if re.fullmatch('[a-z_]{3,40}', word) and word not in target.path:
        answer += f': {word}'
    if response.status == 429:
        raise SendFailed(answer, pause_seconds=parse_retry_after(response.headers.get('Retry-After', ''), time.time()))
    raise SendFailed(answer, permanent=response.status < 500)


def parse_retry_after(text: str, now: float) -> float:
    """Return the seconds of a Retry-After header, at least 1 and at most an hour; 0 if it is missing or invalid.

    It is a number of seconds or a date (RFC 9110, 10.2.3).
    """
    from email.utils import parsedate_to_datetime

    try:
        seconds = (float(text) if re.fullmatch(r'\d{1,10}(\.\d*)?', text.strip(), re.ASCII)
                   else parsedate_to_datetime(text).timestamp() - now)
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0
    return min(max(seconds, 1.0), LONGEST_RETRY_AFTER_SECONDS)
