"""Evaluation of the bundled model on held-out material: perplexity and instruction accuracy, by kind."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bundled_corpus import corpus, tasks
from bundled_corpus.corpus import Document
from bundled_corpus.tasks import Item
from bundled_files import encode
from tokenizers import Tokenizer

SEED = 20_000_003
LONGEST_ANSWER = 420  # tokens; an answer that is cut here did not end by itself

KINDS: dict[str, Callable[[random.Random], Item]] = {
    "concept": corpus.concept, "story": corpus.story, "arithmetic": tasks.arithmetic, "list": tasks.lists,
    "counting": tasks.counting, "compare": tasks.compare, "sort and reverse": tasks.sorting, "copy": tasks.copying,
    "fact": tasks.fact, "unknown": tasks.unknown,
}  # fmt: skip


def held_out_documents(per_kind: int) -> dict[str, list[Document]]:
    """Held-out texts by kind: one question and its answer each, and two kinds of plain text."""
    rng = random.Random(SEED)
    texts: dict[str, list[Document]] = {}
    for name, kind in KINDS.items():
        texts[name] = []
        for _ in range(per_kind):
            it = corpus.item(rng, True, kind)
            turns = ({"role": "user", "content": it.question}, {"role": "assistant", "content": it.answer})
            texts[name].append(Document(name, turns))
    texts["plain story"] = [
        Document("plain story", text=corpus.item(rng, True, corpus.story).answer) for _ in range(per_kind)
    ]
    return texts


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Tokenizer, texts: list[Document]) -> tuple[float, int]:
    """Perplexity per token, and the number of tokens, of what the model should write in `texts`; all count alike."""
    nats, count = 0.0, 0
    for document in texts:
        ids, weights = encode(tokenizer, document)
        logp = model(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
        learn = torch.tensor([w > 0 for w in weights[1:]])
        nats -= float(logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][learn].sum())
        count += int(learn.sum())
    return math.exp(nats / count), count


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, questions: list[str], batch: int = 16) -> list[tuple[str, int, bool]]:
    """Greedy answers: text, length in tokens, and whether the model ended by itself."""
    results = []
    for i in range(0, len(questions), batch):
        chats = [[{"role": "user", "content": q}] for q in questions[i : i + batch]]
        prompt = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**prompt, do_sample=False, temperature=None, top_p=None, max_new_tokens=LONGEST_ANSWER)
        for row in out[:, prompt["input_ids"].shape[1] :].tolist():
            ends = [j for j, t in enumerate(row) if t in model.generation_config.eos_token_id]
            text = tokenizer.decode(row[: ends[0]] if ends else row)
            results.append((text, ends[0] + 1 if ends else len(row), bool(ends)))
    return results


def evaluate(directory: Path, threads: int = 2, per_kind: int = 40, show: bool = True) -> dict[str, Any]:
    """Evaluate a checkpoint as `transformers` loads it; print a table and one line of JSON; return the figures.

    Accuracy is greedy and strict: sums and sequences must be exact, lists must have the right number of different
    members, an answer about a concept must contain its key facts, a story must contain who and what was asked for, and
    every answer must end by itself.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))

    figures: dict[str, dict[str, float]] = defaultdict(dict)
    for name, texts in held_out_documents(per_kind).items():
        value, count = perplexity(model, raw, texts)
        figures[name] |= {"perplexity": round(value, 3), "tokens": count}

    items = corpus.evaluation_items(SEED, per_kind)
    made = answers(model, tokenizer, [it.question for it in items])
    samples, lengths = [], []
    for name in KINDS:
        mine = [(it, a) for it, a in zip(items, made, strict=True) if it.kind == name]
        good = [corpus.right(it, a[0]) and a[2] for it, a in mine]
        lengths += [a[1] for _, a in mine]
        figures[name] |= {
            "items": len(mine),
            "accuracy": round(sum(good) / len(mine), 3),
            "ended": round(sum(a[2] for _, a in mine) / len(mine), 3),
            "answer_tokens": round(sum(a[1] for _, a in mine) / len(mine), 1),
        }
        samples += [(name, it.question, a[0], ok) for (it, a), ok in list(zip(mine, good, strict=True))[:2]]
        samples += [(name, it.question, a[0], ok) for (it, a), ok in zip(mine, good, strict=True) if not ok][:2]
    asked = [f for f in figures.values() if "items" in f]
    total = sum(f["items"] for f in asked)
    everything = {
        "accuracy": round(sum(f["accuracy"] * f["items"] for f in asked) / total, 3),
        "ended": round(sum(f["ended"] * f["items"] for f in asked) / total, 3),
        "shortest_answer": min(lengths),
        "longest_answer": max(lengths),
    }
    if show:
        _print(figures, everything, samples)
    return {"kinds": dict(figures), "all": everything}


def _print(
    figures: dict[str, dict[str, float]], everything: dict[str, float], samples: list[tuple[str, str, str, bool]]
) -> None:
    for name, question, answer, ok in samples:
        print(f"[{name}] {'right' if ok else 'WRONG'}\n  > {question}\n  < " + answer.replace("\n", "\n    "))
    print("\n| held-out kind | perplexity | items | accuracy | ended by itself | mean answer, tokens |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, f in figures.items():
        rest = (
            f"{f['items']} | {f['accuracy']:.0%} | {f['ended']:.0%} | {f['answer_tokens']}"
            if "items" in f
            else "- | - | - | -"
        )
        print(f"| {name} | {f['perplexity']:.2f} | {rest} |")
    print(f"\nall kinds: accuracy {everything['accuracy']:.1%}, ended by itself {everything['ended']:.1%}, ", end="")
    print(f"answers of {everything['shortest_answer']} to {everything['longest_answer']} tokens")
    print(json.dumps({"kinds": figures, "all": everything}))
