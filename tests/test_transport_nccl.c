/* The NCCL transport against a fake NCCL (tests/support/fake_nccl.c): edges are set up, carry
 * frames in order, bounded by what the receiver has room for; a dead or hung peer ends its own
 * edges only and is told as lost within the bound; a restarted peer is reached again; faults of
 * every call, by seed; nothing is left behind. Time and the control plane are virtual. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/log.h"
#include "actors/host/transport_nccl.h"
#include "actors/host/weights_frame.h"
#include "tests/support/fake_nccl.h"
#include "tests/support/random.h"
#include "tests/support/step.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

enum { ENDS_MAX = 8, INBOX = 512, SLOTS = 3, SLOT_BYTES = 1024 };
#define MS 1000000ull

static uint64_t now;
static uint64_t clock_virtual(void) {
    return now;
}

/* ---- The world: ends and the control plane between them ---- */

struct letter {
    uint64_t at_ns;
    struct nccl_message message;
};
struct end {
    struct fake_process *process;
    struct bell bell;
    struct transport *transport;
    uint64_t incarnation;
    char name[32];
    bool alive;
    char known[ENDS_MAX + 1][ADDRESS_BYTES_MAX]; /* by actor id: the number of an end + 1 */
    struct letter inbox[INBOX];
    uint32_t letters;
    uint64_t sent[ENDS_MAX], received[ENDS_MAX]; /* by end: the last batch */
    uint32_t frames[ENDS_MAX];                   /* received, by end */
    uint32_t losses[ENDS_MAX];
    uint64_t lost_at_ns[ENDS_MAX];
};
static struct end ends[ENDS_MAX];
static struct fake_nccl *fake;
static struct transport *graves[256]; /* of killed ends, freed with the world */
static int graves_count;
static uint64_t random_state;
static uint32_t drop_per_mille;
static struct nccl_edge_options edge_options;

static void post_connect(void *context, actor_id id, const char *address) {
    snprintf(((struct end *)context)->known[id], ADDRESS_BYTES_MAX, "%s", address);
}
static void post_disconnect(void *context, actor_id id) {
    (void)context, (void)id; /* what is on its way still arrives, as with a mailbox that drains */
}
static void post_send(void *context, actor_id to, const struct nccl_message *note) {
    struct end *from = context;
    if (random_below(&random_state, 1000) < drop_per_mille)
        return;
    struct failure failure;
    assert_int_equal(nccl_message_check(note, sizeof *note, &failure), 0);
    for (int i = 0; i < ENDS_MAX; i++) {
        struct end *end = &ends[i];
        if (!end->alive || strcmp(end->name, from->known[to]) != 0 || end->letters == INBOX)
            continue;
        uint64_t at = now + random_below(&random_state, 3) * MS;
        /* in the order in which they were sent, as a connection keeps it */
        if (end->letters > 0 && end->inbox[end->letters - 1].at_ns > at)
            at = end->inbox[end->letters - 1].at_ns;
        end->inbox[end->letters++] = (struct letter){at, *note};
    }
}
static bool post_receive(void *context, struct nccl_message *ret) {
    struct end *end = context;
    if (end->letters == 0 || end->inbox[0].at_ns > now)
        return false;
    *ret = end->inbox[0].message;
    memmove(end->inbox, end->inbox + 1, --end->letters * sizeof *end->inbox);
    return true;
}
static void post_close(void *context) {
    (void)context;
}

static void end_open(int number, uint64_t incarnation) {
    struct end *end = &ends[number];
    struct failure failure;
    memset(end, 0, sizeof *end);
    end->process = fake_process_make(fake);
    end->incarnation = incarnation;
    end->alive = true;
    snprintf(end->name, sizeof end->name, "end-%d-%llx", number, (unsigned long long)incarnation);
    assert_int_equal(bell_create(&end->bell, NULL, incarnation, &failure), 0);
    struct transport_options options = {
        .name = end->name,
        .incarnation = incarnation,
        .bell = &end->bell,
        .check_crc = true,
        .waiting_bytes_max = 6000,
    };
    struct nccl_options nccl = {
        .api = fake_process_api(end->process),
        .post = {end, post_connect, post_disconnect, post_send, post_receive, post_close,
                 end->name},
        .now_ns = clock_virtual,
        .inline_keeper = true,
        .edge = edge_options,
        .channels_max = 1,
    };
    assert_int_equal(transport_nccl_open(&end->transport, &options, &nccl, &failure), 0);
}

