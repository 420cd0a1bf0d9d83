/* The live view's page, web/index.html, as the build has put it into the binary (see the Makefile).
 */
#ifndef TROUPE_PAGE_H
#define TROUPE_PAGE_H

#include <stddef.h>

/* It loads nothing from anywhere, and a browser holds it to that. */
#define PAGE_SECURITY                                                                              \
    "Content-Security-Policy: default-src 'none'; script-src 'unsafe-inline'; "                    \
    "style-src 'unsafe-inline'; img-src data:; connect-src 'self'; frame-ancestors 'none'"

extern const char page_html[];
extern const size_t page_html_bytes;

#endif
