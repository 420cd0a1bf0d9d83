/* See chaos_client.h.
 *
 * A stream: CONNECTING -> READING -> (answer complete) next request
 *           cut off before the end -> after a pause the same request again, with Last-Event-ID: the gateway goes on where the
 *           answer stopped. What it says twice all the same is counted as duplicated. */
#include "actors/host/chaos_client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <jansson.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "actors/host/clock.h"

#define TICK_MS      10
#define RETRY_NS     20000000u
#define RESUMES_MAX  200 /* of one request */
#define ANSWER_BYTES 65536u

struct connection {
    struct chaos_load *load;
    struct chaos_stream *stream;
    uint32_t number, asked;
    int file; /* -1: none */
    bool busy, done, failed; /* failed: the answer told of an error */
    uint32_t attempts;
    uint64_t next_ns; /* when to connect; NEVER-like while busy */
    uint64_t last_ns; /* of the last piece, or of the question */
    char id[48], last_event[32];
    int status;
    bool retry_after; /* the head says when to come again */
    char *line;
    size_t line_bytes;
    enum { READ_HEAD, READ_SIZE, READ_CHUNK, READ_CHUNK_END } reading;
    char frame_line[64];
    size_t frame_bytes;
    uint64_t chunk_left;
    uint32_t pieces;
    char *text; /* so far */
    size_t text_bytes;
};

int chaos_load_init(struct chaos_load *ret, uint16_t port, uint32_t streams, uint32_t tokens) {
    *ret = (struct chaos_load){.port = port, .streams = streams, .tokens = tokens};
    ret->stream = calloc(streams, sizeof *ret->stream);
    return ret->stream != NULL ? 0 : ERR_NO_MEMORY;
}

void chaos_load_free(struct chaos_load *self) {
    for (uint32_t i = 0; self->stream != NULL && i < self->streams; i++)
        free(self->stream[i].expected);
    free(self->stream);
    free(self->piece);
}

/* ---- asking ---- */

static const char *const openings[] = {"And it came to pass", "Enter KING HENRY", "import os",
                                       "river: a natural stream", "NAME ls - list"};

static bool ask(struct connection *self) {
    char body[512], request[1024], resume[80] = "";
    int size = snprintf(body, sizeof body,
                        "{\"prompt\":\"%s %u\",\"max_tokens\":%u,\"temperature\":0.8,\"seed\":%u,"
                        "\"ignore_eos\":true,\"stream\":true}",
                        openings[self->number % 5], self->number, self->load->tokens, self->number + 1);
    if (self->last_event[0] != 0)
        snprintf(resume, sizeof resume, "Last-Event-ID: %s\r\n", self->last_event);
    int total = snprintf(request, sizeof request,
                         "POST /v1/completions HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/json\r\n"
                         "X-Request-Id: %s\r\nX-Stream-Resume: 1\r\n%sConnection: close\r\nContent-Length: %d\r\n\r\n%s",
                         self->id, resume, size, body);
    return send(self->file, request, (size_t)total, MSG_NOSIGNAL) == total;
}

static void hang_up(struct connection *self) {
    if (self->file >= 0)
        close(self->file);
    self->file = -1;
}

static void open_connection(struct connection *self) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(self->load->port)};
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    self->file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    self->status = 0;
    self->retry_after = false;
    self->reading = READ_HEAD;
    self->failed = false;
    self->line_bytes = self->frame_bytes = 0;
    setsockopt(self->file, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(self->file, (struct sockaddr *)&address, sizeof address) != 0 || !ask(self)) {
        hang_up(self);
        self->next_ns = clock_now_ns() + RETRY_NS;
    }
}

static void begin(struct connection *self) {
    self->busy = true;
    self->done = false;
    self->attempts = 0;
    self->pieces = 0;
    self->text_bytes = 0;
    self->text[0] = 0;
    self->last_event[0] = 0;
    snprintf(self->id, sizeof self->id, "chaos-%d-%u-%u", (int)getpid(), self->number, self->asked++);
    self->last_ns = clock_now_ns();
    open_connection(self);
}

