/* troupe serve: the local supervisor. Starts one process per actor, restarts what dies within
 * limits, tells the coordinator of every exit at once, and takes everything down again.
 *
 *   STARTING   until /ready answers 200, then the URL is printed
 *
 *   SERVING    children that die are restarted; one that dies more than restart_limit times in
 *              restart_window_s ends everything
 *
 *   STOPPING   SIGTERM to the gateway, which tells its clients; then to all others; SIGKILL to
 *              what is left after a while
 *
 * Invariant: whatever ends the supervisor short of SIGKILL, no process, socket, file or shared
 * memory of the troupe is left. On SIGKILL the kernel sends SIGTERM to the children, which clean up
 * after themselves. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "actors/host/http.h"
#include "actors/host/log.h"
#include "actors/host/pool.h"
#include "actors/host/probe_http.h"
#include "actors/host/process.h"
#include "actors/host/run_dir.h"
#include "actors/host/supervisor_link.h"
#include "actors/host/together.h"
#include "actors/host/transport.h"
#include "model/chat.h"
#include "proto/wire.h"

#define ARGUMENTS_MAX    160
#define RESTARTS_KEPT    1024 /* more than restart_limit can be */
#define READY_POLL_MS    50
#define READY_TIMEOUT_MS 500 /* of one question */
#define GATEWAY_GRACE_MS 5000
#define STOP_GRACE_MS    3000
#define RESTART_DELAY_MS 100 /* doubled with each further restart in the window */
#define SCALES_KEPT      32u

struct child {
    enum role role;
    char name[48];
    pid_t pid; /* 0: not running */
    uint64_t died_ns[RESTARTS_KEPT];
    unsigned deaths;      /* in all; died_ns is a ring */
    uint64_t start_at_ns; /* NEVER: running, or not to be started */
    bool leaving;         /* drained: when it ends it is gone */
    bool gone;            /* its place is free */
};

/* A SCALE that has been carried out: said again, it gets the same answer. */
struct scale {
    uint64_t coordinator, operation; /* operation 0: none */
    unsigned first, started;         /* in `names` */
};

struct serve {
    const struct options *options;
    struct run_dir run_dir;
    char coordinator[ADDRESS_BYTES_MAX], run[17], host[ADDRESS_BYTES_MAX];
    uint64_t incarnation;
    int listening, signals;
    struct child *child;
    unsigned children, children_capacity;
    struct supervisor_link link;
    struct scale scale[SCALES_KEPT]; /* a ring */
    unsigned scales;
    char (*started)[48]; /* names of all that SCALEs have started */
    unsigned starteds;
    uint64_t grown_ns; /* when the last of them is started */
    void *zmq, *to_coordinator;
    struct probe_http probe;
    uint64_t asked_ns;
    bool ready, chat;
    enum { RUNNING, STOPPING_GATEWAY, STOPPING_ALL, KILLING } phase;
    uint64_t phase_end_ns;
    int exit_code;
};

/* ---- children ---- */

static void add_argument(char **list, int *count, const char *name, const char *value) {
    ASSERT(*count + 3 < ARGUMENTS_MAX);
    list[(*count)++] = strdup(name);
    if (value != NULL)
        list[(*count)++] = strdup(value);
}

