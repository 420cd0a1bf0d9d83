/* The resident step as an attention engine's device of whole steps. */
#ifndef TROUPE_ENGINE_CUDA_RESIDENT_H
#define TROUPE_ENGINE_CUDA_RESIDENT_H

#include "engine/resident.h"

extern const struct resident_operations RESIDENT_CUDA;

#endif
