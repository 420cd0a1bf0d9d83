/* Every bound on what comes from outside and on every queue, in one place. */
#ifndef TROUPE_LIMITS_H
#define TROUPE_LIMITS_H

/* Models. */
#define LAYERS_MAX             256
#define EXPERTS_MAX            1024 /* routed experts per layer */
#define EXPERTS_PER_TOKEN_MAX  32
#define EXPERT_GROUPS_MAX      64
#define VOCABULARY_MAX         1048576
#define HIDDEN_MAX             65536
#define HEADS_MAX              512
#define CONTEXT_MAX            1048576 /* positions of one sequence */
#define SAFETENSORS_HEADER_MAX (100u << 20)
#define JSON_FILE_MAX          (64u << 20) /* config.json, tokenizer.json, index.json */
#define SHARDS_MAX             1024

/* Cluster. */
#define ACTORS_MAX             1024
#define REPLICAS_MAX           64
#define ADDRESS_BYTES_MAX      256
#define OPERATIONS_MAX         64 /* of the coordinator, kept in its list */
#define WEIGHTS_BYTES_MAX      (256u << 10) /* of an expert's weights in one message */
#define CONTROL_MESSAGE_MAX    (16u << 20) /* packed bytes of one control message */

/* Data plane. */
#define FRAME_PAYLOAD_MAX      (64u << 20)
#define FRAME_ROWS_MAX         8192
#define FRAME_ITEMS_MAX        (FRAME_ROWS_MAX * EXPERTS_PER_TOKEN_MAX)

/* Attention. */
#define PAGE_TOKENS            64 /* positions in one page of the latent cache, and in one attention block */
#define BATCH_ROWS_MAX         8192
#define DRAFTS_MAX             8    /* guessed tokens of one sequence in one step */
#define DRAFT_ROWS_MAX         64   /* sequences that guess in one step */
#define SEQUENCES_MAX          4096 /* running in one attention actor */

/* Routing bias. */
#define BIAS_VERSIONS_MAX      16   /* that a coordinator keeps alive */
#define BIAS_VERSIONS_HELD_MAX 32   /* in one actor; more than that, so that what an earlier coordinator left has room too */
#define BIAS_DELTA_MAX         1    /* scores are below 1: more could not change any choice */

/* HTTP and requests. */
#define HTTP_BODY_MAX          (8u << 20)
#define HTTP_CONNECTIONS_MAX   4096
#define JSON_DEPTH_MAX         64
#define JSON_VALUES_MAX        (4u << 20) /* commas in one body */
#define JSON_CONTAINERS_MAX    65536      /* lists and objects in one body */
#define PROMPTS_MAX            1024 /* prompts in one request */
#define CHAT_MESSAGES_MAX      4096
#define HISTORY_TOKENS_MAX     (256u << 20) /* prompt tokens held by one gateway */
#define CHOICES_MAX            128  /* n */
#define STOP_STRINGS_MAX       16
#define STOP_STRING_BYTES_MAX  1024
#define STOP_TOKENS_MAX        64
#define LOGIT_BIAS_MAX         1024
#define TOP_LOGPROBS_MAX       20

#endif
