/* The emulated GPU: fibers, barriers, warps and work that happens later. See the header. */
#include "tests/support/cuda_emulator.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <vector>

#include "tests/support/gpu.h"

emulated_thread *emulated_now;
dim3 emulated_block_index, emulated_block_size, emulated_grid_size;
size_t emulated_shared_allowed;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned THREADS_MAX = 1024;
constexpr size_t SHARED_MAX = 232448;

struct warp {
    uint64_t value[2][32];
    unsigned arrived, generation; /* of the exchange under way */
};
struct barrier {
    unsigned arrived, generation;
    int any; /* of __syncthreads_or */
};
struct fiber {
    emulated_thread thread;
    ucontext_t context;
    jmp_buf jump;
    bool started, done;
    const char *waits_for;
};

fiber *fibers; /* [THREADS_MAX] */
uint8_t *stacks;
unsigned fiber_count;
fiber *running;
ucontext_t scheduler_context;
jmp_buf scheduler_jump;
warp warps[THREADS_MAX / 32];
barrier barriers[16];
uint8_t *shared_memory;
const std::function<void()> *kernel_body;
const char *kernel_name;
uint64_t progress_made;
std::deque<std::function<void()>> pending;
uint64_t random_state = 1;

/* Sanitizers know swapcontext; elsewhere the jumps save its two system calls for each switch. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool JUMPS = false;
#else
constexpr bool JUMPS = true;
#endif

void to_scheduler() {
    fiber *self = running;
    if (!JUMPS)
        swapcontext(&self->context, &scheduler_context);
    else if (_setjmp(self->jump) == 0)
        _longjmp(scheduler_jump, 1);
}

/* A fiber is made once and runs a thread of one block after the other. */
void fiber_main() {
    for (;;) {
        (*kernel_body)();
        running->done = true;
        emulated_progress();
        to_scheduler();
    }
}

void resume(fiber *next) {
    running = next;
    emulated_now = &next->thread;
    if (!JUMPS) {
        next->started = true;
        swapcontext(&scheduler_context, &next->context);
    } else if (_setjmp(scheduler_jump) == 0) {
        if (next->started)
            _longjmp(next->jump, 1);
        next->started = true;
        setcontext(&next->context);
    }
}

void pending_run(size_t index) {
    std::function<void()> work = pending[index];
    pending.erase(pending.begin() + (ptrdiff_t)index);
    work();
    emulated_progress();
}

[[noreturn]] void deadlock() {
    fprintf(stderr, "emulator: no thread of %s can go on (block %u,%u,%u):\n", kernel_name,
            emulated_block_index.x, emulated_block_index.y, emulated_block_index.z);
    for (unsigned i = 0; i < fiber_count; i++)
        if (!fibers[i].done && (i % 32 == 0 || i < 32))
            fprintf(stderr, "  thread %u waits for %s\n", i, fibers[i].waits_for);
    abort();
}

void fiber_prepare(unsigned i) {
    fiber *self = &fibers[i];
    self->thread.linear = i;
    self->thread.index.x = i % emulated_block_size.x;
    self->thread.index.y = i / emulated_block_size.x % emulated_block_size.y;
    self->thread.index.z = i / emulated_block_size.x / emulated_block_size.y;
    self->done = false;
    self->waits_for = "its turn";
    if (self->started)
        return;
    getcontext(&self->context);
    self->context.uc_stack.ss_sp = stacks + (size_t)i * STACK_BYTES;
    self->context.uc_stack.ss_size = STACK_BYTES;
    self->context.uc_link = NULL;
    makecontext(&self->context, fiber_main, 0);
}

/* Rounds over all fibers, each from a place and in a direction of its own. */
void run_block(size_t shared) {
    memset(warps, 0, sizeof warps);
    memset(barriers, 0, sizeof barriers);
    memset(shared_memory, 0xff, SHARED_MAX);
    (void)shared;
    for (unsigned i = 0; i < fiber_count; i++)
        fiber_prepare(i);
    for (unsigned left = fiber_count; left > 0;) {
        const uint64_t before = progress_made;
        const unsigned first = emulated_draw(fiber_count);
        const bool backward = emulated_draw(2) != 0;
        left = 0;
        for (unsigned n = 0; n < fiber_count; n++) {
            fiber *next = &fibers[(backward ? first + fiber_count - n : first + n) % fiber_count];
            if (next->done)
                continue;
            resume(next);
            left += !next->done;
        }
        if (!pending.empty() && (progress_made == before || emulated_draw(2) == 0))
            pending_run(emulated_draw((uint32_t)pending.size()));
        else if (left > 0 && progress_made == before)
            deadlock();
    }
    while (!pending.empty())
        pending_run(0);
}

} // namespace