static void child_arguments(const struct serve *self, const struct child *child, char **list) {
    const struct options *options = self->options;
    char text[RUN_DIR_BYTES + 64];
    int count = 0;
    add_argument(list, &count, "troupe", role_name(child->role));
    add_argument(list, &count, "--run-dir", self->run_dir.path);
    add_argument(list, &count, "--name", child->name);
    add_argument(list, &count, "--model", options->model);
    add_argument(list, &count, "--numerics", options->numerics);
    add_argument(list, &count, "--isa", options->isa);
    snprintf(text, sizeof text, "%s/%s.log", self->run_dir.path, child->name);
    add_argument(list, &count, "--log", text);
    if (options->verbose)
        add_argument(list, &count, "--verbose", NULL);
    if (options->allow_faults)
        add_argument(list, &count, "--allow-faults", NULL);
    if (child->role == ROLE_GATEWAY) {
        snprintf(text, sizeof text, "%d", self->listening);
        add_argument(list, &count, "--listen-fd", text);
        add_argument(list, &count, "--view", options->view);
        if (options->journal != NULL)
            add_argument(list, &count, "--journal", options->journal);
        if (options->served_model != NULL)
            add_argument(list, &count, "--served-model-name", options->served_model);
        snprintf(text, sizeof text, "%s/api-key", self->run_dir.path);
        if (options->api_key != NULL) /* not on the command line, which everybody can read */
            add_argument(list, &count, "--api-key-file", text);
    } else if (child->role != ROLE_COORDINATOR) {
        add_argument(list, &count, "--transport", options->transport);
    } else {
        if (options->admin != NULL)
            add_argument(list, &count, "--admin", options->admin);
        snprintf(text, sizeof text, "%s/admin-token", self->run_dir.path);
        if (options->admin_token[0] != 0)
            add_argument(list, &count, "--admin-token-file", text);
    }
    if (child->role == ROLE_EXPERT && options->memory_mib > 0) {
        snprintf(text, sizeof text, "%llu", (unsigned long long)options->memory_mib);
        add_argument(list, &count, "--memory-mib", text);
    }
    if (child->role == ROLE_EXPERT &&
        options->settings.threads == 0) { /* they work at the same time */
        uint64_t share = (uint64_t)pool_processors() / options->experts;
        snprintf(text, sizeof text, "%llu", (unsigned long long)(share > 0 ? share : 1));
        add_argument(list, &count, "--threads", text);
    }
    count += options_changed_knobs(options, list + count, ARGUMENTS_MAX - 1 - count);
    list[count] = NULL;
}

/* Between fork and exec: only calls that are safe there. */
static void become_child(const struct serve *self, const struct child *child, pid_t parent,
                         char **list) {
    sigset_t none;
    sigemptyset(&none);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        _exit(EXIT_FAILED); /* the supervisor was gone before the kernel knew */
    setpgid(0, 0);          /* Ctrl-C is for the supervisor; it ends the others in order */
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (child->role == ROLE_GATEWAY)
        fcntl(self->listening, F_SETFD, 0);
    execv("/proc/self/exe", list);
    _exit(EXIT_FAILED);
}

static void write_pid(const struct serve *self, const struct child *child) {
    char name[64], text[32];
    struct failure failure;
    snprintf(name, sizeof name, "%s.pid", child->name);
    snprintf(text, sizeof text, "%d\n", (int)child->pid);
    if (run_dir_write(&self->run_dir, name, text, &failure) < 0)
        log_line(TRACE_WARNING, "%s", failure.text);
}

static void start_child(struct serve *self, struct child *child) {
    char *list[ARGUMENTS_MAX];
    child_arguments(self, child, list);
    pid_t parent = getpid();
    fflush(NULL);
    child->pid = fork();
    if (child->pid == 0)
        become_child(self, child, parent, list);
    for (int i = 0; list[i] != NULL; i++)
        free(list[i]);
    child->start_at_ns = NEVER;
    if (child->pid < 0) {
        log_line(TRACE_ERROR, "cannot start %s: %s; trying again", child->name, strerror(errno));
        child->pid = 0;
        child->start_at_ns = clock_now_ns() + 1000000000u;
        return;
    }
    write_pid(self, child);
}

/* The coordinator hears of an exit long before it would miss heartbeats. */
static void report_exit(struct serve *self, const struct child *child) {
    Troupe__Envelope envelope = TROUPE__ENVELOPE__INIT;
    Troupe__PeerExited exited = TROUPE__PEER_EXITED__INIT;
    exited.pid = (uint32_t)child->pid;
    exited.host = self->host;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from_incarnation = self->incarnation;
    envelope.body_case = TROUPE__ENVELOPE__BODY_PEER_EXITED;
    envelope.peer_exited = &exited;
    uint8_t bytes[ADDRESS_BYTES_MAX + 128];
    size_t size = wire_packed_bytes(&envelope);
    ASSERT(size <= sizeof bytes);
    wire_pack(&envelope, bytes);
    if (zmq_send(self->to_coordinator, bytes, size, ZMQ_DONTWAIT) < 0)
        log_line(TRACE_WARNING, "the coordinator could not be told that %s has exited: %s",
                 child->name, zmq_strerror(errno));
}

