/* HTTP answers of a whole cluster on virtual time, with the demo model and real kernels: whatever
 * the network does to control messages and whichever attention actor dies, every answer is that of
 * the quiet run, and nothing is left behind. Every run is named by its seed. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulator/random.h"
#include "simulator/world.h"
#include "tests/support/model_files.h"
#include "tests/support/tokenizer_files.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define MODEL     "models/demo"
#define MS        UINT64_C(1000000)
#define STEPS_MAX 2000000

static const struct {
    const char *path, *body;
} REQUESTS[] = {
    {"/v1/completions",
     "{\"prompt\":\"In the beginning God created\",\"max_tokens\":14,\"seed\":3,\"n\":2,"
     "\"temperature\":1,\"logprobs\":2,\"echo\":true}"},
    {"/v1/completions",
     "{\"prompt\":[[5,6,7],[400,500]],\"max_tokens\":9,\"temperature\":0,\"stream\":true,"
     "\"ignore_eos\":true}"},
    {"/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"What is a river?\"}],"
                             "\"max_tokens\":12,\"seed\":8,\"logprobs\":true,\"top_logprobs\":1}"},
    {"/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"What is a hill?\"}],"
                             "\"max_tokens\":12,\"seed\":9,\"stream\":true}"},
};
#define CLIENTS (sizeof REQUESTS / sizeof REQUESTS[0])

struct heard {
    char *text[CLIENTS + 1]; /* by client, counted from 1 */
    size_t size[CLIENTS + 1];
    bool last[CLIENTS + 1];
};

static struct model_files files;
static struct model *model;
static const struct kernels *kernels;
static struct tokenizer *tokenizer;
static char *quiet[CLIENTS + 1];

static void on_stream(void *context, const struct effect *effect) {
    struct heard *heard = context;
    uint64_t client = effect->stream.client;
    assert_true(client >= 1 && client <= CLIENTS && !heard->last[client]);
    if (heard->size[client] == 0)
        assert_int_equal(effect->stream.status, 200);
    heard->text[client] =
        realloc(heard->text[client], heard->size[client] + effect->stream.size + 1);
    memcpy(heard->text[client] + heard->size[client], effect->stream.bytes, effect->stream.size);
    heard->size[client] += effect->stream.size;
    heard->text[client][heard->size[client]] = '\0';
    heard->last[client] = effect->stream.last;
}

static struct world_options calm(uint64_t seed, struct heard *heard) {
    struct world_options options = {.seed = seed,
                                    .model = model,
                                    .kernels = kernels,
                                    .parallel = PARALLEL_SERIAL,
                                    .attention = 2,
                                    .experts = 2,
                                    .samplers = 1,
                                    .gateway = {.served_model = "demo",
                                                .version = "0",
                                                .tokenizer = tokenizer,
                                                .chat = CHAT_DEMO},
                                    .delay_min_ns = 100000,
                                    .delay_max_ns = 100000,
                                    .frame_delay_min_ns = 20000,
                                    .frame_delay_max_ns = 20000,
                                    .compute_ns = 500000,
                                    .stream = on_stream,
                                    .context = heard};
    settings_default(&options.settings);
    options.settings.kv_cache_tokens = 4096;
    options.settings.join_wait_ms = 500;
    options.settings.poll_ms = 100;
    options.settings.heartbeat_ms = 50;
    options.settings.heartbeat_misses = 6;
    return options;
}

/* What an answer says, without what names the run: texts and scores of each choice, in order. */
static char *said(const char *text) {
    json_t *all = json_array(), *choice;
    for (const char *at = text; at != NULL && *at != '\0';) {
        if (strncmp(at, "data: ", 6) == 0)
            at += 6;
        const char *end = strstr(at, "\n\n");
        size_t size = end == NULL ? strlen(at) : (size_t)(end - at);
        json_t *event = json_loadb(at, size, 0, NULL);
        size_t i;
        json_array_foreach(json_object_get(event, "choices"), i, choice) {
            size_t index = (size_t)json_integer_value(json_object_get(choice, "index"));
            while (json_array_size(all) <= index)
                json_array_append_new(all, json_string(""));
            const json_t *delta = json_object_get(choice, "delta");
            const json_t *piece = json_object_get(choice, "text");
            char *scores = json_dumps(json_object_get(choice, "logprobs"), JSON_ENCODE_ANY);
            if (piece == NULL)
                piece = json_object_get(delta != NULL ? delta : json_object_get(choice, "message"),
                                        "content");
            json_array_set_new(all, index,
                               json_sprintf("%s%s%s", json_string_value(json_array_get(all, index)),
                                            piece == NULL ? "" : json_string_value(piece),
                                            end == NULL ? scores : ""));
            free(scores);
        }
        json_decref(event);
        at = end == NULL ? NULL : end + 2;
    }
    char *ret = json_dumps(all, 0);
    json_decref(all);
    return ret;
}

