/* troupe ctl: asks the coordinator's admin interface (coordinator/admin.c) over HTTP and shows the answer, as text for people or as
 * the JSON that it is. Each subcommand is a row of the table. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "actors/actor.h"
#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/run_dir.h"

#define CONNECT_TIMEOUT_NS 5000000000u /* a coordinator that is being restarted is back by then */
#define RETRY_MS           100
#define ANSWER_TIMEOUT_S   30
#define ANSWER_MAX         (512u << 20)

struct ctl {
    const struct options *options;
    char address[ADDRESS_BYTES_MAX];
    const char *word[POSITIONAL_MAX]; /* after the subcommand */
    int words;
    char *raw, *body; /* answer; body points into raw */
    size_t raw_bytes, body_bytes;
    int status;
};

/* ---- HTTP ---- */

static int connect_unix(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int file = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (file >= 0 && connect(file, (struct sockaddr *)&address, sizeof address) != 0) {
        close(file);
        return -1;
    }
    return file;
}

static int connect_tcp(const char *address) {
    char host[ADDRESS_BYTES_MAX];
    const char *colon = strrchr(address, ':');
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    int file = -1;
    snprintf(host, sizeof host, "%.*s", (int)(colon - address), address);
    if (getaddrinfo(host, colon + 1, &hints, &found) != 0) {
        errno = EHOSTUNREACH;
        return -1;
    }
    for (struct addrinfo *at = found; at != NULL && file < 0; at = at->ai_next) {
        file = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, 0);
        if (file >= 0 && connect(file, at->ai_addr, at->ai_addrlen) != 0) {
            close(file);
            file = -1;
        }
    }
    freeaddrinfo(found);
    return file;
}

static int open_connection(const struct ctl *self) {
    bool tcp = strchr(self->address, '/') == NULL && strchr(self->address, ':') != NULL;
    uint64_t until = clock_now_ns() + CONNECT_TIMEOUT_NS;
    for (;;) {
        int file = tcp ? connect_tcp(self->address) : connect_unix(self->address);
        if (file >= 0 || clock_now_ns() >= until)
            return file;
        usleep(RETRY_MS * 1000);
    }
}

