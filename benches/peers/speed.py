"""Times synthesis of melglow, PyTorch, ONNX Runtime and OpenVINO in turn and prints the ratios.

    cargo build --release && python speed.py --archs waveglow-256,parallel --threads 1,2 --rounds 5

Run from the repository's root, or name the program with --melglow. Every architecture has random
weights and its published shape (`models.py`; batch 1, one fixed length). Timed is the network from mel
and latents to sound, after a warm-up, in processes that stay loaded and wait while another works;
ours is the bare flow of `melglow bench`, in each of --precisions, which also draws the noise and, for
`parallel`, runs the synthesis filter (the peers' `parallel` ends at the residual). A round measures each
program, one after the other, by the median of three times in a row: a ratio is the peer's time over ours
within a round, above 1 where melglow is faster. OpenVINO runs in bf16 only where it says that the
processor can.

The table has medians, and of ratios the smallest and largest. RTF is time over that of the sound;
memory is the peak of each process. Other work on the machine spoils wall time: `--clock cpu` counts the
processor's time instead, a fair measure of one thread.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy

# times in a row that each program speaks in a round, after it has spoken once; the median counts
REPEATS = 3

ENGINES = {"torch": "PyTorch f32", "onnx": "ONNX Runtime f32", "openvino": "OpenVINO f32",
           "openvino-bf16": "OpenVINO bf16"}


def load(engine, name, seconds, threads, folder):
    """A function that speaks once and returns the sound."""
    if engine == "torch":
        import models
        import torch
        torch.set_num_threads(threads)
        model, inputs = models.build(name, seconds)
        return torch.inference_mode()(lambda: model(*inputs).numpy())
    arrays, path = dict(numpy.load(folder / "inputs.npz")), str(folder / "model.onnx")
    if engine == "onnx":
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, arrays)[0]
    import openvino
    compiled = openvino.Core().compile_model(path, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "bf16" if engine.endswith("bf16") else "f32"})
    request = compiled.create_infer_request()
    return lambda: request.infer(arrays)[0]


def work(connection, *what):
    """A peer's process: says its first sound, then a time for every request."""
    speak = load(*what)
    connection.send(speak())
    while connection.recv():
        begun = time.perf_counter(), time.process_time()
        speak()
        connection.send({"wall": time.perf_counter() - begun[0], "cpu": time.process_time() - begun[1]})
    hwm = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    connection.send(int(hwm.split()[1]) / 1000)


class Peer:
    def __init__(self, *what):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *what), daemon=True)
        self.process.start()
        theirs.close()
        self.sound = self.answer()

    def answer(self):
        try:
            return self.connection.recv()
        except EOFError:
            sys.exit("a peer's process has ended, see above")

    def seconds(self, clock):
        """The median of some more times."""
        def once():
            self.connection.send(True)
            return self.answer()[clock]
        return statistics.median(once() for _ in range(REPEATS))

    def close(self):
        """Ends the process; gives its peak memory in MB."""
        self.connection.send(False)
        memory = self.answer()
        self.process.join()
        return memory


def melglow(program, name, precision, seconds, threads):
    """Report of one run of `melglow bench`."""
    command = [program, "bench", "--arch", name, "--threads", str(threads), "--seconds", str(seconds),
               "--precision", precision, "--refine", "0", "--rounds", str(REPEATS), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())
    report = json.loads(done.stdout)
    return report["machine"], report["runs"][0]


def export(name, seconds, folder):
    import models
    import torch
    model, inputs = models.build(name, seconds)
    numpy.savez(folder / "inputs.npz", mel=inputs[0].numpy(), z=inputs[1].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, str(folder / "model.onnx"), input_names=["mel", "z"], output_names=["sound"],
                          dynamo=False, opset_version=17)


