/* Options by a table: what is accepted, how it is read and what --help says come from the same
 * rows. */
#include "actors/host/options.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/files.h"
#include "actors/limits.h"

enum option_type { OPTION_TEXT, OPTION_NUMBER, OPTION_FRACTION, OPTION_FLAG, OPTION_KNOB };

struct option_row {
    const char *name, *argument;
    enum option_type type;
    size_t offset;
    uint64_t min, max;
    unsigned commands;
    const char *help;
};

#define TEXT(name, field, argument, commands, help)                                                \
    { name, argument, OPTION_TEXT, offsetof(struct options, field), 0, 0, commands, help }
#define NUMBER(name, field, min, max, commands, help)                                              \
    { name, "N", OPTION_NUMBER, offsetof(struct options, field), min, max, commands, help }
#define FLAG(name, field, commands, help)                                                          \
    { name, NULL, OPTION_FLAG, offsetof(struct options, field), 0, 0, commands, help }

static const struct option_row table[] = {
    TEXT("model", model, "DIR", FOR_MODELS,
         "model directory in Hugging Face layout (default models/demo)"),
    NUMBER("experts", experts, 1, 512, FOR_SERVE | FOR_GENERATE | FOR_CHECK | FOR_BENCH,
           "expert processes (default 4)"),
    NUMBER("attention", attention, 1, 64, FOR_SERVE | FOR_GENERATE | FOR_CHECK | FOR_BENCH,
           "attention processes (default 1)"),
    NUMBER("samplers", samplers, 1, 64, FOR_SERVE | FOR_GENERATE | FOR_CHECK | FOR_BENCH,
           "sampler processes (default 1)"),
    TEXT("host", host, "ADDRESS", FOR_SERVE | FOR_GATEWAY | FOR_CHECK | FOR_REPLAY,
         "address to listen on for HTTP (default 127.0.0.1)"),
    NUMBER("port", port, 0, 65535, FOR_SERVE | FOR_GATEWAY | FOR_CHECK | FOR_REPLAY,
           "port to listen on for HTTP, 0 for any free one (default 8000)"),
    TEXT("view", view, "on|off", FOR_SERVE | FOR_GATEWAY,
         "live view at /, read-only (default: on where only this machine can reach it)"),
    TEXT("served-model-name", served_model, "NAME", FOR_SERVE | FOR_GATEWAY,
         "name in /v1/models (default: name of the model directory)"),
    TEXT("api-key", api_key, "KEY", FOR_SERVE | FOR_GATEWAY | FOR_BENCH | FOR_TOP,
         "clients must send it as a bearer token"),
    TEXT("api-key-file", api_key_file, "FILE", FOR_SERVE | FOR_GATEWAY | FOR_TOP,
         "the same, read from a file: the command line is no place for secrets"),
    TEXT("run-dir", run_dir, "DIR", FOR_SERVE | FOR_ACTORS | FOR_CONTROL,
         "directory of sockets, pid files and logs (serve: default a new one under "
         "XDG_RUNTIME_DIR)"),
    TEXT("admin", admin, "ADDRESS", FOR_SERVE | FOR_COORDINATOR,
         "where the admin interface listens, a path or host:port (default: admin.sock in "
         "--run-dir)"),
    TEXT("admin-token-file", admin_token_file, "FILE", FOR_SERVE | FOR_COORDINATOR | FOR_CONTROL,
         "file with the bearer token of the admin interface in its first line; needed for "
         "host:port"),
    TEXT("address", address, "ADMIN", FOR_CONTROL,
         "admin interface to ask, a path or host:port (default: the one in --run-dir)"),
    TEXT("output", to_file, "FILE", FOR_CONTROL, "where 'record dump' writes the trace"),
    NUMBER("layer", layer, 0, LAYERS_MAX, FOR_CONTROL, "placement of this layer only"),
    FLAG("json", as_json, FOR_CONTROL, "answers as JSON"),
    TEXT("text", text, "FILE", FOR_BIAS_STUDY,
         "UTF-8 text to study; more may follow: each is one domain, and then all are mixed"),
    TEXT("clamps", clamps, "X[,X...]", FOR_BIAS_STUDY,
         "how far biases may go, one row each (default 0,0.01,0.02,0.05,0.1)"),
    {"gamma", "X", OPTION_FRACTION, offsetof(struct options, gamma), 0, BIAS_DELTA_MAX, FOR_BIAS_STUDY,
     "step of the biases (default 0.002)"},
    NUMBER("steps", steps, 1, 1000000, FOR_BIAS_STUDY, "how often they move (default 100)"),
    NUMBER("window-tokens", window_tokens, 2, CONTEXT_MAX, FOR_BIAS_STUDY,
           "tokens of a window: what is read at a time, and what they move by (default 512)"),
    FLAG("json", as_json, FOR_BIAS_STUDY, "print all figures as JSON"),
    {"gamma", "X", OPTION_FRACTION, offsetof(struct options, gamma), 0, BIAS_DELTA_MAX, FOR_CONTROL,
     "bias on: step of the routing biases (default: as it is, at first bias_gamma)"},
    {"clamp", "X", OPTION_FRACTION, offsetof(struct options, clamp), 0, BIAS_DELTA_MAX, FOR_CONTROL,
     "bias on: how far they may go (default: as it is, at first bias_clamp)"},
    NUMBER("interval-ms", interval_ms, 10, 86400000, FOR_CONTROL,
           "bias on: how often they may move (default: as it is, at first bias_interval_ms)"),
    FLAG("dry-run", dry_run, FOR_CONTROL, "rebalance: only say what would be done"),
    TEXT("coordinator", coordinator, "ADDRESS", FOR_GATEWAY | FOR_WORKER,
         "address of the coordinator, tcp://host:port (default: the one in --run-dir)"),
    TEXT("bind", bind, "ADDRESS", FOR_ACTORS,
         "where this actor's control inbox listens (default: in --run-dir, else tcp://*:*)"),
    TEXT("bind-data", bind_data, "ADDRESS", FOR_WORKER,
         "where its data plane listens for other hosts (default: as --bind)"),
    TEXT("name", name, "NAME", FOR_ACTORS, "name for people and logs (default: the role)"),
    TEXT("numerics", numerics, "f32|bf16|fp8|bf16-sm90|fp8-sm90", FOR_MODELS,
         "numerics profile, the same everywhere; fp8: FP8 weights meet activations quantised to FP8; "
         "those of sm90 compute on the GPU of --gpu (default bf16)"),
    TEXT("isa", isa, "best|scalar|avx512|amx", FOR_MODELS,
         "instruction set; all give the same bits (default best)"),
    TEXT("transport", transport, "auto|shm|zmq", FOR_SERVE | FOR_WORKER | FOR_BENCH | FOR_CHAOS,
         "data plane: shared memory on one host and ZeroMQ between hosts, or one of them always "
         "(default auto)"),
    TEXT("cpus", cpus, "LIST", FOR_ACTORS, "run on these processors only, for instance 0-3,8"),
    NUMBER("gpu", gpu, 0, 1023, FOR_WORKER,
           "run next to this GPU and exchange rows with others that have one over NCCL (default: "
           "none; see docs/gpu.md)"),
    TEXT("weights", weights, "auto|file|peer", FOR_EXPERT,
         "where experts' weights come from: the model directory, other processes that hold them, or "
         "whichever is nearer (default auto)"),
    NUMBER("memory-mib", memory_mib, 0, 1u << 30, FOR_SERVE | FOR_EXPERT,
           "weights that an expert process may hold, 0: no limit (default 0)"),
    TEXT("log", log, "FILE", FOR_ACTORS, "write the log there as well"),
    TEXT("config", config, "FILE", FOR_MODELS, "YAML file with knobs"),
    FLAG("in-process", in_process, FOR_SERVE | FOR_BENCH,
         "all actors in one process, on one thread: no scaling, no restarts"),
    FLAG("verbose", verbose,
         FOR_SERVE | FOR_ACTORS | FOR_GENERATE | FOR_CHECK | FOR_BENCH | FOR_CHAOS | FOR_SIM,
         "log everything"),
    NUMBER("listen-fd", listen_fd, 0, 1u << 20, FOR_GATEWAY,
           "descriptor of a listening socket handed down by a supervisor"),
    TEXT("prompt", prompt, "TEXT", FOR_GENERATE, "what to continue"),
    NUMBER("max-tokens", max_tokens, 1, 1u << 20, FOR_GENERATE, "longest answer (default 64)"),
    {"temperature", "X", OPTION_FRACTION, offsetof(struct options, temperature), 0, 2, FOR_GENERATE,
     "0 for the likeliest token each time (default 0)"},
    NUMBER("seed", seed, 0, UINT64_MAX >> 1, FOR_GENERATE | FOR_SYNTH | FOR_SIM | FOR_CHAOS,
           "seed of the draws (default 0)"),
    TEXT("seeds", seeds, "A..B", FOR_SIM, "run every seed from A to B"),
    NUMBER("jobs", jobs, 1, 256, FOR_SIM, "processes that share the seeds (default 1)"),
    TEXT("scenario", scenario, "FILE", FOR_SIM,
         "run what the file says instead of a seed's own faults (see docs/faults.md)"),
    TEXT("cluster", cluster, "FILE", FOR_SIM,
         "simulate a large cluster with a cost model instead: what it consists of (docs/simulator.md)"),
    TEXT("trace", trace, "FILE", FOR_SIM,
         "write every step there; with --cluster: the loads, as plan --load reads them"),
    FLAG("shrink", shrink, FOR_SIM,
         "on failure take faults out while it still fails, then print what is left"),
    FLAG("first", first, FOR_SIM, "stop at the first seed that fails"),
    FLAG("twice", twice, FOR_SIM,
         "run every seed twice and compare the traces (default: every 16th)"),
    TEXT("golden", golden, "DIR", FOR_CHECK,
         "compare with DIR/golden.safetensors, running the model in DIR"),
    TEXT("shape", shape, "FILE", FOR_SYNTH, "config.json of the model to make"),
    TEXT("url", url, "URL", FOR_BENCH,
         "measure the troupe at http://HOST:PORT, which serves --model, instead of starting one"),
    TEXT("url", url, "URL", FOR_TOP, "the gateway to look at (default http://127.0.0.1:8000)"),
    FLAG("once", once, FOR_TOP, "print it once, as plain text"),
    TEXT("figures", figures, "LIST", FOR_BENCH,
         "what to measure: decode-STREAMS, prefill-TOKENS, load, with commas between"),
    NUMBER("runs", runs, 1, 100, FOR_BENCH, "runs of each figure, in turns (default 5)"),
    {"rate", "X", OPTION_FRACTION, offsetof(struct options, rate), 0, 100000, FOR_BENCH,
     "load: requests a second, 0: half of what 8 streams sustain (default 0)"},
    TEXT("plan", plan, "FILE", FOR_CHAOS, "what to do to it when, see docs/faults.md"),
    TEXT("journal", journal, "FILE", FOR_CHAOS, "SQLite file that the run is added to"),
    TEXT("journal", journal, "FILE", FOR_SERVE | FOR_GATEWAY,
         "record the live view's feed in this SQLite file, for troupe replay"),
    TEXT("journal", journal, "FILE", FOR_SIM,
         "with --cluster: record the live view's feed there, a new file for troupe replay"),
    TEXT("html", html, "FILE", FOR_CHAOS, "write the report there as one page"),
    FLAG("allow-faults", allow_faults, FOR_SERVE | FOR_ACTORS,
         "take faults from the run directory: for tests only"),
    TEXT("json", json, "FILE", FOR_BENCH | FOR_CHAOS,
         "write everything that was measured there, -: to the terminal instead of the table"),
    TEXT("load", load, "FILE", FOR_PLAN,
         "recorded loads: safetensors with expert_load [window, layer, expert]"),
    NUMBER("processes", processes, 1, 1024, FOR_PLAN, "processes to place the experts on"),
    NUMBER("hosts", hosts, 1, 1024, FOR_PLAN,
           "hosts, each with an equal run of the processes (default 1)"),
    NUMBER("spare", spare, 0, 65536, FOR_PLAN,
           "copies in each layer beyond one of each expert (default 0)"),
    TEXT("previous", previous, "PLAN.json", FOR_PLAN, "what is held now, as --json printed it"),
    TEXT("policy", policy, "troupe|eplb|none", FOR_PLAN | FOR_SIM,
         "who plans (default troupe; none, with --cluster: nobody)"),
    FLAG("hierarchical", hierarchical, FOR_PLAN,
         "keep a copy of each expert of a group in one host"),
    NUMBER("groups", groups, 1, 1024, FOR_PLAN,
           "expert groups of the router (default 8 if they divide the experts, else 1)"),
    TEXT("capacity", capacity, "N[,N...]", FOR_PLAN,
         "copies that each process has memory for, all layers together (default: equal)"),
    TEXT("speed", speed, "X[,X...]", FOR_PLAN, "speed of each process, relative (default: equal)"),
    NUMBER("window", window, 1, 1048576, FOR_PLAN,
           "plan from the first N windows and score on the next (default: from all)"),
    NUMBER("expert-bytes", expert_bytes, 1, UINT64_C(1) << 40, FOR_PLAN,
           "weights of one expert (default 44040192, DeepSeek-V3 in FP8)"),
    NUMBER("horizon", horizon, 0, 1u << 30, FOR_PLAN,
           "windows that the plan is expected to last: how much moves may cost (default 400)"),
    FLAG("json", as_json, FOR_PLAN, "print placement and figures as JSON"),
    FLAG("json", as_json, FOR_SIM, "with --cluster: print the figures as JSON"),
    FLAG("help", help, ~0u, "this text"),
};
#define ROWS (sizeof table / sizeof table[0])

