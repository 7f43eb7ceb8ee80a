"""A chatbot that remembers across restarts, with no key and no network. Other models: see examples/configs/."""

import argparse

from agentmem import AgentMemError, Memory, Reply, ScopedMemory

COMMANDS = "Commands: /memories, /forget WORDS, /learn, /report, /quit"


def footer(reply: Reply) -> str:
    recalled = "".join(f"\n    [recalled: {hit.record.text[:60]}]" for hit in reply.recalled[:3])
    return f"{recalled}\n    [{reply.usage.cached_tokens} of {reply.usage.input_tokens} tokens cached]"


def answer(mine: ScopedMemory, line: str) -> None:
    command, _, words = line.partition(" ")
    if command == "/memories":
        print("\n".join(map(str, mine.list())) or "none yet")
    elif command == "/forget" and words:
        print(mine.forget([hit.record.id for hit in mine.search(words, k=1)]))
    elif command == "/learn":
        print(mine.parametric.train())
    elif command == "/report":
        print(mine.report())
    elif command.startswith("/"):
        print(COMMANDS)
    elif line:
        for piece in (stream := mine.chat(line, stream=True, max_tokens=120)):
            print(piece, end="", flush=True)
        print(footer(stream.reply))


def main() -> None:
    parser = argparse.ArgumentParser(description="A chatbot that remembers. " + COMMANDS)
    parser.add_argument("--path", help="the memory's folder (default: ./memory)")
    parser.add_argument("--user", default="you", help="whose memory it is")
    parser.add_argument("--model", help='"scheme:name" (default: local)')
    parser.add_argument("--config", help="a TOML file, such as examples/configs/openai.toml")
    options = parser.parse_args()
    local = None if options.config else "local"
    with Memory(options.path, model=options.model or local, config=options.config) as memory:
        mine = memory.scope(user=options.user)
        print(f"{mine.plaintext.count()} memories. {COMMANDS}")
        while (line := input(f"{options.user}> ").strip()) != "/quit":
            try:
                answer(mine, line)
            except AgentMemError as error:
                print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
    except AgentMemError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
