/* Control messages. protobuf-c sees to the encoding; this file sees to it that whatever bytes
 * arrive, memory stays bounded and what comes out is fit to be used without looking again: every
 * enum value known, every string short and printable, parallel lists of one length, every index
 * below its limit. Enums and strings are found through the descriptors, so a new field is checked
 * without being listed; everything else stands in one table per message. */
#include "proto/wire.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"

#define UNPACKED_BYTES_MAX       (64u << 20)
#define UNPACKED_ALLOCATIONS_MAX (1u << 20)
#define PLACEMENT_ENTRIES_MAX    (LAYERS_MAX * EXPERTS_MAX * 4) /* replicas included */
#define SEQUENCES_PER_BATCH_MAX  65536

/* ---- names ---- */

static const char *const NAMES[] = {
    [TROUPE__ENVELOPE__BODY_HELLO] = "HELLO",
    [TROUPE__ENVELOPE__BODY_WELCOME] = "WELCOME",
    [TROUPE__ENVELOPE__BODY_REFUSED] = "REFUSED",
    [TROUPE__ENVELOPE__BODY_HEARTBEAT] = "HEARTBEAT",
    [TROUPE__ENVELOPE__BODY_ASSIGN] = "ASSIGN",
    [TROUPE__ENVELOPE__BODY_READY] = "READY",
    [TROUPE__ENVELOPE__BODY_COMMIT] = "COMMIT",
    [TROUPE__ENVELOPE__BODY_RELEASE] = "RELEASE",
    [TROUPE__ENVELOPE__BODY_REJOIN] = "REJOIN",
    [TROUPE__ENVELOPE__BODY_SUBMIT] = "SUBMIT",
    [TROUPE__ENVELOPE__BODY_TOKENS] = "TOKENS",
    [TROUPE__ENVELOPE__BODY_POLL] = "POLL",
    [TROUPE__ENVELOPE__BODY_CANCEL] = "CANCEL",
    [TROUPE__ENVELOPE__BODY_REJECTED] = "REJECTED",
    [TROUPE__ENVELOPE__BODY_STATS] = "STATS",
    [TROUPE__ENVELOPE__BODY_STATUS_REQUEST] = "STATUS_REQUEST",
    [TROUPE__ENVELOPE__BODY_STATUS] = "STATUS",
    [TROUPE__ENVELOPE__BODY_SHUTDOWN] = "SHUTDOWN",
    [TROUPE__ENVELOPE__BODY_PEER_EXITED] = "PEER_EXITED",
    [TROUPE__ENVELOPE__BODY_SCALE] = "SCALE",
    [TROUPE__ENVELOPE__BODY_SCALED] = "SCALED",
    [TROUPE__ENVELOPE__BODY_BIAS] = "BIAS",
    [TROUPE__ENVELOPE__BODY_BIAS_RELEASE] = "BIAS_RELEASE",
    [TROUPE__ENVELOPE__BODY_FETCH] = "FETCH",
    [TROUPE__ENVELOPE__BODY_WEIGHTS] = "WEIGHTS",
};

const char *wire_name(const Troupe__Envelope *envelope) {
    size_t body = (size_t)envelope->body_case;
    const char *name = body < sizeof NAMES / sizeof *NAMES ? NAMES[body] : NULL;
    return name != NULL ? name : "NONE";
}

/* ---- the table of checks ---- */

enum check_kind {
    CHECK_BELOW,    /* uint32 < limit; of a list: every element */
    CHECK_COUNT,    /* a list has at most `limit` elements */
    CHECK_NOT_ZERO, /* uint32 or uint64 */
    CHECK_NUMBER,   /* float or list of floats without NaN */
    CHECK_WITHIN,   /* list of floats from -limit to limit */
    CHECK_SAME,     /* a list is as long as another one */
    CHECK_PRESENT,  /* a message inside a message */
};

