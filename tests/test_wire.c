/* Control messages: each kind there and back, every check with a message that breaks it, and bytes
 * that nobody sent. */
#include "actors/limits.h"
#include "proto/wire.h"
#include "tests/support/random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define PACKED_MAX 65536

struct packed {
    uint8_t bytes[PACKED_MAX];
    size_t size;
};

/* ---- one valid message of each kind ---- */

static uint32_t LAYERS[] = {0, 1, 255}, EXPERTS[] = {3, 0, 1023}, HOLDERS[] = {4, 4, 5};
static uint64_t ROWS[] = {10, UINT64_MAX, 0};
static uint64_t VERSIONS[] = {UINT64_MAX, 7};
static uint32_t USERS[] = {0, UINT32_MAX};
static float DELTAS[] = {-BIAS_DELTA_MAX, 0, BIAS_DELTA_MAX};
static uint32_t TOKENS[] = {0, 5, 4095}, STOPS[] = {1};
static uint32_t BIAS_TOKENS[] = {9, 8};
static float BIAS_VALUES[] = {-100, -INFINITY}, LOGITS[] = {1, -2, 3};

/* Everything a test message points to, so that it can be changed field by field. */
struct sample {
    Troupe__Envelope envelope;
    Troupe__Hello hello;
    Troupe__Welcome welcome;
    Troupe__Refused refused;
    Troupe__Heartbeat heartbeat;
    Troupe__Assign assign;
    Troupe__Ready ready;
    Troupe__Commit commit;
    Troupe__Release release;
    Troupe__Submit submit;
    Troupe__TokensBatch batch;
    Troupe__Poll poll;
    Troupe__Cancel cancel;
    Troupe__Rejected rejected;
    Troupe__Stats stats;
    Troupe__StatusRequest status_request;
    Troupe__Status status;
    Troupe__Shutdown shutdown;
    Troupe__PeerExited peer_exited;
    Troupe__Bias bias;
    Troupe__Bias *bias_list[1];
    Troupe__BiasRelease bias_release;
    Troupe__Sampling sampling;
    Troupe__Member member[2];
    Troupe__Member *members[2];
    Troupe__ActorStats actor_stats;
    Troupe__ActorStats *actors[1];
    Troupe__Tokens tokens;
    Troupe__Tokens *tokens_list[1];
    Troupe__Token token;
    Troupe__Token *token_list[1];
    Troupe__TopLogprob top;
    Troupe__TopLogprob *top_list[1];
};

#define LOADS(it)                                                                                  \
    (it).load_layer = LAYERS, (it).load_expert = EXPERTS, (it).load_rows = ROWS,                   \
    (it).n_load_layer = (it).n_load_expert = (it).n_load_rows = 3

