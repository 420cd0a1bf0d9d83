/* One expert's packed weights as bytes, for a process that has no file of them: a header with what each matrix is,
 * then the memory of the three. All instruction sets of a numerics profile pack alike (kernels/matrix.c), and all
 * members of a troupe have one profile, so what comes out at the other end is what packing the file would give;
 * the CRC, made when the weights were packed, says so.
 *
 * Whatever the header says is checked against the model's shapes; tables inside the matrices are made anew. */
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define IMAGE_MAGIC    0x45505254u
#define IMAGE_VERSION  2u
#define IMAGE_BLOCK_MAX 65536u

struct image_header {
    uint32_t magic, version, layer, expert;
    struct {
        uint32_t n, k, dtype, block; /* block 0: no scales */
    } part[3];
};
_Static_assert(sizeof(struct image_header) == 64, "matrices begin at a multiple of 64");

static const struct packed *part_of(const struct mlp *mlp, int part) {
    return part == 0 ? &mlp->gate : part == 1 ? &mlp->up : &mlp->down;
}

static struct image_header header_of(const struct expert_weights *weights) {
    struct image_header header = {IMAGE_MAGIC, IMAGE_VERSION, weights->layer, weights->expert, {{0}}};
    for (int i = 0; i < 3; i++) {
        const struct weight_view *shape = &weights->shape[i];
        header.part[i].n = shape->n;
        header.part[i].k = shape->k;
        header.part[i].dtype = shape->dtype;
        header.part[i].block = shape->scale != NULL ? shape->block : 0;
    }
    return header;
}

/* Of a matrix: its memory, or what it has on the device. */
static uint64_t part_bytes(const struct expert_weights *weights, const struct kernels *kernels, int part) {
    const struct matrix *matrix = &part_of(&weights->mlp, part)->matrix;
    return kernels->matrix_read != NULL ? matrix->device_bytes : matrix->bytes;
}

static uint64_t image_bytes(const struct expert_weights *weights) {
    uint64_t bytes = sizeof(struct image_header);
    for (int i = 0; i < 3; i++)
        bytes += weights->image_part[i];
    return bytes;
}

/* The shapes without the weights, for the header, and the sum over all. Views that begin inside a tensor are packed
 * with other borders between blocks than their shape says, and some profiles keep weights where they cannot be
 * read: those are not given away. Of weights on a device the sum is made when they are first asked for. */
void expert_image_prepare(struct expert_weights *weights, const struct kernels *kernels,
                          const struct weight_view view[3]) {
    weights->movable = kernels->matrix_adopt != NULL || kernels->matrix_read != NULL;
    for (int i = 0; i < 3; i++) {
        weights->shape[i] = view[i];
        weights->shape[i].data = NULL;
        weights->movable = weights->movable && !view[i].transposed && view[i].row0 == 0 && view[i].col0 == 0;
    }
    for (int i = 0; i < 3; i++)
        weights->image_part[i] = part_bytes(weights, kernels, i);
    weights->summed = kernels->matrix_read == NULL;
    if (!weights->movable || !weights->summed)
        return;
    struct image_header header = header_of(weights);
    weights->crc = crc32c(0, &header, sizeof header);
    for (int i = 0; i < 3; i++) {
        const struct packed *packed = part_of(&weights->mlp, i);
        weights->crc = crc32c(weights->crc, packed->memory, packed->matrix.bytes);
    }
}

/* Part of a matrix as it was packed first: the image's form does not depend on what is done with it afterwards. */
static void copy_part(const struct packed *packed, const struct kernels *kernels, uint64_t offset,
                      uint32_t bytes, uint8_t *ret) {
    if (kernels->matrix_read != NULL)
        kernels->matrix_read(&packed->matrix, offset, bytes, ret);
    else if (packed->matrix.codes != NULL)
        matrix_read_packed(&packed->matrix, offset, bytes, ret);
    else
        memcpy(ret, (const uint8_t *)packed->memory + offset, bytes);
}

/* Bytes of the image from `offset` on. */
static void copy_out(const struct expert_weights *weights, const struct kernels *kernels, uint64_t offset,
                     uint32_t bytes, uint8_t *ret) {
    struct image_header header = header_of(weights);
    uint64_t begin = 0;
    for (int i = 0; i < 4 && bytes > 0; i++) {
        uint64_t size = i == 0 ? sizeof header : weights->image_part[i - 1], at = offset - begin;
        begin += size;
        if (at >= size)
            continue;
        uint64_t left = size - at;
        uint32_t count = left < bytes ? (uint32_t)left : bytes;
        if (i == 0)
            memcpy(ret, (const uint8_t *)&header + at, count);
        else
            copy_part(part_of(&weights->mlp, i - 1), kernels, at, count, ret);
        ret += count;
        offset += count;
        bytes -= count;
    }
}

/* Of weights on a device, read back once. */
static void sum_up(struct expert_weights *weights, const struct kernels *kernels, uint8_t *chunk) {
    const uint64_t total = image_bytes(weights);
    weights->crc = 0;
    for (uint64_t done = 0; done < total;) {
        const uint32_t count =
            total - done < WEIGHTS_CHUNK_MAX ? (uint32_t)(total - done) : WEIGHTS_CHUNK_MAX;
        copy_out(weights, kernels, done, count, chunk);
        weights->crc = crc32c(weights->crc, chunk, count);
        done += count;
    }
    weights->summed = true;
}

