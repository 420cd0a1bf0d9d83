/* Loads over time and what is made of them. Between two changes (of a placement in use, of the window of the trace, of who lives and who
 * loads) everything is constant, so figures are sums over such stretches; nothing is sampled. */
#include "simulator/cluster_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SECOND_NS 1e9

bool measure_open(struct cluster_sim *self) {
    self->rate = calloc((size_t)self->pairs, sizeof *self->rate);
    self->routed = calloc((size_t)self->pairs, sizeof *self->routed);
    self->state = calloc(self->experts, sizeof *self->state);
    self->layer_of = calloc(self->pairs, sizeof *self->layer_of);
    self->expert_of = calloc(self->pairs, sizeof *self->expert_of);
    for (uint32_t pair = 0; self->layer_of != NULL && self->expert_of != NULL && pair < self->pairs;
         pair++) {
        self->layer_of[pair] = pair / self->config.experts;
        self->expert_of[pair] = pair % self->config.experts;
    }
    self->report.windows = self->task->trace->windows;
    self->report.window = calloc(self->report.windows, sizeof *self->report.window);
    return self->rate != NULL && self->routed != NULL && self->state != NULL &&
           self->layer_of != NULL && self->expert_of != NULL &&
           self->report.window != NULL &&
           cost_open(&self->cost, self->config.layers, self->config.experts, self->experts,
                     self->task->slowdown);
}

void measure_close(struct cluster_sim *self) {
    cost_close(&self->cost);
    free(self->rate);
    free(self->routed);
    free(self->state);
    free(self->layer_of);
    free(self->expert_of);
    free(self->report.window);
}

struct cluster_figures *measure_figures(struct cluster_sim *self) {
    return self->begin_ns != NEVER ? &self->report.window[self->window] : NULL;
}

static double since_s(const struct cluster_sim *self) {
    return self->begin_ns != NEVER ? (double)(self->now_ns - self->since_ns) / SECOND_NS : 0;
}

void measure_routed(const struct cluster_sim *self, double share, uint64_t *ret) {
    double seconds = since_s(self);
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        ret[pair] = (uint64_t)((self->routed[pair] + self->rate[pair] * seconds) * share);
}

double measure_rows(const struct cluster_sim *self, uint32_t process) {
    return self->process[process].rows + cost_rows(&self->cost, process) * since_s(self);
}

/* Attention actors share the load evenly; those with the same placement are taken together. */
static void recompute(struct cluster_sim *self) {
    uint32_t first = self->experts, last = first + self->task->attention, users = 0;
    for (uint32_t i = first; i < last; i++)
        users += self->process[i].placement != NULL;
    cost_clear(&self->cost);
    for (uint32_t i = first; i < last; i++) {
        const struct placement *placement = self->process[i].placement;
        uint32_t same = 0;
        bool seen = placement == NULL;
        for (uint32_t j = first; j < last; j++) {
            seen = seen || (j < i && self->process[j].placement == placement);
            same += self->process[j].placement == placement;
        }
        if (!seen)
            cost_add(&self->cost, &placement->copies, self->rate, (double)same / users, self->state);
    }
    self->balance = cost_balance(&self->cost, self->state);
    self->dirty = false;
}

void measure_advance(struct cluster_sim *self) {
    struct cluster_figures *figures = measure_figures(self);
    if (figures == NULL || self->now_ns == self->last_ns)
        return;
    if (self->dirty)
        recompute(self);
    double seconds = (double)(self->now_ns - self->last_ns) / SECOND_NS;
    self->last_ns = self->now_ns;
    figures->mean += self->balance.mean * seconds;
    figures->worst += self->balance.worst * seconds;
    figures->stall += self->balance.stall * seconds;
    figures->lowest = self->balance.worst < figures->lowest ? self->balance.worst : figures->lowest;
    if (self->cost.total > 0)
        figures->unserved_s += self->cost.unserved / self->cost.total * seconds;
}

/* Rows so far are added up, as rates will be others. */
void measure_change(struct cluster_sim *self) {
    measure_advance(self);
    if (self->begin_ns == NEVER)
        return;
    double seconds = since_s(self);
    if (seconds > 0) {
        for (uint32_t p = 0; p < self->experts; p++)
            self->process[p].rows += cost_rows(&self->cost, p) * seconds;
        for (uint32_t pair = 0; pair < self->pairs; pair++)
            self->routed[pair] += self->rate[pair] * seconds;
    }
    self->since_ns = self->now_ns;
    self->dirty = true;
}

void measure_loading(struct cluster_sim *self) {
    if (self->begin_ns != NEVER && !self->dirty)
        self->balance = cost_balance(&self->cost, self->state);
}

void measure_window(struct cluster_sim *self, uint32_t window) {
    const struct cluster_task *task = self->task;
    const double *load = trace_window(task->trace, window);
    measure_change(self);
    self->window = window;
    self->report.window[window].lowest = 1;
    self->report.window[window].placed = self->placed;
    for (uint32_t l = 0; l < self->config.layers; l++) {
        double total = 0, rows_s = task->tokens_s * task->experts_per_token;
        for (uint32_t e = 0; e < self->config.experts; e++)
            total += load[l * self->config.experts + e];
        for (uint32_t e = 0; e < self->config.experts; e++) {
            uint32_t pair = l * self->config.experts + e;
            self->rate[pair] = total > 0 ? load[pair] / total * rows_s : 0;
        }
    }
}

/* Everybody serves for the first time. */
void measure_begin(struct cluster_sim *self) {
    self->begin_ns = self->since_ns = self->last_ns = self->now_ns;
    self->dirty = true;
    self->report.serving_after_s = (double)self->now_ns / SECOND_NS;
    self->window_ns = self->task->span_ns / self->report.windows;
}

/* Sums over time become means. */
void measure_end(struct cluster_sim *self) {
    struct cluster_figures *total = &self->report.total;
    measure_change(self);
    total->lowest = 1;
    for (uint32_t w = 0; w < self->report.windows; w++) {
        struct cluster_figures *its = &self->report.window[w];
        double seconds = (double)self->window_ns / SECOND_NS;
        its->mean /= seconds;
        its->worst /= seconds;
        its->stall /= seconds;
        total->mean += its->mean / self->report.windows;
        total->worst += its->worst / self->report.windows;
        total->stall += its->stall / self->report.windows;
        total->lowest = its->lowest < total->lowest ? its->lowest : total->lowest;
        total->unserved_s += its->unserved_s;
        total->copies += its->copies;
        total->bytes += its->bytes;
        total->epochs += its->epochs;
        total->operations += its->operations;
        total->aborted += its->aborted;
        total->placed = its->placed;
    }
}
