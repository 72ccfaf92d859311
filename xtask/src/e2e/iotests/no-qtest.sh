#!/bin/bash
# Starts QEMU for its block tests where it is built without the accelerator that runs no guest (qtest), as Debian's is:
# an emulated machine that finds nothing to boot serves them as well. WHIMBREL_IOTESTS_QEMU: the program.
set -eu
words=() before=''
for word; do
    [ "$before $word" != '-accel qtest' ] || word=tcg
    words+=("$word")
    before=$word
done
exec "$WHIMBREL_IOTESTS_QEMU" "${words[@]}"
