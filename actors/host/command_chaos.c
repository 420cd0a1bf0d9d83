/* troupe chaos: a cluster of real processes, a load on it, faults by a plan, and what the clients saw of them.
 *
 * First every stream asks its request once, without faults: those answers are the expected ones. A short calm load gives the usual
 * gaps and throughput. Then the plan runs. Detection and repair are read from the logs of the processes afterwards: detected
 * is the first line that speaks of a loss, repaired the first epoch after it with as many members and copies as before.
 *
 * Exit status: 0 nothing lost, duplicated or different; 1 something was, or the cluster did not start; 2 wrong usage. */
#include <errno.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "actors/host/bench_server.h"
#include "actors/host/chaos_client.h"
#include "actors/host/chaos_plan.h"
#include "actors/host/chaos_report.h"
#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "actors/host/inflict.h"
#include "actors/host/journal.h"

#define LEARN_NS     60000000000u
#define CALM_NS      3000000000u
#define GRACE_NS     60000000000u
#define PLAN_BYTES   (1u << 20)
#define NOTES_MAX    65536
#define LOGS_MAX     256

/* A line of a log that tells of a loss or of an epoch. */
struct note {
    double unix_ms;
    bool loss;
    uint32_t members, placed; /* of an epoch; 0: none */
};

struct chaos {
    const struct options *options;
    struct chaos_plan plan;
    struct bench_server server;
    struct chaos_load load;
    struct chaos_totals totals;
    uint64_t begin_ns; /* of the faults */
    uint32_t next;     /* fault */
    uint64_t done_ns[PLAN_FAULTS_MAX];
    struct {
        pid_t pid;
        uint64_t at_ns;
    } stopped[64 * PLAN_FAULTS_MAX]; /* to be continued */
    uint32_t stops;
    struct note *note;
    size_t notes;
    FILE *log[LOGS_MAX];
    bool log_of_coordinator[LOGS_MAX];
    uint32_t logs;
    double stop_unix_ms; /* of the whole */
};

/* ---- processes ---- */

static void inflict_on(struct chaos *self, const struct fault *fault, uint32_t rank, uint64_t now) {
    struct failure failure;
    pid_t stopped;
    if (inflict(self->server.run_dir, fault, rank, self->totals.seed, &stopped, &failure) < 0) {
        fprintf(stderr, "troupe chaos: %s\n", failure.text); /* it may be starting just now */
    } else if (stopped != 0) {
        self->stopped[self->stops].pid = stopped;
        self->stopped[self->stops++].at_ns = now + (fault->for_ns > 0 ? fault->for_ns : 1000000000u);
    }
}

static void inflict_all(struct chaos *self, const struct fault *fault, uint64_t now) {
    uint64_t count = fault->role == ROLE_EXPERT      ? self->plan.experts
                     : fault->role == ROLE_ATTENTION ? self->plan.attention
                     : fault->role == ROLE_SAMPLER   ? self->plan.samplers
                                                     : 1;
    if (fault->rank != RANK_ALL)
        inflict_on(self, fault, fault->rank, now);
    for (uint32_t rank = 0; fault->rank == RANK_ALL && rank < count; rank++)
        inflict_on(self, fault, rank, now);
}

static void tick(void *context, uint64_t now_ns) {
    struct chaos *self = context;
    while (self->next < self->plan.faults &&
           now_ns >= self->begin_ns + self->plan.fault[self->next].at_ns) {
        inflict_all(self, &self->plan.fault[self->next], now_ns);
        self->done_ns[self->next++] = now_ns;
    }
    for (uint32_t i = 0; i < self->stops; i++)
        if (self->stopped[i].pid != 0 && now_ns >= self->stopped[i].at_ns) {
            kill(self->stopped[i].pid, SIGCONT);
            self->stopped[i].pid = 0;
        }
}

/* ---- what the logs say ---- */

static double to_unix_ms(uint64_t ns) {
    return (double)((int64_t)ns + clock_unix_offset_ns()) / 1e6;
}

static double unix_ms(const char *line) {
    struct tm parts = {0};
    int ms = 0;
    const char *rest = strptime(line, "%Y-%m-%dT%H:%M:%S", &parts);
    if (rest == NULL || sscanf(rest, ".%3dZ", &ms) != 1)
        return 0;
    return (double)timegm(&parts) * 1e3 + ms;
}

/* What each process counted in its life, if it ended in order. */
static void take_counts(struct chaos *self, const char *line) {
    unsigned long long damaged, false_rows, refused;
    const char *injected = strstr(line, "injected: "), *received = strstr(line, " dropped, ");
    if (injected != NULL && sscanf(injected, "injected: %llu frames damaged, %llu with", &damaged, &false_rows) == 2) {
        self->totals.frames_damaged += damaged;
        self->totals.frames_false += false_rows;
    }
    if (received != NULL && sscanf(received, " dropped, %llu refused", &refused) == 1)
        self->totals.frames_refused += refused;
}

