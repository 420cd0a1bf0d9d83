#!/usr/bin/env python3
"""Our kernels beside those that the field runs, on one card: build/bench-gpu (with cuBLASLt's times) and, where their wheels are installed,
sgl-deep-gemm (DeepGEMM) and sgl-flash-mla (FlashMLA), on the shapes that DeepGEMM and FlashMLA publish. Prints times, ratios (the peer's
time / ours: over 1 is better for us) and our shares of what the card was measured to do. A peer that is not there is said to be absent,
with the reason; what a peer does not offer for a shape is a dash.

All are measured alike: the median of 21 single launches, the L2 cache flushed before each. Differences that remain: DeepGEMM writes BF16
where we write FP32; FlashMLA's splits depend on the batch and ours do not (that is what our bits cost).

usage: bench/gpu/peers.py [--bench build/bench-gpu] [--ours FILE] [--results FILE] [--save FILE]
  --ours FILE     what build/bench-gpu printed before, instead of running it
  --results FILE  the peers' times of an earlier --save, instead of measuring
  --save FILE     the peers' times, as JSON: {"absent": {peer: why}, "us": {row: {peer: microseconds}}}

  pip install torch sgl-deep-gemm sgl-flash-mla     in a virtual environment of its own; DeepGEMM compiles its kernels with nvcc
"""
import argparse, json, re, statistics, subprocess, sys

PEERS = ("deep_gemm", "flash_mla")
REPEATS, WARM, FLUSH_BYTES = 21, 3, 256 << 20
ROW = re.compile(r"^(?P<name>(?:fp8|bf16|mla)\s.*?)\s+(?P<us>\d+\.\d)\s+(?P<cublas>\d+\.\d|-)\s+(?P<ratio>\d+\.\d+|-)\s+"
                 r"(?P<tflops>\d+)\s+(?P<flops_share>\d+) %\s+(?P<gbps>\d+)\s+(?P<bytes_share>\d+) %$")
SHAPES = (
    ("dense", re.compile(r"^(fp8|bf16) +dense +M +(\d+) N +(\d+) K +(\d+)$")),
    ("masked", re.compile(r"^(fp8|bf16) +masked (\d+) x (\d+) rows N +(\d+) K +(\d+)$")),
    ("absorbed", re.compile(r"^mla absorbed( e4m3)? rows (\d+) heads (\d+) positions (\d+)$")),
)


def read_ours(text):
    """(line with the limits, rows) of what build/bench-gpu printed."""
    limits, rows = None, []
    for line in text.splitlines():
        if line.startswith("measured limits:"):
            limits = line
        found = ROW.match(line)
        if found:
            rows.append(found.groupdict())
    if limits is None or not rows:
        raise SystemExit("peers.py: this is not what build/bench-gpu prints: no line of limits, or no rows")
    return limits, rows


def shape_of(name):
    for kind, pattern in SHAPES:
        found = pattern.match(name)
        if found:
            return kind, [int(part) if part and part.isdigit() else part for part in found.groups()]
    return None, []


class Card:
    """Measures as bench_gpu.cc does."""

    def __init__(self, torch):
        self.torch = torch
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def median_us(self, work):
        torch, times = self.torch, []
        for i in range(REPEATS + WARM):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.fill_(i & 255)
            begin.record()
            work()
            end.record()
            end.synchronize()
            if i >= WARM:
                times.append(begin.elapsed_time(end) * 1000)
        return statistics.median(times)