static void fill_sample(struct sample *s) {
    memset(s, 0, sizeof *s);
    troupe__envelope__init(&s->envelope);
    s->envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    s->envelope.from = 4;
    s->envelope.from_incarnation = 0xfedcba9876543210;
    troupe__hello__init(&s->hello);
    s->hello.role = TROUPE__ROLE__ROLE_EXPERT;
    s->hello.control_address = "ipc:///run/user/0/troupe/expert-2";
    s->hello.data_address = "shm:7";
    s->hello.host = "h\xc3\xb4te-1";
    s->hello.model_fingerprint = "0123456789abcdef";
    s->hello.numerics = "bf16";
    s->hello.name = "expert-2";
    troupe__bias__init(&s->bias);
    s->bias.version = 7, s->bias.delta = DELTAS, s->bias.n_delta = 3;
    s->bias_list[0] = &s->bias;
    s->hello.bias = s->bias_list, s->hello.n_bias = 1;
    troupe__bias_release__init(&s->bias_release);
    s->bias_release.version = 7;
    troupe__welcome__init(&s->welcome);
    s->welcome.id = 4;
    troupe__refused__init(&s->refused);
    s->refused.reason = "another model:\n0123 is not 4567";
    troupe__heartbeat__init(&s->heartbeat);
    s->heartbeat.state = TROUPE__ACTOR_STATE__STATE_READY;
    LOADS(s->heartbeat);
    s->heartbeat.bias_version = VERSIONS, s->heartbeat.bias_users = USERS;
    s->heartbeat.n_bias_version = s->heartbeat.n_bias_users = 2;
    troupe__assign__init(&s->assign);
    s->assign.layer = LAYERS, s->assign.expert = EXPERTS,
    s->assign.n_layer = s->assign.n_expert = 3;
    troupe__ready__init(&s->ready);
    s->ready.ok = 1;
    troupe__release__init(&s->release);
    s->release.layer = LAYERS, s->release.expert = EXPERTS;
    s->release.n_layer = s->release.n_expert = 3;
    for (int i = 0; i < 2; i++) {
        troupe__member__init(&s->member[i]);
        s->member[i].id = 4 + (uint32_t)i;
        s->member[i].incarnation = 99;
        s->member[i].role = TROUPE__ROLE__ROLE_ATTENTION;
        s->member[i].name = "attention-0";
        s->members[i] = &s->member[i];
    }
    troupe__commit__init(&s->commit);
    s->commit.member = s->members, s->commit.n_member = 2;
    s->commit.layer = LAYERS, s->commit.expert = EXPERTS, s->commit.holder = HOLDERS;
    s->commit.n_layer = s->commit.n_expert = s->commit.n_holder = 3;
    troupe__sampling__init(&s->sampling);
    s->sampling.temperature = 0.7f;
    s->sampling.top_k = -1;
    s->sampling.bias_token = BIAS_TOKENS, s->sampling.bias_value = BIAS_VALUES;
    s->sampling.n_bias_token = s->sampling.n_bias_value = 2;
    s->sampling.top_logprobs = TOP_LOGPROBS_MAX;
    troupe__submit__init(&s->submit);
    s->submit.sequence = 77;
    s->submit.token = TOKENS, s->submit.n_token = 3;
    s->submit.prompt_tokens = 3;
    s->submit.stop_token = STOPS, s->submit.n_stop_token = 1;
    s->submit.sampling = &s->sampling;
    troupe__top_logprob__init(&s->top);
    s->top.token = 12, s->top.logprob = -0.5f;
    s->top_list[0] = &s->top;
    troupe__token__init(&s->token);
    s->token.id = 4095, s->token.logprob = -INFINITY;
    s->token.top = s->top_list, s->token.n_top = 1;
    s->token.logits = LOGITS, s->token.n_logits = 3;
    s->token_list[0] = &s->token;
    troupe__tokens__init(&s->tokens);
    s->tokens.sequence = 77;
    s->tokens.token = s->tokens.prompt = s->token_list;
    s->tokens.n_token = s->tokens.n_prompt = 1;
    s->tokens.finish = TROUPE__FINISH_REASON__FINISH_STOP;
    s->tokens_list[0] = &s->tokens;
    troupe__tokens_batch__init(&s->batch);
    s->batch.tokens = s->tokens_list, s->batch.n_tokens = 1;
    troupe__poll__init(&s->poll);
    troupe__cancel__init(&s->cancel);
    troupe__rejected__init(&s->rejected);
    s->rejected.code = -3, s->rejected.reason = "too long";
    troupe__actor_stats__init(&s->actor_stats);
    s->actor_stats.member = &s->member[0];
    s->actor_stats.heartbeat = &s->heartbeat;
    s->actors[0] = &s->actor_stats;
    troupe__stats__init(&s->stats);
    s->stats.actor = s->actors, s->stats.n_actor = 1;
    LOADS(s->stats);
    troupe__status_request__init(&s->status_request);
    s->status_request.reply_address = "ipc:///run/troupe/ctl";
    troupe__status__init(&s->status);
    s->status.commit = &s->commit;
    s->status.actor = s->actors, s->status.n_actor = 1;
    troupe__shutdown__init(&s->shutdown);
    troupe__peer_exited__init(&s->peer_exited);
}

#define BODIES(X)                                                                                  \
    X(HELLO, hello)                                                                                \
    X(WELCOME, welcome) X(REFUSED, refused) X(HEARTBEAT, heartbeat) X(ASSIGN, assign)              \
        X(READY, ready) X(COMMIT, commit) X(RELEASE, release) X(SUBMIT, submit) X(TOKENS, tokens)  \
            X(POLL, poll) X(CANCEL, cancel) X(REJECTED, rejected) X(STATS, stats)                  \
                X(STATUS_REQUEST, status_request) X(STATUS, status) X(SHUTDOWN, shutdown)          \
                    X(PEER_EXITED, peer_exited) X(BIAS, bias) X(BIAS_RELEASE, bias_release)

