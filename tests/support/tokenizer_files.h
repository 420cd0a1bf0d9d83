/* Tokenizers and golden files for tests; whatever goes wrong fails the test. */
#ifndef TROUPE_TESTS_TOKENIZER_FILES_H
#define TROUPE_TESTS_TOKENIZER_FILES_H

#include <jansson.h>

#include "model/tokenizer.h"

json_t *read_json_file(const char *path);
/* Sets "a.b.c" (numbers index arrays; the end of an array appends) to a new value. */
void json_set_path(json_t *root, const char *path, json_t *value);

/* As tokenizer_open, without a config. */
int open_tokenizer_json(struct tokenizer **ret, const json_t *root, struct failure *failure);
struct tokenizer *open_tokenizer_files(const char *json_path, const char *config_path);

#endif
