# The orchestration layer: each target calls a script of bin/, which explains itself with --help.
# Extra flags go in FLAGS: make logs FLAGS=--follow

# These variables count only on make's command line: some shells and tools set NAME and the like.
$(foreach variable,FLAGS NAME FILE NODES YES KEEP DAY_TWO CHART REPO RELEASE NS VALUES,\
  $(if $(filter environment%,$(origin $(variable))),$(eval override $(variable) :=)))

.DEFAULT_GOAL := help
# The steps build on each other, also under make -j.
.NOTPARALLEL:
.PHONY: check all up down wait status network dns storage metrics smoke test snapshot restore \
  suspend reconfig add-worker remove-worker upgrade etcd-snapshot etcd-restore clean clobber \
  download certs certs-check kubeconfigs encryption pki configs prepare install logs \
  health helm-deploy rehearse rehearse-proxy help packages

# ── The cluster ──────────────────────────────────────────────────────────────────────────────
check: packages ## Verify prerequisites (QEMU, kubectl, firmware)
	@./bin/check-prereqs.mts $(FLAGS)

all: packages ## From nothing to a cluster: PKI, install, boot, network, DNS, storage, metrics
	@./bin/bootstrap-cluster.mts $(FLAGS)

up: packages ## Boot all installed nodes
	@./bin/provision.mts $(FLAGS)

down: packages ## Gracefully shut down all nodes
	@./bin/shutdown.mts $(FLAGS)

wait: packages ## Live dashboard — monitor cluster readiness
	@./bin/wait-for-cluster.mts $(FLAGS)

status: packages ## Comprehensive cluster health status
	@./bin/cluster-status.mts $(FLAGS)

network: packages ## Install Cilium CNI + RBAC + node labels
	@./bin/install-cilium.mts $(FLAGS)

dns: packages ## Deploy CoreDNS for cluster DNS (10.32.0.10)
	@./bin/deploy-coredns.mts $(FLAGS)

storage: packages ## Deploy local storage, with a default StorageClass
	@./bin/deploy-local-storage.mts $(FLAGS)

metrics: packages ## Deploy Metrics Server (kubectl top)
	@./bin/deploy-metrics-server.mts $(FLAGS)

smoke: packages ## Deploy nginx and verify pod networking
	@./bin/smoke.mts $(FLAGS)

test: packages ## Test the running cluster, from services to pod traffic
	@./bin/test-cluster.mts $(FLAGS)

snapshot: packages ## Save cluster state for instant restore (NAME=before-lab-3)
	@./bin/snapshot.mts $(FLAGS) $(if $(NAME),"$(NAME)")

restore: packages ## Restore from snapshot (seconds vs ~15min rebuild; NAME=before-lab-3)
	@./bin/restore.mts $(FLAGS) $(if $(NAME),"$(NAME)")

suspend: packages ## Save the machines' memory and stop them; make up continues from there
	@./bin/snapshot.mts --suspend $(FLAGS)

reconfig: packages ## Push config changes to running nodes (FLAGS=--dry-run)
	@./bin/reconfig.mts $(FLAGS)

add-worker: packages ## Add a worker to the running cluster (NAME=delta)
	@./bin/add-worker.mts $(FLAGS) $(if $(NAME),"$(NAME)")

remove-worker: packages ## Drain a worker and remove it (NAME=delta)
	@./bin/remove-worker.mts $(FLAGS) $(if $(NAME),"$(NAME)")

upgrade: packages ## Upgrade a node to NIXOS_VERSION, or all of them (NAME=all)
	@./bin/rolling-upgrade.mts $(FLAGS) $(if $(NAME),"$(NAME)")

etcd-snapshot: packages ## Create etcd data backup (saved to backups/)
	@./bin/etcd-backup.mts snapshot $(FLAGS)

etcd-restore: packages ## Restore etcd from latest backup (or FILE=backups/etcd-….db)
	@./bin/etcd-backup.mts restore $(FLAGS) $(if $(FILE),"$(FILE)")

helm-deploy: packages ## Install any Helm chart (CHART=podinfo REPO=https://… RELEASE=web NS=web VALUES=my.yaml)
	@./bin/helm-deploy.mts $(if $(REPO),--repo "$(REPO)") $(if $(RELEASE),--release "$(RELEASE)") \
	  $(if $(NS),--namespace "$(NS)") $(if $(VALUES),--values "$(VALUES)") $(FLAGS) $(if $(CHART),"$(CHART)")

health: packages ## Live view of nodes, pods, usage and events (q quits, p pauses)
	@./bin/cluster-health.mts $(FLAGS)