struct check {
    enum check_kind kind;
    const char *field;
    const char *other; /* CHECK_SAME: the other list's name */
    size_t offset;
    size_t count_offset; /* lists; 0: not a list */
    size_t other_count_offset;
    uint32_t bytes; /* of one element */
    uint32_t limit;
};

/* `m` is a message's C type, `f` a field of it. */
#define SIZE(m, f) sizeof(((m *)0)->f)
#define BELOW(m, f, max)                                                                           \
    { CHECK_BELOW, #f, NULL, offsetof(m, f), 0, 0, SIZE(m, f), max }
#define EACH_BELOW(m, f, max)                                                                      \
    { CHECK_BELOW, #f, NULL, offsetof(m, f), offsetof(m, n_##f), 0, SIZE(m, f[0]), max }
#define COUNT(m, f, max)                                                                           \
    { CHECK_COUNT, #f, NULL, offsetof(m, f), offsetof(m, n_##f), 0, 0, max }
/* A field of type bytes, whose length lies at its beginning. */
#define BYTES(m, f, max)                                                                           \
    { CHECK_COUNT, #f, NULL, offsetof(m, f), offsetof(m, f.len), 0, 0, max }
#define NOT_ZERO(m, f)                                                                             \
    { CHECK_NOT_ZERO, #f, NULL, offsetof(m, f), 0, 0, SIZE(m, f), 0 }
#define NUMBER(m, f)                                                                               \
    { CHECK_NUMBER, #f, NULL, offsetof(m, f), 0, 0, SIZE(m, f), 0 }
#define EACH_NUMBER(m, f)                                                                          \
    { CHECK_NUMBER, #f, NULL, offsetof(m, f), offsetof(m, n_##f), 0, SIZE(m, f[0]), 0 }
#define EACH_WITHIN(m, f, max)                                                                     \
    { CHECK_WITHIN, #f, NULL, offsetof(m, f), offsetof(m, n_##f), 0, SIZE(m, f[0]), max }
#define SAME(m, f, g)                                                                              \
    { CHECK_SAME, #f, #g, offsetof(m, f), offsetof(m, n_##f), offsetof(m, n_##g), 0, 0 }
#define PRESENT(m, f)                                                                              \
    { CHECK_PRESENT, #f, NULL, offsetof(m, f), 0, 0, 0, 0 }

static const struct check HELLO[] = {
    NOT_ZERO(Troupe__Hello, role),
    SAME(Troupe__Hello, expert, layer),
    COUNT(Troupe__Hello, layer, LAYERS_MAX *EXPERTS_MAX),
    EACH_BELOW(Troupe__Hello, layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Hello, expert, EXPERTS_MAX),
    COUNT(Troupe__Hello, bias, BIAS_VERSIONS_HELD_MAX),
};
static const struct check WELCOME[] = {
    NOT_ZERO(Troupe__Welcome, id),
};
static const struct check HEARTBEAT[] = {
    SAME(Troupe__Heartbeat, load_expert, load_layer),
    SAME(Troupe__Heartbeat, load_rows, load_layer),
    COUNT(Troupe__Heartbeat, load_layer, LAYERS_MAX *EXPERTS_MAX),
    EACH_BELOW(Troupe__Heartbeat, load_layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Heartbeat, load_expert, EXPERTS_MAX),
    SAME(Troupe__Heartbeat, bias_users, bias_version),
    COUNT(Troupe__Heartbeat, bias_version, BIAS_VERSIONS_HELD_MAX),
    SAME(Troupe__Heartbeat, peer_queue, peer),
    SAME(Troupe__Heartbeat, peer_p50_us, peer),
    SAME(Troupe__Heartbeat, peer_p99_us, peer),
    COUNT(Troupe__Heartbeat, peer, ACTORS_MAX),
};
static const struct check BIAS[] = {
    NOT_ZERO(Troupe__Bias, version),
    COUNT(Troupe__Bias, delta, LAYERS_MAX *EXPERTS_MAX),
    EACH_WITHIN(Troupe__Bias, delta, BIAS_DELTA_MAX),
};
static const struct check BIAS_RELEASE[] = {
    NOT_ZERO(Troupe__BiasRelease, version),
};
static const struct check ASSIGN[] = {
    SAME(Troupe__Assign, expert, layer),
    COUNT(Troupe__Assign, layer, LAYERS_MAX *EXPERTS_MAX),
    EACH_BELOW(Troupe__Assign, layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Assign, expert, EXPERTS_MAX),
};
static const struct check RELEASE[] = {
    SAME(Troupe__Release, expert, layer),
    COUNT(Troupe__Release, layer, LAYERS_MAX *EXPERTS_MAX),
    EACH_BELOW(Troupe__Release, layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Release, expert, EXPERTS_MAX),
};
static const struct check READY[] = {
    SAME(Troupe__Ready, expert, layer),
    COUNT(Troupe__Ready, layer, LAYERS_MAX *EXPERTS_MAX),
    EACH_BELOW(Troupe__Ready, layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Ready, expert, EXPERTS_MAX),
};
static const struct check SCALE[] = {
    NOT_ZERO(Troupe__Scale, operation),
    NOT_ZERO(Troupe__Scale, role),
    BELOW(Troupe__Scale, start, ACTORS_MAX),
    COUNT(Troupe__Scale, leaving, ACTORS_MAX),
};
static const struct check SCALED[] = {
    NOT_ZERO(Troupe__Scaled, operation),
    COUNT(Troupe__Scaled, started, ACTORS_MAX),
};
static const struct check MEMBER[] = {
    NOT_ZERO(Troupe__Member, id),
    NOT_ZERO(Troupe__Member, incarnation),
    NOT_ZERO(Troupe__Member, role),
};
static const struct check COMMIT[] = {
    COUNT(Troupe__Commit, member, ACTORS_MAX),
    SAME(Troupe__Commit, expert, layer),
    SAME(Troupe__Commit, holder, layer),
    COUNT(Troupe__Commit, layer, PLACEMENT_ENTRIES_MAX),
    COUNT(Troupe__Commit, lost, ACTORS_MAX),
    EACH_BELOW(Troupe__Commit, layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Commit, expert, EXPERTS_MAX),
};
static const struct check FETCH[] = {
    NOT_ZERO(Troupe__Fetch, transfer),
    NOT_ZERO(Troupe__Fetch, bytes),
    BELOW(Troupe__Fetch, layer, LAYERS_MAX),
    BELOW(Troupe__Fetch, expert, EXPERTS_MAX),
};
static const struct check WEIGHTS[] = {
    NOT_ZERO(Troupe__Weights, transfer),
    BYTES(Troupe__Weights, data, WEIGHTS_BYTES_MAX),
};
static const struct check OPERATION[] = {
    NOT_ZERO(Troupe__Operation, id),
    NOT_ZERO(Troupe__Operation, begun_by),
    SAME(Troupe__Operation, expert, layer),
    SAME(Troupe__Operation, from, layer),
    SAME(Troupe__Operation, to, layer),
    COUNT(Troupe__Operation, layer, PLACEMENT_ENTRIES_MAX),
    EACH_BELOW(Troupe__Operation, layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Operation, expert, EXPERTS_MAX),
    COUNT(Troupe__Operation, party, ACTORS_MAX),
};
static const struct check OPERATIONS[] = {
    COUNT(Troupe__Operations, operation, OPERATIONS_MAX),
};
static const struct check SAMPLING[] = {
    NUMBER(Troupe__Sampling, temperature),
    NUMBER(Troupe__Sampling, top_p),
    NUMBER(Troupe__Sampling, min_p),
    NUMBER(Troupe__Sampling, repetition_penalty),
    NUMBER(Troupe__Sampling, presence_penalty),
    NUMBER(Troupe__Sampling, frequency_penalty),
    SAME(Troupe__Sampling, bias_value, bias_token),
    COUNT(Troupe__Sampling, bias_token, LOGIT_BIAS_MAX),
    EACH_BELOW(Troupe__Sampling, bias_token, VOCABULARY_MAX),
    EACH_NUMBER(Troupe__Sampling, bias_value),
    BELOW(Troupe__Sampling, top_logprobs, TOP_LOGPROBS_MAX + 1),
};
static const struct check SUBMIT[] = {
    COUNT(Troupe__Submit, token, CONTEXT_MAX),
    EACH_BELOW(Troupe__Submit, token, VOCABULARY_MAX),
    COUNT(Troupe__Submit, stop_token, STOP_TOKENS_MAX),
    EACH_BELOW(Troupe__Submit, stop_token, VOCABULARY_MAX),
    PRESENT(Troupe__Submit, sampling),
};
static const struct check TOP_LOGPROB[] = {BELOW(Troupe__TopLogprob, token, VOCABULARY_MAX)};
static const struct check TOKEN[] = {
    BELOW(Troupe__Token, id, VOCABULARY_MAX),
    COUNT(Troupe__Token, top, TOP_LOGPROBS_MAX),
    COUNT(Troupe__Token, logits, VOCABULARY_MAX),
};
static const struct check TOKENS[] = {
    BELOW(Troupe__Tokens, first, CONTEXT_MAX + 1),
    COUNT(Troupe__Tokens, token, CONTEXT_MAX),
    BELOW(Troupe__Tokens, stop_token, VOCABULARY_MAX),
    BELOW(Troupe__Tokens, prompt_first, CONTEXT_MAX + 1),
    COUNT(Troupe__Tokens, prompt, CONTEXT_MAX),
};
static const struct check TRACE[] = {
    COUNT(Troupe__Trace, layer_ns, 4 * LAYERS_MAX),
    SAME(Troupe__Trace, rows, actor),
    COUNT(Troupe__Trace, actor, ACTORS_MAX),
};
static const struct check TOKENS_BATCH[] = {
    COUNT(Troupe__TokensBatch, tokens, SEQUENCES_PER_BATCH_MAX),
};
static const struct check ACTOR_STATS[] = {PRESENT(Troupe__ActorStats, member)};
static const struct check STATS[] = {
    COUNT(Troupe__Stats, actor, ACTORS_MAX),
    SAME(Troupe__Stats, load_expert, load_layer),
    SAME(Troupe__Stats, load_rows, load_layer),
    COUNT(Troupe__Stats, load_layer, LAYERS_MAX *EXPERTS_MAX),
    EACH_BELOW(Troupe__Stats, load_layer, LAYERS_MAX),
    EACH_BELOW(Troupe__Stats, load_expert, EXPERTS_MAX),
    COUNT(Troupe__Stats, operation, OPERATIONS_MAX),
};
static const struct check STATUS[] = {
    PRESENT(Troupe__Status, commit),
    COUNT(Troupe__Status, actor, ACTORS_MAX),
};

#define CHECKS(name, table)                                                                        \
    { &troupe__##name##__descriptor, table, sizeof table / sizeof *table }
static const struct message_checks {
    const ProtobufCMessageDescriptor *descriptor;
    const struct check *check;
    size_t count;
} MESSAGES[] = {
    /* The ones that repeat inside others come first: they are looked for most often. */
    CHECKS(token, TOKEN),
    CHECKS(top_logprob, TOP_LOGPROB),
    CHECKS(tokens, TOKENS),
    CHECKS(trace, TRACE),
    CHECKS(member, MEMBER),
    CHECKS(actor_stats, ACTOR_STATS),
    CHECKS(heartbeat, HEARTBEAT),
    CHECKS(tokens_batch, TOKENS_BATCH),
    CHECKS(submit, SUBMIT),
    CHECKS(sampling, SAMPLING),
    CHECKS(commit, COMMIT),
    CHECKS(assign, ASSIGN),
    CHECKS(release, RELEASE),
    CHECKS(ready, READY),
    CHECKS(scale, SCALE),
    CHECKS(scaled, SCALED),
    CHECKS(stats, STATS),
    CHECKS(status, STATUS),
    CHECKS(hello, HELLO),
    CHECKS(welcome, WELCOME),
    CHECKS(fetch, FETCH),
    CHECKS(weights, WEIGHTS),
    CHECKS(operation, OPERATION),
    CHECKS(operations, OPERATIONS),
    CHECKS(bias, BIAS),
    CHECKS(bias_release, BIAS_RELEASE),
};

/* ---- running the checks ---- */

/* A message being checked, for the texts. */
struct subject {
    const char *body; /* "SUBMIT" */
    const ProtobufCMessageDescriptor *descriptor;
    const uint8_t *bytes; /* the C struct */
    struct failure *failure;
};

static size_t count_at(const struct subject *subject, size_t offset) {
    size_t count;
    memcpy(&count, subject->bytes + offset, sizeof count);
    return count;
}

static const void *pointer_at(const struct subject *subject, size_t offset) {
    const void *pointer;
    memcpy(&pointer, subject->bytes + offset, sizeof pointer);
    return pointer;
}

/* First element and number of elements of a scalar (1) or a list. */
static const uint8_t *elements(const struct subject *subject, const struct check *check,
                               size_t *ret_count) {
    if (check->count_offset == 0) {
        *ret_count = 1;
        return subject->bytes + check->offset;
    }
    *ret_count = count_at(subject, check->count_offset);
    return pointer_at(subject, check->offset);
}

static int check_below(const struct subject *subject, const struct check *check) {
    size_t count;
    const uint32_t *value = (const uint32_t *)elements(subject, check, &count);
    for (size_t i = 0; i < count; i++)
        if (value[i] >= check->limit)
            return fail(subject->failure, ERR_CORRUPT,
                        "message %s: %s.%s: expected less than %u, found %u", subject->body,
                        subject->descriptor->short_name, check->field, check->limit, value[i]);
    return 0;
}

static int check_number(const struct subject *subject, const struct check *check) {
    size_t count;
    const float *value = (const float *)elements(subject, check, &count);
    for (size_t i = 0; i < count; i++)
        if (isnan(value[i]))
            return fail(subject->failure, ERR_CORRUPT,
                        "message %s: %s.%s: expected a number, found NaN", subject->body,
                        subject->descriptor->short_name, check->field);
    return 0;
}

static int check_within(const struct subject *subject, const struct check *check) {
    size_t count;
    const float *value = (const float *)elements(subject, check, &count);
    for (size_t i = 0; i < count; i++)
        if (!(fabsf(value[i]) <= (float)check->limit))
            return fail(subject->failure, ERR_CORRUPT,
                        "message %s: %s.%s: expected a number from -%u to %u, found %g",
                        subject->body, subject->descriptor->short_name, check->field, check->limit,
                        check->limit, (double)value[i]);
    return 0;
}

static int run_check(const struct subject *subject, const struct check *check) {
    const char *message = subject->descriptor->short_name;
    switch (check->kind) {
    case CHECK_BELOW:
        return check_below(subject, check);
    case CHECK_NUMBER:
        return check_number(subject, check);
    case CHECK_WITHIN:
        return check_within(subject, check);
    case CHECK_COUNT: {
        size_t count = count_at(subject, check->count_offset);
        if (count > check->limit)
            return fail(subject->failure, ERR_TOO_LARGE,
                        "message %s: %s.%s: expected at most %u entries, found %zu", subject->body,
                        message, check->field, check->limit, count);
        return 0;
    }
    case CHECK_NOT_ZERO: {
        uint64_t value = 0; /* little- and big-endian alike: only zero or not */
        memcpy(&value, subject->bytes + check->offset, check->bytes);
        if (value == 0)
            return fail(subject->failure, ERR_CORRUPT,
                        "message %s: %s.%s: expected a value, found 0", subject->body, message,
                        check->field);
        return 0;
    }
    case CHECK_SAME: {
        size_t count = count_at(subject, check->count_offset);
        size_t other = count_at(subject, check->other_count_offset);
        if (count != other)
            return fail(subject->failure, ERR_CORRUPT,
                        "message %s: %s.%s: expected %zu entries as in %s, found %zu",
                        subject->body, message, check->field, other, check->other, count);
        return 0;
    }
    case CHECK_PRESENT:
        if (pointer_at(subject, check->offset) == NULL)
            return fail(subject->failure, ERR_CORRUPT, "message %s: %s.%s: missing", subject->body,
                        message, check->field);
        return 0;
    }
    return 0;
}

/* Short strings go into logs, socket addresses and metrics: no control characters. Reasons and
 * errors are sentences and may be longer. */
static int check_string(const struct subject *subject, const char *field, const char *text) {
    bool sentence = strcmp(field, "reason") == 0 || strcmp(field, "error") == 0;
    size_t limit = sentence ? FAILURE_TEXT_BYTES : ADDRESS_BYTES_MAX;
    size_t length = text != NULL ? strlen(text) : 0;
    if (length >= limit)
        return fail(subject->failure, ERR_TOO_LARGE,
                    "message %s: %s.%s: expected less than %zu bytes, found %zu", subject->body,
                    subject->descriptor->short_name, field, limit, length);
    for (size_t i = 0; i < length && !sentence; i++)
        if ((uint8_t)text[i] < 0x20 || text[i] == 0x7f)
            return fail(subject->failure, ERR_CORRUPT,
                        "message %s: %s.%s: expected printable text, found byte 0x%02x",
                        subject->body, subject->descriptor->short_name, field, (uint8_t)text[i]);
    return 0;
}

static int check_message(const struct subject *subject);

static int check_nested(const struct subject *subject, const ProtobufCFieldDescriptor *field,
                        const void *message) {
    if (message == NULL)
        return 0;
    struct subject nested = {subject->body, field->descriptor, message, subject->failure};
    return check_message(&nested);
}

/* Enums, strings and messages inside this one, by the descriptor. No enum is repeated and no string
 * is; asserted below. */
static int check_field(const struct subject *subject, const ProtobufCFieldDescriptor *field) {
    bool repeated = field->label == PROTOBUF_C_LABEL_REPEATED;
    if (field->type == PROTOBUF_C_TYPE_MESSAGE) {
        if (!repeated)
            return check_nested(subject, field, pointer_at(subject, field->offset));
        size_t count = count_at(subject, field->quantifier_offset);
        void *const *message = pointer_at(subject, field->offset);
        for (size_t i = 0; i < count; i++) {
            int code = check_nested(subject, field, message[i]);
            if (code < 0)
                return code;
        }
    } else if (field->type == PROTOBUF_C_TYPE_STRING) {
        ASSERT(!repeated);
        return check_string(subject, field->name, pointer_at(subject, field->offset));
    } else if (field->type == PROTOBUF_C_TYPE_ENUM) {
        ASSERT(!repeated);
        int value;
        memcpy(&value, subject->bytes + field->offset, sizeof value);
        if (protobuf_c_enum_descriptor_get_value(field->descriptor, value) == NULL)
            return fail(subject->failure, ERR_CORRUPT,
                        "message %s: %s.%s: expected a value of %s, found %d", subject->body,
                        subject->descriptor->short_name, field->name,
                        ((const ProtobufCEnumDescriptor *)field->descriptor)->short_name, value);
    }
    return 0;
}

/* Nesting is as deep as troupe.proto, where no message contains itself. */
static int check_message(const struct subject *subject) {
    for (size_t i = 0; i < sizeof MESSAGES / sizeof *MESSAGES; i++) {
        if (MESSAGES[i].descriptor != subject->descriptor)
            continue;
        for (size_t c = 0; c < MESSAGES[i].count; c++) {
            int code = run_check(subject, &MESSAGES[i].check[c]);
            if (code < 0)
                return code;
        }
        break;
    }
    for (unsigned i = 0; i < subject->descriptor->n_fields; i++) {
        int code = check_field(subject, &subject->descriptor->fields[i]);
        if (code < 0)
            return code;
    }
    return 0;
}

static int check_envelope(const Troupe__Envelope *envelope, struct failure *failure) {
    if (envelope->protocol_version != WIRE_PROTOCOL_VERSION)
        return fail(failure, ERR_VERSION,
                    "message: protocol version: expected %u, found %u (run the same version of "
                    "troupe everywhere)",
                    WIRE_PROTOCOL_VERSION, envelope->protocol_version);
    if (envelope->body_case == TROUPE__ENVELOPE__BODY__NOT_SET)
        return fail(failure, ERR_CORRUPT, "message: body: expected a known one, found none");
    if (envelope->from_incarnation == 0)
        return fail(failure, ERR_CORRUPT, "message %s: from_incarnation: expected a value, found 0",
                    wire_name(envelope));
    const ProtobufCFieldDescriptor *field = protobuf_c_message_descriptor_get_field(
        &troupe__envelope__descriptor, (unsigned)envelope->body_case);
    ASSERT(field != NULL && field->type == PROTOBUF_C_TYPE_MESSAGE);
    struct subject subject = {wire_name(envelope), &troupe__envelope__descriptor,
                              (const uint8_t *)envelope, failure};
    return check_field(&subject, field);
}

/* ---- unpacking with bounded memory ---- */

/* What one unpacking has asked for in all; what it gave back meanwhile is not credited, so work is
 * bounded as well as memory. */
struct budget {
    size_t bytes, allocations;
    bool exceeded;
};

static void *budget_alloc(void *data, size_t size) {
    struct budget *budget = data;
    if (budget->allocations == UNPACKED_ALLOCATIONS_MAX ||
        size > UNPACKED_BYTES_MAX - budget->bytes) {
        budget->exceeded = true;
        return NULL;
    }
    budget->allocations++;
    budget->bytes += size;
    return malloc(size);
}

static void budget_free(void *data, void *pointer) {
    (void)data;
    free(pointer);
}

int wire_unpack(Troupe__Envelope **ret, const void *bytes, size_t size, struct failure *failure) {
    if (size > CONTROL_MESSAGE_MAX)
        return fail(failure, ERR_TOO_LARGE, "message: expected at most %u bytes, found %zu",
                    CONTROL_MESSAGE_MAX, size);
    struct budget budget = {0};
    ProtobufCAllocator allocator = {budget_alloc, budget_free, &budget};
    Troupe__Envelope *envelope = troupe__envelope__unpack(&allocator, size, bytes);
    if (envelope == NULL && budget.exceeded)
        return fail(failure, ERR_TOO_LARGE,
                    "message: expected at most %u bytes in %u pieces when unpacked, found more",
                    UNPACKED_BYTES_MAX, UNPACKED_ALLOCATIONS_MAX);
    if (envelope == NULL)
        return fail(failure, ERR_CORRUPT,
                    "message: expected an envelope of troupe.proto, found %zu bytes that are none",
                    size);
    int code = check_envelope(envelope, failure);
    if (code < 0) {
        wire_free(&envelope);
        return code;
    }
    *ret = envelope;
    return 0;
}

void wire_free(Troupe__Envelope **envelope) {
    if (*envelope == NULL)
        return;
    ProtobufCAllocator allocator = {budget_alloc, budget_free, NULL};
    troupe__envelope__free_unpacked(*envelope, &allocator);
    *envelope = NULL;
}

size_t wire_packed_bytes(const Troupe__Envelope *envelope) {
    return troupe__envelope__get_packed_size(envelope);
}

void wire_pack(const Troupe__Envelope *envelope, uint8_t *ret) {
    troupe__envelope__pack(envelope, ret);
}
