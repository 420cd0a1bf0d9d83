/* The command line: one table of options, and every knob of config/knobs.def. */
#ifndef TROUPE_HOST_OPTIONS_H
#define TROUPE_HOST_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "config/settings.h"

/* Which commands an option belongs to; bits. */
enum command_bit {
    FOR_SERVE = 1,
    FOR_COORDINATOR = 2,
    FOR_GATEWAY = 4,
    FOR_WORKER = 8, /* attention, expert, sampler */
    FOR_EXPERT = 16,
    FOR_GENERATE = 32,
    FOR_CHECK = 64,
    FOR_INSPECT = 128,
    FOR_SYNTH = 256,
    FOR_CONTROL = 512,
    FOR_VERSION = 1024,
    FOR_BENCH = 2048,
    FOR_SIM = 4096,
    FOR_PLAN = 8192,
    FOR_CHAOS = 16384,
    FOR_TOP = 32768,
    FOR_REPLAY = 1 << 16,
    FOR_BIAS_STUDY = 1 << 20,
    FOR_ACTORS = FOR_COORDINATOR | FOR_GATEWAY | FOR_WORKER,
    FOR_MODELS = FOR_SERVE | FOR_ACTORS | FOR_GENERATE | FOR_CHECK | FOR_BENCH | FOR_CHAOS |
                 FOR_BIAS_STUDY,
};

#define POSITIONAL_MAX 15
#define API_KEY_BYTES  512

struct options {
    const char *model, *run_dir, *config, *numerics, *isa, *transport, *host, *name, *coordinator,
        *bind, *bind_data, *cpus, *log, *served_model, *api_key, *api_key_file, *prompt, *golden,
        *shape, *url, *json, *figures, *plan, *journal, *html, *seeds, *scenario, *cluster, *trace, *view, *admin, *admin_token_file,
        *address, *to_file, *load, *previous, *weights, *policy, *capacity, *speed;
    uint64_t layer, experts, attention, samplers, port, gpu, listen_fd, max_tokens, seed, memory_mib,
        jobs, runs, processes, hosts, spare, groups, window, expert_bytes, horizon;
    double temperature, rate;
    bool allow_faults, in_process, verbose, help, once, port_set, shrink, first, twice, seed_set, as_json, dry_run, hierarchical;
    const char *text, *clamps; /* bias-study */
    uint64_t interval_ms, steps, window_tokens;
    double gamma, clamp;
    struct settings settings;
    const char *positional[POSITIONAL_MAX];
    int positionals;
    char api_key_read[API_KEY_BYTES]; /* behind api_key if it came from --api-key-file */
    char admin_token[API_KEY_BYTES];  /* from --admin-token-file; empty: none */
};

/* Fills `ret` with defaults, then with --config's file, then with the command line. argv[0] is the
 * command's name. Strings are borrowed from argv. */
int options_parse(struct options *ret, int argc, char **argv, unsigned command,
                  struct failure *failure);
/* Prints the options of a command to stdout. */
void options_help(unsigned command);

/* Appends to `list` (of char *, malloc'd) "--knob", "value" for every knob that differs from its
 * default; at most `room` entries. Returns how many. Whole numbers and fractions come out exactly
 * as settings_set reads them. */
int options_changed_knobs(const struct options *self, char **list, int room);

#endif