static void end_connect(int from, int to) {
    struct failure failure;
    assert_int_equal(ends[from].transport->class->connect(ends[from].transport, (actor_id)to + 1,
                                                          ends[to].incarnation, ends[to].name,
                                                          &failure),
                     0);
}

/* The process is gone: its device stops; what it had stays with nobody. */
static void end_kill(int number, bool told) {
    struct end *end = &ends[number];
    end->alive = false;
    end->letters = 0;
    fake_process_kill(end->process, told);
    graves[graves_count++] = end->transport;
    bell_close(&end->bell);
    end->bell.page = NULL;
    end->transport = NULL;
}

static void world_begin(uint64_t seed) {
    random_state = seed;
    now = 1000 * MS;
    drop_per_mille = 0;
    memset(ends, 0, sizeof ends);
    fake = fake_nccl_make(seed + 1);
    edge_options = (struct nccl_edge_options){
        .slots = SLOTS,
        .slot_bytes = SLOT_BYTES,
        .offer_retry_ns = 20 * MS,
        .make_ns = 300 * MS,
        .frame_ns = 100 * MS,
        .pause_ns = 10 * MS,
        .failures_max = 1000,
    };
}

static void check_arrival(struct end *end, const struct frame *frame) {
    const struct frame_header *header = frame->header;
    const uint32_t from = header->from - 1;
    assert_true(from < ENDS_MAX);
    assert_int_equal(header->from_incarnation, ends[from].incarnation);
    assert_true(header->batch > end->received[from]); /* in order, none twice */
    end->received[from] = header->batch;
    end->frames[from]++;
    const uint8_t *rows = frame_rows(frame);
    for (uint32_t i = 0; i < header->items * header->row_bytes; i++)
        assert_int_equal(rows[i], (uint8_t)(header->batch + i));
}

/* Frames of weights go to whoever plays the actor. */
static void (*on_message)(const struct frame *frame);

/* A millisecond for everybody. */
static void turn(void) {
    now += MS;
    for (int i = 0; i < 3; i++)
        fake_nccl_turn(fake);
    for (int i = 0; i < ENDS_MAX; i++) {
        struct end *end = &ends[i];
        if (!end->alive)
            continue;
        end->transport->class->progress(end->transport);
        struct incoming incoming;
        while (end->transport->class->receive(end->transport, &incoming)) {
            if (incoming.frame.header->kind == FRAME_MESSAGE)
                on_message(&incoming.frame);
            else
                check_arrival(end, &incoming.frame);
            end->transport->class->release(end->transport, &incoming);
        }
        end->transport->class->flush(end->transport);
        actor_id id;
        uint64_t incarnation;
        while (transport_nccl_lost(end->transport, &id, &incarnation)) {
            end->losses[id - 1]++;
            end->lost_at_ns[id - 1] = now;
        }
    }
}

static void turns(int count) {
    for (int i = 0; i < count; i++)
        turn();
}

static void gather(void *context, void *ret_rows) {
    const struct frame_header *header = context;
    for (uint32_t i = 0; i < header->items * header->row_bytes; i++)
        ((uint8_t *)ret_rows)[i] = (uint8_t)(header->batch + i);
}

