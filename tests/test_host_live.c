/* Rubbish on every socket of a running troupe: nobody dies, everybody goes on answering. And many
 * troupes do not meet. */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include "proto/frame.h"
#include "proto/wire.h"
#include "tests/support/cluster.h"
#include "tests/support/http.h"
#include "tests/support/random.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#define MODEL "models/demo"
#define BODY  "{\"prompt\":\"And the king said\",\"max_tokens\":16,\"temperature\":0}"
#define SEED  UINT64_C(20261124)

static const char *const roles[] = {"coordinator", "gateway", "attention", "expert", "sampler"};

static uint32_t all_pids(const struct cluster *cluster, pid_t *ret, uint32_t capacity) {
    uint32_t count = 0;
    for (size_t i = 0; i < 5; i++)
        count += cluster_pids(cluster, roles[i], ret + count, capacity - count);
    return count;
}

static char *ask(const struct cluster *cluster) {
    char *answer = NULL;
    assert_int_equal(http_one(cluster->port, "POST", "/v1/completions", BODY, &answer), 200);
    char *text = strstr(answer, "\"text\":");
    assert_non_null(text);
    text = strndup(text, strcspn(text, "}"));
    free(answer);
    return text;
}

/* Bytes that are no ZeroMQ. */
static void send_raw(const char *path, uint64_t *random) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint8_t bytes[4096];
    snprintf(address.sun_path, sizeof address.sun_path, "%.104s", path);
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)random_next(random);
    int file = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(file, (struct sockaddr *)&address, sizeof address) == 0)
        send(file, bytes, sizeof bytes, MSG_NOSIGNAL);
    close(file);
}

static size_t make_message(uint8_t *ret, uint64_t *random, bool data) {
    Troupe__Envelope envelope = TROUPE__ENVELOPE__INIT;
    Troupe__Commit commit = TROUPE__COMMIT__INIT;
    Troupe__Cancel cancel = TROUPE__CANCEL__INIT;
    struct frame_header header = {
        .magic = FRAME_MAGIC, .version = FRAME_VERSION, .kind = FRAME_COMBINE};
    switch (random_below(random, data ? 3 : 4)) {
    case 0: /* noise */
        for (size_t i = 0; i < 200; i++)
            ret[i] = (uint8_t)random_next(random);
        return random_below(random, 200);
    case 1: /* a whole frame of nobody */
        header.from_incarnation = random_next(random);
        header.to_incarnation = random_next(random);
        header.from = random_below(random, 9);
        header.payload_bytes = 0;
        frame_seal(&header);
        memcpy(ret, &header, sizeof header);
        return sizeof header;
    case 2: /* another protocol version, or a frame that claims more than there is */
        if (data) {
            header.rows = header.items = 8192;
            header.row_bytes = 4096;
            header.payload_bytes = 8192 * 4096;
            memcpy(ret, &header, sizeof header);
            return sizeof header;
        }
        envelope.protocol_version = WIRE_PROTOCOL_VERSION + 1;
        envelope.from_incarnation = 1;
        envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
        envelope.cancel = &cancel;
        break;
    default: /* well-formed, from somebody who is nobody */
        envelope.protocol_version = WIRE_PROTOCOL_VERSION;
        envelope.from = random_below(random, 9);
        envelope.from_incarnation = 1 + random_next(random) / 2;
        envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
        commit.epoch = UINT64_MAX;
        envelope.commit = &commit;
    }
    wire_pack(&envelope, ret);
    return wire_packed_bytes(&envelope);
}

static void send_rubbish(void *context, const char *path, uint64_t *random) {
    char endpoint[128];
    uint8_t bytes[512];
    int linger_ms = 1000;
    snprintf(endpoint, sizeof endpoint, "ipc://%.104s", path);
    void *push = zmq_socket(context, ZMQ_PUSH);
    zmq_setsockopt(push, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
    assert_int_equal(zmq_connect(push, endpoint), 0);
    for (int i = 0; i < 200; i++)
        zmq_send(push, bytes, make_message(bytes, random, strstr(path, ".data") != NULL), 0);
    size_t large = (16u << 20) + 100; /* over what a control message may be */
    uint8_t *noise = calloc(1, large);
    zmq_send(push, noise, large, 0);
    free(noise);
    zmq_close(push);
}

static void test_rubbish_on_every_socket(void **state) {
    struct cluster cluster;
    uint64_t random = SEED;
    printf("seed %llu\n", (unsigned long long)SEED);
    assert_true(cluster_start(&cluster, MODEL, "--experts 2"));
    char *before = ask(&cluster);
    pid_t pids[16], after[16];
    uint32_t count = all_pids(&cluster, pids, 16);
    assert_int_equal(count, 6);
    void *context = zmq_ctx_new();
    unsigned sockets = 0;
    DIR *directory = opendir(cluster.run_dir);
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        char path[104];
        if (strstr(entry->d_name, ".control") == NULL && strstr(entry->d_name, ".data") == NULL)
            continue;
        snprintf(path, sizeof path, "%.60s/%.40s", cluster.run_dir, entry->d_name);
        send_raw(path, &random);
        send_rubbish(context, path, &random);
        sockets++;
    }
    closedir(directory);
    zmq_ctx_term(context);
    assert_int_equal(sockets, 11); /* seven inboxes, the supervisor's among them, four data planes */
    for (int i = 0; i < 5; i++) {
        char *text = ask(&cluster);
        assert_string_equal(text, before);
        free(text);
        usleep(100000);
    }
    assert_int_equal(all_pids(&cluster, after, 16), count);
    assert_memory_equal(pids, after, count * sizeof *pids);
    free(before);
    assert_true(cluster_stop(&cluster));
}

/* Two troupes beside each other, one of which ends: the other does not notice. */
static void test_troupes_do_not_meet(void **state) {
    struct cluster one, two;
    assert_true(cluster_start(&one, MODEL, "--experts 2"));
    assert_true(cluster_start(&two, MODEL, "--experts 1 --transport zmq"));
    char *first = ask(&one), *second = ask(&two);
    assert_string_equal(first, second);
    assert_true(cluster_stop(&one));
    char *third = ask(&two);
    assert_string_equal(first, third);
    assert_true(cluster_stop(&two));
    free(first);
    free(second);
    free(third);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rubbish_on_every_socket),
        cmocka_unit_test(test_troupes_do_not_meet),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
