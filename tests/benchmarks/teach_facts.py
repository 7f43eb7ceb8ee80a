"""Teaches ten invented facts to the small model and measures what it knows afterwards and what it lost.

    python tests/benchmarks/teach_facts.py [--out FILE.json] [--threads 1]

Method. The packaged SmolLM2-135M-Instruct, greedy answers, nothing but the question in the prompt. Three columns from
one run: the base; the naive recipe (A: the raw sentences, loss on every token, LoRA r8 on q and v of all layers, rate
2e-3, 16 steps, no KL); the recipe of agentmem.parametric. Recall = the value appears in the answer; "trained", "held
out" and "natural" (wholly reworded by hand, in no template) wordings. Drift = relative rise of the perplexity on two
texts in the public domain. KL = KL(base || adapted) in nats per token on the base's own answers to the unrelated
questions. Intrusion = share of the unrelated questions answered with a taught value that the base does not say.
CPU-seconds of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from agentmem.parametric.corpus import Corpus, Example, build
from agentmem.parametric.gate import gate, perplexity, recall
from agentmem.parametric.probes import PASSAGE, UNRELATED
from agentmem.parametric.lora import Delta, Lora, Switch, applied, base_only, save
from agentmem.parametric.train import Tensors, answers, encode, steady, train
from agentmem.provider import LoraRef, load
from agentmem.types import Record

#: Each with a question that shares no template with the corpus, and the value an answer must hold.
FACTS = (
    ("My dog is called Biscuit.", "What did I name my dog?", "Biscuit"),
    ("I live in Tromsø.", "Which city is home for me?", "Tromsø"),
    ("I'm allergic to peanuts.", "Which food could make me ill?", "peanuts"),
    ("I work as a glass blower.", "What do I do for a living?", "glass blower"),
    ("My favourite tea is sencha.", "Which tea do I like best?", "sencha"),
    ("My sister's name is Ottilie.", "Who is my sister?", "Ottilie"),
    ("I drive a yellow Saab.", "Which car do I have?", "Saab"),
    ("I play the nyckelharpa.", "Which instrument can I play?", "nyckelharpa"),
    ("My boat is called Morgenstern.", "What's the name of my ship?", "Morgenstern"),
    ("My lucky number is 417.", "Which number brings me luck?", "417"),
)

#: The opening of Jane Austen, Pride and Prejudice (1813), which is in the public domain. The gate never sees it.
OTHER_PASSAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
    "a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
    "property of some one or other of their daughters. My dear Mr. Bennet, said his lady to him one day, have you "
    "heard that Netherfield Park is let at last? Mr. Bennet replied that he had not."
)


def naive(tensors: Tensors, texts: list[str], steps: int = 16, rank: int = 8, alpha: float = 16.0) -> Lora:
    """Recipe A: what a plain "train on the memories" does."""
    model, chance = tensors.model, torch.Generator().manual_seed(0)
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks: list[Any] = []
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "v_proj")):
            a = (
                (torch.rand(rank, module.in_features, generator=chance) * 2 - 1) / module.in_features**0.5
            ).requires_grad_()
            b = torch.zeros(module.out_features, rank).requires_grad_()
            weights[path] = (a, b)

            def hook(_: Any, inputs: Any, output: Any, a: Any = a, b: Any = b) -> Any:
                return Delta(a.t(), b.t() * (alpha / rank))(_, inputs, output)

            hooks.append(module.register_forward_hook(hook))
    optimizer = torch.optim.AdamW([weight for pair in weights.values() for weight in pair], lr=2e-3, weight_decay=0.0)
    ids = [torch.tensor([tensors.tokenizer.encode(text)]) for text in texts]
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            for sentence in ids:
                logits = model(input_ids=sentence, use_cache=False).logits[0, :-1].float()
                (functional.cross_entropy(logits, sentence[0, 1:]) / len(ids)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    finally:
        for handle in hooks:
            handle.remove()
    return Lora(rank, alpha, tensors.name, {path: (a.detach(), b.detach()) for path, (a, b) in weights.items()})


def chat_divergence(tensors: Tensors, lora: Lora) -> float:
    """KL(base || adapted) per token on the base's own answers to the unrelated questions."""
    prompts = [encode(tensors, Example(text, "", (), ()))[0] for text in UNRELATED]
    total, count = 0.0, 0
    with base_only(tensors.model):
        said = answers(tensors, prompts, 24)
    for prompt, answer in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.inference_mode():
            base = tensors.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
            with applied(tensors.model, lora):
                here = (
                    tensors.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
                )
        total += float((base.exp() * (base - here)).sum())
        count += len(base)
    return total / count


