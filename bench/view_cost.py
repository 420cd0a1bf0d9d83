#!/usr/bin/env python3
"""What the live view costs: streams against a troupe of its own, in turns with nobody looking, with one listener to the feed, and
with every request traced. Prints tokens per second and processor time per token of all its processes together.

usage: bench/view_cost.py [--troupe build/troupe] [--rounds 8] [--streams 8] [--tokens 200]
"""
import argparse, glob, http.client, json, re, statistics, subprocess, tempfile, threading, time

def processes(run):
    """Seconds of processor that all threads of all processes have used."""
    total = 0
    for path in glob.glob(run + "/*.pid"):
        for task in glob.glob("/proc/%s/task/*/schedstat" % open(path).read().strip()):
            total += int(open(task).read().split()[0]) * 1e-9
    return total


def stream(port, tokens, number, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"prompt": [5 + number, 6, 7, 8], "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    connection.getresponse().read()


def listen(port, stop):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/troupe/events")
    response = connection.getresponse()
    while not stop.is_set() and response.read1(65536):
        pass
    connection.close()


def one_round(port, run, mode, options):
    stop, listener = threading.Event(), None
    if mode == "feed":
        listener = threading.Thread(target=listen, args=(port, stop))
        listener.start()
        time.sleep(0.3)
    before, begin = processes(run), time.monotonic()
    threads = [threading.Thread(target=stream, args=(port, options.tokens, i, {"X-Request-Id": "r%d" % i} if mode == "traced" else {}))
               for i in range(options.streams)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    seconds, used = time.monotonic() - begin, processes(run) - before
    stop.set()
    if listener:
        listener.join()
    tokens = options.tokens * options.streams
    return tokens / seconds, used / tokens * 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--troupe", default="build/troupe")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        run = work + "/run"
        serve = subprocess.Popen([options.troupe, "serve", "--port", "0", "--threads", "1", "--run-dir", run], stdout=subprocess.PIPE, text=True)
        for line in serve.stdout:
            found = re.match(r"serving .* at http://[^:]*:(\d+)", line)
            port = int(found.group(1)) if found else port
            if line.startswith("Ctrl-C"):
                break
        modes, results = ["nobody", "feed", "traced"], {}
        one_round(port, run, "nobody", options)
        for number in range(options.rounds):
            for mode in modes[number % 3:] + modes[:number % 3]:
                results.setdefault(mode, []).append(one_round(port, run, mode, options))
        serve.terminate()
        serve.wait()
    for mode in modes:
        # pairs of the same round: what the machine does otherwise falls on both
        speed = [a[0] / b[0] - 1 for a, b in zip(results[mode], results["nobody"])]
        work = [a[1] / b[1] - 1 for a, b in zip(results[mode], results["nobody"])]
        print("%-7s %7.1f tokens/s (%+.2f %%)   %7.1f us of processor per token (%+.2f %%)   medians of %d rounds" % (
            mode, statistics.median(r[0] for r in results[mode]), 100 * statistics.median(speed),
            statistics.median(r[1] for r in results[mode]), 100 * statistics.median(work), options.rounds))


main()
