/* A client that was cut off goes on where its stream stopped.
 *
 * A client that sends the header X-Stream-Resume gets an `id:` line with each event: how many tokens of each choice it has seen
 * by then, "12,7f" (f: the choice has ended), after the version of the routing bias that the request is pinned to, if that is
 * not the model's own: "7.9f86d081:12,7f". So any gateway goes on with that version, or says that it does not exist any more. It comes back, to any gateway, with the same request, the same X-Request-Id and that
 * id in Last-Event-ID. The request is then computed anew - the same request gives the same tokens - and what the client has
 * is left out. So there is nothing that a gateway must keep, or lose: not even the journal of a gateway that died is needed.
 * A seed that the client has not given follows from its X-Request-Id. */
#include "actors/gateway/gateway.h"

#include <stdlib.h>
#include <string.h>

void resume_write_id(struct text *out, const struct request *request) {
    char version[BIAS_NAME_BYTES];
    bias_name(version, request->bias_version);
    text_format(out, "id: %s%s", request->bias_version != 0 ? version : "",
                request->bias_version != 0 ? ":" : "");
    for (uint32_t i = 0; i < request->choices; i++) {
        const struct choice *choice = request->choice[i];
        char number[32];
        uint32_t seen = choice->tokens > choice->seen_before ? choice->tokens : choice->seen_before;
        if (!choice->sent && choice->seen_before == 0)
            seen = 0; /* nothing of it has been sent */
        snprintf(number, sizeof number, "%s%u%s", i > 0 ? "," : "", seen,
                 choice->told_end || (choice->sent && choice->finish != FINISH_NOT) ? "f" : "");
        text_puts(out, number);
    }
    text_puts(out, "\n");
}

static int bad(struct http_error *error) {
    http_fail(error, 400, NULL,
              "Last-Event-ID: expected the id of an event of this request, such as \"12\" or \"12,7f\"");
    return ERR_INVALID;
}

int resume_take_id(struct request *request, const char *id, struct http_error *error) {
    const char *at = id;
    if (id == NULL || *id == 0)
        return 0;
    request->names_version = true; /* version 0 if none is said */
    if (strchr(id, ':') != NULL) {
        at = bias_name_read(id, ':', &request->bias_version);
        if (at == NULL || *at != ':' || request->bias_version == 0)
            return bad(error);
        at++;
    }
    for (uint32_t i = 0; i < request->choices; i++) {
        struct choice *choice = request->choice[i];
        char *end;
        if (*at < '0' || *at > '9')
            return bad(error);
        unsigned long seen = strtoul(at, &end, 10);
        if (end - at > 9 || seen > choice->prompt->max_tokens)
            return bad(error);
        choice->seen_before = (uint32_t)seen;
        choice->begun = seen > 0;
        if (*end == 'f') {
            choice->told_end = choice->begun = true;
            end++;
        }
        if (*end != (i + 1 < request->choices ? ',' : 0))
            return bad(error);
        at = end + 1;
    }
    return 0;
}

void resume_leave_out(struct choice *choice) {
    if (choice->tokens > choice->seen_before && !choice->told_end)
        return;
    text_clear(&choice->answer);
    text_clear(&choice->thought);
    scored_list_clear(&choice->score);
    choice->sent_tokens = choice->tokens;
}

uint64_t resume_seed(const struct request *request, uint32_t choice) {
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
    for (const char *at = request->id; *at != 0; at++)
        hash = (hash ^ (uint8_t)*at) * 0x100000001b3u;
    return gateway_mix(hash, choice);
}