static const Troupe__Envelope__BodyCase KINDS[] = {
#define X(NAME, field) TROUPE__ENVELOPE__BODY_##NAME,
    BODIES(X)
#undef X
};
#define KIND_COUNT (sizeof KINDS / sizeof *KINDS)

static void choose(struct sample *s, Troupe__Envelope__BodyCase kind) {
    s->envelope.body_case = kind;
    switch (kind) {
    case TROUPE__ENVELOPE__BODY_TOKENS:
        s->envelope.tokens = &s->batch;
        return;
#define SET(NAME, field)                                                                           \
    case TROUPE__ENVELOPE__BODY_##NAME:                                                            \
        s->envelope.field = &s->field;                                                             \
        return;
        SET(HELLO, hello)
        SET(WELCOME, welcome) SET(REFUSED, refused) SET(HEARTBEAT, heartbeat) SET(ASSIGN, assign)
            SET(READY, ready) SET(COMMIT, commit) SET(RELEASE, release) SET(SUBMIT, submit)
                SET(POLL, poll) SET(CANCEL, cancel) SET(REJECTED, rejected) SET(STATS, stats)
                    SET(STATUS_REQUEST, status_request) SET(STATUS, status) SET(SHUTDOWN, shutdown)
                        SET(PEER_EXITED, peer_exited) SET(BIAS, bias)
                            SET(BIAS_RELEASE, bias_release)
#undef SET
                            default : fail_msg("no sample of kind %d", (int)kind);
    }
}

static void pack(const struct sample *s, struct packed *ret) {
    ret->size = wire_packed_bytes(&s->envelope);
    assert_true(ret->size <= PACKED_MAX);
    wire_pack(&s->envelope, ret->bytes);
}

static int unpack(const void *bytes, size_t size, struct failure *failure) {
    Troupe__Envelope *envelope = NULL;
    int code = wire_unpack(&envelope, bytes, size, failure);
    assert_true(code < 0 ? envelope == NULL : envelope != NULL);
    wire_free(&envelope);
    assert_null(envelope);
    return code;
}

static void test_there_and_back(void **state) {
    static const char *const EXPECTED[] = {
#define X(NAME, field) #NAME,
        BODIES(X)
#undef X
    };
    for (size_t k = 0; k < KIND_COUNT; k++) {
        struct sample s;
        struct packed packed, again;
        fill_sample(&s);
        choose(&s, KINDS[k]);
        pack(&s, &packed);
        Troupe__Envelope *envelope = NULL;
        struct failure failure = {0};
        if (wire_unpack(&envelope, packed.bytes, packed.size, &failure) != 0)
            fail_msg("%s: %s", EXPECTED[k], failure.text);
        assert_int_equal(envelope->body_case, KINDS[k]);
        assert_string_equal(wire_name(envelope), EXPECTED[k]);
        assert_int_equal(envelope->from, 4);
        again.size = wire_packed_bytes(envelope);
        assert_int_equal(again.size, packed.size);
        wire_pack(envelope, again.bytes);
        assert_memory_equal(again.bytes, packed.bytes, packed.size);
        wire_free(&envelope);
    }
}

static void test_some_values(void **state) {
    struct sample s;
    struct packed packed;
    fill_sample(&s);
    choose(&s, TROUPE__ENVELOPE__BODY_SUBMIT);
    pack(&s, &packed);
    Troupe__Envelope *envelope;
    assert_int_equal(wire_unpack(&envelope, packed.bytes, packed.size, NULL), 0);
    assert_int_equal(envelope->submit->n_token, 3);
    assert_int_equal(envelope->submit->token[2], 4095);
    assert_true(envelope->submit->sampling->bias_value[1] == -INFINITY);
    assert_int_equal(envelope->submit->sampling->top_k, -1);
    wire_free(&envelope);
}

