/* Barriers in shared memory, bulk copies and warpgroup products, emulated; see the header. Operands
 * of products are read through their descriptors exactly as laid out in shared memory, swizzle
 * included, so a wrong descriptor or a wrong tile is a wrong result. */
#include "tests/support/cuda_emulator_ptx.h"

#include <stdio.h>
#include <stdlib.h>

#include <deque>
#include <unordered_map>
#include <vector>

extern "C" {
#include "kernels/numerics.h"
}

namespace {

/* In the 8 bytes of the barrier. */
struct barrier_bits {
    uint16_t expected, pending;
    int32_t bytes_and_phase; /* bytes * 2 + phase */
};
static_assert(sizeof(barrier_bits) == sizeof(uint64_t), "a barrier is 8 bytes");

barrier_bits *bits_of(uint64_t *barrier) {
    return (barrier_bits *)(void *)barrier;
}

void settle(barrier_bits *self) {
    if (self->pending == 0 && self->bytes_and_phase >> 1 == 0) {
        self->pending = self->expected;
        self->bytes_and_phase ^= 1;
    }
    emulated_progress();
}

void add_bytes(barrier_bits *self, int32_t bytes) {
    self->bytes_and_phase += bytes * 2;
}

/* Products of a thread that have not been made yet: groups, the last one open. */
struct products {
    std::deque<std::vector<emulated_product>> group;
};
std::unordered_map<unsigned, products> of_thread; /* by linear index; blocks run one by one */

uint64_t address_of(uint64_t descriptor) {
    return (descriptor & 0x3fff) << 4;
}

/* The 128-byte swizzle works on the bits of the address. */
uint32_t swizzled(uint32_t address) {
    return address ^ (address >> 7 & 7) << 4;
}

/* Element (row, k) of an operand with K contiguous. The start address may lie inside the first row
 * of the swizzle, k bytes on. */
uint32_t place_plain(uint64_t descriptor, unsigned row, unsigned k_bytes) {
    const uint32_t stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    return swizzled((uint32_t)address_of(descriptor) + row / 8 * stride + row % 8 * 128 + k_bytes);
}

/* Element (row, k) of a BF16 operand with rows contiguous: 64 of them in 128 bytes, 8 of k beneath
 * each other. */
uint32_t place_transposed(uint64_t descriptor, unsigned row, unsigned k) {
    const uint32_t leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    return swizzled((uint32_t)address_of(descriptor) + row / 64 * leading + k / 8 * stride +
                    k % 8 * 128 + row % 64 * 2);
}

float of_bf16(uint32_t bits) {
    return __uint_as_float(bits << 16);
}
float of_e4m3(uint8_t bits) {
    static float table[256];
    if (table[0x38] == 0)
        for (int i = 0; i < 256; i++)
            table[i] = e4m3_to_float((uint8_t)i);
    return table[bits];
}

/* Row `row` of an operand, k elements. */
void read_row(const emulated_product &p, uint64_t descriptor, bool transposed, unsigned row,
              float *ret) {
    if (descriptor >> 62 != 1) {
        fprintf(stderr, "emulator: a descriptor without 128-byte swizzle\n");
        abort();
    }
    const uint8_t *shared = emulated_shared();
    if (transposed) {
        for (unsigned k = 0; k < p.k; k++) {
            uint16_t bits;
            memcpy(&bits, shared + place_transposed(descriptor, row, k), sizeof bits);
            ret[k] = of_bf16(bits);
        }
    } else if (p.e4m3) {
        for (unsigned k = 0; k < p.k; k += 16) { /* 16 bytes stay together */
            const uint8_t *at = shared + place_plain(descriptor, row, k);
            for (unsigned i = 0; i < 16; i++)
                ret[k + i] = of_e4m3(at[i]);
        }
    } else {
        for (unsigned k = 0; k < p.k; k += 8) {
            uint16_t bits[8];
            memcpy(bits, shared + place_plain(descriptor, row, k * 2), sizeof bits);
            for (unsigned i = 0; i < 8; i++)
                ret[k + i] = of_bf16(bits[i]);
        }
    }
}

/* The thread's two rows of A. */
void rows_of_a(const emulated_product &p, unsigned thread, float a[2][32]) {
    const unsigned first = thread / 32 % 4 * 16 + thread % 32 / 4;
    for (unsigned half = 0; half < 2; half++)
        read_row(p, p.a_tile, false, first + 8 * half, a[half]);
}

/* Registers of A hold what four neighbouring threads share: they are given to the row's threads by
 * shuffles when the product is asked for. */
struct a_rows {
    float value[2][16];
};

/* One row of sums: += a[k] * b[k][column], k ascending. Columns side by side, so that the compiler
 * makes vectors of them. */
#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#endif
void add_products(double *__restrict sum, const float *__restrict a, const float (*b)[64], unsigned k,
                  unsigned columns) {
    for (unsigned i = 0; i < k; i++)
        for (unsigned c = 0; c < columns; c++)
            sum[c] += (double)a[i] * (double)b[i][c];
}

void make(const emulated_product &p, unsigned thread, const float a[2][32]) {
    static float b[32][64]; /* [k][the thread's columns] */
    const unsigned columns = p.n / 4;
    for (unsigned i = 0; i < columns; i++) {
        float row[32];
        read_row(p, p.b_tile, p.transposed, 8 * (i / 2) + thread % 4 * 2 + i % 2, row);
        for (unsigned k = 0; k < p.k; k++)
            b[k][i] = row[k];
    }
    for (unsigned half = 0; half < 2; half++) {
        double sum[64];
        for (unsigned i = 0; i < columns; i++)
            sum[i] = p.accumulate ? (double)p.d[4 * (i / 2) + 2 * half + i % 2] : 0;
        add_products(sum, a[half], b, p.k, columns);
        for (unsigned i = 0; i < columns; i++)
            p.d[4 * (i / 2) + 2 * half + i % 2] = (float)sum[i];
    }
}

std::unordered_map<const float *, std::deque<a_rows>> registers_of; /* by d: A of each product */

void make_next(const emulated_product &p, unsigned thread) {
    float a[2][32];
    if (p.a_in_registers) {
        std::deque<a_rows> &queue = registers_of[p.d];
        for (unsigned half = 0; half < 2; half++)
            memcpy(a[half], queue.front().value[half], sizeof queue.front().value[half]);
        queue.pop_front();
    } else {
        rows_of_a(p, thread, a);
    }
    make(p, thread, a);
}

} // namespace

void mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
    *bits_of(barrier) = {(uint16_t)arrivals, (uint16_t)arrivals, 0};
}

void mbarrier_arrive(uint64_t *barrier) {
    barrier_bits *self = bits_of(barrier);
    if (self->pending == 0) {
        fprintf(stderr, "emulator: more arrivals at a barrier than its phase has\n");
        abort();
    }
    self->pending--;
    settle(self);
}

void mbarrier_expect(uint64_t *barrier, uint32_t bytes) {
    add_bytes(bits_of(barrier), (int32_t)bytes);
    mbarrier_arrive(barrier);
}

void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
    emulated_wait("a barrier in shared memory",
                  [=] { return (uint32_t)(bits_of(barrier)->bytes_and_phase & 1) != parity; });
}

uint32_t widen_e4m3_pair(uint16_t two, float scale) {
    return (uint32_t)bf16_from_float(of_e4m3((uint8_t)two) * scale) |
           (uint32_t)bf16_from_float(of_e4m3((uint8_t)(two >> 8)) * scale) << 16;
}

void tma_load(void *shared, const CUtensorMap *map, uint64_t *barrier, uint32_t x, uint32_t y) {
    const uint32_t to = shared_address(shared);
    if (to % 1024 != 0 || map->box_bytes != 128) {
        fprintf(stderr, "emulator: a bulk copy to %u in rows of %u bytes\n", to, map->box_bytes);
        abort();
    }
    const CUtensorMap copy = *map;
    emulated_later([=] {
        for (uint32_t r = 0; r < copy.box_rows; r++)
            for (uint32_t b = 0; b < 128; b++) {
                const uint64_t from = (uint64_t)x * copy.element_bytes + b, row = (uint64_t)y + r;
                const bool inside = from < copy.inner_bytes && row < copy.rows;
                emulated_shared()[swizzled(to + r * 128 + b)] =
                    inside ? copy.base[row * copy.row_bytes + from] : 0;
            }
        add_bytes(bits_of(barrier), -(int32_t)(copy.box_rows * 128));
        settle(bits_of(barrier));
    });
}

void emulated_wgmma(const emulated_product &product) {
    const unsigned thread = emulated_now->linear;
    if (product.a_in_registers) {
        a_rows rows;
        for (unsigned half = 0; half < 2; half++)
            for (unsigned k = 0; k < 16; k++) {
                /* k of a row lies in register 2 (k / 8) + half of thread k % 8 / 2 of the four. */
                const uint32_t word = product.a[2 * (k / 8) + half];
                const uint32_t from =
                    emulated_shuffle(0xffffffffu, word, thread % 32 / 4 * 4 + k % 8 / 2);
                rows.value[half][k] = of_bf16(k % 2 == 0 ? from & 0xffff : from >> 16);
            }
        registers_of[product.d].push_back(rows);
    }
    products &self = of_thread[thread];
    if (self.group.empty())
        self.group.emplace_back();
    /* At once only if nothing before it waits: products of a thread are made in order. */
    bool first = true;
    for (const auto &group : self.group)
        first = first && group.empty();
    if (first && emulated_draw(2) == 0)
        make_next(product, thread);
    else
        self.group.back().push_back(product);
    emulated_progress();
}

void wgmma_commit(void) {
    products &self = of_thread[emulated_now->linear];
    if (self.group.empty())
        self.group.emplace_back();
    self.group.emplace_back(); /* the open one */
}

void emulated_wgmma_wait(unsigned left) {
    products &self = of_thread[emulated_now->linear];
    while (self.group.size() > left + 1) {
        for (const emulated_product &product : self.group.front())
            make_next(product, emulated_now->linear);
        self.group.pop_front();
    }
    __syncwarp(); /* the instruction is the whole warp's: no lane goes on before the others are done
                   */
}
