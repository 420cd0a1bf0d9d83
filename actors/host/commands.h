/* The subcommands of build/troupe: each gets its parsed options and returns an exit code. */
#ifndef TROUPE_HOST_COMMANDS_H
#define TROUPE_HOST_COMMANDS_H

#include "actors/host/options.h"

int command_serve(const struct options *options);
int command_generate(const struct options *options);
int command_check(const struct options *options);
int command_golden(const struct options *options); /* check --golden */
int command_inspect(const struct options *options);
int command_synth(const struct options *options);
int command_bench(const struct options *options);
int command_plan(const struct options *options);
int command_bias_study(const struct options *options);
int command_chaos(const struct options *options);
int command_fault(const struct options *options); /* ctl fault */
int command_ctl(const struct options *options);
int command_sim(const struct options *options);
int command_cluster(const struct options *options); /* sim --cluster */
int command_replay(const struct options *options);
int command_top(const struct options *options);

#endif
