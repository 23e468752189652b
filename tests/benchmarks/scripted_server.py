"""A scripted OpenAI-compatible server for the clients' own tests: one token an event."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Script:
    """How the server behaves, and what it saw."""

    pause: float = 0.0  # seconds before each token
    fail_after: int | None = None  # tokens, then an error event
    cut_after: int | None = None  # tokens, then the connection closes
    status: int = 200
    bodies: list[dict] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    script: Script

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _json(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._json(200, {"tokens": list(body["prompt"].encode())})
        elif self.path == "/detokenize":
            self._json(200, {"prompt": bytes(body["tokens"]).decode(errors="replace")})
        elif self.script.status != 200:
            self._json(self.script.status, {"error": {"message": "scripted refusal"}})
        else:
            self.script.bodies.append(body)
            try:
                self._stream(body)
            except BrokenPipeError:  # the client gave up, as some tests want
                self.close_connection = True

    def _event(self, data: str) -> None:
        raw = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")

    def _stream(self, body: dict) -> None:
        script, chat = self.script, "messages" in body
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self._event('{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}')
        for number in range(body["max_tokens"]):
            if number == script.fail_after:
                self._event('{"error":{"message":"scripted fault"}}')
                break
            if number == script.cut_after:
                self.close_connection = True
                return
            time.sleep(script.pause)
            text = {"delta": {"content": f"w{number} "}} if chat else {"text": f"w{number} "}
            self._event(json.dumps({"choices": [{"index": 0, **text, "finish_reason": None}]}))
        prompt = len(body.get("prompt") or body["messages"][0]["content"])
        usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
        self._event(json.dumps({"choices": [], "usage": usage}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def scripted_server(script: Script) -> Iterator[str]:
    """Serves `script` on a free loopback port; gives the base URL."""
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
