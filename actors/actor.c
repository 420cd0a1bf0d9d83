/* What all actors share beyond actor.h: names of roles, and destruction. */
#include "actors/actor.h"

const char *role_name(enum role role) {
    switch (role) {
    case ROLE_NONE:
        return "none";
    case ROLE_COORDINATOR:
        return "coordinator";
    case ROLE_GATEWAY:
        return "gateway";
    case ROLE_ATTENTION:
        return "attention";
    case ROLE_EXPERT:
        return "expert";
    case ROLE_SAMPLER:
        return "sampler";
    case ROLE_CONTROL:
        return "control";
    }
    return "unknown";
}

void actor_destroy(struct actor **self) {
    if (*self == NULL)
        return;
    (*self)->class->destroy(*self);
    *self = NULL;
}
