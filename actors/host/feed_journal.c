/* See feed_journal.h. */
#include "actors/host/feed_journal.h"

#include <pthread.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/actor.h"
#include "actors/host/thread.h"

#define WAITING_BYTES_MAX (64u << 20)
#define PAGE_BYTES        4096u

struct item {
    struct item *next;
    uint64_t t_ms;
    bool keyframe;
    size_t size;
    char events[];
};

struct feed_journal {
    sqlite3 *database;
    sqlite3_stmt *insert;
    pthread_t thread;
    pthread_mutex_t mutex; /* of everything below */
    pthread_cond_t news, settled;
    struct item *first, **last;
    size_t waiting;
    bool writing; /* an item that is not in the list any more */
    bool stop, gap; /* gap: chunks have been left out; nothing until the next keyframe */
    int error;
    char text[200];
};

static int complain(sqlite3 *database, const char *path, struct failure *failure) {
    int code = sqlite3_errcode(database) & 0xff;
    if (code == SQLITE_NOTADB || code == SQLITE_CORRUPT)
        return fail(failure, ERR_CORRUPT, "%s: %s: a journal made by --journal was expected", path,
                    code == SQLITE_NOTADB ? "it is no SQLite file" : "the file is damaged");
    return fail(failure, ERR_IO, "%s: %s", path, sqlite3_errmsg(database));
}

/* The number that `sql` gives, -1: none. */
static int64_t number(sqlite3 *database, const char *sql) {
    sqlite3_stmt *statement = NULL;
    int64_t ret = -1;
    if (sqlite3_prepare_v2(database, sql, -1, &statement, NULL) == SQLITE_OK && sqlite3_step(statement) == SQLITE_ROW)
        ret = sqlite3_column_int64(statement, 0);
    sqlite3_finalize(statement);
    return ret;
}

/* 0: it is one of ours; ERR_NOT_FOUND: it is empty. */
static int check(sqlite3 *database, const char *path, struct failure *failure) {
    int64_t tables = number(database, "SELECT count(*) FROM sqlite_master");
    if (tables < 0)
        return complain(database, path, failure);
    int64_t id = number(database, "PRAGMA application_id"), version = number(database, "PRAGMA user_version");
    if (tables == 0 && id == 0)
        return fail(failure, ERR_NOT_FOUND, "%s: an empty file: a journal made by --journal was expected", path);
    if (id != FEED_JOURNAL_ID)
        return fail(failure, ERR_UNSUPPORTED,
                    "%s: an SQLite file of another program: a journal made by --journal was expected", path);
    if (version != FEED_JOURNAL_VERSION)
        return fail(failure, ERR_UNSUPPORTED, "%s: a journal of version %lld, this troupe knows version %d", path,
                    (long long)version, FEED_JOURNAL_VERSION);
    if (number(database, "SELECT count(t) + count(keyframe) + count(events) FROM (SELECT * FROM chunk LIMIT 1)") < 0)
        return complain(database, path, failure);
    return 0;
}

/* ---- writing ---- */

static void forget_oldest(struct feed_journal *self) {
    sqlite3_exec(self->database,
                 "DELETE FROM chunk WHERE id < (SELECT min(id) + (max(id) - min(id)) / 4 + 1 FROM chunk)", NULL, NULL,
                 NULL);
}

static int insert(struct feed_journal *self, const struct item *item) {
    sqlite3_bind_int64(self->insert, 1, (sqlite3_int64)item->t_ms);
    sqlite3_bind_int(self->insert, 2, item->keyframe);
    sqlite3_bind_blob64(self->insert, 3, item->events, item->size, SQLITE_STATIC);
    int code = sqlite3_step(self->insert);
    sqlite3_reset(self->insert);
    return code;
}

static void write_item(struct feed_journal *self, const struct item *item) {
    int code = insert(self, item);
    for (int i = 0; i < 8 && code == SQLITE_FULL; i++) {
        forget_oldest(self);
        code = insert(self, item);
    }
    if (code == SQLITE_DONE)
        return;
    pthread_mutex_lock(&self->mutex);
    self->error = ERR_IO;
    snprintf(self->text, sizeof self->text, "%s", sqlite3_errmsg(self->database));
    pthread_mutex_unlock(&self->mutex);
}

static void *run(void *argument) {
    struct feed_journal *self = argument;
    pthread_mutex_lock(&self->mutex);
    while (self->first != NULL || !self->stop) {
        struct item *item = self->first;
        if (item == NULL) {
            pthread_cond_wait(&self->news, &self->mutex);
            continue;
        }
        self->first = item->next;
        if (self->first == NULL)
            self->last = &self->first;
        self->waiting -= item->size;
        self->writing = true;
        pthread_mutex_unlock(&self->mutex);
        write_item(self, item);
        free(item);
        pthread_mutex_lock(&self->mutex);
        self->writing = false;
        if (self->first == NULL)
            pthread_cond_broadcast(&self->settled);
    }
    pthread_mutex_unlock(&self->mutex);
    return NULL;
}

