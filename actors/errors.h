/* Operating errors: negative codes from errors.def and a message that says what was expected, what was
 * found and what to do. Bugs are assertions (ASSERT), which stay on in every build. */
#ifndef TROUPE_ERRORS_H
#define TROUPE_ERRORS_H

#include <stddef.h>

enum error_code {
#define X(name, code, text) ERR_##name = code,
#include "actors/errors.def"
#undef X
};

#define FAILURE_TEXT_BYTES 512

/* Filled by the function that fails; untouched on success. */
struct failure {
    int code;
    char text[FAILURE_TEXT_BYTES];
};

/* Writes code and formatted text into `failure` (NULL allowed) and returns `code`. */
int fail(struct failure *failure, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* "invalid input" for ERR_INVALID; never NULL. */
const char *error_name(int code);

/* Prints the broken assumption and aborts. The only function outside `main` that ends the process. */
_Noreturn void assert_failed(const char *expression, const char *file, int line);

#define ASSERT(expression) \
    ((expression) ? (void)0 : assert_failed(#expression, __FILE__, __LINE__))

#endif
