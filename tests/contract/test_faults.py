"""Every fault of the table against every adapter, sync and async, whole and streamed: real SDKs over real sockets.

What is owed: an error of our tree or an answer, never anything else; never more requests than the retries allow; the
deadline kept; nothing sent to another host; what was remembered before stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gc
import ipaddress
import json
import ssl
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory, errors
from agentmem.errors import AgentMemError, ProviderError, Unavailable
from agentmem.provider import Generation, load
from agentmem.testing import FAULTS, Fault, FaultServer, chat_request

KEY = "sk-test-0123456789abcdef"
REQUEST = chat_request("Say hello.", system="Be kind.", max_tokens=32)
TEXT = "Hello you"
RETRIES = 1
#: The deadline where a fault lasts for ever, and everywhere else.
SHORT_S, LONG_S = 0.4, 20.0
#: How far past its deadline a call may come back.
LATE_S = 0.5

#: (model, path of its base URL, settings) of each way to reach a host.
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chat": ("openai_compatible:m", "/v1", {}),
    "responses": ("openai:m", "/v1", {"host": "openai", "api": "responses"}),
    "anthropic": ("anthropic:m", "", {}),
    "ollama": ("ollama:m", "", {}),
    "llamacpp": ("llamacpp:m", "", {"context_tokens": 4096}),
}
FACES = ("generate", "stream", "agenerate", "astream")


class Loop:
    """An event loop in a thread of its own, so that an adapter's async connections outlive one test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class Rig:
    """One adapter at a server that misbehaves as told; ``elsewhere`` is where its redirects lead."""

    server: FaultServer
    elsewhere: FaultServer
    patient: Any
    hasty: Any
    loop: Loop

    def call(self, face: str, provider: Any) -> Any:
        """The reply's text, or the error."""
        try:
            if face == "generate":
                return provider.generate(REQUEST)
            if face == "stream":
                return list(provider.stream(REQUEST))[-1]
            if face == "agenerate":
                return self.loop.run(provider.agenerate(REQUEST))
            return self.loop.run(_last(provider.astream(REQUEST)))
        except Exception as error:
            return error


async def _last(pieces: Any) -> Any:
    return [piece async for piece in pieces][-1]


@pytest.fixture(scope="module", params=ADAPTERS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    name, path, settings = ADAPTERS[request.param]
    loop = Loop()
    with FaultServer() as server, FaultServer() as elsewhere:
        server.elsewhere = elsewhere.url.replace("127.0.0.1", "localhost") + "/elsewhere"
        common = {"api_key": KEY, "base_url": server.url + path, "max_retries": RETRIES, **settings}
        patient = load(name, {**common, "timeout_s": LONG_S})
        hasty = load(name, {**common, "timeout_s": SHORT_S})
        server.requests.clear()  # some ask for the model's facts when they are made
        yield Rig(server, elsewhere, patient, hasty, loop)
        for provider in (patient, hasty):
            provider.close()
    loop.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentmem.adapters.providers._remote.FIRST_PAUSE_S", 0.001)


#: Counts that the client of Ollama refuses by itself.
UNREADABLE = ("NaN usage", "infinite usage", "text usage")


def _owed(fault: Fault, reply: Any) -> None:
    """Fail if this is not what is owed for the fault."""
    if isinstance(reply, Exception):
        assert isinstance(reply, AgentMemError), f"untyped: {reply!r}"
        assert isinstance(reply, ProviderError), repr(reply)
        unreadable = fault.name in UNREADABLE and "ollama" in str(reply)
        assert fault.owed != "answer" or unreadable, repr(reply)
        assert KEY not in str(reply)
        if fault.error is not None:
            assert type(reply) is getattr(errors, fault.error), repr(reply)
        if fault.status is not None:
            assert (reply.status, reply.request_id) == (fault.status, "req_7")
            assert str(fault.status) in str(reply)
            assert reply.__cause__ is not None
        return
    assert isinstance(reply, Generation)
    assert fault.owed in ("answer", "either"), reply.text[:99]
    usage = reply.usage
    assert min(usage.input_tokens, usage.cached_tokens, usage.written_tokens, usage.output_tokens) >= 0
    if fault.owed == "answer":
        assert reply.text.startswith("Hello") or len(reply.text) > 10_000_000


def _faces(fault: Fault) -> tuple[str, ...]:
    return {"whole": FACES[::2], "stream": FACES[1::2]}.get(fault.only or "", FACES)


def test_the_table_is_long_enough() -> None:
    assert len(FAULTS) >= 120
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.owed != "late"], ids=lambda fault: fault.name)
def test_a_fault_gives_a_typed_error_or_an_answer(rig: Rig, fault: Fault) -> None:
    rig.server.behave = fault.behave
    for face in _faces(fault):
        before = len(rig.server.requests)
        _owed(fault, rig.call(face, rig.patient))
        sent = len(rig.server.requests) - before
        assert 1 <= sent <= RETRIES + 1, face
        if not fault.again:
            assert sent == 1, face
    assert not rig.elsewhere.requests


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.owed == "late"], ids=lambda fault: fault.name)
def test_what_never_ends_ends_at_the_deadline(rig: Rig, fault: Fault) -> None:
    rig.server.behave = fault.behave
    before = len(rig.server.requests)

    def timed(face: str) -> tuple[Any, float]:
        started = time.monotonic()
        return rig.call(face, rig.hasty), time.monotonic() - started

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(timed, _faces(fault)))
    for reply, seconds in replies:
        _owed(fault, reply)
        assert isinstance(reply, Exception)
        assert seconds < SHORT_S + LATE_S
    assert len(rig.server.requests) - before <= len(replies) * (RETRIES + 1)


