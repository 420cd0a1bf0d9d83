/* Actors are pure: nothing outside actors/host/ and tests/ may touch the world. This reads every
 * source file of the tree and names, with file and line, each header that opens a way to files,
 * sockets, clocks, threads or devices, and each call that does the same through stdio.h and
 * stdlib.h. */
#include "tests/support/model_files.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <dirent.h>
#include <fnmatch.h>
#include <sys/stat.h>

static const char *const headers[] = {
    "unistd.h",    "fcntl.h",  "time.h",  "signal.h",  "pthread.h", "threads.h",     "poll.h",
    "semaphore.h", "dirent.h", "ftw.h",   "glob.h",    "spawn.h",   "sched.h",       "aio.h",
    "mqueue.h",    "dlfcn.h",  "netdb.h", "syslog.h",  "termios.h", "pwd.h",         "grp.h",
    "malloc.h",    "locale.h", "sys/*",   "netinet/*", "arpa/*",    "net/*",         "linux/*",
    "asm/*",       "zmq*.h",   "nccl*.h", "cuda*.h",   "cuda/*",    "cublas*.h",     "microhttpd.h",
    "hwloc*.h",    "hwloc/*",  "numa*.h", "curl/*",    "sqlite3.h", "actors/host/*", "tests/*",
};

/* What the headers that are left still offer. */
static const char *const functions[] = {
    /* files and streams */
    "fopen",
    "freopen",
    "fdopen",
    "fopen64",
    "tmpfile",
    "tmpnam",
    "popen",
    "pclose",
    "remove",
    "rename",
    "mkstemp",
    "mkdtemp",
    "mkostemp",
    "realpath",
    "printf",
    "fprintf",
    "vprintf",
    "vfprintf",
    "dprintf",
    "vdprintf",
    "puts",
    "fputs",
    "putchar",
    "putc",
    "fputc",
    "perror",
    "fread",
    "fwrite",
    "fflush",
    "fclose",
    "scanf",
    "fscanf",
    "getchar",
    "getc",
    "fgetc",
    "fgets",
    "getline",
    "getdelim",
    "psignal",
    /* surroundings, chance and ends */
    "getenv",
    "secure_getenv",
    "setenv",
    "putenv",
    "unsetenv",
    "clearenv",
    "system",
    "exit",
    "_Exit",
    "quick_exit",
    "abort",
    "atexit",
    "on_exit",
    "rand",
    "srand",
    "rand_r",
    "random",
    "srandom",
    "random_r",
    "initstate",
    "setstate",
    "drand48",
    "erand48",
    "lrand48",
    "nrand48",
    "mrand48",
    "jrand48",
    "srand48",
    "arc4random",
    "arc4random_buf",
    "arc4random_uniform",
    "getrandom",
    "getentropy",
    "getloadavg",
    "setlocale",
    /* clocks and sleep, should a header bring them */
    "time",
    "clock",
    "clock_gettime",
    "gettimeofday",
    "nanosleep",
    "usleep",
    "sleep",
    "syscall",
    /* jansson and libyaml read files too */
    "json_load_file",
    "json_loadf",
    "json_loadfd",
    "json_dump_file",
    "json_dumpf",
    "json_dumpfd",
    "yaml_parser_set_input_file",
    "yaml_emitter_set_output_file",
    /* the allocator's own state */
    "mallopt",
    "mallinfo",
    "mallinfo2",
    "malloc_trim",
    "malloc_stats",
};

/* An instruction by its name may be a system call. */
static const char *const words[] = {"stdin", "stdout", "stderr", "__asm__", "asm"};

struct exception {
    const char *file; /* a pattern as for fnmatch */
    const char *what;
    const char *reason;
    bool used;
};

static struct exception exceptions[] = {
    {"actors/errors.c", "fprintf", "a broken assumption is told before the process ends", false},
    {"actors/errors.c", "stderr", "likewise", false},
    {"actors/errors.c", "abort", "the one place that ends the process outside main", false},
    {"kernels/x86/*", "__asm__", "tiles, and the permission to use them", false},
    {"kernels/numerics.c", "__asm__", "how this thread rounds", false},
    {"kernels/cpu.c", "__asm__", "what the processor can do", false},
    {"kernels/cuda/ptx.cuh", "asm", "instructions of the GPU", false},
    {"bench/peak_*", "__asm__", "the fastest loop there is", false},
    {"kernels/cuda/*", "cuda_runtime.h", "kernels for GPUs, and their launches", false},
    {"kernels/cuda/ptx.cuh", "cuda.h", "the type of tensor maps", false},
    {"kernels/cuda/ptx.cuh", "tests/support/cuda_emulator_ptx.h", "likewise", false},
    {"kernels/cuda/device.cuh", "tests/support/cuda_emulator.h", "stands in for it in tests", false},
};

struct scan {
    const char *path;
    struct exception *exceptions;
    size_t exceptions_count;
    uint32_t found;
    uint32_t last_line;
    char last_what[128];
    bool quiet;
};

