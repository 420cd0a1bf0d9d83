/* The attention actor's rooms share this header; nobody else includes it.
 *   attention.c           life, events, admission of messages, heartbeats
 *   attention_sequence.c  sequences: SUBMIT checked, tables, lists, pages, finishing
 *   attention_admit.c     who runs, and who is put back when pages run out
 *   attention_pages.c     pages of the latent cache: held, shared, evicted
 *   attention_batch.c     which rows go into the next step; programs of a step
 *   attention_dispatch.c  rows to experts and back: parts, replies, resending
 *   attention_audit.c     answers of experts checked against those of others
 *   attention_sample.c    rows to samplers and back
 *   attention_draft.c     guessed tokens (MTP): made, verified, kept or dropped
 *   attention_report.c    tokens to gateways
 *   attention_trace.c     where the time of traced sequences goes */
#ifndef TROUPE_ATTENTION_H
#define TROUPE_ATTENTION_H

#include "actors/actors.h"
#include "actors/bias_table.h"
#include "actors/latency.h"
#include "actors/member.h"
#include "router/dispatch.h"

/* ---- pages ---- */

#define NO_PAGE UINT32_MAX

struct page {
    uint32_t references; /* running sequences that hold it */
    uint32_t chain;      /* the next one in its bucket */
    uint32_t previous, next; /* idle: less, more recently used */
    uint64_t serial;         /* known: never used again; 0: not known */
    uint64_t parent;         /* serial of the page before it, or what its chain begins with */
    uint64_t cleared;        /* number of the batch that clears it, or cleared it last */
};

struct pages {
    struct page *page;   /* [total] */
    uint32_t *token;     /* [total, PAGE_TOKENS] of known pages */
    uint32_t *free_page; /* stack */
    uint32_t free_pages, total;
    uint32_t *bucket; /* [buckets] */
    uint32_t buckets;
    uint32_t oldest, newest, idle; /* known ones that nobody holds */
    uint64_t last_serial;
};

/* ---- sequences ---- */

enum sequence_state {
    SEQUENCE_WAITING, /* no pages yet, or put back: they went to others */
    SEQUENCE_RUNNING, /* has a number and pages; prefill while more than one known token is not
                         computed */
    SEQUENCE_DONE,    /* kept for Poll until Cancel; no pages */
};

/* What a sampler said about one position. */
struct entry {
    uint32_t id;
    float logprob;
    uint32_t rank, top;
};
struct top_entry {
    uint32_t token;
    float logprob;
};

/* Distinct tokens with counts, for penalties: a list in order of first appearance and an index by
 * open addressing. */
struct token_counts {
    uint32_t *token, *times; /* [count] */
    uint32_t *index;         /* [index_size] position + 1, 0: empty */
    uint32_t count, capacity, index_size;
};

/* attention_trace.c: of a sequence whose SUBMIT asked for it; totals, but for the workers: since TOKENS
 * were last sent. */
#define TRACE_WORKERS_MAX 512u
struct sequence_trace {
    uint64_t steps, step_ns, prefill_ns, sample_ns, resent, hedged;
    uint64_t *layer_ns; /* [layers * stages] */
    struct trace_worker {
        actor_id id;
        uint32_t rows;
    } *worker; /* [TRACE_WORKERS_MAX] */
    uint32_t workers;
    actor_id sampler;
};

/* Of the batch in flight. */
struct step_trace {
    uint32_t sequences; /* of it that are traced; 0: nothing is kept */
    uint64_t begin_ns, mark_ns, resent, hedged;
    uint64_t *layer_ns; /* [layers * stages] */
};

