/* See amx_emulator.h. */
#include "tests/support/amx_emulator.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* ---- FP32 arithmetic in integers ---- */

enum kind { ZERO, FINITE, INFINITE, NOT_A_NUMBER };
struct number {
    enum kind kind;
    bool negative;
    uint64_t digits; /* value = digits * 2^exponent */
    int exponent;
};

static struct number decode(uint32_t bits) {
    const uint32_t fraction = bits & 0x7fffff;
    const int biased = (int)(bits >> 23 & 255);
    struct number number = {FINITE, bits >> 31, fraction | 0x800000, biased - 150};
    if (biased == 0)
        number.kind = ZERO; /* denormals are zero */
    else if (biased == 255)
        number.kind = fraction ? NOT_A_NUMBER : INFINITE;
    return number;
}

#define QUIET_NAN     0x7fc00000u
#define INFINITY_BITS 0x7f800000u

static int bit_length(unsigned __int128 value) {
    const uint64_t high = (uint64_t)(value >> 64), low = (uint64_t)value;
    return high ? 128 - __builtin_clzll(high) : low ? 64 - __builtin_clzll(low) : 0;
}

/* value * 2^exponent, value not 0, rounded. */
static uint32_t encode(bool negative, unsigned __int128 value, int exponent) {
    const uint32_t sign = negative ? 0x80000000u : 0;
    const int excess = bit_length(value) - 24;
    uint64_t digits;
    if (excess <= 0) {
        digits = (uint64_t)(value << -excess);
    } else {
        digits = (uint64_t)(value >> excess);
        const unsigned __int128 rest = value & (((unsigned __int128)1 << excess) - 1);
        const unsigned __int128 half = (unsigned __int128)1 << (excess - 1);
        if (rest > half || (rest == half && (digits & 1)))
            digits++;
    }
    exponent += excess;
    if (digits == 1u << 24) {
        digits >>= 1;
        exponent++;
    }
    const int biased = exponent + 150;
    if (biased < 1)
        return sign;
    if (biased > 254)
        return sign | INFINITY_BITS;
    return sign | (uint32_t)biased << 23 | (uint32_t)(digits & 0x7fffff);
}

static uint32_t add_exact(struct number p, struct number c) {
    if (p.exponent < c.exponent) {
        const struct number other = p;
        p = c;
        c = other;
    }
    /* Far below the other's last digit only its sign matters for rounding. */
    int shift = p.exponent - c.exponent;
    __int128 small = (__int128)c.digits;
    if (shift > 64) {
        shift = 64;
        small = 1;
    }
    const __int128 large = (__int128)p.digits << shift;
    const __int128 sum = (p.negative ? -large : large) + (c.negative ? -small : small);
    if (sum == 0)
        return 0;
    return encode(sum < 0, (unsigned __int128)(sum < 0 ? -sum : sum), p.exponent - shift);
}

uint32_t soft_fma(uint32_t a_bits, uint32_t b_bits, uint32_t c_bits) {
    const struct number a = decode(a_bits), b = decode(b_bits), c = decode(c_bits);
    const bool negative = a.negative != b.negative;
    if (a.kind == NOT_A_NUMBER || b.kind == NOT_A_NUMBER || c.kind == NOT_A_NUMBER)
        return QUIET_NAN;
    if (a.kind == INFINITE || b.kind == INFINITE) {
        if (a.kind == ZERO || b.kind == ZERO || (c.kind == INFINITE && c.negative != negative))
            return QUIET_NAN;
        return (negative ? 0x80000000u : 0) | INFINITY_BITS;
    }
    if (c.kind == INFINITE)
        return c_bits;
    const bool no_product = a.kind == ZERO || b.kind == ZERO;
    if (no_product && c.kind == ZERO)
        return negative && c.negative ? 0x80000000u : 0;
    if (no_product)
        return c_bits;
    const struct number p = {FINITE, negative, a.digits * b.digits, a.exponent + b.exponent};
    if (c.kind == ZERO)
        return encode(p.negative, p.digits, p.exponent);
    return add_exact(p, c);
}

static uint32_t load(const void *at, int bytes) {
    uint32_t value = 0;
    memcpy(&value, at, (size_t)bytes);
    return value;
}

void soft_tdpbf16ps(struct amx_tile *sums, const struct amx_tile *inputs,
                    const struct amx_tile *weights, int rows, int pairs, int columns) {
    const uint32_t one = 0x3f800000;
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            uint32_t chain[2] = {0, 0};
            for (int k = 0; k < pairs; k++)
                for (int odd = 0; odd < 2; odd++)
                    chain[odd] =
                        soft_fma(load(&inputs->row[m][4 * k + 2 * odd], 2) << 16,
                                 load(&weights->row[k][4 * n + 2 * odd], 2) << 16, chain[odd]);
            uint32_t sum = load(&sums->row[m][4 * n], 4);
            sum = soft_fma(soft_fma(chain[0], one, chain[1]), one, sum);
            memcpy(&sums->row[m][4 * n], &sum, 4);
        }
}

/* ---- Instructions ---- */

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <ucontext.h>

static atomic_uint_fast64_t emulated;

static _Thread_local struct {
    uint8_t config[64]; /* all zero: tiles not in use */
    struct amx_tile tile[8];
} state;

static int tile_rows(unsigned tile) {
    return state.config[48 + tile];
}
static int tile_row_bytes(unsigned tile) {
    return (int)load(&state.config[16 + 2 * tile], 2);
}
static bool tile_usable(unsigned tile) {
    return state.config[0] == 1 && tile < 8 && tile_rows(tile) > 0;
}

