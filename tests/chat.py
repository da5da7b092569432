"""A chat server on loopback that receives a webhook's messages."""
from __future__ import annotations

import json
import socket
import ssl
import threading
from typing import Any

from support import TIMEOUT, accept_all, wait_for
from web import Answer, response


class Chat:
    """Answers one request after another with the answers, and then always with the last one.

    messages are the JSON values it received, requests the heads of their requests.
    """

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self._answers = answers or (response(),)
        self._tls = tls
        self._lock = threading.Lock()
        self.requests: list[str] = []
        self.bodies: list[str] = []
        self._server = socket.socket()
        self._server.bind(('127.0.0.1', 0))
        self._server.listen(50)
        self.port = self._server.getsockname()[1]

    def __enter__(self) -> Chat:
        accept_all(self._server, self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def url(self, path: str = '/hooks/T0PSECRET/k3yk3yk3y?token=t0kent0ken') -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}{path}"

    @property
    def messages(self) -> list[Any]:
        return [json.loads(body) for body in self.bodies]

    @property
    def subjects(self) -> list[str]:
        return [message['text'].partition('\n')[0] for message in self.messages]

    def wait(self, number: int = 1, timeout: float = TIMEOUT) -> list[Any]:
        """Wait until number messages have been received, and return all."""
        wait_for(lambda: len(self.bodies) >= number, lambda: f'{number} messages; received: {self.bodies}', timeout)
        return self.messages

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(TIMEOUT)
        if self._tls:
            client = self._tls.wrap_socket(client, server_side=True)
        with client, client.makefile('rb') as stream:
            head = b''
            while not head.endswith(b'\r\n\r\n'):
                line = stream.readline()
                if not line:
                    return
                head += line
            headers = dict(line.split(': ', 1) for line in head.decode('latin-1').splitlines()[1:-1])
            body = stream.read(int(headers['Content-Length'])).decode('ascii')
            with self._lock:
                answer = self._answers[min(len(self.bodies), len(self._answers) - 1)]
                self.requests.append(head.decode('latin-1'))
                self.bodies.append(body)
            if isinstance(answer, bytes):
                client.sendall(answer)
            else:
                answer(client)