uint8_t *emulated_shared(void) {
    return shared_memory;
}

uint32_t emulated_draw(uint32_t bound) { /* SplitMix64 */
    uint64_t z = (random_state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) % bound);
}

void emulated_progress(void) {
    progress_made++;
}

void emulated_wait(const char *what, const std::function<bool()> &condition) {
    while (!condition()) {
        running->waits_for = what;
        to_scheduler();
    }
}

void emulated_later(const std::function<void()> &work) {
    if (emulated_draw(4) == 0)
        work();
    else
        pending.push_back(work);
    emulated_progress();
}

void emulated_barrier(unsigned id, unsigned threads) {
    barrier *self = &barriers[id];
    const unsigned generation = self->generation;
    emulated_progress();
    if (++self->arrived == threads) {
        self->arrived = 0;
        self->generation++;
        return;
    }
    emulated_wait("a barrier", [=] { return self->generation != generation; });
}

int __syncthreads_or(int predicate) {
    barrier *self = &barriers[0];
    self->any |= predicate != 0;
    __syncthreads();
    const int ret = self->any;
    __syncthreads();
    self->any = 0;
    __syncthreads();
    return ret;
}

const uint64_t *emulated_exchange(uint32_t mask, uint64_t value) {
    const unsigned lane = emulated_lane();
    warp *self = &warps[emulated_now->linear / 32];
    if (mask != 0xffffffff) { /* none of ours does: whole warps only */
        fprintf(stderr, "emulator: %s: a shuffle of lanes %08x only\n", kernel_name, mask);
        abort();
    }
    /* A lane may be one exchange ahead of a lane that has not read the last one yet, not two. */
    const unsigned generation = self->generation;
    uint64_t *slot = self->value[generation % 2];
    slot[lane] = value;
    emulated_progress();
    if (++self->arrived == 32) {
        self->arrived = 0;
        self->generation++;
    } else {
        emulated_wait("its warp", [=] { return self->generation != generation; });
    }
    return slot;
}

uint32_t __ballot_sync(uint32_t mask, int predicate) {
    const uint64_t *all = emulated_exchange(mask, predicate != 0);
    uint32_t ret = 0;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1)
            ret |= (uint32_t)all[lane] << lane;
    return ret;
}

static void run_kernel(const char *kernel, dim3 grid, dim3 block, size_t shared,
                       const std::function<void()> &body) {
    fiber_count = block.x * block.y * block.z;
    kernel_name = kernel;
    kernel_body = &body;
    emulated_block_size = block;
    emulated_grid_size = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                emulated_block_index = dim3(x, y, z);
                run_block(shared);
            }
}

void emulated_launch(const char *kernel, dim3 grid, dim3 block, size_t shared, void *stream,
                     const std::function<void()> &body) {
    if (stacks == NULL) {
        stacks = (uint8_t *)mmap(NULL, THREADS_MAX * STACK_BYTES, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        shared_memory = (uint8_t *)aligned_alloc(1024, SHARED_MAX + 1024 - SHARED_MAX % 1024);
        fibers = new fiber[THREADS_MAX]();
    }
    const unsigned threads = block.x * block.y * block.z;
    const bool fits = shared <= 48 << 10 || (shared <= emulated_shared_allowed);
    if (threads == 0 || threads > THREADS_MAX || grid.x == 0 || grid.y == 0 || grid.y > 65535 ||
        grid.z == 0 || grid.z > 65535 || shared > SHARED_MAX || !fits) {
        fprintf(stderr,
                "emulator: %s cannot be launched: %u,%u,%u blocks of %u threads, %zu bytes\n",
                kernel, grid.x, grid.y, grid.z, threads, shared);
        abort();
    }
    if (stream == NULL)
        run_kernel(kernel, grid, block, shared, body);
    else
        emulated_enqueue(stream, kernel, [=] { run_kernel(kernel, grid, block, shared, body); });
}

/* ---- The memory of the tests (gpu.h) ---- */

bool gpu_open(char *ret_name, size_t room) {
    snprintf(ret_name, room, "emulated");
    return true;
}
bool gpu_is_emulated(void) {
    return true;
}
void *gpu_take(size_t bytes) {
    return aligned_alloc(1024, (bytes + 1023) / 1024 * 1024 + 1024);
}
void gpu_give(void *memory) {
    free(memory);
}
void gpu_put(void *memory, const void *from, size_t bytes) {
    memcpy(memory, from, bytes);
}
void gpu_get(void *to, const void *memory, size_t bytes) {
    memcpy(to, memory, bytes);
}
int gpu_wait(void) {
    return 0;
}
void gpu_schedule(uint64_t seed) {
    random_state = seed;
}
