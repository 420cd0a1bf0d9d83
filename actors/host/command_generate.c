/* troupe generate: one answer in the terminal, token by token, by the actors that serve. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/commands.h"
#include "actors/host/local_world.h"

static bool is_end(const struct model_config *config, const struct tokenizer *tokenizer,
                   uint32_t token) {
    for (uint32_t i = 0; i < config->eos_count; i++) {
        if ((uint32_t)config->eos[i] == token)
            return true;
    }
    return (int64_t)token == tokenizer_eos(tokenizer);
}

static void show(struct detokenizer *detokenizer, const struct tokenizer *tokenizer,
                 uint32_t token) {
    size_t room = token == UINT32_MAX ? 64 : detokenizer_room(tokenizer, token);
    char *text = malloc(room + 1);
    ASSERT(text != NULL);
    size_t size = detokenizer_push(detokenizer, tokenizer, token, text, room);
    fwrite(text, 1, size, stdout);
    fflush(stdout);
    free(text);
}

/* Steps the world and prints tokens as they come. */
static int stream(struct local_world *local, const struct tokenizer *tokenizer) {
    const struct model_config *config = model_config(local->directory.model);
    struct actor *probe = world_actor(local->world, ROLE_GATEWAY, 0);
    struct detokenizer detokenizer;
    uint32_t shown = 0;
    bool ended = false;
    detokenizer_init(&detokenizer, true);
    while (probe != NULL && !ended && !probe_done(probe)) {
        if (!world_step(local->world))
            break;
        probe = world_actor(local->world, ROLE_GATEWAY, 0);
        const struct probe_answer *answer = probe != NULL ? probe_answer(probe, 0) : NULL;
        while (answer != NULL && !ended && shown < answer->tokens) {
            uint32_t token = answer->token[shown++];
            ended = is_end(config, tokenizer, token);
            if (!ended)
                show(&detokenizer, tokenizer, token);
        }
    }
    show(&detokenizer, tokenizer, UINT32_MAX);
    printf("\n");
    const struct probe_answer *answer = probe != NULL ? probe_answer(probe, 0) : NULL;
    if (ended || (answer != NULL && answer->done && answer->error == 0))
        return 0;
    fprintf(stderr, "troupe generate: %s\n",
            answer != NULL && answer->error < 0 ? error_name(answer->error) : "the actors stopped");
    return 1;
}

static int generate(const struct options *options, struct failure *failure) {
    struct tokenizer *tokenizer = NULL;
    struct token_list prompt = {0};
    struct local_world local = {0};
    int code = 1;
    int error = tokenizer_directory_open(&tokenizer, options->model, failure);
    if (error == 0)
        error = tokenizer_encode(tokenizer, options->prompt, strlen(options->prompt), true, true,
                                 &prompt, failure);
    if (error == 0 && prompt.count == 0)
        error = fail(failure, ERR_INVALID, "the prompt is empty");
    if (error == 0)
        error = local_world_open(&local, options->model, options, failure);
    struct probe_request request = {
        .token = prompt.token,
        .tokens = prompt.count,
        .max_tokens = (uint32_t)options->max_tokens,
        .temperature = (float)options->temperature,
        .top_p = 1,
        .seed = options->seed,
    };
    if (error == 0) {
        uint32_t context = model_config(local.directory.model)->context;
        if (prompt.count >= context)
            error = fail(failure, ERR_TOO_LARGE, "the prompt has %u tokens, the context holds %u",
                         prompt.count, context);
        else if (request.max_tokens > context - prompt.count)
            request.max_tokens = context - prompt.count;
    }
    if (error == 0)
        error = local_world_start(&local, options, &request, 1, failure);
    if (error == 0) {
        printf("%s", options->prompt);
        code = stream(&local, tokenizer);
    }
    local_world_close(&local);
    token_list_free(&prompt);
    if (tokenizer != NULL)
        tokenizer_close(&tokenizer);
    return error < 0 ? error : code;
}

int command_generate(const struct options *options) {
    struct failure failure;
    if (options->prompt == NULL) {
        fprintf(stderr, "troupe generate: expected --prompt TEXT\n");
        return 2;
    }
    struct options own = *options;
    own.settings.expected_experts = (uint32_t)own.experts;
    int result = generate(&own, &failure);
    if (result < 0) {
        fprintf(stderr, "troupe generate: %s\n", failure.text);
        return 1;
    }
    return result;
}
