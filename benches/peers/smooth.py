"""Mels as an acoustic model gives them: means, smoother than any sound's.

    melglow mel LJSpeech-1.1/wavs -o mels
    python smooth.py --wavs LJSpeech-1.1/wavs --mels mels --held-out LJ002-0155..LJ002-0184 --out smooth

A small net learns, by the squared error, to tell a clip's mel from what a text model would know of it: one of 160
classes a frame (of cepstra averaged over 5 frames), pitch, voicing and smoothed energy. The folder `model` gets
what it says of the held-out clips, `mixNN` the same with 100 - NN percent of the clip's own mel, and `blur` the
clip's own mel averaged over neighbouring bands. `melglow synth` speaks them, and score.py hears the sounds.

With --text LJSpeech-1.1/metadata.csv a frame's class is its phone, by PocketSphinx's alignment of the clip's text: the
net is then an acoustic model of the kind of FastPitch, given durations, pitch, voicing and energy. Clips with words that
PocketSphinx's dictionary hasn't are left out.
"""

import argparse
from pathlib import Path

import numpy as np
import pocketsphinx
import pyworld
import soundfile
import torch
from scipy.fft import dct
from scipy.ndimage import convolve1d, uniform_filter1d
from sklearn.cluster import MiniBatchKMeans
from torch import nn
from words import RATE as HEARD
from words import pcm, words

HOP, FLOOR = 256, np.log(1e-5)
CLASSES, CEPSTRA, SMOOTHED = 160, 14, 5
CHANNELS, LAYERS, FRAMES, BATCH = 192, 4, 200, 16
# PocketSphinx's frames a second, and a beam that loses no clip
HEARD_FRAMES, BEAM = 100, 1e-60


def given(mel, sound, rate):
    """Smoothed cepstra without the energy, [frames, 13], and log pitch, voicing and energy, [frames, 3]."""
    frames = mel.shape[1]
    pitch, times = pyworld.dio(sound, rate, f0_floor=70, f0_ceil=500, frame_period=1000 * HOP / rate)
    pitch = pyworld.stonemask(sound, pitch, times, rate)
    pitch = np.pad(pitch, (0, max(0, frames - len(pitch))))[:frames]
    voiced = np.flatnonzero(pitch)
    log_pitch = np.interp(np.arange(frames), voiced, np.log(pitch[voiced])) if len(voiced) else np.full(frames, 5.3)
    cepstra = uniform_filter1d(dct(mel, axis=0, norm="ortho")[1:CEPSTRA].T, SMOOTHED, axis=0, mode="nearest")
    energy = uniform_filter1d(mel.mean(0), SMOOTHED, mode="nearest")
    known = np.stack([log_pitch - 5.3, pitch > 0, (energy + 6) / 3], 1)
    return cepstra.astype("f4"), known.astype("f4")


def phones(text, sound, rate, frames):
    """The phone of each frame, or nothing if a word isn't known."""
    options = dict.fromkeys(("beam", "wbeam", "pbeam"), BEAM)
    decoder = pocketsphinx.Decoder(samprate=HEARD, loglevel="FATAL", bestpath=False, **options)
    if not all(decoder.lookup_word(word) for word in words(text)):
        return None
    decoder.set_align_text(" ".join(words(text)))
    # words first, then their phones
    for aligned in (False, True):
        if aligned:
            decoder.set_alignment()
        decoder.start_utt()
        decoder.process_raw(pcm(sound, rate), full_utt=True)
        decoder.end_utt()
    said = [phone for word in decoder.get_alignment() for phone in word]
    starts = np.array([phone.start for phone in said]) / HEARD_FRAMES
    at = np.searchsorted(starts, np.arange(frames) * HOP / rate, side="right") - 1
    return [said[i].name for i in np.maximum(at, 0)]


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        conv = lambda: nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2)
        self.classes = nn.Embedding(classes, CHANNELS - 3)
        self.first = conv()
        self.layers = nn.ModuleList(conv() for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.GroupNorm(1, CHANNELS) for _ in range(LAYERS))
        self.last = nn.Conv1d(CHANNELS, 80, 1)

    def forward(self, classes, known):
        h = self.first(torch.cat([self.classes(classes), known], 2).transpose(1, 2))
        for layer, norm in zip(self.layers, self.norms):
            h = h + torch.relu(layer(norm(h)))
        return 2 * self.last(h) - 6


def train(clips, kinds, steps, rng):
    net = Net(kinds)
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    clips = [clip for clip in clips if clip[0].shape[1] > FRAMES]
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-3 * min(1, (steps - step) / (0.6 * steps))
        cuts = []
        for clip in rng.integers(len(clips), size=BATCH):
            mel, classes, known = clips[clip]
            cut = slice(start := rng.integers(mel.shape[1] - FRAMES), start + FRAMES)
            cuts.append((mel[:, cut], classes[cut], known[cut]))
        mel, classes, known = (torch.tensor(np.array(part)) for part in zip(*cuts))
        loss = (net(classes.long(), known) - mel).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    return net


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wavs", "mels", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--held-out", required=True, metavar="FIRST..LAST")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--text", type=Path, metavar="METADATA")
    args = parser.parse_args()
    first, last = args.held_out.split("..")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    clips, classes = {}, {}
    texts = dict(line.split("|")[::2] for line in args.text.read_text("utf-8").splitlines()) if args.text else {}
    for path in sorted(args.mels.glob("*.npy")):
        sound, rate = soundfile.read(args.wavs / f"{path.stem}.wav")
        mel = np.load(path)
        if args.text:
            said = phones(texts[path.stem], sound, rate, mel.shape[1])
            if said is None:
                continue
            classes[path.stem] = said
        clips[path.stem] = (mel, *given(mel, sound, rate))
    if args.text:
        names = sorted({phone for said in classes.values() for phone in said})
        kinds = len(names)
        classes = {name: np.array([names.index(phone) for phone in classes[name]]) for name in clips}
        print(f"{len(clips)} clips, {kinds} phones")
    held = {name for name in clips if first <= name <= last}
    if not args.text:
        cepstra = np.concatenate([clip[1] for name, clip in clips.items() if name not in held])
        scale, kinds = cepstra.std(0), CLASSES
        means = MiniBatchKMeans(kinds, batch_size=4096, n_init=3, random_state=0).fit(cepstra / scale)
        classes = {name: means.predict(c / scale) for name, (_, c, _) in clips.items()}
    clips = {name: (mel, classes[name], known) for name, (mel, _, known) in clips.items()}
    net = train([clip for name, clip in clips.items() if name not in held], kinds, args.steps, rng)

    for name in held:
        mel, classes, known = clips[name]
        with torch.no_grad():
            said = net(torch.tensor(classes).long()[None], torch.tensor(known)[None])[0].numpy()
        said = np.maximum(said, FLOOR)
        mels = {f"mix{part}": part / 100 * said + (1 - part / 100) * mel for part in (25, 50, 75)}
        mels |= {"model": said, "blur": convolve1d(mel, [0.25, 0.5, 0.25], axis=0, mode="nearest")}
        for kind, values in mels.items():
            (args.out / kind).mkdir(parents=True, exist_ok=True)
            np.save(args.out / kind / f"{name}.npy", values.astype("f4"))


if __name__ == "__main__":
    main()
