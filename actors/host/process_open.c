/* Opening one actor's process, in this order: processor, addresses, model, doorbell (from here on
 * signals end it cleanly), control inbox, data plane, engine, actor. */
#include <hwloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "actors/host/background.h"
#include "actors/host/clock.h"
#include "actors/host/process_parts.h"
#include "actors/host/transport_nccl.h"
#include "actors/host/weights_frame.h"
#include "actors/host/version.h"
#include "proto/wire.h"

#define WAITING_CONTROL (32u << 20) /* bytes for a peer that does not take its messages */
#define WAITING_DATA    (256u << 20)
#define ANSWERS_MAX     (32u << 20) /* of a ring that is made larger for them */
#define DRAIN_MS        200
/* Edges between GPUs: an offer is repeated, a communicator takes at most so long, the next try comes
 * after a pause that doubles, and after so many failures rows stay with the other transports. */
#define NCCL_RETRY_NS     100000000ull
#define NCCL_MAKE_NS      20000000000ull
#define NCCL_PAUSE_NS     500000000ull
#define NCCL_FAILURES_MAX 8

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
        return fail(failure, ERR_TOO_LARGE,
                    "the path of the run directory %s is too long for sockets: "
                    "choose a shorter --run-dir",
                    run_dir);
    return 0;
}

bool options_on_gpu(const struct options *options) {
    return strcmp(options->numerics, "bf16-sm90") == 0 ||
           strcmp(options->numerics, "fp8-sm90") == 0;
}

int options_check_model(const struct options *options, const struct model_config *config,
                        struct failure *failure) {
    const struct mla_shape shape = {.nope = config->nope, .rope = config->rope, .v = config->v};
    if (options->settings.resident && !options_on_gpu(options))
        return fail(failure, ERR_INVALID,
                    "--resident 1 needs --numerics bf16-sm90 or fp8-sm90, found %s",
                    options->numerics);
    return options_on_gpu(options) ? gpu_device_offers(&shape, failure) : 0;
}

const struct kernels *options_kernels(const struct options *options, struct failure *failure) {
    static const char *const names[] = {"scalar", "avx512", "amx"};
    if (options_on_gpu(options)) {
        struct gpu_device device;
        uint32_t index = options->gpu != UINT64_MAX ? (uint32_t)options->gpu : 0;
        return gpu_device_open(&device, index, failure) == 0 ? gpu_device_kernels(&device, options->numerics, failure)
                                                             : NULL;
    }
    enum isa isa = ISA_BEST;
    for (int i = 0; i < 3; i++) {
        if (strcmp(options->isa, names[i]) == 0)
            isa = (enum isa)i;
    }
    return kernels_select(profile_of_name(options->numerics), isa, failure);
}

