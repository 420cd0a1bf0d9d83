/* The effects of one step and the arena that owns what they point to. The arena is a chain of
 * growing blocks; a reset keeps them all, so that a steady state allocates nothing. Blocks never
 * move, so pointers stay valid until the reset. */
#include "actors/actor.h"

#include <stdalign.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

#define ARENA_ALIGN       64
#define ARENA_FIRST_BYTES ((size_t)64 << 10)
#define TRACE_BYTES_MAX   1024

/* The newest block is the head; `used` counts from `bytes`. Blocks before the head in the chain
 * were filled earlier in this step, or are empty after a reset and are taken again in order. */
struct arena_block {
    struct arena_block *next;
    size_t capacity, used;
    alignas(ARENA_ALIGN) uint8_t bytes[];
};

/* Running out of memory for a step's effects can not be handled by any caller: half a step's
 * effects must never be carried out. */
static void *checked(void *memory) {
    ASSERT(memory != NULL && "memory for effects");
    return memory;
}

void effects_init(struct effects *self) {
    memset(self, 0, sizeof *self);
}

void effects_free(struct effects *self) {
    while (self->arena != NULL) {
        struct arena_block *next = self->arena->next;
        free(self->arena);
        self->arena = next;
    }
    free(self->list);
    effects_init(self);
}

void effects_reset(struct effects *self) {
    self->count = 0;
    for (struct arena_block *block = self->arena; block != NULL; block = block->next)
        block->used = 0;
}

static struct arena_block *arena_grow(struct effects *self, size_t size) {
    size_t capacity = self->arena != NULL ? self->arena->capacity * 2 : ARENA_FIRST_BYTES;
    while (capacity < size)
        capacity *= 2;
    struct arena_block *block =
        checked(aligned_alloc(ARENA_ALIGN, sizeof(struct arena_block) + capacity));
    block->capacity = capacity;
    block->used = 0;
    block->next = self->arena; /* the largest block comes first and is tried first */
    self->arena = block;
    return block;
}

void *effects_alloc(struct effects *self, size_t size) {
    ASSERT(size <= SIZE_MAX / 4);
    size = (size + ARENA_ALIGN - 1) & ~(size_t)(ARENA_ALIGN - 1);
    struct arena_block *block = self->arena;
    while (block != NULL && block->capacity - block->used < size)
        block = block->next;
    if (block == NULL)
        block = arena_grow(self, size);
    void *ret = block->bytes + block->used;
    block->used += size;
    return ret;
}

void *effects_copy(struct effects *self, const void *bytes, size_t size) {
    void *ret = effects_alloc(self, size);
    if (size > 0)
        memcpy(ret, bytes, size);
    return ret;
}

struct effect *effects_add(struct effects *self, enum effect_kind kind) {
    if (self->count == self->capacity) {
        uint32_t capacity = self->capacity == 0 ? 64 : self->capacity * 2;
        self->list = checked(realloc(self->list, capacity * sizeof *self->list));
        self->capacity = capacity;
    }
    struct effect *effect = &self->list[self->count++];
    memset(effect, 0, sizeof *effect);
    effect->kind = kind;
    return effect;
}

const uint8_t *effects_pack(struct effects *self, const message *envelope, size_t *ret_size) {
    ASSERT(envelope->from_incarnation != 0 && envelope->protocol_version == WIRE_PROTOCOL_VERSION);
    *ret_size = wire_packed_bytes(envelope);
    uint8_t *bytes = effects_alloc(self, *ret_size);
    wire_pack(envelope, bytes);
    return bytes;
}

void effects_send(struct effects *self, actor_id to, const message *envelope) {
    size_t size;
    const uint8_t *bytes = effects_pack(self, envelope, &size);
    effects_send_packed(self, to, bytes, size);
}

void effects_send_packed(struct effects *self, actor_id to, const uint8_t *bytes, size_t size) {
    struct effect *effect = effects_add(self, EFFECT_SEND);
    effect->send.to = to;
    effect->send.bytes = bytes;
    effect->send.size = size;
}

void effects_trace(struct effects *self, enum trace_level level, const char *format, ...) {
    char text[TRACE_BYTES_MAX];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length < 0)
        length = 0;
    if ((size_t)length >= sizeof text)
        length = sizeof text - 1;
    text[length] = '\0';
    struct effect *effect = effects_add(self, EFFECT_TRACE);
    effect->trace.level = level;
    effect->trace.text = effects_copy(self, text, (size_t)length + 1);
}