static void take_line(struct chaos *self, const char *line, bool coordinator) {
    static const char *const losses[] = {": removed ", " removed ", " lost ", "is slow", "the coordinator is gone",
                                         "another coordinator is there", "gateway joined", "gave wrong rows"};
    struct note note = {.unix_ms = unix_ms(line)};
    const char *epoch = coordinator ? strstr(line, " epoch ") : NULL;
    unsigned members, placed;
    if (epoch != NULL && sscanf(epoch, " epoch %*u: %u members, %u of", &members, &placed) == 2) {
        note.members = members;
        note.placed = placed;
    }
    for (size_t i = 0; i < sizeof losses / sizeof *losses; i++)
        note.loss = note.loss || strstr(line, losses[i]) != NULL;
    take_counts(self, line);
    if (note.unix_ms > 0 && note.unix_ms < self->stop_unix_ms && (note.loss || note.members > 0) &&
        self->notes < NOTES_MAX)
        self->note[self->notes++] = note;
}

static int compare_notes(const void *a, const void *b) {
    const struct note *left = a, *right = b;
    return left->unix_ms < right->unix_ms ? -1 : left->unix_ms > right->unix_ms;
}

/* Whatever is written until all processes have ended can be read then, though the files are gone by that time. */
static void open_logs(struct chaos *self) {
    DIR *directory = opendir(self->server.run_dir);
    for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
        char path[400];
        size_t length = strlen(entry->d_name);
        if (length < 4 || strcmp(entry->d_name + length - 4, ".log") != 0 || self->logs == LOGS_MAX)
            continue;
        snprintf(path, sizeof path, "%s/%s", self->server.run_dir, entry->d_name);
        self->log[self->logs] = fopen(path, "re");
        self->log_of_coordinator[self->logs] = strncmp(entry->d_name, "coordinator", 11) == 0;
        self->logs += self->log[self->logs] != NULL;
    }
    if (directory != NULL)
        closedir(directory);
    self->stop_unix_ms = to_unix_ms(clock_now_ns());
}

static void read_logs(struct chaos *self) {
    char line[2048];
    self->note = calloc(NOTES_MAX, sizeof *self->note);
    ASSERT(self->note != NULL);
    for (uint32_t i = 0; i < self->logs; i++) {
        while (fgets(line, sizeof line, self->log[i]) != NULL)
            take_line(self, line, self->log_of_coordinator[i]);
        fclose(self->log[i]);
    }
    qsort(self->note, self->notes, sizeof *self->note, compare_notes);
}

/* ---- what the clients saw ---- */

static double rate(const struct chaos *self, uint64_t from_ns, uint64_t to_ns) {
    double tokens = 0;
    for (size_t i = 0; i < self->load.pieces; i++) {
        const struct chaos_piece *piece = &self->load.piece[i];
        uint32_t expected = self->load.stream[piece->stream].pieces_expected;
        if (piece->at_ns >= from_ns && piece->at_ns < to_ns && expected > 0)
            tokens += (double)self->load.tokens / expected;
    }
    return to_ns > from_ns ? tokens / ((double)(to_ns - from_ns) / 1e9) : 0;
}

/* Longest gap of which some part lies between the two times. */
static double longest_gap_ms(const struct chaos *self, uint64_t from_ns, uint64_t to_ns) {
    uint64_t longest = 0;
    for (size_t i = 0; i < self->load.pieces; i++) {
        const struct chaos_piece *piece = &self->load.piece[i];
        if (piece->at_ns >= from_ns && piece->at_ns - piece->gap_ns < to_ns && piece->gap_ns > longest)
            longest = piece->gap_ns;
    }
    return (double)longest / 1e6;
}

static int compare_gaps(const void *a, const void *b) {
    const uint64_t *left = a, *right = b;
    return *left < *right ? -1 : *left > *right;
}

static void take_calm(struct chaos *self, uint64_t from_ns, uint64_t to_ns) {
    uint64_t *gap = calloc(self->load.pieces + 1, sizeof *gap);
    size_t gaps = 0;
    ASSERT(gap != NULL);
    for (size_t i = 0; i < self->load.pieces; i++)
        if (self->load.piece[i].at_ns >= from_ns && self->load.piece[i].at_ns < to_ns)
            gap[gaps++] = self->load.piece[i].gap_ns;
    qsort(gap, gaps, sizeof *gap, compare_gaps);
    if (gaps > 0) {
        self->totals.steady_gap_ms = (double)gap[(size_t)(0.999 * (double)(gaps - 1))] / 1e6;
        self->totals.calm_gap_ms = (double)gap[gaps - 1] / 1e6;
    }
    self->totals.tokens_per_s = rate(self, from_ns, to_ns);
    free(gap);
}

