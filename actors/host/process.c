/* The loop of one actor: wait on the doorbell, drain frames, messages, HTTP and loaded experts,
 * then timers; each event is one actor_step, whose effects are carried out in order before the next
 * event.
 *
 * Programs (COMPUTE) run at once in this thread, with the pool's help; their COMPUTED events are
 * delivered in order as soon as the effects of the step are done, before anything else of the
 * actor. Peers are woken before each program and at the end of the effects, so that they work while
 * this process computes. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "actors/host/clock.h"
#include "actors/host/process_parts.h"
#include "actors/host/transport_nccl.h"
#include "actors/host/weights_frame.h"
#include "proto/wire.h"

#define FRAMES_PER_TURN   64
#define EVENTS_PER_TURN   256
#define TOGETHER_MAX_NS   5000000u /* for answers that are awaited together */
#define SLEEP_MAX_NS      1000000000u
#define SHUTDOWN_GRACE_NS 10000000000u /* an actor that does not EXIT in this time is ended */

/* ---- signals ---- */

static volatile sig_atomic_t stop_signals;
static struct bell *signal_bell;

static void on_signal(int number) {
    (void)number;
    stop_signals++;
    if (signal_bell != NULL)
        bell_ring(signal_bell);
}

void process_catch_signals(struct bell *bell) {
    struct sigaction action = {.sa_handler = on_signal};
    signal_bell = bell;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* ---- effects ---- */

static void post_message(struct process *self, actor_id to, void *bytes, size_t size) {
    if (self->neighbour != NULL)
        neighbour_send(self->neighbour, to, bytes, size);
    else if (mailbox_send(self->control, to, bytes, size) < 0)
        log_limited(&self->limit, TRACE_WARNING, "the queue of outgoing messages is full");
}

static void *copy_message(const struct effect *effect) {
    void *copy = malloc(effect->send.size > 0 ? effect->send.size : 1);
    ASSERT(copy != NULL);
    memcpy(copy, effect->send.bytes, effect->send.size);
    return copy;
}

static void carry_send(struct process *self, const struct effect *effect) {
    void *copy = copy_message(effect);
    enum injected fate = self->inject != NULL ? inject_message(self->inject) : INJECT_NOTHING;
    if (fate == INJECT_DROP) {
        free(copy);
    } else if (fate == INJECT_LATER) {
        inject_hold_message(self->inject, effect->send.to, copy, effect->send.size);
    } else if (weights_frame_post(self->nccl, self->id, self->identity.incarnation,
                                  effect->send.to, copy, effect->send.size,
                                  self->options->settings.frame_crc != 0)) {
        free(copy);
    } else {
        if (fate == INJECT_TWICE)
            post_message(self, effect->send.to, copy_message(effect), effect->send.size);
        post_message(self, effect->send.to, copy, effect->send.size);
    }
}

/* Over NCCL, as long as the edge is up and the frame fits; else the other transports have it. */
static bool post_between_gpus(struct process *self, struct outgoing *frame) {
    actor_id to = frame->header.to;
    if (self->nccl == NULL || !self->nccl->class->connected(self->nccl, to))
        return false;
    frame->seal = self->options->settings.frame_crc != 0;
    return self->nccl->class->post_send(self->nccl, to, frame) == 0;
}

static void post_frame(struct process *self, struct outgoing *frame) {
    actor_id to = frame->header.to;
    if (frame->reserved == NULL && post_between_gpus(self, frame))
        return;
    if (frame->reserved == NULL && to == self->placed.to)
        self->placed.lost = true;
    bool local = frame->reserved != NULL ||
                 (self->shm != NULL && self->shm->class->connected(self->shm, to));
    struct transport *transport = local ? self->shm : self->data_zmq;
    if (transport == NULL)
        transport = self->shm;
    frame->seal = !local || self->options->settings.frame_crc != 0;
    int error = transport->class->post_send(transport, to, frame);
    if (error < 0)
        log_limited(&self->limit, TRACE_WARNING, "a frame of %zu bytes to actor %u was dropped: %s",
                    frame->bytes, to, error_name(error));
}

/* What an injected fault has kept back. Returns when there is more, NEVER: nothing is. */
static uint64_t post_held(struct process *self) {
    uint64_t due_ns = NEVER;
    for (struct held *held; self->inject != NULL &&
                            (held = inject_due(self->inject, clock_now_ns(), &due_ns)) != NULL;) {
        if (held->is_frame) {
            post_frame(self, &held->frame);
        } else {
            post_message(self, held->to, held->bytes, held->size);
            held->bytes = NULL;
        }
        held_free(&held);
    }
    return due_ns;
}

struct gather {
    struct process *process;
    const struct effect *effect;
};

static void gather_rows(void *context, void *ret_rows) {
    const struct gather *gather = context;
    const struct effect *effect = gather->effect;
    engine_gather(gather->process->engine, effect->transfer.region, effect->transfer.slot,
                  effect->transfer.index, effect->transfer.count, ret_rows);
}

/* The rows are in their place already. False: they were, but no more. */
static bool take_placed(struct process *self, struct outgoing *frame) {
    if (self->placed.memory == NULL)
        return true;
    frame->reserved = self->placed.memory;
    frame->summed = self->placed.summed;
    frame->rows_crc = self->placed.crc;
    return !self->placed.lost && frame->header.to == self->placed.to;
}

static void carry_transfer(struct process *self, const struct effect *effect) {
    struct gather gather = {self, effect};
    struct outgoing frame = {
        .header = effect->transfer.header,
        .prefix = effect->transfer.prefix,
        .prefix_bytes = effect->transfer.prefix_bytes,
        .context = &gather,
        .more = effect->transfer.more,
    };
    struct frame_header *header = &frame.header;
    if (effect->transfer.region != REGION_NONE) {
        header->row_bytes = engine_row_bytes(self->engine, effect->transfer.region);
        frame.gather = gather_rows;
    }
    frame.bytes =
        frame_bytes(header->kind, header->rows, header->items, header->groups, header->row_bytes);
    frame.rows_offset =
        frame_rows_offset(header->kind, header->rows, header->items, header->groups);
    ASSERT(frame.bytes >= sizeof *header); /* actors keep frames within limits.h */
    header->magic = FRAME_MAGIC;
    header->version = FRAME_VERSION;
    header->payload_bytes = (uint32_t)(frame.bytes - sizeof *header);
    header->from = self->id;
    header->from_incarnation = self->identity.incarnation;
    if (effect->transfer.region == REGION_EXPERT_OUTPUT && !take_placed(self, &frame)) {
        log_limited(&self->limit, TRACE_WARNING, "an answer to actor %u is lost with its edge",
                    header->to);
        return;
    }
    enum injected fate = self->inject != NULL ? inject_frame(self->inject, &frame) : INJECT_NOTHING;
    if (fate == INJECT_LATER || fate == INJECT_TWICE)
        inject_hold_frame(self->inject, header->to, &frame);
    if (fate == INJECT_NOTHING || fate == INJECT_TWICE)
        post_frame(self, &frame);
}

static void flush(struct process *self) {
    if (self->shm != NULL)
        self->shm->class->flush(self->shm);
    if (self->data_zmq != NULL)
        self->data_zmq->class->flush(self->data_zmq);
    if (self->nccl != NULL)
        self->nccl->class->flush(self->nccl);
}

/* Experts write their outputs into the frame that will carry them, if that is to go through shared
 * memory and there is room for it. */
static void place_output(struct process *self, struct program *program) {
    const actor_id to = program->answer_to;
    self->placed.to = to;
    self->placed.memory = NULL;
    self->placed.lost = false;
    if (to == 0 || self->shm == NULL || self->shm->class->reserve == NULL ||
        !self->shm->class->connected(self->shm, to) ||
        (self->nccl != NULL && self->nccl->class->connected(self->nccl, to)))
        return;
    const uint32_t items = program->items;
    const size_t bytes = frame_bytes(FRAME_COMBINE, 0, items, 0,
                                     engine_row_bytes(self->engine, REGION_EXPERT_OUTPUT));
    self->placed.memory = bytes > 0 ? self->shm->class->reserve(self->shm, to, bytes) : NULL;
    if (self->placed.memory == NULL)
        return;
    program->output =
        (uint8_t *)self->placed.memory + frame_rows_offset(FRAME_COMBINE, 0, items, 0);
    program->sum = self->placed.summed = self->options->settings.frame_crc != 0;
}

/* Rows of the frame being handled may stay in it if its transport has room for that. */
static bool may_stay(struct process *self, const void *payload) {
    if (self->incoming == NULL || self->incoming_by->class->keep == NULL)
        return false;
    const struct frame *frame = &self->incoming->frame;
    const uint8_t *at = payload;
    return at >= frame->payload && at < frame->payload + frame->header->payload_bytes &&
           self->incoming_by->class->keep(self->incoming_by, self->incoming);
}

void process_take_in(void *process) {
    struct process *self = process;
    if (self->keeps)
        engine_take_in(self->engine);
    self->keeps = false;
}

/* Frames that the program has left no use for are released. */
static void release_kept(struct process *self) {
    if (!self->keeps || engine_keeps(self->engine))
        return;
    self->shm->class->release_kept(self->shm);
    self->keeps = false;
}

static void carry_compute(struct process *self, const struct effect *effect) {
    ASSERT(self->engine != NULL && self->computed_count < COMPUTED_MAX);
    struct program program = effect->compute;
    flush(self);
    if (self->inject != NULL)
        inject_compute(self->inject, &program);
    if (program.kind == PROGRAM_EXPERT)
        place_output(self, &program);
    if (program.kind == PROGRAM_SCATTER)
        self->keeps |= program.stays = may_stay(self, program.payload);
    uint32_t at = (self->computed_first + self->computed_count++) % COMPUTED_MAX;
    uint64_t began_ns = clock_now_ns();
    pool_begin(self->pool);
    engine_run(self->engine, &program, &self->computed[at]);
    pool_end(self->pool);
    release_kept(self);
    self->placed.crc = self->computed[at].output_crc;
    cache_ahead_look(self->cache_ahead);
    self->computed[at].began_ns = began_ns;
    self->computed[at].ended_ns = clock_now_ns();
}

/* Copies the part "kind=..." of a data address. */
static bool address_part(const char *address, const char *kind,
                         char ret[static ADDRESS_BYTES_MAX]) {
    size_t length = strlen(kind);
    for (const char *at = address; at != NULL; at = strchr(at, ';')) {
        at += *at == ';';
        if (strncmp(at, kind, length) == 0 && at[length] == '=') {
            const char *value = at + length + 1;
            snprintf(ret, ADDRESS_BYTES_MAX, "%.*s", (int)strcspn(value, ";"), value);
            return true;
        }
    }
    return false;
}

/* Both ends decide alike: shared memory if the host is the same and both offer it, else ZeroMQ. */
static void connect_data(struct process *self, const struct effect *effect) {
    char part[ADDRESS_BYTES_MAX];
    struct failure failure;
    const char *address = effect->connect.data_address;
    actor_id id = effect->connect.id;
    if (id == self->placed.to)
        self->placed.lost = true; /* its edge may be another one */
    bool local = self->shm != NULL && strcmp(effect->connect.host, self->host) == 0 &&
                 address_part(address, "shm", part);
    struct transport *transport = local ? self->shm : self->data_zmq;
    if (!local && (transport == NULL || !address_part(address, "zmq", part))) {
        log_line(TRACE_ERROR, "no data plane reaches actor %u at '%s' on host '%s'", id, address,
                 effect->connect.host);
        return;
    }
    struct transport *other = local ? self->data_zmq : self->shm;
    if (other != NULL)
        other->class->disconnect(other, id);
    int error =
        transport->class->connect(transport, id, effect->connect.incarnation, part, &failure);
    if (local && error == ERR_NO_MEMORY && other != NULL && address_part(address, "zmq", part)) {
        log_line(TRACE_WARNING, "rows to actor %u go over %s, more slowly: %s", id,
                 other->class->name, failure.text);
        error = other->class->connect(other, id, effect->connect.incarnation, part, &failure);
    }
    if (error < 0)
        log_line(error == ERR_NOT_FOUND ? TRACE_INFO : TRACE_ERROR, "no edge to actor %u: %s", id,
                 failure.text);
    else
        log_line(TRACE_DEBUG, "edge to actor %u over %s", id, transport->class->name);
    /* With a GPU on both ends: an edge between them as well, which is used once it is up. */
    if (self->nccl != NULL && address_part(address, "nccl", part) &&
        self->nccl->class->connect(self->nccl, id, effect->connect.incarnation, part, &failure) < 0)
        log_line(TRACE_ERROR, "no edge between GPUs to actor %u: %s", id, failure.text);
}

/* For weights only: should it break down, they come over the control plane, and nobody is lost. */
static void connect_weights(struct process *self, const struct effect *effect) {
    char part[ADDRESS_BYTES_MAX];
    struct failure failure;
    if (self->nccl != NULL && address_part(effect->connect.data_address, "nccl", part) &&
        self->nccl->class->connect(self->nccl, effect->connect.id, effect->connect.incarnation,
                                   part, &failure) < 0)
        log_line(TRACE_WARNING, "no edge between GPUs to actor %u: %s", effect->connect.id,
                 failure.text);
    self->for_weights[effect->connect.id % ACTORS_MAX] = true;
}

static void carry_connect(struct process *self, const struct effect *effect) {
    if (self->neighbour != NULL)
        neighbour_connect(self->neighbour, effect->connect.id, effect->connect.control_address);
    else
        mailbox_connect(self->control, effect->connect.id, effect->connect.control_address);
    self->for_weights[effect->connect.id % ACTORS_MAX] = false;
    if (effect->connect.data && effect->connect.data_address[0] != 0)
        connect_data(self, effect);
    else if (effect->connect.data_address[0] != 0)
        connect_weights(self, effect);
}

static void carry_disconnect(struct process *self, const struct effect *effect) {
    actor_id id = effect->connect.id;
    if (id == self->placed.to)
        self->placed.lost = true;
    if (self->neighbour != NULL)
        neighbour_disconnect(self->neighbour, id);
    else
        mailbox_disconnect(self->control, id);
    if (self->shm != NULL)
        self->shm->class->disconnect(self->shm, id);
    if (self->data_zmq != NULL)
        self->data_zmq->class->disconnect(self->data_zmq, id);
    if (self->nccl != NULL)
        self->nccl->class->disconnect(self->nccl, id);
}

static void carry_out(struct process *self, const struct effect *effect) {
    switch (effect->kind) {
    case EFFECT_SEND:
        carry_send(self, effect);
        break;
    case EFFECT_TRANSFER:
        carry_transfer(self, effect);
        break;
    case EFFECT_COMPUTE:
        carry_compute(self, effect);
        break;
    case EFFECT_STREAM:
        if (effect->stream.client >= JOURNAL_CLIENTS)
            process_journal_take(self, effect);
        else if (effect->stream.client >= ADMIN_CLIENTS)
            http_stream(self->admin_http, effect);
        else if (self->http != NULL)
            http_stream(self->http, effect);
        break;
    case EFFECT_RELAY:
    case EFFECT_FAULT:
    case EFFECT_JOURNAL:
        process_carry_admin(self, effect);
        break;
    case EFFECT_LOAD:
        if (effect->load.image != NULL) {
            loader_add_image(self->loader, effect->load.layer, effect->load.expert,
                             effect->load.operation, effect->load.image, effect->load.image_bytes);
            break;
        }
        loader_add(self->loader, effect->load.layer, effect->load.expert, effect->load.operation,
                   effect->load.urgent, self->inject != NULL ? inject_load(self->inject) : 0);
        break;
    case EFFECT_UNLOAD:
        engine_expert_drop(self->engine, effect->load.layer, effect->load.expert);
        break;
    case EFFECT_CONNECT:
        carry_connect(self, effect);
        break;
    case EFFECT_DISCONNECT:
        carry_disconnect(self, effect);
        break;
    case EFFECT_TRACE:
        log_line(effect->trace.level, "%s", effect->trace.text);
        break;
    case EFFECT_EXIT:
        log_line(effect->exit.code == 0 ? TRACE_INFO : TRACE_ERROR, "exits: %s",
                 effect->exit.reason != NULL ? effect->exit.reason : "");
        self->exiting = true;
        self->exit_code = effect->exit.code == 0 ? 0 : EXIT_FAILED;
        break;
    }
}

static void step_once(struct process *self, const struct event *event) {
    effects_reset(&self->effects);
    actor_step(self->actor, event, clock_now_ns(), &self->effects);
    for (uint32_t i = 0; i < self->effects.count; i++)
        carry_out(self, &self->effects.list[i]);
    flush(self);
}

void process_step(struct process *self, const struct event *event) {
    step_once(self, event);
    while (self->computed_count > 0 && !self->exiting) {
        struct program_result result = self->computed[self->computed_first];
        self->computed_first = (self->computed_first + 1) % COMPUTED_MAX;
        self->computed_count--;
        step_once(self, &(struct event){.kind = EVENT_COMPUTED, .computed = &result});
    }
}

/* ---- events ---- */

/* A piece of weights, as if it had come over the control plane. */
static void take_weights(struct process *self, const struct frame *frame) {
    struct failure failure;
    message *envelope = weights_frame_take(frame, &failure);
    if (envelope == NULL) {
        log_limited(&self->limit, TRACE_WARNING, "dropped: %s", failure.text);
        return;
    }
    if (self->inject == NULL || !inject_deaf(self->inject))
        process_step(self, &(struct event){.kind = EVENT_MESSAGE, .message = envelope});
    wire_free(&envelope);
}

static bool drain_frames(struct process *self, struct transport *transport) {
    struct incoming incoming;
    bool any = false;
    if (transport == NULL)
        return false;
    transport->class->progress(transport);
    for (int i = 0; i < FRAMES_PER_TURN && !self->exiting; i++) {
        if (!transport->class->receive(transport, &incoming))
            break;
        self->incoming = &incoming;
        self->incoming_by = transport;
        if (incoming.frame.header->kind == FRAME_MESSAGE)
            take_weights(self, &incoming.frame);
        else if (self->inject == NULL || !inject_deaf(self->inject))
            process_step(self, &(struct event){.kind = EVENT_FRAME, .frame = &incoming.frame});
        self->incoming = NULL;
        transport->class->release(transport, &incoming);
        any = true;
    }
    return any;
}

/* Peers whose edge between GPUs broke down under frames. */
static bool drain_lost(struct process *self) {
    struct event event = {.kind = EVENT_PEER_LOST};
    bool any = false;
    while (self->nccl != NULL && !self->exiting &&
           transport_nccl_lost(self->nccl, &event.peer.id, &event.peer.incarnation)) {
        any = true;
        if (!self->for_weights[event.peer.id % ACTORS_MAX])
            process_step(self, &event);
    }
    return any;
}

/* The host fills in frame_header.from, so it must know what the coordinator called this actor. */
static void learn_id(struct process *self, const message *envelope) {
    if (envelope->body_case == TROUPE__ENVELOPE__BODY_WELCOME &&
        envelope->welcome->incarnation == self->identity.incarnation)
        self->id = envelope->welcome->id;
}

static bool drain_messages(struct process *self) {
    bool any = false;
    for (int i = 0; i < EVENTS_PER_TURN && !self->exiting; i++) {
        message *envelope = self->neighbour != NULL ? neighbour_receive(self->neighbour)
                                                    : mailbox_receive(self->control);
        if (envelope == NULL)
            break;
        log_line(TRACE_DEBUG, "<- %s from %u", wire_name(envelope), envelope->from);
        learn_id(self, envelope);
        if (self->inject == NULL || !inject_deaf(self->inject))
            process_step(self, &(struct event){.kind = EVENT_MESSAGE, .message = envelope});
        wire_free(&envelope);
        any = true;
    }
    return any;
}

static bool drain_http(struct process *self, struct http *http) {
    bool any = false;
    for (int i = 0; i < EVENTS_PER_TURN && http != NULL && !self->exiting; i++) {
        struct http_event *arrived = http_receive(http);
        if (arrived == NULL)
            break;
        struct event event = {.kind = EVENT_HTTP_REQUEST, .http = &arrived->request};
        arrived->request.admin = http == self->admin_http;
        self->request = &arrived->request;
        if (arrived->gone && self->relays != NULL)
            relays_gone(self->relays, arrived->request.client);
        if (arrived->gone)
            event = (struct event){.kind = EVENT_CLIENT_GONE, .client = arrived->request.client};
        process_step(self, &event);
        http_event_free(&arrived);
        any = true;
    }
    return any;
}

static bool drain_loaded(struct process *self) {
    bool any = false;
    for (int i = 0; i < EVENTS_PER_TURN && self->loader != NULL && !self->exiting; i++) {
        struct loaded *loaded = loader_take(self->loader);
        if (loaded == NULL)
            break;
        struct event event = {.kind = EVENT_LOADED};
        event.loaded.layer = loaded->layer;
        event.loaded.expert = loaded->expert;
        event.loaded.operation = loaded->operation;
        event.loaded.bytes = loaded->bytes;
        if (loaded->weights != NULL) {
            engine_expert_publish(self->engine, loaded->layer, loaded->expert, &loaded->weights);
        } else {
            event.loaded.error = loaded->failure.code;
            event.loaded.text = loaded->failure.text;
        }
        process_step(self, &event);
        loaded_free(&loaded);
        any = true;
    }
    return any;
}

/* While answers of several peers are due, one wake-up for all of them; but not for long, should one
 * be lost or late. */
static void sleep_until_rung(struct process *self, uint32_t seen, uint64_t sleep_ns,
                             uint64_t spin_ns) {
    struct transport *shm = self->shm;
    uint32_t awaited = shm != NULL ? shm->awaited : 0;
    if (awaited <= 1) {
        bell_wait(&self->bell, seen, 1, sleep_ns, spin_ns);
        return;
    }
    uint64_t begin = clock_now_ns();
    bool cut = sleep_ns > TOGETHER_MAX_NS;
    bell_wait(&self->bell, seen, awaited, cut ? TOGETHER_MAX_NS : sleep_ns, spin_ns);
    if (cut && bell_seen(&self->bell) - seen < awaited && clock_now_ns() - begin >= TOGETHER_MAX_NS)
        shm->class->await_none(shm);
}

int process_stop_signals(void) {
    return stop_signals;
}

bool process_turn(struct process *self, uint64_t *ret_until_ns) {
    bool any = drain_frames(self, self->shm);
    any |= drain_frames(self, self->data_zmq);
    any |= drain_frames(self, self->nccl);
    any |= drain_lost(self);
    any |= drain_messages(self);
    any |= drain_http(self, self->http);
    any |= drain_http(self, self->admin_http);
    for (const struct event *event;
         (event = process_journal_event(self, clock_now_ns())) != NULL;)
        process_step(self, event);
    any |= drain_loaded(self);
    uint64_t held_ns = post_held(self);
    if (held_ns != NEVER)
        flush(self);
    uint64_t now = clock_now_ns(), due = actor_deadline(self->actor);
    if (due <= now && !self->exiting) {
        process_step(self, &(struct event){.kind = EVENT_TIMER});
        any = true;
    }
    *ret_until_ns = due;
    uint64_t edges_ns = self->nccl != NULL ? transport_nccl_deadline(self->nccl) : NEVER;
    if (edges_ns < *ret_until_ns)
        *ret_until_ns = edges_ns > now ? edges_ns : now;
    if (held_ns < *ret_until_ns)
        *ret_until_ns = held_ns > now ? held_ns : now;
    return any;
}

static void loop(struct process *self) {
    uint64_t spin_ns = (uint64_t)self->options->settings.spin_us * 1000u, end_ns = NEVER, until;
    int signals = 0;
    process_step(self, &(struct event){.kind = EVENT_START});
    while (!self->exiting) {
        uint32_t seen = bell_seen(&self->bell);
        bool any = process_turn(self, &until);
        uint64_t now = clock_now_ns();
        if (stop_signals > signals && !self->exiting) {
            signals = stop_signals;
            end_ns = end_ns == NEVER ? now + SHUTDOWN_GRACE_NS
                                     : now; /* the second signal ends at once */
            process_step(self, &(struct event){.kind = EVENT_SHUTDOWN});
            any = true;
        }
        if (now >= end_ns) {
            log_line(TRACE_WARNING, "ended before everything admitted was finished");
            break;
        }
        if (any || self->exiting)
            continue;
        if (end_ns < until)
            until = end_ns;
        uint64_t sleep_ns = until <= now                  ? 0
                            : until - now < SLEEP_MAX_NS ? until - now
                                                         : SLEEP_MAX_NS;
        sleep_until_rung(self, seen, sleep_ns, spin_ns);
    }
}

void process_prepare(struct process *self, enum role role, const struct options *options) {
    self->role = role;
    self->options = options;
    snprintf(self->name, sizeof self->name, "%s",
             options->name != NULL ? options->name : role_name(role));
    effects_init(&self->effects);
}

void process_share(struct process *self, const struct shared_host *shared) {
    self->together = shared->neighbours;
    self->bell = (struct bell){.page = shared->bell->page};
    self->pool = shared->pool;
}

int process_run(enum role role, const struct options *options) {
    struct process *self = calloc(1, sizeof *self);
    struct failure failure = {0};
    ASSERT(self != NULL);
    process_prepare(self, role, options);
    /* Under a supervisor the run directory keeps the log and only what is wrong goes to the
     * terminal. */
    bool quiet = options->log != NULL && !options->verbose;
    log_open(&(struct log_options){
        .name = self->name,
        .file = options->log,
        .file_level = options->verbose ? TRACE_DEBUG : TRACE_INFO,
        .stderr_level = options->verbose ? TRACE_DEBUG
                        : quiet          ? TRACE_WARNING
                                         : TRACE_INFO,
    });
    char title[16]; /* what ps and top show */
    snprintf(title, sizeof title, "troupe:%.8s", self->name);
    prctl(PR_SET_NAME, title);
    numerics_enter();
    int error = process_open(self, &failure);
    if (error < 0) {
        log_line(TRACE_ERROR, "cannot start: %s", failure.text);
        self->exit_code =
            error == ERR_NO_MEMORY || error == ERR_IO ? EXIT_FAILED : EXIT_CONFIGURATION;
    } else {
        log_line(TRACE_INFO, "%s, %s, listening at %s", self->kernels->name, self->host,
                 self->identity.control_address);
        loop(self);
    }
    int exit_code = self->exit_code;
    process_close(self);
    free(self);
    return exit_code;
}
