#!/usr/bin/env python3
"""What a search would take on large models and several GPUs, by arithmetic: the tables of docs/scale.md, as Markdown.

    python scale.py

Nothing is measured here. The shapes are those of the published configs; the assumptions are the constants below, each with its source. Standard library only.
"""
from dataclasses import dataclass

# Default settings of `--method adaptive`: 12 contrast steps with gradients of the harmful rows, the refusals, the task and the benign rows, then 4 repair steps
# with the latter two.
GRADIENTS = 12 * 4 + 4 * 2
# Lists of all targets in f32 that the method holds: delta, the contrast's direction, the step's, the gradient (src/cli/memory.rs).
COPIES = 4
# Tokens of a whole search, as gradient passes: `--dry-run` on SmolLM2-135M says 119.7 TFLOP at most for 120 harmful rows, 64 task rows and the built-in benign
# rows, of 0.458 GFLOP for each token of a gradient pass.
TOKENS = 261_000
# Tokens of the largest pack (PACK_TOKENS).
PACK = 1024

# Dense BF16 peak of an H100 SXM or H200, FLOP/s: NVIDIA's data sheets (989 TFLOP/s; the 1979 there are with sparsity).
PEAK = 989e12
# The share of it that a search reaches: assumed. Training runs that are published reach 35% to 45%.
SHARE = 0.4
# Memory, bytes: NVIDIA's data sheets, H100 SXM and H200; and the bandwidth of an H100's, bytes/s, from the same.
MEMORY = {"H100 80 GB": 80e9, "H200 141 GB": 141e9}
BANDWIDTH = 3.35e12
# Between the eight GPUs of a machine, each direction of each GPU, bytes/s: NVLink 4, half of the 900 GB/s of both directions, of which 80% are assumed.
NVLINK = 0.8 * 450e9
# Between machines, for each GPU: one port of 400 Gbit/s, of which 80% are assumed.
NETWORK = 0.8 * 50e9
IN_A_MACHINE = 8
# One hash of one file, bytes/s, and a copy to the disk, bytes/s: measured on the CPU of docs/performance.md.
HASH, COPY = 1.53e9, 1.0e9
COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Model:
    name: str
    hidden: int
    blocks: int
    inner: int
    key_values: int
    vocabulary: int

    @property
    def targets(self):
        """q, k and v."""
        return self.blocks * self.hidden * (self.hidden + 2 * self.key_values)

    @property
    def products(self):
        """Elements that a token is multiplied with; the head is computed at predicted tokens only, and left out."""
        return self.targets + self.blocks * (self.hidden ** 2 + 3 * self.hidden * self.inner)

    @property
    def parameters(self):
        return self.products + 2 * self.vocabulary * self.hidden

    @property
    def token(self):
        """FLOP of a token's gradient pass: forward and dX through every matrix, dW of the targets."""
        return 4 * self.products + 2 * self.targets

    @property
    def activations(self):
        """Bytes of one pack's activations with --recompute: each block's input, and one block's own in f32."""
        return 4 * PACK * (self.blocks * self.hidden + 6 * self.hidden + 3 * self.inner)

    @property
    def held(self):
        return 2 * self.parameters + 4 * COPIES * self.targets + self.activations


MODELS = (Model("8B", 4096, 32, 14336, 1024, 128256), Model("70B", 8192, 80, 28672, 1024, 128256), Model("405B", 16384, 126, 53248, 1024, 128256))


def main():
    table("Memory of one rank, GB", ("model", "parameters", "weights in BF16", f"{COPIES} copies of q, k, v in f32", "activations", "together", *MEMORY),
          [(m.name, f"{m.parameters / 1e9:.1f} B", gb(2 * m.parameters), gb(4 * COPIES * m.targets), gb(m.activations), gb(m.held),
            *(f"{-(-m.held // size):.0f} GPU{'s' if m.held > size else ''}" for size in MEMORY.values())) for m in MODELS])
    table("Work and traffic of a search", ("model", "GFLOP a token", "PFLOP of a search", "seconds on one GPU's arithmetic", "GB summed at a time", "GB summed in all"),
          [(m.name, f"{m.token / 1e9:.1f}", f"{m.token * TOKENS / 1e15:.1f}", f"{compute(m, 1):.0f}", f"{4 * m.targets / 1e9:.1f}", f"{4 * m.targets * GRADIENTS / 1e9:.0f}")
           for m in MODELS])
    for m in MODELS:
        per_rank = -(-int(m.held) // int(MEMORY["H100 80 GB"]))
        rows = []
        for count in COUNTS:
            ranks = count // per_rank
            if ranks == 0:
                rows.append((count, "", "does not fit", "", "", ""))
                continue
            passes, sums = compute(m, ranks), traffic(m, ranks, count)
            rows.append((count, ranks, f"{passes:.1f}", f"{sums:.1f}", f"{passes + sums:.1f}", f"{compute(m, 1) / (passes + sums):.1f}"))
        table(f"{m.name}, on H100s of 80 GB, {per_rank} for each rank", ("GPUs", "ranks", "passes, s", "sums, s", "together, s", "times as fast as one rank"), rows)
    table("Before and after the search, on a CPU, seconds", ("model", "GB of checkpoint", "hashed, one file", "hashed, 8 files at a time", "copied to a disk"),
          [(m.name, gb(2 * m.parameters), f"{2 * m.parameters / HASH:.0f}", f"{2 * m.parameters / HASH / 8:.0f}", f"{2 * m.parameters / COPY:.0f}") for m in MODELS])


def compute(model, ranks):
    """Seconds of passes, evenly shared; the GPUs of a rank take turns, block after block. No pass is faster than its weights are read, twice for a gradient."""
    arithmetic = model.token * TOKENS / (PEAK * SHARE * ranks)
    return max(arithmetic, GRADIENTS * 2 * 2 * model.parameters / BANDWIDTH)


def traffic(model, ranks, gpus):
    """Seconds of sums: each rank sends and receives 2 (n - 1) / n of what is summed, over all links of its GPUs."""
    links = NVLINK if gpus <= IN_A_MACHINE else NETWORK
    per_rank = gpus // ranks
    return 2 * (ranks - 1) / ranks * 4 * model.targets * GRADIENTS / (links * per_rank)


def gb(size):
    return f"{size / 1e9:.1f}" if size < 1e11 else f"{size / 1e9:.0f}"


def table(title, head, rows):
    print(f"{title}:\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


if __name__ == "__main__":
    main()
