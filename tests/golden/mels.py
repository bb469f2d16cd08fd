"""Writes the golden files beside it: a sound, and its mel as each program makes it.

    pip install librosa==0.11.0 scipy h5py==3.16.0 kaldiio==2.18.1
    python mels.py

Each function is the extractor of the named program, with its parameters, in terms of librosa and
NumPy (float32 sound as they read it, double precision from there on). The containers hold the first
mel's first frames as h5py and kaldiio write them for ParallelWaveGAN and ESPnet.
"""

import wave
from pathlib import Path

import h5py
import kaldiio
import librosa
import numpy as np
import scipy.signal

HERE = Path(__file__).parent


def sound():
    """0.35 s: a gliding voice, noise, and silence; whole 16-bit steps, so that both sides have the same."""
    state = np.uint32(1)
    noise = np.empty(7777)
    for i in range(len(noise)):
        state = np.uint32((int(state) * 1664525 + 1013904223) % 2**32)
        noise[i] = int(state) / 2**31 - 1
    t = np.arange(len(noise)) / 22050
    phase = 2 * np.pi * np.cumsum(110 + 40 * t / t[-1]) / 22050
    voice = sum(np.cos(k * phase + k * k) * np.exp(-k / 12) / k**0.3 for k in range(1, 60))
    loud = np.where(np.arange(len(t)) < 4500, 0.12 * voice, 0.1 * noise * np.hanning(len(t)))
    samples = np.round(32768 * loud + 4 * noise).clip(-32768, 32767)
    samples[6000:] = 0
    return samples.astype("<i2")


def bands(x, sr, n_fft, win, hop, n_mels, fmin, fmax, *, center=True, pad_mode="reflect", htk=False,
          power=1, epsilon=0.0):
    spectrum = np.abs(librosa.stft(x, n_fft=n_fft, hop_length=hop, win_length=win, center=center, pad_mode=pad_mode))
    spectrum = np.sqrt(spectrum**2 + epsilon) if power == 1 else spectrum**2
    basis = librosa.filters.mel(sr=sr, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax, htk=htk,
                                norm=None if htk else "slaney", dtype=np.float64)
    return basis @ spectrum


def nvidia(x):  # NVIDIA/tacotron2 layers.py, stft.py
    return np.log(bands(x, 22050, 1024, 1024, 256, 80, 0, 8000).clip(1e-5))


def squeezewave(x):  # tianrengao/SqueezeWave stft.py
    pad = (63 * 256 + 1024 - len(x)) // 2
    x = np.pad(x, pad if pad >= 0 else 512, mode="reflect")
    return np.log(bands(x, 22050, 1024, 1024, 256, 80, 0, 8000, center=False).clip(1e-5))


