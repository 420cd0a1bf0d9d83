/* What has been lately: rows per (layer, expert) and the speed of each expert process, in windows that decay.
 * A window is an eighth of load_half_life_ms; at its end all that is remembered is multiplied by the eighth root
 * of a half, then what came in it is added. What came since then counts whole. So plans follow the traffic, and
 * a morning's load is forgotten by noon. A layer whose shares in a window are of another kind than what it
 * remembers (another domain of text) forgets at once.
 *
 * Totals come from heartbeats (statistics.c); a process that was started again begins at zero. */
#include "coordinator/coordinator.h"

#include <math.h>

#include "coordinator/trace.h"

#define WINDOWS_PER_HALF_LIFE 8u
#define DECAY                 0.91700404320467122 /* 2^(-1/8) */
#define WINDOWS_AT_ONCE       512u /* after so many nothing is left */
#define SPEED_ROWS_MIN        1000.0 /* fewer say nothing about a process */

static void roll(struct rolling *self) {
    self->recent = self->recent * DECAY + (double)(self->total - self->counted);
    self->counted = self->total;
}

static double rolling_now(const struct rolling *self) {
    return self->recent + (double)(self->total - self->counted);
}

/* A smaller total is a new life. */
static void rolling_set(struct rolling *self, uint64_t total) {
    if (total < self->counted)
        self->counted = 0;
    self->total = total;
}

/* Rows drawn at random from unchanged shares differ from them by about 0.4 x sqrt(experts / rows); rows of one
 * prompt are alike, so that real windows differ up to three times as much. */
static bool jumped(const double *past, const double *window, uint32_t experts) {
    double before = 0, now = 0, change = 0;
    for (uint32_t e = 0; e < experts; e++) {
        before += past[e];
        now += window[e];
    }
    if (before <= 0 || now <= 0)
        return false;
    for (uint32_t e = 0; e < experts; e++)
        change += fabs(window[e] / now - past[e] / before) / 2;
    return change > FORECAST_JUMP + 3 * 0.4 * sqrt(experts / now);
}

static void roll_layer(struct coordinator *self, uint32_t first) {
    double window[EXPERTS_MAX];
    for (uint32_t e = 0; e < self->config.experts; e++) {
        uint64_t total = statistics_load(self, first + e);
        window[e] = (double)(total - self->counted[first + e]);
        self->counted[first + e] = total;
    }
    double keep = jumped(&self->recent[first], window, self->config.experts) ? 0 : DECAY;
    for (uint32_t e = 0; e < self->config.experts; e++)
        self->recent[first + e] = self->recent[first + e] * keep + window[e];
}

static void roll_all(struct coordinator *self) {
    for (uint32_t first = 0; first < self->pairs; first += self->config.experts)
        roll_layer(self, first);
    for (uint32_t i = 0; i < self->seats; i++) {
        roll(&self->seat[i].rows);
        roll(&self->seat[i].busy_ns);
    }
}

void recent_timer(struct coordinator *self, uint64_t now_ns) {
    uint64_t window_ns =
        (uint64_t)self->settings.load_half_life_ms * 1000000u / WINDOWS_PER_HALF_LIFE;
    if (self->recent_at_ns == 0)
        self->recent_at_ns = now_ns + window_ns;
    for (uint32_t i = 0; now_ns >= self->recent_at_ns && i < WINDOWS_AT_ONCE; i++) {
        roll_all(self);
        self->recent_at_ns += window_ns;
    }
    if (now_ns >= self->recent_at_ns)
        self->recent_at_ns = now_ns + window_ns;
}

void recent_take(struct seat *seat, const Troupe__Heartbeat *heartbeat) {
    rolling_set(&seat->rows, heartbeat->rows);
    rolling_set(&seat->busy_ns, heartbeat->busy_ns);
}

double recent_load(const struct coordinator *self, uint32_t pair) {
    return self->recent[pair] + (double)(statistics_load(self, pair) - self->counted[pair]);
}

double recent_row_ns(const struct seat *seat) {
    double rows = rolling_now(&seat->rows);
    return rows >= SPEED_ROWS_MIN ? rolling_now(&seat->busy_ns) / rows : 0;
}