/* ---- answers ---- */

static void note_piece(struct connection *self, uint64_t now) {
    struct chaos_load *load = self->load;
    if (load->pieces == load->pieces_room) {
        load->pieces_room = load->pieces_room > 0 ? 2 * load->pieces_room : 65536;
        load->piece = realloc(load->piece, load->pieces_room * sizeof *load->piece);
        ASSERT(load->piece != NULL);
    }
    load->piece[load->pieces++] = (struct chaos_piece){now, now - self->last_ns, self->number};
    self->last_ns = now;
    self->pieces++;
}

static void take_data(struct connection *self, const char *data, size_t size, uint64_t now) {
    if (size >= 6 && memcmp(data, "[DONE]", 6) == 0) {
        self->done = !self->failed;
        return;
    }
    json_t *chunk = json_loadb(data, size, 0, NULL);
    const char *text = json_string_value(
        json_object_get(json_array_get(json_object_get(chunk, "choices"), 0), "text"));
    size_t length = text != NULL ? strlen(text) : 0;
    if (json_object_get(chunk, "error") != NULL) /* a gateway that ends in order cuts its streams off */
        self->failed = true;
    if (text != NULL)
        note_piece(self, now);
    if (self->text_bytes + length < ANSWER_BYTES && length > 0) {
        memcpy(self->text + self->text_bytes, text, length + 1);
        self->text_bytes += length;
    }
    json_decref(chunk);
}

static void take_line(struct connection *self, uint64_t now) {
    const char *line = self->line;
    if (strncmp(line, "data: ", 6) == 0) {
        take_data(self, line + 6, self->line_bytes - 6, now);
    } else if (strncmp(line, "id: ", 4) == 0) {
        snprintf(self->last_event, sizeof self->last_event, "%s", line + 4);
    }
}

/* A line of the answer's head, or of the chunked coding around its body. */
static void take_frame_line(struct connection *self) {
    self->frame_line[self->frame_bytes] = 0;
    if (self->reading == READ_HEAD) {
        if (self->status == 0)
            sscanf(self->frame_line, "HTTP/1.1 %3d", &self->status);
        self->retry_after = self->retry_after || strncasecmp(self->frame_line, "Retry-After: ", 13) == 0;
        if (self->frame_bytes == 0)
            self->reading = READ_SIZE;
    } else if (self->reading == READ_SIZE) {
        self->chunk_left = strtoull(self->frame_line, NULL, 16);
        self->reading = READ_CHUNK;
    } else {
        self->reading = READ_SIZE;
    }
    self->frame_bytes = 0;
}

static void take_bytes(struct connection *self, const char *bytes, size_t size, uint64_t now) {
    for (size_t i = 0; i < size; i++) {
        if (self->reading != READ_CHUNK) {
            if (bytes[i] == '\n')
                take_frame_line(self);
            else if (bytes[i] != '\r' && self->frame_bytes < sizeof self->frame_line - 1)
                self->frame_line[self->frame_bytes++] = bytes[i];
            continue;
        }
        if (bytes[i] == '\n') {
            self->line[self->line_bytes] = 0;
            take_line(self, now);
            self->line_bytes = 0;
        } else if (self->line_bytes < ANSWER_BYTES - 1) {
            self->line[self->line_bytes++] = bytes[i];
        }
        if (--self->chunk_left == 0)
            self->reading = READ_CHUNK_END;
    }
}

static void judge(struct connection *self) {
    struct chaos_stream *stream = self->stream;
    stream->answers++;
    if (stream->expected == NULL) {
        stream->expected = strdup(self->text);
        stream->pieces_expected = self->pieces;
        return;
    }
    if (strcmp(stream->expected, self->text) == 0)
        return;
    if (self->text_bytes > strlen(stream->expected))
        stream->duplicated++;
    else
        stream->different++;
}

static void end(struct connection *self) {
    hang_up(self);
    self->busy = false;
    self->next_ns = 0;
}

