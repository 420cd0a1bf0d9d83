#!/usr/bin/env python3
"""What it costs to be ready for faults: processor time of all processes of a troupe per token, with and without checksums, hedging and
frequent heartbeats, side by side. Every round measures each setting once, in an order that turns. `paired` is the median of the rounds' own
ratios (so what the machine does for longer than a round is in both), and `between` the 90 % interval of that median, by order statistics; `cost`
compares the medians of all rounds. Processor time rather than wall time: it hardly depends on what else the machine does.

usage: bench/fault_cost.py --troupe build/troupe [--rounds 9] [--model DIR] [--figure decode-32] [--audit] [--only "all on,all off"]"""
import argparse
import json
import math
import signal
import statistics
import subprocess
import tempfile

SETTINGS = {
    "all on": [],
    "no CRC": ["--frame-crc", "0"],
    "no hedging": ["--hedge-factor", "0"],
    "all off": ["--frame-crc", "0", "--hedge-factor", "0", "--heartbeat-ms", "60000"],
}
AUDITS = {
    "no audit": ["--replicas", "2"],
    "audit 0.01": ["--audit-share", "0.01"],
    "audit 0.1": ["--audit-share", "0.1"],
    "audit 1": ["--audit-share", "1"],
}


def measure(arguments, figure, model, knobs):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run([arguments.troupe, "bench", "--model", model, "--figures", figure, "--runs", "1", "--json", out.name] + knobs,
                       check=True, stdout=subprocess.DEVNULL, start_new_session=True)
        result = json.load(open(out.name))["figures"][figure]
    cpu = sum(us for role, us in result["cpu_us_per_token"].items() if role != "client")
    return cpu, result["tokens_per_s"]


def interval(values, chance=0.9):
    """Where the median of what these were drawn from lies with this chance, whatever its distribution."""
    values, count, below, at = sorted(values), len(values), 0.0, 0
    while at < count // 2 and below + math.comb(count, at) / 2**count <= (1 - chance) / 2:
        below += math.comb(count, at) / 2**count
        at += 1
    at = max(at - 1, 0)
    return values[at], values[count - 1 - at]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--troupe", default="build/troupe")
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--figure", default="decode-32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--audit", action="store_true", help="compare audits instead")
    parser.add_argument("--only", help="these settings, with commas between; the last one is compared with")
    arguments = parser.parse_args()
    settings = AUDITS if arguments.audit else SETTINGS
    if arguments.only:
        settings = {name: settings[name] for name in arguments.only.split(",")}
    names = list(settings)
    found = {name: [] for name in names}
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))  # the rounds so far are told
    for turn in range(arguments.rounds):
        if ended and turn > 0:
            arguments.rounds = turn
            break
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(measure(arguments, arguments.figure, arguments.model, settings[name]))
    base = names[0] if arguments.audit and not arguments.only else names[-1]
    zero = statistics.median(cpu for cpu, _ in found[base])
    print(f"{arguments.figure}, {arguments.rounds} rounds; processor time of all processes, us a token")
    print(f"{'':12} {'median':>8} {'lowest':>8} {'highest':>8} {'cost':>7} {'paired':>8} {'between':>16} {'tokens/s':>9}")
    for name in names:
        cpu = [value for value, _ in found[name]]
        middle = statistics.median(cpu)
        ratios = [here / there for (here, _), (there, _) in zip(found[name], found[base])]
        paired, (low, high) = statistics.median(ratios), interval(ratios)
        rate = statistics.median(value for _, value in found[name])
        print(f"{name:12} {middle:8.1f} {min(cpu):8.1f} {max(cpu):8.1f} {100 * (middle / zero - 1):6.1f}% {100 * (paired - 1):7.1f}% {100 * (low - 1):7.1f} {100 * (high - 1):6.1f}% {rate:9.0f}")


if __name__ == "__main__":
    main()