struct sequence {
    struct sequence *hash_next;
    struct sequence *previous, *next; /* list of its state */
    uint64_t id;                      /* unique together with the gateway */
    actor_id gateway;
    uint64_t gateway_incarnation;
    enum sequence_state state;
    /* Guesses of the tokens after the known ones (attention_draft.c). */
    uint32_t draft[DRAFTS_MAX];
    uint32_t drafts, verifying; /* made; of these with rows in the batch in flight */
    uint32_t drew;              /* tokens that the last batch brought */
    uint32_t trust, pause;      /* how often the first guess comes true; steps without guesses */
    uint32_t accepted_drafts, rejected_drafts;
    int32_t priority; /* the smaller, the earlier */
    uint64_t arrival; /* counts all that have come */
    bool begun;       /* has been admitted before */
    bool in_batch;  /* has rows in the batch in flight: neither pages nor memory may go */
    bool cancelled; /* dropped when the batch in flight has ended */
    bool reported;  /* scratch of attention_report.c */
    bool stepped;   /* it has been part of a step */
    uint64_t submitted_ns, begun_ns;
    struct sequence_trace *trace; /* NULL: not traced */

    uint32_t *token; /* [tokens_max]: prompt, generated */
    uint32_t prompt_tokens,
        given_tokens; /* given: prompt and what a resumed sequence brought along */
    uint32_t tokens, tokens_max;
    uint32_t computed; /* positions 0.. whose latent entries are in the cache */
    uint32_t computed_before; /* the batch that is ending */
    uint32_t min_tokens, max_tokens;
    uint64_t bias_version;
    uint32_t *page;  /* [pages] */
    uint32_t pages;  /* needed at most, [pages] */
    uint32_t held, known; /* pages held while RUNNING; of these the first ones that others may hold too */
    uint64_t chain;       /* serial of the last known page */
    uint32_t cached_tokens; /* not computed when it was first admitted, because pages were known */
    uint32_t number; /* while RUNNING: its place in attention.running */
    struct bias_version *routing; /* it is pinned to; NULL: version 0, or DONE */

    struct sample_spec sampling; /* everything of it that does not change from token to token */
    bool logprobs;
    uint32_t top_logprobs;
    uint32_t *bias; /* [2 * biases]: token, float bits */
    uint32_t biases;
    uint32_t *stop_token;
    uint32_t stop_tokens;
    bool ignore_eos, score_prompt, full_logits;
    struct token_counts prompt_counts, output_counts; /* filled only if a penalty asks for them */

    Troupe__FinishReason finish;
    uint32_t stopped_by;
    char error[96];
    uint32_t told_tokens, told_prompt; /* generated tokens and prompt entries sent so far */
    struct entry *entry;               /* [tokens_max - given_tokens], if logprobs */
    struct top_entry *entry_top;       /* [same * top_logprobs] */
    struct entry *prompt_entry;        /* [prompt_entries] */
    struct top_entry *prompt_top;      /* [prompt_entries * top_logprobs] */
    float *prompt_logits;              /* [prompt_entries * vocabulary], if full_logits */
    uint32_t prompt_entries, prompt_complete;
};

struct sequence_list {
    struct sequence *first, *last;
    uint32_t count;
};

/* ---- the batch in flight ---- */

enum batch_phase {
    BATCH_IDLE,
    BATCH_LAYERS,   /* programs up to an MoE layer's gate, or up to the end */
    BATCH_EXPERTS,  /* rows are with experts */
    BATCH_SAMPLERS, /* rows are with samplers */
    BATCH_DRAFTS,   /* what comes next is guessed */
};

/* A final row: what a sampler is asked about it. */
struct question {
    struct sequence *sequence;
    uint32_t row, position; /* of the batch; of the sequence */
    uint32_t flags, target;
    uint32_t drafts; /* guesses that it takes for true */
    uint32_t drawn;  /* the answer to SAMPLE_DRAW */
};

enum part_state { PART_FREE, PART_SENT, PART_WAITING /* for a holder, or for its turn */ };

struct part {
    enum part_state state;
    actor_id to;
    uint64_t to_incarnation;
    uint32_t attempt;
    uint32_t first, count; /* items of the flight, or places in batch.order */
    uint64_t sent_ns, deadline_ns;
    uint64_t hedge_at_ns; /* when somebody else is asked as well; NEVER: has been, or not to be */
    /* items: the range of the part that was sent first, of which this one is a hedge or itself */
    uint32_t family_first, family_count;
    bool hedge, again; /* again: it has been hedged, as far as others could be asked */
    /* samplers: who has been asked as well; 0: nobody */
    actor_id also;
    uint64_t also_incarnation;
};

