/* The ring and the shared-memory transport: order, wrapping, full rings, growth, restarts, and
 * memory that a peer has scribbled over. Both ends live in this process; that they can live in two
 * is what the live tests show. */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "actors/host/ring.h"
#include "actors/host/transport.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

static uint64_t random_state = 20240607;
static uint32_t draw(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}

static char stem[64];

static unsigned segments(void) {
    unsigned count = 0;
    DIR *directory = opendir("/dev/shm");
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;)
        count += strncmp(entry->d_name, stem, strlen(stem)) == 0;
    closedir(directory);
    return count;
}

static void ring_pair(struct ring *producer, struct ring *consumer, uint64_t capacity) {
    struct failure failure;
    assert_int_equal(ring_create(producer, stem, capacity, &failure), 0);
    assert_int_equal(ring_open(consumer, stem, &failure), 0);
    assert_int_equal(segments(), 0); /* the name is gone as soon as both ends have it */
}

/* Records of random sizes come out whole, in order, in one piece; the ring is full at times. */
static void test_ring_order(void **state) {
    struct ring producer, consumer;
    ring_pair(&producer, &consumer, 8192);
    uint32_t sent = 0, received = 0;
    unsigned busy = 0;
    uint32_t size_of[64];
    while (received < 20000) {
        void *room;
        uint32_t size = draw() % 4000;
        if (draw() % 3 != 0) {
            int error = ring_reserve(&producer, size, &room);
            if (error == 0) {
                assert_int_equal((uintptr_t)room % 64, 0);
                memset(room, (int)(sent & 0xff), size);
                size_of[sent++ % 64] = size;
                ring_commit(&producer);
            } else {
                assert_int_equal(error, ERR_BUSY);
                busy++;
            }
        } else {
            const void *bytes;
            size_t found;
            int result = ring_peek(&consumer, &bytes, &found);
            if (result == 0) {
                assert_int_equal(sent, received);
                continue;
            }
            assert_int_equal(result, 1);
            assert_int_equal(found, size_of[received % 64]);
            for (size_t i = 0; i < found; i++)
                assert_int_equal(((const uint8_t *)bytes)[i], received & 0xff);
            received++;
            ring_release(&consumer);
        }
    }
    assert_true(busy > 100);
    assert_int_equal(ring_reserve(&producer, 5000, &(void *){NULL}), ERR_TOO_LARGE);
    assert_int_equal(ring_reserve(&producer, SIZE_MAX, &(void *){NULL}), ERR_TOO_LARGE);
    ring_close(&producer);
    assert_true(ring_peer_closed(&consumer));
    ring_close(&consumer);
}

/* The consumer says that the producer waits exactly once after it found the ring full. */
static void test_ring_full_is_announced(void **state) {
    struct ring producer, consumer;
    ring_pair(&producer, &consumer, 1024);
    void *room;
    const void *bytes;
    size_t size;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ring_reserve(&producer, 400, &room), 0);
        ring_commit(&producer);
    }
    assert_int_equal(ring_reserve(&producer, 400, &room), ERR_BUSY);
    assert_int_equal(ring_peek(&consumer, &bytes, &size), 1);
    assert_true(ring_release(&consumer));
    assert_int_equal(ring_peek(&consumer, &bytes, &size), 1);
    assert_false(ring_release(&consumer));
    assert_int_equal(ring_reserve(&producer, 400, &room), 0);
    ring_close(&producer);
    ring_close(&consumer);
}

/* Whatever a peer writes over the shared part, the other side only ever sees records inside the
 * ring, or ERR_CORRUPT. */
static void test_ring_is_untrusted(void **state) {
    printf("seed %llu\n", (unsigned long long)random_state);
    for (int round = 0; round < 3000; round++) {
        struct ring producer, consumer;
        ring_pair(&producer, &consumer, 2048);
        void *room;
        for (uint32_t i = draw() % 4; i > 0; i--) {
            if (ring_reserve(&producer, draw() % 600, &room) == 0)
                ring_commit(&producer);
        }
        for (uint32_t i = 1 + draw() % 6; i > 0; i--) {
            uint64_t value = draw() % 3 == 0 ? UINT64_MAX - draw() % 128 : draw() % 4096;
            switch (draw() % 3) {
            case 0:
                atomic_store(&producer.page->head, value);
                break;
            case 1:
                atomic_store(&producer.page->tail, value);
                break;
            default:
                memcpy(producer.page->data + draw() % 32 * 64, &value, sizeof value);
            }
        }
        for (int i = 0; i < 40; i++) {
            const void *bytes = NULL;
            size_t size = 0;
            int result = ring_peek(&consumer, &bytes, &size);
            if (result != 1)
                break;
            const uint8_t *from = bytes;
            assert_true(from >= consumer.page->data && size <= 2048 &&
                        from + size <= consumer.page->data + 2048);
            ring_release(&consumer);
        }
        if (ring_reserve(&producer, 100, &room) == 0) {
            uint8_t *to = room;
            assert_true(to >= producer.page->data && to + 100 <= producer.page->data + 2048);
        }
        ring_close(&producer);
        ring_close(&consumer);
    }
}

