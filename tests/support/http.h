/* A small HTTP/1.1 client for tests: many calls at once in one thread, streamed answers kept as they arrive, hang-ups on demand. */
#ifndef TROUPE_TEST_HTTP_H
#define TROUPE_TEST_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct http_call {
    const char *method, *path;
    const char *body;          /* NULL: none */
    size_t hang_up_after;      /* close once this many bytes of the answer have come; 0: never */
    uint32_t start_after_ms;   /* open the connection this long after http_run began */
    uint32_t start_before_ms;  /* not at all once so much has passed; 0: no limit */
    bool keep_times;           /* note when each piece of the answer came */
    /* answer */
    int status;                /* 0: no answer */
    char *text;                /* body, chunked coding removed, zero-terminated; owned, http_call_free */
    size_t text_bytes;
    bool complete;             /* the whole answer has come */
    uint64_t first_byte_ns, end_ns; /* since http_run began */
    uint64_t *time_ns;              /* [times] likewise, of each piece; owned */
    uint32_t times, times_capacity;
    bool skipped;                   /* its time to start had passed */
    /* private */
    int fd;
    int state;
    char *raw;
    size_t raw_bytes, raw_capacity, sent;
    char *request;
    size_t request_bytes;
};

/* Runs all calls, at most `parallel` open at a time, until each is answered, refused or `timeout_ms` has passed. */
void http_run(uint16_t port, struct http_call *calls, uint32_t count, uint32_t parallel,
              uint32_t timeout_ms);
void http_call_free(struct http_call *call);

/* One call; returns its status and gives its body (malloc'd) in ret_text if not NULL. */
int http_one(uint16_t port, const char *method, const char *path, const char *body, char **ret_text);

#endif