def measure(args, engines, name, threads):
    """Real-time factors by program, a list with one for each round; and peak memory by program, MB."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # in a process of its own, which takes its memory away with it
        exporter = multiprocessing.get_context("spawn").Process(target=export, args=(name, args.seconds, folder))
        exporter.start()
        exporter.join()
        if exporter.exitcode:
            sys.exit(f"{name}: cannot export to ONNX")
        peers = {engine: Peer(engine, name, args.seconds, threads, folder) for engine in engines}
    sounds = [peer.sound for peer in peers.values()]
    level = abs(sounds[0]).max()
    for engine, sound in zip(engines, sounds):
        off = abs(sound - sounds[0]).max() / level
        if not off < (0.2 if engine.endswith("bf16") else 1e-3):
            sys.exit(f"{name}: the sound of {ENGINES[engine]} is {off:.2g} of the peak off that of the first peer")
    times, memory = {program: [] for program in [*args.precisions, *engines]}, {}
    for _ in range(args.rounds):
        for precision in args.precisions:
            machine, run = melglow(args.melglow, name, precision, args.seconds, threads)
            if run["threads"] != threads:
                sys.exit(f"melglow runs {run['threads']} threads here, not {threads}")
            if run["precision"] != precision:
                sys.exit(f"melglow runs {name} in {run['precision']} here, not in {precision}")
            times[precision].append(run[{"wall": "bare", "cpu": "bare_cpu"}[args.clock]]["median"])
            memory[precision] = (run["peak_memory_bytes"] or 0) / 1e6
        for engine, peer in peers.items():
            times[engine].append(peer.seconds(args.clock) / run["audio_seconds"])
        print(f"{name}, threads {threads}: " + ", ".join(f"{p} {t[-1]:.4f}" for p, t in times.items()), file=sys.stderr)
    memory.update((engine, peer.close()) for engine, peer in peers.items())
    return machine, times, memory


def row(name, precision, engines, threads, times, memory):
    ours = times[precision]
    cells = [name, precision, str(threads), f"{statistics.median(ours):.3g} ({memory[precision]:.0f} MB)"]
    for engine in engines:
        ratios = [theirs / own for theirs, own in zip(times[engine], ours)]
        cells.append(f"{statistics.median(times[engine]):.3g} ({memory[engine]:.0f} MB): "
                     f"**{statistics.median(ratios):.2f}×** ({min(ratios):.2f}–{max(ratios):.2f})")
    return "| " + " | ".join(cells) + " |"


def numbers(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archs", default="waveglow-256,waveglow-64,squeezewave-a128-c256,squeezewave-a256-c128,parallel")
    parser.add_argument("--threads", type=numbers, default=[1], metavar="N,…")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the sound")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: processor time of all threads, for one thread on a machine with other work")
    parser.add_argument("--engines", default=",".join(ENGINES), help="of " + ", ".join(ENGINES))
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["f32"], metavar="P,…",
                        help="of melglow: f32, int16, int8, bf16 (default f32)")
    parser.add_argument("--melglow", default="target/release/melglow", help="the program")
    args = parser.parse_args()
    engines = args.engines.split(",")
    import models
    for asked, known in [(args.archs.split(","), models.MODELS), (engines, ENGINES)]:
        for unknown in set(asked) - set(known):
            parser.error(f"{unknown}: expected some of {', '.join(known)}")
    if min(args.threads) < 1 or args.rounds < 1 or args.seconds <= 0:
        parser.error("--threads, --rounds and --seconds must be above 0")
    if not Path(args.melglow).is_file():
        parser.error(f"{args.melglow}: no such program; cargo build --release")
    if "openvino-bf16" in engines:
        import openvino
        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            print("OpenVINO has no bf16 on this processor: left out", file=sys.stderr)
            engines.remove("openvino-bf16")
    packages = [{"torch": "torch", "onnx": "onnxruntime"}.get(engine, "openvino") for engine in engines]
    lines = []
    for name in args.archs.split(","):
        for threads in args.threads:
            machine, times, memory = measure(args, engines, name, threads)
            lines += [row(name, precision, engines, threads, times, memory) for precision in args.precisions]
    versions = [f"{package} {importlib.metadata.version(package)}" for package in dict.fromkeys(packages)]
    print(f"{machine['processor']}, {machine['cores']} cores, {' '.join(machine['flags'])}; "
          f"melglow {machine['melglow']}, {', '.join(versions)}; {args.seconds:g} s of sound, {args.rounds} rounds, "
          f"{args.clock} clock\n")
    print("| model | in | threads | melglow RTF (memory) | " + " | ".join(ENGINES[e] for e in engines) + " |")
    print("|---|---|---|---" + "|---" * len(engines) + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
