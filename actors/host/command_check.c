/* troupe check: would this model be served on this machine? One line per question, with advice
 * where the answer is no. */
#include <dirent.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "actors/host/http.h"
#include "actors/host/process.h"
#include "model/chat.h"

#define FILES_WANTED 4096

struct report {
    unsigned problems, warnings;
};

enum verdict { FINE, WARNING, PROBLEM };

static void say(struct report *report, enum verdict verdict, const char *subject,
                const char *format, ...) __attribute__((format(printf, 4, 5)));

static void say(struct report *report, enum verdict verdict, const char *subject,
                const char *format, ...) {
    static const char *const marks[] = {"ok     ", "warning", "PROBLEM"};
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printf("%s  %-12s %s\n", marks[verdict], subject, text);
    report->warnings += verdict == WARNING;
    report->problems += verdict == PROBLEM;
}

static void check_tokenizer(struct report *report, const struct options *options) {
    struct tokenizer *tokenizer;
    struct failure failure;
    if (tokenizer_directory_open(&tokenizer, options->model, &failure) < 0) {
        say(report, PROBLEM, "tokenizer", "%s", failure.text);
        return;
    }
    say(report, FINE, "tokenizer", "%u tokens", tokenizer_vocabulary(tokenizer));
    enum chat_format chat = chat_recognise(tokenizer, &failure);
    if (chat == CHAT_NONE)
        say(report, WARNING, "chat", "%s; completions will work", failure.text);
    else
        say(report, FINE, "chat", "%s", chat_format_name(chat));
    tokenizer_close(&tokenizer);
}

static double read_meminfo(const char *field) {
    char line[256];
    double kib = -1;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, field, strlen(field)) == 0)
            kib = strtod(line + strlen(field) + 1, NULL);
    }
    if (file != NULL)
        fclose(file);
    return kib * 1024;
}

/* Packed weights (about their size in the files), the latent cache, and the rings of every edge,
 * for `serve` with these options. */
static void check_memory(struct report *report, const struct options *options,
                         const struct model *model) {
    const struct model_config *config = model_config(model);
    const struct settings *settings = &options->settings;
    double all = 0, experts = 0;
    for (uint32_t i = 0; i < model_tensor_count(model); i++)
        all += (double)model_tensor_at(model, i)->bytes;
    for (uint32_t layer = 0; layer < config->layers; layer++) {
        if (model_layer_is_moe(config, layer))
            experts += (double)model_expert_bytes(model, layer) * config->experts;
    }
    double grown = strcmp(options->numerics, "f32") == 0 ? config->fp8 ? 4 : 2 : 1;
    size_t activation = strcmp(options->numerics, "f32") == 0 ? 4 : 2;
    uint32_t cache_layers = config->layers + (settings->mtp_steps > 0 && config->mtp_layers > 0);
    double cache = (double)settings->kv_cache_tokens * cache_layers *
                   (double)cache_stride(config->kv_lora, config->rope) * (double)activation;
    double rings = 2.0 * (double)options->attention *
                   (double)(options->experts + options->samplers) * settings->ring_kib * 1024;
    double need =
        grown * (experts + (all - experts) * (double)(options->attention + options->samplers)) +
        cache * (double)options->attention + rings;
    double available = read_meminfo("MemAvailable");
    if (available >= 0 && need > available)
        say(report, PROBLEM, "memory",
            "about %.1f GB needed, %.1f GB available: fewer --attention, a smaller "
            "kv_cache_tokens, or more machines",
            need / 1e9, available / 1e9);
    else
        say(report, FINE, "memory",
            "about %.2f GB needed (weights %.2f, latent cache %.2f, rings %.2f), %.1f GB available",
            need / 1e9, (need - rings - cache * (double)options->attention) / 1e9,
            cache * (double)options->attention / 1e9, rings / 1e9, available / 1e9);
    struct statvfs shared;
    if (statvfs("/dev/shm", &shared) != 0)
        say(report, PROBLEM, "/dev/shm",
            "there is none: mount a tmpfs there, or use --transport zmq");
    else if ((double)shared.f_bavail * (double)shared.f_frsize < rings)
        say(report, PROBLEM, "/dev/shm",
            "%.0f MB free, rings need %.0f MB: enlarge it, or lower ring_kib",
            (double)shared.f_bavail * (double)shared.f_frsize / 1e6, rings / 1e6);
    else
        say(report, FINE, "/dev/shm", "%.0f MB free",
            (double)shared.f_bavail * (double)shared.f_frsize / 1e6);
}