static const struct {
    const char *name;
    const char *help;
} knobs[] = {
#define K(name, type, def, min, max, sim_min, sim_max, why) {#name, why},
#include "config/knobs.def"
#undef K
};

static bool knob_name_is(const char *knob, const char *name, size_t length) {
    if (strlen(knob) != length)
        return false;
    for (size_t i = 0; i < length; i++) {
        if (knob[i] != (name[i] == '-' ? '_' : name[i]))
            return false;
    }
    return true;
}

/* The row of "name" or a row for a knob of that name. */
static bool find(const char *name, size_t length, unsigned command, struct option_row *ret) {
    for (size_t i = 0; i < ROWS; i++) {
        if (strlen(table[i].name) == length && strncmp(table[i].name, name, length) == 0 &&
            (table[i].commands & command) != 0) {
            *ret = table[i];
            return true;
        }
    }
    for (size_t i = 0; i < sizeof knobs / sizeof knobs[0]; i++) {
        if ((command & FOR_MODELS) != 0 && knob_name_is(knobs[i].name, name, length)) {
            *ret = (struct option_row){.name = knobs[i].name, .argument = "N", .type = OPTION_KNOB};
            return true;
        }
    }
    return false;
}

static int store(struct options *self, const struct option_row *row, const char *value,
                 struct failure *failure) {
    void *field = (char *)self + row->offset;
    char *end = NULL;
    errno = 0;
    switch (row->type) {
    case OPTION_TEXT:
        *(const char **)field = value;
        return 0;
    case OPTION_FLAG:
        *(bool *)field = true;
        return 0;
    case OPTION_KNOB:
        return settings_set(&self->settings, row->name, value, failure);
    case OPTION_NUMBER: {
        unsigned long long number = strtoull(value, &end, 10);
        if (end == value || *end != 0 || errno != 0 || value[0] == '-' || number < row->min ||
            number > row->max)
            return fail(failure, ERR_INVALID,
                        "--%s: expected a whole number from %llu to %llu, found '%s'", row->name,
                        (unsigned long long)row->min, (unsigned long long)row->max, value);
        *(uint64_t *)field = number;
        self->port_set |= row->offset == offsetof(struct options, port);
        self->seed_set |= row->offset == offsetof(struct options, seed);
        return 0;
    }
    case OPTION_FRACTION: {
        double number = strtod(value, &end);
        if (end == value || *end != 0 ||
            !(number >= (double)row->min && number <= (double)row->max))
            return fail(failure, ERR_INVALID,
                        "--%s: expected a number from %llu to %llu, found '%s'", row->name,
                        (unsigned long long)row->min, (unsigned long long)row->max, value);
        *(double *)field = number;
        return 0;
    }
    }
    return 0;
}

