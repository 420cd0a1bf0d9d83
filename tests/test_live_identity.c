/* The promise, on real processes: the same tokens and the same log-probabilities, to the last digit, whatever the number of processes,
 * the company in the batch, what the prefix cache knew, what was guessed, chunking, threads, instruction set and transport. Prints the matrix. */
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/ops.h" /* before cmocka, which takes the name fail for a macro */

#include <cmocka.h>

#include "tests/support/cluster.h"
#include "tests/support/http.h"

#define MODEL "models/demo"

struct question {
    const char *path, *body;
};

#define LONG_PROMPT \
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon " \
    "the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: and there " \
    "was light. And God saw the light, that it was good: and God divided the light from the darkness. And God called the light " \
    "Day, and the darkness he called Night. And the evening and the morning were the first day. And God said, Let there be a " \
    "firmament in the midst of the waters, and let it divide the waters from the waters. And God made the firmament, and divided " \
    "the waters which were under the firmament from the waters which were above the firmament: and it was so."

static const struct question questions[] = {
    {"/v1/completions", "{\"prompt\":\"And the king said unto\",\"max_tokens\":24,\"temperature\":0,\"logprobs\":5}"},
    {"/v1/completions", "{\"prompt\":\"def main(args):\\n\",\"max_tokens\":24,\"temperature\":0.8,\"top_p\":0.95,\"top_k\":50,"
                        "\"seed\":1234,\"logprobs\":3}"},
    {"/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"What is a river?\"}],\"max_tokens\":24,\"seed\":7,"
                             "\"temperature\":0.7,\"repetition_penalty\":1.1,\"presence_penalty\":0.2,\"frequency_penalty\":0.1,"
                             "\"logprobs\":true,\"top_logprobs\":2}"},
    {"/v1/completions", "{\"prompt\":\"" LONG_PROMPT "\",\"max_tokens\":16,\"temperature\":0,\"logprobs\":1}"},
    {"/v1/completions", "{\"prompt\":[17,300,4,1201,99,2048,77,1500],\"max_tokens\":1,\"echo\":true,\"temperature\":0,\"logprobs\":2}"},
    {"/v1/completions", "{\"prompt\":\"The moon\",\"max_tokens\":12,\"n\":2,\"seed\":99,\"min_p\":0.02,\"logprobs\":0}"},
};
#define QUESTIONS (sizeof questions / sizeof questions[0])
#define COMPANY 10 /* further requests that run beside, 16 in all */

struct setting {
    const char *name, *arguments;
    enum isa isa; /* needed on this machine */
    bool together; /* all questions and the company at once; else one after the other */
};

static const struct setting settings[] = {
    {"1 expert process", "--experts 1 --mtp-steps 0", ISA_SCALAR, false},
    {"2 expert processes", "--experts 2", ISA_SCALAR, false},
    {"4 expert processes", "--experts 4", ISA_SCALAR, false},
    {"8 expert processes", "--experts 8", ISA_SCALAR, false},
    {"among 16 requests", "--experts 4", ISA_SCALAR, true},
    {"2 attention actors, among 16", "--experts 2 --attention 2", ISA_SCALAR, true},
    {"2 samplers, among 16", "--experts 2 --samplers 2", ISA_SCALAR, true},
    {"prefill chunk 1", "--experts 2 --prefill-chunk 1", ISA_SCALAR, false},
    {"prefill chunk 7, among 16", "--experts 2 --prefill-chunk 7", ISA_SCALAR, true},
    {"prefill chunk 64", "--experts 2 --prefill-chunk 64", ISA_SCALAR, false},
    {"prefill whole", "--experts 2 --prefill-chunk 2048 --batch-tokens 2048", ISA_SCALAR, false},
    {"1 thread, among 16", "--experts 2 --threads 1", ISA_SCALAR, true},
    {"2 threads, among 16", "--experts 2 --threads 2", ISA_SCALAR, true},
    {"scalar", "--experts 2 --isa scalar", ISA_SCALAR, true},
    {"avx512", "--experts 2 --isa avx512", ISA_AVX512, true},
    {"amx", "--experts 2 --isa amx", ISA_AMX, true},
    {"transport zmq", "--experts 4 --transport zmq", ISA_SCALAR, true},
    {"in one process", "--in-process --experts 4", ISA_SCALAR, false},
    {"in one process, among 16", "--in-process --experts 3 --attention 2", ISA_SCALAR, true},
    {"small frames", "--experts 3 --frame-rows 3", ISA_SCALAR, true},
    {"prefix cache off, among 16", "--experts 2 --prefix-cache 0", ISA_SCALAR, true},
    {"guessed tokens, 1 step", "--experts 2 --mtp-steps 1 --mtp-acceptance 0", ISA_SCALAR, false},
    {"guessed tokens, 4 steps, among 16", "--experts 2 --mtp-steps 4 --mtp-acceptance 0 --mtp-sequences 64", ISA_SCALAR, true},
    {"guessed tokens, scalar", "--experts 2 --mtp-steps 2 --mtp-acceptance 0 --isa scalar", ISA_SCALAR, false},
    {"prompts within 1 ms a step, among 16", "--experts 2 --step-budget-us 1000", ISA_SCALAR, true},
    {"all at once", "--experts 8 --attention 2 --samplers 2 --prefill-chunk 7 --threads 2 --transport zmq --batch-tokens 24 "
     "--mtp-steps 3 --mtp-sequences 64",
     ISA_SCALAR, true},
};

