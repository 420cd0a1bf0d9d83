/* What the files of synth share: a buffered text writer in front of the callback. */
#ifndef TROUPE_MODEL_SYNTH_PARTS_H
#define TROUPE_MODEL_SYNTH_PARTS_H

#include "model/model.h"

#define SYNTH_BUFFER_BYTES 65536

/* Bytes on their way to one file. After a failure `code` is negative and everything further is
 * dropped. */
struct synth_output {
    int (*write)(void *context, const char *file, const void *bytes, size_t size);
    void *context;
    struct failure *failure;
    char file[64];
    uint8_t *buffer; /* [SYNTH_BUFFER_BYTES] */
    size_t used;
    int code;
};
void synth_put(struct synth_output *self, const void *bytes, size_t size);
void synth_print(struct synth_output *self, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void synth_flush(struct synth_output *self);
/* Ends the current file and begins another. */
void synth_begin(struct synth_output *self, const char *file);

/* tokenizer.json and tokenizer_config.json for a vocabulary of this size, at least
 * SYNTH_VOCABULARY_MIN. */
#define SYNTH_VOCABULARY_MIN 261 /* 5 special tokens and the 256 bytes */
#define SYNTH_BOS            0
#define SYNTH_EOS            1
#define SYNTH_PAD            2
void synth_tokenizer(struct synth_output *out, uint32_t vocabulary, uint32_t context_tokens);

#endif
