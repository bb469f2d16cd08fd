"""Draws the spectrograms of WAV files, one above the other, into one PNG.

    python spectrogram.py OUT.png A.wav B.wav [...] [--start 0.5] [--seconds 2]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.signal
import soundfile


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("png", type=Path)
    parser.add_argument("wavs", type=Path, nargs="+")
    parser.add_argument("--start", type=float, default=0.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()

    figure, axes = plt.subplots(len(args.wavs), squeeze=False, sharex=True, sharey=True,
                                figsize=(12, 3 * len(args.wavs)), layout="constrained")
    for axis, path in zip(axes[:, 0], args.wavs):
        audio, rate = soundfile.read(path)
        audio = audio[int(args.start * rate):int((args.start + args.seconds) * rate)]
        frequency, seconds, power = scipy.signal.spectrogram(
            audio, rate, window="hann", nperseg=1024, noverlap=1024 - 128, scaling="spectrum")
        # One scale for all, so that levels compare between the files.
        axis.pcolormesh(args.start + seconds, frequency / 1000, 10 * np.log10(power + 1e-12),
                        vmin=-110, vmax=-30, cmap="magma", rasterized=True)
        axis.set_title(f"{path.parent.name}/{path.name}", loc="left", fontsize=9)
        axis.set_ylabel("kHz")
    axes[-1, 0].set_xlabel("seconds")
    figure.savefig(args.png, dpi=100)


if __name__ == "__main__":
    main()
