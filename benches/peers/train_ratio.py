"""Times a training step of melglow and of PyTorch in turn and prints the ratio.

    python train_ratio.py lj --threads 1 --rounds 3

lj           our voice's recipe, against `train_step.py compact`.
waveglow-64  NVIDIA's WaveGlow with 64 channels, against `train_step.py waveglow`.

Run from the repository's root. A round is one process of each; the figures are the medians of
the rounds, memory the peak of the whole process.
"""

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

PEERS = {"lj": "compact", "waveglow-64": "waveglow"}


def measure(command):
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(text, end="", flush=True)
    speed = float(re.search(r"([\d.]+) samples/s", text)[1])
    return speed, float(re.search(r"peak memory ([\d.]+) MiB", text)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(PEERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    threads, steps = str(args.threads), str(args.steps)
    ours = ["cargo", "bench", "--quiet", "--bench", "train_step", "--", args.recipe, threads, steps]
    script = Path(__file__).with_name("train_step.py")
    theirs = [sys.executable, str(script), PEERS[args.recipe], "--threads", threads, "--steps", steps]
    subprocess.run(["cargo", "bench", "--quiet", "--bench", "train_step", "--no-run"], check=True)
    rounds = [(measure(ours), measure(theirs)) for _ in range(args.rounds)]
    speed = [statistics.median(side[i][0] for side in rounds) for i in range(2)]
    memory = [statistics.median(side[i][1] for side in rounds) for i in range(2)]
    print(f"{args.recipe}, {threads} threads: {speed[0]:.0f} samples/s against PyTorch's {speed[1]:.0f}: "
          f"{speed[0] / speed[1]:.2f}x; memory {memory[0]:.0f} against {memory[1]:.0f} MiB: "
          f"{memory[0] / memory[1]:.2f}x")


if __name__ == "__main__":
    main()
