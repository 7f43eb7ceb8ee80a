"""A chatbot in the terminal that remembers across restarts. Needs no key and no network.

    python examples/01_chatbot.py [--path FOLDER] [--user NAME] [--model SCHEME:NAME] [--config FILE.toml]

Other models by configuration only: see examples/configs/. Commands: /memories, /forget WORDS, /learn, /report, /quit.
"""

import argparse

from agentmem import AgentMemError, Memory, Reply


def footer(reply: Reply) -> str:
    recalled = [
        f"    [recalled {hit.record.name or hit.record.role}: {hit.record.text[:60]}]" for hit in reply.recalled
    ]
    used = reply.usage
    return "\n".join(
        [*recalled[:3], f"    [{used.cached_tokens} of {used.input_tokens} tokens cached, {used.total_s:.1f} s]"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--path", "--model", "--config"):
        parser.add_argument(name)
    parser.add_argument("--user", default="you")
    options = parser.parse_args()
    model = options.model or (None if options.config else "local")
    with Memory(options.path, model=model, config=options.config) as memory:
        mine = memory.scope(user=options.user)
        print(f"{mine.plaintext.count()} memories. Commands: /memories /forget WORDS /learn /report /quit")
        while True:
            try:
                command, _, words = input(f"{options.user}> ").strip().partition(" ")
            except (EOFError, KeyboardInterrupt):
                break
            try:
                if command == "/quit":
                    break
                if command == "/memories":
                    print("\n".join(str(record) for record in mine.list()) or "none yet")
                elif command == "/forget":
                    print(mine.forget([hit.record.id for hit in mine.search(words, k=1)]))
                elif command == "/learn":
                    print(mine.parametric.train())
                elif command == "/report":
                    print(mine.report())
                elif command:
                    stream = mine.chat(f"{command} {words}", stream=True, max_tokens=120)
                    for piece in stream:
                        print(piece, end="", flush=True)
                    print("\n" + footer(stream.reply))
            except AgentMemError as error:
                print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
