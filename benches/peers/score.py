"""Scores vocoder output against the recordings it was made from.

    python score.py --reference wavs --clips LJ002-0155..LJ002-0184 \
        melglow=out/melglow waveglow=out/waveglow --griffin-lim mels --json scores.json

    melglow eval --data LJSpeech-1.1 --clips LJ002-0155..LJ002-0184 --out eval
    python score.py --eval eval

Each system is a folder of <clip>.wav. `--eval` takes a folder that `melglow eval --out` wrote:
recording/ holds the recordings, every other folder in it is a system, and the clips are
those of recording/. `--griffin-lim` adds the baseline made from a
folder of <clip>.npy mels: [80, frames], natural log of the magnitude mel (Slaney scale
and norm, 0-8000 Hz), floor 1e-5, 22050 Hz, STFT 1024/256, centred; as NVIDIA's
TacotronSTFT and `melglow mel` write them. `--write-mels` makes that folder here.

The table has the mean over the clips and half the width of its 95 % confidence interval
(Student's t over clips). All measures but DistillMOS compare with the recording:

PESQ        wideband (ITU-T P.862.2), at 16 kHz; a recording against itself has 4.64
STOI        at 16 kHz
DistillMOS  predicted listener opinion 1..5, at 16 kHz, without a reference
ViSQOL      3.8's audio mode, at 48 kHz: the only one that hears what lies above 8 kHz; a recording
            against itself has 4.73
GPE %       gross pitch error: pitch more than 20 % off, of frames voiced in both
VDE %       voicing decision differs, of all frames
mel L1      mean absolute difference of the log mels
"""

import argparse
import json
import re
import sys
import types
from pathlib import Path

import librosa
import numpy as np
import pesq
import pystoi
import pyworld
import scipy.stats
import soundfile
import soxr
import torch
from visqol import VisqolApi

SAMPLE_RATE = 22050
N_FFT = 1024
HOP_LENGTH = 256
MEL_FLOOR = 1e-5
MEL_BASIS = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=80, fmin=0.0, fmax=8000.0)
METRICS = {"pesq": ("PESQ", 2), "stoi": ("STOI", 3), "distillmos": ("DistillMOS", 2),
           "visqol": ("ViSQOL", 2), "gpe": ("GPE %", 1), "vde": ("VDE %", 1), "mel_l1": ("mel L1", 3)}


def read(path):
    audio, rate = soundfile.read(path, dtype="float64")
    if rate != SAMPLE_RATE or audio.ndim != 1:
        sys.exit(f"{path}: expected mono at {SAMPLE_RATE} Hz, got shape {audio.shape} at {rate} Hz")
    return audio


def log_mel(audio):
    spectrum = librosa.stft(audio, n_fft=N_FFT, hop_length=HOP_LENGTH, pad_mode="reflect")
    return np.log(np.maximum(MEL_BASIS @ np.abs(spectrum), MEL_FLOOR))


def pitch(audio):
    """Pitch in Hz every 5 ms, 0 where unvoiced."""
    coarse, times = pyworld.dio(audio, SAMPLE_RATE, f0_floor=70.0, f0_ceil=500.0)
    return pyworld.stonemask(audio, coarse, times, SAMPLE_RATE)


def load_distillmos():
    # DistillMOS wants torchaudio only to read files on its own command line.
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    import distillmos
    model = distillmos.ConvTransformerSQAModel().eval()

    @torch.inference_mode()
    def score(audio_16k):
        return model(torch.from_numpy(audio_16k).float()[None]).item()

    return score


def load_visqol():
    api = VisqolApi()
    api.create(mode="audio")

    def score(reference, audio):
        pair = (soxr.resample(sound, SAMPLE_RATE, 48000) for sound in (reference, audio))
        return float(api.measure_from_arrays(*pair, sample_rate=48000).moslqo)

    return score


def score_clip(reference, audio, distillmos, visqol, where):
    length = min(len(reference), len(audio))
    if length < 0.9 * len(reference):
        sys.exit(f"{where}: {len(audio)} samples, expected about {len(reference)}")
    reference, audio = reference[:length], audio[:length]
    reference_16k = soxr.resample(reference, SAMPLE_RATE, 16000)
    audio_16k = soxr.resample(audio, SAMPLE_RATE, 16000)
    value = pesq.pesq(16000, reference_16k, audio_16k, "wb", on_error=pesq.PesqError.RETURN_VALUES)
    if value < 0.0:
        print(f"{where}: PESQ finds no speech, counted as 1.0", file=sys.stderr)
        value = 1.0
    expected, got = pitch(reference), pitch(audio)
    both = (expected > 0) & (got > 0)
    gross = np.abs(got[both] / expected[both] - 1.0) > 0.2
    return {
        "pesq": float(value),
        "stoi": float(pystoi.stoi(reference_16k, audio_16k, 16000)),
        "distillmos": distillmos(audio_16k),
        "visqol": visqol(reference, audio),
        "gpe": 100.0 * float(gross.mean()) if gross.size else 100.0,
        "vde": 100.0 * float(((expected > 0) != (got > 0)).mean()),
        "mel_l1": float(np.abs(log_mel(reference) - log_mel(audio)).mean()),
    }