static int send_frame(int from, int to, uint32_t items) {
    struct outgoing frame = {.seal = true, .gather = gather};
    frame.header = (struct frame_header){
        .magic = FRAME_MAGIC,
        .version = FRAME_VERSION,
        .kind = FRAME_COMBINE,
        .from = (uint32_t)from + 1,
        .to = (uint32_t)to + 1,
        .from_incarnation = ends[from].incarnation,
        .to_incarnation = ends[to].incarnation,
        .batch = ends[from].sent[to] + 1,
        .rows = items,
        .items = items,
        .row_bytes = 64,
    };
    frame.bytes = frame_bytes(FRAME_COMBINE, items, items, 0, 64);
    frame.rows_offset = frame_rows_offset(FRAME_COMBINE, items, items, 0);
    frame.header.payload_bytes = (uint32_t)(frame.bytes - sizeof frame.header);
    frame.context = &frame.header;
    int error =
        ends[from].transport->class->post_send(ends[from].transport, (actor_id)to + 1, &frame);
    if (error == 0)
        ends[from].sent[to]++;
    return error;
}

static bool connected(int from, int to) {
    return ends[from].transport->class->connected(ends[from].transport, (actor_id)to + 1);
}

static void wait_connected(int from, int to, int most) {
    for (int i = 0; i < most && !connected(from, to); i++)
        turn();
    if (!connected(from, to))
        fail_msg("%d does not reach %d: %s", from, to,
                 transport_nccl_describe(ends[from].transport));
}

static void world_end(void) {
    for (int i = 0; i < ENDS_MAX; i++)
        if (ends[i].alive)
            fake_process_hang(ends[i].process, false);
    turns(20);
    for (int i = 0; i < ENDS_MAX; i++)
        if (ends[i].transport != NULL && ends[i].alive)
            ends[i].transport->class->close(&ends[i].transport);
    struct fake_counts counts = fake_nccl_counts(fake);
    assert_int_equal(counts.comms, 0);
    assert_int_equal(counts.streams, 0);
    assert_int_equal(counts.events, 0);
    assert_int_equal(counts.registrations, 0);
    assert_int_equal(counts.memory, 0);
    assert_int_equal(counts.pinned, 0);
    for (int i = 0; i < ENDS_MAX; i++)
        if (ends[i].bell.page != NULL)
            bell_close(&ends[i].bell);
    while (graves_count > 0) /* what the operating system would take back */
        graves_count--, graves[graves_count]->class->close(&graves[graves_count]);
    fake_nccl_free(fake);
}

/* ---- Tests ---- */

static void test_an_edge_is_set_up_and_carries_frames(void **state) {
    for (int first = 0; first < 2; first++) {
        world_begin(11 + (uint64_t)first);
        end_open(0, 0xa0), end_open(1, 0xb0);
        end_connect(first, 1 - first);
        turns(100); /* the other end does not know of it yet */
        assert_false(connected(first, 1 - first));
        assert_int_equal(send_frame(first, 1 - first, 1), ERR_NOT_FOUND);
        end_connect(1 - first, first);
        wait_connected(0, 1, 200);
        wait_connected(1, 0, 200);
        end_connect(0, 1); /* again: the same edge */
        assert_true(connected(0, 1));
        for (uint32_t i = 0; i < 200; i++) {
            assert_int_equal(send_frame(0, 1, 1 + i % 10), 0);
            if (i % 2 == 0)
                assert_int_equal(send_frame(1, 0, 1 + i % 5), 0);
            turns(4);
        }
        turns(100);
        assert_int_equal(ends[1].frames[0], 200);
        assert_int_equal(ends[0].frames[1], 100);
        assert_int_equal(ends[0].losses[1] + ends[1].losses[0], 0);
        world_end();
    }
}

/* No more frames are under way than there are slots; the rest wait in order, up to a bound. */
static void test_room_is_bounded(void **state) {
    world_begin(5);
    end_open(0, 0xa0), end_open(1, 0xb0);
    end_connect(0, 1), end_connect(1, 0);
    wait_connected(0, 1, 300);
    assert_int_equal(send_frame(0, 1, 16), ERR_TOO_LARGE); /* 16 rows of 64 and a header */
    uint32_t sent = 0;
    int error;
    while ((error = send_frame(0, 1, 8)) == 0)
        sent++;
    assert_int_equal(error, ERR_BUSY);
    assert_int_equal(sent, SLOTS + 6000 / frame_bytes(FRAME_COMBINE, 8, 8, 0, 64));
    assert_int_equal(ends[0].transport->counters.deferred, sent - SLOTS);
    turns(300);
    assert_int_equal(ends[1].frames[0], sent);
    assert_int_equal(ends[0].losses[1], 0);
    world_end();
}