static int prepare(struct feed_journal *self, const char *path, uint64_t bytes_max, struct failure *failure) {
    char sql[256];
    int error = check(self->database, path, failure);
    if (error == ERR_NOT_FOUND) {
        snprintf(sql, sizeof sql,
                 "PRAGMA application_id=%d; PRAGMA user_version=%d;"
                 "CREATE TABLE chunk(id INTEGER PRIMARY KEY AUTOINCREMENT, t INTEGER, keyframe INTEGER, events BLOB);"
                 "CREATE INDEX chunk_t ON chunk(t);",
                 FEED_JOURNAL_ID, FEED_JOURNAL_VERSION);
        error = sqlite3_exec(self->database, sql, NULL, NULL, NULL) == SQLITE_OK
                    ? 0
                    : complain(self->database, path, failure);
    }
    if (error < 0)
        return error;
    /* Losing the end of a journal in a power cut is better than waiting for the disk. */
    snprintf(sql, sizeof sql, "PRAGMA synchronous=OFF; PRAGMA max_page_count=%llu",
             (unsigned long long)(bytes_max / PAGE_BYTES > 64 ? bytes_max / PAGE_BYTES : 64));
    sqlite3_exec(self->database, sql, NULL, NULL, NULL);
    if (sqlite3_prepare_v2(self->database, "INSERT INTO chunk(t, keyframe, events) VALUES(?,?,?)", -1, &self->insert,
                           NULL) != SQLITE_OK)
        return complain(self->database, path, failure);
    return 0;
}

int feed_journal_open(struct feed_journal **ret, const char *path, uint64_t bytes_max, struct failure *failure) {
    struct feed_journal *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the journal");
    self->last = &self->first;
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->news, NULL);
    pthread_cond_init(&self->settled, NULL);
    int error = 0;
    if (sqlite3_open(path, &self->database) != SQLITE_OK)
        error = complain(self->database, path, failure);
    sqlite3_busy_timeout(self->database, 1000);
    if (error == 0)
        error = prepare(self, path, bytes_max, failure);
    if (error == 0)
        error = thread_start(&self->thread, "journal", run, self, failure);
    if (error < 0) {
        sqlite3_finalize(self->insert);
        sqlite3_close(self->database);
        free(self);
        return error;
    }
    *ret = self;
    return 0;
}

void feed_journal_add(struct feed_journal *self, uint64_t unix_ms, bool keyframe, const void *events, size_t size) {
    pthread_mutex_lock(&self->mutex);
    self->gap = (self->gap && !keyframe) || self->waiting + size > WAITING_BYTES_MAX || size > FEED_CHUNK_BYTES_MAX;
    struct item *item = self->gap ? NULL : malloc(sizeof *item + size);
    if (item != NULL) {
        *item = (struct item){.t_ms = unix_ms, .keyframe = keyframe, .size = size};
        memcpy(item->events, events, size);
        *self->last = item;
        self->last = &item->next;
        self->waiting += size;
        pthread_cond_signal(&self->news);
    }
    pthread_mutex_unlock(&self->mutex);
}

void feed_journal_settle(struct feed_journal *self) {
    pthread_mutex_lock(&self->mutex);
    while (self->first != NULL || self->writing)
        pthread_cond_wait(&self->settled, &self->mutex);
    pthread_mutex_unlock(&self->mutex);
}

bool feed_journal_failed(struct feed_journal *self, struct failure *failure) {
    pthread_mutex_lock(&self->mutex);
    int error = self->error;
    if (error < 0)
        fail(failure, error, "the journal: %s", self->text);
    pthread_mutex_unlock(&self->mutex);
    return error < 0;
}

void feed_journal_close(struct feed_journal **journal) {
    struct feed_journal *self = *journal;
    if (self == NULL)
        return;
    pthread_mutex_lock(&self->mutex);
    self->stop = true;
    pthread_cond_signal(&self->news);
    pthread_mutex_unlock(&self->mutex);
    pthread_join(self->thread, NULL);
    sqlite3_finalize(self->insert);
    sqlite3_close(self->database);
    pthread_cond_destroy(&self->news);
    pthread_cond_destroy(&self->settled);
    pthread_mutex_destroy(&self->mutex);
    free(self);
    *journal = NULL;
}

/* ---- reading ---- */

struct feed_reader {
    sqlite3 *database;
    sqlite3_stmt *next;
    char path[512];
    struct feed_range range;
};

