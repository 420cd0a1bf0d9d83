/* See bench_client.h. One thread, one poll: a client that disturbs what it measures as little as it
 * can.
 *
 * An answer passes through: status line and headers -> chunk sizes -> chunk bytes -> lines; a line
 * "data: {" is one piece of text. */
#include "actors/host/bench_client.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "actors/host/clock.h"

#define MARK       "data: {"
#define MARK_BYTES (sizeof MARK - 1)
#define READ_BYTES 65536

enum reading { READ_STATUS, READ_HEADERS, READ_CHUNK_SIZE, READ_CHUNK, READ_CHUNK_END };

struct connection {
    struct bench_call *call;
    int file; /* -1: not open */
    char *request;
    size_t request_bytes, sent;
    enum reading state;
    char line[64]; /* start of the line being read: status, header or chunk size */
    size_t line_bytes;
    uint64_t chunk_left;
    size_t body_line; /* bytes of the present line of the body */
    bool marked;      /* all of them agree with MARK so far */
};

/* ---- requests ---- */

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Tokens below 16 are left out: special ones live there in most vocabularies. */
static int make_request(struct connection *self, const struct bench_target *target) {
    const struct bench_call *call = self->call;
    size_t room = 12u * call->prompt_tokens + 1024, used = 0;
    char *body = malloc(room);
    self->request = malloc(room + 1024);
    if (body == NULL || self->request == NULL) {
        free(body);
        return ERR_NO_MEMORY;
    }
    uint64_t own = call->seed, shared = call->shared_seed;
    used += (size_t)snprintf(body, room, "{\"prompt\":[");
    for (uint32_t i = 0; i < call->prompt_tokens; i++)
        used += (size_t)snprintf(body + used, room - used, "%s%u", i > 0 ? "," : "",
                                 16 + (uint32_t)(next_random(i < call->shared_tokens ? &shared : &own) %
                                                 (target->vocabulary - 16)));
    used += (size_t)snprintf(
        body + used, room - used,
        "],\"max_tokens\":%u,\"temperature\":0,\"ignore_eos\":true,\"stream\":true}",
        call->max_tokens);
    char key[600] = "";
    if (target->api_key != NULL)
        snprintf(key, sizeof key, "Authorization: Bearer %s\r\n", target->api_key);
    self->request_bytes = (size_t)snprintf(
        self->request, room + 1024,
        "POST /v1/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
        "%sConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
        target->host, key, used, body);
    free(body);
    return 0;
}

static int open_socket(const struct bench_target *target) {
    char port[8];
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *list;
    snprintf(port, sizeof port, "%u", target->port);
    if (getaddrinfo(target->host, port, &hints, &list) != 0)
        return -1;
    int file = -1, one = 1;
    for (struct addrinfo *at = list; at != NULL && file < 0; at = at->ai_next) {
        file = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (file >= 0 && connect(file, at->ai_addr, at->ai_addrlen) != 0) {
            close(file);
            file = -1;
        }
    }
    freeaddrinfo(list);
    if (file >= 0)
        setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return file;
}

/* ---- answers ---- */

static void note_piece(struct bench_call *call, uint64_t now) {
    if (call->events == call->events_room) {
        uint32_t room = call->events_room > 0 ? 2 * call->events_room : 64;
        uint64_t *larger = realloc(call->event_ns, room * sizeof *larger);
        ASSERT(larger != NULL);
        call->event_ns = larger;
        call->events_room = room;
    }
    call->event_ns[call->events++] = now;
}

static void read_body_byte(struct connection *self, char byte, uint64_t now) {
    if (byte == '\n') {
        self->body_line = 0;
        self->marked = true;
        return;
    }
    if (self->body_line < MARK_BYTES) {
        self->marked = self->marked && byte == MARK[self->body_line];
        if (++self->body_line == MARK_BYTES && self->marked)
            note_piece(self->call, now);
    }
}

/* A whole line outside of chunks. */
static void read_line(struct connection *self) {
    self->line[self->line_bytes] = 0;
    if (self->state == READ_STATUS) {
        sscanf(self->line, "HTTP/1.1 %3d", &self->call->status);
        self->state = READ_HEADERS;
    } else if (self->state == READ_HEADERS) {
        if (self->line_bytes == 0)
            self->state = READ_CHUNK_SIZE;
    } else if (self->state == READ_CHUNK_SIZE) {
        self->chunk_left = strtoull(self->line, NULL, 16);
        self->call->done = self->chunk_left == 0;
        self->state = READ_CHUNK;
    } else {
        self->state = READ_CHUNK_SIZE;
    }
    self->line_bytes = 0;
}

