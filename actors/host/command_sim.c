/* troupe sim: runs simulated clusters, each in a process of its own so that a failed assertion is a result like any other.
 *
 * Exit status: 0 all good; 2 wrong usage; 3 an invariant was violated (safety); 4 not everything finished (liveness); 5 two runs of a
 * seed differ; 6 a crash. Of several, the largest. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "commit.h"
#include "simulator/sim.h"

#define LAST_STEPS  60
#define STEP_BYTES  320
#define TWICE_EVERY 16u
#define FAILURES_SHOWN_MAX 20u

static const int STATUS[OUTCOMES] = {
    [OUTCOME_GOOD] = 0, [OUTCOME_SAFETY] = 3, [OUTCOME_LIVENESS] = 4, [OUTCOME_NONDETERMINISM] = 5, [OUTCOME_CRASH] = 6};

/* What comes through the pipe from a process that runs seeds. */
struct record {
    uint64_t seed;
    bool begins;
    struct report report;
    uint32_t faults, of_kind[FAULT_KINDS]; /* the schedule: faults proper, and of each kind */
};

static void write_all(int fd, const void *bytes, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t got = write(fd, (const char *)bytes + done, size - done);
        if (got < 0 && errno != EINTR)
            _exit(1);
        done += got > 0 ? (size_t)got : 0;
    }
}

static bool read_all(int fd, void *bytes, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t got = read(fd, (char *)bytes + done, size - done);
        if (got == 0 || (got < 0 && errno != EINTR))
            return false;
        done += got > 0 ? (size_t)got : 0;
    }
    return true;
}

static void to_pipe(void *context, const char *line) {
    write_all(*(int *)context, line, strlen(line));
    write_all(*(int *)context, "\n", 1);
}

/* ---- one scenario in a process of its own ---- */

static void run_child(const struct sim *sim, const struct scenario *scenario, bool twice, int trace_fd,
                      int report_fd) {
    struct report report;
    numerics_enter();
    if (trace_fd >= 0)
        sim_run(sim, scenario, to_pipe, &trace_fd, &report);
    else if (twice)
        sim_run_twice(sim, scenario, &report);
    else
        sim_run(sim, scenario, NULL, NULL, &report);
    write_all(report_fd, &report, sizeof report);
    _exit(0);
}

static void report_crash(struct report *ret, int status) {
    memset(ret, 0, sizeof *ret);
    ret->outcome = OUTCOME_CRASH;
    snprintf(ret->text, sizeof ret->text, "%s %d",
             WIFSIGNALED(status) ? "ended by signal" : "ended with status",
             WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
}

/* The last steps of a run, or all of them in a file. */
struct steps {
    FILE *file;                        /* NULL: only the last ones are kept */
    char line[LAST_STEPS][STEP_BYTES]; /* a ring */
    uint64_t count;
};

static void read_steps(struct steps *steps, int fd) {
    FILE *in = fdopen(fd, "r");
    char line[2048];
    while (in != NULL && fgets(line, sizeof line, in) != NULL) {
        if (steps->file != NULL)
            fputs(line, steps->file);
        line[strcspn(line, "\n")] = '\0';
        snprintf(steps->line[steps->count++ % LAST_STEPS], STEP_BYTES, "%.*s", STEP_BYTES - 1, line);
    }
    if (in != NULL)
        fclose(in);
}

static void run_isolated(const struct sim *sim, const struct scenario *scenario, bool twice,
                         struct steps *steps, struct report *ret) {
    int report_pipe[2], trace_pipe[2] = {-1, -1}, status = 0;
    memset(ret, 0, sizeof *ret);
    if (pipe(report_pipe) != 0 || (steps != NULL && pipe(trace_pipe) != 0)) {
        report_crash(ret, 0);
        return;
    }
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        close(report_pipe[0]);
        run_child(sim, scenario, twice, trace_pipe[1], report_pipe[1]);
    }
    close(report_pipe[1]);
    if (steps != NULL) {
        close(trace_pipe[1]);
        read_steps(steps, trace_pipe[0]);
    }
    bool whole = read_all(report_pipe[0], ret, sizeof *ret);
    close(report_pipe[0]);
    if (child < 0 || waitpid(child, &status, 0) != child || !whole)
        report_crash(ret, status);
}

/* ---- a failure, told in full ---- */

