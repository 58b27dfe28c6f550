"""Train the small chat model that Ropeway ships, or evaluate it.

    python examples/train_bundled.py --minutes 60              # two CPU cores; writes src/ropeway/bundled
    python examples/train_bundled.py --minutes 5               # on an accelerator, used when there is one
    python examples/train_bundled.py --steps 200 --out /tmp/m  # a fixed number of steps: repeatable for a --seed
    python examples/train_bundled.py --eval                    # perplexity and accuracy on held-out material

All text is made by `bundled_corpus` or taken from this project's documentation; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Threads that wait for each other asleep instead of spinning: on a machine that does other work too, spinning costs
# most of the speed. OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from bundled_corpus.corpus import documents
from bundled_files import encode, train_tokenizer, write_model, write_tokenizer
from bundled_model import Model, Shape, plant_induction
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "src" / "ropeway" / "bundled"
SHARD = 8000  # documents that are sorted by length together


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps, for weight matrices (Jordan et al., 2024).

    Matrices of one shape are processed together. It needs fewer tokens than AdamW for the same loss, which is what
    counts in one hour on two cores.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            ready = []
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                ready.append(p.grad.lerp(average, group["momentum"]))
            rows, columns = group["params"][0].shape
            updates = _orthogonal(torch.stack(ready)) * max(1.0, rows / columns) ** 0.5
            for p, update in zip(group["params"], updates, strict=True):
                p.add_(update, alpha=-group["lr"])


def _orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix of `x` [n, rows, columns] by values near 1."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


def batches(tokenizer: Tokenizer, seed: int, tokens: int, longest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches (ids, loss weights), both [rows, length], of at most `tokens` places.

    Rows of similar length share a batch, so that little is padding; the order of batches is random.
    """
    shard = 0
    while True:
        rng = random.Random(f"{seed} {shard}")
        rows = [encode(tokenizer, d) for d in documents(rng.randrange(2**60), SHARD, ROOT)]
        rows = sorted(((ids[:longest], w[:longest]) for ids, w in rows), key=lambda row: len(row[0]))
        cut: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if (len(cut[-1]) + 1) * len(row[0]) > tokens:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        for some in cut:
            width = max(len(ids) for ids, _ in some)
            ids = torch.zeros(len(some), width, dtype=torch.long)
            weights = torch.zeros(len(some), width)
            for i, (row_ids, row_weights) in enumerate(some):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                weights[i, : len(row_ids)] = torch.tensor(row_weights)
            yield ids, weights
        shard += 1


def rate(progress: float, step: int, warmup: int = 40) -> float:
    """The learning rate as a part of its peak: a short rise, a plateau for half of the time, then a straight fall."""
    return min(1.0, (step + 1) / warmup, max(0.01, (1 - progress) / 0.5))


class Report:
    """Prints progress every 20 seconds and says when it is time for a checkpoint."""

    def __init__(self, save_minutes: float) -> None:
        self.began = self._shown = self._saved = time.monotonic()
        self.step, self.places, self.loss = 0, 0, 0.0
        self._save_seconds = 60 * save_minutes

    def add(self, loss: float, places: int) -> bool:
        """Count one step; True when a checkpoint is due."""
        self.step += 1
        self.places += places
        self.loss += max(0.02, 1 / self.step) * (loss - self.loss)
        now = time.monotonic()
        spent = now - self.began
        if now - self._shown > 20 or self.step == 10:
            self._shown = now
            pace = f"{self.places / spent:7.0f} tokens/s"
            print(f"{spent / 60:6.1f} min  step {self.step:6d}  loss {self.loss:.4f}  {pace}", flush=True)
        due = now - self._saved > self._save_seconds
        if due:
            self._saved = now
        return due


def train_step(model: Model, parts: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Add the gradients of one step, whose batches count by their loss weight; return the weighted loss in nats."""
    total = sum(float(weights[:, 1:].sum()) for _, weights in parts)
    loss = 0.0
    for ids, weights in parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            summed, _ = model.loss(ids.to(device), weights.to(device))
        torch.autograd.backward(summed / total)
        loss += float(summed.detach()) / total
    return loss


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train by the clock (`args.minutes`) or by `args.steps`; write checkpoints to `args.out`; return a summary."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    shape = Shape()
    report = Report(args.save_minutes)
    tokenizer = train_tokenizer(documents(args.seed, 20000, ROOT), shape.vocab_size)
    write_tokenizer(tokenizer, args.out, shape.max_position_embeddings)
    with device:  # the masks of the planted heads live where the weights do
        model = Model(shape)
    plant_induction(model, args.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    adam = torch.optim.AdamW(others, lr=args.lr / 6, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = [Muon(matrices, lr=args.lr), adam]
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    source = batches(tokenizer, args.seed, args.batch_tokens // 2, args.longest)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters on {device}, {tokenizer.get_vocab_size()} kinds of tokens", flush=True)

    while True:
        spent = (time.monotonic() - report.began) / 60
        progress = report.step / args.steps if args.steps else spent / args.minutes
        if progress >= 1:
            break
        for o, peak in zip(optimizers, peaks, strict=True):
            for group, top in zip(o.param_groups, peak, strict=True):
                group["lr"] = top * rate(progress, report.step)
        parts = [next(source) for _ in range(2)]
        loss = train_step(model, parts, device)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        if report.add(loss, sum(ids.numel() for ids, _ in parts)):
            write_model(model, tokenizer, args.out)
    write_model(model, tokenizer, args.out)
    summary: dict[str, Any] = {
        "steps": report.step,
        "tokens": report.places,
        "minutes": round(spent, 1),
        "loss": round(report.loss, 4),
    }
    summary |= {"parameters": size, "device": device.type, "seed": args.seed}
    print(json.dumps(summary), flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or evaluate the bundled model.")
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINT, help="directory of the checkpoint (default: the package)"
    )
    parser.add_argument("--minutes", type=float, default=60, help="length of the training (default 60)")
    parser.add_argument("--steps", type=int, default=0, help="train for this many steps instead of --minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of the weight matrices")
    parser.add_argument("--batch-tokens", type=int, default=3072, help="places in a step")
    parser.add_argument("--longest", type=int, default=768, help="longest training row in tokens")
    parser.add_argument("--save-minutes", type=float, default=4, help="time between checkpoints")
    parser.add_argument(
        "--eval",
        nargs="?",
        type=Path,
        const=CHECKPOINT,
        metavar="DIR",
        help="evaluate a checkpoint instead of training",
    )
    args = parser.parse_args()
    if args.eval:
        from bundled_eval import evaluate

        evaluate(args.eval, threads=args.threads)
    else:
        train(args)


if __name__ == "__main__":
    main()
