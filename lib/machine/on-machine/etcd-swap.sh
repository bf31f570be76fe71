# On the control plane: stops it, keeps its data directory aside, puts the prepared one in its place
# and starts it again.
systemctl stop $UNITS
if [ -e "$DATA_DIR" ]; then mv -T "$DATA_DIR" "$FORMER"; fi
mv -T "$WORK/data" "$DATA_DIR"
rm -rf "$WORK"
sync
systemctl start --no-block $UNITS
