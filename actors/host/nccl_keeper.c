/* The keeper of communicators; see the header. Each turn moves every asked port one step, so a
 * communicator whose peer never comes holds up no other. */
#include "actors/host/nccl_keeper.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "actors/host/log.h"

#define POLL_NS 500000 /* between two looks at a communicator that is being made */

struct nccl_keeper {
    const struct nccl_api *api;
    int channels_max;
    struct bell *bell;
    struct nccl_buffer *spare;
    pthread_t thread;
    pthread_mutex_t mutex; /* of what follows */
    pthread_cond_t asked;
    struct nccl_port *open, *answered; /* lists by `next` */
    bool ending;
};

/* ---- Buffers ---- */

static int buffer_take(struct nccl_keeper *self, size_t bytes, struct nccl_buffer **ret) {
    const struct nccl_api *api = self->api;
    for (struct nccl_buffer **at = &self->spare; *at != NULL; at = &(*at)->next) {
        if ((*at)->bytes == bytes) {
            *ret = *at;
            *at = (*at)->next;
            return 0;
        }
    }
    struct nccl_buffer *buffer = calloc(1, sizeof *buffer);
    if (buffer == NULL)
        return ERR_NO_MEMORY;
    buffer->bytes = bytes;
    int error = api->memory_take(api->context, bytes, &buffer->device);
    if (error == 0) {
        error = api->pinned_take(api->context, bytes, &buffer->pinned);
        if (error != 0)
            api->memory_give(api->context, buffer->device);
    }
    if (error != 0) {
        free(buffer);
        return error;
    }
    *ret = buffer;
    return 0;
}

static void buffer_spare(struct nccl_keeper *self, struct nccl_buffer *buffer) {
    buffer->next = self->spare;
    self->spare = buffer;
}

static void buffers_free(struct nccl_keeper *self) {
    const struct nccl_api *api = self->api;
    for (struct nccl_buffer *next; self->spare != NULL; self->spare = next) {
        next = self->spare->next;
        api->memory_give(api->context, self->spare->device);
        api->pinned_give(api->context, self->spare->pinned);
        free(self->spare);
    }
}

/* ---- Ports ---- */

static void port_unmake(struct nccl_keeper *self, struct nccl_port *port) {
    const struct nccl_api *api = self->api;
    if (port->comm != NULL && port->orderly) {
        if (port->handle != NULL)
            api->comm_deregister(api->context, port->comm, port->handle);
        api->comm_finish(api->context, port->comm);
    } else if (port->comm != NULL) {
        api->comm_abort(api->context, port->comm); /* forgets its registrations with it */
    }
    port->comm = port->handle = NULL;
    for (int i = 0; i < NCCL_SLOTS_MAX; i++) {
        if (port->event[i] != NULL)
            api->event_free(api->context, port->event[i]);
        port->event[i] = NULL;
    }
    if (port->stream != NULL)
        api->stream_free(api->context, port->stream);
    port->stream = NULL;
    if (port->buffer != NULL)
        buffer_spare(self, port->buffer);
    port->buffer = NULL;
}

static int port_begin(struct nccl_keeper *self, struct nccl_port *port) {
    const struct nccl_api *api = self->api;
    int error = buffer_take(self, (size_t)port->slots * port->slot_bytes, &port->buffer);
    if (error == 0)
        error = api->stream_make(api->context, &port->stream);
    for (uint32_t i = 0; error == 0 && i < port->slots; i++)
        error = api->event_make(api->context, &port->event[i]);
    const struct nccl_comm_options options = {self->channels_max, "troupe-edge"};
    if (error == 0)
        error =
            api->comm_init(api->context, &port->comm, &port->id, port->lane == NCCL_IN, &options);
    return error == NCCL_PENDING ? 0 : error;
}

/* NCCL_PENDING, 0 when it is made, or an error. */
static int port_make(struct nccl_keeper *self, struct nccl_port *port) {
    const struct nccl_api *api = self->api;
    int error = 0;
    if (port->comm == NULL)
        error = port_begin(self, port);
    if (error == 0)
        error = api->comm_state(api->context, port->comm);
    if (error == 0)
        error = api->comm_register(api->context, port->comm, port->buffer->device,
                                   port->buffer->bytes, &port->handle);
    return error;
}

