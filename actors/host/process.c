/* The loop of one actor: wait on the doorbell, drain frames, messages, HTTP and loaded experts, then timers; each event is one
 * actor_step, whose effects are carried out in order before the next event.
 *
 * Programs (COMPUTE) run at once in this thread, with the pool's help; their COMPUTED events are delivered in order as soon as
 * the effects of the step are done, before anything else of the actor. Peers are woken before each program and at the end of the
 * effects, so that they work while this process computes. */
#include "actors/host/process.h"

#include <hwloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>
#include <zmq.h>

#include "actors/actors.h"
#include "actors/host/bell.h"
#include "actors/host/clock.h"
#include "actors/host/files.h"
#include "actors/host/http.h"
#include "actors/host/loader.h"
#include "actors/host/log.h"
#include "actors/host/mailbox.h"
#include "actors/host/pool.h"
#include "actors/host/transport.h"
#include "actors/host/version.h"
#include "proto/wire.h"

#define COMPUTED_MAX       256             /* programs of one step that have not been delivered */
#define FRAMES_PER_TURN    64
#define EVENTS_PER_TURN    256
#define SLEEP_MAX_NS       1000000000u
#define WAITING_CONTROL    (32u << 20)     /* bytes for a peer that does not take its messages */
#define WAITING_DATA       (256u << 20)
#define DRAIN_MS           200
#define SHUTDOWN_GRACE_NS  10000000000u    /* an actor that does not EXIT in this time is ended */
#define STEM_BYTES         100

struct process {
    enum role role;
    const struct options *options;
    struct actor_identity identity;
    char name[64], host[ADDRESS_BYTES_MAX], stem[STEM_BYTES], coordinator[ADDRESS_BYTES_MAX],
        data_address[ADDRESS_BYTES_MAX], control_bind[ADDRESS_BYTES_MAX], data_bind[ADDRESS_BYTES_MAX];
    void *zmq;
    struct bell bell;
    struct model_directory directory;
    struct tokenizer *tokenizer;
    const struct kernels *kernels;
    struct pool *pool;
    struct engine *engine;
    struct loader *loader;
    struct mailbox *control;
    struct transport *shm, *data_zmq; /* NULL: not used */
    struct http *http;
    struct actor *actor;
    struct effects effects;
    actor_id id; /* from WELCOME */
    struct program_result computed[COMPUTED_MAX];
    uint32_t computed_first, computed_count;
    bool exiting;
    int exit_code;
    struct log_limit limit;
};

/* ---- signals ---- */

static volatile sig_atomic_t stop_signals;
static struct bell *signal_bell;

static void on_signal(int number) {
    (void)number;
    stop_signals++;
    if (signal_bell != NULL)
        bell_ring(signal_bell);
}

