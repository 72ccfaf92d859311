#!/bin/bash
# Stands in for qemu-nbd where QEMU's block tests start it: makes a volume of the image file and has the agent show it
# over NBD, until this process ends, whose id is in the pid file.
#
#   we ──import, attach──▶ agent ◀──detach── keeper
#    └──a pipe, closed when we end, by whatever signal──┘
#
# WHIMBREL_IOTESTS_PROGRAM, _SOCKET: the program and the agent's socket. _STATE: a directory, of this test only; there
# are afterwards, under volumes/, the names of the volumes, and a line in served for each time that one was shown.
# _LIMIT: seconds after which everything is over.
set -eu

fail() {
    echo "stand-in for qemu-nbd: $*" >&2
    exit 1
}

whimbrel() {
    "$WHIMBREL_IOTESTS_PROGRAM" --socket "$WHIMBREL_IOTESTS_SOCKET" "$@"
}

place='' format='' export='' file='' pid_file='' fork=''
while [ $# -gt 0 ]; do
    case $1 in
    # What is meant by these holds of every export of ours. There is none that ends with its first client: without -t
    # it is shown until the test is over.
    -v | -t) ;;
    -e) shift ;;
    -k) place=$2 && shift ;;
    -f) format=$2 && shift ;;
    -x) export=$2 && shift ;;
    --pid-file=*) pid_file=${1#*=} ;;
    --fork) fork=yes ;;
    -*) fail "this is not known: $1" ;;
    *) file=$1 ;;
    esac
    shift
done
[ -n "$place" ] && [ -n "$format" ] && [ -f "$file" ] || fail "what is to be served, and where?"

state=$WHIMBREL_IOTESTS_STATE
# Whoever was shown before is gone first; the keeper holds the lock until then.
exec 8>"$state/lock"
flock --wait "$WHIMBREL_IOTESTS_LIMIT" 8 || fail "the one before has not ended"
# A file that was not touched since is the same disk: what a client wrote to it is there.
volume=${export:-i$(stat --format '%n %i %z %s' "$file" | md5sum | cut -c 1-24)}
if [ ! -e "$state/volumes/$volume" ]; then
    whimbrel volume import "$volume" "$file" --format "$format" >>"$state/log" 2>&1 || fail "import: see $state/log"
    : >"$state/volumes/$volume"
fi
shown=$(whimbrel volume attach "$volume" --export nbd) || fail "attach"

exec 9> >(
    exec >>"$state/log" 2>&1
    cat
    whimbrel volume detach "$volume"
)
ln -sfn "$shown" "$place"
echo "$volume $shown" >>"$state/served"

stay() {
    # A shell that is killed leaves its child behind, which must hold nothing open then.
    sleep "$WHIMBREL_IOTESTS_LIMIT" 9>&- &
    trap "kill $!; exit 0" INT TERM
    wait $!
}
# The tests take the pid file for the sign that clients may come.
if [ -n "$fork" ]; then
    stay </dev/null >/dev/null 2>&1 8>&- &
    [ -z "$pid_file" ] || echo $! >"$pid_file"
else
    [ -z "$pid_file" ] || echo $$ >"$pid_file"
    stay </dev/null >/dev/null 2>&1 8>&-
fi
