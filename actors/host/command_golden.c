/* troupe check --golden: the logits of every position and the greedy tokens, through the same
 * actors as serving, against an oracle's. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/commands.h"
#include "actors/host/golden_mtp.h"
#include "actors/host/local_world.h"
#include "model/synth.h"

#define F32_DIFFERENCE_MAX 2e-3
#define BF16_KL_MAX        1.4e-3 /* what the oracle itself loses in BF16 on the demo model */
#define MTP_KL_MAX         2e-3   /* the module stands on the main layers' output */
#define RANDOM_KL_MAX      1e-2   /* random weights; the oracle in BF16: 9e-3 */
#define FP8_KL_MAX         1.2e-2 /* what quantised activations cost, measured against float32 */
#define FP8_RANDOM_KL_MAX  8e-2

struct golden {
    struct mapped file;
    struct safetensors *tensors;
    const int32_t *input; /* [sequences, positions] */
    const float *logits;  /* [sequences, positions, vocabulary] */
    uint32_t sequences, positions, vocabulary;
    const float *mtp_logits; /* [sequences, positions - 1, vocabulary]; NULL if absent */
    const int32_t *greedy_prompt,
        *greedy_output; /* output: the prompt and what follows; NULL if absent */
    uint32_t greedy_prompt_tokens, greedy_tokens;
};

struct comparison {
    double difference, kl_sum;
    uint64_t positions, top1_equal;
    uint64_t margin_positions[2], margin_equal[2]; /* oracle's margin over 0.25 and over 0.5 */
    uint32_t greedy, greedy_equal;
};

/* ---- the golden file ---- */

static const struct tensor *need(const struct golden *self, const char *name, enum dtype dtype,
                                 uint32_t dims, struct failure *failure) {
    const struct tensor *tensor = safetensors_find(self->tensors, name);
    if (tensor == NULL) {
        fail(failure, ERR_NOT_FOUND, "golden.safetensors: expected a tensor '%s', found none",
             name);
        return NULL;
    }
    if (tensor->dtype != dtype || tensor->dims != dims) {
        fail(failure, ERR_INVALID, "golden.safetensors: %s: expected %u dimensions of %s", name,
             dims, dtype == DTYPE_F32 ? "F32" : "I32");
        return NULL;
    }
    return tensor;
}

static int check_tokens(const int32_t *token, uint64_t count, uint32_t vocabulary, const char *name,
                        struct failure *failure) {
    for (uint64_t i = 0; i < count; i++) {
        if (token[i] < 0 || (uint32_t)token[i] >= vocabulary)
            return fail(failure, ERR_INVALID,
                        "golden.safetensors: %s[%llu]: expected a token below %u, found %d", name,
                        (unsigned long long)i, vocabulary, token[i]);
    }
    return 0;
}

static int read_greedy(struct golden *self, struct failure *failure) {
    const struct tensor *prompt = safetensors_find(self->tensors, "greedy_prompt");
    const struct tensor *output = safetensors_find(self->tensors, "greedy_output");
    if (prompt == NULL || output == NULL)
        return 0;
    uint64_t prompts = prompt->bytes / 4, outputs = output->bytes / 4;
    if (prompt->dtype != DTYPE_I32 || output->dtype != DTYPE_I32 || prompts == 0 ||
        outputs <= prompts || outputs > CONTEXT_MAX)
        return fail(failure, ERR_INVALID,
                    "golden.safetensors: expected greedy_output to be greedy_prompt "
                    "with tokens added (I32), found %llu and %llu tokens",
                    (unsigned long long)prompts, (unsigned long long)outputs);
    self->greedy_prompt = prompt->data;
    self->greedy_output = output->data;
    self->greedy_prompt_tokens = (uint32_t)prompts;
    self->greedy_tokens = (uint32_t)(outputs - prompts);
    int error =
        check_tokens(self->greedy_prompt, prompts, self->vocabulary, "greedy_prompt", failure);
    return error == 0 ? check_tokens(self->greedy_output, outputs, self->vocabulary,
                                     "greedy_output", failure)
                      : error;
}

static int read_mtp(struct golden *self, struct failure *failure) {
    const struct tensor *mtp = safetensors_find(self->tensors, "mtp_logits");
    if (mtp == NULL)
        return 0;
    if (mtp->dtype != DTYPE_F32 || mtp->dims != 3 || mtp->shape[0] != self->sequences ||
        mtp->shape[1] + 1 != self->positions || mtp->shape[2] != self->vocabulary)
        return fail(failure, ERR_INVALID,
                    "golden.safetensors: expected mtp_logits [%u, %u, %u] (F32)", self->sequences,
                    self->positions - 1, self->vocabulary);
    self->mtp_logits = mtp->data;
    return 0;
}