static void test_ring_refuses_bad_headers(void **state) {
    struct ring producer, consumer;
    struct failure failure;
    assert_int_equal(ring_open(&consumer, stem, &failure), ERR_NOT_FOUND);
    assert_int_equal(ring_create(&producer, stem, 4096, &failure), 0);
    producer.page->capacity = 1u << 30; /* more than the file holds */
    assert_int_equal(ring_open(&consumer, stem, &failure), ERR_CORRUPT);
    producer.page->capacity = 4096;
    producer.page->version = 77;
    assert_int_equal(ring_open(&consumer, stem, &failure), ERR_CORRUPT);
    ring_close(&producer);
    assert_int_equal(segments(), 0);
}

/* Two ends of an edge. */
struct end {
    struct bell bell;
    struct transport *transport;
    char name[80];
    uint64_t incarnation;
};

static void end_open_with(struct end *end, unsigned number, uint64_t incarnation,
                          const struct transport_options *changes) {
    struct failure failure;
    char bell[BELL_NAME_BYTES];
    snprintf(end->name, sizeof end->name, "%s-%u-%llx", stem, number,
             (unsigned long long)incarnation);
    snprintf(bell, sizeof bell, "%s.bell", end->name);
    assert_int_equal(bell_create(&end->bell, bell, incarnation, &failure), 0);
    end->incarnation = incarnation;
    struct transport_options options = {
        .name = end->name,
        .incarnation = incarnation,
        .bell = &end->bell,
        .ring_bytes = changes->ring_bytes > 0 ? changes->ring_bytes : 8192,
        .check_crc = true,
        .waiting_bytes_max = 100000,
        .take_in = changes->take_in,
        .context = changes->context,
        .parallel = changes->parallel,
    };
    assert_int_equal(transport_shm_open(&end->transport, &options, &failure), 0);
}

static void end_open(struct end *end, unsigned number, uint64_t incarnation) {
    end_open_with(end, number, incarnation, &(struct transport_options){0});
}

static void end_close(struct end *end) {
    end->transport->class->close(&end->transport);
    bell_close(&end->bell);
}

static int end_connect(struct end *end, actor_id id, const struct end *peer) {
    struct failure failure;
    return end->transport->class->connect(end->transport, id, peer->incarnation, peer->name,
                                          &failure);
}

/* Two ends that know each other, as 20 and 10. */
static void pair_open(struct end *a, struct end *b) {
    end_open(a, 1, 0xaaaa);
    end_open(b, 2, 0xbbbb);
    end_connect(a, 20, b);
    end_connect(b, 10, a);
}

static void fill_rows(void *context, void *ret_rows) {
    memset(ret_rows, *(const uint8_t *)context, 64);
}

/* A COMBINE frame of `items` rows of 64 bytes, numbered by its batch. */
static struct outgoing make(const struct end *from, actor_id to, const struct end *receiver,
                            uint32_t items, uint64_t batch) {
    struct outgoing frame = {.seal = true};
    frame.header = (struct frame_header){
        .magic = FRAME_MAGIC,
        .version = FRAME_VERSION,
        .kind = FRAME_COMBINE,
        .from = 5,
        .to = to,
        .from_incarnation = from->incarnation,
        .to_incarnation = receiver->incarnation,
        .batch = batch,
        .rows = items,
        .items = items,
        .row_bytes = 64,
    };
    frame.bytes = frame_bytes(FRAME_COMBINE, items, items, 0, 64);
    frame.rows_offset = frame_rows_offset(FRAME_COMBINE, items, items, 0);
    frame.header.payload_bytes = (uint32_t)(frame.bytes - sizeof frame.header);
    return frame;
}

static int post(struct end *from, actor_id to, const struct end *receiver, uint32_t items,
                uint64_t batch) {
    uint8_t *fill = malloc(items);
    memset(fill, (int)batch, items);
    struct outgoing frame = make(from, to, receiver, items, batch);
    frame.gather = items == 1 ? fill_rows : NULL;
    frame.context = fill;
    int error = from->transport->class->post_send(from->transport, to, &frame);
    from->transport->class->flush(from->transport);
    free(fill);
    return error;
}

