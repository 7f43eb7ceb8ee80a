"""Finding a local model, its header, and converting a GGUF file once, whatever happens meanwhile."""

from __future__ import annotations

import errno
import importlib
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import ConfigError, Full, StoreError

_local_model = importlib.import_module("agentmem.adapters.providers._local_model")
Settings, context_tokens, find, prepare = (
    getattr(_local_model, name) for name in ("Settings", "context_tokens", "find", "prepare")
)


def gguf(path: Path, *values: tuple[str, int, bytes]) -> Path:
    """A GGUF header with these (key, type, packed value)."""
    body = b"".join(struct.pack("<Q", len(k)) + k.encode() + struct.pack("<I", kind) + raw for k, kind, raw in values)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + body)
    return path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def test_the_window_is_read_from_a_gguf_header(tmp_path: Path) -> None:
    values = [
        ("general.architecture", 8, string("llama")),
        ("some.flag", 7, b"\1"),
        ("some.words", 9, struct.pack("<IQ", 8, 2) + string("a") + string("bc")),
        ("some.numbers", 9, struct.pack("<IQ", 5, 3) + bytes(12)),
        ("llama.context_length", 4, struct.pack("<I", 8192)),
    ]
    assert context_tokens(gguf(tmp_path / "m.gguf", *values)) == 8192
    assert context_tokens(gguf(tmp_path / "n.gguf", *values[:-1])) is None


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK\3\4" + bytes(40), b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + b"\xff" * 64]
)
def test_a_file_that_is_no_gguf_is_a_named_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="GGUF"):
        context_tokens(path)


def test_a_folder_must_hold_a_config_and_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match="safetensors"):
        find(str(tmp_path))


def test_a_broken_config_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        context_tokens(tmp_path)


def test_the_cache_folder_is_the_setting_then_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGENTMEM_CACHE", str(tmp_path / "environment"))
    assert Settings.parse({"cache_dir": tmp_path / "given"}).cache_dir == tmp_path / "given"
    assert Settings.parse({}).cache_dir == tmp_path / "environment"
    monkeypatch.delenv("AGENTMEM_CACHE")
    assert Settings.parse({}).cache_dir == Path.home() / ".cache" / "agentmem"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by one that writes a file slowly; the list gets each target folder."""
    done: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        folder.mkdir()
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")
        done.append(folder)

    monkeypatch.setattr(_local_model, "_convert", convert)
    return done


def test_a_file_is_converted_once_by_all_who_need_it(tmp_path: Path, conversions: list[Path]) -> None:
    path = gguf(tmp_path / "m.gguf")
    settings = Settings.parse({"cache_dir": tmp_path / "cache"})
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(path, settings))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(set(found)) == 1
    assert (found[0] / "config.json").is_file()
    assert prepare(path, settings) == found[0]
    assert len(conversions) == 1


def test_other_bytes_are_another_model(tmp_path: Path, conversions: list[Path]) -> None:
    settings = Settings.parse({"cache_dir": tmp_path / "cache"})
    first = prepare(gguf(tmp_path / "m.gguf"), settings)
    second = prepare(gguf(tmp_path / "m.gguf", ("a", 7, b"\1")), settings)
    assert first != second


def test_what_a_killed_process_left_is_swept_and_done_again(tmp_path: Path, conversions: list[Path]) -> None:
    path = gguf(tmp_path / "m.gguf")
    settings = Settings.parse({"cache_dir": tmp_path / "cache"})
    folder = prepare(path, settings)
    left = folder.with_name(folder.name + ".part-99999")
    folder.rename(left)
    assert prepare(path, settings) == folder
    assert not left.exists()
    assert len(conversions) == 2


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, Full), (errno.EACCES, StoreError)])
def test_a_disk_that_refuses_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def convert(path: Path, folder: Path) -> Any:
        folder.mkdir()
        raise OSError(number, "refused")

    monkeypatch.setattr(_local_model, "_convert", convert)
    with pytest.raises(expected):
        prepare(gguf(tmp_path / "m.gguf"), Settings.parse({"cache_dir": tmp_path / "cache"}))
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]
