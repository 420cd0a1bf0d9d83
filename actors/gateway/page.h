/* The live view's page, web/index.html, as the build has put it into the binary (see the Makefile).
 */
#ifndef TROUPE_PAGE_H
#define TROUPE_PAGE_H

#include <stddef.h>

extern const char page_html[];
extern const size_t page_html_bytes;

#endif
