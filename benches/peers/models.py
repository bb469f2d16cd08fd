"""The architectures that `melglow bench --arch` knows, from latents to sound, in PyTorch with random weights.

Weight norm is folded; a mel is [1, 80, frames], latents are [1, group, steps], sound is [1, samples].
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from train_step import HOP_LENGTH, N_MELS, Compact, Mix, WaveGlow, gate


def folded(module):
    """The module with its weight norms folded and its last layers off zero."""
    for part in module.modules():
        if parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
    for name, weight in module.named_parameters():
        if name.endswith("end.weight"):
            nn.init.uniform_(weight, -0.01, 0.01)
    return module


def undo_coupling(z, shift, log_s):
    kept, changed = z.chunk(2, dim=1)
    return torch.cat((kept, (changed - shift) * torch.exp(-log_s)), dim=1)


class Speech(nn.Module):
    """Flows run backwards: coupling, mix, and every so often channels that were done early."""

    def __init__(self, mixes, nets, early_every, early_size):
        super().__init__()
        self.nets, self.early_every, self.early_size = nets, early_every, early_size
        self.inverses = nn.ParameterList(torch.linalg.inv(mix.weight)[:, :, None] for mix in mixes)

    def run(self, z, conds):
        early = self.early_size * ((len(self.nets) - 1) // self.early_every)
        done, x = z[:, :early], z[:, early:]
        for k in reversed(range(len(self.nets))):
            shift, log_s = self.parameters_of(k, x.chunk(2, dim=1)[0], conds)
            x = F.conv1d(undo_coupling(x, shift, log_s), self.inverses[k])
            if k > 0 and k % self.early_every == 0:
                x = torch.cat((done[:, -self.early_size:], x), dim=1)
                done = done[:, :-self.early_size]
        return x.transpose(1, 2).flatten(1)

    def parameters_of(self, k, kept, conds):
        return self.nets[k](kept, conds).chunk(2, dim=1)


class WaveGlowSpeech(Speech):
    """NVIDIA's WaveGlow."""

    def __init__(self, channels):
        model = folded(WaveGlow(channels=channels))
        super().__init__(model.convinv, model.WN, model.early_every, model.early_size)
        self.upsample, self.group = model.upsample, model.group

    def forward(self, mel, z):
        cond = self.upsample(mel)[:, :, :z.shape[1] * z.shape[2]]
        cond = cond.unflatten(2, (z.shape[2], self.group)).transpose(2, 3).flatten(1, 2)
        return self.run(z, cond)


class SqueezeWaveNet(nn.Module):
    """Depthwise-separable convolutions, conditioned at the frame rate (Zhai et al. 2020)."""

    def __init__(self, half, channels, up, layers=8):
        super().__init__()
        self.up = up
        self.start = nn.Conv1d(half, channels, 1)
        self.cond_layer = nn.Conv1d(N_MELS, 2 * channels * layers, 1)
        self.in_layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(channels), nn.Conv1d(channels, channels, 3, padding=1, groups=channels),
                          nn.Conv1d(channels, 2 * channels, 1)) for _ in range(layers))
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(layers))
        self.end = nn.Conv1d(channels, 2 * half, 1)

    def forward(self, x, mel):
        x = self.start(x)
        conds = self.cond_layer(mel)
        if self.up > 1:
            conds = F.interpolate(conds, scale_factor=self.up, mode="nearest")
        for in_layer, residual, cond in zip(self.in_layers, self.residuals, conds.chunk(len(self.in_layers), dim=1)):
            x = x + residual(gate(in_layer(x) + cond))
        return self.end(x)


class SqueezeWaveSpeech(Speech):
    """SqueezeWave."""

    def __init__(self, group, channels, flows=12, early_every=2, early_size=16):
        widths = [group - early_size * (k // early_every) for k in range(flows)]
        nets = nn.ModuleList(SqueezeWaveNet(width // 2, channels, HOP_LENGTH // group) for width in widths)
        super().__init__([Mix(width) for width in widths], folded(nets), early_every, early_size)
        self.group = group

    def forward(self, mel, z):
        return self.run(z, mel)


class CompactSpeech(Speech):
    """The flow of our recipe `parallel`, up to the residual: its synthesis filter is not in it."""

    def __init__(self):
        model = folded(Compact())
        super().__init__(model.mixes, model.nets, model.flows, 0)
        self.model, self.group = model, model.group

    def forward(self, mel, z):
        c = F.silu(self.model.cond_in(mel))
        for conv in self.model.cond_residuals:
            c = c + F.silu(conv(c))
        # a row a frame, one more to interpolate towards
        c = F.pad(self.model.cond_out(c), (0, 1), mode="replicate")
        conds = F.interpolate(c, size=z.shape[2] + 1, mode="linear", align_corners=True)[:, :, :-1]
        return self.run(z, conds.chunk(self.model.flows * self.model.layers, dim=1))

    def parameters_of(self, k, kept, conds):
        layers = self.model.layers
        shift, log_s = self.nets[k](kept, conds[k * layers:(k + 1) * layers]).chunk(2, dim=1)
        return shift, 2 * torch.tanh(0.5 * log_s)


MODELS = {
    "waveglow-256": lambda: WaveGlowSpeech(256),
    "waveglow-64": lambda: WaveGlowSpeech(64),
    "squeezewave-a128-c256": lambda: SqueezeWaveSpeech(128, 256),
    "squeezewave-a128-c128": lambda: SqueezeWaveSpeech(128, 128),
    "squeezewave-a256-c128": lambda: SqueezeWaveSpeech(256, 128),
    "parallel": CompactSpeech,
}


def build(name, seconds):
    """The model and its inputs (mel, latents)."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    frames = max(1, round(seconds * 22050 / HOP_LENGTH))
    mel = torch.randn(1, N_MELS, frames) - 5
    return model, (mel, torch.randn(1, model.group, frames * HOP_LENGTH // model.group))
