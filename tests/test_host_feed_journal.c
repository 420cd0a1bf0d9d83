/* The journal of the feed: what is written is read back in order, a reader begins at a keyframe with what led
 * to its moment, the file keeps to its size, and whatever is not such a file is refused with a reason. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <sqlite3.h>

#include "actors/host/feed_journal.h"

/* last: cmocka has a macro fail() */
#include <cmocka.h>

static char directory[] = "/tmp/troupe-journal-XXXXXX";

static const char *path_of(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    unlink(path);
    return path;
}

static int make_directory(void **state) {
    (void)state;
    return mkdtemp(directory) == NULL;
}

static int remove_directory(void **state) {
    (void)state;
    char command[300];
    snprintf(command, sizeof command, "rm -r %s", directory);
    return system(command);
}

/* Keyframes every 10 s from 1000 s on, four chunks a second between; each says its time. */
static void record(const char *path, uint32_t seconds, uint64_t bytes_max, uint32_t padding) {
    struct failure failure;
    struct feed_journal *journal = NULL;
    char *text = malloc(padding + 64);
    assert_int_equal(feed_journal_open(&journal, path, bytes_max, &failure), 0);
    for (uint32_t quarter = 0; quarter < 4 * seconds; quarter++) {
        uint64_t t_ms = 1000000 + 250 * quarter;
        int size = snprintf(text, 64, "event: x\ndata: {\"t\":%llu,\"p\":\"", (unsigned long long)t_ms);
        memset(text + size, 'p', padding);
        size += (int)padding;
        size += snprintf(text + size, 16, "\"}\n\n");
        feed_journal_add(journal, t_ms, quarter % 40 == 0, text, (size_t)size);
    }
    assert_false(feed_journal_failed(journal, &failure));
    feed_journal_close(&journal);
    free(text);
}

static struct feed_reader *read_from(const char *path) {
    struct failure failure;
    struct feed_reader *reader = NULL;
    if (feed_reader_open(&reader, path, &failure) < 0)
        fail_msg("%s", failure.text);
    return reader;
}

static struct feed_chunk chunk_at(struct feed_reader *reader, uint64_t id) {
    struct failure failure;
    struct feed_chunk chunk;
    assert_int_equal(feed_reader_next(reader, id, &chunk, &failure), 1);
    return chunk;
}

static void what_is_written_is_read_in_order(void **state) {
    (void)state;
    const char *path = path_of("order");
    record(path, 30, 64 << 20, 10);
    struct feed_reader *reader = read_from(path);
    struct feed_range range = feed_reader_range(reader);
    assert_true(range.from_ms == 1000000 && range.to_ms == 1029750 && range.chunks == 120);
    uint64_t id = 0, count = 0;
    struct failure failure;
    struct feed_chunk chunk;
    for (; feed_reader_next(reader, id, &chunk, &failure) == 1; id = chunk.id + 1) {
        assert_true(chunk.t_ms == 1000000 + 250 * count);
        assert_int_equal(chunk.keyframe, count % 40 == 0);
        count++;
    }
    assert_true(count == 120);
    feed_reader_close(&reader);
}

static void a_reader_begins_where_it_learns_what_led_to_its_moment(void **state) {
    (void)state;
    const char *path = path_of("start");
    record(path, 60, 64 << 20, 1000);
    struct feed_reader *reader = read_from(path);
    /* 47 s in: with 30 s before, from the keyframe at 20 s */
    assert_true(chunk_at(reader, feed_reader_start(reader, 1047000, 30000, 1 << 30)).t_ms == 1020000);
    /* no more than about 20 chunks of 1 KB: only the last keyframe's, 40 s, is near enough */
    assert_true(chunk_at(reader, feed_reader_start(reader, 1047000, 30000, 40000)).t_ms == 1040000);
    /* not even that: the last one all the same */
    assert_true(chunk_at(reader, feed_reader_start(reader, 1047000, 30000, 10)).t_ms == 1040000);
    assert_true(chunk_at(reader, feed_reader_start(reader, 5, 30000, 1 << 30)).t_ms == 1000000);
    feed_reader_close(&reader);
}

static void it_is_gone_on_with(void **state) {
    (void)state;
    const char *path = path_of("again");
    record(path, 10, 64 << 20, 10);
    record(path, 10, 64 << 20, 10);
    struct feed_reader *reader = read_from(path);
    assert_true(feed_reader_range(reader).chunks == 80);
    feed_reader_close(&reader);
}

