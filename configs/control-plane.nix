# The control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, each a
# plain systemd service. Flags stand in groups with the reason why they are set; what is not set
# has the program's own default.
{
  cluster,
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (cluster) node;
  home = "/var/lib/kubernetes";
  pki = "${home}/pki";
  reference = "https://kubernetes.io/docs/reference/command-line-tools-reference";

  # "program --flag=value …", a line each, in the order of the groups.
  commandLine =
    program: groups:
    lib.concatStringsSep " \\\n  " (
      [ program ]
      ++ lib.concatMap (
        group: lib.mapAttrsToList (flag: value: "--${flag}=${toString value}") group.flags
      ) groups
    );

  # What nobody would notice from outside: changed keys and configuration files.
  changes = files: etcFiles:
    map (file: cluster.digests.${file}) files
    ++ map (file: config.environment.etc.${file}.source) etcFiles;

  # Common to the four: they come back whatever happens, and write nowhere but where they say.
  serviceOf = user: {
    User = user;
    Group = user;
    Restart = "always";
    RestartSec = 5;
    NoNewPrivileges = true;
    PrivateDevices = true;
    PrivateTmp = true;
    ProtectHome = true;
    ProtectSystem = "strict";
  };
in
{
  # ── etcd: the only place where the cluster's state is kept ─────────────────────────────────
  systemd.services.etcd = {
    description = "etcd, the store of the Kubernetes API server";
    documentation = [ "https://etcd.io/docs/" ];
    wantedBy = [ "multi-user.target" ];
    after = [ "network.target" ];
    startLimitIntervalSec = 0;
    restartTriggers = changes [ "pki/ca.pem" "pki/kubernetes.pem" ] [ ];
    serviceConfig = serviceOf "etcd" // {
      # Ready means: it has a leader and serves.
      Type = "notify";
      TimeoutStartSec = 300;
      StateDirectory = "etcd";
      StateDirectoryMode = "0700";
      LimitNOFILE = 65536;
      ExecStart = commandLine "${pkgs.etcd_3_6}/bin/etcd" [
        {
          why = "one member; its name stands in the data, so it must not change";
          flags = {
            name = node.name;
            data-dir = "/var/lib/etcd";
            initial-cluster = "${node.name}=https://127.0.0.1:2380";
            initial-cluster-state = "new";
            initial-cluster-token = cluster.name;
          };
        }
        {
          why = "only the API server talks to it, and that runs here: nothing listens outside";
          flags = {
            listen-client-urls = "https://127.0.0.1:2379";
            advertise-client-urls = "https://127.0.0.1:2379";
            listen-peer-urls = "https://127.0.0.1:2380";
            initial-advertise-peer-urls = "https://127.0.0.1:2380";
          };
        }
        {
          why = "whoever asks shows a certificate of the cluster's CA";
          flags = {
            cert-file = "${pki}/kubernetes.pem";
            key-file = "${pki}/kubernetes-key.pem";
            trusted-ca-file = "${pki}/ca.pem";
            client-cert-auth = "true";
            peer-cert-file = "${pki}/kubernetes.pem";
            peer-key-file = "${pki}/kubernetes-key.pem";
            peer-trusted-ca-file = "${pki}/ca.pem";
            peer-client-cert-auth = "true";
          };
        }
        {
          why = "health and metrics can be read without a certificate, on this machine only";
          flags.listen-metrics-urls = "http://127.0.0.1:2381";
        }
      ];
    };
  };

  # ── kube-apiserver: the one door to everything ─────────────────────────────────────────────
  systemd.services.kube-apiserver = {
    description = "Kubernetes API server";
    documentation = [ "${reference}/kube-apiserver/" ];
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    after = [
      "network-online.target"
      "etcd.service"
    ];
    startLimitIntervalSec = 0;
    restartTriggers =
      changes
        [
          "pki/ca.pem"
          "pki/kubernetes.pem"
          "pki/front-proxy-client.pem"
          "pki/service-account.pem"
          "encryption-config.yaml"
        ]
        [ "kubernetes/audit-policy.json" ];
    serviceConfig = serviceOf "kubernetes" // {
      # Ready means: it listens, so the two services after it need not try in vain.
      Type = "notify";
      TimeoutStartSec = 300;
      LogsDirectory = "kubernetes";
      LogsDirectoryMode = "0700";
      LimitNOFILE = 65536;
      ExecStart = commandLine "${pkgs.kubernetes}/bin/kube-apiserver" [
        {
          why = "workers come over the lan, the host through its forwarded port";
          flags = {
            bind-address = "0.0.0.0";
            secure-port = cluster.apiPort;
            # The addresses behind the service "kubernetes"; without it, 10.0.2.15.
            advertise-address = node.ip;
            service-cluster-ip-range = cluster.serviceCidr;
          };
        }
        {
          why = "TLS 1.3 or nothing: each client here speaks it, and it has no weak ciphers";
          flags = {
            tls-cert-file = "${pki}/kubernetes.pem";
            tls-private-key-file = "${pki}/kubernetes-key.pem";
            tls-min-version = "VersionTLS13";
          };
        }
        {
          why = "its data, and who it is there";
          flags = {
            etcd-servers = "https://127.0.0.1:2379";
            etcd-cafile = "${pki}/ca.pem";
            etcd-certfile = "${pki}/kubernetes.pem";
            etcd-keyfile = "${pki}/kubernetes-key.pem";
          };
        }
        {
          why = "Secrets are encrypted before they reach etcd";
          flags.encryption-provider-config = "${home}/encryption-config.yaml";
        }
        {
          why = "who you are: a certificate of the CA or a service account's token, else nobody";
          flags = {
            client-ca-file = "${pki}/ca.pem";
            anonymous-auth = "false";
            service-account-issuer = "https://kubernetes.default.svc.${cluster.clusterDomain}";
            service-account-key-file = "${pki}/service-account.pem";
            service-account-signing-key-file = "${pki}/service-account-key.pem";
            # Pods renew their tokens; none need live a year for those that do not.
            service-account-extend-token-expiration = "false";
          };
        }
        {
          why = "what you may: a kubelet only what concerns its node, everybody else by roles";
          flags = {
            authorization-mode = "Node,RBAC";
            enable-admission-plugins = "NodeRestriction,DenyServiceExternalIPs";
            # Cilium's agent is a privileged pod; Pod Security decides which may be.
            allow-privileged = "true";
          };
        }
        {
          why = "logs and exec: it calls kubelets at their lan addresses, as user kubernetes";
          flags = {
            kubelet-certificate-authority = "${pki}/ca.pem";
            kubelet-client-certificate = "${pki}/kubernetes.pem";
            kubelet-client-key = "${pki}/kubernetes-key.pem";
            kubelet-preferred-address-types = "InternalIP";
          };
        }
        {
          why = "aggregated APIs (metrics-server) believe this certificate who the user is";
          flags = {
            proxy-client-cert-file = "${pki}/front-proxy-client.pem";
            proxy-client-key-file = "${pki}/front-proxy-client-key.pem";
            requestheader-client-ca-file = "${pki}/ca.pem";
            requestheader-allowed-names = "front-proxy-client";
            requestheader-username-headers = "X-Remote-User";
            requestheader-group-headers = "X-Remote-Group";
            requestheader-extra-headers-prefix = "X-Remote-Extra-";
            # No kube-proxy or Cilium here: service addresses lead nowhere, pods' do.
            enable-aggregator-routing = "true";
          };
        }
        {
          why = "who did what, kept for a month";
          flags = {
            audit-policy-file = "/etc/kubernetes/audit-policy.json";
            audit-log-path = "/var/log/kubernetes/audit.log";
            audit-log-maxage = 30;
            audit-log-maxbackup = 10;
            audit-log-maxsize = 100;
          };
        }
        {
          why = "no profiler for whoever gets in";
          flags.profiling = "false";
        }
        {
          why = "told to stop, it ends the watches too, else it waits a minute for them to end";
          flags.shutdown-watch-termination-grace-period = "5s";
        }
        {
          why = "KUBE_LOG_LEVEL of cluster.env";
          flags.v = cluster.logLevel;
        }
      ];
    };
  };

  # The first rule that fits counts.
  environment.etc."kubernetes/audit-policy.json".text = builtins.toJSON {
    apiVersion = "audit.k8s.io/v1";
    kind = "Policy";
    omitStages = [ "RequestReceived" ];
    rules = [
      # Heartbeats and watching would bury the rest.
      {
        level = "None";
        resources = [
          {
            group = "coordination.k8s.io";
            resources = [ "leases" ];
          }
          {
            group = "";
            resources = [ "events" ];
          }
        ];
      }
      # Who reads Secrets is written down, nodes among them.
      {
        level = "Metadata";
        resources = [
          {
            group = "";
            resources = [
              "secrets"
              "configmaps"
            ];
          }
        ];
      }
      {
        level = "None";
        verbs = [
          "get"
          "list"
          "watch"
        ];
        userGroups = [ "system:nodes" ];
      }
      {
        level = "None";
        nonResourceURLs = [
          "/livez*"
          "/readyz*"
          "/healthz*"
          "/version"
        ];
      }
      # Who, what and when; never the content, which may be a Secret's.
      { level = "Metadata"; }
    ];
  };

  # ── kube-controller-manager: makes what is into what is wanted ─────────────────────────────
  systemd.services.kube-controller-manager = {
    description = "Kubernetes controller manager";
    documentation = [ "${reference}/kube-controller-manager/" ];
    wantedBy = [ "multi-user.target" ];
    after = [ "kube-apiserver.service" ];
    startLimitIntervalSec = 0;
    restartTriggers = changes [
      "pki/ca.pem"
      "pki/service-account.pem"
      "kubeconfigs/kube-controller-manager.kubeconfig"
    ] [ ];
    serviceConfig = serviceOf "kubernetes" // {
      ExecStart = commandLine "${pkgs.kubernetes}/bin/kube-controller-manager" [
        {
          why = "who it is, and whom it asks about those who ask for its metrics";
          flags = {
            kubeconfig = "${home}/kube-controller-manager.kubeconfig";
            authentication-kubeconfig = "${home}/kube-controller-manager.kubeconfig";
            authorization-kubeconfig = "${home}/kube-controller-manager.kubeconfig";
          };
        }
        {
          why = "health and metrics are for this machine";
          flags = {
            bind-address = "127.0.0.1";
            tls-min-version = "VersionTLS13";
            profiling = "false";
          };
        }
        {
          why = "every controller acts with rights of its own, not with all of them";
          flags.use-service-account-credentials = "true";
        }
        {
          why = "signs service accounts' tokens, and gives pods the CA to check the API server by";
          flags = {
            service-account-private-key-file = "${pki}/service-account-key.pem";
            root-ca-file = "${pki}/ca.pem";
          };
        }
        {
          why = "signs approved CertificateSigningRequests";
          flags = {
            cluster-signing-cert-file = "${pki}/ca.pem";
            cluster-signing-key-file = "${pki}/ca-key.pem";
          };
        }
        {
          why = "each worker's pod range is written to its node from cluster.env, not chosen here";
          flags = {
            cluster-name = cluster.name;
            cluster-cidr = cluster.podCidr;
            service-cluster-ip-range = cluster.serviceCidr;
            allocate-node-cidrs = "false";
          };
        }
        {
          why = "one acts at a time, should there ever be two";
          flags.leader-elect = "true";
        }
        {
          why = "finished pods are kept to look at, but not 12500 of them";
          flags.terminated-pod-gc-threshold = 500;
        }
        {
          why = "KUBE_LOG_LEVEL of cluster.env";
          flags.v = cluster.logLevel;
        }
      ];
    };
  };

  # ── kube-scheduler: decides which worker a pod goes to ─────────────────────────────────────
  systemd.services.kube-scheduler = {
    description = "Kubernetes scheduler";
    documentation = [ "${reference}/kube-scheduler/" ];
    wantedBy = [ "multi-user.target" ];
    after = [ "kube-apiserver.service" ];
    startLimitIntervalSec = 0;
    restartTriggers =
      changes [ "kubeconfigs/kube-scheduler.kubeconfig" ] [ "kubernetes/scheduler.json" ];
    serviceConfig = serviceOf "kubernetes" // {
      ExecStart = commandLine "${pkgs.kubernetes}/bin/kube-scheduler" [
        {
          why = "what has no deprecated flag stands in the file below";
          flags.config = "/etc/kubernetes/scheduler.json";
        }
        {
          why = "whom it asks about those who ask for its metrics";
          flags = {
            authentication-kubeconfig = "${home}/kube-scheduler.kubeconfig";
            authorization-kubeconfig = "${home}/kube-scheduler.kubeconfig";
          };
        }
        {
          why = "health and metrics are for this machine";
          flags = {
            bind-address = "127.0.0.1";
            tls-min-version = "VersionTLS13";
          };
        }
        {
          why = "KUBE_LOG_LEVEL of cluster.env";
          flags.v = cluster.logLevel;
        }
      ];
    };
  };

  environment.etc."kubernetes/scheduler.json".text = builtins.toJSON {
    apiVersion = "kubescheduler.config.k8s.io/v1";
    kind = "KubeSchedulerConfiguration";
    clientConnection.kubeconfig = "${home}/kube-scheduler.kubeconfig";
    leaderElection.leaderElect = true;
    enableProfiling = false;
  };

  # ── Users, and which keys are theirs ───────────────────────────────────────────────────────
  users.users.etcd = {
    isSystemUser = true;
    group = "etcd";
    home = "/var/lib/etcd";
    description = "etcd";
  };
  users.groups.etcd = { };
  users.users.kubernetes = {
    isSystemUser = true;
    group = "kubernetes";
    home = home;
    description = "Kubernetes control plane";
  };
  users.groups.kubernetes = { };

  systemd.tmpfiles.rules = [
    "z ${pki}/ca-key.pem 0600 kubernetes kubernetes -"
    "z ${pki}/kubernetes.pem 0644 root root -"
    # The API server and etcd are known by one certificate, as in the original.
    "z ${pki}/kubernetes-key.pem 0640 kubernetes etcd -"
    "z ${pki}/service-account.pem 0644 root root -"
    "z ${pki}/service-account-key.pem 0600 kubernetes kubernetes -"
    "z ${pki}/front-proxy-client.pem 0644 root root -"
    "z ${pki}/front-proxy-client-key.pem 0600 kubernetes kubernetes -"
    "z ${home}/kube-controller-manager.kubeconfig 0600 kubernetes kubernetes -"
    "z ${home}/kube-scheduler.kubeconfig 0600 kubernetes kubernetes -"
    "z ${home}/encryption-config.yaml 0600 kubernetes kubernetes -"
  ];

  environment.systemPackages = [
    pkgs.etcd_3_6
    pkgs.kubectl
  ];
}
