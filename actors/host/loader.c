/* One thread packs one expert after the other; the actor goes on meanwhile. */
#include "actors/host/loader.h"

#include <stdlib.h>

#include "actors/host/background.h"
#include "actors/host/thread.h"
#include "kernels/numerics.h"

struct list {
    struct loaded *first, **last;
};

struct loader {
    const struct model_directory *directory;
    const struct kernels *kernels;
    struct bell *bell;
    uint32_t nice;
    pthread_t thread;
    pthread_mutex_t mutex; /* of everything below */
    pthread_cond_t changed;
    struct list wanted, done;
    bool stop;
};

static void list_push(struct list *list, struct loaded *item) {
    item->next = NULL;
    *list->last = item;
    list->last = &item->next;
}

static struct loaded *list_pop(struct list *list) {
    struct loaded *item = list->first;
    if (item != NULL) {
        list->first = item->next;
        if (list->first == NULL)
            list->last = &list->first;
    }
    return item;
}

void loaded_free(struct loaded **self) {
    if (*self != NULL && (*self)->weights != NULL)
        engine_expert_free(&(*self)->weights);
    if (*self != NULL)
        free((*self)->image);
    free(*self);
    *self = NULL;
}

static void pack(struct loader *self, struct loaded *item) {
    const struct model *model = self->directory->model;
    if (item->failure.code < 0) {
        fail(&item->failure, item->failure.code, "%s, by an injected fault", error_name(item->failure.code));
        return;
    }
    if (item->image != NULL) {
        item->bytes = item->image_bytes;
        engine_expert_unpack(model_config(model), self->kernels, item->layer, item->expert, item->image,
                             item->image_bytes, &item->weights, &item->failure);
        free(item->image);
        item->image = NULL;
        return;
    }
    if (self->directory->only_config) {
        fail(&item->failure, ERR_NOT_FOUND, "this process has no file of weights (--weights peer)");
        return;
    }
    int error = engine_expert_pack(model, self->kernels, item->layer, item->expert, &item->weights,
                                   &item->failure);
    if (error < 0)
        return;
    item->bytes = model_expert_bytes(model, item->layer);
    model_directory_forget_expert(self->directory, item->layer, item->expert);
}

static void *run(void *argument) {
    struct loader *self = argument;
    background_enter(self->nice);
    numerics_enter();
    pthread_mutex_lock(&self->mutex);
    while (!self->stop) {
        struct loaded *item = list_pop(&self->wanted);
        if (item == NULL) {
            pthread_cond_wait(&self->changed, &self->mutex);
            continue;
        }
        pthread_mutex_unlock(&self->mutex);
        pack(self, item);
        pthread_mutex_lock(&self->mutex);
        list_push(&self->done, item);
        bell_ring(self->bell);
    }
    pthread_mutex_unlock(&self->mutex);
    return NULL;
}

int loader_open(struct loader **ret, const struct model_directory *directory,
                const struct kernels *kernels, struct bell *bell, uint32_t nice,
                struct failure *failure) {
    struct loader *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the loader");
    self->directory = directory;
    self->kernels = kernels;
    self->bell = bell;
    self->nice = nice;
    self->wanted.last = &self->wanted.first;
    self->done.last = &self->done.first;
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->changed, NULL);
    int error = thread_start(&self->thread, "loader", run, self, failure);
    if (error < 0) {
        free(self);
        return error;
    }
    *ret = self;
    return 0;
}

void loader_close(struct loader **loader) {
    struct loader *self = *loader;
    if (self == NULL)
        return;
    pthread_mutex_lock(&self->mutex);
    self->stop = true;
    pthread_cond_signal(&self->changed);
    pthread_mutex_unlock(&self->mutex);
    pthread_join(self->thread, NULL);
    for (struct loaded *item; (item = list_pop(&self->wanted)) != NULL;)
        loaded_free(&item);
    for (struct loaded *item; (item = list_pop(&self->done)) != NULL;)
        loaded_free(&item);
    pthread_mutex_destroy(&self->mutex);
    pthread_cond_destroy(&self->changed);
    free(self);
    *loader = NULL;
}

static void add(struct loader *self, const struct loaded *wanted) {
    struct loaded *item = malloc(sizeof *item);
    ASSERT(item != NULL);
    *item = *wanted;
    pthread_mutex_lock(&self->mutex);
    list_push(&self->wanted, item);
    pthread_cond_signal(&self->changed);
    pthread_mutex_unlock(&self->mutex);
}

void loader_add(struct loader *self, uint32_t layer, uint32_t expert, uint64_t operation, int error) {
    add(self, &(struct loaded){.layer = layer, .expert = expert, .operation = operation, .failure.code = error});
}

void loader_add_image(struct loader *self, uint32_t layer, uint32_t expert, uint64_t operation,
                      uint8_t *image, uint64_t bytes) {
    add(self, &(struct loaded){.layer = layer, .expert = expert, .operation = operation, .image = image,
                               .image_bytes = bytes});
}

struct loaded *loader_take(struct loader *self) {
    pthread_mutex_lock(&self->mutex);
    struct loaded *item = list_pop(&self->done);
    pthread_mutex_unlock(&self->mutex);
    return item;
}