static bool send_all(int file, const char *bytes, size_t size) {
    while (size > 0) {
        ssize_t sent = send(file, bytes, size, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        bytes += sent;
        size -= (size_t)sent;
    }
    return true;
}

/* Everything until the other side closes. */
static bool receive_all(struct ctl *self, int file) {
    size_t capacity = 65536;
    self->raw = malloc(capacity);
    self->raw_bytes = 0;
    while (self->raw != NULL) {
        if (self->raw_bytes + 1 == capacity) {
            char *grown = capacity < ANSWER_MAX ? realloc(self->raw, capacity *= 2) : NULL;
            if (grown == NULL)
                return false;
            self->raw = grown;
        }
        ssize_t got = recv(file, self->raw + self->raw_bytes, capacity - self->raw_bytes - 1, 0);
        if (got < 0)
            return false;
        if (got == 0)
            break;
        self->raw_bytes += (size_t)got;
    }
    if (self->raw == NULL)
        return false;
    self->raw[self->raw_bytes] = 0;
    char *end = strstr(self->raw, "\r\n\r\n");
    if (end == NULL || sscanf(self->raw, "HTTP/1.%*d %d", &self->status) != 1)
        return false;
    self->body = end + 4;
    self->body_bytes = self->raw_bytes - (size_t)(self->body - self->raw);
    return true;
}

static bool ask(struct ctl *self, const char *method, const char *path, json_t *body) {
    const char *token = self->options->admin_token;
    char head[API_KEY_BYTES + 512], *text = body != NULL ? json_dumps(body, JSON_COMPACT) : NULL;
    size_t size = text != NULL ? strlen(text) : 0;
    int length = snprintf(head, sizeof head,
                          "%s %s HTTP/1.1\r\nHost: troupe\r\nConnection: close\r\nContent-Length: %zu\r\n%s%s%s\r\n",
                          method, path, size, token[0] != 0 ? "Authorization: Bearer " : "", token,
                          token[0] != 0 ? "\r\n" : "");
    json_decref(body);
    int file = open_connection(self);
    bool done = false;
    if (file < 0) {
        fprintf(stderr, "troupe ctl: nobody answers at %s: %s; is the troupe running?\n", self->address,
                strerror(errno));
    } else {
        struct timeval limit = {.tv_sec = ANSWER_TIMEOUT_S};
        setsockopt(file, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        done = send_all(file, head, (size_t)length) && send_all(file, text, size) && receive_all(self, file);
        if (!done)
            fprintf(stderr, "troupe ctl: no whole answer from %s\n", self->address);
        close(file);
    }
    free(text);
    return done;
}

/* ---- text for people ---- */

static const char *text_of(const json_t *json, const char *key) {
    const char *text = json_string_value(json_object_get(json, key));
    return text != NULL ? text : "";
}

static long long number_of(const json_t *json, const char *key) {
    return (long long)json_integer_value(json_object_get(json, key));
}

static void join_names(const json_t *list, char *ret, size_t room) {
    size_t index;
    json_t *name;
    ret[0] = 0;
    json_array_foreach(list, index, name) {
        size_t used = strlen(ret);
        snprintf(ret + used, room - used, "%s%s", index > 0 ? " " : "", json_string_value(name));
    }
}

static void print_operation(const json_t *operation) {
    char what[1024] = "", names[512];
    const char *kind = text_of(operation, "kind");
    join_names(json_object_get(operation, "processes"), names, sizeof names);
    if (strcmp(kind, "scale") == 0)
        snprintf(what, sizeof what, "%s to %lld  %s", text_of(operation, "role"), number_of(operation, "count"), names);
    else if (json_object_get(operation, "layer") != NULL)
        snprintf(what, sizeof what, "layer %lld expert %lld %s%s%s%s", number_of(operation, "layer"),
                 number_of(operation, "expert"), text_of(operation, "from")[0] != 0 ? "from " : "",
                 text_of(operation, "from"), text_of(operation, "from")[0] != 0 ? " to " : "to ",
                 text_of(operation, "to"));
    else
        snprintf(what, sizeof what, "%s", names);
    printf("%5lld  %-10s %-8s %7.2f s  %s", number_of(operation, "id"), kind, text_of(operation, "phase"),
           json_number_value(json_object_get(operation, "seconds")), what);
    if (json_object_get(operation, "bytes") != NULL)
        printf("  %.1f of %.1f MB loaded", (double)number_of(operation, "bytes_done") / 1e6,
               (double)number_of(operation, "bytes") / 1e6);
    if (json_object_get(operation, "reason") != NULL)
        printf("  (in %s: %s)", text_of(operation, "aborted_in"), text_of(operation, "reason"));
    printf("\n");
}

static void print_operations(const json_t *answer) {
    const json_t *list = json_object_get(answer, "operations");
    size_t index;
    json_t *operation;
    if (json_array_size(list) == 0)
        printf("no operations\n");
    json_array_foreach(list, index, operation)
        print_operation(operation);
}

static void print_actors(const json_t *answer) {
    size_t index;
    json_t *actor;
    printf("%5s  %-14s %-12s %-9s %12s %8s %10s %9s %6s %15s  %s\n", "actor", "name", "role", "state", "heartbeat",
           "epoch", "memory", "copies", "queue", "p50/p99 of rows", "address");
    json_array_foreach(json_object_get(answer, "actors"), index, actor) {
        char copies[48] = "", queue[24] = "", answers[48] = "";
        if (json_object_get(actor, "copies") != NULL)
            snprintf(copies, sizeof copies, "%lld/%lld", number_of(actor, "copies_held"), number_of(actor, "copies"));
        if (json_object_get(actor, "queue") != NULL)
            snprintf(queue, sizeof queue, "%lld", number_of(actor, "queue"));
        if (number_of(actor, "answer_p99_us") > 0)
            snprintf(answers, sizeof answers, "%.1f/%.1f ms", (double)number_of(actor, "answer_p50_us") / 1e3,
                     (double)number_of(actor, "answer_p99_us") / 1e3);
        printf("%5lld  %-14s %-12s %-9s %9.0f ms %8lld %7.0f MB %9s %6s %15s  %s\n", number_of(actor, "id"),
               text_of(actor, "name"), text_of(actor, "role"), text_of(actor, "state"),
               json_number_value(json_object_get(actor, "heartbeat_age_ms")), number_of(actor, "epoch"),
               (double)number_of(actor, "memory_bytes") / 1e6, copies, queue, answers,
               text_of(actor, "address"));
    }
}

static void print_status(const json_t *answer) {
    printf("epoch %lld, %s, %lld expert copies of %lld experts\n", number_of(answer, "epoch"),
           json_is_true(json_object_get(answer, "serving")) ? "serving" : "not serving", number_of(answer, "copies"),
           number_of(answer, "experts"));
    print_actors(answer);
    if (json_array_size(json_object_get(answer, "operations")) > 0)
        print_operations(answer);
}

static void print_placement(const json_t *answer) {
    size_t layers, experts;
    json_t *layer, *expert;
    printf("epoch %lld\n", number_of(answer, "epoch"));
    json_array_foreach(json_object_get(answer, "layers"), layers, layer) {
        json_array_foreach(json_object_get(layer, "experts"), experts, expert) {
            char holders[1024], coming[512];
            join_names(json_object_get(expert, "holders"), holders, sizeof holders);
            join_names(json_object_get(expert, "coming"), coming, sizeof coming);
            printf("layer %3lld expert %3lld  %s%s%s%s\n", number_of(layer, "layer"), number_of(expert, "expert"),
                   holders, coming[0] != 0 ? " (loading: " : "", coming, coming[0] != 0 ? ")" : "");
        }
    }
}

static void print_begun(const json_t *answer) {
    print_operation(json_object_get(answer, "operation"));
}

static void print_plan(const json_t *answer) {
    if (json_object_get(answer, "operation") != NULL)
        print_begun(answer);
    printf("%lld copies to move; balancedness %.3f now, %.3f then%s%s\n", number_of(answer, "moves"),
           json_number_value(json_object_get(answer, "balancedness_before")),
           json_number_value(json_object_get(answer, "balancedness_after")),
           text_of(answer, "note")[0] != 0 ? ": " : "", text_of(answer, "note"));
}

static void print_bias(const json_t *answer) {
    size_t index;
    json_t *version;
    const json_t *imbalance = json_object_get(answer, "imbalance");
    printf("biases %s; version %s is current; gamma %g, clamp %g, at most every %lld ms\n",
           json_is_true(json_object_get(answer, "on")) ? "follow the load" : "stay as they are", text_of(answer, "name"),
           json_number_value(json_object_get(answer, "gamma")), json_number_value(json_object_get(answer, "clamp")),
           number_of(answer, "interval_ms"));
    if (imbalance != NULL)
        printf("imbalance (max - mean) / mean of the layers when they last moved: mean %.3f, worst %.3f\n",
               json_number_value(json_object_get(imbalance, "mean")),
               json_number_value(json_object_get(imbalance, "worst")));
    if (json_array_size(json_object_get(answer, "versions")) > 0)
        printf("%-20s %-8s %10s %9s %10s %8s\n", "version", "state", "largest", "requests", "sequences", "holders");
    json_array_foreach(json_object_get(answer, "versions"), index, version)
        printf("%-20s %-8s %10.4f %9lld %10lld %8lld\n", text_of(version, "name"), text_of(version, "state"),
               json_number_value(json_object_get(version, "largest")), number_of(version, "requests"),
               number_of(version, "sequences"), number_of(version, "holders"));
}

/* ---- subcommands ---- */

static json_t *number_or_text(const char *word) {
    char *end;
    long long number = strtoll(word, &end, 10);
    return end != word && *end == 0 ? json_integer(number) : json_string(word);
}

static json_t *make_scale(const struct ctl *self) {
    return json_pack("{s:s, s:o}", "role", self->word[0], "count", number_or_text(self->word[1]));
}
static json_t *make_drain(const struct ctl *self) {
    return json_pack("{s:s}", "actor", self->word[0]);
}
static json_t *make_move(const struct ctl *self) {
    return json_pack("{s:o, s:o, s:s, s:s}", "layer", number_or_text(self->word[0]), "expert",
                     number_or_text(self->word[1]), "from", self->word[2], "to", self->word[3]);
}
static json_t *make_replicate(const struct ctl *self) {
    json_t *body = json_pack("{s:o, s:o}", "layer", number_or_text(self->word[0]), "expert",
                             number_or_text(self->word[1]));
    if (self->words > 2)
        json_object_set_new(body, "to", json_string(self->word[2]));
    return body;
}
static json_t *make_rebalance(const struct ctl *self) {
    return json_pack("{s:b}", "dry_run", self->options->dry_run);
}
static json_t *make_cancel(const struct ctl *self) {
    return json_pack("{s:o}", "operation", number_or_text(self->word[0]));
}

/* The gateway must find the file from where it stands. */
static json_t *make_journal(const struct ctl *self) {
    char here[PATH_MAX], path[PATH_MAX + 256];
    bool start = strcmp(self->word[0], "start") == 0 && self->words == 2;
    if (!start)
        return strcmp(self->word[0], "stop") == 0 && self->words == 1 ? json_pack("{s:b}", "stop", 1) : json_object();
    bool whole = self->word[1][0] == '/' || getcwd(here, sizeof here) == NULL;
    snprintf(path, sizeof path, "%s%s%.255s", whole ? "" : here, whole ? "" : "/", self->word[1]);
    return json_pack("{s:s}", "file", path);
}
static void print_message(const json_t *answer) {
    printf("%s\n", text_of(answer, "message"));
}

/* NULL: show, which only asks. */
static json_t *make_bias(const struct ctl *self) {
    const struct options *options = self->options;
    if (self->words == 0 || strcmp(self->word[0], "show") == 0)
        return NULL;
    json_t *body = json_pack("{s:s}", "action", self->word[0]);
    if (options->gamma > 0)
        json_object_set_new(body, "gamma", json_real(options->gamma));
    if (options->clamp >= 0)
        json_object_set_new(body, "clamp", json_real(options->clamp));
    if (options->interval_ms > 0)
        json_object_set_new(body, "interval_ms", json_integer((json_int_t)options->interval_ms));
    return body;
}

static const struct subcommand {
    const char *name, *arguments;
    int least, most; /* words after the name */
    const char *path;
    json_t *(*make)(const struct ctl *self); /* NULL: GET */
    void (*print)(const json_t *answer);
} SUBCOMMANDS[] = {
    {"status", "", 0, 0, "/status", NULL, print_status},
    {"actors", "", 0, 0, "/actors", NULL, print_actors},
    {"placement", "[--layer L]", 0, 0, "/placement", NULL, print_placement},
    {"operations", "", 0, 0, "/operations", NULL, print_operations},
    {"scale", "experts|attention|samplers N", 2, 2, "/scale", make_scale, print_begun},
    {"drain", "ACTOR", 1, 1, "/drain", make_drain, print_begun},
    {"move", "LAYER EXPERT FROM TO", 4, 4, "/move", make_move, print_begun},
    {"replicate", "LAYER EXPERT [TO]", 2, 3, "/replicate", make_replicate, print_begun},
    {"rebalance", "[--dry-run]", 0, 0, "/rebalance", make_rebalance, print_plan},
    {"bias", "on|off|show|reset [--gamma G] [--clamp C] [--interval-ms N]", 0, 1, "/bias", make_bias, print_bias},
    {"cancel", "OPERATION", 1, 1, "/cancel", make_cancel, print_begun},
    {"journal", "start FILE | stop", 1, 2, "/troupe/journal", make_journal, print_message},
    {"record", "start|stop|dump --output FILE", 1, 1, NULL, NULL, NULL},
};
#define SUBCOMMANDS_COUNT (sizeof SUBCOMMANDS / sizeof SUBCOMMANDS[0])

static int usage(void) {
    fprintf(stderr, "usage: troupe ctl SUBCOMMAND (--run-dir DIR | --address ADMIN) [--json]\n");
    for (size_t i = 0; i < SUBCOMMANDS_COUNT; i++)
        fprintf(stderr, "  %s %s\n", SUBCOMMANDS[i].name, SUBCOMMANDS[i].arguments);
    return 2;
}

static int show_failure(const struct ctl *self) {
    json_t *answer = json_loads(self->body, 0, NULL);
    if (self->options->as_json)
        printf("%s", self->body);
    fprintf(stderr, "troupe ctl: %s\n", answer != NULL ? text_of(json_object_get(answer, "error"), "message")
                                                       : "an answer that is no JSON");
    json_decref(answer);
    return 1;
}

static int write_file(const struct ctl *self, const char *path) {
    FILE *file = fopen(path, "wb");
    bool written = file != NULL && fwrite(self->body, 1, self->body_bytes, file) == self->body_bytes;
    if (file != NULL)
        written = fclose(file) == 0 && written;
    if (!written)
        fprintf(stderr, "troupe ctl: cannot write %s: %s\n", path, strerror(errno));
    return written ? 0 : 1;
}

static int record(struct ctl *self) {
    char path[96];
    const char *what = self->word[0], *file = self->options->to_file;
    bool dump = strcmp(what, "dump") == 0;
    if (!dump && strcmp(what, "start") != 0 && strcmp(what, "stop") != 0)
        return usage();
    if (dump && file == NULL) {
        fprintf(stderr, "troupe ctl: record dump: say where to with --output FILE\n");
        return 2;
    }
    snprintf(path, sizeof path, "/%s_expert_distribution_record", what);
    if (!ask(self, "POST", path, NULL))
        return 1;
    if (self->status >= 300)
        return show_failure(self);
    if (dump)
        return write_file(self, file);
    printf("%s", self->body);
    return 0;
}

static int run(struct ctl *self, const struct subcommand *subcommand) {
    char path[64];
    if (subcommand->path == NULL)
        return record(self);
    snprintf(path, sizeof path, "%s", subcommand->path);
    if (self->options->layer != UINT64_MAX)
        snprintf(path, sizeof path, "%s?layer=%" PRIu64, subcommand->path, self->options->layer);
    json_t *body = subcommand->make != NULL ? subcommand->make(self) : NULL;
    if (!ask(self, body != NULL ? "POST" : "GET", path, body))
        return 1;
    if (self->status >= 300)
        return show_failure(self);
    if (self->options->as_json) {
        fwrite(self->body, 1, self->body_bytes, stdout);
        return 0;
    }
    json_t *answer = json_loads(self->body, 0, NULL);
    if (answer != NULL)
        subcommand->print(answer);
    json_decref(answer);
    return answer != NULL ? 0 : 1;
}

int command_ctl(const struct options *options) {
    struct ctl self = {.options = options};
    const struct subcommand *found = NULL;
    if (options->positionals > 0 && strcmp(options->positional[0], "fault") == 0)
        return command_fault(options); /* goes to the processes themselves */
    for (size_t i = 0; i < SUBCOMMANDS_COUNT && options->positionals > 0; i++)
        if (strcmp(SUBCOMMANDS[i].name, options->positional[0]) == 0)
            found = &SUBCOMMANDS[i];
    self.words = options->positionals - 1;
    for (int i = 0; i < self.words; i++)
        self.word[i] = options->positional[i + 1];
    if (found == NULL || self.words < found->least || self.words > found->most)
        return usage();
    if (options->address != NULL)
        snprintf(self.address, sizeof self.address, "%s", options->address);
    else if (options->run_dir != NULL)
        snprintf(self.address, sizeof self.address, "%s/%s", options->run_dir,
                 found->make == make_journal ? "gateway.sock" : "admin.sock"); /* whose journal it is */
    else {
        fprintf(stderr, "troupe ctl: expected --run-dir DIR or --address ADMIN\n");
        return 2;
    }
    int code = run(&self, found);
    free(self.raw);
    return code;
}