/* A triangle; one end dies or hangs while frames move. Its edges end, told as lost within the
 * bound; the edge between the others carries on. Restarted, it is reached again. */
static void peer_fails(uint64_t seed, bool dies, bool told) {
    world_begin(seed);
    for (int i = 0; i < 3; i++)
        end_open(i, 0xa0 + (uint64_t)i);
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            if (i != j)
                end_connect(i, j);
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            if (i != j)
                wait_connected(i, j, 500);
    for (int i = 0; i < 50; i++) {
        send_frame(0, 1, 3), send_frame(1, 0, 2), send_frame(2, 0, 2), send_frame(1, 2, 1);
        turns(2);
    }
    const uint64_t failed_ns = now;
    if (dies)
        end_kill(2, told);
    else
        fake_process_hang(ends[2].process, true);
    const uint32_t before = ends[1].frames[0];
    for (int i = 0; i < 150; i++) {
        send_frame(0, 1, 3), send_frame(1, 2, 2), send_frame(0, 2, 1);
        turn();
    }
    for (int i = 0; i < 2; i++) {
        assert_true(ends[i].losses[2] >= 1);
        assert_true(ends[i].lost_at_ns[2] - failed_ns <= edge_options.frame_ns + 40 * MS ||
                    ends[i].losses[2] > 1);
        assert_int_equal(ends[i].losses[1 - i], 0);
    }
    assert_true(connected(0, 1) && connected(1, 0));
    assert_true(ends[1].frames[0] >= before + 40); /* nobody else's frames were held up */
    if (!dies) { /* it comes to itself: the lanes are made anew, for the same incarnation */
        fake_process_hang(ends[2].process, false);
        wait_connected(0, 2, 3000);
        wait_connected(2, 1, 3000);
        turns(200); /* what was on its way before */
        uint32_t had = ends[2].frames[0];
        assert_int_equal(send_frame(0, 2, 4), 0);
        turns(50);
        assert_int_equal(ends[2].frames[0], had + 1);
    } else {
        end_open(2, 0xc0);
        for (int i = 0; i < 2; i++) {
            ends[i].received[2] = 0, ends[i].sent[2] = 0;
            end_connect(i, 2), end_connect(2, i);
        }
        wait_connected(0, 2, 3000);
        wait_connected(2, 0, 3000);
        assert_int_equal(send_frame(0, 2, 4), 0);
        assert_int_equal(send_frame(2, 0, 4), 0);
        turns(50);
        assert_int_equal(ends[2].frames[0], 1);
    }
    world_end();
}

static void test_a_dead_peer_is_lost_alone(void **state) {
    for (uint64_t seed = 1; seed <= 10; seed++)
        for (int told = 0; told < 2; told++)
            peer_fails(seed, true, told);
}

static void test_a_hung_peer_is_lost_alone(void **state) {
    for (uint64_t seed = 1; seed <= 10; seed++)
        peer_fails(seed, false, false);
}

/* A peer that dies in each state of the set-up leaves nothing, and its successor is reached. */
static void test_a_peer_dies_in_every_state(void **state) {
    for (int when = 0; when < 60; when++) {
        world_begin(900 + (uint64_t)when);
        end_open(0, 0xa0), end_open(1, 0xb0);
        end_connect(0, 1), end_connect(1, 0);
        turns(when);
        end_kill(1, when % 2);
        turns(30);
        end_open(1, 0xb1);
        ends[0].received[1] = 0;
        ends[0].sent[1] = 0;
        end_connect(0, 1), end_connect(1, 0);
        wait_connected(0, 1, 3000);
        wait_connected(1, 0, 3000);
        assert_int_equal(send_frame(0, 1, 2), 0);
        turns(50);
        assert_int_equal(ends[1].frames[0], 1);
        world_end();
    }
}