static int pin(const char *cpus, struct failure *failure) {
    hwloc_topology_t topology;
    hwloc_bitmap_t set = hwloc_bitmap_alloc();
    int error = 0;
    if (cpus[0] == 0 || hwloc_bitmap_list_sscanf(set, cpus) != 0 || hwloc_bitmap_iszero(set))
        error =
            fail(failure, ERR_INVALID, "--cpus: expected a list such as 0-3,8, found '%s'", cpus);
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
        int error =
            coordinator_address_in(options->run_dir, in_run_dir, sizeof in_run_dir, failure);
        if (error < 0)
            return error;
    }
    int directory = (int)(strlen(in_run_dir) - strlen("/coordinator.control"));
    const char *any = "tcp://*:*";
    if (options->bind != NULL)
        snprintf(self->control_bind, sizeof self->control_bind, "%s", options->bind);
    else if (self->role == ROLE_COORDINATOR)
        snprintf(self->control_bind, sizeof self->control_bind, "%s",
                 in_run_dir[0] != 0 ? in_run_dir : any);
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
    if (in_run_dir[0] != 0 && options->bind == NULL)
        snprintf(self->nccl_bind, sizeof self->nccl_bind, "%.*s/%d.nccl", directory, in_run_dir,
                 (int)getpid());
    else
        snprintf(self->nccl_bind, sizeof self->nccl_bind, "%s", any);
    if (options->coordinator != NULL)
        snprintf(self->coordinator, sizeof self->coordinator, "%s", options->coordinator);
    else if (in_run_dir[0] != 0)
        snprintf(self->coordinator, sizeof self->coordinator, "%s", in_run_dir);
    else if (self->role != ROLE_COORDINATOR)
        return fail(failure, ERR_INVALID,
                    "say where the coordinator is: --coordinator tcp://host:port "
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

/* In one process with the other actors: its name is its address, and the coordinator's is known. */
static int open_neighbour(struct process *self, struct failure *failure) {
    snprintf(self->coordinator, sizeof self->coordinator, "%s", role_name(ROLE_COORDINATOR));
    snprintf(self->data_address, sizeof self->data_address, "shm=%s", self->name);
    self->neighbour = neighbour_join(self->together, self->name, self->identity.incarnation);
    if (self->neighbour == NULL)
        return fail(failure, ERR_NO_MEMORY, "no place for %s among the actors of this process", self->name);
    return has_data_plane(self->role) ? transport_local_open(&self->shm, self->neighbour, failure) : 0;
}

static int open_control(struct process *self, struct failure *failure) {
    struct mailbox_options mailbox = {
        .name = "control",
        .context = self->zmq,
        .bind = self->control_bind,
        .towards = self->coordinator,
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
        process_catch_signals(&self->bell);
    return error;
}

/* The first size of a ring: at least four of the largest frames that the knobs make usual, and for
 * experts the answers to a whole batch, which stay there until they are combined. Larger frames make
 * their ring grow. */
static uint64_t ring_bytes(const struct process *self) {
    const struct model_config *config = model_config(self->directory.model);
    uint32_t rows = self->options->settings.frame_rows;
    size_t frame = frame_bytes(FRAME_COMBINE, rows, rows, 0, config->hidden * 4);
    uint64_t bytes = (uint64_t)self->options->settings.ring_kib << 10, answers = 0;
    if (self->role == ROLE_EXPERT)
        answers = (uint64_t)self->options->settings.batch_tokens * config->gate.k *
                  config->hidden * sizeof(float) * 3 / 2;
    answers = answers < ANSWERS_MAX ? answers : ANSWERS_MAX;
    bytes = bytes > answers ? bytes : answers;
    return 4 * (uint64_t)frame > bytes ? 4 * (uint64_t)frame : bytes;
}

/* A frame of rows at the knobs' bounds; larger ones go over the other transports. */
static size_t nccl_slot_bytes(const struct process *self) {
    const uint32_t rows = self->options->settings.frame_rows;
    const struct model_config *config = model_config(self->directory.model);
    const size_t combine = frame_bytes(FRAME_COMBINE, rows, rows, 0, config->hidden * 4);
    const size_t dispatch = (size_t)self->options->settings.ring_kib << 9; /* half a ring */
    const size_t weights = self->role == ROLE_EXPERT ? weights_frame_bytes() : 0;
    const size_t rows_most = combine > dispatch ? combine : dispatch;
    return rows_most > weights ? rows_most : weights;
}

static int open_data(struct process *self, struct failure *failure) {
    const char *want = self->options->transport;
    struct transport_options transport = {
        .name = self->stem,
        .incarnation = self->identity.incarnation,
        .bell = &self->bell,
        .ring_bytes = ring_bytes(self),
        .bind = self->data_bind,
        .towards = self->coordinator,
        .zmq_context = self->zmq,
        .check_crc = self->options->settings.frame_crc != 0,
        .parallel = &self->parallel,
        .waiting_bytes_max = WAITING_DATA,
        .take_in = process_take_in,
        .context = self,
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

/* Frames between GPUs, beside the transports that there always are. */
static int open_nccl(struct process *self, struct failure *failure) {
    const struct settings *settings = &self->options->settings;
    struct transport_options transport = {
        .name = self->stem,
        .incarnation = self->identity.incarnation,
        .bell = &self->bell,
        .bind = self->nccl_bind,
        .towards = self->coordinator,
        .zmq_context = self->zmq,
        .check_crc = settings->frame_crc != 0,
        .waiting_bytes_max = WAITING_DATA,
    };
    const uint64_t timeout_ns = settings->nccl_timeout_ms * 1000000ull;
    struct nccl_options nccl = {
        .now_ns = clock_now_ns,
        .channels_max = (int)settings->nccl_channels,
        .edge = {.slots = settings->nccl_slots,
                 .slot_bytes = (uint32_t)nccl_slot_bytes(self),
                 .offer_retry_ns = NCCL_RETRY_NS,
                 .make_ns = NCCL_MAKE_NS,
                 .frame_ns = timeout_ns,
                 .pause_ns = NCCL_PAUSE_NS,
                 .failures_max = NCCL_FAILURES_MAX},
    };
    int error = gpu_device_fits(&self->gpu, 2ull * nccl.edge.slots * nccl.edge.slot_bytes,
                                "buffers of one edge", failure);
    if (error == 0)
        error = nccl_api_open(&nccl.api, self->gpu.index, failure);
    if (error == 0)
        error = nccl_post_open(&nccl.post, &transport, failure);
    if (error == 0)
        error = transport_nccl_open(&self->nccl, &transport, &nccl, failure);
    if (error < 0)
        return error;
    const size_t used = strlen(self->data_address), room = sizeof self->data_address - used;
    if (snprintf(self->data_address + used, room, "%snccl=%s", used > 0 ? ";" : "",
                 self->nccl->address) >= (int)room)
        return fail(failure, ERR_TOO_LARGE, "the data address with %s does not fit into %d bytes",
                    self->nccl->address, ADDRESS_BYTES_MAX);
    return 0;
}

static int open_gpu(struct process *self, struct failure *failure) {
    int error = gpu_device_open(&self->gpu, (uint32_t)self->options->gpu, failure);
    if (error == 0 && self->options->cpus == NULL)
        error = gpu_device_pin(&self->gpu, failure);
    if (error < 0)
        return error;
    log_line(TRACE_INFO, "GPU %u: %s, %llu of %llu MiB free%s", self->gpu.index, self->gpu.name,
             (unsigned long long)(self->gpu.free_bytes >> 20),
             (unsigned long long)(self->gpu.total_bytes >> 20),
             error > 0 ? ", on the processors next to it" : "");
    return 0;
}

/* Weights, rows under way and the buffers of edges, before any of it is loaded. */
static int fits_device(struct process *self, const struct engine_options *engine,
                       struct failure *failure) {
    if (self->kernels->device_fits == NULL)
        return 0;
    const uint64_t own = engine_device_bytes(self->directory.model, engine);
    const uint64_t edge =
        self->nccl != NULL ? 2ull * self->options->settings.nccl_slots * nccl_slot_bytes(self) : 0;
    char what[160];
    snprintf(what, sizeof what,
             "weights and rows of this %s (%llu MiB) and buffers of one edge between GPUs (%llu MiB)",
             role_name(self->role), (unsigned long long)(own >> 20),
             (unsigned long long)(edge >> 20));
    return self->kernels->device_fits(own + edge, what, failure);
}

/* In the background: packing a model's weights takes the processor from processes that serve. */
static int pack_engine(void *argument, struct failure *failure) {
    struct process *self = argument;
    const struct settings *settings = &self->options->settings;
    struct engine_options engine = {
        .role = ENGINE_ATTENTION,
        .kernels = self->kernels,
        .parallel = pool_parallel(self->pool),
        .batch_rows = settings->batch_tokens,
        .batch_slots = 1,
        .pages = settings->kv_cache_tokens / PAGE_TOKENS,
        .resident = settings->resident ? gpu_device_resident() : NULL,
        .gate_top_p = (float)settings->gate_top_p,
        .latent_fp8 = settings->latent_fp8 != 0,
        .mtp_steps = settings->mtp_steps,
    };
    if (self->role == ROLE_EXPERT) {
        engine.role = ENGINE_EXPERT;
        engine.batch_rows = settings->frame_rows;
    } else if (self->role == ROLE_SAMPLER) {
        engine.role = ENGINE_SAMPLER;
    }
    const int error = fits_device(self, &engine, failure);
    return error < 0 ? error : engine_open(&self->engine, self->directory.model, &engine, failure);
}

static int open_sockets(struct process *self, struct failure *failure) {
    self->zmq = zmq_ctx_new();
    zmq_ctx_set(self->zmq, ZMQ_MAX_SOCKETS, 8192);
    int error = open_control(self, failure);
    if (error == 0 && has_data_plane(self->role))
        error = open_data(self, failure);
    return error == 0 && self->options->gpu != UINT64_MAX ? open_nccl(self, failure) : error;
}

static int open_engine(struct process *self, struct failure *failure) {
    const struct settings *settings = &self->options->settings;
    int threads = settings->threads > 0 ? (int)settings->threads : pool_processors();
    if (options_on_gpu(self->options)) /* the device is one thread's at a time */
        threads = 1;
    self->identity.threads = (uint32_t)threads;
    int error = self->together == NULL ? pool_open(&self->pool, threads, failure) : 0;
    if (error == 0 && self->together == NULL)
        self->parallel = pool_parallel(self->pool);
    if (error == 0)
        error = background_run(settings->background_nice, pack_engine, self, failure);
    if (error == 0 && self->role == ROLE_EXPERT)
        error = loader_open(&self->loader, &self->directory, self->kernels, &self->bell,
                            settings->background_nice, failure);
    if (error == 0 && self->role == ROLE_ATTENTION && !options_on_gpu(self->options))
        error = cache_ahead_open(&self->cache_ahead, self->engine, failure);
    if (error == 0 && self->role != ROLE_EXPERT) /* an expert actor counts what it is assigned */
        self->identity.memory_bytes = engine_memory_bytes(self->engine);
    model_directory_forget(&self->directory);
    return error;
}

static void name_served_model(const struct options *options, char *ret, size_t room) {
    char *real = options->served_model == NULL ? realpath(options->model, NULL) : NULL;
    const char *slash = real != NULL ? strrchr(real, '/') : NULL;
    snprintf(ret, room, "%s",
             options->served_model != NULL    ? options->served_model
             : slash != NULL && slash[1] != 0 ? slash + 1
                                              : "model");
    free(real);
}

/* What only the operator may see or ask: whoever may connect to the socket. */
static int open_gateway_admin(struct process *self, struct failure *failure) {
    char path[ADDRESS_BYTES_MAX + 80];
    int socket = -1;
    snprintf(path, sizeof path, "%s/%s.sock", self->options->run_dir, self->name);
    int error = http_listen_unix(&socket, path, failure);
    return error < 0 ? error : http_open_from(&self->admin_http, socket, ADMIN_CLIENTS, &self->bell, failure);
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
        .view = strcmp(options->view, "on") == 0,
        .allow_faults = options->allow_faults,
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
    if (error == 0 && options->run_dir != NULL)
        error = open_gateway_admin(self, failure);
    if (error == 0 && options->journal != NULL)
        error = process_journal_open(self, options->journal, failure);
    return error;
}

/* host:port, port, or a path. */
static int listen_at(const char *address, int *ret_socket, struct failure *failure) {
    const char *colon = strrchr(address, ':');
    char host[ADDRESS_BYTES_MAX], *end = NULL;
    if (colon == NULL || strchr(address, '/') != NULL)
        return http_listen_unix(ret_socket, address, failure);
    unsigned long port = strtoul(colon + 1, &end, 10);
    snprintf(host, sizeof host, "%.*s", (int)(colon - address), address);
    if (end == colon + 1 || *end != 0 || port > 65535)
        return fail(failure, ERR_INVALID, "--admin: expected a path or host:port, found '%s'", address);
    return http_listen(ret_socket, host, (uint16_t)port, failure);
}

/* The admin interface: at --admin, else in the run directory, else nowhere. */
static int open_coordinator(struct process *self, struct failure *failure) {
    const struct options *options = self->options;
    char path[ADDRESS_BYTES_MAX + 16];
    const char *address = options->admin;
    self->id = ACTOR_COORDINATOR;
    self->actor = coordinator_create(&self->identity, &options->settings,
                                     model_config(self->directory.model));
    if (self->actor == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the actor");
    if (options->allow_faults)
        coordinator_allow_faults(self->actor);
    if (options->admin_token[0] != 0)
        coordinator_set_admin_token(self->actor, options->admin_token);
    if (address == NULL && options->run_dir == NULL)
        return 0;
    if (address == NULL) {
        snprintf(path, sizeof path, "%s/admin.sock", options->run_dir);
        address = path;
    }
    if (strchr(address, '/') == NULL && options->admin_token[0] == 0)
        return fail(failure, ERR_INVALID, "--admin %s: an address that others can reach needs a token: "
                    "give --admin-token-file", address);
    int socket = -1, error = listen_at(address, &socket, failure);
    if (error == 0)
        error = http_open(&self->http, socket, &self->bell, failure);
    if (error == 0 && options->run_dir != NULL) {
        snprintf(path, sizeof path, "%s/gateway.sock", options->run_dir);
        relays_open(&self->relays, self->http, path);
    }
    return error;
}

static int open_model(void *argument, struct failure *failure) {
    struct process *self = argument;
    const char *weights = self->options->weights, *path = self->options->model;
    struct failure why = {0};
    if (self->role != ROLE_EXPERT || strcmp(weights, "file") == 0)
        return model_directory_open(&self->directory, path, failure);
    int error = ERR_NOT_FOUND;
    if (strcmp(weights, "auto") == 0)
        error = model_directory_open(&self->directory, path, &why);
    if (error == ERR_NOT_FOUND) /* others hold them */
        return model_directory_open_config(&self->directory, path, failure);
    return error == 0 ? 0 : fail(failure, error, "%s", why.text);
}

static int create_actor(struct process *self, struct failure *failure) {
    const struct settings *settings = &self->options->settings;
    const struct model_config *config = model_config(self->directory.model);
    switch (self->role) {
    case ROLE_COORDINATOR:
        return open_coordinator(self, failure);
    case ROLE_GATEWAY:
        return open_gateway(self, failure);
    case ROLE_ATTENTION:
        self->actor = attention_create(&self->identity, settings, config);
        break;
    case ROLE_EXPERT:
        self->actor =
            expert_create(&self->identity, settings, config, self->options->memory_mib << 20);
        if (self->actor != NULL)
            expert_set_weights(self->actor, self->directory.only_config ? WEIGHTS_PEER
                                            : strcmp(self->options->weights, "file") == 0
                                                ? WEIGHTS_FILE
                                                : WEIGHTS_AUTO);
        break;
    default:
        self->actor = sampler_create(&self->identity, settings, config);
    }
    return self->actor != NULL ? 0 : fail(failure, ERR_NO_MEMORY, "no memory for the actor");
}

/* Only those who compute need the device. */
static const struct kernels *choose_kernels(const struct process *self, struct failure *failure) {
    if (options_on_gpu(self->options) && !has_data_plane(self->role))
        return kernels_select(PROFILE_BF16, ISA_BEST, failure);
    if (options_check_model(self->options, model_config(self->directory.model), failure) < 0)
        return NULL;
    return options_kernels(self->options, failure);
}

int process_open(struct process *self, struct failure *failure) {
    const struct options *options = self->options;
    int error = options->cpus != NULL ? pin(options->cpus, failure) : 0;
    if (error == 0 && options->gpu != UINT64_MAX)
        error = open_gpu(self, failure);
    if (error == 0 && self->together == NULL)
        error = choose_addresses(self, failure);
    if (error == 0)
        error = background_run(options->settings.background_nice, open_model, self, failure);
    if (error == 0 && (self->kernels = choose_kernels(self, failure)) == NULL)
        error = failure->code;
    self->identity.incarnation = clock_random();
    clock_host_name(self->host);
    if (error == 0 && self->together == NULL)
        error = open_bell(self, failure);
    if (error == 0 && options->allow_faults)
        error = inject_open(&self->inject, options->run_dir, self->name, &self->bell, failure);
    if (error < 0)
        return error;
    error = self->together != NULL ? open_neighbour(self, failure) : open_sockets(self, failure);
    if (error == 0 && has_data_plane(self->role))
        error = open_engine(self, failure);
    if (error < 0)
        return error;
    self->identity.role = self->role;
    self->identity.name = self->name;
    self->identity.control_address =
        self->together != NULL ? self->name : mailbox_address(self->control);
    self->identity.data_address = self->data_address;
    self->identity.host = self->host;
    self->identity.coordinator_address = self->coordinator;
    self->identity.model_fingerprint = model_fingerprint(self->directory.model);
    self->identity.config_fingerprint = model_config_fingerprint(self->directory.model);
    settings_profile_name(&options->settings, options->numerics, self->profile);
    self->identity.numerics = self->profile;
    self->identity.pid = (uint32_t)getpid();
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

void process_close(struct process *self) {
    if (self->together == NULL) {
        process_catch_signals(NULL);
        background_enter(self->options->settings.background_nice); /* nobody waits for it any more */
    }
    inject_close(&self->inject);
    log_counters(self->shm);
    log_counters(self->data_zmq);
    log_counters(self->nccl);
    relays_close(&self->relays);
    http_close(&self->http, self->exit_code == 0 ? DRAIN_MS : 0);
    http_close(&self->admin_http, 0);
    feed_journal_close(&self->journal);
    loader_close(&self->loader);
    cache_ahead_close(&self->cache_ahead);
    mailbox_close(&self->control, self->exit_code == 0 ? DRAIN_MS : 0);
    if (self->nccl != NULL)
        self->nccl->class->close(&self->nccl);
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
    neighbour_leave(&self->neighbour);
    if (self->together == NULL)
        pool_close(&self->pool);
    if (self->tokenizer != NULL)
        tokenizer_close(&self->tokenizer);
    model_directory_close(&self->directory);
    if (self->together == NULL)
        bell_close(&self->bell);
}
