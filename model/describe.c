/* What `troupe inspect` prints: family, shapes, experts, dtypes, and how many bytes each actor role
 * will hold. */
#include "model/model.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEXT_BYTES 8192

/* Who holds a weight. Attention actors hold everything but routed experts and the sampler's part.
 */
enum group {
    EMBEDDING,
    ATTENTION,
    DENSE_MLP,
    SHARED_EXPERTS,
    GATES,
    NORMS,
    ROUTED_EXPERTS,
    SAMPLER,
    MTP,
    GROUPS,
};

static const char *const GROUP_NAMES[GROUPS] = {
    [EMBEDDING] = "embedding",
    [ATTENTION] = "attention",
    [DENSE_MLP] = "dense MLP",
    [SHARED_EXPERTS] = "shared experts",
    [GATES] = "gates",
    [NORMS] = "norms",
    [ROUTED_EXPERTS] = "experts",
    [SAMPLER] = "sampler (head)",
    [MTP] = "MTP layers",
};

static const enum group GROUP_OF[WEIGHTS] = {
    [W_EMBED] = EMBEDDING,
    [W_LM_HEAD] = SAMPLER,
    [W_FINAL_NORM] = NORMS,
    [W_INPUT_NORM] = NORMS,
    [W_POST_NORM] = NORMS,
    [W_Q_A] = ATTENTION,
    [W_Q_A_NORM] = NORMS,
    [W_Q_B] = ATTENTION,
    [W_Q] = ATTENTION,
    [W_KV_A] = ATTENTION,
    [W_KV_A_NORM] = NORMS,
    [W_KV_B] = ATTENTION,
    [W_O] = ATTENTION,
    [W_DENSE_GATE] = DENSE_MLP,
    [W_DENSE_UP] = DENSE_MLP,
    [W_DENSE_DOWN] = DENSE_MLP,
    [W_SHARED_GATE] = SHARED_EXPERTS,
    [W_SHARED_UP] = SHARED_EXPERTS,
    [W_SHARED_DOWN] = SHARED_EXPERTS,
    [W_GATE] = GATES,
    [W_GATE_BIAS] = GATES,
    [W_MTP_ENORM] = MTP,
    [W_MTP_HNORM] = MTP,
    [W_MTP_EH_PROJ] = MTP,
    [W_MTP_HEAD_NORM] = MTP,
};

struct text {
    char *bytes; /* [TEXT_BYTES] */
    size_t used;
};

static void say(struct text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(struct text *text, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text->bytes + text->used, TEXT_BYTES - text->used, format, arguments);
    va_end(arguments);
    ASSERT(length >= 0 && (size_t)length < TEXT_BYTES - text->used);
    text->used += (size_t)length;
}

struct amount {
    uint64_t tensors, parameters, bytes;
};

struct tally {
    struct amount group[GROUPS];
    struct amount dtype[8];
    uint64_t active; /* parameters that one token meets */
};

static void count_tensor(struct tally *tally, enum group group, const struct tensor *tensor,
                         uint64_t parameters) {
    ASSERT(tensor->dtype < sizeof tally->dtype / sizeof *tally->dtype);
    tally->dtype[tensor->dtype].tensors++;
    tally->dtype[tensor->dtype].bytes += tensor->bytes;
    tally->group[group].tensors++;
    tally->group[group].parameters += parameters;
    tally->group[group].bytes += tensor->bytes;
}

static void count_weight(const struct model *self, struct tally *tally, enum group group,
                         const struct weight_spec *spec) {
    const struct tensor *tensor = model_tensor(self, spec->name);
    ASSERT(tensor != NULL);
    count_tensor(tally, group, tensor, (uint64_t)spec->rows * spec->columns);
    if (tensor->dtype == DTYPE_E4M3) {
        char name[TENSOR_NAME_BYTES_MAX + 16];
        snprintf(name, sizeof name, "%s_scale_inv", spec->name);
        count_tensor(tally, group, model_tensor(self, name), 0);
    }
}

static void count_layer(const struct model *self, struct tally *tally, uint32_t layer) {
    const struct model_config *config = &self->config;
    bool mtp = layer >= config->layers;
    struct weight_spec spec;
    for (enum weight which = W_FINAL_NORM + 1; which < WEIGHTS; which++)
        if (weight_specify(config, which, layer, &spec))
            count_weight(self, tally, mtp ? MTP : GROUP_OF[which], &spec);
    if (!model_layer_is_moe(config, layer))
        return;
    uint64_t before = tally->group[ROUTED_EXPERTS].parameters;
    for (uint32_t expert = 0; expert < config->experts; expert++)
        for (enum expert_part part = EXPERT_GATE; part <= EXPERT_DOWN; part++) {
            weight_specify_expert(config, layer, part, expert, &spec);
            count_weight(self, tally, mtp ? MTP : ROUTED_EXPERTS, &spec);
        }
    uint64_t layer_parameters = tally->group[ROUTED_EXPERTS].parameters - before;
    tally->active += layer_parameters / config->experts * config->gate.k;
}

static void count_all(const struct model *self, struct tally *tally) {
    const struct model_config *config = &self->config;
    struct weight_spec spec;
    for (enum weight which = W_EMBED; which <= W_FINAL_NORM; which++)
        if (!(which == W_LM_HEAD && config->tie_embeddings) &&
            weight_specify(config, which, 0, &spec))
            count_weight(self, tally, GROUP_OF[which], &spec);
    for (uint32_t layer = 0; layer < config->layers + config->mtp_layers; layer++)
        count_layer(self, tally, layer);
    for (enum group group = 0; group < GROUPS; group++)
        if (group != ROUTED_EXPERTS && group != MTP && group != EMBEDDING)
            tally->active += tally->group[group].parameters;
    if (config->tie_embeddings)
        tally->active += tally->group[EMBEDDING].parameters;
}