struct instruction {
    unsigned prefix, opcode; /* prefix: 0 none, 1 66, 2 F3, 3 F2 */
    unsigned reg, rm, vvvv;
    bool memory;
    uint64_t base;  /* address without the index */
    uint64_t index; /* scaled: bytes from row to row */
    unsigned length;
};

/* In the encoding's order. */
static uint64_t general_register(const ucontext_t *context, unsigned number) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)context->uc_mcontext.gregs[order[number]];
}

/* Three-byte VEX, map 0F38, W0, 128 bits; no RIP-relative operands. */
static bool decode_instruction(const ucontext_t *context, struct instruction *ret) {
    const uint8_t *code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x84) != 0)
        return false;
    const unsigned r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
    const unsigned mode = code[4] >> 6, low = code[4] & 7;
    *ret = (struct instruction){.prefix = code[2] & 3,
                                .opcode = code[3],
                                .reg = (code[4] >> 3 & 7) | r << 3,
                                .rm = low | b << 3,
                                .vvvv = ~(code[2] >> 3) & 15,
                                .memory = mode != 3,
                                .length = 5};
    if (!ret->memory)
        return true;
    bool has_base = true;
    if (low == 4) {
        const uint8_t sib = code[ret->length++];
        const unsigned index = (sib >> 3 & 7) | x << 3;
        if (index != 4)
            ret->index = general_register(context, index) << (sib >> 6);
        has_base = mode != 0 || (sib & 7) != 5;
        ret->rm = (sib & 7) | b << 3;
    } else if (mode == 0 && low == 5) {
        return false;
    }
    if (has_base)
        ret->base = general_register(context, ret->rm);
    if (mode == 1) {
        ret->base += (uint64_t)(int64_t)(int8_t)code[ret->length];
        ret->length += 1;
    } else if (mode == 2 || !has_base) {
        ret->base += (uint64_t)(int64_t)(int32_t)load(code + ret->length, 4);
        ret->length += 4;
    }
    return true;
}

static bool load_config(const uint8_t *config) {
    if (config[0] != 1 || config[1] != 0)
        return false;
    for (unsigned i = 0; i < 8; i++) {
        const uint32_t row_bytes = load(config + 16 + 2 * i, 2), rows = config[48 + i];
        if (row_bytes > 64 || rows > 16 || (row_bytes == 0) != (rows == 0))
            return false;
    }
    memcpy(state.config, config, 64);
    memset(state.tile, 0, sizeof state.tile);
    return true;
}

static bool move_tile(const struct instruction *it) {
    if (!it->memory || !tile_usable(it->reg))
        return false;
    struct amx_tile *tile = &state.tile[it->reg];
    const bool store = it->prefix == 2;
    if (!store)
        memset(tile, 0, sizeof *tile);
    for (int row = 0; row < tile_rows(it->reg); row++) {
        uint8_t *at = (uint8_t *)(it->base + (uint64_t)row * it->index);
        if (store)
            memcpy(at, tile->row[row], (size_t)tile_row_bytes(it->reg));
        else
            memcpy(tile->row[row], at, (size_t)tile_row_bytes(it->reg));
    }
    return true;
}

static bool multiply_tiles(const struct instruction *it) {
    const unsigned sums = it->reg, inputs = it->rm, weights = it->vvvv;
    if (it->memory || !tile_usable(sums) || !tile_usable(inputs) || !tile_usable(weights))
        return false;
    if (sums == inputs || sums == weights || inputs == weights ||
        tile_rows(sums) != tile_rows(inputs) || tile_row_bytes(inputs) != 4 * tile_rows(weights) ||
        tile_row_bytes(sums) != tile_row_bytes(weights))
        return false;
    soft_tdpbf16ps(&state.tile[sums], &state.tile[inputs], &state.tile[weights], tile_rows(sums),
                   tile_rows(weights), tile_row_bytes(sums) / 4);
    return true;
}

static bool emulate(const struct instruction *it) {
    switch (it->opcode << 4 | it->prefix) {
    case 0x490: /* LDTILECFG, TILERELEASE */
        if (it->memory)
            return load_config((const uint8_t *)it->base);
        memset(&state, 0, sizeof state);
        return it->reg == 0 && it->rm == 0;
    case 0x491: /* STTILECFG */
        if (it->memory)
            memcpy((void *)it->base, state.config, 64);
        return it->memory;
    case 0x493: /* TILEZERO */
        if (it->memory || !tile_usable(it->reg))
            return false;
        memset(&state.tile[it->reg], 0, sizeof state.tile[it->reg]);
        return true;
    case 0x4b1: /* TILELOADDT1 */
    case 0x4b2: /* TILESTORED */
    case 0x4b3: /* TILELOADD */
        return move_tile(it);
    case 0x5c2: /* TDPBF16PS */
        return multiply_tiles(it);
    default:
        return false;
    }
}

static void on_illegal_instruction(int number, siginfo_t *information, void *context_pointer) {
    (void)information;
    ucontext_t *context = context_pointer;
    struct instruction it;
    if (!decode_instruction(context, &it) || !emulate(&it)) {
        signal(number, SIG_DFL); /* happens again, and ends the test */
        return;
    }
    context->uc_mcontext.gregs[REG_RIP] += it.length;
    atomic_fetch_add(&emulated, 1);
}

bool amx_emulator_install(void) {
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    return sigaction(SIGILL, &action, NULL) == 0;
}

uint64_t amx_emulator_count(void) {
    return atomic_load(&emulated);
}
#else
bool amx_emulator_install(void) {
    return false;
}
uint64_t amx_emulator_count(void) {
    return 0;
}
#endif
