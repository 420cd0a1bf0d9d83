/* Control messages: bytes <-> checked protobuf-c structs. The only place that packs or unpacks them. Pure. */
#ifndef TROUPE_WIRE_H
#define TROUPE_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"
#include "troupe.pb-c.h"

#define WIRE_PROTOCOL_VERSION 1

/* Unpacks and checks: size at most CONTROL_MESSAGE_MAX; memory for the result at most 64 MiB whatever the bytes claim (bounded
 * allocator); protocol version; one known body; enum values in range; parallel arrays of equal length; strings within
 * ADDRESS_BYTES_MAX (reasons and errors: FAILURE_TEXT_BYTES); tokens < VOCABULARY_MAX; NaN-free sampling values; ids within limits.
 * On failure: ERR_TOO_LARGE, ERR_CORRUPT or ERR_VERSION, naming field, expected and found. Free with wire_free. */
int wire_unpack(Troupe__Envelope **ret, const void *bytes, size_t size, struct failure *failure);
void wire_free(Troupe__Envelope **envelope);

size_t wire_packed_bytes(const Troupe__Envelope *envelope);
void wire_pack(const Troupe__Envelope *envelope, uint8_t *ret);

/* "SUBMIT", "HEARTBEAT", ...: for logs and traces. */
const char *wire_name(const Troupe__Envelope *envelope);

#endif
