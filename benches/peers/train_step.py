"""Times one training step of PyTorch models, the peers of `melglow train`.

    python train_step.py waveglow --threads 1 --steps 20

waveglow  NVIDIA's WaveGlow (Prenger et al. 2018) with narrower WaveNets: 12 flows of 8
          layers, group 8, early outputs, weight norm, a transposed convolution upsampling
          the mel; Adam 1e-4. Default batch 4 x 16 128 samples, 64 channels.
compact   the flow of our recipe `parallel`, on audio already whitened: 12 flows of 5 layers, group
          16, conditioning at the frame rate; AdamW 3e-3, gradient norm clipped at 1.
          Default batch 4 x 2 048 samples, 64 channels.
recursive the flow of our voice `lj`, likewise: an autoregressive step over rows of 4 samples, a causal
          net of 5 layers; then two over rows of 8, 4 layers each; then four couplings of 4 causal layers, 48
          channels, group 16; frame features held at unit root mean square. Default batch 2 x 4 096
          samples, 40 channels in the recursions' nets.

A step is forward, backward and optimizer, on random data; the loss is the negative
log-likelihood with every log-determinant. Prints the median over steps after a warm-up.
"""

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

N_MELS = 80
HOP_LENGTH = 256


class Mix(nn.Module):
    """Invertible 1x1 convolution from a random rotation."""

    def __init__(self, channels):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        self.weight = nn.Parameter(rotation.contiguous())

    def forward(self, x):
        """x: [batch, channels, steps]. Returns z and the log-determinant of one step."""
        # slogdet instead of logdet: the published code flips a column to keep det W > 0.
        return F.conv1d(x, self.weight[:, :, None]), torch.linalg.slogdet(self.weight)[1]


def gate(x):
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class WaveGlowNet(nn.Module):
    """WaveNet of one coupling, as published: conditioning at the step rate, skip outputs."""

    def __init__(self, half, cond_channels, channels, layers):
        super().__init__()
        self.channels, self.layers = channels, layers
        self.start = weight_norm(nn.Conv1d(half, channels, 1))
        self.cond_layer = weight_norm(nn.Conv1d(cond_channels, 2 * channels * layers, 1))
        self.in_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, 2 * channels, 3, dilation=2**i, padding=2**i)) for i in range(layers))
        self.res_skip_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels * (2 if i + 1 < layers else 1), 1)) for i in range(layers))
        self.end = nn.Conv1d(channels, 2 * half, 1)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)

    def forward(self, x, cond):
        x = self.start(x)
        conds = self.cond_layer(cond).chunk(self.layers, dim=1)
        output = 0
        for i, (in_layer, res_skip, cond) in enumerate(zip(self.in_layers, self.res_skip_layers, conds)):
            y = res_skip(gate(in_layer(x) + cond))
            if i + 1 < self.layers:
                residual, y = y.split(self.channels, dim=1)
                x = x + residual
            output = output + y
        return self.end(output)


