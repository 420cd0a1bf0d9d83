#!/usr/bin/env python3
"""troupe and llama.cpp on the same weights, taking turns, as ratios of medians.

usage: compare.py --model DIR --gguf FILE [--llama BIN_DIR] [--troupe BINARY] [--rounds 5] [--figures LIST] [--json OUT]
                  [--peer q8_0] [--peer-options "--no-repack"] [--peer-threads 1,2] [-- OPTIONS OF troupe serve]

troupe is measured through HTTP by `troupe bench`, llama.cpp without any server by llama-bench and llama-batched-bench. The peer runs
with one thread and with all unless told otherwise, and its better median counts: with threads that spin it suffers more than troupe
from whatever else runs. Targets: targets.json beside this file, by the model directory's name and --peer.
"""
import argparse
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_troupe(options, rest):
    port = free_port()
    process = subprocess.Popen([options.troupe, "serve", "--model", options.model, "--port", str(port), *rest],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(3000):
        try:
            urllib.request.urlopen(url + "/ready", timeout=1)
            return process, url
        except OSError:
            if process.poll() is not None:
                sys.exit("troupe serve ended early")
            time.sleep(0.1)
    sys.exit("troupe serve did not become ready")


def measure_troupe(options, url, figure):
    out = subprocess.run([options.troupe, "bench", "--model", options.model, "--url", url, "--runs", "1",
                          "--figures", figure, "--json", "-"], check=True, capture_output=True, text=True)
    report = json.loads(out.stdout)
    return report["figures"][figure]["tokens_per_s"], report["machine"]


def measure_llama(options, figure, threads):
    kind, size = figure.split("-")
    extra = options.peer_options.split()
    common = ["-m", options.gguf, "-t", str(threads)]
    if kind == "decode" and int(size) > 1:
        command = [f"{options.llama}/llama-batched-bench", *common, *extra, "-c", str(160 * int(size)), "-npp", "32",
                   "-ntg", "128", "-npl", size, "--output-format", "jsonl"]
        for _ in range(3):  # now and then it ends without a result, and without an error
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if rows:
                return rows[0]["speed_tg"]
        sys.exit(f"{' '.join(command)}: no result\n{done.stderr[-2000:]}")
    work = ["-p", "0", "-n", "128"] if kind == "decode" else ["-p", size, "-n", "0"]
    extra = ["--repack" if e == "--no-repack" else e for e in extra]
    extra = [v for e in extra for v in ([e, "0"] if e == "--repack" else [e])]
    command = [f"{options.llama}/llama-bench", *common, *extra, *work, "-r", "1", "-o", "json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out)[0]["avg_ts"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--llama", default="build/peers/llama/bin")
    parser.add_argument("--troupe", default="build/troupe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figures", default="decode-1,decode-8,decode-32,prefill-512")
    parser.add_argument("--peer", default="bf16", help="what the peer's file holds, for the targets")
    parser.add_argument("--peer-options", default="")
    parser.add_argument("--peer-threads", default=f"1,{len(os.sched_getaffinity(0))}")
    parser.add_argument("--json")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    figures, widths = options.figures.split(","), sorted({int(t) for t in options.peer_threads.split(",")})
    ours = {f: [] for f in figures}
    peer = {(f, t): [] for f in figures for t in widths}
    process, url = start_troupe(options, options.rest)
    try:
        measure_troupe(options, url, "decode-8")  # touch all memory; before a prompt is timed, troupe bench warms up itself
        for _ in range(options.rounds):
            for figure in figures:
                rate, machine = measure_troupe(options, url, figure)
                ours[figure].append(rate)
                for threads in widths:
                    peer[figure, threads].append(measure_llama(options, figure, threads))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    targets_file = pathlib.Path(__file__).with_name("targets.json")
    name = f"{pathlib.Path(options.model).resolve().name} {options.peer}"
    targets = json.loads(targets_file.read_text()).get(name, {})
    result = {"model": options.model, "gguf": options.gguf, "machine": machine, "figures": {}}
    print(f"{name}: medians of {options.rounds} alternating runs, tokens/s; lowest to highest of troupe's in brackets")
    print(f"{'':13}{'troupe':>10}{'llama.cpp':>11}  threads   ratio  target")
    for figure in figures:
        mine = statistics.median(ours[figure])
        best = max((statistics.median(peer[figure, t]), t) for t in widths)
        ratio, target = mine / best[0], targets.get(figure)
        verdict = "" if target is None else f"{target:8.1f} {'met' if ratio >= target else 'missed'}"
        print(f"{figure:13}{mine:10.1f}{best[0]:11.1f}{best[1]:9}{ratio:8.2f}{verdict:16} [{min(ours[figure]):.1f} to {max(ours[figure]):.1f}]")
        result["figures"][figure] = {"troupe": ours[figure], "ratio": ratio, "target": target,
                                     "llama.cpp": {str(t): peer[figure, t] for t in widths}}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