/* Rows of one layer on their way. Parts are ranges of the items, disjoint but for hedges, which are cut
 * out of the range of a part that is late; a part that failed is planned anew over its own range. */
struct flight {
    uint32_t items, missing;
    uint32_t *item_row;    /* [items_max] */
    uint16_t *item_slot;   /* [items_max] */
    uint16_t *item_expert; /* [items_max] */
    uint8_t *item_done;    /* [items_max] its answer is scattered */
    struct part *part;     /* [2 * items_max] */
    uint32_t *free_part;   /* stack */
    uint32_t parts, free_parts, attempt, hedges; /* hedges: outstanding */
    struct dispatch_plan plan;
    struct dispatch_item *planned; /* [items_max] scratch */
};

/* Rows of the layer in flight that are checked; a cell is (row, slot). See attention_audit.c. */
struct audit {
    double share;
    struct audit_cell *cell; /* [batch_tokens * k] */
    uint32_t *listed;        /* [batch_tokens * k] cells that are checked in this layer */
    uint32_t *target;        /* [batch_tokens * k] scratch: whom to ask for each of them */
    uint32_t cells, pending; /* in `listed`; of them not settled yet */
    struct audit_vote *vote; /* answers kept, and their bytes; grow to what a layer needs */
    uint8_t *bytes;          /* [votes_capacity, hidden] float */
    uint32_t votes, votes_capacity;
    struct part *part;       /* ranges of `ask`; numbered from AUDIT_PART on in frames */
    uint32_t *ask;           /* cells */
    uint32_t parts, parts_capacity, asks, asks_capacity;
    uint64_t retry_ns;       /* nobody could be asked for some: tried again; NEVER: not so */
    bool accused;            /* somebody is known as a liar since the last look */
    uint64_t rows, differed, alone; /* totals: checked, with differing answers, not checked for want of a second holder */
};
#define AUDIT_PART 0x80000000u

struct batch {
    enum batch_phase phase;
    uint32_t slot;
    uint64_t number, wait_tag;
    uint64_t started_ns;
    uint32_t prompt_rows; /* rows of sequences that do not decode */
    uint32_t layer;        /* the MoE layer that BATCH_LAYERS ends with or BATCH_EXPERTS is about;
                              config.layers: none */
    struct batch_row *row; /* [batch_tokens] */
    uint32_t rows;
    struct sequence **sequence; /* [max_sequences] */
    uint32_t *sequence_rows;    /* [max_sequences] rows of each */
    uint32_t *sequence_first;   /* [max_sequences] the first of them */
    struct sequence *drafting[DRAFT_ROWS_MAX]; /* those that guesses are made for, in order */
    uint32_t draftings;
    uint32_t sequences;
    uint32_t *clear; /* [pages_total] pages handed out at the start of this batch */
    uint32_t clears;
    struct question *question; /* [batch_tokens] */
    uint32_t *select;          /* [batch_tokens] row of each question */
    uint32_t questions;
    uint32_t *order;          /* [batch_tokens] questions in the order of the sample parts */
    struct part *sample_part; /* [batch_tokens] */
    uint32_t sample_parts, sample_missing;
    struct flight flight;
};

/* ---- the actor ---- */

struct destination {
    actor_id id;
    uint64_t incarnation;
    struct latency latency;
    double answers_ns, answers_items; /* of late: time that answers took, and their items (decaying sums) */
    /* After a hedge has answered before it: others are asked instead, if there are any, until it speaks
     * again and for a while after that, longer each time. */
    uint64_t suspect_until_ns, suspicion_ns;
    /* An audit has shown that its rows are wrong (or, if undecided, that they may be): nothing is sent to
     * it any more, and heartbeats say so until the coordinator has taken it away. */
    bool liar, undecided;
    uint32_t lie_layer, lie_expert;
};