static bool settled(struct world *world) {
    for (uint32_t i = 0; i < 2; i++) {
        struct actor *attention = world_actor(world, ROLE_ATTENTION, i);
        if (attention != NULL &&
            strncmp(attention->class->describe(attention), "sequences=0 ", 12) != 0)
            return false;
    }
    struct actor *gateway = world_actor(world, ROLE_GATEWAY, 0);
    return strncmp(gateway->class->describe(gateway), "requests=0 sequences=0 closing=0", 32) == 0;
}

/* Asks everything at 1 s, kills and restarts attention actor 0 if told to, and runs until all is
 * answered and forgotten. */
static void run(const struct world_options *options, uint64_t kill_ns, uint64_t restart_ns) {
    struct world *world;
    struct failure failure;
    struct heard *heard = options->context;
    assert_int_equal(world_open(&world, options, &failure), 0);
    bool asked = false, done = false;
    for (uint32_t step = 0; step < STEPS_MAX && !done; step++) {
        uint64_t now_ns = world_now_ns(world);
        if (!asked && now_ns >= 1000 * MS) {
            asked = true;
            for (uint64_t c = 0; c < CLIENTS; c++)
                world_http(world, &(struct http_request){.client = c + 1,
                                                         .method = "POST",
                                                         .path = REQUESTS[c].path,
                                                         .query = "",
                                                         .body = REQUESTS[c].body,
                                                         .body_bytes = strlen(REQUESTS[c].body)});
        }
        if (kill_ns != 0 && now_ns >= kill_ns) {
            world_kill(world, ROLE_ATTENTION, 0);
            kill_ns = 0;
        }
        if (kill_ns == 0 && restart_ns != 0 && now_ns >= restart_ns) {
            world_restart(world, ROLE_ATTENTION, 0);
            restart_ns = 0;
        }
        bool answered = asked && kill_ns == 0 && restart_ns == 0;
        for (size_t c = 1; c <= CLIENTS; c++)
            answered = answered && heard->last[c];
        done = answered && settled(world);
        if (!world_step(world) || now_ns > 60000 * MS)
            break;
    }
    if (!done)
        fail_msg("seed %llu: not finished after %.1f s; %s", (unsigned long long)options->seed,
                 (double)world_now_ns(world) / 1e9,
                 world_actor(world, ROLE_GATEWAY, 0)
                     ->class->describe(world_actor(world, ROLE_GATEWAY, 0)));
    world_close(&world);
}

static void expect_quiet_answers(const struct world_options *options, uint64_t kill_ns,
                                 uint64_t restart_ns) {
    struct heard *heard = options->context;
    run(options, kill_ns, restart_ns);
    for (size_t c = 1; c <= CLIENTS; c++) {
        char *text = said(heard->text[c]);
        if (strcmp(text, quiet[c]) != 0)
            fail_msg("seed %llu, request %zu: %s\ninstead of %s", (unsigned long long)options->seed,
                     c, text, quiet[c]);
        free(text);
        free(heard->text[c]);
    }
}

static void test_quiet(void **state) {
    (void)state;
    struct heard heard = {0};
    struct world_options options = calm(1, &heard);
    run(&options, 0, 0);
    for (size_t c = 1; c <= CLIENTS; c++) {
        quiet[c] = said(heard.text[c]);
        assert_true(strlen(quiet[c]) > 20);
        free(heard.text[c]);
    }
}

static void test_lossy_network(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        struct heard heard = {0};
        struct world_options options = calm(seed, &heard);
        options.delay_min_ns = 0;
        options.delay_max_ns = 30 * MS;
        options.loss = 0.2;
        options.duplicate = 0.1;
        options.settings.heartbeat_misses = 40;
        expect_quiet_answers(&options, 0, 0);
    }
}

static void test_attention_dies(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        struct heard heard = {0};
        struct random random = {seed};
        struct world_options options = calm(seed, &heard);
        options.attention = 1 + (uint32_t)seed % 2;
        uint64_t kill_ns = 1000 * MS + random_between(&random, 1 * MS, 60 * MS);
        expect_quiet_answers(&options, kill_ns,
                             kill_ns + random_between(&random, 1 * MS, 200 * MS));
    }
}

static int open_model(void **state) {
    (void)state;
    struct failure failure = {0};
    if (!model_files_read(&files, MODEL) ||
        model_open(&model, files.file, files.count, &failure) < 0) {
        fprintf(stderr, "%s: %s\n", MODEL, failure.text);
        return -1;
    }
    tokenizer = open_tokenizer_files(MODEL "/tokenizer.json", MODEL "/tokenizer_config.json");
    numerics_enter();
    kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    return kernels != NULL ? 0 : -1;
}

static int close_model(void **state) {
    (void)state;
    for (size_t c = 0; c <= CLIENTS; c++)
        free(quiet[c]);
    tokenizer_close(&tokenizer);
    model_close(&model);
    model_files_free(&files);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quiet),
        cmocka_unit_test(test_lossy_network),
        cmocka_unit_test(test_attention_dies),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