/* Receives one frame and returns its batch; 0: there is none. */
static uint64_t take(struct end *end) {
    struct incoming frame;
    end->transport->class->progress(end->transport);
    if (!end->transport->class->receive(end->transport, &frame))
        return 0;
    uint64_t batch = frame.frame.header->batch;
    assert_int_equal(((uintptr_t)frame.frame.payload - sizeof(struct frame_header)) % FRAME_ALIGN,
                     0);
    if (frame.frame.header->items == 1)
        assert_int_equal(*(const uint8_t *)frame_rows(&frame.frame), (uint8_t)batch);
    end->transport->class->release(end->transport, &frame);
    return batch;
}

/* Whichever end connects first, frames arrive in order in both directions, and nothing is left in
 * /dev/shm at the end. */
static void test_edge(void **state) {
    for (int sender_first = 0; sender_first < 2; sender_first++) {
        struct end a, b;
        end_open(&a, 1, 0xaaaa);
        end_open(&b, 2, 0xbbbb);
        if (!sender_first)
            assert_int_equal(end_connect(&b, 10, &a), 0);
        assert_int_equal(end_connect(&a, 20, &b), 0);
        assert_int_equal(post(&a, 20, &b, 1, 1), 0);
        if (sender_first)
            assert_int_equal(end_connect(&b, 10, &a), 0);
        assert_int_equal(end_connect(&a, 20, &b), 0); /* again: the same edge */
        assert_int_equal(post(&a, 20, &b, 1, 2), 0);
        assert_int_equal(take(&b), 1);
        assert_int_equal(take(&b), 2);
        assert_int_equal(take(&b), 0);
        assert_int_equal(post(&b, 10, &a, 3, 3), 0);
        assert_int_equal(take(&a), 3);
        assert_int_equal(post(&a, 99, &b, 1, 1), ERR_NOT_FOUND);
        end_close(&a);
        end_close(&b);
        assert_int_equal(segments(), 0);
    }
}

static void gather_must_not_run(void *context, void *ret_rows) {
    (void)context, (void)ret_rows;
    fail_msg("rows that lie in their place were gathered");
}

/* Posts a frame of one row that was written where `reserve` said. */
static int post_reserved(struct end *from, actor_id to, const struct end *receiver, void *memory,
                         uint64_t batch, bool summed) {
    struct outgoing frame = make(from, to, receiver, 1, batch);
    uint8_t *row = (uint8_t *)memory + frame.rows_offset;
    frame.gather = gather_must_not_run;
    frame.reserved = memory;
    frame.summed = summed;
    if (summed)
        frame.rows_crc = crc32c(0, row, 64);
    return from->transport->class->post_send(from->transport, to, &frame);
}

static void *reserve(struct end *from, actor_id to, uint64_t batch) {
    size_t bytes = frame_bytes(FRAME_COMBINE, 1, 1, 0, 64);
    uint8_t *memory = from->transport->class->reserve(from->transport, to, bytes);
    if (memory != NULL) {
        assert_int_equal((uintptr_t)memory % 64, 0);
        memset(memory + frame_rows_offset(FRAME_COMBINE, 1, 1, 0), (int)batch, 64);
    }
    return memory;
}

/* Rows written where the receiver reads them; whatever happens to the place meanwhile, no other rows arrive. */
static void test_rows_written_in_their_place(void **state) {
    struct end a, b;
    end_open(&a, 1, 0xaaaa);
    end_open(&b, 2, 0xbbbb);
    assert_null(reserve(&a, 20, 1)); /* no edge */
    end_connect(&a, 20, &b);
    end_connect(&b, 10, &a);
    uint64_t batch = 0;
    for (int i = 0; i < 300; i++) { /* round the ring several times */
        batch++;
        assert_int_equal(post_reserved(&a, 20, &b, reserve(&a, 20, batch), batch, i % 2 == 0), 0);
        assert_int_equal(take(&b), batch);
    }
    reserve(&a, 20, 7); /* not used: nothing has happened */
    assert_int_equal(take(&b), 0);
    void *memory = reserve(&a, 20, 8), *again = reserve(&a, 20, 9);
    assert_ptr_equal(memory, again);
    assert_int_equal(post(&a, 20, &b, 1, 10), 0); /* it takes the place */
    assert_int_equal(post_reserved(&a, 20, &b, memory, 9, false), ERR_STATE);
    assert_int_equal(take(&b), 10);
    assert_int_equal(take(&b), 0);
    memory = reserve(&a, 20, 11);
    b.transport->class->disconnect(b.transport, 10); /* the receiver leaves: lost, no more */
    assert_int_equal(post_reserved(&a, 20, &b, memory, 11, true), 0);
    end_connect(&b, 10, &a);
    assert_int_equal(post(&a, 20, &b, 1, 12), 0); /* in a new ring */
    assert_int_equal(take(&b), 12);
    while (post(&a, 20, &b, 10, 1) == 0 && a.transport->counters.deferred == 0)
        continue;
    assert_null(reserve(&a, 20, 1)); /* others wait before it */
    a.transport->class->disconnect(a.transport, 20);
    assert_null(reserve(&a, 20, 1));
    end_close(&a);
    end_close(&b);
}

