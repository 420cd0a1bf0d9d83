/* Streams, events and graphs of the emulated GPU (kernels/cuda/streams.h). A stream is a queue;
 * what is enqueued runs later, at the latest when the host waits. Which stream goes on is drawn
 * from the seed, and so is, now and then, a favourite that runs ahead of all others as far as
 * events let it: what events do not order comes in every order. A graph's nodes run in any order
 * that their edges allow.
 *
 * Kernels do not overlap in time: two that touch the same memory run one after the other, in either
 * order. Waiting that cannot end, calls that block during a capture, and captures that are not
 * joined are reported as the runtime would. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <memory>
#include <set>
#include <vector>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/streams.h"
#include "tests/support/cuda_emulator.h"
#include "tests/support/cuda_emulator_streams.h"

namespace {

enum { UNJOINED = 904, ISOLATED = 905 }; /* cudaErrorStreamCapture... */

struct node {
    std::function<void()> work;
    std::function<bool()> ready; /* NULL: always */
    std::set<size_t> after;
};
struct capture {
    std::vector<node> nodes;
    struct stream *origin;
    bool over = false;
};
struct event {
    uint64_t recorded = 0, reached = 0; /* records enqueued, and done */
    std::shared_ptr<capture> in;        /* recorded while captured: after these nodes of it */
    std::set<size_t> nodes;
};
struct replay { /* a graph that runs */
    std::shared_ptr<capture> graph;
    std::vector<bool> done;
    size_t left;
};
struct operation {
    enum { WORK, RECORD, AWAIT, GRAPH } kind;
    std::function<void()> work;
    event *at;
    uint64_t turn; /* of the event */
    std::shared_ptr<replay> run;
    uint64_t number; /* in the order of enqueuing, all streams together */
    std::function<bool()> ready;
};
struct channel {
    std::deque<std::vector<uint8_t>> under_way;
    uint64_t left = UINT64_MAX; /* things until it is aborted */
};
struct stream {
    std::deque<operation> queue;
    std::shared_ptr<capture> in;
    std::set<size_t> last; /* captured: what its next node comes after */
};

std::vector<stream *> streams;
stream *favourite;
uint64_t host_waits, overtakings, enqueued, newest;
uint32_t forget;
unsigned capturing;

void must_not_capture(const char *what) {
    if (capturing == 0)
        return;
    fprintf(stderr, "emulator: %s during a capture\n", what);
    abort();
}

std::vector<size_t> ready_nodes(const replay &self) {
    std::vector<size_t> ret;
    for (size_t i = 0; i < self.done.size(); i++) {
        const node &at = self.graph->nodes[i];
        bool may = !self.done[i] && (at.ready == nullptr || at.ready());
        for (size_t before : at.after)
            may = may && self.done[before];
        if (may)
            ret.push_back(i);
    }
    return ret;
}

bool can_go_on(const stream *self) {
    if (self->queue.empty())
        return false;
    const operation &head = self->queue.front();
    if (head.kind == operation::GRAPH)
        return head.run->left == 0 || !ready_nodes(*head.run).empty();
    if (head.ready != nullptr && !head.ready())
        return false;
    return head.kind != operation::AWAIT || head.at->reached >= head.turn;
}

void count_order(const operation &done) {
    if (done.number < newest)
        overtakings++;
    else
        newest = done.number;
}

/* One node that may run; true when the graph is done. */
bool replay_some(replay &self) {
    const std::vector<size_t> ready = ready_nodes(self);
    if (!ready.empty()) {
        /* Often the latest in order of capture: chains that run as far ahead as they can. */
        const size_t n = ready.size();
        const size_t pick = emulated_draw(2) == 0 ? n - 1 : emulated_draw((uint32_t)n);
        self.graph->nodes[ready[pick]].work();
        self.done[ready[pick]] = true;
        self.left--;
    }
    return self.left == 0;
}

void go_on(stream *self) {
    operation head = self->queue.front();
    if (head.kind == operation::GRAPH && !replay_some(*head.run))
        return;
    self->queue.pop_front();
    if (head.kind == operation::WORK) {
        count_order(head);
        head.work();
    } else if (head.kind == operation::RECORD && head.at->reached < head.turn) {
        head.at->reached = head.turn;
    }
}

