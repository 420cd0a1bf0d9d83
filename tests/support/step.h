/* One actor driven by hand: give it events, look at its effects. Its programs "run" at once on an
 * engine that computes nothing; other actors are played by the test. */
#ifndef TROUPE_TESTS_STEP_H
#define TROUPE_TESTS_STEP_H

#include "actors/actors.h"
#include "config/settings.h"
#include "proto/wire.h"

#define EFFECT_KINDS     (EFFECT_EXIT + 1)
#define PROGRAMS_HELD    1024
#define COORDINATOR_LIFE 0xc0u /* incarnation of the coordinator */
#define OWN_LIFE         0x11u /* incarnation of the actor under test */

struct stage {
    struct actor *actor;
    struct actor_identity identity;
    struct settings settings;
    struct model_config config;
    actor_id id; /* of the actor under test, once welcomed */
    uint64_t now_ns, epoch;
    bool far; /* stage_commit: other experts are on another host */
    uint32_t replicas; /* stage_commit: further holders of each expert, the next ones in the list */
    struct effects effects; /* of the last step */
    struct effects log;     /* copies of all effects since stage_clear */
    uint32_t next[EFFECT_KINDS];
    bool hold_programs; /* COMPUTED events wait for stage_compute */
    struct program program[PROGRAMS_HELD];
    uint32_t first_program, programs;
    Troupe__Envelope *message; /* last one taken by stage_sent */
    /* What the next SAMPLE program answers; gate choices are expert (row + slot) % experts. */
    uint32_t sampled_token;
    uint32_t guessed_token; /* what a DRAFT program guesses first; its further guesses count up */
};

/* Settings by default, a model of 3 layers (the first dense), 4 experts (2 per token), hidden 8,
 * vocabulary 32, context 256, end-of-sequence token 1; then the test changes what it wants and
 * creates the actor. */
void stage_init(struct stage *self, enum role role);
void stage_free(struct stage *self); /* destroys the actor */

/* ---- events ---- */
void stage_step(struct stage *self, const struct event *event);
void stage_compute(struct stage *self); /* delivers the COMPUTED events that wait */
void stage_timer(struct stage *self, uint64_t now_ns);
void stage_message(struct stage *self, const message *envelope); /* through the wire and back */
void stage_frame(struct stage *self, const struct frame_header *header, const void *payload,
                 size_t size);
void stage_peer_lost(struct stage *self, actor_id id);
message stage_envelope(actor_id from); /* from that actor, in the incarnation life_of(from) */
uint64_t life_of(actor_id id);

/* START, WELCOME with `id`. */
void stage_join(struct stage *self, actor_id id);
/* The next epoch: the actor under test and `members`, whose roles follow from their ids, see
 * role_of(). Every (layer, expert) of the MoE layers is held by holder[expert % holders]. */
void stage_commit(struct stage *self, const actor_id *members, uint32_t count,
                  const actor_id *holder, uint32_t holders);
/* 2x gateway, 3x expert, 4x sampler, 5x attention, 6x control. */
enum role role_of(actor_id id);

/* ---- effects ---- */
void stage_clear(struct stage *self);
uint32_t stage_count(const struct stage *self, enum effect_kind kind);
/* The next effect of the kind in the log that has not been taken; NULL: none. */
const struct effect *stage_take(struct stage *self, enum effect_kind kind);
/* Takes sends until one has this body; valid until the next call. NULL: none. */
const message *stage_sent(struct stage *self, Troupe__Envelope__BodyCase body);
uint32_t stage_sent_count(struct stage *self, Troupe__Envelope__BodyCase body); /* in the log */
/* True if a line of the log since stage_clear contains the text. */
bool stage_traced(const struct stage *self, const char *text);

/* ---- answers of experts and samplers ---- */
/* Header of the answer to a logged TRANSFER. */
struct frame_header answer_to(const struct effect *transfer, enum frame_kind kind);
void stage_combine(struct stage *self, const struct effect *dispatch);
/* `items` of them, from `first` on. */
void stage_combine_piece(struct stage *self, const struct effect *dispatch, uint32_t first,
                         uint32_t items);
void stage_sampled(struct stage *self, const struct effect *sample, uint32_t token);
/* Answers every frame not taken yet until none is left. */
void stage_answer_all(struct stage *self, uint32_t token);

#endif
