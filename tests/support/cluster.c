/* See cluster.h. */
#include "tests/support/cluster.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/http.h"

#define ARGUMENTS_MAX 64

uint16_t free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    uint16_t port = 0;
    if (bind(fd, (struct sockaddr *)&address, size) == 0 &&
        getsockname(fd, (struct sockaddr *)&address, &size) == 0)
        port = ntohs(address.sin_port);
    close(fd);
    return port;
}

static void run_child(const struct cluster *self, const char *model, const char *arguments) {
    char port[16], binary[256], *copy = strdup(arguments);
    const char *build = getenv("TROUPE_BUILD");
    snprintf(port, sizeof port, "%u", self->port);
    snprintf(binary, sizeof binary, "%s/troupe", build != NULL ? build : "build");
    const char *list[ARGUMENTS_MAX] = {binary, "serve",     "--model",   model,
                                       "--port", port, "--run-dir", self->run_dir};
    int count = 8;
    for (char *word = strtok(copy, " "); word != NULL && count < ARGUMENTS_MAX - 1;
         word = strtok(NULL, " "))
        list[count++] = word;
    int log = open(self->log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(log, 1);
    dup2(log, 2);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    execv(binary, (char **)list);
    _exit(127);
}

static void print_log(const struct cluster *self) {
    char line[1024];
    FILE *file = fopen(self->log, "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        fputs(line, stderr);
    if (file != NULL)
        fclose(file);
}

bool cluster_start(struct cluster *self, const char *model, const char *arguments) {
    static int number;
    self->faults = false;
    self->port = free_port();
    snprintf(self->run_dir, sizeof self->run_dir, "/tmp/troupe-test-%d-%d", (int)getpid(), ++number);
    snprintf(self->log, sizeof self->log, "%s.log", self->run_dir);
    self->pid = fork();
    if (self->pid == 0)
        run_child(self, model, arguments);
    for (int i = 0; i < 600; i++) {
        int status;
        if (waitpid(self->pid, &status, WNOHANG) == self->pid) {
            fprintf(stderr, "troupe serve %s ended early\n", arguments);
            print_log(self);
            return false;
        }
        if (http_one(self->port, "GET", "/ready", NULL, NULL) == 200)
            return true;
        usleep(100000);
    }
    fprintf(stderr, "troupe serve %s is not ready\n", arguments);
    print_log(self);
    kill(self->pid, SIGKILL);
    return false;
}

/* A process that died was started again, and the log says so. */
static bool was_restarted(const struct cluster *self) {
    char line[1024];
    bool found = false;
    FILE *file = fopen(self->log, "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        found = found || strstr(line, "starting it again") != NULL;
    if (file != NULL)
        fclose(file);
    return found;
}

bool cluster_stop(struct cluster *self) {
    kill(self->pid, SIGTERM);
    for (int i = 0; i < 400; i++) {
        int status;
        if (waitpid(self->pid, &status, WNOHANG) == self->pid) {
            struct stat info;
            bool clean = WIFEXITED(status) && WEXITSTATUS(status) == 0;
            bool gone = stat(self->run_dir, &info) != 0;
            bool died = !self->faults && was_restarted(self);
            if (!clean || !gone || died) {
                fprintf(stderr, "serve ended with status %#x, run directory %s, processes %s\n", status,
                        gone ? "gone" : "left", died ? "died" : "lived");
                print_log(self);
            } else {
                unlink(self->log);
            }
            return clean && gone && !died;
        }
        usleep(50000);
    }
    fprintf(stderr, "serve did not end\n");
    print_log(self);
    kill(self->pid, SIGKILL);
    waitpid(self->pid, NULL, 0);
    return false;
}

double cluster_metric(const struct cluster *self, const char *name) {
    char *text = NULL;
    if (http_one(self->port, "GET", "/metrics", NULL, &text) != 200 || text == NULL) {
        free(text);
        return -1;
    }
    double sum = 0;
    bool found = false;
    size_t length = strlen(name);
    for (char *save, *line = strtok_r(text, "\n", &save); line != NULL; line = strtok_r(NULL, "\n", &save)) {
        if (strncmp(line, name, length) != 0 || (line[length] != ' ' && line[length] != '{'))
            continue;
        char *value = strrchr(line, ' ');
        sum += value != NULL ? strtod(value, NULL) : 0;
        found = true;
    }
    free(text);
    return found ? sum : -1;
}

uint32_t cluster_pids(const struct cluster *self, const char *role, pid_t *ret, uint32_t capacity) {
    uint32_t count = 0;
    DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc != NULL && (entry = readdir(proc)) != NULL;) {
        char path[300], text[512] = {0};
        int parent = 0;
        snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
        FILE *file = fopen(path, "r");
        if (file == NULL)
            continue;
        int matched = fscanf(file, "%*d (%*[^)]) %*c %d", &parent);
        fclose(file);
        if (matched != 1 || parent != self->pid)
            continue;
        snprintf(path, sizeof path, "/proc/%s/cmdline", entry->d_name);
        file = fopen(path, "r");
        size_t got = file != NULL ? fread(text, 1, sizeof text - 1, file) : 0;
        if (file != NULL)
            fclose(file);
        char *second = memchr(text, 0, got);
        if (second != NULL && strcmp(second + 1, role) == 0 && count < capacity)
            ret[count++] = (pid_t)atoi(entry->d_name);
    }
    if (proc != NULL)
        closedir(proc);
    return count;
}
