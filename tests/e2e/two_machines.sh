#!/usr/bin/env bash
# Trains on two machines: network namespaces, joined by a cable, in each of which `torchrun` starts one rank.
#
#   two_machines.sh LOGS FLAGS...
#
# FLAGS are those of train_iet_agc.py. What machine i says goes to LOGS/machine-i.log, the exit code of its torchrun
# to LOGS/machine-i.code. With CUT_WHEN=PATH in the environment the cable is pulled as soon as PATH exists. PYTHON
# names the interpreter. Exits with 77 and says why where namespaces are not permitted, else with 0 if both machines
# did. Nothing of the machines is left, also when the script is interrupted.
set -euo pipefail

readonly PYTHON="${PYTHON:-python}"
readonly SCRIPT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/train_iet_agc.py"
readonly LOGS="${1:?two_machines.sh LOGS FLAGS...}"
shift
# Names of namespaces are the whole machine's; those of cables, and addresses, are each namespace's own.
readonly MACHINES=("iet-$$-0" "iet-$$-1")
readonly ADDRESSES=(10.77.0.1 10.77.0.2)
readonly CABLE=cable0

cannot() {
    echo "network namespaces are not permitted here: $*" >&2
    exit 77
}

remove_machines() {
    local machine pids
    # shellcheck disable=SC2046 # one word a process
    kill $(jobs -p) 2>/dev/null || true
    for machine in "${MACHINES[@]}"; do
        pids="$(ip netns pids "$machine" 2>/dev/null || true)"
        # shellcheck disable=SC2086 # one word a process
        [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
        ip netns delete "$machine" 2>/dev/null || true
    done
}

make_machines() {
    local i said
    for i in 0 1; do
        said="$(ip netns add "${MACHINES[i]}" 2>&1)" || cannot "$said"
        said="$(ip -n "${MACHINES[i]}" link set lo up 2>&1)" || cannot "$said"
    done
    said="$(ip -n "${MACHINES[0]}" link add "$CABLE" type veth peer name "$CABLE" netns "${MACHINES[1]}" 2>&1)" ||
        cannot "$said"
    for i in 0 1; do
        ip -n "${MACHINES[i]}" address add "${ADDRESSES[i]}/30" dev "$CABLE"
        ip -n "${MACHINES[i]}" link set "$CABLE" up
    done
}

train() {
    local i="$1" code=0
    shift
    ACCELERATE_USE_CPU=true GLOO_SOCKET_IFNAME="$CABLE" ip netns exec "${MACHINES[i]}" \
        "$PYTHON" -m torch.distributed.run --nnodes 2 --node_rank "$i" --nproc_per_node 1 \
        --master_addr "${ADDRESSES[0]}" --master_port 29500 "$SCRIPT" "$@" >"$LOGS/machine-$i.log" 2>&1 || code=$?
    echo "$code" >"$LOGS/machine-$i.code"
    return "$code"
}

cut_cable_when() {
    until [ -e "$1" ]; do sleep 0.02; done
    ip -n "${MACHINES[1]}" link set "$CABLE" down
}

command -v ip >/dev/null || cannot "there is no command ip"
trap remove_machines EXIT
trap 'exit 130' INT TERM
make_machines
mkdir -p "$LOGS"
machines=()
for i in 0 1; do
    train "$i" "$@" &
    machines+=("$!")
done
[ -z "${CUT_WHEN:-}" ] || cut_cable_when "$CUT_WHEN" &
result=0
for machine in "${machines[@]}"; do
    wait "$machine" || result=$?
done
exit "$result"