static void test_versions_and_bodies(void **state) {
    struct sample s;
    struct packed packed;
    struct failure failure = {0};
    fill_sample(&s);
    choose(&s, TROUPE__ENVELOPE__BODY_POLL);
    s.envelope.protocol_version = 2;
    pack(&s, &packed);
    assert_int_equal(unpack(packed.bytes, packed.size, &failure), ERR_VERSION);
    assert_non_null(strstr(failure.text, "protocol version: expected 1, found 2"));
    /* A body that this version does not know, sent by a newer one: the version is what is named. */
    uint8_t newer[] = {0x08, 0x02, 0xa2, 0x06, 0x01, 0x00}; /* version 2; field 100, one byte */
    assert_int_equal(unpack(newer, sizeof newer, &failure), ERR_VERSION);
    newer[1] = 1;
    assert_int_equal(unpack(newer, sizeof newer, &failure), ERR_CORRUPT);
    assert_non_null(strstr(failure.text, "body"));
    assert_int_equal(unpack("", 0, &failure), ERR_VERSION);
    fill_sample(&s);
    choose(&s, TROUPE__ENVELOPE__BODY_POLL);
    s.envelope.from_incarnation = 0;
    pack(&s, &packed);
    assert_int_equal(unpack(packed.bytes, packed.size, &failure), ERR_CORRUPT);
    assert_non_null(strstr(failure.text, "from_incarnation"));
}

/* ---- one lie each ---- */

static uint32_t BIG_LAYERS[] = {0, LAYERS_MAX, 1}, BIG_EXPERTS[] = {0, EXPERTS_MAX, 1};
static uint32_t BIG_TOKENS[] = {0, VOCABULARY_MAX};
static float NAN_VALUES[] = {1, NAN};
static char LONG_TEXT[FAILURE_TEXT_BYTES + 1];
static char ADDRESS_TEXT[ADDRESS_BYTES_MAX + 1];
static uint32_t MANY[STOP_TOKENS_MAX + LOGIT_BIAS_MAX + 1];
static float MANY_FLOATS[LOGIT_BIAS_MAX + 1];
static Troupe__TopLogprob *MANY_TOPS[TOP_LOGPROBS_MAX + 1];
static Troupe__Member *MANY_MEMBERS[ACTORS_MAX + 1];

static uint64_t MANY_VERSIONS[BIAS_VERSIONS_HELD_MAX + 1];
static float LARGE_DELTAS[] = {0, 0, -1.5f * BIAS_DELTA_MAX};

#define LIE(name, statement)                                                                       \
    static void name(struct sample *s) {                                                           \
        statement;                                                                                 \
    }
LIE(hello_role, s->hello.role = TROUPE__ROLE__ROLE_NONE)
LIE(hello_role_unknown, s->hello.role = 7)
LIE(hello_role_negative, s->hello.role = -1)
LIE(hello_address_long, s->hello.control_address = ADDRESS_TEXT)
LIE(hello_name_newline, s->hello.name = "expert\n2")
LIE(hello_name_delete, s->hello.name = "expert\x7f")
LIE(refused_long, s->refused.reason = LONG_TEXT)
LIE(welcome_id, s->welcome.id = 0)
LIE(heartbeat_state, s->heartbeat.state = 6)
LIE(heartbeat_parallel, s->heartbeat.n_load_rows = 2)
LIE(heartbeat_answers, s->heartbeat.peer_queue = LAYERS; s->heartbeat.n_peer_queue = 2)
LIE(heartbeat_layer, s->heartbeat.load_layer = BIG_LAYERS)
LIE(heartbeat_expert, s->heartbeat.load_expert = BIG_EXPERTS)
LIE(heartbeat_users, s->heartbeat.n_bias_users = 1)
LIE(heartbeat_versions, s->heartbeat.bias_version = MANY_VERSIONS; s->heartbeat.bias_users = MANY;
    s->heartbeat.n_bias_version = s->heartbeat.n_bias_users = BIAS_VERSIONS_HELD_MAX + 1)
