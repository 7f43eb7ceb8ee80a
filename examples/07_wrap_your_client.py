"""A chatbot on the openai SDK gains memory by one line; so does one on anthropic's or ollama's.

python examples/07_wrap_your_client.py    (needs OPENAI_API_KEY; the second run knows what was said in the first)
"""

import openai
from openai.types.chat import ChatCompletionMessageParam

import agentmem

MODEL = "gpt-5.6-luna"

if __name__ == "__main__":
    with agentmem.wrap(openai.OpenAI(), "./memory", user="ana") as client:  # the one line
        messages: list[ChatCompletionMessageParam] = []
        while line := input("you> ").strip():
            messages.append({"role": "user", "content": line})
            answer = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content or ""
            messages.append({"role": "assistant", "content": answer})
            print(f"bot> {answer}")