/* The connection has ended. */
static void on_end(struct connection *self, uint64_t now) {
    bool whole_head = self->reading != READ_HEAD;
    hang_up(self);
    if (self->done && self->status == 200) {
        judge(self);
        end(self);
    } else if (whole_head && (self->status == 429 || self->status == 503) && self->retry_after) {
        self->stream->refused++; /* in order: asked again later */
        self->next_ns = now + 5 * (uint64_t)RETRY_NS;
    } else if (whole_head && self->status != 200) { /* any other answer is none */
        self->stream->lost++;
        end(self);
    } else if (self->attempts++ < RESUMES_MAX) {
        self->stream->resumed += self->pieces > 0;
        self->next_ns = now + RETRY_NS;
    } else {
        self->stream->lost++;
        end(self);
    }
}

static void receive(struct connection *self) {
    static char bytes[65536];
    ssize_t got = recv(self->file, bytes, sizeof bytes, MSG_DONTWAIT);
    uint64_t now = clock_now_ns();
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got > 0)
        take_bytes(self, bytes, (size_t)got, now);
    if (got <= 0 || self->done)
        on_end(self, now);
}

/* ---- all streams ---- */

static void turn(struct chaos_load *load, struct connection *list, struct pollfd *files) {
    for (uint32_t i = 0; i < load->streams; i++) {
        if (list[i].busy && list[i].file < 0 && clock_now_ns() >= list[i].next_ns)
            open_connection(&list[i]);
        files[i] = (struct pollfd){.fd = list[i].file, .events = POLLIN};
    }
    poll(files, load->streams, TICK_MS);
    for (uint32_t i = 0; i < load->streams; i++)
        if (list[i].file >= 0 && files[i].revents != 0)
            receive(&list[i]);
    if (load->tick != NULL)
        load->tick(load->context, clock_now_ns());
}

static bool any_busy(const struct chaos_load *load, const struct connection *list) {
    for (uint32_t i = 0; i < load->streams; i++)
        if (list[i].busy)
            return true;
    return false;
}

static struct connection *open_list(struct chaos_load *load) {
    struct connection *list = calloc(load->streams, sizeof *list);
    ASSERT(list != NULL);
    for (uint32_t i = 0; i < load->streams; i++) {
        list[i] = (struct connection){.load = load, .stream = &load->stream[i], .number = i, .file = -1};
        list[i].line = malloc(ANSWER_BYTES);
        list[i].text = malloc(ANSWER_BYTES);
        ASSERT(list[i].line != NULL && list[i].text != NULL);
    }
    return list;
}

static void run(struct chaos_load *self, uint64_t until_ns, uint64_t end_ns, bool once) {
    struct connection *list = open_list(self);
    struct pollfd *files = calloc(self->streams, sizeof *files);
    ASSERT(files != NULL);
    for (bool first = true; first || any_busy(self, list) || (!once && clock_now_ns() < until_ns);
         first = false) {
        uint64_t now = clock_now_ns();
        for (uint32_t i = 0; i < self->streams; i++)
            if (!list[i].busy && (once ? first : now < until_ns))
                begin(&list[i]);
        turn(self, list, files);
        if (clock_now_ns() >= end_ns)
            break;
    }
    for (uint32_t i = 0; i < self->streams; i++) {
        self->stream[i].lost += list[i].busy;
        hang_up(&list[i]);
        free(list[i].line);
        free(list[i].text);
    }
    free(list);
    free(files);
}

bool chaos_load_learn(struct chaos_load *self, uint64_t timeout_ns) {
    uint64_t end_ns = clock_now_ns() + timeout_ns;
    run(self, 0, end_ns, true);
    for (uint32_t i = 0; i < self->streams; i++)
        if (self->stream[i].expected == NULL)
            return false;
    return true;
}

void chaos_load_run(struct chaos_load *self, uint64_t until_ns, uint64_t grace_ns) {
    run(self, until_ns, until_ns + grace_ns, false);
}
