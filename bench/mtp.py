#!/usr/bin/env python3
"""What guessed tokens (MTP) gain: one stream at a time, greedy, in turns against a troupe that guesses none and one that does, both with every
actor in its own process. The answers must be the same, byte for byte. Prompts are pieces of texts (a model guesses well where it knows what it
reads) and, apart from them, random tokens. The figure is the median of the pairs' ratios of decode speed, from the first token to the last.

usage: bench/mtp.py [--troupe build/troupe] [--model models/demo] [--steps 2] [--pairs 25] [--tokens 200] [TEXT...]
"""
import argparse, http.client, json, random, re, statistics, subprocess, tempfile, time


def serve(options, work, steps):
    process = subprocess.Popen([options.troupe, "serve", "--model", options.model, "--port", "0", "--mtp-steps", str(steps), "--prefix-cache", "0",
                                "--run-dir", "%s/run%d" % (work, steps)], stdout=subprocess.PIPE, text=True)
    port = 0
    for line in process.stdout:
        found = re.match(r"serving .* at http://[^:]*:(\d+)", line)
        port = int(found.group(1)) if found else port
        if line.startswith("Ctrl-C"):
            return process, port
    raise SystemExit("troupe serve did not start")


def decode(port, prompt, tokens):
    """Tokens per second after the first, and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True, "return_token_ids": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit("status %d: %s" % (answer.status, answer.read()))
    first, text = None, ""
    for line in answer:
        if line.startswith(b"data: {"):
            first = first or time.monotonic()
            last = time.monotonic()
            text += json.loads(line[6:])["choices"][0]["text"]
    return (tokens - 1) / (last - first), text


def measure(ports, name, prompts, tokens):
    ratios, speeds = [], {0: [], 1: []}
    for number, prompt in enumerate(prompts):
        results = {}
        for which in [0, 1] if number % 2 else [1, 0]:
            results[which] = decode(ports[which], prompt, tokens)
            speeds[which].append(results[which][0])
        if results[0][1] != results[1][1]:
            raise SystemExit("answers differ for %r" % (prompt,))
        ratios.append(results[1][0] / results[0][0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print("%-14s %3d pairs   without %7.1f tokens/s   with %7.1f   ratio %.2f (quartiles %.2f to %.2f); all answers equal" % (
        name, len(ratios), statistics.median(speeds[0]), statistics.median(speeds[1]), middle, low, high))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--troupe", default="build/troupe")
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("texts", nargs="*", default=["README.md"])
    options = parser.parse_args()
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as work:
        (plain, plain_port), (guessing, guessing_port) = serve(options, work, 0), serve(options, work, options.steps)
        ports = [plain_port, guessing_port]
        try:
            for port in ports:
                decode(port, "warm up", 100)
            for path in options.texts:
                text = open(path, encoding="utf-8").read()
                starts = [rng.randrange(max(1, len(text) - 200)) for _ in range(options.pairs)]
                measure(ports, path.rsplit("/", 1)[-1], [text[s:s + 160] for s in starts], options.tokens)
            measure(ports, "random tokens", [[rng.randrange(300, 3300) for _ in range(32)] for _ in range(options.pairs)], options.tokens)
        finally:
            for process in plain, guessing:
                process.terminate()
                process.wait()


main()
