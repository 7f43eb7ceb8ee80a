"""How the same chat is asked of the openai, anthropic and ollama clients: sync and awaited, whole and streamed."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import anthropic
import ollama
import openai

from agentmem.testing import HostServer

GPT, CLAUDE, LLAMA = "gpt-4.1", "claude-sonnet-5", "llama3.2"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


# How the same chat is asked of each SDK: (client, messages) -> text. Each also exists awaited.


def openai_text(answer: Any) -> str:
    return str(answer.choices[0].message.content or "")


def _claude_text(answer: Any) -> str:
    return "".join(block.text for block in answer.content if block.type == "text")


def _chunks(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def _deltas(events: Any, kind: str = "response.output_text.delta") -> str:
    return "".join(event.delta for event in events if event.type == kind)


def _claude_deltas(events: Any) -> str:
    return "".join(e.delta.text for e in events if e.type == "content_block_delta" and e.delta.type == "text_delta")


def openai_create(client: Any, messages: Any, **more: Any) -> str:
    return openai_text(client.chat.completions.create(model=GPT, messages=messages, **more))


async def aopenai_create(client: Any, messages: Any, **more: Any) -> str:
    return openai_text(await client.chat.completions.create(model=GPT, messages=messages, **more))


def openai_stream(client: Any, messages: Any, **more: Any) -> str:
    return _chunks(client.chat.completions.create(model=GPT, messages=messages, stream=True, **more))


async def aopenai_stream(client: Any, messages: Any, **more: Any) -> str:
    stream = await client.chat.completions.create(model=GPT, messages=messages, stream=True, **more)
    return _chunks([chunk async for chunk in stream])


def openai_helper(client: Any, messages: Any, **more: Any) -> str:
    with client.chat.completions.stream(model=GPT, messages=messages, **more) as stream:
        text = _deltas(stream, "content.delta")
        assert openai_text(stream.get_final_completion()) == text
    return text


async def aopenai_helper(client: Any, messages: Any, **more: Any) -> str:
    async with client.chat.completions.stream(model=GPT, messages=messages, **more) as stream:
        text = _deltas([event async for event in stream], "content.delta")
        assert openai_text(await stream.get_final_completion()) == text
    return text


def responses_create(client: Any, messages: Any, **more: Any) -> str:
    return str(client.responses.create(model=GPT, input=messages, **more).output_text)


async def aresponses_create(client: Any, messages: Any, **more: Any) -> str:
    return str((await client.responses.create(model=GPT, input=messages, **more)).output_text)


def responses_stream(client: Any, messages: Any, **more: Any) -> str:
    with client.responses.create(model=GPT, input=messages, stream=True, **more) as stream:
        return _deltas(stream)


async def aresponses_stream(client: Any, messages: Any, **more: Any) -> str:
    async with await client.responses.create(model=GPT, input=messages, stream=True, **more) as stream:
        return _deltas([event async for event in stream])


def responses_helper(client: Any, messages: Any, **more: Any) -> str:
    with client.responses.stream(model=GPT, input=messages, **more) as stream:
        return str(stream.get_final_response().output_text)


async def aresponses_helper(client: Any, messages: Any, **more: Any) -> str:
    async with client.responses.stream(model=GPT, input=messages, **more) as stream:
        return str((await stream.get_final_response()).output_text)


def claude_create(client: Any, messages: Any, **more: Any) -> str:
    return _claude_text(client.messages.create(model=CLAUDE, max_tokens=64, messages=messages, **more))


async def aclaude_create(client: Any, messages: Any, **more: Any) -> str:
    return _claude_text(await client.messages.create(model=CLAUDE, max_tokens=64, messages=messages, **more))


def claude_stream(client: Any, messages: Any, **more: Any) -> str:
    return _claude_deltas(client.messages.create(model=CLAUDE, max_tokens=64, messages=messages, stream=True, **more))


async def aclaude_stream(client: Any, messages: Any, **more: Any) -> str:
    stream = await client.messages.create(model=CLAUDE, max_tokens=64, messages=messages, stream=True, **more)
    return _claude_deltas([event async for event in stream])


def claude_helper(client: Any, messages: Any, **more: Any) -> str:
    with client.messages.stream(model=CLAUDE, max_tokens=64, messages=messages, **more) as stream:
        text = "".join(stream.text_stream)
        assert _claude_text(stream.get_final_message()) == text
    return text


async def aclaude_helper(client: Any, messages: Any, **more: Any) -> str:
    async with client.messages.stream(model=CLAUDE, max_tokens=64, messages=messages, **more) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        assert _claude_text(await stream.get_final_message()) == text
    return text


def ollama_chat(client: Any, messages: Any, **more: Any) -> str:
    return str(client.chat(LLAMA, messages, **more).message.content)


async def aollama_chat(client: Any, messages: Any, **more: Any) -> str:
    return str((await client.chat(model=LLAMA, messages=messages, **more)).message.content)


def ollama_stream(client: Any, messages: Any, **more: Any) -> str:
    return "".join(part["message"]["content"] for part in client.chat(LLAMA, messages, stream=True, **more))


async def aollama_stream(client: Any, messages: Any, **more: Any) -> str:
    parts = await client.chat(LLAMA, messages, stream=True, **more)
    return "".join([part["message"]["content"] async for part in parts])


@dataclass(frozen=True)
class Sdk:
    """One SDK's clients, and where its requests hold the conversation."""

    name: str
    make: Callable[[HostServer], Any]
    amake: Callable[[HostServer], Any]
    field: str = "messages"

    def client(self, host: HostServer, ask: Callable[..., Any]) -> Any:
        made = (self.amake if inspect.iscoroutinefunction(ask) else self.make)(host)
        OPEN.append(made)
        return made

    def sync(self, host: HostServer) -> Any:
        OPEN.append(self.make(host))
        return OPEN[-1]

    def said(self, body: Any) -> list[Any]:
        """The conversation in a request, without its system part."""
        return [message for message in body[self.field] if message.get("role") != "system"]