static int parse_one(struct options *self, int argc, char **argv, int *index, unsigned command,
                     struct failure *failure) {
    const char *name = argv[*index] + 2, *equals = strchr(name, '=');
    size_t length = equals != NULL ? (size_t)(equals - name) : strlen(name);
    struct option_row row;
    if (!find(name, length, command, &row))
        return fail(failure, ERR_NOT_FOUND,
                    "'%s' is not an option of 'troupe %s'; see troupe %s --help", argv[*index],
                    argv[0], argv[0]);
    const char *value = equals != NULL ? equals + 1 : NULL;
    if (row.argument == NULL && value != NULL)
        return fail(failure, ERR_INVALID, "--%s takes no value", row.name);
    if (row.argument != NULL && value == NULL) {
        if (*index + 1 >= argc)
            return fail(failure, ERR_INVALID, "--%s expects %s", row.name, row.argument);
        value = argv[++*index];
    }
    return store(self, &row, value, failure);
}

static int parse_config(struct options *self, int argc, char **argv, struct failure *failure) {
    const char *path = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--config") == 0 && i + 1 < argc)
            path = argv[i + 1];
        else if (strncmp(argv[i], "--config=", 9) == 0)
            path = argv[i] + 9;
    }
    if (path == NULL)
        return 0;
    struct mapped file;
    int error = mapped_open_path(&file, path, JSON_FILE_MAX, failure);
    if (error < 0)
        return error;
    struct failure why;
    error = settings_parse_yaml(&self->settings, file.bytes, file.size, &why);
    if (error < 0)
        fail(failure, error, "--config %s: %s", path, why.text);
    mapped_close(&file);
    return error;
}

