/* troupe replay FILE: a recorded feed in the same page, with a scrubber.
 *
 *   GET /                    the page
 *   GET /troupe/events?at=T  the feed as it was at Unix millisecond T, with what led to it, then on as it
 *                            went, `speed` times as fast (0: it stands still). An event `replay` comes first
 *
 * Each listener has its own place in the file. Keyframes other than its first are left out, as it knows
 * everything already; but the first of a gateway that was started again is a new beginning. */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/page.h"
#include "actors/host/bell.h"
#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/feed_journal.h"
#include "actors/host/http.h"
#include "actors/host/log.h"
#include "actors/host/process_parts.h"

#define VIEWERS_MAX    16u
#define BEFORE_MS      120000u     /* what a page shows of the time before */
#define BEFORE_BYTES   (2u << 20)  /* less where it would be more than this at once */
#define CHUNKS_PER_TURN 64u

struct viewer {
    uint64_t client; /* 0: free */
    uint64_t next;   /* id of the chunk to come */
    uint64_t at_ms, began_ns;
    double speed;
    bool ended, whole; /* whole: the keyframe has been sent */
    char gateway[32];  /* as its hello named it */
};

struct replay {
    struct feed_reader *reader;
    struct feed_range range;
    struct bell bell;
    struct http *http;
    struct viewer viewer[VIEWERS_MAX];
    volatile sig_atomic_t stop;
};
static struct replay replay;

static void on_signal(int number) {
    (void)number;
    replay.stop = 1;
    bell_ring(&replay.bell);
}

static void answer(uint64_t client, uint16_t status, const char *type, const char *header, const void *bytes,
                   size_t size, bool last) {
    struct effect effect = {.kind = EFFECT_STREAM};
    effect.stream.client = client;
    effect.stream.status = status;
    effect.stream.content_type = type;
    effect.stream.extra_header = header;
    effect.stream.bytes = bytes;
    effect.stream.size = size;
    effect.stream.last = last;
    http_stream(replay.http, &effect);
}

static double number_in(const char *query, const char *name, double otherwise) {
    size_t length = strlen(name);
    for (const char *at = query; at != NULL && *at != '\0'; at = strchr(at, '&')) {
        at += *at == '&';
        if (strncmp(at, name, length) == 0 && at[length] == '=') {
            char *end;
            double value = strtod(at + length + 1, &end);
            bool sound = end != at + length + 1 && value >= 0 && value < 1e15;
            return sound ? value : otherwise;
        }
    }
    return otherwise;
}

/* ---- listeners ---- */

static void join(const struct http_request *request) {
    struct viewer *viewer = NULL;
    for (uint32_t i = 0; i < VIEWERS_MAX && viewer == NULL; i++)
        if (replay.viewer[i].client == 0)
            viewer = &replay.viewer[i];
    if (viewer == NULL) {
        static const char FULL[] = "{\"error\":{\"message\":\"too many pages look on already\"}}\n";
        answer(request->client, 503, "application/json", "Retry-After: 1", FULL, sizeof FULL - 1, true);
        return;
    }
    double at = number_in(request->query, "at", (double)replay.range.from_ms);
    if (at < (double)replay.range.from_ms)
        at = (double)replay.range.from_ms;
    if (at > (double)replay.range.to_ms)
        at = (double)replay.range.to_ms;
    double speed = number_in(request->query, "speed", 1);
    *viewer = (struct viewer){.client = request->client,
                              .at_ms = (uint64_t)at,
                              .began_ns = clock_now_ns(),
                              .speed = speed > 1000 ? 1000 : speed};
    viewer->next = feed_reader_start(replay.reader, viewer->at_ms, BEFORE_MS, BEFORE_BYTES);
    char text[256];
    int size = snprintf(text, sizeof text,
                        "event: replay\ndata: {\"v\":1,\"from\":%" PRIu64 ",\"to\":%" PRIu64 ",\"at\":%" PRIu64
                        ",\"speed\":%g}\n\n",
                        replay.range.from_ms, replay.range.to_ms, viewer->at_ms, viewer->speed);
    answer(request->client, 200, "text/event-stream", "Cache-Control: no-store", text, (size_t)size, false);
}

static void fail_viewer(struct viewer *viewer, const struct failure *failure) {
    fprintf(stderr, "troupe replay: %s\n", failure->text);
    answer(viewer->client, 0, NULL, NULL, "", 0, true);
    viewer->client = 0;
}

/* Of the gateway that wrote a keyframe; empty: it does not say. */
static void read_gateway(char ret[32], const struct feed_chunk *chunk) {
    static const char KEY[] = "\"gateway\":\"";
    const char *line = memchr(chunk->events, '\n', chunk->size), *end;
    ret[0] = 0;
    end = line == NULL ? NULL : memchr(line + 1, '\n', chunk->size - (size_t)(line + 1 - chunk->events));
    const char *at = end == NULL ? NULL : memmem(line, (size_t)(end - line), KEY, sizeof KEY - 1);
    for (size_t i = 0; at != NULL && i < 31; i++) {
        const char *from = at + sizeof KEY - 1 + i;
        if (from >= end || *from == '"')
            break;
        ret[i] = *from;
        ret[i + 1] = 0;
    }
}