class WaveGlow(nn.Module):
    def __init__(self, channels=64, flows=12, layers=8, group=8, early_every=4, early_size=2, n_mels=N_MELS):
        super().__init__()
        self.group, self.early_every, self.early_size = group, early_every, early_size
        self.upsample = nn.ConvTranspose1d(n_mels, n_mels, 1024, stride=HOP_LENGTH)
        self.convinv, self.WN = nn.ModuleList(), nn.ModuleList()
        width = group
        for k in range(flows):
            if k > 0 and k % early_every == 0:
                width -= early_size
            self.convinv.append(Mix(width))
            self.WN.append(WaveGlowNet(width // 2, n_mels * group, channels, layers))

    def forward(self, audio, mel):
        """Mean negative log-likelihood, less its constant, of audio [batch, samples]."""
        batch, samples = audio.shape
        steps = samples // self.group
        cond = self.upsample(mel)[:, :, :samples]
        cond = cond.unflatten(2, (steps, self.group)).transpose(2, 3).flatten(1, 2)
        x = audio.unflatten(1, (steps, self.group)).transpose(1, 2)
        energy, log_det = 0.0, 0.0
        for k, (mix, net) in enumerate(zip(self.convinv, self.WN)):
            if k > 0 and k % self.early_every == 0:
                early, x = x.split((self.early_size, x.shape[1] - self.early_size), dim=1)
                energy = energy + early.square().sum()
            x, log_det_mix = mix(x)
            kept, changed = x.chunk(2, dim=1)
            shift, log_s = net(kept, cond).float().chunk(2, dim=1)
            x = torch.cat((kept, torch.exp(log_s) * changed + shift), dim=1)
            log_det = log_det + log_s.sum() + batch * steps * log_det_mix
        energy = energy + x.square().sum()
        return (0.5 * energy - log_det) / audio.numel()

    def optimizer(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4, fused=True)

    clip = None


class CompactNet(nn.Module):
    """WaveNet: residual only, conditioning handed in per layer. `base`: each layer's dilation over the last's."""

    def __init__(self, inputs, channels, layers, base=2, causal=False):
        super().__init__()
        self.start = nn.Conv1d(inputs, channels, 1)
        self.pads = [2 * base**i if causal else 0 for i in range(layers)]
        self.in_layers = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, 3, dilation=base**i, padding=0 if causal else base**i)
            for i in range(layers))
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(layers))
        self.end = nn.Conv1d(channels, 2 * inputs, 1)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)

    def forward(self, x, conds):
        x = self.start(x)
        for in_layer, residual, cond, pad in zip(self.in_layers, self.residuals, conds, self.pads):
            x = x + residual(gate(in_layer(F.pad(x, (pad, 0)) if pad else x) + cond))
        return self.end(x)


def upsampled(rows, samples, steps):
    """Rows by frame [.., frames + 1] to steps of so many samples: linear, as one product with the hat functions,
    faster than F.interpolate."""
    position = torch.arange(steps) * (samples / HOP_LENGTH)
    hats = (1 - (position[None, :] - torch.arange(rows.shape[2])[:, None]).abs()).clamp(min=0)
    return rows @ hats