/* The first line of a file that holds a secret; `path` NULL: nothing to read. */
static int read_secret(const char *path, char ret[static API_KEY_BYTES], struct failure *failure) {
    struct mapped file;
    if (path == NULL)
        return 0;
    int error = mapped_open_path(&file, path, JSON_FILE_MAX, failure);
    if (error < 0)
        return error;
    const char *end = memchr(file.bytes, '\n', file.size);
    size_t size = end != NULL ? (size_t)(end - (const char *)file.bytes) : file.size;
    if (size == 0 || size >= API_KEY_BYTES)
        error = fail(failure, ERR_INVALID,
                     "%s: expected a key of 1 to %d bytes in the first line, found %zu", path,
                     API_KEY_BYTES - 1, size);
    else
        memcpy(ret, file.bytes, size);
    mapped_close(&file);
    return error;
}

static int check_word(const char *option, const char *value, const char *const *words,
                      const char *all, struct failure *failure) {
    for (; *words != NULL; words++) {
        if (strcmp(value, *words) == 0)
            return 0;
    }
    return fail(failure, ERR_INVALID, "--%s: expected %s, found '%s'", option, all, value);
}

static bool is_loopback(const char *host) {
    return strncmp(host, "127.", 4) == 0 || strcmp(host, "::1") == 0 ||
           strcmp(host, "localhost") == 0;
}

