/* The feed's events taken apart, with every size checked: the server may be any. */
#include "actors/host/top_view.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FADE 0.93 /* of rows, from one `load` event to the next: a half-life of about 5 s */

void top_view_free(struct top_view *self) {
    free(self->routed);
    free(self->rows);
    free(self->held);
    free(self->balance);
    memset(self, 0, sizeof *self);
}

/* Numbers that are missing or negative count as 0. */
static uint64_t whole(const json_t *value) {
    json_int_t number = json_integer_value(value);
    return number > 0 ? (uint64_t)number : 0;
}

static uint64_t member(const json_t *object, const char *key) {
    return whole(json_object_get(object, key));
}

static uint64_t element(const json_t *list, size_t index) {
    return whole(json_array_get(list, index));
}

static void copy(char *ret, size_t room, const json_t *value) {
    const char *text = json_string_value(value);
    snprintf(ret, room, "%s", text != NULL ? text : "");
    for (char *at = ret; *at != 0; at++) /* nothing from outside moves the cursor */
        *at = (unsigned char)*at < ' ' || *at == 0x7f ? '?' : *at;
}

static double number_of(const json_t *value, const char *key) {
    const json_t *number = json_object_get(value, key);
    return json_is_number(number) ? json_number_value(number) : -1;
}

