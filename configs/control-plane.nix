# The control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, each a
# plain systemd service. Flags are grouped, each group with the reason why it is set; everything
# else has the program's default.
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

  # "program --flag=value …", one flag a line, in the order of the groups.
  commandLine =
    program: groups:
    lib.concatStringsSep " \\\n  " (
      [ program ]
      ++ lib.concatMap (
        group: lib.mapAttrsToList (flag: value: "--${flag}=${toString value}") group.flags
      ) groups
    );

  # Inputs that are not part of the unit itself: a changed key or file must restart it.
  changes = files: etcFiles:
    map (file: cluster.digests.${file}) files
    ++ map (file: config.environment.etc.${file}.source) etcFiles;

  # Common to all four: always restarted, and allowed to write only to their own directories.
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
  # ── etcd: stores the state of the cluster ──────────────────────────────────────────────────
  systemd.services.etcd = {
    description = "etcd, the store of the Kubernetes API server";
    documentation = [ "https://etcd.io/docs/" ];
    wantedBy = [ "multi-user.target" ];
    after = [ "network.target" ];
    startLimitIntervalSec = 0;
    restartTriggers = changes [ "pki/ca.pem" "pki/kubernetes.pem" ] [ ];
    serviceConfig = serviceOf "etcd" // {
      # Started means that it has a leader and serves requests.
      Type = "notify";
      TimeoutStartSec = 300;
      StateDirectory = "etcd";
      StateDirectoryMode = "0700";
      LimitNOFILE = 65536;
      ExecStart = commandLine "${pkgs.etcd_3_6}/bin/etcd" [
        {
          why = "a single member; its name is part of the data and must not change";
          flags = {
            name = node.name;
            data-dir = "/var/lib/etcd";
            initial-cluster = "${node.name}=https://127.0.0.1:2380";
            initial-cluster-state = "new";
            initial-cluster-token = cluster.name;
          };
        }
        {
          why = "its only client is the API server on this machine, so it listens on loopback";
          flags = {
            listen-client-urls = "https://127.0.0.1:2379";
            advertise-client-urls = "https://127.0.0.1:2379";
            listen-peer-urls = "https://127.0.0.1:2380";
            initial-advertise-peer-urls = "https://127.0.0.1:2380";
          };
        }
        {
          why = "clients and peers authenticate with a certificate of the cluster's CA";
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
          why = "health and metrics without a certificate, on loopback only";
          flags.listen-metrics-urls = "http://127.0.0.1:2381";
        }
      ];
    };
  };

  # ── kube-apiserver: every other component talks to it ──────────────────────────────────────
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
        [ "kubernetes/admission.json" "kubernetes/audit-policy.json" ];
    serviceConfig = serviceOf "kubernetes" // {
      # Started means that it listens, so the two services after it find it.
      Type = "notify";
      TimeoutStartSec = 300;
      LogsDirectory = "kubernetes";
      LogsDirectoryMode = "0700";
      LimitNOFILE = 65536;
      ExecStart = commandLine "${pkgs.kubernetes}/bin/kube-apiserver" [
        {
          why = "workers connect over the LAN, the host through its forwarded port";
          flags = {
            bind-address = "0.0.0.0";
            secure-port = cluster.apiPort;
            # The endpoint of the service "kubernetes"; by default it would be 10.0.2.15.
            advertise-address = node.ip;
            service-cluster-ip-range = cluster.serviceCidr;
          };
        }
        {
          why = "TLS 1.3 only: every client here supports it, and it has no weak ciphers";
          flags = {
            tls-cert-file = "${pki}/kubernetes.pem";
            tls-private-key-file = "${pki}/kubernetes-key.pem";
            tls-min-version = "VersionTLS13";
          };
        }
        {
          why = "etcd, and the client certificate for it";
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
          why = "authentication: a certificate of the CA or the token of a service account";
          flags = {
            client-ca-file = "${pki}/ca.pem";
            anonymous-auth = "false";
            service-account-issuer = "https://kubernetes.default.svc.${cluster.clusterDomain}";
            service-account-key-file = "${pki}/service-account.pem";
            service-account-signing-key-file = "${pki}/service-account-key.pem";
          };
        }
        {
          why = "authorization: a kubelet only for its own node, everybody else by roles";
          flags = {
            authorization-mode = "Node,RBAC";
            enable-admission-plugins = "NodeRestriction,DenyServiceExternalIPs";
            # Cilium's agent is a privileged pod; Pod Security decides which pods may be.
            allow-privileged = "true";
            admission-control-config-file = "/etc/kubernetes/admission.json";
          };
        }
        {
          why = "logs and exec: it calls kubelets at their LAN addresses, as user kubernetes";
          flags = {
            kubelet-certificate-authority = "${pki}/ca.pem";
            kubelet-client-certificate = "${pki}/kubernetes.pem";
            kubelet-client-key = "${pki}/kubernetes-key.pem";
            kubelet-preferred-address-types = "InternalIP";
          };
        }
        {
          why = "aggregated APIs (metrics-server) accept the user's name from this certificate only";
          flags = {
            proxy-client-cert-file = "${pki}/front-proxy-client.pem";
            proxy-client-key-file = "${pki}/front-proxy-client-key.pem";
            requestheader-client-ca-file = "${pki}/ca.pem";
            requestheader-allowed-names = "front-proxy-client";
            requestheader-username-headers = "X-Remote-User";
            requestheader-group-headers = "X-Remote-Group";
            requestheader-extra-headers-prefix = "X-Remote-Extra-";
            # Without kube-proxy or Cilium here, only pod addresses can be reached, not services'.
            enable-aggregator-routing = "true";
          };
        }
        {
          why = "audit log, kept for a month";
          flags = {
            audit-policy-file = "/etc/kubernetes/audit-policy.json";
            audit-log-path = "/var/log/kubernetes/audit.log";
            audit-log-maxage = 30;
            audit-log-maxbackup = 10;
            audit-log-maxsize = 100;
          };
        }
        {
          why = "no profiling endpoints";
          flags.profiling = "false";
        }
        {
          why = "on shutdown it ends open watches, instead of waiting a minute for them";
          flags.shutdown-watch-termination-grace-period = "5s";
        }
        {
          why = "KUBE_LOG_LEVEL of cluster.env";
          flags.v = cluster.logLevel;
        }
      ];
    };
  };

  # Pod Security: pods that could take over their machine are refused, and kubectl warns of what the
  # strict profile would refuse. A namespace's labels pod-security.kubernetes.io/* win over this.
  environment.etc."kubernetes/admission.json".text = builtins.toJSON {
    apiVersion = "apiserver.config.k8s.io/v1";
    kind = "AdmissionConfiguration";
    plugins = [
      {
        name = "PodSecurity";
        configuration = {
          apiVersion = "pod-security.admission.config.k8s.io/v1";
          kind = "PodSecurityConfiguration";
          defaults = {
            enforce = "baseline";
            warn = "restricted";
          };
          # Cilium's agent sets up the machine's network.
          exemptions.namespaces = [ "kube-system" ];
        };
      }
    ];
  };

  # The first rule that matches counts.
  environment.etc."kubernetes/audit-policy.json".text = builtins.toJSON {
    apiVersion = "audit.k8s.io/v1";
    kind = "Policy";
    omitStages = [ "RequestReceived" ];
    rules = [
      # Heartbeats and events would hide the rest.
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
          {
            group = "events.k8s.io";
            resources = [ "events" ];
          }
        ];
      }
      # Every access to Secrets is logged, also by nodes.
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
      # User, verb, object and time; never the content, which may be that of a Secret.
      { level = "Metadata"; }
    ];
  };

  # ── kube-controller-manager: reconciles actual with desired state ──────────────────────────
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
          why = "its credentials; requests for its metrics are checked with the API server too";
          flags = {
            kubeconfig = "${home}/kube-controller-manager.kubeconfig";
            authentication-kubeconfig = "${home}/kube-controller-manager.kubeconfig";
            authorization-kubeconfig = "${home}/kube-controller-manager.kubeconfig";
          };
        }
        {
          why = "health and metrics on loopback only";
          flags = {
            bind-address = "127.0.0.1";
            tls-min-version = "VersionTLS13";
            profiling = "false";
          };
        }
        {
          why = "every controller uses its own service account, with its own rights";
          flags.use-service-account-credentials = "true";
        }
        {
          why = "signs service account tokens, and gives pods the CA of the API server";
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
          why = "each node's pod CIDR comes from cluster.env, so none is allocated here";
          flags.allocate-node-cidrs = "false";
        }
        {
          why = "only one is active at a time, if there are several";
          flags.leader-elect = "true";
        }
        {
          why = "keeps at most 500 finished pods (the default is 12500)";
          flags.terminated-pod-gc-threshold = 500;
        }
        {
          why = "KUBE_LOG_LEVEL of cluster.env";
          flags.v = cluster.logLevel;
        }
      ];
    };
  };

  # ── kube-scheduler: assigns pods to workers ────────────────────────────────────────────────
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
          why = "settings whose flags are deprecated are in the file below";
          flags.config = "/etc/kubernetes/scheduler.json";
        }
        {
          why = "requests for its metrics are checked with the API server";
          flags = {
            authentication-kubeconfig = "${home}/kube-scheduler.kubeconfig";
            authorization-kubeconfig = "${home}/kube-scheduler.kubeconfig";
          };
        }
        {
          why = "health and metrics on loopback only";
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

  # ── Users, and the owners of keys ──────────────────────────────────────────────────────────
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
    # The API server and etcd share one certificate.
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
