/* See journal.h. */
#include "actors/host/journal.h"

#include <sqlite3.h>
#include <stdlib.h>
#include <time.h>

static const char schema[] =
    "CREATE TABLE IF NOT EXISTS run(id INTEGER PRIMARY KEY, plan TEXT, seed INTEGER, begun TEXT,"
    " streams INTEGER, tokens INTEGER, steady_gap_ms REAL, tokens_per_s REAL);"
    "CREATE TABLE IF NOT EXISTS fault(run INTEGER, number INTEGER, text TEXT, at_ms REAL, detect_ms REAL,"
    " repair_ms REAL, gap_ms REAL, before REAL, during REAL, after REAL);"
    "CREATE TABLE IF NOT EXISTS stream(run INTEGER, number INTEGER, answers INTEGER, different INTEGER,"
    " duplicated INTEGER, lost INTEGER, refused INTEGER, resumed INTEGER);"
    "CREATE TABLE IF NOT EXISTS piece(run INTEGER, stream INTEGER, at_ms REAL, gap_ms REAL);";

struct journal {
    sqlite3 *database;
    sqlite3_int64 run;
};

static int failed(struct journal *self, struct failure *failure) {
    return fail(failure, ERR_IO, "the journal: %s", sqlite3_errmsg(self->database));
}

static int execute(struct journal *self, const char *sql, struct failure *failure) {
    return sqlite3_exec(self->database, sql, NULL, NULL, NULL) == SQLITE_OK ? 0 : failed(self, failure);
}

int journal_open(struct journal **ret, const char *path, struct failure *failure) {
    struct journal *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the journal");
    int error = sqlite3_open(path, &self->database) == SQLITE_OK ? 0 : failed(self, failure);
    if (error == 0)
        error = execute(self, schema, failure);
    if (error < 0) {
        journal_close(&self);
        return error;
    }
    *ret = self;
    return 0;
}

void journal_close(struct journal **journal) {
    if (*journal == NULL)
        return;
    sqlite3_close((*journal)->database);
    free(*journal);
    *journal = NULL;
}

int journal_begin(struct journal *self, struct failure *failure) {
    return execute(self, "BEGIN", failure);
}

int journal_commit(struct journal *self, struct failure *failure) {
    return execute(self, "COMMIT", failure);
}

/* Prepares, binds the run and the numbers given, and the text as the parameter after them. */
static int insert(struct journal *self, const char *sql, const double *number, int numbers, const char *text,
                  struct failure *failure) {
    sqlite3_stmt *statement = NULL;
    int at = 1;
    int code = sqlite3_prepare_v2(self->database, sql, -1, &statement, NULL);
    if (code == SQLITE_OK) {
        sqlite3_bind_int64(statement, at++, self->run);
        for (int i = 0; i < numbers; i++)
            sqlite3_bind_double(statement, at++, number[i]);
        if (text != NULL)
            sqlite3_bind_text(statement, at, text, -1, SQLITE_TRANSIENT);
        code = sqlite3_step(statement);
    }
    int error = code == SQLITE_DONE ? 0 : failed(self, failure);
    sqlite3_finalize(statement);
    return error;
}

int journal_run(struct journal *self, const char *plan, uint64_t seed, uint32_t streams, uint32_t tokens,
                double steady_gap_ms, double tokens_per_s, struct failure *failure) {
    char text[32];
    time_t now = time(NULL);
    struct tm parts;
    gmtime_r(&now, &parts);
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
    sqlite3_stmt *statement = NULL;
    int code = sqlite3_prepare_v2(self->database,
                                  "INSERT INTO run(plan, seed, begun, streams, tokens, steady_gap_ms, "
                                  "tokens_per_s) VALUES(?,?,?,?,?,?,?)",
                                  -1, &statement, NULL);
    if (code == SQLITE_OK) {
        sqlite3_bind_text(statement, 1, plan, -1, SQLITE_TRANSIENT);
        sqlite3_bind_int64(statement, 2, (sqlite3_int64)seed);
        sqlite3_bind_text(statement, 3, text, -1, SQLITE_TRANSIENT);
        sqlite3_bind_int64(statement, 4, streams);
        sqlite3_bind_int64(statement, 5, tokens);
        sqlite3_bind_double(statement, 6, steady_gap_ms);
        sqlite3_bind_double(statement, 7, tokens_per_s);
        code = sqlite3_step(statement);
    }
    int error = code == SQLITE_DONE ? 0 : failed(self, failure);
    sqlite3_finalize(statement);
    self->run = sqlite3_last_insert_rowid(self->database);
    return error;
}

int journal_fault(struct journal *self, const struct journal_fault *fault, struct failure *failure) {
    const double number[] = {fault->number, fault->at_ms,  fault->detect_ms, fault->repair_ms,
                             fault->gap_ms, fault->before, fault->during,    fault->after};
    return insert(self,
                  "INSERT INTO fault(run, number, at_ms, detect_ms, repair_ms, gap_ms, before, during, after, "
                  "text) VALUES(?,?,?,?,?,?,?,?,?,?)",
                  number, 8, fault->text, failure);
}

int journal_stream(struct journal *self, const struct journal_stream *stream, struct failure *failure) {
    const double number[] = {stream->number, stream->answers, stream->different, stream->duplicated,
                             stream->lost,   stream->refused, stream->resumed};
    return insert(self, "INSERT INTO stream VALUES(?,?,?,?,?,?,?,?)", number, 7, NULL, failure);
}

int journal_piece(struct journal *self, uint32_t stream, double at_ms, double gap_ms, struct failure *failure) {
    const double number[] = {stream, at_ms, gap_ms};
    return insert(self, "INSERT INTO piece VALUES(?,?,?,?)", number, 3, NULL, failure);
}

int journal_faults(struct journal *self, void (*each)(void *context, const struct journal_fault *fault),
                   void *context, struct failure *failure) {
    sqlite3_stmt *statement = NULL;
    int code = sqlite3_prepare_v2(self->database,
                                  "SELECT number, text, at_ms, detect_ms, repair_ms, gap_ms, before, during, after "
                                  "FROM fault WHERE run = ? ORDER BY number",
                                  -1, &statement, NULL);
    if (code == SQLITE_OK)
        sqlite3_bind_int64(statement, 1, self->run);
    while (code == SQLITE_OK || code == SQLITE_ROW) {
        code = sqlite3_step(statement);
        if (code != SQLITE_ROW)
            break;
        struct journal_fault fault = {
            .number = (uint32_t)sqlite3_column_int64(statement, 0),
            .text = (const char *)sqlite3_column_text(statement, 1),
            .at_ms = sqlite3_column_double(statement, 2),
            .detect_ms = sqlite3_column_double(statement, 3),
            .repair_ms = sqlite3_column_double(statement, 4),
            .gap_ms = sqlite3_column_double(statement, 5),
            .before = sqlite3_column_double(statement, 6),
            .during = sqlite3_column_double(statement, 7),
            .after = sqlite3_column_double(statement, 8),
        };
        each(context, &fault);
    }
    int error = code == SQLITE_DONE ? 0 : failed(self, failure);
    sqlite3_finalize(statement);
    return error;
}