class DeepGemm:
    def __init__(self, card):
        import deep_gemm
        self.card, self.torch, self.lib = card, card.torch, deep_gemm

    def quantised(self, groups, rows, columns, block):
        """E4M3 of a pattern with its scales: for each row and 128 columns, or for each 128 x 128."""
        torch = self.torch
        lead = [groups] if groups else []
        data = torch.full(lead + [rows, columns], 0.5, device="cuda").to(torch.float8_e4m3fn)
        scale_rows = (rows + 127) // 128 if block else rows
        return data, torch.full(lead + [scale_rows, (columns + 127) // 128], 0.01, device="cuda")

    def dense(self, kind, m, n, k):
        torch, lib = self.torch, self.lib
        d = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        if kind == "bf16":
            a, b = (torch.ones(rows, k, dtype=torch.bfloat16, device="cuda") for rows in (m, n))
            return self.card.median_us(lambda: lib.bf16_gemm_nt(a, b, d))
        a, b = self.quantised(0, m, k, False), self.quantised(0, n, k, True)
        return self.card.median_us(lambda: lib.fp8_gemm_nt(a, b, d))

    def masked(self, kind, groups, rows, n, k):
        torch, lib, capacity = self.torch, self.lib, max(128, rows)
        count = torch.full([groups], rows, dtype=torch.int32, device="cuda")
        d = torch.empty(groups, capacity, n, dtype=torch.bfloat16, device="cuda")
        if kind == "bf16":
            a = torch.ones(groups, capacity, k, dtype=torch.bfloat16, device="cuda")
            b = torch.ones(groups, n, k, dtype=torch.bfloat16, device="cuda")
            return self.card.median_us(lambda: lib.m_grouped_bf16_gemm_nt_masked(a, b, d, count, rows))
        a, b = self.quantised(groups, capacity, k, False), self.quantised(groups, n, k, True)
        return self.card.median_us(lambda: lib.m_grouped_fp8_gemm_nt_masked(a, b, d, count, rows))


class FlashMla:
    def __init__(self, card):
        import flash_mla
        self.card, self.torch, self.lib = card, card.torch, flash_mla

    def absorbed(self, e4m3, rows, heads, positions):
        if e4m3:
            return None  # its FP8 decoding is of other caches: a scale for the whole, or sparse attention
        torch, pages = self.torch, (positions + 63) // 64
        q = torch.ones(rows, 1, heads, 576, dtype=torch.bfloat16, device="cuda")
        cache = torch.ones(rows * pages, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
        table = torch.arange(rows * pages, dtype=torch.int32, device="cuda").view(rows, pages)
        seen = torch.full([rows], positions, dtype=torch.int32, device="cuda")
        plan, splits = self.lib.get_mla_metadata(seen, heads, 1)  # filled by the first call, which is warming up
        return self.card.median_us(lambda: self.lib.flash_mla_with_kvcache(
            q, cache, table, seen, 512, plan, splits, causal=True, use_legacy=True))


def open_peers():
    """(peers that are there, why the others are not)"""
    try:
        import torch
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        card = Card(torch)
    except Exception as error:
        return {}, {peer: "torch: %s" % error for peer in PEERS}
    there, absent = {}, {}
    for peer, make in (("deep_gemm", DeepGemm), ("flash_mla", FlashMla)):
        try:
            there[peer] = make(card)
        except Exception as error:
            absent[peer] = str(error)
    return there, absent


def measure(rows):
    there, absent = open_peers()
    us = {}
    for row in rows:
        kind, arguments = shape_of(row["name"])
        for peer, lib in there.items():
            if kind is None or not hasattr(lib, kind):
                continue
            try:
                time = getattr(lib, kind)(*arguments)
            except Exception as error:  # a shape that it refuses is a dash, and said so
                print("peers.py: %s: %s: %s" % (peer, row["name"], str(error).splitlines()[0]), file=sys.stderr)
                continue
            if time is not None:
                us.setdefault(row["name"], {})[peer] = time
    return {"absent": absent, "us": us}


def figure(value, form):
    return form % value if value is not None else "-"


def print_table(limits, rows, results, out=sys.stdout):
    names = ["cublas"] + list(PEERS)
    print(limits, file=out)
    for peer in PEERS:
        if peer in results["absent"]:
            print("%s is absent: %s" % (peer, results["absent"][peer]), file=out)
    print("%-44s %9s" % ("", "ours us") + "".join(" %13s %6s" % (name + " us", "ratio") for name in names) + "  of FLOPS  of bytes", file=out)
    ratios = {name: [] for name in names}
    for row in rows:
        ours, line = float(row["us"]), "%-44s %9.1f" % (row["name"], float(row["us"]))
        peers = dict(results["us"].get(row["name"], {}))
        if row["cublas"] != "-":
            peers["cublas"] = float(row["cublas"])
        for name in names:
            time = peers.get(name)
            ratio = time / ours if time is not None else None
            if ratio is not None:
                ratios[name].append(ratio)
            line += " %13s %6s" % (figure(time, "%.1f"), figure(ratio, "%.2f"))
        print(line + "  %6s %%  %6s %%" % (row["flops_share"], row["bytes_share"]), file=out)
    for name in names:
        if ratios[name]:
            print("%s: %d shapes, median ratio %.2f, least %.2f; within 10 %% or ahead on %d"
                  % (name, len(ratios[name]), statistics.median(ratios[name]), min(ratios[name]),
                     sum(ratio >= 0.9 for ratio in ratios[name])), file=out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="build/bench-gpu")
    parser.add_argument("--ours")
    parser.add_argument("--results")
    parser.add_argument("--save")
    options = parser.parse_args()
    if options.ours:
        text = open(options.ours).read()
    else:
        ran = subprocess.run([options.bench], stdout=subprocess.PIPE, text=True)
        if ran.returncode != 0:
            raise SystemExit("peers.py: %s failed with %d" % (options.bench, ran.returncode))
        text = ran.stdout
    limits, rows = read_ours(text)
    results = json.load(open(options.results)) if options.results else measure(rows)
    if options.save:
        with open(options.save, "w") as file:
            json.dump(results, file, indent=1)
    print_table(limits, rows, results)


if __name__ == "__main__":
    main()
