/* troupe inspect: what a model directory holds. */
#include <stdio.h>
#include <stdlib.h>

#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "model/chat.h"

static void describe_tokenizer(const char *path) {
    struct tokenizer *tokenizer;
    struct failure failure;
    if (tokenizer_directory_open(&tokenizer, path, &failure) < 0) {
        printf("tokenizer    %s\n", failure.text);
        return;
    }
    enum chat_format chat = chat_recognise(tokenizer, &failure);
    printf("tokenizer    %u tokens\n", tokenizer_vocabulary(tokenizer));
    printf("chat format  %s\n", chat == CHAT_NONE ? failure.text : chat_format_name(chat));
    tokenizer_close(&tokenizer);
}

int command_inspect(const struct options *options) {
    if (options->positionals != 1) {
        fprintf(stderr,
                "troupe inspect: expected one model directory; see troupe inspect --help\n");
        return 2;
    }
    struct model_directory directory;
    struct failure failure;
    if (model_directory_open(&directory, options->positional[0], &failure) < 0) {
        fprintf(stderr, "troupe inspect: %s\n", failure.text);
        return 1;
    }
    char *text = model_describe(directory.model);
    printf("%s", text != NULL ? text : "");
    free(text);
    describe_tokenizer(options->positional[0]);
    model_directory_close(&directory);
    return 0;
}
