/* build/troupe: one binary for everything. Each subcommand is a row of the table. */
#include <stdio.h>
#include <string.h>

#include "actors/host/commands.h"
#include "actors/host/huge_pages.h"
#include "actors/host/process.h"
#include "actors/host/version.h"
#include "engine/engine.h"

static int run_coordinator(const struct options *options) {
    return process_run(ROLE_COORDINATOR, options);
}
static int run_gateway(const struct options *options) {
    return process_run(ROLE_GATEWAY, options);
}
static int run_attention(const struct options *options) {
    return process_run(ROLE_ATTENTION, options);
}
static int run_expert(const struct options *options) {
    return process_run(ROLE_EXPERT, options);
}
static int run_sampler(const struct options *options) {
    return process_run(ROLE_SAMPLER, options);
}

static int show_version(const struct options *options) {
    (void)options;
    printf("troupe %s\n", TROUPE_VERSION);
    return 0;
}

static const struct command {
    const char *name;
    unsigned bit;
    int (*run)(const struct options *options);
    const char *arguments;
    const char *help;
} commands[] = {
    {"serve", FOR_SERVE, command_serve, "[OPTIONS]",
     "start all actors of a troupe on this machine and serve HTTP until Ctrl-C"},
    {"coordinator", FOR_COORDINATOR, run_coordinator, "[OPTIONS]",
     "one coordinator: membership, placement of experts, epochs"},
    {"gateway", FOR_GATEWAY, run_gateway, "[OPTIONS]",
     "one gateway: the OpenAI-style HTTP interface"},
    {"attention", FOR_WORKER, run_attention, "[OPTIONS]",
     "one attention actor: sequences, latent cache, gate"},
    {"expert", FOR_WORKER | FOR_EXPERT, run_expert, "[OPTIONS]",
     "one expert actor: the experts that the coordinator assigns to it"},
    {"sampler", FOR_WORKER, run_sampler, "[OPTIONS]", "one sampler: LM head and choice of tokens"},
    {"generate", FOR_GENERATE, command_generate, "--prompt TEXT [OPTIONS]",
     "one answer in the terminal, by the same actors in this process"},
    {"check", FOR_CHECK, command_check, "[OPTIONS]",
     "would it run here? or, with --golden, does it compute what the oracle computed?"},
    {"inspect", FOR_INSPECT, command_inspect, "DIR", "what a model directory holds"},
    {"synth", FOR_SYNTH, command_synth, "--shape FILE [--seed N] OUT",
     "write a model directory of any shape with random weights"},
    {"bench", FOR_BENCH, command_bench, "[OPTIONS]",
     "how fast is it here: decode, prefill and mixed load, beside the machine's limits"},
    {"chaos", FOR_CHAOS, command_chaos, "--plan FILE [OPTIONS]",
     "real processes, real faults: is every stream as if nothing had happened, and how long was it "
     "still?"},
    {"sim", FOR_SIM, command_sim, "[--seed N | --seeds A..B | --scenario FILE] [OPTIONS]",
     "whole clusters on virtual time, with faults drawn from a seed: is every token the same?"},
    {"plan", FOR_PLAN, command_plan, "--load FILE --processes P [OPTIONS]",
     "place experts on processes from recorded loads, and what that would give and cost"},
    {"bias-study", FOR_BIAS_STUDY, command_bias_study, "--text FILE [FILE ...] [OPTIONS]",
     "what routing biases that follow the load give in balance and cost in perplexity"},
    {"ctl", FOR_CONTROL, command_ctl,
     "status | actors | placement | operations | scale ROLE N | drain ACTOR | move L E FROM TO | "
     "replicate L E [TO] | rebalance | bias on|off|show|reset | cancel ID | record start|stop|dump "
     "| journal start FILE|stop | fault \"KIND ROLE N ...\" [OPTIONS]",
     "ask a running troupe how it is, and change it while it serves"},
    {"top", FOR_TOP, command_top, "[--url URL] [--once]",
     "the live view in a terminal: load of each expert, processes, faults"},
    {"replay", FOR_REPLAY, command_replay, "FILE [--host ADDRESS] [--port N]",
     "show a recorded feed (serve --journal) in the live view's page, with a scrubber"},
    {"version", FOR_VERSION, show_version, "", "print the version"},
};
#define COMMANDS (sizeof commands / sizeof commands[0])

static int usage(FILE *out) {
    fprintf(out, "usage: troupe COMMAND [OPTIONS]\n\n");
    for (size_t i = 0; i < COMMANDS; i++)
        fprintf(out, "  %-12s %s\n", commands[i].name, commands[i].help);
    fprintf(out, "\ntroupe COMMAND --help lists the options of a command\n");
    return out == stdout ? 0 : 2;
}

static bool wants_help(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0)
            return true;
    }
    return false;
}

static int run_command(const struct command *command, int argc, char **argv) {
    struct options options;
    struct failure failure;
    if (wants_help(argc, argv)) {
        printf("usage: troupe %s %s\n\n%s\n\n", command->name, command->arguments, command->help);
        options_help(command->bit);
        return 0;
    }
    if (options_parse(&options, argc, argv, command->bit, &failure) < 0) {
        fprintf(stderr, "troupe %s: %s\n", command->name, failure.text);
        return 2;
    }
    return command->run(&options);
}

int main(int argc, char **argv) {
    engine_set_huge_pages(ask_for_huge_pages);
    if (argc < 2)
        return usage(stderr);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0)
        return usage(stdout);
    for (size_t i = 0; i < COMMANDS; i++) {
        if (strcmp(commands[i].name, argv[1]) == 0 ||
            (strcmp(argv[1], "--version") == 0 && commands[i].bit == FOR_VERSION))
            return run_command(&commands[i], argc - 1, argv + 1);
    }
    fprintf(stderr, "troupe: there is no command '%s'\n\n", argv[1]);
    return usage(stderr);
}
