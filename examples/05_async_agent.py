"""An agent loop under asyncio: several users at once, each with a memory of their own, answers streamed.

python examples/05_async_agent.py [model]
"""

import asyncio
import sys
import tempfile

from agentmem import AsyncMemory

USERS = {
    "ana": ("I'm allergic to peanuts.", ["Suggest a snack for me, mind my allergy.", "And a drink?"]),
    "ben": ("I run ten kilometres every morning.", ["How far do I run in the morning?", "Is that far?"]),
}


async def serve(memory: AsyncMemory, user: str) -> str:
    mine = memory.scope(user=user, agent="coach")
    fact, turns = USERS[user]
    await mine.add(fact)
    transcript = []
    for turn in turns:
        async with await mine.chat(turn, stream=True, max_tokens=40) as stream:
            text = "".join([piece async for piece in stream])
            reply = await stream.reply()
        transcript.append(f"{user}> {turn}\ncoach> {text.strip()}\n    [recalled {len(reply.recalled)}] {reply.usage}")
    return "\n".join(transcript)


async def main(model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncMemory(folder, model=model) as memory:
            for transcript in await asyncio.gather(*(serve(memory, user) for user in USERS)):
                print(transcript)
            hits = await memory.scope(user="ben").search("peanuts")
            print(f"ben finds {sum('allergic' in hit.record.text for hit in hits)} of ana's memories")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "local"))
