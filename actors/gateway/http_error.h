/* What an HTTP client is told when something is wrong: {"error": {"message", "type", "param",
 * "code"}}. */
#ifndef TROUPE_HTTP_ERROR_H
#define TROUPE_HTTP_ERROR_H

#include <stdint.h>

#include "actors/errors.h"
#include "actors/gateway/json_text.h"

struct http_error {
    uint16_t status;
    uint16_t retry_after_s;           /* 0: no Retry-After header */
    const char *param;                /* static string: the field at fault; NULL if none */
    const char *allow;                /* 405: methods that the path knows, "Allow: ..." */
    char message[FAILURE_TEXT_BYTES]; /* what was expected and found */
};

/* Fills the error and returns ERR_INVALID, so that parsers can `return http_fail(...)`. */
int http_fail(struct http_error *self, uint16_t status, const char *param, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* "BadRequestError" for 400: the names that vLLM and the official clients use. */
const char *http_error_type(uint16_t status);
void http_error_write(struct text *out, const struct http_error *error);

#endif