static void report(struct scan *scan, uint32_t line, const char *verb, const char *what) {
    for (size_t i = 0; i < scan->exceptions_count; i++) {
        struct exception *exception = &scan->exceptions[i];
        if (fnmatch(exception->file, scan->path, FNM_PATHNAME) == 0 &&
            strcmp(exception->what, what) == 0) {
            exception->used = true;
            return;
        }
    }
    scan->found++;
    scan->last_line = line;
    snprintf(scan->last_what, sizeof scan->last_what, "%s", what);
    if (!scan->quiet)
        print_message("%s:%u: %s %s\n", scan->path, line, verb, what);
}

/* Comments become spaces, and so do the insides of strings and character constants, but for the
 * names in #include "...". */
static char *without_comments(const char *text, size_t bytes) {
    char *clean = malloc(bytes + 1);
    assert_non_null(clean);
    enum { CODE, LINE_COMMENT, BLOCK_COMMENT, STRING, CHARACTER } state = CODE;
    bool directive = false, fresh = true;
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i], next = i + 1 < bytes ? text[i + 1] : 0;
        bool keep = state == CODE;
        if (c == '\n') {
            if (state == LINE_COMMENT || state == STRING || state == CHARACTER)
                state = CODE;
            directive = false;
            fresh = true;
        } else if (state == CODE) {
            if (c == '/' && (next == '/' || next == '*')) {
                state = next == '/' ? LINE_COMMENT : BLOCK_COMMENT;
                keep = false;
                clean[i++] = ' ';
            } else if (c == '#' && fresh) {
                const char *word = text + i + 1;
                while (*word == ' ' || *word == '\t')
                    word++;
                directive = strncmp(word, "include", 7) == 0;
            } else if (c == '"' && !directive)
                state = STRING;
            else if (c == '\'')
                state = CHARACTER;
            fresh = fresh && (c == ' ' || c == '\t');
        } else if (state == BLOCK_COMMENT) {
            if (c == '*' && next == '/') {
                clean[i++] = ' ';
                state = CODE;
            }
        } else if (state == STRING || state == CHARACTER) {
            if (c == '\\' && next != '\n' && next != 0)
                clean[i++] = ' ';
            else if (c == (state == STRING ? '"' : '\'')) {
                state = CODE;
                keep = true;
            }
        }
        clean[i] = keep || c == '\n' ? c : ' ';
    }
    clean[bytes] = 0;
    return clean;
}

static bool is_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

static void check_include(struct scan *scan, uint32_t line, const char *text) {
    while (*text == ' ' || *text == '\t')
        text++;
    if (*text != '<' && *text != '"') { /* a macro could stand for anything */
        report(scan, line, "includes", "a computed name");
        return;
    }
    char name[128];
    size_t length = strcspn(text + 1, ">\"\n");
    snprintf(name, sizeof name, "%.*s", (int)length, text + 1);
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++)
        if (fnmatch(headers[i], name, 0) == 0) {
            report(scan, line, "includes", name);
            return;
        }
}

/* One word of code, from `start` to `end`. */
static void check_word(struct scan *scan, uint32_t line, const char *text, const char *start,
                       const char *end) {
    char word[64];
    if ((size_t)(end - start) >= sizeof word)
        return;
    snprintf(word, sizeof word, "%.*s", (int)(end - start), start);
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (strcmp(word, words[i]) == 0)
            report(scan, line, "uses", word);
    const char *before = start, *after = end;
    while (before > text && (before[-1] == ' ' || before[-1] == '\t'))
        before--;
    bool member = before > text && (before[-1] == '.' ||
                                    (before - text > 1 && before[-1] == '>' && before[-2] == '-'));
    while (*after == ' ' || *after == '\t' || *after == '\n')
        after++;
    if (member || *after != '(')
        return;
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++)
        if (strcmp(word, functions[i]) == 0)
            report(scan, line, "calls", word);
}

static void scan_text(struct scan *scan, const char *text, size_t bytes) {
    char *clean = without_comments(text, bytes);
    uint32_t line = 1;
    for (const char *at = clean; *at != 0;) {
        if (*at == '\n') {
            line++;
            at++;
        } else if (is_word(*at)) {
            const char *end = at;
            while (is_word(*end))
                end++;
            const char *hash = at;
            while (hash > clean && (hash[-1] == ' ' || hash[-1] == '\t'))
                hash--;
            if (end - at >= 7 && strncmp(at, "include", 7) == 0 && hash > clean && hash[-1] == '#')
                check_include(scan, line, end);
            else
                check_word(scan, line, clean, at, end);
            at = end;
        } else
            at++;
    }
    free(clean);
}

static bool is_source(const char *name) {
    const char *dot = strrchr(name, '.');
    return dot != NULL &&
           (strcmp(dot, ".c") == 0 || strcmp(dot, ".h") == 0 || strcmp(dot, ".def") == 0 ||
            strcmp(dot, ".inc") == 0 || strcmp(dot, ".cu") == 0 || strcmp(dot, ".cuh") == 0 ||
            strcmp(dot, ".cpp") == 0);
}

