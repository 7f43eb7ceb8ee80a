"""The systems that efficiency.py compares, each in a process of its own that is told which turn is next.

All say the same words: an answer is decoded token by token, but each token is the next one of what was really said, so
that histories are the same everywhere, and the likelihood of a gold answer is read off on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from efficiency_talk import Said, Talk, bare, both, talk  # type: ignore[import-not-found]

from agentmem import Memory

__all__ = ["KINDS", "SYSTEM", "Script", "Told", "child", "status"]

SYSTEM = "You are a good friend of the user. You listen, you remember, and you answer briefly and warmly."
RECALLED = "What was said earlier, and may matter now:"
SHORT = "Hello! I went to the market today and bought some apples. What would you make of them? "
#: What each is; the words in which the results speak of them.
KINDS = {
    "a": "full history, no reuse",
    "b": "full history, prefix reuse",
    "b+": "the same, agentmem's model",
    "c": "memories first, no reuse",
    "d": "memories first, prefix reuse",
    "e": "agentmem",
    "er": "agentmem, raw pages",
}
#: Before every conversation, in Unix seconds.
LONG_AGO = 1.6e9
#: Records that the usual memory puts before a conversation.
TOP = 10
#: Tokens of the window that stay free for the answer and the template.
ROOM = 320
#: What (b) keeps of the window when it is full, so that it isn't full again at once.
CUT = 0.5


def status(*fields: str) -> int:
    """Bytes that /proc/self/status gives for these fields together (RssAnon, RssFile, VmHWM, ...)."""
    text = Path("/proc/self/status").read_text("ascii")
    return sum(1024 * int(found[1]) for name in fields if (found := re.search(rf"^{name}:\s+(\d+)", text, re.M)))


def forget_peak() -> None:
    """Count the peak of the resident memory (VmHWM) from here on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


@dataclass
class Script:
    """What the model is made to say, and when it said the first of it."""

    tokens: Sequence[int] = ()
    answer: int | None = None  # tokens of every answer; None: those of what was said
    judged: bool = False
    ends: frozenset[int] = frozenset()
    said: int = 0
    first_s: float | None = None
    first_cpu: float = 0.0
    likelihood: float = 0.0

    def begin(self, tokens: Sequence[int], *, judged: bool) -> None:
        self.tokens, self.judged = tokens, judged
        self.said, self.first_s, self.first_cpu, self.likelihood = 0, None, 0.0, 0.0

    @property
    def length(self) -> int:
        return len(self.tokens) if self.answer is None else self.answer

    def next(self, logits: Any) -> int | None:
        """The next token of the answer; None behind the last. ``logits`` [vocabulary] are the model's."""
        free = int(logits.argmax())  # as a sampler would
        if self.first_s is None:
            self.first_s, self.first_cpu = time.perf_counter(), time.process_time()
        at = self.said
        if at >= self.length:
            return None
        self.said += 1
        if at < len(self.tokens):
            if self.judged:
                self.likelihood += float(logits.float().log_softmax(-1)[self.tokens[at]])
            return self.tokens[at]
        if free in self.ends:
            logits = logits.clone()
            logits[list(self.ends)] = float("-inf")
            free = int(logits.argmax())
        return free


class Told:
    """The default local model, made to say what a `Script` holds; ``reply`` is the whole text of the next answer."""

    def __init__(self, script: Script) -> None:
        from agentmem.provider import load

        generating: Any = import_module("agentmem.adapters.providers._local_generate")
        provider: Any = load("local", {})
        self.provider, self.engine, self.script = provider, provider._ready(), script
        self.reply = ""
        self.request: Any = None
        script.ends = self.engine.ends
        end = next(iter(self.engine.ends))

        class Forced:
            def __init__(self, options: Any) -> None:
                pass

            def __call__(self, logits: Any, prompt: Any) -> int:
                token = script.next(logits)
                return end if token is None else token

        generating.Sampler = Forced
        generate = provider.generate

        def told(request: Any) -> Any:
            self.request = request
            generation = generate(request)
            if request.options.max_tokens == 0:  # a prime
                return generation
            return replace(generation, text=self.reply, finish_reason="stop")

        provider.generate = told

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.engine.template.encode(text)
        return tokens

    @property
    def most(self) -> int:
        """Tokens that an answer may have: one more than it has, for its end."""
        return max(self.script.length + (self.script.answer is None), 1)