static bool fails_without(const struct sim *sim, const struct scenario *scenario, struct scenario *smaller,
                          enum outcome outcome) {
    struct report report;
    (void)scenario;
    faults_prepare(&smaller->faults, smaller->seed);
    run_isolated(sim, smaller, outcome == OUTCOME_NONDETERMINISM, NULL, &report);
    return report.outcome != OUTCOME_GOOD;
}

/* Takes out half of the faults, then a quarter, and so on down to single ones, as long as it still fails. */
static void shrink(const struct sim *sim, struct scenario *scenario, enum outcome outcome) {
    struct scenario *smaller = malloc(sizeof *smaller);
    for (uint32_t size = (scenario->faults.count + 1) / 2; smaller != NULL && size > 0; size /= 2)
        for (uint32_t from = 0; from < scenario->faults.count;) {
            uint32_t count = scenario->faults.count - from < size ? scenario->faults.count - from : size;
            *smaller = *scenario;
            memmove(&smaller->faults.list[from], &smaller->faults.list[from + count],
                    (smaller->faults.count - from - count) * sizeof *smaller->faults.list);
            smaller->faults.count -= count;
            if (fails_without(sim, scenario, smaller, outcome))
                *scenario = *smaller;
            else
                from += count;
        }
    free(smaller);
}

static void explain(const struct options *options, const struct sim *sim, struct scenario *scenario,
                    const struct report *first) {
    struct steps *steps = calloc(1, sizeof *steps);
    char *text = malloc(SCENARIO_TEXT_BYTES);
    struct report report;
    if (steps == NULL || text == NULL)
        return;
    if (options->shrink)
        shrink(sim, scenario, first->outcome);
    run_isolated(sim, scenario, false, steps, &report);
    printf("\n--- last steps ---\n");
    uint64_t kept = steps->count < LAST_STEPS ? steps->count : LAST_STEPS;
    for (uint64_t i = steps->count - kept; i < steps->count; i++)
        printf("%s\n", steps->line[i % LAST_STEPS]);
    scenario_print(scenario, text);
    printf("\n--- scenario%s: save it and run troupe sim --scenario FILE ---\n%s",
           options->shrink ? ", shrunk" : "", text);
    printf("\nseed %llu, commit %s: %s: %s\n", (unsigned long long)scenario->seed, TROUPE_COMMIT,
           outcome_name(report.outcome == OUTCOME_GOOD ? first->outcome : report.outcome),
           report.outcome == OUTCOME_GOOD ? first->text : report.text);
    free(steps);
    free(text);
}

static int run_one(const struct options *options, const struct sim *sim, struct scenario *scenario) {
    struct report report;
    struct steps *steps = calloc(1, sizeof *steps);
    if (steps != NULL && options->trace != NULL && (steps->file = fopen(options->trace, "we")) == NULL) {
        fprintf(stderr, "troupe sim: cannot write %s: %s\n", options->trace, strerror(errno));
        free(steps);
        return 2;
    }
    run_isolated(sim, scenario, true, NULL, &report);
    if (steps != NULL && steps->file != NULL) {
        struct report traced;
        run_isolated(sim, scenario, false, steps, &traced);
        fclose(steps->file);
    }
    free(steps);
    if (report.outcome != OUTCOME_GOOD)
        explain(options, sim, scenario, &report);
    else
        printf("seed %llu: good, hash %016llx: %u faults until %.1f ms, %llu answered, %llu hung up, %llu refusals, "
               "all done at %.1f of %.1f ms, %llu steps\n",
               (unsigned long long)scenario->seed, (unsigned long long)report.hash, scenario->faults.count,
               (double)report.calm_ns / 1e6, (unsigned long long)report.finished,
               (unsigned long long)report.hung_up, (unsigned long long)report.refused,
               (double)report.end_ns / 1e6, (double)report.bound_ns / 1e6, (unsigned long long)report.steps);
    return STATUS[report.outcome];
}

/* ---- many seeds ---- */

struct worker {
    pid_t pid;
    int fd;
    uint64_t running, next; /* seeds */
    bool done;
};

