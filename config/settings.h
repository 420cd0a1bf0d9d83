/* All knobs as one value, from the table in config/knobs.def; a YAML file and command-line options change it. Pure. */
#ifndef TROUPE_SETTINGS_H
#define TROUPE_SETTINGS_H

#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

struct settings {
#define u32 uint32_t
#define u64 uint64_t
#define f64 double
#define K(name, type, def, min, max, sim_min, sim_max, why) type name;
#include "config/knobs.def"
#undef K
#undef u32
#undef u64
#undef f64
};

void settings_default(struct settings *ret);
/* "prefill_chunk" or "prefill-chunk". Out of range or not a number: ERR_INVALID naming the knob, its range and what was found;
 * unknown: ERR_NOT_FOUND with the closest name. */
int settings_set(struct settings *self, const char *name, const char *value, struct failure *failure);
/* A YAML mapping of knob names to numbers (libyaml); unknown keys are errors. Bounded size and depth. */
int settings_parse_yaml(struct settings *self, const char *text, size_t size, struct failure *failure);
/* Seeded values within each knob's simulation range. */
void settings_randomise(struct settings *self, uint64_t seed);
/* The name of what decides the bits, for HELLO and system_fingerprint: the numerics profile, and the knobs that change what is
 * computed where they are not at their defaults ("bf16", "bf16-p0.6"). Actors that differ in it never serve together. */
#define PROFILE_NAME_BYTES 40
void settings_profile_name(const struct settings *self, const char *numerics, char ret[PROFILE_NAME_BYTES]);
/* Help text: one line per knob. malloc'd. */
char *settings_help(void);

#endif