static bool is_news(struct viewer *viewer, const struct feed_chunk *chunk) {
    char gateway[32];
    if (!chunk->keyframe)
        return true;
    read_gateway(gateway, chunk);
    bool same = viewer->whole && strcmp(gateway, viewer->gateway) == 0;
    memcpy(viewer->gateway, gateway, sizeof gateway);
    return !same;
}

/* Sends what is due. Returns when the next chunk is, NEVER: nothing waits. */
static uint64_t advance(struct viewer *viewer) {
    struct failure failure;
    struct feed_chunk chunk;
    for (uint32_t sent = 0; !viewer->ended; sent++) {
        int found = feed_reader_next(replay.reader, viewer->next, &chunk, &failure);
        if (found < 0) {
            fail_viewer(viewer, &failure);
            return NEVER;
        }
        if (found == 0) {
            static const char END[] = "event: replay_end\ndata: {\"v\":1}\n\n";
            viewer->ended = true;
            answer(viewer->client, 0, NULL, NULL, END, sizeof END - 1, false);
            break;
        }
        if (chunk.t_ms > viewer->at_ms) { /* not of the time before */
            if (viewer->speed == 0)
                return NEVER;
            double wait_ns = (double)(chunk.t_ms - viewer->at_ms) * 1e6 / viewer->speed;
            uint64_t due_ns = viewer->began_ns + (uint64_t)wait_ns;
            if (due_ns > clock_now_ns() || sent >= CHUNKS_PER_TURN)
                return due_ns;
        }
        viewer->next = chunk.id + 1;
        if (is_news(viewer, &chunk))
            answer(viewer->client, 0, NULL, NULL, chunk.events, chunk.size, false);
        viewer->whole = true;
    }
    return NEVER;
}

/* ---- requests ---- */

static void take(const struct http_request *request) {
    static const char NOTHING[] = "{\"error\":{\"message\":\"a recording is shown here: there is / and /troupe/events\"}}\n";
    if (strcmp(request->method, "GET") != 0 && strcmp(request->method, "HEAD") != 0)
        answer(request->client, 405, "application/json", "Allow: GET, HEAD", NOTHING, sizeof NOTHING - 1, true);
    else if (strcmp(request->path, "/") == 0)
        answer(request->client, 200, "text/html; charset=utf-8", PAGE_SECURITY, page_html, page_html_bytes, true);
    else if (strcmp(request->path, "/troupe/events") == 0 && strcmp(request->method, "GET") == 0)
        join(request);
    else
        answer(request->client, 404, "application/json", NULL, NOTHING, sizeof NOTHING - 1, true);
}

static void take_all(void) {
    for (struct http_event *event; (event = http_receive(replay.http)) != NULL;) {
        for (uint32_t i = 0; event->gone && i < VIEWERS_MAX; i++)
            if (replay.viewer[i].client == event->request.client)
                replay.viewer[i].client = 0;
        if (!event->gone)
            take(&event->request);
        http_event_free(&event);
    }
}

static void loop(void) {
    while (!replay.stop) {
        uint32_t seen = bell_seen(&replay.bell);
        uint64_t due_ns = NEVER, now_ns;
        take_all();
        for (uint32_t i = 0; i < VIEWERS_MAX; i++) {
            uint64_t next_ns = replay.viewer[i].client != 0 ? advance(&replay.viewer[i]) : NEVER;
            due_ns = next_ns < due_ns ? next_ns : due_ns;
        }
        now_ns = clock_now_ns();
        uint64_t sleep_ns = due_ns <= now_ns ? 0 : due_ns - now_ns < 1000000000u ? due_ns - now_ns : 1000000000u;
        if (sleep_ns > 0)
            bell_wait(&replay.bell, seen, 1, sleep_ns, 0);
    }
}

int command_replay(const struct options *options) {
    struct failure failure;
    int socket = -1;
    if (options->positionals != 1) {
        fprintf(stderr, "usage: troupe replay FILE [--host ADDRESS] [--port N]\n");
        return 2;
    }
    int error = feed_reader_open(&replay.reader, options->positional[0], &failure);
    if (error == 0)
        error = http_listen(&socket, options->host, (uint16_t)options->port, &failure);
    if (error == 0)
        error = bell_create(&replay.bell, NULL, clock_random(), &failure);
    if (error == 0)
        error = http_open(&replay.http, socket, &replay.bell, &failure);
    if (error < 0) {
        fprintf(stderr, "troupe replay: %s\n", failure.text);
        feed_reader_close(&replay.reader);
        return EXIT_CONFIGURATION;
    }
    replay.range = feed_reader_range(replay.reader);
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    printf("%.1f s of a troupe at http://%s:%u/\nCtrl-C ends it\n",
           (double)(replay.range.to_ms - replay.range.from_ms) / 1e3, options->host, http_socket_port(socket));
    fflush(stdout);
    loop();
    http_close(&replay.http, 200);
    bell_close(&replay.bell);
    feed_reader_close(&replay.reader);
    return 0;
}