@pytest.mark.parametrize("end", ["an error event", "numbers for texts", "a loop left early"])
def test_a_stream_that_ends_early_leaves_nothing_for_the_garbage_collector(rig: Rig, end: str) -> None:
    """It may run in another thread than the event loop's, and would close there what the loop is closing."""
    left_early = end == "a loop left early"
    name = "comments between events" if left_early else end
    rig.server.behave = next(fault.behave for fault in FAULTS if fault.name == name)
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in _open_generators()}
        for _ in range(3):
            if left_early:
                assert isinstance(rig.loop.run(_first(rig.patient.astream(REQUEST))), str)
            else:
                reply = rig.call("astream", rig.patient)
                assert isinstance(reply, Exception) or end == "numbers for texts"  # some adapters make do with it
        rig.loop.run(asyncio.sleep(0.05))
        left = [each for each in _open_generators() if id(each) not in before]
    finally:
        gc.enable()
    assert not left


async def _first(pieces: Any) -> Any:
    async with contextlib.aclosing(pieces):
        return await anext(pieces)


def _open_generators() -> list[Any]:
    # By type(), since isinstance asks each object for its class, and some warn then (torch's deprecated names).
    return [each for each in gc.get_objects() if type(each) is types.AsyncGeneratorType and each.ag_frame is not None]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_host_that_is_not_there_is_told(adapter: str) -> None:
    name, path, settings = ADAPTERS[adapter]
    provider = load(name, {"api_key": KEY, "base_url": f"http://127.0.0.1:9{path}", "max_retries": 0, **settings})
    with contextlib.closing(provider), pytest.raises(Unavailable, match="base_url"):
        provider.generate(REQUEST)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate of this machine's own address that nobody trusts yet, and a server's context with it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (path.parent / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, path.parent / "key.pem")
    return path, context


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_https_works_and_keeps_the_deadline_and_trusts_nobody_unknown(
    adapter: str, certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, context = certificate
    name, prefix, settings = ADAPTERS[adapter]
    with FaultServer(tls=context) as server:
        common = {"api_key": KEY, "base_url": server.url + prefix, "max_retries": 0, **settings}
        stranger = load(name, {**common, "timeout_s": LONG_S})
        with contextlib.closing(stranger), pytest.raises(Unavailable, match=r"(?i)certificate"):
            stranger.generate(REQUEST)
        assert not server.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        with contextlib.closing(load(name, {**common, "timeout_s": 2.0})) as provider:
            assert provider.generate(REQUEST).text == TEXT
            *_, whole = provider.stream(REQUEST)
            assert isinstance(whole, Generation)
            assert whole.text == TEXT
            assert asyncio.run(_and_close(provider)).text == TEXT
        with contextlib.closing(load(name, {**common, "timeout_s": SHORT_S})) as provider:
            server.behave = next(fault.behave for fault in FAULTS if fault.name == "a dripping head")
            started = time.monotonic()
            with pytest.raises(Unavailable, match="timeout_s"):
                provider.generate(REQUEST)
            assert time.monotonic() - started < SHORT_S + LATE_S


async def _and_close(provider: Any) -> Any:
    try:
        return await provider.agenerate(REQUEST)
    finally:
        await provider.aclose()


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in ("silence", "status 503")], ids=lambda f: f.name)
@pytest.mark.parametrize("face", ["agenerate", "astream"])
def test_after_a_cancel_nothing_is_sent(rig: Rig, fault: Fault, face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentmem.adapters.providers._remote.FIRST_PAUSE_S", 0.2)
    rig.server.behave = fault.behave
    before = len(rig.server.requests)

    async def cancelled() -> None:
        work = rig.patient.agenerate(REQUEST) if face == "agenerate" else _last(rig.patient.astream(REQUEST))
        task = asyncio.create_task(work)
        async with asyncio.timeout(5):
            while len(rig.server.requests) == before:  # noqa: ASYNC110 - the server is in another thread
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.03)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    rig.loop.run(cancelled())
    time.sleep(0.3)
    assert len(rig.server.requests) == before + 1


