#!/usr/bin/env bash
# c++ for tools/test_asan.sh.
exec c++ "$@" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