/* Both ends forget each other and meet again, under the same incarnations. */
static void test_disconnect_is_no_loss(void **state) {
    world_begin(77);
    end_open(0, 0xa0), end_open(1, 0xb0);
    for (int round = 0; round < 5; round++) {
        end_connect(0, 1), end_connect(1, 0);
        wait_connected(0, 1, 2000);
        wait_connected(1, 0, 2000);
        assert_int_equal(send_frame(0, 1, 1), 0);
        turns(50);
        assert_int_equal(ends[1].frames[0], (uint32_t)round + 1);
        ends[0].transport->class->disconnect(ends[0].transport, 2);
        turns(round * 3);
        ends[1].transport->class->disconnect(ends[1].transport, 1);
    }
    turns(100);
    assert_int_equal(ends[0].losses[1] + ends[1].losses[0], 0);
    assert_int_equal(fake_nccl_counts(fake).comms, 0);
    world_end();
}

/* Every call fails at times, messages get lost, processes hang, die and come back. Frames arrive in
 * order and whole or not at all; when the faults stop, every edge comes up and carries frames. */
static void one_seed(uint64_t seed) {
    world_begin(seed);
    if (getenv("SEED") == NULL)
        print_message("seed %llu\n", (unsigned long long)seed);
    struct fake_faults faults = {
        .id_fails = random_below(&random_state, 200),
        .memory_fails = random_below(&random_state, 100),
        .init_fails = random_below(&random_state, 200),
        .init_hangs = random_below(&random_state, 200),
        .register_fails = random_below(&random_state, 100),
        .group_fails = random_below(&random_state, 20),
        .launch_pends = random_below(&random_state, 500),
        .async_error = random_below(&random_state, 5),
    };
    const int count = 2 + (int)random_below(&random_state, 3);
    drop_per_mille = random_below(&random_state, 30);
    uint64_t next_incarnation = 0x1000;
    fake_nccl_faults(fake, &faults);
    for (int i = 0; i < count; i++)
        end_open(i, next_incarnation++);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++)
            if (i != j)
                end_connect(i, j);
    for (int t = 0; t < 1200; t++) {
        int a = (int)random_below(&random_state, (uint32_t)count);
        int b = (int)random_below(&random_state, (uint32_t)count);
        if (a != b)
            send_frame(a, b, 1 + random_below(&random_state, 12));
        if (random_below(&random_state, 400) == 0)
            fake_process_hang(ends[a].process, random_below(&random_state, 2) == 0);
        if (a != b && random_below(&random_state, 300) == 0) {
            ends[a].transport->class->disconnect(ends[a].transport, (actor_id)b + 1);
            end_connect(a, b);
        }
        if (random_below(&random_state, 400) == 0) {
            end_kill(a, random_below(&random_state, 2) == 0);
            turns((int)random_below(&random_state, 20));
            end_open(a, next_incarnation++);
            for (int i = 0; i < count; i++)
                if (i != a) {
                    ends[i].received[a] = ends[i].sent[a] = 0;
                    end_connect(i, a), end_connect(a, i);
                }
        }
        turn();
    }
    fake_nccl_faults(fake, &(struct fake_faults){0});
    drop_per_mille = 0;
    for (int i = 0; i < count; i++)
        fake_process_hang(ends[i].process, false);
    turns(1500);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++)
            if (i != j) {
                const uint32_t had = ends[j].frames[i];
                /* An end whose CLOSE was lost is found out by the first frame. */
                for (int attempt = 0; attempt < 2 && ends[j].frames[i] == had; attempt++) {
                    wait_connected(i, j, 4000);
                    assert_int_equal(send_frame(i, j, 5), 0);
                    turns(60);
                }
                if (ends[j].frames[i] <= had)
                    fail_msg("seed %llu: the frame from %d to %d has not come: %s",
                             (unsigned long long)seed, i, j,
                             transport_nccl_describe(ends[j].transport));
            }
    world_end();
}

