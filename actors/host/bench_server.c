/* See bench_server.h. Roles and processes are told from the pid files in the run directory
 * ("expert-2.pid"), usage from /proc. */
#include "actors/host/bench_server.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "actors/host/bench_client.h"
#include "actors/host/clock.h"

#define ARGUMENTS_MAX 160
#define READY_S       300
#define STOP_S        15

/* ---- start and stop ---- */

static uint16_t free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    uint16_t port = 0;
    if (bind(file, (struct sockaddr *)&address, size) == 0 &&
        getsockname(file, (struct sockaddr *)&address, &size) == 0)
        port = ntohs(address.sin_port);
    close(file);
    return port;
}

static void add(char **list, int *count, const char *name, const char *value) {
    list[(*count)++] = strdup(name);
    list[(*count)++] = strdup(value);
}

static void add_number(char **list, int *count, const char *name, uint64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)value);
    add(list, count, name, text);
}

static void make_arguments(const struct bench_server *self, const struct options *options,
                           char **list) {
    int count = 0;
    list[count++] = strdup("troupe");
    list[count++] = strdup("serve");
    add(list, &count, "--run-dir", self->run_dir);
    add(list, &count, "--model", options->model);
    add(list, &count, "--numerics", options->numerics);
    add(list, &count, "--isa", options->isa);
    add(list, &count, "--transport", options->transport);
    add_number(list, &count, "--port", self->port);
    add_number(list, &count, "--experts", options->experts);
    add_number(list, &count, "--attention", options->attention);
    add_number(list, &count, "--samplers", options->samplers);
    if (options->allow_faults)
        list[count++] = strdup("--allow-faults");
    if (options->in_process)
        list[count++] = strdup("--in-process");
    count += options_changed_knobs(options, list + count, ARGUMENTS_MAX - 1 - count);
    list[count] = NULL;
}

static bool wait_ready(struct bench_server *self) {
    const struct bench_target target = {.host = "127.0.0.1", .port = self->port};
    for (int i = 0; i < READY_S * 20; i++) {
        if (waitpid(self->pid, NULL, WNOHANG) == self->pid) {
            self->pid = 0;
            return false;
        }
        if (bench_get(&target, "/ready") == 200)
            return true;
        usleep(50000);
    }
    return false;
}

int bench_server_start(struct bench_server *ret, const struct options *options,
                       struct failure *failure) {
    struct bench_server self = {.port = free_port()};
    char *list[ARGUMENTS_MAX];
    snprintf(self.run_dir, sizeof self.run_dir, "/tmp/troupe-bench-XXXXXX");
    if (mkdtemp(self.run_dir) == NULL)
        return fail(failure, ERR_IO, "cannot make a directory in /tmp: %s", strerror(errno));
    make_arguments(&self, options, list);
    fflush(NULL);
    self.pid = fork();
    if (self.pid == 0) {
        int nothing = open("/dev/null", O_WRONLY | O_CLOEXEC);
        dup2(nothing, 1);
        if (!options->verbose)
            dup2(nothing, 2);
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        execv("/proc/self/exe", list);
        _exit(127);
    }
    for (int i = 0; list[i] != NULL; i++)
        free(list[i]);
    if (self.pid < 0 || !wait_ready(&self)) {
        bench_server_stop(&self);
        return fail(failure, ERR_STATE,
                    "the troupe did not become ready; try: troupe serve --model %s",
                    options->model);
    }
    *ret = self;
    return 0;
}

void bench_server_stop(struct bench_server *self) {
    if (self->pid > 0) {
        kill(self->pid, SIGTERM);
        for (int i = 0; i < STOP_S * 100 && waitpid(self->pid, NULL, WNOHANG) == 0; i++) {
            if (i == STOP_S * 99)
                kill(self->pid, SIGKILL);
            usleep(10000);
        }
    }
    if (self->run_dir[0] != 0)
        rmdir(self->run_dir);
    *self = (struct bench_server){0};
}

/* ---- usage ---- */

static bool read_text(const char *path, char *ret, size_t room) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file >= 0 ? read(file, ret, room - 1) : -1;
    if (file >= 0)
        close(file);
    ret[got > 0 ? got : 0] = 0;
    return got > 0;
}

