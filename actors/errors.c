/* Error texts and the assertion that stays on. */
#include "actors/errors.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

int fail(struct failure *failure, int code, const char *format, ...) {
    ASSERT(code < 0);
    if (failure != NULL) {
        va_list arguments;
        va_start(arguments, format);
        failure->code = code;
        vsnprintf(failure->text, sizeof failure->text, format, arguments);
        va_end(arguments);
    }
    return code;
}

const char *error_name(int code) {
    switch (code) {
#define X(name, value, text) \
    case value: \
        return text;
#include "actors/errors.def"
#undef X
    default:
        return "unknown error";
    }
}

_Noreturn void assert_failed(const char *expression, const char *file, int line) {
    fprintf(stderr, "troupe: bug: %s:%d: assertion failed: %s\n", file, line, expression);
    abort();
}
