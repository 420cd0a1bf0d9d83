#!/usr/bin/env python3
"""Writes the golden encodings beside this file, from Hugging Face `tokenizers` and Jinja. Needed only to renew them:
    pip install tokenizers jinja2
    python3 tests/data/make_goldens.py models/demo [directory with DeepSeek's own tokenizer.json]
"""
import copy, glob, json, os, random, sys, tempfile
import jinja2
from tokenizers import Tokenizer

here = os.path.dirname(os.path.abspath(__file__))
demo = sys.argv[1]
rng = random.Random(20250101)

SPECIALS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜▁pad▁｜>", "<think>", "</think>",
            "<｜fim▁hole｜>", "<｜tool▁calls▁begin｜>", "<｜", "｜>", "<", "▁"]
SOURCES = [
    lambda: chr(rng.randrange(32, 127)), lambda: chr(rng.randrange(0, 32)), lambda: chr(rng.randrange(0x80, 0x250)),
    lambda: chr(rng.randrange(0x400, 0x530)), lambda: chr(rng.randrange(0x600, 0x700)), lambda: chr(rng.randrange(0x3000, 0x3100)),
    lambda: chr(rng.randrange(0x4e00, 0x9fff)), lambda: chr(rng.randrange(0xac00, 0xd7a3)), lambda: chr(rng.randrange(0x1f300, 0x1fa00)),
    lambda: chr(rng.randrange(0x300, 0x370)), lambda: rng.choice("\u200d\ufe0f\u180e\u2028\u2029\u0085\u00a0\u3000\ufeff\u200b\u2009"),
    lambda: rng.choice(" \n\r\t"), lambda: rng.choice("  \n"), lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
    lambda: rng.choice(SPECIALS), lambda: rng.choice("the of and to in is that it as was with be by on not".split()),
    lambda: " " + rng.choice("The hello World running don't it's we'll I'm 1st x=1; foo_bar() <b>".split()),
    lambda: " " * rng.randrange(1, 12), lambda: "\n" * rng.randrange(1, 5), lambda: "\r\n",
    lambda: chr(rng.choice([rng.randrange(0x20, 0xd800), rng.randrange(0xe000, 0x110000)])),
]
# Characters newer than Unicode 14, of the categories that the split patterns tell apart.
NEW = "\u1c89\u1c8a\u2427\u2ffc\ua7cb\U00010d40\U00011380\U00016d6d\U0001e5d0\U0001f6dc\U0001f8b2\U0002ebf0\U00031350"
WRITTEN = [
    "", " ", "a", "\n", "\0", "Hello, world!", "In the beginning God created the heaven and the earth.",
    "def f(x):\n    return x ** 2 + 1  # square\n\n\n", "\tint main(void) {\r\n\t\treturn 0;\r\n\t}\r\n",
    "for (i = 0; i < 10; i++) { printf(\"%d\\n\", a[i]); }", "1234567890 3.14159 1,000,000 0x7fff ١٢٣ Ⅷ ½ ²",
    "don't we'll I'm it's THEY'RE 'tis ''quoted'' “smart” ‘quotes’ — em–dash…", "漢字とひらがなとカタカナ、混じり文。中文字符，标点！",
    "Привет, мир! Ёлка, съешь ещё этих мягких французских булок.", "مرحبا بالعالم، كيف حالك؟", "שלום עולם", "नमस्ते दुनिया", "안녕하세요 세계",
    "👨‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ 😀😀😀", "e\u0301 u\u0308\u0304 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘", "   leading and trailing   ", "a  b   c    d\n\n  e \n \n\tf",
    "\r\n\r\n\n\r\r x \u2028 y \u2029 z \u0085 w \u00a0 v \u180e u \u3000 t", "\x01\x02\x1b[31mred\x1b[0m\x7f", "\ufeffBOM", "ﬁ ﬂ ſ K Å ß ẞ İ ı",
    "<｜begin▁of▁sentence｜>", "x<｜User｜>hi<｜Assistant｜>ho<｜end▁of▁sentence｜>", "<｜User<｜User｜>｜>", "<<｜User｜><｜", "<|im_start|>",
    "<think>why</think>because", "https://example.org/a/b?c=d&e=f#g mail@example.org", "A" * 300, "ab" * 150, " " * 200, " " * 100 + "x", "\n" * 60, "9" * 50,
    "é" * 60, "漢" * 60, "!" * 100, "x" + "\u0301" * 40, NEW, " " + " ".join(NEW), "!".join(NEW), "pneumonoultramicroscopicsilicovolcanoconiosis",
]


def random_text(longest):
    chosen = rng.sample(SOURCES, rng.randrange(1, len(SOURCES)))
    return "".join(rng.choice(chosen)() for _ in range(rng.randrange(0, longest)))


def cases(tokenizer, texts):
    return [{"text": text, "tokens": encoding.ids}
            for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False))]


def write(name, value):
    with open(os.path.join(here, name), "w", encoding="utf-8") as file:
        rows = ",\n".join(json.dumps(row, ensure_ascii=True, separators=(",", ":")) for row in value)
        file.write("[\n" + rows + "\n]\n")


