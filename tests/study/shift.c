/* make study-shift: what a change of the text's domain does to the balance of a live troupe, and what brings it back.
 *
 * The demo model is served three times: experts as they were placed at first; rebalanced by the troupe itself; the same with routing biases that
 * follow the load. Each time the same prompts come in rounds, first drama, then code, then chat. The loads of a round are recorded (admin
 * interface), and scored on the placement that the round began with, rows shared evenly among copies: so a plan is judged on text that it has
 * not seen. Prints a table, writes a plot.
 *
 * usage: shift MODEL TEXT_DIR OUT.svg [ROUNDS [PROCESSES [SPARE]]] */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/plan.h"
#include "coordinator/trace.h"
#include "tests/support/plot.h"
#include "tests/support/cluster.h"
#include "tests/support/http.h"
#include "tests/support/model_files.h"

#define REQUESTS      32u /* of a round */
#define PARALLEL      8u
#define PROMPT_BYTES  1500u
#define ANSWER_TOKENS 16
#define ROUNDS        7u /* of a domain */
#define ROUNDS_MAX    64u
#define LAYERS_SHOWN  64u
#define SETTLED       3u /* last rounds of a domain: what is reached */

static const char *const domains[] = {"drama", "code", "chat"};
#define DOMAINS 3u

static const struct mode {
    const char *name, *arguments;
} modes[] = {
    {"off", ""},
    {"rebalancing", "--rebalance-interval-ms 1000 --rebalance-threshold 0.98 --load-half-life-ms 12000"},
    {"rebalancing and bias",
     "--rebalance-interval-ms 1000 --rebalance-threshold 0.98 --load-half-life-ms 12000 "
     "--bias-control 1 --bias-interval-ms 500 --bias-clamp 0.05 --bias-gamma 0.005 "
     "--bias-linger-ms 500"},
};
#define MODES 3u

struct study {
    const char *model, *text_dir;
    uint32_t rounds, processes, spare; /* rounds: of a domain */
    char *text[DOMAINS];
    size_t bytes[DOMAINS];
    uint32_t layers, experts; /* known after the first round */
    double balance[MODES][DOMAINS * ROUNDS_MAX][LAYERS_SHOWN];
};

static void die(const char *what) {
    fprintf(stderr, "study-shift: %s\n", what);
    exit(1);
}

/* ---- what the admin interface says ---- */

/* Output of a command line, malloc'd. */
static char *run_line(const char *line) {
    char *text = NULL;
    size_t size = 0;
    FILE *pipe = popen(line, "r"), *memory = open_memstream(&text, &size);
    if (pipe == NULL || memory == NULL)
        die("a command cannot be run");
    for (int c = getc(pipe); c != EOF; c = getc(pipe))
        putc(c, memory);
    fclose(memory);
    if (pclose(pipe) != 0) {
        fprintf(stderr, "%s\n%s", line, text);
        die("a command failed");
    }
    return text;
}

static char *ctl(const struct cluster *cluster, const char *words) {
    const char *build = getenv("TROUPE_BUILD");
    char line[512];
    snprintf(line, sizeof line, "%s/troupe ctl %s --run-dir %s", build != NULL ? build : "build",
             words, cluster->run_dir);
    return run_line(line);
}

/* In short windows, so that the last one is over soon. */
static void start_record(const struct cluster *cluster) {
    char line[512];
    snprintf(line, sizeof line,
             "curl -sf --unix-socket %s/admin.sock -d '{\"window_ms\": 50}' "
             "http://troupe/start_expert_distribution_record",
             cluster->run_dir);
    free(run_line(line));
}

/* "expert-7" */
static uint32_t process_of(const json_t *holder, uint32_t processes) {
    unsigned number = 0;
    if (sscanf(json_string_value(holder), "expert-%u", &number) != 1)
        die("a holder is no expert process");
    return number % processes; /* one that was started again has the same name */
}

static void read_placement(const struct cluster *cluster, uint32_t processes,
                           struct expert_plan *ret) {
    char *text = ctl(cluster, "placement --json");
    json_t *json = json_loads(text, 0, NULL), *layers = json_object_get(json, "layers");
    free(text);
    uint32_t count = (uint32_t)json_array_size(layers), at = 0;
    uint32_t experts =
        (uint32_t)json_array_size(json_object_get(json_array_get(layers, 0), "experts"));
    struct failure failure;
    if (plan_alloc(ret, count, experts, processes, (uint64_t)count * experts * processes, &failure) < 0)
        die(failure.text);
    for (uint32_t pair = 0; pair < count * experts; pair++) {
        json_t *expert = json_array_get(
            json_object_get(json_array_get(layers, pair / experts), "experts"), pair % experts);
        json_t *holders = json_object_get(expert, "holders");
        ret->first[pair] = at;
        for (size_t i = 0; i < json_array_size(holders); i++)
            ret->holder[at++] = process_of(json_array_get(holders, i), processes);
        ret->first[pair + 1] = at;
    }
    json_decref(json);
}