static void sweep_child(const struct serve *self, const struct child *child) {
    char stem[64], name[64];
    snprintf(stem, sizeof stem, "troupe-%s-%d-", self->run, (int)child->pid);
    transport_shm_sweep(stem);
    run_dir_sweep(&self->run_dir, child->pid);
    snprintf(name, sizeof name, "%s.pid", child->name);
    run_dir_remove(&self->run_dir, name);
}

/* Shows the end of a child's log: it will be gone with the run directory. */
static void show_log(const struct serve *self, const struct child *child) {
    char path[RUN_DIR_BYTES + 64], text[2048];
    snprintf(path, sizeof path, "%s/%s.log", self->run_dir.path, child->name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    off_t end = lseek(file, 0, SEEK_END);
    off_t from = end > (off_t)sizeof text ? end - (off_t)sizeof text : 0;
    ssize_t got = pread(file, text, sizeof text, from);
    if (got > 0)
        fprintf(stderr, "--- end of the log of %s ---\n%.*s---\n", child->name, (int)got, text);
    close(file);
}

/* ---- ending ---- */

static void signal_children(const struct serve *self, int number, bool gateway_only) {
    for (unsigned i = 0; i < self->children; i++) {
        const struct child *child = &self->child[i];
        if (child->pid > 0 && (!gateway_only || child->role == ROLE_GATEWAY))
            kill(child->pid, number);
    }
}

static void enter_phase(struct serve *self, int phase) {
    self->phase = phase;
    uint64_t grace_ms = phase == STOPPING_GATEWAY ? GATEWAY_GRACE_MS : STOP_GRACE_MS;
    self->phase_end_ns = clock_now_ns() + grace_ms * 1000000u;
    signal_children(self, phase == KILLING ? SIGKILL : SIGTERM, phase == STOPPING_GATEWAY);
}

static void stop(struct serve *self, int exit_code) {
    if (self->phase != RUNNING) { /* asked twice: at once */
        if (exit_code == 0)
            enter_phase(self, KILLING);
        return;
    }
    self->exit_code = exit_code;
    enter_phase(self, STOPPING_GATEWAY);
}

static unsigned count_running(const struct serve *self, bool gateway_only) {
    unsigned count = 0;
    for (unsigned i = 0; i < self->children; i++)
        count += self->child[i].pid > 0 && (!gateway_only || self->child[i].role == ROLE_GATEWAY);
    return count;
}

static void advance_phase(struct serve *self) {
    bool over = clock_now_ns() >= self->phase_end_ns;
    if (self->phase == STOPPING_GATEWAY && (over || count_running(self, true) == 0))
        enter_phase(self, STOPPING_ALL);
    else if (self->phase == STOPPING_ALL && over)
        enter_phase(self, KILLING);
}

/* ---- deaths and restarts ---- */

static void describe_status(int status, char *ret, size_t room) {
    if (WIFSIGNALED(status))
        snprintf(ret, room, "was ended by signal %d (%s)", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
    else
        snprintf(ret, room, "exited with code %d", WEXITSTATUS(status));
}

/* Deaths of this child within the window, this one included. */
static unsigned note_death(const struct serve *self, struct child *child, uint64_t now) {
    uint64_t window = (uint64_t)self->options->settings.restart_window_s * 1000000000u;
    unsigned recent = 0;
    child->died_ns[child->deaths++ % RESTARTS_KEPT] = now;
    unsigned kept = child->deaths < RESTARTS_KEPT ? child->deaths : RESTARTS_KEPT;
    for (unsigned i = 0; i < kept; i++)
        recent += now - child->died_ns[i] <= window;
    return recent;
}

static void on_death(struct serve *self, struct child *child, int status) {
    char how[96];
    uint64_t now = clock_now_ns();
    describe_status(status, how, sizeof how);
    if (child->role != ROLE_COORDINATOR && self->phase == RUNNING)
        report_exit(self, child);
    sweep_child(self, child);
    pid_t pid = child->pid;
    child->pid = 0;
    if (self->phase != RUNNING)
        return;
    if (child->leaving) {
        log_line(TRACE_INFO, "%s (process %d) %s: it was drained", child->name, (int)pid, how);
        child->gone = true;
        return;
    }
    unsigned recent = note_death(self, child, now);
    bool hopeless = WIFEXITED(status) && WEXITSTATUS(status) == EXIT_CONFIGURATION;
    if (hopeless || recent > self->options->settings.restart_limit) {
        log_line(TRACE_ERROR, "%s (process %d) %s%s: giving up", child->name, (int)pid, how,
                 hopeless ? "" : ", too often");
        if (!hopeless) {
            log_line(
                TRACE_ERROR,
                "more than %u restarts of %s within %u s (knobs restart_limit, restart_window_s)",
                self->options->settings.restart_limit, child->name,
                self->options->settings.restart_window_s);
            show_log(self, child);
        }
        stop(self, EXIT_FAILED);
        return;
    }
    uint64_t delay_ms =
        recent == 1 ? 0 : (uint64_t)RESTART_DELAY_MS << (recent < 6 ? recent - 2 : 4);
    log_line(TRACE_WARNING, "%s (process %d) %s; starting it again", child->name, (int)pid, how);
    child->start_at_ns = now + delay_ms * 1000000u;
}

static void reap(struct serve *self) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        for (unsigned i = 0; i < self->children; i++) {
            if (self->child[i].pid == pid)
                on_death(self, &self->child[i], status);
        }
    }
}