class Ours:
    """agentmem, with its defaults and ``settings``."""

    def __init__(self, given: argparse.Namespace, folder: Path, script: Script) -> None:
        self._now = LONG_AGO
        settings: dict[str, Any] = {"page_codec": "raw"} if given.child == "er" else {}
        settings |= json.loads(given.settings)
        self._told = Told(script)
        self.memory = Memory(folder, model=self._told.provider, clock=lambda: self._now, **settings)
        self._chats: dict[str, Any] = {}

    def encode(self, text: str) -> list[int]:
        return self._told.encode(text)

    def turn(self, with_: Talk, said: Said) -> dict[str, Any]:
        self._now, self._told.reply = said.at, said.reply
        if said.first or with_.name not in self._chats:
            self._chats[with_.name] = self.memory.scope(user=with_.name)
        reply = self._chats[with_.name].chat(
            {"role": "user", "content": said.message, "name": with_.user, "at": said.day_at},
            system=SYSTEM,
            remember=said.kind == "chat",
            max_tokens=self._told.most,
        )
        return {"prompt": reply.usage.input_tokens, "cached": reply.usage.cached_tokens}

    def shown(self) -> str:
        """All that the last prompt held."""
        return "\n".join(message.content for part in self._told.request.segments for message in part.messages)

    def between(self, with_: Talk) -> dict[str, Any]:
        """A session is over: what runs when nobody speaks."""
        consolidate = getattr(self.memory.scope(user=with_.name), "consolidate", None)
        if consolidate is None:
            return {}
        return {"plan": str(consolidate())}

    def restart(self) -> None:
        self._chats.clear()
        self.memory.activation.evict()

    def bytes(self) -> dict[str, int]:
        held: dict[str, int] = self.memory._engine.bytes_held()
        return held


@dataclass
class _Chat:
    """A conversation as (a) to (d) keep it: messages, and the first that is still sent."""

    said: list[dict[str, str]] = field(default_factory=list)
    first: int = 0
    known: list[int] = field(default_factory=list)
    cache: Any = None
    here: set[str] = field(default_factory=set)


class Stock:
    """transformers alone; (c) and (d) recall from an agentmem without a model, so that all search alike."""

    def __init__(self, given: argparse.Namespace, folder: Path, script: Script) -> None:
        from agentmem.provider import load

        provider: Any = load("local", {})
        self.engine = provider._ready()
        self._tokenizer, self._model = self.engine.loaded.tokenizer, self.engine.loaded.model
        self._window = int(self.engine.window) - ROOM - (script.answer or 0)
        self.script = script
        script.ends = self.engine.ends
        if given.child != "b+":  # transformers as it comes
            self._model.get_output_embeddings()._forward_pre_hooks.clear()
        self._keeps = given.child[0] in "bd"
        self._now = LONG_AGO
        self.memory = Memory(folder, clock=lambda: self._now) if given.child in "cd" else None
        self._chats: dict[str, _Chat] = {}
        self._shown = ""

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def _rendered(self, messages: list[dict[str, str]]) -> list[int]:
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return list(prompt["input_ids"] if hasattr(prompt, "keys") else prompt)

    def _prompt(self, chat: _Chat, with_: Talk, said: Said) -> tuple[list[dict[str, str]], list[int]]:
        """The prompt's messages and tokens, cut to the window where it must be."""
        system, turn = SYSTEM, {"role": "user", "content": said.message}
        if self.memory is not None:
            hits = self.memory.scope(user=with_.name).search(said.message, k=TOP + len(chat.here))
            found = [hit.record for hit in hits if hit.record.id not in chat.here][:TOP]
            lines = [f"- {record.at:%d %B %Y} {record.name or record.role}: {record.text}" for record in found]
            system = "\n".join([SYSTEM, "", RECALLED, *lines]) if lines else SYSTEM
        most = self._window
        while True:
            messages = [{"role": "system", "content": system}, *chat.said[chat.first :], turn]
            tokens = self._rendered(messages)
            if len(tokens) <= most or chat.first >= len(chat.said):
                return messages, tokens
            most = int(self._window * CUT) if self._keeps else most
            chat.first += 2

    def turn(self, with_: Talk, said: Said) -> dict[str, Any]:
        import torch
        from transformers import DynamicCache

        chat = self._begun(with_, said)
        messages, tokens = self._prompt(chat, with_, said)
        if chat.cache is None or not self._keeps:
            chat.cache, chat.known = DynamicCache(), []
        pairs = enumerate(zip(chat.known, tokens, strict=False))
        same = next((i for i, pair in pairs if len({*pair}) > 1), len(chat.known))
        same = min(same, len(tokens) - 1)
        if same < len(chat.known):
            chat.cache.crop(same - len(chat.known))
        new, chat.known = tokens[same:], tokens[:same]
        with torch.inference_mode():
            while True:
                given = torch.tensor([new])
                output = self._model(input_ids=given, past_key_values=chat.cache, use_cache=True, logits_to_keep=1)
                chat.known += new
                token = self.script.next(output.logits[0, -1].float())
                if token is None or (self.script.answer is not None and self.script.said >= self.script.answer):
                    break
                new = [token]
        self._remember(chat, with_, said)
        if not self._keeps:
            chat.cache = None
        self._shown = "\n".join(message["content"] for message in messages)
        return {"prompt": len(tokens), "cached": same}

    def note(self, with_: Talk, said: Said) -> dict[str, Any]:
        """A turn that is not measured: only its words."""
        self._remember(self._begun(with_, said), with_, said)
        return {}

    def _begun(self, with_: Talk, said: Said) -> _Chat:
        self._now = said.at
        chat = self._chats.setdefault(with_.name, _Chat())
        if said.first and self.memory is not None:  # the history of (c) and (d) is the session's
            chat.first = len(chat.said)
            chat.here.clear()
        return chat

    def _remember(self, chat: _Chat, with_: Talk, said: Said) -> None:
        if said.kind != "chat":
            return
        chat.said += [{"role": "user", "content": said.message}, {"role": "assistant", "content": said.reply}]
        if self.memory is None:
            return
        added = self.memory.scope(user=with_.name, session=said.session).add(both(with_, said))
        chat.here |= {record.id for record in added}

    def shown(self) -> str:
        return self._shown

    def between(self, with_: Talk) -> dict[str, Any]:
        return {}

    def restart(self) -> None:
        self._chats.clear()

    def bytes(self) -> dict[str, int]:
        return {} if self.memory is None else self.memory._engine.bytes_held()