/* "26.5 MB", "671 B": three digits and a unit, decimal. */
static const char *short_number(uint64_t value, const char *const units[4], char ret[static 24]) {
    double number = (double)value;
    int unit = 0;
    for (; number >= 999.5 && unit < 3; unit++)
        number /= 1000;
    snprintf(ret, 24, "%.*f %s",
             unit == 0 || number >= 99.95 ? 0
             : number >= 9.995            ? 1
                                          : 2,
             number, units[unit]);
    return ret;
}

static const char *show_bytes(uint64_t bytes, char ret[static 24]) {
    static const char *const UNITS[] = {"bytes", "kB", "MB", "GB"};
    return short_number(bytes, UNITS, ret);
}

static const char *show_count(uint64_t count, char ret[static 24]) {
    static const char *const UNITS[] = {"", "thousand", "million", "billion"};
    return short_number(count, UNITS, ret);
}

static void say_shape(struct text *text, const struct model_config *config) {
    uint32_t moe = 0;
    for (uint32_t layer = 0; layer < config->layers; layer++)
        moe += model_layer_is_moe(config, layer);
    say(text, "family       %s, %u layers (%u dense, %u MoE), %u MTP layer%s\n", config->model_type,
        config->layers, config->layers - moe, moe, config->mtp_layers,
        config->mtp_layers == 1 ? "" : "s");
    say(text, "shape        hidden %u, vocabulary %u, context %u%s\n", config->hidden,
        config->vocabulary, config->context, config->tie_embeddings ? ", tied embeddings" : "");
    say(text, "attention    %u heads, ", config->heads);
    if (config->q_lora > 0)
        say(text, "q_lora %u, ", config->q_lora);
    say(text, "kv_lora %u, nope %u, rope %u, v %u; theta %g", config->kv_lora, config->nope,
        config->rope, config->v, config->rope_parameters.theta);
    if (config->rope_parameters.yarn_factor > 1)
        say(text, ", YaRN x %g of %g positions", config->rope_parameters.yarn_factor,
            config->rope_parameters.original_positions);
    say(text, "\n");
    if (moe < config->layers)
        say(text, "dense MLP    width %u\n", config->dense_width);
    if (config->experts == 0)
        return;
    const struct gate_parameters *gate = &config->gate;
    say(text, "experts      %u a layer of width %u, %u a token, %u shared\n", config->experts,
        config->expert_width, gate->k, config->shared_experts);
    say(text, "gate         %s", gate->scoring == GATE_SIGMOID ? "sigmoid" : "softmax");
    if (gate->groups > 1)
        say(text, ", %u of %u groups by %s", gate->groups_chosen, gate->groups,
            gate->group_score == GATE_GROUP_MAX ? "their best" : "the sum of their two best");
    say(text, "%s, scaled by %g\n", gate->normalise ? ", normalised" : "", gate->scaling);
}

static void say_amounts(struct text *text, const struct model *self, const struct tally *tally) {
    char number[24], other[24];
    uint64_t bytes = 0, parameters = 0, tensors = 0;
    for (enum group group = 0; group < GROUPS; group++) {
        bytes += tally->group[group].bytes;
        parameters += tally->group[group].parameters;
        tensors += tally->group[group].tensors;
    }
    say(text, "parameters   %s, ", show_count(parameters - tally->group[MTP].parameters, number));
    say(text, "%s active for a token", show_count(tally->active, number));
    if (tally->group[MTP].parameters > 0)
        say(text, "; MTP %s more", show_count(tally->group[MTP].parameters, number));
    say(text, "\nweights      %s in %llu tensors of %u file%s:", show_bytes(bytes, number),
        (unsigned long long)tensors, self->shards, self->shards == 1 ? "" : "s");
    bool first = true;
    for (size_t dtype = 0; dtype < sizeof tally->dtype / sizeof *tally->dtype; dtype++) {
        if (tally->dtype[dtype].tensors == 0)
            continue;
        say(text, "%s %s %s", first ? "" : ",", dtype_name((enum dtype)dtype),
            show_bytes(tally->dtype[dtype].bytes, number));
        first = false;
    }
    say(text, "\n");
    for (enum group group = 0; group < GROUPS; group++) {
        if (tally->group[group].tensors == 0)
            continue;
        say(text, "  %-16s %12s  %5.1f %%", GROUP_NAMES[group],
            show_bytes(tally->group[group].bytes, number),
            100.0 * (double)tally->group[group].bytes / (double)bytes);
        if (group == ROUTED_EXPERTS) {
            uint32_t layer = 0;
            while (!model_layer_is_moe(&self->config, layer))
                layer++;
            say(text, "  (%s each)", show_bytes(model_expert_bytes(self, layer), other));
        }
        say(text, "\n");
    }
    if (tensors < self->tensors)
        say(text, "unused       %llu tensors that no role asks for\n",
            (unsigned long long)(self->tensors - tensors));
}

char *model_describe(const struct model *self) {
    struct text text = {.bytes = malloc(TEXT_BYTES)};
    if (text.bytes == NULL)
        return NULL;
    struct tally tally = {0};
    count_all(self, &tally);
    say_shape(&text, &self->config);
    say_amounts(&text, self, &tally);
    say(&text, "fingerprint  %s\n", self->fingerprint);
    return text.bytes;
}