static int golden_read(struct golden *self, const struct model_config *config,
                       struct failure *failure) {
    const struct tensor *input = need(self, "input_ids", DTYPE_I32, 2, failure);
    const struct tensor *logits =
        input != NULL ? need(self, "logits", DTYPE_F32, 3, failure) : NULL;
    if (logits == NULL)
        return failure->code;
    if (logits->shape[0] != input->shape[0] || logits->shape[1] != input->shape[1] ||
        logits->shape[2] != config->vocabulary || input->shape[0] == 0 || input->shape[0] > 4096 ||
        input->shape[1] == 0 || input->shape[1] > config->context)
        return fail(failure, ERR_INVALID,
                    "golden.safetensors: expected logits [B, T, %u] for input_ids [B, T], found "
                    "[%llu, %llu, %llu] "
                    "for [%llu, %llu]",
                    config->vocabulary, (unsigned long long)logits->shape[0],
                    (unsigned long long)logits->shape[1], (unsigned long long)logits->shape[2],
                    (unsigned long long)input->shape[0], (unsigned long long)input->shape[1]);
    self->sequences = (uint32_t)input->shape[0];
    self->positions = (uint32_t)input->shape[1];
    self->vocabulary = config->vocabulary;
    self->input = input->data;
    self->logits = logits->data;
    int error = check_tokens(self->input, (uint64_t)self->sequences * self->positions,
                             self->vocabulary, "input_ids", failure);
    if (error == 0)
        error = read_mtp(self, failure);
    return error == 0 ? read_greedy(self, failure) : error;
}

static int golden_open(struct golden *ret, const char *directory, const struct model_config *config,
                       struct failure *failure) {
    struct golden self = {0};
    int error = mapped_open(&self.file, directory, "golden.safetensors", (size_t)1 << 40, failure);
    if (error < 0)
        return error;
    error = safetensors_open(&self.tensors, self.file.bytes, self.file.size, "golden.safetensors",
                             failure);
    if (error == 0)
        error = golden_read(&self, config, failure);
    if (error < 0) {
        if (self.tensors != NULL)
            safetensors_close(&self.tensors);
        mapped_close(&self.file);
        return error;
    }
    *ret = self;
    return 0;
}

/* ---- comparison ---- */

static uint32_t largest(const float *x, uint32_t n) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) {
        if (x[i] > x[best])
            best = i;
    }
    return best;
}

static double log_sum_exp(const float *x, uint32_t n, float max) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += exp((double)x[i] - max);
    return max + log(sum);
}

/* One position: sum of KL(oracle || ours), largest difference, agreement of the best token. */
static void compare_position(struct comparison *self, const float *oracle, const float *ours,
                             uint32_t n) {
    uint32_t best = largest(oracle, n), own = largest(ours, n);
    double oracle_norm = log_sum_exp(oracle, n, oracle[best]);
    double own_norm = log_sum_exp(ours, n, ours[own]), kl = 0;
    float second = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        double difference = fabs((double)oracle[i] - ours[i]);
        if (!(difference <= self->difference)) /* NaN counts */
            self->difference = difference;
        double log_p = oracle[i] - oracle_norm;
        kl += exp(log_p) * (log_p - (ours[i] - own_norm));
        if (i != best && oracle[i] > second)
            second = oracle[i];
    }
    static const float margins[2] = {0.25f, 0.5f};
    self->kl_sum += kl;
    self->positions++;
    self->top1_equal += best == own;
    for (int m = 0; m < 2; m++) {
        if (oracle[best] - second > margins[m]) {
            self->margin_positions[m]++;
            self->margin_equal[m] += best == own;
        }
    }
}