/* Rows per (layer, expert) since the record was started, in the first window. */
static void read_loads(const struct cluster *cluster, struct load_trace *ret) {
    char words[256], path[200];
    size_t size;
    struct failure failure;
    snprintf(path, sizeof path, "%s/round.safetensors", cluster->run_dir);
    snprintf(words, sizeof words, "record dump --output %s", path);
    free(ctl(cluster, words));
    char *bytes = read_whole_file(path, &size);
    unlink(path);
    if (bytes == NULL || trace_read(ret, bytes, size, path, &failure) < 0)
        die(bytes == NULL ? "no record of loads" : failure.text);
    free(bytes);
    for (uint32_t w = 1; w < ret->windows; w++)
        for (size_t i = 0; i < (size_t)ret->layers * ret->experts; i++)
            ret->load[i] += ret->load[w * (size_t)ret->layers * ret->experts + i];
}

/* ---- rounds ---- */

static char *make_request(const struct study *self, uint32_t domain, uint32_t number) {
    size_t room = self->bytes[domain] - PROMPT_BYTES;
    size_t at = (size_t)number * 2654435761u % room, size = PROMPT_BYTES;
    const char *text = self->text[domain];
    while (((unsigned char)text[at] & 0xc0) == 0x80) /* not in the middle of a character */
        at++;
    while (((unsigned char)text[at + size] & 0xc0) == 0x80)
        size--;
    json_t *prompt = json_stringn(text + at, size);
    json_t *json = json_pack("{s:o, s:i, s:i, s:f, s:b}", "prompt", prompt, "max_tokens",
                             ANSWER_TOKENS, "seed", (int)number, "temperature", 0.8, "ignore_eos", 1);
    char *ret = json != NULL ? json_dumps(json, JSON_COMPACT) : NULL;
    if (ret == NULL)
        die("a prompt cannot be written");
    json_decref(json);
    return ret;
}

static void send_round(const struct study *self, uint16_t port, uint32_t domain, uint32_t round) {
    struct http_call calls[REQUESTS] = {0};
    char *body[REQUESTS];
    for (uint32_t i = 0; i < REQUESTS; i++) {
        body[i] = make_request(self, domain, round * REQUESTS + i);
        calls[i].method = "POST";
        calls[i].path = "/v1/completions";
        calls[i].body = body[i];
    }
    http_run(port, calls, REQUESTS, PARALLEL, 120000);
    for (uint32_t i = 0; i < REQUESTS; i++) {
        if (calls[i].status != 200)
            die("a request was not answered with 200");
        http_call_free(&calls[i]);
        free(body[i]);
    }
}

static void run_round(struct study *self, const struct cluster *cluster, uint32_t mode,
                      uint32_t domain, uint32_t round) {
    struct expert_plan placement;
    struct load_trace loads;
    double scratch[ACTORS_MAX];
    read_placement(cluster, self->processes, &placement);
    start_record(cluster);
    send_round(self, cluster->port, domain, round);
    usleep(600000); /* the last heartbeats */
    read_loads(cluster, &loads);
    if (loads.layers > LAYERS_SHOWN)
        die("the model has too many layers");
    self->layers = loads.layers;
    self->experts = loads.experts;
    double *balance = self->balance[mode][domain * self->rounds + round];
    for (uint32_t l = 0; l < loads.layers; l++)
        balance[l] = plan_balancedness(&placement, l, loads.load + (size_t)l * loads.experts, NULL,
                                       scratch);
    plan_free(&placement);
    trace_free(&loads);
}

static void run_mode(struct study *self, uint32_t mode) {
    struct cluster cluster;
    char arguments[512], spare[64] = "";
    if (mode > 0)
        snprintf(spare, sizeof spare, "--rebalance-spare %u", self->spare);
    snprintf(arguments, sizeof arguments, "--experts %u --threads 1 %s %s", self->processes,
             spare, modes[mode].arguments);
    if (!cluster_start(&cluster, self->model, arguments))
        die("the troupe did not start");
    for (uint32_t domain = 0; domain < DOMAINS; domain++)
        for (uint32_t round = 0; round < self->rounds; round++)
            run_round(self, &cluster, mode, domain, round);
    cluster_stop(&cluster);
    fprintf(stderr, "%s: done\n", modes[mode].name);
}

/* ---- what came of it ---- */

struct summary {
    double mean, worst; /* of layers */
};

/* Mean over the rounds from `first` to before `last`. */
static struct summary summarise(const struct study *self, uint32_t mode, uint32_t first,
                                uint32_t last) {
    struct summary ret = {0, 0};
    for (uint32_t r = first; r < last; r++) {
        double mean = 0, worst = 1;
        for (uint32_t l = 0; l < self->layers; l++) {
            mean += self->balance[mode][r][l] / self->layers;
            worst = fmin(worst, self->balance[mode][r][l]);
        }
        ret.mean += mean / (last - first);
        ret.worst += worst / (last - first);
    }
    return ret;
}

