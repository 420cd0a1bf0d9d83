/* See plot.h. */
#include "tests/support/plot.h"

#define WIDTH   760
#define LEFT    44
#define RIGHT   12
#define TOP     34
#define HEIGHT  130 /* of a panel's plot */
#define SPACING 48

static double x_of(const struct plot *self, double point) {
    return LEFT + (WIDTH - LEFT - RIGHT) * (point + 0.5) / self->points;
}

static double base(const struct plot *self) {
    return TOP + (self->panel - 1) * (HEIGHT + SPACING) + SPACING / 2.0;
}

static double y_of(const struct plot *self, double value) {
    return base(self) + HEIGHT * (1 - value);
}

void plot_begin(struct plot *self, FILE *file, uint32_t panels, uint32_t points,
                const char *title) {
    *self = (struct plot){file, panels, points, 0};
    fprintf(file,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" "
            "font-size=\"12\">\n"
            "<style>.bg{fill:#fff}.t{fill:#333}.g{stroke:#ddd}.s{stroke:#999;stroke-dasharray:3 3}"
            ".l{fill:none;stroke:#6a9fd8;stroke-width:1;opacity:.6}.m{fill:none;stroke:#1f4e8c;stroke-width:2.5}\n"
            "@media (prefers-color-scheme:dark){.bg{fill:#161616}.t{fill:#ddd}.g{stroke:#333}.m{stroke:#9cc5ff}}"
            "</style>\n<rect class=\"bg\" width=\"100%%\" height=\"100%%\"/>\n"
            "<text class=\"t\" x=\"%d\" y=\"20\">%s</text>\n",
            WIDTH, (int)(TOP + panels * (HEIGHT + SPACING) + 8), LEFT, title);
}

static void draw_line(const struct plot *self, const char *class, const double *value) {
    fprintf(self->file, "<polyline class=\"%s\" points=\"", class);
    for (uint32_t i = 0; i < self->points; i++)
        fprintf(self->file, "%.0f,%.1f ", x_of(self, i), y_of(self, value[i]));
    fprintf(self->file, "\"/>\n");
}

void plot_panel(struct plot *self, const char *title, const double *value, uint32_t lines) {
    double mean[4096] = {0};
    self->panel++;
    fprintf(self->file, "<text class=\"t\" x=\"%d\" y=\"%.0f\" font-weight=\"bold\">%s</text>\n", LEFT,
            base(self) - 6, title);
    for (int tick = 0; tick <= 4; tick++) {
        double y = y_of(self, tick / 4.0);
        fprintf(self->file,
                "<line class=\"g\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/>"
                "<text class=\"t\" x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.2f</text>\n",
                LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, tick / 4.0);
    }
    for (uint32_t l = 0; l < lines; l++) {
        draw_line(self, "l", value + (size_t)l * self->points);
        for (uint32_t i = 0; i < self->points && i < 4096; i++)
            mean[i] += value[(size_t)l * self->points + i] / lines;
    }
    draw_line(self, "m", mean);
}

void plot_section(struct plot *self, const char *name, uint32_t first, uint32_t last) {
    double x = x_of(self, first - 0.5);
    if (first > 0)
        fprintf(self->file, "<line class=\"s\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.0f\" y2=\"%.0f\"/>\n", x, x,
                base(self), base(self) + HEIGHT);
    fprintf(self->file, "<text class=\"t\" x=\"%.1f\" y=\"%.0f\" text-anchor=\"middle\">%s</text>\n",
            (x + x_of(self, last - 0.5)) / 2, base(self) + HEIGHT + 14, name);
}

void plot_end(struct plot *self) {
    fprintf(self->file, "</svg>\n");
}
