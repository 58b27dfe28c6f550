"""What HTTP costs: the same requests through the server, streamed, and through the offline `LLM`, in turn.

    python benchmarks/cpu/over_http.py MODEL [--streams 32] [--requests 64] [--tokens 128] [--rounds 3]

MODEL is a checkpoint's directory or 'bundled'. Server, engine and load generator share the machine's cores, so what is
lost is the work of all of them beside the engine's: parsing, detokenizing, writing and reading the streams.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ropeway.bench.spawn import serving

ROPEWAY = [sys.executable, "-m", "ropeway"]


def _load(options: argparse.Namespace, seed: int) -> list[str]:
    """Requests that are the same both ways and new in every round, so that no prefix cache knows them."""
    return [
        *("--dataset-name", "random", "--num-prompts", str(options.requests), "--seed", str(seed)),
        *("--random-input-len", str(options.tokens), "--random-output-len", str(options.tokens)),
    ]


def _engine(options: argparse.Namespace) -> list[str]:
    return ["--dtype", options.dtype, "--max-num-seqs", str(options.streams), "--quantization", options.quantization]


def offline(options: argparse.Namespace, seed: int, folder: Path) -> float:
    """Output tokens/s."""
    result = folder / "offline.json"
    command = [*ROPEWAY, "bench", "throughput", options.model, *_engine(options), *_load(options, seed)]
    subprocess.run([*command, "--output-json", str(result)], check=True, stdout=subprocess.DEVNULL)
    return float(options.requests * options.tokens / json.loads(result.read_text())["elapsed_time"])


def served(options: argparse.Namespace, seed: int, folder: Path) -> float:
    """Output tokens/s, as the client saw them."""
    with serving(options.model, _engine(options)) as address:
        command = [*ROPEWAY, "bench", "serve", "--base-url", address, "--ignore-eos", *_load(options, seed)]
        command += ["--max-concurrency", str(options.streams), "--num-warmups", "2"]
        command += ["--save-result", "--result-dir", str(folder), "--result-filename", "served.json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((folder / "served.json").read_text())["output_throughput"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt, and of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="auto")
    options = parser.parse_args()
    ways: dict[str, list[float]] = {"offline": [], "HTTP": []}
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            ways["offline"].append(offline(options, number, Path(name)))
            ways["HTTP"].append(served(options, number, Path(name)))
            print(f"round {number}: " + ", ".join(f"{way} {rates[-1]:.1f} tokens/s" for way, rates in ways.items()))
    alone, streamed = (statistics.median(rates) for rates in ways.values())
    ratios = [b / a for a, b in zip(*ways.values(), strict=True)]
    print(f"median: offline {alone:.1f}, HTTP {streamed:.1f} tokens/s: {streamed / alone:.3f} of offline")
    print(f"ratio of each round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
