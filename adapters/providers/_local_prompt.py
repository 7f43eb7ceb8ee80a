"""Messages as token ids of the local model's chat template, and which of those ids belong to the stable prefix.

Knows templates, special tokens and character offsets; knows nothing of the model, pages or sampling. What the template
can't express (several system messages, two user messages in a row) is rewritten by rules that depend on the template
alone, so that the same messages give the same prefix in every turn.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from agentmem.errors import InvalidInput, Rejected
from agentmem.types import Message, Segment

__all__ = ["Pieces", "Prompt", "Template"]

#: Used where a tokenizer has no chat template: ``role: text``, a blank line between messages.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_GAP = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model reads it. ``tokens[:stable]`` come from stable segments alone.

    ``starts`` are (token position, record ids) of the stable messages that have records: no message begins before its
    position here, though it may begin later.
    """

    tokens: list[int]
    stable: int
    starts: tuple[tuple[int, tuple[str, ...]], ...]

    def records(self, end: int) -> tuple[str, ...]:
        """Ids of all records that may stand in ``tokens[:end]``, sorted."""
        return tuple(sorted({record for start, records in self.starts if start < end for record in records}))


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A prompt in pieces that were tokenised apart: what stands before some lines of its last message, the lines, and
    what follows. Joined they read as the whole, but the tokens at a seam may be others."""

    head: Prompt
    lines: list[list[int]]
    rest: list[int]

    @property
    def tokens(self) -> list[int]:
        """All pieces, joined."""
        return [*self.head.tokens, *itertools.chain.from_iterable(self.lines), *self.rest]


@dataclass(frozen=True)
class _Laid:
    """A rendered prompt: its first ``stable`` messages keep ``common`` characters, whatever the others say."""

    text: str
    common: int
    stable: list[Message]
    contents: list[str]


class Template:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._source = None if tokenizer.chat_template else PLAIN
        added = getattr(tokenizer, "added_tokens_decoder", {})
        specials = {str(token): token for token in added.values() if token.special}
        specials |= {text: None for text in tokenizer.all_special_tokens if text not in specials}
        texts = sorted((text for text in specials if len(text) > 1), key=lambda text: (-len(text), text))
        self._specials = re.compile("|".join(map(re.escape, texts))) if texts else None
        # Such a token is matched in normalised text, so other spellings of it count too.
        self._folds = any(getattr(token, "normalized", False) for token in specials.values())

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer; only without a template of the model's own, which has a token for it."""
        return () if self._source is None else ("\nuser:", "\nsystem:", "\nassistant:")

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token that the template puts after an assistant's message, if it puts one."""
        try:
            text = self._render(
                [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "xyzzy"}], answer=True
            )
        except Rejected:
            return None
        ids = self._encode(text.partition("xyzzy")[2])[0]
        specials = set(self._tokenizer.all_special_ids)
        return ids[0] if ids and ids[0] in specials else None

    def prompt(self, segments: Sequence[Segment], extra: Mapping[str, Any] | None = None) -> Prompt:
        """The prompt of a request, up to where the assistant begins to answer.

        ``extra`` are variables for the template. Raises `Rejected` for messages that the template refuses.
        """
        laid = self._laid(segments, extra)
        return self._cut(laid, laid.text)

    def pieces(
        self, segments: Sequence[Segment], lines: Sequence[str], extra: Mapping[str, Any] | None = None
    ) -> Pieces | None:
        """The same prompt, cut where ``lines``, which stand one after the other in its last message, begin and end.

        None where the template doesn't leave them as they are, or the tokenizer puts something before every text.
        """
        laid = self._laid(segments, extra)
        shown = [self.neutral(line) for line in lines]
        body = "".join(shown)
        start = laid.text.find(body, laid.common)
        if not body or start < 0 or laid.text.find(body, start + 1) >= 0 or not self._joins:
            return None
        return Pieces(
            head=self._cut(laid, laid.text[:start]),
            lines=[self._encode(line)[0] for line in shown],
            rest=self._encode(laid.text[start + len(body) :])[0],
        )

    @cached_property
    def _joins(self) -> bool:
        """Whether texts that were tokenised apart read as the joined text (some tokenizers begin each with a space)."""
        parts = ("a:\n", "- b\n", "- c\n", "d")
        ids = [token for part in parts for token in self._encode(part)[0]]
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text == "".join(parts)

    def _laid(self, segments: Sequence[Segment], extra: Mapping[str, Any] | None) -> _Laid:
        pairs = [(message, segment.stable) for segment in segments for message in segment.messages]
        # After the first message that may change, nothing is a stable prefix, whatever its segment says.
        stable = list(itertools.takewhile(lambda pair: pair[1], pairs))
        messages = [self._plain(message) for message, _ in pairs]
        text = self._render(self._fitted(messages), extra=extra)
        return _Laid(
            text,
            self._stable_characters(text, messages, len(stable), extra),
            [message for message, _ in stable],
            [message["content"] for message in messages[: len(stable)]],
        )

    def _cut(self, laid: _Laid, text: str) -> Prompt:
        """The beginning ``text`` of what was laid out, in tokens."""
        tokens, ends = self._encode(text)
        count = 0 if ends is None else bisect.bisect_right(ends, laid.common)
        starts: list[tuple[int, tuple[str, ...]]] = []
        for message, place in zip(laid.stable, self._places(laid.text, laid.contents), strict=True):
            if message.records:
                first = 0 if ends is None else bisect.bisect_right(ends, place)
                starts.append((first, tuple(message.records)))
        return Prompt(tokens=tokens, stable=count, starts=tuple(starts))

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> list[int]:
        """Token ids of ``messages``, ending where the assistant begins to answer; with ``answer``, the last message is
        that answer and the ids end with the end of its turn."""
        fitted = self._fitted([self._plain(message) for message in messages])
        return self._encode(self._render(fitted, answer=answer))[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by itself, without special tokens of the tokenizer's own."""
        return self._encode(text)[0]

    def neutral(self, text: str) -> str:
        """``text`` with a space inside every special token's string, so that it stays text: ``<|im_end|>`` becomes
        ``< |im_end|>``. Other text is returned as it is."""
        normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
        if self._specials is None:
            return text
        if self._folds and normalizer is not None:
            folded = normalizer.normalize_str(text)
            if self._specials.search(folded):
                text = folded
        return self._specials.sub(lambda match: match[0][0] + " " + match[0][1:], text)

    # -- the template's limits -------------------------------------------------------------------------------------

    @cached_property
    def _takes(self) -> Literal["any", "system first", "no system"]:
        """Which sequences of roles the template renders without an error or a loss."""
        free = ("system", "system", "user", "user", "assistant", "system", "user")
        if self._keeps(free):
            return "any"
        return "system first" if self._keeps(("system", "user", "assistant", "user")) else "no system"

    @cached_property
    def _ordered(self) -> bool:
        """Whether messages come out in the order they went in (some templates move the system text to the end)."""
        roles = {
            "any": ("system", "user", "assistant", "user"),
            "system first": ("system", "user", "assistant", "user"),
        }
        return self._keeps(roles.get(self._takes, ("user", "assistant", "user")))

    def _keeps(self, roles: Sequence[str]) -> bool:
        marks = [f"mark{number}e" for number in range(len(roles))]
        try:
            text = self._render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        except Rejected:
            return False
        places = [text.find(mark) for mark in marks]
        return all(place >= 0 for place in places) and places == sorted(places)

    def _fitted(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """The same texts in a sequence of roles that the template takes."""
        if self._takes == "any":
            return [dict(message) for message in messages]
        head = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
        rest = [dict(message) for message in messages[len(head) :]]
        for message in rest:
            if message["role"] == "system":
                message["role"] = "user"
        if head and self._takes == "no system":
            rest[:0] = [{"role": "user", "content": message["content"]} for message in head]
            head = []
        if rest and rest[0]["role"] == "assistant":
            rest.insert(0, {"role": "user", "content": ""})
        merged: list[dict[str, str]] = []
        for message in (*map(dict, head), *rest):
            if merged and merged[-1]["role"] == message["role"]:
                merged[-1]["content"] += _GAP + message["content"]
            else:
                merged.append(dict(message))
        return merged

    # -- rendering -------------------------------------------------------------------------------------------------

    def _plain(self, message: Message) -> dict[str, str]:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"a {message.role} message holds a lone surrogate, which no tokenizer takes") from error
        # A tool's result without tool support in the provider is told to the model as the user's words.
        role = "user" if message.role == "tool" else message.role
        return {"role": role, "content": self.neutral(message.content)}

    def _render(
        self, messages: Sequence[Mapping[str, str]], *, answer: bool = False, extra: Mapping[str, Any] | None = None
    ) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._source,
                add_generation_prompt=not answer,
                tokenize=False,
                **(extra or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Rejected(f"the model's chat template refuses these messages ({error})") from error
        if self._source is not None and self._begins:
            text = self._begins + text
        return text

    @cached_property
    def _begins(self) -> str:
        """Without a template: the token that the tokenizer itself puts before every text."""
        ids = self._tokenizer("x")["input_ids"]
        first = self._tokenizer.bos_token
        return first if first and ids and ids[0] == self._tokenizer.bos_token_id else ""

    def _encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Ids, and for each the position of the character after it; None where the tokenizer knows no offsets."""
        if not getattr(self._tokenizer, "is_fast", False):
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]), None
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in coded["offset_mapping"]]
        return list(coded["input_ids"]), ends if ends == sorted(ends) else None

    # -- the stable prefix -----------------------------------------------------------------------------------------

    def _stable_characters(
        self, text: str, messages: Sequence[Mapping[str, str]], stable: int, extra: Mapping[str, Any] | None
    ) -> int:
        """How many characters of ``text`` stay as they are when the messages from number ``stable`` on change.

        Found by rendering them with other contents: right for templates that merge, trim or move messages too.
        """
        if stable == len(messages):
            other = self._render(self._fitted(messages), answer=True, extra=extra)
        else:
            changed = [dict(message) for message in messages]
            for change in changed[stable:]:
                change["content"] = "y" if change["content"].strip()[:1] == "x" else "x"
            other = self._render(self._fitted(changed), extra=extra)
        length = min(len(text), len(other))
        return next((i for i in range(length) if text[i] != other[i]), length)

    def _places(self, text: str, contents: Sequence[str]) -> list[int]:
        """Where each content begins in ``text``, or earlier, never later.

        In an ordered template the leftmost matches one after the other can't lie behind the true places; else, and for
        what isn't found, the first place where the content occurs at all is taken, or the beginning.
        """
        wanted = [content.strip() for content in contents]  # templates may trim
        places: list[int] = []
        position = 0
        for content in wanted:
            place = text.find(content, position) if self._ordered else -1
            if place < 0:
                places = [max(text.find(content), 0) for content in wanted]
                break
            places.append(place)
            position = place + len(content)
        return [len(text[:place].rstrip()) for place in places]  # white space before it may be the message's own