static void start_due(struct serve *self) {
    uint64_t now = clock_now_ns();
    for (unsigned i = 0; i < self->children && self->phase == RUNNING; i++) {
        if (self->child[i].start_at_ns <= now)
            start_child(self, &self->child[i]);
    }
}

/* ---- readiness ---- */

static void announce(const struct serve *self) {
    const struct options *options = self->options;
    unsigned port = http_socket_port(self->listening);
    const char *host = strcmp(options->host, "0.0.0.0") == 0 || strcmp(options->host, "::") == 0
                           ? "127.0.0.1"
                           : options->host;
    bool v6 = strchr(host, ':') != NULL;
    char url[300], key[128] = "";
    snprintf(url, sizeof url, "http://%s%s%s:%u", v6 ? "[" : "", host, v6 ? "]" : "", port);
    if (options->api_key != NULL)
        snprintf(key, sizeof key, " -H 'Authorization: Bearer KEY'");
    printf("serving %s at %s (%s; %llu attention, %llu expert, %llu sampler %s)\n", options->model,
           url, options->numerics, (unsigned long long)options->attention,
           (unsigned long long)options->experts, (unsigned long long)options->samplers,
           options->in_process ? "actors in one process" : "processes");
    if (options->admin != NULL && strchr(options->admin, '/') == NULL)
        printf("admin at http://%s/#token=%s%s\n", options->admin, options->admin_token,
               options->allow_faults ? " (faults are allowed)" : "");
    if (strcmp(options->view, "on") == 0)
        printf("live view: open %s/ in a browser, or run: troupe top --url %s\n", url, url);
    printf("run directory %s\ntry:\n", self->run_dir.path);
    if (self->chat)
        printf("  curl -s %s/v1/chat/completions -H 'Content-Type: application/json'%s -d "
               "'{\"messages\": "
               "[{\"role\": \"user\", \"content\": \"What is a river?\"}], \"max_tokens\": 64}'\n",
               url, key);
    else
        printf("  curl -s %s/v1/completions -H 'Content-Type: application/json'%s -d '{\"prompt\": "
               "\"Once\", "
               "\"max_tokens\": 64}'\n",
               url, key);
    printf("Ctrl-C ends it\n");
    fflush(stdout);
}

static void announce_ready(void *context) {
    announce(context);
}

static void watch_ready(struct serve *self, bool readable) {
    uint64_t now = clock_now_ns();
    if (self->ready || self->phase != RUNNING)
        return;
    if (readable && probe_http_read(&self->probe) == 200) {
        self->ready = true;
        announce(self);
        return;
    }
    uint64_t wait_ms = self->probe.file >= 0 ? READY_TIMEOUT_MS : READY_POLL_MS;
    if (now - self->asked_ns >= wait_ms * 1000000u) {
        probe_http_ask(&self->probe, self->listening, "/ready");
        self->asked_ns = now;
    }
}

/* ---- more and fewer ---- */

static struct child *find_child(const struct serve *self, const char *name) {
    for (unsigned i = 0; i < self->children; i++)
        if (!self->child[i].gone && strcmp(self->child[i].name, name) == 0)
            return &self->child[i];
    return NULL;
}