LIE(bias_version, s->bias.version = 0)
LIE(bias_large, s->bias.delta = LARGE_DELTAS)
LIE(bias_nan, s->bias.delta = NAN_VALUES; s->bias.n_delta = 2)
LIE(bias_release_version, s->bias_release.version = 0)
LIE(assign_parallel, s->assign.n_expert = 2)
LIE(assign_layer, s->assign.layer = BIG_LAYERS)
LIE(assign_expert, s->assign.expert = BIG_EXPERTS)
LIE(release_parallel, s->release.n_layer = 1)
LIE(release_expert, s->release.expert = BIG_EXPERTS)
LIE(commit_parallel, s->commit.n_holder = 2)
LIE(commit_layer, s->commit.layer = BIG_LAYERS)
LIE(commit_member_id, s->member[1].id = 0)
LIE(commit_member_incarnation, s->member[1].incarnation = 0)
LIE(commit_member_role, s->member[0].role = 9)
LIE(commit_member_state, s->member[0].state = 9)
LIE(commit_member_host, s->member[0].host = ADDRESS_TEXT)
LIE(commit_members, s->commit.member = MANY_MEMBERS; s->commit.n_member = ACTORS_MAX + 1)
LIE(submit_token, s->submit.token = BIG_TOKENS; s->submit.n_token = 2)
LIE(submit_stop, s->submit.stop_token = BIG_TOKENS; s->submit.n_stop_token = 2)
LIE(submit_stops, s->submit.stop_token = MANY; s->submit.n_stop_token = STOP_TOKENS_MAX + 1)
LIE(submit_sampling, s->submit.sampling = NULL)
LIE(sampling_temperature, s->sampling.temperature = NAN)
LIE(sampling_top_p, s->sampling.top_p = NAN)
LIE(sampling_min_p, s->sampling.min_p = NAN)
LIE(sampling_repetition, s->sampling.repetition_penalty = NAN)
LIE(sampling_presence, s->sampling.presence_penalty = NAN)
LIE(sampling_frequency, s->sampling.frequency_penalty = NAN)
LIE(sampling_bias_parallel, s->sampling.n_bias_value = 1)
LIE(sampling_bias_token, s->sampling.bias_token = BIG_TOKENS)
LIE(sampling_bias_nan, s->sampling.bias_value = NAN_VALUES)
LIE(sampling_biases, s->sampling.bias_token = MANY; s->sampling.bias_value = MANY_FLOATS;
    s->sampling.n_bias_token = s->sampling.n_bias_value = LOGIT_BIAS_MAX + 1)
LIE(sampling_top_logprobs, s->sampling.top_logprobs = TOP_LOGPROBS_MAX + 1)
LIE(tokens_id, s->token.id = VOCABULARY_MAX)
LIE(tokens_top_token, s->top.token = UINT32_MAX)
LIE(tokens_tops, s->token.top = MANY_TOPS; s->token.n_top = TOP_LOGPROBS_MAX + 1)
LIE(tokens_finish, s->tokens.finish = 5)
LIE(tokens_stop, s->tokens.stop_token = VOCABULARY_MAX)
LIE(tokens_first, s->tokens.first = CONTEXT_MAX + 1)
LIE(tokens_error, s->tokens.error = LONG_TEXT)
LIE(rejected_reason, s->rejected.reason = LONG_TEXT)
LIE(stats_parallel, s->stats.n_load_expert = 0)
LIE(stats_layer, s->stats.load_layer = BIG_LAYERS)
LIE(stats_member, s->actor_stats.member = NULL)
LIE(stats_inner, s->heartbeat.n_load_layer = 0)
LIE(status_commit, s->status.commit = NULL)
LIE(status_inner, s->commit.n_layer = 0)
LIE(status_request_address, s->status_request.reply_address = ADDRESS_TEXT)
LIE(peer_host, s->peer_exited.host = "a\tb")

