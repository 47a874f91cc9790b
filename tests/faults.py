"""An S3 server on this machine, and a proxy before it that answers as bad networks do."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

HANG_SECONDS = 4.0


@dataclass(frozen=True)
class Request:
    """A request that passes the proxy."""

    method: str
    path: str


Fault = Callable[[Request], "int | str | None"]
"""Status to answer with; or 'cut' (the connection ends within the body), 'short' (a body that is
complete for HTTP and lacks its second half), 'hang' (the answer comes too late); None passes."""


class S3:
    """Moto's S3 server behind the proxy."""

    def __init__(self) -> None:
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self.fault: Fault = lambda request: None
        self.requests: list[Request] = []
        self.authorizations: list[str] = []
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        """URL of the proxy."""
        return f"http://127.0.0.1:{self._proxy.server_address[1]}"

    def make_bucket(self, name: str) -> None:
        """Create a bucket."""
        status, _, _ = self.forward("PUT", f"/{name}", {}, None)
        assert status == 200

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Hand a request on to the server."""
        connection = http.client.HTTPConnection(*self._moto.get_host_and_port())
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def reset(self) -> None:
        """Forget faults and requests."""
        self.fault = lambda request: None
        self.reset_requests()

    def reset_requests(self) -> None:
        """Forget requests."""
        self.requests.clear()
        self.authorizations.clear()

    def stop(self) -> None:
        """End both servers."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()


class Once:
    """A fault for the first request of each method and object."""

    def __init__(self, *kinds: int | str, methods: tuple[str, ...] = ("GET", "PUT", "HEAD")):
        self._kinds, self._methods = kinds, methods
        self._seen: set[Request] = set()
        self._lock = threading.Lock()
        self.count = 0

    def __call__(self, request: Request) -> int | str | None:
        with self._lock:
            if request in self._seen or request.method not in self._methods:
                return None
            self._seen.add(request)
            kind = self._kinds[self.count % len(self._kinds)]
            self.count += 1
            return kind


def _handler(server: S3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else None
            request = Request(self.command, self.path)
            server.requests.append(request)
            server.authorizations.append(self.headers.get("Authorization", ""))
            fault = server.fault(request)
            if isinstance(fault, int):
                # Real servers repeat the session token in the answer that refuses it.
                token = self.headers.get("X-Amz-Security-Token", "")
                text = (
                    "<Error><Code>Injected</Code><Message>a bad day</Message>"
                    f"<Token-0>{token}</Token-0></Error>"
                ).encode()
                self._answer(fault, [], text, len(text))
                return
            if fault == "hang":
                time.sleep(HANG_SECONDS)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            status, found, content = server.forward(self.command, self.path, headers, body)
            length = len(content)
            if self.command == "HEAD":
                length = int(dict(found).get("Content-Length", 0))
            elif fault == "short":
                content = content[: length // 2]
                length = len(content)
            elif fault == "cut":
                content = content[: length // 2]
                self.close_connection = True
            self._answer(status, found, content, length)

        def _answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, length: int
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                self.close_connection = True  # the client gave up waiting

        def log_message(self, *args: object) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    return Handler