/* To be started at once, under the first name of its role that is free. May move all children. */
static struct child *new_child(struct serve *self, enum role role) {
    unsigned place = 0;
    while (place < self->children && !self->child[place].gone)
        place++;
    if (place == self->children_capacity) {
        self->children_capacity = self->children_capacity * 2 + 16;
        self->child = realloc(self->child, self->children_capacity * sizeof *self->child);
        ASSERT(self->child != NULL);
    }
    if (place == self->children)
        self->children++;
    struct child *child = &self->child[place];
    memset(child, 0, sizeof *child);
    child->role = role;
    char name[sizeof child->name];
    unsigned number = 0;
    do
        snprintf(name, sizeof name, "%s-%u", role_name(role), number++);
    while (find_child(self, name) != NULL);
    memcpy(child->name, name, sizeof name);
    return child;
}

static struct scale *find_scale(struct serve *self, uint64_t coordinator, uint64_t operation) {
    for (unsigned i = 0; i < SCALES_KEPT; i++)
        if (self->scale[i].operation == operation && self->scale[i].coordinator == coordinator)
            return &self->scale[i];
    return NULL;
}

/* One after the other: even what a process does before it knows what it is takes time from those that serve. */
static uint64_t next_start_ns(struct serve *self) {
    uint64_t now = clock_now_ns(),
             next = self->grown_ns + (uint64_t)self->options->settings.start_pace_ms * 1000000u;
    self->grown_ns = next > now ? next : now;
    return self->grown_ns;
}

static struct scale *carry_out_scale(struct serve *self, uint64_t coordinator, const Troupe__Scale *scale) {
    struct scale *ret = &self->scale[self->scales++ % SCALES_KEPT];
    *ret = (struct scale){coordinator, scale->operation, self->starteds, 0};
    for (size_t i = 0; i < scale->n_leaving; i++) {
        struct child *child = find_child(self, scale->leaving[i]->name);
        if (child != NULL && child->role == (enum role)scale->role)
            child->leaving = true;
    }
    for (uint32_t i = 0; i < scale->start; i++) {
        struct child *child = new_child(self, (enum role)scale->role);
        child->start_at_ns = next_start_ns(self);
        self->started = realloc(self->started, (self->starteds + 1) * sizeof *self->started);
        ASSERT(self->started != NULL);
        memcpy(self->started[self->starteds++], child->name, sizeof child->name);
        ret->started++;
        log_line(TRACE_INFO, "starting %s", child->name);
    }
    return ret;
}

static void on_scale(struct serve *self, uint64_t coordinator, const Troupe__Scale *scale) {
    Troupe__Scaled scaled = TROUPE__SCALED__INIT;
    Troupe__Process *list[ACTORS_MAX], process[ACTORS_MAX];
    struct scale *known = find_scale(self, coordinator, scale->operation);
    bool worker = scale->role == TROUPE__ROLE__ROLE_EXPERT || scale->role == TROUPE__ROLE__ROLE_ATTENTION ||
                  scale->role == TROUPE__ROLE__ROLE_SAMPLER;
    scaled.operation = scale->operation;
    if (known == NULL && self->phase != RUNNING)
        scaled.error = "the troupe is being ended";
    else if (!worker || scale->start > ACTORS_MAX / 2)
        scaled.error = "the supervisor starts experts, attention and samplers only";
    else if (known == NULL)
        known = carry_out_scale(self, coordinator, scale);
    for (unsigned i = 0; known != NULL && i < known->started; i++) {
        troupe__process__init(&process[i]);
        process[i].name = self->started[known->first + i];
        list[i] = &process[i];
    }
    scaled.n_started = known != NULL ? known->started : 0;
    scaled.started = list;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_SCALED;
    envelope.scaled = &scaled;
    supervisor_link_send(&self->link, &envelope);
}

static void take_messages(struct serve *self) {
    for (message *envelope; (envelope = supervisor_link_receive(&self->link)) != NULL;) {
        if (envelope->body_case == TROUPE__ENVELOPE__BODY_SCALE)
            on_scale(self,
                     envelope->scale->begun_by != 0 ? envelope->scale->begun_by
                                                    : envelope->from_incarnation,
                     envelope->scale);
        wire_free(&envelope);
    }
}