static void judge_fault(const struct chaos *self, uint32_t number, struct journal_fault *ret) {
    const struct fault *fault = &self->plan.fault[number];
    uint64_t at = self->done_ns[number], length = fault->for_ns + self->plan.window_ns, end = at + length;
    double at_unix = to_unix_ms(at), end_unix = to_unix_ms(end) + 3000;
    uint32_t members = 0, placed = 0;
    *ret = (struct journal_fault){.number = number, .text = fault_text(fault), .detect_ms = -1, .repair_ms = -1};
    ret->at_ms = (double)(at - self->begin_ns) / 1e6;
    for (size_t i = 0; i < self->notes && self->note[i].unix_ms <= end_unix; i++) {
        const struct note *note = &self->note[i];
        double after = note->unix_ms - at_unix;
        if (after < 0) {
            members = note->members > 0 ? note->members : members;
            placed = note->members > 0 ? note->placed : placed;
        } else if (note->loss && ret->detect_ms < 0) {
            ret->detect_ms = after;
        }
        if (after >= 0 && note->members >= members && note->members > 0 && note->placed >= placed &&
            ret->detect_ms >= 0 && ret->repair_ms < 0)
            ret->repair_ms = after;
    }
    ret->gap_ms = longest_gap_ms(self, at, end);
    ret->before = rate(self, at - 1000000000u, at);
    ret->during = rate(self, at, end);
    ret->after = rate(self, end, end + 1000000000u);
}

/* ---- the run ---- */

static void count_files(const struct chaos *self, uint32_t *ret_files, double *ret_mib) {
    struct bench_usage usage;
    bench_usage_read(&self->server, &usage);
    *ret_mib = (double)usage.role[ROLE_NONE].resident_bytes / 1048576.0;
    *ret_files = 0;
    for (int role = ROLE_COORDINATOR; role <= ROLE_SAMPLER; role++)
        for (uint32_t rank = 0; rank < 64; rank++) {
            char path[64];
            pid_t pid = inflict_process(self->server.run_dir, (enum role)role, rank);
            if (pid <= 0 || (role < ROLE_ATTENTION && rank > 0))
                break;
            snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
            DIR *files = opendir(path);
            while (files != NULL && readdir(files) != NULL)
                (*ret_files)++;
            if (files != NULL)
                closedir(files);
        }
}

static int record(struct chaos *self, struct journal *journal, struct failure *failure) {
    int error = journal_begin(journal, failure);
    if (error == 0)
        error = journal_run(journal, self->totals.plan, self->totals.seed, self->plan.streams, self->plan.tokens,
                            self->totals.steady_gap_ms, self->totals.tokens_per_s, failure);
    for (uint32_t i = 0; error == 0 && i < self->next; i++) {
        struct journal_fault fault;
        judge_fault(self, i, &fault);
        error = journal_fault(journal, &fault, failure);
    }
    for (uint32_t i = 0; error == 0 && i < self->load.streams; i++) {
        const struct chaos_stream *stream = &self->load.stream[i];
        error = journal_stream(journal,
                               &(struct journal_stream){i, stream->answers, stream->different, stream->duplicated,
                                                        stream->lost, stream->refused, stream->resumed},
                               failure);
        self->totals.answers += stream->answers;
        self->totals.different += stream->different;
        self->totals.duplicated += stream->duplicated;
        self->totals.lost += stream->lost;
        self->totals.refused += stream->refused;
        self->totals.resumed += stream->resumed;
    }
    for (size_t i = 0; error == 0 && i < self->load.pieces; i++) {
        const struct chaos_piece *piece = &self->load.piece[i];
        if ((double)piece->gap_ns / 1e6 > self->totals.steady_gap_ms)
            error = journal_piece(journal, piece->stream,
                                  ((double)piece->at_ns - (double)self->begin_ns) / 1e6,
                                  (double)piece->gap_ns / 1e6, failure);
    }
    return error < 0 ? error : journal_commit(journal, failure);
}

static int run(struct chaos *self, struct failure *failure) {
    if (chaos_load_init(&self->load, self->server.port, self->plan.streams, self->plan.tokens) < 0)
        return fail(failure, ERR_NO_MEMORY, "no memory for %u streams", self->plan.streams);
    if (!chaos_load_learn(&self->load, LEARN_NS))
        return fail(failure, ERR_STATE, "not every stream was answered, without any fault");
    uint64_t calm = clock_now_ns();
    chaos_load_run(&self->load, calm + CALM_NS, GRACE_NS);
    usleep(500000); /* as in the end; a load touches memory that a troupe without one never needed */
    count_files(self, &self->totals.files_before, &self->totals.resident_before_mib);
    take_calm(self, calm + 500000000u, calm + CALM_NS); /* all streams are at work by then */
    self->load.tick = tick;
    self->load.context = self;
    self->begin_ns = clock_now_ns() + 1000000000u;
    chaos_load_run(&self->load, self->begin_ns + self->plan.for_ns, GRACE_NS);
    self->load.tick = NULL;
    tick(self, UINT64_MAX); /* whoever still stands still goes on */
    usleep(500000);
    count_files(self, &self->totals.files_after, &self->totals.resident_after_mib);
    self->totals.seconds = (double)(clock_now_ns() - self->begin_ns) / 1e9;
    return 0;
}