#: Clients to be closed after a test; the loop that they lived in.
OPEN: list[Any] = []
LOOPS: list[asyncio.Runner] = []


@contextlib.contextmanager
def closing_clients() -> Generator[None, None, None]:
    """A loop for the clients of one test, which are closed at its end."""
    with asyncio.Runner() as runner:
        LOOPS.append(runner)
        try:
            yield
        finally:
            while OPEN:
                done(OPEN.pop().close())
            LOOPS.clear()


def done(result: Any) -> Any:
    """The result, waited for if it is a coroutine."""
    return LOOPS[0].run(result) if asyncio.iscoroutine(result) else result


QUICK: dict[str, Any] = {"api_key": "sk-test", "max_retries": 0}
OPENAI = Sdk(
    "openai",
    lambda host: openai.OpenAI(base_url=host.openai_url, **QUICK),
    lambda host: openai.AsyncOpenAI(base_url=host.openai_url, **QUICK),
)
RESPONSES = Sdk("responses", OPENAI.make, OPENAI.amake, "input")
CLAUDES = Sdk(
    "anthropic",
    lambda host: anthropic.Anthropic(base_url=host.anthropic_url, **QUICK),
    lambda host: anthropic.AsyncAnthropic(base_url=host.anthropic_url, **QUICK),
)
OLLAMA = Sdk("ollama", lambda host: ollama.Client(host.ollama_url), lambda host: ollama.AsyncClient(host.ollama_url))
WAYS = [
    *((OPENAI, ask) for ask in (openai_create, openai_stream, openai_helper)),
    *((OPENAI, ask) for ask in (aopenai_create, aopenai_stream, aopenai_helper)),
    *((RESPONSES, ask) for ask in (responses_create, responses_stream, responses_helper)),
    *((RESPONSES, ask) for ask in (aresponses_create, aresponses_stream, aresponses_helper)),
    *((CLAUDES, ask) for ask in (claude_create, claude_stream, claude_helper)),
    *((CLAUDES, ask) for ask in (aclaude_create, aclaude_stream, aclaude_helper)),
    *((OLLAMA, ask) for ask in (ollama_chat, ollama_stream, aollama_chat, aollama_stream)),
]
WHOLE = [
    (OPENAI, openai_create),
    (RESPONSES, responses_create),
    (CLAUDES, claude_create),
    (OLLAMA, ollama_chat),
]


# Runs of tools: they go on for as long as the model asks for one.


def openai_tools(client: Any, messages: list[Any], model: str = GPT) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    answer = client.chat.completions.create(model=model, messages=messages, tools=tools).choices[0].message
    while answer.tool_calls:
        messages.append(answer)  # callers hand back the SDK's own object
        for call in answer.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
        answer = client.chat.completions.create(model=model, messages=messages, tools=tools).choices[0].message


def responses_tools(client: Any, messages: list[Any], model: str = GPT) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]
    answer = client.responses.create(model=model, input=messages, tools=tools)
    while calls := [item for item in answer.output if item.type == "function_call"]:
        messages += answer.output
        for call in calls:
            messages.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
        answer = client.responses.create(model=model, input=messages, tools=tools)


def claude_tools(client: Any, messages: list[Any]) -> None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    more: dict[str, Any] = {"model": CLAUDE, "max_tokens": 64, "tools": tools}
    answer = client.messages.create(messages=messages, **more)
    while answer.stop_reason == "tool_use":
        messages.append({"role": "assistant", "content": answer.content})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
            for block in answer.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
        answer = client.messages.create(messages=messages, **more)


def ollama_tools(client: Any, messages: list[Any]) -> None:
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
          city: where
        """
        return f"sunny in {city}"

    answer = client.chat(LLAMA, messages, tools=[weather]).message
    while answer.tool_calls:
        messages.append(answer)
        messages.append({"role": "tool", "tool_name": "weather", "content": "sunny"})
        answer = client.chat(LLAMA, messages, tools=[weather]).message


TOOLS = [(OPENAI, openai_tools), (RESPONSES, responses_tools), (CLAUDES, claude_tools), (OLLAMA, ollama_tools)]


def user(text: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    """An answer."""
    return {"role": "assistant", "content": text}
