#include "tests/support/step.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);          \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* ---- life ---- */

void stage_init(struct stage *self, enum role role) {
    memset(self, 0, sizeof *self);
    settings_default(&self->settings);
    self->config = (struct model_config){
        .family = FAMILY_DEEPSEEK_V3,
        .vocabulary = 32,
        .hidden = 8,
        .layers = 3,
        .dense_layers = 1,
        .moe_layer_freq = 1,
        .dense_width = 16,
        .expert_width = 16,
        .shared_experts = 1,
        .experts = 4,
        .heads = 1,
        .context = 256,
        .eos = {1},
        .eos_count = 1,
    };
    self->config.gate.k = 2;
    self->config.gate.experts = 4;
    self->identity = (struct actor_identity){
        .role = role,
        .incarnation = OWN_LIFE,
        .name = "under-test",
        .control_address = "test://self",
        .data_address = "test://self-data",
        .host = "here",
        .coordinator_address = "test://coordinator",
        .model_fingerprint = "fingerprint",
        .numerics = "f32",
        .memory_bytes = 5000,
        .pid = 1,
        .threads = 1,
    };
    effects_init(&self->effects);
    effects_init(&self->log);
    self->now_ns = 1000000000u;
    self->sampled_token = 5;
}

void stage_free(struct stage *self) {
    actor_destroy(&self->actor);
    effects_free(&self->effects);
    effects_free(&self->log);
    if (self->message != NULL)
        wire_free(&self->message);
}

/* ---- the log ---- */

static const char *keep(struct stage *self, const char *text) {
    return text == NULL ? NULL : effects_copy(&self->log, text, strlen(text) + 1);
}

static void log_effect(struct stage *self, const struct effect *effect) {
    struct effect *copy = effects_add(&self->log, effect->kind);
    *copy = *effect;
    switch (effect->kind) {
    case EFFECT_SEND:
        copy->send.bytes = effects_copy(&self->log, effect->send.bytes, effect->send.size);
        break;
    case EFFECT_TRANSFER:
        copy->transfer.prefix =
            effects_copy(&self->log, effect->transfer.prefix, effect->transfer.prefix_bytes);
        if (effect->transfer.index != NULL)
            copy->transfer.index = effects_copy(&self->log, effect->transfer.index,
                                                effect->transfer.count * sizeof(uint32_t));
        break;
    case EFFECT_CONNECT:
        copy->connect.control_address = keep(self, effect->connect.control_address);
        copy->connect.data_address = keep(self, effect->connect.data_address);
        copy->connect.host = keep(self, effect->connect.host);
        break;
    case EFFECT_TRACE:
        copy->trace.text = keep(self, effect->trace.text);
        break;
    case EFFECT_FAULT:
    case EFFECT_JOURNAL:
        copy->admin.text = keep(self, effect->admin.text);
        break;
    case EFFECT_EXIT:
        copy->exit.reason = keep(self, effect->exit.reason);
        break;
    default:
        break;
    }
}

void stage_clear(struct stage *self) {
    effects_reset(&self->log);
    memset(self->next, 0, sizeof self->next);
}

uint32_t stage_count(const struct stage *self, enum effect_kind kind) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->log.count; i++)
        count += self->log.list[i].kind == kind;
    return count;
}

const struct effect *stage_take(struct stage *self, enum effect_kind kind) {
    while (self->next[kind] < self->log.count) {
        const struct effect *effect = &self->log.list[self->next[kind]++];
        if (effect->kind == kind)
            return effect;
    }
    return NULL;
}

static Troupe__Envelope *unpack(const uint8_t *bytes, size_t size) {
    Troupe__Envelope *ret;
    struct failure failure;
    if (wire_unpack(&ret, bytes, size, &failure) < 0) {
        fprintf(stderr, "a message does not pass the wire: %s\n", failure.text);
        abort();
    }
    return ret;
}

