/* Requests and their responses.
 *
 * States of a request, all changes in the HTTP thread:
 *
 *   READING    headers and body arrive; what goes over HTTP_BODY_MAX is read and thrown away, and
 *              answered by 413
 *
 *   POSTED     the actor has it; the connection is suspended
 *
 *   ANSWERING  the first STREAM has come; pieces are sent as they come, the connection is suspended
 *              whenever there are none
 *
 *   GONE       the client hung up, or took too little too slowly; whatever the actor still streams
 *              is thrown away
 *
 * A request leaves memory when libmicrohttpd says that it has completed. CLIENT_GONE is sent at
 * most once, only from POSTED or ANSWERING.
 *
 * Every connection is watched for hang-up from its first moment, beside libmicrohttpd: a suspended
 * one is read by nobody, and libmicrohttpd overlooks an end that arrives together with the last
 * bytes of an unfinished request, until the idle timeout. */
#include "actors/host/http.h"

#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/log.h"
#include "actors/host/thread.h"

#define BUCKETS          4096
#define UNSENT_MAX       (4u << 20) /* of a streamed response; the client is dropped beyond */
#define SWALLOW_MAX      (8u * HTTP_BODY_MAX) /* of a body that is too large anyway */
#define IDLE_TIMEOUT_S   120                  /* keep-alive connections without a request */
#define CONNECTION_BYTES (64u << 10)
#define URI_BYTES_MAX    (32u << 10)
#define RESERVED_FILES   64 /* descriptors kept for everything but connections */

/* A piece of a response: a STREAM effect on its way to the client. */
struct piece {
    struct piece *next;
    uint64_t client;
    uint16_t status;
    bool last;
    char content_type[96], extra_header[192];
    size_t size, sent;
    char bytes[];
};

/* A connection. Its address is what the watch knows it by. */
struct peer {
    int socket;
    bool hung_up;
    struct request *request; /* being read or answered; NULL between two */
};

struct request {
    struct request *next; /* in its bucket */
    struct http *http;
    uint64_t client;
    struct MHD_Connection *connection;
    struct peer *peer;
    char *uri;
    char *body;
    size_t body_bytes, body_capacity, swallowed;
    bool headers_seen, posted, suspended, gone, complete;
    struct piece *first,
        **last; /* pieces not yet sent; the first piece of all carries the status */
    size_t unsent;
};

struct http {
    struct MHD_Daemon *daemon;
    struct bell *bell;
    pthread_t thread;
    int poll_file, watch_file, wake_file;
    uint64_t next_client;
    struct request *bucket[BUCKETS];
    uint32_t requests, posted;
    struct log_limit limit;
    pthread_mutex_t mutex; /* of everything below */
    struct event_item *first_event, **last_event;
    struct piece *first_piece, **last_piece;
    bool stop;
    uint32_t drain_ms;
};

struct event_item {
    struct event_item *next;
    struct http_event *event;
};

void http_event_free(struct http_event **self) {
    if (*self == NULL)
        return;
    free((*self)->memory);
    free((*self)->body);
    free(*self);
    *self = NULL;
}

/* ---- to the actor ---- */

static void post_event(struct http *self, struct http_event *event) {
    struct event_item *item = malloc(sizeof *item);
    ASSERT(item != NULL);
    *item = (struct event_item){NULL, event};
    pthread_mutex_lock(&self->mutex);
    *self->last_event = item;
    self->last_event = &item->next;
    pthread_mutex_unlock(&self->mutex);
    bell_ring(self->bell);
}

static void post_gone(struct request *request) {
    struct http_event *event = calloc(1, sizeof *event);
    ASSERT(event != NULL);
    event->gone = true;
    event->request.client = request->client;
    post_event(request->http, event);
}

static const char *copy_text(char **at, const char *text) {
    if (text == NULL)
        return NULL;
    char *copy = *at;
    size_t size = strlen(text) + 1;
    memcpy(copy, text, size);
    *at += size;
    return copy;
}

static size_t text_bytes(const char *text) {
    return text != NULL ? strlen(text) + 1 : 0;
}