static void it_keeps_to_its_size(void **state) {
    (void)state;
    const char *path = path_of("size");
    record(path, 100, 1 << 20, 10000); /* 4 MB into 1 MB */
    struct stat about;
    assert_int_equal(stat(path, &about), 0);
    assert_true(about.st_size <= (1 << 20) + 4096);
    struct feed_reader *reader = read_from(path);
    struct feed_range range = feed_reader_range(reader);
    assert_true(range.to_ms == 1099750); /* the newest are there */
    assert_true(range.from_ms > 1060000 && range.from_ms % 10000 == 0); /* from a keyframe on */
    feed_reader_close(&reader);
}

static void assert_refused(const char *path, int code, const char *why) {
    struct failure failure = {0};
    struct feed_reader *reader = NULL;
    assert_int_equal(feed_reader_open(&reader, path, &failure), code);
    assert_null(reader);
    if (strstr(failure.text, why) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", why, failure.text);
}

static void run_sql(const char *path, const char *sql) {
    sqlite3 *database;
    assert_int_equal(sqlite3_open(path, &database), SQLITE_OK);
    assert_int_equal(sqlite3_exec(database, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(database);
}

static void write_bytes(const char *path, const char *bytes, size_t size, long at) {
    FILE *file = fopen(path, at < 0 ? "wb" : "r+b");
    assert_non_null(file);
    if (at >= 0)
        fseek(file, at, SEEK_SET);
    assert_true(fwrite(bytes, 1, size, file) == size);
    fclose(file);
}

static void other_files_are_refused_with_a_reason(void **state) {
    (void)state;
    const char *path = path_of("none");
    assert_refused(path, ERR_NOT_FOUND, "unable to open");
    write_bytes(path, "this is a text, and long enough to be looked at", 40, -1);
    assert_refused(path, ERR_CORRUPT, "no SQLite file");
    write_bytes(path, "", 0, -1);
    assert_refused(path, ERR_NOT_FOUND, "an empty file");
    path = path_of("foreign");
    run_sql(path, "CREATE TABLE chunk(t, keyframe, events)");
    assert_refused(path, ERR_UNSUPPORTED, "another program");
    struct failure failure;
    struct feed_journal *journal = NULL;
    assert_int_equal(feed_journal_open(&journal, path, 1 << 20, &failure), ERR_UNSUPPORTED); /* nor written to */
    run_sql(path, "PRAGMA application_id=1414679089; PRAGMA user_version=9");
    assert_refused(path, ERR_UNSUPPORTED, "version 9");
    run_sql(path, "PRAGMA user_version=1; DROP TABLE chunk; CREATE TABLE other(x)");
    assert_refused(path, ERR_IO, "no such table");
    path = path_of("bare");
    record(path, 0, 1 << 20, 0);
    assert_refused(path, ERR_CORRUPT, "nothing in it");
}

static void damage_is_found(void **state) {
    (void)state;
    const char *path = path_of("damaged");
    record(path, 30, 64 << 20, 3000);
    char noise[4096];
    memset(noise, 0xa5, sizeof noise);
    for (long page = 3; page < 30; page++) /* the first pages are the schema */
        write_bytes(path, noise, sizeof noise, page * 4096);
    struct failure failure = {0};
    struct feed_reader *reader = NULL;
    struct feed_chunk chunk;
    int code = feed_reader_open(&reader, path, &failure);
    for (uint64_t id = 0; code >= 0; id = chunk.id + 1) {
        code = feed_reader_next(reader, id, &chunk, &failure);
        if (code == 0)
            fail_msg("damage was read over");
    }
    assert_int_equal(code, ERR_CORRUPT);
    feed_reader_close(&reader);
    path = path_of("strange");
    record(path, 10, 64 << 20, 10);
    run_sql(path, "UPDATE chunk SET events='<script>' WHERE id=3");
    reader = read_from(path);
    assert_int_equal(feed_reader_next(reader, 2, &chunk, &failure), 1);
    assert_int_equal(feed_reader_next(reader, 3, &chunk, &failure), ERR_CORRUPT);
    assert_non_null(strstr(failure.text, "entry 3"));
    feed_reader_close(&reader);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_is_read_in_order),
        cmocka_unit_test(a_reader_begins_where_it_learns_what_led_to_its_moment),
        cmocka_unit_test(it_is_gone_on_with),
        cmocka_unit_test(it_keeps_to_its_size),
        cmocka_unit_test(other_files_are_refused_with_a_reason),
        cmocka_unit_test(damage_is_found),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