static int open_reader(struct feed_reader *self, struct failure *failure) {
    if (sqlite3_open_v2(self->path, &self->database, SQLITE_OPEN_READONLY, NULL) != SQLITE_OK)
        return fail(failure, ERR_NOT_FOUND, "%s: %s", self->path, sqlite3_errmsg(self->database));
    sqlite3_busy_timeout(self->database, 1000);
    int error = check(self->database, self->path, failure);
    if (error < 0)
        return error;
    int64_t count = number(self->database, "SELECT count(*) FROM chunk");
    if (count < 0)
        return complain(self->database, self->path, failure);
    int64_t from = number(self->database, "SELECT min(t) FROM chunk WHERE id >= (SELECT min(id) FROM chunk WHERE keyframe=1)");
    int64_t to = number(self->database, "SELECT max(t) FROM chunk");
    if (count == 0 || number(self->database, "SELECT count(*) FROM chunk WHERE keyframe=1") < 1 || from < 0 || to < from)
        return fail(failure, ERR_CORRUPT, "%s: the journal has nothing in it that could be shown", self->path);
    self->range = (struct feed_range){(uint64_t)from, (uint64_t)to, (uint64_t)count,
                                      (uint64_t)number(self->database, "SELECT sum(length(events)) FROM chunk")};
    if (sqlite3_prepare_v2(self->database, "SELECT id, t, keyframe, events FROM chunk WHERE id >= ? ORDER BY id LIMIT 1", -1,
                           &self->next, NULL) != SQLITE_OK)
        return complain(self->database, self->path, failure);
    return 0;
}

int feed_reader_open(struct feed_reader **ret, const char *path, struct failure *failure) {
    struct feed_reader *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a journal");
    snprintf(self->path, sizeof self->path, "%s", path);
    int error = open_reader(self, failure);
    if (error < 0)
        feed_reader_close(&self);
    *ret = self;
    return error;
}

void feed_reader_close(struct feed_reader **reader) {
    if (*reader == NULL)
        return;
    sqlite3_finalize((*reader)->next);
    sqlite3_close((*reader)->database);
    free(*reader);
    *reader = NULL;
}

struct feed_range feed_reader_range(const struct feed_reader *self) {
    return self->range;
}

uint64_t feed_reader_start(struct feed_reader *self, uint64_t t_ms, uint64_t back_ms, uint64_t bytes_max) {
    char sql[512];
    unsigned long long t = t_ms, before = t_ms > back_ms ? t_ms - back_ms : 0;
    /* Keyframes from the newest before `t` backwards, as far as time and bytes allow. */
    snprintf(sql, sizeof sql,
             "SELECT min(id) FROM (SELECT k.id AS id FROM chunk k WHERE k.keyframe=1 AND k.t<=%llu AND k.t>=%llu AND "
             "(SELECT sum(length(events)) FROM chunk c WHERE c.id>=k.id AND c.t<=%llu AND (c.keyframe=0 OR c.id=k.id))<=%llu)",
             t, before, t, (unsigned long long)bytes_max);
    int64_t id = number(self->database, sql);
    if (id > 0)
        return (uint64_t)id;
    snprintf(sql, sizeof sql, "SELECT max(id) FROM chunk WHERE keyframe=1 AND t<=%llu", t);
    id = number(self->database, sql);
    if (id <= 0)
        id = number(self->database, "SELECT min(id) FROM chunk WHERE keyframe=1");
    return id > 0 ? (uint64_t)id : 0;
}

int feed_reader_next(struct feed_reader *self, uint64_t id, struct feed_chunk *ret, struct failure *failure) {
    sqlite3_reset(self->next);
    sqlite3_bind_int64(self->next, 1, (sqlite3_int64)id);
    int code = sqlite3_step(self->next);
    if (code == SQLITE_DONE)
        return 0;
    if (code != SQLITE_ROW)
        return complain(self->database, self->path, failure);
    const char *events = sqlite3_column_blob(self->next, 3);
    size_t size = (size_t)sqlite3_column_bytes(self->next, 3);
    *ret = (struct feed_chunk){.id = (uint64_t)sqlite3_column_int64(self->next, 0),
                               .t_ms = (uint64_t)sqlite3_column_int64(self->next, 1),
                               .keyframe = sqlite3_column_int(self->next, 2) != 0,
                               .events = events,
                               .size = size};
    if (events == NULL || size < 2 || size > FEED_CHUNK_BYTES_MAX || memcmp(events, "event: ", size < 7 ? size : 7) != 0 ||
        memcmp(events + size - 2, "\n\n", 2) != 0)
        return fail(failure, ERR_CORRUPT, "%s: entry %llu is not what a feed says", self->path,
                    (unsigned long long)ret->id);
    return 1;
}