ssh-%: packages ## SSH into nodes
	@./bin/ssh.mts $* $(FLAGS)

clean: packages ## Remove generated artifacts (keys and kubeconfigs stay while a disk exists)
	@./bin/clean.mts $(FLAGS)

clobber: packages ## Destroy everything including disks
	@./bin/clean.mts --disks $(FLAGS)

# ── The same, step by step ───────────────────────────────────────────────────────────────────
download: packages ## Download the NixOS installer and verify it
	@./bin/download-iso.mts $(FLAGS)

certs: packages ## Generate the certificates and ssh keys
	@./bin/generate-certs.mts $(FLAGS)

certs-check: packages ## Show every certificate and check it
	@./bin/generate-certs.mts --check $(FLAGS)

kubeconfigs: packages ## Generate the kubeconfigs
	@./bin/generate-kubeconfigs.mts $(FLAGS)

encryption: packages ## Generate the key that encrypts Secrets in etcd
	@./bin/generate-encryption-config.mts $(FLAGS)

# FLAGS are for the certificates: --force must not reach the encryption key, which old Secrets need.
pki: packages ## Generate all of these: certs + kubeconfigs + encryption
	@./bin/generate-certs.mts $(FLAGS)
	@./bin/generate-kubeconfigs.mts
	@./bin/generate-encryption-config.mts

configs: packages ## Stage the NixOS configuration of each node
	@./bin/generate-nocloud-iso.mts $(FLAGS)

# FLAGS would reach all of them, and --force would replace the CA.
prepare: override FLAGS :=
prepare: download pki configs ## Everything before the install: download + pki + configs

install: packages ## Install NixOS on the nodes that have no disk
	@./bin/provision.mts --iso $(FLAGS)

install-%: packages ## Install NixOS on one node
	@./bin/provision.mts --iso $* $(FLAGS)

boot-%: packages ## Boot one node
	@./bin/provision.mts $* $(FLAGS)

console-%: packages ## Attach to the serial console of a node (Ctrl-] leaves)
	@./bin/console.mts $* $(FLAGS)

logs: packages ## Show the journals of the cluster's services (FLAGS=--follow)
	@./bin/logs.mts $(FLAGS)

rehearse: packages ## Everything, against a simulated NixOS installer (YES=1 DAY_TWO=1 NODES=alpha KEEP=1)
	@node --import tsx test/rehearsal/rehearse.mts

rehearse-proxy: packages ## A worker behind a corporate proxy, against the same installer (YES=1)
	@node --import tsx test/rehearsal/rehearse-proxy.mts

# ── The project ──────────────────────────────────────────────────────────────────────────────
help: ## Show this list
	@nodes=$$($(MAKE) -s print-CONTROL_PLANE_NODE print-WORKER_NODES | tr ' \n' '//'); \
	awk -F ':.*## ' -v nodes="$${nodes%/}" '/^[a-z].*:.*## / { \
	  sub(/%/, nodes, $$1); printf "  %-16s  %s\n", $$1, $$2 }' Makefile

# The installed packages are compared with package-lock.json by content, as file times mean nothing
# after git switch or unzip. What is installed stays until its replacement is complete.
packages:
	@node -e '$(compare_packages)' 2>/dev/null || $(install_packages)

compare_packages = \
  const wanted = require("./package-lock.json").packages; \
  const found = require("./node_modules/.package-lock.json").packages; \
  const same = ([path, { version }]) => wanted[path] && wanted[path].version === version; \
  const needed = ([path, { optional, dev }]) => !path || optional || dev || found[path]; \
  process.exit(Object.entries(found).every(same) && Object.entries(wanted).every(needed) ? 0 : 1)

install_packages = { \
  { command -v npm >/dev/null || { \
    echo "npm is missing: brew install node, or Node and npm of your distribution" >&2; false; }; } && \
  echo "installing the npm packages (npm ci)" >&2 && \
  rm -rf .packages.partial && mkdir .packages.partial && \
  cp package.json package-lock.json .npmrc .packages.partial/ && \
  (cd .packages.partial && npm ci) && rm -rf node_modules && \
  mv .packages.partial/node_modules node_modules && rm -rf .packages.partial || \
  { rm -rf .packages.partial; [ -d node_modules/zx ] && \
    echo "! using the packages that are installed, which differ from package-lock.json" >&2; }; }

# A value of cluster.env as a shell reads it; the environment wins: make print-WORKER_MEM
print-%:
	@if [ -z "$${$*+set}" ]; then . ./cluster.env; fi; printf '%s\n' "$${$*-}"