static int compare(struct comparison *self, const struct golden *golden, const struct actor *probe,
                   struct failure *failure) {
    for (uint32_t b = 0; b < golden->sequences; b++) {
        const struct probe_answer *answer = probe_answer(probe, b);
        if (answer->error < 0 || answer->logits == NULL || answer->logits_rows != golden->positions)
            return fail(failure, answer->error < 0 ? answer->error : ERR_STATE,
                        "sequence %u: expected logits of %u positions, found %u (%s)", b,
                        golden->positions, answer->logits_rows,
                        answer->error < 0 ? error_name(answer->error) : "no error");
        for (uint32_t t = 0; t < golden->positions; t++)
            compare_position(
                self, golden->logits + ((size_t)b * golden->positions + t) * golden->vocabulary,
                answer->logits + (size_t)t * golden->vocabulary, golden->vocabulary);
    }
    if (golden->greedy_tokens == 0)
        return 0;
    const struct probe_answer *answer = probe_answer(probe, golden->sequences);
    const int32_t *expected = golden->greedy_output + golden->greedy_prompt_tokens;
    self->greedy = golden->greedy_tokens;
    while (self->greedy_equal < self->greedy && self->greedy_equal < answer->tokens &&
           answer->token[self->greedy_equal] == (uint32_t)expected[self->greedy_equal])
        self->greedy_equal++;
    return 0;
}

static void print_row(const char *what, const char *value, const char *criterion, bool holds) {
    printf("golden: %-28s %-18s %s%s\n", what, value, criterion,
           criterion[0] == 0 ? ""
           : holds           ? "  holds"
                             : "  FAILS");
}

/* Prints the figures. True if those that count for this profile and kind of model hold. */
static bool judge(const struct comparison *self, enum profile profile, bool trained) {
    const bool f32 = profile == PROFILE_F32, fp8 = profile == PROFILE_FP8;
    char value[64], limit[64];
    double kl = self->kl_sum / (double)self->positions;
    bool difference_holds = !f32 || self->difference <= F32_DIFFERENCE_MAX;
    snprintf(value, sizeof value, "%.3g", self->difference);
    snprintf(limit, sizeof limit, "at most %g", F32_DIFFERENCE_MAX);
    print_row("largest difference", value, f32 ? limit : "", difference_holds);
    double kl_max = trained ? BF16_KL_MAX : RANDOM_KL_MAX;
    if (fp8)
        kl_max = trained ? FP8_KL_MAX : FP8_RANDOM_KL_MAX;
    bool kl_holds = f32 || kl <= kl_max;
    snprintf(value, sizeof value, "%.3g", kl);
    snprintf(limit, sizeof limit, "at most %g", kl_max);
    print_row("mean KL(oracle || ours)", value, f32 ? "" : limit, kl_holds);
    snprintf(value, sizeof value, "%llu of %llu", (unsigned long long)self->top1_equal,
             (unsigned long long)self->positions);
    print_row("best token equal", value, "", true);
    bool top1_holds = f32 || fp8 || !trained || self->margin_equal[0] == self->margin_positions[0];
    static const char *const names[2] = {"  where the margin is > 0.25",
                                         "  where the margin is > 0.5"};
    for (int m = 0; m < 2; m++) {
        snprintf(value, sizeof value, "%llu of %llu", (unsigned long long)self->margin_equal[m],
                 (unsigned long long)self->margin_positions[m]);
        print_row(names[m], value, !f32 && !fp8 && trained && m == 0 ? "all" : "", top1_holds);
    }
    bool greedy_holds = !f32 || self->greedy_equal == self->greedy;
    snprintf(value, sizeof value, "%u of %u", self->greedy_equal, self->greedy);
    print_row("greedy tokens equal", value, f32 ? "all" : "", greedy_holds);
    return difference_holds && kl_holds && top1_holds && greedy_holds;
}

/* ---- the run ---- */