/* Frames that others follow wake nobody, until half of the ring is full. */
static void test_frames_that_others_follow_wake_nobody(void **state) {
    struct end a, b;
    pair_open(&a, &b);
    a.transport->class->flush(a.transport);
    uint32_t rung = bell_seen(&b.bell), quiet = 0;
    struct outgoing frame = make(&a, 20, &b, 10, 1);
    for (frame.more = true; bell_seen(&b.bell) == rung; quiet++) {
        assert_true(quiet < 8192 / 640);
        assert_int_equal(a.transport->class->post_send(a.transport, 20, &frame), 0);
        a.transport->class->flush(a.transport);
    }
    assert_true(quiet >= 4096 / (640 + 256));
    for (uint32_t i = 0; i < quiet; i++)
        assert_int_equal(take(&b), 1);
    rung = bell_seen(&b.bell);
    assert_int_equal(a.transport->class->post_send(a.transport, 20, &frame), 0);
    a.transport->class->flush(a.transport);
    assert_int_equal(bell_seen(&b.bell), rung);
    frame.more = false;
    assert_int_equal(a.transport->class->post_send(a.transport, 20, &frame), 0);
    a.transport->class->flush(a.transport);
    assert_int_equal(bell_seen(&b.bell), rung + 1);
    end_close(&a);
    end_close(&b);
}

/* Who keeps received frames, as an engine does until it has combined them. */
struct keeper {
    struct end end;
    struct frame frame[64];
    unsigned frames, taken_in;
};

/* They are what they were. */
static void keeper_look(const struct keeper *keeper) {
    for (unsigned i = 0; i < keeper->frames; i++) {
        const uint8_t *row = frame_rows(&keeper->frame[i]);
        for (int b = 0; b < 64; b++)
            assert_int_equal(row[b], (uint8_t)keeper->frame[i].header->batch);
    }
}

static void keeper_take_in(void *context) {
    struct keeper *keeper = context;
    keeper_look(keeper); /* they can still be read */
    keeper->frames = 0;
    keeper->taken_in++;
}

static void keeper_open(struct keeper *keeper, uint64_t incarnation) {
    keeper->frames = keeper->taken_in = 0;
    end_open_with(&keeper->end, 2, incarnation,
                  &(struct transport_options){.take_in = keeper_take_in, .context = keeper});
}

/* Receives a frame and keeps it if it may and `keep` says so. Returns its batch; 0: there is none. */
static uint64_t keeper_take(struct keeper *keeper, bool keep) {
    struct transport *transport = keeper->end.transport;
    struct incoming frame;
    transport->class->progress(transport);
    if (!transport->class->receive(transport, &frame))
        return 0;
    uint64_t batch = frame.frame.header->batch;
    if (keep && transport->class->keep(transport, &frame)) {
        assert_true(keeper->frames < 64);
        keeper->frame[keeper->frames++] = frame.frame;
    }
    transport->class->release(transport, &frame);
    keeper_look(keeper);
    return batch;
}

static void test_frames_stay_until_they_are_released(void **state) {
    struct end a;
    struct keeper b;
    end_open(&a, 1, 0xaaaa);
    keeper_open(&b, 0xbbbb);
    end_connect(&a, 20, &b.end);
    end_connect(&b.end, 10, &a);
    struct transport *transport = b.end.transport;
    for (uint64_t round = 0; round < 50; round++) {
        for (uint64_t i = 1; i <= 20; i++) { /* each third is not kept */
            assert_int_equal(post(&a, 20, &b.end, 1, i), 0);
            assert_int_equal(keeper_take(&b, i % 3 != 0), i);
        }
        assert_int_equal(b.frames, 14);
        assert_int_equal(b.taken_in, 0);
        b.frames = 0;
        transport->class->release_kept(transport);
    }
    assert_int_equal(a.transport->counters.deferred, 0); /* the ring has 32 places */
    /* never released: they are taken in before room runs out, and all arrive */
    for (uint64_t i = 1; i <= 200; i++) {
        assert_int_equal(post(&a, 20, &b.end, 1, i), 0);
        assert_int_equal(keeper_take(&b, i % 5 != 0), i);
    }
    assert_true(b.taken_in >= 200 / 32);
    assert_int_equal(a.transport->counters.deferred, 0);
    end_close(&b.end);
    end_close(&a);
}