/* ---- the loop ---- */

static void take_signals(struct serve *self) {
    struct signalfd_siginfo info;
    while (read(self->signals, &info, sizeof info) == (ssize_t)sizeof info) {
        if (info.ssi_signo == SIGCHLD)
            reap(self);
        else
            stop(self, 0);
    }
}

static int sleep_ms(const struct serve *self) {
    uint64_t now = clock_now_ns(), until = now + 3600000000000u;
    for (unsigned i = 0; i < self->children; i++) {
        if (self->child[i].start_at_ns < until)
            until = self->child[i].start_at_ns;
    }
    if (self->phase != RUNNING && self->phase_end_ns < until)
        until = self->phase_end_ns;
    if (supervisor_link_deadline(&self->link) < until)
        until = supervisor_link_deadline(&self->link);
    if (!self->ready && now + READY_POLL_MS * 1000000u < until)
        until = now + READY_POLL_MS * 1000000u;
    return until > now ? (int)((until - now) / 1000000u) + 1 : 0;
}

static void supervise(struct serve *self) {
    while (self->phase == RUNNING || count_running(self, false) > 0) {
        bool probing = self->probe.file >= 0;
        zmq_pollitem_t items[] = {{.fd = self->signals, .events = ZMQ_POLLIN},
                                  {.socket = self->link.in, .events = ZMQ_POLLIN},
                                  {.fd = self->probe.file, .events = ZMQ_POLLIN}};
        if (zmq_poll(items, probing ? 3 : 2, sleep_ms(self)) < 0 && errno != EINTR)
            log_line(TRACE_ERROR, "poll: %s", strerror(errno));
        if (items[0].revents != 0)
            take_signals(self);
        take_messages(self);
        supervisor_link_timer(&self->link);
        if (self->phase == RUNNING) {
            start_due(self);
            watch_ready(self, probing && items[2].revents != 0);
        } else {
            advance_phase(self);
        }
    }
}

/* ---- opening ---- */

static void add_children(struct serve *self, enum role role, uint64_t count, bool numbered) {
    for (uint64_t i = 0; i < count; i++) {
        struct child *child = new_child(self, role);
        if (!numbered)
            snprintf(child->name, sizeof child->name, "%s", role_name(role));
    }
}

/* What would make every child fail is better said once, before anything is started. */
static int check_model(struct serve *self, struct failure *failure) {
    struct model_directory directory;
    struct tokenizer *tokenizer;
    struct failure chat;
    int error = model_directory_open(&directory, self->options->model, failure);
    if (error < 0)
        return error;
    model_directory_close(&directory);
    error = tokenizer_directory_open(&tokenizer, self->options->model, failure);
    if (error < 0)
        return error;
    self->chat = chat_recognise(tokenizer, &chat) != CHAT_NONE;
    tokenizer_close(&tokenizer);
    return options_kernels(self->options, failure) != NULL ? 0 : failure->code;
}

static int open_signals(struct serve *self, struct failure *failure) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    self->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return self->signals >= 0 ? 0 : fail(failure, ERR_IO, "signalfd: %s", strerror(errno));
}

static int open_coordinator_socket(struct serve *self, struct failure *failure) {
    int error = coordinator_address_in(self->run_dir.path, self->coordinator,
                                       sizeof self->coordinator, failure);
    if (error < 0)
        return error;
    process_run_id(self->coordinator, self->run);
    char stem[32];
    snprintf(stem, sizeof stem, "troupe-%s-", self->run);
    transport_shm_sweep(stem); /* of an earlier supervisor of this directory that was killed */
    self->zmq = zmq_ctx_new();
    self->to_coordinator = zmq_socket(self->zmq, ZMQ_PUSH);
    int zero = 0;
    zmq_setsockopt(self->to_coordinator, ZMQ_LINGER, &zero, sizeof zero);
    if (zmq_connect(self->to_coordinator, self->coordinator) != 0)
        return fail(failure, ERR_IO, "cannot connect to %s: %s", self->coordinator,
                    zmq_strerror(errno));
    return 0;
}

