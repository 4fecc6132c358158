#!/usr/bin/env bash
# preStop of a worker pod that is to be deleted: leave_cluster.sh SECONDS
# Kubernetes would kill Ray's processes at work. This drains the node first: Serve starts its replicas elsewhere, sends no
# new request here, and lets the running ones finish; then the pod may go.
set -u
seconds="$1"
deadline=$((SECONDS + seconds))

# Drains the node that this runs on. Without a head (the whole service is being deleted) there is nothing to wait for.
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is deleted" \
    --deadline-remaining-seconds "$seconds" || exit 0

# Serve's replicas and its proxy carry their class in the process title.
while ((SECONDS < deadline)); do
    grep -aqsE '^ray::(ServeReplica|ProxyActor)' /proc/[0-9]*/cmdline || exit 0
    sleep 1
done
echo "requests were still running after $seconds s" >&2