/* A frame that finds no room beside kept ones is what their keeper waits for: they make room for it. */
static void test_kept_frames_make_room(void **state) {
    struct end a;
    struct keeper b;
    end_open(&a, 1, 0xaaaa);
    keeper_open(&b, 0xbbbb);
    end_connect(&a, 20, &b.end);
    end_connect(&b.end, 10, &a);
    a.transport->class->flush(a.transport);
    for (uint64_t i = 1; i <= 40; i++) {
        const uint64_t deferred = a.transport->counters.deferred;
        const uint32_t rung = bell_seen(&b.end.bell);
        struct outgoing frame = make(&a, 20, &b.end, 45, i); /* three eighths of the ring */
        frame.more = true;
        assert_int_equal(a.transport->class->post_send(a.transport, 20, &frame), 0);
        a.transport->class->flush(a.transport);
        if (a.transport->counters.deferred > deferred) {
            assert_int_not_equal(bell_seen(&b.end.bell), rung);
            const uint32_t own = bell_seen(&a.bell);
            assert_int_equal(keeper_take(&b, true), 0);
            assert_int_not_equal(bell_seen(&a.bell), own);
            a.transport->class->progress(a.transport);
        }
        struct incoming got;
        assert_true(b.end.transport->class->receive(b.end.transport, &got));
        assert_int_equal(got.frame.header->batch, i);
        b.end.transport->class->keep(b.end.transport, &got);
        b.end.transport->class->release(b.end.transport, &got);
    }
    assert_true(a.transport->counters.deferred > 0);
    end_close(&b.end);
    end_close(&a);
}

/* Nothing that is kept is unmapped before it has been taken in. */
static void test_kept_frames_are_taken_in_when_their_ring_goes(void **state) {
    enum { SENDER_LEAVES, RECEIVER_LEAVES, RECEIVER_RECONNECTS, RING_GROWS, RING_BREAKS, ALL_CLOSES, WAYS };
    for (int way = 0; way < WAYS; way++) {
        struct end a;
        struct keeper b;
        end_open(&a, 1, 0xaaaa);
        keeper_open(&b, 0xbbbb);
        end_connect(&a, 20, &b.end);
        end_connect(&b.end, 10, &a);
        struct transport *transport = b.end.transport;
        for (uint64_t i = 1; i <= 5; i++) {
            assert_int_equal(post(&a, 20, &b.end, 1, i), 0);
            assert_int_equal(keeper_take(&b, true), i);
        }
        assert_int_equal(b.frames, 5);
        if (way == SENDER_LEAVES) {
            a.transport->class->disconnect(a.transport, 20);
            assert_int_equal(keeper_take(&b, true), 0);
        } else if (way == RECEIVER_LEAVES) {
            transport->class->disconnect(transport, 10);
        } else if (way == RECEIVER_RECONNECTS) { /* while a frame that is kept is out */
            struct incoming frame;
            assert_int_equal(post(&a, 20, &b.end, 1, 6), 0);
            assert_true(transport->class->receive(transport, &frame));
            assert_true(transport->class->keep(transport, &frame));
            b.frame[b.frames++] = frame.frame;
            transport->class->disconnect(transport, 10);
            transport->class->release(transport, &frame);
        } else if (way == RING_GROWS) {
            assert_int_equal(post(&a, 20, &b.end, 1000, 6), 0);
            assert_int_equal(keeper_take(&b, false), 6);
        } else if (way == RING_BREAKS) {
            /* the producer's counter, as a broken peer would leave it */
            char name[RING_NAME_BYTES];
            struct ring ring;
            struct failure failure;
            snprintf(name, sizeof name, "%s.%016llx", a.name, (unsigned long long)b.end.incarnation);
            assert_int_equal(ring_open(&ring, name, &failure), ERR_NOT_FOUND); /* its name is gone */
            struct ring_page *page =
                (struct ring_page *)((uintptr_t)b.frame[0].header / 4096 * 4096);
            assert_int_equal(page->capacity, 8192);
            atomic_store(&page->head, UINT64_MAX);
            assert_int_equal(keeper_take(&b, true), 0);
        } else {
            transport->class->close(&transport);
            b.end.transport = NULL;
        }
        assert_int_equal(b.frames, 0);
        assert_int_equal(b.taken_in, 1);
        if (b.end.transport != NULL)
            b.end.transport->class->close(&b.end.transport);
        bell_close(&b.end.bell);
        end_close(&a);
    }
}

