# A worker: containerd runs the containers, the kubelet tells it which. Without Cilium, kube-proxy
# makes services reachable.
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
  kubeProxy = cluster.kubeProxyMode != "cilium";
  etcFile = file: config.environment.etc.${file}.source;
in
{
  # ── containerd ─────────────────────────────────────────────────────────────────────────────
  virtualisation.containerd.enable = true;
  virtualisation.containerd.settings.plugins."io.containerd.grpc.v1.cri" = {
    # The container that holds a pod's network namespace, as Kubernetes 1.36 has it.
    sandbox_image = "registry.k8s.io/pause:3.10.2";
    # Cilium puts its plugin there, which nothing can into the Nix store.
    cni.bin_dir = "/opt/cni/bin";
    cni.conf_dir = "/etc/cni/net.d";
    containerd.runtimes.runc = {
      runtime_type = "io.containerd.runc.v2";
      # systemd owns the cgroups; two managers of one tree lose containers under memory pressure.
      options.SystemdCgroup = true;
    };
  };
  # Images come through the proxy; containerd is the only one of ours that needs the internet.
  systemd.services.containerd.environment = config.networking.proxy.envVars;

  systemd.tmpfiles.rules = [
    "d /opt/cni/bin 0755 root root -"
    "d /etc/cni/net.d 0755 root root -"
  ]
  ++ map (plugin: "L+ /opt/cni/bin/${plugin} - - - - ${pkgs.cni-plugins}/bin/${plugin}") [
    "bridge"
    "host-local"
    "loopback"
    "portmap"
  ]
  ++ [
    "z ${pki}/${node.name}.pem 0644 root root -"
    "z ${pki}/${node.name}-key.pem 0600 root root -"
    "z ${home}/${node.name}.kubeconfig 0600 root root -"
  ]
  ++ lib.optional kubeProxy "z ${home}/kube-proxy.kubeconfig 0600 root root -";

  # ── kubelet ────────────────────────────────────────────────────────────────────────────────
  systemd.services.kubelet = {
    description = "Kubernetes kubelet";
    documentation = [ "${reference}/kubelet/" ];
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    requires = [ "containerd.service" ];
    after = [
      "network-online.target"
      "containerd.service"
    ];
    startLimitIntervalSec = 0;
    restartTriggers = [
      cluster.digests."pki/ca.pem"
      cluster.digests."pki/${node.name}.pem"
      cluster.digests."kubeconfigs/${node.name}.kubeconfig"
      (etcFile "kubernetes/kubelet.json")
    ];
    # mount and friends for volumes, iptables for the chains that others look for.
    path = [
      pkgs.iptables
      pkgs.util-linux
    ];
    serviceConfig = {
      Type = "notify";
      TimeoutStartSec = 300;
      Restart = "always";
      RestartSec = 5;
      # Most of the kubelet's settings live in the file below; these have no field there. The
      # node's address is the lan's, as that of the other card is the same on every machine.
      ExecStart = lib.concatStringsSep " \\\n  " [
        "${pkgs.kubernetes}/bin/kubelet"
        "--config=/etc/kubernetes/kubelet.json"
        "--kubeconfig=${home}/${node.name}.kubeconfig"
        "--hostname-override=${node.name}"
        "--node-ip=${node.ip}"
        "--v=${toString cluster.logLevel}"
      ];
    };
  };

  environment.etc."kubernetes/kubelet.json".text = builtins.toJSON {
    apiVersion = "kubelet.config.k8s.io/v1beta1";
    kind = "KubeletConfiguration";

    containerRuntimeEndpoint = "unix:///run/containerd/containerd.sock";
    # Taken when containerd is too old to tell (1.7); newer ones say it themselves.
    cgroupDriver = "systemd";

    # Who may ask it: certificates of the CA and service accounts, as far as the API server says
    # they may. Nobody without a name, and no port without TLS.
    address = node.ip;
    authentication.anonymous.enabled = false;
    authentication.webhook.enabled = true;
    authentication.x509.clientCAFile = "${pki}/ca.pem";
    authorization.mode = "Webhook";
    readOnlyPort = 0;

    # Who it is: certificates are made on the host, so none are asked for here.
    tlsCertFile = "${pki}/${node.name}.pem";
    tlsPrivateKeyFile = "${pki}/${node.name}-key.pem";
    tlsMinVersion = "VersionTLS13";
    rotateCertificates = false;
    serverTLSBootstrap = false;

    # What pods find in their /etc/resolv.conf. The machine's own names 127.0.0.53, which inside a
    # pod is the pod itself.
    clusterDomain = cluster.clusterDomain;
    clusterDNS = [ cluster.clusterDns ];
    resolvConf = "/run/systemd/resolve/resolv.conf";

    # Kernel settings that it relies on are set below; it refuses to start with others. A pod
    # cannot use up all process ids, nor make system calls that the runtime's profile leaves out.
    protectKernelDefaults = true;
    podPidsLimit = 4096;
    seccompDefault = true;

    # The default lies in /usr, which NixOS does not have.
    volumePluginDir = "/var/lib/kubelet/volume-plugins";
  };

  boot.kernel.sysctl = {
    "vm.overcommit_memory" = 1;
    "vm.panic_on_oom" = 0;
    "kernel.panic" = 10;
    "kernel.panic_on_oops" = 1;
    "kernel.keys.root_maxkeys" = 1000000;
    "kernel.keys.root_maxbytes" = 25000000;
  };

  # ── kube-proxy, unless Cilium does its work ────────────────────────────────────────────────
  systemd.services.kube-proxy = lib.mkIf kubeProxy {
    description = "Kubernetes kube-proxy";
    documentation = [ "${reference}/kube-proxy/" ];
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    startLimitIntervalSec = 0;
    restartTriggers = [
      cluster.digests."kubeconfigs/kube-proxy.kubeconfig"
      (etcFile "kubernetes/kube-proxy.json")
    ];
    path = [
      pkgs.iptables
      pkgs.nftables
      pkgs.kmod
    ];
    serviceConfig = {
      Restart = "always";
      RestartSec = 5;
      ExecStart = lib.concatStringsSep " \\\n  " [
        "${pkgs.kubernetes}/bin/kube-proxy"
        "--config=/etc/kubernetes/kube-proxy.json"
        "--v=${toString cluster.logLevel}"
      ];
    };
  };

  environment.etc."kubernetes/kube-proxy.json" = lib.mkIf kubeProxy {
    text = builtins.toJSON {
      apiVersion = "kubeproxy.config.k8s.io/v1alpha1";
      kind = "KubeProxyConfiguration";
      mode = cluster.kubeProxyMode;
      # What comes from elsewhere than a pod is masqueraded on its way to a service.
      clusterCIDR = cluster.podCidr;
      hostnameOverride = node.name;
      clientConnection.kubeconfig = "${home}/kube-proxy.kubeconfig";
      metricsBindAddress = "127.0.0.1:10249";
    };
  };

  # When the machine stops, a container has the time that pods have by default; systemd's is 90 s.
  systemd.settings.Manager.DefaultTimeoutStopSec = "30s";

  # ── To look around on the machine ──────────────────────────────────────────────────────────
  environment.systemPackages = [ pkgs.cri-tools ];
  environment.etc."crictl.yaml".text = ''
    runtime-endpoint: unix:///run/containerd/containerd.sock
  '';
}