static void test_lies(void **state) {
    static const struct {
        Troupe__Envelope__BodyCase kind;
        void (*lie)(struct sample *);
        int code;
        const char *says;
    } CASES[] = {
#define C(NAME, lie, code, says) {TROUPE__ENVELOPE__BODY_##NAME, lie, ERR_##code, says}
        C(HELLO, hello_role, CORRUPT, "Hello.role: expected a value, found 0"),
        C(HELLO, hello_role_unknown, CORRUPT, "Hello.role: expected a value of Role, found 7"),
        C(HELLO, hello_role_negative, CORRUPT, "found -1"),
        C(HELLO, hello_address_long, TOO_LARGE,
          "Hello.control_address: expected less than 256 bytes"),
        C(HELLO, hello_name_newline, CORRUPT,
          "Hello.name: expected printable text, found byte 0x0a"),
        C(HELLO, hello_name_delete, CORRUPT, "0x7f"),
        C(REFUSED, refused_long, TOO_LARGE, "Refused.reason: expected less than 512 bytes"),
        C(WELCOME, welcome_id, CORRUPT, "Welcome.id"),
        C(HEARTBEAT, heartbeat_state, CORRUPT, "Heartbeat.state"),
        C(HEARTBEAT, heartbeat_parallel, CORRUPT,
          "load_rows: expected 3 entries as in load_layer, found 2"),
        C(HEARTBEAT, heartbeat_answers, CORRUPT, "peer_queue: expected 0 entries as in peer, found 2"),
        C(HEARTBEAT, heartbeat_layer, CORRUPT, "load_layer: expected less than 256, found 256"),
        C(HEARTBEAT, heartbeat_expert, CORRUPT, "load_expert: expected less than 1024, found 1024"),
        C(HEARTBEAT, heartbeat_users, CORRUPT, "bias_users: expected 2 entries as in bias_version"),
        C(HEARTBEAT, heartbeat_versions, TOO_LARGE, "bias_version: expected at most 32 entries"),
        C(BIAS, bias_version, CORRUPT, "Bias.version: expected a value, found 0"),
        C(BIAS, bias_large, CORRUPT, "Bias.delta: expected a number from -1 to 1, found -1.5"),
        C(BIAS, bias_nan, CORRUPT, "Bias.delta: expected a number from -1 to 1"),
        C(HELLO, bias_large, CORRUPT, "Bias.delta: expected a number from -1 to 1, found -1.5"),
        C(BIAS_RELEASE, bias_release_version, CORRUPT, "BiasRelease.version: expected a value"),
        C(ASSIGN, assign_parallel, CORRUPT, "expert: expected 3 entries as in layer, found 2"),
        C(ASSIGN, assign_layer, CORRUPT, "Assign.layer"),
        C(ASSIGN, assign_expert, CORRUPT, "Assign.expert"),
        C(RELEASE, release_parallel, CORRUPT, "Release.expert"),
        C(RELEASE, release_expert, CORRUPT, "Release.expert"),
        C(COMMIT, commit_parallel, CORRUPT, "Commit.holder"),
        C(COMMIT, commit_layer, CORRUPT, "Commit.layer"),
        C(COMMIT, commit_member_id, CORRUPT, "Member.id"),
        C(COMMIT, commit_member_incarnation, CORRUPT, "Member.incarnation"),
        C(COMMIT, commit_member_role, CORRUPT, "Member.role"),
        C(COMMIT, commit_member_state, CORRUPT, "Member.state"),
        C(COMMIT, commit_member_host, TOO_LARGE, "Member.host"),
        C(COMMIT, commit_members, TOO_LARGE,
          "Commit.member: expected at most 1024 entries, found 1025"),
        C(SUBMIT, submit_token, CORRUPT, "Submit.token: expected less than 1048576"),
        C(SUBMIT, submit_stop, CORRUPT, "Submit.stop_token"),
        C(SUBMIT, submit_stops, TOO_LARGE, "Submit.stop_token: expected at most 64"),
        C(SUBMIT, submit_sampling, CORRUPT, "Submit.sampling: missing"),
        C(SUBMIT, sampling_temperature, CORRUPT,
          "Sampling.temperature: expected a number, found NaN"),
        C(SUBMIT, sampling_top_p, CORRUPT, "Sampling.top_p"),
        C(SUBMIT, sampling_min_p, CORRUPT, "Sampling.min_p"),
        C(SUBMIT, sampling_repetition, CORRUPT, "Sampling.repetition_penalty"),
        C(SUBMIT, sampling_presence, CORRUPT, "Sampling.presence_penalty"),
        C(SUBMIT, sampling_frequency, CORRUPT, "Sampling.frequency_penalty"),
        C(SUBMIT, sampling_bias_parallel, CORRUPT, "Sampling.bias_value"),
        C(SUBMIT, sampling_bias_token, CORRUPT, "Sampling.bias_token"),
        C(SUBMIT, sampling_bias_nan, CORRUPT, "Sampling.bias_value: expected a number"),
        C(SUBMIT, sampling_biases, TOO_LARGE, "Sampling.bias_token: expected at most 1024"),
        C(SUBMIT, sampling_top_logprobs, CORRUPT, "Sampling.top_logprobs: expected less than 21"),
        C(TOKENS, tokens_id, CORRUPT, "Token.id"),
        C(TOKENS, tokens_top_token, CORRUPT, "TopLogprob.token"),
        C(TOKENS, tokens_tops, TOO_LARGE, "Token.top"),
        C(TOKENS, tokens_finish, CORRUPT, "Tokens.finish"),
        C(TOKENS, tokens_stop, CORRUPT, "Tokens.stop_token"),
        C(TOKENS, tokens_first, CORRUPT, "Tokens.first"),
        C(TOKENS, tokens_error, TOO_LARGE, "Tokens.error"),
        C(REJECTED, rejected_reason, TOO_LARGE, "Rejected.reason"),
        C(STATS, stats_parallel, CORRUPT, "Stats.load_expert"),
        C(STATS, stats_layer, CORRUPT, "Stats.load_layer"),
        C(STATS, stats_member, CORRUPT, "ActorStats.member: missing"),
        C(STATS, stats_inner, CORRUPT, "Heartbeat.load_expert"),
        C(STATUS, status_commit, CORRUPT, "Status.commit: missing"),
        C(STATUS, status_inner, CORRUPT, "Commit.expert"),
        C(STATUS_REQUEST, status_request_address, TOO_LARGE, "StatusRequest.reply_address"),
        C(PEER_EXITED, peer_host, CORRUPT, "PeerExited.host"),
#undef C
    };
    struct sample s;
    struct packed packed;
    memset(LONG_TEXT, 'x', sizeof LONG_TEXT - 1);
    memset(ADDRESS_TEXT, 'x', sizeof ADDRESS_TEXT - 1);
    for (size_t i = 0; i < sizeof MANY_TOPS / sizeof *MANY_TOPS; i++)
        MANY_TOPS[i] = &s.top;
    for (size_t i = 0; i < sizeof MANY_MEMBERS / sizeof *MANY_MEMBERS; i++)
        MANY_MEMBERS[i] = &s.member[0];
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        fill_sample(&s);
        choose(&s, CASES[i].kind);
        CASES[i].lie(&s);
        pack(&s, &packed);
        struct failure failure = {0};
        int code = unpack(packed.bytes, packed.size, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("case %zu: expected %d \"%s\", found %d \"%s\"", i, CASES[i].code,
                     CASES[i].says, code, failure.text);
        assert_int_equal(unpack(packed.bytes, packed.size, NULL), code);
    }
}