static void run_serially(void *pool, void (*task)(void *argument, int part, int parts),
                         void *argument, int parts) {
    ++*(int *)pool;
    for (int part = parts; part-- > 0;)
        task(argument, part, parts);
}

/* Large frames are summed up by several threads, and refused when a bit is wrong, wherever it is. */
static void test_large_frames_are_summed_together(void **state) {
    int runs = 0;
    const struct parallel parallel = {run_serially, &runs, 3};
    struct end a, b;
    end_open_with(&a, 1, 0xaaaa, &(struct transport_options){.ring_bytes = 8u << 20});
    end_open_with(&b, 2, 0xbbbb, &(struct transport_options){.parallel = &parallel});
    end_connect(&a, 20, &b);
    end_connect(&b, 10, &a);
    uint64_t batch = 0;
    for (int i = 0; i < 60; i++) {
        struct outgoing frame = make(&a, 20, &b, 8192, ++batch);
        uint64_t bit = 1 + 8 * (96 + draw() % (frame.bytes - 96)) + draw() % 8;
        if (i % 2 == 1)
            frame.flip_after = i % 3 == 0 ? 8 * (96 + 8 * (uint64_t)i) + 1 : bit;
        assert_int_equal(a.transport->class->post_send(a.transport, 20, &frame), 0);
        assert_int_equal(take(&b), i % 2 == 1 ? 0 : batch);
    }
    assert_int_equal(b.transport->counters.refused, 30);
    assert_int_equal(runs, 60);
    assert_int_equal(post(&a, 20, &b, 1, 7), 0);
    assert_int_equal(take(&b), 7);
    assert_int_equal(runs, 60); /* a small one is not worth it */
    end_close(&a);
    end_close(&b);
}

/* A full ring defers frames in order, the bound drops them, the consumer's release moves them on.
 */
static void test_full_edge_defers(void **state) {
    struct end a, b;
    pair_open(&a, &b);
    uint64_t posted = 0;
    while (post(&a, 20, &b, 10, posted + 1) == 0)
        posted++;
    assert_true(a.transport->counters.deferred > 50);
    assert_int_equal(a.transport->counters.dropped, 1);
    uint32_t rung = bell_seen(&a.bell);
    for (uint64_t batch = 1; batch <= posted; batch++) {
        uint64_t got = take(&b);
        if (got == 0) {
            assert_int_not_equal(bell_seen(&a.bell), rung); /* b has told a that there is room */
            rung = bell_seen(&a.bell);
            a.transport->class->progress(a.transport);
            got = take(&b);
        }
        assert_int_equal(got, batch);
    }
    assert_int_equal(take(&b), 0);
    end_close(&a);
    end_close(&b);
}

/* A frame larger than the ring makes a larger ring; what lay in the old one is read first, and
 * nothing is lost even if the peer had not opened the first ring yet. */
static void test_edge_grows(void **state) {
    for (int opened = 0; opened < 2; opened++) {
        struct end a, b;
        end_open(&a, 1, 0xaaaa);
        end_open(&b, 2, 0xbbbb);
        end_connect(&a, 20, &b);
        if (opened)
            end_connect(&b, 10, &a);
        assert_int_equal(post(&a, 20, &b, 1, 1), 0);
        assert_int_equal(post(&a, 20, &b, 1000, 2), 0);
        assert_int_equal(post(&a, 20, &b, 1, 3), 0);
        if (!opened)
            end_connect(&b, 10, &a);
        a.transport->class->progress(a.transport);
        for (uint64_t batch = 1; batch <= 3; batch++)
            assert_int_equal(take(&b), batch);
        end_close(&a);
        end_close(&b);
        assert_int_equal(segments(), 0);
    }
}