static void test_faults_by_seed(void **state) {
    const char *wanted = getenv("SEED");
    if (wanted != NULL) {
        one_seed(strtoull(wanted, NULL, 0));
        return;
    }
    const char *most = getenv("SEEDS");
    for (uint64_t seed = 1; seed <= (most != NULL ? strtoull(most, NULL, 0) : 60); seed++)
        one_seed(seed);
}

/* ---- Weights over an edge ---- */

/* End 0 is the host of expert actor 30, which has no file; end 1 that of 31, which holds everything and is
 * played here. Questions go over the control plane, answers over the edge while it is up. */
enum { IMAGE = 4 * WEIGHTS_BYTES_MAX + 1000 };
static struct stage asker;
static uint8_t *image;
static uint32_t over_edge, over_control;

static void take_piece(const struct frame *frame) {
    struct failure failure;
    message *envelope = weights_frame_take(frame, &failure);
    assert_non_null(envelope);
    over_edge++;
    stage_step(&asker, &(struct event){.kind = EVENT_MESSAGE, .message = envelope});
    wire_free(&envelope);
}

static void give_piece(const Troupe__Fetch *fetch) {
    Troupe__Weights weights = TROUPE__WEIGHTS__INIT;
    weights.transfer = fetch->transfer;
    weights.offset = fetch->offset;
    weights.total = IMAGE;
    weights.image_crc = crc32c(0, image, IMAGE);
    weights.data.data = image + fetch->offset;
    weights.data.len =
        IMAGE - fetch->offset < WEIGHTS_BYTES_MAX ? IMAGE - fetch->offset : WEIGHTS_BYTES_MAX;
    weights.data_crc = crc32c(0, weights.data.data, weights.data.len);
    weights.model_fingerprint = "fingerprint";
    message envelope = stage_envelope(31);
    envelope.body_case = TROUPE__ENVELOPE__BODY_WEIGHTS;
    envelope.weights = &weights;
    const size_t size = wire_packed_bytes(&envelope);
    uint8_t *bytes = malloc(size);
    wire_pack(&envelope, bytes);
    if (!weights_frame_post(ends[1].transport, 31, life_of(31), 1, bytes, size, true)) {
        over_control++;
        stage_message(&asker, &envelope);
    }
    free(bytes);
}

/* Answers what the asker has asked; true once it has all. */
static bool fetch_turn(void) {
    for (const struct effect *effect; (effect = stage_take(&asker, EFFECT_SEND)) != NULL;) {
        Troupe__Envelope *envelope;
        assert_int_equal(wire_unpack(&envelope, effect->send.bytes, effect->send.size, NULL), 0);
        if (envelope->body_case == TROUPE__ENVELOPE__BODY_FETCH &&
            random_below(&random_state, 1000) >= drop_per_mille)
            give_piece(envelope->fetch);
        wire_free(&envelope);
    }
    turn();
    stage_timer(&asker, now);
    const struct effect *load = stage_take(&asker, EFFECT_LOAD);
    if (load == NULL)
        return false;
    assert_non_null(load->load.image);
    assert_int_equal(load->load.image_bytes, IMAGE);
    assert_memory_equal(load->load.image, image, IMAGE);
    free(load->load.image);
    return true;
}

static void fetch_begin_all(void) {
    stage_init(&asker, ROLE_EXPERT);
    asker.config.hidden = asker.config.expert_width = 256; /* so that an image may be so long */
    asker.now_ns = now;
    asker.actor = expert_create(&asker.identity, &asker.settings, &asker.config, 0);
    expert_set_weights(asker.actor, WEIGHTS_PEER);
    stage_join(&asker, 30);
    stage_commit(&asker, (actor_id[]){31, 50}, 2, (actor_id[]){31}, 1);
    Troupe__Assign assign = TROUPE__ASSIGN__INIT;
    assign.operation = 1;
    assign.n_layer = assign.n_expert = 1;
    assign.layer = (uint32_t[]){1};
    assign.expert = (uint32_t[]){0};
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_ASSIGN;
    envelope.assign = &assign;
    stage_clear(&asker);
    stage_message(&asker, &envelope);
}