static void post_request(struct request *request, const char *method) {
    const char *authorization =
        MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, "Authorization");
    const char *id =
        MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, "X-Request-Id");
    const char *resume =
        MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, "X-Stream-Resume");
    const char *traceparent =
        MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, "traceparent");
    const char *trace =
        MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, "X-Troupe-Trace");
    const char *last =
        MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, "Last-Event-ID");
    struct http_event *event = calloc(1, sizeof *event);
    char *at = malloc(text_bytes(method) + text_bytes(request->uri) + 1 +
                      text_bytes(authorization) + text_bytes(id) + text_bytes(resume) +
                      text_bytes(last) + text_bytes(traceparent) + text_bytes(trace));
    ASSERT(event != NULL && at != NULL);
    event->memory = at;
    event->request.client = request->client;
    event->request.method = copy_text(&at, method);
    char *path = (char *)copy_text(&at, request->uri), *query = strchr(path, '?');
    if (query != NULL)
        *query++ = 0;
    event->request.path = path;
    event->request.query = query != NULL ? query : "";
    event->request.authorization = copy_text(&at, authorization);
    event->request.request_id = copy_text(&at, id);
    event->request.stream_resume = copy_text(&at, resume);
    event->request.last_event_id = copy_text(&at, last);
    event->request.traceparent = copy_text(&at, traceparent);
    event->request.trace = copy_text(&at, trace);
    event->body = request->body;
    event->request.body = request->body != NULL ? request->body : "";
    event->request.body_bytes = request->body_bytes;
    request->body = NULL;
    post_event(request->http, event);
}

struct http_event *http_receive(struct http *self) {
    pthread_mutex_lock(&self->mutex);
    struct event_item *item = self->first_event;
    if (item != NULL) {
        self->first_event = item->next;
        if (item->next == NULL)
            self->last_event = &self->first_event;
    }
    pthread_mutex_unlock(&self->mutex);
    struct http_event *event = item != NULL ? item->event : NULL;
    free(item);
    return event;
}

void http_stream(struct http *self, const struct effect *effect) {
    size_t size = effect->stream.size;
    struct piece *piece = malloc(sizeof *piece + size);
    ASSERT(piece != NULL);
    *piece = (struct piece){.client = effect->stream.client,
                            .status = effect->stream.status,
                            .last = effect->stream.last,
                            .size = size};
    if (effect->stream.content_type != NULL)
        snprintf(piece->content_type, sizeof piece->content_type, "%s",
                 effect->stream.content_type);
    if (effect->stream.extra_header != NULL)
        snprintf(piece->extra_header, sizeof piece->extra_header, "%s",
                 effect->stream.extra_header);
    if (size > 0)
        memcpy(piece->bytes, effect->stream.bytes, size);
    pthread_mutex_lock(&self->mutex);
    bool wake = self->first_piece == NULL;
    *self->last_piece = piece;
    self->last_piece = &piece->next;
    pthread_mutex_unlock(&self->mutex);
    uint64_t one = 1;
    if (wake && write(self->wake_file, &one, sizeof one) < 0)
        log_limited(&self->limit, TRACE_ERROR, "eventfd: %s", strerror(errno));
}

/* ---- requests ---- */

static struct request *find(struct http *self, uint64_t client) {
    struct request *request = self->bucket[client % BUCKETS];
    while (request != NULL && request->client != client)
        request = request->next;
    return request;
}

static void drop_pieces(struct request *request) {
    while (request->first != NULL) {
        struct piece *piece = request->first;
        request->first = piece->next;
        free(piece);
    }
    request->last = &request->first;
    request->unsent = 0;
}

static void resume(struct request *request) {
    if (request->suspended) {
        request->suspended = false;
        MHD_resume_connection(request->connection);
    }
}

/* The client is lost to us: the actor hears of it once, and libmicrohttpd ends the connection. */
static void give_up(struct request *request) {
    if (request->gone)
        return;
    request->gone = true;
    if (request->posted)
        post_gone(request);
    drop_pieces(request);
    shutdown(request->peer->socket, SHUT_RDWR); /* also when it is stuck in a send */
    resume(request);
}

/* The whole URI is known before anything else of a request: its context begins here. */
static void *begin_request(void *context, const char *uri, struct MHD_Connection *connection) {
    struct http *self = context;
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    struct request *request = calloc(1, sizeof *request);
    if (request == NULL || info == NULL || info->socket_context == NULL) {
        free(request);
        return NULL;
    }
    request->http = self;
    request->client = ++self->next_client;
    request->connection = connection;
    request->peer = info->socket_context;
    request->peer->request = request;
    request->uri = strndup(uri, URI_BYTES_MAX);
    request->last = &request->first;
    request->next = self->bucket[request->client % BUCKETS];
    self->bucket[request->client % BUCKETS] = request;
    self->requests++;
    return request;
}

