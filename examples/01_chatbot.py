"""A chatbot in the terminal that remembers across restarts. Needs no key and no network.

    python examples/01_chatbot.py [--path FOLDER] [--user NAME] [--model SCHEME:NAME] [--config FILE.toml]

Other models by configuration only: see examples/configs/. Commands: /memories, /forget WORDS, /learn, /report, /quit.
"""

import argparse

from agentmem import AgentMemError, Memory, Reply


def footer(reply: Reply) -> str:
    recalled = "".join(
        f"\n    [recalled {hit.record.name or hit.record.role}: {hit.record.text[:60]}]" for hit in reply.recalled[:3]
    )
    usage = reply.usage
    return (
        f"{recalled}\n    [{usage.cached_tokens} of {usage.input_tokens} prompt tokens cached, {usage.total_s:.1f} s]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path")
    parser.add_argument("--user", default="you")
    parser.add_argument("--model")
    parser.add_argument("--config")
    options = parser.parse_args()
    model = options.model or (None if options.config else "local")
    with Memory(options.path, model=model, config=options.config) as memory:
        mine = memory.scope(user=options.user)
        print(
            f"{mine.plaintext.count()} memories in {memory!r}. Commands: /memories /forget WORDS /learn /report /quit"
        )
        while True:
            try:
                line = input(f"{options.user}> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            try:
                match line.partition(" "):
                    case ("", _, _):
                        continue
                    case ("/quit", _, _):
                        break
                    case ("/memories", _, _):
                        print("\n".join(str(record) for record in mine.list()) or "none yet")
                    case ("/forget", _, words):
                        print(mine.forget([hit.record.id for hit in mine.search(words, k=1)]))
                    case ("/learn", _, _):
                        print(mine.parametric.train().gate)
                    case ("/report", _, _):
                        print(mine.report())
                    case _:
                        stream = mine.chat(line, stream=True, max_tokens=120)
                        for piece in stream:
                            print(piece, end="", flush=True)
                        print(footer(stream.reply))
            except AgentMemError as error:
                print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