static void check_model(struct report *report, const struct options *options) {
    struct model_directory directory;
    struct failure failure;
    if (model_directory_open(&directory, options->model, &failure) < 0) {
        say(report, PROBLEM, "model", "%s", failure.text);
        return;
    }
    const struct model_config *config = model_config(directory.model);
    say(report, FINE, "model",
        "%s: %s, %u layers, %u experts, hidden %u, %u tensors, all shapes as config.json says",
        options->model, config->model_type, config->layers, config->experts, config->hidden,
        model_tensor_count(directory.model));
    check_memory(report, options, directory.model);
    model_directory_close(&directory);
    check_tokenizer(report, options);
}

static void check_processor(struct report *report, const struct options *options) {
    struct failure failure;
    char list[64] = "scalar";
    if (isa_available(ISA_AVX512))
        strcat(list, ", avx512");
    if (isa_available(ISA_AMX))
        strcat(list, ", amx");
    const struct kernels *kernels = options_kernels(options, &failure);
    if (kernels == NULL)
        say(report, PROBLEM, "processor", "%s", failure.text);
    else if (!isa_available(ISA_AVX512))
        say(report, WARNING, "processor",
            "only %s: right but slow; a processor with AVX-512 or AMX is many times faster", list);
    else
        say(report, FINE, "processor", "%s; chosen: %s", list, kernels->name);
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t wanted =
        options->settings.threads * (options->attention + options->experts + options->samplers);
    if (wanted == 0)
        wanted = options->experts; /* as many as there are, but at least one for each expert process */
    if (processors > 0 && (uint64_t)processors < wanted)
        say(report, WARNING, "processors", "%ld, for %llu compute threads: they will take turns",
            processors, (unsigned long long)wanted);
    else
        say(report, FINE, "processors", "%ld", processors);
}

static void check_port(struct report *report, const struct options *options) {
    struct failure failure;
    int socket;
    if (http_listen(&socket, options->host, (uint16_t)options->port, &failure) < 0) {
        say(report, PROBLEM, "port", "%s", failure.text);
        return;
    }
    close(socket);
    say(report, FINE, "port", "%llu of %s is free", (unsigned long long)options->port,
        options->host);
}

static void check_limits(struct report *report) {
    struct rlimit files, address;
    getrlimit(RLIMIT_NOFILE, &files);
    getrlimit(RLIMIT_AS, &address);
    if (files.rlim_cur < FILES_WANTED)
        say(report, WARNING, "ulimit -n",
            "%llu open files: expect at most about that many clients; raise it to %d or more",
            (unsigned long long)files.rlim_cur, FILES_WANTED);
    else
        say(report, FINE, "ulimit -n", "%llu open files", (unsigned long long)files.rlim_cur);
    if (address.rlim_cur != RLIM_INFINITY)
        say(report, WARNING, "ulimit -v",
            "address space is limited to %llu bytes: models are mapped; set it to unlimited",
            (unsigned long long)address.rlim_cur);
}

static void check_gpu(struct report *report) {
    unsigned count = 0;
    DIR *directory = opendir("/proc/driver/nvidia/gpus");
    for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;)
        count += entry->d_name[0] != '.';
    if (directory != NULL)
        closedir(directory);
    if (count == 0) {
        say(report, FINE, "gpu", "none found; this version computes on the CPU");
        return;
    }
    void *nccl = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL);
    int (*version)(int *) = NULL;
    int number = 0;
    if (nccl != NULL)
        *(void **)&version = dlsym(nccl, "ncclGetVersion");
    if (version != NULL)
        version(&number);
    say(report, FINE, "gpu", "%u NVIDIA GPU(s), %s (%d); this version computes on the CPU", count,
        nccl != NULL ? "NCCL found" : "no NCCL", number);
    if (nccl != NULL)
        dlclose(nccl);
}

int command_check(const struct options *options) {
    struct report report = {0};
    if (options->golden != NULL)
        return command_golden(options);
    check_model(&report, options);
    check_processor(&report, options);
    check_port(&report, options);
    check_limits(&report);
    check_gpu(&report);
    printf("%u problem%s, %u warning%s\n", report.problems, report.problems == 1 ? "" : "s",
           report.warnings, report.warnings == 1 ? "" : "s");
    return report.problems == 0 ? 0 : 1;
}
