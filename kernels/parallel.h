/* Fork and join, handed in by the host: pure code splits its work into parts and never sees a thread. */
#ifndef TROUPE_PARALLEL_H
#define TROUPE_PARALLEL_H

/* Runs task(argument, part, parts) once for every part in 0..parts-1, in any order, possibly at the same time, and
 * returns when all are done. Parts must write disjoint memory. How work is cut into parts must never change a result. */
struct parallel {
    void (*run)(void *pool, void (*task)(void *argument, int part, int parts), void *argument,
                int parts);
    void *pool;
    int width; /* threads that may run at once, at least 1 */
};

/* One part after the other in the calling thread. */
extern const struct parallel PARALLEL_SERIAL;

#endif