/* kind 0: all is well; 1: calls fail; 2: the giver's device hangs for a while; 3: it was never connected. */
static void fetch_seed(uint64_t seed, int kind) {
    world_begin(seed);
    edge_options.slot_bytes = (uint32_t)weights_frame_bytes();
    on_message = take_piece;
    over_edge = over_control = 0;
    end_open(0, OWN_LIFE), end_open(1, life_of(31));
    if (kind != 3) {
        end_connect(0, 1), end_connect(1, 0);
        wait_connected(1, 0, 500);
    }
    const struct fake_faults faults = {.memory_fails = 50,
                                       .init_fails = 100,
                                       .group_fails = 100,
                                       .launch_pends = 300,
                                       .async_error = 20};
    if (kind == 1)
        fake_nccl_faults(fake, &faults);
    drop_per_mille = kind == 0 ? 0 : 50;
    fetch_begin_all();
    const int hangs_at = (int)random_below(&random_state, 20);
    int turns_taken = 0;
    while (!fetch_turn()) {
        if (kind == 2 && turns_taken == hangs_at)
            fake_process_hang(ends[1].process, true);
        if (++turns_taken > 20000)
            fail_msg("seed %llu, kind %d: the weights do not come", (unsigned long long)seed, kind);
    }
    fake_nccl_faults(fake, &(struct fake_faults){0});
    drop_per_mille = 0;
    stage_free(&asker);
    world_end();
}

static void test_weights_come_over_the_edge(void **state) {
    image = malloc(IMAGE);
    for (uint32_t i = 0; i < IMAGE; i++)
        image[i] = (uint8_t)(i * 13 + i / 257);
    fetch_seed(1, 0);
    assert_int_equal(over_edge, 4); /* the last piece is small */
    assert_int_equal(over_control, 1);
    fetch_seed(2, 3);
    assert_true(over_edge == 0 && over_control >= 5);
    uint32_t edge = 0, control = 0;
    for (uint64_t seed = 1; seed <= 30; seed++)
        for (int kind = 1; kind <= 2; kind++) {
            fetch_seed(100 * seed, kind);
            edge += over_edge;
            control += over_control - 1;
        }
    assert_true(edge > 60 && control > 20); /* both ways were taken */
    free(image);
}

/* Only weights, and only from whom the frame says. */
static void test_other_messages_are_refused(void **state) {
    _Alignas(64) uint8_t bytes[4096];
    for (int kind = 0; kind < 3; kind++) {
        message envelope = stage_envelope(31);
        Troupe__Weights weights = TROUPE__WEIGHTS__INIT;
        Troupe__Fetch fetch = TROUPE__FETCH__INIT;
        weights.transfer = fetch.transfer = 7;
        weights.error = "it does not hold it";
        fetch.bytes = 1;
        envelope.body_case = kind == 1 ? TROUPE__ENVELOPE__BODY_FETCH : TROUPE__ENVELOPE__BODY_WEIGHTS;
        if (kind == 1)
            envelope.fetch = &fetch;
        else
            envelope.weights = &weights;
        const size_t size = wire_packed_bytes(&envelope);
        struct frame_header *header = (struct frame_header *)bytes;
        *header = (struct frame_header){.kind = FRAME_MESSAGE,
                                        .from = kind == 2 ? 32 : 31,
                                        .from_incarnation = life_of(31),
                                        .items = (uint32_t)(size + 3) / 4,
                                        .detail = (uint32_t)size};
        wire_pack(&envelope, bytes + sizeof *header);
        struct frame frame = {header, bytes + sizeof *header};
        struct failure failure;
        message *taken = weights_frame_take(&frame, &failure);
        if ((taken != NULL) != (kind == 0))
            fail_msg("kind %d: %s", kind, taken == NULL ? failure.text : "taken");
        wire_free(&taken);
        header->detail--; /* cut short */
        assert_null(weights_frame_take(&frame, &failure));
    }
}

