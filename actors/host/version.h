/* The version of troupe, in /version and `troupe version`. */
#ifndef TROUPE_HOST_VERSION_H
#define TROUPE_HOST_VERSION_H

#define TROUPE_VERSION "0.1.0"

#endif