def child(given: argparse.Namespace) -> None:
    """Answer the parent's commands, a line of JSON each, until it says that this is the end."""
    import torch

    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what libraries print doesn't belong between our lines
    os.dup2(2, 1)
    talks = [talk(Path(given.data), number, given.questions) for number in given.conversations]
    with tempfile.TemporaryDirectory() as folder:
        script = Script()
        system: Any = (Ours if given.child.startswith("e") else Stock)(given, Path(folder), script)
        warm_up(system, script)
        script.answer = given.answer
        started = {"anon": status("RssAnon"), "mapped": status("RssFile", "RssShmem")}
        forget_peak()
        for row in answers(system, script, talks):
            print(json.dumps(row | {"started": started}), file=out, flush=True)


def warm_up(system: Any, script: Script) -> None:
    """Two short sessions, so that what a process loads and computes once is there; nothing of them is reused."""
    for number, message in enumerate((SHORT * 16, "And then?", "What did I buy on the market?", "And after that?")):
        said = Said("chat", "session_0", LONG_AGO + number, message, "I see. A cake.", first=number % 2 == 0)
        script.begin(system.encode(said.reply), judged=False)
        system.turn(Talk("warm", "Ana", "Ben", ()), said)
    system.restart()


def answers(system: Any, script: Script, talks: Sequence[Talk]) -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        told = json.loads(line)
        if "end" in told:
            peak = status("VmHWM")
            usage = resource.getrusage(resource.RUSAGE_SELF)
            yield {"bytes": system.bytes(), "peak": peak, "cpu": usage.ru_utime + usage.ru_stime}
            return
        with_ = talks[told["talk"]]
        cpu, at = time.process_time(), time.perf_counter()
        said = None
        if "turn" not in told:
            row = system.note(with_, with_.turns[told["told"]]) if "told" in told else system.between(with_)
        else:
            said = with_.turns[told["turn"]]
            script.begin(system.encode(said.reply), judged=said.kind != "chat")
            cpu, at = time.process_time(), time.perf_counter()
            row = system.turn(with_, said)
            row |= {"first_s": (script.first_s or at) - at, "first_cpu": script.first_cpu - cpu}
        row |= {"seconds": time.perf_counter() - at, "cpu": time.process_time() - cpu}
        if said is not None and said.kind != "chat":
            shown = bare(system.shown())
            row["evidence"] = sum(bare(text) in shown for text in said.evidence) / len(said.evidence)
            row["likelihood"] = script.likelihood / len(script.tokens)
        yield row | {"anon": status("RssAnon"), "mapped": status("RssFile", "RssShmem")}