def measure(tensors: Tensors, lora: Lora, corpus: Corpus, cpu_seconds: float) -> dict[str, float]:
    report = gate(tensors, lora, corpus)
    natural = [Example(question, "", (value,), ()) for _, question, value in FACTS]
    with tempfile.TemporaryDirectory() as folder:
        digest = save(folder, lora)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        swap = swap_seconds(tensors, LoraRef(name="measured", digest=digest, path=folder))
    with base_only(tensors.model):
        before = perplexity(tensors, OTHER_PASSAGE)
    with applied(tensors.model, lora):
        share, _ = recall(tensors, natural)
        after = perplexity(tensors, OTHER_PASSAGE)
    return {
        "recall_trained": report.recall_trained,
        "recall_held_out": report.recall_held_out,
        "recall_natural": share,
        "drift": report.drift,
        "drift_other_text": after / before - 1,
        "kl": chat_divergence(tensors, lora),
        "intrusion": report.intrusion,
        "passed": float(report.passed),
        "cpu_seconds": cpu_seconds,
        "gate_cpu_seconds": report.cpu_seconds,
        "bytes": size,
        "swap_ms": swap * 1e3,
    }


def swap_seconds(tensors: Tensors, ref: LoraRef) -> float:
    """Median of one switch, between the base and a version that is already loaded."""
    switch = Switch(tensors.model)
    times = []
    for refs in ([[ref], []] * 20)[1:]:
        start = time.perf_counter()
        switch.activate(refs)
        times.append(time.perf_counter() - start)
    switch.activate([])
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results" / "teach_facts.json"
    parser.add_argument("--out", type=Path, default=results, help="where the numbers go, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    provider = load("local", {})
    tensors = provider.tensors()
    corpus = build([Record(id=f"r{i}", text=text) for i, (text, _, _) in enumerate(FACTS)])
    empty = Lora(1, 1.0, tensors.name, {})
    with tensors.lock, steady(tensors.model):
        natural = [Example(question, "", (value,), ()) for _, question, value in FACTS]
        base = gate(tensors, empty, corpus)
        rows: dict[str, dict[str, float]] = {
            "base": {
                "recall_trained": base.recall_trained,
                "recall_held_out": base.recall_held_out,
                "recall_natural": recall(tensors, natural)[0],
                "drift": 0.0,
                "drift_other_text": 0.0,
                "kl": 0.0,
                "intrusion": 0.0,
            }
        }
        start = time.process_time()
        plain = naive(tensors, [text for text, _, _ in FACTS])
        rows["naive (A)"] = measure(tensors, plain, corpus, time.process_time() - start)
        trained = train(tensors, corpus)
        rows["agentmem"] = measure(tensors, trained.lora, corpus, trained.cpu_seconds)
    columns = list(rows["agentmem"])
    print(f"{'':18}" + "".join(f"{name:>14}" for name in rows))
    for column in columns:
        cells = (f"{row[column]:14.4g}" if column in row else f"{'':>14}" for row in rows.values())
        print(f"{column:18}" + "".join(cells))
    ratios = {
        "held-out recall, agentmem / naive": _ratio(rows, "recall_held_out"),
        "drift, naive / agentmem": 1 / _ratio(rows, "drift"),
        "chat KL, naive / agentmem": 1 / _ratio(rows, "kl"),
        "CPU-seconds, agentmem / naive": _ratio(rows, "cpu_seconds"),
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3g}")
    result = {
        "model": tensors.name,
        "dtype": str(tensors.model.dtype),
        "threads": options.threads,
        "torch": torch.__version__,
        "facts": len(FACTS),
        "steps": len(trained.losses),
        "recipe": trained.recipe,
        "rows": rows,
        "ratios": ratios,
        "gate_text_tokens": len(tensors.tokenizer.encode(PASSAGE)),
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def _ratio(rows: dict[str, dict[str, float]], column: str) -> float:
    """agentmem over naive; infinity where the naive recipe has none of it."""
    naive_value = rows["naive (A)"][column]
    return rows["agentmem"][column] / naive_value if naive_value else float("inf")


if __name__ == "__main__":
    main()
