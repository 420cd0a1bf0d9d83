#include "tests/support/tokenizer_files.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "tests/support/model_files.h"

static char *read_file(const char *path, size_t *ret_bytes) {
    char *bytes = read_whole_file(path, ret_bytes);
    if (bytes == NULL)
        fail_msg("cannot read %s", path);
    return bytes;
}

json_t *read_json_file(const char *path) {
    size_t bytes;
    char *text = read_file(path, &bytes);
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_ALLOW_NUL, &error);
    if (root == NULL)
        fail_msg("%s: %s", path, error.text);
    free(text);
    return root;
}

int open_tokenizer_json(struct tokenizer **ret, const json_t *root, struct failure *failure) {
    char *text = json_dumps(root, JSON_COMPACT);
    assert_non_null(text);
    int code = tokenizer_open(ret, text, strlen(text), NULL, 0, failure);
    free(text);
    return code;
}

struct tokenizer *open_tokenizer_files(const char *json_path, const char *config_path) {
    size_t bytes, config_bytes = 0;
    char *json = read_file(json_path, &bytes);
    char *config = config_path != NULL ? read_file(config_path, &config_bytes) : NULL;
    struct tokenizer *tokenizer = NULL;
    struct failure failure;
    if (tokenizer_open(&tokenizer, json, bytes, config, config_bytes, &failure) < 0)
        fail_msg("%s: %s", json_path, failure.text);
    free(json);
    free(config);
    return tokenizer;
}

void json_set_path(json_t *root, const char *path, json_t *value) {
    const char *dot = strchr(path, '.');
    if (dot == NULL) {
        if (json_is_object(root))
            assert_int_equal(json_object_set_new(root, path, value), 0);
        else if ((size_t)atoi(path) == json_array_size(root))
            assert_int_equal(json_array_append_new(root, value), 0);
        else
            assert_int_equal(json_array_set_new(root, (size_t)atoi(path), value), 0);
        return;
    }
    char key[64];
    snprintf(key, sizeof key, "%.*s", (int)(dot - path), path);
    json_t *next =
        json_is_object(root) ? json_object_get(root, key) : json_array_get(root, (size_t)atoi(key));
    assert_non_null(next);
    json_set_path(next, dot + 1, value);
}
