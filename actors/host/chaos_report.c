/* See chaos_report.h. */
#include "actors/host/chaos_report.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

static const char *ms(double value, char *ret, size_t room) {
    if (value < 0)
        snprintf(ret, room, "-");
    else
        snprintf(ret, room, "%.0f", value);
    return ret;
}

static void print_fault(void *context, const struct journal_fault *fault) {
    char detect[32], repair[32];
    const struct chaos_totals *totals = context;
    (void)totals;
    printf("%8.1f s  %-44s %9s %9s %8.0f %8.0f %8.0f %8.0f\n", fault->at_ms / 1e3, fault->text,
           ms(fault->detect_ms, detect, sizeof detect), ms(fault->repair_ms, repair, sizeof repair),
           fault->gap_ms, fault->before, fault->during, fault->after);
}

void chaos_print(struct journal *journal, const struct chaos_totals *totals) {
    struct failure failure;
    printf("plan %s, seed %llu: %u streams for %.0f s\n", totals->plan, (unsigned long long)totals->seed,
           totals->streams, totals->seconds);
    printf("without faults: %.0f tokens/s, longest gap between pieces %.0f ms (99.9 %%: %.0f ms)\n",
           totals->tokens_per_s, totals->calm_gap_ms, totals->steady_gap_ms);
    printf("%10s  %-44s %9s %9s %8s %8s %8s %8s\n", "at", "fault", "detect ms", "repair ms", "gap ms", "before/s",
           "during/s", "after/s");
    if (journal_faults(journal, print_fault, (void *)totals, &failure) < 0)
        fprintf(stderr, "troupe chaos: %s\n", failure.text);
    printf("answers %u: lost %u, duplicated %u, different %u; refused in order %u, resumed after a cut %u\n",
           totals->answers, totals->lost, totals->duplicated, totals->different, totals->refused, totals->resumed);
    printf("memory of all processes %.0f -> %.0f MiB, open files %u -> %u\n", totals->resident_before_mib,
           totals->resident_after_mib, totals->files_before, totals->files_after);
    if (totals->frames_damaged + totals->frames_false + totals->frames_refused > 0)
        printf("frames: %llu damaged on the way, %llu refused by who received them; %llu with a wrong row\n",
               (unsigned long long)totals->frames_damaged, (unsigned long long)totals->frames_refused,
               (unsigned long long)totals->frames_false);
    fflush(stdout);
}

static void add_fault(void *context, const struct journal_fault *fault) {
    json_array_append_new(
        context, json_pack("{s:f, s:s, s:f, s:f, s:f, s:f, s:f, s:f}", "at_ms", fault->at_ms, "fault",
                           fault->text, "detect_ms", fault->detect_ms, "repair_ms", fault->repair_ms, "gap_ms",
                           fault->gap_ms, "tokens_per_s_before", fault->before, "tokens_per_s_during",
                           fault->during, "tokens_per_s_after", fault->after));
}

int chaos_write_json(struct journal *journal, const struct chaos_totals *totals, const char *path,
                     struct failure *failure) {
    json_t *faults = json_array();
    int error = journal_faults(journal, add_fault, faults, failure);
    json_t *root = json_pack(
        "{s:s, s:I, s:i, s:f, s:f, s:f, s:f, s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:I, s:I, s:o}", "plan", totals->plan, "seed",
        (json_int_t)totals->seed, "streams", (int)totals->streams, "seconds", totals->seconds, "tokens_per_s",
        totals->tokens_per_s, "steady_gap_ms", totals->steady_gap_ms, "longest_calm_gap_ms", totals->calm_gap_ms,
        "answers", (int)totals->answers, "lost", (int)totals->lost, "duplicated", (int)totals->duplicated,
        "different", (int)totals->different, "refused", (int)totals->refused, "resumed", (int)totals->resumed,
        "frames_damaged", (json_int_t)totals->frames_damaged, "frames_refused", (json_int_t)totals->frames_refused,
        "frames_with_a_wrong_row", (json_int_t)totals->frames_false, "faults", faults);
    if (error == 0 && json_dump_file(root, path, JSON_INDENT(1)) != 0)
        error = fail(failure, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    json_decref(root);
    return error;
}

static void write_row(void *context, const struct journal_fault *fault) {
    char detect[32], repair[32];
    fprintf(context,
            "<tr><td>%.1f s</td><td class=l>%s</td><td>%s</td><td>%s</td><td>%.0f</td><td><svg width=160 "
            "height=10><rect width=%.0f height=10 fill=#c33 /></svg></td><td>%.0f</td><td>%.0f</td><td>%.0f</td></tr>\n",
            fault->at_ms / 1e3, fault->text, ms(fault->detect_ms, detect, sizeof detect),
            ms(fault->repair_ms, repair, sizeof repair), fault->gap_ms,
            fault->gap_ms > 1600 ? 160.0 : fault->gap_ms / 10, fault->before, fault->during, fault->after);
}

int chaos_write_html(struct journal *journal, const struct chaos_totals *totals, const char *path,
                     struct failure *failure) {
    FILE *file = fopen(path, "w");
    if (file == NULL)
        return fail(failure, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    fprintf(file,
            "<!doctype html><meta charset=utf-8><title>troupe chaos: %s</title><style>body{font:15px "
            "sans-serif;margin:2em}td,th{padding:2px 10px;text-align:right;border-bottom:1px solid "
            "#ddd}.l{text-align:left}</style><h1>%s, seed %llu</h1><p>%u streams for %.0f s; without faults %.0f "
            "tokens/s, longest gap %.0f ms.</p><p><b>%u answers: %u lost, %u duplicated, %u different</b>; %u "
            "refused in order, %u resumed after a cut.</p><table><tr><th>at<th class=l>fault<th>detect "
            "ms<th>repair ms<th>gap ms<th>(a bar of 1.6 s)<th>tokens/s before<th>during<th>after</tr>\n",
            totals->plan, totals->plan, (unsigned long long)totals->seed, totals->streams, totals->seconds,
            totals->tokens_per_s, totals->calm_gap_ms, totals->answers, totals->lost, totals->duplicated,
            totals->different, totals->refused, totals->resumed);
    int error = journal_faults(journal, write_row, file, failure);
    fprintf(file, "</table>\n");
    if (fclose(file) != 0 && error == 0)
        error = fail(failure, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    return error;
}