/* A restarted peer has a new incarnation: frames for the old one never reach it. */
static void test_restart_is_fenced(void **state) {
    struct end a, b, c;
    end_open(&a, 1, 0xaaaa);
    end_open(&b, 2, 0xbbbb);
    end_connect(&a, 20, &b);
    assert_int_equal(post(&a, 20, &b, 1, 1), 0);
    end_close(&b);
    for (uint64_t i = 0; i < 300; i++)
        post(&a, 20, &b, 10, 2); /* to nobody: no harm */
    end_open(&c, 2, 0xcccc);
    assert_int_equal(end_connect(&a, 20, &b), 0); /* stale address, known edge */
    assert_int_equal(end_connect(&a, 20, &c), 0);
    assert_int_equal(end_connect(&c, 10, &a), 0);
    assert_int_equal(post(&a, 20, &b, 1, 3), 0); /* meant for the old incarnation */
    assert_int_equal(post(&a, 20, &c, 1, 4), 0);
    assert_int_equal(take(&c), 4);
    assert_int_equal(c.transport->counters.refused, 1);
    assert_int_equal(end_connect(&a, 30, &b), ERR_NOT_FOUND);
    end_close(&a);
    end_close(&c);
    assert_int_equal(segments(), 0);
}

/* A peer that disappears while its frame is being read. */
/* A restarted coordinator may give a peer another id: the edge of the old id is closed after or before that of
 * the new one is made, and the new one works, whether the peer had opened the old ring or not. */
static void test_a_peer_gets_another_id(void **state) {
    for (int order = 0; order < 2; order++) {
        struct end a, b;
        end_open(&a, 1, 0xaaaa);
        end_open(&b, 2, 0xbbbb);
        end_connect(&a, 20, &b);
        end_connect(&b, 10, &a);
        assert_int_equal(post(&a, 20, &b, 1, 1), 0);
        assert_int_equal(take(&b), 1);
        if (order == 0)
            a.transport->class->disconnect(a.transport, 20);
        assert_int_equal(end_connect(&a, 21, &b), 0);
        if (order == 1)
            a.transport->class->disconnect(a.transport, 20);
        assert_int_equal(post(&a, 21, &b, 1, 2), 0);
        assert_int_equal(take(&b), 2);
        assert_int_equal(post(&b, 10, &a, 1, 3), 0);
        assert_int_equal(take(&a), 3);
        end_close(&a);
        end_close(&b);
        assert_int_equal(segments(), 0);
    }
}

static void test_disconnect_with_a_frame_out(void **state) {
    struct end a, b;
    pair_open(&a, &b);
    post(&a, 20, &b, 1, 7);
    struct incoming frame;
    b.transport->class->progress(b.transport);
    assert_true(b.transport->class->receive(b.transport, &frame));
    end_close(&a);
    b.transport->class->disconnect(b.transport, 10);
    assert_false(b.transport->class->connected(b.transport, 10));
    assert_int_equal(frame.frame.header->batch, 7);
    b.transport->class->release(b.transport, &frame);
    end_close(&b);
    assert_int_equal(segments(), 0);
}

/* Somebody writes rubbish into a ring: the consumer drops the ring, and the edge works again with
 * the next one. */
static void test_malformed_ring_heals(void **state) {
    struct end a, b;
    end_open(&a, 1, 0xaaaa);
    end_open(&b, 2, 0xbbbb);
    /* a ring under a's name, made by somebody who writes rubbish */
    char name[RING_NAME_BYTES];
    struct ring rubbish;
    struct failure failure;
    snprintf(name, sizeof name, "%s.%016llx", a.name, (unsigned long long)b.incarnation);
    assert_int_equal(ring_create(&rubbish, name, 4096, &failure), 0);
    assert_int_equal(end_connect(&b, 10, &a), 0);
    atomic_store(&rubbish.page->head, 1000003);
    assert_int_equal(take(&b), 0);
    assert_true(ring_peer_closed(&rubbish));
    assert_int_equal(b.transport->counters.refused, 1);
    ring_close(&rubbish);
    /* the edge works once the real peer has made its ring */
    assert_int_equal(end_connect(&a, 20, &b), 0);
    assert_int_equal(post(&a, 20, &b, 1, 9), 0);
    assert_int_equal(take(&b), 9);
    end_close(&a);
    end_close(&b);
    assert_int_equal(segments(), 0);
}