static uint64_t number_after(const char *text, const char *name) {
    const char *at = strstr(text, name);
    return at != NULL ? strtoull(at + strlen(name), NULL, 10) : 0;
}

static void add_thread(const char *directory, const char *thread, enum role role,
                       struct bench_usage *ret) {
    char path[512], text[4096];
    unsigned long long ran_ns, queued_ns;
    snprintf(path, sizeof path, "%.200s/%.200s/schedstat", directory, thread);
    if (read_text(path, text, sizeof text) && sscanf(text, "%llu %llu", &ran_ns, &queued_ns) == 2) {
        ret->role[role].cpu_s += (double)ran_ns / 1e9;
        ret->role[role].queued_s += (double)queued_ns / 1e9;
    }
    snprintf(path, sizeof path, "%.200s/%.200s/status", directory, thread);
    if (read_text(path, text, sizeof text)) {
        ret->role[role].sleeps += number_after(text, "\nvoluntary_ctxt_switches:");
        ret->role[role].preempted += number_after(text, "\nnonvoluntary_ctxt_switches:");
    }
}

static void add_process(long pid, enum role role, struct bench_usage *ret) {
    char path[64], text[4096];
    snprintf(path, sizeof path, "/proc/%ld/status", pid);
    if (read_text(path, text, sizeof text))
        ret->role[role].resident_bytes += 1024 * number_after(text, "\nVmRSS:");
    snprintf(path, sizeof path, "/proc/%ld/task", pid);
    DIR *tasks = opendir(path);
    for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;) {
        if (entry->d_name[0] != '.')
            add_thread(path, entry->d_name, role, ret);
    }
    if (tasks != NULL)
        closedir(tasks);
}

/* In one process with all others (troupe.pid), everything counts as attention. */
static enum role role_of(const char *file_name) {
    if (strcmp(file_name, "troupe.pid") == 0)
        return ROLE_ATTENTION;
    for (int role = ROLE_COORDINATOR; role <= ROLE_SAMPLER; role++) {
        if (strncmp(file_name, role_name((enum role)role), strlen(role_name((enum role)role))) == 0)
            return (enum role)role;
    }
    return ROLE_NONE;
}

static void read_machine(struct bench_usage *ret) {
    char text[4096];
    double v[8] = {0};
    double tick = (double)sysconf(_SC_CLK_TCK);
    if (read_text("/proc/stat", text, sizeof text) &&
        sscanf(text, "cpu %lf %lf %lf %lf %lf %lf %lf %lf", &v[0], &v[1], &v[2], &v[3], &v[4],
               &v[5], &v[6], &v[7]) == 8) {
        ret->machine_busy_s = (v[0] + v[1] + v[2] + v[5] + v[6] + v[7]) / tick;
        ret->machine_idle_s = (v[3] + v[4]) / tick;
    }
}

void bench_usage_read(const struct bench_server *self, struct bench_usage *ret) {
    struct rusage own;
    *ret = (struct bench_usage){.now_ns = clock_now_ns()};
    DIR *directory = self->run_dir[0] != 0 ? opendir(self->run_dir) : NULL;
    for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
        char path[sizeof self->run_dir + 300], text[32];
        const char *end = strrchr(entry->d_name, '.');
        enum role role = role_of(entry->d_name);
        snprintf(path, sizeof path, "%s/%s", self->run_dir, entry->d_name);
        if (end != NULL && strcmp(end, ".pid") == 0 && role != ROLE_NONE &&
            read_text(path, text, sizeof text))
            add_process(strtol(text, NULL, 10), role, ret);
    }
    if (directory != NULL)
        closedir(directory);
    for (int role = ROLE_COORDINATOR; role <= ROLE_SAMPLER; role++) {
        ret->role[ROLE_NONE].cpu_s += ret->role[role].cpu_s;
        ret->role[ROLE_NONE].queued_s += ret->role[role].queued_s;
        ret->role[ROLE_NONE].sleeps += ret->role[role].sleeps;
        ret->role[ROLE_NONE].preempted += ret->role[role].preempted;
        ret->role[ROLE_NONE].resident_bytes += ret->role[role].resident_bytes;
    }
    getrusage(RUSAGE_SELF, &own);
    ret->client_cpu_s = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) +
                        (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6;
    read_machine(ret);
}
