/* What the admin address has for people: the live view's page, which works the buttons of the admin
 * interface; everything of a gateway that the page shows, passed on; faults on purpose, where they are
 * allowed. A request from a page of somewhere else lacks the token, which only a header can carry. */
#include "coordinator/coordinator.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "actors/gateway/page.h"

#define FAULT_BYTES_MAX 4096u

static void answer(const struct http_request *request, uint16_t status, const char *type,
                   const char *header, const void *bytes, size_t size, struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_STREAM);
    effect->stream.client = request->client;
    effect->stream.status = status;
    effect->stream.content_type = type;
    effect->stream.extra_header = header;
    effect->stream.bytes = bytes;
    effect->stream.size = size;
    effect->stream.last = true;
}

static void refuse(const struct http_request *request, uint16_t status, const char *why,
                   struct effects *out) {
    char text[256];
    int size = snprintf(text, sizeof text, "{\"error\":{\"message\":\"%s\",\"type\":\"invalid\"}}\n", why);
    answer(request, status, "application/json", NULL, effects_copy(out, text, (size_t)size), (size_t)size, out);
}

static void on_fault(const struct coordinator *self, const struct http_request *request,
                     struct effects *out) {
    if (!self->allow_faults) {
        refuse(request, 403, "faults are not allowed here: the troupe was started without --allow-faults", out);
        return;
    }
    json_t *body = request->body_bytes <= FAULT_BYTES_MAX
                       ? json_loadb(request->body, request->body_bytes, 0, NULL)
                       : NULL;
    const char *fault = json_string_value(json_object_get(body, "fault"));
    if (fault == NULL) {
        refuse(request, 400, "fault: a text such as 'kill expert 1' expected", out);
    } else {
        struct effect *effect = effects_add(out, EFFECT_FAULT);
        effect->admin.client = request->client;
        effect->admin.text = effects_copy(out, fault, strlen(fault) + 1);
    }
    json_decref(body);
}

static bool begins(const char *path, const char *with) {
    return strncmp(path, with, strlen(with)) == 0;
}

bool admin_view(const struct coordinator *self, const struct http_request *request, bool allowed,
                struct effects *out) {
    bool get = strcmp(request->method, "GET") == 0;
    if (get && strcmp(request->path, "/") == 0) { /* the page holds no secret; what it asks for does */
        answer(request, 200, "text/html; charset=utf-8", PAGE_SECURITY, page_html, page_html_bytes, out);
        return true;
    }
    if (!allowed)
        return false;
    if (begins(request->path, "/troupe/") || begins(request->path, "/v1/")) {
        struct effect *effect = effects_add(out, EFFECT_RELAY);
        effect->admin.client = request->client;
        return true;
    }
    if (strcmp(request->path, "/fault") != 0 || strcmp(request->method, "POST") != 0)
        return false;
    on_fault(self, request, out);
    return true;
}