/* False: nothing can. */
bool some_stream_goes_on(void) {
    std::vector<stream *> ready;
    for (stream *s : streams)
        if (can_go_on(s))
            ready.push_back(s);
    if (ready.empty())
        return false;
    stream *next = ready[emulated_draw((uint32_t)ready.size())];
    if (emulated_draw(40) == 0)
        favourite = next;
    for (stream *s : ready)
        if (s == favourite && emulated_draw(32) != 0)
            next = s;
    go_on(next);
    return true;
}

void drain(const stream *self) {
    while (!self->queue.empty())
        if (!some_stream_goes_on()) {
            fprintf(stderr, "emulator: a stream waits for an event that cannot come\n");
            abort();
        }
}

void enqueue(stream *self, operation &&what) {
    what.number = ++enqueued;
    self->queue.push_back(std::move(what));
    for (uint32_t n = emulated_draw(4) == 0 ? emulated_draw(4) : 0; n > 0; n--)
        some_stream_goes_on();
}

} // namespace

uint64_t emulated_host_waits(void) {
    return host_waits;
}
uint64_t emulated_overtakings(void) {
    return overtakings;
}
void emulated_forget_await(uint32_t nth) {
    forget = nth;
}

static void enqueue_when(void *to, const std::function<bool()> &ready,
                         const std::function<void()> &work) {
    stream *self = (stream *)to;
    if (self->in != NULL) {
        self->in->nodes.push_back({work, ready, self->last});
        self->last = {self->in->nodes.size() - 1};
        return;
    }
    enqueue(self, {operation::WORK, work, NULL, 0, NULL, 0, ready});
}

void emulated_enqueue(void *to, const char *what, const std::function<void()> &work) {
    (void)what;
    enqueue_when(to, nullptr, work);
}

void *emulated_channel_make(void) {
    return new channel();
}
void emulated_channel_free(void *at) {
    delete (channel *)at;
}
int emulated_channel_send(void *at, void *on, const void *from, size_t bytes) {
    channel *self = (channel *)at;
    enqueue_when(
        on, [=] { return self->left == 0 || self->under_way.empty(); },
        [=] {
            if (self->left > 0)
                self->under_way.emplace_back((const uint8_t *)from, (const uint8_t *)from + bytes);
        });
    return 0;
}
int emulated_channel_receive(void *at, void *on, void *to, size_t bytes) {
    channel *self = (channel *)at;
    enqueue_when(
        on, [=] { return self->left == 0 || !self->under_way.empty(); },
        [=] {
            if (self->left == 0)
                return;
            if (self->under_way.front().size() != bytes) {
                fprintf(stderr, "emulator: %zu bytes were sent, %zu are received\n",
                        self->under_way.front().size(), bytes);
                abort();
            }
            memcpy(to, self->under_way.front().data(), bytes);
            self->under_way.pop_front();
            self->left--;
        });
    return 0;
}
void emulated_channel_abort_after(void *at, uint64_t count) {
    ((channel *)at)->left = count;
    ((channel *)at)->under_way.clear();
}

int stream_make_cuda(void **ret) {
    must_not_capture("making a stream");
    stream *self = new stream();
    streams.push_back(self);
    *ret = self;
    return 0;
}
void stream_free_cuda(void *at) {
    stream *self = (stream *)at;
    if (self == NULL)
        return;
    drain(self);
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == self)
            streams.erase(streams.begin() + (ptrdiff_t)i);
    favourite = favourite == self ? NULL : favourite;
    delete self;
}
int stream_wait_cuda(void *at) {
    must_not_capture("waiting for a stream");
    host_waits++;
    drain((stream *)at);
    return 0;
}
int stream_done_cuda(void *at) {
    must_not_capture("asking for a stream");
    some_stream_goes_on();
    return ((stream *)at)->queue.empty() ? 0 : CUDA_NOT_READY;
}