static int take_hello(struct top_view *self, const json_t *event, struct failure *failure) {
    uint64_t layers = member(event, "layers"), experts = member(event, "experts");
    if (layers == 0 || layers > LAYERS_MAX || experts > EXPERTS_MAX)
        return fail(failure, ERR_INVALID, "expected at most %d layers of %d experts, found %llu of %llu", LAYERS_MAX,
                    EXPERTS_MAX, (unsigned long long)layers, (unsigned long long)experts);
    top_view_free(self);
    self->layers = (uint32_t)layers;
    self->experts = (uint32_t)experts;
    self->heartbeat_ms = member(event, "heartbeat_ms");
    self->ttft_ms = self->tpot_ms = -1;
    size_t cells = (size_t)layers * experts + 1;
    self->routed = calloc(layers, sizeof *self->routed);
    self->rows = calloc(cells, sizeof *self->rows);
    self->held = calloc(cells, sizeof *self->held);
    self->balance = calloc(layers, sizeof *self->balance);
    if (self->routed == NULL || self->rows == NULL || self->held == NULL || self->balance == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the view");
    for (uint32_t l = 0; l < self->layers; l++)
        self->balance[l] = -1;
    copy(self->model, sizeof self->model, json_object_get(event, "model"));
    copy(self->version, sizeof self->version, json_object_get(event, "version"));
    size_t i;
    json_t *layer;
    json_array_foreach(json_object_get(event, "routed"), i, layer) {
        if (whole(layer) < layers)
            self->routed[whole(layer)] = true;
    }
    return 0;
}

/* By name: who comes back is another actor. */
static void forget_gone(struct top_view *self, const char *name) {
    for (uint32_t i = 0; i < self->gones; i++)
        if (strcmp(self->gone[i].name, name) == 0)
            self->gone[i--] = self->gone[--self->gones];
}

static void take_lost(struct top_view *self, const json_t *event, const char *name) {
    forget_gone(self, name);
    if (!json_is_null(json_object_get(event, "back_ms")) || self->gones == TOP_GONE)
        return;
    for (uint32_t i = 0; i < self->actors; i++)
        if (strcmp(self->actor[i].name, name) == 0)
            return;
    struct top_actor *actor = &self->gone[self->gones++];
    *actor = (struct top_actor){.id = (uint32_t)member(event, "actor")};
    snprintf(actor->name, sizeof actor->name, "%s", name);
    snprintf(actor->state, sizeof actor->state, "gone");
    copy(actor->role, sizeof actor->role, json_object_get(event, "role"));
}

static void take_epoch(struct top_view *self, const json_t *event) {
    size_t i, e;
    json_t *entry, *holder;
    self->epoch = member(event, "epoch");
    self->bias_version = member(event, "bias_version");
    self->serving = json_is_true(json_object_get(event, "serving"));
    struct top_actor *before = malloc(sizeof self->actor);
    uint32_t known = self->actors;
    if (before == NULL)
        return;
    memcpy(before, self->actor, sizeof self->actor);
    self->actors = 0;
    json_array_foreach(json_object_get(event, "members"), i, entry) {
        if (self->actors == ACTORS_MAX)
            break;
        struct top_actor *actor = &self->actor[self->actors++];
        memset(actor, 0, sizeof *actor);
        for (uint32_t k = 0; k < known; k++)
            if (before[k].id == element(entry, 0))
                *actor = before[k];
        actor->id = (uint32_t)element(entry, 0);
        copy(actor->role, sizeof actor->role, json_array_get(entry, 1));
        copy(actor->name, sizeof actor->name, json_array_get(entry, 2));
        copy(actor->state, sizeof actor->state, json_array_get(entry, 3));
        actor->copies = (uint32_t)element(entry, 5);
        forget_gone(self, actor->name);
    }
    free(before);
    memset(self->held, 0, (size_t)self->layers * self->experts * sizeof *self->held);
    json_array_foreach(json_object_get(event, "placement"), i, entry) {
        uint64_t layer = element(entry, 0);
        json_array_foreach(json_array_get(entry, 1), e, holder) {
            if (layer < self->layers && e < self->experts)
                self->held[layer * self->experts + e] = json_is_array(holder) || whole(holder) > 0;
        }
    }
}

static void take_load(struct top_view *self, const json_t *event) {
    const json_t *cells = json_object_get(event, "cells"), *balance = json_object_get(event, "balancedness");
    size_t count = (size_t)self->layers * self->experts;
    double fade = json_is_true(json_object_get(event, "base")) ? 0 : FADE;
    for (size_t cell = 0; cell < count; cell++)
        self->rows[cell] *= fade;
    uint64_t cell = 0;
    for (size_t i = 0; i + 1 < json_array_size(cells); i += 2, cell++) {
        uint64_t skip = element(cells, i);
        if (skip >= count || (cell += skip) >= count)
            break;
        self->rows[cell] += (double)element(cells, i + 1);
    }
    for (size_t i = 0; i + 1 < json_array_size(balance); i += 2)
        if (element(balance, i) < self->layers)
            self->balance[element(balance, i)] = json_number_value(json_array_get(balance, i + 1));
}

static void take_sums(struct top_view *self, const json_t *sums) {
    self->sums.told = json_is_object(sums);
    self->sums.cache_queries = member(sums, "cache_queries");
    self->sums.cache_hits = member(sums, "cache_hits");
    self->sums.guessed = member(sums, "guessed");
    self->sums.accepted = member(sums, "accepted");
    self->sums.put_back = member(sums, "put_back");
    self->sums.sent_again = member(sums, "sent_again");
    self->sums.audited = member(sums, "audited");
    self->sums.differed = member(sums, "differed");
    self->sums.quarantines = member(sums, "quarantines");
}

static void take_actors(struct top_view *self, const json_t *event) {
    size_t i;
    json_t *row;
    self->stats_age_ms = member(event, "stats_age_ms");
    take_sums(self, json_object_get(event, "sums"));
    json_array_foreach(json_object_get(event, "actors"), i, row) {
        for (uint32_t k = 0; k < self->actors; k++) {
            struct top_actor *actor = &self->actor[k];
            if (actor->id != element(row, 0))
                continue;
            actor->heard = true;
            actor->age_ms = element(row, 1);
            actor->memory = element(row, 3);
            actor->sequences = element(row, 5) + element(row, 6);
            actor->pages = element(row, 7);
            actor->all_pages = element(row, 8);
            actor->rows = element(row, 9);
            actor->busy_ms = element(row, 10);
            break;
        }
    }
}

static void take_rates(struct top_view *self, const json_t *event) {
    const json_t *ttft = json_object_get(event, "ttft_ms"), *tpot = json_object_get(event, "tpot_ms");
    self->rates++;
    self->tokens_per_s = number_of(event, "tokens_per_s");
    self->prompt_tokens_per_s = number_of(event, "prompt_tokens_per_s");
    self->cache = number_of(event, "cache");
    self->running = member(event, "running");
    self->waiting = member(event, "waiting");
    if (json_is_object(ttft)) { /* the newest there was stays */
        self->ttft_ms = number_of(ttft, "mean");
        self->ttft_p95_ms = number_of(ttft, "p95");
    }
    if (json_is_object(tpot)) {
        self->tpot_ms = number_of(tpot, "mean");
        self->tpot_p95_ms = number_of(tpot, "p95");
    }
}

static void write_after(struct text *out, const char *what, const json_t *event, const char *key) {
    double ms = number_of(event, key);
    if (ms < 0)
        text_format(out, ", not yet %s", what);
    else
        text_format(out, ", %s after %.1f ms", what, ms);
}

/* Scaling, draining, moving: what, how far, and how it ended. */
static void write_operation(struct text *text, const json_t *event) {
    char what[24], about[TOP_NAME_BYTES], phase[24];
    copy(what, sizeof what, json_object_get(event, "what"));
    copy(about, sizeof about, json_object_get(event, "about"));
    copy(phase, sizeof phase, json_object_get(event, "phase"));
    text_format(text, "%s %s: %s, %llu of %llu", what, about, phase,
                (unsigned long long)member(event, "done"), (unsigned long long)member(event, "total"));
}

/* Epochs are left out: the first line tells the newest. */
static void take_moment(struct top_view *self, const json_t *event) {
    char kind[16], name[TOP_NAME_BYTES];
    uint64_t number = member(event, "number"), t = member(event, "t") / 1000;
    copy(kind, sizeof kind, json_object_get(event, "kind"));
    copy(name, sizeof name, json_object_get(event, "name"));
    if (strcmp(kind, "epoch") == 0)
        return;
    uint32_t at = 0;
    while (at < self->moments && self->moment[at].number != number)
        at++;
    if (at == TOP_MOMENTS) {
        memmove(&self->moment[0], &self->moment[1], (TOP_MOMENTS - 1) * sizeof self->moment[0]);
        at--;
    }
    if (at >= self->moments)
        self->moments = at + 1;
    struct text text = {0};
    text_format(&text, "%02u:%02u:%02u UTC  ", (unsigned)(t / 3600 % 24), (unsigned)(t / 60 % 60), (unsigned)(t % 60));
    if (strcmp(kind, "operation") == 0)
        write_operation(&text, event);
    else if (strcmp(kind, "bias") == 0)
        text_format(&text, "routing bias: version %llu", (unsigned long long)member(event, "bias_version"));
    else
        text_format(&text, "%s %s", name, kind);
    if (strcmp(kind, "lost") == 0) {
        text_format(&text, " with %llu copies", (unsigned long long)member(event, "copies"));
        take_lost(self, event, name);
        write_after(&text, "re-placed", event, "replaced_ms");
        write_after(&text, "serving", event, "serving_ms");
        write_after(&text, "back", event, "back_ms");
    }
    self->moment[at].number = number;
    snprintf(self->moment[at].text, sizeof self->moment[at].text, "%.*s", (int)text.size, text.bytes);
    text_free(&text);
}

int top_view_take(struct top_view *self, const char *name, const char *json, size_t size,
                  struct failure *failure) {
    json_error_t error;
    json_t *event = json_loadb(json, size, 0, &error);
    if (event == NULL || member(event, "v") != 1) {
        json_decref(event);
        return fail(failure, ERR_INVALID, "expected an event of version 1, found %.60s", json);
    }
    int code = 0;
    if (strcmp(name, "hello") == 0)
        code = take_hello(self, event, failure);
    else if (self->layers == 0) /* nothing makes sense before hello */
        code = fail(failure, ERR_INVALID, "expected the event 'hello' first, found '%.30s'", name);
    else if (strcmp(name, "epoch") == 0)
        take_epoch(self, event);
    else if (strcmp(name, "load") == 0)
        take_load(self, event);
    else if (strcmp(name, "actors") == 0)
        take_actors(self, event);
    else if (strcmp(name, "rates") == 0)
        take_rates(self, event);
    else if (strcmp(name, "moment") == 0)
        take_moment(self, event);
    json_decref(event);
    return code;
}