/* Whatever a peer says, the end stays whole. */
static void test_messages_are_untrusted(void **state) {
    struct failure failure;
    struct nccl_message good = {.magic = NCCL_MESSAGE_MAGIC,
                                .version = NCCL_MESSAGE_VERSION,
                                .kind = NCCL_OFFER,
                                .sender = 1,
                                .slots = 2,
                                .slot_bytes = 64};
    assert_int_equal(nccl_message_check(&good, sizeof good, &failure), 0);
    assert_int_equal(nccl_message_check(&good, sizeof good - 1, &failure), ERR_CORRUPT);
    struct {
        size_t offset;
        uint32_t value;
        size_t bytes;
    } bad[] = {
        {offsetof(struct nccl_message, magic), 7, 4},
        {offsetof(struct nccl_message, version), 2, 2},
        {offsetof(struct nccl_message, kind), 0, 2},
        {offsetof(struct nccl_message, kind), NCCL_CLOSE + 1, 2},
        {offsetof(struct nccl_message, kind), NCCL_ACCEPT, 2},
        {offsetof(struct nccl_message, sender), 2, 4},
        {offsetof(struct nccl_message, sender), 0, 4},
        {offsetof(struct nccl_message, slots), 0, 4},
        {offsetof(struct nccl_message, slots), NCCL_SLOTS_MAX + 1, 4},
        {offsetof(struct nccl_message, slot_bytes), 0, 4},
        {offsetof(struct nccl_message, slot_bytes), 65, 4},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct nccl_message note = good;
        memcpy((uint8_t *)&note + bad[i].offset, &bad[i].value, bad[i].bytes);
        assert_true(nccl_message_check(&note, sizeof note, &failure) < 0);
    }
    /* Well-formed lies, at an edge in every state. */
    for (uint64_t seed = 1; seed <= 200; seed++) {
        world_begin(seed);
        end_open(0, 0xa0), end_open(1, 0xb0);
        end_connect(0, 1), end_connect(1, 0);
        turns((int)random_below(&random_state, 60));
        for (int i = 0; i < 20; i++) {
            struct nccl_message lie = good;
            lie.kind = (uint16_t)(NCCL_OFFER + random_below(&random_state, NCCL_CLOSE));
            lie.sender = lie.kind == NCCL_OFFER || lie.kind == NCCL_FRAME || lie.kind == NCCL_QUERY
                             ? 1
                         : lie.kind == NCCL_CLOSE ? random_below(&random_state, 2)
                                                  : 0;
            lie.from_incarnation = 0xb0;
            lie.to_incarnation = 0xa0;
            lie.generation = random_below(&random_state, 4);
            lie.sequence = random_below(&random_state, 6);
            lie.bytes = random_below(&random_state, 2000);
            lie.slots = 1 + random_below(&random_state, NCCL_SLOTS_MAX);
            lie.slot_bytes = 64 * (1 + random_below(&random_state, 40));
            /* An id that nobody else uses: the communicator is never made. */
            const uint64_t id = 0x8000000000000000u + seed * 100 + (uint64_t)i;
            memcpy(lie.id.bytes, &id, sizeof id);
            if (ends[0].letters < INBOX && lie.kind != NCCL_FRAME)
                ends[0].inbox[ends[0].letters++] = (struct letter){now, lie};
            send_frame(1, 0, 2);
            turns((int)random_below(&random_state, 10));
        }
        world_end();
    }
}

int main(void) {
    log_open(&(struct log_options){.name = "test", .stderr_level = TRACE_ERROR});
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_an_edge_is_set_up_and_carries_frames),
        cmocka_unit_test(test_room_is_bounded),
        cmocka_unit_test(test_a_dead_peer_is_lost_alone),
        cmocka_unit_test(test_a_hung_peer_is_lost_alone),
        cmocka_unit_test(test_a_peer_dies_in_every_state),
        cmocka_unit_test(test_disconnect_is_no_loss),
        cmocka_unit_test(test_faults_by_seed),
        cmocka_unit_test(test_messages_are_untrusted),
        cmocka_unit_test(test_weights_come_over_the_edge),
        cmocka_unit_test(test_other_messages_are_refused),
    };
    return cmocka_run_group_tests_name("transport nccl", tests, NULL, NULL);
}
