"""A double of vLLM's server as far as LoRAs go: written after its docs and sources, not vLLM itself.

``docs/features/lora.md`` and ``vllm/entrypoints/openai/models``: the two routes are there only where the server was
started with VLLM_ALLOW_RUNTIME_LORA_UPDATING; they answer in plain text, errors in OpenAI's form; a LoRA is then a
model of its own name. What it answers is the name of the model that was asked for.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

BASE = "base-model"


class VllmDouble:
    """``with VllmDouble() as server:`` serves at ``server.url``; ``server.loaded``: LoRA names and their folders,
    ``server.seen``: how each request authorised itself. While ``server.refuses`` it answers 401."""

    def __init__(self, *, allowed: bool = True) -> None:
        self.loaded: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.seen: list[str] = []
        self.refuses = False
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                double.seen.append(self.headers.get("authorization", ""))
                if double.refuses:
                    self._error(401, "Unauthorized", "AuthenticationError")
                    return
                models = [
                    {"id": BASE, "object": "model", "created": 0, "owned_by": "vllm", "root": BASE, "parent": None}
                ]
                models += [
                    {"id": name, "object": "model", "created": 0, "owned_by": "vllm", "root": root, "parent": BASE}
                    for name, root in double.loaded.items()
                ]
                self._json({"object": "list", "data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                verb = self.path.rpartition("/")[2]
                if verb == "completions":
                    self._chat(body)
                elif not allowed:
                    self._json({"detail": "Not Found"}, 404)
                elif verb == "load_lora_adapter":
                    self._load(body["lora_name"], body["lora_path"])
                elif verb == "unload_lora_adapter":
                    self._unload(body["lora_name"])

            def _load(self, name: str, path: str) -> None:
                if name in double.loaded:
                    self._error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
                elif not (Path(path) / "adapter_config.json").is_file():
                    self._error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
                else:
                    double.loaded[name] = path
                    self._text(f"Success: LoRA adapter '{name}' added successfully.")

            def _unload(self, name: str) -> None:
                if double.loaded.pop(name, None) is None:
                    self._error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
                else:
                    self._text(f"Success: LoRA adapter '{name}' removed successfully.")

            def _chat(self, body: dict[str, Any]) -> None:
                double.bodies.append(body)
                if body["model"] not in (BASE, *double.loaded):
                    self._error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
                    return
                message = {"role": "assistant", "content": f"answered by {body['model']}"}
                self._json(
                    {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": body["model"],
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
                    }
                )

            def _error(self, status: int, message: str, kind: str) -> None:
                self._json({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)

            def _json(self, payload: object, status: int = 200) -> None:
                self._send(json.dumps(payload).encode(), status, "application/json")

            def _text(self, text: str) -> None:
                self._send(text.encode(), 200, "text/plain; charset=utf-8")

            def _send(self, data: bytes, status: int, kind: str) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
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
        """The server's address, without a path."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> VllmDouble:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
