"""A shim of Ollama's API over llama.cpp's server: a stand-in where no Ollama binary can be had, not Ollama.

Made after ``docs/api.md`` and ``api/types.go`` of ollama/ollama. As there, ``prompt_eval_count`` counts the whole
prompt, cached or not, so that reuse shows only in ``prompt_eval_duration``. A model that is created with an adapter is
the backend's own with the LoRA of equal bytes, which it has to be started with.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

MODEL = "smollm2:135m"
#: Ollama's options by the names that llama.cpp's server gives them.
OPTIONS = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop": "stop",
}


#: Ends of the durations that Go's time.ParseDuration takes, which reads a keep_alive that is a string.
UNITS = ("ns", "us", "ms", "s", "m", "h")


class OllamaShim:
    """``with OllamaShim(llama_address) as shim:`` serves at ``shim.url``; ``shim.bodies``: what it was asked for."""

    def __init__(self, backend: str) -> None:
        self.bodies: list[dict[str, Any]] = []
        #: Models by their names, each with the digest of its adapter's blob.
        self.models: dict[str, str | None] = {MODEL: None, MODEL.partition(":")[0]: None}
        self.blobs: set[str] = set()
        self._backend = httpx.Client(base_url=backend, timeout=120)
        shim = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/api/version":
                    self._json({"version": "0.0.0-shim"})
                elif self.path in ("/api/tags", "/api/ps"):
                    names = [name if ":" in name else f"{name}:latest" for name in shim.models]
                    models = [{"name": name, "model": name, "size": 0, "digest": "0" * 64} for name in names]
                    self._json({"models": models})
                else:
                    self._json({"error": "404 page not found"}, 404)

            def do_DELETE(self) -> None:
                name = json.loads(self.rfile.read(int(self.headers["content-length"])))["model"]
                if shim.models.pop(name, MODEL) == MODEL:
                    self._json({"error": f"model '{name}' not found"}, 404)
                else:
                    self._json({})

            def _blob(self, data: bytes) -> None:
                told = self.path.rpartition(":")[2]
                if hashlib.sha256(data).hexdigest() != told:
                    self._json({"error": "digest mismatch"}, 400)
                else:
                    shim.blobs.add(told)
                    self._json({}, 201)

            def _create(self, body: Mapping[str, Any]) -> None:
                digests = [digest.removeprefix("sha256:") for digest in body["adapters"].values()]
                if body["from"] not in shim.models:
                    self._json({"error": f"model '{body['from']}' not found"}, 404)
                elif not shim.blobs.issuperset(digests) or len(digests) != 1:
                    self._json({"error": "blob not found"}, 400)
                else:
                    shim.models[body["model"]] = digests[0]
                    self._json({"status": "success"})

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                if self.path.startswith("/api/blobs/"):
                    self._blob(raw)
                    return
                body = json.loads(raw)
                if self.path == "/api/create":
                    self._create(body)
                    return
                if self.path != "/api/show":
                    shim.bodies.append(body)
                if body.get("model") not in shim.models:
                    self._json({"error": f"model '{body.get('model')}' not found"}, 404)
                elif isinstance(keep := body.get("keep_alive"), str) and not keep.endswith(UNITS):
                    self._json({"error": f'time: missing unit in duration "{keep}"'}, 400)
                elif self.path == "/api/show":
                    self._json({"details": {"family": "llama"}, "model_info": {"llama.context_length": 8192}})
                elif self.path == "/api/embed":
                    self._embed(body)
                elif self.path == "/api/chat":
                    self._chat(body)
                else:
                    self._json({"error": "404 page not found"}, 404)

            def _embed(self, body: Mapping[str, Any]) -> None:
                reply = shim._backend.post("/v1/embeddings", json={"input": body["input"], "model": MODEL}).json()
                self._json({"model": MODEL, "embeddings": [row["embedding"] for row in reply["data"]]})

            def _chat(self, body: Mapping[str, Any]) -> None:
                if not body["messages"]:
                    self._json({**_line(""), "done": True, "done_reason": "load"})
                    return
                lines = shim._lines(body)
                if not body.get("stream", True):
                    parts = list(lines)
                    text = "".join(part["message"]["content"] for part in parts)
                    self._json({**parts[-1], "message": {**parts[-1]["message"], "content": text}})
                    return
                self.send_response(200)
                self.send_header("content-type", "application/x-ndjson")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                try:
                    for line in lines:
                        data = json.dumps(line).encode() + b"\n"
                        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                        self.wfile.flush()
                    self.wfile.write(b"0\r\n\r\n")
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def _json(self, payload: Mapping[str, Any], status: int = 200) -> None:
                data = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json; charset=utf-8")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """The shim's address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def _lines(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The NDJSON lines of a chat: pieces, then the line that says ``done`` with the counts."""
        started = time.monotonic()
        options = {OPTIONS[name]: value for name, value in body.get("options", {}).items() if name in OPTIONS}
        ask = {
            "messages": [_message(message) for message in body["messages"]],
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_prompt": True,
            "lora": self._loras(body["model"]),
            **options,
        }
        reason = "stop"
        usage: dict[str, Any] = {}
        timings: dict[str, Any] = {}
        with self._backend.stream("POST", "/v1/chat/completions", json=ask) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                usage, timings = event.get("usage") or usage, event.get("timings") or timings
                for choice in event["choices"]:
                    reason = choice.get("finish_reason") or reason
                    if text := choice["delta"].get("content"):
                        yield _line(text)
        yield {
            **_line(""),
            "done": True,
            "done_reason": reason,
            "total_duration": int((time.monotonic() - started) * 1e9),
            "load_duration": 1_000_000,
            "prompt_eval_count": timings["cache_n"] + timings["prompt_n"],
            "prompt_eval_duration": int(timings["prompt_ms"] * 1e6),
            "eval_count": usage["completion_tokens"],
            "eval_duration": int(timings["predicted_ms"] * 1e6),
        }

    def _loras(self, model: str) -> list[dict[str, Any]]:
        """The backend's adapters with the scale that this model wants of them."""
        wanted = self.models[model]
        told = self._backend.get("/lora-adapters").json()
        digests = {one["id"]: hashlib.sha256(Path(one["path"]).read_bytes()).hexdigest() for one in told}
        return [{"id": number, "scale": float(digest == wanted)} for number, digest in digests.items()]

    def __enter__(self) -> OllamaShim:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._backend.close()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": message.get("content") or ""}


def _line(text: str) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"model": MODEL, "created_at": now, "message": {"role": "assistant", "content": text}, "done": False}