def test_a_sync_stream_left_early_sends_nothing_more(rig: Rig) -> None:
    rig.server.behave = next(fault.behave for fault in FAULTS if fault.name == "silence in a stream")
    before = len(rig.server.requests)
    pieces = rig.patient.stream(REQUEST)
    next(pieces)
    pieces.close()
    assert len(rig.server.requests) == before + 1


@pytest.mark.parametrize(("adapter", "half"), [("chat", 0), ("anthropic", 1)])
def test_what_was_remembered_before_a_fault_stays(adapter: str, half: int, tmp_path: Path) -> None:
    name, path, _ = ADAPTERS[adapter]
    scheme = name.partition(":")[0]
    with FaultServer() as server:
        settings = {"api_key": KEY, "base_url": server.url + path, "max_retries": 0, "timeout_s": SHORT_S}
        with Memory(tmp_path, model=name, embedder="hash", providers={scheme: settings}) as mem:
            ana = mem.scope(user="ana")
            kept = ana.add("I'm allergic to peanuts.")[0]
            answered = 0
            shapes = [fault for fault in FAULTS if fault.name != "10 MB of text"]  # it would be recalled ever after
            for number, fault in enumerate(shapes[half::2]):
                server.behave = fault.behave
                chat = mem.scope(user="ana", session=f"s{number}").chat
                if fault.only != "stream":
                    answered += _answered(lambda chat=chat: [str(chat("What must I not eat?"))])  # type: ignore[misc]
                if fault.only != "whole" and fault.owed != "late":
                    answered += _answered(lambda chat=chat: chat("And what else?", stream=True))  # type: ignore[misc]
            assert ana.get(kept.id).text == kept.text
            assert [hit.record.id for hit in ana.search("peanuts", k=1)] == [kept.id]
            assert mem.verify().ok
            told = [record for record in ana.list(limit=10_000) if record.role == "assistant"]
            assert len(told) == answered


def _answered(chat: Callable[[], Iterable[str]]) -> bool:
    """Whether there was an answer with a text; else an error of our tree, or an empty one."""
    try:
        return bool("".join(chat()))
    except AgentMemError:
        return False


def test_no_request_holds_a_key_in_its_body(rig: Rig) -> None:
    assert KEY not in json.dumps([body for _, _, body in rig.server.requests], default=str)
