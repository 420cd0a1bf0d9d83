/* Queues between the actors of one process.
 *
 * Invariant: an inbox holds only what passed wire_unpack or frame_check, and only for the incarnation that the inbox belongs to: who
 * joins under an address that was left gets a new, empty inbox. */
#include "actors/host/neighbours.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

struct letter {
    struct letter *next;
    message *envelope; /* NULL: a frame, in `data` */
    size_t bytes;
    _Alignas(64) uint8_t data[];
};

struct letters {
    struct letter *first, **last;
};

struct known {
    actor_id id;
    struct neighbour *who; /* NULL: nobody */
};

struct neighbour {
    struct neighbours *all;
    struct neighbour *next;
    char address[ADDRESS_BYTES_MAX];
    uint64_t incarnation;
    struct letters messages, frames;
    struct known *known;
    size_t knowns, capacity;
};

struct neighbours {
    struct neighbour *first;
};

static void letters_init(struct letters *self) {
    self->first = NULL;
    self->last = &self->first;
}

static void letters_add(struct letters *self, struct letter *letter) {
    letter->next = NULL;
    *self->last = letter;
    self->last = &letter->next;
}

static struct letter *letters_take(struct letters *self) {
    struct letter *letter = self->first;
    if (letter != NULL && (self->first = letter->next) == NULL)
        self->last = &self->first;
    return letter;
}

static void letters_free(struct letters *self) {
    for (struct letter *letter; (letter = letters_take(self)) != NULL;) {
        if (letter->envelope != NULL)
            wire_free(&letter->envelope);
        free(letter);
    }
}

struct neighbours *neighbours_open(void) {
    return calloc(1, sizeof(struct neighbours));
}

void neighbours_close(struct neighbours **self) {
    ASSERT(*self == NULL || (*self)->first == NULL);
    free(*self);
    *self = NULL;
}

static struct neighbour *at_address(const struct neighbours *self, const char *address) {
    struct neighbour *at = self->first;
    while (at != NULL && strcmp(at->address, address) != 0)
        at = at->next;
    return at;
}

struct neighbour *neighbour_join(struct neighbours *all, const char *address, uint64_t incarnation) {
    size_t length = strlen(address);
    struct neighbour *self = NULL;
    if (length < ADDRESS_BYTES_MAX && at_address(all, address) == NULL)
        self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    memcpy(self->address, address, length + 1);
    self->incarnation = incarnation;
    letters_init(&self->messages);
    letters_init(&self->frames);
    self->all = all;
    self->next = all->first;
    all->first = self;
    return self;
}

void neighbour_leave(struct neighbour **neighbour) {
    struct neighbour *self = *neighbour;
    if (self == NULL)
        return;
    struct neighbour **at = &self->all->first;
    while (*at != self)
        at = &(*at)->next;
    *at = self->next;
    for (struct neighbour *other = self->all->first; other != NULL; other = other->next) {
        for (size_t i = 0; i < other->knowns; i++) {
            if (other->known[i].who == self)
                other->known[i].who = NULL;
        }
    }
    letters_free(&self->messages);
    letters_free(&self->frames);
    free(self->known);
    free(self);
    *neighbour = NULL;
}

static struct known *find(const struct neighbour *self, actor_id id) {
    for (size_t i = 0; i < self->knowns; i++) {
        if (self->known[i].id == id)
            return &self->known[i];
    }
    return NULL;
}

void neighbour_connect(struct neighbour *self, actor_id id, const char *address) {
    struct known *known = find(self, id);
    if (known == NULL && self->knowns == self->capacity) {
        self->capacity = self->capacity > 0 ? 2 * self->capacity : 16;
        self->known = realloc(self->known, self->capacity * sizeof *self->known);
        ASSERT(self->known != NULL);
    }
    if (known == NULL)
        known = &self->known[self->knowns++];
    *known = (struct known){id, at_address(self->all, address)};
}

void neighbour_disconnect(struct neighbour *self, actor_id id) {
    struct known *known = find(self, id);
    if (known != NULL)
        *known = self->known[--self->knowns];
}