static void work(const struct sim *sim, uint64_t seed, uint64_t last, uint64_t stride, bool twice, int fd) {
    struct scenario *scenario = malloc(sizeof *scenario);
    numerics_enter();
    for (; scenario != NULL && seed <= last; seed += stride) {
        struct record record = {.seed = seed, .begins = true};
        write_all(fd, &record, sizeof record);
        record.begins = false;
        scenario_draw(scenario, seed);
        record.faults = faults_count(&scenario->faults, record.of_kind);
        if (twice || seed % TWICE_EVERY == 0)
            sim_run_twice(sim, scenario, &record.report);
        else
            sim_run(sim, scenario, NULL, NULL, &record.report);
        write_all(fd, &record, sizeof record);
    }
    _exit(0);
}

struct sweep {
    const struct options *options;
    const struct sim *sim;
    uint64_t last, stride, counts[OUTCOMES], failed_seed, slowest_seed;
    uint64_t faults, of_kind[FAULT_KINDS], told; /* of the runs that came to an end, `told` of them */
    uint32_t fewest;                             /* faults of one run */
    double slowest; /* share of the bound used */
    struct worker worker[256];
    uint32_t open;
    bool failed;
};

static void start_worker(struct sweep *self, struct worker *worker) {
    int fd[2];
    fflush(NULL);
    if (worker->next > self->last || pipe(fd) != 0) {
        worker->done = true;
        return;
    }
    worker->pid = fork();
    if (worker->pid == 0) {
        close(fd[0]);
        work(self->sim, worker->next, self->last, self->stride, self->options->twice, fd[1]);
    }
    close(fd[1]);
    worker->fd = fd[0];
    self->open++;
}

static void take_result(struct sweep *self, uint64_t seed, const struct report *report) {
    self->counts[report->outcome]++;
    double used = report->bound_ns > report->calm_ns && report->end_ns > report->calm_ns
                      ? (double)(report->end_ns - report->calm_ns) / (double)(report->bound_ns - report->calm_ns)
                      : 0;
    if (used > self->slowest) {
        self->slowest = used;
        self->slowest_seed = seed;
    }
    if (report->outcome == OUTCOME_GOOD)
        return;
    uint64_t failures = 0;
    for (int outcome = OUTCOME_SAFETY; outcome < OUTCOMES; outcome++)
        failures += self->counts[outcome];
    if (failures <= FAILURES_SHOWN_MAX)
        printf("seed %llu: %s: %.300s\n", (unsigned long long)seed, outcome_name(report->outcome), report->text);
    if (!self->failed || seed < self->failed_seed)
        self->failed_seed = seed;
    self->failed = true;
}

static void count_faults(struct sweep *self, const struct record *record) {
    if (self->told++ == 0 || record->faults < self->fewest)
        self->fewest = record->faults;
    self->faults += record->faults;
    for (int kind = 0; kind < FAULT_KINDS; kind++)
        self->of_kind[kind] += record->of_kind[kind];
}

static void tell_faults(const struct sweep *self) {
    printf("%llu faults, at least %u in each seed:", (unsigned long long)self->faults, self->fewest);
    for (enum fault_kind kind = 0; kind < FAULT_DRAIN; kind++)
        printf("%s %llu %s", kind > 0 ? "," : "", (unsigned long long)self->of_kind[kind], fault_name(kind));
    printf("; operations:");
    for (enum fault_kind kind = FAULT_DRAIN; kind < FAULT_KINDS; kind++)
        printf("%s %llu %s", kind > FAULT_DRAIN ? "," : "", (unsigned long long)self->of_kind[kind], fault_name(kind));
    printf("\n");
}

/* One record of a worker, or its end. */
static void listen_to(struct sweep *self, struct worker *worker) {
    struct record record;
    if (read_all(worker->fd, &record, sizeof record)) {
        worker->running = record.begins ? record.seed : 0;
        worker->next = record.seed + self->stride;
        if (!record.begins) {
            count_faults(self, &record);
            take_result(self, record.seed, &record.report);
        }
        return;
    }
    int status = 0;
    close(worker->fd);
    self->open--;
    waitpid(worker->pid, &status, 0);
    worker->pid = 0;
    if (worker->running != 0) {
        struct report report;
        report_crash(&report, status);
        take_result(self, worker->running, &report);
        worker->running = 0;
        start_worker(self, worker);
    } else {
        worker->done = true;
    }
}