struct attention {
    struct actor actor;
    struct member member;
    struct settings settings;
    struct model_config config;
    uint32_t context, k, activation_bytes;
    bool rows_e4m3; /* rows go to experts as these would quantise them */
    uint32_t piece_items_max; /* items of an answer that always comes whole */
    uint32_t part_items_max, sample_rows_max;
    uint64_t row_deadline_ns;
    uint64_t hedge_ns; /* after this long with an expert, computed anew for each layer; NEVER: no hedging */
    struct latency sampler_latency;
    bool failed;
    uint64_t now_ns; /* of the event being handled */
    struct step_trace trace;

    struct bias_table bias; /* versions of the routing bias */
    struct pages pages;
    struct sequence **hash; /* [hash_size] */
    uint32_t hash_size;
    struct sequence_list waiting, done;
    struct sequence **running; /* [max_sequences], NULL: number is free */
    uint32_t runnings, done_max;
    uint32_t decode_cursor, prefill_cursor;
    uint64_t hand_over_at_ns; /* drained: when the next running sequence may go */

    struct batch batch;
    uint64_t last_batch, last_tag;
    uint64_t decode_ns, prompt_row_ns; /* usual time of a batch without prompt rows; of each of these; 0: not known */
    struct audit audit;

    /* Who holds what, of the adopted epoch. */
    struct placement placement;
    uint32_t *placement_first, *placement_holder, holders_capacity;
    struct destination *destination; /* ascending id */
    uint8_t *alive;
    uint32_t *queued; /* cost of the items outstanding at each, recomputed for each plan */
    uint32_t *cost;   /* of an item at each, see router/dispatch.h; set for each layer */
    uint32_t destinations, destinations_capacity;
    struct destination *former; /* scratch: those of the epoch before */

    /* Totals since start. */
    uint64_t arrivals, preemptions;
    uint64_t drafts_total, draft_tokens_total, accepted_total; /* verifications, guesses, true ones */
    uint64_t prefix_queries, prefix_hits; /* tokens looked for among known pages, and found there */
    uint64_t prompt_total, generated_total, steps, frames, rows, frames_resent, frames_stale, frames_hedged;
    uint64_t *load; /* [layers * experts] rows routed to each */
    uint32_t load_cursor,
        load_heartbeats; /* heartbeats that still carry loads after the last change */
    char description[384];
};

/* attention_admit.c, between batches; pages that are handed out join batch.clear */
void attention_wait(struct attention *self, struct sequence *sequence); /* in order of rank */
/* Every running sequence gets a page for its next row; where there is none, somebody is put back. */
void attention_grow(struct attention *self);
/* Waiting sequences that fit run. */
void attention_admit(struct attention *self);

/* attention_pages.c */
bool pages_init(struct attention *self);
void pages_free(struct attention *self);
uint32_t pages_available(const struct pages *self);
/* How many known pages a waiting sequence begins with, listed in sequence->page but not yet held; how
 * many of these are idle. */
uint32_t pages_find(struct attention *self, struct sequence *sequence, uint32_t *ret_idle);
/* Holds those found: their positions count as computed. */
void pages_share(struct attention *self, struct sequence *sequence, uint32_t count);
/* `count` further pages, which must be available; they join batch.clear. */
void pages_take(struct attention *self, struct sequence *sequence, uint32_t count);
/* Pages that have become complete may be shared from now on. Not while the sequence is in a batch. */
void pages_learn(struct attention *self, struct sequence *sequence);
void pages_drop(struct attention *self, struct sequence *sequence);
/* NULL, or which invariant does not hold. */
const char *pages_broken(const struct attention *self);

