/* See http.h. Every call asks for Connection: close, so an answer ends where the connection does or where its coding says. */
#include "tests/support/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CALL_NEW, CALL_OPEN, CALL_DONE };

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void open_call(struct http_call *call, uint16_t port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    call->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    call->state = CALL_OPEN;
    size_t body_bytes = call->body != NULL ? strlen(call->body) : 0;
    size_t room = body_bytes + strlen(call->path) + 256;
    call->request = malloc(room);
    int head = snprintf(call->request, room,
                        "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: "
                        "application/json\r\nContent-Length: %zu\r\n\r\n",
                        call->method, call->path, body_bytes);
    if (body_bytes > 0)
        memcpy(call->request + head, call->body, body_bytes);
    call->request_bytes = (size_t)head + body_bytes;
    if (connect(call->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        close(call->fd);
        call->state = CALL_DONE;
    }
}

/* Bytes of the body so far, chunked coding removed, into call->text. Returns whether the answer is complete. */
static bool decode(struct http_call *call, bool closed) {
    call->raw[call->raw_bytes] = 0;
    char *body = strstr(call->raw, "\r\n\r\n");
    if (body == NULL)
        return false;
    body += 4;
    sscanf(call->raw, "HTTP/1.1 %d", &call->status);
    char *end = call->raw + call->raw_bytes;
    char kept = *body;
    *body = 0;
    bool chunked = strcasestr(call->raw, "transfer-encoding: chunked") != NULL;
    char *length = strcasestr(call->raw, "content-length:");
    size_t expected = length != NULL ? strtoull(length + 15, NULL, 10) : SIZE_MAX;
    *body = kept;
    call->text = realloc(call->text, (size_t)(end - body) + 1);
    call->text_bytes = 0;
    bool complete = false;
    if (!chunked) {
        call->text_bytes = (size_t)(end - body);
        memcpy(call->text, body, call->text_bytes);
        complete = expected == SIZE_MAX ? closed : call->text_bytes >= expected;
    }
    for (char *at = body; chunked;) {
        char *line = memmem(at, (size_t)(end - at), "\r\n", 2);
        if (line == NULL)
            break;
        size_t size = strtoull(at, NULL, 16);
        if (size == 0) {
            complete = true;
            break;
        }
        if (line + 2 + size + 2 > end)
            break;
        memcpy(call->text + call->text_bytes, line + 2, size);
        call->text_bytes += size;
        at = line + 2 + size + 2;
    }
    call->text[call->text_bytes] = 0;
    return complete;
}

static void finish(struct http_call *call, uint64_t began_ns, bool closed) {
    if (call->raw_bytes > 0)
        call->complete = decode(call, closed);
    call->end_ns = now_ns() - began_ns;
    close(call->fd);
    call->state = CALL_DONE;
}

static void note_time(struct http_call *call, uint64_t time_ns) {
    if (!call->keep_times)
        return;
    if (call->times == call->times_capacity) {
        call->times_capacity = call->times_capacity * 2 + 64;
        call->time_ns = realloc(call->time_ns, call->times_capacity * sizeof *call->time_ns);
    }
    call->time_ns[call->times++] = time_ns;
}

static void receive(struct http_call *call, uint64_t began_ns) {
    for (;;) {
        if (call->raw_capacity < call->raw_bytes + 65536) {
            call->raw_capacity = call->raw_capacity * 2 + 65536;
            call->raw = realloc(call->raw, call->raw_capacity);
        }
        ssize_t got = recv(call->fd, call->raw + call->raw_bytes,
                           call->raw_capacity - call->raw_bytes - 1, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (got <= 0) {
            finish(call, began_ns, got == 0);
            return;
        }
        if (call->raw_bytes == 0)
            call->first_byte_ns = now_ns() - began_ns;
        call->raw_bytes += (size_t)got;
        note_time(call, now_ns() - began_ns);
        if (call->hang_up_after > 0 && call->raw_bytes >= call->hang_up_after) {
            finish(call, began_ns, false);
            return;
        }
    }
}

static void progress(struct http_call *call, short events, uint64_t began_ns) {
    if ((events & POLLOUT) && call->sent < call->request_bytes) {
        ssize_t sent = send(call->fd, call->request + call->sent, call->request_bytes - call->sent,
                            MSG_NOSIGNAL);
        if (sent > 0)
            call->sent += (size_t)sent;
        else if (sent < 0 && errno != EAGAIN && errno != EINTR) {
            receive(call, began_ns); /* an early answer (413, say) may lie there */
            if (call->state == CALL_OPEN)
                finish(call, began_ns, true);
            return;
        }
    }
    if (events & (POLLIN | POLLHUP | POLLERR))
        receive(call, began_ns);
}

void http_run(uint16_t port, struct http_call *calls, uint32_t count, uint32_t parallel,
              uint32_t timeout_ms) {
    uint64_t began_ns = now_ns();
    struct pollfd *polls = calloc(count, sizeof *polls);
    uint32_t *which = calloc(count, sizeof *which);
    for (;;) {
        uint32_t open = 0, left = 0;
        uint64_t elapsed_ms = (now_ns() - began_ns) / 1000000;
        for (uint32_t i = 0; i < count; i++)
            open += calls[i].state == CALL_OPEN;
        for (uint32_t i = 0; i < count; i++) {
            if (calls[i].state == CALL_NEW && calls[i].start_before_ms > 0 &&
                elapsed_ms >= calls[i].start_before_ms) {
                calls[i].skipped = true;
                calls[i].state = CALL_DONE;
            }
            if (calls[i].state == CALL_NEW && open < parallel && elapsed_ms >= calls[i].start_after_ms) {
                open_call(&calls[i], port);
                open++;
            }
            left += calls[i].state != CALL_DONE;
        }
        if (left == 0 || elapsed_ms > timeout_ms)
            break;
        uint32_t polled = 0;
        for (uint32_t i = 0; i < count; i++) {
            if (calls[i].state != CALL_OPEN)
                continue;
            bool sending = calls[i].sent < calls[i].request_bytes;
            polls[polled] = (struct pollfd){calls[i].fd, (short)(POLLIN | (sending ? POLLOUT : 0)), 0};
            which[polled++] = i;
        }
        poll(polls, polled, 10);
        for (uint32_t i = 0; i < polled; i++)
            if (polls[i].revents != 0)
                progress(&calls[which[i]], polls[i].revents, began_ns);
    }
    for (uint32_t i = 0; i < count; i++)
        if (calls[i].state == CALL_OPEN)
            finish(&calls[i], began_ns, false);
    free(polls);
    free(which);
}

void http_call_free(struct http_call *call) {
    free(call->time_ns);
    free(call->text);
    free(call->raw);
    free(call->request);
    *call = (struct http_call){0};
}

int http_one(uint16_t port, const char *method, const char *path, const char *body, char **ret_text) {
    struct http_call call = {.method = method, .path = path, .body = body};
    http_run(port, &call, 1, 1, 60000);
    int status = call.status;
    if (ret_text != NULL) {
        *ret_text = call.text;
        call.text = NULL;
    }
    http_call_free(&call);
    return status;
}