static int serve_open(struct serve *self, struct failure *failure) {
    const struct options *options = self->options;
    self->incarnation = clock_random();
    clock_host_name(self->host);
    int error = check_model(self, failure);
    if (error == 0)
        error = http_listen(&self->listening, options->host, (uint16_t)options->port, failure);
    if (error == 0)
        error = run_dir_open(&self->run_dir, options->run_dir, failure);
    return error;
}

/* All actors in this process: one log, one pid file. */
static int open_together(struct serve *self, struct failure *failure) {
    char path[RUN_DIR_BYTES + 64], pid[32];
    bool verbose = self->options->verbose;
    snprintf(path, sizeof path, "%s/troupe.log", self->run_dir.path);
    snprintf(pid, sizeof pid, "%d\n", (int)getpid());
    log_open(&(struct log_options){
        .name = "troupe",
        .file = path,
        .file_level = verbose ? TRACE_DEBUG : TRACE_INFO,
        .stderr_level = verbose ? TRACE_DEBUG : TRACE_WARNING,
    });
    return run_dir_write(&self->run_dir, "troupe.pid", pid, failure);
}

static int open_supervision(struct serve *self, struct failure *failure) {
    const struct options *options = self->options;
    int error = open_signals(self, failure);
    if (error == 0)
        error = open_coordinator_socket(self, failure);
    if (error == 0 && options->admin_token[0] != 0)
        error = run_dir_write(&self->run_dir, "admin-token", options->admin_token, failure);
    if (error == 0 && options->api_key != NULL)
        error = run_dir_write(&self->run_dir, "api-key", options->api_key, failure);
    if (error < 0)
        return error;
    error = supervisor_link_open(&self->link, self->zmq, self->to_coordinator, self->run_dir.path,
                                 self->coordinator, &options->settings, failure);
    if (error < 0)
        return error;
    add_children(self, ROLE_COORDINATOR, 1, false);
    add_children(self, ROLE_GATEWAY, 1, false);
    add_children(self, ROLE_ATTENTION, options->attention, true);
    add_children(self, ROLE_EXPERT, options->experts, true);
    add_children(self, ROLE_SAMPLER, options->samplers, true);
    return 0;
}

static void serve_close(struct serve *self) {
    probe_http_close(&self->probe);
    supervisor_link_close(&self->link);
    if (self->to_coordinator != NULL)
        zmq_close(self->to_coordinator);
    if (self->zmq != NULL)
        zmq_ctx_term(self->zmq);
    if (self->run[0] != 0) {
        char stem[32];
        snprintf(stem, sizeof stem, "troupe-%s-", self->run);
        transport_shm_sweep(stem);
    }
    if (self->run_dir.lock >= 0)
        run_dir_close(&self->run_dir);
    if (self->signals >= 0)
        close(self->signals);
    if (self->listening >= 0)
        close(self->listening);
    free(self->child);
    free(self->started);
}

int command_serve(const struct options *given) {
    struct options options = *given;
    if (options.api_key_read[0] != 0)
        options.api_key = options.api_key_read;
    if (options.settings.expected_experts == 0)
        options.settings.expected_experts = (uint32_t)options.experts;
    /* An address that others can reach needs a token: one is made up and shown. */
    if (options.admin != NULL && strchr(options.admin, '/') == NULL && options.admin_token[0] == 0)
        snprintf(options.admin_token, sizeof options.admin_token, "%016llx%016llx",
                 (unsigned long long)clock_random(), (unsigned long long)clock_random());
    struct serve self = {.options = &options,
                         .listening = -1,
                         .signals = -1,
                         .probe = {.file = -1},
                         .run_dir = {.lock = -1}};
    struct failure failure;
    log_open(&(struct log_options){
        .name = "supervisor",
        .stderr_level = options.verbose ? TRACE_DEBUG : TRACE_INFO,
    });
    int error = serve_open(&self, &failure);
    if (error == 0)
        error = options.in_process ? open_together(&self, &failure) : open_supervision(&self, &failure);
    if (error < 0) {
        fprintf(stderr, "troupe serve: %s\n", failure.text);
        self.exit_code = EXIT_FAILED;
    } else if (options.in_process) {
        self.exit_code = together_run(&options, self.listening, self.run_dir.path, announce_ready, &self);
    } else {
        supervise(&self);
    }
    serve_close(&self);
    return self.exit_code;
}
