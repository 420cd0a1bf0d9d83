/* Two threads pack one expert after the other, one of them what is urgent; the actor goes on meanwhile. */
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
    struct packer {
        struct loader *loader;
        pthread_t thread;
        bool urgent;
        struct list wanted; /* under the loader's mutex */
    } packer[2];            /* in the background, urgent */
    uint32_t packers;       /* started */
    pthread_mutex_t mutex; /* of everything below */
    pthread_cond_t changed;
    struct list done;
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
    struct packer *packer = argument;
    struct loader *self = packer->loader;
    if (!packer->urgent)
        background_enter(self->nice);
    numerics_enter();
    pthread_mutex_lock(&self->mutex);
    while (!self->stop) {
        struct loaded *item = list_pop(&packer->wanted);
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
    self->done.last = &self->done.first;
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->changed, NULL);
    int error = 0;
    uint32_t packers = kernels->matrix_adopt != NULL ? 2 : 1; /* a device packs for one thread at a time */
    while (self->packers < packers && error == 0) {
        struct packer *packer = &self->packer[self->packers];
        *packer = (struct packer){.loader = self, .urgent = self->packers + 1 == packers};
        packer->wanted.last = &packer->wanted.first;
        error = thread_start(&packer->thread, packer->urgent ? "loader" : "loader-slow", run, packer, failure);
        self->packers += error == 0;
    }
    if (error < 0) {
        loader_close(&self);
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
    pthread_cond_broadcast(&self->changed);
    pthread_mutex_unlock(&self->mutex);
    for (uint32_t i = 0; i < self->packers; i++)
        pthread_join(self->packer[i].thread, NULL);
    for (uint32_t i = 0; i < self->packers; i++)
        for (struct loaded *item; (item = list_pop(&self->packer[i].wanted)) != NULL;)
            loaded_free(&item);
    for (struct loaded *item; (item = list_pop(&self->done)) != NULL;)
        loaded_free(&item);
    pthread_mutex_destroy(&self->mutex);
    pthread_cond_destroy(&self->changed);
    free(self);
    *loader = NULL;
}

static void add(struct loader *self, const struct loaded *wanted, bool urgent) {
    struct loaded *item = malloc(sizeof *item);
    ASSERT(item != NULL);
    *item = *wanted;
    pthread_mutex_lock(&self->mutex);
    list_push(&self->packer[urgent && self->packers > 1].wanted, item);
    pthread_cond_broadcast(&self->changed);
    pthread_mutex_unlock(&self->mutex);
}

void loader_add(struct loader *self, uint32_t layer, uint32_t expert, uint64_t operation, bool urgent,
                int error) {
    add(self, &(struct loaded){.layer = layer, .expert = expert, .operation = operation, .failure.code = error},
        urgent);
}

void loader_add_image(struct loader *self, uint32_t layer, uint32_t expert, uint64_t operation,
                      uint8_t *image, uint64_t bytes) {
    add(self, &(struct loaded){.layer = layer, .expert = expert, .operation = operation, .image = image,
                               .image_bytes = bytes},
        false);
}

struct loaded *loader_take(struct loader *self) {
    pthread_mutex_lock(&self->mutex);
    struct loaded *item = list_pop(&self->done);
    pthread_mutex_unlock(&self->mutex);
    return item;
}
