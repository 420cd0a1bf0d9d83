/* A byte-level BPE tokenizer of any size for models whose weights mean nothing: special tokens, the
 * 256 bytes, then pairs of letters, then pairs of pairs, each with its merge. Text splits as with
 * DeepSeek-V3's rules; every id below the vocabulary has a text of its own. */
#include "model/synth_parts.h"

#include "actors/limits.h"

#define LETTERS 52

#define BOS       "<｜begin▁of▁sentence｜>"
#define EOS       "<｜end▁of▁sentence｜>"
#define PAD       "<｜▁pad▁｜>"
#define USER      "<｜User｜>"
#define ASSISTANT "<｜Assistant｜>"
#define BOS_PIECE "{\"SpecialToken\":{\"id\":\"" BOS "\",\"type_id\":0}}"

static const char *const SPECIALS[] = {BOS, EOS, PAD, USER, ASSISTANT};
#define SPECIAL_COUNT (sizeof SPECIALS / sizeof *SPECIALS)
_Static_assert(SPECIAL_COUNT + 256 == SYNTH_VOCABULARY_MIN, "special tokens and bytes");

static const char MIDDLE[] =
    "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[]},\"pre_tokenizer\":{\"type\":"
    "\"Sequence\","
    "\"pretokenizers\":["
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{N}{1,3}\"},\"behavior\":\"Isolated\","
    "\"invert\":false},"
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[一-龥぀-ゟ゠-ヿ]+\"},\"behavior\":\"Isolated\","
    "\"invert\":false},"
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[!\\\"#$%&'()*+,\\\\-./"
    ":;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+|"
    "[^\\\\r\\\\n\\\\p{L}\\\\p{P}\\\\p{S}]?[\\\\p{L}\\\\p{M}]+| "
    "?[\\\\p{P}\\\\p{S}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|"
    "\\\\s+(?!\\\\S)|\\\\s+\"},\"behavior\":\"Isolated\",\"invert\":false},"
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}]"
    "},"
    "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[" BOS_PIECE
    ",{\"Sequence\":{\"id\":\"A\","
    "\"type_id\":0}}],\"pair\":[" BOS_PIECE
    ",{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}," BOS_PIECE
    ",{\"Sequence\":{\"id\":\"B\",\"type_id\":0}}],\"special_tokens\":{\"" BOS "\":{\"id\":\"" BOS
    "\",\"ids\":[0],\"tokens\":[\"" BOS "\"]}}},"
    "\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,\"use_"
    "regex\":true},"
    "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":"
    "null,"
    "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,\"ignore_merges\":"
    "false,";

/* The demo model's chat format. */
static const char CHAT_TEMPLATE[] =
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif "
    "%}"
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] }}{% elif message['role'] == 'user' %}"
    "{{ '" USER "' + message['content'] }}{% elif message['role'] == 'assistant' %}{{ '" ASSISTANT
    "' + message['content'] + '" EOS "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" ASSISTANT "' }}{% endif %}";

static char letter(uint32_t index) {
    return (char)(index < 26 ? 'a' + index : 'A' + index - 26);
}

/* The characters of byte-level BPE: printable bytes stand for themselves, the others for U+0100 and
 * up, in order. */
static void put_byte_tokens(struct synth_output *out) {
    uint32_t other = 0x100;
    for (uint32_t byte = 0; byte < 256; byte++) {
        bool printable =
            (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
        uint32_t code = printable ? byte : other++;
        char text[3] = {(char)code, '\0', '\0'};
        if (code >= 0x80) {
            text[0] = (char)(0xc0 | code >> 6);
            text[1] = (char)(0x80 | (code & 0x3f));
        }
        bool escape = byte == '"' || byte == '\\';
        synth_print(out, ",\"%s%s\":%u", escape ? "\\" : "", text, (uint32_t)SPECIAL_COUNT + byte);
    }
}

/* Merge number `index` joins two letters, or after all those two pairs. */
static void merge_parts(uint32_t index, char ret_left[3], char ret_right[3]) {
    const uint32_t pairs = LETTERS * LETTERS;
    if (index < pairs) {
        ret_left[0] = letter(index / LETTERS), ret_left[1] = '\0';
        ret_right[0] = letter(index % LETTERS), ret_right[1] = '\0';
        return;
    }
    uint32_t left = (index - pairs) / pairs, right = (index - pairs) % pairs;
    ASSERT(left < pairs); /* more than VOCABULARY_MAX of them */
    ret_left[0] = letter(left / LETTERS), ret_left[1] = letter(left % LETTERS), ret_left[2] = '\0';
    ret_right[0] = letter(right / LETTERS), ret_right[1] = letter(right % LETTERS);
    ret_right[2] = '\0';
}

static void put_tokenizer(struct synth_output *out, uint32_t vocabulary) {
    synth_begin(out, "tokenizer.json");
    synth_print(out,
                "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[");
    for (uint32_t i = 0; i < SPECIAL_COUNT; i++)
        synth_print(out,
                    "%s{\"id\":%u,\"content\":\"%s\",\"single_word\":false,\"lstrip\":false,"
                    "\"rstrip\":false,\"normalized\":false,\"special\":true}",
                    i > 0 ? "," : "", i, SPECIALS[i]);
    synth_print(out, "],");
    synth_put(out, MIDDLE, sizeof MIDDLE - 1);
    synth_print(out, "\"vocab\":{");
    for (uint32_t i = 0; i < SPECIAL_COUNT; i++)
        synth_print(out, "%s\"%s\":%u", i > 0 ? "," : "", SPECIALS[i], i);
    put_byte_tokens(out);
    uint32_t merges = vocabulary - SYNTH_VOCABULARY_MIN;
    char left[3], right[3];
    for (uint32_t i = 0; i < merges; i++) {
        merge_parts(i, left, right);
        synth_print(out, ",\"%s%s\":%u", left, right, SYNTH_VOCABULARY_MIN + i);
    }
    synth_print(out, "},\"merges\":[");
    for (uint32_t i = 0; i < merges; i++) {
        merge_parts(i, left, right);
        synth_print(out, "%s[\"%s\",\"%s\"]", i > 0 ? "," : "", left, right);
    }
    synth_print(out, "]}}\n");
}

void synth_tokenizer(struct synth_output *out, uint32_t vocabulary, uint32_t context_tokens) {
    ASSERT(vocabulary >= SYNTH_VOCABULARY_MIN && vocabulary <= VOCABULARY_MAX);
    put_tokenizer(out, vocabulary);
    synth_begin(out, "tokenizer_config.json");
    synth_print(
        out,
        "{\"add_bos_token\":true,\"add_eos_token\":false,\"bos_token\":\"%s\","
        "\"eos_token\":\"%s\",\"pad_token\":\"%s\",\"model_max_length\":%u,"
        "\"clean_up_tokenization_spaces\":false,\"tokenizer_class\":\"PreTrainedTokenizerFast\","
        "\"chat_template\":\"",
        SPECIALS[SYNTH_BOS], SPECIALS[SYNTH_EOS], SPECIALS[SYNTH_PAD], context_tokens);
    synth_put(out, CHAT_TEMPLATE, sizeof CHAT_TEMPLATE - 1); /* holds nothing that JSON escapes */
    synth_print(out, "\"}\n");
}