/* attention_sequence.c */
void attention_on_submit(struct attention *self, const message *envelope, struct effects *out);
void attention_on_poll(struct attention *self, const message *envelope, struct effects *out);
void attention_on_cancel(struct attention *self, const message *envelope);
void attention_cancel_gateway(struct attention *self, actor_id gateway);
/* Between batches: some more sequences go back to their gateways, which submit them elsewhere. */
void attention_hand_over(struct attention *self, uint64_t now_ns, struct effects *out);
void sequence_finish(struct sequence *sequence, Troupe__FinishReason reason, uint32_t stopped_by);
/* A running sequence leaves: kept as DONE, or dropped if it was cancelled. Not while it is in a
 * batch. */
void attention_retire(struct attention *self, struct sequence *sequence);
void attention_leave(struct attention *self, struct sequence *sequence); /* running: its pages go */
void attention_stop_waiting(struct attention *self, struct sequence *sequence);
void attention_drop_all(struct attention *self);
bool sequence_draws(
    const struct sequence *sequence); /* another token is wanted after the known ones */
/* Appends a drawn token and decides whether the sequence is finished. */
void attention_append(struct attention *self, struct sequence *sequence, uint32_t token);
bool token_counts_add(struct token_counts *self, uint32_t token);
void token_counts_pop(struct token_counts *self, uint32_t token); /* undoes the last add */
bool sequence_counts_output(const struct sequence *sequence); /* for a penalty */

/* attention_batch.c */
bool batch_init(struct attention *self);
void batch_free(struct attention *self);
void batch_start(struct attention *self, uint64_t now_ns,
                 struct effects *out); /* if idle and there is work */
void batch_computed(struct attention *self, const struct program_result *result, uint64_t now_ns,
                    struct effects *out);
void batch_combine(struct attention *self, struct effects *out); /* all experts have answered */
void batch_end(struct attention *self, uint64_t now_ns, struct effects *out);
struct program *batch_program(struct attention *self, struct effects *out, enum program_kind kind,
                              uint32_t layer);

/* attention_dispatch.c */
bool flight_init(struct attention *self);
void flight_free(struct attention *self);
void dispatch_adopt(struct attention *self, const Troupe__Commit *commit, uint64_t now_ns,
                    struct effects *out);
void dispatch_start(struct attention *self, const uint16_t *choice, uint64_t now_ns,
                    struct effects *out);
void dispatch_on_combine(struct attention *self, const struct frame *frame, uint64_t now_ns,
                         struct effects *out);
void dispatch_on_moved(struct attention *self, const struct frame_header *header, uint64_t now_ns,
                       struct effects *out);
void dispatch_peer_lost(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out);
void dispatch_timer(struct attention *self, uint64_t now_ns, struct effects *out);
/* How long an answer may take before somebody else is asked as well, given its usual time (0: not known). */
uint64_t hedge_after_ns(const struct attention *self, uint64_t usual_ns);
/* Earliest deadline of the parts. */
uint64_t parts_deadline(const struct part *part, uint32_t parts);
/* The one place where replies are judged: the outstanding part that `header` answers, or NULL
 * (counted as stale). */
struct part *reply_part(struct attention *self, const struct frame_header *header, enum role role,
                        struct part *part, uint32_t parts, struct effects *out);

/* attention_dispatch.c, for attention_audit.c */
uint32_t dispatch_destination(const struct attention *self, actor_id id); /* index, UINT32_MAX: unknown */
bool dispatch_survey(struct attention *self, actor_id excluded, bool desperate, uint64_t now_ns);
void dispatch_send_part(struct attention *self, const struct part *part, uint32_t number,
                        const struct dispatch_part *planned, struct effects *out);
void dispatch_trust(struct attention *self, const struct part *part, uint64_t now_ns);
void dispatch_suspect(struct attention *self, const struct part *part, uint64_t now_ns, struct effects *out);
/* Rows that are with somebody go to others. */
void dispatch_leave(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out);
/* Items may wait for a holder that was only believed lost: believe in it again rather than wait for ever. */
void dispatch_believe(struct attention *self);
/* The layer is over if every item is there and every audit settled. */
void dispatch_finish(struct attention *self, struct effects *out);

