"""PESQ of one sound beside its recording, for `melglow zoo --scorer`.

    python pesq_pair.py RECORDING.wav SOUND.wav

Wideband (ITU-T P.862.2), at 16 kHz; a recording against itself has 4.64.
"""

import sys

import pesq
import soundfile
import soxr


def read(path):
    audio, rate = soundfile.read(path, dtype="float64")
    return soxr.resample(audio, rate, 16000)


recording, sound = (read(path) for path in sys.argv[1:3])
n = min(len(recording), len(sound))
print(f"{pesq.pesq(16000, recording[:n], sound[:n], 'wb'):.4f}")