def patched(base, patch):
    root = copy.deepcopy(base)
    for path, value in patch.items():
        at = root
        *parents, last = path.split(".")
        for key in parents:
            at = at[key]
        at[last] = value
    return root


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def added(tokens):
    """Rows of added_tokens; what the vocabulary has keeps its id."""
    rows, vocabulary = [], base["model"]["vocab"]
    following = max(vocabulary.values()) + 1
    for content, normalized, special in tokens:
        number = vocabulary.get(content, following)
        following += number == following
        rows.append(dict(base["added_tokens"][0], id=number, content=content, normalized=normalized, special=special))
    return rows


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
base = json.load(open(os.path.join(demo, "tokenizer.json"), encoding="utf-8"))
VARIANTS = [
    {},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
    {"pre_tokenizer": BYTE_LEVEL},
    # DeepSeek-V2's stages, its list of letters shortened
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("[\r\n]"), split("\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫ]+"),
        split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"), split("\\s+$"), split("[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"),
        BYTE_LEVEL]}},
    # what Oniguruma and PCRE2 read differently, and matches that may be empty
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("\\u0041|\\x42\\v*|\\d{2,}?|[\\d\\s]+|\\D\\S$|(?<=x)y*"), split("\\p{Lu}\\P{Lu}|\\p{^L}{2}"), split("e*"), BYTE_LEVEL]}},
    {"model.ignore_merges": True, "pre_tokenizer": BYTE_LEVEL},
    {"added_tokens": base["added_tokens"] + added([
        ("the", True, False), ("then", True, False), ("<｜User｜>hi", False, True), ("e", False, False), ("ø", True, False),
        ("  ", True, False), ("then again", True, False)])},
]
variants = []
for number, patch in enumerate(VARIANTS):
    tokenizer = Tokenizer.from_str(json.dumps(patched(base, patch)))
    texts = WRITTEN + [random_text(40) for _ in range(60)] if number == 0 else \
        rng.sample(WRITTEN, 14) + ["AB\u000b\u000bBx yy xy 12 3\n\n e ee", "the then then again ø  <｜User｜>hi"] + [random_text(25) for _ in range(14)]
    variants.append({"patch": patch, "cases": cases(tokenizer, texts)})
write("tokenizer-demo.json", variants)

if len(sys.argv) > 2:
    tokenizer = Tokenizer.from_file(os.path.join(sys.argv[2], "tokenizer.json"))
    write("tokenizer-128k.json", cases(tokenizer, WRITTEN + [random_text(60) for _ in range(90)]))

# Streaming decode: token sequences whose bytes are cut anywhere, often invalid, and what Python makes of them.
tokenizer = Tokenizer.from_file(os.path.join(demo, "tokenizer.json"))
letters = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or 174 <= b < 256]
alphabet = {chr(b): b for b in letters}
alphabet |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in letters)}
token_bytes = {}
for text, number in tokenizer.get_vocab().items():
    token_bytes[number] = bytes(alphabet[c] for c in text) if all(c in alphabet for c in text) else text.encode()
single = {value[0]: number for number, value in token_bytes.items() if len(value) == 1}
decodes = []
for _ in range(250):
    ids = []
    while len(ids) < rng.randrange(1, 14):
        kind = rng.randrange(4)
        if kind == 0:
            ids.append(rng.randrange(5, 4096))
        elif kind == 1:
            ids.append(single[rng.randrange(0x80, 0x100)])
        elif kind == 2:
            ids += [single[b] for b in rng.choice("é漢😀\u07ff\u0800\ud7ff\ue000\U0010ffff").encode()[:rng.randrange(1, 5)]]
        else:
            ids += [single[b] for b in rng.choice([b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xf0\x80\x80", b"\xc0\xaf", b"\xff"])]
    decodes.append({"tokens": ids, "text": b"".join(token_bytes[i] for i in ids).decode("utf-8", errors="replace")})
write("detokenizer-demo.json", decodes)

# Chat: each published template (chat/*.jinja, without what makes calls of tools) over the same kinds of conversations.
config = json.load(open(os.path.join(demo, "tokenizer_config.json"), encoding="utf-8"))
templates = {"demo": config["chat_template"]}
for path in sorted(glob.glob(os.path.join(here, "chat", "*.jinja"))):
    templates[os.path.basename(path)[:-len(".jinja")]] = open(path, encoding="utf-8").read()
WORDS = ["Hello", "what is", "X?", "\n", "\n\n", " ", "  ", "日本", "é", "123", "<think>", "</think>", "a</think>b</think>c", "I", "don't", ":",
         "User:", "!", "<", "x=1", "```py\ncode\n```", "😀"]


def content():
    return "".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(rng.randrange(0, 7)))


def conversation():
    count = rng.randrange(1, 6)
    if rng.random() < 0.5:
        return [{"role": "system", "content": content()}] * rng.randrange(0, 2) + \
               [{"role": ["user", "assistant"][i % 2], "content": content()} for i in range(count)]
    return [{"role": rng.choice(["system", "user", "assistant"]), "content": content()} for _ in range(count)]


environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
chats = []
for name, template in templates.items():
    for _ in range(30):
        messages, generate, thinking = conversation(), rng.random() < 0.7, rng.random() < 0.5
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=generate, thinking=thinking,
            bos_token=config["bos_token"]["content"], eos_token=config["eos_token"]["content"])
        chats.append({"template": name, "messages": messages, "add_generation_prompt": generate, "thinking": thinking,
                      "tokens": tokenizer.encode(text, add_special_tokens=False).ids})
write("chat-demo.json", chats)