int neighbour_send(struct neighbour *self, actor_id to, void *bytes, size_t size) {
    const struct known *known = find(self, to);
    struct letter *letter = known != NULL && known->who != NULL ? calloc(1, sizeof *letter) : NULL;
    struct failure failure;
    int error = letter == NULL ? ERR_NOT_FOUND : wire_unpack(&letter->envelope, bytes, size, &failure);
    free(bytes);
    if (error < 0)
        free(letter);
    else
        letters_add(&known->who->messages, letter);
    return error;
}

message *neighbour_receive(struct neighbour *self) {
    struct letter *letter = letters_take(&self->messages);
    message *envelope = letter != NULL ? letter->envelope : NULL;
    free(letter);
    return envelope;
}

/* ---- the data plane ---- */


struct local {
    struct transport base;
    struct neighbour *neighbour;
    bool out; /* a received frame has not been released */
};

static int local_connect(struct transport *base, actor_id id, uint64_t incarnation, const char *address,
                         struct failure *failure) {
    struct local *self = (struct local *)base;
    const struct neighbour *to = at_address(self->neighbour->all, address);
    if (to == NULL || to->incarnation != incarnation)
        return fail(failure, ERR_NOT_FOUND, "no actor at %s in this process", address);
    neighbour_connect(self->neighbour, id, address);
    return 0;
}

static void local_disconnect(struct transport *base, actor_id id) {
    neighbour_disconnect(((struct local *)base)->neighbour, id);
}

static bool local_connected(const struct transport *base, actor_id id) {
    const struct known *known = find(((const struct local *)base)->neighbour, id);
    return known != NULL && known->who != NULL;
}

static int local_post(struct transport *base, actor_id to, const struct outgoing *frame) {
    struct local *self = (struct local *)base;
    const struct known *known = find(self->neighbour, to);
    if (known == NULL || known->who == NULL) {
        base->counters.dropped++;
        return ERR_NOT_FOUND;
    }
    struct letter *letter = aligned_alloc(64, (sizeof *letter + frame->bytes + 63) & ~(size_t)63);
    if (letter == NULL) {
        base->counters.dropped++;
        return ERR_BUSY;
    }
    struct outgoing unsealed = *frame;
    unsealed.seal = false; /* it never leaves this process */
    letter->envelope = NULL;
    letter->bytes = frame->bytes;
    outgoing_write(&unsealed, letter->data);
    letters_add(&known->who->frames, letter);
    base->counters.frames_sent++;
    base->counters.bytes_sent += frame->bytes;
    return 0;
}

static bool local_receive(struct transport *base, struct incoming *ret) {
    struct local *self = (struct local *)base;
    ASSERT(!self->out);
    for (struct letter *letter; (letter = letters_take(&self->neighbour->frames)) != NULL;) {
        const struct frame_header *header = (const void *)letter->data;
        struct failure failure;
        if (frame_check(letter->data, letter->bytes, false, &failure) == 0 &&
            header->to_incarnation == self->neighbour->incarnation) {
            base->counters.frames_received++;
            base->counters.bytes_received += letter->bytes;
            *ret = (struct incoming){{header, letter->data + sizeof *header}, letter};
            return self->out = true;
        }
        base->counters.refused++;
        free(letter);
    }
    return false;
}

static void local_release(struct transport *base, struct incoming *frame) {
    ((struct local *)base)->out = false;
    free(frame->edge);
}

static void local_flush(struct transport *base) {
    (void)base; /* nobody sleeps while there is something to do */
}

static bool local_progress(struct transport *base) {
    (void)base;
    return false;
}

static void local_close(struct transport **transport) {
    free(*transport);
    *transport = NULL;
}

static const struct transport_class local_class = {
    .name = "local",
    .connect = local_connect,
    .disconnect = local_disconnect,
    .connected = local_connected,
    .post_send = local_post,
    .flush = local_flush,
    .receive = local_receive,
    .release = local_release,
    .progress = local_progress,
    .close = local_close,
};

int transport_local_open(struct transport **ret, struct neighbour *neighbour, struct failure *failure) {
    struct local *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the transport within this process");
    self->base.class = &local_class;
    self->neighbour = neighbour;
    snprintf(self->base.address, sizeof self->base.address, "%s", neighbour->address);
    *ret = &self->base;
    return 0;
}
