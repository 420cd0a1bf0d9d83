/* See relay.h. The gateway listens on a UNIX socket that only this user may connect to, and is asked in
 * HTTP/1.0: what follows the head is the body, until the connection ends. */
#include "actors/host/relay.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/thread.h"

#define HEAD_BYTES_MAX 8192u

struct relay {
    struct relays *all;
    uint64_t client; /* 0: free */
    int file;
    char *question;
    size_t question_bytes;
};

struct relays {
    struct http *http;
    char path[ADDRESS_BYTES_MAX + 32];
    pthread_mutex_t mutex; /* of everything below */
    struct relay relay[RELAYS_MAX];
    uint32_t running;
};

void relays_open(struct relays **ret, struct http *http, const char *gateway_socket) {
    struct relays *self = calloc(1, sizeof *self);
    ASSERT(self != NULL);
    self->http = http;
    snprintf(self->path, sizeof self->path, "%s", gateway_socket);
    pthread_mutex_init(&self->mutex, NULL);
    *ret = self;
}

static void answer(struct relays *self, uint64_t client, uint16_t status, const char *type,
                   const void *bytes, size_t size, bool last) {
    struct effect effect = {.kind = EFFECT_STREAM};
    effect.stream.client = client;
    effect.stream.status = status;
    effect.stream.content_type = type;
    effect.stream.extra_header = status != 0 ? "Cache-Control: no-store" : NULL;
    effect.stream.bytes = bytes;
    effect.stream.size = size;
    effect.stream.last = last;
    http_stream(self->http, &effect);
}

static void refuse(struct relays *self, uint64_t client, const char *why) {
    char text[256];
    int size = snprintf(text, sizeof text,
                        "{\"error\":{\"message\":\"%s\",\"type\":\"unavailable\"}}\n", why);
    answer(self, client, 503, "application/json", text, (size_t)size, true);
}

static bool send_all(int file, const char *bytes, size_t size) {
    for (size_t sent = 0; sent < size;) {
        ssize_t wrote = send(file, bytes + sent, size - sent, MSG_NOSIGNAL);
        if (wrote <= 0)
            return false;
        sent += (size_t)wrote;
    }
    return true;
}

/* Reads the head and what came with it; answers with its status. Returns false if there was none. */
static bool pass_head(struct relay *relay) {
    char head[HEAD_BYTES_MAX], type[96] = "application/json";
    size_t size = 0;
    char *end = NULL;
    int status = 0;
    while (end == NULL) {
        ssize_t got = size + 1 < sizeof head ? recv(relay->file, head + size, sizeof head - 1 - size, 0) : 0;
        if (got <= 0)
            return false;
        size += (size_t)got;
        head[size] = '\0';
        end = strstr(head, "\r\n\r\n");
    }
    if (sscanf(head, "HTTP/1.%*d %d", &status) != 1 || status < 200 || status > 599)
        return false;
    *end = '\0';
    const char *at = strcasestr(head, "\r\nContent-Type: ");
    if (at != NULL)
        snprintf(type, sizeof type, "%.*s", (int)strcspn(at + 16, "\r"), at + 16);
    const char *rest = end + 4;
    answer(relay->all, relay->client, (uint16_t)status, type, rest, size - (size_t)(rest - head), false);
    return true;
}

static void *run(void *argument) {
    struct relay *relay = argument;
    struct relays *self = relay->all;
    char bytes[16384];
    if (!send_all(relay->file, relay->question, relay->question_bytes) || !pass_head(relay)) {
        refuse(self, relay->client, "the gateway went away before it answered");
    } else {
        for (ssize_t got; (got = recv(relay->file, bytes, sizeof bytes, 0)) > 0;)
            answer(self, relay->client, 0, NULL, bytes, (size_t)got, false);
        answer(self, relay->client, 0, NULL, "", 0, true);
    }
    pthread_mutex_lock(&self->mutex);
    close(relay->file);
    free(relay->question);
    relay->client = 0;
    self->running--;
    pthread_mutex_unlock(&self->mutex);
    return NULL;
}