const message *stage_sent(struct stage *self, Troupe__Envelope__BodyCase body) {
    const struct effect *effect;
    while ((effect = stage_take(self, EFFECT_SEND)) != NULL) {
        if (self->message != NULL)
            wire_free(&self->message);
        self->message = unpack(effect->send.bytes, effect->send.size);
        if (self->message->body_case == body)
            return self->message;
    }
    return NULL;
}

uint32_t stage_sent_count(struct stage *self, Troupe__Envelope__BodyCase body) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->log.count; i++)
        if (self->log.list[i].kind == EFFECT_SEND) {
            Troupe__Envelope *envelope =
                unpack(self->log.list[i].send.bytes, self->log.list[i].send.size);
            count += envelope->body_case == body;
            wire_free(&envelope);
        }
    return count;
}

bool stage_traced(const struct stage *self, const char *text) {
    for (uint32_t i = 0; i < self->log.count; i++)
        if (self->log.list[i].kind == EFFECT_TRACE &&
            strstr(self->log.list[i].trace.text, text) != NULL)
            return true;
    return false;
}

/* ---- events ---- */

static void step_once(struct stage *self, const struct event *event) {
    effects_reset(&self->effects);
    actor_step(self->actor, event, self->now_ns, &self->effects);
    for (uint32_t i = 0; i < self->effects.count; i++) {
        const struct effect *effect = &self->effects.list[i];
        log_effect(self, effect);
        if (effect->kind != EFFECT_COMPUTE)
            continue;
        CHECK(self->programs < PROGRAMS_HELD);
        self->program[(self->first_program + self->programs++) % PROGRAMS_HELD] = effect->compute;
    }
}

void stage_compute(struct stage *self) {
    static uint16_t choice[BATCH_ROWS_MAX];
    static struct sample_result sampled[BATCH_ROWS_MAX];
    while (self->programs > 0) {
        struct program program = self->program[self->first_program];
        self->first_program = (self->first_program + 1) % PROGRAMS_HELD;
        self->programs--;
        struct program_result result = {
            .kind = program.kind,
            .slot = program.slot,
            .layer = program.layer,
            .rows = program.rows,
            .items = program.items,
            .tag = program.tag,
        };
        uint32_t k = self->config.gate.k;
        if (program.kind == PROGRAM_LAYER && model_layer_is_moe(&self->config, program.layer)) {
            for (uint32_t i = 0; i < program.rows * k; i++)
                choice[i] = (uint16_t)((i / k + i % k) % self->config.experts);
            result.choice = choice;
            result.k = k;
        }
        if (program.kind == PROGRAM_SAMPLE) {
            memset(sampled, 0, sizeof sampled);
            for (uint32_t i = 0; i < program.rows; i++)
                sampled[i].token = self->sampled_token;
            result.sampled = sampled;
        }
        if (program.kind == PROGRAM_DRAFT) {
            static uint32_t guess[DRAFT_ROWS_MAX * DRAFTS_MAX];
            uint32_t drafting = 0;
            for (uint32_t i = 0; i < program.items; i++)
                drafting += program.draft[i].steps > 0;
            result.words = guess;
            result.words_count = drafting * self->settings.mtp_steps;
            for (uint32_t i = 0; i < result.words_count; i++)
                guess[i] = self->guessed_token + i % self->settings.mtp_steps;
        }
        step_once(self, &(struct event){.kind = EVENT_COMPUTED, .computed = &result});
    }
}

void stage_step(struct stage *self, const struct event *event) {
    step_once(self, event);
    if (!self->hold_programs)
        stage_compute(self);
}

void stage_timer(struct stage *self, uint64_t now_ns) {
    self->now_ns = now_ns;
    stage_step(self, &(struct event){.kind = EVENT_TIMER});
}