static void read_bytes(struct connection *self, const char *bytes, size_t count, uint64_t now) {
    for (size_t i = 0; i < count && !self->call->done; i++) {
        if (self->state == READ_CHUNK) {
            read_body_byte(self, bytes[i], now);
            if (--self->chunk_left == 0)
                self->state = READ_CHUNK_END;
        } else if (bytes[i] == '\n') {
            read_line(self);
        } else if (bytes[i] != '\r' && self->line_bytes < sizeof self->line - 1) {
            self->line[self->line_bytes++] = bytes[i];
        }
    }
}

/* ---- connections ---- */

static void close_connection(struct connection *self) {
    if (self->file >= 0)
        close(self->file);
    self->file = -1;
    free(self->request);
    self->request = NULL;
}

static bool over(const struct connection *self) {
    return self->call->done || (self->file < 0 && self->call->start_ns != 0);
}

static void send_some(struct connection *self) {
    ssize_t sent = send(self->file, self->request + self->sent, self->request_bytes - self->sent,
                        MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0)
        self->sent += (size_t)sent;
    else if (errno != EAGAIN && errno != EINTR)
        close_connection(self);
}

static void start(struct connection *self, const struct bench_target *target) {
    self->call->start_ns = clock_now_ns();
    self->file = open_socket(target);
    self->marked = true;
    if (self->file < 0 || make_request(self, target) < 0)
        close_connection(self);
    else
        send_some(self);
}

static void receive_some(struct connection *self) {
    static char bytes[READ_BYTES];
    ssize_t got = recv(self->file, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got > 0)
        read_bytes(self, bytes, (size_t)got, clock_now_ns());
    if (got <= 0 || self->call->done)
        close_connection(self);
}

/* Starts what is due; returns how long to wait for the next, in ms (-1: nothing left to start). */
static int start_due(struct connection *list, uint32_t count, const struct bench_target *target,
                     uint64_t begin_ns) {
    int wait_ms = -1;
    for (uint32_t i = 0; i < count; i++) {
        if (list[i].call->start_ns != 0)
            continue;
        uint64_t now = clock_now_ns(), due = begin_ns + list[i].call->start_after_ns;
        if (due <= now) {
            start(&list[i], target);
        } else {
            int ms = (int)((due - now) / 1000000u);
            wait_ms = wait_ms < 0 || ms < wait_ms ? ms : wait_ms;
        }
    }
    return wait_ms;
}

int bench_calls_run(const struct bench_target *target, struct bench_call *calls, uint32_t count,
                    uint64_t timeout_ns, struct failure *failure) {
    struct connection *list = calloc(count, sizeof *list);
    struct pollfd *files = calloc(count, sizeof *files);
    uint64_t begin = clock_now_ns();
    uint32_t left = list != NULL && files != NULL ? count : 0;
    int error =
        left == 0 && count > 0 ? fail(failure, ERR_NO_MEMORY, "no memory for %u calls", count) : 0;
    for (uint32_t i = 0; i < left; i++)
        list[i] = (struct connection){.call = &calls[i], .file = -1};
    while (left > 0 && clock_now_ns() - begin < timeout_ns) {
        int wait_ms = start_due(list, count, target, begin);
        for (uint32_t i = 0; i < count; i++) {
            short events = list[i].sent < list[i].request_bytes ? POLLIN | POLLOUT : POLLIN;
            files[i] = (struct pollfd){.fd = list[i].file, .events = events};
        }
        poll(files, count, wait_ms >= 0 ? wait_ms : 200);
        for (uint32_t i = left = 0; i < count; i++) {
            if (list[i].file >= 0 && (files[i].revents & POLLOUT) != 0)
                send_some(&list[i]);
            if (list[i].file >= 0 && files[i].revents != 0)
                receive_some(&list[i]);
            left += !over(&list[i]);
        }
    }
    for (uint32_t i = 0; list != NULL && i < count; i++)
        close_connection(&list[i]);
    free(list);
    free(files);
    return error;
}

void bench_calls_free(struct bench_call *calls, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        free(calls[i].event_ns);
}

int bench_get(const struct bench_target *target, const char *path) {
    char text[256];
    int status = 0, file = open_socket(target);
    if (file < 0)
        return 0;
    int length =
        snprintf(text, sizeof text, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n",
                 path, target->host);
    struct pollfd ready = {.fd = file, .events = POLLIN};
    if (length < (int)sizeof text && send(file, text, (size_t)length, MSG_NOSIGNAL) == length &&
        poll(&ready, 1, 1000) == 1) {
        ssize_t got = recv(file, text, sizeof text - 1, 0);
        text[got > 0 ? got : 0] = 0;
        if (sscanf(text, "HTTP/1.1 %3d", &status) != 1)
            status = 0;
    }
    close(file);
    return status;
}
