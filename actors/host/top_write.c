/* `troupe top` as text. A line of the heat map is a layer; a character is one expert, or the most loaded of several where
 * the terminal is narrower than the layer. */
#include "actors/host/top_view.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEAT_MARGIN 17 /* "layer  12  0.84 " */

static void write_latency(struct text *out, const char *name, double ms, double p95_ms) {
    if (ms < 0)
        text_format(out, "   %s -", name);
    else
        text_format(out, "   %s %.1f ms (p95 %.1f)", name, ms, p95_ms);
}

static void write_share(struct text *out, const char *name, uint64_t part, uint64_t whole) {
    if (whole == 0)
        text_format(out, "%s -", name);
    else
        text_format(out, "%s %.0f %%", name, 100.0 * (double)part / (double)whole);
}

static void write_sums(const struct top_view *self, struct text *out) {
    if (!self->sums.told) {
        text_puts(out, "\n");
        return;
    }
    write_share(out, "guesses true", self->sums.accepted, self->sums.guessed);
    write_share(out, "   prefix cache", self->sums.cache_hits, self->sums.cache_queries);
    text_format(out, "   put back %llu   sent again %llu   audited %llu, differed %llu   quarantines %llu   bias version %llu\n",
                (unsigned long long)self->sums.put_back, (unsigned long long)self->sums.sent_again,
                (unsigned long long)self->sums.audited, (unsigned long long)self->sums.differed,
                (unsigned long long)self->sums.quarantines, (unsigned long long)self->bias_version);
}

static void write_head(const struct top_view *self, struct text *out) {
    double sum = 0;
    uint32_t count = 0;
    for (uint32_t l = 0; l < self->layers; l++)
        if (self->balance[l] >= 0) {
            sum += self->balance[l];
            count++;
        }
    text_format(out, "troupe %s  %s   %s   epoch %llu   %u processes%s\n", self->version, self->model,
                self->serving ? "serving" : "NOT SERVING", (unsigned long long)self->epoch, self->actors + 1,
                self->stats_age_ms > 10 * self->heartbeat_ms ? "   the coordinator is away" : "");
    text_format(out, "%.0f tokens/s   %.0f prompt tokens/s", self->tokens_per_s, self->prompt_tokens_per_s);
    write_latency(out, "TTFT", self->ttft_ms, self->ttft_p95_ms);
    write_latency(out, "TPOT", self->tpot_ms, self->tpot_p95_ms);
    text_format(out, "\nsequences: %llu running, %llu waiting   cache %.0f %%   balancedness ",
                (unsigned long long)self->running, (unsigned long long)self->waiting, self->cache * 100);
    if (count == 0)
        text_puts(out, "-\n");
    else
        text_format(out, "%.2f\n", sum / count);
    write_sums(self, out);
}

/* Load over fair share, in steps of about a factor of two. */
static char shade(double ratio) {
    static const struct {
        double below;
        char sign;
    } STEPS[] = {{0.25, ' '}, {0.5, '.'}, {0.75, ':'}, {1.5, '-'}, {2, '+'}, {4, '*'}};
    for (size_t i = 0; i < sizeof STEPS / sizeof STEPS[0]; i++)
        if (ratio < STEPS[i].below)
            return STEPS[i].sign;
    return '#';
}

static void write_layer(const struct top_view *self, struct text *out, uint32_t layer, uint32_t columns) {
    uint32_t each = columns == 0 ? self->experts : (self->experts + columns - 1) / columns;
    const double *rows = &self->rows[(size_t)layer * self->experts];
    const bool *held = &self->held[(size_t)layer * self->experts];
    double sum = 0;
    for (uint32_t e = 0; e < self->experts; e++)
        sum += rows[e];
    if (self->balance[layer] < 0)
        text_format(out, "layer %3u     -  ", layer);
    else
        text_format(out, "layer %3u  %.2f  ", layer, self->balance[layer]);
    for (uint32_t e = 0; e < self->experts; e += each) {
        double most = 0;
        bool all_held = true;
        for (uint32_t i = e; i < self->experts && i < e + each; i++) {
            most = rows[i] > most ? rows[i] : most;
            all_held = all_held && held[i];
        }
        char sign = all_held ? shade(sum > 0 ? most * self->experts / sum : 1) : 'X';
        text_append(out, &sign, 1);
    }
    text_puts(out, "\n");
}

/* Where not all layers have room, the least balanced are shown. */
static void write_heat(const struct top_view *self, struct text *out, uint32_t columns, uint32_t room) {
    uint32_t routed = 0, shown = 0;
    bool chosen[LAYERS_MAX] = {false};
    for (uint32_t l = 0; l < self->layers; l++)
        routed += self->routed[l];
    while (shown < room && shown < routed) {
        uint32_t worst = UINT32_MAX;
        for (uint32_t l = 0; l < self->layers; l++)
            if (self->routed[l] && !chosen[l] && (worst == UINT32_MAX || self->balance[l] < self->balance[worst]))
                worst = l;
        chosen[worst] = true;
        shown++;
    }
    text_format(out, "\nload over fair share:  ' ' < 1/4   . < 1/2   : < 3/4   - fair   + > 1.5   * > 2   # > 4   X no holder");
    if (shown < routed)
        text_format(out, "   (%u of %u layers)", shown, routed);
    text_puts(out, "\n");
    for (uint32_t l = 0; l < self->layers; l++)
        if (chosen[l])
            write_layer(self, out, l, columns > HEAT_MARGIN ? columns - HEAT_MARGIN : 1);
}

