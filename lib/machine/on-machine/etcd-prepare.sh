# On the control plane: makes a data directory out of the snapshot on stdin, beside the one that is
# in use, which is not touched. If anything fails, nothing stays.
umask 077
exec 9>"$DATA_DIR.lock"
flock --timeout 600 9
rm -rf "$WORK"
mkdir "$WORK"
trap '[ $? = 0 ] || rm -rf "$WORK"' EXIT
cat >"$WORK/snapshot.db"

export ETCDCTL_API=3
tool=$(command -v etcdutl || command -v etcdctl)
"$tool" snapshot status "$WORK/snapshot.db" >&2
# Whoever watches the API server knows a revision already. From one above all that there ever
# were, with none before it, they start afresh; else they would miss what the restore changed.
# Milliseconds since 1970 grow faster than a store takes writes, so a revision of now is above those
# that former restores have led to, whatever this file is of. (The flag's number is added.)
status=$("$tool" snapshot status --write-out=json "$WORK/snapshot.db")
revision=$(sed -E 's/.*"revision":([0-9]+).*/\1/' <<<"$status")
now=$(date +%s%3N)
bump=$((now > revision ? now - revision : now))
"$tool" snapshot restore "$WORK/snapshot.db" --data-dir="$WORK/data" --name="$NAME" \
  --initial-cluster="$INITIAL_CLUSTER" --initial-cluster-token="$INITIAL_CLUSTER_TOKEN" \
  --initial-advertise-peer-urls="$INITIAL_ADVERTISE_PEER_URLS" \
  --bump-revision="$bump" --mark-compacted >&2
rm "$WORK/snapshot.db"
if [ -e "$DATA_DIR" ]; then
  chown -R --reference="$DATA_DIR" "$WORK/data"
  chmod --reference="$DATA_DIR" "$WORK/data"
fi
sync