static int check_words(const struct options *self, struct failure *failure) {
    static const char *const numerics[] = {"f32", "bf16", "fp8", "bf16-sm90", "fp8-sm90", NULL};
    static const char *const isas[] = {"best", "scalar", "avx512", "amx", NULL};
    static const char *const transports[] = {"auto", "shm", "zmq", NULL};
    static const char *const weights[] = {"auto", "file", "peer", NULL};
    static const char *const policies[] = {"troupe", "eplb", "none", NULL};
    static const char *const views[] = {"on", "off", NULL};
    int error = check_word("view", self->view, views, "on or off", failure);
    if (error == 0)
        error = check_word("numerics", self->numerics, numerics,
                           "f32, bf16, fp8, bf16-sm90 or fp8-sm90", failure);
    if (error == 0)
        error = check_word("isa", self->isa, isas, "best, scalar, avx512 or amx", failure);
    if (error == 0)
        error = check_word("transport", self->transport, transports, "auto, shm or zmq", failure);
    if (error == 0)
        error = check_word("weights", self->weights, weights, "auto, file or peer", failure);
    if (error == 0)
        error = check_word("policy", self->policy, policies, "troupe, eplb or none", failure);
    return error;
}

int options_parse(struct options *ret, int argc, char **argv, unsigned command,
                  struct failure *failure) {
    struct options self = {
        .model = "models/demo",
        .numerics = "bf16",
        .isa = "best",
        .transport = "auto",
        .weights = "auto",
        .host = "127.0.0.1",
        .experts = 4,
        .jobs = 1,
        .attention = 1,
        .samplers = 1,
        .port = 8000,
        .listen_fd = UINT64_MAX,
        .gpu = UINT64_MAX,
        .layer = UINT64_MAX,
        .max_tokens = 64,
        .policy = "troupe",
        .hosts = 1,
        .expert_bytes = 44040192,
        .horizon = 400,
        .clamp = -1,
        .runs = 5,
    };
    settings_default(&self.settings);
    int error = parse_config(&self, argc, argv, failure);
    for (int i = 1; error == 0 && i < argc; i++) {
        if (strncmp(argv[i], "--", 2) == 0)
            error = parse_one(&self, argc, argv, &i, command, failure);
        else if (self.positionals == POSITIONAL_MAX ||
                 (command & (FOR_INSPECT | FOR_SYNTH | FOR_CONTROL | FOR_REPLAY | FOR_BIAS_STUDY)) == 0)
            error = fail(failure, ERR_INVALID, "unexpected argument '%s'; see troupe %s --help",
                         argv[i], argv[0]);
        else
            self.positional[self.positionals++] = argv[i];
    }
    if (self.view == NULL)
        self.view = is_loopback(self.host) ? "on" : "off";
    if (error == 0)
        error = check_words(&self, failure);
    if (error == 0)
        error = read_secret(self.api_key_file, self.api_key_read, failure);
    if (error == 0)
        error = read_secret(self.admin_token_file, self.admin_token, failure);
    if (error < 0)
        return error;
    *ret = self;
    if (ret->api_key_read[0] != 0)
        ret->api_key = ret->api_key_read;
    return 0;
}

void options_help(unsigned command) {
    for (size_t i = 0; i < ROWS; i++) {
        if ((table[i].commands & command) == 0)
            continue;
        char left[64];
        snprintf(left, sizeof left, "--%s %s", table[i].name,
                 table[i].argument != NULL ? table[i].argument : "");
        printf("  %-34s %s\n", left, table[i].help);
    }
    if ((command & FOR_MODELS) != 0) {
        char *text = settings_help();
        printf("\nKnobs, also in the file given with --config:\n%s", text != NULL ? text : "");
        free(text);
    }
}

int options_changed_knobs(const struct options *self, char **list, int room) {
    struct settings initial;
    int count = 0;
    settings_default(&initial);
#define u32 "%.0f"
#define u64 "%.0f"
#define f64 "%.17g"
#define K(knob, type, def, min, max, sim_min, sim_max, why)                                        \
    if (self->settings.knob != initial.knob && count + 2 <= room) {                                \
        char value[64];                                                                            \
        snprintf(value, sizeof value, type, (double)self->settings.knob);                          \
        list[count++] = strdup("--" #knob);                                                        \
        list[count++] = strdup(value);                                                             \
    }
#include "config/knobs.def"
#undef K
#undef u32
#undef u64
#undef f64
    return count;
}
