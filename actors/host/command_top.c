/* troupe top: the live view in a terminal. Reads the feed of a gateway and redraws at most once for what has come; keys choose
 * the order of the processes. --once prints it as plain text. */
#include <curses.h>
#include <errno.h>
#include <locale.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/top_view.h"

#define DEFAULT_URL  "http://127.0.0.1:8000"
#define EVENT_MAX    (16u << 20)
#define ONCE_RATES   2    /* events of rates to wait for: the first interval may be empty */
#define TIMEOUT_MS   5000 /* without any event, which come four times a second */
#define ONCE_COLUMNS 120
#define AGAIN_MS     300  /* between attempts to reach a gateway that is away */

struct top {
    struct top_view view;
    struct text unread, screen;
    int file;
    bool answered; /* the headers are over */
    struct top_look look;
    const char *away; /* why there is no connection; NULL: there is one */
};

static int connect_to(struct top *self, const char *host, unsigned port, struct failure *failure) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    char service[8];
    snprintf(service, sizeof service, "%u", port);
    int error = getaddrinfo(host, service, &hints, &list);
    if (error != 0)
        return fail(failure, ERR_INVALID, "--url: '%s' is no host: %s", host, gai_strerror(error));
    for (const struct addrinfo *at = list; at != NULL && self->file < 0; at = at->ai_next) {
        self->file = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (self->file >= 0 && connect(self->file, at->ai_addr, at->ai_addrlen) != 0) {
            close(self->file);
            self->file = -1;
        }
    }
    freeaddrinfo(list);
    return self->file >= 0 ? 0
                           : fail(failure, ERR_IO, "nobody listens at %s, port %u: is the troupe running?", host, port);
}

/* HTTP/1.0: the answer comes without chunks. */
static int ask(struct top *self, const struct options *options, struct failure *failure) {
    const char *url = options->url != NULL ? options->url : DEFAULT_URL;
    char host[128], request[1024], end;
    unsigned port;
    if (sscanf(url, "http://%127[^:/]:%u%c", host, &port, &end) < 2 || port == 0 || port > 65535)
        return fail(failure, ERR_INVALID, "--url: expected http://HOST:PORT, found '%s'", url);
    int error = connect_to(self, host, port, failure);
    if (error < 0)
        return error;
    const char *key = options->api_key;
    int size = snprintf(request, sizeof request, "GET /troupe/events HTTP/1.0\r\nHost: %s\r\n%s%s%s\r\n", host,
                        key != NULL ? "Authorization: Bearer " : "", key != NULL ? key : "", key != NULL ? "\r\n" : "");
    if (size < 0 || (size_t)size >= sizeof request)
        return fail(failure, ERR_TOO_LARGE, "the API key is too long");
    if (send(self->file, request, (size_t)size, MSG_NOSIGNAL) != size)
        return fail(failure, ERR_IO, "cannot ask %s: %s", url, strerror(errno));
    return 0;
}

static int take_status(const char *head, struct failure *failure) {
    int status = 0;
    sscanf(head, "HTTP/1.%*1[01] %3d", &status);
    if (status == 200)
        return 0;
    return fail(failure, ERR_STATE, status == 404   ? "this gateway has no live view: start it with --view on"
                                    : status == 401 ? "this gateway asks for a key: --api-key KEY"
                                                    : "expected the events, found HTTP status %d",
                status);
}

static int take_block(struct top *self, char *block, size_t size, struct failure *failure) {
    if (!self->answered) {
        self->answered = true;
        return take_status(block, failure);
    }
    char name[32];
    int prefix = 0;
    if (sscanf(block, "event: %31[a-z]\ndata: %n", name, &prefix) != 1 || prefix == 0)
        return fail(failure, ERR_INVALID, "expected an event, found %.60s", block);
    return top_view_take(&self->view, name, block + prefix, size - (size_t)prefix, failure);
}

/* Takes everything that is complete. */
static int take_unread(struct top *self, struct failure *failure) {
    struct text *unread = &self->unread;
    size_t begin = 0;
    int error = 0;
    for (;;) {
        const char *mark = self->answered ? "\n\n" : "\r\n\r\n";
        char *at = memmem(unread->bytes + begin, unread->size - begin, mark, strlen(mark));
        if (at == NULL || error < 0)
            break;
        *at = 0;
        error = take_block(self, unread->bytes + begin, (size_t)(at - unread->bytes) - begin, failure);
        begin = (size_t)(at - unread->bytes) + strlen(mark);
    }
    memmove(unread->bytes, unread->bytes + begin, unread->size - begin);
    unread->size -= begin;
    if (error == 0 && unread->size > EVENT_MAX)
        error = fail(failure, ERR_TOO_LARGE, "expected events of at most %u bytes", EVENT_MAX);
    return error;
}

/* Positive: the file was read; 0: nothing to read, or a key was pressed. */
static int wait_and_read(struct top *self, bool keys, struct failure *failure) {
    struct pollfd wait[2] = {{.fd = self->file, .events = POLLIN}, {.fd = keys ? STDIN_FILENO : -1, .events = POLLIN}};
    int count = poll(wait, 2, TIMEOUT_MS);
    if (count < 0 && errno == EINTR) /* the window has another size */
        return 0;
    if (count <= 0)
        return fail(failure, ERR_STATE, "nothing has come for %d s", TIMEOUT_MS / 1000);
    if (wait[0].revents == 0)
        return 0;
    char bytes[65536];
    ssize_t got = read(self->file, bytes, sizeof bytes);
    if (got <= 0)
        return fail(failure, ERR_STATE, "the gateway has closed the connection");
    text_append(&self->unread, bytes, (size_t)got);
    int error = take_unread(self, failure);
    return error < 0 ? error : 1;
}