static int prepare(struct chaos *self, struct options *options, struct failure *failure) {
    struct mapped file;
    int error = mapped_open_path(&file, options->plan, PLAN_BYTES, failure);
    if (error < 0)
        return error;
    error = chaos_plan_parse(&self->plan, file.bytes, file.size, failure);
    mapped_close(&file);
    for (uint32_t i = 0; error == 0 && i < self->plan.knobs; i++)
        error = settings_set(&options->settings, self->plan.knob[i][0], self->plan.knob[i][1], failure);
    if (error < 0)
        return error;
    const char *slash = strrchr(options->plan, '/');
    snprintf(self->plan.name, sizeof self->plan.name, "%s", slash != NULL ? slash + 1 : options->plan);
    self->totals.plan = self->plan.name;
    self->totals.seed = options->seed;
    self->totals.streams = self->plan.streams;
    chaos_plan_draw(&self->plan, options->seed);
    options->experts = self->plan.experts;
    options->attention = self->plan.attention;
    options->samplers = self->plan.samplers;
    options->allow_faults = true;
    if (options->settings.restart_limit < 1000)
        options->settings.restart_limit = 1000;
    return 0;
}

static int chaos(struct chaos *self, struct options *options, struct failure *failure) {
    struct journal *journal = NULL;
    int error = prepare(self, options, failure);
    if (error == 0)
        error = journal_open(&journal, options->journal != NULL ? options->journal : ":memory:", failure);
    if (error == 0)
        error = bench_server_start(&self->server, options, failure);
    if (error == 0)
        error = run(self, failure);
    open_logs(self);
    bench_server_stop(&self->server);
    read_logs(self);
    if (error == 0)
        error = record(self, journal, failure);
    if (error == 0)
        chaos_print(journal, &self->totals);
    if (error == 0 && options->json != NULL)
        error = chaos_write_json(journal, &self->totals, options->json, failure);
    if (error == 0 && options->html != NULL)
        error = chaos_write_html(journal, &self->totals, options->html, failure);
    journal_close(&journal);
    chaos_load_free(&self->load);
    free(self->note);
    return error;
}

int command_chaos(const struct options *given) {
    struct options options = *given;
    struct failure failure;
    if (options.plan == NULL) {
        fprintf(stderr, "troupe chaos: expected --plan FILE; plans for the common cases are in config/faults\n");
        return 2;
    }
    struct chaos *self = calloc(1, sizeof *self);
    ASSERT(self != NULL);
    int error = chaos(self, &options, &failure);
    if (error < 0)
        fprintf(stderr, "troupe chaos: %s\n", failure.text);
    bool good = error == 0 && self->totals.lost + self->totals.duplicated + self->totals.different == 0;
    free(self);
    return good ? 0 : 1;
}

/* troupe ctl fault "drop attention 0 share 0.01 for 2s" --run-dir DIR */
int command_fault(const struct options *options) {
    struct chaos_plan *plan = calloc(1, sizeof *plan);
    struct failure failure;
    char text[256];
    pid_t stopped;
    ASSERT(plan != NULL);
    int error = 0;
    if (options->positionals != 2 || options->run_dir == NULL)
        error = fail(&failure, ERR_INVALID, "expected: fault \"KIND ROLE RANK ...\" --run-dir DIR");
    snprintf(text, sizeof text, "at 0ms %s", error == 0 ? options->positional[1] : "");
    if (error == 0)
        error = chaos_plan_parse(plan, text, strlen(text), &failure);
    const struct fault *fault = &plan->fault[0];
    if (error == 0 && fault->rank >= RANK_ALL)
        error = fault->role >= ROLE_ATTENTION ? fail(&failure, ERR_INVALID, "say which %s, by its number", role_name(fault->role)) : 0;
    if (error == 0)
        error = inflict(options->run_dir, fault, fault->rank, clock_random(), &stopped, &failure);
    if (error == 0 && stopped != 0) {
        usleep((useconds_t)((fault->for_ns > 0 ? fault->for_ns : 1000000000u) / 1000u));
        kill(stopped, SIGCONT);
    }
    if (error < 0)
        fprintf(stderr, "troupe ctl: %s\n", failure.text);
    free(plan);
    return error < 0 ? 1 : 0;
}