/* ---- processes ---- */

static int descending(uint64_t a, uint64_t b) {
    return (a < b) - (a > b);
}

static struct top_look sort_look; /* qsort hands nothing to the comparison */

static int compare(const void *left, const void *right) {
    const struct top_actor *a = *(struct top_actor *const *)left, *b = *(struct top_actor *const *)right;
    int result = 0;
    switch (sort_look.order) {
    case TOP_BY_STATE:
        result = strcmp(a->state, b->state);
        break;
    case TOP_BY_AGE:
        result = descending(a->age_ms, b->age_ms);
        break;
    case TOP_BY_WEIGHTS:
        result = descending(a->memory, b->memory);
        break;
    case TOP_BY_ROWS:
        result = descending(a->rows, b->rows);
        break;
    case TOP_BY_BUSY:
        result = descending(a->busy_ms, b->busy_ms);
        break;
    default:
        break;
    }
    if (result == 0)
        result = strverscmp(a->name, b->name);
    return sort_look.reversed ? -result : result;
}

static void write_actor(const struct top_actor *actor, struct text *out) {
    text_format(out, "%-18.18s %-11.11s %-8.8s ", actor->name, actor->role, actor->state);
    if (!actor->heard) {
        text_puts(out, "        -\n");
        return;
    }
    text_format(out, "%6llu ms %8.1f MB %6u %5llu %6llu/%-6llu %12llu %8.1f s\n", (unsigned long long)actor->age_ms,
                (double)actor->memory / 1e6, actor->copies, (unsigned long long)actor->sequences,
                (unsigned long long)actor->pages, (unsigned long long)actor->all_pages,
                (unsigned long long)actor->rows, (double)actor->busy_ms / 1e3);
}

/* The column that they are ordered by has a mark. */
static void write_heads(struct text *out, const struct top_look *look) {
    static const struct {
        const char *name;
        int width; /* negative: to the left */
        enum top_order order;
    } HEADS[] = {{"process", -18, TOP_BY_NAME},   {"role", -11, TOP_ORDERS},        {"state", -8, TOP_BY_STATE},
                 {"heartbeat", 9, TOP_BY_AGE},    {"weights", 11, TOP_BY_WEIGHTS},  {"copies", 6, TOP_ORDERS},
                 {"seqs", 5, TOP_ORDERS},         {"cache pages", 13, TOP_ORDERS},  {"rows", 12, TOP_BY_ROWS},
                 {"busy", 10, TOP_BY_BUSY}};
    for (size_t i = 0; i < sizeof HEADS / sizeof HEADS[0]; i++) {
        char name[24];
        bool chosen = HEADS[i].order == look->order;
        snprintf(name, sizeof name, "%s%s", HEADS[i].name, !chosen ? "" : look->reversed ? "^" : "*");
        text_format(out, "%s%*s", i == 0 ? "\n" : " ", HEADS[i].width, name);
    }
    text_puts(out, "\n");
}

static void write_actors(struct top_view *self, struct text *out, uint32_t room, const struct top_look *look) {
    struct top_actor *list[ACTORS_MAX + TOP_GONE];
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->actors; i++)
        list[count++] = &self->actor[i];
    for (uint32_t i = 0; i < self->gones; i++)
        list[count++] = &self->gone[i];
    sort_look = *look;
    qsort(list, count, sizeof list[0], compare);
    write_heads(out, look);
    uint32_t first = count <= room ? 0 : look->first < count - room ? look->first : count - room;
    for (uint32_t i = first; i < count && i < first + room; i++)
        write_actor(list[i], out);
    if (count > room)
        text_format(out, "%u to %u of %u\n", first + 1, first + room, count);
}

/* Lines over the width are cut, whole characters kept. */
static void cut(struct text *text, uint32_t columns) {
    size_t to = 0;
    uint32_t column = 0;
    for (size_t at = 0; at < text->size;) {
        size_t length = utf8_character(text->bytes + at, text->size - at);
        length = length == 0 ? 1 : length;
        bool end = text->bytes[at] == '\n';
        column = end ? 0 : column + 1;
        if (end || column <= columns) {
            memmove(text->bytes + to, text->bytes + at, length);
            to += length;
        }
        at += length;
    }
    text->size = to;
}

void top_view_write(struct top_view *self, struct text *out, uint32_t columns, uint32_t lines, const struct top_look *look) {
    uint32_t moments = self->moments < 5 ? self->moments : 5;
    uint32_t fixed = 4 + 2 + 3 + moments + 2, room = lines == 0 ? UINT32_MAX / 2 : lines > fixed ? lines - fixed : 2;
    uint32_t all = self->actors + self->gones;
    text_clear(out);
    write_head(self, out);
    uint32_t heat = lines == 0 ? LAYERS_MAX : all < room / 2 ? room - all : room / 2, routed = 0;
    for (uint32_t l = 0; l < self->layers; l++)
        routed += self->routed[l];
    heat = heat < routed ? heat : routed;
    write_heat(self, out, columns, heat);
    write_actors(self, out, room - heat, look);
    text_puts(out, "\n");
    for (uint32_t i = self->moments - moments; i < self->moments; i++)
        text_format(out, "%s\n", self->moment[i].text);
    cut(out, columns);
}