int event_make_cuda(void **ret) {
    *ret = new event();
    return 0;
}
/* What still waits for it is done first, as the runtime sees to. */
void event_free_cuda(void *at) {
    while (some_stream_goes_on())
        continue;
    delete (event *)at;
}
int event_record_cuda(void *at, void *on) {
    event *self = (event *)at;
    stream *s = (stream *)on;
    self->in = s->in;
    self->nodes = s->last;
    if (s->in == NULL)
        enqueue(s, {operation::RECORD, nullptr, self, ++self->recorded, NULL, 0, nullptr});
    return 0;
}
int event_await_cuda(void *on, void *at) {
    event *self = (event *)at;
    stream *s = (stream *)on;
    if (forget > 0 && --forget == 0)
        return 0;
    const bool captured = self->in != NULL && !self->in->over;
    if (!captured && s->in != NULL)
        return ISOLATED;
    if (!captured) {
        enqueue(s, {operation::AWAIT, nullptr, self, self->recorded, NULL, 0, nullptr});
        return 0;
    }
    if (s->in != NULL && s->in != self->in)
        return ISOLATED;
    if (s->in == NULL) { /* the stream joins the capture */
        s->in = self->in;
        s->last.clear();
    }
    s->last.insert(self->nodes.begin(), self->nodes.end());
    return 0;
}

int pinned_take_cuda(size_t bytes, void **ret) {
    *ret = aligned_alloc(1024, (bytes + 1024) / 1024 * 1024);
    return *ret != NULL ? 0 : 2;
}
void pinned_give_cuda(void *memory) {
    free(memory);
}
static int copy(void *on, void *to, const void *from, size_t bytes) {
    emulated_enqueue(on, "a copy", [=] { memmove(to, from, bytes); });
    return 0;
}
int stream_put_cuda(void *on, void *device, const void *host, size_t bytes) {
    return copy(on, device, host, bytes);
}
int stream_get_cuda(void *on, void *host, const void *device, size_t bytes) {
    return copy(on, host, device, bytes);
}
int stream_copy_cuda(void *on, void *to, const void *from, size_t bytes) {
    return copy(on, to, from, bytes);
}
int stream_clear_cuda(void *on, void *memory, size_t pitch, size_t bytes, size_t rows) {
    emulated_enqueue(on, "clearing", [=] {
        for (size_t i = 0; i < rows; i++)
            memset((uint8_t *)memory + i * pitch, 0, bytes);
    });
    return 0;
}

int graph_begin_cuda(void *on) {
    stream *self = (stream *)on;
    self->in = std::make_shared<capture>();
    self->in->origin = self;
    self->last.clear();
    capturing++;
    return 0;
}
int graph_end_cuda(void *on, void **ret) {
    stream *self = (stream *)on;
    std::shared_ptr<capture> graph = self->in;
    *ret = NULL;
    if (graph == NULL || graph->origin != self)
        return ISOLATED;
    std::vector<bool> joined(graph->nodes.size(), false);
    std::vector<size_t> rest(self->last.begin(), self->last.end());
    while (!rest.empty()) {
        const size_t at = rest.back();
        rest.pop_back();
        if (joined[at])
            continue;
        joined[at] = true;
        rest.insert(rest.end(), graph->nodes[at].after.begin(), graph->nodes[at].after.end());
    }
    graph->over = true;
    capturing--;
    for (stream *s : streams)
        if (s->in == graph)
            s->in = NULL;
    for (bool is : joined)
        if (!is)
            return UNJOINED;
    *ret = new std::shared_ptr<capture>(graph);
    return 0;
}
int graph_run_cuda(void *at, void *on) {
    stream *self = (stream *)on;
    const std::shared_ptr<capture> graph = *(std::shared_ptr<capture> *)at;
    if (self->in != NULL)
        return ISOLATED;
    auto run = std::make_shared<replay>();
    run->graph = graph;
    run->done.assign(graph->nodes.size(), false);
    run->left = graph->nodes.size();
    if (run->left > 0)
        enqueue(self, {operation::GRAPH, nullptr, NULL, 0, run, 0, nullptr});
    return 0;
}
uint32_t graph_nodes_cuda(const void *at) {
    return (uint32_t)(*(const std::shared_ptr<capture> *)at)->nodes.size();
}
void graph_free_cuda(void *at) {
    delete (std::shared_ptr<capture> *)at;
}