/* PROGRAM_READ. A pair that is not held, or an offset beyond the end: nothing is read, total is 0. */
void experts_read(struct engine *self, const struct program *program, struct program_result *ret) {
    struct expert_weights *weights = experts_held(self, program->layer, program->items);
    struct failure failure;
    ret->piece_bytes = 0;
    ret->total = 0;
    if (weights == NULL || !weights->movable || program->bytes > WEIGHTS_CHUNK_MAX)
        return;
    uint64_t total = image_bytes(weights);
    if (program->offset >= total)
        return;
    void *chunk = experts_chunk(self, WEIGHTS_CHUNK_MAX, &failure);
    if (chunk == NULL)
        return;
    if (!weights->summed)
        sum_up(weights, self->kernels, chunk);
    uint64_t left = total - program->offset;
    ret->piece_bytes = left < program->bytes ? (uint32_t)left : program->bytes;
    copy_out(weights, self->kernels, program->offset, ret->piece_bytes, chunk);
    ret->piece = chunk;
    ret->total = total;
    ret->crc = weights->crc;
}

static int check_part(const struct model_config *config, const struct image_header *header, int part,
                      struct weight_view *ret, struct failure *failure) {
    uint32_t n = part == 2 ? config->hidden : config->expert_width;
    uint32_t k = part == 2 ? config->expert_width : config->hidden;
    static const float scaled = 1;
    if (header->part[part].n != n || header->part[part].k != k)
        return fail(failure, ERR_CORRUPT, "matrix %d: expected %u x %u, found %u x %u", part, n, k,
                    header->part[part].n, header->part[part].k);
    uint32_t dtype = header->part[part].dtype, block = header->part[part].block;
    if ((dtype != DTYPE_F32 && dtype != DTYPE_BF16 && dtype != DTYPE_E4M3) || block > IMAGE_BLOCK_MAX ||
        (block > 0 && dtype != DTYPE_E4M3))
        return fail(failure, ERR_CORRUPT, "matrix %d: element type %u with blocks of %u is unknown",
                    part, dtype, block);
    *ret = (struct weight_view){.dtype = (enum dtype)dtype, .n = n, .k = k, .block = block,
                                .scale = block > 0 ? &scaled : NULL};
    return 0;
}

static int adopt_parts(struct expert_weights *weights, const struct kernels *kernels,
                       const struct weight_view view[3], const uint8_t *at, struct failure *failure) {
    struct packed *parts[3] = {&weights->mlp.gate, &weights->mlp.up, &weights->mlp.down};
    for (int i = 0; i < 3; i++) {
        size_t bytes = kernels->matrix_bytes(&view[i]);
        parts[i]->memory = weight_memory_take(bytes, "expert weights", &weights->bytes, failure);
        if (parts[i]->memory == NULL)
            return ERR_NO_MEMORY;
        parts[i]->bytes = bytes;
        if (kernels->matrix_take_image != NULL) {
            kernels->matrix_take_image(&parts[i]->matrix, &view[i], parts[i]->memory, at);
            weights->bytes += parts[i]->matrix.device_bytes;
            at += parts[i]->matrix.device_bytes;
            continue;
        }
        memcpy(parts[i]->memory, at, bytes);
        kernels->matrix_adopt(&parts[i]->matrix, &view[i], parts[i]->memory);
        at += bytes;
    }
    return 0;
}

int engine_expert_unpack(const struct model_config *config, const struct kernels *kernels,
                         uint32_t layer, uint32_t expert, const void *image, size_t bytes,
                         struct expert_weights **ret, struct failure *failure) {
    struct image_header header;
    struct weight_view view[3];
    uint64_t expected = sizeof header;
    if (kernels->matrix_adopt == NULL && kernels->matrix_take_image == NULL)
        return fail(failure, ERR_UNSUPPORTED, "%s cannot take weights that another process has packed",
                    kernels->name);
    if (bytes < sizeof header)
        return fail(failure, ERR_CORRUPT, "weights of an expert: %zu bytes are too few", bytes);
    memcpy(&header, image, sizeof header);
    if (header.magic != IMAGE_MAGIC || header.version != IMAGE_VERSION || header.layer != layer ||
        header.expert != expert)
        return fail(failure, ERR_CORRUPT,
                    "weights of layer %u expert %u, version %u expected, found layer %u expert %u, version %u",
                    layer, expert, IMAGE_VERSION, header.layer, header.expert, header.version);
    for (int i = 0; i < 3; i++) {
        int error = check_part(config, &header, i, &view[i], failure);
        if (error < 0)
            return error;
        expected += kernels->matrix_image_bytes != NULL ? kernels->matrix_image_bytes(&view[i])
                                                        : kernels->matrix_bytes(&view[i]);
    }
    if (bytes != expected)
        return fail(failure, ERR_CORRUPT, "weights of an expert: expected %llu bytes, found %zu",
                    (unsigned long long)expected, bytes);
    if (expert_fits(kernels, view, failure) < 0)
        return failure->code;
    struct expert_weights *weights = calloc(1, sizeof *weights);
    if (weights == NULL)
        return fail(failure, ERR_NO_MEMORY, "expert %u of layer %u: no memory", expert, layer);
    weights->layer = layer;
    weights->expert = expert;
    int error = adopt_parts(weights, kernels, view, (const uint8_t *)image + sizeof header, failure);
    if (error < 0) {
        engine_expert_free(&weights);
        return error;
    }
    expert_image_prepare(weights, kernels, view);
    error = mlp_code(&weights->mlp, kernels, config->experts, "expert weights", &weights->bytes, failure);
    if (error < 0) {
        engine_expert_free(&weights);
        return error;
    }
    *ret = weights;
    return 0;
}

uint64_t engine_expert_image_limit(const struct model_config *config) {
    uint64_t wide = (uint64_t)config->hidden + 64, narrow = (uint64_t)config->expert_width + 64;
    return sizeof(struct image_header) + 3 * wide * narrow * 5 + 3 * 65536; /* four bytes an element, scales, tables */
}