/* Every source file below `folder` ("" is the root) but those that may touch the world. */
static void scan_folder(const char *folder, uint32_t *files, uint32_t *found) {
    DIR *directory = opendir(*folder != 0 ? folder : ".");
    assert_non_null(directory);
    struct dirent *entry;
    while ((entry = readdir(directory)) != NULL) {
        char path[1024];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s%s%s", folder, *folder != 0 ? "/" : "", entry->d_name);
        struct stat status;
        if (lstat(path, &status) < 0)
            continue;
        if (S_ISDIR(status.st_mode)) {
            if (strcmp(path, "tests") != 0 && strcmp(path, "build") != 0 &&
                strcmp(path, "actors/host") != 0)
                scan_folder(path, files, found);
        } else if (S_ISREG(status.st_mode) && is_source(path)) {
            size_t bytes;
            char *text = read_whole_file(path, &bytes);
            assert_non_null(text);
            struct scan scan = {.path = path,
                                .exceptions = exceptions,
                                .exceptions_count = sizeof exceptions / sizeof exceptions[0]};
            scan_text(&scan, text, bytes);
            *found += scan.found;
            (*files)++;
            free(text);
        }
    }
    closedir(directory);
}

static void only_the_host_touches_the_world(void **state) {
    uint32_t files = 0, found = 0;
    scan_folder("", &files, &found);
    print_message("%u files read\n", files);
    assert_true(files > 40); /* it runs from the root of the repository */
    bool idle = false;
    for (size_t i = 0; i < sizeof exceptions / sizeof exceptions[0]; i++)
        if (!exceptions[i].used) {
            print_message("the exception for %s in %s (%s) is not needed any more\n",
                          exceptions[i].what, exceptions[i].file, exceptions[i].reason);
            idle = true;
        }
    assert_int_equal(found, 0);
    assert_false(idle);
}

static void the_scan_can_fail(void **state) {
    static const struct {
        const char *text;
        uint32_t found, line;
        const char *what;
    } cases[] = {
        {"#include <unistd.h>\n", 1, 1, "unistd.h"},
        {"int a;\n\n  #  include   <sys/socket.h>\n", 1, 3, "sys/socket.h"},
        {"#include \"zmq.h\"\n", 1, 1, "zmq.h"},
        {"#include <cuda_runtime.h>\n", 1, 1, "cuda_runtime.h"},
        {"#include \"actors/host/host.h\"\n", 1, 1, "actors/host/host.h"},
        {"\n#include HEADER\n", 1, 2, "a computed name"},
        {"/* a\n * b */ #include <time.h>\n", 1, 2, "time.h"},
        {"#include <stdio.h>\nvoid f(void) {\n    printf(\"x\");\n}\n", 1, 3, "printf"},
        {"void f(void) { fopen (\"x\", \"r\"); }\n", 1, 1, "fopen"},
        {"int x = rand\n();\n", 1, 1, "rand"},
        {"char *home = getenv(\"HOME\");\nint b = rand();\n", 2, 2, "rand"},
        {"char a = '\"'; char *home = getenv(\"HOME\"); char b = '\"';\n", 1, 1, "getenv"},
        {"char *a = \"\\\"\"; int b = rand();\n", 1, 1, "rand"},
        {"fputs(\"x\", stderr);\n", 2, 1, "stderr"},
        {"int a;\n__asm__ volatile(\"syscall\");\n", 1, 2, "__asm__"},
        {"// #include <time.h>\n/* rand() getenv(\"x\") */\nchar *a = \"rand()\";\n", 0, 0, ""},
        {"#include <stdio.h>\n#include <string.h>\n#include \"actors/actor.h\"\nsnprintf(a, 1, "
         "\"printf(\");\n",
         0, 0, ""},
        {"self->close(self); x.time(1); int time = now; brand(); random_next(&seed);\n", 0, 0, ""},
        {"int a = 1; /* stderr */ char c = '\\''; // stdout\n", 0, 0, ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct scan scan = {.path = "router/sample.c", .quiet = true};
        scan_text(&scan, cases[i].text, strlen(cases[i].text));
        if (scan.found != cases[i].found || scan.last_line != cases[i].line ||
            strcmp(scan.last_what, cases[i].what) != 0)
            fail_msg("case %zu: expected %u (%u: %s), found %u (%u: %s)", i, cases[i].found,
                     cases[i].line, cases[i].what, scan.found, scan.last_line, scan.last_what);
    }
}

static void exceptions_hold_for_their_file_only(void **state) {
    static const char text[] = "#include <pthread.h>\n#include <time.h>\n";
    struct exception table[] = {{"kernels/parallel.c", "pthread.h", "a test", false}};
    struct scan scan = {
        .path = "kernels/parallel.c", .exceptions = table, .exceptions_count = 1, .quiet = true};
    scan_text(&scan, text, strlen(text));
    assert_int_equal(scan.found, 1);
    assert_string_equal(scan.last_what, "time.h");
    assert_true(table[0].used);
    scan = (struct scan){
        .path = "kernels/matmul.c", .exceptions = table, .exceptions_count = 1, .quiet = true};
    scan_text(&scan, text, strlen(text));
    assert_int_equal(scan.found, 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_the_host_touches_the_world),
        cmocka_unit_test(the_scan_can_fail),
        cmocka_unit_test(exceptions_hold_for_their_file_only),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
