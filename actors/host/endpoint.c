/* See endpoint.h. */
#include "actors/host/endpoint.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char WILDCARD[] = "tcp://0.0.0.0:";
static const char TCP[] = "tcp://";

/* The local address of a datagram socket connected to host:port; nothing is sent. */
static bool local_address(const char *host, const char *port, char *ret, size_t size) {
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_DGRAM}, *found = NULL;
    struct sockaddr_in local;
    socklen_t local_size = sizeof local;
    if (getaddrinfo(host, port, &hints, &found) != 0)
        return false;
    int file = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool known = file >= 0 && connect(file, found->ai_addr, found->ai_addrlen) == 0 &&
                 getsockname(file, (struct sockaddr *)&local, &local_size) == 0 &&
                 inet_ntop(AF_INET, &local.sin_addr, ret, (socklen_t)size) != NULL;
    if (file >= 0)
        close(file);
    freeaddrinfo(found);
    return known;
}

void endpoint_advertised(const char *bound, const char *towards, char ret[static ADDRESS_BYTES_MAX]) {
    char host[ADDRESS_BYTES_MAX], address[INET_ADDRSTRLEN] = "127.0.0.1";
    if (strncmp(bound, WILDCARD, strlen(WILDCARD)) != 0) {
        snprintf(ret, ADDRESS_BYTES_MAX, "%s", bound);
        return;
    }
    if (towards != NULL && strncmp(towards, TCP, strlen(TCP)) == 0) {
        snprintf(host, sizeof host, "%s", towards + strlen(TCP));
        char *port = strrchr(host, ':');
        if (port != NULL) {
            *port++ = 0;
            local_address(host, port, address, sizeof address);
        }
    }
    snprintf(ret, ADDRESS_BYTES_MAX, "tcp://%s:%s", address, bound + strlen(WILDCARD));
}