void stage_message(struct stage *self, const message *envelope) {
    size_t size = wire_packed_bytes(envelope);
    uint8_t *bytes = malloc(size);
    CHECK(bytes != NULL);
    wire_pack(envelope, bytes);
    Troupe__Envelope *unpacked = unpack(bytes, size);
    stage_step(self, &(struct event){.kind = EVENT_MESSAGE, .message = unpacked});
    wire_free(&unpacked);
    free(bytes);
}

void stage_frame(struct stage *self, const struct frame_header *header, const void *payload,
                 size_t size) {
    size_t total = (sizeof *header + size + FRAME_ALIGN - 1) / FRAME_ALIGN * FRAME_ALIGN;
    uint8_t *bytes = aligned_alloc(FRAME_ALIGN, total);
    CHECK(bytes != NULL);
    memcpy(bytes, header, sizeof *header);
    if (size > 0)
        memcpy(bytes + sizeof *header, payload, size);
    struct frame_header *sealed = (struct frame_header *)bytes;
    sealed->magic = FRAME_MAGIC;
    sealed->version = FRAME_VERSION;
    sealed->payload_bytes = (uint32_t)size;
    frame_seal(sealed);
    struct failure failure;
    if (frame_check(bytes, sizeof *header + size, 1, &failure) < 0) {
        fprintf(stderr, "a frame does not pass its check: %s\n", failure.text);
        abort();
    }
    struct frame frame = {sealed, bytes + sizeof *header};
    stage_step(self, &(struct event){.kind = EVENT_FRAME, .frame = &frame});
    free(bytes);
}

void stage_peer_lost(struct stage *self, actor_id id) {
    struct event event = {.kind = EVENT_PEER_LOST};
    event.peer.id = id;
    event.peer.incarnation = life_of(id);
    stage_step(self, &event);
}

uint64_t life_of(actor_id id) {
    return id == ACTOR_COORDINATOR ? COORDINATOR_LIFE : 7000 + (uint64_t)id;
}

message stage_envelope(actor_id from) {
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from = from;
    envelope.from_incarnation = life_of(from);
    return envelope;
}

void stage_join(struct stage *self, actor_id id) {
    self->id = id;
    stage_step(self, &(struct event){.kind = EVENT_START});
    Troupe__Welcome welcome = TROUPE__WELCOME__INIT;
    welcome.id = id;
    welcome.incarnation = OWN_LIFE;
    welcome.model_fingerprint = "fingerprint";
    welcome.heartbeat_interval_ns = (uint64_t)self->settings.heartbeat_ms * 1000000u;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_WELCOME;
    envelope.welcome = &welcome;
    stage_message(self, &envelope);
}

enum role role_of(actor_id id) {
    static const enum role ROLES[] = {ROLE_NONE,    ROLE_NONE,      ROLE_GATEWAY, ROLE_EXPERT,
                                      ROLE_SAMPLER, ROLE_ATTENTION, ROLE_CONTROL};
    CHECK(id / 10 < sizeof ROLES / sizeof *ROLES);
    return ROLES[id / 10];
}

void stage_commit(struct stage *self, const actor_id *members, uint32_t count,
                  const actor_id *holder, uint32_t holders) {
    Troupe__Member list[64];
    Troupe__Member *pointers[64];
    uint32_t layer[64], expert[64], held_by[64];
    Troupe__Commit commit = TROUPE__COMMIT__INIT;
    CHECK(count < 63 && self->config.layers * self->config.experts * (self->replicas + 1) <= 64);
    for (uint32_t i = 0; i <= count; i++) {
        troupe__member__init(&list[i]);
        list[i].id = i == count ? self->id : members[i];
        list[i].incarnation = i == count ? OWN_LIFE : life_of(members[i]);
        list[i].role = (Troupe__Role)(i == count ? self->identity.role : role_of(members[i]));
        list[i].control_address = "test://somebody";
        list[i].data_address = "test://somebody-data";
        list[i].host = self->far && role_of(list[i].id) == ROLE_EXPERT && list[i].id != self->id ? "there" : "here";
        list[i].name = "somebody";
        list[i].state = TROUPE__ACTOR_STATE__STATE_READY;
        pointers[i] = &list[i];
    }
    for (uint32_t l = 0; l < self->config.layers && holders > 0; l++)
        for (uint32_t e = 0; model_layer_is_moe(&self->config, l) && e < self->config.experts;
             e++)
            for (uint32_t r = 0; r <= self->replicas && r < holders; r++) {
                layer[commit.n_layer] = l;
                expert[commit.n_layer] = e;
                held_by[commit.n_layer++] = holder[(e + r) % holders];
            }
    commit.epoch = ++self->epoch;
    commit.serving = true;
    commit.n_member = count + 1;
    commit.member = pointers;
    commit.n_expert = commit.n_holder = commit.n_layer;
    commit.layer = layer;
    commit.expert = expert;
    commit.holder = held_by;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
    envelope.commit = &commit;
    stage_message(self, &envelope);
}