static void print_line(const struct study *self, const char *domain, const char *rounds,
                       uint32_t first, uint32_t last) {
    printf("| %-6s | %-6s |", domain, rounds);
    for (uint32_t mode = 0; mode < MODES; mode++) {
        struct summary its = summarise(self, mode, first, last);
        printf(" %.3f | %.3f |", its.mean, its.worst);
    }
    printf("\n");
}

static void print_table(const struct study *self) {
    uint32_t all = DOMAINS * self->rounds;
    printf("%u expert processes, %u layers x %u experts, %u spare slots per layer when "
           "rebalancing; %u requests a round\n\n",
           self->processes, self->layers, self->experts, self->spare, REQUESTS);
    printf("| Domain | Round |");
    for (uint32_t mode = 0; mode < MODES; mode++)
        printf(" %s: mean | worst layer |", modes[mode].name);
    printf("\n|---|---|---|---|---|---|---|---|\n");
    for (uint32_t r = 0; r < all; r++) {
        char name[32];
        snprintf(name, sizeof name, "%u", r % self->rounds + 1);
        print_line(self, domains[r / self->rounds], name, r, r + 1);
    }
    printf("\nImbalance (max - mean) / mean, mean of layers, over the last %u rounds of each domain:\n\n",
           SETTLED);
    printf("| Domain | off | rebalancing | rebalancing and bias |\n|---|---|---|---|\n");
    for (uint32_t d = 0; d < DOMAINS; d++) {
        printf("| %s |", domains[d]);
        for (uint32_t mode = 0; mode < MODES; mode++) {
            double imbalance = 0;
            for (uint32_t r = (d + 1) * self->rounds - SETTLED; r < (d + 1) * self->rounds; r++)
                for (uint32_t l = 0; l < self->layers; l++)
                    imbalance += (1 / self->balance[mode][r][l] - 1) / self->layers / SETTLED;
            printf(" %.3f |", imbalance);
        }
        printf("\n");
    }
}

static void write_plot(const struct study *self, const char *path) {
    uint32_t all = DOMAINS * self->rounds;
    double *value = malloc((size_t)all * self->layers * sizeof *value);
    FILE *file = fopen(path, "w");
    if (file == NULL || value == NULL)
        die("the plot cannot be written");
    struct plot plot;
    plot_begin(&plot, file, MODES, all, "Balancedness (mean / max load of the processes) of each layer, "
                                        "and their mean, by round");
    for (uint32_t mode = 0; mode < MODES; mode++) {
        for (uint32_t l = 0; l < self->layers; l++)
            for (uint32_t r = 0; r < all; r++)
                value[l * all + r] = self->balance[mode][r][l];
        plot_panel(&plot, modes[mode].name, value, self->layers);
        for (uint32_t d = 0; d < DOMAINS; d++)
            plot_section(&plot, domains[d], d * self->rounds, (d + 1) * self->rounds);
    }
    plot_end(&plot);
    fclose(file);
    free(value);
}

static uint32_t number(const char *text, uint32_t low, uint32_t high) {
    char *end;
    unsigned long ret = strtoul(text, &end, 10);
    if (end == text || *end != '\0' || ret < low || ret > high)
        die("usage: shift MODEL TEXT_DIR OUT.svg [ROUNDS [PROCESSES [SPARE]]]");
    return (uint32_t)ret;
}

int main(int argc, char **argv) {
    static struct study study;
    if (argc < 4 || argc > 7)
        die("usage: shift MODEL TEXT_DIR OUT.svg [ROUNDS [PROCESSES [SPARE]]]");
    study.model = argv[1];
    study.text_dir = argv[2];
    study.rounds = argc > 4 ? number(argv[4], SETTLED, ROUNDS_MAX) : ROUNDS;
    study.processes = argc > 5 ? number(argv[5], 1, 64) : 4;
    study.spare = argc > 6 ? number(argv[6], 0, 1024) : 8;
    for (uint32_t d = 0; d < DOMAINS; d++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s.txt", study.text_dir, domains[d]);
        study.text[d] = read_whole_file(path, &study.bytes[d]);
        if (study.text[d] == NULL || study.bytes[d] < 4 * PROMPT_BYTES)
            die("TEXT_DIR: expected drama.txt, code.txt and chat.txt of some kilobytes");
    }
    for (uint32_t mode = 0; mode < MODES; mode++)
        run_mode(&study, mode);
    print_table(&study);
    write_plot(&study, argv[3]);
    for (uint32_t d = 0; d < DOMAINS; d++)
        free(study.text[d]);
    return 0;
}
