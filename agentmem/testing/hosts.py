"""Stand-ins for hosted models on a loopback port, with each vendor's prompt-cache rules: for the real SDKs, offline.

`HostServer` speaks OpenAI's Chat Completions, Responses and embeddings, Anthropic's Messages and Ollama's API. Knows
sockets and which format answers on which path; what a cache does is in host_cache.py, the formats in host_<vendor>.py.
"""

from __future__ import annotations

import http.server
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, cast

from ..cache_rules import CacheRules, rules_for
from ..types import Usage
from . import host_ollama
from .host_anthropic import Messages
from .host_cache import HostCaches, Prompt, Visit, tokens_of
from .host_exchange import Answer, HostRequest, Refused, Wire, chosen
from .host_openai import ChatCompletions, embeddings
from .host_responses import Responses

__all__ = ["HostRequest", "HostServer"]

#: Seconds between two looks at whether the server is to stop.
POLL_S = 0.02


class HostServer:
    """``with HostServer(clock=FakeClock()) as host:`` answers on a loopback port until the block ends.

    ``reply`` is what the model says: a text, or a function of the request's body that returns a text or a dict with
    ``text``, ``tool_calls`` ([{name, arguments}]), ``refusal`` and ``thinking``. It may be set at any time.
    ``requests`` holds what came, in order, with the usage that was told.

    ``clock`` gives Unix seconds: it decides what has expired. ``delay_s`` are real seconds before the first byte of an
    answer; until then no other request can read what this one writes. ``rules`` gives a model's cache rules, by default
    those of the SDK's table; ``openai`` is the vendor whose rules and usage fields the OpenAI paths follow.
    ``strict=False`` takes fields there that compatible servers know and OpenAI refuses. ``spills`` sends what comes on
    one routing key beyond the rules' number a minute elsewhere.

    Tokens are those of o200k_base, block by block, whatever the model. Nothing here leaves the machine.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        reply: Any = "Understood.",
        delay_s: float = 0.0,
        rules: Callable[[str], CacheRules | None] = rules_for,
        openai: str = "openai",
        strict: bool = True,
        spills: bool = False,
    ) -> None:
        self.reply = reply
        self.delay_s = delay_s
        self.requests: list[HostRequest] = []
        self._clock = clock
        self._rules = rules
        self._caches = HostCaches(spills=spills)
        self._answered: dict[str, Prompt] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._responses, self._messages = Responses(), Messages()
        chat = ChatCompletions(vendor=openai, strict=strict)
        self._wires: dict[str, tuple[Wire, str, str]] = {  # the vendor in the table of rules, how its ids begin
            chat.path: (chat, openai, "chatcmpl-"),
            self._responses.path: (self._responses, openai, "resp_"),
            self._messages.path: (self._messages, "anthropic", "msg_"),
            host_ollama.Chat.path: (host_ollama.Chat(), "ollama", ""),
        }
        self._server = _Server(self._answer)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), daemon=True)

    @property
    def openai_url(self) -> str:
        """What ``base_url`` of an OpenAI client is to be. Give agentmem's own provider ``host="openai"`` beside it: at
        an address that is not OpenAI's it takes nothing for granted."""
        return f"{self.anthropic_url}/v1"

    @property
    def anthropic_url(self) -> str:
        """What ``base_url`` of an Anthropic client is to be."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def ollama_url(self) -> str:
        """What ``host`` of an Ollama client is to be."""
        return self.anthropic_url

    def __enter__(self) -> HostServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, out: _Handler, path: str, body: Any, headers: Mapping[str, str]) -> None:
        noted = HostRequest(path=path, body=body, headers=headers, at=self._clock())
        with self._lock:
            self.requests.append(noted)
        wire = self._wire(path)
        try:
            if path in self._wires:
                self._chat(out, noted, *self._wires[path])
            else:
                out.whole(200, self._side(path, body, headers))
        except Refused as refused:
            noted.status = refused.status
            out.whole(refused.status, wire.refusal(refused))

    def _wire(self, path: str) -> Wire:
        name = (
            "/api/chat" if path.startswith("/api") else self._messages.path if "messages" in path else "/v1/responses"
        )
        return self._wires[name][0]

    def _side(self, path: str, body: Any, headers: Mapping[str, str]) -> dict[str, Any]:
        """The routes beside a chat."""
        if path == "/v1/responses/input_tokens":
            counted = self._responses.count(body, headers, self._rules(f"openai:{body.get('model')}"))
            return {"object": "response.input_tokens", "input_tokens": sum(tokens_of(p.content) for p in counted)}
        if path == "/v1/messages/count_tokens":
            counted = self._messages.count(body, headers, self._rules(f"anthropic:{body.get('model')}"))
            return {"input_tokens": sum(tokens_of(piece.content) for piece in counted)}
        sides: dict[str, Callable[[], dict[str, Any]]] = {
            "/v1/embeddings": lambda: embeddings(body),
            "/v1/models": lambda: {"object": "list", "data": []},
            "/api/embed": lambda: host_ollama.embed(body),
            "/api/show": lambda: host_ollama.show(body),
            "/api/tags": host_ollama.tags,
            "/api/ps": host_ollama.tags,
            "/api/version": lambda: {"version": "0.12.0"},
        }
        if path not in sides:
            raise Refused(f"no such route: {path}", status=404, kind="not_found_error")
        return sides[path]()

    def _chat(self, out: _Handler, noted: HostRequest, wire: Wire, vendor: str, prefix: str) -> None:
        if not isinstance(noted.body, dict):
            raise Refused("the body must be a JSON object")
        rules = self._rules(f"{vendor}:{noted.body.get('model')}")
        prompt = wire.read(noted.body, noted.headers, rules)
        answer = chosen(self.reply, noted.body, prompt)
        visit = self._caches.visit(rules, prompt, self._clock())
        with self._lock:
            name = f"{prefix}{next(self._numbers)}"
            earlier = self._answered.get(prompt.previous or "")
            self._answered[name] = prompt
        miss = wire.miss(prompt, visit, earlier)
        noted.prompt, noted.usage, noted.miss = prompt, _told(visit, answer), _reason(miss)
        if self.delay_s:
            time.sleep(self.delay_s)
        visit.began()
        if prompt.stream:
            out.stream(wire.stream_type, wire.events(noted.body, answer, visit, name, miss))
        else:
            out.whole(200, wire.whole(noted.body, answer, visit, name, miss))


def _told(visit: Visit, answer: Answer) -> Usage:
    return Usage(
        input_tokens=visit.tokens,
        cached_tokens=visit.read,
        written_tokens=sum(visit.written),
        written_long_tokens=sum(visit.written[1:]),
        output_tokens=answer.tokens,
    )


def _reason(miss: Any) -> str | None:
    """The word for a miss in either vendor's diagnosis."""
    if not miss:
        return None
    told = miss.get("cache_miss_reason") or miss
    kind = told.get("reason") or told.get("type")
    return None if kind == "cache_hit" else kind


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, answer: Callable[[_Handler, str, Any, Mapping[str, str]], None]) -> None:
        self.answer = answer
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error; what else goes wrong was answered with 500."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer one request."""
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            self.whole(400, {"error": {"message": "the body is no JSON", "type": "invalid_request_error"}})
            return
        try:
            cast(_Server, self.server).answer(self, self.path.partition("?")[0], body, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception as error:  # noqa: BLE001 - a fault of the test's reply function: told, not hidden
            self.whole(500, {"error": {"message": f"the stand-in failed: {error!r}", "type": "server_error"}})

    do_GET = do_POST  # noqa: N815 - the library's name

    def whole(self, status: int, payload: Any) -> None:
        """A JSON reply."""
        content = json.dumps(payload).encode()
        self._head(status, "application/json", "content-length", str(len(content)))
        self.wfile.write(content)

    def stream(self, kind: str, events: Iterable[bytes]) -> None:
        """A chunked reply."""
        self._head(200, kind, "transfer-encoding", "chunked")
        for event in events:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, kind: str, name: str, value: str) -> None:
        self.send_response(status)
        for header, content in (
            ("content-type", kind),
            ("request-id", "req_1"),
            ("x-request-id", "req_1"),
            (name, value),
        ):
            self.send_header(header, content)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