static void sweep(struct sweep *self, uint64_t first) {
    uint32_t jobs = (uint32_t)self->options->jobs;
    for (uint32_t i = 0; i < jobs; i++) {
        self->worker[i].next = first + i;
        start_worker(self, &self->worker[i]);
    }
    while (self->open > 0 && !(self->failed && self->options->first)) {
        struct pollfd ready[256];
        for (uint32_t i = 0; i < jobs; i++)
            ready[i] = (struct pollfd){.fd = self->worker[i].pid != 0 ? self->worker[i].fd : -1, .events = POLLIN};
        if (poll(ready, jobs, -1) < 0 && errno != EINTR)
            break;
        for (uint32_t i = 0; i < jobs; i++)
            if (ready[i].revents != 0)
                listen_to(self, &self->worker[i]);
    }
    for (uint32_t i = 0; i < jobs; i++)
        if (self->worker[i].pid > 0) {
            kill(self->worker[i].pid, SIGKILL);
            waitpid(self->worker[i].pid, NULL, 0);
        }
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int run_many(const struct options *options, const struct sim *sim, uint64_t first, uint64_t last) {
    struct sweep *self = calloc(1, sizeof *self);
    if (self == NULL)
        return 2;
    self->options = options;
    self->sim = sim;
    self->last = last;
    self->stride = options->jobs;
    double began = seconds();
    sweep(self, first);
    int status = 0;
    uint64_t all = 0;
    for (int outcome = 0; outcome < OUTCOMES; outcome++) {
        all += self->counts[outcome];
        if (self->counts[outcome] > 0 && STATUS[outcome] > status)
            status = STATUS[outcome];
    }
    printf("%llu seeds in %.1f s: %llu good, %llu safety, %llu liveness, %llu non-determinism, %llu crash\n",
           (unsigned long long)all, seconds() - began, (unsigned long long)self->counts[OUTCOME_GOOD],
           (unsigned long long)self->counts[OUTCOME_SAFETY], (unsigned long long)self->counts[OUTCOME_LIVENESS],
           (unsigned long long)self->counts[OUTCOME_NONDETERMINISM],
           (unsigned long long)self->counts[OUTCOME_CRASH]);
    if (self->told > 0)
        tell_faults(self);
    if (self->slowest > 0)
        printf("slowest to finish after the faults: seed %llu, with %.0f %% of its time\n",
               (unsigned long long)self->slowest_seed, 100 * self->slowest);
    if (self->failed) {
        struct scenario *scenario = malloc(sizeof *scenario);
        struct report report;
        scenario_draw(scenario, self->failed_seed);
        run_isolated(sim, scenario, true, NULL, &report);
        explain(options, sim, scenario, &report);
        free(scenario);
    }
    free(self);
    return status;
}

/* ---- the command ---- */

static int read_scenario(const char *path, struct scenario *ret) {
    struct mapped file;
    struct failure failure = {0};
    int result = mapped_open_path(&file, path, 1 << 20, &failure);
    if (result == 0) {
        result = scenario_parse(ret, file.bytes, file.size, &failure);
        mapped_close(&file);
    }
    if (result < 0)
        fprintf(stderr, "troupe sim: %s: %s\n", path, failure.text);
    return result;
}

static int run(const struct options *options, const struct sim *sim) {
    unsigned long long first = 0, last = 0;
    int end = 0;
    if (options->seeds != NULL) {
        if (sscanf(options->seeds, "%llu..%llu%n", &first, &last, &end) != 2 || options->seeds[end] != '\0' ||
            first < 1 || first > last) {
            fprintf(stderr, "troupe sim: --seeds: expected A..B with A from 1 and not above B, found '%s'\n",
                    options->seeds);
            return 2;
        }
        return run_many(options, sim, first, last);
    }
    struct scenario *scenario = malloc(sizeof *scenario);
    int status = 2;
    if (scenario == NULL)
        return status;
    if (options->scenario == NULL)
        scenario_draw(scenario, options->seed_set ? options->seed : 1);
    if (options->scenario == NULL || read_scenario(options->scenario, scenario) == 0)
        status = run_one(options, sim, scenario);
    free(scenario);
    return status;
}

int command_sim(const struct options *options) {
    struct sim sim;
    struct failure failure = {0};
    if (options->cluster != NULL)
        return command_cluster(options);
    numerics_enter();
    if (sim_open(&sim, &failure) < 0) {
        fprintf(stderr, "troupe sim: %s\n", failure.text);
        return 2;
    }
    int status = run(options, &sim);
    sim_close(&sim);
    return status;
}