static int run_world(struct local_world *local, const struct options *options,
                     const struct golden *golden, struct comparison *ret, struct failure *failure) {
    uint32_t count = golden->sequences + (golden->greedy_tokens > 0);
    struct probe_request *requests = calloc(count, sizeof *requests);
    if (requests == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for %u requests", count);
    for (uint32_t b = 0; b < golden->sequences; b++)
        requests[b] = (struct probe_request){
            .token = (const uint32_t *)golden->input + (size_t)b * golden->positions,
            .tokens = golden->positions,
            .full_logits = true,
            .top_p = 1,
        };
    if (golden->greedy_tokens > 0)
        requests[golden->sequences] = (struct probe_request){
            .token = (const uint32_t *)golden->greedy_prompt,
            .tokens = golden->greedy_prompt_tokens,
            .max_tokens = golden->greedy_tokens,
            .top_p = 1,
        };
    int error = local_world_start(local, options, requests, count, failure);
    free(requests);
    struct actor *probe = error == 0 ? world_actor(local->world, ROLE_GATEWAY, 0) : NULL;
    while (error == 0 && (probe == NULL || !probe_done(probe))) {
        if (probe == NULL || !world_step(local->world))
            error = fail(failure, ERR_STATE, "the actors stopped before all answers were there");
        probe = error == 0 ? world_actor(local->world, ROLE_GATEWAY, 0) : NULL;
    }
    return error == 0 ? compare(ret, golden, probe, failure) : error;
}

struct mtp_comparison {
    struct comparison comparison;
    const struct golden *golden;
};

static void compare_mtp(void *context, uint32_t sequence, uint32_t position, const float *logits) {
    struct mtp_comparison *self = context;
    const struct golden *golden = self->golden;
    size_t at = (size_t)sequence * (golden->positions - 1) + position;
    compare_position(&self->comparison, golden->mtp_logits + at * golden->vocabulary, logits,
                     golden->vocabulary);
}

/* The MTP module, where the oracle and the model have one. */
static int check_mtp(const struct local_world *local, const struct golden *golden,
                     enum profile profile, bool latent_fp8, bool *ret_holds,
                     struct failure *failure) {
    struct mtp_comparison mtp = {.golden = golden};
    const struct comparison *found = &mtp.comparison;
    const bool f32 = profile == PROFILE_F32;
    const double kl_max = profile == PROFILE_FP8 ? FP8_KL_MAX : MTP_KL_MAX;
    *ret_holds = true;
    if (golden->mtp_logits == NULL || model_config(local->directory.model)->mtp_layers == 0)
        return 0;
    int error = golden_mtp(local->directory.model, local->kernels, latent_fp8, golden->input,
                           golden->sequences, golden->positions, compare_mtp, &mtp, failure);
    if (error < 0 || found->positions == 0)
        return error;
    char value[64], limit[64];
    double kl = found->kl_sum / (double)found->positions;
    *ret_holds = f32 ? found->difference <= F32_DIFFERENCE_MAX : kl <= kl_max;
    snprintf(value, sizeof value, "%.3g", f32 ? found->difference : kl);
    snprintf(limit, sizeof limit, "at most %g", f32 ? F32_DIFFERENCE_MAX : kl_max);
    print_row(f32 ? "MTP: largest difference" : "MTP: mean KL(oracle || ours)", value, limit,
              *ret_holds);
    snprintf(value, sizeof value, "%llu of %llu", (unsigned long long)found->top1_equal,
             (unsigned long long)found->positions);
    print_row("MTP: best token equal", value, "", true);
    return 0;
}

/* Trained weights are held to more than random ones. Random ones come without a tokenizer, or from
 * `troupe synth`, which says so in config.json. */
static bool is_trained(const char *directory) {
    struct mapped tokenizer, config;
    if (mapped_open(&tokenizer, directory, "tokenizer.json", JSON_FILE_MAX, NULL) < 0)
        return false;
    mapped_close(&tokenizer);
    if (mapped_open(&config, directory, "config.json", JSON_FILE_MAX, NULL) < 0)
        return false;
    bool random = memmem(config.bytes, config.size, SYNTH_MARK, strlen(SYNTH_MARK)) != NULL;
    mapped_close(&config);
    return !random;
}

int command_golden(const struct options *given) {
    struct options options = *given;
    struct local_world local = {0};
    struct golden golden = {0};
    struct comparison comparison = {0};
    struct failure failure;
    options.settings.expected_experts = (uint32_t)options.experts;
    int error = local_world_open(&local, options.golden, &options, &failure);
    if (error == 0)
        error = golden_open(&golden, options.golden, model_config(local.directory.model), &failure);
    if (error == 0)
        error = run_world(&local, &options, &golden, &comparison, &failure);
    if (error < 0) {
        fprintf(stderr, "troupe check: %s\n", failure.text);
    } else {
        printf("golden: %s, %s, %u sequences of %u tokens\n", options.golden, local.kernels->name,
               golden.sequences, golden.positions);
        const bool latent_fp8 = options.settings.latent_fp8 != 0;
        /* an FP8 cache costs a BF16 profile less than quantised activations do, but more than BF16 */
        const enum profile profile = latent_fp8 ? PROFILE_FP8 : profile_of_name(options.numerics);
        bool mtp_holds = true;
        bool holds = judge(&comparison, profile, is_trained(options.golden));
        error = check_mtp(&local, &golden, profile, latent_fp8, &mtp_holds, &failure);
        if (error < 0)
            fprintf(stderr, "troupe check: %s\n", failure.text);
        else if (!holds || !mtp_holds)
            error = ERR_STATE;
    }
    local_world_close(&local);
    if (golden.tensors != NULL) {
        safetensors_close(&golden.tensors);
        mapped_close(&golden.file);
    }
    return error == 0 ? 0 : 1;
}
