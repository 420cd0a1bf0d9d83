/* One GET over loopback. The server's backlog accepts the connection at once, whether or not the
 * gateway runs yet. */
#include "actors/host/probe_http.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

void probe_http_close(struct probe_http *self) {
    if (self->file >= 0)
        close(self->file);
    self->file = -1;
}

/* The address that a local client would use: a wildcard becomes loopback. */
static socklen_t local_address(int listening_socket, struct sockaddr_storage *ret) {
    socklen_t size = sizeof *ret;
    if (getsockname(listening_socket, (struct sockaddr *)ret, &size) != 0)
        return 0;
    struct sockaddr_in *v4 = (struct sockaddr_in *)ret;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)ret;
    if (ret->ss_family == AF_INET && v4->sin_addr.s_addr == htonl(INADDR_ANY))
        v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (ret->ss_family == AF_INET6 && IN6_IS_ADDR_UNSPECIFIED(&v6->sin6_addr))
        v6->sin6_addr = in6addr_loopback;
    return size;
}

void probe_http_ask(struct probe_http *self, int listening_socket, const char *path) {
    struct sockaddr_storage address;
    socklen_t size = local_address(listening_socket, &address);
    char request[256];
    int length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", path);
    probe_http_close(self);
    self->bytes = 0;
    if (size == 0)
        return;
    /* connecting to a listening socket of this machine does not wait */
    self->file = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (self->file >= 0 && (connect(self->file, (struct sockaddr *)&address, size) != 0 ||
                            send(self->file, request, (size_t)length, MSG_NOSIGNAL) != length))
        probe_http_close(self);
}

int probe_http_read(struct probe_http *self) {
    ssize_t got = recv(self->file, self->answer + self->bytes,
                       sizeof self->answer - 1 - self->bytes, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got > 0)
        self->bytes += (unsigned)got;
    self->answer[self->bytes] = 0;
    if (got > 0 && self->bytes < 12)
        return 0;
    int status = -1;
    if (sscanf(self->answer, "HTTP/1.1 %3d", &status) != 1)
        status = -1;
    probe_http_close(self);
    return status;
}
