/* Which attention actor has seen a prompt's beginning before: a guess, so that its prefix cache is
 * of use. A prompt is taken as a chain of blocks of PAGE_TOKENS tokens, each named by a hash of
 * itself and all before it; a table of bounded size remembers (block, actor) pairs, the newer ones in
 * place of older ones. A wrong guess costs time and nothing else. */
#include <string.h>

#include "actors/gateway/gateway.h"

/* Named blocks of a choice's prompt, in self->affinity_block. The last token is computed in any case. */
static uint32_t list_blocks(struct gateway *self, const struct choice *choice) {
    const struct prompt *prompt = choice->prompt;
    uint32_t blocks = prompt->tokens > 0 ? (prompt->tokens - 1) / PAGE_TOKENS : 0;
    self->affinity_block = gateway_grow(self->affinity_block, &self->affinity_blocks_capacity,
                                        blocks + 1, sizeof *self->affinity_block);
    uint64_t hash = choice->request->bias_version;
    for (uint32_t b = 0; b < blocks; b++) {
        for (uint32_t i = 0; i < PAGE_TOKENS; i++)
            hash = gateway_mix(hash, prompt->token[b * PAGE_TOKENS + i]);
        self->affinity_block[b] = hash;
    }
    return blocks;
}

static uint64_t name_pair(uint64_t block, const struct upstream *upstream) {
    uint64_t name = gateway_mix(gateway_mix(block, upstream->id), upstream->incarnation);
    return name != 0 ? name : 1;
}

void affinity_look(struct gateway *self, const struct choice *choice) {
    self->affinity_blocks = self->settings.prefix_cache != 0 ? list_blocks(self, choice) : 0;
}

uint32_t affinity_tokens(const struct gateway *self, const struct upstream *upstream) {
    uint32_t blocks = 0;
    while (blocks < self->affinity_blocks) {
        uint64_t name = name_pair(self->affinity_block[blocks], upstream);
        if (self->affinity[name % AFFINITY_PAIRS] != name)
            break;
        blocks++;
    }
    return blocks * PAGE_TOKENS;
}

void affinity_note(struct gateway *self, const struct upstream *upstream) {
    for (uint32_t b = 0; b < self->affinity_blocks; b++) {
        uint64_t name = name_pair(self->affinity_block[b], upstream);
        self->affinity[name % AFFINITY_PAIRS] = name;
    }
}
