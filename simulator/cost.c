/* The cost model, see cost.h. */
#include "simulator/cost.h"

#include <stdlib.h>
#include <string.h>

bool cost_open(struct cost_model *self, uint32_t layers, uint32_t experts, uint32_t processes,
               double slowdown) {
    *self = (struct cost_model){.layers = layers, .experts = experts, .processes = processes};
    self->slowdown = slowdown;
    self->rows = calloc((size_t)layers * processes, sizeof *self->rows);
    return self->rows != NULL;
}

void cost_close(struct cost_model *self) {
    free(self->rows);
    self->rows = NULL;
}

void cost_clear(struct cost_model *self) {
    memset(self->rows, 0, (size_t)self->layers * self->processes * sizeof *self->rows);
    self->unserved = self->total = 0;
}

void cost_add(struct cost_model *self, const struct cost_placement *placement, const double *load,
              double share, const struct cost_process *process) {
    for (uint32_t pair = 0; pair < self->layers * self->experts; pair++) {
        double *rows = self->rows + (size_t)(pair / self->experts) * self->processes;
        double speeds = 0, wanted = load[pair] * share;
        for (uint32_t i = placement->first[pair]; i < placement->first[pair + 1]; i++)
            speeds += process[placement->holder[i]].alive ? process[placement->holder[i]].speed : 0;
        self->total += wanted;
        if (speeds <= 0) {
            self->unserved += wanted;
            continue;
        }
        for (uint32_t i = placement->first[pair]; i < placement->first[pair + 1]; i++) {
            const struct cost_process *holder = &process[placement->holder[i]];
            if (holder->alive)
                rows[placement->holder[i]] += wanted * holder->speed / speeds;
        }
    }
}

struct cost_balance cost_balance(const struct cost_model *self,
                                 const struct cost_process *process) {
    struct cost_balance ret = {.worst = 1};
    double speeds = 0, plain = 0, slowed = 0;
    for (uint32_t p = 0; p < self->processes; p++)
        speeds += process[p].alive ? process[p].speed : 0;
    for (uint32_t l = 0; l < self->layers; l++) {
        const double *rows = self->rows + (size_t)l * self->processes;
        double total = 0, longest = 0, longest_slowed = 0;
        for (uint32_t p = 0; p < self->processes; p++) {
            double time = rows[p] > 0 ? rows[p] / process[p].speed : 0;
            double with = process[p].loading ? time / (1 - self->slowdown) : time;
            total += rows[p];
            longest = time > longest ? time : longest;
            longest_slowed = with > longest_slowed ? with : longest_slowed;
        }
        double balance = longest > 0 ? total / speeds / longest : 1;
        ret.mean += balance / self->layers;
        ret.worst = balance < ret.worst ? balance : ret.worst;
        plain += longest;
        slowed += longest_slowed;
    }
    ret.stall = plain > 0 ? slowed / plain - 1 : 0;
    return ret;
}

double cost_rows(const struct cost_model *self, uint32_t process) {
    double rows = 0;
    for (uint32_t l = 0; l < self->layers; l++)
        rows += self->rows[(size_t)l * self->processes + process];
    return rows;
}