/* A damaged frame is counted and left out; the ones around it arrive. */
static void test_damaged_frame_is_refused(void **state) {
    struct end b;
    struct ring ring;
    struct failure failure;
    struct end a;
    end_open(&a, 1, 0xaaaa);
    end_open(&b, 2, 0xbbbb);
    char name[RING_NAME_BYTES];
    snprintf(name, sizeof name, "%s.%016llx", a.name, (unsigned long long)b.incarnation);
    assert_int_equal(ring_create(&ring, name, 65536, &failure), 0);
    assert_int_equal(end_connect(&b, 10, &a), 0);
    for (uint64_t batch = 1; batch <= 200; batch++) {
        size_t bytes = frame_bytes(FRAME_COMBINE, 2, 2, 0, 64);
        struct frame_header *header;
        void *room;
        assert_int_equal(ring_reserve(&ring, bytes, &room), 0);
        memset(room, 0, bytes);
        header = room;
        *header = (struct frame_header){.magic = FRAME_MAGIC,
                                        .version = FRAME_VERSION,
                                        .kind = FRAME_COMBINE,
                                        .from_incarnation = a.incarnation,
                                        .to_incarnation = b.incarnation,
                                        .batch = batch,
                                        .rows = 2,
                                        .items = 2,
                                        .row_bytes = 64,
                                        .payload_bytes = (uint32_t)(bytes - sizeof *header)};
        frame_seal(header);
        if (batch % 2 == 0)
            ((uint8_t *)room)[draw() % bytes] ^= (uint8_t)(1u << draw() % 8);
        ring_commit(&ring);
        assert_int_equal(take(&b), batch % 2 == 0 ? 0 : batch);
    }
    assert_int_equal(b.transport->counters.refused, 100);
    ring_close(&ring);
    end_close(&a);
    end_close(&b);
}

/* Where /dev/shm is too small for the rings that are wanted, smaller ones do. */
static void test_no_room_for_large_rings(void **state) {
    struct end a, b;
    struct rlimit before, small;
    end_open(&a, 1, 0xaaaa);
    end_open(&b, 2, 0xbbbb);
    getrlimit(RLIMIT_FSIZE, &before);
    small = before;
    small.rlim_cur = 5000; /* the rings of these ends want 8192 */
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    assert_int_equal(end_connect(&a, 20, &b), ERR_NO_MEMORY);
    assert_false(a.transport->class->connected(a.transport, 20));
    small.rlim_cur = 200000;
    setrlimit(RLIMIT_FSIZE, &small);
    assert_int_equal(end_connect(&b, 10, &a), 0);
    assert_int_equal(post(&b, 10, &a, 1, 9), 0); /* the peer had room: its frames are read */
    assert_int_equal(take(&a), 9);
    assert_int_equal(post(&a, 20, &b, 1, 8), ERR_STATE);
    assert_int_equal(end_connect(&a, 20, &b), 0);
    assert_true(a.transport->class->connected(a.transport, 20));
    assert_int_equal(post(&a, 20, &b, 1, 1), 0);
    assert_int_equal(take(&b), 1);
    assert_int_equal(post(&a, 20, &b, 1000, 2), 0); /* grows to 128 KiB rather than 256 */
    a.transport->class->progress(a.transport);
    assert_int_equal(take(&b), 2);
    assert_int_equal(post(&a, 20, &b, 4000, 3),
                     ERR_TOO_LARGE); /* no room for that, but others still go */
    assert_int_equal(post(&a, 20, &b, 1, 4), 0);
    assert_int_equal(take(&b), 4);
    setrlimit(RLIMIT_FSIZE, &before);
    end_close(&a);
    end_close(&b);
    assert_int_equal(segments(), 0);
}

static void test_sweep(void **state) {
    struct bell bell;
    char name[BELL_NAME_BYTES];
    snprintf(name, sizeof name, "%s-left.bell", stem);
    assert_int_equal(bell_create(&bell, name, 1, NULL), 0);
    assert_int_equal(segments(), 1);
    transport_shm_sweep(stem);
    assert_int_equal(segments(), 0);
    bell_close(&bell);
}

int main(void) {
    snprintf(stem, sizeof stem, "troupe-test%d", getpid());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ring_order),
        cmocka_unit_test(test_ring_full_is_announced),
        cmocka_unit_test(test_ring_is_untrusted),
        cmocka_unit_test(test_ring_refuses_bad_headers),
        cmocka_unit_test(test_edge),
        cmocka_unit_test(test_rows_written_in_their_place),
        cmocka_unit_test(test_frames_that_others_follow_wake_nobody),
        cmocka_unit_test(test_frames_stay_until_they_are_released),
        cmocka_unit_test(test_kept_frames_make_room),
        cmocka_unit_test(test_kept_frames_are_taken_in_when_their_ring_goes),
        cmocka_unit_test(test_large_frames_are_summed_together),
        cmocka_unit_test(test_full_edge_defers),
        cmocka_unit_test(test_edge_grows),
        cmocka_unit_test(test_restart_is_fenced),
        cmocka_unit_test(test_a_peer_gets_another_id),
        cmocka_unit_test(test_disconnect_with_a_frame_out),
        cmocka_unit_test(test_malformed_ring_heals),
        cmocka_unit_test(test_damaged_frame_is_refused),
        cmocka_unit_test(test_no_room_for_large_rings),
        cmocka_unit_test(test_sweep),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
