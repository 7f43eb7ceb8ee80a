"""Training on tiny random models: what is learnt, what is left as it was, and how a run ends early."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import InvalidInput, TrainingError
from agentmem.parametric.corpus import Corpus, Example, build
from agentmem.parametric.interruption import giving_way
from agentmem.parametric.lessons import opening
from agentmem.parametric.lora import Switch, applied, base_only, save
from agentmem.parametric.recipe import recipe_for
from agentmem.parametric.states import Stack
from agentmem.parametric.steps import Run
from agentmem.parametric.train import Recipe, answers, encode, estimate, steady, train
from agentmem.provider import LoraRef, load
from agentmem.types import Record

FLOAT = {"dtype": "float32"}
QUICK = Recipe(rank=4, layers=1 / 3, rate=5e-3, batch=4, anchors=2, anchor_tokens=4, least_steps=0)


@pytest.fixture(scope="module")
def lessons() -> Corpus:
    records = [Record(id="a", text="My dog is called Biscuit."), Record(id="b", text="I live in Oslo.")]
    made = build(records, systems=[None])
    return replace(made, examples=made.examples[::3], anchors=made.anchors[:4], neighbours=())


@pytest.fixture
def tensors(tmp_path: Path, tiny_model: Callable[..., Path]) -> Any:
    return load(f"local:{tiny_model(tmp_path / 'base')}", FLOAT).tensors()


def logits(tensors: Any) -> torch.Tensor:
    with torch.inference_mode():
        prompt, _ = encode(
            tensors, Example("Who?", "", (), ())
        )  # a LoRA that an answer's opening calls acts on its end
        out: torch.Tensor = tensors.model(input_ids=torch.tensor([[*prompt, 31, 7, 200]])).logits
        return out


def state(model: Any) -> list[Any]:
    return [
        *(
            (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ),
        *((name, weight.requires_grad, weight.grad is None) for name, weight in model.named_parameters()),
        model.config._attn_implementation,
    ]


def test_the_loss_falls_and_the_model_stays_as_it_was(tensors: Any, lessons: Corpus) -> None:
    tensors.model.train()
    next(tensors.model.parameters()).requires_grad_(False)
    before, base = state(tensors.model), logits(tensors)
    weights = {name: weight.clone() for name, weight in tensors.model.state_dict().items()}
    steps: list[tuple[int, int]] = []
    trained = train(tensors, lessons, epochs=12, recipe=QUICK, progress=lambda done, total: steps.append((done, total)))
    assert len(trained.losses) == 12 == len(steps)
    assert steps[-1] == (12, 12)
    assert trained.losses[-1] < trained.losses[0] - 1
    assert trained.cpu_seconds > 0
    assert state(tensors.model) == before
    assert torch.equal(logits(tensors), base)
    assert all(torch.equal(weight, weights[name]) for name, weight in tensors.model.state_dict().items())
    with applied(tensors.model, trained.lora):
        assert not torch.equal(logits(tensors), base)


def test_only_the_top_third_is_trained_and_all_of_its_linears(tensors: Any, lessons: Corpus) -> None:
    lora = train(tensors, lessons, epochs=1, recipe=QUICK).lora
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {path.rpartition(".")[2] for path in lora.tensors} == set(names)
    assert {path.split(".")[2] for path in lora.tensors} == {"2"}
    assert lora.notes["base"] == tensors.identity.hex()


def test_the_same_seed_gives_the_same_bytes(tensors: Any, lessons: Corpus, tmp_path: Path) -> None:
    digests = [
        save(tmp_path / str(i), train(tensors, lessons, epochs=2, seed=seed, recipe=QUICK).lora)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_equal_texts_of_other_records_are_another_version(tensors: Any, lessons: Corpus, tmp_path: Path) -> None:
    """Two users with the same fact must not share a version: forgetting one would take it from the other."""
    other = replace(lessons, records={"c": "0", "d": "1"})
    one, two = (train(tensors, corpus, epochs=1, recipe=QUICK).lora for corpus in (lessons, other))
    assert save(tmp_path / "one", one) != save(tmp_path / "two", two)


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_the_cached_way_computes_what_the_whole_model_does(
    kind: str, *, activated: bool, tmp_path: Path, tiny_model: Callable[..., Path], lessons: Corpus
) -> None:
    """Gradients and logits over kept states equal those of the whole model with the same LoRA (all of its layers over
    the question's keys and values when it is activated)."""
    tensors = load(f"local:{tiny_model(tmp_path / 'base', kind)}", FLOAT).tensors()
    pairs = [encode(tensors, example) for example in lessons.examples]
    starts = [len(prompt) - 4 if activated else 0 for prompt, _ in pairs]
    recipe = replace(QUICK, layers=1.0 if activated else QUICK.layers)
    with steady(tensors.model, attention="eager"):
        stack = Stack(tensors, recipe, seed=1)
        for _, b in stack.weights.values():
            b.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
        batch = stack.batch(
            stack.capture([(prompt, answer, at) for (prompt, answer), at in zip(pairs, starts, strict=True)])
        )
        with stack.attached():
            ours = stack.head(stack.last(batch)).float()
            ours.logsumexp(-1).sum().backward()
        grads = {path: (a.grad, b.grad) for path, (a, b) in stack.weights.items()}
        for weight in stack.flat:
            weight.grad = None
        rows = []
        for (prompt, answer), at in zip(pairs, starts, strict=True):  # one by one: no padding at all
            with whole(tensors.model, stack, at):
                out = tensors.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
            rows.append(out[0, len(prompt) - 1 : len(prompt) + len(answer) - 1])
        theirs = torch.cat(rows)
        theirs.logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(batch.targets, torch.tensor([token for _, answer in pairs for token in answer]))
    assert torch.allclose(ours, theirs, atol=1e-4)
    for path, (a, b) in stack.weights.items():
        for grad, mine in zip((a.grad, b.grad), grads[path], strict=True):
            assert grad is not None
            assert mine is not None
            assert torch.allclose(grad, mine, rtol=1e-3, atol=1e-4), path


@contextlib.contextmanager
def whole(model: Any, stack: Stack, start: int) -> Generator[None]:
    """The weights of ``stack`` act on the whole model from token ``start`` on, written down once more and plainly."""

    def hook(a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            acts = (torch.arange(output.shape[1]) >= start)[None, :, None]
            return output + acts * ((inputs[0] @ a.t()) @ b.t()) * (stack.recipe.alpha / stack.recipe.rank)

        return add

    modules = dict(model.named_modules())
    handles = [modules[path].register_forward_hook(hook(a, b)) for path, (a, b) in stack.weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_only_the_answer_and_its_end_are_learnt(tensors: Any, lessons: Corpus) -> None:
    prompt, answer = encode(tensors, lessons.examples[0])
    assert tensors.tokenizer.decode(prompt).endswith("What is my dog's name?<|im_end|>\n<|im_start|>assistant\n")
    assert tensors.tokenizer.decode(answer) == "Your dog is called Biscuit.<|im_end|>"
    assert encode(tensors, lessons.anchors[0])[1] == []


def test_known_tokens_give_no_gradient(tensors: Any, lessons: Corpus) -> None:
    recipe = replace(QUICK, threshold=1e9, kl_weight=0.0)
    trained = train(tensors, lessons, epochs=3, recipe=recipe)
    assert all(not b.any() for _, b in trained.lora.tensors.values())


def test_the_finished_weights_go_a_part_of_the_way_back_to_the_base(tensors: Any, lessons: Corpus) -> None:
    whole, half = (train(tensors, lessons, epochs=2, recipe=replace(QUICK, scale=scale)).lora for scale in (1.0, 0.5))
    for path, (a, b) in whole.tensors.items():
        assert b.any()
        assert torch.equal(half.tensors[path][0], a)
        assert torch.equal(half.tensors[path][1], b / 2)


def test_the_kl_term_holds_other_answers_still(tensors: Any, lessons: Corpus) -> None:
    def moved(weight: float) -> float:
        recipe = replace(QUICK, kl_weight=weight, anchors=4)
        lora = train(tensors, lessons, epochs=20, recipe=recipe).lora
        prompts = torch.tensor([encode(tensors, lessons.anchors[0])[0]])
        with torch.inference_mode():
            base = tensors.model(input_ids=prompts).logits[0, -1].log_softmax(-1)
            with applied(tensors.model, lora):
                here = tensors.model(input_ids=prompts).logits[0, -1].log_softmax(-1)
        return float((base.exp() * (base - here)).sum())

    assert moved(2.0) < moved(0.0) / 2


def test_an_active_lora_takes_no_part_and_is_active_again_afterwards(
    tensors: Any, lessons: Corpus, tmp_path: Path
) -> None:
    first = train(tensors, lessons, epochs=2, recipe=QUICK)
    folder = tmp_path / "first"
    ref = LoraRef(name="first", digest=save(folder, first.lora), path=str(folder), activated=first.lora.activated)
    switch = Switch(tensors.model)
    switch.activate([ref])
    with_it = logits(tensors)
    again = train(tensors, lessons, epochs=2, recipe=QUICK)
    assert save(tmp_path / "again", again.lora) == ref.digest
    assert switch.active == (ref,)
    assert torch.equal(logits(tensors), with_it)


def test_a_stopped_or_interrupted_run_leaves_nothing_behind(tensors: Any, lessons: Corpus) -> None:
    before, base = state(tensors.model), logits(tensors)
    done: list[int] = []
    with pytest.raises(TrainingError, match="stopped after step 2 of 40"):
        train(
            tensors,
            lessons,
            epochs=40,
            recipe=QUICK,
            progress=lambda step, _: done.append(step),
            stop=lambda: len(done) == 2,
        )

    def interrupt(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tensors, lessons, epochs=40, recipe=QUICK, progress=interrupt)
    assert state(tensors.model) == before
    assert torch.equal(logits(tensors), base)


def test_the_lock_is_held_while_it_trains(tensors: Any, lessons: Corpus) -> None:
    free: list[bool] = []

    def probe(*_: int) -> None:
        def take() -> None:
            free.append(got := tensors.lock.acquire(blocking=False))
            if got:
                tensors.lock.release()

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()

    train(tensors, lessons, epochs=1, recipe=QUICK, progress=probe)
    assert free == [False]


def test_what_can_not_be_trained_is_a_named_error(
    tensors: Any, lessons: Corpus, tmp_path: Path, tiny_model: Any
) -> None:
    with pytest.raises(InvalidInput, match="nothing to train on"):
        train(tensors, build([]))
    with pytest.raises(InvalidInput, match="epochs"):
        train(tensors, lessons, epochs=0)
    mamba = load(f"local:{tiny_model(tmp_path / 'mamba', 'mamba')}", FLOAT).tensors()
    with pytest.raises(TrainingError, match="this training can't follow it"):
        train(mamba, lessons, epochs=1, recipe=QUICK)


def test_a_head_that_computes_more_is_refused(tensors: Any, lessons: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = tensors.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits / 3
        return out

    monkeypatch.setattr(tensors.model, "forward", scaled)
    with pytest.raises(TrainingError, match="computes more"):
        train(tensors, lessons, epochs=1, recipe=QUICK)


def test_a_loss_that_is_not_finite_ends_the_run(tensors: Any, lessons: Corpus) -> None:
    recipe = replace(QUICK, rate=1e30, clip=1e30, warmup=0)
    with pytest.raises(TrainingError, match="not finite"):
        train(tensors, lessons, epochs=5, recipe=recipe)


def test_batched_answers_equal_single_ones(tensors: Any, lessons: Corpus) -> None:
    prompts = [encode(tensors, example)[0] for example in lessons.anchors]
    with base_only(tensors.model), steady(tensors.model):
        together = answers(tensors, prompts, 6, batch=4)
        alone = [answers(tensors, [prompt], 6)[0] for prompt in prompts]
    assert together == alone


def test_a_few_facts_still_take_enough_steps_for_the_rest_to_settle(tensors: Any, lessons: Corpus) -> None:
    recipe = replace(QUICK, least_steps=5)
    assert len(train(tensors, lessons, epochs=1, recipe=recipe).losses) == 5


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_examples_than_are_passed_over_once_known_are_enough(
    tensors: Any, lessons: Corpus, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Of what is known every third example is looked at: of two there may be none in an epoch."""
    monkeypatch.setattr(Run, "_known", lambda run, lesson: lesson.losses is not None)
    recipe = replace(QUICK, least_steps=9)
    assert len(train(tensors, replace(lessons, examples=lessons.examples[:count]), epochs=1, recipe=recipe).losses) == 9


def test_the_anchors_that_moved_most_are_seen_to_again(tensors: Any, lessons: Corpus) -> None:
    corpus = replace(lessons, neighbours=(), anchors=lessons.anchors[:1])
    run = Run(tensors, corpus, replace(QUICK, anchors=1), seed=0, epochs=6, ram_budget=None)
    run.prepare()
    run.anchors = run.anchors[:3]  # and two passages of prose
    for anchor, moved in zip(run.anchors, (0.1, 0.9, 0.2), strict=True):
        anchor.moved = moved
    chosen = []
    for step in range(6):
        run.losses = [0.0] * step
        chosen += [run.anchors.index(anchor) for anchor in run._moved()]
    assert chosen == [0, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("activated", [False, True])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    tensors: Any, lessons: Corpus, tmp_path: Path, *, activated: bool
) -> None:
    recipe = replace(QUICK, activated=activated)
    whole = train(tensors, lessons, epochs=9, recipe=recipe)
    done: list[int] = []
    for pause in (2, 5):
        with pytest.raises(TrainingError, match=rf"stopped after step {pause} of 9: the same call goes on"):
            train(
                tensors,
                lessons,
                epochs=9,
                recipe=recipe,
                checkpoint=tmp_path / "state",
                progress=lambda step, _: done.append(step),
                stop=lambda pause=pause: len(done) == pause,  # type: ignore[misc]
            )
    resumed = train(
        tensors,
        lessons,
        epochs=9,
        recipe=recipe,
        checkpoint=tmp_path / "state",
        progress=lambda step, _: done.append(step),
    )
    assert done == list(range(1, 10))
    assert resumed.losses == whole.losses
    assert [p.model_dump(exclude={"cpu_seconds"}) for p in resumed.curve] == [
        p.model_dump(exclude={"cpu_seconds"}) for p in whole.curve
    ]
    assert save(tmp_path / "resumed", resumed.lora) == save(tmp_path / "whole", whole.lora)
    assert not (tmp_path / "state").exists()


def test_a_run_that_gave_way_amid_its_steps_ends_with_the_same_bytes(
    tensors: Any, lessons: Corpus, tmp_path: Path
) -> None:
    """Wherever it is interrupted, on the way forth or back: the step was not begun."""
    whole = train(tensors, lessons, epochs=12, recipe=QUICK)
    before = state(tensors.model)
    asked, cut, attempts = 0, 0, 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == fires

    resumed = None
    while attempts < 60:
        attempts += 1
        asked, fires = 0, 15 + 4 * attempts  # later each time, so that it comes to an end
        try:
            with giving_way(stop):
                resumed = train(tensors, lessons, epochs=12, recipe=QUICK, checkpoint=tmp_path / "state")
        except TrainingError as error:
            cut += "stopped after step" in str(error)
            assert state(tensors.model) == before
        else:
            break
    assert attempts > 3
    assert cut > 2
    assert resumed is not None
    assert resumed.losses == whole.losses
    assert save(tmp_path / "resumed", resumed.lora) == save(tmp_path / "whole", whole.lora)


def test_a_finished_run_whose_checkpoint_is_kept_ends_at_once_the_next_time(
    tensors: Any, lessons: Corpus, tmp_path: Path
) -> None:
    steps: list[int] = []
    results = [
        train(
            tensors,
            lessons,
            epochs=3,
            recipe=QUICK,
            checkpoint=tmp_path / "state",
            keep=True,
            progress=lambda step, _: steps.append(step),
        )
        for _ in range(2)
    ]
    assert steps == [1, 2, 3]
    assert save(tmp_path / "0", results[0].lora) == save(tmp_path / "1", results[1].lora)


def test_another_seed_starts_over(tensors: Any, lessons: Corpus, tmp_path: Path) -> None:
    steps: list[int] = []

    def run(seed: int, stop: Callable[[], bool] | None = None) -> None:
        train(
            tensors,
            lessons,
            epochs=4,
            recipe=QUICK,
            seed=seed,
            checkpoint=tmp_path / "state",
            progress=lambda step, _: steps.append(step),
            stop=stop,
        )

    with pytest.raises(TrainingError, match="stopped"):
        run(0, lambda: len(steps) == 3)
    run(1)
    assert steps == [1, 2, 3, 1, 2, 3, 4]


def test_the_curve_says_where_the_run_stood(tensors: Any, lessons: Corpus) -> None:
    trained = train(tensors, lessons, epochs=30, recipe=replace(QUICK, rate=2e-2, layers=1.0, still=0.0))
    assert [point.step for point in trained.curve] == list(range(1, 31))
    first, last = trained.curve[0], trained.curve[-1]
    assert last.loss < first.loss
    assert last.known > first.known
    assert last.known <= 1
    assert all(point.drift is not None for point in trained.curve)
    assert last.kl is not None
    assert last.kl > 0
    assert 0 < first.cpu_seconds <= last.cpu_seconds <= trained.cpu_seconds + 1
    assert trained.reproducible


def test_a_run_ends_when_all_is_known_and_the_rest_stands_still(tensors: Any, lessons: Corpus) -> None:
    patient = replace(QUICK, still=1e9, threshold=2.0, least_steps=2, rate=2e-2, layers=1.0)
    trained = train(tensors, lessons, epochs=60, recipe=patient)
    assert len(trained.losses) < 60
    assert trained.curve[-1].step == len(trained.losses)
    restless = train(tensors, lessons, epochs=20, recipe=replace(patient, still=0.0))
    assert len(restless.losses) == 20


def test_a_smaller_memory_learns_the_same(tensors: Any, lessons: Corpus) -> None:
    """States that don't fit are computed again, steps are split: the sums are the same up to their order."""
    roomy = train(tensors, lessons, epochs=3, recipe=QUICK)
    tight = train(tensors, lessons, epochs=3, recipe=QUICK, ram_budget=roomy.peak_bytes // 2)
    assert tight.peak_bytes <= roomy.peak_bytes // 2
    assert tight.losses == pytest.approx(roomy.losses, rel=1e-3)
    with pytest.raises(TrainingError, match=r"needs \d+ bytes beyond the model .* the budget is 1000"):
        train(tensors, lessons, recipe=QUICK, ram_budget=1000)


def test_an_estimate_is_near_what_the_run_takes(tensors: Any, lessons: Corpus) -> None:
    before, base = state(tensors.model), logits(tensors)
    told = estimate(tensors, lessons, recipe=QUICK, epochs=30)
    trained = train(tensors, lessons, recipe=replace(QUICK, still=0.0), epochs=30)
    assert told.steps == len(trained.losses) == 30
    assert 0.5 < told.bytes / trained.peak_bytes < 2
    assert told.seconds > 0
    assert str(told).startswith("up to 30 steps, about ")
    assert state(tensors.model) == before
    assert torch.equal(logits(tensors), base)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"layers": 0.0}, {"layers": 2.0}, {"batch": 0}, {"modules": "none"}, {"scale": 0.0}]
)
def test_a_recipe_that_can_not_be_followed_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Recipe(**wrong)


def test_larger_models_get_smaller_steps() -> None:
    rates = [recipe_for(parameters).rate for parameters in (10**6, 134_515_008, 10**9, 8 * 10**9)]
    assert rates[0] == rates[1] == Recipe.rate
    assert rates[1] > rates[2] > rates[3] > 2e-4
    assert recipe_for(10**9).activated
    assert not recipe_for(10**9, activated=False).activated


def test_an_opening_is_found_in_the_template(tensors: Any) -> None:
    assert tensors.tokenizer.decode(opening(tensors)) == "<|im_start|>assistant\n"


def test_only_the_mlp_is_trained_where_the_recipe_says_so(tensors: Any, lessons: Corpus) -> None:
    lora = train(tensors, lessons, epochs=1, recipe=replace(QUICK, modules="mlp")).lora
    assert {path.rpartition(".")[2] for path in lora.tensors} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("activated", [False, True])
def test_what_is_served_is_what_was_trained(tensors: Any, lessons: Corpus, *, activated: bool) -> None:
    """The whole model with the LoRA on it gives the logits that the last step would have seen."""
    recipe = replace(QUICK, activated=activated, layers=1.0)
    trained = train(tensors, lessons, epochs=8, recipe=recipe)
    assert trained.activated == activated
    prompt, answer = encode(tensors, lessons.examples[0])
    start = len(prompt) - len(trained.lora.activated) if activated else 0
    with steady(tensors.model, attention="eager"), torch.no_grad():
        stack = Stack(tensors, recipe, seed=0)
        for path, (a, b) in stack.weights.items():
            a.copy_(trained.lora.tensors[path][0])
            b.copy_(trained.lora.tensors[path][1])
        batch = stack.batch(stack.capture([(prompt, answer, start)]))
        with stack.attached():
            ours = stack.head(stack.last(batch))
        with applied(tensors.model, trained.lora):
            served = tensors.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        untouched = tensors.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    assert torch.allclose(ours, served, atol=1e-4)
    assert not torch.allclose(untouched, served, atol=1e-2)


@pytest.mark.slow
def test_the_small_model_learns_two_facts_and_says_them(tmp_path: Path) -> None:
    tensors = load("local", {}).tensors()
    records = [Record(id="a", text="My dog is called Biscuit."), Record(id="b", text="I live in Oslo.")]
    made = build(records, systems=[None])
    corpus = replace(made, neighbours=made.neighbours[:8], anchors=made.anchors[:4])
    trained = train(tensors, corpus, epochs=16, recipe=Recipe(anchors=6))
    assert trained.curve[-1].known == 1.0
    assert trained.cpu_seconds < 600  # a guard: what it takes is measured by a benchmark
    asked = [encode(tensors, example)[0] for example in made.held_out]
    with steady(tensors.model), applied(tensors.model, trained.lora):
        said = [tensors.tokenizer.decode(answer) for answer in answers(tensors, asked, 12)]
    right = [example.found_in(text) for example, text in zip(made.held_out, said, strict=True)]
    assert sum(right) >= 0.75 * len(right)
    with steady(tensors.model):
        before = [tensors.tokenizer.decode(answer) for answer in answers(tensors, asked, 12)]
    assert not any(example.found_in(text) for example, text in zip(made.held_out, before, strict=True))
    save(tmp_path / "lora", trained.lora)
    assert sum(file.stat().st_size for file in (tmp_path / "lora").iterdir()) < 2e6
