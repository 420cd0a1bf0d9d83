"""Many clients at once: 200 concurrent streams of mixed lengths, each compared with the same request alone, then 100 clients that hang up
at random; afterwards nothing may be left.

usage: check_load.py BASE_URL [STREAMS [DISCONNECTS]]"""
import asyncio
import json
import random
import sys
import time

import aiohttp

BASE = sys.argv[1]
STREAMS = int(sys.argv[2]) if len(sys.argv) > 2 else 200
DISCONNECTS = int(sys.argv[3]) if len(sys.argv) > 3 else 100
SEED = 7
WORDS = "In the beginning God created heaven and earth def return the river of a man who was king over all".split()
GAUGES = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "troupe_gateway_requests",
          "troupe_sequences_running", "troupe_sequences_waiting", "troupe_kv_pages_used"]


def request(number):
    """Request `number`, always the same: prompt, length, sampling and choices vary."""
    rng = random.Random(number * 1000003 + SEED)
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 5, 20, 80])))
    return {"prompt": prompt, "max_tokens": rng.choice([1, 4, 16, 48]), "seed": number, "stream": True,
            "temperature": rng.choice([0, 0.7, 1.0]), "logprobs": rng.choice([None, 2])}


async def stream(client, body, hang_up_after=None):
    """The answer's text and logprobs; None if the client hung up."""
    text, scores, events = "", [], 0
    async with client.post(BASE + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        async for raw in response.content:
            line = raw.decode().rstrip("\n")
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return text, scores
            choice = json.loads(line[6:])["choices"][0]
            text += choice["text"]
            scores += (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]
            events += 1
            if hang_up_after is not None and events >= hang_up_after:
                response.close()  # hang up, rather than read on to the end
                return None
    raise RuntimeError("the stream ended without [DONE]")


async def gauges(client):
    async with client.get(BASE + "/metrics") as response:
        text = await response.text()
    return {name: sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{")
                      or line.startswith(name + " ")) for name in GAUGES}


async def settle(client):
    until = time.time() + 15
    while True:
        found = await gauges(client)
        if not any(found.values()):
            return
        if time.time() > until:
            sys.exit(f"FAILED something is left: {found}")
        await asyncio.sleep(0.1)


async def main():
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 20,
                                     timeout=aiohttp.ClientTimeout(total=600)) as client:
        kinds = [number % 40 for number in range(STREAMS)]
        alone = {}
        for kind in sorted(set(kinds)):
            alone[kind] = await stream(client, request(kind))
        start = time.time()
        together = await asyncio.gather(*(stream(client, request(kind)) for kind in kinds))
        seconds = time.time() - start
        wrong = [kind for kind, answer in zip(kinds, together) if answer != alone[kind]]
        if wrong:
            kind = wrong[0]
            sys.exit(f"FAILED {len(wrong)} of {STREAMS} differ, first: {request(kind)}\n{alone[kind]}\n{together[kinds.index(kind)]}")
        await settle(client)
        print(f"ok      {STREAMS} concurrent streams, all as alone ({seconds:.1f} s)")

        rng = random.Random(SEED)

        async def leave(number):
            await asyncio.sleep(rng.random())
            body = dict(request(number), max_tokens=400, ignore_eos=True, stream=rng.random() < 0.7)
            if body["stream"]:
                await stream(client, body, hang_up_after=rng.randint(1, 20))
                return
            try:
                async with client.post(BASE + "/v1/completions", json=body,
                                       timeout=aiohttp.ClientTimeout(total=rng.random())) as response:
                    await response.read()
            except asyncio.TimeoutError:
                pass

        await asyncio.gather(*(leave(number) for number in range(DISCONNECTS)))
        await settle(client)
        print(f"ok      {DISCONNECTS} disconnects leave nothing behind")
        if await stream(client, request(3)) != alone[3]:
            sys.exit("FAILED the answer after the disconnects differs")
        print("ok      and the answers stay the same")


asyncio.run(main())
