"""The official openai client against a running troupe: completions, chat, streaming, n, logprobs, abort, errors.

usage: check_openai.py BASE_URL (such as http://127.0.0.1:8000)"""
import sys
import time
import urllib.request

import openai

BASE = sys.argv[1]
client = openai.OpenAI(base_url=BASE + "/v1", api_key="none", max_retries=0, timeout=120)
MODEL = client.models.list().data[0].id
passed = 0


def check(name, condition, detail=""):
    global passed
    if not condition:
        sys.exit(f"FAILED {name}: {detail}")
    passed += 1
    print(f"ok      {name}")


def metric(name):
    text = urllib.request.urlopen(BASE + "/metrics").read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
               if line.startswith(name + "{") or line.startswith(name + " "))


def completions():
    one = client.completions.create(model=MODEL, prompt="In the beginning", max_tokens=12, seed=1)
    check("completion", one.object == "text_completion" and len(one.choices) == 1
          and one.usage.completion_tokens <= 12 and one.choices[0].finish_reason in ("stop", "length"), one)
    again = client.completions.create(model=MODEL, prompt="In the beginning", max_tokens=12, seed=1)
    check("same seed, same text", again.choices[0].text == one.choices[0].text)
    batch = client.completions.create(model=MODEL, prompt=["In the beginning", "And it came"], max_tokens=12, seed=1)
    check("batch keeps its order and changes nothing",
          [c.index for c in batch.choices] == [0, 1] and batch.choices[0].text == one.choices[0].text)
    pieces = list(client.completions.create(model=MODEL, prompt="In the beginning", max_tokens=12, seed=1, stream=True,
                                            stream_options={"include_usage": True}))
    check("stream adds up", "".join(c.choices[0].text for c in pieces if c.choices) == one.choices[0].text)
    check("usage chunk is last and has no choices", pieces[-1].choices == [] and
          pieces[-1].usage.completion_tokens == one.usage.completion_tokens)
    stop = one.choices[0].text[3:7]
    cut = client.completions.create(model=MODEL, prompt="In the beginning", max_tokens=12, seed=1, stop=[stop])
    check("stop string", cut.choices[0].finish_reason == "stop" and
          cut.choices[0].text == one.choices[0].text[:one.choices[0].text.index(stop)], cut)
    scored = client.completions.create(model=MODEL, prompt="In the beginning", max_tokens=4, seed=1, logprobs=3,
                                       echo=True)
    lists = scored.choices[0].logprobs
    check("echo and logprobs", scored.choices[0].text.startswith("In the beginning") and lists.token_logprobs[0] is None
          and len(lists.tokens) == len(lists.top_logprobs) == len(lists.text_offset)
          == scored.usage.prompt_tokens + scored.usage.completion_tokens
          and all(3 <= len(top) <= 4 for top in lists.top_logprobs[1:]), lists)


def chat():
    messages = [{"role": "system", "content": "You answer questions."},
                {"role": "user", "content": [{"type": "text", "text": "What is a river?"}]}]
    one = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, seed=2, logprobs=True,
                                         top_logprobs=2)
    choice = one.choices[0]
    check("chat", one.object == "chat.completion" and choice.message.role == "assistant" and choice.message.content, one)
    check("chat logprobs", len(choice.logprobs.content) == one.usage.completion_tokens and
          all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content))
    text, roles, scored = "", 0, 0
    for number, chunk in enumerate(client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=24, seed=2, logprobs=True, top_logprobs=2, stream=True)):
        delta = chunk.choices[0].delta
        roles += delta.role is not None
        check_first = number > 0 or (delta.role == "assistant" and delta.content is not None)
        if not check_first:
            sys.exit(f"FAILED first chunk: {chunk}")
        text += delta.content or ""
        if chunk.choices[0].logprobs:
            scored += len(chunk.choices[0].logprobs.content)
    check("chat stream adds up", text == choice.message.content and roles == 1
          and scored == one.usage.completion_tokens, text)
    two = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, seed=2, n=2, temperature=1.0)
    check("n=2", [c.index for c in two.choices] == [0, 1]
          and two.choices[0].message.content != two.choices[1].message.content)
    check("max_completion_tokens", client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=3).usage.completion_tokens <= 3)


def abort():
    stream = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Tell me more"}],
                                            max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    for number, _ in enumerate(stream):
        if number == 3:
            break
    stream.close()
    waiting_since = time.time()
    while metric("vllm:num_requests_running") > 0 and time.time() - waiting_since < 10:
        time.sleep(0.02)
    check("abort in a stream frees the sequence", metric("vllm:num_requests_running") == 0)


def errors():
    def refused(kind, words, call):
        try:
            call()
        except kind as error:
            check(f"{kind.__name__}: {words}", words in str(error), error)
        else:
            sys.exit(f"FAILED {kind.__name__} was not raised")

    create = client.completions.create
    refused(openai.NotFoundError, "does not exist", lambda: create(model="nothing", prompt="x"))
    refused(openai.BadRequestError, "maximum context length", lambda: create(model=MODEL, prompt="x", max_tokens=10**6))
    refused(openai.BadRequestError, "temperature", lambda: create(model=MODEL, prompt="x", temperature=-1))
    refused(openai.BadRequestError, "n must be", lambda: create(model=MODEL, prompt="x", n=1000))
    refused(openai.BadRequestError, "out of vocabulary", lambda: create(model=MODEL, prompt=[10**7]))
    refused(openai.BadRequestError, "messages", lambda: client.chat.completions.create(model=MODEL, messages=[]))


completions()
chat()
abort()
errors()
print(f"{passed} checks of the openai client {openai.__version__} passed")