/* One that has no room is left out; the empty line after them always has. */
static void put_header(char **at, size_t *room, const char *name, const char *value) {
    if (value == NULL || strpbrk(value, "\r\n") != NULL)
        return;
    int size = snprintf(*at, *room, "%s: %s\r\n", name, value);
    if ((size_t)size + 3 > *room)
        return;
    *at += size;
    *room -= (size_t)size;
}

static void write_question(struct relay *relay, const struct http_request *request) {
    size_t room = strlen(request->path) + strlen(request->query) + HEAD_BYTES_MAX, whole = room;
    relay->question = malloc(room + request->body_bytes);
    ASSERT(relay->question != NULL);
    char length[32], *at = relay->question;
    int size = snprintf(at, room, "%s %s%s%s HTTP/1.0\r\nHost: troupe\r\nConnection: close\r\n", request->method,
                        request->path, request->query[0] != '\0' ? "?" : "", request->query);
    at += size;
    room -= (size_t)size;
    snprintf(length, sizeof length, "%zu", request->body_bytes);
    put_header(&at, &room, "Content-Length", length);
    put_header(&at, &room, "X-Request-Id", request->request_id);
    put_header(&at, &room, "traceparent", request->traceparent);
    put_header(&at, &room, "X-Troupe-Trace", request->trace);
    put_header(&at, &room, "X-Stream-Resume", request->stream_resume);
    put_header(&at, &room, "Last-Event-ID", request->last_event_id);
    ASSERT(room > 2 && whole > room);
    memcpy(at, "\r\n", 2);
    memcpy(at + 2, request->body, request->body_bytes);
    relay->question_bytes = (size_t)(at - relay->question) + 2 + request->body_bytes;
}

static int connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return -1;
    strcpy(address.sun_path, path);
    int file = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (file >= 0 && connect(file, (struct sockaddr *)&address, sizeof address) != 0) {
        close(file);
        file = -1;
    }
    return file;
}

void relays_pass(struct relays *self, const struct http_request *request) {
    struct relay *relay = NULL;
    struct failure failure;
    pthread_t thread;
    pthread_mutex_lock(&self->mutex);
    for (uint32_t i = 0; i < RELAYS_MAX && relay == NULL; i++)
        if (self->relay[i].client == 0)
            relay = &self->relay[i];
    int file = relay != NULL ? connect_to(self->path) : -1;
    if (file < 0) {
        pthread_mutex_unlock(&self->mutex);
        refuse(self, request->client, relay == NULL ? "too many requests pass through the admin address already"
                                                    : "there is no gateway in the run directory now");
        return;
    }
    *relay = (struct relay){.all = self, .client = request->client, .file = file};
    write_question(relay, request);
    self->running++;
    bool started = thread_start(&thread, "relay", run, relay, &failure) == 0;
    if (started) {
        pthread_detach(thread);
    } else {
        close(file);
        free(relay->question);
        relay->client = 0;
        self->running--;
    }
    pthread_mutex_unlock(&self->mutex);
    if (!started)
        refuse(self, request->client, "no thread for the request");
}

static void end(struct relay *relay) {
    if (relay->client != 0)
        shutdown(relay->file, SHUT_RDWR);
}

void relays_gone(struct relays *self, uint64_t client) {
    pthread_mutex_lock(&self->mutex);
    for (uint32_t i = 0; i < RELAYS_MAX; i++)
        if (self->relay[i].client == client)
            end(&self->relay[i]);
    pthread_mutex_unlock(&self->mutex);
}

void relays_close(struct relays **relays) {
    struct relays *self = *relays;
    if (self == NULL)
        return;
    for (bool any = true; any;) {
        pthread_mutex_lock(&self->mutex);
        for (uint32_t i = 0; i < RELAYS_MAX; i++)
            end(&self->relay[i]);
        any = self->running > 0;
        pthread_mutex_unlock(&self->mutex);
        if (any)
            usleep(1000);
    }
    pthread_mutex_destroy(&self->mutex);
    free(self);
    *relays = NULL;
}