/* ---- answers ---- */

struct frame_header answer_to(const struct effect *transfer, enum frame_kind kind) {
    const struct frame_header *question = &transfer->transfer.header;
    return (struct frame_header){
        .kind = (uint16_t)kind,
        .from = question->to,
        .to = question->from,
        .from_incarnation = question->to_incarnation,
        .to_incarnation = question->from_incarnation,
        .epoch = question->epoch,
        .batch = question->batch,
        .layer = question->layer,
        .attempt = question->attempt,
        .part = question->part,
    };
}

void stage_combine(struct stage *self, const struct effect *dispatch) {
    stage_combine_piece(self, dispatch, 0, dispatch->transfer.header.items);
}

void stage_combine_piece(struct stage *self, const struct effect *dispatch, uint32_t first,
                         uint32_t items) {
    struct frame_header header = answer_to(dispatch, FRAME_COMBINE);
    header.detail = first;
    header.items = items;
    header.row_bytes = self->config.hidden * (uint32_t)sizeof(float);
    size_t before = frame_rows_offset(FRAME_COMBINE, 0, header.items, 0) - sizeof header;
    size_t size = before + (size_t)header.items * header.row_bytes;
    void *payload = calloc(1, size);
    CHECK(payload != NULL);
    stage_frame(self, &header, payload, size);
    free(payload);
}

void stage_sampled(struct stage *self, const struct effect *sample, uint32_t token) {
    struct frame_header header = answer_to(sample, FRAME_SAMPLED);
    const struct sample_spec *spec = sample->transfer.prefix;
    header.rows = sample->transfer.header.rows;
    for (uint32_t i = 0; i < header.rows; i++)
        if ((spec[i].flags & SAMPLE_FULL_LOGITS) != 0)
            header.items += self->config.vocabulary;
    size_t result_bytes = header.rows * sizeof(struct sample_result);
    size_t size = result_bytes + header.items * sizeof(uint32_t);
    struct sample_result *result = calloc(1, size);
    CHECK(result != NULL);
    uint32_t word = 0;
    for (uint32_t i = 0; i < header.rows; i++) {
        result[i].token = (spec[i].flags & SAMPLE_SCORE) != 0 ? spec[i].target : token;
        result[i].logprob = -1.0f;
        result[i].first_word = word;
        if ((spec[i].flags & SAMPLE_FULL_LOGITS) != 0)
            word += result[i].logits = self->config.vocabulary;
    }
    stage_frame(self, &header, result, size);
    free(result);
}

void stage_answer_all(struct stage *self, uint32_t token) {
    const struct effect *effect;
    while ((effect = stage_take(self, EFFECT_TRANSFER)) != NULL) {
        struct effect question = *effect; /* the log may move while it grows */
        if (question.transfer.header.kind == FRAME_DISPATCH)
            stage_combine(self, &question);
        else if (question.transfer.header.kind == FRAME_SAMPLE)
            stage_sampled(self, &question, token);
    }
}
