#!/bin/sh
# Runs the plans of config/faults against real processes and prints one table. Fails if any stream was lost, doubled or different.
# usage: tests/chaos.sh BUILD [PLAN] [SEED]
set -u
build=$1
plans=${2:-}
seed=${3:-1}
[ -n "$plans" ] || plans=$(ls config/faults/live-*.plan | grep -v storm)
mkdir -p "$build/chaos"
status=0
printf '%-44s %9s %9s %7s %9s %5s %7s %9s\n' fault "detect ms" "repair ms" "gap ms" "steady ms" lost doubled different
for plan in $plans; do
    name=$(basename "$plan" .plan)
    out=$build/chaos/$name
    "$build/troupe" chaos --plan "$plan" --seed "$seed" --html "$out.html" --json "$out.json" \
        --journal "$build/chaos.db" >"$out.txt" 2>&1 || status=1
    awk -v plan="$name" '
        /^without faults/ { for (i = 1; i < NF; i++) if ($i == "pieces") steady = $(i + 1) }
        /^ *[0-9.]+ s  / {
            line[++n] = substr($0, 13, 44); split(substr($0, 57), f, " ")
            detect[n] = f[1]; repair[n] = f[2]; gap[n] = f[3]
        }
        /^answers/ { gsub(/[,;]/, ""); lost = $4; doubled = $6; different = $8 }
        END {
            if (n == 0) print plan ": no result, see its output"
            for (i = 1; i <= n; i++) printf "%-44s %9s %9s %7s %9s %5s %7s %9s\n", substr(line[i], 1, 44), detect[i], repair[i], \
                gap[i], steady, lost, doubled, different
        }' "$out.txt"
done
exit $status
