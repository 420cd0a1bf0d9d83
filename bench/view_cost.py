#!/usr/bin/env python3
"""What the live view costs: the same streams against a troupe of its own, in turns with nobody looking and with one page's feed open
(curl reads it as a page does; a browser's own drawing is not the troupe's cost), or with every request traced. What the machine does
otherwise falls on both of a pair of rounds: the figure is the median of the pairs' ratios, with quartiles beside it, of tokens per second and,
with less noise, of processor time per token of all the troupe's processes together; and what the gateway, who writes the feed, takes more.

usage: bench/view_cost.py [--troupe build/troupe] [--pairs 30] [--streams 8] [--tokens 400] [--mode feed|traced]
"""
import argparse, glob, http.client, json, random, re, statistics, subprocess, tempfile, threading, time


def processes(run, which="*"):
    """Seconds of processor that all threads of all processes have used."""
    total = 0
    for path in glob.glob(run + "/" + which + ".pid"):
        for task in glob.glob("/proc/%s/task/*/schedstat" % open(path).read().strip()):
            total += int(open(task).read().split()[0]) * 1e-9
    return total


def complete(port, tokens, prompt, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit("status %d: %s" % (answer.status, answer.read()))
    answer.read()


def one_round(port, run, look, mode, number, options):
    """Tokens per second, microseconds of processor per token, bytes of the feed per second, seconds of the gateway's processor time per second."""
    listener = None
    if look and mode == "feed":
        listener = subprocess.Popen(["curl", "-sN", "http://127.0.0.1:%d/troupe/events" % port], stdout=subprocess.PIPE)
        listener.stdout.readline()
        drain = threading.Thread(target=lambda: sizes.append(sum(len(part) for part in iter(lambda: listener.stdout.read1(1 << 16), b""))))
        sizes = []
        drain.start()
    rng = random.Random(number)  # both of a pair ask for the same
    prompts = [[rng.randrange(300, 3300) for _ in range(24)] for _ in range(options.streams)]
    gateway, before, begin = processes(run, "gateway"), processes(run), time.monotonic()
    threads = [threading.Thread(target=complete, args=(port, options.tokens, prompt, {"X-Request-Id": "r%d" % i} if look and mode == "traced" else {}))
               for i, prompt in enumerate(prompts)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    seconds, used, gateway, told = time.monotonic() - begin, processes(run) - before, processes(run, "gateway") - gateway, 0
    if listener:
        listener.terminate()
        listener.wait()
        drain.join()
        told = sizes[0]
        if told < 1000:
            raise SystemExit("the feed told nothing")
    tokens = options.tokens * options.streams
    return tokens / seconds, used / tokens * 1e6, told / seconds, gateway / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--troupe", default="build/troupe")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--mode", choices=["feed", "traced"], default="feed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        run, port = work + "/run", 0
        serve = subprocess.Popen([options.troupe, "serve", "--port", "0", "--threads", "1", "--prefix-cache", "0", "--run-dir", run], stdout=subprocess.PIPE, text=True)
        for line in serve.stdout:
            found = re.match(r"serving .* at http://[^:]*:(\d+)", line)
            port = int(found.group(1)) if found else port
            if line.startswith("Ctrl-C"):
                break
        pairs = []
        for i in range(3):
            one_round(port, run, False, options.mode, i, options)
        for number in range(options.pairs):
            results = {}
            for look in [False, True] if number % 2 else [True, False]:
                results[look] = one_round(port, run, look, options.mode, number, options)
            pairs.append((results[False], results[True]))
        serve.terminate()
        serve.wait()
    print("%d pairs of rounds, %d streams of %d tokens; one page's feed: %.1f KiB/s" % (
        options.pairs, options.streams, options.tokens, statistics.median(b[2] for a, b in pairs) / 1024))
    for index, name, digits in (0, "tokens/s", 1), (1, "us of processor per token", 2):
        ratios = [b[index] / a[index] for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print("%-26s nobody %9.*f   %s %9.*f   ratio %.4f (quartiles %.4f to %.4f; mean %.4f +- %.4f)" % (
            name, digits, statistics.median(a[index] for a, b in pairs), options.mode, digits, statistics.median(b[index] for a, b in pairs),
            middle, low, high, statistics.fmean(ratios), statistics.stdev(ratios) / len(ratios) ** .5))
    more = [b[3] - a[3] for a, b in pairs]
    print("the gateway takes %.2f ms of processor per second more (mean; +- %.2f), %.3f %% of one core" % (
        1e3 * statistics.fmean(more), 1e3 * statistics.stdev(more) / len(more) ** .5, 100 * statistics.fmean(more)))


main()
