/* Error bodies of the HTTP front, one table of statuses. */
#include "actors/gateway/http_error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct {
    uint16_t status;
    const char *type;
} TYPES[] = {
    {400, "BadRequestError"},       {401, "AuthenticationError"},  {404, "NotFoundError"},
    {405, "MethodNotAllowedError"}, {410, "GoneError"}, {413, "RequestTooLargeError"}, {429, "RateLimitError"},
    {500, "InternalServerError"},   {501, "NotImplementedError"},  {503, "ServiceUnavailableError"},
};

const char *http_error_type(uint16_t status) {
    for (size_t i = 0; i < sizeof TYPES / sizeof TYPES[0]; i++)
        if (TYPES[i].status == status)
            return TYPES[i].type;
    return status < 500 ? "BadRequestError" : "InternalServerError";
}

int http_fail(struct http_error *self, uint16_t status, const char *param, const char *format,
              ...) {
    memset(self, 0, sizeof *self);
    self->status = status;
    self->param = param;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(self->message, sizeof self->message, format, arguments);
    va_end(arguments);
    return ERR_INVALID;
}

void http_error_write(struct text *out, const struct http_error *error) {
    text_puts(out, "{\"error\":{\"message\":");
    text_json_string(out, error->message);
    text_puts(out, ",\"type\":");
    text_json_string(out, http_error_type(error->status));
    text_puts(out, ",\"param\":");
    if (error->param != NULL)
        text_json_string(out, error->param);
    else
        text_puts(out, "null");
    text_format(out, ",\"code\":%u}}", error->status);
}