static void end_request(void *context, struct MHD_Connection *connection, void **con_cls,
                        enum MHD_RequestTerminationCode code) {
    struct http *self = context;
    struct request *request = *con_cls;
    (void)connection;
    if (request == NULL)
        return;
    *con_cls = NULL;
    request->peer->request = NULL;
    if (request->posted) {
        self->posted--;
        if (!request->gone && (code != MHD_REQUEST_TERMINATED_COMPLETED_OK || !request->complete))
            post_gone(request);
    }
    struct request **at = &self->bucket[request->client % BUCKETS];
    while (*at != request)
        at = &(*at)->next;
    *at = request->next;
    self->requests--;
    drop_pieces(request);
    free(request->uri);
    free(request->body);
    free(request);
}

static bool take_body(struct request *request, const char *bytes, size_t size) {
    if (request->swallowed > 0 || size > HTTP_BODY_MAX - request->body_bytes) {
        request->swallowed += size;
        return request->swallowed <= SWALLOW_MAX;
    }
    if (request->body_bytes + size + 1 > request->body_capacity) {
        size_t capacity = 2 * (request->body_bytes + size) + 1024;
        char *larger = realloc(request->body, capacity);
        if (larger == NULL)
            return false;
        request->body = larger;
        request->body_capacity = capacity;
    }
    memcpy(request->body + request->body_bytes, bytes, size);
    request->body_bytes += size;
    request->body[request->body_bytes] = 0;
    return true;
}

static enum MHD_Result refuse_body(struct request *request) {
    char text[256];
    snprintf(text, sizeof text,
             "{\"error\":{\"message\":\"The request body is over the limit of %u bytes\","
             "\"type\":\"RequestTooLargeError\",\"param\":null,\"code\":413}}",
             HTTP_BODY_MAX);
    struct MHD_Response *response =
        MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_COPY);
    MHD_add_response_header(response, "Content-Type", "application/json");
    MHD_add_response_header(response, "Connection", "close");
    enum MHD_Result result = MHD_queue_response(request->connection, 413, response);
    MHD_destroy_response(response);
    return result;
}

/* ---- responses ---- */

static ssize_t read_pieces(void *context, uint64_t position, char *buffer, size_t room) {
    struct request *request = context;
    size_t written = 0;
    (void)position;
    if (request->gone)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    while (request->first != NULL && written < room) {
        struct piece *piece = request->first;
        size_t left = piece->size - piece->sent,
               take = left < room - written ? left : room - written;
        memcpy(buffer + written, piece->bytes + piece->sent, take);
        piece->sent += take;
        written += take;
        request->unsent -= take;
        if (piece->sent < piece->size)
            break;
        request->first = piece->next;
        if (request->first == NULL)
            request->last = &request->first;
        free(piece);
    }
    if (written > 0)
        return (ssize_t)written;
    if (request->complete)
        return MHD_CONTENT_READER_END_OF_STREAM;
    request->suspended = true;
    MHD_suspend_connection(request->connection);
    return 0;
}

static void add_headers(struct MHD_Response *response, const struct piece *first) {
    if (first->content_type[0] != 0)
        MHD_add_response_header(response, "Content-Type", first->content_type);
    const char *colon = strchr(first->extra_header, ':');
    if (colon != NULL) {
        char name[sizeof first->extra_header];
        snprintf(name, sizeof name, "%.*s", (int)(colon - first->extra_header),
                 first->extra_header);
        const char *value = colon + 1;
        while (*value == ' ')
            value++;
        MHD_add_response_header(response, name, value);
    }
}

/* The first piece has come: a whole response if it is the last one too, else a chunked one. */
static enum MHD_Result queue_response(struct request *request) {
    struct piece *first = request->first;
    struct MHD_Response *response;
    unsigned status = first->status != 0 ? first->status : 500;
    if (first->last)
        response =
            MHD_create_response_from_buffer(first->size, first->bytes, MHD_RESPMEM_MUST_COPY);
    else
        response =
            MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 32768, read_pieces, request, NULL);
    if (response == NULL)
        return MHD_NO;
    add_headers(response, first);
    if (first->last)
        drop_pieces(request);
    else
        MHD_add_response_header(response, "X-Accel-Buffering",
                                "no"); /* proxies must pass chunks on */
    enum MHD_Result result = MHD_queue_response(request->connection, status, response);
    MHD_destroy_response(response);
    return result;
}