/* One look at a port. False: there is no answer yet. */
static bool port_turn(struct nccl_keeper *self, struct nccl_port *port, bool unmake) {
    const struct nccl_api *api = self->api;
    if (unmake) {
        port_unmake(self, port);
        port->answered = KEEPER_UNMAKE;
        port->error = 0;
        return true;
    }
    port->answered = port->asked;
    if (port->asked == KEEPER_NAME) {
        port->error = api->unique_id(api->context, &port->id);
        return true;
    }
    port->error = port_make(self, port);
    if (port->error < 0)
        log_line(TRACE_WARNING, "no communicator: %s", api->text(api->context, port->error));
    return port->error != NCCL_PENDING;
}

bool nccl_keeper_turn(struct nccl_keeper *self) {
    bool more = false;
    pthread_mutex_lock(&self->mutex);
    for (struct nccl_port **at = &self->open; *at != NULL;) {
        struct nccl_port *port = *at;
        const bool unmake = port->unmake;
        pthread_mutex_unlock(&self->mutex); /* only this thread takes ports out of the list */
        const bool answered = port_turn(self, port, unmake);
        pthread_mutex_lock(&self->mutex);
        /* Newly asked ones are put in front: look where this one is now. */
        for (at = &self->open; *at != port;)
            at = &(*at)->next;
        if (!answered || (port->unmake && !unmake)) { /* an answer that nobody waits for any more */
            at = &port->next;
            more = true;
            continue;
        }
        *at = port->next;
        port->unmake = false;
        port->next = self->answered;
        self->answered = port;
        if (self->bell != NULL)
            bell_ring(self->bell);
    }
    pthread_mutex_unlock(&self->mutex);
    return more;
}

void nccl_keeper_ask(struct nccl_keeper *self, struct nccl_port *port,
                     enum nccl_question question) {
    pthread_mutex_lock(&self->mutex);
    bool open = false;
    for (struct nccl_port *at = self->open; at != NULL; at = at->next)
        open = open || at == port;
    ASSERT(!open || question == KEEPER_UNMAKE);
    /* It may have been answered, and the answer not been taken: that answer is void. */
    for (struct nccl_port **at = &self->answered; *at != NULL;) {
        if (*at == port)
            *at = port->next;
        else
            at = &(*at)->next;
    }
    if (!open) {
        port->next = self->open;
        self->open = port;
    }
    if (question == KEEPER_UNMAKE)
        port->unmake = true;
    else
        port->asked = question;
    pthread_cond_signal(&self->asked);
    pthread_mutex_unlock(&self->mutex);
}

struct nccl_port *nccl_keeper_answer(struct nccl_keeper *self) {
    pthread_mutex_lock(&self->mutex);
    struct nccl_port *port = self->answered;
    if (port != NULL)
        self->answered = port->next;
    pthread_mutex_unlock(&self->mutex);
    return port;
}

static void *keeper_thread(void *argument) {
    struct nccl_keeper *self = argument;
    self->api->use_device(self->api->context);
    for (;;) {
        bool more = nccl_keeper_turn(self);
        pthread_mutex_lock(&self->mutex);
        while (self->open == NULL && !self->ending)
            pthread_cond_wait(&self->asked, &self->mutex);
        const bool end = self->open == NULL && self->ending;
        pthread_mutex_unlock(&self->mutex);
        if (end)
            return NULL;
        if (more)
            nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
}

int nccl_keeper_open(struct nccl_keeper **ret, const struct nccl_api *api, int channels_max,
                     struct bell *bell, struct failure *failure) {
    struct nccl_keeper *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the keeper of communicators");
    self->api = api;
    self->channels_max = channels_max;
    self->bell = bell;
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->asked, NULL);
    if (bell != NULL && pthread_create(&self->thread, NULL, keeper_thread, self) != 0) {
        free(self);
        return fail(failure, ERR_NO_MEMORY, "no thread for the keeper of communicators");
    }
    *ret = self;
    return 0;
}

void nccl_keeper_close(struct nccl_keeper **keeper) {
    struct nccl_keeper *self = *keeper;
    if (self == NULL)
        return;
    pthread_mutex_lock(&self->mutex);
    self->ending = true;
    pthread_cond_signal(&self->asked);
    pthread_mutex_unlock(&self->mutex);
    if (self->bell != NULL)
        pthread_join(self->thread, NULL);
    else
        nccl_keeper_turn(self);
    ASSERT(self->open == NULL);
    buffers_free(self);
    pthread_mutex_destroy(&self->mutex);
    pthread_cond_destroy(&self->asked);
    free(self);
    *keeper = NULL;
}