static void catch_signals(struct bell *bell) {
    struct sigaction action = {.sa_handler = on_signal};
    signal_bell = bell;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* ---- effects ---- */

static void carry_send(struct process *self, const struct effect *effect) {
    void *copy = malloc(effect->send.size > 0 ? effect->send.size : 1);
    ASSERT(copy != NULL);
    memcpy(copy, effect->send.bytes, effect->send.size);
    if (mailbox_send(self->control, effect->send.to, copy, effect->send.size) < 0)
        log_limited(&self->limit, TRACE_WARNING, "the queue of outgoing messages is full");
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

static void carry_transfer(struct process *self, const struct effect *effect) {
    struct gather gather = {self, effect};
    struct outgoing frame = {
        .header = effect->transfer.header,
        .prefix = effect->transfer.prefix,
        .prefix_bytes = effect->transfer.prefix_bytes,
        .context = &gather,
    };
    struct frame_header *header = &frame.header;
    if (effect->transfer.region != REGION_NONE) {
        header->row_bytes = engine_row_bytes(self->engine, effect->transfer.region);
        frame.gather = gather_rows;
    }
    frame.bytes = frame_bytes(header->kind, header->rows, header->items, header->groups, header->row_bytes);
    frame.rows_offset = frame_rows_offset(header->kind, header->rows, header->items, header->groups);
    ASSERT(frame.bytes >= sizeof *header); /* actors keep frames within limits.h */
    header->magic = FRAME_MAGIC;
    header->version = FRAME_VERSION;
    header->payload_bytes = (uint32_t)(frame.bytes - sizeof *header);
    header->from = self->id;
    header->from_incarnation = self->identity.incarnation;
    bool local = self->shm != NULL && self->shm->class->connected(self->shm, header->to);
    struct transport *transport = local ? self->shm : self->data_zmq;
    if (transport == NULL)
        transport = self->shm;
    frame.seal = !local || self->options->settings.frame_crc != 0;
    int error = transport->class->post_send(transport, header->to, &frame);
    if (error < 0)
        log_limited(&self->limit, TRACE_WARNING, "a frame of %zu bytes to actor %u was dropped: %s",
                    frame.bytes, header->to, error_name(error));
}

static void flush(struct process *self) {
    if (self->shm != NULL)
        self->shm->class->flush(self->shm);
    if (self->data_zmq != NULL)
        self->data_zmq->class->flush(self->data_zmq);
}

static void carry_compute(struct process *self, const struct effect *effect) {
    ASSERT(self->engine != NULL && self->computed_count < COMPUTED_MAX);
    flush(self);
    uint32_t at = (self->computed_first + self->computed_count++) % COMPUTED_MAX;
    engine_run(self->engine, &effect->compute, &self->computed[at]);
}

/* Copies the part "kind=..." of a data address. */
static bool address_part(const char *address, const char *kind, char ret[static ADDRESS_BYTES_MAX]) {
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
    int error = transport->class->connect(transport, id, effect->connect.incarnation, part, &failure);
    if (error < 0)
        log_line(error == ERR_NOT_FOUND ? TRACE_INFO : TRACE_ERROR, "no edge to actor %u: %s", id,
                 failure.text);
    else
        log_line(TRACE_DEBUG, "edge to actor %u over %s", id, transport->class->name);
}

static void carry_connect(struct process *self, const struct effect *effect) {
    mailbox_connect(self->control, effect->connect.id, effect->connect.control_address);
    if (effect->connect.data && effect->connect.data_address[0] != 0)
        connect_data(self, effect);
}

static void carry_disconnect(struct process *self, const struct effect *effect) {
    actor_id id = effect->connect.id;
    mailbox_disconnect(self->control, id);
    if (self->shm != NULL)
        self->shm->class->disconnect(self->shm, id);
    if (self->data_zmq != NULL)
        self->data_zmq->class->disconnect(self->data_zmq, id);
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
        if (self->http != NULL)
            http_stream(self->http, effect);
        break;
    case EFFECT_LOAD:
        loader_add(self->loader, effect->load.layer, effect->load.expert, effect->load.operation);
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

/* One event with all that follows from it. */
static void step(struct process *self, const struct event *event) {
    step_once(self, event);
    while (self->computed_count > 0 && !self->exiting) {
        struct program_result result = self->computed[self->computed_first];
        self->computed_first = (self->computed_first + 1) % COMPUTED_MAX;
        self->computed_count--;
        step_once(self, &(struct event){.kind = EVENT_COMPUTED, .computed = &result});
    }
}

/* ---- events ---- */

static bool drain_frames(struct process *self, struct transport *transport) {
    struct incoming incoming;
    bool any = false;
    if (transport == NULL)
        return false;
    transport->class->progress(transport);
    for (int i = 0; i < FRAMES_PER_TURN && !self->exiting; i++) {
        if (!transport->class->receive(transport, &incoming))
            break;
        step(self, &(struct event){.kind = EVENT_FRAME, .frame = &incoming.frame});
        transport->class->release(transport, &incoming);
        any = true;
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
        message *envelope = mailbox_receive(self->control);
        if (envelope == NULL)
            break;
        log_line(TRACE_DEBUG, "<- %s from %u", wire_name(envelope), envelope->from);
        learn_id(self, envelope);
        step(self, &(struct event){.kind = EVENT_MESSAGE, .message = envelope});
        wire_free(&envelope);
        any = true;
    }
    return any;
}

static bool drain_http(struct process *self) {
    bool any = false;
    for (int i = 0; i < EVENTS_PER_TURN && self->http != NULL && !self->exiting; i++) {
        struct http_event *arrived = http_receive(self->http);
        if (arrived == NULL)
            break;
        struct event event = {.kind = EVENT_HTTP_REQUEST, .http = &arrived->request};
        if (arrived->gone)
            event = (struct event){.kind = EVENT_CLIENT_GONE, .client = arrived->request.client};
        step(self, &event);
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
        step(self, &event);
        loaded_free(&loaded);
        any = true;
    }
    return any;
}

static void loop(struct process *self) {
    uint64_t spin_ns = (uint64_t)self->options->settings.spin_us * 1000u, end_ns = NEVER;
    int signals = 0;
    step(self, &(struct event){.kind = EVENT_START});
    while (!self->exiting) {
        uint32_t seen = bell_seen(&self->bell);
        bool any = drain_frames(self, self->shm);
        any |= drain_frames(self, self->data_zmq);
        any |= drain_messages(self);
        any |= drain_http(self);
        any |= drain_loaded(self);
        uint64_t now = clock_now_ns();
        if (stop_signals > signals && !self->exiting) {
            signals = stop_signals;
            end_ns = end_ns == NEVER ? now + SHUTDOWN_GRACE_NS : now; /* the second signal ends at once */
            step(self, &(struct event){.kind = EVENT_SHUTDOWN});
        }
        if (now >= end_ns) {
            log_line(TRACE_WARNING, "ended before everything admitted was finished");
            break;
        }
        uint64_t due = actor_deadline(self->actor);
        if (due <= now && !self->exiting) {
            step(self, &(struct event){.kind = EVENT_TIMER});
            any = true;
        }
        if (any || self->exiting)
            continue;
        uint64_t until = due < end_ns ? due : end_ns;
        uint64_t sleep_ns = until - now < SLEEP_MAX_NS ? until - now : SLEEP_MAX_NS;
        bell_wait(&self->bell, seen, sleep_ns, spin_ns);
    }
}

/* ---- opening ---- */

void process_run_id(const char *coordinator_address, char ret[static 17]) {
    uint64_t hash = 0xcbf29ce484222325u ^ getuid(); /* FNV-1a */
    for (const char *at = coordinator_address; *at != 0; at++)
        hash = (hash ^ (uint8_t)*at) * 0x100000001b3u;
    snprintf(ret, 17, "%016llx", (unsigned long long)hash);
}

int coordinator_address_in(const char *run_dir, char *ret, size_t room, struct failure *failure) {
    char *real = realpath(run_dir, NULL);
    if (real == NULL)
        return fail(failure, ERR_NOT_FOUND, "there is no run directory %s", run_dir);
    int size = snprintf(ret, room, "ipc://%s/coordinator.control", real);
    free(real);
    /* sun_path holds 107 characters; the longest name here is that of an actor's socket */
    if ((size_t)size >= room || size > 90)
        return fail(failure, ERR_TOO_LARGE, "the path of the run directory %s is too long for sockets: "
                    "choose a shorter --run-dir", run_dir);
    return 0;
}

const struct kernels *options_kernels(const struct options *options, struct failure *failure) {
    static const char *const names[] = {"scalar", "avx512", "amx"};
    enum isa isa = ISA_BEST;
    for (int i = 0; i < 3; i++) {
        if (strcmp(options->isa, names[i]) == 0)
            isa = (enum isa)i;
    }
    return kernels_select(strcmp(options->numerics, "f32") == 0 ? PROFILE_F32 : PROFILE_BF16, isa,
                          failure);
}

static int pin(const char *cpus, struct failure *failure) {
    hwloc_topology_t topology;
    hwloc_bitmap_t set = hwloc_bitmap_alloc();
    int error = 0;
    if (cpus[0] == 0 || hwloc_bitmap_list_sscanf(set, cpus) != 0 || hwloc_bitmap_iszero(set))
        error = fail(failure, ERR_INVALID, "--cpus: expected a list such as 0-3,8, found '%s'", cpus);
    if (error == 0) {
        hwloc_topology_init(&topology);
        hwloc_topology_load(topology);
        if (hwloc_set_cpubind(topology, set, HWLOC_CPUBIND_PROCESS) != 0)
            error = fail(failure, ERR_INVALID, "--cpus: this process may not run on '%s'", cpus);
        hwloc_topology_destroy(topology);
    }
    hwloc_bitmap_free(set);
    return error;
}

static bool has_data_plane(enum role role) {
    return role == ROLE_ATTENTION || role == ROLE_EXPERT || role == ROLE_SAMPLER;
}

/* Where the inboxes listen, and where the coordinator is. */
static int choose_addresses(struct process *self, struct failure *failure) {
    const struct options *options = self->options;
    char in_run_dir[ADDRESS_BYTES_MAX] = "";
    if (options->run_dir != NULL) {
        int error = coordinator_address_in(options->run_dir, in_run_dir, sizeof in_run_dir, failure);
        if (error < 0)
            return error;
    }
    int directory = (int)(strlen(in_run_dir) - strlen("/coordinator.control"));
    const char *any = "tcp://*:*";
    if (options->bind != NULL)
        snprintf(self->control_bind, sizeof self->control_bind, "%s", options->bind);
    else if (self->role == ROLE_COORDINATOR)
        snprintf(self->control_bind, sizeof self->control_bind, "%s", in_run_dir[0] != 0 ? in_run_dir : any);
    else if (in_run_dir[0] != 0)
        snprintf(self->control_bind, sizeof self->control_bind, "%.*s/%d.control", directory,
                 in_run_dir, (int)getpid());
    else
        snprintf(self->control_bind, sizeof self->control_bind, "%s", any);
    if (options->bind_data != NULL)
        snprintf(self->data_bind, sizeof self->data_bind, "%s", options->bind_data);
    else if (in_run_dir[0] != 0 && options->bind == NULL)
        snprintf(self->data_bind, sizeof self->data_bind, "%.*s/%d.data", directory, in_run_dir,
                 (int)getpid());
    else
        snprintf(self->data_bind, sizeof self->data_bind, "%s", any);
    if (options->coordinator != NULL)
        snprintf(self->coordinator, sizeof self->coordinator, "%s", options->coordinator);
    else if (in_run_dir[0] != 0)
        snprintf(self->coordinator, sizeof self->coordinator, "%s", in_run_dir);
    else if (self->role != ROLE_COORDINATOR)
        return fail(failure, ERR_INVALID, "say where the coordinator is: --coordinator tcp://host:port "
                    "or --run-dir DIR");
    return 0;
}

static void *accept_message(const void *bytes, size_t size, struct failure *failure) {
    message *envelope = NULL;
    return wire_unpack(&envelope, bytes, size, failure) < 0 ? NULL : envelope;
}

static void discard_message(void *item) {
    message *envelope = item;
    wire_free(&envelope);
}

static int open_control(struct process *self, struct failure *failure) {
    struct mailbox_options mailbox = {
        .name = "control",
        .context = self->zmq,
        .bind = self->control_bind,
        .bell = &self->bell,
        .message_max = CONTROL_MESSAGE_MAX,
        .waiting_bytes_max = WAITING_CONTROL,
        .accept = accept_message,
        .discard = discard_message,
    };
    int error = mailbox_open(&self->control, &mailbox, failure);
    if (error == 0 && self->role == ROLE_COORDINATOR)
        snprintf(self->coordinator, sizeof self->coordinator, "%s", mailbox_address(self->control));
    return error;
}

static int open_bell(struct process *self, struct failure *failure) {
    char name[BELL_NAME_BYTES];
    char run[17];
    process_run_id(self->coordinator, run);
    snprintf(self->stem, sizeof self->stem, "troupe-%s-%d-%016llx", run, (int)getpid(),
             (unsigned long long)self->identity.incarnation);
    snprintf(name, sizeof name, "%s.bell", self->stem);
    bool shared = has_data_plane(self->role) && strcmp(self->options->transport, "zmq") != 0;
    int error = bell_create(&self->bell, shared ? name : NULL, self->identity.incarnation, failure);
    if (error == 0)
        catch_signals(&self->bell);
    return error;
}

/* The first size of a ring: at least four of the largest frames that the knobs make usual. Larger ones make their ring grow. */
static uint64_t ring_bytes(const struct process *self) {
    const struct model_config *config = model_config(self->directory.model);
    uint32_t rows = self->options->settings.frame_rows;
    size_t frame = frame_bytes(FRAME_COMBINE, rows, rows, 0, config->hidden * 4);
    uint64_t knob = (uint64_t)self->options->settings.ring_kib << 10;
    return 4 * (uint64_t)frame > knob ? 4 * (uint64_t)frame : knob;
}

static int open_data(struct process *self, struct failure *failure) {
    const char *want = self->options->transport;
    struct transport_options transport = {
        .name = self->stem,
        .incarnation = self->identity.incarnation,
        .bell = &self->bell,
        .ring_bytes = ring_bytes(self),
        .bind = self->data_bind,
        .zmq_context = self->zmq,
        .check_crc = self->options->settings.frame_crc != 0,
        .waiting_bytes_max = WAITING_DATA,
    };
    int error = 0;
    char *at = self->data_address;
    size_t room = sizeof self->data_address;
    if (strcmp(want, "zmq") != 0) {
        error = transport_shm_open(&self->shm, &transport, failure);
        if (error == 0) {
            int used = snprintf(at, room, "shm=%s;", self->shm->address);
            at += used;
            room -= (size_t)used;
        }
    }
    if (error == 0 && strcmp(want, "shm") != 0) {
        error = transport_zmq_open(&self->data_zmq, &transport, failure);
        if (error == 0 && snprintf(at, room, "zmq=%s", self->data_zmq->address) >= (int)room)
            error = fail(failure, ERR_TOO_LARGE, "the data address %s does not fit into %d bytes",
                         self->data_zmq->address, ADDRESS_BYTES_MAX);
    }
    return error;
}

static int open_engine(struct process *self, struct failure *failure) {
    const struct settings *settings = &self->options->settings;
    int error = pool_open(&self->pool, (int)settings->threads, failure);
    if (error < 0)
        return error;
    struct engine_options engine = {
        .role = ENGINE_ATTENTION,
        .kernels = self->kernels,
        .parallel = pool_parallel(self->pool),
        .batch_rows = settings->batch_tokens,
        .batch_slots = 1,
        .pages = settings->kv_cache_tokens / PAGE_TOKENS,
        .gate_top_p = (float)settings->gate_top_p,
    };
    if (self->role == ROLE_EXPERT) {
        engine.role = ENGINE_EXPERT;
        engine.batch_rows = settings->frame_rows;
    } else if (self->role == ROLE_SAMPLER) {
        engine.role = ENGINE_SAMPLER;
    }
    error = engine_open(&self->engine, self->directory.model, &engine, failure);
    if (error == 0 && self->role == ROLE_EXPERT)
        error = loader_open(&self->loader, &self->directory, self->kernels, &self->bell, failure);
    model_directory_forget(&self->directory);
    return error;
}

static void name_served_model(const struct options *options, char *ret, size_t room) {
    char *real = options->served_model == NULL ? realpath(options->model, NULL) : NULL;
    const char *slash = real != NULL ? strrchr(real, '/') : NULL;
    snprintf(ret, room, "%s", options->served_model != NULL ? options->served_model
                              : slash != NULL && slash[1] != 0 ? slash + 1 : "model");
    free(real);
}

static int open_gateway(struct process *self, struct failure *failure) {
    const struct options *options = self->options;
    int error = tokenizer_directory_open(&self->tokenizer, options->model, failure);
    if (error < 0)
        return error;
    char served[256];
    struct failure chat = {0};
    name_served_model(options, served, sizeof served);
    struct gateway_options gateway = {
        .served_model = served,
        .api_key = options->api_key,
        .version = TROUPE_VERSION,
        .tokenizer = self->tokenizer,
        .chat = chat_recognise(self->tokenizer, &chat),
        .unix_offset_ns = clock_unix_offset_ns(),
    };
    snprintf(gateway.chat_error, sizeof gateway.chat_error, "%s", chat.text);
    if (gateway.chat == CHAT_NONE)
        log_line(TRACE_WARNING, "no chat: %s", chat.text);
    self->actor = gateway_create(&self->identity, &options->settings,
                                 model_config(self->directory.model), &gateway);
    int socket = (int)options->listen_fd;
    if (options->listen_fd == UINT64_MAX)
        error = http_listen(&socket, options->host, (uint16_t)options->port, failure);
    if (error == 0)
        error = http_open(&self->http, socket, &self->bell, failure);
    if (error == 0)
        log_line(TRACE_INFO, "HTTP on port %u", http_socket_port(socket));
    return error;
}

static int create_actor(struct process *self, struct failure *failure) {
    const struct settings *settings = &self->options->settings;
    const struct model_config *config = model_config(self->directory.model);
    switch (self->role) {
    case ROLE_COORDINATOR:
        self->id = ACTOR_COORDINATOR;
        self->actor = coordinator_create(&self->identity, settings, config);
        break;
    case ROLE_GATEWAY:
        return open_gateway(self, failure);
    case ROLE_ATTENTION:
        self->actor = attention_create(&self->identity, settings, config);
        break;
    case ROLE_EXPERT:
        self->actor = expert_create(&self->identity, settings, config, self->options->memory_mib << 20);
        break;
    default:
        self->actor = sampler_create(&self->identity, settings, config);
    }
    return self->actor != NULL ? 0 : fail(failure, ERR_NO_MEMORY, "no memory for the actor");
}

static int process_open(struct process *self, struct failure *failure) {
    const struct options *options = self->options;
    int error = options->cpus != NULL ? pin(options->cpus, failure) : 0;
    if (error == 0)
        error = choose_addresses(self, failure);
    if (error == 0)
        error = model_directory_open(&self->directory, options->model, failure);
    if (error == 0 && (self->kernels = options_kernels(options, failure)) == NULL)
        error = failure->code;
    self->identity.incarnation = clock_random();
    clock_host_name(self->host);
    if (error == 0)
        error = open_bell(self, failure);
    if (error < 0)
        return error;
    self->zmq = zmq_ctx_new();
    zmq_ctx_set(self->zmq, ZMQ_MAX_SOCKETS, 8192);
    error = open_control(self, failure);
    if (error == 0 && has_data_plane(self->role))
        error = open_data(self, failure);
    if (error == 0 && has_data_plane(self->role))
        error = open_engine(self, failure);
    if (error < 0)
        return error;
    self->identity.role = self->role;
    self->identity.name = self->name;
    self->identity.control_address = mailbox_address(self->control);
    self->identity.data_address = self->data_address;
    self->identity.host = self->host;
    self->identity.coordinator_address = self->coordinator;
    self->identity.model_fingerprint = model_fingerprint(self->directory.model);
    self->identity.numerics = options->numerics;
    self->identity.pid = (uint32_t)getpid();
    self->identity.threads = options->settings.threads;
    return create_actor(self, failure);
}

static void log_counters(const struct transport *transport) {
    if (transport == NULL)
        return;
    const struct transport_counters *c = &transport->counters;
    log_line(TRACE_INFO,
             "%s: %llu frames (%llu bytes) sent, %llu (%llu bytes) received, %llu wake-ups, "
             "%llu waited for room, %llu dropped, %llu refused",
             transport->class->name, (unsigned long long)c->frames_sent,
             (unsigned long long)c->bytes_sent, (unsigned long long)c->frames_received,
             (unsigned long long)c->bytes_received, (unsigned long long)c->wakes,
             (unsigned long long)c->deferred, (unsigned long long)c->dropped,
             (unsigned long long)c->refused);
}

static void process_close(struct process *self) {
    signal_bell = NULL;
    log_counters(self->shm);
    log_counters(self->data_zmq);
    http_close(&self->http, self->exit_code == 0 ? DRAIN_MS : 0);
    loader_close(&self->loader);
    mailbox_close(&self->control, self->exit_code == 0 ? DRAIN_MS : 0);
    if (self->shm != NULL)
        self->shm->class->close(&self->shm);
    if (self->data_zmq != NULL)
        self->data_zmq->class->close(&self->data_zmq);
    if (self->zmq != NULL)
        zmq_ctx_term(self->zmq);
    if (self->actor != NULL)
        actor_destroy(&self->actor);
    effects_free(&self->effects);
    if (self->engine != NULL)
        engine_close(&self->engine);
    pool_close(&self->pool);
    if (self->tokenizer != NULL)
        tokenizer_close(&self->tokenizer);
    model_directory_close(&self->directory);
    bell_close(&self->bell);
}

int process_run(enum role role, const struct options *options) {
    struct process *self = calloc(1, sizeof *self);
    struct failure failure = {0};
    ASSERT(self != NULL);
    self->role = role;
    self->options = options;
    snprintf(self->name, sizeof self->name, "%s", options->name != NULL ? options->name : role_name(role));
    /* Under a supervisor the run directory keeps the log and only what is wrong goes to the terminal. */
    bool quiet = options->log != NULL && !options->verbose;
    log_open(&(struct log_options){
        .name = self->name,
        .file = options->log,
        .file_level = options->verbose ? TRACE_DEBUG : TRACE_INFO,
        .stderr_level = options->verbose ? TRACE_DEBUG : quiet ? TRACE_WARNING : TRACE_INFO,
    });
    char title[16]; /* what ps and top show */
    snprintf(title, sizeof title, "troupe:%.8s", self->name);
    prctl(PR_SET_NAME, title);
    numerics_enter();
    effects_init(&self->effects);
    int error = process_open(self, &failure);
    if (error < 0) {
        log_line(TRACE_ERROR, "cannot start: %s", failure.text);
        self->exit_code = error == ERR_NO_MEMORY || error == ERR_IO ? EXIT_FAILED : EXIT_CONFIGURATION;
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