static int run_once(struct top *self, struct failure *failure) {
    while (self->view.rates < ONCE_RATES) {
        int error = wait_and_read(self, false, failure);
        if (error < 0)
            return error;
    }
    top_view_write(&self->view, &self->screen, ONCE_COLUMNS, 0, &self->look);
    fwrite(self->screen.bytes, 1, self->screen.size, stdout);
    return 0;
}

/* ---- the terminal ---- */

enum { PLAIN, GOOD, BAD, HEAD };

static attr_t look_of(const char *line, size_t size) {
    if (memmem(line, size, "NOT SERVING", 11) != NULL || memmem(line, size, " lost", 5) != NULL || memmem(line, size, " gone ", 6) != NULL)
        return COLOR_PAIR(BAD) | A_BOLD;
    if (memmem(line, size, " joined", 7) != NULL)
        return COLOR_PAIR(GOOD);
    if (memmem(line, size, "troupe ", 7) == line || memmem(line, size, "process  ", 9) == line)
        return A_BOLD;
    return A_NORMAL;
}

static void show(struct top *self) {
    static const char KEYS[] = "order: n name  s state  a heartbeat  w weights  r rows  b busy  i inverted   arrows, page keys: scroll   q quit";
    int lines, columns;
    getmaxyx(stdscr, lines, columns);
    top_view_write(&self->view, &self->screen, (uint32_t)columns, (uint32_t)(lines > 1 ? lines - 1 : 1), &self->look);
    erase();
    const char *at = self->screen.bytes, *last = at + self->screen.size;
    for (int row = 0; row < lines - 1 && at < last; row++) {
        const char *end = memchr(at, '\n', (size_t)(last - at));
        size_t size = (size_t)((end == NULL ? last : end) - at);
        attrset(look_of(at, size));
        mvaddnstr(row, 0, at, (int)size);
        at += size + 1;
    }
    attrset(self->away != NULL ? COLOR_PAIR(BAD) | A_REVERSE : A_REVERSE);
    mvaddnstr(lines - 1, 0, self->away != NULL ? self->away : KEYS, columns);
    if (self->away != NULL)
        addnstr("; trying again     q quit", columns);
    refresh();
}

static void scroll_by(struct top *self, int key) {
    uint32_t first = self->look.first, page = (uint32_t)LINES / 2, all = self->view.actors + self->view.gones;
    if (key == KEY_DOWN)
        first++;
    else if (key == KEY_UP)
        first -= first > 0;
    else if (key == KEY_NPAGE)
        first += page;
    else if (key == KEY_PPAGE)
        first -= first < page ? first : page;
    else if (key == KEY_HOME)
        first = 0;
    else if (key == KEY_END)
        first = all;
    self->look.first = first < all ? first : all;
}

/* False: the user wants to leave. */
static bool take_keys(struct top *self) {
    static const char ORDERS[TOP_ORDERS + 1] = "nsawrb";
    for (int key; (key = getch()) != ERR;) {
        const char *order = key > 0 && key < 128 ? strchr(ORDERS, key) : NULL;
        if (key == 'q')
            return false;
        if (order != NULL)
            self->look = (struct top_look){.order = (enum top_order)(order - ORDERS)};
        else if (key == 'i')
            self->look.reversed = !self->look.reversed;
        else
            scroll_by(self, key);
    }
    return true;
}

/* A gateway that was seen and is away comes again. Positive: it answers; 0: the user wants to leave. */
static int come_again(struct top *self, const struct options *options, const struct failure *why) {
    struct failure failure;
    self->away = why->text;
    for (int error = -1; error < 0;) {
        if (self->file >= 0)
            close(self->file);
        self->file = -1;
        self->unread.size = 0;
        self->answered = false;
        if (!take_keys(self))
            return 0;
        show(self);
        struct pollfd keys = {.fd = STDIN_FILENO, .events = POLLIN};
        poll(&keys, 1, AGAIN_MS);
        error = ask(self, options, &failure);
    }
    self->away = NULL;
    return 1;
}

static int run_screen(struct top *self, const struct options *options, struct failure *failure) {
    setlocale(LC_CTYPE, "");
    if (!isatty(STDOUT_FILENO) || newterm(NULL, stdout, stdin) == NULL)
        return fail(failure, ERR_STATE, "no terminal that can be drawn on (is TERM set?); --once prints plain text");
    cbreak();
    noecho();
    curs_set(0);
    nodelay(stdscr, TRUE);
    keypad(stdscr, TRUE);
    if (has_colors()) {
        start_color();
        use_default_colors();
        init_pair(GOOD, COLOR_CYAN, -1);
        init_pair(BAD, COLOR_RED, -1);
    }
    int error = 0;
    while (error >= 0 && take_keys(self)) {
        if (self->view.layers > 0)
            show(self);
        error = wait_and_read(self, true, failure);
        if (error < 0 && self->view.layers > 0 && (failure->code == ERR_STATE || failure->code == ERR_IO) &&
            (error = come_again(self, options, failure)) == 0)
            break;
    }
    endwin();
    return error < 0 ? error : 0;
}

int command_top(const struct options *options) {
    struct top self = {.file = -1};
    struct failure failure;
    int error = ask(&self, options, &failure);
    if (error == 0)
        error = options->once ? run_once(&self, &failure) : run_screen(&self, options, &failure);
    if (error < 0)
        fprintf(stderr, "troupe top: %s\n", failure.text);
    if (self.file >= 0)
        close(self.file);
    top_view_free(&self.view);
    text_free(&self.unread);
    text_free(&self.screen);
    return error < 0 ? 1 : 0;
}
