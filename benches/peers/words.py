"""Word errors of a recogniser on vocoder output, beside the recordings.

    melglow eval --data LJSpeech-1.1 --clips LJ002-0155..LJ002-0184 --out eval
    python words.py --metadata LJSpeech-1.1/metadata.csv recording=eval/recording lj=eval/voice

Each system is a folder of <clip>.wav; the clips are those of the first. PocketSphinx with its own
English models hears each at 16 kHz; its errors are counted against the last column of
metadata.csv, over all words, and as the difference from the first system with half the width of a
95 % confidence interval (bootstrap over clips). The recogniser is old and errs a lot on recordings
already: what counts is the difference.
"""

import argparse
import re
import sys
from pathlib import Path

import jiwer
import numpy as np
import pocketsphinx
import soundfile
import soxr

RATE = 16000
DRAWS = 10_000


def words(text):
    return re.sub(r"[^a-z' ]+", " ", text.lower()).split()


def pcm(audio, rate):
    return (np.clip(soxr.resample(audio, rate, RATE), -1, 1) * 32767).astype("<i2").tobytes()


def heard(path):
    audio, rate = soundfile.read(path, dtype="float64")
    decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")
    decoder.start_utt()
    decoder.process_raw(pcm(audio, rate), full_utt=True)
    decoder.end_utt()
    return words(decoder.hyp().hypstr) if decoder.hyp() else []


def errors(expected, got):
    # a recogniser that hears nothing deletes every word
    if not got:
        return len(expected)
    found = jiwer.process_words(" ".join(expected), " ".join(got))
    return found.substitutions + found.deletions + found.insertions


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("systems", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--metadata", type=Path, required=True, help="metadata.csv of the clips")
    args = parser.parse_args()
    text = dict(line.split("|")[::2] for line in args.metadata.read_text("utf-8").splitlines())
    systems = dict(system.split("=", 1) for system in args.systems)
    first = Path(next(iter(systems.values())))
    clips = sorted(path.stem for path in first.glob("*.wav"))
    if missing := [clip for clip in clips if clip not in text]:
        sys.exit(f"{args.metadata}: no text of {', '.join(missing)}")
    counts = np.array([len(words(text[clip])) for clip in clips])
    draws = np.random.default_rng(0).integers(len(clips), size=(DRAWS, len(clips)))
    print(f"{len(clips)} clips, {counts.sum()} words")
    base = None
    for name, folder in systems.items():
        found = np.array([errors(words(text[clip]), heard(Path(folder) / f"{clip}.wav")) for clip in clips])
        base = found if base is None else base
        rates = 100 * (found - base)[draws].sum(1) / counts[draws].sum(1)
        half = (np.quantile(rates, 0.975) - np.quantile(rates, 0.025)) / 2
        print(f"{name:20} {100 * found.sum() / counts.sum():6.1f} %   {100 * (found - base).sum() / counts.sum():+6.1f} ± {half:.1f}", flush=True)


if __name__ == "__main__":
    main()