/* Called at the end of the headers, for each part of the body, at its end, and again after each
 * resume until a response is queued. */
static enum MHD_Result handle(void *context, struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, const char *upload,
                              size_t *upload_bytes, void **con_cls) {
    struct request *request = *con_cls;
    (void)context, (void)connection, (void)url, (void)version;
    if (request == NULL || request->uri == NULL || request->gone)
        return MHD_NO;
    if (request->peer->hung_up && !request->posted)
        return MHD_NO; /* nobody would take the answer */
    if (request->posted) {
        if (request->first != NULL)
            return queue_response(request);
        request->suspended = true; /* resumed for nothing: wait on */
        MHD_suspend_connection(connection);
        return MHD_YES;
    }
    if (*upload_bytes > 0) {
        bool taken = take_body(request, upload, *upload_bytes);
        *upload_bytes = 0;
        return taken ? MHD_YES : MHD_NO;
    }
    if (!request->headers_seen) { /* first call: headers only */
        request->headers_seen = true;
        return MHD_YES;
    }
    if (request->swallowed > 0)
        return refuse_body(request);
    request->posted = true;
    request->http->posted++;
    post_request(request, method);
    request->suspended = true;
    MHD_suspend_connection(connection);
    return MHD_YES;
}

static void take_piece(struct http *self, struct piece *piece) {
    struct request *request = find(self, piece->client);
    if (request == NULL || request->gone || request->complete) {
        free(piece);
        return;
    }
    piece->next = NULL;
    *request->last = piece;
    request->last = &piece->next;
    request->unsent += piece->size;
    request->complete = piece->last;
    if (request->unsent > UNSENT_MAX && request->unsent > piece->size) {
        log_limited(&self->limit, TRACE_WARNING,
                    "client %llu takes its answer too slowly and was dropped",
                    (unsigned long long)request->client);
        give_up(request);
        return;
    }
    resume(request);
}

static void take_all_pieces(struct http *self) {
    uint64_t count;
    if (read(self->wake_file, &count, sizeof count) < 0 && errno != EAGAIN)
        log_limited(&self->limit, TRACE_ERROR, "eventfd: %s", strerror(errno));
    pthread_mutex_lock(&self->mutex);
    struct piece *piece = self->first_piece;
    self->first_piece = NULL;
    self->last_piece = &self->first_piece;
    pthread_mutex_unlock(&self->mutex);
    while (piece != NULL) {
        struct piece *next = piece->next;
        take_piece(self, piece);
        piece = next;
    }
}

/* The sockets are still open here: libmicrohttpd closes them in MHD_run only. */
static void take_hang_ups(struct http *self) {
    struct epoll_event events[64];
    int count = epoll_wait(self->watch_file, events, 64, 0);
    for (int i = 0; i < count; i++) {
        struct peer *peer = events[i].data.ptr;
        struct request *request = peer->request;
        epoll_ctl(self->watch_file, EPOLL_CTL_DEL, peer->socket, NULL);
        peer->hung_up = true;
        if (request == NULL || !request->posted)
            shutdown(peer->socket, SHUT_RDWR); /* libmicrohttpd sees an end and cleans up */
        else if (!request->complete)
            give_up(request);
    }
}

/* ---- the thread ---- */

static bool stopping(struct http *self) {
    pthread_mutex_lock(&self->mutex);
    bool stop = self->stop;
    pthread_mutex_unlock(&self->mutex);
    return stop;
}

static void turn(struct http *self, int timeout_ms) {
    MHD_UNSIGNED_LONG_LONG due;
    if (MHD_get_timeout(self->daemon, &due) == MHD_YES &&
        (timeout_ms < 0 || due < (unsigned)timeout_ms))
        timeout_ms = (int)due;
    struct pollfd files[] = {{.fd = self->poll_file, .events = POLLIN},
                             {.fd = self->wake_file, .events = POLLIN},
                             {.fd = self->watch_file, .events = POLLIN}};
    if (poll(files, 3, timeout_ms) < 0 && errno != EINTR)
        log_limited(&self->limit, TRACE_ERROR, "poll: %s", strerror(errno));
    if (files[1].revents != 0)
        take_all_pieces(self);
    if (files[2].revents != 0)
        take_hang_ups(self);
    MHD_run(self->daemon);
}