/* The part of an answer that must not change: choices, as canonical text. */
static char *essence(const struct http_call *call) {
    if (call->status != 200 || call->text == NULL)
        return NULL;
    json_t *answer = json_loads(call->text, 0, NULL);
    char *text = json_dumps(json_object_get(answer, "choices"), JSON_SORT_KEYS | JSON_COMPACT);
    json_decref(answer);
    return text;
}

static void ask(const struct cluster *cluster, const struct setting *setting, char **ret) {
    struct http_call calls[QUESTIONS + COMPANY] = {0};
    uint32_t count = setting->together ? QUESTIONS + COMPANY : QUESTIONS;
    for (uint32_t i = 0; i < count; i++)
        calls[i] = (struct http_call){.method = "POST",
                                      .path = questions[i % QUESTIONS].path,
                                      .body = questions[i % QUESTIONS].body,
                                      .start_after_ms = setting->together ? i * 3 : 0};
    http_run(cluster->port, calls, count, setting->together ? count : 1, 240000);
    for (uint32_t i = 0; i < count; i++) {
        char *text = essence(&calls[i]);
        if (text == NULL)
            fprintf(stderr, "%s: question %u: status %d: %s\n", setting->name, i, calls[i].status,
                    calls[i].text != NULL ? calls[i].text : "no answer");
        if (i < QUESTIONS) {
            ret[i] = text;
        } else {
            assert_non_null(text);
            assert_string_equal(text, ret[i % QUESTIONS]);
            free(text);
        }
        http_call_free(&calls[i]);
    }
}

#define LONG_QUESTION 3
#define LONG_CACHED   128 /* tokens of whole pages of its prompt */

static json_int_t detail(const json_t *answer, const char *group, const char *name) {
    const json_t *usage = json_object_get(answer, "usage");
    return json_integer_value(json_object_get(json_object_get(usage, group), name));
}

/* A question again: with the same answer. Caller owns the whole of it. */
static json_t *ask_again(const struct cluster *cluster, uint32_t which, char **expected) {
    struct http_call call = {
        .method = "POST", .path = questions[which].path, .body = questions[which].body};
    http_run(cluster->port, &call, 1, 1, 240000);
    char *text = essence(&call);
    assert_non_null(text);
    assert_non_null(expected[which]);
    assert_string_equal(text, expected[which]);
    json_t *whole = json_loads(call.text, 0, NULL);
    free(text);
    http_call_free(&call);
    return whole;
}

/* The prefix cache was used and tokens were guessed where that is on: equality without them would say little. */
static void check_use(const struct cluster *cluster, const struct setting *setting, char **expected) {
    json_t *answer = ask_again(cluster, LONG_QUESTION, expected);
    json_int_t cached = detail(answer, "prompt_tokens_details", "cached_tokens");
    json_decref(answer);
    if (strstr(setting->arguments, "--prefix-cache 0") != NULL ? cached != 0 : cached != LONG_CACHED)
        fail_msg("%s: cached_tokens %lld", setting->name, (long long)cached);
    answer = ask_again(cluster, 0, expected);
    json_int_t accepted = detail(answer, "completion_tokens_details", "accepted_prediction_tokens");
    json_decref(answer);
    bool off = strstr(setting->arguments, "--mtp-steps 0") != NULL;
    bool always = strstr(setting->arguments, "--mtp-acceptance 0") != NULL;
    if ((off && accepted != 0) || (always && accepted == 0))
        fail_msg("%s: accepted_prediction_tokens %lld", setting->name, (long long)accepted);
}

static uint32_t compare(const struct setting *setting, char **expected, char **found) {
    uint32_t equal = 0;
    for (uint32_t q = 0; q < QUESTIONS; q++) {
        bool same = expected[q] != NULL && found[q] != NULL && strcmp(expected[q], found[q]) == 0;
        equal += same;
        if (!same)
            fprintf(stderr, "%s: question %u differs\n  expected %s\n  found    %s\n", setting->name, q,
                    expected[q] != NULL ? expected[q] : "-", found[q] != NULL ? found[q] : "-");
    }
    return equal;
}

static void test_identity(void **state) {
    (void)state;
    char *expected[QUESTIONS] = {0};
    uint32_t wrong = 0;
    for (size_t s = 0; s < sizeof settings / sizeof settings[0]; s++) {
        if (!isa_available(settings[s].isa)) {
            printf("identity: %-30s not on this machine\n", settings[s].name);
            continue;
        }
        struct cluster cluster;
        char *found[QUESTIONS] = {0};
        assert_true(cluster_start(&cluster, MODEL, settings[s].arguments));
        ask(&cluster, &settings[s], found);
        check_use(&cluster, &settings[s], found);
        assert_true(cluster_stop(&cluster));
        if (s == 0) {
            memcpy(expected, found, sizeof expected);
            printf("identity: %-30s reference\n", settings[s].name);
            continue;
        }
        uint32_t equal = compare(&settings[s], expected, found);
        printf("identity: %-30s %u of %zu equal\n", settings[s].name, equal, QUESTIONS);
        wrong += equal != QUESTIONS;
        for (uint32_t q = 0; q < QUESTIONS; q++)
            free(found[q]);
    }
    for (uint32_t q = 0; q < QUESTIONS; q++)
        free(expected[q]);
    assert_int_equal(wrong, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_identity)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