def linear_from_mel(mel):
    """Non-negative magnitude spectrum whose mel comes nearest: [513, frames]."""
    # librosa's solver starts at the clipped pseudo-inverse and stops at a fixed gradient of
    # 1e-5, which speech in -1..1 is under from the start: without the scale it changes
    # nothing. PESQ of fast Griffin-Lim on LJ002-0160: 3.20 unscaled, 3.59 at 1e4, 3.62 at 1e6.
    scale = 1e6
    return librosa.util.nnls(MEL_BASIS.astype(np.float64), scale * np.exp(mel.astype(np.float64))) / scale


def griffin_lim(spectrum, momentum, iterations=60):
    audio = librosa.griffinlim(spectrum, n_iter=iterations, hop_length=HOP_LENGTH, n_fft=N_FFT,
                               momentum=momentum, pad_mode="reflect", random_state=0)
    return np.round(np.clip(audio, -1.0, 32767 / 32768) * 32768) / 32768  # as a 16-bit file


def clip_range(text):
    """`LJ002-0155..LJ002-0184`, or names with commas between."""
    if ".." not in text:
        return text.split(",")
    first, last = (re.fullmatch(r"(.*?)(\d+)", end) for end in text.split("..", 1))
    if not first or not last or first[1] != last[1]:
        sys.exit(f"--clips {text}: expected PREFIX0001..PREFIX0009")
    return [f"{first[1]}{i:0{len(first[2])}}" for i in range(int(first[2]), int(last[2]) + 1)]


def summary(scores):
    """{metric: (mean, half width of the 95 % interval)} of a list of clip scores."""
    result = {}
    for metric in METRICS:
        values = np.array([score[metric] for score in scores])
        half = 0.0
        if len(values) > 1:
            half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
        result[metric] = (float(values.mean()), float(half))
    return result


def table(systems):
    lines = ["| system | " + " | ".join(title for title, _ in METRICS.values()) + " |",
             "|---" * (len(METRICS) + 1) + "|"]
    for name, clips in systems.items():
        means = summary(list(clips.values()))
        cells = [f"{means[m][0]:.{digits}f} ± {means[m][1]:.{digits}f}" for m, (_, digits) in METRICS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--eval", type=Path, metavar="DIR", help="folder that `melglow eval --out` wrote")
    parser.add_argument("--reference", type=Path, help="folder of the recordings")
    parser.add_argument("--clips", type=clip_range, help="FIRST..LAST, or names with commas")
    parser.add_argument("--griffin-lim", type=Path, metavar="MEL_DIR", help="add the Griffin-Lim baselines")
    parser.add_argument("--write-mels", type=Path, metavar="DIR", help="first write the recordings' mels here")
    parser.add_argument("--write-audio", type=Path, metavar="DIR", help="keep the baselines' audio here")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the score of every clip")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    folders = {}
    if args.eval:
        args.reference = args.reference or args.eval / "recording"
        args.clips = args.clips or sorted(path.stem for path in args.reference.glob("*.wav"))
        folders = {path.name: path for path in sorted(args.eval.iterdir()) if path.is_dir() and path.name != "recording"}
    if not args.reference or not args.clips:
        parser.error("give --reference and --clips, or --eval DIR")
    for system in args.systems:
        name, separator, folder = system.partition("=")
        if not separator or not Path(folder).is_dir():
            parser.error(f"{system}: expected NAME=DIR with an existing folder")
        folders[name] = Path(folder)
    distillmos, visqol = load_distillmos(), load_visqol()
    systems = {}
    for clip in args.clips:
        reference = read(args.reference / f"{clip}.wav")
        if args.write_mels:
            args.write_mels.mkdir(parents=True, exist_ok=True)
            np.save(args.write_mels / f"{clip}.npy", log_mel(reference).astype(np.float32))
        outputs = {"recording": reference}
        if args.griffin_lim:
            spectrum = linear_from_mel(np.load(args.griffin_lim / f"{clip}.npy"))
            outputs["Griffin-Lim 60"] = griffin_lim(spectrum, 0.0)
            outputs["fast Griffin-Lim 60"] = griffin_lim(spectrum, 0.99)
            if args.write_audio:
                for name in ("Griffin-Lim 60", "fast Griffin-Lim 60"):
                    folder = args.write_audio / name.replace(" ", "-").lower()
                    folder.mkdir(parents=True, exist_ok=True)
                    soundfile.write(folder / f"{clip}.wav", outputs[name], SAMPLE_RATE, subtype="PCM_16")
        for name, folder in folders.items():
            outputs[name] = read(folder / f"{clip}.wav")
        for name, audio in outputs.items():
            systems.setdefault(name, {})[clip] = score_clip(reference, audio, distillmos, visqol, f"{name} {clip}")
        print(f"{clip} done", file=sys.stderr)

    print(f"{len(args.clips)} clips, mean ± 95 % confidence\n\n{table(systems)}")
    if args.json:
        means = {name: summary(list(clips.values())) for name, clips in systems.items()}
        args.json.write_text(json.dumps({"means": means, "clips": systems}, indent=1) + "\n")


if __name__ == "__main__":
    main()