/* Complete answers are still sent; then whoever waits is cut off, because the daemon may not be
 * stopped with suspended connections. */
static void drain(struct http *self) {
    uint64_t until = clock_now_ns() + (uint64_t)self->drain_ms * 1000000u;
    MHD_socket listening = MHD_quiesce_daemon(self->daemon);
    take_all_pieces(self);
    while (self->requests > 0 && clock_now_ns() < until) {
        bool waits = false;
        for (size_t i = 0; i < BUCKETS; i++) {
            for (struct request *request = self->bucket[i]; request != NULL;
                 request = request->next)
                waits |= request->complete;
        }
        if (!waits)
            break;
        turn(self, 10);
    }
    for (size_t i = 0; i < BUCKETS; i++) {
        for (struct request *request = self->bucket[i]; request != NULL; request = request->next)
            give_up(request);
    }
    for (int i = 0; i < 100 && self->requests > 0; i++)
        turn(self, 10);
    MHD_stop_daemon(self->daemon);
    if (listening != MHD_INVALID_SOCKET)
        close(listening);
}

static void *run(void *argument) {
    struct http *self = argument;
    while (!stopping(self))
        turn(self, -1);
    drain(self);
    return NULL;
}

static void begin_connection(struct http *self, struct MHD_Connection *connection,
                             void **socket_context) {
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    struct peer *peer = calloc(1, sizeof *peer);
    int one = 1, idle_s = 60;
    if (peer == NULL || info == NULL) {
        free(peer);
        return; /* begin_request refuses what comes */
    }
    peer->socket = info->connect_fd;
    setsockopt(peer->socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(peer->socket, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    setsockopt(peer->socket, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    struct epoll_event event = {.events = EPOLLRDHUP, .data.ptr = peer};
    epoll_ctl(self->watch_file, EPOLL_CTL_ADD, peer->socket, &event);
    *socket_context = peer;
}

static void connection_changed(void *context, struct MHD_Connection *connection,
                               void **socket_context, enum MHD_ConnectionNotificationCode code) {
    struct http *self = context;
    struct peer *peer = *socket_context;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        begin_connection(self, connection, socket_context);
    } else if (peer != NULL) {
        if (!peer->hung_up)
            epoll_ctl(self->watch_file, EPOLL_CTL_DEL, peer->socket, NULL);
        free(peer);
        *socket_context = NULL;
    }
}

static void log_daemon(void *context, const char *format, va_list arguments) {
    char text[512];
    struct http *self = context;
    vsnprintf(text, sizeof text, format, arguments);
    log_limited(&self->limit, TRACE_DEBUG, "http: %s", text);
}

static unsigned connections_max(void) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur == RLIM_INFINITY ||
        files.rlim_cur >= HTTP_CONNECTIONS_MAX + RESERVED_FILES)
        return HTTP_CONNECTIONS_MAX;
    return files.rlim_cur > 2 * RESERVED_FILES ? (unsigned)files.rlim_cur - RESERVED_FILES
                                               : RESERVED_FILES;
}

static struct MHD_Daemon *start_daemon(struct http *self, int socket) {
    return MHD_start_daemon(
        MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, handle, self,
        MHD_OPTION_EXTERNAL_LOGGER, log_daemon, self, MHD_OPTION_LISTEN_SOCKET, (MHD_socket)socket,
        MHD_OPTION_CONNECTION_LIMIT, connections_max(), MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)IDLE_TIMEOUT_S, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONNECTION_BYTES,
        MHD_OPTION_URI_LOG_CALLBACK, begin_request, self, MHD_OPTION_NOTIFY_COMPLETED, end_request,
        self, MHD_OPTION_NOTIFY_CONNECTION, connection_changed, self, MHD_OPTION_END);
}

