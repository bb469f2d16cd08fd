"""Times a training step of melglow and of PyTorch in turn and prints the ratio.

    cargo build --release && python train_ratio.py parallel --threads 1 --rounds 3

lj           our voice's recipe, against `train_step.py recursive`.
parallel     twelve couplings and no recursion, against `train_step.py compact`.
waveglow-64  NVIDIA's WaveGlow with 64 channels, against `train_step.py waveglow`.

Run from the repository's root, or name the program with --melglow. A round is one process of each; a
ratio is ours over theirs within a round, and the figures are medians (and ranges) over the rounds;
memory is the peak of the whole process.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

PEERS = {"lj": "recursive", "parallel": "compact", "waveglow-64": "waveglow"}


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return done.stdout


def melglow(program, recipe, threads, steps, more):
    """Samples a second and peak memory in MB."""
    report = run([program, "bench", "--train", "--arch", recipe, "--threads", str(threads), "--rounds", str(steps),
                  "--json", "-", *more])
    figures = json.loads(report)["runs"][0]
    return figures["samples_per_second"]["median"], (figures["peak_memory_bytes"] or 0) / 1e6


def torch(recipe, threads, steps, more):
    script = Path(__file__).with_name("train_step.py")
    text = run([sys.executable, str(script), PEERS[recipe], "--threads", str(threads), "--steps", str(steps), *more])
    speed, memory = re.search(r"([\d.]+) samples/s", text), re.search(r"peak memory ([\d.]+) MiB", text)
    return float(speed[1]), float(memory[1]) * 2**20 / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(PEERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recompute", action="store_true", help="ours keeps no activations")
    parser.add_argument("--bf16", action="store_true", help="products in bf16, PyTorch's by autocast")
    parser.add_argument("--melglow", default="target/release/melglow", help="the program")
    args = parser.parse_args()
    more = ["--recompute"] * args.recompute + ["--precision", "bf16"] * args.bf16
    rounds = []
    for _ in range(args.rounds):
        ours = melglow(args.melglow, args.recipe, args.threads, args.steps, more)
        rounds.append((ours, torch(args.recipe, args.threads, args.steps, ["--bf16"] * args.bf16)))
        print(f"{rounds[-1][0][0]:.0f} samples/s, PyTorch {rounds[-1][1][0]:.0f}", file=sys.stderr)
    speed = [statistics.median(side[i][0] for side in rounds) for i in range(2)]
    memory = [statistics.median(side[i][1] for side in rounds) for i in range(2)]
    ratios = [ours[0] / theirs[0] for ours, theirs in rounds]
    print(f"{args.recipe}, {args.threads} threads: {speed[0]:.0f} samples/s against PyTorch's {speed[1]:.0f}: "
          f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}); "
          f"memory {memory[0]:.0f} against {memory[1]:.0f} MB: {memory[0] / memory[1]:.2f}x")


if __name__ == "__main__":
    main()
