/* A small SVG: panels one under the other with the same x axis, values 0..1, thin lines and their mean. Light and dark. */
#ifndef TROUPE_TEST_PLOT_H
#define TROUPE_TEST_PLOT_H

#include <stdint.h>
#include <stdio.h>

struct plot {
    FILE *file;
    uint32_t panels, points, panel; /* panel: the last one begun, from 1 */
};

void plot_begin(struct plot *self, FILE *file, uint32_t panels, uint32_t points, const char *title);
/* value: [lines * points] */
void plot_panel(struct plot *self, const char *title, const double *value, uint32_t lines);
/* Names the points from `first` to before `last`, in the panel begun last. */
void plot_section(struct plot *self, const char *name, uint32_t first, uint32_t last);
void plot_end(struct plot *self);

#endif