def hifigan(x, sr=22050, n_fft=1024, hop=256, n_mels=80, fmax=8000, epsilon=1e-9):  # jik876/hifi-gan meldataset.py
    x = np.pad(x, (n_fft - hop) // 2, mode="reflect")
    return np.log(bands(x, sr, n_fft, n_fft, hop, n_mels, 0, fmax, center=False, epsilon=epsilon).clip(1e-5))


def matcha(x):  # shivammehta25/Matcha-TTS configs/data/ljspeech.yaml
    return (hifigan(x) + 5.536622) / 2.116101


def vits(x):  # jaywalnut310/vits mel_processing.py
    return hifigan(x, epsilon=1e-6)


def parakeet(x):  # PaddlePaddle/Parakeet examples/waveflow/preprocess.py
    frames = -(-len(x) // 256)
    pad = (frames * 256 + 768 - len(x)) // 2
    x = np.pad(x, (pad, pad + len(x) % 2), mode="reflect")
    x = x / np.abs(x).max() * 0.999
    return np.log(bands(x, 22050, 1024, 1024, 256, 80, 0, 8000, center=False).clip(1e-5))


def espnet(x, sr=22050, n_fft=1024, win=1024, hop=256, fmin=80):  # kan-bayashi/ParallelWaveGAN bin/preprocess.py
    return np.log10(bands(x, sr, n_fft, win, hop, 80, fmin, 7600).clip(1e-10)).T


def rayhane(x):  # Rayhane-mamah/Tacotron-2 datasets/preprocessor.py, datasets/audio.py
    x = scipy.signal.lfilter([1, -0.97], [1], x)
    x = x / np.abs(x).max() * 0.999
    mel = bands(x, 22050, 2048, 1100, 275, 80, 55, 7600, pad_mode="constant", power=2)
    decibels = 20 * np.log10(mel.clip(np.exp(-100 / 20 * np.log(10)))) - 20
    return (8 * (decibels + 100) / 100 - 4).clip(-4, 4).T


def flowavenet(x):  # ksw0306/FloWaveNet preprocessing.py
    x = x / np.abs(x).max() * 0.999
    mel = bands(x, 22050, 1024, 1024, 256, 80, 125, 7600, power=2)
    return ((20 * np.log10(mel.clip(1e-4)) - 20 + 100) / 100).clip(0, 1).T


def coqui(x):  # coqui-ai/TTS utils/audio/numpy_transforms.py, processor.py, BaseAudioConfig
    mel = bands(x, 22050, 1024, 1024, 256, 80, 0, None)
    return (8 * (20 * np.log10(mel.clip(1e-8)) - 20 + 100) / 100 - 4).clip(-4, 4)


def vocos(x):  # gemelo-ai/vocos feature_extractors.py
    return np.log(bands(x, 24000, 1024, 1024, 256, 100, 0, 12000, htk=True).clip(1e-7))


MELS = {
    "nvidia": nvidia,
    "squeezewave": squeezewave,
    "hifigan": hifigan,
    "bigvgan-24k": lambda x: hifigan(x, sr=24000, n_mels=100, fmax=12000),
    "bigvgan-44k": lambda x: hifigan(x, sr=44100, n_fft=2048, hop=512, n_mels=128, fmax=None),
    "matcha": matcha,
    "vits": vits,
    "parakeet": parakeet,
    "espnet": espnet,
    "espnet-24k": lambda x: espnet(x, sr=24000, n_fft=2048, win=1200, hop=300),
    "r9y9": lambda x: espnet(x, fmin=125),
    "rayhane": rayhane,
    "flowavenet": flowavenet,
    "coqui": coqui,
    "vocos-24k": vocos,
    "torchaudio": lambda x: bands(x, 16000, 400, 400, 200, 128, 0, 8000, htk=True, power=2),
    "librosa": lambda x: librosa.feature.melspectrogram(y=x, sr=22050),
}


def containers(mel):
    """The same [frames, bands] matrix in every container."""
    mel = mel.astype(np.float32)
    with h5py.File(HERE / "pwg.h5", "w") as file:
        file["wave"] = np.zeros(100, np.float32)
        file["feats"] = mel
    with h5py.File(HERE / "espnet.h5", "w") as file:
        file["utt-1"] = mel
        file.create_dataset("utt-2", data=mel[:3].astype(np.float64), compression="gzip", shuffle=True)
    with h5py.File(HERE / "stats.h5", "w") as file:
        file["mean"] = mel.mean(0)
        file["scale"] = mel.std(0) + np.float32(0.1)
    for name, method in [("plain", None), ("cm", 2), ("cm2", 3), ("cm3", 5)]:
        kaldiio.save_ark(str(HERE / f"{name}.ark"), {"utt-1": mel, "utt-2": mel[:3]}, compression_method=method)
    kaldiio.save_ark(str(HERE / "text.ark"), {"utt-1": mel[:2], "utt-2": mel[2:3]}, text=True)


def main():
    samples = sound()
    with wave.open(str(HERE / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes(samples.tobytes())
    x = samples.astype(np.float64) / 32768
    for name, make in MELS.items():
        np.save(HERE / f"{name}.npy", np.ascontiguousarray(make(x), dtype=np.float32))
    containers(espnet(x)[5:12])


if __name__ == "__main__":
    main()
