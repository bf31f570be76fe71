# On the control plane: saves a snapshot of etcd, has it checked, and prints it on stdout. What is
# told about it goes to stderr.
umask 077
rm -rf "$WORK"
mkdir "$WORK"
trap 'rm -rf "$WORK"' EXIT

export ETCDCTL_API=3
etcdctl --endpoints="$ENDPOINT" --cacert="$CA" --cert="$CERT" --key="$KEY" \
  snapshot save "$WORK/snapshot.db" >&2
tool=$(command -v etcdutl || command -v etcdctl)
echo "status: $("$tool" snapshot status --write-out=json "$WORK/snapshot.db")" >&2
cat "$WORK/snapshot.db"
