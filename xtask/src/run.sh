#!/usr/bin/env bash
# Written by `cargo xtask gpu-bundle`: runs on a CUDA machine that has neither Rust nor the repository.
# Usage: ./run.sh STEP...   with the steps check, bench, sanitizer, peer, in the order given.
#   check      every op over its full grid, compared with its reference          -> $OUT/check.jsonl
#   bench      every case of the benchmark                                        -> $OUT/bench.jsonl
#   sanitizer  memcheck and racecheck of compute-sanitizer on a reduced grid      -> $OUT/sanitizer-*.log
#   peer       both releases of the peer, appended to what bench wrote            -> $OUT/bench.jsonl
# OUT (default ./out) is where results go; FILTER (default none) chooses ops of check, bench and sanitizer: words, of which
# `cast` is all ops whose names contain that and `=cast` the op of that name;
# PEER_FILTER (default none) is a regular expression for the peers' "op case"; GPU (default 0) is the ordinal.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-$PWD/out} FILTER=${FILTER:-} PEER_FILTER=${PEER_FILTER:-} GPU=${GPU:-0}
if [ $# -eq 0 ]; then
  sed -n '2,11s/^# //p' "$0" >&2
  exit 2
fi
mkdir -p "$OUT"
read -ra filters <<<"$FILTER"
failed=()
if [ -d "$here/golden" ]; then export FERROTILE_GOLDEN="$here/golden"; fi

check() {
  "$here/check" ${FILTER:+"${filters[@]}"} --device "cuda:$GPU" --depth full --json "$OUT/check.jsonl"
}

bench() {
  # Without the driver's cache, so that the first launch of an op is one that compiles.
  CUDA_CACHE_DISABLE=1 "$here/bench" ${FILTER:+"${filters[@]}"} --device "cuda:$GPU" --json "$OUT/bench.jsonl"
}

sanitizer() {
  local tool status=0
  local sanitizer
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
    echo "sanitizer: compute-sanitizer is not in PATH; it comes with the CUDA toolkit" >&2
    return 1
  }
  for tool in memcheck racecheck; do
    echo "-- $tool" >&2
    "$sanitizer" --tool "$tool" --error-exitcode 1 "$here/check" ${FILTER:+"${filters[@]}"} --device "cuda:$GPU" --depth small \
      --json "$OUT/sanitizer-$tool.jsonl" 2>&1 | tee "$OUT/sanitizer-$tool.log" || status=1
  done
  return $status
}

peer() {
  local version release status=0 found=0
  # Compiling is what takes long, so several processes compile a share of the cases each before the timed run.
  local shards=15
  for version in v1:1.0.0 v2:2.1.0; do
    release=${version#*:} version=${version%%:*}
    # A bundle may carry one release only, where both are too much to carry.
    [ -f "$here/peer-$release.tar.xz" ] || { echo "-- $release: skipped, peer-$release.tar.xz is not in this bundle" >&2; continue; }
    found=1
    local site="${TMPDIR:-/tmp}/ferrotile-peer-$release"
    if [ ! -d "$site/site" ]; then
      mkdir -p "$site" && tar -xJf "$here/peer-$release.tar.xz" -C "$site" || return 1
    fi
    echo "-- $release: compiling" >&2
    local shard pids=() pid
    for ((shard = 0; shard < shards; shard++)); do
      CUDA_VISIBLE_DEVICES=$GPU PYTHONPATH=$site/site python3 "$here/time_peer.py" "$version" --only "$PEER_FILTER" \
        --compile-only --shard "$shard/$shards" >/dev/null 2>&1 &
      pids+=($!)
    done
    # A case that fails here shows its error in the timed run.
    for pid in "${pids[@]}"; do wait "$pid"; done
    echo "-- $release: timing" >&2
    CUDA_VISIBLE_DEVICES=$GPU PYTHONPATH=$site/site python3 "$here/time_peer.py" "$version" --only "$PEER_FILTER" 2>"$OUT/peer-$release.log" |
      grep --line-buffered '^{' | tee -a "$OUT/bench.jsonl" || { status=1; tail -n 5 "$OUT/peer-$release.log" >&2; }
  done
  if [ $found = 0 ]; then
    echo "peer: neither release is in this bundle; make it with: cargo xtask gpu-bundle --peer" >&2
    return 1
  fi
  return $status
}

for step in "$@"; do
  case $step in
    check | bench | sanitizer | peer) ;;
    *) echo "run.sh: step must be check, bench, sanitizer or peer, not '$step'" >&2; exit 2 ;;
  esac
done
for step in "$@"; do
  echo "== $step" >&2
  start=$SECONDS
  "$step" || failed+=("$step")
  echo "== $step: $((SECONDS - start)) s" >&2
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