class Compact(nn.Module):
    def __init__(self, channels=64, flows=12, layers=5, group=16, cond_channels=128, causal=False, norm=False):
        super().__init__()
        self.group, self.flows, self.layers, self.norm = group, flows, layers, norm
        self.cond_in = nn.Conv1d(N_MELS, cond_channels, 5, padding=2)
        self.cond_residuals = nn.ModuleList(nn.Conv1d(cond_channels, cond_channels, 3, padding=1) for _ in range(2))
        # The projections of every layer of every flow are one product.
        self.cond_out = nn.Conv1d(cond_channels, flows * layers * 2 * channels, 1)
        self.bias = nn.Parameter(torch.zeros(flows, group, 1))
        self.log_scale = nn.Parameter(torch.zeros(flows, group, 1))
        self.mixes = nn.ModuleList(Mix(group) for _ in range(flows))
        self.nets = nn.ModuleList(CompactNet(group // 2, channels, layers, causal=causal) for _ in range(flows))

    def features(self, mel):
        """[batch, 80, frames + 1] to as many rows of features."""
        c = self.activation(self.cond_in(mel))
        for conv in self.cond_residuals:
            c = c + self.activation(conv(c))
        return c

    def activation(self, x):
        return F.silu(x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) if self.norm else x)

    def forward(self, audio, mel):
        """Mean negative log-likelihood, less its constant, of audio [batch, samples]."""
        return self.couplings(audio, self.features(mel))

    def couplings(self, audio, features):
        batch, samples = audio.shape
        steps = samples // self.group
        x = audio.unflatten(1, (steps, self.group)).transpose(1, 2)
        # for each layer of each flow [batch, 2 channels, steps]
        conds = upsampled(self.cond_out(features), self.group, steps).chunk(self.flows * self.layers, dim=1)
        log_det = batch * steps * self.log_scale.sum()
        for k, (mix, net) in enumerate(zip(self.mixes, self.nets)):
            x, log_det_mix = mix((x + self.bias[k]) * torch.exp(self.log_scale[k]))
            kept, changed = x.chunk(2, dim=1)
            shift, log_s = net(kept, conds[k * self.layers:(k + 1) * self.layers]).float().chunk(2, dim=1)
            log_s = 2 * torch.tanh(0.5 * log_s)
            x = torch.cat((kept, torch.exp(log_s) * changed + shift), dim=1)
            log_det = log_det + log_s.sum() + batch * steps * log_det_mix
        return (0.5 * x.square().sum() - log_det) / audio.numel()

    def optimizer(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    clip = 1.0


class Recursion(nn.Module):
    """An autoregressive step over rows: a causal net hears the rows before."""

    def __init__(self, row, channels, layers, features):
        super().__init__()
        self.row, self.layers = row, layers
        self.cond = nn.Conv1d(features, layers * 2 * channels, 1)
        self.net = CompactNet(row, channels, layers, base=3, causal=True)

    def forward(self, x, features):
        """x: [batch, row, rows]. Returns z and the log-determinant."""
        conds = upsampled(self.cond(features), self.row, x.shape[2]).chunk(self.layers, dim=1)
        shift, log_s = self.net(F.pad(x, (1, 0))[:, :, :-1], conds).float().chunk(2, dim=1)
        log_s = 2 * torch.tanh(0.5 * log_s)
        return torch.exp(log_s) * x + shift, log_s.sum()


class Recursive(Compact):
    """Autoregressive steps in front of `Compact` couplings."""

    def __init__(self, channels=40, coupling_channels=48, row=4, later=8):
        super().__init__(channels=coupling_channels, flows=4, layers=4, causal=True, norm=True)
        self.row, self.later = row, later
        self.first = Recursion(row, channels, 5, self.cond_in.out_channels)
        self.mixed = nn.ModuleList(Mix(later) for _ in range(2))
        self.biases = nn.Parameter(torch.zeros(2, later, 1))
        self.log_scales = nn.Parameter(torch.zeros(2, later, 1))
        self.recursions = nn.ModuleList(Recursion(later, channels, 4, self.cond_in.out_channels) for _ in range(2))

    def forward(self, audio, mel):
        batch, samples = audio.shape
        features = self.features(mel)
        x = audio.unflatten(1, (samples // self.row, self.row)).transpose(1, 2)
        x, log_det = self.first(x, features)
        x = x.transpose(1, 2).reshape(batch, samples // self.later, self.later).transpose(1, 2)
        log_det = log_det + batch * x.shape[2] * self.log_scales.sum()
        for k, (mix, recursion) in enumerate(zip(self.mixed, self.recursions)):
            x, log_det_mix = mix((x + self.biases[k]) * torch.exp(self.log_scales[k]))
            x, log_det_rows = recursion(x, features)
            log_det = log_det + log_det_rows + batch * x.shape[2] * log_det_mix
        return self.couplings(x.transpose(1, 2).flatten(1), features) - log_det / audio.numel()

    def optimizer(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.02, fused=True)


MODELS = {"recursive": (Recursive, 2, 4096), "waveglow": (WaveGlow, 4, 16128), "compact": (Compact, 4, 2048)}


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--channels", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--segment", type=int, help="samples of one item, a multiple of 16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; f32 otherwise")
    parser.add_argument("--compile", action="store_true", help="torch.compile; wants a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    baseline = peak_rss_mib()

    constructor, batch, segment = MODELS[args.model]
    batch, segment = args.batch or batch, args.segment or segment
    model = constructor(channels=args.channels) if args.channels else constructor()
    optimizer = model.optimizer()
    likelihood = torch.compile(model) if args.compile else model
    audio = torch.randn(batch, segment) * (0.1 if args.model == "waveglow" else 1.0)
    mel = torch.randn(batch, N_MELS, segment // HOP_LENGTH + 1) - 5

    seconds, losses = [], []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = likelihood(audio, mel)
        loss.backward()
        if model.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), model.clip)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    seconds = seconds[args.warmup:]
    median = statistics.median(seconds)
    kind = ("bf16" if args.bf16 else "f32") + (" compiled" if args.compile else "")
    print(f"{args.model} {kind}, torch {torch.__version__}, {args.threads} threads, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, batch {batch} x {segment}")
    print(f"  {batch * segment / median:.0f} samples/s, step {1e3 * median:.1f} ms "
          f"(fastest {1e3 * min(seconds):.1f}, slowest {1e3 * max(seconds):.1f}, {len(seconds)} steps)")
    print(f"  peak memory {peak_rss_mib():.0f} MiB, {baseline:.0f} MiB of it before the model; "
          f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
