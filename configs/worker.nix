# A worker: the kubelet has containerd run the containers of its pods. Without Cilium, kube-proxy
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
  # The names of plugins below are those of version 2. Should NixOS write another version, these two
  # lines conflict, instead of a block that containerd ignores without a word.
  virtualisation.containerd.settings.version = 2;
  virtualisation.containerd.settings.plugins."io.containerd.grpc.v1.cri" = {
    # The container that holds a pod's network namespace, in the version of Kubernetes 1.36.
    sandbox_image = "registry.k8s.io/pause:3.10.2";
    # Cilium copies its plugin there; the Nix store is read-only. (containerd 2.1 calls it bin_dirs.)
    cni.bin_dir = "/opt/cni/bin";
    cni.conf_dir = "/etc/cni/net.d";
    containerd.runtimes.runc = {
      runtime_type = "io.containerd.runc.v2";
      # systemd manages the cgroups; two managers of one tree lose containers under memory pressure.
      options.SystemdCgroup = true;
    };
  };
  # Images are pulled through the proxy; no other service of ours needs the internet.
  systemd.services.containerd.environment = config.networking.proxy.envVars;
  # It reads the trusted CAs only when it starts.
  systemd.services.containerd.restartTriggers = map (
    file: "${file}"
  ) config.security.pki.certificateFiles;

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
    # mount and the like for volumes, iptables for the chains that other components expect.
    path = [
      pkgs.iptables
      pkgs.util-linux
    ];
    serviceConfig = {
      Type = "notify";
      TimeoutStartSec = 300;
      Restart = "always";
      RestartSec = 5;
      # Most settings are in the file below; these have no field there. The node's address is that in
      # the LAN, as the outside one is the same on every machine.
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
    # For containerd 1.7; newer versions report their driver to the kubelet.
    cgroupDriver = "systemd";

    # Clients authenticate by a certificate of the CA or a service account token, and the API server
    # authorizes them. No anonymous access, and no port without TLS.
    address = node.ip;
    authentication.anonymous.enabled = false;
    authentication.webhook.enabled = true;
    authentication.x509.clientCAFile = "${pki}/ca.pem";
    authorization.mode = "Webhook";
    readOnlyPort = 0;

    # Its serving certificate is generated on the host, so it requests none.
    tlsCertFile = "${pki}/${node.name}.pem";
    tlsPrivateKeyFile = "${pki}/${node.name}-key.pem";
    tlsMinVersion = "VersionTLS13";
    rotateCertificates = false;
    serverTLSBootstrap = false;

    # For the /etc/resolv.conf of pods. The machine's own names 127.0.0.53, which in a pod is the pod
    # itself.
    clusterDomain = cluster.clusterDomain;
    clusterDNS = [ cluster.clusterDns ];
    resolvConf = "/run/systemd/resolve/resolv.conf";

    # The kernel settings that it requires are set below. A pod cannot use up all process ids, nor
    # make system calls outside of the runtime's profile.
    protectKernelDefaults = true;
    podPidsLimit = 4096;
    seccompDefault = true;

    # The default is below /usr, which does not exist in NixOS.
    volumePluginDir = "/var/lib/kubelet/volume-plugins";
  };

  # Containers cannot load modules, as they have no /lib/modules: Cilium needs the first two, and
  # kube-proxy the third.
  boot.kernelModules = [
    "xt_socket"
    "xfrm_user"
  ]
  ++ lib.optional kubeProxy "nf_conntrack";
  boot.kernel.sysctl = {
    "vm.overcommit_memory" = 1;
    "vm.panic_on_oom" = 0;
    "kernel.panic" = 10;
    "kernel.panic_on_oops" = 1;
    "kernel.keys.root_maxkeys" = 1000000;
    "kernel.keys.root_maxbytes" = 25000000;
  };

  # ── kube-proxy, unless Cilium replaces it ──────────────────────────────────────────────────
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
      # Traffic to a service that does not come from a pod is masqueraded.
      clusterCIDR = cluster.podCidr;
      hostnameOverride = node.name;
      clientConnection.kubeconfig = "${home}/kube-proxy.kubeconfig";
      healthzBindAddress = "127.0.0.1:10256";
      metricsBindAddress = "127.0.0.1:10249";
    };
  };

  # At shutdown, systemd gives services and containers as long as the kubelet gives pods by default.
  systemd.settings.Manager.DefaultTimeoutStopSec = "30s";

  # ── Tools on the machine ───────────────────────────────────────────────────────────────────
  environment.systemPackages = [ pkgs.cri-tools ];
  environment.etc."crictl.yaml".text = ''
    runtime-endpoint: unix:///run/containerd/containerd.sock
  '';
}