/* attention_audit.c: all but audit_start may be called while no experts are at work. */
bool audit_init(struct attention *self);
void audit_free(struct attention *self);
/* The first plan of a layer has been sent: chooses what is checked and asks for it. */
void audit_start(struct attention *self, uint64_t now_ns, struct effects *out);
/* An answer to (row, slot); `taken`: it has been scattered. */
void audit_answer(struct attention *self, uint32_t row, uint32_t slot, const struct frame_header *header,
                  const uint8_t *bytes, bool taken, struct effects *out);
/* After answers or changes around: asks for what is lacking; rows at liars go elsewhere. */
void audit_review(struct attention *self, uint64_t now_ns, struct effects *out);
void audit_on_combine(struct attention *self, const struct frame *frame, uint64_t now_ns, struct effects *out);
void audit_on_moved(struct attention *self, const struct frame_header *header, uint64_t now_ns,
                    struct effects *out);
void audit_adopt(struct attention *self, uint64_t now_ns, struct effects *out);
void audit_peer_lost(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out);
void audit_timer(struct attention *self, uint64_t now_ns, struct effects *out);
uint64_t audit_deadline(const struct attention *self);
void audit_fill_heartbeat(const struct attention *self, Troupe__Heartbeat *heartbeat, struct effects *out);

/* attention_sample.c */
void sample_start(struct attention *self, uint64_t now_ns, struct effects *out);
void sample_on_sampled(struct attention *self, const struct frame *frame, uint64_t now_ns,
                       struct effects *out);
void sample_adopt(struct attention *self, uint64_t now_ns, struct effects *out);
void sample_peer_lost(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out);
void sample_timer(struct attention *self, uint64_t now_ns, struct effects *out);

/* Words that a draw needs when it takes `drafts` guesses for true, and where they are put: at `word`; returns their end. */
uint32_t sample_words(const struct attention *self, struct sequence *sequence, uint32_t drafts);
uint32_t *sample_put_words(const struct attention *self, struct sequence *sequence, uint32_t drafts,
                           struct sample_spec *spec, uint32_t *word);

/* attention_draft.c */
bool drafts_on(const struct attention *self);
void draft_begin(struct sequence *sequence);
/* The batch's draws become tokens, as far as the guesses they build on are true. */
void draft_settle(struct attention *self);
/* Asks for the guesses of the next batch; false: there is nothing to remember or to guess. */
bool draft_start(struct attention *self, struct effects *out);
void draft_computed(struct attention *self, const struct program_result *result);

/* attention_report.c */
void report_batch(struct attention *self,
                  struct effects *out); /* what the batch brought, per gateway */
void report_sequence(struct attention *self, struct sequence *sequence, uint32_t first_token,
                     uint32_t first_prompt, struct effects *out);
void report_rejected(struct attention *self, actor_id gateway, uint64_t sequence, int code,
                     bool unknown, const char *reason, struct effects *out);
/* It would be run if this version of the routing bias were here. */
void report_bias_wanted(struct attention *self, actor_id gateway, const Troupe__Submit *submit,
                        struct effects *out);

/* attention_trace.c */
bool step_trace_init(struct attention *self);
void step_trace_free(struct attention *self);
bool sequence_trace_create(const struct attention *self, struct sequence *sequence);
void sequence_trace_free(struct sequence *sequence);
void step_trace_begin(struct attention *self); /* the rows of a step are chosen */
void step_trace_computed(struct attention *self, const struct program_result *result);
void step_trace_answered(struct attention *self); /* all experts have */
void step_trace_scatter(struct attention *self, actor_id from, const uint32_t *item_row, uint32_t count);
void step_trace_sampling(struct attention *self); /* the final rows are there */
void step_trace_sampled(struct attention *self, actor_id from, const struct sequence *sequence);
void step_trace_end(struct attention *self); /* before the sequences move on */
Troupe__Trace *step_trace_tell(const struct attention *self, struct sequence *sequence,
                          struct effects *out);

#endif
