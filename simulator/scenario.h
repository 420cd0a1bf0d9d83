/* All that decides a simulated run: the cluster, its knobs and network, the requests and the faults. Drawn from a seed, or read from a
 * file that says what is to be otherwise:
 *
 *   seed 17                    the rest is drawn from it; must come first
 *   attention 2                processes; also experts, samplers
 *   fileless 1                 so many expert processes, the last ones, have no file of weights; `apart`: every process has a host of
 *                              its own, so that others that hold an expert are nearer than the file; `all files`: neither
 *   requests 4                 how many of the drawn requests are sent
 *   knob heartbeat_ms 20       any knob of config/knobs.def
 *   network quiet              no delays, losses or doubling but those of the faults below
 *   no faults                  those of the seed are dropped; so they are by the first line that begins with `at`
 *   at 120ms crash expert 1 for 40ms     see simulator/faults.h
 *
 * '#' begins a comment. */
#ifndef TROUPE_SIMULATOR_SCENARIO_H
#define TROUPE_SIMULATOR_SCENARIO_H

#include "config/settings.h"
#include "simulator/faults.h"

#define REQUESTS_DRAWN_MAX 10u
#define REQUEST_BODY_BYTES 1536u
#define SCENARIO_GIVEN_BYTES 1024u
#define SCENARIO_TEXT_BYTES (FAULTS_MAX * FAULT_LINE_BYTES + SCENARIO_GIVEN_BYTES + 1024u)

struct scenario_request {
    char body[REQUEST_BODY_BYTES];
    uint64_t arrives_ns;
    uint32_t choices;
    bool stream;
};

struct scenario {
    uint64_t seed;
    uint32_t model; /* of simulator/tiny_model.h */
    bool f32;
    uint32_t attention, experts, samplers;
    uint32_t fileless; /* so many expert processes, the last ones, have no file of weights */
    bool apart;        /* every process has a host of its own */
    struct settings settings;
    uint64_t delay_min_ns, delay_max_ns, frame_delay_min_ns, frame_delay_max_ns;
    double loss, duplicate, frame_loss;
    bool frames_find_any_life;
    uint64_t compute_ns, load_ns, restart_ns;
    struct scenario_request request[REQUESTS_DRAWN_MAX];
    uint32_t requests;
    struct faults faults;
    char given[SCENARIO_GIVEN_BYTES]; /* the lines of its file about knobs, the network and requests */
};

void scenario_draw(struct scenario *ret, uint64_t seed);
/* ERR_INVALID names the line, what was expected and what was found. */
int scenario_parse(struct scenario *ret, const char *text, size_t size, struct failure *failure);
/* As a file that scenario_parse reads: the seed, what a file said beside it, and the faults, with what the seed means as comments. */
void scenario_print(const struct scenario *self, char ret[SCENARIO_TEXT_BYTES]);
/* When the last fault is over. */
uint64_t scenario_calm_ns(const struct scenario *self);
/* The same requests in the simplest cluster without any fault. */
void scenario_make_quiet(struct scenario *self);

#endif