static void http_free(struct http *self) {
    for (struct http_event *event; (event = http_receive(self)) != NULL;)
        http_event_free(&event);
    while (self->first_piece != NULL) {
        struct piece *piece = self->first_piece;
        self->first_piece = piece->next;
        free(piece);
    }
    if (self->wake_file >= 0)
        close(self->wake_file);
    if (self->watch_file >= 0)
        close(self->watch_file);
    pthread_mutex_destroy(&self->mutex);
    free(self);
}

int http_open(struct http **ret, int socket, struct bell *bell, struct failure *failure) {
    return http_open_from(ret, socket, 0, bell, failure);
}

int http_open_from(struct http **ret, int socket, uint64_t first_client, struct bell *bell,
                   struct failure *failure) {
    struct http *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for HTTP");
    self->bell = bell;
    self->next_client = first_client;
    self->last_event = &self->first_event;
    self->last_piece = &self->first_piece;
    self->wake_file = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    self->watch_file = epoll_create1(EPOLL_CLOEXEC);
    pthread_mutex_init(&self->mutex, NULL);
    int error = 0;
    if (self->wake_file < 0 || self->watch_file < 0)
        error = fail(failure, ERR_NO_MEMORY, "no descriptors for HTTP: %s", strerror(errno));
    else if ((self->daemon = start_daemon(self, socket)) == NULL)
        error = fail(failure, ERR_IO, "the HTTP server did not start");
    if (error == 0) {
        self->poll_file = MHD_get_daemon_info(self->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
        error = thread_start(&self->thread, "http", run, self, failure);
        if (error < 0)
            MHD_stop_daemon(self->daemon);
    }
    if (error < 0) {
        http_free(self);
        return error;
    }
    *ret = self;
    return 0;
}

void http_close(struct http **http, uint32_t drain_ms) {
    struct http *self = *http;
    if (self == NULL)
        return;
    pthread_mutex_lock(&self->mutex);
    self->stop = true;
    self->drain_ms = drain_ms;
    pthread_mutex_unlock(&self->mutex);
    uint64_t one = 1;
    while (write(self->wake_file, &one, sizeof one) < 0 && errno == EINTR)
        continue;
    pthread_join(self->thread, NULL);
    http_free(self);
    *http = NULL;
}

/* ---- listening ---- */

int http_listen_unix(int *ret_socket, const char *path, struct failure *failure) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return fail(failure, ERR_TOO_LARGE, "the path %s is too long for a socket: at most %zu bytes",
                    path, sizeof address.sun_path - 1);
    strcpy(address.sun_path, path);
    int file = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unlink(path);
    mode_t before = umask(0177);
    bool bound = file >= 0 && bind(file, (struct sockaddr *)&address, sizeof address) == 0;
    umask(before);
    if (!bound || listen(file, 64) != 0) {
        fail(failure, ERR_IO, "cannot listen at %s: %s", path, strerror(errno));
        if (file >= 0)
            close(file);
        return ERR_IO;
    }
    *ret_socket = file;
    return 0;
}

uint16_t http_socket_port(int socket) {
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    if (getsockname(socket, (struct sockaddr *)&address, &size) != 0)
        return 0;
    return ntohs(address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                               : ((struct sockaddr_in *)&address)->sin_port);
}

static int listen_at(const struct addrinfo *where) {
    int file = socket(where->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;
    if (file < 0)
        return -1;
    setsockopt(file, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(file, where->ai_addr, where->ai_addrlen) == 0 && listen(file, 1024) == 0)
        return file;
    int error = errno;
    close(file);
    errno = error;
    return -1;
}

int http_listen(int *ret_socket, const char *host, uint16_t port, struct failure *failure) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *list;
    char service[8];
    snprintf(service, sizeof service, "%u", port);
    int error = getaddrinfo(host, service, &hints, &list);
    if (error != 0)
        return fail(failure, ERR_INVALID, "--host: '%s' is no address to listen on: %s", host,
                    gai_strerror(error));
    int file = -1;
    errno = 0;
    for (const struct addrinfo *at = list; at != NULL && file < 0; at = at->ai_next)
        file = listen_at(at);
    int code = errno;
    freeaddrinfo(list);
    if (file >= 0) {
        *ret_socket = file;
        return 0;
    }
    if (code == EADDRINUSE)
        return fail(
            failure, ERR_EXISTS,
            "port %u of %s is in use: stop what listens there or choose another with --port", port,
            host);
    return fail(failure, ERR_IO, "cannot listen on port %u of %s: %s", port, host, strerror(code));
}