/* ---- bytes that nobody sent ---- */

static void test_truncations(void **state) {
    for (size_t k = 0; k < KIND_COUNT; k++) {
        struct sample s;
        struct packed packed;
        fill_sample(&s);
        choose(&s, KINDS[k]);
        pack(&s, &packed);
        for (size_t size = 0; size < packed.size; size++) {
            uint8_t *part =
                malloc(size > 0 ? size : 1); /* exact, so that a sanitizer sees overreads */
            memcpy(part, packed.bytes, size);
            /* A prefix never parses: the body is the last field, and its length is in front of it.
             */
            assert_true(unpack(part, size, NULL) < 0);
            free(part);
        }
    }
}

static void test_bit_flips(void **state) {
    uint32_t refused = 0, accepted = 0;
    for (size_t k = 0; k < KIND_COUNT; k++) {
        struct sample s;
        struct packed packed;
        fill_sample(&s);
        choose(&s, KINDS[k]);
        pack(&s, &packed);
        for (size_t bit = 0; bit < packed.size * 8; bit++) {
            packed.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
            struct failure failure = {0};
            if (unpack(packed.bytes, packed.size, &failure) < 0) {
                assert_true(strncmp(failure.text, "message", 7) == 0);
                refused++;
            } else {
                accepted++;
            }
            packed.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
    }
    printf("%u bit flips refused, %u gave another valid message\n", refused, accepted);
    assert_true(refused > 1000 && accepted > 1000);
}

static void test_random_bytes(void **state) {
    const uint64_t seed = 4242;
    printf("seed %llu\n", (unsigned long long)seed);
    uint64_t random = seed;
    for (int round = 0; round < 20000; round++) {
        uint8_t bytes[256];
        uint32_t size = random_below(&random, sizeof bytes);
        for (uint32_t i = 0; i < size; i++)
            bytes[i] = (uint8_t)random_next(&random);
        unpack(bytes, size, NULL);
    }
    /* Valid messages with several bytes changed, cut out or doubled. */
    for (int round = 0; round < 20000; round++) {
        struct sample s;
        struct packed packed;
        fill_sample(&s);
        choose(&s, KINDS[random_below(&random, KIND_COUNT)]);
        pack(&s, &packed);
        for (uint32_t n = random_below(&random, 6); n > 0; n--) {
            uint32_t at = random_below(&random, (uint32_t)packed.size);
            uint32_t length = random_below(&random, (uint32_t)packed.size - at);
            switch (random_below(&random, 3)) {
            case 0:
                packed.bytes[at] = (uint8_t)random_next(&random);
                break;
            case 1: /* cut out */
                memmove(packed.bytes + at, packed.bytes + at + length, packed.size - at - length);
                packed.size -= length;
                break;
            default: /* doubled */
                if (packed.size + length > PACKED_MAX)
                    break;
                memmove(packed.bytes + at + length, packed.bytes + at, packed.size - at);
                packed.size += length;
            }
            if (packed.size == 0)
                break;
        }
        unpack(packed.bytes, packed.size, NULL);
    }
}

/* `count` copies of `unit` inside a length-delimited field of an envelope. */
static uint8_t *bomb(uint8_t field_high, uint8_t field_low, const uint8_t *unit, size_t unit_bytes,
                     size_t count, size_t *ret_size) {
    size_t inner = unit_bytes * count, used = 0;
    uint8_t *bytes = malloc(inner + 32);
    bytes[used++] = 0x08, bytes[used++] = WIRE_PROTOCOL_VERSION;
    bytes[used++] = 0x18, bytes[used++] = 1; /* from_incarnation */
    bytes[used++] = field_high, bytes[used++] = field_low;
    for (size_t left = inner;; left >>= 7) {
        bytes[used++] = (uint8_t)((left & 0x7f) | (left > 0x7f ? 0x80 : 0));
        if (left <= 0x7f)
            break;
    }
    for (size_t i = 0; i < count; i++, used += unit_bytes)
        memcpy(bytes + used, unit, unit_bytes);
    *ret_size = used;
    return bytes;
}

/* Small messages that unfold into much more: refused for their size, quickly. */
static void test_bombs(void **state) {
    struct failure failure = {0};
    uint8_t *large = calloc(1, (size_t)CONTROL_MESSAGE_MAX + 1);
    assert_int_equal(unpack(large, (size_t)CONTROL_MESSAGE_MAX + 1, &failure), ERR_TOO_LARGE);
    assert_non_null(strstr(failure.text, "expected at most 16777216 bytes, found 16777217"));
    free(large);

    static const struct {
        uint8_t field_high, field_low; /* tag of the body, two bytes of varint */
        uint8_t unit[4];
        size_t unit_bytes;
        const char *what;
    } CASES[] = {
        {0xaa, 0x01, {0x0a, 0x00}, 2, "empty Tokens in a TokensBatch"},    /* body 21, field 1 */
        {0x82, 0x01, {0x12, 0x00}, 2, "empty Members in a Commit"},        /* body 16, field 2 */
        {0xa2, 0x01, {0x10, 0x01}, 2, "unpacked tokens in a Submit"},      /* body 20, field 2 */
        {0xa2, 0x01, {0x42, 0x00}, 2, "Sampling repeated in a Submit"},    /* body 20, field 8 */
        {0xba, 0x01, {0xf8, 0x01, 0x00}, 3, "unknown fields in a Cancel"}, /* body 23, field 31 */
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        size_t size, count = (CONTROL_MESSAGE_MAX - 64) / CASES[i].unit_bytes;
        uint8_t *bytes = bomb(CASES[i].field_high, CASES[i].field_low, CASES[i].unit,
                              CASES[i].unit_bytes, count, &size);
        assert_true(size <= CONTROL_MESSAGE_MAX);
        if (unpack(bytes, size, &failure) != ERR_TOO_LARGE)
            fail_msg("%s: expected too large, found %s", CASES[i].what, failure.text);
        free(bytes);
        /* A few of the same are fine, or wrong for another reason. */
        bytes = bomb(CASES[i].field_high, CASES[i].field_low, CASES[i].unit, CASES[i].unit_bytes, 3,
                     &size);
        assert_int_not_equal(unpack(bytes, size, &failure), ERR_TOO_LARGE);
        free(bytes);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_there_and_back),      cmocka_unit_test(test_some_values),
        cmocka_unit_test(test_versions_and_bodies), cmocka_unit_test(test_lies),
        cmocka_unit_test(test_truncations),         cmocka_unit_test(test_bit_flips),
        cmocka_unit_test(test_random_bytes),        cmocka_unit_test(test_bombs),
    };
    return cmocka_run_group_tests_name("wire", tests, NULL, NULL);
}
