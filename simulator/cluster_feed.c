/* A simulated cluster in the live view: one gateway more that serves nobody, whose feed (actors/gateway/events.h, the code of the
 * process host) goes to whoever runs the simulation. It hears COMMIT and STATS as any gateway does; tokens are those that the file
 * says, latencies are not modelled. Times begin with 0 when the first process starts. */
#include "simulator/cluster_parts.h"

#include <stdlib.h>

#include "actors/gateway/events.h"

#define KEYFRAME_SETS 20u /* sets of events until a reader can begin anew */

struct cluster_feed {
    struct cluster_view view;
    struct event_feed events;
    struct metrics metrics;
    struct event_source source;
    struct effects effects;
    uint64_t listener, sets;
};

bool feed_open(struct cluster_sim *self) {
    if (self->task->feed == NULL)
        return true;
    struct cluster_feed *feed = calloc(1, sizeof *feed);
    if (feed == NULL)
        return false;
    self->feed = feed;
    cluster_view_init(&feed->view, self->config.layers, self->config.experts);
    events_init(&feed->events);
    metrics_init(&feed->metrics, 1);
    effects_init(&feed->effects);
    feed->events.metrics = &feed->metrics;
    feed->source = (struct event_source){.cluster = &feed->view,
                                         .metrics = &feed->metrics,
                                         .config = &self->config,
                                         .model = "simulated cluster",
                                         .version = "virtual time",
                                         .incarnation = 1,
                                         .heartbeat_ms = self->task->settings.heartbeat_ms};
    happen(self, (struct happening){.time_ns = self->task->feed_ns, .kind = HAPPENS_FEED});
    return true;
}

void feed_close(struct cluster_sim *self) {
    struct cluster_feed *feed = self->feed;
    if (feed == NULL)
        return;
    cluster_view_free(&feed->view);
    events_free(&feed->events);
    effects_free(&feed->effects);
    free(feed);
    self->feed = NULL;
}

void feed_commit(struct cluster_sim *self, const Troupe__Commit *commit) {
    if (self->feed == NULL)
        return;
    cluster_view_commit(&self->feed->view, commit);
    events_commit(&self->feed->events, &self->feed->view, commit, self->now_ns);
}

void feed_stats(struct cluster_sim *self, const Troupe__Stats *stats) {
    if (self->feed == NULL)
        return;
    cluster_view_stats(&self->feed->view, stats);
    events_stats(&self->feed->events, stats, self->now_ns);
}

static void hand_over(struct cluster_sim *self, bool keyframe) {
    struct effects *effects = &self->feed->effects;
    for (uint32_t i = 0; i < effects->count; i++)
        if (effects->list[i].kind == EFFECT_STREAM && effects->list[i].stream.size > 0)
            self->task->feed(self->task->context, self->now_ns, keyframe,
                             effects->list[i].stream.bytes, effects->list[i].stream.size);
    effects_reset(effects);
}

void feed_tick(struct cluster_sim *self) {
    struct cluster_feed *feed = self->feed;
    double seconds =
        self->begin_ns == NEVER ? 0 : (double)(self->now_ns - self->begin_ns) / 1e9;
    feed->metrics.counter[METRIC_TOKENS_GENERATED] = (uint64_t)(self->task->tokens_s * seconds);
    events_timer(&feed->events, &feed->source, self->now_ns, &feed->effects);
    hand_over(self, false);
    if (feed->sets++ % KEYFRAME_SETS == 0) { /* comes as another listener, who is told everything */
        events_leave(&feed->events, feed->listener);
        events_join(&feed->events, &feed->source, ++feed->listener, self->now_ns, &feed->effects);
        hand_over(self, true);
    }
    happen(self, (struct happening){.time_ns = self->task->feed_ns, .kind = HAPPENS_FEED});
}
